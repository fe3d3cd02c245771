"""Compiles the kernels for GPUs that need not be present, and reports registers, spills and shared memory.

    python -m qtuning_fast.bench.predictions.compile_report                    every table entry, for all targets
    python -m qtuning_fast.bench.predictions.compile_report --target sm_90 --head-size 64 128 --json report.json

Each row is one kernel, launched as a training step launches it: the table's blocks, a reweighted float32 prefix with a
tanh gate, everything trainable, and the context plain, padded or causal with grouped heads. Of the others, "biased" has
additive masks on context and prefix, "window" is causal with a window and grouped heads, "capped" the same with capped
scores, "sinks" the same with attention sinks, "packed" is causal with grouped heads and packed sequences, "bank" has a
bank with lengths, a sigmoid gate that is frozen, and sizes of 1, and "tasks" the same of 4. The kernels "merge" and
"prefix-queries" are those that leave the context to others; of "decode", one query a sample, there is only the first.
Exits with 1 if a kernel does not compile, wants more shared memory than its target has, or, in bf16 and for head sizes
up to 128 on sm_90, spills registers (with packed sequences or capped scores more than 8 bytes, under additive
masks more than 64).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from qtuning_fast.attention.arguments import trainable
from qtuning_fast.bench.shapes import PrefixAttentionCall, Shape, inputs
from qtuning_fast.kernels import backward, forward, prefix_forward, prefix_part
from qtuning_fast.kernels.fold import folded
from qtuning_fast.kernels.launch import Launch
from qtuning_fast.kernels.target import INTERPRETED


@dataclass(frozen=True)
class Target:
    gpu: GPUTarget
    shared_memory: int  # bytes a program may have
    registers: int  # 32-bit, a multiprocessor or compute unit
    shared_memory_in_all: int  # bytes, a multiprocessor or compute unit


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024, 65536, 164 * 1024),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 99 * 1024, 65536, 100 * 1024),  # for the table's default entries
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, 65536, 228 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024, 65536, 228 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, 4 * 512 * 64, 64 * 1024),
}
HEAD_SIZES = (32, 64, 128, 256)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GROUPED = ("causal", "decode", "window", "capped", "sinks", "packed")
CONTEXTS = ("plain", "padded", "biased", "bank", "tasks", *GROUPED)
PRODUCTS = {"forward": 2, "queries": 3, "keys": 4, "sink": 0, "merge": 2, "prefix-queries": 3}
LEGEND = """
res: programs a multiprocessor. ahead: copies under way while the loop with the fewest computes. MFLOP of products, KB
loaded and thousands of exponentials are those of a tile of queries x context keys (merge, prefix-queries: x prefix
rows). KB, shared memory and registers are a program's, spills a thread's."""
MAY_NOT_SPILL = {("sm_90", D) for D in (32, 64, 128)}  # in bf16
# Bytes a thread, by context: one pointer (capped: on Triton 3.6), or what masks of N x M need.
MAY_SPILL_A_LITTLE = {"biased": 64, "packed": 8, "capped": 8}


@dataclass(frozen=True)
class Row:
    """One compiled kernel.

    Counts of work are those of one tile of queries against one tile of context keys; of the prefix in kernels that read
    no context.
    """

    target: str
    dtype: str
    head_size: int
    context: str
    kernel: str
    blocks: str  # queries x keys x prefix; 0 keys: it reads no context
    warps: int
    stages: int
    registers: int = 0  # a thread
    spilled: int = 0  # bytes a thread
    shared: int = 0  # bytes a program
    resident: int = 0  # programs a multiprocessor, as far as registers and shared memory allow
    flops: int = 0  # of matrix products
    loaded: int = 0  # bytes of the side that is walked over
    exponentials: int = 0  # and as many hyperbolic tangents in a tile of the prefix
    in_flight: int = -1  # copies that the loop with the fewest leaves under way while it computes; -1: no such loop
    error: str = ""

    @property
    def fault(self) -> str:
        """What is wrong; empty: nothing."""
        if self.error:
            return self.error
        if self.shared > TARGETS[self.target].shared_memory:
            return f"{self.shared} bytes of shared memory, {TARGETS[self.target].shared_memory} are there"
        never = self.dtype == "bf16" and (self.target, self.head_size) in MAY_NOT_SPILL
        if never and self.spilled > MAY_SPILL_A_LITTLE.get(self.context, 0):
            return f"{self.spilled} bytes spilled"
        return ""


class AbsentDriver:
    """Stands in for the driver of a GPU that is absent; every target is a device of its own."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name].gpu

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.name)

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def example(dtype: torch.dtype, head_size: int, context: str) -> PrefixAttentionCall:
    """A training step's call, with shapes and without numbers."""
    B, N, P = (64, 1, 512) if context == "decode" else (8, 512, 60)
    shape = Shape(
        *(context, B, 32, 8 if context in GROUPED else 32, N, head_size, P),
        is_causal=context in GROUPED and context != "decode",
        bias=context == "biased",
        padding=0.25 if context == "padded" else 0.0,
        tasks=4 if context in ("bank", "tasks") else 1,
    )
    call = inputs(shape, dtype=dtype, device="meta").call(shape)
    if call.prefix_index is None:
        scalar = torch.empty((), device="meta")
        bias = torch.empty(1, 32, N, P, device="meta") if context == "biased" else None
        sink = torch.empty(32, device="meta") if context == "sinks" else None
        call = replace(call, gate_alpha=scalar, gate_tau=scalar, prefix_bias=bias, sink=sink)
        if context in ("window", "capped", "sinks"):
            call = replace(call, window_left=127, softcap=50.0 if context == "capped" else None)
        return packed(call) if context == "packed" else call
    T = 1 if context == "bank" else 4
    names = ("prefix_key", "prefix_value", "U_key", "V_key", "U_value", "V_value")
    of_bank = {name: getattr(call, name)[:T] for name in names}
    scalars = torch.empty(T, 1, device="meta")
    lengths = torch.empty(T, dtype=torch.int32, device="meta")
    return replace(call, **of_bank, prefix_length=lengths, gate="sigmoid", gate_alpha=scalars, gate_tau=scalars)


