"""Times several candidates side by side: by CUDA-graph replay, and by the host's clock.

- A candidate does the same work on several sets of inputs (`sets_for`), which together exceed the last cache.
- Candidates take turns, and each round begins with another one, so that a drifting clock affects all alike.
- Graph replay measures the GPU's work alone; the host's clock includes all that the host does.
- Results are medians and interquartile ranges; a difference within them is noise.
- A failure (out of memory, not supported) is a result too: the first line of its error.

A single sample is taken by `timeit` with PyTorch's clock, which waits for the device.
"""

import gc
import math
import statistics
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils import benchmark

Call = Callable[[], object]
Stopwatch = Callable[[Call, int], float]  # the milliseconds of so many runs
Listener = Callable[[str, float], None]  # gets the name of a stage and the share of it that is done

CACHES = 3  # the size of all sets of inputs, over that of a GPU's last cache
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
    """The times of one candidate. Errors are first lines; empty: none."""

    graph: Timing | None = None  # CUDA-graph replay; None on a CPU
    eager: Timing | None = None  # the host's clock
    graph_error: str = ""
    error: str = ""

    @property
    def best(self) -> Timing | None:
        """The GPU's own time where there is one."""
        return self.graph or self.eager


def silent(stage: str, share: float) -> None:
    """The listener where no one waits."""


def sets_for(set_bytes: int, device: torch.device) -> int:
    """How many sets of inputs, of so many bytes each, exceed the last cache."""
    if device.type != "cuda":
        return min(MOST_SETS_ON_CPU, math.ceil(CPU_CACHE / max(set_bytes, 1)))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(math.ceil(CACHES * cache / max(set_bytes, 1)), MOST_SETS)


def first_line(error: BaseException) -> str:
    """The first line of an error's first cause, short enough for a table."""
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
    listener: Listener = silent,
) -> dict[str, Measurement]:
    """Measures candidates by turns.

    Args:
        setups: by name, what makes a candidate's calls: the same work, one call for each set of inputs.
        device: where they run. On a CPU there are no graphs, only the host's clock.
        rounds: the most turns of each candidate.
        seconds: after which no round begins, once there were FEWEST_ROUNDS.
        differences: by name, two candidates with as many calls. The result holds the first's time less the second's,
            round by round: a backward pass is timed as a training step has it, the step less its forward pass.
        graphs: whether to use CUDA graphs; False for work that a graph cannot hold, such as whole training steps.
        eager: whether to use the host's clock as well where there are graphs.
        sample_ms: the least milliseconds of a turn.
        listener: gets how far the rounds are.
    """
    gpu = device if device.type == "cuda" else None
    graphs = graphs and gpu is not None
    # Autograd runs a backward pass on the stream of its forward pass, and memory is kept by stream. So warm-up, capture
    # and replay all run on one stream, which is not the default one: that cannot be captured.
    with nullcontext() if gpu is None else _stream(gpu):
        candidates = {name: _Candidate() for name in (*setups, *(differences or {}))}
        pool = torch.cuda.graph_pool_handle() if graphs else None  # shared: no graph's result is ever read
        for name, setup in setups.items():
            pool = _prepare(candidates[name], setup, gpu, pool)
        runs: dict[str, dict[str, Call]] = {
            "graph": {name: c.replay for name, c in candidates.items() if c.replay is not None},
            "eager": {name: c.run_all for name, c in candidates.items() if c.calls and (eager or not graphs)},
        }
        for kind, stopwatch in (("graph", device_milliseconds), ("eager", host_milliseconds)):
            heard = partial(listener, "timing" if gpu is None else f"timing, {kind}")
            samples, errors = round_robin(runs[kind], stopwatch, Turns(rounds, seconds, sample_ms), heard)
            _keep(candidates, kind, samples, errors, differences or {})
            if gpu is not None:  # frees the graphs' memory for what comes now
                runs[kind].clear()
                for candidate in candidates.values():
                    candidate.replay = None
                give_back()
        return {name: candidate.measurement() for name, candidate in candidates.items()}


