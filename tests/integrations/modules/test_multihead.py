"""PrefixMultiheadAttention: what nn.MultiheadAttention computes without a prefix, eager attention with one."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtuning_fast.attention.common import GATES
from qtuning_fast.integrations.modules.multihead import PrefixMultiheadAttention
from qtuning_fast.method.gate import Gate

EMBED, HEADS, B, L, S = 12, 2, 3, 4, 5

CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "bool": {"attn_mask": torch.arange(S) > torch.arange(L)[:, None] + 1},
    "float": {"attn_mask": torch.linspace(-2, 1, L * S).view(L, S)},
    "bool per head": {"attn_mask": torch.arange(B * HEADS * L * S).view(B * HEADS, L, S) % 3 == 1},
    "padding": {"key_padding_mask": torch.arange(S) >= torch.tensor([5, 3, 1])[:, None]},
    "float padding": {"key_padding_mask": torch.linspace(-1, 1, B * S).view(B, S)},
    "bool, padding": {
        "attn_mask": torch.arange(S) > torch.arange(L)[:, None] + 1,
        "key_padding_mask": torch.arange(S) >= torch.tensor([5, 3, 1])[:, None],
    },
    "float per head, padding": {
        "attn_mask": torch.linspace(-2, 1, B * HEADS * L * S).view(B * HEADS, L, S),
        "key_padding_mask": torch.arange(S) >= torch.tensor([5, 3, 1])[:, None],
    },
    "bool, float padding": {
        "attn_mask": torch.arange(S) > torch.arange(L)[:, None] + 1,
        "key_padding_mask": torch.linspace(-1, 1, B * S).view(B, S),
    },
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"batch_first": True},
    {"bias": False, "add_zero_attn": True},
    {"add_bias_kv": True, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 7, "vdim": 6},
    {"kdim": 7, "batch_first": True, "bias": False},
]
MISMATCH = pytest.mark.filterwarnings("ignore:Support for mismatched")  # PyTorch, of masks of two dtypes


def plain_and_ours(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, PrefixMultiheadAttention]:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(EMBED, HEADS, dtype=dtype, **options)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)  # biases start at zero
    ours = PrefixMultiheadAttention(EMBED, HEADS, dtype=dtype, **options)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def inputs(module: Any, dtype: torch.dtype = torch.float64, *, batched: bool = True) -> list[Tensor]:
    torch.manual_seed(1)
    shape = {(True, True): (B, -1), (True, False): (-1, B), (False, True): (-1,), (False, False): (-1,)}
    shapes = [
        [length if n == -1 else n for n in shape[batched, module.batch_first]] + [size]
        for length, size in ((L, module.embed_dim), (S, module.kdim), (S, module.vdim))
    ]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def masks_in(dtype: torch.dtype, name: str) -> dict[str, Tensor]:
    return {key: mask if mask.dtype == torch.bool else mask.to(dtype) for key, mask in MASKS[name].items()}


def gradients(module: nn.Module, x: list[Tensor], output: Tensor) -> dict[str, Tensor]:
    leaves = dict(zip(("query", "key", "value"), x)) | dict(module.named_parameters())
    torch.manual_seed(2)
    d_output = torch.randn(output.shape, dtype=output.dtype)
    return dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), d_output)))


def prefixed(dtype: torch.dtype = torch.float64, **options: Any) -> PrefixMultiheadAttention:
    torch.manual_seed(0)
    module = PrefixMultiheadAttention(EMBED, HEADS, **({"prefix_length": 3, "dtype": dtype} | options))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def eager(module: PrefixMultiheadAttention, x: Tensor, hidden: Tensor, prefix: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Self-attention, batch first, written out: output and weights [B, H, L, P + L]; hidden [B, 1 or H, L, L]."""
    D = EMBED // HEADS
    q, k, v = F.linear(x, module.in_proj_weight, module.in_proj_bias).view(*x.shape[:2], 3, HEADS, D).unbind(2)
    s_pre = torch.einsum("blhd,hpd->bhlp", q, prefix["prefix_key"]) / D**0.5
    if prefix.get("gate") is not None:
        alpha, tau = (prefix[name].view(-1, 1, 1) for name in ("gate_alpha", "gate_tau"))
        s_pre = s_pre + alpha * GATES[prefix["gate"]](tau * s_pre)
    s_ctx = (torch.einsum("blhd,bmhd->bhlm", q, k) / D**0.5).masked_fill(hidden, -torch.inf)
    weights = torch.cat([s_pre, s_ctx], -1).softmax(-1)
    w_pre, w_ctx = weights.split([s_pre.shape[-1], x.shape[1]], -1)
    output = torch.einsum("bhlp,hpd->blhd", w_pre, prefix["prefix_value"]) + torch.einsum("bhlm,bmhd->blhd", w_ctx, v)
    return module.out_proj(output.flatten(2)), weights


