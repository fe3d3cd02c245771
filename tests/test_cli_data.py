"""Data of one's own on the command line: what is refused leaves no folder, what is odd is said, columns have names."""

from __future__ import annotations

import gzip
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner

from qtuning_fast.cli import app
from qtuning_fast.model.checked_files import read_json

NOTE = "note: this model's tokenizer has no padding token; token 0 pads instead, hidden by the mask"
FAST = "--steps=2 --batch-size=4 --max-length=10 --eval-every=2 --prompt-length=2 --shared-length=2 --queue-size=2"
DRAW = "--shots=4 --validation-shots=2 --test-size=8"
WORDS = ["<unk>", "</s>", "the", "a", "film", "play", "is", "was", "good", "bad"]
ROWS = [f"the film {i} is {'good' if i % 2 else 'bad'}" for i in range(40)]
CSV = "text,label\n" + "".join(f"{text},{text.split()[-1]}\n" for text in ROWS)


def call(*arguments: str) -> tuple[int, str, str]:
    """The exit code, what was printed, and what was printed of errors and notes, each on one line."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.stdout.split()), " ".join(result.stderr.split())


def run(out: Path, model: Path, *more: str) -> list[str]:
    return ["run", f"--out={out}", f"--model={model}", *FAST.split(), *DRAW.split(), *more]


def tokenizer(words: list[str], unknown: str = "<unk>") -> PreTrainedTokenizerFast:
    """Whole words; neither a token for padding nor one around a text."""
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=unknown, eos_token="</s>")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder whose tokenizer has no padding token."""
    folder = tmp_path_factory.mktemp("gpt2")
    sizes = {"vocab_size": len(WORDS), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).save_pretrained(folder)
    tokenizer(WORDS).save_pretrained(folder)
    return folder


# Refused before anything is written


def folder(tmp: Path, **files: str) -> str:
    (tmp / "task").mkdir()
    for name, content in files.items():
        (tmp / "task" / name.replace("_", ".")).write_text(content)
    return f"--task={tmp / 'task'}"


