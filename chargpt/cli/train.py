"""fit, validate and test: LightningCLI, with the settings of a checkpoint as its defaults."""

import ctypes
import errno
import logging
import math
import os
import signal
import sys
import threading
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from chargpt.checkpoints import (
    WEIGHT_SETTINGS,
    build_network,
    find_checkpoints,
    read_checkpoint,
    resolve_checkpoint,
    run_of,
)
from chargpt.cli.main import COMMANDS, fail
from chargpt.cli.parsing import find_configs, parse_or_exit, shipped_configs
from chargpt.data import CharDataModule
from chargpt.data.texts import NAMED_TEXTS
from chargpt.model import GPT, UserError
from chargpt.training import GPTModule, TrainingConfig, make_trainer
from chargpt.training.checkpointing import SIGNALS, RunCheckpoint, check_resumable
from chargpt.training.module import callbacks_of, check_same_model
from chargpt.training.trainer import RUN_SETTINGS, TRAINER_DEFAULTS, as_list
from chargpt.vocabulary import Vocabulary

LINKS = {  # given once, for all that need it
    "model.block_size": "data.block_size",
    "data.seed": "seed_everything",
    "model.seed": "seed_everything",
}
# What a checkpoint records of its texts.
TEXT_RECORD = {"corpus_bytes", "corpus_digest", "train_characters"}
VAL_RECORD = TEXT_RECORD | {"val_corpus_bytes", "val_corpus_digest"}
SPLIT_SETTINGS = ("val_corpus", "val_fraction", "test_fraction")
# The settings of the data that a checkpoint restores; folders and workers are the user's.
DATA_SETTINGS = (*SPLIT_SETTINGS, "corpus", "block_size", "batch_size", "order")


def run(command: str, args: list[str]) -> None:
    """Parse the arguments of fit, validate or test and run it; scores go to standard output."""
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # they log their tables
    threading.excepthook = print_thread_error
    folder = "the run folder"
    try:
        cli = TrainingCLI(command, args)
        folder = cli.trainer.default_root_dir
        keep_freed_memory()
        with redirect_stdout(sys.stderr):  # standard output is for results only
            cli.run()
    except SIGTERMException:  # Lightning would end with status 0
        raise SystemExit(143) from None
    except SystemExit as stop:  # raised by Lightning on Ctrl-C before the first step
        interrupted = isinstance(stop.__context__, KeyboardInterrupt)
        raise SystemExit(130 if interrupted else stop.code) from None
    except UserError:
        raise
    except Exception as error:
        if message := plain_message(error, folder):
            fail(message)
        raise
    if command != "fit" and cli.trainer.is_global_zero:
        for name, value in cli.trainer.callback_metrics.items():
            print(name, value.item())
        cli.print_score()


