"""Export to one HTML file that runs the network offline in any browser and shows its internals.

    page.html   text and styles            page.js     the model and generation, in JavaScript
    view.js     event handling             kernel.js   the matrix product, in WebAssembly

This module combines them with the weights, the vocabulary and figures of the run, which are stored
in script elements of a type that browsers don't execute, escaped so that they cannot end the
element. A content security policy allows only the page's own scripts and styles, by their hashes,
and its worker, and forbids everything else: the page can neither load nor send anything.
"""

import base64
import copy
import hashlib
import json
import os
import re
from contextlib import suppress
from dataclasses import MISSING, Field, asdict, fields
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from chargpt.atomic_file import atomic_write
from chargpt.checkpoints import validation_loss
from chargpt.export.comparison import random_ids
from chargpt.generation import GenerationConfig
from chargpt.model import GPT, UserError
from chargpt.text_generator import TextGenerator
from chargpt.vocabulary import STAND_INS

DTYPES = {"float16": torch.float16, "float32": torch.float32}
MAX_BYTES = 2**28  # of weights; as base64, this is close to the maximum string length of browsers

# The network settings that page.js supports, with their allowed values (None: any value).
KNOWN: dict[str, tuple[str, ...] | None] = {
    "block_size": None,
    "n_embd": None,
    "n_head": None,
    "n_layer": None,
    "dropout": None,  # this and attention_dropout matter only in training
    "attention_dropout": None,
    "position": ("learned", "rotary"),
    "norm": ("layer", "plain"),
    "bias": None,
    "qkv_bias": None,
    "activation": ("relu", "gelu", "relu2"),
    "ngrams": None,
    "ngram_dropout": None,
}


def export(generator: TextGenerator, checkpoint: dict[str, Any], output: Path, dtype: str) -> None:
    """Write the page for a network.

    Args:
        generator: the network and its vocabulary.
        checkpoint: the checkpoint it was loaded from, for the figures of the run.
        output: the HTML file; an existing file is replaced atomically.
        dtype: data type of the weights, float16 or float32.

    Raises:
        UserError: the page does not support the network, or `output` is not a valid file path.
        OSError: the file cannot be written.
    """
    check_known(generator.gpt)
    page = build(generator, figures(generator.gpt, checkpoint), dtype)
    if output.exists() and not output.is_file():
        raise UserError(f"cannot write {output}: it is not a file")
    with suppress(FileNotFoundError):
        os.stat(output)  # raises for a loop of symbolic links
    output = Path(os.path.realpath(output))  # replace the target of a symbolic link, not the link
    if not output.parent.is_dir():
        raise UserError(f"cannot write {output}: there is no folder {output.parent}")
    with atomic_write(output) as file:
        file.write(page)


def check_known(gpt: GPT) -> None:
    """Raise if page.js does not support a setting of the network.

    A setting that page.js doesn't know is no obstacle at its default: a switch that is off.
    """
    for field in fields(gpt.config):
        value, choices = getattr(gpt.config, field.name), KNOWN.get(field.name)
        if field.name not in KNOWN and value != default_of(field):
            raise UserError(
                f"cannot export a page: it does not support the setting {field.name} ({value!r})"
            )
        if choices is not None and value not in choices:
            raise UserError(
                f"cannot export a page: it does not support {field.name} {value!r}, "
                f"only {', '.join(choices)}"
            )


def default_of(field: Field) -> Any:
    """The default of a dataclass field, or MISSING, which equals no value."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def figures(gpt: GPT, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Facts about the run that the page shows; None where the checkpoint lacks them."""
    data = checkpoint["datamodule_hyper_parameters"]
    corpus = str(data.get("corpus_name") or data.get("corpus") or "")
    return {
        "parameters": sum(parameter.numel() for parameter in gpt.parameters()),
        "corpus": re.split(r"[\\/]", corpus)[-1] or None,  # without its folder, which is private
        "steps": int(checkpoint["global_step"]),
        "val_loss": validation_loss(checkpoint),
    }


