"""An untrusted run folder: an attacker has written its config.yaml and its checkpoints.

Whatever they contain, every command that reads the run either works or ends in one plain error. No
code runs, no process starts, nothing is written outside of the current folder and the user's data
folder, and memory stays within bounds.
"""

import contextlib
import os
import pickle
import re
import shutil
import signal
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import chargpt
from chargpt.model import UserError

resource = pytest.importorskip("resource", reason="limits memory; not on Windows")

SPARE_MEMORY = 3 << 30  # address space of one command, in addition to that of the tests
PEAK_GROWTH = 400 << 20  # growth of the peak resident memory in one command
SECONDS = 20

PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty")
CHANGES = ("os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.link", "os.symlink", "os.truncate")
CHANGES += ("os.chmod", "os.chown", "shutil.rmtree", "shutil.move", "shutil.copyfile")

SUBPROCESS = "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler"


# ---- side effects of a command ----


class Recorder:
    """Audit events (PEP 578) of this process while `on`. An audit hook cannot be removed.

    Processes cannot start.
    """

    def __init__(self) -> None:
        self.on = False
        self.events: list[tuple[str, tuple]] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple) -> None:
        if self.on and (event == "open" or event in PROCESSES or event in CHANGES):
            self.events.append((event, args))
            if event in PROCESSES:  # the exception prevents its start: it may be one of many
                raise AssertionError(f"{event} {args}")

    def processes(self) -> list[str]:
        return [f"{event} {args}" for event, args in self.events if event in PROCESSES]

    def written(self) -> Iterator[Path]:
        """Absolute paths that were opened for writing, created, renamed or removed."""
        for event, args in self.events:
            if event in CHANGES:
                paths = args
            elif event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                paths = args[:1]
            else:
                continue
            for path in paths:
                if isinstance(path, (str, bytes, os.PathLike)) and path != "":
                    yield Path(os.path.abspath(os.fsdecode(path)))


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Raise an exception if a command takes too long or too much memory."""

    def expire(*_: Any) -> None:
        raise AssertionError(f"took longer than {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = memory("VmSize")
    handler = signal.signal(signal.SIGALRM, expire)
    signal.alarm(SECONDS)
    if size:  # Linux only
        resource.setrlimit(resource.RLIMIT_AS, (size + SPARE_MEMORY, hard))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def memory(name: str) -> int:
    """A field of Linux's /proc/self/status in bytes; 0 elsewhere."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) << 10


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS


# ---- the untrusted run, and the commands that read it ----


