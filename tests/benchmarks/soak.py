"""Runs that are killed, stopped or starved at random moments: they must go on to the same end.

    python tests/benchmarks/soak.py kill --runs 25      # so many with one process, so many with two
    python tests/benchmarks/soak.py stop --runs 5       # so many each with one, two, three and four
    python tests/benchmarks/soak.py fault --runs 5      # so many of each of four kinds

kill: SIGKILL to all processes of a run, in turn at any moment between its first checkpoint and its
end, while it saves a checkpoint, and while it validates.

stop: Ctrl-C, which all processes receive, or SIGTERM, to all or to the first alone. The seconds from
the signal to the checkpoint, and to the end of the last process, are printed.

fault: SIGKILL while a text is encoded; a download that breaks off, or is killed; a disk that fills
up (a tmpfs, which needs root); a clock that jumps by a day back and forth.

Runs go on with `--ckpt_path last` in the folder that they left. What is there must be whole
checkpoints; the final weights and the optimizer's state must be, bit for bit, those of a run that was
left alone; nothing half-written may be there at the end, and no error may be a traceback.
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

from chargpt.checkpoints import last_checkpoint, newest_run, read_checkpoint

SETTINGS = """
trainer: {max_steps: 150, val_check_interval: 30, log_every_n_steps: 10, accumulate_grad_batches: 2,
          accelerator: cpu, enable_progress_bar: false}
model: {n_embd: 32, n_head: 2, n_layer: 2, dropout: 0.1, lr: 3.0e-3, muon_lr: 0.02, schedule: linear}
data: {corpus: python-reference, block_size: 32, batch_size: 4, val_fraction: 0.005}
"""
COMMAND = "from chargpt.cli.main import main; main()"
JUMPING_CLOCK = """
import random, time
now, random = time.time, random.Random(0)
time.time = lambda: now() + random.choice((-86400, 0, 86400))
"""
DISK_BYTES = 5_000_000


# ---- runs ----


class Run:
    """`fit` in a folder of its own; all its processes are one group."""

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
                raise SystemExit(f"the run ended with {self.process.returncode}: {self.log[-500:]}")
            time.sleep(0.005)

    def wait_for_all(self) -> None:
        """Until no process of the group runs; one that has ended may wait for init to take note."""
        self.process.wait()
        states = ["ps", "-o", "stat=", "-g", str(self.process.pid)]
        while any(
            not state.startswith("Z")  # a zombie
            for state in subprocess.run(states, capture_output=True, text=True).stdout.split()
        ):
            time.sleep(0.005)

    def finish(self) -> dict:
        """Wait for the end; returns the last checkpoint."""
        if self.process.wait():
            raise SystemExit(f"the run ended with {self.process.returncode}: {self.log[-500:]}")
        return read_checkpoint(last_checkpoint(newest_run(self.folder)))

    def found(self, pattern: str) -> list[Path]:
        return list(self.folder.glob(pattern))

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text(errors="replace")


def left_alone(folder: Path, world: int = 1) -> tuple[dict, float]:
    """The last checkpoint of a run that nobody disturbs, and its seconds after the first one."""
    run = Run(folder, world=world)
    run.wait_for_checkpoint()
    begin = time.monotonic()
    return run.finish(), time.monotonic() - begin


def goes_on(folder: Path, expected: dict, world: int = 1) -> bool:
    """Whether a run that was disturbed goes on to the end of one that was left alone."""
    for path in folder.glob("lightning_logs/*/checkpoints/*.ckpt"):
        read_checkpoint(path)  # whole, or it raises
    run = Run(folder, "--ckpt_path=last", world=world)
    end = run.finish()
    parts = ("global_step", "state_dict", "optimizer_states")
    return (
        all(same(end[part], expected[part]) for part in parts)
        and len(run.found("lightning_logs/version_*")) == 1
        and not run.found("**/*.tmp")
        and "Traceback" not in run.log
    )


def same(a, b) -> bool:
    """Bit for bit, through nested dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def step_of(folder: Path) -> int:
    return read_checkpoint(last_checkpoint(newest_run(folder)))["global_step"]


# ---- kill ----


