"""moeprune beside `llmcompressor`'s `REAPPruningModifier`: same model, tokens and ratio, from checkpoint to checkpoint.

    python benchmarks/peers.py --peer-python build/peer/bin/python [--gib 2] [--blocks 16] [--repeats 3]

`make build/peer` makes the other's environment, which wants transformers 5.15 to 5.17. Time and memory: a model of
OLMoE's shape with random weights, computed in float32, half of the experts removed. Ours by the default method with
three commands, each a process with its own start; theirs in one process, which saves what it has in memory. Families: a
tiny checkpoint of each that our transformers dispatches through its experts interface, pruned by half and loaded again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import random_checkpoint
from measuring import Ran, Spread, pairs, publish, run

from moeprune.steps import machine

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import families  # (the tests' tiny models of all families)
import tiny

_MOEPRUNE = Path(sys.executable).parent / "moeprune"
_PEER = Path(__file__).parent / "peer_reap.py"
_BLOCK_TOKENS = 256
_LIMIT = "2GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, type=Path)
    parser.add_argument("--gib", type=float, default=2)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=None, help="where to put some five times the model's size")
    arguments = parser.parse_args()
    machine.quieten()
    with tempfile.TemporaryDirectory(prefix="moeprune-bench-", dir=arguments.directory) as scratch:
        accepted = compare_families(arguments.peer_python, Path(scratch))
        measured = compare_cost(arguments, Path(scratch))
    report(accepted, measured)


def compare_cost(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    model, text = scratch / "model", scratch / "text.jsonl"
    size = random_checkpoint.write(model, random_checkpoint.olmoe_of(int(arguments.gib * (1 << 30))))
    tokens = write_text(text, model, arguments.blocks)
    ours: list[list[Ran]] = []
    streamed: list[list[Ran]] = []
    theirs: list[Ran] = []

    def run_ours(runs: list[list[Ran]] = ours, *more: str) -> float:
        shutil.rmtree(scratch / "ours", ignore_errors=True)
        stats, plan = scratch / "stats", scratch / "plan.json"
        read = ["--block-tokens", _BLOCK_TOKENS, "--max-blocks", arguments.blocks]
        steps = [
            ["calibrate", "--model", model, "--data", text, "--out", stats, *read, *more],
            ["plan", "make", "--method", "c-prune", "--ratio", 0.5, "--stats", stats, "--out", plan],
            ["apply", "--model", model, "--plan", plan, "--out", scratch / "ours"],
        ]
        runs.append([run([str(part) for part in (_MOEPRUNE, *step)]) for step in steps])
        return sum(ran.seconds for ran in runs[-1])

    def run_theirs() -> float:
        shutil.rmtree(scratch / "theirs", ignore_errors=True)
        theirs.append(run([arguments.peer_python, _PEER, tokens, scratch / "theirs", "0.5", "float32", model]))
        return theirs[-1].seconds

    our_seconds, their_seconds = pairs(run_ours, run_theirs, arguments.repeats)
    streamed_seconds = [run_ours(streamed, "--memory-limit", _LIMIT) for _ in range(arguments.repeats)]
    return {
        "bytes": size,
        "tokens": arguments.blocks * _BLOCK_TOKENS,
        "moeprune": {"seconds": our_seconds, "peak": [max(ran.peak_bytes for ran in steps) for steps in ours]},
        "streamed": {"seconds": streamed_seconds, "peak": [max(ran.peak_bytes for ran in steps) for steps in streamed]},
        "llmcompressor": {"seconds": their_seconds, "peak": [ran.peak_bytes for ran in theirs]},
    }


def write_text(path: Path, model: Path, blocks: int) -> Path:
    """Our text, and the same tokens for the other tool."""
    from moeprune.checkpoint.loading import Checkpoint
    from moeprune.texts import read_blocks

    read = read_blocks("builtin://code", Checkpoint(model).tokenizer(), block_tokens=_BLOCK_TOKENS, max_blocks=blocks)
    tokenizer = Checkpoint(model).tokenizer()
    rows = [json.dumps({"text": tokenizer.decode(read.ids_BS.flatten())})]
    path.write_text("\n".join(rows) + "\n")
    tokens = path.with_suffix(".json")
    tokens.write_text(json.dumps(read.ids_BS.tolist()))
    return tokens


def compare_families(peer: Path, scratch: Path) -> list[dict[str, Any]]:
    root = scratch / "families"
    tokens = scratch / "tokens.json"
    tokens.write_text(json.dumps(tiny.token_ids(0, blocks=8, tokens=64).tolist()))
    models = [tiny.write(root / family, families.tiny_config(family)) for family in families.discovered()]
    ran = run([peer, _PEER, tokens, scratch / "pruned", "0.5", "float32", *models], OMP_NUM_THREADS="1")
    return [json.loads(line) for line in ran.output.splitlines() if line.startswith("{")]


def report(accepted: list[dict[str, Any]], measured: dict[str, Any]) -> None:
    known = [told for told in accepted if told["known"]]
    good = [told for told in known if "error" not in told]
    rows = [
        _row("moeprune", measured["moeprune"]),
        _row(f"moeprune, --memory-limit {_LIMIT}", measured["streamed"]),
        _row("llmcompressor REAP", measured["llmcompressor"]),
    ]
    seconds = zip(measured["llmcompressor"]["seconds"], measured["moeprune"]["seconds"], strict=True)
    peaks = zip(measured["llmcompressor"]["peak"], measured["moeprune"]["peak"], strict=True)
    rows[0]["families"] = rows[1]["families"] = f"{len(accepted)} (docs/families.md)"
    rows[2]["families"] = f"{len(good)} of the {len(known)} of ours that its transformers knows"
    faster, smaller = (Spread.of([a / b for a, b in of_pairs]) for of_pairs in (seconds, peaks))
    notes = (
        f"{measured['bytes'] / (1 << 30):.1f} GiB of weights, {measured['tokens']:,} tokens. Theirs over ours, of each "
        f"pair: time {faster:.2f}, peak memory {smaller:.2f}. Ours are three processes, each of which loads its "
        "libraries. The methods differ (REAP here, C-Prune there): what they keep is not compared. A family counts for "
        "them if it was pruned, saved and loaded again without an error; the tiny checkpoints were written by our "
        "transformers, whose configs an older one may refuse. What it said of the others is in the JSON."
    )
    publish("peers", "Beside llmcompressor", rows, {"cost": measured, "families": accepted}, notes)


def _row(name: str, measured: dict[str, Any]) -> dict[str, str]:
    return {
        "tool": name,
        "seconds": f"{Spread.of(measured['seconds']):.1f}",
        "peak memory, MiB": f"{Spread.of([peak / (1 << 20) for peak in measured['peak']]):,.0f}",
    }


if __name__ == "__main__":
    main()
