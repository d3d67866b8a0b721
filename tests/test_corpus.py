"""Finding a text: named ones, with what may go wrong on the way to them, files and folders."""

import hashlib
import http.server
import os
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from tiny import expected_ids, open_text, token_files, write

from chargpt.data import corpus as room
from chargpt.data.corpus import CorpusError, FallbackWarning

pytestmark = pytest.mark.usefixtures("cache")


def test_a_relative_path_is_opened_from_where_one_stands(tmp_path, data_dir, monkeypatch):
    write(tmp_path / "a.txt", "some text")
    monkeypatch.chdir(tmp_path)
    corpus = open_text("a.txt", data_dir)
    assert (corpus.name, corpus.path) == ("a.txt", tmp_path / "a.txt")


def test_a_folder_is_its_txt_files_in_the_order_of_their_paths(tmp_path, data_dir):
    folder = tmp_path / "books"
    for name in ("b.txt", "a/z.txt", "a.txt", "C.TXT", "notes.md"):
        write(folder / name, f"<{name}>")
    corpus = open_text(str(folder), data_dir)
    assert corpus.vocabulary.decode(corpus.tokens) == "<C.TXT><a.txt><a/z.txt><b.txt>"
    assert corpus.path == folder
    assert len(list(folder.rglob("*"))) == 6  # nothing came to it


def test_a_folder_without_text(tmp_path, data_dir):
    write(tmp_path / "books/a.md", "no text file")
    with pytest.raises(CorpusError, match="no .txt file"):
        open_text(str(tmp_path / "books"), data_dir)


def test_links_that_go_round_in_circles(tmp_path, data_dir):
    write(tmp_path / "books/a/a.txt", "some text")
    try:
        (tmp_path / "books/a/again").symlink_to(tmp_path / "books")
    except OSError:
        pytest.skip("no links here")
    assert len(open_text(str(tmp_path / "books"), data_dir).tokens) == 9
    (tmp_path / "books/b.txt").symlink_to("b.txt")
    with pytest.raises(CorpusError, match="b.txt can't be read: "):
        open_text(str(tmp_path / "books"), data_dir)
    with pytest.raises(CorpusError, match="there is no text"):
        open_text(str(tmp_path / "books/b.txt"), data_dir)


def test_a_name_that_is_not_utf8(tmp_path, data_dir):
    """Fine within a folder; but where a run would have to record it, it is refused."""
    file = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
    try:
        with open(file, "w") as stream:
            stream.write("some text")
    except OSError:
        pytest.skip("this file system wants UTF-8")
    assert open_text(str(tmp_path), data_dir).tokens.tolist() == expected_ids("some text")
    with pytest.raises(CorpusError, match=r"caf\\udce9.txt' is not UTF-8\nrename"):
        open_text(os.fsdecode(file), data_dir)


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs devices")
def test_a_device_is_refused(data_dir):
    with pytest.raises(CorpusError, match="/dev/zero is neither a file nor a folder"):
        open_text("/dev/zero", data_dir)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_at_once(tmp_path, data_dir):
    os.mkfifo(tmp_path / "pipe.txt")
    for corpus in (tmp_path / "pipe.txt", tmp_path):
        with pytest.raises(CorpusError, match="neither a file nor a folder"):
            open_text(str(corpus), data_dir)


@pytest.mark.parametrize(
    "name", ["", "no-such-text", "no/such.txt", "~nobody-here/a", "a\0b", "\ud800", "x" * 5000]
)
def test_a_text_that_is_not_there(data_dir, name):
    write(data_dir / "mine/input.txt", "some text")
    with pytest.raises(CorpusError) as error:
        open_text(name, data_dir, fallback="python-reference")
    assert repr(name) in str(error.value)
    assert "mine, python-reference, tiny-shakespeare" in str(error.value)


# --- named texts ------------------------------------------------------------------------------


def test_python_reference_is_always_there(data_dir):
    from pydoc_data.topics import topics

    corpus = open_text("python-reference", data_dir)
    text = corpus.vocabulary.decode(corpus.tokens)
    assert (corpus.name, corpus.path) == (
        "python-reference",
        data_dir / "python-reference/input.txt",
    )
    assert corpus.path.read_bytes() == text.encode()
    assert len(text) == sum(map(len, topics.values())) + len(topics) - 1
    assert all(topic in text for topic in topics.values())
    if sys.version_info[:2] == (3, 11):
        assert (len(text), len(corpus.vocabulary)) == (465_048, 103)


