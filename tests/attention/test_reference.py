"""The definition against its formulas, evaluated by hand one query at a time, and against finite differences."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtuning_fast import prefix_attention
from qtuning_fast.attention.common import GATES


def normal_cdf(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


def normal_pdf(x):
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def logistic(x):
    return 1 / (1 + math.exp(-x))


# Name -> σ, σ'.
SIGMA = {
    "tanh": (math.tanh, lambda x: 1 - math.tanh(x) ** 2),
    "sigmoid": (logistic, lambda x: logistic(x) * logistic(-x)),
    "gelu": (lambda x: x * normal_cdf(x), lambda x: normal_cdf(x) + x * normal_pdf(x)),
    "relu": (lambda x: max(x, 0.0), lambda x: float(x > 0)),
    "softplus": (lambda x: max(x, 0.0) + math.log1p(math.exp(-abs(x))), logistic),
    "elu": (lambda x: x if x > 0 else math.expm1(x), lambda x: 1.0 if x > 0 else math.exp(x)),
    "identity": (lambda x: x, lambda x: 1.0),
}


def array(x):
    return x.detach().numpy().astype(float)


class ByHand:
    """Forward and backward of one call with loops over samples, heads and queries; the gradients' formulas written out.

    A call without a bank is treated as one with a bank of one prefix. Nothing here is vectorised beyond a dot product.
    """

    def __init__(self, *, query, key, value, prefix_key, prefix_value, gate, is_causal, scale, softcap, **options):
        self.q, self.k, self.v, self.gate, self.is_causal = array(query), array(key), array(value), gate, is_causal
        self.options = options
        self.left, self.right = options["window"] or (None, None)
        self.banked = prefix_key.ndim == 4
        self.K, self.V = (array(x)[(...,) if self.banked else None] for x in (prefix_key, prefix_value))
        self.c = 1 / math.sqrt(self.q.shape[-1]) if scale is None else scale
        self.softcap = softcap
        self.W_K, self.W_V = self.weights("reweight_key", self.K), self.weights("reweight_value", self.V)

        (B, Hq, N, _), (T, Hkv, P, _), M = self.q.shape, self.K.shape, self.k.shape[2]
        self.G = Hq // Hkv
        self.task = array(options["prefix_index"]).astype(int) if self.banked else np.zeros(B, int)
        lengths = options.get("prefix_length")
        self.length = np.full(T, P) if lengths is None else array(lengths).astype(int)
        self.alpha, self.tau = (self.per_task_and_head(options[name], T, Hq) for name in ("gate_alpha", "gate_tau"))
        self.bias = self.broadcast(options.get("prefix_bias"), (B, Hq, N, P))
        self.mask = self.context_mask(options.get("attn_mask"), (B, Hq, N, M))
        self.mask = self.mask + self.context_mask(options.get("padding_mask"), (B, Hq, N, M))
        self.sink = array(options["sink"]) if "sink" in options else np.full(Hq, -np.inf)
        self.forward()

    def pair(self, name):
        U, V = map(array, self.options[name])
        return (U, V) if self.banked else (U[None], V[None])

    def weights(self, name, rows):
        W = np.ones_like(rows)
        if name in self.options:
            U, V = self.pair(name)
            for t, h, p, d in np.ndindex(*rows.shape):
                if p >= self.options["n_shared"]:
                    W[t, h, p, d] = sum(U[t, p, r] * V[t, r, h, d] for r in range(U.shape[-1]))
        return W

    def per_task_and_head(self, x, T, Hq):
        return np.broadcast_to(array(x) if isinstance(x, torch.Tensor) else float(x), (T, Hq))

    def broadcast(self, x, shape):
        return np.zeros(shape) if x is None else np.broadcast_to(array(x), shape)

    def context_mask(self, mask, shape):
        if mask is None:
            return np.zeros(shape)
        additive = np.where(mask, 0, -np.inf) if mask.dtype == torch.bool else array(mask)
        return np.broadcast_to(additive[:, None, None, :] if mask.ndim == 2 else additive, shape)

    def forward(self):
        (B, Hq, N, _), M = self.q.shape, self.k.shape[2]
        self.output = np.zeros((B, Hq, N, self.v.shape[-1]))
        self.lse = np.full((B, Hq, N), -np.inf)
        self.seen = {}  # (b, h, i) -> prefix rows, context keys, their scores before gate and mask, softmax weights
        for b, h, i in np.ndindex(B, Hq, N):
            t, kv = self.task[b], h // self.G
            rows = list(range(self.length[t]))
            keys = [j for j in range(M) if self.reaches(i + M - N, j)]
            s = [self.capped(self.c * self.q[b, h, i] @ (self.W_K[t, kv, p] * self.K[t, kv, p])) for p in rows]
            s_ctx = [self.capped(self.c * self.q[b, h, i] @ self.k[b, kv, j]) for j in keys]
            scores = [self.g(x, t, h) + self.bias[b, h, i, p] for x, p in zip(s, rows)]
            scores += [x + self.mask[b, h, i, j] for x, j in zip(s_ctx, keys)]
            all_scores = [*scores, self.sink[h]]
            if max(all_scores) == -np.inf:
                continue
            self.lse[b, h, i] = max(all_scores) + math.log(sum(math.exp(x - max(all_scores)) for x in all_scores))
            p = np.exp(np.array(scores) - self.lse[b, h, i])
            self.seen[b, h, i] = rows, keys, s, s_ctx, p[: len(rows)], p[len(rows) :]
            for weight, row in zip(p, rows):
                self.output[b, h, i] += weight * self.W_V[t, kv, row] * self.V[t, kv, row]
            for weight, j in zip(p[len(rows) :], keys):
                self.output[b, h, i] += weight * self.v[b, kv, j]

    def reaches(self, position, j):
        """Whether a query at this position of the context may see key j."""
        if self.is_causal and j > position:
            return False
        return (self.left is None or position - self.left <= j) and (self.right is None or j <= position + self.right)

    def capped(self, s):
        return s if self.softcap is None else self.softcap * math.tanh(s / self.softcap)

    def slope_of_cap(self, capped):
        return 1.0 if self.softcap is None else 1 - (capped / self.softcap) ** 2

    def g(self, s, t, h):
        if self.gate is None:
            return s
        return s + self.alpha[t, h] * SIGMA[self.gate][0](self.tau[t, h] * s)

    def backward(self, d_output):
        """Gradients by argument, from their formulas for one query (p softmax weight, s capped score before the gate):

        dg = p (dO·v' - δ),  δ = dO·o,  ds = dg (1 + α τ σ'(τ s)),  dα = Σ dg σ(τ s),  dτ = Σ dg α s σ'(τ s),
        and what reaches the products below a cap κ is ds (1 - (s / κ)²), of the context's scores too.
        The sink gets -Σ p δ, p its own weight. Those of the prefix have a leading T, and those of alpha and tau are
        [T, Hq], whatever shape the argument has.
        """
        d_output = array(d_output)
        dq, dk, dv, dk_, dv_ = map(np.zeros_like, (self.q, self.k, self.v, self.K, self.V))
        d_alpha, d_tau = np.zeros(self.alpha.shape), np.zeros(self.alpha.shape)
        d_sink = np.zeros(self.sink.shape)
        sigma, slope = SIGMA[self.gate or "identity"]
        for (b, h, i), (rows, keys, s_pre, s_ctx, p_pre, p_ctx) in self.seen.items():
            t, kv = self.task[b], h // self.G
            alpha, tau = (self.alpha[t, h], self.tau[t, h]) if self.gate else (0.0, 0.0)
            q, do = self.q[b, h, i], d_output[b, h, i]
            delta = do @ self.output[b, h, i]
            d_sink[h] -= math.exp(self.sink[h] - self.lse[b, h, i]) * delta
            for p, s, weight in zip(rows, s_pre, p_pre):
                dg = weight * (do @ (self.W_V[t, kv, p] * self.V[t, kv, p]) - delta)
                ds = dg * (1 + alpha * tau * slope(tau * s)) * self.slope_of_cap(s)
                dq[b, h, i] += self.c * ds * self.W_K[t, kv, p] * self.K[t, kv, p]
                dk_[t, kv, p] += self.c * ds * q
                dv_[t, kv, p] += weight * do
                if self.gate:
                    d_alpha[t, h] += dg * sigma(tau * s)
                    d_tau[t, h] += dg * alpha * s * slope(tau * s)
            for j, s, weight in zip(keys, s_ctx, p_ctx):
                ds = weight * (do @ self.v[b, kv, j] - delta) * self.slope_of_cap(s)
                dq[b, h, i] += self.c * ds * self.k[b, kv, j]
                dk[b, kv, j] += self.c * ds * q
                dv[b, kv, j] += weight * do
        grads = {"query": dq, "key": dk, "value": dv, "gate_alpha": d_alpha, "gate_tau": d_tau, "sink": d_sink}
        grads |= {"prefix_key": dk_ * self.W_K, "prefix_value": dv_ * self.W_V}
        for name, rows, d_rows in (("reweight_key", self.K, dk_), ("reweight_value", self.V, dv_)):
            if name in self.options:
                U, V = self.pair(name)
                reweighted = np.arange(rows.shape[2]) >= self.options["n_shared"]
                dW = d_rows * rows * reweighted[None, None, :, None]
                grads[f"{name}[0]"] = np.einsum("thpd,trhd->tpr", dW, V)
                grads[f"{name}[1]"] = np.einsum("tpr,thpd->trhd", U, dW)
        return grads


def assert_as_by_hand(arguments, gradients):
    expected = ByHand(**arguments)
    output, lse = prefix_attention(**arguments, return_lse=True)
    np.testing.assert_allclose(output.detach().numpy(), expected.output, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(lse.numpy(), expected.lse, rtol=1e-10, atol=1e-10)

    d_output = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    by_hand = expected.backward(d_output)
    for name, grad in gradients(arguments, d_output).items():
        # Sum what the argument was broadcast over: a leading T of 1 for no bank, tasks and heads for alpha and tau.
        want = torch.from_numpy(by_hand[name]).sum_to_size(grad.shape)
        np.testing.assert_allclose(grad.numpy(), want.numpy(), rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("gate", [*GATES, None])
@pytest.mark.parametrize("bank", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.8])
def test_output_and_all_gradients_follow_the_formulas(make_call, gradients, gate, bank, softcap):
    options = {"T": 3, "B": 4, "lengths": True, "gate_shape": "task, head"} if bank else {"gate_shape": "head"}
    options |= {"P": 5, "n_shared": 1, "rank_key": 2, "rank_value": 3, "mask": "padding bool", "is_causal": True}
    arguments = make_call(seed=3, gate=gate, softcap=softcap, **options)
    assert_as_by_hand(arguments, gradients)


def test_every_gate_is_known_here():
    assert SIGMA.keys() == GATES.keys()


SOME_MASK = [None, "padding bool", "padding float", "full bool", "full float"]
SOME_MASK += ["full bool + padding bool", "full float + padding bool", "full float + padding float"]


@st.composite
def call_options(draw):
    """Options of make_call, within the contract: everything that may be empty is, now and then."""
    P, T = draw(st.integers(0, 3)), draw(st.none() | st.integers(1, 3))
    rank = st.none() | st.integers(1, 3)
    shapes = ["float", "scalar", "head"] + ([] if T is None else ["task", "task, head"])
    return {
        "seed": draw(st.integers(0, 2**32)),
        **{size: draw(st.integers(0, 3)) for size in ("B", "N", "M")},
        **{size: draw(st.integers(1, 3)) for size in ("Hkv", "G", "D", "Dv")},
        "P": P,
        "T": T,
        "lengths": T is not None and draw(st.booleans()),
        "n_shared": draw(st.integers(0, P)),
        "rank_key": draw(rank),
        "rank_value": draw(rank),
        "gate": draw(st.none() | st.sampled_from(sorted(GATES))),
        "gate_shape": draw(st.sampled_from(shapes)),
        "mask": draw(st.sampled_from(SOME_MASK)),
        "bias": draw(st.booleans()),
        "is_causal": draw(st.booleans()),
        "window": draw(st.none() | st.tuples(*[st.none() | st.integers(0, 4)] * 2)),
        "scale": draw(st.none() | st.sampled_from([1.0, -0.3, 0.0])),
        "softcap": draw(st.none() | st.sampled_from([0.1, 1, 50.0])),
        "sink": draw(st.booleans()),
    }


@settings(max_examples=200, deadline=None, derandomize=True)
@given(options=call_options())
def test_any_call_follows_the_formulas(make_call, gradients, options):
    assert_as_by_hand(make_call(**options), gradients)


lengths = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(options=call_options(), pairs=lengths)
def test_a_packed_sequence_is_what_it_is_alone(make_call, leaves, options, pairs):
    arguments = make_call(**options | {"mask": None, "packed": tuple(map(list, zip(*pairs)))}) | {
        "backend": "reference"
    }
    own = {name: arguments.pop(name) for name in ("cu_seqlens_query", "cu_seqlens_key")}
    output, lse = prefix_attention(**arguments, **own, return_lse=True)
    alone = []
    for s, (a, b, c, d) in enumerate(zip(*(x[i:].tolist() for x in own.values() for i in (0, 1)))):
        each = dict(arguments)
        each["query"] = each["query"][:, :, a:b]
        each |= {name: each[name][:, :, c:d] for name in ("key", "value")}
        each |= {name: x[s : s + 1] for name in ("prefix_index", "prefix_bias") if (x := each.get(name)) is not None}
        alone.append(prefix_attention(**each, return_lse=True))
    expected, expected_lse = (torch.cat(x, dim=2) for x in zip(*alone))
    assert torch.equal(output, expected) and torch.equal(lse, expected_lse)
    inputs = list(leaves(arguments).values())
    d_output = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    found, wanted = (
        torch.autograd.grad(x, inputs, d_output, allow_unused=True, materialize_grads=True) for x in (output, expected)
    )
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


MASKS = {
    "none": {},
    "padding bool": {"mask": "padding bool"},
    "padding float": {"mask": "padding float"},
    "full bool": {"mask": "full bool"},
    "full float": {"mask": "full float"},
    "causal": {"is_causal": True},
    "causal, padding": {"is_causal": True, "mask": "padding bool"},
    "padding beside full": {"mask": "full float + padding bool"},
    "window": {"window": (1, 0)},
    "window, padding": {"window": (0, 1), "mask": "padding bool"},
    "prefix bias": {"bias": True},
    "packed": {"packed": ([2, 0, 1], [1, 1, 2]), "is_causal": True, "bias": True},
}
REST = [
    {"rank_key": 1, "rank_value": 3, "gate_shape": "head"},
    {"rank_key": 3, "rank_value": 1, "gate_shape": "scalar", "n_shared": 1},
    {"rank_key": 1, "rank_value": 1, "gate_shape": "task, head", "T": 2, "n_shared": 1},
    {"rank_key": 3, "rank_value": 3, "gate_shape": "task", "T": 2, "lengths": True},
    {"rank_key": 1, "rank_value": 1, "gate_shape": "head", "softcap": 0.8},
    {"rank_key": 1, "rank_value": 1, "gate_shape": "head", "sink": True},
]


@pytest.mark.parametrize(("i", "j"), list(product(range(len(GATES) + 1), range(len(MASKS)))))
def test_gradients_agree_with_finite_differences(make_call, leaves, i, j):
    """Every gate with every mask; ranks, banks, a cap, a sink go round, so that each meets each gate and each mask."""
    gate, mask = [*GATES, None][i], [*MASKS.values()][j]
    sizes = {"B": 2, "Hkv": 1, "G": 2, "N": 2, "M": 3, "P": 2, "D": 2, "Dv": 1}
    arguments = make_call(seed=10 * i + j, gate=gate, **sizes, **mask, **REST[(i + j) % len(REST)])
    inputs = leaves(arguments)

    def attend(*values):
        values = dict(zip(inputs, values))
        pairs = {n: (values.pop(f"{n}[0]"), values.pop(f"{n}[1]")) for n in ("reweight_key", "reweight_value")}
        return prefix_attention(**arguments | pairs | values)

    assert torch.autograd.gradcheck(attend, tuple(inputs.values()), check_undefined_grad=False)


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_splits_at_the_log_sum_exp(make_call, is_causal):
    arguments = make_call(N=5, M=4, mask="padding bool", is_causal=is_causal, bias=True, gate_shape="head")
    output, lse = prefix_attention(**arguments, return_lse=True)
    no_rows = {name: arguments[name][:, :0] for name in ("prefix_key", "prefix_value")} | {"prefix_bias": None}
    no_context = {name: arguments[name][:, :, :0] for name in ("key", "value")} | {"attn_mask": None}
    o_c, L_c = prefix_attention(**arguments | no_rows, return_lse=True)
    o_p, L_p = prefix_attention(**arguments | no_context, return_lse=True)
    L = torch.logaddexp(L_c, L_p)
    torch.testing.assert_close(lse, L, rtol=0, atol=1e-12)
    merged = o_c * (L_c - L).exp()[..., None] + o_p * (L_p - L).exp()[..., None]
    torch.testing.assert_close(output, merged, rtol=0, atol=1e-12)


def test_softplus_is_exact_in_float64_beyond_the_usual_threshold(make_call):
    arguments = make_call(gate="softplus", scale=1.0, B=1, Hkv=1, G=1, N=1, M=0, P=1, D=1)
    arguments |= {"prefix_key": torch.ones(1, 1, 1).double(), "gate_alpha": 1.0, "gate_tau": 1.0}
    for s in (19.0, 21.0, 30.0, 39.0, 41.0, 800.0):
        arguments["query"] = torch.full((1, 1, 1, 1), s).double()
        _, lse = prefix_attention(**arguments, return_lse=True)
        assert lse.item() == pytest.approx(2 * s + math.log1p(math.exp(-s)), rel=1e-15)
