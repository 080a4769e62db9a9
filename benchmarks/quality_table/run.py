"""All cells of a table: those that were measured before, and those that are measured now."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from moeprune.errors import InputError, in_one_line
from moeprune.statistics import Stats
from quality_table.cells import Store
from quality_table.pace import Pace
from quality_table.results import Results
from quality_table.rows import Amounts, Row, amount
from quality_table.texts import Drawn
from quality_table.work import Bench

_CALIBRATION = "calibration"


@dataclass(frozen=True)
class Asked:
    """What the table is to hold.

    Attributes:
        rows: of each draw.
        amounts: that each row is cut at.
        again: rows to measure although they were.
        measure: whether to measure what is missing, or to leave it out.
    """

    rows: Sequence[Row]
    amounts: Amounts
    again: Sequence[Row] = ()
    measure: bool = True


@dataclass(frozen=True)
class _Task:
    row: Row
    ratio: float
    drawn: Drawn

    @property
    def text(self) -> str:
        return f"{self.drawn.on}, draw {self.drawn.seed}, {amount(self.row, self.ratio)}, {self.row.label}"


def fill(bench: Bench, store: Store, draws: Sequence[Drawn], asked: Asked) -> Results:
    """Everything that was asked for. Raises InputError where the original itself cannot be measured."""
    original = store.get_original(bench.original_name)
    if original is None:
        sys.stderr.write("measuring the original\n")
        original = bench.original()
        store.put_original(bench.original_name, original)
    results = Results(original)
    missing: dict[int, list[_Task]] = {}
    for number, drawn in enumerate(draws):
        for task in _tasks(drawn, asked):
            key = bench.key(task.row, task.ratio, drawn)
            if task.row in asked.again and asked.measure:
                store.forget(key)
            if known := store.get(key):
                results.add(task.row, known)
            elif asked.measure:
                missing.setdefault(number, []).append(task)
    methods = {row.method for row in asked.rows}
    pace = Pace(
        kind
        for number, tasks in missing.items()
        for kind in [
            *([_CALIBRATION] if bench.lacks_stats(draws[number], methods) else []),
            *(task.drawn.on for task in tasks),
        ]
    )
    for number, tasks in missing.items():
        stats = _stats(bench, draws[number], methods, pace)
        for task in tasks:
            _do(bench, store, task, stats, results, pace)
    return results


def _tasks(drawn: Drawn, asked: Asked) -> list[_Task]:
    found = [_Task(row, ratio, drawn) for row in asked.rows for ratio in asked.amounts.of(row)]
    return sorted(found, key=lambda task: task.ratio)  # a method that cannot run shows early


def _stats(bench: Bench, drawn: Drawn, methods: set[str], pace: Pace) -> Stats:
    started = time.perf_counter()
    lacking = bench.lacks_stats(drawn, methods)
    stats = bench.stats(drawn, methods)
    if lacking:
        pace.done(_CALIBRATION, time.perf_counter() - started, f"calibrated on {drawn.on}, draw {drawn.seed}")
    return stats


def _do(bench: Bench, store: Store, task: _Task, stats: Stats, results: Results, pace: Pace) -> None:
    """One cell. What fails is told, and the rest goes on: a run takes hours."""
    started = time.perf_counter()
    try:
        cell, plan = bench.cell(task.row, task.ratio, task.drawn, stats)
    except InputError as error:
        told = _refuse(results, task, str(error))
    except Exception as error:
        traceback.print_exc()
        told = _refuse(results, task, f"failed: {type(error).__name__}: {in_one_line(error)}")
    else:
        store.put(cell, plan.to_json())
        results.add(task.row, cell)
        told = f"{results.mean_increase(cell):+.3f} nats"
    pace.done(task.drawn.on, time.perf_counter() - started, f"{task.text}: {told}")


def _refuse(results: Results, task: _Task, why: str) -> str:
    results.refused[task.row, task.ratio, task.drawn.on] = why
    return why
