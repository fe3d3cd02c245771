"""One batch of a step between several processes: each computes its part, and the gradients add up to one process's.

Every process has the same order of examples and sees whole batches, so that it knows what all labels of a step are, and
what the terms of the loss that compare samples compare with. It computes on its own part alone. The gradients of the
few parameters that train are then summed (`sum_gradients`). DistributedDataParallel is not used: it averages over
processes, which is right for parts of equal size only; it waits for ever for a process whose part is empty; and its
sums may depend on the backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from qtuning_fast.lifelong.data.encoded import EncodedExamples
from qtuning_fast.method.contrast import contrastive_loss
from qtuning_fast.method.labels import IGNORED, REGRESSION
from qtuning_fast.method.retention import RetentionPairs
from qtuning_fast.model.distributed import gathered, process_number, share_of
from qtuning_fast.model.model import QTuningModel

IMAGES = "pixel_values"
"""The column that is costly to compute, so that a batch holds that of the process's own part alone."""


class SplitExamples(Dataset[dict[str, Tensor]]):
    """Examples of which a process opens only the images of its own part of each batch."""

    def __init__(self, examples: EncodedExamples) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return self._examples[place]

    def __getitems__(self, places: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return the examples of a batch, as PyTorch's loader asks for them."""
        mine = range(len(places))[share_of(len(places))]
        return [
            self._examples[place] if n in mine else {name: x[place] for name, x in self._examples.columns.items()}
            for n, place in enumerate(places)
        ]


class BatchPart:
    """This process's part of a batch.

    All processes must make one for each batch, and call the same methods: they draw the same numbers and gather.

    Args:
        model: with a task in training.
        batch: the columns of the whole batch, `retention_features` among them or not.

    Attributes:
        inputs: the columns of the part; none if it is empty.
    """

    def __init__(self, model: QTuningModel, batch: dict[str, Any]) -> None:
        self._model = model
        whole = dict(batch)
        self._labels: Tensor = whole["labels"]
        mine = share_of(len(self._labels))
        old = whole.pop("retention_features", None)
        self.inputs = {name: x if name == IMAGES else x[mine] for name, x in whole.items()}
        self.is_empty = mine.start == mine.stop
        self.pairs = self._pairs(old, mine) if model.retains_memory and len(self._labels) > 1 else None

    def _pairs(self, old: Tensor | None, mine: slice) -> RetentionPairs:
        """Return what memory retention compares the part with; without features of the batch they are computed."""
        if old is None:
            task = self._model.learning.last_learned
            inputs = {name: x for name, x in self.inputs.items() if name != "labels"}
            found = None if self.is_empty else self._model.features(inputs, task=task).cpu()
            old = torch.cat([each for each in gathered(found) if each is not None]).to(self._labels.device)
        return RetentionPairs.of(old, mine, int(torch.randint(1, len(old), ())))  # drawn as in one process

    @property
    def num_items(self) -> int:
        """How many labels of the whole batch count."""
        if not self._model.has_heads:
            return int(self._model.backbone.counted(self._labels).sum())
        if self._model.learning.problem_type == REGRESSION:
            return self._labels.numel()
        return int((self._labels != IGNORED).sum())

    def contrast(self, features: Tensor, means: Tensor) -> Tensor:
        """Return the contrastive regulariser of the whole batch, whose gradient is that of the part.

        The value counts in the first process alone, so that it counts once in the sum.

        Args:
            features: `[b, F]`, those of the part.
            means: the class means of earlier tasks.
        """
        others = [each.to(features) for each in gathered(features.detach().cpu())]
        others[process_number()] = features
        loss = contrastive_loss(torch.cat(others), means)
        return loss if process_number() == 0 else loss - loss.detach()
