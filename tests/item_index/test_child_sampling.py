"""Sampling among the trie's children: exact probabilities by integrating over the randomness, and the edge cases."""

import numpy as np
import pytest
import torch
from devices import CUDA
from hypothesis import given
from hypothesis import strategies as st

from item_index.child_sampling import ChildSampler, NothingAllowed
from item_index.exclusion import ExcludedItems
from item_index.trie import NO_NODE, ItemTrie

VOCABULARY = 60
TERMINATOR = 59
ROWS = st.sets(st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple), min_size=1, max_size=30).map(sorted)


def build(rows):
    depth = max(len(row) for row in rows)
    codes = np.array([[*row, *[-1] * (depth - len(row))] for row in rows])
    return ItemTrie.build(codes, np.array([len(row) for row in rows]))


def tokens_of_codes(generator, *, in_order):
    """Tokens of 4 levels of 6 codes: consecutive within a level, or in any order."""
    tokens = np.arange(10, 34) if in_order else generator.permutation(50)[:24]
    return list(tokens.reshape(4, 6))


def expected_distribution(rows, prefix, excluded, logits, code_tokens, *, terminator, temperature):
    """{token: probability} by enumeration."""
    allowed = []
    open_items = [row for row in rows if rows.index(row) not in excluded and row[: len(prefix)] == prefix]
    for code in sorted({row[len(prefix)] for row in open_items if len(row) > len(prefix)}):
        allowed.append(int(code_tokens[len(prefix)][code]))
    if terminator and prefix in open_items:
        allowed.append(TERMINATOR)
    weights = np.exp(logits[allowed].astype(np.float64) / temperature)
    return dict(zip(allowed, weights / weights.sum(), strict=True))


# The compiled loop and the torch operations are two implementations of one formula; only the latter run on a GPU.
all_implementations = pytest.mark.parametrize("device", ["compiled", "cpu", CUDA])


def sampler_on(device, trie, code_tokens, index_version="v1"):
    """The sampler of an implementation, and the torch device that its arguments have to be on."""
    compiled, device = device == "compiled", "cpu" if device == "compiled" else device
    return ChildSampler(trie, code_tokens, index_version=index_version, compiled=compiled, device=device), device


@all_implementations
@given(ROWS, st.integers(0, 2**32 - 1), st.booleans(), st.booleans(), st.sampled_from([1.0, 0.5]))
def test_the_shares_of_the_randomness_are_the_probabilities(device, rows, seed, in_order, terminator, temperature):
    """A fine grid of uniform values falls on each token as often as its probability says."""
    generator = np.random.default_rng(seed)
    trie = build(rows)
    code_tokens = tokens_of_codes(generator, in_order=in_order)
    sampler, place = sampler_on(device, trie, code_tokens)
    prefix = generator.choice(len(rows))
    prefix = rows[prefix][: generator.integers(0, len(rows[prefix]) + 1)]
    excluded = generator.permutation(len(rows))[: generator.integers(0, len(rows))].tolist()
    logits = generator.normal(size=VOCABULARY).astype(np.float32) * 3
    expected = expected_distribution(
        rows, prefix, excluded, logits, code_tokens, terminator=terminator, temperature=temperature
    )
    grid = 500
    nodes = trie.walk(np.array([prefix], dtype=np.int64).reshape(1, len(prefix)))

    def sample():
        return sampler.sample_children(
            torch.from_numpy(logits).to(place).expand(grid, -1).contiguous(),
            torch.from_numpy(np.repeat(nodes, grid)).to(place),
            uniform_B=(torch.arange(grid, dtype=torch.float64, device=place) + 0.5) / grid,
            temperature=temperature,
            terminator=TERMINATOR if terminator else None,
            excluded=ExcludedItems.of(trie, [excluded] * grid),
        )

    if not expected:
        with pytest.raises(NothingAllowed, match="index version v1"):
            sample()
        return
    sampled = sample()
    tokens, counts = np.unique(sampled.tokens.cpu().numpy(), return_counts=True)
    assert set(tokens.tolist()) <= set(expected)
    for token, probability in expected.items():
        count = counts[tokens == token].sum()
        assert abs(count - grid * probability) <= 1 + 1e-6 * grid, (token, count, grid * probability)
    for token, log_probability, child in zip(
        sampled.tokens.tolist(), sampled.log_probabilities.tolist(), sampled.nodes.tolist(), strict=True
    ):
        assert abs(np.exp(log_probability) - expected[token]) < 1e-5
        if token == TERMINATOR:
            assert child == NO_NODE
        else:
            code = int(np.flatnonzero(code_tokens[len(prefix)] == token)[0])
            assert trie.prefix(child) == (*prefix, code)