def close(ours: Tensor, expected: Tensor) -> None:
    tolerance = 1e-10 if expected.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


# Without a prefix


@MISMATCH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_without_a_prefix_all_is_as_in_the_plain_module(options: dict[str, Any], dtype: torch.dtype) -> None:
    plain, ours = plain_and_ours(dtype, **options)
    assert plain.state_dict().keys() == ours.state_dict().keys()
    for name in MASKS:
        masks = masks_in(dtype, name)
        for need_weights, average in ((False, True), (True, True), (True, False)):
            x, arguments = inputs(plain, dtype), {"need_weights": need_weights, "average_attn_weights": average}
            expected, expected_weights = plain(*x, **masks, **arguments)
            output, weights = ours(*x, **masks, **arguments)
            close(output, expected)
            assert output.is_contiguous()  # as code that takes views of it relies on
            assert (weights is None) == (expected_weights is None)
            if weights is not None:
                close(weights, expected_weights)
            if not average or name == "none":
                continue
            grads, expected_grads = gradients(ours, x, output), gradients(plain, x, expected)
            for leaf in expected_grads:
                close(grads[leaf], expected_grads[leaf])


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_unbatched(options: dict[str, Any]) -> None:
    plain, ours = plain_and_ours(**options)
    x = inputs(plain, batched=False)
    for masks in (
        {},
        {"attn_mask": MASKS["bool"]["attn_mask"], "key_padding_mask": torch.arange(S) == 4},
        {"attn_mask": torch.linspace(-2, 1, HEADS * L * S, dtype=torch.float64).view(HEADS, L, S)},
    ):
        for average in (True, False):
            for result, expected in zip(
                ours(*x, **masks, average_attn_weights=average), plain(*x, **masks, average_attn_weights=average)
            ):
                close(result, expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_the_hint_of_causality_counts_where_it_is_about_the_mask(need_weights: bool) -> None:
    plain, ours = plain_and_ours(batch_first=True)
    x = inputs(plain)[0]
    padding = torch.arange(L) >= torch.tensor([4, 3, 2])[:, None]
    for key_padding_mask in (None, padding):
        arguments = {"key_padding_mask": key_padding_mask, "attn_mask": CAUSAL, "need_weights": need_weights}
        hinted = ours(x, x, x, is_causal=True, **arguments)[0]
        close(hinted, ours(x, x, x, **arguments)[0])
        close(hinted, plain(x, x, x, is_causal=True, **arguments)[0])
    # The mask is what is meant where the operator's own causality would be another: L != S, and added keys.
    query, key, _ = inputs(plain)
    wide = torch.ones(L, S, dtype=torch.bool).triu(1)
    arguments = {"attn_mask": wide, "need_weights": need_weights, "is_causal": True}
    close(ours(query, key, key, **arguments)[0], plain(query, key, key, **arguments)[0])
    for option in ("add_bias_kv", "add_zero_attn"):
        plain, ours = plain_and_ours(batch_first=True, **{option: True})
        expected = plain(x, x, x, attn_mask=CAUSAL, need_weights=True)[0]
        close(ours(x, x, x, attn_mask=CAUSAL, need_weights=need_weights, is_causal=True)[0], expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_queries_that_see_nothing_get_zeros_and_pass_no_gradient(need_weights: bool) -> None:
    _, ours = plain_and_ours(batch_first=True)
    x = inputs(ours)[0]
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[1] = True
    output, weights = ours(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    close(output[1], ours.out_proj.bias.expand(L, EMBED))
    assert weights is None or (weights[1] == 0).all()
    grad = torch.autograd.grad(output.sum(), x)[0]
    assert grad.isfinite().all() and (grad[1] == 0).all()


def test_dropout_in_training_is_the_plain_modules_and_off_in_eval_mode() -> None:
    plain, ours = plain_and_ours(torch.float32, dropout=0.5, batch_first=True)
    x = inputs(plain, torch.float32)
    results = []
    for module in (ours, plain):
        torch.manual_seed(3)  # the same draws, as both form the weights
        results.append(module(*x, average_attn_weights=False))
    for result, expected in zip(*results):
        close(result, expected)
    dropped = [ours(*x, need_weights=False)[0] for _ in range(2)]
    assert not torch.equal(*dropped)
    close(ours.eval()(*x, need_weights=False)[0], plain.eval()(*x, need_weights=False)[0])


def test_masks_may_be_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ours = plain_and_ours(batch_first=True)
    x = inputs(plain)
    for shape, name in (((L, S), "attn_mask"), ((B, S), "key_padding_mask")):
        mask = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        grads = [
            torch.autograd.grad(m(*x, need_weights=False, **{name: mask})[0].sum(), mask)[0] for m in (ours, plain)
        ]
        close(*grads)
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(
                "qtuning_fast.integrations.modules.prefixed.attention_with_weights", None
            )  # the operator does it here
            close(*(m(*x, need_weights=False, **{name: mask})[0] for m in (ours, plain)))


# With a prefix


@pytest.mark.parametrize("gate", [*GATES, None])
@pytest.mark.parametrize("gate_per", ["layer", "head"])
def test_own_prefix_against_eager_attention(gate: str | None, gate_per: str) -> None:
    module = prefixed(gate=gate, gate_per=gate_per, batch_first=True)
    x = inputs(module)[0]
    hidden = torch.arange(L) >= torch.tensor([4, 2, 0])[:, None]  # the last sample sees its prefix alone
    both = hidden[:, None, None, :] | CAUSAL
    expected, expected_weights = eager(module, x, both, module.prefix_arguments())
    arguments = {"attn_mask": CAUSAL, "key_padding_mask": hidden, "is_causal": True}
    fused, none = module(x, x, x, need_weights=False, **arguments)
    output, weights = module(x, x, x, average_attn_weights=False, **arguments)
    assert none is None
    close(fused, expected)
    close(output, expected)
    close(weights, expected_weights[..., 3:])
    close(1 - weights.sum(-1), expected_weights[..., :3].sum(-1))
    leaves = {"x": x} | dict(module.named_parameters())
    torch.manual_seed(2)
    d_output = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, list(leaves.values()), d_output)
    for result in (fused, output):
        for grad, expected_grad in zip(torch.autograd.grad(result, list(leaves.values()), d_output), expected_grads):
            close(grad, expected_grad)


def test_added_keys_are_context_beside_a_prefix() -> None:
    module = prefixed(add_bias_kv=True, add_zero_attn=True, batch_first=True)
    x = inputs(module)[0]
    weights = module(x, x, x, attn_mask=CAUSAL, average_attn_weights=False)[1]
    assert weights.shape == (B, HEADS, L, L + 2) and (weights[..., L:] > 0).all() and (weights.sum(-1) < 1).all()
    close(module(x, x, x, attn_mask=CAUSAL, need_weights=False)[0], module(x, x, x, attn_mask=CAUSAL)[0])


def bank(T: int = 2) -> dict[str, Any]:
    torch.manual_seed(4)
    rows = torch.randn(2, T, HEADS, 3, EMBED // HEADS, dtype=torch.float64)
    alpha = torch.rand(T, 1, dtype=torch.float64)
    return {"prefix_key": rows[0], "prefix_value": rows[1], "gate": "tanh", "gate_alpha": alpha}


def test_a_placed_prefix_and_one_for_the_call_stand_in_for_the_own_one() -> None:
    module = prefixed(batch_first=True)
    x = inputs(module)[0]
    own = module(x, x, x, need_weights=False)[0]
    mixed = bank() | {"prefix_index": torch.tensor([0, 1, 0])}
    output = module(x, x, x, need_weights=False, prefix=mixed)[0]
    for b, task in enumerate(mixed["prefix_index"].tolist()):
        one = {"prefix_key": mixed["prefix_key"][task], "prefix_value": mixed["prefix_value"][task], "gate": "tanh"}
        one |= {"gate_alpha": mixed["gate_alpha"][task], "gate_tau": torch.ones(1)}
        close(output[b : b + 1], eager(module, x[b : b + 1], torch.tensor(False), one)[0])
    close(module(x, x, x, need_weights=False)[0], own)
    module.place(mixed)
    close(module(x, x, x, need_weights=False)[0], output)
    assert module.state_dict().keys() == prefixed().state_dict().keys()
    module.place(None)
    close(module(x, x, x, need_weights=False)[0], own)


def test_dropout_reaches_the_prefix_too() -> None:
    module = prefixed(torch.float32, dropout=0.5, batch_first=True, prefix_length=200)
    x = inputs(module, torch.float32)[0]
    hidden = torch.ones(L, L, dtype=torch.bool)  # the prefix is all there is
    first, second = (module(x, x, x, attn_mask=hidden, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(first, second)
    with torch.no_grad():
        module.eval()
        assert torch.equal(*(module(x, x, x, attn_mask=hidden, need_weights=False)[0] for _ in range(2)))


# Parameters


def test_state_dicts() -> None:
    plain, _ = plain_and_ours(torch.float32)
    module = prefixed(torch.float32)
    missing, unexpected = module.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing) == {"prefix_key", "prefix_value", "prefix_gate.alpha", "prefix_gate.tau"} and not unexpected
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = prefixed(torch.float32)
    nn.init.zeros_(other.prefix_key)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = inputs(module, torch.float32)
    assert torch.equal(other(*x)[0], module(*x)[0])


def test_a_prefix_starts_as_the_method_says_with_the_modules_dtype() -> None:
    torch.manual_seed(0)
    module = PrefixMultiheadAttention(512, 8, prefix_length=20, gate_per="head", dtype=torch.float64)
    assert module.prefix_key.shape == module.prefix_value.shape == (8, 20, 64)
    assert module.prefix_key.std().item() == pytest.approx(0.5, rel=0.05)
    assert module.prefix_value.std().item() == pytest.approx(0.02, rel=0.05)
    assert isinstance(module.prefix_gate, Gate) and module.prefix_gate.alpha.shape == (8,)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float64}
    meta = PrefixMultiheadAttention(8, 2, prefix_length=2, device="meta")
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}
    assert PrefixMultiheadAttention(8, 2, prefix_length=2, gate=None).prefix_gate is None


def test_copies_and_pickles() -> None:
    module = prefixed()
    x = inputs(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert other.prefix_key is not module.prefix_key and torch.equal(other(*x)[0], module(*x)[0])


# Wrong inputs


X = torch.randn(B, L, EMBED)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [1]}, TypeError, "query must be a tensor, got a list"),
    ({"query": X[None]}, ValueError, "query must be 2-D or 3-D with 12 features, got shape"),
    ({"key": X[0]}, ValueError, "key must be 3-D as query is, with 12 features, got shape"),
    ({"value": X[..., :5]}, ValueError, "value must be 3-D as query is, with 12 features, got shape"),
    ({"value": X[:, :2]}, ValueError, "value must be as long as key"),
    ({"key": X[:2], "value": X[:2]}, ValueError, "key must have query's batch size in dimension 0"),
    ({"attn_mask": torch.zeros(L, L, dtype=torch.long)}, TypeError, "attn_mask must be a bool or floating .*int64"),
    ({"attn_mask": torch.zeros(B, L, L)}, ValueError, r"attn_mask must have shape \[4, 4\] or \[6, 4, 4\], got"),
    ({"key_padding_mask": torch.zeros(L)}, ValueError, r"key_padding_mask must have shape \[3, 4\], got \[4\]"),
    ({"key_padding_mask": [True]}, TypeError, "key_padding_mask must be a bool or floating .*list"),
    ({"is_causal": True}, ValueError, "attn_mask must be the causal mask .* got None"),
    ({"prefix": [1]}, TypeError, "prefix must be a mapping .* got a list"),
    ({"prefix": {"prefix_key": X}}, ValueError, "prefix must hold prefix_value, got prefix_key"),
    ({"prefix": {"attn_mask": X}}, ValueError, "prefix must hold arguments about the prefix, got 'attn_mask'"),
    (
        {"prefix": {"prefix_key": torch.zeros(1, 2, 3, 6), "prefix_value": torch.zeros(1, 2, 3, 6)}},
        ValueError,
        "prefix_index must give",
    ),
    ({"prefix": {"prefix_key": X, "prefix_value": X}}, ValueError, "prefix_key must be"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_wrong_inputs_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    module = prefixed(torch.float32, batch_first=True)
    with pytest.raises(error, match=message):
        module(**({"query": X, "key": X, "value": X} | change))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prefix_length": 2.0}, TypeError, "prefix_length must be an integer, got 2.0"),
        ({"prefix_length": -1}, ValueError, "prefix_length must not be negative, got -1"),
        ({"gate": "tan"}, ValueError, "gate must be None or one of tanh.*got 'tan'"),
        ({"gate_per": "row"}, ValueError, "gate_per must be one of layer, head, got 'row'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PrefixMultiheadAttention(EMBED, HEADS, **options)
