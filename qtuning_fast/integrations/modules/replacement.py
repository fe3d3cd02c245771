"""A gated prefix for the attention layers of any model built from `nn.MultiheadAttention` or timm's `Attention`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from qtuning_fast.integrations.modules.multihead import PrefixMultiheadAttention
from qtuning_fast.integrations.modules.prefixed import PrefixedAttention, check_prefix
from qtuning_fast.integrations.modules.timm import PrefixTimmAttention, attention_class

_BEFORE = "qtuning_before"  # attribute of a model whose attention is replaced


@dataclass(frozen=True)
class _Before:
    """The other changes of `replace_attention`, by name, so that they also apply to copies of the model."""

    required_grad: dict[str, bool]  # by parameter
    nested: list[str]  # each nn.TransformerEncoder whose nested tensors were switched off


def replace_attention(
    model: nn.Module,
    *,
    prefix_length: int,
    gate: str | None = "tanh",
    gate_per: str = "layer",
    layers: Sequence[int] | None = None,
    names: Callable[[str], bool] | None = None,
    train_only_prefix: bool = True,
) -> dict[str, PrefixedAttention]:
    """Give each attention module of a model a gated prefix, in place.

    A module stays the same object, with its parameters, hooks and place in the model. Only its class changes, from
    `nn.MultiheadAttention` to `PrefixMultiheadAttention` or from timm's `Attention` to `PrefixTimmAttention`. Fast
    paths that would skip the prefix are switched off. The model's state dict gains the prefix's entries, so an earlier
    one loads with `strict=False`. A module that occurs in several places has a single prefix.

    Args:
        model: any module. Its attention modules, in the order of `model.named_modules()`, are the layers.
        prefix_length: rows of each prefix. With 0, modules have no prefix until their `place` is called.
        gate: σ of the gate `g(s) = s + α·σ(τ·s)` (NoRGa, arXiv 2405.14124), or None.
        gate_per: one (α, τ) pair for each `"layer"` or for each `"head"`.
        layers: indices of the layers to change, counted from 0 among those that `names` selects; None: all.
        names: returns whether to count a module, given its qualified name; None: all except the cross-attention of
            `nn.TransformerDecoderLayer`.
        train_only_prefix: freeze all other parameters until `restore_attention`.

    Returns:
        The changed modules by their qualified names, in order.

    Raises:
        TypeError, ValueError: an argument is wrong, there is nothing to replace, or attention is replaced already.
        NotImplementedError: a module is of a subclass, whose own behaviour would be lost.
    """
    check_prefix(prefix_length, gate, gate_per)
    if _replaced(model):
        raise ValueError("model has replaced attention already; call restore_attention first")
    chosen = _chosen(_candidates(model, names), layers)
    for name, module in chosen.items():
        if type(module) in _kinds():
            _kinds()[type(module)].check_convertible(module)
        else:
            raise NotImplementedError(
                f"{name} is a {type(module).__name__}: a subclass, whose own behaviour would be lost"
            )

    before = _Before({name: x.requires_grad for name, x in model.named_parameters()}, _nested(model, chosen))
    if train_only_prefix:
        model.requires_grad_(False)
    changed = {
        name: _kinds()[type(module)].convert_(module, prefix_length=prefix_length, gate=gate, gate_per=gate_per)
        for name, module in chosen.items()
    }
    _use_nested(model, before.nested, False)
    setattr(model, _BEFORE, before)
    return changed


def restore_attention(model: nn.Module) -> None:
    """Undo `replace_attention`: restore the classes of modules and the `requires_grad` of parameters.

    The prefixes are dropped. The weights stay as they are now, even if they were trained or loaded in the meantime.

    Args:
        model: the argument of `replace_attention`, a copy of it, or a model that contains it.

    Raises:
        ValueError: `replace_attention` was not called with this model or a part of it.
    """
    owners = [module for module in model.modules() if _BEFORE in module.__dict__]
    if not owners:
        around = ": it was called with a model around this one; restore that model" if _replaced(model) else ""
        raise ValueError(f"model must be one whose attention replace_attention has replaced{around}")
    for owner in reversed(owners):  # a part can only have been changed after the whole
        for module in _replaced(owner):
            module.revert_()
        before: _Before = owner.__dict__.pop(_BEFORE)
        for name, parameter in owner.named_parameters():
            parameter.requires_grad_(before.required_grad.get(name, parameter.requires_grad))
        _use_nested(owner, before.nested, True)


def _kinds() -> dict[type[nn.Module], type[PrefixedAttention]]:
    """Return the replaceable classes and their replacements."""
    kinds: dict[type[nn.Module], type[PrefixedAttention]] = {nn.MultiheadAttention: PrefixMultiheadAttention}
    timm_attention = attention_class()
    return kinds if timm_attention is None else kinds | {timm_attention: PrefixTimmAttention}


def _replaced(model: nn.Module) -> list[PrefixedAttention]:
    return [m for m in model.modules() if isinstance(m, PrefixedAttention) and m.was_converted]


def _candidates(model: nn.Module, names: Callable[[str], bool] | None) -> dict[str, nn.Module]:
    """Return the attention modules that count, by name."""
    cross = {id(module.multihead_attn) for module in model.modules() if isinstance(module, nn.TransformerDecoderLayer)}
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, tuple(_kinds())) and not isinstance(module, PrefixedAttention)
    }
    if not found:
        others = sorted({type(m).__name__ for m in model.modules() if "Attention" in type(m).__name__})
        raise ValueError(
            f"model must have an nn.MultiheadAttention or timm's Attention, got a {type(model).__name__} with "
            f"{', '.join(others) or 'no attention'}"
        )
    counted = [name for name in found if (names(name) if names is not None else id(found[name]) not in cross)]
    if not counted:
        raise ValueError(f"names must select an attention module, got none of {', '.join(found)}")
    return {name: model.get_submodule(name) for name in counted}


def _chosen(candidates: dict[str, nn.Module], layers: Sequence[int] | None) -> dict[str, nn.Module]:
    if layers is None:
        return candidates
    if any(not isinstance(layer, int) or isinstance(layer, bool) for layer in layers):
        raise TypeError(f"layers must be None or a list of integers, got {layers!r}")
    last = len(candidates) - 1
    if not layers or len(set(layers)) < len(layers) or min(layers) < 0 or max(layers) > last:
        raise ValueError(
            f"layers must name at least one layer of 0..{last}, none of them twice, got {list(layers)}; the layers are "
            f"{', '.join(candidates)}"
        )
    items = list(candidates.items())
    return dict(items[layer] for layer in sorted(layers))


def _nested(model: nn.Module, chosen: dict[str, nn.Module]) -> list[str]:
    """Return the stacks that would pass nested tensors to a chosen layer, even if their first layer is not chosen."""
    ids = {id(module) for module in chosen.values()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoder)
        and getattr(module, "use_nested_tensor", False)
        and any(id(inner) in ids for inner in module.modules())
    ]


def _use_nested(model: nn.Module, encoders: list[str], use: bool) -> None:
    for name in encoders:
        encoder = model.get_submodule(name)
        assert isinstance(encoder, nn.TransformerEncoder)
        encoder.use_nested_tensor = use
