"""The harness by its own clock: who is measured when, on which inputs, and what becomes of errors."""

import gc

import pytest
import torch

from qtuning_fast.bench import timing
from qtuning_fast.bench.timing import FEWEST_ROUNDS, Turns, compare, first_line, round_robin, sets_for

CPU = torch.device("cpu")


class Clock:
    """A stopwatch that times nothing: each run takes what `milliseconds` says, and is written down."""

    def __init__(self, **milliseconds):
        self.milliseconds, self.log = milliseconds, []

    def run(self, name):
        def run():
            self.log.append(name)

        run.name = name
        return run

    def __call__(self, run, times):
        for _ in range(times):
            run()
        return times * self.milliseconds[run.name]


def test_candidates_take_turns_and_each_round_begins_with_another():
    clock = Clock(a=5.0, b=5.0, c=5.0)
    samples, errors = round_robin({name: clock.run(name) for name in "abc"}, clock, Turns(3))
    assert not errors and samples == {name: [5.0] * 3 for name in "abc"}
    assert "".join(clock.log[3:]) == "abc" + "bca" + "cab"


def test_a_sample_lasts_as_long_as_asked_for_and_counts_by_the_run():
    clock = Clock(short=0.25, long=7.0)
    samples, _ = round_robin({n: clock.run(n) for n in ("short", "long")}, clock, Turns(2))
    assert samples == {"short": [0.25] * 2, "long": [7.0] * 2}
    assert clock.log.count("short") == 1 + 2 * 4 and clock.log.count("long") == 1 + 2


def test_one_that_fails_on_the_way_is_out_and_the_others_go_on():
    clock, runs = Clock(good=1.0, bad=1.0), iter(range(3))

    def bad():
        if next(runs) == 2:
            raise RuntimeError("out of memory\nand much more")

    bad.name = "bad"
    samples, errors = round_robin({"bad": bad, "good": clock.run("good")}, clock, Turns(4))
    assert samples == {"good": [1.0] * 4} and errors == {"bad": "RuntimeError: out of memory"}
    assert gc.isenabled()


def test_every_set_of_inputs_has_its_turn(monkeypatch):
    log = []
    monkeypatch.setattr(timing, "host_milliseconds", lambda run, times: [run() for _ in range(times)] and 4.0 * times)
    found = compare({"a": lambda: [lambda i=i: log.append(i) for i in range(4)]}, device=CPU, rounds=2)
    warm_up, passes = log[: -3 * 4], log[-3 * 4 :]
    assert set(warm_up) == {0, 1, 2, 3} and passes == [0, 1, 2, 3] * 3
    assert found["a"].eager.median == 1.0 and found["a"].eager.spread == 0.0  # of one call, not of the pass of four
    assert found["a"].graph is None and found["a"].best is found["a"].eager


def test_medians_and_interquartile_ranges(monkeypatch):
    figures = iter([9.0, 1.0, 2.0, 3.0, 4.0, 100.0])  # the first finds out how many runs make a sample
    monkeypatch.setattr(timing, "host_milliseconds", lambda run, times: next(figures) * times)
    found = compare({"a": lambda: [lambda: None]}, device=CPU, rounds=5)["a"].eager
    assert (found.median, found.spread, found.rounds) == (3.0, 2.0, 5)


def test_a_difference_is_taken_round_by_round(monkeypatch):
    figures = iter([1.0, 1.0, 5.0, 3.0, 20.0, 30.0, 9.0, 5.0])  # step and forward; in round 2 forward comes first
    monkeypatch.setattr(timing, "host_milliseconds", lambda run, times: next(figures) * times)
    setups = {"step": lambda: [lambda: None], "forward": lambda: [lambda: None]}
    found = compare(setups, device=CPU, rounds=3, differences={"backward": ("step", "forward"), "x": ("step", "no")})
    assert found["backward"].eager.median == 4.0 and found["backward"].eager.rounds == 3  # of 2, 10 and 4
    assert found["x"].best is None


def test_time_that_is_spent_ends_the_rounds_but_not_the_first_few():
    clock = Clock(a=5.0)
    samples, _ = round_robin({"a": clock.run("a")}, clock, Turns(40, seconds=0.0))
    assert len(samples["a"]) == FEWEST_ROUNDS


def test_errors_are_results():
    def refused():
        raise NotImplementedError("no such kernel\n  at line 1")

    def fails_when_called():
        return [refused]

    found = compare({"setup": refused, "call": fails_when_called, "fine": lambda: [lambda: 1]}, device=CPU, rounds=2)
    assert found["setup"].error == found["call"].error == "NotImplementedError: no such kernel"
    assert found["setup"].best is None and found["fine"].best.rounds == 2 and not found["fine"].error


def test_first_lines_are_short_and_of_what_was_at_the_bottom_of_it():
    compiler = RuntimeError("compilation failed")
    compiler.__cause__ = NotImplementedError("no such thing")
    assert first_line(compiler) == "NotImplementedError: no such thing"
    assert first_line(ValueError()) == "ValueError: "
    assert len(first_line(ValueError("x" * 1000))) == 200


def test_sets_of_inputs_outgrow_the_cache(monkeypatch):
    class Properties:
        L2_cache_size = 50 << 20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    gpu = torch.device("cuda")
    assert sets_for(25 << 20, gpu) == 6 and sets_for(1 << 30, gpu) == 1 and sets_for(1 << 10, gpu) == 16
    assert sets_for(1, CPU) == 4


@pytest.mark.gpu
def test_graphs_measure_the_device_and_not_the_host():
    gpu = torch.device("cuda")
    x = torch.randn(1 << 26, device=gpu)
    weight = torch.randn(256, 256, device=gpu, requires_grad=True)

    def step():
        return torch.autograd.grad((weight @ weight).sum(), weight)

    def impossible():
        return x[:4].sum().item()  # waits for the device, which no graph can

    candidates = {"once": [lambda: x.mul_(1.0)], "impossible": [impossible]}
    candidates |= {"twice": [lambda: x.mul_(1.0).mul_(1.0)], "step": [step]}
    found = compare({name: (lambda calls=calls: calls) for name, calls in candidates.items()}, device=gpu, rounds=10)
    assert 1.7 < found["twice"].graph.median / found["once"].graph.median < 2.3
    assert found["step"].graph.median < found["step"].eager.median
    assert found["impossible"].graph is None and found["impossible"].graph_error
