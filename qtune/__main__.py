"""The `qtune` command, also as `python -m qtune`: from the first moment on it can be stopped."""

from qtune.startup.interrupts import keep_nothing_yet


def main() -> None:
    """The command; see `qtune.cli.main`."""
    keep_nothing_yet()
    from qtune.cli import main as run  # a tenth of a second, in which Ctrl-C would be a traceback

    run()


if __name__ == "__main__":
    main()
