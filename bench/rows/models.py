"""Whole models in training: tokens a second and memory at the peak, beside other ways to train a prefix.

    python -m qtuning_fast.bench.rows.models                      all models and rows of the device at hand
    python -m qtuning_fast.bench.rows.models --model bert-base --row qtuning_fast eager peft --out FILE
    python -m qtuning_fast.bench.rows.models --dry-run            tiny models, to see that it runs

The weights are random, because speed does not depend on them, and so are the tokens; there is no padding and no
dropout. A step is what a user runs: zero_grad, forward, loss, backward, and AdamW over what is trained, on a task whose
queue is full. The frozen weights are bfloat16 on a GPU, float32 on a CPU; what is trained is float32.

Rows of one model with one prefix differ in nothing but what computes attention with a prefix; they share its
parameters, and each one's loss and gradients are compared with ours before it is timed. `peft` computes something else
(no gate, no queue, no network in front of the prefix, and in T5 a prefix in the decoder alone), and is compared with
nothing; beside it in T5 belongs `qtuning_fast-decoder`. `frozen-base` is the lower bound: the base model without any
prefix, of which one offset behind the lowest attention is trained, so that gradients go as far as to a prefix there.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import version
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor, nn

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.attention import dispatch
from qtuning_fast.attention.dispatch import BACKENDS, ENVIRONMENT_VARIABLE, Backend
from qtuning_fast.bench.measure import default_device, in_a_process
from qtuning_fast.bench.memory import peak_of
from qtuning_fast.bench.peers import PEERS
from qtuning_fast.bench.rows.architectures import (
    BERT,
    DTYPE,
    LLAMA,
    MODELS,
    ON_CPU,
    ON_GPU,
    T5,
    TINY,
    VIT,
    Family,
    Model,
    base_model,
    random_batch,
)
from qtuning_fast.bench.rows.command import Command, measure_each
from qtuning_fast.bench.shapes import PrefixAttentionCall
from qtuning_fast.bench.timing import Call, Timing, compare, first_line

ROUNDS = {"cuda": 20, "cpu": 9}
DRY_ROUNDS = 2
# Relative, of the loss and of each gradient of the prompts. With 4 to 6 layers what is right differs by up to 5% in
# bfloat16 and 2e-6 in float32, and without the gate some gradient is off by 60%.
TOLERANCE = {torch.bfloat16: 2**-2, torch.float32: 1e-4}
LEARNING_RATE = 1e-4
OURS = "qtuning_fast"


# Ways to train them


def with_queue(model: Model, device: str, **choices: Any) -> QTuningModel:
    """Our model in a task with a full queue, before the first eviction."""
    config = QTuningConfig(task_type=model.family.task_type, retention_weight=0.0, **choices)
    learner = QTuningModel(base_model(model, device), config)
    for number in range(config.queue_size):
        if number:
            learner.finish_task()
        learner.start_task(f"task-{number}", 2 if learner.has_heads else None)
    return learner.train()


def with_peft(model: Model, device: str) -> nn.Module:
    """peft's prefix tuning, with a prefix as long as ours.

    Raises:
        RuntimeError: this peft computes no prefix with this transformers.
    """
    from peft import PrefixTuningConfig, get_peft_model

    def prepared(model: Model) -> nn.Module:
        config = PrefixTuningConfig(task_type=model.family.peft_task_type, num_virtual_tokens=model.rows)
        return get_peft_model(base_model(model, device), config).train()

    tiny = next(each for each in TINY if each.family is model.family)
    try:
        prepared(tiny)(**random_batch(tiny, device))
    except Exception as error:
        versions = f"not {version('peft')} with {transformers.__version__}"
        raise RuntimeError(f"needs peft with a transformers that it works with, {versions}: {error}") from None
    return prepared(model)


def frozen_base(model: Model, device: str) -> nn.Module:
    """The base model with a trained offset behind its lowest attention: the least cost of any prefix there."""
    base = base_model(model, device).requires_grad_(False)
    base.offset = nn.Parameter(torch.zeros(base.config.hidden_size, device=device))
    lowest = base.base_model.get_submodule(model.family.lowest_attention)
    lowest.register_forward_hook(lambda _, inputs, output: (output[0] + base.offset.to(output[0].dtype), *output[1:]))
    return base


def by_backend(name: str) -> AbstractContextManager[Any]:
    """Within it, our backend of this name computes the operator; "auto": whichever is chosen."""
    return patch.dict(os.environ, {ENVIRONMENT_VARIABLE: name})


@contextmanager
def by_peer(name: str) -> Iterator[None]:
    """Within it, a peer computes attention with a prefix; without a prefix, as in T5's decoder, it is still ours."""
    attend, choose = PEERS[name].attend, dispatch.choose

    def run(call: PrefixAttentionCall) -> tuple[Tensor, None]:
        return attend(call), None

    def chosen(call: PrefixAttentionCall, requested: str) -> str:
        return name if call.prefix_key.shape[-2] else choose(call, requested)

    with ExitStack() as changes:
        changes.enter_context(by_backend("auto"))
        changes.enter_context(patch.dict(BACKENDS, {name: Backend(name, why_not=lambda call: None, run=run)}))
        changes.enter_context(patch.object(dispatch, "choose", chosen))
        yield


