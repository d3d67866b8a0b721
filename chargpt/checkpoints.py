"""Checkpoints: where runs store them, and how to read one safely and load its network.

lightning_logs/version_3/checkpoints/best.ckpt  the lowest validation loss at the longest context
lightning_logs/version_3/checkpoints/last.ckpt  after each validation, at the end, and on a signal

`torch.load(weights_only=True)` runs no code, but a small file can exhaust memory there (compressed
records, `bytearray(10**10)`) or later (a tensor with stride 0). The checks at the end of this file
refuse such files.
"""

import math
import pickletools
import re
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import chargpt
from chargpt.atomic_file import atomic_write
from chargpt.model import GPT, GPTConfig, UserError
from chargpt.vocabulary import Vocabulary

LOGS = "lightning_logs"
FOLDER = "checkpoints"  # in a run folder
BEST = "best.ckpt"
LAST = "last.ckpt"
NETWORK_SETTINGS = tuple(field.name for field in fields(GPTConfig))
WEIGHT_SETTINGS = [name for name in NETWORK_SETTINGS if not name.endswith("dropout")]
OURS: dict[str, Any] = dict(version=chargpt.__version__, network=NETWORK_SETTINGS)
PARTS: dict[str, type] = dict(state_dict=dict, hyper_parameters=dict, global_step=int)
PARTS |= dict(datamodule_hyper_parameters=dict, vocabulary=str, chargpt=dict)
PARTS |= dict(loops=dict, callbacks=dict, optimizer_states=list)
NO_TRAINING_STATE: dict[str, Any] = dict(loops={}, callbacks={}, optimizer_states=[])

MAX_PICKLE_BYTES = 4 << 20  # of everything but the tensors' data: about 140 bytes per tensor
MAX_TUPLES = 40_000  # four per tensor; hashing tuples nested deeper than that overflows the C stack
MAX_DEPTH = 20  # of nested collections; Lightning's loops need 8
GLOBALS = r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage"


def find_checkpoints(root: str | Path) -> list[Path]:
    """The last and best checkpoints of all runs under `root`."""
    return [path for name in (LAST, BEST) for path in Path(root, LOGS).glob(f"*/{FOLDER}/{name}")]


def new_run(root: str | Path) -> Path:
    """Create `root`/lightning_logs/version_N; processes that start together get different ones."""
    names = (path.name.removeprefix("version_") for path in Path(root, LOGS).glob("version_*"))
    number = 1 + max((int(name) for name in names if name.isdecimal()), default=-1)
    while True:
        run = Path(root, LOGS, f"version_{number}").absolute()
        try:
            run.mkdir(parents=True)
            return run
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(f"cannot create the folder {run}: {error.strerror}") from error


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint belongs to; None for a file stored elsewhere."""
    for folder in checkpoint.absolute().parents[:2]:  # two levels up for checkpoints/own
        run = folder.parent
        if folder.name == FOLDER and (run.parent.name == LOGS or (run / ".lock").exists()):
            return run
    return None


def resolve_checkpoint(name: str | Path | None, root: str | Path = ".") -> Path:
    """Resolve a checkpoint: a path, or "best" (also None) or "last" of the newest run."""
    if name in (None, "best", "last"):
        if not (found := find_checkpoints(root)):
            raise UserError(
                f"no run with a checkpoint in {Path(root, LOGS).absolute()}\n"
                "train a model first: python -m chargpt fit --config cpu"
            )
        newest = max(found, key=lambda path: (path.stat().st_mtime_ns, path.parts))
        path = newest.with_name(LAST if name == "last" else BEST)
        return path if path.exists() else newest  # the only one
    path = Path(str(name)).expanduser()
    if path.is_dir():
        raise UserError(f"{path} is a folder\nname a file, such as {path / FOLDER / LAST}")
    if not path.is_file():
        raise UserError(f"no checkpoint at {path.absolute()}")
    return path


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint's tensors and plain values onto the CPU.

    Raises:
        UserError: the file is damaged, contains code, or is not in this version's format.
    """
    checkpoint = read_tensors_and_plain_values(Path(path))
    parts = NO_TRAINING_STATE | checkpoint if isinstance(checkpoint, dict) else {}
    if not all(isinstance(parts.get(name), kind) for name, kind in PARTS.items()):
        raise UserError(
            f"{path} is not a checkpoint of chargpt {chargpt.__version__}: a different version "
            "or project wrote it\nread it with the program that wrote it, or train again"
        )
    return checkpoint


