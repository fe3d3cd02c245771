"""timm's attention with a prefix, and without timm a stand-in for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtuning_fast import replace_attention, restore_attention
from qtuning_fast.attention.common import GATES
from qtuning_fast.integrations.modules import timm as ours_for_timm
from qtuning_fast.integrations.modules.timm import PrefixTimmAttention

EMBED, HEADS, B, L = 12, 2, 3, 4
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
PREFIX = {"prefix_key", "prefix_value", "prefix_gate.alpha", "prefix_gate.tau"}


class StandIn(nn.Module):
    """What timm's `Attention` computes, under the names of its parts, where timm is not installed."""

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool = False, gated: bool = False, **options: Any) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=options.get("qkv_bias", False))
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(options.get("attn_drop", 0.0))
        self.norm = nn.LayerNorm(dim) if options.get("scale_norm") else nn.Identity()
        self.gate = nn.Linear(dim, dim) if gated else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.attn_drop.p if self.training else 0.0
        mask = {"attn_mask": attn_mask, "is_causal": is_causal, "dropout_p": dropout}
        output = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, **mask)
        output = self.norm(output.transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(output if self.gate is None else output * self.gate(x).sigmoid()))


@pytest.fixture(params=["timm", "stand-in"])
def timm_attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    if request.param == "timm":
        pytest.importorskip("timm")
        from timm.layers import Attention

        return Attention
    monkeypatch.setattr(ours_for_timm, "attention_class", lambda: StandIn)
    monkeypatch.setattr("qtuning_fast.integrations.modules.replacement.attention_class", lambda: StandIn)
    return StandIn


def drawn(modules: dict[str, Any]) -> dict[str, Any]:
    """The prefixes, large enough to be seen."""
    torch.manual_seed(5)
    for module in modules.values():
        for name in PREFIX:
            nn.init.normal_(module.get_parameter(name), std=1.0)
    return modules


def x() -> Tensor:
    return torch.randn(B, L, EMBED, generator=torch.Generator().manual_seed(1))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a restored model must have back, by name."""
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "parameters": [
            (name, id(p), p.requires_grad, p.detach().clone().tolist()) for name, p in model.named_parameters()
        ],
        "attributes": [
            {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float))}
            for module in model.modules()
        ],
        "names": [(sorted(vars(m)), list(m._parameters), list(m._buffers), list(m._modules)) for m in model.modules()],
    }


def eager_timm(module: Any, x: Tensor, hidden: Tensor) -> Tensor:
    """timm's attention with the module's prefix, written out; hidden broadcasts to [B, H, N, N]."""
    q, k, v = module.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    q, k = module.q_norm(q), module.k_norm(k)
    gate = module.prefix_gate
    s_pre = q @ module.prefix_key.transpose(1, 2) * module.scale
    s_pre = s_pre + gate.alpha.view(-1, 1, 1) * GATES[gate.activation](gate.tau.view(-1, 1, 1) * s_pre)
    s_ctx = (q @ k.transpose(2, 3) * module.scale).masked_fill(hidden, -torch.inf)
    w_pre, w_ctx = torch.cat([s_pre, s_ctx], -1).softmax(-1).split([s_pre.shape[-1], x.shape[1]], -1)
    output = module.norm((w_pre @ module.prefix_value + w_ctx @ v).transpose(1, 2).flatten(2))
    return module.proj(output if module.gate is None else output * module.gate(x).sigmoid())


TIMM_OPTIONS: list[dict[str, Any]] = [
    {"qkv_bias": True},
    {"qk_norm": True, "norm_layer": nn.LayerNorm},
    {"scale_norm": True, "gated": True, "norm_layer": nn.LayerNorm},
]


@pytest.mark.parametrize("options", TIMM_OPTIONS, ids=str)
@pytest.mark.parametrize("gate_per", ["layer", "head"])
def test_timms_attention(timm_attention: type[nn.Module], options: dict[str, Any], gate_per: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(timm_attention(EMBED, HEADS, **options)).double().eval()
    before, tokens = snapshot(model), x().double()
    causal = torch.ones(L, L, dtype=torch.bool).tril()
    plain: Callable[..., Tensor] = copy.deepcopy(model)[0]
    [module] = replace_attention(model, prefix_length=0).values()
    for arguments in ({}, {"attn_mask": causal}, {"attn_mask": causal.double().log()[None]}, {"is_causal": True}):
        torch.testing.assert_close(module(tokens, **arguments), plain(tokens, **arguments), rtol=1e-10, atol=1e-10)
    restore_attention(model)
    assert snapshot(model) == before

    [module] = drawn(replace_attention(model, prefix_length=3, gate_per=gate_per)).values()
    assert isinstance(module, PrefixTimmAttention) and module.prefix_key.dtype == torch.float64
    output, expected = module(tokens, attn_mask=causal), eager_timm(module, tokens, ~causal)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    leaves = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for grad, expected_grad in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (output, expected))):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-9)
    restore_attention(model)
    assert snapshot(model) == before


def test_timms_dropout_is_honoured_and_unknown_parts_are_refused(timm_attention: type[nn.Module]) -> None:
    model = nn.Sequential(timm_attention(EMBED, HEADS, attn_drop=0.5))
    drawn(replace_attention(model, prefix_length=3))
    assert not torch.equal(model(x()), model(x()))
    assert torch.equal(model.eval()(x()), model(x()))
    restore_attention(model)
    model.append(timm_attention(EMBED, HEADS))[1].add_module("extra", nn.Identity())
    with pytest.raises(NotImplementedError, match=r"parts unknown to PrefixTimmAttention: \['extra'\]"):
        replace_attention(model, prefix_length=3)
    assert type(model[0]) is timm_attention


class Float32Norm(nn.Module):
    """What autocast makes of a norm on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def test_timms_attention_under_autocast(timm_attention: type[nn.Module]) -> None:
    model = nn.Sequential(timm_attention(EMBED, HEADS))
    model[0].q_norm, model[0].k_norm = Float32Norm(), Float32Norm()
    drawn(replace_attention(model, prefix_length=3))
    expected = model(x())
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)  # a few roundings of 2^-8


def test_a_vision_transformer_of_timm() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(image)
        changed = drawn(replace_attention(model, prefix_length=4))
        assert list(changed) == ["blocks.0.attn", "blocks.1.attn"]
        with_prefix = model(image)
        assert not torch.allclose(with_prefix, expected, atol=1e-3)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(image), with_prefix, rtol=1e-4, atol=1e-5)
        restore_attention(model)
        assert torch.equal(model(image), expected)
