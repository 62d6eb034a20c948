"""The mathematics of ppo.py: numbers worked out by hand in the comments, and a property of each
function.

    python -m pytest -q tests/test_math.py
"""
import math
from types import SimpleNamespace

import pytest
import torch

import common
import ppo


def row(*numbers):
    return torch.tensor([[float(n) for n in numbers]])
def near(want, tolerance=1e-06):
    return pytest.approx(want, abs=tolerance)


# --------------------------------------------------------------------------- advantages
def test_gae_by_hand():
    # V = 1, 2, 3; R = 0, 0, 1; gamma = lam = 1/2, so gamma lam = 1/4
    # there is no value after the last token
    # delta_2 = 1 + 0 - 3 = -2          A_2 = -2
    # delta_1 = 0 + 1/2 3 - 2 = -1/2    A_1 = -1/2 + 1/4 (-2) = -1
    # delta_0 = 0 + 1/2 2 - 1 = 0       A_0 = 0 + 1/4 (-1) = -1/4       returns = A + V
    advantages, returns = ppo.gae(row(1, 2, 3), row(0, 0, 1), row(1, 1, 1), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[-0.25, -1, -2]] and returns.tolist() == [[0.75, 1, 1]]


def test_gae_over_a_gap_by_hand():
    # as above, with a masked token of any value and reward between the second and the third
    values, rewards, mask = row(1, 2, 77, 3), row(0, 0, 55, 1), row(1, 1, 0, 1)
    advantages, returns = ppo.gae(values, rewards, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[-0.25, -1, 0, -2]] and returns.tolist() == [[0.75, 1, 0, 1]]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (0.99, 0.0), (0.9, 1.0)])
def test_gae_is_the_sum_of_all_later_errors(gamma, lam):
    values, rewards, mask = torch.randn(5, 7), torch.randn(5, 7), torch.ones(5, 7)
    after = torch.cat([values[:, 1:], torch.zeros(5, 1)], 1)
    delta = rewards + gamma * after - values
    want = torch.stack([sum((gamma * lam) ** k * delta[:, t + k] for k in range(7 - t))
                        for t in range(7)], 1)
    torch.testing.assert_close(ppo.gae(values, rewards, mask, gamma, lam)[0], want)


def test_with_lambda_one_returns_are_discounted_rewards_whatever_the_values():
    rewards = torch.randn(2, 4)
    want = torch.stack([sum(0.9**k * rewards[:, t + k] for k in range(4 - t)) for t in range(4)], 1)
    _, returns = ppo.gae(torch.randn(2, 4), rewards, torch.ones(2, 4), 0.9, 1.0)
    torch.testing.assert_close(returns, want)


# --------------------------------------------------------------------------- losses
@pytest.mark.parametrize("ratio, advantage, loss, clipped", [
    (1.5, 2, -2.4, 1),   # min(1.5 x 2, 1.2 x 2) = 2.4: enough is enough
    (0.5, 2, -1.0, 0),   # min(0.5 x 2, 0.8 x 2) = 1.0: a good token that got unlikely
    (1.5, -1, 1.5, 0),   # min(-1.5, -1.2) = -1.5: a bad token that got likelier
    (0.5, -1, 0.8, 1),   # min(-0.5, -0.8) = -0.8: enough is enough
    (1.1, 2, -2.2, 0)])  # within 0.8 .. 1.2
def test_policy_loss_by_hand(ratio, advantage, loss, clipped):
    logprob = row(math.log(ratio))
    got, rho, binds = ppo.policy_loss(logprob, row(0), row(advantage), row(1), cliprange=0.2)
    assert (got.item(), rho.item(), binds.item()) == (near(loss), near(ratio), clipped)


def test_policy_loss_is_the_mean_over_unmasked_tokens():
    # the first and the second case of the table above, and a masked token: (-2.4 - 1.0) / 2
    logprobs = row(math.log(1.5), math.log(0.5), 9).requires_grad_()
    loss, _, binds = ppo.policy_loss(logprobs, row(0, 0, 0), row(2, 2, 9), row(1, 1, 0), 0.2)
    loss.backward()
    assert loss.item() == near(-1.7) and binds.tolist()[0][:2] == [1, 0]
    assert logprobs.grad[0, 2] == 0


