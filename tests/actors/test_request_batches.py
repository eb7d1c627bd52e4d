"""Batches of concurrent requests: who shares one, what cancelled and failed requests do to the others."""

import asyncio

import pytest

from actors.request_batches import RequestBatches


def batches_of(most, **options):
    """Batches whose work waits for `free`, doubles numbers and fails at 13; and the batches that were worked on."""
    done, free = [], asyncio.Event()

    async def work(numbers):
        done.append(numbers)
        await free.wait()
        if 13 in numbers:
            raise ValueError("thirteen")
        return [2 * number for number in numbers]

    return RequestBatches(work, most=most, **options), done, free


async def begun(batches, numbers):
    tasks = [asyncio.create_task(batches.result(number)) for number in numbers]
    await asyncio.sleep(0.01)
    return tasks


def test_what_comes_while_a_batch_is_worked_on_shares_the_next_one():
    async def run():
        batches, done, free = batches_of(most=3)
        first = await begun(batches, [1])
        others = await begun(batches, [2]) + await begun(batches, [3, 4, 5, 6])
        assert done == [[1]]
        free.set()
        assert await asyncio.gather(*first, *others) == [2, 4, 6, 8, 10, 12]
        assert done == [[1], [2, 3, 4], [5, 6]]
        assert await batches.result(7) == 14

    asyncio.run(run())


def test_several_batches_are_worked_on_at_once():
    async def run():
        batches, done, free = batches_of(most=8, at_once=2)
        tasks = [task for number in range(1, 6) for task in await begun(batches, [number])]
        assert done == [[1], [2]]
        assert [number for number, _ in batches.waiting] == [3, 4, 5]
        free.set()
        assert await asyncio.gather(*tasks) == [2, 4, 6, 8, 10]
        assert done == [[1], [2], [3, 4, 5]]
        assert await asyncio.gather(batches.result(6), batches.result(7)) == [12, 14]

    asyncio.run(run())


def test_a_request_that_finds_nobody_working_waits_for_others():
    async def run():
        batches, done, free = batches_of(most=8, wait_seconds=0.2)
        free.set()
        tasks = await begun(batches, [1]) + await begun(batches, [2])
        assert await asyncio.gather(*tasks) == [2, 4]
        assert done == [[1, 2]]

    asyncio.run(run())


def test_a_cancelled_request_costs_no_work_and_takes_nobody_with_it():
    async def run():
        batches, done, free = batches_of(most=2)
        first = await begun(batches, [1])
        leaving, staying, alone, last = await begun(batches, [2, 3, 4, 5])
        for task in (first[0], leaving, alone, last):
            task.cancel()
        await asyncio.sleep(0)
        free.set()
        assert await staying == 6
        assert done == [[1], [3]]
        with pytest.raises(asyncio.CancelledError):
            await first[0]
        assert await batches.result(9) == 18

    asyncio.run(run())


def test_an_error_is_that_of_its_batch_alone():
    async def run():
        batches, done, free = batches_of(most=2)
        tasks = await begun(batches, [1]) + await begun(batches, [12, 13, 14])
        free.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert results[0] == 2
        assert [str(error) for error in results[1:3]] == ["thirteen", "thirteen"]
        assert results[3] == 28
        assert done == [[1], [12, 13], [14]]

    asyncio.run(run())
