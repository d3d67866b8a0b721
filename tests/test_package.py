"""The installed package: the contents of a wheel, and shipped configurations by name."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import chargpt
from chargpt.cli.parsing import find_config, shipped_configs

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
COMMANDS = """
import sys
import chargpt
from chargpt.__main__ import main  # like the console command
assert chargpt.__file__.startswith(sys.path[1]), (chargpt.__file__, sys.path)
for args in (
    "fit --config debug --data.corpus=text.txt --trainer.max_steps=2 --model.norm=plain",
    "predict --generate.prompt=The --generate.max_new_chars=5",
    "export --to=huggingface --output=folder",
    "export --to=page --output=page.html",
):
    if args.startswith("export"):
        sys.modules["transformers"] = None  # optional, and it would take seconds
    sys.argv = ["chargpt", *args.split()]
    main()
"""
BUILD = "from setuptools.build_meta import {0}; {0}('dist')"


def python(folder: Path, *args: str, path: Path | None = None) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path or "")}
    result = subprocess.run(
        [sys.executable, *args], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the contents of a wheel that was built from the source archive."""
    try:
        if int(version("setuptools").partition(".")[0]) < 77:
            pytest.skip("setuptools is older than 77")
    except PackageNotFoundError:
        pytest.skip("setuptools is not installed")
    folder = tmp_path_factory.mktemp("build")
    for name in ("chargpt", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    python(folder, "-c", BUILD.format("build_sdist"))
    (archive,) = folder.glob("dist/*.tar.gz")
    shutil.unpack_archive(archive, folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    python(unpacked, "-c", BUILD.format("build_wheel"))
    (wheel,) = unpacked.glob("dist/*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    return folder / "installed"


def test_a_wheel_contains_every_file_of_the_package(installed):
    kinds = {".py", ".js", ".html", ".css", ".typed"}
    ours = {
        path
        for path in (ROOT / "chargpt").rglob("*")
        if path.suffix in kinds or path.name == "py.typed"
    }
    names = {path.relative_to(ROOT).as_posix() for path in ours}
    names |= {f"chargpt/configs/{name}.yaml" for name in CONFIGS}
    packed = {
        p.relative_to(installed).as_posix()
        for p in (installed / "chargpt").rglob("*")
        if p.is_file()
    }
    assert packed == names
    (metadata,) = installed.glob("chargpt-*.dist-info/METADATA")
    assert f"Version: {chargpt.__version__}\n" in metadata.read_text(encoding="utf-8")
    assert "chargpt.__main__:main" in metadata.with_name("entry_points.txt").read_text()


def test_an_installed_package_trains_generates_and_exports(installed, tmp_path, text):
    (tmp_path / "text.txt").write_text(text, newline="\n")

    (tmp_path / "commands.py").write_text(COMMANDS)
    assert python(tmp_path, "commands.py", path=installed).startswith("The")
    assert (tmp_path / "folder" / "modeling_chargpt.py").is_file()  # with code of its own
    assert (tmp_path / "page.html").is_file()


def test_a_configuration_is_found_by_name_unless_a_file_has_it(tmp_path, monkeypatch, command):
    assert sorted(shipped_configs()) == CONFIGS
    monkeypatch.chdir(tmp_path)
    assert Path(find_config("cpu")) == ROOT / "configs" / "cpu.yaml"
    (tmp_path / "cpu").mkdir()
    assert Path(find_config("cpu")) == ROOT / "configs" / "cpu.yaml"
    (tmp_path / "debug").write_text("model: {n_layer: 7}\n")
    assert find_config("debug") == "debug"
    assert "\n  n_layer: 7\n" in command(tmp_path, "fit", "--config=debug", "--print_config").out
    assert "\n  n_layer: 2\n" in command(tmp_path, "fit", "-c", "cpu", "--print_config").out


def test_help_and_the_error_list_the_configurations(tmp_path, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    names = ", ".join(CONFIGS)
    assert names in " ".join(command(tmp_path, "fit", "--help").out.split())
    result = command(tmp_path, "fit", "--config=cpuu")
    assert (result.status, names in result.err) == (2, True)
