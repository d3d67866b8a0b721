"""A folder for Hugging Face transformers, which load it with no code of ours.

    AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

Two architectures of theirs compute what ours computes, once weights are renamed and reordered:
GPT-2 (Radford et al. 2019) with learned positions, GPT-NeoX (Black et al. 2022, arXiv:2204.06745)
with rotary ones. Whatever neither can hold is refused.
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
from chargpt.generation import GenerationConfig
from chargpt.model import GPT, GPTConfig
from chargpt.text_generator import TextGenerator
from chargpt.vocabulary import Vocabulary

# The settings that both architectures are told about, or hold in their weights.
HELD = {"block_size", "n_embd", "n_head", "n_layer", "dropout", "attention_dropout", "position"}
HELD |= {"norm", "bias", "qkv_bias", "activation", "zero_init", "ngram_dropout"}


class ExportError(ValueError):
    """No architecture of transformers can hold this network."""


def export(generator: TextGenerator, checkpoint: dict[str, Any], output: Path, dtype: str) -> None:
    """Write the network, its vocabulary and what is known of its training into a folder.

    Args:
        generator: the network and its vocabulary.
        checkpoint: where they come from, as it was read; the model card tells what it holds.
        output: the folder to make. It may exist if it is empty; it comes whole or not at all.
        dtype: of a page's weights. These are always float32, so that logits are exactly ours;
            `from_pretrained(folder, dtype="float16")` makes them smaller.

    Raises:
        ExportError: no architecture there can hold the network; the message says what to train.
        OSError: the folder holds something, is a file, or cannot be written.
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
    with whole_folder(output) as folder:
        for name, document in documents.items():
            text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
        card = model_card(generator, checkpoint)
        (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")
        write_safetensors(folder / "model.safetensors", weights)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when all went well and else leaves nothing.

    Raises:
        FileExistsError: `path` is a file, or a folder that holds something.
    """
    if path.is_dir():
        if any(path.iterdir()):
            raise FileExistsError(f"{path} holds files already; name another folder, or empty it")
    elif path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} is a file; name a folder")
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
    """The configuration and the weights of the architecture that computes what `gpt` computes."""
    ours, V = gpt.config, gpt.token_embedding.num_embeddings
    if ours.ngrams:
        raise ExportError(
            "no architecture in transformers has n-gram tables (ngrams)\n"
            "train with --model.ngrams null, or export --to page"
        )
    if ours.position == "learned" and ours.norm == "plain":
        raise ExportError(
            "no architecture in transformers has learned positions and a norm on the embeddings\n"
            "train with --model.position rotary or --model.norm layer, or export --to page"
        )
    for field in fields(GPTConfig):  # a setting that has come since must not be lost silently
        if field.name not in HELD and getattr(ours, field.name) != field.default:
            raise ExportError(
                f"no architecture in transformers is known for {field.name} "
                f"{getattr(ours, field.name)}\ntrain with {field.name} {field.default}"
            )
    if ours.attention_dropout is None:
        attention_dropout = ours.dropout
    else:
        attention_dropout = ours.attention_dropout
    shared = {
        "vocab_size": V,
        "layer_norm_epsilon": gpt.norm.eps,
        "layer_norm_eps": gpt.norm.eps,
        "tie_word_embeddings": False,
        "bos_token_id": None,  # a character is a token, and there are no others
        "eos_token_id": None,
        "dtype": "float32",
        "torch_dtype": "float32",  # its name before transformers 4.56
    }
    weights = {name: weight.detach().float() for name, weight in gpt.state_dict().items()}
    if ours.position == "learned":
        return gpt2(ours, weights, shared, attention_dropout)
    return gpt_neox(ours, weights, shared, attention_dropout)


def gpt2(
    ours: GPTConfig, weights: dict[str, Tensor], shared: dict[str, Any], attention_dropout: float
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """GPT2LMHeadModel, whose linear layers hold their weights transposed ("Conv1D")."""
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_positions": ours.block_size,
        "n_embd": ours.n_embd,
        "n_layer": ours.n_layer,
        "n_head": ours.n_head,
        "activation_function": ours.activation,
        "resid_pdrop": ours.dropout,
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
    theirs = {
        "transformer.wte.weight": weights["token_embedding.weight"],
        "transformer.wpe.weight": weights["position_embedding.weight"],
    }
    for i in range(ours.n_layer):
        for name, their_name in names.items():
            weight, bias = weight_and_bias(weights, f"blocks.{i}.{name}", ours)
            theirs[f"transformer.h.{i}.{their_name}.weight"] = (
                weight.T if weight.dim() > 1 else weight
            )
            theirs[f"transformer.h.{i}.{their_name}.bias"] = bias
    return config, theirs | head(weights, ours, "transformer.ln_f", "lm_head")


def gpt_neox(
    ours: GPTConfig, weights: dict[str, Tensor], shared: dict[str, Any], attention_dropout: float
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """GPTNeoXForCausalLM, with `rotary_pct` 1 and attention before the feed-forward layers."""
    with_bias = ours.bias or ours.qkv_bias
    rotary = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
    config = {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "max_position_embeddings": ours.block_size,
        "hidden_size": ours.n_embd,
        "intermediate_size": 4 * ours.n_embd,
        "num_hidden_layers": ours.n_layer,
        "num_attention_heads": ours.n_head,
        "hidden_act": ours.activation,
        "hidden_dropout": ours.dropout,
        "attention_dropout": attention_dropout,
        "attention_bias": with_bias,
        "use_parallel_residual": False,
        "rope_parameters": rotary,
        "rotary_pct": 1.0,  # the two names before transformers 5
        "rotary_emb_base": 10_000.0,
        **shared,
    }
    embedding = weights["token_embedding.weight"]
    if ours.norm == "plain":  # on the embeddings as well, where it depends on the character alone
        embedding = F.layer_norm(embedding, (ours.n_embd,), eps=shared["layer_norm_eps"])
    names = {
        "attention_norm": "input_layernorm",
        "attention.projection": "attention.dense",
        "feed_forward_norm": "post_attention_layernorm",
        "feed_forward.expansion": "mlp.dense_h_to_4h",
        "feed_forward.projection": "mlp.dense_4h_to_h",
        "attention.qkv": "attention.query_key_value",
    }
    theirs = {"gpt_neox.embed_in.weight": embedding}
    for i in range(ours.n_layer):
        for name, their_name in names.items():
            weight, bias = weight_and_bias(weights, f"blocks.{i}.{name}", ours)
            if name == "attention.qkv":
                weight, bias = by_head(weight, ours), by_head(bias, ours)
            theirs[f"gpt_neox.layers.{i}.{their_name}.weight"] = weight
            if with_bias or not name.startswith("attention."):
                theirs[f"gpt_neox.layers.{i}.{their_name}.bias"] = bias
    return config, theirs | head(weights, ours, "gpt_neox.final_layer_norm", "embed_out")


def by_head(rows: Tensor, ours: GPTConfig) -> Tensor:
    """The rows of query, key and value, (3C, ...), head by head, as GPT-NeoX has them.

    Its rotary positions rotate channel i with channel i + D / 2; ours are neighbors. So the rows
    of queries and keys become 0, 2, 4, ..., 1, 3, 5, ...: a dot product does not see the order.
    """
    q, k, v = rows.unflatten(0, (3, ours.n_head, ours.head_size)).unbind()  # (H, D, ...) each
    q, k = (torch.cat((x[:, 0::2], x[:, 1::2]), dim=1) for x in (q, k))
    return torch.stack((q, k, v), dim=1).flatten(0, 2)


def weight_and_bias(
    weights: dict[str, Tensor], name: str, ours: GPTConfig
) -> tuple[Tensor, Tensor]:
    """Copies of a layer's weight and bias; a norm without has gains of one, biases are zero."""
    weight = weights.get(f"{name}.weight", torch.ones(ours.n_embd)).clone()
    bias = weights.get(f"{name}.bias", torch.zeros(len(weight))).clone()
    return weight, bias


def head(
    weights: dict[str, Tensor], ours: GPTConfig, norm_name: str, head_name: str
) -> dict[str, Tensor]:
    """The last norm and the head, which has no bias there: W (x + d) = W x + b where W d = b.

    There is such a d as long as the V rows of W, of C channels each, are independent.
    """
    gain, norm_bias = weight_and_bias(weights, "norm", ours)
    weight, bias = weight_and_bias(weights, "head", ours)
    if bias.any():
        shift = torch.linalg.lstsq(weight.double(), bias.double()[:, None], driver="gelsd").solution
        norm_bias += shift[:, 0]
        if (weight @ shift[:, 0].float() - bias).abs().max() > 1e-5:
            raise ExportError(
                f"the bias of the head does not fit into {ours.n_embd} channels for {len(bias)} "
                "characters, and transformers have no place for it\n"
                f"train with --model.bias false, or --model.n_embd of {len(bias)} or more"
            )
    return {
        f"{norm_name}.weight": gain,
        f"{norm_name}.bias": norm_bias,
        f"{head_name}.weight": weight,
    }


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """The format of weights: the length of a header, the header (JSON), the numbers.

    https://huggingface.co/docs/safetensors: little-endian, without gaps, row by row.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().numpy().astype("<f4", copy=False).data)


# ---- what surrounds it ----


def tokenizer(vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer.json of the library `tokenizers`: each character a word, and nothing normalised.

    There is no token for unknown characters: one that is not in the vocabulary is an error.
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
            "unk_token": "[unknown character]",  # which is not in it
        },
    }


def generation_config(ours: GPTConfig) -> dict[str, Any]:
    """Sampling as here. A prompt of half a block still has room: past its positions GPT-2 fails."""
    return {
        "do_sample": True,
        "temperature": GenerationConfig.temperature,
        "top_k": 0,  # all characters
        "max_new_tokens": max(1, ours.block_size // 2),
        "bos_token_id": None,
        "eos_token_id": None,
    }


def model_card(generator: TextGenerator, checkpoint: dict[str, Any]) -> str:
    """README.md of the folder: what was trained on what, how, and how good it is."""
    gpt = generator.gpt
    B, V = gpt.config.block_size, len(generator.vocabulary)
    corpus, trained = how_it_was_trained(checkpoint)
    parameters = sum(parameter.numel() for parameter in gpt.parameters())
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags: [character-level, chargpt]
---

# A character-level GPT of {corpus}

A decoder-only transformer that predicts the next character: {parameters:,} parameters, {V}
characters, at most {B} of context. Exported by chargpt {chargpt.__version__}; transformers load it
with no further code.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
prompt = tokenizer({json.dumps(generator.opening)}, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt)[0]))
```

A token is a character, and there is none that begins or ends a text: a prompt has at least one
character, and a character that the network has never seen is an error. Prompt and text together
must not be longer than {B} characters.

{trained}"""


def how_it_was_trained(checkpoint: dict[str, Any]) -> tuple[str, str]:
    """The name of the corpus, and two sections of the model card, as far as is known."""
    model, data = checkpoint["hyper_parameters"], checkpoint["datamodule_hyper_parameters"]
    name = str(data.get("corpus_name") or data.get("corpus") or "an unknown text")
    path, step = Path(name.replace("\\", "/").removesuffix("/input.txt")), checkpoint["global_step"]
    corpus = path.name  # no folder of the machine it was trained on
    if origin := checkpoint.get("origin"):
        return corpus, f"## Training\n\n{origin}\n"
    linked = {"block_size", "seed", "_instantiator"}
    places = {"data_dir", "fallback_corpus", "corpus_name"}  # of the machine it was trained on
    settings = {
        "seed_everything": model.get("seed"),
        "model": {name: value for name, value in model.items() if name not in linked},
        "data": {k: v for k, v in data.items() if k not in (linked - {"block_size"}) | places},
    }
    settings["data"]["corpus"] = corpus
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return (
        corpus,
        f"""\
## Training

{step:,} steps on {corpus}, with these settings in a file `settings.yaml`:

    chargpt fit --config settings.yaml --trainer.max_steps {step}

```yaml
{text}```

The settings of the trainer (precision, devices, a limit of time) are not in a checkpoint, and
not here.

## Loss

{loss_of(checkpoint)}
""",
    )


def loss_of(checkpoint: dict[str, Any]) -> str:
    """The validation loss of exactly these weights, if they have been validated."""
    states = (checkpoint.get("callbacks") or {}).values()
    scores = [s.get("current_score") for s in states if s.get("monitor") == "val_loss"]
    whole = checkpoint.get("limit_val_batches", 1.0) == 1.0
    validated = checkpoint.get("validated_step") == checkpoint["global_step"]
    if not (scores and scores[0] is not None and validated and whole):
        return "These weights were not validated before they were saved."
    loss = float(scores[0])
    return f"""\
Validation loss: **{loss:.4f}** nats per character ({loss / math.log(2):.4f} bits), the mean over
the whole validation split: every character of it but the first is predicted exactly once, in
consecutive blocks of block_size characters, without dropout. The split is the share
`val_fraction` of the text, after the part to train on."""
