"""The scores of answers by any language model, as plainly as possible: passes over texts with their answers.

`answer_scores` has the same rule for models of this library: `log p(answer and its end | text)`.
"""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qtuning_fast.integrations.transformers.caches import CACHE
from qtuning_fast.lifelong.data.encoded import EncodedExamples, in_order, pad_rows
from qtuning_fast.lifelong.data.encoding import ExampleEncoder
from qtuning_fast.lifelong.tasks import Examples, Task
from qtuning_fast.method.labels import IGNORED
from qtuning_fast.model.scoring import Answers

AnyModel = Callable[..., Any]
"""A model of transformers or of peft, or what calls one."""

ROWS = 32  # in a pass; the logits of each are over the whole vocabulary
EXAMPLES_A_CLASS = 4


@torch.no_grad()
def plain_scores(
    model: AnyModel, inputs: dict[str, Tensor], answers: Answers, *, two_stacks: bool, rows: int = ROWS
) -> Tensor:
    """Return `log p(answer | text)` of each answer.

    Args:
        model: a decoder, or an encoder-decoder; what it puts in front of the texts may have logits.
        inputs: `input_ids` and `attention_mask`, `[B, N]`, padded on the right.
        answers: K sequences of token ids, with their end tokens.
        two_stacks: whether it is an encoder-decoder.
        rows: the most pairs of a text and an answer in a pass.

    Returns:
        `[B, K]` in float32.
    """
    B, K = len(inputs["input_ids"]), len(answers)
    pairs = [(text, answer) for text in range(B) for answer in range(K)]
    batch_of = _with_decoder if two_stacks else _continued
    scores = [
        _sums(model, *batch_of(inputs, [(text, answers[answer]) for text, answer in pairs[start : start + rows]]))
        for start in range(0, len(pairs), rows)
    ]
    return torch.cat(scores).view(B, K)


def _with_decoder(inputs: dict[str, Tensor], pairs: list[tuple[int, list[int]]]) -> tuple[dict[str, Tensor], Tensor]:
    """The batch of an encoder-decoder, and the token that each of its logits is to predict."""
    texts = torch.tensor([text for text, _ in pairs])
    wanted = pad_rows([answer for _, answer in pairs], max(len(answer) for _, answer in pairs), IGNORED)
    wanted = wanted.to(inputs["input_ids"].device)
    return {name: column[texts] for name, column in inputs.items()} | {"labels": wanted}, wanted


def _continued(inputs: dict[str, Tensor], pairs: list[tuple[int, list[int]]]) -> tuple[dict[str, Tensor], Tensor]:
    """The batch of a decoder, and the token that each of its logits is to predict."""
    texts = [inputs["input_ids"][text][inputs["attention_mask"][text] != 0].tolist() for text, _ in pairs]
    whole = [[*text, *answer] for text, (_, answer) in zip(texts, pairs)]
    wanted = [[IGNORED] * (len(text) - 1) + answer for text, (_, answer) in zip(texts, pairs)]
    length, device = max(map(len, whole)), inputs["input_ids"].device
    batch = {
        "input_ids": pad_rows(whole, length, 0),
        "attention_mask": pad_rows([[1] * len(w) for w in whole], length, 0),
    }
    return {name: column.to(device) for name, column in batch.items()}, pad_rows(wanted, length, IGNORED).to(device)


def _sums(model: AnyModel, batch: dict[str, Tensor], wanted: Tensor) -> Tensor:
    """Return the sum of the log-probabilities of the wanted tokens, `[rows]`."""
    logits = model(**batch).logits[:, -wanted.shape[1] :]  # without those of virtual tokens in front
    there = wanted != IGNORED
    each = logits[there].float().log_softmax(-1).gather(1, wanted[there][:, None])[:, 0]
    return torch.zeros(len(wanted), device=each.device).index_add_(0, there.nonzero()[:, 0], each)


def scores_of(
    model: AnyModel, examples: EncodedExamples, answers: Answers, *, two_stacks: bool, device: torch.device, rows: int
) -> Tensor:
    """Return the scores of all examples, `[examples, K]` on the CPU; see `plain_scores`."""
    examples, places = examples.by_length()
    found = [
        plain_scores(model, batch, answers, two_stacks=two_stacks, rows=rows).cpu()
        for batch in examples.batches(max(1, rows // len(answers)), device)
    ]
    return in_order(torch.cat(found), places)


class InContext:
    """A decoder that has read something in front of every text; its cache is computed once.

    Args:
        model: the decoder with its language modelling head.
        tokens: what it has read.
    """

    def __init__(self, model: Any, tokens: list[int]) -> None:
        self._model = model
        ids = torch.tensor([tokens], device=model.device)
        with torch.no_grad():
            self._cache = model.base_model(input_ids=ids, use_cache=True)[CACHE]  # without logits
        self._read = len(tokens)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        cache = copy.deepcopy(self._cache)  # the pass extends it
        cache.batch_repeat_interleave(len(input_ids))
        mask = torch.cat([attention_mask.new_ones(len(input_ids), self._read), attention_mask], dim=1)
        return self._model(input_ids=input_ids, attention_mask=mask, use_cache=True, **{CACHE: cache})


def chosen_examples(task: Task, seed: int) -> Examples:
    """Return the training examples that stand in front of a text: some of each class, in an order by the seed."""
    places: dict[Any, list[int]] = defaultdict(list)
    for place, label in enumerate(task.train.labels):
        places[label].append(place)
    chosen = [place for each in places.values() for place in each[:EXAMPLES_A_CLASS]]
    random.Random(seed).shuffle(chosen)
    return Examples([task.train.inputs[place] for place in chosen], [task.train.labels[place] for place in chosen])


def tokens_in_front(examples: Examples, encoder: ExampleEncoder, answers: Answers, template: str | None) -> list[int]:
    """Return the tokens of examples as other arms train on them, in the template with answer and end, a line each."""
    encoded = encoder.encode_with_answers(examples, answers, template).columns
    line_end = encoder.processor("\n", add_special_tokens=False)["input_ids"]
    tokens: list[int] = []
    for row, mask in zip(encoded["input_ids"], encoded["attention_mask"]):
        tokens += [*row[mask != 0].tolist(), *line_end]
    return tokens
