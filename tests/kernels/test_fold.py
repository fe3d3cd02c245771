"""k' and v' are the definition's, rounded once; what no sample reads is left alone; what is folded already stays."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast.attention import reference
from qtuning_fast.attention.api import call_of
from qtuning_fast.kernels.fold import folded
from qtuning_fast.kernels.target import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="sizes are those of the interpreter")

BASE = {"B": 3, "Hkv": 2, "G": 1, "N": 2, "M": 2, "P": 37, "D": 24, "Dv": 16, "n_shared": 5}
BOTH = {"rank_key": 1, "rank_value": 2}
BANK = {"T": 4, "lengths": True}


@pytest.fixture
def make(make_call):
    def made(**options):
        return call_of(**make_call(**BASE | options))

    return made


def run(call):
    """The folded call, its room filled with NaN first."""
    after, launches = folded(call)
    for x in (after.prefix_key, after.prefix_value):
        if x is not call.prefix_key and x is not call.prefix_value:
            x.detach().fill_(torch.nan)
    for launch in launches:
        launch.run()
    return after


def expected(call):
    """k' and v' by sample."""
    pairs = (call.prefix_key, call.reweight_key), (call.prefix_value, call.reweight_value)
    return [reference.prefix_rows(call, *pair).detach() for pair in pairs]


@pytest.mark.parametrize(
    ("dtype", "prefix_dtype"),
    [(torch.float32, torch.float32), (torch.float16, torch.float32), (torch.float16, torch.float16)],
)
@pytest.mark.parametrize("n_shared", [0, 5, 37])
def test_rows_are_those_of_the_definition(make, dtype, prefix_dtype, n_shared):
    call = make(dtype=dtype, prefix_dtype=prefix_dtype, n_shared=n_shared, **BOTH)
    after = run(call)
    for found, want in zip((after.prefix_key, after.prefix_value), expected(call)):
        assert found.dtype == dtype  # want holds the same numbers in the precision of scores
        # A sum of two products in another order is another float32; each is rounded once.
        torch.testing.assert_close(
            found.float(), want.float(), rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps
        )
    assert after.reweight_key is after.reweight_value is None


def test_a_cast_alone_is_exact(make):
    call = make(dtype=torch.float16, prefix_dtype=torch.float32)
    after = run(call)
    assert torch.equal(after.prefix_key, call.prefix_key.half()) and torch.equal(
        after.prefix_value, call.prefix_value.half()
    )


def test_only_prefixes_in_use_are_written_and_only_their_rows(make):
    call = make(dtype=torch.float32, **BOTH, **BANK)
    call.prefix_index.copy_(torch.tensor([2, 0, 2]))
    after = run(call)
    for found, want in zip((after.prefix_key, after.prefix_value), expected(call)):
        for b, t in enumerate(call.prefix_index.tolist()):
            length = int(call.prefix_length[t])
            torch.testing.assert_close(found[t, :, :length], want[b, :, :length])
            assert found[t, :, length:].isnan().all()
        assert found[[1, 3]].isnan().all()


def test_many_samples_are_looked_through(make):
    call = make(dtype=torch.float32, **BANK | {"lengths": False}, rank_key=1, B=1025, N=1, M=1, P=3, n_shared=1)
    call.prefix_index.zero_()
    call.prefix_index[1024] = 3
    after = run(call)
    assert not after.prefix_key[[0, 3]].isnan().any() and after.prefix_key[[1, 2]].isnan().all()


def test_a_side_that_is_folded_already_stays(make):
    call = make(dtype=torch.float16, rank_value=1)
    after = run(call)
    assert after.prefix_key is call.prefix_key and after.prefix_value is not call.prefix_value
    plain = make(dtype=torch.float16)
    assert folded(plain) == (plain, [])


def test_rows_and_weights_may_lie_anyhow(make):
    call = make(dtype=torch.float32, **BOTH)
    want = run(call)
    for name in ("prefix_key", "prefix_value"):
        x = getattr(call, name)
        object.__setattr__(call, name, x.detach().transpose(0, 2).contiguous().transpose(0, 2))
    found = run(call)
    assert torch.equal(found.prefix_key, want.prefix_key) and torch.equal(found.prefix_value, want.prefix_value)
