"""Conversion to GPT-2 or GPT-NeoX, two architectures that Transformers implements.

They compute the same function once weights are renamed and reordered: GPT-2 (Radford et al. 2019)
with learned positions, GPT-NeoX (Black et al. 2022, arXiv:2204.06745) with rotary positions. Both
have LayerNorms with gain and bias, and a bias in every linear layer except the head.
"""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from chargpt.export.comparison import same_logits
from chargpt.model import GPT, GPTConfig

# The settings that both architectures have, and the activations that Transformers has.
SHARED = {"block_size", "n_embd", "n_head", "n_layer"}
SHARED |= {"dropout", "attention_dropout", "position", "activation"}
ACTIVATIONS = ("relu", "gelu", "relu2")


def convert(gpt: GPT) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """config.json and weights of the equivalent architecture; None if there is none."""
    general = with_layer_norms_and_biases(gpt)
    if general is None or not same_logits(general, gpt):
        return None
    dropout, attention_dropout = gpt.config.dropout, gpt.config.attention_dropout
    shared = {
        "vocab_size": gpt.token_embedding.num_embeddings,
        "layer_norm_epsilon": general.norm.eps,
        "layer_norm_eps": general.norm.eps,
        "tie_word_embeddings": False,
        "bos_token_id": None,  # tokens are characters; there are no special tokens
        "eos_token_id": None,
        "dtype": "float32",
        "torch_dtype": "float32",  # its name before transformers 4.56
    }
    attention_dropout = dropout if attention_dropout is None else attention_dropout
    architecture = gpt2 if gpt.config.position == "learned" else gpt_neox
    config, weights = architecture(gpt.config, general.state_dict(), attention_dropout)
    return config | shared, weights


@torch.no_grad()
def with_layer_norms_and_biases(gpt: GPT) -> GPT | None:
    """The network with norm "layer" and with all biases except the head's.

    None if it has no counterpart for a weight of `gpt`. Otherwise its logits may still differ,
    for example if the norms of `gpt` are not LayerNorms.
    """
    settings = {name: value for name, value in asdict(gpt.config).items() if name in SHARED}
    if settings["activation"] not in ACTIVATIONS:
        return None
    general = GPT(GPTConfig(**settings, norm="layer", qkv_bias=True), len(gpt.head.weight)).eval()
    weights = {name: weight.float() for name, weight in gpt.state_dict().items()}
    if weights.keys() - general.state_dict().keys() or type(general.norm) is not nn.LayerNorm:
        return None
    try:
        general.load_state_dict(weights, strict=False)  # gains stay 1 and biases 0
    except RuntimeError:  # different shapes
        return None
    if gpt.embedding_norm is not None:  # fold the norm on the embeddings into the table
        general.token_embedding.weight.copy_(gpt.embedding_norm(gpt.token_embedding.weight))
    # The head's bias b becomes part of the last norm's, as d with W d = b: W (x + d) = W x + b.
    # Such a d exists if the V rows of W, with C channels each, are linearly independent.
    W, b = general.head.weight.double(), general.head.bias.double()[:, None]
    general.norm.bias.add_(torch.linalg.lstsq(W, b, driver="gelsd").solution[:, 0])
    general.head.bias.zero_()
    return general


def gpt2(
    config: GPTConfig, weights: dict[str, Tensor], attention_dropout: float
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """GPT2LMHeadModel, whose linear layers store transposed weights ("Conv1D")."""
    document = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "activation_function": config.activation,
        "resid_pdrop": config.dropout,
        "embd_pdrop": 0.0,
        "attn_pdrop": attention_dropout,
    }
    names = {
        "token_embedding": "transformer.wte",
        "position_embedding": "transformer.wpe",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    }
    parts = {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.projection": "attn.c_proj",
        "feed_forward_norm": "ln_2",
        "feed_forward.expansion": "mlp.c_fc",
        "feed_forward.projection": "mlp.c_proj",
    }
    for i in range(config.n_layer):
        names |= {f"blocks.{i}.{name}": f"transformer.h.{i}.{hf}" for name, hf in parts.items()}
    transposed = {
        name: weight.T if name.startswith("blocks.") and weight.dim() > 1 else weight
        for name, weight in weights.items()
    }
    return document, rename(transposed, names)


def gpt_neox(
    config: GPTConfig, weights: dict[str, Tensor], attention_dropout: float
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """GPTNeoXForCausalLM with `rotary_pct` 1 and sequential attention and feed-forward layers."""
    rotary = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
    document = {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "max_position_embeddings": config.block_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "hidden_act": config.activation,
        "hidden_dropout": config.dropout,
        "attention_dropout": attention_dropout,
        "attention_bias": True,
        "use_parallel_residual": False,
        "rope_parameters": rotary,
        "rotary_pct": 1.0,  # this and the next are the names before transformers 5
        "rotary_emb_base": 10_000.0,
    }
    names = {
        "token_embedding": "gpt_neox.embed_in",
        "norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
    }
    parts = {
        "attention_norm": "input_layernorm",
        "attention.qkv": "attention.query_key_value",
        "attention.projection": "attention.dense",
        "feed_forward_norm": "post_attention_layernorm",
        "feed_forward.expansion": "mlp.dense_h_to_4h",
        "feed_forward.projection": "mlp.dense_4h_to_h",
    }
    for i in range(config.n_layer):
        names |= {f"blocks.{i}.{name}": f"gpt_neox.layers.{i}.{hf}" for name, hf in parts.items()}
    grouped = {
        name: group_by_head(weight, config) if ".qkv." in name else weight
        for name, weight in weights.items()
    }
    return document, rename(grouped, names)


def group_by_head(rows: Tensor, config: GPTConfig) -> Tensor:
    """Reorder the rows of the qkv matrix, (3C, ...), to GPT-NeoX's order: grouped by head.

    GPT-NeoX rotates channel i with channel i + D / 2, while we rotate adjacent channels. So the
    rows of queries and keys become 0, 2, 4, ..., 1, 3, 5, ..., which no dot product depends on.
    """
    q, k, v = rows.unflatten(0, (3, config.n_head, config.head_size)).unbind()  # (H, D, ...) each
    q, k = (torch.cat((x[:, 0::2], x[:, 1::2]), dim=1) for x in (q, k))
    return torch.stack((q, k, v), dim=1).flatten(0, 2)


def rename(weights: dict[str, Tensor], modules: dict[str, str]) -> dict[str, Tensor]:
    """The weights with their modules renamed, without the head's bias, which is zero."""
    renamed = {}
    for name, weight in weights.items():
        module, _, parameter = name.rpartition(".")
        if name != "head.bias":
            renamed[f"{modules[module]}.{parameter}"] = weight
    return renamed
