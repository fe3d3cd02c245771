"""The peers compute what they say they do, and a run of the benchmark ends in a file and a table."""

import json
import math

import pytest
import torch

from qtuning_fast.bench import attention, memory, peers
from qtuning_fast.bench.attention import Reference, Row, check, measure_shape, table
from qtuning_fast.bench.floors import Ceilings, backward_work, forward_work
from qtuning_fast.bench.peers import PEERS, Prepared, merged, operator
from qtuning_fast.bench.shapes import CPU_128, N_SHARED, SHAPES, TINY, TINY_CAUSAL, Shape, inputs

ON_CPU = (
    "fused",
    "fused-ungated",
    "composed",
    "composed-ungated",
    "eager",
    "eager-16bit",
    "sdpa-ungated",
    "sdpa-ungated-no-concat",
)
CLOSE = 1e-5  # float32 against float64: a hundred times its eps
CEILINGS = Ceilings(flops=1e12, bytes=1e11, special=1e11)


def plain_context(query, key, value, block_mask):
    """Attention over the context with its log-sum-exp, in place of FlexAttention, which gives none on a CPU."""
    G = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(G, dim=1) for x in (key, value))
    s = query @ key.mT * query.shape[-1] ** -0.5
    if block_mask is not None:
        s = s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return s.softmax(-1) @ value, s.logsumexp(-1)


@pytest.mark.parametrize("shape", [TINY, TINY_CAUSAL], ids=lambda shape: shape.name)
@pytest.mark.parametrize("name", ON_CPU)
def test_peers_agree_with_the_reference(name, shape):
    small = Shape(**(vars(shape) | {"B": 1})) if name.startswith("fused") else shape  # the interpreter takes its time
    row = Row(name)
    check(PEERS[name], Reference(small, inputs(small, dtype=torch.float32, device="cpu")), row)
    trained = {"query", "key", "value", "prefix_key", "prefix_value"}
    trained |= {"U_key", "V_key", "U_value", "V_value"} if PEERS[name].reweighted else set()
    trained |= {"gate_alpha", "gate_tau"} if PEERS[name].gated else set()
    assert row.gradient_errors.keys() == trained
    assert max(row.output_error, *row.gradient_errors.values()) < CLOSE


@pytest.mark.parametrize("shape", [TINY, TINY_CAUSAL], ids=lambda shape: shape.name)
def test_context_and_prefix_are_merged_as_they_should_be(shape, monkeypatch):
    monkeypatch.setattr(peers, "_flex_merged", lambda *arguments: merged(plain_context, *arguments))
    row = Row("flex-merged")
    check(PEERS["flex-merged"], Reference(shape, inputs(shape, dtype=torch.float32, device="cpu")), row)
    assert max(row.output_error, *row.gradient_errors.values()) < CLOSE and len(row.gradient_errors) == 11


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shape", [TINY, TINY_CAUSAL], ids=lambda shape: shape.name)
@pytest.mark.parametrize("name", ["flex", "flex-tanh-approx"])
def test_flex_attention_computes_the_operator(name, shape, monkeypatch):
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    x = inputs(shape, dtype=torch.float32, device="cpu")
    expected = operator("reference", x.detached(torch.float64), shape)
    output = PEERS[name].prepare(shape, x).forward()  # without gradients: on a CPU it knows none
    assert (output - expected).norm() / expected.norm() < CLOSE


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(attention, "in_a_process", lambda function, *arguments: function(*arguments))


def test_what_a_peer_cannot_do_is_its_row():
    result = measure_shape("tiny", ["eager", "flex"], "cpu", 2, CEILINGS)
    eager, flex = result["rows"]
    assert not eager["error"] and eager["step"]["eager"]["rounds"] == 2 and eager["forward"]["graph"] is None
    assert "backward on CPU" in flex["error"] and flex["step"]["eager"] is None
    text = table(result)
    assert "backward on CPU" in text and max(map(len, text.splitlines())) <= 120


def test_a_wrong_peer_is_called_wrong(monkeypatch):
    def halved(shape, x):
        right = peers.eager_16bit(shape, x)
        return Prepared(lambda: right.forward() * 0.5, right.leaves)

    monkeypatch.setitem(PEERS, "eager-16bit", peers.Peer(halved))
    result = measure_shape("tiny", ["eager-16bit"], "cpu", 1, CEILINGS)
    assert result["rows"][0]["output_error"] == pytest.approx(0.5) and "WRONG?" in table(result)


def test_gradients_beyond_the_samples_compared_must_be_zero(monkeypatch):
    monkeypatch.setattr(attention, "LARGEST_REFERENCE", 1)
    reference = Reference(TINY, inputs(TINY, dtype=torch.float32, device="cpu"))
    _, gradients = reference.of(gated=True, reweighted=True)
    assert reference.samples.tolist() == [0] and gradients["query"].shape[0] == 1
    whole = torch.zeros(TINY.B, TINY.Hq, TINY.N, TINY.D)
    whole[:1] = gradients["query"]
    assert reference.error("query", whole, gradients["query"]) < CLOSE
    whole[-1] = 1.0
    assert reference.error("query", whole, gradients["query"]) > 1
    whole[-1] = math.nan
    assert reference.error("query", whole, gradients["query"]) == math.inf