@pytest.mark.parametrize("advantage", [-3.0, -0.5, 0.5, 3.0])
def test_the_gradient_pushes_a_token_the_way_of_its_advantage(advantage):
    # at ratio 1 the derivative by the log-probability is -A: a step down the loss makes a good
    # token likelier
    logprob = row(-1.0).requires_grad_()
    ppo.policy_loss(logprob, row(-1.0), row(advantage), row(1), 0.2)[0].backward()
    assert logprob.grad.item() == near(-advantage)


@pytest.mark.parametrize("ratio, advantage, alive", [
    (1.3, 1, False), (0.7, -1, False), (0.7, 1, True), (1.3, -1, True), (1.19, 1, True),
    (0.81, -1, True)])
def test_the_clip_kills_the_gradient_of_a_token_that_went_far_enough(ratio, advantage, alive):
    logprob = row(math.log(ratio)).requires_grad_()
    ppo.policy_loss(logprob, row(0), row(advantage), row(1), 0.2)[0].backward()
    assert logprob.grad.item() == near(-ratio * advantage * alive)


def test_value_loss_by_hand():
    # old 0.5, new 1.0, target 2: clipped to 0.7; errors 1 and 1.3, the larger counts: 1.69
    # old 0.5, new 0.6, target 0: within 0.3 .. 0.7; 0.36
    # 1/2 (1.69 + 0.36) / 2 = 0.5125
    loss, binds = ppo.value_loss(row(1.0, 0.6, 9), row(0.5, 0.5, 9), row(2, 0, 5), row(1, 1, 0),
                                 cliprange_value=0.2)
    assert loss.item() == near(0.5125) and binds.tolist()[0][:2] == [1, 0]


@pytest.mark.parametrize("vpred, gradient", [
    (0.1, 0.1 - 1), (0.5, 0.0), (-0.5, -0.5 - 1), (1.5, 0.0), (2.5, 1.5)])
def test_a_value_that_went_far_enough_has_no_gradient(vpred, gradient):
    # old 0, target 1, range 0.2: between 0.2 and 1.8 the clipped error, always 0.8, is the larger
    vpred = row(vpred).requires_grad_()
    ppo.value_loss(vpred, row(0), row(1), row(1), 0.2)[0].backward()
    assert vpred.grad.item() == near(gradient)


# --------------------------------------------------------------------------- KL
def test_kl_penalties_by_hand():
    # p = 1/2, 1/4 and reference 1/4, 1/2: differences ln 2 = 0.693147 and -ln 2
    # half a square: 0.240227
    logp, ref = row(math.log(0.5), math.log(0.25)), row(math.log(0.25), math.log(0.5))
    assert ppo.kl_penalty(logp, ref, "kl")[0].tolist() == near([0.693147, -0.693147])
    assert ppo.kl_penalty(logp, ref, "abs")[0].tolist() == near([0.693147, 0.693147])
    assert ppo.kl_penalty(logp, ref, "mse")[0].tolist() == near([0.240227, 0.240227])
    # over the vocabulary: (1/2, 1/2) from (1/4, 3/4) is
    # 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3 = 0.143841
    p, q = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.25, 0.75]]]).log()
    assert ppo.kl_penalty(p, q, "full").tolist() == [[near(0.143841)]]


def test_the_full_kl_is_the_mean_of_the_sampled_one():
    p, q = torch.randn(2, 3, 4, 10).log_softmax(-1)
    full = ppo.kl_penalty(p, q, "full")
    torch.testing.assert_close(full, (p.exp() * ppo.kl_penalty(p, q, "kl")).sum(-1))
    assert (full > 0).all() and not ppo.kl_penalty(p, p, "full").any()


def test_the_adaptive_controller_by_hand():
    # beta 0.2, target 6, horizon 10000
    # KL 12: error 1, clipped to 0.2; 256 samples: x 1 + 0.2 x 0.0256 = 1.00512
    # KL 6.6: error 0.1, 5000 samples: x 1.05. KL 0: error -1, clipped to -0.2, 10000 samples: x 0.8
    controller = ppo.AdaptiveKLController(0.2, target=6, horizon=10000)
    for kl, n, want in ((12, 256, 0.201024), (6.6, 5000, 0.201024 * 1.05),
                        (0, 10000, 0.201024 * 1.05 * 0.8)):
        controller.update(kl, n)
        assert controller.value == near(want)


