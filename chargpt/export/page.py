"""One HTML file in which the network writes, and can be looked into: in any browser, offline.

    page.html   words and looks            page.js     model.py and generation.py, in JavaScript
    view.js     what a click does          kernel.js   the matrix product, in WebAssembly

They are put together here with the weights, the vocabulary and the run's figures. These are data
in script elements that no browser runs, and cannot end them. A content security policy lets the
page's own scripts run, recognized by their hashes, and forbids everything else: nothing can be
fetched, and nothing that is written can leave.
"""

import base64
import hashlib
import json
import math
import re
from dataclasses import asdict, fields
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from chargpt.atomic_file import atomic_write
from chargpt.generation import GenerationConfig
from chargpt.model import GPT
from chargpt.text_generator import TextGenerator
from chargpt.vocabulary import STAND_INS

DTYPES = {"float16": torch.float16, "float32": torch.float32}
MAX_BYTES = 2**28  # of weights: as base64, the longest text that all browsers hold is not far

# The settings of a network that page.js knows, and which choices; None where any value will do.
KNOWN: dict[str, tuple[str, ...] | None] = {
    "block_size": None,
    "n_embd": None,
    "n_head": None,
    "n_layer": None,
    "dropout": None,  # this and the next matter in training only
    "attention_dropout": None,
    "position": ("learned", "rotary"),
    "norm": ("layer", "plain"),
    "bias": None,
    "qkv_bias": None,
    "activation": ("relu", "gelu", "relu2"),
    "zero_init": None,
    "ngrams": None,
    "ngram_dropout": None,
}


def export(generator: TextGenerator, checkpoint: dict[str, Any], output: Path, dtype: str) -> None:
    """Write the page of a network.

    Args:
        generator: the network and its vocabulary.
        checkpoint: where the run's figures are found.
        output: the file; what it held before is replaced, all at once.
        dtype: of the weights, float16 or float32.

    Raises:
        ValueError: a network that the page does not know or cannot hold; no file can stand there.
        OSError: the file cannot be written.
    """
    check_known(generator.gpt)
    page = build(generator, figures(generator.gpt, checkpoint), dtype)
    if output.exists() and not output.is_file():
        raise ValueError(f"cannot write {output}: it is not a file")
    output = output.resolve()  # the file that a link leads to, not the link, is replaced
    if not output.parent.is_dir():
        raise ValueError(f"cannot write {output}: there is no folder {output.parent}")
    with atomic_write(output) as file:
        file.write(page)


def check_known(gpt: GPT) -> None:
    """Refuse a network that page.js would compute wrongly."""
    for field in fields(gpt.config):
        value = getattr(gpt.config, field.name)
        if field.name not in KNOWN:
            raise ValueError(
                f"a page cannot be made: it does not know the setting {field.name} ({value!r})"
            )
        choices = KNOWN[field.name]
        if choices is not None and value not in choices:
            raise ValueError(
                f"a page cannot be made: it does not know {field.name} {value!r}, "
                f"only {', '.join(choices)}"
            )


def figures(gpt: GPT, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What the page tells of the run; null where the checkpoint does not say."""
    data = checkpoint["datamodule_hyper_parameters"]
    corpus = str(data.get("corpus_name") or data.get("corpus") or "")
    steps = int(checkpoint["global_step"])
    val_loss = None
    if checkpoint.get("validated_step") == steps:  # else the score is of other weights
        scores = [
            state["current_score"]
            for state in checkpoint.get("callbacks", {}).values()
            if isinstance(state, dict) and state.get("current_score") is not None
        ]
        val_loss = float(scores[0]) if scores else None
    return {
        "parameters": sum(parameter.numel() for parameter in gpt.parameters()),
        # Its last part alone: the folders before it are nobody's business.
        "corpus": re.split(r"[\\/]", corpus)[-1] or None,
        "steps": steps,
        "val_loss": val_loss if val_loss is not None and math.isfinite(val_loss) else None,
    }


def build(generator: TextGenerator, figures: dict[str, Any], dtype: str) -> bytes:
    """The page, byte for byte."""
    gpt = generator.gpt
    weights, shapes = pack(gpt, dtype)
    data = {
        "config": {field.name: getattr(gpt.config, field.name) for field in fields(gpt.config)},
        "vocabulary": [ord(character) for character in generator.vocabulary.characters],
        "stand_ins": STAND_INS,
        "weights": {"dtype": dtype, "shapes": shapes},
        "settings": asdict(GenerationConfig()),  # where the sliders stand at first
        "figures": figures,
    }
    folder = resources.files("chargpt.export")
    parts = {
        name: (folder / name).read_text(encoding="utf-8")
        for name in ("page.html", "kernel.js", "page.js", "view.js")
    }
    parts |= {"data": as_script_data(data), "weights": base64.b64encode(weights).decode()}
    template = parts.pop("page.html")
    parts["policy"] = policy(template, parts)
    # In one pass, so that nothing that is put in is looked at for places to put things in.
    page = re.sub(r"\{\{([\w.]+)\}\}", lambda match: parts[match[1]], template)
    return page.encode("utf-8")


def pack(gpt: GPT, dtype: str) -> tuple[bytes, list[tuple[str, int, int]]]:
    """All weights in little-endian order, and name, rows and columns of each (vectors: one row)."""
    size = sum(parameter.numel() for parameter in gpt.parameters()) * DTYPES[dtype].itemsize
    if size > MAX_BYTES:
        raise ValueError(f"a page cannot hold weights of {size:,} bytes, at most {MAX_BYTES:,}")
    chunks, shapes = [], []
    for name, parameter in gpt.named_parameters():
        matrix = torch.atleast_2d(parameter.detach().cpu()).to(DTYPES[dtype])
        if not matrix.isfinite().all():
            hint = "; try --export.dtype float32" if parameter.isfinite().all() else ""
            raise ValueError(f"{name} has a weight that is no finite {dtype} number{hint}")
        numbers = matrix.numpy()
        chunks.append(numbers.astype(numbers.dtype.newbyteorder("<")).tobytes())
        shapes.append((name, *matrix.shape))
    return b"".join(chunks), shapes


def as_script_data(data: dict[str, Any]) -> str:
    """JSON that is inert in a script element: it has no <, and nothing beyond ASCII."""
    return json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")


def policy(template: str, parts: dict[str, str]) -> str:
    """The content security policy: the page's own style and scripts by hash, a worker, no more."""

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
