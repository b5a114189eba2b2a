"""Every setting of a recipe from the schema itself: with what it takes and means for people, as JSON for editors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from toolkit.recipe.problems import allowed, sections_of
from toolkit.recipe.schema import Recipe
from toolkit.recipe.yaml_values import SHORT_TYPES, SHORTHAND, one_line


@dataclass(frozen=True)
class SettingReference:
    """``name`` is dotted, as ``--set`` takes it. ``default`` is as YAML writes it, empty where one must be given."""

    name: str
    allowed: str
    default: str
    meaning: str


def reference() -> list[SettingReference]:
    """All settings in the order of a recipe."""
    sections = dict(sections_of(Recipe))
    rows = []
    for above, section in sections.items():
        schemas = section.model_json_schema()["properties"]
        for name, field in section.model_fields.items():
            if (*above, name) in sections:
                continue
            default = (
                "" if field.is_required() else one_line(field.get_default(call_default_factory=True, validated_data={}))
            )
            dotted = ".".join((*above, name))
            rows.append(SettingReference(dotted, allowed(schemas[name]), default, field.description or ""))
    return rows


def markdown() -> str:
    """The reference as one Markdown table for each section."""
    lines = ["# Recipe reference", ""]
    opened = None
    for setting in reference():
        section, _, _ = setting.name.rpartition(".")
        if section != opened:
            opened = section
            lines += ["", f"## {section or 'Top level'}", "", "| setting | takes | default | meaning |"]
            lines += ["|---|---|---|---|"]
        default = f"`{setting.default}`" if setting.default else ""
        cells = (f"`{setting.name}`", setting.allowed, default, setting.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors, with the short forms such as ``model: tiny`` and ``rounds: 3``."""
    schema = Recipe.model_json_schema()
    for section, key in SHORTHAND.items():
        kind = "integer" if SHORT_TYPES[section] is int else "string"
        short = {"type": kind, "description": f"Short for {section}.{key}."}
        schema["properties"][section] = {"anyOf": [schema["properties"][section], short]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
