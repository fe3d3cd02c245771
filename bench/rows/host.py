"""What a step costs the host: all that happens between the caller and the GPU, measured without a GPU.

    python -m qtuning_fast.bench.rows.host
    python -m qtuning_fast.bench.rows.host --quick --out FILE

Kernels are launched through Triton's own binder, cache and launcher; stand-ins replace only the compiled kernel and the
C function that would hand it to the GPU. A step on a GPU has these costs in addition: that C function (a few
microseconds a launch), CUDA's allocator in place of the CPU's, the guard that makes a tensor's device the current one,
and autograd's hand-over to the thread that runs a device's backward passes. The same holds for the peers, except that
they do compute, on tensors so small that this takes a few microseconds.

What a call costs a CPU before it computes is measured with one query and one key over a prefix of one row: "native, one
query" and "reference, one query".

A row is the median of rounds in which all take turns, in one thread. The stages are parts of our step, timed by
themselves; "the operator and autograd" is what the step takes beyond them.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from qtuning_fast.attention import composed, dispatch
from qtuning_fast.attention.arguments import trainable
from qtuning_fast.attention.composed.vendors import Vendor
from qtuning_fast.bench import shapes
from qtuning_fast.bench.peers import PEERS
from qtuning_fast.bench.predictions.compile_report import AbsentDriver
from qtuning_fast.bench.rows.command import Command
from qtuning_fast.bench.shapes import PrefixAttentionCall
from qtuning_fast.bench.timing import Call, Turns, round_robin, timing_of
from qtuning_fast.kernels import backward, forward, launch, prefix_part
from qtuning_fast.kernels.target import INTERPRETED

CPU = torch.device("cpu")
TARGET = "sm_90"
SHAPE = replace(shapes.BERT_BASE, name="bert-base, one sample", B=1)  # the host's work does not grow with a batch
ONE_QUERY = replace(SHAPE, N=1, P=1)
STAGES = ("checks", "forward pass", "backward pass")
TURNS = Turns(rounds=100, sample_ms=10.0)
QUICK = Turns(rounds=20, sample_ms=10.0)
REHEARSED = Turns(rounds=1, sample_ms=0.0)


class HostDriver(AbsentDriver):
    """A driver that computes its answer at each call, as the real one does."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self.name.removeprefix("sm_")), 32)


class Launcher(CudaLauncher):  # type: ignore[misc]
    """Triton's launcher with a C function that does nothing."""

    launch = staticmethod(lambda *arguments: None)
    gsan_enabled = launch_cooperative_grid = launch_pdl = False
    num_ctas = 1
    global_scratch_size = profile_scratch_size = 0
    global_scratch_align = profile_scratch_align = 1
    arg_annotations = kernel_signature = None

    def __init__(self) -> None:
        pass


class Kernel(CompiledKernel):  # type: ignore[misc]
    """A kernel that counts as compiled and loaded."""

    def __init__(self, function: JITFunction) -> None:
        self.name, self.src = function.__name__, ASTSource.__new__(ASTSource)
        self.src.fn = function
        self.module = self.function = 1  # handles
        self.packed_metadata = self._module_pid = None
        self._run = Launcher()


@contextmanager
def without_gpu() -> Iterator[None]:
    """Makes kernel launches end where the GPU would begin, and tensors on the CPU pass for a GPU's."""

    def compiled(self: Any, key: Any, signature: Any, device: int, *others: Any, **named: Any) -> Kernel:
        return self.device_caches[device][0].setdefault(key, Kernel(self))

    def asked_and_overruled(call: PrefixAttentionCall) -> None:
        fused.why_not(call)

    fused = dispatch.BACKENDS["fused"]
    context = Vendor("nothing", lambda call: None, _no_context, _no_context_gradients, True, True)
    with (
        mock.patch.object(JITFunction, "_do_compile", compiled),
        mock.patch.dict(dispatch.BACKENDS, fused=replace(fused, why_not=asked_and_overruled)),
        mock.patch.object(composed, "prefix_part_for", lambda call: prefix_part),
        mock.patch.object(composed, "vendor_for", lambda call: context),
    ):
        before = triton.runtime.driver._active
        triton.runtime.driver.set_active(HostDriver(TARGET))
        try:
            yield
        finally:
            triton.runtime.driver._active = before


def _no_context(x: Any) -> tuple[Tensor, Tensor]:
    """Returns what a vendor returns, without computing it."""
    B, H, N, _ = x.query.shape
    return torch.empty_like(x.query), x.query.new_empty(B, H, N, dtype=torch.float32)


def _no_context_gradients(x: Any, *results: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(y) for y in (x.query, x.key, x.value))


