"""Packed sequences as calls of their own, and offsets that cannot be trusted."""

import pytest
import torch

from qtuning_fast import prefix_attention
from qtuning_fast.attention import checks
from qtuning_fast.attention.packed import sequences, spans
from qtuning_fast.kernels.target import INTERPRETED


def test_each_sequence_is_a_call_of_views(make_call, call_of):
    call = call_of(make_call(packed=([2, 0, 3], [1, 4, 0]), T=2, bias=True))
    assert [(span.queries, span.keys) for span in spans(call)] == [
        (slice(0, 2), slice(0, 1)),
        (slice(2, 2), slice(1, 5)),
        (slice(2, 5), slice(5, 5)),
    ]
    alone = [each for _, each in sequences(call)]
    assert [each.query.shape[2] for each in alone] == [2, 0, 3] and [each.key.shape[2] for each in alone] == [1, 4, 0]
    for s, each in enumerate(alone):
        assert not each.is_packed and each.max_seqlen_query is None
        assert torch.equal(each.prefix_index, call.prefix_index[s, None])
        assert torch.equal(each.prefix_bias, call.prefix_bias[s, None])
    assert alone[2].query.data_ptr() == call.query[:, :, 2:].data_ptr()


def test_a_bias_may_be_shared(make_call, call_of):
    arguments = make_call(packed=([2, 3], [1, 4]))
    shared = torch.zeros(1, 1, 1, 3, dtype=torch.float64)
    assert all(each.prefix_bias is shared for _, each in sequences(call_of(arguments | {"prefix_bias": shared})))


BACKENDS = ["reference", "composed", pytest.param("native", marks=pytest.mark.native)]
BACKENDS += [pytest.param("fused", marks=pytest.mark.skipif(not INTERPRETED, reason="a GPU"))]
ACCURACY = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def unchecked(monkeypatch):
    """Offsets are not looked at, as on an accelerator, and memory that nobody has written holds NaN."""
    monkeypatch.setattr(checks, "_check_offsets", lambda *args: None)
    monkeypatch.setattr(checks, "_longest_of", lambda offsets, rows: rows)
    new_empty = torch.Tensor.new_empty

    def filled(self, *args, **kwargs):
        room = new_empty(self, *args, **kwargs)
        return room.fill_(torch.nan) if room.is_floating_point() else room

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sink", [False, True])
def test_rows_of_no_sequence(make_call, gradients, unchecked, backend, sink):
    """They get 0 and pass no gradient; the others are as they are without them."""
    call = make_call(dtype=torch.float32, N=12, M=11, B=1, D=16, Dv=16, gate_shape="head", sink=sink)
    call |= {"is_causal": True, "backend": backend}
    offsets = {"query": [2, 5, 5, 9], "key": [1, 3, 4, 8]}
    given = {f"cu_seqlens_{name}": torch.tensor(ends, dtype=torch.int32) for name, ends in offsets.items()}
    output = prefix_attention(**call, **given)
    outside = torch.tensor([n < 2 or n >= 9 for n in range(12)])
    assert (output[:, :, outside] == 0).all()
    d_output = torch.linspace(-1, 1, output.numel()).view(output.shape)
    found = gradients(call | given, d_output)
    assert (found["query"][:, :, outside] == 0).all()
    assert all((found[name][:, :, [0, 8, 9, 10]] == 0).all() for name in ("key", "value"))
    inside = call | {"query": call["query"][:, :, 2:9]} | {name: call[name][:, :, 1:8] for name in ("key", "value")}
    inside |= {name: ends - ends[0] for name, ends in given.items()} | {"backend": "reference"}
    torch.testing.assert_close(output[:, :, 2:9], prefix_attention(**inside), **ACCURACY)
    leaves = {name: call[name] for name in ("query", "key", "value", "prefix_key", "gate_alpha")}
    leaves |= {"sink": call["sink"]} if sink else {}
    wanted = torch.autograd.grad(prefix_attention(**inside), list(leaves.values()), d_output[:, :, 2:9])
    for name, x in zip(leaves, wanted):
        torch.testing.assert_close(found[name], x, **ACCURACY, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_all_rows_and_falling_ones_stay_within_memory(make_call, gradients, unchecked, backend):
    call = make_call(dtype=torch.float32, N=12, M=11, B=1, D=16, Dv=16) | {"backend": backend}
    for ends in ([0, 5, 99], [-7, 3, 12], [90, 95, 99], [0, 8, 3, 12]):
        offsets = torch.tensor(ends, dtype=torch.int32)
        given = call | {"cu_seqlens_query": offsets, "cu_seqlens_key": offsets.clone()}
        output = prefix_attention(**given)
        assert output.isfinite().all() and (ends[0] < 12 or (output == 0).all())
        assert all(x.isfinite().all() for x in gradients(given, torch.ones_like(output)).values())


@pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU that is there")
def test_what_is_beyond_the_longest_that_is_named_belongs_to_no_sequence(make_call, gradients, unchecked, monkeypatch):
    """Both passes leave it out, and what nobody has written is not read."""
    monkeypatch.setattr(checks, "_longest_of", lambda offsets, rows: 0)  # so that any bound is taken
    call = make_call(dtype=torch.float32, N=200, M=200, B=1, Hkv=1, G=1, D=16, Dv=16) | {"backend": "fused"}
    given = call | {"cu_seqlens_query": torch.tensor([0, 200], dtype=torch.int32)}
    cut = given | {"max_seqlen_query": 40, "max_seqlen_key": 70}
    d_output = torch.ones_like(prefix_attention(**cut))
    found, output = gradients(cut, d_output), prefix_attention(**cut)
    assert (output[:, :, 40:] == 0).all() and output.isfinite().all()
    assert (found["key"][:, :, 70:] == 0).all() and (found["query"][:, :, 40:] == 0).all()
    short = call | {"query": call["query"][:, :, :40]} | {name: call[name][:, :, :70] for name in ("key", "value")}
    torch.testing.assert_close(output[:, :, :40], prefix_attention(**short), **ACCURACY)
    wanted = torch.autograd.grad(prefix_attention(**short), call["key"], d_output[:, :, :40])[0]
    torch.testing.assert_close(found["key"], wanted, **ACCURACY)


def test_compiled_code_cannot_read_where_sequences_begin(make_call):
    call = make_call(packed=([2, 3], [2, 3]))
    for options in ({"backend": "reference"}, {"softcap": 3.0}):
        torch._dynamo.reset()
        compiled = torch.compile(lambda more=options: prefix_attention(**call, **more), backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="packed sequences: compiled code cannot read where they begin"):
            compiled()
