"""The trained head: gradient descent on draws from what tasks record, and as good as what it is drawn from allows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtuning_fast.method.class_gaussians import ClassGaussians
from qtuning_fast.method.closed_form import LinearHead
from qtuning_fast.method.statistics import Recorder
from qtuning_fast.method.task_adaptive import Rebalancing, rebalanced
from qtuning_fast.method.task_rule import Candidate, Evidence
from qtuning_fast.method.task_rules import ClosedForm
from qtuning_fast.method.trained_head import TrainedHead


def task(name: str, at: list[list[float]], *, seed: int, each: int = 40, offset: float = 0.0) -> Candidate:
    """A task with a class around each place."""
    draw = torch.Generator().manual_seed(seed)
    recorder = Recorder(len(at), {})
    for label, place in enumerate(at):
        x = torch.tensor(place) + offset + torch.randn(each, len(place), generator=draw)
        recorder.add(x, torch.full((each,), label))
    return Candidate(name, len(at), recorder.finish([]))


def nothing() -> dict[str, Tensor]:
    raise AssertionError


def test_it_is_the_definition() -> None:
    first, second = task("a", [[0.0, 0.0], [4.0, 0.0]], seed=1), task("b", [[0.0, 4.0], [4.0, 4.0]], seed=2)
    scores = TrainedHead(epochs=3, rate=0.05, seed=7).fit([first, second])
    moments = [each.known.features for each in (first, second)]
    means = torch.cat([each.means for each in moments])
    middle = means.mean(0)
    within = sum(float(each.scatter.trace()) for each in moments) / 160 / 2
    size = (within + float((means - middle).square().mean())) ** 0.5
    draws = torch.Generator().manual_seed(7)
    factors = [each.factor / size / 78**0.5 for each in moments]
    gaussians = ClassGaussians(
        (means - middle) / size,
        torch.zeros(4, 2).double(),
        torch.stack(factors),
        torch.tensor([0, 0, 1, 1]),
        torch.arange(4),
        torch.ones(4).double(),
    )
    assert gaussians.sample(2, draws)[0].shape == (8, 2)
    zero = LinearHead(torch.zeros(4, 2).double(), torch.zeros(4).double())
    head = rebalanced(zero, gaussians, Rebalancing(3, 0.05), seed=7)
    x = torch.randn(5, 2).double()
    torch.testing.assert_close(scores(Evidence(x, nothing)), head((x - middle) / size))


def test_it_tells_classes_apart_wherever_features_lie() -> None:
    for offset in (0.0, 100.0):
        tasks = [
            task("a", [[0.0, 0.0], [6.0, 0.0]], seed=1, offset=offset),
            task("b", [[0.0, 6.0], [6.0, 6.0]], seed=2, offset=offset),
        ]
        x = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0], [6.0, 6.0]]).double() + offset
        for rule in (TrainedHead(rate=0.05), ClosedForm()):
            assert rule.fit(tasks)(Evidence(x, nothing)).argmax(1).tolist() == [0, 1, 2, 3]


def test_a_class_without_examples_is_never_answered() -> None:
    recorder = Recorder(3, {})
    recorder.add(torch.randn(20, 2), torch.arange(20) % 2)
    lacking = Candidate("a", 3, recorder.finish([]))
    scores = TrainedHead().fit([lacking, task("b", [[9.0, 9.0]], seed=3)])(
        Evidence(torch.randn(4, 2).double(), nothing)
    )
    assert scores[:, 2].isneginf().all() and scores[:, [0, 1, 3]].isfinite().all()


def test_its_settings_make_it_again() -> None:
    rule = TrainedHead(epochs=2, rate=0.1, seed=3)
    assert TrainedHead(**rule.settings).settings == rule.settings == {"epochs": 2, "rate": 0.1, "seed": 3}
    for wrong, message in (
        ({"epochs": 0}, "epochs is 0"),
        ({"rate": 0.0}, "rate is 0.0"),
        ({"seed": -1}, "seed is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainedHead(**wrong)  # type: ignore[arg-type]
