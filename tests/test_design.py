"""The rules of the house: who imports what, and that a setting is declared once."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import chargpt

PACKAGE = Path(chargpt.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
OURS = "chargpt"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


def imports(path: Path) -> set[str]:
    """The modules that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def reaches(start: str) -> set[str]:
    """Our modules that `start` imports, directly or not."""
    known = {module_of(path): path for path in FILES}
    seen, waiting = set(), [start]
    while waiting:
        module = waiting.pop()
        if module in known and module not in seen:
            seen.add(module)
            waiting += imports(known[module])
    return seen


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_lightning_stays_in_its_rooms(path):
    uses = {name.partition(".")[0] for name in imports(path)} & {"lightning", "torchmetrics"}
    rooms = ("chargpt.data", "chargpt.training", "chargpt.cli.train")
    assert not uses or module_of(path).startswith(rooms)


@pytest.mark.parametrize("module", ["vocabulary", "model", "generation", "textbook"])
def test_the_afternoons_files_know_nothing_of_the_workshop(module):
    names = (
        "vocabulary",
        "model",
        "model.errors",
        "model.gpt",
        "generation",
        "textbook",
        "textbook_walk",
    )
    afternoon = {f"chargpt.{name}" for name in names}
    assert reaches(f"chargpt.{module}") - {OURS} <= afternoon


def test_the_textbook_and_the_engine_do_not_import_each_other():
    for path in FILES:
        if not path.name.startswith("textbook"):
            assert "chargpt.textbook" not in imports(path), path


def test_arrows_point_one_way():
    """No module is imported by what it imports; the script and its walk are one."""
    for path in FILES:
        module = module_of(path).removesuffix("_walk")
        for other in imports(path):
            if other.startswith(OURS) and other not in (module, OURS, "chargpt.textbook_walk"):
                assert module not in reaches(other), f"{module} and {other} import each other"


# Names that begin with an underscore belong to their library; a use that must be stands here. (The
# counters of Lightning that training/resume.py sets are keys of a checkpoint, not names.)
PRIVATE = {
    "_foreach_lerp",
    "_foreach_lerp_",
    "_foreach_mul_",
    "_foreach_add_",  # torch's, for optimizers
    "_ddp_kwargs",  # Lightning's, in training/resume.py
}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_private_names_of_other_libraries(path):
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    attributes = {node.attr: type(node.ctx) for node in nodes if isinstance(node, ast.Attribute)}
    stored = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    methods = functions if "lightning" in path.read_text(encoding="utf-8") else set()
    private = {
        name
        for name in {*attributes, *methods}
        if name.startswith("_") and not name.startswith("__")
    }
    assert private <= PRIVATE | stored | (functions - methods)


def test_writing_imports_no_lightning_and_parsing_no_more_than_it_needs():
    code = (
        "import sys, chargpt; assert 'torch' not in sys.modules; chargpt.load; chargpt.Vocabulary; chargpt.GPT\n"
        "assert not {'lightning', 'torchmetrics', 'jsonargparse'} & sys.modules.keys()\n"
        "import chargpt.cli.predict\n"
        "assert not {'lightning', 'torchmetrics', 'pytorch_lightning'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


DECLARATION = "    n_layer: int = 6\n"
COMMANDS = r"""
import contextlib, io, sys, torch
from chargpt.cli.main import main

def run(*args):
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(args))
        except SystemExit as stop:
            status = stop.code or 0
    return status, out.getvalue(), err.getvalue()

status, out, _ = run("fit", "--help")
assert "--model.foo FOO" in out and "How much foo." in out and "(type: int, default: 3)" in out, out
status, out, _ = run("fit", "--model.foo=4", "--print_config")
assert "\n  foo: 4\n" in out, out
status, _, err = run("fit", "--model.foo=x")
assert status == 2 and '"model.foo": Expected a int. Got value: x' in err, err
status, _, err = run("fit", "--config=tiny.yaml", "--model.foo=4")
assert status == 0, err
last = "lightning_logs/version_0/checkpoints/last.ckpt"
assert torch.load(last, weights_only=True)["hyper_parameters"]["foo"] == 4
import chargpt
assert chargpt.load().gpt.config.foo == 4
status, _, err = run("validate", "--print_config")
status, _, err = run("validate", "--model.foo=5")
assert status == 1 and "foo is 4 in the checkpoint" in err, err
status, _, err = run("fit", "--ckpt_path=last", "--trainer.max_steps=12", "--model.foo=5")
assert status == 1 and "foo is 4 in the checkpoint" in err, err
assert run("validate")[0] == 0
"""


def test_a_setting_of_the_network_is_one_declaration(folder):
    """In a copy of the package with one field more: the flag, the help and all else follow."""
    copy = folder / "copy" / "chargpt"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    source = (copy / "model" / "gpt.py").read_text(encoding="utf-8")
    assert source.count(DECLARATION) == 1
    field = DECLARATION + '    """Blocks."""\n    foo: int = 3\n    """How much foo."""\n'
    blocks = DECLARATION + '    """Blocks, one after the other."""\n'
    assert blocks in source
    (copy / "model" / "gpt.py").write_text(source.replace(blocks, field), encoding="utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy.parent),
        "COLUMNS": "200",
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
