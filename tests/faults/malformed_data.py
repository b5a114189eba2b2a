"""Malformed data: preferences, prompts, samples, judgements and what else comes in rows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

from faults.malformed import READ, Malformed, jsonl, parquet

SETS = "--set|data.eval_fraction=0.5|--set|model.name=tiny"
DRY = f"run|smoke|--dry-run|{SETS}|--out|out|--set|data.source="
COMPARE = "compare|tiny|tiny|--judge|gold|--max-new-tokens|2|--limit|2|--out|out|--data|"
LABEL = "label|--policy|tiny|--judge|llm:tiny|--principles|hhh|--k|2|--max-new-tokens|2|--out|out.jsonl.gz|--data|"
DEEP = 100_000
NUMBER = "9" * 5000


def pair(k: int = 0, **more: Any) -> dict[str, Any]:
    return {"prompt": f"Question {k}?", "chosen": f"yes {k}", "rejected": f"no {k}"} | more


def labelled(k: int = 0, **more: Any) -> dict[str, Any]:
    return {"prompt": f"Question {k}?", "response_a": f"yes {k}", "response_b": f"no {k}", "label": 1 + k % 2} | more


def scored(**more: Any) -> dict[str, Any]:
    return {"prompt": "Q?", "responses": ["a", "b"], "scores": [1, 2]} | more


def native(**more: Any) -> dict[str, Any]:
    return {"prompt": "Q?", "responses": ["a", "b"], "comparisons": [{"winner": 0, "loser": 1}]} | more


OK = [pair(k) for k in range(12)]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
USER = {"role": "user", "content": "Hi"}
ANSWERS = {"chosen": [{"role": "assistant", "content": "x"}], "rejected": [{"role": "assistant", "content": "y"}]}


def messages(*prompt: object, **more: Any) -> dict[str, Any]:
    return {"prompt": list(prompt), **ANSWERS, **more}


def text_files() -> dict[str, bytes]:
    """Contents that no reader of JSON lines takes, whatever the columns are called."""
    ok = jsonl(*OK)
    return {
        "empty": b"",
        "blank": b"\n \n\n",
        "not_json": jsonl(*OK, "{oops"),
        "cut_line": ok[:-20],
        "list_row": jsonl(*OK, [1, 2]),
        "text_row": jsonl(*OK, '"text"'),
        "null_row": jsonl(*OK, "null"),
        "latin_1": ok.replace(b"yes 3", b"caf\xe9"),
        "utf_16": ok.decode().encode("utf-16"),
        "utf_32": ok.decode().encode("utf-32"),
        "nul_bytes": ok + b"\0" * 64,
        "deep_lists": jsonl(*OK, '{"prompt": ' + "[" * DEEP + "]" * DEEP + ', "chosen": "a", "rejected": "b"}'),
        "deep_objects": jsonl('{"a":' * DEEP + "1" + "}" * DEEP),
        "long_number": jsonl(*OK, '{"prompt": "Q", "chosen": "a", "rejected": "b", "margin": ' + NUMBER + "}"),
        "binary": bytes(range(256)) * 16,
        "html": b"<!DOCTYPE html><html><body>Sign in</body></html>",
        "git_lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n",
    }


def preference_rows() -> dict[str, list[object]]:
    """Rows of preference data with something wrong in them."""
    half = "\ud800"
    return {
        "prompt_number": [*OK, pair(prompt=5)],
        "prompt_object": [*OK, pair(prompt={"a": 1})],
        "prompt_list_of_texts": [*OK, pair(prompt=["a", "b"])],
        "chosen_number": [*OK, pair(chosen=1.5)],
        "chosen_object": [*OK, pair(chosen={"text": "a"})],
        "chosen_list_of_numbers": [*OK, pair(chosen=[1, 2])],
        "column_missing": [*OK, {"prompt": "Q", "chosen": "a"}],
        "no_known_column": [{"foo": 1, "bar": 2}],
        "no_columns": [{}],
        "surrogate_prompt": [*OK, pair(prompt=half)],
        "surrogate_response": [*OK, pair(chosen=half)],
        "surrogate_message": [messages({"role": "user", "content": half})],
        "surrogate_annotator": [*OK, pair(annotator=half)],
        "surrogate_group": [*OK, pair(group=half)],
        "surrogate_role": [messages({"role": half, "content": "a"})],
        "margin_text": [*OK, pair(margin="large")],
        "margin_nan": [*OK, pair(margin=float("nan"))],
        "margin_infinite": [*OK, pair(margin=float("inf"))],
        "margin_negative": [*OK, pair(margin=-1)],
        "margin_huge": [*OK, '{"prompt": "Q", "chosen": "a", "rejected": "b", "margin": ' + "9" * 400 + "}"],
        "group_list": [*OK, pair(group=[1])],
        "group_object": [*OK, pair(group={"a": 1})],
        "annotator_list": [*OK, pair(annotator=["x"])],
        "annotator_object": [*OK, pair(annotator={"x": 1})],
        "label_unknown": [labelled(label="best")],
        "label_list": [labelled(label=[1])],
        "label_object": [labelled(label={"a": 1})],
        "label_three": [labelled(label=3)],
        "label_nan_text": [labelled(label="nan")],
        "label_infinite": [labelled(label=float("inf"))],
        "label_huge": ['{"prompt": "Q", "response_a": "a", "response_b": "b", "label": ' + "9" * 400 + "}"],
        "labels_0_1_int": [labelled(k, label=k % 2) for k in range(30)],
        "labels_0_1_float": [labelled(k, label=float(k % 2)) for k in range(30)],
        "labels_0_1_text": [labelled(k, label=str(k % 2)) for k in range(30)],
        "labels_0_1_float_text": [labelled(k, label=f"{k % 2}.0") for k in range(30)],
        "labels_0_1_bool": [labelled(k, label=bool(k % 2)) for k in range(30)],
        "labels_0_1_null": [labelled(k, label=None if k == 7 else k % 2) for k in range(30)],
        "labels_0_1_blank": [labelled(k, label="" if k == 7 else str(k % 2)) for k in range(30)],
        "labels_0_1_mixed": [labelled(k, label=(0, "1", 1.0, "0.0")[k % 4]) for k in range(30)],
        "labels_0_1_annotators": [
            {"prompt": f"Q{k}", "response_a": "a", "response_b": "b", "annotator_1": k % 2, "annotator_2": (k + 1) % 2}
            for k in range(30)
        ],
        "labels_0_1_list": [
            {"prompt": f"Q{k}", "responses": ["a", "b", "c"], "labels": [0, 1, k % 2]} for k in range(30)
        ],
        "labels_bool_one": [labelled(label=True), labelled(label=1)],
        "winner_0_1": [
            {"prompt": f"Q{k}", "response_a": "a", "response_b": "b", "winner": float(k % 2)} for k in range(30)
        ],
        "probability_above_1": [
            {"prompt": "Q", "response_a": "a", "response_b": "b", "probability": 1.5},
        ],
        "probability_nan": [{"prompt": "Q", "response_a": "a", "response_b": "b", "probability": float("nan")}],
        "choice_two": [{"prompt": "Q", "response_a": "a", "response_b": "b", "choice": 2}],
        "choice_bool": [{"prompt": "Q", "response_a": "a", "response_b": "b", "choice": True}],
        "scores_nan": [scored(scores=[1, float("nan")])],
        "scores_infinite": [scored(scores=[1, float("inf")])],
        "scores_text": [scored(scores=["1", "2"])],
        "scores_length": [scored(scores=[1, 2, 3])],
        "scores_none": [scored(scores=None)],
        "scores_bool": [scored(scores=[True, False])],
        "scores_huge": ['{"prompt": "Q", "responses": ["a", "b"], "scores": [1, ' + "9" * 400 + "]}"],
        "ranking_wrong": [{"prompt": "Q", "responses": ["a", "b"], "ranking": [0, 0]}],
        "ranking_objects": [{"prompt": "Q", "responses": ["a", "b"], "ranking": [{}, []]}],
        "one_response": [scored(responses=["a"], scores=[1])],
        "no_response": [scored(responses=[], scores=[])],
        "responses_text": [scored(responses="ab")],
        "responses_objects": [scored(responses=[{"text": "a"}, {"text": "b"}])],
        "native_index": [native(comparisons=[{"winner": 0, "loser": 2}])],
        "native_float_index": [native(comparisons=[{"winner": 0.0, "loser": 1.0}])],
        "native_self": [native(comparisons=[{"winner": 0, "loser": 0}])],
        "native_weight": [native(comparisons=[{"winner": 0, "loser": 1, "weight": 0}])],
        "native_weight_nan": [native(comparisons=[{"winner": 0, "loser": 1, "weight": float("nan")}])],
        "native_weight_huge": [
            '{"prompt": "Q", "responses": ["a", "b"], "comparisons": [{"winner": 0, "loser": 1, "weight": '
            + "9" * 400
            + "}]}"
        ],
        "native_text": [native(comparisons=["0>1"])],
        "native_gold_null": [native(gold=[1, None])],
        "native_gold_inf": [native(gold=[1, float("inf")])],
        "gold_differs": [native(gold=[1, 2]), native(gold=[1, 3])],
        "group_differs": [pair(group="a"), pair(group="b")],
        "all_empty": [pair(prompt="", chosen="", rejected="")],
        "all_identical": [{"prompt": "Q", "chosen": "a", "rejected": "a"}],
        "messages_no_role": [messages({"content": "Hi"})],
        "messages_role_number": [messages({"role": 1, "content": "Hi"})],
        "messages_content_null": [messages({"role": "user", "content": None})],
        "messages_content_number": [messages({"role": "user", "content": 1})],
        "messages_content_object": [messages({"role": "user", "content": {"text": "Hi"}})],
        "messages_text": [messages("Hi")],
        "messages_null": [messages(None)],
        "messages_ends_assistant": [messages(USER, {"role": "assistant", "content": "Hello"})],
        "messages_part_text_null": [messages({"role": "user", "content": [{"type": "text", "text": None}]})],
        "messages_part_text_number": [messages({"role": "user", "content": [{"type": "text", "text": 5}]})],
        "messages_part_unknown": [messages({"role": "user", "content": [{"type": "text"}]})],
        "messages_part_nested": [messages({"role": "user", "content": [[{"type": "text", "text": "a"}]]})],
        "messages_only_image": [messages({"role": "user", "content": [{"type": "image", "url": "a.png"}]})],
        "messages_and_text": [*OK, messages(USER)],
        "chosen_no_assistant": [messages(USER, chosen=[USER], rejected=[USER])],
        "info_text": [{"info": "a", "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}],
        "info_post_number": [{"info": {"post": 1}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}],
        "summaries_three": [{"info": {"post": "p"}, "summaries": [{"text": "a"}] * 3, "choice": 0}],
        "completions_text": [{"instruction": "Q", "completions": ["a", "b"]}],
        "completions_response_null": [
            {"instruction": "Q", "completions": [{"response": 1, "overall_score": 1}, {"response": "b"}]}
        ],
    }


# What is wrong with the data as a whole, not with one row.
OF_THE_WHOLE = (
    *("no_known_column", "no_columns", "all_empty", "all_identical", "messages_and_text", "messages_only_image"),
    *("one_response", "no_response", "chosen_no_assistant", "info_no_texts"),
    *("labels_0_1_int", "labels_0_1_float", "labels_0_1_text", "labels_0_1_float_text", "labels_0_1_null"),
    *("labels_0_1_bool", "labels_0_1_blank", "labels_0_1_mixed", "labels_0_1_annotators", "labels_0_1_list"),
    *("winner_0_1", "prompt_list_of_texts_alone"),
)


def read_rows() -> dict[str, list[object]]:
    """Rows that look odd and are data: they are read."""
    part = {"type": "text", "text": "Hi"}
    return {
        "image_null": [messages({"role": "user", "content": [{"type": "image", "text": None}, part]}) for _ in "ab"]
        + [messages({"role": "user", "content": f"{k}"}) for k in range(8)],
        "images_tools": [
            messages({"role": "user", "content": f"{k}"}, images=["a.png"], tools=[{"type": "function"}])
            for k in range(8)
        ],
        "nulls": [*OK, pair(prompt=None), pair(chosen=None)],
        "surrogate_column": [{**row, "\ud800": 1} for row in OK],
        "tool_calls": [
            messages(
                {"role": "user", "content": f"{k}"}, {"role": "assistant", "content": None, "tool_calls": [1]}, USER
            )
            for k in range(8)
        ],
        "nul_in_text": [*OK, pair(99, chosen="a\0b")],
        "u2028": [*OK, pair(99, chosen="a\u2028b")],
    }


def data_cases() -> Iterator[Malformed]:
    for name, content in text_files().items():
        yield Malformed(f"data/jsonl/{name}", f"{DRY}d.jsonl", {"d.jsonl": content})
    for name, rows in preference_rows().items():
        words = ("d.jsonl",) if name in OF_THE_WHOLE else ("d.jsonl, line",)
        yield Malformed(f"data/rows/{name}", f"{DRY}d.jsonl", {"d.jsonl": jsonl(*rows)}, words=words)
    for name, rows in read_rows().items():
        yield Malformed(f"data/read/{name}", f"{DRY}d.jsonl", {"d.jsonl": jsonl(*rows)}, code=READ)
    ok = jsonl(*OK)
    for name, content in {"bom": b"\xef\xbb\xbf" + ok, "crlf": ok.replace(b"\n", b"\r\n")}.items():
        yield Malformed(f"data/read/{name}", f"{DRY}d.jsonl", {"d.jsonl": content}, code=READ)
    yield from _other_formats()
    yield from _places()
    long = jsonl(pair(chosen="a " * 50_000_000), *OK)
    yield Malformed("data/heavy/line_100_mb", f"{DRY}d.jsonl", {"d.jsonl": long}, code=READ, heavy=True)
    prompt = jsonl(*OK, pair(prompt="word " * 10_000_000))
    yield Malformed("data/heavy/prompt_50_mb", f"{DRY}d.jsonl", {"d.jsonl": prompt}, code=READ, heavy=True)
    many = jsonl(*OK, scored(prompt="Many?", responses=[f"r{k}" for k in range(3000)], scores=list(range(3000))))
    yield Malformed("data/heavy/responses_3000", f"{DRY}d.jsonl", {"d.jsonl": many}, heavy=True)
    many = jsonl(
        *(scored(prompt=f"Q{k}", responses=[f"r{i}" for i in range(3000)], scores=list(range(3000))) for k in range(4))
    )
    yield Malformed("data/heavy/responses_3000_all", f"{DRY}d.jsonl", {"d.jsonl": many}, heavy=True)
    wide = jsonl(*({**row, **{f"column {k}": 1 for k in range(20_000)}} for row in OK))
    yield Malformed("data/heavy/columns_20000", f"{DRY}d.jsonl", {"d.jsonl": wide}, code=READ, heavy=True)
    wide = jsonl({f"column {k}": 1 for k in range(20_000)})
    yield Malformed("data/heavy/unknown_columns_20000", f"{DRY}d.jsonl", {"d.jsonl": wide}, heavy=True)


def _other_formats() -> Iterator[Malformed]:
    ok_json = json.dumps(OK).encode()
    documents = {
        "cut": ok_json[:-30],
        "number": b"5",
        "object": b'{"a": 1}',
        "two_lists": b'{"a": [], "b": []}',
        "list_of_lists": b"[[1], [2]]",
        "list_of_nulls": b"[null]",
        "nan_document": b"NaN",
        "deep": b"[" * DEEP + b"]" * DEEP,
        "long_number": b"[" + NUMBER.encode() + b"]",
        "utf_16": ok_json.decode().encode("utf-16"),
    }
    for name, content in documents.items():
        yield Malformed(f"data/json/{name}", f"{DRY}d.json", {"d.json": content}, words=("d.json",))
    header = b"prompt,chosen,rejected\n"
    tables = {
        "empty": b"",
        "header_alone": header,
        "too_many_cells": header + b"a,b,c,d\n",
        "too_few_cells": header + b"a,b\n",
        "open_quote": header + b'"a,b,c\n',
        "nul": header + b"a\0,b,c\n",
        "latin_1": header + b"caf\xe9,b,c\n",
        "bad_messages": b'prompt,chosen,rejected\n"[{""role"": ",b,c\n',
        "deep_messages": b'prompt,responses,scores\nQ,"' + b"[" * DEEP + b'","[1,2]"\n',
        "long_number": b'prompt,responses,scores\nQ,"[""a"",""b""]","[' + NUMBER.encode() + b']"\n',
        "twice_a_column": b"prompt,chosen,chosen,rejected\nQ,a,b,c\n",
        "tsv": b"prompt\tchosen\trejected\nQ\ta\tb\n",
    }
    for name, content in tables.items():
        yield Malformed(f"data/csv/{name}", f"{DRY}d.csv", {"d.csv": content}, words=("d.csv",))
    whole = parquet(*OK)
    columns = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "magic_alone": b"PAR1",
        "flipped": whole[:40] + bytes(byte ^ 0xFF for byte in whole[40:80]) + whole[80:],
        "foreign": jsonl(*OK),
        "no_rows": parquet(*OK[:1])[:0] + _no_rows(),
        "binary_column": parquet({"prompt": b"a", "chosen": b"\xff\xfe", "rejected": b"c"}),
        "date_column": _dates(),
        "own_prompt": _own_format(),
    }
    for name, content in columns.items():
        yield Malformed(f"data/parquet/{name}", f"{DRY}d.parquet", {"d.parquet": content}, words=("d.parquet",))
    packed = gzip.compress(jsonl(*OK))
    for name, content in {
        "cut": packed[:-9],
        "foreign": jsonl(*OK),
        "flipped": packed[:30] + b"xx" + packed[32:],
    }.items():
        yield Malformed(f"data/gzip/{name}", f"{DRY}d.jsonl.gz", {"d.jsonl.gz": content}, words=("d.jsonl.gz",))


def _no_rows() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({name: pa.array([], pa.string()) for name in ("prompt", "chosen", "rejected")}), sink)
    return sink.getvalue().to_pybytes()


def _dates() -> bytes:
    import datetime

    return parquet({"prompt": datetime.date(2020, 1, 1), "chosen": "a", "rejected": "b"})


def _own_format() -> bytes:
    """A file that says it is of preference rows, whose prompts are no JSON."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"prompt": ["{oops"], "responses": [["a", "b"]], "comparisons": [[]]})
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"duel.preference_rows": "1"}), sink)
    return sink.getvalue().to_pybytes()


