"""Finds out why a kernel is wrong on the GPU at hand, after `plans.smoke` has failed.

    python -m qtuning_fast.bench.plans.diagnose --out FILE

First it keeps the compiler's output (TTGIR, PTX) and runs small steps under compute-sanitizer. Then it runs case after
case, from one tile of one head to the shape that failed, each in a process of its own, so that a broken CUDA context
does not hide the next case, and for a limited time. The smallest case that fails is tried with other blocks. The exit
status is 1 if something is wrong; if not, the plan goes on.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from qtuning_fast.bench import shapes
from qtuning_fast.bench.accuracy import verdict
from qtuning_fast.bench.measure import apart, default_device, default_dtype
from qtuning_fast.bench.plans import memcheck
from qtuning_fast.bench.plans.smoke import step, summary
from qtuning_fast.bench.plans.triton_cache import settle
from qtuning_fast.bench.predictions import compile_report
from qtuning_fast.bench.rows.command import Command
from qtuning_fast.bench.shapes import BERT_BASE, TINY, Shape
from qtuning_fast.bench.timing import first_line
from qtuning_fast.kernels.blocks import DIRECTIONS, blocks_for, instead
from qtuning_fast.kernels.target import INTERPRETED, current_target

CASE_SECONDS = 40.0  # after which a case hangs
ONE_TILE = Shape("one tile", B=1, Hq=1, Hkv=1, N=16, D=64, P=16)
CASES = (  # the smallest first; each adds one thing
    ONE_TILE,
    replace(ONE_TILE, name="several tiles of keys", context=200),
    replace(ONE_TILE, name="several tiles of queries", N=200),
    replace(ONE_TILE, name="a long prefix", P=60),
    replace(ONE_TILE, name="sizes that no tile divides", N=77, P=37),
    replace(ONE_TILE, name="several heads and samples", B=3, Hq=4, Hkv=4),
    replace(ONE_TILE, name="grouped heads", Hq=4, Hkv=2),
    replace(ONE_TILE, name="causal", N=200, is_causal=True),
    replace(ONE_TILE, name="padding", B=4, N=77, padding=0.25),
    replace(ONE_TILE, name="head size 32", D=32),
    replace(ONE_TILE, name="head size 128", D=128),
    BERT_BASE,
)


def variants() -> Iterator[tuple[str, dict[str, int]]]:
    """Simpler blocks, which avoid features that a compiler may have got wrong."""
    yield "one stage", {"stages": 1}
    yield "four warps", {"warps": 4}
    yield "tiles of 32", {"queries": 32, "keys": 32, "prefix": 16, "warps": 4, "stages": 1}


def with_blocks(changes: dict[str, int], shape: Shape, device: str) -> Any:
    """The errors of a step in which all directions have changed blocks."""
    settle()
    with ExitStack() as stack:
        for direction in DIRECTIONS if changes else ():
            known = blocks_for(current_target(), default_dtype(device).itemsize, shape.D, direction)
            new = {name: value if getattr(known, name) else 0 for name, value in changes.items()}
            stack.enter_context(instead(replace(known, **new)))
        return step(shape, "fused", device)


def limited(function: Callable[..., Any], *arguments: Any, seconds: float = CASE_SECONDS) -> Any:
    """Calls a function in a process of its own, which is killed if it takes too long.

    Raises:
        RuntimeError: what it raised, that its process died, or that it took too long.
    """
    context = apart()
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        if not here.poll(seconds):
            raise RuntimeError(f"not through after {seconds:.0f} s")
        result, error = here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"its process ended with status {process.exitcode}") from None
    finally:
        process.kill()
        process.join(1)
    if error:
        raise RuntimeError(error)
    return result


def _send(there: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        there.send((function(*arguments), ""))
    except Exception as error:  # of the kernel or of the compiler
        there.send((None, first_line(error)))


def outcome(changes: dict[str, int], shape: Shape, device: str) -> dict[str, Any]:
    """Runs a step in a process of its own. `wrong` is empty if it is right."""
    try:
        errors = limited(with_blocks, changes, shape, device)
    except Exception as error:  # of the kernel, the compiler, or the process that it took along
        return {"summary": f"{shape.name}: {first_line(error)}", "wrong": first_line(error)}
    wrong = verdict(errors, default_dtype(device))
    return {"summary": f"{shape.name}: {wrong or 'right'}; {summary(errors)}", "wrong": wrong, "errors": errors}


def compiled(shape: Shape) -> dict[str, dict[str, str]]:
    """TTGIR and PTX of each kernel of a step, by name."""
    settle()
    call = shapes.inputs(shape, dtype=torch.bfloat16, device="meta").call(shape)
    found = {}
    for name, launch in compile_report.launches(call):
        made = launch.compile()
        found[name] = {kind: made.asm[kind] for kind in ("ttgir", "ptx") if kind in made.asm}
    return found


def main(arguments: list[str] | None = None) -> int:
    line, device = Command(__spec__.name, __doc__, dry_run="a tiny shape"), default_device()
    options = line.parse(arguments)
    results = line.results(options)
    if not INTERPRETED:
        try:
            results.add("compiled", {"summary": "TTGIR and PTX", "each": limited(compiled, BERT_BASE)})
        except RuntimeError as error:
            results.fail("compiled", str(error))
    for tool, found in memcheck.sanitized(list(memcheck.SMALL)):
        results.add(tool, found)
        print(found["summary"], flush=True)
    failed: Shape | None = None
    for shape in (TINY,) if options.dry_run else CASES:
        found = outcome({}, shape, device)
        results.add(shape.name, found | {"shape": asdict(shape)})
        print(found["summary"], flush=True)
        failed = failed or (shape if found["wrong"] else None)
    for name, changes in variants() if failed and not INTERPRETED else ():
        found = outcome(changes, failed, device)
        results.add(f"{failed.name}, {name}", found | {"blocks": changes})
        print(f"{name}: {found['summary']}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
