"""Import of nanoGPT checkpoints (https://github.com/karpathy/nanoGPT, `ckpt.pt` and `meta.pkl`).

nanoGPT's network is ours with GELU and other layer names, so the import is exact, with and without
biases. Only continued training differs: nanoGPT ties the head to the token embedding and also
applies dropout to the embeddings.
"""

import hashlib
import pickle
import re
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from chargpt.checkpoints import build_network, checkpoint_of
from chargpt.model import GPT, GPTConfig, UserError
from chargpt.vocabulary import Vocabulary

NAMES = (  # nanoGPT's prefixes and ours; the rest of a name is the same
    (r"^transformer\.wte\.", "token_embedding."),
    (r"^transformer\.wpe\.", "position_embedding."),
    (r"^transformer\.h\.(\d+)\.ln_1\.", r"blocks.\1.attention_norm."),
    (r"^transformer\.h\.(\d+)\.attn\.c_attn\.", r"blocks.\1.attention.qkv."),
    (r"^transformer\.h\.(\d+)\.attn\.c_proj\.", r"blocks.\1.attention.projection."),
    (r"^transformer\.h\.(\d+)\.ln_2\.", r"blocks.\1.feed_forward_norm."),
    (r"^transformer\.h\.(\d+)\.mlp\.c_fc\.", r"blocks.\1.feed_forward.expansion."),
    (r"^transformer\.h\.(\d+)\.mlp\.c_proj\.", r"blocks.\1.feed_forward.projection."),
    (r"^transformer\.ln_f\.", "norm."),
    (r"^lm_head\.", "head."),
)
MASK = re.compile(r"\.attn\.bias$")  # the causal mask, a buffer that old versions of torch needed
SIZES = ("block_size", "n_layer", "n_head", "n_embd")


def convert(ckpt: Path, meta: Path) -> dict[str, Any]:
    """Convert a nanoGPT checkpoint and its vocabulary to a checkpoint of this package.

    No code from either file is executed.

    Raises:
        UserError: a file is not from nanoGPT, is damaged or contains code, or cannot be converted
            exactly.
    """
    source, characters = read_ckpt(ckpt), read_meta(meta)
    config, weights = convert_network(source, ckpt)
    V = len(weights["token_embedding.weight"])
    if len(characters) != V:
        raise UserError(
            f"{meta} has {len(characters)} characters, but the network in {ckpt} has {V}\n"
            "use the meta.pkl of the dataset that the network was trained on"
        )
    order = sorted(range(V), key=characters.__getitem__)  # our ids are in order of characters
    for name in ("token_embedding.weight", "head.weight"):
        weights[name] = weights[name][order]
    settings, steps = source.get("config"), source.get("iter_num", 0)
    dataset = settings.get("dataset") if isinstance(settings, dict) else None
    checkpoint = checkpoint_of(
        weights,
        config,
        Vocabulary("".join(sorted(characters))),
        datamodule_hyper_parameters=describe_corpus(guess_corpus(dataset, meta)),
        global_step=steps if type(steps) is int else 0,
        origin=f"Trained by nanoGPT for {steps} iterations and imported from its checkpoint.",
    )
    build_network(checkpoint, ckpt)  # check that it can be loaded
    return checkpoint


