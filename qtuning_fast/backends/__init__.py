"""What computes the operator: one module a backend, and here the choice between them."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from torch import Tensor

from qtuning_fast import reference
from qtuning_fast.backends import fused
from qtuning_fast.call import PrefixAttentionCall

ENVIRONMENT_VARIABLE = "QTUNING_FAST_BACKEND"
HAS_TRITON = find_spec("triton") is not None  # looked for, not imported: that takes a second, and not all have it


@dataclass(frozen=True)
class Backend:
    """One way to compute the operator."""

    name: str
    why_not: Callable[[PrefixAttentionCall], str | None]  # what it cannot do about this call; None: it can do it
    run: Callable[[PrefixAttentionCall], tuple[Tensor, Tensor]]  # output, log-sum-exp
    only_by_name: Callable[[PrefixAttentionCall], str | None] = lambda call: None  # why "auto" passes it by, or None


@dataclass(frozen=True)
class BackendChoice:
    """Which backend a call gets, and why."""

    backend: str
    reason: str
    rejected: dict[str, str]  # every other backend, and why it was not picked

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.reason}", *(f"  not {name}: {why}" for name, why in self.rejected.items())]
        return "\n".join(lines)


BACKENDS = {
    "fused": Backend("fused", fused.why_not, fused.attend, fused.only_by_name),
    "reference": Backend("reference", why_not=lambda call: None, run=reference.attend),
}
PREFERENCE = ("fused", "composed", "reference")  # the order in which "auto" asks
NAMES = ("auto", *PREFERENCE)


def choose(call: PrefixAttentionCall, requested: str) -> BackendChoice:
    """The backend for a call: the one requested, or for "auto" the first that can do it.

    Raises NotImplementedError when the one requested cannot do it, ValueError when QTUNING_FAST_BACKEND, which
    stands in for "auto", names none.
    """
    asked_by = "asked for by name"
    if requested == "auto" and os.environ.get(ENVIRONMENT_VARIABLE):
        requested, asked_by = os.environ[ENVIRONMENT_VARIABLE], f"asked for by {ENVIRONMENT_VARIABLE}"
        if requested not in NAMES:
            raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(NAMES)}, got {requested!r}")
    obstacles = {name: _why_not(name, call) for name in PREFERENCE}

    if requested == "auto":
        obstacles |= {n: why for n, b in BACKENDS.items() if not obstacles[n] and (why := b.only_by_name(call))}
        backend = next(name for name in PREFERENCE if obstacles[name] is None)
        reason, second_best = f"the first of {', '.join(PREFERENCE)} that can do this call", f"{backend} comes first"
    elif obstacles[requested] is None:
        backend, reason, second_best = requested, asked_by, f"{requested} was {asked_by}"
    else:
        able = [name for name in PREFERENCE if obstacles[name] is None]
        raise NotImplementedError(
            f"backend {requested!r}, {asked_by}, cannot do this call: {obstacles[requested]}. "
            f"What can do it: {', '.join(able)}"
        )
    return BackendChoice(backend, reason, {n: obstacles[n] or second_best for n in PREFERENCE if n != backend})


def _why_not(name: str, call: PrefixAttentionCall) -> str | None:
    if name == "composed" and name not in BACKENDS:
        return "its context and prefix parts are not in this version"
    if name == "fused" and not HAS_TRITON:
        return "triton is not installed"
    return BACKENDS[name].why_not(call)
