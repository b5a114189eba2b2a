"""Every setting of a recipe with what it takes, its default and its meaning, from the schema itself."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.recipe.files import allowed, one_line, sections_of
from toolkit.recipe.schema import Recipe


@dataclass(frozen=True)
class Setting:
    """``name`` is dotted, as ``--set`` takes it; ``default`` is as YAML writes it, empty where one must be given."""

    name: str
    allowed: str
    default: str
    meaning: str


def reference() -> list[Setting]:
    """All settings in the order of a recipe."""
    out = []
    for above, section in sections_of(Recipe):
        schemas = section.model_json_schema()["properties"]
        for name, field in section.model_fields.items():
            dotted = ".".join((*above, name))
            if dotted in {".".join(path) for path, _ in sections_of(Recipe)}:
                continue
            default = "" if field.is_required() else one_line(field.get_default(call_default_factory=True))
            out.append(Setting(dotted, allowed(schemas[name]), default, field.description or ""))
    return out


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
        cells = (
            f"`{setting.name}`",
            setting.allowed,
            f"`{setting.default}`" if setting.default else "",
            setting.meaning,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
