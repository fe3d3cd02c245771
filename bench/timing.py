"""How long things take, several candidates side by side: by CUDA-graph replay, and as the host's clock sees it.

What makes the figures honest:

- A candidate does the same work on several sets of inputs in turn (`sets_for`: together more than any cache holds).
- Candidates take turns, and each round begins with another one: a clock that drifts hits all alike.
- Under graph replay nothing is measured but the GPU's work; the eager figure holds all that the host does as well.
- Medians and interquartile ranges; a difference within them is noise.
- What goes wrong (out of memory, not supported) is a result like any other: the error's first line.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

Call = Callable[[], object]
Stopwatch = Callable[[Call, int], float]  # the milliseconds that so many runs of it take
Listener = Callable[[str, float], None]  # hears of each stage by name, and the share of it that is done

CACHES = 3  # the sets of inputs hold so many times what the last cache of a GPU does
MOST_SETS, MOST_SETS_ON_CPU = 16, 4
FEWEST_ROUNDS = 7
CPU_CACHE = 32 << 20  # bytes


class Turns(NamedTuple):
    """How candidates take turns."""

    rounds: int  # at the most
    seconds: float = math.inf  # after which no round begins, if there were FEWEST_ROUNDS
    sample_ms: float = 1.0  # how long a turn lasts at the least


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call."""

    median: float
    spread: float  # the interquartile range
    rounds: int
    fastest: float = 0.0


@dataclass(frozen=True)
class Measurement:
    """What is known of one candidate; errors are first lines, empty where there was none."""

    graph: Timing | None = None  # CUDA-graph replay; None on a CPU
    eager: Timing | None = None  # the host's clock
    graph_error: str = ""
    error: str = ""

    @property
    def best(self) -> Timing | None:
        """The GPU's own time where there is one."""
        return self.graph or self.eager


def nobody(stage: str, share: float) -> None:
    """Who listens where no one waits."""


def sets_for(set_bytes: int, device: torch.device) -> int:
    """How many sets of inputs, of so many bytes each, no cache holds."""
    if device.type != "cuda":
        return min(MOST_SETS_ON_CPU, math.ceil(CPU_CACHE / max(set_bytes, 1)))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(math.ceil(CACHES * cache / max(set_bytes, 1)), MOST_SETS)


def first_line(error: BaseException) -> str:
    """An error as a cell of a table has room for it: what was at the bottom of it."""
    while error.__cause__ is not None and not type(error.__cause__).__name__.endswith("RemoteTraceback"):
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def compare(
    setups: Mapping[str, Callable[[], Sequence[Call]]],
    *,
    device: torch.device,
    rounds: int,
    seconds: float = math.inf,
    differences: Mapping[str, tuple[str, str]] | None = None,
    graphs: bool = True,
    eager: bool = True,
    sample_ms: float = 1.0,
    listener: Listener = nobody,
) -> dict[str, Measurement]:
    """Measures candidates by turns.

    Args:
        setups: by name, what makes a candidate's calls: the same work, one call for each set of inputs.
        device: where they run. On a CPU there is no graph, and the eager figure is all.
        rounds: how often each has its turn at the most.
        seconds: after so many no round begins, if there were FEWEST_ROUNDS.
        differences: by name, two candidates with as many calls; the result holds the first's time less the second's,
            round by round. So a backward pass is timed as a training step has it: the step less its forward pass.
        graphs: by CUDA-graph replay, where there is a GPU; False for what a graph cannot hold, as whole training steps.
        eager: also by the host's clock, where there is a graph.
        sample_ms: how long a turn lasts at least, in milliseconds.
        listener: hears how far the rounds are.
    """
    turns = Turns(rounds, seconds, sample_ms)
    if device.type != "cuda":
        return _compare(setups, None, turns, differences or {}, eager=True, listener=listener)
    # Autograd runs a backward pass on the stream of the forward pass, and memory is kept by stream: so all that is done
    # here, warm-up, capture and replay, is done on one, which is not the default one, for that cannot be captured.
    stream = torch.cuda.Stream(device)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        options = {"graphs": graphs, "eager": eager or not graphs}
        measurements = _compare(setups, device, turns, differences or {}, listener=listener, **options)
    stream.synchronize()
    return measurements


def _compare(
    setups: Mapping[str, Callable[[], Sequence[Call]]],
    gpu: torch.device | None,
    turns: Turns,
    differences: Mapping[str, tuple[str, str]],
    *,
    eager: bool,
    graphs: bool = True,
    listener: Listener,
) -> dict[str, Measurement]:
    candidates = {name: _Candidate() for name in (*setups, *differences)}
    pool = None if gpu is None else torch.cuda.graph_pool_handle()  # shared: no graph's result is ever read
    for name, setup in setups.items():
        candidate = candidates[name]
        try:
            candidate.calls = list(setup())
            _warm_up(candidate.calls, gpu)
        except Exception as error:  # whatever it is, the others go on
            candidate.fail(error)
            continue
        if gpu is not None and graphs:
            try:
                candidate.replay = captured(candidate.calls, gpu, pool)
            except Exception as error:
                candidate.graph_error = first_line(error)
                pool = torch.cuda.graph_pool_handle()  # the allocator may take the other one for still in use

    replays = {name: c.replay for name, c in candidates.items() if c.replay is not None}
    passes = {name: c.run_all for name, c in candidates.items() if c.calls and eager}
    for kind, runs, stopwatch in (
        ("graph", replays, device_milliseconds),
        ("eager", passes, host_milliseconds if gpu is None else synchronized_milliseconds),
    ):
        stage = "timing" if gpu is None else f"timing, {kind}"
        samples, errors = round_robin(runs, stopwatch, turns, partial(listener, stage))
        for name, milliseconds in samples.items():
            candidates[name].timings[kind] = _timing([ms / len(candidates[name].calls) for ms in milliseconds])
        for name, (whole, part) in differences.items():
            if whole in samples and part in samples:
                calls = len(candidates[whole].calls)
                candidates[name].timings[kind] = _timing(
                    [(a - b) / calls for a, b in zip(samples[whole], samples[part])]
                )
        for name, error_line in errors.items():
            if not candidates[name].timings:
                candidates[name].error = error_line
        if gpu is not None:  # the graphs' memory, for what comes now
            replays.clear()
            for candidate in candidates.values():
                candidate.replay = None
            give_back()
    return {name: candidate.measurement() for name, candidate in candidates.items()}


