"""What a language model is given to learn and to answer, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from qtuning_fast.lifelong.data.encoding import ExampleEncoder
from qtuning_fast.lifelong.tasks import Examples, Task

EXAMPLES = Examples(["the red cat ", "a dog"], [0, 1])
# ids: <pad> 0, </s> 1, <unk> 2, <s> 3, red 4, green 5, blue 6, cat 7, dog 8, the 9, a 10, is 11, was 12, old 13, new 14

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


def task(names: list[str], words: list[str] | None = None) -> Task:
    return Task("mine", names, EXAMPLES, EXAMPLES, EXAMPLES, "", words)


def test_an_encoder_decoder_reads_the_text_and_writes_the_word(make_tokenizer: MakeTokenizer) -> None:
    encoder = ExampleEncoder(make_tokenizer(decoder=False), "text-to-text", 5)
    answers = encoder.encode_answers(["old", "very old"], task="mine")
    assert answers == [[13, 1], [15, 13, 1]]
    inputs = encoder.encode(EXAMPLES)
    assert inputs.columns["input_ids"].tolist() == [[9, 4, 7, 1, 0], [10, 8, 1, 0, 0]]
    assert inputs.columns["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert inputs.columns["labels"].tolist() == [0, 1]
    training_inputs = encoder.encode_with_answers(EXAMPLES, answers)
    assert training_inputs.columns["labels"].tolist() == [[13, 1, -100], [15, 13, 1]]
    assert torch.equal(training_inputs.columns["input_ids"], inputs.columns["input_ids"])


def test_a_decoder_continues_the_text_by_the_word(make_tokenizer: MakeTokenizer) -> None:
    encoder = ExampleEncoder(make_tokenizer(decoder=True), "causal-lm", 5)
    answers = encoder.encode_answers(["old", "very old"], task="mine")
    assert answers == [[13, 1], [15, 13, 1]]
    inputs = encoder.encode(EXAMPLES)
    assert inputs.columns["input_ids"].tolist() == [[3, 9, 4, 7, 0], [3, 10, 8, 0, 0]]
    assert inputs.columns["labels"].tolist() == [0, 1]
    training_inputs = encoder.encode_with_answers(EXAMPLES, answers)
    assert training_inputs.columns["input_ids"].tolist() == [[3, 9, 4, 7, 13, 1, 0, 0], [3, 10, 8, 15, 13, 1, 0, 0]]
    assert training_inputs.columns["attention_mask"].sum(1).tolist() == [6, 6]
    ignored = -100
    assert training_inputs.columns["labels"].tolist() == [
        [ignored] * 4 + [13, 1] + [ignored] * 2,
        [ignored] * 3 + [15, 13, 1] + [ignored] * 2,
    ]


def test_heads_need_no_padding_token(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(decoder=True)
    assert tokenizer.pad_token is None
    inputs = ExampleEncoder(tokenizer, "sequence-classification", 5).encode(EXAMPLES)
    assert inputs.columns["input_ids"].tolist() == [[3, 9, 4, 7, 0], [3, 10, 8, 0, 0]]
    assert inputs.columns["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert all(column.dtype == torch.int64 for column in inputs.columns.values())
    assert tokenizer.pad_token is None, "the tokenizer is left as it was given"
    tokenizer.pad_token = "<pad>"
    padded = ExampleEncoder(tokenizer, "sequence-classification", 5).encode(EXAMPLES)
    assert all(torch.equal(column, padded.columns[name]) for name, column in inputs.columns.items())


def test_a_text_is_cut_and_the_word_is_not(make_tokenizer: MakeTokenizer) -> None:
    encoder = ExampleEncoder(make_tokenizer(decoder=True), "causal-lm", 3)
    training_inputs = encoder.encode_with_answers(EXAMPLES, [[13, 1], [14, 1]])
    assert training_inputs.columns["input_ids"].tolist() == [[3, 9, 4, 13, 1], [3, 10, 8, 14, 1]]


@pytest.mark.parametrize("metaspace", [False, True])
def test_the_word_has_the_tokens_that_it_has_behind_a_text(metaspace: bool) -> None:
    """Byte-level vocabularies keep the space before a word in it, SentencePiece's mark the word by it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace() if metaspace else pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.Metaspace() if metaspace else decoders.ByteLevel()
    alphabet = [] if metaspace else pre_tokenizers.ByteLevel.alphabet()
    texts = ["good films, bad films", "a good day a bad day", " good bad"] * 9
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(special_tokens=["<unk>", "</s>"], initial_alphabet=alphabet)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    encoder = ExampleEncoder(fast, "causal-lm", 12)
    answers = encoder.encode_answers(["good", "bad"], task="mine")
    assert answers is not None
    training_inputs = encoder.encode_with_answers(Examples(["a film"], [0]), answers)
    both = fast("a film good")["input_ids"]
    assert training_inputs.columns["input_ids"][0, : len(both) + 1].tolist() == [*both, fast.eos_token_id]
    assert fast.decode(answers[1][:-1]).strip() == "bad"


