"""Every family of models, in both placements, against prefixes put in by hand in eager attention."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Data2VecTextConfig, MPNetConfig, RobertaPreLayerNormConfig, XLMRobertaConfig

from qtuning_fast import QTuningConfig, QTuningModel

SMALL = {"prompt_length": 2, "queue_size": 3, "shared_length": 1, "reparameterization": None}
LABELS = 3


def learned(base: Any, family: Any, **changes: Any) -> QTuningModel:
    """A model in its second task, with old rows in its queue and every parameter somewhere at random."""
    model = QTuningModel(base, QTuningConfig(**(SMALL | {"task_type": family.task_type} | changes)))
    torch.manual_seed(1)
    model.start_task("first", LABELS)
    randomize(model)
    model.finish_task()
    model.start_task("second", LABELS)
    randomize(model)
    return model


def randomize(model: QTuningModel) -> None:
    with torch.no_grad():
        for parameter in model.training_prefix.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)


def weighted_rows(rows: Any) -> Tensor:
    """`[P, F]`, the new rows and the old ones reweighted by W = U V."""
    if not len(rows.old):
        return torch.cat([rows.shared, rows.prompt])
    pairs = [rows.reweight] if hasattr(rows, "reweight") else [rows.reweight_key, rows.reweight_value]
    weights = [torch.einsum("nr,rhd->nhd", pair.U, pair.V).flatten(1) for pair in pairs]
    return torch.cat([rows.shared, rows.prompt, torch.cat(weights, dim=1) * rows.old])


def put_in_by_hand(model: QTuningModel, base: Any, hand: type) -> Tensor | None:
    """The live prefix on the layers of a copy of the base model; returns the rows that go in front of the input."""
    names = {id(module): name for name, module in model.base_model.named_modules()}
    modules = [base.get_submodule(names[id(model.backbone.injector.layers[i].module)]) for i in model.layer_indices]
    gates = [{"gate": g.activation, "alpha": g.alpha, "tau": g.tau} for g in model.training_prefix.gates]
    gates = gates or [{}] * len(modules)
    rows = [weighted_rows(each) for each in model.training_prefix.rows]
    if model.qtuning_config.placement == "input":
        for module, gate in zip(modules, gates):
            module.by_hand = hand(tokens=len(rows[0]), **gate)
        return rows[0]
    for i, module, row, gate in zip(model.layer_indices, modules, rows, gates):
        shape = model.backbone.injector.layers[i].shape
        H, D, Dv = shape.num_kv_heads, shape.key_size, shape.value_size
        key, value = row[:, : H * D].view(-1, H, D), row[:, H * D :].view(-1, H, Dv)
        module.by_hand = hand(key=key.transpose(0, 1)[None], value=value.transpose(0, 1)[None], **gate)
    return None


def logits_by_hand(base: Any, family: Any, head: nn.Linear | None, inputs: dict[str, Tensor], rows: Any) -> Tensor:
    """What the model should answer: `[B, ...]`."""
    P = 0 if rows is None else len(rows)
    inputs = dict(inputs)
    if P and family.kind == "image":
        handle = base.embeddings.register_forward_hook(
            lambda module, args, output: torch.cat([rows.expand(len(output), -1, -1), output], dim=1)
        )
    elif P:
        embeds = base.get_input_embeddings()(inputs.pop("input_ids"))
        inputs["inputs_embeds"] = torch.cat([rows.expand(len(embeds), -1, -1), embeds], dim=1)
        inputs["attention_mask"] = F.pad(inputs["attention_mask"], (P, 0), value=1)
    if family.kind == "decoder":  # padding takes no position
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    output = base(**inputs)
    if P and family.kind == "image":
        handle.remove()
    if head is None:
        return output.logits[:, P:] if family.kind == "decoder" else output.logits
    hidden = output.last_hidden_state[:, P:]
    if family.kind == "image":
        pooled = hidden[:, 0]
    else:
        mask = inputs["attention_mask"][:, P:, None]
        pooled = (hidden * mask).sum(1) / mask.sum(1)
    return head(pooled / pooled.square().mean(1, keepdim=True).add(torch.finfo(torch.float32).eps).sqrt())


def of_tokens(logits: Tensor, family: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Without what a decoder says at padding."""
    return logits[inputs["attention_mask"].bool()] if family.kind == "decoder" else logits


def compare(family: Any, by_hand: Any, samples: int = 3, **changes: Any) -> None:
    base, inputs = family.base_model(), family.batch(size=samples)
    eager = copy.deepcopy(base)
    by_hand.compute(eager)
    model = learned(base, family, **changes)
    with torch.no_grad():
        mine = of_tokens(model(**inputs).logits, family, inputs)
    answers, gradients = [mine], []
    parameters = {name: p for name, p in model.training_prefix.named_parameters() if p.requires_grad}
    cotangent = torch.randn(mine.shape, generator=torch.Generator().manual_seed(3)) / mine.numel() ** 0.5
    for ours in (True, False):
        if ours:
            logits = model(**inputs).logits
        else:
            rows = put_in_by_hand(model, eager, by_hand.Hand)
            logits = logits_by_hand(eager, family, model.head, inputs, rows)
        answers.append(of_tokens(logits, family, inputs))
        gradients.append(torch.autograd.grad((answers[-1] * cotangent).sum(), list(parameters.values())))
    assert torch.equal(answers[0], answers[1])  # with and without gradients
    torch.testing.assert_close(answers[1], answers[2], atol=1e-5, rtol=1e-5)
    for name, mine, theirs in zip(parameters, *gradients):
        assert theirs.abs().max() > 0, name
        error = (mine - theirs).abs().max() / theirs.abs().max().clamp(min=1)
        assert error < 1e-5, f"{name}: {error}"


