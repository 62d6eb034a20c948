"""dpo.py's functions, data and trainer: the figures of TRL 0.7.10 (recorded_dpo.json), the mathematics by hand, what 0.7.10
gets wrong, every argument, and shared prompts.

    python -m pytest -q tests/test_dpo.py
"""
import copy
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration, TrainingArguments

import dpo
import common
from common import InputError
from conftest import BOS, CAUSAL, EOS, PAD, VOCAB, hf_model
from dpo import DPODataCollatorWithPadding, DPOTrainer, pack, pair_lengths, preference_losses, shared_layout, tokenize_pair

RECORDED = json.loads(Path(__file__).with_name("recorded_dpo.json").read_text())
LN2 = math.log(2)
ROWS = [{"prompt": "w4 w5 w6", "chosen": " w7 w8", "rejected": " w9 w10 w11"}, {"prompt": "w12", "chosen": " w13 w14 w15 w16",
        "rejected": " w17"}, {"prompt": "w18 w19 w20 w21 w22", "chosen": " w23", "rejected": " w24 w25"},
        {"prompt": "w26 w27", "chosen": " w28 w29", "rejected": " w30 w31"}, {"prompt": "w33 w34 w35", "chosen": " w36 w37 w38",
        "rejected": " w39 w40 w41 w42"}, {"prompt": "w43", "chosen": " w44 w45", "rejected": " w46"}]
# one token a word; "<s>" opens, the assistant's turn is "w11 answer </s>" and a line's end
TEMPLATE = ("{{ '<s> ' }}{% for m in messages %}{{ 'w10 ' if m['role'] == 'user' else 'w11 ' }}{{ m['content'] }}"
            "{{ ' </s>\n' if m['role'] == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'w11 ' }}{% endif %}")
user, assistant = (lambda text, role=role: {"role": role, "content": text} for role in ("user", "assistant"))


class InOrder(DPOTrainer):
    """Rows in their order, and each micro-batch's loss in `noted`."""

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        vars(self).setdefault("noted", []).append(loss.item())
        return loss


@pytest.fixture
def make_args(tmp_path):
    """make_args(**changes) -> TrainingArguments: 2 pairs a step, 2 steps, nothing saved or printed."""
    def make(**changes):
        return TrainingArguments(**{
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "max_steps": 2,
            "learning_rate": 1e-2, "lr_scheduler_type": "constant", "report_to": "none", "use_cpu": True, "logging_steps": 1,
            "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False, **changes})

    return make


@pytest.fixture
def make(make_args, tokenizer):
    """make("gpt2" or a model, rows=ROWS, eval_rows=None, args={...}, **of the trainer) -> InOrder trainer."""
    def make(model="gpt2", ref_model=None, rows=ROWS, eval_rows=None, args=None, **kwargs):
        if isinstance(model, str):
            model = hf_model(model)
        sets = {name: Dataset.from_list(data) for name, data in (("train_dataset", rows), ("eval_dataset", eval_rows)) if data}
        return InOrder(model, ref_model, args=make_args(**(args or {})), **{"tokenizer": tokenizer, **sets, **kwargs})

    return make


def lora(**changes):
    from peft import LoraConfig
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


def trained_lora(model, seed=3):
    """A PeftModel whose adapter says something already."""
    from peft import get_peft_model
    torch.manual_seed(seed)
    return get_peft_model(model, lora(init_lora_weights=False, target_modules=["c_attn"], fan_in_fan_out=True))


def batch_of(trainer, n=None):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(n or len(trainer.train_dataset))])


def naive(model, trainer, row):
    """log pi of chosen and rejected of one row: the model, one answer at a time, and log_softmax in float64."""
    told = []
    for name in ("chosen", "rejected"):
        ids = torch.tensor([row[f"{name}_input_ids"]])
        start = row[f"{name}_labels"].index(next(x for x in row[f"{name}_labels"] if x != trainer.label_pad_token_id))
        with torch.no_grad():
            logps = model(ids).logits.double().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        told.append(logps[start - 1:].sum().item())
    return told


def agree(got, want, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(torch.as_tensor(got).double(), torch.as_tensor(want).double(), rtol=rtol, atol=atol)


# ------------------------------------------------------------------------------------------------ TRL 0.7.10's figures
cases = lambda part: pytest.mark.parametrize("case", RECORDED[part], ids=lambda case: case["name"])


@cases("losses")
def test_losses_are_trl_s(case, make):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="label_smoothing has no part")
        trainer = make(rows=ROWS[:2], **case["dpo"])
    for logps, want in zip(case["logps"], case["results"], strict=True):
        losses, chosen, rejected = trainer.dpo_loss(*map(torch.tensor, logps), reference_free=case["reference_free"])
        agree(losses, want["losses"])
        for got, name in ((chosen, "chosen_rewards"), (rejected, "rejected_rewards")):
            if name in want:
                agree(got, want[name])


@cases("batches")
def test_batches_are_trl_s(case):
    if case["call"] == "collator":
        batch = DPODataCollatorWithPadding(**case["kwargs"])(case["input"])
    else:
        batch = DPOTrainer.concatenated_inputs({k: torch.tensor(v) for k, v in case["input"].items()}, **case["kwargs"])
    for name, want in case["result"].items():
        agree(batch[name], want)


def test_log_probabilities_are_trl_s():
    logits, labels = (torch.tensor(RECORDED["logps"][name]) for name in ("logits", "labels"))
    for name, kwargs in RECORDED["logps"]["variants"].items():
        given = labels.clone()
        agree(DPOTrainer.get_batch_logps(logits, given, **kwargs), RECORDED["logps"]["results"][name], rtol=1e-4)
        assert torch.equal(given, labels)  # the caller's labels are the caller's


def fill(model, seed, scale=0.15, only="", add=False):
    """Weights drawn by a generator whose stream is frozen, name after name; those of norms around 1."""
    draw = np.random.RandomState(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if only in name:
                norm = "weight" in name and ("ln_" in name or "layer_norm" in name)
                drawn = torch.tensor(scale * draw.standard_normal(tuple(p.shape)), dtype=torch.float32)
                p.copy_(p + drawn if add else drawn + norm)
    return model


def build(kind, seed, lora=False, near=None):
    """The models of the recorded runs. near: the reference, a policy of that seed and a little noise of `seed`."""
    if near is not None:
        return fill(build(kind, near), seed, scale=0.03, add=True)
    tokens = {"vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOS}
    if kind == "t5":
        return fill(T5ForConditionalGeneration(T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, dropout_rate=0.0,
                                                        decoder_start_token_id=PAD, **tokens)), seed, scale=0.2)
    model = fill(GPT2LMHeadModel(GPT2Config(n_positions=48, n_embd=32, n_layer=2, n_head=2, bos_token_id=BOS, resid_pdrop=0.0,
                                            embd_pdrop=0.0, attn_pdrop=0.0, **tokens)), seed)
    if lora:
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True,
                                                 task_type="CAUSAL_LM"))
        fill(model, seed, only="lora_A")
    return model


