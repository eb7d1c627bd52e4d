"""Seconds of one weight transfer from the learner to the rollout engine, by what takes them.

    python -m benchmarks.weights [--model 8M]... [--repeats N] [--json FILE]

Learner and engine are the actors of the train stage on one checkpoint with random weights. `ours` is the loop's own
transfer, here in chunks of 64 MiB: the learner's weights into the object store, and from there into the engine, which
packs its layers. `one call per parameter` sends each tensor in a call of its own and has the engine take them over at
the end. `memory copy` copies the same bytes once within a process: the floor.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import ray
import typer
from rich.table import Table

from actors.learner import ENVIRONMENT as LEARNER_ENVIRONMENT
from actors.learner import LearnerActor
from actors.rollout import ENVIRONMENT, RolloutEngine
from benchmarks.learner import SHAPES
from benchmarks.machine import ReportRow, write_report
from benchmarks.random_model import write_item_model
from benchmarks.rollouts import random_index
from cluster.placement import await_result, await_stream
from cluster.progress import console
from learner.weight_chunks import WeightChunk

VOCABULARY = 3000
DEADLINE = 600.0


class ReceivingEngine(RolloutEngine):
    """A rollout engine that also takes weights one by one."""

    received: list[WeightChunk]

    def receive(self, chunk: WeightChunk) -> None:
        """Keep one parameter until all have come."""
        self.received = [*getattr(self, "received", []), chunk]

    def take_over(self) -> int:
        """Replace the weights by those that have come."""
        chunks, self.received = self.received, []
        return self.update_weights(chunks)


def measure(folder: Path, name: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat, by subject; `learner` and `engine` are the two halves of ours; `bytes` comes once."""
    index = random_index(1000)
    index.save(folder / "index")
    write_item_model(folder / "model", index, VOCABULARY, **SHAPES[name])
    model = str(folder / "model")
    learner = LearnerActor.options(num_cpus=0, runtime_env={"env_vars": LEARNER_ENVIRONMENT}).remote(
        model, seed=0, threads=1,
        engine={
            "learning_rate": 0.0, "weight_decay": 0.0, "warm_up_steps": 0, "total_steps": 1, "schedule": "constant",
            "gradient_clip": 1.0, "zero_stage": 2,
        },
    )  # fmt: skip
    actor: Any = ray.remote(concurrency_groups={"health": 1})(ReceivingEngine)  # type: ignore[call-overload]
    engine = actor.options(num_cpus=0, runtime_env={"env_vars": ENVIRONMENT}).remote(
        model, str(folder / "index"), maximum_tokens=256, kv_cache_mib=64, threads=1
    )
    seconds: dict[str, list[float]] = {}

    def timed(subject: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        seconds.setdefault(subject, []).append(time.perf_counter() - started)
        return result

    def chunks(chunk_bytes: int) -> list[ray.ObjectRef]:
        stream = learner.weight_chunks.options(num_returns="streaming").remote(chunk_bytes)
        return await_stream(stream, "the weights", DEADLINE)

    def ours() -> None:
        references = timed("ours, learner", lambda: chunks(64 * 2**20))
        call = engine.update_weights.remote(references)
        timed("ours, engine", lambda: await_result(call, "the transfer", DEADLINE))

    def one_by_one() -> None:
        for reference in chunks(1):
            await_result(engine.receive.remote(reference), "a parameter", DEADLINE)
        await_result(engine.take_over.remote(), "the transfer", DEADLINE)

    def copy_in_memory() -> None:
        for target, array in zip(copies, held, strict=True):
            np.copyto(target, array)

    held = [array.copy() for reference in chunks(64 * 2**20) for array in ray.get(reference).arrays]
    copies = [np.empty_like(array) for array in held]
    for repeat in range(repeats + 1):
        timed("ours", ours)
        timed("one call per parameter", one_by_one)
        timed("memory copy", copy_in_memory)
        if repeat == 0:  # to warm up
            seconds.clear()
    for one in (learner, engine):
        ray.kill(one)
    return seconds | {"bytes": [float(sum(array.nbytes for array in held))]}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def benchmark(
    model: Annotated[list[str], typer.Option(help=f"Shape: {', '.join(SHAPES)}.")] = ["8M", "135M"],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the numbers and the machine.")] = None,
) -> None:
    """Time the weight transfer beside one call per parameter and a copy in memory."""
    report: list[ReportRow] = []
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    for name in model:
        with tempfile.TemporaryDirectory() as folder:
            seconds = measure(Path(folder), name, repeats)
        (size,) = seconds.pop("bytes")
        console.print(report_table(name, seconds, size))
        report += [
            {"case": name, "subject": subject, "metric": metric, "value": value, "unit": unit}
            for subject, values in seconds.items()
            for metric, value, unit in (
                ("time", median(values), "s"), ("slowest", max(values), "s"), ("fastest", min(values), "s"),
                ("speed", size / median(values) / 1e9, "GB/s"),
            )
        ]  # fmt: skip
    ray.shutdown()
    if json_file is not None:
        write_report(json_file, report)


def report_table(name: str, seconds: dict[str, list[float]], size: float) -> Table:
    """One line per subject; seconds and how many bytes that is in one."""
    table = Table(title=f"{name}: {size / 2**20:.0f} MiB of weights")
    for column in ("", "s", "slowest", "fastest", "GB/s", "it / ours"):
        table.add_column(column, justify="right")
    for subject, values in seconds.items():
        table.add_row(
            subject, f"{median(values):.3f}", f"{max(values):.3f}", f"{min(values):.3f}",
            f"{size / median(values) / 1e9:.2f}", f"{median(values) / median(seconds['ours']):.2f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    app()
