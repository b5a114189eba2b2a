"""PPO's equations against slow loops over single tokens in Python's floats, and against numbers worked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.ppo import objective

seeds = st.integers(0, 2**31)
quick = settings(max_examples=25, deadline=None)
CLIP = 0.2


def batch(
    seed: int, *names: str, garbage: float = math.nan, scale: float = 1.0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A left-aligned mask of random lengths and fp64 values whose masked entries hold ``garbage``."""
    generator = torch.Generator().manual_seed(seed)
    n, width = (int(torch.randint(1, 6, (1,), generator=generator)) for _ in range(2))
    lengths = torch.randint(1, width + 1, (n,), generator=generator)
    mask = torch.arange(width)[None] < lengths[:, None]
    values = [scale * torch.randn(n, width, generator=generator, dtype=torch.float64) for _ in names]
    return mask, [torch.where(mask, value, garbage) for value in values]


def tokens(mask: torch.Tensor) -> list[tuple[int, int]]:
    return [(s, t) for s in range(mask.shape[0]) for t in range(mask.shape[1]) if mask[s, t]]


def close(actual: torch.Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- moments


@quick
@given(seeds)
def test_masked_moments(seed: int) -> None:
    mask, [x] = batch(seed, "x")
    sampled = [float(x[at]) for at in tokens(mask)]
    mean = sum(sampled) / len(sampled)
    variance = sum((v - mean) ** 2 for v in sampled) / max(len(sampled) - 1, 1)
    assert float(objective.masked_mean(x, mask)) == pytest.approx(mean, abs=1e-6)
    assert float(objective.masked_var(x, mask)) == pytest.approx(variance, abs=1e-6)


@quick
@given(seeds, st.booleans())
def test_whitening(seed: int, shift_mean: bool) -> None:
    mask, [x] = batch(seed, "x", scale=3.0)
    sampled = [float(x[at]) for at in tokens(mask)]
    mean = sum(sampled) / len(sampled)
    variance = sum((v - mean) ** 2 for v in sampled) / max(len(sampled) - 1, 1)
    expected = [[0.0] * mask.shape[1] for _ in range(mask.shape[0])]
    for s, t in tokens(mask):
        expected[s][t] = (float(x[s, t]) - mean) / math.sqrt(variance + 1e-8) + (0.0 if shift_mean else mean)
    close(objective.masked_whiten(x, mask, shift_mean=shift_mean), expected)


def test_whitening_by_hand() -> None:
    # 1, 2, 3: mean 2, variance 1 with Bessel's correction; the 99 is padding.
    x, mask = torch.tensor([[1.0, 2.0], [3.0, 99.0]]), torch.tensor([[True, True], [True, False]])
    close(objective.masked_whiten(x, mask), [[-1.0, 0.0], [1.0, 0.0]])
    close(objective.masked_whiten(x, mask, shift_mean=False), [[1.0, 2.0], [3.0, 0.0]])


# ---------------------------------------------------------------- KL, scores, rewards


@quick
@given(seeds)
def test_kl_estimators(seed: int) -> None:
    mask, [p, q] = batch(seed, "p", "q", garbage=0.0)
    k1, k3 = objective.kl_tokens(p, q, "k1"), objective.kl_tokens(p, q, "k3")
    for at in tokens(mask):
        log_ratio = float(p[at]) - float(q[at])
        assert float(k1[at]) == pytest.approx(log_ratio, abs=1e-9)
        assert float(k3[at]) == pytest.approx(math.exp(-log_ratio) - 1 + log_ratio, abs=1e-9)
    assert bool((k3 >= 0).all())


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimators_are_unbiased(estimator: str) -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    exact = float((p * (p / q).log()).sum())
    assert float((p * objective.kl_tokens(p.log(), q.log(), estimator)).sum()) == pytest.approx(exact, abs=1e-6)


def test_a_tiny_ratio_keeps_its_k3() -> None:
    # exp(-x) - 1 + x = x^2/2 drowns in fp32 rounding unless expm1 is used.
    value = objective.kl_tokens(torch.tensor([[1e-3]]), torch.zeros(1, 1), "k3")
    assert float(value) == pytest.approx(5e-7, rel=0.05)


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="k2"):
        objective.kl_tokens(torch.zeros(1, 1), torch.zeros(1, 1), "k2")


