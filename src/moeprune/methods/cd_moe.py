"""cd-moe: some layers do without a router; their shared experts and a few routed ones run for every token.

CD-MoE (arXiv 2412.00069). Each routed expert is multiplied by its mean gate weight over the tokens that it received.
Which experts a layer keeps, and which layers are condensed, is searched for greedily (`moeprune.condensing`). Where a
token decides how much the shared experts count, the mean over the trial's tokens stands for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import Field

from moeprune.condensing.condensed import Condensed
from moeprune.condensing.layer_search import nearest_layers
from moeprune.condensing.partial_runs import PartialRuns
from moeprune.condensing.sampling import Layer, condensable, run_once
from moeprune.errors import InputError
from moeprune.methods.base import Decision, Evidence, Method, Options, count_of, keep
from moeprune.plan import LayerPlan
from moeprune.progress import note, progress
from moeprune.statistics import LayerStats

_VISIBLE = 0.005  # an error worth a sentence


class CdMoeOptions(Options):
    variant: Literal["SR", "S"] = Field(
        "SR", description="what a condensed layer keeps: its shared and some routed experts, or the shared alone (S)"
    )
    routed: int = Field(6, ge=1, description="routed experts that it keeps at most, with variant SR")
    tokens: int = Field(1024, ge=1, description="tokens of the text that experts are compared on at most")


def decide(evidence: Evidence, ratio: float, options: CdMoeOptions) -> Decision:
    """Raises InputError where fewer layers can be condensed than the ratio asks for."""
    assert evidence.trial is not None
    model, batches = evidence.trial.model, evidence.trial.ids_BS.split(1)
    layers = evidence.stats.layers
    gate = {name: mean_gate(layer) for name, layer in layers.items()}
    chosen: dict[str, Condensed] = {}
    if count := count_of(ratio, len(layers)):
        runs = PartialRuns(model, batches)
        originals, samples = run_once(runs, batches, options.tokens)
        runs.try_to_begin_late(0, originals[0])
        candidates = _candidates(condensable(model, samples), options, ratio, count, len(layers))
        condensed = {}
        with progress("experts of layers") as on_layer:
            for name, layer in candidates.items():
                condensed[name] = layer.condense(model, gate[name], _routed(options))
                on_layer(len(condensed), len(candidates))
        with progress("condensed layers") as on_layer:
            nearest = nearest_layers(runs, originals, condensed, count, on_layer)
        chosen = {name: condensed[name] for name in nearest}
        _tell_of_gates(candidates[name] for name in nearest)
    return Decision({name: _plan(layer, chosen.get(name)) for name, layer in layers.items()})


def foresee(layers: Mapping[str, LayerStats], ratio: float, options: CdMoeOptions) -> Decision:
    """Which layers are condensed does not matter to the size, so the last are."""
    whole = len(layers) - count_of(ratio, len(layers))
    planned = {}
    for place, (name, layer) in enumerate(layers.items()):
        if place < whole:
            planned[name] = keep(list(range(layer.experts)), layer)
        else:
            weights = dict.fromkeys(range(min(_routed(options), layer.experts)), 1.0)
            planned[name] = _condensed(layer, weights)
    return Decision(planned)


def _routed(options: CdMoeOptions) -> int:
    """Routed experts that a condensed layer keeps at most."""
    return options.routed if options.variant == "SR" else 0


def mean_gate(layer: LayerStats) -> list[float]:
    """Of each expert over the tokens that it received; 0 where it received none."""
    return (layer.sum("gate") / layer.count("routed_tokens").clamp(min=1)).tolist()


def _candidates(
    layers: Mapping[str, Layer], options: CdMoeOptions, ratio: float, count: int, of: int
) -> Mapping[str, Layer]:
    with_shared = {name: layer for name, layer in layers.items() if layer.block.shared}
    if options.variant == "S":
        if not with_shared:
            raise InputError("this model has no shared experts, and variant S keeps no others; take `--set variant=SR`")
        layers = with_shared
    elif not with_shared:
        note(f"this model has no shared experts: {options.routed} routed ones are all that a condensed layer has")
    if count > len(layers):
        raise InputError(
            f"{ratio:g} of {of} layers are {count}, but {len(layers)} can be condensed; the largest ratio for this "
            f"model is {len(layers) / of:.4g}"
        )
    return layers


def _tell_of_gates(layers: Iterable[Layer]) -> None:
    errors = [layer.shared_error for layer in layers]
    if max(errors) > _VISIBLE:
        note(
            "tokens decide how much this model's shared experts count; in condensed layers the mean stands for that, "
            f"which is {sum(errors) / len(errors):.1%} off, of what they put out (at most {max(errors):.1%} in a layer)"
        )


def _plan(layer: LayerStats, condensed: Condensed | None) -> LayerPlan:
    if condensed is None:
        return keep(list(range(layer.experts)), layer)
    return _condensed(layer, dict(condensed.weights), condensed.shared_scale)


def _condensed(layer: LayerStats, weights: dict[int, float], shared_scale: float = 1.0) -> LayerPlan:
    return LayerPlan(
        experts=layer.experts,
        top_k=layer.top_k,
        keep=sorted(weights),
        condensed=weights,
        shared_scale=shared_scale,
    )


METHOD = Method(
    name="cd-moe",
    summary="condense layers: shared and a few routed experts, without a router (CD-MoE); ratio: of the layers",
    decide=decide,
    options=CdMoeOptions,
    tries=True,
    removes="layers",
    statistics=frozenset({"gate", "routed_tokens"}),
    foresee=foresee,
)
