"""The command line: LightningCLI, with settings restored from checkpoints and runs that leave no mess."""

import ctypes
import inspect
import logging
import os
import shutil
import sys
import warnings
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from chargpt import runs
from chargpt.arguments import COMMANDS, LINKS, Parser, command_of, fail, read_config, split_configs
from chargpt.callbacks import FinalScore, ProgressBar, Summary, TextSamples, Throughput
from chargpt.checkpointing import AtomicCheckpointIO, LastCheckpoint, best_checkpoint_callback
from chargpt.data import CharDataModule
from chargpt.model import GPT
from chargpt.module import GPTModule, TrainingError
from chargpt.predict import Generate, predict
from chargpt.writer import from_checkpoint, load

SEED = 1337

TRAINER_DEFAULTS = dict(
    max_steps=5000,
    val_check_interval=250,
    check_val_every_n_epoch=None,  # there is one endless epoch: all is counted in steps
    num_sanity_val_steps=0,
    use_distributed_sampler=False,  # our batches are sharded already, and without padding
    enable_model_summary=False,  # our own says more
)

USER_ERRORS = (  # what a user can cause; anything else is a bug and keeps its traceback
    ValueError,
    OSError,
    MemoryError,
    TrainingError,
    MisconfigurationException,
    torch.OutOfMemoryError,
    yaml.YAMLError,
)


class RunLogger(TensorBoardLogger):
    """A TensorBoard logger that takes its version_N for itself, should two runs start together."""

    made: Path | None = None

    @rank_zero_only
    def _get_next_version(self) -> int:
        version = super()._get_next_version()
        while True:
            self.made = Path(self.root_dir, f"version_{version}")
            try:
                os.makedirs(self.made)
                return version
            except FileExistsError:
                version += 1

    def discard(self) -> None:
        """Remove the folder, if it is new and nothing came of it."""
        if self.made and not any(self.made.glob("checkpoints/*")):
            self.finalize("failed")
            shutil.rmtree(self.made, ignore_errors=True)
            with suppress(OSError):  # the folder of all runs, unless it holds others
                self.made.parent.rmdir()