def print_thread_error(args: threading.ExceptHookArgs) -> None:
    """Print a thread's traceback, unless it is TensorBoard's: the main thread reports that."""
    if not type(args.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(args)


PLAIN_MESSAGES = {  # for library errors that users cause, by a part of the original
    "gpu backend": "no GPU is available here\nuse --config cpu, or --trainer.accelerator cpu",
    "C++ compiler": "compile needs a C++ compiler, and none was found\ninstall one, or turn it off",
    "Connection closed by peer": "another process of this run has stopped; its message says why",
}


def plain_message(error: BaseException | None, folder: str) -> str | None:
    """A message for library errors that users cause, even if wrapped; None for other errors."""
    while error is not None:
        message = str(error)
        for part, plain in PLAIN_MESSAGES.items():
            if part in message:
                return plain
        if "can't allocate memory" in message or isinstance(error, torch.OutOfMemoryError):
            return f"out of memory: {message.rpartition('allocate memory')[2].strip(' :')}"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return (
                f"cannot write to {folder}: {error.strerror}\nits checkpoints are "
                "intact; make room, then repeat the command with --ckpt_path last"
            )
        if isinstance(error, OSError) and "tfevents" in repr(error.filename):  # TensorBoard's file
            return f"cannot write to {folder}: {error.strerror}"
        if isinstance(error, (MisconfigurationException, ModuleNotFoundError)) or (
            "conditioned on metric" in message  # a misspelled `monitor` of EarlyStopping
        ):
            return message
        error = error.__cause__ or error.__context__
    return None


class TrainingCLI(LightningCLI):
    """LightningCLI for one command.

    Flags override configuration files, which override the checkpoint, which overrides the defaults.

    Args:
        command: fit, validate or test.
        args: its arguments.
    """

    def __init__(self, command: str, args: list[str]) -> None:
        self.command = command
        self.checkpoint: dict[str, Any] = {}
        self.initial: tuple[GPT, Vocabulary] | None = None  # what a new run starts with
        super().__init__(
            GPTModule,
            CharDataModule,
            save_config_callback=None,  # `write_config` writes to the run folder
            trainer_class=make_trainer,
            trainer_defaults=TRAINER_DEFAULTS,
            run=False,
            args=args,
            parser_kwargs={
                "prog": f"python -m chargpt {command}",
                "description": f"{COMMANDS[command][1]} --config takes files, and names of shipped "
                f"configurations: {', '.join(shipped_configs())}.",
                "exit_on_error": False,
                "allow_abbrev": False,  # a misspelled flag is an error, not a different flag
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # hyperparameters stay plain values
        )

    # ---- arguments ----

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            help="A checkpoint: a path, or best or last of the newest run. fit resumes from it; "
            "auto is last, or a new run if there is none. validate and test use best by default.",
        )
        if self.command == "fit":
            parser.add_argument(
                "--init_from",
                type=str | None,
                help="A checkpoint (a path, best or last) whose network and weights a new run "
                "starts with, to fine-tune it on a different text.",
            )
        for target, source in LINKS.items():
            parser.link_arguments(source, target)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=TrainingConfig.seed,
            help="Seed of the weights, of the sequences in each batch, and of dropout.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.args = args = find_configs(args)
        self.config = parse_or_exit(parser, lambda: parser.parse_args(args))
        self.checkpoint_path = self.find_checkpoint()
        if self.checkpoint_path:
            restored = self.restore(self.checkpoint_path)
            self.config = parse_or_exit(parser, lambda: parser.parse_args(args))
            if self.command == "fit" and self.config.init_from:
                self.use_network(self.checkpoint["hyper_parameters"], self.checkpoint_path)
            self.check_changes(restored)
        elif self.command == "fit" and self.config.init_from:
            self.initialize_from(resolve_checkpoint(self.config.init_from, self.root))
        self.config.ckpt_path = None  # a command that uses config.yaml starts a new run
        for target, source in LINKS.items():
            if self.is_given(target):
                fail(f"{target} cannot be set\nset {source}, which it follows", status=2)
        if not 0 <= (seed := self.config.seed_everything) < 2**32:
            raise UserError(f"seed_everything is {seed}; it must be from 0 to 2**32 - 1")
        limit = {"validate": "limit_val_batches", "test": "limit_test_batches"}.get(self.command)
        if limit and self.config.trainer[limit] == 0:
            raise UserError(f"trainer.{limit} is 0: nothing would be scored; increase it")

    # ---- the checkpoint that is resumed or evaluated, or that a new run starts from ----

    @property
    def root(self) -> str | Path:
        return self.config.trainer.default_root_dir or "."

    def find_checkpoint(self) -> Path | None:
        """The checkpoint to resume or evaluate; None for a new run."""
        name = self.config.ckpt_path
        if self.command != "fit" or name not in (None, "auto"):
            return resolve_checkpoint(name, self.root)
        if name is None or not find_checkpoints(self.root):
            return None
        path, start = resolve_checkpoint("last", self.root), self.config.init_from
        if start in ("best", "last"):
            raise UserError(
                f"--init_from {start} follows the newest run, which --ckpt_path auto would resume\n"
                "give --init_from the path of a checkpoint"
            )
        # None: the newest run is still the one to start from.
        return None if start and run_of(path) == run_of(resolve_checkpoint(start)) else path

    def restore(self, path: Path) -> dict[str, Any]:
        """Make the settings of a checkpoint the defaults of the parser; returns them by flag."""
        self.checkpoint = read_checkpoint(path)
        build_network(self.checkpoint, path)  # says what is wrong with it, if anything
        restored = restored_settings(self.checkpoint, path, with_trainer=self.command == "fit")
        if "data.corpus" not in restored and not self.is_given("data.corpus"):
            raise UserError(
                "the checkpoint does not record the text that it was trained on\n"
                "choose one with --data.corpus"
            )
        if self.command != "fit" and self.is_given("data.corpus"):  # which is scored instead
            restored["data.val_corpus"] = None
        self.parser.set_defaults(restored)
        return restored

    def initialize_from(self, path: Path) -> None:
        """Take network and weights from a checkpoint, and everything else from the command."""
        self.initial = build_network(read_checkpoint(path), path)
        self.config.init_from = str(path.absolute())
        rank_zero_print(f"weights  {path}")
        self.use_network(asdict(self.initial[0].config), path)

    def use_network(self, network: dict[str, Any], path: Path) -> None:
        """Set the network's settings, whatever files say; a flag that differs is refused."""
        changes = []
        for name in WEIGHT_SETTINGS:
            flag = "data.block_size" if name == "block_size" else f"model.{name}"
            now = self.config[flag]
            value = network.get(name, now)
            if name == "block_size" and network.get("position") == "rotary" and self.is_given(flag):
                continue  # no weight depends on the length
            if now != value and self.is_flag(flag):
                raise UserError(
                    f"{name} is {value} in {path} and cannot be changed to {now}: the network "
                    f"would be a different one\nomit --{flag}"
                )
            if now != value and self.is_given(flag):
                changes.append(f"{flag} {now} -> {value}")
            self.config[flag] = self.config[f"model.{name}"] = value
        print_changes(changes)

    def check_changes(self, restored: dict[str, Any]) -> None:
        """Refuse settings of a different network or validation; print all others that differ."""
        model = TrainingConfig(**self.config.model.as_dict())
        check_same_model(self.checkpoint["hyper_parameters"], model)
        if self.command != "fit":
            return
        changes = []
        for flag, before in restored.items():
            now, name = self.config[flag], flag.partition(".")[2]
            if now == before or (name in ("corpus", "val_corpus") and now and before):
                continue  # the path of a text may differ, the text may not
            if name in (*SPLIT_SETTINGS, "limit_val_batches"):
                raise UserError(
                    f"{name} is {before} in the checkpoint and cannot be changed to {now}: scores "
                    "would not be comparable\ntrain a new model to change it"
                )
            changes.append(f"{flag} {before} -> {now}")
        print_changes(changes)

    def check_sequences(self) -> None:
        """Refuse to resume with a different number of sequences per step unless asked for."""
        before = self.checkpoint["chargpt"].get("sequences_per_step")
        per_device = self.config.data.batch_size * self.config.trainer.accumulate_grad_batches
        now = per_device * self.trainer.world_size
        flags = ("trainer.devices", "trainer.num_nodes", "data.batch_size")
        if before != now and not any(map(self.is_given, flags)):
            raise UserError(
                f"the run used {before} sequences per step, but this command would use {now}\n"
                f"add --trainer.devices {before // per_device}, or change --data.batch_size"
            )

    def is_given(self, flag: str) -> bool:
        """Whether a setting is in the flags or configuration files of the command."""
        group, _, name = flag.partition(".")
        files = [yaml.safe_load(path.read_text()) for path in self.config.config or []]
        return self.is_flag(flag) or any(name in (file.get(group) or {}) for file in files)

    def is_flag(self, flag: str) -> bool:
        return any(arg.partition("=")[0] == f"--{flag}" for arg in self.args)

    # ---- objects ----

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer of the run that the checkpoint belongs to, or else of a new one."""
        self.model.initial = self.initial
        callbacks = as_list(self.config_init.trainer.callbacks)
        if self.command != "fit":
            callbacks.append(RunCheckpoint(None))  # an evaluation leaves nothing behind
            kwargs["logger"] = False
        else:
            callbacks.append(LambdaCallback(on_fit_start=self.write_config))
            if folder := self.checkpoint_path and run_of(self.checkpoint_path):
                callbacks.append(RunCheckpoint(folder))
        if self.checkpoint:
            # Now, since a copy of the network (WeightAveraging) is made before weights are loaded.
            self.model.build(Vocabulary(self.checkpoint["vocabulary"]))
            # Texts must not have changed, except those that are scored instead.
            self.datamodule.trained = self.checkpoint["datamodule_hyper_parameters"]
            if self.command != "fit":
                names = ("corpus", "val_corpus")
                self.datamodule.other_texts = [n for n in names if self.is_given(f"data.{n}")]
        try:
            return super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except (TypeError, ValueError) as error:  # Lightning's message for invalid settings
            raise UserError(str(error)) from error

    @rank_zero_only
    def write_config(self, trainer: Trainer, module: LightningModule) -> None:
        """Write config.yaml to the run folder, for people and for --config."""
        if callbacks_of(trainer, RunCheckpoint):
            path = Path(trainer.default_root_dir, "config.yaml")
            self.parser.save(self.config, path, skip_unset=False, overwrite=True)

    def run(self) -> None:
        """Run the command."""
        is_fit, step = self.command == "fit", self.checkpoint.get("global_step", 0)
        quiet = {} if is_fit else {"verbose": False}  # the function `run` prints the scores
        try:
            if is_fit and self.checkpoint:
                check_resumable(self.trainer, self.checkpoint)  # before loggers write to its run
                self.check_sequences()
            elif not is_fit:
                rank_zero_print(f"checkpoint {self.checkpoint_path}")
            self.checkpoint.clear()  # the Trainer reads it again
            end_all_processes_on_signals(self.trainer)
            method = getattr(self.trainer, self.command)
            method(self.model, datamodule=self.datamodule, ckpt_path=self.checkpoint_path, **quiet)
        finally:
            for run in callbacks_of(self.trainer, RunCheckpoint):
                run.release()
        if is_fit and self.checkpoint_path and self.trainer.global_step == step:
            rank_zero_print(
                f"nothing to do: step {step} is the last within trainer.max_steps or max_time\n"
                "increase the limit to train for longer"
            )
        if self.trainer.received_sigterm:  # Lightning would end with status 0
            raise SystemExit(143)

    def print_score(self) -> None:
        """Print to standard error what was scored, and the loss in the usual units."""
        data, validates = self.datamodule, self.command == "validate"
        path = (data.val_corpus if validates else data.corpus).source.path
        nats = self.trainer.callback_metrics["val_loss" if validates else "test_loss"]
        print(
            f"scored   {self.model.scored:,} characters of {path}: {nats.item():.4f} nats, "
            f"{nats.item() / math.log(2):.4f} bits per character, perplexity {nats.exp():.4f}",
            file=sys.stderr,
        )


def end_all_processes_on_signals(trainer: Trainer) -> None:
    """Until RunCheckpoint handles signals, make them end all ranks, not only this process."""

    def end(signum: int, frame: Any) -> None:
        if trainer.strategy.launcher:
            trainer.strategy.launcher.kill(signal.Signals(signum))
        raise SystemExit(128 + signum)

    for signum in SIGNALS:
        if signal.getsignal(signum) is signal.SIG_DFL:
            signal.signal(signum, end)


def restored_settings(checkpoint: dict[str, Any], path: Path, with_trainer: bool) -> dict[str, Any]:
    """The settings in a checkpoint by flag, each checked: the file may be untrusted."""
    model, data = checkpoint["hyper_parameters"], dict(checkpoint["datamodule_hyper_parameters"])
    try:
        config = TrainingConfig(**model)
    except TypeError as error:
        reason = str(error).partition(" got an ")[2] or error
        raise UserError(
            f"{path} has a setting that this version of chargpt does not support: {reason}\n"
            "use the version that wrote it"
        ) from error
    for key in ("corpus", "val_corpus"):  # stored at a different path on a different machine
        stored, name = data.get(key), data.get(f"{key}_name")
        if isinstance(stored, str) and isinstance(name, str) and not os.path.exists(stored):
            data[key] = name
    if not (data.keys() >= TEXT_RECORD or str(data.get("corpus")) in NAMED_TEXTS):
        data.pop("corpus", None)  # nothing says that it is the text that was trained on
    if not data.keys() >= VAL_RECORD:
        data["val_corpus"] = None
    data = {name: data[name] for name in DATA_SETTINGS if name in data}
    data["block_size"] = config.block_size
    CharDataModule(**data)
    settings = {f"model.{name}": model[name] for name in model if f"model.{name}" not in LINKS}
    settings |= {f"data.{name}": value for name, value in data.items()}
    settings["seed_everything"] = config.seed
    trainer = checkpoint["chargpt"].get("trainer") or {}
    for name in RUN_SETTINGS if with_trainer else ():
        value = trainer.get(name)
        if type(value) not in (int, float, str, type(None)):
            raise UserError(f"{path}: trainer.{name} is {str(value)[:80]}, which is not a number")
        if name == "max_time" and value is not None:
            value = {"seconds": value}
        if name in trainer:
            settings[f"trainer.{name}"] = value
    return settings


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a step frees for the next step.

    On a CPU that saves thousands of page faults per step, a tenth of its time; peak memory stays
    the same.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    except (OSError, AttributeError):
        pass  # a different system or C library


def print_changes(changes: list[str]) -> None:
    if changes:
        rank_zero_print(f"changed  {', '.join(changes)}")


@rank_zero_only
def rank_zero_print(message: str) -> None:
    print(message, file=sys.stderr)