@dataclass(frozen=True)
class Way:
    """One way to train a model with a prefix."""

    prepare: Callable[[Model, str], nn.Module]
    computing: Callable[[], AbstractContextManager[Any]] = nullcontext  # what computes attention, wherever it is called
    families: tuple[Family, ...] = (BERT, T5, LLAMA, VIT)


without_gate = partial(with_queue, gate=None)
in_decoder = partial(with_queue, stack="decoder")
automatic = partial(by_backend, "auto")

WAYS = {
    OURS: Way(with_queue, automatic),
    "fused": Way(with_queue, partial(by_backend, "fused")),
    "composed": Way(with_queue, partial(by_backend, "composed")),
    "eager": Way(with_queue, partial(by_peer, "eager")),
    "flex": Way(with_queue, partial(by_peer, "flex")),
    "qtuning_fast-no-gate": Way(without_gate, automatic),
    "qtuning_fast-decoder": Way(in_decoder, automatic, families=(T5,)),
    "peft": Way(with_peft, families=(BERT, T5, LLAMA)),
    "frozen-base": Way(frozen_base),
}
WAYS_ON_CPU = tuple(name for name in WAYS if name not in ("fused", "composed"))  # auto takes the one, not the other


# Measuring


class Training:
    """A model with a batch and a new optimizer."""

    def __init__(self, module: nn.Module, batch: dict[str, Tensor]) -> None:
        self.module, self.batch = module, batch
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, LEARNING_RATE)

    def step(self, way: Way) -> None:
        with way.computing():
            self.optimizer.zero_grad()
            self.module(**self.batch).loss.backward()
            self.optimizer.step()

    def gradients(self, way: Way) -> tuple[Tensor, ...]:
        """The loss, and the gradient of each parameter of the prompts and of the reweighting."""
        groups = self.module.parameter_groups()
        prompts = groups["prompt"] + groups["reweighting"]
        with way.computing():
            loss = self.module(**self.batch).loss
            return loss.detach(), *torch.autograd.grad(loss, prompts)


@dataclass
class Outcome:
    """The figures of one way to train one model."""

    timing: Timing | None = None  # of a step
    tokens_per_second: float | None = None
    peak_bytes: int | None = None  # beyond the weights: activations, gradients, the optimizer's state
    trainable_parameters: int | None = None
    difference: float | None = None  # the largest, relative, to our loss and gradients; None: not comparable
    error: str = ""