@pytest.mark.parametrize("share", (False, True), ids=("apart", "shared"))
@cases("runs")
def test_five_steps_are_trl_s(case, share, make):
    trainer = make(build(**case["model"]), case["ref"] and build(**case["ref"]), rows=case["rows"], max_length=40, max_prompt_length=20,
                   max_target_length=20, share_prompts=share, **case["dpo"],
                   args={"max_steps": 5, "learning_rate": 1e-3, "lr_scheduler_type": "linear", "optim": "adamw_torch", **case["args"]})
    trainer.train()
    agree(trainer.noted, case["losses"], rtol=1e-4, atol=1e-5)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for got, want in zip(logs, case["logs"], strict=True):
        for name, value in want.items():
            agree(got[name], value, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ the mathematics
def test_the_loss_of_one_pair_by_hand():
    # h = (-1 - -3) - (-2 - -2.5) = 1.5, beta h = 0.75
    args = [torch.tensor([x]) for x in (-1.0, -3.0, -2.0, -2.5)]
    agree(preference_losses(*args, beta=0.5), [-math.log(1 / (1 + math.exp(-0.75)))])
    agree(preference_losses(*args, beta=0.5, label_smoothing=0.2),
          [0.8 * math.log(1 + math.exp(-0.75)) + 0.2 * math.log(1 + math.exp(0.75))])
    agree(preference_losses(*args, beta=0.5, loss_type="hinge"), [0.25])
    agree(preference_losses(*args, beta=0.5, loss_type="ipo"), [0.25])  # (1.5 - 1)^2
    # chosen ratio 1, rejected ratio -0.5: KLs clamped to 1 and 0
    agree(preference_losses(*args, beta=0.5, loss_type="kto"), [1 - 1 / (1 + math.exp(-0.5)), 1 - 1 / (1 + math.exp(-0.75))])


@pytest.mark.parametrize("loss_type", dpo.LOSSES)
def test_a_step_down_the_loss_raises_the_chosen_and_lowers_the_rejected(loss_type):
    chosen, rejected = (torch.tensor([-2.0, -3.0], requires_grad=True) for _ in range(2))
    preference_losses(chosen, rejected, torch.tensor([-2.1, -3.1]), torch.tensor([-2.1, -3.2]), 0.1, 0.0, loss_type).mean().backward()
    assert (chosen.grad < 0).all() and (rejected.grad > 0).all()


def test_the_gradient_is_beta_times_how_wrong_the_rewards_are():
    # Rafailov et al., section 4: grad L = -beta sigmoid(r(y_l) - r(y_w)) (grad log pi(y_w) - grad log pi(y_l))
    chosen = torch.tensor([-1.0], requires_grad=True)
    preference_losses(chosen, torch.tensor([-2.0]), torch.tensor([-3.0]), torch.tensor([-1.0]), beta=0.3).backward()
    agree(chosen.grad, [-0.3 / (1 + math.exp(0.3 * (2.0 - -1.0)))])


def test_log_probability_gradient_is_autograd_s():
    torch.manual_seed(0)
    logits, labels = torch.randn(150, 11, dtype=torch.float64), torch.randint(11, (150,))
    weights, grads = torch.randn(150, dtype=torch.float64), []
    for function in (lambda x: common.LabelLogProb.apply(x, labels), lambda x: x.log_softmax(-1).gather(1, labels[:, None])[:, 0]):
        leaf = logits.clone().requires_grad_()
        (function(leaf * 1.0) * weights).sum().backward()
        grads.append(leaf.grad)
    agree(*grads)


def test_sums_are_float32_when_logits_are_bfloat16():  # D4
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(2, 60, 50), torch.randint(50, (2, 60))
    half = logits.bfloat16()
    got = DPOTrainer.get_batch_logps(half, labels)
    want = half.double().log_softmax(-1)[:, :-1].gather(2, labels[:, 1:, None]).sum((1, 2))
    assert got.dtype == torch.float32
    agree(got, want, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ rows -> tokens
def ids(*words):
    return [{"<s>": BOS, "</s>": EOS}.get(word) or int(word[1:]) for text in words for word in text.split()]


def test_a_row_of_text_by_hand(tokenizer):
    row = tokenize_pair({"prompt": "w4 w5", "chosen": " w6", "rejected": " w7 w8"}, tokenizer)
    assert row["prompt_input_ids"] == ids("<s> w4 w5") and row["prompt_attention_mask"] == [1] * 3
    assert row["chosen_input_ids"] == ids("<s> w4 w5 w6 </s>") and row["chosen_attention_mask"] == [1] * 5
    assert row["chosen_labels"] == [-100] * 3 + ids("w6 </s>")
    assert row["rejected_labels"] == [-100] * 3 + ids("w7 w8 </s>")


def test_a_tokenizer_without_bos_or_eos_gets_none(make_tokenizer):  # D5
    row = tokenize_pair({"prompt": "w4", "chosen": " w6", "rejected": " w7"}, make_tokenizer(bos_token=None, eos_token=None))
    assert row["chosen_input_ids"] == ids("w4 w6")


def test_bos_and_eos_are_not_doubled(tokenizer):  # D6
    row = tokenize_pair({"prompt": "<s> w4", "chosen": " w6 </s>", "rejected": " w7"}, tokenizer)
    assert row["chosen_input_ids"] == ids("<s> w4 w6 </s>") and row["rejected_input_ids"] == ids("<s> w4 w7 </s>")


PROMPT, LONG, SHORT = " ".join(f"w{i}" for i in range(10, 20)), " ".join(f" w{i}" for i in range(30, 50)), " w60 w61"


@pytest.mark.parametrize("limits, prompt, answer", [
    ((64, 32), 11, 21),    # it fits: nothing is cut
    ((16, 8), 8, 8),       # max_prompt_length holds, the answer has the rest
    ((64, 8), 8, 21),      # ... even where the pair would have fitted
    ((24, 20), 11, 13),    # a short prompt leaves the answer more than max_length - max_prompt_length
    ((30, None), 11, 19),  # without a limit the prompt keeps at least half of max_length
    ((16, None), 8, 8)])
def test_what_is_too_long_is_cut_and_answers_end_in_eos(limits, prompt, answer, tokenizer):  # D7
    for mode, kept in (("keep_end", ids("<s>") + ids(PROMPT)[-(prompt - 1):]), ("keep_start", ids("<s> " + PROMPT)[:prompt])):
        row = tokenize_pair({"prompt": PROMPT, "chosen": LONG, "rejected": SHORT}, tokenizer, False, *limits, truncation_mode=mode)
        assert row["prompt_input_ids"] == kept
        assert row["chosen_input_ids"] == kept + ids(LONG)[:answer - 1] + [EOS]
        assert row["chosen_labels"] == [-100] * prompt + ids(LONG)[:answer - 1] + [EOS]
        assert row["rejected_input_ids"] == kept + ids(SHORT) + [EOS]


@pytest.mark.parametrize("limits", [{"max_length": 16, "max_prompt_length": 16}, {"max_prompt_length": 64}, {"max_length": 1}, {"max_target_length": 0}])
def test_limits_that_leave_no_answer_are_refused(limits, make):  # D8
    with pytest.raises(InputError, match="leaves no token for an answer|give [12] or more"):
        make(**limits)


def test_no_limit_means_what_the_model_takes(make):
    assert make().max_length == 64  # its positions, fewer than 512
    with pytest.warns(UserWarning, match="the model takes 64 tokens"):
        assert make(max_length=100).max_length == 64


def test_prompt_and_answer_are_read_in_one_and_may_merge():  # D9
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    merges = [("a", "b"), ("c", "d"), ("ab", "cd"), ("e", "f")]
    pieces = ["<pad>", "a", "b", "c", "d", "e", "f", "ab", "cd", "abcd", "ef"]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")
    # enc("ef ab" + "cd") = ef abcd: two tokens of the pair merge into one across the boundary
    prompt, (answer, other) = dpo.split_tokens("ef ab", ["cd", "e"], tokenizer)
    assert prompt == [10] and answer == [9] and other == [7, 5]  # "abcd"; "ab e": both answers begin where one must
    # three merge: "efa" + "bcd"
    assert dpo.split_tokens("efa", ["bcd"], tokenizer) == ([10], [[9]])
    row = tokenize_pair({"prompt": "ef ab", "chosen": "cd", "rejected": "e"}, tokenizer)
    assert row["chosen_input_ids"] == [10, 9] and row["rejected_input_ids"] == [10, 7, 5]


def test_build_tokenized_answer_joins_to_the_encoding_of_the_whole(make, tokenizer):
    told = make().build_tokenized_answer("w4 w5", " w6 w7")
    assert told["prompt_input_ids"] + told["input_ids"] == tokenizer("w4 w5 w6 w7", add_special_tokens=False).input_ids
    assert told == {"prompt_input_ids": [4, 5], "prompt_attention_mask": [1, 1], "input_ids": [6, 7], "attention_mask": [1, 1]}


def test_chats_go_through_the_template_once(make_tokenizer):  # D23, D6
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    want = {"prompt": ids("<s> w10 w4 w5 w11"), "chosen": ids("w6 </s>"), "rejected": ids("w7 w8 </s>")}
    given = {"prompt": [user("w4 w5")], "chosen": [assistant("w6")], "rejected": [assistant("w7 w8")]}
    whole = {name: given["prompt"] + given[name] for name in ("chosen", "rejected")}
    for row in (given, whole, {**whole, "prompt": "w4 w5"}):
        told = tokenize_pair(row, tokenizer)
        assert told["prompt_input_ids"] == want["prompt"]
        for name in ("chosen", "rejected"):
            assert told[f"{name}_input_ids"] == want["prompt"] + want[name]


def test_a_chat_s_prompt_may_be_a_text_or_stand_in_the_answers_too(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    ask, yes, no = ([{"role": role, "content": text}] for role, text in (("user", "w5"), ("assistant", "w6"), ("assistant", "w7")))
    want = dpo.texts_of({"prompt": ask, "chosen": yes, "rejected": no}, tokenizer)
    assert dpo.texts_of({"prompt": "w5", "chosen": yes, "rejected": no}, tokenizer) == want
    assert dpo.texts_of({"prompt": ask, "chosen": ask + yes, "rejected": ask + no}, tokenizer) == want
    assert dpo.texts_of({"chosen": ask + yes, "rejected": ask + no}, tokenizer) == want


def test_the_trainer_takes_chats_without_a_prompt_column(make, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = [{name: [user("w4"), assistant(text)] for name, text in (("chosen", "w6"), ("rejected", "w7"))}]
    trainer = make(rows=rows, tokenizer=tokenizer)
    trainer.train()
    assert trainer.noted[0] == pytest.approx(LN2, abs=1e-7)


def test_an_encoder_decoder_s_row(make, make_tokenizer):
    trainer = make("t5", max_prompt_length=2, max_target_length=2)
    row = trainer.tokenize_row({"prompt": "w4 w5 w6", "chosen": "w7 w8 w9", "rejected": "w10"}, model=trainer.model)
    assert row["prompt_input_ids"] == [4, 5] and row["chosen_labels"] == [7, 8] and row["rejected_labels"] == [10]
    assert row["chosen_decoder_input_ids"] == [PAD, 7]


def test_tokenising_does_not_depend_on_the_reference(make):  # D19
    fingerprints = {make(ref_model=hf_model("gpt2", seed=seed)).train_dataset._fingerprint for seed in (1, 2)}
    assert len(fingerprints) == 1
    rows = [{k: row[k] for k in row} for row in ROWS]
    assert make(dataset_num_proc=2, rows=rows).train_dataset["chosen_labels"][:] == make().train_dataset["chosen_labels"][:]


def test_rows_that_teach_nothing_are_dropped_and_counted(make):
    rows = ROWS + [{"prompt": "w4", "chosen": "", "rejected": " w5"}, {"prompt": "w4", "chosen": " w5", "rejected": " w5"}]
    with pytest.warns(UserWarning, match="train_dataset: 2 of 8 rows teach nothing and are dropped: 1 with an empty answer, 1 whose chosen"):
        assert len(make(rows=rows).train_dataset) == len(ROWS)
    with pytest.raises(InputError, match="no row to learn from"), pytest.warns(UserWarning):
        make(rows=rows[-2:])


def test_columns_are_kept_where_asked_and_the_caller_s_things_stay_as_they_are(make_args, tokenizer):
    rows, args = Dataset.from_list([{**row, "source": "x"} for row in ROWS]), make_args()
    state = (copy.deepcopy(args.to_dict()), tokenizer.pad_token, tokenizer.padding_side, rows.column_names)
    trainer = DPOTrainer(hf_model("gpt2"), args=args, train_dataset=rows, tokenizer=tokenizer)
    assert "source" not in trainer.train_dataset.column_names
    trainer.train()
    assert state == (args.to_dict(), tokenizer.pad_token, tokenizer.padding_side, rows.column_names)
    kept = DPOTrainer(hf_model("gpt2"), args=make_args(remove_unused_columns=False), train_dataset=rows, tokenizer=tokenizer)
    assert {"source", "prompt"} <= set(kept.train_dataset.column_names)
    kept.train()


# ------------------------------------------------------------------------------------------------ the forward passes
@pytest.mark.parametrize("share", (False, True), ids=("apart", "shared"))
@pytest.mark.parametrize("arch", CAUSAL)
def test_log_probabilities_are_those_of_each_answer_alone(arch, share, make):
    trainer = make(arch, share_prompts=share)
    model, batch = trainer.model.eval(), batch_of(trainer)
    layout = trainer._shared_layout(model, batch)
    assert (layout is not None) is share
    told = trainer._forward(model, batch, layout)
    want = [naive(model, trainer, row) for row in trainer.train_dataset]
    agree(torch.stack(told[:2], 1), want, rtol=1e-5, atol=2e-5)
    full = trainer.concatenated_forward(model, batch)
    agree(torch.stack(full[:2], 1), want, rtol=1e-5, atol=2e-5)
    assert full[2].shape == (len(ROWS), max(max(map(len, trainer.train_dataset[f"{n}_input_ids"])) for n in ("chosen", "rejected")), VOCAB)


def test_metrics_of_logits_are_means_over_answer_tokens(make):  # D17
    trainer = make("gpt2", share_prompts=False)
    batch, model = batch_of(trainer), trainer.model.eval()
    _, _, chosen, rejected, _ = trainer.concatenated_forward(model, batch)
    answers = batch["chosen_labels"][:, 1:] != -100
    want = [chosen[i, :answers.shape[1]][answers[i]].mean().item() for i in range(len(answers))]
    _, metrics = trainer.get_batch_loss_metrics(model, batch)
    agree(metrics["logits/chosen"], np.mean(want), atol=1e-5)


def wider(batch, n, side="right"):
    """The batch with n columns more of padding."""
    fills = {"ids": PAD, "mask": 0, "labels": -100}
    pad = (0, n) if side == "right" else (n, 0)
    return {k: F.pad(v, pad, value=fills[k.split("_")[-1]]) if not k.startswith("prompt") else v for k, v in batch.items()}


@pytest.mark.parametrize("arch", ("gpt2", "llama", "t5"))
def test_padding_changes_no_number_on_either_side(arch, make):
    trainer = make(arch, hf_model(arch, seed=1), share_prompts=False)
    batch = batch_of(trainer)
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    sides = [wider(batch, 20)] if arch == "t5" else [wider(batch, 20), wider(batch, 7, "left")]
    for other in sides:
        other_loss, other_metrics = trainer.get_batch_loss_metrics(trainer.model, {**batch, **other})
        agree(other_loss, loss, atol=1e-5)
        agree(list(other_metrics.values()), list(metrics.values()), atol=1e-4)


def test_only_answer_tokens_get_logits_and_no_cache_is_built(make):  # D18
    trainer, seen = make("gpt2", share_prompts=False), []
    trainer.model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    trainer.model.transformer.register_forward_hook(lambda module, args, kwargs, output: seen.append(kwargs.get("use_cache")),
                                                    with_kwargs=True)
    trainer.get_batch_loss_metrics(trainer.model, batch_of(trainer))
    tokens = sum(len(row[n].split()) + 1 for row in ROWS for n in ("chosen", "rejected"))
    assert seen == [False, (tokens, VOCAB)]


def test_another_label_pad_token_works_with_an_encoder_decoder_too(make):  # D22
    for arch in ("gpt2", "t5"):
        losses = []
        for pad in (-100, -50):
            trainer = make(arch, hf_model(arch, seed=1), label_pad_token_id=pad)
            losses.append(trainer.get_batch_loss_metrics(trainer.model, batch_of(trainer))[0].item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_ids_are_padded_with_the_tokenizer_s_pad_token(make, make_tokenizer):  # D22
    trainer = make(tokenizer=make_tokenizer(pad_token="w99"))
    assert batch_of(trainer)["chosen_input_ids"].max() == 99 and trainer.padding_value == 99
    assert make(padding_value=7).padding_value == 7


# ------------------------------------------------------------------------------------------------ shared prompts
def test_packing_fills_rows_of_the_longest():
    assert pack([3, 7, 4, 5, 2]) == (7, [(2, 4), (0, 0), (2, 0), (1, 0), (1, 5)])


def test_a_shared_row_by_hand(make):
    trainer = make(rows=[{"prompt": "w4 w5", "chosen": " w6", "rejected": " w7 w8"}])
    batch = batch_of(trainer)
    assert pair_lengths(batch, -100) == [(3, 2, 3)]
    layout = shared_layout(batch, [(3, 2, 3)])
    assert layout["input_ids"].tolist() == [ids("<s> w4 w5 w6 </s> w7 w8 </s>")]
    assert layout["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert layout["attention_mask"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0],   # the prompt
        [1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0],                             # chosen
        [1, 1, 1, 0, 0, 1, 0, 0], [1, 1, 1, 0, 0, 1, 1, 0], [1, 1, 1, 0, 0, 1, 1, 1]]   # rejected: not the chosen
    assert layout["predicts"][1].tolist() == [2, 3, 2, 5, 6]
    assert layout["targets"].tolist() == ids("w6 </s> w7 w8 </s>")
    assert [x.tolist() for x in layout["answers"]] == [[0, 0, 1, 1, 1], [0, 1, 0, 1, 2]]


@pytest.mark.parametrize("kind", ("sdpa", "eager"))
@pytest.mark.parametrize("arch", CAUSAL)
def test_shared_prompts_give_the_same_loss_and_gradients_from_fewer_tokens(arch, kind, make):
    grads, losses, sizes = [], [], []
    for share in (False, True):
        model = hf_model(arch)
        model.set_attn_implementation(kind)
        trainer = make(model, hf_model(arch, seed=1), share_prompts=share)
        trainer.model.get_decoder().register_forward_hook(lambda module, args, output: sizes.append(output[0].shape[:2].numel()))
        batch = batch_of(trainer)
        trainer._shared_layout(trainer.model, batch)  # where they are tried out
        sizes.clear() if share is False else sizes.__delitem__(slice(1, None))
        loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
        loss.backward()
        losses.append(loss.item())
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0] != pytest.approx(LN2, abs=1e-3)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-5, msg=lambda m: f"{name}: {m}")
    assert sizes[-1] < 0.8 * sizes[0]


def test_pairs_that_are_not_prompt_and_answer_are_not_shared(make):
    trainer = make(rows=ROWS[:2], share_prompts=True)
    batch = batch_of(trainer)
    assert pair_lengths(batch, -100) == [(4, 3, 4), (2, 5, 2)]
    other, gap, left = ({k: v.clone() for k, v in batch.items()} for _ in range(3))
    other["rejected_input_ids"][0, 1] = 99          # another prompt
    gap["chosen_labels"][1, 3] = -100               # a token that is not learnt within the answer
    left = {**left, **wider(left, 2, "left")}
    for changed in (other, gap, left):
        assert pair_lengths(changed, -100) is None
        trainer.get_batch_loss_metrics(trainer.model, batch)
        loss, _ = trainer.get_batch_loss_metrics(trainer.model, changed)
        assert loss.item() == pytest.approx(LN2, abs=1e-7)


def test_sharing_is_chosen_by_the_work_it_saves(make):
    prompt = " ".join(f"w{i}" for i in range(10, 50))
    long = [{"prompt": prompt, "chosen": " w5", "rejected": " w6"}] * 2
    short = [{"prompt": "w4", "chosen": " " + prompt + " w5", "rejected": " " + prompt}]
    for rows, shares in ((long, True), (short, False)):
        trainer = make("llama", rows=rows)
        assert (trainer._shared_layout(trainer.model, batch_of(trainer)) is not None) is shares


def test_a_sliding_window_shorter_than_a_row_is_kept(make):
    for window, shares in ((32, True), (6, False)):
        model = hf_model("mistral", sliding_window=window)
        trainer = make(model, share_prompts=True)
        batch = batch_of(trainer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert (trainer._shared_layout(model, batch) is not None) is shares
        told = trainer._forward(model.eval(), batch, trainer._shared_layout(model, batch))
        agree(torch.stack(told[:2], 1), [naive(model, trainer, row) for row in trainer.train_dataset], atol=2e-5)


def test_a_model_for_which_sharing_is_not_exact_says_so_and_goes_without(make):
    class NoPositions(GPT2LMHeadModel):  # it counts positions itself
        def forward(self, *args, position_ids=None, **kwargs):
            return super().forward(*args, **kwargs)

    class Refuses(GPT2LMHeadModel):
        def forward(self, input_ids, attention_mask=None, **kwargs):
            if attention_mask.dim() != 2:
                raise ValueError("wrong shape")
            return super().forward(input_ids, attention_mask=attention_mask, **kwargs)

    config = hf_model("gpt2").config
    for kind, sentence in ((NoPositions, "would change log-probabilities by"), (Refuses, "wrong shape")):
        torch.manual_seed(0)
        trainer = make(kind(config), share_prompts=True)
        with pytest.warns(UserWarning, match=f"prompts run once for each answer, not once for both: .*{sentence}"):
            trainer.train()
        assert trainer.noted[0] == pytest.approx(LN2, abs=1e-7)


def test_a_subclass_s_own_forward_is_used(make_args, tokenizer):
    class Mine(DPOTrainer):
        calls = 0

        def concatenated_forward(self, *args):
            self.calls += 1
            return super().concatenated_forward(*args)

    trainer = Mine(hf_model("gpt2"), args=make_args(), train_dataset=Dataset.from_list(ROWS), tokenizer=tokenizer, share_prompts=True)
    with pytest.warns(UserWarning, match="not this class's own"):
        trainer.train()
    assert trainer.calls == 4  # reference and policy, two steps


# ------------------------------------------------------------------------------------------------ the reference
@pytest.mark.parametrize("arch", (*CAUSAL, "t5", "bart"))
def test_the_first_loss_is_ln_2_with_dropout_everywhere(arch, make):  # D10
    for extra in ({}, {"peft_config": lora(lora_dropout=0.3, task_type="SEQ_2_SEQ_LM" if arch in ("t5", "bart") else "CAUSAL_LM")}):
        trainer = make(arch, **extra)
        trainer.train()
        assert trainer.noted[0] == pytest.approx(LN2, abs=1e-7), extra
        assert trainer.noted[1] != pytest.approx(LN2, abs=1e-4), extra


def test_dropout_that_is_left_on_acts_on_the_policy_and_never_on_the_reference(make):
    trainer = make("llama", disable_dropout=False, peft_config=lora(lora_dropout=0.5, init_lora_weights=False))
    batch = batch_of(trainer)
    trainer.model.train()
    once, again = (trainer.compute_reference_log_probs(batch) for _ in range(2))
    assert trainer.model.training and torch.equal(once[0], again[0])
    once, again = (trainer.get_batch_loss_metrics(trainer.model, batch)[1]["logps/chosen"] for _ in range(2))
    assert not torch.equal(once, again)


def test_a_frozen_copy_stays_as_the_policy_was(make, weights, moved):
    trainer = make()
    before = weights(trainer.ref_model)
    trainer.train()
    assert not moved(before, trainer.ref_model) and moved(before, trainer.model)
    assert not trainer.ref_model.training


def test_a_separate_reference_is_used(make):
    reference = hf_model("gpt2", seed=1)
    trainer = make("gpt2", reference)
    told = trainer.compute_reference_log_probs(batch_of(trainer))
    agree(torch.stack(told, 1), [naive(reference.eval(), trainer, row) for row in trainer.train_dataset], atol=2e-5)


def test_models_by_name(make_args, tokenizer, tmp_path):
    hf_model("gpt2", seed=5).save_pretrained(tmp_path)
    trainer = DPOTrainer(str(tmp_path), str(tmp_path), args=make_args(), train_dataset=Dataset.from_list(ROWS), tokenizer=tokenizer,
                         model_init_kwargs={"dtype": "bfloat16"}, ref_model_init_kwargs={"dtype": "bfloat16"})
    assert trainer.model.dtype == trainer.ref_model.dtype == torch.bfloat16
    assert trainer.model is not trainer.ref_model


def test_peft_the_base_is_the_reference_of_a_fresh_adapter(make):
    base = hf_model("gpt2")
    trainer = make(copy.deepcopy(base), peft_config=lora(target_modules=["c_attn"], fan_in_fan_out=True))
    assert trainer.ref_model is None
    trainer.train()
    told = trainer.compute_reference_log_probs(batch_of(trainer))
    agree(torch.stack(told, 1), [naive(base.eval(), trainer, row) for row in trainer.train_dataset], atol=2e-5)


def test_a_trained_adapter_is_compared_with_itself_as_it_was(make):
    model = trained_lora(hf_model("gpt2"))
    start = copy.deepcopy(model)
    trainer = make(model)
    trainer.train()
    assert trainer.noted[0] == pytest.approx(LN2, abs=1e-7)
    told = trainer.compute_reference_log_probs(batch_of(trainer))
    agree(torch.stack(told, 1), [naive(start.eval(), trainer, row) for row in trainer.train_dataset], atol=2e-5)
    policy = trainer._forward(trainer.model, batch_of(trainer), None)
    agree(torch.stack(policy[:2], 1).detach(), [naive(trainer.model.eval(), trainer, row) for row in trainer.train_dataset], atol=2e-5)


def two_adapters():
    from peft import get_peft_model
    torch.manual_seed(0)
    config = lora(init_lora_weights=False, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(hf_model("gpt2"), config, adapter_name="policy")
    model.add_adapter("reference", config)
    return model


def test_named_adapters_the_policy_s_trains_whichever_was_active(make, weights, moved):  # D16
    model = two_adapters()
    model.set_adapter("reference")
    trainer = make(model, model_adapter_name="policy", ref_adapter_name="reference")
    before = weights(model)
    trainer.train()
    names = moved(before, model)
    assert names and all(".policy." in name for name in names)
    with pytest.raises(ZeroDivisionError), trainer.null_ref_context():
        assert model.active_adapter == "reference"
        1 / 0
    assert model.active_adapter == "policy"
    assert all(p.requires_grad == (".policy." in name) for name, p in model.named_parameters())


def test_null_ref_context_hands_the_policy_back_when_something_fails(make):
    for model in (trained_lora(hf_model("gpt2")), hf_model("gpt2")):
        trainer = make(model)
        trainer.train()
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        with pytest.raises(ZeroDivisionError), trainer.null_ref_context():
            1 / 0
        assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


def test_reference_free_runs_none(make):  # D14
    trainer = make(reference_free=True)
    assert trainer.ref_model is None
    batch = batch_of(trainer)
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model.eval(), batch)
    logps = torch.tensor([naive(trainer.model, trainer, row) for row in trainer.train_dataset])
    agree(loss.detach(), -F.logsigmoid(0.1 * (logps[:, 0] - logps[:, 1])).mean(), atol=1e-5)
    agree(metrics["rewards/chosen"], 0.1 * logps[:, 0].mean(), atol=1e-5)


# ------------------------------------------------------------------------------------------------ precomputed log-probabilities
def test_precomputed_log_probabilities_are_the_reference_s_for_every_set(make):  # D1
    runs = []
    for early in (False, True):
        reference = hf_model("gpt2", seed=1)
        sets = {"near": Dataset.from_list(ROWS[:3]), "far": Dataset.from_list(ROWS[3:])}
        trainer = make("gpt2", reference, eval_dataset=sets, precompute_ref_log_probs=early, args={"max_steps": 4})
        trainer.train()
        runs.append((trainer.noted, trainer.evaluate()))
        assert (dpo.REFERENCE[0] in trainer.eval_dataset["near"].column_names) is early
    agree(runs[1][0], runs[0][0], rtol=1e-5, atol=1e-5)
    for name in ("eval_near_rewards/margins", "eval_far_loss"):
        assert runs[1][1][name] == pytest.approx(runs[0][1][name], abs=1e-5)


def test_without_a_reference_model_the_policy_before_the_first_step_is_precomputed(make):  # D1
    trainer = make(eval_rows=ROWS[:4], precompute_ref_log_probs=True, args={"max_steps": 4})
    assert trainer.ref_model is None
    trainer.train()
    plain = make(eval_rows=ROWS[:4], args={"max_steps": 4})
    plain.train()
    margin = plain.evaluate()["eval_rewards/margins"]
    assert abs(margin) > 0.01 and trainer.evaluate()["eval_rewards/margins"] == pytest.approx(margin, abs=1e-5)


def test_another_set_after_training_needs_a_reference_that_is_still_there(make):  # D2
    other = Dataset.from_list(ROWS[4:])
    for extra in ({}, {"ref_model": hf_model("gpt2", seed=1)}):
        trainer = make(eval_rows=ROWS[:4], precompute_ref_log_probs=True, **extra)
        trainer.train()
        own = len(trainer.eval_dataset)
        if not extra:
            with pytest.raises(InputError, match="the reference was let go"):
                trainer.evaluate(other)
        else:
            told = trainer.evaluate(other)
            plain = make("gpt2", hf_model("gpt2", seed=1))
            plain.train()
            assert told["eval_rewards/margins"] == pytest.approx(plain.evaluate(other)["eval_rewards/margins"], abs=1e-5)
        assert len(trainer.eval_dataset) == own  # evaluate() doesn't replace the trainer's own set


def test_precomputed_rows_can_be_saved_and_used_again(make, tmp_path):  # D25
    make("gpt2", hf_model("gpt2", seed=1), precompute_ref_log_probs=True).train_dataset.save_to_disk(str(tmp_path))
    rows = Dataset.load_from_disk(str(tmp_path))
    trainer = make("gpt2", rows=None, train_dataset=rows, precompute_ref_log_probs=True)
    trainer.train()
    plain = make("gpt2", hf_model("gpt2", seed=1))
    plain.train()
    agree(trainer.noted, plain.noted, atol=1e-5)


# ------------------------------------------------------------------------------------------------ training
def test_accumulated_micro_batches_are_one_big_batch(make, weights):
    ends = []
    for size, steps in ((5, 1), (2, 3)):  # 2 + 2 + 1 pairs
        trainer = make("llama", rows=ROWS[:5], args={"per_device_train_batch_size": size, "gradient_accumulation_steps": steps,
                                                     "max_steps": 1, "optim": "sgd", "learning_rate": 0.5})
        trainer.train()
        ends.append((weights(trainer.model), trainer.state.log_history[0]))
    for name, weight in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][name], weight, rtol=1e-4, atol=1e-6)
    for name in ("loss", "rewards/margins", "logps/chosen", "logits/rejected"):
        assert ends[0][1][name] == pytest.approx(ends[1][1][name], rel=1e-4, abs=1e-6)


def test_metrics_weigh_every_pair_alike(make):  # D17
    trainer = make("gpt2", hf_model("gpt2", seed=1), rows=ROWS[:3], eval_rows=ROWS[:3], share_prompts=False,
                   args={"max_steps": 2, "logging_steps": 2, "learning_rate": 0.0, "per_device_eval_batch_size": 2})
    trainer.train()
    policy, reference = ([naive(m.eval(), trainer, row) for row in trainer.train_dataset] for m in (trainer.model, trainer.ref_model))
    margins = [0.1 * ((p[0] - p[1]) - (r[0] - r[1])) for p, r in zip(policy, reference)]
    assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(np.mean(margins), abs=1e-5)
    told = trainer.evaluate()
    assert told["eval_rewards/margins"] == pytest.approx(np.mean(margins), abs=1e-5)
    assert told["eval_loss"] == pytest.approx(np.mean([math.log(1 + math.exp(-m)) for m in margins]), abs=1e-5)
    assert told["eval_rewards/accuracies"] == pytest.approx(np.mean([m > 0 for m in margins]))
    assert told["eval_logps/chosen"] == pytest.approx(np.mean([p[0] for p in policy]), abs=1e-4)


def test_lora_with_activation_checkpointing_really_trains(make, weights, moved):
    ends = []
    for checkpointing in (False, True):
        trainer = make("llama", peft_config=lora(), args={"activation_checkpointing": checkpointing, "max_steps": 3})
        before = weights(trainer.model)
        trainer.train()
        names = moved(before, trainer.model)
        assert names and all("lora_" in name for name in names)
        ends.append(trainer.noted)
    agree(*ends, atol=1e-5)


def test_bfloat16_begins_at_ln_2_and_learns(make):
    trainer = make("llama", args={"bf16": True, "max_steps": 12, "per_device_train_batch_size": 6})
    trainer.train()
    assert trainer.noted[0] == pytest.approx(LN2, abs=1e-6) and trainer.noted[-1] < 0.2
    trainer = make(hf_model("llama").bfloat16())
    trainer.train()
    assert trainer.noted[0] == pytest.approx(LN2, abs=1e-6)


def test_mixed_precision_is_the_one_asked_for_in_every_pass(make):  # D20
    trainer, seen = make("llama", peft_config=lora(), args={"bf16": True, "max_steps": 1}), []
    note = lambda *args: seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
    trainer.model.get_decoder().layers[0].register_forward_pre_hook(note)
    trainer.train()
    assert len(seen) >= 2 and set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("arch", (*CAUSAL, "t5", "bart"))
def test_every_architecture_learns_six_pairs(arch, make):
    trainer = make(arch, eval_rows=ROWS, args={"max_steps": 15, "per_device_train_batch_size": 6})
    trainer.train()
    assert trainer.evaluate()["eval_rewards/accuracies"] == 1.0


@pytest.mark.parametrize("loss_type", dpo.LOSSES)
def test_every_loss_learns_six_pairs(loss_type, make):
    trainer = make("llama", eval_rows=ROWS, loss_type=loss_type, args={"max_steps": 15, "per_device_train_batch_size": 6})
    trainer.train()
    assert trainer.evaluate()["eval_rewards/accuracies"] == 1.0


def test_ipo_takes_means_over_tokens(make):  # D3
    trainer = make("gpt2", hf_model("gpt2", seed=1), loss_type="ipo", beta=0.5)
    lengths = [[len(row[n].split()) + 1 for n in ("chosen", "rejected")] for row in ROWS]
    policy, reference = ([[x / n for x, n in zip(naive(m.eval(), trainer, row), ns)] for row, ns in zip(trainer.train_dataset, lengths)]
                         for m in (trainer.model, trainer.ref_model))
    want = np.mean([((p[0] - p[1]) - (r[0] - r[1]) - 1) ** 2 for p, r in zip(policy, reference)])
    assert trainer.get_batch_loss_metrics(trainer.model, batch_of(trainer))[0].item() == pytest.approx(want, rel=1e-4)


def test_a_killed_run_goes_on_to_the_same_weights(make, weights):
    ends = []
    for precompute in (False, True):
        whole = make("gpt2", args={"max_steps": 4, "save_strategy": "steps", "save_steps": 2}, precompute_ref_log_probs=precompute)
        whole.train()
        rest = make("gpt2", args={"max_steps": 4}, precompute_ref_log_probs=precompute)
        rest.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
        agree(rest.noted, whole.noted[2:], rtol=0, atol=1e-6)
        ends.append((weights(whole.model), weights(rest.model)))
    for a, b in ends:
        assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_a_mixture_of_experts_keeps_its_balancing_loss(make):  # D25
    from transformers import MixtralConfig, MixtralForCausalLM
    losses = []
    for coefficient in (0.0, 1.0):
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            num_local_experts=2, num_experts_per_tok=1, output_router_logits=True, router_aux_loss_coef=coefficient, pad_token_id=PAD))
        trainer = make(model)
        with pytest.warns(UserWarning, match="experts' balance"):
            losses.append(trainer.get_batch_loss_metrics(trainer.model, batch_of(trainer))[0].item())
    assert losses[0] == pytest.approx(LN2, abs=1e-6) and losses[1] > losses[0] + 0.5


