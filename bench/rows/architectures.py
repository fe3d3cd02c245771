"""Whole models in their real sizes, with random weights, on which speed does not depend. Nothing is downloaded."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import transformers
from torch import Tensor
from transformers import BertConfig, LlamaConfig, PretrainedConfig, PreTrainedModel, T5Config, ViTConfig

from qtuning_fast import QTuningConfig

DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
FIRST_WORD = 5  # of a vocabulary; before it stand special tokens


@dataclass(frozen=True)
class Family:
    """What models of one kind share."""

    auto: str  # transformers' class
    task_type: str
    peft_task_type: str  # empty: peft has none
    lowest_attention: str  # the module within the model below its head


@dataclass(frozen=True)
class Model:
    """A model, and what one step of training reads; of images, a token is a patch or the class token."""

    name: str
    of: str  # what it stands for
    family: Family
    config: Callable[[], PretrainedConfig]
    batch: int
    tokens: int
    answer: int = 0  # tokens that an encoder-decoder learns to write

    @property
    def tokens_a_step(self) -> int:
        return self.batch * (self.tokens + self.answer)

    @property
    def rows(self) -> int:
        """Rows of the prefix when the queue is full."""
        return QTuningConfig().longest_prompt


BERT = Family(
    "AutoModelForSequenceClassification", "sequence-classification", "SEQ_CLS", "encoder.layer.0.attention.self"
)
T5 = Family("AutoModelForSeq2SeqLM", "text-to-text", "SEQ_2_SEQ_LM", "encoder.block.0.layer.0.SelfAttention")
LLAMA = Family("AutoModelForCausalLM", "causal-lm", "CAUSAL_LM", "layers.0.self_attn")

VIT = Family("AutoModelForImageClassification", "image-classification", "", "layers.0.attention")


def bert(hidden: int, layers: int, heads: int, vocabulary: int = 30522) -> BertConfig:
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def t5(hidden: int, layers: int, heads: int, vocabulary: int = 32128) -> T5Config:
    return T5Config(
        vocab_size=vocabulary,
        d_model=hidden,
        d_kv=hidden // heads,
        d_ff=4 * hidden,
        num_layers=layers,
        num_heads=heads,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        use_cache=False,
    )


def llama(hidden: int, layers: int, heads: tuple[int, int], intermediate: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        intermediate_size=intermediate,
        tie_word_embeddings=True,
        use_cache=False,
    )


def vit(hidden: int, layers: int, heads: int, image: int, patch: int) -> ViTConfig:
    return ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        image_size=image,
        patch_size=patch,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


ON_GPU = (
    Model("bert-base", "BERT-base", BERT, partial(bert, 768, 12, 12), batch=32, tokens=128),
    Model("t5-base", "T5-base", T5, partial(t5, 768, 12, 12), batch=16, tokens=512, answer=128),
    Model("llama-1b", "Llama-3.2-1B", LLAMA, partial(llama, 2048, 16, (32, 8), 8192, 128256), batch=4, tokens=1024),
    Model("vit-b16", "ViT-B/16", VIT, partial(vit, 768, 12, 12, 224, 16), batch=64, tokens=197),
)
ON_CPU = (
    Model("bert-cpu", "BERT, of MiniLM's size", BERT, partial(bert, 384, 6, 12), batch=16, tokens=128),
    Model("t5-cpu", "T5, smaller than T5-small", T5, partial(t5, 256, 4, 4), batch=8, tokens=256, answer=32),
    Model("llama-cpu", "Llama, small", LLAMA, partial(llama, 384, 4, (12, 4), 1024, 8192), batch=2, tokens=512),
    Model("vit-cpu", "ViT, of DINOv2-small's size", VIT, partial(vit, 384, 12, 6, 112, 14), batch=16, tokens=65),
)
TINY = (
    Model("bert-tiny", "BERT, to try", BERT, partial(bert, 32, 2, 2, 64), batch=2, tokens=12),
    Model("t5-tiny", "T5, to try", T5, partial(t5, 32, 2, 2, 64), batch=2, tokens=12, answer=4),
    Model("llama-tiny", "Llama, to try", LLAMA, partial(llama, 64, 2, (4, 2), 48, 64), batch=2, tokens=12),
    Model("vit-tiny", "ViT, to try", VIT, partial(vit, 32, 2, 2, 32, 8), batch=2, tokens=17),
)
MODELS = {model.name: model for model in (*ON_GPU, *ON_CPU, *TINY)}


def base_model(model: Model, device: str) -> PreTrainedModel:
    """A model with random weights and PyTorch's own attention."""
    transformers.logging.set_verbosity_error()  # it tells at length of settings for generation
    torch.manual_seed(0)
    auto = getattr(transformers, model.family.auto)
    with torch.device(device):
        return auto.from_config(model.config(), dtype=DTYPE[device], attn_implementation="sdpa").eval()


def random_batch(model: Model, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def words(length: int) -> Tensor:
        return torch.randint(FIRST_WORD, model.config().vocab_size, (model.batch, length), generator=generator)

    if model.family is VIT:
        size = model.config().image_size
        pixels = torch.randn(model.batch, 3, size, size, generator=generator)
        batch = {"pixel_values": pixels.to(DTYPE[device])}
    else:
        batch = {"input_ids": words(model.tokens)}
    if model.family in (BERT, VIT):
        batch["labels"] = torch.arange(model.batch) % 2
    else:
        batch["labels"] = words(model.answer) if model.answer else batch["input_ids"]
    return {name: x.to(device) for name, x in batch.items()}
