"""peft's prefix and prompt tuning in every family: the same logits here, there, and after a conversion either way."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.integrations.peft import adapter_from_peft, adapter_to_peft
from qtuning_fast.method.adapter import TaskAdapter

peft = pytest.importorskip("peft")

P = 3
EXACT = {"atol": 1e-5, "rtol": 0}
TASK_TYPES = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}

# Families in which peft (0.21) cannot do prefix tuning, and what it says; for encoder-decoders see the test below.
PREFIX_FAILS = {
    "DistilBERT": "must match the size",  # past_key_values are taken as an option that no one reads
    "ModernBERT": "must match the size",
    "ViT": "vocab_size",  # peft looks for the embedding of words
    "DINOv2": "vocab_size",
    "DeiT": "vocab_size",
    "CLIP vision tower": "vocab_size",
}
STACKS = ("T5", "mT5", "BART")


@pytest.fixture
def roomy(family: Any) -> Any:
    """The family with windows that no token of the tests falls out of."""
    config = copy.deepcopy(family.config)
    for window in ("sliding_window", "local_attention"):
        if getattr(config, window, None):
            setattr(config, window, 64)
    for layers in ("num_decoder_layers", "decoder_layers"):
        if hasattr(config, layers):
            setattr(config, layers, 2)  # peft knows one number of layers
    return dataclasses.replace(family, config=config)


pytestmark = pytest.mark.filterwarnings("ignore:.*sliding window", "ignore:.*bias is not supported:UserWarning")


def with_prefix(family: Any, base: Any, **settings: Any) -> Any:
    """peft's own model, on a copy of the base model, with a prefix at random."""
    reference = copy.deepcopy(base)
    reference.set_attn_implementation("eager")
    task_type = TASK_TYPES.get(family.kind, "FEATURE_EXTRACTION")
    if family.name == "DistilBERT":
        settings |= {"token_dim": 32, "num_attention_heads": 4, "num_layers": 2}
    config = peft.PrefixTuningConfig(task_type=task_type, num_virtual_tokens=P, **settings)
    adapted = peft.get_peft_model(reference, config).eval()
    randomize(adapted.prompt_encoder)
    return adapted


def with_prompt(family: Any, base: Any, kind: str = "PROMPT_TUNING") -> Any:
    reference = copy.deepcopy(base)
    reference.set_attn_implementation("eager")
    settings = {"task_type": TASK_TYPES.get(family.kind, "FEATURE_EXTRACTION"), "num_virtual_tokens": P}
    settings["token_dim"] = base.get_input_embeddings().embedding_dim  # not the hidden size in ELECTRA
    if family.name == "DistilBERT":
        settings |= {"num_attention_heads": 4, "num_layers": 2}
    config = peft.PromptTuningConfig(**settings)
    if kind == "P_TUNING":
        config = peft.PromptEncoderConfig(**settings, encoder_hidden_size=16)
    adapted = peft.get_peft_model(reference, config).eval()
    randomize(adapted.prompt_encoder)
    return adapted


def batch(family: Any) -> dict[str, Tensor]:
    """The family's batch with padding behind the tokens, because peft counts padding in front as positions."""
    inputs = family.batch()
    if family.kind != "decoder":
        return inputs
    padding = int((inputs["attention_mask"][0] == 0).sum())
    return {name: torch.cat([x[:1].roll(-padding, 1), x[1:]]) for name, x in inputs.items()}


def randomize(module: nn.Module) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            nn.init.normal_(parameter)


def attached(family: Any, base: Any, *adapters: TaskAdapter, **changes: Any) -> QTuningModel:
    settings = {"gate": None, "prompt_length": P, "queue_size": 1, "shared_length": 0, "task_type": family.task_type}
    model = QTuningModel(base, QTuningConfig(**(settings | {"reparameterization": None} | changes)))
    for adapter in adapters:
        model.add_task(adapter)
    return model


