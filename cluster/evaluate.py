"""The evaluate stage: the modes of the checkpoints on the full catalogue, beside the baselines."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from evaluation.baselines import rank_unseen
from evaluation.comparison import as_records, compare, comparisons_markdown
from evaluation.metrics import pass_at_k
from evaluation.ranking import merge_chains
from evaluation.results import SHOWN_METRICS, SystemResult, ranking_result, results_markdown, write_rankings
from evaluation.tuned_baselines import tuned_baselines
from item_index.constraint import MODES
from item_index.ragged import RaggedArray
from learner.rollouts import RolloutBatch, RolloutPrompts
from rewards.chains import chain_metrics


def run_evaluate(
    settings: Settings, corpus: Corpus, index_folder: Path, checkpoints: dict[str, Path], folder: Path, tracker: Tracker
) -> dict[str, dict[str, float]]:
    """Evaluate checkpoints by stage (`sft`, `srpo`) beside the baselines.

    Writes `results.json`, `comparisons.json`, both as tables in `results.md`, `rankings.parquet` and `examples.md`.
    """
    evaluation, cluster = settings.evaluation, settings.cluster
    source = PromptSource(corpus, reasoning_budget=settings.train.reasoning_budget, exclude_seen=True)
    users = np.sort(np.random.default_rng([settings.seed, 6]).permutation(len(corpus.sequences))[: evaluation.users])
    positions = source.evaluation_positions(evaluation.part)[users]
    direct = source.prompts(positions, ["direct"] * len(positions))
    reasoning = source.prompts(positions, ["reasoning"] * len(positions))
    interactions_I = corpus.sequences.train_matrix(len(corpus.index)).sum(axis=0)

    def measured(ranked_UK: np.ndarray) -> SystemResult:
        return ranking_result(
            ranked_UK, direct.targets, direct.excluded, interactions_I, cold_share=evaluation.cold_share
        )

    results = {name: measured(ranked) for name, ranked in baseline_rankings(settings, corpus, direct).items()}
    baselines = list(results)
    chains: RolloutBatch | None = None
    searches = ("direct" in evaluation.modes) + ("reasoning" in evaluation.modes) * evaluation.chains
    work = len(checkpoints) * (-(-len(users) // evaluation.batch_users)) * searches
    index = str(index_folder.resolve())
    threads = {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(cluster.threads)}}}
    with (
        ray_session(cluster),
        placed(cluster, engines=cluster.rollout_engines, reward_workers=cluster.reward_workers) as placement,
        progress_bar("evaluate", work) as bar,
    ):
        engines: RolloutEngines | None = None
        rewards: RewardPool | None = None
        for version, (stage, checkpoint) in enumerate(checkpoints.items()):
            model = str(checkpoint.resolve())
            ranker = RankingActor.options(num_cpus=0, **threads).remote(model, index, threads=cluster.threads)
            if "direct" in evaluation.modes:
                results[f"direct_{stage}"] = measured(direct_rankings(settings, direct, ranker, bar))
            if "reasoning" in evaluation.modes:
                if engines is None or rewards is None:
                    rewards = RewardPool(placement, settings, index, model)
                    engines = RolloutEngines(placement, settings, index, model)
                    engines.wait_until_started()
                else:  # one engine serves all checkpoints: its start costs more than a reload
                    engines.wait(engines.load_weights(model, version))
                ranked, metrics, chains = reasoning_rankings(settings, reasoning, engines, rewards, ranker, corpus, bar)
                result = measured(ranked)
                # A merged list may hold fewer items than asked for; a sampled answer is valid when it is an item.
                metrics["list_fill"] = result.metrics["valid_rate"]
                results[f"reasoning_{stage}"] = replace(result, metrics=result.metrics | metrics)
            ray.kill(ranker)

    compared = compare(
        {name: result.measures for name, result in results.items()},
        compared_pairs(list(checkpoints), evaluation.modes, baselines), seed=settings.seed,
    )  # fmt: skip
    table = {name: result.metrics for name, result in results.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(table, indent=2))
    (folder / "comparisons.json").write_text(json.dumps(as_records(compared), indent=2))
    (folder / "results.md").write_text(f"{results_markdown(table)}\n{comparisons_markdown(compared)}")
    write_rankings(
        folder / "rankings.parquet", {name: result.ranked_UK for name, result in results.items()}, direct.targets,
        [corpus.sequences.user_ids[user] for user in users], corpus.catalogue.item_ids,
    )  # fmt: skip
    console.print(results_table(table, len(users), evaluation.part))
    examples = example_recommendations(corpus, reasoning, results, chains, evaluation.examples)
    (folder / "examples.md").write_text(examples)
    console.print(examples, markup=False, highlight=False)
    for name, values in table.items():
        tracker.metrics({f"{name}/{metric}": value for metric, value in values.items()})
    for file in ("results.json", "comparisons.json", "results.md", "rankings.parquet", "examples.md"):
        tracker.file(folder / file)
    return table


def compared_pairs(stages: list[str], modes: Sequence[str], baselines: list[str]) -> list[tuple[str, str]]:
    """(system, against): each mode of the last checkpoint against those before it and against every baseline."""
    *earlier, last = stages
    pairs = []
    for mode in modes:
        pairs += [(f"{mode}_{last}", against) for against in (*(f"{mode}_{stage}" for stage in earlier), *baselines)]
    return pairs


def baseline_rankings(settings: Settings, corpus: Corpus, prompts: RolloutPrompts) -> dict[str, np.ndarray]:
    """Ranked items of the tuned baselines for the evaluated users."""
    evaluation, histories = settings.evaluation, list(prompts.excluded)
    models = tuned_baselines(
        corpus.sequences, len(corpus.index), names=evaluation.baselines, part=evaluation.part, seed=settings.seed
    )
    return {
        name: rank_unseen(model.scores(histories), histories, evaluation.beam_width) for name, model in models.items()
    }


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


def direct_rankings(settings: Settings, prompts: RolloutPrompts, ranker: Any, bar: Bar) -> np.ndarray:
    """Direct mode: one beam search per user."""
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
) -> tuple[np.ndarray, dict[str, float], RolloutBatch]:
    """Reasoning mode: M chains per user by vLLM, a beam after each chain's `<answer>`, merged over the chains.

    Ranked items [users, K], metrics of the sampled responses, and these.
    """
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
    metrics = {
        "valid_rate": float(scores.valid.mean()),
        "well_formed_rate": float(scores.well_formed.mean()),
        "forced_close_rate": float(scores.forced.mean()),
        "response_tokens": float(scores.lengths.mean()),
        "mean_reward": float(np.nanmean(scores.rewards)),
    }
    figures = chain_metrics(scores.chains, minimum_think_tokens=settings.train.minimum_think_tokens)
    metrics |= {f"chains/{name}": value for name, value in figures.items()}
    metrics |= {f"pass@{k}": pass_at_k(scores.hits.reshape(-1, chains), k) for k in (1, 5, 10) if k <= chains}
    return ranked, metrics, batch


def results_table(metrics: dict[str, dict[str, float]], users: int, part: str) -> Table:
    """The one table of the run."""
    table = Table(title=f"{users} users, {part} targets, full catalogue, the user's earlier items masked")
    table.add_column("")
    for name in SHOWN_METRICS:
        table.add_column(name.replace("@", "\n@").replace("_", "\n"), justify="right")
    for mode, values in metrics.items():
        table.add_row(mode, *(f"{values[name]:.4f}" if name in values else "" for name in SHOWN_METRICS))
    return table


def example_recommendations(
    corpus: Corpus, prompts: RolloutPrompts, results: dict[str, SystemResult], chains: RolloutBatch | None, count: int
) -> str:
    """Some users' latest items, true next item, and the last checkpoint's list in each mode, with the first chain."""
    titles = corpus.catalogue.titles
    shown = {name.partition("_")[0]: result for name, result in results.items() if name.startswith(MODES)}
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
