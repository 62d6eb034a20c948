"""iterative_sft.py: what a call of `step` learns, what Trainer gives beside it, and the script as a user runs it."""
import ast
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import (AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, DataCollatorForSeq2Seq,
                          EarlyStoppingCallback, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, T5Config,
                          T5ForConditionalGeneration, TrainerCallback, TrainingArguments)

import iterative_sft
import sft
from common import TOY, InputError, run
from conftest import BOS, CAUSAL, EOS, PAD, SEQ2SEQ, VOCAB, hf_model
from iterative_sft import (IGNORE, IterativeSFTConfig, IterativeSFTTrainer, best_of, collate, cross_entropy, draw_prompts, main,
                           make_row, next_tokens)

ROOT = Path(__file__).resolve().parent.parent
RECORDED = json.loads(Path(__file__).with_name("recorded_isft.json").read_text())


def tokens(*lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCAB, (n,), generator=draw) for n in lengths]


def text(ids):
    return " ".join(f"w{i}" for i in ids.tolist())


def still(arch="gpt2", **changes):
    """A model without dropout, for numbers that must be equal."""
    off = {"gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"), "t5": ("dropout_rate",)}.get(arch, ("attention_dropout",))
    return hf_model(arch, **{name: 0.0 for name in off}, **changes)


@pytest.fixture
def make(tmp_path, tokenizer):
    """make("gpt2" or a model, parts of the trainer, **fields of TrainingArguments) -> IterativeSFTTrainer."""
    def make(model="gpt2", parts=(), **fields):
        fields = {"output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "max_steps": 100,
                  "learning_rate": 1e-3, "lr_scheduler_type": "constant", "save_strategy": "no", "disable_tqdm": True,
                  "logging_strategy": "no", **fields}
        model = still(model) if isinstance(model, str) else model
        return IterativeSFTTrainer(model, TrainingArguments(**fields), **{"tokenizer": tokenizer, **dict(parts)})

    return make


class Watch(TrainerCallback):
    """Notes the events and what is logged."""

    def __init__(self):
        self.events, self.logs = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({**logs, "step": state.global_step})


for event in ("train_begin", "epoch_begin", "step_begin", "substep_end", "pre_optimizer_step", "optimizer_step", "step_end",
              "epoch_end", "save", "evaluate", "train_end"):
    def note(self, args, state, control, event=event, **kwargs):
        self.events.append(event)
    setattr(Watch, f"on_{event}", note)


def nll(model, ids, labels=None):
    """Mean cross-entropy of a row, written out: -log softmax(logits_t)[y_t+1] where y_t+1 is learnt."""
    labels = ids if labels is None else labels
    with torch.no_grad():
        logp = model.eval()(input_ids=ids[None]).logits[0].float().log_softmax(-1)
    told = [-logp[t, labels[t + 1]].item() for t in range(len(ids) - 1) if labels[t + 1] != IGNORE]
    return sum(told), len(told)


# ------------------------------------------------------------------------------------------------ data and mathematics
def test_what_a_token_is_to_predict_is_the_label_after_it():
    assert next_tokens(torch.tensor([[5, 6, 7], [8, IGNORE, 9]])).tolist() == [[6, 7, IGNORE], [IGNORE, 9, IGNORE]]


def test_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    assert cross_entropy(logits.clone(), torch.tensor([0, 0])).tolist() == pytest.approx([math.log(2), math.log(4 / 3)])


def test_label_smoothing_spreads_its_share_over_the_vocabulary():
    logits, targets = torch.randn(5, 7), torch.randint(7, (5,))
    want = F.cross_entropy(logits, targets, label_smoothing=0.2, reduction="none")
    torch.testing.assert_close(cross_entropy(logits, targets, 0.2), want)


@pytest.mark.parametrize("name", ["next_tokens", "cross_entropy"])
def test_same_name_means_same_code(name):
    assert inspect.getsource(getattr(iterative_sft, name)) == inspect.getsource(getattr(sft, name))


def test_the_best_of_n_are_kept_the_first_of_equals():
    assert best_of(torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 4.0]]), 1).tolist() == [[1], [0]]
    assert best_of(torch.tensor([[1.0, 3.0, 2.0]]), 2).tolist() == [[1, 2]]


def test_prompts_are_an_endless_stream_in_which_every_row_comes_once_a_pass():
    stream = [draw_prompts(list(range(5)), start, 3, seed=1) for start in range(0, 15, 3)]
    flat = sum(stream, [])
    assert [sorted(flat[i:i + 5]) for i in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert flat[:5] != flat[5:10]
    assert draw_prompts(list(range(2)), 1, 7, seed=1) == draw_prompts(list(range(2)), 0, 8, seed=1)[1:]


def test_a_row_leaves_out_what_the_attention_mask_hides():
    row = make_row([9, 5, 6, 7], [0, 1, 1, 1], [9, 5, IGNORE, 7], seq2seq=False)
    assert row["input_ids"].tolist() == [5, 6, 7] and row["labels"].tolist() == [5, IGNORE, 7]
    row = make_row([5, 6, 9], [1, 1, 0], [7, 8, 9, 4], seq2seq=True)  # an encoder-decoder's labels are another text
    assert row["input_ids"].tolist() == [5, 6] and row["labels"].tolist() == [7, 8, 9, 4]


def test_a_batch_is_padded_on_the_right_as_far_as_its_longest_row():
    batch = collate([make_row(ids, seq2seq=False) for ids in ([5, 6, 7], [8, 9])], pad_token_id=EOS)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, 9, IGNORE]]


