"""What the predict command does with a TextGenerator: prompts in, texts out, and nothing half done."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_text_generator import make_generator

from chargpt.cli.predict import SEPARATOR, one_by_one, predict
from chargpt.generation import GenerationConfig
from chargpt.text_generator import TextChunk, TextGenerator
from chargpt.vocabulary import UnknownCharacterError

GENERATOR = make_generator()


class Stdin:
    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


def run(**options) -> None:
    predict(GENERATOR, "x.ckpt", **dict(max_new_chars=30) | options)


def complete(prompt: str, **settings) -> str:
    return GENERATOR.complete(prompt, **dict(max_new_chars=30) | settings)


def line(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


def test_standard_output_holds_the_prompt_and_what_follows_it(capfdbinary):
    run(prompt="café", seed=3)
    assert capfdbinary.readouterr() == (line(complete("café", seed=3)).encode(), b"")


def test_defaults_are_those_of_python(capsys):
    predict(GENERATOR, "x.ckpt")
    assert capsys.readouterr().out == line(GENERATOR.complete("\n"))


def test_several_samples_are_separated(capsys):
    run(prompt="abc", num_samples=3)
    samples = GENERATOR.complete_all(["abc"], num_samples=3, max_new_chars=30)[0]
    assert capsys.readouterr().out == SEPARATOR.join(map(line, samples))


def test_prompts_of_a_file(capsys, tmp_path):
    for ending, bom in (("\n", b""), ("\r\n", b"\xef\xbb\xbf")):
        file = tmp_path / "prompts.txt"
        file.write_bytes(bom + f"abc{ending}{ending}café dead{ending}".encode())
        run(prompts=str(file), num_samples=2, stop=["f", "é"])
        texts = [
            text
            for prompt in ("abc", "\n", "café dead")
            for text in GENERATOR.complete_all(
                [prompt], num_samples=2, max_new_chars=30, stop=["f", "é"]
            )[0]
        ]
        assert capsys.readouterr().out == SEPARATOR.join(map(line, texts))


def test_a_file_of_one_empty_line_is_one_empty_prompt(capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\n")
    run(prompts=str(file))
    assert capsys.readouterr().out == line(complete("\n"))


def test_a_prompt_from_standard_input_is_taken_as_it_stands(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Stdin("café\n".encode()))
    run(prompt="-")
    assert capsys.readouterr().out == line(complete("café\n"))


def test_json_lines(capsys):
    run(prompt="abc", num_samples=2, format="jsonl", seed=7, temperature=0.5, stop=["é"])
    lines = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    texts = GENERATOR.complete_all(
        ["abc"], num_samples=2, max_new_chars=30, seed=7, temperature=0.5, stop=["é"]
    )
    assert [(r["prompt"], r["text"], r["sample"], r["seed"]) for r in lines] == [
        ("abc", texts[0][0], 0, 7),
        ("abc", texts[0][1], 1, 7),
    ]
    assert lines[0]["checkpoint"] == "x.ckpt"
    again = GenerationConfig(seed=lines[0]["seed"], **lines[0]["settings"])
    assert again == GenerationConfig(max_new_chars=30, seed=7, temperature=0.5, stop=["é"])


def test_output_goes_to_the_file_alone(capsys, tmp_path):
    file = tmp_path / "poem.txt"
    file.write_text("what it held before")
    run(prompt="café", output=str(file))
    assert file.read_text(encoding="utf-8") == line(complete("café"))
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == [file]


def test_an_error_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    def fails(*_):
        yield TextChunk(0, "a", False)
        raise RuntimeError("out of something")

    file = tmp_path / "poem.txt"
    file.write_text("what it held before")
    monkeypatch.setattr(TextGenerator, "write", fails)
    with pytest.raises(RuntimeError):
        run(output=str(file))
    assert file.read_text() == "what it held before"
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_link_leads_to_is_replaced_and_not_the_link(tmp_path):
    file, link = tmp_path / "poem.txt", tmp_path / "newest.txt"
    file.write_text("what it held before")
    try:
        link.symlink_to(file)
    except OSError:
        pytest.skip("no links here")
    run(prompt="café", output=str(link))
    assert link.is_symlink() and file.read_text(encoding="utf-8") == line(complete("café"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_or_device_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    run(prompt="café", output=str(pipe))
    assert pipe.is_fifo()
    assert os.read(reader, 1000) == line(complete("café")).encode()
    os.close(reader)


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="no names for open files here")
def test_a_pipe_without_a_name_is_written_to():
    """As the shell's `--generate.output >(gzip > poem.gz)` asks."""
    reader, pipe = os.pipe()
    run(prompt="café", output=f"/dev/fd/{pipe}")
    assert os.read(reader, 1000) == line(complete("café")).encode()
    os.close(reader)
    os.close(pipe)


