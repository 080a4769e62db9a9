"""experts: Stats of several domains -> what each one's experts are."""

from __future__ import annotations

from pathlib import PurePosixPath

from moeprune import places
from moeprune.atomic import write_beside
from moeprune.domain_experts import TIMES, DomainExperts, compare
from moeprune.errors import InputError
from moeprune.evaluation import figures
from moeprune.sources import mixture_name
from moeprune.statistics import Stats


def experts(
    stats: list[str], *, times: float = TIMES, out: str | None = None, figure_out: str | None = None
) -> DomainExperts:
    """Compare domains by their Stats, and put what is found at `out` (JSON), and its figure at `figure_out`.

    Args:
        stats: `[NAME=]FILE` each; without a name, that of the data.

    Raises:
        InputError: two domains of the same name, Stats that cannot be read or compared, or a figure of another format
            than PNG, SVG or PDF.
    """
    if figure_out and PurePosixPath(figure_out).suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"a figure is written as .png, .svg or .pdf, not as {figure_out}")
    domains: dict[str, Stats] = {}
    for given in stats:
        name, address = _named(given)
        with places.local_file(address) as path:
            loaded = Stats.load(path)
        name = name or "+".join(map(mixture_name, loaded.sources)) or PurePosixPath(address).stem
        if name in domains:
            raise InputError(f"two Stats are of {name}; name them apart, --stats NAME={address}")
        domains[name] = loaded
    found = compare(domains, times)
    if out:
        with places.output(out) as path:
            found.save(path)
    if figure_out:
        with places.output(figure_out) as path, write_beside(path) as beside:
            drawn = figures.use_by_domain(found.use, next(iter(domains)))
            drawn.savefig(beside, format=PurePosixPath(figure_out).suffix[1:])
    return found


def _named(given: str) -> tuple[str, str]:
    name, equals, address = given.partition("=")
    return (name, address) if equals else ("", given)
