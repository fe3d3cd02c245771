"""How exact a backend must be: as exact as plain PyTorch in the same precision, within a factor."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from qtuning_fast import prefix_attention
from qtuning_fast.attention import api, composed, fused, packed, reference
from qtuning_fast.attention.arguments import PrefixAttentionCall
from qtuning_fast.attention.dispatch import BACKENDS
from qtuning_fast.kernels.target import INTERPRETED

Arguments = dict[str, Any]

thorough = pytest.mark.thorough
interpreted = pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU that is there: test_fused_gpu.py")

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
# The ways to compute a call: a backend, and whether Triton kernels compute the composed one's prefix. Plain PyTorch on
# a CPU has no float16 of its own. Kernels in bfloat16 wait for `make test-all`, but for tests of their own.
WAYS = [
    pytest.param("fused", F32, marks=interpreted, id="fused-float32"),
    pytest.param("fused", F16, marks=interpreted, id="fused-float16"),
    pytest.param("fused", BF16, marks=[interpreted, thorough], id="fused-bfloat16"),
    pytest.param("native", F32, marks=pytest.mark.native, id="native-float32"),
    pytest.param("native", F16, marks=pytest.mark.native, id="native-float16"),
    pytest.param("native", BF16, marks=pytest.mark.native, id="native-bfloat16"),
    pytest.param("composed", F32, id="composed-float32"),
    pytest.param("composed", BF16, id="composed-bfloat16"),
    pytest.param("composed, kernels", F32, marks=interpreted, id="composed-kernels-float32"),
    pytest.param("composed, kernels", F16, marks=interpreted, id="composed-kernels-float16"),
    pytest.param("composed, kernels", BF16, marks=[interpreted, thorough], id="composed-kernels-bfloat16"),
]
AGAIN = {"fused-float16", "composed-kernels-float32", "composed-kernels-float16"}  # the interpreter, and kernels again


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test marked `ways` on each way; its arguments are those of `_ways`."""
    mark = metafunc.definition.get_closest_marker("ways")
    if mark is not None:
        metafunc.parametrize(("way", "dtype"), _ways(**mark.kwargs))


def _ways(*, of: tuple[str, ...] = (), once: bool = False, sixteen_bit: bool = False) -> list[Any]:
    """The ways.

    Args:
        of: some of them, by the first value of WAYS; empty: all.
        once: leave what is slow and has run already to `make test-all`.
        sixteen_bit: only those.
    """
    chosen = [way for way in WAYS if (not of or way.values[0] in of) and not (sixteen_bit and F32 in way.values)]
    if not once:
        return chosen
    marks = {way.id: [*way.marks, thorough] if way.id in AGAIN else way.marks for way in chosen}
    return [pytest.param(*way.values, id=way.id, marks=marks[way.id]) for way in chosen]


@pytest.fixture
def backend(way: str, dtype: torch.dtype, request: Any, monkeypatch: Any) -> str:
    """The name of a backend; the composed one computes its prefix part on the CPU, or with the Triton kernels."""
    if dtype == BF16 and way not in ("composed", "native"):
        request.getfixturevalue("bfloat16_as_on_nvidia")
    if "kernels" in way:
        from qtuning_fast.kernels import prefix_part

        monkeypatch.setattr(composed, "prefix_part_for", lambda call: prefix_part)
    return way.split(",")[0]


RATIO = 2.0  # to the largest error of plain PyTorch
FLOOR = 1e-6
LONG_SUM = 8.0  # times epsilon and Σ|terms|, for alpha, tau, sink, U and V: a small error of every term adds up there
TF32_RATIO = 4.0  # to what rounding the arguments alone loses: kernels round weights and their gradients, too
CPU_FLASH_ULPS = 20.0  # PyTorch's flash attention for CPUs takes exponentials to 20 units in the last place
LSE_SHARE = 2.0**-4  # of epsilon: in 16 bits weights are rounded by half an epsilon, whatever the log-sum-exp says
TANH_APPROX = {"tanh": 2.0**-11, "sigmoid": 2.0**-12}  # how far off NVIDIA's instruction may leave a gate's σ
DRAWS = 24  # of plain PyTorch's error: in a small tensor the largest is a matter of luck


