"""The recorded attention weights reproduce the outputs of the attention layers."""

from dataclasses import replace

import pytest
import torch
from test_model import SWITCHES, random_gpt, random_ids

from chargpt.inspection import inspect, logit_lens
from chargpt.model import GPT, KVCache


def outputs(gpt, run):
    """Input and output of each attention layer, what `inspect` recorded, and the logits."""
    recorded = []
    hooks = [
        block.attention.register_forward_hook(
            lambda module, args, output: recorded.append((args[0], output))
        )
        for block in gpt.blocks
    ]
    with inspect(gpt) as layers:
        logits = run()
    for hook in hooks:
        hook.remove()
    return recorded, layers, logits


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
@torch.no_grad()
def test_attention_weights_times_values_give_the_output_of_attention(switches):
    gpt, ids = random_gpt(**switches), random_ids(2, 12)
    recorded, layers, logits = outputs(gpt, lambda: gpt(ids))
    assert len(layers) == len(gpt.blocks)
    for block, (x, output), layer in zip(gpt.blocks, recorded, layers):
        _, _, v = block.attention.query_key_value(x, None)  # values are not rotated
        assert layer.attention.shape == (2, 3, 12, 12)
        assert (layer.attention.triu(1) == 0).all()
        torch.testing.assert_close(layer.attention.sum(-1), torch.ones(2, 3, 12))
        y = (layer.attention @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(block.attention.projection(y), output, rtol=0, atol=1e-4)
        scores = layer.queries @ layer.keys.mT / layer.keys.size(-1) ** 0.5
        masked = scores + torch.full((12, 12), -torch.inf).triu(1)
        torch.testing.assert_close(masked.softmax(-1), layer.attention, rtol=0, atol=1e-5)
    for layer, after in zip(layers, layers[1:]):
        assert torch.equal(layer.residual, after.input)
    lens = logit_lens(gpt, layers)
    assert lens.shape == (len(layers) + 1, *logits.shape)
    torch.testing.assert_close(lens[-1], logits)
    without_blocks = GPT(replace(gpt.config, n_layer=1), logits.size(-1))
    without_blocks.load_state_dict(gpt.state_dict(), strict=False)
    without_blocks.blocks = torch.nn.ModuleList()
    torch.testing.assert_close(lens[0], without_blocks(ids))
    assert torch.equal(gpt(ids), logits)  # no hook remains


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
@torch.no_grad()
def test_passes_with_a_cache_record_the_same_as_one_pass(switches):
    gpt, ids = random_gpt(**switches), random_ids(2, 12)
    with inspect(gpt) as whole:
        gpt(ids)
    cache, n_layer = KVCache(gpt, rows=2), len(gpt.blocks)
    with inspect(gpt) as parts:
        for part in ids.split([5, 1, 6], dim=1):
            gpt(part, cache)
    for layer in range(n_layer):
        for start, end, layer_pass in zip((0, 5, 6), (5, 6, 12), parts[layer::n_layer]):
            expected = whole[layer].attention[:, :, start:end, :end]
            torch.testing.assert_close(layer_pass.attention, expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(
                layer_pass.residual, whole[layer].residual[:, start:end], rtol=0, atol=1e-4
            )


def test_inspection_does_not_disturb_training():
    gpt, ids = random_gpt(), random_ids(2, 12)
    with inspect(gpt) as layers:
        gpt(ids).sum().backward()
    assert not layers[0].attention.requires_grad and not layers[0].residual.requires_grad
    assert gpt.head.weight.grad is not None


@torch.no_grad()
def test_rows_of_different_lengths():
    gpt, ids = random_gpt(position="rotary", ngrams={3: 37}), random_ids(2, 6)
    cache = KVCache(gpt, rows=2)
    for row, length in enumerate((5, 2)):
        alone = KVCache(gpt, rows=1)
        gpt(ids[row : row + 1, :length], alone)
        cache.copy_row(alone, 0, [row])
    with inspect(gpt) as together:
        gpt(torch.stack((ids[0, 5:6], ids[1, 2:3])), cache)
    with inspect(gpt) as alone:
        gpt(ids[1:, :3])
    for layer, expected in zip(together, alone):
        torch.testing.assert_close(
            layer.attention[1, :, :, :3], expected.attention[0, :, -1:], rtol=0, atol=1e-5
        )
        assert (layer.attention[1, :, :, 3:] == 0).all()
