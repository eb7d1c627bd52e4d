"""Whether the rollout engines have the weights that the learner believes them to have."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.rollout_engines import EngineCall
from learner.weight_probe import LearnerSums, WeightProbe, different_weights


@dataclass(frozen=True)
class WeightCheck:
    """What the learner says of its weights, and the engines' calls that ask for the same."""

    learner: WeightProbe[LearnerSums]
    calls: list[EngineCall]

    @property
    def answered(self) -> bool:
        return all(call.done for call in self.calls)

    def compare(self, limit: float) -> dict[str, float]:
        """`weight_gap`, the largest difference of the log-probabilities, and `weights_compared`, the smallest share of
        tensors that the sums of an engine cover.

        An engine that was started anew before it answered has later weights than those asked for, and is left out.
        Raises RuntimeError that names the engine for a gap above the limit, and for tensors that are others.
        """
        gaps, compared = [0.0], [1.0]
        for number, probe in enumerate(call.result for call in self.calls):
            if probe.version != self.learner.version:
                continue
            wrong, count = different_weights(self.learner.sums, probe.sums)
            gaps.append(float(np.abs(self.learner.log_probabilities_T - probe.log_probabilities_T).max()))
            compared.append(count / len(self.learner.sums))
            what = f"rollout engine {number} samples from other weights than the learner's of version {probe.version}"
            if wrong:
                raise RuntimeError(f"{what}: {len(wrong)} tensors have other sums, {wrong[0]} among them")
            if not gaps[-1] <= limit:
                raise RuntimeError(f"{what}: log-probabilities differ by {gaps[-1]:.3g}, more than train.weight_gap")
        return {"weight_gap": max(gaps), "weights_compared": min(compared)}