def _call_of(arguments: Arguments) -> PrefixAttentionCall:
    return api.call_of(**arguments)


def _mapped(arguments: Arguments, change: Callable[[Tensor], Tensor]) -> Arguments:
    """A call with every tensor changed; what required a gradient does so again."""

    def changed(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(changed(half) for half in x)
        return change(x.detach()).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    return {name: changed(x) for name, x in arguments.items()}


def _in_float64(arguments: Arguments) -> Arguments:
    return _mapped(arguments, lambda x: x.double() if x.is_floating_point() else x)


def _to_tf32(x: Tensor) -> Tensor:
    """Truncated to 10 bits after the point, as matrix units read float32."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32) if x.dtype == torch.float32 else x


def _noise(x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)


def _results(arguments: Arguments, backend: str, leaves: Callable[[Arguments], dict[str, Tensor]], seed: int):
    """Output, log-sum-exp and all gradients, by name."""
    named = leaves(arguments)
    output, lse = prefix_attention(**arguments, return_lse=True, backend=backend)
    d_output = _noise(output, seed).to(arguments["query"].dtype)
    grads = torch.autograd.grad(output, list(named.values()), d_output, allow_unused=True, materialize_grads=True)
    return {"output": output.detach(), "lse": lse, **dict(zip(named, grads))}, d_output


def _by_delta(arguments: Arguments, leaves: Callable[[Arguments], dict[str, Tensor]], d_output: Tensor):
    """Gradients that pass through scores, in plain PyTorch as fused kernels compute them: p (dO vᵀ - δ), δ = Σ dO ∘ O.

    Autograd's way, through p ∘ dp - p Σ p dp, is exactly 0 where a query sees one key; this one rounds there.
    """
    whole = _call_of(arguments)
    named = {name: x for name, x in leaves(arguments).items() if "value" not in name and name != "sink"}
    all_scores, gradients, sinks = list[Tensor](), list[Tensor](), list[Tensor]()
    for call, d_o in _one_by_one(whole, d_output):
        k, v = (
            reference.prefix_rows(call, rows, weights)
            for rows, weights in ((call.prefix_key, call.reweight_key), (call.prefix_value, call.reweight_value))
        )
        g, s = reference._prefix_scores(call, k), reference._context_scores(call)
        output, lse = reference.attend(call)
        delta = (d_o.to(g) * output.to(g)).sum(-1, keepdim=True)
        all_scores += [g, s]
        for scores, values in ((g, v), (s, call.value)):
            weights = (scores - lse[..., None]).exp().nan_to_num(0.0)
            gradients.append((weights * (reference._products(d_o, values) - delta)).detach())
        if call.sink is not None:
            sinks.append(-(_sink_weights(call, lse) * delta.squeeze(-1)).sum((0, 2)))
    found = torch.autograd.grad(all_scores, list(named.values()), gradients, allow_unused=True)
    by_delta = {name: torch.zeros_like(x) if grad is None else grad for (name, x), grad in zip(named.items(), found)}
    if whole.sink is not None:
        by_delta["sink"] = sum(sinks[1:], sinks[0]).to(whole.sink.dtype)
    return by_delta


def _one_by_one(call: PrefixAttentionCall, d_output: Tensor) -> Iterator[tuple[PrefixAttentionCall, Tensor]]:
    """Each packed sequence alone, with its part of d_output; or the call itself."""
    if not call.is_packed:
        yield call, d_output
        return
    for span, alone in packed.sequences(call):
        yield alone, d_output[:, :, span.queries]


def _sink_weights(call: PrefixAttentionCall, lse: Tensor) -> Tensor:
    assert call.sink is not None
    return (call.sink.detach().to(lse.dtype)[:, None] - lse).exp().nan_to_num(0.0)


def _sums_of_magnitudes(arguments: Arguments, d_output: Tensor) -> dict[str, Tensor]:
    """Σ|terms| of the gradients of alpha, tau, sink, U and V: one term per score, or per score and column."""
    sums: dict[str, Tensor] = {}
    for call, d_o in _one_by_one(_call_of(arguments), d_output):
        for name, x in _sums_of_one(call, arguments, d_o).items():
            sums[name] = sums[name] + x if name in sums else x
    return sums


def _sums_of_one(call: PrefixAttentionCall, arguments: Arguments, d_output: Tensor) -> dict[str, Tensor]:
    k, v = (
        reference.prefix_rows(call, rows, weights).detach()
        for rows, weights in ((call.prefix_key, call.reweight_key), (call.prefix_value, call.reweight_value))
    )
    s = reference._capped(call, call.scale * reference._products(call.query, k)).detach().requires_grad_()
    factors = [torch.zeros_like(s) + reference._per_head(call, x, s.dtype) for x in (call.alpha, call.tau)]
    alpha, tau = (x.detach().requires_grad_() for x in factors)
    with torch.no_grad():
        output, lse = reference.attend(call)
        weights = (reference._prefix_scores(call, k) - lse[..., None]).exp().nan_to_num(0.0)
        delta = (d_output * output).sum(-1, keepdim=True)
        dg = weights * (reference._products(d_output, v) - delta)
    g = s if call.gate is None else s + alpha * reference.GATES[call.gate](tau * s)
    ds, d_alpha, d_tau = (
        torch.zeros_like(s) if x is None else x.abs()
        for x in torch.autograd.grad(g, [s, alpha, tau], dg, allow_unused=True)
    )

    bank = call.prefix_index is not None
    T = call.prefix_key.shape[0] if bank else 1
    index = reference.bank_index(call) if bank else torch.zeros(len(s), dtype=torch.long, device=s.device)

    def by_prefix(x: Tensor) -> Tensor:  # [B, ...] -> [T, ...]
        return x.new_zeros(T, *x.shape[1:]).index_add_(0, index, x)

    sums = {}
    if call.sink is not None:
        sums["sink"] = (_sink_weights(call, lse) * delta.squeeze(-1)).abs().sum((0, 2))
    for name, terms in (("gate_alpha", d_alpha), ("gate_tau", d_tau)):
        if isinstance(arguments[name], Tensor):
            shape = arguments[name].shape
            sums[name] = by_prefix(terms.sum((-1, -2))).sum_to_size((1,) * (2 - len(shape)) + shape).reshape(shape)
    for name, pair, rows, terms in (
        ("reweight_key", call.reweight_key, call.prefix_key, call.scale * ds.mT @ call.query.abs()),
        ("reweight_value", call.reweight_value, call.prefix_value, weights.mT @ d_output.abs()),
    ):
        if pair is not None:
            terms = by_prefix(terms.detach().abs().unflatten(1, (rows.shape[-3], -1)).sum(2))  # [T, Hkv, P, D]
            U, V, K = (x.detach().abs().nan_to_num(0.0) for x in (*pair, rows))
            U, V, K = U.reshape(T, *U.shape[-2:]), V.reshape(T, *V.shape[-3:]), K.reshape(T, *K.shape[-3:])
            sums[f"{name}[0]"] = torch.einsum("thpd,thpd,trhd->tpr", terms, K, V).reshape(pair[0].shape)
            sums[f"{name}[1]"] = torch.einsum("thpd,thpd,tpr->trhd", terms, K, U).reshape(pair[1].shape)
    return sums


def _lse_by_tanh_approx(call: PrefixAttentionCall) -> Tensor:
    """What tanh.approx in the gate may move the log-sum-exp [B, Hq, N] by: as far as one gated score."""
    from qtuning_fast.kernels import arguments

    in_kernels = call.query.is_cuda or INTERPRETED
    if call.gate not in TANH_APPROX or not in_kernels or not arguments.gate(call).fast_tanh.value:
        return torch.zeros(())
    alpha = reference._per_head(call, call.alpha, torch.float64)
    alpha = alpha.detach().squeeze(-1) if isinstance(alpha, Tensor) else torch.tensor(alpha)
    if call.is_packed and alpha.ndim == 3:
        alpha = alpha.abs().amax(0)  # of the sequence whose gate is the strongest
    return TANH_APPROX[call.gate] * alpha.abs()


def _largest(error: Tensor) -> float:
    return error.abs().max().item() if error.numel() else 0.0


@pytest.fixture
def on_gpu(make_call, request):
    """make_call, on the GPU, for the backend that the test file is about; bfloat16 unless it says otherwise."""

    def make(**options: Any) -> Arguments:
        arguments = make_call(**{"dtype": torch.bfloat16} | options)
        return _mapped(arguments, lambda x: x.cuda()) | {"backend": request.module.BACKEND}

    return make


@cache
def _beside(name: str) -> ModuleType:
    """A module in this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bfloat16_in_interpreter(monkeypatch):
    """Triton's interpreter with bfloat16 done right."""
    from triton.runtime.interpreter import InterpreterBuilder

    for name, method in _beside("bfloat16").METHODS.items():
        monkeypatch.setattr(InterpreterBuilder, name, method)


@pytest.fixture
def tanh_approx_in_interpreter(request, monkeypatch):
    """Triton's interpreter with tanh.approx.f32; a parameter names its error, one of tanh_approx.ERRORS."""
    from triton.runtime.interpreter import InterpreterBuilder

    method = _beside("tanh_approx").create_inline_asm(getattr(request, "param", "varied"))
    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", method)


@pytest.fixture
def bfloat16_as_on_nvidia(bfloat16_in_interpreter, tanh_approx_in_interpreter, monkeypatch):
    """Kernels in Triton's interpreter take bfloat16, and calculate with it as on an NVIDIA GPU."""
    from qtuning_fast.kernels import arguments

    def why_not(call: PrefixAttentionCall) -> str | None:
        return None if call.query.dtype == torch.bfloat16 else fused.why_not(call)

    monkeypatch.setitem(BACKENDS, "fused", replace(BACKENDS["fused"], why_not=why_not))
    monkeypatch.setattr(arguments, "current_target", lambda: "sm_90")  # there the gate asks for the instruction


@pytest.fixture(scope="session")
def call_of():
    return _call_of


@pytest.fixture(scope="session")
def assert_accurate(make_call, leaves):
    """Checks one call on a backend, made by make_call's options: output, log-sum-exp and every gradient."""

    def check(backend: str, *, device: str = "cpu", seed: int = 0, draws: int = DRAWS, **options: Any) -> None:
        largest: dict[str, float] = {}
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" and options["dtype"] == torch.float32
        for draw in range(draws):
            arguments = _mapped(make_call(seed=seed + draw, **options), lambda x: x.to(device))
            exact, d_output = _results(_in_float64(arguments), "reference", leaves, seed + draw)
            rounded = _mapped(arguments, _to_tf32) if tf32 else arguments
            plain, _ = _results(rounded, "reference", leaves, seed + draw)
            for name, x in (*plain.items(), *_by_delta(arguments, leaves, d_output).items()):
                largest[name] = max(largest.get(name, 0.0), _largest(_distance(x, exact[name])))
            if draw == 0:
                first = exact
                actual, _ = _results(arguments, backend, leaves, seed)
                errors = {name: _distance(x, exact[name]) for name, x in actual.items()}
                sums = _sums_of_magnitudes(_in_float64(arguments), d_output.double())
                by_tanh_approx = _lse_by_tanh_approx(_call_of(arguments))
        dtype = arguments["query"].dtype
        epsilon = 2.0**-10 if tf32 else torch.finfo(dtype).eps
        ratio = TF32_RATIO if tf32 else RATIO
        for name, error in errors.items():
            assert actual[name].dtype == plain[name].dtype and actual[name].shape == plain[name].shape, name
            allowed = ratio * largest[name] + FLOOR + LONG_SUM * epsilon * sums.get(name, torch.zeros(()))
            if name == "lse":
                allowed = allowed + by_tanh_approx
            if (backend, device) == ("composed", "cpu"):  # by PyTorch's flash attention for CPUs
                if name == "lse":
                    allowed += LSE_SHARE * epsilon if dtype in (torch.float16, torch.bfloat16) else 0.0
                elif dtype == torch.float32:
                    allowed += CPU_FLASH_ULPS * epsilon * _largest(first[name])
            excess = (error - allowed).clamp(min=0)
            assert not excess.any(), f"{name}: error {_largest(error):.3g}, plain PyTorch's {largest[name]:.3g}"

    return check


def _distance(x: Tensor, exact: Tensor) -> Tensor:
    """|x - exact|, 0 where both are the same infinity; a NaN is infinitely far."""
    x = x.double()
    return (x - exact).abs().where(x != exact, 0.0).nan_to_num(torch.inf, posinf=torch.inf)
