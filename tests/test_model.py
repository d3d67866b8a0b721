"""The network compared with its textbook form; causality, initialization, dropout, settings."""

import pytest
import torch
import torch.nn.functional as F
from reference import named_as_in_gpt, reference_of
from torch import nn

from chargpt.model import GPT, GPTConfig, UserError
from chargpt.model.ngrams import NgramEmbedding

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


def test_number_of_parameters_at_the_base_size():
    assert sum(p.numel() for p in GPT(GPTConfig(), vocab_size=65).parameters()) == 10_788_929


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_logits_and_gradients_equal_those_of_the_reference(switches):
    gpt = random_gpt(**switches).double()
    reference = reference_of(gpt)
    ids, targets = random_ids(3, 12), random_ids(3, 12, seed=3)
    logits, expected = gpt(ids), reference(ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-6)

    for scores in (logits, expected):
        F.cross_entropy(scores.flatten(0, 1), targets.flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in gpt.named_parameters()}
    for name, parts in named_as_in_gpt(reference).items():
        expected = torch.cat([part.grad.flatten() for part in parts])
        torch.testing.assert_close(
            gradients[name].flatten(), expected, rtol=0, atol=2e-6, msg=lambda m: f"{name}: {m}"
        )
        assert expected.abs().max() > 1e-3, f"{name}: a zero gradient proves nothing"


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
@torch.no_grad()
def test_no_position_sees_a_later_one(switches):
    gpt, ids = random_gpt(**switches), random_ids(1, 12)
    before = gpt(ids)
    for position in (1, 6, 11):
        changed = ids.clone()
        changed[0, position] = (ids[0, position] + 1) % VOCAB_SIZE
        after = gpt(changed)
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-6)
        assert (after - before)[:, position:].abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_logits_of_a_prefix_are_those_of_the_whole_sequence():
    gpt, ids = random_gpt(position="rotary", ngrams={3: 37}), random_ids(2, 12)
    logits = gpt(ids)
    for T in range(1, 12):
        torch.testing.assert_close(gpt(ids[:, :T]), logits[:, :T], rtol=0, atol=1e-5)


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


class Experts(nn.Module):
    """Two linear layers with 3-D weights, a matrix for each expert; the average of both."""

    residual = True

    def __init__(self, C: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, C, C))
        self.bias = nn.Parameter(torch.ones(2, C))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.einsum("btc,edc->btd", x, self.weight) + self.bias.sum(0)) / 2


def test_initialization_follows_the_modules_not_their_names():
    """A layer with another name and a 3-D weight is scaled with depth; a tied weight is not."""

    class Tied(GPT):
        def initialize(self) -> None:
            self.head.weight = self.token_embedding.weight
            for block in self.blocks:
                block.feed_forward = Experts(self.config.n_embd)
            super().initialize()

    torch.manual_seed(0)
    gpt = Tied(GPTConfig(n_embd=192, n_layer=3), vocab_size=65)
    assert gpt.head.weight is gpt.token_embedding.weight
    assert gpt.head.weight.std().item() == pytest.approx(0.02, rel=0.03)
    for block in gpt.blocks:
        weight = block.feed_forward.weight
        assert weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.03)
        assert (block.feed_forward.bias == 0).all()
    assert gpt(random_ids(2, 12)).isfinite().all()


def test_a_network_built_on_the_meta_device_works_once_weights_are_assigned():
    for switches in SWITCHES.values():
        gpt, ids = random_gpt(**switches), random_ids(2, 12)
        state = torch.get_rng_state()
        with torch.device("meta"):
            empty = make_gpt(**switches)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(tensor.is_meta for tensor in empty.state_dict().values())
        assert not list(empty.buffers())
        empty.load_state_dict(gpt.state_dict(), assign=True)
        assert torch.equal(empty.eval()(ids), gpt(ids))


def test_ngram_dropout_zeroes_whole_vectors_and_keeps_their_mean():
    torch.manual_seed(0)
    embedding = NgramEmbedding({2: 50, 3: 70}, n_embd=24, dropout=0.25)
    ids = random_ids(500, 2 + 12)
    nn.init.constant_(embedding.table.weight, 3.0)
    vectors = embedding(ids) / 3.0  # the sum of two tables: 0, 1 or 2 of them kept
    assert (vectors == vectors[..., :1]).all()
    fractions = torch.stack([(vectors[..., 0] * 0.75).round() == n for n in range(3)])
    expected = torch.tensor([0.0625, 0.375, 0.5625])
    torch.testing.assert_close(fractions.float().mean((1, 2)), expected, rtol=0, atol=0.02)
    assert (embedding.eval()(ids) == 6.0).all()


@pytest.mark.parametrize(
    "switches",
    [
        dict(dropout=0.5, attention_dropout=0.0),
        dict(dropout=0.0, attention_dropout=0.5),
        dict(dropout=0.0, ngrams={3: 37}, ngram_dropout=0.5),
    ],
    ids=["outputs", "attention", "n-grams"],
)
def test_dropout_is_active_in_training_only(switches):
    gpt, ids = random_gpt(**switches).train(), random_ids(2, 12)
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
        (dict(n_head=8, position="rotary"), "rotary positions need an even n_embd / n_head, not 3"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(ngram_dropout=1.0), "ngram_dropout is 1.0"),
        (dict(ngrams={1: 8}), "ngrams has 1: 8; n must be 2 to 5"),
        (dict(ngrams={6: 8}), "ngrams has 6: 8"),
        (dict(ngrams={"3": 8}), "ngrams has '3': 8"),
        (dict(ngrams={3: 0}), "ngrams has 3: 0"),
        (dict(dropout=-0.1), "dropout is -0.1"),
        (dict(bias=1), "bias is 1; it must be bool"),
        (dict(norm="batch"), "norm is 'batch'; it must be one of layer, plain"),
    ],
)
def test_invalid_settings(wrong, message):
    with pytest.raises(UserError, match=message):
        make_gpt(**wrong)


def test_more_characters_than_block_size():
    with pytest.raises(UserError, match="the input has 13 characters, but block_size is 12"):
        make_gpt()(random_ids(1, 13))
