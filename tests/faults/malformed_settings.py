"""Malformed settings: recipes, grids, studies, templates of judges and chats, principles, judges in Python."""

from __future__ import annotations

from collections.abc import Iterator

from faults.malformed import READ, Malformed, jsonl, parquet
from faults.malformed_data import DEEP, NUMBER, OK, SETS, messages, sample

RECIPE = b"name: r\nmodel: tiny\ndata: reviews\n"
# Nine anchors of nine references each: a billion values.
BOMB = b"".join(f"{chr(98 + k)}: &{chr(98 + k)} [{', '.join([f'*{chr(97 + k)}'] * 9)}]\n".encode() for k in range(9))
BOMB = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + BOMB


def recipe_cases() -> Iterator[Malformed]:
    recipes: dict[str, bytes] = {
        "empty": b"",
        "comment_alone": b"# nothing\n",
        "list": b"- a\n",
        "text": b"tiny\n",
        "tab": b"name: r\n\tmodel: tiny\n",
        "open_quote": b'name: "r\n',
        "unknown_anchor": b"name: *x\n",
        "tag": b"name: !!python/object/apply:os.system ['true']\n",
        "own_tag": b"name: !x r\n",
        "binary_tag": b"name: !!binary aGk=\n",
        "set_tag": b"data: !!set {a, b}\n",
        "timestamp": b"name: 2020-13-45\n",
        "twice": RECIPE + b"model: tiny\n",
        "twice_inside": RECIPE + b"ppo:\n  kl_coef: 1\n  kl_coef: 2\n",
        "bomb": RECIPE + BOMB,
        "bomb_in_setting": RECIPE + BOMB + b"evaluate:\n  judges: *j\n",
        "bomb_of_maps": RECIPE
        + b"a: &a {x: 1, y: 2}\n"
        + b"".join(
            f"{chr(98 + k)}: &{chr(98 + k)} {{{', '.join(f'k{i}: *{chr(97 + k)}' for i in range(9))}}}\n".encode()
            for k in range(9)
        ),
        "bomb_of_merges": RECIPE
        + b"a: &a {x: 1}\n"
        + b"".join(
            f"{chr(98 + k)}: &{chr(98 + k)} {{<<: [{', '.join([f'*{chr(97 + k)}'] * 9)}]}}\n".encode() for k in range(9)
        ),
        "refers_to_itself": b"name: &a [*a]\n",
        "merge_itself": b"ppo: &a\n  <<: *a\n",
        "merge_text": b"ppo:\n  <<: text\n",
        "deep_flow": b"name: " + b"[" * 5000 + b"]" * 5000 + b"\n",
        "deep_open": b"name: " + b"[" * DEEP + b"\n",
        "deep_maps": b"a: " + b"{a: " * 5000 + b"1" + b"}" * 5000 + b"\n",
        "deep_block": b"".join(b" " * k + b"a:\n" for k in range(3000)),
        "latin_1": b"name: caf\xe9\n",
        "utf_16": RECIPE.decode().encode("utf-16"),
        "nul": b"name: a\0b\n",
        "control": b"name: a\x07b\n",
        "surrogate": b'name: "\\ud800"\nmodel: tiny\ndata: reviews\n',
        "surrogate_judge": RECIPE + b'evaluate:\n  judges: ["python:\\ud800:f"]\n',
        "two_documents": RECIPE + b"---\nname: b\n",
        "seed_too_large": RECIPE + b"seed: 4294967296\n",
        "data_seed_too_large": RECIPE + b"data_seed: 4294967296\n",
        "seed_negative": RECIPE + b"seed: -1\n",
        "seed_long": RECIPE + b"seed: " + NUMBER.encode() + b"\n",
        "seed_400": RECIPE + b"seed: " + b"9" * 400 + b"\n",
        "rate_400": RECIPE + b"ppo: {learning_rate: " + b"9" * 400 + b"}\n",
        "rate_nan": RECIPE + b"ppo: {learning_rate: .nan}\n",
        "rate_infinite": RECIPE + b"ppo: {learning_rate: .inf}\n",
        "rate_text": RECIPE + b"ppo: {learning_rate: fast}\n",
        "kl_nan": RECIPE + b"ppo: {kl_coef: .nan}\n",
        "temperature_inf": RECIPE + b"evaluate: {temperature: .inf}\n",
        "episodes_400": RECIPE + b"ppo: {total_episodes: " + b"9" * 400 + b"}\n",
        "hex_number": RECIPE + b"seed: 0x" + b"f" * 5000 + b"\n",
        "base_60": RECIPE + b"seed: " + b"1:" * 5000 + b"1\n",
        "int_from_float": RECIPE + b"seed: 1e400\n",
        "null_section": RECIPE + b"ppo: 5\n",
        "unknown_key": RECIPE + b"pppo: {}\n",
        "null_key": RECIPE + b"? \n: 5\n",
        "list_key": RECIPE + b"? [a, b]\n: 5\n",
        "name_path": b"name: ../../etc\nmodel: tiny\ndata: reviews\n",
        "columns_number": RECIPE + b"data: {source: x, columns: 5}\n",
        "judges_text": RECIPE + b"evaluate: {judges: gold}\n",
        "judges_object": RECIPE + b"evaluate: {judges: [{a: 1}]}\n",
        "html": b"<!DOCTYPE html><html><body>Sign in</body></html>\n",
        "binary": bytes(range(256)) * 8,
        "json_cut": b'{"name": "r", ',
    }
    for name, content in recipes.items():
        yield Malformed(f"recipe/{name}", "validate|r.yaml", {"r.yaml": content}, words=("r.yaml",))
    yield Malformed("recipe/missing", "validate|r.yaml")
    yield Malformed("recipe/folder", "validate|d", make=lambda folder: (folder / "d").mkdir())
    for name, content in {"bom": b"\xef\xbb\xbf" + RECIPE, "crlf": RECIPE.replace(b"\n", b"\r\n")}.items():
        yield Malformed(f"recipe/read/{name}", "validate|r.yaml", {"r.yaml": content}, code=READ)
    keys = b"".join(f"unknown_key_{k}: 1\n".encode() for k in range(20_000))
    yield Malformed("recipe/heavy/keys_20000", "validate|r.yaml", {"r.yaml": RECIPE + keys}, heavy=True)
    keys = b"ppo:\n" + b"".join(f"  learning_ratf_{k}: 1\n".encode() for k in range(20_000))
    yield Malformed("recipe/heavy/keys_20000_inside", "validate|r.yaml", {"r.yaml": RECIPE + keys}, heavy=True)
    long = RECIPE + b"ppoo" * 250_000 + b": 1\n"
    yield Malformed("recipe/heavy/key_1_mb", "validate|r.yaml", {"r.yaml": long}, heavy=True)
    yield Malformed(
        "recipe/heavy/value_10_mb", "validate|r.yaml", {"r.yaml": b"seed: " + b"a" * 10_000_000}, heavy=True
    )
    items = RECIPE + b"evaluate: {judges: [" + b"x, " * 20_000 + b"]}\n"
    yield Malformed("recipe/heavy/judges_20000", "validate|r.yaml", {"r.yaml": items}, heavy=True)
    yield from _set_cases()