@all_implementations
@given(ROWS, st.integers(0, 2**32 - 1))
def test_a_batch_of_different_nodes_is_each_row_by_itself(device, rows, seed):
    generator = np.random.default_rng(seed)
    trie = build([(*row, 0) for row in rows])  # no item begins another, and inner nodes all go on
    inner = np.flatnonzero(trie.child_count(np.arange(trie.nodes)) > 0)
    code_tokens = [*tokens_of_codes(generator, in_order=True), np.arange(34, 40)]
    sampler, place = sampler_on(device, trie, code_tokens)
    nodes = torch.from_numpy(generator.choice(inner, size=20)).to(place)
    # Logits whose scales differ by orders of magnitude between rows must not disturb one another.
    scales = 10.0 ** generator.integers(-2, 3, (20, 1))
    logits = torch.from_numpy(generator.normal(size=(20, VOCABULARY)) * scales).to(place)
    uniform = torch.from_numpy(generator.random(20)).to(place)
    together = sampler.sample_children(logits, nodes, uniform_B=uniform)
    for row in range(20):
        alone = sampler.sample_children(logits[row : row + 1], nodes[row : row + 1], uniform_B=uniform[row : row + 1])
        assert alone.tokens[0] == together.tokens[row]
        assert alone.nodes[0] == together.nodes[row]
        torch.testing.assert_close(alone.log_probabilities[0], together.log_probabilities[row])


