"""The rollout engine of the train and evaluate stages as the settings describe it, in bundle 0 of the group."""

from __future__ import annotations

from typing import Any

from ray.util.placement_group import PlacementGroup

from actors.rollout import RolloutActor, environment
from cluster.placement import in_bundle
from cluster.settings import Settings


def rollout_engine(group: PlacementGroup, settings: Settings, index: str, model: str) -> Any:
    """An actor's handle; the engine starts in the background, and the first call of a method waits for it."""
    cluster = settings.cluster
    place = in_bundle(group, 0, cluster, environment(cluster.model_runner))
    return RolloutActor.options(**place).remote(
        model, index, dtype=cluster.dtype, kv_cache_mib=cluster.kv_cache_mib, sequences=cluster.rollout_sequences,
        threads=cluster.threads, seed=settings.seed, sampler=cluster.rollout_sampler,
        model_runner=cluster.model_runner,
    )  # fmt: skip
