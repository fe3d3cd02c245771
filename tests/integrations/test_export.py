"""torch.compile, torch.export and ONNX of finished tasks, called with another batch size and another length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from qtuning_fast import QTuningConfig, QTuningModel

SMALL = {"prompt_length": 2, "queue_size": 2, "shared_length": 1, "reparameterization": None}
CASES = [
    *((name, task_type, placement) for name, task_type in (
        ("BERT", "sequence-classification"),
        ("Llama", "sequence-classification"),
        ("GPT-2", "causal-lm"),
    ) for placement in ("prefix", "input")),
    *(pytest.param(name, task_type, placement, marks=pytest.mark.thorough) for name, task_type in (
        ("T5", "sequence-classification"),
        ("ViT", "image-classification"),
        ("OPT", "sequence-classification"),
        ("Gemma 3", "causal-lm"),
        ("ModernBERT", "sequence-classification"),
    ) for placement in ("prefix", "input")),
]  # fmt: skip
each = pytest.mark.parametrize(("name", "task_type", "placement"), CASES)
Batch = dict[str, Tensor]


@pytest.fixture
def model(families: Any, with_tasks: Any, name: str, task_type: str, placement: str) -> QTuningModel:
    """Two finished tasks at random; the first one is set."""
    torch._dynamo.reset()
    base = families[name].base_model()
    base.config.use_cache = False
    model = QTuningModel(base, QTuningConfig(**SMALL, placement=placement, task_type=task_type))
    return with_tasks(model, "second", "first")


@pytest.fixture
def batches(families: Any, name: str) -> tuple[Batch, Batch]:
    """A batch of three, and one of five that is longer and has padding."""
    family = families[name]
    short, long = family.batch(), family.batch(1, 5)
    for batch in (short, long):
        batch.pop("decoder_input_ids", None)
    if family.kind != "image":
        long = {key: x.repeat(1, 2)[:, :11] for key, x in long.items()}
        long["attention_mask"] = torch.ones_like(long["input_ids"])
        long["attention_mask"][0, 0 if family.kind == "decoder" else -1] = 0
    return short, long


def dynamic(batch: Batch) -> dict[str, Any]:
    sizes = {0: Dim("batch", min=2, max=64), 1: Dim("length", min=2, max=24)}
    return {key: {0: sizes[0]} if key == "pixel_values" else sizes for key in batch}


@each
@torch.no_grad()
def test_a_finished_task_compiles_into_one_graph(model: QTuningModel, batches: tuple[Batch, Batch]) -> None:
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for task in ("first", "second"):
        model.set_task(task)
        for batch in batches:
            torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)


@each
@pytest.mark.parametrize("backend", ["reference", "composed"])
@torch.no_grad()
def test_a_finished_task_exports(
    model: QTuningModel, batches: tuple[Batch, Batch], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QTUNING_FAST_BACKEND", backend)
    short, long = batches
    exported = torch.export.export(model, (), kwargs=short, dynamic_shapes=dynamic(short))
    operators = {str(node.target) for node in exported.graph.nodes if "qtuning_fast" in str(node.target)}
    assert operators == ({"qtuning_fast.composed_attention.default"} if backend == "composed" else set())
    run = exported.module()
    for batch in (short, long):
        torch.testing.assert_close(run(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)
    expected = run(**long).logits
    model.set_task("second")
    assert torch.equal(run(**long).logits, expected)  # the exported program keeps its task


@pytest.mark.parametrize(
    ("name", "task_type", "placement"),
    [
        CASES[0],
        ("ViT", "image-classification", "prefix"),
    ],  # in this order: what is found in one must not reach the next
)
@torch.no_grad()
def test_a_strict_export_gives_the_same(model: QTuningModel, batches: tuple[Batch, Batch]) -> None:
    short, long = batches
    run = torch.export.export(model, (), kwargs=short, dynamic_shapes=dynamic(short), strict=True).module()
    torch.testing.assert_close(run(**long).logits, model(**long).logits, atol=1e-5, rtol=1e-5)


@each
@torch.no_grad()
def test_an_onnx_file_gives_the_same(model: QTuningModel, batches: tuple[Batch, Batch], tmp_path: Any) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    short, long = batches
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (), path, kwargs=short, dynamic_shapes=dynamic(short), dynamo=True, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (short, long):
        [logits, *_] = session.run(None, {key: x.numpy() for key, x in batch.items()})
        torch.testing.assert_close(torch.from_numpy(logits), model(**batch).logits, atol=1e-4, rtol=1e-4)
