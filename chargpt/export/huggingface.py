"""Export to a folder that Hugging Face transformers load without additional code.

    AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

Two transformers architectures compute the same function once weights are renamed and reordered:
GPT-2 (Radford et al. 2019) for learned positions and GPT-NeoX (Black et al. 2022, arXiv:2204.06745)
for rotary positions. Networks that neither can represent are refused.
"""

import json
import math
import shutil
import struct
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

import chargpt
from chargpt.checkpoints import validation_loss
from chargpt.generation import GenerationConfig
from chargpt.model import GPT, GPTConfig, UserError
from chargpt.text_generator import TextGenerator
from chargpt.vocabulary import Vocabulary

# The settings that both architectures represent, in their configuration or their weights.
REPRESENTABLE = {"block_size", "n_embd", "n_head", "n_layer", "dropout", "attention_dropout"}
REPRESENTABLE |= {"position", "norm", "bias", "qkv_bias", "activation", "ngram_dropout"}


def export(generator: TextGenerator, checkpoint: dict[str, Any], output: Path, dtype: str) -> None:
    """Write the network, its vocabulary and a model card to a folder.

    Args:
        generator: the network and its vocabulary.
        checkpoint: the checkpoint they were loaded from, for the model card.
        output: the folder to create, atomically. It may exist if it is empty.
        dtype: ignored here; it applies to pages. Weights are float32, so that logits are the same;
            use `from_pretrained(folder, dtype="float16")` to load smaller ones.

    Raises:
        UserError: no architecture can represent the network, or the folder is not empty.
        OSError: the folder cannot be written.
    """
    gpt, vocabulary = generator.gpt, generator.vocabulary
    config, weights = architecture(gpt)
    documents = {
        "config.json": config,
        "generation_config.json": generation_config(gpt.config),
        "tokenizer.json": tokenizer(vocabulary),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": gpt.config.block_size,
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
        },
    }
    with atomic_folder(output) as folder:
        for name, document in documents.items():
            text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
        card = model_card(generator, checkpoint)
        (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")
        write_safetensors(folder / "model.safetensors", weights)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `path` on success and deleted on failure.

    Raises:
        UserError: `path` is a file, or a folder that is not empty.
    """
    if path.is_dir():
        if any(path.iterdir()):
            raise UserError(f"{path} is not empty; use a new or an empty folder")
    elif path.exists() or path.is_symlink():
        raise UserError(f"{path} is a file, not a folder; use a new or an empty folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if path.is_dir():
            path.rmdir()  # empty: renaming onto a folder is an error on Windows
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- the network ----


def architecture(gpt: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and weights of the transformers architecture equivalent to `gpt`."""
    config, V = gpt.config, gpt.token_embedding.num_embeddings
    if config.ngrams:
        raise UserError(
            "no transformers architecture has n-gram tables (ngrams)\n"
            "train with --model.ngrams null, or export --to page"
        )
    if config.position == "learned" and config.norm == "plain":
        raise UserError(
            "no transformers architecture has both learned positions and a norm on the embeddings\n"
            "train with --model.position rotary or --model.norm layer, or export --to page"
        )
    for field in fields(GPTConfig):  # settings added later must not be lost silently
        if field.name not in REPRESENTABLE and getattr(config, field.name) != field.default:
            raise UserError(
                f"cannot export {field.name} {getattr(config, field.name)} to transformers\n"
                f"train with {field.name} {field.default}, or export --to page"
            )
    if config.attention_dropout is None:
        attention_dropout = config.dropout
    else:
        attention_dropout = config.attention_dropout
    shared = {
        "vocab_size": V,
        "layer_norm_epsilon": gpt.norm.eps,
        "layer_norm_eps": gpt.norm.eps,
        "tie_word_embeddings": False,
        "bos_token_id": None,  # tokens are characters; there are no special tokens
        "eos_token_id": None,
        "dtype": "float32",
        "torch_dtype": "float32",  # its name before transformers 4.56
    }
    weights = {name: weight.detach().float() for name, weight in gpt.state_dict().items()}
    convert = gpt2 if config.position == "learned" else gpt_neox
    return convert(config, weights, shared, attention_dropout)


def gpt2(
    config: GPTConfig, weights: dict[str, Tensor], shared: dict[str, Any], attention_dropout: float
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
        **shared,
    }
    names = {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.projection": "attn.c_proj",
        "feed_forward_norm": "ln_2",
        "feed_forward.expansion": "mlp.c_fc",
        "feed_forward.projection": "mlp.c_proj",
    }
    converted = {
        "transformer.wte.weight": weights["token_embedding.weight"],
        "transformer.wpe.weight": weights["position_embedding.weight"],
    }
    for i in range(config.n_layer):
        for name, hf_name in names.items():
            weight, bias = weight_and_bias(weights, f"blocks.{i}.{name}", config)
            converted[f"transformer.h.{i}.{hf_name}.weight"] = (
                weight.T if weight.dim() > 1 else weight
            )
            converted[f"transformer.h.{i}.{hf_name}.bias"] = bias
    return document, converted | head(weights, config, "transformer.ln_f", "lm_head")


def gpt_neox(
    config: GPTConfig, weights: dict[str, Tensor], shared: dict[str, Any], attention_dropout: float
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """GPTNeoXForCausalLM with `rotary_pct` 1 and sequential attention and feed-forward layers."""
    with_bias = config.bias or config.qkv_bias
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
        "attention_bias": with_bias,
        "use_parallel_residual": False,
        "rope_parameters": rotary,
        "rotary_pct": 1.0,  # this and the next are the names before transformers 5
        "rotary_emb_base": 10_000.0,
        **shared,
    }
    embedding = weights["token_embedding.weight"]
    if config.norm == "plain":  # fold the norm on the embeddings into the table
        embedding = F.layer_norm(embedding, (config.n_embd,), eps=shared["layer_norm_eps"])
    names = {
        "attention_norm": "input_layernorm",
        "attention.projection": "attention.dense",
        "feed_forward_norm": "post_attention_layernorm",
        "feed_forward.expansion": "mlp.dense_h_to_4h",
        "feed_forward.projection": "mlp.dense_4h_to_h",
        "attention.qkv": "attention.query_key_value",
    }
    converted = {"gpt_neox.embed_in.weight": embedding}
    for i in range(config.n_layer):
        for name, hf_name in names.items():
            weight, bias = weight_and_bias(weights, f"blocks.{i}.{name}", config)
            if name == "attention.qkv":
                weight, bias = group_by_head(weight, config), group_by_head(bias, config)
            converted[f"gpt_neox.layers.{i}.{hf_name}.weight"] = weight
            if with_bias or not name.startswith("attention."):
                converted[f"gpt_neox.layers.{i}.{hf_name}.bias"] = bias
    return document, converted | head(weights, config, "gpt_neox.final_layer_norm", "embed_out")


def group_by_head(rows: Tensor, config: GPTConfig) -> Tensor:
    """Reorder the rows of the qkv matrix, (3C, ...), to GPT-NeoX's order: grouped by head.

    GPT-NeoX rotates channel i with channel i + D / 2, while we rotate adjacent channels. So the
    rows of queries and keys become 0, 2, 4, ..., 1, 3, 5, ..., which no dot product depends on.
    """
    q, k, v = rows.unflatten(0, (3, config.n_head, config.head_size)).unbind()  # (H, D, ...) each
    q, k = (torch.cat((x[:, 0::2], x[:, 1::2]), dim=1) for x in (q, k))
    return torch.stack((q, k, v), dim=1).flatten(0, 2)


def weight_and_bias(
    weights: dict[str, Tensor], name: str, config: GPTConfig
) -> tuple[Tensor, Tensor]:
    """Copies of a layer's weight and bias; a missing norm gain is ones, a missing bias zeros."""
    weight = weights.get(f"{name}.weight", torch.ones(config.n_embd)).clone()
    bias = weights.get(f"{name}.bias", torch.zeros(len(weight))).clone()
    return weight, bias


def head(
    weights: dict[str, Tensor], config: GPTConfig, norm_name: str, head_name: str
) -> dict[str, Tensor]:
    """The final norm and the head, which has no bias in transformers.

    The head's bias b is moved to the norm's bias as d with W d = b, so W (x + d) = W x + b. Such
    a d exists if the V rows of W, with C channels each, are linearly independent.
    """
    gain, norm_bias = weight_and_bias(weights, "norm", config)
    weight, bias = weight_and_bias(weights, "head", config)
    if bias.any():
        shift = torch.linalg.lstsq(weight.double(), bias.double()[:, None], driver="gelsd").solution
        norm_bias += shift[:, 0]
        if (weight @ shift[:, 0].float() - bias).abs().max() > 1e-5:
            raise UserError(
                f"the head's bias cannot be exported: n_embd is {config.n_embd}, fewer than the "
                f"{len(bias)} characters\n"
                f"train with --model.bias false, or --model.n_embd of {len(bias)} or more"
            )
    return {
        f"{norm_name}.weight": gain,
        f"{norm_name}.bias": norm_bias,
        f"{head_name}.weight": weight,
    }


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file: the header's length, the header (JSON), the tensors.

    Little-endian, row-major, without gaps: https://huggingface.co/docs/safetensors
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # align the tensors
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().numpy().astype("<f4", copy=False).data)


