"""The one prompt builder: training, rollouts, evaluation and serving turn a history into token ids here.

The mode is chosen by the system prompt. In reasoning mode the prompt ends with `<think>`, so a response starts inside
the think block. Messages of the alignment tasks, in which words and semantic IDs are mixed, are rendered here as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from item_index.constraint import Mode
from item_index.input_error import InputError
from item_index.semantic_ids import SemanticIdIndex
from item_index.tokens import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, SemanticIdTokens

SYSTEM_PROMPTS: dict[Mode, str] = {
    "direct": "Recommend the next item.",
    "reasoning": "Think step by step, then recommend the next item.",
}


class PromptBuilder:
    """Builds prompts and supervised responses for one tokenizer and one index.

    For histories alone, the chat template is rendered once per mode around a stand-in; prompts are then put together
    from token ids, which is exact because every semantic-ID token is one special token.
    """

    def __init__(
        self, tokenizer: Any, index: SemanticIdIndex, tokens: SemanticIdTokens, *, history_items: int = 20
    ) -> None:
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.history_items = history_items
        self.index = index
        self.item_tokens = [
            tokens.item_tokens(codes[:length]) for codes, length in zip(index.codes_IL, index.lengths_I, strict=True)
        ]
        self._around = {mode: self._render(mode) for mode in SYSTEM_PROMPTS}

    def _render(self, mode: Mode) -> tuple[list[int], list[int]]:
        """Token ids before and after the history."""
        ids = self.message_prompt(SYSTEM_PROMPTS[mode], self.index.tokens()[0][0])
        place = [i for i, token in enumerate(ids) if token == int(self.tokens.code_tokens[0][0])]
        if len(place) != 1:
            raise InputError(
                "the tokenizer's chat template does not render the user's message exactly once",
                file=self.tokenizer.name_or_path,
                field="chat_template",
                remedy="Use a template with system and user messages.",
            )
        after = ids[place[0] + 1 :]
        return ids[: place[0]], [*after, self.tokens.think_open] if mode == "reasoning" else after

    def prompt(self, history: Sequence[int] | np.ndarray, mode: Mode) -> list[int]:
        """Token ids of the prompt for the last `history_items` items (rows of the index) of a history."""
        before, after = self._around[mode]
        tokens = [*before]
        for item in history[-self.history_items :]:
            tokens += self.item_tokens[item]
        return tokens + after

    def message_prompt(self, system: str, message: str) -> list[int]:
        """Token ids of a prompt with any message; semantic IDs in it are spelled as `index.text` does.

        Text from outside has to be clean (`item_index.text.clean_text`), or it could spell special tokens too.
        """
        if self.tokenizer.chat_template:
            messages = [{"role": "system", "content": system}, {"role": "user", "content": message}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            text = f"{system}\n{message}\n"
        return self.tokenizer(text, add_special_tokens=not self.tokenizer.chat_template)["input_ids"]

    def cut_text(self, text: str, maximum_tokens: int) -> str:
        """The longest beginning of at most `maximum_tokens` tokens, in whole characters; one character at least."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if len(encoded["input_ids"]) <= maximum_tokens:
            return text
        # The bytes of one character may be several tokens; the first token that is left out then begins before the cut.
        return text[: encoded["offset_mapping"][maximum_tokens][0]].rstrip() or text[:1]

    def history_start(self, mode: Mode) -> int:
        """Place of the history's first token in a prompt."""
        return len(self._around[mode][0])

    def direct_response(self, target: int) -> list[int]:
        """The target's semantic ID and the end of sequence."""
        return [*self.item_tokens[target], self.tokens.end_of_sequence]

    def text_response(self, text: str) -> list[int]:
        """A text and the end of sequence."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokens.end_of_sequence]

    def reasoning_response(self, think: str, rewriting: str, target: int) -> list[int]:
        """Chain, rewritten history and answer, as the model has to write them after `<think>`."""
        return self.text_response(
            f"{think}{THINK_CLOSE}{rewriting}{ANSWER_OPEN}{self.index.text(target)}{ANSWER_CLOSE}"
        )
