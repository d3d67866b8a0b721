"""tests/benchmarks/gpu.py and step.py on the CPU, with tiny networks."""

import collections
import contextlib
import json
import math
import runpy
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from chargpt.model import GPT, GPTConfig

BENCHMARKS = Path(__file__).parent / "benchmarks"
SAVES_ON_SIGTERM = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("saved")))
time.sleep(60)
"""


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """The benchmarks import each other by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


@pytest.fixture
def gpu(monkeypatch):
    """The module, with fewer runs."""
    import gpu

    monkeypatch.setattr(gpu, "VARIANTS", {"bf16": [gpu.BF16, gpu.COMPILE, gpu.CLIP]})
    monkeypatch.setattr(gpu, "MUON_VARIANTS", {})
    monkeypatch.setattr(gpu, "RESUMED", {"eager": []})
    # The others create a process group, which would remain in this process.
    monkeypatch.setattr(gpu, "STRATEGIES", {"sharded": ["--trainer.strategy=fsdp"]})
    return gpu


@pytest.fixture
def calls(gpu, command, monkeypatch) -> list[tuple[str, ...]]:
    """The arguments of all commands; they run in this process, which takes less time."""
    calls = []

    def run_process(args, folder, timeout_s):
        calls.append(args)
        if args[:2] == ("-m", "chargpt"):
            result = command(folder, *args[2:])
            (folder / "log.txt").write_text(result.err)
            return result.status
        (folder / "log.txt").write_text("a warning\ncontext 8: 10 kernels\n  a kernel\n")
        return 0

    monkeypatch.setattr(gpu, "run_process", run_process)
    return calls


def run(gpu, folder: Path, *flags: str) -> dict[tuple[str, str], dict]:
    """The rows of results.jsonl after a run of the benchmark."""
    gpu.main([str(folder / "text.txt"), "--output", str(folder / "out"), "--tiny", *flags])
    lines = (folder / "out" / "results.jsonl").read_text().splitlines()
    return {(row["part"], row["row"]): row for row in map(json.loads, lines)}


def test_all_parts_and_skipping_what_is_done(gpu, calls, folder, capsys):
    rows = run(gpu, folder)
    assert "".join(part for part, _ in rows) == "aabbccdeef"
    assert [key for key, row in rows.items() if row["status"] != "done"] == [("f", "sharded")]
    assert "GPU" in rows["f", "sharded"]["error"]
    for row in (rows["a", "base + gpu"], rows["b", "bf16-mixed"], rows["c", "seed 1337"]):
        losses = [loss for *_, loss in row["curve"]]
        assert [step for step, *_ in row["curve"]] == [4, 8]
        assert (row["steps"], row["val_loss"], row["best_val_loss"]) == (8, losses[-1], min(losses))
        assert row["chars_per_second"] * row["training_s"] == pytest.approx(8 * 4 * 8)
        assert row["peak_fraction"] == "unknown"
    assert rows["c", "profile of a step"]["summary"] == "context 8: 10 kernels"
    assert (folder / "out" / "profile.txt").read_text().endswith("a kernel\n")
    assert rows["d", "bf16"]["learns"] is True
    assert rows["d", "bf16"]["checkpoint"] == "loads"
    assert rows["e", "resume, eager"]["resumed: same bits"] is True
    assert rows["e", "generation"]["same text as on the CPU"] is True
    assert rows["e", "generation"]["same characters"] == 20

    table = (folder / "out" / "table.md").read_text()
    assert table.count("\n## ") == 6
    assert table.count("\n| ") == 6 + len(rows)  # a header for each part
    calls.clear()
    run(gpu, folder)
    assert [call for call in calls if "--trainer.strategy=fsdp" not in call] == []
    assert "f  sharded" in capsys.readouterr().out


def test_a_stopped_run_is_resumed(gpu, calls, folder, monkeypatch):
    run_process = gpu.run_process

    def stopped(args, folder, timeout_s):
        run_process((*args, "--trainer.max_steps=4"), folder, timeout_s)

    monkeypatch.setattr(gpu, "run_process", stopped)
    rows = run(gpu, folder, "--parts", "a")
    assert {row["status"] for row in rows.values()} == {"stopped"}
    calls.clear()
    monkeypatch.setattr(gpu, "run_process", run_process)
    row = run(gpu, folder, "--parts", "a")["a", "base + gpu"]
    assert all("--ckpt_path=last" in call for call in calls)
    assert (row["status"], row["steps"]) == ("done", 8)
    assert [step for step, *_ in row["curve"]] == [4, 8]