def round_robin(
    runs: Mapping[str, Call],
    stopwatch: Stopwatch,
    turns: Turns,
    listen: Callable[[float], None] = lambda share: None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """The milliseconds of a run, one figure a round; and the errors of those that failed, who then have no figures."""
    samples: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    times: dict[str, int] = {}
    names = list(runs)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # as timeit does
    try:
        started = time.perf_counter()
        for turn in range(-1, turns.rounds):  # the round before the first finds out how many runs make a sample
            seconds = time.perf_counter() - started
            if turn >= FEWEST_ROUNDS and seconds > turns.seconds:
                break
            listen(max(0.0, turn / turns.rounds, min(turn / FEWEST_ROUNDS, seconds / max(turns.seconds, 1e-9))))
            first = turn % len(names) if names else 0
            for name in names[first:] + names[:first]:
                if name in errors:
                    continue
                try:
                    milliseconds = stopwatch(runs[name], times.get(name, 1)) / times.get(name, 1)
                except Exception as error:
                    errors[name] = first_line(error)
                    samples.pop(name, None)
                    continue
                if turn < 0:
                    times[name] = min(max(1, math.ceil(turns.sample_ms / max(milliseconds, 1e-6))), 1000)
                else:
                    samples.setdefault(name, []).append(milliseconds)
    finally:
        if collecting:
            gc.enable()
    return samples, errors


def captured(calls: Sequence[Call], gpu: torch.device, pool: Any) -> Call:
    """All calls, one after the other, as a CUDA graph of the current stream; what is returned replays it."""
    if torch.cuda.memory_reserved(gpu) > torch.cuda.get_device_properties(gpu).total_memory // 3:
        give_back()  # while it captures the allocator cannot give memory back
    graph = torch.cuda.CUDAGraph()
    # Not torch.cuda.graph: it empties the allocator's cache each time, and tuning captures hundreds of graphs.
    gc.disable()  # a graph that is collected now would be destroyed amid this one's capture
    graph.capture_begin(pool)
    try:
        for call in calls:
            call()
    except BaseException:
        with suppress(Exception):  # an invalid capture ends with an error of its own; the first one says why
            graph.capture_end()
        with suppress(Exception):  # and in PyTorch up to 2.11 before the allocator knows that it is over
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise
    finally:
        gc.enable()
    graph.capture_end()
    graph.replay()
    torch.cuda.synchronize(gpu)
    return graph.replay


def give_back() -> None:
    """Memory that PyTorch's allocator keeps and does not use; it refuses where it takes a capture for unfinished."""
    with suppress(RuntimeError):
        torch.cuda.empty_cache()


def device_milliseconds(run: Call, times: int) -> float:
    """By events on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def host_milliseconds(run: Call, times: int) -> float:
    """By the host's clock."""
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) * 1e3


def synchronized_milliseconds(run: Call, times: int) -> float:
    """By the host's clock, from an idle device to an idle device."""
    torch.cuda.synchronize()

    def to_the_end() -> None:
        for _ in range(times):
            run()
        torch.cuda.synchronize()

    return host_milliseconds(to_the_end, 1)


@dataclass
class _Candidate:
    calls: list[Call] = field(default_factory=list)
    replay: Call | None = None
    timings: dict[str, Timing] = field(default_factory=dict)
    graph_error: str = ""
    error: str = ""

    def fail(self, error: BaseException) -> None:
        self.calls = []
        self.error = first_line(error)

    def run_all(self) -> None:
        for call in self.calls:
            call()

    def measurement(self) -> Measurement:
        return Measurement(self.timings.get("graph"), self.timings.get("eager"), self.graph_error, self.error)


def _warm_up(calls: Sequence[Call], gpu: torch.device | None) -> None:
    """Loads and compiles all there is to load and compile, and lets the allocator find what memory it takes."""
    for call in (*calls, *calls):
        call()
    if gpu is not None:
        torch.cuda.synchronize(gpu)


def _timing(milliseconds: Sequence[float]) -> Timing:
    spread = 0.0
    if len(milliseconds) > 1:
        lower, _, upper = statistics.quantiles(milliseconds, n=4, method="inclusive")
        spread = upper - lower
    return Timing(statistics.median(milliseconds), spread, len(milliseconds), min(milliseconds))
