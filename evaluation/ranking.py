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
from item_index.exclusion import ExcludedItems
from item_index.trie import NO_ITEM, NO_NODE, ROOT, ItemTrie

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
    seen = ExcludedItems.of(trie, excluded)

    nodes = torch.full((users, 1), ROOT)
    scores = torch.zeros(users, 1)
    final_scores = torch.full((users, width), NEVER)
    final_items = torch.full((users, width), NO_ITEM)
    ancestors = torch.zeros(users, 1, 0, dtype=torch.bool)
    for level, level_tokens in enumerate(tokens.code_tokens):
        alive = torch.isfinite(scores)
        if not bool(alive.any()):
            break
        # Logits of this level's codes and of the terminator; what is allowed at each beam's node is renormalised over.
        columns = torch.cat([torch.from_numpy(level_tokens), torch.tensor([terminator])])
        logits = (hidden_UWH @ head_VH[columns].T).float()
        codes = len(level_tokens)
        table, open_ = _child_tables(trie, seen, nodes.numpy(), alive.numpy(), codes)
        items_here = torch.from_numpy(trie.item(nodes.numpy()))
        ends = (items_here != NO_ITEM) & alive
        permitted = torch.cat([table >= 0, ends[..., None]], dim=-1)
        log_p = logits.masked_fill(~permitted, NEVER)
        log_p = torch.where(permitted, log_p - log_p.logsumexp(dim=-1, keepdim=True), NEVER) + scores[..., None]

        end_items = torch.where(ends, items_here, NO_ITEM)
        seen_here = torch.from_numpy(seen.holds_item_at(trie, np.arange(users)[:, None], nodes.numpy()))
        end_scores = torch.where(ends & ~seen_here, log_p[..., -1], NEVER)
        child_scores = torch.where(open_, log_p[..., :-1], NEVER).flatten(1)
        scores, chosen = child_scores.topk(min(width, child_scores.shape[1]), dim=1)
        nodes = torch.where(torch.isfinite(scores), table.flatten(1).gather(1, chosen), ROOT)
        # An item without further children ends here with certainty.
        leaf = torch.from_numpy(trie.child_count(nodes.numpy()) == 0) & torch.isfinite(scores)
        leaf_items = torch.where(leaf, torch.from_numpy(trie.item(nodes.numpy())), NO_ITEM)
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


def _child_tables(
    trie: ItemTrie, seen: ExcludedItems, nodes_UW: np.ndarray, alive_UW: np.ndarray, codes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Child node by code, int64 [U, W, codes] (-1 where there is none), and whether an unseen item lies there."""
    beams = np.flatnonzero(alive_UW)
    child_nodes, offsets = trie.children(nodes_UW.reshape(-1)[beams])
    child_beams = np.repeat(beams, np.diff(offsets))
    table = np.full((nodes_UW.size, codes), NO_NODE, dtype=np.int64)
    table[child_beams, trie.code[child_nodes]] = child_nodes
    open_ = np.zeros(table.shape, dtype=bool)
    open_[child_beams, trie.code[child_nodes]] = seen.open(trie, child_beams // nodes_UW.shape[1], child_nodes)
    shape = (*nodes_UW.shape, codes)
    return torch.from_numpy(table.reshape(shape)), torch.from_numpy(open_.reshape(shape))


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
