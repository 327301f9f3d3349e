"""Import of Python scripts as modules, without the run that a script starts."""

from __future__ import annotations

import re
import sys
from contextvars import ContextVar
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from pipekit.errors import ConfigError

_being_read: ContextVar[bool] = ContextVar("_being_read", default=False)


class _RunReachedError(BaseException):
    """A script that is imported has come to the call that starts its run. No `except Exception` stops it."""


def read_script(path: Path, *, key: str) -> ModuleType:
    """Import a script from its file, up to the first call that would start a run.

    This is how a run's processes find the class that the script passed to `pipekit.train`. The script's folder becomes
    importable, as when Python runs the script. The script that Python is running is not run a second time.

    Args:
        path: file of the script.
        key: name of the setting with the path, for messages.

    Raises:
        ConfigError: if there is no such file.
    """
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"{key}: there is no script {path}; name the module of the class, or move the script back")
    main = sys.modules["__main__"]
    if main_script() == path:
        return main
    name = "script_" + re.sub(r"\W", "_", path.stem)
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ == str(path):
        return loaded
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = module_from_spec(spec)
    sys.modules[name] = module
    token = _being_read.set(True)
    try:
        spec.loader.exec_module(module)
    except _RunReachedError:
        pass
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        _being_read.reset(token)
    return module


def end_reading() -> None:
    """End the import of a script at this point, if one is being imported; call this before a run starts."""
    if _being_read.get():
        raise _RunReachedError


def main_script() -> Path | None:
    """File of the script that Python is running; None in a notebook, in a console, and under `python -c`."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return Path(file).resolve() if file is not None and Path(file).is_file() else None


def name_class(given: type, *, argument: str) -> str:
    """Name by which another process imports a class: `package.module:Class`, or `/path/of/script.py:Class`.

    Args:
        given: the class.
        argument: name of the argument that passed the class, for messages.

    Raises:
        ConfigError: if no other process can import it.

    Example:
        >>> name_class(ConfigError, argument="trial")
        'pipekit.errors:ConfigError'
    """
    where, name = f"{argument}={given.__qualname__}", given.__qualname__
    if "<locals>" in name:
        raise ConfigError(
            f"{where} is defined inside a function, where the processes of the run cannot import it; define it at the "
            "top level of a module or of the script"
        )
    script = main_script()
    if given.__module__ == "__main__":
        if script is None:
            raise ConfigError(
                f"{where} is defined in a notebook or a console, where the processes of the run cannot import it; "
                "write it to a file, in a notebook with %%writefile my_trial.py as the first line of its cell, and "
                f"pass it after from my_trial import {name}"
            )
        return f"{script}:{name}"
    file = getattr(sys.modules.get(given.__module__), "__file__", None)
    is_beside = file is not None and "." not in given.__module__ and Path(file).resolve().parent != Path.cwd()
    # The folder of the script that runs is on this process's path alone.
    if is_beside and script is not None and Path(str(file)).resolve().parent == script.parent:
        return f"{Path(str(file)).resolve()}:{name}"
    return f"{given.__module__}:{name}"
