"""The corpus stage with a language model as teacher: bad endpoints, a kill in mid-job, workers, and a real engine."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from aiohttp import web
from chat_server import ChatServer, completion
from small_tables import write_tables

from cluster.index import index_stage
from cluster.pipeline import corpus_stage, fingerprint
from cluster.settings import load_settings
from cluster.teaching import engine_cache_key, language_model_teacher
from curriculum.corpus import load_corpus
from curriculum.teachers import PARTS
from item_index.answer_cache import Answer, AnswerWriter, read_answers
from item_index.input_error import InputError

ROWS = 30
GOOD = "\n".join(f"{label} something pleasant" for label in PARTS)
USAGE = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}


class Recorder:
    """Stands in for the tracker: MLflow takes seconds to start and has its own tests."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def metrics(self, values: dict[str, float]) -> None:
        self.values |= values


def run_corpus(folder: Path, *overrides: str) -> tuple[dict[str, Any], Recorder]:
    """The stage on the small tables, with an index that is made where it is missing."""
    settings = load_settings(
        None,
        [*write_tables(folder / "data"), f"run_folder={folder}", f"corpus.reasoning_rows={ROWS}", *overrides],
    )  # fmt: skip
    recorder: Any = Recorder()
    for name, stage in (("index", index_stage), ("corpus", corpus_stage)):
        (folder / name).mkdir(exist_ok=True)
        if name == "corpus" or not (folder / "index" / "current.json").exists():
            summary = stage(settings, folder / name, recorder)
    return summary, recorder


def teacher_at(server: ChatServer, **values: Any) -> str:
    values = {"kind": "endpoint", "url": server.url, "model": "scribe", "concurrency": 3, "retries": 2, **values}
    return f"corpus.teacher={values!r}".replace("None", "null").replace("True", "true")


