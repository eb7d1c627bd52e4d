"""What a response answers, and whether it has the format that its mode requires.

    direct     SID end-of-sequence
    reasoning  steps 1 to 4 </think> rewritten history (step 5) <answer> SID </answer> end-of-sequence

A reasoning response starts inside the think block: its prompt ends with the opening. The end-of-sequence token may be
absent in both modes, because some engines strip it; whatever follows it is no part of the response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

STEP_MARKERS: tuple[str, ...] = ("Evidence:", "Preference:", "Intent:", "Recommendation:")
"""How steps 1 to 4 of the reasoning begin, in their order inside the think block."""

REWRITE_MARKER = "Rewritten history:"
"""How step 5 begins, between the think block and the answer block."""


class ResponseTokens(Protocol):
    """The tokens that give a response its structure; `item_index.tokens.SemanticIdTokens` is one."""

    @property
    def think_close(self) -> int: ...
    @property
    def answer_open(self) -> int: ...
    @property
    def answer_close(self) -> int: ...
    @property
    def end_of_sequence(self) -> int: ...

    def code_of(self, token: int) -> tuple[int, int] | None:
        """(0-based level, code) of a semantic-ID token, None for any other token."""


@dataclass(frozen=True)
class ParsedAnswer:
    """A parsed response.

    Attributes:
        codes: the answered semantic ID, code of level l at place l, collision code included; given also for responses
            that are not well formed, so that valid items are counted apart from the format. None where none can be
            read. Whether the codes name an item of the catalogue is not looked at here.
        well_formed: f of the residual-sensitive reward.
        problem: the first thing that is wrong with the format, "" for a well-formed response.
    """

    codes: tuple[int, ...] | None
    well_formed: bool
    problem: str


def parse_answer(
    tokens: Sequence[int],
    *,
    mode: Literal["direct", "reasoning"],
    special: ResponseTokens,
    decode: Callable[[Sequence[int]], str],
    minimum_think_tokens: int = 8,
    forced: bool = False,
) -> ParsedAnswer:
    """Parse one response.

    A reasoning response is well formed when it closes its think block exactly once, the think block holds every step
    marker in order and at least `minimum_think_tokens` tokens, the rewrite marker stands between the think block and
    the answer block, and the answer block is closed and holds one semantic ID and nothing else. Of several answer
    blocks the first counts and the others are ignored. A direct response is well formed when it is one semantic ID.

    Args:
        tokens: token ids of the response, without the prompt and without padding before the end of sequence.
        mode: the mode that the prompt asked for.
        special: the structure tokens and the codes of semantic-ID tokens.
        decode: text of a run of tokens; called on the think block and on the rewriting, in reasoning mode only.
        minimum_think_tokens: tokens before the closing of the think block below which the block counts as empty.
        forced: whether the token budget forced the closing; such a response is never well formed.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in ("direct", "reasoning"):
        raise ValueError(f"unknown mode {mode!r}, expected 'direct' or 'reasoning'")
    response = [int(token) for token in tokens]
    if special.end_of_sequence in response:
        response = response[: response.index(special.end_of_sequence)]
    if mode == "direct":
        codes = _leading_codes(response, special)
        problem = "" if codes is not None and len(codes) == len(response) else "the response is not one semantic ID"
    else:
        codes, problem = _answer_block(response, special)
        problem = _reasoning_problem(response, special, decode, minimum_think_tokens) or problem
    if forced:
        problem = "the token budget forced the closing"
    return ParsedAnswer(codes=codes, well_formed=not problem, problem=problem)


def leading_steps(think_text: str) -> int:
    """How many step markers stand in the text in their order, up to the first that is missing or out of order."""
    place = 0
    for number, marker in enumerate(STEP_MARKERS):
        found = think_text.find(marker, place)
        if found < 0:
            return number
        place = found + len(marker)
    return len(STEP_MARKERS)


def _leading_codes(tokens: Sequence[int], special: ResponseTokens) -> tuple[int, ...] | None:
    """Codes of the semantic ID that `tokens` begin with; None where they begin with none."""
    codes: list[int] = []
    for token in tokens:
        placed = special.code_of(token)
        if placed is None or placed[0] != len(codes):
            break
        codes.append(placed[1])
    return tuple(codes) or None


def _answer_block(response: list[int], special: ResponseTokens) -> tuple[tuple[int, ...] | None, str]:
    """Codes in the first answer block, and what is wrong with that block."""
    if special.answer_open not in response:
        return None, "no answer block"
    block = response[response.index(special.answer_open) + 1 :]
    closed = special.answer_close in block
    if closed:
        block = block[: block.index(special.answer_close)]
    # Text before the semantic ID breaks the format; the semantic ID can be read all the same.
    start = next((place for place, token in enumerate(block) if special.code_of(token) is not None), len(block))
    codes = _leading_codes(block[start:], special)
    if codes is None:
        return None, "no semantic ID in the answer block"
    if not closed:
        return codes, "the answer block is not closed"
    if len(codes) != len(block):
        return codes, "the answer block is not exactly one semantic ID"
    return codes, ""


def _reasoning_problem(
    response: list[int], special: ResponseTokens, decode: Callable[[Sequence[int]], str], minimum_think_tokens: int
) -> str:
    """What is wrong before the answer block; "" where nothing is."""
    closings = response.count(special.think_close)
    if closings != 1:
        return f"the think block is closed {closings} times" if closings else "the think block is not closed"
    think_end = response.index(special.think_close)
    if think_end < minimum_think_tokens:
        return f"the think block has {think_end} tokens, fewer than {minimum_think_tokens}"
    if special.answer_open in response[:think_end]:
        return "the answer block opens inside the think block"
    steps = leading_steps(decode(response[:think_end]))
    if steps < len(STEP_MARKERS):
        return f"step marker '{STEP_MARKERS[steps]}' is missing or out of order"
    if special.answer_open not in response:
        return "no answer block"
    if REWRITE_MARKER not in decode(response[think_end + 1 : response.index(special.answer_open)]):
        return f"'{REWRITE_MARKER}' is missing between the think block and the answer block"
    return ""