class World(NamedTuple):
    """The folders of a test."""

    here: Path  # the current folder, with the untrusted run in lightning_logs
    outside: Path  # must not change
    sentinel: Path  # a file in `outside` that malicious code would create

    @property
    def run(self) -> Path:
        return self.here / "lightning_logs" / "version_0"

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoints" / "last.ckpt"

    def checkpoints(self) -> list[Path]:
        return sorted(self.run.glob("checkpoints/*.ckpt"))

    def tamper(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change the contents of the run's checkpoints; `change` may return a replacement."""
        for path in self.checkpoints():
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            changed = change(checkpoint)
            torch.save(checkpoint if changed is None else changed, path)

    def tamper_records(self, change: Callable[[str, bytes], bytes], **settings: Any) -> None:
        """Change the records of the run's checkpoints, which are zip archives."""
        for path in self.checkpoints():
            with zipfile.ZipFile(path) as archive:
                records = {name: archive.read(name) for name in archive.namelist()}
            with zipfile.ZipFile(path, "w", **settings) as archive:
                for name, data in records.items():
                    archive.writestr(name, change(name.partition("/")[2], data))

    def tamper_pickle(self, data: bytes) -> None:
        self.tamper_records(lambda name, old: data if name == "data.pkl" else old)


@pytest.fixture
def world(trained, tmp_path, monkeypatch) -> World:
    world = World(tmp_path / "here", tmp_path / "outside", tmp_path / "outside" / "sentinel")
    shutil.copytree(trained / "lightning_logs", world.here / "lightning_logs")
    (world.outside / "run" / "checkpoints").mkdir(parents=True)
    (world.outside / "run" / "checkpoints" / "best.ckpt").write_text("precious")
    (world.outside / "precious.txt").write_text("precious\n" * 300)
    data = tmp_path / "data"
    monkeypatch.setenv("CHARGPT_DATA_DIR", str(data))
    monkeypatch.setenv("SENTINEL", str(world.sentinel))
    return world


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def load(world: World) -> tuple[int, str]:
    """`chargpt.load`, with the status and the message of a command."""
    try:
        chargpt.load(world.checkpoint).complete(max_new_chars=3, seed=1)
    except UserError as error:
        return 1, f"error: {error}\n"
    return 0, ""


LIMITED = ("--trainer.max_steps", "10", "--trainer.accelerator", "cpu")
COMMANDS = {
    "load": (),
    "predict": ("predict", "--generate.max_new_chars", "5"),
    "export": ("export", "--to", "page", "--output", "page.html"),
    "validate": ("validate", "--trainer.accelerator", "cpu"),
    "test": ("test", "--trainer.accelerator", "cpu"),
    "fit": ("fit", *LIMITED),
}
ALL = tuple(COMMANDS)
TRAINING = ("validate", "test", "fit")
NETWORK = ("load", "predict", "export")


@pytest.fixture
def attack(world, command, recorder, trained) -> Callable[..., dict[str, tuple[int, str]]]:
    """Run commands on the untrusted run, without side effects; returns status and standard error."""

    def run(names: tuple[str, ...]) -> dict[str, tuple[int, str]]:
        before = snapshot(world.outside), snapshot(trained)
        results = {}
        for name in names:
            forget_peak()
            used = memory("VmRSS")
            recorder.events.clear()
            recorder.on = True
            try:
                with limits():
                    results[name] = one(name)
            finally:
                recorder.on = False
            assert not recorder.processes(), name
            assert memory("VmHWM") - used < PEAK_GROWTH, f"{name} took too much memory"
            check_written(recorder.written(), name)
        assert (snapshot(world.outside), snapshot(trained)) == before
        return results

    def one(name: str) -> tuple[int, str]:
        if name == "load":
            return load(world)
        result = command(world.here, *COMMANDS[name], "--ckpt_path", str(world.checkpoint))
        return result.status, result.err

    def check_written(paths: Iterator[Path], name: str) -> None:
        allowed = world.here, world.here.parent / "data", Path("/dev"), Path("/proc")
        for path in paths:
            ours = any(folder in (path, *path.parents) for folder in allowed)
            assert ours or "__pycache__" in path.parts, f"{name} wrote {path}"

    return run


def assert_refused(results: dict[str, tuple[int, str]]) -> None:
    """Each command ended with status 1 or 2 and an error of one or two lines."""
    for name, (status, err) in results.items():
        assert "Traceback" not in err, f"{name}:\n{err}"
        assert status in (1, 2), f"{name} was not refused:\n{err}"
        message = err.partition("error: ")[2].strip()
        assert message and len(message.splitlines()) <= 2, f"{name}:\n{err}"


def assert_plain(results: dict[str, tuple[int, str]]) -> None:
    """Each command worked, or was refused."""
    worked = {name for name, (status, _) in results.items() if status == 0}
    for name in worked:
        assert "Traceback" not in results[name][1], f"{name}:\n{results[name][1]}"
    assert_refused({name: result for name, result in results.items() if name not in worked})


def assert_worked(results: dict[str, tuple[int, str]]) -> None:
    for name, (status, err) in results.items():
        assert status == 0 and "Traceback" not in err, f"{name}:\n{err}"


def test_every_command_works_on_a_valid_run(attack, world):
    world.tamper(lambda checkpoint: None)
    assert_worked(attack(ALL))
    assert (world.here / "page.html").exists()


# ---- code ----


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.call


SECTIONS = (
    "state_dict",
    "hyper_parameters",
    "datamodule_hyper_parameters",
    "optimizer_states",
    "callbacks",
    "loops",
    "vocabulary",
    "chargpt",
    "extra",
)


@pytest.mark.parametrize("section", SECTIONS)
def test_code_in_a_section_of_a_checkpoint(attack, world, section):
    def change(checkpoint: dict[str, Any]) -> None:
        code = Call(os.mkdir, str(world.sentinel))
        if isinstance(checkpoint.get(section), dict):
            checkpoint[section]["code"] = code
        else:
            checkpoint[section] = code

    world.tamper(change)
    assert_refused(attack(ALL if section == "extra" else ("fit", "load")))
    assert not world.sentinel.exists()


STREAMS = {
    "a bytearray of ten billion bytes": pickle.dumps(Call(bytearray, 10**10), 2),
    "os.system without arguments to find": b"\x80\x02cos\nsystem\nX\x05\0\0\0touch\x85R.",
    "a global on the stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    "a class of torch that calls": b"\x80\x02ctorch.hub\nload\nX\x01\0\0\0.X\x01\0\0\0x\x86R.",
    "a quantized tensor": b"\x80\x02ctorch._utils\n_rebuild_qtensor\n)R.",
    "a memo of four billion slots": b"\x80\x02}r\xff\xff\xff\xff.",
    "a list nested a hundred thousand times": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "a key nested half a million times": b"\x80\x02})" + b"\x85" * 500_000 + b"Ns.",
    "a million empty sets": b"\x80\x04](" + b"\x8f" * 1_000_000 + b"e.",
    "copies of a dictionary": (
        b"\x80\x02}q\0("
        + b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(60_000))
        + b"u0ccollections\nOrderedDict\nq\1]("
        + b"h\1h\0\x85R" * 60_000
        + b"e."
    ),
    "extension codes": b"\x80\x02\x82\x01.",
    "no end": b"\x80\x02}",
    "nothing": b"",
    "no pickle": b"GIF89a",
}


