"""One program that samples groups of responses, in a process of its own.

    python -m benchmarks.rollouts_subjects '{"subject": "ours", "model": "FOLDER", "index": "FOLDER", ...}'

`benchmarks.rollouts` starts it and reads the JSON of the last line. Prompts are random words; in direct mode a response
is the four codes of an item and the end of sequence, in reasoning mode as many tokens as the budget allows at most.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from actors.rollout import CPU_BLOCK_TOKENS, ENVIRONMENT, RolloutEngine, prompt_seeds
from item_index.ragged import RaggedArray
from item_index.semantic_ids import SemanticIdIndex
from learner.rollouts import RolloutPrompts

WORDS = 1500  # the first tokens of the tokenizer are text


@dataclass(frozen=True)
class Task:
    """What one child process does: `calls` times all prompts, after a call to warm up."""

    subject: str
    model: str
    index: str
    mode: str
    prompts: int
    responses: int
    prompt_tokens: int
    budget: int
    calls: int
    threads: int
    dtype: str = "float32"
    seed: int = 0


@dataclass(frozen=True)
class Sampled:
    """What one call gave: responses as lists of tokens, and the engine's steps (0 where there is no engine)."""

    responses: list[list[int]]
    steps: int = 0


def random_prompts(task: Task, call: int) -> list[list[int]]:
    """The prompts of a call, the same for every subject."""
    generator = np.random.default_rng([task.seed, call])
    return generator.integers(2, WORDS, (task.prompts, task.prompt_tokens)).tolist()


def _counted_steps(llm: Any) -> Callable[[], int]:
    """Count an engine's steps from now on; returns what tells the number."""
    steps, step = [0], llm.llm_engine.step

    def counting() -> Any:
        steps[0] += 1
        return step()

    llm.llm_engine.step = counting
    return lambda: steps[0]


def ours(task: Task, sampler: Any = "constrained") -> Callable[[int], Sampled]:
    """The project's rollout engine."""
    engine = RolloutEngine(
        task.model, task.index, dtype=task.dtype, maximum_tokens=task.prompt_tokens + task.budget,  # type: ignore[arg-type]
        threads=task.threads, sampler=sampler,
    )  # fmt: skip
    assert engine.sampler_in_use().startswith(sampler), engine.sampler_in_use()
    steps = _counted_steps(engine.llm)

    def call(number: int) -> Sampled:
        before = steps()
        batch = engine.generate(
            RolloutPrompts(
                tokens=RaggedArray.of(random_prompts(task, number), np.int32),
                targets=np.zeros(task.prompts, dtype=np.int32),
                reasoning=np.full(task.prompts, task.mode == "reasoning"),
                budgets=np.full(task.prompts, task.budget, dtype=np.int32),
                excluded=RaggedArray.of([[] for _ in range(task.prompts)], np.int32),
            ),
            responses=task.responses, seeds=prompt_seeds(task.seed, number, task.prompts),
        )  # fmt: skip
        return Sampled([row.tolist() for row in batch.responses], steps() - before)

    return call