def _set_cases() -> Iterator[Malformed]:
    assignments = {
        "no_equals": "ppo",
        "empty_key": "ppo..kl=1",
        "open_list": "evaluate.judges=[a",
        "bomb": "evaluate.judges=[&a [x,x,x,x,x,x,x,x,x],&b [*a,*a,*a,*a,*a,*a,*a,*a],&c [*b,*b,*b,*b,*b,*b,*b],"
        "&d [*c,*c,*c,*c,*c,*c,*c],&e [*d,*d,*d,*d,*d,*d,*d],&f [*e,*e,*e,*e,*e,*e,*e,*e],[*f,*f,*f,*f,*f,*f]]",
        "deep": "evaluate.judges=" + "[" * 5000 + "]" * 5000,
        "twice": "ppo={kl_coef: 1, kl_coef: 2}",
        "tag": "name=!!python/name:os.system",
        "seed": "seed=4294967296",
        "nan": "ppo.learning_rate=.nan",
        "control": "name=a\x07b",
        "surrogate": "name=\udcff",
        "deep_key": ".".join("a" * 2000) + "=1",
        "self": "evaluate.judges=&a [*a]",
    }
    for name, text in assignments.items():
        yield Malformed(f"set/{name}", f"validate|smoke|--set|{text}", words=("--set",))
    for name, text in {
        "no_values": "ppo.kl_coef=",
        "no_equals": "ppo.kl_coef",
        "unknown": "ppo.x=1,2",
        "text": "seed=a,b",
        "open": "evaluate.judges=[a",
        "deep": "seed=" + "[" * 5000,
        "seed": "seed=1,4294967296",
        "nan": "ppo.kl_coef=.nan,1",
    }.items():
        yield Malformed(f"grid/{name}", f"sweep|smoke|--out|out|--grid|{text}")
    study = {
        "number": b"study: 5\n",
        "space_list": b"study: {space: [1, 2]}\n",
        "space_unknown": b"study: {space: {ppo.x: [1, 2]}}\n",
        "space_text": b"study: {space: {ppo.kl_coef: large}}\n",
        "space_reversed": b"study: {space: {ppo.kl_coef: {log: [1, 0.1]}}}\n",
        "trials_zero": b"study: {trials: 0}\n",
        "trials_400": b"study: {trials: " + b"9" * 400 + b"}\n",
        "seeds_negative": b"study: {seeds: -1}\n",
        "kl_nan": b"study: {kl_limit: .nan}\n",
        "twice": b"study: {trials: 2, trials: 3}\n",
    }
    for name, content in study.items():
        yield Malformed(f"study/{name}", "study|r.yaml|--dry-run|--out|out", {"r.yaml": RECIPE + content})


