"""The results as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import mean

from measuring import Spread, table

from moeprune.methods import find
from quality_table.cells import Cell
from quality_table.results import Results, mean_accuracy, speed
from quality_table.rows import Row, amount
from quality_table.texts import MIXTURE

_NONE = "\N{EN DASH}"
_ZEROS = (
    "\n\nZeros are stored like other weights: they do not make the file smaller, nor, by themselves, the model faster."
)


def everything(results: Results, rows: Sequence[Row], domains: Sequence[str]) -> str:
    """All tables, each under its heading."""
    parts = [_original(results)]
    for removes in ("experts", "weights", "layers"):
        of_kind = [row for row in rows if find(row.method).removes == removes]
        if ratios := results.ratios(of_kind, MIXTURE):
            parts.append(_overview(results, of_kind, ratios, removes))
            parts += [_detail(results, of_kind, ratio) for ratio in ratios]
    parts += _alone(results, rows, domains)
    if results.refused:
        told = [
            f"- {row.label}, {amount(row, ratio)}, {on}: {why}" for (row, ratio, on), why in results.refused.items()
        ]
        parts.append("## What could not be done\n\n" + "\n".join(told))
    return "\n\n".join(parts)


def _original(results: Results) -> str:
    original = results.original
    lines = [
        {
            "": "the original",
            **{
                domain: f"{quality.loss_nats:.3f} nats, {quality.accuracy:.1%} of next tokens"
                for domain, quality in original.quality.items()
            },
            "parameters": f"{original.parameters / 1e6:,.1f} M",
            "MB": f"{original.bytes_on_disk / 1e6:,.1f}",
            "tokens per second": f"{original.tokens_per_second:,.0f}",
        }
    ]
    return table(lines)


def _overview(results: Results, rows: Sequence[Row], ratios: Sequence[float], removes: str) -> str:
    best = {ratio: _least(results, rows, ratio, MIXTURE) for ratio in ratios}
    lines = []
    for row in _best_first(results, rows, ratios):
        line = {"method": row.label}
        for ratio in ratios:
            spread = results.spread((row, ratio, MIXTURE), results.mean_increase)
            line[f"{100 * ratio:.3g} % of the {removes}"] = _told(spread, "+.3f", best[ratio])
        lines.append(line)
    return (
        f"## {removes.capitalize()} removed: how much the loss increases, mean over the domains, nats per token\n\n"
        + table(lines)
        + (_ZEROS if removes == "weights" else "")
    )


def _detail(results: Results, rows: Sequence[Row], ratio: float) -> str:
    rows = [row for row in _best_first(results, rows, [ratio]) if (row, ratio, MIXTURE) in results.cells]
    quality, cost = [], []
    for row in rows:
        place = (row, ratio, MIXTURE)

        def told(of: Callable[[Cell], float | None], form: str, place: tuple[Row, float, str] = place) -> str:
            return _told(results.spread(place, of), form)

        domains = results.cells[place][0].quality
        quality.append(
            {
                "method": row.label,
                **{domain: told(lambda cell, d=domain: results.increase(cell, d), "+.3f") for domain in domains},  # type: ignore[misc]
                "accuracy, mean": told(mean_accuracy, ".1%"),
                **{
                    f"accuracy, {domain}": told(lambda cell, d=domain: cell.quality[d].accuracy, ".1%")  # type: ignore[misc]
                    for domain in domains
                },
            }
        )
        cost.append(
            {
                "method": row.label,
                "experts removed": told(lambda cell: cell.removed, ".1%"),
                "parameters, M": told(lambda cell: cell.parameters / 1e6, ",.1f"),
                "MB": told(lambda cell: cell.bytes_on_disk / 1e6, ",.1f"),
                "of the original's": told(lambda cell: cell.bytes_on_disk / results.original.bytes_on_disk, ".1%"),
                "tokens per second": told(lambda cell: cell.tokens_per_second, ",.0f"),
                "times the original's": told(speed, ".2f"),
                "to decide, s": told(lambda cell: cell.decide_seconds, ".2f"),
                "to carry out, s": told(lambda cell: cell.carry_out_seconds, ".2f"),
            }
        )
    title = amount(rows[0], ratio)
    return (
        f"### {title}: loss above the original's, and accuracy\n\n{table(quality)}\n\n### {title}: size and time\n\n"
        + (table(cost))
    )


def _alone(results: Results, rows: Sequence[Row], domains: Sequence[str]) -> list[str]:
    parts = []
    for removes in ("experts", "weights", "layers"):
        of_kind = [row for row in rows if find(row.method).removes == removes]
        for ratio in sorted({ratio for domain in domains for ratio in results.ratios(of_kind, domain)}):
            best = {domain: _least(results, of_kind, ratio, domain) for domain in domains}
            lines = []
            for row in of_kind:
                spreads = {domain: results.spread((row, ratio, domain), results.mean_increase) for domain in domains}
                line = {domain: _told(spread, "+.3f", best[domain]) for domain, spread in spreads.items()}
                middle = [spread.median for spread in spreads.values() if spread]
                lines.append((mean(middle) if middle else math.inf, {"method": row.label, **line}))
            ordered = [line for _, line in sorted(lines, key=lambda each: each[0])]
            parts.append(
                f"## Each domain alone: calibrated on it, judged on it; {100 * ratio:.3g} % of the {removes}\n\n"
                + table(ordered)
            )
    return parts


def _best_first(results: Results, rows: Sequence[Row], ratios: Sequence[float]) -> list[Row]:
    def worth(row: Row) -> tuple[int, float]:
        spreads = [results.spread((row, ratio, MIXTURE), results.mean_increase) for ratio in ratios]
        known = [spread.median for spread in spreads if spread]
        return len(ratios) - len(known), sum(known)  # those with the most cells first

    return sorted(rows, key=worth)


def _least(results: Results, rows: Sequence[Row], ratio: float, on: str) -> float:
    spreads = [results.spread((row, ratio, on), results.mean_increase) for row in rows]
    return min((spread.median for spread in spreads if spread), default=math.inf)


def _told(spread: Spread | None, form: str, best: float = math.inf) -> str:
    """The median, the least and the most where they differ; bold where it is the best."""
    if spread is None:
        return _NONE
    middle = format(spread.median, form)
    if spread.median <= best < math.inf:
        middle = f"**{middle}**"
    least, most = format(spread.least, form), format(spread.most, form)
    return middle if least == most else f"{middle} ({least} to {most})"