@pytest.mark.parametrize("stream", STREAMS)
def test_a_pickle_made_by_hand(attack, world, stream):
    world.tamper_pickle(STREAMS[stream])
    assert_refused(attack(("fit", "load")))


# ---- files ----


def bomb(world: World) -> None:
    """640 megabytes of zeros in a few megabytes."""
    world.tamper_records(lambda name, data: data, compression=zipfile.ZIP_DEFLATED)
    zeros, (first, *others) = bytes(1 << 24), world.checkpoints()
    with (
        zipfile.ZipFile(first, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("archive/data/999", "w", force_zip64=True) as record,
    ):
        for _ in range(40):
            record.write(zeros)
    for path in others:
        shutil.copy(first, path)


def overlapping_records(world: World) -> None:
    """Thousands of names for the same data."""
    for path in world.checkpoints():
        with zipfile.ZipFile(path, "a") as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
            folder = largest.filename.partition("/")[0]
            for i in range(2_000):
                alias = zipfile.ZipInfo(f"{folder}/data/{1000 + i}")
                for field in ("header_offset", "file_size", "compress_size", "CRC"):
                    setattr(alias, field, getattr(largest, field))
                archive.filelist.append(alias)
            archive._didModify = True


def legacy_format(world: World) -> None:
    code = {"code": Call(os.mkdir, str(world.sentinel))}
    for path in world.checkpoints():
        torch.save(code, path, _use_new_zipfile_serialization=False)


def torchscript(world: World) -> None:
    for path in world.checkpoints():
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


def named_pipe(world: World) -> None:
    for path in world.checkpoints():
        path.unlink()
        os.mkfifo(path)


def endless_device(world: World) -> None:
    for path in world.checkpoints():
        path.unlink()
        path.symlink_to("/dev/zero")


def another_file_of_the_user(world: World) -> None:
    for path in world.checkpoints():
        path.unlink()
        path.symlink_to(world.outside / "precious.txt")


def truncated(world: World) -> None:
    for path in world.checkpoints():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def short_storage(world: World) -> None:
    """The storage of a tensor is shorter than the tensor."""
    world.tamper_records(lambda name, data: data[:4] if name == "data/0" else data)


FILES = (
    bomb,
    overlapping_records,
    legacy_format,
    torchscript,
    named_pipe,
    endless_device,
    another_file_of_the_user,
    truncated,
    short_storage,
)


@pytest.mark.parametrize("change", FILES, ids=lambda change: change.__name__)
def test_a_file_that_is_not_what_it_seems(attack, world, change):
    change(world)
    assert_refused(attack(ALL))
    assert not world.sentinel.exists()


# ---- tensors ----

TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "int64": lambda t: t.long(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "float64 beside float32": lambda t: t.double(),
    "not a number": lambda t: t.fill_(float("nan")),
    "infinite": lambda t: t.fill_(float("inf")),
    "stride 0": lambda t: torch.zeros(1).expand(t.shape),
    "stride 0 and huge": lambda t: torch.zeros(1).expand(10**6, 10**6),
    "transposed": lambda t: t.t().contiguous().t(),
    "sparse": lambda t: t.to_sparse(),
    "sparse and huge": lambda t: torch.sparse_coo_tensor(size=(10**9, 10**9)),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "meta": lambda t: torch.empty(10**6, 10**6, device="meta"),
    "a parameter": lambda t: torch.nn.Parameter(t),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "another shape": lambda t: torch.zeros(t.shape[0] + 1, t.shape[1]),
    "a list": lambda t: t.tolist(),
    "nothing": lambda t: None,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TENSORS)
def test_weights_of_another_kind(attack, world, kind):
    def change(checkpoint: dict[str, Any]) -> None:
        weights = checkpoint["state_dict"]
        weights["gpt.head.weight"] = TENSORS[kind](weights["gpt.head.weight"])

    world.tamper(change)
    results = attack(("fit", "predict", "load"))
    (assert_plain if kind == "a parameter" else assert_refused)(results)


# ---- settings ----


def laughs() -> list:
    """A list of 10**30 values, in a few hundred bytes."""
    values: list = ["ha"] * 10
    for _ in range(29):
        values = [values] * 10
    return values


def deep(times: int = 150) -> list:
    values: list = []
    for _ in range(times):
        values = [values]
    return values


def hyper(**settings: Any) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: checkpoint["hyper_parameters"].update(settings)


def data(**settings: Any) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: checkpoint["datamodule_hyper_parameters"].update(settings)


def whole(**parts: Any) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: checkpoint.update(parts)


def endless_rotary(checkpoint: dict[str, Any]) -> None:
    """The angles of ten million positions would take memory, but the weights don't."""
    checkpoint["hyper_parameters"].update(position="rotary", block_size=10**7)
    checkpoint["datamodule_hyper_parameters"]["block_size"] = 10**7
    del checkpoint["state_dict"]["gpt.position_embedding.weight"]


REFUSED_NETWORKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "a million layers": hyper(n_layer=10**6),
    "a billion channels": hyper(n_embd=10**9, n_head=1),
    "a block of ten million": hyper(block_size=10**7),
    "a context of ten million": lambda checkpoint: checkpoint["chargpt"].update(context=10**7),
    "a context that is text": lambda checkpoint: checkpoint["chargpt"].update(context="8"),
    "a trillion rows of n-grams": hyper(ngrams={2: 10**12}),
    "n-grams of a million characters": hyper(ngrams={10**6: 5}),
    "n-grams that are code": hyper(ngrams={"class_path": SUBPROCESS}),
    "n-grams nested without end": hyper(ngrams=laughs()),
    "a number of layers that is text": hyper(n_layer="1"),
    "a fraction that is not a number": hyper(n_embd=float("nan")),
    "a huge number": hyper(n_head=10**600),
    "heads without number": hyper(n_head=0),
    "settings nested without end": hyper(other=laughs()),
    "settings nested deeply": hyper(other=deep()),
    "no settings": whole(hyper_parameters={}),
    "settings that are a list": whole(hyper_parameters=[1, 2]),
    "no weights": whole(state_dict={}),
    "a vocabulary of a million": whole(vocabulary="".join(map(chr, range(60_000, 1_060_000)))),
    "a vocabulary of doubles": lambda c: c.update(vocabulary="a" * len(c["vocabulary"])),
    "a vocabulary too short for the weights": lambda c: c.update(vocabulary=c["vocabulary"][:5]),
    "a vocabulary of half characters": lambda c: c.update(
        vocabulary="".join(chr(0xD800 + i) for i in range(len(c["vocabulary"])))
    ),
    "an empty vocabulary": whole(vocabulary=""),
    "a vocabulary of lists": whole(vocabulary=[["a"]]),
}


