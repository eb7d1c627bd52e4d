"""The evaluate stage: the modes of the checkpoints on the full catalogue, beside the baselines."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from rich.table import Table

from actors.ranking import RankingActor
from actors.rollout import prompt_seeds
from cluster.placement import await_result, placed, ray_session
from cluster.probe import scored_in_order
from cluster.progress import Bar, console, progress_bar
from cluster.prompts import PromptSource
from cluster.reward_pool import RewardPool
from cluster.rollout_engines import RolloutEngines, prompt_order
from cluster.settings import Settings
from cluster.tracking import Tracker
from curriculum.corpus import Corpus
from evaluation.baselines import rank_unseen, tuned_baselines
from evaluation.metrics import pass_at_k, ranking_metrics
from evaluation.ranking import merge_chains
from item_index.constraint import MODES
from item_index.ragged import RaggedArray
from learner.rollouts import RolloutBatch, RolloutPrompts
from rewards.chains import chain_metrics

SHOWN_METRICS = ("recall@1", "recall@5", "recall@10", "recall@50", "ndcg@5", "ndcg@10", "coverage@10", "valid_rate")


@dataclass(frozen=True)
class ModeResult:
    """One row of the results: metrics, ranked items [users, K], and the chains for reasoning."""

    metrics: dict[str, float]
    ranked_UK: np.ndarray
    chains: RolloutBatch | None = None


def run_evaluate(
    settings: Settings, corpus: Corpus, index_folder: Path, checkpoints: dict[str, Path], folder: Path, tracker: Tracker
) -> dict[str, dict[str, float]]:
    """Evaluate checkpoints by stage (`sft`, `srpo`); writes `results.json`, `results.md` and `examples.md`."""
    evaluation, cluster = settings.evaluation, settings.cluster
    source = PromptSource(corpus, reasoning_budget=settings.train.reasoning_budget, exclude_seen=True)
    users = np.sort(np.random.default_rng([settings.seed, 6]).permutation(len(corpus.sequences))[: evaluation.users])
    positions = source.evaluation_positions(evaluation.part)[users]
    direct = source.prompts(positions, ["direct"] * len(positions))
    reasoning = source.prompts(positions, ["reasoning"] * len(positions))
    results: dict[str, ModeResult] = {}
    for name, ranked in baseline_rankings(settings, corpus, users, direct).items():
        results[name] = ModeResult(list_metrics(ranked, direct, len(corpus.index)), ranked)

    searches = ("direct" in evaluation.modes) + ("reasoning" in evaluation.modes) * evaluation.chains
    work = len(checkpoints) * (-(-len(users) // evaluation.batch_users)) * searches
    index = str(index_folder.resolve())
    threads = {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(cluster.threads)}}}
    with (
        ray_session(cluster),
        placed(cluster, engines=cluster.rollout_engines) as placement,
        progress_bar("evaluate", work) as bar,
    ):
        engines: RolloutEngines | None = None
        rewards: RewardPool | None = None
        for version, (stage, checkpoint) in enumerate(checkpoints.items()):
            model = str(checkpoint.resolve())
            ranker = RankingActor.options(num_cpus=0, **threads).remote(model, index, threads=cluster.threads)
            if "direct" in evaluation.modes:
                results[f"direct_{stage}"] = direct_result(settings, direct, ranker, len(corpus.index), bar)
            if "reasoning" in evaluation.modes:
                if engines is None or rewards is None:
                    rewards = RewardPool(settings, index, model)
                    engines = RolloutEngines(placement, settings, index, model)
                    engines.wait_until_started()
                else:  # one engine serves all checkpoints: its start costs more than a reload
                    engines.wait(engines.load_weights(model, version))
                results[f"reasoning_{stage}"] = reasoning_result(
                    settings, reasoning, engines, rewards, ranker, corpus, bar
                )
            ray.kill(ranker)

    metrics = {name: result.metrics for name, result in results.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(metrics, indent=2))
    console.print(results_table(metrics, len(users), evaluation.part))
    (folder / "results.md").write_text(results_markdown(metrics))
    examples = example_recommendations(corpus, reasoning, results, evaluation.examples)
    (folder / "examples.md").write_text(examples)
    console.print(examples, markup=False, highlight=False)
    for name, values in metrics.items():
        tracker.metrics({f"{name}/{metric}": value for metric, value in values.items()})
    for file in ("results.json", "results.md", "examples.md"):
        tracker.file(folder / file)
    return metrics


def baseline_rankings(
    settings: Settings, corpus: Corpus, users: np.ndarray, prompts: RolloutPrompts
) -> dict[str, np.ndarray]:
    """Ranked items of the tuned baselines for the evaluated users."""
    seen = list(prompts.excluded)
    models = tuned_baselines(corpus.sequences, len(corpus.index), part=settings.evaluation.part)
    return {
        name: rank_unseen(model.scores(seen), seen, settings.evaluation.beam_width) for name, model in models.items()
    }


def list_metrics(ranked_UK: np.ndarray, prompts: RolloutPrompts, items: int) -> dict[str, float]:
    """Ranking metrics, and the share of the list's places that hold an item of the catalogue which was not seen."""
    expected = np.minimum(ranked_UK.shape[1], items - prompts.excluded.lengths)
    fresh = [np.setdiff1d(ranked[ranked >= 0], seen) for ranked, seen in zip(ranked_UK, prompts.excluded, strict=True)]
    valid = float(sum(len(row) for row in fresh) / expected.sum())
    return {**ranking_metrics(ranked_UK, prompts.targets, items=items), "valid_rate": valid}


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
        progressed(1)
    back = np.argsort(order)
    return np.concatenate(items)[back], np.concatenate(scores)[back]


