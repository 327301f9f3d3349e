"""The names of other frameworks for what pipekit does."""
