"""Muon compared with a plain loop, AdamW with torch's; registering optimizers and schedules."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from chargpt.model import GPT, GPTConfig
from chargpt.training.optimizers import (
    OPTIMIZERS,
    POLAR_EXPRESS,
    SCHEDULES,
    MuonAdamW,
    orthogonalize,
)

CONFIG = SimpleNamespace(
    lr=1e-2, beta1=0.8, beta2=0.97, eps=1e-3, weight_decay=0.1,
    muon_lr=0.02, muon_weight_decay=0.2, muon_momentum=0.9, muon_iterations=3,
)  # fmt: skip


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters(*shapes):
    return [torch.nn.Parameter(draw(*shape, seed=i)) for i, shape in enumerate(shapes)]


def set_gradients(params, seed):
    for i, p in enumerate(params):
        p.grad = draw(*p.shape, seed=1000 * seed + i)


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16), (3, 24, 8)])
def test_orthogonalize_keeps_singular_vectors_and_brings_singular_values_close_to_1(shape):
    matrix = draw(*shape)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalize(matrix, 5)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.7 and values.max() < 1.3
    assert s.max() / s.min() > values.max() / values.min()
    # The polynomial of each step is odd: only the singular values change.
    middle = u.mT @ result @ vh.mT
    assert torch.allclose(middle, torch.diag_embed(middle.diagonal(dim1=-2, dim2=-1)), atol=1e-4)
    assert middle.diagonal(dim1=-2, dim2=-1).min() > 0


@pytest.mark.parametrize("ns_steps", [1, 3])
def test_each_newton_schulz_step_applies_its_polynomial_to_the_singular_values(ns_steps):
    """Amsel et al. 2025, algorithm 1: divided by 1.01 times the Frobenius norm, then odd polynomials."""
    matrix = draw(12, 20)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / (1.01 * s.square().sum().sqrt())
    for a, b, c in POLAR_EXPRESS[:ns_steps]:
        s = a * s + b * s**3 + c * s**5
    assert torch.allclose(orthogonalize(matrix, ns_steps), u @ s.diag() @ vh, atol=1e-4)


def test_more_newton_schulz_steps_come_closer_to_1():
    u, _, vh = torch.linalg.svd(draw(24, 24))
    matrix = u @ torch.diag(torch.logspace(0, -2, 24)) @ vh
    errors = [(torch.linalg.svdvals(orthogonalize(matrix, n)) - 1).abs().max() for n in range(1, 6)]
    assert errors == sorted(errors, reverse=True)


def test_orthogonalize_maps_zero_to_zero():
    assert torch.equal(orthogonalize(torch.zeros(4, 6), 4), torch.zeros(4, 6))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_adamw_part_equals_torchs_adamw(weight_decay):
    params, expected = parameters((6, 4), (5,)), parameters((6, 4), (5,))
    settings = dict(lr=1e-2, betas=(0.8, 0.97), eps=1e-3, weight_decay=weight_decay)
    optimizer, reference = (
        MuonAdamW([dict(params=params, **settings)]),
        torch.optim.AdamW(expected, **settings),
    )
    for step in range(10):
        set_gradients(params, step)
        set_gradients(expected, step)
        optimizer.step()
        reference.step()
    for a, b in zip(params, expected):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def muon_loop(weight, gradients, lr, weight_decay, momentum, ns_steps, stacked):
    """Muon's steps on one parameter, as in Jordan et al. 2024."""
    mean = torch.zeros_like(weight)
    for gradient in gradients:
        mean = momentum * mean + (1 - momentum) * gradient
        update = (1 - momentum) * gradient + momentum * mean  # Nesterov
        matrices = [orthogonalize(matrix, ns_steps) for matrix in update.chunk(stacked)]
        rows, columns = matrices[0].shape
        weight = weight * (1 - lr * weight_decay)
        weight = weight - lr * max(1, rows / columns) ** 0.5 * torch.cat(matrices)
    return weight


@pytest.mark.parametrize("stacked", [1, 3])
def test_muon_updates_a_batch_of_matrices_like_each_alone(stacked):
    """Of equal and different shapes, in one group."""
    params = parameters((12, 4), (12, 4), (6, 8), (12, 4), (6, 8))
    settings = dict(lr=0.02, weight_decay=0.1, momentum=0.9, ns_steps=4, stacked=stacked)
    starts = [p.detach().clone() for p in params]
    optimizer = MuonAdamW([dict(params=params, muon=True, **settings)])
    gradients = [[] for _ in params]
    for step in range(5):
        set_gradients(params, step)
        for seen, p in zip(gradients, params):
            seen.append(p.grad.clone())
        optimizer.step()
    for p, start, seen in zip(params, starts, gradients):
        torch.testing.assert_close(
            p.detach(), muon_loop(start, seen, **settings), rtol=1e-4, atol=1e-5
        )


def test_a_restored_state_continues_bit_for_bit():
    params = parameters((6, 4), (5,), (8, 8))

    def groups(p):
        return [dict(params=p[:2], weight_decay=0.1), dict(params=p[2:], muon=True, lr=0.02)]

    optimizer = MuonAdamW(groups(params))
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = MuonAdamW(groups(others))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        set_gradients(params, step)
        set_gradients(others, step)
        optimizer.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(params, others))


