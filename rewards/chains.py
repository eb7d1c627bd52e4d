"""What reasoning chains are made of, in figures: a policy that stops to reason, or invents its history, shows here.

Rewards do not tell: a chain may shrink to the bare minimum, and a rewriting to one item, while answers go on to score.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from rewards.answer import STEP_MARKERS, ResponseTokens, leading_steps

CHAIN = np.dtype(
    [
        ("think_tokens", np.int32),  # before </think>
        ("markers", np.int32),  # different step markers in the think block
        ("complete", np.bool_),  # every step marker is there, in their order
        ("rewritten_items", np.int32),  # semantic IDs between </think> and <answer>
        ("foreign_items", np.int32),  # those of them that the history does not hold
    ]
)
"""The figures of one chain; arrays of them have the shape of the responses."""


def semantic_ids_in(tokens: Sequence[int], special: ResponseTokens) -> list[tuple[int, ...]]:
    """The semantic IDs in a run of tokens in their order, each as its codes, level by level.

    A token of the first level opens one, and it goes on as long as the levels follow each other. Codes outside of one
    are passed over, so a broken semantic ID counts with the codes it has.
    """
    found: list[tuple[int, ...]] = []
    levels_so_far = 0  # of the semantic ID that is open, 0 for none
    for token in tokens:
        placed = special.code_of(int(token))
        if placed is None or placed[0] not in (0, levels_so_far):
            levels_so_far = 0
            continue
        if placed[0] == 0:
            found.append(())
        found[-1] += (placed[1],)
        levels_so_far = placed[0] + 1
    return found


def chain_figures(
    tokens: Sequence[int],
    *,
    history: Collection[tuple[int, ...]],
    special: ResponseTokens,
    decode: Callable[[Sequence[int]], str],
) -> np.ndarray:
    """The figures of one reasoning response, dtype `CHAIN`, of shape [].

    The think block ends at the first `</think>`, `<answer>` or end of sequence, whichever comes first; the rewriting
    reaches from there to the first `<answer>` or the end. Semantic IDs in the rewriting count whether or not its marker
    is there.

    Args:
        tokens: token ids of the response, which starts inside the think block, without padding.
        history: semantic IDs that the prompt showed, as codes.
        special: the structure tokens and the codes of semantic-ID tokens.
        decode: text of a run of tokens; called on the think block.
    """
    response = [int(token) for token in tokens]
    if special.end_of_sequence in response:
        response = response[: response.index(special.end_of_sequence)]
    before_answer = response[: _first(response, special.answer_open)]
    think_tokens = _first(before_answer, special.think_close)
    text = decode(before_answer[:think_tokens])
    rewritten = semantic_ids_in(before_answer[think_tokens:], special)
    return np.array(
        (
            think_tokens,
            sum(marker in text for marker in STEP_MARKERS),
            leading_steps(text) == len(STEP_MARKERS),
            len(rewritten),
            sum(codes not in history for codes in rewritten),
        ),
        dtype=CHAIN,
    )


def chain_metrics(chains: np.ndarray, *, minimum_think_tokens: int) -> dict[str, float]:
    """Means, shares and quantiles over chains of dtype `CHAIN`, any shape; empty for no chains.

    - think_tokens, think_tokens_10, think_tokens_90: mean, 10 % and 90 % quantile of the think block's length;
    - empty_share: chains with fewer than `minimum_think_tokens` tokens in the think block;
    - complete_share: chains with every step marker in order; markers_share: mean share of step markers present;
    - rewritten_items: mean length of the rewritten history, in items;
    - foreign_share: rewritten items that are not in the history, of all rewritten items; absent where there are none.
    """
    if chains.size == 0:
        return {}
    flat = chains.reshape(-1)
    low, high = np.quantile(flat["think_tokens"], (0.1, 0.9))
    metrics = {
        "think_tokens": float(flat["think_tokens"].mean()),
        "think_tokens_10": float(low),
        "think_tokens_90": float(high),
        "empty_share": float((flat["think_tokens"] < minimum_think_tokens).mean()),
        "complete_share": float(flat["complete"].mean()),
        "markers_share": float(flat["markers"].mean()) / len(STEP_MARKERS),
        "rewritten_items": float(flat["rewritten_items"].mean()),
    }
    if flat["rewritten_items"].any():
        metrics["foreign_share"] = float(flat["foreign_items"].sum() / flat["rewritten_items"].sum())
    return metrics


def _first(tokens: list[int], token: int) -> int:
    """Place of the first `token`, or the end."""
    return tokens.index(token) if token in tokens else len(tokens)