def build_network(checkpoint: dict[str, Any], path: str | Path) -> tuple[GPT, Vocabulary]:
    """The network of a checkpoint, with its weights, and its vocabulary.

    Raises:
        UserError: weights, settings and vocabulary do not fit each other or this version.
    """
    ours, settings = checkpoint["chargpt"], checkpoint["hyper_parameters"]
    try:
        config = GPTConfig(**{name: settings[name] for name in ours.get("network", [])})
    except (TypeError, KeyError) as error:  # it names the setting
        raise UserError(
            f"{path} has network settings that this version of chargpt does not support: "
            f"{error}\nread it with the version that wrote it"
        ) from error
    context = ours.get("context", config.block_size)
    if type(context) is not int or not 1 <= context <= config.block_size:
        raise UserError(f"{path} has context {str(context)[:80]}; it must be from 1 to block_size")
    if any("\ud800" <= character <= "\udfff" for character in checkpoint["vocabulary"]):
        raise UserError(f"{path} has a vocabulary with surrogates, which are not characters")
    vocabulary = Vocabulary(checkpoint["vocabulary"])
    weights = {
        name.removeprefix("gpt."): weight
        for name, weight in checkpoint["state_dict"].items()
        if str(name).startswith("gpt.")
    }
    check_weights(weights, path)
    if config.n_layer > len(weights):  # before any memory is allocated for so many
        raise UserError(f"{path} has n_layer {config.n_layer}, but weights for fewer layers")
    try:
        # The weights come from the file: none are allocated, initialized or copied.
        with torch.device("meta"), SkipNormal():
            gpt = GPT(config, len(vocabulary))
        shared: dict[Tensor, nn.Parameter] = {}  # several modules may have the same parameter
        for name, empty in gpt.named_parameters(remove_duplicate=False):
            if name in weights:
                weights[name] = shared.setdefault(empty, nn.Parameter(weights[name]))
        gpt.load_state_dict(weights, assign=True)
    except (RuntimeError, TypeError) as error:  # the latter for sizes that overflow
        reason = str(error).splitlines()[-1].strip()  # mismatches are below a headline
        raise UserError(f"{path}: the weights do not fit the settings: {reason}") from error
    if context < config.block_size:  # training stopped while contexts were short
        gpt.config = replace(config, block_size=context)
        if gpt.position_embedding is not None:
            positions = gpt.position_embedding.weight[:context].detach().clone()
            gpt.position_embedding = nn.Embedding.from_pretrained(positions, freeze=False)
    return gpt, vocabulary


class SkipNormal(TorchFunctionMode):
    """Skips `nn.init.normal_`, which on the meta device imports a compiler and takes a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)


def validation_loss(checkpoint: dict[str, Any]) -> float | None:
    """The loss of these weights on the whole validation split; None if it was not measured."""
    ours = checkpoint["chargpt"]
    loss, trainer = ours.get("val_loss"), ours.get("trainer") or {}
    limit = trainer.get("overfit_batches") or trainer.get("limit_val_batches")
    whole = limit is None or (type(limit) is float and limit == 1.0)  # an int counts batches
    return loss if type(loss) is float and math.isfinite(loss) and whole else None


def checkpoint_of(
    weights: dict[str, Tensor], config: GPTConfig, vocabulary: Vocabulary, **parts: Any
) -> dict[str, Any]:
    """A checkpoint of a network without training state, plus any additional parts."""
    return {
        "pytorch-lightning_version": version("lightning"),  # Lightning asks for it when it loads
        "state_dict": {f"gpt.{name}": weight for name, weight in weights.items()},
        "hyper_parameters": asdict(config),
        "datamodule_hyper_parameters": {},
        "global_step": 0,
        "epoch": 0,
        "vocabulary": vocabulary.characters,
        "chargpt": dict(OURS),
        **parts,
    }


def save(gpt: GPT, vocabulary: Vocabulary, path: str | Path) -> None:
    """Save a network and its vocabulary as a checkpoint; it can be loaded, but not resumed."""
    write_checkpoint(checkpoint_of(gpt.state_dict(), gpt.config, vocabulary), Path(path))


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint atomically; after an error, an existing file is unchanged.

    Raises:
        UserError: it contains values that are not plain, or the file cannot be written.
    """
    try:
        check_values(checkpoint)
    except UserError as error:
        rule = "only tensors and plain values can be saved"
        raise UserError(f"cannot save the checkpoint: it {error}; {rule}") from None
    try:
        with atomic_write(path) as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch wraps some
        reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
        raise UserError(
            f"cannot write the checkpoint {path.absolute()}: {reason}\n"
            "earlier checkpoints are intact; check permissions and free space"
        ) from error


