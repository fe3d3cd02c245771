"""Base models that are not plain: with LoRA by peft, with quantised weights, with weights that are elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.integrations.transformers import without_head
from qtuning_fast.model.fingerprint import fingerprint

SMALL = {"prompt_length": 2, "queue_size": 2, "shared_length": 1, "reparameterization": None}
NAMES = ["BERT", "Llama"]
TARGETS = {"BERT": ["query", "value"], "Llama": ["q_proj", "v_proj"]}

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore:.*quantized tensor creation",
    "ignore:.*an autograd kernel was not registered",
)


@pytest.fixture(params=NAMES)
def plain(request: pytest.FixtureRequest, families: Any) -> Any:
    return families[request.param]


def attach(family: Any, base: Any, **changes: Any) -> QTuningModel:
    torch.manual_seed(0)
    return QTuningModel(base, QTuningConfig(**(SMALL | {"task_type": family.task_type} | changes)))


def step(model: QTuningModel, family: Any) -> Tensor:
    """One step of training without the update: gradients, and the logits `[..., classes or words]`."""
    torch.manual_seed(1)
    if model.learning.task is None:
        model.start_task("reviews", 3)
    model.train()
    logits = model(**family.batch()).logits
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * cotangent).sum().backward()
    return logits.detach()


def gradients(model: QTuningModel) -> list[Tensor]:
    found = [parameter.grad for parameter in model.training_prefix.parameters() if parameter.requires_grad]
    assert all(gradient is not None for gradient in found)
    return found


def same_as(model: QTuningModel, other: QTuningModel, family: Any) -> None:
    """Both models answer the same and their prompts get the same gradients."""
    torch.testing.assert_close(step(model, family), step(other, family), atol=1e-5, rtol=0)
    for mine, theirs in zip(gradients(model), gradients(other)):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def saved_and_loaded(model: QTuningModel, family: Any, folder: Path) -> QTuningModel:
    """The model after `save_pretrained` and `from_pretrained`; its answers must not have changed."""
    model.eval()
    model.finish_task()
    answers = []
    for _ in range(2):
        model.set_task("reviews")
        with torch.no_grad():
            answers.append(model(**family.batch()).logits)
        if len(answers) == 1:
            model.save_pretrained(folder)
            model = QTuningModel.from_pretrained(model.detach(), folder)
    assert torch.equal(*answers)
    return model


def mark(base: Any) -> str:
    return fingerprint(without_head(base))


# LoRA


def lora(family: Any, base: Any, **settings: Any) -> Any:
    """A copy of the base model in peft's wrapper, with LoRA at random in its queries and values."""
    peft = pytest.importorskip("peft")
    settings = {"target_modules": TARGETS[family.name], "r": 2, "lora_alpha": 6, "lora_dropout": 0.5} | settings
    wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings)).eval()
    randomize_lora(wrapped)
    return wrapped


def add_adapter(base: Any, settings: Any) -> None:
    """By transformers; by peft itself, as transformers would, where this transformers asks for a newer peft."""
    try:
        base.add_adapter(settings)
    except ValueError as error:
        assert "version of PEFT" in str(error)
        pytest.importorskip("peft").inject_adapter_in_model(settings, base)


def randomize_lora(model: nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for each, parameter in model.named_parameters():
            if "lora_" in each:
                nn.init.normal_(parameter, std=0.3)


def merged_by_hand(family: Any, base: Any, wrapped: Any) -> Any:
    """W + scale · B A."""
    merged, weights = copy.deepcopy(base), dict(wrapped.get_base_model().named_parameters())
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            layer = name.removesuffix(".weight")
            if f"{layer}.lora_A.default.weight" in weights:
                A, B = (weights[f"{layer}.lora_{each}.default.weight"] for each in "AB")
                parameter += 3.0 * B @ A
    return merged


@pytest.mark.parametrize("how", ["PeftModel", "add_adapter"])
def test_prompts_train_beside_a_frozen_lora(how: str, plain: Any, tmp_path: Path) -> None:
    base = plain.base_model()
    wrapped = lora(plain, base)
    reference = attach(plain, merged_by_hand(plain, base, wrapped))
    given = wrapped
    if how == "add_adapter":
        given = copy.deepcopy(base)
        add_adapter(given, wrapped.peft_config["default"])
        randomize_lora(given)
    required = [parameter.requires_grad for parameter in given.parameters()]
    model = attach(plain, given)
    same_as(model, reference, plain)  # in training mode, so LoRA's dropout is off
    assert all(parameter.grad is None for parameter in model.base_model.parameters())
    model = saved_and_loaded(model, plain, tmp_path)
    assert model.detach() is given
    assert [parameter.requires_grad for parameter in given.parameters()] == required
    with pytest.raises(ValueError, match="was made for another base model"):
        QTuningModel.from_pretrained(base, tmp_path)


def test_lora_may_train_with_the_prompts(plain: Any) -> None:
    given = lora(plain, plain.base_model(), lora_dropout=0.0)
    model = attach(plain, given)
    weights = {name: p for name, p in model.base_model.named_parameters() if "lora_" in name}
    for parameter in weights.values():
        parameter.requires_grad_(True)
    before = step(model, plain)
    assert gradients(model) and all(p.grad.abs().max() > 0 for p in weights.values())
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    assert not torch.allclose(step(model, plain), before)
    model.detach()
    assert {name for name, p in given.named_parameters() if p.requires_grad} == {
        name for name, _ in given.named_parameters() if "lora_" in name
    }


# Quantised weights


class Int8Linear(nn.Module):
    """A Linear whose weight is int8 with a scale for each output, as buffers or as a parameter without gradient."""

    def __init__(self, linear: nn.Linear, *, as_parameter: bool) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        weight = (linear.weight.detach() / scale).round().to(torch.int8)
        if as_parameter:
            self.weight = nn.Parameter(weight, requires_grad=False)
        else:
            self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x) * self.scale, self.bias)


