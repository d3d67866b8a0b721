"""Export to an ONNX file: ids (B, T) to logits of the next character (B, T, V), for other runtimes.

B may be any size, T anything up to block_size. There is no KV cache: a program that generates text
passes all characters, at most block_size of them, for each new one. The vocabulary is in the
metadata.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from chargpt.atomic_file import atomic_write
from chargpt.export.comparison import random_ids, same_logits
from chargpt.model import GPT, UserError
from chargpt.text_generator import TextGenerator

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MAX_BYTES = 2**31 - 2**24  # the limit of the format is 2 GiB, graph included


def export(generator: TextGenerator, checkpoint: dict[str, Any], output: Path, dtype: str) -> str:
    """Write the network as an ONNX file; returns a description of it.

    Args:
        generator: the network and its vocabulary.
        checkpoint: ignored here.
        output: the file; an existing one is replaced atomically.
        dtype: ignored here; it applies to pages. Weights are float32, so that logits are the same.

    Raises:
        UserError: a package is missing, the network is too large, or it cannot be converted.
        OSError: the file cannot be written.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(
            f"export --to onnx needs packages that are not installed: {', '.join(missing)}\n"
            f"install them: pip install {' '.join(missing)}"
        )
    gpt = generator.gpt
    if sum(4 * weight.numel() for weight in gpt.parameters()) > MAX_BYTES:
        raise UserError("the weights are too large: an ONNX file can be at most 2 GiB")
    try:
        model = convert(gpt, json.dumps(generator.vocabulary.characters))
        same = compare(model, gpt)
    except Exception as error:  # whatever torch, onnxscript and onnxruntime raise
        reason = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"this network cannot be exported to ONNX: {reason[0] if reason else error!r}\n"
            "use export --to huggingface"
        ) from error
    if not same:
        raise UserError(
            "this network cannot be exported to ONNX: the file would compute different logits\n"
            "use export --to huggingface"
        )
    with atomic_write(output) as file:
        file.write(model)
    return f"input_ids (batch, length) to logits, for lengths 1 to {gpt.config.block_size}"


def convert(gpt: GPT, vocabulary: str) -> bytes:
    """The network as an ONNX model with a dynamic batch size and length."""
    T = gpt.config.block_size
    shape = {0: Dim("batch", min=1), 1: Dim("length", min=1, max=T) if T > 1 else 1}
    with quiet():
        program = torch.onnx.export(
            gpt,
            (random_ids(gpt),),
            input_names=["input_ids"],
            output_names=["logits"],
            dynamic_shapes=(shape,),
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # only the exporter without dynamo returns nothing
    program.model.metadata_props["vocabulary"] = vocabulary
    return program.model_proto.SerializeToString()


def compare(model: bytes, gpt: GPT) -> bool:
    """Whether onnxruntime computes the logits of `gpt` at lengths 1 and block_size, and between."""
    from onnxruntime import InferenceSession

    session = InferenceSession(model, providers=["CPUExecutionProvider"])
    T = gpt.config.block_size
    return all(
        same_logits(
            lambda ids: torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0]), gpt, n
        )
        for n in {1, (T + 1) // 2, T}
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the exporter's remarks on packages that it doesn't need, and its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
