"""Resolving a corpus: named texts, downloads that fail, files and folders."""

import hashlib
import http.server
import os
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
from tiny import expected_ids, open_text, token_files, write

from chargpt.data import texts
from chargpt.model import UserError

pytestmark = pytest.mark.usefixtures("cache")


def read(corpus: Path, data_dir: Path) -> str:
    opened = open_text(str(corpus), data_dir)
    return opened.vocabulary.decode(opened.tokens)


def link(path: Path, target: Path | str) -> None:
    try:
        path.symlink_to(target)
    except OSError:
        pytest.skip("links need a privilege here")


def test_a_relative_path_is_relative_to_the_current_folder(tmp_path, data_dir, monkeypatch):
    write(tmp_path / "a.txt", "some text")
    monkeypatch.chdir(tmp_path)
    source = texts.resolve_corpus("a.txt", data_dir)
    assert (source.name, source.path, source.size) == ("a.txt", tmp_path / "a.txt", 9)


def test_a_folder_is_its_txt_files_in_order_of_their_paths(tmp_path, data_dir):
    folder = tmp_path / "books"
    for name in ("b.txt", "a/z.txt", "a.txt", "C.TXT", "notes.md"):
        write(folder / name, f"<{name}>")
    corpus = open_text(str(folder), data_dir)
    assert corpus.vocabulary.decode(corpus.tokens) == "<C.TXT>\n<a.txt>\n<a/z.txt>\n<b.txt>"
    assert corpus.source.path == folder
    assert (len(corpus.source.files), corpus.source.size) == (4, len(corpus.tokens) - 3)
    assert len(list(folder.rglob("*"))) == 6  # nothing was written there


@pytest.mark.parametrize(
    "hidden", [".ipynb_checkpoints/a.txt", "._a.txt", "__MACOSX/a.txt", "sub/.git/deep/a.txt"]
)
def test_hidden_files_and_folders_are_skipped(tmp_path, data_dir, hidden):
    write(tmp_path / "books/a.txt", "visible")
    write(tmp_path / "books" / hidden, "hidden")
    assert read(tmp_path / "books", data_dir) == "visible"


def test_a_hidden_folder_or_file_that_is_named_is_read(tmp_path, data_dir):
    write(tmp_path / ".books/.a.txt", "hidden")
    write(tmp_path / ".books/b.txt", "visible")
    assert read(tmp_path / ".books", data_dir) == "visible"
    assert read(tmp_path / ".books/.a.txt", data_dir) == "hidden"


def test_a_folder_without_text_files(tmp_path, data_dir):
    write(tmp_path / "books/a.md", "not a .txt file")
    with pytest.raises(UserError, match="no .txt file"):
        open_text(str(tmp_path / "books"), data_dir)


def test_linked_files_and_folders_are_read_once(tmp_path, data_dir):
    write(tmp_path / "books/a/a.txt", "1st")
    write(tmp_path / "elsewhere/deep/b.txt", "2nd")
    write(tmp_path / "c.txt", "3rd")
    link(tmp_path / "books/a/loop", tmp_path / "books")
    for name in ("one", "two"):
        link(tmp_path / "books" / name, tmp_path / "elsewhere")
    for name in ("x.txt", "y.txt"):
        link(tmp_path / "books" / name, tmp_path / "c.txt")
    assert read(tmp_path / "books", data_dir) == "1st\n2nd\n3rd"


def test_a_file_that_ends_without_a_newline_gets_one_before_the_next(tmp_path, data_dir):
    for name, text in dict(a="no", b="yes\n", c="", d="no", e="").items():
        write(tmp_path / f"books/{name}.txt", text)
    assert read(tmp_path / "books", data_dir) == "noyes\nno".replace("no", "no\n", 1) + "\n"


def test_a_byte_order_mark_is_left_out(tmp_path, data_dir):
    for name in ("a", "b"):
        write(tmp_path / f"books/{name}.txt", b"\xef\xbb\xbfcaf\xc3\xa9\n")
    assert read(tmp_path / "books", data_dir) == "café\ncafé\n"


def test_a_dangling_link_is_named(tmp_path, data_dir):
    write(tmp_path / "books/a.txt", "some text")
    link(tmp_path / "books/b.txt", "b.txt")
    with pytest.raises(UserError, match="b.txt is neither a file nor a folder"):
        open_text(str(tmp_path / "books"), data_dir)
    with pytest.raises(UserError, match="there is no text"):
        open_text(str(tmp_path / "books/b.txt"), data_dir)


def test_a_path_that_is_not_utf8(tmp_path, data_dir):
    """Refused only where a run has to record the path: files in a folder may have any name."""
    file = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
    try:
        with open(file, "w") as stream:
            stream.write("some text")
    except OSError:
        pytest.skip("this file system wants UTF-8")
    assert open_text(str(tmp_path), data_dir).tokens.tolist() == expected_ids("some text")
    with pytest.raises(UserError, match=r"caf\\udce9.txt' is not UTF-8\nrename"):
        open_text(os.fsdecode(file), data_dir)


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs devices")
def test_a_device_is_refused(data_dir):
    with pytest.raises(UserError, match="/dev/zero is neither a file nor a folder"):
        open_text("/dev/zero", data_dir)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_opening_it(tmp_path, data_dir):
    os.mkfifo(tmp_path / "pipe.txt")
    for corpus in (tmp_path / "pipe.txt", tmp_path):
        with pytest.raises(UserError, match="neither a file nor a folder"):
            open_text(str(corpus), data_dir)


@pytest.mark.parametrize(
    "name", ["", "no-such-text", "no/such.txt", "~nobody-here/a", "a\0b", "\ud800", "x" * 5000]
)
def test_a_missing_text(data_dir, name):
    write(data_dir / "mine/input.txt", "some text")
    with pytest.raises(UserError) as error:
        open_text(name, data_dir, fallback="python-reference")
    assert repr(name) in str(error.value)
    assert "mine, python-reference, tiny-shakespeare" in str(error.value)


