"""One rank of `pipekit train`: `python -m pipekit.commands.rank CONFIG [OVERRIDE ...]`."""

import sys

from pipekit.commands.train import rank_main

if __name__ == "__main__":
    rank_main(sys.argv[1:])