PLACEMENTS = ["prefix", "input"]


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=pytest.mark.native), "composed"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_logits_and_gradients_are_those_of_a_prefix_put_in_by_hand(
    family: Any, by_hand: Any, placement: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "composed" and "soft-capping" in family.note:
        pytest.skip("it does not cap scores")
    monkeypatch.setenv("QTUNING_FAST_BACKEND", backend)
    compare(family, by_hand, placement=placement)


@pytest.mark.parametrize("placement", ["prefix", pytest.param("input", marks=pytest.mark.thorough)])
@pytest.mark.parametrize(
    "name", ["BERT", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("ViT", "T5", "Llama"))]
)
def test_the_fused_kernels_compute_it_too(
    families: Any, by_hand: Any, name: str, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One family of each kind, in Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    monkeypatch.setenv("QTUNING_FAST_BACKEND", "fused")
    compare(families[name], by_hand, samples=1, placement=placement)


# What a user relies on whatever the family


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_after_detach_the_base_model_answers_as_before(family: Any, placement: str) -> None:
    base, inputs = family.base_model(), family.batch()
    state = copy.deepcopy(base.state_dict())

    def answer() -> Tensor:
        with torch.no_grad():
            output = base(**inputs)
        return output.logits if hasattr(output, "logits") else output.last_hidden_state

    expected = answer()
    model = learned(base, family, placement=placement)
    with torch.no_grad():
        model(**inputs)
    model.finish_task()
    model.set_task(None)
    assert torch.equal(answer(), expected)
    model.set_task("first")
    assert model.detach() is base
    assert torch.equal(answer(), expected)
    assert all(torch.equal(value, state[name]) for name, value in base.state_dict().items())
    assert not any(name.startswith("qtuning") for module in base.modules() for name in vars(module))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in base.modules())


def test_placements_of_an_encoder_decoder(by_hand: Any, families: Any) -> None:
    for stack in ("decoder", "both"):
        for name in ("T5", "BART"):
            compare(families[name], by_hand, stack=stack)
    model = learned(families["BART"].base_model(), families["BART"], stack="both")
    assert len(model.layer_indices) == 2 + 3
    chosen = learned(families["T5"].base_model(), families["T5"], stack="decoder", layers=[1])
    assert [chosen.backbone.injector.layers[i].stack for i in chosen.layer_indices] == ["decoder"]


@pytest.mark.parametrize("gate", [None, "sigmoid", "gelu"])
@pytest.mark.parametrize("gate_per", ["layer", "head"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_other_gates(by_hand: Any, families: Any, placement: str, gate_per: str, gate: str | None) -> None:
    for name in ("BERT", "Llama"):
        compare(families[name], by_hand, placement=placement, gate_per=gate_per, gate=gate)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_classifiers_on_text_of_every_kind(by_hand: Any, families: Any, placement: str) -> None:
    """Sequence classification reads an encoder's mean, a decoder's last token and an encoder-decoder's encoder."""
    for name in ("BERT", "Llama", "T5"):
        family = families[name]
        inputs = {key: value for key, value in family.batch().items() if not key.startswith("decoder_")}
        if family.kind == "decoder":  # padding on the left takes no positions, as in generate
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        model = learned(family.base_model(), family, placement=placement, task_type="sequence-classification")
        assert model(**inputs).logits.shape == (3, LABELS)
        turned = {key: value.flip(0) for key, value in inputs.items()}
        torch.testing.assert_close(model(**turned).logits, model(**inputs).logits.flip(0))
        bare = {"input_ids": inputs["input_ids"][:1, inputs["attention_mask"][0].bool()]}
        torch.testing.assert_close(model(**bare).logits, model(**inputs).logits[:1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "GPT-2", "OPT", "BART"])
def test_prompts_that_leave_too_few_positions_are_refused_with_the_number(families: Any, name: str) -> None:
    family = copy.deepcopy(families[name])
    family.config.max_position_embeddings = longest = 20
    if name == "RoBERTa":
        longest -= 2
    model = learned(family.base_model(), family, placement="input")
    for tokens, fits in ((longest - 5, True), (longest - 4, False)):
        inputs = {"input_ids": torch.full((1, tokens), 7)}
        if family.kind == "encoder-decoder":
            inputs["decoder_input_ids"] = inputs["input_ids"][:, :2]
        if fits:
            model(**inputs)
        else:
            with pytest.raises(ValueError, match=rf"{tokens} tokens and the prompt takes 5 positions.* has {longest} "):
                model(**inputs)


@pytest.mark.parametrize("config", [Data2VecTextConfig, RobertaPreLayerNormConfig, MPNetConfig, XLMRobertaConfig])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_families_outside_the_registry_are_known_by_what_they_do(
    families: Any, by_hand: Any, placement: str, config: type
) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = {"intermediate_size": 48, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    family = replace(families["BERT"], name=config.__name__, config=config(**sizes, **words))
    if config is MPNetConfig:  # it computes attention itself
        with pytest.raises(NotImplementedError, match="MPNetModel"):
            learned(family.base_model(), family, placement=placement)
    else:
        compare(family, by_hand, placement=placement)
