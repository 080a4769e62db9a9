"""magnitude: zero the smallest weights inside experts, `|W[o, j]|`, in each output row. Needs no statistics."""

from __future__ import annotations

from moeprune.methods.sparse import sparse_method

METHOD = sparse_method("magnitude", "zero the smallest weights inside experts")
