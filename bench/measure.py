"""One shape, peer by peer: first what it computes, then how long it takes and how much memory."""

import gc
import multiprocessing
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qtuning_fast.attention import dispatch
from qtuning_fast.bench import durations, shapes
from qtuning_fast.bench.accuracy import Errors, Reference, check, prepare, verdict
from qtuning_fast.bench.memory import peak, too_large
from qtuning_fast.bench.peers import PEERS, Prepared
from qtuning_fast.bench.results import Results, device_folder
from qtuning_fast.bench.roofline import Ceilings, backward_work, forward_work
from qtuning_fast.bench.schedule import RESTART, Schedule
from qtuning_fast.bench.shapes import Inputs, Shape
from qtuning_fast.bench.timing import (
    Call,
    Listener,
    Measurement,
    Turns,
    compare,
    first_line,
    give_back,
    nobody,
    sets_for,
)

TURNS = Turns(rounds=40, seconds=8.0)
QUICK = Turns(rounds=8, seconds=5.0)
REHEARSED = Turns(rounds=2)  # on one set of inputs
ALONE = 3  # rounds of a peer before all take turns
PASSES = ("forward", "backward", "step")  # the last is the first two


@dataclass
class Row:
    """One peer on one shape. In training *forward* records for a backward pass, if the peer has one."""

    errors: Errors = field(default_factory=dict)
    forward: Measurement = field(default_factory=Measurement)
    backward: Measurement = field(default_factory=Measurement)
    step: Measurement = field(default_factory=Measurement)
    turns: bool = False  # whether it took turns with the other rows; else it was timed alone
    peak: int | None = None  # bytes that a step, or a forward pass, takes at the most beyond its inputs
    error: str = ""  # what it cannot do, or does wrong


