"""import: a checkpoint of nanoGPT becomes a run under lightning_logs."""

import shutil
import sys
from pathlib import Path

from chargpt.checkpoints import FOLDER, LAST, new_run, write_checkpoint
from chargpt.cli.parsing import command_parser, parse_or_exit
from chargpt.export.from_nanogpt import convert
from chargpt.model import UserError


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
    config = parse_or_exit(parser, lambda: parser.parse_args(args))
    paths = (Path(name).expanduser() for name in (config.ckpt, config.meta))
    checkpoint = convert(*paths)
    folder = new_run(".")
    path = folder / FOLDER / LAST
    try:
        write_checkpoint(checkpoint, path)
    except UserError:
        shutil.rmtree(folder)
        raise
    print(f"wrote {path}", file=sys.stderr)
    print(f"corpus {checkpoint['datamodule_hyper_parameters']['corpus']}", file=sys.stderr)
