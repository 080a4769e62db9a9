"""`python -m moeprune.pipelines.compile build/prune.yaml`: the pipeline as YAML, to upload in the Kubeflow UI."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kfp import compiler

from .prune import prune


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m moeprune.pipelines.compile", description=__doc__)
    parser.add_argument("out", type=Path, help="the YAML file to write; MOEPRUNE_IMAGE names another image to run in")
    out: Path = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(prune, str(out))
    sys.stdout.write(f"{out}: written\n")


if __name__ == "__main__":
    main()
