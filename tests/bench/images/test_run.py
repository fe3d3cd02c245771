"""Runs of the study of images, on toy images and a tiny model: what their files hold, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from qtuning_fast.bench.images import run as study
from qtuning_fast.bench.images.arms import ARMS, GATE_ARMS, IMAGES, ROWS, Run, all_runs
from qtuning_fast.bench.images.report import values
from qtuning_fast.lifelong.data.loading import load_task


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8, initializer_range=0.2)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The study on toy images, two tasks of two colours; returns the folder of its results."""
    rng, toy_images = np.random.default_rng(0), {"warm": ("red", "orange"), "cold": ("blue", "green")}
    for name, colours in toy_images.items():
        for colour in colours:
            (tmp_path / name / colour).mkdir(parents=True)
            for number in range(12):
                image = Image.new("RGB", (16, 16), colour)
                image.putpixel((int(rng.integers(16)), number), (0, 0, 0))
                image.save(tmp_path / name / colour / f"{number}.png")

    def load(name: str, seed: int, test_size: int = 8) -> list[Any]:
        sizes: dict[str, Any] = {"shots": 6, "validation_shots": 2, "test_size": test_size, "seed": seed}
        return [load_task(f"{name}={tmp_path / name}", **sizes) for name in toy_images]

    monkeypatch.setattr(study, "load_stream", load)
    monkeypatch.setattr(study, "WORK", tmp_path / "work")
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    layers = IMAGES | {"layers": (0, 1), "prompt_length": 3}  # of a tiny model
    for name in ("norga", "hide"):
        arm = ARMS[name]
        monkeypatch.setitem(ARMS, name, type(arm)(arm.method, layers, {**arm.training, "steps": 2, "eval_every": 1}))
    monkeypatch.setitem(ARMS, "default", type(arm)("q-tuning", IMAGES, {"steps": 2, "eval_every": 1}))
    return tmp_path / "out"


@pytest.mark.parametrize("arm", [*ARMS])
def test_a_run_leaves_what_is_compared(toy: Path, tiny_vit: str, arm: str) -> None:
    run = Run(arm, 1)
    study.one_run(run, tiny_vit, toy, rehearsal=False)
    record = json.loads(study.result_file(toy, run).read_text())
    assert (record["arm"], record["seed"], len(record["tasks"])) == (arm, 1, 2)
    assert record["seconds"] > 0 and record["versions"]["torch"] and len(record["named"]) == 2
    rows = [row for row, (of, _) in ROWS.items() if of == arm]
    assert rows
    for row in rows:
        assert 0 <= values({arm: {1: record}}, row)[1] <= 1
    assert not [path for path in (toy.parent / "work").rglob("*") if path.is_file()]


def test_what_is_run() -> None:
    runs = all_runs()
    assert len({run.name for run in runs}) == len(runs) == 5 * len(ARMS) + len(GATE_ARMS)
    assert {of for of, _ in ROWS.values()} == {*ARMS}


@pytest.mark.usefixtures("in_this_process")
def test_what_is_done_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    did: list[Run] = []
    monkeypatch.setattr(study, "one_run", lambda run, **more: did.append(run))
    done = study.result_file(tmp_path, Run("hide", 0))
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    assert study.main(["--model=any", "--out", str(tmp_path), "--arms", "hide", "norga"]) == 0
    assert len(did) == 9 and Run("hide", 0) not in did and "1 of 10 runs are done" in capsys.readouterr().out
    did.clear()
    assert study.main(["--model=any", "--out", str(tmp_path), "--dry-run"]) == 0
    assert {run.seed for run in did} == {0} and len(did) == len(ARMS) + len(GATE_ARMS) - 1
