"""dpo.py's losses, rows, log-probabilities, reference, training and evaluation.

They are held against the numbers of TRL 0.7.10 (recorded_dpo.json), the mathematics by hand, and
the plain model run on one answer at a time.

    python -m pytest -q tests/test_dpo.py
"""
import copy
import dataclasses
import json
import math
import sys
import types
import warnings
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from conftest import BOS, CAUSAL, EOS, PAD, SEQ2SEQ, VOCAB, hf_model
from datasets import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

import dpo
import machinery
from common import InputError
from dpo import DPOConfig, DPODataCollatorWithPadding, DPOTrainer

RECORDED = json.loads(Path(__file__).with_name("recorded_dpo.json").read_text())
LN2 = math.log(2)
ANSWERS = ("chosen", "rejected")
COLUMNS = {"reference_chosen_logps", "reference_rejected_logps"}
LOSS_TYPES = ("sigmoid", "hinge", "ipo", "kto", "kto_pair")
SGD = {"optim": "sgd", "learning_rate": 0.5}  # Adam would forgive a wrong factor of the gradient


def row(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# prompts and answers of several lengths; two pairs with one prompt; answers that begin alike
ROWS = [row("w4 w5 w6", " w7 w8", " w9 w10 w11"), row("w12", " w13 w14 w15 w16", " w17"),
        row("w18 w19 w20 w21 w22", " w23", " w24 w25"), row("w26 w27", " w28 w29", " w30 w31"),
        row("w33 w34 w35", " w36 w37 w38", " w36 w39 w40 w41"), row("w12", " w44 w45", " w46")]
WORDS = " ".join(f"w{i}" for i in range(50, 70))
LONG_PROMPTS = [row(WORDS, " w7 w8", " w9"), row(f"w4 {WORDS}", " w9", " w10 w11")]
LONG_ANSWERS = [row("w4", f" {WORDS} w7", f" w8 {WORDS}"), row("w5 w6", f" {WORDS}", " w9")]
# one token per word; "<s>" opens, the assistant's turn is "w11 answer </s>" and a line's end
TEMPLATE = ("{{ '<s> ' }}{% for m in messages %}{{ 'w10 ' if m['role'] == 'user' else 'w11 ' }}"
            "{{ m['content'] }}{{ ' </s>\n' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'w11 ' }}{% endif %}")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def make_args(tmp_path):
    """make_args(**changes) -> TrainingArguments.

    2 pairs per step in the order of the rows, 2 steps, one log line per step, nothing saved."""
    def make(**changes):
        return TrainingArguments(**{
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 2, "max_steps": 2,
            "per_device_eval_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
            "train_sampling_strategy": "sequential", "report_to": "none", "use_cpu": True,
            "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
            "dataloader_pin_memory": False, **changes})

    return make


def with_bos(tokenizer):
    """The tokenizer, which writes BOS in front of a text, as Llama's does."""
    from tokenizers.processors import TemplateProcessing
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


@pytest.fixture
def tokenizer(make_tokenizer):
    return with_bos(make_tokenizer())


@pytest.fixture
def make(make_args, make_tokenizer, tokenizer):
    """make("gpt2" or a model, ref_model, rows=ROWS, eval_rows=None, args={...}, **arguments)
    -> DPOTrainer."""
    def make(model="gpt2", ref_model=None, rows=ROWS, eval_rows=None, args=None, **kwargs):
        if isinstance(model, str):
            model = hf_model(model)
        sets = {"train_dataset": rows, "eval_dataset": eval_rows}
        sets = {name: Dataset.from_list(data) for name, data in sets.items() if data}
        seq2seq = model is not None and model.config.is_encoder_decoder
        kwargs = {"tokenizer": make_tokenizer() if seq2seq else tokenizer, **sets, **kwargs}
        return DPOTrainer(model, ref_model, args=make_args(**(args or {})), **kwargs)

    return make


def lora(**changes):
    from peft import LoraConfig
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear",
                         "task_type": "CAUSAL_LM", **changes})


def gpt2_lora(**changes):
    return lora(target_modules=["c_attn"], fan_in_fan_out=True, **changes)


def trained_lora(seed=3):
    """A GPT-2 whose adapter adds something already."""
    from peft import get_peft_model
    torch.manual_seed(seed)
    return get_peft_model(hf_model("gpt2"), gpt2_lora(init_lora_weights=False))


def two_adapters():
    from peft import get_peft_model
    torch.manual_seed(0)
    config = gpt2_lora(init_lora_weights=False)
    model = get_peft_model(hf_model("gpt2"), config, adapter_name="policy")
    model.add_adapter("reference", config)
    return model


def batch_of(trainer):
    return trainer.data_collator(list(trainer.train_dataset))