# ------------------------------------------------------------------------------------------------ the step
def test_the_loss_is_the_mean_over_all_tokens_that_are_learnt(make):
    trainer, rows = make(), tokens(3, 9, 5)
    sums, counts = zip(*(nll(trainer.model, row) for row in rows))
    stats = trainer.step(rows)
    assert stats["loss"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert stats["tokens"] == sum(counts) == 14 and stats["optimizer_steps"] == 1
    assert stats["learning_rate"] == 1e-3 and stats["grad_norm"] > 0


def test_a_step_goes_downhill(make):
    trainer, rows = make(learning_rate=1e-2), tokens(5, 7)
    losses = [trainer.step(rows)["loss"] for _ in range(8)]
    assert losses[-1] < losses[0] - 1


def test_the_gradient_is_that_of_the_written_out_loss(make):
    trainer, rows = make(max_grad_norm=0), tokens(6, 4)
    reference, seen = still(), {}
    losses = [F.cross_entropy(reference(row[None]).logits[0, :-1], row[1:], reduction="sum") for row in rows]
    (sum(losses) / 8).backward()

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.update({name: p.grad.clone() for name, p in model.named_parameters()})

    trainer.add_callback(Look())
    trainer.step(rows)
    for name, p in reference.named_parameters():
        torch.testing.assert_close(seen[name], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("arch", CAUSAL)
def test_padding_changes_nothing(make, arch):
    short, long = tokens(4, 12)
    trainer = make(arch)
    alone = nll(trainer.model, short)[0] + nll(trainer.model, long)[0]
    assert trainer.step([short, long])["loss"] == pytest.approx(alone / 14, rel=1e-4)


@pytest.mark.parametrize("arch", [*CAUSAL, *SEQ2SEQ])
def test_every_architecture_learns(make, arch):
    trainer = make(arch, learning_rate=1e-2)
    x, y = tokens(6, 8), tokens(5, 3, seed=1)
    call = {"input_ids": x, "labels": y} if arch in SEQ2SEQ else {"input_ids": x}
    losses = [trainer.step(**call)["loss"] for _ in range(6)]
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))


@pytest.mark.parametrize("arch", SEQ2SEQ)
def test_an_encoder_decoder_learns_labels_from_the_models_own_shift(make, arch):
    model = hf_model(arch, dropout_rate=0.0) if arch == "t5" else hf_model(arch, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    trainer, x, y = make(model), tokens(6, 4), tokens(3, 5, seed=1)
    with torch.no_grad():
        want = sum(model.eval()(input_ids=a[None], labels=b[None]).loss * len(b) for a, b in zip(x, y)) / 8
    stats = trainer.step(x, labels=y)
    assert stats["loss"] == pytest.approx(want.item(), rel=1e-4) and stats["tokens"] == 8


def test_lists_of_numbers_are_as_good_as_tensors(make):
    rows = tokens(5, 7)
    assert make().step([row.tolist() for row in rows])["loss"] == make().step(rows)["loss"]


def test_an_optimizer_step_takes_batch_size_times_accumulation_rows(make):
    trainer = make(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert trainer.step(tokens(*[5] * 11))["optimizer_steps"] == 3  # of 4, 4 and 3 rows
    assert trainer.state.global_step == 3 and trainer.state.epoch == 1


def test_rows_come_in_another_order_in_every_call_and_in_the_same_in_every_run(make, monkeypatch):
    orders, randperm = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: orders.append(randperm(*a, **k).tolist()) or torch.tensor(orders[-1]))
    for _ in range(2):
        trainer = make()
        trainer.step(tokens(*[4] * 8)), trainer.step(tokens(*[4] * 8))
    assert orders[0] == orders[2] != orders[1] == orders[3]


def test_gradients_stay_on_the_parameters_where_the_optimizer_zeroes_them(make):
    trainer = make()
    zero = trainer.optimizer.zero_grad
    trainer.optimizer.zero_grad = lambda: zero(set_to_none=False)
    trainer.step(tokens(5))
    assert all(p.grad is not None for p in trainer.model.parameters())


def test_the_cache_of_the_accelerator_is_handed_back_after_each_optimizer_step(make, monkeypatch):
    calls = []
    monkeypatch.setattr(iterative_sft, "clear_device_cache", lambda **kwargs: calls.append(1))
    make(parts={"optimize_device_cache": True}).step(tokens(5))
    assert calls == [1]
    make().step(tokens(5))
    assert calls == [1]


# ------------------------------------------------------------------------------------------------ defects of 0.7.10
def test_i1_given_labels_are_learnt_and_nothing_else(make):
    trainer, (ids,) = make(), tokens(8)
    labels = torch.cat([torch.full((5,), IGNORE), ids[5:]])
    total, count = nll(trainer.model, ids, labels)
    stats = trainer.step([ids], labels=[labels])
    assert count == stats["tokens"] == 3 and stats["loss"] == pytest.approx(total / 3, rel=1e-5)


def test_i2_texts_labels_are_what_an_encoder_decoder_learns(make):
    x, y = tokens(6, 4), tokens(3, 5, seed=1)
    by_text = make("t5").step(texts=list(map(text, x)), texts_labels=list(map(text, y)))
    assert by_text == make("t5").step(x, labels=y)


@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
@pytest.mark.parametrize("kind", ["input_ids", "texts"])
def test_i3_max_length_cuts_the_tokens_of_a_row_and_drops_no_row(make, mode, kind):
    rows = tokens(9, 4, 7)
    cut = [row[-5:] if mode == "keep_end" else row[:5] for row in rows]
    call = {kind: rows if kind == "input_ids" else list(map(text, rows))}
    stats = make(parts={"max_length": 5, "truncation_mode": mode}).step(**call)
    assert stats == make().step(cut) and stats["tokens"] == 4 + 3 + 4


def test_i3_an_encoder_decoders_labels_are_cut_too(make):
    x, y = tokens(9), tokens(7, seed=1)
    assert make("t5", {"max_length": 5}).step(x, labels=y) == make("t5").step([x[0][-5:]], labels=[y[0][-5:]])


def test_i3_special_tokens_of_a_text_outlive_the_cut(make, tokenizer):
    from tokenizers.processors import TemplateProcessing
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)])
    trainer = make(parts={"max_length": 4, "tokenizer": tokenizer})
    assert trainer._tokens(["w5 w6 w7 w8"], "texts") == [[BOS, 7, 8, EOS]]


def test_i4_labels_default_to_the_inputs(make):
    rows = tokens(6, 4)
    assert make().step(rows) == make().step(rows, labels=[row.clone() for row in rows])
    words = list(map(text, rows))
    assert make().step(texts=words) == make().step(texts=words, texts_labels=words)


