"""``duel study``: the verdict over seeds, settings and checkpoints of both arms."""

from __future__ import annotations

from pathlib import Path

import click

from toolkit.cli.options import FORCE, JSON, PATH, emit


@click.command()
@click.option("--table", type=PATH, required=True, help="Parquet file with a row for each policy and prompt.")
@click.option(
    "--kl-limit",
    type=click.FloatRange(0, min_open=True),
    metavar="NATS",
    help="Choose only among policies whose KL on dev prompts is at most this.",
)
@click.option("--out", type=PATH, help="Folder for study.json.")
@FORCE
@JSON
def study(table: Path, kl_limit: float | None, out: Path | None, force: bool, as_json: bool) -> None:
    """Compare RM + PPO with DPO over seeds and settings, from a table of recorded policies.

    Settings and checkpoints are chosen on dev prompts. The verdict is on test prompts: best against best, at equal
    KL, at equal compute, and by the number of trials. Nothing is run. docs/study.md describes the table.
    """
    from toolkit.cli.tables import study_tables
    from toolkit.evals.study.study import study as study_document
    from toolkit.evals.study.table import read_study
    from toolkit.files import read_json, refuse_existing, write_json

    document = study_document(read_study(table), kl_limit=kl_limit)
    if out is not None:
        target = out / "study.json"
        if not (target.exists() and read_json(target) == document):
            refuse_existing(target, force)
            write_json(target, document)
    emit(document) if as_json else print(study_tables(document))


COMMANDS = (study,)
