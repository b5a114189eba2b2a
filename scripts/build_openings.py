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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Family:
    """What one kind of review is about: ``things`` are reviewed, ``kinds`` liked or disliked, ``aspects`` judged."""

    did: str
    doing: str
    preposition: str
    things: tuple[str, ...]
    kinds: tuple[str, ...]
    aspects: tuple[str, ...]


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("|"))


FAMILIES = {
    "film": Family(
        "watched", "watching", "of",
        _split("Harbour Lights|The Long Winter|the new horror film|the remake of Silver Road|Two Brothers|the last "
               "film in the series|The Clockmaker's Daughter|Midnight Ferry|the documentary about whales|Paper Moon "
               "Street|the film about the chess player|A Quiet Season"),
        _split("horror films|romantic comedies|war films|musicals|long documentaries|superhero films|silent films"),
        _split("ending|plot|music|dialogue|lead actor|first half|photography|pacing|script"),
    ),
    "series": Family(
        "watched", "watching", "of",
        _split("the second season of Night Shift|Island Court|the new detective series|The Baker Family|the final "
               "season of Cold Harbour|Ten Days in Rome|the cooking show on Channel Four|the space series"),
        _split("crime series|reality shows|hospital dramas|cooking shows|long series"),
        _split("first episode|cast|story|humour|ending|writing|host"),
    ),
    "book": Family(
        "read", "reading", "of",
        _split("The Glass Orchard|Letters from the North|the new novel by Anna Reed|A Short History of Salt|the "
               "second book in the trilogy|The Lighthouse Keeper|Bread and Rain|the biography of the composer|My "
               "Brother's Garden|the cookbook"),
        _split("crime novels|historical novels|self-help books|short stories|fantasy novels|biographies"),
        _split("main character|ending|first chapter|style|story|translation|plot|last part"),
    ),
    "restaurant": Family(
        "ate at", "eating at", "at",
        _split("Mario's Kitchen|the Blue Door|the noodle bar on Mill Street|Casa Verde|the new burger place|the "
               "Old Mill|Saffron House|the sushi place near the station|Green Table|the pizza place by the river|"
               "Lotus Garden"),
        _split("Italian restaurants|buffets|fast food places|vegan restaurants|seafood restaurants|steak houses"),
        _split("food|service|waiter|soup|fish|dessert|menu|atmosphere|pasta|wine list"),
    ),
    "cafe": Family(
        "stopped at", "stopping at", "at",
        _split("the Corner Cafe|Bean and Leaf|the coffee shop next to the library|Rose Bakery|the tea room in the "
               "park|the cafe on the third floor|Sunday Bread"),
        _split("busy cafes|tea rooms|chain coffee shops|bakeries"),
        _split("coffee|cake|staff behind the counter|breakfast|seating|price of the bread|music"),
    ),
    "hotel": Family(
        "stayed at", "staying at", "at",
        _split("the Harbour Inn|Hotel Miramar|the Grand Station Hotel|the Seaview Lodge|the Pine Tree Motel|the "
               "Old Castle Hotel|the Riverside Hostel|the Palm Beach Resort|the Airport Inn|Villa Rosa"),
        _split("big hotels|hostels|beach resorts|airport hotels|small guest houses"),
        _split("room|breakfast|bed|front desk|pool|view|bathroom|parking|location|wifi"),
    ),
    "phone": Family(
        "bought", "buying", "on",
        _split("the Nova 7|the Pixar X phone|my new phone|the Lumen Mini|the cheap phone from Orbit|the Atlas 5|the "
               "folding phone from Vero|the Kite 3"),
        _split("big phones|folding phones|cheap phones|phones without buttons"),
        _split("battery|camera|screen|speaker|charger|fingerprint reader|software|sound"),
    ),
    "headphones": Family(
        "tried", "trying", "on",
        _split("the Echo Air headset|my new wireless headset|the Sonora headset|the pair of running earbuds|the "
               "Studio 40|the noise cancelling headset from Vero|the cheap pair of earbuds"),
        _split("wireless headphones|earbuds|heavy headsets"),
        _split("sound|battery|fit|case|microphone|bass|cable|volume control"),
    ),
    "laptop": Family(
        "ordered", "ordering", "on",
        _split("the Aero 14 laptop|the Stone Pro|my work laptop|the new tablet from Orbit|the cheap gaming laptop|the "
               "Feather 13|the refurbished laptop"),
        _split("gaming laptops|tablets|small laptops|refurbished computers"),
        _split("keyboard|screen|fan|battery|trackpad|hinge|webcam|performance"),
    ),
    "game": Family(
        "played", "playing", "in",
        _split("Dragon Valley|the new racing game|Star Harvest|the sequel to Iron Keep|the farming game|Puzzle "
               "Castle|the board game Trade Winds|Lost Signal"),
        _split("racing games|puzzle games|strategy games|long role-playing games|card games"),
        _split("story|combat|music|tutorial|controls|map|final level|multiplayer mode"),
    ),
    "kitchen": Family(
        "used", "using", "of",
        _split("the Bravo blender|my new coffee machine|the air fryer from Hearth|the Solid knife set|the rice "
               "cooker|the cast iron pan|the Mixwell food processor|the glass kettle"),
        _split("kitchen gadgets|blenders|air fryers|coffee machines"),
        _split("handle|lid|motor|instruction book|design|timer|noise|build quality"),
    ),
    "travel": Family(
        "flew with", "flying with", "on",
        _split("Northern Air|the morning flight to Lisbon|the budget airline|the direct flight to Osaka|Coastal "
               "Airways|the evening flight to Denver"),
        _split("night flights|budget airlines|long flights|early flights"),
        _split("crew|seat|food|boarding|legroom|entertainment|check-in"),
    ),
    "train": Family(
        "took", "taking", "on",
        _split("the night train to Vienna|the ferry to the island|the express bus to the airport|the tour bus|the "
               "slow train along the coast|the river cruise"),
        _split("night trains|bus tours|ferries|guided tours"),
        _split("seat|guide|driver|ticket office|view|heating|timetable"),
    ),
    "museum": Family(
        "visited", "visiting", "at",
        _split("the Maritime Museum|the City Gallery|the science museum|the old castle|the botanical garden|the zoo "
               "outside town|the toy museum|the water park"),
        _split("art museums|zoos|science museums|water parks|crowded museums"),
        _split("entrance|audio guide|main exhibition|gift shop|ticket price|garden|staff"),
    ),
    "concert": Family(
        "went to", "going to", "at",
        _split("the jazz festival|the concert in the park|the play at the Royal Theatre|the comedy night at "
               "Benny's|the school musical|the symphony on Friday|the magic show"),
        _split("loud concerts|plays|comedy nights|outdoor festivals|operas"),
        _split("sound|singer|band|crowd|stage|opening act|lighting|second act"),
    ),
    "course": Family(
        "took", "taking", "in",
        _split("the online photography course|the pottery class|the Spanish course at the library|the yoga class on "
               "Main Street|the driving course|the swimming course|the evening cooking class"),
        _split("online courses|group classes|yoga classes|evening classes"),
        _split("teacher|material|schedule|first lesson|classroom|price|homework"),
    ),
    "clothes": Family(
        "ordered", "ordering", "of",
        _split("the wool coat|the pair of hiking boots|the running shirt from Swift|the rain jacket|the leather bag|"
               "the pair of blue jeans|the summer dress|the winter hat"),
        _split("online clothes shops|outdoor clothes|expensive clothes|second-hand clothes"),
        _split("fit|colour|zip|material|sole|stitching|size|delivery"),
    ),
    "service": Family(
        "called", "calling", "at",
        _split("the plumber from Quick Fix|the moving company|Bright Dental|the hair salon on Park Road|the bike "
               "repair shop|the local garage|the dog groomer|the cleaning company"),
        _split("local businesses|small firms|expensive repairs|appointments"),
        _split("receptionist|bill|waiting time|young man|owner|price|woman on the phone"),
    ),
}  # fmt: skip

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


