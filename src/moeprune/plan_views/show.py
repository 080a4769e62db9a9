"""A Plan as text for a terminal of 80 columns: a row per layer, or one layer in full."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import zip_longest

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moeprune import layer_names
from moeprune.plan import LayerPlan, Plan
from moeprune.plan_views import wording
from moeprune.plan_views.wording import Fate

WIDTH = 80  # columns, of a terminal that nobody made wider
_MAP_WIDTH = 32  # of the picture of a layer's experts
_NARROW_MAP_WIDTH = 16  # where a column says what else becomes of them
_MARKS = {Fate.STAYS: "\N{FULL BLOCK}", Fate.MERGED: "+", Fate.CONSTANT: "o", Fate.GOES: "\N{MIDDLE DOT}"}
_SHADES = "\N{MIDDLE DOT}▁▂▃▄▅▆▇█"  # of a cell of several experts: none of them stays ... all of them do


def overview(plan: Plan) -> RenderableType:
    """What the whole plan does, and a row per layer."""
    return Group(*(Text(line) for line in _summary(plan)), Text(), _layers(plan), *_legend(plan))


def one_layer(plan: Plan, name: str) -> RenderableType:
    """Everything that the plan says of one layer, given by its full name."""
    layer = plan.layers[name]
    facts = Table.grid(padding=(0, 2))
    facts.add_column()
    facts.add_column(overflow="fold")
    for label, text in _facts(layer):
        facts.add_row(label, Text(text))
    parts: list[RenderableType] = [
        Text(f"{name}: {len(layer.keep)} of {layer.experts} experts stay, {layer.top_k} run for each token"),
        facts,
    ]
    if layer.scores is not None:
        parts += [Text(f"\nby score, the highest first ({plan.score or 'as the method says'})"), _ranking(layer)]
    return Group(*parts)


def _summary(plan: Plan) -> Iterator[str]:
    layers = plan.layers.values()
    kept, of = sum(len(layer.keep) for layer in layers), sum(layer.experts for layer in layers)
    counts = sorted(len(layer.keep) for layer in layers)
    each = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
    yield wording.how_it_was_made(plan)
    yield f"{kept:,} of {of:,} routed experts stay ({plan.removed:.1%} go), {each} in each of {len(counts)} layers"
    if merged := sum(len(layer.merged) for layer in layers):
        yield f"merged: of those that stay, {merged} become a mean of several"
    if constant := sum(len(layer.constant) for layer in layers):
        yield f"constant: of those that go, {constant} leave their mean output in their place"
    if plan.condensed:
        yield f"condensed: {len(plan.condensed)} of the layers lose their router; what they keep runs for every token"
    if zeros := wording.sparsity(plan):
        yield f"sparse: {zeros}"
    if fitted := wording.recovery(plan):
        yield f"recovered: {fitted}"
    yield f"made for the model {plan.model[:12]} from the data {plan.data[:12]}"


def _layers(plan: Plan) -> Table:
    others = [_otherwise(layer) for layer in plan.layers.values()]
    scored = any(layer.scores is not None for layer in plan.layers.values())
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("stay", justify="right", no_wrap=True)
    table.add_column("experts", no_wrap=True)
    if any(others):
        table.add_column("of which")
    for heading in ("lowest kept", "highest dropped", "margin") if scored else ():
        table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    width = _NARROW_MAP_WIDTH if any(others) else _MAP_WIDTH
    for label, layer, other in zip(layer_names.labels(list(plan.layers)), plan.layers.values(), others, strict=True):
        row = [Text(label), Text(f"{len(layer.keep)}/{layer.experts}"), Text(_map(layer, width))]
        row += [Text(other)] if any(others) else []
        table.add_row(*row, *_border_cells(layer))
    return table


def _border_cells(layer: LayerPlan) -> list[str]:
    closest = wording.border(layer)
    if closest is None or layer.scores is None:
        return []
    return [
        f"{expert} {wording.number(layer.scores[expert])}" for expert in (closest.lowest_kept, closest.highest_dropped)
    ] + [f"{closest.margin:+.1%}"]


def _otherwise(layer: LayerPlan) -> str:
    if layer.condensed is not None:
        return "condensed"
    counts = {
        "merged": len(layer.merged),
        "stand for others": len(layer.stands_for),
        "constant": len(layer.constant),
    }
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def _block(experts: int, width: int) -> int:
    """How many experts share a cell of the map: a power of two."""
    return 2 ** max(0, math.ceil(math.log2(experts / width)))


def _map(layer: LayerPlan, width: int) -> str:
    fates, block = wording.fates(layer), _block(layer.experts, width)
    if block == 1:
        return "".join(_MARKS[fate] for fate in fates)
    kept = [fate in (Fate.STAYS, Fate.MERGED) for fate in fates]
    shares = [sum(cell) / len(cell) for cell in (kept[place : place + block] for place in range(0, len(kept), block))]
    # Nothing but none looks like none, and nothing but all looks like all.
    return "".join(_SHADES[math.ceil(share * 7) + (share == 1)] for share in shares)


def _legend(plan: Plan) -> Iterator[Text]:
    width = _NARROW_MAP_WIDTH if any(map(_otherwise, plan.layers.values())) else _MAP_WIDTH
    largest = max(layer.experts for layer in plan.layers.values())
    yield Text()
    if _block(largest, width) > 1:
        yield Text(f"experts: a cell is {_block(largest, width)} of them; the fuller it is, the more stay, · none")
    else:
        used = {fate for layer in plan.layers.values() for fate in wording.fates(layer)}
        yield Text("experts: " + ", ".join(f"{mark} {fate}" for fate, mark in _MARKS.items() if fate in used))
    if plan.score:
        yield Text(f"scores, after the number of the expert: {plan.score}")
    yield Text("one layer in full: --layer N")


def _facts(layer: LayerPlan) -> Iterator[tuple[str, str]]:
    yield "keep", wording.ranges(layer.keep)
    yield "drop", wording.ranges(layer.drop)
    for expert, weights in layer.merged.items():
        mean = " + ".join(f"{weight:.3g} of {member}" for member, weight in weights.items())
        yield "merged", f"{expert} becomes {mean}" + (", its router row, too" if layer.merged_router else "")
    for expert, others in sorted(layer.stands_for.items()):
        yield "stands for", f"{expert} for {wording.ranges(sorted(others))}"
    if layer.constant:
        yield "constant", f"{wording.ranges(layer.constant)}, by their mean output"
    if layer.condensed is not None:
        factors = ", ".join(f"{expert} times {factor:.3g}" for expert, factor in sorted(layer.condensed.items()))
        yield "condensed", f"no router; for every token {factors or 'none but the shared experts'}"
        if layer.shared_scale != 1:
            yield "", f"and the shared experts times {layer.shared_scale:.3g}"
    if (closest := wording.border(layer)) and layer.scores is not None:
        low, high = (
            f"{expert} with {wording.number(layer.scores[expert])}"
            for expert in (closest.lowest_kept, closest.highest_dropped)
        )
        yield "closest", f"lowest kept {low}, highest dropped {high}: a margin of {closest.margin:+.1%}"


def _ranking(layer: LayerPlan) -> Table:
    """Experts by score, down one column after another."""
    assert layer.scores is not None
    fates = wording.fates(layer)
    order = sorted(range(layer.experts), key=layer.scores.__getitem__, reverse=True)
    entries = [f"{expert:>4} {wording.number(layer.scores[expert]):>8} {fates[expert]:<8}" for expert in order]
    columns = (WIDTH + 1) // (len(entries[0]) + 1)
    rows = math.ceil(len(entries) / columns)
    table = Table.grid(padding=(0, 1, 0, 0))
    for row in zip_longest(*(entries[start : start + rows] for start in range(0, len(entries), rows)), fillvalue=""):
        table.add_row(*map(Text, row))
    return table
