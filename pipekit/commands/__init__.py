"""The commands of `pipekit`: a file for each, found by its name.

A file `name.py` holds the function `command` with the options of `pipekit name`; its docstring is the help text. It may
hold `CONTEXT_SETTINGS`, how click reads the options. Every
help text imports all of these files, so that torch, pydantic and their like are imported inside functions. A file with
an underscore in its name is no command, but a part of one: `plan_tables.py`, `verify_session.py`.
"""