@pytest.mark.parametrize("output", [False, True])
@pytest.mark.parametrize("format", ["text", "jsonl"])
def test_an_interruption_leaves_the_texts_so_far(capsys, tmp_path, monkeypatch, output, format):
    def interrupted(*_):
        yield from [
            TextChunk(0, "a", False),
            TextChunk(1, "b", False),
            TextChunk(0, "c", False),
            TextChunk(1, "d", True),
        ]
        raise KeyboardInterrupt

    monkeypatch.setattr(TextGenerator, "write", interrupted)
    file = tmp_path / "poem.txt"
    with pytest.raises(KeyboardInterrupt):
        run(prompt="é", num_samples=3, format=format, output=str(file) if output else "")
    text = file.read_text(encoding="utf-8") if output else capsys.readouterr().out
    if format == "jsonl":
        assert [json.loads(line)["text"] for line in text.splitlines()] == ["éac", "ébd"]
    else:
        assert text == "éac\n" + SEPARATOR + "ébd\n"


def test_pieces_are_shown_as_they_come():
    asked = []

    def pieces():
        for piece in [
            TextChunk(0, "a", False),
            TextChunk(1, "b", False),
            TextChunk(0, "c", True),
            TextChunk(1, "d", True),
        ]:
            asked.append(piece.text)
            yield piece

    seen = [(index, piece, len(asked)) for index, text in one_by_one(pieces(), 2) for piece in text]
    assert seen == [(0, "a", 1), (0, "c", 3), (1, "b", 3), (1, "d", 4)]


def test_every_character_reaches_the_reader_before_the_next_is_written(monkeypatch):
    reader = io.BytesIO()
    shown = []

    def pieces(*_):
        for character in "abc":
            yield TextChunk(0, character, character == "c")
            shown.append(reader.getvalue().decode())

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(reader))
    monkeypatch.setattr(TextGenerator, "write", pieces)
    run(prompt="é")
    assert shown == ["éa", "éab"]


def test_a_reader_that_has_had_enough_and_a_narrow_locale():
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from test_predict import *\n"
        "run(prompt='é' * 20, max_new_chars=100_000)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | dict(PYTHONIOENCODING="ascii"),
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout.read(100).startswith("é".encode() * 20)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(num_samples=0), "num_samples is 0"),
        (dict(prompt="a", prompts="b.txt"), "not both"),
        (dict(temperature=-1), "temperature is -1"),
        (dict(max_new_chars=-1), "max_new_chars is -1"),
    ],
)
def test_options_that_mean_nothing(wrong, message):
    with pytest.raises(ValueError, match=message):
        run(**wrong)


def test_what_is_wrong_is_said_before_anything_is_written(capsys, tmp_path, monkeypatch):
    file, empty, binary = tmp_path / "poem.txt", tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("")
    binary.write_bytes(b"abc\xff")
    for options, error, message in [
        (dict(prompt="xyz"), UnknownCharacterError, "'x'"),
        (dict(prompts=str(tmp_path / "none.txt")), OSError, "none.txt"),
        (dict(prompts=str(empty)), ValueError, "empty.txt is empty"),
        (
            dict(prompts=str(binary)),
            ValueError,
            "binary.txt is not UTF-8 text: invalid byte at offset 3",
        ),
    ]:
        with pytest.raises(error, match=message):
            run(output=str(file), **options)
    with pytest.raises(ValueError, match="there is no folder"):
        run(output=str(tmp_path / "nowhere" / "poem.txt"))
    monkeypatch.setattr(sys, "stdin", Stdin(b"\xff"))
    with pytest.raises(ValueError, match="standard input is not UTF-8"):
        run(prompt="-")
    assert capsys.readouterr().out == "" and not file.exists()
