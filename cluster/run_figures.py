"""Figures of a run, drawn from its metrics when it has ended."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

History = Mapping[str, list[tuple[int, float]]]
PHASE = re.compile(r"train/seconds/([^/]+)")
USAGE = re.compile(r"index/code_usage/(.+)")
INSIDE_OTHERS = ("engine",)  # of the engines' own clocks, in parallel
AT = re.compile(r"(.+)/(pass|recall)_at_(\d+)")


def run_figures(history: History) -> dict[str, Figure]:
    """Figures by name; only those whose metrics the run has.

    Args:
        history: (step, value) of each metric, by name.
    """
    drawings: dict[str, Callable[[Axes, History], bool]] = {
        "reward": _reward, "ratio": _ratio, "seconds": _seconds, "code_usage": _code_usage,
        "pass_at_k": lambda axes, values: _at(axes, values, "pass"),
        "recall_at_k": lambda axes, values: _at(axes, values, "recall"),
    }  # fmt: skip
    figures = {}
    for name, draw in drawings.items():
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        if draw(axes, history):
            axes.legend(fontsize="small")
            axes.grid(alpha=0.3)
            figures[name] = figure
    return figures


def _line(axes: Axes, points: list[tuple[int, float]], label: str, marker: str = "") -> None:
    steps, values = zip(*sorted(points), strict=True)
    axes.plot(steps, values, label=label, marker=marker)


def _reward(axes: Axes, history: History) -> bool:
    """Mean reward of training responses, and of the validation prompts, by mode."""
    labels = {"train/reward": "all", "train/direct/reward": "direct", "train/reasoning/reward": "reasoning"}
    shown = {name: label for name, label in labels.items() if name in history}
    for name, label in shown.items():
        _line(axes, history[name], label)
    for name in sorted(history):
        if name.startswith("validation/") and name.endswith("/reward"):
            _line(axes, history[name], f"validation, {name.split('/')[1]}", marker="o")
    axes.set(title="mean reward", xlabel="step")
    return bool(shown)


def _ratio(axes: Axes, history: History) -> bool:
    """Importance ratios: a histogram of the steps' means, and how far single tokens went."""
    means, lowest, highest = (
        [value for _, value in history.get(f"train/learner/{name}", [])]
        for name in ("ratio", "ratio_minimum", "ratio_maximum")
    )
    if not (means and lowest and highest):
        return False
    for values, label in ((lowest, "smallest of a step"), (means, "mean of a step"), (highest, "largest of a step")):
        axes.hist(values, bins=30, alpha=0.6, label=label)
    axes.set(title="importance ratio of tokens", xlabel="ratio", ylabel="steps")
    return True


def _seconds(axes: Axes, history: History) -> bool:
    """What a step's seconds go into."""
    phases = {match[1]: dict(points) for name, points in history.items() if (match := PHASE.fullmatch(name))}
    whole = phases.pop("step", None)
    phases = {phase: values for phase, values in phases.items() if phase not in INSIDE_OTHERS}
    if not phases or whole is None:
        return False
    steps = sorted(whole)
    parts = [[values.get(step, 0.0) for step in steps] for values in phases.values()]
    rest = [whole[step] - sum(part[place] for part in parts) for place, step in enumerate(steps)]
    axes.stackplot(steps, *parts, [max(seconds, 0.0) for seconds in rest], labels=[*phases, "the rest"])
    axes.set(title="seconds of a step", xlabel="step")
    return True


def _code_usage(axes: Axes, history: History) -> bool:
    """Items of each code, the fullest code first, by level."""
    levels = {match[1]: points for name, points in history.items() if (match := USAGE.fullmatch(name))}
    for level, points in sorted(levels.items()):
        _line(axes, points, level.replace("_", " "))
    axes.set(title="items of each code", xlabel="code, by number of items")
    return bool(levels)


def _at(axes: Axes, history: History, kind: str) -> bool:
    """pass@k or recall@k over k, a line for each model and mode."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for name, points in history.items():
        if (match := AT.fullmatch(name)) and match[2] == kind:
            lines.setdefault(match[1], []).append((int(match[3]), points[-1][1]))
    for name, points in sorted(lines.items()):
        _line(axes, points, name, marker="o")
    axes.set(title=f"{kind}@k", xlabel="k")
    return bool(lines)
