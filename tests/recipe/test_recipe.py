"""Recipes: where a value comes from, what an error says, and that nothing is lost on the way back to YAML."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from toolkit.errors import RecipeError
from toolkit.recipe.checks import check
from toolkit.recipe.files import copy_recipe, load_recipe, resolved_yaml, shipped_recipes
from toolkit.recipe.reference import json_schema
from toolkit.recipe.schema import Recipe, flat
from toolkit.recipe.training import DpoSection, Lora
from toolkit.recipe.yaml_values import one_line


@pytest.fixture
def recipe_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def error_of(name: str, *sets: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, sets)
    return caught.value


# ---- values and their origins


def test_default_file_and_set_in_that_order(recipe_file):
    name = recipe_file("name: mine\nppo:\n  kl_coef: 0.2\n  lam: 0.9\n")
    loaded = load_recipe(name, ["ppo.lam=0.5", "seed=3", "seed=4"])
    assert (loaded.recipe.ppo.kl_coef, loaded.recipe.ppo.lam, loaded.recipe.ppo.gamma) == (0.2, 0.5, 1.0)
    assert loaded.recipe.seed == 4
    assert loaded.origins["ppo.kl_coef"] == "file:mine.yaml:3"
    assert loaded.origins["ppo.lam"] == "--set"
    assert loaded.origins["ppo.gamma"] == "default"
    assert loaded.origins["model.lora.r"] == "default"
    assert loaded.path == Path(name)
    assert set(loaded.origins) == set(flat(loaded.recipe))


def test_a_section_given_as_text_is_short_for_its_name(recipe_file):
    name = recipe_file("name: mine\nmodel: tiny\ndata: pairs.jsonl\n")
    loaded = load_recipe(name)
    assert (loaded.recipe.model.name, loaded.recipe.data.source) == ("tiny", "pairs.jsonl")
    assert loaded.origins["model.name"] == "file:mine.yaml:2"
    loaded = load_recipe(name, ["model.lora.r=8", "model=gguf:a.gguf", "data=Anthropic/hh-rlhf"])
    assert (loaded.recipe.model.name, loaded.recipe.data.source) == ("gguf:a.gguf", "Anthropic/hh-rlhf")
    assert loaded.recipe.model.lora == Lora(r=8)
    assert loaded.origins["model.name"] == "--set"


@pytest.mark.parametrize("lora", ["", "  lora: null\n", "  lora: {alpha: 64}\n"])
def test_set_below_lora_creates_the_section(recipe_file, lora):
    name = recipe_file(f"name: mine\nmodel:\n  name: tiny\n{lora}")
    loaded = load_recipe(name, ["model.lora.r=8"])
    assert loaded.recipe.model.lora == Lora(r=8, alpha=64 if "64" in lora else 32)
    assert loaded.origins["model.lora.r"] == "--set"
    assert loaded.origins["model.lora.alpha"] == ("file:mine.yaml:4" if "64" in lora else "default")
    loaded = load_recipe(name, ["model.lora.r=8", "model.lora=null"])
    assert loaded.recipe.model.lora is None
    assert loaded.origins["model.lora"] == "--set"


def test_set_takes_yaml_flow_and_leaves_other_text_alone(recipe_file):
    name = recipe_file("name: mine\ndata:\n  columns: {chosen: good}\n")
    sets = ['evaluate.judges=[gold, "implicit:a,b"]', "report.title=a: b", "data.columns.prompt=q", "data.config="]
    loaded = load_recipe(name, sets)
    assert loaded.recipe.evaluate.judges == ["gold", "implicit:a,b"]
    assert loaded.recipe.report.title == "a: b"
    assert loaded.recipe.data.columns == {"chosen": "good", "prompt": "q"}
    assert loaded.origins["data.columns"] == "--set"
    assert loaded.recipe.data.config is None
    replaced = load_recipe(name, ["data.columns={prompt: x}"])
    assert replaced.recipe.data.columns == {"prompt": "x"}


@pytest.mark.parametrize(("text", "value"), [("1e-5", 1e-5), ("1E5", 1e5), ("2.5e-6", 2.5e-6), ("+1e-3", 1e-3)])
def test_exponents_without_a_dot_are_numbers(recipe_file, text, value):
    name = recipe_file(f"name: mine\nppo: {{learning_rate: {text}}}\n")
    assert load_recipe(name).recipe.ppo.learning_rate == value
    assert load_recipe(name, [f"dpo.learning_rate={text}"]).recipe.dpo.learning_rate == value


def test_whole_numbers_may_be_written_as_exponents(recipe_file):
    assert load_recipe(recipe_file("name: mine\nppo: {total_episodes: 1e6}\n")).recipe.ppo.total_episodes == 1_000_000


def test_merge_keys_share_settings_and_keep_their_lines(recipe_file):
    text = (
        "name: m\nsft: &s\n  learning_rate: 1e-3\n  lr_scheduler_type: cosine\ndpo:\n  <<: *s\n  learning_rate: 2e-3\n"
    )
    loaded = load_recipe(recipe_file(text))
    assert (loaded.recipe.dpo.learning_rate, loaded.recipe.dpo.lr_scheduler_type) == (2e-3, "cosine")
    assert loaded.origins["dpo.learning_rate"] == "file:mine.yaml:7"
    assert loaded.origins["dpo.lr_scheduler_type"] == "file:mine.yaml:4"
    text = "name: m\nsft: &s {warmup_ratio: 0.1}\nreward_model: &r\n  warmup_ratio: 0.2\ndpo: {<<: [*r, *s]}\n"
    loaded = load_recipe(recipe_file(text))
    assert (loaded.recipe.dpo.warmup_ratio, loaded.origins["dpo.warmup_ratio"]) == (0.2, "file:mine.yaml:4")


# ---- what an error says


def test_unknown_key_names_line_and_nearest_key(recipe_file):
    error = error_of(recipe_file("name: mine\nppo:\n  kl_coeff: 0.1\n"))
    assert error.what == "unknown key ppo.kl_coeff"
    assert error.where.endswith("mine.yaml:3")
    assert "did you mean 'kl_coef'?" in error.fix


def test_unknown_key_of_another_section_says_so(recipe_file):
    error = error_of(recipe_file("name: mine\nppo:\n  beta: 0.1\n"))
    assert "'kl_coef'" in error.fix and "'beta' is a key of dpo" in error.fix
    error = error_of(recipe_file("name: mine\nlabel_smoothing: 0.1\n"))
    assert error.what == "unknown key label_smoothing" and "'label_smoothing' is a key of dpo" in error.fix


def test_unknown_key_of_set():
    error = error_of("smoke", "ppo.betta=1")
    assert error.what == "unknown key ppo.betta"
    assert error.where == "--set ppo.betta=1"
    assert "'beta' is a key of dpo" in error.fix
    assert "unknown key pppo" in error_of("smoke", "pppo.beta=1").what
    assert "'ppo'" in error_of("smoke", "pppo.beta=1").fix
    assert "'learning_rate'" in error_of("smoke", "model.lora=null", "sft.lr=1").fix


def test_a_dotted_key_in_a_file_is_told_to_nest(recipe_file):
    assert "`ppo:`" in error_of(recipe_file("name: mine\nppo.kl_coef: 0.1\n")).fix


@pytest.mark.parametrize(
    ("setting", "allowed", "given_as"),
    [
        ("ppo.kl_coef=high", "a number >= 0", "high"),
        ("seed=-1", "a whole number >= 0 and <= 4294967295", "-1"),
        ("seed=yes", "a whole number >= 0 and <= 4294967295", "yes"),
        ("seed=1.5", "a whole number >= 0 and <= 4294967295", "1.5"),
        ("sft.learning_rate=.inf", "a number > 0", ".inf"),
        ("sft.learning_rate=.nan", "a number > 0", ".nan"),
        ("ppo.lam=1.5", "a number >= 0 and <= 1", "1.5"),
        ("ppo.reward_clip=0", "a number > 0 or null", "0"),
        ("dpo.label_smoothing=0.5", "a number >= 0 and < 0.5", "0.5"),
        ("model.dtype=bf16", "one of auto, bfloat16, float32", "bf16"),
        ("model=3", "a section", "3"),
        ("model.lora=8", "a section or null", "8"),
        ("model.lora.target_modules=[1]", "text or a list of text", "[1]"),
        ("report.title=2024", "text or null", "2024"),
        ("report.title=2024-01-01", "text or null", "2024-01-01"),
        ("evaluate.judges=gold", "a list of text", "gold"),
        ("data.columns=[a]", "a mapping of text to text", "[a]"),
        ("sft.enabled=2", "true or false", "2"),
        ("sft.enabled=", "true or false", "empty"),
    ],
)
def test_wrong_value_names_key_line_value_and_what_is_allowed(recipe_file, setting, allowed, given_as):
    key, _, value = setting.partition("=")
    what = f"{key} must be {allowed}, not {given_as}"
    error = error_of("smoke", setting)
    assert error.what == what
    assert error.where == f"--set {setting}"
    *sections, leaf = key.split(".")
    lines = ["name: mine"] * (key != "name")
    lines += [f"{'  ' * depth}{section}:" for depth, section in enumerate(sections)]
    lines += [f"{'  ' * len(sections)}{leaf}: {value}"]
    error = error_of(recipe_file("\n".join(lines)))
    assert error.what == what
    assert error.where.endswith(f"mine.yaml:{len(lines)}")


def test_all_errors_come_in_one_message(recipe_file):
    text = "name: mine\nseed: x\nppo:\n  betta: 1\n  kl_coef: high\ndata: 5\nmodel:\n  lora: {r: 0}\n"
    message = str(error_of(recipe_file(text), "dpo.bet=1"))
    assert message.startswith("6 errors in mine.yaml:")
    for part in (
        "mine.yaml:2",
        "ppo.betta",
        "mine.yaml:5",
        "data must be a section",
        "model.lora.r",
        "--set dpo.bet=1",
    ):
        assert part in message


def test_a_missing_name(recipe_file):
    error = error_of(recipe_file("model: tiny\n"))
    assert error.what == "name is missing" and "add `name:" in error.fix


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("", "is empty", 1),
        ("# only a comment\n", "is empty", 1),
        ("- a\n- b\n", "mapping of sections", 1),
        ("just text\n", "mapping of sections", 1),
        ("name: a\nppo:\n\tlam: 1\n", "not valid YAML", 3),
        ("name: a\nreport:\n  title: 'open\nseed: 1\n", "not valid YAML", 3),
        ("name: a\nname: b\n", "name is there twice", 2),
        ("name: a\nppo:\n  lam: 1\n  gamma: 1\n  lam: 0.5\n", "ppo.lam is there twice", 5),
        ("name: a\n---\nname: b\n", "single document", 2),
        ("name: a\nreport: {title: !!python/name:os.system x}\n", "not valid YAML", 2),
        ("name: a\nreport: {title: \x07}\n", "does not allow the character", 2),
        ("name: a\nreport: &r {title: *r}\n", "refers to itself", 2),
        ("name: a\nreport: {title: 2024-13-45}\n", "report.title", 2),
        ("name: a\n? [a, b]\n: c\n", "a key must be a plain text", 2),
        ("name: a\nppo: {<<: 3}\n", "<< takes a mapping", 2),
    ],
)
def test_files_that_are_no_recipe(recipe_file, text, what, line):
    error = error_of(recipe_file(text))
    assert what in error.what
    assert error.where.endswith(f"mine.yaml:{line}")
    assert error.fix


def test_a_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"name: \xff\xfe\n")
    assert "UTF-8" in error_of(str(path)).fix


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: mine\r\nseed: 7\r\n")
    loaded = load_recipe(str(path))
    assert loaded.recipe.seed == 7 and loaded.origins["seed"] == "file:mine.yaml:2"


@pytest.mark.parametrize("setting", ["ppo.kl_coef", "=1", "ppo.=1", ".kl_coef=1", ""])
def test_malformed_set(setting):
    assert "is not KEY=VALUE" in error_of("smoke", setting).what


@pytest.mark.parametrize("setting", ['report.title="x', "data.source=*a", "ppo.lam=[1", "report.title=@x"])
def test_set_with_broken_yaml(setting):
    error = error_of("smoke", setting)
    assert "is not a YAML value" in error.what and error.where == f"--set {setting}"


def test_set_below_a_value():
    assert "ppo.kl_coef is 0.05 and has no key 'x'" in error_of("smoke", "ppo.kl_coef.x=1").what


# ---- finding recipes


def test_unknown_names_come_with_the_nearest(tmp_path, recipe_file):
    assert "'smoke'" in error_of("smok").fix
    assert "quickstart" in error_of("zzz").fix
    name = recipe_file("name: mine\n")
    assert "'mine.yaml'" in error_of(name.replace("mine", "mime")).fix
    assert "shipped recipe is named 'smoke'" in error_of(str(tmp_path / "smoke.yaml")).fix
    error = error_of(str(tmp_path))
    assert "is a folder" in error.what and "mine.yaml" in error.fix


def test_a_file_wins_over_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("smoke").write_text("name: my-own\n")
    assert load_recipe("smoke").recipe.name == "my-own"


def test_copy_recipe(tmp_path):
    target = copy_recipe("smoke", tmp_path)
    assert target == tmp_path / "smoke.yaml"
    assert target.read_bytes() == shipped_recipes()["smoke"].read_bytes()
    with pytest.raises(RecipeError, match="exists already"):
        copy_recipe("quickstart", target)
    assert copy_recipe("quickstart", target, force=True) == target
    assert load_recipe(str(target)).recipe.name == "quickstart"
    assert copy_recipe("smoke", tmp_path / "new" / "mine.yaml").is_file()
    with pytest.raises(RecipeError, match="did you mean 'smoke'"):
        copy_recipe("smokey", tmp_path)
    with pytest.raises(RecipeError, match="cannot write"):
        copy_recipe("smoke", target / "below-a-file.yaml")


# ---- checks of settings against each other


@pytest.mark.parametrize(
    ("sets", "what"),
    [
        (["ppo.per_device_train_batch_size=66"], "does not divide by samples_per_prompt = 4"),
        (["ppo.target_length=9"], "the target length would not count"),
        (["evaluate.judges=[gold, rm]", "evaluate.primary_judge=golf"], "'golf' is not in evaluate.judges"),
        (["ppo.num_mini_batches=3"], "does not divide by num_mini_batches = 3"),
        (["ppo.num_mini_batches=32"], "16 prompts in a rollout do not fill 32 mini-batches"),
        (["ppo.total_episodes=63"], "63 episodes do not fill one rollout of 64"),
        (["ppo.adaptive_kl=true", "ppo.kl_coef=0"], "KL coefficient of 0"),
        (["ppo.share_trunk=true", "ppo.value_learning_rate=0.1"], "learns at the policy's rate"),
        (["ppo.advantage=rloo", "ppo.samples_per_prompt=1"], "needs other samples of the same prompt"),
        (["ppo.advantage=rloo", "ppo.share_trunk=true"], "no critic to share a trunk with"),
        (["ppo.advantage=rloo", "ppo.critic_warmup_rollouts=2"], "no critic to warm up"),
        (["ppo.train_tokens=9", "ppo.train_seconds=9"], "an arm has one budget: tokens or seconds"),
        (["dpo.train_tokens=9", "dpo.train_seconds=9"], "an arm has one budget: tokens or seconds"),
        (["dpo.train_tokens=9", "dpo.max_steps=9"], "both say how long DPO trains"),
        (["dpo.train_seconds=9", "dpo.trainer=trl"], "TRL's trainer knows no budget"),
        (["ppo.train_seconds=9", "ppo.max_steps=9"], "PPO is as long as ppo.total_episodes says"),
        (["dpo.online={labels: rm}", "dpo.trainer=trl"], "does not sample from the policy"),
        (["dpo.online={labels: 'llm:tiny'}"], "a language model would be asked in every step"),
        (["dpo.online={labels: 'openai:a@http://b'}"], "a language model would be asked in every step"),
        (["dpo.online={labels: 'file:a.jsonl'}"], "gives no scores to samples"),
        (["dpo.online={labels: 'python:a'}"], "is incomplete"),
        (["dpo.label_smoothing=0.1", "dpo.loss_type=hinge"], "belongs to the losses sigmoid and robust"),
        (["dpo.loss_type=apo_zero"], "the engine has no loss apo_zero"),
        (["dpo.loss_type=exo_pair", "dpo.trainer=trl"], "exo_pair needs label smoothing"),
        (["data.eval_fraction=0"], "data.eval_fraction must lie between 0 and 1"),
        (["data.eval_fraction=1"], "data.eval_fraction must lie between 0 and 1"),
        (["data=f.jsonl", "data.eval_fraction=0"], "data.eval_fraction must lie between"),
        (["data=f.jsonl", "data.eval_split=test"], "'f.jsonl' is no data set with splits"),
        (["data=a/b", "data.eval_source=f.jsonl", "data.eval_split=test"], "'f.jsonl' is no data set with splits"),
        (["data.eval_split=test"], "'reviews' is no data set with splits"),
        (["data=a/b", "data.eval_split=train"], "take the same split"),
        (["data=f.jsonl", "data.eval_source=f.jsonl"], "take the same data"),
        (["data.annotators=[]"], "no annotator is left"),
        (["model.lora.target_modules=[]"], "no layer gets an adapter"),
        (["evaluate.best_of_n=1"], "best of 1 is the policy itself"),
        (["evaluate.judges=[gold, gold]"], "is there twice"),
        (["evaluate.judge.prompt_price_usd=2"], "counted with both prices"),
        (["evaluate.judge.completion_price_usd=2"], "counted with both prices"),
        (["evaluate.temperatures=[0.7, 1.3, 0.7]"], "evaluate.temperatures: 0.7 is there twice"),
        (["evaluate.temperatures=[0.7, 1.0]"], "have the temperature 1.0 already"),
        (["evaluate.temperature=0.7", "evaluate.temperatures=[0.7]"], "have the temperature 0.7 already"),
    ],
)
def test_settings_that_contradict_each_other(sets, what):
    error = error_of("smoke", *sets)
    assert what in error.what
    assert "(--set)" in error.where and error.fix


def test_conflicts_name_every_key_with_its_line(recipe_file):
    text = "name: mine\nppo:\n  per_device_train_batch_size: 30\n  samples_per_prompt: 4\n  total_episodes: 8\n"
    message = str(error_of(recipe_file(text)))
    assert message.startswith("2 errors in mine:")
    assert "ppo.per_device_train_batch_size = 30 (mine.yaml:3), ppo.samples_per_prompt = 4 (mine.yaml:4)" in message
    assert "ppo.total_episodes = 8 (mine.yaml:5)" in message


@pytest.mark.parametrize(
    "sets",
    [
        ["data=a/b", "data.eval_split=test", "data.eval_fraction=0"],
        ["data.eval_source=held_out.jsonl", "data.eval_fraction=0"],
        ["data=a/b", "data.eval_source=a/b", "data.eval_split=test"],
        ["dpo.label_smoothing=0.1"],
        ["ppo.target_length=9", "ppo.reward=length"],
        ["evaluate.judges=[gold, rm]", "evaluate.primary_judge=gold"],
        ["evaluate.judges=[gold, 'file:votes.jsonl']", "evaluate.primary_judge=Anna"],
        ["evaluate.primary_judge=gold"],
        ["ppo.total_episodes=64"],
        ["ppo.train_tokens=9", "ppo.total_episodes=63", "dpo.train_seconds=9", "dpo.num_train_epochs=3"],
    ],
)
def test_settings_that_agree(sets):
    assert load_recipe("smoke", sets).recipe.name == "smoke"


def test_a_held_out_split_is_of_data_that_has_splits(recipe_file, tmp_path):
    """A file's is refused where both are given. That of a recipe for a hub data set does not count for a file."""
    both = recipe_file("name: mine\ndata:\n  source: pairs.jsonl\n  eval_split: test\n")
    assert "mine.yaml:4" in error_of(both).where and "mine.yaml:3" in error_of(both).where
    loaded = load_recipe("hh-harmless", ["data.source=pairs.jsonl"])
    assert loaded.recipe.data.eval_split is None and loaded.origins["data.eval_split"] == "--set"
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(loaded))
    assert load_recipe(str(tmp_path / "resolved.yaml")).recipe == loaded.recipe
    assert "no data set with splits" in error_of("hh-harmless", "data=f.jsonl", "data.eval_split=test").what
    (tmp_path / "files").mkdir()  # of the user's, which lacks the splits of the recipe's data
    assert load_recipe("tldr", [f"data.source={tmp_path / 'files'}"]).recipe.data.eval_split is None
    splits = ["data.eval_split=test", "data.eval_fraction=0"]
    (tmp_path / "dict").mkdir()
    assert load_recipe("smoke", [f"data.source={tmp_path / 'dict'}", *splits]).recipe.data.eval_fraction == 0
    (tmp_path / "dict" / "state.json").write_text("{}")  # of one table, without splits
    assert "no data set with splits" in error_of("smoke", f"data.source={tmp_path / 'dict'}", *splits).what


