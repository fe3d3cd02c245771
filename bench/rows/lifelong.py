"""Two hundred tasks in a row: does a task cost more, the more tasks have gone by?

    python -m qtuning_fast.bench.rows.lifelong                       both methods
    python -m qtuning_fast.bench.rows.lifelong --method queue --tasks 50
    python -m qtuning_fast.bench.rows.lifelong --dry-run             a tiny model and a few tasks

`queue` is this library as it comes: a queue of five prompts, the shared prompt, the gate, memory retention. Each task
is saved as soon as it is finished, and its adapter then lies on disk only.

`accumulate` keeps every prompt: the method `progressive-prompts` (Razdaibiedina et al., ICLR 2023, arXiv 2301.12314),
whose prefix is k prompts long in task k. What differs from theirs: prompts are keys and values in each layer and not
embeddings, which would take more (every layer would compute them). Nothing of it is saved, and earlier adapters are
dropped, since the newest one holds their prompts.

The base model is a BERT with random weights; tokens and labels are random. For each task:

- *step*: forward, loss, backward and AdamW, by the host's clock; the median of a task's steps without the first ones.
  From the first eviction on, at task 6, the queue's loss holds the retention term, which takes a batch twice as large:
  so that is where flatness begins, and tasks 6 to 15 are what the last ten are held against.
- *anchor*: forward and backward of the base model alone, without a prompt, timed after each step in the same way. Where
  it grows the machine has slowed down, and not the method: *step/anchor* is the median of what a step takes of the
  anchor beside it.
- *between*: all that a task takes beside its steps: the queue and its eviction, the features that retention is held
  against (once per example, as `LifelongTrainer` does), the adapter, the save.
- *resident*: what the process holds at the end of a task's steps, after a garbage collection; on a GPU also what
  PyTorch's allocator has handed out then, and the most within the task. Each method has a process of its own.
"""

import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import timer as now  # seconds, of an idle device
from tqdm import tqdm
from transformers import BertConfig, BertModel

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.bench.measure import default_device, in_a_process
from qtuning_fast.bench.memory import resident_bytes
from qtuning_fast.bench.results import Results
from qtuning_fast.bench.rows.command import Command
from qtuning_fast.bench.timing import Call, host_milliseconds
from qtuning_fast.lifelong.methods import method_by_name
from qtuning_fast.method.adapter import RANDOM, VALIDATION, AdapterInfo

TASKS, STEPS = 200, 8
DRY_TASKS, DRY_STEPS = 7, 3
WARM_UP = 2  # steps of a task that are not counted: kernels are chosen, memory is found
BATCHES = 4  # of a task's examples, used in turn
RATE = 1e-3
WRITTEN_EVERY = 10  # tasks

WINDOW = 10  # tasks, of which medians are taken
EARLY = slice(5, 5 + WINDOW)  # tasks 6 to 15
LIMITS = {  # what the last ten tasks may take, of what the early ones took
    "step_ms": 1.05,
    "step_over_anchor": 1.05,  # the same, whatever the machine does
    "with_start_ms": 1.05,  # a step, and its share of choosing where the task starts
    "resident_bytes": 1.02,
    "device_bytes": 1.02,
    "device_peak_bytes": 1.02,
    "adapter_bytes": 1.02,
}
ALONGSIDE = ("anchor_ms", "between_seconds", "prefix_rows")  # compared, without a limit


@dataclass(frozen=True)
class Setting:
    """The base model, and the batches that it reads."""

    hidden: int
    layers: int
    heads: int
    samples: int
    tokens: int
    vocabulary: int = 30522

    def model(self) -> BertModel:
        sizes = {"hidden_size": self.hidden, "intermediate_size": 4 * self.hidden, "vocab_size": self.vocabulary}
        return BertModel(BertConfig(num_hidden_layers=self.layers, num_attention_heads=self.heads, **sizes))


