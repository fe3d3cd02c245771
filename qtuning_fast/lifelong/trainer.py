"""Train a stream of tasks one after another; an interrupted run resumes where it stopped.

Each stage of a run writes a file, and is skipped if the file is there:

    <folder>/run.json                       the settings of the run; another run in the folder is refused
    <folder>/tasks/NN-name/probe.json       the linear probe
    <folder>/tasks/NN-name/checkpoints/     checkpoints of the task in training, by transformers.Trainer
    <folder>/tasks/NN-name/training.json    curves, steps, seconds
    <folder>/adapter/                       the model after the last finished task
    <folder>/tasks/NN-name/evaluation.json  each task so far under the live queue, and this one under its adapter
    <folder>/tasks/NN-name/joint_head.json  names the files of the head over all classes, if asked for
    <folder>/tasks/NN-name/class_incremental.json   each task so far without its name, by inference
    <folder>/tasks/NN-name/alone.json       the task learned alone, if asked for
    <folder>/metrics.json                   all results, at the end of the stream

The randomness of a task starts from the run's seed and the task's number, so an interrupted run gives the same results.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from qtuning_fast.integrations.transformers import without_head
from qtuning_fast.lifelong.data.augmentation import AUGMENTATIONS
from qtuning_fast.lifelong.data.encoded import EncodedExamples
from qtuning_fast.lifelong.data.encoding import Answers, ExampleEncoder
from qtuning_fast.lifelong.data.images import ImageExamples
from qtuning_fast.lifelong.environment import device_name, versions
from qtuning_fast.lifelong.evaluation import features, task_score
from qtuning_fast.lifelong.joint_head import JointHead, check_joint_head
from qtuning_fast.lifelong.listener import RunListener
from qtuning_fast.lifelong.metrics import evaluation_summary
from qtuning_fast.lifelong.options import TrainingOptions
from qtuning_fast.lifelong.preflight import preflight
from qtuning_fast.lifelong.probe import LinearProbe, tuned_probe
from qtuning_fast.lifelong.processes import agree, check_joined, own_folder
from qtuning_fast.lifelong.run_folder import RUN_FILE, claim_folder, locked, refuse_foreign_folder
from qtuning_fast.lifelong.scores import score
from qtuning_fast.lifelong.task_end import mix_head
from qtuning_fast.lifelong.task_start import check_start, mix_with_earlier_prompts, start_task
from qtuning_fast.lifelong.task_trainer import TaskTrainer, seed_of_task
from qtuning_fast.lifelong.tasks import SPLITS, Task, data_digest
from qtuning_fast.lifelong.training_record import NO_STEPS, method_record, steps_record
from qtuning_fast.lifelong.unnamed_tasks import UnnamedTasks
from qtuning_fast.method.adapter import check_not_reserved
from qtuning_fast.method.config import HEAD_TASK_TYPES, QTuningConfig
from qtuning_fast.method.labels import REGRESSION, SINGLE
from qtuning_fast.method.task_rule import TaskRule
from qtuning_fast.method.task_rules import RULES, ClosedForm, rule_by_name
from qtuning_fast.model.checked_files import read_json, tensors_digest, write_json
from qtuning_fast.model.checkpoint import CONFIG_FILE
from qtuning_fast.model.distributed import from_first, process_count
from qtuning_fast.model.fingerprint import fingerprint
from qtuning_fast.model.model import QTuningModel


class LifelongTrainer:
    """Trains a stream of tasks with Q-tuning (arXiv 2404.14607), on transformers.Trainer.

    The tasks are of the config's `task_type`: heads classify texts or images, or a language model answers texts with
    the words for the classes (`Task.answers`).

    Args:
        base_model: the model to attach prompts to.
        processor: the base model's tokenizer, or its image processor.
        config: the settings of the method.
        tasks: the stream, in order.
        options: the budget and the learning rates of each task.
        folder: the folder of the run; an interrupted run in it is resumed.
        forward_transfer: also train each task but the first alone, with an empty queue, for comparison.
        task_rule: the rule that infers the task of examples whose task is not named, or its name.
        keep_validation_features: keep up to 64 feature vectors of a task's validation examples, on which inferred
            probabilities are calibrated; without them they are not, and no input is of no known task.
        about: further entries for the `config` of `metrics.json`, such as the stream's name.
        listener: receives the events of the run.

    Raises:
        TypeError, ValueError: the tasks, the model and the processor do not fit together, or the folder holds another
            run.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        processor: Any,
        config: QTuningConfig,
        tasks: Sequence[Task],
        options: TrainingOptions,
        folder: str | Path,
        *,
        forward_transfer: bool = False,
        task_rule: TaskRule | str = ClosedForm.name,
        keep_validation_features: bool = True,
        about: dict[str, Any] | None = None,
        listener: RunListener | None = None,
    ) -> None:
        names = [task.name for task in tasks]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"tasks has the names {names}; it must hold at least one task and no name twice")
        for task in tasks:
            check_not_reserved(task.name)
            for split in SPLITS:
                if not len(getattr(task, split)):
                    raise ValueError(f"task {task.name!r} has no {split} examples; each task needs some")
        check_start(config, options, names)
        check_joint_head(config, options, tasks)
        self.encoder = ExampleEncoder(processor, config.task_type, options.max_length, chat=options.chat)
        rows = config.most_rows(len(tasks)) if config.placement == "input" else 0
        self.encoder.check(base_model, tasks, prompt_tokens=rows)
        if options.augment is not None:
            self.encoder.check_augmentation()
        self.base_model = base_model
        self.config = config
        self.tasks = list(tasks)
        self.options = options
        self.folder = Path(folder).absolute()
        self.forward_transfer = forward_transfer
        self.about = dict(about or {})
        self.listener = listener or RunListener()
        self._splits: dict[str, dict[str, EncodedExamples]] = {}
        self._keeps_features = keep_validation_features
        self._unnamed = UnnamedTasks(
            self.tasks,
            self._encoded,
            self._answers_of,
            self._as_asked,
            options.eval_batch_size,
            rule_by_name(task_rule),
            keeps_features=keep_validation_features,
        )
        self._joint = JointHead(self.tasks, self._encoded, options, self._task_folder, self._task_seed)

    def run(self) -> dict[str, Any]:
        """Train and evaluate what is not done yet; returns the metrics, which are also in `metrics.json`."""
        check_joined()
        settings = self._settings()
        self._agree(settings)
        from_first(lambda: refuse_foreign_folder(self.folder))
        if not from_first((self.folder / RUN_FILE).exists):
            with self._attached(alone=True) as model:
                preflight(model, self.encoder, self.tasks, self._encoded)
        folder = self.folder
        with ExitStack() as stack:
            from_first(lambda: stack.enter_context(locked(folder)))
            self.folder = stack.enter_context(own_folder(folder))
            try:
                return self._run(settings)
            finally:
                self.folder = folder

    def _run(self, settings: dict[str, Any]) -> dict[str, Any]:
        with self._attached() as model:
            from_first(
                lambda: claim_folder(self.folder, settings)
            )  # after the model accepts the settings: a refused run leaves nothing behind
            for number, task in enumerate(self.tasks):
                self.listener.task_begins(number, task)
                self._run_stage(number, "probe", partial(self._probe, model, task))
                if number >= len(model.tasks):
                    self._train_and_save(model, number)
                self._run_stage(number, "evaluation", partial(self._evaluate, model, number))
                self._run_stage(number, "class_incremental", partial(self._evaluate_unnamed, model, number))
                shutil.rmtree(self._task_folder(number) / "checkpoints", ignore_errors=True)
                self.listener.task_ends(number, task, self._read_stage(number, "probe"), self._results(number))
            self._assert_unchanged(model)
        for number in range(1, len(self.tasks)) if self.forward_transfer else ():
            self._run_stage(number, "alone", partial(self._train_alone, number))
        metrics = self._metrics()
        write_json(self.folder / "metrics.json", metrics)
        return metrics

    # Stages

    def _settings(self) -> dict[str, Any]:
        """Return the content of `run.json`."""
        settings: dict[str, Any] = {
            "method": self.config.to_dict(),
            "training": self._training,
            "forward_transfer": self.forward_transfer,
            "tasks": {task.name: data_digest(task) for task in self.tasks},
            "base_fingerprint": fingerprint(without_head(self.base_model)),
            "about": self.about,
        }
        rule = self._unnamed.rule
        if type(rule) is not ClosedForm:  # runs made before these could be chosen do not have them
            settings["task_rule"] = rule.name
        if rule.has_own_features:
            settings["feature_map"] = rule.feature_map
        elif rule.settings:
            settings["task_rule_settings"] = rule.settings
        if not self._keeps_features:
            settings["keep_validation_features"] = False
        if self.config.task_type not in HEAD_TASK_TYPES:
            settings["label_words"] = {task.name: task.answers for task in self.tasks}
            templates = {task.name: task.template for task in self.tasks if task.template is not None}
            settings |= {"templates": templates} if templates else {}
        return settings

    @property
    def _training(self) -> dict[str, Any]:
        """The options as a file has them, with the rate of prompts that the type of task stands for."""
        return self.options.to_dict() | {"prompt_rate": self.options.rates(self.config.task_type)["prompt"]}

    def _agree(self, settings: dict[str, Any]) -> None:
        """Check that processes are of the same run; what `about` says, such as paths, may differ between nodes."""
        parts = {"method": "{}", "training": "{}", "tasks": "the data of task {!r}"}
        named = {name.format(key): x for part, name in parts.items() for key, x in settings[part].items()}
        whole = {name: x for name, x in settings.items() if name not in (*parts, "about")}
        agree(named | whole | versions() | {"the device": device_name(self.base_model.device)})

    @contextmanager
    def _attached(self, *, alone: bool = False) -> Iterator[QTuningModel]:
        """The model with all finished tasks, or with none (`alone`); it is detached from the base model afterwards."""
        saved = self.folder / "adapter"
        if not alone and (saved / CONFIG_FILE).exists():
            model = QTuningModel.from_pretrained(self.base_model, saved)
        else:
            set_seed(self.options.seed)
            model = QTuningModel(self.base_model, self.config)
        if self._unnamed.rule.name in RULES:  # others cannot be saved
            model.task_rule = self._unnamed.rule
        try:
            yield model
        finally:
            model.detach()

    def _train_and_save(self, model: QTuningModel, number: int) -> None:
        self.listener.stage_begins("training")
        record = self._train_task(model, number, self._task_folder(number) / "checkpoints")
        name = self.tasks[number].name
        agree({f"the adapter of task {name!r}": tensors_digest(model.adapters[name].tensors())})
        write_json(self._task_folder(number) / "training.json", record)
        self._unnamed.record(model, number)
        model.save_pretrained(self.folder / "adapter")

    def _train_task(self, model: QTuningModel, number: int, checkpoints: Path) -> dict[str, Any]:
        """Start, train and finish one task; returns the content of `training.json`."""
        task, options = self.tasks[number], self.options
        probe = self._tuned_probe(model, task) if options.head_start == "probe" else None
        began = time.perf_counter()
        set_seed(self._task_seed(number))
        previous = model.tasks[-1] if model.tasks else None
        train, validation = self._to_train_on(task), self._asked(task, "validation")
        start = start_task(model, task, options, train, validation, probe)
        steps = self._take_steps(model, number, train, previous, checkpoints) if options.steps else NO_STEPS
        if options.prompt_momentum:
            mix_with_earlier_prompts(model, options.prompt_momentum)
        if options.steps and options.head_end == "mixed" and model.has_heads and task.problem_type == SINGLE:
            mix_head(model, train, validation, options.eval_batch_size)
        adapter = model.finish_task()
        return {
            "name": task.name,
            "label_names": list(task.label_names),
            "problem_type": task.problem_type,
            "metric": task.metric,
            "num_train": len(task.train),
            "num_validation": len(task.validation),
            "num_test": len(task.test),
            "seconds": time.perf_counter() - began,  # without the time before an interruption
            "prefix_rows": adapter.prefix_rows,
            **start,
            **steps,
            **method_record(model),
        }

    def _take_steps(
        self, model: QTuningModel, number: int, train: EncodedExamples, previous: str | None, checkpoints: Path
    ) -> dict[str, Any]:
        """Train the task that is started, and return what the record says of its steps."""
        task, options = self.tasks[number], self.options.for_examples(len(train))
        if options.augment is not None and isinstance(train, ImageExamples):
            train = train.augmented(AUGMENTATIONS[options.augment], self._task_seed(number))
        elif model.retains_memory:  # of images that change, a step computes them
            train = train.with_column("retention_features", self._features(model, train, previous))
        trainer = TaskTrainer(
            model,
            replace(options, seed=self._task_seed(number)),
            checkpoints,
            train=train,
            validation=self._asked(task, "validation"),
            answers=self._answers(task),
            earlier_means=self._joint.class_means(len(model.tasks)) if options.contrast else None,  # none learned alone
            callbacks=[self.listener.step_callback(options.steps)],
        )
        trainer.train_or_resume()
        return steps_record(trainer, task.metric)

    def _evaluate(self, model: QTuningModel, number: int) -> dict[str, Any]:
        """Evaluate each task so far under the live prefix, and this task under its adapter."""
        if len(model.tasks) != number + 1:
            raise RuntimeError(
                f"{self.folder}: the evaluation after task {number + 1} is missing, and the queue has changed since"
            )
        live = [self._score(model, task, live=True) for task in self.tasks[: number + 1]]
        task = self.tasks[number]
        digest = tensors_digest(model.adapters[task.name].tensors())
        return {"live_queue": live, "task_adapter": self._score(model, task), "adapter_digest": digest}

    def _evaluate_unnamed(self, model: QTuningModel, number: int) -> dict[str, Any]:
        """Evaluate each task so far without its name."""
        lacking = self._unnamed.lack_statistics(model, number)
        for each in lacking:
            self._unnamed.record(model, each)
        if lacking:
            model.save_pretrained(self.folder / "adapter")
        if self.options.joint_head or self.options.contrast:
            self._joint.learn(model, number)
        previous = self._read_stage(number - 1, "class_incremental") if number else None
        return self._unnamed.stage(model, number, previous, self._joint if self.options.joint_head else None)

    def _results(self, number: int) -> dict[str, Any]:
        """What a listener is told of the evaluation after a task."""
        unnamed = self._read_stage(number, "class_incremental")["adapters"]
        return self._read_stage(number, "evaluation") | {"class_incremental": unnamed}

    def _assert_unchanged(self, model: QTuningModel) -> None:
        """Check that no adapter has changed since it was evaluated, which is why a stored task is never forgotten."""
        for number, (name, adapter) in enumerate(model.adapters.items()):
            if tensors_digest(adapter.tensors()) != self._read_stage(number, "evaluation")["adapter_digest"]:
                raise RuntimeError(f"{self.folder}: the adapter of {name!r} is not the one that was evaluated")

    def _train_alone(self, number: int) -> dict[str, Any]:
        """Train the task with an empty queue and a fresh shared prompt, with the same budget and seed."""
        folder = self._task_folder(number) / "alone"
        with self._attached(alone=True) as model:
            self._train_task(model, number, folder)
            task = self.tasks[number]
            found = self._score(model, task)
        shutil.rmtree(folder, ignore_errors=True)  # without steps there is none
        return {task.metric: found}

    def _probe(self, model: QTuningModel, task: Task) -> dict[str, Any]:
        probe, (features, labels) = self._tuned_probe(model, task), self._features_and_labels(model, task, "test")
        return {task.metric: score(task.problem_type, probe(features), labels), "C": probe.C}

    def _tuned_probe(self, model: QTuningModel, task: Task) -> LinearProbe:
        train, validation = (self._features_and_labels(model, task, split) for split in ("train", "validation"))
        return from_first(lambda: tuned_probe(train, validation, task.problem_type, len(task.label_names)))

    # Pieces

    def _features_and_labels(self, model: QTuningModel, task: Task, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Return features of the frozen model, and labels."""
        labels = self._encoded(task)[split].columns["labels"]
        return self._unnamed.features(model, task, split).numpy(), labels.numpy()

    def _score(self, model: QTuningModel, task: Task, *, live: bool = False) -> float:
        model.set_task(task.name, live=live)
        test = self._asked(task, "test")
        return task_score(model, test, self.options.eval_batch_size, self._answers(task), task.problem_type)

    def _features(self, model: QTuningModel, examples: EncodedExamples, task: str | None) -> Tensor:
        return features(model, examples, self.options.eval_batch_size, task=task)

    def _answers(self, task: Task) -> Answers | None:
        return self.encoder.encode_answers(task.answers, task=task.name)

    def _to_train_on(self, task: Task) -> EncodedExamples:
        """Return the training split; of a language model with its answers as labels."""
        answers = self._answers(task)
        if answers is None:
            return self._encoded(task)["train"]
        return self.encoder.encode_with_answers(task.train, answers, task.template)

    def _answers_of(self, name: str) -> Answers | None:
        return self._answers(self._task(name))

    def _as_asked(self, name: str, examples: EncodedExamples) -> EncodedExamples:
        return self.encoder.as_asked(examples, self._task(name).template)

    def _task(self, name: str) -> Task:
        return next(task for task in self.tasks if task.name == name)

    def _asked(self, task: Task, split: str) -> EncodedExamples:
        """Return a split as the task's own adapter is asked about it."""
        return self._as_asked(task.name, self._encoded(task)[split])

    def _encoded(self, task: Task) -> dict[str, EncodedExamples]:
        if task.name not in self._splits:
            self._splits[task.name] = {split: self.encoder.encode(getattr(task, split)) for split in SPLITS}
        return self._splits[task.name]

    def _task_folder(self, number: int) -> Path:
        return self.folder / "tasks" / f"{number:02d}-{re.sub(r'[^A-Za-z0-9_.-]+', '_', self.tasks[number].name)}"

    def _task_seed(self, number: int) -> int:
        return seed_of_task(self.options.seed, number)

    def _run_stage(self, number: int, stage: str, compute: Callable[[], dict[str, Any]]) -> None:
        path = self._task_folder(number) / f"{stage}.json"
        if not path.exists():
            self.listener.stage_begins(stage)
            found = compute()
            write_json(path, from_first(lambda: found))

    def _read_stage(self, number: int, stage: str) -> dict[str, Any]:
        return read_json(self._task_folder(number) / f"{stage}.json")

    def _metrics(self) -> dict[str, Any]:
        numbers = range(len(self.tasks))
        evaluations = [self._read_stage(number, "evaluation") for number in numbers]
        stored = [evaluation["task_adapter"] for evaluation in evaluations]
        alone = (
            [self._read_stage(n, "alone")[self.tasks[n].metric] if n else None for n in numbers]
            if self.forward_transfer
            else None
        )
        probes = [self._read_stage(number, "probe")[self.tasks[number].metric] for number in numbers]
        least = -1.0 if any(task.problem_type == REGRESSION for task in self.tasks) else 0.0
        adapter_rows = [_padded_row(stored[: number + 1], len(self.tasks)) for number in numbers]
        live_rows = [_padded_row(evaluation["live_queue"], len(self.tasks)) for evaluation in evaluations]
        return {
            "tasks": [task.name for task in self.tasks],
            "per_task": [self._read_stage(number, "training") for number in numbers],
            "task_adapter": evaluation_summary(adapter_rows, alone, least=least),
            "live_queue": evaluation_summary(live_rows, alone, least=least),
            "class_incremental": self._unnamed.summary([self._read_stage(n, "class_incremental") for n in numbers]),
            "baselines": {"linear_probe": {"accuracy": probes, "average_accuracy": float(np.mean(probes))}},
            "config": {"method": self.config.to_dict(), "training": self._training, **self.about},
            "versions": versions(),
            "device": device_name(self.base_model.device),
            "processes": process_count(),
            "seed": self.options.seed,
        }


def _padded_row(row: list[float], length: int) -> list[float | None]:
    return [*row, *[None] * (length - len(row))]
