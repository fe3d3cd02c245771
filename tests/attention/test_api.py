"""prefix_attention beside PyTorch's own attention, and at the edges of its contract."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from qtuning_fast import prefix_attention


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mask", [None, "padding bool", "padding float", "full bool", "full float"])
def test_without_rows_it_is_plain_attention(make_call, mask):
    arguments = make_call(P=0, M=7, N=5, mask=mask, seed=1)
    if mask is not None:
        arguments["attn_mask"][..., 0] = True if "bool" in mask else 0.0  # PyTorch and we differ on blind queries
    attn_mask = arguments.get("attn_mask")
    if attn_mask is not None and attn_mask.ndim == 2:
        attn_mask = attn_mask[:, None, None, :]
    q, k, v = arguments["query"], arguments["key"], arguments["value"]
    close(prefix_attention(**arguments), scaled_dot_product_attention(q, k, v, attn_mask, enable_gqa=True))


@pytest.mark.parametrize(("N", "M"), [(4, 4), (2, 5), (5, 2), (3, 0)])
def test_without_gate_it_is_attention_over_the_concatenation(make_call, N, M):
    P = 3
    arguments = make_call(gate=None, N=N, M=M, P=P, mask="padding bool", is_causal=True, scale=0.4)
    q, k, v = arguments["query"], arguments["key"], arguments["value"]
    B = q.shape[0]
    k, v = (
        torch.cat([arguments[name].expand(B, -1, -1, -1), x], dim=2)
        for name, x in (("prefix_key", k), ("prefix_value", v))
    )
    visible = torch.ones(B, 1, N, P + M, dtype=torch.bool)  # the prefix always is
    for i in range(N):
        for j in range(M):
            visible[:, 0, i, P + j] = arguments["attn_mask"][:, j] & (j <= i + M - N)
    close(prefix_attention(**arguments), scaled_dot_product_attention(q, k, v, visible, scale=0.4, enable_gqa=True))


@pytest.mark.parametrize("gate", ["tanh", "sigmoid"])
def test_lse_is_that_of_the_scores_in_place_and_has_no_gradient(make_call, gate):
    arguments = make_call(G=1, gate=gate, N=3, M=4, scale=0.5)
    output, lse = prefix_attention(**arguments, return_lse=True)
    sigma = getattr(torch, gate)
    s_pre = 0.5 * arguments["query"] @ arguments["prefix_key"].mT
    s_pre = s_pre + 0.7 * sigma(1.3 * s_pre)
    s_ctx = 0.5 * arguments["query"] @ arguments["key"].mT
    close(lse, torch.cat([s_ctx, s_pre], dim=-1).logsumexp(-1).detach())
    assert output.requires_grad and not lse.requires_grad
    assert torch.equal(prefix_attention(**arguments), output)


def test_a_cap_comes_before_gate_bias_and_masks(make_call, leaves, gradients):
    """Scores of both parts written out, one softmax over them, and autograd through it."""
    arguments = make_call(G=1, N=4, M=5, P=3, mask="full float", bias=True, is_causal=True, scale=1.5, softcap=0.9)
    q, k, v, K, V = (arguments[name] for name in ("query", "key", "value", "prefix_key", "prefix_value"))

    def capped(s):
        return 0.9 * torch.tanh(s / 0.9)

    s_pre = capped(1.5 * q @ K.mT)
    s_pre = s_pre + 0.7 * torch.tanh(1.3 * s_pre) + arguments["prefix_bias"]
    future = torch.ones(4, 5, dtype=torch.bool).triu(2)  # the last of 4 queries sees all of 5 keys
    s_ctx = (capped(1.5 * q @ k.mT) + arguments["attn_mask"]).masked_fill(future, -torch.inf)
    weights = torch.cat([s_pre, s_ctx], dim=-1).softmax(-1)
    expected = weights[..., :3] @ V + weights[..., 3:] @ v
    close(prefix_attention(**arguments), expected, tolerance=1e-10)
    inputs = leaves(arguments)
    found = gradients(arguments, torch.ones_like(expected))
    for name, grad in zip(inputs, torch.autograd.grad(expected.sum(), list(inputs.values()))):
        close(found[name], grad, tolerance=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cap_far_above_all_scores_changes_nothing(make_call, gradients, dtype):
    arguments = make_call(dtype=dtype, rank_key=1, gate_shape="head", mask="padding bool")
    expected = prefix_attention(**arguments)
    expected_grads = gradients(arguments, torch.ones_like(expected))
    for softcap in (1e9, 1e30):
        tolerance = 16 * torch.finfo(dtype).eps  # s / cap and back
        close(prefix_attention(**arguments | {"softcap": softcap}), expected, tolerance)
        for name, grad in gradients(arguments | {"softcap": softcap}, torch.ones_like(expected)).items():
            close(grad, expected_grads[name], tolerance * max(1.0, expected_grads[name].abs().max().item()))
    without = {name: x for name, x in arguments.items() if name != "softcap"}
    close(prefix_attention(**without), expected, tolerance=0)


def test_no_score_is_beyond_the_cap(make_call, gradients):
    """Not even of the largest numbers; and what a mask hides stays hidden."""
    arguments = make_call(dtype=torch.float16, gate=None, mask="padding bool", softcap=2.0)
    for name in ("query", "key", "prefix_key"):
        largest = arguments[name].detach().sign() * torch.finfo(torch.float16).max
        arguments[name] = largest.requires_grad_()
    arguments["attn_mask"][0], arguments["attn_mask"][1] = False, True
    output, lse = prefix_attention(**arguments, return_lse=True)
    for b, keys in enumerate((3, 3 + 4)):
        assert (lse[b].exp() / keys).log().abs().max() <= 2.0 + 1e-6
    assert output.isfinite().all()
    assert (gradients(arguments, torch.ones_like(output))["value"][0] == 0).all()


@pytest.mark.parametrize("empty", [{"B": 0}, {"N": 0}, {"M": 0}, {"P": 0}, {"M": 0, "P": 0}, dict.fromkeys("BNMP", 0)])
@pytest.mark.parametrize("T", [None, 2])
def test_empty_dimensions(make_call, gradients, empty, T):
    arguments = make_call(**empty, T=T, rank_key=1, rank_value=2, mask="padding bool", is_causal=True)
    output, lse = prefix_attention(**arguments, return_lse=True)
    B, Hq, N, _ = arguments["query"].shape
    assert output.shape == (B, Hq, N, 2) and lse.shape == (B, Hq, N)
    assert all(grad.isfinite().all() for grad in gradients(arguments, torch.ones_like(output)).values())


def blind_everywhere(make_call):
    arguments = make_call(T=2, lengths=True, mask="padding bool", rank_key=1, rank_value=1, gate_shape="head")
    arguments["prefix_length"].zero_()
    arguments["attn_mask"].zero_()
    return arguments


def test_a_query_that_sees_nothing_gets_nothing_and_gives_nothing(make_call, gradients):
    arguments = blind_everywhere(make_call)
    output, lse = prefix_attention(**arguments, return_lse=True)
    assert (output == 0).all() and lse.isneginf().all()
    grads = gradients(arguments, torch.ones_like(output))
    assert grads and all((grad == 0).all() for grad in grads.values())


def test_blind_queries_beside_seeing_ones(make_call, gradients):
    N, M = 5, 2
    arguments = make_call(N=N, M=M, P=0, is_causal=True)
    output, lse = prefix_attention(**arguments, return_lse=True)
    assert (output[:, :, : N - M] == 0).all() and lse[:, :, : N - M].isneginf().all()
    assert (output[:, :, N - M :] != 0).all() and lse[:, :, N - M :].isfinite().all()
    grads = gradients(arguments, torch.ones_like(output))
    assert (grads["query"][:, :, : N - M] == 0).all() and all(grad.isfinite().all() for grad in grads.values())


def test_a_query_without_context_attends_to_the_prefix_alone(make_call):
    arguments = make_call(M=3, mask="padding bool")
    arguments["attn_mask"].zero_()
    no_context = {name: arguments[name][:, :, :0] for name in ("key", "value")} | {"attn_mask": None}
    close(prefix_attention(**arguments), prefix_attention(**arguments | no_context), tolerance=0)


@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_most_negative_number_of_a_mask_means_minus_infinity(make_call, mask_dtype, dtype):
    arguments = make_call(dtype=dtype, P=0, mask="padding bool")
    arguments["attn_mask"][0], arguments["attn_mask"][1] = False, torch.tensor([True, False, True, False])
    lowest = torch.finfo(mask_dtype).min
    additive = torch.zeros(arguments["attn_mask"].shape, dtype=mask_dtype).masked_fill(~arguments["attn_mask"], lowest)
    output, lse = prefix_attention(**arguments | {"attn_mask": additive}, return_lse=True)
    assert lse[0].isneginf().all()
    close(output, prefix_attention(**arguments), tolerance=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gate", ["tanh", "gelu", "softplus", "elu", None])
def test_large_scores_do_not_overflow(make_call, gradients, dtype, gate):
    arguments = make_call(dtype=dtype, gate=gate, gate_shape="head", rank_key=1, mask="padding bool", is_causal=True)
    for name in ("query", "key", "prefix_key"):
        arguments[name] = (100 * arguments[name].detach()).requires_grad_()
    output, lse = prefix_attention(**arguments, return_lse=True)
    assert lse.max() > 5e3 and output.isfinite().all() and lse.isfinite().all()
    for name, grad in gradients(arguments, torch.ones_like(output)).items():
        assert grad.isfinite().all(), name


def test_the_largest_float16_numbers(make_call):
    arguments = make_call(dtype=torch.float16)
    for name in ("query", "key", "value", "prefix_key", "prefix_value"):
        arguments[name] = arguments[name].detach().sign() * torch.finfo(torch.float16).max
    output, lse = prefix_attention(**arguments, return_lse=True)
    assert output.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("gate_shape", ["float", "scalar", "head", "task", "task, head"])
def test_a_bank_is_one_call_per_sample(make_call, gate_shape):
    sizes = {"B": 5, "T": 3, "P": 4, "lengths": True, "n_shared": 1}
    arguments = make_call(**sizes, rank_key=1, rank_value=2, mask="padding bool", is_causal=True, gate_shape=gate_shape)
    arguments["prefix_length"] = torch.tensor([4, 0, 2], dtype=torch.int32)
    arguments["prefix_index"] = torch.tensor([2, 0, 1, 2, 0], dtype=torch.uint8)
    output = prefix_attention(**arguments)
    for b, t in enumerate(arguments["prefix_index"].tolist()):
        length = int(arguments["prefix_length"][t])
        own = {name: arguments[name][b : b + 1] for name in ("query", "key", "value", "attn_mask")}
        own |= {name: arguments[name][t, :, :length] for name in ("prefix_key", "prefix_value")}
        for name in ("reweight_key", "reweight_value"):
            U, V = arguments[name]
            own[name] = (U[t, :length], V[t])
        for name in ("gate_alpha", "gate_tau"):
            if isinstance(arguments[name], torch.Tensor) and arguments[name].ndim == 2:
                own[name] = arguments[name][t].expand(4)
        own |= {"prefix_index": None, "prefix_length": None, "n_shared": min(1, length)}
        close(output[b : b + 1], prefix_attention(**arguments | own))


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_rows_beyond_the_length_are_not_there(make_call, gradients, garbage):
    arguments = make_call(T=2, B=3, P=4, lengths=True, rank_key=1, rank_value=2, bias=True, gate_shape="task")
    arguments["prefix_length"] = torch.tensor([1, 3])
    clean = prefix_attention(**arguments)
    with torch.no_grad():
        beyond = torch.arange(4) >= arguments["prefix_length"][:, None]
        for name in ("prefix_key", "prefix_value"):
            arguments[name][beyond[:, None, :].expand(2, 2, 4)] = garbage
        for name in ("reweight_key", "reweight_value"):
            arguments[name][0][beyond] = garbage
    close(prefix_attention(**arguments), clean, tolerance=0)
    grads = gradients(arguments, torch.ones_like(clean))
    assert all(grad.isfinite().all() for grad in grads.values())
    for name in ("prefix_key", "prefix_value"):
        assert (grads[name][beyond[:, None, :].expand(2, 2, 4)] == 0).all()
    for name in ("reweight_key[0]", "reweight_value[0]"):
        assert (grads[name][beyond] == 0).all() and (grads[name][~beyond] != 0).all()


@pytest.mark.parametrize("T", [None, 2])
def test_shared_rows_ignore_the_reweighting(make_call, gradients, T):
    arguments = make_call(T=T, P=3, n_shared=2, rank_key=2, rank_value=1)
    with torch.no_grad():
        for name in ("reweight_key", "reweight_value"):
            arguments[name][0][..., :2, :] = torch.nan
    output = prefix_attention(**arguments)
    grads = gradients(arguments, torch.ones_like(output))
    assert output.isfinite().all() and all(grad.isfinite().all() for grad in grads.values())
    for name in ("reweight_key[0]", "reweight_value[0]"):
        assert (grads[name][..., :2, :] == 0).all() and (grads[name][..., 2:, :] != 0).all()
    unweighted = prefix_attention(**arguments | {"n_shared": 3})
    close(unweighted, prefix_attention(**arguments | {"reweight_key": None, "reweight_value": None}))


def test_weights_of_one_change_nothing(make_call):
    arguments = make_call(n_shared=0)
    U, V_key, V_value = torch.ones(3, 2).double(), torch.ones(2, 2, 3).double(), torch.ones(2, 2, 2).double()
    V_key[1], V_value[1] = 0, 0  # W starts so: component 0 is ones, the V of the others zero
    weighted = prefix_attention(**arguments, reweight_key=(U, V_key), reweight_value=(U, V_value))
    close(weighted, prefix_attention(**arguments))


def test_any_strides(make_call):
    arguments = make_call(rank_key=2, rank_value=2, mask="full bool", bias=True)
    strided = dict(arguments)
    for name in ("query", "key", "value", "prefix_key", "prefix_value", "attn_mask", "prefix_bias"):
        strided[name] = arguments[name].detach().transpose(-1, -3).contiguous().transpose(-1, -3)
        assert not strided[name].is_contiguous() and torch.equal(strided[name], arguments[name])
    close(prefix_attention(**strided), prefix_attention(**arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix_dtype", [None, torch.float32])
def test_sixteen_bits_with_and_without_master_weights(make_call, leaves, gradients, dtype, prefix_dtype):
    options = {"D": 16, "Dv": 16, "M": 9, "rank_key": 1, "rank_value": 2, "gate_shape": "head", "n_shared": 1}
    arguments = make_call(dtype=dtype, prefix_dtype=prefix_dtype, **options)
    output, lse = prefix_attention(**arguments, return_lse=True)
    assert output.dtype == dtype and lse.dtype == torch.float32
    grads = gradients(arguments, torch.ones_like(output))
    for name, x in leaves(arguments).items():
        assert grads[name].dtype == x.dtype, name

    def widened(x):
        if isinstance(x, tuple):
            return tuple(map(widened, x))
        return x.detach().double().requires_grad_() if isinstance(x, torch.Tensor) else x

    exact = {name: widened(x) for name, x in arguments.items()}
    epsilon = torch.finfo(dtype).eps
    close(output.double(), prefix_attention(**exact), tolerance=4 * epsilon)
    for name, grad in gradients(exact, torch.ones_like(output).double()).items():
        close(grads[name].double(), grad, tolerance=8 * epsilon * max(1.0, grad.abs().max().item()))


def test_the_gradient_of_a_master_weight_is_not_squeezed_through_sixteen_bits(make_call, gradients):
    arguments = make_call(dtype=torch.float16, prefix_dtype=torch.float32, B=64, N=16)
    d_output = torch.full((64, 4, 16, 2), 1000.0, dtype=torch.float16)
    grad = gradients(arguments, d_output)["prefix_value"]
    assert grad.isfinite().all() and grad.abs().max() > torch.finfo(torch.float16).max


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(make_call, dtype):
    arguments = make_call(dtype=dtype, prefix_dtype=torch.float32, D=16, rank_key=1)
    expected = prefix_attention(**arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(prefix_attention(**arguments), expected, tolerance=0)


def test_compiles_as_one_graph(make_call):
    arguments = make_call(T=2, lengths=True, rank_key=1, mask="padding bool", is_causal=True, softcap=2.0)
    compiled = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
    close(compiled(**arguments), prefix_attention(**arguments))


def test_meta_tensors_give_shapes(make_call):
    on_meta = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in make_call(T=2).items()}
    assert prefix_attention(**on_meta).shape == (2, 4, 3, 2)
