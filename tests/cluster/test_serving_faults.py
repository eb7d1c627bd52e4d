"""A service that loses replicas, is too busy, gets another checkpoint or is stopped: what its clients see of that."""

import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
from served import Service, change_weights, events, lists_by_version, load

from actors.ranking import RankingWorker
from curriculum.corpus import load_corpus
from item_index.ragged import RaggedArray

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]
NAMES = {"direct": "DirectRecommender", "reasoning": "ReasoningRecommender"}
BUSY = (
    "serving.timeout_seconds=15", "serving.direct.ongoing_requests=1", "serving.direct.queued_requests=2",
    "serving.reasoning.ongoing_requests=1", "serving.reasoning.queued_requests=1",
)  # fmt: skip
BODY = {"user_id": 1, "chains": 1, "seed": 3}


@pytest.fixture(scope="module")
def run(supervised, tmp_path_factory):
    """A copy of the run folder, whose checkpoint may be replaced."""
    run = tmp_path_factory.mktemp("served") / "run"
    shutil.copytree(supervised[0], run)
    return run


@pytest.fixture(scope="module")
def own_service(run, tmp_path_factory):
    service = Service(run, *BUSY, log=tmp_path_factory.mktemp("log") / "output")
    yield service
    if service.process.poll() is None:
        service.stop()


@contextmanager
def frozen(process):
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


@pytest.mark.parametrize(("mode", "other", "refusals"), [("direct", "reasoning", 3), ("reasoning", "direct", 4)])
def test_a_full_mode_refuses_and_the_other_goes_on(own_service, mode, other, refusals):
    (replica,) = own_service.replicas(NAMES[mode])
    body = {"user_id": 1, "mode": mode, "chains": 1}
    with ThreadPoolExecutor(6) as pool:
        with frozen(replica):
            waiting = [pool.submit(own_service.recommend, **body) for _ in range(6)]
            own_service.wait_for(lambda: sum(one.done() for one in waiting) >= refusals)
            refused = [one.result() for one in waiting if one.done()]
            assert own_service.recommend(user_id=1, mode=other).status_code == 200
        answers = [one.result() for one in waiting]
    assert 429 in {answer.status_code for answer in refused}
    for answer in answers:
        assert answer.status_code in (200, 429, 503)
        if answer.status_code != 200:
            assert answer.headers["retry-after"] == "1"
            assert answer.headers["content-type"] == "application/problem+json"
    assert own_service.recommend(**body).status_code == 200


@pytest.mark.parametrize("mode", ["direct", "reasoning"])
def test_a_full_mode_is_ready_and_answers_lookups(own_service, mode):
    with load(own_service.client, mode=mode, **BODY) as answers, ThreadPoolExecutor(8) as pool:
        own_service.wait_for(lambda: len(answers) > 3)
        lookups = list(pool.map(own_service.client.get, ["/readyz", "/v1/items/item-1"] * 40))
    assert {answer.status_code for answer in lookups} == {200}
    assert {answer.status_code for answer in answers} == {200}


@pytest.mark.parametrize("mode", ["direct", "reasoning"])
def test_a_request_has_a_deadline(own_service, mode):
    (replica,) = own_service.replicas(NAMES[mode])
    with frozen(replica):
        answer = own_service.recommend(user_id=1, mode=mode)
    assert answer.status_code == 503
    assert "within 15 s" in answer.json()["detail"]
    own_service.wait_for(lambda: own_service.recommend(user_id=1, mode=mode).status_code == 200)


@pytest.mark.parametrize("mode", ["direct", "reasoning"])
def test_a_killed_replica_costs_no_wrong_answer(own_service, mode):
    body = {"user_id": 1, "mode": mode, "chains": 1, "seed": 3}
    own_service.wait_for(lambda: own_service.recommend(**body).status_code == 200)
    before = own_service.recommend(**body).json()
    (replica,) = own_service.replicas(NAMES[mode])
    with load(own_service.client, mode=mode, **BODY) as answers:
        own_service.wait_for(lambda: len(answers) > 3)
        os.kill(replica.pid, signal.SIGKILL)
        killed = len(answers)
        own_service.wait_for(lambda: any(answer.status_code == 200 for answer in answers[killed + 2 :]))
    assert {answer.status_code for answer in answers} <= {200, 429, 503}
    for answer in answers:
        if answer.status_code == 200:
            assert [item["item_id"] for item in answer.json()["items"]] == [i["item_id"] for i in before["items"]]
        else:
            assert "retry-after" in answer.headers
    assert replica.pid not in [other.pid for other in own_service.replicas(NAMES[mode])]


