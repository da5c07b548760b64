"""`python -m cdc` is the console script `cdc`."""

from cdc.cli import main

if __name__ == "__main__":
    main()
