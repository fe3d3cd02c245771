"""Encode the examples of a task as inputs of the base model, for each type of task.

- A model with heads reads a text or an image and learns its class.
- An encoder-decoder (text-to-text) reads a text and learns to write the word for its class.
- A decoder (causal-lm) learns to continue a text with this word; the loss counts only the word.

The tokenizer's end-of-sequence token ends each word, so that a word can be told from a longer one that begins with it.
A language model reads a text in the task's template, and in the tokenizer's chat template if the run asks for it. If
that is too long, the text is cut, and not what follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from qtuning_fast.integrations.transformers.positions import first_position
from qtuning_fast.lifelong.data.augmentation import size_of_pixels
from qtuning_fast.lifelong.data.encoded import (
    FALLBACK_PAD_TOKEN,
    EncodedExamples,
    TextExamples,
    pad_rows,
    tokenize_texts,
)
from qtuning_fast.lifelong.data.images import ImageExamples
from qtuning_fast.lifelong.tasks import TEXT_SLOT, Examples, Task
from qtuning_fast.method.config import HEAD_TASK_TYPES
from qtuning_fast.method.labels import IGNORED, SINGLE
from qtuning_fast.model.scoring import Answers


class ExampleEncoder:
    """Encodes the examples of a run.

    Args:
        processor: the base model's tokenizer, or its image processor for image-classification.
        task_type: as in the config of the run.
        max_length: the number of tokens to which each text is cut or padded, its template included.
        chat: whether a text becomes the user's message in the tokenizer's chat template, and the answer the
            assistant's.

    Raises:
        TypeError: the task type needs another kind of processor.
        ValueError: `chat` with another task type than causal-lm, or the tokenizer has no chat template.
    """

    def __init__(self, processor: Any, task_type: str, max_length: int, *, chat: bool = False) -> None:
        self.task_type = task_type
        self.max_length = max_length
        self.chat = chat
        self.reads_images = task_type == "image-classification"
        # A processor for both texts and images contains one for each.
        self.processor = getattr(processor, "image_processor" if self.reads_images else "tokenizer", processor)
        if self.reads_images != isinstance(self.processor, ImageProcessingMixin):
            needed = "an image processor" if self.reads_images else "a tokenizer"
            raise TypeError(f"processor is a {type(processor).__name__}; task_type={task_type!r} needs {needed}")
        if chat and task_type != "causal-lm":
            raise ValueError(f"chat is for task_type='causal-lm', but task_type is {task_type!r}; leave it out")
        if chat and getattr(self.processor, "chat_template", None) is None:
            raise ValueError("chat asks for the tokenizer's chat template, but this tokenizer has none; leave it out")

    def check(self, base_model: PreTrainedModel, tasks: Sequence[Task], *, prompt_tokens: int = 0) -> None:
        """Check that the tasks fit the model and the tokenizer.

        Args:
            base_model: the base model.
            tasks: the tasks of the run.
            prompt_tokens: the most prompt tokens in front of a text.

        Raises:
            ValueError: the tasks hold texts but images are needed, or the other way round; a task has several labels an
                example or numbers, but the model has no heads; the texts are too long for the model; or the words for
                two classes of a task cannot be told apart.
        """
        for task in tasks:
            if task.holds_images != self.reads_images:
                kinds = ("images", "texts") if task.holds_images else ("texts", "images")
                raise ValueError(
                    f"task {task.name!r} holds {kinds[0]}, but task_type={self.task_type!r} needs {kinds[1]}"
                )
            if task.problem_type != SINGLE and self.task_type not in HEAD_TASK_TYPES:
                raise ValueError(
                    f"task {task.name!r} has problem_type={task.problem_type!r}, but with task_type={self.task_type!r} "
                    "a model answers with the word for one class; use task_type='sequence-classification'"
                )
        if self.reads_images:
            return
        if self.reads_templates:
            for task in tasks:
                self.check_template(task.template, task=task.name)
        longest = [len(answer) for task in tasks for answer in self.encode_answers(task.answers, task=task.name) or ()]
        after = max(longest, default=0) if self.task_type == "causal-lm" else 0
        added = self.processor.num_special_tokens_to_add()
        taken = prompt_tokens + after
        positions = getattr(base_model.config, "max_position_embeddings", None) or self.max_length + taken
        limit = positions - first_position(base_model) - taken
        if not added < self.max_length <= limit:
            raise ValueError(
                f"max_length is {self.max_length}; this model takes at most {limit} tokens"
                + (f" besides the {prompt_tokens} of a prompt" if prompt_tokens else "")
                + (f" and the {after} of an answer" if after else "")
                + f", including {added} special tokens"
            )

    def check_augmentation(self) -> None:
        """Raise a ValueError if training inputs cannot be cropped at random."""
        if not self.reads_images:
            raise ValueError(f"augment changes images, but task_type={self.task_type!r} reads texts; leave it out")
        size_of_pixels(self.processor)

    @property
    def reads_templates(self) -> bool:
        """Whether the model is a language model, which reads a text in its task's template."""
        return self.task_type not in HEAD_TASK_TYPES

    def encode(self, examples: Examples) -> EncodedExamples:
        """The inputs of the model with the class indices as `labels`, for features: no template says of which task."""
        if self.reads_images:
            return ImageExamples(examples.inputs, self.processor, examples.labels)
        if not self.reads_templates:
            return tokenize_texts(examples.inputs, self.processor, self.max_length, examples.labels)
        texts = [str(text) for text in examples.inputs]
        columns = self._padded_inputs(self._alone(texts), self.max_length).columns
        return TextExamples(columns | {"labels": torch.tensor(examples.labels)}, texts)

    def as_asked(self, examples: EncodedExamples, template: str | None) -> EncodedExamples:
        """The inputs of `encode` as the task with this template asks for an answer to them."""
        if not isinstance(examples, TextExamples):
            return examples
        tokens = self._asked(examples.texts, template)
        return self._padded_inputs(tokens, self.max_length).with_column("labels", examples.columns["labels"])

    def encode_with_answers(self, examples: Examples, answers: Answers, template: str | None = None) -> EncodedExamples:
        """The inputs that a language model trains on, all of one length; `labels` are the tokens of the answers."""
        given = [answers[label] for label in cast(Sequence[int], examples.labels)]  # `check` refuses other labels
        longest = max(map(len, answers))
        tokens = self._asked([str(text) for text in examples.inputs], template)
        if self.task_type == "text-to-text":
            return self._padded_inputs(tokens, self.max_length).with_column("labels", pad_rows(given, longest, IGNORED))
        length = self.max_length + longest
        labels = [[IGNORED] * len(text) + answer for text, answer in zip(tokens, given)]
        whole = self._padded_inputs([text + answer for text, answer in zip(tokens, given)], length)
        return whole.with_column("labels", pad_rows(labels, length, IGNORED))

    def encode_answers(self, words: Sequence[str], *, task: str) -> Answers | None:
        """The tokens of the words for a task's classes; None for models with heads.

        Raises:
            ValueError: two words have the same tokens, or one begins with the other and no token ends them.
        """
        if self.task_type in HEAD_TASK_TYPES:
            return None
        answers = [self._answer_tokens(word) for word in words]
        for i, answer in enumerate(answers):
            for j, other in enumerate(answers):
                if i != j and other[: len(answer)] == answer:
                    how = "have the same tokens" if len(other) == len(answer) else "begin alike, and no token ends them"
                    raise ValueError(
                        f"task {task!r}: the label words {words[i]!r} and {words[j]!r} cannot be told apart: to this "
                        f"tokenizer they {how}; give the task other label_words"
                    )
        return answers

    def _answer_tokens(self, word: str) -> list[int]:
        if self.task_type == "text-to-text":
            return list(self.processor(text_target=word)["input_ids"])
        # The tokens of a word depend on what precedes it: a text and a space, or the beginning of a message.
        begin = self._in_chat("a") if self.chat else "a"
        before, both = (
            self.processor(text, add_special_tokens=False)["input_ids"]
            for text in (begin, f"{begin}{word}" if self.chat else f"{begin} {word}")
        )
        end = self.processor.eos_token_id
        return [*both[len(before) :], *([] if end is None else [end])]

    def _asked(self, texts: Sequence[str], template: str | None) -> list[list[int]]:
        """Return the tokens of texts in the task's template; what is too long has its text cut."""
        if template is None and not self.chat:
            return self._alone(texts)
        tokens = self._tokenize([self._in_template(text, template) for text in texts])
        return [row if len(row) <= self.max_length else self._cut(text, template) for row, text in zip(tokens, texts)]

    def _alone(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts without a template; a long text is cut behind its last token that fits."""
        stripped = [text.rstrip() for text in texts]  # the space belongs to the word that follows
        return self.processor(stripped, truncation=True, max_length=self.max_length)["input_ids"]

    def _cut(self, text: str, template: str | None) -> list[int]:
        """Return the tokens of as much of a text as fits into its template."""
        least, most = 0, len(text)
        [found] = self._tokenize([self._in_template("", template)])
        while least < most:  # the number of characters that fit
            middle = (least + most + 1) // 2
            [tokens] = self._tokenize([self._in_template(text[:middle], template)])
            if len(tokens) <= self.max_length:
                least, found = middle, tokens
            else:
                most = middle - 1
        return found

    def _in_template(self, text: str, template: str | None) -> str:
        whole = text if template is None else template.replace(TEXT_SLOT, text)
        return self._in_chat(whole) if self.chat else whole.rstrip()

    def _in_chat(self, message: str) -> str:
        said = [{"role": "user", "content": message}]
        return self.processor.apply_chat_template(said, tokenize=False, add_generation_prompt=True)

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return self.processor(list(texts), add_special_tokens=not self.chat)["input_ids"]  # a chat template has its own

    def check_template(self, template: str | None, *, task: str) -> None:
        """Raise a ValueError if a task's template leaves no room for a text."""
        [tokens] = self._tokenize([self._in_template("", template)])
        if len(tokens) >= self.max_length and (self.chat or template is not None):
            raise ValueError(
                f"task {task!r}: its template alone takes {len(tokens)} tokens, but max_length is "
                f"{self.max_length}; shorten it, or raise max_length"
            )

    def _padded_inputs(self, tokens: Sequence[Sequence[int]], length: int) -> EncodedExamples:
        fill = self.processor.pad_token_id
        return EncodedExamples(
            {
                "input_ids": pad_rows(tokens, length, FALLBACK_PAD_TOKEN if fill is None else fill),
                "attention_mask": pad_rows([[1] * len(row) for row in tokens], length, 0),
            }
        )
