"""Malformed calls end in a ValueError or TypeError that names what is wrong, never in an answer or a crash."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtuning_fast import explain_backend, prefix_attention
from qtuning_fast.attention.common import GATES

# Which dimensions an argument has: where sizes disagree, a complaint may be about either side.
DIMS = {
    "query": {"B", "Hq", "N", "D"},
    "key": {"B", "Hkv", "M", "D"},
    "value": {"B", "Hkv", "M", "Dv"},
    "prefix_key": {"T", "Hkv", "P", "D"},
    "prefix_value": {"T", "Hkv", "P", "Dv"},
    "cu_seqlens_query": {"S", "B", "N"},
    "cu_seqlens_key": {"S", "B", "M"},
    "prefix_index": {"B", "S", "T"},
    "prefix_length": {"T", "P"},
    "n_shared": {"P"},
    "reweight_key": {"T", "Hkv", "P", "D"},
    "reweight_value": {"T", "Hkv", "P", "Dv"},
    "gate_alpha": {"T", "Hq"},
    "gate_tau": {"T", "Hq"},
    "attn_mask": {"B", "Hq", "N", "M"},
    "padding_mask": {"B", "M"},
    "sink": {"Hq"},
    "prefix_bias": {"B", "S", "Hq", "N", "P"},
}
REQUIRED = ("query", "key", "value", "prefix_key", "prefix_value")
TRAINED = ("prefix_key", "prefix_value", "reweight_key", "reweight_value", "gate_alpha", "gate_tau", "sink")
MASKING = ("attn_mask", "padding_mask")  # these may be bool
PAIRS = ("reweight_key", "reweight_value")
KINDS = ("padding bool", "padding float", "full bool", "full float")
BESIDE = ("full float + padding bool", "full bool + padding float")


@st.composite
def call_options(draw):
    """Options of make_call that give a valid call."""
    P, T = draw(st.integers(0, 3)), draw(st.none() | st.integers(1, 3))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    shapes = ["float", "scalar", "head"] + ([] if T is None else ["task", "task, head"])
    rows = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=3)
    packed = draw(st.none() | st.none() | rows.map(lambda pairs: tuple(map(list, zip(*pairs)))))
    kinds = KINDS if packed is None else ()
    return {
        "dtype": dtype,
        "prefix_dtype": draw(st.sampled_from([dtype, torch.float32])),
        **{size: draw(st.integers(0, 2)) for size in ("B", "N", "M")},
        **{size: draw(st.integers(1, 3)) for size in ("Hkv", "G", "D", "Dv")},
        "P": P,
        "T": T,
        "lengths": T is not None and draw(st.booleans()),
        "n_shared": draw(st.integers(0, P)),
        "rank_key": draw(st.none() | st.integers(1, 2)),
        "rank_value": draw(st.none() | st.integers(1, 2)),
        "gate": draw(st.none() | st.sampled_from(sorted(GATES))),
        "gate_shape": draw(st.sampled_from(shapes)),
        "packed": packed,
        "mask": draw(st.sampled_from([None, *kinds, *(BESIDE if kinds else ())])),
        "bias": draw(st.booleans()),
        "is_causal": draw(st.booleans()),
        "window": draw(st.none() | st.tuples(*[st.none() | st.sampled_from([0, 1, 3, 10**20])] * 2)),
        "softcap": draw(st.none() | st.sampled_from([2, 0.5, 1e30])),
        "sink": draw(st.booleans()),
    }


def partners(name):
    """The arguments that one must agree with; all of them with query, in dtype and device."""
    return {other for other, dims in DIMS.items() if dims & DIMS[name]} | {"query"}


# A corruption changes arguments in place, and returns the names of which a complaint must hold one.


def change_a_tensor(draw, arguments, candidates, change):
    """Puts change(draw, name, tensor) in the place of one tensor, which may be half of a pair (U, V)."""
    name = draw(st.sampled_from([n for n in candidates if isinstance(arguments.get(n), torch.Tensor | tuple)]))
    x = arguments[name]
    if isinstance(x, tuple):
        half = draw(st.integers(0, 1))
        changed = change(draw, f"{name}[{half}]", x[half].detach())
        arguments[name] = (changed, x[1]) if half == 0 else (x[0], changed)
    else:
        arguments[name] = change(draw, name, x.detach())
    return partners(name)


def wrong_rank(draw, arguments):
    def change(draw, name, x):
        if name in ("gate_alpha", "gate_tau"):
            return x[None, None, None]  # with one more, or one fewer, it could be right
        return x[None] if x.shape[0] == 0 or draw(st.booleans()) else x[0]

    return change_a_tensor(draw, arguments, DIMS, change)


def wrong_size(draw, arguments):
    """Seven more than any size of a valid call can be, so that it is never right by chance."""

    def change(draw, name, x):
        dims = [0, 3] if name == "query" else range(x.ndim)  # more queries, or heads, can be right
        if x.ndim == 0:
            return x.expand(7)
        dim = draw(st.sampled_from(dims))
        return torch.cat([x, x.new_zeros([7 if d == dim else size for d, size in enumerate(x.shape)])], dim)

    return change_a_tensor(draw, arguments, DIMS, change)


def wrong_dtype(draw, arguments):
    float_dtype = arguments["query"].dtype

    def change(draw, name, x):
        wrong = [torch.complex64] if name in ("prefix_index", "prefix_length") else [torch.complex64, torch.int64]
        if name not in MASKING:
            wrong.append(torch.bool)
        if name in ("prefix_index", "prefix_length", "cu_seqlens_query", "cu_seqlens_key"):
            wrong.append(torch.float32)
        if name in ("key", "value"):
            wrong.append(torch.float32 if float_dtype == torch.float16 else torch.float16)
        if name.split("[")[0] in TRAINED:
            wrong.append(torch.float64 if float_dtype == torch.float16 else torch.float16)
            if wrong[-1] == float_dtype:
                wrong.pop()
        return x.to(draw(st.sampled_from(wrong)))

    return change_a_tensor(draw, arguments, DIMS, change)


def wrong_device(draw, arguments):
    return change_a_tensor(draw, arguments, DIMS, lambda draw, name, x: x.to("meta"))


def not_dense(draw, arguments):
    def change(draw, name, x):
        return torch.nested.nested_tensor([x, x]) if x.ndim and draw(st.booleans()) else x.to_sparse()

    return change_a_tensor(draw, arguments, DIMS, change)


def no_tensor(draw, arguments):
    name = draw(st.sampled_from([name for name in DIMS if name in arguments and name != "n_shared"]))
    junk = ["tensor", [1.0, 2.0], (), {}, object(), np.ones((2, 2)), torch.float32, 1j, True]
    if name in (*REQUIRED, "gate_alpha", "gate_tau"):
        junk.append(None)
    arguments[name] = draw(st.sampled_from(junk))
    return partners(name) if name == "prefix_key" else {name}


def no_pair(draw, arguments):
    name = draw(st.sampled_from(PAIRS))
    half = arguments["prefix_key"].detach()
    junk = [half, (half,), (half, half, half), (None, half), "UV", [[1.0], [1.0]], {"U": half, "V": half}, 1.0]
    arguments[name] = draw(st.sampled_from(junk))
    return {name}


def heads_no_multiple(draw, arguments):
    x, Hkv = arguments["query"], arguments["key"].shape[1]
    heads = x.shape[1] + 1 if Hkv > 1 else 0
    arguments["query"] = x.new_zeros(x.shape[0], heads, *x.shape[2:])
    return {"query"}


def bad_number(draw, arguments):
    name = draw(st.sampled_from(["gate_alpha", "gate_tau", "scale", "softcap"]))
    bad = [math.nan, math.inf, -math.inf, 10**400, -(10**400), 1j, "1", True, [1.0]]
    if name == "softcap":
        bad += [0, 0.0, -1, -30.0, 5e-324, torch.tensor(30.0)]
    arguments[name] = draw(st.sampled_from(bad))
    return {name}


def bad_bank(draw, arguments):
    """An index or length that is missing, out of range, or there without a bank."""
    name = draw(st.sampled_from(["prefix_index", "prefix_length"]))
    T, P, B = arguments["prefix_key"].shape[0], arguments["prefix_key"].shape[-2], arguments["query"].shape[0]
    if arguments["prefix_key"].ndim == 3:
        arguments[name] = torch.zeros(B if name == "prefix_index" else T, dtype=torch.int64)
    elif name == "prefix_index" and (B == 0 or draw(st.booleans())):
        arguments[name] = None
    else:
        size, high = (B, T) if name == "prefix_index" else (T, P + 1)
        values = torch.zeros(size, dtype=draw(st.sampled_from([torch.int64, torch.int32, torch.int8])))
        values[draw(st.integers(0, size - 1))] = draw(st.sampled_from([-1, high, 100]))
        arguments[name] = values
    return {name}


def bad_n_shared(draw, arguments):
    rows = arguments["prefix_key"]
    rows = rows.shape[-2] if isinstance(rows, torch.Tensor) and not rows.is_nested else 3
    arguments["n_shared"] = draw(st.sampled_from([-1, rows + 8, True, 1.0, "1", None, torch.tensor(0)]))
    return {"n_shared"}


def mask_with_gradient(draw, arguments):
    name = draw(st.sampled_from(["attn_mask", "padding_mask", "prefix_bias"]))
    x = arguments["query"]
    padding = (x.shape[0], arguments["key"].shape[2])
    if name == "padding_mask":
        shape = padding
    elif name == "prefix_bias" or arguments.get("padding_mask") is not None:
        shape = (1, 1, 1, 1)
    else:
        shape = draw(st.sampled_from([(1, 1, 1, 1), padding]))
    arguments[name] = x.new_zeros(shape).requires_grad_()
    if name == "padding_mask":
        arguments["attn_mask"] = None
    return {name}


def two_padding_masks(draw, arguments):
    x = arguments["query"]
    shape = (x.shape[0], arguments["key"].shape[2])
    for name in MASKING:
        arguments[name] = torch.ones(shape, dtype=draw(st.sampled_from([torch.bool, x.dtype])))
    return {"attn_mask"}


def bad_window(draw, arguments):
    bad = [-1, -(10**30), 1.0, "1", True, torch.tensor(1), (1,)]
    half = draw(st.sampled_from(bad))
    other = draw(st.sampled_from([None, 0, 2]))
    pair = (half, other) if draw(st.booleans()) else [other, half]
    arguments["window"] = draw(st.sampled_from([pair, 4, (1,), (1, 2, 3), (), "12", {"left": 1}, torch.ones(2)]))
    return {"window"}


def bad_packing(draw, arguments):
    """Offsets that do not rise from 0 to the end, one of the two alone, a longest sequence that is none."""
    side = draw(st.sampled_from(["query", "key"]))
    name, longest = f"cu_seqlens_{side}", f"max_seqlen_{side}"
    offsets = arguments.get(name)
    if offsets is None:
        if draw(st.booleans()):
            arguments[longest] = draw(st.sampled_from([0, 1, 500]))
            return {longest}
        rows = arguments["key"].shape[2]
        arguments["cu_seqlens_key"] = torch.tensor([0, rows], dtype=torch.int32)
        return {"cu_seqlens_query"}
    kinds = ["values", "longest", "no sequence"]
    if side == "query" or arguments["query"].shape[2] != arguments["key"].shape[2]:
        kinds.append("alone")  # otherwise those of query are meant
    kind = draw(st.sampled_from(kinds))
    if kind == "longest":
        most = int(offsets.diff().max())
        bad = [-1, 1.0, "1", True, torch.tensor(1), *([most - 1] if most else [])]
        arguments[longest] = draw(st.sampled_from(bad))
        return {longest}
    if kind == "alone":
        arguments[name] = None
    elif kind == "no sequence":
        arguments[name] = offsets[:1]
    else:
        offsets = offsets.clone()
        offsets[draw(st.integers(0, len(offsets) - 1))] += draw(st.sampled_from([-99, 99]))
        arguments[name] = offsets
    return {name, "cu_seqlens_key"} if kind == "no sequence" else {name}


def bad_choice(draw, arguments):
    name = draw(st.sampled_from(["gate", "backend"]))
    arguments[name] = draw(st.sampled_from(["step", "", "TANH", "tanh ", 3, ["tanh"], torch.tanh, b"auto", True]))
    return {name}


def bad_flag(draw, arguments):
    name = draw(st.sampled_from(["is_causal", "return_lse"]))
    arguments[name] = draw(st.sampled_from([0, 1, None, "yes", torch.tensor(True), np.True_]))
    return {name}


ANYTHING = [wrong_rank, wrong_size, wrong_dtype, wrong_device, not_dense, heads_no_multiple, no_tensor, no_pair]
ANYTHING += [bad_number, bad_bank, bad_n_shared, mask_with_gradient, two_padding_masks, bad_window, bad_packing]
ANYTHING += [bad_choice, bad_flag]
LOCAL = [bad_number, bad_n_shared, bad_window, bad_choice, bad_flag]  # they cannot make good what another has corrupted


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(options=call_options(), data=st.data())
def test_malformed_calls_are_refused_by_name(make_call, options, data):
    arguments = make_call(**options)
    explain_backend(**arguments)  # a valid call up to here
    names = data.draw(st.sampled_from(ANYTHING), "corruption")(data.draw, arguments)
    if data.draw(st.integers(0, 3)) == 0:
        names |= data.draw(st.sampled_from(LOCAL), "another")(data.draw, arguments)
    with pytest.raises((ValueError, TypeError)) as refusal:
        prefix_attention(**arguments)
    message = str(refusal.value)
    assert any(re.search(rf"\b{name}\b", message) for name in names), f"{message!r} names none of {names}"
    assert refusal.traceback[-1].path.name in ("arguments.py", "checks.py")


def complaint(arguments, **wrong):
    with pytest.raises((ValueError, TypeError)) as refusal:
        prefix_attention(**arguments | wrong)
    return f"{refusal.typename}: {refusal.value}"


def test_a_complaint_says_what_must_be_and_what_was(make_call):
    call, bank = make_call(B=2, N=3, M=4, P=3, D=3, Dv=2), make_call(T=2)
    assert complaint(call, key=torch.zeros(2, 2, 4, 5).double()) == (
        "ValueError: key must be [B, Hkv, M, D], D = 3 as query has it, got shape [2, 2, 4, 5]"
    )
    assert complaint(call, prefix_value=torch.zeros(2, 3, 2).half()) == (
        "TypeError: prefix_value must have query's or float32 dtype (float64, float32), got torch.float16"
    )
    assert complaint(call, attn_mask=torch.zeros(2, 5, dtype=torch.bool)) == (
        "ValueError: attn_mask must be [B, M], M = 4 as key has it, got shape [2, 5]"
    )
    assert complaint(call, attn_mask=torch.zeros(3, 4, 5, dtype=torch.bool)) == (
        "ValueError: attn_mask must broadcast to [B, Hq, N, M] = [2, 4, 3, 4] or be [B, M], got [3, 4, 5]"
    )
    assert complaint(bank, prefix_index=torch.tensor([0, 2])) == (
        "ValueError: prefix_index must lie in 0..1, got values in 0..2"
    )
    assert complaint(call, scale="wide") == "TypeError: scale must be None or a number, got str 'wide'"
    assert complaint(call, softcap=torch.tensor(30.0)) == (
        "TypeError: softcap must be None or a number, got a torch.float32 tensor of shape []"
    )
    assert complaint(call, softcap=-30) == (
        "ValueError: softcap must be None or positive, in 2.23e-308..1.8e+308 for scores in float64, got int -30"
    )
    assert complaint(call, gate_tau=torch.ones(3)) == (
        "ValueError: gate_tau must be [], [Hq] or, with a bank, [T, 1] or [T, Hq], here one of [], [4], got shape [3]"
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("query", (2, 0, 3, 3)),
        ("query", (2, 4, 3, 0)),
        ("key", (2, 0, 4, 3)),
        ("value", (2, 2, 4, 0)),
        ("prefix_key", (0, 2, 3, 3)),
    ],
)
def test_only_batch_and_lengths_may_be_empty(make_call, name, shape):
    empty = {name: torch.zeros(shape, dtype=torch.float64)}
    assert re.match(rf"ValueError: {name} must be .* >= 1, got", complaint(make_call(), **empty))


def test_a_rank_of_zero_is_refused(make_call):
    empty = (torch.zeros(3, 0), torch.zeros(0, 2, 3))
    assert complaint(make_call(), reweight_key=empty).startswith("ValueError: reweight_key[0] must be ")


def test_a_pair_has_two_halves(make_call):
    arguments = make_call(rank_key=1)
    U, V = arguments["reweight_key"]
    assert complaint(arguments, reweight_key=(U, V, V)).startswith("TypeError: reweight_key must be None or a pair")


def test_a_complaint_names_the_mask_that_was_given(make_call):
    call = make_call(B=2, M=4)
    short = torch.ones(2, 5, dtype=torch.bool)
    for name in ("attn_mask", "padding_mask"):
        assert complaint(call, **{name: short}) == (
            f"ValueError: {name} must be [B, M], M = 4 as key has it, got shape [2, 5]"
        )
    both = {"attn_mask": short[:, :4], "padding_mask": short[:, :4]}
    assert complaint(call, **both) == (
        "ValueError: attn_mask must have four dimensions beside a padding_mask, got shape [2, 4]"
    )


def test_a_complaint_about_packed_sequences(make_call):
    call = make_call(packed=([2, 3], [4, 1]))
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)
    assert complaint(call, cu_seqlens_query=offsets) == (
        "ValueError: cu_seqlens_query must rise from 0 to 5, the rows of query, got [0, 2, 6]"
    )
    assert complaint(call, cu_seqlens_query=None) == (
        "ValueError: cu_seqlens_query must be given beside cu_seqlens_key, got None"
    )
    assert complaint(make_call(packed=([2, 3], [4, 0])), cu_seqlens_key=None) == (
        "ValueError: cu_seqlens_key must be given where key has other rows than query, 4 and 5"
    )
    assert complaint(call, max_seqlen_key=3) == (
        "ValueError: max_seqlen_key must be at least 4, the rows of the longest sequence, got 3"
    )
    assert complaint(call, attn_mask=torch.ones(1, 5, dtype=torch.bool)) == (
        "ValueError: attn_mask must be None beside packed sequences, got a torch.bool tensor of shape [1, 5]"
    )
    assert complaint(call, prefix_bias=torch.ones(1, 1, 5, 3)) == (
        "ValueError: prefix_bias must broadcast to [S, Hq, 1, P] = [2, 4, 1, 3], got [1, 1, 5, 3]"
    )
    assert complaint(make_call(B=2), cu_seqlens_query=offsets, cu_seqlens_key=offsets) == (
        "ValueError: query must hold all sequences in one row beside cu_seqlens_query, B = 1, got B = 2"
    )
    assert complaint(make_call(), max_seqlen_query=3) == (
        "ValueError: max_seqlen_query must be None without packed sequences, got int 3"
    )
