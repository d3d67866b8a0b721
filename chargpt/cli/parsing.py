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
    r"unrecognized arguments: (\S+)"
    r"|Group '(?P<group>.*?)' does not accept option '(?P<name>.*?)'"
    r"|[Oo]ption '(.*?)' is not accepted"
)


def shipped_configs() -> dict[str, Path]:
    """The configurations of the package by name; in a clone their folder is beside it."""
    package = Path(__file__).parents[1]
    folders = (package / "configs", package.parent / "configs")
    found = next((folder for folder in folders if folder.is_dir()), package)
    return {path.stem: path for path in sorted(found.glob("*.yaml"), key=lambda path: path.stem)}


def find_config(name: str) -> str:
    """The path of a configuration file, or of the shipped configuration of that name."""
    path = Path(name).expanduser()
    if not path.is_file():
        path = shipped_configs().get(name, path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        shipped = f"shipped configurations: {', '.join(shipped_configs())}"
        fail(f"cannot read --config {name}: {reason}\n{shipped}", status=2)
    with suppress(yaml.YAMLError, AttributeError, KeyError):  # jsonargparse says what is wrong
        for group in ("trainer", "model", "data", "generate"):  # but it would drop a value
            if not isinstance(value := yaml.safe_load(text).get(group, {}), dict):
                fail(f"{path}: {group} is {value}; it must be a mapping of settings", status=2)
    return str(path)


def find_configs(args: list[str]) -> list[str]:
    """The arguments with configuration files first: flags override them in any order."""
    configs = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    configs.add_argument("-c", "--config", action="append", default=[])
    try:
        known, flags = configs.parse_known_args(args)
    except argparse.ArgumentError:
        fail("--config needs the name of a file", status=2)
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
    parser.add_argument(
        "--ckpt_path",
        type=str,
        default="best",
        help="A checkpoint: a path, or best or last of the newest run in ./lightning_logs.",
    )


def parse_or_exit(parser: ArgumentParser, parse: Callable[[], Namespace]) -> Namespace:
    """The result of `parse`; an invalid option ends the process with a plain message."""
    try:
        return parse()
    except (ArgumentError, argparse.ArgumentError, TypeError) as error:
        fail(explain(parser, str(error)), status=2)


def explain(parser: ArgumentParser, message: str) -> str:
    """jsonargparse's message in a line or two; for an unknown name, with the nearest known one."""
    if match := UNKNOWN.search(message):
        name = ".".join(filter(None, match.groups())).split("=")[0]
        hyphens, name = "--" * name.startswith("-"), name.lstrip("-")
        known = list(parser.get_defaults().keys())
        if near := nearest(name, known):
            return f"there is no option {hyphens}{name}\ndid you mean {hyphens}{near}?"
        if hyphens:
            return f"there is no option --{name}\n--help after the command lists them all"
        if "unrecognized" in message and "generate.prompt" in known:
            return f'unexpected argument {name}\ndid you mean --generate.prompt "{name}"?'
    if "Key must be a string" in message:  # ngrams of a configuration for training
        return "the configuration file has settings of other commands"
    if "expected one argument" in message:
        flag = message.removeprefix("argument ").partition(":")[0]
        return f"{flag} needs a value\nwrite {flag}=VALUE if the value begins with a hyphen"
    if match := re.search(r"arguments are required: (\w+)$", message):
        return f"--{match[1]} is required"
    if match := re.match(r'Parser key "(.+?)":\s*(.*)', message, re.DOTALL):
        return f"--{match[1]}: {explain_value(match[2])}"
    return " ".join(message.split())


def explain_value(problem: str) -> str:
    """jsonargparse's explanation of an invalid value in a few words."""
    value = (re.findall(r"value: (.*)", problem) or [""])[-1]
    if choices := re.findall(r"[\w.-]+", ",".join(re.findall(r"Literal\[(.*?)\]", problem))):
        return f"{value} is not one of {', '.join(dict.fromkeys(choices))}"
    if match := re.search(r"Expected a <class '(int|float|bool)'>", problem):
        kinds = {"int": "a whole number", "float": "a number", "bool": "true or false"}
        return f"{value} is not {kinds[match[1]]}"
    return " ".join(problem.split())


def nearest(wrong: str, names: list[str]) -> str | None:
    """The nearest name, by its last part too: people type --lr."""
    by_last = {name.rpartition(".")[2]: name for name in names}
    if near := difflib.get_close_matches(wrong, names, n=1, cutoff=0.8):
        return near[0]
    near = difflib.get_close_matches(wrong.rpartition(".")[2], by_last, n=1, cutoff=0.7)
    return by_last[near[0]] if near else None
