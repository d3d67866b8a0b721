"""The folder of a run that trains: chosen, locked, and removed where nothing came of it."""

import shutil
import warnings
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from chargpt.checkpoints import new_run


class RunFolder:
    """A folder `version_N` that belongs to this process while it trains.

    The lock is the operating system's, so that a process which is killed leaves none behind; the
    checkpoints that it left half-written are swept.

    Args:
        logs: the folder of all runs, where a new one is made.
        resumed: the folder of the run that is resumed, if there is one: one folder, one curve.

    Raises:
        ValueError: another process trains in that folder.
    """

    def __init__(self, logs: Path, resumed: Path | None) -> None:
        self.is_new = resumed is None
        self.path = resumed or new_run(logs)
        self.lock = FileLock(self.path / ".lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"another process is training in {self.path}\n"
                "wait until it has ended, or start a run of its own, without --ckpt_path"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{self.path} cannot be locked ({error.strerror}): train there with one process",
                stacklevel=2,
            )
        for half_written in self.path.glob("checkpoints/.*.tmp"):
            half_written.unlink(missing_ok=True)

    def release(self, nothing_came: bool = False) -> None:
        """Let others train here; a new folder in which nothing came of the run is removed."""
        self.lock.release()
        if nothing_came and self.is_new and not any(self.path.glob("checkpoints/*")):
            shutil.rmtree(self.path, ignore_errors=True)
            with suppress(OSError):  # the folder of all runs, unless it holds others
                self.path.parent.rmdir()
