"""One program that takes whole policy steps in direct mode, in a process of its own, on one core.

    python -m benchmarks.step_subjects '{"subject": "ours", "model": "FOLDER", "index": "FOLDER", ...}'

`benchmarks.step` starts it and reads the JSON of the last line. A step samples groups of responses to random prompts,
rewards them by a hash of their tokens (so that every group has variance and is trained on), and takes one optimizer
step on all of them, with a divergence from a frozen reference. `ours` are the actors and the loop of the train stage.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

WORDS = 1500  # the first tokens of the tokenizer are text
PHASES = ("rollouts", "rewards", "learner", "weights")


@dataclass(frozen=True)
class Task:
    """What one child process does: `steps` steps after one to warm up."""

    subject: str
    model: str
    index: str
    prompts: int
    responses: int
    prompt_tokens: int
    budget: int
    steps: int
    seed: int = 0


def random_prompt(task: Task, number: int) -> np.ndarray:
    """int32 [prompt_tokens]: a prompt, the same for every subject."""
    generator = np.random.default_rng([task.seed, number])
    return generator.integers(2, WORDS, task.prompt_tokens).astype(np.int32)


def hash_reward(tokens: Sequence[int]) -> float:
    """A number in [0, 1] that depends on all tokens."""
    return zlib.crc32(np.asarray(tokens, np.int64).tobytes()) / 2**32


def reward_of_sample(sample: Any) -> float:
    """`hash_reward` as a reward of `train.rewards`."""
    return hash_reward(sample.tokens)


class RandomPrompts:
    """What the loop asks of a `PromptSource`, with random prompts."""

    def __init__(self, task: Task, item_tokens: Sequence[Sequence[int]]) -> None:
        self.task = task
        self.corpus = SimpleNamespace(builder=SimpleNamespace(item_tokens=item_tokens))

    def reinforcement_positions(self, minimum_history: int) -> np.ndarray:
        return np.arange(self.task.prompts * (self.task.steps + 2))

    def prompts(self, positions: np.ndarray, modes: Sequence[str]) -> Any:
        from item_index.ragged import RaggedArray
        from learner.rollouts import RolloutPrompts

        return RolloutPrompts(
            tokens=RaggedArray.of([random_prompt(self.task, int(number)) for number in positions], np.int32),
            targets=np.zeros(len(positions), np.int32), reasoning=np.zeros(len(positions), bool),
            budgets=np.full(len(positions), self.task.budget, np.int32),
            excluded=RaggedArray.of([[] for _ in positions], np.int32),
        )  # fmt: skip


def ours(task: Task) -> list[dict[str, float]]:
    """Seconds by phase of each step, and what it trained on, from the metrics of the loop."""
    from transformers import AutoTokenizer

    from cluster.placement import ray_session
    from cluster.settings import load_settings
    from cluster.srpo_actors import srpo_actors
    from cluster.train import SrpoLoop
    from item_index.constraint import AnswerConstraint
    from item_index.semantic_ids import SemanticIdIndex

    settings = load_settings(
        None,
        [
            f"train.steps={task.steps + 1}", f"train.prompts_per_step={task.prompts}",
            f"train.mini_batch_prompts={task.prompts}", f"train.responses={task.responses}", "train.reasoning_share=0",
            "train.rewards=[{reward: 'benchmarks.step_subjects:reward_of_sample'}]", "train.max_staleness=0",
            "train.weight_check_steps=1000", "cluster.threads=1", "cluster.rollout_sequences=256",
        ],
    )  # fmt: skip
    constraint = AnswerConstraint.of(
        SemanticIdIndex.load(task.index), AutoTokenizer.from_pretrained(task.model, local_files_only=True)
    )
    codes = SemanticIdIndex.load(task.index).codes_IL[:1]
    item_tokens = [constraint.tokens.item_tokens([int(code) for code in row if code >= 0]) for row in codes]
    measured = []
    with ray_session(settings.cluster), srpo_actors(settings, Path(task.index), Path(task.model)) as actors:
        loop = SrpoLoop(settings, RandomPrompts(task, item_tokens), actors)  # type: ignore[arg-type]
        for step in range(1, task.steps + 2):
            metrics = loop.step(step)
            seconds = {phase: metrics[f"seconds/{phase}"] for phase in PHASES}
            measured.append(
                {
                    **seconds, "step": metrics["seconds/step"], "engine": metrics["seconds/engine"],
                    "trained": metrics["groups_trained"] * task.responses,
                    "tokens": metrics["tokens_generated"], "valid": metrics["valid_rate"],
                }
            )  # fmt: skip
    return measured[1:]


def trl(task: Task, *, head_at_responses: bool) -> list[dict[str, float]]:
    """`trl.GRPOTrainer` with Hugging Face generation, the same divergence, batches of a group a forward pass."""
    import datasets
    import torch
    import trl.trainer.utils
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    if head_at_responses:
        trl.trainer.utils._use_triton = lambda device: True
    rows = [" ".join(map(str, random_prompt(task, number))) for number in range(task.prompts * (task.steps + 1))]

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [hash_reward(tokens) for tokens in completion_ids]

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32, attn_implementation="sdpa"),
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            save_strategy="no", disable_tqdm=True, max_steps=task.steps + 1, learning_rate=2e-6, beta=0.001,
            num_generations=task.responses, per_device_train_batch_size=task.responses,
            gradient_accumulation_steps=task.prompts, max_completion_length=task.budget, temperature=1.0,
            generation_kwargs={"min_new_tokens": task.budget}, epsilon=0.2, delta=10.0, shuffle_dataset=False,
            logging_strategy="no",
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": rows}),
        processing_class=AutoTokenizer.from_pretrained(task.model),
    )  # fmt: skip
    trainer._tokenize_prompts = lambda prompts: ([list(map(int, text.split())) for text in prompts], None, {})

    seconds: dict[str, float] = defaultdict(float)

    def timed(name: str, phase: str) -> None:
        inner = getattr(trainer, name)

        def wrapper(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*arguments, **named)
            finally:
                seconds[phase] += time.perf_counter() - started

        setattr(trainer, name, wrapper)

    timed("_generate", "rollouts")
    timed("_calculate_rewards", "rewards")
    timed("_generate_and_score_completions", "preparation")
    timed("_get_per_token_logps_and_entropies", "log-probabilities")
    measured: list[dict[str, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **named: Any) -> None:
            seconds.clear()
            self.started = time.perf_counter()

        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            step = time.perf_counter() - self.started
            # What the preparation does beside generation and rewards is the reference's pass.
            learner = step - seconds["rollouts"] - seconds["rewards"]
            measured.append(
                {
                    "rollouts": seconds["rollouts"], "rewards": seconds["rewards"], "learner": learner, "weights": 0.0,
                    "step": step, "engine": seconds["rollouts"], "trained": float(task.prompts * task.responses),
                    "tokens": float(task.prompts * task.responses * task.budget), "valid": float("nan"),
                }
            )  # fmt: skip

    trainer.add_callback(Clock())
    trainer.train()
    return measured[1:]


SUBJECTS: dict[str, Callable[[Task], list[dict[str, float]]]] = {
    "ours": ours,
    "TRL, head at responses": partial(trl, head_at_responses=True),
    "TRL": partial(trl, head_at_responses=False),
}


def measure(task: Task) -> dict[str, float]:
    """All numbers of the step of median length, so that its phases add up, and responses trained per second."""
    steps = sorted(SUBJECTS[task.subject](task), key=lambda step: step["step"])
    numbers = steps[(len(steps) - 1) // 2]
    return {**numbers, "responses per second": numbers["trained"] / numbers["step"]}


def command(task: Task) -> list[str]:
    """The command line that measures the task in a process of its own."""
    return [sys.executable, "-m", "benchmarks.step_subjects", json.dumps(asdict(task))]


def main() -> None:
    """One core for the process and all that it starts, for every subject alike."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ["OMP_NUM_THREADS"] = "1"
    print(json.dumps(measure(Task(**json.loads(sys.argv[1])))))


if __name__ == "__main__":
    main()
