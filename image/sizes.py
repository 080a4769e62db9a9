"""Weigh an image, and write into docs/image.md what it is made of: `make image-size`.

Fails where the image is larger than it may be, or where something large in it has no purpose written below.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "image.md"
LIMIT = {"cpu": 1850, "cu": 9000}  # megabytes, by how the name of PyTorch's variant begins
LARGE = 15  # megabytes from which on something is weighed by itself, and must have a purpose

# Patterns of distributions' names, and what they are there for, in one sentence.
PURPOSES = {
    "torch": "PyTorch: every forward pass, gradient and tensor of weights",
    "nvidia-.*|cuda-.*": "NVIDIA's libraries, which PyTorch calls on a GPU",
    "triton": "compiles kernels for the GPU; PyTorch's own operators are made with it",
    "transformers": "the modelling code of every family of models",
    "pyarrow": "Parquet, and the tables in which `datasets` keeps texts",
    "pandas": "`datasets` needs it",
    "scipy": "assignment problems (which neurons belong together), clustering",
    "scikit-learn": "clustering",
    "moeprune": "the library, its components and the embedded model",
    "numpy": "arrays, underneath nearly all else",
    "sympy": "PyTorch needs it when it is imported",
    "networkx": "PyTorch needs it when it is imported",
    "matplotlib": "the report's figures",
    "fonttools": "matplotlib needs it",
    "pillow": "matplotlib needs it",
    "kubernetes": "the API of the cluster, for the TrainJobs of distillation on several nodes",
    "botocore": "S3",
    "mlflow-skinny": "MLflow's client; its server is not in the image",
    "databricks-sdk": "MLflow's client needs it",
    "cryptography": "MLflow's client needs it, by way of `google-auth`",
}

# Runs inside, as the steps do. A file belongs to the distribution that lists it, or lists what it was compiled from.
WEIGH = """
import json, os
from importlib.util import cache_from_source
from importlib.metadata import distributions
def weigh(top):
    files = (os.path.join(folder, name) for folder, _, names in os.walk(top) for name in names)
    return {name: os.lstat(name).st_blocks * 512 for name in files}
left, weights = weigh("/opt/moeprune"), {}
for each in distributions():
    own = {os.path.abspath(each.locate_file(file)) for file in each.files or ()}
    own |= {cache_from_source(name) for name in own if name.endswith(".py")}
    weights[each.name] = sum(left.pop(name, 0) for name in own)
top = [entry.path for entry in os.scandir("/") if entry.name not in {"proc", "sys", "dev", "opt", "tmp"}]
system = sum(sum(weigh(name).values()) for name in top if not os.path.islink(name))
print(json.dumps({"packages": weights, "other": sum(left.values()), "system": system}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", required=True)
    parser.add_argument("--docker", default="docker")
    parser.add_argument("--write", action="store_true", help="the table into docs/image.md")
    arguments = parser.parse_args()
    torch = _docker(
        arguments.docker, "image", "inspect", "--format", '{{index .Config.Labels "moeprune.torch"}}', arguments.image
    ).strip()
    inside = ("run", "--rm", "--interactive", "--network", "none", "--read-only", arguments.image, "python3", "-")
    weighed = json.loads(_docker(arguments.docker, *inside, program=WEIGH))
    table, complaints = tell(weighed, LIMIT["cpu" if torch == "cpu" else "cu"])
    sys.stdout.write(table)
    if arguments.write:
        page = PAGE.read_text(encoding="utf-8")
        marked = re.compile(r"(<!-- sizes -->\n).*(<!-- /sizes -->)", flags=re.DOTALL)
        PAGE.write_text(marked.sub(lambda found: f"{found[1]}{table}{found[2]}", page), encoding="utf-8")
    if complaints:
        sys.exit("\n".join(complaints))


def tell(weighed: dict[str, Any], limit: int) -> tuple[str, list[str]]:
    """What an image is made of, as a table, and what is wrong with it.

    Args:
        weighed: bytes: of each distribution (packages), of what else is in their directory (other) and of the system.
        limit: megabytes that the image may have.
    """
    rows: dict[str, float] = {}
    complaints = []
    small: list[float] = []
    for name, size in weighed["packages"].items():
        purpose = next((each for pattern, each in PURPOSES.items() if re.fullmatch(pattern, _normal(name))), "")
        if size < LARGE * 1e6:
            small.append(size)
            continue
        if not purpose:
            complaints.append(f"{name} takes {size / 1e6:.0f} MB, and nothing says what for: see PURPOSES")
        row = f"| {name if not name.startswith(('nvidia', 'cuda')) else 'NVIDIA'} | {{:.0f}} | {purpose} |"
        rows[row] = rows.get(row, 0) + size
    rows[f"| {len(small)} more packages | {{:.0f}} | below {LARGE} MB each |"] = sum(small)
    rows["| the environment | {:.0f} | commands, and what no package lists |"] = weighed["other"]
    rows["| the system | {:.0f} | the base image: Debian and Python |"] = weighed["system"]
    total = sum(rows.values()) / 1e6
    if total > limit:
        complaints.append(f"the image has {total:.0f} MB, more than the {limit} that it may have")
    lines = [row.format(size / 1e6) for row, size in sorted(rows.items(), key=lambda item: -item[1])]
    head = ["| what | MB | what for |", "| --- | ---: | --- |"]
    return "\n".join([*head, *lines, f"| **all** | **{total:.0f}** | on disk |", ""]), complaints


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _docker(docker: str, *arguments: str, program: str = "") -> str:
    ran = subprocess.run([docker, *arguments], input=program, stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode:
        sys.exit(f"docker {arguments[0]} ended with code {ran.returncode}")
    return ran.stdout


if __name__ == "__main__":
    main()
