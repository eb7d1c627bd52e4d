"""One program that trains a causal language model on the same supervised rows, in a process of its own.

    python -m benchmarks.supervised_subjects '{"subject": "ours", "model": "FOLDER", ...}'

`benchmarks.supervised` starts it and reads the JSON of the last line. Rows are like the supervised stage's: most have a
history of up to 20 items as prompt and an item as response, some a chain, some are short texts.
"""

from __future__ import annotations

import json
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from item_index.ragged import RaggedArray

WARM_UP_STEPS = 2
PACKED_LENGTH = 1024  # TRL's default
LEARNING_RATE, CLIP = 1e-3, 1.0


@dataclass(frozen=True)
class Task:
    """What one child process does: `steps` optimizer steps of `rows_per_step` rows after the warm-up."""

    subject: str
    model: str
    vocabulary: int
    steps: int
    rows_per_step: int
    seed: int = 0


def supervised_rows(task: Task) -> tuple[RaggedArray, RaggedArray]:
    """Tokens (int32) and loss masks (bool) of all steps, the warm-up included; the response is what is learnt."""
    generator = np.random.default_rng(task.seed)
    tokens, learnt = [], []
    for kind in generator.choice(3, (WARM_UP_STEPS + task.steps) * task.rows_per_step, p=(0.6, 0.2, 0.2)):
        prompt, response = (
            (generator.integers(20, 110), 5), (generator.integers(60, 110), generator.integers(80, 160)),
            (generator.integers(10, 40), generator.integers(5, 40)),
        )[kind]  # fmt: skip
        tokens.append(generator.integers(3, task.vocabulary, prompt + response))
        learnt.append(np.arange(prompt + response) >= prompt)
    return RaggedArray.of(tokens, np.int32), RaggedArray.of(learnt, bool)


@dataclass(frozen=True)
class Steps:
    """Per optimizer step: seconds and tokens that are no padding; and the loss of the last one."""

    seconds: list[float]
    tokens: list[float]
    loss: float


def ours(task: Task, tokens: RaggedArray, learnt: RaggedArray) -> Steps:
    """The rank's step of the supervised stage, DeepSpeed ZeRO 2 included."""
    from learner.engine import LearnerEngine, initialize_process_group
    from learner.packed_attention import PACKED
    from learner.policy import Policy, load_language_model
    from learner.supervised import supervised_step

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    initialize_process_group(port=port)
    engine = LearnerEngine(
        Policy(load_language_model(task.model, attention=PACKED)), learning_rate=LEARNING_RATE, weight_decay=0.01,
        warm_up_steps=0, total_steps=1, schedule="constant", gradient_clip=CLIP, zero_stage=2,
    )  # fmt: skip
    done = Steps([], [], 0.0)
    for step in range(WARM_UP_STEPS + task.steps):
        rows = np.arange(step * task.rows_per_step, (step + 1) * task.rows_per_step)
        started = time.perf_counter()
        metrics = supervised_step(engine, tokens.select(rows), learnt.select(rows), micro_batch_tokens=8192)
        done.seconds.append(time.perf_counter() - started)
        done.tokens.append(metrics["tokens"])
    return replace(done, loss=metrics["loss"])


def trl(task: Task, tokens: RaggedArray, learnt: RaggedArray, *, packing: bool) -> Steps:
    """`trl.SFTTrainer` with its defaults but for: no gradient checkpointing (it is slower), float32, no logging."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    labels = [np.where(mask, row, -100).tolist() for row, mask in zip(tokens, learnt, strict=True)]
    rows = datasets.Dataset.from_dict({"input_ids": [row.tolist() for row in tokens], "labels": labels})
    batch = task.rows_per_step
    if packing:  # as many sequences as hold about the same tokens
        batch = max(1, round(len(tokens.values) / (WARM_UP_STEPS + task.steps) / PACKED_LENGTH))
    done = Steps([], [], 0.0)

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            done.seconds.append(time.perf_counter() - self.started)
            done.tokens.append(state.num_input_tokens_seen - sum(done.tokens))

    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32, attn_implementation="sdpa"),
            args=SFTConfig(
                output_dir=folder, per_device_train_batch_size=batch, num_train_epochs=1, learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant", weight_decay=0.01, max_grad_norm=CLIP, packing=packing,
                max_length=PACKED_LENGTH, gradient_checkpointing=False, use_cpu=True, bf16=False, report_to="none",
                save_strategy="no", logging_steps=1, disable_tqdm=True, include_num_input_tokens_seen="non_padding",
                dataloader_drop_last=True, seed=task.seed,
            ),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(task.model),
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return replace(done, loss=losses[-1])


SUBJECTS: dict[str, Callable[[Task, RaggedArray, RaggedArray], Steps]] = {
    "ours": ours,
    "TRL, padded": partial(trl, packing=False),
    "TRL, packed": partial(trl, packing=True),
}


def measure(task: Task) -> dict[str, float]:
    """Tokens per second over all steps after the warm-up, and the spread of the steps."""
    steps = SUBJECTS[task.subject](task, *supervised_rows(task))
    seconds, tokens = steps.seconds[WARM_UP_STEPS:], steps.tokens[WARM_UP_STEPS:]
    rates = [amount / time_ for amount, time_ in zip(tokens, seconds, strict=True)]
    return {
        "tokens per second": sum(tokens) / sum(seconds), "slowest step": min(rates), "fastest step": max(rates),
        "steps": float(len(seconds)), "tokens": float(sum(tokens)), "loss": steps.loss,
    }  # fmt: skip


def command(task: Task) -> list[str]:
    """The command line that measures the task in a process of its own."""
    return [sys.executable, "-m", "benchmarks.supervised_subjects", json.dumps(asdict(task))]


if __name__ == "__main__":
    print(json.dumps(measure(Task(**json.loads(sys.argv[1])))))
