"""Mutation testing: change the package in one place at a time and check that a test fails.

    pip install cosmic-ray
    python tests/benchmarks/mutants.py --each 30
    python tests/benchmarks/mutants.py chargpt/model/gpt.py --each 100 --seed 1

cosmic-ray's operators change a number by one, replace an operator or a comparison, negate a condition,
replace `break` with `continue`, or remove a decorator or a loop. For each file, `--each` of all
possible changes are sampled and made in a copy of the project, and the tests listed below run until
one fails. Surviving mutants are printed, to be judged by a person: a gap in the tests, or a change
that makes no difference.

torch and Lightning are imported once; each mutant is tested in a fork of that process.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cosmic_ray.plugins
import hypothesis  # noqa: F401    imported here so that forks need not import them again
import lightning  # noqa: F401
import lightning.pytorch.cli  # noqa: F401
import pytest
import torch  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

PROJECT = Path(__file__).resolve().parents[2]
TESTS = {  # files and the tests that should catch changes to them, fastest first
    "chargpt/model/gpt.py": "test_model test_generation test_text_generator test_compile",
    "chargpt/generation.py": "test_generation test_text_generator test_predict",
    "chargpt/data/datasets.py": "test_data",
    "chargpt/data/texts.py": "test_texts test_token_file",
    "chargpt/data/module.py": "test_data test_resume",
    "chargpt/data/token_file.py": "test_token_file test_texts test_data",
    "chargpt/training/optimizers.py": "test_optimizers test_module",
    "chargpt/training/module.py": "test_module test_lightning test_resume test_fine_tuning",
    "chargpt/training/checkpointing.py": "test_checkpointing test_resume test_distributed",
    "chargpt/checkpoints.py": "test_checkpoints test_checkpoint_file test_text_generator "
    "test_fine_tuning test_page test_hostile",
    "chargpt/atomic_file.py": "test_atomic_file test_token_file",
}


def mutations(code: str) -> dict[tuple, list[tuple[str, int]]]:
    """The possible mutations, as (operator, occurrence), by position in the code and kind."""
    sites: dict[tuple, list[tuple[str, int]]] = {}
    nodes = list(ast_nodes(get_ast(code)))
    for name in cosmic_ray.plugins.operator_names():
        operator = cosmic_ray.plugins.get_operator(name)
        if operator.arguments():  # operators that need variable names
            continue
        occurrence = 0
        for node in nodes:
            for start, _ in operator().mutation_positions(node):
                sites.setdefault((start, name.split("_")[0]), []).append((name, occurrence))
                occurrence += 1
    return sites


def passes(copy: Path, tests: list[str], timeout_s: float) -> bool:
    """Whether the tests pass in the copy, in a fork of this process."""
    child = os.fork()
    if child == 0:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        os._exit(pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]))
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False  # a timeout counts as caught


def copy_of_project(folder: Path) -> Path:
    files = subprocess.check_output(["git", "ls-files"], cwd=PROJECT, text=True).splitlines()
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / file, folder / file)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", default=list(TESTS), help="files to change")
    parser.add_argument("--each", type=int, default=30, help="mutants per file")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    args = parser.parse_args()
    sys.dont_write_bytecode = True
    sys.stdout.reconfigure(line_buffering=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_project(Path(folder))
        os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        total_killed = total_sampled = 0
        for file in args.files:
            tests = [f"tests/{name}.py" for name in TESTS[file].split()]
            begin = time.monotonic()
            if not passes(copy, tests, 600):
                raise SystemExit(f"{' '.join(tests)} fail without a mutation")
            timeout_s = 30 + 3 * (time.monotonic() - begin)
            code = (copy / file).read_text()
            sites = sorted(mutations(code).items())
            rng = random.Random(f"{args.seed} {file}")
            sampled = [
                rng.choice(choices) for _, choices in rng.sample(sites, min(args.each, len(sites)))
            ]
            killed = 0
            for name, occurrence in sampled:
                operator = cosmic_ray.plugins.get_operator(name)()
                mutated = mutate_code(code, operator, occurrence)
                (copy / file).write_text(mutated)
                survives = passes(copy, tests, timeout_s)
                killed += not survives
                if survives:
                    show(file, name, code, mutated)
            (copy / file).write_text(code)
            print(f"{file}: {killed} of {len(sampled)} caught ({len(sites)} sites)")
            total_killed += killed
            total_sampled += len(sampled)
    print(f"{total_killed} of {total_sampled} caught: {total_killed / total_sampled:.1%}")


def show(file: str, name: str, code: str, mutated: str) -> None:
    before, after = code.splitlines(), mutated.splitlines()
    for number, (old, new) in enumerate(zip(before, after), start=1):
        if old != new:
            print(f"survives  {file}:{number}  {name.partition('/')[2]}\n  - {old}\n  + {new}")
            return
    print(f"survives  {file}  {name}")


if __name__ == "__main__":
    main()
