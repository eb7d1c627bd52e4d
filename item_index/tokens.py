"""Which token of a checkpoint's vocabulary stands for which code, and which tokens give a response its structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from item_index.input_error import InputError
from item_index.semantic_ids import SemanticIdIndex

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
STRUCTURE_TOKENS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)


class Tokenizer(Protocol):
    """What is asked of a transformers tokenizer here."""

    eos_token_id: int | None
    pad_token_id: int | None
    name_or_path: str

    def __len__(self) -> int: ...
    def get_vocab(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class SemanticIdTokens:
    """Token ids of the structure tokens and of every code of every level.

    Attributes:
        code_tokens: per level, int64 [codes]: the token of each code (the collision level last, where there is one).
        vocabulary_size: rows of the model's output head; ids from `tokenizer_size` on are padding rows.
        stop_tokens: tokens that end a sequence besides `end_of_sequence` (and padding).
    """

    think_open: int
    think_close: int
    answer_open: int
    answer_close: int
    end_of_sequence: int
    stop_tokens: tuple[int, ...]
    code_tokens: tuple[np.ndarray, ...]
    tokenizer_size: int
    vocabulary_size: int

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        index: SemanticIdIndex,
        *,
        vocabulary_size: int | None = None,
        other_stop_tokens: Sequence[int] = (),
    ) -> SemanticIdTokens:
        """Look every token up; raises InputError that names the tokens which the checkpoint lacks."""
        vocabulary = tokenizer.get_vocab()
        wanted = [*STRUCTURE_TOKENS, *(token for level in index.tokens() for token in level)]
        missing = [token for token in wanted if token not in vocabulary]
        if missing:
            raise InputError(
                f"the tokenizer lacks {len(missing)} of the {len(wanted)} tokens of index {index.version}, "
                f"among them {', '.join(missing[:3])}",
                file=tokenizer.name_or_path,
                field="tokenizer",
                remedy="Use the checkpoint that was trained on this index, or run corpus and sft, which add them.",
            )
        if tokenizer.eos_token_id is None:
            raise InputError(
                "the tokenizer has no end-of-sequence token", file=tokenizer.name_or_path, field="tokenizer"
            )
        stops = {*other_stop_tokens, *({tokenizer.pad_token_id} if tokenizer.pad_token_id is not None else set())}
        return cls(
            think_open=vocabulary[THINK_OPEN],
            think_close=vocabulary[THINK_CLOSE],
            answer_open=vocabulary[ANSWER_OPEN],
            answer_close=vocabulary[ANSWER_CLOSE],
            end_of_sequence=tokenizer.eos_token_id,
            stop_tokens=tuple(sorted(stops - {tokenizer.eos_token_id})),
            code_tokens=tuple(np.array([vocabulary[t] for t in level], dtype=np.int64) for level in index.tokens()),
            tokenizer_size=len(tokenizer),
            vocabulary_size=vocabulary_size or len(tokenizer),
        )

    @cached_property
    def level_of_token(self) -> np.ndarray:
        """int8 [vocabulary]: 0-based level of a semantic-ID token, -1 for every other token."""
        levels = np.full(self.vocabulary_size, -1, dtype=np.int8)
        for level, tokens in enumerate(self.code_tokens):
            levels[tokens] = level
        return levels

    @cached_property
    def code_of_token(self) -> np.ndarray:
        """int32 [vocabulary]: code of a semantic-ID token within its level, -1 for every other token."""
        codes = np.full(self.vocabulary_size, -1, dtype=np.int32)
        for tokens in self.code_tokens:
            codes[tokens] = np.arange(len(tokens))
        return codes

    def code_of(self, token: int) -> tuple[int, int] | None:
        """(level, code) of a semantic-ID token, None for any other token."""
        level = int(self.level_of_token[token])
        return None if level < 0 else (level, int(self.code_of_token[token]))

    def item_tokens(self, codes: Sequence[int]) -> list[int]:
        """Token ids of one item's codes."""
        return [int(self.code_tokens[level][code]) for level, code in enumerate(codes)]
