"""From a model to its checkpoint and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from transformers import PreTrainedModel

from qtuning_fast.model.checked_files import CorruptFileError
from qtuning_fast.model.checkpoint import Checkpoint, read_checkpoint
from qtuning_fast.model.hub_files import Located
from qtuning_fast.model.tasks import Tasks

if TYPE_CHECKING:
    from qtuning_fast.model.model import QTuningModel

    Model = TypeVar("Model", bound=QTuningModel)


def checkpoint_of(model: QTuningModel) -> Checkpoint:
    """Return what is saved of a model.

    Raises:
        RuntimeError: a task is in training.
    """
    model.learning.check_idle()
    learning = model.learning.state_dict()
    del learning["_extra_state"]  # it says that no task is in training
    return Checkpoint(
        config=model.qtuning_config,
        fingerprint=model.backbone.fingerprint,
        base_model=type(model.base_model).__name__,
        adapters=model.adapters,
        learning=learning,
        queue=model.training_prefix.queue.state_dict(),
        last_learned=model.learning.last_learned,
        statistics=model.statistics,
        task_rule=model.task_rule,
    )


def restored(kind: type[Model], base_model: PreTrainedModel, source: Located, *, lazy: bool) -> Model:
    """Return a model of this kind with what was saved there; see `QTuningModel.from_pretrained`."""
    saved = read_checkpoint(source.folder, lazy=lazy, elsewhere=source.elsewhere)
    model = kind(base_model, saved.config)
    try:
        saved.check_base_model(model.backbone, source.name)
        model._tasks = Tasks(model.backbone, model.layer_indices, saved.config, saved.adapters, saved.statistics)
        model.task_rule = saved.task_rule
        if not saved.is_of_one_task:
            _restore_learning(model, saved, source)
    except ValueError:
        model.detach()
        raise
    return model


def _restore_learning(model: QTuningModel, saved: Checkpoint, source: Located) -> None:
    """Restore what learning goes on from, or raise a CorruptFileError."""
    try:
        model.training_prefix.load_queue(saved.queue)
        model.learning.restore(saved.learning, model.device, saved.last_learned)
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise CorruptFileError(f"{source.name}: the checkpoint does not fit its own config: {error}") from None
