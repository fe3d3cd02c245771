"""Conversion of peft's prefix tuning and prompt tuning to adapters of tasks, and back. It does not need peft.

peft puts a prefix into a cache of keys and values, which raises the positions of the tokens after it by P, so a
converted adapter has `position_shift=P`. Models that take no cache (DistilBERT, ModernBERT, image models) have no
prefix tuning in peft. In encoder-decoders peft gives a prefix to the decoder alone, with shifted positions (BART) or
under a relative bias (T5). An adapter holds neither, but prompts in front of the input can be converted.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtuning_fast.integrations.transformers import without_head
from qtuning_fast.integrations.transformers.caches import takes_cache
from qtuning_fast.method.adapter import TaskAdapter

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_ROWS = "prompt_embeddings"  # peft's name for saved prompts, with a reparametrisation folded in
_PREFIX, _PROMPTS = "PREFIX_TUNING", ("PROMPT_TUNING", "P_TUNING")


def adapter_from_peft(
    source: Any,
    name: str,
    *,
    base_model: PreTrainedModel | None = None,
    peft_name: str | None = None,
    head: nn.Linear | None = None,
    label_names: Sequence[str] = (),
) -> TaskAdapter:
    """Convert a peft adapter to the adapter of a task, with `gate=None` and the same logits.

    Prefix tuning becomes keys and values for `placement="prefix"`; prompt tuning and P-tuning become embeddings for
    `placement="input"`. A reparametrisation (peft's prefix projection or prompt encoder) is folded in.

    For language modelling the base model's own head is used, so nothing is missing. For classification peft's head
    reads the input of the base model's own classifier (BERT's pooler), while heads of tasks read the features of
    `QTuningModel.encode`, so it cannot be converted. Give a `head` on `QTuningModel.features` of the adapter, or call
    `base_model` itself under the task, which computes peft's logits with its own classifier.

    Args:
        source: a `PeftModel`, or a folder that its `save_pretrained` wrote.
        name: name of the task.
        base_model: model that a folder's adapter was trained on; a `PeftModel` brings its own.
        peft_name: name of the adapter in a `PeftModel` with several; None for the active one.
        head: maps `[hidden]` to `[classes]`, for classification.
        label_names: one name a class.

    Raises:
        TypeError, ValueError: an argument is invalid, or the adapter is of a kind that cannot be converted.
        NotImplementedError: the adapter is a prefix in an encoder-decoder.
    """
    if isinstance(source, (str, Path)):
        if not isinstance(base_model, PreTrainedModel):
            raise TypeError(f"base_model is {base_model!r}; with a folder it must be the adapter's base model")
        settings, rows = _read(Path(source))
    elif hasattr(source, "peft_config") and hasattr(source, "get_base_model"):
        base_model = source.get_base_model()
        settings, rows = _of_model(source, source.active_adapter if peft_name is None else peft_name)
    else:
        raise TypeError(f"source is a {type(source).__name__}; it must be a PeftModel or a folder")
    assert base_model is not None
    P, kind = settings["num_virtual_tokens"], settings["peft_type"]
    kept: dict[str, Any] = {"keys": (), "values": (), "embeddings": rows[:P]}
    if kind == _PREFIX:
        _check_takes_prefix(base_model)
        L, H = settings["num_layers"], settings["num_attention_heads"]
        # [P, layers, key and value, Hkv, D] to a key and a value [Hkv, P, D] for each layer
        layers = rows.view(P, L, 2, H, -1).permute(1, 2, 3, 0, 4).contiguous()
        keys, values = (tuple(each.clone() for each in layers[:, part]) for part in (0, 1))
        kept = {"keys": keys, "values": values, "position_shift": P}
    _warn_of_windows(base_model, P)
    return TaskAdapter(
        name=name,
        label_names=_labels(head, label_names),
        gate=None,
        alphas=(),
        taus=(),
        head_weight=None if head is None else head.weight.detach().cpu().clone(),
        head_bias=None if head is None else _bias(head).detach().cpu().clone(),
        **kept,
    )


def adapter_to_peft(adapter: TaskAdapter, base_model: PreTrainedModel, folder: str | Path) -> None:
    """Write an adapter in peft's format, so that `PeftModel.from_pretrained(base_model, folder)` gives equal logits.

    A prefix becomes prefix tuning; embeddings in front of the input become prompt tuning. The adapter's head is not
    written, because peft has no head on pooled features.

    Args:
        adapter: an adapter with `gate=None`. A prefix must be in every layer and trained with `position_shift=P`,
            because peft shifts positions by P.
        base_model: the adapter's base model.
        folder: folder of the files; created if missing.

    Raises:
        ValueError: peft cannot compute the adapter; the message says why.
        NotImplementedError: peft cannot give the base model a prefix.
    """
    if adapter.gate is not None:
        raise ValueError(f"adapter {adapter.name!r} has the gate {adapter.gate!r}, but peft's attention has no gate")
    P, two_stacks = adapter.prefix_rows, base_model.config.is_encoder_decoder
    task_type = "SEQ_2_SEQ_LM" if two_stacks else "CAUSAL_LM" if base_model.can_generate() else "FEATURE_EXTRACTION"
    settings: dict[str, Any] = {
        "task_type": task_type,
        "num_virtual_tokens": P,
        "inference_mode": True,
        "base_model_name_or_path": base_model.config._name_or_path,  # peft reads the same attribute
    }
    if adapter.embeddings is not None:
        rows = adapter.embeddings
        sizes = base_model.config.get_text_config()  # peft cannot find them in every family
        settings |= {"peft_type": _PROMPTS[0], "token_dim": rows.shape[1]}
        settings |= {"num_layers": sizes.num_hidden_layers, "num_attention_heads": sizes.num_attention_heads}
        if two_stacks:  # peft also stores rows for the decoder, which it never uses
            rows = torch.cat([rows, torch.zeros_like(rows)])
    else:
        _check_exact_prefix(adapter, base_model)
        H, _, D = adapter.keys[0].shape
        settings |= {"peft_type": _PREFIX, "num_layers": len(adapter.keys), "num_attention_heads": H}
        settings["token_dim"] = H * D
        pairs = torch.stack([torch.stack(pair) for pair in zip(adapter.keys, adapter.values)])
        rows = pairs.permute(3, 0, 1, 2, 4).flatten(1)  # [layers, 2, Hkv, P, D] to [P, layers * 2 * Hkv * D]
    _warn_of_windows(base_model, P)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CONFIG).write_text(json.dumps(settings, indent=2))
    save_file({_ROWS: rows.detach().cpu().contiguous()}, folder / _WEIGHTS)


def _read(folder: Path) -> tuple[dict[str, Any], Tensor]:
    """Read the settings and rows of a saved peft adapter."""
    if not (folder / _CONFIG).is_file():
        raise ValueError(f"{folder} holds no {_CONFIG}: no peft adapter was saved there")
    settings = json.loads((folder / _CONFIG).read_text())
    _check_kind(settings.get("peft_type"))
    if not (folder / _WEIGHTS).is_file():
        raise ValueError(f"{folder} holds no {_WEIGHTS}; save the adapter with safe_serialization=True")
    weights = load_file(folder / _WEIGHTS)
    if _ROWS not in weights:
        raise ValueError(f"{folder / _WEIGHTS} holds no {_ROWS}")
    return settings, weights[_ROWS]


def _of_model(model: Any, peft_name: str) -> tuple[dict[str, Any], Tensor]:
    """Return the settings and rows of an adapter in a PeftModel."""
    if peft_name not in model.peft_config:
        raise ValueError(f"peft_name is {peft_name!r}; the model has the adapters {', '.join(model.peft_config)}")
    settings = model.peft_config[peft_name].to_dict()
    _check_kind(settings["peft_type"])
    if settings["inference_mode"]:  # a loaded adapter is folded already, even if its config names a projection
        return settings, model.prompt_encoder[peft_name].embedding.weight.detach().cpu()
    return settings, model.get_prompt_embedding_to_save(peft_name)


def _check_kind(kind: Any) -> None:
    kind = getattr(kind, "value", kind)
    if kind not in (_PREFIX, *_PROMPTS):
        raise ValueError(
            f"a peft adapter of type {kind} is no prefix of one task; {_PREFIX}, {' and '.join(_PROMPTS)} can be "
            "converted (for LoRA and similar adapters, give QTuningModel the PeftModel itself)"
        )


def _check_takes_prefix(base_model: PreTrainedModel) -> None:
    kind = type(base_model).__name__
    if base_model.config.is_encoder_decoder:
        raise NotImplementedError(
            f"{kind}: in an encoder-decoder peft puts the prefix into the decoder's self-attention, under its positions"
            " or its relative bias, which an adapter cannot reproduce; prompt tuning can be converted"
        )
    if not takes_cache(without_head(base_model)):
        raise NotImplementedError(f"{kind} takes no cache of keys and values, but peft passes a prefix in one")


def _check_exact_prefix(adapter: TaskAdapter, base_model: PreTrainedModel) -> None:
    _check_takes_prefix(base_model)
    P, layers = adapter.prefix_rows, base_model.config.get_text_config().num_hidden_layers
    if not P:
        raise ValueError(f"adapter {adapter.name!r} has no rows, which a peft adapter must have")
    if adapter.position_shift != P:
        raise ValueError(
            f"adapter {adapter.name!r} has position_shift={adapter.position_shift}, but peft shifts positions by the "
            f"{P} rows of a prefix: its logits would differ"
        )
    if len(adapter.keys) != layers:
        raise ValueError(
            f"adapter {adapter.name!r} has a prefix in {len(adapter.keys)} layers; peft needs one in all {layers} of a "
            f"{type(base_model).__name__}"
        )
    shapes = {tuple(rows.shape) for rows in (*adapter.keys, *adapter.values)}
    if len(shapes) > 1:
        raise ValueError(
            f"adapter {adapter.name!r} has keys and values of the shapes {sorted(shapes)}; peft needs a single shape"
        )


def _warn_of_windows(base_model: PreTrainedModel, P: int) -> None:
    """Warn if a sliding window hides peft's prefix from later tokens: here every token sees the prefix."""
    config = base_model.config.get_text_config()
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    local = getattr(config, "local_attention", None)  # ModernBERT's window, half on either side
    window = local // 2 + 1 if window is None and local is not None else window
    if window is not None and (kinds is None or "sliding_attention" in kinds):
        warnings.warn(
            f"{type(base_model).__name__} has layers with a sliding window of {window} tokens, which peft's "
            f"{P} virtual tokens leave; here every token sees them. The logits are equal for inputs of up to "
            f"{max(0, window - P)} tokens",
            stacklevel=3,
        )


def _labels(head: nn.Linear | None, label_names: Sequence[str]) -> tuple[str, ...]:
    if head is not None and len(label_names) != head.out_features:
        raise ValueError(f"label_names has {len(label_names)} names, but the head has {head.out_features} classes")
    return tuple(label_names)


def _bias(head: nn.Linear) -> Tensor:
    return head.weight.new_zeros(head.out_features) if head.bias is None else head.bias
