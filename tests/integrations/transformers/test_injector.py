"""The attention layers of a frozen model, and what is placed on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CTRLConfig, CTRLLMHeadModel

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.integrations.transformers import PrefixInjector
from qtuning_fast.method.prefix import Prefix

SMALL = {"prompt_length": 2, "queue_size": 2, "shared_length": 1, "reparameterization": None}


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(TypeError, match="base_model"):
        QTuningModel(torch.nn.Linear(2, 2), QTuningConfig())  # type: ignore[arg-type]


def test_models_that_scale_embeddings_in_place_leave_the_adapters_alone() -> None:
    torch.manual_seed(0)
    base = CTRLLMHeadModel(CTRLConfig(vocab_size=40, n_embd=32, n_layer=2, n_head=4, dff=48, n_positions=30)).eval()
    model = QTuningModel(base, QTuningConfig(**SMALL, placement="input", task_type="causal-lm"))
    model.start_task("first")
    stored = model.finish_task().embeddings
    assert stored is not None
    before, ids = stored.clone(), torch.randint(5, 40, (2, 6))
    expected = model(input_ids=ids).logits
    model.set_task("first")
    assert torch.equal(stored, before)
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_model_is_attached_to_once_and_given_back(families: Any) -> None:
    base = families["BERT"].base_model().train()
    before = base.config._attn_implementation
    injector = PrefixInjector(base)
    assert base.config._attn_implementation == before and not base.training
    assert not any(parameter.requires_grad for parameter in base.parameters())
    with pytest.raises(ValueError, match="attached already"):
        PrefixInjector(base)
    injector.detach()
    assert base.training and all(parameter.requires_grad for parameter in base.parameters())
    PrefixInjector(base)


def test_what_stood_on_the_layers_stands_there_after_the_block(families: Any) -> None:
    base, ids = families["BERT"].base_model(), torch.arange(5, 12)[None]
    injector = PrefixInjector(base)
    plain = base(input_ids=ids).last_hidden_state
    rows = [{"prefix_key": torch.ones(4, 2, 8), "prefix_value": torch.ones(4, 2, 8), "gate": None}]
    with injector.keeping():
        injector.switch()
        injector.place([1], Prefix(rows))  # type: ignore[arg-type]
        assert injector.placed is not None
        with_prefix = base(input_ids=ids).last_hidden_state
        with injector.keeping():
            injector.restore()
            assert torch.equal(base(input_ids=ids).last_hidden_state, plain)
        assert torch.equal(base(input_ids=ids).last_hidden_state, with_prefix)
    assert injector.placed is None and torch.equal(base(input_ids=ids).last_hidden_state, plain)
    assert not torch.allclose(with_prefix, plain)


def test_whether_gradients_pass_is_tried_and_leaves_no_trace(families: Any) -> None:
    base = families["BERT"].base_model()
    injector = PrefixInjector(base)
    assert injector.passes_gradient([0, 1])
    base.encoder.layer[1].register_forward_hook(lambda module, args, output: output.detach())
    assert not injector.passes_gradient([0]) and injector.placed is None
