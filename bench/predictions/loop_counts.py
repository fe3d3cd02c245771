"""Counts how often the loops of a launch run in each of its programs, from the kernel's own source.

The kernel's Python is run, for all programs at once, with numbers where it computes with scalars and with nothing
where it computes with tiles: program ids and sizes are known, so are the bounds of its loops. Where programs part (`if
pid < prefix_programs`) each side is run for itself. What depends on data, such as the prefixes that a bank's samples
use, cannot be known: LoopCountError says where.
"""

import builtins
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from qtuning_fast.kernels.launch import Launch


@dataclass(frozen=True, order=True)
class Place:
    """A loop in the source: the line of its `for`, and the lines of the calls that led there."""

    file: str
    line: int
    calls: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Programs:
    """All programs of a launch: those of one kind run each loop equally often."""

    kinds: tuple[dict[Place, int], ...]
    order: np.ndarray  # the kind of each program, by its id: in this order they start


class LoopCountError(ValueError):
    """How often a loop runs depends on data."""


class _PartedError(Exception):
    """Some programs go one way, some the other."""

    def __init__(self, condition: np.ndarray) -> None:
        self.condition = condition


class _Scalars(np.ndarray):
    """A scalar of each program."""

    def __bool__(self) -> bool:
        first = bool(self.flat[0])
        if not np.all(np.asarray(self) == first):
            raise _PartedError(np.asarray(self))
        return first

    def __iadd__(self, other: Any) -> Any:  # makes a new array, as it does in Triton: others may have this one
        return self + other

    def __isub__(self, other: Any) -> Any:
        return self - other

    def __imul__(self, other: Any) -> Any:
        return self * other

    def __ifloordiv__(self, other: Any) -> Any:
        return self // other

    def to(self, dtype: Any) -> "_Scalars":
        return self