def test_words_are_the_names_with_spaces_or_what_the_task_says() -> None:
    assert task(["not_entailment", "money-fx", "_"]).answers == ["not entailment", "money fx", "_"]
    assert task(["0", "1"], ["No_way", "Yes"]).answers == ["No_way", "Yes"]
    for words in (["no"], ["no", " "]):
        with pytest.raises(ValueError, match=r"'mine': label_words is .* must be one for each of \['0', '1'\]"):
            task(["0", "1"], words)


@pytest.mark.parametrize(
    ("task_type", "words", "ends", "message"),
    [
        ("text-to-text", ["old", "sad", "glad"], True, "'sad' and 'glad' cannot be told apart: .* the same tokens"),
        ("causal-lm", ["old", "sad", "glad"], True, "'sad' and 'glad' cannot be told apart: .* the same tokens"),
        ("text-to-text", ["old cat", "old"], False, "'old' and 'old cat' cannot be told apart: .* begin alike"),
        ("causal-lm", ["old cat", "old"], False, "'old' and 'old cat' cannot be told apart: .* begin alike"),
    ],
)
def test_words_that_cannot_be_told_apart(
    task_type: str, words: list[str], ends: bool, message: str, make_tokenizer: MakeTokenizer
) -> None:
    encoder = ExampleEncoder(make_tokenizer(decoder=False, ends=ends), task_type, 5)
    with pytest.raises(ValueError, match=f"task 'mine': the label words {message}"):
        encoder.encode_answers(words, task="mine")
    assert encoder.encode_answers(["old", "new"], task="mine")


def test_the_answer_must_fit_behind_the_text(make_tokenizer: MakeTokenizer) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=16, max_position_embeddings=12))
    tasks = [task(["old", "very_old"])]
    ExampleEncoder(make_tokenizer(decoder=True), "causal-lm", 9).check(llama, tasks)
    with pytest.raises(ValueError, match="max_length is 10; this model takes at most 9 tokens and the 3 of an answer"):
        ExampleEncoder(make_tokenizer(decoder=True), "causal-lm", 10).check(llama, tasks)


@pytest.mark.parametrize("task_type", ["sequence-classification", "text-to-text", "causal-lm", "image-classification"])
def test_a_processor_of_the_wrong_kind(task_type: str, make_tokenizer: MakeTokenizer) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    images = task_type == "image-classification"
    wrong: Any = make_tokenizer(decoder=False) if images else ViTImageProcessorPil()
    with pytest.raises(TypeError, match="needs an image processor" if images else "needs a tokenizer"):
        ExampleEncoder(wrong, task_type, 5)


def test_a_prompt_in_front_takes_room_where_there_is_an_end_to_it(make_tokenizer: MakeTokenizer) -> None:
    sizes = {"vocab_size": 60, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    bert = BertModel(BertConfig(**sizes, intermediate_size=8, max_position_embeddings=12))
    encoder = ExampleEncoder(make_tokenizer(decoder=False), "sequence-classification", 9)
    encoder.check(bert, [task(["a", "b"])], prompt_tokens=3)
    with pytest.raises(ValueError, match="at most 8 tokens besides the 4 of a prompt"):
        encoder.check(bert, [task(["a", "b"])], prompt_tokens=4)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=60, d_model=8, d_kv=8, num_layers=1, num_heads=1, d_ff=8))
    ExampleEncoder(make_tokenizer(decoder=False), "text-to-text", 9).check(t5, [task(["a", "b"])], prompt_tokens=300)


# Templates


