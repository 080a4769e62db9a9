"""bring: a model from elsewhere -> a directory that all steps of a run can read."""

from __future__ import annotations

from pathlib import Path

from moeprune import places, tracking


def bring(model: str, workspace: str) -> str:
    """Bring a model to a shared directory; returns where it is now. See `places.brought`."""
    with tracking.step("bring", {"model": model}):
        return places.brought(model, Path(workspace))