def test_model_init_makes_the_model_and_its_reference(make_args, tokenizer):  # D12
    for init in (lambda: hf_model("gpt2", seed=4), lambda trial: hf_model("gpt2", seed=4)):
        trainer = InOrder(model_init=init, args=make_args(), train_dataset=Dataset.from_list(ROWS), tokenizer=tokenizer,
                          peft_config=None)
        trainer.train()
        assert trainer.noted[0] == pytest.approx(LN2, abs=1e-7)
        assert not any(m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout))


def test_model_init_s_trained_adapter_is_compared_with_itself_as_it_was(make_args, tokenizer):
    """Trainer makes the model anew for each run: the reference belongs to the one that trains."""
    noted = []
    for how in ({"model": trained_lora(hf_model("gpt2"))}, {"model_init": lambda: trained_lora(hf_model("gpt2"))}):
        trainer = InOrder(**how, args=make_args(max_steps=3), train_dataset=Dataset.from_list(ROWS), tokenizer=tokenizer)
        trainer.train()
        noted.append(trainer.noted)
    assert noted[0] == pytest.approx(noted[1], abs=1e-5) and noted[0][0] == pytest.approx(LN2, abs=1e-6) and noted[0][2] < LN2 - 1e-3


def test_predict_takes_rows_as_evaluate_does(make):
    trainer, rows = make(), Dataset.from_list(ROWS[:2])
    trainer.train()
    want = trainer.evaluate(rows)["eval_loss"]
    assert trainer.predict(rows).metrics["test_loss"] == pytest.approx(want, abs=1e-6) and want != pytest.approx(LN2, abs=1e-4)


