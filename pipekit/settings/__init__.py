"""Typed sections of settings, read from YAML with the file and line of each key, and suggestions for misspelt keys."""
