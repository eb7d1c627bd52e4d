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
from item_index.trie import NO_ITEM, ROOT, ItemTrie

NEVER = float("-inf")
NOTHING_CHOSEN = -1


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
    """The best items after each prompt, best first; the language model's device computes.

    Args:
        prompts: token ids per user; the next token opens the answer's semantic ID.
        excluded: item rows per user that must not be ranked (seen items).
        terminator: the token that would end the semantic ID (an item may be the beginning of another).

    Returns:
        items int32 [U, width] (-1 where fewer remain) and scores float32 [U, width], log p(item) under the constraint.
        Excluded items are passed over but keep their share of the probability, which leaves the order of the others.
    """
    trie, tokens, device = constraint.trie, constraint.tokens, language_model.device
    users, width = len(prompts), min(width, trie.items)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(prompt_lengths.max())
    input_ids = torch.zeros(users, longest, dtype=torch.int64)
    for user, prompt in enumerate(prompts):
        input_ids[user, : len(prompt)] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
    lengths = prompt_lengths.to(device)
    prompt_valid = torch.arange(longest, device=device)[None, :] < lengths[:, None]
    cache = DynamicCache(config=language_model.config)
    hidden = language_model.base_model(
        input_ids=input_ids.to(device), attention_mask=prompt_valid.long(), past_key_values=cache, use_cache=True
    ).last_hidden_state
    hidden_UWH = hidden[torch.arange(users, device=device), lengths - 1][:, None]
    head_VH = language_model.get_output_embeddings().weight
    seen = ExcludedItems.of(trie, excluded)

    # The trie and what is asked of it stay on the host: a level sends what each beam allows to the device in one array
    # and takes back which children were chosen.
    nodes_UW = np.full((users, 1), ROOT)
    alive_UW = np.ones((users, 1), dtype=bool)
    scores = torch.zeros(users, 1, device=device)
    final_scores = torch.full((users, width), NEVER, device=device)
    final_items = torch.full((users, width), NO_ITEM, device=device)
    ancestors = torch.zeros(users, 1, 0, dtype=torch.bool, device=device)
    for level, level_tokens in enumerate(tokens.code_tokens):
        # Logits of this level's codes and of the terminator; what is allowed at each beam's node is renormalised over.
        columns = torch.from_numpy(np.append(level_tokens, terminator)).to(device)
        logits = (hidden_UWH @ head_VH[columns].T).float()
        codes = len(level_tokens)
        items_UW = np.where(alive_UW, trie.item(nodes_UW), NO_ITEM)
        child_nodes_N, places_N = _children(trie, nodes_UW, alive_UW, codes)
        allowed = _allowed_codes(trie, seen, nodes_UW, items_UW, child_nodes_N, places_N, codes)
        permitted, open_ = torch.from_numpy(allowed).to(device)
        log_p = logits.masked_fill(~permitted, NEVER)
        log_p = torch.where(permitted, log_p - log_p.logsumexp(dim=-1, keepdim=True), NEVER) + scores[..., None]

        end_scores = torch.where(open_[..., -1], log_p[..., -1], NEVER)
        child_scores = torch.where(open_[..., :-1], log_p[..., :-1], NEVER).flatten(1)
        scores, chosen = child_scores.topk(min(width, child_scores.shape[1]), dim=1)
        chosen_UW = torch.where(torch.isfinite(scores), chosen, NOTHING_CHOSEN).cpu().numpy()
        found_UW = chosen_UW != NOTHING_CHOSEN
        first_places_U1 = codes * nodes_UW.shape[1] * np.arange(users)[:, None]
        children_UW = np.searchsorted(places_N, np.where(found_UW, first_places_U1 + chosen_UW, 0))
        nodes_UW = np.where(found_UW, child_nodes_N[children_UW], ROOT)
        # An item without further children ends here with certainty.
        leaf_UW = (trie.child_count(nodes_UW) == 0) & found_UW
        leaf_items = torch.from_numpy(np.where(leaf_UW, trie.item(nodes_UW), NO_ITEM)).to(device)
        leaf = leaf_items != NO_ITEM
        pool_scores = torch.cat([final_scores, end_scores, torch.where(leaf, scores, NEVER)], dim=1)
        pool_items = torch.cat([final_items, torch.from_numpy(items_UW).to(device), leaf_items], dim=1)
        final_scores, kept = pool_scores.topk(width, dim=1)
        final_items = torch.where(torch.isfinite(final_scores), pool_items.gather(1, kept), NO_ITEM)
        scores = scores.masked_fill(leaf, NEVER)
        alive_UW = found_UW & ~leaf_UW
        if not alive_UW.any():
            break

        beams = nodes_UW.shape[1]
        parent = chosen // codes
        earlier = ancestors.gather(1, parent[..., None].expand(-1, -1, ancestors.shape[2]))
        itself = torch.eye(beams, dtype=torch.bool, device=device).expand(users, -1, -1)
        ancestors = torch.cat([earlier, itself], dim=2)
        visible = torch.cat([prompt_valid[:, None].expand(-1, beams, -1), ancestors], dim=2)
        # The next beams' parents are these beams: ancestors of the level before stand under their own places.
        hidden_UWH = language_model.base_model(
            input_ids=columns[chosen % codes],
            attention_mask=visible[:, None],
            position_ids=(lengths[:, None] + level).expand(-1, beams),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
    return final_items.cpu().numpy().astype(np.int32), final_scores.cpu().numpy()


def _children(trie: ItemTrie, nodes_UW: np.ndarray, alive_UW: np.ndarray, codes: int) -> tuple[np.ndarray, np.ndarray]:
    """The children of all beams, int64 [N] nodes, and rising int64 [N] places, beam of all users x codes + code."""
    beams = np.flatnonzero(alive_UW)
    child_nodes, offsets = trie.children(nodes_UW.reshape(-1)[beams])
    return child_nodes, np.repeat(beams * codes, np.diff(offsets)) + trie.code[child_nodes]


def _allowed_codes(
    trie: ItemTrie, seen: ExcludedItems, nodes_UW: np.ndarray, items_UW: np.ndarray, child_nodes_N: np.ndarray,
    places_N: np.ndarray, codes: int,
) -> np.ndarray:  # fmt: skip
    """bool [2, U, W, codes + 1]: whether the trie has each code below a beam, and whether an unseen item lies there.

    The last column is the terminator, for the item that ends at a beam's node (-1 in `items_UW` where none does).
    """
    users, width = nodes_UW.shape
    beams_N, codes_N = np.divmod(places_N, codes)
    allowed = np.zeros((2, users * width, codes + 1), dtype=bool)
    allowed[0, beams_N, codes_N] = True
    allowed[1, beams_N, codes_N] = seen.open(trie, beams_N // width, child_nodes_N)
    allowed = allowed.reshape(2, users, width, codes + 1)
    allowed[0, ..., -1] = items_UW != NO_ITEM
    allowed[1, ..., -1] = allowed[0, ..., -1] & ~seen.holds_item_at(trie, np.arange(users)[:, None], nodes_UW)
    return allowed


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