def kill(root: Path, runs: int, moments: random.Random) -> Iterator[bool]:
    print("processes  run       killed  at step  half-written  same end")
    for world in (1, 2):
        expected, seconds = left_alone(root / f"{world}-alone", world)
        for number in range(1, runs + 1):
            run = Run(root / f"{world}-{number}", world=world)
            run.wait_for_checkpoint()
            moment = ("at any moment", "saving", "validating")[number % 3]
            wait_for_moment(moment, run, moments, seconds)
            run.send(signal.SIGKILL)
            run.wait_for_all()
            half, step = len(run.found("**/*.tmp")), step_of(run.folder)
            equal = goes_on(run.folder, expected, world)
            print(f"{world:9} {number:4}  {moment:>13} {step:8} {half:13}  {answer(equal)}")
            yield equal


def wait_for_moment(moment: str, run: Run, moments: random.Random, seconds: float) -> None:
    """Wait for the moment of a kill: a run of `seconds` has five validations, each with a save."""
    if moment == "at any moment":
        return time.sleep(moments.uniform(0, seconds))
    end = time.monotonic() + 0.9 * seconds  # whatever happens, before the run is over
    (last,) = run.found("lightning_logs/*/checkpoints/last.ckpt")
    if moment == "saving":
        time.sleep(moments.uniform(0, 0.7 * seconds))
        while time.monotonic() < end:
            if any(name.endswith(".tmp") for name in os.listdir(last.parent)):
                return
            time.sleep(0.0002)
    for _ in range(moments.randint(1, 3)):
        saved = last.stat().st_mtime_ns
        while last.stat().st_mtime_ns == saved and time.monotonic() < end:
            time.sleep(0.0005)  # saved first, then validated


# ---- stop ----


def stop(root: Path, runs: int, moments: random.Random) -> Iterator[bool]:
    print("processes  run   signal  at step  to the checkpoint  to the end  status  same end")
    for world in (1, 2, 3, 4):
        expected, seconds = left_alone(root / f"{world}-alone", world)
        for number in range(1, runs + 1):
            run = Run(root / f"{world}-{number}", world=world)
            run.wait_for_checkpoint()
            time.sleep(moments.uniform(0, 0.4 * seconds))  # before it is over
            signum = moments.choice((signal.SIGINT, signal.SIGTERM))
            asked, asked_at = time.monotonic(), time.time()
            run.send(signum, to_all=signum == signal.SIGINT or moments.random() < 0.5)
            run.wait_for_all()
            ended = time.monotonic() - asked
            saved = last_checkpoint(newest_run(run.folder)).stat().st_mtime - asked_at
            step, status = step_of(run.folder), run.process.returncode
            equal = goes_on(run.folder, expected, world)
            print(
                f"{world:9} {number:4}  {signum.name:>7} {step:8} {saved:17.2f}s {ended:10.2f}s "
                f"{status:7}  {answer(equal)}"
            )
            yield equal and saved <= 2 and status == 128 + signum


# ---- fault ----


def fault(root: Path, runs: int, moments: random.Random) -> Iterator[bool]:
    print("what            run  what happened, and whether all went well afterwards")
    expected, seconds = left_alone(root / "alone")
    for kind in (encoding, download, disk, clock):
        for number in range(1, runs + 1):
            well, what = kind(root / f"{kind.__name__}-{number}", moments, expected, seconds)
            print(f"{kind.__name__:14} {number:4}  {what}: {answer(well)}")
            yield well


def encoding(folder: Path, moments: random.Random, *_: object) -> tuple[bool, str]:
    """Kill while a text is encoded; the next start makes the token file."""
    folder.mkdir()
    text = folder / "text.txt"
    text.write_text(
        "".join(moments.choices("abcdefghijklmnop qrstuvwxyz\n\u00e9", k=1000)) * 20_000
    )

    def run(data_dir: str) -> subprocess.Popen:
        source = (
            "import sys; from chargpt.data import CharDataModule as D; D(*sys.argv[1:]).setup()"
        )
        return subprocess.Popen([sys.executable, "-c", source, text, data_dir], cwd=folder)

    run("whole").wait()
    process = run("broken")
    while not list(folder.glob("broken/tokens/.*.tmp")) and process.poll() is None:
        time.sleep(0.001)
    time.sleep(moments.uniform(0, 0.03))
    process.kill()
    process.wait()
    left = len(list(folder.glob("broken/tokens/.*.tmp")))
    status = run("broken").wait()
    (whole,), (again,) = folder.glob("whole/tokens/*.npy"), folder.glob("broken/tokens/*")
    well = status == 0 and whole.read_bytes() == again.read_bytes()
    shutil.rmtree(folder)
    return well, f"killed, {left} half-written"


