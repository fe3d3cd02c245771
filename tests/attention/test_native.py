"""The native backend: what it refuses, and how it cuts its work. How exact it is: test_accuracy.py."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map_only

from qtuning_fast import explain_backend, prefix_attention
from qtuning_fast.attention import native
from qtuning_fast.attention.arguments import INPUTS, flattened
from qtuning_fast.kernels import native as kernels

pytestmark = pytest.mark.native

BASE = {"dtype": torch.float32, "B": 2, "Hkv": 2, "G": 2, "N": 17, "M": 15, "P": 5, "D": 16, "Dv": 16}
WHOLE = {"rank_key": 1, "rank_value": 2, "n_shared": 2, "gate_shape": "head"}


@pytest.fixture
def same(gradients):
    """Checks that a call's output and gradients are those of the reference."""

    def check(arguments, tolerance=1e-5):
        found, exact = ({**arguments, "backend": name} for name in ("native", "reference"))
        output, expected = prefix_attention(**found), prefix_attention(**exact)
        torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
        d_output = torch.linspace(-1, 1, output.numel()).view(output.shape)
        ours, theirs = gradients(found, d_output), gradients(exact, d_output)
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=20 * tolerance, atol=20 * tolerance)

    return check


@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"dtype": torch.float64}, "query is float64"), ({"device": "meta"}, "for the CPU, and query is on meta")],
)
def test_what_it_cannot_do_it_refuses_by_name(make_call, change, complaint):
    arguments = make_call(**BASE | {"dtype": change.get("dtype", torch.float32)})
    device = change.get("device", "cpu")
    arguments = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(NotImplementedError, match=complaint):
        prefix_attention(**arguments, backend="native")


def test_a_gate_that_is_not_written_in_cpp_is_left_to_others(make_call, monkeypatch):
    monkeypatch.setattr(kernels, "GATES", (None, "sigmoid"))
    with pytest.raises(NotImplementedError, match=r"gate: its C.. kernels have no tanh"):
        prefix_attention(**make_call(**BASE), backend="native")


def test_what_is_exported_runs_without_it(make_call, call_of, monkeypatch):
    call = call_of(make_call(**BASE))
    assert native.only_by_name(call) is None
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert "no compiler" in native.only_by_name(call)


@pytest.mark.parametrize("empty", ["B", "N", "M", "P", "M and P", "everything"])
def test_nothing_of_a_kind(make_call, same, empty):
    sizes = {"everything": {"B": 0, "N": 0, "M": 0, "P": 0}, "M and P": {"M": 0, "P": 0}}.get(empty, {empty: 0})
    sizes |= {"n_shared": 0} if sizes.get("P") == 0 else {}
    same(make_call(**BASE | WHOLE | sizes))
    if empty != "P":
        same(make_call(**BASE | WHOLE | sizes | {"T": 2, "lengths": True, "gate_shape": "task, head"}))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "sizes",
    [
        {"B": 1, "Hkv": 1, "N": 700, "M": 650},  # one sample and head: its queries are cut
        {"B": 1, "Hkv": 1, "N": 700, "M": 700, "is_causal": True, "D": 24, "Dv": 40},
        {"B": 9, "Hkv": 3, "T": 4, "N": 5},
        {"B": 1, "Hkv": 1, "packed": ([300, 1, 200], [300, 1, 200]), "is_causal": True, "N": 501, "M": 501},
    ],
    ids=["long", "causal", "tasks", "packed"],
)
def test_however_many_threads_share_the_work(make_call, same, threads, sizes):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        same(make_call(**BASE | WHOLE | sizes))
    finally:
        torch.set_num_threads(before)


BANK = {"T": 6, "B": 3, "lengths": True, "gate_shape": "task, head"}


