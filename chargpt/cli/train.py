"""fit, validate and test: LightningCLI, with settings restored from checkpoints."""

import ctypes
import logging
import os
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import LambdaCallback, Timer
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from chargpt import checkpoints
from chargpt.checkpoints import CheckpointError
from chargpt.cli.main import COMMANDS, fail
from chargpt.cli.parsing import UNION, checked, explain, read_config, shipped_configs, split_configs
from chargpt.cli.run_folder import RunFolder
from chargpt.data import CharDataModule
from chargpt.model import GPTConfig
from chargpt.training import GPTModule
from chargpt.training.agreement import AgreedTimer
from chargpt.training.callbacks import FinalScore, ProgressBar, Summary, TextSamples, Throughput
from chargpt.training.checkpointing import AtomicCheckpointIO, best_checkpoint_callback
from chargpt.training.module import TrainingError
from chargpt.training.resume import LastCheckpoint
from chargpt.training.trainer import TypedTrainer

SEED = 1337

FILE_LOGGERS = ("CSVLogger", "TensorBoardLogger")  # write into save_dir/name/version
HERE = "."

TRAINER_DEFAULTS = dict(
    max_steps=5000,
    val_check_interval=250,
    check_val_every_n_epoch=None,  # there is one endless epoch: all is counted in steps
    num_sanity_val_steps=0,
    use_distributed_sampler=False,  # our batches are sharded already, and without padding
    enable_model_summary=False,  # our own says more
)

LINKS = {  # given once, known to all who need it
    "model.block_size": "data.block_size",
    "data.seed": "seed_everything",
    "model.seed": "seed_everything",
}


def run(command: str, args: list[str]) -> None:
    """Parse the arguments of fit, validate or test and run it; scores go to standard output."""
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # they log their tables
    try:
        cli = TrainingCLI(command, args)
        keep_freed_memory()
        with redirect_stdout(sys.stderr):  # standard output is for results alone
            cli.run()
    except SystemExit as stop:  # Lightning's answer to a Ctrl-C that comes before the first step
        interrupted = isinstance(stop.__context__, KeyboardInterrupt)
        raise SystemExit(130 if interrupted else stop.code) from None
    except (
        TrainingError,
        MisconfigurationException,
        ModuleNotFoundError,  # of a logger or callback that needs a package more
        torch.OutOfMemoryError,
    ) as error:
        fail(str(error))
    except RuntimeError as error:
        if "Connection closed by peer" in str(error):  # gloo's, where another process has failed
            fail("another process of this run has stopped; its message says why")
        if "can't allocate memory" not in str(error):
            raise
        fail(f"out of memory{str(error).partition('allocate memory')[2]}")
    if command != "fit":
        print_scores(cli.trainer)


