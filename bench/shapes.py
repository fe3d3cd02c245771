"""The shapes that are measured, each named after a model and its use, and random inputs of a shape."""

from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qtuning_fast.attention.api import call_of
from qtuning_fast.attention.arguments import PrefixAttentionCall

N_SHARED = 10


@dataclass(frozen=True)
class Shape:
    """One call of prefix attention, in one layer."""

    name: str
    B: int
    Hq: int
    Hkv: int
    N: int  # queries
    D: int
    P: int
    of: str = ""  # the model and its use
    context: int | None = None  # keys; None: as many as queries
    is_causal: bool = False
    bias: bool = False  # an additive bias on the context's scores, one for all samples, as T5 has it
    padding: float = 0.0  # the mean share of the context that is padding; none in one sample, the most in another
    window: tuple[int, int] | None = None  # keys that a query sees before and after its position
    softcap: float | None = None
    packed: bool = False  # samples without their padding, one after another in one row
    tasks: int = 1  # prefixes in use, assigned to samples in random order; 1: one for all, without a bank
    trained: bool = True  # forward and backward; else forward alone, the prefix folded and in query's dtype

    @property
    def M(self) -> int:
        """Context keys."""
        return self.N if self.context is None else self.context

    @property
    def lengths(self) -> list[int]:
        """The keys of each sample that are not padding, from all M down.

        Up to half of padding they are evenly spaced. Beyond that they are M uᵏ with u evenly spaced, so that most are
        short, as the lengths of texts are.
        """
        spaced = [1 - i / max(self.B - 1, 1) for i in range(self.B)]
        if self.padding <= 0.5:
            shares = [1 - 2 * self.padding * (1 - u) for u in spaced]
        else:
            shares = [u ** (self.padding / (1 - self.padding)) for u in spaced]
        return [max(round(self.M * share), 1) for share in shares]

    @property
    def rows(self) -> int:
        """Queries of all samples: those of padding are computed unless sequences are packed."""
        return sum(self.lengths) if self.packed else self.B * self.N

    @property
    def reach(self) -> int:
        """The keys of the context that most queries see, without causality."""
        return self.M if self.window is None else min(self.M, sum(self.window) + 1)

    def __str__(self) -> str:
        heads = f"H{self.Hq}" if self.Hq == self.Hkv else f"Hq{self.Hq} Hkv{self.Hkv}"
        length = f"N{self.N}" if self.M == self.N else f"N{self.N} M{self.M}"
        features = {
            "causal": self.is_causal,
            "bias": self.bias,
            f"window {self.window and (self.window[0] if self.is_causal else sum(self.window))}": self.window,
            f"cap {self.softcap}": self.softcap,
            f"{self.padding:.0%} padding": self.padding and not self.packed,
            f"packed {sum(self.lengths)} tokens": self.packed,
            f"{self.tasks} tasks": self.tasks > 1,
        }
        return " ".join([f"B{self.B} {heads} {length} D{self.D} P{self.P}", *(f for f, has in features.items() if has)])


_LLAMA_8B: dict[str, Any] = {"Hq": 32, "Hkv": 8, "D": 128}
_DECODING: dict[str, Any] = _LLAMA_8B | {"N": 1, "context": 1024, "P": 512, "trained": False}

