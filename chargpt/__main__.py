"""The command `chargpt`, and `python -m chargpt`."""

import os
import signal


def main() -> None:
    """Run a command; Ctrl-C ends it with status 130, also while modules are still imported."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, exit_at_once)
    from chargpt.cli.main import main

    try:
        main()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt


def exit_at_once(*_: object) -> None:
    os._exit(130)


if __name__ == "__main__":
    main()