def packed(call: PrefixAttentionCall) -> PrefixAttentionCall:
    """The call with its samples as packed sequences."""
    B, N, M = call.query.shape[0], call.query.shape[2], call.key.shape[2]
    rows = {name: getattr(call, name).transpose(0, 1).flatten(1, 2)[None] for name in ("query", "key", "value")}
    offsets = torch.empty(B + 1, dtype=torch.int32, device=call.query.device)
    return replace(call, **rows, cu_seqlens_query=offsets, cu_seqlens_key=offsets, max_seqlen_query=N, max_seqlen_key=M)


def launches(call: PrefixAttentionCall) -> Iterator[tuple[str, Launch]]:
    """The launches of a training step by name, and those of a step whose context another backend computes."""
    outputs = forward.empty_outputs(call)
    as_seen, folding = folded(call)
    yield from (("fold", launch) for launch in folding)
    if call.query.shape[2] == 1:
        yield "merge", prefix_forward.launch(as_seen, *outputs)
        return
    frozen = {"gate_alpha", "gate_tau"} if call.prefix_index is not None else set()
    gradients = backward.rooms(call, [name for name in trainable(call) if name not in frozen])
    yield "forward", forward.launch(as_seen, *outputs)
    _, *others = backward.launches(call, *outputs, outputs[0], gradients)
    yield from zip(("queries", "keys", "prefix", "reweighting", "sink"), others)
    if call.is_packed:
        return
    yield "merge", prefix_forward.launch(as_seen, *outputs)
    added_to = gradients["query"]
    _, queries = prefix_part.launches(call, *outputs, outputs[0], added_to, gradients={})
    yield "prefix-queries", queries


def report(target: str, dtype: str, head_size: int, context: str) -> list[Row]:
    """The rows of one configuration."""
    triton.runtime.driver.set_active(AbsentDriver(target))
    rows = []
    for kernel, launch in launches(example(DTYPES[dtype], head_size, context)):
        variant = launch.arguments.get("variant")
        blocks, work = "", {}
        if variant is not None:
            N, M, P = (block.value for block in (variant.BLOCK_N, variant.BLOCK_M, variant.BLOCK_P))
            blocks = f"{N}x{M}x{P}"
            keys, element = (M, DTYPES[dtype].itemsize) if M else (P, 4)
            work = {
                "flops": PRODUCTS[kernel] * 2 * N * keys * head_size,
                "loaded": 2 * (N if kernel == "keys" else keys) * head_size * element,
                "exponentials": N * keys,
            }
        shape = {"target": target, "dtype": dtype, "head_size": head_size, "context": context, "kernel": kernel}
        shape |= {"blocks": blocks, "warps": launch.options["num_warps"], "stages": launch.options["num_stages"]}
        try:
            compiled = launch.compile()
        except Exception as error:  # whatever a compiler may raise is a row of the report
            rows.append(Row(**shape, error=f"{type(error).__name__}: {error}".splitlines()[0]))
            continue
        loops = in_flight(compiled.asm["ttgir"])
        found = {**resources(compiled, TARGETS[target]), "in_flight": min(loops, default=-1)}
        rows.append(Row(**shape, **work, **found))
    return rows


