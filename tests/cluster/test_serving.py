"""The service over real HTTP: answers in both modes, what it says of bad requests, keys and metrics."""

import json
import shutil
import socket

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from served import KEYS, events

from cluster.pipeline import run_stages
from cluster.settings import load_settings
from curriculum.corpus import load_corpus

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def corpus(supervised):
    run, _ = supervised
    return load_corpus(run / "corpus", run / "index")


def test_direct_answers_are_those_of_the_evaluation(service, supervised, corpus, tmp_path):
    run, overrides = supervised
    shutil.copytree(run, tmp_path / "run")
    changes = [f"run_folder={tmp_path / 'run'}", "evaluation.checkpoints=[sft]", "evaluation.modes=[direct]"]
    run_stages(load_settings(None, [*overrides, *changes]), ["evaluate"])
    table = pq.read_table(tmp_path / "run" / "evaluation" / "rankings.parquet")
    rankings = [row for row in table.to_pylist() if row["system"] == "direct_sft"]
    assert len(rankings) == len(corpus.sequences)
    ids, places = corpus.catalogue.item_ids, {user: place for place, user in enumerate(corpus.sequences.user_ids)}
    for row in rankings:
        history = corpus.sequences.sequence(places[row["user_id"]])[:-1]
        answer = service.recommend(history=[ids[item] for item in history], k=50).json()["items"]
        gaps = np.diff([item["score"] for item in answer])
        assert (gaps <= 0).all()
        assert len(answer) == len(row["items"])
        for place, (item, expected) in enumerate(zip(answer, row["items"], strict=True)):
            close = -gaps[max(0, place - 1) : place + 1] <= 1e-4
            assert item["item_id"] == expected or close.any() or place == len(answer) - 1


