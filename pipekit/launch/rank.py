"""The program that `pipekit train` starts once for each rank: `python -m pipekit.launch.rank CONFIG [OVERRIDE ...]`."""

import sys

from pipekit.launch.train import rank_main

if __name__ == "__main__":
    rank_main(sys.argv[1:])