# ---- tokenizer, generation settings, model card ----


def tokenizer(vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer.json of the `tokenizers` library: one token per character, no normalization.

    There is no unknown token: a character that is not in the vocabulary is an error.
    """
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"[\s\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {character: id for id, character in enumerate(vocabulary.characters)},
            "unk_token": "[unknown character]",  # required, but not in the vocabulary
        },
    }


def generation_config(config: GPTConfig) -> dict[str, Any]:
    """Our sampling defaults. Half the context is left for the prompt: GPT-2 fails beyond it."""
    return {
        "do_sample": True,
        "temperature": GenerationConfig.temperature,
        "top_k": 0,  # all characters
        "max_new_tokens": max(1, config.block_size // 2),
        "bos_token_id": None,
        "eos_token_id": None,
    }


def model_card(generator: TextGenerator, checkpoint: dict[str, Any]) -> str:
    """README.md of the folder: the model, its training and its loss."""
    gpt = generator.gpt
    T, V = gpt.config.block_size, len(generator.vocabulary)
    corpus, training = describe_training(checkpoint)
    parameters = sum(parameter.numel() for parameter in gpt.parameters())
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags: [character-level, chargpt]
---

# A character-level GPT trained on {corpus}

A decoder-only transformer that predicts the next character: {parameters:,} parameters, a vocabulary
of {V} characters and a context of {T}. Exported by chargpt {chargpt.__version__}; transformers load
it without additional code.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
prompt = tokenizer({json.dumps(generator.opening)}, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt)[0]))
```

Each token is one character, and there are no special tokens. A prompt needs at least one character,
and a character that is not in the vocabulary is an error. Prompt and generated text together can
have at most {T} characters.

{training}"""


def describe_training(checkpoint: dict[str, Any]) -> tuple[str, str]:
    """The name of the corpus, and the sections of the model card on training and loss."""
    model, data = checkpoint["hyper_parameters"], checkpoint["datamodule_hyper_parameters"]
    name = str(data.get("corpus_name") or data.get("corpus") or "an unknown text")
    path, step = Path(name.replace("\\", "/").removesuffix("/input.txt")), checkpoint["global_step"]
    corpus = path.name  # without its folder, which is private
    if origin := checkpoint.get("origin"):
        return corpus, f"## Training\n\n{origin}\n"
    linked = {"block_size", "seed", "_instantiator"}
    local = {"data_dir", "fallback_corpus", "corpus_name"}  # specific to the training machine
    local |= {"corpus_digest", "corpus_bytes", "train_characters"}  # found out by `fit`
    settings = {
        "seed_everything": model.get("seed"),
        "model": {name: value for name, value in model.items() if name not in linked},
        "data": {k: v for k, v in data.items() if k not in (linked - {"block_size"}) | local},
    }
    settings["data"]["corpus"] = corpus
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return (
        corpus,
        f"""\
## Training

{step:,} steps on {corpus}, with these settings in `settings.yaml`:

    chargpt fit --config settings.yaml --trainer.max_steps {step}

```yaml
{text}```

Trainer settings (precision, devices, time limits) are not included.

## Loss

{describe_loss(checkpoint)}
""",
    )


def describe_loss(checkpoint: dict[str, Any]) -> str:
    """The validation loss of these exact weights, if they have been validated."""
    loss = validation_loss(checkpoint)
    if loss is None:
        return "These weights were not validated before they were saved."
    return f"""\
Validation loss: **{loss:.4f}** nats per character ({loss / math.log(2):.4f} bits), the mean over
the whole validation split: every character but the first is predicted exactly once, in consecutive
sequences of block_size characters, without dropout. The split is the fraction `val_fraction` of the
text that follows the training split."""
