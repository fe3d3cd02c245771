"""Small random models of every family, and attention with prefixes put in by hand, in eager PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    CLIPVisionConfig,
    DebertaV2Config,
    DeiTConfig,
    Dinov2Config,
    DistilBertConfig,
    ElectraConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    MT5Config,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    T5Config,
    ViTConfig,
    Wav2Vec2Config,
)
from transformers.masking_utils import eager_mask

from qtuning_fast import QTuningModel
from qtuning_fast.attention.common import GATES

BY_HAND = "prefix_by_hand"

_WORDS = {"vocab_size": 40, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_IMAGE = {**_SIZES, "image_size": 16, "patch_size": 8}
_GROUPED = {"num_key_value_heads": 2}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
_T5 = {"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 48}
_T5 = {
    **_T5,
    "vocab_size": 40,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "tie_word_embeddings": False,
}
_BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4}
_BART = {
    **_BART,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "forced_eos_token_id": None,
}


@dataclass(frozen=True)
class Family:
    """A family of models: its name in the docs, what kind it is of, and a small configuration."""

    name: str
    kind: str  # "encoder", "image", "encoder-decoder" or "decoder"
    config: PretrainedConfig
    note: str = ""

    @property
    def task_type(self) -> str:
        return {
            "encoder": "sequence-classification",
            "image": "image-classification",
            "encoder-decoder": "text-to-text",
            "decoder": "causal-lm",
        }[self.kind]

    def base_model(self, seed: int = 0) -> Any:
        """A random model in eval mode, with weights large enough for differences to show."""
        torch.manual_seed(seed)
        factory = {"encoder-decoder": AutoModelForSeq2SeqLM, "decoder": AutoModelForCausalLM}.get(self.kind, AutoModel)
        model = factory.from_config(copy.deepcopy(self.config)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                unscaled = name.endswith(("Attention.q.weight", "Attention.k.weight"))  # T5's scores
                if parameter.ndim > 1 and not unscaled:
                    parameter.add_(torch.randn_like(parameter) * 0.15)
        return model

    def batch(self, seed: int = 0, size: int = 3) -> dict[str, Tensor]:
        """Inputs with padding where the family takes it: on the left for decoders."""
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "image":
            return {"pixel_values": torch.randn(size, 3, 16, 16, generator=generator)}
        ids = torch.randint(5, 40, (size, 7), generator=generator)
        mask = torch.ones_like(ids)
        padded = slice(0, 3) if self.kind == "decoder" else slice(4, None)
        mask[0, padded] = 0
        ids = ids.masked_fill(mask == 0, self.config.pad_token_id)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.kind == "encoder-decoder":
            inputs["decoder_input_ids"] = torch.randint(5, 40, (size, 4), generator=generator)
        return inputs


FAMILIES = {
    family.name: family
    for family in (
        Family("BERT", "encoder", BertConfig(**_SIZES, **_WORDS)),
        Family("RoBERTa", "encoder", RobertaConfig(**_SIZES, **_WORDS)),
        Family("DistilBERT", "encoder", DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, **_WORDS)),
        Family(
            "ModernBERT",
            "encoder",
            ModernBertConfig(**_SIZES, **_WORDS, cls_token_id=2, sep_token_id=3, local_attention=4),
            "local attention",
        ),
        Family("ELECTRA", "encoder", ElectraConfig(**_SIZES, **_WORDS, embedding_size=16)),
        Family("ViT", "image", ViTConfig(**_IMAGE)),
        Family("DINOv2", "image", Dinov2Config(**{**_IMAGE, "mlp_ratio": 2, "intermediate_size": None})),
        Family("DeiT", "image", DeiTConfig(**_IMAGE)),
        Family("CLIP vision tower", "image", CLIPVisionConfig(**_IMAGE)),
        Family("T5", "encoder-decoder", T5Config(**_T5), "relative bias, unscaled scores"),
        Family("mT5", "encoder-decoder", MT5Config(**_T5), "relative bias, unscaled scores"),
        Family("BART", "encoder-decoder", BartConfig(**_BART, **_WORDS)),
        Family("Llama", "decoder", LlamaConfig(**_SIZES, **_WORDS, **_GROUPED)),
        Family("Qwen2", "decoder", Qwen2Config(**_SIZES, **_WORDS, **_GROUPED)),
        Family("Qwen3", "decoder", Qwen3Config(**_SIZES, **_WORDS, **_GROUPED, head_dim=8)),
        Family("Mistral", "decoder", MistralConfig(**_SIZES, **_WORDS, **_GROUPED, sliding_window=4), "sliding window"),
        Family(
            "Gemma 2",
            "decoder",
            Gemma2Config(**_SIZES, **_WORDS, **_GROUPED, head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
            "sliding window, soft-capping",
        ),
        Family(
            "Gemma 3",
            "decoder",
            Gemma3TextConfig(**_SIZES, **_WORDS, **_GROUPED, head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
            "sliding window",
        ),
        Family(
            "GPT-OSS",
            "decoder",
            GptOssConfig(**_SIZES, **_WORDS, **_GROUPED, **_EXPERTS, head_dim=8, sliding_window=4),
            "sliding window, attention sinks",
        ),
        Family("Phi-3", "decoder", Phi3Config(**_SIZES, **_WORDS, **_GROUPED)),
        Family("GPT-2", "decoder", GPT2Config(n_embd=32, n_layer=2, n_head=4, **_WORDS)),
        Family(
            "OPT",
            "decoder",
            OPTConfig(**{**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "intermediate_size": None}, **_WORDS),
        ),
        Family("GPT-NeoX", "decoder", GPTNeoXConfig(**_SIZES, **_WORDS)),
    )
}

# What cannot take a prefix, and what the error has to say of it.
REFUSED = {
    "DeBERTa": (DebertaV2Config(**_SIZES, vocab_size=40), "cannot take a prefix.*disentangled"),
    "Falcon": (
        FalconConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        "cannot take a prefix.*itself",
    ),
    "ALBERT": (AlbertConfig(**_SIZES, vocab_size=40, embedding_size=16), "share one attention module"),
    "wav2vec 2.0": (
        Wav2Vec2Config(**_SIZES, vocab_size=40, conv_dim=(8,), conv_stride=(2,), conv_kernel=(2,)),
        "input_values",
    ),
}


@pytest.fixture
def refused() -> dict[str, tuple[PretrainedConfig, str]]:
    return REFUSED


@pytest.fixture(scope="session")
def families() -> dict[str, Family]:
    return FAMILIES


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(params=[name for name, family in FAMILIES.items() if family.task_type in ("text-to-text", "causal-lm")])
def writer(request: pytest.FixtureRequest) -> Family:
    """A family that generates."""
    return FAMILIES[request.param]


@pytest.fixture(params=[name for name, family in FAMILIES.items() if family.kind == "decoder"])
def decoder(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def _with_tasks(model: QTuningModel, *names: str) -> QTuningModel:
    for name in names:
        model.start_task(name, 3)
        with torch.no_grad():
            for parameter in model.learning.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.5)
        model.finish_task()
    return model.eval()


@pytest.fixture(scope="session")
def with_tasks() -> Callable[..., QTuningModel]:
    """`with_tasks(model, *names)` finishes tasks of three classes with parameters at random; the last one is set."""
    return _with_tasks


# By hand


@dataclass
class Hand:
    """A prefix put in by hand: rows `[1 or B, Hkv, P, D]`, or the first P tokens; and NoRGa's gate."""

    tokens: int = 0
    key: Tensor | None = None
    value: Tensor | None = None
    gate: str | None = None
    alpha: Tensor | float = 1.0
    tau: Tensor | float = 1.0


