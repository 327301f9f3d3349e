"""The program that `pipekit verify` starts once for each rank: `python -m pipekit.commands.verify_rank CONFIG TASK`."""

import sys

from pipekit.commands.verify import rank_main

if __name__ == "__main__":
    rank_main(sys.argv[1], sys.argv[2])
