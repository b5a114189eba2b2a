"""Texts that are the same but for case, punctuation and a few words."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, triu

from toolkit.evals.distinct import first_of_equals

# Scripts without blanks count by the character. Of the signs those stay that change what a text asks: 2 + 2, C#.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+|[^\w\s.,!?;:'\"()\[\]{}\u2026\u2018-\u201f\u00ab\u00bb-]"
)
SHINGLE = 3  # words
SIMILAR = 0.8  # Jaccard
CONTAINED = 0.95  # share of the shorter text's shingles that the longer one has
SHORTEST_PART = 0.5  # of the longer text, that the shorter one must be to count as contained
FEWEST = 4  # shingles of a text that is compared by them
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # between the words of a shingle's hash: 2**64 over the golden ratio, odd
CHARACTERS = 1 << 20  # of texts that are looked at together
CELLS = 1 << 21  # of the products of texts that are held at once
COMMON, COMMON_SHARE = 10, 0.01  # texts, or share of them, in which a shingle is taken for a form's fixed words


@dataclass(frozen=True)
class NearDuplicate:
    """Two texts by their places, ``first`` < ``second``, and how alike they are: 1 for the same words."""

    first: int
    second: int
    similarity: float


def near_duplicates(texts: Iterable[str]) -> list[NearDuplicate]:
    """Pairs of texts with the same words, or with nearly the same three-word sequences (Jaccard of at least 0.8).

    A text that holds nearly all of a shorter one of at least half its length counts, too. Sequences that many texts
    share are a form's fixed words: the others must be alike by themselves as well. Of more than two texts with the same
    words, each is paired with the first.

    Texts are looked at as they come; 8 bytes of each sequence of a text stay in memory.

    >>> near_duplicates(["Name the capital of Chad!", "name the capital of  Chad", "Name the capital of Mali!"])
    [NearDuplicate(first=0, second=1, similarity=1.0)]
    """
    words, sizes, found = array("q"), array("q"), array("Q")  # a hash of each text's words, and of each of its shingles
    for chunk in _chunks(texts):
        keys, n_keys = _shingles(chunk, words)
        sizes.extend(n_keys.tolist())
        found.frombytes(keys.tobytes())
    firsts, which = first_of_equals(np.frombuffer(words, np.int64))
    repeats = np.flatnonzero(firsts[which] != np.arange(len(which)))
    pairs = [NearDuplicate(int(firsts[which[place]]), int(place), 1.0) for place in repeats]
    pairs += _by_shingles(np.frombuffer(found, np.uint64), np.frombuffer(sizes, np.int64), firsts)
    return sorted(pairs, key=lambda pair: (pair.second, pair.first))


def _by_shingles(found: NDArray[np.uint64], sizes: NDArray[np.int64], places: NDArray[np.int64]) -> list[NearDuplicate]:
    """The near pairs among the texts at these places. ``found`` has the shingles of all texts, ``sizes`` how many of
    them each text has.
    """
    is_asked = np.zeros(len(sizes), dtype=bool)
    is_asked[places] = True
    found, sizes = found[np.repeat(is_asked, sizes)], sizes[places]
    shingles = _shared(found, sizes)
    n_texts = np.asarray(shingles.sum(axis=0)).ravel()
    is_rare = n_texts <= max(COMMON, COMMON_SHARE * len(places))
    n_common = np.asarray(shingles[:, ~is_rare].sum(axis=1)).ravel()
    rare = shingles[:, is_rare]
    texts_of = rare.T.tocsr()
    near_pairs = [np.zeros((2, 0), dtype=np.int64)]
    for start, end in _blocks(rare @ n_texts[is_rare]):
        alike = triu(rare[start:end] @ texts_of, k=start + 1).tocoo()
        i, j = alike.row.astype(np.int64) + start, alike.col.astype(np.int64)
        near, _ = _near(sizes - n_common, i, j, alike.data)
        near_pairs.append(np.stack([i[near], j[near]]))
    i, j = np.concatenate(near_pairs, axis=1)
    near, jaccard = _near(sizes, i, j, np.asarray(shingles[i].multiply(shingles[j]).sum(axis=1)).ravel())
    return [
        NearDuplicate(int(a), int(b), float(similarity))
        for a, b, similarity in zip(places[i[near]], places[j[near]], jaccard[near], strict=True)
    ]


def _blocks(cells: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Where blocks of texts start and end: ``cells`` (n,) are those that each text has among its products with others.

    So many products are in memory at once, and not those of all texts.
    """
    if not len(cells):
        return
    starts = np.unique(np.cumsum(cells) // CELLS, return_index=True)[1].tolist()
    yield from zip(starts, [*starts[1:], len(cells)], strict=True)


def _near(
    sizes: NDArray[np.int64], i: NDArray[np.int64], j: NDArray[np.int64], shared: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Which pairs (i, j) are near by the shingles that they share, and their Jaccard similarity."""
    smaller, larger = np.minimum(sizes[i], sizes[j]), np.maximum(sizes[i], sizes[j])
    jaccard = shared / np.maximum(1.0, sizes[i] + sizes[j] - shared)
    contained = (shared >= CONTAINED * smaller) & (smaller >= SHORTEST_PART * larger)
    return (smaller >= FEWEST) & ((jaccard >= SIMILAR) | contained), jaccard


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts, as many at once as memory should hold."""
    chunk: list[str] = []
    n_characters = 0
    for text in texts:
        chunk.append(text)
        n_characters += len(text)
        if n_characters >= CHARACTERS:
            yield chunk
            chunk, n_characters = [], 0
    if chunk:
        yield chunk


def _shingles(texts: Sequence[str], of_words: array[int]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """A hash of each shingle of each text once, and how many of them each text has (n_texts,).

    A hash of all words of each text is added to ``of_words``.
    """
    hashes, lengths = array("q"), np.zeros(len(texts), dtype=np.int64)
    for k, text in enumerate(texts):
        words = _WORD.findall(text.casefold())
        hashes.extend(map(hash, words))
        lengths[k] = len(words)
        of_words.append(hash(tuple(words or [text])))
    flat = np.frombuffer(hashes, np.uint64)
    owner = np.repeat(np.arange(len(texts)), lengths)
    n = max(0, len(flat) - SHINGLE + 1)
    key = np.zeros(n, dtype=np.uint64)
    for offset in range(SHINGLE):
        key = key * FACTOR + flat[offset : offset + n]  # it wraps around
    inside = owner[:n] == owner[SHINGLE - 1 : SHINGLE - 1 + n]
    key, owner = key[inside], owner[:n][inside]
    order = np.lexsort((key, owner))
    key, owner = key[order], owner[order]
    again = np.zeros(len(key), dtype=bool)
    again[1:] = (key[1:] == key[:-1]) & (owner[1:] == owner[:-1])
    return key[~again], np.bincount(owner[~again], minlength=len(texts))


def _shared(found: NDArray[np.uint64], sizes: NDArray[np.int64]) -> csr_matrix:
    """(texts, shingles) with 1 where a text has a shingle, of the shingles that several texts have.

    ``found`` has the shingles of one text after the other, ``sizes`` (n_texts,) how many each has.
    """
    ordered = np.sort(found)
    shared = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    column = np.searchsorted(shared, found)
    is_shared = shared[np.minimum(column, len(shared) - 1)] == found if len(shared) else np.zeros(len(found), bool)
    kept = np.concatenate([[0], np.cumsum(is_shared)])[np.concatenate([[0], np.cumsum(sizes)])]
    cells = np.ones(int(kept[-1]), dtype=np.int32)
    return csr_matrix((cells, column[is_shared], kept), shape=(len(sizes), max(1, len(shared))))
