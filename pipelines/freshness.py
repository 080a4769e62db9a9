"""Whether what an earlier local run made of the same arguments is still what a new one would make.

`kfp.local` compares the arguments only. What it remembers is therefore kept apart by all else that goes into
calibration.
"""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path

import moeprune
import moeprune.components
from moeprune import places
from moeprune.sources import parse_sources

_LIBRARIES = ("torch", "transformers", "datasets")


def state_of(model: str, data: str) -> str:
    """A short name for this code, and what lies at the addresses now. Raises as `places.version` does."""
    digest = hashlib.sha256()
    for root in sorted({Path(path) for package in (moeprune, moeprune.components) for path in package.__path__}):
        for source in sorted(root.rglob("*.py")):
            digest.update(source.relative_to(root).as_posix().encode() + source.read_bytes())
    facts = [platform.python_version(), *(f"{name} {metadata.version(name)}" for name in _LIBRARIES)]
    facts += [places.version(address) for address in (model, *(source.address for source in parse_sources(data)))]
    digest.update("\n".join(facts).encode())
    return digest.hexdigest()[:16]
