"""``PPOTrainer`` as its users call it: rewards of every kind, options, export, and what it refuses."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.ppo_models import LORA_CONFIG as LORA
from support.ppo_models import shake, timeless
from support.ppo_trainers import PROMPTS, config, length_reward, train
from transformers import AutoModelForSequenceClassification, LlamaConfig

from toolkit.engine.engine import Engine
from toolkit.errors import DataError, ModelError, RecipeError
from toolkit.models.encoding import Tree
from toolkit.models.inspect import backbone, disable_dropout
from toolkit.models.load import load_reward_model, new_reward_model
from toolkit.models.resolve import resolve
from toolkit.models.reward_head import reward_head
from toolkit.models.save import save_policy
from toolkit.models.tokenizer import load_tokenizer
from toolkit.ppo import Ensemble, PPOTrainer
from toolkit.ppo.models import AdapterModels, SeparateModels
from toolkit.ppo.rewards import Responses
from toolkit.recipe.training import ModelSection

pytestmark = pytest.mark.invariant

# ---------------------------------------------------------------- training


def test_a_function_teaches_the_policy(tmp_path: Path) -> None:
    """Short answers are rewarded, so answers get shorter: 0.1 of a token is far beyond the noise of the seed."""
    args = config(
        tmp_path,
        per_device_train_batch_size=64,
        samples_per_prompt=16,
        total_episodes=64 * 12,
        num_ppo_epochs=2,
        learning_rate=3e-3,
        missing_eos_penalty=None,
        kl_coef=0.0,
        response_length=12,
    )
    logs = train(PPOTrainer("tiny", args, length_reward, PROMPTS, peft_config=LORA))
    scores = [log["objective/score"] for log in logs if "objective/score" in log]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 1.0
    assert scores == [-log["length/mean"] for log in logs if "length/mean" in log]


@pytest.mark.parametrize("share_trunk", [False, True])
@pytest.mark.parametrize("kind", ["adapter", "folder", "loaded", "ensemble", "list"])
def test_every_kind_of_reward_trains(
    kind: str, share_trunk: bool, tmp_path: Path, reward_folder: Path, reward_adapter: Path
) -> None:
    section = ModelSection(name="tiny", dtype="float32", lora=None)
    loaded = load_reward_model(resolve(str(reward_folder)), section)
    reward: Any = {
        "adapter": str(reward_adapter),
        "folder": str(reward_folder),
        "loaded": loaded,
        "ensemble": Ensemble([str(reward_folder), str(reward_adapter)], how="uwo"),
        "list": [str(reward_folder), length_reward],
    }[kind]
    args = config(tmp_path, share_trunk=share_trunk, reward_weights=[1.0, 0.1] if kind == "list" else None)
    trainer = PPOTrainer("tiny", args, reward, PROMPTS, peft_config=LORA)
    assert isinstance(trainer.models, AdapterModels)
    before = {name: weight.clone() for name, weight in trainer.models.trained_state().items()}
    logs = train(trainer)
    assert len(logs) == 4 and logs[0]["objective/kl"] == 0 and logs[0]["policy/first_ratio_error"] <= 1e-6
    moved = [name for name, weight in trainer.models.trained_state().items() if not torch.equal(weight, before[name])]
    assert any(".default." in name for name in moved)
    assert any(".critic." in name for name in moved) is not share_trunk
    assert any("value_head" in name for name in moved)


@pytest.mark.parametrize(
    ("more", "shares"),
    [
        ({"modules_to_save": ("score",)}, True),
        ({"modules_to_save": ("score", "embed_tokens")}, False),
        ({"modules_to_save": ("score",), "trainable_token_indices": [5, 6, 7, 400, 401]}, False),
    ],
    ids=["low rank", "modules", "tokens"],
)
def test_a_reward_models_adapter_counts_whole(
    tmp_path: Path, tiny_ref: Any, tokenizer: Any, more: dict[str, Any], shares: bool
) -> None:
    """What it trained beside low-rank weights and its head: such an adapter does not share the policy's trunk."""
    section = ModelSection(name="tiny", dtype="float32")
    base = new_reward_model(tiny_ref, section, tokenizer.pad_token_id, seed=1)
    more |= {"modules_to_save": list(more["modules_to_save"])}  # to which peft adds
    more |= {"modules_to_save": list(more["modules_to_save"])}  # to which peft adds
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="SEQ_CLS", **more))
    for marker in ("lora_B", "embed_tokens.modules_to_save", "trainable_tokens_delta"):
        shake(adapted, marker, seed=3, scale=0.5)
    save_policy(adapted, tokenizer, tmp_path / "rm", dtype=torch.float32, base=tiny_ref)
    trees = [Tree([5, 6], [[400, 401, 2], [7, 5, 9]])]
    [expected] = Engine(disable_dropout(adapted).eval(), 0, dtype=torch.float32).scores(trees)
    trainer = PPOTrainer("tiny", config(tmp_path / "out"), str(tmp_path / "rm"), PROMPTS, peft_config=LORA)
    texts = [tokenizer.decode(ids) for ids in trees[0].response_ids]
    [reward] = trainer.score.rewards
    given = reward(Responses([PROMPTS[0]["prompt"]] * 2, texts, [False, True], trees))
    assert given == pytest.approx(expected, abs=1e-4)
    assert isinstance(trainer.models, AdapterModels) and bool(trainer.models.reward_heads) is shares


