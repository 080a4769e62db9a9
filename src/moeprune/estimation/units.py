"""Bytes and seconds for people."""

from __future__ import annotations

_STEP = 1024
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def in_bytes(size: float) -> str:
    """Three digits in binary units: `1.25 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < _STEP:
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:,.0f} {unit}"
        size /= _STEP
    return f"{size:.3g} TiB"


def in_time(seconds: float) -> str:
    for unit, length in (("d", _DAY), ("h", _HOUR), ("min", _MINUTE)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}" if seconds >= 10 * length else f"{seconds / length:.1f} {unit}"
    return f"{max(1, seconds):.0f} s"
