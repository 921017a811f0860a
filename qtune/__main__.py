"""`python -m qtune` is the `qtune` command."""

from qtune.cli import main

if __name__ == "__main__":
    main()