@pytest.mark.parametrize(
    "spec",
    [
        "gold",
        "rm",
        "rm:OpenAssistant/reward-model-deberta-v3-large-v2",
        "implicit",
        "implicit:out/dpo,out/sft",
        "file:judgements.jsonl",
        "python:my.judges:prefer_short",
        "llm:Qwen/Qwen3-8B",
        "openai:gpt-x@http://127.0.0.1:8000/v1",
        "openai:org/model:tag@https://host/v1",
    ],
)
def test_known_judges(spec):
    assert load_recipe("smoke", [f'evaluate.judges=["{spec}"]']).recipe.evaluate.judges == [spec]


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("golden", "'gold'"),
        ("gold:x", "gold"),
        ("rm:", "rm[:MODEL]"),
        ("implicit:a", "POLICY,REFERENCE"),
        ("implicit:a,b,c", "POLICY,REFERENCE"),
        ("file:", "file:PATH"),
        ("python:module", "python:module:function"),
        ("llm", "llm:MODEL"),
        ("openai:gpt-x", "MODEL@BASE_URL"),
        ("", "known: "),
    ],
)
def test_unknown_judges(spec, hint):
    error = error_of("smoke", f'evaluate.judges=["{spec}"]')
    assert repr(spec) in error.what and hint in error.fix


