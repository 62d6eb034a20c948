"""ppo.py. "P1" to "P39" are known defects of TRL 0.7.10's PPO: a test that names one fails there.

    python -m pytest -q tests/test_ppo.py
"""
import json
import math
import sys
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path

import accelerate
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from conftest import CAUSAL, EOS, PAD, ROWS, SEQ2SEQ, VOCAB
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

import ppo
from common import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    InputError,
    disable_dropout,
    logprobs_from_logits,
    set_seed,
)

EVERY = CAUSAL + SEQ2SEQ
FEW = ("gpt2", "qwen3", "t5", "bart")  # learned and rotary positions, relative ones, two stacks
START = {"t5": PAD, "bart": EOS}  # the decoder's start token
def ones(*shape):
    return torch.ones(*shape)
def scores_of(*numbers):
    return [torch.tensor(float(n)) for n in numbers]
greedily = {"return_prompt": False, "do_sample": False}

# Two orders of the same float32 sums differ by some 1e-7 of the largest term. A log-probability of
# about 5 nats, or the ratio of two of them, is then the same to 1e-5; a mistake of 1 % is not.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def row_alone(model, query, response, temperature=1.0):
    """One row through the bare model, alone and without padding.

    Returns log-softmax [R, V], log-probabilities [R], and values [R] of the response's tokens."""
    if model.config.is_encoder_decoder:
        logits, _, values = model(input_ids=query[None], decoder_input_ids=response[None])
        rows, labels = slice(0, len(response) - 1), response[1:]
    else:
        logits, _, values = model(input_ids=torch.cat([query, response])[None])
        rows, labels = slice(len(query) - 1, -1), response
    logp = (logits[0, rows] / temperature).log_softmax(-1)
    return logp, logp.gather(1, labels[:, None])[:, 0], values[0, rows]


def by_hand(*args):
    with torch.no_grad():
        return row_alone(*args)


def forward(trainer, queries, responses, inputs=None, masks=None):
    """The trainer's own forward pass: log-probabilities, values, and masks, all [B, R]."""
    inputs = inputs or trainer.prepare_model_inputs(queries, responses)
    with torch.no_grad():
        logprobs, _, values, masks = trainer.batched_forward_pass(
            trainer.model, queries, responses, inputs, response_masks=masks)
    return logprobs, values, masks


def gradient_norms(trainer):
    """A list that gets the length of the gradient at each optimizer step."""
    norms = []

    def note(optimizer, args, kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in parameters if p.grad is not None]
        norms.append(torch.stack([grad.norm() for grad in grads]).norm().item())

    trainer.optimizer.optimizer.register_step_pre_hook(note)
    return norms


def sgd(model, lr=0.1):
    """An optimizer that hides no factor of the gradient."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def assert_same_weights(one, two):
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(
            a, b, atol=1e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def step(trainer, *args, **kwargs):
    """The statistics of a step as tensors, which are easier to compare."""
    stats = trainer.step(*args, **kwargs)
    return {name: torch.as_tensor(value) for name, value in stats.items()}


class Say(LogitsProcessor):
    """Force these tokens: the same in all rows, or (a tuple) one for each row."""

    def __init__(self, *tokens):
        self.tokens, self.width = tokens, None

    def __call__(self, input_ids, scores):
        self.width = self.width or input_ids.shape[1]
        said = torch.tensor(self.tokens[input_ids.shape[1] - self.width]).expand(len(scores))
        return torch.full_like(scores, -math.inf).scatter(1, said[:, None], 0.0)


def say(*tokens):
    processors = LogitsProcessorList([Say(*tokens)])
    return {"logits_processor": processors, "max_new_tokens": len(tokens), "do_sample": False}


def response_of(trainer, *tokens, **given):
    """What `generate` returns when the model writes these tokens."""
    query = torch.tensor([5])
    return trainer.generate([query], return_prompt=False, **say(*tokens), **given)[0].tolist()


# --------------------------------------------------------------------------- the configuration
@pytest.mark.parametrize("script", ["/some/where/happy.py", "happy"])
def test_experiments_are_named_after_the_script(script, monkeypatch):
    """P37: 0.7.10 took three letters off whatever stood in argv."""
    monkeypatch.setattr(sys, "argv", [script])
    assert ppo.PPOConfig().exp_name == "happy"


def test_steps_are_samples_and_give_the_number_of_updates(make_trainer):
    """P37: steps did nothing."""
    assert ppo.PPOConfig(steps=100, batch_size=8).total_ppo_epochs == 13
    assert make_trainer(steps=9).config.total_ppo_epochs == 3


def test_sizes_are_products_of_sizes(make_trainer):
    c = make_trainer(batch_size=12, mini_batch_size=2, gradient_accumulation_steps=3).config
    sizes = (c.backward_batch_size, c.global_backward_batch_size, c.global_batch_size)
    assert sizes == (6, 6, 12) and c.world_size == 1


@pytest.mark.parametrize("arch, lora, seq2seq", [
    ("gpt2", None, False), ("gpt2", "fresh", False), ("t5", None, True)])
def test_the_kind_of_model_is_known_at_run_time(make_trainer, make_model, arch, lora, seq2seq):
    c = make_trainer(make_model(arch, lora=lora)).config
    assert (c.is_encoder_decoder, c.is_peft_model) == (seq2seq, bool(lora))


@pytest.mark.parametrize("old, value, new, want", [
    ("forward_batch_size", 4, "mini_batch_size", 4),
    ("optimize_cuda_cache", True, "optimize_device_cache", True)])  # P20
def test_an_old_name_sets_the_new_one(old, value, new, want):
    with pytest.warns(UserWarning, match=new):
        config = ppo.PPOConfig(batch_size=8, **{old: value})
    assert getattr(config, new) == want
    assert config.backward_batch_size == config.mini_batch_size


@pytest.mark.parametrize("wrong, named", [
    ({"batch_size": 6, "mini_batch_size": 4}, "batch_size=6.* to mini_batch_size=2 "),
    ({"batch_size": 6, "mini_batch_size": 2, "gradient_accumulation_steps": 2}, "batch_size=6"),
    *(({name: 0}, f"{name}=0") for name in (
        "steps", "batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs",
        "compare_steps", "save_freq", "max_new_tokens", "generation_batch_size")),
    ({"temperature": -0.5}, "temperature=-0.5"),
    ({"target": -1}, "target=-1"),
    ({"horizon": 0.0}, "horizon=0"),
    ({"kl_penalty": "k3"}, "kl_penalty='k3'"),
    *(({name: 5}, f"{name}=5: give a dict") for name in (
        "tracker_kwargs", "accelerator_kwargs", "project_kwargs", "push_to_hub_if_best_kwargs")),
    ({"push_to_hub_if_best_kwargs": {"private": True}}, "push_to_hub_if_best_kwargs")])
def test_a_wrong_configuration_is_refused_by_the_argument_s_name(wrong, named):
    with pytest.raises(ValueError, match=named):
        ppo.PPOConfig(**wrong)


def test_an_option_without_effect_is_a_warning():
    with pytest.warns(UserWarning, match="use_score_norm has no effect without use_score_scaling"):
        ppo.PPOConfig(use_score_norm=True)


def test_a_horizon_that_could_make_the_kl_coefficient_negative_is_refused(make_trainer):
    with pytest.raises(InputError, match="horizon=0.8: .* give more than 0.8"):
        make_trainer(horizon=0.8)  # a fifth of the batch of 4
    assert make_trainer(horizon=0.81).kl_ctl.horizon == 0.81


def test_a_configuration_can_be_written_as_json():
    assert json.loads(json.dumps(ppo.PPOConfig(exp_name="a").to_dict()))["exp_name"] == "a"


@pytest.mark.parametrize("asked", [True, False])
def test_the_device_cache_is_emptied_only_when_asked(asked, make_trainer, make_batch, monkeypatch):
    trainer, calls = make_trainer(optimize_device_cache=asked), []
    monkeypatch.setattr(accelerate.utils.memory, "is_cuda_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(1))
    trainer.step(*make_batch())
    assert bool(calls) == asked


def test_use_cpu_leaves_the_gpu_alone(make_trainer, monkeypatch):
    given, plain = [], accelerate.Accelerator.__init__

    def begin(self, **kwargs):
        given.append(kwargs["cpu"])
        plain(self, **kwargs)

    monkeypatch.setattr(accelerate.Accelerator, "__init__", begin)
    make_trainer(use_cpu=True)
    make_trainer()
    assert given == [True, False]


@pytest.mark.parametrize("how", [
    {"bf16": True}, {"accelerator_kwargs": {"mixed_precision": "bf16"}}], ids=lambda how: [*how][0])
def test_sampling_scoring_and_training_have_one_precision(
        how, make_trainer, make_model, make_batch):
    """Responses sampled in float32 and scored in bfloat16 would come from another policy."""
    trainer = make_trainer("qwen3", ref_model=make_model("qwen3", seed=3), **how)
    seen = []

    def note(of):
        return lambda *args: seen.append((of, torch.is_grad_enabled(), args[2].dtype))

    for of, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
        for module in model.pretrained_model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(note(of))
    half = torch.bfloat16
    without_gradient = {("policy", False, half), ("reference", False, half)}
    queries, responses, scores = make_batch()
    trainer.generate(queries, generate_ref_response=True, do_sample=True, max_new_tokens=2)
    assert set(seen) == without_gradient
    seen.clear()
    stats = step(trainer, queries, responses, scores)
    assert set(seen) == without_gradient | {("policy", True, half)}
    # the sums over a vocabulary, the value head, and the weights keep float32
    _, _, values, _ = trainer.batched_forward_pass(
        trainer.model, queries, responses, trainer.prepare_model_inputs(queries, responses))
    assert values.dtype == stats["objective/logprobs"].dtype == torch.float32
    assert (values != values.bfloat16()).any()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trainer.model.parameters())


class Casts(TorchDispatchMode):
    """Count, for each tensor in float32, how often it is cast to bfloat16."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (kwargs or {}).get("dtype") == torch.bfloat16:
            self.counts[args[0].data_ptr()] += 1
        return function(*args, **(kwargs or {}))


def test_mixed_precision_casts_the_policy_once_per_update_and_the_reference_never(
        make_trainer, make_batch, monkeypatch):
    """Each pass cast all matrices of both. What the reference computes is the same to the bit."""
    monkeypatch.setattr(ppo, "FORWARD_TOKENS", 8)  # a pass per row
    trainer = make_trainer("qwen3", bf16=True)
    with Casts() as casts:
        logprobs, ref_logprobs, *_ = trainer.evaluate_responses(*make_batch()[:2])
    counts = [{casts.counts[p.data_ptr()] for name, p in model.pretrained_model.named_parameters()
               if p.dim() == 2 and "embed" not in name}
              for model in (trainer.policy, trainer.ref_model)]
    assert counts == [{1}, {0}]
    assert torch.equal(logprobs, ref_logprobs)


# --------------------------------------------------------------------------- a step, on any model
def plain_update(policy, reference, batch, masks, c, lr):
    """One PPO update with SGD, one row at a time and without padding, straight from the papers.

    c: a PPOConfig; each of its epochs is one optimizer step on the whole batch. Returns how far
    the ratio has moved from 1."""
    rows = [(query, response) for query, response in zip(*batch[:2], strict=True)]
    keep = [torch.as_tensor(mask).bool() for mask in masks]
    with torch.no_grad():
        old = [row_alone(policy, *row, c.temperature) for row in rows]
        ref = [row_alone(reference, *row, c.temperature) for row in rows]
    rewards, values = [], []
    for i, (logp, logprob, value) in enumerate(old):
        ref_logp, ref_logprob, _ = ref[i]
        difference = logprob - ref_logprob
        penalty = {"kl": difference, "abs": difference.abs(), "mse": difference**2 / 2,
                   "full": (logp.exp() * (logp - ref_logp)).sum(-1)}[c.kl_penalty]
        reward = -c.init_kl_coef * penalty[keep[i]]
        reward[-1] += batch[2][i]
        rewards.append(reward)
        values.append(value[keep[i]])
    if c.whiten_rewards:
        pool = torch.cat(rewards)
        rewards = [(reward - pool.mean()) / pool.std() + pool.mean() for reward in rewards]
    advantages = []
    for reward, value in zip(rewards, values, strict=True):
        delta = reward + c.gamma * torch.cat([value[1:], torch.zeros(1)]) - value
        advantages += [sum((c.gamma * c.lam) ** (k - t) * delta[k] for k in range(t, len(delta)))
                       for t in range(len(delta))]
    advantages, values = torch.stack(advantages), torch.cat(values)
    returns = advantages + values
    advantages = (advantages - advantages.mean()) / advantages.std()
    old_logprobs = torch.cat([logprob[k] for (_, logprob, _), k in zip(old, keep, strict=True)])
    parameters = [p for p in policy.parameters() if p.requires_grad]
    for _ in range(c.ppo_epochs):
        new = [row_alone(policy, *row, c.temperature) for row in rows]
        logprobs = torch.cat([logprob[k] for (_, logprob, _), k in zip(new, keep, strict=True)])
        ratio = (logprobs - old_logprobs).exp()
        vpred = torch.cat([value[k] for (_, _, value), k in zip(new, keep, strict=True)])
        clipped = ratio.clamp(1 - c.cliprange, 1 + c.cliprange)
        near = values + (vpred - values).clamp(-c.cliprange_value, c.cliprange_value)
        gain = torch.minimum(ratio * advantages, clipped * advantages).mean()
        error = torch.maximum((vpred - returns) ** 2, (near - returns) ** 2).mean()
        loss = -gain + c.vf_coef * error / 2
        grads = torch.autograd.grad(loss, parameters, materialize_grads=True)
        length = torch.stack([grad.norm() for grad in grads]).norm()
        shrink = min(1.0, (c.max_grad_norm or math.inf) / length.item())
        with torch.no_grad():
            for p, grad in zip(parameters, grads, strict=True):
                p -= lr * shrink * grad
    return (ratio.detach() - 1).abs().max()


@pytest.mark.parametrize("arch, masked, settings", [
    ("gpt2", False, {"kl_penalty": "kl"}),
    ("gpt2", True, {"kl_penalty": "abs", "mini_batch_size": 1, "gradient_accumulation_steps": 4,
                    "max_grad_norm": 0.3, "cliprange": 0.05, "vf_coef": 0.5}),
    ("qwen3", False, {"kl_penalty": "full", "temperature": 0.7, "whiten_rewards": True,
                      "gamma": 0.9, "lam": 0.8, "cliprange_value": 0.05}),
    ("t5", True, {"kl_penalty": "mse", "mini_batch_size": 2, "gradient_accumulation_steps": 2,
                  "init_kl_coef": 0.5})])
