"""The configuration of a chargpt network for Transformers."""

from typing import Any

from transformers import PretrainedConfig


class ChargptConfig(PretrainedConfig):
    """`network` has the fields of `GPTConfig` in config.py; the rest is for Transformers."""

    model_type = "chargpt"

    def __init__(
        self, network: dict[str, Any] | None = None, vocab_size: int = 1, **kwargs: Any
    ) -> None:
        self.network = network or {}
        self.vocab_size = vocab_size
        super().__init__(**kwargs)

    # The standard names of a network's sizes.

    @property
    def hidden_size(self) -> int:
        return self.network["n_embd"]

    @property
    def num_hidden_layers(self) -> int:
        return self.network["n_layer"]

    @property
    def num_attention_heads(self) -> int:
        return self.network["n_head"]

    @property
    def max_position_embeddings(self) -> int:
        return self.network["block_size"]