BERT_BASE = Shape("bert-base", B=32, Hq=12, Hkv=12, N=128, D=64, P=60, of="BERT-base, sentences")
BERT_BASE_512 = Shape("bert-base-512", B=16, Hq=12, Hkv=12, N=512, D=64, P=60, of="BERT-base, documents")
VIT_B16 = Shape("vit-b16", B=128, Hq=12, Hkv=12, N=197, D=64, P=20, of="ViT-B/16, images of 224 pixels")
MINILM = Shape("minilm", B=64, Hq=12, Hkv=12, N=128, D=32, P=60, of="all-MiniLM-L6-v2, sentences")
BERT_LARGE = Shape("bert-large", B=16, Hq=16, Hkv=16, N=512, D=64, P=60, of="BERT-large, documents")
T5_LARGE = Shape("t5-large", B=8, Hq=16, Hkv=16, N=512, D=64, P=60, bias=True, of="T5-large, its encoder")
LLAMA_8B = Shape("llama-8b", B=4, N=2048, P=100, is_causal=True, of="Llama-3-8B, training", **_LLAMA_8B)
LLAMA_8B_4096 = Shape("llama-8b-4096", B=4, N=4096, P=100, is_causal=True, of="Llama-3-8B, training", **_LLAMA_8B)
LONG = Shape("long", B=1, N=16384, P=512, is_causal=True, of="Llama-3-8B, one long text", **_LLAMA_8B)
DECODE_64 = Shape("decode-64", B=64, of="Llama-3-8B, one new token", **_DECODING)
DECODE_256 = replace(DECODE_64, name="decode-256", B=256)
DECODE_64_MIXED = replace(DECODE_64, name="decode-64-mixed", tasks=16)
DECODE_256_MIXED = replace(DECODE_256, name="decode-256-mixed", tasks=16)
PADDED = replace(BERT_BASE, name="bert-base-padded", padding=0.25, of="BERT-base, sentences of all lengths")
MIXED = replace(BERT_BASE, name="bert-base-mixed", tasks=16, of="BERT-base, a batch of several tasks")
MODERNBERT = Shape(
    *("modernbert-8k", 1, 12, 12, 8192, 64, 60), window=(64, 64), of="ModernBERT-base, a layer with a window"
)
MISTRAL = Shape("mistral-8k", B=1, N=8192, P=100, is_causal=True, window=(4095, 0), of="Mistral-7B", **_LLAMA_8B)
GEMMA_2 = Shape("gemma-2", B=2, Hq=8, Hkv=4, N=2048, D=256, P=60, is_causal=True, softcap=50.0, of="Gemma-2-2B")
THIRD = replace(BERT_BASE_512, name="bert-base-third", B=32, padding=2 / 3, of="BERT-base, texts of all lengths")
PACKED = replace(THIRD, name="bert-base-packed", packed=True, of="the same texts, packed")
WIDE = Shape("wide", B=4, Hq=8, Hkv=8, N=1024, D=256, P=60, of="heads of 256, as Gemma has them")


def twin(shape: Shape, **sizes: Any) -> Shape:
    """A smaller shape of the same kind, for a CPU."""
    return replace(shape, name=f"{shape.name}-cpu", **sizes)


MINILM_CPU = twin(MINILM, B=16, P=50)
DECODE_CPU = replace(DECODE_64, name="decode-cpu", B=16)
MINILM_48_CPU = replace(MINILM_CPU, name="minilm-48-cpu", N=48, of="all-MiniLM-L6-v2, short texts")
CPU = (
    MINILM_CPU,
    MINILM_48_CPU,
    Shape("minilm-512-cpu", B=8, Hq=12, Hkv=12, N=512, D=32, P=50, of="all-MiniLM-L6-v2, documents"),
    twin(BERT_BASE, B=8),
    twin(PADDED, B=8),
    twin(MIXED, B=16, tasks=8),
    twin(BERT_BASE_512, B=2),
    twin(BERT_LARGE, B=2),
    twin(VIT_B16, B=8),
    twin(T5_LARGE, B=2),
    twin(LLAMA_8B, B=1, Hq=16, Hkv=4, N=1024),
    twin(LLAMA_8B_4096, B=1, Hq=8, Hkv=2, N=2048),
    Shape("long-2048-cpu", B=2, Hq=12, Hkv=12, N=2048, D=64, P=100, of="long documents"),
    Shape("long-4096-cpu", B=1, Hq=8, Hkv=8, N=4096, D=64, P=100, of="long documents"),
    DECODE_CPU,
    replace(DECODE_CPU, name="decode-mixed-cpu", tasks=16),
    twin(MODERNBERT, Hq=4, Hkv=4),
    twin(MISTRAL, Hq=4, Hkv=1, N=4096, window=(2047, 0)),
    twin(GEMMA_2, B=1, N=512),
    twin(THIRD, B=8),
    twin(PACKED, B=8),
)