def test_the_table_compares_with_fused_and_shows_what_the_gate_costs():
    result = measure_shape("tiny", ["eager", "sdpa-ungated"], "cpu", 1, CEILINGS)
    for row, name, ms in zip(result["rows"], ("fused", "fused-ungated"), (3.0, 2.0)):
        row["peer"] = name
        row["forward"]["eager"] = row["step"]["eager"] = {"median": ms, "spread": 0.1, "rounds": 1}
    text = table(result)
    assert "fused: gate and reweighting cost forward +1.0000 ms (+50.0%), step +1.0000 ms (+50.0%)" in text
    assert [line.split()[5] for line in text.splitlines() if line.startswith(("  fused ", "  fused-"))] == [
        "1.00",
        "0.67",
    ]


def test_the_table_says_how_ours_stands_to_eager_and_to_the_lower_bound():
    result = measure_shape("tiny", ["eager", "sdpa-ungated", "composed"], "cpu", 1, CEILINGS)
    for row, ms, peak in zip(result["rows"], (9.0, 2.0, 3.0), (90, 20, 25)):
        row["step"]["eager"] = {"median": ms, "spread": 0.1, "rounds": 1}
        row["step_peak"] = peak
    text = table(result)
    assert "composed: 3.00 times as fast as eager" in text
    assert "composed: 1.50 times the step of sdpa-ungated, the lower bound, 1.25 times its memory" in text


def test_the_peak_of_a_step_counts_what_is_taken_and_given_back(monkeypatch):
    def greedy(shape, x):
        right = peers.eager_16bit(shape, x)
        return Prepared(
            lambda: right.forward() + torch.ones(32 << 20 if shape is CPU_128 else 1).sum() * 0, right.leaves
        )

    monkeypatch.setitem(PEERS, "eager-16bit", peers.Peer(greedy))
    modest = memory.step_peak(CPU_128, "composed", "cpu")
    if modest is None:
        pytest.skip("no /proc/self/clear_refs")
    assert memory.step_peak(CPU_128, "eager-16bit", "cpu") > 128 << 20 > modest


def test_work_is_counted_by_hand():
    shape = Shape("by hand", B=1, Hq=1, Hkv=1, N=2, D=4, P=3)
    work = forward_work(shape)
    assert work.flops == 2 * 2 * (2 * (2 + 3)) * 4  # two products, ten pairs, four numbers each
    assert work.special == 10 + 6
    prefix = 4 * (2 * (3 * 4 + 3 + 4) + 2)
    assert work.bytes == 3 * 2 * 4 * 2 + prefix + 2 * (4 * 2 + 4)
    causal = forward_work(Shape(**(vars(shape) | {"is_causal": True})))
    assert causal.flops == work.flops * 9 // 10  # one pair of ten is hidden
    assert backward_work(shape).flops == 5 * 2 * 10 * 4
    milliseconds, limit = work.floor(Ceilings(flops=1e3, bytes=1e9, special=0.0))
    assert (milliseconds, limit) == (work.flops, "products")


def test_inputs_are_strided_as_models_hand_them_over():
    x = inputs(TINY, dtype=torch.bfloat16, device="cpu")
    assert x.query.transpose(1, 2).is_contiguous() and x.query.dtype == torch.bfloat16
    assert x.prefix_key.dtype == x.gate_tau.dtype == torch.float32 and x.U_key.shape == (TINY.P, 1)
    assert N_SHARED < TINY.P and all(t.requires_grad for t in x.tracked().trained().values())
    assert not x.query.requires_grad and not torch.equal(
        x.query, inputs(TINY, dtype=torch.bfloat16, device="cpu", seed=1).query
    )


def test_a_run_writes_after_each_shape_and_stops_at_its_budget(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention, "device_facts", lambda device: (CEILINGS, {"torch": "1"}))
    monkeypatch.setattr(attention.torch.cuda, "is_available", lambda: False)
    out = tmp_path / "new" / "attention.json"
    run = ["--peer", "eager", "--quick", "--out", str(out), "--shape", "tiny", "tiny-causal"]
    assert attention.main(run) == 0
    document = json.loads(out.read_text())
    assert [result["shape"]["name"] for result in document["shapes"]] == ["tiny", "tiny-causal"]
    assert "tiny-causal: B2" in capsys.readouterr().out
    assert attention.main([*run, "--budget-seconds", "0"]) == 1
    assert json.loads(out.read_text())["errors"].keys() == {"tiny", "tiny-causal"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_CPU)  # the others are compiled for long, and compared whenever they are timed
def test_peers_agree_with_the_reference_on_a_gpu(name):
    shape = Shape(**(vars(SHAPES["bert-base"]) | {"B": 2}))
    row = Row(name)
    check(PEERS[name], Reference(shape, inputs(shape, dtype=torch.bfloat16, device="cuda")), row)
    assert max(row.output_error, *row.gradient_errors.values()) < attention.SUSPICIOUS
