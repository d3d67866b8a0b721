"""predict: prompts to texts. It needs neither Lightning nor the text that was trained on."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TextIO

from chargpt.checkpoints import resolve_checkpoint
from chargpt.cli.parsing import add_ckpt_path, command_parser, find_configs, parse_or_exit
from chargpt.generation import GenerationConfig
from chargpt.model import UserError
from chargpt.text_generator import TextGenerator, load

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
    predict(load(path), path, **config.generate.as_dict())


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
        prompt: What the text begins with; "-" reads it from standard input. An empty one starts
            from a newline, or from the vocabulary's first character where it has no newline.
        prompts: A file with a prompt per line, instead of `prompt`. They are generated in batches,
            each as if it were alone.
        num_samples: Texts per prompt.
        output: A file instead of standard output.
        format: "text": each with its prompt, separated by a line of hyphens; or "jsonl": a line
            per text, with the keys prompt, text, seed, sample, settings and checkpoint.
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
            return SEPARATOR * (row > 0) + text + "\n" * (not text.endswith("\n"))
        line = {"prompt": starts[row // num_samples], "text": text, "seed": seed}
        line |= {"sample": row % num_samples, "settings": settings, "checkpoint": str(checkpoint)}
        return json.dumps(line, ensure_ascii=False) + "\n"

    streams = len(texts) == 1 and format == "text"
    complete: set[int] = set()
    written = 0  # texts
    with open_output(output) as file:
        file.write(texts[0] if streams else "")
        for row, text, last in chunks:
            texts[row] += text
            if streams:
                file.write(text)
            if last:
                complete.add(row)
            while written in complete:  # in order
                file.write(entry(written)[len(texts[0]) if streams else 0 :])
                written += 1
            file.flush()


def read_prompts(prompt: str, prompts: str) -> list[str]:
    """The prompts of the flag or of standard input, taken literally, or those of a file's lines."""
    if prompts and prompt:
        raise UserError("use either a prompt or a file of prompts, not both")
    if not prompts and prompt != "-":
        return [prompt]
    try:
        data = Path(prompts).expanduser().read_bytes() if prompts else sys.stdin.buffer.read()
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # also a name that cannot be encoded
        reason = getattr(error, "strerror", error)
        raise UserError(f"cannot read {prompts or 'standard input'}: {reason}") from error
    if prompts and not text:
        raise UserError(f"{prompts} is empty; it needs a prompt per line")
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n") if prompts else [text]


@contextmanager
def open_output(output: str) -> Iterator[TextIO]:
    """Open a file, or standard output, for UTF-8."""
    try:
        if output:
            path = Path(output).expanduser()
            with open(path, "w", encoding="utf-8", errors="replace", newline="") as file:
                yield file
        else:
            if hasattr(sys.stdout, "reconfigure"):  # tests and notebooks may have replaced it
                sys.stdout.reconfigure(encoding="utf-8", errors="replace")
            yield sys.stdout
    except OSError as error:
        if not output:  # the interpreter flushes once more at exit, and must not fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # as in `| head`, where it ends quietly
            target = output or "to standard output"
            raise UserError(f"cannot write {target}: {error.strerror}") from error
