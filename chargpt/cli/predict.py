"""predict: prompts in, texts out. It needs neither Lightning nor the text that was trained on."""

import codecs
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from chargpt.atomic_file import atomic_write
from chargpt.checkpoints import network_of, read_checkpoint, resolve_checkpoint
from chargpt.cli.parsing import add_ckpt_path, checked, command_parser, read_config, split_configs
from chargpt.generation import GenerationConfig
from chargpt.text_generator import TextChunk, TextGenerator

Write = Callable[[str], object]
SEPARATOR = "-" * 40 + "\n"


def run(command: str, args: list[str]) -> None:
    """Parse the arguments of `predict` and do what they say."""
    parser = command_parser(command)
    add_ckpt_path(parser)
    parser.add_argument("-c", "--config", action="config", help="A file with these settings.")
    parser.add_function_arguments(predict, "generate", skip={"generator", "checkpoint"})
    configs, typed = split_configs(args)
    for name in configs:
        read_config(name)  # says what is wrong with it, if anything
    typed = [*(f"--config={name}" for name in configs), *typed]
    config = checked(parser, lambda: parser.parse_args(typed))
    path = resolve_checkpoint(config.ckpt_path)
    print(f"checkpoint {path}", file=sys.stderr)
    generator = TextGenerator(*network_of(read_checkpoint(path), path)).eval()
    predict(generator, path, **config.generate.as_dict())


def predict(
    generator: TextGenerator,
    checkpoint: str | Path,
    prompt: str = "",
    prompts: str = "",
    num_samples: int = 1,
    output: str = "",
    format: Literal["text", "jsonl"] = "text",
    **sampling: Any,
) -> None:
    """What to write, and where.

    When the reader of standard output has had enough (`| head`), it ends quietly. When interrupted,
    it leaves the texts so far (but for characters that may have begun a stop string), then lets
    KeyboardInterrupt through.

    Args:
        generator: writes.
        checkpoint: where it comes from.
        prompt: What the text begins with; "-" reads it from standard input. An empty one starts
            from a newline, or from the first character known where there is no newline.
        prompts: A file with a prompt in each line, instead of `prompt`. They are written together,
            each as if it were alone.
        num_samples: Texts for each prompt.
        output: A file for the texts, instead of standard output. What it held before is replaced,
            all at once, at the end.
        format: "text", each with its prompt, a line of hyphens between them; or "jsonl", a line
            for each, with the keys prompt, text, seed, sample, settings and checkpoint.
        sampling: the fields of `GenerationConfig`.

    Raises:
        ValueError: a prompt or stop string with a character that the generator does not know;
            prompts that are not UTF-8; a file of prompts without any; a setting that means nothing.
        OSError: a file that cannot be read or written.
    """
    config = GenerationConfig(**sampling)
    if prompts and prompt:
        raise ValueError("give a prompt or a file of prompts, not both")
    beginnings = [text or generator.opening for text in read_prompts(prompt, prompts)]
    chunks = generator.write(beginnings, config, num_samples)
    with destination(output) as write:
        for index, text in one_by_one(chunks, len(beginnings) * num_samples):
            beginning, sample = beginnings[index // num_samples], index % num_samples
            if format == "text":
                write_text(write, beginning, text, first=index == 0)
            else:
                settings = asdict(config)
                line = {
                    "prompt": beginning,
                    "text": beginning + "".join(text),
                    "seed": settings.pop("seed"),
                    "sample": sample,
                    "settings": settings,
                    "checkpoint": str(checkpoint),
                }
                write(json.dumps(line, ensure_ascii=False) + "\n")


def write_text(write: Write, prompt: str, text: Iterator[str], first: bool) -> None:
    """The prompt, then what follows it as it comes; a newline at the end, whoever wrote it."""
    shown = prompt if first else SEPARATOR + prompt
    write(shown)
    for chunk in text:
        write(chunk)
        shown = chunk
    if not shown.endswith("\n"):
        write("\n")


def one_by_one(chunks: Iterator[TextChunk], count: int) -> Iterator[tuple[int, Iterator[str]]]:
    """Texts that are written together, to be read one after the other.

    The chunks of the first come as they are written, those of the others wait until it is complete.
    An interruption ends them all; it is raised again when all that was written has been read.
    """
    waiting: list[list[str]] = [[] for _ in range(count)]
    complete: set[int] = set()
    interrupt: KeyboardInterrupt | None = None

    def text(index: int) -> Iterator[str]:
        nonlocal interrupt
        while True:
            if waiting[index]:
                yield "".join(waiting[index])
                waiting[index].clear()
            if index in complete or interrupt:
                return
            try:
                chunk = next(chunks)
            except KeyboardInterrupt as error:
                interrupt = error
                continue
            if chunk.text:
                waiting[chunk.row].append(chunk.text)
            if chunk.last:
                complete.add(chunk.row)

    for index in range(count):
        if not interrupt or waiting[index]:
            yield index, text(index)
    if interrupt:
        raise interrupt


def read_prompts(prompt: str, prompts: str) -> list[str]:
    """The prompts of the flag, of standard input or of a file.

    A prompt is taken as it stands, newlines at its end too; those of a file end with their line.
    """
    if prompts:
        text = decode(Path(prompts).expanduser().read_bytes(), prompts).removeprefix("\ufeff")
        if not text:
            raise ValueError(f"{prompts} is empty; it needs a prompt in each line")
        return text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if prompt == "-":
        if sys.stdin is None:
            raise ValueError("standard input is closed: there is no prompt to read")
        return [decode(sys.stdin.buffer.read(), "standard input")]
    return [prompt]


def decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 text: invalid byte at offset {error.start:,}"
        ) from error


@contextmanager
def destination(output: str) -> Iterator[Write]:
    """Where texts are written: standard output, or a file that is complete or not there."""
    if not output:
        with standard_output() as write:
            yield write
        return
    path = Path(output).expanduser()
    try:
        if path.exists() and not path.is_file():  # a device or a named pipe cannot be replaced
            with open(path, "w", encoding="utf-8", errors="replace") as file:
                yield file.write
        else:
            with whole_text_file(path.resolve()) as write:  # what a link leads to, not the link
                yield write
    except OSError as error:
        raise ValueError(f"cannot write {output}: {error.strerror or error}") from error


@contextmanager
def whole_text_file(path: Path) -> Iterator[Write]:
    """A file that appears when it is complete; when interrupted, with what was written so far."""
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}")
    interrupt = None
    with atomic_write(path) as file:
        try:
            yield codecs.getwriter("utf-8")(file, "replace").write
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt:
        raise interrupt


@contextmanager
def standard_output() -> Iterator[Write]:
    """UTF-8 whatever the locale, flushed as it is written, quiet when nobody reads any more."""
    if hasattr(sys.stdout, "reconfigure"):  # a test or a notebook may have put another in its place
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        yield write
    except OSError as error:
        # The interpreter flushes once more when it ends, and must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise ValueError(f"cannot write to standard output: {error.strerror}") from error