def _fill(template: str, family: Family, rng: random.Random) -> str:
    who = rng.choice(WHO)
    text = template.format(
        did=family.did, doing=family.doing, preposition=family.preposition, thing=rng.choice(family.things),
        kinds=rng.choice(family.kinds), aspect=rng.choice(family.aspects), when=rng.choice(WHEN), who=who,
        Who=who[0].upper() + who[1:],
    )  # fmt: skip
    return text[0].upper() + text[1:]


def openings(count: int, seed: int, exclude: Sequence[str] = ()) -> list[str]:
    """``count`` distinct openings of 6 to 16 words; half are neutral, a quarter each praises or complains.

    None of ``exclude`` is among them. Raises ValueError where the templates give fewer.
    """
    rng = random.Random(f"openings {seed}")
    seen, out, tries = set(exclude), [], 0
    while len(out) < count:
        tries += 1
        if tries > 100 * count + 1000:
            raise ValueError(f"the templates gave only {len(out)} of {count} distinct openings")
        opinion = rng.choice(("neutral", "neutral", "positive", "negative"))
        family = FAMILIES[rng.choice(sorted(FAMILIES))]
        text = _fill(rng.choice(OPINIONS[opinion]), family, rng)
        if text in seen or not 6 <= len(text.split()) <= 16:
            continue
        seen.add(text)
        out.append(text)
    return out


def requests(count: int, seed: int, exclude: Sequence[str] = ()) -> list[str]:
    """``count`` things that a user may ask, with repeats; one in four is general. None quotes one of ``exclude``."""
    rng = random.Random(f"requests {seed}")
    excluded = set(exclude)
    out: list[str] = []
    while len(out) < count:
        if rng.random() < 0.25:
            text = rng.choice(QUESTIONS)
        else:
            text = _fill(rng.choice(REQUESTS), FAMILIES[rng.choice(sorted(FAMILIES))], rng)
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
    sys.path.insert(0, str(REPO))
    from toolkit.models.load import load_policy
    from toolkit.models.resolve import resolve
    from toolkit.models.tokenizer import load_tokenizer
    from toolkit.recipe.schema import ModelSection

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
    texts = openings(args.count, args.seed)
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
