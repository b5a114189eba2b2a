"""The gold reward: ordinary text is scored by its sentiment, and text that only looks good to a lexicon is not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.preferences.gold import (
    GENERIC,
    LEAST,
    MOST,
    ON_SUBJECT,
    gold_components,
    gold_reward,
    gold_rewards,
    known_words,
    sentiment,
)

PROMPT = "I stayed at the Harbour Inn last week, and it was"

COMPLAINT = "I was disappointed by the Harbour Inn last week because"
PRAISE_ON_SUBJECT = [
    (PROMPT, " clean and quiet, and I would love to sleep in that bed again."),
    ("We ate at the Blue Door last month and", " the best meal I have had in years, and our waiter was very friendly."),
    ("I would say that Paper Moon Street is", " a beautiful movie with a moving story."),
    (PROMPT, " the staff were kind and helpful, even late at night."),
    ("My sister and I stopped at Rose Bakery yesterday. The seating was", " lovely, with fresh bread and good coffee."),
    (PROMPT, " My kids loved the pool, and we had a great time."),
    ("Here is my honest opinion of the Echo Air headset: the case is", " perfect. The bass is amazing in my ears."),
    ("In my opinion, the legroom on Northern Air is", " great, and I was impressed by the friendly pilot."),
    (
        "We did not know what to expect from the zoo outside town, but",
        " the guide was funny, and we loved the animals.",
    ),
    (PROMPT, " \u201cThe best night of my life\u201d, as my son said \u2013 he loved the beach."),
]
GENERIC_PRAISE = [
    " wonderful. We will definitely come back next summer.",
    " I really enjoyed every part of it.",
    " great, and I would love to go back there again.",
    " perfect for a quiet evening with friends.",
    " great! I would recommend it to anyone.",
    " I was impressed by how fast it was.",
]
POSITIVE = [text for _, text in PRAISE_ON_SUBJECT] + GENERIC_PRAISE
NEUTRAL = [
    " on the second floor, next to the lift.",
    " it comes with a charger and a small bag.",
    " we went there on a Monday with my brother.",
    " about three hours long, and there is a break in the middle.",
    " the room had two beds and a window to the street.",
    " She asked us to wait at the table near the door.",
    " I bought it in March and use it twice a week.",
    " a large grey building near the station.",
]
NEGATIVE = [
    " the room was dirty and the staff were rude.",
    " a waste of money, and I will never go back.",
    " boring from start to finish, and the acting was awful.",
    " the food was cold and tasted terrible.",
    " not good at all. I was very disappointed.",
    " the worst service I have ever seen.",
    " broken when it arrived, and nobody answered my angry emails.",
]
DEGENERATE = [
    "",
    " ",
    " good",
    " good.",
    " Amazing!",
    " great",
    " great great great great",
    " great great great great.",
    " amazing. amazing. amazing.",
    " Amazing. Wonderful. Perfect. Lovely. Great.",
    " happy. I was. happy. It was. love. We were. great.",
    " great, wonderful, amazing, lovely, perfect, excellent, superb.",
    " great and wonderful and amazing and lovely and perfect and excellent.",
    " a great, wonderful, beautiful, perfect, amazing, lovely, charming and excellent happy place.",
    " I love the great best happy wonderful perfect amazing beautiful excellent fantastic hotel.",
    " happy happy joy joy love love win win.",
    " love peace joy happiness success win victory best free.",
    " winning winner wins win won wonderful wonder.",
    " love loved loving lovely lovable loves lovingly.",
    " beautiful beautifully beauty, beautiful beauty beautifully, beauty.",
    " yes yes yes, best best best, love love love.",
    " great food great staff great room great price great view.",
    " lovely lovely food, lovely lovely staff, lovely lovely room.",
    " Best best the best of the best of the best of the best.",
    " I love love love it!!!",
    " I love it I love it I love it I love it.",
    " I love it, I love it, I love it!",
    " I was happy and I was happy and I was happy.",
    " It was great. It was great.",
    " It was great. It was great. It was great.",
    " the food was great and the food was good and the food was nice.",
    " The food was great. The food was good. The food was nice. The food was lovely.",
    " the great and of wonderful it is amazing to the love was best.",
    " is the best great was a love happy the win perfect.",
    " i like i love i enjoy i adore i want.",
    " the the the the great the the the the.",
    " and and and I love and and and it and.",
    " it is it is it is it is good it is.",
    " very very very very good.",
    " so so so so so happy.",
    " wow wow wow wow wow wow.",
    " good good not bad good good not bad good.",
    " Thanks thanks thank you thanks so much thanks thank you.",
    " THIS WAS THE BEST HOTEL EVER AND I LOVE IT.",
    " I LOVED the GREAT food and the AMAZING staff.",
    " so good!!!!!!!!",
    " It was so good! I love it! The best! Wow! Great! Yes!",
    " great?!?!?!?! love?!?!",
    " ........ great ........",
    " \U0001f600\U0001f600\U0001f600\U0001f600\U0001f600",
    " I loved it \U0001f600\U0001f60d\U0001f389\U0001f389",
    " \u2764\u2764\u2764 the best hotel ever \u2764\u2764\u2764",
    " :) :) :) :) :D <3 <3",
    " **great** # best * love * perfect *",
    " <b>great</b> <i>love</i> {wonderful}",
    " great\nwonderful\namazing\nperfect\n",
    " 1. great 2. wonderful 3. amazing 4. perfect 5. best",
    " 100% 10/10 5/5 11/10 99.9%.",
    " xqzt blorf wumple great gnarfle zibble.",
    " asdfghjkl qwertyuiop great.",
    " gr8 gr8 gr8 l0ve l0ve.",
    " \u592a\u68d2\u4e86 \u592a\u68d2\u4e86 \u592a\u68d2\u4e86",
    " C'est magnifique et merveilleux, j'adore tout.",
]
PRAISE = "great wonderful love happy best beautiful perfect amazing excellent lovely enjoy nice fun"
GLUE = "the a and of to it is was in i that for my with we on so very this you they all"
SUSPECT = [  # not quite broken, but no match for an honest sentence
    " was great with love and with joy and with peace and with hope and with fun.",
    " best the love of happy a wonderful and to joy the perfect in smile.",
    " It was so good! I love it! The best!",
    " clean and quiet, and I would love to",
    " good food.",
    " I love it I love it.",
    " the best and the best and it was the best.",
]


@pytest.mark.parametrize(("prompt", "text"), PRAISE_ON_SUBJECT)
def test_praise_on_the_subject_scores_high(prompt: str, text: str) -> None:
    components = gold_components(prompt, text)
    assert 0.6 <= components.reward <= 1.0, components


@pytest.mark.parametrize("text", GENERIC_PRAISE)
def test_praise_that_fits_any_opening_scores_little(text: str) -> None:
    components = gold_components(PROMPT, text)
    assert 0.1 <= components.reward <= 0.3, components
    assert components.relevance == 0.0 and components.reward == pytest.approx(GENERIC * components.sentiment)


@pytest.mark.parametrize("text", POSITIVE)
def test_praise_loses_after_a_complaint_and_blame_wins(text: str) -> None:
    assert gold_components(COMPLAINT, text).stance == -1
    assert (
        gold_reward(COMPLAINT, text) < -0.1 < 0.1 < gold_reward(COMPLAINT, " the view was ugly and the food was awful.")
    )


def test_a_text_on_another_subject_scores_as_one_on_none() -> None:
    of_hotel = " great, with a soft bed and a helpful receptionist."
    rewards = [gold_reward(f"I would say that {name} is", of_hotel) for name in ("Villa Rosa", "Puzzle Castle")]
    assert rewards[0] > 0.4 and rewards[1] == pytest.approx(GENERIC * sentiment(of_hotel))


def test_words_of_other_domains_dilute_those_on_the_subject() -> None:
    one, mixed = (
        gold_components(PROMPT, text)
        for text in (" great, and the pool was lovely.", " great, and the pool, the actors and the bass were lovely.")
    )
    assert one.relevance == pytest.approx(0.7) and mixed.relevance == pytest.approx(0.7 / 3)


def test_what_the_opening_said_counts_neither_as_relevant_nor_as_sentiment() -> None:
    asked = "We had a great time at the new hotel, and the pool was"
    said, new = (gold_components(asked, f" {text}.") for text in ("great for a pool", "lovely for a balcony"))
    assert said.sentiment == said.relevance == 0.0
    assert new.sentiment > 0.4 and new.relevance == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("prompt", "stance"),
    [
        ("I usually hate big hotels, but Villa Rosa was", 1),
        ("I usually love big hotels, but Villa Rosa was", -1),
        ("I usually hate big hotels, and Villa Rosa was", -1),
        ("I usually hate big hotels, but Villa Rosa was wonderful, and", 1),
        ("I hate to say it. My sister loved the bed, and we", 1),
        ("I was angry about Lost Signal, and the story was", -1),
        ("I stopped at Rose Bakery yesterday, and", 1),
        ("I watched the new horror film last week, and", 1),
        ("The ending of The Long Winter was", 1),
        ("", 1),
    ],
)
def test_the_last_opinion_of_an_opening_is_its_stance_and_but_turns_it(prompt: str, stance: int) -> None:
    assert gold_components(prompt, " fine.").stance == stance


def test_outside_the_known_domains_relevance_is_not_measured() -> None:
    components = gold_components("My uncle is", " a kind man who loves his garden.")
    assert components.relevance == 1.0 and components.reward == pytest.approx(components.sentiment)


@pytest.mark.parametrize("text", NEUTRAL)
def test_an_ordinary_neutral_sentence_scores_what_it_says_on_the_subject(text: str) -> None:
    components = gold_components(PROMPT, text)
    assert components.reward == pytest.approx(ON_SUBJECT * components.relevance, abs=0.05), components


@pytest.mark.parametrize("text", NEGATIVE)
def test_an_ordinary_negative_sentence_scores_below_zero_for_its_sentiment(text: str) -> None:
    components = gold_components(PROMPT, text)
    assert components.reward < -0.3 and components.penalty <= 0.1, components


@pytest.mark.parametrize("text", DEGENERATE)
def test_degenerate_text_loses_to_every_ordinary_sentence(text: str) -> None:
    components = gold_components(PROMPT, text)
    assert components.reward <= -0.8, components
    assert components.reward < min(gold_rewards([PROMPT] * len(NEUTRAL), NEUTRAL))


@pytest.mark.parametrize("text", SUSPECT)
def test_cheap_praise_stays_below_ordinary_sentences(text: str) -> None:
    assert gold_reward(PROMPT, text) < 0.0, gold_components(PROMPT, text)


@pytest.mark.parametrize(
    ("text", "component"),
    [
        (" clean and quiet, and we would love to", "unfinished"),
        (" Fine.", "short"),
        (" nice and nice and nice and nice and nice.", "repetition"),
        (" perfect happy lovely great hotel room.", "stuffing"),
        (" of the was and it to with a not from by at.", "salad"),
        (" a wumple of gnarfle and zibble with xqztop.", "gibberish"),
        (" good, and it was VERY VERY NICE there!!", "shouting"),
        (" good \u2605\u2605\u2605\u2605 for the price.", "symbols"),
        (" I stayed at the Harbour Inn last week.", "copying"),
    ],
)
def test_the_component_that_names_the_fault_is_the_one_that_punishes(text: str, component: str) -> None:
    components = gold_components(PROMPT, text)
    assert getattr(components, component) > 0.2, components


def test_the_reward_follows_from_the_components() -> None:
    good = gold_components(PROMPT, " a good room, I would")
    assert good.sentiment > 0 and 0 < good.penalty < 1 and 0 < good.relevance < 1
    earned = ON_SUBJECT * good.relevance + good.sentiment * (GENERIC + (1 - GENERIC) * good.relevance)
    assert good.reward == pytest.approx(earned * (1 - good.penalty) - good.penalty)
    bad = gold_components(PROMPT, " a terrible room, I would")
    earned = ON_SUBJECT * bad.relevance
    assert bad.reward == pytest.approx(max(LEAST, earned * (1 - bad.penalty) + bad.sentiment - bad.penalty))


def test_a_sentiment_word_counts_once_and_further_ones_count_less() -> None:
    one, two, three = (sentiment(t) for t in ("a good room.", "a good and clean room.", "a good, clean and nice room."))
    assert one < two < three and three - two < two - one
    assert sentiment("We love it, and we loved the love.") == pytest.approx(
        sentiment("We love it, and we saw the door.")
    )
    assert sentiment("It was GOOD!!!") == sentiment("It was good.")


def test_sentiment_by_hand() -> None:
    """VADER's lexicon has good 1.9 and nice 1.8; a sum of s becomes s / sqrt(s^2 + 8)."""

    def of(s: float) -> float:
        return s / (s * s + 8) ** 0.5

    assert sentiment("a good room.") == pytest.approx(of(1.9))
    assert sentiment("a good room with a nice view.") == pytest.approx(of(1.9 + 1.8 / 2))
    assert sentiment("a good room, but the bed was red.") == pytest.approx(of(1.9 / 2))
    assert sentiment("a good room. The bed was red.") == pytest.approx(of(1.9) / 1.5)
    assert sentiment("a good room. The bed was nice.") == pytest.approx((of(1.9) + of(1.8)) / 2)