class TrainingCLI(LightningCLI):
    """LightningCLI for one command: what it parses, and the Trainer that it makes.

    Typed flags win over a checkpoint that is resumed from, that over configuration files, and those
    over the defaults.

    Args:
        command: fit, validate or test.
        args: what is typed after it.
    """

    def __init__(self, command: str, args: list[str]) -> None:
        self.command = command
        self.checkpoint_path: Path | None = None
        self.corpus_digest: str | None = None
        self.folder: RunFolder | None = None
        super().__init__(
            GPTModule,
            CharDataModule,
            save_config_callback=None,  # `save_config` writes into the folder of the run
            trainer_class=TypedTrainer,
            run=False,
            args=args,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=SEED,
            parser_kwargs={
                "prog": f"python -m chargpt {command}",
                "description": f"{COMMANDS[command][1]} --config takes files, and names of shipped "
                f"configurations: {', '.join(shipped_configs())}.",
                "exit_on_error": False,
                "allow_abbrev": False,  # a misspelt flag is an error, not another flag
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # hyperparameters stay plain values
        )

    # ---- what can be typed ----

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            help="A checkpoint: a path, or best or last of the newest run. fit resumes from it; "
            "validate and test take the best unless told otherwise.",
        )
        for target, source in LINKS.items():
            parser.link_arguments(source, target)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=self.seed_everything_default,
            help="Seed of the weights, of the sequences that are read and of dropout.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        configs, typed = split_configs(args)
        for name in configs:
            self.check(name)
        typed = with_save_dir(typed)
        self.config = self.parse(configs, typed)
        if self.command != "fit" or self.config.ckpt_path is not None:
            self.restore(configs, typed)
        check_trainer(self.config.trainer)
        if self.command == "fit":
            check_end(self.config)

    def parse(self, configs: list[str], typed: list[str]) -> Any:
        args = [*(f"--config={config}" for config in configs), *typed]
        return checked(self.parser, lambda: self.parser.parse_args(args))

    def check(self, name: str) -> None:
        """Parse a configuration file alone, so that an error can name where it comes from."""
        text = read_config(name)
        given = yaml.safe_load(text)
        for group in ("trainer", "model", "data"):
            if not isinstance(given.get(group, {}), dict):
                fail(f"{name}: {group} is {given[group]}; it must hold settings, as name: value", 2)
        for target, source in LINKS.items():
            group, _, setting = target.partition(".")
            if isinstance(given.get(group), dict) and setting in given[group]:
                fail(f"{name}: {target} cannot be set: it follows {source}", status=2)
        checked(self.parser, lambda: self.parser.parse_string(text), f"{name}: ")

    # ---- settings of the checkpoint that is resumed from or looked at ----

    def restore(self, configs: list[str], typed: list[str]) -> None:
        """Parse again, with the settings of the checkpoint between files and typed flags."""
        root = self.config.trainer.default_root_dir or "."
        path = self.checkpoint_path = checkpoints.resolve_checkpoint(self.config.ckpt_path, root)
        checkpoint = checkpoints.read_checkpoint(path)
        checkpoints.network_of(checkpoint, path)  # says what is wrong with it, if anything
        settings = yaml.safe_dump(settings_of(checkpoint))
        checked(self.parser, lambda: self.parser.parse_string(settings), f"{path}: ")
        if self.command == "fit" and not configs:
            configs = settings_of_run(path)
        self.config = self.parse([*configs, settings], typed)
        self.config.ckpt_path = str(path)
        refuse_another_network(self.config, checkpoint["hyper_parameters"])
        if not any(arg.startswith("--data.corpus") for arg in typed):  # one named anew is trusted
            saved = checkpoint["datamodule_hyper_parameters"]
            self.corpus_digest = saved.get("corpus_digest")
        if self.command == "fit":
            check_resumable(checkpoint, path, self.config.trainer)

    # ---- what is made of it ----

    def instantiate_classes(self) -> None:
        """Choose the folder of the run, point its loggers there, and make everything."""
        self.given, config = self.config.clone(), self.config.trainer
        self.given.ckpt_path = None  # whoever repeats a run with its config.yaml starts anew
        keeps = self.command == "fit" and not config.fast_dev_run and not config.barebones
        self.saves = keeps and config.enable_checkpointing is not False
        self.keeps = self.saves or (keeps and config.logger is not False)
        self.run_path = checkpoints.run_of(self.checkpoint_path) if self.keeps else None
        if self.keeps and rank_zero_only.rank == 0:  # the other ranks hear of a new one from it
            logs = Path(config.default_root_dir or os.getcwd()) / checkpoints.LOGS
            self.folder = RunFolder(logs, self.run_path)
            self.run_path = self.folder.path
            for logger in loggers_of(config):
                point(logger, self.run_path)
        try:
            super().instantiate_classes()
        except BaseException as error:
            if self.folder:
                self.folder.release(nothing_came=True)
            if isinstance(error, (TypeError, ImportError)):  # Lightning's words for what cannot be
                raise ValueError(str(error)) from error
            if UNION in str(error):  # jsonargparse's, for a class that cannot be made
                raise ValueError(explain(self.parser, str(error))) from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init.trainer
        if self.command != "fit":  # looks at a run and leaves nothing behind
            kwargs["logger"] = False
        elif self.run_path and config.logger in (None, True):
            kwargs["logger"] = TensorBoardLogger(
                self.run_path.parent, name="", version=self.run_path.name, default_hp_metric=False
            )
        plugins = config.plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        callbacks = self.callbacks(config)
        self.trainer_defaults = {**TRAINER_DEFAULTS, "callbacks": callbacks}
        return super().instantiate_trainer(**kwargs)

    def callbacks(self, config: Any) -> list[Callback]:
        """Ours, beside those of the configuration."""
        given = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks]
        folder = self.run_path
        ours: list[Callback] = []
        if self.command == "fit":
            ours += [Summary(folder), Throughput(), TextSamples()]
        if self.folder:
            ours.append(LambdaCallback(setup=lambda *_, stage: self.save_config()))
        bar = config.enable_progress_bar is not False and not config.barebones
        if bar and not any(isinstance(callback, AnyProgressBar) for callback in given):
            ours.append(ProgressBar())
        if config.max_time and not any(isinstance(callback, Timer) for callback in given):
            ours.append(AgreedTimer(config.max_time))
        if self.saves:
            best = best_checkpoint_callback(folder and folder / "checkpoints")
            ours += [best, LastCheckpoint(best), FinalScore(best)]
        return ours

    def save_config(self) -> None:
        """Write config.yaml once the text is there: a run that cannot resume keeps its own."""
        path = self.folder.path / checkpoints.CONFIG
        self.parser.save(self.given, path, skip_unset=False, overwrite=True)

    # ---- what is run ----

    def run(self) -> None:
        """Run the command."""
        if self.command != "fit":
            say(f"checkpoint {self.checkpoint_path}")
        self.datamodule.expected_digest = self.corpus_digest
        method = getattr(self.trainer, self.command)
        verbose = {} if self.command == "fit" else {"verbose": False}  # we print scores in full
        try:
            method(
                self.model,
                datamodule=self.datamodule,
                ckpt_path=self.checkpoint_path,
                weights_only=True,  # no code from a checkpoint is run
                **verbose,
            )
        except BaseException:
            if self.folder:
                self.folder.release(nothing_came=self.trainer.global_step == 0)
            raise
        if self.folder:
            self.folder.release()


