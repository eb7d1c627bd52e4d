"""Fusion against a real HTTP server: prompts, train-only reviews, rate limits, failures, the cache and a kill."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from aiohttp import web
from chat_server import ChatServer, completion, describe

from item_index.answer_cache import read_answers
from item_index.catalogue import Catalogue, Review
from item_index.chat_endpoint import Endpoint, ask_endpoint
from item_index.fusion import (
    CACHED,
    FAILED,
    FUSED,
    INSTRUCTION,
    NO_REVIEW,
    FusedText,
    fuse_descriptions,
    item_prompt,
)
from item_index.input_error import InputError

LONG = "I could read this again and again."


def items_of(count: int) -> Catalogue:
    return Catalogue(
        item_ids=tuple(range(count)), titles=tuple(f"Tale {row}" for row in range(count)),
        descriptions=tuple(f"Raw {row}." for row in range(count)), categories=((),) * count, brands=("",) * count,
        reviews=((Review("ada", LONG),),) * count,
    )  # fmt: skip


def endpoint_of(server: ChatServer | str, **limits) -> Endpoint:
    url = server if isinstance(server, str) else server.url
    limits = {"model": "scribe", "concurrency": 4, "retries": 2, **limits}
    return Endpoint(url=url, key="s3cret", instruction=INSTRUCTION, section="index.fusion", **limits)


def everyone(_user: str | int, _row: int) -> bool:
    return True


def fuse(catalogue: Catalogue, endpoint: Endpoint, cache: Path, trains_on=everyone) -> FusedText:
    def ask(questions, count, folder):
        taken = list(questions)
        assert len(taken) == count > 0
        return ask_endpoint(endpoint, taken, folder, lambda: None)

    return fuse_descriptions(catalogue, trains_on=trains_on, key_of=endpoint.cache_key, cache=cache, ask=ask)


def test_the_prompt_of_a_tiny_item() -> None:
    items = Catalogue(
        ("a",), ("Moss &amp; Fern",), ("A <b>guide</b>.",), (("nature",),), ("Acme",),
        ((Review("ada", "Green on every page."), Review("bob", "<p>I liked   the pictures</p>")),),
    )  # fmt: skip
    assert item_prompt(items, 0, everyone) == (
        "Title: Moss & Fern\n"
        "Description: A guide.\n"
        "Notes:\n"
        "- Green on every page.\n"
        "- I liked the pictures"
    )  # fmt: skip


def test_an_item_without_a_description_has_no_line_for_it() -> None:
    items = Catalogue(("a",), ("Moss",), ("",), ((),), ("",), ((Review("ada", "Green on every page."),),))
    assert item_prompt(items, 0, everyone) == "Title: Moss\nNotes:\n- Green on every page."


def test_reviews_need_twenty_characters_and_a_user_who_trains_on_the_item() -> None:
    reviews = (
        Review("ada", "x" * 19), Review("ada", "y" * 20), Review("bob", "z" * 30), Review("eve", "<b>" + "w" * 19),
    )  # fmt: skip
    items = Catalogue(("a", "b"), ("M", "N"), ("", ""), ((), ()), ("", ""), (reviews, reviews))
    trained = {("ada", 0), ("eve", 0), ("bob", 1)}
    prompts = [item_prompt(items, row, lambda user, item: (user, item) in trained) for row in (0, 1)]
    assert prompts == ["Title: M\nNotes:\n- " + "y" * 20, "Title: N\nNotes:\n- " + "z" * 30]
    assert item_prompt(items, 0, lambda user, item: False) is None


def test_eight_reviews_at_most_and_long_text_is_cut() -> None:
    reviews = tuple(Review(number, f"number {number} " + "word " * 200) for number in range(12))
    items = Catalogue(("a",), ("M",), ("long " * 900,), ((),), ("",), (reviews,))
    lines = (item_prompt(items, 0, lambda user, row: user != 3) or "").splitlines()
    assert [line.split()[2] for line in lines[3:]] == ["0", "1", "2", "4", "5", "6", "7", "8"]
    assert {len(line.split()) for line in lines[3:]} == {121}
    assert len(lines[1].split()) == 401


def test_answers_replace_descriptions_and_are_clean(tmp_path: Path) -> None:
    with ChatServer(lambda title, _: f"<think>hm, {title}</think>\n\n Good &amp; <b>short</b>:\n{title} ") as server:
        fused = fuse(items_of(3), endpoint_of(server), tmp_path)
    assert fused.descriptions == tuple(f"Good & short: Tale {row}" for row in range(3))
    assert fused.counts == {FUSED: 3, CACHED: 0, NO_REVIEW: 0, FAILED: 0, "torn_lines": 0}
    body = server.bodies[0]
    assert body["model"] == "scribe"
    assert (body["max_tokens"], body["temperature"]) == (256, 0.0)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer s3cret"}


def test_no_more_requests_than_wanted_are_under_way(tmp_path: Path) -> None:
    with ChatServer() as server:
        fuse(items_of(24), endpoint_of(server, concurrency=3), tmp_path)
    assert server.most_at_once == 3
    assert sum(server.asked.values()) == 24


def test_a_second_run_asks_nothing_and_items_with_the_same_text_are_asked_once(tmp_path: Path) -> None:
    items = items_of(4).select([0, 1, 2, 3, 3])  # type: ignore[arg-type]
    with ChatServer() as server:
        first = fuse(items, endpoint_of(server), tmp_path)
        assert server.asked == {f"Tale {row}": 1 for row in range(4)}
        second = fuse(items, endpoint_of(server), tmp_path)
        assert len(server.bodies) == 4
        assert second.descriptions == first.descriptions
        assert second.counts[CACHED] == 5
        # Another model, or another prompt, is another question.
        fuse(items, endpoint_of(server, model="other"), tmp_path)
        assert len(server.bodies) == 8
        fuse(items_of(5), endpoint_of(server), tmp_path)
        assert server.asked["Tale 4"] == 1
        assert len(server.bodies) == 9


def test_a_rate_limit_is_waited_out(tmp_path: Path) -> None:
    times: dict[str, list[float]] = {}

    def limited(title: str, number: int):
        times.setdefault(title, []).append(time.monotonic())
        return describe(title, number) if number > 1 else web.Response(status=429, headers={"Retry-After": "1"})

    with ChatServer(limited) as server:
        fused = fuse(items_of(2), endpoint_of(server), tmp_path)
    assert fused.sources == (FUSED, FUSED)
    # The client's own first wait would be half a second at most; the server is asked for no less than it said.
    assert all(len(at) == 2 and at[1] - at[0] >= 1.0 for at in times.values())


def test_server_errors_are_tried_again(tmp_path: Path) -> None:
    with ChatServer(
        lambda title, number: web.Response(status=500) if number < 3 else describe(title, number)
    ) as server:
        assert fuse(items_of(1), endpoint_of(server), tmp_path).sources == (FUSED,)
    assert server.asked["Tale 0"] == 3


FAULTS = {
    "server error": (lambda: web.Response(status=503, text="overloaded"), "overloaded"),
    "refused request": (lambda: web.Response(status=400, text="too long"), "too long"),
    "garbage": (lambda: web.Response(text='{"choices": [{', content_type="application/json"), "not JSON"),
    "not a completion": (lambda: web.json_response({"hello": 1}), "holds no message"),
    "no choices": (lambda: web.json_response({**completion("x"), "choices": []}), "holds no message"),
    "plain text": (lambda: web.Response(text="hello"), "holds no message"),
    "no content": (lambda: web.json_response(completion(None)), "holds no message"),
    "blank": (lambda: web.json_response(completion(" <br> ")), "blank"),
    "thoughts alone": (lambda: web.json_response(completion("<think>so</think>")), "blank"),
    "cut": (lambda: web.json_response(completion("It is", "length")), "maximum_tokens = 256"),
    "hang": (lambda: 60.0, "no answer within 3 s"),
    "hang of an attempt": (lambda: 60.0, "APITimeoutError"),
    "rate limit beyond the deadline": (
        lambda: web.Response(status=429, headers={"Retry-After": "60"}), "no answer within 3 s",
    ),
    "key quoted": (lambda: web.Response(status=400, text="bad key s3cret"), "bad key (key)"),
}  # fmt: skip


LIMITS = {
    "hang": {"deadline_seconds": 3.0}, "hang of an attempt": {"attempt_seconds": 3.0},
    "rate limit beyond the deadline": {"deadline_seconds": 3.0, "retries": 2},
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_item_keeps_its_raw_text_and_is_counted_and_asked_again_later(tmp_path: Path, fault: str) -> None:
    respond, message = FAULTS[fault]
    with ChatServer(lambda title, _: respond() if title == "Tale 1" else describe(title, 1)) as server:
        endpoint = endpoint_of(server, **{"retries": 0, **LIMITS.get(fault, {})})
        fused = fuse(items_of(3), endpoint, tmp_path)
        assert fused.sources == (FUSED, FAILED, FUSED)
        assert fused.descriptions == ("A fine thing called Tale 0.", "Raw 1.", "A fine thing called Tale 2.")
        assert len(fused.failures) == 1
        assert fused.failures[0].startswith("item 1: ")
        assert message in fused.failures[0]
        assert "s3cret" not in fused.failures[0]
        server.behaviour = describe
        again = fuse(items_of(3), endpoint, tmp_path)
    assert again.sources == (CACHED, FUSED, CACHED)
    assert again.descriptions[1] == "A fine thing called Tale 1."
    assert server.asked == {"Tale 0": 1, "Tale 1": 2, "Tale 2": 1}


def test_items_without_a_usable_review_are_not_asked_for(tmp_path: Path) -> None:
    with ChatServer() as server:
        fused = fuse(items_of(3), endpoint_of(server), tmp_path, lambda user, row: row == 2)
    assert fused.descriptions == ("Raw 0.", "Raw 1.", "A fine thing called Tale 2.")
    assert fused.sources == (NO_REVIEW, NO_REVIEW, FUSED)
    assert server.asked == {"Tale 2": 1}


def test_only_the_first_failures_are_kept(tmp_path: Path) -> None:
    with ChatServer(lambda *_: web.Response(status=400, text="no")) as server:
        fused = fuse(items_of(9), endpoint_of(server, retries=0), tmp_path)
    assert fused.counts[FAILED] == 9
    assert [failure.split(":")[0] for failure in fused.failures] == [f"item {row}" for row in range(5)]


@pytest.mark.parametrize("status", [401, 404])
def test_a_refused_key_or_an_unknown_model_ends_it_at_once(tmp_path: Path, status: int) -> None:
    with (
        ChatServer(lambda *_: web.Response(status=status, text="no: s3cret")) as server,
        pytest.raises(InputError, match="refuses every request") as caught,
    ):
        fuse(items_of(50), endpoint_of(server), tmp_path)
    assert "s3cret" not in str(caught.value)
    assert len(server.bodies) <= 4


def test_an_endpoint_that_is_down_ends_it_and_the_answers_stay(tmp_path: Path) -> None:
    def dying(title: str, number: int):
        return describe(title, number) if int(title.split()[1]) < 5 else web.Response(status=400, text="gone")

    with ChatServer(dying) as server:
        endpoint = endpoint_of(server, retries=0, failures_in_a_row=6)
        with pytest.raises(InputError, match="failed 6 times in a row, the last time with: BadRequestError"):
            fuse(items_of(100), endpoint, tmp_path)
        assert len(server.bodies) < 25, "a few may have been under way"
        server.behaviour = describe
        server.bodies.clear()
        assert fuse(items_of(100), endpoint, tmp_path).counts == {
            FUSED: 95, CACHED: 5, NO_REVIEW: 0, FAILED: 0, "torn_lines": 0,
        }  # fmt: skip
        assert len(server.bodies) == 95


def test_nobody_at_the_address_is_a_failure_of_the_item(tmp_path: Path) -> None:
    fused = fuse(items_of(1), endpoint_of("http://127.0.0.1:9/v1", retries=0), tmp_path)
    assert fused.sources == (FAILED,)
    assert "Connection error" in fused.failures[0]
    assert not list(tmp_path.iterdir()), "a run without answers leaves no empty file"


def test_the_key_is_not_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ChatServer() as server, caplog.at_level(logging.DEBUG):
        fuse(items_of(1), endpoint_of(server), tmp_path)
        assert "s3cret" not in repr(endpoint_of(server))
    assert "s3cret" not in caplog.text
    assert "s3cret" not in "".join(file.read_text() for file in tmp_path.iterdir())


KILLED = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from test_fusion import endpoint_of, fuse, items_of
fuse(items_of(12), endpoint_of({url!r}, concurrency=1), Path({cache!r}))
"""


