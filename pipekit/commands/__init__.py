"""The commands of `pipekit`, one file each."""
