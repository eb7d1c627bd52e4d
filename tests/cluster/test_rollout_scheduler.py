"""What the scheduler asks for and which groups it gives to a step. Engines and rewards are scripted here, for what they
do is not the subject; `test_rollout_engines.py` and `test_srpo_loop.py` have the real ones."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.reward import ScoredResponses
from actors.rollout import GenerationSummary
from cluster.rollout_engines import EngineCall
from cluster.rollout_scheduler import RolloutScheduler
from cluster.settings import load_settings
from cluster.timers import Timers
from item_index.ragged import RaggedArray
from learner.rollouts import RolloutPrompts
from rewards.chains import CHAIN

POSITIONS = 1000
RESPONSES = 4


class Source:
    """Prompts whose target is their position, so that the script can tell them apart."""

    def reinforcement_positions(self, minimum_history):
        return np.arange(POSITIONS)

    def prompts(self, positions, modes):
        nothing = RaggedArray.of([[] for _ in positions], np.int32)
        return RolloutPrompts(
            nothing, np.asarray(positions, np.int32), np.array([mode == "reasoning" for mode in modes]),
            np.full(len(positions), 8, np.int32), nothing,
        )  # fmt: skip


@dataclass
class Script:
    """Engines and rewards in one: calls are answered at once, under the version of the moment they were made."""

    varied: object  # (position, reasoning) -> whether the group has variance
    engines: int = 1
    kind: str = "too_hard"
    version: int = 0
    rounds: list = field(default_factory=list)
    waited: list = field(default_factory=list)

    def generate(self, prompts, *, responses, seeds, temperature):
        self.rounds.append((self.version, prompts, list(seeds)))
        calls = []
        for number in range(self.engines):
            share = np.arange(number, len(prompts), self.engines)
            if len(share):
                call = EngineCall("rollouts", lambda actor: [], prompts=share)
                call.references = [(len(self.rounds), number, prompts.select(share))]
                call.result, call.done = GenerationSummary(self.version, 10, 0.5), True
                calls.append(call)
        return calls

    def wait(self, calls):
        self.waited.append(len(calls))

    def score(self, references, sizes, *, responses):
        scores = []
        for (_, _, prompts), size in zip(references, sizes, strict=True):
            rewards = np.zeros((size, RESPONSES), np.float32)
            hits = np.zeros((size, RESPONSES), bool)
            for row in range(size):
                if self.varied(int(prompts.targets[row]), bool(prompts.reasoning[row])):
                    rewards[row, 0] = 1
                elif self.kind == "too_easy":
                    rewards[row], hits[row] = 1, True
            scores.append(scores_of(rewards, hits))
        return scores


def scores_of(rewards, hits):
    flat = rewards.size
    return ScoredResponses(
        group_sizes=np.full(len(rewards), RESPONSES), rewards=rewards.reshape(-1), hits=hits.reshape(-1),
        valid=np.ones(flat, bool), well_formed=np.ones(flat, bool), forced=np.zeros(flat, bool),
        items=np.zeros(flat, np.int32), lengths=np.full(flat, 5, np.int32), chains=np.zeros(flat, CHAIN),
        components=rewards.reshape(-1, 1), failures=(), scored=np.ones(len(rewards), bool),
    )  # fmt: skip


def scheduler(script, *, seed=0, **train):
    values = {"prompts_per_step": 8, "mini_batch_prompts": 8, "responses": RESPONSES, "steps": 20, **train}
    settings = load_settings(None, [f"seed={seed}", *(f"train.{name}={value}" for name, value in values.items())])
    return RolloutScheduler(settings, Source(), script, script, Timers())


def run(script, count, **train):
    """Groups of each step, with the version rising by one a step."""
    made = scheduler(script, **train)
    found = []
    for step in range(1, count + 1):
        found.append(made.groups_for(step, step - 1))
        made.run_ahead(step)
        script.version = step
    return found


def places(found):
    """(round, engine, place) of the groups of a step, in their order."""
    return [(group.batch[0], group.batch[1], group.place) for group in found.groups]


def test_taking_turns_asks_once_where_all_groups_have_variance_and_every_group_is_of_the_newest_weights():
    script = Script(lambda position, reasoning: True)
    found = run(script, 3)
    assert [len(prompts) for _, prompts, _ in script.rounds] == [8, 8, 8]
    for step, one in enumerate(found):
        assert [group.weight_version for group in one.groups] == [step] * 8
        assert [group.reasoning for group in one.groups] == [False] * 4 + [True] * 4
        assert one.metrics["groups_generated"] == one.metrics["groups_trained"] == 8
    assert len({seed for _, _, seeds in script.rounds for seed in seeds}) == 24


def test_what_is_missing_is_asked_for_by_the_acceptance_rate_and_surplus_is_dropped_and_counted():
    script = Script(lambda position, reasoning: position % 3 == 0)
    found = run(script, 12, generation_rounds=8)
    first = found[0].metrics
    assert first["rounds"] >= 2, "nothing was known of the rate"
    later = [one.metrics for one in found[4:]]
    assert all(metrics["groups_trained"] == 8 for metrics in later)
    asked = np.mean([metrics["groups_generated"] for metrics in later])
    assert 16 < asked < 48, "three times as many as are trained on, more or less"
    for one in found:
        metrics = one.metrics
        with_variance = sum(int((scores.rewards.reshape(-1, RESPONSES).max(1) > 0).sum()) for _, scores in one.scored)
        assert metrics["groups_dropped"] == with_variance - metrics["groups_trained"]
        assert metrics["groups_kept_for_later"] == metrics["groups_expired"] == 0
    assert sum(one.metrics["groups_dropped"] for one in found) > 0


@pytest.mark.parametrize("engines", [1, 3])
def test_groups_are_admitted_in_the_order_of_their_prompts(engines):
    script = Script(lambda position, reasoning: position % 2 == 0, engines=engines)
    found = run(script, 1, generation_rounds=8)[0]
    for reasoning in (False, True):
        expected = [
            (number, row % engines, row // engines)
            for number, (_, prompts, _) in enumerate(script.rounds, start=1)
            for row in range(len(prompts))
            if prompts.reasoning[row] == reasoning and prompts.targets[row] % 2 == 0
        ][:4]
        got = [key for key, group in zip(places(found), found.groups, strict=True) if group.reasoning == reasoning]
        assert got == expected


@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_working_ahead_is_bounded_by_the_staleness(staleness):
    script = Script(lambda position, reasoning: True)
    found = run(script, 10, max_staleness=staleness, steps=10)
    # At first as many steps are asked for as may be ahead, then one for each that is consumed; nothing beyond the last.
    assert [version for version, _, _ in script.rounds] == [0] * (1 + staleness) + list(range(1, 10 - staleness))
    assert sum(len(prompts) for _, prompts, _ in script.rounds) == 80
    for step, one in enumerate(found):
        versions = [group.weight_version for group in one.groups]
        assert versions == [max(0, step - staleness)] * 8
        assert one.metrics["staleness_maximum"] == step - versions[0] <= staleness


@given(
    share=st.sampled_from([2, 3, 5]), staleness=st.integers(0, 3), engines=st.integers(1, 3), offset=st.integers(0, 4),
    rounds=st.integers(2, 6),
)  # fmt: skip
def test_no_group_is_trained_twice_none_is_too_old_and_none_disappears(share, staleness, engines, offset, rounds):
    script = Script(lambda position, reasoning: (position + offset) % share == 0, engines=engines)
    try:
        found = run(script, 6, max_staleness=staleness, generation_rounds=rounds)
    except RuntimeError as error:
        assert "had any variance" in str(error)  # noqa: PT017
        return
    trained = [key for one in found for key in places(one)]
    assert len(set(trained)) == len(trained)
    for step, one in enumerate(found):
        assert all(0 <= step - group.weight_version <= staleness for group in one.groups)
    with_variance = sum(
        int((scores.rewards.reshape(-1, RESPONSES).max(1) > 0).sum()) for one in found for _, scores in one.scored
    )
    gone = sum(one.metrics["groups_dropped"] + one.metrics["groups_expired"] for one in found)
    assert with_variance == len(trained) + gone + found[-1].metrics["groups_kept_for_later"]
    asked = [int(target) for _, prompts, _ in script.rounds for target in prompts.targets[~prompts.reasoning]]
    assert len(set(asked)) == len(asked), "no prompt comes twice within a pass"


def test_surplus_groups_wait_for_the_next_step_and_then_expire():
    rate = {"value": 1}
    script = Script(lambda position, reasoning: position % rate["value"] == 0)
    made = scheduler(script, max_staleness=1)
    rate["value"] = 4
    made.groups_for(1, 0)  # the scheduler learns that few groups have variance, and asks for many
    rate["value"] = 1
    made.run_ahead(1)
    second = made.groups_for(2, 1)
    kept = second.metrics["groups_kept_for_later"]
    assert kept > 0
    script.version = 2
    third = made.groups_for(3, 2)  # the surplus is two versions behind by now
    assert third.metrics["groups_expired"] == kept


@pytest.mark.parametrize(
    ("kind", "remedy"), [("too_hard", "the prompts are too hard"), ("too_easy", "the prompts are too easy")]
)
def test_prompts_without_variance_end_the_stage_with_what_they_were(kind, remedy):
    script = Script(lambda position, reasoning: False, kind=kind)
    with pytest.raises(RuntimeError, match=rf"step 1: no group of \d+ in 3 rounds .*{remedy}"):
        run(script, 1, generation_rounds=3)
    assert len(script.rounds) == 3


def test_a_mode_without_variance_leaves_the_other_one():
    script = Script(lambda position, reasoning: not reasoning)
    found = run(script, 2)
    assert [group.reasoning for group in found[0].groups] == [False] * 4
    assert found[0].metrics["groups_missing"] == 4


def test_a_seed_fixes_the_schedule():
    def asked(seed):
        script = Script(lambda position, reasoning: position % 2 == 0)
        made = scheduler(script, max_staleness=2, seed=seed)
        for step in range(1, 5):
            made.groups_for(step, step - 1)
            made.run_ahead(step)
            script.version = step
        return [(version, prompts.targets.tolist(), seeds) for version, prompts, seeds in script.rounds]

    assert asked(0) == asked(0)
    assert asked(0) != asked(1)
