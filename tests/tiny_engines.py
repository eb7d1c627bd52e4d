"""Generations of rollout engines on the tiny checkpoint, and what tests ask of them."""

from __future__ import annotations

import numpy as np
import ray

from actors.rollout import prompt_seeds
from cluster.rollout_engines import prompt_order
from learner.rollouts import RolloutBatch
from learner.weight_chunks import weight_chunks

MODES = ["reasoning", "direct"] * 8
ENGINES = [
    "cluster.rollout_engines=2", "cluster.rollout_cpus=0.5", "cluster.threads=1", "cluster.kv_cache_mib=32",
    "cluster.rollout_sequences=32", "cluster.health_seconds=5", "cluster.call_seconds=240",
    "cluster.maximum_restarts=1",
]  # fmt: skip


def generation(tiny, engines, *, responses=6):
    prompts = tiny.prompts(MODES, budget=160)
    return engines.generate(prompts, responses=responses, seeds=prompt_seeds(2, 1, len(MODES)), temperature=1.0)


def gathered(engines, calls):
    engines.wait(calls)
    assert all(call.done for call in calls)
    parts = ray.get([call.references[0] for call in calls], timeout=60)
    return RolloutBatch.concatenate(parts).select(prompt_order(calls))


def as_references(model, version):
    return [ray.put(chunk) for chunk in weight_chunks([list(model.state_dict().items())], version, tied_head=False)]


def process_of(engine):
    return ray.get(engine.actor.health.remote(), timeout=60)[1]


def assert_same(batch, other):
    """The same groups; engines may differ in the last digits, for what a sum is added up with differs."""
    assert batch.prompts.targets.tolist() == other.prompts.targets.tolist()
    assert batch.responses.values.tolist() == other.responses.values.tolist()
    np.testing.assert_allclose(batch.log_probabilities.values, other.log_probabilities.values, atol=1e-4)
