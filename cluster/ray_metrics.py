"""Metrics of the latest step as Ray's own gauges, which its dashboard shows and Prometheus collects from every node."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from ray.util.metrics import Gauge


class RayMetrics:
    """Gauges `gream_<stage>_<metric>` with the run folder's name as the tag `run`; Ray must be there."""

    def __init__(self, stage: str, run: str) -> None:
        self.stage, self.run = stage, run
        self.gauges: dict[str, Gauge] = {}

    def show(self, metrics: Mapping[str, float]) -> None:
        """Set the gauges; a value that is not a number leaves its gauge as it was."""
        for name, value in metrics.items():
            if math.isnan(value):
                continue
            if name not in self.gauges:
                gauge = f"gream_{self.stage}_{re.sub('[^a-zA-Z0-9]+', '_', name)}"
                self.gauges[name] = Gauge(
                    gauge, description=f"{self.stage}/{name} of the latest step", tag_keys=("run",)
                )
            self.gauges[name].set(value, tags={"run": self.run})
