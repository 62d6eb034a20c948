"""The numbers of TRL 0.7.10 itself (recorded_ppo.json), from a single function to whole updates.

Cases are those in which 0.7.10 is right, or was corrected: `corrected` names the defect. What it
gets wrong is in test_ppo.py.

    python -m pytest -q tests/test_recorded.py
"""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BOS, EOS, PAD, VOCAB
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

import common
import ppo

RECORDED = json.loads(Path(__file__).with_name("recorded_ppo.json").read_text())


def cases(part, key="name"):
    return pytest.mark.parametrize("case", RECORDED[part], ids=lambda case: str(case[key]))


def tensors(values):
    """Lists of numbers -> tensors; all else as it is."""
    return [torch.tensor(value) if isinstance(value, list) else value for value in values]


def agree(got, want, rtol=1e-5, atol=1e-6):
    got, want = torch.as_tensor(got).double(), torch.as_tensor(want).double()
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


# --------------------------------------------------------------------------- functions and methods
def test_the_defaults_are_trl_s():
    config = ppo.PPOConfig()
    assert {name: getattr(config, name) for name in RECORDED["defaults"]} == RECORDED["defaults"]


def test_a_seed_gives_trl_s_numbers():
    import random
    want = RECORDED["set_seed"]
    common.set_seed(want["seed"])
    agree([random.random() for _ in range(3)], want["random"])
    agree(np.random.rand(3), want["numpy"])
    assert np.random.permutation(6).tolist() == want["permutation"]
    agree(torch.rand(3), want["torch"])


@cases("functions")
def test_functions(case):
    module = ppo if hasattr(ppo, case["function"]) else common
    got = getattr(module, case["function"])(*tensors(case["args"]), **case["kwargs"])
    mask = torch.tensor(1 if case["mask"] is None else case["mask"])
    agree(got * mask, torch.tensor(case["result"]) * mask)


@cases("controllers", "init")
def test_kl_controllers(case):
    controller = getattr(ppo, case["class"])(*case["init"])
    values = [controller.value]
    for update in case["updates"]:
        controller.update(*update)
        values.append(controller.value)
    agree(values, case["values"], rtol=1e-9)


def test_running_moments():
    running = ppo.RunningMoments(SimpleNamespace(num_processes=1))
    for batch, (mean, std, *so_far) in zip(*RECORDED["running_moments"].values(), strict=True):
        agree(running.update(torch.tensor(batch)), [mean, std])
        agree([running.mean, running.std, running.var], so_far)


@cases("methods")
def test_rewards_and_advantages(case, make_trainer):
    got = getattr(make_trainer(**case["config"]), case["method"])(*tensors(case["args"]))
    mask = torch.tensor(case["mask"])
    for a, b in zip(got, case["result"], strict=True):
        agree(a * mask, torch.tensor(b) * mask)


@pytest.mark.parametrize("case", RECORDED["loss"]["cases"], ids=["default", "narrow", "wide"])
def test_loss_and_statistics(case, make_trainer):
    args = {name: torch.tensor(value) for name, value in RECORDED["loss"]["args"].items()}
    pg_loss, vf_loss, stats = make_trainer(**case["config"]).loss(**args)
    agree([pg_loss, vf_loss], [case["policy_loss"], case["value_loss"]])
    for name, want in case["stats"].items():
        agree(stats[name][args["mask"] > 0] if isinstance(want, list) else stats[name], want)


# --------------------------------------------------------------------------- whole updates
def fill(model, seed, scale=0.15, only="", add=False):
    """Draw all weights, name after name, from a generator whose stream is frozen."""
    draw = np.random.RandomState(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if only in name:
                norm = "weight" in name and ("ln_" in name or "layer_norm" in name)
                drawn = scale * draw.standard_normal(tuple(p.shape))
                drawn = torch.tensor(drawn, dtype=torch.float32)
                p.copy_(p + drawn if add else drawn + norm)
    return model


def build(kind, seed, lora=False, near=None):
    """Make a model of the recorded updates.

    near: the model is the policy of that seed plus a little noise of `seed`."""
    if near is not None:
        return fill(build(kind, near), seed, scale=0.02, add=True)
    tokens = {"vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOS}
    if kind == "t5":
        config = T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2,
                          decoder_start_token_id=PAD, **tokens)
        model = T5ForConditionalGeneration(config)
        model = common.AutoModelForSeq2SeqLMWithValueHead.from_pretrained(model)
        return fill(model, seed, scale=0.2)
    auto = common.AutoModelForCausalLMWithValueHead
    config = GPT2Config(n_positions=48, n_embd=32, n_layer=2, n_head=2, bos_token_id=BOS, **tokens)
    model = fill(auto.from_pretrained(GPT2LMHeadModel(config)), seed)
    if lora:
        from peft import LoraConfig
        head = model.v_head.state_dict()
        adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True,
                             task_type="CAUSAL_LM")
        model = auto.from_pretrained(model.pretrained_model, peft_config=adapter)
        model.v_head.load_state_dict(head)
        fill(model, seed, only="lora_A")
    return model


def changes(before, model):
    """{parameter: [norm of its change, the change's product with cos(0.7 i + 0.3)]}"""
    summary = {}
    for name, p in model.named_parameters():
        change = (p.detach().double() - before[name].double()).flatten()
        # the keys' bias has no gradient but rounding, which Adam turns into a whole step
        if name.endswith("c_attn.bias"):
            change[len(change) // 3:2 * len(change) // 3] = 0
        probe = torch.cos(torch.arange(len(change), dtype=torch.float64) * 0.7 + 0.3)
        name = name.removeprefix("pretrained_model.").removeprefix("base_model.model.")
        summary[name] = [change.norm().item(), (change @ probe).item()]
    return summary


@cases("steps")
def test_whole_updates(case, make_trainer, weights, monkeypatch):
    model, parts = build(**case["model"]), {}
    if case["ref"]:
        parts["ref_model"] = build(**case["ref"])
    for name, module in (("optimizer", torch.optim), ("lr_scheduler", torch.optim.lr_scheduler)):
        if name in case:
            how = dict(case[name])
            trained = [p for p in model.parameters() if p.requires_grad]
            on = parts["optimizer"] if name == "lr_scheduler" else trained
            parts[name] = getattr(module, how.pop("name"))(on, **how)
    trainer, before = make_trainer(model, **parts, **case["config"]), weights(model)
    orders = iter(case["permutations"])
    monkeypatch.setattr(np.random, "permutation", lambda n: np.array(next(orders)))
    for data, want in zip(case["steps"], case["stats"], strict=True):
        rows = {name: [torch.tensor(row) for row in column] for name, column in data.items()}
        stats = trainer.step(**rows)
        for name, value in want.items():
            # small differences of large numbers
            loose = "objective/kl" in name or "advantages" in name
            agree(stats[name], value, rtol=1e-4, atol=2e-5 if loose else 5e-6)
    changed = changes(before, model)
    for name, (norm, product) in case["weights"].items():
        agree(changed[name], [norm, product], rtol=0, atol=1e-3 * norm + 1e-7)
    assert {name for name, (norm, _) in changed.items() if norm} == set(case["weights"])
