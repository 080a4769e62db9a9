"""The one image that every component runs in (see the Dockerfile)."""

from __future__ import annotations

import os

import moeprune

# Read when a pipeline is compiled: `MOEPRUNE_IMAGE=registry/moeprune:tag make compile`.
IMAGE = os.environ.get("MOEPRUNE_IMAGE") or f"moeprune:{moeprune.__version__}"
