"""nanoGPT's checkpoints become ours: https://github.com/karpathy/nanoGPT, `ckpt.pt` and `meta.pkl`.

Its network is ours with GELU: layers have other names and the same weights. So what is imported is
exact, with and without biases. What differs shows in training on alone: there the head shares the
weights of the token embedding, and dropout is applied to the embeddings as well.
"""

import pickle
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from chargpt.checkpoints import check_sizes, network_of
from chargpt.model import GPT, GPTConfig

NAMES = (  # of layers there and here; what is left of a name is the same
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
MASK = re.compile(r"\.attn\.bias$")  # the causal mask, which old versions of torch needed
SIZES = ("block_size", "n_layer", "n_head", "n_embd")


class ImportFailed(ValueError):
    """A file is not of nanoGPT, is damaged or holds code, or something in it cannot be held."""


def checkpoint_of(ckpt: Path, meta: Path) -> dict[str, Any]:
    """A checkpoint of ours with the network, the vocabulary and the corpus of a nanoGPT run.

    No code from either file is run.

    Raises:
        ImportFailed: one of them cannot be taken over exactly; the message says why.
    """
    given, characters = read_ckpt(ckpt), read_meta(meta)
    ours, weights = network_from(given, ckpt)
    V = len(weights["token_embedding.weight"])
    if len(characters) != V:
        raise ImportFailed(
            f"{meta} has {len(characters)} characters, but the network in {ckpt} has {V}\n"
            "give the meta.pkl of the data that it was trained on"
        )
    order = sorted(range(V), key=characters.__getitem__)  # our ids follow the characters
    for name in ("token_embedding.weight", "head.weight"):
        weights[name] = weights[name][order]
    config, steps = given.get("config"), given.get("iter_num", 0)
    dataset = config.get("dataset") if isinstance(config, dict) else None
    checkpoint = {
        "state_dict": {f"gpt.{name}": weight for name, weight in weights.items()},
        "hyper_parameters": asdict(ours),
        "datamodule_hyper_parameters": {
            "corpus": corpus_of(dataset, meta),
            "block_size": ours.block_size,
        },
        "vocabulary": "".join(sorted(characters)),
        "global_step": steps if type(steps) is int else 0,
        "epoch": 0,
        "origin": f"Trained by nanoGPT for {steps} iterations, and imported from its checkpoint.",
    }
    network_of(checkpoint, ckpt)  # as whoever reads it will
    return checkpoint


def network_from(given: dict[str, Any], ckpt: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The settings and the weights of nanoGPT's network under our names."""
    arguments = given["model_args"]
    state = {key.removeprefix("_orig_mod."): w for key, w in given["model"].items()}
    try:
        bias = arguments["bias"]
        sizes = {name: arguments[name] for name in SIZES}
        ours = GPTConfig(
            **sizes,
            dropout=float(arguments.get("dropout", 0.0)),
            bias=bias,
            qkv_bias=bias,
            activation="gelu",
        )
        weights = renamed(state)
        check_sizes(ours, weights)
        V, C = weights["token_embedding.weight"].shape
    except KeyError as error:
        raise ImportFailed(f"{ckpt} lacks {error}; it is no checkpoint of nanoGPT") from error
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise ImportFailed(f"{ckpt} does not fit itself: {error}") from error
    if bias:
        weights.setdefault("head.bias", torch.zeros(V))  # it never has one there
    else:  # layer norms without bias, which is a bias of zero
        for name in [name for name in weights if name.endswith("norm.weight")]:
            weights.setdefault(name.replace("weight", "bias"), torch.zeros(C))
    check_shapes(ours, V, weights, ckpt)
    return ours, weights


def read_ckpt(path: Path) -> dict[str, Any]:
    """Tensors and plain values; code is refused, not run."""
    try:
        given = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ImportFailed(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # zip, pickle and torch each raise their own
        raise ImportFailed(
            f"{path} is not a checkpoint that can be read: it is truncated, damaged, or holds code"
        ) from error
    if not isinstance(given, dict):
        given = {}
    for name in ("model", "model_args"):
        if not isinstance(given.get(name), dict):
            refuse_ckpt(path, f"it has no {name}")
    if not all(isinstance(key, str) for key in given["model"]):
        refuse_ckpt(path, "its weights have no names")
    if not all(isinstance(w, Tensor) and w.is_floating_point() for w in given["model"].values()):
        refuse_ckpt(path, "its weights are no numbers")
    return given


def refuse_ckpt(path: Path, reason: str) -> NoReturn:
    raise ImportFailed(f"{path} is no checkpoint of nanoGPT: {reason}")


class PlainUnpickler(pickle.Unpickler):
    """Reads a pickle of plain values. Whatever names something to import, and so to call, fails."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it holds code ({module}.{name})")


def read_meta(path: Path) -> list[str]:
    """The characters of a meta.pkl in the order of their ids."""
    try:
        with open(path, "rb") as file:
            meta = PlainUnpickler(file).load()
    except OSError as error:
        raise ImportFailed(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # whatever a damaged pickle makes of itself
        reason = str(error) if isinstance(error, pickle.UnpicklingError) else "it is damaged"
        raise ImportFailed(f"{path} cannot be read as plain values: {reason}") from error
    itos = meta.get("itos") if isinstance(meta, dict) else None
    if isinstance(itos, dict) and itos.keys() == set(range(len(itos))):
        itos = [itos[id] for id in range(len(itos))]
    if not (isinstance(itos, list) and itos and all(isinstance(c, str) for c in itos)):
        raise ImportFailed(
            f"{path} holds no characters (itos, by id): it is no meta.pkl of nanoGPT"
        )
    if any(len(c) != 1 for c in itos) or len(set(itos)) != len(itos):
        raise ImportFailed(f"{path} has tokens that are not one different character each")
    return itos


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under our names, in float32, which holds those of half as many bits exactly."""
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
    """Refuse weights that are missing, too many, or of another shape than the settings say."""
    with torch.device("meta"):  # no memory, no random numbers
        expected = {name: w.shape for name, w in GPT(config, V).state_dict().items()}
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            refuse_ckpt(path, f"the weight that is {name} here is missing")
        if name not in expected:
            refuse_ckpt(path, f"the weight that is {name} here does not fit its model_args")
        if weights[name].shape != expected[name]:
            refuse_ckpt(
                path,
                f"the weight that is {name} here has the shape {tuple(weights[name].shape)}, "
                f"not {tuple(expected[name])}",
            )


def corpus_of(dataset: object, meta: Path) -> str:
    """The text as far as it can be known: beside meta.pkl, where nanoGPT's scripts leave it.

    Or else a name: that of the same text here, or nanoGPT's own, under which there may be one.
    """
    beside = meta.absolute().with_name("input.txt")
    if beside.is_file():
        return str(beside)
    if dataset == "shakespeare_char":
        return "tiny-shakespeare"
    return dataset if isinstance(dataset, str) and dataset else "a text that is not known"
