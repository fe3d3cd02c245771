"""peft's methods, trained as this library trains: the same batches, steps, clipping, schedule, looks and kept state."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, set_seed

from qtuning_fast.bench.language.arms import LanguageModel, Learned
from qtuning_fast.bench.language.scores import ROWS, plain_scores, scores_of
from qtuning_fast.integrations.transformers.layers import dummy_inputs
from qtuning_fast.lifelong.data.encoded import EncodedExamples
from qtuning_fast.lifelong.data.encoding import ExampleEncoder
from qtuning_fast.lifelong.options import TrainingOptions
from qtuning_fast.lifelong.scores import score
from qtuning_fast.lifelong.task_trainer import KEPT_BY, StepTimer, collated, measures, seed_of_task, training_arguments
from qtuning_fast.lifelong.tasks import Task
from qtuning_fast.method.labels import SINGLE, label_loss
from qtuning_fast.model.scoring import Answers

RANK, VIRTUAL_TOKENS = 8, 20


def peft_config(method: str, model: LanguageModel, base_config: Any) -> PeftConfig:
    """Return the settings of one of peft's methods; what is not named here is peft's default.

    Raises:
        ValueError: there is no method of this name.
    """
    two_stacks = base_config.is_encoder_decoder
    kind = "SEQ_2_SEQ_LM" if two_stacks else "CAUSAL_LM"
    if method == "lora":
        return LoraConfig(task_type=kind, r=RANK, target_modules=list(model.projections))
    if method == "prompt-tuning":  # 1: peft would make a second prompt for the decoder, which nothing reads
        return PromptTuningConfig(task_type=kind, num_virtual_tokens=VIRTUAL_TOKENS, num_transformer_submodules=1)
    if method == "prefix-tuning":
        # peft takes a head's size to be that of the model over the number of heads, which flan-t5-small's is not.
        own = {"token_dim": base_config.num_heads * base_config.d_kv} if two_stacks else {}
        return PrefixTuningConfig(task_type=kind, num_virtual_tokens=VIRTUAL_TOKENS, **own)
    raise ValueError(f"method is {method!r}; it must be lora, prompt-tuning or prefix-tuning")


def with_peft(base: PreTrainedModel, method: str, model: LanguageModel) -> PeftModel:
    """Return a copy of a base model with one of peft's methods on it, in eval mode.

    Raises:
        RuntimeError: this peft computes no prefix with this transformers.
    """
    wrapped = get_peft_model(copy.deepcopy(base), peft_config(method, model, base.config)).eval()
    if method == "prefix-tuning":
        _check_prefix(wrapped, base)
    return wrapped


@torch.no_grad()
def _check_prefix(wrapped: PeftModel, base: PreTrainedModel) -> None:
    """Raise a RuntimeError if peft's prefix, which starts at random, leaves the logits as they are."""
    inputs = {name: each for name, each in dummy_inputs(base).items() if name in ("input_ids", "decoder_input_ids")}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    why = ""
    try:
        reached = not torch.equal(wrapped(**inputs).logits, base(**inputs).logits)
    except Exception as error:  # the names of caches change between versions, and so does what then fails
        reached, why = False, f" ({type(error).__name__}: {error})"
    if not reached:
        raise RuntimeError(
            f"peft {peft.__version__} computes no prefix with transformers {transformers.__version__}{why}; "
            "`make bench-language OLDER=1` runs the study with an older transformers, on which it does"
        )