def calls() -> dict[str, Call]:
    """What is timed, by name: the steps of all, then the stages of ours."""
    x = shapes.inputs(SHAPE, dtype=torch.bfloat16, device=CPU).tracked()
    tiny = shapes.inputs(replace(shapes.TINY, B=1), dtype=torch.float32, device=CPU).tracked()
    found: dict[str, Call] = {}
    for backend in ("fused", "composed"):
        prepared = PEERS[backend].prepare(SHAPE, x)
        compiled = replace(prepared, forward=torch.compile(prepared.forward, fullgraph=True))
        found[f"{backend}, forward"] = prepared.forward
        found[f"{backend}, step"] = partial(prepared.step, x.d_output)
        found[f"{backend}, compiled step"] = partial(compiled.step, x.d_output)
    one = shapes.inputs(ONE_QUERY, dtype=torch.float32, device=CPU).tracked()
    for backend in ("native", "reference"):
        prepared = PEERS[backend].prepare(ONE_QUERY, one)
        found[f"{backend}, one query, forward"] = prepared.forward
        found[f"{backend}, one query, step"] = partial(prepared.step, one.d_output)
    leaves = [tiny.query, tiny.key, tiny.value]
    for name, attend in {
        "custom operator": nothing,
        "autograd.Function": _Nothing.apply,
        "sdpa": scaled_dot_product_attention,
        "sdpa, compiled": torch.compile(scaled_dot_product_attention, fullgraph=True),
    }.items():
        found[name] = partial(_step, attend, leaves, tiny.d_output)
    return found | stages(x)


def stages(x: shapes.Inputs) -> dict[str, Call]:
    """Parts of a fused step: STAGES, and both passes as they are if no earlier pass can be run again."""
    inputs = x.detached()
    call = inputs.call(SHAPE)
    passes = {
        "forward pass": partial(forward.forward, call),
        "backward pass": partial(backward.backward, call, *forward.forward(call), inputs.d_output, trainable(call)),
    }

    def checks() -> None:
        dispatch.choose(inputs.call(SHAPE), "fused")

    def built(run: Call) -> None:
        launch.enabled = False
        run()
        launch.enabled = True

    return {"checks": checks} | passes | {f"{name}, built": partial(built, run) for name, run in passes.items()}


@torch.library.custom_op("qtuning_fast_bench::nothing", mutates_args=())
def nothing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(query)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _no_gradients(ctx: Any, d_output: Tensor) -> tuple[Tensor, ...]:
    query, key, value = ctx.saved_tensors
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


nothing.register_autograd(_no_gradients, setup_context=_save)


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        _save(ctx, inputs, inputs[0])
        return torch.empty_like(inputs[0])

    backward = staticmethod(_no_gradients)


def _step(attend: Callable[..., Tensor], leaves: list[Tensor], d_output: Tensor) -> None:
    torch.autograd.grad(attend(*leaves), leaves, d_output)


def measure(turns: Turns) -> dict[str, Any]:
    """Microseconds a call, or the error, by row and stage."""
    torch.set_num_threads(1)
    with without_gpu():
        runs = calls()
        for run in (*runs.values(), *runs.values()):
            run()
        samples, errors = round_robin(runs, thread_milliseconds, turns)
    return {name: {"error": errors[name]} if name in errors else _microseconds(samples[name]) for name in runs}


def _microseconds(milliseconds: list[float]) -> dict[str, float]:
    return asdict(timing_of([1e3 * ms for ms in milliseconds]))


def thread_milliseconds(run: Call, times: int) -> float:
    """By the thread's own clock, which ignores other programs."""
    start = time.thread_time()
    for _ in range(times):
        run()
    return (time.thread_time() - start) * 1e3


def table(rows: dict[str, Any]) -> str:
    """Rows and stages as text."""
    lines = [f"{'µs':<32}{'median':>8}{'±iqr':>8}{'fastest':>9}"]
    for name, row in rows.items():
        if name == STAGES[0]:
            lines.append("stages of a fused step")
        cells = row.get("error") or "{median:>8.1f}{spread:>8.1f}{fastest:>9.1f}".format(**row)
        lines.append(f"  {name:<30}{cells}"[:120])
    medians = [rows[name].get("median", math.nan) for name in ("fused, step", *STAGES)]
    return "\n".join([*lines, f"  {'the operator and autograd':<30}{medians[0] - sum(medians[1:]):>8.1f}"])


def main(arguments: list[str] | None = None) -> int:
    line = Command(__spec__.name, __doc__, dry_run="one round, to see that it runs", quick=True)
    options = line.parse(arguments)
    if INTERPRETED:
        line.error("TRITON_INTERPRET is set, and nothing would be launched as on a GPU; unset it")
    results = line.results(options, "cpu")
    rows = measure(REHEARSED if options.dry_run else QUICK if options.quick else TURNS)
    results.add(SHAPE.name, {"title": str(SHAPE), "rows": rows})
    print(table(rows))
    for name, row in rows.items():
        if "error" in row:
            results.fail(name, row["error"])
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
