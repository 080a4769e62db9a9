"""What one Plan keeps and another does not, as text for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moeprune import layer_names
from moeprune.plan import LayerPlan, Plan
from moeprune.plan_views import wording

_SHOWN = 48  # characters of a list of experts; all of it where one layer is asked for


def diff(one: Plan, other: Plan, layer: str | None = None) -> RenderableType:
    """How two plans were made, how much of what they keep they share, and the layers that they decide differently.

    Args:
        layer: the full name of the one layer to show, its lists not shortened.
    """
    shared = [name for name in one.layers if name in other.layers]
    shown = [layer] if layer else [name for name in shared if _decision(one, name) != _decision(other, name)]
    lines = [*_how_they_were_made(one, other), *_how_much_they_share(one, other, shared)]
    parts: list[RenderableType] = [Text(line) for line in lines]
    if shown:
        parts += [Text(), _table(one, other, shown, most=None if layer else _SHOWN)]
    if not layer:
        parts += [Text(f"\n{len(shared) - len(shown)} of {len(shared)} layers are decided alike")]
    return Group(*parts)


def overlap(one: LayerPlan, other: LayerPlan) -> float:
    """The experts that both keep, as a fraction of those that either keeps."""
    either = {*one.keep, *other.keep}
    return len({*one.keep} & {*other.keep}) / len(either) if either else 1.0


def _decision(plan: Plan, name: str) -> dict[str, object]:
    return plan.layers[name].model_dump(exclude={"scores"})


def _how_they_were_made(one: Plan, other: Plan) -> Iterator[str]:
    for label, plan in (("A", one), ("B", other)):
        kept = sum(map(len, plan.keep.values()))
        yield f"{label}: {wording.how_it_was_made(plan)}; {kept:,} experts stay ({plan.removed:.1%} go)"
    model = "the same model" if one.model == other.model else "different models"
    yield f"made for {model} from {'the same' if one.data == other.data else 'different'} data"
    for what, word in (("sparse", wording.sparsity), ("recovered", wording.recovery)):
        if (in_one := word(one)) != (in_other := word(other)):
            yield f"{what} in A: {in_one or 'no'}; in B: {in_other or 'no'}"


def _how_much_they_share(one: Plan, other: Plan, shared: list[str]) -> Iterator[str]:
    for label, plan, missing in (("A", one, other), ("B", other, one)):
        if alone := [name for name in plan.layers if name not in missing.layers]:
            yield f"only {label} has {len(alone)} layers, {alone[0]} first"
    both = sum(len({*one.layers[name].keep} & {*other.layers[name].keep}) for name in shared)
    either = sum(len({*one.layers[name].keep} | {*other.layers[name].keep}) for name in shared)
    yield f"both keep {both:,} of the {either:,} experts that either keeps ({both / max(either, 1):.0%})"


def _table(one: Plan, other: Plan, shown: list[str], most: int | None) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("layer", "A", "B", "both", "overlap"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("only A keeps")
    table.add_column("only B keeps")
    otherwise = [_otherwise(one.layers[name], other.layers[name]) for name in shown]
    if any(otherwise):
        table.add_column("also")
    labels = dict(zip(one.layers, layer_names.labels(list(one.layers)), strict=True))
    for name, also in zip(shown, otherwise, strict=True):
        in_one, in_other = one.layers[name], other.layers[name]
        numbers = (len(in_one.keep), len(in_other.keep), len({*in_one.keep} & {*in_other.keep}))
        lists = (
            wording.shortened(wording.ranges(sorted({*mine.keep} - {*yours.keep})), most)
            for mine, yours in ((in_one, in_other), (in_other, in_one))
        )
        cells = [labels[name], *map(str, numbers), f"{overlap(in_one, in_other):.0%}", *lists]
        table.add_row(*map(Text, cells), *([Text(also)] if any(otherwise) else []))
    return table


def _otherwise(one: LayerPlan, other: LayerPlan) -> str:
    """The other parts of the decision that differ."""
    parts = {
        "merged": lambda layer: (layer.merged, layer.merged_router and bool(layer.merged)),
        "stands for": lambda layer: layer.stands_for,
        "constant": lambda layer: layer.constant,
        "condensed": lambda layer: (layer.condensed, layer.shared_scale),
    }
    return ", ".join(name for name, part in parts.items() if part(one) != part(other))
