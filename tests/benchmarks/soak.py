"""Soak test: runs that are interrupted at random times must resume to the same bits.

    python tests/benchmarks/soak.py kill --runs 25      # 25 runs each with one and two processes
    python tests/benchmarks/soak.py stop --runs 5       # 5 runs each with one to four processes
    python tests/benchmarks/soak.py fault --runs 5      # 5 runs of each of four kinds of fault

kill: SIGKILL to all processes of a run, alternately at any time after its first checkpoint, while it
saves a checkpoint, and while it validates.

stop: Ctrl-C, which all processes receive, or SIGTERM, SIGUSR1 or SIGHUP, to all processes or only the
first. Prints the seconds from the signal to the checkpoint and to the exit of the last process.

fault: SIGKILL while a text is encoded; an interrupted or killed download; a full disk (a tmpfs, which
needs root); a clock that jumps back and forth by a day.

Runs resume with `--ckpt_path last` in the same folder. All checkpoints there must be complete, the
final weights and optimizer state must be bit-identical to those of an uninterrupted run, no partially
written file may remain (but that of a text that was being encoded), and no error may be a traceback.
"""

import argparse
import contextlib
import hashlib
import http.server
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from chargpt.checkpoints import read_checkpoint, resolve_checkpoint

SETTINGS = """
trainer: {max_steps: 150, val_check_interval: 30, log_every_n_steps: 10, accumulate_grad_batches: 2,
          accelerator: cpu, enable_progress_bar: false}
model: {n_embd: 32, n_head: 2, n_layer: 2, dropout: 0.1, lr: 3.0e-3, optimizer: muon,
        muon_lr: 0.02, schedule: linear}
data: {corpus: python-reference, block_size: 32, batch_size: 4, val_fraction: 0.005}
"""
COMMAND = "from chargpt.cli.main import main; main()"
JUMPING_CLOCK = """
import random, time
now, random = time.time, random.Random(0)
time.time = lambda: now() + random.choice((-86400, 0, 86400))
"""
DISK_BYTES = 5_000_000
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


# ---- runs ----


