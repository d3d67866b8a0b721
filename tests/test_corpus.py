import errno
import hashlib
import http.server
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chargpt import corpus as room
from chargpt.corpus import CorpusError, FallbackWarning, TokenFileWarning, open_corpus

STRANGE = "naïve\r\n\0\0日本語 🙂e\u0301 \u202eעברית\u200f\ufeff\tend" * 3


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The user's cache, which no test may touch, is a folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(room, "_cache_dir", lambda: folder)
    monkeypatch.delenv("CHARGPT_DATA_DIR", raising=False)
    return folder


@pytest.fixture
def data_dir(tmp_path) -> Path:
    return tmp_path / "data"


def write(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def token_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.tokens*"))


def expected_ids(text: str) -> list[int]:
    ids = {character: id for id, character in enumerate(sorted(set(text)))}
    return [ids[character] for character in text]


# --- what a corpus holds ----------------------------------------------------------------------


def test_a_text_file_is_encoded_as_it_stands(tmp_path, data_dir):
    path = tmp_path / "mine" / "strange.txt"
    write(path, STRANGE)
    corpus = open_corpus(str(path), data_dir)
    assert corpus.tokens.tolist() == expected_ids(STRANGE)
    assert corpus.vocabulary.characters == "".join(sorted(set(STRANGE)))
    assert corpus.tokens.dtype == corpus.vocabulary.dtype == np.uint8
    assert corpus.digest == hashlib.sha256(STRANGE.encode()).hexdigest()
    assert (corpus.name, corpus.path) == (str(path), path)
    with pytest.raises(ValueError, match="read-only"):
        corpus.tokens[0] = 1


def test_nothing_is_written_beside_a_users_file(tmp_path, data_dir, cache):
    path = tmp_path / "mine" / "a.txt"
    write(path, "some text")
    open_corpus(str(path), data_dir)
    assert os.listdir(path.parent) == ["a.txt"]
    assert [file.parent for file in token_files(tmp_path)] == [data_dir / "tokens"]


def test_a_relative_path_is_opened_from_where_one_stands(tmp_path, data_dir, monkeypatch):
    write(tmp_path / "a.txt", "some text")
    monkeypatch.chdir(tmp_path)
    corpus = open_corpus("a.txt", data_dir)
    assert (corpus.name, corpus.path) == ("a.txt", tmp_path / "a.txt")


def test_two_files_of_one_name_keep_apart(tmp_path, data_dir):
    one, two = write(tmp_path / "1/a.txt", "abab"), write(tmp_path / "2/a.txt", "cdcd")
    for _ in range(2):
        assert open_corpus(one, data_dir).vocabulary.characters == "ab"
        assert open_corpus(two, data_dir).vocabulary.characters == "cd"


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 5, 7, 64])
def test_characters_may_lie_across_pieces(tmp_path, data_dir, monkeypatch, piece_bytes):
    monkeypatch.setattr(room, "PIECE_BYTES", piece_bytes)
    corpus = open_corpus(write(tmp_path / "a.txt", STRANGE), data_dir)
    assert corpus.tokens.tolist() == expected_ids(STRANGE)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # a path, the same for all
)
@given(text=st.text(min_size=1), piece_bytes=st.integers(1, 9))
def test_any_text_comes_back(tmp_path, text, piece_bytes):
    text += "ab"  # two different characters at least
    path = write(tmp_path / "any.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "PIECE_BYTES", piece_bytes)
        for file in token_files(tmp_path):
            file.unlink()  # a clock may be too coarse to tell two texts of one size apart
        corpus = open_corpus(path, tmp_path / "data")
    assert corpus.vocabulary.decode(corpus.tokens) == text


@pytest.mark.parametrize("size, dtype", [(256, "uint8"), (257, "uint16"), (65_537, "uint32")])
def test_large_vocabularies(tmp_path, data_dir, size, dtype):
    text = "bb" + "".join(map(chr, range(0x10000, 0x10000 + size - 2))) + "aa"
    corpus = open_corpus(write(tmp_path / "a.txt", text), data_dir)
    assert corpus.tokens.dtype == np.dtype(dtype)
    assert len(corpus.vocabulary) == size
    assert corpus.tokens.tolist() == expected_ids(text)


def test_a_folder_is_its_txt_files_in_the_order_of_their_paths(tmp_path, data_dir):
    folder = tmp_path / "books"
    for name in ("b.txt", "a/z.txt", "a.txt", "C.TXT", "notes.md"):
        write(folder / name, f"<{name}>")
    corpus = open_corpus(str(folder), data_dir)
    assert corpus.vocabulary.decode(corpus.tokens) == "<C.TXT><a.txt><a/z.txt><b.txt>"
    assert corpus.path == folder
    assert len(list(folder.rglob("*"))) == 6  # nothing came to it


def test_a_line_of_ten_megabytes(tmp_path, data_dir):
    line = "no end in sight, " * 600_000
    corpus = open_corpus(write(tmp_path / "a.txt", line), data_dir)
    assert len(corpus.tokens) == len(line)
    assert corpus.vocabulary.decode(corpus.tokens[-17:]) == "no end in sight, "


# --- encoded once -----------------------------------------------------------------------------


def test_an_encoded_text_is_not_read_again(tmp_path, data_dir, monkeypatch):
    path = write(tmp_path / "a.txt", "some text")
    first = open_corpus(path, data_dir)
    monkeypatch.setattr(room, "_pieces", None)
    second = open_corpus(path, data_dir)
    assert second.tokens.tolist() == first.tokens.tolist()
    assert (second.digest, second.vocabulary) == (first.digest, first.vocabulary)


def test_a_text_that_changed_is_encoded_again(tmp_path, data_dir):
    path = write(tmp_path / "a.txt", "abab")
    open_corpus(path, data_dir)
    write(tmp_path / "a.txt", "cdcd")
    os.utime(path, ns=(1, 1))
    assert open_corpus(path, data_dir).vocabulary.characters == "cd"
    write(tmp_path / "a.txt", "efefef")
    os.utime(path, ns=(1, 1))
    assert open_corpus(path, data_dir).vocabulary.characters == "ef"


def test_a_file_more_in_a_folder_counts(tmp_path, data_dir):
    write(tmp_path / "books/a.txt", "abab")
    open_corpus(str(tmp_path / "books"), data_dir)
    write(tmp_path / "books/b.txt", "c")
    assert len(open_corpus(str(tmp_path / "books"), data_dir).tokens) == 5


def overwrite(path: Path, position: int, data: bytes) -> None:
    """Damages a file as a failing disk does: its modification time stays."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(position, os.SEEK_SET if position >= 0 else os.SEEK_END)
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


DAMAGE = {
    "magic": lambda path: overwrite(path, 0, b"?"),
    "header": lambda path: overwrite(path, 40, b"?"),
    "header length": lambda path: overwrite(path, 12, b"\xff" * 8),
    "an id outside": lambda path: overwrite(path, -3, b"\xff"),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "a byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "a byte long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "something else": lambda path: path.write_bytes(b"something else, and longer than a prefix"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_token_file_is_made_again(tmp_path, data_dir, damage):
    path = write(tmp_path / "a.txt", STRANGE)
    open_corpus(path, data_dir)
    (token_file,) = token_files(tmp_path)
    whole = token_file.read_bytes()
    damage(token_file)
    with pytest.warns(TokenFileWarning, match="made again"):
        corpus = open_corpus(path, data_dir)
    assert corpus.tokens.tolist() == expected_ids(STRANGE)
    assert token_files(tmp_path) == [token_file]
    assert len(token_file.read_bytes()) == len(whole)


def test_a_large_token_file_is_checked_only_if_something_wrote_to_it(
    tmp_path, data_dir, monkeypatch
):
    monkeypatch.setattr(room, "CHECKED_BYTES", 10)
    path = write(tmp_path / "a.txt", STRANGE)
    open_corpus(path, data_dir)
    (token_file,) = token_files(tmp_path)
    overwrite(token_file, -3, b"\xff")
    assert open_corpus(path, data_dir).tokens[-3] == 255  # trusted unread, which is the point
    os.utime(token_file)
    with pytest.warns(TokenFileWarning, match="outside its vocabulary"):
        assert open_corpus(path, data_dir).tokens.tolist() == expected_ids(STRANGE)


def test_two_processes_at_once(tmp_path, data_dir):
    path = write(tmp_path / "a.txt", STRANGE * 20_000)
    program = (
        "import sys, time, pathlib\n"
        "from chargpt.corpus import open_corpus\n"
        "path, data_dir, me, other = sys.argv[1:]\n"
        "pathlib.Path(me).touch()\n"
        "while not pathlib.Path(other).exists(): time.sleep(0.001)\n"
        "corpus = open_corpus(path, data_dir)\n"
        "print(len(corpus.tokens), corpus.digest, int(corpus.tokens.sum(dtype='int64')))\n"
    )
    flags = [str(tmp_path / "one"), str(tmp_path / "two")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", program, path, str(data_dir), me, other],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(room.__file__).parents[1],
        )
        for me, other in (flags, flags[::-1])
    ]
    answers = [process.communicate(timeout=60)[0] for process in processes]
    ids = np.tile(expected_ids(STRANGE), 20_000)
    digest = hashlib.sha256((STRANGE * 20_000).encode()).hexdigest()
    assert answers == [f"{len(ids)} {digest} {ids.sum()}\n"] * 2
    assert [file.suffix for file in token_files(tmp_path)] == [".tokens"]


@pytest.mark.parametrize("later", ["a longer text", "smoe text", "SOME TEXT", "some t\xe9t"])
def test_a_text_that_changes_while_it_is_read(tmp_path, data_dir, monkeypatch, later):
    path = write(tmp_path / "a.txt", "some text")
    survey = room._survey

    def survey_and_change(*arguments):
        header = survey(*arguments)
        write(tmp_path / "a.txt", later)
        os.utime(path, ns=(1, 1))
        return header

    monkeypatch.setattr(room, "_survey", survey_and_change)
    with pytest.raises(CorpusError, match="changed while it was read"):
        open_corpus(path, data_dir)
    assert token_files(tmp_path) == []


@pytest.mark.parametrize("fault", [KeyboardInterrupt, MemoryError])
def test_an_interruption_leaves_no_file_behind(tmp_path, data_dir, monkeypatch, fault):
    def interrupt(fd):
        raise fault

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(fault):
        open_corpus(write(tmp_path / "a.txt", "some text"), data_dir)
    assert token_files(tmp_path) == []


# --- where it can't be written ----------------------------------------------------------------


def test_the_cache_takes_the_place_of_a_data_dir_that_cant_be_written(tmp_path, cache):
    data_dir = tmp_path / "occupied"
    data_dir.write_text("a file where a folder should be")
    corpus = open_corpus(write(tmp_path / "a.txt", "some text"), data_dir)
    assert corpus.tokens.tolist() == expected_ids("some text")
    assert [file.parent for file in token_files(tmp_path)] == [cache / "tokens"]
    assert open_corpus("python-reference", data_dir).path.is_relative_to(cache)


def test_tokens_of_a_named_text_in_a_read_only_folder_go_to_the_cache(data_dir, cache, monkeypatch):
    write(data_dir / "mine/input.txt", "some text")
    real = room.whole_file

    def whole_file(path, *rest):
        if path.is_relative_to(data_dir):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, *rest)

    monkeypatch.setattr(room, "whole_file", whole_file)
    corpus = open_corpus("mine", data_dir)
    assert corpus.path == data_dir / "mine/input.txt"
    (token_file,) = token_files(cache.parent)
    assert token_file.parent == cache / "tokens"
    monkeypatch.setattr(room, "_pieces", None)  # and it is found there again
    assert open_corpus("mine", data_dir).tokens.tolist() == expected_ids("some text")


@pytest.mark.parametrize("corpus", ["a.txt", "python-reference"])
def test_no_place_that_can_be_written(tmp_path, data_dir, cache, monkeypatch, corpus):
    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write(tmp_path / "a.txt", "some text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CorpusError) as error:
        open_corpus(corpus, data_dir)
    message = str(error.value)
    assert str(data_dir) in message and str(cache) in message
    assert os.strerror(errno.ENOSPC) in message and "CHARGPT_DATA_DIR" in message
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "a.txt"]


# --- bad texts --------------------------------------------------------------------------------


@pytest.mark.parametrize("piece_bytes", [1, 2, 4, 1 << 17])
@pytest.mark.parametrize(
    "data, byte, offset",
    [
        (b"plain \xff", "0xff", 6),
        ("é日🙂".encode() + b"\x80", "0x80", 9),
        ("é日".encode() + "🙂".encode()[:3] + b"abc", "0xf0", 5),
        ("é日".encode() + "🙂".encode()[:2], "0xf0", 5),  # it ends within a character
        ("text".encode("utf-16"), "0xff", 0),
        (b"\xed\xa0\x80", "0xed", 0),  # a surrogate
        (b"\x7fELF\x02\x01\0\0\xd0\0", "0xd0", 8),
    ],
)
def test_invalid_utf8_is_located(tmp_path, data_dir, monkeypatch, data, byte, offset, piece_bytes):
    monkeypatch.setattr(room, "PIECE_BYTES", piece_bytes)
    write(tmp_path / "books/a.txt", "a good file")
    path = write(tmp_path / "books/b.txt", data)
    with pytest.raises(CorpusError) as error:
        open_corpus(str(tmp_path / "books"), data_dir)
    assert f"{path} is not UTF-8 text: byte {byte} at offset {offset} " in str(error.value)
    assert token_files(tmp_path) == []


def test_a_character_does_not_go_on_in_the_next_file(tmp_path, data_dir):
    first = write(tmp_path / "books/a.txt", b"caf\xc3")
    write(tmp_path / "books/b.txt", b"\xa9 au lait")
    with pytest.raises(CorpusError, match=f"{first}.*offset 3"):
        open_corpus(str(tmp_path / "books"), data_dir)


@pytest.mark.parametrize("text, says", [("", "no text"), ("aaaa", "nothing but 'a'")])
def test_too_little_text(tmp_path, data_dir, text, says):
    with pytest.raises(CorpusError, match=f"a.txt holds {says}"):
        open_corpus(write(tmp_path / "a.txt", text), data_dir)
    assert token_files(tmp_path) == []


def test_a_folder_without_text(tmp_path, data_dir):
    write(tmp_path / "books/a.md", "no text file")
    with pytest.raises(CorpusError, match="no .txt file"):
        open_corpus(str(tmp_path / "books"), data_dir)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_at_once(tmp_path, data_dir):
    os.mkfifo(tmp_path / "pipe.txt")
    for corpus in (tmp_path / "pipe.txt", tmp_path):
        with pytest.raises(CorpusError, match="neither a file nor a folder"):
            open_corpus(str(corpus), data_dir)


@pytest.mark.parametrize(
    "name", ["", "no-such-text", "no/such.txt", "~nobody-here/a", "a\0b", "\ud800", "x" * 5000]
)
def test_a_text_that_is_not_there(data_dir, name):
    write(data_dir / "mine/input.txt", "some text")
    with pytest.raises(CorpusError) as error:
        open_corpus(name, data_dir, fallback="python-reference")
    assert repr(name) in str(error.value)
    assert "mine, python-reference, tiny-shakespeare" in str(error.value)


# --- named texts ------------------------------------------------------------------------------


def test_python_reference_is_always_there(data_dir):
    from pydoc_data.topics import topics

    corpus = open_corpus("python-reference", data_dir)
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


def test_python_reference_is_written_again_if_it_differs(data_dir):
    whole = open_corpus("python-reference", data_dir)
    write(whole.path, "another text")
    assert open_corpus("python-reference", data_dir).digest == whole.digest


def test_a_text_of_ones_own_in_the_data_dir(data_dir):
    write(data_dir / "mine/input.txt", "some text")
    corpus = open_corpus("mine", data_dir)
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
    corpus = open_corpus("tiny-shakespeare", data_dir, fallback="python-reference")
    assert corpus.name == "tiny-shakespeare"
    assert corpus.path.read_bytes() == SHAKESPEARE
    assert sorted(os.listdir(data_dir / "tiny-shakespeare")) == ["input.tokens", "input.txt"]
    output = capsys.readouterr()
    assert "downloading" in output.err and "100%" in output.err and output.out == ""
    home("missing")
    assert open_corpus("tiny-shakespeare", data_dir).digest == corpus.digest


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
        open_corpus("tiny-shakespeare", data_dir)
    assert f"by hand to {data_dir}" in str(error.value)
    assert not data_dir.exists()


def test_the_fallback_is_used_with_a_warning(data_dir, home):
    home("missing")
    with pytest.warns(FallbackWarning, match="(?s)tiny-shakespeare CAN'T.*python-reference.*404"):
        corpus = open_corpus("tiny-shakespeare", data_dir, fallback="python-reference")
    assert corpus.name == "python-reference"
    assert corpus.digest == open_corpus("python-reference", data_dir).digest


def test_a_wrong_local_text_is_never_used_nor_touched(data_dir, home):
    home("whole")
    half = SHAKESPEARE[: len(SHAKESPEARE) // 2]
    path = write(data_dir / "tiny-shakespeare/input.txt", half)
    with pytest.raises(CorpusError) as error:
        open_corpus("tiny-shakespeare", data_dir)
    assert f"{path} is not tiny-shakespeare: 147,500 bytes" in str(error.value)
    assert "Delete it" in str(error.value)
    with pytest.warns(FallbackWarning, match="147,500 bytes"):
        assert open_corpus("tiny-shakespeare", data_dir, "python-reference").name != path
    assert Path(path).read_bytes() == half


def test_a_good_local_text_needs_no_network_and_no_warning(data_dir, home):
    home("missing")
    write(data_dir / "tiny-shakespeare/input.txt", SHAKESPEARE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpus = open_corpus("tiny-shakespeare", data_dir, fallback="python-reference")
    assert corpus.tokens.tolist() == expected_ids(SHAKESPEARE.decode())


def test_a_fallback_that_is_the_same_text_is_no_fallback(data_dir, home):
    home("missing")
    with pytest.raises(CorpusError, match="404"):
        open_corpus("tiny-shakespeare", data_dir, fallback="tiny-shakespeare")


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
    monkeypatch.undo()  # the real _cache_dir
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "CHARGPT_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert room.default_data_dir() == Path(expected)


def test_the_environment_names_the_data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("CHARGPT_DATA_DIR", str(tmp_path / "mine"))
    open_corpus("python-reference")
    assert (tmp_path / "mine/python-reference/input.txt").is_file()
