"""How much of the model CD-MoE has to run: as its authors search, and as moeprune does, for the same choice.

    python benchmarks/condensing.py [MODEL ...] [--data DATA] [--blocks 32] [--block-tokens 256] [--tokens 1024]
        [--ratio 0.34] [--routed 6] [--proof-layers 1] [--proof-steps 2]

The authors run the whole model once for each candidate: for each layer, each expert picked and each one left, and for
each layer to condense, each one left. How many runs that takes is counted. That the choice is the same is shown where
the authors' way is run for real, on the same text: the expert search on some layers, and the first steps of the layer
search. A run of ours from a layer on counts as the share of the layers that it runs; experts run on some tokens count
as their share of a whole pass's experts, so that nothing is free.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from measuring import publish
from transformers import PreTrainedModel

from moeprune import places
from moeprune.checkpoint.loading import Checkpoint
from moeprune.condensing.condensed import Condensed, answering
from moeprune.condensing.divergence import divergence
from moeprune.condensing.layer_search import nearest_layers
from moeprune.condensing.partial_runs import PartialRuns, Run
from moeprune.condensing.sampling import condensable, run_once
from moeprune.methods.base import count_of
from moeprune.methods.cd_moe import mean_gate
from moeprune.statistics.calibration import calibrate
from moeprune.statistics.passes import InMemoryPass
from moeprune.steps.machine import quieten
from moeprune.texts import read_blocks

Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[places.REFERENCE_MODEL], metavar="MODEL")
    parser.add_argument("--data", default="builtin://code")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--block-tokens", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1024, help="of the text, that experts are compared on")
    parser.add_argument("--ratio", type=float, default=0.34)
    parser.add_argument("--routed", type=int, default=6)
    parser.add_argument("--proof-layers", type=int, default=1, help="layers whose experts are searched for real")
    parser.add_argument("--proof-steps", type=int, default=2, help="layers chosen as the authors do")
    arguments = parser.parse_args()
    quieten()
    compared = [on_model(model, arguments) for model in arguments.models]
    publish(
        "condensing",
        "What CD-MoE's searches run of the model",
        [row for rows, _ in compared for row in rows],
        [raw for _, raw in compared],
        f"{arguments.blocks * arguments.block_tokens:,} tokens. The experts of {arguments.proof_layers} layer(s) and "
        f"the first {arguments.proof_steps} layers to condense are searched for the authors' way for real, one run of "
        "the whole model on all of the text for each candidate, and the choices compared.",
    )


def on_model(address: str, arguments: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    with places.local_model(address) as directory:
        checkpoint = Checkpoint(directory)
        ids_BS = read_blocks(
            arguments.data,
            checkpoint.tokenizer(),
            block_tokens=arguments.block_tokens,
            max_blocks=arguments.blocks,
        ).ids_BS
        return compare(address.rpartition("/")[2], checkpoint.load(), ids_BS, arguments)


def compare(
    name_of_model: str, model: PreTrainedModel, ids_BS: torch.Tensor, arguments: argparse.Namespace
) -> tuple[list[Row], dict[str, Any]]:
    stats = calibrate(InMemoryPass(model), "", ids_BS, statistics=["gate", "routed_tokens"])
    gate = {name: mean_gate(layer) for name, layer in stats.layers.items()}
    started = time.perf_counter()
    runs = PartialRuns(model, ids_BS.split(1))
    condensed, whole, experts = search_experts(runs, ids_BS, gate, arguments.routed, arguments.tokens)
    count = count_of(arguments.ratio, len(gate))
    originals, before = whole, runs.passes
    chosen = nearest_layers(runs, originals, condensed, count)
    seconds = time.perf_counter() - started
    layer_passes = runs.passes - before

    one_pass = time.perf_counter()
    final_hidden(model, ids_BS, [])
    one_pass = time.perf_counter() - one_pass
    proof = list(gate)[: arguments.proof_layers]
    theirs = {name: authors_experts(model, ids_BS, condensed[name], gate[name], arguments.routed) for name in proof}
    same_experts = alike([(list(condensed[name].weights), theirs[name]) for name in proof])
    steps = min(count, arguments.proof_steps)
    same_layers = alike([(chosen[:steps], authors_layers(model, ids_BS, condensed, steps))])

    used = [sum(weight > 0 for weight in gate_E) for gate_E in gate.values()]
    picks = [sum(range(used_E - min(arguments.routed, used_E) + 1, used_E + 1)) for used_E in used]
    of_layers = sum(range(len(gate) - count + 1, len(gate) + 1))
    rows = [
        {
            "model": name_of_model,
            "search": "experts of all layers",
            "the authors, passes": f"{sum(picks):,}",
            "moeprune, passes": f"{before + experts:.1f}",
            "fewer by": f"{sum(picks) / (before + experts):,.0f} times",
            "same choice": same_experts,
        },
        {
            "model": name_of_model,
            "search": f"{count} of {len(gate)} layers",
            "the authors, passes": f"{of_layers:,}",
            "moeprune, passes": f"{layer_passes:.1f}",
            "fewer by": f"{of_layers / layer_passes:,.1f} times",
            "same choice": same_layers,
        },
        {
            "model": name_of_model,
            "search": "both",
            "the authors, passes": f"{sum(picks) + of_layers:,}",
            "moeprune, passes": f"{before + experts + layer_passes:.1f}",
            "fewer by": f"{(sum(picks) + of_layers) / (before + experts + layer_passes):,.0f} times",
            "same choice": "",
        },
    ]
    return rows, {
        "model": name_of_model,
        "authors_passes": {"experts": picks, "layers": of_layers},
        "passes": {"once": before, "experts": experts, "layers": layer_passes},
        "seconds": seconds,
        "one_pass_seconds": one_pass,
        "chosen": chosen,
        "experts": {name: list(layer.weights) for name, layer in condensed.items()},
    }


def search_experts(
    runs: PartialRuns, ids_BS: torch.Tensor, gate: Mapping[str, Sequence[float]], routed: int, tokens: int
) -> tuple[dict[str, Condensed], list[Run], float]:
    """Each layer condensed, the original runs, and what running experts on some tokens comes to, in passes."""
    originals, samples = run_once(runs, ids_BS.split(1), tokens)
    layers = condensable(runs.model, samples)
    run = 0

    def count(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal run
        run += args[1].numel()  # a row of chosen experts for each token

    with ExitStack() as stack:
        for name in layers:
            stack.callback(runs.model.get_submodule(name).register_forward_pre_hook(count).remove)
        condensed = {name: layer.condense(runs.model, gate[name], routed) for name, layer in layers.items()}
    top_k = runs.model.config.get_text_config().num_experts_per_tok
    return condensed, originals, run / (top_k * len(gate) * ids_BS.numel())


@torch.inference_mode()
def final_hidden(
    model: PreTrainedModel, ids_BS: torch.Tensor, layers: Sequence[Condensed], of: str = ""
) -> torch.Tensor:
    """By one run of the whole model with these layers condensed: what it ends with, or what the block `of` gives."""
    seen: list[torch.Tensor] = []
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(answering(model.get_submodule(layer.block.name), layer.forward_in(model)))
        if of:
            hook = model.get_submodule(of).register_forward_hook(lambda _, __, out: seen.append(out))
            stack.callback(hook.remove)
        final_BSH = model.base_model(input_ids=ids_BS.to(model.device), use_cache=False).last_hidden_state
    out = seen[0] if of else final_BSH
    return out.reshape(-1, out.shape[-1])


def authors_experts(
    model: PreTrainedModel, ids_BS: torch.Tensor, layer: Condensed, gate_E: Sequence[float], count: int
) -> list[int]:
    block = layer.block
    original_TH = final_hidden(model, ids_BS, [], block.name)
    chosen: list[int] = []
    while len(chosen) < count:
        distance = {}
        for expert, weight in enumerate(gate_E):
            if weight and expert not in chosen:
                candidate = Condensed(block, {one: gate_E[one] for one in [*chosen, expert]}, layer.shared_scale)
                out_TH = final_hidden(model, ids_BS, [candidate], block.name)
                distance[expert] = divergence(original_TH, out_TH).double().mean().item()
        chosen.append(min(distance, key=distance.__getitem__))
    return chosen


def authors_layers(
    model: PreTrainedModel, ids_BS: torch.Tensor, condensed: Mapping[str, Condensed], count: int
) -> list[str]:
    original_TH = final_hidden(model, ids_BS, [])
    chosen: list[str] = []
    while len(chosen) < count:
        distance = {}
        for name in condensed:
            if name not in chosen:
                out_TH = final_hidden(model, ids_BS, [condensed[one] for one in [*chosen, name]])
                distance[name] = divergence(original_TH, out_TH).double().mean().item()
        chosen.append(min(distance, key=distance.__getitem__))
    return chosen


def alike(choices: Sequence[tuple[Sequence[object], Sequence[object]]]) -> str:
    """Of pairs of choices, how many of theirs are ours as well, in whatever order they were chosen."""
    same = sum(len(set(ours) & set(theirs)) for ours, theirs in choices)
    of = sum(len(theirs) for _, theirs in choices)
    return "yes" if same == of else f"{same} of {of}"


if __name__ == "__main__":
    main()