class Run:
    """A `fit` command in its own folder and process group."""

    def __init__(self, folder: Path, *flags: str, world: int = 1, prelude: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "soak.yaml").write_text(SETTINGS)
        self.folder = folder
        entry = ["-c", prelude + COMMAND] if prelude else ["-m", "chargpt"]
        command = [sys.executable, *entry, "fit", "--config=soak.yaml"]
        command += [f"--data.data_dir={folder.parent / 'texts'}", f"--trainer.devices={world}"]
        with open(folder / "log.txt", "a") as log:
            self.process = subprocess.Popen(
                [*command, *flags],
                cwd=folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def send(self, signum: int, to_all: bool = True) -> None:
        (os.killpg if to_all else os.kill)(self.process.pid, signum)

    def wait_for_checkpoint(self) -> None:
        while not self.found("lightning_logs/*/checkpoints/last.ckpt"):
            if self.process.poll() is not None:
                raise SystemExit(
                    f"the run exited with {self.process.returncode}: {self.log[-500:]}"
                )
            time.sleep(0.005)

    def wait_for_all(self) -> None:
        """Wait until all processes of the group have exited, not counting zombies."""
        self.process.wait()
        states = ["ps", "-o", "stat=", "-g", str(self.process.pid)]
        while any(
            not state.startswith("Z")
            for state in subprocess.run(states, capture_output=True, text=True).stdout.split()
        ):
            time.sleep(0.005)

    def finish(self) -> dict:
        """Wait for the run to complete and return its last checkpoint."""
        if self.process.wait():
            raise SystemExit(f"the run exited with {self.process.returncode}: {self.log[-500:]}")
        return read_checkpoint(resolve_checkpoint("last", self.folder))

    def found(self, pattern: str) -> list[Path]:
        return list(self.folder.glob(pattern))

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text(errors="replace")


def uninterrupted(folder: Path, world: int = 1) -> tuple[dict, float]:
    """The last checkpoint of an uninterrupted run, and its duration after the first checkpoint."""
    run = Run(folder, world=world)
    run.wait_for_checkpoint()
    start = time.monotonic()
    return run.finish(), time.monotonic() - start


def resumes(folder: Path, expected: dict, world: int = 1) -> bool:
    """Resume an interrupted run and return whether it ends like the uninterrupted one."""
    for path in folder.glob("lightning_logs/*/checkpoints/*.ckpt"):
        read_checkpoint(path)  # raises if incomplete
    run = Run(folder, "--ckpt_path=last", world=world)
    final = run.finish()
    parts = ("global_step", "state_dict", "optimizer_states")
    return (
        all(same(final[part], expected[part]) for part in parts)
        and len(run.found("lightning_logs/version_*")) == 1
        and not run.found("**/*.tmp")
        and "Traceback" not in run.log
    )


def same(a, b) -> bool:
    """Whether nested dicts and lists of tensors and plain values are bit-identical."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def step_of(folder: Path) -> int:
    return read_checkpoint(resolve_checkpoint("last", folder))["global_step"]


# ---- kill ----


def kill(root: Path, runs: int, rng: random.Random) -> Iterator[bool]:
    print("processes  run       killed  at step  partial files  same end")
    for world in (1, 2):
        expected, seconds = uninterrupted(root / f"{world}-uninterrupted", world)
        for number in range(1, runs + 1):
            run = Run(root / f"{world}-{number}", world=world)
            run.wait_for_checkpoint()
            moment = ("at any time", "saving", "validating")[number % 3]
            wait_for_moment(moment, run, rng, seconds)
            run.send(signal.SIGKILL)
            run.wait_for_all()
            partial, step = len(run.found("**/*.tmp")), step_of(run.folder)
            equal = resumes(run.folder, expected, world)
            print(f"{world:9} {number:4}  {moment:>13} {step:8} {partial:14}  {yes_no(equal)}")
            yield equal


def wait_for_moment(moment: str, run: Run, rng: random.Random, seconds: float) -> None:
    """Wait until it is time to kill a run of `seconds`, which has five validations and saves."""
    if moment == "at any time":
        return time.sleep(rng.uniform(0, seconds))
    end = time.monotonic() + 0.9 * seconds  # in any case before the run is over
    (last,) = run.found("lightning_logs/*/checkpoints/last.ckpt")
    if moment == "saving":
        time.sleep(rng.uniform(0, 0.7 * seconds))
        while time.monotonic() < end:
            if any(name.endswith(".tmp") for name in os.listdir(last.parent)):
                return
            time.sleep(0.0002)
    saved = [time.monotonic()]
    while len(saved) < 3 and time.monotonic() < end:  # a checkpoint is saved after each validation
        before = last.stat().st_mtime_ns
        while last.stat().st_mtime_ns == before and time.monotonic() < end:
            time.sleep(0.0005)
        saved.append(time.monotonic())
    time.sleep((saved[-1] - saved[0]) / 2 * rng.uniform(0.8, 1))


# ---- stop ----


def stop(root: Path, runs: int, rng: random.Random) -> Iterator[bool]:
    print("processes  run   signal  at step  to checkpoint  to exit  status  same end")
    for world in (1, 2, 3, 4):
        expected, seconds = uninterrupted(root / f"{world}-uninterrupted", world)
        for number in range(1, runs + 1):
            run = Run(root / f"{world}-{number}", world=world)
            run.wait_for_checkpoint()
            time.sleep(rng.uniform(0, 0.4 * seconds))  # before it is over
            signum = rng.choice(SIGNALS)
            sent, sent_at = time.monotonic(), time.time()
            run.send(signum, to_all=signum == signal.SIGINT or rng.random() < 0.5)
            run.wait_for_all()
            exited = time.monotonic() - sent
            saved = resolve_checkpoint("last", run.folder).stat().st_mtime - sent_at
            step, status = step_of(run.folder), run.process.returncode
            equal = resumes(run.folder, expected, world)
            print(
                f"{world:9} {number:4}  {signum.name:>7} {step:8} {saved:13.2f}s {exited:7.2f}s "
                f"{status:7}  {yes_no(equal)}"
            )
            yield equal and saved <= 2 and status == 128 + signum


# ---- fault ----


def fault(root: Path, runs: int, rng: random.Random) -> Iterator[bool]:
    print("fault           run  event: recovered")
    expected, seconds = uninterrupted(root / "uninterrupted")
    for kind in (encoding, download, disk, clock):
        for number in range(1, runs + 1):
            ok, event = kind(root / f"{kind.__name__}-{number}", rng, expected, seconds)
            print(f"{kind.__name__:14} {number:4}  {event}: {yes_no(ok)}")
            yield ok


def encoding(folder: Path, rng: random.Random, *_: object) -> tuple[bool, str]:
    """Kill a process that encodes a text; the next one must write the complete token file."""
    folder.mkdir()
    text = folder / "text.txt"
    text.write_text("".join(rng.choices("abcdefghijklmnop qrstuvwxyz\n\u00e9", k=1000)) * 20_000)

    def run(data_dir: str) -> subprocess.Popen:
        source = (
            "import sys; from chargpt.data import CharDataModule as D; D(*sys.argv[1:]).setup()"
        )
        return subprocess.Popen([sys.executable, "-c", source, text, data_dir], cwd=folder)

    run("complete").wait()
    process = run("killed")
    while not list(folder.glob("killed/tokens/.*.tmp")) and process.poll() is None:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.03))
    process.kill()
    process.wait()
    partial = len(list(folder.glob("killed/tokens/.*.tmp")))
    status = run("killed").wait()
    (complete,), (second,) = (
        folder.glob(f"{name}/tokens/*.npy") for name in ("complete", "killed")
    )
    ok = status == 0 and complete.read_bytes() == second.read_bytes()
    shutil.rmtree(folder)
    return ok, f"killed, {partial} partial files"


class BreakingServer(http.server.BaseHTTPRequestHandler):
    """Serves the first `cut` bytes of `data`, then pauses before it closes the connection."""

    data, cut = b"", 0

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.data)))
        self.end_headers()
        self.wfile.write(self.data[: self.cut])
        self.wfile.flush()
        time.sleep(0.3 if self.cut < len(self.data) else 0)

    def log_message(self, *_: object) -> None: ...


def download(folder: Path, rng: random.Random, *_: object) -> tuple[bool, str]:
    """Interrupt a download or kill the process; the next one must download the complete text."""
    folder.mkdir()
    BreakingServer.data = data = rng.randbytes(500_000).hex().encode()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), BreakingServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    path = folder / "text" / "input.txt"
    source = (
        "import functools, sys; from chargpt.data import texts\n"
        f"url = 'http://127.0.0.1:{server.server_port}/'\n"
        "texts.NAMED_TEXTS['text'] = functools.partial(\n"
        "    texts.download, url=url, size=1_000_000, sha256=sys.argv[1])\n"
        "try: texts.resolve_corpus('text', data_dir='.')\n"
        "except texts.UnavailableError as error: sys.exit(f'error: {error}')\n"
    )

    def run() -> subprocess.Popen:
        command = [sys.executable, "-c", source, hashlib.sha256(data).hexdigest()]
        return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)

    BreakingServer.cut = cut = rng.randrange(len(data))
    process = run()
    if killed := rng.random() < 0.5:
        while "downloading" not in process.stderr.readline():
            pass
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
    _, err = process.communicate()
    plain = killed or (process.returncode == 1 and "Traceback" not in err and "error: " in err)
    clean = not any(file.is_file() for file in folder.rglob("*"))
    BreakingServer.cut = len(data)
    process = run()
    process.communicate()
    server.shutdown()
    ok = plain and clean and process.returncode == 0 and path.read_bytes() == data
    ok &= [file for file in folder.rglob("*") if file.is_file()] == [path]
    return ok, "killed" if killed else f"interrupted after {cut:,} bytes"


def disk(folder: Path, rng: random.Random, expected: dict, seconds: float) -> tuple[bool, str]:
    """Fill the disk while a run trains, then free the space and resume."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        return True, "skipped, because a tmpfs cannot be mounted"
    try:
        run = Run(folder)
        run.wait_for_checkpoint()
        time.sleep(rng.uniform(0, 0.5 * seconds))
        filler = folder / "filler"
        with contextlib.suppress(OSError), open(filler, "wb") as file:
            while True:
                file.write(b"x" * 4096)
                file.flush()
        status = run.process.wait()
        lines = [line for line in run.log.splitlines() if line.startswith("error: ")]
        step = step_of(folder)
        plain = status == 1 and len(lines) == 1 and "No space left" in lines[0]
        clean = not run.found("**/*.tmp")
        filler.unlink()
        ok = resumes(folder, expected)
    finally:
        subprocess.run(["umount", "-l", str(folder)])
    return plain and clean and ok, f"disk full; exit status {status}, checkpoint of step {step}"


def clock(folder: Path, rng: random.Random, expected: dict, seconds: float) -> tuple[bool, str]:
    """Run with a jumping clock, kill the run, and move its file times to the future or past."""
    run = Run(folder, prelude=JUMPING_CLOCK)
    run.wait_for_checkpoint()
    time.sleep(rng.uniform(0, 0.7 * seconds))
    run.send(signal.SIGKILL)
    run.wait_for_all()
    days = rng.choice((-1, 1))
    for path in run.found("lightning_logs/*/checkpoints/*.ckpt"):
        os.utime(path, (time.time() + days * 86400,) * 2)
    return resumes(folder, expected), f"clock jumped, killed, file times moved by {days:+} day"


# ---- command line ----


def yes_no(ok: bool) -> str:
    return "yes" if ok else "NO"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("test", choices=("kill", "stop", "fault"))
    parser.add_argument("--runs", type=int, default=5, help="number of runs of each kind")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times")
    parser.add_argument("--folder", type=Path, help="working folder (default: a temporary one)")
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    root = args.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"working in {root}")
    test = {"kill": kill, "stop": stop, "fault": fault}[args.test]
    results = list(test(root, args.runs, random.Random(args.seed)))
    print(f"{sum(results)} of {len(results)} passed")
    raise SystemExit(not all(results))


if __name__ == "__main__":
    main()