@pytest.mark.parametrize(
    "weights",
    [
        {"rank_key": 2, "rank_value": None},
        {"rank_key": None, "rank_value": 2},
        {"rank_key": None, "rank_value": None},
        {"rank_key": 1, "rank_value": 3},
    ],
    ids=["keys", "values", "neither", "both"],
)
@pytest.mark.parametrize("stored", ["in place", "transposed", "in 16 bits"])
@pytest.mark.parametrize(("index", "gate_shape"), [([4, 2, 4], "task, head"), ([4, 4, 4], "task")])
def test_each_sample_gets_its_own_prefix_of_a_bank(make_call, gradients, weights, stored, index, gate_shape):
    arguments = make_call(**BASE | BANK | weights | {"gate_shape": gate_shape})
    arguments["prefix_index"] = torch.tensor(index)
    if stored == "transposed":
        for name in ("prefix_key", "prefix_value"):
            arguments[name] = arguments[name].detach().mT.contiguous().mT.requires_grad_()
    elif stored == "in 16 bits":
        arguments = {
            name: x.detach().half().requires_grad_() if name in FLOATING else x for name, x in arguments.items()
        }
    found, exact = ({**arguments, "backend": name} for name in ("native", "reference"))
    output, expected = prefix_attention(**found), prefix_attention(**exact)
    tolerance = 3e-2 if stored == "in 16 bits" else 1e-4
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    d_output = torch.ones_like(output)
    theirs = gradients(exact, d_output)
    for name, gradient in gradients(found, d_output).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=tolerance, atol=tolerance)