@pytest.mark.parametrize(
    ("clip", "penalty", "expected"),
    [
        (None, None, [12.0, -0.5, -7.0, 3.0]),
        (5.0, None, [5.0, -0.5, -5.0, 3.0]),
        (None, -1.0, [12.0, -1.0, -7.0, -1.0]),
        (5.0, -8.0, [5.0, -8.0, -5.0, -8.0]),  # the penalty is not a score: it is not clipped, and it replaces
        (5.0, 0.0, [5.0, 0.0, -5.0, 0.0]),
    ],
)
def test_shape_scores(clip: float | None, penalty: float | None, expected: list[float]) -> None:
    scores, truncated = torch.tensor([12.0, -0.5, -7.0, 3.0]), torch.tensor([False, True, False, True])
    shaped = objective.shape_scores(scores, truncated, clip=clip, missing_eos_penalty=penalty)
    assert shaped.tolist() == expected
    assert scores.tolist() == [12.0, -0.5, -7.0, 3.0]


def test_token_rewards_by_hand() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    kl = torch.tensor([[1.0, 2.0, 3.0], [4.0, math.nan, math.inf]])
    rewards = objective.token_rewards(kl, torch.tensor([10.0, -1.0]), mask, 0.1)
    close(rewards, [[-0.1, -0.2, 9.7], [-1.4, 0.0, 0.0]])


@quick
@given(seeds, st.floats(0, 1))
def test_token_rewards(seed: int, kl_coef: float) -> None:
    mask, [kl] = batch(seed, "kl")
    scores = torch.arange(mask.shape[0], dtype=torch.float64) - 1.5
    expected = [[0.0] * mask.shape[1] for _ in range(mask.shape[0])]
    for s, t in tokens(mask):
        last = (s, t + 1) not in tokens(mask)
        expected[s][t] = -kl_coef * float(kl[s, t]) + (float(scores[s]) if last else 0.0)
    close(objective.token_rewards(kl, scores, mask, kl_coef), expected)


# ---------------------------------------------------------------- advantages


@quick
@given(seeds, st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_double_sum_of_its_definition(seed: int, gamma: float, lam: float) -> None:
    mask, [rewards, values] = batch(seed, "rewards", "values")
    advantages, returns = objective.gae(rewards, values, mask, gamma=gamma, lam=lam)
    expected_a = [[0.0] * mask.shape[1] for _ in range(mask.shape[0])]
    expected_r = [row[:] for row in expected_a]
    for s in range(mask.shape[0]):
        n = int(mask[s].sum())
        v = [float(values[s, t]) for t in range(n)] + [0.0]
        delta = [float(rewards[s, t]) + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected_a[s][t] = sum((gamma * lam) ** k * delta[t + k] for k in range(n - t))
            expected_r[s][t] = expected_a[s][t] + v[t]
    close(advantages, expected_a)
    close(returns, expected_r)
    single, _ = objective.gae(rewards.float(), values.float(), mask, gamma=gamma, lam=lam)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), advantages, rtol=1e-5, atol=1e-5)


