"""Token files: encoding is lossless, and a damaged or outdated file is never used."""

import hashlib
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import expected_ids, open_text, token_files, write

from chargpt.data import token_file
from chargpt.data.texts import TextFile
from chargpt.model import UserError

pytestmark = pytest.mark.usefixtures("cache")

STRANGE = "naïve\r\n\0\0日本語 🙂e\u0301 \u202eעברית\u200f\ufeff\tend" * 3


# --- the contents of a corpus ----------------------------------------------------------------------


def test_a_text_file_is_encoded_unchanged(tmp_path, data_dir):
    path = tmp_path / "mine" / "strange.txt"
    write(path, STRANGE)
    corpus = open_text(str(path), data_dir)
    assert corpus.tokens.tolist() == expected_ids(STRANGE)
    assert corpus.vocabulary.characters == "".join(sorted(set(STRANGE)))
    assert corpus.tokens.dtype == corpus.vocabulary.dtype == np.uint8
    assert corpus.digest == hashlib.sha256(STRANGE.encode()).hexdigest()
    assert (corpus.source.name, corpus.source.path) == (str(path), path)
    with pytest.raises(ValueError, match="read-only"):
        corpus.tokens[0] = 1


def test_the_last_character_of_unicode(tmp_path, data_dir):
    text = "a" + chr(sys.maxunicode) + "b" + chr(sys.maxunicode - 1)
    corpus = open_text(write(tmp_path / "a.txt", text), data_dir)
    assert corpus.vocabulary.decode(corpus.tokens) == text


def test_nothing_is_written_next_to_a_users_file(tmp_path, data_dir, cache):
    path = tmp_path / "mine" / "a.txt"
    write(path, "some text")
    open_text(str(path), data_dir)
    assert os.listdir(path.parent) == ["a.txt"]
    assert [file.parent for file in token_files(tmp_path)] == [data_dir / "tokens"]


