"""The architecture: which part imports which, private names, and settings declared once."""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import chargpt

PACKAGE = Path(chargpt.__file__).parent


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def parse(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(module: str) -> set[str]:
    """The absolute names of a module's imports, at any level; not those for type checking only."""
    tree, found = parse(module), set()
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for_types = {id(n) for node in ast.walk(tree) if is_type_checking(node) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: package.count(".") + 2 - node.level]
            source = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return found


GRAPH = {module: imports(module) & FILES.keys() for module in FILES}
LIBRARIES = {m: {name.partition(".")[0] for name in imports(m)} - {"chargpt"} for m in FILES}
STANDARD = sys.stdlib_module_names


def reaches(*modules: str) -> set[str]:
    """These modules and all their direct and indirect imports, except the package itself."""
    seen, waiting = set(), list(modules)
    while waiting:
        if (module := waiting.pop()) not in seen:
            seen.add(module)
            waiting += GRAPH[module]
    return seen - {"chargpt"}


def below(folder: str) -> set[str]:
    return {module for module in FILES if module == folder or module.startswith(f"{folder}.")}


# ---- imports ----


def test_lightning_is_imported_for_training_only():
    users = {m for m in FILES if LIBRARIES[m] & {"lightning", "pytorch_lightning", "torchmetrics"}}
    assert users <= below("chargpt.data") | below("chargpt.training") | {"chargpt.cli.train"}


def test_the_model_imports_torch_and_its_own_folder_relatively():
    model = below("chargpt.model")
    assert reaches(*model) <= model
    for module in model:
        assert LIBRARIES[module] <= STANDARD | {"torch"}
        nodes = [node for node in ast.walk(parse(module)) if isinstance(node, ast.ImportFrom)]
        assert all(n.level or not n.module.startswith("chargpt") for n in nodes), module


def test_generation_and_vocabulary_import_nothing_beyond_the_model():
    own = {"chargpt.generation", "chargpt.vocabulary"}
    assert reaches(*own) <= own | below("chargpt.model")


def test_the_textbook_and_the_engine_do_not_import_each_other():
    textbook = {"chargpt.textbook", "chargpt.explain"}
    assert not reaches("chargpt.textbook") - {"chargpt.textbook"}
    assert reaches("chargpt.explain") == textbook
    assert all(LIBRARIES[module] <= STANDARD | {"torch"} for module in textbook)
    assert not reaches(*(FILES.keys() - textbook)) & textbook


def test_imports_have_no_cycles():
    TopologicalSorter(GRAPH).prepare()  # a CycleError names the cycle


def test_imports_of_a_new_process(tmp_path):
    """The package draws no random numbers, prints nothing, and imports what it needs only."""
    code = (
        "import sys, chargpt; assert 'torch' not in sys.modules\n"
        "import torch; state = torch.get_rng_state()\n"
        "from chargpt import textbook\n"
        "modules = [name for name in sys.modules if name.startswith('chargpt.')]\n"
        "assert modules == ['chargpt.textbook'], modules\n"
        "chargpt.load; chargpt.Vocabulary; chargpt.GPT\n"
        "assert torch.equal(state, torch.get_rng_state())\n"
        "assert not {'lightning', 'torchmetrics', 'jsonargparse'} & sys.modules.keys()\n"
        "gpt = chargpt.GPT(chargpt.GPTConfig(n_embd=8, n_head=2, n_layer=1), 2)\n"
        "chargpt.save(gpt, chargpt.Vocabulary('ab'), sys.argv[1]); chargpt.load(sys.argv[1])\n"
        "assert 'torch._dynamo' not in sys.modules\n"  # a second
        "import chargpt.cli.predict\n"
        "assert not {'lightning', 'torchmetrics', 'pytorch_lightning'} & sys.modules.keys()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.ckpt")]
    result = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# ---- private names of other libraries ----

PRIVATE = {
    "_foreach_lerp": "Muon: one call for all matrices of a shape; torch has no public name for it",
    "_foreach_lerp_": "the same",
    "_foreach_mul_": "the same",
    "_foreach_add_": "the same",
    "_ddp_kwargs": "Lightning fixes them before the number of ranks is known",
    "_should_check_val_fx": "whether a validation follows has no public name, and five cases",
}


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.endswith("__")


def private_names(tree: ast.AST) -> Iterator[str]:
    """Private names that may belong to another library, whether read, assigned or overridden.

    A class without bases owns what begins with `self._`; any other may share it with its base.
    """
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    own = {id(n) for c in classes if not c.bases for n in ast.walk(c)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if not (id(node) in own and ast.unparse(node.value) == "self"):
                yield node.attr
        elif isinstance(node, ast.ClassDef) and node.bases:
            for child in node.body:
                targets = getattr(child, "targets", [getattr(child, "target", None)])
                names = [getattr(child, "name", None), *(getattr(t, "id", None) for t in targets)]
                yield from filter(is_private, names)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            yield from (part for name in names for part in name.split(".") if is_private(part))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("attr"):  # getattr
            yield from (a.value for a in node.args if is_private(getattr(a, "value", None)))


def test_private_names_of_other_libraries_are_listed_with_a_reason():
    used = {name: module for module in FILES for name in private_names(parse(module))}
    assert used.keys() == PRIVATE.keys(), used


@pytest.mark.parametrize(
    "code",
    [
        "trainer.fit_loop._x = 1",
        "trainer._x.y = 1",
        "trainer._x += 1",
        "del trainer._x",
        "print(trainer._x)",
        "setattr(trainer, '_x', 1)",
        "from torch import _x",
        "import torch._x.y",
        "from torch._x import y",
        "class A(Base):\n    def _x(self): pass",
        "class A(Base):\n    _x = 1",
        "class A(Base):\n    _x: int = 1",
        "class A(Base):\n    def f(self): self._x = 1",
        "class A:\n    def f(self, other): other._x = 1",
    ],
)
def test_a_private_name_is_found_wherever_it_is(code):
    assert list(private_names(ast.parse(code))) == ["_x"]


@pytest.mark.parametrize(
    "code",
    ["def _x(): pass", "class A:\n    def f(self): self._x = self._x", "super().__init__()"],
)
def test_own_private_names_are_allowed(code):
    assert not list(private_names(ast.parse(code)))


# ---- settings ----

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
assert status == 2 and "--model.foo: x is not a whole number" in err, err
status, _, err = run("fit", "--config=tiny.yaml", "--model.foo=4")
assert status == 0, err
last = "lightning_logs/version_0/checkpoints/last.ckpt"
assert torch.load(last, weights_only=True)["hyper_parameters"]["foo"] == 4
import chargpt
assert chargpt.load().gpt.config.foo == 4
status, _, err = run("validate", "--model.foo=5")
assert status == 1 and "foo is 4 in the checkpoint" in err, err
status, _, err = run("fit", "--ckpt_path=last", "--trainer.max_steps=12", "--model.foo=5")
assert status == 1 and "foo is 4 in the checkpoint" in err, err
assert run("validate")[0] == 0
"""


def test_a_setting_of_the_network_is_declared_once(folder):
    """One more field in a copy of the package: flag, help, check and checkpoint follow."""
    copy = folder / "copy" / "chargpt"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    source = (copy / "model" / "config.py").read_text(encoding="utf-8")
    assert source.count(DECLARATION) == 1
    field = DECLARATION + '    """Blocks."""\n    foo: int = 3\n    """How much foo."""\n'
    blocks = DECLARATION + '    """Number of transformer blocks."""\n'
    assert blocks in source
    (copy / "model" / "config.py").write_text(source.replace(blocks, field), encoding="utf-8")
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
