"""Processes and nodes are killed under a run of the train stage, again and again: how long until it is a step further.

    python -m benchmarks.faults [--config configs/ml-100k.yaml] [--faults 20] [--seed 0] [--json FILE]

The train stage of a config is submitted three times as a job (`ray job submit`), always with the same seed: to a
cluster of one node; to one of three nodes, each with one CPU; and to the three nodes while faults are injected, in an
order and at moments that `--seed` gives: SIGKILL to a rollout engine, a reward worker, a learner rank, or the raylet of
a node that does not hold the driver; a new node comes in the place of a lost one. Nobody intervenes. Index, corpus and
supervised stage come from the config's run folder, and run there first where they are not current.

Nodes are `ray start` processes on this machine, in network namespaces where those can be made. The seconds of a fault
go from the signal to the first update that the run had not begun before. What the command demands: three nodes give
the metrics of one (to 1e-3 in the first step); the run under faults ends by itself with as many trained groups as the
others, step by step.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow.parquet as pq
import safetensors.torch
import typer
from rich.table import Table

from benchmarks.local_nodes import LocalNodes
from benchmarks.machine import ReportRow, write_report
from cluster.journal import JOURNAL_FILE, read_records
from cluster.pipeline import run_stages
from cluster.progress import console
from cluster.settings import Settings, load_settings
from cluster.tracking import TRACKING_FOLDER

ACTORS = {
    "rollout engine": "ray::RolloutEngine",
    "reward worker": "ray::RewardWorker",
    "learner rank": "ray::LearnerRank",
}
KINDS = (*ACTORS, "node")
EARLIER = {"index": "index", "corpus": "corpus", "sft": "sft"}
STEPS_PER_FAULT = 1.3  # a fault is over when the next step begins, and some steps are to be undisturbed
CLOSE = 1e-3  # of metrics of the first step on three nodes and on one
UNLIKE = ("seconds/", "per_second")  # metrics that say how fast a machine is
OVERRIDES = ["train.dump_rollouts=true", "train.checkpoint_steps=2", "cluster.reward_cpus=1", "tracking.sample_steps=0"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Job:
    """`gream train`, submitted to the nodes, in a copy of a run folder whose earlier stages are done."""

    def __init__(
        self, nodes: LocalNodes, settings: Settings, arguments: list[str], folder: Path, seconds: float
    ) -> None:
        for name in EARLIER:
            shutil.copytree(settings.folder / name, folder / name)
        self.folder, self.seconds = folder, seconds
        self.log = folder / "job.log"
        command = nodes.command(
            "ray", "job", "submit", "--address", nodes.jobs, "--working-dir", ".", "--", "gream", "train", *arguments,
            *OVERRIDES, f"run_folder={folder}",
        )  # fmt: skip
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=nodes.environment)

    @property
    def begun(self) -> int:
        """The latest step whose update has begun; what an update trains on is written first."""
        files = (self.folder / "rollouts").glob("step-*.parquet")
        return max((int(file.stem.removeprefix("step-")) for file in files), default=0)

    def wait_for(self, step: int, what: str) -> None:
        """Until the update of a step has begun; RuntimeError with the run's output where that does not happen."""
        deadline = time.monotonic() + self.seconds
        while self.begun < step:
            if self.process.poll() is not None:
                raise RuntimeError(f"the run ended before {what}:\n{self.log.read_text()}")
            if time.monotonic() > deadline:
                self.process.kill()
                raise RuntimeError(f"no {what} within {self.seconds:.0f} s:\n{self.log.read_text()}")
            time.sleep(0.01)

    def finish(self) -> None:
        """Wait until the run has ended by itself."""
        if self.process.wait(timeout=self.seconds) != 0:
            raise RuntimeError(f"the run failed:\n{self.log.read_text()}")

    @property
    def groups(self) -> list[int]:
        """Of every step, as trained on."""
        return [pq.read_metadata(file).num_rows for file in sorted((self.folder / "rollouts").glob("step-*.parquet"))]

    def metrics(self, prefix: str, step: int) -> dict[str, float]:
        """What the run has tracked for a step under names that begin so."""
        found: dict[str, float] = {}
        for record, _, _ in read_records(self.folder / TRACKING_FOLDER / JOURNAL_FILE):
            if record["kind"] == "metrics" and record["step"] == step:
                found |= {name: value for name, value in record["values"].items() if name.startswith(prefix)}
        return found

    def largest_weight_difference(self, other: Job) -> float:
        """Between the policies of two finished runs."""
        mine, theirs = (
            safetensors.torch.load_file(job.folder / "train" / "checkpoint" / "model.safetensors")
            for job in (self, other)
        )
        return max(float((mine[name].float() - theirs[name].float()).abs().max()) for name in mine)