def direct_result(settings: Settings, prompts: RolloutPrompts, ranker: Any, items: int, bar: Bar) -> ModeResult:
    """Direct mode: one beam search per user."""
    ranked, _ = ranked_in_batches(
        settings, ranker, prompts.tokens, prompts.excluded, "direct", settings.evaluation.beam_width, bar.advance
    )
    return ModeResult(list_metrics(ranked, prompts, items), ranked)


def reasoning_result(
    settings: Settings,
    prompts: RolloutPrompts,
    engines: RolloutEngines,
    rewards: RewardPool,
    ranker: Any,
    corpus: Corpus,
    bar: Bar,
) -> ModeResult:
    """Reasoning mode: M chains per user by vLLM, a beam after each chain's `<answer>`, merged over the chains."""
    evaluation, chains = settings.evaluation, settings.evaluation.chains
    seeds = prompt_seeds(settings.seed, 0, len(prompts))
    calls = engines.generate(prompts, responses=chains, seeds=seeds, temperature=1.0)
    scores = scored_in_order(engines, rewards, calls, responses=chains)
    seconds = settings.cluster.call_seconds
    parts = [await_result(call.references[0], "the chains", seconds) for call in calls]
    batch = RolloutBatch.concatenate(parts).select(prompt_order(calls))
    opened = []
    answer_open = corpus.builder.tokens.answer_open
    for row, response in enumerate(batch.responses):
        end = int(np.nonzero(response == answer_open)[0][0]) + 1
        opened.append(np.concatenate([prompts.tokens[row // chains], response[:end]]))
    user_of_chain = np.repeat(np.arange(len(prompts)), chains)
    items_CK, scores_CK = ranked_in_batches(
        settings, ranker, RaggedArray.of(opened, np.int32), prompts.excluded.select(user_of_chain), "reasoning",
        evaluation.chain_beam_width, bar.advance,
    )  # fmt: skip
    ranked, _ = merge_chains(items_CK, scores_CK, user_of_chain, users=len(prompts), width=evaluation.beam_width)
    metrics = list_metrics(ranked, prompts, len(corpus.index))
    # A merged list may hold fewer items than asked for; what counts here is that every sampled answer is an item.
    metrics["list_fill"] = metrics["valid_rate"]
    metrics["valid_rate"] = float(scores.valid.mean())
    metrics |= {
        "well_formed_rate": float(scores.well_formed.mean()),
        "forced_close_rate": float(scores.forced.mean()),
        "response_tokens": float(scores.lengths.mean()),
        "mean_reward": float(np.nanmean(scores.rewards)),
    }
    figures = chain_metrics(scores.chains, minimum_think_tokens=settings.train.minimum_think_tokens)
    metrics |= {f"chains/{name}": value for name, value in figures.items()}
    metrics |= {f"pass@{k}": pass_at_k(scores.hits.reshape(-1, chains), k) for k in (1, 5, 10) if k <= chains}
    return ModeResult(metrics, ranked, batch)


def results_table(metrics: dict[str, dict[str, float]], users: int, part: str) -> Table:
    """The one table of the run."""
    table = Table(title=f"{users} users, {part} targets, full catalogue, the user's earlier items masked")
    table.add_column("")
    for name in SHOWN_METRICS:
        table.add_column(name.replace("@", "\n@").replace("_", "\n"), justify="right")
    for mode, values in metrics.items():
        table.add_row(mode, *(f"{values[name]:.4f}" if name in values else "" for name in SHOWN_METRICS))
    return table


def results_markdown(metrics: dict[str, dict[str, float]]) -> str:
    """The same table in Markdown."""
    lines = ["| | " + " | ".join(SHOWN_METRICS) + " |", "|---" * (len(SHOWN_METRICS) + 1) + "|"]
    for mode, values in metrics.items():
        lines.append(
            f"| {mode} | " + " | ".join(f"{values.get(name, float('nan')):.4f}" for name in SHOWN_METRICS) + " |"
        )
    return "\n".join(lines) + "\n"


def example_recommendations(corpus: Corpus, prompts: RolloutPrompts, results: dict[str, ModeResult], count: int) -> str:
    """Some users' latest items, true next item, and the last checkpoint's list in each mode, with the first chain."""
    titles = corpus.catalogue.titles
    shown = {name.partition("_")[0]: result for name, result in results.items() if name.startswith(MODES)}
    chains = shown["reasoning"].chains if "reasoning" in shown else None
    parts = []
    for user in range(min(count, len(prompts))):
        lines = [
            f"### Recommendation {user + 1}\n",
            f"- latest items: {'; '.join(titles[item] for item in prompts.excluded[user][-5:])}",
            f"- true next item: {titles[int(prompts.targets[user])]}",
        ]
        for mode, result in shown.items():
            lines.append(f"- {mode}: {'; '.join(titles[item] for item in result.ranked_UK[user, :5] if item >= 0)}")
        if chains is not None:
            chain = chains.responses_of(user)[0]
            text = chain[: int(np.nonzero(chain == corpus.builder.tokens.answer_open)[0][0])].tolist()
            lines.append(f"- a chain: {corpus.with_titles(corpus.tokenizer.decode(text))}")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)
