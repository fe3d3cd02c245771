"""What transformers' Trainer, pipelines and collators, accelerate and torch.export ask of a model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from types import MethodType
from typing import Any, NoReturn

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qtuning_fast.model.backbone import Backbone


class _OfTheBase:
    """An attribute of the base model under the same name; absent if the base model lacks it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, model: PretrainedInterface | None, owner: type) -> Any:
        return self if model is None else getattr(model.base_model, self._name)

    def __set__(self, model: PretrainedInterface, value: Any) -> None:
        setattr(model.base_model, self._name, value)


class PretrainedInterface(nn.Module):
    """A module that stands for its `base_model` where transformers expects a `PreTrainedModel`.

    State dicts leave out the frozen weights of the base model, so a checkpoint of Trainer or accelerate holds
    what trains and nothing else.
    """

    base_model: PreTrainedModel
    backbone: Backbone

    accepts_loss_kwargs = True  # Trainer then gives `num_items_in_batch`, for exact gradient accumulation
    _keys_to_ignore_on_save: Sequence[str] | None = None  # Trainer reads it; `state_dict` leaves them out itself

    dtype = _OfTheBase()
    main_input_name = _OfTheBase()
    input_modalities = _OfTheBase()
    output_modalities = _OfTheBase()
    generation_config = _OfTheBase()
    hf_device_map = _OfTheBase()
    is_gradient_checkpointing = _OfTheBase()
    can_generate = _OfTheBase()
    get_input_embeddings = _OfTheBase()
    get_output_embeddings = _OfTheBase()
    prepare_decoder_input_ids_from_labels = _OfTheBase()
    floating_point_ops = _OfTheBase()
    _supports_logits_to_keep = _OfTheBase()  # `generate` asks a model that assists another

    def __init__(self) -> None:
        super().__init__()
        self._loaded_as = ""
        self.register_state_dict_post_hook(_without_frozen_weights)
        self.register_load_state_dict_pre_hook(_note_prefix)
        self.register_load_state_dict_post_hook(_miss_no_frozen_weights)

    def name_inputs(self, inner: nn.Module) -> None:
        """Make `forward` take the inputs of `inner` in their order, and then its own by name.

        So inputs by position mean what they mean to the base model, and Trainer, which drops the columns of a dataset
        that no argument names, keeps those for the base model. A subclass's `forward` that names inputs of its own
        stays as it is.
        """
        forward = type(self).forward
        below = [each for each in type(self).__mro__ if issubclass(each, PretrainedInterface)]
        first = below[-2].forward  # of the class that a subclass may derive from; the last is this one
        if forward is not first and not _passes_everything(forward):
            return
        kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        theirs = [
            each.replace(annotation=inspect.Parameter.empty)
            for each in inspect.signature(type(inner).forward).parameters.values()
            if each.kind in kinds
        ]
        _, *ours, rest = inspect.signature(first).parameters.values()
        names = [each.name for each in theirs]
        more = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in ours if each.name not in names]
        positional = tuple(each.name for each in theirs[1:] if each.kind is kinds[0])

        def named(self: PretrainedInterface, *args: Any, **kwargs: Any) -> Any:
            if len(args) > len(positional):
                raise TypeError(f"forward takes {len(positional)} inputs by position, but {len(args)} were given")
            by_position = dict(zip(positional, args))
            twice = [name for name in by_position if name in kwargs]
            if twice:
                raise TypeError(f"forward got {', '.join(twice)} by position and by name")
            return forward(self, **by_position, **kwargs)

        named.__name__ = forward.__name__
        named.__signature__ = inspect.Signature([*theirs, *more, rest])  # type: ignore[attr-defined]
        self.forward = MethodType(named, self)

    # Trainer

    @property
    def has_heads(self) -> bool:
        """Whether tasks have heads of their own; otherwise the base model's language modelling head is used."""
        return False

    @property
    def loss_type(self) -> str | None:
        """The base model's, by which Trainer counts labels: those of a causal model are shifted, a head's are not."""
        return None if self.has_heads else getattr(self.base_model, "loss_type", None)

    def _get_name(self) -> str:
        # By this name Trainer decides whether label smoothing shifts the labels.
        base = type(self.base_model).__name__
        shifts = not self.has_heads and base in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        return base if shifts else type(self).__name__

    def __repr__(self) -> str:
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Names that `DistributedDataParallel` skips: the frozen backbone never differs and may be sharded (FSDP2)."""
        frozen = [name for name, parameter in self.base_model.named_parameters() if not parameter.requires_grad]
        buffers = [name for name, _ in self.base_model.named_buffers()]
        return [f"base_model.{name}" for name in (*frozen, *buffers)]

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(
            "nn.DataParallel copies layers without their prefixes; start one process for each GPU by torchrun or "
            "accelerate launch, or show one GPU only by CUDA_VISIBLE_DEVICES=0"
        )

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Call the base model's method; reentrant and non-reentrant checkpoints both work."""
        self._enable_checkpointing(self.base_model.gradient_checkpointing_enable, *args, **kwargs)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Call the base model's method, which replaces `gradient_checkpointing_enable` in transformers 5.24."""
        self._enable_checkpointing(self.base_model.activation_checkpointing_enable, *args, **kwargs)

    def _enable_checkpointing(self, enable: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        with self.backbone.injector.lock:
            self.base_model.disable_input_require_grads()  # enabling twice would lose the first hook
            enable(*args, **kwargs)
            self.train(self.training)

    def gradient_checkpointing_disable(self) -> None:
        """Call the base model's method."""
        self._disable_checkpointing(self.base_model.gradient_checkpointing_disable)

    def activation_checkpointing_disable(self) -> None:
        """Call the base model's method, which replaces `gradient_checkpointing_disable` in transformers 5.24."""
        self._disable_checkpointing(self.base_model.activation_checkpointing_disable)

    def _disable_checkpointing(self, disable: Callable[[], None]) -> None:
        with self.backbone.injector.lock:
            disable()
            self.train(self.training)

    # Sizes

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameters, as transformers' method of this name does."""
        embeddings = {each.weight for each in self.modules() if exclude_embeddings and isinstance(each, nn.Embedding)}
        parameters = set(self.parameters()) - embeddings
        return sum(each.numel() for each in parameters if each.requires_grad or not only_trainable)

    def print_trainable_parameters(self) -> None:
        """Print the number of trainable parameters and of all parameters."""
        everything, trainable = self.num_parameters(), self.num_parameters(only_trainable=True)
        print(f"trainable: {trainable:,} of {everything:,} parameters, {trainable / max(1, everything):.2%}")

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the bytes of the parameters, and of the buffers, as transformers' method of this name does."""
        tensors = {*self.parameters(), *(self.buffers() if return_buffers else ())}
        return sum(each.nbytes for each in tensors)


def _passes_everything(forward: Callable[..., Any]) -> bool:
    """Return whether a method is `forward(self, *args, **kwargs)`."""
    _, *others = inspect.signature(forward).parameters.values()
    return [each.kind for each in others] == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]


