"""Checkpoints: where runs keep them, reading one without running code from it, and its network.

lightning_logs/version_3/checkpoints/step=250-val_loss=1.8123.ckpt    the best so far
lightning_logs/version_3/checkpoints/last.ckpt                        the last step
"""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from chargpt.model import GPT, GPTConfig
from chargpt.vocabulary import Vocabulary

LOGS = "lightning_logs"
BEST_NAME = "step={step}-val_loss={val_loss:.4f}"  # Lightning fills in the metrics
LAST_NAME = "last"
CONFIG = "config.yaml"  # a run's settings, in its folder
PARTS = {  # of a checkpoint of ours, beside what Lightning adds
    "vocabulary": str,
    "state_dict": dict,
    "hyper_parameters": dict,
    "datamodule_hyper_parameters": dict,
    "global_step": int,
}


class CheckpointError(ValueError):
    """No checkpoint where one is needed, or a file that is not one of ours."""


def newest_run(root: str | Path = ".") -> Path:
    """The run under `root`/lightning_logs whose checkpoint was written last.

    Raises:
        CheckpointError: there is none.
    """
    checkpoints = list(Path(root, LOGS).glob("*/checkpoints/*.ckpt"))
    if not checkpoints:
        raise CheckpointError(
            f"no run with a checkpoint under {Path(root, LOGS).absolute()}\n"
            "train one first: python -m chargpt fit --config cpu"
        )
    newest = max(checkpoints, key=lambda path: (path.stat().st_mtime_ns, path.parts))
    return newest.parents[1]


def new_run(logs: Path) -> Path:
    """Make the folder of a new run; two that start together take two."""
    version = 1 + max(
        (int(name[8:]) for path in logs.glob("version_*") if (name := path.name)[8:].isdigit()),
        default=-1,
    )
    while True:
        try:
            (run := logs / f"version_{version}").mkdir(parents=True)
            return run
        except FileExistsError:
            version += 1


def run_of(checkpoint: Path | None) -> Path | None:
    """The folder of the run that a checkpoint belongs to; None for one that lies alone."""
    folder = checkpoint and checkpoint.absolute().parent
    if folder and folder.name == "checkpoints" and (folder.parent / CONFIG).is_file():
        return folder.parent
    return None


def best_checkpoint(run: Path) -> Path:
    """The checkpoint of lowest validation loss, or the last where the run has not validated yet."""
    scores = {}
    for path in run.glob("checkpoints/*.ckpt"):
        if match := re.search(r"val_loss=(\d+\.\d+)", path.name):
            scores[path] = (float(match[1]), -path.stat().st_mtime_ns)
    return min(scores, key=scores.__getitem__) if scores else last_checkpoint(run)


def last_checkpoint(run: Path) -> Path:
    """The checkpoint of the last step, or the newest there is where the run was cut short."""
    last = run / "checkpoints" / f"{LAST_NAME}.ckpt"
    if last.exists():
        return last
    return max(run.glob("checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def resolve_checkpoint(name: str | Path | None, root: str | Path = ".") -> Path:
    """The file that "best" (or None), "last" or a path stands for.

    Raises:
        CheckpointError: there is no such file, or no run yet.
    """
    if name in (None, "best"):
        return best_checkpoint(newest_run(root))
    if name == "last":
        return last_checkpoint(newest_run(root))
    path = Path(name).expanduser()
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path.absolute()}")
    return path


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load tensors and plain values, onto the CPU; code in the file is refused, not run.

    Raises:
        CheckpointError: the file is truncated, of another project, or holds more than plain values.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot read checkpoint {path}: {error.strerror or error}"
        ) from error
    except Exception as error:  # zip, pickle and torch each raise their own
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: it is truncated, damaged, or holds code\n"
            "take an earlier checkpoint with --ckpt_path PATH, or train anew"
        ) from error
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(name), kind) for name, kind in PARTS.items()
    ):
        raise CheckpointError(
            f"{path} is a checkpoint of another project or another version of this one\n"
            "chargpt reads the checkpoints that `python -m chargpt fit` writes"
        )
    upgrade(checkpoint)
    return checkpoint


def upgrade(checkpoint: dict[str, Any]) -> None:
    """Give what a checkpoint of version 0.1 holds its names of today, and what it lacks a value."""
    settings = checkpoint["hyper_parameters"]
    rename_ngrams(settings)
    for name, value in dict(ngram_dropout=0.0, second_target=0.0, eps=1e-8).items():
        settings.setdefault(name, value)
    checkpoint.get("datamodule_hyper_parameters", {}).setdefault("order", "random")
    for key in ("state_dict", "current_model_state"):  # the second where weights were averaged
        state = checkpoint.get(key) or {}
        if "gpt.trigram_embedding.table.weight" in state:
            table = state.pop("gpt.trigram_embedding.table.weight")
            state["gpt.ngram_embedding.table.weight"] = table


def rename_ngrams(settings: dict[str, Any]) -> None:
    """Version 0.1 had n-gram embeddings of three characters alone."""
    if "trigram_rows" in settings:
        rows = settings.pop("trigram_rows")
        settings["ngrams"] = None if type(rows) is int and rows == 0 else {3: rows}


def config_of(hyper_parameters: dict[str, Any]) -> GPTConfig:
    """The settings of the network among the hyperparameters of a checkpoint."""
    known = {field.name for field in fields(GPTConfig)}
    return GPTConfig(**{name: hyper_parameters[name] for name in known & hyper_parameters.keys()})


def network_of(checkpoint: dict[str, Any], path: str | Path) -> tuple[GPT, Vocabulary]:
    """Build the network of a checkpoint that has been read, and its vocabulary.

    Raises:
        CheckpointError: its weights, settings and vocabulary do not fit each other.
    """
    prefix = "gpt."
    state = checkpoint["state_dict"]
    try:
        weights = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
        vocabulary = Vocabulary(checkpoint["vocabulary"])
        config = config_of(checkpoint["hyper_parameters"])
        check_sizes(config, weights)
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced at once
            gpt = GPT(config, len(vocabulary))
        gpt.load_state_dict(weights)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()  # torch lists them below a headline
        raise CheckpointError(
            f"{path} does not fit this version of chargpt: {reason}\n"
            "take another checkpoint, or train anew"
        ) from error
    return gpt, vocabulary


def check_sizes(config: GPTConfig, weights: dict[str, torch.Tensor]) -> None:
    """Refuse settings that ask for more memory than the weights beside them have."""
    layers = sum(key.endswith("attention.qkv.weight") for key in weights)
    sizes = {"n_embd": weights["token_embedding.weight"].size(1), "n_layer": layers}
    if config.position == "learned":
        sizes["block_size"] = weights["position_embedding.weight"].size(0)
    if config.ngrams:
        rows = sum(config.ngrams.values())
        if rows != weights["ngram_embedding.table.weight"].size(0):
            raise ValueError(f"ngrams asks for {rows} rows, but its weights have others")
    for name, size in sizes.items():
        if getattr(config, name) != size:
            raise ValueError(f"{name} is {getattr(config, name)}, but its weights have {size}")
