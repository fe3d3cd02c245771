"""One shape, peer by peer: first what each computes, then how long it takes and how much memory."""

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

from qtuning_fast.attention import dispatch
from qtuning_fast.bench import shapes
from qtuning_fast.bench.accuracy import Errors, Reference, check, prepare, verdict
from qtuning_fast.bench.memory import peak, too_large
from qtuning_fast.bench.peers import PEERS, Prepared
from qtuning_fast.bench.shapes import Inputs, Shape
from qtuning_fast.bench.timing import (
    Call,
    Listener,
    Measurement,
    Turns,
    compare,
    first_line,
    give_back,
    sets_for,
    silent,
)

TURNS = Turns(rounds=40, seconds=8.0)
QUICK = Turns(rounds=8, seconds=5.0)
REHEARSED = Turns(rounds=2)  # on one set of inputs
ALONE = 3  # rounds of a peer before all take turns
PASSES = ("forward", "backward", "step")  # a step is forward and backward


@dataclass
class Row:
    """One peer on one shape. In training, *forward* records for a backward pass if the peer has one."""

    errors: Errors = field(default_factory=dict)
    forward: Measurement = field(default_factory=Measurement)
    backward: Measurement = field(default_factory=Measurement)
    step: Measurement = field(default_factory=Measurement)
    turns: bool = False  # True: it took turns with the other rows; False: it was timed alone
    peak: int | None = None  # the most bytes that a step, or a forward pass, takes beyond its inputs
    error: str = ""  # what it cannot do, or computes wrong


class SideBySide:
    """Several peers, each on a shape of its own. Each is checked; those that are right then take turns.

    Args:
        cases: a shape and a peer by the name of the row.
        device: "cpu" or "cuda".
        dtype: of query, key and value.
        turns: how many rounds, and for how long.
        listener: hears how far each stage is.
    """

    def __init__(
        self,
        cases: Mapping[str, tuple[Shape, str]],
        device: str,
        dtype: torch.dtype,
        turns: Turns,
        listener: Listener = silent,
    ) -> None:
        self.cases, self.device, self.dtype, self.turns, self.listener = cases, device, dtype, turns, listener
        self.rows = {name: Row() for name in cases}
        self._setups: dict[str, Callable[[], list[Call]]] = {}
        self._given: dict[Shape, tuple[list[Inputs], Reference]] = {}

    def check(self, name: str, *, alone: bool = False) -> None:
        """Checks a peer. One that is wrong or does not fit is not timed.

        Args:
            name: of the row.
            alone: time it now, by itself, until all take turns.
        """
        self.listener("checking", list(self.cases).index(name) / len(self.cases))
        (shape, peer), row = self.cases[name], self.rows[name]
        row.error = too_large(shape, peer, self.device, self.dtype)
        if row.error:
            return
        sets, reference = self._inputs(shape)
        setups = _checked(name, peer, reference, sets, row, self.dtype)
        self._setups |= setups
        if alone and setups:
            self._time([name], setups, Turns(rounds=min(ALONE, self.turns.rounds), seconds=0.0))

    def take_turns(self) -> None:
        """Times all peers that are right, round by round."""
        if torch.device(self.device).type == "cuda":
            give_back()  # the checks' memory, for the graphs
        self._time(list(self.cases), self._setups, self.turns)
        for name in self.cases:
            self.rows[name].turns = f"{name} forward" in self._setups

    def measure_peak(self, name: str) -> None:
        """Measures the memory of a peer that was timed."""
        (shape, peer), row = self.cases[name], self.rows[name]
        if (row.step if shape.trained else row.forward).best is not None:
            self.listener("memory", list(self.cases).index(name) / len(self.cases))
            row.peak = _peak(shape, peer, self.device, self.dtype)

    @property
    def ready(self) -> bool:
        """Whether some peer may be timed."""
        return bool(self._setups)

    def _inputs(self, shape: Shape) -> tuple[list[Inputs], Reference]:
        if shape not in self._given:
            gpu = torch.device(self.device)
            nbytes = shapes.inputs(shape, dtype=self.dtype, device="meta").nbytes
            count = 1 if self.turns == REHEARSED else sets_for(nbytes, gpu)
            sets = shapes.input_sets(shape, count, dtype=self.dtype, device=self.device)
            self._given[shape] = sets, Reference(shape, sets[0])
        return self._given[shape]

    def _time(self, names: Sequence[str], setups: Mapping[str, Callable[[], list[Call]]], turns: Turns) -> None:
        backwards = {f"{name} backward": (f"{name} step", f"{name} forward") for name in names}
        gpu = torch.device(self.device)
        times = compare(setups, device=gpu, differences=backwards, listener=self.listener, **turns._asdict())
        for name in names:
            row = self.rows[name]
            row.forward, row.backward, row.step = (times.get(f"{name} {each}", Measurement()) for each in PASSES)
            errors = (row.error, row.forward.error, row.step.error, row.forward.graph_error, row.step.graph_error)
            row.error = next(filter(None, errors), "")


