"""Whether a model was trained on prompts of chat messages or of text: as duel records it beside the weights, or in the
run folder around them.
"""

from __future__ import annotations

from pathlib import Path

from toolkit.models.files import model_json
from toolkit.models.resolve import ModelRef, run_around, training_record
from toolkit.models.reward_head import reward_head


def trained_on_messages(ref: ModelRef) -> bool | None:
    """True for a model that duel trained on messages, False for one on text.

    An SFT policy, and a model of an earlier version, has no record: what the data stage of the run around it read
    counts. None where nothing says so: other models, those of the hub, and models without a record outside a run.
    Raises ModelError for a record that is damaged.
    """
    if ref.kind == "hub":
        return None
    head = reward_head(ref.path)
    if head.process is not None:
        return head.process.conversational
    known = head.conversational if head.conversational is not None else training_record(ref).get("conversational")
    if known is None:
        known = _of_run(Path(ref.path))
    return None if known is None else bool(known)


def _of_run(model: Path) -> bool | None:
    """Whether the data of the run are messages that has this model in one of its stages."""
    run = run_around(model)
    stage = "." if run is None else model.resolve().relative_to(run).parts[0]
    if run is None or stage.startswith(".") or not (run / stage / "model").is_dir():  # an earlier result on its shelf
        return None
    report = run / "data" / "report.json"
    known = model_json(report).get("conversational") if report.is_file() else None
    return known if isinstance(known, bool) else None