class PeerTrainer(Trainer):
    """Trains one of peft's methods on a task.

    The model stays in eval mode, as base models do under this library's prompts: its dropout is off. Nothing else that
    is trained here has any.

    Args:
        model: the base model with the method on it.
        options: the budget; its seed is that of the batches.
        rate: the learning rate.
        folder: for what a Trainer writes, which is nothing.
        train, validation: the examples, as the task asks about them; those to train on with their answers.
        answers: the answers, one a class.
    """

    def __init__(
        self,
        model: PeftModel,
        options: TrainingOptions,
        rate: float,
        folder: Path,
        *,
        train: EncodedExamples,
        validation: EncodedExamples,
        answers: Answers,
    ) -> None:
        self._rate, self._answers = rate, answers
        self._two_stacks = model.get_base_model().config.is_encoder_decoder
        self.clock, self.best = StepTimer(), BestLook()
        arguments = training_arguments(options, folder, model.device, rate)
        arguments.set_save("no")
        arguments.load_best_model_at_end = False
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=validation.by_length()[0],
            data_collator=collated,
            compute_metrics=lambda found: measures(SINGLE, found.predictions, found.label_ids),
            callbacks=[self.clock, self.best],
        )
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over what the method trains."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(trained_parameters(self.model), lr=self._rate, weight_decay=0.0)
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the answers."""
        model.eval()  # a Trainer sets train mode before each step
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        return None, plain_scores(model, inputs, self._answers, two_stacks=self._two_stacks), labels

    def train_and_keep_best(self) -> None:
        """Train the task; the model ends in the state that is best on the validation split, the first included."""
        self.evaluate()
        self.train()
        self.best.restore(self.model)


class BestLook(TrainerCallback):
    """Keeps the trained parameters of the best look; of equal ones those of the first."""

    def __init__(self) -> None:
        self.step: int | None = None
        self._score = float("-inf")
        self._kept: list[Tensor] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = kwargs["metrics"][f"eval_{KEPT_BY}"]
        if found > self._score:
            self._score, self.step = found, state.global_step
            self._kept = [each.detach().clone() for each in trained_parameters(kwargs["model"])]

    @torch.no_grad()
    def restore(self, model: Any) -> None:
        """Put the kept parameters back."""
        for parameter, kept in zip(trained_parameters(model), self._kept, strict=True):
            parameter.copy_(kept)


def trained_parameters(model: Any) -> list[torch.nn.Parameter]:
    """Return what a method trains, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Peer:
    """One of peft's methods with a rate, for the tasks of one draw.

    Args:
        base: the frozen model, which is left as it is.
        encoder: encodes the tasks.
        method, model, rate: what is trained.
        options: the budget, and the seed of the run.
        folder: for what is written in between.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        encoder: ExampleEncoder,
        method: str,
        model: LanguageModel,
        rate: float,
        options: TrainingOptions,
        folder: Path,
    ) -> None:
        self._base, self._encoder, self._folder = base, encoder, folder
        self._method, self._model, self._rate, self._options = method, model, rate, options

    def learn(self, task: Task, number: int) -> Learned:
        """Learn the task with this number in the run, and test what was learned."""
        trainer = self._trained(task, number)
        found = self._scores(trainer.model, task, "test")
        stored = self._folder / "adapter"
        trainer.model.save_pretrained(stored, save_embedding_layers=False)
        return Learned(
            task.name,
            score(SINGLE, found, task.test.labels),
            trained_parameters=sum(each.numel() for each in trained_parameters(trainer.model)),
            stored_bytes=(stored / "adapter_model.safetensors").stat().st_size,
            step_seconds=trainer.clock.median,
            best_step=trainer.best.step,
        )

    def validation_loss(self, task: Task) -> float:
        """Learn a task, and return the loss of the right answers to its validation examples."""
        trainer = self._trained(task, 0)
        found = self._scores(trainer.model, task, "validation")
        return float(label_loss(found, torch.tensor(task.validation.labels), SINGLE))

    def _trained(self, task: Task, number: int) -> PeerTrainer:
        seed = seed_of_task(self._options.seed, number)
        set_seed(seed)
        answers = self._answers(task)
        trainer = PeerTrainer(
            with_peft(self._base, self._method, self._model),
            replace(self._options, seed=seed),
            self._rate,
            self._folder,
            train=self._encoder.encode_with_answers(task.train, answers, task.template),
            validation=self._asked(task, "validation"),
            answers=answers,
        )
        trainer.train_and_keep_best()
        return trainer

    def _scores(self, model: Any, task: Task, split: str) -> Tensor:
        two_stacks, device = self._base.config.is_encoder_decoder, self._base.device
        asked = self._asked(task, split)
        return scores_of(model, asked, self._answers(task), two_stacks=two_stacks, device=device, rows=ROWS)

    def _asked(self, task: Task, split: str) -> EncodedExamples:
        return self._encoder.as_asked(self._encoder.encode(getattr(task, split)), task.template)

    def _answers(self, task: Task) -> Answers:
        answers = self._encoder.encode_answers(task.answers, task=task.name)
        assert answers is not None  # a language model has some
        return answers
