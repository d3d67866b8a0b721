"""Encoding a text once: every character comes back, and nothing wrong is ever believed."""

import errno
import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import expected_ids, open_text, token_files, write

from chargpt.data import token_file as room
from chargpt.data.corpus import CorpusError, Source

pytestmark = pytest.mark.usefixtures("cache")

STRANGE = "naïve\r\n\0\0日本語 🙂e\u0301 \u202eעברית\u200f\ufeff\tend" * 3


# --- what a corpus holds ----------------------------------------------------------------------


def test_a_text_file_is_encoded_as_it_stands(tmp_path, data_dir):
    path = tmp_path / "mine" / "strange.txt"
    write(path, STRANGE)
    corpus = open_text(str(path), data_dir)
    assert corpus.tokens.tolist() == expected_ids(STRANGE)
    assert corpus.vocabulary.characters == "".join(sorted(set(STRANGE)))
    assert corpus.tokens.dtype == corpus.vocabulary.dtype == np.uint8
    assert corpus.digest == hashlib.sha256(STRANGE.encode()).hexdigest()
    assert (corpus.name, corpus.path) == (str(path), path)
    with pytest.raises(ValueError, match="read-only"):
        corpus.tokens[0] = 1


def test_the_last_character_of_unicode_is_one_like_any_other(tmp_path, data_dir):
    text = "a" + chr(sys.maxunicode) + "b" + chr(sys.maxunicode - 1)
    corpus = open_text(write(tmp_path / "a.txt", text), data_dir)
    assert corpus.vocabulary.decode(corpus.tokens) == text


def test_nothing_is_written_beside_a_users_file(tmp_path, data_dir, cache):
    path = tmp_path / "mine" / "a.txt"
    write(path, "some text")
    open_text(str(path), data_dir)
    assert os.listdir(path.parent) == ["a.txt"]
    assert [file.parent for file in token_files(tmp_path)] == [data_dir / "tokens"]


def test_two_files_of_one_name_keep_apart(tmp_path, data_dir):
    one, two = write(tmp_path / "1/a.txt", "abab"), write(tmp_path / "2/a.txt", "cdcd")
    for _ in range(2):
        assert open_text(one, data_dir).vocabulary.characters == "ab"
        assert open_text(two, data_dir).vocabulary.characters == "cd"


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 5, 7, 64])
def test_characters_may_lie_across_pieces(tmp_path, data_dir, monkeypatch, piece_bytes):
    monkeypatch.setattr(room, "PIECE_BYTES", piece_bytes)
    corpus = open_text(write(tmp_path / "a.txt", STRANGE), data_dir)
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
        corpus = open_text(path, tmp_path / "data")
    assert corpus.vocabulary.decode(corpus.tokens) == text


@pytest.mark.parametrize("size, dtype", [(256, "uint8"), (257, "uint16"), (65_537, "uint32")])
def test_large_vocabularies(tmp_path, data_dir, size, dtype):
    text = "bb" + "".join(map(chr, range(0x10000, 0x10000 + size - 2))) + "aa"
    corpus = open_text(write(tmp_path / "a.txt", text), data_dir)
    assert corpus.tokens.dtype == np.dtype(dtype)
    assert len(corpus.vocabulary) == size
    assert corpus.tokens.tolist() == expected_ids(text)


def test_a_token_file_is_a_numpy_array(tmp_path, data_dir):
    open_text(write(tmp_path / "a.txt", STRANGE), data_dir)
    (token_file,) = token_files(tmp_path)
    assert np.load(token_file).tolist() == expected_ids(STRANGE)


def test_a_line_of_ten_megabytes(tmp_path, data_dir):
    line = "no end in sight, " * 600_000
    corpus = open_text(write(tmp_path / "a.txt", line), data_dir)
    assert len(corpus.tokens) == len(line)
    assert corpus.vocabulary.decode(corpus.tokens[-17:]) == "no end in sight, "


# --- encoded once -----------------------------------------------------------------------------


def test_an_encoded_text_is_not_read_again(tmp_path, data_dir, monkeypatch):
    path = write(tmp_path / "a.txt", "some text")
    first = open_text(path, data_dir)
    monkeypatch.setattr(room, "read_source", None)
    second = open_text(path, data_dir)
    assert second.tokens.tolist() == first.tokens.tolist()
    assert (second.digest, second.vocabulary) == (first.digest, first.vocabulary)


