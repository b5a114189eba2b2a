"""All malformed inputs, run one after the other in this process: ``python tests/faults/corpus.py [--only TEXT]``.

Every reader has to refuse its input with exit code 2 and one message that has place and cause, in time, without a
traceback, and without an output that looks whole. Inputs that look odd and are sound have to be read.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults import malformed_data, malformed_folders, malformed_judgements, malformed_models, malformed_settings
from faults.malformed import Malformed, run_malformed


def all_cases() -> list[Malformed]:
    """Every input once, by name."""
    return sorted(_cases(), key=lambda case: case.name)


def _cases() -> Iterator[Malformed]:
    data, settings = malformed_data, malformed_settings
    for of_reader in (
        *(data.data_cases, data.prompt_cases, data.sample_cases, malformed_judgements.judgement_cases),
        *(malformed_judgements.lc_table_cases, data.table_cases),
        *(settings.recipe_cases, settings.template_cases, settings.principle_cases, settings.python_judge_cases),
        *(settings.chat_template_cases, malformed_models.model_cases, malformed_folders.folder_cases),
    ):
        yield from of_reader()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run the inputs whose name holds this text")
    parser.add_argument("--show", action="store_true", help="print the message of every input")
    parser.add_argument("--light", action="store_true", help="leave out inputs of many megabytes")
    options = parser.parse_args()
    cases = [case for case in all_cases() if options.only in case.name and not (options.light and case.heavy)]
    wrong: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        for number, case in enumerate(cases):
            outcome = run_malformed(case, Path(scratch) / str(number))
            if outcome.faults or options.show:
                first = next((line for line in outcome.message.splitlines() if "rror" in line), "")[:160]
                print(f"{case.name}: {'; '.join(outcome.faults) or 'fine'} | {outcome.seconds:.1f} s | {first}")
                if options.show:
                    print(outcome.message[:1500])
            if outcome.faults:
                wrong[case.name.split("/")[0]] += 1
            sys.stdout.flush()
    print(f"{len(cases)} malformed inputs, {len(cases) - wrong.total()} as they should be")
    for reader, n in wrong.most_common():
        print(f"  {reader}: {n} of {sum(case.name.split('/')[0] == reader for case in cases)} are not")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