def test_a_batch_that_begins_with_an_empty_prompt_holds_whole_numbers(tokenizer):
    rows = [{"prompt_input_ids": [], "prompt_attention_mask": []}, {"prompt_input_ids": [5], "prompt_attention_mask": [1]}]
    assert DPODataCollatorWithPadding(0)(rows)["prompt_input_ids"].dtype == torch.long


def test_the_signature_s_defaults_can_be_used(tokenizer, monkeypatch, tmp_path):  # D13, G3
    monkeypatch.chdir(tmp_path)
    trainer = DPOTrainer(hf_model("gpt2"), train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)
    assert trainer.tokenizer is trainer.processing_class is tokenizer


def test_equal_seeds_draw_equal_adapters(make):  # G2
    drawn = []
    for noise in (1, 2):
        model = hf_model("llama")
        torch.manual_seed(noise)
        trainer = make(model, peft_config=lora())
        drawn.append(next(p for name, p in trainer.model.named_parameters() if "lora_A" in name))
    assert torch.equal(*drawn)


def test_a_loss_that_is_not_a_number_stops_the_run_before_a_weight_moves(make, weights, moved):
    trainer = make()
    with torch.no_grad():
        trainer.model.transformer.wte.weight[7] = math.nan
    before = weights(trainer.model)
    with pytest.raises(InputError, match="the loss is nan after 0 optimizer steps"):
        trainer.train()
    assert moved(before, trainer.model) <= {"transformer.wte.weight"}


