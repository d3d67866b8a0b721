"""On one NVIDIA GPU: training to the end, precisions, exact resuming, generation and strategies.

    python tests/benchmarks/gpu.py path/to/input.txt --output results               # all parts
    python tests/benchmarks/gpu.py path/to/input.txt --output results --parts a c   # some of them
    python tests/benchmarks/gpu.py path/to/input.txt --output results --tiny        # on a CPU
    python tests/benchmarks/gpu.py --only-list

`input.txt` is tiny Shakespeare; no network and no installation of chargpt is needed. A part stops at
its time limit and saves its run. Repeat the command, with the same output folder, to continue:
finished rows are skipped, stopped runs are resumed, failed ones are tried again.

`table.md` and `results.jsonl` in the output folder are updated after each row; of several lines with
the same row, the last one counts. `profile.txt` is the profile of part c, and `runs` has the log and
the checkpoints of each run.

- training_s: seconds of training, from `chars_per_second` in TensorBoard's event files, so without
  startup, compilation, validation, text samples and checkpoints. process_s: of the whole commands.
- peak_fraction: operations per second as a fraction of the GPU's dense bf16 peak, at the end of the
  run, where contexts have their full length. Operations are counted as in step.py.
- learns: the validation loss is below three quarters of that of random guessing.
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = ["torch", "lightning", "torchmetrics", "tensorboard", "filelock", "tqdm"]
PACKAGES += ["jsonargparse", "docstring_parser", "typeshed_client"]
if missing := [name for name in PACKAGES if not importlib.util.find_spec(name)]:
    sys.exit(f"gpu.py needs {', '.join(missing)}: pip install {' '.join(missing)}")

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from recipes import seconds_to  # noqa: E402
from soak import same  # noqa: E402
from step import operations_per_character, seconds  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

import chargpt  # noqa: E402
from chargpt.checkpoints import read_checkpoint  # noqa: E402

BASE, GPU, CPU, BEST = (
    f"{REPOSITORY}/configs/{name}.yaml" for name in ("base", "gpu", "cpu", "best")
)
NANOGPT = f"{HERE}/nanogpt-gpu.yaml"
NANOGPT_LOSS = 1.4697  # what nanoGPT reports for its GPU settings
CPU_LOSS = 1.47  # the final loss of cpu.yaml on a CPU

FLOAT32, BF16, FLOAT16 = (
    f"--trainer.precision={name}" for name in ("32-true", "bf16-mixed", "16-mixed")
)
BF16_WEIGHTS = "--trainer.precision=bf16-true"
ONE_GPU = ["--trainer.accelerator=gpu", "--trainer.devices=1"]
COMPILE, DETERMINISTIC = "--model.compile=true", "--trainer.deterministic=true"
CLIP, ACCUMULATE = "--trainer.gradient_clip_val=1.0", "--trainer.accumulate_grad_batches=2"
VARIANTS = {  # of the textbook model
    "float32": [FLOAT32],
    "bf16-mixed": [BF16],
    "bf16-true": [BF16_WEIGHTS],
    "16-mixed": [FLOAT16],
    "float32, compiled": [FLOAT32, COMPILE],
    "bf16-mixed, compiled": [BF16, COMPILE],
    "bf16-true, compiled": [BF16_WEIGHTS, COMPILE],
    "16-mixed, compiled": [FLOAT16, COMPILE],
    "bf16-mixed, clipping": [BF16, CLIP],
    "16-mixed, clipping": [FLOAT16, CLIP],
    "bf16-mixed, accumulation": [BF16, ACCUMULATE],
    "bf16-mixed, compiled, clipping, accumulation": [BF16, COMPILE, CLIP, ACCUMULATE],
}
MUON_VARIANTS = {  # of best.yaml
    "Muon, 16-mixed": [FLOAT16],
    "Muon, bf16-mixed, clipping, accumulation": [BF16, CLIP, ACCUMULATE],
}
RESUMED = {"eager": [], "compiled": [COMPILE], "deterministic": [DETERMINISTIC]}
MODEL_PARALLEL = "--trainer.strategy.class_path=lightning.pytorch.strategies.ModelParallelStrategy"
STRATEGIES = {
    "fsdp": ["--trainer.strategy=fsdp"],
    "deepspeed": ["--trainer.strategy=deepspeed"],
    "model parallel": [MODEL_PARALLEL],
    "model parallel, one checkpoint file": [
        MODEL_PARALLEL,
        "--trainer.strategy.init_args.save_distributed_checkpoint=false",
    ],
}
SEEDS = (1337, 1, 2, 3, 4)
SAMPLES = 16

PEAK = {  # dense bf16 operations per second, from NVIDIA's data sheets
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}
LIMIT_S = 480  # of a part
STARTUP_S = 20  # no process is started with less time left
SAVING_S = 30  # of the limit, for a run to save its checkpoint and exit


class Sizes(NamedTuple):
    short_run: int = 300  # steps, enough to see that a network learns
    resume_at: int = 20  # steps before and after
    new_chars: int = 500
    contexts: tuple[int, ...] = (64, 1024)  # to profile
    flags: tuple[str, ...] = ()


TINY = Sizes(
    short_run=40,
    resume_at=4,
    new_chars=20,
    contexts=(8,),
    flags=(
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=8",
        "--trainer.val_check_interval=4",
        "--trainer.log_every_n_steps=2",
        "--data.block_size=8",
        "--data.batch_size=4",
        "--model.n_embd=8",
        "--model.lr=0.03",
        "--model.n_head=2",
        "--model.n_layer=1",
        "--model.short_contexts=null",
        "--model.compile=false",
    ),
)
NOT_TINY = (*ONE_GPU, COMPILE)


class Stopped(Exception):
    """The time limit was reached; the same command continues."""


class Failed(Exception):
    """A process failed; the message is its last one."""


class Bench:
    """Runs commands within a time limit and records rows of figures.

    Args:
        text: the file to train on.
        output: the folder for all results.
        seeds: runs of best.yaml.
        tiny: use a tiny network on the CPU.
    """

    def __init__(self, text: Path, output: Path, seeds: int = 1, tiny: bool = False) -> None:
        self.text, self.output, self.seeds = text.resolve(), output.resolve(), SEEDS[:seeds]
        self.tiny, self.sizes = tiny, TINY if tiny else Sizes()
        self.device = "cpu" if tiny else "cuda"
        self.device_name = "CPU" if tiny else torch.cuda.get_device_name()
        self.part, self.deadline = "", math.inf
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        self.output.mkdir(parents=True, exist_ok=True)
        self.results = self.output / "results.jsonl"
        for line in self.results.read_text().splitlines() if self.results.exists() else ():
            row = json.loads(line)
            self.rows[row["part"], row["row"]] = row

    def measure(self, name: str, work: Callable[..., dict[str, Any]], *args: Any) -> None:
        """Record what `work(self, *args)` returns, or its error, unless it is recorded already."""
        key = self.part, name
        if self.rows.get(key, {}).get("status") == "done":
            return print(f"{self.part}  {name}: done before", flush=True)
        try:
            figures = {"status": "done", **work(self, *args)}
        except Stopped:
            figures = {"status": "stopped"}
        except Failed as error:
            figures = {"status": "failed", "error": str(error)}
        except Exception as error:  # the next row may succeed
            figures = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        self.rows[key] = {"part": self.part, "row": name, **figures, "device": self.device_name}
        with self.results.open("a") as file:
            file.write(json.dumps(self.rows[key]) + "\n")
        (self.output / "table.md").write_text(self.table())
        shown = (f"{name} {cell(value)}" for name, value in figures.items() if name != "curve")
        print(f"{self.part}  {name}: {', '.join(shown)}", flush=True)

    def table(self) -> str:
        """All rows in Markdown, a table for each part."""
        lines = [f"chargpt {chargpt.__version__}, PyTorch {torch.__version__}, {self.device_name}"]
        for part in PARTS:
            rows = [row for (of, _), row in self.rows.items() if of == part]
            names = dict.fromkeys(name for row in rows for name in row)
            columns = [name for name in names if name not in ("part", "curve")]
            if rows:
                lines += [f"\n## {part}: {PARTS[part].__doc__}\n", f"| {' | '.join(columns)} |"]
                lines += ["|---" * len(columns) + "|"]
            for row in rows:
                lines += [f"| {' | '.join(cell(row.get(name)) for name in columns)} |"]
        return "\n".join(lines) + "\n"

    def call(self, folder: Path, *args: str) -> str:
        """Run `python *args` in a folder and return its log.

        Raises:
            Stopped: the time limit was reached.
            Failed: the process failed.
        """
        time_left = self.deadline - time.monotonic() - SAVING_S
        if time_left < STARTUP_S:
            raise Stopped
        folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        status = run_process(args, folder, time_left)
        with (folder / "seconds.txt").open("a") as file:
            print(time.monotonic() - start, file=file)
        if status is None:
            raise Stopped
        log = (folder / "log.txt").read_text(errors="replace")
        if status:
            raise Failed(last_message(log))
        return log

    def fit(self, name: str, configs: list[str], flags: list[str]) -> Path:
        """Train, or resume a run that was stopped, and return its folder."""
        folder = self.output / "runs" / name
        if self.tiny:
            flags = [*self.sizes.flags, *(flag for flag in flags if flag not in NOT_TINY)]
        if any(folder.glob("lightning_logs/*/checkpoints/last.ckpt")):
            flags = [*flags, "--ckpt_path=last"]
        self.call(
            folder,
            *("-m", "chargpt", "fit", *(f"--config={config}" for config in configs), *flags),
            f"--data.corpus={self.text}",
            "--trainer.enable_progress_bar=false",
        )
        runs = folder.glob("lightning_logs/version_*")
        return max(runs, key=lambda run: int(run.name.removeprefix("version_")))


def run_process(args: tuple[str, ...], folder: Path, timeout_s: float) -> int | None:
    """The exit status of `python *args`, or None if it was stopped after `timeout_s`."""
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    with (
        (folder / "log.txt").open("a") as log,
        subprocess.Popen(
            [sys.executable, *args],
            cwd=folder,
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONPATH": path},
        ) as process,
    ):
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.terminate()  # fit saves a checkpoint after the current step
        try:
            process.wait(SAVING_S)
        except subprocess.TimeoutExpired:
            process.kill()
        return None


def last_message(log: str) -> str:
    """The error message at the end of a log, in one line."""
    lines = log.strip().splitlines()[-2:]
    return " ".join(lines if lines and lines[0].startswith("error: ") else lines[-1:])


def cell(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


# ---- the figures of a run ----


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What a run logged for TensorBoard: steps and values by name."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: [(event.step + 1, event.value) for event in events.Scalars(name)]  # counted from 0
        for name in events.Tags()["scalars"]
    }


def training_s(speeds: list[tuple[int, float]], characters: int, step: int) -> float:
    """Seconds of training until a step, from the speed of all steps since the previous entry."""
    total, done = 0.0, 0
    for logged_at, speed in speeds:
        total += max(0, min(logged_at, step) - done) * characters / speed
        done = logged_at
    return total + max(0, step - done) * characters / speed


def process_s(run: Path) -> float:
    """Seconds of all commands that trained a run."""
    return sum(map(float, (run.parents[1] / "seconds.txt").read_text().split()))


def training(
    bench: Bench, name: str, configs: list[str], flags: list[str], target: float
) -> dict[str, Any]:
    """Train to the end; also the seconds of training until the first loss of at most `target`."""
    run = bench.fit(name, configs, flags)
    logged, last = scalars(run), read_checkpoint(run / "checkpoints" / "last.ckpt")
    gpt = chargpt.load(run / "checkpoints" / "best.ckpt").gpt
    context, steps = gpt.config.block_size, last["global_step"]
    characters = last["chargpt"]["sequences_per_step"] * context
    speeds = logged["chars_per_second"]
    curve = [
        (step, training_s(speeds, characters, step), loss) for step, loss in logged["val_loss"]
    ]
    total_s = training_s(speeds, characters, steps)
    final_speed = statistics.median(speed for _, speed in speeds[-max(1, len(speeds) // 10) :])
    operations = final_speed * operations_per_character(gpt, gpt.config, context)
    peak = PEAK.get(bench.device_name)
    return {
        "steps": steps,
        "best_val_loss": min(loss for *_, loss in curve),
        "val_loss": curve[-1][2],
        "training_s": total_s,
        "process_s": process_s(run),
        "chars_per_second": characters * steps / total_s,
        "peak_fraction": operations / peak if peak else "unknown",
        f"training_s to {target}": seconds_to(target, {"curve": curve}),
        "curve": curve,
    }


def short_run(bench: Bench, name: str, configs: list[str], flags: list[str]) -> dict[str, Any]:
    """Train for some hundred steps, and load the checkpoint."""
    steps = bench.sizes.short_run
    limits = [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
    run = bench.fit(name, configs, [*ONE_GPU, *flags, *limits])
    logged = scalars(run)
    loss = logged["val_loss"][-1][1]
    characters = len(set(bench.text.read_text(encoding="utf-8")))
    try:
        chargpt.load(run / "checkpoints" / "best.ckpt")
        checkpoint = "loads"
    except Exception as error:
        checkpoint = " ".join(f"{type(error).__name__}: {error}".split())
    return {
        "val_loss": loss,
        "learns": loss < 0.75 * math.log(characters),
        "chars_per_second": statistics.median(speed for _, speed in logged["chars_per_second"]),
        "process_s": process_s(run),
        "checkpoint": checkpoint,
    }


def profile(bench: Bench) -> dict[str, Any]:
    """Profile a training step of best.yaml with step.py."""
    folder = bench.output / "runs" / "profile"
    (folder / "log.txt").unlink(missing_ok=True)
    contexts = [str(context) for context in bench.sizes.contexts]
    options = ["--config", BEST, "--contexts", *contexts, "--", *bench.sizes.flags]
    log = bench.call(folder, str(HERE / "step.py"), *options)
    (bench.output / "profile.txt").write_text(log)
    lines = [line for line in log.splitlines() if line.startswith("context ")]
    return {"summary": "; ".join(lines), "page": "profile.txt"}


def resuming(bench: Bench, name: str, flags: list[str]) -> dict[str, Any]:
    """Compare checkpoints of a run, of its repetition, and of one that was resumed halfway."""
    half = bench.sizes.resume_at
    flags = [*ONE_GPU, BF16, f"--trainer.val_check_interval={half}", *flags]
    whole = [*flags, f"--trainer.max_steps={2 * half}"]
    first, repeated = (bench.fit(f"{name}-{part}", [BASE], whole) for part in ("first", "repeated"))
    bench.fit(f"{name}-resumed", [BASE], [*flags, f"--trainer.max_steps={half}"])
    resumed = bench.fit(f"{name}-resumed", [BASE], whole)
    expected, *others = (
        read_checkpoint(run / "checkpoints" / "last.ckpt") for run in (first, repeated, resumed)
    )
    figures: dict[str, Any] = {}
    for run, other in zip(("repeated", "resumed"), others):
        parts = ("global_step", "state_dict", "optimizer_states")
        figures[f"{run}: same bits"] = all(same(other[part], expected[part]) for part in parts)
        figures[f"{run}: largest difference of a weight"] = max(
            (weight - other["state_dict"][key]).abs().max().item()
            for key, weight in expected["state_dict"].items()
        )
    return figures


def generation(bench: Bench) -> dict[str, Any]:
    """Compare the text of a network on the GPU with that on the CPU, and time it."""
    run = bench.output / "runs" / "base" / "lightning_logs" / "version_0"  # of part a
    if not (run / "checkpoints" / "best.ckpt").exists():
        steps = f"--trainer.max_steps={bench.sizes.short_run}"
        run = bench.fit("generation", [BASE], [*ONE_GPU, BF16, steps])
    model = chargpt.load(run / "checkpoints" / "best.ckpt")
    settings: dict[str, Any] = dict(max_new_chars=bench.sizes.new_chars, seed=1)
    expected = model.complete(**settings)
    model.to(bench.device)
    model.complete(max_new_chars=bench.sizes.new_chars // 10)  # warms up
    texts: list[str] = []
    one_s = seconds(lambda: texts.append(model.complete(**settings)))
    many_s = seconds(lambda: model.complete_all([""], num_samples=SAMPLES, **settings))
    return {
        "same text as on the CPU": texts == [expected],
        "same characters": len(os.path.commonprefix([*texts, expected])) - len(model.opening),
        "chars_per_second": bench.sizes.new_chars / one_s,
        f"chars_per_second, {SAMPLES} texts": SAMPLES * bench.sizes.new_chars / many_s,
    }


# ---- the parts ----


def a(bench: Bench) -> None:
    """The textbook model, and nanoGPT's settings on it, to their ends"""
    bench.measure("base + gpu", training, "base", [BASE, GPU], [*ONE_GPU], NANOGPT_LOSS)
    bench.measure("nanoGPT's settings", training, "nanogpt", [NANOGPT], [*ONE_GPU], NANOGPT_LOSS)