# ---- safe reading ----


def read_tensors_and_plain_values(path: Path) -> Any:
    """Load a file written by `torch.save` onto the CPU.

    The result contains dicts, lists, tuples, strings, bytes, numbers, booleans, None, and dense,
    contiguous tensors; a file that is damaged or contains anything else raises a UserError.
    """
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            pickle_bytes = check_archive(archive, size)
        content = torch.load(path, map_location="cpu", weights_only=True)
        check_values(content, max_values=pickle_bytes, max_bytes=2 * size)
        return content
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except Exception as error:  # zipfile, pickle and torch each raise their own
        reason = error if isinstance(error, UserError) else "is truncated or damaged"
        raise UserError(f"the checkpoint {path} {reason}\nchoose another checkpoint") from error


def check_archive(archive: zipfile.ZipFile, file_size: int) -> int:
    """Check the records before anything is loaded; return the length of the pickle in bytes."""
    entries = archive.infolist()
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > file_size:
        raise UserError("has compressed or oversized records: torch.save did not write it")
    (entry,) = (entry for entry in entries if entry.filename.endswith("/data.pkl"))
    if entry.file_size > MAX_PICKLE_BYTES:
        raise UserError(f"has more than {MAX_PICKLE_BYTES >> 20} MiB of non-tensor data")
    tuples = 0
    for opcode, name, _ in pickletools.genops(archive.read(entry)):
        tuples += opcode.name.startswith("TUPLE")
        is_global = opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST")
        if is_global and not re.fullmatch(GLOBALS, str(name)):
            raise UserError(f"contains {name}; only tensors and plain values are read, not code")
    if tuples > MAX_TUPLES:
        raise UserError("contains too many tuples")
    return entry.file_size


def check_values(root: Any, max_values: float = math.inf, max_bytes: float = math.inf) -> None:
    """Raise a UserError if values are not plain, or are too many, too large or nested too deeply.

    A shared value counts once per reference, so nested sharing cannot hide a huge structure.
    """
    stack = [(root, 0)]
    while stack:
        value, depth = stack.pop()
        children: list[Any] = []
        if isinstance(value, (dict, list, tuple)):
            children = list(value) + (list(value.values()) if isinstance(value, dict) else [])
        elif isinstance(value, Tensor):
            max_bytes -= max(value.nbytes, value.untyped_storage().nbytes())
            if not value.is_contiguous() or value.is_quantized or value.requires_grad:
                raise UserError("contains a tensor that is not plain and contiguous")
        elif not isinstance(value, (str, int, float, bytes, type(None))):
            raise UserError(f"contains a {type(value).__name__}")
        max_values -= len(children)
        if max_values < 0 or max_bytes < 0 or depth > MAX_DEPTH:
            raise UserError("contains values that are shared too often or nested too deeply")
        stack += [(child, depth + 1) for child in children]


def check_weights(weights: dict[str, Any], source: str | Path) -> None:
    """Raise a UserError unless all weights are finite floating-point tensors of one dtype."""
    for name, weight in weights.items():
        check_finite(weight, f"{source}: the weight {name}")
    if len({weight.dtype for weight in weights.values()}) > 1:
        raise UserError(f"{source}: the weights have different dtypes; all must have the same")


def check_optimizer_state(state: Any, groups: Sequence[Sequence[Tensor]]) -> None:
    """Raise a UserError unless an optimizer's `state_dict` fits: fused AdamW crashes otherwise.

    Saved parameters correspond to those of `groups` by position. Each value of a parameter's state
    must be a finite floating-point tensor of the parameter's shape, or a scalar if it is `step`.
    """
    try:
        parameters: dict[Any, Tensor] = {}  # by the ids that they were saved with
        for saved, group in zip(state["param_groups"], groups, strict=True):
            parameters.update(zip(saved["params"], group, strict=True))
        states = [(parameters[id], dict(values)) for id, values in state["state"].items()]
    except (AttributeError, LookupError, TypeError, ValueError):
        raise UserError("the optimizer state is damaged or belongs to other parameters") from None
    for parameter, values in states:
        for name, value in values.items():
            check_finite(value, f"the optimizer's {name}")
            shape = [] if name == "step" else [*parameter.shape]
            if [*value.shape] != shape:
                raise UserError(f"the optimizer's {name} has shape {[*value.shape]}, not {shape}")


def check_finite(value: Any, name: str) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise UserError(f"{name} is not a floating-point tensor")
    if not value.isfinite().all():
        raise UserError(f"{name} is not finite")
