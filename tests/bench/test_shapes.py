"""Shapes have the features that they are named after, and inputs have the layout of models."""

import torch

from qtuning_fast.bench.shapes import CPU, GPU, SHAPES, TINY, TINY_CAUSAL, inputs


def test_inputs_are_strided_as_models_hand_them_over():
    x = inputs(TINY, dtype=torch.bfloat16, device="cpu")
    assert x.query.transpose(1, 2).is_contiguous() and x.query.dtype == torch.bfloat16
    assert x.prefix_key.dtype == x.gate_tau.dtype == torch.float32 and x.U_key.shape == (TINY.P, 1)
    assert all(t.requires_grad for t in x.tracked().trained().values()) and not x.query.requires_grad
    assert not torch.equal(x.query, inputs(TINY, dtype=torch.bfloat16, device="cpu", seed=1).query)


def test_shapes_have_the_features_that_their_names_say():
    padded, mixed = SHAPES["bert-base-padded"], SHAPES["bert-base-mixed"]
    lengths = inputs(padded, dtype=torch.float32, device="cpu").mask.sum(-1)
    assert lengths.max() == 128 and lengths.min() == 64 and abs(lengths.float().mean() / 128 - 0.75) < 0.01
    index = inputs(mixed, dtype=torch.float32, device="cpu").prefix_index
    assert index.bincount().tolist() == [2] * 16 and index.tolist() != sorted(index.tolist())
    assert inputs(SHAPES["t5-large"], dtype=torch.float32, device="cpu").mask.shape == (1, 16, 512, 512)
    folded = inputs(SHAPES["decode-cpu"], dtype=torch.bfloat16, device="cpu")
    assert folded.prefix_key.dtype == torch.bfloat16 and folded.query.shape[2] == 1 and folded.key.shape[2] == 1024
    assert all(shape.of for shape in (*GPU, *CPU)) and len(SHAPES) == len({s.name for s in SHAPES.values()})


def test_a_part_of_the_inputs_is_a_part_of_each_of_them():
    x = inputs(SHAPES["tiny-mixed"], dtype=torch.float32, device="cpu")
    part = x.of_samples(torch.tensor([2, 0])).of_last_queries(5)
    assert torch.equal(part.query, x.query[[2, 0], :, -5:]) and torch.equal(part.prefix_index, x.prefix_index[[2, 0]])
    assert part.key.shape[2] == x.key.shape[2] and torch.equal(part.prefix_key, x.prefix_key)
    assert str(TINY_CAUSAL) == "B2 Hq4 Hkv2 N24 D16 P13 causal" and TINY.M == TINY.N
