"""The prefix part of attention with a context that others compute: two launches forward, at most five backward.

fold                k' and v', in both passes
prefix_forward      merges the prefix into the context's output and log-sum-exp
prefix_queries      δ, and the prefix's part of dq
backward_keys       the prefix's gradients in parts
backward_prefix     sums of the parts: dK, dα, dτ
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
    """Return whether to keep the log-sum-exp's rounding residual."""
    return is_exact(call)


def merge(call: Call, output: Tensor, lse: Tensor, lse_rest: Tensor) -> None:
    """Merge the prefix into attention over the context alone, in place.

    Args:
        output: `[B, Hq, N, Dv]` in query's dtype, its last dimension contiguous; 0 for a query that sees no context.
        lse: `[B, Hq, N]`, contiguous, float32, natural; -inf for a query that sees no context.
        lse_rest: the rounding residual of lse, of its shape if `keeps_rest`, else empty.

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
    """Return the gradients of the needed tensors of the prefix, by their names in the call.

    Output, log-sum-exp and its rest are those after `merge`. The prefix's part is added in place to `d_query`,
    `[B, Hq, N, D]` in query's dtype with a contiguous last dimension.
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
    """Yield the launches that add to d_query and fill the gradients, none of which is of query, key or value."""
    if d_query is None and not gradients:
        return
    as_seen, folding = folded(call)
    yield from folding
    shared = arguments.attention_to_prefix(as_seen)
    per_query = PerQuery(lse, lse_rest, delta=scratch(lse, lse.shape, lse.dtype))
    yield prefix_queries.launch(call, shared, output, d_output, per_query, d_query)
    absent = arguments.written_rows(None)
    yield from launches_over_keys(call, shared | {"key": absent, "value": absent}, d_output, per_query, gradients)