def _attention_by_hand(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Eager attention as a paper's authors would write it; `module.by_hand` is its prefix."""
    hand: Hand = getattr(module, "by_hand", None) or Hand()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    B, _, N, _ = query.shape
    rows = 0
    if hand.key is not None:
        rows = hand.key.shape[-2]
        key = torch.cat([hand.key.expand(B, -1, -1, -1), key], dim=2)
        value = torch.cat([hand.value.expand(B, -1, -1, -1), value], dim=2)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    added = torch.zeros(1, 1, N, key.shape[2] - rows)
    for term in (attention_mask, position_bias):
        added = added if term is None else added + term[..., : added.shape[-1]]
    if attention_mask is None and getattr(module, "is_causal", False):
        ahead = torch.ones(N, added.shape[-1]).triu(1 + added.shape[-1] - N).bool()
        added = added.masked_fill(ahead, torch.finfo(added.dtype).min)
    P = rows or hand.tokens
    if P:
        after = slice(hand.tokens, None)  # whose queries go through the gate
        parts = [scores[:, :, after, :P], scores[:, :, after, P:]]
        if hand.gate is not None:
            alpha, tau = (x.reshape(-1, 1, 1) if isinstance(x, Tensor) else x for x in (hand.alpha, hand.tau))
            parts[0] = parts[0] + alpha * GATES[hand.gate](tau * parts[0])
        if hand.tokens:  # no mask covers the prompt, a relative bias does
            if position_bias is not None:
                parts[0] = parts[0] + position_bias[:, :, after, :P]
            parts[1] = parts[1] + added[:, :, after, P:]
            gated = torch.cat(parts, dim=-1)
            scores = torch.cat([scores[:, :, :P] + added[:, :, :P], gated], dim=2)
        else:
            scores = torch.cat([parts[0], parts[1] + added], dim=-1)
    else:
        scores = scores + added
    if s_aux is not None:  # one more score of each head, without a value
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
        return (scores.softmax(-1)[..., :-1] @ value).transpose(1, 2), None
    return (scores.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register(BY_HAND, _attention_by_hand)
AttentionMaskInterface.register(BY_HAND, lambda **kwargs: eager_mask(**kwargs))


def compute_by_hand(model: nn.Module) -> None:
    """From here on the model's attention is the one above."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = BY_HAND


@pytest.fixture
def by_hand() -> Any:
    """Attention with prefixes put in by hand: `Hand` on a module's `by_hand`, and `compute(model)` to use it."""
    return SimpleNamespace(Hand=Hand, compute=compute_by_hand)