@given(ROWS, st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_the_compiled_loop_samples_what_the_torch_operations_sample(rows, seed, in_order, dtype):
    """Rows of one batch at different nodes with different excluded items."""
    generator = np.random.default_rng(seed)
    trie = build(rows)
    code_tokens = tokens_of_codes(generator, in_order=in_order)
    excluded = ExcludedItems.of(
        trie, [generator.permutation(len(rows))[: generator.integers(0, len(rows))].tolist() for _ in range(20)]
    )
    nodes = generator.integers(0, trie.nodes, 20)
    open_rows = excluded.open(trie, np.arange(20), nodes)
    if not open_rows.all():  # such a row is an error, which other tests are about
        nodes[~open_rows] = 0
    arguments = {
        "logits_BV": torch.from_numpy(generator.normal(size=(20, VOCABULARY)) * 3).to(dtype),
        "nodes_B": torch.from_numpy(nodes), "uniform_B": torch.from_numpy(generator.random(20)),
        "temperature": 0.7, "terminator": TERMINATOR, "excluded": excluded,
    }  # fmt: skip
    by_loop, by_operations = (
        ChildSampler(trie, code_tokens, index_version="v1", compiled=compiled).sample_children(**arguments)
        for compiled in (True, False)
    )
    assert by_loop.nodes.tolist() == by_operations.nodes.tolist()
    assert by_loop.tokens.tolist() == by_operations.tokens.tolist()
    torch.testing.assert_close(by_loop.log_probabilities, by_operations.log_probabilities)


def test_the_compiled_loop_is_refused_elsewhere_than_on_the_cpu():
    with pytest.raises(ValueError, match="runs on the CPU, not on meta"):
        ChildSampler(build([(0,)]), [np.arange(5)], index_version="v1", device="meta", compiled=True)


@pytest.mark.parametrize(
    ("nodes", "columns", "message"),
    [([NO_NODE], 10, r"0\.\.2, got -1\.\.-1"), ([3], 10, r"0\.\.2, got 3"), ([0], 9, r"more than 9\], got \[1, 9\]")],
)
def test_what_lies_outside_of_the_arrays_is_refused(nodes, columns, message):
    sampler = ChildSampler(build([(0, 1)]), [np.arange(5), np.arange(5, 10)], index_version="v1")
    with pytest.raises((ValueError, IndexError), match=message):
        sampler.sample_children(
            torch.zeros(1, columns), torch.tensor(nodes), uniform_B=torch.zeros(1, dtype=torch.float64)
        )


def test_whole_items_are_drawn_as_enumeration_says():
    """20,000 items, code by code from the root to the end, against the exact distribution (chi-square)."""
    from scipy.stats import chisquare

    generator = np.random.default_rng(5)
    rows = sorted({tuple(row) for row in generator.integers(0, 4, (40, 3)).tolist()} | {(1,), (1, 2)})
    trie = build(rows)
    code_tokens = [np.arange(10, 16), np.arange(20, 26), np.arange(30, 36)]
    sampler = ChildSampler(trie, code_tokens, index_version="v1")
    level_logits = torch.from_numpy(generator.normal(size=(4, VOCABULARY)).astype(np.float32))
    excluded_items = [0, 7, rows.index((1,))]

    draws = 20_000
    nodes, items = np.zeros(draws, dtype=np.int64), np.full(draws, -1)
    uniform = torch.Generator().manual_seed(3)
    going = np.arange(draws)
    for level in range(4):
        sampled = sampler.sample_children(
            level_logits[level].expand(len(going), -1).contiguous(), torch.from_numpy(nodes[going]),
            uniform_B=torch.rand(len(going), dtype=torch.float64, generator=uniform), terminator=TERMINATOR,
            excluded=ExcludedItems.of(trie, [excluded_items] * len(going)),
        )  # fmt: skip
        ended = sampled.nodes.numpy() == NO_NODE
        items[going[ended]] = trie.item(nodes[going[ended]])
        nodes[going] = np.where(ended, nodes[going], sampled.nodes.numpy())
        going = going[~ended]
        if not going.size:
            break

    probabilities = np.zeros(len(rows))

    def descend(prefix, probability):
        distribution = expected_distribution(
            rows, prefix, excluded_items, level_logits[len(prefix)].numpy(), [*code_tokens, None], terminator=True,
            temperature=1.0,
        )  # fmt: skip
        for token, share in distribution.items():
            if token == TERMINATOR:
                probabilities[rows.index(prefix)] = probability * share
            else:
                descend((*prefix, int(np.flatnonzero(code_tokens[len(prefix)] == token)[0])), probability * share)

    descend((), 1.0)
    assert probabilities.sum() == pytest.approx(1.0)
    counts = np.bincount(items, minlength=len(rows))
    assert (counts[excluded_items] == 0).all()
    kept = probabilities > 0
    assert chisquare(counts[kept], probabilities[kept] * draws).pvalue > 0.001


@all_implementations
def test_an_empty_allowed_set_names_the_prefix_and_the_version(device):
    trie = build([(0, 1), (0, 2), (3, 0)])
    sampler, place = sampler_on(device, trie, [np.arange(5), np.arange(5, 10)], index_version="4f1c")
    with pytest.raises(NothingAllowed, match=r"row 1: nothing may follow the codes \[0\] in index version 4f1c"):
        sampler.sample_children(
            torch.zeros(2, 10, device=place), torch.from_numpy(trie.walk(np.array([[3], [0]]))).to(place),
            uniform_B=torch.zeros(2, dtype=torch.float64, device=place),
            excluded=ExcludedItems.of(trie, [None, [0, 1]]),
        )  # fmt: skip