def test_after_a_kill_only_what_is_missing_is_asked(tmp_path: Path) -> None:
    with ChatServer(lambda title, _: describe(title, 1) if int(title.split()[1]) < 5 else 600.0) as server:
        paths = [str(Path(__file__).parent), *sys.path]
        code = KILLED.format(paths=paths, url=server.url, cache=str(tmp_path))
        process = subprocess.Popen([sys.executable, "-c", code])
        deadline = time.monotonic() + 120
        while server.asked["Tale 5"] == 0:  # the first five are answered, and the sixth is under way
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
        assert len(read_answers(tmp_path)[0]) == 5
        server.behaviour = describe
        server.bodies.clear()
        fused = fuse(items_of(12), endpoint_of(server), tmp_path)
    assert server.asked == {f"Tale {row}": 1 for row in range(5, 12)}
    assert fused.sources == (CACHED,) * 5 + (FUSED,) * 7
    assert fused.descriptions == tuple(describe(f"Tale {row}", 1) for row in range(12))


@pytest.mark.parametrize("cut", [1, 9, 40])
def test_a_last_line_that_was_cut_short_is_counted_and_asked_again(tmp_path: Path, cut: int) -> None:
    with ChatServer(lambda title, _: f"Schön: {title}") as server:
        fuse(items_of(3), endpoint_of(server, concurrency=1), tmp_path)
        (file,) = tmp_path.iterdir()
        file.write_bytes(file.read_bytes()[:-cut])
        server.bodies.clear()
        fused = fuse(items_of(3), endpoint_of(server), tmp_path)
        assert fused.counts == {FUSED: 1, CACHED: 2, NO_REVIEW: 0, FAILED: 0, "torn_lines": 1}
        assert server.asked == {"Tale 2": 1}
        # The torn line stays where it is and spoils nothing.
        assert fuse(items_of(3), endpoint_of(server), tmp_path).counts[CACHED] == 3
