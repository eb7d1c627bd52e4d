"""One program that ranks items for users by beam search, in a process of its own.

    python -m benchmarks.beam_subjects '{"subject": "ours", "model": "FOLDER", "index": "FOLDER", ...}'

`benchmarks.beam` starts it, reads the JSON of the last line, and the rankings from `ranked`: int32 [users, width], item
rows, -1 where a place holds no item or one that stands further up.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.ranking import RankingWorker
from actors.rollout import CPU_BLOCK_TOKENS, ENVIRONMENT
from item_index.ragged import RaggedArray
from item_index.semantic_ids import SemanticIdIndex
from item_index.tokens import SemanticIdTokens


@dataclass(frozen=True)
class Task:
    """What one child process does: all users, `calls` times, after some of them to warm up."""

    subject: str
    model: str
    index: str
    prompts: str
    ranked: str
    width: int
    batch_users: int
    calls: int
    threads: int


class ItemSpellings:
    """The items as token sequences, the end of sequence included, and what may follow each beginning of one."""

    def __init__(self, task: Task) -> None:
        tokenizer: Any = AutoTokenizer.from_pretrained(task.model, local_files_only=True)
        self.index = SemanticIdIndex.load(task.index)
        self.tokens = SemanticIdTokens.of(tokenizer, self.index)
        self.end = self.tokens.end_of_sequence
        self.depth = self.index.depth
        self.rows: dict[tuple[int, ...], int] = {}
        following: dict[tuple[int, ...], set[int]] = {}
        for row in range(len(self.index)):
            codes = self.index.codes_IL[row, : self.index.lengths_I[row]].tolist()
            spelled = (*self.tokens.item_tokens(codes), self.end)
            self.rows[spelled] = row
            for place in range(len(spelled)):
                following.setdefault(spelled[:place], set()).add(spelled[place])
        self.following = {beginning: sorted(options) for beginning, options in following.items()}

    def allowed(self, beginning: Sequence[int]) -> list[int]:
        """What may follow; behind an item, and behind what is none, the end of sequence."""
        return self.following.get(tuple(beginning), [self.end])

    def ranked(self, found: list[list[int]], width: int) -> list[int]:
        """Rows of the items that these sequences spell, each once, padded with -1."""
        rows: list[int] = []
        for tokens in found[:width]:
            spelled = tokens[: tokens.index(self.end) + 1] if self.end in tokens else [*tokens, self.end]
            row = self.rows.get(tuple(spelled), -1)
            rows.append(-1 if row in rows else row)
        return rows + [-1] * (width - len(rows))


def ours(task: Task) -> Callable[[RaggedArray], np.ndarray]:
    """The project's beam search, as `gream evaluate` calls it."""
    worker = RankingWorker(task.model, task.index, threads=task.threads)

    def rank(prompts: RaggedArray) -> np.ndarray:
        nothing = RaggedArray.of([[] for _ in range(len(prompts))], np.int32)
        return worker.rank(prompts, nothing, mode="direct", width=task.width)[0]

    return rank


