"""`moeprune methods`: what there is to choose from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moeprune.cli.app import app, console
from moeprune.methods import BASELINES, DEFAULT, METHODS, statistics_for
from moeprune.methods.base import Method

_KINDS = {
    "experts": "Experts go. Ratio: of the routed experts",
    "weights": "Weights inside the experts become zero. Ratio: of these weights",
    "layers": "Layers lose their router. Ratio: of the layers with experts",
}


@app.command()
def methods() -> None:
    """List the methods, what they need and their options."""
    collected = set(statistics_for([DEFAULT, *BASELINES]))
    for kind, heading in _KINDS.items():
        console.print(Text(f"{heading}\n", style="bold underline"))
        for method in METHODS.values():
            if method.removes == kind:
                console.print(_described(method, collected), soft_wrap=False)
    for wrong in METHODS.unusable.values():
        console.print(Text(wrong), soft_wrap=False)


def _described(method: Method, collected: set[str]) -> Padding:
    facts = Table.grid(padding=(0, 1))
    facts.add_column(no_wrap=True, min_width=12)
    facts.add_column(overflow="fold")
    facts.add_row(Text(method.name, style="bold"), Text(method.summary + " (default)" * (method.name == DEFAULT)))
    facts.add_row("needs", Text("; ".join(_needs(method, collected))))
    for name, field in method.options.model_fields.items():
        facts.add_row("--set", Text(f"{name}={field.default}  {field.description}"))
    return Padding(facts, (0, 0, 1, 0))


def _needs(method: Method, collected: Iterable[str]) -> Iterator[str]:
    """In words; how to have it collected where calibration does not do so unasked."""
    lacking = method.statistics - set(collected)
    statistics = ", ".join(sorted(method.statistics)) or "no statistics"
    yield statistics + (f" (calibrate --for {method.name})" if lacking else "")
    if method.uses_clusters:
        yield "Clusters (made on the way where not given)"
    if method.tries:
        yield "the model and text (--model, --data)"
