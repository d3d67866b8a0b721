"""Trainer: Lightning's, with limits that keep the type they are typed in."""

from typing import Any

from lightning import Trainer


class TypedTrainer(Trainer):
    """Lightning's Trainer, where `--trainer.limit_val_batches 1` is one batch and `1.0` all.

    Lightning declares a limit as Optional[Union[int, float]], which Python's cache of types takes
    for Optional[Union[float, int]] where some library has asked for that first, and then 1 is
    parsed as 1.0. What is declared with | is no matter of who came first.

    Args:
        limit_train_batches: Batches of an epoch to train on. The text is read without end, so an
            epoch goes on where the one before it has stopped.
        limit_val_batches: Batches to validate on: 1 is one, 0.5 half of them, 1.0 all.
        limit_test_batches: Batches to test on, in the same way.
    """

    def __init__(
        self,
        *,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        **settings: Any,
    ) -> None:
        if limit_train_batches is not None:  # a new loader begins at the step that comes next
            settings["reload_dataloaders_every_n_epochs"] = 1
        super().__init__(
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            **settings,
        )