def test_two_files_of_one_name_have_two_token_files(tmp_path, data_dir):
    one, two = write(tmp_path / "1/a.txt", "abab"), write(tmp_path / "2/a.txt", "cdcd")
    for _ in range(2):
        assert open_text(one, data_dir).vocabulary.characters == "ab"
        assert open_text(two, data_dir).vocabulary.characters == "cd"


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 64])
def test_characters_may_span_chunks(tmp_path, data_dir, monkeypatch, chunk):
    monkeypatch.setattr(token_file, "CHUNK", chunk)
    corpus = open_text(write(tmp_path / "a.txt", STRANGE), data_dir)
    assert corpus.tokens.tolist() == expected_ids(STRANGE)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # a path, the same for all
)
@given(text=st.text(min_size=1), chunk=st.integers(1, 9))
def test_any_text_is_restored(tmp_path, text, chunk):
    text += "ab"  # two different characters at least
    path = write(tmp_path / "any.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_file, "CHUNK", chunk)
        for file in token_files(tmp_path):
            file.unlink()  # the clock may be too coarse to distinguish two texts of one size
        corpus = open_text(path, tmp_path / "data")
    assert corpus.vocabulary.decode(corpus.tokens) == text.removeprefix("\ufeff")


@pytest.mark.parametrize("size, dtype", [(256, "uint8"), (257, "uint16"), (65_537, "uint32")])
def test_large_vocabularies(tmp_path, data_dir, size, dtype):
    text = "bb" + "".join(map(chr, range(0x10000, 0x10000 + size - 2))) + "aa"
    corpus = open_text(write(tmp_path / "a.txt", text), data_dir)
    assert corpus.tokens.dtype == np.dtype(dtype)
    assert len(corpus.vocabulary) == size
    assert corpus.tokens.tolist() == expected_ids(text)


def test_a_token_file_is_a_numpy_array(tmp_path, data_dir):
    open_text(write(tmp_path / "a.txt", STRANGE), data_dir)
    (encoded,) = token_files(tmp_path)
    assert np.load(encoded).tolist() == expected_ids(STRANGE)


def test_a_line_of_ten_megabytes(tmp_path, data_dir):
    line = "no end in sight, " * 600_000
    corpus = open_text(write(tmp_path / "a.txt", line), data_dir)
    assert len(corpus.tokens) == len(line)
    assert corpus.vocabulary.decode(corpus.tokens[-17:]) == "no end in sight, "


# --- encoded once -----------------------------------------------------------------------------


def test_an_encoded_text_is_not_read_again(tmp_path, data_dir, monkeypatch):
    path = write(tmp_path / "a.txt", "some text")
    first = open_text(path, data_dir)
    monkeypatch.setattr(token_file, "read_file", None)
    second = open_text(path, data_dir)
    assert second.tokens.tolist() == first.tokens.tolist()
    assert (second.digest, second.vocabulary) == (first.digest, first.vocabulary)


def test_a_changed_text_is_encoded_again(tmp_path, data_dir):
    path = write(tmp_path / "a.txt", "abab")
    open_text(path, data_dir)
    write(tmp_path / "a.txt", "cdcd")
    os.utime(path, ns=(1, 1))
    assert open_text(path, data_dir).vocabulary.characters == "cd"
    write(tmp_path / "a.txt", "efefef")
    os.utime(path, ns=(1, 1))
    assert open_text(path, data_dir).vocabulary.characters == "ef"


def test_a_folder_with_a_new_file_is_encoded_again(tmp_path, data_dir):
    write(tmp_path / "books/a.txt", "abab")
    open_text(str(tmp_path / "books"), data_dir)
    write(tmp_path / "books/b.txt", "c")
    assert len(open_text(str(tmp_path / "books"), data_dir).tokens) == 6  # and a newline


def overwrite(path: Path, position: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(position, os.SEEK_SET if position >= 0 else os.SEEK_END)
        file.write(data)


DAMAGE = {
    "magic": lambda path: overwrite(path, 0, b"?"),
    "header": lambda path: overwrite(path, 40, b"?"),
    "header length": lambda path: overwrite(path, 8, b"\xff" * 2),
    "vocabulary": lambda path: overwrite(path, -100, b"\xff"),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "a byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "a byte long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "something else": lambda path: path.write_bytes(b"something else, and longer than a prefix"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_token_file_is_replaced(tmp_path, data_dir, damage):
    path = write(tmp_path / "a.txt", STRANGE)
    open_text(path, data_dir)
    (encoded,) = token_files(tmp_path)
    whole = encoded.read_bytes()
    damage(encoded)
    corpus = open_text(path, data_dir)
    assert corpus.tokens.tolist() == expected_ids(STRANGE)
    assert token_files(tmp_path) == [encoded]
    assert encoded.read_bytes() == whole


def encode_beside(path: str, data_dir: Path, me: Path, other: Path, answers) -> None:
    me.touch()
    while not other.exists():
        time.sleep(0.001)
    corpus = open_text(path, data_dir)
    answers.put((len(corpus.tokens), corpus.digest, int(corpus.tokens.sum(dtype="int64"))))


def test_two_processes_encode_at_once(tmp_path, data_dir):
    path = write(tmp_path / "a.txt", STRANGE * 20_000)
    fork = "fork" in multiprocessing.get_all_start_methods()  # imports nothing again
    context = multiprocessing.get_context("fork" if fork else "spawn")
    flags, answers = [tmp_path / "one", tmp_path / "two"], context.Queue()
    processes = [
        context.Process(target=encode_beside, args=(path, data_dir, *names, answers))
        for names in (flags, flags[::-1])
    ]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    ids = np.tile(expected_ids(STRANGE), 20_000)
    digest = hashlib.sha256((STRANGE * 20_000).encode()).hexdigest()
    assert found == [(len(ids), digest, ids.sum())] * 2
    assert [file.suffix for file in token_files(tmp_path)] == [".npy"]


@pytest.mark.parametrize("later", ["a longer text", "smoe text", "SOME TEXT", "some t\xe9t"])
def test_a_text_that_changes_while_it_is_read(tmp_path, data_dir, monkeypatch, later):
    path = write(tmp_path / "a.txt", "some text")
    scan = token_file.scan

    def scan_and_change(text):
        found = scan(text)
        write(tmp_path / "a.txt", later)
        os.utime(path, ns=(1, 1))
        return found

    monkeypatch.setattr(token_file, "scan", scan_and_change)
    with pytest.raises(UserError, match="changed while it was being read"):
        open_text(path, data_dir)
    assert token_files(tmp_path) == []


@pytest.mark.parametrize("growth", [1, 100])
def test_a_file_that_keeps_growing_is_not_read_forever(tmp_path, monkeypatch, growth):
    monkeypatch.setattr(token_file, "CHUNK", 4)
    path = write(tmp_path / "a.txt", "some text")
    time, pieces = os.stat(path).st_mtime_ns, 0
    with pytest.raises(UserError, match="a.txt changed while it was being read"):
        for piece in token_file.read_file(TextFile(path, size=9, mtime_ns=time)):
            with open(path, "ab") as file:
                file.write(b"x" * growth * len(piece))
            os.utime(path, ns=(time, time))  # only the size tells
            pieces += 1
    assert pieces == 1


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = write(tmp_path / "a.txt", "some")
    with pytest.raises(UserError, match="a.txt changed while it was being read"):
        list(token_file.read_file(TextFile(path, size=9, mtime_ns=os.stat(path).st_mtime_ns)))


def test_an_open_corpus_stays_the_same_when_the_text_changes(tmp_path, data_dir):
    path = write(tmp_path / "a.txt", "abab")
    before = open_text(path, data_dir)
    write(tmp_path / "a.txt", "xyxyxy")
    open_text(path, data_dir)
    assert before.tokens.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, MemoryError])
def test_an_interruption_leaves_no_file(tmp_path, data_dir, monkeypatch, fault):
    def interrupt(fd):
        raise fault

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(fault):
        open_text(write(tmp_path / "a.txt", "some text"), data_dir)
    assert token_files(tmp_path) == []


# --- bad texts --------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 4, 1 << 17])
@pytest.mark.parametrize(
    "data, byte, offset",
    [
        (b"plain \xff", "0xff", 6),
        ("é日🙂".encode() + b"\x80", "0x80", 9),
        ("é日".encode() + "🙂".encode()[:3] + b"abc", "0xf0", 5),
        ("é日".encode() + "🙂".encode()[:2], "0xf0", 5),  # incomplete at the end
        ("text".encode("utf-16"), "0xff", 0),
        (b"\xed\xa0\x80", "0xed", 0),  # a surrogate
        (b"\x7fELF\x02\x01\0\0\xd0\0", "0xd0", 8),
    ],
)
def test_invalid_utf8_is_located(tmp_path, data_dir, monkeypatch, data, byte, offset, chunk):
    monkeypatch.setattr(token_file, "CHUNK", chunk)
    write(tmp_path / "books/a.txt", "a good file")
    path = write(tmp_path / "books/b.txt", data)
    with pytest.raises(UserError) as error:
        open_text(str(tmp_path / "books"), data_dir)
    assert f"{path} is not UTF-8 text: byte {byte} at offset {offset}\n" in str(error.value)
    assert token_files(tmp_path) == []


def test_a_character_does_not_span_two_files(tmp_path, data_dir):
    first = write(tmp_path / "books/a.txt", b"caf\xc3")
    write(tmp_path / "books/b.txt", b"\xa9 au lait")
    with pytest.raises(UserError, match=f"{first}.*offset 3"):
        open_text(str(tmp_path / "books"), data_dir)


@pytest.mark.parametrize("text", ["", "aaaa"])
def test_too_little_text(tmp_path, data_dir, text):
    with pytest.raises(UserError, match="a.txt has fewer than two different characters"):
        open_text(write(tmp_path / "a.txt", text), data_dir)
    assert token_files(tmp_path) == []