GOOD = b'kind: choice\nuser: "{{ prompt }} {{ response_a }} {{ response_b }}"\n'
JUDGE = "judge|s.parquet|--policy|a|--baseline|b|--judge|llm:tiny|--out|out.parquet|--template|t.yaml"


def template_cases() -> Iterator[Malformed]:
    templates = {
        "empty": b"",
        "list": b"- a\n",
        "text": b"hello\n",
        "no_user": b"kind: choice\n",
        "unknown_kind": GOOD.replace(b"choice", b"vote"),
        "unknown_key": GOOD + b"temperature: 1\n",
        "twice": GOOD + b"kind: score\n",
        "user_number": b"kind: choice\nuser: 5\n",
        "variable_missing": b'kind: choice\nuser: "{{ prompt }}"\n',
        "variable_unknown": GOOD.replace(b"{{ prompt }}", b"{{ prompt }} {{ foo }}"),
        "open_brace": GOOD.replace(b"{{ prompt }}", b"{{ prompt"),
        "open_block": GOOD.replace(b"{{ prompt }}", b"{% if prompt %}{{ prompt }}"),
        "unknown_filter": GOOD.replace(b"{{ prompt }}", b"{{ prompt | foo }}"),
        "unknown_test": GOOD.replace(b"{{ prompt }}", b"{{ prompt is foo }}"),
        "attribute": GOOD.replace(b"{{ prompt }}", b"{{ prompt.foo }}"),
        "divides": GOOD.replace(b"{{ prompt }}", b"{{ prompt }}{{ 1 / 0 }}"),
        "calls": GOOD.replace(b"{{ prompt }}", b"{{ prompt() }}"),
        "include": GOOD.replace(b"{{ prompt }}", b"{{ prompt }}{% include 'x' %}"),
        "max_tokens_zero": GOOD + b"max_tokens: 0\n",
        "max_tokens_400": GOOD + b"max_tokens: " + b"9" * 400 + b"\n",
        "bomb": GOOD + BOMB,
        "deep": b"kind: " + b"[" * 5000 + b"]" * 5000,
        "deep_jinja": b"kind: choice\nuser: '{{ prompt }} {{ response_a }} {{ response_b }} {{ "
        + b"(" * 3000
        + b"1"
        + b")" * 3000
        + b" }}'\n",
        "tag": b"kind: !!python/name:os.system\n",
        "latin_1": b"kind: caf\xe9\n",
        "nul": b"kind: a\0\n",
        "control": b"kind: a\x07\n",
        "surrogate": b'kind: choice\nuser: "\\ud800 {{ prompt }} {{ response_a }} {{ response_b }}"\n',
    }
    samples = parquet(sample(), sample("b", response="no"))
    for name, content in templates.items():
        yield Malformed(f"judge-template/{name}", JUDGE, {"s.parquet": samples, "t.yaml": content}, words=("t.yaml",))
    yield Malformed("judge-template/missing", JUDGE, {"s.parquet": samples})
    folder = JUDGE.replace("t.yaml", ".")
    yield Malformed("judge-template/folder", folder, {"s.parquet": samples})