def lora(model):
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def test_i5_an_adapter_trains_and_its_base_does_not(make, weights, moved):
    model = lora(still("llama"))
    before, trainer = weights(model), make(model, learning_rate=1e-2)
    losses = [trainer.step(tokens(6, 8))["loss"] for _ in range(5)]
    names = moved(before, model)
    assert losses[-1] < losses[0] and names and all("lora" in name for name in names)


def test_i6_step_returns_its_statistics(make):
    assert set(make().step(tokens(5))) == {"loss", "grad_norm", "learning_rate", "tokens", "optimizer_steps"}


def test_i7_global_step_max_steps_and_schedule_count_optimizer_steps(make):
    trainer = make(per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=4, lr_scheduler_type="linear")
    watch = Watch()
    trainer.add_callback(watch)
    rates = [trainer.step(tokens(*[5] * 8))["learning_rate"] for _ in range(2)]
    assert trainer.state.global_step == 4 and trainer.control.should_training_stop
    assert rates == pytest.approx([0.75e-3, 0.25e-3])  # before the 2nd and the 4th of 4 steps down to 0
    assert watch.events.count("step_end") == 4 and watch.events.count("substep_end") == 12


def test_i7_a_call_ends_where_max_steps_does(make):
    trainer = make(per_device_train_batch_size=1, max_steps=3)
    assert trainer.step(tokens(*[5] * 8))["optimizer_steps"] == 3
    with pytest.raises(InputError, match="training has ended after 3 optimizer steps"):
        trainer.step(tokens(5))


def test_i7_without_max_steps_training_has_no_end(make):
    trainer = make(max_steps=-1, lr_scheduler_type="linear")
    assert [trainer.step(tokens(5))["learning_rate"] for _ in range(3)] == pytest.approx([1e-3] * 3)


def test_i8_checkpoints_are_written_and_callbacks_run(make, tmp_path):
    trainer, watch = make(save_strategy="steps", save_steps=1, max_steps=2, logging_strategy="steps", logging_steps=1), Watch()
    trainer.add_callback(watch)
    trainer.step(tokens(5)), trainer.step(tokens(5))
    a_call = ["epoch_begin", "step_begin", "pre_optimizer_step", "optimizer_step", "step_end", "save", "epoch_end"]
    assert watch.events == ["train_begin", *a_call, *a_call, "train_end"]
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "tokenizer.json"):
        assert (tmp_path / "out" / "checkpoint-2" / name).exists(), name
    assert [log["step"] for log in watch.logs if "loss" in log] == [1, 2] and "train_loss" in watch.logs[-1]


@pytest.mark.parametrize("what", ["save", "eval", "logging"])
def test_i8_a_call_of_step_is_an_epoch_of_trainers(make, what):
    data = Dataset.from_list([{"input_ids": row.tolist()} for row in tokens(5, 6)])
    trainer, watch = make(parts={"eval_dataset": data}, per_device_train_batch_size=1, **{f"{what}_strategy": "epoch"}), Watch()
    trainer.add_callback(watch)
    trainer.step(tokens(5, 5, 5)), trainer.step(tokens(5, 5, 5))
    told = {"save": watch.events.count("save"), "eval": watch.events.count("evaluate"),
            "logging": sum("loss" in log for log in watch.logs)}
    assert told[what] == 2


def test_i8_a_callback_may_end_the_training(make):
    data = Dataset.from_list([{"input_ids": [5, 6, 7]}])
    trainer = make(parts={"eval_dataset": data}, learning_rate=10.0, eval_strategy="epoch", save_strategy="epoch",
                   load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=False)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    for _ in range(6):
        if trainer.control.should_training_stop:
            break
        trainer.step(tokens(8, 8))
    assert trainer.control.should_training_stop and trainer.state.global_step < 6
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)  # the best was loaded again