def _places() -> Iterator[Malformed]:
    yield Malformed("data/place/missing", f"{DRY}d.jsonl")
    yield Malformed("data/place/missing_folder", f"{DRY}a/b/d.jsonl")
    yield Malformed("data/place/ending", f"{DRY}d.xlsx", {"d.xlsx": b"PK"})
    yield Malformed("data/place/empty_folder", f"{DRY}d", make=lambda folder: (folder / "d").mkdir())
    yield Malformed("data/place/folder_of_text", f"{DRY}d", {"d/a.txt": b"\xff\xfe"})
    yield Malformed("data/place/saved_damaged", f"{DRY}d", {"d/state.json": b"{", "d/dataset_info.json": b"{"})
    yield Malformed("data/place/dict_damaged", f"{DRY}d", {"d/dataset_dict.json": b"[]"})
    yield Malformed("data/place/dict_wrong", f"{DRY}d", {"d/dataset_dict.json": b'{"splits": 5}'})
    yield Malformed("data/place/state_wrong", f"{DRY}d", {"d/state.json": b"{}", "d/dataset_info.json": b"{}"})
    yield Malformed("data/place/long_name", f"{DRY}{'a' * 5000}.jsonl")
    yield Malformed("data/place/nul_name", f"{DRY}a\0b.jsonl")
    yield Malformed("data/place/device", f"{DRY}/dev/null")


