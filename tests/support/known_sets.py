"""Five rows of each published data set, written by hand in its true column layout.

``KNOWN_SETS`` maps a name to :class:`KnownSet`: the records, and what they say. Question k has the good answer
``GOOD[k]`` and the bad one ``BAD[k]``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
QUESTIONS = (
    "How do I cook rice?",
    "Why is the sea salty?",
    "Name a bird that cannot fly.",
    "What does a baker do before dawn?",
    "How far away is the moon?",
)
GOOD = (
    "Rinse it, then boil it for twelve minutes.",
    "Rivers carry dissolved salts into it.",
    "The ostrich.",
    "A baker heats the oven and shapes the first loaves.",
    "About 384,000 kilometres.",
)
BAD = ("With fire.", "Because of fish.", "The swallow.", "Sleeps.", "Quite far, I think.")
SYSTEM = "You answer in one sentence."
ROWS = range(5)


@dataclass(frozen=True)
class KnownSet:
    """``wins`` are P(the good answer is preferred) of each row; None for a row that is left out."""

    records: list[Record]
    format: str
    conversational: bool = False
    wins: tuple[float | None, ...] = (1.0,) * 5
    system: bool = False


def user(text: str) -> Record:
    return {"role": "user", "content": text}


def assistant(text: str) -> Record:
    return {"role": "assistant", "content": text}


def talk(k: int, answer: str) -> list[Record]:
    return [user(QUESTIONS[k]), assistant(answer)]


def parts(role: str, text: str) -> Record:
    return {"role": role, "content": [{"type": "text", "text": text, "image": None, "mimeType": None}]}


def human(k: int, answer: str = "") -> str:
    return f"\n\nHuman: {QUESTIONS[k]}\n\nAssistant:{' ' if answer else ''}{answer}"


def rows(**columns: Any) -> list[Record]:
    """Five records; a column is a function of the row's number, a list of five cells, or the same cell in all."""
    return [
        {
            name.replace("__", "-"): value(k) if callable(value) else value[k] if isinstance(value, list) else value
            for name, value in columns.items()
        }
        for k in ROWS
    ]


def _first_is_good(k: int) -> bool:
    return k % 2 == 0


def first(k: int) -> str:
    return GOOD[k] if _first_is_good(k) else BAD[k]


def second(k: int) -> str:
    return BAD[k] if _first_is_good(k) else GOOD[k]


# The good answer is the first in rows 0, 2 and 4; row 4 is a tie.
WINS = (1.0, 1.0, 1.0, 1.0, 0.5)
MODEL_WINS = ["model_a", "model_b", "model_a", "model_b"]
SIGNED = [-3, 1, -1, 2, 0]
TEXTS = {"prompt": lambda k: QUESTIONS[k], "chosen": lambda k: GOOD[k], "rejected": lambda k: BAD[k]}
TALKS = {"chosen": lambda k: talk(k, GOOD[k]), "rejected": lambda k: talk(k, BAD[k])}
CHAT_PAIR = KnownSet(rows(**TALKS), "chosen/rejected", True)
ARENA = {
    "model_a": "llama-13b",
    "model_b": "vicuna-13b",
    "conversation_a": lambda k: talk(k, first(k)),
    "conversation_b": lambda k: talk(k, second(k)),
    "turn": 1,
    "anony": True,
    "language": "English",
    "tstamp": 1682351591.1,
}
TWO_TURNS = [[*talk(k, answer), user("And beans?"), assistant(f"Soak them, {k}.")] for k, answer in enumerate(GOOD)]


def helpsteer2() -> list[Record]:
    """Two rows in a row for each prompt, of which five are here: the last prompt has one response only."""
    scores = [(4, 1), (3, 3)]
    records = [
        {
            "prompt": QUESTIONS[k],
            "response": text,
            "helpfulness": score,
            "correctness": score,
            "coherence": 4,
            "complexity": 1,
            "verbosity": 2,
        }
        for k, of_prompt in enumerate(scores)
        for text, score in zip((GOOD[k], BAD[k]), of_prompt, strict=True)
    ]
    return [*records, {**records[0], "prompt": QUESTIONS[2]}]