def test_i9_rows_are_padded_to_the_longest_of_their_micro_batch_alone(make):
    trainer, widths = make(per_device_train_batch_size=1), []
    trainer.model.register_forward_pre_hook(lambda m, a, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    trainer.step(tokens(4, 12, 6))
    assert sorted(widths) == [4, 6, 12]


def test_i10_the_callers_tokenizer_is_left_as_it_is(make, tokenizer):
    before = {name: getattr(tokenizer, name) for name in ("truncation_side", "padding_side", "pad_token", "model_max_length")}
    trainer = make(parts={"max_length": 3})
    trainer.step(texts=["w5 w6 w7 w8 w9"])
    assert {name: getattr(tokenizer, name) for name in before} == before and tokenizer.backend_tokenizer.truncation is None
    assert trainer.tokenizer is tokenizer is trainer.processing_class


def test_i10_args_have_a_default(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = still()
    before = model.transformer.wte.weight.detach().clone()
    assert IterativeSFTTrainer(model, tokenizer=tokenizer).step(tokens(5))["learning_rate"] > 0
    assert not torch.equal(before, model.transformer.wte.weight)


@pytest.mark.parametrize("collator", [None, DataCollatorForLanguageModeling, DataCollatorForSeq2Seq])
def test_i10_an_end_of_sequence_that_pads_is_learnt_where_it_ends_a_text(make, make_tokenizer, collator):
    tokenizer = make_tokenizer(pad_token="</s>")
    kwargs = {"mlm": False} if collator is DataCollatorForLanguageModeling else {}
    trainer = make(parts={"tokenizer": tokenizer, "data_collator": collator and collator(tokenizer, **kwargs)})
    assert trainer.step([torch.tensor([5, 6, EOS]), torch.tensor([7, 8, 9, 4, EOS])])["tokens"] == 2 + 4


# ------------------------------------------------------------------------------------------------ collators
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("collator", [DataCollatorForLanguageModeling, DataCollatorForSeq2Seq])
def test_a_collator_of_ones_own_gives_the_same_numbers_whatever_side_it_pads(make, make_tokenizer, side, collator):
    tokenizer, rows = make_tokenizer(padding_side=side), tokens(5, 9, 3)
    labels = [torch.cat([torch.full_like(row[:2], IGNORE), row[2:]]) for row in rows]
    kwargs = {"mlm": False} if collator is DataCollatorForLanguageModeling else {"pad_to_multiple_of": 8}
    own = make(parts={"tokenizer": tokenizer, "data_collator": collator(tokenizer, **kwargs)}).step(rows, labels=labels)
    want = make().step(rows, labels=labels)
    assert own["tokens"] == want["tokens"] and own["loss"] == pytest.approx(want["loss"], rel=1e-5)
    assert own["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)


def test_a_collator_may_make_labels_of_its_own(make):
    def last_token_only(rows):
        batch = collate(rows, PAD)
        keep = batch["attention_mask"].sum(1) - 1
        batch["labels"] = torch.full_like(batch["labels"], IGNORE).scatter(1, keep[:, None], batch["input_ids"].gather(1, keep[:, None]))
        return batch

    assert make(parts={"data_collator": last_token_only}).step(tokens(5, 9, 3))["tokens"] == 3


# ------------------------------------------------------------------------------------------------ TRL 0.7.10's figures
def fill(model, seed, scale):
    """Weights drawn by a generator whose stream is frozen, name after name; those of norms around 1."""
    draw = np.random.RandomState(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            norm = "weight" in name and ("ln_" in name or "layer_norm" in name)
            p.copy_(torch.tensor(scale * draw.standard_normal(tuple(p.shape)), dtype=torch.float32) + norm)
    return model


def build(kind):
    tokens = {"vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOS}
    if kind == "t5":
        return fill(T5ForConditionalGeneration(T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, dropout_rate=0.0,
                                                        decoder_start_token_id=PAD, **tokens)), 3, 0.2)
    return fill(GPT2LMHeadModel(GPT2Config(n_positions=48, n_embd=32, n_layer=2, n_head=2, bos_token_id=BOS, resid_pdrop=0.0,
                                           attn_pdrop=0.0, embd_pdrop=0.0, **tokens)), 3, 0.15)


def changes(before, model):
    """{parameter: [norm of its change, the change's product with cos(0.7 i + 0.3)]}"""
    told = {}
    for name, p in model.named_parameters():
        change = (p.detach().double() - before[name].double()).flatten()
        if name.endswith("c_attn.bias"):  # a bias of the keys has no gradient but rounding, of which Adam makes a step
            change[len(change) // 3:2 * len(change) // 3] = 0
        probe = torch.cos(torch.arange(len(change), dtype=torch.float64) * 0.7 + 0.3)
        told[name] = [change.norm().item(), (change @ probe).item()]
    return told


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: case["name"])
def test_the_figures_of_trl(case, make, weights, monkeypatch):
    model, parts, losses = build(case["model"]), dict(case["isft"]), []
    if "optimizer" in case:
        how = dict(case["optimizer"])
        optimizer = getattr(torch.optim, how.pop("name"))(model.parameters(), **how)
        parts["optimizers"] = (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    trainer = make(model, parts, **{"lr_scheduler_type": "linear", "max_grad_norm": 1.0, **case["args"]})
    before, orders, compute_loss = weights(model), iter(case["permutations"]), trainer.compute_loss
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.tensor(next(orders)))
    monkeypatch.setattr(trainer, "compute_loss", lambda *a, **k: losses.append(compute_loss(*a, **k)) or losses[-1])
    for call in case["calls"]:
        trainer.step(**{name: [torch.tensor(row) if name in ("input_ids", "labels") else row for row in rows]
                        for name, rows in call.items()})
    # theirs are means of micro-batches; here each is its share of the optimizer step
    got = torch.tensor([loss.item() for loss in losses]) * case["args"].get("gradient_accumulation_steps", 1)
    torch.testing.assert_close(got, torch.tensor(sum(case["losses"], [])), rtol=1e-4, atol=5e-6)
    told = changes(before, model)
    for name, (norm, product) in case["weights"].items():
        torch.testing.assert_close(torch.tensor(told[name]), torch.tensor([norm, product]), rtol=0, atol=6e-3 * norm + 1e-7)


# ------------------------------------------------------------------------------------------------ what Trainer gives
def state_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_close(a, b, atol=1e-5):
    for name in a:
        # the keys' bias of GPT-2 has no gradient but rounding, of which Adam makes a whole step
        if not name.endswith("c_attn.bias"):
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("arch", ["gpt2", "t5"])
def test_gradient_accumulation_is_one_big_batch_whatever_the_lengths(make, arch):
    rows, ends = [], []
    for size, steps in ((8, 1), (2, 4), (1, 8)):
        trainer = make(arch, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        rows.append([trainer.step(tokens(3, 15, 2, 9, 4, 4, 12, 6, seed=i)) for i in range(2)])
        ends.append(state_of(trainer))
    for stats in rows[1:]:
        for a, b in zip(stats, rows[0]):
            assert a == pytest.approx(b, rel=1e-4)
    for end in ends[1:]:
        assert_close(end, ends[0])


@pytest.mark.parametrize("adapter", [False, True])
def test_a_resumed_run_gives_the_numbers_of_the_uninterrupted_one(make, adapter, tmp_path):
    model = lambda: lora(hf_model("llama")) if adapter else hf_model("gpt2")  # with dropout: its random numbers are kept too
    fields = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear", "max_steps": 6, "save_total_limit": 4}
    calls = [tokens(5, 9, 7, 3, seed=i) for i in range(6)]
    whole = make(model(), **fields)
    want = [whole.step(call) for call in calls]
    again = make(model(), **fields)
    again.load_checkpoint(tmp_path / "out" / "checkpoint-2")
    assert again.state.global_step == 2 and again.state.epoch == 2
    assert [again.step(call) for call in calls[2:]] == want[2:]
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters()))


def test_gradient_checkpointing_with_lora_really_trains(make, monkeypatch):
    import torch.utils.checkpoint as module
    runs, calls, checkpoint = [], [], module.checkpoint
    monkeypatch.setattr(module, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    for on in (False, True):
        trainer = make(lora(still("llama")), gradient_checkpointing=on)
        runs.append([trainer.step(tokens(6, 9, seed=i))["loss"] for i in range(3)])
        ends = state_of(trainer)
        assert any("lora_B" in name and p.abs().sum() > 0 for name, p in ends.items())
    assert runs[1] == pytest.approx(runs[0], rel=1e-5) and runs[1][2] != runs[1][0]
    assert trainer.model.base_model.model.is_gradient_checkpointing


def test_bf16_trains_close_to_float32(make):
    losses = [[trainer.step(tokens(6, 9))["loss"] for _ in range(4)] for trainer in (make(), make(bf16=True, use_cpu=True))]
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]
    assert losses[1][3] < losses[1][0]


def test_label_smoothing_weight_decay_and_clipping_reach_the_update(make):
    plain = make().step(tokens(6, 9))
    assert make(label_smoothing_factor=0.1).step(tokens(6, 9))["loss"] != plain["loss"]
    trainer = make(max_grad_norm=1e-9, optim="sgd", learning_rate=1.0)
    before = state_of(trainer)
    trainer.step(tokens(6, 9))
    assert_close(before, state_of(trainer), atol=2e-9)


def test_noise_on_the_embeddings_is_on_in_training_also_after_a_resume(make, tmp_path):
    plain = make().step(tokens(6, 9))["loss"]
    trainer = make(neftune_noise_alpha=5.0, save_strategy="steps", save_steps=1)
    first, second = trainer.step(tokens(6, 9)), trainer.step(tokens(6, 9))
    again = make(neftune_noise_alpha=5.0)
    again.load_checkpoint(tmp_path / "out" / "checkpoint-1")
    assert first["loss"] != plain and again.step(tokens(6, 9)) == second
    assert len(again.model.get_input_embeddings()._forward_hooks) == 1


def test_tensorboard_gets_the_losses(make, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "logs")
    trainer = make(report_to="tensorboard", logging_strategy="steps", logging_steps=1, max_steps=3)
    losses = [trainer.step(tokens(6, 9))["loss"] for _ in range(3)]
    events = EventAccumulator(str(next((tmp_path / "logs").rglob("events*")).parent))
    events.Reload()
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses, rel=1e-3)


def test_what_is_saved_loads_as_a_plain_model_with_its_tokenizer(make, tmp_path):
    trainer = make()
    trainer.step(tokens(6))
    trainer.save_model(str(tmp_path / "kept"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "kept")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), trainer.model.parameters()))
    assert AutoTokenizer.from_pretrained(tmp_path / "kept")("w5 w6").input_ids == [5, 6]


