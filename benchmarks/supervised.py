"""Supervised training: real tokens per second of our packed step against `trl.SFTTrainer`, padded and packed.

    python -m benchmarks.supervised [--hidden 128]... [--steps 20] [--rows 64] [--json FILE]

All subjects train the same Llama from the same weights on the same rows in float32, with the loss on the responses, and
each runs in a process of its own with the threads that torch takes by default. A token of padding counts nowhere. TRL's
packing lays several rows into sequences of 1,024 tokens; without FlashAttention, which a CPU has not, its rows may see
each other unless the model's mask parts them. The needed work per token is six operations per weight that is not of
the embeddings, the rest being attention and the head at learnt places; the table says what share of it each reaches of
this machine's measured matrix product.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.child_process import Outcome, run_child
from benchmarks.machine import ReportRow, matrix_operations_per_second, write_report
from benchmarks.random_model import write_random_model
from benchmarks.supervised_subjects import SUBJECTS, Task, command
from cluster.progress import console

UNITS = {
    "tokens per second": "tokens/s", "slowest step": "tokens/s", "fastest step": "tokens/s", "steps": "steps",
    "tokens": "tokens", "loss": "nats",
}  # fmt: skip
LAYERS = {128: 2, 256: 4, 512: 8}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def benchmark(
    hidden: Annotated[list[int], typer.Option(help=f"Width of the model: {', '.join(map(str, LAYERS))}.")] = [128, 256],  # noqa: B006
    vocabulary: Annotated[int, typer.Option(min=100)] = 2000,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    rows: Annotated[int, typer.Option(min=1, help="Rows of an optimizer step.")] = 64,
    limit: Annotated[float, typer.Option(min=1, help="Seconds that one subject may take.")] = 600.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the numbers and the machine.")] = None,
) -> None:
    """Compare supervised training with TRL's trainer."""
    report: list[ReportRow] = []
    peak = matrix_operations_per_second()
    for width in hidden:
        with tempfile.TemporaryDirectory() as folder:
            weights = write_random_model(
                Path(folder), vocabulary, hidden_size=width, num_hidden_layers=LAYERS[width],
                intermediate_size=2 * width, num_attention_heads=width // 32, num_key_value_heads=width // 32,
                tie_word_embeddings=False,
            )  # fmt: skip
            case = f"hidden {width}, {LAYERS[width]} layers, vocabulary {vocabulary}, {rows} rows a step"
            outcomes = [
                run_child(
                    subject, command(Task(subject, folder, vocabulary, steps, rows)), limit,
                    **({} if subject == "ours" else {"module": "trl", "how": "pip install trl datasets"}),
                )
                for subject in SUBJECTS
            ]  # fmt: skip
        console.print(report_table(case, outcomes, 6 * weights / peak))
        report += [
            {"case": case, "subject": outcome.subject, "metric": metric, "value": value, "unit": UNITS[metric]}
            for outcome in outcomes
            for metric, value in outcome.numbers.items()
        ]
    if json_file is not None:
        write_report(json_file, report)


def report_table(case: str, outcomes: list[Outcome], seconds_per_token: float) -> Table:
    """One line per subject; the last column is the share of the matrix product's speed that the weights alone need."""
    table = Table(title=case)
    for column in ("", "tokens/s", "slowest", "fastest", "ours / it", "loss", "of peak", ""):
        table.add_column(column, justify="right")
    mine = outcomes[0].numbers.get("tokens per second", float("nan"))
    for outcome in outcomes:
        numbers = outcome.numbers
        if not numbers:
            table.add_row(outcome.subject, *[""] * 6, outcome.problem)
            continue
        rate = numbers["tokens per second"]
        table.add_row(
            outcome.subject, f"{rate:.0f}", f"{numbers['slowest step']:.0f}", f"{numbers['fastest step']:.0f}",
            "" if outcome is outcomes[0] else f"{mine / rate:.2f}", f"{numbers['loss']:.3f}",
            f"{rate * seconds_per_token:.0%}", "",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    app()