@pytest.mark.parametrize("name", ["ServeReplica:gream:RecommendationInterface", "ProxyActor"])
def test_a_killed_interface_or_proxy_comes_back(own_service, name):
    """What they had under way is lost, as documented; what is answered is right, and soon all is again."""
    before = own_service.recommend(user_id=1).json()
    (process,) = own_service.processes(name)
    os.kill(process.pid, signal.SIGKILL)
    answers = []

    def is_back():
        try:
            answers.append(own_service.recommend(user_id=1))
        except httpx.TransportError:
            return False
        return len(answers) > 3 and all(answer.status_code == 200 for answer in answers[-3:])

    own_service.wait_for(is_back)
    assert {answer.status_code for answer in answers} <= {200, 404, 500, 503}
    assert all(answer.json() == before for answer in answers if answer.status_code == 200)
    assert process.pid not in [other.pid for other in own_service.processes(name)]


def test_another_checkpoint_takes_over_without_a_failed_request(own_service, run):
    old = own_service.recommend(user_id=1).json()
    change_weights(run / "sft" / "checkpoint")

    def is_taken_up():
        ready = own_service.client.get("/readyz").json()
        return ready["direct"] == ready["reasoning"] != old["versions"]

    with load(own_service.client, **BODY) as answers:
        own_service.process.send_signal(signal.SIGHUP)
        own_service.wait_for(is_taken_up)
        time.sleep(2)  # replicas of the version before end what they work on
    assert {answer.status_code for answer in answers} == {200}
    lists = lists_by_version(answers)
    assert len(lists) == 2
    assert all(len(different) == 1 for different in lists.values())

    corpus = load_corpus(run / "corpus", run / "index")
    history = corpus.sequences.sequence(corpus.sequences.user_ids.index(1))
    worker = RankingWorker(str(run / "sft" / "checkpoint"), str(run / "index"), threads=1)
    prompt = RaggedArray.of([corpus.builder.prompt(history, "direct")], np.int32)
    _, scores = worker.rank(prompt, RaggedArray.of([history], np.int32), mode="direct", width=50)
    new = own_service.recommend(user_id=1).json()
    np.testing.assert_allclose([item["score"] for item in new["items"]], scores[0][:10], atol=1e-4)
    own_service.wait_for(
        lambda: own_service.recommend(user_id=1, mode="reasoning").json()["versions"] == new["versions"]
    )


@pytest.mark.parametrize("content", [None, b"no weights"])
def test_a_checkpoint_that_does_not_load_leaves_the_one_before(own_service, run, content):
    served = own_service.recommend(user_id=1).json()
    file = run / "sft" / "checkpoint" / "model.safetensors"
    file.rename(run / "model.safetensors")
    if content is not None:
        file.write_bytes(content)
    refusals = own_service.output().count("not put in place")
    own_service.process.send_signal(signal.SIGHUP)
    with load(own_service.client, **BODY) as answers:
        own_service.wait_for(lambda: own_service.output().count("not put in place") > refusals)
    assert {answer.status_code for answer in answers} <= {200}
    assert own_service.recommend(user_id=1).json() == served
    (run / "model.safetensors").replace(file)


def test_what_is_under_way_is_finished_when_the_service_is_stopped(own_service):
    with own_service.stream(user_id=2, mode="reasoning", chains=16) as response:
        arriving = events(response.iter_lines())
        assert next(arriving)[0] == "chain"
        own_service.process.send_signal(signal.SIGTERM)
        assert list(arriving)[-1][0] == "result"
    assert own_service.process.wait(timeout=120) == 0
