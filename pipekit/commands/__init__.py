"""Commands of `pipekit`: one file per command, with the command's name.

A file `name.py` defines the function `command` with the options of `pipekit name`; its docstring is the help text.
`CONTEXT_SETTINGS`, if defined, sets how click reads the options. Every help text imports all of these files, so they
import torch, pydantic and other slow packages inside functions. A file with an underscore in its name is not a command
but a part of one, such as `plan_tables.py` or `verify_session.py`.
"""
