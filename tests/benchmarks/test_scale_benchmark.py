"""The scale benchmark: the loop's own driver over a simulated fleet that imports no torch, and what its table says."""

import io
import os

import pytest
from rich.console import Console

from benchmarks.child_process import Outcome, run_child
from benchmarks.local_nodes import LocalNodes
from benchmarks.scale import report_table
from benchmarks.scale_driver import Task, command
from benchmarks.scale_fleet import Pace

FLEET = {"engines": 3, "prompts": 6, "responses": 4, "reasoning_budget": 40, "steps": 1}


@pytest.mark.engines
@pytest.mark.timeout(600)
def test_a_step_over_a_simulated_fleet_on_two_nodes_counts_what_it_gives(monkeypatch):
    with LocalNodes([2, 2]) as nodes:
        for name, value in nodes.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PYTHONPATH", os.getcwd())
        task = Task(nodes.address, **FLEET, seconds_per_token=0.001, engine_processes=2)
        outcome = run_child("3 engines", nodes.command(*command(task)), 500)
    assert not outcome.problem
    numbers = outcome.numbers
    assert numbers["groups"] >= 6
    assert numbers["weights stored"] == Pace.chunks * Pace.chunk_bytes
    least_tokens = numbers["groups"] * 4 * 5  # an answer is four codes and the end, a chain is longer
    assert numbers["tokens"] > least_tokens
    assert numbers["rollouts stored"] > 8 * numbers["tokens"], "a token and its log-probability"
    # Generation, weights and a score for each engine, one update, one stream of chunks: each is a call and an answer.
    assert numbers["messages"] >= 2 * (3 * 3 + 2) + Pace.chunks
    assert 0 < numbers["driver CPU"] <= numbers["driver CPU, most"]
    assert 0 < numbers["through the driver"] < numbers["weights stored"]


def test_the_table_says_that_it_is_a_simulation_and_what_a_group_costs():
    numbers = {
        "driver CPU": 0.5, "driver CPU, most": 0.7, "step": 3.0, "messages": 120.0, "through the driver": 2.0**20,
        "rollouts stored": 3 * 2.0**20, "weights stored": 15 * 2.0**20, "groups": 64.0, "tokens": 5000.0,
    }  # fmt: skip
    console = Console(width=200, record=True, file=io.StringIO())
    title = "SIMULATED fleet"
    console.print(report_table(title, [Outcome("8 engines", numbers), Outcome("64 engines", {}, problem="stopped")]))
    text = console.export_text()
    assert title in text
    assert "16.00" in text, "KiB a group"
    assert "stopped" in text
