"""Reports of the same original on the same texts, as one: what they are about, side by side."""

from __future__ import annotations

from collections.abc import Mapping

from moeprune.errors import InputError
from moeprune.evaluation.report import Report


def side_by_side(reports: Mapping[str, Report]) -> Report:
    """The original, and of each Report the candidate that it is about, by the name that it is given here.

    Timings of different processes are comparable as far as their machines are; the original's are the first Report's.

    Raises:
        InputError: there is none, or they are not about the same original, texts and domain.
    """
    if not reports:
        raise InputError("there is no report to compare")
    first_name, first = next(iter(reports.items()))
    for name, report in reports.items():
        for what, of_first, of_this in (
            ("originals", _identity(first), _identity(report)),
            ("texts", [data.fingerprint for data in first.data], [data.fingerprint for data in report.data]),
            ("domains", first.domain, report.domain),
        ):
            if of_first != of_this:
                raise InputError(f"{first_name} and {name} cannot be compared: they are about different {what}")
        if report.headline is report.original:
            raise InputError(f"{name} has measured nothing but the original")
        if name == first.original.name:
            raise InputError(f"{name} is what the original is called; give the report another name")
    candidates = [report.headline.model_copy(update={"name": name}) for name, report in reports.items()]
    return first.model_copy(update={"candidates": [first.original, *candidates]})


def _identity(report: Report) -> tuple[object, ...]:
    original = report.original
    return original.parameters, original.bytes_on_disk, original.experts_per_layer


def table(report: Report) -> list[dict[str, object]]:
    """A row for each model, the smallest first: what it is, what it costs, and whether it is on the Pareto front."""
    front = {candidate.name for candidate in report.front}
    return [
        {
            "name": candidate.name,
            "method": candidate.method or "",
            "size_on_disk_mb": candidate.bytes_on_disk / 1e6,
            "size_on_disk_share": report.bytes_ratio(candidate),
            "parameters": candidate.parameters,
            "loss_nats": candidate.quality[report.domain].loss_nats,
            "loss_increase_nats": report.loss_increase(candidate),
            "throughput_share": report.speed_ratio(candidate),
            "on_the_front": candidate.name in front,
        }
        for candidate in sorted(report.candidates, key=lambda it: (it.bytes_on_disk, it.name))
    ]