def test_parameters_without_gradient_do_not_change():
    params = parameters((4, 4), (4, 4))
    starts = [p.detach().clone() for p in params]
    optimizer = MuonAdamW([dict(params=params, muon=True)])
    params[0].grad = draw(4, 4)
    optimizer.step()
    assert not torch.equal(params[0], starts[0])
    assert torch.equal(params[1], starts[1])


def test_muon_splits_a_3d_weight_into_matrices():
    weight = nn.Parameter(draw(2, 12, 8))
    matrices = [nn.Parameter(matrix.clone()) for matrix in weight.detach()]
    settings = dict(muon=True, lr=0.02, weight_decay=0.1)
    together = MuonAdamW([dict(params=[weight], **settings)])
    separate = MuonAdamW([dict(params=matrices, **settings)])
    for step in range(3):
        weight.grad = draw(2, 12, 8, seed=step)
        for matrix, gradient in zip(matrices, weight.grad):
            matrix.grad = gradient
        together.step()
        separate.step()
    torch.testing.assert_close(weight.detach(), torch.stack(list(matrices)).detach())


# ---- parameter groups ----


def make_module(**settings) -> nn.Module:
    sizes = dict(block_size=8, n_embd=16, n_head=2, n_layer=2)
    module = nn.Module()
    module.gpt = GPT(GPTConfig(**sizes | settings), vocab_size=11)
    module.second_head = nn.Linear(16, 11, bias=False)
    return module


def groups_by_name(module: nn.Module, name: str) -> list[tuple[dict, set[str]]]:
    names = {p: n.removeprefix("gpt.") for n, p in module.named_parameters()}
    optimizer = OPTIMIZERS[name](module, module.gpt.blocks, CONFIG, False)
    found = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len(names) and set(found) == set(names), "each parameter exactly once"
    return [(group, {names[p] for p in group["params"]}) for group in optimizer.param_groups]


def test_adamw_decays_everything_but_vectors():
    module = make_module(ngrams={3: 7})
    matrices, vectors = groups_by_name(module, "adamw")
    assert {"token_embedding.weight", "second_head.weight"} < matrices[1]
    assert all(n.endswith("bias") or "norm" in n for n in vectors[1])
    assert [group["weight_decay"] for group, _ in (matrices, vectors)] == [0.1, 0.0]
    for group, _ in (matrices, vectors):
        assert (group["lr"], group["initial_lr"], group["eps"]) == (1e-2, 1e-2, 1e-3)
        assert group["betas"] == (0.8, 0.97)


def test_muon_takes_all_matrices_of_the_blocks_and_splits_query_key_and_value():
    module = make_module(ngrams={3: 7})
    others, vectors, single, stacked = groups_by_name(module, "muon")
    assert others[1] == {
        f"{name}.weight"
        for name in (
            [
                "token_embedding",
                "position_embedding",
                "ngram_embedding.table",
                "head",
                "second_head",
            ]
        )
    }
    assert stacked[1] == {f"blocks.{i}.attention.qkv.weight" for i in range(2)}
    assert len(single[1]) == 6 and all(name.startswith("blocks.") for name in single[1])
    assert (single[0]["stacked"], stacked[0]["stacked"]) == (1, 3)
    assert [g["weight_decay"] for g, _ in (others, vectors, single, stacked)] == [0.1, 0, 0.2, 0.2]
    for group, _ in (others, vectors):
        assert (group["lr"], group["initial_lr"], group["eps"]) == (1e-2, 1e-2, 1e-3)
        assert group["betas"] == (0.8, 0.97) and not group["muon"]
    for group, _ in (single, stacked):
        assert (group["lr"], group["initial_lr"]) == (0.02, 0.02)
        assert (group["momentum"], group["ns_steps"], group["muon"]) == (0.9, 3, True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_tied_and_new_weights_need_no_change_of_the_optimizers(name):
    """A tied head, a weight shared by two blocks, and a new layer with a 3-D weight and 2-D bias."""
    module = make_module()
    gpt = module.gpt
    gpt.head.weight = gpt.token_embedding.weight
    gpt.blocks[1].attention.qkv.weight = gpt.blocks[0].attention.qkv.weight
    gpt.blocks[0].experts = nn.Module()
    gpt.blocks[0].experts.weight = nn.Parameter(draw(3, 4, 4))
    gpt.blocks[0].experts.bias = nn.Parameter(draw(3, 4))
    groups = groups_by_name(module, name)
    assert groups[1][0]["weight_decay"] == 0 and "blocks.0.experts.bias" in groups[1][1]
    if name == "muon":
        assert "blocks.0.experts.weight" in groups[2][1]
        assert groups[3][1] == {"blocks.0.attention.qkv.weight"}
    optimizer = OPTIMIZERS[name](module, gpt.blocks, CONFIG, False)
    set_gradients(list(module.parameters()), seed=1)
    optimizer.step()
    assert all(p.isfinite().all() for p in module.parameters())


# ---- schedules ----


def test_schedules():
    expected = {
        "constant": {0: 1, 0.5: 1, 1: 1},
        "linear": {0: 1, 0.25: 0.75, 1: 0},
        "cosine": {0: 1, 0.5: 0.5, 1: 0},
    }
    assert SCHEDULES.keys() == expected.keys()
    for name, values in expected.items():
        for progress, fraction in values.items():
            assert SCHEDULES[name](7, progress, None) == pytest.approx(fraction)
