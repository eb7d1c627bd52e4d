"""The SRPO loop on the tiny checkpoint, with real engines, rewards and learner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
import torch
from tiny import Tiny

from cluster.settings import load_settings
from cluster.srpo_actors import SrpoActors, srpo_actors
from cluster.train import SrpoLoop
from learner.rollouts import RolloutPrompts
from learner.weight_chunks import tensors_of


class TinyPrompts:
    """What the loop asks of a `PromptSource`, on the tiny catalogue."""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny = tiny
        self.corpus: Any = SimpleNamespace(builder=tiny.builder)

    def reinforcement_positions(self, minimum_history: int) -> np.ndarray:
        return np.arange(300)

    def prompts(self, positions: np.ndarray, modes: list[Any]) -> RolloutPrompts:
        return self.tiny.prompts(modes, rows=positions.tolist())


@contextmanager
def tiny_loop(tiny: Tiny, folder: Path, *more: str) -> Iterator[tuple[SrpoLoop, SrpoActors, Any]]:
    """Actors and loop with small settings that `more` replaces; Ray must be there."""
    overrides = [
        "train.prompts_per_step=6", "train.mini_batch_prompts=3", "train.responses=6", "train.learning_rate=1.0e-3",
        "train.warm_up_steps=0", "train.reasoning_share=0.34",
        "train.rewards=[{reward: 'reward_functions:partly_alike'}]", "train.weight_check_steps=1",
        "cluster.kv_cache_mib=32", "cluster.rollout_sequences=32", "cluster.threads=1",
    ]  # fmt: skip
    settings = load_settings(None, [*overrides, *more, f"run_folder={folder}"])
    source: Any = TinyPrompts(tiny)
    with srpo_actors(settings, tiny.index_folder, tiny.checkpoint) as actors:
        yield SrpoLoop(settings, source, actors), actors, source


def weights(actors: SrpoActors) -> dict[str, torch.Tensor]:
    """The learner's weights, by name."""
    chunks = ray.get(actors.learner.weight_chunks(2**20), timeout=60)
    return {name: tensor.clone() for name, tensor in tensors_of(chunks)}