def build(generator: TextGenerator, figures: dict[str, Any], dtype: str) -> bytes:
    """The page as bytes."""
    gpt = generator.gpt
    weights, shapes = pack(gpt, dtype)
    data = {
        "config": {name: getattr(gpt.config, name) for name in KNOWN},
        "vocabulary": [ord(character) for character in generator.vocabulary.characters],
        "stand_ins": STAND_INS,
        "weights": {"dtype": dtype, "shapes": shapes},
        "settings": asdict(GenerationConfig()),  # initial values of the controls
        "example": example(gpt, dtype),
        "figures": figures,
    }
    folder = resources.files("chargpt.export")
    parts = {
        name: compact((folder / name).read_text(encoding="utf-8"))
        for name in ("page.html", "kernel.js", "page.js", "view.js")
    }
    parts |= {"data": as_script_data(data), "weights": base64.b64encode(weights).decode()}
    template = parts.pop("page.html")
    parts["policy"] = policy(template, parts)
    # In one pass, so that placeholders inside inserted text are not replaced.
    page = re.sub(r"\{\{([\w.]+)\}\}", lambda match: parts[match[1]], template)
    return page.encode("utf-8")


def pack(gpt: GPT, dtype: str) -> tuple[bytes, list[tuple[str, int, int]]]:
    """All weights as little-endian bytes, and name, rows and columns of each (vectors: one row)."""
    size = sum(parameter.numel() for parameter in gpt.parameters()) * DTYPES[dtype].itemsize
    if size > MAX_BYTES:
        raise UserError(
            f"the weights take {size:,} bytes, too many for a page (at most {MAX_BYTES:,})"
        )
    chunks, shapes = [], []
    for name, parameter in gpt.named_parameters():
        matrix = torch.atleast_2d(parameter.detach().cpu()).to(DTYPES[dtype])
        if not matrix.isfinite().all():
            hint = "; try --export.dtype float32" if parameter.isfinite().all() else ""
            raise UserError(f"{name} has a weight that is not a finite {dtype} number{hint}")
        numbers = matrix.numpy()
        chunks.append(numbers.astype(numbers.dtype.newbyteorder("<")).tobytes())
        shapes.append((name, *matrix.shape))
    return b"".join(chunks), shapes


@torch.no_grad()
def example(gpt: GPT, dtype: str) -> dict[str, list[Any]]:
    """Ids and the logits after them, which the page compares with its own when it is opened.

    It catches what no setting reveals: network code that page.js no longer matches.
    """
    gpt = copy.deepcopy(gpt).to("cpu", torch.float32).eval()
    for parameter in gpt.parameters():
        parameter.copy_(parameter.to(DTYPES[dtype]))  # as the page stores them
    ids = random_ids(gpt, min(16, gpt.config.block_size))[:1]
    logits = gpt(ids)[0, -1, :100]
    if not logits.isfinite().all():
        raise UserError("the network's logits are NaN or infinite")
    return {"ids": ids[0].tolist(), "logits": [round(logit, 4) for logit in logits.tolist()]}


def as_script_data(data: dict[str, Any]) -> str:
    """JSON that is safe inside a script element: ASCII only, and < is escaped."""
    return json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")


def compact(source: str) -> str:
    """HTML or JavaScript without indentation and without lines that hold only a comment."""
    lines = (line.strip() for line in source.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("//"))


def policy(template: str, parts: dict[str, str]) -> str:
    """The content security policy: the page's own styles and scripts by hash, and a worker."""

    def hashes(tag: str) -> str:
        contents = re.findall(rf"<{tag}(?: id=\"\w+\")?>(.*?)</{tag}>", template, re.DOTALL)
        filled = [re.sub(r"\{\{([\w.]+)\}\}", lambda m: parts[m[1]], text) for text in contents]
        digests = [hashlib.sha256(text.encode("utf-8")).digest() for text in filled]
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {hashes('script')} 'wasm-unsafe-eval'",
            f"style-src {hashes('style')}",
            "worker-src blob:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
