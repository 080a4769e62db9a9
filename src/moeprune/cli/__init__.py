"""The command line: `moeprune STEP ...`, each step of the pipeline on its own; `moeprune run`, all of it."""

from __future__ import annotations

import os
import sys

from moeprune.errors import MoepruneError

_INTERRUPTED = 130


def main() -> None:
    """Run a command; an error that the user can mend is one sentence on standard error, not a traceback."""
    # torch's threads spin while they wait, which makes a step several times slower where it shares the cores. This is
    # read when torch is loaded, here and in the steps of a run.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        # Imported here since that takes seconds, in which Ctrl-C is to be answered, too.
        from moeprune.cli import (  # noqa: F401 (they add their commands)
            compare,
            distill,
            estimate,
            experts,
            methods,
            plan,
            run,
            services,
            submit,
        )
        from moeprune.cli.app import app

        app(standalone_mode=True)
    except MoepruneError as error:
        sys.stderr.write(f"moeprune: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        _say_interrupted()
        sys.exit(_INTERRUPTED)
    except SystemExit as end:
        if end.code == _INTERRUPTED:  # what typer makes of Ctrl-C
            _say_interrupted()
        raise


def _say_interrupted() -> None:
    sys.stderr.write("moeprune: interrupted; nothing was left half-written\n")
