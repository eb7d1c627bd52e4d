"""Groups of a step in words: prompts, titles, rewards and advantages."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np

from curriculum.corpus import Corpus
from item_index.input_error import InputError
from learner.rollout_files import TrainedGroups, read_trained_groups
from rewards.chains import semantic_ids_in

HISTORY_SHOWN = 5


def rollout_report(file: Path, corpus: Corpus, *, groups: int, responses: int) -> str:
    """The first groups of a file and the best and worst responses of each, semantic IDs as titles.

    Raises InputError where the file was sampled under another index than the corpus has.
    """
    trained = read_trained_groups(file)
    if trained.batch.index_version != corpus.index.version:
        raise InputError(
            f"sampled under index {trained.batch.index_version}, and the run folder has {corpus.index.version}",
            file=file, remedy="Name the config of the run that wrote the file.",
        )  # fmt: skip
    shown = min(groups, len(trained.batch))
    head = f"step {trained.step}: {len(trained.batch)} groups, {shown} shown"
    return "\n\n".join([head, *(_group(trained, number, corpus, responses) for number in range(shown))])


def _group(trained: TrainedGroups, number: int, corpus: Corpus, responses: int) -> str:
    batch, titles = trained.batch, corpus.catalogue.titles
    starts, prompts = batch.group_starts, batch.prompts
    rows = np.arange(starts[number], starts[number + 1])
    order = rows[np.argsort(-trained.rewards[rows], kind="stable")]
    if len(order) > responses:  # both ends of the group
        order = np.concatenate([order[: responses - responses // 2], order[len(order) - responses // 2 :]])
    item_of_codes = {tuple(ids): item for item, ids in enumerate(corpus.builder.item_tokens)}
    prompt = semantic_ids_in(prompts.tokens[number].tolist(), corpus.builder.tokens)
    history = [item_of_codes[tuple(corpus.builder.tokens.item_tokens(codes))] for codes in prompt]
    lines = [
        f"group {number + 1}: {'reasoning' if prompts.reasoning[number] else 'direct'}, {len(rows)} responses, weights "
        f"of version {int(batch.weight_versions[number])}",
        f"  latest items: {'; '.join(titles[item] for item in history[-HISTORY_SHOWN:])}",
        f"  true next item: {titles[int(prompts.targets[number])]}",
    ]
    for row in order:
        text = corpus.with_titles(corpus.tokenizer.decode(batch.responses[int(row)].tolist()))
        figures = f"  reward {trained.rewards[row]:.3f}  advantage {trained.advantages[row]:+.3f}  "
        lines += textwrap.wrap(text.strip(), 110, initial_indent=figures, subsequent_indent=" " * 8)
    return "\n".join(lines)
