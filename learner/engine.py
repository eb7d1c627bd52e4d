"""The DeepSpeed engine around a policy: steps over any number of micro-batches, learning-rate schedule, export."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

# Read by DeepSpeed when it is imported; it finds the CPU by itself, the variable keeps it from warning.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import numpy as np
import torch.distributed
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from learner.low_rank import merged_weights
from learner.packing import pack_groups
from learner.policy import Policy
from learner.weight_chunks import WeightChunk, tensors_of, weight_chunks
from learner.weight_probe import LearnerSums, learner_sum

Schedule = Literal["cosine", "constant"]
SAVED_BUCKET_BYTES = 256 * 2**20  # gathered at a time for a checkpoint
STATE_TAG = "state"  # DeepSpeed's name of the one state in a checkpoint folder


def initialize_process_group(*, rank: int = 0, world_size: int = 1, address: str = "127.0.0.1", port: int = 0) -> None:
    """Join the group of learner ranks (gloo on CPU, NCCL on GPU), or take the one that this process is in."""
    # DeepSpeed would compile its shared-memory operator at start (40 s); gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.distributed.is_initialized():
        deepspeed.init_distributed(verbose=False)
        return
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR=address, MASTER_PORT=str(port)
    )
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that leaves weights and moments alone, on all ranks, where a gradient is not finite on any of them.

    DeepSpeed clips before it calls this: a norm that is not finite has made gradients not finite on some rank. Without
    ZeRO it does not say what the norm was, so there the clipping is left to `clip`.
    """

    def __init__(self, groups: list[dict[str, Any]], *, clip: float | None, **options: Any) -> None:
        super().__init__(groups, **options)
        self.clip, self.norm, self.skipped = clip, float("nan"), False

    def step(self, closure: Any = None) -> Any:
        """One step, or none; `skipped` says which."""
        weights = [weight for group in self.param_groups for weight in group["params"]]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all() if gradients else None
        self.skipped = finite is not None and not bool(finite)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            worst = torch.tensor(float(self.skipped), device=weights[0].device)
            torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
            self.skipped = bool(worst)
        if self.clip is not None:
            self.norm = float(torch.nn.utils.clip_grad_norm_(weights, self.clip))
        return None if self.skipped else super().step(closure)


