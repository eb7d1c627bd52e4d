"""The journal on disk: what is in it after a crash, and which run a stage goes on with."""

import os
import subprocess
import sys

import pytest

from cluster.journal import Journal, RunStates, close_ended, is_gone, read_records, this_session

GONE = "host-that-is-another:1:0.00"


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "tracking")
    yield journal
    journal.close()


def records(journal):
    return [record for record, _, _ in read_records(journal.file)]


def start(journal, key, **more):
    journal.append("run", run=key, name=key, parent=None, tags={}, **more)


def test_a_line_that_was_cut_off_is_taken_away_and_the_others_stay(journal):
    for step in range(3):
        journal.append("metrics", run="train/a/1", step=step, values={"loss": 0.5})
    whole = journal.file.read_bytes()
    journal.file.write_bytes(whole + b'{"kind": "metrics", "ru')
    assert len(records(journal)) == 4, "a reader does not see a line before it is whole"
    Journal(journal.folder).close()
    assert journal.file.read_bytes() == whole


def test_a_journal_keeps_its_identity_when_it_is_opened_again(journal):
    Journal(journal.folder).close()
    assert [record["kind"] for record in records(journal)] == ["journal"]


def test_offsets_lead_from_record_to_record(journal):
    for step in range(5):
        journal.append("metrics", run="train/a/1", step=step, values={})
    offset, steps = 0, []
    while chunk := list(read_records(journal.file, offset, 2)):
        steps += [record.get("step") for record, _, _ in chunk]
        offset = chunk[-1][2]
    assert steps == [None, 0, 1, 2, 3, 4]
    assert offset == journal.file.stat().st_size


@pytest.mark.parametrize("status", [None, "FAILED", "KILLED"])
def test_what_did_not_finish_is_gone_on_with(journal, status):
    start(journal, "train/a/1")
    if status:
        journal.append("end", run="train/a/1", status=status, of=journal.session)
    assert RunStates.of(journal.file).attempt("train/a") == ("train/a/1", True)


def test_what_finished_or_has_another_fingerprint_begins_anew(journal):
    start(journal, "train/a/1")
    journal.append("end", run="train/a/1", status="FINISHED", of=journal.session)
    states = RunStates.of(journal.file)
    assert states.attempt("train/a") == ("train/a/2", False)
    assert states.attempt("train/b") == ("train/b/1", False)


def test_an_end_does_not_count_once_another_process_has_gone_on_with_the_run(journal):
    start(journal, "train/a/1")
    journal.append("end", run="train/a/1", status="FAILED", of=GONE)
    states = RunStates.of(journal.file)
    assert states.runs["train/a/1"].status is None


def test_runs_of_processes_that_have_gone_are_closed_and_no_others(journal):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    host, _, _ = this_session().rsplit(":", 2)
    ended = f"{host}:{process.pid}:0.00"  # of the same id, and started at another time
    for number, session in enumerate((ended, this_session(), GONE)):
        start(journal, f"train/{number}/1", session=session)
    close_ended(journal)
    process.communicate(b"\n")
    states = RunStates.of(journal.file).runs
    assert [states[f"train/{number}/1"].status for number in range(3)] == ["FAILED", None, None]
    assert is_gone(f"{host}:{process.pid}:0.00")
    assert not is_gone(this_session())
    assert this_session().rsplit(":", 2)[1] == str(os.getpid())
