"""replace_attention and restore_attention on models of PyTorch's own attention and of timm's."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qtuning_fast import PrefixMultiheadAttention, replace_attention, restore_attention

EMBED, HEADS, B, L = 12, 2, 3, 4
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

PADDING = torch.arange(L) >= torch.tensor([4, 3, 1])[:, None]
PREFIX = {"prefix_key", "prefix_value", "prefix_gate.alpha", "prefix_gate.tau"}


def encoder(layers: int = 3, **options: Any) -> nn.TransformerEncoder:
    """A stack whose inference takes PyTorch's fast path, with nested tensors under a padding mask."""
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True} | options
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(EMBED, HEADS, 16, **options), layers)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


def drawn(modules: dict[str, Any]) -> dict[str, Any]:
    """The prefixes, large enough to be seen."""
    torch.manual_seed(5)
    for module in modules.values():
        for name in PREFIX:
            nn.init.normal_(module.get_parameter(name), std=1.0)
    return modules


def x() -> Tensor:
    return torch.randn(B, L, EMBED, generator=torch.Generator().manual_seed(1))


def slow(model: nn.Module, *inputs: Tensor, **masks: Any) -> Tensor:
    """The model in training mode, for which PyTorch takes no fast path; there is no dropout."""
    return copy.deepcopy(model).train()(*inputs, **masks)


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


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("layers", [None, [0], [2], [1, 2]])
def test_inference_attends_to_the_prefix_whatever_layers_have_one(
    layers: list[int] | None, padding: Tensor | None, frozen: bool
) -> None:
    model = encoder().requires_grad_(not frozen)
    seen = torch.ones(B, L, dtype=torch.bool) if padding is None else ~padding
    drawn(replace_attention(model, prefix_length=3, layers=layers, train_only_prefix=False))
    expected = slow(model, x(), src_key_padding_mask=padding)[seen]
    with torch.no_grad():
        torch.testing.assert_close(model(x(), src_key_padding_mask=padding)[seen], expected, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(model(x(), src_key_padding_mask=padding)[seen], expected, rtol=1e-4, atol=1e-5)
    output = model(x(), src_key_padding_mask=padding)[seen]
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    output.square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "prefix" in name
    )


