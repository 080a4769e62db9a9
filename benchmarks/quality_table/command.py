"""The command: what was asked for, measured, and published."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from measuring import RESULTS, machine

from moeprune import places
from moeprune.atomic import write_beside
from moeprune.checkpoint.loading import Checkpoint
from moeprune.errors import InputError, ServiceError
from moeprune.evaluation.measure import BATCH_BLOCKS
from moeprune.methods import check_ratio
from moeprune.services.signals import raised
from moeprune.steps.machine import quieten
from quality_table import tables
from quality_table.cells import Store
from quality_table.picture import quality_and_size
from quality_table.results import Results
from quality_table.rows import Amounts, Row, amount, every_row
from quality_table.run import Asked, fill
from quality_table.texts import BUILTIN, MIXTURE, Domain, Texts
from quality_table.work import Bench


def main(description: str) -> None:
    options = _parser(description).parse_args()
    quieten()
    try:
        with raised():
            failed = run(options)
    except (InputError, ServiceError) as error:
        sys.exit(f"quality: {error}")
    except KeyboardInterrupt:
        sys.exit("quality: stopped; the same command goes on from here")
    sys.exit(failed)


def run(options: argparse.Namespace) -> bool:
    """Measure and publish. Returns whether anything could not be done that nobody has refused."""
    domains = [Domain.parse(text) for text in options.domain] or BUILTIN
    rows = [Row.parse(text) for text in options.method] or every_row()
    again = [Row.parse(text) for text in options.again]
    for ratio in (*options.ratio, *options.weight_ratio, *options.layer_ratio):
        check_ratio(ratio)
    options.state.mkdir(parents=True, exist_ok=True)
    with places.local_model(options.model) as directory:
        checkpoint = Checkpoint(directory, options.trust_remote_code)
        texts = Texts(
            domains,
            checkpoint.tokenizer(),
            block_tokens=options.block_tokens,
            blocks=options.blocks,
            held_blocks=options.held_blocks,
            text_field=options.text_field,
        )
        calibrated_on = [MIXTURE, *(domain.name for domain in domains if options.alone)]
        draws = [texts.draw(on, seed) for seed in range(options.draws) for on in calibrated_on]
        asked = Asked(
            [*rows, *(row for row in again if row not in rows)],
            Amounts(options.ratio, options.weight_ratio, options.layer_ratio),
            again,
            not options.measured_only,
        )
        results = fill(Bench(checkpoint, texts, options.state), Store(options.state), draws, asked)
    publish(options, domains, asked.rows, results, {name: blocks.tokens for name, blocks in texts.held.items()})
    return any(why.startswith("failed") for why in results.refused.values())


def publish(
    options: argparse.Namespace,
    domains: list[Domain],
    rows: Sequence[Row],
    results: Results,
    held_tokens: dict[str, int],
) -> None:
    """Write the table, the numbers and the picture."""
    name = options.name or PurePosixPath(options.model.removeprefix("builtin://")).name
    out: Path = options.out / f"quality-{name}"
    command, names = _command(sys.argv[1:]), [domain.name for domain in domains]
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    notes = (
        f"Calibrated on {options.blocks} blocks of {options.block_tokens} tokens, equal parts of {', '.join(names)}, "
        f"drawn {_times(options.draws)} from the training texts; judged on held-out text "
        f"({', '.join(f'{domain} {tokens:,} tokens' for domain, tokens in held_tokens.items())}). A number is the "
        "median over the draws, in brackets the least and the most where they differ; the best of a column is bold. "
        f"Tokens per second are those of forward passes over batches of {BATCH_BLOCKS} blocks, and each candidate is "
        "held against the original measured just before it. To decide takes what is told after calibration, which all "
        "methods share."
    )
    results.refused = {place: _without_directories(why) for place, why in results.refused.items()}
    text = (
        f"# Every method on {name}\n\n`{command}`, {datetime.now(UTC):%Y-%m-%d}; {where}\n\n{notes}\n\n"
        f"![Quality against size]({out.name}.png)\n\n{tables.everything(results, rows, names)}\n"
    )
    record = {
        "command": command,
        "machine": machine(),
        "settings": _settings(options),
        "domains": {domain.name: _named({"train": domain.train, "held": domain.held}) for domain in domains},
        "original": results.original.model_dump(mode="json"),
        "cells": [
            {"row": row.label, "calibrated_on": on} | cell.model_dump(mode="json")
            for (row, _, on), cells in results.cells.items()
            for cell in cells
        ],
        "refused": [
            {"row": row.label, "amount": amount(row, ratio), "calibrated_on": on, "why": why}
            for (row, ratio, on), why in results.refused.items()
        ],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    figure = quality_and_size(results, rows, f"{name}: calibrated on {', '.join(names)} together")
    with write_beside(out.with_name(f"{out.name}.png")) as beside:
        figure.savefig(beside, format="png")
    for suffix, content in (("md", text), ("json", json.dumps(record, indent=1) + "\n")):
        with write_beside(out.with_name(f"{out.name}.{suffix}")) as beside:
            beside.write_text(content)
    sys.stdout.write(text)


def _command(arguments: list[str]) -> str:
    """What makes this table, without where things lie on this machine, and what was there already."""
    parts = ["python", "benchmarks/quality.py"]
    rest = iter(arguments)
    for argument in rest:
        if argument in ("--state", "--out"):
            next(rest, None)
        elif argument != "--measured-only" and not argument.startswith(("--state=", "--out=")):
            parts.append(shlex.quote(_without_directories(argument)))
    return " ".join(parts)


def _without_directories(text: str) -> str:
    """Absolute paths by their last names."""
    return re.sub(r"(?<![\w.:/-])/(?:[^\s,=]*/)?([^\s,=/]+)", r"\1", text)


def _named(addresses: dict[str, str]) -> dict[str, str]:
    return {key: _without_directories(address) for key, address in addresses.items()}


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    shown = ("blocks", "block_tokens", "held_blocks", "draws", "ratio", "weight_ratio", "layer_ratio", "alone")
    return {name: getattr(options, name) for name in shown}


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=places.REFERENCE_MODEL, help="a directory, s3:// or hub id; %(default)s")
    parser.add_argument(
        "--domain",
        action="append",
        default=[],
        metavar="NAME=TRAIN,HELD",
        help="a domain with its training and its held-out text; may be repeated; by default the embedded texts",
    )
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="METHOD[:OPTION=VALUE,...][+recovery]",
        help="what to compare; may be repeated; by default every method there is",
    )
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.125, 0.25, 0.5, 0.75], help="of the experts")
    parser.add_argument("--weight-ratio", type=float, nargs="+", default=[0.5], help="where weights are removed")
    parser.add_argument("--layer-ratio", type=float, nargs="+", default=[1 / 3], help="where layers are condensed")
    parser.add_argument("--draws", type=int, default=3, help="of the calibration text; %(default)s")
    parser.add_argument("--blocks", type=int, default=128, help="of each calibration; %(default)s")
    parser.add_argument("--held-blocks", type=int, default=32, help="of each held-out text at most; %(default)s")
    parser.add_argument("--block-tokens", type=int, default=256, help="%(default)s")
    parser.add_argument("--text-field", default="text", help="of JSONL or Parquet; %(default)s")
    parser.add_argument("--alone", action="store_true", help="also calibrate on each domain alone, and judge on it")
    parser.add_argument(
        "--again", action="append", default=[], metavar="METHOD...", help="measure this one anew; may be repeated"
    )
    parser.add_argument("--measured-only", action="store_true", help="write the table of what was measured so far")
    parser.add_argument("--trust-remote-code", action="store_true", help="run modelling code that the model brings")
    parser.add_argument("--name", help="of the results; by default the model's")
    parser.add_argument("--state", type=Path, default=Path(".moeprune/quality"), help="what was measured; %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go")
    return parser
