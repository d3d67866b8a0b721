"""What the network is seen to look at is what it computes with."""

import pytest
import torch
from test_model import SWITCHES, random_gpt, random_ids

from chargpt.inspection import inspect
from chargpt.model import KVCache


def outputs(gpt, run):
    """What each attention layer gave, by a hook of our own, and what `inspect` saw."""
    given = []
    hooks = [
        block.attention.register_forward_hook(
            lambda module, args, output: given.append((args[0], output))
        )
        for block in gpt.blocks
    ]
    with inspect(gpt) as seen:
        logits = run()
    for hook in hooks:
        hook.remove()
    return given, seen, logits


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
@torch.no_grad()
def test_attention_weights_times_values_is_what_attention_gives(switches):
    gpt, ids = random_gpt(**switches), random_ids(2, 12)
    given, seen, logits = outputs(gpt, lambda: gpt(ids))
    assert len(seen) == len(gpt.blocks)
    for block, (x, output), layer in zip(gpt.blocks, given, seen):
        _, _, v = block.attention.query_key_value(x, None)  # values are not rotated
        assert layer.attention.shape == (2, 3, 12, 12)
        assert (layer.attention.triu(1) == 0).all()
        torch.testing.assert_close(layer.attention.sum(-1), torch.ones(2, 3, 12))
        y = (layer.attention @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(block.attention.projection(y), output, rtol=0, atol=1e-4)
    torch.testing.assert_close(gpt.head(gpt.norm(seen[-1].residual)), logits)
    assert torch.equal(gpt(ids), logits)  # nothing is left behind


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
@torch.no_grad()
def test_cached_passes_are_seen_as_the_whole_is(switches):
    gpt, ids = random_gpt(**switches), random_ids(2, 12)
    with inspect(gpt) as whole:
        gpt(ids)
    cache, n_layer = KVCache(gpt, rows=2), len(gpt.blocks)
    with inspect(gpt) as parts:
        for part in ids.split([5, 1, 6], dim=1):
            gpt(part, cache)
    for layer in range(n_layer):
        for begin, end, seen in zip((0, 5, 6), (5, 6, 12), parts[layer::n_layer]):
            expected = whole[layer].attention[:, :, begin:end, :end]
            torch.testing.assert_close(seen.attention, expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(
                seen.residual, whole[layer].residual[:, begin:end], rtol=0, atol=1e-4
            )


def test_what_is_inspected_may_be_trained():
    gpt, ids = random_gpt(), random_ids(2, 12)
    with inspect(gpt) as seen:
        gpt(ids).sum().backward()
    assert not seen[0].attention.requires_grad and not seen[0].residual.requires_grad