def principle_cases() -> Iterator[Malformed]:
    label = "label|--data|d.jsonl|--judge|llm:tiny|--out|out.jsonl.gz|--principles|"
    data = {"d.jsonl": jsonl(*OK)}
    files: dict[str, bytes] = {
        "p.txt": b"caf\xe9\n",
        "blank.txt": b"\n \n",
        "u16.txt": "Be kind\n".encode("utf-16"),
        "nul.yaml": b"- a\0\n",
        "map.yaml": b"a: b\n",
        "text.yaml": b"hello\n",
        "numbers.yaml": b"- 1\n- 2\n",
        "null.yaml": b"- null\n",
        "lists.yaml": b"- [a, b]\n",
        "open.yaml": b"- [a\n",
        "tag.yaml": b"- !!python/name:os.system\n",
        "bomb.yaml": b"- &a [x, x]\n"
        + b"".join(f"- &{chr(98 + k)} [*{chr(97 + k)}, *{chr(97 + k)}]\n".encode() for k in range(24)),
        "deep.yaml": b"- " + b"[" * 5000,
        "latin.yaml": b"- caf\xe9\n",
        "surrogate.yaml": b'- "\\ud800"\n',
        "empty.yaml": b"",
        "blank.yaml": b"- ''\n",
    }
    for name, content in files.items():
        yield Malformed(f"principles/{name}", f"{label}{name}", data | {name: content}, words=(name,))
    yield Malformed("principles/missing", f"{label}p.txt", data)
    yield Malformed("principles/folder", f"{label}.", data)


def python_judge_cases() -> Iterator[Malformed]:
    module = b"""
import math
def none(prompts, completions): return None
def short(prompts, completions): return [1.0]
def texts(prompts, completions): return ['a' for _ in completions]
def lists(prompts, completions): return [[1] for _ in completions]
def raises(prompts, completions): raise ValueError('my words')
def wrong_signature(a): return 1
def infinite(prompts, completions): return [math.inf, -math.inf]
def huge(prompts, completions): return [10 ** 400 for _ in completions]
def stops(prompts, completions): raise SystemExit(5)
def number(prompts, completions): return 5
async def later(prompts, completions): return [1.0]
value = 5
"""
    specs = {
        "no_module": "python:",
        "colon_alone": "python::",
        "no_function": "python:judge_module",
        "empty_function": "python:judge_module:",
        "empty_module": "python::f",
        "missing_module": "python:no_such_module:f",
        "missing_function": "python:judge_module:foo",
        "not_a_function": "python:judge_module:value",
        "relative": "python:.judge_module:none",
        "broken_module": "python:broken_judge_module:f",
        "raising_module": "python:raising_judge_module:f",
        "exiting_module": "python:exiting_judge_module:f",
        "surrogate": "python:\udcff:f",
    } | {
        name: f"python:judge_module:{name}"
        for name in ("none", "short", "texts", "lists", "raises", "huge", "number", "later", "wrong_signature", "stops")
    }
    files = {
        "s.parquet": parquet(sample(), sample("b", response="no")),
        "judge_module.py": module,
        "broken_judge_module.py": b"def f(:\n",
        "raising_judge_module.py": b"raise RuntimeError('at import')\n",
        "exiting_judge_module.py": b"import sys\nsys.exit(3)\n",
    }
    for name, spec in specs.items():
        command = f"judge|s.parquet|--policy|a|--baseline|b|--out|out.parquet|--judge|{spec}"
        yield Malformed(f"python-judge/{name}", command, files, words=("python:",))
    others = [
        "",
        "nothing",
        "rm:",
        "rm:no_such",
        "implicit:",
        "implicit:tiny",
        "implicit:,",
        "llm:",
        "llm:no_such",
        "openai:",
        "openai:m",
        "openai:m@",
        "openai:m@ftp://x",
        "openai:@http://127.0.0.1:1",
        "file:",
        "file:no.jsonl",
        "gold:x",
    ]
    for spec in others:
        command = f"judge|s.parquet|--policy|a|--baseline|b|--out|out.parquet|--judge|{spec}"
        yield Malformed(f"judge-name/{spec.replace('/', '_') or 'empty'}", command, files)
        yield Malformed(
            f"judge-name-recipe/{spec.replace('/', '_') or 'empty'}",
            f"run|smoke|--dry-run|{SETS}|--out|out|--set|evaluate.judges=['{spec}']",
            files,
        )


