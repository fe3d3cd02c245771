"""The base class of attention modules with a prefix: its parameters, and the placement of another prefix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qtuning_fast.attention.api import attention_with_weights, prefix_attention
from qtuning_fast.attention.arguments import PrefixArguments
from qtuning_fast.attention.common import GATES
from qtuning_fast.method.gate import GATE_PER, NO_GATE, Gate
from qtuning_fast.method.prefix import no_prefix, place, placed
from qtuning_fast.method.prompts import KEY_STD, VALUE_STD

if TYPE_CHECKING:
    from typing import Self

_OF_A_PREFIX = tuple(PrefixArguments.__annotations__)


class PrefixedAttention(nn.Module):
    """The base class that gives an attention module its prefix; it may come before another base class.

    Attributes:
        prefix_key, prefix_value: `[H, P, D]` each, or None if the module has no prefix of its own.
        prefix_gate: the gate on the prefix's scores (NoRGa, arXiv 2405.14124), or None.
    """

    prefix_key: nn.Parameter | None
    prefix_value: nn.Parameter | None
    prefix_gate: Gate | None

    _plain_class: type[nn.Module]  # the original class of a module that `convert_` has changed

    def place(self, prefix: PrefixArguments | None) -> None:
        """Attend to this prefix instead of the module's own; None restores its own.

        The prefix stays in place until the next call, is not part of the state dict, and gets gradients if its tensors
        require them. A bank with one index a sample serves batches of mixed tasks.

        Args:
            prefix: the arguments of `prefix_attention` that describe a prefix: `prefix_key` and `prefix_value`, and
                optionally `prefix_index`, `prefix_length`, `prefix_bias`, `n_shared`, `reweight_key`, `reweight_value`
                and the gate. Omitted arguments have that function's defaults; the module's own gate is not used.

        Raises:
            TypeError: `prefix` is not a mapping.
            ValueError: it lacks the rows, or has an argument that does not describe the prefix.
        """
        place(self, None if prefix is None else _checked_prefix(prefix))

    def prefix_arguments(self) -> PrefixArguments:
        """Return the module's own prefix as keyword arguments of `prefix_attention`; empty if it has none."""
        if self.prefix_key is None or self.prefix_value is None:
            return {}
        gate = NO_GATE if self.prefix_gate is None else self.prefix_gate.arguments()
        return {"prefix_key": self.prefix_key, "prefix_value": self.prefix_value, **gate}

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        need_weights: bool = False,
        prefix: PrefixArguments | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention over the prefix and the context; other arguments are as in `prefix_attention`.

        Args:
            attn_mask: as there, but a floating mask may require a gradient.
            dropout: dropout probability of the weights.
            need_weights: also return the weights over the context.
            prefix: a prefix for this call, as `place` takes it.

        Returns:
            The output `[B, H, N, Dv]`, and the weights over the context `[B, H, N, M]` or None.
        """
        prefix = placed(self) if prefix is None else _checked_prefix(prefix)
        prefix = prefix or self.prefix_arguments() or no_prefix(key, value)
        arguments: dict[str, Any] = {**prefix, "padding_mask": padding_mask, "is_causal": is_causal, "scale": scale}
        if attn_mask is not None and not torch.is_grad_enabled():
            attn_mask = attn_mask.detach()  # lets the operator take a learned mask too
        learned_mask = attn_mask is not None and attn_mask.requires_grad
        if need_weights or dropout or learned_mask:  # the operator supports none of these
            output, weights = attention_with_weights(
                query, key, value, attn_mask=attn_mask, dropout=dropout, **arguments
            )
            return output, weights if need_weights else None
        return prefix_attention(query, key, value, attn_mask=attn_mask, **arguments), None

    @classmethod
    def check_convertible(cls, module: nn.Module) -> None:
        """Raise a NotImplementedError if this class would not compute the same as the module."""

    @classmethod
    def convert_(cls, module: nn.Module, *, prefix_length: int, gate: str | None, gate_per: str) -> Self:
        """Change an attention module's class to this one, in place; parameters, hooks and all else stay.

        Raises:
            TypeError, ValueError, NotImplementedError: as in `check_prefix` and `check_convertible`; the module is
                unchanged then.
        """
        check_prefix(prefix_length, gate, gate_per)
        cls.check_convertible(module)
        plain_class = type(module)
        module.__class__ = cls
        assert isinstance(module, cls)
        module._plain_class = plain_class
        module._begin_prefix(prefix_length, gate, gate_per)
        return module

    def revert_(self) -> None:
        """Undo `convert_` and drop the prefix."""
        del self.prefix_key, self.prefix_value, self.prefix_gate
        place(self, None)
        self.__class__ = self.__dict__.pop("_plain_class")

    @property
    def was_converted(self) -> bool:
        """Whether `revert_` can restore the original module."""
        return "_plain_class" in self.__dict__

    def _prefix_shape(self) -> tuple[int, int]:
        """Return the number of heads and the head size."""
        raise NotImplementedError

    def _prefix_like(self) -> Tensor:
        """Return a parameter whose device and dtype the prefix takes."""
        raise NotImplementedError

    def _begin_prefix(self, length: int, gate: str | None, gate_per: str) -> None:
        """Draw keys from N(0, 0.5²) and values from N(0, 0.02²); with length 0, make no prefix and no gate."""
        self.register_parameter("prefix_key", None)
        self.register_parameter("prefix_value", None)
        self.register_module("prefix_gate", None)
        if not length:
            return
        heads, size = self._prefix_shape()
        like = self._prefix_like()
        dtype = like.dtype if like.dtype.is_floating_point else torch.get_default_dtype()
        rows = torch.randn(2, heads, length, size, device=like.device, dtype=dtype)
        self.prefix_key = nn.Parameter(KEY_STD * rows[0])
        self.prefix_value = nn.Parameter(VALUE_STD * rows[1])
        if gate is not None:
            self.prefix_gate = Gate(gate, heads if gate_per == "head" else None).to(like.device, dtype)


def check_prefix(prefix_length: int, gate: str | None, gate_per: str) -> None:
    """Check the arguments of a module's prefix.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    if not isinstance(prefix_length, int) or isinstance(prefix_length, bool):
        raise TypeError(f"prefix_length must be an integer, got {prefix_length!r}")
    if prefix_length < 0:
        raise ValueError(f"prefix_length must not be negative, got {prefix_length}")
    if gate is not None and gate not in GATES:
        raise ValueError(f"gate must be None or one of {', '.join(GATES)}, got {gate!r}")
    if gate_per not in GATE_PER:
        raise ValueError(f"gate_per must be one of {', '.join(GATE_PER)}, got {gate_per!r}")


def _checked_prefix(prefix: PrefixArguments) -> PrefixArguments:
    if not isinstance(prefix, Mapping):
        raise TypeError(f"prefix must be a mapping of arguments of prefix_attention, got a {type(prefix).__name__}")
    for name in prefix:
        if name not in _OF_A_PREFIX:
            raise ValueError(f"prefix must hold arguments about the prefix, got {name!r}; known: {_OF_A_PREFIX}")
    for name in ("prefix_key", "prefix_value"):
        if name not in prefix:
            raise ValueError(f"prefix must hold {name}, got {', '.join(prefix) or 'nothing'}")
    return prefix
