"""oneDNN's products: float32 all the same, in forward and backward, and switched on for the linear layers alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qtuning_fast.bench.learning import products
from qtuning_fast.bench.learning.products import FrozenLinear, onednn, onednn_rounds, use_onednn


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 32, bias=False), nn.LayerNorm(32))


@pytest.mark.parametrize("shape", [(5, 96), (2, 7, 96), (96,)])
def test_a_frozen_layer_computes_what_it_did(shape: tuple[int, ...]) -> None:
    if onednn_rounds():
        pytest.skip("oneDNN would round on this CPU")
    model, x, grad = _model(), torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 32)
    exact = model.double()(x.double())
    expected = torch.autograd.grad(exact, x, grad.double())[0].double()
    assert use_onednn(model.float())
    found = model(x)
    (found_grad,) = torch.autograd.grad(found, x, grad)
    for mine, right in ((found, exact), (found_grad, expected)):
        assert (mine - right).abs().max() < 1e-5 * right.abs().max()
    assert [type(module) for module in model] == [FrozenLinear, nn.GELU, FrozenLinear, nn.LayerNorm]
    assert not any(p.requires_grad for module in model[::2] for p in module.parameters())


def test_where_it_would_round_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_rounds", lambda: True)
    model = _model()
    assert not use_onednn(model)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_the_switch_is_taken_back() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), onednn():
        assert torch.get_float32_matmul_precision() == "medium"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before
