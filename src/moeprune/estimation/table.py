"""An estimate for people: a row for each step, and below it what a step's numbers are made of."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moeprune.errors import InputError
from moeprune.estimation.amounts import Basis
from moeprune.estimation.estimate import Estimate, Number, Step
from moeprune.estimation.units import in_bytes, in_time

_MARK = {Basis.COMPUTED: "", Basis.MEASURED: " m", Basis.ASSUMED: " a"}
ALL = "all"
LEGEND = "m: measured; a: assumed in part, or wholly; without a mark: computed from the model's config and headers."


def show(estimate: Estimate, explain: Sequence[str] = ()) -> list[RenderableType]:
    """All that a user is shown.

    Args:
        explain: steps whose numbers are taken apart, or `all`.

    Raises:
        InputError: there is no such step.
    """
    names = [step.name for step in estimate.steps]
    if unknown := sorted(set(explain) - {*names, ALL}):
        raise InputError(f"there is no step {unknown[0]}; there are {', '.join(names)}, or {ALL} for all of them")
    chosen = [step for step in estimate.steps if ALL in explain or step.name in explain]
    return [_models(estimate), overview(estimate), _notes(estimate), *map(details, chosen)]


def _models(estimate: Estimate) -> str:
    lines = [f"{estimate.model}, {estimate.method} {estimate.budget}; each pod: {estimate.machine}"]
    for name, model in (("original", estimate.original), ("pruned", estimate.pruned)):
        lines.append(
            f"{name:<9} {model.parameters / 1e9:,.3g} billion parameters, {model.active_parameters / 1e9:,.3g} of them "
            f"for each token; {model.experts:,} experts; {in_bytes(model.bytes_on_disk)} on disk"
        )
    return "\n".join(lines)


def _notes(estimate: Estimate) -> str:
    told = [
        f"In all {in_time(estimate.seconds)}, where all pods of a step run at once.",
        f"Computing: {estimate.speed}.",
        LEGEND,
        *(f"Note: {warning}." for warning in estimate.warnings),
    ]
    return "\n".join(told)


def overview(estimate: Estimate) -> Table:
    """One row per step."""
    gpus = any(step.gpus for step in estimate.steps)
    table = _table()
    table.add_column("step")
    for title in ("pods", *(("GPUs", "GPU memory") if gpus else ()), "memory", "disk", "time"):
        table.add_column(title, justify="right")
    for step in estimate.steps:
        on_gpus = (str(step.gpus or "-"), _bytes(step.gpu_memory)) if gpus else ()
        table.add_row(
            step.name,
            str(step.pods),
            *on_gpus,
            _bytes(step.memory),
            _bytes(step.disk),
            in_time(step.seconds.value) + _MARK[step.seconds.basis],
        )
    return table


def details(step: Step) -> Table:
    """What the numbers of one step are made of."""
    table = _table(f"{step.name}: where its numbers come from")
    for title, justify in (("", "left"), ("of", "left"), ("", "right"), ("basis", "left")):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    for name, number, shown in (
        ("GPU memory", step.gpu_memory, in_bytes),
        ("memory", step.memory, in_bytes),
        ("disk", step.disk, in_bytes),
        ("time", step.seconds, in_time),
    ):
        for part in number.parts:
            table.add_row(name, Text(part.what), shown(part.value), part.basis.value)
    return table


def _bytes(number: Number) -> str:
    return in_bytes(number.value) + _MARK[number.basis] if number.value else "-"


def _table(title: str = "") -> Table:
    return Table(
        title=Text(title, style="bold") if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
    )
