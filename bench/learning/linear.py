"""Linear classifiers of the frozen model's features: what prompts have to be better than.

`probe` is the tuned logistic regression, `closed_form` the Gaussian classifier, `closed_form_of_all` the same from the
training and the validation examples together. `donor` is the probe of the earlier
task that is best on the new one's training and validation examples, as it is. `transferred` is a logistic regression
that is pulled towards the mean of the earlier tasks' probes instead of towards zero; the strength of the pull and the
scale of that mean are tuned on the validation examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from qtuning_fast.lifelong.probe import tuned_probe
from qtuning_fast.method.closed_form import LinearHead, closed_form_head, summed
from qtuning_fast.method.labels import SINGLE

Split = tuple[Tensor, Tensor]
"""Features `[n, F]` and class indices `[n]`."""

ALL_EXAMPLES = "closed_form_of_all"
CLASSIFIERS = ("probe", "closed_form", ALL_EXAMPLES, "donor", "transferred")

PULLS = [10.0**power for power in np.arange(-3, 3.1, 0.5)]
SCALES = (1.0, 3.0, 10.0, 30.0)


def accuracies(tasks: Sequence[tuple[tuple[str, ...], Mapping[str, Split]]]) -> dict[str, list[float | None]]:
    """Return the test accuracy on each task, by classifier; None where no earlier task has the same classes.

    Args:
        tasks: the class names of each task, and its splits, in order.
    """
    probes: list[tuple[tuple[str, ...], LinearHead]] = []
    found: dict[str, list[float | None]] = {kind: [] for kind in CLASSIFIERS}
    for names, splits in tasks:
        probe = _tuned(splits, len(names))
        earlier = [head for theirs, head in probes if theirs == names]
        seen = [torch.cat(part) for part in zip(splits["train"], splits["validation"])]
        heads = {"probe": probe, "closed_form": closed_form_head(*splits["train"], len(names))}
        heads[ALL_EXAMPLES] = closed_form_head(seen[0], seen[1], len(names))
        if earlier:
            heads["donor"] = max(earlier, key=lambda head: accuracy(head, (seen[0], seen[1])))
            heads["transferred"] = transferred(earlier, splits)
        for kind, values in found.items():
            values.append(accuracy(heads[kind], splits["test"]) if kind in heads else None)
        probes.append((names, probe))
    return found


def accuracy(head: LinearHead, split: Split) -> float:
    return float((head(split[0]).argmax(1) == split[1]).double().mean())


def _tuned(splits: Mapping[str, Split], classes: int) -> LinearHead:
    train, validation = ([part.numpy() for part in splits[name]] for name in ("train", "validation"))
    return tuned_probe(train, validation, SINGLE, classes).head


def transferred(earlier: Sequence[LinearHead], splits: Mapping[str, Split]) -> LinearHead:
    """Return the logistic regression that is pulled towards the mean of earlier heads, tuned on the validation split.

    Of several with equally few errors there it is the one with the least loss.
    """
    mean = summed([head.of_unit_norm() for head in earlier]).scaled(1 / len(earlier))

    def loss(head: LinearHead) -> tuple[float, float]:
        outputs, labels = head(splits["validation"][0]), splits["validation"][1]
        wrong = float((outputs.argmax(1) != labels).double().mean())
        return wrong, float(torch.nn.functional.cross_entropy(outputs, labels))

    fits = (pulled(splits["train"], mean.scaled(scale), pull) for scale, pull in itertools.product(SCALES, PULLS))
    return min(fits, key=loss)


def pulled(train: Split, towards: LinearHead, pull: float) -> LinearHead:
    """Minimise the summed log-loss plus `pull / 2` times the squared distance of weights and biases from a head."""
    x = torch.cat([train[0].double(), torch.ones(len(train[0]), 1, dtype=torch.float64)], 1)
    start = torch.cat([towards.weight, towards.bias[:, None]], 1)
    # The solution differs from the start by a combination of the examples, so the search is among those.
    gram, base = x @ x.mT, x @ start.mT
    coefficients = torch.zeros(len(x), len(start), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([coefficients], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        moved = gram @ coefficients
        loss = torch.nn.functional.cross_entropy(base + moved, train[1], reduction="sum")
        value = loss + 0.5 * pull * (coefficients * moved).sum()
        value.backward()
        return value

    optimizer.step(closure)
    found = start + coefficients.detach().mT @ x
    return LinearHead(found[:, :-1], found[:, -1])