def test_with_an_empty_prefix_the_model_computes_what_it_did() -> None:
    model = encoder()
    expected = slow(model, x(), src_key_padding_mask=PADDING)
    keys = model.state_dict().keys()
    replace_attention(model, prefix_length=0)
    assert model.state_dict().keys() == keys
    with torch.no_grad():
        output = model(x(), src_key_padding_mask=PADDING)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_placed_prefixes_serve_a_batch_of_mixed_tasks() -> None:
    model = encoder()
    changed = replace_attention(model, prefix_length=0)
    torch.manual_seed(6)
    rows = {name: torch.randn(2, 2, HEADS, 3, EMBED // HEADS) for name in changed}
    tasks = torch.tensor([1, 0, 1])
    for name, module in changed.items():
        module.place({"prefix_key": rows[name][0], "prefix_value": rows[name][1], "prefix_index": tasks})
    with torch.no_grad():
        mixed = model(x())
        for b, task in enumerate(tasks.tolist()):
            for name, module in changed.items():
                module.place({"prefix_key": rows[name][0, task], "prefix_value": rows[name][1, task]})
            torch.testing.assert_close(model(x()[b : b + 1]), mixed[b : b + 1])


def test_restore_gives_back_everything() -> None:
    model = encoder()
    model.layers[0].linear1.requires_grad_(False)
    before = snapshot(model)
    with torch.no_grad():
        expected = model(x(), src_key_padding_mask=PADDING)
    in_proj = model.layers[1].self_attn.in_proj_weight
    changed = replace_attention(model, prefix_length=3, gate="gelu", gate_per="head")
    assert list(changed) == [f"layers.{i}.self_attn" for i in range(3)]
    assert all(isinstance(module, PrefixMultiheadAttention) for module in changed.values())
    assert (
        changed["layers.1.self_attn"] is model.layers[1].self_attn
        and model.layers[1].self_attn.in_proj_weight is in_proj
    )
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.{part}" for name in changed for part in PREFIX}
    changed["layers.0.self_attn"].place(changed["layers.1.self_attn"].prefix_arguments())
    restore_attention(model)
    assert snapshot(model) == before
    with torch.no_grad():
        assert torch.equal(model(x(), src_key_padding_mask=PADDING), expected)
    replace_attention(model, prefix_length=2)  # and again
    restore_attention(model)
    assert snapshot(model) == before


def test_copies_pickles_and_state_dicts_of_a_replaced_model() -> None:
    model = encoder()
    drawn(replace_attention(model, prefix_length=3))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        expected = model(x())
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(other(x()), expected)
            restore_attention(other)
            assert all(parameter.requires_grad for parameter in other.parameters())
            assert other.use_nested_tensor and not torch.allclose(other(x()), expected, atol=1e-3)
        missing, unexpected = model.load_state_dict(encoder().state_dict(), strict=False)
        assert {name.split("self_attn.")[1] for name in missing} == PREFIX and not unexpected
        other = encoder()
        replace_attention(other, prefix_length=3)
        other.load_state_dict(model.state_dict(), assign=True)  # other Parameter objects, which stay
        assert torch.equal(other(x()), expected)
        restore_attention(other)
        torch.testing.assert_close(other(x()), encoder()(x()))


def test_hooks_and_modes_stay() -> None:
    model = encoder()
    calls: list[str] = []
    model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append("called"))
    replace_attention(model.train(), prefix_length=1)
    model(x())
    assert calls == ["called"] and all(module.training for module in model.modules())
    restore_attention(model.eval())
    assert not any(module.training for module in model.modules())


def test_a_compiled_model_notices() -> None:
    model = encoder(layers=1)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        plain = compiled(x())
        drawn(replace_attention(model, prefix_length=3))
        with_prefix = compiled(x())
        assert not torch.allclose(plain, with_prefix, atol=1e-3)
        torch.testing.assert_close(with_prefix, model(x()))
        restore_attention(model)
        torch.testing.assert_close(compiled(x()), plain)


def test_cross_attention_is_left_alone_unless_named() -> None:
    model = nn.Transformer(EMBED, HEADS, 1, 1, 16, dropout=0.0, batch_first=True).eval()
    every = ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn"]
    assert list(replace_attention(model, prefix_length=2)) == every[:2]
    restore_attention(model)
    assert list(replace_attention(model, prefix_length=2, names=lambda name: True)) == every
    restore_attention(model)
    changed = drawn(
        replace_attention(model, prefix_length=2, names=lambda name: name.startswith("decoder"), layers=[1])
    )
    assert list(changed) == every[2:]
    masks = {"src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING}
    with torch.no_grad():
        output = model(x(), x()[:, :2], **masks)
    torch.testing.assert_close(output, slow(model, x(), x()[:, :2], **masks), rtol=1e-4, atol=1e-5)


def test_a_module_by_itself_shared_modules_and_parts_of_a_model() -> None:
    attention = nn.MultiheadAttention(EMBED, HEADS)
    assert list(replace_attention(attention, prefix_length=2)) == [""]
    restore_attention(attention)
    assert type(attention) is nn.MultiheadAttention
    shared = nn.ModuleList([attention, attention])
    assert list(replace_attention(shared, prefix_length=2)) == ["0"] and shared[1] is shared[0]
    restore_attention(shared)

    model = encoder()
    before = snapshot(model)
    replace_attention(model, prefix_length=2, layers=[0])
    replace_attention(model.layers[1], prefix_length=4)
    with pytest.raises(ValueError, match="with a model around this one"):
        restore_attention(model.layers[0])
    restore_attention(model)
    assert snapshot(model) == before


def test_what_cannot_be_replaced_is_said_and_changes_nothing(tiny_bert: nn.Module) -> None:
    model = encoder()
    before = snapshot(model)
    wrong: list[tuple[nn.Module, dict[str, Any], type[Exception], str]] = [
        (nn.Linear(2, 2), {}, ValueError, "must have an nn.MultiheadAttention .* got a Linear with no attention"),
        (tiny_bert, {}, ValueError, "got a BertModel with BertAttention, "),
        (
            model,
            {"layers": [3]},
            ValueError,
            r"layers must name at least one layer of 0..2, .* got \[3\]; .*layers.0.self",
        ),
        (model, {"layers": [-1]}, ValueError, r"layers must .* got \[-1\]"),
        (model, {"layers": [1, 1]}, ValueError, "none of them twice"),
        (model, {"layers": []}, ValueError, "at least one layer"),
        (model, {"layers": ["0"]}, TypeError, r"layers must be None or a list of integers, got \['0'\]"),
        (
            model,
            {"names": lambda name: False},
            ValueError,
            "names must select an attention module, got none of layers.0",
        ),
        (model, {"prefix_length": -1}, ValueError, "prefix_length must not be negative"),
        (model, {"gate": "tan"}, ValueError, "gate must be"),
        (model, {"gate_per": "row"}, ValueError, "gate_per must be"),
    ]
    for target, change, error, message in wrong:
        with pytest.raises(error, match=message):
            replace_attention(target, **({"prefix_length": 2} | change))
        with pytest.raises(ValueError, match="model must be one whose attention"):
            restore_attention(target)
    assert snapshot(model) == before
    replace_attention(model, prefix_length=2, layers=[0])
    with pytest.raises(ValueError, match="already; call restore_attention first"):
        replace_attention(model, prefix_length=2)
    restore_attention(model)
    parametrize.register_parametrization(model.layers[2].self_attn, "in_proj_weight", nn.Identity())
    with pytest.raises(
        NotImplementedError, match=r"layers.2.self_attn is a ParametrizedMultiheadAttention: a subclass"
    ):
        replace_attention(model, prefix_length=2)
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    replace_attention(model, prefix_length=2, layers=[0, 1])


def test_nothing_heavy_is_loaded() -> None:
    code = "import sys, qtuning_fast; print(sorted({'transformers', 'timm', 'torchvision'} & set(sys.modules)))"
    code += "; qtuning_fast.replace_attention, qtuning_fast.PrefixMultiheadAttention"
    code += "; print(sorted({'transformers', 'timm', 'torchvision'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.split() == ["[]", "[]"]
