"""Dispatches commands and turns user errors into one- or two-line messages."""

import atexit
import difflib
import gc
import os
import sys
import warnings
from importlib import import_module
from typing import Any, NoReturn

import chargpt

COMMANDS = {  # each is a function `run(command, args)` in the module that is named
    "fit": ("train", "Train a model, or resume with --ckpt_path last."),
    "validate": ("train", "Print the loss of a checkpoint on the validation split of the text."),
    "test": ("train", "Print the loss of a checkpoint on the test split of the text."),
    "predict": ("predict", "Generate text with a checkpoint, to standard output."),
    "export": ("export", "Export a checkpoint as a web page, a Hugging Face model, or ONNX."),
    "import": ("import_nanogpt", "Import a checkpoint of nanoGPT as a run."),
}
SYNONYMS = {"train": "fit", "generate": "predict"}


def main(args: list[str] | None = None) -> None:
    """Run a command; `args` are those after `python -m chargpt`."""
    command, *rest = (sys.argv[1:] if args is None else args) or [""]
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    atexit.register(gc.freeze)  # or Python collects garbage in all libraries at exit, for a second
    if command in ("-h", "--help"):
        print("usage: python -m chargpt COMMAND [options]\n\nA character-level GPT.\n\ncommands:")
        for name, (_, description) in COMMANDS.items():
            print(f"  {name:10}{description}")
        print("\npython -m chargpt COMMAND --help lists the options of a command.")
    elif command == "--version":
        print(f"chargpt {chargpt.__version__}")
    elif command not in COMMANDS:
        refuse_command(command)
    else:
        with warnings.catch_warnings():
            warnings.showwarning = print_warning
            sys.path.append(folder := os.getcwd())  # a user's own classes, as with `python -m`
            module = import_module(f"chargpt.cli.{COMMANDS[command][0]}")
            from chargpt.model import UserError

            try:
                module.run(command, rest)
            except (UserError, MemoryError) as error:
                fail(str(error) or "out of memory")
            finally:
                sys.path.remove(folder)


def refuse_command(command: str) -> NoReturn:
    misplaced = not command or command.startswith("-")
    problem = "the command comes first" if misplaced else f"there is no command {command[:80]!r}"
    near = difflib.get_close_matches(SYNONYMS.get(command, command), COMMANDS)
    hint = f"choose one of {', '.join(COMMANDS)}; python -m chargpt --help explains them"
    fail(f"{problem}; {f'did you mean {near[0]}?' if near else hint}", status=2)


def fail(message: str, status: int = 1) -> NoReturn:
    """Exit with at most two lines on standard error, printable whatever they quote."""
    lines = [line[:600] for line in message.strip().splitlines() if line.strip()][:2]
    plain = ("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines)
    print("error: " + "\n".join(plain), file=sys.stderr)
    raise SystemExit(status)


def print_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Print a warning in one line, unless it is a library's hint that does not apply here."""
    text = " ".join(str(message).split())
    hints = ("PossibleUserWarning", "DeprecationWarning", "FutureWarning")
    others = ("`IterableDataset` has `__len__`", "callbacks used to create the checkpoint")
    if not category.__name__.endswith(hints) and not any(part in text for part in others):
        from tqdm import tqdm

        tqdm.write(f"warning: {text}", file=sys.stderr)  # above a progress bar
