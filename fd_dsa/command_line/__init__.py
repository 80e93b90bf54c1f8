"""Toolkit of all commands: parser, values of flags, results as tables and files, failures."""