# --- named texts ------------------------------------------------------------------------------


def test_python_reference_is_available_offline(data_dir):
    from pydoc_data.topics import topics

    corpus = open_text("python-reference", data_dir)
    text = corpus.vocabulary.decode(corpus.tokens)
    assert (corpus.source.name, corpus.source.path) == (
        "python-reference",
        data_dir / "python-reference/input.txt",
    )
    assert corpus.source.path.read_bytes() == text.encode()
    assert len(text) == sum(map(len, topics.values())) + len(topics) - 1
    assert all(topic in text for topic in topics.values())
    if sys.version_info[:2] == (3, 11):
        assert (len(text), len(corpus.vocabulary)) == (465_048, 103)


def test_a_named_text_has_its_name_even_if_it_is_given_as_a_path(data_dir):
    path = write(data_dir / "mine/input.txt", "some text")
    assert texts.resolve_corpus(path, data_dir).name == "mine"


def test_a_folder_in_the_data_dir_is_a_named_text(data_dir):
    write(data_dir / "mine/input.txt", "some text")
    corpus = open_text("mine", data_dir)
    assert (corpus.source.name, corpus.source.path) == ("mine", data_dir / "mine/input.txt")
    assert [file.parent for file in token_files(data_dir)] == [data_dir / "tokens"]


SHAKESPEARE = b"ROMEO:\nBut, soft! what light through yonder window breaks?\n" * 5000


class Host(http.server.BaseHTTPRequestHandler):
    """A test double for the server of tiny-shakespeare that can fail in several ways."""

    def do_GET(self):
        fault = self.path.strip("/")
        if fault == "missing":
            return self.send_error(404)
        if fault == "redirect":
            self.send_response(302)
            self.send_header("Location", "/page")
            return self.end_headers()
        if fault == "silent":
            return time.sleep(5)  # in a thread that is never joined
        self.send_response(200)
        body = b"<!doctype html><title>Log in</title>" if fault == "page" else SHAKESPEARE
        body = body[::-1] if fault == "wrong" else body
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "half" else body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def home(monkeypatch):
    """Serves tiny-shakespeare on this machine; returns a function that chooses how it fails."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()

    sha256 = hashlib.sha256(SHAKESPEARE).hexdigest()

    def set_fault(fault: str) -> None:
        url = f"http://127.0.0.1:{server.server_port}/{fault}"
        stub = partial(texts.download, url=url, size=len(SHAKESPEARE), sha256=sha256)
        monkeypatch.setitem(texts.NAMED_TEXTS, "tiny-shakespeare", stub)

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(texts, "TIMEOUT_S", 0.2)
    yield set_fault
    server.shutdown()
    server.server_close()


def test_tiny_shakespeare_is_downloaded_once(data_dir, home, capsys):
    home("whole")
    corpus = open_text("tiny-shakespeare", data_dir, fallback="python-reference")
    assert corpus.source.name == "tiny-shakespeare"
    assert corpus.source.path.read_bytes() == SHAKESPEARE
    assert os.listdir(data_dir / "tiny-shakespeare") == ["input.txt"]
    output = capsys.readouterr()
    assert "downloading http://127.0.0.1:" in output.err and output.out == ""
    home("missing")
    assert open_text("tiny-shakespeare", data_dir).digest == corpus.digest


FAULTS = {
    "missing": "404",
    "silent": "timed out",
    "half": "147,500 bytes",
    "wrong": "295,000 bytes",
    "redirect": "36 bytes",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_download_leaves_nothing(data_dir, home, fault):
    home(fault)
    with pytest.raises(UserError, match=FAULTS[fault]) as error:
        open_text("tiny-shakespeare", data_dir)
    assert f"save it as {data_dir}" in str(error.value)
    assert not data_dir.exists()


FALLBACK = "^tiny-shakespeare is unavailable, so python-reference is used instead"


def test_the_fallback_is_used_with_a_warning(data_dir, home):
    home("missing")
    with pytest.warns(UserWarning, match=FALLBACK + ".*404.*save it as"):
        corpus = open_text("tiny-shakespeare", data_dir, fallback="python-reference")
    assert corpus.source.name == "python-reference"
    assert corpus.digest == open_text("python-reference", data_dir).digest


def test_a_local_copy_needs_no_network_and_no_warning(data_dir, home):
    home("missing")
    write(data_dir / "tiny-shakespeare/input.txt", SHAKESPEARE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpus = open_text("tiny-shakespeare", data_dir, fallback="python-reference")
    assert corpus.tokens.tolist() == expected_ids(SHAKESPEARE.decode())


def test_a_text_is_not_its_own_fallback(data_dir, home):
    home("missing")
    with pytest.raises(UserError, match="404"):
        open_text("tiny-shakespeare", data_dir, fallback="tiny-shakespeare")


# --- the data directory -----------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="the expected paths are POSIX ones")
@pytest.mark.parametrize("xdg, expected", [("", "/home/me/.cache"), ("/elsewhere", "/elsewhere")])
def test_the_cache_folder(monkeypatch, xdg, expected):
    monkeypatch.undo()  # the real cache_dir
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert texts.cache_dir() == Path(expected, "chargpt")


def test_the_default_data_dir_is_the_cache_folder(cache):
    assert texts.resolve_corpus("python-reference").path == cache / "python-reference/input.txt"


def test_the_environment_names_the_data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("CHARGPT_DATA_DIR", str(tmp_path / "mine"))
    open_text("python-reference")
    assert (tmp_path / "mine/python-reference/input.txt").is_file()