def lines(trainer):
    """The log lines of training."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def losses(trainer):
    return [line["loss"] for line in lines(trainer)]


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(before, model):
    """Names of the parameters that are no longer what they were."""
    return {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}


def agree(got, want, rtol=1e-5, atol=1e-6):
    got, want = (torch.as_tensor(x).detach().double() for x in (got, want))
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def plain(model, tokens, name, pad=-100):
    """One answer of a tokenised row through the plain model, alone and without padding
    -> its log-probability (a sum), the mean of its logits, the number of its tokens."""
    labels = torch.tensor(tokens[f"{name}_labels"])
    if model.config.is_encoder_decoder:
        ids = torch.tensor([tokens["prompt_input_ids"]])
        logits = model(input_ids=ids, labels=labels[None]).logits[0]
    else:
        logits = model(torch.tensor([tokens[f"{name}_input_ids"]])).logits[0, :-1]
        labels = labels[1:]
    logits, labels = logits[labels != pad], labels[labels != pad]
    logps = logits.double().log_softmax(-1).gather(1, labels[:, None])
    return logps.sum(), logits.mean(), len(labels)


def plain_logps(model, trainer, mean=False):
    """Log-probabilities of the chosen and the rejected answers of the training rows [2, B]."""
    def of(tokens, name):
        total, _, count = plain(model, tokens, name)
        return total / count if mean else total

    was_training = model.training
    model.eval()
    logps = torch.stack([torch.stack([of(tokens, name) for tokens in trainer.train_dataset])
                         for name in ANSWERS])
    model.train(was_training)
    return logps


def same_gradients(got, want):
    """Compare two {name: gradient}. Rounding is about 1e-6 of a gradient's norm; parameters whose
    true gradient is 0 (the keys' biases) hold nothing but the rounding of the others."""
    total = torch.stack([grad.norm() for grad in want.values()]).norm()
    for name, grad in want.items():
        assert (got[name] - grad).norm() <= 1e-3 * grad.norm() + 1e-5 * total, name


# -------------------------------------------------------- the numbers of TRL 0.7.10
def cases(part):
    return pytest.mark.parametrize("case", RECORDED[part], ids=lambda case: case["name"])


@cases("losses")
def test_losses_and_rewards_equal_trl(case, make):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*label_smoothing")
        trainer = make(rows=None, **case["dpo"])
    for logps, want in zip(case["logps"], case["results"], strict=True):
        got = trainer.dpo_loss(*map(torch.tensor, logps), reference_free=case["reference_free"])
        for values, name in zip(got, ("losses", "chosen_rewards", "rejected_rewards"), strict=True):
            if name in want:
                agree(values, want[name])


@cases("batches")
def test_padded_batches_equal_trl(case):
    if case["call"] == "collator":
        batch = DPODataCollatorWithPadding(**case["kwargs"])(case["input"])
    else:
        tensors = {k: torch.tensor(v) for k, v in case["input"].items()}
        batch = DPOTrainer.concatenated_inputs(tensors, **case["kwargs"])
    for name, want in case["result"].items():
        agree(batch[name], want)


def test_log_probabilities_equal_trl():
    logits, labels = (torch.tensor(RECORDED["logps"][name]) for name in ("logits", "labels"))
    for name, kwargs in RECORDED["logps"]["variants"].items():
        given = labels.clone()
        got = DPOTrainer.get_batch_logps(logits, given, **kwargs)
        agree(got, RECORDED["logps"]["results"][name], rtol=1e-4)
        assert torch.equal(given, labels)  # the caller's labels are not changed


def fill(model, seed, scale=0.15, only="", add=False):
    """Weights from a generator with a frozen stream, name after name; those of norms around 1."""
    draw = np.random.RandomState(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if only in name:
                norm = "weight" in name and ("ln_" in name or "layer_norm" in name)
                noise = scale * draw.standard_normal(tuple(p.shape))
                noise = torch.tensor(noise, dtype=torch.float32)
                p.copy_(p + noise if add else noise + norm)
    return model


def build(kind, seed, lora=False, near=None):
    """The models of the recorded runs. near: the reference, which is the policy of that seed and a
    little noise of `seed`."""
    if near is not None:
        return fill(build(kind, near), seed, scale=0.03, add=True)
    tokens = {"vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOS}
    if kind == "t5":
        config = T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, dropout_rate=0.0,
                          decoder_start_token_id=PAD, **tokens)
        return fill(T5ForConditionalGeneration(config), seed, scale=0.2)
    config = GPT2Config(n_positions=48, n_embd=32, n_layer=2, n_head=2, bos_token_id=BOS,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **tokens)
    model = fill(GPT2LMHeadModel(config), seed)
    if lora:
        from peft import get_peft_model
        model = fill(get_peft_model(model, gpt2_lora()), seed, only="lora_A")
    return model


@cases("runs")
def test_five_steps_equal_trl(case, make):
    reference = case["ref"] and build(**case["ref"])
    args = {"max_steps": 5, "learning_rate": 1e-3, "lr_scheduler_type": "linear",
            "optim": "adamw_torch", **case["args"]}
    trainer = make(build(**case["model"]), reference, rows=case["rows"], max_length=40,
                   max_prompt_length=20, max_target_length=20, args=args, **case["dpo"])
    trainer.train()
    # recorded are the losses of micro-batches; logged are the means of optimizer steps
    want = torch.tensor(case["losses"]).view(args["max_steps"], -1).mean(1)
    agree(losses(trainer), want, rtol=1e-4, atol=1e-5)
    for got, want in zip(lines(trainer), case["logs"], strict=True):
        for name, value in want.items():
            tie = abs(want["rewards/margins"]) < 1e-4  # rounding decides which reward is larger
            if name != "rewards/accuracies" or not tie:
                agree(got[name], value, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------- the losses
@pytest.mark.parametrize("arguments, want", [
    ({}, [-math.log(1 / (1 + math.exp(-0.75)))]),
    ({"label_smoothing": 0.2},
     [0.8 * math.log(1 + math.exp(-0.75)) + 0.2 * math.log(1 + math.exp(0.75))]),
    ({"loss_type": "hinge"}, [0.25]),
    ({"loss_type": "ipo"}, [0.25]),  # (1.5 - 1 / (2 x 0.5))^2
    # chosen ratio 1, rejected ratio -0.5: the estimates of the KL, not below 0, are 1 and 0
    ({"loss_type": "kto"}, [1 - 1 / (1 + math.exp(-0.5)), 1 - 1 / (1 + math.exp(-0.75))])],
    ids=("sigmoid", "cdpo", "hinge", "ipo", "kto"))
def test_the_loss_of_one_pair_by_hand(arguments, want, make):
    # h = (-1 - -3) - (-2 - -2.5) = 1.5, beta h = 0.75
    trainer = make(rows=None, beta=0.5, **arguments)
    got, chosen, rejected = trainer.dpo_loss(*(torch.tensor([x]) for x in (-1.0, -3.0, -2.0, -2.5)))
    agree(got, want)
    agree(chosen, [0.5 * (-1 - -2)])
    agree(rejected, [0.5 * (-3 - -2.5)])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_step_against_the_gradient_raises_the_chosen_and_lowers_the_rejected(loss_type, make):
    chosen, rejected = (torch.tensor([-2.0, -3.0], requires_grad=True) for _ in range(2))
    references = torch.tensor([-2.1, -3.1]), torch.tensor([-2.1, -3.2])
    trainer = make(rows=None, loss_type=loss_type)
    trainer.dpo_loss(chosen, rejected, *references)[0].mean().backward()
    assert (chosen.grad < 0).all() and (rejected.grad > 0).all()


def test_the_gradient_is_beta_times_how_wrong_the_rewards_are(make):
    # Rafailov et al., section 4:
    # grad L = -beta sigmoid(r(y_l) - r(y_w)) (grad log pi(y_w) - grad log pi(y_l))
    policy = [torch.tensor([x], requires_grad=True) for x in (-1.0, -2.0)]
    reference = torch.tensor([-3.0]), torch.tensor([-1.0])
    loss, *rewards = make(rows=None, beta=0.3).dpo_loss(*policy, *reference)
    loss.backward()
    want = 0.3 / (1 + math.exp(0.3 * (2.0 - -1.0)))
    agree(policy[0].grad, [-want])
    agree(policy[1].grad, [want])
    assert not any(reward.requires_grad for reward in rewards)


def test_log_probabilities_are_float32_when_logits_are_bfloat16():
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(2, 60, 50), torch.randint(50, (2, 60))
    half = logits.bfloat16()
    got = DPOTrainer.get_batch_logps(half, labels)
    want = half.double().log_softmax(-1)[:, :-1].gather(2, labels[:, 1:, None]).sum((1, 2))
    assert got.dtype == torch.float32
    agree(got, want, rtol=1e-5)


def test_the_gradient_of_log_probabilities_is_that_of_log_softmax():
    # more answer tokens than any sensible chunk of rows
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 150, 11), torch.randint(11, (2, 150))
    labels[:, :20] = labels[0, -30:] = -100
    weights, grads = torch.tensor([1.5, -0.5]), []
    def plain(x):
        return x[:, :-1].log_softmax(-1).gather(2, labels[:, 1:, None].clamp(min=0))[..., 0]
    for function in (lambda x: DPOTrainer.get_batch_logps(x, labels),
                     lambda x: (plain(x) * (labels[:, 1:] != -100)).sum(1)):
        leaf = logits.clone().requires_grad_()
        (function(leaf * 1.0) * weights).sum().backward()
        grads.append(leaf.grad)
    agree(*grads)


# -------------------------------------------------------- from rows to tokens
def ids(*words):
    special = {"<s>": BOS, "</s>": EOS}
    return [special.get(word) or int(word[1:]) for text in words for word in text.split()]


@pytest.fixture
def tokenize(make, tokenizer):
    """tokenize(row, tokenizer=the usual one, **arguments of the trainer) -> the tokenised row."""
    def tokenize(given, tokenizer=tokenizer, **limits):
        return make(rows=None, tokenizer=tokenizer, **limits).tokenize_row(given)

    return tokenize


def test_a_row_of_text_by_hand(tokenize):
    tokens = tokenize(row("w4 w5", " w6", " w7 w8"))
    assert tokens["prompt_input_ids"] == ids("<s> w4 w5")
    assert tokens["prompt_attention_mask"] == [1] * 3
    assert tokens["chosen_input_ids"] == ids("<s> w4 w5 w6 </s>")
    assert tokens["chosen_attention_mask"] == [1] * 5
    assert tokens["chosen_labels"] == [-100] * 3 + ids("w6 </s>")
    assert tokens["rejected_input_ids"] == ids("<s> w4 w5 w7 w8 </s>")
    assert tokens["rejected_labels"] == [-100] * 3 + ids("w7 w8 </s>")


def test_bos_is_written_only_where_the_tokenizer_writes_it(tokenize, make_tokenizer):
    given = row("w4 w5", " w6", " w7 w8")
    assert tokenize(given, make_tokenizer())["chosen_input_ids"] == ids("w4 w5 w6 </s>")
    assert tokenize(given)["chosen_input_ids"] == ids("<s> w4 w5 w6 </s>")


def test_a_tokenizer_without_bos_or_eos_gets_none(tokenize, make_tokenizer):
    tokens = tokenize(row("w4", " w6", " w7"), make_tokenizer(bos_token=None, eos_token=None))
    assert tokens["chosen_input_ids"] == ids("w4 w6")


def test_bos_and_eos_are_not_doubled(tokenize):
    tokens = tokenize(row("<s> w4", " w6 </s>", " w7"))
    assert tokens["chosen_input_ids"] == ids("<s> w4 w6 </s>")
    assert tokens["rejected_input_ids"] == ids("<s> w4 w7 </s>")


PROMPT, SHORT = " ".join(f"w{i}" for i in range(10, 20)), " w60 w61"
LONG = " ".join(f" w{i}" for i in range(30, 50))


@pytest.mark.parametrize("limits, prompt, answer", [
    ((64, 32), 11, 21),    # it fits: nothing is cut
    ((16, 8), 8, 8),       # max_prompt_length holds, the answer has the rest
    ((64, 8), 8, 21),      # ... even where the pair would have fitted
    ((24, 20), 11, 13),    # a short prompt leaves the answer more than the difference of both
    ((30, None), 11, 19),  # without a limit the prompt keeps at least half of max_length
    ((31, None), 11, 20),
    ((32, None), 11, 21),
    ((28, None), 11, 17),
    ((22, None), 11, 11),
    ((16, None), 8, 8)])
def test_long_rows_are_truncated_and_complete_answers_end_in_eos(limits, prompt, answer, tokenize):
    limits = dict(zip(("max_length", "max_prompt_length"), limits, strict=True))
    kept = {"keep_end": ids("<s>") + ids(PROMPT)[len(ids(PROMPT)) - (prompt - 1):],
            "keep_start": ids("<s> " + PROMPT)[:prompt]}
    for mode, start in kept.items():
        tokens = tokenize(row(PROMPT, LONG, SHORT), **limits, truncation_mode=mode)
        assert tokens["prompt_input_ids"] == start
        long = (ids(LONG) + [EOS])[:answer]
        assert tokens["chosen_input_ids"] == start + long
        assert tokens["chosen_labels"] == [-100] * prompt + long
        assert tokens["rejected_input_ids"] == start + ids(SHORT) + [EOS]


@pytest.mark.parametrize("name, limits", [
    ("max_prompt_length=16", {"max_length": 16, "max_prompt_length": 16}),
    ("max_prompt_length=64", {"max_prompt_length": 64}), ("max_length=1", {"max_length": 1}),
    ("max_prompt_length=0", {"max_prompt_length": 0}),
    ("max_target_length=0", {"max_target_length": 0})])
def test_limits_that_leave_no_answer_are_refused(name, limits, make):
    with pytest.raises(InputError, match=name):
        make(**limits)


def test_without_a_limit_a_row_has_as_many_tokens_as_the_model_takes(make, tokenize):
    tokens = tokenize(row(PROMPT * 9, LONG, SHORT))
    assert len(tokens["chosen_input_ids"]) == 64  # GPT-2's positions
    with pytest.warns(UserWarning, match="max_length=100"):
        assert make(max_length=100).max_length == 64
    assert make("bart", max_length=100).max_length == 100  # its prompts have their own positions
    model = hf_model("llama", max_position_embeddings=2048)
    assert make(model).max_length == 512


def test_prompt_and_answer_are_tokenised_together_and_may_merge(make, tokenize):
    from tokenizers import Tokenizer, models, pre_tokenizers
    merges = [("a", "b"), ("c", "d"), ("ab", "cd"), ("e", "f")]
    pieces = ["<pad>", "a", "b", "c", "d", "e", "f", "ab", "cd", "abcd", "ef"]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")
    # enc("ef ab" + "cd") = ef abcd: two tokens merge across the boundary; both answers begin there
    tokens = tokenize(row("ef ab", "cd", "e"), tokenizer)
    assert tokens["prompt_input_ids"] == [10]
    assert tokens["chosen_input_ids"] == [10, 9] and tokens["rejected_input_ids"] == [10, 7, 5]
    assert tokens["chosen_labels"] == [-100, 9] and tokens["rejected_labels"] == [-100, 7, 5]
    # three merge: "efa" + "bcd"
    whole = make(rows=None, tokenizer=tokenizer).build_tokenized_answer("efa", "bcd")
    assert whole["prompt_input_ids"] == [10] and whole["input_ids"] == [9]


def test_build_tokenized_answer_joins_to_the_encoding_of_the_whole(make, tokenizer):
    tokens = make(rows=None).build_tokenized_answer("w4 w5", " w6 w7")
    whole = tokenizer("w4 w5 w6 w7", add_special_tokens=False).input_ids
    assert tokens["prompt_input_ids"] + tokens["input_ids"] == whole
    assert tokens == {"prompt_input_ids": [4, 5], "prompt_attention_mask": [1, 1],
                      "input_ids": [6, 7], "attention_mask": [1, 1]}


ASK, YES, NO = [user("w4 w5")], [assistant("w6")], [assistant("w7 w8")]
EARLIER, TURNS = [user("w4"), assistant("w5"), user("w6")], "<s> w10 w4 w11 w5 </s> w10 w6 w11"


@pytest.mark.parametrize("given, prompt, chosen, rejected", [
    (row(ASK, YES, NO), "<s> w10 w4 w5 w11", "w6 </s>", "w7 w8 </s>"),
    (row("w4 w5", YES, NO), "<s> w10 w4 w5 w11", "w6 </s>", "w7 w8 </s>"),
    (row(ASK, ASK + YES, ASK + NO), "<s> w10 w4 w5 w11", "w6 </s>", "w7 w8 </s>"),
    (row("w4 w5", ASK + YES, ASK + NO), "<s> w10 w4 w5 w11", "w6 </s>", "w7 w8 </s>"),
    (row(None, ASK + YES, ASK + NO), "<s> w10 w4 w5 w11", "w6 </s>", "w7 w8 </s>"),
    (row(None, EARLIER + YES, EARLIER + NO), TURNS, "w6 </s>", "w7 w8 </s>"),
    (row(EARLIER, YES, NO), TURNS, "w6 </s>", "w7 w8 </s>"),
    # one answer goes on where the other ends: the shorter keeps its last message
    (row(None, ASK + YES, ASK + YES + ASK + NO), "<s> w10 w4 w5 w11", "w6 </s>",
     "w6 </s> w10 w4 w5 w11 w7 w8 </s>")],
    ids=("messages", "text", "messages_in_both", "text_in_both", "no_prompt", "no_prompt_turns",
         "turns", "longer"))
def test_chats_go_through_the_template_once(given, prompt, chosen, rejected, tokenize,
                                            make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokens = tokenize(given, tokenizer)
    assert tokens["prompt_input_ids"] == ids(prompt)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        assert tokens[f"{name}_input_ids"] == ids(prompt) + ids(answer)
        assert tokens[f"{name}_labels"] == [-100] * len(ids(prompt)) + ids(answer)


# small templates with the habits of known ones: BOS and end token, special tokens, template
CHATS = {
    "llama3": ("<B>", "<|eot|>", ["<|start|>", "<|end|>"], (
        "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n"
        "{{ m['content'] | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}")),
    "chatml": (None, "<|im_end|>", ["<|im_start|>"], (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")),
    # earlier turns lose their thinking, the last one gets an empty thought if it has none
    "qwen3": (None, "<|im_end|>", ["<|im_start|>"], (
        "{% if tools %}<|im_start|>system\n{{ tools | length }} tools<|im_end|>\n{% endif %}"
        "{% for m in messages %}{% set parts = (m['content'] or '').split('</think>') %}"
        "<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
        "<think>\n{{ parts[0].split('<think>')[-1].strip() if parts | length > 1 }}\n</think>\n\n"
        "{% endif %}{{ parts[-1].strip() }}"
        "{% if m.tool_calls is defined %}{{ m.tool_calls | length }} calls{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")),
    "gemma": ("<B>", "<E>", ["<turn>", "</turn>"], (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('no system role') }}{% endif %}{% for m in messages %}"
        "<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ m['content'] | trim }}</turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<turn>model\n{% endif %}")),
    "phi3": ("<B>", "<E>", ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"))}
# what a conversation of user "a", assistant "yes" is
RENDERED = {
    "llama3": ("<B><|start|>user<|end|>\n\na<|eot|><|start|>assistant<|end|>\n\n", "{}<|eot|>"),
    "chatml": ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "{}<|im_end|>"),
    "qwen3": ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
              "<think>\n\n</think>\n\n{}<|im_end|>"),
    "gemma": ("<B><turn>user\na</turn>\n<turn>model\n", "{}</turn>"),
    "phi3": ("<|user|>\na<|end|>\n<|assistant|>\n", "{}<|end|>")}


def chat_tokenizer(name):
    """A tokenizer of bytes with the special tokens and the template of CHATS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.decoders import ByteLevel
    bos, eos, special, template = CHATS[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token="<|pad|>",
        additional_special_tokens=special)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def split_chat(make):
    """split_chat(template's name, row, all rows' Arrow types) -> texts of prompt, chosen, rejected.

    The ids are those of the whole texts, and the labels those of the answers."""
    def split(name, given, **limits):
        tokenizer = chat_tokenizer(name)
        model = hf_model("llama", max_position_embeddings=512, vocab_size=300)
        trainer = make(model, rows=None, tokenizer=tokenizer, **limits)
        tokens = trainer.tokenize_row(given)
        first = tokens["prompt_input_ids"]
        texts = [tokenizer.decode(first)]
        for answer in ANSWERS:
            whole, labels = tokens[f"{answer}_input_ids"], tokens[f"{answer}_labels"]
            text = tokenizer.decode(whole)
            assert whole == tokenizer(text, add_special_tokens=False).input_ids
            assert labels == [-100] * len(first) + whole[len(first):]
            texts.append(tokenizer.decode(whole[len(first):]))
        return texts

    return split


A, YES_A, NO_A = user("a"), assistant("yes"), assistant("no")


@pytest.mark.parametrize("given", [
    row("a", [YES_A], [NO_A]), row([A], [YES_A], [NO_A]), row("a", [A, YES_A], [A, NO_A]),
    row(None, [A, YES_A], [A, NO_A]), row("something else", [A, YES_A], [A, NO_A]),
    row([A], [{**A, "name": None}, YES_A], [{**A, "id": "7"}, NO_A]),
    row([{**A, "tool_calls": None}], [YES_A], [{**NO_A, "tool_calls": None}]),
    row(None, [A, {**YES_A, "tool_calls": None}], [A, NO_A])],
    ids=("text", "messages", "text_in_both", "implicit", "another_text", "stray_keys", "nulls",
         "nulls_in_one_column"))
@pytest.mark.parametrize("name", CHATS)
def test_a_chat_is_what_its_template_renders_split_where_the_answer_begins(name, given, split_chat):
    prompt, answer = RENDERED[name]
    assert split_chat(name, given) == [prompt, answer.format("yes"), answer.format("no")]


def test_a_trailing_blank_does_not_put_a_conversation_in_twice(split_chat):
    for name in ("llama3", "gemma"):  # the templates trim
        prompt, answer = RENDERED[name]
        for given in (row("a ", [A, YES_A], [A, NO_A]), row([user("a\n")], [A, YES_A], [A, NO_A]),
                      row(None, [user("a "), YES_A], [A, NO_A])):
            assert split_chat(name, given) == [prompt, answer.format("yes"), answer.format("no")]
    prompt, answer = RENDERED["chatml"]
    given = row(None, [user("a "), YES_A], [A, NO_A])  # one prompt for both
    want = [prompt.replace("a<", "a <"), answer.format("yes"), answer.format("no")]
    assert split_chat("chatml", given) == want


@pytest.mark.parametrize("name", ("llama3", "chatml", "phi3"))
def test_a_system_message_that_only_the_answers_have_stands_in_the_prompt_once(name, split_chat):
    talk = [{"role": "system", "content": "kind"}, A]
    tokenizer = chat_tokenizer(name)
    start = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    for prompt in ("a", [A], None):
        texts = split_chat(name, row(prompt, [*talk, YES_A], [*talk, NO_A]))
        answer = RENDERED[name][1]
        assert texts == [start, answer.format("yes"), answer.format("no")]


def test_the_last_user_turn_as_prompt_of_whole_conversations_is_not_added_to_them(split_chat):
    talk = [user("b"), assistant("c"), A]
    start = chat_tokenizer("chatml").apply_chat_template(
        talk, tokenize=False, add_generation_prompt=True)
    texts = split_chat("chatml", row("a", [*talk, YES_A], [*talk, NO_A]))
    assert texts == [start, "yes<|im_end|>", "no<|im_end|>"]


def test_thinking_of_earlier_turns_goes_and_that_of_the_answers_stays(split_chat):
    talk = [user("b"), assistant("<think>\nhm\n</think>\n\nc"), A]
    given = row(talk, [assistant("<think>\nso\n</think>\n\nyes")], [NO_A])
    with pytest.warns(UserWarning, match="chat_template.*thinking"):
        texts = split_chat("qwen3", given)
    assert texts == [
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
        "<think>\nso\n</think>\n\nyes<|im_end|>", "<think>\n\n</think>\n\nno<|im_end|>"]


def test_tools_and_calls_reach_the_template_and_calls_tell_messages_apart(split_chat):
    calls = [{"type": "function", "function": {"name": name, "arguments": {"x": "1"}}}
             for name in ("f", "g")]
    first, second = ({"role": "assistant", "content": "", "tool_calls": [call]} for call in calls)
    tool = {"type": "function", "function": {"name": "f", "description": "f", "parameters": {}}}
    result = {"role": "tool", "content": "2"}
    given = {"tools": [tool], **row([A], [first, result, YES_A], [second, result, NO_A])}
    prompt, chosen, rejected = split_chat("qwen3", given)
    assert prompt.startswith("<|im_start|>system\n1 tools<|im_end|>\n<|im_start|>user\na")
    assert prompt.endswith("<|im_start|>assistant\n")  # the calls differ: they are answers
    assert chosen.startswith("1 calls<|im_end|>") and chosen.endswith("yes<|im_end|>")
    assert rejected.startswith("1 calls<|im_end|>") and rejected.endswith("no<|im_end|>")


@pytest.mark.parametrize("chosen, rejected", [
    ([A], [A]), ([], [NO_A]), ([A, YES_A, user("b"), YES_A], [A, YES_A, user("c"), NO_A])],
    ids=("no_answer", "no_message", "two_questions"))
def test_answers_that_do_not_begin_with_the_assistant_are_refused(chosen, rejected, make):
    rows = [row(None, [A, YES_A], [A, NO_A]), row(None, chosen, rejected)]
    with pytest.raises(InputError, match=r"row 1: chosen, rejected: from message \d on"):
        make(hf_model("llama", vocab_size=300), rows=rows, tokenizer=chat_tokenizer("chatml"))


def test_a_template_that_refuses_a_chat_is_one_sentence_with_the_row(make):
    talk = [{"role": "system", "content": "kind"}, A]
    rows = [row([A], [YES_A], [NO_A]), row(talk, [YES_A], [NO_A])]
    with pytest.raises(InputError, match="row 1.*no system role"):
        make(hf_model("llama", vocab_size=300), rows=rows, tokenizer=chat_tokenizer("gemma"))


def test_pairs_that_differ_only_in_what_the_template_strips_are_equal(make, capsys):
    tokenizer = chat_tokenizer("qwen3")
    tokenizer.chat_template = tokenizer.chat_template.replace(" and loop.last", " and false")
    answers = [assistant(f"<think>{thought}</think>yes") for thought in ("so", "hm")]
    rows = [row([A], [YES_A], [NO_A]), row([A], *([answer] for answer in answers))]
    with pytest.warns(UserWarning, match="leaves thinking out"):
        trainer = make(hf_model("llama", vocab_size=300), rows=rows, tokenizer=tokenizer)
    said = capsys.readouterr().out
    assert "dropped 1 of 2 rows, row 1 the first: 0 with an empty prompt" in said
    assert len(trainer.train_dataset) == 1


def test_truncated_rows_are_counted_and_lose_the_end_not_the_generation_prompt(
        make, split_chat, capsys):
    prompt = RENDERED["chatml"][0]
    texts = split_chat("chatml", row("a" * 99, [assistant("y" * 99)], [NO_A]), max_length=60,
                       max_prompt_length=40)
    assert texts[0].endswith(prompt[-20:]) and texts[1] == "y" * 20
    assert texts[2] == "no<|im_end|>"
    make(max_length=6, max_prompt_length=5)
    assert ("train_dataset: truncated 4 of 6 rows, row 0 the first: longer than max_length=6 and "
            "max_prompt_length=5") in capsys.readouterr().out


def test_an_empty_prompt_is_bos_so_that_the_first_token_counts_and_samples_begin(
        make, make_tokenizer):
    for tokenizer, first in ((make_tokenizer(), BOS), (make_tokenizer(bos_token=None), EOS)):
        trainer = make(rows=[row("", "w4 w5", "w6")] * 2, tokenizer=tokenizer, max_length=8)
        assert trainer.train_dataset[0]["chosen_input_ids"] == [first, 4, 5, EOS]
        texts, _ = trainer.get_batch_samples(trainer.model, batch_of(trainer))
        assert len(texts) == 2 and any(texts)


def test_samples_of_a_chat_end_with_the_template_s_end_token(make):
    tokenizer = chat_tokenizer("phi3")  # <|end|> ends a turn, and is not EOS
    model = hf_model("llama", vocab_size=300, max_position_embeddings=512)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    trainer = make(model, rows=[row([A], [YES_A], [NO_A])] * 2, tokenizer=tokenizer, max_length=99)
    ids = batch_of(trainer)["prompt_input_ids"]
    with torch.no_grad():  # every answer is a line of <|end|>
        model.lm_head.weight.zero_()
        model.lm_head.weight[end] = 50 * model.model(ids[:1]).last_hidden_state[0, -1]
    answers = trainer.sample(trainer.model, batch_of(trainer))
    assert answers.tolist() == [[end], [end]]


def test_samples_keep_the_blank_between_prompt_and_answer(make):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    pieces = ["<pad>", "<s>", "</s>", "\u2581plot", "\u2581was", "\u2581bland"]
    core = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>",
                                        eos_token="</s>")
    model = hf_model("llama", vocab_size=6)
    trainer = make(model, rows=[row("plot was", " bland", " plot")], tokenizer=tokenizer,
                   max_length=4)
    with torch.no_grad():
        hidden = model.model(batch_of(trainer)["prompt_input_ids"]).last_hidden_state[0, -1]
        model.lm_head.weight.zero_()
        model.lm_head.weight[5] = 50 * hidden
    (text,), _ = trainer.get_batch_samples(trainer.model, batch_of(trainer))
    assert text.startswith("plot was bland")


def test_the_trainer_takes_chats_without_a_prompt_column(make, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = [{"chosen": [user("w4"), assistant("w6")], "rejected": [user("w4"), assistant("w7")]}]
    trainer = make(rows=rows, tokenizer=tokenizer)
    assert trainer.train_dataset[0]["chosen_labels"] == [-100] * 4 + ids("w6 </s>")


def test_a_row_of_an_encoder_decoder(make):
    trainer = make("t5", max_prompt_length=2, max_target_length=2)
    tokens = trainer.tokenize_row(row("w4 w5 w6", "w7 w8 w9", "w10"), model=trainer.model)
    assert tokens["prompt_input_ids"] == [4, 5] and tokens["prompt_attention_mask"] == [1, 1]
    assert tokens["chosen_labels"] == [7, 8] and tokens["rejected_labels"] == [10]
    assert tokens["chosen_decoder_input_ids"] == [PAD, 7]
    assert tokens["rejected_decoder_input_ids"] == [PAD]
    long = row(PROMPT, LONG, " ".join(f"w{4 + i % 90}" for i in range(200)))
    tokens = make("t5", max_length=5).tokenize_row(long)
    assert tokens["prompt_input_ids"] == ids(PROMPT)[:5]  # max_length holds without another limit
    assert tokens["chosen_labels"] == ids(LONG) and len(tokens["rejected_labels"]) == 128


def test_tokenised_rows_are_cached_whatever_the_reference_is(make, tmp_path):
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "rows"))
    caches = []
    for seed in (1, 2):
        rows = Dataset.load_from_disk(str(tmp_path / "rows"))
        make(ref_model=hf_model("gpt2", seed=seed), rows=None, train_dataset=rows)
        caches.append(len(list((tmp_path / "rows").glob("cache-*"))))
    assert caches[0] == caches[1] > 0


def test_rows_without_information_are_dropped_and_counted(make, capsys):
    same = row("w4", " w5", " w5")
    rows = [row("w4", "", " w5"), *ROWS, same, row("w4", " w5", ""), same]
    trainer = make(rows=rows)
    assert ("train_dataset: dropped 4 of 10 rows, row 0 the first: 2 with an empty prompt or "
            "answer, 2 with two equal answers") in capsys.readouterr().out
    kept = make().train_dataset
    assert trainer.train_dataset["chosen_labels"][:] == kept["chosen_labels"][:]
    with pytest.raises(InputError, match="train_dataset"):
        make(rows=rows[-2:])


def test_an_answer_to_an_empty_prompt_counts_behind_bos_or_eos(make, make_tokenizer):
    """Without a token before it nothing predicts an answer's first token."""
    rows = [row("", " w5", " w6"), *ROWS]
    for bos, first in ((None, EOS), ("<s>", BOS)):
        data = make(rows=rows, tokenizer=make_tokenizer(bos_token=bos)).train_dataset
        assert len(data) == 7 and data[0]["chosen_input_ids"] == [first, 5, EOS]


def test_unused_columns_go_and_what_the_caller_passed_in_stays_as_it_was(make_args, tokenizer):
    rows, args = Dataset.from_list([{**pair, "source": "x"} for pair in ROWS]), make_args()

    def state():
        return copy.deepcopy((args.to_dict(), tokenizer.pad_token, tokenizer.padding_side,
                              rows.column_names))

    before = state()
    trainer = DPOTrainer(hf_model("gpt2"), args=args, train_dataset=rows, tokenizer=tokenizer)
    assert "source" not in trainer.train_dataset.column_names
    trainer.train()
    assert state() == before
    args = make_args(remove_unused_columns=False)
    kept = DPOTrainer(hf_model("gpt2"), args=args, train_dataset=rows, tokenizer=tokenizer)
    assert {"source", "prompt"} <= set(kept.train_dataset.column_names)
    kept.train()
    assert losses(kept) == pytest.approx(losses(trainer))


def test_tokenised_rows_are_taken_as_they_are(make):
    tokenised = make().train_dataset
    trainer = make(rows=None, train_dataset=tokenised)
    assert trainer.train_dataset[:] == tokenised[:]


# -------------------------------------------------------- the forward passes
MODELS = {**{arch: (arch, {}) for arch in (*CAUSAL, *SEQ2SEQ)},
          "mistral_window_6": ("mistral", {"sliding_window": 6}),  # shorter than the rows
          "gpt2_eager": ("gpt2", {"attn_implementation": "eager"})}


def policy_and_reference(name):
    """Two models with their usual dropout, and the same two in eval mode."""
    arch, changes = MODELS[name]
    pair = [hf_model(arch, seed, **changes) for seed in (0, 1)]
    return pair, [copy.deepcopy(model).eval() for model in pair]


def forward(trainer, batch):
    """Log-probabilities of the chosen and the rejected answers under the policy [2, B]."""
    with torch.no_grad():
        return torch.stack(trainer.concatenated_forward(trainer.model, batch)[:2])


@pytest.mark.parametrize("rows", (ROWS, LONG_PROMPTS, LONG_ANSWERS),
                         ids=("mixed", "long_prompts", "long_answers"))
@pytest.mark.parametrize("name", MODELS)
def test_loss_metrics_and_gradients_equal_the_plain_model_on_one_answer_at_a_time(name, rows, make):
    models, plain_models = policy_and_reference(name)
    trainer = make(*models, rows=rows)
    batch = batch_of(trainer)
    policy, reference = (plain_logps(model, trainer) for model in plain_models)
    agree(forward(trainer, batch), policy, atol=2e-5)
    agree(torch.stack(trainer.compute_reference_log_probs(batch)), reference, atol=2e-5)

    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    loss.backward()
    rewards = 0.1 * (policy - reference.detach())
    want = -F.logsigmoid(rewards[0] - rewards[1]).mean()
    want.backward()
    agree(loss, want, atol=1e-5)
    means = {"rewards/chosen": rewards[0], "rewards/rejected": rewards[1],
             "rewards/margins": rewards[0] - rewards[1],
             "rewards/accuracies": (rewards[0] > rewards[1]).double(),
             "logps/chosen": policy[0], "logps/rejected": policy[1]}
    for answer in ANSWERS:
        logits = [plain(plain_models[0], tokens, answer)[1] for tokens in trainer.train_dataset]
        means[f"logits/{answer}"] = torch.stack(logits)
    assert set(metrics) == set(means)
    for key, values in means.items():
        agree(metrics[key], values.mean(), rtol=1e-5, atol=2e-5)
        assert not metrics[key].requires_grad, key  # else memory would grow with every step
    same_gradients(*({name: p.grad for name, p in model.named_parameters() if p.grad is not None}
                     for model in (trainer.model, plain_models[0])))
    eval_loss, eval_metrics = trainer.get_batch_loss_metrics(trainer.model, batch, "eval")
    agree(eval_loss, loss)
    assert set(eval_metrics) == {f"eval_{key}" for key in metrics}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_each_loss_of_a_batch_equals_its_formula_on_plain_log_probabilities(loss_type, make):
    beta, (models, plain_models) = 0.5, policy_and_reference("gpt2")
    trainer = make(*models, loss_type=loss_type, beta=beta)
    mean = loss_type == "ipo"
    policy, reference = (plain_logps(model, trainer, mean) for model in plain_models)
    ratios = policy - reference.detach()  # of the chosen and of the rejected
    h = ratios[0] - ratios[1]
    kl = ratios.mean(1).clamp(min=0)
    kto = [1 - torch.sigmoid(beta * (a - b)) for a, b in ((ratios[0], kl[1]), (kl[0], ratios[1]))]
    kto = (kto[0] + kto[1]) / 2
    want = {"sigmoid": -F.logsigmoid(beta * h), "hinge": (1 - beta * h).clamp(min=0),
            "ipo": (h - 1 / (2 * beta)) ** 2, "kto": kto, "kto_pair": kto}[loss_type].mean()
    want.backward()
    batch = batch_of(trainer)
    agree(forward(trainer, batch), policy, atol=2e-5)
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    loss.backward()
    agree(loss, want, rtol=1e-5, atol=2e-5)
    agree(metrics["logps/chosen"], policy[0].mean(), rtol=1e-5, atol=2e-5)
    agree(metrics["rewards/rejected"], beta * ratios[1].mean(), rtol=1e-5, atol=2e-5)
    same_gradients(*({name: p.grad for name, p in model.named_parameters()}
                     for model in (trainer.model, plain_models[0])))


def wider(batch, n, side="right", fill=PAD):
    """The batch with n columns more of padding."""
    fills = {"ids": fill, "mask": 0, "labels": -100}
    pad = (0, n) if side == "right" else (n, 0)
    wide = {key: F.pad(value, pad, value=fills[key.split("_")[-1]]) for key, value in batch.items()}
    return {key: batch[key] if key.startswith("prompt") else value for key, value in wide.items()}


@pytest.mark.parametrize("arch", ("gpt2", "llama", "t5"))
def test_padding_changes_no_number_on_either_side_with_any_token(arch, make):
    trainer = make(arch, hf_model(arch, seed=1))
    batch = batch_of(trainer)
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    others = [wider(batch, 20), wider(batch, 5, fill=EOS)]
    if arch != "t5":  # the labels of an encoder-decoder begin at its first place
        others += [wider(batch, 7, "left"), wider(wider(batch, 3, "left", fill=EOS), 2)]
    for other in others:
        other_loss, other_metrics = trainer.get_batch_loss_metrics(trainer.model, other)
        agree(other_loss, loss, atol=1e-5)
        agree(list(other_metrics.values()), list(metrics.values()), atol=1e-4)


def test_equal_rewards_do_not_count_as_right(make):
    model = hf_model("gpt2")
    with torch.no_grad():  # every logit is exactly 0
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.zero_()
    trainer = make(model, reference_free=True, rows=[ROWS[3]] * 2, eval_rows=[ROWS[3]] * 2)
    logged = trainer.evaluate()
    assert logged["eval_rewards/margins"] == logged["eval_rewards/accuracies"] == 0
    assert logged["eval_logps/chosen"] == pytest.approx(-3 * math.log(VOCAB), rel=1e-6)


def test_a_token_within_the_answer_that_has_no_label_does_not_count(make):
    trainer = make("gpt2", hf_model("gpt2", seed=1), loss_type="ipo")
    rows = [{**tokens} for tokens in trainer.train_dataset]
    rows[0]["chosen_labels"][-2] = -100
    trainer.train_dataset = Dataset.from_list(rows)
    _, metrics = trainer.get_batch_loss_metrics(trainer.model, batch_of(trainer))
    want = plain_logps(trainer.model, trainer, mean=True)
    agree(metrics["logps/chosen"], want[0].mean(), atol=2e-5)


@pytest.mark.parametrize("arch", ("gpt2", "t5"))
def test_another_label_pad_token_changes_no_number(arch, make):
    metrics = []
    for pad in (-100, -50):
        trainer = make(arch, hf_model(arch, seed=1), label_pad_token_id=pad)
        batch = batch_of(trainer)
        assert (batch["chosen_labels"] == pad).any()
        metrics.append(trainer.get_batch_loss_metrics(trainer.model, batch)[1])
        agree(forward(trainer, batch)[0].mean(), metrics[0]["logps/chosen"])
    agree(list(metrics[0].values()), list(metrics[1].values()))


def test_ids_are_padded_with_the_pad_token_of_the_tokenizer(make, make_tokenizer):
    trainer = make(tokenizer=make_tokenizer(pad_token="w99"))
    assert batch_of(trainer)["chosen_input_ids"].max() == 99 and trainer.padding_value == 99
    assert batch_of(make(padding_value=7))["chosen_input_ids"].min() == 1


def test_a_batch_that_begins_with_an_empty_prompt_holds_whole_numbers():
    rows = [{"prompt_input_ids": [], "prompt_attention_mask": []},
            {"prompt_input_ids": [5], "prompt_attention_mask": [1]}]
    assert DPODataCollatorWithPadding(0)(rows)["prompt_input_ids"].dtype == torch.long


def test_a_mixture_of_experts_adds_its_balancing_loss(make):
    from transformers import MixtralConfig, MixtralForCausalLM
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=32, pad_token_id=PAD,
                           num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                           num_local_experts=2, num_experts_per_tok=1, output_router_logits=True,
                           router_aux_loss_coef=0.5)
    trainer = make(MixtralForCausalLM(config))
    batch = batch_of(trainer)
    both = trainer.concatenated_inputs(batch)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = both["concatenated_input_ids"], both["concatenated_attention_mask"]
        balance = trainer.model(*inputs).aux_loss
        loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    assert balance > 0.5
    agree(loss, LN2 + 0.5 * balance, atol=1e-5)


def test_a_subclass_may_replace_the_forward_pass(make_args, tokenizer):
    class Halved(DPOTrainer):
        def concatenated_forward(self, *args, **kwargs):
            chosen, rejected, *rest = super().concatenated_forward(*args, **kwargs)
            return chosen / 2, rejected, *rest

    metrics = []
    for kind in (DPOTrainer, Halved):
        trainer = kind(hf_model("gpt2"), hf_model("gpt2", seed=1), args=make_args(),
                       tokenizer=tokenizer, train_dataset=Dataset.from_list(ROWS))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            metrics.append(trainer.get_batch_loss_metrics(trainer.model, batch_of(trainer))[1])
    agree(metrics[1]["logps/chosen"], metrics[0]["logps/chosen"] / 2)
    agree(metrics[1]["rewards/chosen"], metrics[0]["rewards/chosen"] / 2)  # of the reference too
    agree(metrics[1]["logps/rejected"], metrics[0]["logps/rejected"])


class TokenizesRows(DPOTrainer):
    def tokenize_row(self, feature, model=None):  # the worse answer is the better one
        feature = {**feature, "chosen": feature["rejected"], "rejected": feature["chosen"]}
        return super().tokenize_row(feature, model)


class TokenizesAnswers(DPOTrainer):
    def build_tokenized_answer(self, prompt, answer):  # by itself, backwards
        ids = [self.tokenizer(text, add_special_tokens=False).input_ids
               for text in (prompt, answer)]
        return {"prompt_input_ids": ids[0], "prompt_attention_mask": [1] * len(ids[0]),
                "input_ids": ids[1][::-1], "attention_mask": [1] * len(ids[1])}


class ComputesLoss(DPOTrainer):
    def get_batch_loss_metrics(self, model, batch, train_eval="train"):  # as in TRL 0.7.10
        chosen, rejected, chosen_logits, _ = self.concatenated_forward(model, batch)
        with torch.no_grad():
            reference = self.concatenated_forward(self.ref_model, batch)[:2]
        losses, chosen_rewards, _ = self.dpo_loss(chosen, rejected, *reference)
        metrics = {f"rewards/{side}": chosen_rewards.mean().cpu() for side in ANSWERS}
        metrics.update({f"logps/{side}": chosen.detach().mean() for side in ANSWERS})
        return 2 * losses.mean(), {**metrics, "mine": 7.0}


class ReadsLogits(DPOTrainer):
    @staticmethod
    def get_batch_logps(*args, **kwargs):
        return 2 * DPOTrainer.get_batch_logps(*args, **kwargs)


def test_what_a_subclass_replaces_is_what_is_trained(make_args, tokenizer):
    def train(kind):
        trainer = kind(hf_model("gpt2"), args=make_args(max_steps=1), tokenizer=tokenizer,
                       train_dataset=Dataset.from_list(ROWS))
        trainer.train()
        answers = [[token for token in labels if token != -100]
                   for labels in trainer.train_dataset["chosen_labels"]]
        return lines(trainer)[0], answers

    plain, answers = train(DPOTrainer)
    swapped, swapped_answers = train(TokenizesRows)
    assert swapped_answers[0] == [9, 10, 11, EOS] and answers[0] == [7, 8, EOS]
    agree(swapped["logps/chosen"], plain["logps/rejected"])
    assert train(TokenizesAnswers)[1][:2] == [[8, 7, EOS], [16, 15, 14, 13, EOS]]
    own = train(ComputesLoss)[0]
    assert own["loss"] == pytest.approx(2 * LN2, abs=1e-4) and own["mine"] == 7
    doubled = train(ReadsLogits)[0]
    agree(doubled["logps/chosen"], 2 * plain["logps/chosen"])


# -------------------------------------------------------- the reference
@pytest.mark.parametrize("arch", (*CAUSAL, *SEQ2SEQ))
def test_the_first_loss_is_ln_2_with_dropout_everywhere(arch, make):
    task = "SEQ_2_SEQ_LM" if arch in SEQ2SEQ else "CAUSAL_LM"
    adapter = lora(lora_dropout=0.3, task_type=task, fan_in_fan_out=arch == "gpt2")
    for extra in ({}, {"peft_config": adapter}):
        trainer = make(arch, **extra)
        assert trainer.model.training
        loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch_of(trainer))
        assert loss.item() == pytest.approx(LN2, abs=1e-5), extra


def test_dropout_that_is_left_on_acts_on_the_policy_and_never_on_the_reference(make):
    for arguments in ({"peft_config": lora(lora_dropout=0.5, init_lora_weights=False)},
                      {"ref_model": hf_model("llama", seed=1)}, {}):
        trainer = make("llama", disable_dropout=False, **arguments)
        batch = batch_of(trainer)
        trainer.model.train()
        once, again = (trainer.compute_reference_log_probs(batch) for _ in range(2))
        assert trainer.model.training and torch.equal(once[0], again[0])
        once, again = (trainer.get_batch_loss_metrics(trainer.model, batch)[1] for _ in range(2))
        assert not torch.equal(once["logps/chosen"], again["logps/chosen"])
        # minus the reference's log-probability, both times
        agree(*(row["rewards/chosen"] / 0.1 - row["logps/chosen"] for row in (once, again)))


REFERENCES = {
    "copy of the policy": lambda: {"model": hf_model("gpt2")},
    "another model": lambda: {"model": hf_model("gpt2"), "ref_model": hf_model("gpt2", seed=1)},
    "base of a fresh adapter": lambda: {"model": hf_model("gpt2"), "peft_config": gpt2_lora()},
    "trained adapter as it was": lambda: {"model": trained_lora()},
    "trained adapter, merged": lambda: {"model": trained_lora(), "peft_config": gpt2_lora()},
    "another model and a fresh adapter": lambda: {
        "model": hf_model("gpt2"), "ref_model": hf_model("gpt2", seed=1),
        "peft_config": gpt2_lora()},
    "adapter by name": lambda: {"model": two_adapters(), "model_adapter_name": "policy",
                                "ref_adapter_name": "reference"}}


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.filterwarnings("ignore:peft_config.*merged")
def test_training_moves_the_policy_and_not_the_reference(kind, make):
    given = REFERENCES[kind]()
    if kind == "adapter by name":
        given["model"].set_adapter("reference")
        plain_reference = copy.deepcopy(given["model"])
        given["model"].set_adapter("reference")  # the policy's trains whichever was active
    else:
        plain_reference = copy.deepcopy(given.get("ref_model", given["model"]))
    trainer = make(**given, args={"max_steps": 3})
    if kind == "adapter by name":
        trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
        assert trained and all(".policy." in name for name in trained)
    batch, before = batch_of(trainer), weights_of(trainer.model)
    want = plain_logps(plain_reference, trainer).detach()
    agree(torch.stack(trainer.compute_reference_log_probs(batch)), want, atol=2e-5)
    trainer.train()
    agree(torch.stack(trainer.compute_reference_log_probs(batch)), want, atol=2e-5)

    policy = forward(trainer, batch)
    assert (policy - want).abs().max() > 0.1
    agree(policy, plain_logps(trainer.model, trainer), atol=2e-5)  # it is the policy again
    names = moved(before, trainer.model)
    part = ".policy." if kind == "adapter by name" else "lora_" if "adapter" in kind else ""
    trains = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert names and names <= trains and all(part in name for name in trains)
    if kind != "adapter by name" and not kind.startswith("another model"):
        assert losses(trainer)[0] == pytest.approx(LN2, abs=1e-5)


def test_a_merged_adapter_is_to_be_saved_by_the_user(make):
    with pytest.warns(UserWarning, match="peft_config.*merged.*save"):
        make(trained_lora(), peft_config=gpt2_lora())


def test_models_by_name(make_args, tokenizer, tmp_path):
    hf_model("gpt2", seed=5).save_pretrained(tmp_path)
    trainer = DPOTrainer(str(tmp_path), str(tmp_path), args=make_args(), tokenizer=tokenizer,
                         train_dataset=Dataset.from_list(ROWS),
                         model_init_kwargs={"dtype": "bfloat16"},
                         ref_model_init_kwargs={"dtype": "float16"})
    hf_model("gpt2").half().save_pretrained(tmp_path / "half")
    plain = DPOTrainer(str(tmp_path / "half"), args=make_args(), tokenizer=tokenizer)
    assert plain.model.dtype == plain.ref_model.dtype == torch.float32
    assert trainer.model.dtype == torch.bfloat16 and trainer.ref_model.dtype == torch.float16
    agree(trainer.ref_model.lm_head.weight, hf_model("gpt2", seed=5).lm_head.weight, atol=1e-3)


@pytest.mark.parametrize("kind", ("trained adapter as it was", "adapter by name",
                                  "copy of the policy"))
def test_null_ref_context_gives_the_policy_back_when_something_fails(kind, make):
    trainer = make(**REFERENCES[kind]())
    trainer.train()
    before, batch = weights_of(trainer.model), batch_of(trainer)
    policy = forward(trainer, batch)
    with pytest.raises(ZeroDivisionError), trainer.null_ref_context():
        reference = forward(trainer, batch)
        raise ZeroDivisionError
    agree(forward(trainer, batch), policy)
    assert not moved(before, trainer.model)
    if kind != "copy of the policy":  # there the policy is all that there is
        agree(reference, torch.stack(trainer.compute_reference_log_probs(batch)))
        assert (reference - policy).abs().max() > 1e-3


def test_reference_free_runs_none(make):
    model = hf_model("gpt2")
    trainer = make(copy.deepcopy(model), reference_free=True, precompute_ref_log_probs=True)
    assert trainer.ref_model is None
    assert not COLUMNS & set(trainer.train_dataset.column_names)
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch_of(trainer))
    logps = plain_logps(model, trainer).detach()
    agree(loss, -F.logsigmoid(0.1 * (logps[0] - logps[1])).mean(), atol=1e-5)
    agree(metrics["rewards/chosen"], 0.1 * logps[0].mean(), atol=1e-5)


