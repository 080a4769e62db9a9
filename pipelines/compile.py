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
from .workspace import ACCESS_MODES, Workspace

PIPELINES = {
    "prune": (prune, "moeprune: prune a Mixture-of-Experts for a domain"),
    "sweep": (sweep, "moeprune: many methods and ratios, and their Pareto front"),
}
_IMAGE = re.compile(r"[\w.-]+(:\d+)?(/[\w.-]+)*(:[\w.-]+)?(@sha256:[0-9a-f]{64})?")


@cache
def compiled(pipeline: str, image: str = IMAGE, workspace: Workspace | None = None) -> str:
    """One of PIPELINES as YAML; the same source gives the same bytes.

    Args:
        image: that every component runs in.
        workspace: a volume that the tasks of a run share.

    Raises:
        InputError: the image's name is none.
    """
    if not _IMAGE.fullmatch(image):
        raise InputError(f"{image!r} is not the name of an image, such as registry.example/team/moeprune:1.0")
    with tempfile.TemporaryDirectory(prefix="moeprune-") as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = Path(scratch) / "pipeline.yaml"
        steps, display_name = PIPELINES[pipeline]
        whole = closed(steps(), f"moeprune-{pipeline}", display_name, workspace)
        compiler.Compiler().compile(whole, str(file))
        # A component has its image from when it was imported; in a compiled pipeline it stands by itself on a line.
        return file.read_text(encoding="utf-8").replace(f" image: {IMAGE}\n", f" image: {image}\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m moeprune.pipelines.compile", description=__doc__)
    parser.add_argument(
        "out", type=Path, help="directory to write the YAML files to; MOEPRUNE_IMAGE names another image to run in"
    )
    parser.add_argument(
        "--workspace", default="", metavar="SIZE", help="of a volume that the tasks of a run share, such as 200Gi"
    )
    parser.add_argument("--workspace-class", default="", metavar="NAME", help="its storage class")
    parser.add_argument("--workspace-access", default="", metavar="MODE", help=" or ".join(ACCESS_MODES))
    options = parser.parse_args()
    try:
        workspace = Workspace.of(options.workspace, options.workspace_class, options.workspace_access)
    except InputError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    for name in PIPELINES:
        file: Path = options.out / f"{name}.yaml"
        file.write_text(compiled(name, workspace=workspace), encoding="utf-8")
        sys.stdout.write(f"{file}: written\n")


if __name__ == "__main__":
    main()
