"""Ablations: finished runs once more with one thing changed, on the same data, seeds and budget, and a report on all.

    python -m benchmarks.ablations RUN... --output FOLDER [--variant NAME]... [--set KEY=VALUE]...

Every variant is a list of settings, so each can be had by `gream run` alone. A variant that leaves the supervised stage
as it is starts from the run's own checkpoint; others train theirs. Runs that differ in their seed alone are one method
in the report. What was finished is not done again.

With `--set` a variant has a budget of its own, so the runs themselves stay out of the report, and `unchanged` stands
for them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.progress import console
from cluster.run_report import write_report

VARIANTS: dict[str, list[str]] = {
    "unchanged": [],
    "grpo": ["train.advantages=group_relative"],
    "dr-grpo": ["train.advantages=centred", "train.objective.token_mean=constant"],
    "pass-at-k": ["train.advantages=pass_at_k"],
    "without-true-answers": ["train.objective.true_answer_coefficient=0"],
    # True answers are learnt under the constraint alone, so this one is to be compared with the one above.
    "unconstrained": ["train.constrained_rollouts=false", "train.objective.true_answer_coefficient=0"],
    "residual-sensitive-alone": ["train.rewards=[{reward: residual_sensitive}]"],
    "exact-match-alone": ["train.rewards=[{reward: exact_match}]"],
    "direct-alone": ["train.reasoning_share=0"],
    "reasoning-alone": ["train.reasoning_share=1"],
    "uniform-curriculum": ["sft.curriculum=uniform"],
    "history-not-denoised": [
        "corpus.removed_share=0",
        "corpus.rewritten_history_items=null",
        "train.reasoning_budget=200",
    ],
    "half-the-hold-out": ["corpus.rl_holdout=0.05"],
    "twice-the-hold-out": ["corpus.rl_holdout=0.2"],
}
STAGES = ("index", "corpus", "sft")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def benchmark(
    runs: Annotated[list[Path], typer.Argument(help="Finished run folders, one for each seed.")],
    output: Annotated[Path, typer.Option(help="Folder of the variants' runs and of the report.")] = Path(
        "runs/ablations"
    ),
    variant: Annotated[list[str], typer.Option(help=f"Which: {', '.join(VARIANTS)}.")] = list(VARIANTS),  # noqa: B006
    setting: Annotated[
        list[str], typer.Option("--set", help="A setting of all variants, such as a smaller evaluation.")
    ] = [],  # noqa: B006
) -> None:
    """Run variants of finished runs and put all into one report."""
    unknown = sorted(set(variant) - set(VARIANTS))
    if unknown:
        raise typer.BadParameter(f"no such variant: {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    folders = [] if setting else list(runs)
    for name in variant if setting else [name for name in variant if VARIANTS[name]]:
        for run in runs:
            folder = output / f"{name}-{run.name}"
            for stage in STAGES:  # a stage that the variant changes is stale there, and made anew
                if not (folder / stage).exists():
                    shutil.copytree(run / stage, folder / stage)
            command = [str(Path(sys.executable).with_name("gream")), "run", "--config", str(run / "settings.yaml")]
            console.print(f"ablations: {folder.name}: {' '.join(VARIANTS[name])}", highlight=False)
            subprocess.run([*command, f"run_folder={folder}", *VARIANTS[name], *setting], check=True)
            folders.append(folder)
    for file in write_report(folders, output / "report"):
        console.print(f"report: {file}", highlight=False)


if __name__ == "__main__":
    app()