@pytest.mark.parametrize("kl, direction", [(5.9, -1), (6.0, 0), (6.1, 1), (-50.0, -1), (1e9, 1)])
def test_beta_rises_above_the_target_and_falls_below(kl, direction):
    controller, fixed = ppo.AdaptiveKLController(0.2, 6, 1000), ppo.FixedKLController(0.2)
    controller.update(kl, 100), fixed.update(kl, 100)
    change = controller.value - 0.2
    assert (change > 0) - (change < 0) == direction and abs(change) <= 0.2 * 0.2 * 0.1 + 1e-12
    assert fixed.value == 0.2


# --------------------------------------------------------------------------- moments
def test_masked_moments_by_hand():
    # 1 and 3 of 1, 3, 5: mean 2; squares of the errors 1 + 1, by n - 1 = 1: 2, by n: 1
    values, mask = row(1, 3, 5), row(1, 1, 0)
    assert common.masked_mean(values, mask) == 2
    assert common.masked_var(values, mask) == 2
    assert common.masked_var(values, mask, unbiased=False) == 1
    both, masks = torch.tensor([[1.0, 3, 5], [2, 4, 9]]), torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert common.masked_mean(both, masks, axis=1).tolist() == [2, 6.5]
    assert common.masked_mean(both, masks, axis=0).tolist() == [1, 3.5, 9]
    assert common.masked_mean(both, masks) == 17 / 4  # of tokens, not of rows


def test_whitening_by_hand():
    # 1, 2, 3: mean 2, variance 1
    values, mask = row(1, 2, 3, 99), row(1, 1, 1, 0)
    assert common.masked_whiten(values, mask)[0, :3].tolist() == near([-1, 0, 1])
    assert common.masked_whiten(values, mask, shift_mean=False)[0, :3].tolist() == near([1, 2, 3])
    assert common.whiten(row(2, 4, 6)).tolist()[0] == near([-1, 0, 1])
    assert common.whiten(row(2, 4, 6), shift_mean=False).tolist()[0] == near([3, 4, 5])


def test_whitened_values_have_mean_0_and_variance_1_whatever_their_scale_and_mask():
    values, mask = torch.randn(6, 9), (torch.rand(6, 9) > 0.3).float()
    white = common.masked_whiten(values, mask)
    assert common.masked_mean(white, mask).item() == near(0)
    assert common.masked_var(white, mask).item() == near(1, 1e-5)
    again = common.masked_whiten(7 * values + 3 + 100 * (1 - mask), mask)
    torch.testing.assert_close(again * mask, white * mask, atol=1e-4, rtol=1e-4)


def test_whitening_sees_all_ranks():
    """Each of two ranks whitens its half like the whole; they exchange sums alone."""
    values, mask = torch.randn(4, 5), torch.ones(4, 5)
    whole = common.masked_whiten(values, mask)
    mean = values.mean()
    others = [torch.tensor([10.0, values[2:].sum()]), ((values[2:] - mean) ** 2).sum()]
    mine = common.masked_whiten(values[:2], mask[:2], sum_over_ranks=lambda x: x + others.pop(0))
    torch.testing.assert_close(mine, whole[:2])


def test_one_value_has_no_variance_and_is_left_alone():
    assert common.masked_whiten(row(5, 7), row(1, 0))[0, 0] == 5
    assert common.masked_var(row(5, 7), row(1, 0)) == 0


def moments(*batches, ranks=1, gather=None):
    running = ppo.RunningMoments(SimpleNamespace(num_processes=ranks, gather=gather))
    return running, [running.update(torch.tensor(batch)) for batch in batches]