def hugging_face(task: Task) -> Callable[[RaggedArray], np.ndarray]:
    """`generate` of transformers with beams and a prefix function over a dict; scores are sums of log-probabilities,
    renormalised over what is allowed."""
    torch.set_num_threads(task.threads)
    model: Any = AutoModelForCausalLM.from_pretrained(task.model, local_files_only=True, dtype=torch.float32).eval()
    spellings = ItemSpellings(task)

    def rank(prompts: RaggedArray) -> np.ndarray:
        longest = int(prompts.lengths.max())
        inputs = torch.full((len(prompts), longest), spellings.end)
        seen = torch.zeros_like(inputs)
        for user, prompt in enumerate(prompts):  # filled up on the left, as `generate` wants it
            inputs[user, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            seen[user, longest - len(prompt) :] = 1
        with torch.inference_mode():
            rows = model.generate(
                inputs, attention_mask=seen, num_beams=task.width, num_return_sequences=task.width, do_sample=False,
                max_new_tokens=spellings.depth + 1, length_penalty=0.0, renormalize_logits=True,
                pad_token_id=spellings.end,
                prefix_allowed_tokens_fn=lambda _, sequence: spellings.allowed(sequence[longest:].tolist()),
            )  # fmt: skip
        found = rows[:, longest:].reshape(len(prompts), task.width, -1).tolist()
        return np.array([spellings.ranked(beams, task.width) for beams in found], dtype=np.int32)

    return rank


def vllm(task: Task) -> Callable[[RaggedArray], np.ndarray]:
    """`LLM.beam_search`, under a logits processor that reads the place in an item from a request's last tokens: the
    method passes requests no settings of their own."""
    from vllm import LLM
    from vllm.sampling_params import BeamSearchParams
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    torch.set_num_threads(task.threads)
    spellings = ItemSpellings(task)
    levels = spellings.tokens.level_of_token

    class LastTokens(AdapterLogitsProcessor):
        """Leaves a row's logits at the tokens that may follow the semantic-ID tokens at its end."""

        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params: Any) -> Any:
            def mask(prompt: list[int], output: list[int], logits_V: torch.Tensor) -> torch.Tensor:
                tokens = [*prompt[-spellings.depth - 1 :], *output]
                start = len(tokens)
                while start and levels[tokens[start - 1]] >= 0:
                    start -= 1
                allowed = spellings.allowed(tokens[start:])
                masked_V = torch.full_like(logits_V, float("-inf"))
                masked_V[allowed] = logits_V[allowed]
                return masked_V

            return mask

    longest = int(RaggedArray.of(_prompts(task), np.int32).lengths.max()) + spellings.depth + 2
    llm = LLM(
        model=task.model, dtype="float32", seed=0, max_model_len=longest, max_num_seqs=256,
        kv_cache_memory_bytes=512 * 2**20, enforce_eager=True, enable_prefix_caching=True,
        enable_chunked_prefill=False, max_num_batched_tokens=max(longest, 8192), block_size=CPU_BLOCK_TOKENS,
        async_scheduling=False, generation_config="vllm", logprobs_mode="processed_logprobs",
        max_logprobs=2 * task.width, disable_log_stats=True, logits_processors=[LastTokens],
    )  # fmt: skip
    search = BeamSearchParams(beam_width=task.width, max_tokens=spellings.depth + 1, length_penalty=0.0)

    def rank(prompts: RaggedArray) -> np.ndarray:
        inputs: list[Any] = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
        outputs = llm.beam_search(inputs, search)
        found = [
            [beam.tokens[len(prompt) :] for beam in output.sequences]
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
        return np.array([spellings.ranked(beams, task.width) for beams in found], dtype=np.int32)

    return rank


SUBJECTS: dict[str, Callable[[Task], Callable[[RaggedArray], np.ndarray]]] = {
    "ours": ours,
    "Hugging Face, prefix function": hugging_face,
    "vLLM, LLM.beam_search": vllm,
}


def _prompts(task: Task) -> list[np.ndarray]:
    stored = np.load(task.prompts)
    return np.split(stored["tokens"], stored["ends"][:-1])


def measure(task: Task) -> dict[str, float]:
    """Start the subject, warm it up, time its calls."""
    os.environ.update(ENVIRONMENT)
    prompts = RaggedArray.of(_prompts(task), np.int32)
    started = time.perf_counter()
    rank = SUBJECTS[task.subject](task)
    order = np.argsort(prompts.lengths, kind="stable")  # users of similar length together, for every subject
    batches = [order[at : at + task.batch_users] for at in range(0, len(order), task.batch_users)]
    rank(prompts.select(order[: min(4, len(order))]))
    ready = time.perf_counter() - started
    seconds = []
    ranked = np.full((len(prompts), task.width), -1, np.int32)
    for _ in range(task.calls):
        began = time.perf_counter()
        for users in batches:
            ranked[users] = rank(prompts.select(users))
        seconds.append(time.perf_counter() - began)
    np.save(task.ranked, ranked)
    return {
        "users per second": len(prompts) / median(seconds),
        "slowest": len(prompts) / max(seconds),
        "fastest": len(prompts) / min(seconds),
        "start": ready,
        "peak memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def command(task: Task) -> list[str]:
    """The command line of the child process that measures it."""
    return [sys.executable, "-m", "benchmarks.beam_subjects", json.dumps(asdict(task))]


if __name__ == "__main__":
    print(json.dumps(measure(Task(**json.loads(sys.argv[1])))))
