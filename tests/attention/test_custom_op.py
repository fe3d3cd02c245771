"""Backends whose passes are custom operators: deterministic, and good operators of PyTorch."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from qtuning_fast import prefix_attention
from qtuning_fast.attention.arguments import INPUTS, flattened
from qtuning_fast.kernels.target import INTERPRETED

NATIVE = pytest.param("native", marks=pytest.mark.native)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU that is there: test_fused_gpu.py")

BASE = {"dtype": torch.float32, "B": 1, "Hkv": 1, "G": 2, "N": 17, "M": 15, "P": 5, "D": 16, "Dv": 16}
WHOLE = {"rank_key": 1, "rank_value": 2, "n_shared": 2, "gate_shape": "head"}


@pytest.fixture(params=[pytest.param("fused", marks=interpreted), NATIVE, "composed"])
def backend(request):
    return request.param


@pytest.fixture
def arguments(make_call, backend):
    return make_call(**BASE | WHOLE, mask="padding bool", window=(6, 9), sink=True) | {"backend": backend}


@pytest.fixture(params=["samples", "packed"])
def either(request, arguments, make_call, backend):
    """The same, or packed sequences with tasks."""
    if request.param == "samples":
        return arguments
    sequences = {"packed": ([9, 0, 17], [9, 3, 17]), "is_causal": True}
    tasks = {"T": 2, "lengths": True, "gate_shape": "task, head"}
    return make_call(**BASE | WHOLE | sequences | tasks, sink=True) | {"backend": backend}


def run(arguments):
    return prefix_attention(**arguments)


def test_the_same_bits_again(make_call, backend, gradients):
    sizes = {"B": 5, "T": 2, "N": 70, "P": 20, "G": 1, "lengths": True, "gate_shape": "task, head"}
    arguments = make_call(**BASE | WHOLE | sizes) | {"backend": backend}
    d_output = torch.ones_like(prefix_attention(**arguments))
    first, second = gradients(arguments, d_output), gradients(arguments, d_output)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_strides_are_read_in_place_and_the_output_needs_no_copy(make_call, backend, monkeypatch):
    """The transposed views that models hand over, keys as a slice of a larger tensor, an expanded prefix."""
    arguments = make_call(**BASE | {"Hkv": 2, "B": 2}) | {"backend": backend}
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


def test_what_is_not_contiguous_is_copied(make_call, backend, gradients):
    options = {"T": 2, "B": 2, "lengths": True, "gate_shape": "task, head"}
    arguments = make_call(**BASE | WHOLE | options) | {"backend": backend}
    expected = run(arguments)
    d_output = torch.ones(()).expand(expected.shape)  # what output.sum() hands back
    grads = gradients(arguments, d_output)

    def scattered(x):
        return x.detach().mT.contiguous().mT if x.ndim > 1 and x.is_floating_point() else x.detach()

    for name, x in arguments.items():
        if isinstance(x, tuple):
            arguments[name] = tuple(scattered(half).requires_grad_() for half in x)
        elif isinstance(x, torch.Tensor):
            arguments[name] = scattered(x).requires_grad_(x.requires_grad)
    arguments["prefix_index"] = torch.stack([arguments["prefix_index"]] * 2, dim=1).to(torch.uint8)[:, 0]
    assert torch.equal(run(arguments), expected)
    for name, grad in gradients(arguments, d_output).items():
        assert torch.equal(grad, grads[name]), name


@pytest.mark.parametrize(
    "needed", [[name] for name in INPUTS] + [["key", "prefix_value"], ["V_key", "gate_alpha"]], ids=str
)
def test_a_gradient_does_not_depend_on_which_others_are_needed(arguments, call_of, needed):
    inputs = dict(zip(INPUTS, flattened(call_of(arguments))))
    everything = dict(zip(INPUTS, torch.autograd.grad(run(arguments).sum(), list(inputs.values()))))
    for name, x in inputs.items():
        x.requires_grad_(name in needed)
    some = torch.autograd.grad(run(arguments).sum(), [inputs[name] for name in sorted(needed)])
    for name, grad in zip(sorted(needed), some):
        torch.testing.assert_close(grad, everything[name], rtol=1e-6, atol=1e-6)


def test_operators_pass_pytorchs_own_checks(either, call_of):
    inputs = flattened(call_of(either))
    name = OPERATOR[either["backend"]].removeprefix("qtuning_fast.")
    forward, backward = (getattr(torch.ops.qtuning_fast, x).default for x in (name, f"{name}_backward"))
    torch.library.opcheck(forward, inputs)
    with torch.no_grad():
        saved = forward(*inputs)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    needs = [True] * len(INPUTS)
    torch.library.opcheck(
        backward,
        (*saved, torch.ones_like(saved[0]), needs, *detached),
        test_utils=("test_schema", "test_faketensor"),  # it has no gradient of its own
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_call_is_one_graph(either, gradients, leaves, dynamic):
    torch._dynamo.reset()  # it keeps eight graphs of a function
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    output = compiled(either)
    expected = run(either)
    assert torch.equal(output, expected)
    inputs = list(leaves(either).values())
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


def test_without_a_gate_alpha_and_tau_get_no_gradient(make_call, backend):
    arguments = make_call(**BASE | WHOLE | {"gate": None}) | {"backend": backend}
    output = run(arguments)
    assert torch.autograd.grad(output.sum(), arguments["gate_alpha"], allow_unused=True) == (None,)


# ---- without the operators' plumbing --------------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    """Hears of every operator; those of ours are then all that is called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))

    @property
    def operators(self):
        return [name for name in self.names if name.startswith("qtuning_fast.")]


