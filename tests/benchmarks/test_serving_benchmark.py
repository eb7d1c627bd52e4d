"""The benchmarks of the service: what the loads count, what the peers answer, when lists agree."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import xgrammar

from benchmarks.load import Answers, Request, closed_loop, open_loop
from benchmarks.serving import UNITS, measured, numbers_of
from benchmarks.serving_agreement import differing_places
from benchmarks.serving_subjects import Server, free_port, regex_of, running, started, wait_until_ready


@pytest.fixture
def counted_server():
    """Answers every third request with 429, every fifth with 500, the others with a list; counts them."""
    counts = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            counts.append(1)
            status = 429 if len(counts) % 3 == 0 else 500 if len(counts) % 5 == 0 else 200
            body = json.dumps({"items": [1, 2, 2]}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    yield [Request(url, {"n": n}, lambda answer: 3 - len(set(answer["items"]))) for n in range(2)], counts
    server.shutdown()


def check(answers, asked):
    assert len(answers.seconds_N) + answers.refused + answers.failed == asked
    assert answers.invalid == len(answers.seconds_N)
    assert answers.refused == asked // 3
    assert answers.failed == asked // 5 - asked // 15


def test_a_closed_loop_asks_again_and_counts(counted_server):
    requests, counts = counted_server
    (answers,) = closed_loop([(requests, 1)], seconds=0.5)
    check(answers, len(counts))
    assert len(counts) > 5
    assert answers.throughput == len(answers.seconds_N) / answers.wall


def test_an_open_loop_asks_at_its_own_times(counted_server):
    requests, counts = counted_server
    answers = open_loop(requests, rate=100, seconds=0.6, seed=0)
    assert len(counts) == 60
    assert len(answers.seconds_N) + answers.refused + answers.failed == 60


def test_all_loops_are_measured(counted_server):
    requests, _ = counted_server
    loops = measured(Server([], "", requests, requests), [1, 2], 0.2, 0.5, 1)
    assert [name.split(",")[0] for name, _ in loops] == ["closed", "closed", "open", "mixed", "mixed"]
    assert all(set(numbers_of(answers)) == set(UNITS) for _, answers in loops)


def test_numbers_are_in_their_units():
    numbers = numbers_of(Answers(np.array([0.1, 0.2, 0.3]), refused=1, failed=2, invalid=3, wall=2.0))
    assert numbers["throughput"] == 1.5
    assert numbers["p50"] == pytest.approx(200)
    assert (numbers["refused"], numbers["failed"], numbers["invalid"]) == (1, 2, 3)


@pytest.mark.parametrize(
    ("expected", "counts"),
    [([1, 2, 3], (0, 0)), ([2, 1, 3], (2, 0)), ([1, 2, 4], (1, 0)), ([4, 2, 3], (1, 0)), ([1, 2], (0, 3))],
)
def test_places_may_differ_where_scores_are_close(expected, counts):
    assert differing_places([1, 2, 3], [-1.0, -1.00001, -2.0], expected) == counts
    if expected == [2, 1, 3]:
        assert differing_places([1, 2, 3], [-1.0, -1.5, -2.0], expected) == (0, 2)


def test_the_regular_expression_lets_all_items_through_token_by_token(tiny):
    information = xgrammar.TokenizerInfo.from_huggingface(tiny.tokenizer, vocab_size=len(tiny.tokenizer))
    compiled = xgrammar.GrammarCompiler(information).compile_regex(regex_of(tiny.index))
    for row in range(len(tiny.index)):
        matcher = xgrammar.GrammarMatcher(compiled)
        assert all(matcher.accept_token(token) for token in tiny.builder.item_tokens[row])
        assert matcher.accept_token(tiny.tokenizer.eos_token_id)
    beyond = xgrammar.GrammarMatcher(compiled)
    first, *others = tiny.builder.item_tokens[0]
    assert not beyond.accept_token(others[0])
    assert beyond.accept_token(first)


@pytest.mark.engines
def test_the_peer_answers_with_items(tiny, tmp_path):
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "benchmarks.serving_peers",
        str(tiny.checkpoint),
        str(tiny.index_folder),
        str(port),
    ]
    tokens = tiny.prompts(["direct"] * 3).tokens
    requests = [
        Request(f"http://127.0.0.1:{port}/recommend", {"tokens": one.tolist()},
                lambda answer: 5 - len({row for row in answer["items"] if row >= 0}))
        for one in tokens
    ]  # fmt: skip
    server = Server([*command, "--width", "5"], f"http://127.0.0.1:{port}/health", requests)
    with running(server, 1, tmp_path / "log"):
        (answers,) = closed_loop([(server.direct, 3)], seconds=1)
    assert len(answers.seconds_N) >= 3
    assert (answers.invalid, answers.refused, answers.failed) == (0, 0, 0)


def test_a_server_that_does_not_start_is_named(tmp_path):
    process = started([sys.executable, "-c", "raise SystemExit('no such model')"], 1, tmp_path / "log")
    with pytest.raises(RuntimeError, match="no such model"):
        wait_until_ready(process, f"http://127.0.0.1:{free_port()}", tmp_path / "log", 60)
