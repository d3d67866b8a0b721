"""A chargpt network for Transformers: AutoModelForCausalLM with trust_remote_code=True.

The network itself is in gpt.py and the files that it imports, the code it was trained with.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .config import GPTConfig, UserError
from .configuration_chargpt import ChargptConfig
from .gpt import GPT
from .kv_cache import CacheStep
from .ngrams import NgramEmbedding  # noqa: F401  (Transformers 5.0 copies only what is imported here)
from .rotary import rotary_angles


class ChargptForCausalLM(PreTrainedModel, GenerationMixin):
    """A GPT over characters: ids (B, T) to logits of the next character (B, T, V)."""

    config_class = ChargptConfig

    def __init__(self, config: ChargptConfig) -> None:
        super().__init__(config)
        self.gpt = GPT(network_settings(config), config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.gpt.token_embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.gpt.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        cache: Cache | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the next character, and the loss if there are labels.

        Args:
            input_ids: the new characters, (B, T).
            attention_mask: (B, S), 0 for padding, which may be on either side; S is T, plus the
                length of the cache.
            past_key_values: the cache of earlier characters; newer versions of Transformers call it
                `cache`.
            use_cache: whether to return a cache.
            labels: (B, T), the ids at the same positions; -100 is ignored.
            logits_to_keep: the number of last positions to compute logits for; 0 is all.

        Raises:
            UserError: the text is longer than the network's maximum context.
        """
        past = past_key_values if cache is None else cache
        if past is None and (use_cache or attention_mask is not None):
            past = DynamicCache(config=self.config)
        step = None if past is None else PaddedCache(self.gpt, past, attention_mask)
        hidden = self.gpt.hidden_states(input_ids, step)[:, -logits_to_keep:]
        logits = self.gpt.head(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits)
        if use_cache:
            output["cache" if "cache" in output.__dataclass_fields__ else "past_key_values"] = past
        return output.to_tuple() if return_dict is False else output


def network_settings(config: ChargptConfig) -> GPTConfig:
    """The settings of the network; keys that are numbers have become strings in JSON."""
    settings = dict(config.network)
    for name, value in settings.items():
        if isinstance(value, dict):
            settings[name] = {int(k) if k.isdigit() else k: v for k, v in value.items()}
    return GPTConfig(**settings)


class PaddedCache:
    """Adapts a cache of Transformers, and a padding mask, to the interface of `KVCache`.

    The ids themselves, which n-grams need, are stored as one more layer of the cache, so that they
    are reordered and cropped like keys and values.
    """

    def __init__(self, gpt: GPT, cache: Cache, attention_mask: Tensor | None) -> None:
        self.config = gpt.config
        self.cache = cache
        self.attention_mask = attention_mask

    def append(self, ids: Tensor) -> CacheStep:
        """Append ids (B, T); the network then stores their keys and values."""
        (B, T), config = ids.shape, self.config
        start = int(self.cache.get_seq_length())
        S = start + T
        if config.block_size < S:
            raise UserError(
                f"the text has {S} characters, but the network sees at most {config.block_size}"
            )
        visible = ids.new_ones(B, S) if self.attention_mask is None else self.attention_mask
        positions = (visible.cumsum(1) - 1).clamp(min=0)[:, start:]  # padding has no positions
        slots = torch.arange(S, device=ids.device)
        new = slots[start:, None]
        # Padding attends to itself: a softmax over no slots would be NaN.
        mask = (slots < new) & visible.bool()[:, None, None, :] | (slots == new)  # (B, 1, T, S)
        angles = None
        if config.position != "learned":
            angles = rotary_angles(positions, config.head_size).unsqueeze(1)
        layers = [Layer(self.cache, i) for i in range(config.n_layer)]
        ids = self.append_ids(ids * visible[:, start:]) if config.ngrams else ids
        return CacheStep(positions, angles, mask, ids, layers)

    def append_ids(self, ids: Tensor) -> Tensor:
        """Store ids (B, T); returns them and the ngram_context ids before them, 0 for none."""
        index, context = self.config.n_layer, self.config.ngram_context
        while len(self.cache.layers) <= index:
            self.cache.layers.append(DynamicLayer())
        ids = ids[:, None, :, None]
        stored, _ = self.cache.update(ids, ids, index)
        return F.pad(stored[:, 0, :, 0], (context, 0))[:, -(context + ids.size(2)) :]


class Layer(NamedTuple):
    """Adapts one layer of the cache to the interface of `LayerCache`."""

    cache: Cache
    layer: int

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values, (B, H, T, D) each; returns all, (B, H, S, D) each."""
        return self.cache.update(k, v, self.layer)
