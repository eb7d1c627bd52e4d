"""The reward worker on responses drawn at random under the constraint: the figures of chains beside the rewards."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.reward import RewardWorker
from cluster.train import rollout_metrics
from item_index.ragged import RaggedArray
from learner.rollouts import RolloutBatch
from rewards.chains import CHAIN, chain_metrics


@pytest.fixture(scope="module")
def worker(tiny):
    return RewardWorker(str(tiny.index_folder), str(tiny.checkpoint))


def scripted(tiny, prompts, responses):
    """One response to each prompt, given as tokens."""
    return RolloutBatch(
        prompts=prompts,
        group_sizes=np.full(len(prompts), len(responses) // len(prompts)),
        responses=RaggedArray.of(responses, np.int32),
        log_probabilities=RaggedArray.of([np.zeros(len(tokens)) for tokens in responses], np.float32),
        weight_versions=np.zeros(len(prompts), dtype=np.int64),
        index_version=tiny.index.version,
    )


def test_chains_are_read_against_the_history_that_the_prompt_shows(tiny, worker):
    think = "Evidence: mostly drama. Preference: steady drama. Intent: more drama. Recommendation: a drama item."
    prompts = tiny.prompts(["reasoning", "direct", "reasoning"], budget=400)
    # The tiny prompts show items 0 to 3, 3 to 6 and 6 to 9; the targets are 4, 7 and 10.
    rewriting = "Rewritten history: " + "".join(tiny.index.text(item) for item in (1, 3, 12))
    full = tiny.builder.reasoning_response(think, rewriting, 4)
    collapsed = tiny.builder.reasoning_response("", f"{tiny.index.text(6)}{tiny.index.text(9)}", 10)
    scores = worker.score(scripted(tiny, prompts, [full, tiny.builder.direct_response(7), collapsed]))
    assert scores.chains.dtype == CHAIN
    assert scores.chains.shape == scores.rewards.shape == (3,)
    think_tokens = len(tiny.tokenizer(think, add_special_tokens=False)["input_ids"])
    assert scores.chains[0].item() == (think_tokens, 4, True, 3, 1)  # item 12 is not in the history
    assert scores.chains[1].item() == (0, 0, False, 0, 0)
    assert scores.chains[2].item() == (0, 0, False, 2, 0)
    assert scores.well_formed.tolist() == [True, True, False]

    metrics = rollout_metrics([(prompts.reasoning, scores)], minimum_think_tokens=8)
    assert metrics["chains/empty_share"] == 0.5  # the direct response is no chain
    assert metrics["chains/foreign_share"] == pytest.approx(1 / 5)
    assert metrics["chains/think_tokens"] == think_tokens / 2


SECOND = 1 / np.log2(3)


# After item 3 alone, item 5 comes first and item 4 second; where a user has one of them, the other comes first.
@pytest.mark.parametrize(
    ("usual_users", "gain_of_4"), [(0, SECOND), (4, SECOND / ((2 + SECOND**2) / (2 + SECOND))), (2, SECOND / SECOND)]
)
def test_the_collaborative_reward_is_fitted_to_the_train_parts_of_the_corpus(tiny, tmp_path, usual_users, gain_of_4):
    sequences = [[3, 4, 9, 9], [3, 5, 9, 9], [3, 5, 8, 8], [3, 8, 8]]  # the last two are validation and test
    lists = pa.array(sequences, pa.list_(pa.int64()))
    table = {"user_id": ["u", "v", "w", "x"], "items": lists, "timestamps": lists}
    pq.write_table(pa.table(table), tmp_path / "sequences.parquet")
    made = RewardWorker(
        str(tiny.index_folder), str(tiny.checkpoint), terms=[{"reward": "collaborative"}],
        collaborative={"folder": str(tmp_path), "decay": 1.0, "usual_users": usual_users},
    )  # fmt: skip
    prompts = tiny.prompts(["direct", "direct"])  # show items 0 to 3 and 3 to 6
    scores = made.score(scripted(tiny, prompts, [tiny.builder.direct_response(item) for item in (5, 4, 9, 7)]))
    # Cosines of item 3 to item 5, 2 / sqrt(4 * 2), and to item 4, 1 / sqrt(4); to item 9 there is none.
    assert scores.rewards[:3] == pytest.approx([1, gain_of_4, 0])


def test_several_terms_have_a_mean_each(tiny):
    terms = [{"reward": "residual_sensitive"}, {"reward": "exact_match", "weight": 3.0}]
    made = RewardWorker(str(tiny.index_folder), str(tiny.checkpoint), terms=terms)
    prompts = tiny.prompts(["direct"])  # the true item is 4
    scores = made.score(scripted(tiny, prompts, [tiny.builder.direct_response(item) for item in (4, 5, 9, 4)]))
    metrics = rollout_metrics([(prompts.reasoning, scores)], minimum_think_tokens=8, terms=["residual", "hits"])
    assert metrics["rewards/hits"] == 0.5
    assert metrics["reward"] == pytest.approx(metrics["rewards/residual"] + 3 * 0.5)


def test_a_term_counts_in_its_modes_alone(tiny):
    terms = [
        {"reward": "residual_sensitive", "modes": ["reasoning"]},
        {"reward": "exact_match", "weight": 3.0, "modes": ["direct"]},
        {"reward": "exact_match", "weight": 5.0, "name": "both"},
    ]
    prompts = tiny.prompts(["direct", "reasoning"])
    batch = tiny.random_rollouts(prompts, responses=6, seed=1)
    scores = RewardWorker(str(tiny.index_folder), str(tiny.checkpoint), terms=terms).score(batch)
    plain = RewardWorker(str(tiny.index_folder), str(tiny.checkpoint)).score(batch)
    assert scores.scored.all()
    assert np.isnan(scores.components[:6, 0]).all()
    assert np.isnan(scores.components[6:, 1]).all()
    np.testing.assert_allclose(scores.rewards[:6], 8.0 * plain.hits[:6])
    np.testing.assert_allclose(scores.rewards[6:], plain.rewards[6:] + 5.0 * plain.hits[6:], rtol=1e-6)
    metrics = rollout_metrics([(prompts.reasoning, scores)], minimum_think_tokens=8, terms=["a", "b", "both"])
    assert metrics["rewards/a"] == pytest.approx(plain.rewards[6:].mean())
    assert metrics["rewards/b"] == pytest.approx(plain.hits[:6].mean())
    direct = rollout_metrics(
        [(prompts.reasoning[:1], scores.select(np.array([0])))], minimum_think_tokens=8, terms=["a", "b", "both"]
    )
    assert "rewards/a" not in direct


def test_metrics_of_a_step_take_all_reasoning_groups_of_all_rounds(tiny, worker):
    rounds = []
    for seed, modes in enumerate((["reasoning", "direct"], ["direct"], ["reasoning"])):
        prompts = tiny.prompts(modes)
        scores = worker.score(tiny.random_rollouts(prompts, responses=5, seed=seed))
        assert (scores.chains["foreign_items"] <= scores.chains["rewritten_items"]).all()
        rounds.append((prompts.reasoning, scores))
    chains = np.concatenate([scores.chains[np.repeat(reasoning, 5)] for reasoning, scores in rounds])
    assert chains.shape == (10,)
    expected = chain_metrics(chains, minimum_think_tokens=3)
    metrics = rollout_metrics(rounds, minimum_think_tokens=3)
    assert {name: value for name, value in metrics.items() if name.startswith("chains/")} == {
        f"chains/{name}": value for name, value in expected.items()
    }
    direct_only = rollout_metrics(rounds[1:2], minimum_think_tokens=3)
    assert not any(name.startswith("chains/") for name in direct_only)
