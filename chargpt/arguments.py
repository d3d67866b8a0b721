"""What is typed, what configuration files say, and what is wrong with either, in plain words."""

import difflib
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import yaml
from lightning.pytorch.cli import LightningArgumentParser

COMMANDS = {
    "fit": "Train a model, or go on with --ckpt_path last.",
    "validate": "Print the loss of a checkpoint on the part of the text that is kept to validate on.",
    "test": "Print the loss of a checkpoint on the part of the text that is kept to test on.",
    "predict": "Write text with a checkpoint, to standard output.",
}

LINKS = {  # given once, known to all who need it
    "model.block_size": "data.block_size",
    "data.seed": "seed_everything",
    "model.seed": "seed_everything",
}

MAX_CONFIG_BYTES = 1 << 16
MAX_CONFIG_DEPTH = 100  # of brackets; PyYAML takes the square of it, or crashes
MAX_CONFIG_NODES = 10_000  # with aliases counted as often as they are used


def command_of(args: list[str]) -> str:
    """The command that is typed; empty where only --help is asked for."""
    first = args[0] if args else ""
    if first in COMMANDS:
        return first
    if first in ("-h", "--help"):
        return ""
    choice = "one of fit, validate, test and predict; python -m chargpt --help says more"
    if not first:
        fail(f"a command is missing: {choice}", status=2)
    if first.startswith("-"):
        fail(f"the command comes first, options follow: {choice}", status=2)
    near = difflib.get_close_matches(first, COMMANDS, n=1)
    fail(f"there is no command {shortened(repr(first))}; did you mean {near[0] if near else choice}?", status=2)


def split_configs(args: list[str]) -> tuple[list[str], list[str]]:
    """Separate the values of --config from all other arguments, in their order."""
    configs, typed = [], []
    rest = iter(args)
    for arg in rest:
        if arg in ("-c", "--config"):
            configs.append(next(rest, ""))
        elif arg.startswith("--config="):
            configs.append(arg.removeprefix("--config="))
        else:
            typed.append(arg)
    return configs, typed


def read_config(name: str) -> str:
    """The text of a configuration file, known to be YAML of a reasonable size that holds settings."""

    def refuse(reason: str) -> NoReturn:
        fail(f"{name}: {reason}", status=2)

    if not name:
        fail("--config needs the name of a file", status=2)
    try:
        data = Path(name).expanduser().read_bytes()
    except FileNotFoundError:
        refuse("there is no such configuration file")
    except IsADirectoryError:
        refuse("is a folder, not a configuration file")
    except (OSError, ValueError) as error:  # a null character in the name is a ValueError
        refuse(f"cannot be read: {getattr(error, 'strerror', None) or error}")
    if len(data) > MAX_CONFIG_BYTES:
        refuse(f"{len(data):,} bytes are too many for a configuration file")
    try:
        text = data.decode("utf-8")
        opened = itertools.accumulate((c in "[{") - (c in "]}") for c in text)
        if max(opened, default=0) > MAX_CONFIG_DEPTH:
            refuse("is nested too deeply")
        root = yaml.compose(text, yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            refuse("holds no settings, as name: value")
        if sum(1 for _ in itertools.islice(nodes(root), MAX_CONFIG_NODES)) == MAX_CONFIG_NODES:
            refuse("holds too much, or aliases without end")
        yaml.safe_load(text)
    except UnicodeDecodeError:
        refuse("is not UTF-8 text")
    except RecursionError:
        refuse("is nested too deeply")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        refuse(f"{f'line {mark.line + 1}: ' if mark else ''}{getattr(error, 'problem', None) or error}")
    return text


def nodes(root: yaml.Node) -> Iterator[yaml.Node]:
    """All parts of a YAML document, what an alias stands for as often as it is used."""
    waiting = [root]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, yaml.MappingNode):
            waiting += itertools.chain.from_iterable(node.value)
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


