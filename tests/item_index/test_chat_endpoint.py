"""What asking an endpoint costs and why it fails, counted at a real HTTP server; fusion's tests hold the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
from aiohttp import web
from chat_server import ChatServer, completion, describe

from item_index.answer_cache import Answer, AskingReport, read_answers
from item_index.chat_endpoint import Endpoint, ask_endpoint


def ask(server: ChatServer, titles: list[str], cache: Path, **limits) -> AskingReport:
    limits = {"concurrency": 3, "retries": 2, **limits}
    endpoint = Endpoint(server.url, "scribe", "s3cret", "Be brief.", "corpus.teacher", **limits)
    return ask_endpoint(endpoint, [(title, f"Title: {title}") for title in titles], cache, lambda: None)


def test_instruction_and_prompt_reach_the_endpoint_and_shape_the_key(tmp_path: Path) -> None:
    with ChatServer() as server:
        ask(server, ["a"], tmp_path)
    assert server.bodies[0]["messages"] == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Title: a"},
    ]  # fmt: skip
    keys = {
        Endpoint("u", model, "k", instruction, "s", maximum_tokens=tokens, temperature=temperature).cache_key(prompt)
        for model in ("m", "n") for instruction in ("i", "j") for tokens in (8, 9) for temperature in (0.0, None)
        for prompt in ("p", "q")
    }  # fmt: skip
    assert len(keys) == 32
    assert Endpoint("u", "m", "k", "i", "s").cache_key("p") == Endpoint("v", "m", "l", "i", "t").cache_key("p")


def test_tokens_are_kept_with_the_answer_and_summed_also_of_answers_that_cannot_be_used(tmp_path: Path) -> None:
    def behaviour(title: str, _: int):
        usage = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
        return web.json_response(completion(f"About {title}.", "length" if title == "cut" else "stop", usage))

    with ChatServer(behaviour) as server:
        report = ask(server, ["a", "cut", "b"], tmp_path)
    assert read_answers(tmp_path)[0] == {"a": Answer("About a.", 10, 3), "b": Answer("About b.", 10, 3)}
    assert {key: failure.reason for key, failure in report.failures.items()} == {"cut": "cut off"}
    assert (report.calls, report.retries, report.prompt_tokens, report.completion_tokens) == (3, 0, 30, 9)


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": "many"}, {"prompt_tokens": -3}, "cheap", 7])
def test_an_endpoint_that_reports_no_tokens_counts_none(tmp_path: Path, usage: object) -> None:
    with ChatServer(lambda title, _: web.json_response(completion("Yes.", usage=usage))) as server:
        report = ask(server, ["a"], tmp_path)
    assert report == AskingReport(calls=1)
    assert read_answers(tmp_path)[0] == {"a": Answer("Yes.")}


def test_retries_are_bounded_and_counted_as_the_server_sees_them(tmp_path: Path) -> None:
    def behaviour(title: str, number: int):
        if title == "once" and number == 1:
            return web.Response(status=429, headers={"Retry-After": "0.1"})
        return web.Response(status=500) if title == "never" else describe(title, number)

    with ChatServer(behaviour) as server:
        report = ask(server, ["fine", "once", "never"], tmp_path)
        assert server.asked == {"fine": 1, "once": 2, "never": 3}
        assert (report.calls, report.retries) == (6, 3)
        assert {key: failure.reason for key, failure in report.failures.items()} == {"never": "server error"}
        assert set(read_answers(tmp_path)[0]) == {"fine", "once"}


REASONS = {
    "rate limit": lambda: web.Response(status=429),
    "server error": lambda: web.Response(status=502),
    "refused request": lambda: web.Response(status=400),
    "not a completion": lambda: web.json_response({"hello": 1}),
    "blank": lambda: web.json_response(completion("")),
    "cut off": lambda: web.json_response(completion("It is", "length")),
    "attempt timeout": lambda: 60.0,
}


@pytest.mark.parametrize("reason", REASONS)
def test_every_failure_has_a_reason_that_can_be_counted(tmp_path: Path, reason: str) -> None:
    with ChatServer(lambda *_: REASONS[reason]()) as server:
        report = ask(server, ["a", "b"], tmp_path, retries=0, attempt_seconds=1.0)
    assert [failure.reason for failure in report.failures.values()] == [reason] * 2
    assert report.calls == 2


def test_garbage_that_is_not_json_is_no_completion(tmp_path: Path) -> None:
    with ChatServer(lambda *_: web.Response(text="{", content_type="application/json")) as server:
        report = ask(server, ["a"], tmp_path, retries=0)
    assert report.failures["a"].reason == "not a completion"