def test_a_reward_models_adapter_that_lacks_a_weight_is_refused(
    tmp_path: Path, reward_adapter: Path, tokenizer: Any
) -> None:
    folder = Path(shutil.copytree(reward_adapter, tmp_path / "rm"))
    weights = load_file(folder / "adapter_model.safetensors")
    lacking = next(name for name in weights if "lora_B" in name)
    save_file({name: w for name, w in weights.items() if name != lacking}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=re.escape(lacking)) as caught:
        PPOTrainer("tiny", config(tmp_path / "out"), str(folder), PROMPTS, peft_config=LORA)
    assert caught.value.where == str(folder) and caught.value.fix


def scores_under(tmp_path: Path, reward: Any, **options: Any) -> tuple[list[float], list[str]]:
    """The raw scores and texts of a first rollout, the texts ended all."""
    args = config(tmp_path, total_episodes=8, reward_clip=None, log_completions_steps=1, **options)
    trainer = PPOTrainer("tiny", args, reward, PROMPTS, peft_config=LORA)
    trainer.collect_rollout(0, trainer.schedule[0]["prompts"])
    assert trainer.rollout is None
    [table] = (tmp_path / "completions").glob("*.parquet")
    rows = sorted(pq.read_table(table).to_pylist(), key=lambda row: (row["prompt"], row["completion"]))
    return [row["score"] for row in rows], [row["completion"] for row in rows]


def test_weights_and_ensembles_reach_the_scores(tmp_path: Path, reward_folder: Path, reward_adapter: Path) -> None:
    names = [str(reward_folder), str(reward_adapter)]
    alone = [scores_under(tmp_path / str(i), name) for i, name in enumerate(names)]
    (first, texts), (second, same_texts) = alone
    assert texts == same_texts and first != pytest.approx(second, abs=1e-3)
    for how, expected in (
        ("mean", [(a + b) / 2 for a, b in zip(first, second, strict=True)]),
        ("wco", [min(a, b) for a, b in zip(first, second, strict=True)]),
        ("uwo", [(a + b) / 2 - 3.0 * ((a - b) / 2) ** 2 for a, b in zip(first, second, strict=True)]),
    ):
        scores, _ = scores_under(tmp_path / how, Ensemble(names, how=how, lam=3.0))  # type: ignore[arg-type]
        assert scores == pytest.approx(expected, abs=1e-4)

    def letters(completions: list[str], **_: Any) -> list[float]:
        return [len(text) / 10 for text in completions]

    scores, _ = scores_under(tmp_path / "list", [names[0], letters], reward_weights=[2.0, -0.5])
    assert scores == pytest.approx([2 * a - 0.05 * len(t) for a, t in zip(first, texts, strict=True)], abs=1e-4)