# Shapes that show within seconds whether everything works together.
TINY = Shape("tiny", B=3, Hq=2, Hkv=2, N=24, D=16, P=13)
TINY_CAUSAL = Shape("tiny-causal", B=2, Hq=4, Hkv=2, N=24, D=16, P=13, is_causal=True)
TINY_BIAS = replace(TINY, name="tiny-bias", bias=True)
TINY_PADDED = replace(TINY, name="tiny-padded", padding=0.25)
TINY_MIXED = replace(TINY, name="tiny-mixed", tasks=2)
TINY_DECODE = replace(TINY_CAUSAL, name="tiny-decode", N=1, context=9, tasks=2, is_causal=False, trained=False)
TINY_WINDOW = replace(TINY_CAUSAL, name="tiny-window", window=(5, 0))
TINY_CAPPED = replace(TINY_CAUSAL, name="tiny-capped", softcap=2.0)
TINY_PACKED = replace(TINY, name="tiny-packed", padding=2 / 3, packed=True)
TINIES = (TINY, TINY_CAUSAL, TINY_BIAS, TINY_PADDED, TINY_MIXED, TINY_DECODE, TINY_WINDOW, TINY_CAPPED, TINY_PACKED)

# The most important first, for runs that are cut off.
GPU: tuple[Shape, ...] = (
    BERT_BASE,
    LLAMA_8B_4096,
    VIT_B16,
    DECODE_64,
    LONG,
    MINILM,
    BERT_BASE_512,
    LLAMA_8B,
    DECODE_256,
)
GPU += (DECODE_64_MIXED, T5_LARGE, BERT_LARGE, PADDED, MIXED, DECODE_256_MIXED)
GPU += (PACKED, THIRD, MISTRAL, MODERNBERT, GEMMA_2)
SHAPES = {shape.name: shape for shape in (*GPU, WIDE, *CPU, *TINIES)}


@dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs of a layer. Query, key, value and d_output have the strides that models give them: [B, N, H, D].

    Packed sequences are one sample, so there B is 1 and N counts all tokens. With a bank of T prefixes, what belongs to
    the prefix has a leading T. In training it is float32.
    """

    query: Tensor  # [B, Hq, N, D]
    key: Tensor  # [B, Hkv, M, D]
    value: Tensor  # [B, Hkv, M, D]
    prefix_key: Tensor  # [Hkv, P, D]
    prefix_value: Tensor  # [Hkv, P, D]
    U_key: Tensor  # [P, 1]
    V_key: Tensor  # [1, Hkv, D]
    U_value: Tensor
    V_value: Tensor
    gate_alpha: Tensor  # [Hq]
    gate_tau: Tensor  # [Hq]
    d_output: Tensor  # [B, Hq, N, D], the gradient that comes in
    prefix_index: Tensor | None  # [B], with a bank
    mask: Tensor | None  # of padding [B, M], bool; or T5's bias [1, Hq, N, M]
    offsets: Tensor | None = None  # int32, of packed sequences

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {field.name: x for field in fields(self) if (x := getattr(self, field.name)) is not None}

    def trained(self, *, gated: bool = True, reweighted: bool = True) -> dict[str, Tensor]:
        """The tensors that get a gradient, by name, with or without gate and reweighting."""
        kinds = {"query", "key", "value", "prefix"} | ({"gate"} if gated else set())
        kinds |= {"U", "V"} if reweighted else set()
        fixed = {"d_output", "prefix_index", "mask", "offsets"}
        return {name: x for name, x in self.tensors().items() if name not in fixed and name.split("_")[0] in kinds}

    def call(self, shape: Shape, *, gated: bool = True, reweighted: bool = True) -> PrefixAttentionCall:
        """The call, as backends take it."""
        reweighted = reweighted and shape.trained
        return call_of(
            self.query,
            self.key,
            self.value,
            self.prefix_key,
            self.prefix_value,
            prefix_index=self.prefix_index,
            n_shared=min(N_SHARED, shape.P // 2) if shape.trained else 0,
            reweight_key=(self.U_key, self.V_key) if reweighted else None,
            reweight_value=(self.U_value, self.V_value) if reweighted else None,
            gate="tanh" if gated else None,
            gate_alpha=self.gate_alpha if gated else 1.0,
            gate_tau=self.gate_tau if gated else 1.0,
            attn_mask=self.mask,
            is_causal=shape.is_causal,
            window=shape.window,
            softcap=shape.softcap,
            cu_seqlens_query=self.offsets,
            cu_seqlens_key=self.offsets,
            max_seqlen_query=max(shape.lengths) if shape.packed else None,
            max_seqlen_key=max(shape.lengths) if shape.packed else None,
        )

    def detached(self, dtype: torch.dtype | None = None) -> "Inputs":
        """The same numbers, detached."""
        return replace(self, **{name: _detached(x, dtype) for name, x in self.tensors().items()})

    def tracked(self) -> "Inputs":
        """The same numbers; what is trained requires a gradient."""
        new = self.detached()
        for x in new.trained().values():
            x.requires_grad_()
        return new

    def of_samples(self, samples: Tensor) -> "Inputs":
        """The part of these samples of the batch [n]; all of packed sequences, which are one."""
        if self.offsets is not None:
            return self
        by_sample = {"query", "key", "value", "d_output", "prefix_index"}
        by_sample |= {"mask"} if self.mask is not None and self.mask.ndim == 2 else set()
        return replace(self, **{name: x[samples] for name, x in self.tensors().items() if name in by_sample})

    def of_last_queries(self, count: int) -> "Inputs":
        """The part of the last `count` queries, with all keys."""
        if self.offsets is not None:
            return self
        new = replace(self, query=self.query[:, :, -count:], d_output=self.d_output[:, :, -count:])
        return new if self.mask is None or self.mask.ndim == 2 else replace(new, mask=self.mask[:, :, -count:])

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors().values())


def _detached(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x.detach().to(dtype) if dtype is not None and x.is_floating_point() else x.detach()


def inputs(shape: Shape, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Inputs:
    """Random inputs of a shape: scores as large as in trained models, weights near 1. On "meta" without numbers."""
    on_meta = torch.device(device).type == "meta"
    generator = None if on_meta else torch.Generator(device).manual_seed(seed)
    bank = (shape.tasks,) if shape.tasks > 1 else ()
    prefix_dtype = torch.float32 if shape.trained else dtype

    def normal(*sizes: int, around: float = 0.0, by: float = 1.0, dtype: torch.dtype = prefix_dtype) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device).mul_(by).add_(around).to(dtype)

    samples = 1 if shape.packed else shape.B
    N, M = (shape.rows, shape.rows) if shape.packed else (shape.N, shape.M)

    def heads(count: int, length: int) -> Tensor:
        return normal(samples, length, count, shape.D, dtype=dtype).transpose(1, 2)

    def weights(*sizes: int) -> Tensor:
        return normal(*bank, *sizes, around=1.0, by=0.2)

    return Inputs(
        query=heads(shape.Hq, N),
        key=heads(shape.Hkv, M),
        value=heads(shape.Hkv, M),
        prefix_key=normal(*bank, shape.Hkv, shape.P, shape.D),
        prefix_value=normal(*bank, shape.Hkv, shape.P, shape.D),
        U_key=weights(shape.P, 1),
        V_key=weights(1, shape.Hkv, shape.D),
        U_value=weights(shape.P, 1),
        V_value=weights(1, shape.Hkv, shape.D),
        gate_alpha=weights(shape.Hq),
        gate_tau=weights(shape.Hq),
        d_output=heads(shape.Hq, N),
        prefix_index=_in_no_order(shape, device, generator) if bank else None,
        mask=_padding(shape, device)
        if shape.padding and not shape.packed
        else normal(1, shape.Hq, shape.N, shape.M, dtype=dtype)
        if shape.bias
        else None,
        offsets=torch.tensor([0, *accumulate(shape.lengths)], dtype=torch.int32, device=device)
        if shape.packed
        else None,
    )


def _in_no_order(shape: Shape, device: torch.device | str, generator: torch.Generator | None) -> Tensor:
    """[B], shuffled: each prefix as often as any other."""
    order = torch.randperm(shape.B, generator=generator, device=device)
    return torch.arange(shape.B, device=device)[order] % shape.tasks


def _padding(shape: Shape, device: torch.device | str) -> Tensor:
    """[B, M], True for keys that are not padding."""
    return torch.arange(shape.M, device=device) < torch.tensor(shape.lengths, device=device)[:, None]


def input_sets(shape: Shape, count: int, *, dtype: torch.dtype, device: torch.device | str) -> list[Inputs]:
    return [inputs(shape, dtype=dtype, device=device, seed=seed) for seed in range(count)]