class Parser(LightningArgumentParser):
    """Says in a line or two what is wrong, with the nearest valid name, instead of the whole usage."""

    source = ""  # of all parsers at once: a class in a configuration gets one of its own

    def check(self, source: str, config: str) -> None:
        """Parse a configuration alone, so that an error can name where it comes from."""
        Parser.source = f"{source}: "
        try:
            groups = yaml.safe_load(config)
            if misplaced := COMMANDS.keys() & groups.keys():
                self.error(f"settings stand at the top of the file, not under {misplaced.pop()}:")
            for name in ("trainer", "model", "data", "generate"):
                if not isinstance(groups.get(name, {}), dict):
                    self.error(f"{name} is {shortened(repr(groups[name]))}; it must hold settings, as name: value")
            for target, link in LINKS.items():
                group, name = target.split(".")
                if name in groups.get(group, {}):
                    self.error(f'Linked "{target}" must be given via "{link}"')
            # jsonargparse looks over a null that must not be, unless told
            self.validate(self.parse_string(config), skip_unset=False)
        except TypeError as error:
            self.error(str(error))
        finally:
            Parser.source = ""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", self)
        fail(self.source + parser.in_plain_words(message), status=2)

    def in_plain_words(self, message: str) -> str:
        if match := re.match(r"unrecognized arguments: (\S+)", message):
            flag, *_ = match[1].split("=")
            if flag.endswith((".yaml", ".yml")):
                return f"{flag} belongs to no option\ndid you mean --config {flag}?"
            if not flag.startswith("-"):
                return f"{flag!r} belongs to no option\neach option takes one value; quote what has spaces in it"
            return f"there is no option {flag}{self.suggestion(flag.lstrip('-'), '--')}"
        if match := re.match(r"(?:Group '(.*?)'|Subcommand '.*?') does not accept option '(.*?)'", message):
            key = ".".join(filter(None, match.groups()))
            return f"there is no setting {key}{self.suggestion(key)}"
        if match := re.match(r"Option '(.*?)' is not accepted", message):
            return f"there is no setting {match[1]}{self.suggestion(match[1])}"
        if match := re.match(r"argument (?:-c/)?(\S+): expected one argument", message):
            return f"{match[1]} needs a value\none that begins with a hyphen is given as {match[1]}=VALUE"
        if match := re.match(r'Linked "(.*)" must be given via "(.*)"', message):
            return f"{match[1]} cannot be set: it follows {match[2]}"
        if match := re.match(r'Parser key "(.*?)":(.*)', message, re.DOTALL):
            return wrong_value(match[1], match[2])
        return message

    def suggestion(self, wrong: str, prefix: str = "") -> str:
        """The nearest name of the same group; else of any, by its last part too: people type --lr."""
        names = [action.dest for action in self._actions]
        group, _, last = wrong.rpartition(".")
        same_group = [name for name in names if group and name.rpartition(".")[0] == group]
        by_last = {name.rpartition(".")[2]: name for name in same_group or names}
        near = [by_last[name] for name in difflib.get_close_matches(last, by_last, n=1, cutoff=0.7)]
        near = near or difflib.get_close_matches(wrong, names, n=1, cutoff=0.85)
        if near:
            return f"\ndid you mean {prefix}{near[0]}?"
        if 0 < len(same_group) < 40:
            return f"\n{group} has {', '.join(by_last)}"
        return "\n--help after the command explains all that there are"


def wrong_value(key: str, reason: str) -> str:
    """What jsonargparse says about a value, in fewer words and without the names of Python's types."""
    if match := re.search(r"- (Import path .*|Expected a dot import path string: (.*)|Problem with .*)", reason):
        return f"{key}: " + (f"there is no class {match[2]}" if match[2] else match[1])
    value = re.search(r"(?:Got|Given) value: (.*)", reason)
    types = re.search(r"Subtypes: \[(.*)\]", reason) or re.search(r"Expected an? (.*?)\. Got value", reason)
    if not value or not types:
        return f"{key}: " + reason.strip().splitlines()[0]
    words = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "NoneType": "null"}
    allowed = re.sub(r"<class '(?:\w+\.)*(\w+)'>", lambda match: words.get(match[1], match[1]), types[1])
    allowed = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", allowed)
    return f"{key} is {shortened(value[1])}; it must be {allowed}"


def shortened(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[:length] + "..."


def fail(message: str, status: int = 1) -> NoReturn:
    lines = [shortened(line, 600) for line in message.strip().splitlines() if line.strip()][:2]
    plain = ("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines)
    print("error: " + "\n".join(plain), file=sys.stderr)
    raise SystemExit(status)