@quick
@given(seeds)
def test_gae_at_its_two_ends(seed: int) -> None:
    """lambda 1 is reward to go minus value; lambda 0 is the one-step error (Schulman et al. 2016, section 3)."""
    mask, [rewards, values] = batch(seed, "rewards", "values", garbage=0.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    full, returns = objective.gae(rewards, values, mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(full, torch.where(mask, to_go - values, 0.0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(returns, torch.where(mask, to_go, 0.0), rtol=1e-6, atol=1e-6)
    one_step, _ = objective.gae(rewards, values, mask, gamma=0.9, lam=0.0)
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    expected = torch.where(mask, rewards + 0.9 * following - values, 0.0)
    torch.testing.assert_close(one_step, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_rloo_is_its_definition_one_response_at_a_time(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n_prompts, k, width = 4, 2 + seed, 6
    lengths = torch.randint(1, width + 1, (n_prompts * k, 1), generator=generator)
    mask = torch.arange(width) < lengths
    rewards = torch.randn(n_prompts * k, width, generator=generator, dtype=torch.float64)
    rewards = torch.where(mask, rewards, math.nan)  # behind the last token nothing counts
    advantages = objective.rloo(rewards, mask, k)
    totals = [
        sum(r for r, m in zip(*row, strict=True) if m) for row in zip(rewards.tolist(), mask.tolist(), strict=True)
    ]
    for i, total in enumerate(totals):
        first = i - i % k
        others = [totals[j] for j in range(first, first + k) if j != i]
        expected = total - sum(others) / (k - 1)
        assert advantages[i].tolist() == pytest.approx([expected if m else 0.0 for m in mask[i].tolist()])
    # A prompt's advantages add up to 0, and a reward that all its samples get changes nothing.
    per_response = advantages[:, 0].view(n_prompts, k)
    torch.testing.assert_close(per_response.sum(1), torch.zeros(n_prompts, dtype=torch.float64))
    shifted = rewards.clone()
    shifted[:, 0] += torch.arange(n_prompts).repeat_interleave(k)
    torch.testing.assert_close(objective.rloo(shifted, mask, k), advantages)


def test_gae_does_not_see_padding() -> None:
    mask, [rewards, values] = batch(7, "rewards", "values", garbage=1e6)
    wide = torch.nn.functional.pad(mask, (0, 3))
    more = [torch.nn.functional.pad(x, (0, 3), value=math.nan) for x in (rewards, values)]
    narrow_a, narrow_r = objective.gae(rewards, values, mask, gamma=0.9, lam=0.8)
    wide_a, wide_r = objective.gae(*more, wide, gamma=0.9, lam=0.8)
    assert torch.equal(wide_a[:, : mask.shape[1]], narrow_a) and torch.equal(wide_r[:, : mask.shape[1]], narrow_r)
    assert not wide_a[:, mask.shape[1] :].any()


# ---------------------------------------------------------------- losses


def slow_policy_loss(new: torch.Tensor, old: torch.Tensor, a: torch.Tensor, mask: torch.Tensor) -> tuple[float, ...]:
    loss = ratios = clipped = kl = 0.0
    for at in tokens(mask):
        ratio = math.exp(float(new[at]) - float(old[at]))
        advantage = float(a[at])
        surrogate = min(ratio * advantage, min(max(ratio, 1 - CLIP), 1 + CLIP) * advantage)
        loss -= surrogate
        ratios += ratio
        clipped += surrogate < ratio * advantage
        kl += ratio - 1 - math.log(ratio)
    return loss, ratios, clipped, kl


@quick
@given(seeds)
def test_policy_loss(seed: int) -> None:
    mask, [new, old, advantages] = batch(seed, "new", "old", "advantages", scale=0.4)
    n = int(mask.sum())
    actual = objective.policy_loss(new, old, advantages, mask, cliprange=CLIP, n_tokens=n)
    loss, ratios, clipped, kl = slow_policy_loss(new, old, advantages, mask)
    assert float(actual.loss) == pytest.approx(loss / n, abs=1e-6)
    assert float(actual.ratio_sum) == pytest.approx(ratios, abs=1e-6)
    assert int(actual.clipped) == clipped
    assert float(actual.approx_kl_sum) == pytest.approx(kl, abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.5, 2.0, -2.4, 0.0, 1),  # a better action is followed to 1.2 and no further
        (1.5, -2.0, 3.0, 3.0, 0),  # away from a worse action there is no limit
        (0.5, 2.0, -1.0, -1.0, 0),
        (0.5, -2.0, 1.6, 0.0, 1),
        (1.1, 2.0, -2.2, -2.2, 0),
        (1.0, 0.5, -0.5, -0.5, 0),
    ],
)
def test_the_policy_clip_by_hand(ratio: float, advantage: float, loss: float, gradient: float, clipped: int) -> None:
    new = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    actual = objective.policy_loss(
        new,
        torch.zeros(1, 1, dtype=torch.float64),
        torch.full((1, 1), advantage, dtype=torch.float64),
        torch.ones(1, 1, dtype=torch.bool),
        cliprange=0.2,
        n_tokens=1,
    )
    actual.loss.backward()
    assert new.grad is not None
    assert (actual.loss.item(), new.grad.item(), actual.clipped.item()) == pytest.approx((loss, gradient, clipped))


def slow_value_loss(new: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    loss = 0.0
    for at in tokens(mask):
        v, before, target = float(new[at]), float(old[at]), float(returns[at])
        near = min(max(v, before - CLIP), before + CLIP)
        loss += 0.5 * max((v - target) ** 2, (near - target) ** 2)
    return loss


@quick
@given(seeds)
def test_value_loss(seed: int) -> None:
    mask, [new, old, returns] = batch(seed, "new", "old", "returns", scale=0.4)
    actual, _ = objective.value_loss(new, old, returns, mask, cliprange_value=CLIP, n_tokens=int(mask.sum()))
    assert float(actual) == pytest.approx(slow_value_loss(new, old, returns, mask) / int(mask.sum()), abs=1e-6)


@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, 0.5 * 1.8**2, 0.0, 1),  # moved by 1 towards the target: held at 0.2
        (0.1, 2.0, 0.5 * 1.9**2, -1.9, 0),
        (1.0, -2.0, 0.5 * 3.0**2, 3.0, 0),  # moved away from the target: the larger error counts
    ],
)
def test_the_value_clip_by_hand(value: float, target: float, loss: float, gradient: float, clipped: int) -> None:
    new = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    zero, mask = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    actual, n_clipped = objective.value_loss(new, zero, zero + target, mask, cliprange_value=0.2, n_tokens=1)
    actual.backward()
    assert new.grad is not None
    assert (actual.item(), new.grad.item(), n_clipped.item()) == pytest.approx((loss, gradient, clipped))


@quick
@given(seeds)
def test_losses_of_parts_add_up_to_the_whole_with_their_gradients(seed: int) -> None:
    mask, [new, old, third] = batch(seed, "new", "old", "third", garbage=0.0, scale=0.4)
    n = int(mask.sum())

    def both(x: torch.Tensor, rows: slice) -> torch.Tensor:
        policy = objective.policy_loss(x, old[rows], third[rows], mask[rows], cliprange=CLIP, n_tokens=n)
        value, _ = objective.value_loss(x, old[rows], third[rows], mask[rows], cliprange_value=CLIP, n_tokens=n)
        return policy.loss + value

    whole = new.clone().requires_grad_()
    total = both(whole, slice(None))
    total.backward()
    parts = new.clone().requires_grad_()
    summed = 0.0
    for s in range(mask.shape[0]):
        loss = both(parts[s : s + 1], slice(s, s + 1))
        loss.backward()
        summed += loss.item()
    assert summed == pytest.approx(total.item(), abs=1e-9)
    torch.testing.assert_close(parts.grad, whole.grad)


@quick
@given(seeds, st.sampled_from([math.nan, math.inf, 1e30]))
def test_what_masked_entries_hold_reaches_neither_losses_nor_gradients(seed: int, garbage: float) -> None:
    mask, clean = batch(seed, "new", "old", "third", garbage=0.0, scale=0.4)
    dirty = [torch.where(mask, x, garbage) for x in clean]
    n = int(mask.sum())
    results = []
    for new, old, third in (clean, dirty):
        leaf = new.clone().requires_grad_()
        policy = objective.policy_loss(leaf, old, third, mask, cliprange=CLIP, n_tokens=n)
        value, held = objective.value_loss(leaf, old, third, mask, cliprange_value=CLIP, n_tokens=n)
        (policy.loss + value).backward()
        assert leaf.grad is not None
        numbers = (policy.loss.detach(), value.detach(), held, policy.ratio_sum, policy.clipped, policy.approx_kl_sum)
        results.append(([float(number) for number in numbers], leaf.grad[mask]))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


# ---------------------------------------------------------------- the controller


def test_adaptive_kl_by_hand() -> None:
    controller = objective.AdaptiveKl(0.2, target=6.0, horizon=10_000)
    controller.update(60.0, 100)  # far above: the error is clipped at 0.2
    assert controller.coef == pytest.approx(0.2 * (1 + 0.2 * 100 / 10_000))
    controller = objective.AdaptiveKl(0.2, target=6.0, horizon=10_000)
    controller.update(0.0, 100)
    assert controller.coef == pytest.approx(0.2 * (1 - 0.2 * 100 / 10_000))
    controller = objective.AdaptiveKl(0.2, target=6.0, horizon=10_000)
    controller.update(6.6, 1000)  # 10 % above
    assert controller.coef == pytest.approx(0.2 * 1.01)
    controller.update(6.0, 1000)
    assert controller.coef == pytest.approx(0.2 * 1.01)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (10.0, -1.0, 3.0),  # clipping the ratio alone would give 10: c bounds it
        (2.0, -1.0, 2.0),  # below c nothing changes
        (10.0, 1.0, -1.2),  # a positive advantage has the clip of the ratio alone
    ],
)
def test_the_dual_clip_by_hand(ratio: float, advantage: float, loss: float) -> None:
    logps = torch.tensor([[math.log(ratio)]], requires_grad=True)
    one = torch.tensor([[True]])
    dual = objective.policy_loss(
        logps, torch.zeros(1, 1), torch.tensor([[advantage]]), one, cliprange=0.2, n_tokens=1, dual_clip=3.0
    )
    assert dual.loss.item() == pytest.approx(loss, rel=1e-5)