class Faults:
    """Behaviour that goes by the order in which prompts come in: of ten, seven are difficult."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, prompt: str, request: int) -> Any:
        number = self.numbers.setdefault(prompt, len(self.numbers)) % 10
        good = web.json_response(completion(GOOD, usage=USAGE))
        match number:
            case 0 if request == 1:
                return web.Response(status=429, headers={"Retry-After": "0.2"})
            case 1 if request == 1:
                return web.Response(status=500)
            case 2:
                return web.Response(status=500)
            case 3:
                return web.json_response(completion(GOOD, "length", USAGE))
            case 4:
                return web.json_response(completion("As a model I cannot.", usage=USAGE))
            case 5:
                return asyncio.sleep(0.3, good)
            case 6:
                return web.json_response({"choices": "none"})
        return good


def test_a_job_against_a_bad_endpoint_completes_loses_nothing_and_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ChatServer(Faults(), subject_of=str) as server:
        summary, recorder = run_corpus(tmp_path, teacher_at(server))
        asked = server.asked
    teacher = summary["teacher"]
    assert len(asked) == ROWS, "every prompt is another one"
    assert Counter(asked.values()) == {1: 21, 2: 6, 3: 3}, "retries are bounded"
    assert (teacher["calls"], teacher["retries"]) == (42, 12)
    assert teacher["failed"] == {"server error": 3, "cut off": 3, "not a completion": 3}
    assert teacher["unusable"] == {"part 'Evidence:' is missing": 3}
    assert (teacher["targets"], teacher["asked"], teacher["cached"]) == (ROWS, ROWS, 0)
    assert (teacher["rejected"], teacher["fell_back"], teacher["left_out"]) == (0, 0, 12)
    # 18 lessons, 3 that are cut off and 3 that are none.
    assert (teacher["prompt_tokens"], teacher["completion_tokens"]) == (240, 72)
    assert summary["rows_by_source"] == {"endpoint": 18}
    assert len(read_answers(tmp_path / "corpus" / "teacher")[0]) == 21
    assert recorder.values["teacher/failed"] == 9
    assert recorder.values["teacher/completion_tokens"] == 72
    printed = " ".join(capsys.readouterr().out.split())
    assert "failed 9 (server error: 3, cut off: 3, not a completion: 3); unusable 3" in printed
    assert "42 calls, 12 of them retries; 240 prompt and 72 completion tokens" in printed
    assert "remove" in printed

    # The endpoint has recovered: only what failed is asked again.
    with ChatServer(lambda *_: web.json_response(completion(GOOD, usage=USAGE)), subject_of=str) as server:
        summary, _ = run_corpus(tmp_path, teacher_at(server))
        assert len(server.bodies) == 9
    teacher = summary["teacher"]
    assert (teacher["asked"], teacher["cached"], teacher["left_out"]) == (9, 21, 3)
    assert (teacher["prompt_tokens"], teacher["cached_prompt_tokens"]) == (90, 210)
    corpus = load_corpus(tmp_path / "corpus", tmp_path / "index")
    assert len(corpus.reasoning) == len(corpus.user_texts) == 27


def test_the_fallback_fills_in_and_is_marked(tmp_path: Path) -> None:
    with ChatServer(Faults(), subject_of=str) as server:
        summary, _ = run_corpus(tmp_path, teacher_at(server, fallback="metadata", retries=1))
    assert summary["rows_by_source"] == {"endpoint": 18, "metadata": 12}
    assert (summary["teacher"]["fell_back"], summary["teacher"]["left_out"]) == (12, 0)
    for name in ("reasoning", "user_texts"):
        table = pq.read_table(tmp_path / "corpus" / f"{name}.parquet").to_pydict()
        assert Counter(table["source"]) == {"endpoint": 18, "metadata": 12}
        text = table["think" if name == "reasoning" else "query"]
        for said, source in zip(text, table["source"], strict=True):
            assert ("something pleasant" in said) == (source == "endpoint")


def test_a_missing_key_is_named_and_another_teacher_is_another_corpus(tmp_path: Path) -> None:
    overrides = write_tables(tmp_path / "data")
    settings = load_settings(
        None, [*overrides, "corpus.teacher={kind: endpoint, url: 'http://h/v1', model: m, key_variable: NO_SUCH_KEY}"]
    )
    with pytest.raises(InputError, match="NO_SUCH_KEY is not set") as caught:
        language_model_teacher(settings, tmp_path)
    assert caught.value.field == "corpus.teacher.key_variable"
    assert fingerprint(settings, "corpus") != fingerprint(load_settings(None, overrides), "corpus")


def test_a_checkpoint_that_cannot_chat_is_named(tmp_path: Path, tiny) -> None:
    def teacher(checkpoint: Path):
        override = f"corpus.teacher={{kind: engine, checkpoint: '{checkpoint}'}}"
        return language_model_teacher(load_settings(None, [override]), tmp_path)

    with pytest.raises(InputError, match="there is no checkpoint"):
        teacher(tmp_path / "nowhere")
    without = tmp_path / "without"
    without.mkdir()
    for file in tiny.checkpoint.iterdir():
        if file.name != "chat_template.jinja":
            (without / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="no chat template"):
        teacher(without)


KILLED = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from test_teaching import run_corpus
run_corpus(Path({folder!r}), {teacher!r})
"""