ON_GPU = Setting(hidden=768, layers=12, heads=12, samples=32, tokens=128)  # BERT-base
ON_CPU = Setting(hidden=256, layers=4, heads=4, samples=8, tokens=32)
DRY = Setting(hidden=32, layers=2, heads=2, samples=2, tokens=8, vocabulary=100)


@dataclass(frozen=True)
class Method:
    about: str
    config: QTuningConfig
    saves: bool  # each finished task; otherwise the newest adapter is all that is kept
    start_from: str  # of each task, as `start_task` takes it


METHODS = {
    "queue": Method("a queue of five prompts, shared prompt, gate, retention", QTuningConfig(), True, VALIDATION),
    "accumulate": Method(
        "every prompt stays, as in Progressive Prompts",
        method_by_name("progressive-prompts").settings()[0],
        False,
        RANDOM,
    ),
}


@dataclass(frozen=True)
class TaskFigures:
    """The figures of one task; None: not known."""

    task: int  # from 1 on
    prefix_rows: int
    step_ms: float
    anchor_ms: float
    step_over_anchor: float
    with_start_ms: float
    between_seconds: float
    adapter_bytes: int
    adapters_in_memory_bytes: int  # after the save, of all tasks
    resident_bytes: int | None
    device_bytes: int | None
    device_peak_bytes: int | None


