"""Typed sections of settings, read from YAML with file and line, and suggestions for misspelt keys."""
