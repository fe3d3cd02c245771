"""The shapes that are measured, from models in use, and random inputs of such a shape."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from qtuning_fast.call import PrefixAttentionCall

N_SHARED = 10


@dataclass(frozen=True)
class Shape:
    """One call of prefix attention, in training."""

    name: str
    B: int
    Hq: int
    Hkv: int
    N: int  # queries, and as many context keys
    D: int
    P: int
    is_causal: bool = False

    def __str__(self) -> str:
        heads = f"H{self.Hq}" if self.Hq == self.Hkv else f"Hq{self.Hq} Hkv{self.Hkv}"
        causal = " causal" if self.is_causal else ""
        return f"{self.name}: B{self.B} {heads} N{self.N} D{self.D} P{self.P}{causal}"


BERT_BASE = Shape("bert-base", B=32, Hq=12, Hkv=12, N=128, D=64, P=60)
VIT_B16 = Shape("vit-b16", B=128, Hq=12, Hkv=12, N=197, D=64, P=20)
MINILM = Shape("minilm", B=64, Hq=12, Hkv=12, N=128, D=32, P=60)
BERT_BASE_512 = Shape("bert-base-512", B=16, Hq=12, Hkv=12, N=512, D=64, P=60)
LLAMA_8B = Shape("llama-8b", B=4, Hq=32, Hkv=8, N=2048, D=128, P=100, is_causal=True)
LLAMA_8B_4096 = Shape("llama-8b-4096", B=4, Hq=32, Hkv=8, N=4096, D=128, P=100, is_causal=True)
LONG = Shape("long", B=1, Hq=32, Hkv=8, N=16384, D=128, P=512, is_causal=True)
WIDE = Shape("wide", B=4, Hq=8, Hkv=8, N=1024, D=256, P=60)

# For a CPU: batches of MiniLM's and of BERT's heads, and long sequences.
CPU_128 = Shape("cpu-128", B=16, Hq=12, Hkv=12, N=128, D=32, P=50)
CPU_512 = Shape("cpu-512", B=8, Hq=12, Hkv=12, N=512, D=32, P=50)
CPU_2048 = Shape("cpu-2048", B=2, Hq=12, Hkv=12, N=2048, D=64, P=100)
CPU_4096 = Shape("cpu-4096", B=1, Hq=8, Hkv=8, N=4096, D=64, P=100)

# Small twins, which show on a CPU that all is put together as it should be.
TINY = Shape("tiny", B=3, Hq=2, Hkv=2, N=24, D=16, P=13)
TINY_CAUSAL = Shape("tiny-causal", B=2, Hq=4, Hkv=2, N=24, D=16, P=13, is_causal=True)

_ALL = (BERT_BASE, VIT_B16, MINILM, BERT_BASE_512, LLAMA_8B, LLAMA_8B_4096, LONG, WIDE)
_ALL += (CPU_128, CPU_512, CPU_2048, CPU_4096, TINY, TINY_CAUSAL)
SHAPES = {shape.name: shape for shape in _ALL}


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a layer trains on. Query, key, value and d_output are strided as models hand them over: [B, N, H, D]."""

    query: Tensor  # [B, Hq, N, D]
    key: Tensor  # [B, Hkv, N, D]
    value: Tensor  # [B, Hkv, N, D]
    prefix_key: Tensor  # [Hkv, P, D], float32, as all that belongs to the prefix
    prefix_value: Tensor  # [Hkv, P, D]
    U_key: Tensor  # [P, 1]
    V_key: Tensor  # [1, Hkv, D]
    U_value: Tensor
    V_value: Tensor
    gate_alpha: Tensor  # [Hq]
    gate_tau: Tensor  # [Hq]
    d_output: Tensor  # [B, Hq, N, D], the gradient that comes in

    def trained(self) -> dict[str, Tensor]:
        """What gets a gradient, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "d_output"}

    def detached(self, dtype: torch.dtype | None = None) -> "Inputs":
        """The same numbers, which track nothing yet."""
        return Inputs(**{f.name: _detached(getattr(self, f.name), dtype) for f in fields(self)})

    def tracked(self) -> "Inputs":
        """The same numbers, of which all that is trained requires a gradient."""
        new = self.detached()
        for x in new.trained().values():
            x.requires_grad_()
        return new

    def of_samples(self, samples: Tensor) -> "Inputs":
        """Those samples of the batch [n] only."""
        return replace(self, **{name: getattr(self, name)[samples] for name in ("query", "key", "value", "d_output")})

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, field.name).nbytes for field in fields(self))


def _detached(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x.detach() if dtype is None else x.detach().to(dtype)


def inputs(shape: Shape, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Inputs:
    """Random numbers of a shape: scores of the size they have in trained models, weights near 1. On "meta": none."""
    on_meta = torch.device(device).type == "meta"
    generator = None if on_meta else torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int, around: float = 0.0, by: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device).mul_(by).add_(around).to(dtype)

    def heads(count: int) -> Tensor:
        return normal(shape.B, shape.N, count, shape.D, dtype=dtype).transpose(1, 2)

    return Inputs(
        query=heads(shape.Hq),
        key=heads(shape.Hkv),
        value=heads(shape.Hkv),
        prefix_key=normal(shape.Hkv, shape.P, shape.D),
        prefix_value=normal(shape.Hkv, shape.P, shape.D),
        U_key=normal(shape.P, 1, around=1.0, by=0.2),
        V_key=normal(1, shape.Hkv, shape.D, around=1.0, by=0.2),
        U_value=normal(shape.P, 1, around=1.0, by=0.2),
        V_value=normal(1, shape.Hkv, shape.D, around=1.0, by=0.2),
        gate_alpha=normal(shape.Hq, around=1.0, by=0.2),
        gate_tau=normal(shape.Hq, around=1.0, by=0.2),
        d_output=heads(shape.Hq),
    )


def input_sets(shape: Shape, count: int, *, dtype: torch.dtype, device: torch.device | str) -> list[Inputs]:
    return [inputs(shape, dtype=dtype, device=device, seed=seed) for seed in range(count)]


def training_call(shape: Shape, x: Inputs) -> PrefixAttentionCall:
    """The call as kernels take it."""
    return PrefixAttentionCall(
        query=x.query,
        key=x.key,
        value=x.value,
        prefix_key=x.prefix_key,
        prefix_value=x.prefix_value,
        prefix_index=None,
        prefix_length=None,
        n_shared=min(N_SHARED, shape.P),
        reweight_key=(x.U_key, x.V_key),
        reweight_value=(x.U_value, x.V_value),
        gate="tanh",
        gate_alpha=x.gate_alpha,
        gate_tau=x.gate_tau,
        padding_mask=None,
        attn_mask=None,
        prefix_bias=None,
        is_causal=shape.is_causal,
        scale=shape.D**-0.5,
        softcap=None,
    )
