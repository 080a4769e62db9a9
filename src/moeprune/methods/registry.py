"""All methods there are: those of moeprune, and those that other installed packages bring.

Another package brings a method by an entry point of the group `moeprune.methods`, which has the method's name and
points to its `Method`. It is loaded when methods are first asked for, and not before: until then the package may import
what it likes of moeprune.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points

from moeprune.errors import InputError, in_one_line
from moeprune.methods.base import Method
from moeprune.statistics.collectors import COLLECTORS

GROUP = "moeprune.methods"


class Registry(Mapping[str, Method]):
    """Methods by name.

    Attributes:
        own: those of moeprune.
        unusable: names of other packages' methods that cannot be used -> what is wrong with them, in a sentence.
    """

    def __init__(self, own: Iterable[Method]) -> None:
        self.own = {method.name: method for method in own}

    def find(self, name: str) -> Method:
        """Raises InputError for an unknown method, naming the known ones, and for one that cannot be used."""
        if name in self:
            return self[name]
        raise InputError(self.unusable.get(name, f"unknown method {name!r}; known: {', '.join(sorted(self))}"))

    @property
    def unusable(self) -> dict[str, str]:
        return self._found[1]

    @cached_property
    def _found(self) -> tuple[dict[str, Method], dict[str, str]]:
        methods, unusable = dict(self.own), {}
        points = entry_points(group=GROUP)
        for point in points:
            others = {_package(other) for other in points if other.name == point.name} - {_package(point)}
            others |= {"moeprune"} if point.name in self.own else set()
            try:
                if others:
                    raise InputError(f"{' and '.join(sorted(others))} has a method of this name, too")
                methods[point.name] = _load(point)
            except Exception as error:  # whatever is wrong with another package is no reason to do without the rest
                reason = (
                    str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {in_one_line(error)}"
                )
                unusable[point.name] = (
                    f"the method {point.name} of the package {_package(point)} cannot be used: {reason}"
                )
        return methods, unusable

    def __getitem__(self, name: str) -> Method:
        return self._found[0][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found[0])

    def __len__(self) -> int:
        return len(self._found[0])


def _load(point: EntryPoint) -> Method:
    method = point.load()
    if not isinstance(method, Method):
        raise InputError(f"{point.value} is not a moeprune.methods.base.Method")
    if method.name != point.name:
        raise InputError(f"{point.value} calls itself {method.name}")
    if unknown := sorted(method.statistics - COLLECTORS.keys()):
        raise InputError(f"it needs the statistics {', '.join(unknown)}, which nothing collects")
    return method


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.module