def point(logger: Namespace, run: Path) -> None:
    """Let a logger of files that is told no place write into the folder of the run."""
    settings = logger.init_args
    if logger.class_path.rpartition(".")[2] not in FILE_LOGGERS:
        return
    if (settings.save_dir, settings.name, settings.version) == (HERE, checkpoints.LOGS, None):
        settings.save_dir, settings.name, settings.version = str(run.parent), "", run.name
        metrics = run / "metrics.csv"
        if metrics.exists():  # CSVLogger begins anew, and would delete what is there
            metrics.replace(metrics.with_stem(f"metrics-until-{metrics.stat().st_mtime_ns}"))


def loggers_of(config: Any) -> list[Namespace]:
    """The loggers that are given by the name of their class."""
    loggers = config.logger if isinstance(config.logger, list) else [config.logger]
    return [logger for logger in loggers if isinstance(logger, Namespace)]


def with_save_dir(typed: list[str]) -> list[str]:
    """Give a logger of files, typed by its name alone, the folder that it cannot do without."""
    args = []
    for before, arg in zip(["", *typed], typed):
        flag, _, name = arg.partition("=") if "=" in arg else (before, "", arg)
        args.append(arg)
        if flag.rstrip("+") == "--trainer.logger" and name.rpartition(".")[2] in FILE_LOGGERS:
            args.append(f"--trainer.logger.save_dir={HERE}")
    return args


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next step, instead of giving it back to the kernel.

    On a processor that saves thousands of page faults a step, a tenth of its time; the most
    memory in use stays what it is.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    except (OSError, AttributeError):
        pass  # another system, or another C library


@rank_zero_only
def say(message: str) -> None:
    print(message, file=sys.stderr)


@rank_zero_only
def print_scores(trainer: Trainer) -> None:
    for name, value in trainer.callback_metrics.items():
        print(name, value.item())


