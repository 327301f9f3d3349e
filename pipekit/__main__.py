"""`python -m pipekit` is the `pipekit` command."""

from pipekit.cli import main

if __name__ == "__main__":
    main()
