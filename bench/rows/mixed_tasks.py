"""Batches of several tasks: a whole forward pass when each sample has a task of its own, beside one task for all.

    python -m qtuning_fast.bench.rows.mixed_tasks

The adapters are random ones, and so are the model's weights. `one-task` has the task set, `named-1`, `-2` and `-16`
name so many tasks in no order, `separate-16` runs the same samples task by task. Before anything is timed the mixed
logits are compared with the separate ones.
"""

import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.bench.measure import default_device
from qtuning_fast.bench.rows.architectures import FIRST_WORD, MODELS, base_model
from qtuning_fast.bench.rows.command import Command
from qtuning_fast.bench.timing import Call, Measurement, compare
from qtuning_fast.method.adapter import TaskAdapter
from qtuning_fast.method.prompts import KEY_STD, VALUE_STD

ROUNDS, DRY_ROUNDS = 20, 2
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25}  # of the largest difference of two logits, which are about 1


@dataclass(frozen=True)
class Batch:
    """A batch that is served at once."""

    model: str
    samples: int
    tokens: int
    rows: int  # of each prefix
    tasks: int


ON_CPU = Batch("bert-cpu", samples=64, tokens=64, rows=40, tasks=16)
ON_GPU = Batch("bert-base", samples=64, tokens=128, rows=40, tasks=16)
TINY = Batch("bert-tiny", samples=8, tokens=6, rows=5, tasks=4)


def random_adapter(model: QTuningModel, name: str, rows: int, generator: torch.Generator) -> TaskAdapter:
    """An adapter with two classes and gates near those of a new one."""

    def normal(*sizes: int, std: float) -> Tensor:
        return std * torch.randn(sizes, generator=generator)

    shapes = [model.backbone.injector.layers[index].shape for index in model.layer_indices]
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


def model_with_tasks(size: Batch, device: str) -> QTuningModel:
    model = QTuningModel(base_model(MODELS[size.model], device), QTuningConfig()).eval()
    generator = torch.Generator().manual_seed(0)
    for number in range(size.tasks):
        model.add_task(random_adapter(model, f"task-{number}", size.rows, generator))
    return model


def random_batch(size: Batch, model: QTuningModel) -> dict[str, Tensor]:
    ids = torch.randint(FIRST_WORD, model.backbone.vocabulary.num_embeddings, (size.samples, size.tokens))
    return {name: x.to(model.device) for name, x in (("input_ids", ids), ("attention_mask", torch.ones_like(ids)))}


def in_no_order(model: QTuningModel, samples: int, tasks: int) -> list[str]:
    """The name of a task for each sample, shuffled; each task as often as any other."""
    names = [model.tasks[number % tasks] for number in range(samples)]
    random.Random(0).shuffle(names)
    return names


def named(model: QTuningModel, batch: dict[str, Tensor], names: list[str]) -> Tensor:
    return model(**batch, task_names=names).logits


def separate(model: QTuningModel, batch: dict[str, Tensor], names: list[str]) -> Tensor:
    """The same logits, task by task."""
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
    if not error < TOLERANCE[model.base_model.dtype]:
        raise AssertionError(f"mixed logits are not those of the tasks by themselves: off by {error:.2g}")
    calls: dict[str, Call] = {"one-task": partial(one_task, model, batch)}
    for tasks in (1, 2, len(model.tasks)):
        calls[f"named-{tasks}"] = partial(named, model, batch, in_no_order(model, samples, tasks))
    calls[f"separate-{len(model.tasks)}"] = partial(separate, model, batch, mixed)
    setups: dict[str, Callable[[], list[Call]]] = {name: partial(list, [call]) for name, call in calls.items()}
    return compare(setups, device=model.device, rounds=rounds, graphs=False)


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
    line, device = Command(__spec__.name, __doc__, dry_run="a tiny model, to see that it runs"), default_device()
    options = line.parse(arguments)
    size = TINY if options.dry_run else ON_GPU if device == "cuda" else ON_CPU
    results, model = line.results(options), model_with_tasks(size, device)
    times = measure(model, random_batch(size, model), DRY_ROUNDS if options.dry_run else ROUNDS)
    rows = {name: asdict(each) for name, each in times.items()}
    results.add("forward", {"sizes": asdict(size), "of": MODELS[size.model].of, "rows": rows})
    print(f"{size.samples} samples of {size.tokens} tokens, {size.rows} prefix rows\n{table(times)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
