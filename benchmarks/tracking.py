"""A tracking server that is killed, comes back and is wiped under a real train stage: what it costs, what MLflow has.

    python -m benchmarks.tracking [--down 60] [--steps 400] [--json FILE]

A small run (`gream train`, on Ray that it starts itself) is tracked by an `mlflow server` on loopback with a SQLite
store. In mid-run the whole process group of the server is killed by SIGKILL; it stays away for `--down` seconds and
comes back with the same store. After it has caught up it is killed again and comes back empty, on the same port. Then
the run goes on until it ends by itself, so `--steps` have to last longer than all of that.

A step's seconds spent in tracking are the run's own metric `train/seconds/tracking`, by timer, and its share is that of
`train/seconds/step`. The share of a phase is all seconds spent in tracking by all seconds of its steps, and may be 2 %.
Seconds until MLflow had everything go from the moment at which the server answers again to the first at which its API
gives all steps that the journal had at that moment. At the end each metric of each run in the journal has to be in
MLflow exactly once for each step, with its value; the run of the stage has to be a new one, FINISHED, whose tag
`gream.replaces` names the one from before the wipe.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from mlflow.entities import Run

from benchmarks.machine import write_report
from benchmarks.small_run import prepared
from benchmarks.tracked_run import Server, TrackedRun
from benchmarks.tracking_report import by_phase, points_of, problems_of, report_rows, report_table, steps_of
from cluster.progress import console
from cluster.tracking import SENDER_ENVIRONMENT

UP, DOWN, BACK, WIPED = "server up", "server down", "after it came back", "after the wipe"
LEAST_STEPS = 10  # in each phase with a server

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Outcome:
    """What was seen from outside: when each phase began, the run before and after the wipe, seconds to catch up."""

    moments: dict[str, float]
    first: Run
    last: Run
    caught_up: dict[str, float]


def disturb(run: TrackedRun, server: Server, folder: Path, down: float) -> Outcome:
    """Kill the server, bring it back, wipe it; returns after the run has ended by itself."""
    moments = {UP: 0.0}
    run.wait_for(run.tracked, "its run was in MLflow")
    run.wait_for_steps(LEAST_STEPS)
    first, _ = run.caught_up()
    server.kill()
    moments[DOWN] = time.time()
    run.wait_for(lambda: time.time() >= moments[DOWN] + down, f"the server was down for {down:.0f} s")
    server.start(folder / "first")
    moments[BACK] = time.time()
    again, back_seconds = run.caught_up()
    if again.info.run_id != first.info.run_id:
        raise RuntimeError(f"run {again.info.run_id} took the place of {first.info.run_id}, which the server still had")
    run.wait_for_steps(LEAST_STEPS)
    server.kill()
    moments[WIPED] = time.time()
    server.start(folder / "wiped")
    last, wiped_seconds = run.caught_up(without=first.info.run_id)
    run.wait_for_steps(LEAST_STEPS)
    run.finish()
    last = run.client.get_run(last.info.run_id)
    return Outcome(moments, first, last, {BACK: back_seconds, WIPED: wiped_seconds})


@app.command()
def benchmark(
    down: Annotated[float, typer.Option(min=0, help="Seconds for which the server is down.")] = 60.0,
    steps: Annotated[int, typer.Option(min=1, help="Of the run, which has to outlast what is done to it.")] = 400,
    limit: Annotated[float, typer.Option(min=1, help="Seconds that the run may take in all.")] = 3600.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the numbers and the machine.")] = None,
) -> None:
    """Kill and wipe the tracking server under a train stage, and measure what tracking takes of its steps."""
    os.environ.update(SENDER_ENVIRONMENT)  # of this process's own questions to a server that may be away
    server = Server()
    with tempfile.TemporaryDirectory() as root:
        folder, overrides = prepared(Path(root), steps)
        overrides += ["cluster.reward_cpus=0", "train.dump_rollouts=false", "train.checkpoint_steps=20"]
        try:
            server.start(Path(root) / "first")
            run = TrackedRun(overrides, folder, server.uri, limit)
            try:
                outcome = disturb(run, server, Path(root), down)
            finally:
                run.stop()
            records, found = run.records(), run.points()
        finally:
            server.kill()
    phases, expected = by_phase(steps_of(records), outcome.moments), points_of(records)
    console.print(report_table(f"a server that is down for {down:.0f} s and then wiped", phases, outcome.caught_up))
    count = sum(counts.total() for counts in expected.values())
    console.print(f"{count} values of {len(expected)} metrics and {steps} steps are in the journal", highlight=False)
    problems = problems_of(phases, expected, found, steps)
    if (replaced := outcome.last.data.tags.get("gream.replaces")) != outcome.first.info.run_id:
        problems.append(f"the new run replaces {replaced}, not {outcome.first.info.run_id}")
    if outcome.last.info.status != "FINISHED":
        problems.append(f"the new run is {outcome.last.info.status}, not FINISHED")
    if json_file is not None:
        write_report(json_file, report_rows(phases, outcome.caught_up))
    if problems:
        raise SystemExit("; ".join(problems))
    console.print(f"MLflow has each of them once, in a new run that replaces {replaced} and is FINISHED")


if __name__ == "__main__":
    app()