def file(tmp: Path, name: str, content: str | bytes) -> str:
    (tmp / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return f"--task={tmp / name}"


REFUSED: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "an unquoted comma": (
        lambda tmp: [file(tmp, "a.csv", CSV + "not bad, really,good\n")],
        "a.csv: the header has 2 columns, but row 41 (line 42) has 3 cells; put a text with commas in double",
    ),
    "a stray quote": (
        lambda tmp: [file(tmp, "a.csv", CSV + '"Great" film,good\n')],
        "a.csv: row 41 (line 42) has a cell with text after its closing double quote",
    ),
    "semicolons": (
        lambda tmp: [file(tmp, "a.csv", CSV.replace(",", ";"))],
        "a.csv: the header has one column, 'text;label'",
    ),
    "other names of columns": (
        lambda tmp: [file(tmp, "a.csv", CSV.replace("text,label", "v2,v1"))],
        "there is no column 'text', only 'v2', 'v1'; name yours with --text-column",
    ),
    "no such column": (
        lambda tmp: [file(tmp, "a.csv", CSV), "--label-column=class"],
        "there is no column 'class', only 'text', 'label'; name yours with --label-column",
    ),
    "Latin-1": (lambda tmp: [file(tmp, "a.csv", (CSV + "café,good\n").encode("latin-1"))], "a.csv is not UTF-8: byte"),
    "cut gzip": (lambda tmp: [file(tmp, "a.csv.gz", gzip.compress(CSV.encode())[:-9])], "a.csv.gz cannot be unpacked"),
    "Excel": (lambda tmp: [file(tmp, "a.xlsx", b"PK\x03\x04")], "a.xlsx ends in '.xlsx'; the endings that can be read"),
    "a broken line": (lambda tmp: [file(tmp, "a.jsonl", '{"text"')], "a.jsonl, line 1, cannot be read as JSON"),
    "labels of two kinds": (
        lambda tmp: [file(tmp, "a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": "1"}\n')],
        "a.jsonl: column 'label' in row 2 holds '1', a string, but in row 1 1, an integer",
    ),
    "two test splits": (
        lambda tmp: [folder(tmp, train_csv=CSV, test_csv=CSV, testing_tsv=CSV)],
        "has several files for test: test.csv, testing.tsv",
    ),
    "a test split of another kind": (
        lambda tmp: [folder(tmp, train_csv=CSV, test_xlsx="x")],
        "test.xlsx ends in '.xlsx', so it cannot be read as the split test",
    ),
    "a label that train has not": (
        lambda tmp: [folder(tmp, train_csv=CSV, Test_csv="text,label\nx,good\ny,ugly\n")],
        "label 'ugly' does not occur in train, which has ['bad', 'good']; it is in row 2 (line 3)",
    ),
    "columns for a stream": (
        lambda tmp: ["--stream=offline-5", "--text-column=body"],
        "text_column is 'body', but a stream has no columns",
    ),
    "a very long name": (
        lambda tmp: [file(tmp, "a.csv", CSV).replace("--task=", f"--task={'x' * 250}=")],
        "has a name of more than 200 characters",
    ),
    "words of the same tokens": (
        lambda tmp: [
            file(tmp, "a.csv", CSV.replace("bad\n", "dire\n").replace("good\n", "fine\n")),
            "--task-type=causal-lm",
        ],
        "the label words 'dire' and 'fine' cannot be told apart",
    ),
    "texts that are too long": (
        lambda tmp: [file(tmp, "a.csv", CSV), "--max-length=65"],
        "max_length is 65; this model takes at most 64 tokens",
    ),
}


@pytest.mark.parametrize("seeds", ["1", "2"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_no_folder(case: str, seeds: str, gpt2: Path, tmp_path: Path) -> None:
    arguments, message = REFUSED[case]
    out = tmp_path / "runs" / "mine"
    code, _, errors = call(*run(out, gpt2, *arguments(tmp_path), f"--seeds={seeds}"))
    assert code == 2 and errors.startswith("error: ") and message in errors, errors
    assert not out.parent.exists()


def test_models_that_do_not_fit_leave_no_folder(gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV)
    data = f"--task={tmp_path / 'a.csv'}"
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    t5 = {"d_model": 32, "d_kv": 8, "num_layers": 1, "num_heads": 4, "d_ff": 48, "vocab_size": len(WORDS)}
    BertModel(BertConfig(**sizes, vocab_size=6)).save_pretrained(tmp_path / "small")
    T5ForConditionalGeneration(T5Config(**t5, decoder_start_token_id=None)).save_pretrained(tmp_path / "no start")
    for name in ("small", "no start"):
        tokenizer(WORDS).save_pretrained(tmp_path / name)
    for name, task_type, message in (
        ("small", "sequence-classification", "the tokenizer has a token 9, but the model has only 6 tokens"),
        ("no start", "text-to-text", "T5ForConditionalGeneration cannot learn task 'a'"),
    ):
        code, _, errors = call(*run(tmp_path / "run", tmp_path / name, data, f"--task-type={task_type}"))
        assert code == 2 and message in errors, errors
        assert not (tmp_path / "run").exists()


def test_a_missing_package_leaves_no_folder(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text(CSV)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    code, _, errors = call(*run(tmp_path / "run", gpt2, f"--task={tmp_path / 'a.csv'}"))
    assert code == 2 and "pip install scikit-learn" in errors and not (tmp_path / "run").exists()


# What can be done


def test_a_model_without_a_padding_token_and_columns_of_other_names(gpt2: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "sms.tsv", tmp_path / "run"
    data.write_text(CSV.replace("text,label", "v2,v1").replace(",", "\t"))
    columns = ["--text-column=v2", "--label-column=v1"]
    code, _, errors = call(*run(out, gpt2, f"--task={data}", *columns))
    assert code == 0 and errors == NOTE
    recorded = read_json(out / "run.json")["about"]["data"]
    assert (recorded["text_column"], recorded["label_column"]) == ("v2", "v1")
    assert call(*run(out, gpt2, f"--task={data}", *columns))[0] == 0, "the same command goes on"
    assert call("eval", f"--run={out}")[0] == 0
    assert call("eval", f"--run={out}", "--task=sms", f"--data={data}")[0] == 0, "as in the run"
    other = tmp_path / "other.csv"
    other.write_text(CSV)
    assert (
        call("eval", f"--run={out}", "--task=sms", f"--data={other}", "--text-column=text", "--label-column=label")[0]
        == 0
    )
    code, _, errors = call("eval", f"--run={out}", "--task=sms", f"--data={other}")
    assert code == 2 and "there is no column 'v2', only 'text', 'label'; name yours with --text-column" in errors
    (tmp_path / "images" / "good").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "good" / "0.png")
    code, _, errors = call("eval", f"--run={out}", "--task=sms", f"--data={tmp_path / 'images'}")
    assert code == 2 and errors == "error: task 'sms' reads texts, but these examples are images"
    code, _, errors = call("eval", f"--run={out}", "--text-column=text")
    assert code == 2 and "need --data" in errors
    assert call("predict", f"--run={out}", "the film is good")[0] == 0


def test_columns_of_the_usual_names_are_not_recorded(gpt2: Path, tmp_path: Path) -> None:
    """So runs from before they could be chosen are the same as those of today."""
    (tmp_path / "a.csv").write_text(CSV)
    command = run(tmp_path / "run", gpt2, f"--task={tmp_path / 'a.csv'}")
    assert call(*command)[0] == 0
    recorded = read_json(tmp_path / "run" / "run.json")["about"]["data"]
    assert recorded.keys() == {"stream", "tasks", "shots", "validation_shots", "test_size", "seed"}
    assert call("eval", f"--run={tmp_path / 'run'}")[0] == 0 and call(*command)[0] == 0


def test_what_is_odd_is_said_and_the_run_goes_on(gpt2: Path, tmp_path: Path) -> None:
    more = "".join(f"the play {number},Good\n" for number in range(9))
    data = folder(tmp_path, train_csv=CSV + more, extra_csv=CSV)
    code, _, errors = call(*run(tmp_path / "run", gpt2, data))
    assert code == 0 and errors == (
        f"note: {tmp_path}/task: not used: extra.csv note: train of {tmp_path}/task/train.csv: column 'label' holds "
        f"'good' 20 times, 'Good' 9 times: they are 2 classes {NOTE}"
    )
    code, _, errors = call("eval", f"--run={tmp_path}/run")
    assert code == 0 and errors.count("note: ") == 2


@pytest.mark.parametrize("labels", [("01", "1"), ("True", "true"), ("2024-01-05", "NA"), ("1.0", "1e0")])
def test_labels_are_answered_as_the_file_writes_them(labels: tuple[str, str], gpt2: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "a.csv", tmp_path / "run"
    written = "text,label\n" + "".join(f"{text},{labels[i % 2]}\n" for i, text in enumerate(ROWS))
    data.write_text(written)
    assert call(*run(out, gpt2, f"--task={data}"))[0] == 0
    assert read_json(out / "metrics.json")["per_task"][0]["label_names"] == sorted(labels)
    code, output, _ = call("predict", f"--run={out}", "the film is good")
    assert code == 0 and any(f"a: {label} (" in output for label in labels)
    before = data.stat()
    data.write_text(written.replace("film", "play"))
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert data.stat().st_size == before.st_size
    code, _, errors = call("eval", f"--run={out}")
    assert code == 2 and "the data of task 'a' has changed since the run" in errors


@pytest.mark.parametrize(
    ("spec", "name"), [("a=b.csv", "a=b"), ("x=a=b.csv", "x"), ("./a=b.csv", "a=b"), ("[b]=a=b.csv", "[b]")]
)
def test_paths_and_names_with_signs_that_mean_something(
    spec: str, name: str, gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file behind an equals sign is another one, and an evaluation may be called from another folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.csv").write_text(CSV)
    (tmp_path / "b.csv").write_text(CSV.replace("film", "play"))
    code, output, _ = call(*run(tmp_path / "run", gpt2, f"--task={spec}"))
    assert code == 0 and f"1. {name} " in output
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, output, errors = call("eval", f"--run={tmp_path / 'run'}")
    assert code == 0 and f"│ {name} " in output, errors