def test_an_update_is_what_plain_rows_give(arch, masked, settings, make_trainer, make_model,
                                           make_batch, weights):
    lr = 0.02 if arch == "qwen3" else 0.1
    batch = make_batch(((3, 4), (6, 2), (2, 7), (4, 3)), start=START.get(arch))
    full = [[1] * 4, [1] * 2, [1] * 7, [1] * 3]
    masks = [[1, 0, 1, 1], [0, 1], [1, 1, 0, 0, 1, 1, 0], [1, 1, 1]] if masked else full
    policy, plain, reference = make_model(arch), make_model(arch), make_model(arch, seed=3)
    plain.load_state_dict(policy.state_dict())
    trainer = make_trainer(policy, ref_model=reference, optimizer=sgd(policy, lr), ppo_epochs=3,
                           **settings)
    disable_dropout(plain)
    before = weights(policy)
    start = [0] * (arch in SEQ2SEQ)  # a mask covers the decoder's start token, which never counts
    given = [torch.tensor(start + mask) for mask in masks] if masked else None
    trainer.step(*batch, given)
    far = plain_update(plain, reference, batch, masks, trainer.config, lr)
    assert far > trainer.config.cliprange  # so that the clip has been at work
    for (name, got), want in zip(policy.named_parameters(), plain.parameters(), strict=True):
        # float32 sums in another order: some 1e-6 of a whole move
        moved, error = (want - before[name]).abs().max(), (got - want).abs().max()
        assert error <= 1e-3 * moved + 1e-6, name


@pytest.mark.parametrize("arch", FEW)
def test_a_step_moves_the_whole_policy_and_never_the_reference(
        arch, make_trainer, make_batch, weights, moved):
    trainer = make_trainer(arch)
    policy, reference = weights(trainer.model), weights(trainer.ref_model)
    trainer.step(*make_batch(start=START.get(arch)))
    still = set(policy) - moved(policy, trainer.model)
    # the softmax over the keys removes what is added to all of them: their bias has no gradient
    assert all("k_proj.bias" in name for name in still)
    assert not moved(reference, trainer.ref_model)


@pytest.mark.parametrize("arch, temperature", [*((arch, 0.7) for arch in EVERY), ("gpt2", 1.0)])
def test_logprobs_and_values_are_those_of_each_row_alone(
        arch, temperature, make_trainer, make_batch):
    trainer = make_trainer(arch, temperature=temperature)
    queries, responses, _ = make_batch(start=START.get(arch))
    logprobs, values, masks = forward(trainer, queries, responses)
    assert masks.tolist() == [[1] * r + [0] * (5 - r) for _, r in ROWS]
    for i, (query, response) in enumerate(zip(queries, responses, strict=True)):
        _, logprob, value = by_hand(trainer.model, query, response, temperature)
        torch.testing.assert_close(logprobs[i][masks[i] > 0], logprob, **CLOSE)
        torch.testing.assert_close(values[i][masks[i] > 0], value, **CLOSE)
    assert not logprobs[masks == 0].any() and not values[masks == 0].any()


T5 = {"d_kv": 16, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
BART = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        **{f"{part}_{what}": n for part in ("encoder", "decoder")
           for what, n in (("layers", 1), ("attention_heads", 2))}}
ENCODER_DECODERS = {  # as many as TRL 0.7.10's own tests list, with Bart and T5
    "BigBirdPegasus": {**BART, "attention_type": "original_full"}, "Blenderbot": BART,
    "FSMT": {**BART, "langs": ["a", "b"], "src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB},
    "LED": {**BART, "attention_window": 4}, "LongT5": {**T5, "local_radius": 4}, "M2M100": BART,
    "Marian": BART, "MBart": BART, "MT5": T5, "Mvp": BART, "Pegasus": BART,
    "PegasusX": {**BART, "num_global_tokens": 4, "block_size": 4}, "PLBart": BART,
    "ProphetNet": {"hidden_size": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
                   **{f"num_{part}_{what}": n for part in ("encoder", "decoder")
                      for what, n in (("layers", 1), ("attention_heads", 2))}},
    "SwitchTransformers": {**T5, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
                           "num_experts": 2, "expert_capacity": 64}}


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
def test_encoder_decoders_of_every_kind_are_trained_on_the_logprobs_of_each_row_alone(
        kind, make_trainer, make_batch, weights, moved):
    sizes = {"d_model": 32, "max_position_embeddings": 64, "vocab_size": VOCAB, "pad_token_id": PAD,
             "eos_token_id": EOS, "decoder_start_token_id": EOS, **ENCODER_DECODERS[kind]}
    sizes = {name: n for name, n in sizes.items() if kind != "FSMT" or name != "vocab_size"}
    head = "MTModel" if kind == "Marian" else "ForConditionalGeneration"
    torch.manual_seed(0)
    model = getattr(transformers, kind + head)(getattr(transformers, f"{kind}Config")(**sizes))
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(model)
    torch.nn.init.normal_(model.v_head.summary.weight, std=0.3)
    trainer, before = make_trainer(model), weights(model)
    queries, responses, scores = make_batch(start=EOS)
    alone = [by_hand(model.eval(), q, r) for q, r in zip(queries, responses, strict=True)]
    logprobs, values, mask = forward(trainer, queries, responses)
    want = [torch.cat(column) for column in zip(*(row[1:] for row in alone), strict=True)]
    torch.testing.assert_close([logprobs[mask > 0], values[mask > 0]], want, atol=1e-4, rtol=1e-4)
    trainer.step(queries, responses, scores)
    assert len(moved(before, model)) > len(before) / 2


@pytest.mark.parametrize("arch", ["gpt2", "t5"])
def test_a_large_batch_has_the_logprobs_of_its_rows(arch, make_trainer, make_batch):
    """However the rows are divided into forward passes."""
    trainer = make_trainer(arch)
    lengths = [(1 + 7 * i % 40, 1 + 11 * i % 20) for i in range(90)]  # 3,000 tokens with padding
    queries, responses, _ = make_batch(lengths, start=START.get(arch))
    logprobs, values, masks = forward(trainer, queries, responses)
    assert masks.sum(1).tolist() == [r for _, r in lengths]
    for i in range(0, 90, 9):
        _, logprob, value = by_hand(trainer.model, queries[i], responses[i])
        torch.testing.assert_close(logprobs[i][masks[i] > 0], logprob, **CLOSE)
        torch.testing.assert_close(values[i][masks[i] > 0], value, **CLOSE)


@pytest.mark.parametrize("arch", FEW)
def test_the_ratio_is_one_until_the_first_optimizer_step(arch, make_trainer, make_batch):
    """P2, P32: dropout, padding, or temperature on one side alone would break it."""
    trainer = make_trainer(arch, mini_batch_size=2, gradient_accumulation_steps=2, temperature=0.8)
    stats = step(trainer, *make_batch(start=START.get(arch)))
    torch.testing.assert_close(stats["ppo/policy/ratio"], ones(14), **CLOSE)
    assert stats["ppo/policy/approxkl"] < 1e-9 and stats["ppo/policy/clipfrac"] == 0


@pytest.mark.parametrize("arch", ["gpt2", "t5"])
def test_praise_makes_a_response_likelier_and_blame_less_likely(arch, make_trainer, make_batch):
    trainer = make_trainer(arch, ppo_epochs=4)
    queries, responses, _ = make_batch(((3, 4), (3, 4), (3, 4), (3, 4)), start=START.get(arch))
    before = forward(trainer, queries, responses)[0].sum(1)
    trainer.step(queries, responses, scores_of(5, 5, -5, -5))
    change = forward(trainer, queries, responses)[0].sum(1) - before
    assert change[:2].mean() > 0.1 and change[2:].mean() < -0.1


def test_the_first_token_that_an_encoder_decoder_generates_is_trained(make_trainer, make_batch):
    """P16: the mask began at the second."""
    trainer = make_trainer("t5")
    queries, responses, scores = make_batch(((3, 6), (3, 1), (3, 1), (3, 1)), start=PAD)
    assert forward(trainer, queries, responses)[2].sum(1).tolist() == [6, 1, 1, 1]
    assert len(trainer.step(queries, responses, scores)["objective/logprobs"]) == 9


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_step_takes_any_number_of_rows(rows, make_trainer, make_batch):
    """P26: only batch_size rows were taken."""
    trainer = make_trainer(mini_batch_size=2)
    norms = gradient_norms(trainer)
    stats = trainer.step(*make_batch(ROWS[:1] * rows))
    assert len(stats["objective/kl_dist"]) == rows and len(norms) == math.ceil(rows / 2)


# --------------------------------------------------------------------------- responses
@pytest.mark.parametrize("arch", EVERY)
def test_a_query_has_the_same_response_in_a_batch_as_alone(arch, make_trainer, make_batch):
    """P5: the padding next to a longer query must not shift a row's positions."""
    trainer = make_trainer(arch)
    queries, _, _ = make_batch()
    together = trainer.generate(queries, max_new_tokens=5, **greedily)
    for query, response in zip(queries, together, strict=True):
        alone = trainer.model.generate(query[None], do_sample=False, max_new_tokens=5,
                                       pad_token_id=PAD)[0]
        assert response.tolist() == (alone if arch in SEQ2SEQ else alone[len(query):]).tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_responses_come_in_the_order_of_the_queries(batch_size, make_trainer, make_batch):
    trainer, (queries, _, _) = make_trainer(), make_batch()
    rows = trainer.generate(queries, batch_size=batch_size, do_sample=False, max_new_tokens=2)
    for row, query in zip(rows, queries, strict=True):
        assert row[:len(query)].tolist() == query.tolist() and len(row) == len(query) + 2


@pytest.mark.parametrize("return_prompt", [True, False])
def test_one_query_gives_one_row(return_prompt, make_trainer):
    query = torch.tensor([5, 6, 7])
    row = make_trainer().generate(query, return_prompt=return_prompt, do_sample=False,
                                  max_new_tokens=4)
    assert row.shape == (1, 4 + 3 * return_prompt)


def test_the_length_sampler_is_asked_for_each_batch(make_trainer, make_batch):
    queries, _, _ = make_batch(((3, 1),) * 4)
    lengths = iter([2, 5])
    rows = make_trainer().generate(queries, length_sampler=lambda: next(lengths), batch_size=2,
                                   eos_token_id=None, **greedily)
    assert sorted(map(len, rows)) == [2, 2, 5, 5]


@pytest.mark.parametrize("do_sample", [False, True])
def test_the_model_s_own_length_holds_unless_another_is_given(do_sample, make_trainer):
    trainer = make_trainer()
    trainer.model.pretrained_model.generation_config.max_new_tokens = 3
    row = trainer.generate(torch.tensor([5]), return_prompt=False, do_sample=do_sample)
    assert row.shape == (1, 3)
    row = trainer.generate(torch.tensor([5]), return_prompt=False, do_sample=do_sample,
                           max_new_tokens=5)
    assert row.shape == (1, 5)


@pytest.mark.parametrize("lora", [None, "trained"])
def test_the_reference_responds_too_when_asked(lora, make_trainer, make_model, make_batch):
    trainer = make_trainer(make_model(lora=lora), ref_model=make_model(seed=7))
    queries, _, _ = make_batch()
    responses, references = trainer.generate(queries, generate_ref_response=True, max_new_tokens=4,
                                             **greedily)
    policy = trainer.generate(queries, max_new_tokens=4, **greedily)
    assert [row.tolist() for row in responses] == [row.tolist() for row in policy]
    for query, row in zip(queries, references, strict=True):
        alone = trainer.ref_model.generate(query[None], pad_token_id=PAD, do_sample=False,
                                           max_new_tokens=4)[0]
        assert row.tolist() == alone[len(query):].tolist()


def test_the_reference_of_an_adapter_responds_as_the_policy_first_did(
        make_trainer, make_model, make_batch):
    trainer = make_trainer(make_model(lora="trained"), learning_rate=0.03)
    queries, responses, scores = make_batch()
    first = [row.tolist() for row in trainer.generate(queries, max_new_tokens=6, **greedily)]
    trainer.step(queries, responses, scores)
    policy, reference = trainer.generate(queries, generate_ref_response=True, max_new_tokens=6,
                                         **greedily)
    assert [row.tolist() for row in reference] == first != [row.tolist() for row in policy]
    assert trainer.model.pretrained_model.active_adapter == "default"


def test_a_response_ends_after_its_own_end_token_not_at_one_in_the_query(make_trainer):
    """P14: prompt and response were searched together."""
    query = torch.tensor([5, EOS, 6])
    (row,) = make_trainer().generate([query], **say(7, 8, EOS, 9))
    assert row.tolist() == [5, EOS, 6, 7, 8, EOS]


def test_a_tokenizer_whose_texts_begin_with_the_end_token_gets_its_responses(
        make_trainer, make_tokenizer):
    """P14: where bos is eos (GPT-2, OPT), a response was one token long."""
    trainer = make_trainer(tokenizer=make_tokenizer(bos_token="</s>", pad_token="</s>"))
    query = torch.tensor([EOS, 5])
    assert trainer.generate([query], **say(7, 8, 9))[0].tolist() == [EOS, 5, 7, 8, 9]
    rows = trainer.generate([query], return_prompt=False, **say(7, EOS, 9))
    assert rows[0].tolist() == [7, EOS]


def test_a_decoder_that_starts_with_the_end_token_goes_on(make_trainer):
    """P14: BART's decoder starts with </s>; every response was that one token."""
    rows = make_trainer("bart").generate([torch.tensor([5, 6])], **say(7, 8, EOS, 9))
    assert rows[0].tolist() == [EOS, 7, 8, EOS]


def test_any_of_the_model_s_end_tokens_ends_a_response(make_trainer):
    trainer = make_trainer()
    trainer.model.pretrained_model.generation_config.eos_token_id = [50, 51]
    for end in (50, 51, EOS):
        assert response_of(trainer, 7, end, 9) == [7, end]


@pytest.mark.parametrize("given", [
    {"eos_token_id": 50}, {"eos_token_id": [50]}, {"eos_token_id": [51, 50]},
    {"eos_token_id": 50, "pad_token_id": 50}, {"eos_token_id": 50, "pad_token_id": PAD},
    {"eos_token_id": [EOS, 50], "pad_token_id": 50}])
def test_a_response_ends_after_its_first_end_token_given_or_the_tokenizer_s(given, make_trainer):
    """Whatever fills the rest of the row: padding is never part of a response."""
    trainer = make_trainer()
    queries = [torch.tensor([5]), torch.tensor([6]), torch.tensor([8])]
    forced = say((7, 9, 8), (50, 8, EOS), (6, 50, 6), (6, 50, 6), (7, 7, 7))
    rows = trainer.generate(queries, return_prompt=False, **forced, **given)
    assert [row.tolist() for row in rows] == [[7, 50], [9, 8, 50], [8, EOS]]


def test_an_end_token_of_minus_one_leaves_the_tokenizer_s(make_trainer):
    """The settings of TRL 0.7's first example; no token has the id -1."""
    given = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "pad_token_id": EOS, "eos_token_id": -1}
    for do_sample in (False, True):
        forced = {**say(7, 8, EOS, 9), "do_sample": do_sample}
        row = make_trainer().generate(torch.tensor([5]), return_prompt=False, **forced, **given)
        assert row.tolist() == [[7, 8, EOS]]


