"""What `qtuning-fast bench` measures: prefix attention as the user's model calls it, on the user's machine.

A model's configuration gives the heads and their size, and the command line the rest; or a named shape gives all of it.
Sizes that do not go together or do not fit into memory are refused before anything is computed.
"""

import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qtuning_fast.attention import dispatch
from qtuning_fast.attention.dispatch import BackendChoice
from qtuning_fast.bench.accuracy import LARGEST_REFERENCE, WRONG
from qtuning_fast.bench.measure import TURNS, default_device, default_dtype, measure
from qtuning_fast.bench.peers import PEERS
from qtuning_fast.bench.results import Results, device_facts, device_line
from qtuning_fast.bench.shapes import SHAPES, Shape, inputs
from qtuning_fast.bench.timing import MOST_SETS, Listener, Turns, silent
from qtuning_fast.lifelong.base_models import MINILM, location
from qtuning_fast.method.config import QTuningConfig

QUESTION = "own_model"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in WRONG}
PEERS_BY_DEVICE = {
    "cpu": ("native", "composed", "eager", "sdpa"),
    "cuda": ("fused", "composed", "eager", "flex-frozen-gate", "sdpa"),
}
IN_THE_CACHE = "sdpa-no-concat"  # in decoding, the cache of PyTorch's attention holds the prefix already
FULL_QUEUE = QTuningConfig().shared_length + QTuningConfig().queue_size * QTuningConfig().prompt_length
CACHED_TOKENS = 1024
HOLD_ALL_SCORES = {"eager", "eager-compiled", "reference"}
SCORES_HELD = 5  # the most tensors of the size of the scores at once


@dataclass(frozen=True)
class LayerOptions:
    """The shape as the command line gives it, by the names of the options; None: not given."""

    model: str | None = None
    shape: str | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_size: int | None = None
    batch: int | None = None
    tokens: int | None = None
    context: int | None = None
    prefix_rows: int | None = None
    tasks: int | None = None
    padding: float | None = None
    causal: bool | None = None
    decode: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1 and not isinstance(value, bool):
                raise ValueError(f"--{field.name.replace('_', '-')} is {value}; it must be at least 1")
        if self.padding is not None and not 0 <= self.padding <= 0.5:
            raise ValueError(f"--padding is {self.padding}; it must be a share from 0 to 0.5")
        named = [f"--{name}" for name in ("model", "shape", "heads") if getattr(self, name) is not None]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} exclude each other: each says which heads there are")
        if self.heads is None and (self.kv_heads or self.head_size):
            raise ValueError(f"--{'kv-heads' if self.kv_heads else 'head-size'} needs --heads")
        if self.heads is not None and self.head_size is None:
            raise ValueError("--heads needs --head-size")
        if self.decode and self.tokens is not None:
            raise ValueError(
                "--tokens does not go with --decode, which is one token; --context is what it looks back on"
            )

    def as_shape(self) -> Shape:
        """The shape. Sizes that are not given come from the model or from the named shape.

        Raises:
            ValueError: there is no such model or shape, or the sizes do not go together.
        """
        shape = self._base()
        if self.decode:
            context = shape.M if self.shape is not None else CACHED_TOKENS
            shape = replace(shape, N=1, context=context, is_causal=False, trained=False)
        sizes: dict[str, Any] = {"B": self.batch, "N": self.tokens, "context": self.context, "P": self.prefix_rows}
        sizes |= {"tasks": self.tasks, "padding": self.padding, "is_causal": self.causal}
        shape = replace(shape, **{name: size for name, size in sizes.items() if size is not None})
        _check_sizes(shape)
        return shape

    def _base(self) -> Shape:
        if self.shape is not None:
            return _of(SHAPES, "--shape", self.shape)
        if self.heads is not None:
            heads: dict[str, Any] = {"Hq": self.heads, "Hkv": self.kv_heads or self.heads, "D": self.head_size}
            return Shape("own", B=16, N=128, P=FULL_QUEUE, **heads)
        model = MINILM if self.model is None else self.model
        return Shape(Path(model).name, B=16, N=128, P=FULL_QUEUE, of=model, **_attention_of(model))


def _check_sizes(shape: Shape) -> None:
    if shape.Hq % shape.Hkv:
        raise ValueError(f"--kv-heads is {shape.Hkv}; --heads ({shape.Hq}) must be a multiple of it")
    if shape.tasks > shape.B:
        raise ValueError(f"--tasks is {shape.tasks}; it must be at most --batch ({shape.B}), one task a sample")
    if shape.is_causal and shape.M < shape.N:
        raise ValueError(f"--context is {shape.M}; with --causal it must be at least --tokens ({shape.N})")
    if shape.bias and shape.padding:
        raise ValueError(f"--padding does not go with {shape.name}, whose scores have a bias: one mask at a time")


