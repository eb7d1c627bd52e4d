"""Users per second whose best items are found: our beam search against those of transformers and vLLM.

    python -m benchmarks.beam [--run runs/ml-100k] [--width 10]... [--subject ours]... [--json FILE]

Every subject ranks items for the same test users with the same policy, in direct mode, in float32, on the same cores,
each in a process of its own. The policy is the supervised checkpoint of a finished run; `--vocabulary` adds rows to its
embeddings that no token of the tokenizer has, so that its output head is as large as a pre-trained model's. Nothing is
excluded, since the peers cannot; the recall counts the user's earlier items as misses.

Scores are log-probabilities renormalised over what may follow. Hugging Face is `generate` with a prefix function over a
dict; vLLM is `LLM.beam_search` under a logits processor that reads the last tokens of a request.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.table import Table
from transformers import AutoModelForCausalLM

from benchmarks.beam_subjects import SUBJECTS, Task, command
from benchmarks.child_process import Outcome, run_child
from benchmarks.machine import ReportRow, write_report
from cluster.progress import console
from cluster.prompts import PromptSource
from curriculum.corpus import load_corpus

UNITS = {
    "users per second": "users/s", "slowest": "users/s", "fastest": "users/s", "valid places": "share",
    "recall": "share", "like ours": "share", "start": "s", "peak memory": "MiB",
}  # fmt: skip
LIKE = 10  # first places that are compared with ours

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def benchmark(
    run: Annotated[Path, typer.Option(help="Run folder with index, corpus and supervised checkpoint.")] = Path(
        "runs/ml-100k"
    ),
    vocabulary: Annotated[list[int], typer.Option(help="Rows of the output head; 0: the policy's own.")] = [0, 153_000],  # noqa: B006
    width: Annotated[list[int], typer.Option(min=1)] = [10, 50],  # noqa: B006
    subject: Annotated[list[str], typer.Option(help=f"What is measured: {', '.join(SUBJECTS)}.")] = list(SUBJECTS),  # noqa: B006
    users: Annotated[int, typer.Option(min=1)] = 64,
    batch_users: Annotated[int, typer.Option(min=1, help="Users of one search; of Hugging Face 8, for memory.")] = 64,
    calls: Annotated[int, typer.Option(min=1, help="Timed rankings of all users.")] = 3,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    limit: Annotated[float, typer.Option(min=1, help="Seconds that one subject may take.")] = 900.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the numbers and the machine.")] = None,
) -> None:
    """Compare constrained beam search with transformers and vLLM."""
    report: list[ReportRow] = []
    with tempfile.TemporaryDirectory() as root:
        targets_U = write_prompts(run, users, Path(root) / "prompts.npz")
        for rows in vocabulary:
            model = run / "sft" / "checkpoint"
            if rows:
                model = Path(root) / f"model-{rows}"
                write_widened(run / "sft" / "checkpoint", model, rows)
            for beams in width:
                case = f"{users} users, beam {beams}, vocabulary {rows or 'of the policy'}"
                outcomes: list[Outcome] = []
                first_UK: np.ndarray | None = None
                for one in subject:
                    file = Path(root) / "ranked.npy"
                    at_a_time = min(batch_users, 8) if one.startswith("Hugging Face") else batch_users
                    task = Task(
                        one, str(model), str(run / "index"), f"{root}/prompts.npz", str(file), beams, at_a_time, calls,
                        threads,
                    )  # fmt: skip
                    outcome = run_child(one, command(task), limit)
                    if outcome.numbers:
                        ranked_UK = np.load(file)
                        if one == subject[0]:
                            first_UK = ranked_UK
                        outcome.numbers.update(quality(ranked_UK, first_UK, targets_U))
                    outcomes.append(outcome)
                console.print(report_table(case, outcomes))
                report += [
                    {"case": case, "subject": outcome.subject, "metric": metric, "value": value, "unit": UNITS[metric]}
                    for outcome in outcomes
                    for metric, value in outcome.numbers.items()
                ]
    if json_file is not None:
        write_report(json_file, report)


def write_prompts(run: Path, users: int, file: Path) -> np.ndarray:
    """Direct prompts of the first test users of a run; returns their targets, int32 [users]."""
    corpus = load_corpus(run / "corpus", run / "index")
    source = PromptSource(corpus, reasoning_budget=0, exclude_seen=False)
    positions = source.evaluation_positions("test")[:users]
    prompts = source.prompts(positions, ["direct"] * len(positions))
    np.savez(file, tokens=prompts.tokens.values, ends=prompts.tokens.offsets[1:])
    return prompts.targets


def write_widened(checkpoint: Path, folder: Path, rows: int) -> None:
    """The same policy with more rows of embeddings, for tokens that the tokenizer does not have."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, local_files_only=True, dtype=torch.float32)
    own = model.get_input_embeddings().weight.shape[0]
    if rows < own:
        raise typer.BadParameter(f"the policy has {own} rows already, more than {rows}")
    torch.manual_seed(0)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(folder)
    for file in checkpoint.glob("tokenizer*"):
        shutil.copy(file, folder)


def quality(ranked_UK: np.ndarray, ours_UK: np.ndarray | None, targets_U: np.ndarray) -> dict[str, float]:
    """Share of places with an item not listed before, recall at the width, and share of first places that are as ours:
    no number where ours has failed."""
    return {
        "valid places": float((ranked_UK >= 0).mean()),
        "recall": float((ranked_UK == targets_U[:, None]).any(axis=1).mean()),
    } | ({} if ours_UK is None else {"like ours": float((ranked_UK[:, :LIKE] == ours_UK[:, :LIKE]).mean())})


def report_table(case: str, outcomes: list[Outcome]) -> Table:
    """One line per subject, compared with the first."""
    table = Table(title=case)
    for column in ("", "users/s", "slowest", "fastest", "ours / it", "valid", "recall", "like ours", "MiB", ""):
        table.add_column(column, justify="right")
    mine = outcomes[0].numbers.get("users per second", float("nan"))
    for outcome in outcomes:
        numbers = outcome.numbers
        if not numbers:
            table.add_row(outcome.subject, *[""] * 8, outcome.problem)
            continue
        table.add_row(
            outcome.subject, *(f"{numbers[name]:.1f}" for name in ("users per second", "slowest", "fastest")),
            "" if outcome is outcomes[0] else f"{mine / numbers['users per second']:.2f}",
            *(f"{numbers[name]:.3f}" if name in numbers else "" for name in ("valid places", "recall", "like ours")),
            f"{numbers['peak memory']:.0f}", "",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    app()
