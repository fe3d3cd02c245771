"""The prefix's part of attention whose context others compute: two launches forward, at most five backward.

fold                k' and v', in both passes
prefix_forward      the prefix joins the context's output and log-sum-exp
prefix_queries      δ, and what the prefix adds to dq
backward_keys       the prefix's gradients in parts
backward_prefix     the parts added up: dK, dα, dτ
backward_reweighting    dU, dV
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from . import arguments, prefix_forward, prefix_queries
from .arguments import Call, PerQuery, scratch
from .backward import launches_over_keys, rooms
from .fold import folded
from .launch import Launch, is_exact, run


def keeps_rest(call: Call) -> bool:
    """Whether what rounding the log-sum-exp leaves is kept."""
    return is_exact(call)


def merge(call: Call, output: Tensor, lse: Tensor, lse_rest: Tensor) -> None:
    """Turns attention over the context alone into attention over both, in place.

    Args:
        output: `[B, Hq, N, Dv]` of query's dtype, its last dimension contiguous; 0 where a query sees no context.
        lse: `[B, Hq, N]`, contiguous, float32, natural; -inf where a query sees no context.
        lse_rest: what rounding lse left, of its shape if `keeps_rest`, else empty.

    A query that sees nothing at all keeps 0 and -inf.
    """

    def launches() -> Iterator[Launch]:
        as_seen, folding = folded(call)
        yield from folding
        yield prefix_forward.launch(as_seen, output, lse, lse_rest)

    run("merge", call, (output, lse, lse_rest), launches)


def backward(
    call: Call,
    output: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    d_output: Tensor,
    d_query: Tensor | None,
    needed: Sequence[str],
) -> list[Tensor]:
    """The gradients of what is needed: names of the call's tensors that belong to the prefix.

    Output, log-sum-exp and its rest are those over both, after `merge`. To `d_query`, `[B, Hq, N, D]` of query's dtype,
    its last dimension contiguous, the prefix's part of that gradient is added in place.
    """
    gradients = rooms(call, needed)
    run(
        f"backward of the prefix {' '.join(gradients)}",
        call,
        (output, lse, lse_rest, d_output, d_query, *gradients.values()),
        lambda: launches(call, output, lse, lse_rest, d_output, d_query, gradients),
    )
    return list(gradients.values())


def launches(
    call: Call,
    output: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    d_output: Tensor,
    d_query: Tensor | None,
    gradients: dict[str, Tensor],
) -> Iterator[Launch]:
    """What adds to d_query and fills the gradients, none of them of query, key or value."""
    if d_query is None and not gradients:
        return
    as_seen, folding = folded(call)
    yield from folding
    shared = arguments.attention_to_prefix(as_seen)
    per_query = PerQuery(lse, lse_rest, delta=scratch(lse, lse.shape, lse.dtype))
    yield prefix_queries.launch(call, shared, output, d_output, per_query, d_query)
    absent = arguments.written_rows(None)
    yield from launches_over_keys(call, shared | {"key": absent, "value": absent}, d_output, per_query, gradients)