def test_check_without_origins():
    recipe = Recipe(name="x", dpo=DpoSection(loss_type="ipo", label_smoothing=0.1))
    with pytest.raises(RecipeError) as caught:
        check(recipe)
    assert caught.value.where == "dpo.label_smoothing = 0.1, dpo.loss_type = ipo, dpo.trainer = engine"
    check(Recipe(name="x"))


# ---- back to YAML, and the schema


@pytest.mark.parametrize(
    "sets",
    [
        [],
        ["model.lora=null", "data.columns={prompt: question, chosen: 'a: b'}", "ppo.reward_clip=null"],
        ['report.title="a # b: [c], \\"d\\"\\nsecond line \\u263a"', "ppo.learning_rate=1e-5", "model=gguf:a b.gguf"],
        ['evaluate.judges=[gold, "implicit:a,b", "openai:m@http://h:1/v1"]', 'data.annotators=["1", "yes", "1e5", ""]'],
        [f"report.title={'long ' * 60}end", f'data.annotators=["{"a b " * 40}"]'],
        ['model.revision="1e5"', 'data.config="null"', 'data.split="12:30"', 'data.revision="0x1F"'],
    ],
)
def test_resolved_yaml_loads_back_as_the_same_recipe(tmp_path, sets):
    loaded = load_recipe("quickstart", sets)
    text = resolved_yaml(loaded)
    path = tmp_path / "recipe.resolved.yaml"
    path.write_text(text, encoding="utf-8")
    again = load_recipe(str(path))
    assert again.recipe == loaded.recipe
    assert set(again.origins) == set(loaded.origins) and "default" not in again.origins.values()
    for key, origin in loaded.origins.items():
        line = text.splitlines()[int(again.origins[key].rpartition(":")[2]) - 1]
        assert line.strip().startswith(f"{key.rpartition('.')[2]}:") and line.endswith(f"# {origin}")


