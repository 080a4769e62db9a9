"""global-prune: decide, cut, and fit what stays, for the method and for each baseline.

Deciding takes the Stats, and the model where the method tries what it decides. Cutting copies ranges of bytes. Fitting
has two models in memory: the original, and in float32 what stays.
"""

from __future__ import annotations

from moeprune.estimation.amounts import NOTHING, Amount, Basis, Term
from moeprune.estimation.needs.case import FLOAT32, Case, converting, forward, on_its_way, one_pass, weights
from moeprune.estimation.needs.cluster import as_numbers
from moeprune.estimation.needs.need import Need, Phase

_COPYING = 64 << 20  # blocks on their way, and what is small for each expert
_SWEEPS, _TRIES = 2, 4  # of the fit over the experts; ridges that each is tried with
_MEMBERS = 4  # experts whose neurons one that stands for several is made from, at most
_HELD_STATES = 3  # hidden states that a stopped pass holds of each token
_ADVICE = (
    "recovery has both models in memory: leave it out (--set recover=false, or a method without it) and let the "
    "distillation win back what is lost"
)


def need(case: Case) -> Need:
    recovers, work = case.plan.recovery is not None, case.work
    loads = recovers or case.tries
    stats = Term("Stats", case.stats_bytes)
    phases = [
        Phase("deciding", host=Amount.of(stats, as_numbers(case))),
        Phase("cutting", host=Amount.of(stats, Term("ranges on their way", _COPYING, Basis.ASSUMED))),
    ]
    operations, advice = NOTHING, ""
    if case.tries:
        phases.append(_trying(case))
        tokens = work.trial_blocks * work.block_tokens
        operations += Amount.of(
            Term("tries", len(case.original.layers) * forward(case.original, tokens, work.block_tokens), Basis.ASSUMED)
        )
    if recovers:
        phases += _recovering(case)
        operations += _fitting(case)
        advice = _ADVICE
    made = 1 + len(work.baselines)
    disk = Amount.of(
        stats,
        case.brought if loads else Term("", 0),
        Term("the pruned model", case.pruned.bytes_on_disk),
        Term("before it was fitted", case.pruned.bytes_on_disk if recovers else 0),
        Term(f"{len(work.baselines)} baselines", len(work.baselines) * case.pruned.bytes_on_disk),
    )
    moved = Term("original and pruned models", (case.original.bytes_on_disk + case.pruned.bytes_on_disk) * made)
    return Need("global-prune", tuple(phases), disk, operations, Amount.of(moved), computes=loads, advice=advice)


def _trying(case: Case) -> Phase:
    tokens = case.work.trial_blocks * case.work.block_tokens
    model = weights(case.original, case.item, "the original")
    passing = Amount.of(model, converting(case.original, case.item), one_pass(case.original, tokens, case.item))
    stats = Amount.of(Term("Stats", case.stats_bytes))
    return Phase("trying", passing, stats, on_its_way(case, case.original))


def _recovering(case: Case) -> list[Phase]:
    """The largest moments: when what stays is loaded beside the original, and when a layer of it is fitted."""
    tokens = case.work.recovery_blocks * case.work.block_tokens
    teacher = weights(case.original, case.item, "the original")
    student = weights(case.pruned, FLOAT32, "what stays, float32")
    layer, hidden = case.pruned.largest, case.pruned.hidden
    choices = tokens * layer.top_k
    fitting = (
        Term("hidden states of all tokens", tokens * _HELD_STATES * hidden * case.item, Basis.ASSUMED),
        Term("what a layer is to put out, and misses", tokens * hidden * (case.item + 3 * FLOAT32)),
        Term("inside the experts that stay", choices * (layer.width + hidden) * FLOAT32),
        Term("neurons' moments", 3 * (_MEMBERS * layer.width) ** 2 * FLOAT32, Basis.ASSUMED),
    )
    stored = Term("the fitted experts, as they are stored", case.pruned.routed * FLOAT32)
    stats = Amount.of(Term("Stats", case.stats_bytes))
    return [
        Phase("loading the original", Amount.of(teacher), stats, on_its_way(case, case.original)),
        Phase("loading what stays", Amount.of(teacher, student, converting(case.pruned, FLOAT32)), stats),
        Phase("fitting", Amount.of(teacher, student, *fitting), stats),
        Phase("writing", Amount.of(teacher, student, stored), stats),
    ]


def _fitting(case: Case) -> Amount:
    """Both models' passes, and each expert's moments: `n I^2` for its `n` choices, over sweeps and ridges."""
    tokens = case.work.recovery_blocks * case.work.block_tokens
    passes = 2 * forward(case.original, tokens, case.work.block_tokens)
    moments = sum(
        tokens * layer.top_k * 2.0 * layer.width * (layer.width + _TRIES * case.pruned.hidden) * _SWEEPS
        + layer.experts * _TRIES * _SWEEPS * 2.0 * layer.width**2 * (layer.width / 3 + case.pruned.hidden)
        for layer in case.pruned.layers.values()
    )
    return Amount.of(Term("passes of recovery", passes), Term("least squares", moments, Basis.ASSUMED))