@pytest.mark.parametrize("kind", REFUSED_NETWORKS)
def test_invalid_settings_of_a_network(attack, world, kind):
    world.tamper(REFUSED_NETWORKS[kind])
    assert_refused(attack(("fit", *NETWORK)))


def names_a_class(checkpoint: dict[str, Any]) -> None:
    """The class name that LightningCLI reads from the hyperparameters of a checkpoint."""
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        checkpoint[key].update(_class_path=SUBPROCESS, _instantiator="os.system")
    checkpoint["hparams_name"] = "kwargs"


HARMLESS: dict[str, Callable[[dict[str, Any]], None]] = {
    "rotary positions without end": endless_rotary,
    "a learning rate that is a class": hyper(lr={"class_path": SUBPROCESS}),
    "classes of LightningCLI": names_a_class,
    "a setting that nobody knows": hyper(surprise=1),
    "dropout above one": hyper(dropout=7.0),
    "a million processes": data(num_workers=10**6),
    "a billion sequences in a batch": data(batch_size=10**9),
    "a batch without a size": data(batch_size=0),
    "a seed without bounds": data(seed=10**300),
    "a fraction that is nothing": data(val_fraction=float("nan")),
    "an order that is code": data(order="os.system"),
    "data settings nested without end": data(other=laughs()),
    "no data settings": whole(datamodule_hyper_parameters={}),
    "a corpus that is a list": whole(datamodule_hyper_parameters={"corpus": [1]}),
    "loops that are nothing": whole(loops={}),
    "loops that are text": whole(loops="loops"),
    "a step without bounds": whole(global_step=10**300),
    "a step before the first": whole(global_step=-5),
    "an epoch that is text": whole(epoch="one"),
    "schedulers of others": whole(lr_schedulers=[{"class_path": SUBPROCESS}]),
    "a version of the future": whole(**{"pytorch-lightning_version": "9" * 3000}),
    "callbacks that are a list": whole(callbacks=[1]),
    "a callback that the command lacks": whole(callbacks={"Unknown": {"a": 1}}),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_settings_that_work_or_are_refused(attack, world, kind):
    world.tamper(HARMLESS[kind])
    assert_plain(
        attack(
            ALL if HARMLESS[kind].__name__ == "endless_rotary" else ("fit", "validate", "predict")
        )
    )


@pytest.mark.parametrize("where", ["data_dir", "fallback_corpus", "val_corpus"])
def test_a_folder_of_the_user_in_the_data_settings(attack, world, where):
    world.tamper(data(**{where: str(world.outside / "new")}))
    assert_plain(attack(TRAINING))
    assert not (world.outside / "new").exists()


TRAINER: dict[str, Any] = {
    "max_steps": {"class_path": SUBPROCESS},
    "max_time": "99999999999:00:00:00",
    "precision": {"class_path": "lightning.pytorch.plugins.MixedPrecision"},
    "accumulate_grad_batches": 10**12,
    "val_check_interval": "often",
    "gradient_clip_val": [1.0],
    "limit_val_batches": -1,
    "log_every_n_steps": 0,
    "callbacks": [{"class_path": SUBPROCESS}],
    "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger"},
    "strategy": "ddp_spawn",
    "devices": 10**6,
    "num_nodes": 10**6,
    "plugins": "mine.Mine",
    "profiler": "mine.Mine",
    "default_root_dir": "../outside",
}


