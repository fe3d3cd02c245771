"""Which candidates are tried, which one wins, and what becomes of the table."""

import json
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch

from qtuning_fast.attention.arguments import trainable
from qtuning_fast.bench import results
from qtuning_fast.bench.plans import durations, tune
from qtuning_fast.bench.plans.candidates import candidates
from qtuning_fast.bench.plans.passes import Pass, difference
from qtuning_fast.bench.plans.schedule import NO_TIME, Schedule
from qtuning_fast.bench.plans.tune import Job, Trial, in_order, incumbent_of, measure, winner, with_entry
from qtuning_fast.bench.shapes import Shape, inputs
from qtuning_fast.bench.timing import Measurement, Timing
from qtuning_fast.kernels import backward_whole, blocks
from qtuning_fast.kernels.blocks import DIRECTIONS, Blocks

SMALL = Shape("small", B=1, Hq=2, Hkv=1, N=20, D=16, P=12, is_causal=True)
CPU = torch.device("cpu")


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The table, in a copy that may be written."""
    copy = tmp_path / "blocks.json"
    copy.write_text(blocks.PATH.read_text())
    monkeypatch.setattr(blocks, "PATH", copy)
    yield copy
    blocks.table.cache_clear()
    blocks._from_table.cache_clear()


def entry(**changes) -> Blocks:
    sizes = {"queries": 64, "keys": 64, "prefix": 64, "warps": 4, "stages": 2}
    return Blocks(**({"target": "sm_90", "element_size": 2, "head_size": 64, "direction": "forward"} | sizes | changes))


def trial(*milliseconds: float, error: str = "", **changes) -> Trial:
    times = {f"shape {i}": Timing(ms, 0.1, 5) for i, ms in enumerate(milliseconds)}
    return Trial(entry(**changes), {"registers": 100, "shared": 1000}, times, error)


def test_the_winner_has_the_least_geometric_mean():
    incumbent, even, uneven = trial(1.0, 1.0), trial(0.8, 0.8, keys=32), trial(0.1, 4.0, keys=128)
    assert winner([incumbent, even, uneven]) is uneven  # 0.63 against 0.8
    assert winner([incumbent, even, replace(uneven, error="wrong: output")]) is even


def test_the_incumbent_stays_within_the_noise_and_goes_when_it_fails():
    incumbent, close = trial(1.0), trial(0.995, keys=32)
    assert winner([incumbent, close]) is incumbent
    assert winner([replace(incumbent, error="OutOfMemoryError: "), close]) is close
    assert winner([replace(incumbent, error="OutOfMemoryError: ")]) is None
    assert winner([trial(), close]) is close  # the incumbent was never timed


def test_reports_fit_a_terminal(monkeypatch):
    monkeypatch.setattr(tune, "candidate_ms", lambda entry: None)
    trials = [trial(1.0, 2.0, 3.0), trial(0.5, 1.0, 1.5, keys=128, prefix=128, queries=128, warps=8)]
    trials += [trial(error="spills 8 bytes", warps=8), trial(error="wrong: output is off by 1", stages=3)]
    text = tune.report(Job("bf16", 64, "forward"), trials, trials[1])
    assert "2 timed, 1 spill, 1 wrong, 0 otherwise out" in text and "+100.0%" in text and "incumbent" in text
    assert max(map(len, text.splitlines())) <= 120
    json.dumps(tune.as_json(Job("bf16", 64, "forward"), trials, trials[1]), allow_nan=False)
    assert "predicted mean" not in text
    monkeypatch.setattr(tune, "candidate_ms", lambda entry: 0.5 if entry.warps == 8 else None)
    text = tune.report(Job("bf16", 64, "forward"), trials, trials[1])
    assert f"  predicted mean: {trials[1].name()} 0.5000 ms" in text.splitlines()
    found = tune.as_json(Job("bf16", 64, "forward"), trials, trials[1])["trials"]
    assert [each["predicted"] for each in found[:2]] == [None, 0.5]
    failed = [replace(trials[0], error="OutOfMemoryError: ")]
    assert "the incumbent" in tune.report(Job("bf16", 64, "forward"), failed, None)
    json.dumps(tune.as_json(Job("bf16", 64, "forward"), failed, None), allow_nan=False)


def test_an_entry_takes_its_place_in_the_table(table):
    before = blocks.table()
    new = entry(queries=128, keys=32, measured="a GPU, torch 1, triton 1")
    blocks.write(with_entry(before, new))
    after = blocks.table()
    assert len(after) == len(before) and set(after) - set(before) == {new}
    assert blocks.blocks_for("sm_90", 2, 64, "forward") == new
    assert json.loads(table.read_text())  # and it is the copy that was written
    assert blocks.PATH == table


def test_a_new_target_gets_the_default_entries_too(table):
    new = entry(target="sm_120", head_size=64)
    blocks.write(with_entry(blocks.table(), new))
    assert blocks.blocks_for("sm_120", 2, 64, "forward") == new
    default = blocks.blocks_for("default", 2, 32, "forward")
    assert blocks.blocks_for("sm_120", 2, 32, "forward") == replace(default, target="sm_120")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_candidates_must_reproduce_the_incumbent(direction, monkeypatch):
    first = entry(
        target="interpreter", element_size=4, head_size=16, direction=direction, queries=32, keys=32, prefix=16
    )
    trials = [Trial(first), Trial(replace(first, queries=16, keys=16)), Trial(replace(first, keys=64))]
    compute = Pass.compute

    def corrupted(self, blocks_entry):
        results = compute(self, blocks_entry)
        if blocks_entry.keys == 64:
            next(iter(results.values()))[-1] = torch.nan
        return results

    def timed(setups, *, device, rounds, eager):
        assert not eager
        for setup in setups.values():
            setup()[0]()  # runs
        return {name: Measurement(eager=Timing(1.0, 0.0, rounds)) for name in setups}

    monkeypatch.setattr(Pass, "compute", corrupted)
    monkeypatch.setattr(tune, "compare", timed)
    monkeypatch.setattr(tune, "sets_for", lambda nbytes, device: 1)
    measure(trials, SMALL, torch.float32, CPU, rounds=3)
    assert [bool(t.times) for t in trials] == [True, True, False]
    assert not trials[0].error and not trials[1].error and trials[2].error.endswith("is off by inf on small")


def done(result) -> Future:
    future: Future = Future()
    future.set_result(result)
    return future


def tuned(monkeypatch, jobs, *, verdict=None, milliseconds=None, deadline=1e9, tried=candidates, known=None):
    """Tunes without a GPU, on a clock that a heat moves on by ten seconds; returns the heats and what was handed on."""
    now, heats, finished = [0.0], [], []

    def fake_measure(trials, shape, dtype, device, rounds):
        now[0] += 10.0
        heats.append((shape.name, [t.name() for t in trials], [t.error for t in trials], rounds))
        for one in trials:
            if not one.error:
                one.times[shape.name] = Timing((milliseconds or (lambda e: 1.0))(one.entry), 0.0, 5)

    monkeypatch.setattr(tune, "measure", fake_measure)
    monkeypatch.setattr(durations, "heat_seconds", lambda *args: 10.0)
    schedule = Schedule(deadline, clock=lambda: now[0])
    tune.tune(
        jobs,
        lambda *args: done(verdict or {"registers": 1, "spilled": 0, "shared": 0}),
        target="sm_90",
        device=CPU,
        schedule=schedule,
        finished=lambda job, trials, best: finished.append((job, len(trials), best)),
        tried=tried,
        known=known,
    )
    return schedule, heats, finished


def test_tuning_stops_when_the_time_is_spent(monkeypatch):
    jobs = [Job("bf16", D, "forward") for D in (32, 128, 256)]
    schedule, heats, finished = tuned(monkeypatch, jobs, deadline=25, tried=lambda incumbent: [incumbent])
    assert [job for job, _, _ in finished] == jobs[:2] and [name for name, *_ in heats] == ["minilm", "llama-8b"]
    assert schedule.status(f"{jobs[2]}: heat 1") == NO_TIME


def test_every_job_has_a_heat_before_any_has_its_second_and_the_best_are_timed_again(monkeypatch):
    """The best so far is in each heat, beside the incumbent; what no heat had is not among the trials."""
    jobs = [Job("bf16", D, "forward") for D in (32, 128)]
    fastest = candidates(incumbent_of("sm_90", jobs[0]))[3]
    schedule, heats, finished = tuned(monkeypatch, jobs, milliseconds=lambda e: 0.5 if e == fastest else 1.0)
    units = list(schedule.log)
    assert (
        units[:4] == [f"{job}: heat {number}" for number in (1, 2) for job in jobs] and units[-1] == f"{jobs[0]}: again"
    )
    names = [trial_names for shape, trial_names, *_ in heats if shape == "minilm"]
    best = trial().__class__(fastest).name()
    assert best in names[0] and all(each[1] == best for each in names[1:])
    assert len(names[0]) == 1 + tune.HEAT and len(names[1]) == 2 + tune.HEAT and len(names[-1]) == 2
    assert heats[-1][-1] == 2 * tune.ROUNDS and finished[-1][2].entry == fastest
    assert finished[0][1] == 1 + tune.HEAT


def test_one_launch_for_all_gradients_is_tried_where_a_tile_holds_the_context(monkeypatch):
    """Beside two passes, which is what the table has: all gradients are compared, and both are timed as a whole."""
    jobs = tune.asked(["bf16"], [32, 64, 128], ["whole"])
    assert [job.head_size for job in jobs] == [32, 64]
    off = incumbent_of("sm_90", jobs[1])
    assert [shape.name for shape in tune.shapes_of(64, "whole")] == ["bert-base"]
    assert off.keys == 0 or (off.measured and all(e.keys == 128 for e in candidates(off)[1:]))
    x = inputs(SMALL, dtype=torch.float32, device="cpu")
    monkeypatch.setattr(backward_whole, "MULTIPROCESSORS", 1)
    one = Pass(SMALL, x, "whole")
    two, whole = (
        replace(off, target="interpreter", element_size=4, queries=32, keys=keys, prefix=16, stages=1)
        for keys in (0, 32)
    )
    assert len(one.launches(two)) == len(one.launches(whole)) + 1
    expected_gradients = one.compute(two)
    assert set(expected_gradients) == set(trainable(one.call))
    assert difference(one.compute(whole), expected_gradients)[0] < 1e-4


def test_the_most_promising_come_first(monkeypatch):
    entries = candidates(entry())
    monkeypatch.setattr(tune, "candidate_ms", lambda e: None)
    assert in_order(entries) == entries  # where nothing is predicted
    monkeypatch.setattr(tune, "candidate_ms", lambda e: None if e.warps == 8 else 1.0 / e.keys)
    found = in_order(entries)
    assert found[0] == entries[0] and set(found) == set(entries)
    known = [e.keys for e in found[1:] if e.warps != 8]
    assert known == sorted(known, reverse=True) and all(e.warps == 8 for e in found[1 + len(known) :])


def test_what_a_process_before_found_is_tried_first(monkeypatch):
    job = Job("bf16", 64, "keys")
    before = candidates(incumbent_of("sm_90", job))[-1]
    _, heats, _ = tuned(monkeypatch, [job], known={str(job): before})
    assert heats[0][1][1] == trial().__class__(before).name()


@pytest.mark.parametrize("verdict", [{"registers": 255, "spilled": 16, "shared": 0}, {"error": "ImportError: "}])
def test_the_incumbent_is_measured_whatever_the_compiler_says(monkeypatch, verdict):
    _, heats, _ = tuned(monkeypatch, [Job("bf16", 256, "forward")], verdict=verdict)
    assert {error for _, _, errors, _ in heats for error in errors} == {""}


class FakePool:
    def __init__(self, *args, **kwargs):
        pass

    def submit(self, function, target, dtype, tried, on_shapes):
        return done({"registers": 100, "spilled": 8 * (tried.stages == 3), "shared": 1000})

    def shutdown(self, **kwargs):
        pass


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_run_rewrites_the_table_and_keeps_all_measurements(table, tmp_path, monkeypatch, capsys, dry_run):
    def fake_measure(trials, shape, *rest):
        for one in trials:
            if not one.error:
                one.times[shape.name] = Timing(1.0 if one is trials[0] else 0.5 + one.entry.queries / 1e4, 0.01, 5)

    monkeypatch.setattr(tune, "measure", fake_measure)
    monkeypatch.setattr(tune, "ProcessPoolExecutor", FakePool)
    monkeypatch.setattr(tune, "broken", lambda device: False)
    monkeypatch.setattr(tune, "INTERPRETED", False)
    monkeypatch.setattr(tune, "current_target", lambda: "sm_90")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    facts = {"type": "cuda", "name": "a GPU", "GiB": 140}
    monkeypatch.setattr(results, "device_facts", lambda device: facts)
    before, out = blocks.table(), tmp_path / "new" / "tuning.json"
    run = ["--head-size", "64", "32", "--direction", "forward", "keys", "--out", str(out)]
    assert tune.main(run + ["--dry-run"] * dry_run) == 0

    document = json.loads(out.read_text())
    assert [(job["head_size"], job["direction"]) for job in document["entries"].values()] == [
        (64, "forward"), (32, "forward"), (64, "keys"), (32, "keys"),
    ]  # fmt: skip
    changed = set(blocks.table()) - set(before)
    assert len(blocks.table()) == len(before) and len(changed) == (0 if dry_run else 4)
    for e in changed:
        assert (
            e.queries == min(c.queries for c in candidates(e)[1:])
            and e.measured.startswith("a GPU, 140 GiB, torch ")
            and e.target == "sm_90"
        )
    text = capsys.readouterr().out
    assert text.endswith("all measured\n") and max(map(len, text.splitlines())) <= 120


@pytest.mark.thorough
def test_a_rehearsal_ends_in_the_same_file_and_leaves_the_table_alone(table, tmp_path, capsys):
    out, before = tmp_path / "tuning.json", blocks.table()
    assert tune.main(["--dry-run", "--out", str(out)]) == 0
    [job] = json.loads(out.read_text())["entries"].values()
    assert len(job["trials"]) == 2 and all(trial["mean"] > 0 for trial in job["trials"]) and job["winner"]
    assert blocks.table() == before and "incumbent" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_tuned(capsys):
    with pytest.raises(SystemExit):
        tune.main([])
    assert "it takes a GPU" in capsys.readouterr().err
