"""`torchrun ... -m moeprune.distillation.end_to_end DIRECTORY`: one of the processes of the job in that directory."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers.utils import logging

from moeprune.distillation.end_to_end.job import Job
from moeprune.distillation.end_to_end.processes import failure_file
from moeprune.distillation.end_to_end.telling import EventFile
from moeprune.distillation.end_to_end.training import train
from moeprune.errors import MoepruneError


def main() -> None:
    """Exit code 1 for an error that the user can mend: a sentence on standard error and in a file."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    directory = Path(sys.argv[1])
    try:
        train(Job.load(directory), EventFile.of(directory).write)
    except MoepruneError as error:
        failure_file(directory).write_text(str(error))
        sys.stderr.write(f"moeprune: {error}\n")
        sys.exit(1)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