@given(
    st.recursive(
        st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.none(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )
)
def test_one_line_reads_back(value):
    from toolkit.recipe.yaml_values import YamlLoader

    text = one_line(value)
    assert "\n" not in text
    loader = YamlLoader(f"key: {text}  # comment")
    assert loader.get_single_data() == {"key": value}


def test_flat_has_every_setting_once():
    recipe = Recipe(name="x")
    assert flat(recipe)["model.lora.r"] == 16 and flat(recipe)["data.columns"] == {}
    nulled = load_recipe("smoke", ["model.lora=null"]).recipe
    assert flat(nulled)["model.lora"] is None and "model.lora.r" not in flat(nulled)


def test_json_schema_knows_every_setting_and_the_short_forms():
    schema = json_schema()
    json.dumps(schema)
    assert {"type": "string", "description": "Short for model.name."} in schema["properties"]["model"]["anyOf"]
    assert set(schema["$defs"]["DpoSection"]["properties"]) == set(DpoSection.model_fields)
    assert schema["$defs"]["DpoSection"]["additionalProperties"] is False


def test_recipes_are_frozen():
    recipe = Recipe(name="x")
    with pytest.raises(ValidationError):
        recipe.seed = 1


def test_importing_recipes_is_light():
    code = (
        "import sys; from toolkit.recipe.files import load_recipe; load_recipe('smoke');"
        "print(sorted({'torch', 'transformers', 'numpy', 'datasets', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_values_of_python_on_one_line():
    values = {"at": Path("a/b c"), "grid": (np.float64(0.1), np.int64(3)), "row": np.array([1, 2])}
    assert yaml.safe_load(one_line(values)) == {"at": "a/b c", "grid": [0.1, 3], "row": [1, 2]}
