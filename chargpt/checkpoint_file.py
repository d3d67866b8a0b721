"""Safe reading of checkpoint files: tensors and plain values, from anyone.

`torch.load(weights_only=True)` runs no code, but a file of a kilobyte can make it allocate all
memory (compressed records, `bytearray(10**10)`, a tensor with stride 0). The checks here bound what
a file can contain by its size.
"""

import math
import pickletools
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chargpt.model import UserError

MAX_PICKLE_BYTES = 4 << 20  # of all but the tensors' data; about 140 bytes per tensor
MAX_TUPLES = 40_000  # three per tensor; hashing one that is nested deeper overflows the C stack
MAX_DEPTH = 20  # of nested collections; Lightning's loops need 8
GLOBALS = r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage"


def read_tensors_and_plain_values(path: Path) -> Any:
    """Load a file written by `torch.save` onto the CPU.

    The result contains dicts, lists, tuples, strings, numbers, booleans, None, and dense,
    contiguous tensors; a file that is damaged or contains anything else is a UserError.
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
        raise UserError(
            f"the checkpoint {path} {reason}\nchoose another: --ckpt_path PATH"
        ) from error


def check_archive(archive: zipfile.ZipFile, file_size: int) -> int:
    """Check the records before anything is loaded; returns the length of the pickle in bytes."""
    entries = archive.infolist()
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > file_size:
        raise UserError("declares more data than the file holds: torch.save did not write it")
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
    """Raise a UserError if a value is not plain, or if they are too many, too large or too deep.

    Shared values count each time, so nested sharing cannot grow without end.
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
            raise UserError("contains values that are shared or nested without end")
        stack += [(child, depth + 1) for child in children]


def check_weights(weights: dict[str, Any], source: str | Path) -> None:
    """Raise a UserError unless all are tensors of finite numbers of one floating-point type."""
    for name, weight in weights.items():
        check_finite(weight, f"{source}: the weight {name}")
    if len({weight.dtype for weight in weights.values()}) > 1:
        raise UserError(f"{source}: the weights have several types; they must have one")


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
            shape = [] if name == "step" else list(parameter.shape)
            if list(value.shape) != shape:
                raise UserError(
                    f"the optimizer's {name} has shape {list(value.shape)}, not {shape}"
                )


def check_finite(value: Any, name: str) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise UserError(f"{name} is not a floating-point tensor")
    if not value.isfinite().all():
        raise UserError(f"{name} is not finite")
