"""The card of a reward model as tables: the explicit reward and the implicit one side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from toolkit.report.numbers import interval, number, percent
from toolkit.report.sheets import Sheet, estimate_cells, interval_heading

Form = Callable[[float | None], str]
# Title of the table -> its rows: words, the path of the figure in the card, and how it is written.
_BIAS: list[tuple[str, tuple[str, ...], Form]] = [
    ("rank correlation within prompts", ("spearman",), number),
    ("the same for gold", ("gold_spearman",), number),
    ("prefers the response with more", ("preferred_rate",), percent),
    ("the labels do", ("labels_rate",), percent),
    ("gold does", ("gold_rate",), percent),
    ("excess over the labels", ("excess_over_labels",), percent),
    ("stated by the reward", ("stated_rate",), percent),
    ("overstated", ("overstated",), percent),
    ("accuracy where the preferred has more", ("accuracy_more_preferred",), percent),
    ("accuracy where it has less", ("accuracy_less_preferred",), percent),
    ("log odds per unit", ("log_odds",), number),
    ("explains of the margins", ("explained",), percent),
    ("explains of the reference", ("reference_explained",), percent),
    ("coefficient c", ("coefficient",), number),
    ("coefficient g of the reference", ("reference_coefficient",), number),
    ("excess if the reward is noisy, c - r g", ("excess_if_noisy",), number),
    ("excess if it is partial, r c - g", ("excess_if_partial",), number),
]
_TABLES: dict[str, tuple[str, list[tuple[str, tuple[str, ...], Form]]]] = {
    "accuracy": ("Accuracy on the labels", [("accuracy", (), percent)]),
    "calibration": (
        "Calibration, with sigmoid(margin) as probability",
        [
            ("negative log likelihood (nats)", ("nll",), number),
            ("Brier score", ("brier",), number),
            ("expected calibration error", ("ece",), number),
            ("best temperature", ("temperature",), number),
        ],
    ),
    "margins": (
        "Margin of the preferred response",
        [
            ("mean", ("mean",), number),
            *((f"{float(q):.0%} quantile", ("quantiles", q), number) for q in ("0.05", "0.25", "0.5", "0.75", "0.95")),
        ],
    ),
    "length": ("Length (characters)", _BIAS),
    "format": ("Format (lists, headings, bold, figures, marks)", _BIAS),
    "sycophancy": (
        "Agreement with the prompt's opinion",
        [
            *_BIAS,
            ("an opinion shifts a margin by (in margins)", ("probe", "shift"), number),
            ("share of prompts that shift towards it", ("probe", "share"), percent),
            ("the shift of gold", ("probe", "gold", "shift"), number),
        ],
    ),
    "gold": (
        "Against gold, on all pairs of responses",
        [
            ("accuracy", ("accuracy",), percent),
            ("Spearman within prompts", ("spearman",), number),
            ("Kendall within prompts", ("kendall",), number),
            ("accuracy of gold on the labels", ("labels_accuracy",), percent),
        ],
    ),
    "variance": (
        "Variance of the score",
        [
            ("within prompts", ("within_prompts",), number),
            ("between prompts", ("between_prompts",), number),
            ("share within prompts", ("share_within",), percent),
        ],
    ),
    "best_of_4": (
        "Best of four (a coin: 25%)",
        [("accuracy", ("accuracy",), percent), ("ties for the first place", ("ties",), percent)],
    ),
}


def card_sheets(card: Mapping[str, Any]) -> list[Sheet]:
    """The tables of a card, in its order. Figures that nothing gives are left out."""
    rewards = {name: card[name] for name in ("explicit", "implicit") if card[name] is not None}
    bounds = interval_heading(card["intervals"]["confidence"])
    sheets = []
    for topic, (title, rows) in _TABLES.items():
        sheet = Sheet(title, ["", *(text for name in rewards for text in (name, bounds))])
        for words, path, form in rows:
            cells = [estimate_cells(_figure(sections[topic], path), form) for sections in rewards.values()]
            if any(value != "-" for value, _ in cells):
                sheet.add_row(words, *(text for cell in cells for text in cell))
        if sheet.rows:
            sheets.append(sheet)
    return [*sheets, *_lists(rewards, bounds)]


def _figure(section: Mapping[str, Any] | None, path: Sequence[str]) -> Mapping[str, Any] | None:
    for name in path:
        section = None if section is None else section.get(name)
    return section


def _lists(rewards: Mapping[str, Mapping[str, Any]], bounds: str) -> list[Sheet]:
    """The tables whose rows depend on the data: best-of-n and sources."""
    sheets = []
    for name, sections in rewards.items():
        for key, measure, of in (("best_of_n", "gold", ""), ("best_of_n_judged", "judge", ", by the judge")):
            if sections[key]:
                sheets.append(_best_of_n_sheet(f"Best of n by the {name} reward{of}", sections[key], measure, bounds))
        if sections["styles"]:
            styles = sections["styles"]
            sheet = Sheet(f"RM-Bench, {name} reward: chosen (down) against rejected", ["", *styles["styles"]])
            for style, row in zip(styles["styles"], styles["matrix"], strict=True):
                sheet.add_row(style, *(percent(cell["value"]) for cell in row))
            for level in ("easy", "normal", "hard"):
                sheet.add_row(level, *estimate_cells(styles[level], percent), "")
            sheets.append(sheet)
        if sections["by_source"]:
            sheet = Sheet(f"By source, {name} reward", ["source", "accuracy", bounds, "without it", bounds])
            for row in sections["by_source"]:
                cells = [estimate_cells(row[key], percent) for key in ("accuracy", "accuracy_without")]
                sheet.add_row(row["source"], *(text for cell in cells for text in cell))
            sheets.append(sheet)
    return sheets


def _best_of_n_sheet(title: str, rows: Sequence[Mapping[str, Any]], measure: str, bounds: str) -> Sheet:
    """``measure`` is the key of the value that the picked response has."""
    columns = ["n", measure, bounds, "gain", bounds, "share of the best gain", "KL at most", "prompts"]
    sheet = Sheet(title, columns)
    for row in rows:
        value, gain = (estimate_cells(row[key], number) for key in (measure, "gain"))
        share = percent(row["share_of_best_gain"]["value"])
        kl, n = number(row["kl_bound_nats"], 2), str(row[measure]["n"])
        sheet.add_row(str(row["n_responses"]), *value, *gain, share, kl, n)
    return sheet


def flag_lines(card: Mapping[str, Any]) -> list[str]:
    """A sentence for each flag, or that there is none, and what a flag is."""
    lines = []
    for flag in card["flags"]:
        form = percent if flag["figure"] in ("explained", "overstated") else number
        bounds = interval(flag["ci_low"], flag["ci_high"], form)
        lines.append(f"flag: {flag['reward']}: {flag['sentence']} ({flag['figure']} {form(flag['value'])}, {bounds})")
    seen = card["n_trained_prompts"]
    notes = [f"note: {trained_on(seen, card['n_prompts'])}"] if seen else []
    return [*(lines or ["no flag"]), *notes, card["alarm"]]


def trained_on(n_seen: int, n_prompts: int) -> str:
    """What it means that a model was trained on some of the prompts that it is measured on."""
    return (
        f"{n_seen} of the {n_prompts} prompts are among those that the model was trained on. On new prompts it may be "
        "worse: measure it on held-out data, such as data/eval.parquet of its run"
    )
