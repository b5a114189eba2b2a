"""Texts that are the same but for case, punctuation and a few words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, triu

# Scripts without blanks count by the character. Of the signs those stay that change what a text asks: 2 + 2, C#.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+|[^\w\s.,!?;:'\"()\[\]{}\u2026\u2018-\u201f\u00ab\u00bb-]"
)
SHINGLE = 3  # words
SIMILAR = 0.8  # Jaccard
CONTAINED = 0.95  # share of the shorter text's shingles that the longer one has
SHORTEST_PART = 0.5  # of the longer text, that the shorter one must be to count as contained
FEWEST = 4  # shingles of a text that is compared by them
CELLS = 1 << 23  # of the products of texts that are held at once
COMMON, COMMON_SHARE = 10, 0.01  # texts, or share of them, in which a shingle is taken for a form's fixed words


@dataclass(frozen=True)
class NearDuplicate:
    """Two texts by their places, ``first`` < ``second``, and how alike they are: 1 for the same words."""

    first: int
    second: int
    similarity: float


def near_duplicates(texts: Sequence[str]) -> list[NearDuplicate]:
    """Pairs of texts with the same words, or with nearly the same three-word sequences (Jaccard of at least 0.8).

    A text that holds nearly all of a shorter one of at least half its length counts, too. Sequences that many texts
    share are a form's fixed words: the others must be alike by themselves as well. Of more than two texts with the same
    words, each is paired with the first.

    >>> near_duplicates(["Name the capital of Chad!", "name the capital of  Chad", "Name the capital of Mali!"])
    [NearDuplicate(first=0, second=1, similarity=1.0)]
    """
    known: dict[str, str] = {}  # a word is in memory once
    words = [tuple([known.setdefault(word, word) for word in _WORD.findall(text.casefold())]) for text in texts]
    first_place: dict[tuple[str, ...], int] = {}
    pairs = []
    for place, of_text in enumerate(words):
        first = first_place.setdefault(of_text or (texts[place],), place)
        if first != place:
            pairs.append(NearDuplicate(first, place, 1.0))
    distinct = sorted(first_place.values())
    pairs += _by_shingles([words[place] for place in distinct], np.array(distinct, dtype=np.int64))
    return sorted(pairs, key=lambda pair: (pair.second, pair.first))


def _by_shingles(words: Sequence[tuple[str, ...]], places: NDArray[np.int64]) -> list[NearDuplicate]:
    shingles = _shingles(words)
    n_texts = np.asarray(shingles.sum(axis=0)).ravel()
    is_rare = n_texts <= max(COMMON, COMMON_SHARE * len(words))
    rare = shingles[:, is_rare]
    texts_of = rare.T.tocsr()
    near_pairs = [np.zeros((2, 0), dtype=np.int64)]
    for start, end in _blocks(rare @ n_texts[is_rare]):
        alike = triu(rare[start:end] @ texts_of, k=start + 1).tocoo()
        i, j = alike.row.astype(np.int64) + start, alike.col.astype(np.int64)
        near, _ = _near(rare, i, j, alike.data)
        near_pairs.append(np.stack([i[near], j[near]]))
    i, j = np.concatenate(near_pairs, axis=1)
    near, jaccard = _near(shingles, i, j, np.asarray(shingles[i].multiply(shingles[j]).sum(axis=1)).ravel())
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
    shingles: csr_matrix, i: NDArray[np.int64], j: NDArray[np.int64], shared: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Which pairs (i, j) are near by the shingles that they share, and their Jaccard similarity."""
    sizes = np.asarray(shingles.sum(axis=1)).ravel()
    smaller, larger = np.minimum(sizes[i], sizes[j]), np.maximum(sizes[i], sizes[j])
    jaccard = shared / np.maximum(1.0, sizes[i] + sizes[j] - shared)
    contained = (shared >= CONTAINED * smaller) & (smaller >= SHORTEST_PART * larger)
    return (smaller >= FEWEST) & ((jaccard >= SIMILAR) | contained), jaccard


def _shingles(words: Sequence[tuple[str, ...]]) -> csr_matrix:
    """(texts, shingles) with 1 where a text has a shingle."""
    ids: dict[str, int] = {}
    flat = np.array([ids.setdefault(word, len(ids)) for of_text in words for word in of_text], dtype=np.int64)
    lengths = np.array([len(of_text) for of_text in words], dtype=np.int64)
    owner = np.repeat(np.arange(len(words)), lengths)
    size = len(ids) + 1
    n = max(0, len(flat) - SHINGLE + 1)
    key = np.zeros(n, dtype=np.int64)
    for offset in range(SHINGLE):
        key = key * np.int64(size) + flat[offset : offset + n]  # may wrap around: two shingles then share a number
    inside = owner[:n] == owner[SHINGLE - 1 : SHINGLE - 1 + n]
    _, shingle = np.unique(key[inside], return_inverse=True)
    n_shingles = int(shingle.max()) + 1 if len(shingle) else 1
    cells = np.unique(owner[:n][inside] * n_shingles + shingle.ravel())  # each shingle of a text once
    rows, columns = np.divmod(cells, n_shingles)
    return csr_matrix((np.ones(len(rows), dtype=np.int32), (rows, columns)), shape=(len(words), n_shingles))
