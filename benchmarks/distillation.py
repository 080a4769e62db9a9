"""What distillation wins back of what pruning lost: time, memory and loss, for plans of several methods.

    python benchmarks/distillation.py [--model M --domain NAME=TRAIN,HELD ...] [--method METHOD[:OPTION=VALUE,...] ...]
        [--ratio 0.5] [--calibration-blocks 64] [--blocks 128] [--held-blocks 16] [--end-to-end METHOD]
        [--set NAME=VALUE ...] [--then NAME=VALUE ... [--then-blocks 128]] [--state DIR]

Each step is the command that a user runs, in a process of its own: calibrate, plan make, apply, recover where the plan
asks for it, distill. Won back is the share of the increase of the held-out loss, mean over the domains, that
distillation takes away. With --then, what came of it is distilled further, end to end, with these options, on
--then-blocks of the same text, of which the first are those of before. With --end-to-end, that method's plan is also
distilled end to end, on the same text, as often, and with the same parts learning, which is what the rates are compared
by. What is made stays below --state: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from measuring import Ran, publish, run
from quality_table.rows import Row
from quality_table.texts import BUILTIN, Domain

from moeprune import places
from moeprune.atomic import write_beside
from moeprune.checkpoint.loading import Checkpoint
from moeprune.distillation.layer_local.settings import Settings
from moeprune.distillation.text import HELD_OUT
from moeprune.evaluation.measure import measure
from moeprune.methods import find
from moeprune.methods.sparse import UNSTRUCTURED
from moeprune.plan import Plan
from moeprune.steps.machine import quieten
from moeprune.texts import read_blocks

_MOEPRUNE = Path(sys.executable).parent / "moeprune"
_METHODS = ["reap", "frequency", "c-prune", "fuse", "moe-pruner"]


@dataclass(frozen=True)
class Judged:
    """Means over the domains.

    Attributes:
        loss: nats per token.
        accuracy: of the next token.
    """

    loss: float
    accuracy: float


class Bench:
    """The commands, each run once, and what they took."""

    def __init__(self, options: argparse.Namespace, domains: list[Domain]) -> None:
        self._options = options
        self._train = ",".join(domain.train for domain in domains)
        numbers = [options.ratio, options.calibration_blocks, options.block_tokens]
        made_of = [options.model, [asdict(domain) for domain in domains], numbers]
        self._state: Path = options.state / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
        with places.local_model(options.model) as directory:
            tokenizer = Checkpoint(directory).tokenizer()
        self._held = [
            read_blocks(domain.held, tokenizer, block_tokens=options.block_tokens, max_blocks=options.held_blocks)
            for domain in domains
        ]

    def original(self) -> Judged:
        with places.local_model(self._options.model) as directory:
            return self._judged(directory, self._state / "original")

    def judged(self, checkpoint: Path) -> Judged:
        return self._judged(checkpoint, checkpoint)

    def _judged(self, checkpoint: Path, kept_as: Path) -> Judged:
        """Measure it, or look up what was measured."""
        texts = hashlib.sha256(" ".join(blocks.fingerprint for blocks in self._held).encode()).hexdigest()[:12]
        record = kept_as.with_name(f"{kept_as.name}.judged-{texts}.json")
        if record.is_file():
            return Judged(**json.loads(record.read_text()))
        quality = measure(Checkpoint(checkpoint), self._held).quality.values()
        made = Judged(mean(one.loss_nats for one in quality), mean(one.accuracy for one in quality))
        record.parent.mkdir(parents=True, exist_ok=True)
        with write_beside(record) as beside:
            beside.write_text(json.dumps(asdict(made)))
        return made

    def pruned(self, row: Row) -> tuple[Path, Path]:
        """The checkpoint that a method makes, recovered where its plan asks for that, and the plan."""
        model, blocks = self._options.model, self._options.calibration_blocks
        text = ("--data", self._train, "--block-tokens", self._options.block_tokens, "--max-blocks", blocks)
        stats, plan = self._of(row, "stats"), self._of(row, "plan.json")
        cut, recovered = self._of(row, "cut"), self._of(row, "recovered")
        self._once(stats, "calibrate", "--model", model, *text, "--for", row.method)
        settings = [part for name, value in row.options.items() for part in ("--set", f"{name}={json.dumps(value)}")]
        amount = () if row.options.get("pattern", UNSTRUCTURED) != UNSTRUCTURED else ("--ratio", self._options.ratio)
        tried = ("--data", self._train, "--model", model) if find(row.method).tries else ()
        self._once(plan, "plan", "make", "--method", row.method, *amount, "--stats", stats, *settings, *tried)
        self._once(cut, "apply", "--model", model, "--plan", plan, "--stats", stats)
        if Plan.load(plan).recovery is None:
            return cut, plan
        self._once(recovered, "recover", "--model", model, "--pruned", cut, "--plan", plan, *text)
        return recovered, plan

    def distilled(self, row: Row, student: Path, plan: Path, how: str, blocks: int, *more: str) -> tuple[Path, Ran]:
        options = self._options
        parts = [how, "of", student.name, str(blocks), *(part.strip("-") for part in more)]
        out = self._of(row, "-".join(parts))
        text = ("--data", self._train, "--block-tokens", options.block_tokens, "--max-blocks", blocks)
        given = ("--teacher", options.model, "--student", student, "--plan", plan, "--how", how, *text, *more)
        return out, self._once(out, "distill", *given)

    def tokens(self, blocks: int) -> int:
        """That are trained on in an epoch, of so many blocks."""
        return (blocks - max(1, blocks // HELD_OUT)) * int(self._options.block_tokens)

    def _of(self, row: Row, what: str) -> Path:
        return self._state / row.label.replace(" ", "").replace("/", "") / what

    def _once(self, out: Path, *command: object) -> Ran:
        """Run a command that makes something, or look up what it took when it did."""
        record = out.with_name(f"{out.name}.took.json")
        if record.is_file() and out.exists():
            return Ran(**json.loads(record.read_text()))
        out.parent.mkdir(parents=True, exist_ok=True)
        ran = run([_MOEPRUNE, *(str(part) for part in command), "--out", out])
        with write_beside(record) as beside:
            beside.write_text(json.dumps(asdict(ran)))
        return ran


def compare(bench: Bench, row: Row, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The method's plan distilled layer by layer, and, where there is more to do, that end to end."""
    student, plan = bench.pruned(row)
    before = bench.judged(student)
    out, ran = bench.distilled(row, student, plan, "layer-local", options.blocks, *_given(options.set))
    rows = [_compared(row.label, before, bench.judged(out), ran)]
    if options.then:
        blocks = options.then_blocks or options.blocks
        further, ran_further = bench.distilled(row, out, plan, "end-to-end", blocks, *_given(options.then))
        rows.append(_compared(f"{row.label}, then end to end", before, bench.judged(further), ran_further))
    return rows