class BreakingServer(http.server.BaseHTTPRequestHandler):
    """Serves `data`, but no more than the first `cut` bytes of it, slowly at the end."""

    data, cut = b"", 0

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.data)))
        self.end_headers()
        self.wfile.write(self.data[: self.cut])
        self.wfile.flush()
        time.sleep(0.3 if self.cut < len(self.data) else 0)

    def log_message(self, *_: object) -> None: ...


def download(folder: Path, moments: random.Random, *_: object) -> tuple[bool, str]:
    """Break a download off, or kill who downloads; the next start downloads the whole text."""
    folder.mkdir()
    BreakingServer.data = data = moments.randbytes(500_000).hex().encode()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), BreakingServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kept = folder / "input.txt"
    source = (
        "import pathlib, sys; from chargpt.data import corpus as c\n"
        f"c.TINY_SHAKESPEARE_URL = 'http://127.0.0.1:{server.server_port}/'\n"
        "c.TINY_SHAKESPEARE_SHA256, c.TINY_SHAKESPEARE_BYTES = sys.argv[1], 1_000_000\n"
        "try: c.tiny_shakespeare(pathlib.Path('input.txt'))\n"
        "except c.UnavailableError as error: sys.exit(f'error: {error}')\n"
    )

    def run() -> subprocess.Popen:
        command = [sys.executable, "-c", source, hashlib.sha256(data).hexdigest()]
        return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)

    BreakingServer.cut = cut = moments.randrange(len(data))
    process = run()
    if killed := moments.random() < 0.5:
        while "downloading" not in process.stderr.readline():
            pass
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
    _, said = process.communicate()
    plain = killed or (process.returncode == 1 and "Traceback" not in said and "error: " in said)
    clean = not list(folder.iterdir())
    BreakingServer.cut = len(data)
    process = run()
    process.communicate()
    server.shutdown()
    well = plain and clean and process.returncode == 0 and kept.read_bytes() == data
    well &= [path.name for path in folder.iterdir()] == ["input.txt"]
    return well, "killed" if killed else f"broken off after {cut:,} bytes"


def disk(folder: Path, moments: random.Random, expected: dict, seconds: float) -> tuple[bool, str]:
    """Fill the disk of a run while it trains, and make room again."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        return True, "not tried, since it cannot be mounted"
    try:
        run = Run(folder)
        run.wait_for_checkpoint()
        time.sleep(moments.uniform(0, 0.5 * seconds))
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
        well = goes_on(folder, expected)
    finally:
        subprocess.run(["umount", "-l", str(folder)])
    return plain and clean and well, f"full; status {status}, kept step {step}"


def clock(folder: Path, moments: random.Random, expected: dict, seconds: float) -> tuple[bool, str]:
    """Let the clock jump while a run trains, kill it, and date its files into the future or past."""
    run = Run(folder, prelude=JUMPING_CLOCK)
    run.wait_for_checkpoint()
    time.sleep(moments.uniform(0, 0.7 * seconds))
    run.send(signal.SIGKILL)
    run.wait_for_all()
    days = moments.choice((-1, 1))
    for path in run.found("lightning_logs/*/checkpoints/*.ckpt"):
        os.utime(path, (time.time() + days * 86400,) * 2)
    return goes_on(folder, expected), f"jumped, killed, files dated by {days:+} day"


# ---- the command ----


def answer(well: bool) -> str:
    return "yes" if well else "NO"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("kill", "stop", "fault"))
    parser.add_argument("--runs", type=int, default=5, help="how many of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--folder", type=Path, help="where to work; a temporary folder unless given"
    )
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    root = args.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"working in {root}")
    work = {"kill": kill, "stop": stop, "fault": fault}[args.what]
    results = list(work(root, args.runs, random.Random(args.seed)))
    print(f"{sum(results)} of {len(results)} went well")
    raise SystemExit(not all(results))


if __name__ == "__main__":
    main()