def b(bench: Bench) -> None:
    """cpu.yaml on the GPU"""
    flags = [*ONE_GPU, "--trainer.val_check_interval=50"] if not bench.tiny else []
    for name, precision in (("float32", FLOAT32), ("bf16-mixed", BF16)):
        bench.measure(name, training, f"cpu-{name}", [CPU], [*flags, precision], CPU_LOSS)


def c(bench: Bench) -> None:
    """best.yaml: its end, and where the time of a step goes"""
    for seed in bench.seeds:
        flags = [*ONE_GPU, f"--seed_everything={seed}"]
        bench.measure(f"seed {seed}", training, f"best-{seed}", [BEST], flags, NANOGPT_LOSS)
    bench.measure("profile of a step", profile)


def d(bench: Bench) -> None:
    """Precisions, compile, gradient clipping and accumulation: some hundred steps of each"""
    for configs, variants in (([BASE], VARIANTS), ([BEST], MUON_VARIANTS)):
        for name, flags in variants.items():
            bench.measure(name, short_run, dashed(name), configs, flags)


def e(bench: Bench) -> None:
    """Exact resuming in bf16-mixed, and generation"""
    for name, flags in RESUMED.items():
        bench.measure(f"resume, {name}", resuming, f"resume-{name}", flags)
    bench.measure("generation", generation)