def measure(name: str, ways: Sequence[str], device: str, rounds: int) -> dict[str, Any]:
    """Measures one model in several ways; returns the entry of the file of results."""
    started, model, gpu = time.perf_counter(), MODELS[name], torch.device(device)
    training = cache(lambda prepare: Training(prepare(model, device), random_batch(model, device)))
    outcomes = {way: Outcome() for way in ways if model.family in WAYS[way].families}
    for way, outcome in outcomes.items():
        try:
            outcome.trainable_parameters = sum(x.numel() for x in training(WAYS[way].prepare).trained)
            check(training, way, outcome)
        except Exception as error:  # what a way cannot do is its row
            outcome.error = first_line(error)
    if gpu.type == "cuda":
        torch.cuda.empty_cache()

    steps = {way: _step(training, way) for way, outcome in outcomes.items() if not outcome.error}
    setups: dict[str, Callable[[], list[Call]]] = {way: partial(list, [step]) for way, step in steps.items()}
    for way, measurement in compare(setups, device=gpu, rounds=rounds, graphs=False).items():
        outcome = outcomes[way]
        outcome.timing, outcome.error = measurement.eager, measurement.error
        if outcome.timing is None:
            continue
        outcome.tokens_per_second = round(model.tokens_a_step / outcome.timing.median * 1e3, 1)
        try:
            outcome.peak_bytes = _peak(training, way, model, device)
        except Exception as error:
            outcome.error = first_line(error)
    return {
        "name": name,
        "of": model.of,
        "sizes": sizes(model),
        "tokens_per_step": model.tokens_a_step,
        "dtype": str(DTYPE[device]).removeprefix("torch."),
        "auto_takes": backends_taken(steps[OURS]) if OURS in steps else [],
        "rows": {way: asdict(outcome) for way, outcome in outcomes.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }


def check(training: Callable[[Any], Training], way: str, outcome: Outcome) -> None:
    """Compares a row that should compute what ours does; a difference that is too large becomes its error."""
    if way == OURS or WAYS[way].prepare is not WAYS[OURS].prepare:
        return
    trained = training(WAYS[way].prepare)
    ours, theirs = trained.gradients(WAYS[OURS]), trained.gradients(WAYS[way])
    outcome.difference = max(relative_difference(x, y) for x, y in zip(theirs, ours))
    dtype = trained.module.base_model.dtype
    if not outcome.difference <= TOLERANCE[dtype]:
        outcome.error = f"wrong: loss or gradients are off by {outcome.difference:.2g}, {TOLERANCE[dtype]:.2g} at most"


def relative_difference(x: Tensor, expected: Tensor) -> float:
    """‖x − expected‖ / ‖expected‖; NaN counts as infinite."""
    ratio = ((x.double() - expected.double()).norm() / expected.double().norm()).item()
    return math.inf if math.isnan(ratio) else ratio


def _step(training: Callable[[Any], Training], way: str) -> Call:
    return lambda: training(WAYS[way].prepare).step(WAYS[way])


def backends_taken(step: Call) -> list[str]:
    """The names of the backends that compute a step."""
    taken, choose = set(), dispatch.choose

    def noted(call: PrefixAttentionCall, requested: str) -> str:
        taken.add(name := choose(call, requested))
        return name

    with patch.object(dispatch, "choose", noted):
        step()
    return sorted(taken)


def _peak(training: Callable[[Any], Training], way: str, model: Model, device: str) -> int | None:
    if device == "cpu":
        return in_a_process(peak_on_cpu, model.name, way)
    trained = training(WAYS[way].prepare)
    trained.step(WAYS[way])  # on this stream: what libraries take once for each is not the step's
    trained.optimizer.zero_grad()
    return first_step_peak(Training(trained.module, trained.batch), way, device)


def peak_on_cpu(name: str, way: str) -> int | None:
    """The peak of the first step; call it in a fresh process."""
    model = MODELS[name]
    for each in (next(tiny for tiny in TINY if tiny.family is model.family), model):
        # The tiny one comes first: what is loaded and set up once is not the model's.
        peak = first_step_peak(Training(WAYS[way].prepare(each, "cpu"), random_batch(each, "cpu")), way, "cpu")
    return peak


def first_step_peak(training: Training, way: str, device: str) -> int | None:
    """The memory of the first step, in which the optimizer's state is created."""
    return peak_of(partial(training.step, WAYS[way]), torch.device(device))


def sizes(model: Model) -> dict[str, int]:
    config = model.config()
    with torch.device("meta"):
        parameters = getattr(transformers, model.family.auto).from_config(config).num_parameters()
    found = {"batch": model.batch, "tokens": model.tokens, "answer": model.answer, "prefix_rows": model.rows}
    found |= {"hidden": config.hidden_size, "layers": config.num_hidden_layers, "heads": config.num_attention_heads}
    return found | {"vocabulary": getattr(config, "vocab_size", 0), "parameters": parameters}


# Telling


def table(entry: dict[str, Any]) -> str:
    """One model as text, at most 120 columns wide."""
    size, rows = entry["sizes"], entry["rows"]
    answer = f" in, {size['answer']} out" if size["answer"] else ""
    lines = [
        f"{entry['name']} ({entry['of']}, {size['parameters'] / 1e6:.0f} million parameters, {entry['dtype']})",
        f"  {size['batch']} samples of {size['tokens']} tokens{answer}, {size['prefix_rows']} prefix rows; "
        f"auto takes {' and '.join(entry['auto_takes']) or 'nothing'}",
        f"  {'':<22}{'ms a step':>11}{'±iqr':>9}{'tokens/s':>11}{'speed':>8}{'peak MB':>10}{'trained':>12}"
        f"{'off by':>10}",
    ]
    ours = rows.get(OURS, {}).get("timing")
    for way, row in rows.items():
        timing = row["timing"]
        if timing is None:
            lines += [f"  {way}", f"    {row['error']}"[:120]]
            continue
        speed = ours["median"] / timing["median"] if ours else None
        peak = None if row["peak_bytes"] is None else row["peak_bytes"] / 2**20
        line = f"  {way:<22}{timing['median']:>11.2f}{timing['spread']:>9.2f}{row['tokens_per_second']:>11,.0f}"
        line += f"{_number(speed, 8, '.2f')}{_number(peak, 10, '.1f')}{row['trainable_parameters']:>12,}"
        lines.append(line + _number(row["difference"], 10, ".1e"))
    return "\n".join(lines)


def _number(x: float | None, width: int, form: str) -> str:
    return f"{'-' if x is None else format(x, form):>{width}}"


def main(arguments: list[str] | None = None) -> int:
    device, dry = default_device(), f"tiny models, {DRY_ROUNDS} rounds"
    line = Command(__spec__.name, __doc__, dry_run=dry)
    line.add_argument("--model", nargs="+", choices=MODELS, help="default: those of the device")
    line.add_argument("--row", nargs="+", choices=WAYS, default=list(WAYS) if device == "cuda" else WAYS_ON_CPU)
    options = line.parse(arguments)
    usual = TINY if options.dry_run else ON_GPU if device == "cuda" else ON_CPU
    rounds = DRY_ROUNDS if options.dry_run else ROUNDS[device]
    results = line.results(options, rounds=rounds, learning_rate=LEARNING_RATE)
    print("speed: ours = 1; peak: beyond the weights; off by: the largest difference to our loss and gradients")
    chosen = options.model or [model.name for model in usual]
    return measure_each(results, {name: partial(measure, name, options.row, device, rounds) for name in chosen}, table)


if __name__ == "__main__":
    sys.exit(main())
