"""Which command is run, and how it ends: errors that a user can cause are a line or two."""

import atexit
import difflib
import gc
import os
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import chargpt

COMMANDS = {  # each is a function `run(command, args)` in the module that is named
    "fit": ("train", "Train a model, or resume with --ckpt_path last."),
    "validate": ("train", "Print a checkpoint's loss on the part of the text kept to validate on."),
    "test": ("train", "Print a checkpoint's loss on the part of the text kept to test on."),
    "predict": ("predict", "Write text with a checkpoint, to standard output."),
    "export": ("export", "Turn a checkpoint into a page that writes, or a Hugging Face model."),
    "import": ("import_nanogpt", "Make a run of a checkpoint of nanoGPT."),
}


def main(args: list[str] | None = None) -> None:
    """Run a command; `args` are those after `python -m chargpt`."""
    command, *rest = sys.argv[1:] if args is None else args or [""]
    if sys.stderr is None:  # closed by the shell: what is said there must not land elsewhere
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        if command in ("validate", "test", "predict"):
            fail("standard output is closed: there is nowhere to write to")
        sys.stdout = sys.stderr
    warnings.showwarning = show_warning  # type: ignore[assignment]
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # none of torch's C++ either
    atexit.register(gc.freeze)  # else Python looks for garbage in all libraries, for a second
    if command in ("-h", "--help"):
        print_help()
    elif command == "--version":
        print(f"chargpt {chargpt.__version__}")
    elif command in COMMANDS:
        module = import_module(f"chargpt.cli.{COMMANDS[command][0]}")
        try:
            module.run(command, rest)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except (ValueError, OSError, MemoryError) as error:  # anything else is a bug
            fail(str(error) or type(error).__name__)
    else:
        refuse_command(command)


def print_help() -> None:
    print("usage: python -m chargpt COMMAND [options]\n\nA character-level GPT.\n\ncommands:")
    for command, (_, description) in COMMANDS.items():
        print(f"  {command:10}{description}")
    print("\npython -m chargpt COMMAND --help explains the options of a command.")


def refuse_command(command: str) -> NoReturn:
    choice = f"one of {', '.join(COMMANDS)}; python -m chargpt --help says more"
    if not command:
        fail(f"a command is missing: {choice}", status=2)
    if command.startswith("-"):
        fail(f"the command comes first, options follow: {choice}", status=2)
    near = difflib.get_close_matches(command, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else choice
    fail(f"there is no command {shortened(repr(command), 80)}; {hint}", status=2)


def fail(message: str, status: int = 1) -> NoReturn:
    """End with at most two lines on standard error, printable whatever they quote."""
    lines = [shortened(line, 600) for line in message.strip().splitlines() if line.strip()][:2]
    plain = ("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines)
    print("error: " + "\n".join(plain), file=sys.stderr)
    raise SystemExit(status)


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + "..."


def show_warning(
    message: Warning | str, category: type[Warning], filename: str, *_: object
) -> None:
    """In one line, and only what is ours: Lightning's hints do not fit a text without epochs."""
    if Path(__file__).parents[1] in Path(filename).parents:
        print(f"warning: {message}", file=sys.stderr)
