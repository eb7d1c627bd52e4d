"""The evaluate stage: the modes of the checkpoints on the full catalogue, beside the baselines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray
from rich.table import Table

from actors.ranking import RankingActor
from cluster.placement import placed, ray_session
from cluster.progress import console, progress_bar
from cluster.prompts import PromptSource
from cluster.rankings import direct_rankings, intervention_rankings, reasoning_rankings
from cluster.reward_pool import RewardPool
from cluster.rollout_engines import RolloutEngines
from cluster.settings import Settings
from cluster.tracking import Tracker
from curriculum.corpus import Corpus
from evaluation.baselines import rank_unseen
from evaluation.comparison import as_records, compare, comparisons_markdown
from evaluation.results import SHOWN_METRICS, SystemResult, ranking_result, results_markdown, write_rankings
from evaluation.tuned_baselines import tuned_baselines
from item_index.constraint import MODES
from item_index.ragged import RaggedArray
from learner.rollouts import RolloutPrompts


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
    chains: RaggedArray | None = None
    searches = len(checkpoints) * len(users) * ("direct" in evaluation.modes)
    if "reasoning" in evaluation.modes:
        chains_ranked_by = len(checkpoints) * evaluation.chains + sum(
            1 if name == "deleted_chains" else evaluation.chains for name in evaluation.interventions
        )
        searches += len(users) * chains_ranked_by
    index = str(index_folder.resolve())
    threads = {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(cluster.threads)}}}
    with (
        ray_session(cluster),
        placed(cluster, engines=cluster.rollout_engines, reward_workers=cluster.reward_workers) as placement,
        progress_bar("evaluate", searches) as bar,
    ):
        engines: RolloutEngines | None = None
        rewards: RewardPool | None = None
        for version, (stage, checkpoint) in enumerate(checkpoints.items()):
            model = str(checkpoint.resolve())
            ranker = RankingActor.options(num_cpus=0, num_gpus=cluster.ranking_gpus, **threads).remote(
                model, index, threads=cluster.threads
            )
            if "direct" in evaluation.modes:
                results[f"direct_{stage}"] = measured(direct_rankings(settings, direct, ranker, bar))
            if "reasoning" in evaluation.modes:
                if engines is None or rewards is None:
                    rewards = RewardPool(placement, settings, index, model)
                    engines = RolloutEngines(placement, settings, index, model)
                    engines.wait_until_started()
                else:  # one engine serves all checkpoints: its start costs more than a reload
                    engines.wait(engines.load_weights(model, version))
                reasoned = reasoning_rankings(settings, reasoning, engines, rewards, ranker, corpus, bar)
                result, chains = measured(reasoned.ranked_UK), reasoned.chains
                # A merged list may hold fewer items than asked for; a sampled answer is valid when it is an item.
                metrics = reasoned.metrics | {"list_fill": result.metrics["valid_rate"]}
                results[f"reasoning_{stage}"] = replace(result, metrics=result.metrics | metrics)
                for intervention in evaluation.interventions if version == len(checkpoints) - 1 else ():
                    changed = intervention_rankings(settings, intervention, chains, reasoning, ranker, corpus, bar)
                    results[f"reasoning_{stage}/{intervention}"] = measured(changed)
            ray.kill(ranker)

    pairs = compared_pairs(list(checkpoints), evaluation.modes, baselines) + changed_chains(list(results))
    compared = compare({name: result.measures for name, result in results.items()}, pairs, seed=settings.seed)
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


def changed_chains(systems: list[str]) -> list[tuple[str, str]]:
    """(system, against): reasoning mode after each intervention against that without, and the removal of cited items
    against that of as many others."""
    changed = [system for system in systems if "/" in system]
    pairs = [(system, system.partition("/")[0]) for system in changed]
    removals = [(system, system.replace("/cited_", "/other_")) for system in changed if "/cited_items" in system]
    return pairs + [(cited, others) for cited, others in removals if others in systems]


def baseline_rankings(settings: Settings, corpus: Corpus, prompts: RolloutPrompts) -> dict[str, np.ndarray]:
    """Ranked items of the tuned baselines for the evaluated users."""
    evaluation, histories = settings.evaluation, list(prompts.excluded)
    models = tuned_baselines(
        corpus.sequences, len(corpus.index), names=evaluation.baselines, part=evaluation.part, seed=settings.seed
    )
    return {
        name: rank_unseen(model.scores(histories), histories, evaluation.beam_width) for name, model in models.items()
    }


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
    corpus: Corpus, prompts: RolloutPrompts, results: dict[str, SystemResult], chains: RaggedArray | None, count: int
) -> str:
    """Some users' latest items, true next item, and the last checkpoint's list in each mode, with the first chain."""
    titles = corpus.catalogue.titles
    unchanged = {name: result for name, result in results.items() if name.startswith(MODES) and "/" not in name}
    shown = {name.partition("_")[0]: result for name, result in unchanged.items()}
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
            chain = chains[user * (len(chains) // len(prompts))][:-1].tolist()  # without <answer>
            lines.append(f"- a chain: {corpus.with_titles(corpus.tokenizer.decode(chain))}")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)
