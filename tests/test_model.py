"""The network against its textbook form, and what a network of this kind must never do."""

import pytest
import torch
import torch.nn.functional as F
from reference import named_as_in_gpt, reference_of

from chargpt.model.gpt import GPT, GPTConfig, NgramEmbedding

SIZES = dict(block_size=12, n_embd=24, n_head=3, n_layer=2)
SWITCHES = {
    "textbook": {},
    "rotary": dict(position="rotary"),
    "plain norm": dict(norm="plain"),
    "no bias": dict(bias=False),
    "bias of query, key and value": dict(qkv_bias=True),
    "gelu": dict(activation="gelu"),
    "relu2": dict(activation="relu2"),
    "trigrams": dict(ngrams={3: 37}),
    "all": dict(
        position="rotary",
        norm="plain",
        bias=False,
        activation="relu2",
        ngrams={2: 11, 4: 37, 5: 19},
    ),
}


VOCAB_SIZE = 11


def make_gpt(**settings) -> GPT:
    return GPT(GPTConfig(**SIZES | settings), VOCAB_SIZE)


def random_gpt(**switches) -> GPT:
    """Large random weights, so that every part matters."""
    gpt = make_gpt(**switches).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return gpt


def random_ids(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def test_the_base_size_has_the_textbooks_parameters():
    assert sum(p.numel() for p in GPT(GPTConfig(), vocab_size=65).parameters()) == 10_788_929


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_logits_and_gradients_are_those_of_the_textbook(switches):
    gpt = random_gpt(**switches).double()
    reference = reference_of(gpt)
    ids, targets = random_ids(3, 12), random_ids(3, 12, seed=3)
    logits, expected = gpt(ids), reference(ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-6)

    for scores in (logits, expected):
        F.cross_entropy(scores.flatten(0, 1), targets.flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in gpt.named_parameters()}
    for name, parts in named_as_in_gpt(reference).items():
        expected = torch.cat([part.grad for part in parts])
        torch.testing.assert_close(
            gradients[name], expected, rtol=0, atol=2e-6, msg=lambda m: f"{name}: {m}"
        )
        assert expected.abs().max() > 1e-3, f"{name}: a gradient of nothing proves nothing"


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
@torch.no_grad()
def test_no_character_sees_a_later_one(switches):
    gpt, ids = random_gpt(**switches), random_ids(1, 12)
    before = gpt(ids)
    for position in (1, 6, 11):
        changed = ids.clone()
        changed[0, position] = (ids[0, position] + 1) % VOCAB_SIZE
        after = gpt(changed)
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-6)
        assert (after - before)[:, position:].abs().amax(-1).min() > 1e-4


def test_initial_weights():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(n_embd=192, n_layer=3), vocab_size=65)
    for name, parameter in gpt.named_parameters():
        std = 0.02 / 6**0.5 if "projection" in name else 0.02
        if "norm" in name:
            assert (parameter == float(name.endswith("weight"))).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(parameter.mean().item()) < 0.03 * std, name


@torch.no_grad()
def test_zero_init_starts_as_the_identity_and_undecided():
    gpt = make_gpt(zero_init=True, ngrams={3: 5}).eval()
    ids = random_ids(2, 12)
    assert (gpt(ids) == 0).all()
    x = gpt.token_embedding(ids)
    assert torch.equal(gpt.blocks[0](x), x)


def test_ngram_dropout_leaves_whole_vectors_out_and_keeps_their_mean():
    settings = dict(ngrams={2: 50, 3: 70}, ngram_dropout=0.25)
    embedding = NgramEmbedding(GPTConfig(**SIZES | settings))
    ids, preceding = random_ids(500, 12), random_ids(500, 2, seed=3)
    torch.nn.init.constant_(embedding.table.weight, 3.0)
    vectors = embedding(ids, preceding) / 3.0  # of two tables: 0, 1 or 2 of them kept
    assert (vectors == vectors[..., :1]).all()
    shares = torch.stack([(vectors[..., 0] * 0.75).round() == n for n in range(3)])
    expected = torch.tensor([0.0625, 0.375, 0.5625])
    torch.testing.assert_close(shares.float().mean((1, 2)), expected, rtol=0, atol=0.02)
    assert (embedding.eval()(ids, preceding) == 6.0).all()


def test_dropout_works_in_training_alone():
    gpt, ids = make_gpt(dropout=0.5), random_ids(2, 12)
    assert not torch.equal(gpt(ids), gpt(ids))
    gpt.eval()
    assert torch.equal(gpt(ids), gpt(ids))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(block_size=0), "block_size is 0"),
        (dict(n_embd=-24), "n_embd is -24"),
        (dict(n_head=0), "n_head is 0"),
        (dict(n_layer=0), "n_layer is 0"),
        (dict(n_head=5), "n_embd 24 is not divisible by n_head 5"),
        (dict(n_head=8, position="rotary"), "rotary .* is odd"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(ngram_dropout=1.0), "ngram_dropout is 1.0"),
        (dict(ngrams={1: 8}), "ngrams has 1; .* 2 to 5"),
        (dict(ngrams={6: 8}), "ngrams has 6"),
        (dict(ngrams={"3": 8}), "ngrams has '3'"),
        (dict(ngrams={3: 0}), "ngrams has 3: 0"),
        (dict(dropout=-0.1), "dropout is -0.1"),
    ],
)
def test_sizes_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        make_gpt(**wrong)


def test_more_positions_than_block_size():
    with pytest.raises(ValueError, match="13 positions .* block_size is 12"):
        make_gpt()(random_ids(1, 13))
