"""evaluate: the original and its candidates on the same texts -> Report, page and figures."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from moeprune import places, tracking
from moeprune.atomic import refuse_directory
from moeprune.checkpoint.identity import close_fingerprint
from moeprune.checkpoint.loading import Checkpoint
from moeprune.clusters import Clusters
from moeprune.errors import InputError
from moeprune.evaluation import figures, page
from moeprune.evaluation.measure import BATCH_BLOCKS, Measured, measure
from moeprune.evaluation.report import Candidate, DataSet, Report
from moeprune.plan import Plan
from moeprune.progress import progress
from moeprune.steps import machine
from moeprune.steps.cluster import similarity_of
from moeprune.texts import Blocks, read_blocks
from moeprune.tracking import TrackedRun


@dataclass(frozen=True)
class Named:
    """A model to measure: the name that the Report gives it, and where it is."""

    name: str
    address: str


def models_in(directory: str) -> list[Named]:
    """The models in a local directory of models, by the names they have there; none where it does not exist."""
    found = Path(directory)
    return [
        Named(path.name, str(path)) for path in (sorted(found.iterdir()) if found.is_dir() else []) if path.is_dir()
    ]


def evaluate(
    models: list[Named],
    data: list[str],
    out: str,
    *,
    page_out: str | None = None,
    domain: str | None = None,
    clusters: str | None = None,
    text_field: str = "text",
    block_tokens: int = 256,
    max_blocks: int = 32,
    batch_blocks: int = BATCH_BLOCKS,
    of_the_run: bool = True,
    trust_remote_code: bool = False,
) -> Report:
    """Measure models on texts and put the Report at `out`, its page at `page_out`.

    Args:
        models: the original first.
        data: one or more texts (see `texts`); each is measured for itself, the pruned-for domain first.
        domain: name of the pruned-for domain, if it is not the first text.
        clusters: of the original; the page then shows them.
        max_blocks: of each text.
        of_the_run: whether the whole run is about these models; what was measured is then logged to it, too.

    Raises:
        InputError: nothing to measure, two things of the same name, or models with different vocabularies.
    """
    machine.quieten()
    if not models or not data:
        raise InputError("evaluate needs at least one model and one text")
    params = {"models": ", ".join(m.name for m in models), "data": ", ".join(data), "block_tokens": block_tokens}
    with ExitStack() as stack:
        run = stack.enter_context(tracking.step("evaluate", params | machine.describe()))
        report_path = stack.enter_context(places.output(out))
        page_path = stack.enter_context(places.output(page_out)) if page_out else None
        for path in filter(None, (report_path, page_path)):
            refuse_directory(path)
        similarity = None
        if clusters:
            similarity = similarity_of(Clusters.load(stack.enter_context(places.local_file(clusters))))
        checkpoints = {
            model.name: Checkpoint(stack.enter_context(places.local_model(model.address)), trust_remote_code)
            for model in models
        }
        if len(checkpoints) < len(models):
            raise InputError(f"two models have the same name ({', '.join(m.name for m in models)}); name them apart")
        texts = _texts(checkpoints, data, text_field, block_tokens, max_blocks)
        candidates, expert_use = _measure_all(models, checkpoints, texts, batch_blocks)
        report = Report(
            domain=domain or texts[0].name,
            data=[
                DataSet(
                    name=t.name, address=t.address, blocks=len(t.ids_BS), tokens=t.tokens, fingerprint=t.fingerprint
                )
                for t in texts
            ],
            candidates=candidates,
            expert_use=expert_use,
            machine=machine.describe(),
        )
        report.save(report_path)
        drawn = figures.all_of(report, similarity, _keep(checkpoints))
        if page_path:
            page.write(page_path, report, drawn, _about(report, checkpoints))
        log(run, report, page_path, drawn, of_the_run=of_the_run)
        return report


def _texts(
    checkpoints: dict[str, Checkpoint], data: list[str], text_field: str, block_tokens: int, max_blocks: int
) -> list[Blocks]:
    tokenizers = {name: checkpoint.tokenizer() for name, checkpoint in checkpoints.items()}
    first_name, first = next(iter(tokenizers.items()))
    for name, tokenizer in tokenizers.items():
        if tokenizer.get_vocab() != first.get_vocab():
            raise InputError(f"{name} and {first_name} have different vocabularies; their losses cannot be compared")
    texts = [
        read_blocks(address, first, block_tokens=block_tokens, max_blocks=max_blocks, text_field=text_field)
        for address in data
    ]
    names = [text.name for text in texts]
    if len(set(names)) < len(names):
        raise InputError(f"two texts have the same name ({', '.join(names)}); rename a file")
    return texts


def _measure_all(
    models: list[Named], checkpoints: dict[str, Checkpoint], texts: list[Blocks], batch_blocks: int
) -> tuple[list[Candidate], dict[str, dict[str, list[float]]]]:
    """The candidates, and the original's use of its experts."""
    candidates: list[Candidate] = []
    original_use: dict[str, dict[str, list[float]]] = {}
    with progress("evaluate") as on_model:
        for done, model in enumerate(models, start=1):
            is_original = done == 1
            measured = measure(checkpoints[model.name], texts, with_expert_use=is_original, batch_blocks=batch_blocks)
            if is_original:
                original_use = measured.expert_use
            candidates.append(_candidate(model, checkpoints[model.name], measured))
            on_model(done, len(models))
    return candidates, original_use


