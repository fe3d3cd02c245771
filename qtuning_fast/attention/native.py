"""The backend "native": C++ kernels over prefix and context for the CPU, compiled at first use.

They compute in float32; tensors of 16 bits are widened first and rounded once at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qtuning_fast.attention.arguments import CONTEXT, PrefixAttentionCall, trainable
from qtuning_fast.attention.common import constant, masked
from qtuning_fast.attention.custom_op import Outputs, operator
from qtuning_fast.attention.folding import reduced, side_of
from qtuning_fast.attention.packed import spans
from qtuning_fast.attention.reference import bank_index
from qtuning_fast.attention.sink import gradient as sink_gradient

if TYPE_CHECKING:
    from qtuning_fast.kernels import native

ALONE = np.zeros(1, dtype=np.int64)  # places of the prefixes in use where there is no bank


def why_not(call: PrefixAttentionCall) -> str | None:
    """Return why the kernels cannot compute a call, or None."""
    if not call.query.is_cpu:
        return f"its C++ kernels are for the CPU, and query is on {call.query.device}"
    if call.query.dtype == torch.float64:
        return "its C++ kernels compute in float32, and query is float64"
    return _obstacle(call.gate)


def only_by_name(call: PrefixAttentionCall) -> str | None:
    """Return why "auto" skips the kernels, or None."""
    return "an exported graph may run where no compiler is" if torch.compiler.is_exporting() else None


@constant
def _obstacle(gate: str | None) -> str | None:
    """Return why this machine has no kernels with a gate, or None."""
    from qtuning_fast.kernels import native

    return native.obstacle() if gate in native.GATES else f"gate: its C++ kernels have no {gate}"


class _Passes:
    """Both passes; see `custom_op.Passes`."""

    def forward(self, call: PrefixAttentionCall) -> Outputs:
        """Compute output, log-sum-exp and its residual."""
        from qtuning_fast.kernels import native

        room = _output_room(call, torch.float32)
        lse, rest = _lse_rooms(call)
        arguments = _Arguments(call, native)
        struct = arguments.struct
        struct.output, struct.lse, struct.rest = _rows(native, room), lse.data_ptr(), _address(rest)
        struct.forward_only = not any(getattr(call, name).requires_grad for name in trainable(call))
        if call.is_packed:  # rows of no sequence
            room.zero_()
            lse.fill_(-torch.inf)
            rest.zero_()
        native.forward(struct)
        return room.to(call.query.dtype), lse, rest

    def empty_outputs(self, call: PrefixAttentionCall) -> Outputs:
        """Allocate outputs with the shapes, strides and dtypes of `forward`'s."""
        return _output_room(call, call.query.dtype), *_lse_rooms(call)

    def backward(
        self,
        call: PrefixAttentionCall,
        output: Tensor,
        lse: Tensor,
        lse_rest: Tensor,
        d_output: Tensor,
        needed: Sequence[str],
    ) -> list[Tensor]:
        """Compute the gradients that are needed."""
        from qtuning_fast.kernels import native

        found: dict[str, Tensor] = {}
        if "sink" in needed:
            found["sink"] = sink_gradient(call, output, lse, lse_rest, d_output)
        of_context = any(name in CONTEXT for name in needed)
        of_prefix = [name for name in needed if name not in CONTEXT and name != "sink"]
        if of_context or of_prefix:
            arguments = _Arguments(call, native)
            struct = arguments.struct
            wide_output, wide_d_output = _wide(output), _wide(d_output)
            struct.output, struct.d_output = _rows(native, wide_output), _rows(native, wide_d_output)
            wide_lse, wide_rest = _laid_out(lse), _laid_out(lse_rest)
            struct.lse, struct.rest = wide_lse.data_ptr(), _address(wide_rest)
            struct.context_gradients, struct.prefix_gradients = of_context, bool(of_prefix)
            rooms = _Rooms(arguments)
            native.backward(struct)
            found |= rooms.of_context() if of_context else {}
            found |= rooms.of_prefix() if of_prefix else {}
        return [found[name] for name in needed]

    def empty_gradients(self, call: PrefixAttentionCall, needed: Sequence[str]) -> list[Tensor]:
        """Allocate gradients with the shapes, strides and dtypes of `backward`'s."""
        inputs = [(name, getattr(call, name)) for name in needed]
        return [_gradient_room(x, x.dtype) if name in CONTEXT else x.new_empty(x.shape) for name, x in inputs]