def measure(
    shape: Shape,
    peers: Sequence[str],
    device: str,
    *,
    dtype: torch.dtype | None = None,
    turns: Turns = TURNS,
    peaks: Collection[str] | None = None,
    listener: Listener = silent,
) -> dict[str, Any]:
    """Measures peers beside each other on one shape.

    Args:
        dtype: of query, key and value; default bfloat16 on a GPU and float32 on a CPU.
        peaks: the peers whose memory is measured; None: all.

    Returns the entry of a file of results.
    """
    started, dtype = time.perf_counter(), dtype or default_dtype(device)
    side = SideBySide({peer: (shape, peer) for peer in peers}, device, dtype, turns, listener)
    for peer in peers:
        side.check(peer)
    side.take_turns()
    for peer in peers:
        if peaks is None or peer in peaks:
            side.measure_peak(peer)
    rows = {"rows": as_json(side.rows), "seconds": round(time.perf_counter() - started, 1)}
    return described(shape, device, dtype) | rows


def described(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The entry of a shape without its rows: its sizes, what `auto` takes and why, and who computes the context in
    the composed backend.
    """
    x = shapes.inputs(shape, dtype=dtype, device=device)
    call = (x.tracked() if shape.trained else x).call(shape)
    able = dispatch.BACKENDS["composed"].why_not(call) is None
    return {
        "shape": asdict(shape) | {"M": shape.M},
        "title": str(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "auto": vars(dispatch.explain(call, "auto")),
        "composed": dispatch.BACKENDS["composed"].how(call) if able else "",
    }


def measure_cases(
    cases: Mapping[str, tuple[Shape, str]], device: str, dtype: torch.dtype, turns: Turns
) -> dict[str, Row]:
    """Several peers, each on a shape of its own, in turns. One that is wrong is not timed."""
    side = SideBySide(cases, device, dtype, turns)
    for name in cases:
        side.check(name)
    side.take_turns()
    return side.rows


def broken(device: str) -> bool:
    """Whether an error has broken this process's CUDA context, so that nothing more can be measured in it."""
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
    """Writes a peer's errors into its row and returns what of it may be timed."""
    shape = reference.shape
    for training in (True, False) if shape.trained else (False,):
        try:
            check(PEERS[peer], reference, row.errors, training=training)
        except Exception as error:  # recorded in the row; a peer that cannot train may still compute
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


def _prepared(
    peer: str, shape: Shape, sets: Sequence[Inputs], training: bool
) -> Callable[[], list[tuple[Prepared, Tensor]]]:
    """The peer with each set of inputs, prepared once for forward and step."""
    return cache(lambda: [(prepare(PEERS[peer], shape, x, training=training), x.d_output) for x in sets])


def _forwards(prepared: Callable[[], list[tuple[Prepared, Tensor]]]) -> list[Call]:
    return [one.forward for one, _ in prepared()]


def _steps(prepared: Callable[[], list[tuple[Prepared, Tensor]]]) -> list[Call]:
    return [partial(one.step, d_output) for one, d_output in prepared()]


def as_json(rows: Mapping[str, Row]) -> dict[str, Any]:
    return {name: asdict(row) for name, row in rows.items()}


def _peak(shape: Shape, peer: str, device: str, dtype: torch.dtype) -> int | None:
    if torch.device(device).type == "cuda":
        return peak(shape, peer, device, dtype)
    return in_a_process(peak, shape, peer, device, dtype)


def default_dtype(device: str) -> torch.dtype:
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def in_a_process(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Calls a function in a process of its own, so that a broken CUDA context or leaked memory ends with it."""
    with ProcessPoolExecutor(1, mp_context=apart()) as pool:
        return pool.submit(function, *arguments, **options).result()


def apart() -> Any:
    """The multiprocessing context: forks of a process that has loaded PyTorch and computed nothing, where possible."""
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context
