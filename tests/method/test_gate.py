"""The parameters of NoRGa's gate."""

import pytest
import torch

from qtuning_fast.method.gate import GATE_PER, NO_GATE, Gate, gate_arguments


@pytest.mark.parametrize(("num_heads", "shape"), [(None, ()), (4, (4,))])
def test_alpha_and_tau_start_at_one_and_are_learned(num_heads: int | None, shape: tuple[int, ...]) -> None:
    gate = Gate("gelu", num_heads)
    assert {name for name, _ in gate.named_parameters()} == {"alpha", "tau"}
    for parameter in gate.parameters():
        assert parameter.requires_grad and torch.equal(parameter, torch.ones(shape))
    assert repr(gate) == f"Gate('gelu', shape={shape})"


def test_the_operator_gets_the_parameters_themselves() -> None:
    gate = Gate("sigmoid", 2)
    arguments = gate.arguments()
    assert arguments == gate_arguments("sigmoid", gate.alpha, gate.tau)
    assert arguments["gate_alpha"] is gate.alpha and arguments["gate_tau"] is gate.tau
    assert NO_GATE == {"gate": None} and GATE_PER == ("layer", "head")