def completions(k: int) -> list[Record]:
    return [
        {
            "annotations": {"helpfulness": {"Rating": "5", "Rationale": "It helps.", "Type": ["1"]}},
            "custom_system_prompt": "Be helpful.",
            "model": model,
            "principle": "helpfulness",
            "response": text,
            "critique": "Fine.",
            "fine-grained_score": score / 2,
            "overall_score": score,
        }
        for model, text, score in (("gpt-4", GOOD[k], 8.5), ("llama-2-7b-chat", BAD[k], 3.0))
    ]


KNOWN_SETS: dict[str, KnownSet] = {
    "openbmb/UltraFeedback": KnownSet(
        rows(
            source="evol_instruct",
            instruction=lambda k: QUESTIONS[k],
            models=lambda k: ["gpt-4", "llama-2-7b-chat"],
            completions=completions,
            correct_answers=lambda k: ["None"],
            incorrect_answers=lambda k: ["None"],
        ),
        "scored completions",
    ),
    "HuggingFaceH4/ultrafeedback_binarized": KnownSet(
        rows(
            prompt=lambda k: QUESTIONS[k],
            prompt_id=lambda k: f"{k:064x}",
            **TALKS,
            messages=lambda k: talk(k, GOOD[k]),
            score_chosen=8.5,
            score_rejected=[3.0, 5.0, 8.5, 4.0, 6.0],
        ),
        "chosen/rejected",
        True,
    ),
    "trl-lib/ultrafeedback_binarized": KnownSet(
        rows(**TALKS, score_chosen=8.5, score_rejected=3.0), "chosen/rejected", True
    ),
    "argilla/ultrafeedback-binarized-preferences-cleaned": KnownSet(
        rows(
            source="evol_instruct",
            prompt=lambda k: QUESTIONS[k],
            chosen=TALKS["chosen"],
            chosen__rating=5.0,
            chosen__model="gpt-4",
            rejected=TALKS["rejected"],
            rejected__rating=3.25,
            rejected__model="alpaca-7b",
        ),
        "chosen/rejected",
        True,
    ),
    "Anthropic/hh-rlhf": KnownSet(
        rows(chosen=lambda k: human(k, GOOD[k]), rejected=lambda k: human(k, BAD[k])),
        "chosen/rejected transcripts",
        True,
    ),
    "stanfordnlp/SHP": KnownSet(
        rows(
            post_id=lambda k: f"uf{k}",
            domain="askculinary_train",
            upvote_ratio=0.98,
            history=lambda k: QUESTIONS[k],
            c_root_id_A="i6q",
            c_root_id_B="i6r",
            created_at_utc_A=1651000000,
            created_at_utc_B=1651000900,
            score_A=[340, 12, 30, 5, 44],
            score_B=[166, 60, 7, 9, 11],
            human_ref_A=first,
            human_ref_B=second,
            labels=[1, 0, 1, 0, 1],
            seconds_difference=900.0,
            score_ratio=2.04,
        ),
        "labelled pair",
    ),
    "nvidia/HelpSteer2": KnownSet(helpsteer2(), "scored responses", wins=(1.0, 0.5)),
    "nvidia/HelpSteer2 (preference)": KnownSet(
        rows(
            split="train",
            prompt=lambda k: QUESTIONS[k],
            response_1=first,
            response_2=second,
            preference_strength=SIGNED,
            preference_statement="Response 1 is better.",
            preference_elaboration="It is complete.",
            three_most_similar_preferences=lambda k: [{"statement": "", "elaboration": "", "strength": SIGNED[k]}],
            all_preferences_unprocessed=lambda k: [{"strength": SIGNED[k]}],
        ),
        "labelled pair",
        wins=WINS,
    ),
    "nvidia/HelpSteer3": KnownSet(
        rows(
            domain="general",
            language="english",
            context=lambda k: [user("Hi"), assistant("Hello!"), user(QUESTIONS[k])],
            response1=first,
            response2=second,
            overall_preference=SIGNED,
            individual_preference=lambda k: [
                {"score": SIGNED[k], "reasoning": "r", "feedback1": "f", "feedback2": "g"}
            ],
        ),
        "labelled pair",
        True,
        WINS,
    ),
    "berkeley-nest/Nectar": KnownSet(
        rows(
            prompt=lambda k: human(k) + " ",
            answers=lambda k: [
                {"answer": text, "model": f"m{rank}", "rank": float(rank)}
                for rank, text in enumerate((GOOD[k], *(f"{BAD[k]} ({j})" for j in range(6))), start=1)
            ],
            turns=1,
            num_responses=7,
            source=lambda k: ["lmsys-chat-1m"],
            good_natured=True,
        ),
        "ranked transcripts",
        True,
    ),
    "PKU-Alignment/PKU-SafeRLHF": KnownSet(
        rows(
            prompt=lambda k: QUESTIONS[k],
            response_0=first,
            response_1=second,
            prompt_source="-",
            response_0_source="Alpaca-7B",
            response_1_source="Alpaca-7B",
            is_response_0_safe=True,
            is_response_1_safe=[True, True, False, True, False],
            response_0_harm_category=lambda k: {"Copyright Issues": False},
            response_1_harm_category=lambda k: {"Copyright Issues": False},
            response_0_severity_level=0,
            response_1_severity_level=0,
            better_response_id=[0, 1, 0, 1, 0],
            safer_response_id=0,
            response_0_sha256="a",
            response_1_sha256="b",
        ),
        "labelled pair",
    ),
    "Skywork/Skywork-Reward-Preference-80K-v0.2": KnownSet(
        rows(**TALKS, source="magpie_ultra"), "chosen/rejected", True
    ),
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": KnownSet(
        rows(
            id=lambda k: f"t{k}",
            source="ai2-adapt-dev",
            prompt=lambda k: QUESTIONS[k],
            **TALKS,
            chosen_rating=4.75,
            rejected_rating=2.0,
            chosen_model="m",
            rejected_model="n",
        ),
        "chosen/rejected",
        True,
    ),
    "lmsys/chatbot_arena_conversations": KnownSet(
        rows(
            question_id=lambda k: f"q{k}",
            winner=[*MODEL_WINS, "tie (bothbad)"],
            judge="arena_user_973",
            **ARENA,
            openai_moderation=lambda k: {"flagged": False},
            toxic_chat_tag=lambda k: {"roberta-large": {"flagged": False}},
        ),
        "labelled pair",
        True,
        WINS,
    ),
    "lmarena-ai/arena-human-preference-55k": KnownSet(
        rows(
            id=lambda k: 30192 + k,
            model_a="gpt-4-1106-preview",
            model_b="gpt-4-0613",
            # the last row has two turns, whose first answers differ
            prompt=lambda k: json.dumps([QUESTIONS[k]] * (2 if k == 4 else 1)),
            response_a=lambda k: json.dumps([first(k)] * (2 if k == 4 else 1)),
            response_b=lambda k: json.dumps([second(k)] * (2 if k == 4 else 1)),
            winner_model_a=[1, 0, 1, 0, 1],
            winner_model_b=[0, 1, 0, 0, 0],
            winner_tie=[0, 0, 0, 1, 0],
        ),
        "labelled pair",
        True,
        (1.0, 1.0, 1.0, 0.5, None),
    ),
    "lmarena-ai/arena-human-preference-140k": KnownSet(
        rows(
            id=lambda k: f"c{k}",
            model_a="gemini-2.5-pro",
            model_b="o3",
            winner=["model_a", "model_b", "model_a", "both_bad", "tie"],
            evaluation_session_id="s",
            evaluation_order=1,
            conversation_a=lambda k: [parts("user", QUESTIONS[k]), parts("assistant", first(k))],
            conversation_b=lambda k: [parts("user", QUESTIONS[k]), parts("assistant", second(k))],
            full_conversation=lambda k: [],
            conv_metadata=lambda k: {"turns": 1},
            category_tag=lambda k: {"math_v0.1": {"math": False}},
            language="en",
            is_code=False,
            timestamp="2025-06-15 12:03:04",
        ),
        "labelled pair",
        True,
        (1.0, 1.0, 1.0, 0.5, 0.5),
    ),
    "lmsys/mt_bench_human_judgments": KnownSet(
        rows(
            question_id=lambda k: 81 + k,
            model_a="gpt-4",
            model_b="vicuna-13b-v1.2",
            winner=[*MODEL_WINS, "tie"],
            judge="expert_0",
            conversation_a=lambda k: [*talk(k, first(k)), user("Shorter."), assistant("Yes.")],
            conversation_b=lambda k: [*talk(k, second(k)), user("Shorter."), assistant("No.")],
            turn=[1, 1, 1, 2, 1],
        ),
        "labelled pair",
        True,
        (1.0, 1.0, 1.0, None, 0.5),  # the second answers follow other first ones: they share no prompt
    ),
    "openai/webgpt_comparisons": KnownSet(
        rows(
            question=lambda k: {"dataset": "eli5", "id": f"{k}", "full_text": QUESTIONS[k]},
            quotes_0=lambda k: {"title": [], "extract": []},
            answer_0=first,
            tokens_0=lambda k: {"prefix": [1], "completion": [2]},
            score_0=[1.0, -0.5, 0.25, -1.0, 0.0],
            quotes_1=lambda k: {"title": [], "extract": []},
            answer_1=second,
            tokens_1=lambda k: {"prefix": [1], "completion": [2]},
            score_1=[-1.0, 0.5, -0.25, 1.0, 0.0],
        ),
        "scored pair",
        wins=WINS,
    ),
    "HuggingFaceH4/stack-exchange-preferences": KnownSet(
        rows(
            qid=lambda k: 100 + k,
            question=lambda k: QUESTIONS[k],
            answers=lambda k: [
                {
                    "answer_id": j,
                    "author": "a",
                    "author_id": 7,
                    "author_profile": "https://example.com",
                    "pm_score": score,
                    "selected": score > 1,
                    "text": text,
                }
                for j, (text, score) in enumerate(((GOOD[k], 5), (BAD[k], 5 if k == 4 else 1)))
            ],
            date="2012/05/01",
            metadata=lambda k: ["https://cooking.stackexchange.com"],
        ),
        "scored",
        wins=WINS,
    ),
    "lvwerra/stack-exchange-paired": KnownSet(
        rows(
            qid=lambda k: 100 + k,
            question=lambda k: QUESTIONS[k],
            date="2012/05/01",
            metadata=lambda k: ["https://cooking.stackexchange.com"],
            response_j=lambda k: GOOD[k],
            response_k=lambda k: BAD[k],
        ),
        "chosen/rejected",
    ),
    "Intel/orca_dpo_pairs": KnownSet(
        rows(
            system=SYSTEM,
            question=TEXTS["prompt"],
            chosen=TEXTS["chosen"],
            rejected=TEXTS["rejected"],
        ),
        "chosen/rejected",
        True,
        system=True,
    ),
    "argilla/distilabel-intel-orca-dpo-pairs": KnownSet(
        rows(
            system=SYSTEM,
            input=TEXTS["prompt"],
            chosen=TEXTS["chosen"],
            rejected=TEXTS["rejected"],
            generations=lambda k: [GOOD[k], BAD[k]],
            order=lambda k: ["chatgpt", "gpt4"],
            rating=lambda k: [9.0, 9.0 if k == 4 else 7.0],
            status=lambda k: "tie" if k == 4 else ["unchanged", "swapped"][k % 2],
            in_gsm8k_train=False,
        ),
        "chosen/rejected",
        True,
        WINS,
        system=True,
    ),
    "jondurbin/truthy-dpo-v0.1": KnownSet(
        rows(id=lambda k: f"{k}", source="truthy_dpo", system=SYSTEM, **TEXTS), "chosen/rejected", True, system=True
    ),
    "LLaMA-Factory (sharegpt)": KnownSet(
        rows(
            conversations=lambda k: [{"from": "human", "value": QUESTIONS[k]}],
            chosen=lambda k: {"from": "gpt", "value": GOOD[k]},
            rejected=lambda k: {"from": "gpt", "value": BAD[k]},
            system=SYSTEM,
        ),
        "chosen/rejected",
        True,
        system=True,
    ),
    "LLaMA-Factory (alpaca)": KnownSet(
        rows(
            instruction=lambda k: QUESTIONS[k],
            input="",
            chosen=TEXTS["chosen"],
            rejected=TEXTS["rejected"],
            system=SYSTEM,
            history=lambda k: [],
        ),
        "chosen/rejected",
        True,
        system=True,
    ),
    "axolotl (chat_template.default)": KnownSet(
        rows(
            messages=lambda k: [user(QUESTIONS[k])],
            chosen=lambda k: assistant(GOOD[k]),
            rejected=lambda k: assistant(BAD[k]),
        ),
        "chosen/rejected",
        True,
    ),
    "axolotl (chatml.argilla)": KnownSet(
        rows(
            system=SYSTEM,
            instruction=lambda k: QUESTIONS[k],
            chosen_response=lambda k: GOOD[k],
            rejected_response=lambda k: BAD[k],
        ),
        "chosen/rejected",
        True,
        system=True,
    ),
    "ms-swift": KnownSet(
        rows(messages=lambda k: talk(k, GOOD[k]), rejected_response=lambda k: BAD[k]), "chosen/rejected", True
    ),
    "ms-swift (rejected_messages)": KnownSet(
        rows(messages=lambda k: talk(k, GOOD[k]), rejected_messages=lambda k: talk(k, BAD[k])), "chosen/rejected", True
    ),
    "ms-swift (query)": KnownSet(
        rows(
            system=SYSTEM,
            query=lambda k: QUESTIONS[k],
            response=lambda k: GOOD[k],
            rejected_response=lambda k: BAD[k],
        ),
        "chosen/rejected",
        True,
        system=True,
    ),
    "OpenRLHF": KnownSet(
        rows(input=lambda k: QUESTIONS[k], chosen=TEXTS["chosen"], rejected=TEXTS["rejected"]), "chosen/rejected"
    ),
    "PandaLM": KnownSet(
        rows(
            idx=lambda k: k,
            motivation_app="Gmail",
            cmp_key="opt-7b_pythia-6.9b",
            instruction=lambda k: QUESTIONS[k],
            input="",
            response1=first,
            response2=second,
            annotator1=[1, 2, 1, 2, 0],
            annotator2=[1, 2, 1, 2, 0],
            annotator3=[1, 2, 1, 2, 0],
        ),
        "labelled pair",
        wins=WINS,
    ),
    "princeton-nlp/LLMBar": KnownSet(
        rows(input=lambda k: QUESTIONS[k], output_1=first, output_2=second, label=[1, 2, 1, 2, 1]), "labelled pair"
    ),
    "allenai/reward-bench": KnownSet(
        rows(**TEXTS, chosen_model="m", rejected_model="n", subset="alpacaeval-easy", id=lambda k: k),
        "chosen/rejected",
    ),
    "allenai/reward-bench-2": KnownSet(
        rows(
            id=lambda k: f"{k}",
            prompt=lambda k: QUESTIONS[k],
            chosen=lambda k: [GOOD[k]],
            rejected=lambda k: [BAD[k], f"{BAD[k]} Or so.", "No idea."],
            num_correct=1,
            num_incorrect=3,
            total_completions=4,
            models=lambda k: ["m1", "m2", "m3", "m4"],
            subset="Focus",
            additional_metadata=None,
        ),
        "chosen/rejected lists",
    ),
    "THU-KEG/RM-Bench": KnownSet(
        rows(
            id=lambda k: k,
            prompt=lambda k: QUESTIONS[k],
            chosen=lambda k: [GOOD[k], f"{GOOD[k]} Really.", f"**{GOOD[k]}**"],
            rejected=lambda k: [BAD[k], f"{BAD[k]} Really.", f"**{BAD[k]}**"],
            domain="chat",
        ),
        "chosen/rejected lists",
    ),
}

