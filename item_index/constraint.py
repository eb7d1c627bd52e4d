"""The automaton that keeps every response inside the format and the catalogue.

A state is a function of the response's tokens so far: the phase, the trie node and the tokens left of the budget. The
sampler (vLLM) and the learner ask the same code which tokens are allowed, and renormalise over the same set.

    direct     ANSWER: along the trie from the root; an item's node allows its children and the end of sequence
    reasoning  THINK, free text -> `</think>` -> REWRITE, free text -> `<answer>` -> ANSWER along the trie ->
               `</answer>` -> CLOSED -> end of sequence -> DONE

In free text a token of the first level opens a semantic ID, which must run along the trie to an item. When no more is
left of the budget than the longest closing, only the shortest way to a closed answer is allowed; its semantic ID is
still sampled. Excluded items are forbidden in the answer only.

Without the constraint (an ablation) a response is FREE in both modes: any token of the tokenizer, up to the end of
sequence. Whether it answers an item is then left to the model, excluded items included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Literal

import numpy as np

from item_index.exclusion import ExcludedItems
from item_index.ragged import RaggedArray
from item_index.semantic_ids import SemanticIdIndex
from item_index.tokens import SemanticIdTokens, Tokenizer
from item_index.trie import NO_ITEM, NO_NODE, ROOT, ItemTrie

Mode = Literal["direct", "reasoning"]
MODES: tuple[Mode, ...] = ("direct", "reasoning")
NO_TOKEN = -1


class Phase(IntEnum):
    THINK = 0
    REWRITE = 1
    ANSWER = 2
    CLOSED = 3
    DONE = 4
    FREE = 5


class ConstraintViolation(ValueError):
    """A response holds a token that its constraint does not allow: sampler and constraint disagree."""


@dataclass
class ConstraintStates:
    """States of B responses.

    Attributes:
        phase: int8 [B], a `Phase`.
        node: int64 [B], trie node (the root where no semantic ID is open).
        remaining: int64 [B], tokens that may still be generated.
        reasoning: bool [B], the mode.
        forced: bool [B], whether the closing had to be forced by the budget so far.
        exclusion: int64 [B], row of `excluded`.
        excluded: items that must not be answered.
    """

    phase: np.ndarray
    node: np.ndarray
    remaining: np.ndarray
    reasoning: np.ndarray
    forced: np.ndarray
    exclusion: np.ndarray
    excluded: ExcludedItems

    def select(self, rows: np.ndarray) -> ConstraintStates:
        """The states of some rows (copies; the excluded items are shared)."""
        return ConstraintStates(
            self.phase[rows], self.node[rows], self.remaining[rows], self.reasoning[rows], self.forced[rows],
            self.exclusion[rows], self.excluded,
        )  # fmt: skip

    def put(self, rows: np.ndarray, states: ConstraintStates) -> None:
        """Write states (as `select` gave them, moved on) back to their rows."""
        for name in ("phase", "node", "remaining", "forced"):
            getattr(self, name)[rows] = getattr(states, name)


@dataclass(frozen=True)
class NextSteps:
    """Where the next token of B positions may come from; what is allowed is the union of the three.

    Attributes:
        walks: bool [B]; the children of the position's trie node, less those below which every item is excluded.
        ends: int64 [B]; one token that ends or closes something, -1 for none.
        free_text: int8 [B]; row of `AnswerConstraint.free_text_masks`, -1 for none.
    """

    walks: np.ndarray
    ends: np.ndarray
    free_text: np.ndarray


@dataclass(frozen=True)
class AllowedTokens:
    """Allowed next tokens of B positions: a shared free-text set, tokens listed one by one, or both.

    Attributes:
        free_text: int8 [B]; row of `AnswerConstraint.free_text_masks` that is allowed, -1 for none.
        listed: int64 tokens, one row per position.
    """

    free_text: np.ndarray
    listed: RaggedArray

    def __len__(self) -> int:
        return len(self.free_text)

    @property
    def has_choice(self) -> np.ndarray:
        """bool [B]: more than one token is allowed (a set of one has log-probability 0)."""
        return (self.free_text >= 0) | (self.listed.lengths > 1)

    def padded(self, rows: np.ndarray) -> np.ndarray:
        """int64 [len(rows), widest]: listed tokens of some rows, -1 after the last."""
        chosen = self.listed.select(rows)
        table = np.full((len(rows), int(chosen.lengths.max(initial=1))), -1, dtype=np.int64)
        table[np.arange(table.shape[1])[None, :] < chosen.lengths[:, None]] = chosen.values
        return table

    def select(self, rows: np.ndarray) -> AllowedTokens:
        """Some positions, in the given order."""
        return AllowedTokens(self.free_text[rows], self.listed.select(rows))


@dataclass(frozen=True)
class AnswerConstraint:
    """The automaton over one trie and one vocabulary; not `constrained`, everything is allowed."""

    trie: ItemTrie
    tokens: SemanticIdTokens
    constrained: bool = True

    @classmethod
    def of(
        cls, index: SemanticIdIndex, tokenizer: Tokenizer, *, vocabulary_size: int | None = None,
        constrained: bool = True,
    ) -> AnswerConstraint:  # fmt: skip
        """The automaton of an index for a checkpoint's tokenizer; `vocabulary_size` counts the rows of its output head.
        Raises InputError when the tokenizer lacks tokens of the index."""
        return cls(index.trie, SemanticIdTokens.of(tokenizer, index, vocabulary_size=vocabulary_size), constrained)

    @cached_property
    def closing_length(self) -> int:
        """Most tokens that a closed answer can still need: finish an open semantic ID, `</think>`, `<answer>`, the
        longest semantic ID, `</answer>`, end of sequence."""
        return 2 * self.trie.depth + 3

    def minimum_budget(self, mode: Mode) -> int:
        """Least token budget with which a response can answer."""
        return self.trie.depth + 1 if mode == "direct" else self.closing_length

    @cached_property
    def free_text_masks(self) -> np.ndarray:
        """bool [2, vocabulary]: tokens allowed in free text, in the think block and after it; not `constrained`, [1,
        vocabulary]: all tokens of the tokenizer."""
        tokens = self.tokens
        masks = np.ones((2 if self.constrained else 1, tokens.vocabulary_size), dtype=bool)
        masks[:, tokens.tokenizer_size :] = False
        if not self.constrained:
            return masks
        masks[:, tokens.level_of_token > 0] = False
        first_level = np.zeros(tokens.vocabulary_size, dtype=bool)
        children, _ = self.trie.children(np.array([ROOT]))
        first_level[tokens.code_tokens[0][self.trie.code[children]]] = True
        masks[:, (tokens.level_of_token == 0) & ~first_level] = False
        masks[:, [tokens.end_of_sequence, *tokens.stop_tokens, tokens.think_open, tokens.answer_close]] = False
        masks[Phase.THINK, tokens.answer_open] = False
        masks[Phase.REWRITE, tokens.think_close] = False
        return masks

    @cached_property
    def _token_table(self) -> np.ndarray:
        """int64 [levels, largest level]: token of each level's code, -1 beyond a level's size."""
        code_tokens = self.tokens.code_tokens
        table = np.full((len(code_tokens), max(len(tokens) for tokens in code_tokens)), -1, dtype=np.int64)
        for level, tokens in enumerate(code_tokens):
            table[level, : len(tokens)] = tokens
        return table

    def node_token(self, nodes: np.ndarray) -> np.ndarray:
        """int64 [B]: the token of the edge into each node, which must not be the root."""
        return self._token_table[self.trie.level(nodes) - 1, self.trie.code[nodes]]

    def start(
        self,
        modes: Sequence[Mode],
        budgets: Sequence[int] | np.ndarray,
        excluded: Sequence[np.ndarray | Sequence[int] | None] | None = None,
    ) -> ConstraintStates:
        """States before the first token of B responses; `excluded` are item rows per response.

        Raises ValueError for an unknown mode, a budget too small to answer, or an exclusion that leaves no item.
        """
        for row, (mode, budget) in enumerate(zip(modes, budgets, strict=True)):
            if mode not in MODES:
                raise ValueError(f"response {row}: unknown mode {mode!r}; the modes are {', '.join(MODES)}")
            if budget < self.minimum_budget(mode):
                raise ValueError(
                    f"response {row}: a budget of {budget} tokens cannot hold an answer in {mode} mode; "
                    f"allow at least {self.minimum_budget(mode)}"
                )
        reasoning = np.array([mode == "reasoning" for mode in modes], dtype=bool)
        excluded_items = ExcludedItems.of(self.trie, excluded or ())
        every_row = np.arange(len(modes), dtype=np.int64)
        full = np.flatnonzero(~excluded_items.open(self.trie, every_row, np.full(len(modes), ROOT)))
        if full.size:
            raise ValueError(f"response {full[0]}: all {self.trie.items} items are excluded; nothing can be answered")
        phase = np.where(reasoning, Phase.THINK, Phase.ANSWER) if self.constrained else np.full(len(modes), Phase.FREE)
        return ConstraintStates(
            phase=phase.astype(np.int8),
            node=np.full(len(modes), ROOT, dtype=np.int64),
            remaining=np.asarray(budgets, dtype=np.int64).copy(),
            reasoning=reasoning,
            forced=np.zeros(len(modes), dtype=bool),
            exclusion=every_row,
            excluded=excluded_items,
        )

    def _open(self, states: ConstraintStates, rows: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        """bool [len(rows)]: whether an item that may be answered lies at or below the node."""
        open_ = np.ones(len(rows), dtype=bool)
        if len(states.excluded):
            limited = states.phase[rows] == Phase.ANSWER
            open_[limited] = states.excluded.open(self.trie, states.exclusion[rows[limited]], nodes[limited])
        return open_

    def _forced(self, states: ConstraintStates) -> np.ndarray:
        """bool [B]: free text must close now."""
        return (states.phase <= Phase.REWRITE) & (states.remaining <= self.closing_length)

    def next_steps(self, states: ConstraintStates) -> NextSteps:
        """Which sources the next token of every state may come from; a finished response allows its end only."""
        tokens, trie = self.tokens, self.trie
        phase, node = states.phase, states.node
        free_phase = phase <= Phase.REWRITE
        forced = self._forced(states)
        has_item = trie.item(node) != NO_ITEM
        at_boundary = free_phase & ((node == ROOT) | has_item)

        # Children in the trie: everywhere inside a semantic ID, and at the root of an answer.
        walks = ((phase == Phase.ANSWER) | (free_phase & (node != ROOT))) & ~(forced & has_item)

        ends = np.full(len(phase), NO_TOKEN, dtype=np.int64)
        ends[(phase == Phase.CLOSED) | (phase == Phase.DONE)] = tokens.end_of_sequence
        answered = np.nonzero((phase == Phase.ANSWER) & has_item)[0]
        answered = answered[~states.excluded.holds_item_at(trie, states.exclusion[answered], node[answered])]
        ends[answered] = np.where(states.reasoning[answered], tokens.answer_close, tokens.end_of_sequence)
        closes = forced & at_boundary
        ends[closes] = np.where(phase[closes] == Phase.THINK, tokens.think_close, tokens.answer_open)

        free_text = np.where(at_boundary & ~forced, phase, -1).astype(np.int8)
        free_text[phase == Phase.FREE] = 0  # the only mask of an automaton that is not constrained
        return NextSteps(walks, ends, free_text)

    def allowed(self, states: ConstraintStates) -> AllowedTokens:
        """The allowed next tokens of every state, one by one where they are no free text."""
        steps, trie = self.next_steps(states), self.trie
        rows = np.nonzero(steps.walks)[0]
        child_nodes, offsets = trie.children(states.node[rows])
        child_rows = np.repeat(rows, np.diff(offsets))
        open_ = self._open(states, child_rows, child_nodes)
        child_rows, child_nodes = child_rows[open_], child_nodes[open_]
        ending_rows = np.nonzero(steps.ends != NO_TOKEN)[0]
        all_rows = np.concatenate([child_rows, ending_rows])
        listed = np.concatenate([self.node_token(child_nodes), steps.ends[ending_rows]])
        order = np.argsort(all_rows, kind="stable")
        counts = np.bincount(all_rows, minlength=len(steps.walks))
        return AllowedTokens(steps.free_text, RaggedArray(listed[order], np.concatenate([[0], np.cumsum(counts)])))

    def advance(self, states: ConstraintStates, next_tokens: np.ndarray, *, numbers: np.ndarray | None = None) -> None:
        """Take one token in every state, in place. Raises ConstraintViolation for a token that is not allowed, which
        names the response by its place, or by its own number where `numbers` are given."""
        tokens, trie = self.tokens, self.trie
        next_tokens = np.asarray(next_tokens, dtype=np.int64)
        if next_tokens.size and (next_tokens.min() < 0 or next_tokens.max() >= tokens.vocabulary_size):
            raise ConstraintViolation(f"token ids must lie in 0..{tokens.vocabulary_size - 1}")
        phase, node = states.phase, states.node
        level, code = tokens.level_of_token[next_tokens], tokens.code_of_token[next_tokens]
        free_phase = phase <= Phase.REWRITE
        forced = self._forced(states)
        has_item = trie.item(node) != NO_ITEM
        states.forced |= forced

        # A semantic-ID token goes down from the open node, or opens a new one where free text may go on.
        child = trie.step(node, np.where(level == trie.level(node), code, -1))
        reopened = trie.step(np.full(len(node), ROOT), np.where(level == 0, code, -1))
        into = np.where((child == NO_NODE) & free_phase & has_item, reopened, child)
        into = np.where(phase >= Phase.CLOSED, NO_NODE, into)
        down = into != NO_NODE
        down[down] &= self._open(states, np.nonzero(down)[0], into[down])
        down &= ~(forced & ((node == ROOT) | has_item))

        at_boundary = free_phase & ((node == ROOT) | has_item)
        masked = self.free_text_masks[np.where(free_phase, phase, 0), next_tokens]
        plain = masked & ((at_boundary & ~forced & (level < 0)) | (phase == Phase.FREE))
        think_closes = at_boundary & (phase == Phase.THINK) & (next_tokens == tokens.think_close)
        answer_opens = at_boundary & (phase == Phase.REWRITE) & (next_tokens == tokens.answer_open)
        terminator = np.where(states.reasoning, tokens.answer_close, tokens.end_of_sequence)
        answer_ends = (phase == Phase.ANSWER) & has_item & (next_tokens == terminator)
        rows = np.nonzero(answer_ends)[0]
        answer_ends[rows] = ~states.excluded.holds_item_at(trie, states.exclusion[rows], node[rows])
        finishes = (phase >= Phase.CLOSED) & (next_tokens == tokens.end_of_sequence)

        legal = down | plain | think_closes | answer_opens | answer_ends | finishes
        if not legal.all():
            row = int(np.nonzero(~legal)[0][0])
            number = row if numbers is None else int(numbers[row])
            raise ConstraintViolation(
                f"response {number}: token {int(next_tokens[row])} is not allowed in phase "
                f"{Phase(int(phase[row])).name} at trie node {int(node[row])} with {int(states.remaining[row])} tokens "
                "left"
            )
        new_phase = phase.copy()
        new_phase[think_closes] = Phase.REWRITE
        new_phase[answer_opens] = Phase.ANSWER
        new_phase[answer_ends] = np.where(states.reasoning[answer_ends], Phase.CLOSED, Phase.DONE)
        new_phase[finishes] = Phase.DONE
        states.node[:] = np.where(down, into, ROOT)
        states.phase[:] = new_phase
        states.remaining -= 1

    def scan(self, responses: RaggedArray, states: ConstraintStates) -> AllowedTokens:
        """Allowed tokens before every token of whole responses (in the order of `responses.values`), all responses
        advanced together; `states` are moved on to the ends. Raises ConstraintViolation like `advance`."""
        free_text, listed, places = [], [], []
        for position in range(int(responses.lengths.max(initial=0))):
            rows = np.nonzero(responses.lengths > position)[0]
            at = responses.offsets[:-1][rows] + position
            now = states.select(rows)
            allowed = self.allowed(now)
            free_text.append(allowed.free_text)
            listed.append(allowed.listed)
            places.append(at)
            self.advance(now, responses.values[at], numbers=rows)
            states.put(rows, now)
        if not places:
            return AllowedTokens(np.zeros(0, np.int8), RaggedArray.of([], np.int64))
        by_step = AllowedTokens(np.concatenate(free_text), RaggedArray.concatenate(listed))
        return by_step.select(np.argsort(np.concatenate(places)))
