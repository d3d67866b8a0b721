"""export: a checkpoint as a self-contained HTML page, for Hugging Face, or as ONNX."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Literal

from chargpt.checkpoints import build_network, read_checkpoint, resolve_checkpoint
from chargpt.cli.parsing import add_ckpt_path, command_parser, parse_or_exit
from chargpt.model import UserError
from chargpt.text_generator import TextGenerator

FORMATS = {name: f"chargpt.export.{name}" for name in ("page", "huggingface", "onnx")}


def run(command: str, args: list[str]) -> None:
    """Parse the arguments of `export` and call the `export` function of the format's module."""
    parser = command_parser(command)
    parser.add_argument(
        "--to",
        type=Literal[tuple(FORMATS)],  # type: ignore[valid-type]
        required=True,
        help="page: a self-contained HTML page that generates text; huggingface: a model folder; "
        "onnx: a file for other runtimes.",
    )
    parser.add_argument("--output", type=str, required=True, help="The file or folder to write.")
    add_ckpt_path(parser)
    parser.add_argument(
        "--export.dtype",
        type=Literal["float16", "float32"],
        default="float16",
        help="Of a page's weights; float32 is exact, and twice as large.",
    )
    config = parse_or_exit(parser, lambda: parser.parse_args(args))
    path = resolve_checkpoint(config.ckpt_path)
    print(f"checkpoint {path}", file=sys.stderr)
    checkpoint = read_checkpoint(path)
    generator = TextGenerator(*build_network(checkpoint, path)).eval()
    module = import_module(FORMATS[config.to])
    output = Path(config.output).expanduser()
    try:
        result = module.export(generator, checkpoint, output, config.export.dtype)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error
    print(f"wrote {config.output}{f': {result}' if result else ''}", file=sys.stderr)