OPERATOR = {
    "fused": "qtuning_fast.attention",
    "native": "qtuning_fast.native_attention",
    "composed": "qtuning_fast.composed_attention",
}
KINDS = {
    "plain": {},
    "no gate": {"gate": None},
    "no reweighting": {"rank_key": None, "rank_value": None},
    "additive mask": {"mask": "padding float"},
    "full mask": {"mask": "full float"},
    "causal": {"is_causal": True},
    "negative scale": {"scale": -0.3},
    "window": {"window": (4, 2), "N": 70, "M": 71},
    "sinks": {"sink": True},
    "bank": {"T": 2, "B": 2, "lengths": True, "gate_shape": "task, head"},
    "packed": {"packed": ([20, 1, 5], [7, 0, 5]), "window": (4, 0)},
    "numbers for the gate": {"gate_shape": "float"},
}


def step(arguments, inputs):
    """Output, log-sum-exp and gradients."""
    output, lse = prefix_attention(**arguments, return_lse=True)
    d_output = torch.linspace(-1, 1, output.numel()).view(output.shape)
    return output, lse, *torch.autograd.grad(output, inputs, d_output, allow_unused=True)


@pytest.mark.parametrize("kind", KINDS)
def test_who_looks_on_changes_no_bit(make_call, backend, leaves, kind):
    arguments = make_call(**BASE | WHOLE | KINDS[kind]) | {"backend": backend}
    inputs = list(leaves(arguments).values())
    alone = step(arguments, inputs)
    with Seen() as seen:
        watched = step(arguments, inputs)
    assert seen.operators == [f"{OPERATOR[backend]}.default", f"{OPERATOR[backend]}_backward.default"]
    for a, b in zip(alone, watched, strict=True):
        assert a is b is None or (torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype)
    assert (alone[1].requires_grad, alone[1].grad_fn) == (False, None)


def test_alone_the_operators_are_left_out(arguments):
    assert type(run(arguments).grad_fn).__name__ == "PrefixAttentionBackward"
    with torch.no_grad():
        assert run(arguments).grad_fn is None


def test_a_step_may_be_seen_from_its_second_half_on(arguments, leaves):
    inputs = list(leaves(arguments).values())
    expected = torch.autograd.grad(run(arguments).sum(), inputs)
    output = run(arguments).sum()
    with Seen() as seen:
        late = torch.autograd.grad(output, inputs)
    with Seen():
        output = run(arguments).sum()
    early = torch.autograd.grad(output, inputs)
    assert seen.operators == [f"{OPERATOR[arguments['backend']]}_backward.default"]
    for found in (late, early):
        assert all(torch.equal(grad, want) for grad, want in zip(found, expected, strict=True))


