"""What a round labels: each arm's samples with their comparisons, as files and as training examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from toolkit.models.encoding import TextEncoder
from toolkit.preferences import splits
from toolkit.preferences.rows import PreferenceRow
from toolkit.preferences.samples import Sample, by_prompt, read_samples, write_samples
from toolkit.preferences.tables import from_parquet, to_parquet
from toolkit.training.batch import Example

COLUMNS = ("prompt_id", "policy", "sample_index", "response", "response_ids", "n_tokens", "truncated")


def samples_file(folder: Path, arm: str) -> Path:
    """The samples of an arm's policy, with the ids that were sampled."""
    return folder / f"{arm}_samples.parquet"


def write_labelled(rows: Sequence[PreferenceRow], folder: Path, arm: str) -> None:
    """Write the labelled comparisons of an arm, whose samples are in :func:`samples_file` already."""
    to_parquet(rows, folder / f"{arm}.parquet")


def write_arm_samples(samples: Sequence[Sample], folder: Path, arm: str) -> None:
    write_samples(samples, samples_file(folder, arm), COLUMNS)


def read_labelled(folder: Path, arm: str, encoder: TextEncoder) -> list[Example]:
    """The labelled comparisons of an arm as examples: of the ids that were sampled, where the encoder reads these as
    the same texts, and a truncated response without an end."""
    samples = by_prompt(read_samples(samples_file(folder, arm), COLUMNS))
    examples = []
    for row in from_parquet(folder / f"{arm}.parquet"):
        of_text = {sample.response: sample for sample in reversed(samples[row.prompt_id])}
        chosen = [of_text[text] for text in row.responses]
        ids, truncated = [sample.response_ids for sample in chosen], [sample.truncated for sample in chosen]
        tree = encoder.as_sampled(row.prompt, row.responses, ids, truncated)
        examples.append(Example(tree, splits.pairs(row), tuple(splits.margins(row))))
    return examples