def test_an_unexpected_error_is_recorded_and_the_next_row_measured(gpu, calls, folder, monkeypatch):
    def fail(folder):
        raise RuntimeError("a | b")

    monkeypatch.setattr(gpu, "read_checkpoint", fail)
    rows = run(gpu, folder, "--parts", "a", "c")
    errors = {name: row.get("error") for (_, name), row in rows.items()}
    assert errors.pop("profile of a step") is None
    assert set(errors.values()) == {"RuntimeError: a | b"}
    assert "a \\| b" in (folder / "out" / "table.md").read_text()


def test_processes_end_at_the_time_limit(gpu, folder):
    assert gpu.run_process(("-c", "raise SystemExit(3)"), folder, 60) == 3
    start = time.monotonic()
    assert gpu.run_process(("-c", SAVES_ON_SIGTERM), folder, 2) is None
    assert time.monotonic() - start < 30
    assert (folder / "log.txt").read_text() == "saved\n"

    bench = gpu.Bench(folder / "text.txt", folder / "out", tiny=True)
    bench.deadline = time.monotonic() + gpu.SAVING_S + gpu.STARTUP_S - 1
    with pytest.raises(gpu.Stopped):  # too little time to start a process
        bench.call(folder / "run", "-c", "")
    bench.deadline = math.inf
    with pytest.raises(gpu.Failed, match="^ValueError: why$"):
        bench.call(folder / "run", "-c", "raise ValueError('why')")
    with pytest.raises(gpu.Failed, match="^error: what to do$"):
        bench.call(folder / "run", "-c", "raise SystemExit('error: what\\nto do')")


def test_seconds_of_training(gpu):
    speeds = [(10, 100.0), (20, 200.0)]  # characters per second of steps 1 to 10, 11 to 20
    seconds = [gpu.training_s(speeds, 1000, step) for step in (5, 10, 15, 20, 25)]
    assert seconds == [50, 100, 125, 150, 175]


def test_operations_of_the_textbook_model(gpu):
    gpt = GPT(GPTConfig(), 65)
    matrices = 6 * 12 * 384**2 + 384 * 65  # 6 blocks and the head
    attention = 6 * 2 * 256 * 384  # 6 blocks; q k^T and the product with v, below the diagonal
    assert gpu.operations_per_character(gpt, gpt.config, 256) == 6 * matrices + 3 * attention


def test_plain_messages(gpu, folder, monkeypatch, capsys):
    gpu.main(["--only-list"])
    assert [line[0] for line in capsys.readouterr().out.splitlines()] == list("abcdef")
    with pytest.raises(SystemExit, match="no text missing.txt"):
        gpu.main(["missing.txt"])
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        gpu.main([str(folder / "text.txt")])
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(SystemExit, match="needs jsonargparse"):
        runpy.run_path(str(BENCHMARKS / "gpu.py"))


def test_step(monkeypatch, capsys):
    import step

    flags = "--config debug --steps 1 --contexts 8 -- --trainer.accelerator cpu"
    monkeypatch.setattr(sys, "argv", ["step.py", *flags.split()])
    monkeypatch.setattr(step, "keep_freed_memory", lambda: None)
    step.main()
    output = capsys.readouterr().out
    assert "of the peak" in output
    assert "matrix products" in output


def test_kernels_of_a_step(monkeypatch, capsys):
    import step

    class Profile:
        def key_averages(self):
            cpu, gpu = (getattr(torch.autograd.DeviceType, name) for name in ("CPU", "CUDA"))
            return [
                Event(cpu, False, 0, 40, "aten::mm"),
                Event(gpu, False, 1000, 20, "activation"),
                Event(gpu, False, 3000, 10, "gemm"),
                Event(gpu, True, 9000, 2, "an annotation"),
            ]

    fields = "device_type is_user_annotation self_device_time_total count key"
    Event = collections.namedtuple("Event", fields)
    monkeypatch.setattr(step, "profile", lambda activities: contextlib.nullcontext(Profile()))
    monkeypatch.setattr(step, "seconds", lambda work, batch, turns: turns * 0.008)
    step.print_kernels(mock.Mock(), torch.zeros(1, 9), 2)
    summary, *kernels = capsys.readouterr().out.strip().splitlines()
    assert summary.startswith("context 8: a step takes 8.00 ms, its 15 kernels 2.00 ms")
    assert "busy for 25% of the time" in summary
    assert [line.split()[0] for line in kernels] == ["75.0%", "25.0%"]
    assert kernels[0].endswith("gemm")
