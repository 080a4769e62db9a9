"""`python -m moeprune.pipelines.compile build`: the pipelines as YAML, to upload in the Kubeflow UI."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

from kfp import compiler

from moeprune.components.image import IMAGE
from moeprune.errors import InputError

from .closing import closed
from .prune import prune
from .sweep import sweep

PIPELINES = {
    "prune": (prune, "moeprune: prune a Mixture-of-Experts for a domain"),
    "sweep": (sweep, "moeprune: many methods and ratios, and their Pareto front"),
}
_IMAGE = re.compile(r"[\w.-]+(:\d+)?(/[\w.-]+)*(:[\w.-]+)?(@sha256:[0-9a-f]{64})?")


@cache
def compiled(pipeline: str, image: str = IMAGE) -> str:
    """One of PIPELINES as YAML; the same source gives the same bytes.

    Args:
        image: that every component runs in.

    Raises:
        InputError: the image's name is none.
    """
    if not _IMAGE.fullmatch(image):
        raise InputError(f"{image!r} is not the name of an image, such as registry.example/team/moeprune:1.0")
    with tempfile.TemporaryDirectory(prefix="moeprune-") as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = Path(scratch) / "pipeline.yaml"
        steps, display_name = PIPELINES[pipeline]
        compiler.Compiler().compile(closed(steps(), f"moeprune-{pipeline}", display_name), str(file))
        # A component has its image from when it was imported; in a compiled pipeline it stands by itself on a line.
        return file.read_text(encoding="utf-8").replace(f" image: {IMAGE}\n", f" image: {image}\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m moeprune.pipelines.compile", description=__doc__)
    parser.add_argument(
        "out", type=Path, help="directory to write the YAML files to; MOEPRUNE_IMAGE names another image to run in"
    )
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name in PIPELINES:
        file = out / f"{name}.yaml"
        file.write_text(compiled(name), encoding="utf-8")
        sys.stdout.write(f"{file}: written\n")


if __name__ == "__main__":
    main()
