"""Train one task on transformers.Trainer, with small checkpoints that are complete or ignored."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.data import default_data_collator
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import SAFE_WEIGHTS_NAME

from qtuning_fast.lifelong.data.encoded import EncodedExamples, without_padding
from qtuning_fast.lifelong.data.images import ImageExamples
from qtuning_fast.lifelong.evaluation import outputs
from qtuning_fast.lifelong.options import TrainingOptions
from qtuning_fast.lifelong.scores import METRICS, score
from qtuning_fast.lifelong.split_batches import IMAGES, BatchPart, SplitExamples
from qtuning_fast.method.contrast import contrastive_loss
from qtuning_fast.method.labels import label_loss
from qtuning_fast.model.checked_files import CorruptFileError, file_digest, read_json, write_json
from qtuning_fast.model.distributed import process_count, process_number, sum_gradients
from qtuning_fast.model.model import QTuningModel
from qtuning_fast.model.scoring import Answers

_MANIFEST = "manifest.json"
KEPT_BY = "kept_by"
"""What is highest in the best state: the score; of states with equal ones, which few examples often give, less loss."""
_TIE = 1e-6  # what the loss may change in it at most


class TaskTrainer(Trainer):
    """Trains the task that `model` has started.

    Args:
        model: a model with a task in training.
        options: the budget and the learning rates.
        folder: the folder of the checkpoints.
        train, validation: the examples.
        answers: the answers of a language model, one per class. It is right if the correct answer is the most probable.
        earlier_means: for the contrastive regulariser, the class means of earlier tasks, `[K, F]`.
        callbacks: further callbacks.
    """

    def __init__(
        self,
        model: QTuningModel,
        options: TrainingOptions,
        folder: Path,
        *,
        train: EncodedExamples,
        validation: EncodedExamples,
        answers: Answers | None = None,
        earlier_means: Tensor | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.qtuning = model
        self.options = options
        self.folder = folder
        self.answers = answers
        self.validation = validation
        self._rates = options.rates(model.qtuning_config.task_type)
        self._earlier_means = earlier_means
        self.start_score: float | None = None
        self.best_step: int | None = None
        self.clock = StepTimer()
        self._retention_losses: list[Tensor] = []  # of the steps since the last log
        self._retention_of_part: list[Tensor] = []  # of a step, if it has one
        stopping = [EarlyStoppingCallback(options.patience, _TIE)] if options.patience else []
        use_cache = getattr(model.config, "use_cache", None)
        super().__init__(
            model=model,
            args=training_arguments(options, folder, model.device, self._rates["prompt"]),
            train_dataset=SplitExamples(train) if process_count() > 1 else train,
            eval_dataset=validation,
            data_collator=collated,
            callbacks=[self.clock, WriteManifest(), BeginEpoch(train), *stopping, *(callbacks or [])],
        )
        self.remove_callback(PrinterCallback)
        if use_cache is not None:
            model.config.use_cache = use_cache  # a Trainer changes it for good, and with it all that comes after

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with a learning rate for each kind of parameter."""
        if self.optimizer is None:
            groups = [
                {"params": group, "lr": self._rates[kind]} for kind, group in self.qtuning.parameter_groups().items()
            ]
            self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch with memory retention, the pull on the reweighting, and the contrastive regulariser."""
        if process_count() > 1:
            return self._loss_of_part(model, BatchPart(self.qtuning, inputs))
        with self._features_of_the_batch() as features:
            outputs = model(**inputs, **self._flags)
        retention = outputs.get("retention_loss")
        if retention is not None:
            self._retention_losses.append(retention.detach())
        loss = outputs.loss
        if self.options.reweighting_pull:
            loss = loss + self.options.reweighting_pull * self.qtuning.training_prefix.reweighting_loss()
        if self._earlier_means is not None:
            [x] = features
            loss = loss + self.options.contrast * contrastive_loss(x, self._means_for(x))
        return (loss, outputs) if return_outputs else loss

    def _loss_of_part(self, model: Any, part: BatchPart) -> Tensor:
        """What this process adds to the loss of a batch, so that the sum over processes is the loss of one process."""
        loss = torch.zeros((), device=self.qtuning.device, requires_grad=True)
        x = loss.new_zeros(0, self.qtuning.hidden_size)
        self._retention_of_part = [] if part.pairs is None else [loss.detach()]
        if not part.is_empty:
            given: dict[str, Any] = {} if part.pairs is None else {"retention_features": part.pairs}
            with self._features_of_the_batch() as features:
                outputs = model(**part.inputs, **given, **self._flags, num_items_in_batch=part.num_items)
            loss = outputs.loss
            x = features[0] if features else x
            if part.pairs is not None:
                self._retention_of_part = [part.pairs.share * outputs.retention_loss.detach()]
        if self.options.reweighting_pull and process_number() == 0:  # it is of no example: once is enough
            loss = loss + self.options.reweighting_pull * self.qtuning.training_prefix.reweighting_loss()
        if self._earlier_means is not None:
            loss = loss + self.options.contrast * part.contrast(x, self._means_for(x))
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the gradients of a batch; processes sum those of their parts before the optimiser clips them."""
        loss = super().training_step(*args, **kwargs)
        if process_count() > 1:
            trained = [each for each in self.qtuning.parameters() if each.requires_grad]
            loss, *retention = sum_gradients(trained, loss, *self._retention_of_part)
            self._retention_losses += retention
        return loss

    @property
    def _flags(self) -> dict[str, bool]:
        return {} if self.qtuning.has_heads else {"use_cache": False}

    def _means_for(self, x: Tensor) -> Tensor:
        """The class means of earlier tasks; for the first task none."""
        assert self._earlier_means is not None
        return self._earlier_means if len(self._earlier_means) else x.new_zeros(0, x.shape[1])

    @contextmanager
    def _features_of_the_batch(self) -> Iterator[list[Tensor]]:
        """Collect what the head in training reads within the block, for the contrastive regulariser."""
        features: list[Tensor] = []
        head = self.qtuning.learning.head
        if self._earlier_means is None or head is None:
            yield features
            return
        hook = head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        try:
            yield features
        finally:
            hook.remove()

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate on the validation split as everything in a run is evaluated."""
        found = outputs(self.qtuning, self.validation, self.options.eval_batch_size, self.answers).numpy()
        labels = self.validation.columns["labels"].numpy()
        metrics = measures(self.qtuning.learning.problem_type, found, labels)
        return EvalLoopOutput(found, labels, {f"{metric_key_prefix}_{k}": v for k, v in metrics.items()}, len(labels))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._retention_losses:
            logs["retention_loss"] = float(torch.stack(self._retention_losses).mean())
            self._retention_losses.clear()
        super().log(logs, *args, **kwargs)

    # Checkpoints leave out the base model. A manifest, written last, shows that a checkpoint is complete. These methods
    # are private to transformers, which has no public way to say what a checkpoint holds; a test notices when they go.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.cpu().contiguous() for name, value in self.qtuning.trainable_state_dict().items()}
        save_file(tensors, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # transformers would load by the names of the whole model; a checkpoint has those of what trains.
        self.qtuning.load_trainable_state_dict(load_file(Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME))

    def _checkpoint(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def _load_best_model(self) -> None:
        # By its step: the path in the state is wrong once the run's folder has been moved.
        assert self.state.best_global_step is not None
        best = self._checkpoint(self.state.best_global_step)
        if not _is_complete(best):
            raise CorruptFileError(f"{best} is damaged, and the best state of the task is in it")
        self.qtuning.load_trainable_state_dict(load_file(best / SAFE_WEIGHTS_NAME))

    def train_or_resume(self) -> None:
        """Train the task, or resume from its newest complete checkpoint.

        The model ends in the state that is best on the validation split, that in which the task starts included.
        """
        start = {name: value.clone() for name, value in self.qtuning.trainable_state_dict().items()}
        metrics = self.predict(self.eval_dataset, metric_key_prefix="start").metrics  # type: ignore[arg-type]
        assert metrics is not None
        self.start_score = metrics[f"start_{METRICS[self.qtuning.learning.problem_type]}"]
        self._train_or_resume()
        assert self.state.best_metric is not None
        kept = metrics[f"start_{KEPT_BY}"] >= self.state.best_metric
        if kept:
            self.qtuning.load_trainable_state_dict(start)
        self.best_step = 0 if kept else self.state.best_global_step

    def _train_or_resume(self) -> None:
        checkpoint = latest_checkpoint(self.folder)
        if checkpoint is not None:
            state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
            if state.best_global_step is not None and not _is_complete(self._checkpoint(state.best_global_step)):
                shutil.rmtree(self.folder)  # the best state is lost: the task starts again
                checkpoint = None
            elif self._is_over(state):  # more training would validate at steps that an uninterrupted run never has
                self.state = state
                self._load_best_model()
                return
        self.train(resume_from_checkpoint=checkpoint)

    def _is_over(self, state: TrainerState) -> bool:
        callbacks: Any = state.stateful_callbacks  # JSON here, whatever the annotation says
        stopping = callbacks.get(EarlyStoppingCallback.__name__)
        stopped = stopping and stopping["attributes"]["early_stopping_patience_counter"] >= self.options.patience
        return bool(stopped) or state.global_step >= self.options.steps


class BeginEpoch(TrainerCallback):
    """Tells images that change at random which epoch it is, also after an interruption."""

    def __init__(self, train: EncodedExamples) -> None:
        self._images = train if isinstance(train, ImageExamples) else None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._images is not None:
            self._images.begin_epoch(state.global_step // len(kwargs["train_dataloader"]))


class WriteManifest(TrainerCallback):
    """Writes the manifest of a checkpoint after all its other files."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            files = sorted(path for path in folder.iterdir() if path.is_file())
            write_json(folder / _MANIFEST, {"files": {path.name: file_digest(path) for path in files}})


