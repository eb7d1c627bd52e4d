"""Ranked lists of the modes of a checkpoint for all evaluated users, by the ranking actor and the rollout engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.rollout import prompt_seeds
from cluster.placement import await_result
from cluster.probe import scored_in_order
from cluster.progress import Bar
from cluster.reward_pool import RewardPool
from cluster.rollout_engines import RolloutEngines, prompt_order
from cluster.settings import Settings
from curriculum.corpus import Corpus
from evaluation.chain_interventions import ChainIntervention, OpenedAnswers, intervene
from evaluation.metrics import pass_at_k
from evaluation.ranking import merge_chains
from item_index.ragged import RaggedArray
from learner.rollouts import RolloutBatch, RolloutPrompts
from rewards.chains import chain_metrics


@dataclass(frozen=True)
class ReasoningRankings:
    """What reasoning mode gives.

    Attributes:
        ranked_UK: int32 item rows, best first, -1 after the end of a shorter list.
        metrics: of all sampled responses.
        chains: those that were ranked by, int32 tokens up to `<answer>`, M rows for each user.
    """

    ranked_UK: np.ndarray
    metrics: dict[str, float]
    chains: RaggedArray


def direct_rankings(settings: Settings, prompts: RolloutPrompts, ranker: Any, bar: Bar) -> np.ndarray:
    """Direct mode: one beam search per user. int32 [users, K]."""
    width = settings.evaluation.beam_width
    return ranked_in_batches(settings, ranker, prompts.tokens, prompts.excluded, "direct", width, bar.advance)[0]


def reasoning_rankings(
    settings: Settings,
    prompts: RolloutPrompts,
    engines: RolloutEngines,
    rewards: RewardPool,
    ranker: Any,
    corpus: Corpus,
    bar: Bar,
) -> ReasoningRankings:
    """Reasoning mode: responses sampled by vLLM, a beam after the `<answer>` of the first M of each user, merged over
    these chains."""
    evaluation = settings.evaluation
    samples = max(evaluation.chains, evaluation.samples or 0)
    seeds = prompt_seeds(settings.seed, 0, len(prompts))
    calls = engines.generate(prompts, responses=samples, seeds=seeds, temperature=1.0)
    scores = scored_in_order(engines, rewards, calls, responses=samples)
    parts = [await_result(call.references[0], "the chains", settings.cluster.call_seconds) for call in calls]
    responses = RolloutBatch.concatenate(parts).select(prompt_order(calls)).responses
    ranked_by = np.flatnonzero(np.arange(len(responses)) % samples < evaluation.chains)
    answer_open = corpus.builder.tokens.answer_open
    chains = RaggedArray.of(
        [response[: int(np.nonzero(response == answer_open)[0][0]) + 1] for response in responses.select(ranked_by)],
        np.int32,
    )
    user_C = np.repeat(np.arange(len(prompts)), evaluation.chains)
    contexts = [np.concatenate([prompts.tokens[user], chain]) for user, chain in zip(user_C, chains, strict=True)]
    opened = OpenedAnswers(RaggedArray.of(contexts, np.int32), user_C)
    ranked_UK = merged_rankings(settings, opened, prompts.excluded, ranker, bar.advance)
    metrics = {
        "valid_rate": float(scores.valid.mean()),
        "well_formed_rate": float(scores.well_formed.mean()),
        "forced_close_rate": float(scores.forced.mean()),
        "response_tokens": float(scores.lengths.mean()),
        "mean_reward": float(np.nanmean(scores.rewards)),
    }
    figures = chain_metrics(scores.chains, minimum_think_tokens=settings.train.minimum_think_tokens)
    metrics |= {f"chains/{name}": value for name, value in figures.items()}
    metrics |= {f"pass@{k}": pass_at_k(scores.hits.reshape(-1, samples), k) for k in (1, 5, 10) if k <= samples}
    return ReasoningRankings(ranked_UK, metrics, chains)


def intervention_rankings(
    settings: Settings, intervention: ChainIntervention, chains: RaggedArray, prompts: RolloutPrompts, ranker: Any,
    corpus: Corpus, bar: Bar,
) -> np.ndarray:  # fmt: skip
    """Reasoning mode after an intervention on its chains or on the histories before them. int32 [users, K]."""
    index, builder = corpus.index, corpus.builder
    opened = intervene(
        intervention, chains, [history[-builder.history_items :] for history in prompts.excluded],
        prompt_of=lambda history: builder.prompt(history, "reasoning"), item_of_codes=index.row_of_codes.get,
        tokens=builder.tokens, seed=settings.seed,
    )  # fmt: skip
    return merged_rankings(settings, opened, prompts.excluded, ranker, bar.advance)


def merged_rankings(
    settings: Settings, opened: OpenedAnswers, excluded: RaggedArray, ranker: Any, progressed: Callable[[int], None]
) -> np.ndarray:
    """A beam for each opened answer, merged over those of a user; int32 [users, K] without the excluded items."""
    evaluation = settings.evaluation
    items_CK, scores_CK = ranked_in_batches(
        settings, ranker, opened.contexts, excluded.select(opened.user_C), "reasoning", evaluation.chain_beam_width,
        progressed,
    )  # fmt: skip
    users, width = len(excluded), evaluation.beam_width
    return merge_chains(items_CK, scores_CK, opened.user_C, users=users, width=width)[0]


def ranked_in_batches(
    settings: Settings, ranker: Any, tokens: RaggedArray, excluded: RaggedArray, mode: str, width: int,
    progressed: Callable[[int], None],
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Beam search for all rows, batch by batch, rows of similar length together."""
    order = np.argsort(tokens.lengths, kind="stable")
    items, scores = [], []
    for start in range(0, len(order), settings.evaluation.batch_users):
        rows = order[start : start + settings.evaluation.batch_users]
        part = await_result(
            ranker.rank.remote(tokens.select(rows), excluded.select(rows), mode=mode, width=width),
            "the ranking actor", settings.cluster.call_seconds,
        )  # fmt: skip
        items.append(part[0])
        scores.append(part[1])
        progressed(len(rows))
    back = np.argsort(order)
    return np.concatenate(items)[back], np.concatenate(scores)[back]