def test_reasoning_streams_the_chain_that_its_result_names(service, corpus):
    body = {"user_id": 3, "mode": "reasoning", "chains": 2, "k": 5, "seed": 1, "exclude": ["item-1"]}
    with service.stream(**body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        streamed = list(events(response.iter_lines()))
    assert [name for name, _ in streamed] == ["chain"] * (len(streamed) - 1) + ["result"]
    assert len(streamed) > 5
    result = streamed[-1][1]
    whole = service.recommend(**body).json()
    assert [item["item_id"] for item in whole["items"]] == [item["item_id"] for item in result["items"]]
    assert whole["chains"] == result["chains"]
    seen = set(corpus.sequences.sequence(corpus.sequences.user_ids.index(3)).tolist())
    rows = [corpus.catalogue.item_ids.index(item["item_id"]) for item in result["items"]]
    assert len(rows) == 5
    assert not {*rows} & ({1} | seen)
    assert len(result["chains"]) == 2
    assert result["versions"]["index"] == corpus.index.version
    text = "".join(data["text"] for name, data in streamed if name == "chain")
    assert text.replace(" ", "").startswith(result["chains"][0]["think"].replace(" ", "")[:20])


def test_the_demos_checkpoint_answers_in_both_modes(demo_service):
    corpus = load_corpus(demo_service.run / "corpus", demo_service.run / "index")
    row_of = {item: row for row, item in enumerate(corpus.catalogue.item_ids)}

    def assert_a_list_for(user, answer):
        rows = [row_of[item["item_id"]] for item in answer["items"]]
        assert len(set(rows)) == len(rows) == 10
        assert not {*rows} & {*corpus.sequences.sequence(corpus.sequences.user_ids.index(user)).tolist()}
        assert (np.diff([item["score"] for item in answer["items"]]) <= 0).all()
        assert answer["versions"]["checkpoint"].startswith("train-")

    for user in corpus.sequences.user_ids[:20]:
        assert_a_list_for(user, demo_service.recommend(user_id=user).json())
    for user in corpus.sequences.user_ids[:3]:
        with demo_service.stream(user_id=user, mode="reasoning", chains=4, seed=0) as response:
            *chain, (name, result) = events(response.iter_lines())
        assert name == "result"
        assert {name for name, _ in chain} == {"chain"}
        assert_a_list_for(user, result)
        assert len(result["chains"]) == 4
        # What the demo's supervised rows have taught it to write.
        assert all(part in result["chains"][0]["think"] for part in ("Evidence:", "Preference:", "Intent:"))
        assert {item["item_id"] for item in result["chains"][0]["rewritten_history"]} <= row_of.keys()


def test_a_list_ends_where_no_item_is_left(service, corpus):
    ids = list(corpus.catalogue.item_ids)
    for mode in ("direct", "reasoning"):
        answer = service.recommend(history=ids[:2], exclude=ids[2:-2], mode=mode, k=10, chains=1).json()
        assert {item["item_id"] for item in answer["items"]} == set(ids[-2:])
        assert service.recommend(history=ids[:1], exclude=ids[1:], mode=mode).json()["items"] == []
    unseen = service.recommend(history=ids[:2], exclude=ids[2:-2], exclude_history=False, k=10).json()["items"]
    assert {item["item_id"] for item in unseen} == {*ids[:2], *ids[-2:]}


def test_items_and_users_are_found(service, corpus):
    item = service.client.get("/v1/items/item-1").json()
    assert item["title"] == "Tale number 1"
    assert item["versions"]["index"] == corpus.index.version
    codes = corpus.index.codes_IL[1, : corpus.index.lengths_I[1]]
    assert item["path"] == [corpus.index.token(level, int(code)) for level, code in enumerate(codes)]
    found = service.client.get("/v1/items", params={"title": "NUMBER tale", "limit": 3}).json()
    assert len(found) == 3
    assert all(one["title"].startswith("Tale number") for one in found)
    assert service.client.get("/v1/users", params={"beginning": "1", "limit": 2}).json()[0] == 1
    history = service.client.get("/v1/users/1/history", params={"limit": 2}).json()
    latest = corpus.sequences.sequence(corpus.sequences.user_ids.index(1))[-2:]
    assert [one["item_id"] for one in history] == [corpus.catalogue.item_ids[row] for row in latest]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"history": ["item-1", "nothing"]}, 422, "no item 'nothing'"),
        ({"user_id": "nobody"}, 422, "no user 'nobody'"),
        ({"user_id": "nobody", "mode": "reasoning", "stream": True}, 422, "no user 'nobody'"),
        ({"user_id": 1, "exclude": ["nothing"]}, 422, "no item 'nothing'"),
        ({}, 422, "either history or user_id"),
        ({"user_id": 1, "history": []}, 422, "either history or user_id"),
        ({"user_id": 1, "k": 0}, 422, "/k"),
        ({"user_id": 1, "k": "3"}, 422, "/k"),
        ({"user_id": 1, "temperature": 0}, 422, "/temperature"),
        ({"user_id": 1, "mood": "good"}, 422, "/mood"),
        ({"user_id": True}, 422, "/user_id"),
        ({"history": ["item-1"] * 5000}, 413, "bytes"),
    ],
)
def test_what_cannot_be_answered_is_explained(service, body, status, words):
    response = service.recommend(**body, **({"mode": "direct"} if "mode" not in body else {}))
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == status
    assert words in problem["detail"]


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"{", 400), (b"[" * 10_000, 400), (b"\xff", 400), (b"", 422), (b'{"\\ud800": 1}', 422), (b"[1]", 422)],
)
def test_what_is_no_request_is_refused(service, content, status):
    response = service.client.post("/v1/recommend", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    assert response.json()["status"] == status


def test_a_body_of_unknown_length_is_limited(service):
    def parts():
        for _ in range(40):
            yield b"[" * 1024

    assert service.client.post("/v1/recommend", content=parts()).status_code == 413


def test_a_body_that_does_not_come_is_not_waited_for(service):
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as slow:
        head = [
            "POST /v1/recommend HTTP/1.1",
            "Host: x",
            f"Authorization: Bearer {KEYS[0]}",
            "Content-Length: 9",
            "",
            "{",
        ]
        slow.sendall("\r\n".join(head).encode())
        assert slow.recv(65536).startswith(b"HTTP/1.1 408")
    assert service.recommend(user_id=1).status_code == 200


def test_keys_are_wanted_but_where_a_browser_begins(service):
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer third"}, {"Authorization": f"Basic {KEYS[1]}"}):
        for path in ("/v1/items/item-1", "/v1/users", "/metrics", "/pages", "/page"):
            refused = service.client.get(path, headers=headers)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
        for path in ("/", "/page/page.js", "/docs", "/openapi.json", "/healthz", "/readyz"):
            assert service.client.get(path, headers=headers).status_code == 200
    for key in KEYS:
        assert service.client.get("/v1/items/item-1", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert service.client.get("/v1/items/item-99").status_code == 404
    assert service.client.delete("/v1/recommend").status_code == 405


def test_no_log_holds_a_key(service):
    assert service.recommend(user_id=1).status_code == 200
    assert service.recommend(user_id="nobody").status_code == 422
    logs = service.logs()
    assert any("RecommendationInterface" in file.name for file in logs)
    for file in logs:
        content = file.read_bytes()
        assert not any(key.encode() in content for key in KEYS), file


def test_browsers_are_told_to_load_nothing_from_elsewhere(service):
    for path in ("/", "/docs", "/v1/items/item-99"):
        headers = service.client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'self'")
        assert headers["x-content-type-options"] == "nosniff"


def test_metrics_count_answers_tokens_and_batches(service):
    service.recommend(user_id=1)
    service.recommend(user_id=1, mode="reasoning", chains=1)
    for name, tags in (
        ("requests_total", {"mode": "direct", "status": "200"}), ("requests_total", {"mode": "reasoning"}),
        ("latency_ms_count", {"mode": "direct"}), ("batch_users_count", {"mode": "direct"}),
        ("items_total", {"mode": "direct", "given": "yes"}), ("chain_tokens_total", {}),
    ):  # fmt: skip
        service.wait_for(lambda name=name, tags=tags: service.metric(name, **tags) > 0)
    assert "ray_serve_deployment_queued_queries" in service.client.get("/metrics").text


def leaves(service, seconds):
    """Whether a client that waits so long for its whole answer has gone without it."""
    try:
        service.client.post(
            "/v1/recommend", json={"user_id": 2, "mode": "reasoning", "chains": 16},
            timeout=httpx.Timeout(60, read=seconds),
        )  # fmt: skip
    except httpx.ReadTimeout:
        return True
    return False


def test_a_client_that_leaves_is_counted_and_its_chains_are_stopped(service):
    gone = service.metric("requests_total", mode="reasoning", status="499")
    for _ in range(3):
        with service.stream(user_id=2, mode="reasoning", chains=16) as response:
            assert next(events(response.iter_lines()))[0] == "chain"
    assert any(leaves(service, seconds) for seconds in (0.2, 0.1, 0.05, 0.02)), "every answer came at once"
    service.wait_for(lambda: service.metric("requests_total", mode="reasoning", status="499") == gone + 4)
    service.wait_for(lambda: service.metric("open_chains") == 0)


def test_the_openapi_document_names_the_limits(service):
    document = service.client.get("/openapi.json").json()
    request = document["components"]["schemas"]["RecommendRequest"]["properties"]
    assert (request["k"]["minimum"], request["k"]["maximum"]) == (1, 50)
    answers = document["paths"]["/v1/recommend"]["post"]["responses"]
    assert {"200", "400", "401", "408", "413", "422", "429", "503"} <= set(answers)
    assert set(answers["429"]["content"]) == {"application/problem+json"}
    assert json.dumps(document["components"]["securitySchemes"])