@pytest.mark.parametrize("name", TRAINER)
def test_trainer_settings_in_a_checkpoint(attack, world, name):
    def change(checkpoint: dict[str, Any]) -> None:
        own = checkpoint.setdefault("chargpt", {})
        own["trainer"] = dict(own.get("trainer", {})) | {name: TRAINER[name]}

    world.tamper(change)
    assert_plain(attack(("fit", "validate")))


# ---- the text ----


def test_a_text_of_another_size_is_not_read(attack, world):
    text = world.outside / "precious.txt"
    world.tamper(data(corpus=str(text), corpus_name=text.name))
    assert_refused(attack(TRAINING))
    assert_worked(attack(NETWORK))
    assert not list((world.here.parent / "data").rglob("*precious*"))


def test_a_text_without_a_record_is_not_read(attack, world):
    text = world.outside / "precious.txt"

    def change(checkpoint: dict[str, Any]) -> None:
        data(corpus=str(text))(checkpoint)
        del checkpoint["datamodule_hyper_parameters"]["corpus_digest"]

    world.tamper(change)
    assert_refused(attack(TRAINING))
    assert not list((world.here.parent / "data").rglob("*precious*"))


@pytest.mark.parametrize("kind", ["pipe", "device", "sparse file", "root", "address", "nothing"])
def test_an_endless_text(attack, world, kind):
    path = world.here / "text"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "sparse file":
        path.touch()
        os.truncate(path, 1 << 40)
    others = {"device": "/dev/zero", "root": "/", "address": "http://127.0.0.1:9/x", "nothing": ""}
    world.tamper(data(corpus=others.get(kind, str(path)), corpus_name="text"))
    assert_refused(attack(TRAINING))


