"""The output of a stack in the order of its input: without a prompt's rows, and with padding where it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from qtuning_fast.integrations.transformers.positions import argument_names, by_name

InOrder = Callable[[Tensor, Tensor | None], Tensor]
"""Returns states `[B, P + N, hidden]` as `[B, N, hidden]`, given the padding mask `[B, N]` of the input."""


def put_output_in_order(stack: PreTrainedModel, in_order: InOrder) -> list[RemovableHandle]:
    """Put the hidden states of each call of a stack in the order of its input, until the handles are removed.

    These hooks must come before any that change the stack's inputs.

    Args:
        stack: a bidirectional stack whose output nothing reads inside the model. (A decoder reads a prompt's rows too.)
        in_order: puts states in order.
    """
    hooks = _Hooks(argument_names(stack), in_order)
    return [
        stack.register_forward_pre_hook(hooks.before, with_kwargs=True),
        stack.register_forward_hook(hooks.after),
    ]


class _Hooks:
    def __init__(self, names: tuple[str, ...], in_order: InOrder) -> None:
        self._names = names
        self._in_order = in_order
        self._mask: Tensor | None = None  # of the current call, as it was given

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._mask = by_name(self._names, args, kwargs).get("attention_mask")

    def after(self, module: Any, args: Any, output: Any) -> Any:
        mask, self._mask = self._mask, None
        if isinstance(output, tuple):
            return (self._in_order(output[0], mask), *output[1:])
        output["last_hidden_state"] = self._in_order(output["last_hidden_state"], mask)
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(self._in_order(each, mask) for each in output["hidden_states"])
        return output