class ChargptCLI(LightningCLI):
    """fit, validate, test and predict.

    Args:
        args: what is typed after `python -m chargpt`.
    """

    def __init__(self, args: list[str]) -> None:
        self.command = command_of(args)
        super().__init__(
            GPTModule,
            CharDataModule,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=SEED,
            parser_class=Parser,
            parser_kwargs={
                "prog": "python -m chargpt",
                "description": "A character-level GPT.",
                "allow_abbrev": False,  # a misspelt flag is an error, not another flag
            },
            save_config_kwargs={"overwrite": True},  # going on stays in the same folder
            args=args,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # hyperparameters stay plain values
        )

    # ---- what can be typed ----

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Only the command in use gets its arguments: building each takes a tenth of a second."""
        self._subcommand_parsers = {}
        commands = parser.add_subcommands(title="commands", metavar="COMMAND")
        for name, description in COMMANDS.items():
            if name == self.command:
                subparser = self._prepare_subcommand_parser(Trainer, name, description=description)
            else:
                subparser = self.init_parser()
            self._subcommand_parsers[name] = subparser
            commands.add_subcommand(name, subparser, help=description)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults({"weights_only": True})  # no code from a checkpoint is run
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # we print the scores ourselves, in full
        return parser

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        if self.command == "predict":  # before all else in its --help
            parser.add_class_arguments(Generate, "generate")
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=self.seed_everything_default,
            help="Seed of the weights, of the blocks that are read and of dropout.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for target, source in LINKS.items():
            parser.link_arguments(source, target)

    # ---- typed flags over the checkpoint, the checkpoint over config files, those over defaults ----

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        if not self.command:
            parser.parse_args(args)  # explains, and ends
        configs, self.typed = split_configs(args[1:])
        check = self._subcommand_parsers[self.command].check
        for config in configs:
            check(config, read_config(config))
        self.parse(configs)
        self.checkpoint_path = self.find_checkpoint()
        if self.checkpoint_path and self.command != "predict":
            checkpoint = runs.read_checkpoint(self.checkpoint_path)
            from_checkpoint(checkpoint, self.checkpoint_path)  # says what is wrong with it, if anything
            settings = yaml.safe_dump(settings_of(checkpoint))
            check(str(self.checkpoint_path), settings)
            if self.command == "fit" and not configs:
                configs = self.config_of_run()
            self.parse([*configs, settings])
            self.config[self.command].ckpt_path = str(self.checkpoint_path)
            refuse_another_network(self.config[self.command], checkpoint["hyper_parameters"])
            if self.command == "fit":
                self.check_going_on(checkpoint)
        check_trainer(self.config[self.command].trainer)
        if self.command == "fit":
            check_end(self.config.fit)

    def parse(self, configs: list[str]) -> None:
        self.config = self.parser.parse_args([self.command, *(f"--config={c}" for c in configs), *self.typed])

    def check_going_on(self, checkpoint: dict[str, Any]) -> None:
        step, max_steps = checkpoint["global_step"], self.config.fit.trainer.max_steps
        if not {"optimizer_states", "loops"} <= checkpoint.keys():
            raise runs.CheckpointError(f"{self.checkpoint_path} holds weights alone; training cannot go on from it")
        if 0 < max_steps <= step:
            say(f"nothing to do: the checkpoint is of step {step}, trainer.max_steps is {max_steps}\n"
                "give a larger --trainer.max_steps to train on")
            raise SystemExit(0)

    def find_checkpoint(self) -> Path | None:
        config = self.config[self.command]
        if self.command == "fit" and config.ckpt_path is None:
            return None
        return runs.resolve_checkpoint(config.ckpt_path, config.trainer.default_root_dir or ".")

    def config_of_run(self) -> list[str]:
        config = self.checkpoint_path.absolute().parents[1] / "config.yaml"
        return [str(config)] if config.is_file() else []

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint win over typed flags; `parse_arguments` has done better."""

    # ---- what is made of it ----

    def instantiate_classes(self) -> None:
        if self.command != "predict":  # which needs no data and no trainer
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.command].trainer
        keeps = self.command == "fit" and not config.fast_dev_run and not config.barebones
        if self.command != "fit":  # looks at a run and leaves nothing behind
            kwargs["logger"] = False
        elif keeps and config.logger in (None, True):
            kwargs["logger"] = self.run_logger(config.default_root_dir or os.getcwd())
        if kwargs.get("logger", config.logger) is False:
            self.save_config_callback = None
        if self.command == "fit":  # whoever repeats a run with its config.yaml starts anew
            self.config.fit.ckpt_path = None
        plugins = config.plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        checkpoints = keeps and config.enable_checkpointing is not False
        self.trainer_defaults = {**TRAINER_DEFAULTS, "callbacks": self.callbacks(config, checkpoints)}
        try:
            return super().instantiate_trainer(**kwargs)
        except (TypeError, ImportError) as error:  # Lightning's words for what cannot be here
            raise ValueError(str(error)) from error

    def callbacks(self, config: Any, checkpoints: bool) -> list[Callback]:
        """Ours, beside those of the configuration."""
        given = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks]
        ours = [Summary(), Throughput(), TextSamples()] if self.command == "fit" else []
        bar = config.enable_progress_bar is not False and not config.barebones
        if bar and not any(isinstance(callback, AnyProgressBar) for callback in given):
            ours.append(ProgressBar())
        if checkpoints:
            best = best_checkpoint_callback()
            ours += [best, LastCheckpoint(best), FinalScore(best)]
        return ours

    def run_logger(self, root: str) -> TensorBoardLogger:
        """A new version_N, or, going on, the folder of the run itself: one folder, one curve."""
        version = None
        if self.checkpoint_path:
            run = self.checkpoint_path.absolute().parents[1]
            if run.parent == Path(root, runs.LOGS).absolute():
                version = run.name
        return RunLogger(root, name=runs.LOGS, version=version, default_hp_metric=False)

    # ---- what is run ----

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand != "fit":
            say(f"checkpoint {self.checkpoint_path}")
        if subcommand == "predict":
            return self.write()
        keep_freed_memory()
        try:
            with redirect_stdout(sys.stderr):  # standard output is for results alone
                super()._run_subcommand(subcommand)
        except BaseException:
            if isinstance(self.trainer.logger, RunLogger) and self.trainer.global_step == 0:
                self.trainer.logger.discard()
            raise
        if subcommand in ("validate", "test"):
            print_scores(self.trainer)

    def write(self) -> None:
        groups = ("--trainer.", "--model.", "--data.", "--seed_everything")
        for flag in self.typed:
            if flag.startswith(groups) and not flag.startswith("--trainer.default_root_dir"):
                say(f"warning: {flag.split('=')[0]} changes nothing: predict writes with the checkpoint as it is")
        options = Generate(**self.config.predict.generate.as_dict())
        predict(load(self.checkpoint_path), options, self.checkpoint_path)


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

    def known(key: str, owner: type, group: str) -> dict[str, Any]:
        names = inspect.signature(owner).parameters.keys()
        return {k: v for k, v in checkpoint[key].items() if k in names and f"{group}.{k}" not in LINKS}

    return {
        "seed_everything": checkpoint["hyper_parameters"].get("seed", SEED),
        "data": known("datamodule_hyper_parameters", CharDataModule, "data"),
        "model": known("hyper_parameters", GPTModule, "model"),
    }


