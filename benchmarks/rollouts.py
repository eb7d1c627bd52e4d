"""Groups of responses per second: the rollout engine against vLLM and transformers on the same model and prompts.

    python -m benchmarks.rollouts [--vocabulary 3000]... [--mode direct]... [--subject ours]... [--json FILE]

Every subject samples 8 responses to each of 64 prompts of 200 tokens from one model with random weights, in float32,
on the same cores, each in a process of its own. In direct mode a response is the four codes of one of 10,000 items and
the end of sequence; in reasoning mode at most 48 tokens. `vLLM, unconstrained` has the same options, gives as many
tokens, and almost never an item. `vLLM, structured outputs` has one regular expression of all items (llguidance), which
may spell them by letters as well as by their tokens. `Hugging Face` is `generate` with a prefix function over a dict;
it gives no log-probabilities, which the others do.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from benchmarks.child_process import Outcome, run_child
from benchmarks.machine import ReportRow, write_report
from benchmarks.random_model import write_item_model
from benchmarks.rollouts_subjects import SUBJECTS, Task, command
from cluster.progress import console
from item_index.semantic_ids import SemanticIdIndex, assign_semantic_ids

SHAPE = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
UNITS = {
    "responses per second": "responses/s", "slowest": "responses/s", "fastest": "responses/s",
    "tokens per response": "tokens", "valid answers": "share", "start": "s", "peak memory": "MiB", "step": "ms",
    "steps": "steps",
}  # fmt: skip
BUDGETS = {"direct": 5, "reasoning": 48}


def random_index(items: int, *, codes: int = 256, levels: int = 4, seed: int = 0) -> SemanticIdIndex:
    """An index of items with random semantic IDs, no two the same."""
    generator = np.random.default_rng(seed)
    numbers = generator.choice(codes**levels, items, replace=False)
    codes_IL = np.stack([numbers // codes**level % codes for level in range(levels)], axis=1).astype(np.int32)
    return assign_semantic_ids(
        [f"item-{row}" for row in range(items)], codes_IL, (codes,) * levels, spare_collision_codes=2
    )


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def benchmark(
    vocabulary: Annotated[list[int], typer.Option(min=2700)] = [3000, 153_000],  # noqa: B006
    mode: Annotated[list[str], typer.Option(help="direct, reasoning")] = ["direct"],  # noqa: B006
    subject: Annotated[list[str], typer.Option(help=f"What is measured: {', '.join(SUBJECTS)}.")] = list(SUBJECTS),  # noqa: B006
    items: Annotated[int, typer.Option(min=10)] = 10_000,
    prompts: Annotated[int, typer.Option(min=1)] = 64,
    responses: Annotated[int, typer.Option(min=1)] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 200,
    calls: Annotated[int, typer.Option(min=1, help="Timed calls of a subject.")] = 5,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    limit: Annotated[float, typer.Option(min=1, help="Seconds that one subject may take.")] = 900.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the numbers and the machine.")] = None,
) -> None:
    """Compare constrained rollouts with vLLM and transformers."""
    report: list[ReportRow] = []
    with tempfile.TemporaryDirectory() as root:
        index = random_index(items)
        index.save(Path(root) / "index")
        for size in vocabulary:
            model = Path(root) / f"model-{size}"
            write_item_model(model, index, size, **SHAPE)
            for kind in mode:
                case = f"{kind}, vocabulary {size}, {prompts} prompts of {prompt_tokens} tokens x {responses} responses"
                outcomes = []
                for one in subject:
                    if kind != "direct" and one in ("vLLM, structured outputs", "Hugging Face, prefix function"):
                        continue  # they know items, but no free text before them
                    task = Task(
                        one, str(model), f"{root}/index", kind, prompts, responses, prompt_tokens, BUDGETS[kind], calls,
                        threads,
                    )  # fmt: skip
                    outcomes.append(run_child(one, command(task), limit))
                console.print(report_table(case, outcomes))
                report += [
                    {"case": case, "subject": outcome.subject, "metric": metric, "value": value, "unit": UNITS[metric]}
                    for outcome in outcomes
                    for metric, value in outcome.numbers.items()
                ]
    if json_file is not None:
        write_report(json_file, report)


def report_table(case: str, outcomes: list[Outcome]) -> Table:
    """One line per subject, compared with the first; what a step costs more than in vLLM without a constraint."""
    table = Table(title=case)
    for column in (
        "", "responses/s", "slowest", "fastest", "ours / it", "tokens", "valid", "steps", "ms a step", "added ms",
        "MiB", "",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    mine = outcomes[0].numbers.get("responses per second", float("nan"))
    plain = next((one.numbers.get("step") for one in outcomes if one.subject == "vLLM, unconstrained"), None)
    for outcome in outcomes:
        numbers = outcome.numbers
        if not numbers:
            table.add_row(outcome.subject, *[""] * 10, outcome.problem)
            continue
        step = numbers.get("step")
        rate = numbers["responses per second"]
        table.add_row(
            outcome.subject, f"{rate:.1f}", f"{numbers['slowest']:.1f}", f"{numbers['fastest']:.1f}",
            "" if outcome is outcomes[0] else f"{mine / rate:.2f}", f"{numbers['tokens per response']:.1f}",
            f"{numbers['valid answers']:.3f}", "" if step is None else f"{numbers['steps']:.0f}",
            "" if step is None else f"{step:.1f}",
            "" if step is None or plain is None else f"{step - plain:+.1f}", f"{numbers['peak memory']:.0f}", "",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    app()