@pytest.mark.parametrize("given", [{}, {"pad_token_id": PAD}, {"pad_token_id": EOS}])
@pytest.mark.parametrize("end", [EOS, PAD])
def test_what_fills_a_row_after_its_end_is_no_part_of_the_response(end, given, make_trainer):
    """Chat models often have two end tokens, and one of them is their padding."""
    trainer, queries = make_trainer(), [torch.tensor([5]), torch.tensor([6])]
    trainer.model.pretrained_model.generation_config.eos_token_id = [EOS, PAD]
    rows = trainer.generate(queries, return_prompt=False, **say(7, (end, 8), 9, EOS), **given)
    assert [row.tolist() for row in rows] == [[7, end], [7, 8, 9, EOS]]


def test_a_padding_token_that_is_no_end_token_ends_nothing(make_trainer):
    assert response_of(make_trainer(), 7, PAD, 8) == [7, PAD, 8]


def test_without_an_end_token_responses_have_full_length(make_trainer, make_tokenizer):
    trainer = make_trainer(tokenizer=make_tokenizer(eos_token=None))
    trainer.model.pretrained_model.generation_config.eos_token_id = None
    assert response_of(trainer, 7, EOS, 8) == [7, EOS, 8]


def test_a_failed_generation_leaves_everything_as_it_was(make_trainer):
    """P15: tokenizer.padding_side stayed "left" for the rest of the run."""
    trainer = make_trainer()
    trainer.model.train()
    trainer.model.pretrained_model.generation_config.top_k = 7
    with pytest.raises(Exception, match="nonsense"):
        trainer.generate([torch.tensor([5])], do_sample=True, nonsense=1)
    assert trainer.tokenizer.padding_side == "right" and trainer.model.training
    assert trainer.model.pretrained_model.generation_config.top_k == 7


@pytest.mark.parametrize("given", [
    {"return_dict_in_generate": True},  # P36: an unrelated error deep inside
    {"do_sample": True, "num_beams": 2}, {"do_sample": True, "num_return_sequences": 2},
    {"num_return_sequences": 2, "num_beams": 2}, {"generation_config": GenerationConfig()}])
def test_settings_that_give_something_else_than_one_response_per_query_are_refused(
        given, make_trainer):
    queries = [torch.tensor([5]), torch.tensor([6])]
    with pytest.raises(ValueError, match="|".join(set(given) - {"do_sample"})):
        make_trainer().generate(queries, max_new_tokens=2, **given)


@pytest.mark.parametrize("arch", FEW)
def test_the_policy_that_responds_is_the_policy_that_is_scored(arch, make_trainer, make_batch):
    """P2: after the first step responses were sampled with dropout."""
    trainer = make_trainer(arch, learning_rate=1e-5)
    trainer.step(*make_batch(start=START.get(arch)))
    query = torch.tensor([5, 6, 7])
    rows = trainer.generate([query] * 8, max_new_tokens=8, **greedily)
    assert len({tuple(row.tolist()) for row in rows}) == 1
    logp, _, _ = by_hand(trainer.model, query, rows[0])  # greedy: always the likeliest token
    assert logp.argmax(1).tolist() == rows[0][arch in SEQ2SEQ:].tolist()


def test_dropout_is_off_wherever_a_model_keeps_it(make_model):
    model = make_model(lora="fresh", resid_pdrop=0.5)
    disable_dropout(model.train())
    tokens = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(tokens)[0], model(tokens)[0]) and model.training


# --------------------------------------------------------------------------- sampling
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_and_scoring_have_one_temperature(temperature, make_trainer):
    """P32: log-probabilities were always those of temperature 1."""
    n, query = 4000, torch.tensor([5, 6, 7])
    trainer = make_trainer(temperature=temperature)
    rows = trainer.generate([query] * n, batch_size=n, return_prompt=False, do_sample=True,
                            max_new_tokens=1)
    tokens = [torch.tensor([i]) for i in range(VOCAB)]
    p = forward(trainer, [query] * VOCAB, tokens)[0][:, 0].exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    drawn = torch.cat(rows).bincount(minlength=VOCAB) / n
    deviation = (p * (1 - p) / n).sqrt()
    assert ((drawn - p).abs() <= 4.5 * deviation + 1e-9).all()


class Probabilities(LogitsProcessor):
    """The model gives the tokens these probabilities, and all others none."""

    def __init__(self, p):
        self.p = torch.zeros(VOCAB)
        self.p[list(p)] = torch.tensor(list(p.values()))

    def __call__(self, input_ids, scores):
        return self.p.log().expand(len(scores), -1)


def test_a_token_is_drawn_as_often_as_it_is_probable_and_never_at_probability_zero(make_trainer):
    n, p = 4000, {4: 0.1, 5: 0.2, 50: 0.3, VOCAB - 1: 0.4}
    processors = LogitsProcessorList([Probabilities(p)])
    rows = make_trainer().generate([torch.tensor([7])] * n, batch_size=n, return_prompt=False,
                                   do_sample=True, max_new_tokens=2, logits_processor=processors)
    for position in (0, 1):
        drawn = torch.stack(rows)[:, position].bincount(minlength=VOCAB) / n
        assert drawn.nonzero()[:, 0].tolist() == list(p)
        for token, probability in p.items():
            deviation = (probability * (1 - probability) / n) ** 0.5
            assert drawn[token].item() == pytest.approx(probability, abs=4.5 * deviation)
    # the two draws of a row are independent: they agree with 0.1^2 + 0.2^2 + 0.3^2 + 0.4^2 = 0.3
    first, second = torch.stack(rows).T
    deviation = (0.3 * 0.7 / n) ** 0.5
    assert (first == second).float().mean().item() == pytest.approx(0.3, abs=4.5 * deviation)


def sampled(trainer, **given):
    """300 samples of one token."""
    set_seed(0)
    rows = trainer.generate([torch.arange(4, 64)] * 300, batch_size=300, return_prompt=False,
                            do_sample=True, max_new_tokens=1, **given)
    return torch.cat(rows).tolist()


@pytest.mark.parametrize("given", [
    {"top_k": 2}, {"top_p": 0.3}, {"temperature": 0.2}, {"min_p": 0.9},
    {"repetition_penalty": 1e3}, {"suppress_tokens": list(range(4, 60))}])
def test_sampling_from_another_distribution_than_is_scored_is_warned_about(given, make_trainer):
    """P32"""
    trainer = make_trainer(temperature=2.0)
    with pytest.warns(UserWarning, match=list(given)[0]):
        tokens = sampled(trainer, **given)
    assert len(set(tokens)) < 0.8 * len(set(sampled(trainer)))


@pytest.mark.parametrize("given", [
    {"min_length": 70}, {"min_new_tokens": 1}, {"forced_eos_token_id": EOS}, {"typical_p": 0.5},
    {"begin_suppress_tokens": [4]}, {"sequence_bias": [[[5], 9.0]]}, {"bad_words_ids": [[5]]},
    {"exponential_decay_length_penalty": (1, 1.1)}, {"encoder_repetition_penalty": 2.0}])
def test_each_setting_that_changes_the_distribution_is_named(given, make_trainer):
    with pytest.warns(UserWarning, match=list(given)[0]):
        sampled(make_trainer(), **given)


@pytest.mark.parametrize("temperature", [1.0, 2])
def test_settings_that_change_nothing_are_not_warned_about(temperature, make_trainer):
    trainer = make_trainer(temperature=temperature)
    plain = sampled(trainer)
    off = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "repetition_penalty": 1.0,
           "typical_p": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None, "use_cache": True,
           "max_time": 99.0, "num_beams": 1, "length_penalty": 1.0,
           "early_stopping": False, "pad_token_id": EOS, "temperature": temperature}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sampled(trainer, **off) == plain


def test_a_temperature_may_be_an_int_whatever_else_is_given(make_trainer):
    with pytest.warns(UserWarning, match="top_k"):
        tokens = sampled(make_trainer(temperature=2), top_k=3)
    assert len(set(tokens)) == 3


@pytest.mark.parametrize("own", [
    {"top_k": 1, "top_p": 0.01, "temperature": 0.01}, {"min_p": 0.9},
    {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1}, {"num_beams": 2},
    {"min_new_tokens": 1, "suppress_tokens": [4, 5, 6]}, {"forced_eos_token_id": EOS}])
def test_the_model_s_own_sampling_settings_are_left_out(own, make_trainer):
    """P32: they belong to chats; a rollout samples from what is scored."""
    trainer = make_trainer()
    plain = sampled(trainer)
    trainer.model.pretrained_model.generation_config.update(**own)
    assert sampled(trainer) == plain and len(set(plain)) > 20


def test_generation_does_not_sample_unless_asked(make_trainer):
    trainer, query = make_trainer(temperature=9.0), torch.tensor([5])
    rows = trainer.generate([query] * 20, batch_size=20, max_new_tokens=3)
    assert len({tuple(row.tolist()) for row in rows}) == 1


def test_each_rank_draws_its_own_responses_from_the_same_weights(make_trainer, monkeypatch):
    """P6: the same prompt gave the same response on every rank."""
    def run(rank):
        monkeypatch.setattr(accelerate.Accelerator, "process_index", property(lambda self: rank))
        trainer = make_trainer()
        row = trainer.generate(torch.tensor([5]), do_sample=True, max_new_tokens=20)
        return row.tolist(), trainer.model.state_dict()

    (first, weights), (again, _), (other, others) = run(0), run(0), run(1)
    assert first == again != other
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_responses_and_the_order_of_the_data_depend_on_the_seed_alone(make_trainer):
    def run(seed):
        torch.rand(seed)  # whatever was drawn before
        trainer = make_trainer(seed=seed, dataset=[{"input_ids": [i]} for i in range(4, 24)])
        batch = next(iter(trainer.dataloader))["input_ids"]
        row = trainer.generate(torch.tensor([5]), do_sample=True, max_new_tokens=20)
        return [query.tolist() for query in batch], row.tolist()

    (order, response), again, (other_order, other_response) = run(3), run(3), run(4)
    assert (order, response) == again and order != other_order and response != other_response


def test_deepspeed_is_refused_before_it_hangs(make_trainer, monkeypatch):
    """P34: generation from sharded weights hung or crashed. (FSDP: tests/test_sharded.py.)"""
    kind = property(lambda self: DistributedType.DEEPSPEED)
    monkeypatch.setattr(accelerate.Accelerator, "distributed_type", kind)
    with pytest.raises(ValueError, match="DeepSpeed"):
        make_trainer()


# --------------------------------------------------------------------------- padding and masks
@pytest.mark.parametrize("arch", ["gpt2", "t5"])
def test_inputs_may_be_padded_on_the_left(arch, make_trainer, make_batch):
    """P5: positions were counted from the padding."""
    trainer = make_trainer(arch)
    queries, responses, _ = make_batch(start=START.get(arch))
    right, left = trainer.prepare_model_inputs(queries, responses), {}
    for name, rows in right.items():
        masks = right[name.replace("input_ids", "attention_mask")]
        pairs = zip(rows, masks, strict=True)
        left[name] = torch.stack([row.roll(int((mask == 0).sum())) for row, mask in pairs])
    assert (left["attention_mask"][:, -1] == 1).all() and (left["attention_mask"][:, 0] == 0).any()
    of_left, of_right = (forward(trainer, queries, responses, inputs) for inputs in (left, right))
    for a, b in zip(of_left, of_right, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_model_inputs_are_query_and_response_padded_on_the_right(make_trainer, make_batch):
    queries, responses, _ = make_batch()
    inputs = make_trainer().prepare_model_inputs(queries, responses)
    rows = [torch.cat(both) for both in zip(queries, responses, strict=True)]
    assert inputs["input_ids"].tolist() == pad_sequence(rows, True, PAD).tolist()
    assert inputs["attention_mask"].tolist() == [[1] * (q + r) + [0] * (8 - q - r) for q, r in ROWS]
    inputs = make_trainer("t5").prepare_model_inputs(queries, responses)
    assert inputs["input_ids"].tolist() == pad_sequence(queries, True, PAD).tolist()
    assert inputs["decoder_input_ids"].tolist() == pad_sequence(responses, True, PAD).tolist()
    assert inputs["attention_mask"].sum(1).tolist() == [q for q, _ in ROWS]
    assert inputs["decoder_attention_mask"].sum(1).tolist() == [r for _, r in ROWS]


@pytest.mark.parametrize("masks", [None, [[1, 1, 0, 1], [0, 1], [1, 0, 0, 1, 1], [1, 1, 0]]])
def test_the_tokenizer_s_padding_side_changes_nothing(
        masks, make_trainer, make_tokenizer, make_batch):
    """P5, P8: left padding moved the numbers, and with response_masks it crashed."""
    results = []
    for side in ("right", "left"):
        trainer = make_trainer(tokenizer=make_tokenizer(padding_side=side), mini_batch_size=2)
        given = masks and [torch.tensor(mask) for mask in masks]
        stats = step(trainer, *make_batch(), response_masks=given)
        results.append((stats["ppo/loss/total"], *trainer.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_padding_token_within_a_text_is_a_token(make_trainer, make_tokenizer):
    """Masks come from lengths: where pad is eos (GPT-2), the end of a response is trained."""
    trainer = make_trainer(tokenizer=make_tokenizer(pad_token="</s>"))
    queries = [torch.tensor([EOS, 5]), torch.tensor([6, 7, 8])]
    responses = [torch.tensor([9, EOS, 5, EOS]), torch.tensor([4])]
    logprobs, _, masks = forward(trainer, queries, responses)
    assert masks.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    want = by_hand(trainer.model, queries[0], responses[0])[1]
    torch.testing.assert_close(logprobs[0], want, **CLOSE)


def test_logits_are_returned_when_asked_and_zero_where_there_is_no_token(make_trainer, make_batch):
    trainer = make_trainer(temperature=0.7)
    queries, responses, _ = make_batch()
    inputs = trainer.prepare_model_inputs(queries, responses)
    with torch.no_grad():
        logprobs, logits, _, masks = trainer.batched_forward_pass(
            trainer.model, queries, responses, inputs, return_logits=True)
        assert trainer.batched_forward_pass(trainer.model, queries, responses, inputs)[1] is None
    assert logits.shape == (4, 5, VOCAB) and not logits[masks == 0].any()
    labels = pad_sequence(responses, True)
    want = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(want * masks, logprobs, **CLOSE)


@pytest.mark.parametrize("arch", ["gpt2", "t5"])
def test_masked_tokens_are_read_but_not_counted(arch, make_trainer, make_batch):
    """A tool's answer within a response: the policy reads it and isn't blamed for it."""
    trainer, start = make_trainer(arch), [1] * (arch in SEQ2SEQ)
    queries, responses, scores = make_batch(((3, 5),) * 4, start=START.get(arch))
    alone = [by_hand(trainer.model, q, r) for q, r in zip(queries, responses, strict=True)]
    kept = [0, 3, 4]
    masks = [torch.tensor(start + [1, 0, 0, 1, 1])] * 4
    _, _, mask = forward(trainer, queries, responses, masks=masks)
    assert mask.tolist() == [[1, 0, 0, 1, 1]] * 4
    stats = step(trainer, queries, responses, scores, masks)
    want = torch.cat([logprob[kept] for _, logprob, _ in alone])
    torch.testing.assert_close(stats["objective/logprobs"], want, **CLOSE)
    entropies = [-(logp.exp() * logp).sum(-1)[kept] for logp, _, _ in alone]
    assert stats["ppo/policy/entropy"].item() == pytest.approx(torch.cat(entropies).mean().item(),
                                                               rel=1e-5)
    assert len(stats["ppo/policy/ratio"]) == 12
    assert stats["objective/kl_dist"].abs().max() < 1e-4


def test_advantages_step_over_masked_tokens():
    """P7: values of 1 and a last reward of 1 make every return 1; a gap made it 0.90."""
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]])
    values, rewards = ones(1, 6), torch.tensor([[0., 0, 0, 0, 0, 1]])
    advantages, returns = ppo.gae(values, rewards, mask, gamma=1.0, lam=0.95)
    assert torch.equal(returns, mask.float()) and not advantages.any()