def prompt_cases() -> Iterator[Malformed]:
    rows: dict[str, bytes] = {
        "null": jsonl({"prompt": "Hi"}, {"prompt": None}),
        "number": jsonl({"prompt": "Hi"}, {"prompt": 5}),
        "object": jsonl({"prompt": {"a": 1}}),
        "texts": jsonl({"prompt": ["a", "b"]}),
        "other_column": jsonl({"prompt": "Hi"}, {"question": "x"}),
        "first_differs": jsonl({"prompt": "Hi"}, {"prompt": [USER]}),
        "no_prompt": jsonl({"text": "Hi"}),
        "ends_assistant": jsonl({"messages": [USER, {"role": "assistant", "content": "Done."}]}),
        "messages_text": jsonl({"messages": "Hi"}, {"messages": [USER]}),
        "surrogate": jsonl({"prompt": "\ud800"}),
        "empty_messages": jsonl({"prompt": []}),
        "message_null": jsonl({"prompt": [None]}),
        "content_null": jsonl({"messages": [{"role": "user", "content": None}]}),
        "blank_alone": jsonl({"prompt": " "}),
    } | {name: content for name, content in text_files().items() if name not in ("cut_line",)}
    for name, content in rows.items():
        yield Malformed(f"prompts/compare/{name}", f"{COMPARE}p.jsonl", {"p.jsonl": content})
    for name in ("null", "latin_1", "not_json", "deep_objects", "other_column"):
        yield Malformed(f"prompts/label/{name}", f"{LABEL}p.jsonl", {"p.jsonl": rows[name]})
    texts = {
        "latin_1": b"caf\xe9\n",
        "utf_16": "Hi\nthere\n".encode("utf-16"),
        "empty": b"",
        "blank": b" \n\n",
        "binary": bytes(range(256)) * 4,
    }
    for name, content in texts.items():
        yield Malformed(f"prompts/txt/{name}", f"{COMPARE}p.txt", {"p.txt": content}, words=("p.txt",))
    yield Malformed("prompts/txt/missing", f"{COMPARE}p.txt")
    yield Malformed("prompts/csv/other_column", f"{COMPARE}p.csv", {"p.csv": b"text\nHi\n"})
    yield Malformed("prompts/parquet/number", f"{COMPARE}p.parquet", {"p.parquet": parquet({"prompt": 5})})
    part = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    read = {
        "parts": jsonl({"messages": part}),
        "sharegpt": jsonl({"messages": [{"from": "human", "value": "Hi"}]}),
        "bom": b"\xef\xbb\xbf" + jsonl({"prompt": "Hi"}),
        "crlf": b'{"prompt": "Hi"}\r\n{"prompt": "Ho"}\r\n',
        "u2028": jsonl({"prompt": "a\u2028b"}),
        "u2028_raw": '{"prompt": "a\u2028b"}\n'.encode(),
        "with_id": jsonl({"id": 1, "prompt": "Hi"}),
    }
    for name, content in read.items():
        yield Malformed(f"prompts/read/{name}", f"{COMPARE}p.jsonl", {"p.jsonl": content}, code=READ)
    more = {"p.csv": b"prompt\nHi\n", "p.json": b'[{"prompt": "Hi"}]', "p.parquet": parquet({"prompt": "Hi"})}
    for name, content in more.items():
        yield Malformed(f"prompts/read/{name}", f"{COMPARE}{name}", {name: content}, code=READ)
    long = jsonl({"prompt": "word " * 10_000_000})
    yield Malformed("prompts/heavy/prompt_50_mb", f"{COMPARE}p.jsonl", {"p.jsonl": long}, heavy=True)