def test_a_column_cannot_pass_for_the_completions(tmp_path: Path) -> None:
    rows = [{**row, "completions": "something that nobody sampled"} for row in PROMPTS]
    seen: list[str] = []

    def score(completions: list[str]) -> list[float]:
        seen.extend(completions)
        return [0.0] * len(completions)

    PPOTrainer("tiny", config(tmp_path, total_episodes=8), score, rows, peft_config=LORA).train()
    assert len(seen) == 8 and "something that nobody sampled" not in seen


def test_reference_and_critic_may_be_named(tmp_path: Path, new_tiny: Any, tokenizer: Any, reward_folder: Path) -> None:
    """KL counts from the reference, and the first values are the critic's, whatever policy and reward are."""
    other = new_tiny()
    shake(other, "mlp", scale=0.02)
    save_policy(other, tokenizer, tmp_path / "other", dtype=torch.float32, base=resolve("tiny"))
    args = config(tmp_path / "out", total_episodes=8)
    tree = [Tree([300, 301], [[400, 401, 2]])]
    expected = Engine(other, 0, dtype=torch.float32).logps(tree)[0][0]
    reward = load_reward_model(resolve(str(reward_folder)), ModelSection(dtype="float32"))
    value = Engine(reward, 0, dtype=torch.float32).scores([Tree([300], [[301]])])[0][0] - 0.25
    for reference in (other, str(tmp_path / "other")):
        for peft_config in (None, LORA):
            trainer = PPOTrainer(
                "tiny", args, length_reward, PROMPTS, None, tokenizer, str(reward_folder), reference, peft_config
            )
            batch = trainer.models.engine.pack(tree)
            torch.testing.assert_close(trainer.models.reference_logps(batch, 1.0), expected, rtol=0, atol=1e-5)
            assert float(trainer.models.values(batch)[0]) == pytest.approx(value, abs=1e-4)
            assert train(trainer)[0]["objective/kl"] > 0.01


def test_the_critic_can_stand_still(tmp_path: Path) -> None:
    trainer = PPOTrainer("tiny", config(tmp_path, value_learning_rate=0.0), length_reward, PROMPTS, peft_config=LORA)
    before = [weight.clone() for weight in trainer.models.critic_parameters()]
    policy = [weight.clone() for weight in trainer.models.policy_parameters()]
    trainer.train()
    assert all(torch.equal(w, b) for w, b in zip(trainer.models.critic_parameters(), before, strict=True))
    assert not all(torch.equal(w, b) for w, b in zip(trainer.models.policy_parameters(), policy, strict=True))


