"""What several test files need: random calls of prefix_attention, and their gradients by name."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qtuning_fast import prefix_attention

Arguments = dict[str, Any]

torch.set_num_threads(1)  # tests are tiny and run side by side: threads would only wait for each other


def _make_call(
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    prefix_dtype: torch.dtype | None = None,  # that of prefix, reweighting and gate: dtype
    B: int = 2,
    Hkv: int = 2,
    G: int = 2,
    N: int = 3,
    M: int = 4,
    P: int = 3,
    D: int = 3,
    Dv: int = 2,
    T: int | None = None,  # prefixes in a bank; None: no bank
    lengths: bool = False,
    n_shared: int = 0,
    rank_key: int | None = None,
    rank_value: int | None = None,
    gate: str | None = "tanh",
    gate_shape: str = "float",  # "float", "scalar", "head", "task", "task, head"
    mask: str | None = None,  # "padding bool", "padding float", "full bool", "full float"
    bias: bool = False,
    is_causal: bool = False,
    scale: float | None = None,
) -> Arguments:
    """Random arguments; every tensor that may require a gradient does."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def trained(*shape: int) -> Tensor:
        return normal(*shape, dtype=prefix_dtype or dtype).requires_grad_()

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    def masking(kind: str, *shape: int) -> Tensor:
        visible = integers(3, *shape) > 0
        return visible if "bool" in kind else normal(*shape).masked_fill(~visible, -torch.inf)

    Hq, bank = G * Hkv, () if T is None else (T,)
    parameter_shape = {"scalar": (), "head": (Hq,), "task": (T, 1), "task, head": (T, Hq)}.get(gate_shape)
    arguments: Arguments = {
        "query": normal(B, Hq, N, D).requires_grad_(),
        "key": normal(B, Hkv, M, D).requires_grad_(),
        "value": normal(B, Hkv, M, Dv).requires_grad_(),
        "prefix_key": trained(*bank, Hkv, P, D),
        "prefix_value": trained(*bank, Hkv, P, Dv),
        "n_shared": n_shared,
        "gate": gate,
        "gate_alpha": 0.7 if parameter_shape is None else trained(*parameter_shape),
        "gate_tau": 1.3 if parameter_shape is None else trained(*parameter_shape),
        "is_causal": is_causal,
        "scale": scale,
    }
    if T is not None:
        arguments["prefix_index"] = integers(T, B)
        if lengths:
            arguments["prefix_length"] = integers(P + 1, T)
    for name, rank, size in (("reweight_key", rank_key, D), ("reweight_value", rank_value, Dv)):
        if rank is not None:
            arguments[name] = (trained(*bank, P, rank), trained(*bank, rank, Hkv, size))
    if mask is not None:
        arguments["attn_mask"] = masking(mask, B, M) if "padding" in mask else masking(mask, B, 1, N, M)
    if bias:
        arguments["prefix_bias"] = normal(1, Hq, N, P)
    return arguments


def _leaves(arguments: Arguments) -> dict[str, Tensor]:
    """The tensors of a call that require a gradient, the halves of a pair (U, V) as `name[0]` and `name[1]`."""
    flat = {}
    for name, x in arguments.items():
        flat |= {f"{name}[{i}]": half for i, half in enumerate(x)} if isinstance(x, tuple) else {name: x}
    return {name: x for name, x in flat.items() if isinstance(x, Tensor) and x.requires_grad}


def _gradients(arguments: Arguments, d_output: Tensor) -> dict[str, Tensor]:
    """The gradient of each leaf of a call; zeros where none arrives."""
    leaves = _leaves(arguments)
    output = prefix_attention(**arguments)
    grads = torch.autograd.grad(output, list(leaves.values()), d_output, allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, grads))


@pytest.fixture(scope="session")
def make_call():
    return _make_call


@pytest.fixture(scope="session")
def leaves():
    return _leaves


@pytest.fixture(scope="session")
def gradients():
    return _gradients
