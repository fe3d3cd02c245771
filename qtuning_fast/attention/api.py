"""The public operator `prefix_attention`: it checks its arguments, chooses a backend and calls it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch.nn.functional as F
from torch import Tensor

from qtuning_fast.attention import dispatch, reference
from qtuning_fast.attention.arguments import PrefixAttentionCall, checked
from qtuning_fast.attention.checks import check_flag
from qtuning_fast.attention.common import no_autocast
from qtuning_fast.attention.dispatch import BackendChoice

Args = ParamSpec("Args")
Result = TypeVar("Result")


def _attend(arguments: dict[str, Any]) -> Any:
    """Compute prefix attention from all its arguments by name."""
    return_lse = check_flag("return_lse", arguments["return_lse"])
    call = checked(arguments)
    run = dispatch.BACKENDS[dispatch.choose(call, arguments["backend"])].run
    with no_autocast(call.query):
        output, lse = run(call)
    return (output, lse) if return_lse else output


def _signature_of(run: Callable[[dict[str, Any]], Any]) -> Callable[[Callable[Args, Result]], Callable[Args, Result]]:
    """Make a function without a body pass all its arguments to `run` by name; signature and docstring stay.

    So the list of arguments is written once. (`locals()` would do, but PyTorch 2.11 cannot compile it.)
    """

    def decorate(declared: Callable[Args, Result]) -> Callable[Args, Result]:
        @wraps(declared)
        def function(*args: Args.args, **kwargs: Args.kwargs) -> Result:
            return run(_named(args, kwargs))

        return function

    return decorate


@_signature_of(_attend)
def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    prefix_index: Tensor | None = None,
    prefix_length: Tensor | None = None,
    n_shared: int = 0,
    reweight_key: tuple[Tensor, Tensor] | None = None,
    reweight_value: tuple[Tensor, Tensor] | None = None,
    gate: str | None = "tanh",
    gate_alpha: float | Tensor = 1.0,
    gate_tau: float | Tensor = 1.0,
    attn_mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
    prefix_bias: Tensor | None = None,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    cu_seqlens_query: Tensor | None = None,
    cu_seqlens_key: Tensor | None = None,
    max_seqlen_query: int | None = None,
    max_seqlen_key: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | Any:  # Any: the pair that return_lse asks for
    """Compute attention over a prefix and the context, with a gate on the prefix's scores.

    One softmax covers both parts. A low-rank matrix reweights the prefix's rows (Q-tuning: Guo et al.,
    arXiv 2404.14607), and their scores pass a gate (NoRGa's non-linear residual gate: Le et al., arXiv 2405.14124):

        o = softmax([g(c q k'ᵀ) + prefix_bias, c q kᵀ + attn_mask]) [v' ; v],    g(s) = s + alpha σ(tau s)
        k' = (U V) ∘ prefix_key,  v' = (U V) ∘ prefix_value                      each with its own U and V

    With softcap, s -> softcap tanh(s / softcap) applies to the products c q kᵀ and c q k'ᵀ before anything else. A sink
    is one more score a head in the softmax, without a value, so that the weights add up to less than 1.

    Every query sees every row of its prefix; masks, causality and window apply to the context only. A query that sees
    no context attends to the prefix alone; one that sees nothing at all gets 0. B, N, M and P may be 0.

    Sequences of different lengths may be packed, one after another, into one row: B = 1, and N and M count the rows of
    all. Each attends to its own keys and to its prefix, with causality and window within it, as if it were a sample.

    Args:
        query: [B, Hq, N, D] in float64, float32, float16 or bfloat16. All tensors may have any strides.
        key: [B, Hkv, M, D] in query's dtype. Hq is a multiple of Hkv.
        value: [B, Hkv, M, Dv] in query's dtype.
        prefix_key: [Hkv, P, D], one prefix for all samples, or [T, Hkv, P, D], a bank of T >= 1 prefixes. The tensors
            of prefix, reweighting and gate are in query's dtype or float32.
        prefix_value: [Hkv, P, Dv] or [T, Hkv, P, Dv].
        prefix_index: [B] integers in [0, T), required with a bank: the prefix of each sample. CPU tensors are checked
            for the range; on an accelerator indices are clamped to it.
        prefix_length: [T] integers in [0, P], only with a bank: the length of each prefix. Later rows are ignored.
        n_shared: number of leading rows that are not reweighted; their rows of U are ignored.
        reweight_key: (U [P, R], V [R, Hkv, D]) with any R >= 1; with a bank both with a leading T. None: weights of 1.
        reweight_value: (U [P, R], V [R, Hkv, Dv]), likewise. Its R may differ.
        gate: σ, one of "tanh", "sigmoid", "gelu", "relu", "softplus", "elu", "identity"; None is plain prefix
            attention, g(s) = s, which ignores alpha and tau and gives them no gradient.
        gate_alpha: a finite number, or a tensor [] or [Hq], with a bank also [T, 1] or [T, Hq].
        gate_tau: likewise.
        attn_mask: bool (True: attend) or floating (added; entries at or below its dtype's most negative finite number
            mean -inf). [B, M], or 4-D and broadcastable to [B, Hq, N, M]. Combines with is_causal, window and
            padding_mask. Has no gradient.
        padding_mask: [B, M], bool (True: attend) or floating like attn_mask, beside an attn_mask that is 4-D or None.
            So a bias [1, Hq, N, M] that all samples share need not be repeated for each. Has no gradient.
        prefix_bias: floating, 4-D and broadcastable to [B, Hq, N, P], added to the gated scores as a mask is.
            Has no gradient.
        is_causal: query i sees context key j when j <= i + M - N, so the last query sees all keys.
        window: (left, right), each an integer >= 0 or None for no bound. Query i stands at position i + M - N of the
            context and sees the keys from `left` before to `right` after it, both included. A causal window of W keys,
            as models count them, is (W - 1, 0).
        scale: c, any finite number; None means 1 / sqrt(D).
        softcap: a positive number that caps the scaled scores of context and prefix before gate, masks and bias
            (Gemma 2, arXiv 2408.00118); None: no cap. "composed" cannot cap scores.
        sink: [Hq] in query's dtype or float32, attention sinks (GPT-OSS, arXiv 2508.10925): a score of each head that
            is neither scaled, capped nor gated. A query that sees nothing else gets 0, its log-sum-exp is the sink.
        cu_seqlens_query: [S + 1] int32, where each of S packed sequences begins and ends: sequence s has the queries
            cu_seqlens_query[s]..cu_seqlens_query[s + 1]. It rises from 0 to N; sequences may be empty. CPU tensors are
            checked. On an accelerator offsets are clamped, and queries of no sequence get 0; where offsets fall, the
            result is undefined. prefix_index is then [S], prefix_bias broadcasts to [S, Hq, 1, P], and there is
            no attn_mask and no padding_mask. Compiled code cannot compute packed sequences on "reference".
        cu_seqlens_key: [S + 1] int32, likewise for key and value; None: as query's.
        max_seqlen_query: the queries of the longest sequence, or more; further ones belong to no sequence. None reads
            them off the offsets, for which an accelerator waits; compiled code takes N instead, so that more programs
            run than have work.
        max_seqlen_key: the keys of the longest sequence, likewise.
        return_lse: also return the log-sum-exp of each query's scores.
        backend: "auto", "fused", "native", "composed" or "reference". If set, the environment variable
            QTUNING_FAST_BACKEND replaces "auto". "reference" is differentiable any number of times, in every mode of
            PyTorch; the others once, in reverse mode.

    Returns:
        The output [B, Hq, N, Dv] in query's dtype. With return_lse also the natural log-sum-exp [B, Hq, N] of prefix,
        context and sink together, in float32 (float64 for float64 input), without gradient; -inf for a query that sees
        nothing. Scores, gate and softmax have that precision too, with or without autocast. One exception: for
        bfloat16 on an NVIDIA GPU, "fused" and "composed" compute the gate with the hardware's tanh, so the log-sum-exp
        may be off by 2**-11 * abs(alpha) with "tanh" and by half of that with "sigmoid".

        Gradients reach query, key, value, prefix_key, prefix_value, U, V, gate_alpha, gate_tau and sink, each in its
        own dtype. They are 0 for rows beyond prefix_length and for the first n_shared rows of U.

    Raises:
        TypeError, ValueError: an argument is wrong; the message says which, what it must be and what it was.
        NotImplementedError: the backend requested by name cannot compute this call.
    """


def attention_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout: float = 0.0,
    **arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Compute `prefix_attention` by definition, with what the fused operator lacks: weights, dropout, learned masks.

    Args:
        query, key, value: as in `prefix_attention`.
        attn_mask: likewise, but a floating mask may require a gradient.
        dropout: probability of dropping a weight, those of the prefix included.
        arguments: the other arguments of `prefix_attention`.

    Returns:
        The output `[B, Hq, N, Dv]` and the weights over the context `[B, Hq, N, M]`, after dropout, both in query's
        dtype. Without dropout, 1 minus the sum of a query's weights is the share of its prefix and of its sink.

    Raises:
        NotImplementedError: sequences are packed.
    """
    fixed = None if attn_mask is None else attn_mask.detach()
    call = call_of(query, key, value, attn_mask=fixed, **arguments)
    if call.is_packed:
        raise NotImplementedError("packed sequences have no weights [B, Hq, N, M]; compute each alone, or pad them")
    if attn_mask is not None and attn_mask.requires_grad:
        call = replace(call, padding_mask=attn_mask) if attn_mask.ndim == 2 else replace(call, attn_mask=attn_mask)
    with no_autocast(query):
        weights, _ = reference.attention_weights(call)
        if dropout:
            weights = F.dropout(weights, dropout)
        return reference.weighted_values(call, weights), weights[..., weights.shape[-1] - key.shape[-2] :]


def explain_backend(*args: Any, **kwargs: Any) -> BackendChoice:
    """Return which backend `prefix_attention` uses for the same arguments, why, and why not the others.

    It computes nothing and raises what the call itself would raise. The result prints as a few lines of text.
    """
    arguments = _named(args, kwargs)
    check_flag("return_lse", arguments["return_lse"])
    return dispatch.explain(checked(arguments), arguments["backend"])


def call_of(*args: Any, **kwargs: Any) -> PrefixAttentionCall:
    """Return the checked call that `prefix_attention` makes from the same arguments."""
    return checked(_named(args, kwargs))


_SIGNATURE = inspect.signature(prefix_attention)
_REQUIRED = tuple(name for name, each in _SIGNATURE.parameters.items() if each.default is each.empty)
_DEFAULTS = {name: each.default for name, each in _SIGNATURE.parameters.items() if name not in _REQUIRED}
_COUNT = len(_SIGNATURE.parameters)
explain_backend.__signature__ = _SIGNATURE.replace(return_annotation=BackendChoice)  # type: ignore[attr-defined]


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Bind all arguments of `prefix_attention` by name, ten times faster than `inspect.Signature.bind`.

    Raises:
        TypeError: an argument is missing, unknown or given twice.
    """
    arguments = {**_DEFAULTS, **dict(zip(_REQUIRED, args)), **kwargs}
    twice = len(args) > len(_REQUIRED) or any(name in kwargs for name in _REQUIRED[: len(args)])
    if twice or len(arguments) != _COUNT or any(name not in arguments for name in _REQUIRED):
        _SIGNATURE.bind(*args, **kwargs)
    return arguments
