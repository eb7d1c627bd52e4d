"""The loop over rows and children of `ChildSampler.sample_children` on the CPU, compiled.

A step of a batch touches a few thousand children. Some thirty torch operations on arrays of that size spend most of
their time in dispatch and temporary arrays, several times what this loop takes.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from item_index.trie import NO_NODE

EVERY_ROW_SAMPLED = -1


@numba.njit(nogil=True, cache=True)
def sample_rows(
    child_start, code, first_rank, items_below, level_start, token_base, token_table, logits_BV, nodes_B, uniform_B,
    temperature, terminator, excluded_keys, excluded_stride, excluded_rows_B, child_scratch, running_scratch, child_B,
    token_B, log_probability_B,
):  # fmt: skip
    """Fill `child_B`, `token_B` and `log_probability_B`; returns the first row where nothing may follow, or -1.

    Args:
        child_start, code, first_rank, items_below: arrays of the trie.
        level_start: int64, first nodes of the trie's levels from 1 on.
        token_base: int64 [depth], added to a code to give its token, or its place in `token_table`.
        token_table: int64, tokens by place; empty where the base gives the token itself.
        terminator: token, or -1 where there is none.
        excluded_keys, excluded_stride: as in `ExcludedItems`.
        excluded_rows_B: int64, the row of the excluded items that each row has.
        child_scratch, running_scratch: int64 and float64 [largest fan-out + 1].
    """
    for row in range(len(nodes_B)):
        node = nodes_B[row]
        first, stop = child_start[node], child_start[node + 1]
        level = np.searchsorted(level_start, node, side="right")
        base = token_base[level] if level < len(token_base) else 0
        # The row's excluded items at or below the node: children come in the order of ranks, so one pass counts them.
        key = excluded_rows_B[row] * excluded_stride
        place = np.searchsorted(excluded_keys, key + first_rank[node]) if len(excluded_keys) else 0
        ends_here = first == stop or first_rank[first] != first_rank[node]
        if ends_here and place < len(excluded_keys) and excluded_keys[place] == key + first_rank[node]:
            ends_here = False
            place += 1

        found, largest = 0, -math.inf
        for child in range(first, stop):
            if place < len(excluded_keys):
                before = place
                end = key + first_rank[child] + items_below[child]
                while place < len(excluded_keys) and excluded_keys[place] < end:
                    place += 1
                if place - before == items_below[child]:
                    continue
            token = base + code[child]
            if len(token_table):
                token = token_table[token]
            value = np.float64(logits_BV[row, token]) / temperature
            child_scratch[found], running_scratch[found] = child, value
            largest = max(largest, value)
            found += 1
        if terminator >= 0 and ends_here:
            value = np.float64(logits_BV[row, terminator]) / temperature
            child_scratch[found], running_scratch[found] = NO_NODE, value
            largest = max(largest, value)
            found += 1
        if found == 0:
            return row

        mass = 0.0
        for position in range(found):
            mass += math.exp(running_scratch[position] - largest)
            running_scratch[position] = mass
        chosen = min(np.searchsorted(running_scratch[:found], uniform_B[row] * mass, side="right"), found - 1)
        child = child_scratch[chosen]
        token = terminator
        if child != NO_NODE:
            token = base + code[child]
            if len(token_table):
                token = token_table[token]
        child_B[row], token_B[row] = child, token
        log_probability_B[row] = np.float64(logits_BV[row, token]) / temperature - largest - math.log(mass)
    return EVERY_ROW_SAMPLED