def config_of_task(base: PreTrainedConfig, label_names: Sequence[str], problem_type: Any) -> PreTrainedConfig:
    """Return a copy of the base model's config with the classes of a task, as pipelines and Trainer read them."""
    config = copy.copy(base)
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: index for index, name in config.id2label.items()}
    config.problem_type = problem_type
    return config


def _without_frozen_weights(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in _frozen(model, state, prefix):
        del state[name]


def _note_prefix(model: nn.Module, state: Any, prefix: str, *_: Any) -> None:
    assert isinstance(model, PretrainedInterface)
    model._loaded_as = prefix  # the next hook gets the names of the whole, but no prefix


def _miss_no_frozen_weights(model: nn.Module, incompatible: Any) -> None:
    for name in _frozen(model, incompatible.missing_keys, str(model._loaded_as)):
        incompatible.missing_keys.remove(name)


def _frozen(model: nn.Module, names: Iterable[str], prefix: str) -> list[str]:
    """Return those of the names that are frozen parameters and buffers of the base model in a state dict.

    Args:
        names: names of a whole state dict.
        prefix: what names of this model begin with.
    """
    assert isinstance(model, PretrainedInterface)
    trained = {name for name, each in model.base_model.named_parameters(remove_duplicate=False) if each.requires_grad}
    start = f"{prefix}base_model."
    return [name for name in names if name.startswith(start) and name.removeprefix(start) not in trained]
