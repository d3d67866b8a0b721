"""The folder of a run: one process at a time, swept, found again where it was moved."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock

from chargpt.checkpoints import LOGS

RUN = Path(LOGS, "version_0")


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A folder with a run in it, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def best(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoints/step=*"))


def test_a_run_in_which_another_process_trains_is_refused(run, command):
    with FileLock(run / RUN / ".lock"):
        before = sorted((run / RUN).rglob("*"))
        result = command(run, "fit", "--ckpt_path=last", "--trainer.max_steps=12")
        assert (result.status, len(result.err.strip().splitlines()[-2:])) == (1, 2)
        assert "another process is training in" in result.err
        assert sorted((run / RUN).rglob("*")) == before
    assert command(run, "fit", "--ckpt_path=last", "--trainer.max_steps=12").status == 0


def test_a_run_that_cannot_resume_keeps_its_settings(run, command):
    before = (run / RUN / "config.yaml").read_bytes()
    flags = ["--trainer.max_steps=12", "--data.corpus=none.txt"]
    result = command(run, "fit", "--ckpt_path=last", *flags)
    assert (result.status, "there is no text" in result.err) == (1, True)
    assert (run / RUN / "config.yaml").read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_a_killed_process_leaves_a_lock_that_blocks_nobody_and_its_half_written_file_goes(
    run, command
):
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from chargpt.cli.run_folder import RunFolder\n"
        "folder = RunFolder(Path(sys.argv[1]).parent, Path(sys.argv[1]))\n"
        "Path(sys.argv[1], 'checkpoints', '.last.ckpt.0.tmp').write_text('half')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(run / RUN)], cwd=Path(__file__).parents[1])
    assert (run / RUN / ".lock").exists()
    assert (run / RUN / "checkpoints" / ".last.ckpt.0.tmp").exists()
    assert command(run, "fit", "--ckpt_path=last", "--trainer.max_steps=12").status == 0
    assert list(run.rglob("*.tmp")) == []


@pytest.mark.parametrize("place", [f"{LOGS}/renamed", "elsewhere/renamed"])
def test_a_run_that_was_moved_goes_on_in_its_folder_and_keeps_its_best(run, command, place):
    (score,) = best(run / RUN)
    curves = len(list((run / RUN).glob("events.out*")))
    (run / place).parent.mkdir(exist_ok=True)
    (run / RUN).rename(run / place)
    # With a learning rate that spoils the network, no later score is the best.
    path = run / place / "checkpoints" / "last.ckpt"
    flags = ["--trainer.max_steps=12", "--model.lr=1.0"]
    result = command(run, "fit", f"--ckpt_path={path}", *flags)
    assert result.status == 0, result.err
    assert torch.load(path, weights_only=True)["global_step"] == 12
    assert best(run / place) == [run / place / "checkpoints" / score.name]
    assert f"{run / place / 'checkpoints' / score.name}" in result.err
    assert not list(run.glob(f"{LOGS}/version_*"))
    assert len(list((run / place).glob("events.out*"))) > curves


def test_only_the_configuration_of_a_run_is_read_and_it_is_said(run, command):
    result = command(run, "fit", "--ckpt_path=last", "--trainer.max_steps=12")
    assert f"settings {run / RUN / 'config.yaml'}" in result.err
    lone = run / "somebody" / "models" / "last.ckpt"
    lone.parent.mkdir(parents=True)
    shutil.copy(run / RUN / "checkpoints" / "last.ckpt", lone)
    (run / "somebody" / "config.yaml").write_text(yaml.safe_dump({"trainer": {"max_steps": 999}}))
    result = command(run, "fit", f"--ckpt_path={lone}", "--trainer.max_steps=14")
    assert result.status == 0, result.err
    assert "settings" not in result.err
    # A checkpoint alone begins a folder of its own, with a best of its own.
    assert len(best(run / LOGS / "version_1")) == 1
