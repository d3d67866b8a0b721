"""predict: prompts to texts. It needs neither Lightning nor the text that was trained on."""

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
from chargpt.checkpoints import build_network, read_checkpoint, resolve_checkpoint
from chargpt.cli.parsing import add_ckpt_path, command_parser, find_configs, parse_or_exit
from chargpt.generation import GenerationConfig
from chargpt.model import UserError
from chargpt.text_generator import TextChunk, TextGenerator

Write = Callable[[str], object]
SEPARATOR = "-" * 40 + "\n"


def run(command: str, args: list[str]) -> None:
    """Parse the arguments of `predict`, load the checkpoint and generate."""
    parser = command_parser(command)
    add_ckpt_path(parser)
    parser.add_argument("-c", "--config", action="config", help="A file with these settings.")
    parser.add_function_arguments(predict, "generate", skip={"generator", "checkpoint"})
    args = find_configs(args)
    config = parse_or_exit(parser, lambda: parser.parse_args(args))
    path = resolve_checkpoint(config.ckpt_path)
    print(f"checkpoint {path}", file=sys.stderr)
    generator = TextGenerator(*build_network(read_checkpoint(path), path)).eval()
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
    """Generate texts and write them to standard output or a file.

    Args:
        generator: the network with its vocabulary.
        checkpoint: its file, for the output in jsonl.
        prompt: What the text begins with; "-" reads it from standard input. An empty one starts
            from a newline, or from the vocabulary's first character where it has no newline.
        prompts: A file with a prompt per line, instead of `prompt`. They are generated in batches,
            each as if it were alone.
        num_samples: Texts per prompt.
        output: A file instead of standard output. Written atomically once generation finishes.
        format: "text": each with its prompt, separated by a line of hyphens; or "jsonl": a line
            per text, with the keys prompt, text, seed, sample, settings and checkpoint.
        sampling: the fields of `GenerationConfig`.
    """
    config = GenerationConfig(**sampling)
    starts = [text or generator.opening for text in read_prompts(prompt, prompts)]
    texts = [start for start in starts for _ in range(num_samples)]
    chunks = generator.write(starts, config, num_samples)
    settings = asdict(config)
    seed = settings.pop("seed")

    def entry(row: int) -> str:
        text = texts[row]
        if format == "text":
            return SEPARATOR * (row > 0) + text + ("" if text.endswith("\n") else "\n")
        line = {"prompt": starts[row // num_samples], "text": text, "seed": seed}
        line |= {"sample": row % num_samples, "settings": settings, "checkpoint": str(checkpoint)}
        return json.dumps(line, ensure_ascii=False) + "\n"

    finished = True
    with destination(output) as write:
        streamed = len(texts) == 1 and format == "text"
        finished = write_texts(texts, chunks, entry, write, streamed)
    if not finished:  # the output file now contains what was generated before
        raise KeyboardInterrupt


def write_texts(
    texts: list[str],
    chunks: Iterator[TextChunk],
    entry: Callable[[int], str],
    write: Write,
    streamed: bool,
) -> bool:
    """Append the chunks to the texts (first: the prompts) and write the entry of each text.

    Entries are written in order when complete, or in pieces if `streamed`. On Ctrl-C, write every
    completed text (or, if there is only one, what exists of it) and return False.
    """
    complete: set[int] = set()
    written = 0

    def finish(row: int) -> None:
        write(entry(row)[len(texts[row]) if streamed else 0 :])

    try:
        write(texts[0] if streamed else "")
        for row, text, last in chunks:
            texts[row] += text
            if streamed:
                write(text)
            if last:
                complete.add(row)
            while written in complete:
                finish(written)
                written += 1
        return True
    except KeyboardInterrupt:
        for row in range(written, len(texts)):
            if row in complete or len(texts) == 1:
                finish(row)
        return False


def read_prompts(prompt: str, prompts: str) -> list[str]:
    """The prompts of the flag or of standard input, taken literally, or those of a file's lines."""
    if prompts and prompt:
        raise UserError("use either a prompt or a file of prompts, not both")
    if not prompts and prompt != "-":
        return [prompt]
    name = prompts or "standard input"
    try:
        data = Path(prompts).expanduser().read_bytes() if prompts else sys.stdin.buffer.read()
        text = data.decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        where = f"invalid byte at offset {error.start:,}"
        raise UserError(f"{name} is not UTF-8 text: {where}") from error
    if not prompts:
        return [text]
    if not (text := text.removeprefix("\ufeff")):
        raise UserError(f"{prompts} is empty; it needs a prompt per line")
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


@contextmanager
def destination(output: str) -> Iterator[Write]:
    """A function that writes UTF-8 to standard output, or to a file that is replaced at the end."""
    path = Path(output).expanduser()
    target = Path(os.path.realpath(path))  # a link's target is replaced, not the link
    try:
        if not output:
            if hasattr(sys.stdout, "reconfigure"):  # tests and notebooks may have replaced it
                sys.stdout.reconfigure(encoding="utf-8", errors="replace")
            yield lambda text: print(text, end="", flush=True)
        elif path.exists() and not path.is_file():  # a device or a pipe
            with open(path, "w", encoding="utf-8", errors="replace") as file:
                yield file.write
        elif not target.parent.is_dir() or target.is_symlink():
            reason = "a loop of symbolic links" if target.is_symlink() else "no such folder"
            raise UserError(f"cannot write {output}: {reason}")
        else:
            with atomic_write(target) as binary:
                yield codecs.getwriter("utf-8")(binary, "replace").write
    except OSError as error:
        if not output:  # the interpreter flushes once more at exit, and must not fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # as in `| head`, where it ends quietly
            name = output or "to standard output"
            raise UserError(f"cannot write {name}: {error.strerror or error}") from error