def chat_template_cases() -> Iterator[Malformed]:
    rows = jsonl(
        *(messages({"role": "user", "content": f"Q{k}"}) for k in range(6)),
        messages({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Q7"}),
        *(messages({"role": "user", "content": f"Q{k}"}) for k in range(8, 20)),
    )
    body = "{%- for m in messages -%}{{- m['role'] + ': ' + m['content'] + '\\n' -}}{%- endfor -%}"
    templates = {
        "raises": "{%- for m in messages -%}{%- if m['role'] == 'system' -%}{{ raise_exception('no system role') }}"
        "{%- endif -%}{{ m['content'] }}{%- endfor -%}",
        "raises_always": "{{ raise_exception('never') }}",
        "open_brace": "{{ messages",
        "open_block": "{% for m in messages %}{{ m.content }}",
        "undefined": "{{ foo.bar.baz }}",
        "unknown_filter": "{{ messages | foo }}",
        "divides": "{{ 1 / 0 }}",
        "type_error": "{{ messages + 1 }}",
        "key": "{{ messages[99]['content'] }}",
        "unsafe": "{{ ''.__class__.__mro__ }}",
        "range": "{% for i in range(10000000000) %}x{% endfor %}",
        "include": "{% include 'x' %}",
        "break_outside": "{% for m in messages %}{{ m['content'] }}{% endfor %}{% break %}",
        "half_of_a_pair": "{{ '\\ud800' }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "empty": "",
        "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    }
    words = {
        "raises": ("d.jsonl, line 7", "no system role"),
        "raises_always": ("never",),
        "half_of_a_pair": ("U+D800",),
    }
    for name, text in templates.items():
        command = f"run|smoke|--dry-run|{SETS}|--out|out|--set|data.source=d.jsonl|--set|model.chat_template=t.jinja"
        files = {"d.jsonl": rows, "t.jinja": text.encode()}
        yield Malformed(f"chat-template/{name}", command, files, words=words.get(name, ()))
    command = f"run|smoke|--dry-run|{SETS}|--out|out|--set|data.source=d.jsonl|--set|model.chat_template="
    yield Malformed("chat-template/missing", f"{command}t.jinja", {"d.jsonl": rows})
    yield Malformed("chat-template/latin_1", f"{command}t.jinja", {"d.jsonl": rows, "t.jinja": body.encode() + b"\xe9"})
    yield Malformed("chat-template/utf_16", f"{command}t.jinja", {"d.jsonl": rows, "t.jinja": body.encode("utf-16")})
    yield Malformed("chat-template/folder", f"{command}.", {"d.jsonl": rows})
