"""The plans of a GPU, against a clock and a GPU that are not there: which rows are home after how many seconds."""

import pytest

from qtuning_fast.bench.plans import gpu_tests, plan, tune
from qtuning_fast.bench.plans.plan import PLANS, TOTAL_SECONDS, all_steps
from qtuning_fast.bench.plans.rehearsal import STEPS, TESTS, Machine, rehearse, timetable

SLOW = Machine(slower=1.5)


def home(world, seconds):
    """The rows that the one file holds if the run is killed after so many seconds."""
    return {row for row, when in world.home.items() if when <= seconds}


def rows(shapes, peers, question="attention"):
    return {f"{question}: {shape}: {peer}" for shape in shapes for peer in peers}


@pytest.fixture(scope="module")
def first():
    return rehearse("gpu", Machine())


def test_after_a_minute_it_is_known_whether_the_kernels_are_right(first):
    _, world = first
    assert home(world, 60) >= {"smoke: machine", "smoke: fused", "smoke: composed"}
    told = [row for row in home(world, 60) if row.startswith("tests: ")]
    assert len(told) >= 40 and sum("real_shapes[bfloat16" in row for row in told) == 6
    assert sum("the_same_bits" in row and "fused" in row for row in told) == 3


def test_after_three_minutes_the_tests_that_tell_are_home_and_the_first_peers(first):
    found = home(first[1], 180)
    assert found >= {"ceilings", "memcheck: memcheck", "memcheck: racecheck"} | rows(
        ["bert-base"], ["fused", "fused-frozen-gate"]
    )
    told = [row for row in found if row.startswith("tests: ")]
    assert len(told) >= 220 and sum("float32" in row for row in told) == 3
    assert sum("vendors" in row for row in told) >= 51 and any("test_mixed" in row for row in told)


def test_after_five_minutes_most_peers_are_home(first):
    """All of the four most telling shapes, with our kernels beside FlexAttention and PyTorch's own attention."""
    found = home(first[1], 300)
    assert found >= rows(plan.SHAPES[:4], [*plan.PEERS, "in turns"])


def test_after_nine_minutes_all_of_the_plan_is_home(first):
    run, world = first
    found = home(world, 540)
    assert found >= rows(plan.SHAPES, [*plan.PEERS, "in turns"])
    assert found >= rows(plan.DECODING, [*plan.DECODERS, "in turns"], "decode")
    heats = {row for row in found if row.startswith("tuning: ")}
    jobs = tune.asked(["bf16"], plan.TUNED_HEAD_SIZES, plan.TUNED_DIRECTIONS)
    assert {f"tuning: {job}: {unit}" for job in jobs for unit in ("heat 1", "heat 2", "again")} <= heats
    assert {"counters: bert-base", "counters: llama-8b", "attention: bert-base: flex"} <= found
    assert {o.status for o in run.outcomes.values() if o.processes} == {"done"} and world.now <= TOTAL_SECONDS["gpu"]


def test_where_all_takes_half_as_long_again_what_matters_most_is_home():
    _, world = rehearse("gpu", SLOW)
    assert home(world, 60) >= {"smoke: fused", "smoke: composed"}
    assert home(world, 300) >= rows(plan.SHAPES[:2], plan.PEERS)
    assert home(world, 540) >= rows(plan.SHAPES[:3], plan.PEERS) | rows(["llama-8b"], plan.PEERS[:3])
    assert home(world, 540) >= rows(plan.DECODING, plan.DECODERS, "decode") | {"counters: bert-base"}
    assert sum("heat 1" in row for row in world.home) == 7 and world.now <= TOTAL_SECONDS["gpu"] + 1


def test_the_second_call_brings_what_the_first_left_out_and_long_contexts():
    for machine, points in ((Machine(), 10), (SLOW, 5)):
        _, before = rehearse("gpu", machine)
        _, world = rehearse("gpu-second", machine, before)
        found = home(world, TOTAL_SECONDS["gpu-second"])
        assert found >= rows(plan.SHAPES[:3], [*plan.PEERS, "in turns"])
        assert found >= rows(["llama-8b"], [*plan.PEERS[:8], "in turns"]) | rows(["minilm"], plan.PEERS[:6])
        assert found >= rows(["llama-8b-4096"], plan.LONG_PEERS[:4])
        assert sum(row.startswith("choose: ") for row in found) >= points
        assert machine == SLOW or any(row.startswith("growth: ") for row in found)
        assert world.now <= TOTAL_SECONDS["gpu-second"] + 1


def test_kernels_that_are_wrong_have_the_rest_of_the_time_to_say_why():
    run, world = rehearse("gpu", Machine(right=False))
    begun = {name for name, outcome in run.outcomes.items() if outcome.processes}
    assert begun == {"smoke", "diagnose"}
    assert "diagnose: compiled" in home(world, 60)
    assert "diagnose: memcheck" in home(world, 120)  # before the list of cases
    assert "diagnose: one tile" in home(world, 120) and "diagnose: bert-base" in home(world, 180)


def test_a_cache_that_was_carried_is_time_for_other_things(first):
    _, world = rehearse("gpu", Machine(carried=True))
    assert max(world.home.values()) < max(first[1].home.values()) and world.home.keys() >= first[1].home.keys()


def test_a_rehearsal_knows_every_module_and_about_as_many_tests_as_there_are():
    assert {step.module for name in ("gpu", "gpu-second") for step in all_steps(PLANS[name])} == STEPS.keys()
    assert 250 < sum(count for _, count, _ in TESTS) < 330
    assert all(gpu_tests.rank(name) < len(gpu_tests.TELLING) for name, _, _ in TESTS if "test_model" not in name)


def test_a_timetable_fits_a_terminal(first):
    lines = timetable(*first, (60, 180, 300, 540)).splitlines()
    assert max(map(len, lines)) <= 120 and len(lines) == 1 + sum(1 for _ in all_steps(PLANS["gpu"]))
