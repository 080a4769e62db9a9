"""A compiled pipeline, and what values its parameters may have."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml  # type: ignore[import-untyped]  # kfp brings it

from moeprune.errors import InputError

# A pipeline is long, and Python's own reader slow.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# What each of Kubeflow's types takes, and how to say it.
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "STRING": ((str,), "a text"),
    "NUMBER_INTEGER": ((int,), "a whole number"),
    "NUMBER_DOUBLE": ((int, float), "a number"),
    "BOOLEAN": ((bool,), "true or false"),
    "LIST": ((list,), "a list"),
    "STRUCT": ((dict,), "an object"),
}


@dataclass(frozen=True)
class Parameter:
    """One of a pipeline's: `type` is Kubeflow's name of it, `required` that it has no default."""

    name: str
    type: str
    description: str = ""
    default: Any = None
    required: bool = False

    def checked(self, value: Any) -> Any:
        """The value as it is sent. Raises InputError where it is of another type."""
        types, said = _TYPES[self.type]
        fits = isinstance(value, types) and (self.type == "BOOLEAN" or not isinstance(value, bool))
        if fits and isinstance(value, float):
            fits = math.isfinite(value)
        if not fits:
            raise InputError(f"the parameter {self.name} is {said}, not {value!r}")
        return float(value) if self.type == "NUMBER_DOUBLE" else value


@dataclass(frozen=True)
class Package:
    """What `kfp` compiled, and what it says of itself."""

    text: str
    name: str
    description: str
    parameters: dict[str, Parameter]

    @classmethod
    def parse(cls, text: str) -> Package:
        """Raises InputError for what is no compiled pipeline."""
        try:
            spec = next(yaml.load_all(text, _LOADER))
            name = spec["pipelineInfo"]["name"]
            inputs = spec["root"].get("inputDefinitions", {}).get("parameters", {})
            parameters = {
                key: Parameter(
                    key,
                    given["parameterType"],
                    given.get("description", ""),
                    given.get("defaultValue"),
                    required=not given.get("isOptional", False),
                )
                for key, given in inputs.items()
            }
        except (yaml.YAMLError, StopIteration, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                "this is no pipeline as the compiler of Kubeflow Pipelines 2 writes it; `make compile` writes one"
            ) from error
        return cls(text, name, spec["pipelineInfo"].get("description", ""), parameters)

    @property
    def digest(self) -> str:
        """Of its bytes: two packages with the same one are the same version."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def checked(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values to send: those that were given.

        Raises:
            InputError: a name is not known, a value is of another type, or one without a default is not given.
        """
        for name in values:
            if name not in self.parameters:
                close = difflib.get_close_matches(name, self.parameters, n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; it has {', '.join(self.parameters)}"
                raise InputError(f"the pipeline {self.name} has no parameter {name}{hint}")
        for name, parameter in self.parameters.items():
            if parameter.required and name not in values:
                raise InputError(f"the pipeline {self.name} needs a value for its parameter {name}")
        return {name: self.parameters[name].checked(value) for name, value in values.items()}

    def with_defaults(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What the run will have: the values, and the defaults of the others."""
        return {name: parameter.default for name, parameter in self.parameters.items()} | dict(values)
