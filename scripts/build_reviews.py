"""Builds the shipped preference data ``reviews``: openings, 6 sampled completions each, judged in simulation.

The template of an opening is its group, so that a split holds whole templates out.

``python scripts/build_reviews.py --seed 0`` writes ``toolkit/preferences/assets/reviews.jsonl.gz``. With
``--text build/tiny`` it first makes what the gold reward knows of English, ``words.txt.gz`` and ``triples.txt.gz``,
from the corpus of ``build_tiny.py``. ``--samples FILE`` keeps the raw samples; a rerun that finds the file does not
sample again.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import random
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from build_openings import REPO, continuations, load, openings

sys.path.insert(0, str(REPO))
from toolkit.files import write_bytes, write_text
from toolkit.preferences.gold import FUNCTION_WORDS, prompt_text, sentences, word_triples
from toolkit.preferences.rows import write_native
from toolkit.preferences.simulate import agreement, simulate_preferences

ASSETS = REPO / "toolkit" / "preferences" / "assets"
ASCII = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"})


def clean(text: str) -> str | None:
    """A continuation fit to ship, with plain quotes; None for one that does not go on with a word after a space."""
    text = text.translate(ASCII).rstrip()
    if not re.match(r" [A-Za-z0-9\"'$]", text) or not text.isascii() or not text.isprintable() or "  " in text:
        return None
    return text if len(text.split()) >= 3 else None


def sample(prompts: list[str], model_name: str, draws: int, seed: int, temperature: float) -> list[dict[str, object]]:
    """``draws`` continuations of every prompt: rows of prompt and responses, in the order of the prompts."""
    model, tokenizer = load(model_name)
    rng = random.Random(f"sentences {seed}")
    jobs = [p for p in prompts for _ in range(draws)]
    wanted = [rng.choice((1, 2, 2)) for _ in jobs]
    texts: list[str] = [""] * len(jobs)
    for n, (i, text) in enumerate(continuations(model, tokenizer, jobs, wanted, seed=seed, temperature=temperature), 1):
        texts[i] = text
        if n % 500 == 0:
            print(f"{n} of {len(jobs)} samples", file=sys.stderr, flush=True)
    return [{"prompt": p, "responses": texts[i * draws : (i + 1) * draws]} for i, p in enumerate(prompts)]


def choose(responses: Iterable[str], k: int) -> list[str]:
    """The first ``k`` distinct clean responses. Those cut off by the limit of tokens belong to the data as well."""
    return list(dict.fromkeys(text for text in map(clean, responses) if text))[:k]


def read_texts(paths: Iterable[Path]) -> list[str]:
    """Responses in files of JSON lines, such as the corpus of ``build_tiny.py``, whole prompts included if plain."""
    texts = []
    for path in paths:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            chat = path.name.startswith("chat")
            responses = row.get("responses") or [row["response"]]
            texts += [text.strip() if chat else row["prompt"] + text for text in responses]
    return texts


def word_list(texts: Iterable[str], least: int, vocabulary: Iterable[str]) -> list[str]:
    """Lower-case words in at least ``least`` of the texts, and those that are one token of a model's vocabulary.

    Sorted. No single letters but a and i; none shorter than four from the vocabulary, where many are half a word.
    """
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update({w for part in sentences(text) for w in part if w.isalpha() or "'" in w})
    said = {w for w, n in counts.items() if n >= least and w.isascii() and (len(w) > 1 or w in "ai")}
    return sorted(said | {w for w in vocabulary if re.fullmatch("[a-z]{4,}", w)})


def triple_list(texts: Iterable[str], n_frequent: int, least: int) -> tuple[list[str], list[str]]:
    """(words that get a class for themselves, triples of adjacent word classes that occur in ``texts``).

    These words are the ``n_frequent`` most frequent ones, and the function words that occur at least ``least`` times.
    """
    parsed = [sentences(text) for text in texts]
    counts = collections.Counter(
        w for parts in parsed for part in parts for w in part if w.isascii() and w[0].isalpha()
    )
    words = [w for w, _ in counts.most_common(n_frequent)] + [w for w in FUNCTION_WORDS if counts[w] >= least]
    triples = {" ".join(triple) for parts in parsed for triple in word_triples(parts, frozenset(words))}
    return sorted(set(words)), sorted(filter(str.isascii, triples))


def write_gzip(path: Path, lines: Iterable[str]) -> None:
    """Writes ``lines`` so that equal text gives equal bytes."""
    write_bytes(path, gzip.compress("".join(line + "\n" for line in lines).encode(), compresslevel=9, mtime=0))


def build_language(texts: list[str], vocabulary: Iterable[str], out: Path) -> None:
    """Writes what the gold reward knows of English: ``words.txt.gz`` and ``triples.txt.gz``."""
    plain = [text.translate(ASCII) for text in texts]
    write_gzip(out / "words.txt.gz", word_list(plain, 3, vocabulary))
    words, triples = triple_list(plain, n_frequent=150, least=100)
    write_gzip(out / "triples.txt.gz", [" ".join(words), *triples])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a short name of the project, a folder or a hub id")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ASSETS / "reviews.jsonl.gz")
    parser.add_argument("--samples", type=Path, help="file of raw samples, read where it exists and written otherwise")
    parser.add_argument(
        "--text", type=Path, help="folder of build_tiny.py's corpus: rebuilds words.txt.gz and triples.txt.gz"
    )
    parser.add_argument("--prompts", type=int, default=640)
    parser.add_argument("--responses", type=int, default=6, help="K, responses kept per prompt")
    parser.add_argument("--draws", type=int, default=8, help="samples drawn per prompt, of which K are kept")
    parser.add_argument("--temperature", type=float, default=0.85)
    args = parser.parse_args()
    drawn = openings(args.prompts + args.prompts // 10, args.seed)
    if args.samples and args.samples.exists():
        rows = [json.loads(line) for line in args.samples.read_text().splitlines()]
    else:
        prompts = list(drawn)
        rows = sample(prompts, args.model, args.draws, args.seed, args.temperature)
        if args.samples:
            write_text(args.samples, "".join(json.dumps(row) + "\n" for row in rows))
    if args.text:
        # In byte-level BPE a token that starts a word starts with the sign for a space.
        whole_words = [t[1:] for t in load(args.model)[1].get_vocab() if t.startswith("\u0120")]
        build_language(read_texts(sorted(args.text.glob("*.jsonl"))), whole_words, ASSETS)
    chosen = [(row["prompt"], choose(row["responses"], args.responses)) for row in rows]
    whole = [(prompt, responses) for prompt, responses in chosen if len(responses) == args.responses][: args.prompts]
    data = simulate_preferences([prompt for prompt, _ in whole], [responses for _, responses in whole], seed=args.seed)
    write_native([replace(row, group=drawn[prompt_text(row.prompt)]) for row in data], args.out)
    print(f"{len(data)} prompts, {args.out.stat().st_size} bytes, annotators agree on {agreement(data):.3f} of pairs")


if __name__ == "__main__":
    main()
