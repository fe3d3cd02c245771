"""The module within PyTorch's encoders, whose fast paths know no prefix; compiled, and under autocast."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtuning_fast.integrations.modules.multihead import PrefixMultiheadAttention

EMBED, HEADS, B, L, S = 12, 2, 3, 4, 5
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)


def inputs(module: Any, dtype: torch.dtype = torch.float64, *, batched: bool = True) -> list[Tensor]:
    torch.manual_seed(1)
    shape = {(True, True): (B, -1), (True, False): (-1, B), (False, True): (-1,), (False, False): (-1,)}
    shapes = [
        [length if n == -1 else n for n in shape[batched, module.batch_first]] + [size]
        for length, size in ((L, module.embed_dim), (S, module.kdim), (S, module.vdim))
    ]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def prefixed(dtype: torch.dtype = torch.float64, **options: Any) -> PrefixMultiheadAttention:
    torch.manual_seed(0)
    module = PrefixMultiheadAttention(EMBED, HEADS, **({"prefix_length": 3, "dtype": dtype} | options))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def close(ours: Tensor, expected: Tensor) -> None:
    tolerance = 1e-10 if expected.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def stack(**options: Any) -> nn.TransformerEncoder:
    """Two encoder layers that PyTorch would run by its fast path, nested tensors included."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 16, dropout=0.0, batch_first=True)
    layer.self_attn = PrefixMultiheadAttention(EMBED, HEADS, batch_first=True, **({"prefix_length": 3} | options))
    with pytest.warns(UserWarning, match="enable_nested_tensor"):
        encoder = nn.TransformerEncoder(layer, 2)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.4)
    return encoder.eval()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_fast_paths_of_encoders_are_never_taken(frozen: bool, padded: bool) -> None:
    encoder = stack().requires_grad_(not frozen)
    x = torch.randn(B, L, EMBED)
    padding = torch.arange(L) >= torch.tensor([4, 3, 1])[:, None] if padded else None
    seen = torch.ones(B, L, dtype=torch.bool) if padding is None else ~padding
    slow = copy.deepcopy(encoder).train()  # where PyTorch takes no fast path; dropout is 0
    expected = slow(x, src_key_padding_mask=padding)[seen]
    with torch.no_grad():
        close(encoder(x, src_key_padding_mask=padding)[seen], expected)
        close(encoder.layers[1](x, src_key_padding_mask=padding), slow.layers[1](x, src_key_padding_mask=padding))
    close(encoder(x, src_key_padding_mask=padding)[seen], expected)  # frozen, PyTorch would take one here as well
    plain = stack(prefix_length=0)
    plain.load_state_dict(encoder.state_dict(), strict=False)
    assert not torch.allclose(plain(x, src_key_padding_mask=padding)[seen], expected, atol=1e-3)


def test_a_nested_tensor_is_refused_and_the_way_out_works() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(EMBED, HEADS, 16, batch_first=True), 2).eval()
    encoder.layers[1].self_attn = PrefixMultiheadAttention(EMBED, HEADS, batch_first=True, prefix_length=3).eval()
    x, padding = torch.randn(B, L, EMBED), torch.arange(L) >= torch.tensor([4, 3, 1])[:, None]
    with torch.no_grad():
        with pytest.raises(TypeError, match=r"query must not be a nested tensor.*use_nested_tensor"):
            encoder(x, src_key_padding_mask=padding)
        encoder.use_nested_tensor = False
        assert encoder(x, src_key_padding_mask=padding).isfinite().all()


@pytest.mark.parametrize("need_weights", [True, False])
def test_compiled_without_a_graph_break(need_weights: bool) -> None:
    module = prefixed(batch_first=True)
    x = inputs(module)[0]
    padding = torch.arange(L) >= torch.tensor([4, 3, 1])[:, None]

    def run(x: Tensor) -> Tensor:
        return module(x, x, x, key_padding_mask=padding, attn_mask=CAUSAL, need_weights=need_weights)[0]

    torch.compiler.reset()
    output, expected = torch.compile(run, backend="aot_eager", fullgraph=True)(x), run(x)
    close(output, expected)
    for grad, expected_grad in zip(
        *(torch.autograd.grad(y.sum(), [x, *module.parameters()]) for y in (output, expected))
    ):
        close(grad, expected_grad)


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}], ids=str)
@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast_keeps_the_prefix_in_float32(need_weights: bool, options: dict[str, Any]) -> None:
    module = prefixed(torch.float32, **options)
    x = inputs(module, torch.float32)
    expected = module(*x, need_weights=need_weights)[0]
    with torch.autocast("cpu", torch.bfloat16):
        output = module(*x, need_weights=need_weights)[0]
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)  # a few roundings of 2^-8
    output.float().sum().backward()
    assert module.prefix_key.grad.dtype == torch.float32 and module.prefix_key.grad.abs().sum() > 0
