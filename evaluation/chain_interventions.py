"""Causal transparency: what becomes of the answers when the chains before them, or what the chains cite, are changed.

A chain that explains an answer has to matter for it. Each intervention changes one thing and leaves the model, the user
and the ranking as they are, so the difference in hits is what that thing was worth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from item_index.ragged import RaggedArray
from item_index.tokens import SemanticIdTokens
from rewards.chains import semantic_ids_in

ChainIntervention = Literal["swapped_chains", "deleted_chains", "cited_items_removed", "other_items_removed"]
CHAIN_INTERVENTIONS: tuple[ChainIntervention, ...] = get_args(ChainIntervention)


@dataclass(frozen=True)
class OpenedAnswers:
    """What stands before the answers of reasoning mode, up to and including `<answer>`.

    Attributes:
        contexts: int32 token ids, prompt and chain, one row per answer [C].
        user_C: int64, row of the user among those that are evaluated.
    """

    contexts: RaggedArray
    user_C: np.ndarray


def intervene(
    intervention: ChainIntervention,
    chains: RaggedArray,
    histories: Sequence[np.ndarray],
    *,
    prompt_of: Callable[[np.ndarray], Sequence[int]],
    item_of_codes: Callable[[tuple[int, ...]], int | None],
    tokens: SemanticIdTokens,
    seed: int,
) -> OpenedAnswers:
    """Contexts in the place of those that the chains were sampled in.

    - `swapped_chains`: every user gets the chains of another user; who gets whose is drawn once.
    - `deleted_chains`: nothing stands between the opened think block and the answer, one context for each user.
    - `cited_items_removed`: the items that a chain's rewritten history cites are taken out of the prompt before it.
    - `other_items_removed`: as many items, drawn from those that it does not cite, are; what `cited_items_removed` has
      to be compared with, for a shorter history alone costs hits. Where fewer are left, all of them are.

    Args:
        chains: int32 token ids from behind the prompt to `<answer>`, M rows for each user, user after user.
        histories: item rows that each user's prompt showed, in time order.
        prompt_of: token ids of the reasoning prompt of a history.
        item_of_codes: row of the item with these codes; None where there is none.
        seed: of whose chains a user gets, and of the items that are removed.

    Raises ValueError where chains are to be swapped and there is one user.
    """
    users, generator = len(histories), np.random.default_rng([seed, 8])
    user_C = np.repeat(np.arange(users), len(chains) // users)
    if intervention == "deleted_chains":
        closed = [tokens.think_close, tokens.answer_open]
        rows = [[*prompt_of(history), *closed] for history in histories]
        return OpenedAnswers(RaggedArray.of(rows, np.int32), np.arange(users))
    if intervention == "swapped_chains":
        if users < 2:
            raise ValueError("chains cannot be swapped between users where there is one user")
        order = generator.permutation(users)
        giver_U = np.empty(users, np.int64)
        giver_U[order] = np.roll(order, 1)  # round a circle of all users: nobody keeps the own
        each = len(chains) // users
        chains = chains.select(giver_U[user_C] * each + np.arange(len(chains)) % each)
        prompts = [prompt_of(history) for history in histories]
        rows = [[*prompts[user], *chain.tolist()] for user, chain in zip(user_C, chains, strict=True)]
        return OpenedAnswers(RaggedArray.of(rows, np.int32), user_C)
    rows = []
    for user, chain in zip(user_C, chains, strict=True):
        history, cited = histories[user], cited_items(chain, tokens, item_of_codes)
        removed = np.isin(history, list(cited))
        if intervention == "other_items_removed":
            others = np.flatnonzero(~removed)
            count = min(int(removed.sum()), len(others))
            removed = np.isin(np.arange(len(history)), generator.choice(others, count, replace=False))
        rows.append([*prompt_of(history[~removed]), *chain.tolist()])
    return OpenedAnswers(RaggedArray.of(rows, np.int32), user_C)


def cited_items(
    chain: np.ndarray, tokens: SemanticIdTokens, item_of_codes: Callable[[tuple[int, ...]], int | None]
) -> set[int]:
    """Rows of the items whose semantic IDs stand in a chain."""
    found = (item_of_codes(codes) for codes in semantic_ids_in(chain.tolist(), tokens))
    return {row for row in found if row is not None}
