"""Tiny language models and toy tasks for the study of language models."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from qtuning_fast.bench.language.arms import MODELS
from qtuning_fast.lifelong.base_models import load_base_model
from qtuning_fast.lifelong.data.encoding import ExampleEncoder
from qtuning_fast.lifelong.tasks import Examples, Task

SPECIAL = ["<pad>", "</s>", "<unk>"]
WORDS = ["red", "green", "blue", "cat", "dog", "the", "a", "is", "was", "old", "new", "very", "it"]
LENGTH = 12
"""Tokens a text is cut to."""


def _tokenizer(*, decoder: bool) -> PreTrainedTokenizerFast:
    """Whole words; those of an encoder's input end with </s>. A decoder's has no padding."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "eos_token": "</s>"}
    if not decoder:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        special["pad_token"] = "<pad>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="session")
def language_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder of a tiny model in place of each of the study's."""
    folder = tmp_path_factory.mktemp("language")
    ids: dict[str, Any] = {"vocab_size": len(SPECIAL) + len(WORDS), "eos_token_id": 1}
    torch.manual_seed(1)
    llama = LlamaConfig(
        **ids,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=48,
        pad_token_id=None,
        max_position_embeddings=400,
        initializer_range=0.3,
    )
    # As in flan-t5-small, the heads together are not as wide as the model.
    t5 = T5Config(
        **ids, d_model=32, d_kv=6, num_layers=2, num_heads=4, d_ff=48, pad_token_id=0, decoder_start_token_id=0
    )
    made: dict[str, Any] = {"smollm2": LlamaForCausalLM(llama), "flan-t5": T5ForConditionalGeneration(t5)}
    with torch.no_grad():
        for parameter in made["flan-t5"].parameters():
            if parameter.ndim > 1:  # weights large enough for prompts to make a difference
                parameter.add_(torch.randn_like(parameter) * 0.2)
    for name, model in made.items():
        model.save_pretrained(folder / name)
        _tokenizer(decoder=MODELS[name].task_type == "causal-lm").save_pretrained(folder / name)
    return {name: str(folder / name) for name in made}


Loaded = tuple[Any, Any, ExampleEncoder]


@pytest.fixture
def loaded(language_folders: dict[str, str]) -> Callable[[str], Loaded]:
    """Loads one of them by its name in the study: model, tokenizer and encoder."""

    def load(name: str) -> Loaded:
        base, tokenizer = load_base_model(language_folders[name], MODELS[name].task_type)
        return base, tokenizer, ExampleEncoder(tokenizer, MODELS[name].task_type, LENGTH)

    return load


def _task(name: str, labels: dict[str, str], shots: int) -> Task:
    """The last word of a text is its label, or tells it."""
    draw = random.Random(name)
    texts: dict[str, int] = {}
    while len(texts) < 3 * shots * len(labels):  # three splits, whose texts have several lengths
        number = len(texts) % len(labels)
        texts[" ".join([*draw.choices(WORDS[5:], k=draw.randint(2, 8)), list(labels)[number]])] = number
    splits = []
    for start in range(0, len(texts), shots * len(labels)):
        chosen = list(texts)[start : start + shots * len(labels)]
        splits.append(Examples(chosen, [texts[text] for text in chosen]))
    return Task(
        name, list(labels), *splits, source="toys", label_words=list(labels.values()), template="it is {text} it"
    )


@pytest.fixture
def toy_tasks() -> list[Task]:
    """Two tasks; an answer has one word or two."""
    return [
        _task("colours", {"red": "red", "green": "very green"}, 8),
        _task("pets", {"cat": "old cat", "dog": "dog", "blue": "blue"}, 8),
    ]
