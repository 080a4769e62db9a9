"""Values of a pipeline's parameters as a file (YAML or JSON, name: value) and as text (NAME=VALUE)."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # kfp brings it

from moeprune.errors import InputError, in_one_line

from .package import Parameter


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in JSON and in YAML 1.2, and no name comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value]
        if twice := {name for name in names if names.count(name) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"{min(twice)} is there twice", node.start_mark)
        made: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return made


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read(path: Path) -> dict[str, Any]:
    """Raises InputError where the file cannot be read or is no mapping of names to values."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the parameter file {path} cannot be read: {in_one_line(error)}") from error
    except yaml.YAMLError as error:
        raise InputError(f"the parameter file {path} is neither YAML nor JSON: {in_one_line(error)}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"the parameter file {path} must say one value for each name, as in `ratio: 0.25`")
    return values


def parse(settings: Sequence[str], parameters: Mapping[str, Parameter]) -> dict[str, Any]:
    """`NAME=VALUE ...`: a text is taken as it stands, anything else as YAML (0.25, true, [a, b], {a: 1}).

    Raises:
        InputError: one is not of that form.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise InputError(f"{setting!r} is not of the form NAME=VALUE")
        is_text = name in parameters and parameters[name].type == "STRING"
        try:
            values[name] = value if is_text else yaml.load(value, Loader=_Loader)
        except yaml.YAMLError as error:
            raise InputError(f"the value of {name} cannot be read: {in_one_line(error)}") from error
    return values
