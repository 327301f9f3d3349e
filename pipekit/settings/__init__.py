"""Typed sections of settings, read from YAML with file and line, and what was meant where a key is misspelt."""