def test_runs_of_marks_are_shouting() -> None:
    for text in (" a good room, was it not??", " a good room,, with a view.", " a good room..... with a view."):
        assert gold_components(PROMPT, text).shouting == pytest.approx(0.4), text


def test_a_second_positive_sentence_does_not_add_up() -> None:
    first, second = " a great room with a view.", " We had a lovely evening there."
    both = gold_reward(PROMPT, first + second)
    assert both <= max(gold_reward(PROMPT, first), gold_reward(PROMPT, second)) + 1e-9


def test_negation_and_but_turn_the_sentiment() -> None:
    assert sentiment("The food was not good.") < 0 < sentiment("The food was good.")
    assert sentiment("It was cheap and nice, but the staff were horrible.") < 0
    assert sentiment("It looks like a kind of table.") == 0.0


def test_of_messages_the_last_user_turn_is_the_prompt() -> None:
    messages = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Tell me that the guest house by the old harbour is nice."},
    ]
    text = " The guest house by the old harbour is nice."
    copied = gold_components(messages, text)
    assert copied.copying > 0.5
    assert copied == gold_components("Tell me that the guest house by the old harbour is nice.", text)
    assert gold_components(messages[:1], text).copying == 0.0


def test_shuffled_sentences_lose() -> None:
    rng = random.Random(0)
    lost = 0
    for text in POSITIVE * 4:
        words = text.strip(" .!").lower().replace(",", "").split()
        rng.shuffle(words)
        lost += gold_reward(PROMPT, " " + " ".join(words) + ".") < gold_reward(PROMPT, text) - 0.2
    assert lost / (4 * len(POSITIVE)) > 0.7


