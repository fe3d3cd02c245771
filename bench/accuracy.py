"""Checks a peer before it is timed: its output and its gradients beside the reference in float64.

An error is ‖x − reference‖ / ‖reference‖ of the output or of a gradient, the largest over heads and samples. NaN counts
as infinite.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from qtuning_fast.bench.peers import Peer, Prepared, own
from qtuning_fast.bench.shapes import Inputs, Shape

LARGEST_REFERENCE = 1 << 28  # scores in float64: 2 GiB, of which the reference holds several
# The largest errors that rounding explains; a peer with a larger one is not timed.
WRONG = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}

Errors = dict[str, float]


class Reference:
    """Output and gradients in float64, for part of the batch.

    If one sample is too long already, only its last queries count, which see all keys even with causality; packed
    sequences count whole. The incoming gradient is zero elsewhere. So the prefix's gradients, which are sums over the
    batch, are those of that part, while the peers run the whole shape.
    """

    def __init__(self, shape: Shape, x: Inputs) -> None:
        (B, _, N, _), scores = x.query.shape, shape.Hq * (shape.P + shape.M)  # of a query
        count = min(B, max(1, LARGEST_REFERENCE // (scores * N)))
        self.shape, self.queries = shape, N if shape.packed else min(N, max(1, LARGEST_REFERENCE // scores))
        # From both ends of the batch: indices that overflow, or a last block forgotten, show at the end.
        self.samples = (torch.arange(count, device=x.query.device) - count // 2) % B
        chosen = torch.zeros(B, 1, N, 1, device=x.query.device, dtype=x.query.dtype)
        chosen[self.samples, :, -self.queries :] = 1
        self.inputs = replace(x.detached(), d_output=x.d_output * chosen)
        self._known: dict[tuple[bool, bool, bool], tuple[Tensor, dict[str, Tensor]]] = {}

    def of(self, peer: Peer) -> tuple[Tensor, dict[str, Tensor]]:
        """The output of the chosen samples and the gradients by name, for the work that a peer does."""
        kind = peer.gated, peer.reweighted, peer.has_prefix
        if kind not in self._known:
            self._known[kind] = self._compute(*kind)
        return self._known[kind]

    def _compute(self, gated: bool, reweighted: bool, has_prefix: bool) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.inputs.of_samples(self.samples).of_last_queries(self.queries).detached(torch.float64).tracked()
        call = x.call(self.shape, gated=gated, reweighted=reweighted)
        trained = x.trained(gated=gated, reweighted=reweighted and self.shape.trained)
        if not has_prefix:
            call = replace(call, prefix_key=call.prefix_key[..., :0, :], prefix_value=call.prefix_value[..., :0, :])
            call, trained = replace(call, n_shared=0), {name: trained[name] for name in ("query", "key", "value")}
        output = own("reference", call)
        gradients = torch.autograd.grad(output, list(trained.values()), x.d_output) if self.shape.trained else ()
        return output.detach(), dict(zip(trained, gradients))

    def error(self, name: str, x: Tensor, reference: Tensor) -> float:
        """The error of an output or gradient; entries of samples and queries that were not chosen must be 0."""
        x = x.detach().double()
        if name in ("query", "key", "value"):
            whole = torch.zeros_like(x)
            whole[self.samples, :, -reference.shape[2] :] = reference
            reference = whole
        if x.ndim > 2:  # head by head, in which one wrong tile shows
            size, off = reference.norm(dim=(-2, -1)), (x - reference).norm(dim=(-2, -1))
            ratio = (off / size.where(size > 0, size.max().clamp_min(1e-300))).max().item()
        else:
            ratio = (x - reference).norm().item() / (reference.norm().item() or 1.0)
        return math.inf if math.isnan(ratio) else ratio


def prepare(peer: Peer, shape: Shape, x: Inputs, *, training: bool) -> Prepared:
    """A peer as it is checked and timed."""
    return peer.prepare(shape, x.tracked() if training else x.detached())


def check(peer: Peer, reference: Reference, errors: Errors, *, training: bool) -> None:
    """Writes a peer's errors into `errors`; raises what the peer raises."""
    expected, gradients = reference.of(peer)
    x = reference.inputs
    prepared = prepare(peer, reference.shape, x, training=training)
    output = prepared.forward()
    errors["output"] = reference.error("output", output[reference.samples, :, -reference.queries :], expected)
    if not training:
        return
    found = torch.autograd.grad(output, list(prepared.leaves.values()), x.d_output)
    for name, gradient in prepared.as_trained(dict(zip(prepared.leaves, found))).items():
        errors[name] = reference.error(name, gradient, gradients[name])


def verdict(errors: Errors, dtype: torch.dtype) -> str:
    """Which error is too large; empty: none."""
    worst = max(errors, key=lambda name: errors[name], default="output")
    return f"wrong: {worst} is off by {errors[worst]:.2g}" if errors and errors[worst] > WRONG[dtype] else ""
