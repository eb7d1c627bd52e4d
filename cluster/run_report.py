"""One report on several evaluated runs: what they differ in, their results over seeds, curves and example chains."""

from __future__ import annotations

import base64
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from markdown_it import MarkdownIt

from cluster.evaluate import changed_chains, compared_pairs
from cluster.journal import JOURNAL_FILE, read_records
from cluster.run_figures import run_figures
from cluster.settings import load_settings
from cluster.tracking import TRACKING_FOLDER
from evaluation.comparison import compare, comparisons_markdown
from evaluation.metrics import place_measures
from evaluation.results import SHOWN_METRICS
from item_index.constraint import MODES
from item_index.input_error import InputError

# What makes no other method of a run: where it lies, which seed it has, and the machine that it ran on.
NO_VARIANT = ("run_folder", "seed", "cluster.", "machine.", "tracking.")
FURTHER_METRICS = ("ndcg@50", "mrr", "entropy@10", "popularity_lift@10", "pass@1", "pass@5", "pass@10")
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0; }
th, td { border-bottom: 1px solid #8886; padding: .25rem .75rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
"""


@dataclass(frozen=True)
class EvaluatedRun:
    """What a run folder says of its evaluation.

    Attributes:
        settings: every setting by its path.
        metrics: of each system, by name.
        places: of the target in each system's list by user, from 1; infinity where the list lacks it.
        history: (step, value) of each metric of all stages.
        examples: recommendations in Markdown.
    """

    folder: Path
    settings: dict[str, str]
    metrics: dict[str, dict[str, float]]
    places: dict[str, dict[str | int, float]]
    history: dict[str, list[tuple[int, float]]]
    examples: str

    @classmethod
    def load(cls, folder: Path) -> EvaluatedRun:
        """Raises InputError for a folder without results."""
        evaluation = folder / "evaluation"
        if not (evaluation / "rankings.parquet").is_file():
            raise InputError("there are no rankings", file=evaluation, remedy="Run `gream evaluate` on this run first.")
        places: dict[str, dict[str | int, float]] = defaultdict(dict)
        for row in pq.read_table(evaluation / "rankings.parquet").to_pylist():
            found = row["target"] in row["items"]
            places[row["system"]][row["user_id"]] = row["items"].index(row["target"]) + 1.0 if found else np.inf
        values: dict[str, dict[int, float]] = defaultdict(dict)
        for record, _, _ in read_records(folder / TRACKING_FOLDER / JOURNAL_FILE):
            if record["kind"] == "metrics":
                for name, value in record["values"].items():
                    values[name][record["step"]] = value  # of a stage that was run again, the latest
        return cls(
            folder,
            load_settings(folder / "settings.yaml", [f"run_folder={folder}"]).flat(),
            json.loads((evaluation / "results.json").read_text()),
            dict(places),
            {name: sorted(points.items()) for name, points in values.items()},
            (evaluation / "examples.md").read_text(),
        )


def variants_of(runs: Sequence[EvaluatedRun]) -> dict[str, list[EvaluatedRun]]:
    """Runs that differ in their seed alone, together, by the settings in which they differ from the other runs."""

    def method(run: EvaluatedRun) -> dict[str, str]:
        return {name: value for name, value in run.settings.items() if not name.startswith(NO_VARIANT)}

    methods = [method(run) for run in runs]
    differing = [name for name in methods[0] if len({values.get(name) for values in methods}) > 1]
    variants: dict[str, list[EvaluatedRun]] = defaultdict(list)
    for run, values in zip(runs, methods, strict=True):
        variants[", ".join(f"{name}={values.get(name)}" for name in differing) or "all runs"].append(run)
    return dict(variants)


def user_measures(runs: Sequence[EvaluatedRun]) -> dict[str, dict[str, np.ndarray]]:
    """Measures by system and name, float64 [users]: means over the runs, of the users that all runs evaluated."""
    systems = [system for system in runs[0].places if all(system in run.places for run in runs)]
    users = sorted(set.intersection(*(set(run.places[systems[0]]) for run in runs)), key=str)
    measures = {}
    for system in systems:
        of_runs = [place_measures(np.array([run.places[system][user] for user in users])) for run in runs]
        measures[system] = {name: np.mean([one[name] for one in of_runs], axis=0) for name in of_runs[0]}
    return measures


def results_table(runs: Sequence[EvaluatedRun], names: Iterable[str]) -> str:
    """A line for each system: means over the runs, with the standard deviation where there are several."""
    names = [name for name in names if any(name in values for values in runs[0].metrics.values())]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for system in runs[0].metrics:
        cells = []
        for name in names:
            values = [run.metrics[system][name] for run in runs if name in run.metrics.get(system, {})]
            spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.4f}{spread}" if values else "")
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def systems_compared(run: EvaluatedRun) -> list[tuple[str, str]]:
    """(system, against) within a run, as its evaluation compared them."""
    models = [name for name in run.places if name.startswith(MODES) and "/" not in name]
    stages = list(dict.fromkeys(name.partition("_")[2] for name in models))
    modes = list(dict.fromkeys(name.partition("_")[0] for name in models))
    baselines = [name for name in run.places if not name.startswith(MODES)]
    return compared_pairs(stages, modes, baselines) + changed_chains(list(run.places))


def report_markdown(runs: Sequence[EvaluatedRun], figures: dict[Path, list[str]]) -> str:
    """The whole report; `figures` are the places of each run's figures."""
    variants = variants_of(runs)
    parts = ["# Evaluated runs", "| run | seed | variant |\n|---|---|---|"]
    for variant, members in variants.items():
        parts[-1] += "".join(f"\n| {run.folder} | {run.settings['seed']} | {variant} |" for run in members)
    measures = {variant: user_measures(members) for variant, members in variants.items()}
    for variant, members in variants.items():
        pairs = systems_compared(members[0])
        seeds = f"{len(members)} seeds, mean ± standard deviation" if len(members) > 1 else "one seed"
        parts += [
            f"## {variant}", f"Full catalogue, {seeds}.", results_table(members, SHOWN_METRICS),
            results_table(members, FURTHER_METRICS),
        ]  # fmt: skip
        if pairs:
            parts += [
                "Differences of the same users' measures, means over the seeds; 95 % intervals by a bootstrap over "
                "users.",
                comparisons_markdown(compare(measures[variant], pairs, seed=0)),
            ]
    first, *others = variants
    for other in others:
        shared = [system for system in measures[other] if system in measures[first] and system.startswith(MODES)]
        both = {f"{system}, {name}": measures[name][system] for name in (first, other) for system in shared}
        pairs = [(f"{system}, {other}", f"{system}, {first}") for system in shared]
        parts += [f"## {other}, against {first}", comparisons_markdown(compare(both, pairs, seed=0))]
    for run in runs:
        if figures.get(run.folder):
            parts += [f"## Curves of {run.folder}", *(f"![{Path(file).stem}]({file})" for file in figures[run.folder])]
    for variant, members in variants.items():
        parts += [f"## Recommendations of {members[0].folder}: {variant}", members[0].examples]
    return "\n\n".join(parts) + "\n"


def write_report(folders: Sequence[Path], output: Path) -> tuple[Path, Path]:
    """Write `report.md` beside its figures and `report.html`, which holds them; returns both."""
    runs = [EvaluatedRun.load(folder) for folder in folders]
    (output / "figures").mkdir(parents=True, exist_ok=True)
    images: dict[str, bytes] = {}
    figures: dict[Path, list[str]] = defaultdict(list)
    for number, run in enumerate(runs):
        for name, figure in run_figures(run.history).items():
            file, buffer = f"figures/{number}-{name}.png", io.BytesIO()
            figure.savefig(buffer, dpi=110)
            images[file] = buffer.getvalue()
            (output / file).write_bytes(images[file])
            figures[run.folder].append(file)
    markdown = report_markdown(runs, figures)
    (output / "report.md").write_text(markdown)
    # Titles come from the users' data: what looks like HTML in them stays text.
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    for file, content in images.items():
        body = body.replace(f'src="{file}"', f'src="data:image/png;base64,{base64.b64encode(content).decode()}"')
    (output / "report.html").write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Evaluated runs</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body>\n{body}</body></html>\n"
    )
    return output / "report.md", output / "report.html"
