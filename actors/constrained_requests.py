"""The requests of an engine under the item constraint: the core that both of vLLM's interfaces adapt.

A request opts in by `SamplingParams.extra_args["gream"]`, which names its mode, the index version it was made for and
the item rows that must not be answered; requests without it are left alone. The engine names the index folder and the
tokenizer in `additional_config["gream"]`, and may lift the constraint from all its requests with `constrained` false.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoTokenizer

from item_index.constraint import MODES, AnswerConstraint, ConstraintStates, Mode
from item_index.exclusion import ExcludedItems
from item_index.semantic_ids import SemanticIdIndex

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

REQUEST_KEY = "gream"
# What changes the distribution beside constraint and temperature, with the value that leaves it alone: the learner
# renormalises over the allowed sets only, so its probabilities would be others than the sampler's.
NEUTRAL_OPTIONS: dict[str, tuple[Any, ...]] = {
    "top_p": (1.0,), "top_k": (0, -1), "min_p": (0.0,), "min_tokens": (0,), "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,), "repetition_penalty": (1.0,), "logit_bias": (None,), "bad_words": (None, []),
    "allowed_token_ids": (None,), "structured_outputs": (None,), "prompt_logprobs": (None,),
}  # fmt: skip


@dataclass(frozen=True)
class RequestSettings:
    """What a request says of itself.

    Attributes:
        mode: direct or reasoning.
        index_version: of the index that the request was made for.
        excluded: item rows that must not be answered.
        budget: tokens at most.
        seed: of the response; None where the request has none.
    """

    mode: Mode
    index_version: str
    excluded: list[int]
    budget: int
    seed: int | None

    @classmethod
    def of(cls, params: SamplingParams) -> RequestSettings | None:
        """The settings of a request, None where it is not under the constraint; ValueError for impossible ones."""
        request = (params.extra_args or {}).get(REQUEST_KEY)
        if request is None:
            return None
        if request.get("mode") not in MODES:
            raise ValueError(f"extra_args['gream']['mode'] must be one of {MODES}, got {request.get('mode')!r}")
        if "index_version" not in request:
            raise ValueError("extra_args['gream'] must name its 'index_version'")
        if params.max_tokens is None:
            raise ValueError("a request under the item constraint needs max_tokens: its budget for the closing")
        for name, neutral in NEUTRAL_OPTIONS.items():
            if getattr(params, name) not in neutral:
                raise ValueError(
                    f"{name} cannot be used under the item constraint, which samples from the allowed tokens at a "
                    f"temperature and nothing else; got {getattr(params, name)!r}"
                )
        return cls(
            request["mode"], request["index_version"], list(request.get("excluded") or []), params.max_tokens,
            params.seed,
        )  # fmt: skip


class ConstrainedRequests:
    """States of the requests under the constraint, each in a slot of its own."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, capacity: int) -> None:
        additional: Any = vllm_config.additional_config
        config = additional["gream"]
        index = SemanticIdIndex.load(config["index"])
        tokenizer: Any = AutoTokenizer.from_pretrained(config["tokenizer"], local_files_only=True)
        rows = vllm_config.model_config.get_vocab_size()
        self.constraint = AnswerConstraint.of(
            index, tokenizer, vocabulary_size=rows, constrained=config.get("constrained", True)
        )
        self.index_version = index.version
        self.device = device
        self.capacity = capacity
        self.states: ConstraintStates = self.constraint.start(
            ["direct"] * capacity, [self.constraint.trie.depth + 1] * capacity
        )
        self.seeds = np.zeros(capacity, dtype=np.uint64)
        # Requests without a seed get one of these.
        self._seeds = np.random.default_rng(vllm_config.model_config.seed)
        # Each slot's excluded items in the form of `ExcludedItems`; put together they are sorted already.
        self._excluded_keys: list[np.ndarray] = [np.zeros(0, dtype=np.int64)] * capacity
        self._excluded_changed = False
        self._fresh: tuple[tuple[Mode, int, list[int]], ConstraintStates] | None = None
        free_text = torch.zeros(self.constraint.free_text_masks.shape)
        self._free_text_bias = free_text.masked_fill(~torch.from_numpy(self.constraint.free_text_masks), -torch.inf).to(
            device
        )

    def start(self, slot: int, settings: RequestSettings) -> None:
        """Begin a request's response in a slot, whatever was there. Raises ValueError for another index version."""
        if settings.index_version != self.index_version:
            raise ValueError(
                f"the request was made for index version {settings.index_version}, but this engine samples under "
                f"{self.index_version}"
            )
        wanted = (settings.mode, settings.budget, settings.excluded)
        if self._fresh is None or self._fresh[0] != wanted:  # responses of a group come one after the other
            self._fresh = (wanted, self.constraint.start([settings.mode], [settings.budget], [settings.excluded]))
        fresh = self._fresh[1]
        for name in ("phase", "node", "remaining", "reasoning", "forced"):
            getattr(self.states, name)[slot] = getattr(fresh, name)[0]
        seed = self._seeds.integers(2**63) if settings.seed is None else settings.seed % 2**64
        self.seeds[slot] = np.uint64(seed)
        keys = fresh.excluded.keys + slot * fresh.excluded.stride
        if len(keys) or len(self._excluded_keys[slot]):
            self._excluded_keys[slot], self._excluded_changed = keys, True

    def advance(self, slots: np.ndarray, tokens: np.ndarray) -> None:
        """Take one sampled token in each slot."""
        self._take_exclusions()
        now = self.states.select(slots)
        self.constraint.advance(now, tokens, numbers=slots)
        self.states.put(slots, now)

    def at(self, slots: np.ndarray) -> ConstraintStates:
        """The states in some slots (copies)."""
        self._take_exclusions()
        return self.states.select(slots)

    def _take_exclusions(self) -> None:
        if self._excluded_changed:
            keys = np.concatenate(self._excluded_keys)
            self.states.excluded = ExcludedItems(keys, self.constraint.trie.items)
            self._excluded_changed = False

    def forbid(self, logits_BV: torch.Tensor, states: ConstraintStates) -> None:
        """Set the logits of tokens that are not allowed to minus infinity, in place; a row per state."""
        allowed = self.constraint.allowed(states)
        listed_rows = torch.from_numpy(np.repeat(np.arange(len(allowed)), allowed.listed.lengths)).to(self.device)
        listed = torch.from_numpy(allowed.listed.values).to(self.device)
        kept = logits_BV[listed_rows, listed]
        kinds = np.unique(allowed.free_text)
        for kind in kinds:
            rows: Any = slice(None)
            if len(kinds) > 1:
                rows = torch.from_numpy(np.flatnonzero(allowed.free_text == kind)).to(self.device)
            if kind < 0:
                logits_BV[rows] = -torch.inf
            else:
                logits_BV[rows] += self._free_text_bias[kind]
        logits_BV[listed_rows, listed] = kept
