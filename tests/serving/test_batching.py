"""Batches fill while another is computed, keep the order, and leave out what nobody waits for."""

import asyncio

import pytest

pytest.importorskip("pydantic")

from qtuning_fast.serving.batching import Batching


class Doubling:
    """Doubles numbers, once it may; notes the batches."""

    def __init__(self):
        self.batches, self.may = [], asyncio.Event()

    async def __call__(self, items):
        self.batches.append(items)
        await self.may.wait()
        if 13 in items:
            raise ValueError("13")
        return [2 * item for item in items]


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario(), 20))


def test_what_arrives_meanwhile_makes_the_next_batch():
    async def scenario():
        compute = Doubling()
        batching = Batching(compute, 4)
        first = asyncio.ensure_future(batching.answer([1]))
        await asyncio.sleep(0.01)
        others = [asyncio.ensure_future(batching.answer(items)) for items in ([2, 3], [4], [5, 6], [7])]
        await asyncio.sleep(0.01)
        compute.may.set()
        return compute.batches, await first, await asyncio.gather(*others)

    batches, first, others = run(scenario)
    assert batches == [[1], [2, 3, 4], [5, 6, 7]]
    assert first == [2] and others == [[4, 6], [8], [10, 12], [14]]


def test_a_request_with_more_than_a_batch_has_one_of_its_own():
    async def scenario():
        compute = Doubling()
        compute.may.set()
        batching = Batching(compute, 2)
        return await asyncio.gather(*(batching.answer(items) for items in ([1, 2, 3], [4]))), compute.batches

    assert run(scenario) == ([[2, 4, 6], [8]], [[1, 2, 3], [4]])


def test_what_is_cancelled_before_its_batch_is_not_computed():
    async def scenario():
        compute = Doubling()
        batching = Batching(compute, 4)
        first, second, third = (asyncio.ensure_future(batching.answer([n])) for n in (1, 2, 3))
        await asyncio.sleep(0.01)
        late, later = (asyncio.ensure_future(batching.answer([n])) for n in (4, 5))
        await asyncio.sleep(0.01)
        second.cancel()  # within its batch: the others still get theirs
        late.cancel()
        await asyncio.sleep(0)
        compute.may.set()
        return await asyncio.gather(first, third, later), compute.batches

    assert run(scenario) == ([[2], [6], [10]], [[1, 2, 3], [5]])


def test_an_error_ends_its_batch_and_no_other():
    async def scenario():
        compute = Doubling()
        compute.may.set()
        batching = Batching(compute, 1)
        wrong, right = await asyncio.gather(batching.answer([13]), batching.answer([2]), return_exceptions=True)
        return repr(wrong), right, await batching.answer([3])

    assert run(scenario) == ("ValueError('13')", [4], [6])