class _Tile:
    """A tile of numbers or a pointer: nothing is known of it, nor of what is computed from it."""

    __array_ufunc__ = None  # numpy leaves operators to this class
    dtype = SimpleNamespace(element_ty=SimpleNamespace())

    def __bool__(self) -> bool:
        raise LoopCountError(f"a branch depends on data: {_where(2)}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *arguments: Any, **options: Any) -> "_Tile":
        return self

    def __iter__(self) -> Any:
        return iter((self, self))

    def _other(self, *others: Any) -> "_Tile":
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _other
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __and__ = __rand__ = __or__ = __ror__ = _other
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __neg__ = __invert__ = __getitem__ = _other  # type: ignore
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __xor__ = _other


_TILE = _Tile()


class _Language(ModuleType):
    """Stands in for triton.language; names that are not defined here make tiles."""

    constexpr = triton.language.constexpr

    def __init__(self, pids: np.ndarray, count: Callable[..., Any]) -> None:
        super().__init__("triton.language")
        self.pids, self.range, self.static_range = pids, count, builtins.range

    def __getattr__(self, name: str) -> Any:
        return _TILE

    def program_id(self, axis: int) -> _Scalars:
        return self.pids.view(_Scalars) if axis == 0 else np.zeros_like(self.pids).view(_Scalars)

    def full(self, shape: Any, value: Any, dtype: Any) -> Any:
        return np.full_like(self.pids, value).view(_Scalars) if shape == [] else _TILE

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        return _elementwise(np.where, condition, a, b)

    def minimum(self, a: Any, b: Any) -> Any:
        return _elementwise(np.minimum, a, b)

    def maximum(self, a: Any, b: Any) -> Any:
        return _elementwise(np.maximum, a, b)

    def cdiv(self, a: Any, b: Any) -> Any:
        return -(-a // b)

    def cast(self, x: Any, dtype: Any) -> Any:
        return x

    def multiple_of(self, x: Any, values: Any) -> Any:
        return x

    def static_assert(self, *arguments: Any) -> None: ...

    def device_assert(self, *arguments: Any) -> None: ...

    def debug_barrier(self) -> None: ...


def _elementwise(function: Callable[..., Any], *arguments: Any) -> Any:
    if any(isinstance(x, _Tile) for x in arguments):
        return _TILE
    return np.asarray(function(*arguments)).view(_Scalars)


def loop_counts(launch: Launch) -> Programs:
    """How often the loops of a launch run, by program. Raises LoopCountError."""
    function = launch.kernel.fn
    arguments = {name: _plain(value) for name, value in launch.arguments.items()}
    programs = np.arange(launch.programs)
    kinds: dict[tuple[tuple[Place, int], ...], int] = {}
    order = np.zeros(launch.programs, dtype=np.int64)
    waiting = [programs] if launch.programs else []
    while waiting:
        pids = waiting.pop()
        counted: dict[Place, np.ndarray] = {}
        try:
            _run(function, arguments, pids, counted)
        except _PartedError as parted:
            side = np.broadcast_to(parted.condition.astype(bool), pids.shape)
            waiting += [pids[side], pids[~side]]
            continue
        for place_counts, chosen in _alike(counted, len(pids)):
            order[pids[chosen]] = kinds.setdefault(place_counts, len(kinds))
    return Programs(tuple(dict(kind) for kind in kinds), order)


def _alike(counted: dict[Place, np.ndarray], programs: int) -> list[tuple[tuple[tuple[Place, int], ...], np.ndarray]]:
    """Programs grouped by how often they run each loop."""
    places = sorted(counted)
    if not places:
        return [((), np.ones(programs, dtype=bool))]
    table = np.stack([np.broadcast_to(counted[place], programs) for place in places], axis=1)
    rows, which = np.unique(table, axis=0, return_inverse=True)
    return [(tuple(zip(places, map(int, row))), which.reshape(-1) == index) for index, row in enumerate(rows)]


def _run(function: Any, arguments: dict[str, Any], pids: np.ndarray, counted: dict[Place, np.ndarray]) -> None:
    def count(*bounds: Any, **options: Any) -> list[Any]:
        """In place of `range`: notes how often the loop would run, and runs it once."""
        start, end, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
        place, *calls = _places()
        if any(isinstance(x, _Tile) for x in (start, end, step)):
            raise LoopCountError(f"how often {place.file}:{place.line} runs depends on data")
        times = np.maximum(-(-(np.asarray(end) - start) // step), 0) * np.ones_like(pids)
        place = Place(place.file, place.line, tuple((call.file, call.line) for call in reversed(calls)))
        counted[place] = np.maximum(counted.get(place, 0), times)
        first = np.asarray(start) * np.ones_like(pids)
        return [first.view(_Scalars)]

    language = _Language(pids, count)
    with np.errstate(all="ignore"):  # a loop that runs no time is looked into as well
        _in_python(function, language, {})(**arguments)


def _in_python(function: FunctionType, language: _Language, known: dict[Any, Any]) -> FunctionType:
    """The function as Python, with stand-ins for Triton's language and for the kernels' own functions."""
    names: dict[str, Any] = {}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    known[function] = copy
    names["range"] = language.range
    used = set(function.__code__.co_names)
    for name in used & function.__globals__.keys():
        value = function.__globals__[name]
        if value is triton.language:
            names[name] = language
        elif isinstance(value, (JITFunction, InterpretedFunction)):
            of_triton = value.fn.__module__.startswith("triton.")
            names[name] = _TILE if of_triton else known.get(value.fn) or _in_python(value.fn, language, known)
        else:
            names[name] = _plain(value)
    return copy


def _plain(value: Any) -> Any:
    """An argument as Python numbers: constants unwrapped, tensors as tiles."""
    if isinstance(value, triton.language.constexpr):
        return value.value
    if isinstance(value, Tensor):
        return _TILE
    if isinstance(value, tuple):
        parts = [_plain(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _places() -> list[Place]:
    """The caller's caller's lines in kernels, the innermost first."""
    found = []
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename != __file__:
        found.append(Place(Path(frame.f_code.co_filename).name, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    return found


def _where(depth: int) -> str:
    frame = sys._getframe(depth)
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
