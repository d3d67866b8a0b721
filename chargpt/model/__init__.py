"""The network, a decoder-only transformer over characters, in files that need torch alone."""

from .config import GPTConfig, UserError
from .gpt import GPT
from .kv_cache import KVCache

__all__ = ["GPT", "GPTConfig", "KVCache", "UserError"]
