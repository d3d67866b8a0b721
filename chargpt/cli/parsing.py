"""What the commands share: parsers, shipped configurations, and plain words for wrong options."""

import argparse
import difflib
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from chargpt.cli.main import COMMANDS, fail

# A setting's description is the string below its field.
set_parsing_settings(docstring_parse_attribute_docstrings=True)

UNKNOWN = re.compile(
    r"unrecognized arguments: (--)?([^\s=]+)"
    r"|Group '(.*?)' does not accept option '(.*?)'"
    r"|[Oo]ption '(.*?)' is not accepted"
)
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}


def shipped_configs() -> dict[str, Path]:
    """The configurations of the package by name; in a clone their folder is beside it."""
    package = Path(__file__).parents[1]
    paths = list(package.glob("configs/*.yaml")) or package.parent.glob("configs/*.yaml")
    return dict(sorted((path.stem, path) for path in paths))


def find_config(name: str) -> str:
    """The path of a configuration file, or of the shipped configuration of that name."""
    path = Path(name).expanduser()
    if not path.is_file():
        path = shipped_configs().get(name, path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        problem = f"cannot read --config {name}: {getattr(error, 'strerror', None) or error}"
        shipped = f"shipped configurations: {', '.join(shipped_configs())}"
        fail(f"{problem if name else '--config needs a file'}\n{shipped}", status=2)
    # jsonargparse says what else is wrong.
    with suppress(yaml.YAMLError, AttributeError, KeyError, RecursionError):
        for group in ("trainer", "model", "data", "generate"):  # but it would drop a value
            if not isinstance(value := yaml.safe_load(text).get(group, {}), dict):
                fail(f"{path}: {group} is {value}; it must be a mapping of settings", status=2)
    return str(path)


def find_configs(args: list[str]) -> list[str]:
    """The arguments with configuration files first: flags override them in any order."""
    configs = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    configs.add_argument("-c", "--config", action="append", nargs="?", const="", default=[])
    known, flags = configs.parse_known_args(args)
    return [*(f"--config={find_config(name)}" for name in known.config), *flags]


def command_parser(command: str) -> ArgumentParser:
    """The parser of a command that needs no Lightning."""
    return ArgumentParser(
        prog=f"python -m chargpt {command}",
        description=COMMANDS[command][1],
        exit_on_error=False,
        allow_abbrev=False,  # a misspelled flag is an error, not a different flag
    )


def add_ckpt_path(parser: ArgumentParser) -> None:
    help = "A checkpoint: a path, or best or last of the newest run in ./lightning_logs."
    parser.add_argument("--ckpt_path", type=str, default="best", help=help)


def parse_or_exit(parser: ArgumentParser, parse: Callable[[], Namespace]) -> Namespace:
    """The result of `parse`; an invalid option ends the process with a plain message."""
    try:
        return parse()
    except (ArgumentError, argparse.ArgumentError, TypeError, RecursionError) as error:
        fail(explain(str(error), list(parser.get_defaults().keys())), status=2)


def explain(message: str, options: list[str]) -> str:
    """jsonargparse's message in a line or two; for an unknown name, with the nearest option."""
    if match := UNKNOWN.search(message):
        hyphens, *names = match.groups(default="")
        name = ".".join(filter(None, names))
        problem = f"there is no option {hyphens}{name}"
        if near := nearest(name, options):
            return f"{problem}\ndid you mean {hyphens}{near}?"
        if hyphens:
            return f"{problem}\n--help after the command lists them all"
        if "unrecognized" in message and "generate.prompt" in options:
            return f'unexpected argument {name}\ndid you mean --generate.prompt "{name}"?'
    if "Key must be a string" in message:  # ngrams of a configuration for training
        return "the configuration file has settings of other commands"
    if match := re.match("argument (.*): expected one argument", message):
        return f"{match[1]} needs a value\nwrite {match[1]}=VALUE if it begins with a hyphen"
    if match := re.match(r'Parser key "(.+?)":(.*)', message, re.DOTALL):
        name, problem = match.groups()
        value = "".join(re.findall(r"value: (.*)", problem)[-1:])
        if choices := dict.fromkeys(re.findall(r"Literal\[(.*?)\]", problem)):
            problem = f"{value} is not one of {', '.join(choices)}"
        elif kind := re.search(r"Expected a <class '(int|float|bool)'>", problem):
            problem = f"{value} is not {KINDS[kind[1]]}"
        message = f"--{name}: {problem}"
    return " ".join(message.split())


def nearest(wrong: str, options: list[str]) -> str | None:
    """The option with the nearest name, or the nearest last part: people type --lr."""
    last_parts = {option.rpartition(".")[2]: option for option in options}
    near = difflib.get_close_matches(wrong, options, n=1, cutoff=0.8)
    if not near:
        near = difflib.get_close_matches(wrong.rpartition(".")[2], last_parts, n=1, cutoff=0.7)
    return last_parts.get(near[0], near[0]) if near else None
