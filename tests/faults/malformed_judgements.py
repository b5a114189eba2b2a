"""Malformed judgements, annotations, attributes of prompts, and tables of length control."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from typing import Any

from faults.malformed import READ, Malformed, jsonl, parquet
from faults.malformed_data import DEEP, NUMBER, sample, text_files


def judgement(k: int = 0, **more: Any) -> dict[str, Any]:
    return {"prompt_id": f"p{k}", "policy": "a", "baseline": "b", "judge": "j", "preference": k % 2} | more


def annotation(k: int = 0, **more: Any) -> dict[str, Any]:
    texts = {"output_1": "no", "output_2": "yes", "generator_1": "b", "generator_2": "a"}
    return {"instruction": f"Q{k}", **texts, "annotator": "j", "preference": 1 + k % 2} | more


def judgement_cases() -> Iterator[Malformed]:
    ok = [judgement(k) for k in range(8)]
    rows: dict[str, list[object]] = {
        "no_policy": [{"prompt_id": "p", "preference": 1}],
        "preference_text": [*ok, judgement(preference="A")],
        "preference_list": [*ok, judgement(preference=[1])],
        "preference_two": [*ok, judgement(preference=2)],
        "preference_infinite": [*ok, judgement(preference=float("inf"))],
        "preference_huge": [
            *ok,
            '{"prompt_id": "p", "policy": "a", "baseline": "b", "judge": "j", "preference": ' + "9" * 400 + "}",
        ],
        "preference_bool": [*ok, judgement(preference="true")],
        "policy_null": [*ok, judgement(policy=None)],
        "policy_list": [*ok, judgement(policy=["a"])],
        "judge_object": [*ok, judgement(judge={"a": 1})],
        "prompt_id_float": [*ok, judgement(prompt_id=1.5)],
        "order_two": [*ok, judgement(order=2)],
        "order_text": [*ok, judgement(order="first")],
        "length_text": [*ok, judgement(policy_length="long")],
        "length_huge": [*ok, judgement(policy_length=1e300)],
        "length_negative": [*ok, judgement(policy_length=-5)],
        "seed_text": [*ok, judgement(seed="x")],
        "surrogate_policy": [*(judgement(k, policy="\ud800") for k in range(8))],
        "surrogate_judge": [*(judgement(k, judge="\ud800") for k in range(8))],
        "text_row": ["x"],
        "no_generator": [annotation(generator_1=None)],
        "annotation_preference": [annotation(preference=5)],
        "annotation_generator_list": [annotation(generator_2=["a"])],
        "annotation_no_instruction": [{k: v for k, v in annotation().items() if k != "instruction"}],
        "annotation_instruction_list": [annotation(instruction=["Q"])],
        "annotation_surrogate": [annotation(output_2="\ud800")],
        "annotation_surrogate_instruction": [annotation(instruction="\ud800")],
        "annotation_swapped_text": [annotation(swapped="maybe")],
    }
    for name, content in rows.items():
        yield Malformed(f"judgements/rows/{name}", "winrate|j.jsonl", {"j.jsonl": jsonl(*content)})
    texts = {name: text_files()[name] for name in text_files()}
    for name, content in texts.items():
        yield Malformed(f"judgements/jsonl/{name}", "winrate|j.jsonl", {"j.jsonl": content}, words=("j.jsonl",))
    documents = {
        "object": b'{"a": 1}',
        "number": b"5",
        "deep": b"[" * DEEP,
        "long_number": b"[" + NUMBER.encode() + b"]",
    }
    for name, content in documents.items():
        yield Malformed(f"judgements/json/{name}", "winrate|j.json", {"j.json": content})
    whole = parquet(*ok)
    for name, content in {"cut": whole[:200], "foreign": b"x", "intervals": _bad_intervals(ok)}.items():
        yield Malformed(f"judgements/parquet/{name}", "winrate|j.parquet", {"j.parquet": content})
    yield Malformed("judgements/gzip/cut", "winrate|j.jsonl.gz", {"j.jsonl.gz": gzip.compress(jsonl(*ok))[:-9]})
    yield Malformed("judgements/gzip/flipped", "winrate|j.jsonl.gz", {"j.jsonl.gz": b"\x1f\x8b\x08\0" + b"\xff" * 60})
    yield Malformed("judgements/place/folder", "winrate|.")
    yield Malformed("judgements/place/ending", "winrate|j.csv", {"j.csv": b"a,b\n"})
    bom = {"bom": b"\xef\xbb\xbf" + jsonl(*ok), "crlf": jsonl(*ok).replace(b"\n", b"\r\n")}
    for name, content in bom.items():
        yield Malformed(f"judgements/read/{name}", "winrate|j.jsonl", {"j.jsonl": content}, code=READ)
    yield from _attributes(jsonl(*ok))
    yield Malformed(
        "judgements/by/object",
        "winrate|j.jsonl|--by|c",
        {"j.jsonl": jsonl(*(judgement(k, c={"a": [1]}) for k in range(8)))},
    )
    judge = "judge|s.parquet|--policy|a|--baseline|b|--judge|file:j.jsonl|--out|out.parquet"
    both = parquet(sample(), sample("b", response="no"))
    for name, content in {"other": jsonl(*ok), "latin_1": text_files()["latin_1"]}.items():
        yield Malformed(f"judgements/judge/{name}", judge, {"j.jsonl": content, "s.parquet": both})


def _bad_intervals(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata({"duel.intervals": "{oops"}), sink)
    return sink.getvalue().to_pybytes()


def _attributes(ok: bytes) -> Iterator[Malformed]:
    rows: dict[str, list[object]] = {
        "no_column": [{"prompt_id": "p0"}],
        "no_prompt": [{"c": "x"}],
        "two_values": [{"prompt_id": "p0", "c": 1}, {"prompt_id": "p0", "c": 2}],
        "prompt_number": [{"prompt": 5, "c": 1}],
        "prompt_object": [{"prompt": {"a": 1}, "c": 1}],
        "prompt_messages_bad": [{"prompt": [{"role": "user"}], "c": 1}],
        "prompt_surrogate": [{"prompt": "\ud800", "c": 1}],
        "prompt_null": [{"prompt": None, "c": 1}],
        "empty": [],
    }
    for name, content in rows.items():
        files = {"j.jsonl": ok, "a.jsonl": jsonl(*content)}
        yield Malformed(f"attributes/{name}", "winrate|j.jsonl|--by|c|--attributes|a.jsonl", files)


def lc_table_cases() -> Iterator[Malformed]:
    good = {
        "instruction_difficulty.csv": b"index,instruction_id,instruction_difficulty\n0,a,0.5\n1,b,-0.5\n",
        "gamed_features.csv": b"index,tanh_std_delta_len\n0,0.1\n1,-0.1\n0,0.3\n",
        "gamed_sufficient_stats.json": b'{"tanh_std_delta_len": 0.1, "instruction_difficulty": 0.2, "row_weight": 1}',
    }
    changes: dict[str, dict[str, bytes]] = {
        "missing_column": {"instruction_difficulty.csv": b"index,x\n0,1\n"},
        "not_a_number": {"instruction_difficulty.csv": b"index,instruction_id,instruction_difficulty\n0,a,x\n1,b,1\n"},
        "nan": {"instruction_difficulty.csv": b"index,instruction_id,instruction_difficulty\n0,a,nan\n1,b,1\n"},
        "latin_1": {"instruction_difficulty.csv": b"index,instruction_id\n0,\xe9\n"},
        "gap": {"instruction_difficulty.csv": b"index,instruction_id,instruction_difficulty\n0,a,1\n5,b,1\n"},
        "index_out": {"gamed_features.csv": b"index,tanh_std_delta_len\n7,0.1\n"},
        "no_features": {"gamed_features.csv": b"index,tanh_std_delta_len\n"},
        "short_row": {"gamed_features.csv": b"index,tanh_std_delta_len\n0\n"},
        "singular": {"gamed_features.csv": b"index,tanh_std_delta_len\n0,0\n0,0\n"},
        "stats_list": {"gamed_sufficient_stats.json": b"[1]"},
        "stats_null": {
            "gamed_sufficient_stats.json": b'{"tanh_std_delta_len": null, "instruction_difficulty": 1, "row_weight": 1}'
        },
        "stats_text": {
            "gamed_sufficient_stats.json": b'{"tanh_std_delta_len": "x", "instruction_difficulty": 1, "row_weight": 1}'
        },
        "stats_nan": {
            "gamed_sufficient_stats.json": b'{"tanh_std_delta_len": NaN, "instruction_difficulty": 1, "row_weight": 1}'
        },
        "stats_cut": {"gamed_sufficient_stats.json": b'{"tanh'},
        "stats_deep": {"gamed_sufficient_stats.json": b"[" * DEEP},
        "stats_list_value": {
            "gamed_sufficient_stats.json": b'{"tanh_std_delta_len": [1], "instruction_difficulty": 1, "row_weight": 1}'
        },
    }
    rows = jsonl(*(annotation(k, instruction_id="ab"[k % 2]) for k in range(8)))
    for name, change in changes.items():
        files = {f"t/{file}": content for file, content in (good | change).items()}
        yield Malformed(f"lc-table/{name}", "winrate|j.jsonl|--lc-table|t", {"j.jsonl": rows, **files})
    files = {f"t/{file}": content for file, content in good.items() if "gamed_features" not in file}
    packed = files | {"t/gamed_features.csv.gz": b"not gzip"}
    yield Malformed("lc-table/gzip", "winrate|j.jsonl|--lc-table|t", {"j.jsonl": rows, **packed})
    yield Malformed("lc-table/missing", "winrate|j.jsonl|--lc-table|t", {"j.jsonl": rows})
