"""The constraint inside vLLM: an adapter for model runner V1 over the automaton of `item_index/constraint.py`.

A request opts in by `SamplingParams.extra_args["gream"]`, which names its mode, the index version it was made for and
the item rows that must not be answered; requests without it are left alone. The engine names the index folder and the
tokenizer in `additional_config["gream"]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from item_index.constraint import MODES, AnswerConstraint, ConstraintStates
from item_index.exclusion import ExcludedItems
from item_index.semantic_ids import SemanticIdIndex

if TYPE_CHECKING:
    from vllm.config import VllmConfig

REQUEST_KEY = "gream"


@dataclass
class _Request:
    slot: int
    output: list[int]
    consumed: int
    mode: Any
    budget: int
    excluded: list[int]


class ItemConstraintProcessor(LogitsProcessor):
    """Sets the logits of tokens that the constraint does not allow to minus infinity.

    The state of a request is a function of its output tokens. It is kept per slot and moved forward by the new tokens;
    when a request's output is shorter than what was consumed (it was restarted), its state is computed afresh.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        request = (sampling_params.extra_args or {}).get(REQUEST_KEY)
        if request is None:
            return
        if request.get("mode") not in MODES:
            raise ValueError(f"extra_args['gream']['mode'] must be one of {MODES}, got {request.get('mode')!r}")
        if "index_version" not in request:
            raise ValueError("extra_args['gream'] must name its 'index_version'")
        if sampling_params.min_tokens:
            raise ValueError("min_tokens cannot be used under the item constraint: it would forbid a forced end")
        if sampling_params.max_tokens is None:
            raise ValueError("a request under the item constraint needs max_tokens: its budget for the closing")

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        additional: Any = vllm_config.additional_config
        config = additional["gream"]
        index = SemanticIdIndex.load(config["index"])
        tokenizer: Any = AutoTokenizer.from_pretrained(config["tokenizer"], local_files_only=True)
        rows = vllm_config.model_config.get_vocab_size()
        self.constraint = AnswerConstraint.of(index, tokenizer, vocabulary_size=rows)
        self.index_version = index.version
        self.device = device
        self.requests: dict[int, _Request] = {}
        capacity = 2 * vllm_config.scheduler_config.max_num_seqs
        self.states: ConstraintStates = self.constraint.start(
            ["direct"] * capacity, [self.constraint.trie.depth + 1] * capacity
        )
        self.excluded_of_slot: list[Sequence[int]] = [()] * capacity
        self.free_slots: list[int] = list(range(capacity))
        self.forbidden_in_free_text = torch.from_numpy(~self.constraint.free_text_masks).to(device)

    def is_argmax_invariant(self) -> bool:
        return False

    def _add(self, params: SamplingParams, _prompt: list[int] | None, output: list[int]) -> _Request | None:
        request = (params.extra_args or {}).get(REQUEST_KEY)
        if request is None:
            return None
        if request["index_version"] != self.index_version:
            raise ValueError(
                f"the request was made for index version {request['index_version']}, but this engine samples under "
                f"{self.index_version}"
            )
        if not self.free_slots:
            used = {request.slot for request in self.requests.values()}
            self.free_slots = [slot for slot in range(len(self.states.phase)) if slot not in used]
        assert params.max_tokens is not None
        fresh = _Request(
            self.free_slots.pop(), output, 0, request["mode"], params.max_tokens, request.get("excluded") or []
        )
        self._restart(fresh)
        return fresh

    def _restart(self, request: _Request) -> None:
        slot, request.consumed = request.slot, 0
        start = self.constraint.start([request.mode], [request.budget], [request.excluded])
        for name in ("phase", "node", "remaining", "reasoning", "forced"):
            getattr(self.states, name)[slot] = getattr(start, name)[0]
        self.excluded_of_slot[slot] = request.excluded

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.requests, batch_update, self._add)
        if batch_update is not None and batch_update.added:
            self.states.excluded = ExcludedItems.of(self.constraint.trie, self.excluded_of_slot)

    def _catch_up(self) -> None:
        """Consume the tokens that were sampled since the last call, one step for all requests at a time."""
        for request in self.requests.values():
            if len(request.output) < request.consumed:
                self._restart(request)
        while True:
            behind = [request for request in self.requests.values() if len(request.output) > request.consumed]
            if not behind:
                return
            slots = np.array([request.slot for request in behind])
            now = self.states.select(slots)
            self.constraint.advance(now, np.array([request.output[request.consumed] for request in behind]))
            self.states.put(slots, now)
            for request in behind:
                request.consumed += 1

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if not self.requests:
            return logits
        self._catch_up()
        rows = torch.tensor(list(self.requests), dtype=torch.int64, device=self.device)
        allowed = self.constraint.allowed(
            self.states.select(np.array([request.slot for request in self.requests.values()]))
        )
        forbidden = torch.ones((len(rows), logits.shape[1]), dtype=torch.bool, device=self.device)
        free = np.nonzero(allowed.free_text >= 0)[0]
        if free.size:
            kinds = torch.from_numpy(allowed.free_text[free].astype(np.int64)).to(self.device)
            forbidden[torch.from_numpy(free).to(self.device)] = self.forbidden_in_free_text[kinds]
        listed_rows = torch.from_numpy(np.repeat(np.arange(len(rows)), allowed.listed.lengths)).to(self.device)
        forbidden[listed_rows, torch.from_numpy(allowed.listed.values).to(self.device)] = False
        logits[rows] = logits[rows].masked_fill(forbidden, float("-inf"))
        return logits
