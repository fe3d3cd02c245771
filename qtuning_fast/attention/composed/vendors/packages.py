"""Flash attention by packages that a user may have installed: flash_attn 3 and 4.

They are imported only when a call could use them. (Version 2 has the kernels of PyTorch's own FlashAttention-2.)

- Version 3 (`flash_attn_interface`, 2025-08 and later, whose operators have defaults for all arguments except
  tensors): `torch.ops.flash_attn_3.fwd` and `.bwd`.
- Version 4 (`flash_attn.cute`, 4.0 betas): `_flash_attn_fwd` and `_flash_attn_bwd`, called as PyTorch 2.13 calls them.

Both take [B, N, H, D], align causality bottom-right, and return the natural log-sum-exp [B, H, N] in float32. Version 3
takes windows, aligned likewise; which betas of version 4 take them in both passes is not known.
"""

from __future__ import annotations

import functools
import inspect
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtuning_fast.attention.arguments import PrefixAttentionCall
from qtuning_fast.attention.common import constant
from qtuning_fast.attention.composed.vendors.base import Attention, Vendor, cut, of_one_head_size, padded
from qtuning_fast.attention.composed.vendors.cuda import (
    HALVES,
    aligned,
    by_position,
    capability,
    common_obstacle,
    dense,
    has_mask,
    in_windows,
)

FLASH_3_OPTIONS = {"softmax_scale", "is_causal", "window_size_left", "window_size_right"}
FLASH_3_FORWARD = {"q", "k", "v"} | FLASH_3_OPTIONS
FLASH_3_BACKWARD = {"dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv"} | FLASH_3_OPTIONS
FLASH_4_FORWARD = {"q", "k", "v", "softmax_scale", "causal", "return_lse"}
FLASH_4_BACKWARD = {"q", "k", "v", "out", "dout", "lse", "softmax_scale", "causal"}
BUILT_WITHOUT = ("BACKWARD", "FP16", "HDIM64", "HDIM96", "HDIM128", "HDIM192", "HDIM256")  # features a build may lack


def _obstacle(call: PrefixAttentionCall, *, windows: bool = False) -> str | None:
    obstacle = common_obstacle(call, HALVES, windows=windows)
    if obstacle is not None:
        return obstacle
    if has_mask(call):
        return "it takes no masks"
    return "it is not known to be deterministic" if torch.are_deterministic_algorithms_enabled() else None


def _inputs(x: Attention) -> list[Tensor]:
    return [by_position(aligned(y)) for y in of_one_head_size(x, 8)]


def _of_output(x: Tensor, columns: int) -> Tensor:
    return dense(by_position(padded(x, columns)))


# ---- version 3 ------------------------------------------------------------------------------------------------------


def _flash_3_why_not(call: PrefixAttentionCall) -> str | None:
    obstacle = _obstacle(call, windows=True)
    if obstacle is not None:
        return obstacle
    if capability(call.query.device.index) != (9, 0):
        return "it is for compute capability 9.0"
    return flash_3_missing(in_windows(call))


@constant
def flash_3_missing(windows: bool) -> str | None:
    """Return why the installed package cannot be used, with windows if needed, or None. Tests replace this function."""
    return _flash_3_missing(windows)


@functools.cache
def _flash_3_missing(windows: bool) -> str | None:
    if find_spec("flash_attn_interface") is None:
        return "flash_attn_interface is not installed"
    try:
        import_module("flash_attn_interface")
        operators = _flash_3()
        known = _optional_but(operators.fwd, 3) >= FLASH_3_FORWARD
        known = known and _optional_but(operators.bwd, 6) >= FLASH_3_BACKWARD
        flags = import_module("flash_attn_config").CONFIG["build_flags"] if find_spec("flash_attn_config") else {}
    except (ImportError, AttributeError, KeyError, OSError) as error:
        return f"flash_attn_interface cannot be used: {error}"
    needed = (*BUILT_WITHOUT, "LOCAL") if windows else BUILT_WITHOUT
    lacking = [part for part in needed if flags.get(f"FLASHATTENTION_DISABLE_{part}")]
    if lacking:
        return f"flash_attn_interface was built without {', '.join(lacking)}"
    return None if known else "this version of flash_attn_interface is not known"


