"""What a mini-batch's update looked like: means and extremes over the tokens at which there was a choice."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from item_index.constraint import AllowedTokens
from learner.engine import LearnerEngine


class Diagnostics:
    """Sums and extremes over the tokens of a mini-batch at which there was a choice."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.extremes = {"ratio_maximum": 0.0, "negative_ratio_minimum": -np.inf, "sampler_gap_maximum": 0.0}
        self.loss = 0.0

    def add(
        self, loss: float, current_T: Tensor, old_T: Tensor, sampler_T: Tensor, values_T: dict[str, Tensor],
        allowed: AllowedTokens,
    ) -> None:  # fmt: skip
        """Take in a micro-batch."""
        chosen = torch.from_numpy(allowed.has_choice).to(current_T.device)
        free = torch.from_numpy(allowed.free_text >= 0).to(current_T.device)
        self.loss += loss
        gap_T = old_T - sampler_T
        values_T = {**values_T, "sampler_ratio": gap_T.exp(), "entropy_estimate": -current_T}
        for name, values in values_T.items():
            self._count(name, values[chosen])
        self._count("entropy_estimate_free_text", -current_T[free])
        self._count("entropy_estimate_constrained", -current_T[chosen & ~free])
        if bool(chosen.any()):
            ratio = values_T["ratio"][chosen]
            for name, value in (
                ("ratio_maximum", ratio.max()), ("negative_ratio_minimum", -ratio.min()),
                ("sampler_gap_maximum", gap_T[chosen].abs().max()),
            ):  # fmt: skip
                self.extremes[name] = max(self.extremes[name], float(value))

    def add_valid_mass(self, log_mass_C: Tensor) -> None:
        """Take in the log valid mass of a micro-batch's places inside semantic IDs, those without a choice as well."""
        self._count("valid_mass", log_mass_C.exp())
        self._count("log_valid_mass", log_mass_C)

    def add_true_answers(self, loss: float, log_probabilities_T: Tensor) -> None:
        """Take in the true items' log-probabilities of a micro-batch, at places with a choice."""
        self.loss += loss
        self._count("true_answer_log_probability", log_probabilities_T)

    def _count(self, name: str, values: Tensor) -> None:
        self.sums[name] += float(values.sum())
        self.counts[name] += values.numel()

    def over_ranks(self, engine: LearnerEngine, *, valid_mass: bool, true_answers: bool) -> dict[str, float]:
        """The means and extremes of all ranks, which all have to call this, with the same flags of what was added."""
        names = [
            "ratio", "importance", "importance_truncated", "clipped", "dual_clipped", "kl", "sampler_ratio",
            "entropy_estimate", "entropy_estimate_free_text", "entropy_estimate_constrained",
            *(("valid_mass", "log_valid_mass") if valid_mass else ()),
            *(("true_answer_log_probability",) if true_answers else ()),
        ]  # fmt: skip
        sums = engine.totals([self.loss, *(self.sums[name] for name in names), *(self.counts[name] for name in names)])
        largest = dict(zip(self.extremes, engine.maxima(list(self.extremes.values())), strict=True))
        counts = sums[1 + len(names) :]
        return {
            "loss": sums[0],
            **{name: total / max(count, 1) for name, total, count in zip(names, sums[1:], counts, strict=False)},
            "ratio_maximum": largest["ratio_maximum"],
            "ratio_minimum": -largest["negative_ratio_minimum"],
            "sampler_gap_maximum": largest["sampler_gap_maximum"],
        }