def test_a_text_that_changed_is_encoded_again(tmp_path, data_dir):
    path = write(tmp_path / "a.txt", "abab")
    open_text(path, data_dir)
    write(tmp_path / "a.txt", "cdcd")
    os.utime(path, ns=(1, 1))
    assert open_text(path, data_dir).vocabulary.characters == "cd"
    write(tmp_path / "a.txt", "efefef")
    os.utime(path, ns=(1, 1))
    assert open_text(path, data_dir).vocabulary.characters == "ef"


def test_a_file_more_in_a_folder_counts(tmp_path, data_dir):
    write(tmp_path / "books/a.txt", "abab")
    open_text(str(tmp_path / "books"), data_dir)
    write(tmp_path / "books/b.txt", "c")
    assert len(open_text(str(tmp_path / "books"), data_dir).tokens) == 5


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
def test_a_damaged_token_file_is_made_again(tmp_path, data_dir, damage):
    path = write(tmp_path / "a.txt", STRANGE)
    open_text(path, data_dir)
    (token_file,) = token_files(tmp_path)
    whole = token_file.read_bytes()
    damage(token_file)
    corpus = open_text(path, data_dir)
    assert corpus.tokens.tolist() == expected_ids(STRANGE)
    assert token_files(tmp_path) == [token_file]
    assert token_file.read_bytes() == whole


def test_two_processes_at_once(tmp_path, data_dir):
    path = write(tmp_path / "a.txt", STRANGE * 20_000)
    program = (
        "import sys, time, pathlib\n"
        "from chargpt.data.corpus import find_text\n"
        "from chargpt.data.token_file import open_corpus\n"
        "path, data_dir, me, other = sys.argv[1:]\n"
        "pathlib.Path(me).touch()\n"
        "while not pathlib.Path(other).exists(): time.sleep(0.001)\n"
        "corpus = open_corpus(find_text(path, data_dir))\n"
        "print(len(corpus.tokens), corpus.digest, int(corpus.tokens.sum(dtype='int64')))\n"
    )
    flags = [str(tmp_path / "one"), str(tmp_path / "two")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, path, str(data_dir), me, other],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(room.__file__).parents[2],
        )
        for me, other in (flags, flags[::-1])
    ]
    answers = [process.communicate(timeout=60)[0] for process in processes]
    ids = np.tile(expected_ids(STRANGE), 20_000)
    digest = hashlib.sha256((STRANGE * 20_000).encode()).hexdigest()
    assert answers == [f"{len(ids)} {digest} {ids.sum()}\n"] * 2
    assert [file.suffix for file in token_files(tmp_path)] == [".npy"]


@pytest.mark.parametrize("later", ["a longer text", "smoe text", "SOME TEXT", "some t\xe9t"])
def test_a_text_that_changes_while_it_is_read(tmp_path, data_dir, monkeypatch, later):
    path = write(tmp_path / "a.txt", "some text")
    survey = room.survey

    def survey_and_change(text):
        found = survey(text)
        write(tmp_path / "a.txt", later)
        os.utime(path, ns=(1, 1))
        return found

    monkeypatch.setattr(room, "survey", survey_and_change)
    with pytest.raises(CorpusError, match="changed while it was read"):
        open_text(path, data_dir)
    assert token_files(tmp_path) == []


@pytest.mark.parametrize("growth", [1, 100])
def test_a_file_that_grows_while_it_is_read_is_not_read_without_end(tmp_path, monkeypatch, growth):
    monkeypatch.setattr(room, "PIECE_BYTES", 4)
    path = write(tmp_path / "a.txt", "some text")
    with pytest.raises(CorpusError, match="a.txt changed while it was read"):
        for piece in room.read_source(Source(path, size=9, mtime_ns=0)):
            with open(path, "ab") as file:
                file.write(b"x" * growth * len(piece))


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = write(tmp_path / "a.txt", "some")
    with pytest.raises(CorpusError, match="a.txt changed while it was read"):
        list(room.read_source(Source(path, size=9, mtime_ns=0)))


