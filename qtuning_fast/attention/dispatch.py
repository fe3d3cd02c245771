"""Which backend computes a call, and why."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from torch import Tensor

from qtuning_fast.attention import backend_order, composed, fused, reference
from qtuning_fast.attention.arguments import PrefixAttentionCall, check_choice
from qtuning_fast.attention.backend_order import PREFERENCE

ENVIRONMENT_VARIABLE = "QTUNING_FAST_BACKEND"
HAS_TRITON = find_spec("triton") is not None  # looked for, not imported: that takes a second, and not all have it


@dataclass(frozen=True)
class Backend:
    """One way to compute the operator."""

    name: str
    why_not: Callable[[PrefixAttentionCall], str | None]  # what it cannot do about this call; None: it can do it
    run: Callable[[PrefixAttentionCall], tuple[Tensor, Tensor]]  # output, log-sum-exp
    only_by_name: Callable[[PrefixAttentionCall], str | None] = lambda call: None  # why "auto" passes it by, or None
    needs_triton: Callable[[PrefixAttentionCall], bool] = lambda call: False
    how: Callable[[PrefixAttentionCall], str] = lambda call: ""  # what else there is to say of how it does a call


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
    "fused": Backend("fused", fused.why_not, fused.attend, fused.only_by_name, needs_triton=lambda call: True),
    "composed": Backend(
        "composed",
        composed.why_not,
        composed.attend,
        composed.only_by_name,
        needs_triton=lambda call: call.query.is_cuda,
        how=composed.how,
    ),
    "reference": Backend("reference", why_not=lambda call: None, run=reference.attend),
}
NAMES = ("auto", *PREFERENCE)


def choose(call: PrefixAttentionCall, requested: str) -> str:
    """The backend for a call: the one requested, or for "auto" the first in `backend_order` that can do it.

    Raises NotImplementedError when the one requested cannot do it, ValueError when QTUNING_FAST_BACKEND, which
    stands in for "auto", names none.
    """
    requested, asked_by = _requested(requested)
    if requested == "auto":
        order = backend_order.in_order(call)
        return next(n for n in order if _why_not(n, call) is None and BACKENDS[n].only_by_name(call) is None)
    obstacle = _why_not(requested, call)
    if obstacle is None:
        return requested
    able = [name for name in PREFERENCE if _why_not(name, call) is None]
    raise NotImplementedError(
        f"backend {requested!r}, {asked_by}, cannot do this call: {obstacle}. What can do it: {', '.join(able)}"
    )


def explain(call: PrefixAttentionCall, requested: str) -> BackendChoice:
    """What `choose` answers, and why; raises what it raises."""
    backend = choose(call, requested)
    requested, reason = _requested(requested)
    obstacles = {name: _why_not(name, call) for name in PREFERENCE}
    second_best = f"{backend} was {reason}"
    if requested == "auto":
        obstacles = {name: why or BACKENDS[name].only_by_name(call) for name, why in obstacles.items()}
        rule, order = backend_order.rule_for(call), backend_order.in_order(call)
        reason = (
            f"the fastest by its table: {rule}" if rule else f"the first of {', '.join(order)} that can do this call"
        )
        if backend != order[0]:
            others = ", ".join(order[1:])
            reason = f"{order[0]} would be {reason}; of {others} it is the first that can do this call"
        second_best = f"{backend} comes first"
    how = BACKENDS[backend].how(call)
    rejected = {name: obstacles[name] or second_best for name in PREFERENCE if name != backend}
    return BackendChoice(backend, f"{reason}; {how}" if how else reason, rejected)


def _requested(name: str) -> tuple[str, str]:
    """What is asked for, the environment standing in for "auto", and by whom."""
    check_choice("backend", name, NAMES)
    override = os.environ.get(ENVIRONMENT_VARIABLE)
    if name != "auto" or not override:
        return name, "asked for by name"
    if override not in NAMES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(NAMES)}, got {override!r}")
    return override, f"asked for by {ENVIRONMENT_VARIABLE}"


def _why_not(name: str, call: PrefixAttentionCall) -> str | None:
    backend = BACKENDS[name]
    if backend.needs_triton(call) and not HAS_TRITON:
        return "triton is not installed"
    return backend.why_not(call)
