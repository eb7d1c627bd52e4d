"""One sampling step under the item constraint: the children of trie nodes against what others do over the vocabulary.

    python -m benchmarks.trie [--items 1000000]... [--batch 64]... [--vocabulary 153000]... [--json FILE]

Catalogues of 4 x 256 codes without collisions, uniform or Zipf (each level's code k with weight 1 / (k + 1)). A batch
has a quarter of its rows at each level, at the prefixes of random items. Every subject turns the same logits, float32
[batch, vocabulary], into one token per row and its log-probability:

- unconstrained: softmax over the vocabulary, exponential noise, argmax (may name no item).
- dense mask: allowed tokens marked in a mask [batch, vocabulary], then as above. vLLM's sampler does this.
- prefix dict: a Python dict from prefix to allowed tokens, asked row by row, as a `prefix_allowed_tokens_fn` is.
- llguidance: a regular expression of all items, its bit mask per row, then as above (up to 100,000 items).
- padded CSR: log-softmax over the vocabulary, then children gathered at the width of the level's largest branch.
- ours: `ChildSampler.sample_children`, the children's logits alone.

The work that is needed: a byte of code and 4 of logits per child, and about ten operations on it, one exponential
among them; ours reads that once and keeps 16 bytes per child of the row at hand. All that reads the vocabulary reads 4
bytes x vocabulary per row.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.table import Table

from benchmarks.machine import ReportRow, write_report
from cluster.progress import console
from item_index.child_sampling import ChildSampler
from item_index.trie import ItemTrie

LEVELS, CODES = 4, 256
LARGEST_PREFIX_DICT = 1_000_000  # a dict of more prefixes does not fit the memory of a small machine
LARGEST_GUIDANCE = 100_000
CHARACTERS = "abcdw.0123456789"  # of the tokens' names, tokens themselves as in every byte-level tokenizer
SECONDS_PER_CASE, FEWEST, MOST = 1.0, 5, 300

Step = Callable[[], tuple[torch.Tensor, torch.Tensor]]


def catalogue_codes(items: int, distribution: str, seed: int = 0) -> np.ndarray:
    """int32 [items, 4]: distinct rows of codes."""
    generator = np.random.default_rng(seed)
    weights = np.ones(CODES) if distribution == "uniform" else 1.0 / np.arange(1, CODES + 1)
    keys = np.zeros(0, dtype=np.int64)
    while len(keys) < items:
        drawn = generator.choice(CODES, (LEVELS, items // 2 + 1000), p=weights / weights.sum())
        keys = np.unique(np.concatenate([keys, np.ravel_multi_index(tuple(drawn), (CODES,) * LEVELS)]))
    keys = generator.permutation(keys)[:items]
    return np.stack(np.unravel_index(keys, (CODES,) * LEVELS), axis=1).astype(np.int32)


def batch_nodes(trie: ItemTrie, batch: int, seed: int = 1) -> np.ndarray:
    """int64 [batch]: nodes on the paths to random items, a quarter of them at each level."""
    items = np.random.default_rng(seed).integers(0, trie.items, batch)
    paths = np.column_stack([np.zeros(batch, dtype=np.int64), trie.paths(items)])
    return paths[np.arange(batch), np.arange(batch) % LEVELS]


def sample_as_vllm(logits_BV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and its log-probability: softmax, exponential noise, argmax."""
    log_probabilities = logits_BV.log_softmax(dim=-1)
    noise = torch.empty_like(log_probabilities).exponential_()
    tokens = log_probabilities.exp().div_(noise).argmax(dim=-1)
    return tokens, log_probabilities.gather(1, tokens[:, None])[:, 0]


def dense_mask_step(trie: ItemTrie, logits: torch.Tensor, nodes: np.ndarray, level_tokens: list[np.ndarray]) -> Step:
    def step() -> tuple[torch.Tensor, torch.Tensor]:
        children, offsets = trie.children(nodes)
        rows = np.repeat(np.arange(len(nodes)), np.diff(offsets))
        tokens = np.stack(level_tokens)[trie.level(children) - 1, trie.code[children]]
        forbidden = torch.ones(logits.shape, dtype=torch.bool)
        forbidden[torch.from_numpy(rows), torch.from_numpy(tokens)] = False
        return sample_as_vllm(logits.masked_fill(forbidden, float("-inf")))

    return step


def prefix_dict_step(
    trie: ItemTrie, codes: np.ndarray, logits: torch.Tensor, nodes: np.ndarray, level_tokens: list[np.ndarray]
) -> Step:
    allowed: dict[tuple[int, ...], set[int]] = {}
    tokens_of_items = np.stack([level_tokens[level][codes[:, level]] for level in range(LEVELS)], axis=1).tolist()
    for row in tokens_of_items:
        for level in range(LEVELS):
            allowed.setdefault(tuple(row[:level]), set()).add(row[level])
    listed = {prefix: sorted(tokens) for prefix, tokens in allowed.items()}
    prefixes = [
        tuple(int(level_tokens[level][code]) for level, code in enumerate(trie.prefix(int(node)))) for node in nodes
    ]

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.full_like(logits, float("-inf"))
        for row, prefix in enumerate(prefixes):
            mask[row, listed[prefix]] = 0
        return sample_as_vllm(logits + mask)

    return step