def inject(kind: str, nodes: LocalNodes, generator: np.random.Generator, seconds: float) -> None:
    """Do it, now."""
    if kind == "node":
        nodes.lose(int(generator.integers(1, len(nodes.nodes))))
        nodes.add(1)
        return
    deadline = time.monotonic() + seconds
    while not (processes := nodes.processes(ACTORS[kind])):  # it may be about to start after the fault before
        if time.monotonic() > deadline:
            raise RuntimeError(f"there is no {kind}")
        time.sleep(0.1)
    os.kill(processes[0].pid, signal.SIGKILL)


def moments(faults: int, steps: int, generator: np.random.Generator) -> np.ndarray:
    """float64: when each fault comes, in steps; a random moment of its own part of the run, but for its end."""
    if steps - 3 < faults * STEPS_PER_FAULT:
        raise typer.BadParameter(
            f"{faults} faults need {int(np.ceil(faults * STEPS_PER_FAULT)) + 3} steps, the config has {steps}"
        )
    return 1 + (np.arange(faults) + generator.random(faults)) * (steps - 3) / faults


def different_metrics(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """Differences of metrics that two runs should share, where they are not close; infinite where one is missing."""
    names = {name for name in one | other if not any(part in name for part in UNLIKE)}
    gaps = {name: abs(one.get(name, np.inf) - other.get(name, np.inf)) for name in names}
    scale = {name: max(1.0, abs(one.get(name, 0.0))) for name in names}
    return {name: gap for name, gap in gaps.items() if not gap <= CLOSE * scale[name]}


def disturb(job: Job, nodes: LocalNodes, faults: int, seed: int, step_seconds: float) -> dict[str, list[float]]:
    """Inject faults until all are done; seconds of recovery by kind."""
    generator = np.random.default_rng(seed)
    repeated = [KINDS[number % len(KINDS)] for number in range(faults)]
    order = [repeated[place] for place in generator.permutation(faults)]
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    steps = load_settings(job.folder / "settings.yaml", ()).train.steps
    for number, (kind, moment) in enumerate(zip(order, moments(faults, steps, generator), strict=True), start=1):
        if job.begun <= moment:
            job.wait_for(int(moment), f"step {int(moment)}")
            time.sleep((moment % 1) * step_seconds)
        at, killed = job.begun, time.monotonic()
        inject(kind, nodes, generator, job.seconds)
        job.wait_for(at + 1, f"a step after fault {number} ({kind}) in step {at}")
        seconds[kind].append(time.monotonic() - killed)
        console.print(f"fault {number}: {kind} in step {at}, {seconds[kind][-1]:.1f} s", highlight=False)
    return seconds


@app.command()
def benchmark(
    config: Annotated[Path, typer.Option(help="Settings, as `gream train` takes them.")] = Path("configs/ml-100k.yaml"),
    override: Annotated[list[str], typer.Option(help="KEY=VALUE, as `gream train` takes them.")] = [],  # noqa: B006
    faults: Annotated[int, typer.Option(min=1, help="Faults that are injected.")] = 20,
    seed: Annotated[int, typer.Option(help="Fixes their order and moments.")] = 0,
    limit: Annotated[float, typer.Option(min=1, help="Seconds that a run may take, and a step after a fault.")] = 3600,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the numbers and the machine.")] = None,
) -> None:
    """Kill processes and nodes under a run, and measure how it recovers."""
    data = load_settings(config, override).data
    override = [*override, f"data.items={Path(data.items).resolve()}",
                f"data.interactions={Path(data.interactions).resolve()}"]  # fmt: skip
    settings = load_settings(config, override)
    moments(faults, settings.train.steps, np.random.default_rng(seed))
    run_stages(settings, list(EARLIER))
    arguments = ["--config", str(config), *override]
    with tempfile.TemporaryDirectory() as root:
        with LocalNodes([3], dashboard=True) as nodes:
            alone = Job(nodes, settings, arguments, Path(root) / "one-node", limit)
            alone.finish()
        with LocalNodes([1, 1, 1], dashboard=True) as nodes:
            where = nodes.where
            spread = Job(nodes, settings, arguments, Path(root) / "three-nodes", limit)
            spread.finish()
            seconds_of_steps = [
                spread.metrics("train/seconds/step", step)["train/seconds/step"]
                for step in range(1, settings.train.steps + 1)
            ]
            step_seconds = float(np.median(seconds_of_steps))
            disturbed = Job(nodes, settings, arguments, Path(root) / "faults", limit)
            disturbed.wait_for(1, "the first step")
            seconds = disturb(disturbed, nodes, faults, seed, step_seconds)
            disturbed.finish()
        jobs = {"one node": alone, "three nodes": spread, "three nodes, faults": disturbed}
        console.print(recovery_table(seconds, f"{faults} faults by seed {seed}, nodes {where}", step_seconds))
        report: list[ReportRow] = [
            {"case": kind, "subject": "ours", "metric": f"fault {place}", "value": value, "unit": "s"}
            for kind, values in seconds.items()
            for place, value in enumerate(values, start=1)
        ]
        table = Table(title=f"{config}, seed {settings.seed}: {settings.train.steps} steps")
        for column in ("", "groups", "reward, first step", "validation reward, last", "weights differ from one node's"):
            table.add_column(column, justify="right")
        for name, job in jobs.items():
            first = job.metrics("train/reward", 1)["train/reward"]
            last = job.metrics("probe/both modes/after", settings.train.steps)["probe/both modes/after"]
            difference = job.largest_weight_difference(alone)
            table.add_row(name, str(sum(job.groups)), f"{first:.5f}", f"{last:.5f}", f"{difference:.2e}")
            report += [
                {"case": name, "subject": "ours", "metric": metric, "value": value, "unit": unit}
                for metric, value, unit in (
                    ("trained", float(sum(job.groups)), "groups"), ("reward of the first step", first, "reward"),
                    ("validation reward after the last step", last, "reward"), ("weights differ by", difference, "1"),
                )
            ]  # fmt: skip
        console.print(table)
        unlike = different_metrics(alone.metrics("train/", 1), spread.metrics("train/", 1))
        counts = {name: job.groups for name, job in jobs.items()}
    if json_file is not None:
        write_report(json_file, report)
    if unlike:
        raise SystemExit(f"the first step on three nodes has other metrics than on one: {unlike}")
    if len({tuple(groups) for groups in counts.values()}) != 1:
        raise SystemExit(f"the runs trained on other numbers of groups: {counts}")


def recovery_table(seconds: dict[str, list[float]], title: str, step_seconds: float) -> Table:
    """One line for each kind of fault."""
    table = Table(title=f"{title}; an undisturbed step takes {step_seconds:.2f} s")
    for column in ("killed", "times", "seconds to the next step: least", "median", "most"):
        table.add_column(column, justify="left" if column == "killed" else "right")
    for kind, values in seconds.items():
        if values:
            table.add_row(
                kind, str(len(values)), f"{min(values):.1f}", f"{np.median(values):.1f}", f"{max(values):.1f}"
            )
    return table


if __name__ == "__main__":
    app()
