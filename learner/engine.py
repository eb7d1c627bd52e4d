"""The DeepSpeed engine around a policy: steps over any number of micro-batches, learning-rate schedule, export."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

# Read by DeepSpeed when it is imported; it finds the CPU by itself, the variable keeps it from warning.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import numpy as np
import safetensors.torch
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from learner.policy import Policy

Schedule = Literal["cosine", "constant"]


def initialize_process_group(*, rank: int = 0, world_size: int = 1, address: str = "127.0.0.1", port: int = 0) -> None:
    """Join the group of learner ranks (gloo on CPU, NCCL on GPU)."""
    if torch.distributed.is_initialized():
        return
    # DeepSpeed would compile its shared-memory operator at start (40 s) for nothing on a single rank.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR=address, MASTER_PORT=str(port)
    )
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)


class LearnerEngine:
    """Owns the policy's optimizer state.

    Args:
        policy: the policy to train.
        learning_rate, warm_up_steps, total_steps, schedule: linear warm-up, then cosine to zero or constant.
        weight_decay, gradient_clip: AdamW's decay; clip of the global gradient norm.
        zero_stage: DeepSpeed's ZeRO stage, 0 to 3.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        learning_rate: float,
        weight_decay: float,
        warm_up_steps: int,
        total_steps: int,
        schedule: Schedule,
        gradient_clip: float,
        zero_stage: int,
    ) -> None:
        # torch's AdamW instead of DeepSpeed's fused ones, which compile for a minute at their first use.
        optimizer = torch.optim.AdamW(
            policy.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay
        )
        scheduler = (
            get_cosine_schedule_with_warmup(optimizer, warm_up_steps, max(total_steps, 1))
            if schedule == "cosine"
            else get_constant_schedule_with_warmup(optimizer, warm_up_steps)
        )
        self.engine, *_ = deepspeed.initialize(
            model=policy,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": gradient_clip,
                "zero_optimization": {"stage": zero_stage},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
            },
        )

    @property
    def policy(self) -> Any:
        """The wrapped policy, to be called for log-probabilities."""
        return self.engine

    def step(self, losses: Iterable[torch.Tensor], count: int) -> float:
        """One optimizer step on the sum of `count` micro-batch losses, each computed when it is asked for.

        Returns the gradient norm before clipping. Raises FloatingPointError for a loss that is not finite.
        """
        for number, loss in enumerate(losses, start=1):
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss of micro-batch {number} of {count} is {loss.item()}")
            self.engine.set_gradient_accumulation_boundary(number == count)
            self.engine.backward(loss)
            self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    @property
    def learning_rate(self) -> float:
        return float(self.engine.get_lr()[0])

    def exported_weights(self) -> np.ndarray:
        """uint8: the language model's weights as one safetensors buffer, which the object store hands over uncopied."""
        model = self.engine.module.language_model
        tied = model.config.tie_word_embeddings
        state = {
            name: weight.detach().cpu().contiguous()
            for name, weight in model.state_dict().items()
            if not (tied and name == "lm_head.weight")
        }
        return np.frombuffer(safetensors.torch.save(state), dtype=np.uint8)

    def save(self, folder: str | Path, tokenizer: Any) -> None:
        """Write a checkpoint that transformers and vLLM load as it is."""
        self.engine.module.language_model.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
