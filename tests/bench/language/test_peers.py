"""peft's methods train what they say, on the batches of this library, and leave the base model alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtuning_fast.bench.language import peers
from qtuning_fast.bench.language.arms import MODELS, RATES
from qtuning_fast.bench.language.ours import OwnAdapters
from qtuning_fast.bench.language.peers import RANK, VIRTUAL_TOKENS, BestLook, Peer, PeerTrainer, peft_config, with_peft
from qtuning_fast.lifelong.options import TrainingOptions
from qtuning_fast.lifelong.task_trainer import KEPT_BY, TaskTrainer
from qtuning_fast.lifelong.tasks import Task
from qtuning_fast.model.fingerprint import fingerprint

OPTIONS = TrainingOptions(steps=30, eval_every=15, batch_size=8, max_length=12, seed=1)
WIDTH, LAYERS = 32, 2
RATE = {"lora": 3e-2, "prompt-tuning": 0.3, "prefix-tuning": 0.3}
# The tiny Llama has four heads of 16, two of them with keys; a T5 has three attentions in its two stacks.
TRAINED = {
    ("smollm2", "lora"): LAYERS * RANK * (WIDTH + 64 + WIDTH + 32),
    ("smollm2", "prompt-tuning"): VIRTUAL_TOKENS * WIDTH,
    ("smollm2", "prefix-tuning"): VIRTUAL_TOKENS * LAYERS * 2 * 32,
    ("flan-t5", "lora"): 3 * LAYERS * 2 * RANK * (WIDTH + 24),
    ("flan-t5", "prompt-tuning"): VIRTUAL_TOKENS * WIDTH,
    ("flan-t5", "prefix-tuning"): VIRTUAL_TOKENS * LAYERS * 2 * 24,
}


@pytest.mark.parametrize(("name", "method"), TRAINED)
def test_it_learns(name: str, method: str, loaded: Callable[..., Any], toy_tasks: list[Task], tmp_path: Path) -> None:
    base, _, encoder = loaded(name)
    before = fingerprint(base)
    task = replace(toy_tasks[1], validation=toy_tasks[1].train, test=toy_tasks[1].train)  # it need not generalise
    peer = Peer(base, encoder, method, MODELS[name], RATE[method], OPTIONS, tmp_path)
    untrained = Peer(base, encoder, method, MODELS[name], 1e-9, OPTIONS, tmp_path)
    assert peer.validation_loss(task) < 0.9 * untrained.validation_loss(task)
    learned = peer.learn(task, 0)
    assert learned.name == "pets" and learned.best_step in (15, 30)
    assert learned.accuracy > untrained.learn(task, 0).accuracy + 0.1
    assert learned.trained_parameters == TRAINED[name, method]
    assert learned.step_seconds and 4 * learned.trained_parameters < learned.stored_bytes < 20_000 + 4 * 10**5
    assert fingerprint(base) == before and not [each for each in base.modules() if "lora" in type(each).__name__]


@pytest.mark.parametrize("name", MODELS)
def test_batches_and_rates_are_those_of_this_library(
    name: str, loaded: Callable[..., Any], toy_tasks: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tokenizer, encoder = loaded(name)
    seen: dict[type, list[Tensor]] = {PeerTrainer: [], TaskTrainer: []}
    rates: dict[type, list[float]] = {PeerTrainer: [], TaskTrainer: []}
    for kind in seen:
        compute = kind.compute_loss  # type: ignore[attr-defined]

        def recorded(
            self: Any, model: Any, inputs: Any, *args: Any, kind: Any = kind, compute: Any = compute, **more: Any
        ) -> Any:
            seen[kind].append(inputs["input_ids"].clone())
            group = self.optimizer.param_groups[0]
            rates[kind].append(group["lr"] / group["initial_lr"])
            return compute(self, model, inputs, *args, **more)

        monkeypatch.setattr(kind, "compute_loss", recorded)
    OwnAdapters(base, tokenizer, MODELS[name].config(), toy_tasks, OPTIONS, tmp_path / "ours").learn(together=False)
    for number, task in enumerate(toy_tasks):
        Peer(base, encoder, "lora", MODELS[name], 1e-3, OPTIONS, tmp_path / "peer").learn(task, number)
    ours, theirs = seen[TaskTrainer], seen[PeerTrainer]
    assert len(ours) == len(theirs) == 60
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs)) and not torch.equal(ours[0], ours[1])
    assert rates[TaskTrainer] == pytest.approx(rates[PeerTrainer]) and len({*rates[PeerTrainer]}) > 20


def test_dropout_is_off(loaded: Callable[..., Any], toy_tasks: list[Task], tmp_path: Path) -> None:
    base, _, encoder = loaded("flan-t5")
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.9
    peer = Peer(base, encoder, "prompt-tuning", MODELS["flan-t5"], 0.1, replace(OPTIONS, steps=1), tmp_path)
    trainer = peer._trained(toy_tasks[0], 0)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    losses = {float(trainer.compute_loss(trainer.model, batch)) for _ in range(3)}
    assert len(losses) == 1


def test_the_first_of_the_best_looks_is_kept() -> None:
    model, best = nn.Linear(1, 1, bias=False), BestLook()
    for step, found in ((0, 0.4), (10, 0.7), (20, 0.7), (30, 0.5)):
        nn.init.constant_(model.weight, step)
        metrics = {f"eval_{KEPT_BY}": found}
        best.on_evaluate(None, SimpleNamespace(global_step=step), None, model=model, metrics=metrics)
    best.restore(model)
    assert best.step == 10 and model.weight.item() == 10


def test_a_prefix_that_is_not_computed_is_an_error(loaded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    base, _, _ = loaded("smollm2")
    monkeypatch.setattr(peers, "get_peft_model", lambda model, config: model)
    with pytest.raises(RuntimeError, match=r"peft .* computes no prefix with transformers .*OLDER=1"):
        with_peft(base, "prefix-tuning", MODELS["smollm2"])

    def fails(**_: Any) -> None:
        raise TypeError("no such argument")

    base.forward = fails
    with pytest.raises(RuntimeError, match=r"\(TypeError: no such argument\); `make bench-language OLDER=1`"):
        with_peft(base, "prefix-tuning", MODELS["smollm2"])


def test_each_method_of_the_study_is_known(loaded: Callable[..., Any]) -> None:
    base, _, _ = loaded("smollm2")
    assert len({type(peft_config(method, MODELS["smollm2"], base.config)) for method in RATES}) == 3
    with pytest.raises(ValueError, match="method is 'ia3'"):
        peft_config("ia3", MODELS["smollm2"], base.config)