@pytest.mark.parametrize("arch", ["gpt2", "t5"])
def test_the_evaluation_loss_is_the_mean_over_all_tokens_not_over_batches(make, arch):
    rows = [{"input_ids": x.tolist(), "labels": y.tolist() if arch == "t5" else x.tolist()}
            for x, y in zip(tokens(3, 15, 6), tokens(9, 2, 4, seed=1))]
    losses = [make(arch, {"eval_dataset": Dataset.from_list(rows)}, per_device_eval_batch_size=n).evaluate()["eval_loss"]
              for n in (1, 2, 3)]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)
    if arch == "gpt2":
        sums, counts = zip(*(nll(still(), torch.tensor(row["input_ids"])) for row in rows))
        assert losses[0] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)


def test_an_evaluation_set_may_hold_texts(make):
    rows = tokens(5, 9)
    by_text = make(parts={"eval_dataset": Dataset.from_list([{"text": text(row)} for row in rows])}).evaluate()["eval_loss"]
    assert by_text == make().evaluate(Dataset.from_list([{"input_ids": row.tolist()} for row in rows]))["eval_loss"]
    answers = Dataset.from_list([{"text": "w5 w6", "text_labels": "w7"}])
    assert make("t5", {"eval_dataset": answers}).evaluate()["eval_loss"] > 0