def measure(
    shape: Shape,
    peers: Sequence[str],
    device: str,
    ceilings: Ceilings | None,
    *,
    dtype: torch.dtype | None = None,
    turns: Turns = TURNS,
    peaks: Collection[str] | None = None,
    listener: Listener = nobody,
    schedule: Schedule | None = None,
    known: Mapping[str, Any] | None = None,
    wrote: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Peers beside each other on one shape, as JSON has it. In bfloat16 on a GPU, float32 on a CPU, unless told.

    Without ceilings there are no floors. Memory is measured of the peers in `peaks`, None: of all. With a schedule,
    what it has no time for is left out; `known` is the entry as an earlier process left it; and `wrote` is handed the
    entry after each row, in which the peer was timed alone until all take turns.
    """
    started = time.perf_counter()
    dtype = dtype or default_dtype(device)
    schedule = schedule or Schedule()
    side = SideBySide({peer: (shape, peer) for peer in peers}, device, dtype, turns, listener)
    before, asked = dict((known or {}).get("rows", {})), set[str]()
    entry = {
        "shape": asdict(shape) | {"M": shape.M},
        "title": str(shape),
        "dtype": str(dtype).removeprefix("torch."),
        **({} if ceilings is None else floors(shape, dtype, ceilings)),
        **backends_for(shape, device, dtype),
        **predicted(shape, device),
    }

    def by_now() -> dict[str, Any]:
        rows = before | as_json({peer: row for peer, row in side.rows.items() if peer in asked and peer not in before})
        return entry | {"rows": rows, "seconds": round(time.perf_counter() - started, 1)}

    for unit in durations.rows(shape, peers, turns, peaks):
        if unit.kind == "turns" and not side.ready:
            continue
        peer, begins = unit.of, schedule.may_begin(unit.name, unit.seconds, unit.reserve)
        if unit.kind == "row":
            asked.add(peer)
            if begins:
                before.pop(peer, None)
                side.one(peer, alone=wrote is not None)
            elif peer not in before:
                side.rows[peer].error = schedule.status(unit.name)
        elif unit.kind == "turns" and begins:
            side.all()
        elif unit.kind == "memory" and begins and peer not in before and side.timed(peer):
            listener("memory", peers.index(peer) / len(peers))
            side.rows[peer].peak = _peak(shape, peer, device, dtype)
        if wrote is not None:
            wrote(by_now())
        if broken(device):
            raise SystemExit(RESTART)
    schedule.end()
    return by_now()


def backends_for(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """What `auto` takes, and why; and by whose attention the composed backend computes the context."""
    x = shapes.inputs(shape, dtype=dtype, device=device)
    call = (x.tracked() if shape.trained else x).call(shape)
    able = dispatch.BACKENDS["composed"].why_not(call) is None
    how = dispatch.BACKENDS["composed"].how(call) if able else ""
    return {"auto": vars(dispatch.explain(call, "auto")), "composed": how}


class SideBySide:
    """Several peers, each on a shape of its own: each is checked when asked for, and in the end all take turns.

    Args:
        cases: by name, a shape and a peer.
    """

    def __init__(
        self,
        cases: Mapping[str, tuple[Shape, str]],
        device: str,
        dtype: torch.dtype,
        turns: Turns,
        listener: Listener = nobody,
    ) -> None:
        self.cases, self.device, self.dtype, self.turns, self.listener = cases, device, dtype, turns, listener
        self.rows = {name: Row() for name in cases}
        self._setups: dict[str, Callable[[], list[Call]]] = {}
        self._given: dict[Shape, tuple[list[Inputs], Reference]] = {}

    def one(self, name: str, *, alone: bool = False) -> None:
        """Checks a peer; what is wrong, or does not fit, is not timed. Alone: takes its times now, until all do."""
        self.listener("checking", list(self.cases).index(name) / len(self.cases))
        (shape, peer), row = self.cases[name], self.rows[name]
        row.error = too_large(shape, peer, self.device, self.dtype)
        if row.error:
            return
        sets, reference = self._inputs(shape)
        setups = _checked(name, peer, reference, sets, row, self.dtype)
        self._setups |= setups
        if alone and setups:
            self._take_times([name], setups, Turns(rounds=min(ALONE, self.turns.rounds), seconds=0.0))

    def all(self) -> None:
        """Those that are right take turns."""
        if torch.device(self.device).type == "cuda":
            give_back()  # what the checks took, for the graphs
        self._take_times(list(self.cases), self._setups, self.turns)
        for name in self.cases:
            self.rows[name].turns = f"{name} forward" in self._setups

    @property
    def ready(self) -> bool:
        """Whether some peer may be timed."""
        return bool(self._setups)

    def timed(self, name: str) -> bool:
        """Whether a peer has done all that is asked of it."""
        shape, row = self.cases[name][0], self.rows[name]
        return (row.step if shape.trained else row.forward).best is not None

    def _inputs(self, shape: Shape) -> tuple[list[Inputs], Reference]:
        if shape not in self._given:
            gpu = torch.device(self.device)
            nbytes = shapes.inputs(shape, dtype=self.dtype, device="meta").nbytes
            count = 1 if self.turns == REHEARSED else sets_for(nbytes, gpu)
            sets = shapes.input_sets(shape, count, dtype=self.dtype, device=self.device)
            self._given[shape] = sets, Reference(shape, sets[0])
        return self._given[shape]

    def _take_times(self, names: Sequence[str], setups: Mapping[str, Callable[[], list[Call]]], turns: Turns) -> None:
        backwards = {f"{name} backward": (f"{name} step", f"{name} forward") for name in names}
        gpu = torch.device(self.device)
        times = compare(setups, device=gpu, differences=backwards, listener=self.listener, **turns._asdict())
        for name in names:
            row = self.rows[name]
            row.forward, row.backward, row.step = (times.get(f"{name} {each}", Measurement()) for each in PASSES)
            row.error = row.error or row.forward.error or row.step.error or row.forward.graph_error
            row.error = row.error or row.step.graph_error


def measure_cases(
    cases: Mapping[str, tuple[Shape, str]],
    device: str,
    dtype: torch.dtype,
    turns: Turns,
    listener: Listener = nobody,
) -> dict[str, Row]:
    """Several peers, each on a shape of its own, in turns. What is wrong is not timed."""
    side = SideBySide(cases, device, dtype, turns, listener)
    for name in cases:
        side.one(name)
    side.all()
    return side.rows


def broken(device: str) -> bool:
    """Whether an error has broken this process's CUDA context: nothing after it can be measured here."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _checked(
    name: str, peer: str, reference: Reference, sets: Sequence[Inputs], row: Row, dtype: torch.dtype
) -> dict[str, Callable[[], list[Call]]]:
    """Writes a peer's errors into its row, and returns what of it may be timed."""
    shape = reference.shape
    for training in (True, False) if shape.trained else (False,):
        try:
            check(PEERS[peer], reference, row.errors, training=training)
        except Exception as error:  # what a peer cannot do is its row; what it cannot train it may compute
            row.error = row.error or first_line(error)
            if isinstance(error, (ImportError, torch.OutOfMemoryError)):
                break
            continue
        if wrong := verdict(row.errors, dtype):
            row.error = wrong
            return {}
        prepared = _prepared(peer, shape, sets, training)
        setups: dict[str, Callable[[], list[Call]]] = {f"{name} forward": partial(_forwards, prepared)}
        return setups | ({f"{name} step": partial(_steps, prepared)} if training else {})
    return {}