def test_running_moments_by_hand():
    # 1, 3: mean 2, std sqrt(2). 5, 7, 9: mean 7, std 2
    # all five: mean 5, squares 16 + 4 + 0 + 4 + 16 = 40, by 4: 10
    running, batches = moments([1.0, 3.0], [5.0, 7.0, 9.0])
    assert batches == [(2, near(2**0.5)), (7, near(2))]
    assert (running.mean, running.std) == (near(5), near(10**0.5))
    assert (running.var, running.count) == (near(8), 5)


def test_running_moments_are_those_of_all_numbers_together():
    batches = [(1e4 + torch.randn(n)).tolist() for n in (1, 4, 1, 9)]
    everything = torch.tensor(sum(batches, [])).double()
    running, _ = moments(*batches)
    assert running.mean == near(everything.mean().item())
    assert running.std == near(everything.std().item())


def test_running_moments_see_all_ranks():
    other = torch.tensor([5.0, 7.0])
    running, _ = moments([1.0, 3.0], ranks=2, gather=lambda x: torch.cat([x, other]))
    assert running.mean == 4 and running.count == 4 and running.std == near((20 / 3) ** 0.5)


def test_one_number_alone_has_the_standard_deviation_one():
    running, batches = moments([5.0])
    assert batches == [(5, 1)] and (running.mean, running.std) == (5, 1)


# --------------------------------------------------------------------------- log-probabilities
def test_logprobs_by_hand():
    # logits 0 and ln 3: probabilities 1/4 and 3/4
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, math.log(3)]]])
    want = near([math.log(0.25), math.log(0.75)])
    assert ppo.logprobs_from_logits(logits, torch.tensor([[0, 1]]))[0].tolist() == want
    assert ppo.logprobs_from_logits(logits, None, gather=False)[0, 0].tolist() == want


def test_logprobs_are_those_of_a_distribution_in_float32():
    logits = (1000 * torch.randn(3, 4, 9)).bfloat16()
    everything = torch.stack(
        [ppo.logprobs_from_logits(logits, torch.full((3, 4), i)) for i in range(9)], -1)
    assert everything.dtype == torch.float32
    torch.testing.assert_close(everything.exp().sum(-1), torch.ones(3, 4))
    torch.testing.assert_close(everything, ppo.logprobs_from_logits(logits, None, gather=False))


def test_entropy_by_hand():
    # four alike: ln 4 = 1.386294; certain: 0
    # 1/2, 1/4, 1/4: 1/2 ln 2 + 2/4 ln 4 = 3/2 ln 2 = 1.039721
    p = torch.tensor([[[0.25] * 4, [0.5, 0.25, 0.25, 0.0], [1.0, 0, 0, 0]]])
    assert ppo.entropy_from_logits((p + 1e-30).log())[0].tolist() == near([1.386294, 1.039721, 0])


@pytest.mark.parametrize("shape", [(3,), (2, 70), (130,)])
def test_logprobs_and_their_gradient_are_those_of_each_row(shape):
    """d log p(label) / d logits = onehot(label) - p, in all rows of a large batch alike."""
    x, labels, upstream = torch.randn(*shape, 11), torch.randint(11, shape), torch.randn(shape)
    x.requires_grad_()
    got = ppo.logprobs_from_logits(x * 1, labels)
    gradient, = torch.autograd.grad(got, x, upstream)
    p = x.detach().softmax(-1)
    onehot = torch.nn.functional.one_hot(labels, 11)
    torch.testing.assert_close(got, (p * onehot).sum(-1).log())
    torch.testing.assert_close(gradient, upstream[..., None] * (onehot - p))


@pytest.mark.parametrize("shape", [(3,), (2, 70), (130,)])
def test_entropy_is_of_each_distribution_whatever_is_added_to_its_logits(shape):
    logits = torch.randn(*shape, 11)
    p = logits.softmax(-1)
    torch.testing.assert_close(ppo.entropy_from_logits(logits), -(p * p.log()).sum(-1))
    shifted = ppo.entropy_from_logits(logits + 100)
    torch.testing.assert_close(shifted, -(p * p.log()).sum(-1), atol=1e-4, rtol=1e-4)
    half = logits.bfloat16()  # computed in bfloat16 it would have three digits
    torch.testing.assert_close(ppo.entropy_from_logits(half), ppo.entropy_from_logits(half.float()))
