"""Chains as they are written: those of a batch call, several requests at once, and requests that are given up."""

import asyncio
import time

import numpy as np
import pytest

from actors.chain_streams import ChainStreams

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def streams(rollout_engine):
    return ChainStreams(rollout_engine)


def options(tiny, row, **changed):
    prompts = tiny.prompts(["reasoning"], budget=40, rows=[row])
    return prompts, {
        "prompt": prompts.tokens[0].tolist(), "chains": 3, "budget": 40, "temperature": 1.0, "excluded": [], "seed": 7,
        **changed,
    }  # fmt: skip


async def collected(streams, arguments):
    chains, ended = [[] for _ in range(arguments["chains"])], 0
    async for news in streams.sample(**arguments):
        chains[news.chain] += news.tokens
        ended += news.ended
    assert ended == arguments["chains"]
    return chains


def test_streamed_chains_are_those_of_a_whole_response_up_to_the_answer(tiny, rollout_engine, streams):
    answer_open = tiny.constraint.tokens.answer_open

    async def together():
        return await asyncio.gather(*(collected(streams, options(tiny, row)[1]) for row in range(4)))

    for row, chains in enumerate(asyncio.run(together())):
        prompts, _ = options(tiny, row)
        batch = rollout_engine.generate(prompts, responses=3, seeds=[7])
        whole = [response.tolist() for response in batch.responses]
        assert chains == [tokens[: tokens.index(answer_open) + 1] for tokens in whole]


def test_a_request_that_is_given_up_leaves_the_engine(tiny, rollout_engine, streams):
    async def given_up():
        streaming = streams.sample(**options(tiny, 0, budget=200)[1])
        async for _ in streaming:
            break
        await streaming.aclose()

    asyncio.run(given_up())
    deadline = time.monotonic() + 10
    while streams.open_requests or rollout_engine.llm.llm_engine.has_unfinished_requests():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kept = rollout_engine.llm.llm_engine.output_processor
    assert not kept.parent_requests
    assert not kept.request_states
    assert asyncio.run(collected(streams, options(tiny, 1)[1]))


@pytest.mark.parametrize(
    ("changed", "message"), [({"budget": 3}, "at least"), ({"excluded": np.arange(34).tolist()}, "excluded")]
)
def test_an_impossible_request_fails_alone(tiny, streams, changed, message):
    with pytest.raises(ValueError, match=message):
        asyncio.run(collected(streams, options(tiny, 0, **changed)[1]))
    assert asyncio.run(collected(streams, options(tiny, 1)[1]))