def resources(compiled: Any, target: Target) -> dict[str, int]:
    if target.gpu.backend == "cuda":
        registers, spilled = _from_cubin(compiled.asm["cubin"])
    else:
        text = compiled.asm["amdgcn"]
        registers, spilled = _number(r"\.vgpr_count:\s*(\d+)", text), 4 * _number(r"\.vgpr_spill_count:\s*(\d+)", text)
    threads = compiled.metadata.num_warps * target.gpu.warp_size
    shared = compiled.metadata.shared
    resident = target.registers // (threads * max(registers, 1))
    if shared:
        resident = min(resident, target.shared_memory_in_all // (shared + 1024))
    return {"registers": registers, "spilled": spilled, "shared": shared, "resident": resident}


def in_flight(ttgir: str) -> list[int]:
    """Of each innermost loop with matrix products, how many copies may be under way while it computes.

    That is what its waits leave unfinished: 0 where all it has asked for is waited for at once, or nothing is copied
    ahead.
    """
    found: list[int] = []
    blocks: list[dict[str, Any]] = []
    for line in ttgir.splitlines():
        if re.match(r"\s*}", line) and blocks:
            ended = blocks.pop()
            if ended["loop"] and ended["products"] and not ended["inner"]:
                found.append(min(ended["waits"], default=0))
            if blocks:
                blocks[-1]["inner"] |= ended["loop"] or ended["inner"]
                if not ended["loop"]:  # a branch is part of the loop around it
                    blocks[-1]["products"] |= ended["products"]
                    blocks[-1]["waits"] += ended["waits"]
        if blocks:
            blocks[-1]["products"] |= bool(re.search(r"\b(tt\.dot|warp_group_dot) ", line))
            blocks[-1]["waits"] += map(int, re.findall(r"async_wait .*?num = (\d+)", line))
        if re.search(r"{\s*(loc\(.*\))?$", line):
            loop = bool(re.search(r"\bscf\.(for|while)\b", line))
            blocks.append({"loop": loop, "products": False, "inner": False, "waits": []})
    return found


def _from_cubin(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text) + _number(r"LOCAL:(\d+)", text)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"nothing like {pattern} in the compiler's report")
    return int(match[1])


def table(rows: list[Row]) -> str:
    """Rows as text, at most 120 columns wide."""
    titles = ("target", "dtype", "D", "context", "kernel", "blocks", "warps", "stages", "regs", "spill", "shared")
    titles += ("res", "ahead", "MFLOP", "KB", "kEXP", "")
    cells = [
        (
            *(row.target, row.dtype, row.head_size, row.context, row.kernel, row.blocks, row.warps, row.stages),
            *(row.registers, row.spilled, row.shared, row.resident, "" if row.in_flight < 0 else row.in_flight),
            *(f"{row.flops / 1e6:.1f}", f"{row.loaded / 1024:.0f}", f"{row.exponentials / 1e3:.0f}", row.fault),
        )
        for row in rows
    ]
    lines = [titles, *[tuple(map(str, line)) for line in cells]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    return "\n".join(" ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--head-size", nargs="+", type=int, default=list(HEAD_SIZES), metavar="D")
    parser.add_argument("--context", nargs="+", choices=CONTEXTS, default=list(CONTEXTS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled; unset it")

    jobs = [
        (target, dtype, head_size, context)
        for target in options.target
        for dtype in options.dtype
        for head_size in options.head_size
        for context in options.context
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = [row for rows in pool.map(report, *zip(*jobs)) for row in rows]
    print(table(rows))
    print(LEGEND)
    if options.json:
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        lines = ",\n".join(json.dumps(asdict(row)) for row in rows)  # a row a line, so that a change shows which
        options.json.write_text(f'{{"versions": {json.dumps(versions)}, "rows": [\n{lines}\n]}}\n')
    faults = [row for row in rows if row.fault]
    print(f"{len(rows)} kernels, {len(faults)} with a fault, {sum(row.spilled > 0 for row in rows)} that spill")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