# ------------------------------------------------------------------------------------------------ evaluation
def test_several_evaluation_sets(make):  # D11
    sets = {"a": Dataset.from_list(ROWS[:2]), "b": Dataset.from_list(ROWS[2:])}
    told = make(eval_dataset=sets).evaluate()
    assert {"eval_a_loss", "eval_b_rewards/accuracies"} <= set(told)


def test_compute_metrics_sees_both_rewards(make):
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        return {"right": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}

    told = make("gpt2", hf_model("gpt2", seed=1), eval_rows=ROWS, compute_metrics=metrics,
                preprocess_logits_for_metrics=lambda rewards, labels: rewards * 2).evaluate()
    assert seen[0].predictions.shape == (6, 2) and told["eval_right"] == told["eval_rewards/accuracies"]
    assert seen[0].predictions[:, 0].mean() == pytest.approx(2 * told["eval_rewards/chosen"], abs=1e-5)


def test_both_methods_called_get_batch_samples(make):
    trainer = make("gpt2")
    batch = batch_of(trainer)
    policy, reference = trainer.get_batch_samples(trainer.model, batch)
    assert len(policy) == len(reference) == len(ROWS) and policy[0].startswith("w4 w5 w6")
    loader = iter(trainer.get_train_dataloader())
    batches, pairs = trainer.get_batch_samples(loader, 2, torch.device("cpu"))
    assert len(batches) == 2 and pairs == 4