class _Arguments:
    """The struct of a call, and the tensors that its addresses point to."""

    def __init__(self, call: PrefixAttentionCall, native: Any) -> None:
        self.call, self.native = call, native
        self.counts = call.counts
        self.struct = struct = native.Call()
        (_, struct.Hq, struct.rows, struct.D), (struct.Hkv, struct.Dv) = call.query.shape, call.value.shape[1::2]
        struct.P, struct.n_shared = call.prefix_key.shape[-2], call.n_shared
        wide = [_wide(x) for x in (call.query, call.key, call.value)]
        struct.query, struct.key, struct.value = (_rows(native, x) for x in wide)
        self._kept: list[Tensor | None] = [*wide]
        self._kept += [self._overlay(name, mask) for name, mask in self._masks()]
        self._kept += [None if call.sink is None else _laid_out(call.sink.detach().float())]
        struct.sink = _address(self._kept[-1])
        before, after = call.keys_before, call.keys_after
        struct.before, struct.after = (-1 if reach is None else reach for reach in (before, after))
        struct.gate, struct.scale, struct.softcap = native.GATES.index(call.gate), call.scale, call.softcap or 0.0
        struct.chunk, struct.threads = self._chunk(), torch.get_num_threads()
        self._take_prefix()
        self.samples = self._samples()
        struct.samples, struct.count = self.samples.ctypes.data, len(self.samples)
        native.fold(struct)

    def _take_prefix(self) -> None:
        """Take the prefixes that are in use, each once."""
        call, struct = self.call, self.struct
        self.task: np.ndarray | int = 0
        if call.prefix_index is None:
            self.used, self.lengths = ALONE, np.array([struct.P])
        else:
            self.used, self.task = np.unique(bank_index(call).numpy(), return_inverse=True)
            self.lengths = np.full(len(self.used), struct.P, dtype=np.int64)
        if call.prefix_length is not None:
            self.lengths[:] = call.prefix_length.long().clamp(0, struct.P).numpy()[self.used]
        struct.T, struct.used, struct.lengths = len(self.used), self.used.ctypes.data, self.lengths.ctypes.data
        struct.prefix_key, struct.prefix_value = (self._side(side) for side in ("key", "value"))
        self._kept += [self._gate_parameter(x) for x in (call.alpha, call.tau)]
        struct.alpha, struct.tau = (_address(x) for x in self._kept[-2:])

    def _side(self, side: str) -> native.Side:
        call, struct = self.call, self.struct
        rows, weights = side_of(call, side)
        stored = [x.detach() for x in (rows, *(weights or ()))]
        is_bank = call.prefix_index is not None and all(x.dtype == torch.float32 and x.is_contiguous() for x in stored)
        if call.prefix_index is not None and not is_bank:  # copied: a bank may hold far more prefixes than are in use
            stored = [x[torch.from_numpy(self.used)] for x in stored]
        stored = [_laid_out(x.float()) for x in stored]
        found = self.native.Side(rows=_address(stored[0]), D=rows.shape[-1], is_bank=is_bank)
        if weights is not None:
            folded = _room(torch.empty, struct.T, struct.Hkv, struct.P, found.D)
            found.R, found.U, found.V = weights[0].shape[-1], _address(stored[1]), _address(stored[2])
            found.folded = _address(folded)
            stored.append(folded)
        self._kept += stored
        return found

    def _gate_parameter(self, x: float | Tensor) -> Tensor:
        """Return alpha or tau as [T, Hq]."""
        x = torch.as_tensor(x, dtype=torch.float32, device="cpu").detach()
        if x.ndim == 2:
            x = x[torch.from_numpy(self.used)]
        shape = self.struct.T, self.struct.Hq
        return _laid_out(x) if x.numel() == shape[0] * shape[1] else x.new_empty(shape).copy_(x)

    def _masks(self) -> list[tuple[str, Tensor | None]]:
        call = self.call
        padding = None if call.padding_mask is None else call.padding_mask[:, None, None, :]
        return [("padding", padding), ("mask", call.attn_mask), ("bias", call.prefix_bias)]

    def _overlay(self, name: str, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        if mask.dtype not in (torch.bool, torch.float32):
            mask = masked(_room(torch.zeros), mask)
        mask = mask.detach()
        strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride())]
        setattr(self.struct, name, self.native.Overlay(mask.data_ptr(), *strides, mask.dtype == torch.bool))
        return mask

    def _samples(self) -> np.ndarray:
        """Return where each sample, or packed sequence, has its rows."""
        call = self.call
        count, N, M = self.counts
        samples = np.zeros(count, dtype=_sample())
        samples["task"], samples["bias"], samples["length"] = self.task, np.arange(count), self.lengths[self.task]
        if call.is_packed:
            for first, rows, side in (("first_query", "N", "queries"), ("first_key", "M", "keys")):
                parts = [getattr(span, side) for span in spans(call)]
                samples[first] = [part.start for part in parts]
                samples[rows] = [part.stop - part.start for part in parts]
        else:
            samples["batch"], samples["N"], samples["M"] = np.arange(count), N, M
        return samples

    def _chunk(self) -> int:
        """Return the queries of a task: about as many in each."""
        N, most = self.counts[1], self.native.DEFINED["CHUNK"]
        return max(_up(N, max(_up(N, most), 1)), 1)


