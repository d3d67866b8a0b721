"""Export to a folder that Hugging Face Transformers loads.

    AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

If GPT-2 or GPT-NeoX computes the same logits, the folder is such a model (`gpt2_neox.py`).
Otherwise it contains its own code, loaded with `trust_remote_code=True`: the files of
chargpt/model/ as they are, and those of remote_code/, which wrap them for Transformers.
"""

import json
import shutil
import struct
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from chargpt.export import gpt2_neox
from chargpt.export.comparison import same_logits
from chargpt.export.model_card import model_card
from chargpt.generation import GenerationConfig
from chargpt.model import GPT, GPTConfig, UserError
from chargpt.text_generator import TextGenerator
from chargpt.vocabulary import Vocabulary


def export(generator: TextGenerator, checkpoint: dict[str, Any], output: Path, dtype: str) -> str:
    """Write the network, its vocabulary and a model card to a folder; returns its description.

    Args:
        generator: the network and its vocabulary.
        checkpoint: the checkpoint they were loaded from, for the model card.
        output: the folder to create, atomically. It may exist if it is empty.
        dtype: ignored here; it applies to pages. Weights are float32, so that logits are the same;
            use `from_pretrained(folder, dtype="float16")` to load smaller ones.

    Raises:
        UserError: the folder computes different logits, or `output` is not empty.
        OSError: the folder cannot be written.
    """
    gpt, vocabulary = generator.gpt, generator.vocabulary
    standard = gpt2_neox.convert(gpt)
    config, weights = standard or with_own_code(gpt)
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
    texts = {
        name: json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        for name, document in documents.items()
    }
    texts["README.md"] = model_card(generator, checkpoint, own_code=not standard)
    with atomic_folder(output) as folder:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
        write_safetensors(folder / "model.safetensors", weights)
        if not standard:
            copy_code(folder)
        check(folder, gpt, own_code=not standard)
    if standard:
        return f"{config['architectures'][0]}, which Transformers loads without additional code"
    return "a model with its own code, which Transformers loads with trust_remote_code=True"


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
    missing = [parent for parent in path.parents if not parent.exists()]
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.is_dir():
            path.rmdir()  # empty: renaming onto a folder is an error on Windows
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            for parent in missing:
                parent.rmdir()
        raise


# ---- a model with its own code ----


def with_own_code(gpt: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and weights for the classes in remote_code/."""
    config = {
        "architectures": ["ChargptForCausalLM"],
        "model_type": "chargpt",
        "auto_map": {
            "AutoConfig": "configuration_chargpt.ChargptConfig",
            "AutoModelForCausalLM": "modeling_chargpt.ChargptForCausalLM",
        },
        "network": asdict(gpt.config),
        "vocab_size": gpt.token_embedding.num_embeddings,
        "tie_word_embeddings": False,
        "bos_token_id": None,  # tokens are characters; there are no special tokens
        "eos_token_id": None,
        "dtype": "float32",
    }
    return config, {f"gpt.{name}": weight.float() for name, weight in gpt.state_dict().items()}


def copy_code(folder: Path) -> None:
    """Copy the model's files, without subfolders, which Transformers does not copy."""
    for source in (files("chargpt.model"), files("chargpt.export") / "remote_code"):
        for file in source.iterdir():
            if file.name.endswith(".py") and file.name != "__init__.py":
                (folder / file.name).write_bytes(file.read_bytes())


# ---- the comparison at the end ----


ADVICE = (
    "an export contains the code of chargpt/model/ only: norms, activations and layers that are "
    "defined elsewhere have to be moved there. If there are none, update transformers"
)


def check(folder: Path, gpt: GPT, own_code: bool) -> None:
    """Load the folder with Transformers, if it is installed, and compare the logits.

    If it is not, a folder with its own code is loaded without its Transformers classes, and a GPT-2
    or GPT-NeoX is not loaded: its weights were compared before they were renamed.

    Raises:
        UserError: the folder cannot be loaded, or its logits are different.
    """
    try:
        with imported(folder) as load_module:
            model = load_with_transformers(folder, load_module if own_code else None)
            if model is None and own_code:
                config = load_module("config").GPTConfig(**asdict(gpt.config))
                model = load_module("gpt").GPT(config, len(gpt.head.weight)).eval()
                model.load_state_dict(gpt.state_dict())
            if model is None:
                warnings.warn(
                    "the folder was not loaded: install transformers to compare its logits",
                    stacklevel=2,
                )
            same = model is None or same_logits(model, gpt)
    except Exception as error:  # whatever the code of another library raises
        reason = (str(error).strip() or repr(error)).splitlines()[-1].strip()
        raise UserError(f"the exported folder cannot be loaded: {reason}\n{ADVICE}") from error
    if not same:
        raise UserError(f"the exported folder would compute different logits\n{ADVICE}")


@contextmanager
def imported(folder: Path) -> Iterator[Callable[[str], Any]]:
    """Yield a function that imports a module of this folder, inside the `with` statement.

    `AutoModelForCausalLM` would leave a copy of the code in the user's cache.
    """
    package = ModuleType(f"chargpt_export_{uuid.uuid4().hex}")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield lambda name: import_module(f"{package.__name__}.{name}")
    finally:
        sys.dont_write_bytecode = before
        for name in [name for name in sys.modules if name.startswith(package.__name__)]:
            del sys.modules[name]


def load_with_transformers(
    folder: Path, load_module: Callable[[str], Any] | None
) -> Callable[[Tensor], Tensor] | None:
    """The folder's model as a function of ids, or None if Transformers is not installed."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        return None
    model_class: Any = AutoModelForCausalLM
    if load_module is not None:
        model_class = load_module("modeling_chargpt").ChargptForCausalLM
    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = model_class.from_pretrained(folder, local_files_only=True).eval()
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()
    # With an attention mask, so that its own code takes the path for padding and caches.
    return lambda ids: model(ids, attention_mask=torch.ones_like(ids)).logits


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


# ---- tokenizer and generation settings ----


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
    """Our sampling defaults. Half the context is left for the prompt: past its end, GPT-2 fails."""
    return {
        "do_sample": True,
        "temperature": GenerationConfig.temperature,
        "top_k": 0,  # all characters
        "max_new_tokens": max(1, config.block_size // 2),
        "bos_token_id": None,
        "eos_token_id": None,
    }