class Board:
    """Stands for a tracker's writer."""

    def __init__(self):
        self.texts = []

    def add_text(self, *args):
        self.texts.append(args)


@pytest.mark.parametrize("arch", ("gpt2", "t5"))
def test_samples_are_told_to_the_trackers_even_from_one_row(arch, make, monkeypatch):  # D21
    from transformers import TrainerCallback
    TensorBoardCallback = type("TensorBoardCallback", (TrainerCallback,), {"tb_writer": Board()})
    Table = lambda columns, data: (columns, data)
    wandb = type("wandb", (), {"Table": staticmethod(Table), "log": staticmethod(lambda told: tables.append(told))})
    WandbCallback, tables = type("WandbCallback", (TrainerCallback,), {"_wandb": wandb}), []
    monkeypatch.setattr("transformers.trainer.get_reporting_integration_callbacks", lambda names: [TensorBoardCallback(), WandbCallback()])
    trainer = make(arch, eval_rows=ROWS[:1], generate_during_eval=True, args={"report_to": "tensorboard"})
    trainer.evaluate()
    row = json.loads((Path(trainer.args.output_dir) / "samples.jsonl").read_text())
    assert row["prompt"] == "w4 w5 w6" and {"policy", "reference"} <= set(row)
    assert TensorBoardCallback.tb_writer.texts[0][0] == "game_log" and "w4 w5 w6" in TensorBoardCallback.tb_writer.texts[0][1]
    columns, data = tables[0]["game_log"]
    assert columns == ["prompt", "policy", "reference"] and len(data) == 1
    state = torch.get_rng_state()
    trainer._tell_samples(trainer.eval_dataset)
    assert torch.equal(torch.get_rng_state(), state)  # what is drawn there changes nothing in training


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize("kwargs, sentence", [
    ({"loss_type": "dpo"}, "loss_type='dpo': choose one of sigmoid, hinge, ipo, kto, kto_pair"),
    ({"beta": -0.1}, "beta=-0.1: give a number above 0"),
    ({"beta": 0}, "beta=0: give a number above 0"),
    ({"label_smoothing": 0.5}, "label_smoothing=0.5: give the share of wrong labels"),
    ({"truncation_mode": "middle"}, "truncation_mode='middle': choose keep_end or keep_start"),
    ({"tokenizer": None}, "tokenizer is missing"),
    ({"model_init": lambda: None}, "either model or model_init"),
    ({"model_init_kwargs": {}}, "model_init_kwargs are for a model given by name"),
    ({"ref_model_init_kwargs": {}}, "ref_model_init_kwargs are for a ref_model given by name"),
    ({"ref_adapter_name": "other"}, "the model has no adapter"),
    ({"rows": [{"prompt": "w4", "chosen": "w5"}]}, "train_dataset has the columns .* and lacks rejected"),
    ({"rows": [{"prompt": "w4", "chosen": "w5", "rejected": 7}]}, "row 0 can't be tokenised|rejected must be a text"),
    ({"rows": [{"prompt": None, "chosen": "w5", "rejected": "w6"}]}, "prompt must be a text"),
    ({"rows": None, "train_dataset": ROWS}, "train_dataset must be a datasets.Dataset, not a list")])
