"""The command line: `moeprune STEP ...`. Each command is one step of the pipeline on its own."""

from moeprune.cli.app import main

__all__ = ["main"]