def _optional_but(operator: Any, required: int) -> set[str]:
    """Return the names of an operator's arguments if all after the first `required` have defaults, else nothing."""
    arguments = operator.default._schema.arguments
    whole = all(argument.has_default_value() for argument in arguments[required:])
    return {argument.name for argument in arguments} if whole else set()


def _flash_3() -> Any:
    return torch.ops.flash_attn_3


def _flash_3_options(x: Attention) -> dict[str, Any]:
    left, right = (-1 if side is None else side for side in x.window)
    return {
        "softmax_scale": x.scale,
        "is_causal": x.is_causal,
        "window_size_left": left,
        "window_size_right": right,
    }


def _flash_3_forward(x: Attention) -> tuple[Tensor, Tensor]:
    q, k, v = _inputs(x)
    output, lse, *_ = _flash_3().fwd(q, k, v, **_flash_3_options(x))
    return by_position(output)[..., : x.value.shape[-1]], lse


def _flash_3_backward(x: Attention, output: Tensor, lse: Tensor, d_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _inputs(x)
    o, d_o = (_of_output(y, q.shape[-1]) for y in (output, d_output))
    dq, dk, dv = (y.new_empty(y.shape) for y in (q, k, v))
    _flash_3().bwd(d_o, q, k, v, o, dense(lse), dq=dq, dk=dk, dv=dv, **_flash_3_options(x))
    return cut(x, *(by_position(d) for d in (dq, dk, dv)))


FLASH_3 = Vendor(
    "flash_attn 3",
    _flash_3_why_not,
    _flash_3_forward,
    _flash_3_backward,
    bottom_right=True,
    keeps_layout=False,
    windows=True,
)


# ---- version 4 ------------------------------------------------------------------------------------------------------


def _flash_4_why_not(call: PrefixAttentionCall) -> str | None:
    obstacle = _obstacle(call)
    if obstacle is not None:
        return obstacle
    found = capability(call.query.device.index)
    if found[0] != 10:
        return f"it is used on compute capabilities 10.x only, got {found[0]}.{found[1]}"
    sizes = call.query.shape[-1], call.value.shape[-1]
    if sizes not in ((64, 64), (128, 128)):
        return f"it is used for head sizes 64 and 128 only, got {sizes[0]} and {sizes[1]}"
    return flash_4_missing()


@constant
def flash_4_missing() -> str | None:
    """Return why the installed package cannot be used, or None. Tests replace this function."""
    return _flash_4_missing()


@functools.cache
def _flash_4_missing() -> str | None:
    package = find_spec("flash_attn")  # find_spec("flash_attn.cute") would import it
    folders = (package and package.submodule_search_locations) or ()
    if not any((Path(folder) / "cute" / "interface.py").exists() for folder in folders):
        return "flash_attn.cute is not installed"
    try:
        interface = _flash_4()
        known = inspect.signature(interface._flash_attn_fwd).parameters.keys() >= FLASH_4_FORWARD
        known = known and inspect.signature(interface._flash_attn_bwd).parameters.keys() >= FLASH_4_BACKWARD
    except (ImportError, AttributeError, OSError) as error:
        return f"flash_attn.cute cannot be used: {error}"
    return None if known else "this version of flash_attn.cute is not known"


def _flash_4() -> Any:
    return import_module("flash_attn.cute.interface")


def _flash_4_forward(x: Attention) -> tuple[Tensor, Tensor]:
    q, k, v = _inputs(x)
    output, lse, *_ = _flash_4()._flash_attn_fwd(q, k, v, softmax_scale=x.scale, causal=x.is_causal, return_lse=True)
    return by_position(output)[..., : x.value.shape[-1]], lse


def _flash_4_backward(x: Attention, output: Tensor, lse: Tensor, d_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _inputs(x)
    o, d_o = (_of_output(y, q.shape[-1]) for y in (output, d_output))
    lse = dense(lse)
    dq, dk, dv, *_ = _flash_4()._flash_attn_bwd(q, k, v, o, d_o, lse, softmax_scale=x.scale, causal=x.is_causal)
    return cut(x, *(by_position(d) for d in (dq, dk, dv)))


FLASH_4 = Vendor(
    "flash_attn 4", _flash_4_why_not, _flash_4_forward, _flash_4_backward, bottom_right=True, keeps_layout=False
)
