"""Fixtures for all tests: a tiny text, a tiny run, no network, and none of the user's folders."""

import contextlib
import functools
import io
import os
import random
import socket
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import docstring_parser
import hypothesis
import pytest
import torch

from chargpt.cli.main import main
from chargpt.data import texts
from chargpt.training import display

# The same examples each time; for others: pytest --hypothesis-profile=default
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

WORDS = [
    "the",
    "a",
    "king",
    "queen",
    "speaks",
    "walks",
    "sings",
    "to",
    "of",
    "and",
    "but",
    "never",
    "always",
    "crown",
    "sword",
    "garden",
    "night",
]

TINY = """\
seed_everything: 7
trainer: {max_steps: 8, val_check_interval: 4, log_every_n_steps: 2, accelerator: cpu}
model: {n_embd: 8, n_head: 2, n_layer: 1, dropout: 0.1, lr: 0.003}
data: {corpus: text.txt, block_size: 8, batch_size: 4, test_fraction: 0.1}
"""


class Result(NamedTuple):
    """The exit status, standard output and standard error of a command."""

    status: int
    out: str
    err: str


def assert_error(result: Result, status: int, *words: str) -> None:
    """One or two lines at the end of standard error say what is wrong."""
    assert "Traceback" not in result.err, result.err
    assert result.status == status, result.err
    lines = result.err.splitlines()
    first = next((n for n, line in enumerate(lines) if line.startswith("error: ")), None)
    assert first is not None, result.err
    assert len(lines) - first <= 2, result.err
    message = "\n".join(lines[first:])
    for word in words:
        assert word in message


@pytest.fixture(autouse=True, scope="session")
def isolated(tmp_path_factory):
    """Isolate the tests from the network and the user's folders; one thread, since matrices are tiny."""
    ask = socket.getaddrinfo

    def getaddrinfo(host, *args, **kwargs):
        if host in (None, "", "localhost", "127.0.0.1", "::1", socket.gethostname()):
            return ask(host, *args, **kwargs)
        raise socket.gaierror("there is no network in tests")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        patch.setenv("CHARGPT_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(display, "SAMPLE_CHARS", 20)
        # Each parser reads the source of the same classes, more than half of a command's time.
        parse = functools.cache(docstring_parser.parse_from_object)
        patch.setattr(docstring_parser, "parse_from_object", parse)
        torch.set_num_threads(1)
        yield


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty folder that replaces the user's cache; no environment variable names another."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(texts, "cache_dir", lambda: folder)
    monkeypatch.delenv("CHARGPT_DATA_DIR", raising=False)
    return folder


@pytest.fixture
def data_dir(tmp_path) -> Path:
    return tmp_path / "data"


@pytest.fixture(scope="session")
def text() -> str:
    """2,000 characters, 35 distinct, the same each time."""
    random.seed(1)
    lines = (" ".join(random.choices(WORDS, k=6)).capitalize() + ".\n" for _ in range(80))
    return "".join(lines)[:2000]


@pytest.fixture(scope="session")
def command() -> Callable[..., Result]:
    """Run a whole command in this process: importing Lightning for each would take seconds."""

    def run(folder: Path, *args: str) -> Result:
        before, out, err, status = os.getcwd(), io.StringIO(), io.StringIO(), 0
        os.chdir(folder)
        try:
            with (
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("default")  # repeats them
                try:
                    main(list(args))
                except SystemExit as stop:
                    status = stop.code or 0
                except Exception:
                    traceback.print_exc()
                    status = 1
        finally:
            os.chdir(before)
        return Result(status, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def folder(tmp_path, text) -> Path:
    """A folder with a text and a configuration that trains a tiny model on it."""
    return write_example(tmp_path, text)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, text, command) -> Path:
    """Such a folder with a finished run; tests must not change it."""
    folder = write_example(tmp_path_factory.mktemp("trained"), text)
    result = command(folder, "fit", "--config", "tiny.yaml")
    assert result.status == 0, result.err
    return folder


def write_example(folder: Path, text: str) -> Path:
    (folder / "text.txt").write_text(text, newline="\n")
    (folder / "tiny.yaml").write_text(TINY)
    return folder
