"""The lesson (chargpt/README.md): its code runs and prints what the page says.

After a change, `python tests/test_lesson.py` writes the printed numbers into the page. (The blocks
marked `trained` come from runs with the real text, such as `python -m chargpt.explain`.)
"""

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from chargpt import explain, textbook

LESSON = Path(textbook.__file__).with_name("README.md")
FENCE = re.compile(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = "<<next block>>"
LINE = "Good morrow, neighbour Baptista."
SHORTER = (("= 32, 1000, 5e-3", "= 4, 3, 5e-3"), ("= 500, 50_000", "= 500, 200"))  # training


class Block(NamedTuple):
    language: str
    kind: str | None
    body: str


BLOCKS = [Block(*match.groups()) for match in FENCE.finditer(LESSON.read_text(encoding="utf-8"))]
CODE = [block.body for block in BLOCKS if block.language == "python"]


def run_lesson(saved: Path) -> list[str]:
    """What each Python block prints in a fresh interpreter; `saved` gets weights and logits."""
    program = f"\nprint({MARK!r})\n".join(CODE)
    program += f"\ntorch.save((model.state_dict(), idx, model(idx)[0]), {str(saved)!r})\n"
    for long, short in SHORTER:
        assert program.count(long) == 1
        program = program.replace(long, short)
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split(MARK + "\n")


def test_each_block_prints_what_follows_it_and_the_network_is_that_of_the_textbook(tmp_path):
    printed, compared = run_lesson(tmp_path / "weights.pt"), 0
    outputs = iter(printed)
    for block, following in zip(BLOCKS, [*BLOCKS[1:], Block("", None, "")]):
        if block.language == "python":
            output = next(outputs)
            if following.language == "text" and following.kind != "trained":
                assert output == following.body
                compared += 1
    assert compared >= 15
    weights, idx, logits = torch.load(tmp_path / "weights.pt")
    model = textbook.BigramLangModel(65, **explain.SIZES)
    model.load_state_dict(weights)
    assert torch.equal(model(idx)[0], logits)


def test_definitions_are_those_of_the_textbook():
    names = set()
    for code in CODE:
        nodes = ast.parse(code).body
        name = getattr(nodes[0], "name", None)
        if len(nodes) == 1 and hasattr(textbook, name or ""):
            assert code == inspect.getsource(getattr(textbook, name))
            names.add(name)
    assert names >= {"encode", "get_batch", "Head", "MultiHeadAttention", "FeedForward", "Block"}
    assert names >= {"BigramLangModel", "estimate_loss", "train"}


def test_explain_prints_the_numbers_of_the_lesson(monkeypatch, capsys):
    """Before training they depend on the vocabulary and the line only, not on the text."""
    characters = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    text = (characters * 42)[:2700] + (LINE + "\n" + characters * 5)[:300]
    monkeypatch.setattr(explain, "TRAINING", explain.TRAINING | dict(epochs=0, eval_characters=1))
    explain.explain(text)
    lines = capsys.readouterr().out.partition("--- Training")[0].splitlines()
    blocks = [block for block in BLOCKS if block.kind == "explain"]
    assert len(blocks) >= 6
    for block in blocks:
        assert [line for line in block.body.splitlines() if line not in lines] == []


def test_the_lesson_uses_the_sizes_of_explain():
    sizes: dict = {}
    exec(next(code for code in CODE if code.startswith("block_size")), sizes)
    for name, value in (explain.SIZES | explain.TRAINING).items():
        assert sizes[name] == value


def test_links_and_pictures_exist():
    page = LESSON.read_text(encoding="utf-8")
    prose = FENCE.sub("", page)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for text, target in re.findall(r"\[([^]]*)\]\(([^)\s]+)\)", prose):
        path, _, anchor = target.partition("#")
        if not target.startswith("https:"):
            assert (LESSON.parent / path).exists(), target
            assert path or anchor in anchors, target
        if path.endswith((".svg", ".png")):
            assert len(text) > 30, f"{target} needs an alternative text"


def update() -> None:
    """Write what the blocks print into the page."""
    outputs, printed = iter(run_lesson(Path(os.devnull))), ""

    def write(match: re.Match) -> str:
        nonlocal printed
        block, output = Block(*match.groups()), printed
        printed = next(outputs) if block.language == "python" else ""
        if output and block.language == "text" and block.kind != "trained":
            return match[0].replace(block.body, output)
        return match[0]

    LESSON.write_text(FENCE.sub(write, LESSON.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    update()
