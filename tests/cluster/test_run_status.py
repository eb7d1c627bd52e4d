"""What `gream status` reads out of a journal, that of a driver which runs, and of one that was killed."""

import subprocess
import sys

import pytest

from cluster.journal import Journal
from cluster.progress import console
from cluster.run_status import progress_of, show_status, span
from cluster.settings import load_settings
from item_index.input_error import InputError


@pytest.fixture
def journal(tmp_path):
    """A journal in a run folder, and what a stage's beginning would have written beside it."""
    journal = Journal(tmp_path / "tracking")
    (journal.folder / "settings.yaml").write_text(load_settings(None, ["train.steps=60"]).dump())
    journal.append("run", run="gream train/a/1", name="run: gream train", parent=None, tags={})
    journal.append("run", run="train/a/1", name="run/train", parent="gream train/a/1", tags={})
    yield journal
    journal.close()


def shown(folder):
    with console.capture() as captured:
        show_status(folder)
    return " ".join(captured.get().split())


def log(journal, step, **more):
    values = {"train/reward": step / 100, "train/learner_restarts": 1.0}
    journal.append("metrics", run="train/a/1", step=step, values=values, **more)


def test_a_running_stage_shows_step_pace_and_latest_values(journal, tmp_path):
    for step in range(1, 31):
        log(journal, step, time=1_000_000 + 2000 * step)
    command, train = progress_of(journal.file)
    assert (command.status, train.status) == ("RUNNING", "RUNNING")
    assert train.steps[-1] == (30, 1060.0)
    assert train.values["train/reward"] == 0.3
    text = shown(tmp_path)
    assert "step 30/60, 2.0 s each, about 60 s left" in text
    assert "reward 0.3; learner restarts 1" in text
    assert "records are not in MLflow yet" in text


def test_an_ended_stage_shows_how_it_ended_and_no_time_left(journal, tmp_path):
    log(journal, 1)
    log(journal, 2)
    journal.append("end", run="train/a/1", status="KILLED", of=journal.session)
    assert "KILLED" in shown(tmp_path)
    assert "s left" not in shown(tmp_path)


def test_a_driver_that_has_gone_without_a_word_is_lost_until_another_goes_on(journal, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    host = journal.session.split(":")[0]
    journal.append("run", run="train/a/1", name="run/train", parent=None, tags={}, session=f"{host}:{process.pid}:1.00")
    process.communicate(b"\n")
    log(journal, 1)
    assert "LOST" in shown(tmp_path)
    journal.append("run", run="train/a/1", name="run/train", parent=None, tags={})
    assert "LOST" not in shown(tmp_path)
    assert progress_of(journal.file)[-1].values["train/reward"] == 0.01, "what it reached before counts"


def test_a_folder_without_a_run_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="there is no run"):
        show_status(tmp_path)


def test_lengths_of_time_are_said_as_people_say_them():
    assert [span(seconds) for seconds in (-1, 45, 720, 12_000)] == ["0 s", "45 s", "12 min", "3 h 20 min"]
