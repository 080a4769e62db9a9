"""Steps as processes that begin with the libraries loaded.

A step's own work on a small model takes a second, and importing torch and transformers several; a run has a dozen
steps. So they are forked from one process that has imported these, and done nothing with them. That is Linux's alone:
elsewhere the system's own libraries may not bear a fork, and each step begins anew.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

from .processes import Started

_LOADED = [
    "kfp.dsl.executor_main",
    "moeprune.steps.calibrate",
    "moeprune.steps.cluster",
    "moeprune.steps.distill",
    "moeprune.steps.evaluate",
    "moeprune.steps.promote",
    "mlflow",
]
_SOURCE_IS_BEFORE = "--executor_input"
_CAN_FORK = sys.platform == "linux"


def start_step(command: Sequence[str], environment: dict[str, str], out: int) -> Started:
    """Start a step.

    Args:
        command: as `kfp.local` would run it: a shell that writes the component's source text to a file, that text, and
            the arguments of kfp's executor. Where it is forked, the shell is left out.
        environment: of the step.
        out: file that its output goes to, standard error included.
    """
    if _CAN_FORK:
        return _ForkedStep(command, environment, out)
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
    )


class _ForkedStep:
    def __init__(self, command: Sequence[str], environment: dict[str, str], out: int) -> None:
        load()
        place = command.index(_SOURCE_IS_BEFORE)
        source, arguments = command[place - 1], list(command[place:])
        forking = multiprocessing.get_context("forkserver")
        heard, says = forking.Pipe(duplex=False)
        with Connection(os.dup(out), readable=False) as lent, says:
            self._process = forking.Process(target=_carry_out, args=(source, arguments, environment, lent, says))
            with _no_main_module():
                self._process.start()
        with heard, suppress(EOFError):  # until it leads its group, or has ended: it can be told to stop then
            heard.recv()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def wait(self) -> int:
        """Until it ends; its exit code, or less the number of the signal that ended it."""
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


def load() -> None:
    """Begin to import what steps need, in the process that they are forked from, where that is not done yet."""
    if not _CAN_FORK:
        return
    forkserver.set_forkserver_preload(_LOADED)
    forkserver.ensure_running()


@contextmanager
def _no_main_module() -> Iterator[None]:
    """A new process runs the file that the program was started by once more, and is no place for that."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _carry_out(
    source: str, arguments: list[str], environment: dict[str, str], out: Connection, leads: Connection
) -> None:
    from kfp.dsl.executor_main import executor_main

    os.setsid()
    for standard in (sys.stdout, sys.stderr):
        os.dup2(out.fileno(), standard.fileno())
    out.close()
    with leads:
        leads.send(None)
    os.environ.clear()
    os.environ.update(environment, _KFP_RUNTIME="true")
    tempfile.tempdir = None  # may have been looked up for other processes
    component = Path(tempfile.mkdtemp()) / "ephemeral_component.py"
    component.write_text(source)
    sys.argv = ["executor_main", "--component_module_path", str(component), *arguments]
    executor_main()
