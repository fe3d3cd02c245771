"""The choice of a backend for a call, and the reasons for it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from qtuning_fast.attention import backend_order, composed, fused, native, reference
from qtuning_fast.attention.arguments import PrefixAttentionCall
from qtuning_fast.attention.backend_order import PREFERENCE
from qtuning_fast.attention.checks import check_choice
from qtuning_fast.attention.common import constant

ENVIRONMENT_VARIABLE = "QTUNING_FAST_BACKEND"
HAS_TRITON = find_spec("triton") is not None  # importing it would take a second


@dataclass(frozen=True)
class Backend:
    """One way to compute the operator."""

    name: str
    why_not: Callable[[PrefixAttentionCall], str | None]  # why it cannot compute a call; None: it can
    run: Callable[[PrefixAttentionCall], tuple[Tensor, Tensor]]  # output, log-sum-exp
    only_by_name: Callable[[PrefixAttentionCall], str | None] = lambda call: None  # why "auto" skips it, or None
    needs_triton: Callable[[PrefixAttentionCall], bool] = lambda call: False
    how: Callable[[PrefixAttentionCall], str] = lambda call: ""  # details of how it computes a call


@dataclass(frozen=True)
class BackendChoice:
    """The backend of a call, and the reasons for it."""

    backend: str
    reason: str
    rejected: dict[str, str]  # every other backend and why it was rejected

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.reason}", *(f"  not {name}: {why}" for name, why in self.rejected.items())]
        return "\n".join(lines)


BACKENDS = {
    "fused": Backend("fused", fused.why_not, fused.attend, fused.only_by_name, needs_triton=lambda call: True),
    "native": Backend("native", native.why_not, native.attend, native.only_by_name),
    "composed": Backend(
        "composed",
        composed.why_not,
        composed.attend,
        composed.only_by_name,
        needs_triton=lambda call: call.query.is_cuda,
        how=composed.how,
    ),
    "reference": Backend("reference", reference.why_not, reference.attend),
}
NAMES = ("auto", *PREFERENCE)


def choose(call: PrefixAttentionCall, requested: str) -> str:
    """Return the backend for a call: the requested one or, for "auto", the first able one in `backend_order`.

    Raises:
        NotImplementedError: the requested backend cannot compute the call, or none can.
        ValueError: QTUNING_FAST_BACKEND, which replaces "auto", names no backend.
    """
    requested, asked_by = _requested(requested)
    if requested == "auto":
        for name in backend_order.in_order(call):
            if _why_not(name, call) is None and BACKENDS[name].only_by_name(call) is None:
                return name
        reasons = "; ".join(f"{name}: {_why_not(name, call)}" for name in PREFERENCE)
        raise NotImplementedError(f"no backend can compute this call: {reasons}")
    obstacle = _why_not(requested, call)
    if obstacle is None:
        return requested
    able = ", ".join(name for name in PREFERENCE if _why_not(name, call) is None) or "none"
    raise NotImplementedError(
        f"backend {requested!r}, {asked_by}, cannot compute this call: {obstacle}. Backends that can: {able}"
    )


def explain(call: PrefixAttentionCall, requested: str) -> BackendChoice:
    """Return the choice of `choose` with its reasons; raise what it raises."""
    backend = choose(call, requested)
    requested, reason = _requested(requested)
    obstacles = {name: _why_not(name, call) for name in PREFERENCE}
    second_best = f"{backend} was {reason}"
    if requested == "auto":
        obstacles = {name: why or BACKENDS[name].only_by_name(call) for name, why in obstacles.items()}
        rules, order = [*backend_order.rules_for(call)], [*dict.fromkeys(backend_order.in_order(call))]
        reason = f"the first of {', '.join(order)} that can compute it"
        if rules:
            reason = f"the fastest by the table: {rules[0]}"
        if backend != order[0]:
            others = ", ".join(order[1:])
            reason = f"{order[0]} would be {reason}; of {others} it is the first that can compute it"
        second_best = f"{backend} comes first"
    how = BACKENDS[backend].how(call)
    rejected = {name: obstacles[name] or second_best for name in PREFERENCE if name != backend}
    return BackendChoice(backend, f"{reason}; {how}" if how else reason, rejected)


def _requested(name: str) -> tuple[str, str]:
    """Return the requested backend, with "auto" replaced for ONNX or from the environment, and who requested it."""
    check_choice("backend", name, NAMES)
    override = os.environ.get(ENVIRONMENT_VARIABLE)
    if name == "auto" and torch.compiler.is_exporting() and _is_for_onnx():
        return "reference", "the only one that ONNX can express"
    if name != "auto" or not override:
        return name, "requested by name"
    if override not in NAMES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(NAMES)}, got {override!r}")
    return override, f"requested by {ENVIRONMENT_VARIABLE}"


@constant
def _is_for_onnx() -> bool:
    """Return whether the graph that is being traced is for ONNX, which knows PyTorch's operators and none of ours."""
    return torch.onnx.is_in_onnx_export()


def _why_not(name: str, call: PrefixAttentionCall) -> str | None:
    backend = BACKENDS[name]
    if backend.needs_triton(call) and not HAS_TRITON:
        return "triton is not installed"
    return backend.why_not(call)