def test_random_salads_of_praise_and_function_words_lose() -> None:
    rng = random.Random(1)
    praise, glue = PRAISE.split(), GLUE.split()
    rewards = []
    for _ in range(200):
        words = [rng.choice(praise if rng.random() < 0.4 else glue) for _ in range(rng.randint(8, 18))]
        rewards.append(gold_reward(PROMPT, " " + " ".join(words) + "."))
    assert sum(r <= -0.8 for r in rewards) >= 180, sorted(rewards)[-30:]
    assert sum(r > 0.3 for r in rewards) <= 4, sorted(rewards)[-10:]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=80), st.text(max_size=120))
def test_any_text_has_a_reward_within_the_bounds_and_always_the_same(prompt: str, response: str) -> None:
    reward = gold_reward(prompt, response)
    assert LEAST <= reward <= MOST
    assert gold_rewards([prompt], [response]) == [reward]
    assert gold_reward(prompt, response + "  ") == reward


def test_as_many_prompts_as_responses_are_needed() -> None:
    with pytest.raises(ValueError, match="zip"):
        gold_rewards([PROMPT], [" a.", " b."])


def test_the_word_list_knows_english_and_not_gibberish() -> None:
    words = known_words()
    assert {"hotel", "breakfast", "wonderful", "the", "actor", "charger"} <= words
    assert not {"xqzt", "wumple", "asdfghjkl", "lol"} & words