def _candidate(model: Named, checkpoint: Checkpoint, measured: Measured) -> Candidate:
    plan = plan_in(checkpoint.directory)
    return Candidate(
        name=model.name,
        address=places.origin(model.address),
        weights=close_fingerprint(checkpoint.files),
        method=plan.method if plan else None,
        experts_per_layer=checkpoint.experts_per_layer,
        parameters=checkpoint.files.parameters,
        bytes_on_disk=checkpoint.files.bytes_on_disk,
        peak_memory_bytes=measured.peak_memory_bytes,
        tokens_per_second=measured.tokens_per_second,
        quality=measured.quality,
    )


def plan_in(directory: str | Path) -> Plan | None:
    """The Plan that a checkpoint was pruned by, if it was.

    Raises:
        InputError: it is no Plan that this version reads.
    """
    path = Path(directory) / "pruning_plan.json"
    return Plan.load(path) if path.is_file() else None


def _keep(checkpoints: dict[str, Checkpoint]) -> dict[str, list[int]] | None:
    """What the first pruned model kept: the figure of use marks it."""
    plans = (plan_in(checkpoint.directory) for checkpoint in checkpoints.values())
    return next((plan.keep for plan in plans if plan), None)


def _about(report: Report, checkpoints: dict[str, Checkpoint]) -> dict[str, str]:
    plan = next((plan for it in checkpoints.values() if (plan := plan_in(it.directory))), None)
    if not plan:
        return {}
    return {
        "method": plan.method,
        "ratio": f"{plan.removed:.3g}",
        "model": plan.model,
        "calibration data": plan.data,
    } | {f"option {name}": str(value) for name, value in plan.options.items()}


def log(
    run: TrackedRun, report: Report, page_path: Path | None, drawn: page.Figures, *, of_the_run: bool = True
) -> None:
    """Metrics go to the step's run; they, figures and files to the pipeline's, where runs are compared.

    What the run is not about as a whole (`of_the_run`) goes to the step's alone.
    """
    whole = run.parent if of_the_run else run
    for candidate in report.candidates:
        values = {
            "parameters": candidate.parameters,
            "size_on_disk_mb": candidate.bytes_on_disk / 1e6,
            "throughput_tokens_per_second": candidate.tokens_per_second,
        }
        if candidate.peak_memory_bytes is not None:
            values["peak_memory_mib"] = candidate.peak_memory_bytes / 2**20
        for name, quality in candidate.quality.items():
            values |= {
                f"{name}.loss_nats": quality.loss_nats,
                f"{name}.perplexity": quality.perplexity,
                f"{name}.accuracy_share": quality.accuracy,
            }
        named = {f"{candidate.name}.{key}": value for key, value in values.items()}
        run.metrics(named)
        if whole.run_id != run.run_id:
            whole.metrics(named)
    for data in report.data:
        run.dataset(data.name, data.address, data.fingerprint, "evaluation", data.tokens)
    for title, (figure, _) in drawn.items():
        whole.figure(figure, re.sub(r"\W+", "_", title.lower()))
    whole.text(json.dumps(report.model_dump(mode="json"), indent=1), "report.json")
    if page_path:
        whole.text(page_path.read_text(), "report.html")
