"""What the image holds of pyproject.toml's dependencies, a line each: they are installed before the code is copied."""

import sys
import tomllib
from pathlib import Path

# All that a step may use. The servers (`local`) are not: on a cluster they are not in this image.
EXTRAS = ("tracking", "pipelines", "cluster", "lora")

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
chosen = [*project["dependencies"], *(each for extra in EXTRAS for each in project["optional-dependencies"][extra])]
sys.stdout.write("\n".join(chosen) + "\n")