def sample(policy: str = "a", **more: Any) -> dict[str, Any]:
    return {
        **{"prompt_id": "p", "policy": policy, "sample_index": 0, "prompt": "Q", "response": "yes"},
        **{"response_ids": [5, 6], "truncated": False},
    } | more


JUDGE = "judge|s.parquet|--policy|a|--baseline|b|--judge|gold|--out|out.parquet"


def sample_cases() -> Iterator[Malformed]:
    both = [sample(), sample("b", response="no")]
    whole = parquet(*both)
    tables = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "foreign": jsonl(*both),
        "no_response": parquet(*({k: v for k, v in row.items() if k != "response"} for row in both)),
        "response_null": parquet(sample(), sample("b", response=None)),
        "prompt_null": parquet(sample(), sample("b", prompt=None)),
        "prompt_id_null": parquet(sample(), sample("b", prompt_id=None)),
        "policy_null": parquet(sample(), sample("b"), sample(policy=None)),
        "index_null": parquet(sample(), sample(), sample("b", sample_index=None)),
        "ids_null": parquet(sample(), sample("b", response_ids=None)),
        "ids_items_null": parquet(sample(), sample("b", response_ids=[1, None])),
        "truncated_null": parquet(sample(), sample("b", truncated=None)),
        "response_number": parquet(*(row | {"response": 5} for row in both)),
        "prompt_list": parquet(*(row | {"prompt": ["Q"]} for row in both)),
        "ids_texts": parquet(*(row | {"response_ids": ["a"]} for row in both)),
        "index_text": parquet(*(row | {"sample_index": "x"} for row in both)),
        "other_policies": parquet(sample("x"), sample("y")),
        "no_shared_prompt": parquet(sample(), sample("b", prompt_id="q")),
    }
    for name, content in tables.items():
        yield Malformed(f"samples/judge/{name}", JUDGE, {"s.parquet": content})
    yield Malformed("samples/judge/missing", JUDGE)
    label = "label|--data|r|--judge|llm:tiny|--principles|hhh|--out|out.jsonl.gz"
    for name in ("response_null", "prompt_null", "prompt_id_null", "response_number", "cut"):
        yield Malformed(f"samples/label/{name}", label, {"r/samples.parquet": tables[name]})
    rewards = "rewards|--policy|tiny|--reference|tiny|--data|d.jsonl|--rm|tiny|--samples|s.parquet|--out|out.parquet"
    for name in ("empty", "ids_null", "no_response"):
        yield Malformed(f"samples/rewards/{name}", rewards, {"d.jsonl": jsonl(*OK), "s.parquet": tables[name]})


def table_cases() -> Iterator[Malformed]:
    row = {"policy": "a", "arm": "dpo", "prompt_id": "p"}
    tables = {
        "empty": b"",
        "foreign": b"x" * 100,
        "no_columns": parquet({"a": 1}),
        "few_columns": parquet(row),
        "nulls": parquet({name: None for name in ("arm", "trial", "seed", "checkpoint", "prompt_id", "judge", "win")}),
    }
    for name, content in tables.items():
        yield Malformed(f"study-table/{name}", "study|--table|t.parquet|--out|out", {"t.parquet": content})
    yield Malformed("study-table/missing", "study|--table|t.parquet|--out|out")
