"""Openings of short reviews, and samples that continue them: what `build_reviews.py` and `build_tiny.py` share.

Run alone, it prints openings: ``python scripts/build_openings.py --count 20``.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from toolkit.preferences.domains import Domain, domains

REPO = Path(__file__).resolve().parent.parent


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("|"))


WHEN = _split(
    "last night|last week|on Saturday|yesterday|in March|two days ago|on our holiday|over the weekend|last month"
)
WHO = _split("my sister|my husband|my wife|a friend|my brother|my parents|a colleague|my son|my neighbour")

NEUTRAL = _split(
    "I {did} {thing} {when}, and|We {did} {thing} {when} and|The first thing I noticed about {thing} was|"
    "The {aspect} {preposition} {thing} was|After {doing} {thing} {when}, I think|"
    "{Who} told me about {thing}, and {when} we|If you are thinking about {doing} {thing}, you should know that|"
    "What I remember most about {thing} is|It was my first time {doing} {thing}, and|"
    "Here is my honest opinion of {thing}: the {aspect} is|I {did} {thing} with {who}, and we both thought|"
    "I {did} {thing} {when}, and the {aspect} was|In my opinion, the {aspect} {preposition} {thing} is|"
    "{Who} and I {did} {thing} {when}. The {aspect} was|We did not know what to expect from {thing}, but|"
    "{Who} asked me what {thing} was like, and I said that it was|I would say that {thing} is"
)
POSITIVE = _split(
    "I usually love {kinds}, and {thing} was|I have always been a fan of {kinds}, and {thing} is|"
    "I really enjoyed {doing} {thing} because|The {aspect} {preposition} {thing} was wonderful, and|"
    "{Who} always loved {kinds}, and {thing} was|I was very happy with {thing}, and the {aspect} was|"
    "We had a great time {doing} {thing}, and|I am so glad that we {did} {thing}, because|"
    "I like {kinds} very much, and I thought that {thing} was|"
    "The {aspect} {preposition} {thing} is the best I know, and"
)
NEGATIVE = _split(
    "I usually hate {kinds}, but {thing} was|I usually hate {kinds}, and {thing} was|"
    "I was disappointed by {thing} {when} because|The {aspect} {preposition} {thing} was terrible, and|"
    "I do not like {kinds} at all, and {thing} was|I was angry about {thing}, and the {aspect} was|"
    "We had a bad time {doing} {thing}, and|I am sorry that we {did} {thing}, because|"
    "{Who} always hated {kinds}, and {thing} was|The {aspect} {preposition} {thing} is the worst I know, and"
)
OPINIONS = {"neutral": NEUTRAL, "positive": POSITIVE, "negative": NEGATIVE}

QUOTING = "Complete this review: "
REQUESTS = _split(
    "Write one sentence about {thing}.|Write a short review of {thing}.|What do you think of {thing}?|"
    "Tell me in one sentence what people say about {thing}.|Is the {aspect} {preposition} {thing} good?|"
    "How was the {aspect} {preposition} {thing}?|Give me a reason to like {kinds}.|"
    "Why do some people dislike {kinds}?|"
    "What should I know before {doing} {thing}?|Do you like {kinds}?|"
    "Describe the {aspect} {preposition} {thing} briefly.|"
    "Complete this review: I {did} {thing} {when}, and|Complete this review: The {aspect} {preposition} {thing} was"
)
QUESTIONS = _split(
    "What is the capital of France?|Why is the sky blue?|How do I boil an egg?|What is a good name for a dog?|"
    "Tell me a fact about the moon.|How are you today?|What do bees make?|What is the largest ocean?|"
    "How many days are in a week?|Give me a tip for sleeping well.|What is water made of?|"
    "Why do leaves fall in autumn?|"
    "What can I cook with rice?|Tell me something about elephants.|What is a good gift for a friend?|How do birds fly?|"
    "What is the opposite of hot?|Say hello.|What is your favourite season?|How do I learn a new language?|"
    "What does a doctor do?|Where do penguins live?|What is music?|Why should I read books?|Thank you for your help."
)


def _fill(template: str, domain: Domain, rng: random.Random) -> str:
    who = rng.choice(WHO)
    text = template.format(
        did=domain.did, doing=domain.doing, preposition=domain.preposition, thing=rng.choice(domain.things),
        kinds=rng.choice(domain.kinds), aspect=rng.choice(domain.aspects), when=rng.choice(WHEN), who=who,
        Who=who[0].upper() + who[1:],
    )  # fmt: skip
    return text[0].upper() + text[1:]


def openings(count: int, seed: int, exclude: Iterable[str] = ()) -> dict[str, str]:
    """``count`` distinct openings of 6 to 16 words, and the template of each; half are neutral, a quarter each praises
    or complains.

    None of ``exclude`` is among them. Raises ValueError where the templates give fewer.
    """
    rng = random.Random(f"openings {seed}")
    seen, tries = set(exclude), 0
    out: dict[str, str] = {}
    while len(out) < count:
        tries += 1
        if tries > 100 * count + 1000:
            raise ValueError(f"the templates gave only {len(out)} of {count} distinct openings")
        opinion = rng.choice(("neutral", "neutral", "positive", "negative"))
        domain = domains()[rng.choice(sorted(domains()))]
        template = rng.choice(OPINIONS[opinion])
        text = _fill(template, domain, rng)
        if text in seen or not 6 <= len(text.split()) <= 16:
            continue
        seen.add(text)
        out[text] = template
    return out


def requests(count: int, seed: int, exclude: Iterable[str] = ()) -> list[str]:
    """``count`` things that a user may ask, with repeats; one in four is general. None quotes one of ``exclude``."""
    rng = random.Random(f"requests {seed}")
    excluded = set(exclude)
    out: list[str] = []
    while len(out) < count:
        if rng.random() < 0.25:
            text = rng.choice(QUESTIONS)
        else:
            text = _fill(rng.choice(REQUESTS), domains()[rng.choice(sorted(domains()))], rng)
        if text.removeprefix(QUOTING) not in excluded:
            out.append(text)
    return out


ABBREVIATIONS = frozenset(_split("mr|mrs|ms|dr|st|vs|etc|no|jr|sr|prof|e.g|i.e|a.m|p.m|u.s"))
_END = re.compile(r"""(?P<word>\S*?)(?P<mark>[.!?]+)(?P<close>["')\]]*)(?=\s|$)""")


def sentence_ends(text: str) -> list[int]:
    """Offsets just behind each sentence end in ``text``; dots of abbreviations, initials and ellipses are none."""
    ends = []
    for match in _END.finditer(text):
        word = match["word"].lower().lstrip("\"'([")
        if match["mark"] == "." and (word in ABBREVIATIONS or (len(word) == 1 and word.isalpha() and word != "i")):
            continue
        if match["mark"].startswith(".."):
            continue
        ends.append(match.end())
    return ends


def cut(text: str, n_sentences: int) -> str:
    """``text`` up to its ``n_sentences``-th sentence end, its last one if it has fewer, all if it has none.

    Nothing behind a line break is kept.
    """
    text = text.split("\n", 1)[0].rstrip()
    ends = sentence_ends(text)
    return text[: ends[min(n_sentences, len(ends)) - 1]] if ends else text


def load(model: str):  # type: ignore[no-untyped-def]
    """Model and tokenizer by a short name of this project, a folder or a hub id."""
    from toolkit.models.load import load_policy
    from toolkit.models.resolve import resolve
    from toolkit.models.tokenizer import load_tokenizer
    from toolkit.recipe.training import ModelSection

    ref = resolve(model)
    return load_policy(ref, ModelSection(name=model)), load_tokenizer(ref)


def continuations(
    model,  # type: ignore[no-untyped-def]
    tokenizer,  # type: ignore[no-untyped-def]
    prompts: Sequence[str],
    n_sentences: Sequence[int],
    *,
    seed: int,
    temperature: float = 0.9,
    max_new_tokens: int = 40,
    batch_size: int = 128,
) -> Iterator[tuple[int, str]]:
    """Samples one continuation per prompt and yields (index into prompts, text), cut behind sentence ``n_sentences``.

    A row leaves the batch as soon as its text has that many sentence ends, which saves forward passes. Sampling
    inverts the cumulative distribution: it needs one uniform number per row and step, torch.multinomial one per token
    of the vocabulary.
    """
    import numpy as np
    import torch
    from transformers import DynamicCache

    ends = model.generation_config.eos_token_id
    stops = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id, tokenizer.pad_token_id}
    encoded = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
    rng = np.random.default_rng([seed, len(prompts)])
    order = sorted(range(len(prompts)), key=lambda i: (len(encoded[i]), i))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for batch in batches:
        width = max(len(encoded[i]) for i in batch)
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for row, i in enumerate(batch):
            ids[row, width - len(encoded[i]) :] = torch.tensor(encoded[i])
            mask[row, width - len(encoded[i]) :] = 1
        live = list(batch)  # prompts whose rows are in the batch still
        sampled: dict[int, list[int]] = {i: [] for i in batch}
        cache = DynamicCache(config=model.config)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        for _ in range(max_new_tokens):
            with torch.inference_mode():
                logits = model(
                    input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, logits_to_keep=1
                ).logits[:, -1]
                cdf = torch.softmax(logits.float() / temperature, dim=-1).cumsum(-1)
                u = torch.from_numpy(rng.random(len(live), dtype=np.float32))[:, None] * cdf[:, -1:]
                token = torch.searchsorted(cdf, u, right=True).clamp(max=cdf.shape[1] - 1)[:, 0]
            keep = []
            for row, (i, t) in enumerate(zip(live, token.tolist(), strict=True)):
                if t in stops:
                    yield i, cut(tokenizer.decode(sampled[i], skip_special_tokens=True), n_sentences[i])
                    continue
                sampled[i].append(t)
                text = tokenizer.decode(sampled[i])
                # One character behind the mark tells "3.5" and "e.g." from an end; a row pays one token for it.
                ended = len([e for e in sentence_ends(text) if e < len(text)]) >= n_sentences[i]
                if ended or "\n" in text.lstrip("\n") or text.startswith("\n") or len(sampled[i]) == max_new_tokens:
                    yield i, cut(text, n_sentences[i])
                else:
                    keep.append(row)
            if not keep:
                break
            if len(keep) < len(live):
                index = torch.tensor(keep)
                cache.batch_select_indices(index)
                mask, token, position = mask[index], token[index], position[index]
                live = [live[row] for row in keep]
            ids = token[:, None]
            mask = torch.cat([mask, mask.new_ones((len(live), 1))], dim=1)
            position = position[:, -1:] + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="continue each of them with this model (a folder, hub id or short name)")
    args = parser.parse_args()
    texts = list(openings(args.count, args.seed))
    if not args.model:
        print("\n".join(texts))
        return
    model, tokenizer = load(args.model)
    start = time.perf_counter()
    n_tokens = 0
    for i, text in continuations(model, tokenizer, texts, [1 + i % 2 for i in range(len(texts))], seed=args.seed):
        n_tokens += len(tokenizer(text)["input_ids"])
        print(texts[i], "|", text, flush=True)
    wall_s = time.perf_counter() - start
    print(f"{n_tokens / wall_s:.0f} tokens/s, {n_tokens / len(texts):.1f} a text, {math.ceil(wall_s)} s")


if __name__ == "__main__":
    main()