def test_a_row_with_a_gap_has_the_returns_of_the_row_without(make_trainer):
    """P7"""
    trainer = make_trainer(gamma=0.9, lam=0.7)
    values, rewards = torch.randn(2, 3, 6)
    kept = [0, 2, 5]
    mask = torch.zeros(3, 6).index_fill(1, torch.tensor(kept), 1)
    got = trainer.compute_advantages(values, rewards, mask)
    want = trainer.compute_advantages(values[:, kept], rewards[:, kept], ones(3, 3))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a[:, kept], b)
        assert not a[mask == 0].any()


@pytest.mark.parametrize("whiten_rewards", [True, False])
def test_padding_never_reaches_the_returns(whiten_rewards, make_trainer):
    """P9: whitened padding was no longer zero, and leaked into the tokens before it."""
    trainer = make_trainer(whiten_rewards=whiten_rewards)
    values, rewards = torch.randn(2, 3), torch.randn(2, 3)
    mask = torch.tensor([[1., 1, 1], [1, 1, 0]])
    def pad(x, fill):
        return torch.cat([x, torch.full((2, 2), fill)], 1)
    got = trainer.compute_advantages(pad(values, 7.0), pad(rewards, 0.0), pad(mask, 0.0))
    for a, b in zip(got, trainer.compute_advantages(values, rewards, mask), strict=True):
        torch.testing.assert_close(a, pad(b, 0.0))


def test_whitened_rewards_have_variance_one(make_trainer):
    """whiten_rewards: with lam = 0, gamma = 0 the returns are the rewards themselves."""
    rewards = 5 + 3 * torch.randn(4, 6)
    returns = [make_trainer(whiten_rewards=on, gamma=0, lam=0).compute_advantages(
        torch.zeros(4, 6), rewards, ones(4, 6))[2] for on in (True, False)]
    torch.testing.assert_close(returns[1], rewards)
    assert returns[0].var().item() == pytest.approx(1, abs=1e-4)
    assert returns[0].mean().item() == pytest.approx(rewards.mean().item(), abs=1e-4)


def test_advantages_are_whitened_over_the_batch_and_values_returned(make_trainer):
    trainer, mask = make_trainer(), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    values, rewards = torch.randn(2, 4), torch.randn(2, 4)
    same_values, advantages, returns = trainer.compute_advantages(values, rewards, mask)
    raw = (returns - values)[mask > 0]
    want = (raw - raw.mean()) / raw.std()
    torch.testing.assert_close(advantages[mask > 0], want, **CLOSE)
    torch.testing.assert_close(same_values, values * mask)


def test_one_token_alone_trains_and_stays_finite(make_trainer, make_batch, weights, moved):
    """P10: the variance of one advantage was 0 / 0, and every weight became NaN."""
    trainer = make_trainer(batch_size=1)
    before = weights(trainer.model)
    stats = trainer.step(*make_batch(((3, 1),)))
    assert moved(before, trainer.model)
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert all(value.isfinite().all() for name, value in stats.items()
               if isinstance(value, torch.Tensor) and not name.endswith("var_explained"))


# --------------------------------------------------------------------------- the reference
def test_the_kl_is_measured_from_the_model_given_as_reference(make_trainer, make_model, make_batch):
    trainer = make_trainer(ref_model=make_model(seed=3))
    queries, responses, scores = make_batch()
    policy, reference = trainer.model, trainer.ref_model
    want = torch.stack([(by_hand(policy, q, r)[1] - by_hand(reference, q, r)[1]).sum()
                        for q, r in zip(queries, responses, strict=True)])
    stats = step(trainer, queries, responses, scores)
    torch.testing.assert_close(stats["objective/kl_dist"], want, atol=1e-4, rtol=1e-4)
    assert stats["objective/kl"].item() == pytest.approx(want.mean().item(), rel=1e-4)


def test_without_a_reference_a_frozen_copy_of_the_first_policy_is_taken(
        make_trainer, make_batch, weights, moved):
    trainer = make_trainer()
    first = weights(trainer.ref_model)
    batch = make_batch()
    assert step(trainer, *batch)["objective/kl"] == 0
    assert step(trainer, *batch)["objective/kl"].abs() > 1e-3
    assert not moved(first, trainer.ref_model)
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())


@pytest.mark.parametrize("shared", [0, 1])
def test_shared_layers_are_one_storage_and_stay_as_they_are(
        shared, make_trainer, make_batch, weights, moved):
    """P21: they were frozen and yet copied."""
    trainer = make_trainer(num_shared_layers=shared)
    policy = dict(trainer.model.named_parameters())
    reference = dict(trainer.ref_model.named_parameters())
    common = {name for name in policy if policy[name] is reference[name]}
    lower = ("wte.", "wpe.", *(f".h.{i}." for i in range(shared)))
    assert common == {name for name in policy if any(part in name for part in lower)}
    before = weights(trainer.model)
    trainer.step(*make_batch())
    assert moved(before, trainer.model) == set(policy) - common


def test_shared_layers_with_a_reference_given_are_warned_about(make_trainer, make_model):
    with pytest.warns(UserWarning, match="num_shared_layers"):
        make_trainer(ref_model=make_model(), num_shared_layers=1)


@pytest.mark.parametrize("kind, arch", [("fresh", "gpt2"), ("trained", "llama"), ("trained", "t5")])
def test_the_reference_of_an_adapter_is_the_adapter_as_loaded(
        kind, arch, make_trainer, make_model, make_batch):
    """P18: it was the bare base model: a supervised adapter began with a huge KL."""
    trainer = make_trainer(make_model(arch, lora=kind))
    assert trainer.ref_model is None
    queries, responses, scores = make_batch(start=START.get(arch))
    first = [by_hand(trainer.model, q, r)[1] for q, r in zip(queries, responses, strict=True)]
    stats = step(trainer, queries, responses, scores)
    assert stats["objective/kl_dist"].abs().max() < 1e-4
    for _ in range(2):
        stats = step(trainer, queries, responses, scores)
    torch.testing.assert_close(stats["objective/ref_logprobs"], torch.cat(first), **CLOSE)
    assert stats["objective/kl_dist"].abs().max() > 1e-3


def test_an_adapter_is_trained_alone(make_trainer, make_model, make_batch, weights, moved):
    model = make_model(lora="trained")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    trainer = make_trainer(model)
    before = weights(model)
    trainer.step(*make_batch())
    # the policy's lora_A and lora_B, and the value head; never the base or the reference
    assert moved(before, model) == trainable
    assert {name.split(".")[-2] for name in trainable} == {"default", "summary"}


def test_a_float32_adapter_trains_on_a_bfloat16_base(
        make_hf_model, make_trainer, make_batch, weights, moved, tmp_path):
    from peft import LoraConfig
    make_hf_model("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        tmp_path, dtype=torch.bfloat16, require_v_head=False,
        peft_config=LoraConfig(target_modules="all-linear"))
    trainer = make_trainer(model)
    before = weights(model)
    trainer.step(*make_batch())
    changed = moved(before, model)
    assert {before[name].dtype for name in changed} == {torch.float32}
    assert any("lora_B.default" in name for name in changed)
    assert model.pretrained_model.get_output_embeddings().weight.dtype == torch.bfloat16


def test_a_reference_given_with_an_adapter_is_used(make_trainer, make_model, make_batch):
    """P17: it was moved to the device and forgotten: KL 0."""
    trainer = make_trainer(make_model(lora="fresh"), ref_model=make_model(seed=3))
    queries, responses, scores = make_batch()
    want = [by_hand(trainer.ref_model, q, r)[1] for q, r in zip(queries, responses, strict=True)]
    stats = step(trainer, queries, responses, scores)
    torch.testing.assert_close(stats["objective/ref_logprobs"], torch.cat(want), **CLOSE)
    assert stats["objective/kl_dist"].abs().max() > 0.1


# --------------------------------------------------------------------------- rewards
LOGP, REF = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-2.0, -1.5, -3.0]])
# of the differences 1, -1/2, 0
PENALTY = {"kl": [1.0, -0.5, 0.0], "abs": [1.0, 0.5, 0.0], "mse": [0.5, 0.125, 0.0]}


@pytest.mark.parametrize("kind", PENALTY)
def test_each_token_pays_its_penalty_and_the_last_gets_the_score(kind, make_trainer):
    trainer = make_trainer(kl_penalty=kind, init_kl_coef=0.5)
    rewards, non_score, kls = trainer.compute_rewards(torch.tensor([2.0]), LOGP, REF, ones(1, 3))
    penalty = torch.tensor([PENALTY[kind]])
    torch.testing.assert_close(kls, penalty)
    torch.testing.assert_close(non_score, -0.5 * penalty)
    torch.testing.assert_close(rewards, -0.5 * penalty + torch.tensor([[0, 0, 2.0]]))


def test_a_masked_token_pays_no_penalty(make_trainer):
    """LOGP and REF with the first token masked: the differences left are -1/2 and 0."""
    trainer, masks = make_trainer(init_kl_coef=0.5), torch.tensor([[0, 1, 1]])
    rewards, non_score, kls = trainer.compute_rewards(torch.tensor([2.0]), LOGP, REF, masks)
    assert rewards.tolist() == [[0, 0.25, 2]] and non_score.tolist() == [[0, 0.25, 0]]
    assert kls.tolist() == [[0, -0.5, 0]]


def test_the_full_penalty_is_the_exact_divergence_of_the_two_models(
        make_trainer, make_model, make_batch):
    trainer = make_trainer(kl_penalty="full", ref_model=make_model(seed=3), init_kl_coef=1.0,
                           temperature=0.8)
    queries, responses, scores = make_batch()
    pairs = [[by_hand(model, q, r, 0.8)[0] for model in (trainer.model, trainer.ref_model)]
             for q, r in zip(queries, responses, strict=True)]
    want = torch.cat([(p.exp() * (p - ref)).sum(-1) for p, ref in pairs])
    stats = trainer.step(queries, responses, scores)
    assert want.min() > 0
    assert stats["ppo/mean_non_score_reward"].item() == pytest.approx(-want.mean().item(), rel=1e-4)


def test_the_score_falls_on_the_last_token_that_the_policy_wrote(make_trainer):
    masks = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0]])
    zeros = torch.zeros(3, 4)
    rewards, _, _ = make_trainer().compute_rewards(torch.tensor([1., 2, 3]), zeros, zeros, masks)
    assert rewards.tolist() == [[0, 0, 0, 1], [0, 2, 0, 0], [0, 0, 3, 0]]


def test_the_controller_sees_one_kl_whatever_the_penalty(make_trainer, make_model, make_batch):
    """P38: with 'mse' or 'full' it steered sums of another quantity to the same target."""
    kls, coefs = set(), set()
    for kind in ("kl", "abs", "mse", "full"):
        trainer = make_trainer(kl_penalty=kind, ref_model=make_model(seed=3), horizon=100)
        kls.add(trainer.step(*make_batch())["objective/kl"].item())
        coefs.add(trainer.kl_ctl.value)
    assert len(kls) == len(coefs) == 1 and coefs != {0.2}


@pytest.mark.parametrize("target, horizon", [(1e-3, 10), (1e-3, 40), (1e9, 10)])
def test_the_kl_coefficient_follows_target_and_horizon(
        target, horizon, make_trainer, make_model, make_batch):
    trainer = make_trainer(ref_model=make_model(seed=3), target=target, horizon=horizon,
                           init_kl_coef=0.3, mini_batch_size=2)
    stats = trainer.step(*make_batch())
    error = max(-0.2, min(0.2, stats["objective/kl"].item() / target - 1))
    assert abs(error) == 0.2 and stats["objective/kl_coef"] == 0.3  # the one that was used
    second = trainer.kl_ctl.value
    assert second == pytest.approx(0.3 * (1 + error * 4 / horizon))
    assert trainer.step(*make_batch())["objective/kl_coef"] == second


def test_the_kl_coefficient_stays_unless_it_adapts(make_trainer, make_model, make_batch):
    trainer = make_trainer(ref_model=make_model(seed=3), adap_kl_ctrl=False, init_kl_coef=0.3,
                           horizon=1)
    trainer.step(*make_batch())
    assert trainer.kl_ctl.value == 0.3


