"""A process reward model in PPO: a bandit whose optimum is known, and where the rewards of steps stand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from toolkit.engine.reward_model import RewardModel, load_scorer
from toolkit.errors import RecipeError
from toolkit.models.encoding import Tree
from toolkit.models.resolve import resolve
from toolkit.models.reward_head import ProcessHead, RewardHead
from toolkit.models.tokenizer import load_tokenizer
from toolkit.ppo import PPOConfig, PPOTrainer
from toolkit.ppo.rewards import Responses, model_reward
from toolkit.recipe.training import ModelSection

VOCABULARY = {"<pad>": 0, "<end>": 1, ";": 2, "a": 3, "b": 4, "c": 5}
PROMPT = [3, 4]
LIMIT_NATS = 0.02


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel(VOCABULARY, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def config(initializer_range: float = 0.3, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=initializer_range,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **more,
    )


@pytest.fixture(scope="module")
def process_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random logits of steps that stand between semicolons, spread so that probabilities lie far apart."""
    folder = tmp_path_factory.mktemp("rm") / "model"
    torch.manual_seed(4)
    model = LlamaForSequenceClassification(config(num_labels=1))
    with torch.no_grad():
        model.score.weight.mul_(3.0)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    RewardHead(process=ProcessHead(";", "min")).write(folder)
    return folder


def loaded(folder: Path) -> RewardModel:
    ref = resolve(str(folder))
    return load_scorer(ref, ModelSection(dtype="float32"), load_tokenizer(ref))


@torch.no_grad()
def sequences(model: Any, longest: int = 3) -> dict[tuple[int, ...], float]:
    """The log-probability of every response; token 1 ends one."""
    log_probs, open_ = {}, {(): 0.0}
    for length in range(1, longest + 1):
        contexts = torch.tensor([[*PROMPT, *ids] for ids in open_])
        log_p = model(input_ids=contexts).logits[:, -1].double().log_softmax(-1).tolist()
        longer = {
            (*ids, t): open_[ids] + row[t]
            for ids, row in zip(open_, log_p, strict=True)
            for t in range(len(VOCABULARY))
        }
        log_probs |= {ids: value for ids, value in longer.items() if ids[-1] == 1 or length == longest}
        open_ = {ids: value for ids, value in longer.items() if ids[-1] != 1}
    return log_probs


@pytest.mark.slow
@pytest.mark.invariant
def test_ppo_with_rewards_of_steps_finds_the_optimum(process_model: Path, tmp_path: Path) -> None:
    """The rewards of steps add up to the solution score, so that the optimum is pi_ref exp(score / beta)."""
    beta = 0.3
    torch.manual_seed(1)
    model = LlamaForCausalLM(config(initializer_range=0.1)).eval()
    started = sequences(model)
    reward_model = loaded(process_model)
    [scores] = reward_model.scores([Tree(PROMPT, [list(ids) for ids in started])])
    rewards = dict(zip(started, scores, strict=True))
    assert max(scores) - min(scores) > 0.5
    log_z = float(torch.tensor([log_p + rewards[ids] / beta for ids, log_p in started.items()]).logsumexp(0))
    optimum = {ids: log_p + rewards[ids] / beta - log_z for ids, log_p in started.items()}

    def off(policy: Any) -> float:
        return sum(math.exp(log_p) * (log_p - optimum[ids]) for ids, log_p in sequences(policy).items())

    assert off(model) > 5 * LIMIT_NATS
    args = PPOConfig(
        output_dir=str(tmp_path),
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=1024,
        samples_per_prompt=64,  # of 16 copies of the prompt: a row with all would be mostly mask
        total_episodes=1024 * 150,
        num_ppo_epochs=2,
        response_length=3,
        stop_token_ids=[1],
        missing_eos_penalty=None,
        kl_coef=beta,
        lam=1.0,
        reward_shape="steps",
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    data = [{"prompt": "a b"}] * 16
    PPOTrainer(model, args, str(process_model), data, processing_class=tokenizer()).train()
    assert off(model) < LIMIT_NATS


@pytest.mark.invariant
def test_rewards_of_steps_stand_where_steps_are_closed_and_add_up_to_the_score(process_model: Path) -> None:
    responses = [[3, 2, 4, 5, 1], [2, 3], [5, 1], [2, 1]]
    of_prompt = Responses(["a b"] * 4, ["a;bc", ";a", "c", ";"], [False] * 4, [Tree(PROMPT, responses)])
    model = loaded(process_model)
    steps = model_reward(model, tokenizer(), tokenizer(), "steps")(of_prompt)
    assert [[at for at, _ in each] for each in steps if isinstance(each, list)] == [[1, 4], [1], [1], []]
    scores = model_reward(model, tokenizer(), tokenizer())(of_prompt)
    sums = [sum(value for _, value in each) for each in steps if isinstance(each, list)]
    assert sums == pytest.approx(list(scores)) and scores == pytest.approx(model.scores(of_prompt.trees)[0])
    assert scores[3] == 0.0  # a response without a step has shown nothing


@pytest.mark.invariant
def test_a_reward_model_with_other_tokens_gives_steps_at_the_sampled_ones(process_model: Path) -> None:
    other = tokenizer()
    other.chat_template = "{{ messages }}"  # the policy's: its texts are read again in the reward model's tokens
    of_prompt = Responses(["a b"], ["a ; b c"], [False], [Tree(PROMPT, [[3, 2, 4, 5, 1]])])
    [steps] = model_reward(loaded(process_model), tokenizer(), other, "steps")(of_prompt)
    assert isinstance(steps, list) and [at for at, _ in steps] == [1, 4]


@pytest.mark.fault
def test_rewards_of_steps_need_a_process_reward_model(process_model: Path, tmp_path: Path) -> None:
    plain = loaded(process_model)
    plain = RewardModel(plain.engines, RewardHead())
    with pytest.raises(RecipeError, match="no rewards of steps"):
        model_reward(plain, tokenizer(), tokenizer(), "steps")
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "per_device_train_batch_size": 4, "total_episodes": 4}
    args = PPOConfig(**settings, value_head_init="reward_model", report_to="none")
    with pytest.raises(RecipeError, match="logits of steps"):
        PPOTrainer(
            LlamaForCausalLM(config()), args, str(process_model), [{"prompt": "a b"}], processing_class=tokenizer()
        )
    with pytest.raises(RecipeError, match="reward_shape"):
        PPOConfig(output_dir=str(tmp_path), reward_shape="dense")
