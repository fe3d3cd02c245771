"""One shape, peer by peer: first what it computes, then how long it takes and how much memory."""

import math
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

from qtuning_fast import backends
from qtuning_fast.bench import shapes
from qtuning_fast.bench.accuracy import Errors, Reference, check, prepare, verdict
from qtuning_fast.bench.floors import Ceilings, backward_work, forward_work
from qtuning_fast.bench.memory import peak
from qtuning_fast.bench.peers import PEERS, Prepared
from qtuning_fast.bench.results import Results
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
PASSES = ("forward", "backward", "step")  # the last is the first two


@dataclass
class Row:
    """One peer on one shape. In training *forward* records for a backward pass, if the peer has one."""

    errors: Errors = field(default_factory=dict)
    forward: Measurement = field(default_factory=Measurement)
    backward: Measurement = field(default_factory=Measurement)
    step: Measurement = field(default_factory=Measurement)
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
) -> dict[str, Any]:
    """Peers beside each other on one shape, as JSON has it. In bfloat16 on a GPU, float32 on a CPU, unless told.

    Without ceilings there are no floors. Memory is measured of the peers in `peaks`, None: of all.
    """
    started = time.perf_counter()
    dtype = dtype or default_dtype(device)
    rows = measure_cases({peer: (shape, peer) for peer in peers}, device, dtype, turns, listener)
    for done, (peer, row) in enumerate(rows.items()):
        listener("memory", done / len(rows))
        timed = (row.step if shape.trained else row.forward).best is not None
        if timed and (peaks is None or peer in peaks):
            row.peak = _peak(shape, peer, device, dtype)
    return {
        "shape": asdict(shape) | {"M": shape.M},
        "title": str(shape),
        "dtype": str(dtype).removeprefix("torch."),
        **({} if ceilings is None else floors(shape, dtype, ceilings)),
        **backends_for(shape, device, dtype),
        "rows": as_json(rows),
        "seconds": round(time.perf_counter() - started, 1),
    }


def backends_for(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """What `auto` takes, and why; and by whose attention the composed backend computes the context."""
    x = shapes.inputs(shape, dtype=dtype, device=device)
    call = (x.tracked() if shape.trained else x).call(shape)
    able = backends.BACKENDS["composed"].why_not(call) is None
    how = backends.BACKENDS["composed"].how(call) if able else ""
    return {"auto": vars(backends.explain(call, "auto")), "composed": how}


def measure_cases(
    cases: Mapping[str, tuple[Shape, str]],
    device: str,
    dtype: torch.dtype,
    turns: Turns,
    listener: Listener = nobody,
) -> dict[str, Row]:
    """Several peers, each on a shape of its own, in turns. What is wrong is not timed."""
    gpu = torch.device(device)
    rows = {name: Row() for name in cases}
    setups: dict[str, Callable[[], list[Call]]] = {}
    for shape in dict.fromkeys(shape for shape, _ in cases.values()):
        count = 1 if turns == REHEARSED else sets_for(shapes.inputs(shape, dtype=dtype, device="meta").nbytes, gpu)
        sets = shapes.input_sets(shape, count, dtype=dtype, device=device)
        reference = Reference(shape, sets[0])
        for name, (_, peer) in cases.items():
            if cases[name][0] == shape:
                listener("checking", list(cases).index(name) / len(cases))
                setups |= _checked(name, peer, reference, sets, rows[name], dtype)
    if gpu.type == "cuda":
        give_back()  # what the checks took, for the graphs
    backwards = {f"{name} backward": (f"{name} step", f"{name} forward") for name in cases}
    times = compare(setups, device=gpu, differences=backwards, listener=listener, **turns._asdict())
    for name, row in rows.items():
        row.forward, row.backward, row.step = (times.get(f"{name} {each}", Measurement()) for each in PASSES)
        row.error = row.error or row.forward.error or row.step.error or row.forward.graph_error or row.step.graph_error
    return rows


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


def measure_each(
    results: Results,
    jobs: Mapping[str, Callable[[], dict[str, Any]]],
    table: Callable[[dict[str, Any]], str],
    *,
    seconds: float = math.inf,
) -> int:
    """Entry after entry, each in a process of its own, into the file and onto the screen.

    Args:
        jobs: by the entry's name, what makes it; other processes must be able to load it.
        table: an entry as text.
        seconds: after so many no entry is begun.

    Returns the exit status: 1 if some entry could not be had.
    """
    started = time.perf_counter()
    for name, job in tqdm(jobs.items(), disable=None):
        if time.perf_counter() - started > seconds:
            results.fail(name, "left out: the time was spent")
            continue
        try:
            entry = in_a_process(job)
        except Exception as error:  # one that died, too; the others go on
            results.fail(name, first_line(error))
            continue
        results.add(name, entry)
        tqdm.write(f"\n{table(entry)}")
        sys.stdout.flush()
    return results.finish()


def default_dtype(device: str) -> torch.dtype:
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def in_a_process(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """In a process of its own: what breaks a CUDA context, or takes memory, does so for this one only."""
    method = "spawn" if sys.platform == "win32" else "forkserver"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])  # forks of a process that has PyTorch and has computed nothing
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments, **options).result()


def _prepared(
    peer: str, shape: Shape, sets: Sequence[Inputs], training: bool
) -> Callable[[], list[tuple[Prepared, Tensor]]]:
    """The peer with each set of inputs, prepared once for forward and step."""
    return cache(lambda: [(prepare(PEERS[peer], shape, x, training=training), x.d_output) for x in sets])


def _forwards(prepared: Callable[[], list[tuple[Prepared, Tensor]]]) -> list[Call]:
    return [one.forward for one, _ in prepared()]


def _steps(prepared: Callable[[], list[tuple[Prepared, Tensor]]]) -> list[Call]:
    return [partial(one.step, d_output) for one, d_output in prepared()]