def step_with_scores(trainer, make_batch, *scores):
    """Mean and standard deviation of the scores that are trained on, and the mean as given."""
    queries, responses, _ = make_batch(((3, 2),) * len(scores))
    stats = trainer.step(queries, responses, scores_of(*scores))
    names = ("ppo/mean_scores", "ppo/std_scores", "objective/scores")
    return [stats[name].item() for name in names]


def test_equal_scores_have_no_scale_yet(make_trainer, make_batch):
    """The first batch of a reward of 0 or 1 may hold one number only."""
    trainer = make_trainer(use_score_scaling=True)
    assert step_with_scores(trainer, make_batch, 1, 1, 1, 1) == pytest.approx([1, 0, 1], rel=1e-6)


@pytest.mark.parametrize("norm", [False, True])
def test_scores_are_scaled_by_all_scores_so_far(norm, make_trainer, make_batch):
    trainer = make_trainer(use_score_scaling=True, use_score_norm=norm)
    step_with_scores(trainer, make_batch, 1, 2, 3, 6)  # mean 3, variance 14/3
    # of all eight: mean 5, variance 90/7
    mean, std, raw = step_with_scores(trainer, make_batch, 4, 4, 8, 12)
    sigma = (90 / 7) ** 0.5
    assert mean == pytest.approx((7 - 5 * norm) / sigma, rel=1e-5)
    assert std == pytest.approx((44 / 3) ** 0.5 / sigma, rel=1e-5) and raw == 7


@pytest.mark.parametrize("settings, scores, mean", [
    ({}, (1, 2, 3, 6), 3),
    ({"score_clip": 2.0}, (-9, 1, 2, 9), 0.75),  # -2, 1, 2, 2
    # scaled first: +-0.5 of each
    ({"score_clip": 0.5, "use_score_scaling": True}, (-90, 90, 90, 90), 0.25),
    ({"use_score_scaling": True, "batch_size": 1}, (2,), 2)])  # P11: it became 0
def test_scores_are_clipped_and_scaled_only_when_asked(
        settings, scores, mean, make_trainer, make_batch):
    got, _, _ = step_with_scores(make_trainer(**settings), make_batch, *scores)
    assert got == pytest.approx(mean)


def test_the_clipped_and_scaled_scores_are_what_is_trained_on(make_trainer, make_model, make_batch):
    """With lam = gamma = 1 and no penalty, the return of each token is its row's score."""
    settings = {"gamma": 1, "lam": 1, "init_kl_coef": 0.0, "score_clip": 1.0}
    queries, responses, _ = make_batch(((3, 2),) * 4)
    stats = make_trainer(use_score_scaling=True, **settings).step(queries, responses,
                                                                  scores_of(1, 2, 3, 6))
    sigma = (14 / 3) ** 0.5
    want = (1 / sigma + 2 / sigma + 1 + 1) / 4
    assert want < 1 and stats["ppo/returns/mean"].item() == pytest.approx(want, rel=1e-4)


# --------------------------------------------------------------------------- the loss
def loss_of(trainer, old=0.0, new=0.0, value=0.0, vpred=0.0, advantage=1.0, target=0.0):
    """The losses of one token."""
    def one(x):
        return torch.tensor([[float(x)]])
    logits = torch.zeros(1, 1, 8)
    rest = map(one, (vpred, new, 1, advantage, target))
    pg, vf, stats = trainer.loss(one(old), one(value), logits, *rest)
    return pg.item(), vf.item(), stats


@pytest.mark.parametrize("cliprange", [0.1, 0.3])
def test_the_ratio_is_clipped_to_cliprange(cliprange, make_trainer):
    trainer = make_trainer(cliprange=cliprange)
    pg, _, stats = loss_of(trainer, new=1.0)  # ratio e
    assert pg == pytest.approx(-(1 + cliprange)) and stats["policy/clipfrac"] == 1
    # a token that got likelier though it is bad is never let off
    assert loss_of(trainer, new=1.0, advantage=-1.0)[0] == pytest.approx(math.e)


@pytest.mark.parametrize("cliprange_value, vf_coef", [(0.2, 0.1), (0.2, 0.5), (0.5, 0.1)])
def test_the_value_loss_is_clipped_and_weighted(cliprange_value, vf_coef, make_trainer):
    trainer = make_trainer(cliprange_value=cliprange_value, vf_coef=vf_coef)
    # right, but too far from the old value
    _, vf, stats = loss_of(trainer, value=0.0, vpred=1.0, target=1.0)
    assert vf == pytest.approx(vf_coef * 0.5 * (1 - cliprange_value) ** 2)
    assert stats["val/clipfrac"] == 1
    assert stats["loss/total"].item() == pytest.approx(stats["loss/policy"].item() + vf)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.95), (0.9, 0.5)])
def test_gamma_and_lam_discount(gamma, lam, make_trainer):
    """No values, a last reward of 1, two tokens before it."""
    trainer, rewards = make_trainer(gamma=gamma, lam=lam), torch.tensor([[0, 0, 1.0]])
    _, _, returns = trainer.compute_advantages(torch.zeros(1, 3), rewards, ones(1, 3))
    torch.testing.assert_close(returns, torch.tensor([[(gamma * lam) ** 2, gamma * lam, 1.0]]))
    # a value of 1 at the second token: its error is -1 there, and gamma at the token before
    _, _, returns = trainer.compute_advantages(torch.tensor([[0, 1.0, 0]]), rewards * 0, ones(1, 3))
    torch.testing.assert_close(returns, torch.tensor([[gamma - gamma * lam, 0.0, 0.0]]))


# --------------------------------------------------------------------------- the optimizer
@pytest.mark.parametrize("sizes, steps", [
    ({"ppo_epochs": 3}, 3), ({"mini_batch_size": 1}, 4),
    ({"mini_batch_size": 1, "gradient_accumulation_steps": 2}, 2),
    ({"mini_batch_size": 1, "gradient_accumulation_steps": 4, "ppo_epochs": 2}, 2)])
def test_an_update_takes_its_optimizer_steps(sizes, steps, make_trainer, make_batch):
    trainer = make_trainer(**sizes)
    norms = gradient_norms(trainer)
    trainer.step(*make_batch())
    assert len(norms) == steps


def test_every_batch_of_the_dataloader_takes_as_many_optimizer_steps(make_trainer, make_batch):
    """P4: on the last one each micro-batch became a step of its own."""
    dataset = [{"input_ids": [i]} for i in range(4, 12)]
    trainer = make_trainer(mini_batch_size=1, gradient_accumulation_steps=4, dataset=dataset)
    norms, counts = gradient_norms(trainer), []
    for batch in trainer.dataloader:
        trainer.step(batch["input_ids"], *make_batch()[1:])
        counts.append(len(norms))
    assert counts == [1, 2]


def test_every_row_is_trained_on_once_per_epoch_in_another_order(make_trainer, make_batch):
    trainer = make_trainer(mini_batch_size=1, ppo_epochs=2, learning_rate=0.0)
    first, second = step(trainer, *make_batch())["ppo/policy/advantages"].split(14)
    torch.testing.assert_close(first.sort().values, second.sort().values)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("arch, lora", [("gpt2", None), ("t5", None), ("llama", "trained")])