def test_what_was_opened_stays_when_the_text_changes(tmp_path, data_dir):
    """A run goes on reading its text, in workers that start later too."""
    path = write(tmp_path / "a.txt", "abab")
    before = open_text(path, data_dir)
    write(tmp_path / "a.txt", "xyxyxy")
    open_text(path, data_dir)
    again = pickle.loads(pickle.dumps(before.tokens))
    assert before.tokens.tolist() == again.tolist() == [0, 1, 0, 1]


def test_tokens_pickle_as_their_place_in_the_file(tmp_path, data_dir):
    """So that a worker that is spawned maps the file itself."""
    text = STRANGE * 1000
    tokens = open_text(write(tmp_path / "a.txt", text), data_dir).tokens
    ids = np.array(expected_ids(text))
    for part in (tokens, tokens[5000:], tokens[5000:][:100], np.split(tokens, [99, 7000])[1]):
        pickled = pickle.dumps(part)
        assert len(pickled) < 1000
        again = pickle.loads(pickled)
        assert np.array_equal(again, part) and len(pickle.dumps(again[3:])) < 1000
        assert np.array_equal(pickle.loads(pickle.dumps(again[3:])), part[3:])
    assert np.array_equal(pickle.loads(pickle.dumps(tokens[5000:]))[:9], ids[5000:5009])
    for computed in (tokens[[3, 1, 2]], tokens + 1, tokens[::2]):  # these are copied
        assert np.array_equal(pickle.loads(pickle.dumps(computed)), computed)


@pytest.mark.parametrize("fault", [KeyboardInterrupt, MemoryError])
def test_an_interruption_leaves_no_file_behind(tmp_path, data_dir, monkeypatch, fault):
    def interrupt(fd):
        raise fault

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(fault):
        open_text(write(tmp_path / "a.txt", "some text"), data_dir)
    assert token_files(tmp_path) == []


# --- where it can't be written ----------------------------------------------------------------


def test_the_cache_takes_the_place_of_a_data_dir_that_cant_be_written(tmp_path, cache):
    data_dir = tmp_path / "occupied"
    data_dir.write_text("a file where a folder should be")
    corpus = open_text(write(tmp_path / "a.txt", "some text"), data_dir)
    assert corpus.tokens.tolist() == expected_ids("some text")
    assert [file.parent for file in token_files(tmp_path)] == [cache / "tokens"]


def test_tokens_of_a_named_text_in_a_read_only_folder_go_to_the_cache(data_dir, cache, monkeypatch):
    write(data_dir / "mine/input.txt", "some text")
    real = room.atomic_write

    def atomic_write(path):
        if path.is_relative_to(data_dir):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path)

    monkeypatch.setattr(room, "atomic_write", atomic_write)
    corpus = open_text("mine", data_dir)
    assert corpus.path == data_dir / "mine/input.txt"
    (token_file,) = token_files(cache.parent)
    assert token_file.parent == cache / "tokens"
    monkeypatch.setattr(room, "read_source", None)  # and it is found there again
    assert open_text("mine", data_dir).tokens.tolist() == expected_ids("some text")


@pytest.mark.parametrize("corpus", ["a.txt", "python-reference"])
def test_no_place_that_can_be_written(tmp_path, data_dir, cache, monkeypatch, corpus):
    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write(tmp_path / "a.txt", "some text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CorpusError) as error:
        open_text(corpus, data_dir)
    message = str(error.value)
    assert str(data_dir) in message
    assert str(cache) in message or corpus == "python-reference"  # which stands in data_dir alone
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
        open_text(str(tmp_path / "books"), data_dir)
    assert f"{path} is not UTF-8 text: byte {byte} at offset {offset} " in str(error.value)
    assert token_files(tmp_path) == []


def test_a_character_does_not_go_on_in_the_next_file(tmp_path, data_dir):
    first = write(tmp_path / "books/a.txt", b"caf\xc3")
    write(tmp_path / "books/b.txt", b"\xa9 au lait")
    with pytest.raises(CorpusError, match=f"{first}.*offset 3"):
        open_text(str(tmp_path / "books"), data_dir)


@pytest.mark.parametrize("text, says", [("", "no text"), ("aaaa", "nothing but 'a'")])
def test_too_little_text(tmp_path, data_dir, text, says):
    with pytest.raises(CorpusError, match=f"a.txt holds {says}"):
        open_text(write(tmp_path / "a.txt", text), data_dir)
    assert token_files(tmp_path) == []