# -------------------------------------------------------- DeepSpeed, which is not installed here
@pytest.fixture
def zero():
    """zero(stage): from now on the process is configured for this stage of ZeRO."""
    configs = []

    def configure(stage):
        configs.append(HfDeepSpeedConfig({"zero_optimization": {"stage": stage}}))
        set_hf_deepspeed_config(configs[-1])

    yield configure
    unset_hf_deepspeed_config()


class Engine(torch.nn.Module):
    """What deepspeed.initialize returns first: a model in training mode."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def eval(self):
        self.train(False)  # DeepSpeed's returns nothing, too


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("stage, shards", [(2, 0), (3, 3)])
def test_deepspeed_is_asked_for_a_reference_in_the_policy_s_precision_and_shards(
        stage, shards, precision, zero, monkeypatch):
    given = []

    def initialize(model, config):
        given.append(config)
        return Engine(model), None, None, None

    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(initialize=initialize))
    zero(stage)
    accelerator = types.SimpleNamespace(distributed_type=DistributedType.DEEPSPEED,
                                        mixed_precision=precision)
    reference = machinery.prepare_reference(accelerator, hf_model("gpt2").train())
    assert isinstance(reference, Engine) and not reference.module.training
    assert not any(weights.requires_grad for weights in reference.parameters())
    config, = given
    assert config["zero_optimization"] == {"stage": shards}
    kinds = ("bf16", "fp16")
    assert [config[kind]["enabled"] for kind in kinds] == [precision == kind for kind in kinds]


def test_under_zero_3_a_policy_that_can_be_neither_copied_nor_run_is_refused(make, zero):
    zero(3)
    with pytest.raises(InputError, match="^ref_model=None: under ZeRO-3 a model can't be copied"):
        make()
    for policy in (hf_model("gpt2"), trained_lora()):
        with pytest.raises(InputError, match="^precompute_ref_log_probs=True: under ZeRO-3"):
            make(policy, precompute_ref_log_probs=True)


# -------------------------------------------------------- precomputed log-probabilities
def test_precomputed_log_probabilities_are_those_of_the_reference_for_every_set(make):
    runs = []
    for early in (False, True):
        reference = hf_model("gpt2", seed=1)
        sets = {"near": Dataset.from_list(ROWS[:3]), "far": Dataset.from_list(ROWS[3:])}
        trainer = make("gpt2", reference, eval_dataset=sets, precompute_ref_log_probs=early,
                       args={"max_steps": 3, "per_device_eval_batch_size": 4, **SGD})
        if early:  # before the first step, and each row has its own
            rows = trainer.train_dataset
            got = [rows[f"reference_{name}_logps"][:] for name in ANSWERS]
            agree(got, plain_logps(reference, trainer), atol=2e-5)
            assert all(COLUMNS <= set(rows.column_names) for rows in trainer.eval_dataset.values())
        trainer.train()
        runs.append((losses(trainer), trainer.evaluate()))
    agree(runs[1][0], runs[0][0], rtol=1e-5, atol=1e-5)
    for name in ("eval_near_rewards/margins", "eval_far_loss", "eval_far_rewards/chosen"):
        assert runs[1][1][name] == pytest.approx(runs[0][1][name], abs=1e-5)


@pytest.mark.parametrize("kind", ("copy of the policy", "trained adapter as it was"))
def test_without_a_reference_model_the_policy_before_the_first_step_is_precomputed(kind, make):
    metrics = []
    for early in (False, True):
        trainer = make(**REFERENCES[kind](), eval_rows=ROWS[:4], precompute_ref_log_probs=early,
                       args={"max_steps": 3, **SGD})
        assert not early or trainer.ref_model is None  # no second model is held
        trainer.train()
        metrics.append((losses(trainer), trainer.evaluate()))
    agree(metrics[1][0], metrics[0][0], atol=1e-5)
    margin = metrics[0][1]["eval_rewards/margins"]
    assert abs(margin) > 0.005
    assert metrics[1][1]["eval_rewards/margins"] == pytest.approx(margin, abs=1e-5)


def test_another_set_after_training_needs_a_reference_that_is_still_there(make):
    other = Dataset.from_list(ROWS[4:])
    trainer = make(eval_rows=ROWS[:4], precompute_ref_log_probs=True)
    trainer.train()
    with pytest.raises(InputError, match="ref_model"):
        trainer.evaluate(other)
    for kind in ("another model", "trained adapter as it was"):
        margins = []
        for early in (True, False):
            trainer = make(**REFERENCES[kind](), eval_rows=ROWS[:4], args=SGD,
                           precompute_ref_log_probs=early)
            trainer.train()
            margins.append(trainer.evaluate(other)["eval_rewards/margins"])
            assert len(trainer.eval_dataset) == 4  # the trainer keeps its own set
        assert margins[0] == pytest.approx(margins[1], abs=1e-5)


def test_precomputed_rows_can_be_saved_and_used_again(make, tmp_path):
    first = make("gpt2", hf_model("gpt2", seed=1), precompute_ref_log_probs=True, args=SGD)
    first.train_dataset.save_to_disk(str(tmp_path / "rows"))
    first.train()
    rows = Dataset.load_from_disk(str(tmp_path / "rows"))
    trainer = make("gpt2", rows=None, train_dataset=rows, precompute_ref_log_probs=True, args=SGD)
    trainer.train()
    agree(losses(trainer), losses(first))
    assert losses(trainer)[0] != pytest.approx(LN2, abs=1e-3)


# -------------------------------------------------------- training
def test_accumulated_micro_batches_are_one_big_batch(make):
    ends = []
    for size, steps in ((5, 1), (2, 3)):  # 2 + 2 + 1 pairs
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps,
                "max_steps": 1, **SGD}
        trainer = make("llama", hf_model("llama", seed=1), rows=ROWS[:5], args=args)
        trainer.train()
        ends.append((weights_of(trainer.model), trainer.state.log_history[0]))
    for name, weight in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][name], weight, rtol=1e-4, atol=1e-6)
    for name in ("loss", "rewards/margins", "logps/chosen", "logits/rejected", "grad_norm"):
        assert ends[0][1][name] == pytest.approx(ends[1][1][name], rel=1e-4, abs=1e-6)


def test_one_step_of_sgd_goes_down_the_plain_gradient(make):
    models, plain_models = policy_and_reference("gpt2")
    args = {"max_steps": 1, "per_device_train_batch_size": 6, "max_grad_norm": 0, **SGD}
    trainer = make(*models, args=args)
    policy, reference = (plain_logps(model, trainer) for model in plain_models)
    rewards = 0.1 * (policy - reference.detach())
    (-F.logsigmoid(rewards[0] - rewards[1])).mean().backward()
    before = weights_of(trainer.model)
    trainer.train()
    steps = {name: (before[name] - p) / 0.5 for name, p in trainer.model.named_parameters()}
    same_gradients(steps, {name: p.grad for name, p in plain_models[0].named_parameters()})


def test_metrics_weigh_every_pair_alike_in_training_evaluation_and_prediction(make):
    trainer = make("gpt2", hf_model("gpt2", seed=1), rows=ROWS[:3], eval_rows=ROWS[:3],
                   compute_metrics=lambda prediction: {},
                   args={"max_steps": 2, "logging_steps": 2, "learning_rate": 0.0,
                         "per_device_eval_batch_size": 2})
    models = trainer.model, trainer.ref_model
    policy, reference = (plain_logps(model, trainer).detach() for model in models)
    rewards = 0.1 * (policy - reference)
    margins = rewards[0] - rewards[1]
    pair_losses = -F.logsigmoid(margins)
    want = {"rewards/margins": margins, "rewards/chosen": rewards[0], "logps/chosen": policy[0],
            "rewards/accuracies": (margins > 0).double(), "logps/rejected": policy[1]}
    trainer.train()
    (line,) = lines(trainer)
    two_steps = pair_losses[:2].mean() + pair_losses[2]
    assert line["loss"] == pytest.approx(two_steps.item() / 2, abs=1e-5)
    for name, values in want.items():
        assert line[name] == pytest.approx(values.mean().item(), abs=2e-5), name
    for logged in (trainer.evaluate(), trainer.evaluate()):
        for name, values in {**want, "loss": pair_losses}.items():
            assert logged[f"eval_{name}"] == pytest.approx(values.mean().item(), abs=2e-5), name
    logged = trainer.predict(Dataset.from_list(ROWS[:3]))  # raw rows, prepared as those of evaluate
    agree(logged.predictions, rewards.T, atol=1e-5)
    assert logged.label_ids.tolist() == [0, 0, 0]  # the place of the chosen answer
    assert logged.metrics["test_loss"] == pytest.approx(pair_losses.mean().item(), abs=1e-5)
    assert logged.metrics["test_rewards/margins"] == pytest.approx(margins.mean().item(), abs=1e-5)


def test_an_evaluation_between_two_log_lines_changes_neither(make):
    history = []
    for evaluates in ("no", "steps"):
        trainer = make("gpt2", hf_model("gpt2", seed=1), eval_rows=LONG_PROMPTS,
                       args={"max_steps": 4, "logging_steps": 2, "eval_strategy": evaluates,
                             "eval_steps": 1, **SGD})
        trainer.train()
        history.append(lines(trainer))
    assert len(history[0]) == 2 and history[0][0].keys() == history[1][0].keys()
    for without, between in zip(*history, strict=True):
        for key, value in without.items():
            assert between[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def test_training_metrics_are_those_of_the_steps_since_the_last_line(make):
    every, second = [], []
    for steps, logged in ((1, every), (2, second)):
        args = {"max_steps": 4, "logging_steps": steps, **SGD}
        trainer = make("gpt2", hf_model("gpt2", seed=1), args=args)
        trainer.train()
        logged += lines(trainer)
    for i, line in enumerate(second):
        for name in ("loss", "rewards/margins", "logps/rejected", "logits/chosen"):
            mean = (every[2 * i][name] + every[2 * i + 1][name]) / 2
            assert line[name] == pytest.approx(mean, rel=1e-4, abs=1e-6), name


def test_lora_with_activation_checkpointing_trains_to_the_same_weights(make):
    ends = []
    for checkpointing in (False, True):
        args = {"activation_checkpointing": checkpointing, "max_steps": 3, **SGD}
        trainer = make("llama", peft_config=lora(), args=args)
        before = weights_of(trainer.model)
        trainer.train()
        names = moved(before, trainer.model)
        assert names and all("lora_" in name for name in names)
        ends.append(losses(trainer))
    agree(*ends, atol=1e-5)
    assert ends[0][-1] != pytest.approx(LN2, abs=1e-4)


def test_bfloat16_begins_at_ln_2_and_learns(make):
    trainer = make("llama", args={"bf16": True, "max_steps": 12, "per_device_train_batch_size": 6})
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(LN2, abs=1e-6) and losses(trainer)[-1] < 0.2
    trainer = make(hf_model("llama").bfloat16(), args={"max_steps": 1})
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(LN2, abs=1e-6)


@pytest.mark.parametrize("early", (False, True), ids=("", "precomputed"))
def test_every_pass_has_the_precision_asked_for(early, make):
    models, seen = {"policy": hf_model("llama"), "reference": hf_model("llama", seed=1)}, set()
    for name, model in models.items():
        def note(*args, name=name):
            enabled = torch.is_autocast_enabled("cpu")
            seen.add((name, torch.get_autocast_dtype("cpu") if enabled else None))
        model.get_decoder().layers[0].register_forward_pre_hook(note)
    trainer = make(*models.values(), eval_rows=ROWS[:2], precompute_ref_log_probs=early,
                   generate_during_eval=True, max_length=10, args={"bf16": True, "max_steps": 1})
    trainer.evaluate()  # before training, when Trainer has not wrapped the model yet
    trainer.train()
    assert seen == {("policy", torch.bfloat16), ("reference", torch.bfloat16)}


@pytest.mark.parametrize("arch", ("llama", "t5"))
def test_a_model_learns_six_pairs(arch, make):
    trainer = make(arch, eval_rows=ROWS, args={"max_steps": 15, "per_device_train_batch_size": 6})
    trainer.train()
    assert trainer.evaluate()["eval_rewards/accuracies"] == 1.0


@pytest.mark.parametrize("kind, early", [
    ("copy of the policy", False), ("copy of the policy", True),
    ("trained adapter as it was", False)])
def test_a_run_resumed_from_a_checkpoint_ends_with_the_same_losses_and_weights(kind, early, make):
    # a larger epsilon: Adam else turns a gradient of rounding noise into a whole step
    args = {"max_steps": 4, "adam_epsilon": 1e-5}
    whole = make(**REFERENCES[kind](), args={**args, "save_strategy": "steps", "save_steps": 2},
                 precompute_ref_log_probs=early)
    whole.train()
    rest = make(**REFERENCES[kind](), args=args, precompute_ref_log_probs=early)
    rest.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    agree(losses(rest), losses(whole), rtol=0, atol=1e-6)
    for a, b in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("init", (lambda: hf_model("gpt2", seed=4),
                                  lambda trial: hf_model("gpt2", seed=4)), ids=("", "trial"))
def test_model_init_makes_the_model_and_its_reference(init, make):
    direct = make(hf_model("gpt2", seed=4))
    direct.train()
    trainer = make(None, model_init=init)
    trainer.train()
    agree(losses(trainer), losses(direct), atol=1e-5)
    assert losses(trainer)[0] == pytest.approx(LN2, abs=1e-5)


def copier(model):
    """A function without arguments that returns a copy of the model."""
    return lambda: copy.deepcopy(model)


def test_adapters_with_model_init_train_against_themselves_as_they_were(make):
    """Trainer makes the model again for each run: the reference belongs to the one that trains."""
    args = {"max_steps": 3, "per_device_train_batch_size": 6}
    for model, adapter in ((trained_lora(), None), (hf_model("gpt2"), gpt2_lora())):
        logged = []
        for init in (None, copier(model)):
            given = None if init else copy.deepcopy(model)
            trainer = make(given, model_init=init, peft_config=adapter, args=args)
            before = weights_of(trainer.model)
            trainer.train()
            assert all("lora_" in name for name in moved(before, trainer.model))
            logged.append(losses(trainer))
        assert logged[0] == pytest.approx(logged[1], abs=1e-5)
        assert logged[0][0] == pytest.approx(LN2, abs=1e-6) and logged[0][2] < LN2 - 1e-3


def test_the_defaults_of_the_signature_can_be_used(tokenizer, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    rows = Dataset.from_list(ROWS)
    trainer = DPOTrainer(hf_model("gpt2"), train_dataset=rows, processing_class=tokenizer)
    assert trainer.tokenizer is trainer.processing_class is tokenizer


def test_equal_seeds_draw_equal_adapters(make):
    drawn = []
    for noise, seed in ((1, 5), (2, 5), (2, 6)):
        model = hf_model("llama")
        torch.manual_seed(noise)
        trainer = make(model, peft_config=lora(), args={"seed": seed})
        drawn.append(next(p for name, p in trainer.model.named_parameters() if "lora_A" in name))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_a_loss_that_is_not_a_number_stops_the_run_before_a_weight_moves(make):
    trainer = make()
    with torch.no_grad():
        trainer.model.transformer.wte.weight[7] = math.nan
    before = weights_of(trainer.model)
    with pytest.raises(InputError, match="loss.*nan"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    assert moved(before, trainer.model) <= {"transformer.wte.weight"}


# -------------------------------------------------------- the config
def own_config(folder, **fields):
    """A DPOConfig of the small runs, on rows in their order."""
    return DPOConfig(**{
        "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": 2,
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False, **fields})


def test_a_config_alone_trains_and_stays_as_it_was(tokenizer, tmp_path):
    args, rows = own_config(tmp_path), Dataset.from_list(ROWS)
    before = args.to_dict()
    trainer = DPOTrainer(hf_model("gpt2"), args=args, train_dataset=rows, tokenizer=tokenizer)
    trainer.train()
    assert args.to_dict() == before and args.learning_rate is None
    assert trainer.args.eval_strategy == "no" and trainer.beta == 0.1
    weights = sum(p.numel() for p in trainer.model.parameters())
    assert trainer.args.learning_rate == pytest.approx(5e-4 * math.sqrt(1e5 / weights))
    assert losses(trainer)[0] == pytest.approx(LN2, abs=1e-5)


def test_the_fields_of_a_config_are_the_arguments_of_the_trainer(make, tokenizer, tmp_path):
    hf_model("gpt2", seed=1).save_pretrained(tmp_path / "reference")
    arguments = {"beta": 0.7, "loss_type": "ipo", "max_length": 12, "max_prompt_length": 4,
                 "truncation_mode": "keep_start"}
    logged = []
    for fields, given in ((arguments, {}), ({}, arguments), (arguments, arguments)):
        args = own_config(tmp_path, learning_rate=1e-2, **fields,
                          ref_model_name=str(tmp_path / "reference"))
        trainer = DPOTrainer(hf_model("gpt2"), args=args, tokenizer=tokenizer, **given,
                             train_dataset=Dataset.from_list(LONG_PROMPTS))
        trainer.train()
        logged.append(losses(trainer))
    direct = make("gpt2", hf_model("gpt2", seed=1), rows=LONG_PROMPTS, **arguments)
    direct.train()
    for other in logged:
        agree(other, losses(direct))


def test_the_config_holds_the_trainer_s_arguments_as_in_later_trl(tokenizer, tmp_path):
    hf_model("gpt2").save_pretrained(tmp_path / "model")
    kwargs = {"dtype": "bfloat16"}
    fields = {"disable_dropout": False, "is_encoder_decoder": False, "label_pad_token_id": -7,
              "padding_value": 5}
    args = own_config(tmp_path, model_init_kwargs=kwargs, ref_model_init_kwargs=kwargs, **fields)
    trainer = DPOTrainer(str(tmp_path / "model"), str(tmp_path / "model"), args=args,
                         processing_class=tokenizer, train_dataset=Dataset.from_list(ROWS))
    assert trainer.model.dtype == trainer.ref_model.dtype == torch.bfloat16
    assert {name: getattr(trainer, name) for name in fields} == fields
    batch = batch_of(trainer)
    assert (batch["chosen_labels"] == -7).any() and (batch["chosen_input_ids"] == 5).any()
    args = own_config(tmp_path, model_adapter_name="policy", ref_adapter_name="reference",
                      report_to=None)
    trainer = DPOTrainer(two_adapters(), args=args, processing_class=tokenizer,
                         train_dataset=Dataset.from_list(ROWS))
    assert trainer.model.active_adapter == "policy" and trainer.reference_adapter == "reference"


def test_an_argument_wins_over_a_field_that_is_not_set_and_two_that_disagree_are_refused(
        tokenizer, tmp_path):
    args = own_config(tmp_path, loss_type="ipo")
    given = {"args": args, "tokenizer": tokenizer}
    trainer = DPOTrainer(hf_model("gpt2"), beta=0.5, **given)
    assert (trainer.beta, trainer.loss_type) == (0.5, "ipo")
    with pytest.raises(InputError, match="loss_type='hinge'.*loss_type='ipo'"):
        DPOTrainer(hf_model("gpt2"), loss_type="hinge", **given)


def test_lora_r_in_a_config_puts_an_adapter_on_the_policy(tokenizer, tmp_path):
    trainer = DPOTrainer(hf_model("llama"), args=own_config(tmp_path, lora_r=4),
                         tokenizer=tokenizer, train_dataset=Dataset.from_list(ROWS))
    before = weights_of(trainer.model)
    trainer.train()
    names = moved(before, trainer.model)
    assert names and all("lora_" in name and ".default." in name for name in names)


def test_each_loss_of_the_table_is_a_choice_of_the_config_and_is_computed():
    annotations = {field.name: field.type for field in dataclasses.fields(DPOConfig)}
    assert set(get_args(annotations["loss_type"])) == set(dpo.LOSSES)
    logps = [torch.randn(3) for _ in range(4)]
    for name in dpo.LOSSES:
        assert torch.isfinite(dpo.preference_losses(*logps, loss_type=name)).all()
    with pytest.raises(InputError, match="loss_type='simop'"):
        dpo.preference_losses(*logps, loss_type="simop")


@pytest.mark.parametrize("loss_type", dpo.LOSSES)
def test_each_loss_gets_sums_or_means_as_the_table_says(loss_type, make):
    trainer = make(loss_type=loss_type)
    batch, mean = batch_of(trainer), dpo.LOSSES[loss_type].takes_mean
    agree(forward(trainer, batch), plain_logps(trainer.model, trainer, mean), atol=2e-5)
    _, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    want = plain_logps(trainer.model, trainer, mean)[0].mean()
    agree(metrics["logps/chosen"], want, atol=2e-5)


@pytest.mark.parametrize("fields, names", [
    ({"learning_rate": math.nan}, "learning_rate=nan"),
    ({"learning_rate": -1e-3}, "learning_rate=-0.001"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0"),
    ({"lora_r": -1}, "lora_r=-1"),
    ({"beta": 0.0}, "beta=0.0"),
    ({"label_smoothing": 0.5}, "label_smoothing=0.5"),
    ({"max_length": 1}, "max_length=1"),
    ({"loss_type": "dpo"}, "loss_type='dpo'.*sigmoid"),
    ({"truncation_mode": "middle"}, "truncation_mode='middle'.*keep_end"),
    ({"share_prompts": True}, "share_prompts=True")])
def test_a_config_refuses_values_out_of_range(fields, names, tmp_path):
    with pytest.raises(InputError, match=names):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, **fields)


# -------------------------------------------------------- large batches
@pytest.mark.parametrize("rows", (ROWS + LONG_PROMPTS, LONG_ANSWERS, ROWS[:1]),
                         ids=("mixed", "answers", "one"))
def test_a_large_batch_runs_in_parts_by_length_and_gives_the_same_numbers(rows, make):
    results = []
    for size in (2, 8):
        trainer = make("gpt2", hf_model("gpt2", seed=1), rows=rows,
                       args={"per_device_train_batch_size": size})
        calls = []
        trainer.model.register_forward_pre_hook(lambda *args, calls=calls: calls.append(args))
        loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch_of(trainer))
        loss.backward()
        rows_of_both_answers = 2 * len(trainer.train_dataset)
        assert len(calls) == {2: 1, 8: min(4, rows_of_both_answers)}[size]
        grads = {name: p.grad for name, p in trainer.model.named_parameters()}
        results.append((loss, metrics, grads))
    (loss, metrics, grads), (other_loss, other_metrics, other_grads) = results
    agree(other_loss, loss, atol=1e-5)
    agree(list(other_metrics.values()), list(metrics.values()), atol=2e-5)
    same_gradients(other_grads, grads)


def test_rows_of_similar_length_are_batched_together_if_asked(make):
    trainer = make(args={"train_sampling_strategy": "group_by_length"})
    lengths = [len(row["chosen_labels"]) + len(row["rejected_labels"])
               for row in trainer.train_dataset]
    assert trainer.train_dataset["length"][:] == lengths
    trainer.train()
    assert len(losses(trainer)) == 2


def test_tokens_of_both_answers_are_counted(make):
    trainer = make(args={"include_num_input_tokens_seen": "non_padding"})
    trainer.train()
    seen = [trainer.train_dataset[i] for i in range(4)]  # two steps of two pairs
    assert trainer.state.num_input_tokens_seen == sum(
        len(row["chosen_input_ids"]) + len(row["rejected_input_ids"]) for row in seen)


@pytest.mark.parametrize("arch", ["gpt2", "t5"])
def test_inputs_may_be_shown_to_metrics(arch, make):
    seen = []
    trainer = make(arch, args={"include_for_metrics": ["inputs"]},
                   eval_dataset=Dataset.from_list(ROWS),
                   compute_metrics=lambda p: seen.append(p.inputs.shape[0]) or {})
    trainer.evaluate()
    assert seen == [len(ROWS)]


# -------------------------------------------------------- evaluation
def test_several_evaluation_sets(make):
    sets = {"a": Dataset.from_list(ROWS[:2]), "b": Dataset.from_list(ROWS[2:])}
    trainer = make("gpt2", hf_model("gpt2", seed=1), eval_dataset=sets)
    logged = trainer.evaluate()
    for name, rows in sets.items():
        alone = trainer.evaluate(rows)
        for key in ("loss", "rewards/accuracies", "logps/rejected"):
            assert logged[f"eval_{name}_{key}"] == pytest.approx(alone[f"eval_{key}"], abs=1e-6)
    assert logged["eval_a_loss"] != pytest.approx(logged["eval_b_loss"], abs=1e-4)


def test_compute_metrics_sees_both_rewards(make):
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        return {"right": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}

    logged = make("gpt2", hf_model("gpt2", seed=1), eval_rows=ROWS, compute_metrics=metrics,
                preprocess_logits_for_metrics=lambda rewards, labels: rewards * 2).evaluate()
    assert seen[0].predictions.shape == (6, 2)
    assert logged["eval_right"] == logged["eval_rewards/accuracies"]
    want = [2 * logged[f"eval_rewards/{name}"] for name in ANSWERS]
    agree(seen[0].predictions.mean(0), want, atol=1e-5)


def greedy(model):
    """Sampling that always takes the likeliest token, so that the text is known."""
    model.generation_config.top_k = 1
    return model


def test_samples_are_of_the_policy_and_of_the_reference_and_fill_max_length(make, make_tokenizer):
    tokenizer = make_tokenizer(pad_token="</s>")  # what is padding is known from the mask alone
    models = [greedy(hf_model("llama", seed)) for seed in (0, 1)]
    trainer = make(*copy.deepcopy(models), max_length=14, tokenizer=tokenizer)
    batch = batch_of(trainer)
    longest = batch["prompt_input_ids"].shape[1]
    got = trainer.get_batch_samples(trainer.model, batch)
    for model, texts in zip(models, got, strict=True):
        for text, tokens in zip(texts, trainer.train_dataset, strict=True):
            alone = torch.tensor([tokens["prompt_input_ids"]])
            alone = model.eval().generate(alone, do_sample=False, max_new_tokens=14 - longest)
            want = tokenizer.decode(alone[0], skip_special_tokens=True)
            assert text.replace(" ", "") == want.replace(" ", "")
    assert got[0] != got[1]


def test_samples_are_drawn_from_the_distribution(make):
    for arch in ("gpt2", "t5"):
        trainer = make(arch, max_target_length=12, max_length=24)
        batch = batch_of(trainer)
        once, again = (trainer.get_batch_samples(trainer.model, batch)[0] for _ in range(2))
        assert len(once) == len(ROWS) and once != again
        assert all(text.startswith(pair["prompt"]) for text, pair in zip(once, ROWS, strict=True))
        most = 12 if arch == "t5" else 24 - batch["prompt_input_ids"].shape[1]
        added = [text.count("w") - pair["prompt"].count("w")
                 for text, pair in zip(once, ROWS, strict=True)]
        assert max(added) > most // 2 and max(added) <= most


def test_get_batch_samples_of_transformers_gives_micro_batches_and_their_pairs(make):
    trainer = make(rows=ROWS[:5])
    loader = iter(trainer.get_train_dataloader())
    for size, pairs in ((2, 4), (2, 1)):
        batches, count = trainer.get_batch_samples(loader, size, torch.device("cpu"))
        assert len(batches) == math.ceil(pairs / 2) and count == pairs


def test_samples_during_evaluation_change_no_number_of_the_training(make):
    logged = []
    for samples in (False, True):
        args = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, **SGD}
        trainer = make("llama", eval_rows=ROWS[:2], generate_during_eval=samples, max_length=12,
                       disable_dropout=False, args=args)
        trainer.train()
        logged.append(losses(trainer))
    agree(*logged)


class Board:
    """A tracker's writer that keeps what it is given."""

    def __init__(self):
        self.texts = []

    def add_text(self, *args):
        self.texts.append(args)

    def add_scalar(self, *args):
        pass

    def flush(self):
        pass


