"""The fused kernels in Triton's interpreter: as exact as plain PyTorch, deterministic, good operators of PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from qtuning_fast import explain_backend, prefix_attention
from qtuning_fast.backends import fused
from qtuning_fast.kernels import backward
from qtuning_fast.kernels.blocks import Blocks, instead
from qtuning_fast.kernels.target import INTERPRETED
from qtuning_fast.reference import GATES

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU that is there: test_fused_gpu.py")

BASE = {"dtype": torch.float32, "B": 1, "Hkv": 1, "G": 2, "N": 17, "M": 15, "P": 5, "D": 16, "Dv": 16}
WHOLE = {"rank_key": 1, "rank_value": 2, "n_shared": 2, "gate_shape": "head"}
MASKS = ["padding bool", "padding float", "full bool", "full float"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gate", [*GATES, None])
def test_every_gate(assert_accurate, gate, dtype):
    assert_accurate("fused", **BASE | WHOLE | {"gate": gate, "dtype": dtype})


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask(assert_accurate, mask, is_causal):
    assert_accurate("fused", **BASE, mask=mask, is_causal=is_causal, bias=mask == "full float")


@pytest.mark.parametrize(
    "sizes",
    [
        {"N": 65, "M": 129, "P": 17},
        {"N": 129, "M": 65, "P": 3, "is_causal": True},
        {"N": 63, "M": 127, "P": 1, "is_causal": True},
        {"N": 64, "M": 64, "P": 64, "mask": "padding bool"},
        {"N": 1, "M": 128, "P": 129},
        {"N": 16, "M": 1, "P": 127},
        {"N": 130, "M": 0, "P": 65},
        {"N": 33, "M": 63, "P": 0},
        {"N": 2, "M": 2, "P": 16, "G": 8},
        {"N": 15, "M": 16, "P": 15, "Hkv": 2, "G": 3, "B": 2},
        {"N": 16, "M": 17, "P": 15, "D": 80, "Dv": 24},
        {"N": 5, "M": 17, "P": 4, "D": 24, "Dv": 32},
        {"N": 5, "M": 17, "P": 4, "D": 200, "Dv": 256},
        {"N": 5, "M": 17, "P": 4, "D": 3, "Dv": 1},
    ],
    ids=lambda sizes: "-".join(f"{name}{size}" for name, size in sizes.items()),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_odd_sizes(assert_accurate, sizes, dtype):
    assert_accurate("fused", **BASE | WHOLE | {"n_shared": min(2, sizes["P"]), "dtype": dtype} | sizes)


@pytest.mark.parametrize("gate_shape", ["float", "scalar", "head", "task", "task, head"])
def test_banks(assert_accurate, gate_shape):
    sizes = {"B": 4, "T": 3, "G": 1, "N": 18, "M": 3, "P": 18, "lengths": True, "mask": "padding bool"}
    assert_accurate("fused", **BASE | WHOLE | sizes | {"gate_shape": gate_shape}, prefix_dtype=torch.float32)


def test_master_weights_beside_a_16_bit_query(assert_accurate):
    assert_accurate("fused", **BASE | WHOLE | {"dtype": torch.float16}, prefix_dtype=torch.float32)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
def test_any_scale(assert_accurate, scale):
    assert_accurate("fused", **BASE | WHOLE, scale=scale)


@st.composite
def call_options(draw):
    """Sizes at the borders of blocks, two of them large at most: the interpreter is slow."""
    small, border = st.sampled_from([0, 1, 2, 15, 16, 17]), st.sampled_from([63, 64, 65, 127, 128, 129])
    large = draw(st.sets(st.sampled_from("NMP"), max_size=2))
    sizes = {name: draw(border if name in large else small) for name in "NMP"}
    G, Hkv, B = draw(st.sampled_from([(1, 1, 1), (3, 1, 1), (8, 1, 1), (1, 2, 2), (2, 2, 1), (1, 1, 4)]))
    T = draw(st.sampled_from([None, None, 1, 2, 3]))
    shapes = ["float", "scalar", "head"] + ([] if T is None else ["task", "task, head"])
    return sizes | {
        "B": B,
        "G": G,
        "Hkv": Hkv,
        "D": draw(st.sampled_from([16, 24, 32, 80])),
        "Dv": draw(st.sampled_from([16, 24, 32, 80])),
        "T": T,
        "lengths": T is not None and draw(st.booleans()),
        "n_shared": draw(st.integers(0, sizes["P"])),
        "rank_key": draw(st.sampled_from([None, 1, 3])),
        "rank_value": draw(st.sampled_from([None, 1, 3])),
        "gate": draw(st.sampled_from([*GATES, None])),
        "gate_shape": draw(st.sampled_from(shapes)),
        "mask": draw(st.sampled_from([None, *MASKS])),
        "bias": draw(st.booleans()),
        "is_causal": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16])),
        "seed": draw(st.integers(0, 9)),
    }


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # shrinking would take an hour
    suppress_health_check=list(HealthCheck),
)
@given(options=call_options())
def test_any_call(assert_accurate, options):
    assert_accurate("fused", **options)


@pytest.mark.parametrize("direction", ["forward", "queries", "keys"])
@pytest.mark.parametrize(
    "options",
    [{"is_causal": True, "G": 2}, {"mask": "padding bool"}, {"T": 2, "B": 3, "lengths": True}],
    ids=["causal", "padded", "bank"],
)
def test_many_small_blocks(assert_accurate, direction, options):
    sizes = {"N": 37, "M": 41, "P": 35, "G": 1, "rank_key": 1, "n_shared": 20, "gate_shape": "head"}
    with instead(Blocks("interpreter", 4, 256, direction, queries=16, keys=32, prefix=16, warps=1, stages=1)):
        assert_accurate("fused", **BASE | sizes | options)


@pytest.fixture
def arguments(make_call):
    return make_call(**BASE | WHOLE, mask="padding bool")


def run(arguments):
    return prefix_attention(**arguments, backend="fused")


def test_the_same_bits_again(make_call, gradients):
    sizes = {"B": 5, "T": 2, "N": 70, "P": 20, "G": 1, "lengths": True, "gate_shape": "task, head"}
    arguments = make_call(**BASE | WHOLE | sizes) | {"backend": "fused"}
    d_output = torch.ones_like(prefix_attention(**arguments))
    first, second = gradients(arguments, d_output), gradients(arguments, d_output)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_strides_are_read_in_place_and_the_output_needs_no_copy(make_call, monkeypatch):
    """The transposed views that models hand over, keys as a slice of a larger tensor, an expanded prefix."""
    arguments = make_call(**BASE | {"Hkv": 2, "B": 2})
    expected = run(arguments)
    for name in ("query", "key", "value"):
        x = arguments[name].detach()
        larger = torch.full((*x.shape[:2], x.shape[2] + 3, 2 * x.shape[3]), torch.nan).transpose(1, 2).contiguous()
        view = larger.transpose(1, 2)[:, :, 2:-1, : x.shape[3]]
        arguments[name] = view.copy_(x).requires_grad_()
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    output = run(arguments)
    assert torch.equal(output, expected)
    B, Hq, N, Dv = output.shape
    assert output.transpose(1, 2).reshape(B, N, Hq * Dv).data_ptr() == output.data_ptr()
    grad = torch.autograd.grad(output, arguments["query"], torch.ones(()).expand(output.shape).clone())[0]
    assert grad.shape == arguments["query"].shape


def test_what_is_not_contiguous_is_copied(make_call, gradients):
    arguments = make_call(**BASE | WHOLE | {"T": 2, "B": 2, "lengths": True, "gate_shape": "task, head"})
    expected = run(arguments)
    d_output = torch.ones(()).expand(expected.shape)  # what output.sum() hands back
    grads = gradients(arguments | {"backend": "fused"}, d_output)

    def scattered(x):
        return x.detach().mT.contiguous().mT if x.ndim > 1 and x.is_floating_point() else x.detach()

    for name, x in arguments.items():
        if isinstance(x, tuple):
            arguments[name] = tuple(scattered(half).requires_grad_() for half in x)
        elif isinstance(x, torch.Tensor):
            arguments[name] = scattered(x).requires_grad_(x.requires_grad)
    arguments["prefix_index"] = torch.stack([arguments["prefix_index"]] * 2, dim=1).to(torch.uint8)[:, 0]
    assert torch.equal(run(arguments), expected)
    for name, grad in gradients(arguments | {"backend": "fused"}, d_output).items():
        assert torch.equal(grad, grads[name]), name


NEEDS = backward.INPUTS


@pytest.mark.parametrize(
    "needed", [[name] for name in NEEDS] + [["key", "prefix_value"], ["V_key", "gate_alpha"]], ids=str
)
def test_a_gradient_does_not_depend_on_which_others_are_needed(arguments, needed):
    inputs = dict(zip(NEEDS, fused._unpack(call_of(arguments))))
    everything = dict(zip(NEEDS, torch.autograd.grad(run(arguments).sum(), list(inputs.values()))))
    for name, x in inputs.items():
        x.requires_grad_(name in needed)
    some = torch.autograd.grad(run(arguments).sum(), [inputs[name] for name in sorted(needed)])
    for name, grad in zip(sorted(needed), some):
        torch.testing.assert_close(grad, everything[name], rtol=1e-6, atol=1e-6)


def call_of(arguments):
    from qtuning_fast.backends import BACKENDS

    seen = []
    original = BACKENDS["fused"]
    BACKENDS["fused"] = replace(original, run=lambda call: seen.append(call) or original.run(call))
    try:
        run(arguments)
    finally:
        BACKENDS["fused"] = original
    return seen[0]


@pytest.mark.parametrize(
    ("needed", "launched"),
    [
        ({"query"}, ["queries"]),
        ({"key"}, ["queries", "keys"]),
        ({"prefix_key"}, ["queries", "keys", "prefix"]),
        ({"query", "key", "value"}, ["queries", "keys"]),
        (set(NEEDS), ["queries", "keys", "prefix"]),
    ],
    ids=lambda x: "-".join(sorted(x)) if isinstance(x, (set, list)) else str(x),
)
def test_only_what_is_needed_is_launched(arguments, needed, launched):
    call = call_of(arguments)
    output = run(arguments)
    lse = torch.zeros(output.shape[:-1])
    gradients = backward.empty_gradients(call, [name in needed for name in NEEDS])
    launches = list(backward.launches(call, output, lse, lse, output, gradients))
    assert [launch.kernel.fn.__name__.split("_")[1] for launch in launches] == launched
    if "keys" in launched:
        keys = launches[1].arguments
        assert (launches[1].programs > keys["prefix_programs"]) == bool(needed & {"key", "value"})
        assert (keys["d_key"].pointer is not None) == ("key" in needed)
        assert (keys["parts"].needed) == bool(needed - {"query", "key", "value"})
    assert (launches[0].arguments["d_query"].pointer is not None) == ("query" in needed)


def test_operators_pass_pytorchs_own_checks(arguments):
    inputs = fused._unpack(call_of(arguments))
    torch.library.opcheck(torch.ops.qtuning_fast.attention.default, inputs)
    with torch.no_grad():
        saved = torch.ops.qtuning_fast.attention(*inputs)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    needs = [True] * len(backward.INPUTS)
    torch.library.opcheck(
        torch.ops.qtuning_fast.attention_backward.default,
        (*saved, torch.ones_like(saved[0]), needs, *detached),
        test_utils=("test_schema", "test_faketensor"),  # it has no gradient of its own
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_call_is_one_graph(arguments, gradients, leaves, dynamic):
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    output = compiled(arguments)
    expected = run(arguments)
    assert torch.equal(output, expected)
    inputs = list(leaves(arguments).values())
    for grad, want in zip(torch.autograd.grad(output.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)):
        assert torch.equal(grad, want)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(arguments, leaves, use_reentrant):
    inputs = list(leaves(arguments).values())
    expected = torch.autograd.grad(run(arguments).sum(), inputs)
    if use_reentrant:
        query = arguments["query"]
        output = checkpoint(lambda q: run(arguments | {"query": q}), query, use_reentrant=True)
        output.sum().backward()
        found = [x.grad for x in inputs]
    else:
        found = torch.autograd.grad(checkpoint(run, arguments, use_reentrant=False).sum(), inputs)
    assert all(torch.equal(grad, want) for grad, want in zip(found, expected))


class Layer(torch.nn.Module):
    def __init__(self, arguments):
        super().__init__()
        self.arguments = arguments
        self.prefix_key = torch.nn.Parameter(arguments["prefix_key"].detach().clone())

    def forward(self, query):
        return run(self.arguments | {"query": query, "prefix_key": self.prefix_key})


def test_functional_call(arguments):
    layer, query = Layer(arguments), arguments["query"].detach()
    other = {"prefix_key": layer.prefix_key.detach() + 1.0}
    output = torch.func.functional_call(layer, other, (query,))
    assert torch.equal(output, run(arguments | {"query": query} | other))

    parameter = other["prefix_key"].requires_grad_()
    (grad,) = torch.autograd.grad(torch.func.functional_call(layer, other, (query,)).sum(), parameter)
    expected = run(arguments | {"query": query} | other)
    assert torch.equal(grad, torch.autograd.grad(expected.sum(), parameter)[0])


def test_autocast_changes_nothing(arguments, leaves):
    expected = run(arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(arguments)
        grads = torch.autograd.grad(output.sum(), list(leaves(arguments).values()))
    assert torch.equal(output, expected)
    for grad, want in zip(grads, torch.autograd.grad(expected.sum(), list(leaves(arguments).values()))):
        assert torch.equal(grad, want)


def test_second_derivatives_are_refused(arguments):
    (grad,) = torch.autograd.grad(run(arguments).sum(), arguments["query"], create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"dtype": torch.bfloat16}, "bfloat16"),
        ({"D": 257}, "up to 256, got 257"),
        ({"Dv": 300}, "up to 256, got 300"),
    ],
)
def test_what_it_cannot_do_it_refuses_by_name(make_call, options, complaint):
    with pytest.raises(NotImplementedError, match=complaint):
        run(make_call(**BASE | options))


def test_auto_leaves_the_interpreter_alone(arguments):
    choice = explain_backend(**arguments)
    assert choice.backend == "reference" and "interpreter" in choice.rejected["fused"]


@pytest.mark.parametrize("far", [-1e4, -1e9, -1e30, -3e38, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_additive_masks_of_any_size(assert_accurate, make_call, dtype, far):
    """Keys that are far below all others, in whole tiles, and queries that see nothing else."""
    arguments = make_call(**BASE | {"dtype": dtype, "P": 0, "M": 70, "G": 1})
    mask = torch.zeros(1, 1, 17, 70)
    mask[..., :66] = far
    mask[:, :, 5] = far
    arguments["attn_mask"] = mask
    output, lse = prefix_attention(**arguments, return_lse=True, backend="fused")
    grads = torch.autograd.grad(output.sum(), [arguments[name] for name in ("query", "key", "value")])
    exact = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    expected, expected_lse = prefix_attention(**exact, return_lse=True, backend="reference")
    tolerance = 4e-3 if dtype == torch.float16 else 2e-5
    seeing = [n for n in range(17) if n != 5]  # so far out float32 cannot tell apart the scores of query 5
    torch.testing.assert_close(output[:, :, seeing].double(), expected[:, :, seeing], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-4)
    assert all(x.isfinite().all() for x in (output, lse, *grads))
    # What a query gives to the values adds up to what it was given: no weight is lost or made up.
    torch.testing.assert_close(grads[2].double().sum(), output.new_tensor(output.numel()).double(), rtol=5e-3, atol=0)


def test_without_a_gate_alpha_and_tau_get_no_gradient(make_call):
    arguments = make_call(**BASE | WHOLE | {"gate": None})
    output = run(arguments)
    assert torch.autograd.grad(output.sum(), arguments["gate_alpha"], allow_unused=True) == (None,)