def test_metrics_are_computed_from_all_logits(make):
    seen = {}

    def accuracy(prediction):
        seen["shapes"] = prediction.predictions.shape, prediction.label_ids.shape
        return {"accuracy": float((prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]).mean())}

    data = Dataset.from_list([{"input_ids": row.tolist()} for row in tokens(6, 6)])
    trainer = make(parts={"eval_dataset": data, "compute_metrics": accuracy,
                          "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)})
    metrics = trainer.evaluate()
    assert seen["shapes"] == ((2, 6), (2, 6)) and "eval_accuracy" in metrics and metrics["eval_loss"] > 0


def test_only_the_logits_of_tokens_that_are_learnt_are_computed(make):
    trainer, sizes = make(), []
    trainer.model.lm_head.register_forward_hook(lambda m, a, out: sizes.append(tuple(out.shape)))
    rows = tokens(9, 5)
    trainer.step(rows, labels=[torch.cat([torch.full_like(row[:-2], IGNORE), row[-2:]]) for row in rows])
    assert sizes == [(4, VOCAB)]


def test_train_says_to_call_step(make):
    with pytest.raises(InputError, match="call step"):
        make().train()


# ------------------------------------------------------------------------------------------------ bad input
IDS, WORDS = tokens(5, 6), ["w5 w6 w7", "w8 w9"]


@pytest.mark.parametrize("call, says", [
    ({}, "neither is given"),
    ({"input_ids": IDS, "texts": WORDS}, "give one, not both"),
    ({"input_ids": []}, "input_ids is empty"),
    ({"texts": []}, "texts is empty"),
    ({"input_ids": torch.stack([IDS[0], IDS[0]])}, "input_ids must be a list, not a Tensor"),
    ({"input_ids": IDS, "labels": IDS[:1]}, "labels must be a list of 2, one for each of input_ids, not a list of 1"),
    ({"input_ids": IDS, "attention_mask": IDS * 2}, "attention_mask must be a list of 2"),
    ({"texts": WORDS, "texts_labels": WORDS[:1]}, "texts_labels must be a list of 2"),
    ({"texts": WORDS, "texts_labels": "w5"}, "texts_labels must be a list of 2, one for each of texts, not a str"),
    ({"texts": WORDS, "labels": IDS}, "labels goes with input_ids, and texts are given"),
    ({"input_ids": IDS, "texts_labels": WORDS}, "texts_labels goes with texts, and input_ids are given"),
    ({"texts": ["w5 w6", 7]}, r"texts\[1\] must be a string, not a int"),
    ({"texts": ["w5 w6", ""]}, r"texts\[1\] has no token to learn"),
    ({"texts": WORDS, "texts_labels": ["w5 w6 w7", "w8"]}, r"texts\[1\]: labels has the shape \[1\], input_ids \[2\]"),
    ({"input_ids": IDS, "labels": IDS[::-1]}, r"input_ids\[0\]: labels has the shape \[6\]"),
    ({"input_ids": IDS, "labels": [IDS[0], torch.full((6,), IGNORE)]}, r"input_ids\[1\] has no token to learn"),
    ({"input_ids": [IDS[0], IDS[0][:1]]}, r"input_ids\[1\] has no token to learn, where the first has nothing to be predicted from"),
    ({"input_ids": [IDS[0], torch.zeros(0)]}, r"input_ids\[1\] has no token to learn"),
    ({"input_ids": [IDS[0], IDS[0][None]]}, r"input_ids\[1\].*one dimension"),
    ({"input_ids": [IDS[0], "w5"]}, "input_ids can't be read"),
    ({"input_ids": tokens(65)}, "65 tokens, and the model takes 64: set max_length"),
])
def test_bad_rows_are_told_in_one_sentence_before_any_weight_has_moved(make, call, says):
    trainer = make()
    before = state_of(trainer)
    with pytest.raises(InputError, match=says) as error:
        trainer.step(**call)
    assert "\n" not in str(error.value)
    assert trainer.state.global_step == 0 and all(torch.equal(before[name], p) for name, p in state_of(trainer).items())


@pytest.mark.parametrize("parts, says", [
    ({"truncation_mode": "keep_middle"}, "truncation_mode='keep_middle': choose keep_end or keep_start"),
    ({"max_length": 1}, "max_length=1 leaves nothing to learn: give 2 or more"),
    ({"max_length": 0}, "max_length=0 leaves nothing"),
])
def test_bad_arguments_are_told_in_one_sentence(make, parts, says):
    with pytest.raises(InputError, match=says):
        make(parts=parts)


def test_a_model_that_is_no_language_model_is_refused(make):
    with pytest.raises(InputError, match="language model, not GPT2ForSequenceClassification"):
        make(GPT2ForSequenceClassification(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)))
    with pytest.raises(InputError, match="not NoneType"):
        IterativeSFTTrainer()


def test_a_row_whose_learnt_tokens_are_all_cut_off_is_named_with_the_cut(make):
    labels = torch.cat([IDS[0][:2], torch.full_like(IDS[0][2:], IGNORE)])
    with pytest.raises(InputError, match=r"input_ids\[0\] has no token to learn of the max_length=3 tokens that stay"):
        make(parts={"max_length": 3}).step([IDS[0]], labels=[labels])


def test_a_share_of_max_steps_needs_max_steps(make):
    with pytest.raises(InputError, match="warmup_steps=0.1 is a share of max_steps"):
        make(max_steps=-1, warmup_steps=0.1)


def test_a_tokenizer_without_pad_is_good_enough(make, make_tokenizer):
    bare = make_tokenizer(pad_token=None)
    assert make(parts={"tokenizer": bare}).step(tokens(5, 9)) == make().step(tokens(5, 9))
    with pytest.raises(InputError, match="data_collator failed:.*pad"):
        make(parts={"tokenizer": bare, "data_collator": DataCollatorForSeq2Seq(bare)}).step(tokens(5, 9))


def test_texts_need_a_tokenizer(make):
    trainer = make(parts={"tokenizer": None})
    assert trainer.step(tokens(5, 9))["tokens"] == 12
    with pytest.raises(InputError, match="texts need a tokenizer"):
        trainer.step(texts=WORDS)


def test_evaluation_rows_without_tokens_or_text_are_told(make):
    with pytest.raises(InputError, match=r"eval_dataset has rows of \['labels'\]"):
        make().evaluate(Dataset.from_list([{"labels": [5, 6]}]))


def test_a_loss_that_is_no_number_stops_the_run(make):
    trainer = make()
    trainer.model.transformer.ln_f.weight.data.fill_(math.inf)
    with pytest.raises(InputError, match="the loss is nan after 0 optimizer steps"):
        trainer.step(tokens(5))


@pytest.mark.parametrize("spoil", ["model.safetensors", "trainer_state.json", "optimizer.pt"])
def test_a_corrupt_checkpoint_is_told_in_one_sentence(make, tmp_path, spoil):
    trainer = make(save_strategy="steps", save_steps=1, max_steps=1)
    trainer.step(tokens(5))
    (tmp_path / "out" / "checkpoint-1" / spoil).write_bytes(b"half of it")
    with pytest.raises(InputError, match="checkpoint .*checkpoint-1 can't be loaded; give an older one"):
        make().load_checkpoint(tmp_path / "out" / "checkpoint-1")


# ------------------------------------------------------------------------------------------------ the script
def metrics(folder):
    """metrics.jsonl without the clock."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "train_runtime" not in row]


def small(folder, **fields):
    return IterativeSFTConfig(**{"output_dir": str(folder), "prompts_per_round": 4, "num_samples": 3, "max_new_tokens": 6,
                                 "per_device_train_batch_size": 2, "num_train_epochs": 3, "save_steps": 2, "save_total_limit": None,
                                 "disable_tqdm": True, **fields})


SMALL = ["--prompts-per-round", 4, "--num-samples", 3, "--max-new-tokens", 6, "--per-device-train-batch-size", 2, "--save-steps", 2]


def test_a_run_leaves_model_samples_metrics_and_card(tmp_path, capsys):
    main(small(tmp_path, disable_tqdm=False))
    told = capsys.readouterr()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = AutoModelForCausalLM.from_pretrained(TOY / "model")
    assert any((a != b).any() for a, b in zip(model.parameters(), before.parameters()))
    assert AutoTokenizer.from_pretrained(tmp_path).decode([5])
    rounds = [row for row in metrics(tmp_path) if "objective/scores" in row]
    assert [row["update"] for row in rounds] == [2, 4, 6] and [row["epoch"] for row in rounds] == [1, 2, 3]
    assert all(row["objective/scores_best"] > row["objective/scores"] for row in rounds)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["update"] for row in samples] == [0] * 8 + [6] * 8
    assert "own best answers" in (tmp_path / "README.md").read_text()
    assert "before training" in told.out and "after training" in told.out and "6/6" in told.err


def test_the_toy_score_rises_within_a_few_rounds(tmp_path):
    stats = main(small(tmp_path, prompts_per_round=32, num_samples=8, max_new_tokens=24, per_device_train_batch_size=32,
                       num_train_epochs=10, learning_rate=1e-3, save_strategy="no"))
    first = next(row for row in metrics(tmp_path) if "objective/scores" in row)
    assert stats["objective/scores"] > first["objective/scores"] + first["objective/scores_std"]


def test_only_answers_are_learnt_and_they_are_the_best_ones(tmp_path, monkeypatch):
    (tmp_path / "longest.py").write_text("def score(texts):\n    return [len(text) for text in texts]\n")
    calls, step = [], IterativeSFTTrainer.step
    monkeypatch.setattr(IterativeSFTTrainer, "step", lambda self, **rows: calls.append(rows) or step(self, **rows))
    stats = main(small(tmp_path / "out", num_train_epochs=1, reward_model=f"{tmp_path}/longest.py:score"))
    assert stats["objective/scores_best"] > stats["objective/scores"]
    for ids, labels in zip(calls[0]["input_ids"], calls[0]["labels"], strict=True):
        prompt = int((labels == IGNORE).sum())
        assert prompt >= 3 and torch.equal(ids[prompt:], labels[prompt:]) and (labels[:prompt] == IGNORE).all()
        assert 1 <= len(ids) - prompt <= 6


def test_a_killed_run_goes_on_to_exactly_the_same_numbers(tmp_path):
    flags = [*SMALL, "--num-train-epochs", 6]
    run = subprocess.Popen([sys.executable, "iterative_sft.py", *map(str, flags), "--output-dir", str(tmp_path / "cut")], cwd=ROOT,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "cut").glob("checkpoint-*/trainer_state.json")):
        assert run.poll() is None, "the run ended before it was killed"
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    main(small(tmp_path / "whole", num_train_epochs=6))
    main(small(tmp_path / "cut", num_train_epochs=6, resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2")))
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole") and len(metrics(tmp_path / "cut")) == 18
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_lora_trains_and_resumes_and_goes_on_from_its_folder(tmp_path):
    fields = {"lora_r": 4, "learning_rate": 1e-2}
    main(small(tmp_path / "whole", **fields))
    main(small(tmp_path / "cut", **fields, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4")))
    name = "adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    main(small(tmp_path / "more", num_train_epochs=1, model_name=str(tmp_path / "whole")))
    assert (tmp_path / "more" / name).read_bytes() != (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(InputError, match="the model has an adapter already"):
        main(small(tmp_path / "two", model_name=str(tmp_path / "whole"), **fields))


def test_a_run_that_has_ended_is_not_resumed_without_more_to_do(tmp_path):
    main(small(tmp_path))
    with pytest.raises(InputError, match="is the end of its run: raise --num-train-epochs"):
        main(small(tmp_path, resume_from_checkpoint=str(tmp_path)))


def test_a_bad_held_out_row_is_told_before_the_first_round(tmp_path):
    (tmp_path / "held_out.jsonl").write_text('{"text": "the plot was dull."}\n{"text": ""}\n')
    with pytest.raises(InputError):
        main(small(tmp_path / "out", eval_dataset=str(tmp_path / "held_out.jsonl")))
    assert not (tmp_path / "out" / "samples.jsonl").exists()  # nothing was sampled yet


def test_checkpoints_are_written_at_the_end_of_rounds(tmp_path):
    main(small(tmp_path, save_steps=3))  # rounds of 2 optimizer steps
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_max_steps_ends_a_run_early_and_its_end_within_a_round_cant_be_resumed(tmp_path):
    stats = main(small(tmp_path, max_steps=3))
    assert [row["update"] for row in metrics(tmp_path)][-1] == 3 and stats["optimizer_steps"] == 1
    with pytest.raises(InputError, match="checkpoint-3 was written within a round"):
        main(small(tmp_path, num_train_epochs=6, resume_from_checkpoint=str(tmp_path)))


def test_an_encoder_decoder_learns_its_answers(tmp_path, make_hf_model, tokenizer):
    make_hf_model("t5").save_pretrained(tmp_path / "t5"), tokenizer.save_pretrained(tmp_path / "t5")
    (tmp_path / "q.jsonl").write_text('{"query": "w5 w6 w7"}\n{"query": "w8 w9"}\n')
    (tmp_path / "r.py").write_text("def score(texts):\n    return [text.count('w1') for text in texts]\n")
    stats = main(small(tmp_path / "out", model_name=str(tmp_path / "t5"), query_dataset=str(tmp_path / "q.jsonl"),
                       reward_model=f"{tmp_path}/r.py:score"))
    assert math.isfinite(stats["loss"]) and stats["tokens"] > 0


def test_a_held_out_set_is_evaluated_by_rounds_and_at_the_end(tmp_path):
    stats = main(small(tmp_path, eval_dataset=str(TOY / "reviews_test.jsonl"), eval_strategy="epoch", num_train_epochs=2,
                       per_device_eval_batch_size=100))
    assert sum("eval_loss" in row for row in metrics(tmp_path)) == 3 and 0.5 < stats["eval_loss"] < 2


def test_the_models_settings_for_chats_never_shape_what_is_sampled(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(TOY / "model")
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    config = small(tmp_path, max_new_tokens=3, temperature=1.5)
    queries = [tokenizer("the plot was").input_ids] * 2000
    likely = model(torch.tensor(queries[:1])).logits[0, -1].argmax().item()
    for name, value in (("top_k", 1), ("repetition_penalty", 3.0), ("bad_words_ids", [[likely]])):
        setattr(model.generation_config, name, value)
    first = torch.tensor([group[0][0] for group in iterative_sft.sample(model, tokenizer, queries, 1, config)])
    with torch.no_grad():
        want = (model(torch.tensor(queries[:1])).logits[0, -1] / 1.5).softmax(-1)
    assert (torch.bincount(first, minlength=len(want)) / 2000 - want).abs().max() < 0.05
    assert want.max() > 0.1 and model.generation_config.top_k == 1  # and the settings are back


def test_answers_end_after_their_first_end_of_sequence():
    assert iterative_sft.cut_after(torch.tensor([5, EOS, 6, EOS]), torch.tensor([EOS])).tolist() == [5, EOS]
    assert iterative_sft.cut_after(torch.tensor([5, 6]), torch.tensor([EOS])).tolist() == [5, 6]


@pytest.mark.parametrize("fields, says", [
    ({"num_best": 4}, "num_best=4 answers can't be kept of num_samples=3"),
    ({"num_samples": 0}, "num_samples=0: give a number above 0"),
    ({"temperature": 0.0}, "temperature=0.0: give a number above 0"),
    ({"eval_strategy": "epoch"}, "eval_strategy=epoch has nothing to evaluate on: give eval_dataset"),
    ({"resume_from_checkpoint": "nowhere"}, "no checkpoint-<n> there"),
    ({"model_name": "no/where"}, "model_name no/where can't be loaded"),
    ({"query_dataset": "no.jsonl"}, "no.jsonl does not exist"),
    ({"max_new_tokens": 126}, "set --max-query-length"),
])
def test_bad_settings_are_told_in_one_sentence(tmp_path, fields, says):
    with pytest.raises(InputError, match=says) as error:
        main(small(tmp_path, **fields))
    assert "\n" not in str(error.value)


def test_a_score_that_is_no_number_is_told_with_its_text(tmp_path):
    (tmp_path / "r.py").write_text("def score(texts):\n    return [float('nan') for text in texts]\n")
    with pytest.raises(InputError, match="reward_model gives nan to 'to me the plot was"):
        main(small(tmp_path / "out", reward_model=f"{tmp_path}/r.py:score"))


def test_the_command_line_has_trainers_flags_and_the_scripts_own_and_tells_bad_input(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["iterative_sft.py", "--help"])
    with pytest.raises(SystemExit):
        run(main, IterativeSFTConfig)
    told = capsys.readouterr().out
    assert "--num-samples INT" in told and "--gradient-accumulation-steps INT" in told
    monkeypatch.setattr(sys, "argv", ["iterative_sft.py", "--model-name", "no/where", "--output-dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="iterative_sft.py: error: model_name no/where can't be loaded"):
        run(main, IterativeSFTConfig)


def test_every_option_has_a_sentence_and_is_read():
    source = (ROOT / "iterative_sft.py").read_text()
    body = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "IterativeSFTConfig").body
    fields = [n.target.id for n in body if isinstance(n, ast.AnnAssign)]
    documented = [a.target.id for a, b in zip(body, body[1:]) if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)]
    assert fields == documented and len(fields) > 20
    own = source + (ROOT / "common.py").read_text()
    for name in fields[fields.index("model_name"):]:
        assert re.search(rf"(config|self|args)\.{name}\b", own), f"nothing reads {name}"


# ------------------------------------------------------------------------------------------------ ranks
RANKS = """
import os, sys, torch
from common import setup_ranks
setup_ranks()
from conftest import hf_model, VOCAB
from transformers import TrainingArguments
from datasets import Dataset
from iterative_sft import IterativeSFTTrainer
ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
draw = torch.Generator().manual_seed(0)
rows = [torch.randint(4, VOCAB, (3 + 2 * i,), generator=draw) for i in range(8)]
data = Dataset.from_list([{"input_ids": row.tolist()} for row in rows])
model = hf_model("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
args = TrainingArguments(sys.argv[1] + f"/{ranks}", per_device_train_batch_size=2, per_device_eval_batch_size=2, max_steps=3, logging_steps=1,
                         gradient_accumulation_steps=4 // ranks, learning_rate=1e-3, save_strategy="no", disable_tqdm=True)
trainer = IterativeSFTTrainer(model, args, eval_dataset=data.select(range(5)))  # the ranks fill up their last batch
stats = [trainer.step(rows[rank::ranks]) for _ in range(3)]
torch.save({"weights": model.state_dict(), "stats": stats, "eval": trainer.evaluate()["eval_loss"],
            "logs": [log["loss"] for log in trainer.state.log_history if "loss" in log]}, f"{sys.argv[1]}/{ranks}-{rank}.pt")
if ranks > 1 and len(sys.argv) > 2:
    trainer.state.max_steps, trainer.control.should_training_stop = 9, False
    trainer.step(rows[:1 + rank])
"""


def torchrun(*args, ranks=2, **env):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", **env})


def test_two_ranks_are_one_process_with_the_same_global_batch(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    for ranks in (1, 2):
        done = torchrun(tmp_path / "ranks.py", tmp_path, *["uneven"] * (ranks - 1), ranks=ranks)
        assert done.returncode == ranks - 1, done.stderr
    assert "every rank must bring as many rows to a step; they bring [1, 2]" in done.stderr
    one, *two = [torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1")]
    for rank in two:
        assert_close(rank["weights"], one["weights"])
        for a, b in zip(rank["stats"], one["stats"], strict=True):
            assert a == pytest.approx(b, rel=1e-5)
        assert rank["eval"] == pytest.approx(one["eval"], rel=1e-5) and rank["logs"] == pytest.approx(one["logs"], rel=1e-5)
    assert all(torch.equal(a, two[1]["weights"][name]) for name, a in two[0]["weights"].items())


TWICE = """
import sys
from common import setup_ranks
setup_ranks()
from iterative_sft import IterativeSFTConfig, main
for name, resume in (("whole", None), ("cut", sys.argv[1] + "/whole/checkpoint-2")):
    main(IterativeSFTConfig(f"{sys.argv[1]}/{name}", prompts_per_round=4, num_samples=3, max_new_tokens=6, per_device_train_batch_size=4,
                            num_train_epochs=3, save_steps=1, save_total_limit=None, resume_from_checkpoint=resume))
"""


def test_the_script_on_two_ranks_samples_on_both_and_resumes(tmp_path):
    (tmp_path / "twice.py").write_text(TWICE)
    done = torchrun(tmp_path / "twice.py", tmp_path)
    assert done.returncode == 0, done.stderr
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert metrics(cut) == metrics(whole)[4:] and len(metrics(whole)) == 6
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    states = [torch.load(whole / "checkpoint-2" / f"rng_state_{rank}.pth", weights_only=False)["cpu"] for rank in (0, 1)]
    assert not torch.equal(*states)  # each rank draws answers of its own
