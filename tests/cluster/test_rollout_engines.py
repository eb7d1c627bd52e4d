"""Real engines that are killed, stopped and cut off from their weights, by the methods that the train stage calls."""

import os
import signal
import threading
import time

import pytest
import ray
from tiny_engines import ENGINES, MODES, as_references, assert_same, gathered, generation, process_of

from actors.rollout import prompt_seeds
from cluster.placement import placed
from cluster.rollout_engines import RolloutEngines
from cluster.settings import load_settings

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def engines(tiny, ray_cluster):
    settings = load_settings(None, ENGINES)
    with placed(settings.cluster, engines=2) as placement:
        made = RolloutEngines(placement, settings, str(tiny.index_folder), str(tiny.checkpoint))
        made.wait_until_started()
        yield made


@pytest.fixture(scope="module")
def expected(tiny, engines):
    """What the engines give when nothing happens to them."""
    return gathered(engines, generation(tiny, engines))


def test_prompts_are_spread_over_the_engines_and_come_back_in_order(tiny, engines, expected, rollout_engine):
    prompts = tiny.prompts(MODES, budget=160)
    alone = rollout_engine.generate(prompts, responses=6, seeds=prompt_seeds(2, 1, len(MODES)))
    assert_same(expected, alone)
    calls = generation(tiny, engines)
    assert [call.prompts.tolist() for call in calls] == [list(range(0, 16, 2)), list(range(1, 16, 2))]
    assert_same(gathered(engines, calls), expected)
    assert [call.result.weight_version for call in calls] == [0, 0]
    assert sum(call.result.tokens for call in calls) == len(expected.responses.values)


def test_an_engine_that_is_killed_while_it_generates_is_replaced_and_nothing_is_lost(tiny, engines, expected, capsys):
    victim, restarts = engines.engines[0], engines.restarts
    process = process_of(victim)
    calls = generation(tiny, engines)
    started = time.monotonic()
    threading.Timer(0.2, os.kill, (process, signal.SIGKILL)).start()
    assert_same(gathered(engines, calls), expected)
    assert time.monotonic() - started > 0.2
    assert engines.restarts == restarts + 1
    assert process_of(victim) != process
    assert "rollout engine 0 is started anew: it was lost during the rollouts of 8 prompts" in capsys.readouterr().out


def test_an_engine_that_stops_answering_is_noticed_by_its_health_and_replaced(tiny, engines, expected, capsys):
    victim, restarts = engines.engines[1], engines.restarts
    process = process_of(victim)
    os.kill(process, signal.SIGSTOP)
    try:
        calls = generation(tiny, engines)
        assert_same(gathered(engines, calls), expected)
    finally:
        if os.path.exists(f"/proc/{process}"):
            os.kill(process, signal.SIGKILL)
    assert engines.restarts == restarts + 1
    printed = capsys.readouterr().out
    assert "rollout engine 1 is started anew: it has not answered a health check for 5 s" in printed


def test_weights_that_come_while_an_engine_generates_are_taken_up_after_it_and_survive_a_restart(tiny, engines):
    try:
        before = generation(tiny, engines)
        update = engines.update_weights(as_references(tiny.model, 3))
        after = generation(tiny, engines)
        os.kill(process_of(engines.engines[0]), signal.SIGKILL)  # the health check is answered during the generation
        engines.wait(after)
        assert all(call.done for call in (*before, *update))
        assert [call.result for call in update] == [3, 3]
        # The lost engine began again with the newest weights, the other one had begun with the old ones.
        assert [call.result.weight_version for call in before] in ([3, 0], [0, 0])
        assert [call.result.weight_version for call in after] == [3, 3]
        for call in (*before, *after):
            (batch,) = ray.get(call.references[:1], timeout=60)
            assert set(batch.weight_versions.tolist()) == {call.result.weight_version}
    finally:
        engines.wait(engines.load_weights(str(tiny.checkpoint), 0))


def test_a_transfer_that_never_gets_through_ends_with_an_error_that_names_the_engine(tiny, engines, expected, capsys):
    @ray.remote(num_cpus=0)
    def dies():
        os.kill(os.getpid(), signal.SIGKILL)

    good = as_references(tiny.model, 4)
    calls = engines.update_weights([*good, dies.options(max_retries=0).remote()])
    with pytest.raises(RuntimeError, match=r"rollout engine \d was lost 2 times in a row, .* because it did not start"):
        engines.wait(calls)
    assert "is started anew: the weight transfer failed" in capsys.readouterr().out
