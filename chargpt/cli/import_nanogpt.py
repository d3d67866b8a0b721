"""import: a checkpoint of nanoGPT becomes a run under lightning_logs."""

import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from chargpt.atomic_file import atomic_write
from chargpt.checkpoints import LAST_NAME, LOGS, new_run
from chargpt.cli.parsing import checked, command_parser
from chargpt.export.from_nanogpt import checkpoint_of


def run(command: str, args: list[str]) -> None:
    """Parse the arguments of `import` and do what they say."""
    parser = command_parser(command)
    parser.add_argument("ckpt", type=str, help="nanoGPT's checkpoint, out/ckpt.pt.")
    parser.add_argument(
        "--meta",
        type=str,
        required=True,
        help="Its characters: meta.pkl in the folder of the data it was trained on.",
    )
    config = checked(parser, lambda: parser.parse_args(args))
    paths = (Path(name).expanduser() for name in (config.ckpt, config.meta))
    checkpoint = checkpoint_of(*paths)
    checkpoint["pytorch-lightning_version"] = version("lightning")  # of the format: validate asks
    folder = new_run(Path(LOGS))
    path = folder / "checkpoints" / f"{LAST_NAME}.ckpt"
    try:
        with atomic_write(path) as file:
            torch.save(checkpoint, file)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # no folder of a run of which nothing came
        raise
    print(f"wrote {path}", file=sys.stderr)
    print(f"corpus {checkpoint['datamodule_hyper_parameters']['corpus']}", file=sys.stderr)