def settings_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says about the model, the data and the seed, as a configuration."""
    groups = {"model": "hyper_parameters", "data": "datamodule_hyper_parameters"}
    derived = {"corpus_name", "corpus_digest", "_instantiator"}
    settings: dict[str, Any] = {
        group: {
            name: value
            for name, value in checkpoint[key].items()
            if f"{group}.{name}" not in LINKS and name not in derived
        }
        for group, key in groups.items()
    }
    settings["seed_everything"] = checkpoint["hyper_parameters"].get("seed", SEED)
    return settings


def settings_of_run(checkpoint: Path) -> list[str]:
    """The configuration of the run that a checkpoint belongs to, where there is one, as text."""
    run = checkpoints.run_of(checkpoint)
    if run is None:
        return []
    say(f"settings {run / checkpoints.CONFIG}")
    saved = yaml.safe_load(read_config(str(run / checkpoints.CONFIG)))
    groups = ("trainer", "model", "data")  # version 0.1 also kept arguments of Trainer.fit
    settings = {name: saved[name] for name in groups if name in saved}
    if isinstance(settings.get("model"), dict):
        checkpoints.rename_ngrams(settings["model"])
    return [yaml.safe_dump(settings)]


def refuse_another_network(config: Any, saved: dict[str, Any]) -> None:
    """The weights of a checkpoint fit one network; what else was typed takes effect."""
    names = {field.name for field in fields(GPTConfig)} & saved.keys()
    names -= {"dropout", "attention_dropout", "ngram_dropout", "zero_init"}
    if config.model.position == "rotary":  # no weight depends on the length then
        names -= {"block_size"}
    for name in sorted(names):
        given = config.data.block_size if name == "block_size" else config.model[name]
        if given != saved[name]:
            raise CheckpointError(
                f"{name} is {saved[name]} in the checkpoint, whose weights fit no other; "
                f"it cannot become {given}\ntrain anew to change it"
            )
    before, now = saved["second_target"], config.model.second_target
    if bool(before) != bool(now):
        raise CheckpointError(
            f"second_target is {before} in the checkpoint, which {'has' if before else 'lacks'} "
            f"the weights of its head; it cannot become {now}\ntrain anew to change it"
        )


def check_resumable(checkpoint: dict[str, Any], path: Path, config: Any) -> None:
    """End here where there is nothing to resume."""
    step = checkpoint["global_step"]
    if not {"optimizer_states", "loops"} <= checkpoint.keys():
        raise CheckpointError(f"{path} holds weights alone; training cannot resume from it")
    if config.max_epochs not in (None, -1):
        raise ValueError(
            "a run that counts epochs cannot be resumed exactly\n"
            "give --trainer.max_epochs null and --trainer.max_steps N"
        )
    limit = None
    if 0 < config.max_steps <= step:
        limit = "max_steps"
    if config.max_time and (spent := checkpoint.get("callbacks", {}).get("Timer")):
        timer = Timer(config.max_time)
        timer.load_state_dict(spent)
        if timer.time_remaining() <= 0:
            limit = "max_time"
    if limit:
        say(
            f"nothing to do: the checkpoint is of step {step}, and trainer.{limit} is "
            f"{config[limit]}\ngive a larger --trainer.{limit} to train on"
        )
        raise SystemExit(0)


def check_trainer(config: Any) -> None:
    """What Lightning would divide by, or do nothing with."""
    for name in ("max_steps", "val_check_interval", "accumulate_grad_batches"):
        value = config[name]
        endless = name == "max_steps" and value == -1
        if isinstance(value, (int, float)) and value < 1 and not endless:  # a time is text
            raise ValueError(f"trainer.{name} is {value}; it must be at least 1")
    if config.max_epochs not in (None, -1) and type(config.limit_train_batches) is not int:
        raise ValueError(
            f"trainer.max_epochs is {config.max_epochs}, but sequences are read without end\n"
            "give --trainer.max_steps, or --trainer.limit_train_batches N to say what an epoch is"
        )


def check_end(config: Any) -> None:
    """What comes down or grows over a run needs a run that ends."""
    endless = config.trainer.max_steps in (-1, None) and config.trainer.max_time is None
    if endless and (config.model.schedule != "constant" or config.model.short_contexts):
        raise ValueError(
            "trainer.max_steps is -1 and there is no trainer.max_time: "
            "schedule and short_contexts need an end\n"
            "give --trainer.max_steps N or "
            "--trainer.max_time 00:01:00:00 (days:hours:minutes:seconds)"
        )