def convert_network(source: dict[str, Any], ckpt: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The configuration and the weights of nanoGPT's network, under our names."""
    arguments = source["model_args"]
    state = {key.removeprefix("_orig_mod."): w for key, w in source["model"].items()}
    try:
        bias = arguments["bias"]
        sizes = {name: arguments[name] for name in SIZES}
        config = GPTConfig(
            **sizes,
            dropout=float(arguments.get("dropout", 0.0)),
            bias=bias,
            qkv_bias=bias,
            activation="gelu",
        )
        weights = rename_weights(state)
        if config.n_layer > len(weights):
            raise UserError(f"n_layer is {config.n_layer}, but there are weights for fewer layers")
        V, C = weights["token_embedding.weight"].shape
    except KeyError as error:
        raise UserError(f"{ckpt} lacks {error}; it is not a nanoGPT checkpoint") from error
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{ckpt} is inconsistent: {error}") from error
    if bias:
        weights.setdefault("head.bias", torch.zeros(V))  # nanoGPT's head never has a bias
    else:  # LayerNorm without bias is LayerNorm with a bias of zero
        for name in [name for name in weights if name.endswith("norm.weight")]:
            weights.setdefault(name.replace("weight", "bias"), torch.zeros(C))
    check_shapes(config, V, weights, ckpt)
    return config, weights


def read_ckpt(path: Path) -> dict[str, Any]:
    """Read tensors and plain values; a file that contains code is refused."""
    try:
        source = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # zip, pickle and torch each raise their own errors
        raise UserError(
            f"{path} is not a readable checkpoint: it is truncated, damaged, or contains code"
        ) from error
    if not isinstance(source, dict):
        source = {}
    for name in ("model", "model_args"):
        if not isinstance(source.get(name), dict):
            refuse_ckpt(path, f"it has no {name}")
    if not all(isinstance(key, str) for key in source["model"]):
        refuse_ckpt(path, "its weights have no names")
    if not all(isinstance(w, Tensor) and w.is_floating_point() for w in source["model"].values()):
        refuse_ckpt(path, "its weights are not floating-point tensors")
    return source


def refuse_ckpt(path: Path, reason: str) -> NoReturn:
    raise UserError(f"{path} is not a nanoGPT checkpoint: {reason}")


class PlainUnpickler(pickle.Unpickler):
    """An unpickler for plain values that imports nothing, so that no code can run."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it contains code ({module}.{name})")


def read_meta(path: Path) -> list[str]:
    """The characters of a meta.pkl, in the order of their ids."""
    try:
        with open(path, "rb") as file:
            meta = PlainUnpickler(file).load()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error) if isinstance(error, pickle.UnpicklingError) else "it is damaged"
        raise UserError(f"{path} cannot be read as plain values: {reason}") from error
    itos = meta.get("itos") if isinstance(meta, dict) else None
    if isinstance(itos, dict) and itos.keys() == set(range(len(itos))):
        itos = [itos[id] for id in range(len(itos))]
    if not (isinstance(itos, list) and itos and all(isinstance(c, str) for c in itos)):
        raise UserError(
            f"{path} has no characters (itos, by id): it is not a meta.pkl written by nanoGPT"
        )
    if any(len(c) != 1 for c in itos) or len(set(itos)) != len(itos):
        raise UserError(f"{path} has tokens that are not single, distinct characters")
    return itos


def rename_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under our names, in float32 (exact for float16 and bfloat16 too)."""
    weights = {}
    for key, weight in state.items():
        if MASK.search(key):
            continue
        name = key
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        if name == key:
            raise ValueError(f"nanoGPT's network has no weight {key[:80]!r}")
        weights[name] = weight.float()
    return weights


def check_shapes(config: GPTConfig, V: int, weights: dict[str, Tensor], path: Path) -> None:
    """Raise if weights are missing, unexpected, or of a different shape than `config` requires."""
    try:
        with torch.device("meta"):  # no memory, no random numbers
            expected = {name: w.shape for name, w in GPT(config, V).state_dict().items()}
    except (RuntimeError, TypeError):
        refuse_ckpt(path, "the sizes in its model_args are too large")
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            refuse_ckpt(path, f"the weight {name} (our name) is missing")
        if name not in expected:
            refuse_ckpt(path, f"the weight {name} (our name) does not match its model_args")
        if weights[name].shape != expected[name]:
            refuse_ckpt(
                path,
                f"the weight {name} (our name) has shape {tuple(weights[name].shape)}, "
                f"expected {tuple(expected[name])}",
            )


def describe_corpus(corpus: str) -> dict[str, Any]:
    """The corpus as a checkpoint records it, which is how `validate` recognizes it."""
    path = Path(corpus)
    if not path.is_file():
        return {"corpus": corpus}
    data = path.read_bytes()
    digest, train_characters = hashlib.sha256(data).hexdigest(), 0  # nanoGPT does not record it
    record = dict(corpus_bytes=len(data), corpus_digest=digest, train_characters=train_characters)
    return {"corpus": corpus, **record}


def guess_corpus(dataset: object, meta: Path) -> str:
    """The corpus as far as it is known: next to meta.pkl, where nanoGPT's scripts store it.

    Otherwise a name: ours for the same text, or nanoGPT's dataset name.
    """
    text = meta.absolute().with_name("input.txt")
    if text.is_file():
        return str(text)
    if dataset == "shakespeare_char":
        return "tiny-shakespeare"
    return dataset if isinstance(dataset, str) and dataset else "an unknown text"
