"""Muon, beside torch's own and beside its polynomial in float64."""

from __future__ import annotations

import pytest
import torch

from maesil.training.muon import Muon, orthogonalised

COEFFICIENTS, ITERATIONS = (3.4445, -4.775, 2.0315), 5


def _matrices(shape, count=3):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


def _singular_values_moved(matrix):
    """What Newton-Schulz must do: the singular vectors stay, each singular value goes through the polynomial."""
    u, values, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum().sqrt()
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        values = a * values + b * values**3 + c * values**5
    return u @ values.diag() @ vh


@pytest.mark.parametrize("shape", [(8, 8), (32, 8), (8, 32)])
def test_singular_values_go_through_the_polynomial_to_the_precision_of_float32(shape):
    matrices = _matrices(shape)
    expected = torch.stack([_singular_values_moved(one) for one in matrices])
    found = orthogonalised(matrices, COEFFICIENTS, ITERATIONS, 1e-7)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)  # in bfloat16 it is off by 1e-2


def test_a_matrix_of_zeros_stays_one():
    assert not orthogonalised(torch.zeros(1, 4, 6), COEFFICIENTS, ITERATIONS, 1e-7).any()


def _stepped(make, steps=4):
    """Parameters of two shapes after some steps, one of them without a gradient at first."""
    parameters = [torch.nn.Parameter(one.clone()) for one in (*_matrices((6, 12)), *_matrices((12, 6)))]
    optimizer, generator = make(parameters), torch.Generator().manual_seed(2)
    for step in range(steps):
        for number, one in enumerate(parameters):
            one.grad = None if step == 0 and number == 1 else torch.randn(one.shape, generator=generator)
        optimizer.step()
    return torch.cat([one.detach().flatten() for one in parameters]), optimizer.state_dict()


def test_steps_are_those_of_torch_up_to_bfloat16():
    ours, state = _stepped(lambda parameters: Muon(parameters, 0.02, 0.1))
    torchs, torchs_state = _stepped(
        lambda parameters: torch.optim.Muon(parameters, 0.02, 0.1, adjust_lr_fn="match_rms_adamw")
    )
    step = 0.02 * 0.2 * 12**0.5
    torch.testing.assert_close(ours, torchs, rtol=0, atol=4 * step * 1e-2)
    assert state["param_groups"] == torchs_state["param_groups"]
    for number, of_torch in torchs_state["state"].items():
        torch.testing.assert_close(state["state"][number], of_torch)


def test_a_matrix_steps_alike_beside_others_and_alone():
    matrix, gradient = _matrices((6, 12))[0], _matrices((6, 12))[1]

    def stepped(*others):
        parameters = [torch.nn.Parameter(one.clone()) for one in (matrix, *others)]
        for one in parameters:
            one.grad = gradient.clone()
        Muon(parameters, 0.02, 0.1).step()
        return parameters[0].detach()

    torch.testing.assert_close(stepped(), stepped(*_matrices((6, 12))), rtol=0, atol=1e-6)
