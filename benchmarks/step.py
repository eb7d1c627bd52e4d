"""A whole step of policy training in direct mode against TRL's `GRPOTrainer`, on one core.

    python -m benchmarks.step [--model 1.6M]... [--vocabulary 3000]... [--steps 5] [--json FILE]

Every subject takes steps of 16 prompts of 200 tokens x 16 responses of five tokens on the same model with random
weights, in float32, in a process of its own that is held to one core, Ray's processes with it. A step samples the
responses, rewards them by a hash, so that every group has variance, and trains on all 256 with one optimizer step and a
divergence from a frozen reference. `ours` are the rollout engine, reward worker, learner, weight transfer and loop of
the train stage; responses are items of a catalogue of 10,000. `TRL` generates with Hugging Face, a group a forward pass
in training. `TRL, head at responses` computes its logits at response positions alone, as TRL does with Triton.

The share that is printed last is that of the step in neither engine nor learner: rewards, weight transfer, driver. For
TRL it is the rewards, for all else there is one process that is either.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.child_process import Outcome, run_child
from benchmarks.learner import SHAPES
from benchmarks.machine import ReportRow, write_report
from benchmarks.random_model import write_item_model
from benchmarks.rollouts import SHAPE, random_index
from benchmarks.step_subjects import PHASES, SUBJECTS, Task, command
from cluster.progress import console

MODELS = {"1.6M": SHAPE, "8M": SHAPES["8M"]}
UNITS = {"trained": "responses", "tokens": "tokens", "valid": "share", "responses per second": "responses/s"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def benchmark(
    model: Annotated[list[str], typer.Option(help=f"Shape: {', '.join(MODELS)}.")] = ["1.6M", "8M"],  # noqa: B006
    vocabulary: Annotated[list[int], typer.Option(min=2700)] = [3000],  # noqa: B006
    subject: Annotated[list[str], typer.Option(help=f"What is measured: {', '.join(SUBJECTS)}.")] = list(SUBJECTS),  # noqa: B006
    items: Annotated[int, typer.Option(min=10)] = 10_000,
    prompts: Annotated[int, typer.Option(min=1)] = 16,
    responses: Annotated[int, typer.Option(min=2)] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 200,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of ours, after one to warm up.")] = 5,
    peer_steps: Annotated[int, typer.Option(min=1, help="Timed steps of the others.")] = 2,
    limit: Annotated[float, typer.Option(min=1, help="Seconds that one subject may take.")] = 900.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the numbers and the machine.")] = None,
) -> None:
    """Compare whole training steps with TRL's."""
    report: list[ReportRow] = []
    with tempfile.TemporaryDirectory() as root:
        index = random_index(items)
        index.save(Path(root) / "index")
        for name in model:
            for size in vocabulary:
                folder = Path(root) / f"{name}-{size}"
                write_item_model(folder, index, size, **MODELS[name])
                case = f"{name}, vocabulary {size}, {prompts} prompts of {prompt_tokens} tokens x {responses} responses"
                outcomes = []
                for one in subject:
                    task = Task(
                        one, str(folder), f"{root}/index", prompts, responses, prompt_tokens, 5,
                        steps if one == "ours" else peer_steps,
                    )  # fmt: skip
                    peer = one.startswith("TRL")
                    needs = {"module": "trl", "how": "pip install trl datasets"} if peer else {}
                    outcomes.append(run_child(one, command(task), limit, **needs))
                console.print(report_table(case, outcomes))
                report += [
                    {"case": case, "subject": outcome.subject, "metric": metric, "value": value,
                     "unit": UNITS.get(metric, "s")}
                    for outcome in outcomes
                    for metric, value in outcome.numbers.items()
                ]  # fmt: skip
    if json_file is not None:
        write_report(json_file, report)


def rest_share(numbers: dict[str, float]) -> float:
    """Share of a step in neither engine nor learner."""
    return 1 - (numbers["rollouts"] + numbers["learner"]) / numbers["step"]


def report_table(case: str, outcomes: list[Outcome]) -> Table:
    """One line per subject, compared with the first: rates, seconds by phase, and the share of none of both."""
    table = Table(title=case)
    for column in ("", "responses/s", "ours / it", "step s", *PHASES, "everything else", "neither", ""):
        table.add_column(column, justify="right")
    mine = outcomes[0].numbers.get("responses per second", float("nan"))
    for outcome in outcomes:
        numbers = outcome.numbers
        if not numbers:
            table.add_row(outcome.subject, *[""] * (len(PHASES) + 5), outcome.problem)
            continue
        rest = numbers["step"] - sum(numbers[phase] for phase in PHASES)
        table.add_row(
            outcome.subject, f"{numbers['responses per second']:.1f}",
            "" if outcome is outcomes[0] else f"{mine / numbers['responses per second']:.2f}",
            f"{numbers['step']:.3f}", *(f"{numbers[phase]:.3f}" for phase in PHASES), f"{rest:.3f}",
            f"{rest_share(numbers):.1%}", "",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    app()
