"""Ranked items of many users at once: trie-constrained beam search, and the merging of beams over reasoning chains.

The keys and values of a prompt are computed once. The beams of all levels lie behind it in the same cache, and a mask
lets each beam see the prompt and its own ancestors: nothing is copied when beams are reordered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from item_index.constraint import AnswerConstraint
from item_index.trie import NO_ITEM, ROOT

NEVER = float("-inf")


@torch.inference_mode()
def beam_search(
    language_model: Any,
    constraint: AnswerConstraint,
    prompts: Sequence[np.ndarray],
    excluded: Sequence[np.ndarray],
    *,
    width: int,
    terminator: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The best items after each prompt, best first.

    Args:
        prompts: token ids per user; the next token opens the answer's semantic ID.
        excluded: item rows per user that must not be ranked (seen items).
        terminator: the token that would end the semantic ID (an item may be the beginning of another).

    Returns:
        items int32 [U, width] (-1 where fewer remain) and scores float32 [U, width], log p(item) under the constraint.
        Excluded items are passed over but keep their share of the probability, which leaves the order of the others.
    """
    trie, tokens = constraint.trie, constraint.tokens
    users, width = len(prompts), min(width, trie.items)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    input_ids = torch.zeros(users, longest, dtype=torch.int64)
    for user, prompt in enumerate(prompts):
        input_ids[user, : len(prompt)] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
    prompt_valid = torch.arange(longest)[None, :] < lengths[:, None]
    cache = DynamicCache(config=language_model.config)
    hidden = language_model.base_model(
        input_ids=input_ids, attention_mask=prompt_valid.long(), past_key_values=cache, use_cache=True
    ).last_hidden_state
    hidden_UWH = hidden[torch.arange(users), lengths - 1][:, None]
    head_VH = language_model.get_output_embeddings().weight
    seen = np.stack([trie.excluded_below(np.unique(items)) for items in excluded])
    open_nodes = torch.from_numpy(trie.items_below[None, :] > seen)  # [U, nodes]
    child_count, child_start = (torch.from_numpy(a.astype(np.int64)) for a in (trie.child_count, trie.child_start))
    item_of_node = torch.from_numpy(trie.item.astype(np.int64))
    blocked_items = torch.zeros(users, trie.items, dtype=torch.bool)
    for user, items in enumerate(excluded):
        blocked_items[user, torch.from_numpy(np.asarray(items, dtype=np.int64))] = True

    nodes = torch.full((users, 1), ROOT)
    scores = torch.zeros(users, 1)
    final_scores = torch.full((users, width), NEVER)
    final_items = torch.full((users, width), NO_ITEM)
    ancestors = torch.zeros(users, 1, 0, dtype=torch.bool)
    user_index = torch.arange(users)[:, None]
    for level, level_tokens in enumerate(tokens.code_tokens):
        alive = torch.isfinite(scores)
        if not bool(alive.any()):
            break
        # Logits of this level's codes and of the terminator; what is allowed at each beam's node is renormalised over.
        columns = torch.cat([torch.from_numpy(level_tokens), torch.tensor([terminator])])
        logits = (hidden_UWH @ head_VH[columns].T).float()
        codes = len(level_tokens)
        child_rows, child_nodes = _children(nodes, alive, child_start, child_count)
        table = torch.full((nodes.numel(), codes), -1)
        table[child_rows, torch.from_numpy(trie.code.astype(np.int64))[child_nodes]] = child_nodes
        table = table.view(*nodes.shape, codes)
        ends = (item_of_node[nodes] != NO_ITEM) & alive
        permitted = torch.cat([table >= 0, ends[..., None]], dim=-1)
        log_p = logits.masked_fill(~permitted, NEVER)
        log_p = torch.where(permitted, log_p - log_p.logsumexp(dim=-1, keepdim=True), NEVER) + scores[..., None]

        end_items = torch.where(ends, item_of_node[nodes], NO_ITEM)
        end_scores = torch.where(ends & ~_blocked(blocked_items, end_items), log_p[..., -1], NEVER)
        child_scores = torch.where((table >= 0) & open_nodes[user_index[..., None], table.clamp(min=0)],
                                   log_p[..., :-1], NEVER).flatten(1)  # fmt: skip
        scores, chosen = child_scores.topk(min(width, child_scores.shape[1]), dim=1)
        nodes = torch.where(torch.isfinite(scores), table.flatten(1).gather(1, chosen), ROOT)
        # An item without further children ends here with certainty.
        leaf = (child_count[nodes] == 0) & torch.isfinite(scores)
        leaf_items = torch.where(leaf, item_of_node[nodes], NO_ITEM)
        pool_scores = torch.cat([final_scores, end_scores, torch.where(leaf, scores, NEVER)], dim=1)
        pool_items = torch.cat([final_items, end_items, leaf_items], dim=1)
        final_scores, kept = pool_scores.topk(width, dim=1)
        final_items = torch.where(torch.isfinite(final_scores), pool_items.gather(1, kept), NO_ITEM)
        scores = scores.masked_fill(leaf, NEVER)
        if not bool(torch.isfinite(scores).any()):
            break

        beams = nodes.shape[1]
        parent = chosen // codes
        earlier = ancestors.gather(1, parent[..., None].expand(-1, -1, ancestors.shape[2]))
        ancestors = torch.cat([earlier, torch.eye(beams, dtype=torch.bool).expand(users, -1, -1)], dim=2)
        visible = torch.cat([prompt_valid[:, None].expand(-1, beams, -1), ancestors], dim=2)
        # The next beams' parents are these beams: ancestors of the level before stand under their own places.
        hidden_UWH = language_model.base_model(
            input_ids=torch.from_numpy(level_tokens)[chosen % codes],
            attention_mask=visible[:, None],
            position_ids=(lengths[:, None] + level).expand(-1, beams),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
    return final_items.numpy().astype(np.int32), final_scores.numpy()


def _blocked(blocked_items: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    return blocked_items.gather(1, items.clamp(min=0)) & (items != NO_ITEM)


def _children(
    nodes: torch.Tensor, alive: torch.Tensor, child_start: torch.Tensor, child_count: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat (row of the flattened nodes, child node) of all children of the beams that are alive."""
    flat = nodes.flatten()
    counts = child_count[flat] * alive.flatten()
    rows = torch.repeat_interleave(torch.arange(len(flat)), counts)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return rows, child_start[flat[rows]] + torch.arange(len(rows)) - first


def merge_chains(
    items_CK: np.ndarray, scores_CK: np.ndarray, user_of_chain_C: np.ndarray, *, users: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Merge the beams of several chains per user: log (1/M) sum over the user's M chains of p(item | chain).

    Returns items int32 [users, width] (-1 where fewer) and scores float32, best first, each item once. A chain whose
    beam lacks an item adds nothing to it.
    """
    chain, place = np.nonzero(items_CK >= 0)
    user, item = user_of_chain_C[chain].astype(np.int64), items_CK[chain, place].astype(np.int64)
    keys, inverse = np.unique(user * (int(item.max(initial=0)) + 1) + item, return_inverse=True)
    merged = np.full(len(keys), -np.inf)
    np.logaddexp.at(merged, inverse, scores_CK[chain, place].astype(np.float64))
    key_user, key_item = np.divmod(keys, int(item.max(initial=0)) + 1)
    merged -= np.log(np.bincount(user_of_chain_C, minlength=users))[key_user]
    order = np.lexsort((key_item, -merged, key_user))
    starts = np.searchsorted(key_user[order], np.arange(users))
    rank = np.arange(len(order)) - starts[key_user[order]]
    kept = rank < width
    ranked, scores = np.full((users, width), -1, np.int32), np.full((users, width), -np.inf, np.float32)
    ranked[key_user[order][kept], rank[kept]] = key_item[order][kept]
    scores[key_user[order][kept], rank[kept]] = merged[order][kept]
    return ranked, scores