def test_bad_input_is_one_clear_sentence(kwargs, sentence, make):
    with pytest.raises(InputError, match=sentence):
        make(**kwargs)


def test_a_reference_that_would_train_along_is_refused(make):  # D24
    model = hf_model("gpt2")
    with pytest.raises(InputError, match="ref_model is model"):
        make(model, model)
    with pytest.raises(InputError, match="ref_model and peft_config are both given"):
        make(model, hf_model("gpt2", seed=1), peft_config=lora())
    with pytest.raises(InputError, match="has an adapter already"):
        make(trained_lora(model), peft_config=lora())


def test_a_tokenizer_without_pad_token_is_refused(make, make_tokenizer):
    with pytest.raises(ValueError, match="tokenizer.pad_token"):
        make(tokenizer=make_tokenizer(pad_token=None))


def test_smoothing_where_it_does_nothing_is_told(make):
    with pytest.warns(UserWarning, match="label_smoothing has no part in the loss hinge"):
        make(loss_type="hinge", label_smoothing=0.1)


def test_a_prompt_longer_than_everything_still_trains(make):
    rows = [{"prompt": " ".join(f"w{4 + i % 90}" for i in range(300)), "chosen": " w5 w6", "rejected": " w7"}] * 2
    trainer = make(rows=rows)
    assert max(map(len, trainer.train_dataset["chosen_input_ids"])) == 64
    trainer.train()
    assert trainer.noted[0] == pytest.approx(LN2, abs=1e-7)
