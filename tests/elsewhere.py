"""Checkpoints loaded and run in a process of its own, where moeprune cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

_SCRIPT = Path(__file__).parent / "without_moeprune.py"


def run_elsewhere(cases: list[dict[str, Any]], root: Path) -> dict[str, dict[str, Any]]:
    """What `without_moeprune.py` gives for these cases, by their names; `root` holds what it writes."""
    (root / "cases.json").write_text(json.dumps(cases))
    working = root / "elsewhere"
    working.mkdir()
    ended = subprocess.run(
        [sys.executable, "-I", _SCRIPT, root / "cases.json", root / "results.pt"],
        cwd=working,
        env={**os.environ, "HF_HOME": str(root / "cache")},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ended.returncode == 0, ended.stderr
    return torch.load(root / "results.pt", weights_only=True)
