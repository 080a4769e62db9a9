"""`python -m moeprune.pipelines.launch_form docs/launch_form.md`: the form that starts a run, as a page."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .compile import PIPELINES, compiled
from .submission.package import Package, Parameter

# As the form calls Kubeflow's types.
_TYPES = {
    "STRING": "string",
    "NUMBER_INTEGER": "integer",
    "NUMBER_DOUBLE": "double",
    "BOOLEAN": "boolean",
    "LIST": "list",
    "STRUCT": "dict",
}
_HEAD = """# The launch form

What Kubeflow's UI asks for when a run is started, in its order (by name) and with its types: a `list` or `dict` is
typed as JSON. Every parameter has a default; a run starts from the form as it is. The same names are those of a
parameter file for `moeprune submit`. Kubeflow Pipelines 2.17 offers no choices from a list; what a text may be is said
in its description, and a value that makes no sense fails in the first step that sees it, or before anything is sent
where it is `moeprune submit` that starts the run.

Requests for CPUs, memory and GPUs are texts (`"4"`, `"16Gi"`), since Kubeflow resolves no others in a pod's resources.

`make launch-form` writes this page from the compiled pipelines.
"""


def page() -> str:
    """The form of every pipeline, as Markdown."""
    return "\n".join([_HEAD, *(_form(Package.parse(compiled(name))) for name in PIPELINES)])


def _form(package: Package) -> str:
    rows = [_row(parameter) for parameter in sorted(package.parameters.values(), key=lambda it: it.name)]
    head = [
        f"## {package.name}",
        "",
        package.description,
        "",
        "| parameter | type | default | |",
        "| --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *rows, ""])


def _row(parameter: Parameter) -> str:
    default = parameter.default if isinstance(parameter.default, str) else json.dumps(parameter.default)
    shown = f"`{default}`" if default else ""
    description = " ".join(parameter.description.split()).replace("|", "\\|")
    return f"| `{parameter.name}` | {_TYPES[parameter.type]} | {shown} | {description} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m moeprune.pipelines.launch_form", description=__doc__)
    parser.add_argument("out", type=Path, help="the Markdown file to write")
    out: Path = parser.parse_args().out
    out.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{out}: written\n")


if __name__ == "__main__":
    main()
