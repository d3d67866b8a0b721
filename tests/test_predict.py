"""predict: prompts, output formats, files and pipes, interruption and errors."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_text_generator import make_generator

from chargpt.cli.predict import SEPARATOR, predict
from chargpt.cli.predict import run as run_command
from chargpt.generation import GenerationConfig
from chargpt.model import UserError
from chargpt.text_generator import TextGenerator

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


def test_standard_output_has_the_prompt_and_its_continuation_only(capfdbinary):
    run(prompt="café", seed=3)
    assert capfdbinary.readouterr() == (line(complete("café", seed=3)).encode(), b"")


def test_defaults_equal_those_of_the_python_interface(capsys):
    predict(GENERATOR, "x.ckpt")
    assert capsys.readouterr().out == line(GENERATOR.complete("\n"))


def test_several_samples_have_a_separator(capsys):
    run(prompt="abc", num_samples=3)
    samples = GENERATOR.complete_all(["abc"], num_samples=3, max_new_chars=30)[0]
    assert capsys.readouterr().out == SEPARATOR.join(map(line, samples))


def test_prompts_from_a_file(capsys, tmp_path):
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


def test_a_prompt_from_standard_input_is_taken_literally(capsys, monkeypatch):
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


def test_output_to_a_file_leaves_standard_output_empty(capsys, tmp_path):
    file = tmp_path / "poem.txt"
    file.write_text("earlier content")
    run(prompt="café", output=str(file))
    assert file.read_text(encoding="utf-8") == line(complete("café"))
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == [file]


def test_the_target_of_a_symbolic_link_is_replaced_not_the_link(tmp_path):
    file, link = tmp_path / "poem.txt", tmp_path / "newest.txt"
    file.write_text("earlier content")
    try:
        link.symlink_to(file)
    except OSError:
        pytest.skip("this system has no symbolic links")
    run(prompt="café", output=str(link))
    assert link.is_symlink() and file.read_text(encoding="utf-8") == line(complete("café"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_written_to_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    run(prompt="café", output=str(pipe))
    assert pipe.is_fifo()
    assert os.read(reader, 1000) == line(complete("café")).encode()
    os.close(reader)


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="this system has no /dev/fd")
def test_an_open_pipe_is_written_to():
    """As with `--generate.output >(gzip > poem.gz)` in a shell."""
    reader, pipe = os.pipe()
    run(prompt="café", output=f"/dev/fd/{pipe}")
    assert os.read(reader, 1000) == line(complete("café")).encode()
    os.close(reader)
    os.close(pipe)


def test_texts_are_written_in_order_as_soon_as_they_are_complete(monkeypatch):
    reader, written = io.BytesIO(), []

    def chunks(*_):
        for row, text, last in [(0, "a", False), (1, "b", True), (0, "c", True), (2, "d", True)]:
            yield row, text, last
            written.append(reader.getvalue().decode().replace(SEPARATOR, "").split())

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(reader))
    monkeypatch.setattr(TextGenerator, "write", chunks)
    run(prompt="é", num_samples=3)
    assert written == [[], [], ["éac", "éb"], ["éac", "éb", "éd"]]


def test_an_output_file_keeps_what_was_generated_before_an_interruption(tmp_path, monkeypatch):
    def chunks(*_):
        yield 0, "abc", False
        raise KeyboardInterrupt

    monkeypatch.setattr(TextGenerator, "write", chunks)
    with pytest.raises(KeyboardInterrupt):
        run(prompt="x", output=str(tmp_path / "out.txt"))
    assert (tmp_path / "out.txt").read_text() == "xabc"


def test_a_single_text_is_streamed_character_by_character(monkeypatch):
    reader = io.BytesIO()
    streamed = []

    def chunks(*_):
        for character in "abc":
            yield 0, character, character == "c"
            streamed.append(reader.getvalue().decode().strip())

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(reader))
    monkeypatch.setattr(TextGenerator, "write", chunks)
    run(prompt="é")
    assert streamed == ["éa", "éab", "éabc"]


def test_a_closed_pipe_ends_quietly_and_the_locale_does_not_matter():
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
def test_invalid_options(wrong, message):
    with pytest.raises(UserError, match=message):
        run(**wrong)


def test_invalid_prompts_raise_before_anything_is_written(capsys, tmp_path, monkeypatch):
    file, empty, binary = tmp_path / "poem.txt", tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("")
    binary.write_bytes(b"abc\xff")
    missing = str(tmp_path / "none.txt")
    for options, error, message in [
        (dict(prompt="xyz"), UserError, "'x'"),
        (dict(prompts=missing), UserError, "cannot read .*none.txt: No such file"),
        (dict(prompts=str(tmp_path)), UserError, "cannot read "),
        (dict(prompts="\udfff"), UserError, "cannot read .*surrogates"),
        (dict(prompts=str(empty)), UserError, "empty.txt is empty"),
        (dict(prompts=str(binary)), UserError, "cannot read .*binary.txt: .*utf-8.* position 3"),
    ]:
        with pytest.raises(error, match=message):
            run(output=str(file), **options)
    monkeypatch.setattr(sys, "stdin", Stdin(b"\xff"))
    with pytest.raises(UserError, match="cannot read standard input: .*utf-8"):
        run(prompt="-")
    assert capsys.readouterr().out == "" and not file.exists()


def test_an_output_that_cannot_be_written(tmp_path):
    loop = tmp_path / "loop"
    cases = {
        str(tmp_path / "nowhere" / "poem.txt"): "No such file or directory",
        str(tmp_path): "directory",
    }
    if hasattr(os, "mkfifo"):
        loop.symlink_to(loop)
        cases[str(loop)] = "symbolic links"
    if os.path.exists("/dev/full"):
        cases["/dev/full"] = "No space left"
    for output, message in cases.items():
        with pytest.raises(UserError, match=f"cannot write {output}: .*{message}") as error:
            run(output=output)
        assert "\n" not in str(error.value)
    assert set(tmp_path.iterdir()) <= {loop}


def test_a_configuration_with_settings_of_other_commands(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("generate: {seed: 3}\nmodel: {ngrams: {2: 8}}\ntrainer: {max_steps: 3}\n")
    with pytest.raises(SystemExit, match="2"):
        run_command("predict", ["--config", str(config)])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) <= 2