@pytest.fixture
def wandb(monkeypatch):
    """Stands for the package wandb: what is logged is in `logged`."""
    from importlib.machinery import ModuleSpec
    module = types.ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.logged, module.run = [], None
    module.log = module.logged.append
    module.Table = lambda columns, data: (columns, data)
    monkeypatch.setitem(sys.modules, "wandb", module)
    integrations = "transformers.integrations.integration_utils"
    monkeypatch.setattr(f"{integrations}.is_wandb_available", lambda: True)
    monkeypatch.setattr(f"{integrations}.WandbCallback.setup", lambda *args, **kwargs: None)
    return module


def test_samples_reach_the_trackers_and_the_file(make, wandb):
    from transformers.integrations import TensorBoardCallback, WandbCallback
    board = Board()
    models = (greedy(hf_model("gpt2", seed)) for seed in (0, 1))
    trainer = make(*models, eval_rows=ROWS[:1], max_length=14, generate_during_eval=True,
                   callbacks=[TensorBoardCallback(tb_writer=board), WandbCallback()])
    trainer.evaluate()
    batch = trainer.data_collator(list(trainer.eval_dataset))
    policy, reference = (texts[0] for texts in trainer.get_batch_samples(trainer.model, batch))
    want = {"prompt": "w4 w5 w6", "policy": policy[8:].strip(), "reference": reference[8:].strip()}
    assert want["policy"] != want["reference"]
    (line,) = Path(trainer.args.output_dir, "samples.jsonl").read_text().splitlines()
    assert json.loads(line) == {"update": 0, **want}
    ((name, text, step),) = [entry for entry in board.texts if entry[0] == "game_log"]
    assert step == 0 and all(word in text for word in (*want, *want.values()))
    (table,) = [logged["game_log"] for logged in wandb.logged if "game_log" in logged]
    assert table == (list(want), [list(want.values())])


