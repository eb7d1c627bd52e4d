"""The service over real HTTP, on a small run whose supervised checkpoint it serves."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from train_runs import ROOT, command_of

from actors.ranking import RankingWorker
from curriculum.corpus import load_corpus
from item_index.ragged import RaggedArray

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
KEY = {"Authorization": "Bearer second"}


class Service:
    def __init__(self, run, *overrides):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            [
                Path(sys.executable).with_name("gream"), "serve", "--run", str(run), "serving.checkpoint=sft",
                f"serving.port={self.port}", "serving.key_variable=TEST_KEYS", "serving.body_kib=16", *overrides,
            ],
            cwd=ROOT, start_new_session=True, env={**environment, "TEST_KEYS": "first, second"},
        )  # fmt: skip
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=KEY, timeout=60)
        deadline = time.monotonic() + 240
        while not self.is_ready():
            assert self.process.poll() is None, "the service has ended"
            assert time.monotonic() < deadline, "the service is not ready"
            time.sleep(0.5)

    def is_ready(self):
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def recommend(self, **body):
        return self.client.post("/v1/recommend", json=body)

    def replicas(self, name):
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if f"ServeReplica:gream:{name}" in command_of(child)]

    def stop(self):
        os.kill(self.process.pid, signal.SIGTERM)
        assert self.process.wait(timeout=120) == 0


@pytest.fixture(scope="module")
def run(supervised):
    return supervised[0]


@pytest.fixture(scope="module")
def service(run):
    service = Service(run)
    yield service
    service.stop()


@pytest.fixture(scope="module")
def corpus(run):
    return load_corpus(run / "corpus", run / "index")


def test_direct_answers_are_those_of_the_evaluation(service, run, corpus):
    worker = RankingWorker(str(run / "sft" / "checkpoint"), str(run / "index"), threads=1)
    histories = [corpus.sequences.sequence(user)[:-1] for user in range(len(corpus.sequences))]
    prompts = RaggedArray.of([corpus.builder.prompt(history, "direct") for history in histories], np.int32)
    items, scores = worker.rank(prompts, RaggedArray.of(histories, np.int32), mode="direct", width=50)
    ids = corpus.catalogue.item_ids
    for user, history in enumerate(histories):
        answer = service.recommend(history=[ids[row] for row in history], k=10).json()
        wanted = [ids[row] for row in items[user] if row >= 0][:10]
        np.testing.assert_allclose([item["score"] for item in answer["items"]], scores[user][: len(wanted)], atol=1e-4)
        if (np.diff(scores[user][: len(wanted) + 1]) < -1e-4).all():
            assert [item["item_id"] for item in answer["items"]] == wanted


def test_reasoning_streams_the_chain_that_its_result_names(service, corpus):
    body = {"user_id": 3, "mode": "reasoning", "chains": 2, "k": 5, "seed": 1, "exclude": ["item-1"]}
    events = []
    with service.client.stream("POST", "/v1/recommend", json={**body, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("event: "):
                events.append([line.removeprefix("event: ")])
            elif line.startswith("data: "):
                events[-1].append(json.loads(line.removeprefix("data: ")))
    assert [name for name, _ in events] == ["chain"] * (len(events) - 1) + ["result"]
    assert len(events) > 5
    result = events[-1][1]
    whole = service.recommend(**body).json()
    assert result == whole
    seen = {*corpus.sequences.sequence(corpus.sequences.places[3]).tolist()}
    rows = [corpus.catalogue.item_ids.index(item["item_id"]) for item in result["items"]]
    assert len(rows) == 5
    assert not {*rows} & ({1} | seen)
    assert len(result["chains"]) == 2
    assert result["versions"]["index"] == corpus.index.version


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"history": ["item-1", "nothing"]}, 422, "no item 'nothing'"),
        ({"user_id": "nobody"}, 422, "no user 'nobody'"),
        ({}, 422, "either history or user_id"),
        ({"user_id": 1, "history": []}, 422, "either history or user_id"),
        ({"user_id": 1, "k": 0}, 422, "/k"),
        ({"user_id": 1, "mood": "good"}, 422, "/mood"),
        ({"history": ["item-1"] * 5000}, 413, "bytes"),
    ],
)
def test_what_cannot_be_answered_is_explained(service, body, status, words):
    response = service.recommend(**body)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == status
    assert words in problem["detail"]


def test_keys_are_wanted_but_where_a_browser_begins(service):
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer third"}, {"Authorization": "Basic second"}):
        assert service.client.get("/v1/items/item-1", headers=headers).status_code == 401
        assert service.client.get("/", headers=headers).status_code == 200
        assert service.client.get("/healthz", headers=headers).status_code == 200
    assert service.client.post("/v1/recommend", content=b"{").status_code == 400
    assert service.client.get("/v1/items/item-1").json()["title"] == "Tale number 1"
    assert service.client.get("/v1/items/item-99").status_code == 404


@pytest.mark.parametrize(("name", "mode"), [("DirectRecommender", "direct"), ("ReasoningRecommender", "reasoning")])
def test_a_killed_replica_costs_no_answer(service, name, mode):
    (replica,) = service.replicas(name)
    before = service.recommend(user_id=1, mode=mode, seed=3).json()
    os.kill(replica.pid, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while (response := service.recommend(user_id=1, mode=mode, seed=3)).status_code != 200:
        assert response.status_code in (503, 504)
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert response.json() == before