class Stream:
    """A model that learns task after task by one method.

    Args:
        method: one of METHODS.
        setting: the model and its batches.
        steps: of each task.
        device: "cpu" or "cuda"; on the latter the model computes in bfloat16, by autocast.
        folder: where finished tasks are saved.
    """

    def __init__(self, method: Method, setting: Setting, steps: int, device: str, folder: Path) -> None:
        torch.manual_seed(0)
        self.method, self.setting, self.steps, self.folder = method, setting, steps, folder
        self.on_gpu = device == "cuda"
        self.model = QTuningModel(setting.model().to(device), method.config).train()
        self.model.set_memory_limits(host_bytes=1)  # what lies on disk is dropped
        self.number = 0

    def next_task(self) -> TaskFigures:
        """Starts, trains and finishes one more task."""
        self.number += 1
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        examples = self._random_examples()
        began = now()
        batches = self._start(examples)
        started = now()
        figures = self._train(batches)
        figures["with_start_ms"] = figures["step_ms"] + 1e3 * (started - began) / self.steps
        trained = now()
        info = self._finish(batches)
        return TaskFigures(
            task=self.number,
            prefix_rows=info.prefix_rows,
            between_seconds=started - began + now() - trained,
            adapter_bytes=info.bytes,
            adapters_in_memory_bytes=self.model.adapters.bytes_in_memory,
            **figures,
        )

    # A task

    def _random_examples(self) -> dict[str, Tensor]:
        """All examples of a task in one batch."""
        count, device = BATCHES * self.setting.samples, self.model.device
        ids = torch.randint(self.setting.vocabulary, (count, self.setting.tokens), device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}

    def _start(self, examples: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """The task's batches, with the features that retention compares with, where retention is due."""
        model = self.model
        chooses = self.method.start_from == VALIDATION
        model.start_task(
            f"task-{self.number}",
            num_labels=2,
            start_from=self.method.start_from,
            examples=[examples] if chooses else None,
        )
        if model.retains_memory:
            inputs = {name: examples[name] for name in ("input_ids", "attention_mask")}
            with self._autocast():
                examples |= {"retention_features": model.features(inputs, task=model.tasks[-1])}
        parts = {name: tensor.split(self.setting.samples) for name, tensor in examples.items()}
        return [{name: tensors[batch] for name, tensors in parts.items()} for batch in range(BATCHES)]

    def _train(self, batches: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """Medians of a step and of the anchor, which take turns, without the first ones; and the memory held then."""
        step, anchor, task = self._training_step(batches), self._anchor(), self.model.active_task
        steps, anchors = [], []
        for _ in range(self.steps):
            steps.append(host_milliseconds(step, 1))
            self.model.set_task(None)
            anchors.append(host_milliseconds(anchor, 1))
            self.model.set_task(task)
        quotients = [one / other for one, other in zip(steps, anchors)]
        times = {"step_ms": steps, "anchor_ms": anchors, "step_over_anchor": quotients}
        return {name: statistics.median(values[WARM_UP:]) for name, values in times.items()} | self._held()

    def _training_step(self, batches: Sequence[dict[str, Tensor]]) -> Call:
        """Each call is a step, on the next batch."""
        optimizer = torch.optim.AdamW([each for each in self.model.parameters() if each.requires_grad], lr=RATE)
        count = 0

        def step() -> None:
            nonlocal count
            with self._autocast():
                loss = self.model(**batches[count % BATCHES]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            count += 1

        return step

    def _finish(self, batches: Sequence[dict[str, Tensor]]) -> AdapterInfo:
        """Finishes the task; returns what is known of its adapter."""
        model = self.model
        adapter = model.finish_task()
        if self.method.saves:
            model.record_statistics(adapter.name, batches)  # by which the next task finds the tasks like it
            model.save_pretrained(self.folder)
        else:
            for earlier in model.tasks[:-1]:
                model.remove_task(earlier)
        return adapter.info

    def _anchor(self) -> Call:
        """Forward and backward of the base model alone, down to its input; no task is set."""
        sizes = self.setting.samples, self.setting.tokens, self.setting.hidden
        x = torch.randn(sizes, device=self.model.device, requires_grad=True)

        def anchor() -> None:
            with self._autocast():
                hidden = self.model(inputs_embeds=x).last_hidden_state
            hidden.float().square().mean().backward()
            x.grad = None

        return anchor

    def _held(self) -> dict[str, int | None]:
        gc.collect()
        return {
            "resident_bytes": resident_bytes(),
            "device_bytes": torch.cuda.memory_allocated() if self.on_gpu else None,
            "device_peak_bytes": torch.cuda.max_memory_allocated() if self.on_gpu else None,
        }

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=self.on_gpu)


# What the figures say


def median_of(per_task: Sequence[TaskFigures], name: str) -> float | None:
    """The median of one figure over several tasks; None: not known."""
    values = [getattr(each, name) for each in per_task]
    return None if None in values else statistics.median(values)


def verdict(per_task: Sequence[TaskFigures]) -> dict[str, Any] | None:
    """Whether the last ten tasks take what tasks 6 to 15 took; None where there are too few tasks to tell.

    Returns:
        `ratios`: the median of the last ten over that of the early ones, by name. `limits`: the most that some of them
        may be. `flat`: whether they are.
    """
    if len(per_task) < EARLY.stop + WINDOW:
        return None
    ratios = {}
    for name in (*LIMITS, *ALONGSIDE):
        early, late = median_of(per_task[EARLY], name), median_of(per_task[-WINDOW:], name)
        if early and late:
            ratios[name] = late / early
    limits = {name: limit for name, limit in LIMITS.items() if name in ratios}
    return {"ratios": ratios, "limits": limits, "flat": {name: ratios[name] <= limits[name] for name in limits}}


def entry(method: Method, config: QTuningConfig, per_task: Sequence[TaskFigures], seconds: float) -> dict[str, Any]:
    return {
        "about": method.about,
        "config": config.to_dict(),
        "seconds": seconds,
        "verdict": verdict(per_task),
        "per_task": [asdict(each) for each in per_task],
    }


COLUMNS = {  # a heading, and the unit in which a figure stands below it
    "prefix_rows": ("rows", 1),
    "step_ms": ("step ms", 1),
    "step_over_anchor": ("step/anchor", 1),
    "with_start_ms": ("with start", 1),
    "between_seconds": ("between s", 1),
    "adapter_bytes": ("adapter KiB", 1 << 10),
    "resident_bytes": ("host MiB", 1 << 20),
    "device_bytes": ("device MiB", 1 << 20),
    "device_peak_bytes": ("peak MiB", 1 << 20),
}
DIGITS = {"prefix_rows": 0, "between_seconds": 3, "adapter_bytes": 1, "resident_bytes": 1, "device_bytes": 1}


def table(name: str, per_task: Sequence[TaskFigures]) -> str:
    """Medians over ten tasks at several places, or every task if there are few; and the verdict."""
    known = [column for column in COLUMNS if median_of(per_task, column) is not None]
    lines = [f"{name}: {METHODS[name].about}", _line("task", [COLUMNS[column][0] for column in known])]
    for tasks in windows(per_task):
        numbers = dict.fromkeys((tasks[0].task, tasks[-1].task))  # one where they are the same
        cells = [f"{median_of(tasks, each) / COLUMNS[each][1]:.{DIGITS.get(each, 2)}f}" for each in known]
        lines.append(_line("-".join(map(str, numbers)), cells))
    found = verdict(per_task)
    if found is None:
        return "\n".join([*lines, "  too few tasks for a verdict"])
    ratios, words = found["ratios"], {True: "flat", False: "grows", None: ""}
    lines.append(_line("ratio", [f"{ratios[each]:.3f}" if each in ratios else "-" for each in known]))
    return "\n".join([*lines, _line("", [words[found["flat"].get(each)] for each in known]).rstrip()])


def _line(first: str, cells: Sequence[str]) -> str:
    return f"  {first:<9}" + "".join(f"{cell:>12}" for cell in cells)


def windows(per_task: Sequence[TaskFigures]) -> list[Sequence[TaskFigures]]:
    """The first task, then groups of ten: those of the verdict and some between them. With few tasks, each task."""
    count = len(per_task)
    if count < EARLY.stop + WINDOW:
        return [per_task[number : number + 1] for number in range(count)]
    ends = range(50, count - WINDOW + 1, 50)
    return [per_task[:1], per_task[EARLY], *(per_task[end - WINDOW : end] for end in ends), per_task[-WINDOW:]]


def run(
    name: str, tasks: int, steps: int, setting: Setting, device: str, results: Results
) -> tuple[Results, list[TaskFigures]]:
    """Runs one method. It returns the results too, because another process has a copy of them."""
    method, per_task, began = METHODS[name], [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        stream = Stream(method, setting, steps, device, Path(folder))
        for number in tqdm(range(1, tasks + 1), desc=name, unit="task", disable=None):
            per_task.append(stream.next_task())
            if number % WRITTEN_EVERY == 0 or number == tasks:
                seconds = time.perf_counter() - began
                results.add(name, entry(method, stream.model.qtuning_config, per_task, seconds))
    return results, per_task


def main(arguments: list[str] | None = None) -> int:
    line = Command(__spec__.name, __doc__, dry_run="a tiny model on the CPU and a few tasks, to see that it runs")
    line.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    line.add_argument("--tasks", type=int, help=f"default {TASKS}")
    line.add_argument("--steps", type=int, help=f"of each task, {WARM_UP} of which do not count; default {STEPS}")
    options = line.parse(arguments)
    tasks = options.tasks or (DRY_TASKS if options.dry_run else TASKS)
    steps = options.steps or (DRY_STEPS if options.dry_run else STEPS)
    if steps <= WARM_UP:
        line.error(f"--steps is {steps}; it must be more than the {WARM_UP} that do not count")
    device = "cpu" if options.dry_run else default_device()
    setting = DRY if options.dry_run else ON_GPU if device == "cuda" else ON_CPU
    sizes = {"tasks": tasks, "steps": steps, "warm_up": WARM_UP, "batches": BATCHES}
    results = line.results(options, device, sizes=sizes | asdict(setting))
    model = f"BERT of {setting.layers} layers, hidden size {setting.hidden}"
    print(f"{tasks} tasks of {steps} steps; {model}, {setting.samples} x {setting.tokens} tokens", flush=True)
    for name in options.method:
        results, per_task = in_a_process(run, name, tasks, steps, setting, device, results)
        print(f"\n{table(name, per_task)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
