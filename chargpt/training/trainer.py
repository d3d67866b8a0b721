"""make_trainer: Lightning's Trainer with our defaults, checkpoints and callbacks."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, Timer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from chargpt.checkpoints import FOLDER, LOGS, new_run
from chargpt.model import UserError
from chargpt.training.checkpointing import AtomicCheckpointIO, RunCheckpoint
from chargpt.training.display import RunReport, StepProgressBar, Throughput

TRAINER_DEFAULTS: dict[str, Any] = dict(
    max_steps=5000,
    val_check_interval=250,
    accumulate_grad_batches=1,
    min_epochs=0,  # with min_steps it would be 1: an endless epoch could never stop early
    check_val_every_n_epoch=None,  # one endless epoch: everything is counted in steps
    num_sanity_val_steps=0,
    use_distributed_sampler=False,  # batches are already split between ranks, without padding
    enable_model_summary=False,  # `RunReport` prints more
)

COUNTS = ("max_steps", "val_check_interval", "accumulate_grad_batches")
LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches")
# These settings define a run and are stored in its checkpoints; callbacks and devices are not.
RUN_SETTINGS = [*COUNTS, *LIMITS, "max_epochs", "max_time", "overfit_batches"]
RUN_SETTINGS += ["gradient_clip_val", "precision", "log_every_n_steps"]


def make_trainer(
    *,
    callbacks: list[Callback] | Callback | None = None,
    logger: Logger | Iterable[Logger] | bool | None = None,
    plugins: Any = None,
    default_root_dir: str | Path | None = None,
    limit_train_batches: int | float | None = None,  # Lightning's Optional[Union] parses 1 as 1.0
    limit_val_batches: int | float | None = None,
    limit_test_batches: int | float | None = None,
    show_samples: bool = False,
    **settings: Any,
) -> Trainer:
    """A Trainer that saves, resumes and displays a run as `python -m chargpt fit` does.

    It takes the arguments of `lightning.Trainer`, but `val_check_interval` counts optimizer steps.

    Args:
        callbacks: Additional callbacks. A `RunCheckpoint` among them chooses the run folder.
        logger: Loggers; by default TensorBoard's, in the run folder.
        plugins: Lightning plugins, such as a cluster environment.
        default_root_dir: The parent folder of lightning_logs; by default the current one.
        limit_train_batches: Batches per epoch; each epoch continues where the last one ended.
        limit_val_batches: Batches to validate on: 1 is one batch, 0.5 half of them, 1.0 all.
        limit_test_batches: Batches to test on, in the same way.
        show_samples: Also print the text sample of each validation, in a terminal.
        settings: More arguments of `lightning.Trainer`.
    """
    limits = dict(zip(LIMITS, (limit_train_batches, limit_val_batches, limit_test_batches)))
    settings = TRAINER_DEFAULTS | settings | limits
    seconds = seconds_of(settings.get("max_time"))
    check_limits(settings | {"max_time": seconds})
    callbacks, plugins = as_list(callbacks), as_list(plugins)
    root = Path(default_root_dir or ".").absolute()
    run = run_checkpoint(callbacks, settings, root)
    if SLURMEnvironment.detect():
        root = root / LOGS  # Lightning would resume from any hpc_ckpt_N.ckpt in the root
        if not any(isinstance(plugin, SLURMEnvironment) for plugin in plugins):
            plugins.append(SLURMEnvironment(auto_requeue=False))  # RunCheckpoint handles signals
    if run:
        run.settings = {name: settings.get(name) for name in RUN_SETTINGS}
        run.settings["max_time"] = None if seconds is None else round(seconds)
    if run and run.folder:
        run.acquire_lock()  # before loggers write to the folder
        root = run.folder
        keep_names_apart(callbacks, root / FOLDER)
        if logger in (None, True):
            logger = TensorBoardLogger(root.parent, "", root.name, default_hp_metric=False)
    if not settings.get("barebones"):
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if settings.get("enable_progress_bar") is not False and not has_bar:
            callbacks.append(StepProgressBar())
        callbacks += [RunReport(run, show_samples), Throughput()]
    if limit_train_batches is not None:  # a new loader starts at the next step
        settings["reload_dataloaders_every_n_epochs"] = 1
    settings["val_check_interval"] *= settings["accumulate_grad_batches"]  # now in batches
    plugins.append(AtomicCheckpointIO())
    settings |= dict(callbacks=callbacks, logger=logger, plugins=plugins, default_root_dir=root)
    try:
        return Trainer(**settings)
    except BaseException:
        if run:
            run.release()
        raise


def run_checkpoint(
    callbacks: list[Callback], settings: dict[str, Any], root: Path
) -> RunCheckpoint | None:
    """The RunCheckpoint among the callbacks, or else a new one; none if nothing is to be saved."""
    run = next((c for c in callbacks if isinstance(c, RunCheckpoint)), None)
    discards = settings.get("enable_checkpointing") is False or settings.get("fast_dev_run")
    if discards or settings.get("barebones"):
        callbacks[:] = [callback for callback in callbacks if callback is not run]
        return None
    if run is None:  # the other ranks get the folder from rank 0
        run = RunCheckpoint(new_run(root) if rank_zero_only.rank == 0 else None)  # type: ignore[attr-defined]
        callbacks.append(run)
    return run


def keep_names_apart(callbacks: list[Callback], folder: Path) -> None:
    """ModelCheckpoints without a `dirpath` write beside ours, or in own/ if names would clash."""
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            same_names = callback.save_last or str(callback.filename).lower() in ("last", "best")
            callback.dirpath = str(folder / "own" if same_names else folder)


def as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def seconds_of(max_time: Any) -> float | None:
    """A time limit in seconds, from None, a timedelta, its arguments, or a string DD:HH:MM:SS."""
    try:
        return Timer(max_time).time_remaining()
    except (TypeError, AttributeError, OverflowError, MisconfigurationException) as error:
        raise UserError(
            f"trainer.max_time {max_time} is not a duration\n"
            "write DD:HH:MM:SS, or a mapping such as {minutes: 20, seconds: 30}"
        ) from error


def check_limits(settings: dict[str, Any]) -> None:
    """Refuse limits that leave nothing to do, and settings that are not supported."""
    if type(settings["val_check_interval"]) is not int:
        raise UserError("trainer.val_check_interval must be a whole number of steps")
    others = ("max_epochs", "max_time", "limit_train_batches", "check_val_every_n_epoch")
    for name in (*COUNTS, *others):
        value, unlimited = settings.get(name), name in ("max_steps", "max_epochs")
        if value is not None and value <= 0 and not (unlimited and value == -1):
            raise UserError(f"trainer.{name} is {value}; it must be positive")
    n, accumulate = settings["limit_train_batches"], settings["accumulate_grad_batches"]
    if type(n) is int and n % accumulate:  # a partial step could not be resumed
        raise UserError(f"limit_train_batches {n} is not a multiple of accumulate_grad_batches")
    if "spawn" in str(settings.get("strategy")):
        raise UserError("strategy ddp_spawn is not supported; use ddp, which also starts processes")
    if 0 < settings["max_steps"] < (settings.get("min_steps") or 0):
        raise UserError("trainer.min_steps is greater than trainer.max_steps")
