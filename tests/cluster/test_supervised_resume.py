"""The supervised stage is killed, really, and goes on as if nothing had happened: same losses, same weights."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch
from small_tables import write_tables

from cluster.pipeline import run_stages
from cluster.settings import load_settings

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]


def overrides_of(folder, *more):
    return [
        *write_tables(folder / "data"), f"run_folder={folder / 'run'}", "corpus.reasoning_rows=40", "sft.passes=2",
        "sft.batch_rows=16", "sft.learning_rate=1.0e-3", "sft.checkpoint_steps=5", "sft.supervision=dense",
        "cluster.threads=1", *more,
    ]  # fmt: skip


def lines_of(folder):
    file = folder / "run" / "sft" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def losses(folder):
    return [(line["step"], line["pass"], line["loss"], line.get("evaluation_loss")) for line in lines_of(folder)]


def weights(folder):
    return safetensors.torch.load_file(folder / "run" / "sft" / "checkpoint" / "model.safetensors")


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, ray_cluster):
    """A run of one rank that nobody disturbs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_stages(load_settings(None, overrides_of(folder)), ["index", "corpus", "sft"])
    steps = [line["step"] for line in lines_of(folder)]
    assert steps == list(range(1, len(steps) + 1))
    assert not (folder / "run" / "sft" / "states").exists(), "a finished stage keeps no states"
    return folder


def end_of_first_pass(folder):
    return sum(line["pass"] == 0 for line in lines_of(folder))


def start_and_kill(overrides, folder, *, at_step):
    """`gream sft` in a process of its own, killed as soon as the step's line is there."""
    process = subprocess.Popen(
        [Path(sys.executable).with_name("gream"), "sft", *overrides], cwd=ROOT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while len(lines_of(folder)) < at_step:
        assert process.poll() is None, "the stage ended by itself"
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)


def test_a_killed_stage_goes_on_where_its_latest_state_was_written(uninterrupted, tmp_path):
    """Killed in the middle of the first pass, then at its end; the third start finishes."""
    overrides = overrides_of(tmp_path)
    run_stages(load_settings(None, overrides), ["index", "corpus"])
    boundary = end_of_first_pass(uninterrupted)
    start_and_kill(overrides, tmp_path, at_step=8)
    start_and_kill(overrides, tmp_path, at_step=boundary)
    done_before = len(lines_of(tmp_path))
    run_stages(load_settings(None, overrides), ["sft"])
    assert losses(tmp_path) == losses(uninterrupted)
    assert_same_weights(weights(tmp_path), weights(uninterrupted))
    assert done_before < len(losses(uninterrupted)), "the kill came too late to show anything"


def test_a_lost_rank_is_replaced_within_the_stage(uninterrupted, tmp_path):
    overrides = overrides_of(tmp_path)
    settings = load_settings(None, overrides)
    run_stages(settings, ["index", "corpus"])
    killed = []

    def kill_the_rank():
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not killed:
            if len(lines_of(tmp_path)) >= 8:
                for process in psutil.process_iter(["cmdline"]):
                    if any("RayTrainWorker" in part for part in process.info["cmdline"] or ()):
                        process.kill()
                        killed.append(process.pid)
            time.sleep(0.02)

    thread = threading.Thread(target=kill_the_rank, daemon=True)
    thread.start()
    run_stages(settings, ["sft"])
    thread.join(timeout=10)
    assert len(killed) == 1
    assert losses(tmp_path) == losses(uninterrupted)
    assert_same_weights(weights(tmp_path), weights(uninterrupted))


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_ranks_train_as_one_does(uninterrupted, tmp_path, zero_stage):
    overrides = overrides_of(
        tmp_path, "sft.ranks=2", f"sft.zero_stage={zero_stage}", "sft.micro_batch_tokens=700",
        "sft.gradient_checkpointing=true",
    )  # fmt: skip
    run_stages(load_settings(None, overrides), ["index", "corpus", "sft"])
    expected, got = losses(uninterrupted), losses(tmp_path)
    assert [line[:2] for line in got] == [line[:2] for line in expected]
    for (*_, loss, evaluated), (*_, one_loss, one_evaluated) in zip(got, expected, strict=True):
        assert loss == pytest.approx(one_loss, rel=1e-4)
        assert (evaluated is None) == (one_evaluated is None)
        assert evaluated is None or evaluated == pytest.approx(one_evaluated, rel=1e-4)
    one = weights(uninterrupted)
    for name, weight in weights(tmp_path).items():
        torch.testing.assert_close(weight, one[name], rtol=1e-3, atol=1e-4)