def test_adapters_of_an_embedding_train_and_are_part_of_the_reference(tmp_path: Path, new_tiny: Any) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    policy = get_peft_model(new_tiny(), lora)
    shake(policy, "lora_embedding_B", scale=0.1)
    before = {n: w.clone() for n, w in policy.named_parameters() if ".lora_embedding_" in n}
    trainer = PPOTrainer(policy, config(tmp_path), length_reward, PROMPTS)
    logs = train(trainer)
    assert logs[0]["objective/kl"] == 0 and [log["objective/kl"] for log in logs if "objective/kl" in log][-1] != 0
    after = dict(policy.named_parameters())
    assert before and all(not torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize(("kind", "bf16"), [("lora", False), ("full", False), ("lora", True)])
def test_gradient_checkpointing_changes_no_number(kind: str, bf16: bool, tmp_path: Path, new_tiny: Any) -> None:
    def weights(on: bool) -> dict[str, torch.Tensor]:
        more = {"gradient_checkpointing": on, "bf16": bf16}
        peft = LORA if kind == "lora" else None
        trainer = PPOTrainer("tiny", config(tmp_path, **more), length_reward, PROMPTS, peft_config=peft)
        trainer.train()
        layer = backbone(trainer.models.policy).layers[0]
        assert layer.gradient_checkpointing is on
        return trainer.models.trained_state()

    stored, recomputed = weights(False), weights(True)
    for name, weight in stored.items():
        torch.testing.assert_close(recomputed[name], weight, rtol=0, atol=1e-5, msg=name)


def test_accumulation_changes_no_number(tmp_path: Path) -> None:
    """A minibatch is divided; transformers' own accumulation must not merge updates or add rollouts."""

    def weights(parts: int) -> dict[str, torch.Tensor]:
        args = config(tmp_path, gradient_accumulation_steps=parts, num_mini_batches=1, num_ppo_epochs=2)
        trainer = PPOTrainer("tiny", args, length_reward, PROMPTS, peft_config=LORA)
        steps: list[tuple[int, int]] = []
        step = trainer.training_step

        def counted(model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            steps.append((inputs["rollout"], inputs["update"]))
            return step(model, inputs, num_items_in_batch)

        trainer.training_step = counted  # type: ignore[method-assign]
        trainer.train()
        assert steps == [(rollout, update) for rollout in range(2) for update in range(2)]
        assert trainer.state.global_step == 4
        assert (len(trainer.rollout.minibatches[0]) > 1) is (parts > 1)
        return trainer.models.trained_state()

    whole, parted = weights(1), weights(3)
    for name, weight in whole.items():
        torch.testing.assert_close(parted[name], weight, rtol=0, atol=1e-5, msg=name)


def test_conversations_train_in_the_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    seen: list[Any] = []

    def score(prompts: list[Any], completions: list[Any]) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(completions)

    rows = [{"prompt": [{"role": "user", "content": f"Tell me {n} things"}]} for n in range(4)]
    trainer = PPOTrainer("tiny", config(tmp_path), score, rows, processing_class=chat, peft_config=LORA)
    assert all(log["objective/kl"] == 0 for log in train(trainer)[:1])
    prompt, [message] = seen[0]
    assert prompt in [row["prompt"] for row in rows] and message.keys() == {"role", "content"}
    ids = trainer.schedule.prompts[0].ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user: Tell me 0 things\nassistant:"


@pytest.mark.parametrize("share_trunk", [False, True])
def test_full_fine_tuning(tmp_path: Path, new_tiny: Any, reward_folder: Path, share_trunk: bool) -> None:
    args = config(tmp_path, share_trunk=share_trunk, value_head_init="reward_model")
    trainer = PPOTrainer(new_tiny(), args, str(reward_folder), PROMPTS)
    models = trainer.models
    assert isinstance(models, SeparateModels) and (models.critic is None) is share_trunk
    if not share_trunk:  # the reward model can be the critic, with its mean
        assert models.value_shift == 0.25 and bool(models.value_head.weight.any())
        models.save_critic(tmp_path / "critic")
        assert reward_head(tmp_path / "critic").mean == 0.25
    logs = train(trainer)
    assert logs[0]["objective/kl"] == 0 and logs[2]["objective/kl"] != 0


@pytest.mark.parametrize("more", [{}, {"lora_dropout": 0.5}, {"alpha_pattern": {"q_proj": 64}}, {"use_dora": True}])
@pytest.mark.parametrize("bf16", [False, True])
def test_an_adapter_goes_on_training_against_a_copy_of_itself(
    tmp_path: Path, new_tiny: Any, more: dict[str, Any], bf16: bool
) -> None:
    policy = new_tiny().to(torch.bfloat16 if bf16 else torch.float32)
    policy = get_peft_model(policy, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **more))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.02)
    tree = [Tree([300, 301, 302], [[400, 401, 2]])]
    policy.eval()
    with torch.no_grad():
        started = Engine(policy, 0, dtype=torch.float32).logps(tree)[0][0]
    args = config(tmp_path, bf16=bf16)
    trainer = PPOTrainer(policy, args, length_reward, PROMPTS)
    assert args.max_steps == -1 and trainer.args.max_steps == 4  # the caller's settings stay as they are
    logs = train(trainer)
    assert logs[0]["objective/kl"] == 0 and logs[0]["policy/first_ratio_error"] <= 1e-6
    batch = trainer.models.engine.pack(tree)
    torch.testing.assert_close(trainer.models.reference_logps(batch, 1.0), started, rtol=0, atol=0.1 if bf16 else 1e-5)
    with torch.no_grad():
        assert not torch.allclose(trainer.models.policy_logps(batch, 1.0)[0], started, atol=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_rloo_has_no_critic_and_ignores_its_settings(tmp_path: Path, reward_folder: Path, lora: bool) -> None:
    """Nothing of a critic is made, trained, logged or saved, and its settings change no number."""
    logs = {}
    ignored = {"gamma": 0.5, "lam": 0.1, "vf_coef": 3.0, "cliprange_value": 0.01, "value_learning_rate": 0.5}
    for name, values in {"defaults": {}, "ignored": ignored | {"value_head_init": "reward_model"}}.items():
        args = config(tmp_path / name, advantage="rloo", **values)
        trainer = PPOTrainer("tiny", args, str(reward_folder), PROMPTS, peft_config=LORA if lora else None)
        logs[name] = [timeless(log) for log in train(trainer)]
        models = trainer.models
        assert not models.has_critic and models.critic_parameters() == [] and not hasattr(models, "value_head")
        assert {id(weight) for weight in models.policy_parameters()} == {
            id(weight) for weight in models.parameters() if weight.requires_grad
        }
        assert not any("critic" in part for part, _ in models.named_modules())
        trainer.save_model()
        assert trainer.optimizer is not None and len(trainer.optimizer.param_groups) == 1
        assert list((tmp_path / name).glob("*.safetensors")) and not (tmp_path / name / "critic").exists()
        assert not any(key.startswith("value/") for log in logs[name] for key in log)
    assert logs["defaults"] == logs["ignored"]


@pytest.mark.parametrize("share_trunk", [False, True])
def test_a_warming_critic_leaves_the_policy(tmp_path: Path, share_trunk: bool) -> None:
    args = config(tmp_path, critic_warmup_rollouts=1, share_trunk=share_trunk, ptx_coef=1.0, ptx_batch_size=1)
    text = [{"prompt": "The film was", "completion": " a triumph."}]
    logs = train(PPOTrainer("tiny", args, length_reward, PROMPTS, ptx_dataset=text, peft_config=LORA))
    assert [log["policy/ratio"] == pytest.approx(1.0, abs=1e-6) for log in logs] == [True, True, True, False]
    assert logs[1]["value/loss"] != logs[0]["value/loss"]
    assert logs[2]["objective/kl"] == 0


def test_a_rollout_that_moved_too_far_is_left(tmp_path: Path) -> None:
    logs = train(
        PPOTrainer(
            "tiny",
            config(tmp_path, target_kl=1e-9, num_ppo_epochs=3, total_episodes=8),
            length_reward,
            PROMPTS,
            peft_config=LORA,
        )
    )
    seen = ["policy/approx_kl" in log for log in logs]
    assert seen == [True, True, False, False, False, False]  # the second update sees what the first one did
    assert logs[-1]["grad_norm"] == 0


def test_other_text_is_mixed_in(tmp_path: Path) -> None:
    text = [{"prompt": "The film was", "completion": " a triumph."}, {"prompt": "The book", "completion": " was dull."}]
    args = config(
        tmp_path, ptx_coef=10.0, ptx_batch_size=2, total_episodes=8 * 8, missing_eos_penalty=None, kl_coef=0.0
    )
    logs = train(
        PPOTrainer(
            "tiny", args, lambda completions: [0.0] * len(completions), PROMPTS, ptx_dataset=text, peft_config=LORA
        )
    )
    losses = [log["loss/ptx"] for log in logs]
    assert losses[-1] < 0.7 * losses[0]
    with pytest.raises(RecipeError, match="no text to mix in"):
        PPOTrainer("tiny", config(tmp_path, ptx_coef=1.0), length_reward, PROMPTS, peft_config=LORA)


def test_centring_makes_the_start_zero(tmp_path: Path, reward_folder: Path) -> None:
    args = config(
        tmp_path,
        center_samples=64,
        per_device_train_batch_size=64,
        samples_per_prompt=16,
        num_mini_batches=1,
        total_episodes=64,
    )
    logs = train(PPOTrainer("tiny", args, length_reward, PROMPTS, peft_config=LORA))
    assert abs(logs[0]["objective/score"]) < 1.0 < logs[0]["length/mean"]


@pytest.mark.parametrize(
    "options",
    [
        {"logging_steps": 3},
        {"share_trunk": True},
        {"advantage": "rloo", "reference_decay": 0.5, "log_completions_steps": 2},
        {"ema_decay": 0.9, "center_samples": 4},
    ],
)
def test_a_resumed_trainer_equals_an_uninterrupted_one(tmp_path: Path, options: dict[str, Any]) -> None:
    def make(name: str, **more: Any) -> PPOTrainer:
        args = config(tmp_path / name, save_strategy="steps", save_steps=1, kl_milestones=[-1.0], **options, **more)
        return PPOTrainer("tiny", args, length_reward, PROMPTS, peft_config=LORA)

    whole, part = make("whole"), make("part")
    whole.train()
    part.train()
    resumed = make("part")
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
    assert resumed.state.global_step == 4 and resumed.milestones.ahead == whole.milestones.ahead == []
    # Passed by the first rollout, whose KL is 0, and not again by what follows the checkpoint.
    assert [path.name for path in (tmp_path / "part" / "milestones").iterdir()] == ["kl--1"]
    assert resumed.score.mean == whole.score.mean and (resumed.score.mean == 0.0) is ("center_samples" not in options)
    logs, expected = ([log for log in t.state.log_history if "loss" in log] for t in (resumed, whole))
    for log, same in zip(logs, expected, strict=True):
        assert timeless(log) == pytest.approx(timeless(same), rel=1e-4, abs=1e-5)
    for name, weight in resumed.models.trained_state().items():
        torch.testing.assert_close(weight, whole.models.trained_state()[name], rtol=0, atol=1e-6, msg=name)
    averages = [(resumed.average, whole.average)]
    averages.append((resumed.models.averaged_reference, whole.models.averaged_reference))
    for of_resumed, of_whole in averages:
        assert (of_resumed is None) is (of_whole is None)
        for average, same in zip(of_resumed.averages, of_whole.averages, strict=True) if of_whole else ():
            torch.testing.assert_close(average, same, rtol=0, atol=1e-6)
    if args_of := options.get("log_completions_steps"):
        of_part, of_whole = ((tmp_path / name / "completions.jsonl").read_text() for name in ("part", "whole"))
        assert of_part == of_whole and len(of_part.splitlines()) == 2 * 8 and args_of == 2


def test_what_a_reward_model_may_be_to_the_policy(
    tmp_path: Path, tiny_ref: Any, tokenizer: Any, reward_adapter: Path, reward_folder: Path, new_tiny: Any
) -> None:
    """It shares the base, or starts the critic, only where it reads the policy's tokens; and it never trains."""
    assert PPOTrainer("tiny", config(tmp_path), str(reward_adapter), PROMPTS, peft_config=LORA).models.reward_heads
    other = tmp_path / "other"
    shutil.copytree(reward_adapter, other)
    templated = load_tokenizer(resolve(str(reward_adapter)))
    templated.chat_template = "{{ messages[0].content }}"
    templated.save_pretrained(other)
    assert PPOTrainer("tiny", config(tmp_path), str(other), PROMPTS, peft_config=LORA).models.reward_heads == {}

    loaded = AutoModelForSequenceClassification.from_pretrained(reward_folder)
    args = config(tmp_path, value_head_init="reward_model")
    more = {"reward_processing_classes": [templated]}
    assert bool(PPOTrainer(new_tiny(), args, loaded, PROMPTS, **more).models.value_head.weight.any())
    templated.add_tokens(["<another>"])
    assert not bool(PPOTrainer(new_tiny(), args, loaded, PROMPTS, **more).models.value_head.weight.any())

    before = {name: weight.clone() for name, weight in loaded.state_dict().items()}
    PPOTrainer(new_tiny(), config(tmp_path), loaded, PROMPTS, value_model=loaded).train()
    assert all(bool((weight == before[name]).all()) for name, weight in loaded.state_dict().items())


@pytest.mark.parametrize(("name", "kind"), [("adamw_torch_fused", torch.optim.AdamW), ("rmsprop", torch.optim.RMSprop)])
def test_the_optimiser_is_the_one_that_was_named(tmp_path: Path, name: str, kind: Any) -> None:
    args = config(tmp_path, optim=name, value_learning_rate=5e-3, weight_decay=0.1)
    trainer = PPOTrainer("tiny", args, length_reward, PROMPTS, peft_config=LORA)
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is kind
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(1e-3, 0.1), (5e-3, 0.1)]
    assert optimizer.param_groups[0].get("fused", False) == (kind is torch.optim.AdamW)
    assert len(train(trainer)) == 4