def vllm(task: Task, *, structured: bool = False) -> Callable[[int], Sampled]:
    """vLLM with the options of the project's engine, unconstrained or under a regular expression of all items."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    torch.set_num_threads(task.threads)
    llm = LLM(
        model=task.model, dtype=task.dtype, seed=task.seed, max_model_len=task.prompt_tokens + task.budget,  # type: ignore[arg-type]
        max_num_seqs=256, kv_cache_memory_bytes=256 * 2**20, enforce_eager=True, enable_prefix_caching=True,
        enable_chunked_prefill=False, max_num_batched_tokens=max(task.prompt_tokens + task.budget, 8192),
        block_size=CPU_BLOCK_TOKENS, async_scheduling=False, generation_config="vllm",
        logprobs_mode="processed_logprobs", disable_log_stats=True, structured_outputs_config={"backend": "guidance"},
    )  # fmt: skip
    grammar = None
    if structured:
        index = SemanticIdIndex.load(task.index)
        names = index.tokens()
        texts = ["".join(names[level][code] for level, code in enumerate(codes[:4])) for codes in index.codes_IL]
        grammar = StructuredOutputsParams(regex="(" + "|".join(map(re.escape, texts)) + ")")
    steps = _counted_steps(llm)

    def call(number: int) -> Sampled:
        before = steps()
        parameters = [
            SamplingParams(
                n=task.responses, temperature=1.0, max_tokens=task.budget, seed=seed, logprobs=0, detokenize=False,
                # Unconstrained responses would end anywhere; they get as many tokens as the constrained ones.
                ignore_eos=not structured, structured_outputs=grammar,
            )
            for seed in prompt_seeds(task.seed, number, task.prompts)
        ]  # fmt: skip
        prompts: list[Any] = [{"prompt_token_ids": tokens} for tokens in random_prompts(task, number)]
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        return Sampled([list(one.token_ids) for output in outputs for one in output.outputs], steps() - before)

    return call


def hugging_face(task: Task) -> Callable[[int], Sampled]:
    """`generate` of transformers with a dict of the items' beginnings as prefix function."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    torch.set_num_threads(task.threads)
    tokenizer: Any = AutoTokenizer.from_pretrained(task.model, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(task.model, local_files_only=True, dtype=task.dtype).eval()
    index = SemanticIdIndex.load(task.index)
    vocabulary = tokenizer.get_vocab()
    tokens = [[vocabulary[name] for name in level] for level in index.tokens()]
    following: dict[tuple[int, ...], set[int]] = {}
    for codes in index.codes_IL:
        spelled = [*(tokens[level][code] for level, code in enumerate(codes[:4])), tokenizer.eos_token_id]
        for place in range(len(spelled)):
            following.setdefault(tuple(spelled[:place]), set()).add(spelled[place])
    allowed = {prefix: sorted(options) for prefix, options in following.items()}
    done = [tokenizer.pad_token_id]

    def prefix_allowed(_row: int, sequence: torch.Tensor) -> list[int]:
        return allowed.get(tuple(sequence[task.prompt_tokens :].tolist()), done)

    def call(number: int) -> Sampled:
        set_seed(task.seed + number)
        with torch.inference_mode():
            inputs = torch.tensor(random_prompts(task, number))
            rows = model.generate(
                inputs, attention_mask=torch.ones_like(inputs), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                num_return_sequences=task.responses, max_new_tokens=task.budget,
                prefix_allowed_tokens_fn=prefix_allowed,
            )  # fmt: skip
        return Sampled(rows[:, task.prompt_tokens :].tolist())

    return call


SUBJECTS: dict[str, Callable[[Task], Callable[[int], Sampled]]] = {
    "ours": ours,
    "ours, plain sampler": lambda task: ours(task, "plain"),
    "vLLM, unconstrained": vllm,
    "vLLM, structured outputs": lambda task: vllm(task, structured=True),
    "Hugging Face, prefix function": hugging_face,
}


def valid_share(responses: list[list[int]], task: Task) -> float:
    """Share of responses whose answer is an item: in direct mode the first tokens, in reasoning mode those after the
    answer's opening."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(task.model, local_files_only=True)
    vocabulary, index = tokenizer.get_vocab(), SemanticIdIndex.load(task.index)
    names = index.tokens()
    items = {tuple(vocabulary[names[level][code]] for level, code in enumerate(codes[:4])) for codes in index.codes_IL}
    start = {"direct": lambda row: 0, "reasoning": lambda row: row.index(vocabulary["<answer>"]) + 1}[task.mode]
    answered = [
        row[start(row) : start(row) + 4] if task.mode == "direct" or vocabulary["<answer>"] in row else []
        for row in responses
    ]
    return float(np.mean([tuple(answer) in items for answer in answered]))


def measure(task: Task) -> dict[str, float]:
    """Start the subject, warm it up, time its calls."""
    os.environ.update(ENVIRONMENT)
    started = time.perf_counter()
    call = SUBJECTS[task.subject](task)
    call(0)
    ready = time.perf_counter() - started
    seconds, sampled = [], []
    for number in range(1, task.calls + 1):
        began = time.perf_counter()
        sampled.append(call(number))
        seconds.append(time.perf_counter() - began)
    responses = [row for one in sampled for row in one.responses]
    steps = [one.steps for one in sampled]
    numbers = {
        "responses per second": len(sampled[0].responses) / median(seconds),
        "slowest": len(sampled[0].responses) / max(seconds),
        "fastest": len(sampled[0].responses) / min(seconds),
        "tokens per response": float(np.mean([len(row) for row in responses])),
        "valid answers": valid_share(responses, task),
        "start": ready,
        "peak memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if steps[0]:
        numbers["step"] = 1000 * median(second / step for second, step in zip(seconds, steps, strict=True))
        numbers["steps"] = float(median(steps))
    return numbers


def command(task: Task) -> list[str]:
    """The command line of the child process that measures it."""
    return [sys.executable, "-m", "benchmarks.rollouts_subjects", json.dumps(asdict(task))]


if __name__ == "__main__":
    print(json.dumps(measure(Task(**json.loads(sys.argv[1])))))