class LearnerEngine:
    """Owns the policy's optimizer state.

    Args:
        policy: the policy to train.
        learning_rate, warm_up_steps, total_steps, schedule: linear warm-up, then cosine to zero or constant.
        weight_decay, gradient_clip: AdamW's decay; clip of the global gradient norm.
        zero_stage: DeepSpeed's ZeRO stage, 0 to 3.
        dtype: of weights and activations; the optimizer keeps float32 masters of bfloat16 weights (ZeRO 1 to 3).
        offload_optimizer: keep the optimizer's state in the host's memory and step there (ZeRO 1 to 3).
        maximum_skipped_steps: steps in a row without a finite gradient after which `step` raises.
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
        dtype: Literal["float32", "bfloat16"] = "float32",
        offload_optimizer: bool = False,
        maximum_skipped_steps: int = 3,
    ) -> None:
        if dtype == "bfloat16":
            policy = policy.to(torch.bfloat16)
        trained = [weight for weight in policy.parameters() if weight.requires_grad]
        exempt = [weight for weight in trained if getattr(weight, "exempt_from_decay", False)]
        decayed = [weight for weight in trained if not getattr(weight, "exempt_from_decay", False)]
        groups = [{"params": decayed, "weight_decay": weight_decay}]
        if exempt:
            groups.append({"params": exempt, "weight_decay": 0.0})
        # torch's AdamW instead of DeepSpeed's fused ones, which compile for a minute at their first use.
        self.optimizer = optimizer = GuardedAdamW(
            groups, clip=None if zero_stage else gradient_clip, lr=learning_rate, betas=(0.9, 0.95)
        )
        scheduler = (
            get_cosine_schedule_with_warmup(optimizer, warm_up_steps, max(total_steps, 1))
            if schedule == "cosine"
            else get_constant_schedule_with_warmup(optimizer, warm_up_steps)
        )
        self.maximum_skipped_steps, self.skipped_in_a_row, self.skipped = maximum_skipped_steps, 0, False
        self.engine, *_ = deepspeed.initialize(
            model=policy,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": gradient_clip if zero_stage else 0.0,
                "zero_optimization": {
                    "stage": zero_stage,
                    **({"offload_optimizer": {"device": "cpu"}} if offload_optimizer else {}),
                },
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own AdamW would be compiled for a minute
                "bf16": {"enabled": dtype == "bfloat16"},
                "steps_per_print": 10**9,
            },
        )

    @property
    def policy(self) -> Any:
        """The wrapped policy, to be called for log-probabilities."""
        return self.engine

    def step(self, losses: Iterable[torch.Tensor], count: int) -> float:
        """One optimizer step on the sum of `count` micro-batch losses, each computed when it is asked for.

        Returns the gradient norm before clipping. A step whose loss or gradient is not finite changes nothing;
        FloatingPointError after too many of them in a row.
        """
        for number, loss in enumerate(losses, start=1):
            self.engine.set_gradient_accumulation_boundary(number == count)
            self.engine.backward(loss)
            self.engine.step()
        # Some of DeepSpeed's stages look for themselves, and then do not call the optimizer.
        self.skipped = self.optimizer.skipped or not self.engine.was_step_applied()
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if self.skipped else 0
        if self.skipped_in_a_row > self.maximum_skipped_steps:
            raise FloatingPointError(
                f"{self.skipped_in_a_row} optimizer steps in a row had a loss or a gradient that is not finite; the "
                "weights are those before them. Look at the rewards and lower the learning rate"
            )
        return self.optimizer.norm if self.optimizer.clip is not None else float(self.engine.get_global_grad_norm())

    @property
    def learning_rate(self) -> float:
        return float(self.engine.get_lr()[0])

    @property
    def device(self) -> torch.device:
        return torch.device(self.engine.device)

    @property
    def ranks(self) -> int:
        return torch.distributed.get_world_size()

    @property
    def rank(self) -> int:
        return torch.distributed.get_rank()

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """Sums over all ranks, which all have to call this."""
        return self._reduced(numbers, torch.distributed.ReduceOp.SUM)

    def maxima(self, numbers: Sequence[float]) -> list[float]:
        """Largest over all ranks, which all have to call this."""
        return self._reduced(numbers, torch.distributed.ReduceOp.MAX)

    def _reduced(self, numbers: Sequence[float], operation: Any) -> list[float]:
        if self.ranks == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(values, op=operation)
        return values.tolist()

    def _named_weights(self) -> tuple[dict[str, Any], bool]:
        """The language model's weights by name, low-rank ones merged in, and whether they have to be gathered."""
        model = self.engine.module.language_model
        gathered = self.engine.zero_optimization_stage() == 3
        return dict(model.named_parameters()) if gathered else merged_weights(model), gathered

    def weight_shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and whole shape of the weights in the order of the buckets, without gathering; a tied head is
        left out."""
        named, gathered = self._named_weights()
        tied = self.engine.module.language_model.config.tie_word_embeddings
        return [
            (name, weight.dtype, tuple(weight.ds_shape if gathered else weight.shape))
            for name, weight in named.items()
            if not (tied and name == "lm_head.weight")
        ]

    def weight_buckets(self, bucket_bytes: int, *, on_host: bool = True) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """The language model's weights in buckets of about that size, low-rank ones merged in.

        Every rank goes through all of them. On the host only those of rank 0 are not empty; on the device all ranks
        have them. Under ZeRO 3 one bucket is gathered at a time, and what is given out are copies.
        """
        named, gathered = self._named_weights()
        bucket: list[tuple[str, torch.Tensor]] = []
        size = 0
        for number, (name, weight) in enumerate(named.items(), start=1):
            bucket.append((name, weight))
            size += weight.element_size() * (weight.ds_numel if gathered else weight.numel())
            if size < bucket_bytes and number < len(named):
                continue
            with deepspeed.zero.GatheredParameters([weight for _, weight in bucket], enabled=gathered):
                kept = bucket if self.rank == 0 or not on_host else []
                copies = [(key, value.detach().clone() if gathered else value.detach()) for key, value in kept]
            yield [(key, value.cpu() if on_host else value) for key, value in copies]
            bucket, size = [], 0

    def weight_chunks(self, version: int, bucket_bytes: int) -> Iterator[WeightChunk]:
        """The weights on their way to an engine; every rank goes through them, and those of rank 0 are not empty."""
        tied = self.engine.module.language_model.config.tie_word_embeddings
        return weight_chunks(self.weight_buckets(bucket_bytes), version, tied_head=tied)

    def token_log_probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """float32 [tokens - 1]: of every token but the first over the whole vocabulary; every rank calls this."""
        packed = pack_groups([(tokens[:1], [tokens[1:]])]).to(self.device)
        self.engine.eval()
        with torch.no_grad():  # not inference mode: ZeRO 3 keeps parameters that it gathers
            values = self.engine(packed)
        return values.float().cpu().numpy()

    def weight_sums(self) -> LearnerSums:
        """Sums over the weights that engines get, by name; every rank calls this, and rank 0 has them."""
        sent = {name for name, _, _ in self.weight_shapes()}
        buckets = self.weight_buckets(SAVED_BUCKET_BYTES)
        return {name: learner_sum(weight) for bucket in buckets for name, weight in bucket if name in sent}

    def save(self, folder: str | Path, tokenizer: Any) -> None:
        """Write a checkpoint that transformers and vLLM load as it is; every rank calls this, rank 0 writes."""
        weights = dict(tensors_of(self.weight_chunks(0, SAVED_BUCKET_BYTES)))
        if self.rank == 0:
            self.engine.module.language_model.save_pretrained(folder, state_dict=weights, safe_serialization=True)
            tokenizer.save_pretrained(folder)

    def save_state(self, folder: str | Path) -> None:
        """Write weights, optimizer and schedule as DeepSpeed keeps them; every rank writes its part."""
        self.engine.save_checkpoint(str(folder), tag=STATE_TAG, save_latest=False)

    def load_state(self, folder: str | Path) -> None:
        """Go on from what `save_state` wrote under the same number of ranks and ZeRO stage.

        The files are pickled: the caller makes sure that they are the run's own, see `learner.training_state`.
        """
        loaded, _ = self.engine.load_checkpoint(str(folder), tag=STATE_TAG)
        if loaded is None:
            raise RuntimeError(f"DeepSpeed found no state under {folder}")