# ---- state that training resumes ----


def state(**values: Any) -> Callable[[dict[str, Any]], None]:
    """Replace entries of each parameter's optimizer state by functions of them."""

    def change(checkpoint: dict[str, Any]) -> None:
        for entry in checkpoint["optimizer_states"][0]["state"].values():
            for name in list(entry):
                if name in values:
                    entry[name] = values[name](entry[name])

    return change


def every(function: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    """Change all tensors of the optimizer that have their parameter's shape."""

    def change(checkpoint: dict[str, Any]) -> None:
        for entry in checkpoint["optimizer_states"][0]["state"].values():
            for name, value in entry.items():
                if value.dim() > 0:
                    entry[name] = function(value)

    return change


def groups(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    def run(checkpoint: dict[str, Any]) -> None:
        for group in checkpoint["optimizer_states"][0]["param_groups"]:
            change(group)

    return run


OPTIMIZERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "moments of another shape": every(lambda t: torch.zeros(2)),
    "moments that are one number": every(lambda t: torch.zeros(())),
    "moments of a larger shape": every(lambda t: torch.zeros(*t.shape, 3)),
    "moments that are not finite": every(lambda t: t.fill_(float("nan"))),
    "moments that are whole numbers": every(lambda t: t.long()),
    "moments that are text": every(lambda t: "os.system"),
    "moments of stride 0": every(lambda t: torch.zeros(1).expand(t.shape)),
    "a step of another shape": state(step=lambda t: torch.zeros(7)),
    "a step that is text": state(step=lambda t: "one"),
    "a state that is a list": lambda c: c["optimizer_states"][0].update(state=[1]),
    "parameters listed twice": groups(lambda g: g.update(params=[0] * len(g["params"]))),
    "parameters of others": groups(lambda g: g["params"].append(99)),
    "no groups": lambda c: c["optimizer_states"][0].update(param_groups=[]),
    "groups that are text": lambda c: c["optimizer_states"][0].update(param_groups="groups"),
    "no optimizer": lambda c: c.update(optimizer_states=[]),
    "two optimizers": lambda c: c.update(optimizer_states=c["optimizer_states"] * 2),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_of_the_optimizer(attack, world, kind):
    world.tamper(OPTIMIZERS[kind])
    assert_refused(attack(("fit",)))


@pytest.mark.parametrize("flags", [(), ("--trainer.enable_checkpointing=false",)], ids=str)
def test_state_of_the_optimizer_without_callbacks(attack, world, flags, monkeypatch):
    def change(checkpoint: dict[str, Any]) -> None:
        OPTIMIZERS["moments of another shape"](checkpoint)
        if not flags:  # Lightning then calls no callback
            del checkpoint["callbacks"]

    monkeypatch.setitem(COMMANDS, "fit", (*COMMANDS["fit"], *flags))
    world.tamper(change)
    assert_refused(attack(("fit",)))


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", {"class_path": SUBPROCESS}),
        ("betas", ("a", "b")),
        ("fused", "os.system"),
        ("foreach", deep(15)),
        ("capturable", True),
    ],
)
def test_settings_of_the_optimizer_do_not_come_from_its_state(attack, world, name, value):
    world.tamper(groups(lambda group: group.update({name: value})))
    assert_plain(attack(("fit",)))