def ids(examples: Any) -> list[list[int]]:
    """The tokens of each example, without padding."""
    columns = examples.columns
    return [row[mask.bool()].tolist() for row, mask in zip(columns["input_ids"], columns["attention_mask"])]


@pytest.mark.parametrize(("task_type", "begin", "end"), [("causal-lm", [3], []), ("text-to-text", [], [1])])
def test_a_text_stands_in_its_tasks_template(
    task_type: str, begin: list[int], end: list[int], make_tokenizer: MakeTokenizer
) -> None:
    encoder = ExampleEncoder(make_tokenizer(decoder=task_type == "causal-lm"), task_type, 7)
    plain = encoder.encode(EXAMPLES)
    asked = encoder.as_asked(plain, "new {text} is ")
    assert ids(asked) == [[*begin, 14, *text, 11, *end] for text in ([9, 4, 7], [10, 8])]
    assert asked.columns["labels"].tolist() == [0, 1]
    assert ids(plain) == [[*begin, *text, *end] for text in ([9, 4, 7], [10, 8])], "features know no template"
    assert ids(encoder.as_asked(plain.subset([1]), "new {text} is")) == [[*begin, 14, 10, 8, 11, *end]]
    assert ids(encoder.as_asked(plain, None)) == ids(plain)


def test_what_is_trained_on_is_what_is_asked(make_tokenizer: MakeTokenizer) -> None:
    encoder = ExampleEncoder(make_tokenizer(decoder=True), "causal-lm", 7)
    trained = encoder.encode_with_answers(EXAMPLES, [[13, 1], [14, 1]], "new {text} is")
    asked = ids(encoder.as_asked(encoder.encode(EXAMPLES), "new {text} is"))
    assert ids(trained) == [[*asked[0], 13, 1], [*asked[1], 14, 1]]


def test_what_does_not_fit_is_cut_off_the_text_and_not_off_the_template(make_tokenizer: MakeTokenizer) -> None:
    encoder = ExampleEncoder(make_tokenizer(decoder=True), "causal-lm", 5)
    longer = Examples(["the red cat is a dog", "a", ""], [0, 1, 0])
    asked = encoder.as_asked(encoder.encode(longer), "new {text} is")
    assert ids(asked) == [[3, 14, 9, 4, 11], [3, 14, 10, 11], [3, 14, 11]]


def test_a_template_must_leave_room_for_a_text(make_tokenizer: MakeTokenizer) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=16, max_position_embeddings=64))
    long = replace(task(["old", "new"]), template="the red cat is {text}")
    ExampleEncoder(make_tokenizer(decoder=True), "causal-lm", 6).check(llama, [long])
    with pytest.raises(ValueError, match="'mine': its template alone takes 5 tokens, but max_length is 5"):
        ExampleEncoder(make_tokenizer(decoder=True), "causal-lm", 5).check(llama, [long])


def test_a_chat_model_answers_as_the_assistant(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(decoder=True)
    with pytest.raises(ValueError, match="this tokenizer has none"):
        ExampleEncoder(tokenizer, "causal-lm", 9, chat=True)
    tokenizer.chat_template = (
        "{% for message in messages %}<s> the {{ message['content'] }} </s>{% endfor %}"
        "{% if add_generation_prompt %} a {% endif %}"
    )
    encoder = ExampleEncoder(tokenizer, "causal-lm", 9, chat=True)
    asked = encoder.as_asked(encoder.encode(EXAMPLES), "new {text} is")
    assert ids(asked) == [[3, 9, 14, 9, 4, 7, 11, 1, 10], [3, 9, 14, 10, 8, 11, 1, 10]]
    assert ids(encoder.as_asked(encoder.encode(EXAMPLES), None)) == [[3, 9, 9, 4, 7, 1, 10], [3, 9, 10, 8, 1, 10]]
    assert encoder.encode_answers(["old", "new"], task="mine") == [[13, 1], [14, 1]]
    shorter = ExampleEncoder(tokenizer, "causal-lm", 8, chat=True)
    assert ids(shorter.as_asked(shorter.encode(EXAMPLES), "new {text} is"))[0] == [3, 9, 14, 9, 4, 11, 1, 10]
    with pytest.raises(ValueError, match="chat is for task_type='causal-lm'"):
        ExampleEncoder(tokenizer, "text-to-text", 8, chat=True)