# Layouts that hold no preferences over whole responses, and what the error says.
OTHER_DATA: dict[str, tuple[list[Record], str]] = {
    "PRM800K (stepwise)": (
        rows(
            instruction=lambda k: QUESTIONS[k],
            responses=lambda k: ["First."],
            next_response=lambda k: GOOD[k],
            answer=None,
            is_human_response=False,
            is_solution=False,
            is_preferred_response=True,
            rating=[1.0, -1.0, 0.0, 1.0, 1.0],
        ),
        "labels the steps of solutions",
    ),
    "PRM800K": (
        rows(
            labeler="a",
            timestamp="2022-07-17T16:56:51",
            generation=None,
            is_quality_control_question=False,
            is_initial_screening_question=False,
            question=lambda k: {"problem": QUESTIONS[k], "ground_truth_answer": "1"},
            label=lambda k: {
                "steps": [
                    {
                        "completions": [{"text": GOOD[k], "rating": 1, "flagged": False}],
                        "human_completion": None,
                        "chosen_completion": 0,
                    }
                ],
                "total_time": 1000,
                "finish_reason": "solution",
            },
        ),
        "labels the steps of solutions",
    ),
    "TRL's stepwise data": (
        rows(prompt=lambda k: QUESTIONS[k], completions=lambda k: ["So.", "Done."], labels=lambda k: [True, False]),
        "labels the steps of solutions",
    ),
    "KTO": (
        rows(prompt=lambda k: QUESTIONS[k], completion=lambda k: GOOD[k], label=[True, False, True, False, True]),
        "duel filter --calibrate",
    ),
}