@pytest.mark.parametrize("up", [False, True], ids=["absolute", "upwards"])
def test_paths_in_the_states_of_callbacks(attack, world, up):
    """Such paths say which old checkpoint is deleted and where new ones are written."""
    target = world.outside / "run" / "checkpoints"
    folder = str(target)
    if up:
        folder = os.path.join(
            str(world.checkpoint.parent), os.path.relpath(folder, world.checkpoint.parent)
        )
    old = os.path.join(folder, "best.ckpt")

    def redirect(value: Any) -> Any:
        if isinstance(value, dict):
            return {redirect(key): redirect(item) for key, item in value.items()}
        if isinstance(value, str) and value.endswith(".ckpt"):
            return old
        return folder if isinstance(value, str) and "checkpoints" in value else value

    def change(checkpoint: dict[str, Any]) -> None:
        states = {name: redirect(state) for name, state in checkpoint["callbacks"].items()}
        for state in states.values():
            if "best_k_models" in state:  # worse than any loss, so the next one replaces it
                worst = torch.tensor(99.0)
                state.update(best_k_models={old: worst}, kth_value=worst, best_model_score=worst)
                state.update(best_model_path=old, kth_best_model_path=old, last_model_path=old)
        checkpoint["callbacks"] = states
        own = checkpoint.setdefault("chargpt", {})
        for name in ("dirpath", "best", "last", "best_model_path", "folder", "run"):
            own[name] = old

    world.tamper(change)
    assert_plain(attack(TRAINING))
    assert [path.name for path in target.iterdir()] == ["best.ckpt"]


# ---- config.yaml ----

HANDLER = f"""{{class_path: {SUBPROCESS}, init_args: {{entrypoint: /bin/mkdir, args: [$SENTINEL],
  env: {{}}, stdout: null, stderr: null, local_rank_id: 0, numa_options: null}}}}"""

CONFIGS = {
    "a process": f"""\
trainer:
  strategy:
    class_path: lightning.pytorch.strategies.DDPStrategy
    init_args: {{ddp_comm_state: {HANDLER}}}
""",
    "a callback": "trainer: {callbacks: [mine.Mine]}",
    "a callback by its path": "trainer: {callbacks: [{class_path: mine.Mine}]}",
    "a logger": "trainer: {logger: mine.Mine}",
    "a profiler": "trainer: {profiler: mine.Mine}",
    "plugins": "trainer: {plugins: mine.Mine}",
    "a function of a callback": (
        "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.ThroughputMonitor,"
        " init_args: {batch_size_fn: mine.make}}]}"
    ),
    "a checkpoint elsewhere": (
        "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.ModelCheckpoint,"
        " init_args: {dirpath: $OUTSIDE}}]}"
    ),
    "a logger elsewhere": (
        "trainer: {logger: {class_path: lightning.pytorch.loggers.CSVLogger,"
        " init_args: {save_dir: $OUTSIDE}}}"
    ),
    "a root elsewhere": "trainer: {default_root_dir: $OUTSIDE}",
    "a million processes": "data: {num_workers: 1000000}",
    "another text": "data: {corpus: $OUTSIDE/precious.txt, data_dir: $OUTSIDE}",
    "code of YAML": "trainer: !!python/object/apply:os.mkdir [$SENTINEL]",
    "aliases without end": "a: &a [x, x]\n"
    + "".join(
        f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl")
    ),
    "no YAML": "trainer: [",
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_command_reads_the_configuration_of_a_run(attack, world, kind):
    (world.here / "mine.py").write_text(
        "import os\nos.mkdir(os.environ['SENTINEL'])\nMine = make = object\n"
    )
    text = CONFIGS[kind].replace("$SENTINEL", str(world.sentinel))
    (world.run / "config.yaml").write_text(text.replace("$OUTSIDE", str(world.outside)))
    assert_worked(attack(("fit", "validate") if kind != "a process" else ALL))
    assert not world.sentinel.exists() and "mine" not in sys.modules


def test_names_of_checkpoint_files_mean_nothing(attack, world, command):
    """A file's name neither makes it the best checkpoint nor gets it opened."""
    folder = world.checkpoint.parent
    os.mkfifo(folder / "step=1-val_loss=0.0000.ckpt")
    (folder / "step=2-val_loss=0.0001.ckpt").symlink_to("/dev/zero")
    before = snapshot(world.outside)
    with limits():
        result = command(world.here, "predict", "--generate.max_new_chars", "5")
    assert_plain({"predict": (result.status, result.err)})
    assert snapshot(world.outside) == before