def _compared(label: str, before: Judged, after: Judged, ran: Ran) -> dict[str, Any]:
    # Not of the clock: what else the machine does is none of the method's.
    took = {"cpu_seconds": ran.cpu_seconds, "peak_bytes": ran.peak_bytes}
    return {"method": label, "before": asdict(before), "after": asdict(after)} | took


def _took(ran: Ran) -> dict[str, float]:
    return {"seconds": ran.seconds, "peak_bytes": ran.peak_bytes}


def _row(raw: dict[str, Any], original: Judged) -> dict[str, str]:
    before, after = Judged(**raw["before"]), Judged(**raw["after"])
    lost, left = before.loss - original.loss, after.loss - original.loss
    return {
        "method": raw["method"],
        "loss after pruning": f"+{lost:.3f}" if lost >= 0 else f"{lost:.3f}",
        "after distillation": f"+{left:.3f}" if left >= 0 else f"{left:.3f}",
        "won back": f"{1 - left / lost:.0%}" if lost > 0 else "nothing was lost",
        "accuracy after pruning": f"{before.accuracy / original.accuracy:.1%}",
        "accuracy after distillation": f"{after.accuracy / original.accuracy:.1%}",
        "CPU seconds": f"{raw['cpu_seconds']:.0f}",
        "peak MiB": f"{raw['peak_bytes'] / 2**20:,.0f}",
    }


