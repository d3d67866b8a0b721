"""The command line: LightningCLI, with settings restored from checkpoints and errors in one line."""

import difflib
import inspect
import logging
import os
import re
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from lightning import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from chargpt import runs
from chargpt.callbacks import FinalScore, ProgressBar, Summary, TextSamples, Throughput
from chargpt.checkpointing import AtomicCheckpointIO, LastCheckpoint, best_checkpoint_callback
from chargpt.data import CharDataModule
from chargpt.module import GPTModule, TrainingError
from chargpt.predict import Generate, predict

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
    TrainingError,
    MisconfigurationException,
    torch.OutOfMemoryError,
)


class Parser(LightningArgumentParser):
    """Says in a line or two what is wrong, with the nearest valid name, instead of the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        fail(" ".join(message.split()) + self.suggestion(message), status=2)

    def suggestion(self, message: str) -> str:
        known = [o.lstrip("-") for action in self._actions for o in action.option_strings]
        known += [action.dest for action in self._actions]
        for wrong in re.findall(r"--([\w.]+)|[\"']([\w.]+)[\"']", message):
            if near := difflib.get_close_matches("".join(wrong), set(known) - {"".join(wrong)}, n=1):
                return f"\ndid you mean {near[0]}?"
        return ""


def fail(message: str, status: int = 1) -> NoReturn:
    lines = [line for line in message.strip().splitlines() if line.strip()][:2]
    print("error: " + "\n".join(lines), file=sys.stderr)
    raise SystemExit(status)


class RunLogger(TensorBoardLogger):
    """A TensorBoard logger that takes its version_N for itself, should two runs start together."""

    @rank_zero_only
    def _get_next_version(self) -> int:
        version = super()._get_next_version()
        while True:
            try:
                os.makedirs(Path(self.root_dir, f"version_{version}"))
                return version
            except FileExistsError:
                version += 1


class ChargptCLI(LightningCLI):
    """fit, validate, test and predict."""

    def __init__(self, args: ArgsType = None) -> None:
        super().__init__(
            GPTModule,
            CharDataModule,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=1337,
            parser_class=Parser,
            parser_kwargs={"prog": "python -m chargpt", "description": "A character-level GPT."},
            save_config_kwargs={"overwrite": True},  # going on stays in the same folder
            args=args,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # hyperparameters stay plain values
        )

    # ---- what can be typed ----

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=self.seed_everything_default,
            help="Seed of the weights, of the blocks that are read and of dropout.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.block_size", "model.block_size")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.seed")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults({"weights_only": True})  # no code from a checkpoint is run
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # we print the scores ourselves, in full
        if subcommand == "predict":
            parser.add_class_arguments(Generate, "generate", instantiate=True)
        return parser

    # ---- typed flags over the checkpoint, the checkpoint over config files, those over defaults ----

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        args = sys.argv[1:] if args is None else list(args)
        super().parse_arguments(parser, args)
        subcommand = self.config.subcommand
        config = self.config[subcommand]
        self.checkpoint_path = self.find_checkpoint(subcommand, config)
        if self.checkpoint_path and subcommand != "predict":
            checkpoint = runs.read_checkpoint(self.checkpoint_path)
            configs, typed = split_configs(args[args.index(subcommand) + 1 :])
            if subcommand == "fit" and not configs:
                configs = self.config_of_run()
            configs.append(yaml.safe_dump(settings_of(checkpoint)))
            args = [subcommand, *(f"--config={c}" for c in configs), *typed]
            super().parse_arguments(parser, args)
            self.config[subcommand].ckpt_path = str(self.checkpoint_path)

    def find_checkpoint(self, subcommand: str, config: Any) -> Path | None:
        if subcommand == "fit" and config.ckpt_path is None:
            return None
        return runs.resolve_checkpoint(config.ckpt_path, config.trainer.default_root_dir or ".")

    def config_of_run(self) -> list[str]:
        config = self.checkpoint_path.absolute().parents[1] / "config.yaml"
        return [str(config)] if config.is_file() else []

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint win over typed flags; `parse_arguments` has done better."""

    # ---- what is made of it ----

    def instantiate_classes(self) -> None:
        if self.subcommand != "predict":  # which needs no data and no trainer
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand].trainer
        callbacks = []
        if config.enable_progress_bar is not False and not config.barebones:
            callbacks.append(ProgressBar())
        if self.subcommand == "fit":
            if config.logger in (None, True) and not config.fast_dev_run:
                kwargs["logger"] = self.run_logger(config.default_root_dir or ".")
            callbacks += [Summary(), Throughput(), TextSamples(), FinalScore()]
            if config.enable_checkpointing is not False and not config.fast_dev_run:
                best = best_checkpoint_callback()
                callbacks += [best, LastCheckpoint(best)]
        else:  # looks at a run and leaves nothing behind
            kwargs["logger"] = False
            self.save_config_callback = None
        plugins = config.plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        self.trainer_defaults["callbacks"] = callbacks
        return super().instantiate_trainer(**kwargs)

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
        if subcommand == "predict":
            options = self.config_init.predict.generate
            return predict(load(self.checkpoint_path), options, self.checkpoint_path)
        with redirect_stdout(sys.stderr):  # standard output is for results alone
            super()._run_subcommand(subcommand)
        if subcommand in ("validate", "test"):
            print_scores(self.trainer)


@rank_zero_only
def print_scores(trainer: Trainer) -> None:
    for name, value in trainer.callback_metrics.items():
        print(name, value.item())


def split_configs(args: list[str]) -> tuple[list[str], list[str]]:
    """Separate the values of --config from all other arguments, in their order."""
    configs, typed = [], []
    rest = iter(args)
    for arg in rest:
        if arg in ("-c", "--config"):
            configs.append(next(rest, ""))
        elif arg.startswith("--config="):
            configs.append(arg.removeprefix("--config="))
        else:
            typed.append(arg)
    return configs, typed


def settings_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says about the model, the data and the seed, as a configuration."""

    def known(key: str, owner: type, linked: set[str]) -> dict[str, Any]:
        names = set(inspect.signature(owner).parameters) - linked
        return {name: value for name, value in checkpoint[key].items() if name in names}

    return {
        "seed_everything": checkpoint["hyper_parameters"]["seed"],
        "data": known("datamodule_hyper_parameters", CharDataModule, {"seed"}),
        "model": known("hyper_parameters", GPTModule, {"seed", "block_size"}),
    }


def main(args: ArgsType = None) -> None:
    """Run the command line; errors that a user can cause end in a line or two on standard error."""
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    warnings.showwarning = show_warning
    try:
        ChargptCLI(args)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except SystemExit as stop:  # Lightning's answer to a Ctrl-C that comes before the first step
        interrupted = isinstance(stop.__context__, KeyboardInterrupt)
        raise SystemExit(130 if interrupted else stop.code) from None
    except USER_ERRORS as error:
        fail(str(error) or type(error).__name__)


def show_warning(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
    """In one line, and only what is ours: Lightning's hints do not fit a text without epochs."""
    if "chargpt" in Path(filename).parts or category.__module__.startswith("chargpt"):
        print(f"warning: {message}", file=sys.stderr)
