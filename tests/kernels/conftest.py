"""Checked calls for kernels, and what the definition makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qtuning_fast.attention import reference
from qtuning_fast.attention.api import call_of
from qtuning_fast.attention.arguments import INPUTS, PrefixAttentionCall


@pytest.fixture
def checked(make_call) -> Callable[..., PrefixAttentionCall]:
    """Calls as backends get them, by make_call's options."""

    def checked(**options: Any) -> PrefixAttentionCall:
        call = call_of(**make_call(**options))
        return replace(call, gate_alpha=None, gate_tau=None) if call.gate is None else call

    return checked


def _gradient_at(call: PrefixAttentionCall, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (*call.query.shape[:-1], call.value.shape[-1])
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(call.query.dtype)


def _weights_at(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse); 0 where both are -inf."""
    return (scores - lse).exp().nan_to_num(0.0)


@torch.no_grad()
def _context_alone(call: PrefixAttentionCall) -> tuple[Tensor, Tensor]:
    """Attention over the context alone, as a vendor would compute it; 0 and -inf where a query sees none."""
    scores = reference._context_scores(call)
    lse = scores.logsumexp(dim=-1)
    weights = _weights_at(scores, lse[..., None]).to(call.query.dtype)
    return reference._weighted_sum(weights, call.value, lse.dtype).to(call.query.dtype), lse


def _in_float64(x: Any) -> Any:
    return x.detach().double().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x


def _by_definition(call: PrefixAttentionCall, d_output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, log-sum-exp and the gradients of all tensors by name, in float64."""
    exact = replace(call, **{name: _in_float64(x) for name, x in vars(call).items()})
    output, lse = reference.attend(exact)
    inputs = {name: getattr(exact, name) for name in INPUTS if getattr(exact, name) is not None}
    found = torch.autograd.grad(output, list(inputs.values()), d_output.double(), allow_unused=True)
    gradients = {name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(inputs.items(), found)}
    return output.detach(), lse, gradients


@pytest.fixture(scope="session")
def gradient_at() -> Callable[..., Tensor]:
    """A gradient of the output to go backward from."""
    return _gradient_at


@pytest.fixture(scope="session")
def context_alone() -> Callable[[PrefixAttentionCall], tuple[Tensor, Tensor]]:
    return _context_alone


@pytest.fixture(scope="session")
def by_definition() -> Callable[..., tuple[Tensor, Tensor, dict[str, Tensor]]]:
    return _by_definition
