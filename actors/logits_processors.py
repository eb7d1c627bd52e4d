"""The constraint inside vLLM's model runner V1, which is the one that is used: on the CPU build and, by
`VLLM_USE_V2_MODEL_RUNNER=0`, on GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from actors.constrained_requests import ConstrainedRequests, RequestSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass
class _Request:
    slot: int
    output: list[int]
    settings: RequestSettings
    consumed: int = 0


class ItemConstraintProcessor(LogitsProcessor):
    """Sets the logits of tokens that the constraint does not allow to minus infinity.

    The state of a request is a function of its output tokens. It is kept per slot and moved forward by the new tokens;
    when a request's output is shorter than what was consumed (it was restarted), its state is computed afresh.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        RequestSettings.of(sampling_params)

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        capacity = 2 * vllm_config.scheduler_config.max_num_seqs
        self.core = ConstrainedRequests(vllm_config, device, capacity)
        self.requests: dict[int, _Request] = {}
        self.free_slots: list[int] = list(range(capacity))

    def is_argmax_invariant(self) -> bool:
        return False

    def _add(self, params: SamplingParams, _prompt: list[int] | None, output: list[int]) -> _Request | None:
        settings = RequestSettings.of(params)
        if settings is None:
            return None
        if not self.free_slots:
            used = {request.slot for request in self.requests.values()}
            self.free_slots = [slot for slot in range(self.core.capacity) if slot not in used]
        request = _Request(self.free_slots.pop(), output, settings)
        self.core.start(request.slot, settings)
        return request

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.requests, batch_update, self._add)

    def catch_up(self) -> None:
        """Consume the tokens that were sampled since the last call, one step for all requests at a time."""
        for request in self.requests.values():
            if len(request.output) < request.consumed:
                self.core.start(request.slot, request.settings)
                request.consumed = 0
        while True:
            behind = [request for request in self.requests.values() if len(request.output) > request.consumed]
            if not behind:
                return
            slots = np.array([request.slot for request in behind])
            self.core.advance(slots, np.array([request.output[request.consumed] for request in behind]))
            for request in behind:
                request.consumed += 1

    def slots(self, rows: int) -> np.ndarray:
        """int64 [rows]: the slot of each row of the batch, -1 where its request is not under the constraint."""
        slots = np.full(rows, -1, dtype=np.int64)
        slots[list(self.requests)] = [request.slot for request in self.requests.values()]
        return slots

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if not self.requests:
            return logits
        self.catch_up()
        slots = self.slots(len(logits))
        states = self.core.at(slots[slots >= 0])
        if (slots >= 0).all():
            self.core.forbid(logits, states)
        else:
            rows = torch.from_numpy(np.flatnonzero(slots >= 0)).to(logits.device)
            constrained = logits[rows]
            self.core.forbid(constrained, states)
            logits[rows] = constrained
        return logits
