"""The constraint inside vLLM's model runner V2. Opt-in, and not yet run on a GPU: the CPU build has no V2 runner, so
this adapter is tested against the interface alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsContext,
    LogitsProcessor,
    LogitsProcRequestState,
)

from actors.constrained_requests import ConstrainedRequests, RequestSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class ItemConstraintProcessorV2(LogitsProcessor):
    """Sets the logits of tokens that the constraint does not allow to minus infinity.

    Slots are the runner's own. The state of a request is a function of its tokens, which the runner keeps on the
    device; the ones that are new since the last call are fetched in one copy.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        RequestSettings.of(sampling_params)

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        if vllm_config.speculative_config is not None:
            raise ValueError("drafted tokens cannot be used under the item constraint; remove the speculative config")
        self.core = ConstrainedRequests(vllm_config, req_states.device, req_states.max_num_reqs)
        self.req_states = req_states
        self.constrained = np.zeros(req_states.max_num_reqs, dtype=bool)
        self.consumed = np.zeros(req_states.max_num_reqs, dtype=np.int64)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        settings = RequestSettings.of(sampling_params)
        self.constrained[req_idx] = settings is not None
        self.consumed[req_idx] = 0
        if settings is not None:
            self.core.start(req_idx, settings)
        return settings is not None

    def _catch_up(self, slots: np.ndarray, outputs: np.ndarray) -> None:
        """Consume the tokens that were sampled since the last call; `outputs` are all of each slot so far."""
        behind = np.repeat(slots, np.maximum(outputs - self.consumed[slots], 0))
        if not behind.size:
            return
        places = np.concatenate([np.arange(self.consumed[slot], end) for slot, end in zip(slots, outputs, strict=True)])
        tokens_on_device = self.req_states.all_token_ids.gpu
        device = tokens_on_device.device
        columns = places + self.req_states.prompt_len.np[behind]
        new_tokens = tokens_on_device[torch.from_numpy(behind).to(device), torch.from_numpy(columns).to(device)]
        tokens = new_tokens.cpu().numpy().astype(np.int64)
        # One step for all requests at a time.
        steps = places - self.consumed[behind]
        for step in range(int(steps.max()) + 1):
            self.core.advance(behind[steps == step], tokens[steps == step])
        self.consumed[slots] = np.maximum(self.consumed[slots], outputs)

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        rows = np.flatnonzero(self.constrained[ctx.idx_mapping_np])
        if not rows.size:
            return logits
        slots = ctx.idx_mapping_np[rows].astype(np.int64)
        # A prompt that is still being read in parts has none, and what is sampled for it is thrown away.
        outputs = np.maximum(ctx.seq_lens_upper_bound_np[rows] - self.req_states.prompt_len.np[slots], 0)
        self._catch_up(slots, outputs.astype(np.int64))
        at = torch.from_numpy(rows).to(logits.device)
        constrained = logits[at]
        self.core.forbid(constrained, self.core.at(slots))
        logits[at] = constrained
        return logits