def test_samples_of_chats_show_the_last_user_turn_and_no_template(make, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    trainer = make("gpt2", eval_rows=[row(EARLIER, YES, NO)], tokenizer=tokenizer, max_length=16,
                   generate_during_eval=True)
    trainer.evaluate()
    (line,) = Path(trainer.args.output_dir, "samples.jsonl").read_text().splitlines()
    assert json.loads(line)["prompt"] == "w6"


def test_samples_are_of_a_few_prompts_of_the_set_other_ones_at_other_steps(make):
    trainer = make("gpt2", eval_rows=ROWS, generate_during_eval=True, max_length=10,
                   args={"per_device_eval_batch_size": 3, "eval_strategy": "steps",
                         "eval_steps": 1, "max_steps": 3})
    trainer.train()
    rows = Path(trainer.args.output_dir, "samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in rows]
    assert [logged["update"] for logged in rows] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    shown = [[logged["prompt"] for logged in rows[i:i + 3]] for i in (0, 3, 6)]
    prompts = [pair["prompt"] for pair in ROWS]
    assert all(prompt in prompts for three in shown for prompt in three)
    assert not shown[0] == shown[1] == shown[2]


# -------------------------------------------------------- bad input
@pytest.mark.parametrize("kwargs, names", [
    ({"loss_type": "dpo"}, "loss_type='dpo'"),
    ({"beta": -0.1}, "beta=-0.1"),
    ({"beta": 0}, "beta=0"),
    ({"beta": math.nan}, "beta=nan"),
    ({"label_smoothing": 0.5}, "label_smoothing=0.5"),
    ({"label_smoothing": -0.1}, "label_smoothing=-0.1"),
    ({"truncation_mode": "middle"}, "truncation_mode='middle'"),
    ({"tokenizer": None}, "tokenizer"),
    ({"model": None}, "model"),
    ({"model_init": lambda: None}, "model_init"),
    ({"model_init_kwargs": {}}, "model_init_kwargs"),
    ({"ref_model_init_kwargs": {}}, "ref_model_init_kwargs"),
    ({"ref_adapter_name": "other"}, "'other'"),
    ({"args": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor"),
    ({"rows": [{"prompt": "w4", "chosen": "w5"}]}, "train_dataset.*rejected"),
    ({"rows": [row("w4", "w5", 7)]}, "rejected.*7"),
    ({"rows": [ROWS[0], row(None, "w5", "w6")]}, "prompt.*None"),
    ({"rows": None, "train_dataset": ROWS}, "train_dataset.*list"),
    ({"rows": None, "train_dataset": {"train": ROWS}}, "train_dataset=dict.*train")])
def test_bad_input_names_the_argument_and_the_value(kwargs, names, make):
    with pytest.raises(InputError, match=names):
        make(**kwargs)


def test_a_reference_that_would_train_along_is_refused(make):
    model = hf_model("gpt2")
    with pytest.raises(InputError, match="ref_model"):
        make(model, model)


def test_a_reference_without_effect_is_refused(make):
    for given in ({"ref_model": hf_model("gpt2", seed=1)},
                  {"model": two_adapters(), "model_adapter_name": "policy",
                   "ref_adapter_name": "reference"}):
        with pytest.raises(InputError, match="reference_free=True"):
            make(**{"model": "gpt2", **given}, reference_free=True)
    with pytest.raises(InputError, match="ref_adapter_name"):
        make(two_adapters(), hf_model("gpt2", seed=1), model_adapter_name="policy",
             ref_adapter_name="reference")
    with pytest.raises(InputError, match="ref_adapter_name='policy'"):
        make(two_adapters(), model_adapter_name="policy", ref_adapter_name="policy")
    with pytest.raises(InputError, match="adapter 'reference'"):
        make(two_adapters(), model_adapter_name="policy")


def test_shared_prompts_are_gone(make):
    with pytest.raises(InputError, match="share_prompts=False"):
        make(share_prompts=False)


def test_a_warning_names_an_option_without_effect(make):
    for given in ({"max_target_length": 9}, {"precompute_ref_log_probs": True}):
        (name,) = given
        with pytest.warns(UserWarning, match=f"{name}.*no effect"):
            make(**given, reference_free=True)


def test_a_tokenizer_without_pad_token_is_refused(make, make_tokenizer):
    with pytest.raises(ValueError, match="tokenizer.pad_token"):
        make(tokenizer=make_tokenizer(pad_token=None))


def test_a_warning_names_label_smoothing_where_it_has_no_effect(make):
    with pytest.warns(UserWarning, match="label_smoothing.*hinge"):
        make(loss_type="hinge", label_smoothing=0.1)