def f(bench: Bench) -> None:
    """Sharded strategies with one device"""
    for name, flags in STRATEGIES.items():
        bench.measure(name, short_run, dashed(name), [BASE], [BF16, *flags])


def dashed(name: str) -> str:
    return "-".join(name.replace(",", "").split())


PARTS = {part.__name__: part for part in (a, b, c, d, e, f)}
MINUTES = dict(a=7, b=3, c=5, d=6, e=5, f=2)  # estimates, for an H100 or H200


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, nargs="?", help="tiny Shakespeare")
    parser.add_argument("--output", type=Path, default=Path("gpu-results"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for each part")
    parser.add_argument("--seeds", type=int, default=1, help=f"of best.yaml, up to {len(SEEDS)}")
    parser.add_argument("--tiny", action="store_true", help="try the script on the CPU")
    parser.add_argument("--only-list", action="store_true", help="print the parts")
    options = parser.parse_args(args)
    if options.only_list:
        for part in options.parts:
            print(f"{part}  about {MINUTES[part]} minutes  {PARTS[part].__doc__}")
        return
    if options.text is None or not options.text.is_file():
        sys.exit(f"there is no text {options.text or ''}\nname the file of tiny Shakespeare")
    if not options.tiny and not torch.cuda.is_available():
        sys.exit("no GPU is available here\n--tiny tries the script on the CPU")
    bench = Bench(options.text, options.output, options.seeds, options.tiny)
    for part in options.parts:
        bench.part, bench.deadline = part, time.monotonic() + options.limit
        PARTS[part](bench)
    left = [row["row"] for row in bench.rows.values() if row["status"] != "done"]
    print(
        f"{bench.output / 'table.md'}"
        + (f"; repeat the command for: {'; '.join(left)}" if left else "")
    )


if __name__ == "__main__":
    main()
