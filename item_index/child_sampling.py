"""Sampling the next code of semantic IDs from the trie's children alone, without touching the rest of the vocabulary.

At a trie node only the node's children may follow. So only their logits are gathered, renormalised and sampled: 4 bytes
a child, at most 1 KB a row where codes are 256, instead of the 612 KB of a full row of 153k logits. The gather is
ragged, so a node with few children costs little however many children another node of the same level has.

Two implementations of the same formula: torch operations for any device, and a compiled loop for the CPU, where the
arrays are too small for the operations to pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from item_index.exclusion import ExcludedItems
from item_index.trie import NO_NODE, ItemTrie

NO_TOKEN = -1
NOTHING_EXCLUDED = np.zeros(0, dtype=np.int64)


class NothingAllowed(ValueError):
    """A trie node below which no item may be answered: the state was not reached under the constraint."""


@dataclass(frozen=True)
class SampledChildren:
    """What was sampled for B rows.

    Attributes:
        nodes: int64 [B], the child that was entered; -1 where the semantic ID ends at the row's own node.
        tokens: int64 [B], the child's token, or the terminator.
        log_probabilities: float32 [B], of the token among those allowed.
    """

    nodes: torch.Tensor
    tokens: torch.Tensor
    log_probabilities: torch.Tensor


class ChildSampler:
    """The trie's arrays on one device, with the token of every code."""

    def __init__(
        self,
        trie: ItemTrie,
        code_tokens: Sequence[np.ndarray],
        *,
        index_version: str,
        device: torch.device | str = "cpu",
        compiled: bool | None = None,
    ) -> None:
        """Args:
        code_tokens: per level, the token (a column of the logits) of each code.
        index_version: named in errors.
        device: where the logits will be.
        compiled: whether float32 and float64 logits are sampled by the compiled loop, which runs on the CPU alone; None
            where the device is the CPU.

        On the CPU the trie's arrays are shared, not copied.
        """
        self.trie, self.index_version, self.device = trie, index_version, torch.device(device)
        self.compiled = self.device.type == "cpu" if compiled is None else compiled
        if self.compiled and self.device.type != "cpu":
            raise ValueError(f"the compiled loop runs on the CPU, not on {self.device}")
        self._child_start = torch.from_numpy(trie.child_start).to(self.device)
        code = trie.code.astype(np.int32) if trie.code.dtype == np.uint16 else trie.code  # torch gathers no uint16
        self._code = torch.from_numpy(code).to(self.device)
        # The first node of levels 1 to depth - 1; nodes of the last level have no children.
        self._level_start = torch.from_numpy(trie.level_start[1:-2].copy()).to(self.device)
        self._largest_token = max(int(tokens.max()) for tokens in code_tokens[: trie.depth])
        first_tokens = np.array([tokens[0] for tokens in code_tokens[: trie.depth]], dtype=np.int64)
        in_order = all((np.diff(tokens) == 1).all() for tokens in code_tokens)
        widest = max(len(tokens) for tokens in code_tokens)
        table = np.zeros((trie.depth, widest), dtype=np.int64)
        for level, tokens in enumerate(code_tokens[: trie.depth]):
            table[level, : len(tokens)] = tokens
        # Where the tokens of each level are consecutive, as added tokens are, a code's token is first token + code.
        self._token_base = torch.from_numpy(first_tokens if in_order else np.arange(trie.depth) * widest).to(
            self.device
        )
        self._token_table = torch.from_numpy(table.reshape(-1)[: 0 if in_order else None]).to(self.device)

    def sample_children(
        self,
        logits_BV: torch.Tensor,
        nodes_B: torch.Tensor,
        *,
        uniform_B: torch.Tensor,
        temperature: float = 1.0,
        terminator: int | None = None,
        excluded: ExcludedItems | None = None,
        excluded_rows_B: np.ndarray | None = None,
    ) -> SampledChildren:
        """Sample one child of each node in proportion to the softmax of the children's logits.

        Args:
            logits_BV: floating [B, V], any vocabulary that holds the tokens.
            nodes_B: int64 [B], nodes of the trie.
            uniform_B: float64 [B] in [0, 1), the randomness: the same values give the same sample on every device.
            temperature: divides the logits; above 0.
            terminator: token that ends a semantic ID where the node is an item's; None where a node that has children
                is always left through one of them.
            excluded: items of each row that must not be answered.
            excluded_rows_B: int64 [B], the row of `excluded` that each row has; None where they are the same.

        Raises NothingAllowed, naming the prefix and the index version, where nothing may follow.
        """
        if excluded_rows_B is None:
            excluded_rows_B = np.arange(len(nodes_B))
        sample = self._sample_by_operations
        if self.compiled and logits_BV.dtype in (torch.float32, torch.float64):
            sample = self._sample_by_loop
        return sample(logits_BV, nodes_B, uniform_B, temperature, terminator, excluded, excluded_rows_B)

    def _nothing_allowed(self, row: int, nodes_B: torch.Tensor) -> NothingAllowed:
        return NothingAllowed(
            f"row {row}: nothing may follow the codes {list(self.trie.prefix(int(nodes_B[row])))} in index version "
            f"{self.index_version}: all items below are excluded, or none is longer"
        )

    def _sample_by_loop(
        self,
        logits_BV: torch.Tensor,
        nodes_B: torch.Tensor,
        uniform_B: torch.Tensor,
        temperature: float,
        terminator: int | None,
        excluded: ExcludedItems | None,
        excluded_rows_B: np.ndarray,
    ) -> SampledChildren:
        # Numba is loaded when it is needed: vLLM's start looks at every attribute of every loaded module, and fails on
        # one of llvmlite's. After its start they go together.
        from item_index.child_sampling_loop import EVERY_ROW_SAMPLED, sample_rows

        trie, batch = self.trie, len(nodes_B)
        # The loop does not look at bounds.
        largest_token = max(self._largest_token, NO_TOKEN if terminator is None else terminator)
        if largest_token >= logits_BV.shape[1] or not batch == len(logits_BV) == len(uniform_B):
            raise ValueError(
                f"{batch} nodes and {len(uniform_B)} random values need logits [{batch}, more than {largest_token}], "
                f"got {list(logits_BV.shape)}"
            )
        if batch and not 0 <= int(nodes_B.min()) <= int(nodes_B.max()) < trie.nodes:
            raise IndexError(f"nodes must be in 0..{trie.nodes - 1}, got {int(nodes_B.min())}..{int(nodes_B.max())}")
        children, tokens = np.empty((2, batch), dtype=np.int64)
        log_probabilities = np.empty(batch, dtype=np.float32)
        failed = sample_rows(
            trie.child_start, trie.code, trie.first_rank, trie.items_below, self._level_start.numpy(),
            self._token_base.numpy(), self._token_table.numpy(), logits_BV.detach().numpy(), nodes_B.numpy(),
            uniform_B.numpy(), temperature, NO_TOKEN if terminator is None else terminator,
            NOTHING_EXCLUDED if excluded is None else excluded.keys,
            trie.items if excluded is None else excluded.stride, excluded_rows_B,
            np.empty(trie.largest_fan_out + 1, dtype=np.int64), np.empty(trie.largest_fan_out + 1), children, tokens,
            log_probabilities,
        )  # fmt: skip
        if failed != EVERY_ROW_SAMPLED:
            raise self._nothing_allowed(failed, nodes_B)
        return SampledChildren(*map(torch.from_numpy, (children, tokens, log_probabilities)))

    def _sample_by_operations(
        self,
        logits_BV: torch.Tensor,
        nodes_B: torch.Tensor,
        uniform_B: torch.Tensor,
        temperature: float,
        terminator: int | None,
        excluded: ExcludedItems | None,
        excluded_rows_B: np.ndarray,
    ) -> SampledChildren:
        # index_select throughout: it gathers several times faster than indexing with brackets.
        first = self._child_start.index_select(0, nodes_B).long()
        counts = self._child_start.index_select(0, nodes_B + 1).long() - first
        offsets = torch.cumsum(counts, 0)
        rows = torch.repeat_interleave(counts, output_size=int(offsets[-1]))
        children = torch.arange(len(rows), device=self.device) + (first - offsets + counts).index_select(0, rows)
        token_base = self._token_base.index_select(0, torch.bucketize(nodes_B, self._level_start, right=True))
        columns = token_base.index_select(0, rows) + self._code.index_select(0, children).long()
        if len(self._token_table):
            columns = self._token_table.index_select(0, columns)
        if excluded is not None and len(excluded):
            open_ = excluded.open(self.trie, excluded_rows_B[rows.cpu().numpy()], children.cpu().numpy())
            kept = torch.from_numpy(np.flatnonzero(open_)).to(self.device)
            rows, children, columns = rows[kept], children[kept], columns[kept]
        if terminator is not None:
            rows, children, columns = self._with_terminator(
                nodes_B, rows, children, columns, terminator, excluded, excluded_rows_B
            )
        if terminator is not None or (excluded is not None and len(excluded)):
            counts = torch.bincount(rows, minlength=len(nodes_B))
            offsets = torch.cumsum(counts, 0)
        if not bool(counts.all()):
            row = int((counts == 0).nonzero()[0])
            raise self._nothing_allowed(row, nodes_B)

        vocabulary = logits_BV.shape[1]
        values = logits_BV.reshape(-1).index_select(0, rows * vocabulary + columns).double()
        if temperature != 1.0:
            values /= temperature
        largest = torch.full((len(nodes_B),), -torch.inf, dtype=torch.float64, device=self.device)
        largest.scatter_reduce_(0, rows, values, "amax")
        # One running sum over all rows; a row's share of it is what it adds. Float64 and the subtracted maximum (each
        # row adds between 1 and its number of children) keep the shares exact to about 1e-12.
        running = torch.cumsum(torch.exp(values - largest.index_select(0, rows)), 0)
        last = offsets - 1
        ends = running.index_select(0, last)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        mass = ends - starts
        chosen = torch.searchsorted(running, starts + uniform_B * mass, right=True)
        chosen = torch.minimum(torch.maximum(chosen, offsets - counts), last)
        log_probabilities = values.index_select(0, chosen) - largest - torch.log(mass)
        return SampledChildren(
            children.index_select(0, chosen), columns.index_select(0, chosen), log_probabilities.float()
        )

    def _with_terminator(
        self,
        nodes_B: torch.Tensor,
        rows: torch.Tensor,
        children: torch.Tensor,
        columns: torch.Tensor,
        terminator: int,
        excluded: ExcludedItems | None,
        excluded_rows_B: np.ndarray,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The allowed edges, with one more for every row whose node is an item that may be answered."""
        nodes = nodes_B.cpu().numpy()
        ends = self.trie.item(nodes) >= 0
        if excluded is not None:
            ends &= ~excluded.holds_item_at(self.trie, excluded_rows_B, nodes)
        ending = torch.from_numpy(np.flatnonzero(ends)).to(self.device)
        all_rows = torch.cat([rows, ending])
        order = torch.argsort(all_rows, stable=True)
        children = torch.cat([children, torch.full_like(ending, NO_NODE)])
        columns = torch.cat([columns, torch.full_like(ending, terminator)])
        return all_rows[order], children[order], columns[order]