def _attention_of(model: str) -> dict[str, Any]:
    """Heads, their size and masks of a transformers model's layers, from its configuration alone."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto as auto

    try:
        whole = AutoConfig.from_pretrained(location(model))
        config = whole.get_text_config()
    except Exception as error:  # hub names, files and remote code fail in many ways
        raise ValueError(f"--model is {model!r}, of which no configuration can be read: {_line(error)}") from None
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None)
    if size is None and isinstance(heads, int):
        size = getattr(config, "hidden_size", 0) // heads
    if not all(isinstance(each, int) and each > 0 for each in (heads, kv_heads, size)):
        raise ValueError(f"--model is {model!r}, whose configuration names no heads; name them by --heads, --head-size")
    answers_in_words = config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    fills_gaps = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return {
        "Hq": heads,
        "Hkv": kv_heads,
        "D": size,
        "is_causal": answers_in_words and not fills_gaps and not config.is_encoder_decoder,
        "bias": hasattr(config, "relative_attention_num_buckets"),  # as T5 has it
    }


@dataclass(frozen=True)
class LayerCase:
    """What is measured: one shape in one dtype, with peers beside each other."""

    shape: Shape
    dtype: torch.dtype
    device: str
    asked: tuple[str, ...]  # peers

    @classmethod
    def of(cls, wanted: LayerOptions, dtype: str = "auto", peers: Sequence[str] = ()) -> "LayerCase":
        """A case that is valid and fits this machine. Without `peers`, those that make sense on the device.

        Raises:
            ValueError: what is wrong, by the name of the option.
        """
        device = default_device()
        chosen = default_dtype(device) if dtype == "auto" else _of(DTYPES, "--dtype", dtype)
        for name in peers:
            _of(PEERS, "--peer", name)
        shape = wanted.as_shape()
        asked = tuple(peers) or PEERS_BY_DEVICE[device] + (() if shape.trained else (IN_THE_CACHE,))
        case = cls(shape, chosen, device, asked)
        case._check_memory()
        return case

    @cached_property
    def choice(self) -> BackendChoice:
        """The backend that `auto` takes, with the reason."""
        x = inputs(self.shape, dtype=self.dtype, device=self.device)
        return dispatch.explain((x.tracked() if self.shape.trained else x).call(self.shape), "auto")

    @property
    def peers(self) -> list[str]:
        """The peers to measure. The backend that `auto` takes comes first, even if it was not asked for."""
        return list(dict.fromkeys([self.choice.backend, *self.asked]))

    def heading(self) -> str:
        """The shape and the device."""
        dtype, whole = str(self.dtype).removeprefix("torch."), "training" if self.shape.trained else "forward only"
        return (
            f"{self.shape.name}: {self.shape}, {dtype}, {whole}\n"
            f"{device_line(device_facts(self.device))}, torch {torch.__version__}{_others_at_work()}"
        )

    def measure(self, turns: Turns = TURNS, listener: Listener = silent) -> dict[str, Any]:
        """The entry of `measure.measure`."""
        return measure(self.shape, self.peers, self.device, dtype=self.dtype, turns=turns, listener=listener)

    def _check_memory(self) -> None:
        """Refuses what exceeds free memory: on a CPU the system would kill this process and perhaps others."""
        free, shape = _free_bytes(self.device), self.shape
        context, queries = 2 * shape.B * shape.Hkv * shape.M * shape.D, 2 * shape.B * shape.Hq * shape.N * shape.D
        bias = shape.Hq * shape.N * shape.M if shape.bias else 0
        scores = shape.Hq * shape.N * (shape.P + shape.M)  # of one sample
        needs = {
            "random inputs": MOST_SETS * (context + queries + bias) * self.dtype.itemsize,
            "the float64 reference": SCORES_HELD * 8 * min(shape.B * scores, LARGEST_REFERENCE),
        }
        if self.device == "cpu":  # on a GPU running out of memory is a result
            held = SCORES_HELD * 4 * shape.B * scores
            needs |= {f"--peer {name}": held for name in self.asked if name in HOLD_ALL_SCORES}
        for what, needed in needs.items():
            if needed > free:
                raise ValueError(
                    f"--batch {shape.B}, --tokens {shape.N}, --context {shape.M}: {what} would take about "
                    f"{needed / 2**30:.0f} GiB, and {free / 2**30:.0f} are free"
                )


def results_file(out: Path, case: LayerCase, arguments: Sequence[str]) -> Results:
    """Begins the JSON file of a case; `arguments` are those of the command line.

    Raises:
        ValueError: it cannot be written.
    """
    if out.exists() and not out.is_file():
        raise ValueError(f"--out is {str(out)!r}; it must be a file")
    try:
        return Results(QUESTION, out, case.device, shlex.join(["qtuning-fast", *arguments]))
    except (OSError, ValueError) as error:
        raise ValueError(f"--out is {str(out)!r}, which cannot be written: {_line(error)}") from None


def _others_at_work() -> str:
    """A warning if other programs keep the cores busy; empty: they do not."""
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load + torch.get_num_threads() < cores + 0.5:
        return ""
    return f"\nother programs are at work (load {load:.1f}, {cores} cores): times may be too long"


def _free_bytes(device: str) -> float:
    """Free memory in bytes; infinite if it is not known."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), math.inf)


def _of(known: dict[str, Any], option: str, name: str) -> Any:
    if name not in known:
        raise ValueError(f"{option} is {name!r}; it must be one of {', '.join(known)}")
    return known[name]


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
