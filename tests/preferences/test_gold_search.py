"""The gold reward of ``reviews`` cannot be won by one text for all openings: a search for such a text stays behind."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from toolkit.preferences.domains import domains
from toolkit.preferences.gold import FUNCTION_WORDS, gold_reward, known_words, sentences
from toolkit.preferences.gold import _analyzer as analyzer
from toolkit.preferences.reading import read_preferences

TEMPLATES = (
    " {a}, and the {s} and the {t} were {b}.",
    " the {s} was {a}, and I loved the {t}.",
    " {a}. The {s} was {b} and the {t} was {c}.",
    " a {a} {s} with a {b} {t}, and I would love to go back.",
    " the best {s} with {a} {t}.",
    " I hated the {s}, but the {t} was {a}.",
    " great, and I would love to go back there again.",
)


@pytest.fixture(scope="module")
def rows():  # type: ignore[no-untyped-def]
    return read_preferences("reviews").rows


def mean_gold(text: str, prompts: Sequence[str]) -> float:
    return sum(gold_reward(prompt, text) for prompt in prompts) / len(prompts)


def as_text(words: Sequence[str]) -> str:
    return " " + " ".join(words).replace(" ,", ",").replace(" .", ".") + "."


def climb(text: str, pools: Sequence[Sequence[str]], prompts: Sequence[str], steps: int, rng: random.Random) -> str:
    """Hill-climbing: replaces, inserts, removes or swaps a word as long as the mean gold reward rises."""
    words, best = text.strip(" .").split(), mean_gold(text, prompts)
    for _ in range(steps):
        changed, i, move = list(words), rng.randrange(len(words)), rng.random()
        word = rng.choice(rng.choice(pools))
        if move < 0.45:
            changed[i] = word
        elif move < 0.75:
            changed.insert(i, word)
        elif move < 0.9 and len(words) > 4:
            del changed[i]
        else:
            j = rng.randrange(len(words))
            changed[i], changed[j] = changed[j], changed[i]
        value = mean_gold(as_text(changed), prompts)
        if value > best:
            words, best = changed, value
    return as_text(words)


def test_a_search_finds_no_text_that_fits_every_opening(rows) -> None:  # type: ignore[no-untyped-def]
    """Constant texts of the data, templates of praise and subjects, and hill-climbing over words from the best."""
    rng = random.Random(0)
    prompts = [row.prompt for row in rows]
    few, some = rng.sample(prompts, 24), rng.sample(prompts, 60)
    counts = Counter(w for row in rows for text in row.responses for part in sentences(text) for w in part)
    lexicon = analyzer().lexicon
    praise = [w for w, _ in counts.most_common() if lexicon.get(w, 0) > 1.5 and w in known_words() and w.isalpha()][:60]
    sharing = Counter(word for domain in domains().values() for word in domain.words)
    subjects = sorted(word for word, n in sharing.items() if n >= 2)
    glue = sorted(FUNCTION_WORDS, key=lambda w: -counts[w])[:60]
    texts = rng.sample([text for row in rows for text in row.responses], 300)
    for _ in range(400):
        a, b, c = rng.sample(praise, 3)
        s, t = rng.sample(subjects, 2)
        texts.append(rng.choice(TEMPLATES).format(a=a, b=b, c=c, s=s, t=t))
    starts = sorted(texts, key=lambda text: -mean_gold(text, few))[:3]
    ends = [climb(text, [praise, subjects, glue, [",", "."]], some, 300, rng) for text in starts]
    best = max(mean_gold(text, prompts) for text in (*starts, *ends))
    best_of_six = sum(max(row.gold) for row in rows) / len(rows)
    data = sum(sum(row.gold) / len(row.gold) for row in rows) / len(rows)
    assert data < best < 0.5 * best_of_six, (starts, ends)


def test_the_sentence_that_once_won_everywhere_does_not(rows) -> None:  # type: ignore[no-untyped-def]
    rewards = [gold_reward(row.prompt, " great, and I would love to go back there again.") for row in rows]
    best_of_six = [max(row.gold) for row in rows]
    assert sum(rewards) / len(rewards) < 0.1 < 0.2 < sum(best_of_six) / len(rows)
