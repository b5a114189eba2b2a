"""Simulated annotators from a file, as ``duel simulate --annotators`` reads it: how noisy and how biased each is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from toolkit.errors import DataError, nearest
from toolkit.preferences.cells import excerpt, parsed_number
from toolkit.preferences.simulate import TIE_BELOW, Annotator, Bias
from toolkit.recipe.yaml_values import read_yaml

KEYS = ("name", "noise", "bias", "weight", "flipped", "ties")
_EXAMPLE = "- {name: ann, noise: 0.2, bias: length, weight: 0.3, flipped: 0.05, ties: 0.02}"


def read_annotators(path: Path) -> list[Annotator]:
    """The annotators of a YAML or JSON file: a list of mappings, or such a list under ``annotators``.

    Each has a ``name``. The others have defaults: ``noise`` (standard deviation, in units of the gold reward; 0),
    ``bias`` (length, format, agreement or none) with its ``weight`` (in units of the gold reward; below 0 for an
    aversion), ``flipped`` (share of wrong labels; 0) and ``ties`` (latent scores closer than this tie; 0.02).

    Raises:
        RecipeError: a file that cannot be read, or is not valid YAML.
        DataError: no annotator, an unknown key, a value that is missing or out of range, a name that is there twice.
    """
    document = read_yaml(path)
    if isinstance(document, Mapping) and list(document) == ["annotators"]:
        document = document["annotators"]
    if not isinstance(document, list) or not document:
        raise DataError("the file holds no list of annotators", where=str(path), fix=f"write for instance {_EXAMPLE}")
    annotators: dict[str, Annotator] = {}
    for number, entry in enumerate(document, start=1):
        annotator = _annotator(entry, f"{path}, annotator {number}")
        if annotator.name in annotators:
            raise DataError(f"the name {annotator.name!r} is there twice", where=str(path), fix="rename one of them")
        annotators[annotator.name] = annotator
    return list(annotators.values())


def _annotator(entry: object, where: str) -> Annotator:
    if not isinstance(entry, Mapping):
        raise DataError(f"{excerpt(entry)} is no mapping", where=where, fix=f"write for instance {_EXAMPLE}")
    for key in entry:
        if key not in KEYS:
            raise DataError(f"there is no setting {excerpt(key)}", where=where, fix=nearest(str(key), KEYS))
    name = entry.get("name")
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"the name is {excerpt(name)}, expected a text", where=where, fix="name: ann")
    bias = entry.get("bias", "none")
    if bias not in get_args(Bias):
        raise DataError(f"there is no bias {excerpt(bias)}", where=where, fix=nearest(str(bias), get_args(Bias)))
    if (bias == "none") != (entry.get("weight", 0) == 0):
        what = "a weight without a bias" if bias == "none" else f"the bias {bias!r} has no weight"
        raise DataError(what, where=where, fix="give both bias and weight, or neither")
    return Annotator(
        name,
        noise_std=_number(entry, "noise", 0.0, where, least=0.0),
        bias=bias,
        bias_weight=_number(entry, "weight", 0.0, where),
        flip_share=_number(entry, "flipped", 0.0, where, least=0.0, most=1.0),
        tie_below=_number(entry, "ties", TIE_BELOW, where, least=0.0),
    )


def _number(
    entry: Mapping[Any, Any], key: str, default: float, where: str, *, least: float = -1e9, most: float = 1e9
) -> float:
    """A number of an annotator. Raises DataError for what is none, and for one outside ``least`` to ``most``."""
    value = entry.get(key, default)
    number = parsed_number(value)
    if number is None or not least <= number <= most:
        bounds = "a number" if most == 1e9 else f"a number from {least:g} to {most:g}"
        bounds = f"{bounds} that is not negative" if least == 0.0 and most == 1e9 else bounds
        raise DataError(f"{key} is {excerpt(value)}, expected {bounds}", where=where)
    return number
