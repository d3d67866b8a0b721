"""Muon against a plain loop, AdamW against torch's own, and what both keep."""

import copy

import pytest
import torch

from chargpt.training.optimizers import POLAR_EXPRESS, SCHEDULES, MuonAdamW, orthogonalize


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters(*shapes):
    return [torch.nn.Parameter(draw(*shape, seed=i)) for i, shape in enumerate(shapes)]


def give_gradients(params, seed):
    for i, p in enumerate(params):
        p.grad = draw(*p.shape, seed=1000 * seed + i)


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16), (3, 24, 8)])
def test_orthogonalize_keeps_singular_vectors_and_evens_out_values(shape):
    matrix = draw(*shape)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalize(matrix, 5)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.7 and values.max() < 1.3
    assert s.max() / s.min() > values.max() / values.min()
    # The polynomial of each iteration is odd: only the singular values change.
    middle = u.mT @ result @ vh.mT
    assert torch.allclose(middle, torch.diag_embed(middle.diagonal(dim1=-2, dim2=-1)), atol=1e-4)
    assert middle.diagonal(dim1=-2, dim2=-1).min() > 0


@pytest.mark.parametrize("iterations", [1, 3])
def test_each_iteration_is_polar_express_polynomial_of_the_singular_values(iterations):
    """Amsel et al. 2025, algorithm 1: divided by 1.01 times the Frobenius norm, then odd polynomials."""
    matrix = draw(12, 20)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / (1.01 * s.square().sum().sqrt())
    for a, b, c in POLAR_EXPRESS[:iterations]:
        s = a * s + b * s**3 + c * s**5
    assert torch.allclose(orthogonalize(matrix, iterations), u @ s.diag() @ vh, atol=1e-4)


def test_more_iterations_come_closer():
    u, _, vh = torch.linalg.svd(draw(24, 24))
    matrix = u @ torch.diag(torch.logspace(0, -2, 24)) @ vh
    errors = [(torch.linalg.svdvals(orthogonalize(matrix, n)) - 1).abs().max() for n in range(1, 6)]
    assert errors == sorted(errors, reverse=True)


def test_orthogonalize_of_nothing_is_nothing():
    assert torch.equal(orthogonalize(torch.zeros(4, 6), 4), torch.zeros(4, 6))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_part_is_torchs_adamw(weight_decay):
    ours, theirs = parameters((6, 4), (5,)), parameters((6, 4), (5,))
    settings = dict(lr=1e-2, betas=(0.8, 0.97), eps=1e-3, weight_decay=weight_decay)
    mine, reference = (
        MuonAdamW([dict(params=ours, **settings)]),
        torch.optim.AdamW(theirs, **settings),
    )
    for step in range(10):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        mine.step()
        reference.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def muon_alone(weight, gradients, lr, weight_decay, momentum, iterations, parts):
    """Muon's steps on one matrix, as the post describes them."""
    mean = torch.zeros_like(weight)
    for gradient in gradients:
        mean = momentum * mean + (1 - momentum) * gradient
        update = (1 - momentum) * gradient + momentum * mean  # Nesterov
        pieces = [orthogonalize(piece, iterations) for piece in update.chunk(parts)]
        rows, columns = pieces[0].shape
        weight = weight * (1 - lr * weight_decay)
        weight = weight - lr * max(1, rows / columns) ** 0.5 * torch.cat(pieces)
    return weight


@pytest.mark.parametrize("parts", [1, 3])
def test_muon_moves_matrices_together_as_one_by_one(parts):
    """Of equal and different shapes, in one group."""
    params = parameters((12, 4), (12, 4), (6, 8), (12, 4), (6, 8))
    settings = dict(lr=0.02, weight_decay=0.1, momentum=0.9, iterations=4, parts=parts)
    begin = [p.detach().clone() for p in params]
    optimizer = MuonAdamW([dict(params=params, muon=True, **settings)])
    gradients = [[] for _ in params]
    for step in range(5):
        give_gradients(params, step)
        for seen, p in zip(gradients, params):
            seen.append(p.grad.clone())
        optimizer.step()
    for p, start, seen in zip(params, begin, gradients):
        torch.testing.assert_close(
            p.detach(), muon_alone(start, seen, **settings), rtol=1e-4, atol=1e-5
        )


def test_the_state_survives_exactly():
    params = parameters((6, 4), (5,), (8, 8))

    def groups(p):
        return [dict(params=p[:2], weight_decay=0.1), dict(params=p[2:], muon=True, lr=0.02)]

    optimizer = MuonAdamW(groups(params))
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = MuonAdamW(groups(others))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        give_gradients(params, step)
        give_gradients(others, step)
        optimizer.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(params, others))


def test_parameters_without_gradient_stay():
    params = parameters((4, 4), (4, 4))
    begin = [p.detach().clone() for p in params]
    optimizer = MuonAdamW([dict(params=params, muon=True)])
    params[0].grad = draw(4, 4)
    optimizer.step()
    assert not torch.equal(params[0], begin[0])
    assert torch.equal(params[1], begin[1])


def test_schedules():
    expected = {
        "constant": {0: 1, 0.5: 1, 1: 1},
        "linear": {0: 1, 0.25: 0.75, 1: 0},
        "cosine": {0: 1, 0.5: 0.5, 1: 0},
    }
    assert SCHEDULES.keys() == expected.keys()
    for name, values in expected.items():
        for progress, factor in values.items():
            assert SCHEDULES[name](progress) == pytest.approx(factor)
