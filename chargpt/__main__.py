"""The command `chargpt`, and `python -m chargpt`."""

import signal


def main() -> None:
    """Run a command; Ctrl-C ends it with status 130, even while modules are being imported."""
    try:
        from chargpt.cli.main import main

        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt


if __name__ == "__main__":
    main()