FLOATING = ("query", "key", "value", "prefix_key", "prefix_value")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_lengths_may_be_of_any_integers(make_call, dtype):
    arguments = make_call(**BASE | BANK | {"P": 300})
    arguments["prefix_length"] = torch.tensor([0, 1, 100, 120, 127, 5], dtype=dtype)
    output, expected = (prefix_attention(**arguments, backend=name) for name in ("native", "reference"))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("default", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_pytorchs_defaults_change_nothing(make_call, gradients, default, device):
    arguments = make_call(**BASE | WHOLE | {"mask": "full float"}) | {"backend": "native"}
    arguments["attn_mask"] = arguments["attn_mask"].half()
    expected = prefix_attention(**arguments)
    d_output = torch.ones_like(expected)
    wanted = gradients(arguments, d_output)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with torch.device(device):
            output = prefix_attention(**arguments)
            found = gradients(arguments, d_output)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(output, expected) and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("D", [16, 24])
def test_gradients_in_parts_are_laid_out_as_promised(make_call, call_of, D):
    """One sample and head: its queries are cut, and each part has its own sums over keys and values."""
    arguments = make_call(**BASE | WHOLE | {"B": 1, "Hkv": 1, "N": 300, "M": 300, "D": D, "Dv": D})
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in flattened(call_of(arguments))]
    saved = torch.ops.qtuning_fast.native_attention(*inputs)
    torch.library.opcheck(
        torch.ops.qtuning_fast.native_attention_backward.default,
        (*saved, torch.ones_like(saved[0]), [x is not None for x in inputs[: len(INPUTS)]], *inputs),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_hundreds_of_short_sequences(make_call, same):
    rows = [3] * 700
    same(make_call(**BASE | WHOLE | {"packed": (rows, rows), "is_causal": True}), tolerance=1e-4)


@pytest.mark.parametrize("N", [1, 15, 16, 17, 63, 64, 65, 129, 200])
@pytest.mark.parametrize("window", [None, (3, 0), (40, 70)])
def test_chunks_of_any_size(make_call, same, N, window):
    same(make_call(**BASE | WHOLE | {"N": N, "M": N + 30, "window": window}))


@pytest.mark.parametrize("P", [1, 191, 192, 193, 400])
def test_tiles_of_any_size(make_call, same, P):
    same(make_call(**BASE | WHOLE | {"P": P, "n_shared": 1, "M": P + 1, "mask": "padding bool"}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("where", ["query", "key", "value", "prefix_key"])
def test_what_is_not_a_number_stays_so(make_call, where, dtype):
    arguments = make_call(**BASE | {"dtype": dtype})
    with torch.no_grad():
        arguments[where][..., 3, :] = torch.nan
    found, exact = (prefix_attention(**arguments, backend=name).isnan() for name in ("native", "reference"))
    assert torch.equal(found, exact) and found.any()


def test_overflowing_scores_are_not_hidden(make_call):
    arguments = make_call(**BASE)
    with torch.no_grad():
        arguments["query"] *= 1e30
        arguments["key"] *= 1e30
    assert prefix_attention(**arguments, backend="native").isnan().any()


def test_keys_of_padding_at_either_end_are_not_read(make_call):
    arguments = make_call(**BASE)
    attended = torch.zeros(2, 15, dtype=torch.bool)
    attended[0, 4:11], attended[1] = True, False
    expected = prefix_attention(**arguments, padding_mask=attended, backend="reference")
    with torch.no_grad():
        for name in ("key", "value"):
            arguments[name][0, :, :4] = arguments[name][0, :, 11:] = arguments[name][1] = torch.nan
    output = prefix_attention(**arguments, padding_mask=attended, backend="native")
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


DECODING = {
    "parts": {"N": 1, "M": 1300, "D": 24, "Dv": 40},
    "no groups": {"N": 1, "G": 1, "M": 70, "P": 400},
    "causal": {"N": 1, "G": 4, "M": 700, "is_causal": True},
    "no keys": {"N": 1, "G": 3, "M": 0},
    "everything": {"N": 1, "M": 900, "window": (300, 2), "mask": "full float", "bias": True, "sink": True},
    "bank": {"N": 1, "G": 16, "B": 3, "M": 530, "T": 4, "lengths": True, "gate_shape": "task, head", "softcap": 2.0},
    "many heads to a key head": {"N": 1, "G": 64, "M": 300},
    "more heads than a room has": {"N": 1, "G": 65, "M": 30},
    "window over a long context": {"N": 1, "M": 5000, "B": 1, "Hkv": 1, "window": (100, 0)},
    "shared mask": {"N": 1, "M": 40, "mask": "shared float + padding bool"},
    "padding": {"N": 1, "M": 1500, "mask": "padding bool", "gate": "gelu"},
    "packed": {"packed": ([1, 1, 0, 1], [600, 1, 5, 0]), "is_causal": True},
}


def forward_only(arguments):
    """The arguments without gradients: one query a head is computed in another way then."""
    return tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)


@pytest.mark.parametrize("sizes", DECODING.values(), ids=DECODING)
def test_one_query_a_head(make_call, same, sizes):
    arguments = make_call(**BASE | WHOLE | sizes)
    same(arguments)
    arguments = forward_only(arguments)
    found, expected = (prefix_attention(**arguments, return_lse=True, backend=x) for x in ("native", "reference"))
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_parts_of_a_long_context_depend_on_no_thread(make_call):
    arguments = forward_only(make_call(**BASE | WHOLE | {"B": 1, "N": 1, "M": 3000}))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(prefix_attention(**arguments, backend="native"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_query_that_is_not_a_number_has_no_sum(make_call):
    arguments = forward_only(make_call(**BASE | {"N": 1, "M": 700}))
    arguments["query"][0, 1, 0, 2] = torch.nan
    found, expected = (prefix_attention(**arguments, return_lse=True, backend=x) for x in ("native", "reference"))
    for ours, theirs in zip(found, expected):
        assert torch.equal(ours.isnan(), theirs.isnan()) and ours.isnan().any()


def test_a_frozen_call_counts_as_one_without_gradients(make_call):
    arguments = make_call(**BASE | {"N": 1, "M": 700})
    expected = prefix_attention(**forward_only(arguments), backend="native")
    with torch.no_grad():
        output = prefix_attention(**arguments, backend="native")
    assert torch.equal(output, expected)
    output.mul_(torch.ones((), requires_grad=True))  # no view of what was made without gradients


def test_auto_takes_it_in_decoding(make_call):
    assert explain_backend(**make_call(**BASE | {"N": 1, "M": 1024, "Hkv": 8, "P": 60, "B": 4})).backend == "native"