def guidance_step(
    trie: ItemTrie, codes: np.ndarray, logits: torch.Tensor, nodes: np.ndarray, level_tokens: list[np.ndarray]
) -> Step:
    """Letters and numbers spell the tokens; matchers have consumed each row's prefix, as they have during generation.

    The grammar is over text, so its masks also allow the single characters that a tokenizer has: spellings of an item
    that no other part of the system would read as one.
    """
    import llguidance
    import llguidance.hf
    import llguidance.torch
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = logits.shape[1]
    names = [*CHARACTERS, *(f"w{token}." for token in range(len(CHARACTERS), vocabulary))]
    for level, tokens in enumerate(level_tokens):
        for code, token in enumerate(tokens.tolist()):
            names[token] = f"{'abcd'[level]}{code}."
    tokenizer = Tokenizer(
        models.BPE(vocab={name: token for token, name in enumerate([*names, "</s>"])}, merges=[], ignore_merges=True)
    )
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    guide = llguidance.hf.from_tokenizer(fast, n_vocab=vocabulary + 1)
    items = "|".join("".join(f"{'abcd'[level]}{code}\\." for level, code in enumerate(row)) for row in codes.tolist())
    grammar = llguidance.LLMatcher.grammar_from_regex(f"({items})")
    first = llguidance.LLMatcher(guide, grammar, limits=llguidance.LLParserLimits(initial_lexer_fuel=2**60))
    if first.get_error():
        raise RuntimeError(f"llguidance: {first.get_error()[:300]}")
    matchers = []
    for node in nodes:
        matcher = first.deep_copy()
        for level, code in enumerate(trie.prefix(int(node))):
            if not matcher.consume_token(int(level_tokens[level][code])):
                raise RuntimeError(f"llguidance refused an item's code: {matcher.get_error()[:300]}")
        matchers.append(matcher)
    bits = llguidance.torch.allocate_token_bitmask(len(nodes), vocabulary + 1)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        for row, matcher in enumerate(matchers):
            llguidance.torch.fill_next_token_bitmask(matcher, bits, row)
        masked = torch.cat([logits, logits[:, :1]], dim=1)
        llguidance.torch.apply_token_bitmask_inplace(masked, bits)
        return sample_as_vllm(masked)

    return step


def padded_csr_step(trie: ItemTrie, logits: torch.Tensor, nodes: np.ndarray, level_tokens: list[np.ndarray]) -> Step:
    child_start = torch.from_numpy(trie.child_start.astype(np.int64))
    node_token = torch.zeros(trie.nodes, dtype=torch.int64)
    for level in range(LEVELS):
        span = slice(int(trie.level_start[level + 1]), int(trie.level_start[level + 2]))
        node_token[span] = torch.from_numpy(level_tokens[level][trie.code[span]])
    groups = []
    for level in range(LEVELS):
        start, stop = int(trie.level_start[level]), int(trie.level_start[level + 1])
        width = int(np.diff(trie.child_start[start : stop + 1]).max())
        rows = torch.from_numpy(np.flatnonzero(trie.level(nodes) == level))
        groups.append((rows, torch.from_numpy(nodes)[rows], torch.arange(width)))

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        log_probabilities = logits.log_softmax(dim=-1)
        tokens, chosen_log = torch.zeros(len(nodes), dtype=torch.int64), torch.zeros(len(nodes))
        for rows, at, places in groups:
            children = child_start[at][:, None] + places
            columns = node_token[children.clamp(max=trie.nodes - 1)]
            gathered = log_probabilities[rows].gather(1, columns)
            gathered = gathered.masked_fill(children >= child_start[at + 1][:, None], float("-inf"))
            place, log_p = sample_as_vllm(gathered)
            tokens[rows] = columns.gather(1, place[:, None])[:, 0]
            chosen_log[rows] = log_p
        return tokens, chosen_log

    return step


def ours_step(trie: ItemTrie, logits: torch.Tensor, nodes: np.ndarray, level_tokens: list[np.ndarray]) -> Step:
    sampler = ChildSampler(trie, level_tokens, index_version="benchmark")
    at = torch.from_numpy(nodes)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        uniform = torch.rand(len(at), dtype=torch.float64)
        sampled = sampler.sample_children(logits, at, uniform_B=uniform)
        return sampled.tokens, sampled.log_probabilities

    return step


def measure(step: Step) -> list[float]:
    """Seconds of single calls, after two to warm up."""
    step(), step()
    seconds: list[float] = []
    while len(seconds) < FEWEST or (sum(seconds) < SECONDS_PER_CASE and len(seconds) < MOST):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return seconds


