"""Batches of several tasks: a whole forward pass when each sample has a task of its own, beside one task for all.

    python -m qtuning_fast.bench.mixed_tasks --out FILE

The model is all-MiniLM-L6-v2, the adapters are random ones of 40 rows. `one-task` has the task set, `named-1`, `-2` and
`-16` name so many tasks in no order, `separate-16` runs the same samples task by task. Before anything is timed the
mixed logits are compared with the separate ones.
"""

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.adapter import TaskAdapter
from qtuning_fast.bench.results import RUNS, Results
from qtuning_fast.bench.timing import Call, Measurement, compare
from qtuning_fast.lifelong.base_models import MINILM, load_base_model
from qtuning_fast.nn.prefix import KEY_STD, VALUE_STD

ROUNDS = 20
SAMPLES, TOKENS, ROWS, TASKS = 64, 64, 40, 16
FIRST_WORD = 1000  # of the vocabulary; before it stand special tokens
TOLERANCE = 1e-4  # of the largest difference of two logits, which are about 1


def random_adapter(model: QTuningModel, name: str, rows: int, generator: torch.Generator) -> TaskAdapter:
    """An adapter with two classes, its gates near those of a new one."""

    def normal(*sizes: int, std: float) -> Tensor:
        return std * torch.randn(sizes, generator=generator)

    shapes = [model.attention.layers[index].shape for index in model.layer_indices]
    return TaskAdapter(
        name=name,
        label_names=("no", "yes"),
        keys=tuple(normal(s.num_kv_heads, rows, s.key_size, std=KEY_STD) for s in shapes),
        values=tuple(normal(s.num_kv_heads, rows, s.value_size, std=VALUE_STD) for s in shapes),
        gate="tanh",
        alphas=tuple(1 + normal(std=0.1) for _ in shapes),
        taus=tuple(1 + normal(std=0.1) for _ in shapes),
        head_weight=normal(2, model.hidden_size, std=model.hidden_size**-0.5),
        head_bias=normal(2, std=0.1),
    )


def model_with_tasks(base_model: Any, rows: int, tasks: int) -> QTuningModel:
    model = QTuningModel(base_model, QTuningConfig()).eval()
    generator = torch.Generator().manual_seed(0)
    for number in range(tasks):
        model.add_task(random_adapter(model, f"task-{number}", rows, generator))
    return model


def random_batch(model: QTuningModel, samples: int, tokens: int) -> dict[str, Tensor]:
    ids = torch.randint(FIRST_WORD, model.vocabulary.num_embeddings, (samples, tokens))
    return {name: x.to(model.device) for name, x in (("input_ids", ids), ("attention_mask", torch.ones_like(ids)))}


def in_no_order(model: QTuningModel, samples: int, tasks: int) -> list[str]:
    """A task's name for each sample, each as often as any other."""
    names = [model.tasks[number % tasks] for number in range(samples)]
    random.Random(0).shuffle(names)
    return names


def named(model: QTuningModel, batch: dict[str, Tensor], names: list[str]) -> Tensor:
    return model(**batch, task_names=names).logits


def separate(model: QTuningModel, batch: dict[str, Tensor], names: list[str]) -> Tensor:
    """The same, task by task."""
    logits = torch.empty(len(names), 2, device=model.device)
    for name in dict.fromkeys(names):
        rows = torch.tensor([each == name for each in names], device=model.device)
        model.set_task(name)
        logits[rows] = model(**{key: x[rows] for key, x in batch.items()}).logits
    return logits


def one_task(model: QTuningModel, batch: dict[str, Tensor]) -> Tensor:
    if model.active_task != model.tasks[0]:
        model.set_task(model.tasks[0])
    return model(**batch).logits


def measure(model: QTuningModel, batch: dict[str, Tensor], rounds: int) -> dict[str, Measurement]:
    samples = len(batch["input_ids"])
    mixed = in_no_order(model, samples, len(model.tasks))
    error = (named(model, batch, mixed) - separate(model, batch, mixed)).abs().max().item()
    if not error < TOLERANCE:
        raise AssertionError(f"mixed logits are not those of the tasks by themselves: off by {error:.2g}")
    calls: dict[str, Call] = {"one-task": partial(one_task, model, batch)}
    for tasks in (1, 2, len(model.tasks)):
        calls[f"named-{tasks}"] = partial(named, model, batch, in_no_order(model, samples, tasks))
    calls[f"separate-{len(model.tasks)}"] = partial(separate, model, batch, mixed)
    setups: dict[str, Callable[[], list[Call]]] = {name: partial(list, [call]) for name, call in calls.items()}
    return compare(setups, device=model.device, rounds=rounds)


def table(times: dict[str, Measurement]) -> str:
    base = times["one-task"].eager
    lines = [f"  {'':<14}{'ms':>10}{'±iqr':>10}{'of one-task':>14}"]
    for name, measurement in times.items():
        timing = measurement.eager
        if timing is None or base is None:
            lines.append(f"  {name:<14}{measurement.error or '-'}"[:120])
            continue
        lines.append(f"  {name:<14}{timing.median:>10.2f}{timing.spread:>10.2f}{timing.median / base.median:>14.2f}")
    return "\n".join(lines)


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MINILM, help="a folder or a name, as qtuning-fast run takes it")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=RUNS / "mixed_tasks.json", metavar="FILE")
    options = parser.parse_args(arguments)
    base_model, _ = load_base_model(options.model)
    model = model_with_tasks(base_model, ROWS, TASKS)
    batch = random_batch(model, SAMPLES, TOKENS)
    given = sys.argv[1:] if arguments is None else arguments
    results = Results("mixed_tasks", options.out, base_model.device.type, given)
    times = measure(model, batch, options.rounds)
    sizes = {"samples": SAMPLES, "tokens": TOKENS, "rows": ROWS, "tasks": TASKS}
    rows = {name: asdict(each) for name, each in times.items()}
    results.add("forward", {"model": options.model, "sizes": sizes, "rows": rows})
    print(f"{results.heading()}\n{SAMPLES} samples of {TOKENS} tokens, {ROWS} prefix rows\n{table(times)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