def test_after_a_kill_no_persisted_answer_is_asked_for_again(tmp_path: Path) -> None:
    answered, in_flight = 8, 3
    run_corpus(tmp_path)  # the index
    order: dict[str, int] = {}

    def behaviour(prompt: str, _: int) -> Any:
        number = order.setdefault(prompt, len(order))
        return GOOD if number < answered else asyncio.sleep(600.0, GOOD)

    with ChatServer(behaviour, subject_of=str) as server:
        paths = [str(Path(__file__).parent), *sys.path]
        code = KILLED.format(paths=paths, folder=str(tmp_path), teacher=teacher_at(server, concurrency=in_flight))
        process = subprocess.Popen([sys.executable, "-c", code])
        deadline = time.monotonic() + 200
        while len(order) < answered + in_flight:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
        assert len(read_answers(tmp_path / "corpus" / "teacher")[0]) == answered
        first = server.asked
        server.behaviour = lambda *_: GOOD
        summary, _ = run_corpus(tmp_path, teacher_at(server))
        total = server.asked
    assert len(first) == answered + in_flight
    repeated = {prompt for prompt, count in total.items() if count > 1}
    assert repeated == {prompt for prompt, number in order.items() if answered <= number < answered + in_flight}
    assert (len(total), max(total.values())) == (ROWS, 2)
    assert (summary["teacher"]["cached"], summary["teacher"]["asked"]) == (answered, ROWS - answered)
    assert summary["rows_by_source"] == {"endpoint": ROWS}


@pytest.mark.engines
@pytest.mark.usefixtures("ray_cluster")
def test_workers_give_what_one_process_gives(tmp_path: Path) -> None:
    def behaviour(prompt: str, _: int) -> Any:  # by the prompt alone, because workers ask in another order
        kind = sum(prompt.encode()) % 4
        answers = [GOOD, "no", web.Response(status=400), web.json_response(completion(GOOD, "length", USAGE))]
        return answers[kind]

    summaries, rows = [], []
    with ChatServer(behaviour, subject_of=str) as server:
        for distributed in (False, True):
            folder = tmp_path / str(distributed)
            folder.mkdir()
            teacher = teacher_at(server, distributed=distributed, fallback="metadata", retries=0)
            summaries.append(run_corpus(folder, teacher, "cluster.index_workers=2")[0])
            rows.append([pq.read_table(folder / "corpus" / f"{n}.parquet") for n in ("reasoning", "user_texts")])
    for summary in summaries:
        summary["teacher"]["messages"] = sorted(summary["teacher"]["messages"])
    assert summaries[0] == summaries[1]
    assert 0 < summaries[0]["teacher"]["fell_back"] < ROWS
    assert rows[0] == rows[1]


@pytest.mark.engines
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_cluster")
def test_what_an_engine_writes_that_is_no_lesson_is_counted_and_falls_back(tmp_path: Path, tiny) -> None:
    teacher: dict[str, Any] = {
        "kind": "engine", "checkpoint": str(tiny.checkpoint), "context_tokens": 2048, "maximum_tokens": 16,
        "fallback": "metadata",
    }  # fmt: skip
    overrides = [f"corpus.teacher={teacher!r}", "cluster.kv_cache_mib=64", "cluster.rollout_sequences=16"]
    summary, _ = run_corpus(tmp_path, *overrides)
    counts = summary["teacher"]
    assert summary["rows_by_source"] == {"metadata": ROWS}
    assert sum(counts["failed"].values()) + sum(counts["unusable"].values()) == counts["fell_back"] == ROWS
    assert (counts["calls"], counts["retries"], counts["asked"]) == (ROWS, 0, ROWS)
    assert counts["prompt_tokens"] > ROWS * 100
    assert 0 < counts["completion_tokens"] <= ROWS * 16

    # Answers of the engine come from the cache too: one that is there is not asked for.
    settings = load_settings(None, [*overrides, f"run_folder={tmp_path}"])
    model = language_model_teacher(settings, tmp_path / "corpus")
    assert model is not None
    assert model.source == "engine"
    persisted = len(read_answers(tmp_path / "corpus" / "teacher")[0])
    assert persisted == sum(counts["unusable"].values())
    collected = model.answer(["History:\n1. Rain\nNext item: Sun"])
    assert collected.cost["calls"] == 1
    key = engine_cache_key(settings.corpus.teacher, settings.seed)("What next?")
    with AnswerWriter(tmp_path / "corpus" / "teacher") as writer:
        writer.write(key, Answer(GOOD, 5, 6))
    again = model.answer(["What next?"])
    assert again.outcomes == (Answer(GOOD, 5, 6),)
    assert again.cost["calls"] == 0