def quantised(base: Any, replace: Callable[[nn.Linear], nn.Module]) -> Any:
    for name, module in list(base.named_modules()):
        if type(module) is nn.Linear and "head" not in name:
            base.set_submodule(name, replace(module))
    return base


@pytest.mark.parametrize("as_parameter", [False, True])
def test_prompts_train_under_int8_weights(as_parameter: bool, plain: Any, tmp_path: Path) -> None:
    base = plain.base_model()
    given = quantised(copy.deepcopy(base), lambda linear: Int8Linear(linear, as_parameter=as_parameter))
    reference = copy.deepcopy(base)
    for name, module in given.named_modules():
        if isinstance(module, Int8Linear):
            reference.get_submodule(name).weight.data = module.weight * module.scale
    model = attach(plain, given)
    same_as(model, attach(plain, reference), plain)
    model = saved_and_loaded(model, plain, tmp_path)
    assert mark(base) != mark(model.base_model)
    first = next(module for module in model.base_model.modules() if isinstance(module, Int8Linear))
    first.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="was made for another base model"):
        QTuningModel.from_pretrained(model.detach(), tmp_path)


def by_torchao(base: Any) -> Any:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(base, torchao.Int8WeightOnlyConfig())
    return base


def by_quanto(base: Any) -> Any:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(base, weights=quanto.qint8)
    quanto.freeze(base)
    return base


def by_bitsandbytes(base: Any) -> Any:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def int8(linear: nn.Linear) -> nn.Module:
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        replaced = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        replaced.load_state_dict(linear.state_dict())
        return replaced

    return quantised(base, int8).requires_grad_(False).to("cpu")


@pytest.mark.parametrize("library", [by_torchao, by_quanto, by_bitsandbytes])
def test_prompts_train_under_weights_quantised_by(library: Callable[[Any], Any], plain: Any, tmp_path: Path) -> None:
    base = plain.base_model()
    given = library(copy.deepcopy(base))
    model = attach(plain, given)
    step(model, plain)
    assert all(gradient.abs().max() > 0 for gradient in gradients(model)[:2])
    model = saved_and_loaded(model, plain, tmp_path)
    assert mark(model.base_model) != mark(base)


def test_layers_that_pass_no_gradient_are_named_before_anything_trains(plain: Any, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    base = quantization.quantize_dynamic(plain.base_model(), {nn.Linear}, torch.qint8)
    assert mark(base) != mark(plain.base_model())
    model = attach(plain, base)
    model.save_pretrained(tmp_path)
    model = QTuningModel.from_pretrained(model.detach(), tmp_path)
    with pytest.raises(RuntimeError, match="no gradient reaches the prompts"):
        model.start_task("reviews", 3)
    assert model.tasks == [] and model.base_model.config._attn_implementation != "qtuning_fast"

    # What was learned with the weights as they were can be used.
    learned = attach(plain, plain.base_model())
    step(learned, plain)
    learned.eval()
    model.add_task(learned.finish_task())
    answers = []
    for each in (learned, model):
        each.set_task("reviews")
        with torch.no_grad():
            answers.append(each(**plain.batch()).logits)
    torch.testing.assert_close(*answers, atol=1.0, rtol=0.1)


# Weights that are elsewhere


@pytest.fixture(params=["cpu", "disk", "map"])
def offloaded(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Any], Any]:
    """Sends the weights of a model away, all of them or those of some modules."""
    accelerate = pytest.importorskip("accelerate")

    def offload(base: Any) -> Any:
        cpu = torch.device("cpu")
        if request.param == "cpu":
            return accelerate.cpu_offload(base, execution_device=cpu)
        if request.param == "disk":
            return accelerate.disk_offload(base, str(tmp_path / "weights"), execution_device=cpu)
        places = ["disk", "cpu", "cpu", "disk", "cpu", "disk", "cpu"]
        parts = [name for name, _ in without_head(base).named_children()]
        prefix = "" if without_head(base) is base else f"{base.base_model_prefix}."
        device_map = {f"{prefix}{part}": place for part, place in zip(parts, places)}
        device_map |= {name: "cpu" for name, _ in base.named_children() if prefix and f"{name}." != prefix}
        return accelerate.dispatch_model(base, device_map, offload_dir=str(tmp_path / "weights"), force_hooks=True)

    return offload


@pytest.mark.parametrize("placement", ["prefix", "input"])
def test_prompts_train_while_weights_are_elsewhere(
    placement: str, offloaded: Callable[[Any], Any], plain: Any, tmp_path: Path
) -> None:
    base = plain.base_model()
    given = offloaded(copy.deepcopy(base))
    assert any(parameter.is_meta for parameter in given.parameters())
    model = attach(plain, given, placement=placement)
    assert getattr(model, "hf_device_map", None) == getattr(given, "hf_device_map", None)
    same_as(model, attach(plain, base, placement=placement), plain)
    model = saved_and_loaded(model, plain, tmp_path / "saved")
    assert mark(given) == mark(base)
    assert model.detach() is given
    assert all(parameter.requires_grad for parameter in given.parameters())
