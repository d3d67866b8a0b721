"""The network: a decoder-only transformer over characters."""

from .errors import UserError
from .gpt import GPT, GPTConfig, KVCache

__all__ = ["GPT", "GPTConfig", "KVCache", "UserError"]