def test_a_python_without_its_reference_says_so(data_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # importing it fails
    with pytest.raises(CorpusError, match="this Python comes without pydoc_data"):
        open_text("python-reference", data_dir)


def test_python_reference_is_written_again_if_it_differs(data_dir):
    whole = open_text("python-reference", data_dir)
    write(whole.path, "another text")
    assert open_text("python-reference", data_dir).digest == whole.digest


def test_a_text_of_ones_own_in_the_data_dir(data_dir):
    write(data_dir / "mine/input.txt", "some text")
    corpus = open_text("mine", data_dir)
    assert (corpus.name, corpus.path) == ("mine", data_dir / "mine/input.txt")
    assert [file.parent for file in token_files(data_dir)] == [data_dir / "mine"]


SHAKESPEARE = b"ROMEO:\nBut, soft! what light through yonder window breaks?\n" * 5000


class Home(http.server.BaseHTTPRequestHandler):
    """The public home of tiny-shakespeare, and what may go wrong with it."""

    def do_GET(self):
        fault = self.path.strip("/")
        if fault == "missing":
            return self.send_error(404)
        if fault == "redirect":
            self.send_response(302)
            self.send_header("Location", "/page")
            return self.end_headers()
        if fault == "silent":
            return time.sleep(5)  # in a thread that nobody waits for
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
    """Lets tiny-shakespeare live on this machine; returns a function that sets what goes wrong."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Home)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()

    def set_fault(fault: str) -> None:
        url = f"http://127.0.0.1:{server.server_port}/{fault}"
        monkeypatch.setattr(room, "TINY_SHAKESPEARE_URL", url)

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(room, "TINY_SHAKESPEARE_BYTES", len(SHAKESPEARE))
    monkeypatch.setattr(room, "TINY_SHAKESPEARE_SHA256", hashlib.sha256(SHAKESPEARE).hexdigest())
    monkeypatch.setattr(room, "TIMEOUT_S", 0.2)
    yield set_fault
    server.shutdown()
    server.server_close()


def test_tiny_shakespeare_is_downloaded_once(data_dir, home, capsys):
    home("whole")
    corpus = open_text("tiny-shakespeare", data_dir, fallback="python-reference")
    assert corpus.name == "tiny-shakespeare"
    assert corpus.path.read_bytes() == SHAKESPEARE
    (token_file,) = token_files(data_dir)
    assert sorted(os.listdir(data_dir / "tiny-shakespeare")) == sorted(
        [token_file.name, "input.txt"]
    )
    output = capsys.readouterr()
    assert f"downloading {room.TINY_SHAKESPEARE_URL}" in output.err and output.out == ""
    home("missing")
    assert open_text("tiny-shakespeare", data_dir).digest == corpus.digest


FAULTS = {
    "missing": "404",
    "silent": "timed out",
    "half": "147,500 bytes",
    "wrong": "295,000 bytes",
    "redirect": "a web page",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_download_that_goes_wrong(data_dir, home, fault):
    home(fault)
    with pytest.raises(CorpusError, match=FAULTS[fault]) as error:
        open_text("tiny-shakespeare", data_dir)
    assert f"by hand to {data_dir}" in str(error.value)
    assert not data_dir.exists()


def test_the_fallback_is_used_with_a_warning(data_dir, home):
    home("missing")
    with pytest.warns(FallbackWarning, match="(?s)tiny-shakespeare CAN'T.*python-reference.*404"):
        corpus = open_text("tiny-shakespeare", data_dir, fallback="python-reference")
    assert corpus.name == "python-reference"
    assert corpus.digest == open_text("python-reference", data_dir).digest


def test_a_wrong_local_text_is_never_used_nor_touched(data_dir, home):
    home("whole")
    half = SHAKESPEARE[: len(SHAKESPEARE) // 2]
    path = write(data_dir / "tiny-shakespeare/input.txt", half)
    with pytest.raises(CorpusError) as error:
        open_text("tiny-shakespeare", data_dir)
    assert f"{path} is not tiny-shakespeare: 147,500 bytes" in str(error.value)
    assert "delete it" in str(error.value)
    with pytest.warns(FallbackWarning, match="147,500 bytes"):
        assert open_text("tiny-shakespeare", data_dir, "python-reference").name != path
    assert Path(path).read_bytes() == half


def test_a_good_local_text_needs_no_network_and_no_warning(data_dir, home):
    home("missing")
    write(data_dir / "tiny-shakespeare/input.txt", SHAKESPEARE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpus = open_text("tiny-shakespeare", data_dir, fallback="python-reference")
    assert corpus.tokens.tolist() == expected_ids(SHAKESPEARE.decode())


def test_a_fallback_that_is_the_same_text_is_no_fallback(data_dir, home):
    home("missing")
    with pytest.raises(CorpusError, match="404"):
        open_text("tiny-shakespeare", data_dir, fallback="tiny-shakespeare")


# --- the data directory -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "platform, variable, value, expected",
    [
        ("linux", "XDG_CACHE_HOME", "/elsewhere", "/elsewhere/chargpt"),
        ("linux", "XDG_CACHE_HOME", "", "/home/me/.cache/chargpt"),
        ("darwin", "XDG_CACHE_HOME", "/elsewhere", "/home/me/Library/Caches/chargpt"),
        ("win32", "LOCALAPPDATA", "/local", "/local/chargpt"),
        ("linux", "CHARGPT_DATA_DIR", "/my/data", "/my/data"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="the expected paths are POSIX ones")
def test_default_data_dir(monkeypatch, platform, variable, value, expected):
    monkeypatch.undo()  # the real cache_dir
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "CHARGPT_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert room.default_data_dir() == Path(expected)


def test_the_environment_names_the_data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("CHARGPT_DATA_DIR", str(tmp_path / "mine"))
    open_text("python-reference")
    assert (tmp_path / "mine/python-reference/input.txt").is_file()
