"""Processes and nodes are killed under a run of the train stage, again and again: how long until it is a step further.

    python -m benchmarks.faults [--faults 20] [--seed 0] [--json FILE]

A small run is trained twice on a Ray cluster of three nodes, each with one CPU: once undisturbed, once while faults are
injected, in an order and at moments that the seed gives: SIGKILL to a rollout engine, a reward worker, a learner rank,
or the raylet of a node that does not hold the driver; a new node comes in the place of a lost one. Nobody intervenes.
The seconds of a fault go from the signal to the first update that the run had not begun before. The run must end by
itself with as many trained groups as the undisturbed one, step by step.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.table import Table

from benchmarks.local_nodes import LocalNodes
from benchmarks.machine import ReportRow, write_report
from cluster.pipeline import run_stages
from cluster.progress import console
from cluster.settings import load_settings

ACTORS = {
    "rollout engine": "ray::RolloutEngine",
    "reward worker": "ray::RewardWorker",
    "learner rank": "ray::LearnerRank",
}
KINDS = (*ACTORS, "node")
STEPS_BETWEEN = 3  # steps of the run for each fault: one that is disturbed, one or two that are not
DEADLINE = 600.0
ITEMS, USERS, HISTORY = 60, 60, 12

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Run:
    """`gream train` in a process of its own, on the nodes."""

    def __init__(self, nodes: LocalNodes, overrides: list[str], folder: Path) -> None:
        self.folder = folder
        command = [str(Path(sys.executable).with_name("gream")), "train", *overrides, f"run_folder={folder}"]
        self.log = folder / "train.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, f"cluster.address={nodes.address}"], stdout=output, stderr=subprocess.STDOUT,
                env=nodes.environment,
            )  # fmt: skip

    @property
    def begun(self) -> int:
        """The latest step whose update has begun; what an update trains on is written first."""
        files = (self.folder / "rollouts").glob("step-*.parquet")
        return max((int(file.stem.removeprefix("step-")) for file in files), default=0)

    def wait_for(self, step: int, what: str) -> None:
        """Until the update of a step has begun; RuntimeError with the run's output where that does not happen."""
        deadline = time.monotonic() + DEADLINE
        while self.begun < step:
            if self.process.poll() is not None:
                raise RuntimeError(f"the run ended before {what}:\n{self.log.read_text()}")
            if time.monotonic() > deadline:
                self.process.kill()
                raise RuntimeError(f"no {what} within {DEADLINE:.0f} s:\n{self.log.read_text()}")
            time.sleep(0.01)

    def finish(self) -> list[int]:
        """Groups of every step, after the run has ended by itself."""
        if self.process.wait(timeout=DEADLINE) != 0:
            raise RuntimeError(f"the run failed:\n{self.log.read_text()}")
        return [pq.read_metadata(file).num_rows for file in sorted((self.folder / "rollouts").glob("step-*.parquet"))]


def actor_processes(name: str) -> list[psutil.Process]:
    """Processes of an actor's class on this machine, the youngest last."""
    found = [
        process for process in psutil.process_iter(["name", "create_time"]) if process.info["name"].startswith(name)
    ]
    return sorted(found, key=lambda process: process.info["create_time"])


def inject(kind: str, nodes: LocalNodes, generator: np.random.Generator) -> None:
    """Do it, now."""
    if kind == "node":
        nodes.lose(int(generator.integers(1, len(nodes.nodes))))
        nodes.add(1)
        return
    deadline = time.monotonic() + DEADLINE
    while not (processes := actor_processes(ACTORS[kind])):  # it may be about to start after the fault before
        if time.monotonic() > deadline:
            raise RuntimeError(f"there is no {kind}")
        time.sleep(0.1)
    os.kill(processes[0].pid, signal.SIGKILL)