def check(name: str, trie: ItemTrie, nodes: np.ndarray, tokens: torch.Tensor, level_tokens: list[np.ndarray]) -> None:
    """A constrained subject must have sampled a child of every row's node."""
    levels = trie.level(nodes)
    codes = tokens.numpy() - np.array([table[0] for table in level_tokens])[levels]
    wrong = np.flatnonzero(trie.step(nodes, codes) < 0)
    if wrong.size:
        raise RuntimeError(f"{name}: token {int(tokens[wrong[0]])} leads to no item in {wrong.size} rows")


def build_rows(case: str, codes: np.ndarray) -> tuple[ItemTrie, list[ReportRow]]:
    """The trie; seconds of building it, its bytes per item, and the peak of memory beside the codes."""
    started = time.perf_counter()
    trie = ItemTrie.build(codes)
    seconds = time.perf_counter() - started
    tracemalloc.start()
    ItemTrie.build(codes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    values = (
        ("build time", seconds, "s"), ("size", trie.nbytes / trie.items, "bytes/item"),
        ("build peak", peak / trie.items, "bytes/item"),
    )  # fmt: skip
    return trie, [
        {"case": case, "subject": "ours", "metric": name, "value": value, "unit": unit} for name, value, unit in values
    ]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def benchmark(
    items: Annotated[list[int], typer.Option("--items", min=1000)] = [100_000, 1_000_000, 10_000_000],  # noqa: B006
    batch: Annotated[list[int], typer.Option("--batch", min=4)] = [64, 512],  # noqa: B006
    vocabulary: Annotated[
        list[int],
        typer.Option(
            "--vocabulary", min=LEVELS * CODES + len(CHARACTERS), help="1,040 is semantic-ID tokens and little else."
        ),
    ] = [153_000, LEVELS * CODES + len(CHARACTERS)],  # noqa: B006
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the numbers and the machine.")] = None,
) -> None:
    """Time one constrained sampling step."""
    rows: list[ReportRow] = []
    for count in items:
        for distribution in ("uniform", "zipf"):
            codes = catalogue_codes(count, distribution)
            catalogue = f"{count:,} items, {distribution}"
            trie, built = build_rows(catalogue, codes)
            rows += built
            console.print(f"{catalogue}: " + ", ".join(f"{r['metric']} {r['value']:.3g} {r['unit']}" for r in built))
            for words in vocabulary:
                for size in batch:
                    rows += measure_case(f"{catalogue}, batch {size}, vocabulary {words:,}", trie, codes, size, words)
    if json_file is not None:
        write_report(json_file, rows)


def measure_case(case: str, trie: ItemTrie, codes: np.ndarray, batch: int, vocabulary: int) -> list[ReportRow]:
    """All subjects on the same logits and nodes; prints their table."""
    torch.manual_seed(0)
    logits = torch.randn(batch, vocabulary)
    nodes = batch_nodes(trie, batch)
    first = vocabulary - LEVELS * CODES
    level_tokens = [first + level * CODES + np.arange(CODES) for level in range(LEVELS)]
    common: tuple[Any, ...] = (logits, nodes, level_tokens)
    subjects: dict[str, Callable[[], Step]] = {
        "unconstrained": lambda: lambda: sample_as_vllm(logits),
        "dense mask": lambda: dense_mask_step(trie, *common),
        "padded CSR": lambda: padded_csr_step(trie, *common),
        "ours": lambda: ours_step(trie, *common),
    }
    if trie.items <= LARGEST_PREFIX_DICT:
        subjects["prefix dict"] = lambda: prefix_dict_step(trie, codes, *common)
    if trie.items <= LARGEST_GUIDANCE:
        subjects["llguidance"] = lambda: guidance_step(trie, codes, *common)
    children = int(trie.child_count(nodes).sum())
    table = Table(title=f"{case} ({children:,} children)")
    for column in ("", "ms, median", "min", "max", "ours is faster by"):
        table.add_column(column, justify="right")
    seconds: dict[str, list[float]] = {}
    rows: list[ReportRow] = []
    for name in sorted(subjects, key=lambda name: name != "ours"):
        started = time.perf_counter()
        step = subjects[name]()
        prepared = time.perf_counter() - started
        tokens, _ = step()
        if name not in ("unconstrained", "llguidance"):
            check(name, trie, nodes, tokens, level_tokens)
        seconds[name] = measure(step)
        faster = median(seconds[name]) / median(seconds["ours"])
        milliseconds = [1000 * function(seconds[name]) for function in (median, min, max)]
        table.add_row(name, *(f"{value:.4g}" for value in milliseconds), f"{faster:.1f}" if name != "ours" else "")
        for statistic, value in zip(("median", "min", "max"), milliseconds, strict=True):
            rows.append({"case": case, "subject": name, "metric": f"step, {statistic}", "value": value, "unit": "ms"})
        rows.append({"case": case, "subject": name, "metric": "preparation", "value": prepared, "unit": "s"})
    per_child = median(seconds["ours"]) / children * 1e9
    rows.append({"case": case, "subject": "ours", "metric": "time per child", "value": per_child, "unit": "ns"})
    console.print(table)
    console.print(f"ours: {per_child:.1f} ns per child")
    return rows


if __name__ == "__main__":
    app()