def test_accumulated_gradients_are_those_of_one_big_minibatch(
        arch, lora, make_trainer, make_model, make_batch):
    """P29: micro-batches of 1, 2, 4, and 24 tokens had equal weights; each token has."""
    results = []
    for mini, steps in ((4, 1), (2, 2), (1, 4)):
        model = make_model(arch, lora=lora)
        trainer = make_trainer(model, optimizer=sgd(model), mini_batch_size=mini,
                               gradient_accumulation_steps=steps)
        batch = make_batch(((3, 1), (5, 2), (2, 4), (4, 24)), start=START.get(arch))
        stats = trainer.step(*batch)
        results.append([stats["ppo/loss/total"], stats["ppo/policy/entropy"], *model.parameters()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)


def test_a_gradient_is_the_mean_over_tokens_not_over_rows(make_trainer, make_model, make_batch):
    """The value head's bias has the gradient vf_coef x mean over all tokens of (V - R^)."""
    model = make_model()
    trainer = make_trainer(model, optimizer=sgd(model, lr=1.0), vf_coef=1.0, mini_batch_size=1,
                           gradient_accumulation_steps=4)
    before = model.v_head.summary.bias.item()
    stats = trainer.step(*make_batch())
    error = (stats["ppo/val/vpred"] - stats["ppo/returns/mean"]).item()
    assert before - model.v_head.summary.bias.item() == pytest.approx(error, rel=1e-4)


def test_each_gradient_is_a_mean_over_the_tokens_of_its_own_optimizer_step(
        make_trainer, make_model, make_batch):
    """Two steps of two rows each: their gradients' mean is that of the whole batch, not half."""
    model, grads = make_model(), []
    trainer = make_trainer(model, optimizer=sgd(model, lr=0.0), vf_coef=1.0, mini_batch_size=1,
                           gradient_accumulation_steps=2)
    trainer.optimizer.optimizer.register_step_pre_hook(
        lambda *args: grads.append(model.v_head.summary.bias.grad.item()))
    stats = trainer.step(*make_batch(((3, 4),) * 4))
    error = (stats["ppo/val/vpred"] - stats["ppo/returns/mean"]).item()
    assert len(grads) == 2 and sum(grads) / 2 == pytest.approx(error, rel=1e-4)


def test_max_grad_norm_holds_at_every_optimizer_step(make_trainer, make_batch):
    """P1: it held at the first alone."""
    norms = {}
    for limit in (None, 1e-3):
        trainer = make_trainer(mini_batch_size=2, ppo_epochs=2, max_grad_norm=limit,
                               learning_rate=1e-5)
        norms[limit] = gradient_norms(trainer)
        trainer.step(*make_batch())
        trainer.step(*make_batch())
    assert len(norms[1e-3]) == len(norms[None]) == 8 and min(norms[None]) > 1e-2
    assert norms[1e-3] == pytest.approx([1e-3] * 8, rel=1e-3)


def test_the_accumulated_gradient_is_clipped_not_each_micro_batch(
        make_trainer, make_model, make_batch, weights):
    """Clipping to a third of the gradient's length makes the same move, a third as long."""
    def move(limit):
        model = make_model()
        before = weights(model)
        trainer = make_trainer(model, optimizer=sgd(model, lr=1.0), mini_batch_size=1,
                               gradient_accumulation_steps=4, max_grad_norm=limit)
        norms = gradient_norms(trainer)
        trainer.step(*make_batch())
        moves = [(p - before[name]).flatten() for name, p in model.named_parameters()]
        return norms, torch.cat(moves)

    (norm,), whole = move(None)
    (clipped,), third = move(norm / 3)
    assert clipped == pytest.approx(norm / 3, rel=1e-4)
    assert (third - whole / 3).norm() < 1e-3 * third.norm()


def test_the_learning_rate_is_adam_s(make_trainer, make_batch, weights):
    """Adam's first step moves a weight by the learning rate, whatever its gradient."""
    trainer = make_trainer(learning_rate=3e-4)
    before = weights(trainer.model)
    stats = trainer.step(*make_batch())
    largest = max((p - before[name]).abs().max().item()
                  for name, p in trainer.model.named_parameters())
    assert largest == pytest.approx(3e-4, rel=1e-2) and stats["ppo/learning_rate"] == 3e-4


def test_an_optimizer_of_one_s_own_is_used(make_trainer, make_model, make_batch, weights, moved):
    model = make_model()
    trainer = make_trainer(model, optimizer=torch.optim.SGD(model.v_head.parameters(), lr=0.5))
    before = weights(model)
    assert trainer.step(*make_batch())["ppo/learning_rate"] == 0.5
    assert moved(before, model) == {"v_head.summary.weight", "v_head.summary.bias"}


def test_gradients_take_no_memory_while_responses_are_sampled(make_trainer, make_batch):
    trainer = make_trainer()
    trainer.step(*make_batch())
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_scheduler_steps_once_per_update(
        ranks, make_trainer, make_model, make_batch, monkeypatch):
    """P28: it took as many steps as there are ranks."""
    model = make_model()
    optimizer = sgd(model, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    trainer = make_trainer(model, optimizer=optimizer, lr_scheduler=scheduler, mini_batch_size=2,
                           ppo_epochs=2)
    assert trainer.lr_scheduler.scheduler is scheduler and trainer.optimizer.optimizer is optimizer
    monkeypatch.setitem(PartialState._shared_state, "num_processes", ranks)
    rates = [trainer.step(*make_batch())["ppo/learning_rate"] for _ in range(3)]
    assert rates == [1e-3, 0.5e-3, 0.25e-3]


@pytest.mark.parametrize("arch, lora, layer", [
    ("gpt2", None, "h.0.mlp"), ("llama", "trained", "layers.0.mlp"),
    ("t5", None, "decoder.block.0.layer.2")])
def test_gradient_checkpointing_recomputes_and_changes_nothing(
        arch, lora, layer, make_trainer, make_model, make_batch):
    """P3: the gradient's pass ran in eval mode, where checkpointing does nothing."""
    def run(checkpointing):
        model, calls = make_model(arch, lora=lora), []
        if checkpointing:
            model.gradient_checkpointing_enable()
        trainer = make_trainer(model, optimizer=sgd(model))
        module = next(m for name, m in model.named_modules() if name.endswith(layer))
        module.register_forward_pre_hook(lambda *args: calls.append(torch.is_grad_enabled()))
        for _ in range(2):
            trainer.step(*make_batch(start=START.get(arch)))
        return calls.count(True), model

    (once, plain), (twice, checkpointed) = run(False), run(True)
    assert (once, twice) == (2, 4)
    assert_same_weights(plain, checkpointed)


# --------------------------------------------------------------------------- when not to step
def test_a_ratio_above_the_threshold_takes_no_step_at_all(make_trainer, make_batch, weights, moved):
    """P12: the loss was multiplied by 0, and Adam's momentum moved the weights all the same."""
    trainer = make_trainer()
    batch = make_batch()
    trainer.step(*batch)
    trainer.config.ratio_threshold = 0.0
    before, norms = weights(trainer.model), gradient_norms(trainer)
    with pytest.warns(UserWarning, match="ratio_threshold"):
        stats = trainer.step(*batch)
    assert not moved(before, trainer.model) and not norms
    assert stats["ppo/policy/skipped"] == 1
    assert stats["ppo/loss/policy"] == 0 and stats["ppo/loss/value"] == 0
    trainer.config.ratio_threshold = 10.0
    assert trainer.step(*batch)["ppo/policy/skipped"] == 0 and len(norms) == 1 and norms[0] > 0


def minibatch(trainer, shift, make_batch):
    """Train on one minibatch whose old log-probabilities are the present ones plus a shift."""
    queries, responses, _ = make_batch()
    logprobs, logits, values, mask = trainer.batched_forward_pass(
        trainer.model, queries, responses, trainer.prepare_model_inputs(queries, responses),
        return_logits=True)
    advantages = torch.linspace(-1, 1, mask.numel()).view(mask.shape)
    old = (logprobs + shift * mask).detach()
    return trainer.train_minibatch(old, values.detach(), logprobs, logits, values, mask, advantages,
                                   advantages)


def test_a_ratio_that_overflows_harms_nothing(make_trainer, make_batch, weights, moved):
    """P12: inf x 0 made the loss and every gradient NaN."""
    trainer = make_trainer()
    before = weights(trainer.model)
    with pytest.warns(UserWarning, match="ratio_threshold"):
        stats = minibatch(trainer, -200.0, make_batch)
    assert stats["loss/total"] == 0 and not moved(before, trainer.model)
    minibatch(trainer, 0.0, make_batch)
    assert moved(before, trainer.model)
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.filterwarnings("ignore:.*ratio_threshold")
@pytest.mark.parametrize("shift, dropped", [(-1.0, False), (-3.0, True), (3.0, False)])
def test_the_threshold_is_compared_with_the_minibatch_s_mean_ratio(
        shift, dropped, make_trainer, make_batch, weights, moved):
    """The default of 10 lies between e and e^3."""
    trainer = make_trainer()
    before = weights(trainer.model)
    stats = minibatch(trainer, shift, make_batch)
    assert stats["policy/skipped"] == dropped and bool(moved(before, trainer.model)) != dropped
    assert stats["policy/ratio_mean"].item() == pytest.approx(math.exp(-shift), rel=1e-4)


def test_a_minibatch_can_be_trained_on_by_itself(make_trainer, make_batch, weights, moved):
    trainer = make_trainer(early_stopping=True, target_kl=10.0)
    before = weights(trainer.model)
    stats = minibatch(trainer, 0.0, make_batch)
    assert len(moved(before, trainer.model)) == len(before)
    assert stats["policy/approxkl"] == 0 and stats["policy/ratio"].shape == (4, 5)


@pytest.mark.parametrize("shift", [1.0, -1.0])
def test_early_stopping_does_not_depend_on_the_direction(
        shift, make_trainer, make_batch, weights, moved):
    """P13: old minus new was taken for the KL, so that half of all moves went unseen."""
    for target, stays in ((0.01, True), (10.0, False)):
        trainer = make_trainer(early_stopping=True, target_kl=target)
        before = weights(trainer.model)
        minibatch(trainer, shift, make_batch)
        assert bool(moved(before, trainer.model)) != stays


def far(make_trainer, make_model, **settings):
    """A trainer that moves far in its first step, without the optimizer's memory."""
    model = make_model()
    return make_trainer(model, optimizer=sgd(model, lr=1.0), batch_size=2, mini_batch_size=1,
                        gradient_accumulation_steps=2, **settings)


def two_rows(make_batch, swapped):
    """One seed shuffles them alike: swapped, the row that moves farther has the other place."""
    return [column[::-1] if swapped else column for column in make_batch(((3, 4), (4, 4)))]


@pytest.mark.filterwarnings("ignore:.*ratio_threshold")
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("how", ["ratio_threshold", "early_stopping"])
def test_a_dropped_step_leaves_no_trace(how, swapped, make_trainer, make_model, make_batch):
    """Of two micro-batches one goes too far: the step of both is dropped, gradient included."""
    batch, later = two_rows(make_batch, swapped), make_batch(((5, 3), (2, 4)), seed=5)
    stats = step(far(make_trainer, make_model, ppo_epochs=2), *batch)
    low, high = stats["ppo/policy/ratio"][8:].view(2, 4).mean(1).sort().values.tolist()
    assert high > 1.2 * low and high > 1.2
    # between the two means, or a KL that either exceeds
    limit = {"ratio_threshold": max(1.1, (low + high) / 2)}
    limit = limit if how == "ratio_threshold" else {"early_stopping": True, "target_kl": 1e-4}
    one = far(make_trainer, make_model, ppo_epochs=2, **limit)
    two = far(make_trainer, make_model, ppo_epochs=1)
    one.step(*batch), two.step(*batch)
    assert_same_weights(one.model, two.model)
    one.config.ppo_epochs, one.config.ratio_threshold = 1, 10.0
    one.step(*later), two.step(*later)
    assert_same_weights(one.model, two.model)


def test_early_stopping_compares_the_mean_over_the_epoch_so_far(
        make_trainer, make_model, make_batch):
    """Of the two minibatches of an optimizer step one goes too far; their mean decides."""
    for swapped in (False, True):
        batch = two_rows(make_batch, swapped)
        ratio = step(far(make_trainer, make_model, ppo_epochs=2), *batch)["ppo/policy/ratio"]
        kl = (ratio - 1 - ratio.log())[8:].view(2, 4).mean(1)
        assert kl.max() > 1.5 * kl.min()
        for limit, steps in (((kl.mean() + kl.max()) / 2, 2), ((kl.mean() + kl.min()) / 2, 1)):
            trainer = far(make_trainer, make_model, ppo_epochs=2, early_stopping=True,
                          target_kl=limit.item() / 1.5)
            norms = gradient_norms(trainer)
            trainer.step(*batch)
            assert len(norms) == steps


def test_early_stopping_sees_a_dropped_minibatch_too(make_trainer, make_model, make_batch):
    """The third epoch is never begun, though the second took no step."""
    batch = make_batch(((3, 4), (4, 4)))
    whole = {"mini_batch_size": 2, "gradient_accumulation_steps": 1, "batch_size": 2}

    def run(**settings):
        model = make_model()
        trainer = make_trainer(model, optimizer=sgd(model, lr=1.0), **whole, **settings)
        return trainer.step(*batch)["ppo/policy/ratio"]

    mean = run(ppo_epochs=2)[8:].mean().item()
    assert mean > 1.1
    limits = {"ratio_threshold": (1 + mean) / 2, "early_stopping": True, "target_kl": 1e-4}
    with pytest.warns(UserWarning, match="ratio_threshold"):
        assert len(run(ppo_epochs=3, **limits)) == 16


def running_kl(stats, epochs, minibatches):
    """Mean of rho - 1 - log rho over each epoch so far, minibatch by minibatch."""
    k3 = stats["ppo/policy/ratio"].view(epochs, minibatches, -1)
    k3 = (k3 - 1 - k3.log()).mean(-1)
    return (k3.cumsum(1) / torch.arange(1, minibatches + 1)).flatten()


def test_early_stopping_ends_the_epochs_before_the_step_that_goes_too_far(make_trainer, make_batch):
    """P13: the last minibatch alone was looked at, after all steps of its epoch."""
    batch = make_batch(((4, 4),) * 8, seed=3)
    sizes = {"batch_size": 8, "mini_batch_size": 2, "ppo_epochs": 3, "learning_rate": 3e-3}
    kl = running_kl(step(make_trainer(**sizes), *batch), 3, 4)
    highest = kl.cummax(0).values
    first = next(i for i in range(5, 8) if kl[i] > 1.2 * highest[i - 1])  # in the second epoch
    target = (kl[first] + highest[first - 1]).item() / 2 / 1.5
    trainer = make_trainer(early_stopping=True, target_kl=target, **sizes)
    norms = gradient_norms(trainer)
    stats = trainer.step(*batch)
    assert len(norms) == first and len(stats["ppo/policy/ratio"]) == 8 * (first + 1)
    trainer.step(*batch)
    assert len(norms) > first  # the next batch has its own epochs


def test_without_early_stopping_target_kl_stops_nothing(make_trainer, make_batch):
    trainer = make_trainer(mini_batch_size=2, ppo_epochs=3, target_kl=1e-9)
    norms = gradient_norms(trainer)
    trainer.step(*make_batch())
    assert len(norms) == 6


@pytest.mark.parametrize("sick", ["v_head.summary.bias", "transformer.ln_f.weight"])
def test_a_loss_that_is_not_finite_ends_the_run_before_any_weight_moves(
        sick, make_trainer, make_batch, weights):
    trainer = make_trainer()
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if name.endswith(sick):
                p.fill_(math.nan)
    before = weights(trainer.model)
    with pytest.raises(InputError, match="nan"):
        trainer.step(*make_batch())
    assert all(torch.equal(before[name].nan_to_num(), p.nan_to_num())
               for name, p in trainer.model.named_parameters())


# --------------------------------------------------------------------------- methods of one's own
class WholeRows(ppo.PPOTrainer):
    """As in users' trainers: it reads model_inputs, and its columns are those of whole rows."""

    calls, scale = 0, 1.0

    def batched_forward_pass(self, model, queries, responses, model_inputs, return_logits=False,
                             response_masks=None):
        type(self).calls += 1
        ids, masks = model_inputs["input_ids"], model_inputs["attention_mask"][:, 1:].clone()
        logits, _, values = model(**model_inputs)
        logprobs = logprobs_from_logits(logits[:, :-1], ids[:, 1:]) * self.scale
        for mask, query, response in zip(masks, queries, responses, strict=True):
            mask[:len(query) - 1] = 0
            mask[len(query) - 1 + len(response):] = 0
        return logprobs, logits[:, :-1] if return_logits else None, values[:, :-1], masks


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_batched_forward_pass_of_one_s_own_is_what_is_trained(
        scale, make_trainer, make_model, make_batch, monkeypatch):
    def start():  # Adam would turn the rounding of a gradient of zero into whole steps
        model = make_model()
        return make_trainer(model, optimizer=sgd(model), mini_batch_size=2, ppo_epochs=2)

    plain = start()
    want = step(plain, *make_batch())
    monkeypatch.setattr(ppo, "PPOTrainer", WholeRows)
    WholeRows.calls, WholeRows.scale = 0, scale
    trainer = start()
    set_seed(0)  # as far as the first trainer was
    got = step(trainer, *make_batch())
    assert WholeRows.calls == 2 + 4  # policy, reference, 2 epochs of 2 minibatches
    torch.testing.assert_close(got["objective/logprobs"], scale * want["objective/logprobs"],
                               **CLOSE)
    if scale == 1:
        assert_same_weights(trainer.model, plain.model)
    else:
        assert got["ppo/loss/total"] != want["ppo/loss/total"]


def test_rewards_and_a_penalty_of_one_s_own_are_what_is_trained(
        make_trainer, make_model, make_batch, monkeypatch):
    class Own(ppo.PPOTrainer):
        def _kl_penalty(self, logprob, ref_logprob):
            return torch.ones_like(logprob)

        def compute_rewards(self, scores, logprobs, ref_logprobs, masks):
            rewards, non_score, kls = super().compute_rewards(scores, logprobs, ref_logprobs, masks)
            return rewards + 3 * masks, non_score, kls

    monkeypatch.setattr(ppo, "PPOTrainer", Own)
    trainer = make_trainer(ref_model=make_model(seed=3), init_kl_coef=0.5, lam=0)
    queries, responses, _ = make_batch()
    stats = trainer.step(queries, responses, scores_of(0, 0, 0, 0))
    assert stats["ppo/mean_non_score_reward"] == -0.5
    values = forward(make_trainer(), queries, responses)[1]
    mask = torch.arange(5) < torch.tensor([[len(response)] for response in responses])
    later = torch.cat([values[:, 1:], torch.zeros(4, 1)], 1)  # with lambda 0: R_t + V_{t+1}
    want = (3 - 0.5 + later)[mask].mean().item()
    assert stats["ppo/returns/mean"].item() == pytest.approx(want, rel=1e-4)


def test_the_loss_takes_logits_without_a_vocabulary(make_trainer):
    """As in TRL 0.7.10's own test, with one row: the entropy is then a single number."""
    logprobs = torch.rand(1, 3)
    args = (logprobs, logprobs, logprobs.exp(), logprobs + 0.1, logprobs, ones(1, 3).long())
    _, vf, stats = make_trainer().loss(*args, ones(1, 3), logprobs)
    assert vf.item() == pytest.approx(0.1 * 0.5 * 0.01)
    want = torch.distributions.Categorical(logits=logprobs.exp()).entropy().item()
    assert stats["policy/entropy"].item() == pytest.approx(want, rel=1e-5)


# --------------------------------------------------------------------------- statistics
def test_a_step_returns_all_statistics_that_users_of_trl_read(make_trainer, make_batch):
    names = """objective/kl objective/kl_dist objective/logprobs objective/ref_logprobs
        objective/kl_coef objective/entropy ppo/mean_non_score_reward ppo/mean_scores
        ppo/std_scores ppo/learning_rate tokens/queries_len_mean tokens/queries_len_std
        tokens/queries_dist tokens/responses_len_mean tokens/responses_len_std
        tokens/responses_dist ppo/loss/policy ppo/loss/value ppo/loss/total ppo/policy/entropy
        ppo/policy/approxkl ppo/policy/policykl ppo/policy/clipfrac ppo/policy/advantages
        ppo/policy/advantages_mean ppo/policy/ratio ppo/returns/mean ppo/returns/var ppo/val/vpred
        ppo/val/error ppo/val/clipfrac ppo/val/mean ppo/val/var ppo/val/var_explained
        time/ppo/forward_pass time/ppo/compute_rewards time/ppo/compute_advantages
        time/ppo/optimize_step time/ppo/calc_stats time/ppo/total""".split()
    stats = make_trainer().step(*make_batch())
    assert set(names) <= set(stats)
    arrays = {name for name in names if isinstance(stats[name], np.ndarray)}
    assert arrays == {f"objective/{name}" for name in ("kl_dist", "logprobs", "ref_logprobs")} | {
        f"tokens/{name}_dist" for name in ("queries", "responses")} | {
        f"ppo/policy/{name}" for name in ("advantages", "ratio")}
    assert all(math.isfinite(stats[name]) for name in set(names) - arrays)
    numbers = {name: value for name, value in stats.items() if name not in arrays}
    assert json.loads(json.dumps(numbers)) == numbers
    assert np.mean(stats["objective/kl_dist"]) == pytest.approx(stats["objective/kl"])
    parts = [name for name in names if name.startswith("time/") and name != "time/ppo/total"]
    assert 0 < sum(stats[name] for name in parts) <= stats["time/ppo/total"] * 1.001


def test_statistics_count_real_tokens_alone(make_trainer, make_batch):
    """P31: queries and padding were in the ratios, the advantages and the log-probabilities."""
    stats = make_trainer(mini_batch_size=1, ppo_epochs=2).step(*make_batch())
    assert {len(stats[f"objective/{name}"]) for name in ("logprobs", "ref_logprobs")} == {14}
    assert {len(stats[f"ppo/policy/{name}"]) for name in ("ratio", "advantages")} == {28}
    assert (stats["ppo/policy/ratio"] > 0).all() and len(stats["objective/kl_dist"]) == 4
    assert stats["tokens/queries_dist"].tolist() == [3, 6, 2, 4]
    assert stats["tokens/queries_len_mean"] == 3.75
    assert stats["tokens/responses_dist"].tolist() == [4, 2, 5, 3]
    assert stats["tokens/responses_len_std"].item() == pytest.approx((5 / 3) ** 0.5)


def test_statistics_are_what_their_names_say(make_trainer, make_model, make_batch):
    trainer = make_trainer(ref_model=make_model(seed=3), init_kl_coef=0.5, mini_batch_size=1,
                           learning_rate=0.0, score_clip=0.5, gamma=0.9, lam=0.8, temperature=0.8)
    queries, responses, scores = make_batch()
    alone = [by_hand(trainer.model, q, r, 0.8) for q, r in zip(queries, responses, strict=True)]
    logp, logprobs, values = zip(*alone, strict=True)
    drift = [own - by_hand(trainer.ref_model, q, r, 0.8)[1]
             for own, q, r in zip(logprobs, queries, responses, strict=True)]
    advantages, returns = [], []
    for d, value, score in zip(drift, values, scores, strict=True):  # each row by itself
        reward = -0.5 * d
        reward[-1] += score.clamp(-0.5, 0.5)
        a, r = ppo.gae(value[None], reward[None], ones(1, len(d)), 0.9, 0.8)
        advantages.append(a[0]), returns.append(r[0])
    returns, values = torch.cat(returns), torch.cat(values)
    stats = {name: float(value) for name, value in step(trainer, queries, responses, scores).items()
             if not isinstance(value, torch.Tensor) or value.dim() == 0}
    raw, scores = torch.stack(scores), torch.stack(scores).clamp(-0.5, 0.5)
    error = (values - returns) ** 2
    want = {
        "objective/kl": torch.stack([d.sum() for d in drift]).mean(),
        "objective/kl_coef": 0.5,
        "objective/entropy": -torch.stack([own.sum() for own in logprobs]).mean(),
        "objective/scores": raw.mean(), "objective/scores_std": raw.std(),
        "ppo/mean_scores": scores.mean(), "ppo/std_scores": scores.std(),
        "ppo/mean_non_score_reward": -0.5 * torch.cat(drift).mean(),
        "ppo/policy/entropy": torch.cat([-(p.exp() * p).sum(-1) for p in logp]).mean(),
        "ppo/val/mean": values.mean(), "ppo/val/vpred": values.mean(), "ppo/val/var": values.var(),
        "ppo/returns/mean": returns.mean(), "ppo/returns/var": returns.var(),
        "ppo/val/error": error.mean(), "ppo/val/var_explained": 1 - error.mean() / returns.var(),
        "ppo/loss/policy": 0,  # whitened advantages of ratio 1
        "ppo/loss/value": error.mean() / 2,  # nothing has moved: nothing is clipped
        "ppo/loss/total": 0.1 * error.mean() / 2,
        "ppo/policy/advantages_mean": 0, "ppo/policy/skipped": 0, "ppo/policy/clipfrac": 0,
        "ppo/val/clipfrac": 0}
    for name, value in want.items():
        assert stats[name] == pytest.approx(float(value), rel=1e-4, abs=1e-5), name


def test_statistics_of_the_move_are_means_over_its_tokens(make_trainer, make_batch):
    """Minibatches of 4, 2, 5, and 3 tokens: each token has the same weight."""
    stats = step(make_trainer(mini_batch_size=1, ppo_epochs=3, learning_rate=3e-3), *make_batch())
    log_ratio = stats["ppo/policy/ratio"].log()
    assert log_ratio.abs().max() > 0.1
    want = {"policykl": -log_ratio, "approxkl": log_ratio**2 / 2, "ratio_mean": log_ratio.exp(),
            "kl_k3": log_ratio.exp() - 1 - log_ratio}
    for name, value in want.items():
        got = stats[f"ppo/policy/{name}"].item()
        assert got == pytest.approx(value.mean().item(), rel=1e-3, abs=1e-5), name
    for epoch, part in enumerate(log_ratio.split(14)):  # P33: where ratios run away, one sees when
        got = stats[f"ppo/policy/log_ratio_epoch_{epoch}"].item()
        assert got == pytest.approx(part.abs().mean().item(), rel=1e-3, abs=1e-5)


# --------------------------------------------------------------------------- the dataloader
DATASET = [{"input_ids": [i, i], "query": f"w{i}", "answer": i} for i in range(4, 14)]


def test_the_dataloader_keeps_all_columns_and_whole_batches(make_trainer):
    """P27: columns that the model does not take vanished, with what a reward needs."""
    batches = list(make_trainer(dataset=DATASET).dataloader)
    assert [len(batch["query"]) for batch in batches] == [4, 4]
    seen = [row for batch in batches
            for row in zip(batch["input_ids"], batch["query"], batch["answer"], strict=True)]
    assert all(q.tolist() == [answer] * 2 and text == f"w{answer}" for q, text, answer in seen)
    answers = [answer for _, _, answer in seen]
    assert len(set(answers)) == 8 and answers != sorted(answers)


def test_each_epoch_has_the_same_rows_in_another_order(make_trainer):
    loader = make_trainer(dataset=DATASET[:8]).dataloader
    orders = [[answer for batch in loader for answer in batch["answer"]] for _ in range(3)]
    assert [sorted(order) for order in orders] == [list(range(4, 12))] * 3
    assert len({tuple(order) for order in orders}) == 3


def test_the_dataloader_draws_nothing_from_the_numbers_that_sample_responses(make_trainer):
    loader, state = make_trainer(dataset=DATASET).dataloader, torch.get_rng_state()
    numbers = np.random.get_state()[1].tolist()
    list(loader)
    assert torch.equal(state, torch.get_rng_state())
    assert numbers == np.random.get_state()[1].tolist()


@pytest.mark.parametrize("change", [
    lambda rows: rows[:8],
    lambda rows: [*rows[:-1], {**rows[-1], "query": "another"}],
    lambda rows: [{**rows[0], "input_ids": torch.tensor([4, 5])}, *rows[1:]]],
    ids=("fewer", "a text", "a tensor"))
def test_a_resume_with_other_rows_says_so(change, make_trainer, tmp_path):
    dataset = [{**row, "input_ids": torch.tensor(row["input_ids"])} for row in DATASET]
    make_trainer(dataset=dataset).save_checkpoint(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer(dataset=list(dataset)).load_checkpoint(tmp_path)
    rows = change(dataset)
    with pytest.warns(UserWarning, match="^checksum_of_rows=.*: it was .* up to the checkpoint"):
        make_trainer(dataset=rows).load_checkpoint(tmp_path)


def test_an_own_loop_resumes_at_its_place_in_the_data(make_trainer, make_batch, tmp_path):
    """A8: two batches per epoch, killed after three."""
    def batches(trainer, n):
        epochs = (batch["answer"] for _ in range(3) for batch in trainer.dataloader)
        found = []
        for _ in range(n):
            found.append(next(epochs))
            trainer.step(*make_batch())
        return found

    whole = batches(make_trainer(dataset=DATASET), 5)
    trainer = make_trainer(dataset=DATASET)
    assert batches(trainer, 3) == whole[:3]
    trainer.save_checkpoint(tmp_path)
    resumed = make_trainer(dataset=DATASET)
    resumed.load_checkpoint(tmp_path / "checkpoint-3")
    assert batches(resumed, 2) == whole[3:]


def test_a_pass_that_is_broken_off_goes_on_in_the_next_one(make_trainer, make_batch, tmp_path):
    """Three batches per epoch, two per pass, and a look at one in front."""
    def batches(trainer, n):
        next(iter(trainer.dataloader))
        found = []
        while len(found) < n:
            for batch in islice(trainer.dataloader, 2):
                found.append(batch["answer"])
                trainer.step(*make_batch())
                if trainer.current_step == 2:
                    trainer.save_checkpoint(tmp_path)
                if len(found) == n:
                    break
        return found

    rows = [{"input_ids": [i, i], "answer": i} for i in range(4, 17)]
    loader = make_trainer(dataset=rows).dataloader
    straight = [batch["answer"] for _ in range(3) for batch in loader]
    assert batches(make_trainer(dataset=rows), 7) == straight[:7]
    resumed = make_trainer(dataset=rows)
    resumed.load_checkpoint(tmp_path / "checkpoint-2")
    assert batches(resumed, 5) == straight[2:7]


def test_a_pass_after_a_whole_one_is_whole_however_many_steps_there_were(
        make_trainer, make_batch):
    trainer = make_trainer(dataset=DATASET)
    for _ in range(2):
        batches = list(trainer.dataloader)
        assert len(batches) == 2
        trainer.step(*make_batch())
    extra = trainer.prepare_dataloader(DATASET)
    assert len(list(extra)) == len(list(extra)) == 2


def test_a_collator_of_one_s_own_makes_the_batches(make_trainer):
    def collator(rows):
        return {"sum": sum(row["answer"] for row in rows)}
    trainer = make_trainer(dataset=DATASET[:8], data_collator=collator)
    assert sum(batch["sum"] for batch in trainer.dataloader) == sum(range(4, 12))


def test_a_dataset_of_tuples_is_stacked_as_torch_does(make_trainer):
    queries, responses = torch.randint(4, VOCAB, (2, 8, 5))
    trainer = make_trainer(dataset=torch.utils.data.TensorDataset(queries, responses))
    for batch in trainer.dataloader:
        assert [part.shape for part in batch] == [(4, 5), (4, 5)]
        trainer.step(list(batch[0]), list(batch[1]), scores_of(1, 2, 3, 4))


def test_too_few_rows_for_a_batch_are_refused(make_trainer):
    """P26: an unrelated UnboundLocalError."""
    with pytest.raises(ValueError, match="10.*16"):
        make_trainer(dataset=DATASET, batch_size=16)


def test_no_dataset_is_warned_about(make_model, tokenizer):
    with pytest.warns(UserWarning, match="dataset"):
        trainer = ppo.PPOTrainer(ppo.PPOConfig(), make_model(), tokenizer=tokenizer)
    assert trainer.dataloader is None


# --------------------------------------------------------------------------- trackers
def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log = EventAccumulator(str(folder))
    log.Reload()
    return log


def test_tensorboard_gets_numbers_vectors_and_the_table(make_trainer, make_batch, tmp_path):
    trainer = make_trainer(
        log_with="tensorboard", project_kwargs={"logging_dir": str(tmp_path / "logs")},
        tracker_project_name="mine", tracker_kwargs={"tensorboard": {"filename_suffix": ".try7"}})
    queries, responses, scores = make_batch()
    stats = trainer.step(queries, responses, scores)
    rewards = [score[None] for score in scores]  # a classifier's logits are of shape [1]
    trainer.log_stats(stats, {"query": list("abcd"), "response": list("efgh")}, rewards)
    trainer.accelerator.end_training()
    log = events(tmp_path / "logs" / "mine")
    assert list((tmp_path / "logs" / "mine").glob("events*.try7"))
    settings = next((tmp_path / "logs" / "mine").rglob("hparams.yml")).read_text()
    assert "learning_rate: 0.001" in settings and "batch_size: 4" in settings
    rewards = torch.stack(scores)
    want = {"objective/kl_coef": 0.2, "env/reward_mean": rewards.mean().item(),
            "env/reward_std": rewards.std(correction=0).item()}
    logged = {name: log.Scalars(name)[0] for name in want}
    assert [event.step for event in logged.values()] == [1] * 3
    assert [event.value for event in logged.values()] == pytest.approx(list(want.values()))
    assert {"objective/kl_dist", "env/reward_dist"} <= set(log.Tags()["histograms"])
    table = log.Tensors("game_log/text_summary")[0].tensor_proto.string_val[0].decode()
    assert all(text in table for text in ("a | e", "d | h", f"{scores[0].item():.2f}"))
    with pytest.raises(ValueError, match="response"):  # a column that is not in the batch
        trainer.log_stats(stats, {"query": list("abcd")}, scores)


def test_wandb_gets_histograms_and_a_table_of_the_columns_asked_for(
        make_trainer, make_batch, monkeypatch):
    class Tracker:
        name, logged, tables = "wandb", {}, []

        def log(self, values, step, **kwargs):
            self.logged.update(values)

        def log_table(self, name, columns, data, step):
            self.tables.append((name, columns, data, step))

    def histogram(values):  # as wandb makes it
        return np.histogram(values, bins=64)[0].sum()

    trainer = make_trainer()
    trainer.config.log_with, trainer.accelerator.trackers = "wandb", [Tracker()]
    monkeypatch.setitem(sys.modules, "wandb", type("wandb", (), {"Histogram": histogram}))
    queries, responses, _ = make_batch(((2, 2), (2, 2)))
    stats = trainer.step(queries, responses, scores_of(1, 3))
    stats["ppo/policy/ratio"][0] = math.inf  # no histogram has a place for it
    stats["ppo/policy/advantages"] = 1 + torch.arange(2) * 1e-7  # narrower than float32 divides
    batch = {"query": ["a", "b"], "gold": [7, 8]}
    trainer.log_stats(stats, batch, scores_of(1, 3), columns_to_log=["query", "gold"])
    table = [["a", 7, 1.0], ["b", 8, 3.0]]
    assert Tracker.tables == [("game_log", ["query", "gold", "reward"], table, 1)]
    assert Tracker.logged["env/reward_mean"] == 2 and Tracker.logged["env/reward_dist"] == 2
    assert Tracker.logged["ppo/policy/ratio"] == 3


def test_without_a_tracker_nothing_is_logged(make_trainer, make_batch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer()
    queries, responses, scores = make_batch()
    stats = trainer.step(queries, responses, scores)
    trainer.log_stats(stats, {"input_ids": queries}, scores)  # no column of the table is needed
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------- models and checkpoints
def test_a_saved_policy_opens_as_a_plain_model_with_a_card(make_trainer, make_batch, tmp_path):
    trainer = make_trainer(task_name="kindness", exp_name="try-7", model_name="my/model")
    trainer.step(*make_batch())
    folder = tmp_path / "new" / "folder"
    trainer.save_pretrained(str(folder))
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        want, _, values = trainer.model(tokens)
        plain = AutoModelForCausalLM.from_pretrained(folder).eval()
        torch.testing.assert_close(plain(tokens).logits, want)
        again = AutoModelForCausalLMWithValueHead.from_pretrained(folder, require_v_head=True)
        torch.testing.assert_close(again.eval()(tokens)[2], values)
    assert AutoTokenizer.from_pretrained(folder)("w5 w7").input_ids == [5, 7]
    card = (folder / "README.md").read_text()
    assert all(word in card for word in ("kindness", "try-7", "my/model", "1 updates of 4"))


def test_the_reference_adapter_is_not_saved(make_trainer, make_model, make_batch, tmp_path):
    from safetensors.torch import load_file
    trainer = make_trainer(make_model(lora="trained"))
    trainer.step(*make_batch())
    trainer.save_pretrained(str(tmp_path))
    files = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert {"adapter_model.safetensors", "adapter_config.json", "value_head.safetensors"} <= files
    assert "model.safetensors" not in files
    assert not any("reference" in path.name for path in tmp_path.rglob("*"))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    policy = {name: p for name, p in trainer.model.named_parameters() if ".default." in name}
    assert len(saved) == len(policy)
    for name, p in policy.items():
        name = name.removeprefix("pretrained_model.").replace(".default", "")
        assert torch.equal(saved[name], p)


def test_the_model_card_can_be_written_alone(make_trainer, tmp_path):
    make_trainer("t5").create_model_card(str(tmp_path / "card"), model_name="Ours")
    card = (tmp_path / "card" / "README.md").read_text()
    assert "# Ours" in card and "AutoModelForSeq2SeqLM" in card


@pytest.fixture
def hub(monkeypatch):
    """What is sent to the hub: repositories made, and files with the commit's message."""
    class Sent:
        repositories = []
        commits = []

    def create_repo(self, repo_id, private=None, **kwargs):
        Sent.repositories.append((repo_id, private))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message=None, **kwargs):
        files = {path.name for path in Path(folder_path).rglob("*")}
        Sent.commits.append((repo_id, files, commit_message))

    def create_commit(self, repo_id, operations, *, commit_message=None, **kwargs):
        Sent.commits.append((repo_id, {op.path_in_repo for op in operations}, commit_message))

    for method in (create_repo, upload_folder, create_commit):
        monkeypatch.setattr(huggingface_hub.HfApi, method.__name__, method)
    return Sent


@pytest.mark.parametrize("compare_steps, pushed_at", [(1, [1, 2, 4]), (2, [2, 4])])
def test_the_policy_is_pushed_when_its_raw_score_is_the_best(
        compare_steps, pushed_at, make_trainer, make_batch, hub):
    """P35: clipped and scaled scores were compared, those of the rank alone."""
    trainer = make_trainer(push_to_hub_if_best_kwargs={"repo_id": "me/best", "private": True},
                           compare_steps=compare_steps, score_clip=0.1, use_score_scaling=True,
                           use_score_norm=True)
    when = []
    for update, score in enumerate((-3.0, 7.0, 7.0, 8.0, 5.0), start=1):
        before = len(hub.commits)
        step_with_scores(trainer, make_batch, score, score + 1)
        when += [update] * (len(hub.commits) > before)
    assert when == pushed_at and set(hub.repositories) == {("me/best", True)}


def test_an_upload_that_fails_is_warned_of_and_the_next_best_score_tries_again(
        make_trainer, make_batch, hub, monkeypatch):
    def no_network(self, repo_id, **kwargs):
        raise OSError("503 for me/best\nretry later")

    trainer = make_trainer(push_to_hub_if_best_kwargs={"repo_id": "me/best", "token": "secret"})
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.HfApi, "create_repo", no_network)
        with pytest.warns(UserWarning, match="push_to_hub_if_best_kwargs.*503 for me/best") as said:
            step_with_scores(trainer, make_batch, 7.0, 7.0)
    (said,) = [str(w.message) for w in said if "push_to_hub" in str(w.message)]
    assert "\n" not in said and "secret" not in said
    assert trainer.current_step == 1 and not hub.commits
    step_with_scores(trainer, make_batch, 5.0, 5.0)  # the best of those that arrive
    assert len(hub.commits) == 1
    step_with_scores(trainer, make_batch, 4.0, 4.0)
    assert len(hub.commits) == 1


def test_a_resumed_run_remembers_the_best_score(make_trainer, make_batch, hub, tmp_path):
    settings = {"push_to_hub_if_best_kwargs": {"repo_id": "me/best"}}
    one, two = make_trainer(**settings), make_trainer(**settings)
    step_with_scores(one, make_batch, 7.0, 7.0)
    one.save_checkpoint(tmp_path)
    two.load_checkpoint(tmp_path / "checkpoint-1")
    hub.commits.clear()
    step_with_scores(two, make_batch, 5.0, 5.0)
    assert not hub.commits
    step_with_scores(two, make_batch, 8.0, 8.0)
    assert hub.commits


def test_nothing_is_pushed_unless_asked(make_trainer, make_batch, hub):
    make_trainer().step(*make_batch())
    assert not hub.repositories and not hub.commits


def test_model_value_head_and_tokenizer_go_to_one_repository(make_trainer, hub):
    make_trainer().push_to_hub(repo_id="me/it", private=True, commit_message="done")
    assert set(hub.repositories) == {("me/it", True)}
    assert {repo for repo, _, _ in hub.commits} == {"me/it"}
    files = set().union(*(files for _, files, _ in hub.commits))
    assert {"model.safetensors", "value_head.safetensors", "tokenizer.json"} <= files
    assert "done" in {message for _, _, message in hub.commits}


@pytest.mark.parametrize("lora", [None, "trained"])
def test_a_run_goes_on_from_its_checkpoint_to_the_same_numbers(
        lora, make_trainer, make_model, tmp_path):
    """P24: weights were all that could be saved."""
    def start():
        model = make_model(lora=lora)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=1e-3)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return make_trainer(model, optimizer=optimizer, lr_scheduler=scheduler, mini_batch_size=2,
                            ppo_epochs=2, use_score_scaling=True, use_score_norm=True, horizon=50,
                            target=1e-3)

    def update(trainer):
        queries = [torch.randint(4, VOCAB, (3,)) for _ in range(4)]
        responses = trainer.generate(queries, return_prompt=False, do_sample=True, max_new_tokens=4)
        return trainer.step(queries, responses, list(torch.randn(4)))

    one = start()
    update(one), update(one)
    one.save_checkpoint(tmp_path)
    want = update(one)
    set_seed(99)
    two = start()
    if lora:  # the base is in the model's own folder
        saved = torch.load(tmp_path / "checkpoint-2" / "pytorch_model.bin")
        trained = {name.removeprefix("pretrained_model.")
                   for name, p in two.model.named_parameters() if p.requires_grad}
        assert saved.keys() == trained
    two.load_checkpoint(tmp_path / "checkpoint-2")
    got = update(two)
    assert two.current_step == one.current_step == 3
    assert two.kl_ctl.value == one.kl_ctl.value != 0.2
    assert got["ppo/learning_rate"] == want["ppo/learning_rate"] != 1e-3
    for name in want:
        if not name.startswith("time/"):
            assert torch.equal(torch.as_tensor(want[name]), torch.as_tensor(got[name])), name
    pairs = zip(one.model.parameters(), two.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_resumed_run_learns_at_the_rate_it_is_given(make_trainer, make_batch, tmp_path):
    trainer = make_trainer()
    trainer.step(*make_batch())
    trainer.save_checkpoint(tmp_path)
    slower = make_trainer(learning_rate=1e-6)
    slower.load_checkpoint(tmp_path / "checkpoint-1")
    assert slower.step(*make_batch())["ppo/learning_rate"] == 1e-6


def test_a_resumed_run_takes_the_kl_coefficient_of_its_config_unless_it_adapts(
        make_trainer, make_batch, tmp_path):
    trainer = make_trainer(adap_kl_ctrl=True, init_kl_coef=0.2, target=0.1, horizon=10)
    trainer.step(*make_batch())
    trainer.save_checkpoint(tmp_path)
    adapted = make_trainer(adap_kl_ctrl=True, init_kl_coef=0.9)
    fixed = make_trainer(adap_kl_ctrl=False, init_kl_coef=0.9)
    for resumed, expected in (adapted, trainer.kl_ctl.value), (fixed, 0.9):
        resumed.load_checkpoint(tmp_path / "checkpoint-1")
        assert resumed.step(*make_batch())["objective/kl_coef"] == expected != 0.2


def test_a_resumed_run_writes_over_the_damaged_checkpoint_that_it_passed_over(
        make_trainer, make_batch, tmp_path):
    trainer = make_trainer(save_total_limit=2)
    for _ in range(2):
        trainer.step(*make_batch())
        trainer.save_checkpoint(tmp_path)
    (tmp_path / "checkpoint-2" / "optimizer.bin").unlink()
    resumed = make_trainer(save_total_limit=2)
    with pytest.warns(UserWarning, match="passed over checkpoint-2"):
        resumed.load_checkpoint(tmp_path)
    resumed.step(*make_batch())
    resumed.save_checkpoint(tmp_path)
    assert (tmp_path / "checkpoint-2" / "optimizer.bin").exists()
    with pytest.raises(InputError, match="checkpoint-2 is there already"):
        trainer = make_trainer()
        trainer.step(*make_batch())
        trainer.save_checkpoint(tmp_path)


def test_the_newest_checkpoint_alone_is_kept(make_trainer, make_batch, tmp_path):
    trainer = make_trainer()
    for _ in range(2):
        trainer.step(*make_batch())
        trainer.save_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


# --------------------------------------------------------------------------- wrong inputs
def without(value):
    return lambda rows: rows[:1] + [value] + rows[2:]


@pytest.mark.parametrize("part, change, named", [
    ("responses", torch.stack, "responses"),
    ("responses", lambda rows: rows[:3], "responses.*4.*3"),
    ("scores", lambda rows: rows[:3], "scores.*4.*3"),
    ("masks", lambda rows: rows[:3], "response_masks.*4.*3"),
    ("queries", without([5, 6]), r"queries\[1\]"),
    ("queries", without(torch.tensor([[5, 6]])), r"queries\[1\]"),
    ("responses", without(torch.tensor([], dtype=torch.long)), r"responses\[1\]"),
    ("scores", without(1.0), r"scores\[1\]"),
    ("scores", without(torch.zeros(2)), r"scores\[1\]"),
    ("scores", without(torch.zeros(1, 1)), r"scores\[1\]"),
    ("scores", without(torch.tensor(math.nan)), r"scores\[1\].*nan"),
    ("scores", without(torch.tensor(-math.inf)), r"scores\[1\].*-inf"),
    ("masks", without(torch.tensor([1])), r"response_masks\[1\]"),
    ("masks", without(torch.tensor([0, 0])), r"response_masks\[1\]")])
def test_a_wrong_input_of_step_is_named_by_row_before_any_weight_moves(
        part, change, named, make_trainer, make_batch, weights, moved):
    """P19: an empty response was an index error deep inside."""
    trainer = make_trainer()
    queries, responses, scores = make_batch(((3, 2),) * 4)
    masks = [torch.tensor([1, 1])] * 4
    parts = {"queries": queries, "responses": responses, "scores": scores, "masks": masks}
    parts[part] = change(parts[part])
    before = weights(trainer.model)
    with pytest.raises(ValueError, match=named):
        trainer.step(*parts.values())
    assert not moved(before, trainer.model)


def test_tuples_and_scores_of_any_type_or_one_number_are_taken(make_trainer, make_batch):
    queries, responses, _ = make_batch(((3, 2),) * 4)
    scores = [torch.tensor(1), torch.tensor([2.0]), torch.tensor(3.0, dtype=torch.float64),
              torch.tensor(4.0, dtype=torch.bfloat16)]
    trainer = make_trainer(use_score_scaling=True)
    stats = trainer.step(tuple(queries), responses, scores)
    assert stats["objective/scores"] == 2.5
    stats = trainer.step(queries, responses, [torch.tensor(n) for n in (1, 2, 3, 4)])
    assert stats["objective/scores"] == 2.5


def test_columns_of_a_dataset_are_taken(make_trainer, make_batch):
    queries, responses, _ = make_batch()
    columns = {"query": [query.tolist() for query in queries], "score": [1.0, 2.0, 3.0, 4.0],
               "response": [response.tolist() for response in responses]}
    rows = Dataset.from_dict(columns).with_format("torch")
    stats = make_trainer().step(rows["query"], rows["response"], rows["score"])
    assert stats["objective/scores"] == 2.5 and stats["tokens/responses_dist"].sum() == 14


@pytest.mark.parametrize("rows, masks, named", [
    (((3, 2), (3, 0)), None, r"responses\[1\]"),  # P19: the start token is no response
    (((3, 2), (3, 2)), ([0, 1, 1], [1, 0, 0]), r"response_masks\[1\]")])
def test_an_encoder_decoder_s_response_is_more_than_its_start(
        rows, masks, named, make_trainer, make_batch):
    masks = masks and [torch.tensor(mask) for mask in masks]
    with pytest.raises(ValueError, match=named):
        make_trainer("t5").step(*make_batch(rows, start=PAD), masks)


@pytest.mark.parametrize("part, value", [
    ("config", {"batch_size": 4}), ("model", "gpt2"), ("tokenizer", None), ("ref_model", "gpt2")])
def test_parts_that_do_not_go_together_are_refused(part, value, make_model, tokenizer):
    parts = {"config": ppo.PPOConfig(), "model": make_model(), "tokenizer": tokenizer, part: value}
    with pytest.raises(ValueError, match=part):
        ppo.PPOTrainer(**parts)


@pytest.mark.parametrize("arch, lora", [("gpt2", "fresh"), ("t5", None)])
def test_trl_0_7_s_attributes_and_today_s_name_of_the_tokenizer(
        arch, lora, make_model, tokenizer):
    model = make_model(arch, lora=lora)
    config = ppo.PPOConfig(batch_size=4, mini_batch_size=4)
    trainer = ppo.PPOTrainer(config, model, processing_class=tokenizer, dataset=DATASET)
    assert trainer.tokenizer is tokenizer and trainer.dataset is DATASET
    assert trainer.current_device == torch.device("cpu") and not trainer.is_distributed
    assert (trainer.is_peft_model, trainer.is_encoder_decoder) == (lora is not None, arch == "t5")
    batch = trainer.data_collator([{"input_ids": [5, 6]}, {"input_ids": [7]}])
    assert batch["input_ids"].tolist() == [[5, 6], [7, PAD]]
    assert len(list(trainer.model_params)) == sum(p.requires_grad for p in model.parameters())


def test_a_model_without_a_value_head_is_refused(make_hf_model, tokenizer):
    with pytest.raises(ValueError, match="model"):
        ppo.PPOTrainer(ppo.PPOConfig(), make_hf_model("gpt2"), tokenizer=tokenizer)
