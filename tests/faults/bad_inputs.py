"""Bad input of every kind, as cases: a file for each kind."""

from __future__ import annotations

from faults import bad_commands, bad_data, bad_models, bad_settings

CASES = tuple(case for kind in (bad_settings, bad_data, bad_commands, bad_models) for case in kind.cases())
