"""Which parameters of a pruned model learn, chosen by what they are.

    experts    the routed experts that stay
    router     what chooses among them
    shared     what else is in an MoE block: experts that every token takes, and their gates
    condensed  the dense layers that a plan made of MoE blocks (CD-MoE's lightweight fine-tuning trains these alone)
    all        every parameter of the model
    lora       low-rank additions to the weights, which stay as they are

The last two make sense of a whole model only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from moeprune.checkpoint.layout import Layout
from moeprune.errors import InputError
from moeprune.moe_blocks import block_of
from moeprune.plan import Plan

PARTS = ("experts", "router", "shared", "condensed", "all", "lora")
OF_A_LAYER = frozenset({"experts", "router", "shared", "condensed"})
OF_NO_LAYER = ""


def parse_parts(text: str) -> frozenset[str]:
    """`experts,router` as a set. Raises InputError for an unknown part, or none at all."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in PARTS:
            raise InputError(f"{text!r} names {part!r}, which is no part of a model; known: {', '.join(PARTS)}")
    return frozenset(parts)


def parse_parts_of_a_layer(text: str) -> frozenset[str]:
    """The same, where layers learn alone. Raises InputError for a part that makes sense of a whole model only, too."""
    parts = parse_parts(text)
    if whole := parts - OF_A_LAYER:
        raise InputError(
            f"`{min(whole)}` makes sense of a whole model only; distill end to end (`--how end-to-end`), or train some "
            f"of {', '.join(sorted(OF_A_LAYER))}"
        )
    return parts


def default_parts(plan: Plan) -> frozenset[str]:
    """What learns where nothing else is said."""
    return frozenset({"experts", "router"} | ({"condensed"} if plan.condensed else set()))


def trainable(parts: Collection[str], plan: Plan, layout: Layout, parameters: Collection[str]) -> dict[str, list[str]]:
    """The parameters that learn, in the order of the model.

    Args:
        parts: some of `PARTS`; `lora` adds parameters of its own, of which nothing is known here.
        plan: that made the student of the teacher.
        layout: of the teacher.
        parameters: names of the student's parameters; buffers, such as biases that only balance a router's choice, are
            not learnt.

    Returns:
        Name of the teacher's experts module -> names of the student's parameters there. With `all`, those outside of
        MoE blocks are under `OF_NO_LAYER`. Layers of which nothing learns are left out.

    Raises:
        InputError: the plan, or the model, has no such part.
    """
    found: dict[str, dict[str, list[str]]] = {name: _by_part(name, plan, layout, parameters) for name in layout.layers}
    for part in sorted(OF_A_LAYER & set(parts)):
        if not any(by_part[part] for by_part in found.values()):
            raise InputError(
                f"nothing of the pruned model is {_WHAT[part]}, so `{part}` cannot learn; name other parts"
            )
    chosen = OF_A_LAYER if "all" in parts else OF_A_LAYER & set(parts)
    learning = {
        name: _in_order(parameters, [one for part in chosen for one in by_part[part]])
        for name, by_part in found.items()
    }
    if "all" in parts:
        in_layers = {one for names in learning.values() for one in names}
        learning[OF_NO_LAYER] = [one for one in parameters if one not in in_layers]
    return {name: names for name, names in learning.items() if names}


_WHAT = {
    "experts": "a routed expert",
    "router": "a router",
    "shared": "a shared expert inside an MoE block",
    "condensed": "a layer that its plan condensed",
}


def _by_part(layer: str, plan: Plan, layout: Layout, parameters: Collection[str]) -> dict[str, list[str]]:
    inside = [name for name in parameters if name.startswith(block_of(layer) + ".")]
    by_part: dict[str, list[str]] = {part: [] for part in OF_A_LAYER}
    for name in inside:
        if plan.layers[layer].condensed is not None:
            by_part["condensed"].append(name)
        elif name.startswith(layer + "."):
            by_part["experts"].append(name)
        elif name in layout.layers[layer].parameters:
            by_part["router"].append(name)
        else:
            by_part["shared"].append(name)
    return by_part


def _in_order(parameters: Iterable[str], chosen: Collection[str]) -> list[str]:
    wanted = set(chosen)
    return [name for name in parameters if name in wanted]