def test_step_rewards_are_added_at_their_tokens() -> None:
    rewards = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0]])
    out = objective.add_steps(rewards, [[(0, 0.5), (1, -1.0), (0, 0.25)], []])
    assert out.tolist() == [[0.75, 0.0, 0.0], [2.0, 0.0, 0.0]]
    assert rewards.tolist() == [[0.0, 1.0, 0.0], [2.0, 0.0, 0.0]]


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_in_two_processes_is_that_of_one(shift_mean: bool) -> None:
    """Two shares whose sums are added up, as all_reduce does, against the whole."""
    values = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.7
    shares = [(values[:2], mask[:2]), (values[2:], mask[2:])]
    expected = objective.masked_whiten(values, mask, shift_mean=shift_mean)
    known: list[torch.Tensor] = []
    for _ in range(8):  # every pass knows one more of the sums
        asked: list[list[torch.Tensor]] = [[], []]
        both = [
            objective.masked_whiten(v, m, shift_mean=shift_mean, over=_known(known, asked[rank]))
            for rank, (v, m) in enumerate(shares)
        ]
        if len(known) == len(asked[0]):
            break
        known.append(asked[0][len(known)] + asked[1][len(known)])
    torch.testing.assert_close(torch.cat(both), expected)


def _known(known: list[torch.Tensor], asked: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def over(tensor: torch.Tensor) -> torch.Tensor:
        asked.append(tensor)
        return known[len(asked) - 1] if len(asked) <= len(known) else tensor

    return over
