"""Scores of given answers under a language model, which classify an input by label words."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from qtuning_fast.integrations.transformers.caches import CACHE
from qtuning_fast.model.inferring import inferred
from qtuning_fast.model.model import QTuningModel

Answers = Sequence[list[int]]
"""The token ids of each answer, including its end token if there is one."""


@torch.no_grad()
def answer_scores(
    model: QTuningModel,
    inputs: dict[str, Tensor],
    answers: Answers,
    *,
    task_names: Sequence[str] | str | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Return `log p(answer | input)` of each answer under the active task, a task a sample, or the base model alone.

    The input is read once, and its cache serves all answers. In an encoder-decoder the decoder writes the answer after
    its start token; in a decoder the answer continues the input. The score is the exact sum over the answer's tokens,
    so without end tokens, an answer that another one starts with is always the more probable of the two.

    Args:
        model: a model with `task_type="text-to-text"` or `"causal-lm"`.
        inputs: the model's `input_ids` and `attention_mask`, `[B, N]`; padding may be on either side.
        answers: K sequences of token ids, of any lengths.
        task_names: one finished task for each sample, or `"infer"`, as in `QTuningModel.forward`.
        batch_size: maximum number of answers in one pass, counted over samples; it bounds the memory.

    Returns:
        `[B, K]` in float32.

    Raises:
        TypeError, ValueError: the model has heads instead of a language model, an answer is empty or not a sequence of
            the model's token ids, an input has no token, or `task_names` is invalid.
    """
    if model.has_heads:
        task_type = model.qtuning_config.task_type
        raise ValueError(f"task_type is {task_type!r}; only text-to-text and causal-lm have answers to score")
    if isinstance(task_names, str):
        with inferred(model, task_names, inputs) as found:
            return answer_scores(model, inputs, answers, task_names=found.names, batch_size=batch_size)
    _check_answers(answers, model.base_model.get_output_embeddings().weight.shape[0])
    with model.evaluating():
        begun = _Begun(model, inputs, task_names)
        scores = torch.empty(begun.samples, len(answers), device=begun.first.device)
        by_length = sorted(range(len(answers)), key=lambda number: len(answers[number]))
        at_once = max(1, batch_size // begun.samples)
        for start in range(0, len(answers), at_once):
            chosen = by_length[start : start + at_once]
            scores[:, chosen] = begun.scores([answers[number] for number in chosen])
        return scores


class _Begun:
    """A batch that the model has read, ready for its answers."""

    def __init__(self, model: QTuningModel, inputs: dict[str, Tensor], task_names: Sequence[str] | None) -> None:
        self.model, self.task_names = model, task_names
        self.two_stacks = model.base_model.config.is_encoder_decoder
        positions = model.backbone.injector.positions
        self.counts_positions = not self.two_stacks and positions.are_taken  # padding takes no position
        inputs = _with_mask(inputs)
        self.samples = len(inputs["attention_mask"])
        more: dict[str, Any] = {}
        if self.two_stacks:
            start = _start_token(model)
            more["decoder_input_ids"] = torch.full((self.samples, 1), start, device=inputs["attention_mask"].device)
        else:
            inputs = _left_padded(inputs)
            if self.counts_positions:
                more["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
            # `generate` calls the same private method: no public one tells whether a model takes logits_to_keep.
            if model.base_model.can_generate() and model.base_model._supports_logits_to_keep():  # type: ignore[operator]
                more["logits_to_keep"] = 1
        output = model(**inputs | more, use_cache=True, task_names=task_names)
        self.mask = inputs["attention_mask"]
        self.cache = output[CACHE]
        self.memory = output.encoder_last_hidden_state if self.two_stacks else None
        self.first = output.logits[:, -1].float().log_softmax(-1)  # [B, V], for each answer's first token

    def scores(self, answers: Answers) -> Tensor:
        """Return the scores `[B, k]` of all answers, from one pass."""
        B, k, longest = self.samples, len(answers), max(map(len, answers))
        tokens = torch.zeros(k, longest, dtype=torch.long)
        there = torch.zeros(k, longest, dtype=torch.bool)
        for row, answer in enumerate(answers):
            tokens[row, : len(answer)] = torch.tensor(answer)
            there[row, : len(answer)] = True
        tokens, there = tokens.to(self.first.device), there.to(self.first.device)
        total = self.first[:, tokens[:, 0]]
        if longest > 1:
            logits = self._continued(tokens[:, :-1].repeat(B, 1), k)
            after = logits.float().log_softmax(-1).gather(2, tokens[:, 1:].repeat(B, 1)[..., None])
            total = total + after.view(B, k, -1).where(there[:, 1:], 0).sum(-1)
        return total

    def _continued(self, tokens: Tensor, times: int) -> Tensor:
        """Return logits `[B * times, L, V]` after each token of `[B * times, L]`, each sample `times` in a row."""
        cache = copy.deepcopy(self.cache)  # the pass extends it, and the next answers start from it again
        cache.batch_repeat_interleave(times)
        mask = self.mask.repeat_interleave(times, dim=0)
        inputs: dict[str, Any] = {CACHE: cache, "use_cache": True}
        if self.memory is not None:
            memory = BaseModelOutput(last_hidden_state=self.memory.repeat_interleave(times, dim=0))
            inputs |= {"encoder_outputs": memory, "attention_mask": mask, "decoder_input_ids": tokens}
        else:
            inputs |= {"input_ids": tokens, "attention_mask": torch.cat([mask, torch.ones_like(tokens)], dim=1)}
            if self.counts_positions:
                inputs["position_ids"] = mask.sum(1, keepdim=True) + torch.arange(tokens.shape[1], device=tokens.device)
        names = None if self.task_names is None else [name for name in self.task_names for _ in range(times)]
        return self.model(**inputs, task_names=names).logits


def _check_answers(answers: Answers, vocabulary: int) -> None:
    if not len(answers):
        raise ValueError("answers is empty; there is nothing to score")
    for answer in answers:
        if isinstance(answer, str) or not all(isinstance(token, int) for token in answer):
            raise TypeError(f"answers holds {answer!r}; each answer must be a sequence of token ids")
        if not len(answer) or not all(0 <= token < vocabulary for token in answer):
            raise ValueError(
                f"answers holds {list(answer)}; an answer needs at least one token, of ids below {vocabulary}"
            )


def _start_token(model: QTuningModel) -> int:
    start = getattr(model.base_model.config, "decoder_start_token_id", None)
    if start is None:
        raise ValueError(f"the config of this {type(model.base_model).__name__} lacks decoder_start_token_id")
    return start


def _with_mask(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs with a padding mask of zeros and ones, `[B, N]`."""
    tokens = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
    mask = inputs.get("attention_mask")
    mask = tokens.new_ones(tokens.shape[:2], dtype=torch.long) if mask is None else (mask != 0).long()
    if not mask.any(1).all():
        raise ValueError("attention_mask: an input has no token; every input needs at least one")
    return inputs | {"attention_mask": mask}


def _left_padded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move all padding to the front, so that every answer directly follows its input."""
    mask = inputs["attention_mask"]
    order = mask.argsort(dim=1, stable=True)

    def moved(x: Tensor) -> Tensor:
        index = order.view(*order.shape, *[1] * (x.ndim - 2)).expand(x.shape)
        return x.gather(1, index)

    return {name: moved(x) if x.shape[:2] == mask.shape else x for name, x in inputs.items()}
