"""compare: the Reports of several runs -> one Report, its page, and the Pareto front of quality against size."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from contextlib import ExitStack

from moeprune import places, tracking
from moeprune.atomic import refuse_directory
from moeprune.evaluation import compared, figures, page
from moeprune.evaluation.report import Report
from moeprune.steps.evaluate import log

TABLE = "front.csv"


def compare(reports: Mapping[str, str], out: str, *, page_out: str | None = None) -> Report:
    """Put the Reports side by side at `out`, their page at `page_out`; MLflow gets the figures and the table.

    Args:
        reports: name -> address of a Report; what it is about goes by that name.

    Raises:
        InputError: they are not of the same original on the same texts.
    """
    with ExitStack() as stack:
        run = stack.enter_context(tracking.step("compare", {"reports": ", ".join(reports)}))
        report_path = stack.enter_context(places.output(out))
        page_path = stack.enter_context(places.output(page_out)) if page_out else None
        for path in filter(None, (report_path, page_path)):
            refuse_directory(path)
        read = {name: Report.load(stack.enter_context(places.local_file(address))) for name, address in reports.items()}
        report = compared.side_by_side(read)
        report.save(report_path)
        drawn = figures.all_of(report)
        if page_path:
            page.write(page_path, report, drawn, {"on the front": ", ".join(it.name for it in report.front)})
        log(run, report, page_path, drawn)
        run.parent.text(_csv(report), TABLE)
        run.parent.tags({"moeprune.front": ", ".join(it.name for it in report.front)})
        return report


def _csv(report: Report) -> str:
    rows = compared.table(report)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
