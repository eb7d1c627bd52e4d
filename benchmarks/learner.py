"""The learner's loss and gradient: groups per second and peak memory against padded batches and `trl.GRPOTrainer`.

    python -m benchmarks.learner [--model 8M]... [--mode direct]... [--vocabulary 3000]... [--groups 1]...
        [--subject ours]... [--json FILE]

All subjects compute the clipped policy loss of the same groups, on policy and without a reference, and its gradient, in
float32 from the same weights, each in a process of its own. Direct mode: prompts of 200 tokens, 16 responses of 5.
Reasoning mode: prompts of 300 tokens, 10 responses of 60 to 200. `TRL` is the trainer as it is: without Triton it sends
every position through the output head. `TRL, head at responses` is the fair peer, the same trainer told to select the
response positions as it does with Triton. TRL knows no constraint: its distribution is the whole vocabulary.

The floor: the tokens that have to be processed, once each, times six operations per weight, and at free-text positions
six per weight of the output head; the table says what share of this machine's matrix product each subject reaches on
that work.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.child_process import Outcome, run_child
from benchmarks.learner_subjects import SUBJECTS, Task, command, random_groups
from benchmarks.machine import ReportRow, matrix_operations_per_second, write_report
from benchmarks.random_model import write_random_model
from cluster.progress import console

SHAPES: dict[str, dict[str, int | bool]] = {
    "8M": {
        "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
}  # fmt: skip
UNITS = {
    "groups per second": "groups/s", "slowest": "groups/s", "fastest": "groups/s", "peak memory": "MiB", "loss": "nats",
    "gradient norm": "",
}  # fmt: skip


def needed_operations(task: Task, weights: int, hidden: int) -> float:
    """Of the groups of one backward pass, attention left out."""
    groups = random_groups(task, 0)
    tokens = sum(map(len, groups.prompts)) + sum(len(response) - 1 for response in groups.responses)
    free_text = int((groups.allowed.free_text >= 0).sum())
    return 6.0 * (tokens * weights + free_text * task.vocabulary * hidden + len(groups.allowed.listed.values) * hidden)


def needs(task: Task) -> dict[str, str]:
    """What the subject needs beside the project's own environment."""
    return {"module": "trl", "how": "pip install trl datasets"} if "TRL" in task.subject else {}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def benchmark(
    model: Annotated[list[str], typer.Option(help=f"Shape: {', '.join(SHAPES)}.")] = ["8M"],  # noqa: B006
    mode: Annotated[list[str], typer.Option(help="direct, reasoning")] = ["direct", "reasoning"],  # noqa: B006
    vocabulary: Annotated[list[int], typer.Option(min=1100)] = [3000, 153_000],  # noqa: B006
    groups: Annotated[list[int], typer.Option(min=1, help="Groups of one backward pass.")] = [1, 8],  # noqa: B006
    subject: Annotated[list[str], typer.Option(help=f"What is measured: {', '.join(SUBJECTS)}.")] = list(SUBJECTS),  # noqa: B006
    backwards: Annotated[int, typer.Option(min=1, help="Timed backward passes of a subject.")] = 5,
    limit: Annotated[float, typer.Option(min=1, help="Seconds that one subject may take.")] = 900.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the numbers and the machine.")] = None,
) -> None:
    """Compare the learner with padded batches and with TRL."""
    report: list[ReportRow] = []
    peak = matrix_operations_per_second()
    for name in model:
        for size in vocabulary:
            with tempfile.TemporaryDirectory() as folder:
                weights = write_random_model(Path(folder), size, **SHAPES[name])
                for kind in mode:
                    for count in groups:
                        case = f"{name}, {kind}, vocabulary {size}, {count} groups a backward pass"
                        tasks = [Task(one, folder, size, kind, count, backwards) for one in subject]
                        outcomes = [run_child(task.subject, command(task), limit, **needs(task)) for task in tasks]
                        floor = needed_operations(tasks[0], weights, int(SHAPES[name]["hidden_size"])) / count / peak
                        console.print(report_table(case, outcomes, floor))
                        report += [
                            {"case": case, "subject": outcome.subject, "metric": metric, "value": value,
                             "unit": UNITS[metric]}
                            for outcome in outcomes
                            for metric, value in outcome.numbers.items()
                        ]  # fmt: skip
    if json_file is not None:
        write_report(json_file, report)


def report_table(case: str, outcomes: list[Outcome], seconds_per_group: float) -> Table:
    """One line per subject; `seconds_per_group` is what the needed work takes at the speed of a matrix product."""
    table = Table(title=case)
    for column in ("", "groups/s", "slowest", "fastest", "ours / it", "of the floor", "peak MiB", "gradient norm", ""):
        table.add_column(column, justify="right")
    mine = outcomes[0].numbers.get("groups per second", float("nan"))
    for outcome in outcomes:
        numbers = outcome.numbers
        if not numbers:
            table.add_row(outcome.subject, *[""] * 7, outcome.problem)
            continue
        rate = numbers["groups per second"]
        table.add_row(
            outcome.subject, f"{rate:.2f}", f"{numbers['slowest']:.2f}", f"{numbers['fastest']:.2f}",
            "" if outcome is outcomes[0] else f"{mine / rate:.2f}", f"{rate * seconds_per_group:.0%}",
            f"{numbers['peak memory']:.0f}", f"{numbers['gradient norm']:.4g}", "",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    app()
