"""What the commands share of parsing: what is wrong with an option, in plain words."""

import argparse
import difflib
import re
from collections.abc import Callable
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from chargpt.cli.main import COMMANDS, fail

set_parsing_settings(
    docstring_parse_attribute_docstrings=True,  # a setting's sentence stands below it
    # What a configuration file may name to be imported: no code comes in with a file of settings.
    import_path_denylist=["*"],
    import_path_allowlist=["chargpt", "lightning", "pytorch_lightning", "torch", "torchmetrics"],
)

DEEPEST = 20  # collections in collections of a configuration file
UNION = "Does not validate against any of the Union"
UNKNOWN = re.compile(
    r"unrecognized arguments: (\S+)"
    r"|Group '(?P<group>.*?)' does not accept option '(?P<name>.*?)'"
    r"|[Oo]ption '(.*?)' is not accepted"
)


def shipped_configs() -> dict[str, Path]:
    """The configurations that come with the package, by name; in a clone they lie beside it."""
    package = Path(__file__).parents[1]
    folders = (package / "configs", package.parent / "configs")
    found = next((folder for folder in folders if folder.is_dir()), package)
    return {path.stem: path for path in sorted(found.glob("*.yaml"), key=lambda path: path.stem)}


def find_config(name: str) -> str:
    """A file, or else the shipped configuration of that name."""
    if Path(name).expanduser().is_file():
        return name
    return str(shipped_configs().get(name, name))


def split_configs(args: list[str]) -> tuple[list[str], list[str]]:
    """The configuration files that are typed, and everything else."""
    split = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    split.add_argument("-c", "--config", action="append", default=[])
    try:
        known, typed = split.parse_known_args(args)
    except argparse.ArgumentError:
        fail("--config needs the name of a file", status=2)
    return [find_config(name) for name in known.config], typed


def read_config(name: str) -> str:
    """The text of a configuration file: YAML, without aliases, which can grow endlessly."""
    problem, depth = "", 0
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8")
        for event in yaml.parse(text):  # before anything is built of it
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
                problem = "has aliases" if depth <= DEEPEST else "is nested too deeply"
                break
        if not problem and not isinstance(yaml.safe_load(text), dict):
            problem = "holds no settings"
    except FileNotFoundError:
        known = ", ".join(shipped_configs())
        fail(f"{name}: there is no such configuration file; shipped ones: {known}", status=2)
    except IsADirectoryError:
        fail(f"{name}: is a folder, not a configuration file", status=2)
    except yaml.YAMLError as error:
        fail(f"{name}: {' '.join(str(error).split())}", status=2)
    except UnicodeDecodeError:
        fail(f"{name}: is not UTF-8 text", status=2)
    except (LookupError, AttributeError) as error:  # PyYAML's, for a value that is not of its tag
        fail(f"{name}: holds a value that cannot be read: {error}", status=2)
    except (OSError, ValueError) as error:  # a null character in the name is a ValueError
        fail(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}", status=2)
    if problem:
        fail(f"{name}: {problem}; it must hold plain settings, as name: value", status=2)
    return text


def command_parser(command: str) -> ArgumentParser:
    """The parser of a command that needs no Lightning."""
    return ArgumentParser(
        prog=f"python -m chargpt {command}",
        description=COMMANDS[command][1],
        exit_on_error=False,
        allow_abbrev=False,  # a misspelt flag is an error, not another flag
    )


def add_ckpt_path(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--ckpt_path",
        type=str,
        default="best",
        help="A checkpoint: a path, or best or last of the newest run under ./lightning_logs.",
    )


def checked(parser: ArgumentParser, parse: Callable[[], Namespace], source: str = "") -> Namespace:
    """What `parse` gives; where it fails, an error of a line or two that names the source."""
    try:
        return parse()
    except (ArgumentError, TypeError) as error:
        fail(source + explain(parser, str(error)), status=2)


def explain(parser: ArgumentParser, message: str) -> str:
    """jsonargparse's message in one line; where a name is unknown, with the nearest known one."""
    if match := UNKNOWN.search(message):
        typed = ".".join(filter(None, match.groups()))
        name, hyphens = typed.split("=")[0].lstrip("-"), "--" if typed.startswith("-") else ""
        if near := nearest(name, list(parser.get_defaults().keys())):
            return f"there is no option {hyphens}{name}\ndid you mean {hyphens}{near}?"
        if hyphens:
            return (
                f"there is no option {typed}\n--help after the command explains all that there are"
            )
    key, _, alternatives = message.partition(UNION)
    if alternatives:  # what stands first in a union of types is what was meant
        first = re.split(r"\n\s*- ", alternatives.partition("Errors:")[2])[1]
        value = message.rpartition("Given value: ")[2]
        message = f"{key} {first}" + ("" if "Namespace(" in value else f". Got value: {value}")
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", " ".join(message.split()))


def nearest(wrong: str, names: list[str]) -> str | None:
    """The nearest name, by its last part too: people type --lr."""
    by_last = {name.rpartition(".")[2]: name for name in names}
    group, _, last = wrong.rpartition(".")
    for known in (
        {n.rpartition(".")[2]: n for n in names if n.rpartition(".")[0] == group},
        by_last,
    ):
        if near := difflib.get_close_matches(last, known, n=1, cutoff=0.7):
            return known[near[0]]
    return None