def refuse_another_network(config: Any, saved: dict[str, Any]) -> None:
    """The weights of a checkpoint fit one network; what else was typed takes effect."""
    names = inspect.signature(GPT).parameters.keys() & saved.keys() - {"dropout", "attention_dropout"}
    if config.model.position == "rotary":  # no weight depends on the length then
        names -= {"block_size"}
    for name in sorted(names):
        given = config.data.block_size if name == "block_size" else config.model[name]
        if given != saved[name]:
            raise runs.CheckpointError(
                f"{name} is {saved[name]} in the checkpoint, whose weights fit no other; it cannot become {given}\n"
                "train anew to change it"
            )


def check_trainer(config: Any) -> None:
    """What Lightning would divide by, or do nothing with."""
    for name in ("max_steps", "val_check_interval", "accumulate_grad_batches"):
        value = config[name]
        endless = name == "max_steps" and value == -1
        if isinstance(value, (int, float)) and value < 1 and not endless:  # a time is text
            raise ValueError(f"trainer.{name} is {value}; it must be at least 1")


def check_end(config: Any) -> None:
    """What comes down or grows over a run needs a run that ends."""
    endless = config.trainer.max_steps in (-1, None) and config.trainer.max_time is None
    if endless and (config.model.schedule != "constant" or config.model.short_contexts):
        raise ValueError(
            "trainer.max_steps is -1 and there is no trainer.max_time: schedule and short_contexts need an end\n"
            "give --trainer.max_steps N or --trainer.max_time 00:01:00:00 (days:hours:minutes:seconds)"
        )


def main(args: list[str] | None = None) -> None:
    """Run the command line; errors that a user can cause end in a line or two on standard error."""
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    warnings.showwarning = show_warning
    try:
        ChargptCLI(sys.argv[1:] if args is None else args)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except SystemExit as stop:  # Lightning's answer to a Ctrl-C that comes before the first step
        interrupted = isinstance(stop.__context__, KeyboardInterrupt)
        raise SystemExit(130 if interrupted else stop.code) from None
    except USER_ERRORS as error:
        fail(str(error) or type(error).__name__)
    except RuntimeError as error:
        if "Connection closed by peer" in str(error):  # gloo's, where another process has failed
            fail("another process of this run has stopped; its message says why")
        if "can't allocate memory" not in str(error):
            raise
        fail(f"out of memory{str(error).partition('allocate memory')[2]}")


def show_warning(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
    """In one line, and only what is ours: Lightning's hints do not fit a text without epochs."""
    if Path(__file__).parent in Path(filename).parents:
        say(f"warning: {message}")