@torch.no_grad()
def answer(model: Any, family: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What a model says at the tokens: `[tokens, ...]`, without a prompt in front of them."""
    output = model(**inputs)
    hidden = output.last_hidden_state if "last_hidden_state" in output else output.logits
    if family.kind == "encoder-decoder":
        return hidden
    mask = inputs["attention_mask"].bool()
    return hidden[:, hidden.shape[1] - mask.shape[1] :][mask]


def under(model: QTuningModel, task: str | None, family: Any, inputs: dict[str, Tensor]) -> Tensor:
    model.set_task(task)
    return answer(model.base_model, family, inputs)


# Prefix tuning


def test_a_prefix_of_peft_gives_the_same_logits_here_and_back_in_peft(
    roomy: Any, computed: Any, tmp_path: Path
) -> None:
    base, inputs = roomy.base_model(), batch(roomy)
    if roomy.name in STACKS:
        pytest.skip("refused, see below")
    if roomy.name in PREFIX_FAILS:
        with pytest.raises(Exception, match=PREFIX_FAILS[roomy.name]):
            with_prefix(roomy, base)(**inputs)
        rows = (torch.zeros(4, P, 8),) * 2
        adapter = TaskAdapter("reviews", (), rows, rows, None, (), (), None, None, position_shift=P)
        with pytest.raises(NotImplementedError, match="takes no cache of keys and values"):
            adapter_to_peft(adapter, base, tmp_path)
        return
    reference = with_prefix(roomy, base)
    expected = answer(computed(reference, inputs), roomy, inputs)
    adapter = adapter_from_peft(reference, "reviews")
    assert (adapter.gate, adapter.prefix_rows, adapter.position_shift) == (None, P, P)
    model = attached(roomy, base, adapter)
    assert not torch.allclose(under(model, None, roomy, inputs), expected, atol=0.1)
    torch.testing.assert_close(under(model, "reviews", roomy, inputs), expected, **EXACT)

    base = model.detach()
    adapter_to_peft(adapter, base, tmp_path / "adapter")
    again = adapter_from_peft(tmp_path / "adapter", "reviews", base_model=base)
    for mine, theirs in zip(adapter.tensors().values(), again.tensors().values()):
        assert torch.equal(mine, theirs)
    base.set_attn_implementation("eager")
    back = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(answer(computed(back, inputs), roomy, inputs), expected, **EXACT)
    torch.testing.assert_close(adapter_from_peft(back, "reviews").keys, adapter.keys, atol=0, rtol=0)


def test_without_a_gate_a_live_prefix_is_prefix_tuning_by_peft(roomy: Any, computed: Any) -> None:
    if roomy.name in PREFIX_FAILS or roomy.name in STACKS:
        pytest.skip("peft has no prefix tuning for it, or a different one")
    base, inputs = roomy.base_model(), batch(roomy)
    reference = with_prefix(roomy, base)
    weight = reference.prompt_encoder["default"].embedding.weight
    model = attached(roomy, base)
    model.start_task("reviews", 2)
    prompts = weight.detach().view(P, len(model.training_prefix.rows), -1)
    for layer, rows in enumerate(model.training_prefix.rows):
        rows.prompt = nn.Parameter(prompts[:, layer].clone())
    model.set_task("reviews")
    positions = model.backbone.injector.positions.own(inputs) + P  # peft counts the prefix
    mask, answers, gradients = inputs["attention_mask"].bool(), [], []
    for module, changes in ((computed(reference, inputs), {}), (model.base_model, {"position_ids": positions})):
        output = module(**inputs, **changes)
        answers.append((output.logits if roomy.kind == "decoder" else output.last_hidden_state)[mask])
    torch.testing.assert_close(answers[1], answers[0], **EXACT)
    cotangent = torch.randn(answers[0].shape, generator=torch.Generator().manual_seed(3))
    for result, parameters in zip(answers, ([weight], [rows.prompt for rows in model.training_prefix.rows])):
        gradients.append(torch.autograd.grad((result * cotangent).sum(), parameters))
    theirs, mine = gradients[0][0], torch.stack(gradients[1], dim=1).view_as(weight)
    assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", STACKS)
def test_a_prefix_of_peft_in_an_encoder_decoder_is_refused(name: str, families: Any, tmp_path: Path) -> None:
    # It is in the decoder's self-attention, and where peft runs at all it asks for as many layers in either stack.
    family = families[name]
    base = family.base_model()
    reference = with_prefix(family, base)
    with pytest.raises(NotImplementedError, match="decoder's self-attention"):
        adapter_from_peft(reference, "reviews")
    rows = (torch.zeros(4, P, 8),) * 2
    adapter = TaskAdapter("reviews", (), rows, rows, None, (), (), None, None, position_shift=P)
    with pytest.raises(NotImplementedError, match="decoder's self-attention"):
        adapter_to_peft(adapter, base, tmp_path)


@pytest.mark.parametrize("name", ["Mistral", "Gemma 3"])
def test_a_window_that_hides_the_prefix_from_peft_is_named(name: str, families: Any, computed: Any) -> None:
    family = families[name]
    base, inputs = family.base_model(), batch(family)
    reference = with_prefix(family, base)
    with pytest.warns(UserWarning, match="sliding window of 4 tokens.*inputs of up to 1 tokens"):
        adapter = adapter_from_peft(reference, "reviews")
    model, theirs = attached(family, base, adapter), computed(reference, inputs)
    first = {name: tensor[1:, :1] for name, tensor in inputs.items()}
    torch.testing.assert_close(under(model, "reviews", family, first), answer(theirs, family, first), **EXACT)
    full = under(model, "reviews", family, inputs)
    assert not torch.allclose(full, answer(theirs, family, inputs), atol=0.1)


@pytest.mark.parametrize("name", ["BERT", "Llama"])
def test_a_projection_is_folded(name: str, families: Any, computed: Any, tmp_path: Path) -> None:
    family = families[name]
    base, inputs = family.base_model(), batch(family)
    reference = with_prefix(family, base, prefix_projection=True, encoder_hidden_size=16)
    reference.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    model = attached(
        family,
        base,
        adapter_from_peft(reference, "trained"),
        adapter_from_peft(tmp_path, "saved", base_model=base),
        adapter_from_peft(loaded, "loaded", peft_name="default"),
    )
    expected = answer(computed(reference, inputs), family, inputs)
    for task in model.tasks:
        torch.testing.assert_close(under(model, task, family, inputs), expected, **EXACT)


# Prompt tuning


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING"])
def test_a_prompt_of_peft_gives_the_same_logits_here_and_back_in_peft(kind: str, roomy: Any, tmp_path: Path) -> None:
    if roomy.kind == "image":
        pytest.skip("peft's prompts stand in front of words")
    base, inputs = roomy.base_model(), batch(roomy)
    if roomy.name in ("T5", "mT5"):
        base.double()  # in float32 their unscaled scores round by more than 1e-5
    reference = with_prompt(roomy, base, kind)
    expected = answer(reference, roomy, inputs)
    adapter = adapter_from_peft(reference, "reviews")
    assert (adapter.keys, adapter.prefix_rows, adapter.position_shift) == ((), P, 0)
    model = attached(roomy, base, adapter, placement="input")
    torch.testing.assert_close(under(model, "reviews", roomy, inputs), expected, **EXACT)

    base = model.detach()
    adapter_to_peft(adapter, base, tmp_path)
    assert torch.equal(adapter_from_peft(tmp_path, "reviews", base_model=base).embeddings, adapter.embeddings)
    base.set_attn_implementation("eager")
    back = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(answer(back, roomy, inputs), expected, **EXACT)


# Beside tasks of ours


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama"])
def test_a_converted_adapter_works_beside_one_with_a_gate(
    name: str, families: Any, computed: Any, tmp_path: Path
) -> None:
    family = families[name]
    base, inputs = family.base_model(), batch(family)
    reference = with_prefix(family, base)
    head = nn.Linear(32, 2) if family.kind == "encoder" else None
    adapter = adapter_from_peft(reference, "theirs", head=head, label_names=["no", "yes"] if head else [])
    model = attached(family, base, gate="tanh", prompt_length=5, shared_length=2)
    model.start_task("ours", 3)
    randomize(model.training_prefix)
    model.finish_task()
    model.add_task(adapter)
    expected = answer(computed(reference, inputs), family, inputs)
    torch.testing.assert_close(under(model, "theirs", family, inputs), expected, **EXACT)
    names = ["ours", "theirs", "ours"]
    for _ in range(2):
        with torch.no_grad():
            mixed = model(**inputs, task_names=names).logits
        for row, task in enumerate(names):
            model.set_task(task)
            with torch.no_grad():
                alone = model(**inputs).logits[row]
            seen = inputs["attention_mask"][row].bool() if family.kind == "decoder" else slice(alone.shape[0])
            torch.testing.assert_close(mixed[row][seen], alone[seen], **EXACT)
        model.save_pretrained(tmp_path)
        model = QTuningModel.from_pretrained(model.detach(), tmp_path)
    assert model.adapters["theirs"].position_shift == P


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "OPT", "GPT-NeoX"])
def test_generation_goes_on_as_the_forward_pass_of_peft_says(name: str, families: Any, computed: Any) -> None:
    family = families[name]
    base = family.base_model()
    reference = with_prefix(family, base)
    theirs = computed(reference, batch(family))
    model = attached(family, base, adapter_from_peft(reference, "theirs"))
    model.set_task("theirs")
    ids = batch(family)["input_ids"][1:]
    words = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    for _ in range(6):  # one word more each time, without a cache
        with torch.no_grad():
            scores = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
        scores[:, 3] = -torch.inf  # the end, which generation was told not to come to
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(words, ids)


def test_the_head_of_peft_stays_with_the_base_model(families: Any, computed: Any, tmp_path: Path) -> None:
    family = families["BERT"]
    torch.manual_seed(0)
    base = BertForSequenceClassification(copy.deepcopy(family.config)).eval()
    inputs = batch(family)
    settings = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P)
    reference = peft.get_peft_model(copy.deepcopy(base), settings).eval()
    randomize(reference.prompt_encoder)
    reference.save_pretrained(tmp_path)
    base.classifier.load_state_dict(reference.get_base_model().classifier.modules_to_save["default"].state_dict())
    model = attached(family, base, adapter_from_peft(tmp_path, "reviews", base_model=base))
    model.set_task("reviews")
    with torch.no_grad():
        expected = computed(reference, inputs)(**inputs).logits
        torch.testing.assert_close(model.base_model(**inputs).logits, expected, **EXACT)
    with pytest.raises(RuntimeError, match="'reviews' has no head"):
        model(**inputs)
    assert model.features(inputs, task="reviews").shape == (3, 32)
    adapter_to_peft(model.adapters["reviews"], base, tmp_path / "back")
    back = peft.PeftModel.from_pretrained(model.detach(), tmp_path / "back").eval()
    with torch.no_grad():
        torch.testing.assert_close(computed(back, inputs)(**inputs).logits, expected, **EXACT)


# What is refused


def an_adapter(**changes: Any) -> TaskAdapter:
    rows = (torch.zeros(4, P, 8),) * 2
    return dataclasses.replace(TaskAdapter("a", (), rows, rows, None, (), (), None, None, position_shift=P), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "tanh", "alphas": (torch.ones(()),) * 2, "taus": (torch.ones(()),) * 2}, "'a' has the gate 'tanh'"),
        ({"keys": (torch.zeros(4, 0, 8),) * 2, "values": (torch.zeros(4, 0, 8),) * 2}, "'a' has no rows"),
        ({"position_shift": 0}, "position_shift=0, but peft shifts positions by the 3 rows"),
        ({"keys": (torch.zeros(4, P, 8),), "values": (torch.zeros(4, P, 8),)}, "in 1 layers; peft needs one in all 2"),
        ({"values": (torch.zeros(4, P, 6),) * 2}, r"shapes \[\(4, 3, 6\), \(4, 3, 8\)\]"),
    ],
)
def test_what_peft_cannot_compute_is_refused(
    changes: dict[str, Any], message: str, families: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        adapter_to_peft(an_adapter(**changes), families["BERT"].base_model(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_what_cannot_be_converted_is_refused(families: Any, tmp_path: Path) -> None:
    base = families["BERT"].base_model()
    lora = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["query"]))
    prefix = with_prefix(families["BERT"], base)
    with pytest.raises(ValueError, match="of type LORA is no prefix"):
        adapter_from_peft(lora, "reviews")
    with pytest.raises(ValueError, match="peft_name is 'other'; the model has the adapters default"):
        adapter_from_peft(prefix, "reviews", peft_name="other")
    with pytest.raises(ValueError, match="label_names has 1 names, but the head has 2 classes"):
        adapter_from_peft(prefix, "reviews", head=nn.Linear(32, 2), label_names=["yes"])
    with pytest.raises(TypeError, match="source is a BertModel"):
        adapter_from_peft(base, "reviews")
    with pytest.raises(TypeError, match="base_model is None; with a folder"):
        adapter_from_peft(tmp_path, "reviews")
    with pytest.raises(ValueError, match=r"holds no adapter_config\.json"):
        adapter_from_peft(tmp_path, "reviews", base_model=base)
    prefix.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no adapter_model\.safetensors"):
        adapter_from_peft(tmp_path, "reviews", base_model=base)
    with pytest.raises(ValueError, match=r"'default' holds prompts \(PREFIX_TUNING\); attach to its get_base_model"):
        QTuningModel(prefix, QTuningConfig())
