"""What `python -m chargpt predict` does with a Writer: prompts in, texts out."""

import codecs
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from chargpt.atomic_file import atomic_write
from chargpt.writer import Piece, Settings, Writer

Write = Callable[[str], object]
SEPARATOR = "-" * 40 + "\n"


@dataclass(frozen=True)
class Generate(Settings):
    """What to write, and where.

    Args:
        prompt: what the text begins with; "-" reads it from standard input. An empty one starts
            from a newline, or from the first character known where there is no newline.
        prompts: a file with a prompt in each line, instead of `prompt`. They are written together,
            each as if it were alone.
        num_samples: texts for each prompt.
        output: a file for the texts, instead of standard output. What it held before is replaced,
            all at once, at the end.
        format: "text", each with its prompt, a line of hyphens between them; or "jsonl", a line
            for each, with the keys prompt, text, seed, sample, settings and checkpoint.
    """

    prompt: str = ""
    prompts: str = ""
    num_samples: int = 1
    output: str = ""
    format: Literal["text", "jsonl"] = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}; it must be at least 1")
        if self.prompts and self.prompt != Generate.prompt:
            raise ValueError("give a prompt or a file of prompts, not both")
        if self.format not in ("text", "jsonl"):
            raise ValueError(f'format is "{self.format}"; it must be text or jsonl')


def predict(writer: Writer, options: Generate, checkpoint: str | Path) -> None:
    """Write what the options ask for.

    When the reader of standard output has had enough (`| head`), it ends quietly. When interrupted,
    it leaves the texts so far (but for characters that may have begun a stop string), then lets
    KeyboardInterrupt through.

    Raises:
        ValueError: a prompt or stop string with a character that the writer does not know; prompts
            that are not UTF-8; a file of prompts without any.
        OSError: a file that cannot be read or written.
    """
    prompts = [prompt or writer.opening for prompt in read_prompts(options)]
    pieces = writer.write(prompts, options, options.num_samples)
    texts = one_by_one(pieces, len(prompts) * options.num_samples)
    with destination(options.output) as write:
        for index, text in texts:
            prompt, sample = prompts[index // options.num_samples], index % options.num_samples
            if options.format == "text":
                write_text(write, prompt, text, first=index == 0)
            else:
                write(json.dumps(record(prompt, text, sample, options, checkpoint), ensure_ascii=False) + "\n")


def write_text(write: Write, prompt: str, text: Iterator[str], first: bool) -> None:
    """The prompt, then what follows it as it comes; a newline at the end, whoever wrote it."""
    shown = prompt if first else SEPARATOR + prompt
    write(shown)
    for piece in text:
        write(piece)
        shown = piece
    if not shown.endswith("\n"):
        write("\n")


def record(
    prompt: str, text: Iterator[str], sample: int, options: Generate, checkpoint: str | Path
) -> dict[str, Any]:
    settings = {field.name: getattr(options, field.name) for field in fields(Settings)}
    return {
        "prompt": prompt,
        "text": prompt + "".join(text),
        "seed": settings.pop("seed"),
        "sample": sample,
        "settings": settings,
        "checkpoint": str(checkpoint),
    }


def one_by_one(pieces: Iterator[Piece], count: int) -> Iterator[tuple[int, Iterator[str]]]:
    """Texts that are written together, to be read one after the other.

    The pieces of the first come as they are written, those of the others wait until it is complete.
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
                piece = next(pieces)
            except KeyboardInterrupt as error:
                interrupt = error
                continue
            if piece.text:
                waiting[piece.index].append(piece.text)
            if piece.last:
                complete.add(piece.index)

    for index in range(count):
        if not interrupt or waiting[index]:
            yield index, text(index)
    if interrupt:
        raise interrupt


def read_prompts(options: Generate) -> list[str]:
    """The prompts of the flag, of standard input or of a file.

    A prompt is taken as it stands, newlines at its end too; those of a file end with their line.
    """
    if options.prompts:
        text = decode(Path(options.prompts).expanduser().read_bytes(), options.prompts).removeprefix("\ufeff")
        if not text:
            raise ValueError(f"{options.prompts} is empty; it needs a prompt in each line")
        return text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if options.prompt == "-":
        return [decode(sys.stdin.buffer.read(), "standard input")]
    return [options.prompt]


def decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: invalid byte at offset {error.start:,}") from error


@contextmanager
def destination(output: str) -> Iterator[Write]:
    """Where texts are written: standard output, or a file that is complete or not there."""
    if not output:
        with standard_output() as write:
            yield write
        return
    path = Path(output).expanduser()
    if path.exists() and not path.is_file():  # a device or a named pipe: nothing to put in its place
        with open(path, "w", encoding="utf-8", errors="replace") as file:
            yield file.write
        return
    path = path.resolve()  # the file that a link leads to, not the link, is replaced
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {output}: there is no folder {path.parent}")
    interrupt = None
    with atomic_write(path) as file:
        try:
            yield codecs.getwriter("utf-8")(file, errors="replace").write
        except KeyboardInterrupt as error:  # what was written so far is what is wanted
            interrupt = error
    if interrupt:
        raise interrupt


@contextmanager
def standard_output() -> Iterator[Write]:
    """UTF-8 whatever the locale, flushed as it is written, quiet when nobody reads any more."""
    if hasattr(sys.stdout, "reconfigure"):  # what a test or a notebook puts in its place may lack it
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        yield write
    except BrokenPipeError:
        # the interpreter flushes once more when it ends, and must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