def rates(bench: Bench, row: Row, blocks: int) -> tuple[str, dict[str, Any]]:
    """Layer-local beside end to end: the same parts, the same text, as often."""
    student, plan = bench.pruned(row)
    epochs = str(Settings.epochs)
    _, ours = bench.distilled(row, student, plan, "layer-local", blocks, "--epochs", epochs)
    _, theirs = bench.distilled(row, student, plan, "end-to-end", blocks, "--epochs", epochs, "--evaluations", "1")
    once = bench.tokens(blocks)
    tokens = once * Settings.epochs
    told = (
        f"{Settings.epochs} epochs of {row.label}'s experts and routers over {once:,} tokens, whole commands: "
        f"layer-local {tokens / ours.seconds:,.0f} tokens/s and {ours.peak_bytes / 2**20:,.0f} MiB, end to end "
        f"{tokens / theirs.seconds:,.0f} tokens/s and {theirs.peak_bytes / 2**20:,.0f} MiB: layer-local is "
        f"{theirs.seconds / ours.seconds:.2f} times as fast, in {ours.peak_bytes / theirs.peak_bytes:.0%} of the "
        "memory."
    )
    return told, {"layer_local": _took(ours), "end_to_end": _took(theirs)}


def _given(options: list[str]) -> list[str]:
    """NAME=VALUE as a command takes it."""
    return [part for one in options for part in (f"--{one.partition('=')[0]}", one.partition("=")[2])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=places.REFERENCE_MODEL)
    parser.add_argument("--domain", action="append", default=[], metavar="NAME=TRAIN,HELD")
    parser.add_argument("--method", action="append", default=[], metavar="METHOD[:OPTION=VALUE,...]")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--calibration-blocks", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=128, help="to distill on, an eighth of them held out")
    parser.add_argument("--held-blocks", type=int, default=16, help="of each domain, to judge on")
    parser.add_argument("--block-tokens", type=int, default=256)
    parser.add_argument("--end-to-end", metavar="METHOD", help="compare the two ways by the plan of this method")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="options of distill")
    parser.add_argument(
        "--then", action="append", default=[], metavar="NAME=VALUE", help="and then end to end with these"
    )
    parser.add_argument("--then-blocks", type=int, help="to go on with, an eighth of them held out; default: --blocks")
    parser.add_argument("--state", type=Path, default=Path(".moeprune/distillation"))
    parser.add_argument("--name", default="", help="of the results; by default the model's")
    options = parser.parse_args()
    quieten()
    domains = [Domain.parse(text) for text in options.domain] or BUILTIN
    bench = Bench(options, domains)
    original = bench.original()
    raws = [raw for method in options.method or _METHODS for raw in compare(bench, Row.parse(method), options)]
    further = f", then on {options.then_blocks} ({bench.tokens(options.then_blocks):,})" if options.then_blocks else ""
    notes = (
        f"{options.ratio:.0%} removed; calibrated on {options.calibration_blocks} blocks of {options.block_tokens} "
        f"tokens, distilled on {options.blocks} ({bench.tokens(options.blocks):,} tokens trained on, the rest held "
        f"out){further}, judged on {options.held_blocks} blocks of each domain. The original's loss is "
        f"{original.loss:.3f}; the columns say how far above it the loss is, mean over the domains, nats per token. It "
        f"predicts {original.accuracy:.1%} of the next tokens right; accuracy is given as a share of that. CPU seconds "
        "and memory are of the whole command, each row's own."
    )
    raw: dict[str, Any] = {"original": asdict(original), "methods": raws}
    if options.end_to_end:
        told, raw["rates"] = rates(bench, Row.parse(options.end_to_end), options.blocks)
        notes += f"\n\n{told}"
    name = options.name or Path(options.model.removeprefix("builtin://")).name
    title, rows = f"What distillation wins back on {name}", [_row(one, original) for one in raws]
    publish(f"distillation-{name}", title, rows, raw, notes, script="distillation")


if __name__ == "__main__":  # the processes that measure read this file, too, and need nothing of it
    main()
