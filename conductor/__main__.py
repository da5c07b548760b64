"""``python -m conductor``: the same as the console script."""

from conductor.cli import main

if __name__ == "__main__":
    main()