def as_json(rows: Mapping[str, Row]) -> dict[str, Any]:
    return {name: asdict(row) for name, row in rows.items()}


def _peak(shape: Shape, peer: str, device: str, dtype: torch.dtype) -> int | None:
    if torch.device(device).type == "cuda":
        return peak(shape, peer, device, dtype)
    return in_a_process(peak, shape, peer, device, dtype)


def floors(shape: Shape, dtype: torch.dtype, ceilings: Ceilings) -> dict[str, Any]:
    """Work of each pass, and the milliseconds that it takes at the least."""
    work = {"forward": forward_work(shape, dtype.itemsize)}
    if shape.trained:
        work["backward"] = backward_work(shape, dtype.itemsize)
        work["step"] = work["forward"] + work["backward"]
    return {
        "work": {name: asdict(each) for name, each in work.items()},
        "floor_ms": {name: each.floor(ceilings) for name, each in work.items()},
    }


def predicted(shape: Shape, device: str) -> dict[str, Any]:
    """What was predicted of "fused" before it was measured, where a prediction is of this GPU and this shape."""
    if torch.device(device).type != "cuda":
        return {}
    gpu = device_folder({"type": "cuda", "name": torch.cuda.get_device_name()})
    ms = durations.predicted_ms(shape.name, gpu)
    return {"predicted_ms": {"fused": ms}} if ms else {}


def scheduled(
    jobs: Mapping[str, Callable[..., dict[str, Any]]], results: Results, deadline: float
) -> dict[str, Callable[[], dict[str, Any]]]:
    """The same jobs under a deadline: they leave out what would end after it, go on from an entry that is there, and
    write with each row."""
    schedule, entries = results.schedule(deadline), results.document["entries"]
    return {
        name: partial(job, schedule=schedule, known=entries.get(name), wrote=partial(results.add, name))
        for name, job in jobs.items()
    }


def measure_each(
    results: Results,
    jobs: Mapping[str, Callable[[], dict[str, Any]]],
    table: Callable[[dict[str, Any]], str],
    *,
    each_apart: bool = True,
) -> int:
    """Entry after entry into the file and onto the screen.

    Args:
        jobs: by the entry's name, what makes it; other processes must be able to load it.
        table: an entry as text.
        each_apart: each in a process of its own; else all in this one, which starts once and which an error may end.

    Returns the exit status: 1 if some entry could not be had.
    """
    for name, job in tqdm(jobs.items(), disable=None):
        try:
            entry = in_a_process(job) if each_apart else job()
        except Exception as error:  # one that died, too; the others go on
            results.fail(name, first_line(error))
            continue
        results.add(name, entry)
        tqdm.write(f"\n{table(entry)}")
        sys.stdout.flush()
        if not each_apart:
            _forget()
    return results.finish()


def _forget() -> None:
    """What an entry has left in this process: compiled graphs, of which only so many may be, and memory."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        give_back()


def default_dtype(device: str) -> torch.dtype:
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def in_a_process(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """In a process of its own: what breaks a CUDA context, or takes memory, does so for this one only."""
    with ProcessPoolExecutor(1, mp_context=apart()) as pool:
        return pool.submit(function, *arguments, **options).result()


def apart() -> Any:
    """What starts processes: forks of one that has PyTorch and has computed nothing, where there are forks."""
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _prepared(
    peer: str, shape: Shape, sets: Sequence[Inputs], training: bool
) -> Callable[[], list[tuple[Prepared, Tensor]]]:
    """The peer with each set of inputs, prepared once for forward and step."""
    return cache(lambda: [(prepare(PEERS[peer], shape, x, training=training), x.d_output) for x in sets])


def _forwards(prepared: Callable[[], list[tuple[Prepared, Tensor]]]) -> list[Call]:
    return [one.forward for one, _ in prepared()]


def _steps(prepared: Callable[[], list[tuple[Prepared, Tensor]]]) -> list[Call]:
    return [partial(one.step, d_output) for one, d_output in prepared()]