def prepared(folder: Path, steps: int) -> tuple[Path, list[str]]:
    """A run folder whose supervised stage is done, and its settings."""
    generator = np.random.default_rng(0)
    items = [f"item-{row}" for row in range(ITEMS)]
    pairs = [(user, items[row]) for user in range(USERS) for row in generator.permutation(ITEMS)[:HISTORY]]
    tables = {
        "items": {"item_id": items, "title": [f"Tale number {row}" for row in range(ITEMS)],
                  "categories": [[f"kind {row % 4}"] for row in range(ITEMS)]},
        "interactions": {"user_id": [user for user, _ in pairs], "item_id": [item for _, item in pairs],
                         "timestamp": [place % HISTORY for place in range(len(pairs))]},
    }  # fmt: skip
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    overrides = [
        f"data.items={folder}/items.parquet", f"data.interactions={folder}/interactions.parquet",
        "index.level_sizes=[4,4]", "corpus.reasoning_rows=60", "sft.passes=1", "sft.batch_rows=32",
        "sft.learning_rate=1.0e-3",
        f"train.steps={steps}", "train.prompts_per_step=8", "train.mini_batch_prompts=4", "train.responses=6",
        "train.learning_rate=1.0e-4", "train.reasoning_budget=48", "train.probe_prompts=8", "train.checkpoint_steps=2",
        "train.dump_rollouts=true", "train.reasoning_share=0.25", "cluster.threads=1", "cluster.kv_cache_mib=64",
        "cluster.reward_cpus=1",
    ]  # fmt: skip
    run = folder / "prepared"
    run_stages(load_settings(None, [*overrides, f"run_folder={run}"]), ["index", "corpus", "sft"])
    return run, overrides


@app.command()
def benchmark(
    faults: Annotated[int, typer.Option(min=1, help="Faults that are injected.")] = 20,
    seed: Annotated[int, typer.Option(help="Fixes their order and moments.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the numbers and the machine.")] = None,
) -> None:
    """Kill processes and nodes under a run, and measure how it recovers."""
    generator = np.random.default_rng(seed)
    repeated = [KINDS[number % len(KINDS)] for number in range(faults)]
    order = [repeated[place] for place in generator.permutation(faults)]
    report: list[ReportRow] = []
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as root:
        source, overrides = prepared(Path(root), STEPS_BETWEEN * faults + 4)
        with LocalNodes([1, 1, 1]) as nodes:
            undisturbed = Run(nodes, overrides, copied(source, Path(root) / "undisturbed"))
            undisturbed.wait_for(1, "the first step")
            started, first = time.monotonic(), undisturbed.begun
            groups = undisturbed.finish()
            step_seconds = (time.monotonic() - started) / max(len(groups) - first, 1)
            run = Run(nodes, overrides, copied(source, Path(root) / "disturbed"))
            run.wait_for(1, "the first step")
            for number, kind in enumerate(order, start=1):
                before = run.begun
                target = before + int(generator.integers(1, STEPS_BETWEEN))
                run.wait_for(target, f"step {target}")
                time.sleep(float(generator.random()) * step_seconds)
                at, killed = run.begun, time.monotonic()
                inject(kind, nodes, generator)
                run.wait_for(at + 1, f"a step after fault {number} ({kind}) in step {at}")
                seconds[kind].append(time.monotonic() - killed)
                console.print(f"fault {number}: {kind} in step {at}, {seconds[kind][-1]:.1f} s", highlight=False)
            disturbed = run.finish()
    table = Table(title=f"{faults} faults by seed {seed}; an undisturbed step takes {step_seconds:.2f} s")
    for column in ("killed", "times", "seconds to the next step: least", "median", "most"):
        table.add_column(column, justify="left" if column == "killed" else "right")
    for kind, values in seconds.items():
        if values:
            table.add_row(
                kind, str(len(values)), f"{min(values):.1f}", f"{np.median(values):.1f}", f"{max(values):.1f}"
            )
            report += [
                {"case": kind, "subject": "ours", "metric": f"fault {place}", "value": value, "unit": "s"}
                for place, value in enumerate(values, start=1)
            ]
    console.print(table)
    report += [
        {"case": name, "subject": "ours", "metric": "trained", "value": float(sum(counts)), "unit": "groups"}
        for name, counts in (("undisturbed", groups), ("with faults", disturbed))
    ]
    console.print(f"trained groups: {sum(groups)} undisturbed, {sum(disturbed)} with faults, in {len(disturbed)} steps")
    if json_file is not None:
        write_report(json_file, report)
    if disturbed != groups:
        raise SystemExit(f"the run with faults trained on other numbers of groups: {disturbed}, not {groups}")


def copied(source: Path, folder: Path) -> Path:
    """The prepared run folder, once more."""
    shutil.copytree(source, folder)
    return folder


if __name__ == "__main__":
    app()
