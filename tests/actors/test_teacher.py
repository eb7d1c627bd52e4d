"""The teacher's engine, a real vLLM on the tiny checkpoint: seeds, limits, prompts that do not fit."""

from __future__ import annotations

import pytest
import ray

from actors.rollout import ENVIRONMENT
from actors.teacher import TeacherActor

pytestmark = pytest.mark.engines
PROMPTS = [f"History:\n1. Tale {number}\nNext item: Rain" for number in range(6)]
SEEDS = [100 + 7 * number for number in range(6)]


class RemoteEngine:
    """The teacher in a process of its own: the rollout engine of other tests lives in this one."""

    def __init__(self, actor) -> None:
        self.actor = actor

    def answer(self, prompts, seeds):
        return ray.get(self.actor.answer.remote(prompts, seeds), timeout=280)


@pytest.fixture(scope="module")
def engine(tiny, ray_cluster):
    actor = TeacherActor.options(num_cpus=1, runtime_env={"env_vars": ENVIRONMENT}).remote(
        str(tiny.checkpoint), instruction="Explain.", maximum_tokens=12, temperature=1.0, context_tokens=256,
        dtype="float32", kv_cache_mib=64, sequences=16, threads=1,
    )  # fmt: skip
    yield RemoteEngine(actor)
    ray.kill(actor)


def test_an_answer_depends_on_its_prompt_and_seed_and_not_on_its_neighbours(engine: RemoteEngine) -> None:
    first = engine.answer(PROMPTS, SEEDS)
    assert engine.answer(PROMPTS[::-1], SEEDS[::-1])[::-1] == first
    assert engine.answer(PROMPTS[2:4], SEEDS[2:4]) == first[2:4]
    assert engine.answer(PROMPTS, [seed + 1 for seed in SEEDS]) != first
    assert len({answer.text for answer in first}) > 1


def test_tokens_are_counted_and_limits_hold(engine: RemoteEngine, tiny) -> None:
    for prompt, answer in zip(PROMPTS, engine.answer(PROMPTS, SEEDS), strict=True):
        assert answer.ending in ("stop", "length")
        assert (answer.completion_tokens == 12) or answer.ending == "stop"
        assert 0 < answer.completion_tokens <= 12
        messages = [{"role": "system", "content": "Explain."}, {"role": "user", "content": prompt}]
        rendered = tiny.tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
        assert answer.prompt_tokens == len(rendered["input_ids"])


def test_a_prompt_that_does_not_fit_is_told_and_the_others_are_answered(engine: RemoteEngine) -> None:
    long = "History: " + "word and word " * 200
    answers = engine.answer([PROMPTS[0], long, PROMPTS[1]], [SEEDS[0], 5, SEEDS[1]])
    assert answers[1].ending == "prompt too long"
    assert answers[1].prompt_tokens > 256
    assert answers[1].completion_tokens == 0
    assert [answers[0], answers[2]] == engine.answer(PROMPTS[:2], SEEDS[:2])
    assert [answer.ending for answer in engine.answer([long], [5])] == ["prompt too long"]