@pytest.mark.parametrize("outside", [False, True])
def test_fake_tensors_see_the_operator(make_call, outside):
    arguments = make_call(**BASE | WHOLE, mask="padding bool") | {"backend": "composed"}
    expected = run(arguments)
    mode = FakeTensorMode()
    fake = tree_map_only(torch.Tensor, mode.from_tensor, arguments)
    with nullcontext() if outside else mode:
        output = run(fake)
    assert isinstance(output, FakeTensor) and output.grad_fn.name().startswith("GeneratedBackwardFor_qtuning_fast")
    assert (output.shape, output.stride()) == (expected.shape, expected.stride())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_tracers_transforms_and_subclasses_see_the_operator(make_call):
    arguments = make_call(**BASE | WHOLE) | {"backend": "composed"}
    query = arguments["query"].detach()
    arguments = tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)

    def of_query(q):
        return run(arguments | {"query": q})

    assert "qtuning_fast.composed_attention" in make_fx(of_query)(query).code
    assert "qtuning_fast::composed_attention" in str(torch.jit.trace(of_query, (query,), check_trace=False).graph)
    assert torch.equal(torch.vmap(of_query)(torch.stack([query] * 2))[1], of_query(query))
    assert type(of_query(query.as_subclass(Subclass))) is Subclass


class Subclass(torch.Tensor):
    pass


def test_hooks_on_saved_tensors_see_the_same_with_and_without_the_operators(arguments, leaves):
    def saved(watched):
        shapes = []

        def pack(x):
            shapes.append((x.shape, x.stride(), x.dtype))
            return x.detach().clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), Seen() if watched else nullcontext():
            output = run(arguments)
        grads = torch.autograd.grad(output.sum(), list(leaves(arguments).values()))
        return shapes, grads

    (alone, grads), (watched, others) = saved(False), saved(True)
    assert alone == watched
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


def test_what_is_written_to_in_between_is_noticed(make_call, backend):
    arguments = make_call(**BASE | WHOLE) | {"backend": backend}
    output = run(arguments)
    output.mul_(2.0)  # allowed: the output is no view
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    output, lse = prefix_attention(**arguments, return_lse=True)
    lse.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_gradients_of_what_is_not_used_are_none(make_call, backend):
    """d_output is None where only the log-sum-exp, which has no gradient, was used with something else."""
    arguments = make_call(**BASE | WHOLE) | {"backend": backend}
    other = torch.ones((), requires_grad=True)
    output, lse = prefix_attention(**arguments, return_lse=True)
    grads = torch.autograd.grad((lse * other).sum(), [other, arguments["query"]], allow_unused=True)
    assert grads[0] is not None and grads[1] is None and not output._is_view()


def test_a_mode_of_this_thread_is_seen_whatever_other_threads_have(arguments):
    entered, leave = threading.Event(), threading.Event()

    def other():
        with Seen():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(10)
    with Seen() as seen:
        leave.set()
        thread.join()
        run(arguments)
    assert seen.operators
    run(arguments)  # and no mode is left over


@pytest.mark.parametrize("name", ["query", "attn_mask", "prefix_bias", "gate_alpha", "d_output"])
def test_numbers_that_memory_holds_with_the_other_sign(make_call, backend, leaves, name):
    """`x.conj().imag` and the like share memory with -x; so may the gradient that comes in."""
    arguments = make_call(**BASE | WHOLE, mask="full float", bias=True) | {"backend": backend}
    arguments = {key: x.detach() if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
    arguments["value"].requires_grad_()
    d_output = torch.linspace(-1, 1, 2 * 17 * 16).view(1, 2, 17, 16)

    def results(flipped):
        given, d = dict(arguments), d_output
        if flipped and name == "d_output":
            d = torch._neg_view(-d)
        elif flipped:
            given[name] = torch._neg_view(-given[name])
            assert given[name].is_neg()
        output = run(given)
        return output, *torch.autograd.grad(output, given["value"], d)

    assert all(torch.equal(x, y) for x, y in zip(results(True), results(False), strict=True))


def test_forward_mode_is_refused_and_not_silently_zero(arguments):
    query = arguments["query"].detach()

    def attend(query):
        return run({**arguments, "query": query}).sum()

    with pytest.raises(NotImplementedError, match="no forward-mode derivative; backend='reference' has it"):
        torch.func.jvp(attend, (query,), (torch.ones_like(query),))
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="no forward-mode"):
            attend(forward_ad.make_dual(query, torch.ones_like(query)))
        attend(query)  # without a tangent it is a call like any other