@contextmanager
def _stream(gpu: torch.device) -> Iterator[None]:
    stream = torch.cuda.Stream(gpu)
    torch.cuda.synchronize(gpu)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def _prepare(candidate: "_Candidate", setup: Callable[[], Sequence[Call]], gpu: torch.device | None, pool: Any) -> Any:
    """Warms a candidate up and captures its graph, if there is a pool for one. Returns the pool for the others."""
    try:
        candidate.calls = list(setup())
        for call in (*candidate.calls, *candidate.calls):  # loads, compiles, and lets the allocator find its memory
            call()
        if gpu is not None:
            torch.cuda.synchronize(gpu)
    except Exception as error:  # whatever it is, the others go on
        candidate.calls, candidate.error = [], first_line(error)
        return pool
    if gpu is not None and pool is not None:
        try:
            candidate.replay = captured(candidate.calls, gpu, pool)
        except Exception as error:
            candidate.graph_error = first_line(error)
            return torch.cuda.graph_pool_handle()  # the allocator may take the other one for still in use
    return pool


def _keep(
    candidates: Mapping[str, "_Candidate"],
    kind: str,
    samples: Mapping[str, list[float]],
    errors: Mapping[str, str],
    differences: Mapping[str, tuple[str, str]],
) -> None:
    """Keeps the samples of one clock, and the differences between them."""
    for name, milliseconds in samples.items():
        candidates[name].timings[kind] = timing_of([ms / len(candidates[name].calls) for ms in milliseconds])
    for name, (whole, part) in differences.items():
        if whole in samples and part in samples:
            calls = len(candidates[whole].calls)
            less = [(a - b) / calls for a, b in zip(samples[whole], samples[part])]
            candidates[name].timings[kind] = timing_of(less)
    for name, error in errors.items():
        if not candidates[name].timings:
            candidates[name].error = error


def round_robin(
    runs: Mapping[str, Call], stopwatch: Stopwatch, turns: Turns, listen: Callable[[float], None] = lambda share: None
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """The milliseconds of a run, one figure a round, and the errors of those that failed, which have no figures."""
    samples: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    times: dict[str, int] = {}
    names = list(runs)
    gc.collect()
    with _no_collections():
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
    return samples, errors


@contextmanager
def _no_collections() -> Iterator[None]:
    """Without garbage collections, as timeit has it."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def captured(calls: Sequence[Call], gpu: torch.device, pool: Any) -> Call:
    """Captures all calls as one CUDA graph of the current stream; returns what replays it."""
    if torch.cuda.memory_reserved(gpu) > torch.cuda.get_device_properties(gpu).total_memory // 3:
        give_back()  # while it captures the allocator cannot give memory back
    graph = torch.cuda.CUDAGraph()
    # Not torch.cuda.graph: it empties the allocator's cache each time, and tuning captures hundreds of graphs.
    with _no_collections():  # which could destroy another graph amid this one's capture
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
    graph.capture_end()
    graph.replay()
    torch.cuda.synchronize(gpu)
    return graph.replay


def give_back() -> None:
    """Frees memory that PyTorch's allocator keeps unused; it refuses while it takes a capture for unfinished."""
    with suppress(RuntimeError):
        torch.cuda.empty_cache()


def device_milliseconds(run: Call, times: int) -> float:
    """Milliseconds by events on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def host_milliseconds(run: Call, times: int) -> float:
    """Milliseconds by the host's clock, from an idle device to an idle device."""
    return timeit.Timer(run, timer=benchmark.timer).timeit(times) * 1e3


@dataclass
class _Candidate:
    calls: list[Call] = field(default_factory=list)
    replay: Call | None = None
    timings: dict[str, Timing] = field(default_factory=dict)
    graph_error: str = ""
    error: str = ""

    def run_all(self) -> None:
        for call in self.calls:
            call()

    def measurement(self) -> Measurement:
        return Measurement(self.timings.get("graph"), self.timings.get("eager"), self.graph_error, self.error)


def timing_of(milliseconds: Sequence[float]) -> Timing:
    spread = 0.0
    if len(milliseconds) > 1:
        lower, _, upper = statistics.quantiles(milliseconds, n=4, method="inclusive")
        spread = upper - lower
    return Timing(statistics.median(milliseconds), spread, len(milliseconds), min(milliseconds))