class _Rooms:
    """Memory that the backward pass writes, or adds to."""

    def __init__(self, arguments: _Arguments) -> None:
        self._arguments, self._call = arguments, arguments.call
        struct, native, call = arguments.struct, arguments.native, arguments.call
        # Many more lanes than threads, so that none waits long for the last; but each has gradients of all prefixes.
        wanted = max(8 * struct.threads // max(struct.T, 1), struct.threads)
        chunks = max(_up(arguments.counts[1], struct.chunk), 1)
        struct.segments = min(max(_up(2 * struct.threads, max(struct.count * struct.Hkv, 1)), 1), chunks)
        struct.lanes = max(min(_up(wanted, struct.Hkv), struct.count * struct.segments), 1)
        lanes, G = struct.Hkv * struct.lanes, struct.Hq // struct.Hkv
        padded = native.DEFINED["PADDED"]
        widths = [_up(D, padded) * padded for D in (struct.D, struct.Dv)]
        self._gate = [_room(torch.zeros, lanes, struct.T, G, dtype=torch.float64) for _ in range(2)]
        struct.alpha_parts, struct.tau_parts = (x.data_ptr() for x in self._gate)
        if struct.prefix_gradients:
            self._parts = [_room(torch.zeros, lanes, struct.T, struct.P, width) for width in widths]
            struct.prefix_key.parts, struct.prefix_value.parts = (x.data_ptr() for x in self._parts)
        if not struct.context_gradients:
            return
        self._query = _gradient_room(call.query, torch.float32)
        if call.is_packed:
            self._query.zero_()
        B, Hkv, M, _ = call.key.shape
        rooms = [_room(torch.zeros, struct.segments, B, M, Hkv, width) for width in widths]
        self._context = [room.transpose(2, 3) for room in rooms]
        struct.d_query = _rows(native, self._query)
        struct.d_key, struct.d_value = (_rows(native, x[0]) for x in self._context)
        struct.d_key_segment, struct.d_value_segment = (x.stride(0) for x in self._context)

    def of_context(self) -> dict[str, Tensor]:
        """Return the gradients of query, key and value."""
        call = self._call
        found = {"query": self._query.to(call.query.dtype)}
        for name, room in zip(("key", "value"), self._context):
            x = getattr(call, name)
            whole = (room[0] if len(room) == 1 else room.sum(0))[..., : x.shape[-1]]
            if whole.stride() != (expected := _gradient_room(x, torch.float32)).stride():
                whole = expected.copy_(whole)
            found[name] = whole.to(x.dtype)
        return found

    def of_prefix(self) -> dict[str, Tensor]:
        """Return the gradients of the prefix's rows, of its reweighting and of the gate."""
        call, struct, native = self._call, self._arguments.struct, self._arguments.native
        found: dict[str, Tensor] = {}
        for side, of_side in (("key", struct.prefix_key), ("value", struct.prefix_value)):
            rows, weights = side_of(call, side)
            stored = dict(zip((f"prefix_{side}", f"U_{side}", f"V_{side}"), (rows, *(weights or ()))))
            shapes = [x.shape if call.prefix_index is None else (struct.T, *x.shape[1:]) for x in stored.values()]
            rooms = [_room(torch.zeros, *shape) for shape in shapes]
            for field, room in zip(("d_rows", "d_U", "d_V"), rooms):
                setattr(of_side, field, _address(room))
            found |= dict(zip(stored, rooms))
        gate = [_room(torch.empty, struct.T, struct.Hq) for _ in range(2)]
        struct.d_alpha, struct.d_tau = (x.data_ptr() for x in gate)
        native.unfold(struct)
        found = {name: self._of_bank(x).to(getattr(call, name).dtype) for name, x in found.items()}
        for name, parameter, room in zip(("gate_alpha", "gate_tau"), (call.alpha, call.tau), gate):
            found[name] = reduced(parameter, self._of_bank(room))
        return found

    def _of_bank(self, x: Tensor) -> Tensor:
        """Return the gradients of all T prefixes from those of the prefixes in use."""
        if self._call.prefix_index is None:
            return x
        whole = x.new_zeros(self._call.prefix_key.shape[0], *x.shape[1:])
        return whole.index_copy_(0, torch.from_numpy(self._arguments.used), x)


@cache
def _sample() -> np.dtype:
    from qtuning_fast.kernels import native

    return np.dtype([(name, np.int64) for name in native.SAMPLE])


def _up(n: int, by: int) -> int:
    """Return n / by, rounded up."""
    return -(-n // by)


def _lse_rooms(call: PrefixAttentionCall) -> tuple[Tensor, Tensor]:
    """Allocate the log-sum-exp and its residual, kept under additive masks, whose values may be large."""
    lse = call.query.new_empty(call.query.shape[:3], dtype=torch.float32)
    return lse, torch.empty_like(lse) if call.has_additive_masks else lse.new_empty(0)


def _room(make: Callable[..., Tensor], *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Allocate memory for the kernels, whatever PyTorch's default dtype and device are."""
    return make(shape, dtype=dtype, device="cpu")


def _output_room(call: PrefixAttentionCall, dtype: torch.dtype) -> Tensor:
    B, Hq, N, _ = call.query.shape
    return call.query.new_empty(B, N, Hq, call.value.shape[-1], dtype=dtype).transpose(1, 2)


def _gradient_room(x: Tensor, dtype: torch.dtype) -> Tensor:
    B, H, N, D = x.shape
    return x.new_empty(B, N, H, D, dtype=dtype).transpose(1, 2)


def _wide(x: Tensor) -> Tensor:
    """Return x [B, H, N, D] in float32, with contiguous columns."""
    x = x if x.dtype == torch.float32 else x.detach().float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _laid_out(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.contiguous()


def _rows(native: Any, x: Tensor) -> native.Rows:
    return native.Rows(x.data_ptr(), *x.stride()[:3])


def _address(x: Tensor | None) -> int | None:
    return None if x is None or x.numel() == 0 else x.data_ptr()


attend = operator("native_attention", _Passes)
