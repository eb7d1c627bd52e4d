"""What the driver of the train stage spends on a step, by the number of rollout engines: a simulation of the fleet.

    python -m benchmarks.scale [--engines 256]... [--steps 5] [--json FILE]

No model runs. Loop, scheduler, prompt source, reward pool and the driver's side of engines and learner ranks are those
of the train stage; the actors behind them are played by 16 processes that import no torch, sleep as long as an engine
with a given time for a token would work, and answer with arrays of the sizes that it would give. They are spread over
several Ray nodes on this machine, each with a raylet and an object store of its own. With the engines grow the prompts
of a step (8 for each), the reward workers (one for 8 engines) and the learner ranks (one for 16).

CPU seconds are those of the driver's process, all threads of Ray included. Messages are calls that it submits, answers,
and the chunks of weights that are announced to it; what Ray itself sends (heartbeats, places of objects, counts of
references) is not among them, but its bytes are: `through the driver` is what the kernel counted on all TCP connections
of the process, both ways. Stored are the arrays of rollouts, and the weights, as many chunks as those of a model of
8 GB, of 512 KiB each. What the simulation leaves out: hundreds of processes and tens of nodes talk to the driver over
as many connections, and fetch each chunk for themselves.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.child_process import Outcome, run_child
from benchmarks.local_nodes import LocalNodes
from benchmarks.machine import ReportRow, write_report
from benchmarks.scale_driver import Task, command
from cluster.progress import console

UNITS = {
    "driver CPU": "s", "driver CPU, most": "s", "step": "s", "through the driver": "bytes", "messages": "messages",
    "rollouts stored": "bytes", "weights stored": "bytes", "groups": "groups", "tokens": "tokens",
}  # fmt: skip
LONGER, MORE = 10, 4  # times the tokens of a response, and the prompts of a step

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def benchmark(
    engines: Annotated[list[int], typer.Option(min=1, help="Logical rollout engines.")] = [1, 8, 64, 256],  # noqa: B006
    batch_engines: Annotated[int, typer.Option(min=0, help="Engines that get other batches; 0 for none.")] = 8,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of a step for each engine.")] = 8,
    responses: Annotated[int, typer.Option(min=2)] = 10,
    budget: Annotated[int, typer.Option(min=16, help="Tokens of a reasoning response at most.")] = 150,
    seconds_per_token: Annotated[float, typer.Option(min=0, help="Of an engine that decodes its batch.")] = 0.005,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps, after one to warm up.")] = 5,
    nodes: Annotated[int, typer.Option(min=1, help="Ray nodes on this machine.")] = 4,
    limit: Annotated[float, typer.Option(min=1, help="Seconds that one fleet may take.")] = 600.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the numbers and the machine.")] = None,
) -> None:
    """Measure the driver over simulated fleets of several sizes, and over batches of several sizes."""
    report: list[ReportRow] = []
    with LocalNodes([4.0] * nodes) as cluster:
        os.environ.update(cluster.environment)  # of the drivers

        def measured(name: str, count: int, prompts_in_all: int, tokens: int) -> Outcome:
            task = Task(cluster.address, count, prompts_in_all, responses, tokens, steps, seconds_per_token)
            outcome = run_child(name, cluster.command(*command(task)), limit)
            report.extend(
                {"case": name, "subject": "ours, simulated fleet", "metric": metric, "value": value,
                 "unit": UNITS[metric]}
                for metric, value in outcome.numbers.items()
            )  # fmt: skip
            return outcome

        fleets = [measured(f"{count} engines", count, prompts * count, budget) for count in engines]
        console.print(report_table("SIMULATED fleet, real driver: a step by the number of engines", fleets))
        batches: list[Outcome] = []
        if batch_engines:
            count, some = batch_engines, prompts * batch_engines
            batches = [
                measured(f"{count} engines, {some} prompts", count, some, budget),
                measured(f"responses {LONGER} times as long", count, some, LONGER * budget),
                measured(f"{MORE} times as many prompts", count, MORE * some, budget),
            ]
            console.print(report_table("SIMULATED fleet, real driver: a step by the size of its batch", batches))
    if json_file is not None:
        write_report(json_file, report)
    failed = [f"{one.subject}: {one.problem}" for one in (*fleets, *batches) if not one.numbers]
    if failed:
        raise SystemExit("; ".join(failed))


def report_table(title: str, outcomes: list[Outcome]) -> Table:
    """One line per fleet: medians of a step."""
    table = Table(title=title)
    for column in (
        "", "driver CPU s", "most", "step s", "messages", "MiB through the driver", "KiB a group", "groups", "tokens",
        "MiB stored: rollouts", "weights", "",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for outcome in outcomes:
        numbers = outcome.numbers
        if not numbers:
            table.add_row(outcome.subject, *[""] * 10, outcome.problem)
            continue
        through = numbers["through the driver"]
        table.add_row(
            outcome.subject, f"{numbers['driver CPU']:.3f}", f"{numbers['driver CPU, most']:.3f}",
            f"{numbers['step']:.1f}", f"{numbers['messages']:.0f}", f"{through / 2**20:.2f}",
            f"{through / 2**10 / numbers['groups']:.2f}", f"{numbers['groups']:.0f}", f"{numbers['tokens']:.0f}",
            f"{numbers['rollouts stored'] / 2**20:.1f}", f"{numbers['weights stored'] / 2**20:.1f}", "",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    app()