def test_an_optimiser_that_chooses_weights_or_has_two_modes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = PPOTrainer("tiny", config(tmp_path), length_reward, PROMPTS, peft_config=LORA)
    two_modes = type("ScheduleFree", (torch.optim.AdamW,), {"eval": lambda self: None})
    for choice in ((torch.optim.AdamW, {"optimizer_dict": {}}), (lambda: torch.optim.AdamW, {}), (two_modes, {})):
        monkeypatch.setattr(trainer, "get_optimizer_cls_and_kwargs", lambda *_, choice=choice: choice)
        with pytest.raises(RecipeError, match="cannot train with adamw_torch_fused"):
            trainer.create_optimizer()


# ---------------------------------------------------------------- refusals


def test_what_the_trainer_refuses(
    tmp_path: Path, new_tiny: Any, tokenizer: Any, reward_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def make(model: Any = "tiny", reward: Any = length_reward, data: Any = None, **more: Any) -> PPOTrainer:
        values = more.pop("values", {})
        return PPOTrainer(model, config(tmp_path, **values), reward, PROMPTS if data is None else data, **more)

    with pytest.raises(DataError, match="no column prompt"):
        make(data=[{"text": "a"}])
    with pytest.raises(DataError, match="there is no prompt"):
        make(data=[])
    with pytest.raises(DataError, match="no prompt is left"):
        make(values={"max_prompt_length": 1})
    make(data=[PROMPTS[0], {"prompt": "a film " * 20, "wanted": 0}], values={"max_prompt_length": 8})
    assert "1 of 2 prompts have more than 8 tokens" in caplog.text
    with pytest.raises(RecipeError, match="max_steps is 5, and all episodes are done after 4"):
        make(values={"max_steps": 5})
    with pytest.raises(RecipeError, match="adapter is named mine"):
        make(model=get_peft_model(new_tiny(), LORA, adapter_name="mine"))
    with pytest.raises(RecipeError, match="2 rewards and 1 weights"):
        make(reward=[length_reward, length_reward], values={"reward_weights": [1.0]})
    with pytest.raises(RecipeError, match="int is no reward"):
        make(reward=3)
    with pytest.raises(RecipeError, match="an ensemble needs members"):
        make(reward=Ensemble([]))
    with pytest.raises(RecipeError, match="members are reward models"):
        make(reward=Ensemble([length_reward]))  # type: ignore[list-item]
    with pytest.raises(RecipeError, match="only the low-rank weights of an adapter"):
        make(peft_config=LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(RecipeError, match="pissa changes the weights below the adapter"):
        make(peft_config=LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))
    with pytest.raises(RecipeError, match="cannot be another model"):
        make(value_model=str(reward_folder), values={"share_trunk": True})
    with pytest.raises(RecipeError, match="trains without a critic"):
        make(value_model=str(reward_folder), values={"advantage": "rloo"})
    with pytest.raises(ModelError, match="not a reward model"):
        make(reward="tiny")
    with pytest.raises(ModelError, match="there is no model"):
        make(model="no-such-model")
    with pytest.raises(RecipeError, match="an adapter already"):
        adapted = get_peft_model(new_tiny(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
        make(model=adapted, peft_config=LORA)
    with pytest.raises(ModelError, match="one output"):
        two = AutoModelForSequenceClassification.from_config(
            LlamaConfig(vocab_size=2048, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        )
        make(value_model=two)
    trainer = make(reward=lambda completions: [None] * len(completions))
    with pytest.raises(ModelError, match="no reward applies"):
        trainer.train()
    trainer = make(reward=lambda completions: [float("inf")] * len(completions))
    with pytest.raises(ModelError, match="not finite"):
        trainer.train()
    with pytest.raises(DataError, match="no prompt to evaluate on"):
        make().evaluate()