class StepTimer(TrainerCallback):
    """Measures each optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)

    @property
    def median(self) -> float | None:
        return median(self.seconds) if self.seconds else None


def latest_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint in `folder`, or None; incomplete ones are removed."""
    complete = {}
    for path in folder.glob("checkpoint-*"):
        if _is_complete(path):
            complete[int(path.name.removeprefix("checkpoint-"))] = path
        else:
            shutil.rmtree(path)
    return str(complete[max(complete)]) if complete else None


def _is_complete(checkpoint: Path) -> bool:
    try:
        files = read_json(checkpoint / _MANIFEST)["files"]
        return all(file_digest(checkpoint / name) == digest for name, digest in files.items())
    except (FileNotFoundError, CorruptFileError):
        return False


def collated(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return a batch of examples, cut to its longest text."""
    images = [each.pop(IMAGES) for each in examples if IMAGES in each]  # of this process's part of the batch alone
    batch = default_data_collator(examples) | ({IMAGES: torch.stack(images)} if images else {})
    return without_padding(batch)


def measures(problem_type: str, outputs: Any, labels: Any) -> dict[str, float]:
    """Return what a look at the validation split measures: the score, and `KEPT_BY`."""
    found = score(problem_type, outputs, labels)
    loss = float(label_loss(torch.as_tensor(outputs), torch.as_tensor(labels), problem_type))
    return {METRICS[problem_type]: found, KEPT_BY: found - _TIE * loss / (1 + loss)}


def seed_of_task(seed: int, number: int) -> int:
    """Return the seed of the batches, and of what else is random, of the task with this number in a run."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0] % 2**31)


def training_arguments(options: TrainingOptions, folder: Path, device: torch.device, rate: float) -> TrainingArguments:
    """Return the arguments of a Trainer that follows the options: budget, batches, clipping, schedule and looks."""
    every = options.eval_every
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.eval_batch_size,
        learning_rate=rate,
        weight_decay=0.0,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, options.steps // 10),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=every,
        save_steps=every,
        # Log at every checkpoint: an average since the last log would not survive a resume.
        logging_steps=max(size for size in range(1, 6) if every % size == 0),
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=KEPT_BY,
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,
        seed=options.seed,
        data_seed=options.seed,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
        use_cpu=device.type == "cpu",  # the model stays where its owner put it
    )
    _ = arguments.n_gpu  # sets up the device
    arguments._n_gpu = 1  # nn.DataParallel would copy the attention layers without their prefixes
    return arguments
