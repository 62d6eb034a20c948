"""reward.py: the loss by hand, scores and gradients against the plain model, rows, configuration,
logs and evaluation, and what it inherits from transformers.Trainer."""
import copy
import dataclasses
import gc
import inspect
import math
import warnings
import weakref

import numpy as np
import pytest
import torch
import transformers
from conftest import BOS, EOS, PAD, VOCAB
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    HfArgumentParser,
    TrainerCallback,
    TrainingArguments,
)

from chats import load_reward
from common import InputError
from reward import (
    RewardConfig,
    RewardDataCollatorWithPadding,
    RewardTrainer,
    compute_accuracy,
    preference_loss,
)

SIDES = ("chosen", "rejected")
COLUMNS = [f"{kind}_{side}" for side in SIDES for kind in ("input_ids", "attention_mask")]
LENGTHS = ((3, 9), (7, 2), (12, 5), (4, 4), (6, 11), (2, 8), (10, 3), (5, 6))
MARGINS = (0.0, 1.0, 2.0, 0.5, 0.0, 1.0, 0.25, 3.0)
TEMPLATE = "{% for m in messages %}{{ '<s> ' + m['content'] + ' </s> ' }}{% endfor %}"


def sizes(arch):
    tokens = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
              "num_labels": 1}
    llama = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
             "max_position_embeddings": 64, "initializer_range": 0.2}
    return {**tokens, **{
        "gpt2": {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0,
                 "initializer_range": 0.2, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "llama": llama, "qwen3": llama, "gemma": llama, "mistral": {**llama, "sliding_window": 6},
        "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2,
               "decoder_start_token_id": PAD, "dropout_rate": 0.0, "classifier_dropout": 0.0,
               "is_encoder_decoder": True},
        "bert": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                 "num_attention_heads": 2, "max_position_embeddings": 64,
                 "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    }[arch]}


def classifier(arch="gpt2", seed=0, **changes):
    """A random classifier of 2 layers of 32 with one label and no dropout."""
    name = {"gpt2": "GPT2"}.get(arch, arch.capitalize())
    torch.manual_seed(seed)
    config = getattr(transformers, name + "Config")(**{**sizes(arch), **changes})
    return getattr(transformers, name + "ForSequenceClassification")(config)


def token_rows(*both_sides, **columns):
    """Rows of the four columns from pairs of lists of token ids."""
    rows = [{f"{kind}_{side}": ids if kind == "input_ids" else [1] * len(ids)
             for side, ids in zip(SIDES, both, strict=True)
             for kind in ("input_ids", "attention_mask")}
            for both in both_sides]
    for name, values in columns.items():
        rows = [{**row, name: value} for row, value in zip(rows, values, strict=False)]
    return Dataset.from_list(rows)


def pairs(lengths=LENGTHS, seed=0, end=(), **columns):
    """Rows of random token ids: one row for each (length of chosen, length of rejected)."""
    draw = torch.Generator().manual_seed(seed)
    def text(n):
        return torch.randint(4, VOCAB, (n,), generator=draw).tolist() + list(end)
    return token_rows(*[[text(n) for n in both] for both in lengths], **columns)


@pytest.fixture
def make_args(tmp_path):
    """make_args(**fields) -> RewardConfig: two steps of four pairs in their order."""
    def make(**fields):
        return RewardConfig(**{
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "max_steps": 2,
            "per_device_eval_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
            "train_sampling_strategy": "sequential", "save_strategy": "no", "use_cpu": True,
            "disable_tqdm": True, "gradient_checkpointing": False, "remove_unused_columns": False,
            **fields})

    return make


@pytest.fixture
def make_trainer(make_args, tokenizer):
    """make_trainer("gpt2" or a model, rows, **fields of RewardConfig or arguments of RewardTrainer)
    -> RewardTrainer"""
    fields = {field.name for field in dataclasses.fields(RewardConfig)} - {"eval_dataset"}

    def make(model="gpt2", rows=None, **kwargs):
        args = make_args(**{name: kwargs.pop(name) for name in list(kwargs) if name in fields})
        model = classifier(model) if isinstance(model, str) else model
        parts = {"model": model, "tokenizer": tokenizer,
                 "train_dataset": pairs() if rows is None else rows, **kwargs}
        return RewardTrainer(args=args, **parts)

    return make


def batch_of(trainer, rows=None):
    return trainer.data_collator(list(trainer.train_dataset if rows is None else rows))


def rewards(trainer, rows=None):
    """Scores of the chosen and the rejected texts in one batch, [2, n]."""
    with torch.no_grad():
        _, out = trainer.compute_loss(trainer.model.eval(), batch_of(trainer, rows),
                                      return_outputs=True)
    return torch.stack([out["rewards_chosen"], out["rewards_rejected"]])


def plain_scores(model, rows):
    """The same by the plain model, one text at a time, without padding."""
    def score(ids):
        return model(input_ids=torch.tensor([ids])).logits[0, 0]
    return torch.stack([torch.stack([score(row[f"input_ids_{side}"]) for row in rows])
                        for side in SIDES])


def alone(model, rows):
    with torch.no_grad():
        return plain_scores(model.eval(), rows)


def plain_losses(scores, margin=0.0, smoothing=0.0, centering=0.0):
    """The loss of each pair, written from the formula of the papers."""
    chosen, rejected = scores.double()
    p = 1 / (1 + torch.exp(-(chosen - rejected - margin)))
    loss = -(1 - smoothing) * torch.log(p) - smoothing * torch.log(1 - p)
    return loss + centering * (chosen + rejected).square()


def pair_metrics(scores):
    """What the log says of these pairs, none of which is a tie."""
    chosen, rejected = scores
    return {"rewards/chosen": chosen.mean().item(), "rewards/rejected": rejected.mean().item(),
            "rewards/margins": (chosen - rejected).mean().item(),
            "rewards/accuracies": (chosen > rejected).float().mean().item()}


def lora(**kwargs):
    from peft import LoraConfig
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", **kwargs})


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def same_tensors(got, want, share=1e-3):
    """Named tensors are equal up to float32's rounding: a thousandth of each one's norm, or, where
    a tensor's true value is zero, a hundred-thousandth of all together."""
    total = math.sqrt(sum(tensor.norm().item() ** 2 for tensor in want.values()))
    for name, tensor in want.items():
        off = (got[name] - tensor).norm().item()
        assert off <= share * tensor.norm().item() + 0.01 * share * total, f"{name}: off by {off}"


# ------------------------------------------------------------------------------ the mathematics
@pytest.mark.parametrize("name,scores,kwargs,want", [
    ("a wide lead", (2, 0), {}, math.log(1 + math.exp(-2))),
    ("a tie", (0.5, 0.5), {}, math.log(2)),
    ("the wrong order", (-1, 2), {}, math.log(1 + math.exp(3))),
    ("a margin is taken off the lead", (3, 1), {"margin": 2.0}, math.log(2)),
    ("a margin at a tie", (1, 1), {"margin": 0.5}, math.log(1 + math.exp(0.5))),
    ("smoothing", (2, 0), {"smoothing": 0.1}, math.log(1 + math.exp(-2)) + 0.1 * 2),
    ("centring adds c times the squared sum", (2, 1), {"centering": 0.01},
     math.log(1 + math.exp(-1)) + 0.01 * 9),
    ("all of them", (2, 1), {"margin": 3.0, "smoothing": 0.2, "centering": 0.1},
     math.log(1 + math.exp(2)) - 0.2 * 2 + 0.1 * 9),
], ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "")
def test_the_loss_of_a_pair_by_hand(name, scores, kwargs, want):
    chosen, rejected = (torch.tensor([float(score)]) for score in scores)
    assert preference_loss(chosen, rejected, **kwargs).tolist() == pytest.approx([want], abs=1e-6)


def test_each_pair_has_its_own_margin():
    chosen, rejected = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0])
    want = [math.log(2), math.log(1 + math.exp(0.5))]
    got = preference_loss(chosen, rejected, torch.tensor([2.0, 0.5])).tolist()
    assert got == pytest.approx(want, abs=1e-6)


def test_the_loss_falls_when_the_chosen_text_gains_and_rises_when_the_rejected_one_does():
    chosen, rejected = (torch.tensor([score], requires_grad=True) for score in (0.3, 0.5))
    preference_loss(chosen, rejected).backward()
    assert chosen.grad.item() == pytest.approx(-1 / (1 + math.exp(-0.2)), abs=1e-6)
    assert rejected.grad.item() == pytest.approx(1 / (1 + math.exp(-0.2)), abs=1e-6)


@pytest.mark.parametrize("smoothing,margin,best", [
    (0.1, 0.0, math.log(0.9 / 0.1)), (0.5, -1.5, -1.5), (0.1, 1.0, 1 + math.log(0.9 / 0.1))])
def test_with_smoothing_the_loss_is_least_at_a_finite_lead(smoothing, margin, best):
    """Where sigmoid(lead - margin) = 1 - smoothing."""
    def at(lead):
        return preference_loss(torch.tensor([lead]), torch.zeros(1), margin,
                                          smoothing).item()
    assert at(best) < at(best - 0.1) and at(best) < at(best + 0.1)


def test_ties_count_neither_as_right_nor_as_wrong():
    def accuracy(rows):
        return compute_accuracy((np.array(rows), None))["accuracy"]
    assert accuracy([[2, 1], [1, 2], [3, 0], [1, 1]]) == pytest.approx(2 / 3)
    assert accuracy([[1, 1], [1, 1], [1, 1]]) == 0.5


# ------------------------------------------------------------------------ scores and gradients
@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen3", "gemma", "mistral", "t5", "bert"])
def test_a_batch_gives_the_scores_loss_and_gradients_of_one_text_at_a_time(arch, make_trainer):
    rows = pairs(end=[EOS] if arch == "t5" else [], margin=MARGINS)  # T5 reads the end token
    trainer = make_trainer(arch, rows, label_smoothing_factor=0.1, center_rewards_coefficient=0.02)
    model = trainer.model.eval()
    def grads():
        return {name: p.grad.clone() for name, p in model.named_parameters()
                         if p.grad is not None}
    loss, out = trainer.compute_loss(model, batch_of(trainer), return_outputs=True)
    loss.backward()
    got = grads()

    model.zero_grad()
    scores = plain_scores(model, rows)
    want = plain_losses(scores, torch.tensor(MARGINS), 0.1, 0.02).mean()
    want.backward()
    same_tensors(got, grads())
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    for side, row in zip(SIDES, scores.detach(), strict=True):
        torch.testing.assert_close(out[f"rewards_{side}"].detach(), row, rtol=1e-4, atol=1e-4)


def test_texts_of_similar_length_share_a_pass_and_scores_are_in_the_order_of_the_rows(
        make_trainer):
    trainer, seen = make_trainer(), []

    def see(module, args, kwargs):
        seen.append(kwargs["attention_mask"].sum(1).tolist())

    hook = trainer.model.register_forward_pre_hook(see, with_kwargs=True)
    scores = rewards(trainer)
    hook.remove()
    assert sum(seen, []) == sorted(sum(LENGTHS, ()))
    assert len(seen) == 4
    want = alone(trainer.model, pairs())
    torch.testing.assert_close(scores, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kwargs", [{}, {"label_smoothing_factor": 0.1}])
@pytest.mark.parametrize("n, most", [(7, 0), (8, 1e-7)])  # one pass: exactly; groups: rounding
def test_what_moves_all_scores_alike_gets_no_gradient(n, most, kwargs, make_trainer):
    trainer = make_trainer("gpt2", pairs(margin=MARGINS), **kwargs)
    model = trainer.model
    rows = [trainer.train_dataset[i] for i in range(n)]
    trainer.compute_loss(model, trainer.data_collator(rows)).backward()
    assert model.transformer.ln_f.bias.grad.abs().max() <= most
    assert model.transformer.ln_f.weight.grad.norm() > 0.01


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_a_score_is_read_at_the_last_token_even_if_the_end_token_is_the_padding(
        arch, make_trainer, make_tokenizer):
    rows = pairs(end=[EOS])
    want = alone(classifier(arch), rows)  # whose padding is another token
    trainer = make_trainer(arch, rows, tokenizer=make_tokenizer(pad_token="</s>"))
    torch.testing.assert_close(rewards(trainer), want, rtol=1e-4, atol=1e-4)


def test_what_stands_after_the_first_end_token_counts(make_trainer, make_tokenizer):
    rows = token_rows(([5, EOS, 6, EOS], [5, EOS, 9, EOS]))
    trainer = make_trainer(classifier(pad_token_id=EOS), rows,
                           tokenizer=make_tokenizer(pad_token="</s>"))
    (chosen,), (rejected,) = rewards(trainer)
    assert abs(chosen - rejected) > 1e-3


def test_token_ids_that_end_with_the_pad_token_are_refused(make_trainer, make_tokenizer):
    rows = list(pairs(end=[EOS]))
    batch = make_trainer(tokenizer=make_tokenizer(pad_token="</s>")).data_collator(rows)
    assert batch["input_ids_chosen"][2, -1] == EOS  # the trainer's own copy pads with another
    with pytest.raises(InputError, match="input_ids_chosen.*ends with the pad token '</s>'"):
        RewardDataCollatorWithPadding(make_tokenizer(pad_token="</s>"))(rows)


def test_the_side_of_the_padding_changes_no_score(make_trainer, make_tokenizer):
    tokenizer = make_tokenizer()

    def on_the_left(rows):
        batch = RewardDataCollatorWithPadding(tokenizer)(rows)
        for side in SIDES:
            masks = batch[f"attention_mask_{side}"]
            shifts = (masks == 0).sum(1).tolist()
            for kind in ("input_ids", "attention_mask"):
                batch[f"{kind}_{side}"] = torch.stack(
                    [row.roll(n) for row, n in zip(batch[f"{kind}_{side}"], shifts, strict=True)])
        return batch

    want = rewards(make_trainer())
    left = make_trainer(data_collator=on_the_left)
    assert batch_of(left)["input_ids_chosen"][0, 0] == PAD
    same = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rewards(left), want, **same)
    collator = RewardDataCollatorWithPadding(make_tokenizer(pad_token="</s>"))
    torch.testing.assert_close(rewards(make_trainer(data_collator=collator)), want, **same)
    other = make_trainer(tokenizer=make_tokenizer(padding_side="left"))
    torch.testing.assert_close(rewards(other), want, **same)


def test_a_model_in_half_precision_is_compared_in_float32(make_trainer):
    """With large scores whose differences bfloat16 would round away."""
    model = classifier("llama")
    torch.nn.init.normal_(model.score.weight, std=1.0)
    trainer = make_trainer(model.bfloat16(), pairs(margin=MARGINS))
    scores = rewards(trainer)
    loss = trainer.compute_loss(trainer.model, batch_of(trainer))
    assert scores.dtype == loss.dtype == torch.float32
    want = plain_losses(scores, torch.tensor(MARGINS)).mean().item()
    assert loss.item() == pytest.approx(want, rel=1e-5)


# ------------------------------------------------------------------------------ rows and batches
def test_a_batch_is_padded_on_the_right_to_its_longest_text(tokenizer):
    rows = token_rows(([7, 8], [9]), ([5], [4, 6, 5]), margin=[1, 0.5])
    batch = RewardDataCollatorWithPadding(tokenizer)(list(rows))
    assert batch["input_ids_chosen"].tolist() == [[7, 8], [5, PAD]]
    assert batch["input_ids_rejected"].tolist() == [[9, PAD, PAD], [4, 6, 5]]
    assert batch["attention_mask_chosen"].tolist() == [[1, 1], [1, 0]]
    assert batch["attention_mask_rejected"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["margin"].tolist() == [1, 0.5] and batch["margin"].dtype == torch.float32


def test_a_margin_of_none_counts_as_zero(tokenizer):
    rows = token_rows(([7, 8], [9]), ([5], [4]), margin=[None, 0.5])
    assert RewardDataCollatorWithPadding(tokenizer)(list(rows))["margin"].tolist() == [0, 0.5]


@pytest.mark.parametrize("kwargs,want", [
    ({}, [5, 6, 7, 8, 9]), ({"max_length": 3}, [7, 8, 9]), ({"max_length": 8}, [5, 6, 7, 8, 9]),
    ({"pad_to_multiple_of": 4}, [5, 6, 7, 8, 9] + [PAD] * 3),
    ({"pad_to_multiple_of": 5}, [5, 6, 7, 8, 9]),
    ({"padding": "max_length", "max_length": 7}, [5, 6, 7, 8, 9, PAD, PAD])])
def test_the_width_of_a_batch(kwargs, want, tokenizer):
    batch = RewardDataCollatorWithPadding(tokenizer, **kwargs)(
        list(token_rows(([5, 6, 7, 8, 9], [4]))))
    assert batch["input_ids_chosen"].tolist() == [want]
    assert batch["attention_mask_chosen"].tolist() == [[int(token != PAD) for token in want]]


@pytest.mark.parametrize("wrong", [{"padding": False}, {"return_tensors": "np"}])
def test_the_collator_refuses_what_it_cannot_do(wrong, tokenizer):
    (name, value), = wrong.items()
    with pytest.raises(InputError, match=f"{name}={value!r}"):
        RewardDataCollatorWithPadding(tokenizer, **wrong)


def test_the_collator_names_the_column_that_a_row_lacks(tokenizer):
    row = {key: value for key, value in pairs()[0].items() if key != "input_ids_rejected"}
    with pytest.raises(InputError, match="input_ids_rejected"):
        RewardDataCollatorWithPadding(tokenizer)([row])


def tokens(rows, make_trainer, **kwargs):
    """The token ids that the trainer makes of rows."""
    rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
    dataset = make_trainer(rows=rows, **kwargs).train_dataset
    assert all(row[f"attention_mask_{side}"] == [1] * len(row[f"input_ids_{side}"])
               for row in dataset for side in SIDES)
    return [[row[f"input_ids_{side}"] for side in SIDES] for row in dataset]


def test_texts_are_answers_to_a_prompt_or_stand_alone(make_trainer):
    answers = [{"prompt": "w4 w5", "chosen": " w6", "rejected": " w7", "id": 3}]
    texts = [{"chosen": "w4 w5 w6", "rejected": "w4 w5 w7"}]
    want = [[[4, 5, 6], [4, 5, 7]]]
    assert tokens(answers, make_trainer) == tokens(texts, make_trainer) == want


@pytest.fixture
def chat_tokenizer(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def turns(*contents, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


ANSWERS = {"chosen": turns("w5", first="assistant"), "rejected": turns("w6", first="assistant")}
WHOLE = {"chosen": turns("w4", "w5"), "rejected": turns("w4", "w6")}


@pytest.mark.parametrize("row", [
    {"prompt": "w4", **ANSWERS}, {"prompt": turns("w4"), **ANSWERS}, {"prompt": "w4", **WHOLE},
    {"prompt": [{"role": "user", "content": "w4 ", "name": "w9"}], **WHOLE}, WHOLE],
    ids=["prompt_is_text", "prompt_is_chat", "prompt_stands_in_both", "with_blank_and_key",
         "no_prompt"])
def test_chats_go_through_the_template_however_the_prompt_is_given(
        row, make_trainer, chat_tokenizer):
    want = [[[BOS, 4, EOS, BOS, 5, EOS], [BOS, 4, EOS, BOS, 6, EOS]]]
    assert tokens([row], make_trainer, tokenizer=chat_tokenizer) == want


def test_answers_of_the_assistant_may_come_without_a_prompt(make_trainer, chat_tokenizer):
    want = [[[BOS, 5, EOS], [BOS, 6, EOS]]]
    assert tokens([ANSWERS], make_trainer, tokenizer=chat_tokenizer) == want


def test_max_length_keeps_the_last_tokens_of_texts_token_ids_and_chats(
        make_trainer, chat_tokenizer, capsys):
    texts = [{"prompt": "w4 ", "chosen": "w5 w6 w7", "rejected": "w8 w9"},
             {"chosen": "w4 w5 w6", "rejected": "w9"}]
    chats = [{"chosen": turns("w4 w5 w6"), "rejected": turns("w7")}]
    assert tokens(texts, make_trainer, max_length=3) == [
        [[5, 6, 7], [4, 8, 9]], [[4, 5, 6], [9]]]
    assert ("training dataset: truncated 1 of 2 rows, row 0 the first: longer than max_length=3 "
            "tokens") in capsys.readouterr().out
    assert tokens(chats, make_trainer, max_length=2, tokenizer=chat_tokenizer) == [
        [[6, EOS], [7, EOS]]]
    trainer = make_trainer(rows=token_rows(([5, 6, 7, 8], [9])), max_length=3)
    assert batch_of(trainer)["input_ids_chosen"].tolist() == [[6, 7, 8]]
    assert "truncated 1 of 1 rows" in capsys.readouterr().out


def test_a_truncated_text_keeps_the_special_tokens_around_it(make_trainer, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)])
    rows = [{"chosen": "w4 w5 w6 w7", "rejected": "w8 w9"}]
    assert tokens(rows, make_trainer, tokenizer=tokenizer, max_length=4) == [
        [[BOS, 6, 7, EOS], [BOS, 8, 9, EOS]]]


@pytest.mark.parametrize("tokenizer_s,model_s,given,want", [
    (64, 64, None, 64), (64, 64, 100, 64), (9, 64, None, 9), (64, 32, None, 32),
    (10**30, 32, 50, 32), (64, 32, 20, 20)])
def test_a_text_is_cut_to_what_tokenizer_model_and_max_length_allow(
        tokenizer_s, model_s, given, want, make_trainer, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = tokenizer_s
    trainer = make_trainer(classifier(n_positions=model_s), pairs(((90, 80),)), max_steps=1,
                           tokenizer=tokenizer, max_length=given)
    assert batch_of(trainer)["input_ids_chosen"].shape == (1, want)
    trainer.train()  # no position beyond the model's
    text = " ".join(f"w{4 + i % 90}" for i in range(120))
    rows = Dataset.from_list([{"chosen": text, "rejected": text + " w8"}])
    trainer = make_trainer(classifier(n_positions=model_s), rows, tokenizer=tokenizer,
                           max_length=given)
    assert len(trainer.train_dataset[0]["input_ids_chosen"]) == want


def test_a_pair_that_cannot_be_tokenized_is_named_by_its_number(make_trainer):
    rows = Dataset.from_list([{"chosen": "w8", "rejected": text} for text in ["w9", None]])
    with pytest.raises(InputError, match="^training dataset: row 1 can't be tokenized: "):
        make_trainer(rows=rows)


def test_pairs_whose_sides_are_equal_or_empty_are_left_out_and_counted(make_trainer, capsys):
    rows = [{"chosen": "w8", "rejected": "w9"}, {"chosen": "w4 w5 w6", "rejected": "w7 w5 w6"},
            {"chosen": "", "rejected": "w9"}, {"chosen": "w9", "rejected": ""},
            {"chosen": "w8 w9", "rejected": "w8"}]
    assert tokens(rows, make_trainer, max_length=2) == [[[8], [9]], [[8, 9], [8]]]
    assert ("training dataset: dropped 3 of 5 rows, row 1 the first: equal or empty within "
            "max_length=2 tokens") in capsys.readouterr().out
    assert tokens(rows[:1], make_trainer) == [[[8], [9]]] and not capsys.readouterr().out


def test_token_ids_that_are_equal_once_they_are_cut_are_left_out(make_trainer):
    rows = token_rows(([4, 5, 6], [7, 5, 6]), ([8, 9, 9], [8, 7, 9]))
    assert tokens(rows, make_trainer, max_length=2) == [[[9, 9], [7, 9]]]


def test_other_columns_are_kept_from_the_model_and_margin_is_not(make_trainer):
    texts = Dataset.from_list([{"chosen": "w4", "rejected": "w5", "margin": 2, "id": "a"}])
    columns = make_trainer(rows=texts).train_dataset.column_names
    assert sorted(columns) == sorted([*COLUMNS, "margin"])
    with pytest.warns(UserWarning, match="remove_unused_columns"):
        trainer = make_trainer(rows=pairs(id=range(8), margin=[0.5] * 8),
                               remove_unused_columns=True)
    batch = next(iter(trainer.get_train_dataloader()))
    assert {*COLUMNS, "margin"} <= set(batch) and "id" not in batch


def test_a_stream_trains_as_the_same_rows_in_a_list_do(make_trainer):
    rows = [{"chosen": f"w{i} w5", "rejected": f"w{i + 1} w6"} for i in range(4, 30)]
    stream = make_trainer(rows=IterableDataset.from_generator(lambda: iter(rows)))
    listed = make_trainer(rows=Dataset.from_list(rows))
    for trainer in (stream, listed):
        trainer.train()
    assert len(losses(stream)) == 2
    assert losses(stream) == pytest.approx(losses(listed), rel=1e-5)


def test_several_processes_tokenize_alike(make_trainer):
    rows = [{"chosen": f"w{i} w5", "rejected": f"w{i} w6"} for i in range(4, 12)]
    assert tokens(rows, make_trainer, dataset_num_proc=2) == tokens(rows, make_trainer)


# ----------------------------------------------------------------------------- the configuration
TRANSLATED = {  # old field, a value -> today's field, its value
    "evaluation_strategy": ("steps", "eval_strategy", "steps"),
    "per_gpu_train_batch_size": (3, "per_device_train_batch_size", 3),
    "per_gpu_eval_batch_size": (5, "per_device_eval_batch_size", 5),
    "warmup_ratio": (0.1, "warmup_steps", 0.1), "no_cuda": (True, "use_cpu", True),
    "tpu_metrics_debug": (True, "debug", ["tpu_metrics_debug"]),
    "fsdp_min_num_params": (7, "fsdp_config", {"min_num_params": 7}),
    "fsdp_transformer_layer_cls_to_wrap": (
        "GPT2Block", "fsdp_config", {"transformer_layer_cls_to_wrap": "GPT2Block"}),
    "adafactor": (True, "optim", "adafactor"),
    "group_by_length": (True, "train_sampling_strategy", "group_by_length"),
    "include_inputs_for_metrics": (True, "include_for_metrics", ["inputs"]),
    "push_to_hub_model_id": ("me/it", "hub_model_id", "me/it"),
    "push_to_hub_token": ("t", "hub_token", "t"),
    "torchdynamo": ("inductor", "torch_compile_backend", "inductor"),
    "dispatch_batches": (True, "accelerator_config", {"dispatch_batches": True}),
    "split_batches": (True, "accelerator_config", {"split_batches": True}),
    "include_tokens_per_second": (True, "include_num_input_tokens_seen", "all")}
REFUSED = {
    "overwrite_output_dir": True, "logging_dir": "x", "save_safetensors": False,
    "use_mps_device": True, "jit_mode_eval": True, "use_ipex": True, "fp16_opt_level": "O2",
    "half_precision_backend": "apex", "tpu_num_cores": 8, "past_index": 0,
    "use_legacy_prediction_loop": True, "fp16_backend": "apex", "push_to_hub_organization": "o",
    "mp_parameters": "x", "ray_scope": "all"}


def test_the_retired_fields_of_trl_0_7_10_are_all_covered_here():
    names = {field.name for field in dataclasses.fields(RewardConfig)}
    today = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert len(TRANSLATED) + len(REFUSED) == 32
    assert {*TRANSLATED, *REFUSED} <= names - today


@pytest.mark.parametrize("old", TRANSLATED)
def test_a_retired_field_means_what_it_meant(old, tmp_path):
    value, new, want = TRANSLATED[old]
    got = getattr(RewardConfig(output_dir=str(tmp_path), eval_steps=1, **{old: value}), new)
    if isinstance(want, dict):
        (key,), got = want, got if isinstance(got, dict) else vars(got)
        assert got[key] == want[key]
    else:
        assert got == want


def test_torchdynamo_compiles(tmp_path):
    assert RewardConfig(output_dir=str(tmp_path), torchdynamo="eager").torch_compile


@pytest.mark.parametrize("old", REFUSED)
def test_a_retired_field_without_a_meaning_is_refused(old):
    with pytest.raises(InputError, match=f"{old}={REFUSED[old]!r}"):
        RewardConfig(output_dir="x", **{old: REFUSED[old]})


@pytest.mark.parametrize("field", [
    "fsdp_config", "accelerator_config", "warmup_steps", "optim", "per_device_train_batch_size"])
def test_a_retired_field_s_default_leaves_today_s_field_alone(field, tmp_path):
    given = {"fsdp_config": {"min_num_params": 5}, "accelerator_config": {"split_batches": True},
             "warmup_steps": 3, "optim": "sgd", "per_device_train_batch_size": 2}[field]
    got = getattr(RewardConfig(output_dir=str(tmp_path), **{field: given}), field)
    if isinstance(given, dict):
        (key, value), got = *given.items(), got if isinstance(got, dict) else vars(got)
        assert got[key] == value
    else:
        assert got == given


def test_a_retired_field_and_today_s_must_not_contradict(tmp_path):
    with pytest.raises(InputError, match="evaluation_strategy.*'epoch'"):
        RewardConfig(output_dir="x", evaluation_strategy="steps", eval_strategy="epoch")
    with pytest.raises(InputError, match="fsdp_min_num_params.*fsdp.json"):
        RewardConfig(output_dir="x", fsdp_min_num_params=3, fsdp_config="fsdp.json")
    both = RewardConfig(output_dir=str(tmp_path), evaluation_strategy="epoch",
                        eval_strategy="epoch", dispatch_batches=False, split_batches=True)
    assert both.eval_strategy == "epoch"
    joined = both.accelerator_config
    assert (joined.dispatch_batches, joined.split_batches) == (False, True)


def test_the_defaults_warn_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = RewardConfig(output_dir=str(tmp_path))
        assert RewardConfig(output_dir=str(tmp_path), report_to=None).report_to == []
    assert config.gradient_checkpointing and config.max_length is None and config.report_to == []


def test_gradient_checkpointing_goes_by_both_of_its_names(tmp_path):
    def make(**fields):
        return RewardConfig(output_dir=str(tmp_path), **fields)
    kwargs = {"use_reentrant": True}
    assert make().activation_checkpointing is True
    assert make(gradient_checkpointing=False).activation_checkpointing is False
    assert make(gradient_checkpointing_kwargs=kwargs).activation_checkpointing_kwargs == kwargs
    today = make(activation_checkpointing=False, activation_checkpointing_kwargs=kwargs)
    assert today.activation_checkpointing is False
    assert today.activation_checkpointing_kwargs == kwargs


def test_a_config_may_be_made_from_arguments_and_again_from_itself(tmp_path):
    (config,) = HfArgumentParser(RewardConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--evaluation_strategy", "epoch", "--max_length", "7",
         "--gradient_checkpointing", "False"])
    assert (config.eval_strategy, config.max_length, config.gradient_checkpointing) == (
        "epoch", 7, False)
    assert dataclasses.replace(config, learning_rate=1e-3).eval_strategy == "epoch"


@pytest.mark.parametrize("name,value", [
    ("max_length", 0), ("label_smoothing_factor", 0.51), ("label_smoothing_factor", -0.01),
    ("learning_rate", -1.0), ("learning_rate", float("nan")), ("lora_r", -1), ("lora_alpha", 0),
    ("per_device_train_batch_size", 0), ("num_train_epochs", 0),
    ("center_rewards_coefficient", -0.1), ("dataset_num_proc", 0)])
def test_a_number_out_of_range_is_refused_at_once(name, value):
    with pytest.raises(InputError, match=f"{name}={value}"):
        RewardConfig(output_dir="x", **{name: value})


def test_an_unknown_type_of_the_weights_is_refused():
    with pytest.raises(InputError, match="torch_dtype='half'"):
        RewardConfig(output_dir="x", torch_dtype="half")


def test_the_largest_and_least_smoothing_are_accepted(tmp_path):
    for value in (0, 0.5):
        assert RewardConfig(output_dir=str(tmp_path), label_smoothing_factor=value,
                            max_length=1).label_smoothing_factor == value


# ------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("rows,names", [
    ([{"question": "w4", "answer": "w5"}], "question.*chosen"),
    ([{"chosen": "w4", "prompt": "w5"}], "prompt.*rejected"),
    ([{"input_ids_chosen": [4], "input_ids_rejected": [5]}], "attention_mask_chosen"),
    ([{"chosen": turns("w4"), "rejected": turns("w5")}], "chat_template"),
    ([{"chosen": "w5 w4", "rejected": "w6 w4"}], "max_length"),
], ids=["other_names", "one_side", "no_masks", "chats_without_template", "equal_once_cut"])
def test_rows_that_cannot_be_trained_on_are_refused_before_training(rows, names, make_trainer):
    with pytest.raises(ValueError, match=names) as error:
        make_trainer(rows=Dataset.from_list(rows), max_length=1)
    assert isinstance(error.value, InputError) and "\n" not in str(error.value)


def test_an_empty_dataset_is_refused(make_trainer):
    with pytest.raises(InputError, match="training"):
        make_trainer(rows=pairs().select([]))
    with pytest.raises(InputError, match="evaluation"):
        make_trainer(eval_dataset=pairs().select([]))


def test_a_head_of_two_labels_is_refused(make_trainer):
    with pytest.raises(InputError, match="num_labels=1"):
        make_trainer(classifier(num_labels=2))


@pytest.mark.parametrize("pad", [None, "</s>"])
def test_padding_is_a_token_that_ends_no_text(pad, make_trainer, make_tokenizer):
    given = make_tokenizer(pad_token=pad)
    trainer = make_trainer(classifier(pad_token_id=None), tokenizer=given)
    assert given.pad_token == pad and trainer.tokenizer.pad_token == "<s>"
    want = alone(classifier(), pairs())
    torch.testing.assert_close(rewards(trainer), want, rtol=1e-4, atol=1e-4)
    assert trainer.model.config.pad_token_id == BOS
    trainer.train()


def test_a_tokenizer_that_cannot_pad_or_is_not_there_is_refused(make_trainer):
    with pytest.raises(InputError, match="pad_token"):
        only = Tokenizer(models.BPE({"</s>": 0, "a": 1}, []))
        make_trainer(tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_object=only, eos_token="</s>"))
    with pytest.raises(InputError, match="tokenizer"):
        make_trainer(tokenizer=None)


def test_an_adapter_that_is_there_trains_further_instead_of_a_fresh_one(make_trainer):
    from peft import get_peft_model
    model = get_peft_model(classifier(), lora(task_type="SEQ_CLS", r=3))
    with pytest.warns(UserWarning, match="peft_config.*has no effect"):
        trainer = make_trainer(model, peft_config=lora(), report_to=None)
    assert trainer.model is model and model.peft_config["default"].r == 3


def test_a_dict_of_splits_is_refused(tokenizer, make_args):
    with pytest.raises(InputError, match="train_dataset=dict.*train"):
        RewardTrainer(classifier(), make_args(), tokenizer=tokenizer,
                      train_dataset={"train": pairs()})


def test_two_maximum_lengths_are_refused_unless_they_are_equal(tokenizer, make_args):
    def make(n):
        return RewardTrainer(classifier(), make_args(max_length=3), tokenizer=tokenizer,
                                       train_dataset=pairs(), max_length=n)
    with pytest.raises(InputError, match="max_length=4.*3"):
        make(4)
    assert batch_of(make(3))["input_ids_chosen"].shape == (8, 3)


def test_a_text_without_tokens_is_refused(make_trainer):
    trainer = make_trainer()
    batch = batch_of(trainer)
    batch["attention_mask_chosen"][2] = 0
    with pytest.raises(InputError, match="token"):
        trainer.compute_loss(trainer.model, batch)


def test_a_loss_that_is_not_a_number_stops_the_run_before_a_weight_moves(
        make_trainer, weights, moved):
    model = classifier()
    torch.nn.init.constant_(model.score.weight, float("nan"))
    before = weights(model)
    with pytest.raises(InputError, match="nan"):
        make_trainer(model).train()
    assert moved(before, model) <= {"score.weight"}  # nan != nan


# ------------------------------------------------------------------------ the trainer's arguments
def test_the_documented_arguments_come_in_their_order():
    assert list(inspect.signature(RewardTrainer).parameters)[:13] == [
        "model", "args", "data_collator", "train_dataset", "eval_dataset", "tokenizer",
        "model_init", "compute_metrics", "callbacks", "optimizers",
        "preprocess_logits_for_metrics", "max_length", "peft_config"]


def test_args_may_be_left_out(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="remove_unused_columns"):
        trainer = RewardTrainer(classifier(), tokenizer=tokenizer, train_dataset=pairs())
    assert trainer.args.gradient_checkpointing and trainer.args.learning_rate == 5e-5


def test_args_may_be_those_of_transformers(tokenizer, tmp_path):
    args = TrainingArguments(str(tmp_path), remove_unused_columns=False, use_cpu=True, max_steps=1,
                             disable_tqdm=True)
    trainer = RewardTrainer(classifier(), args, tokenizer=tokenizer, train_dataset=pairs(),
                            max_length=4)
    assert batch_of(trainer)["input_ids_chosen"].shape == (8, 4)
    assert math.isfinite(trainer.train().training_loss)


def test_the_config_alone_trains(make_args, tokenizer):
    """An adapter, the learning rate, the length and no evaluation without an evaluation set."""
    args = make_args(lora_r=2, learning_rate=None, max_length=4, eval_strategy="epoch")
    trainer = RewardTrainer(classifier(), args, tokenizer=tokenizer, train_dataset=pairs())
    assert batch_of(trainer)["input_ids_chosen"].shape == (8, 4)
    assert trainer.model.peft_config["default"].r == 2
    parameters = sum(p.numel() for p in trainer.model.parameters())
    # of an adapter ten times the rate of all weights
    assert trainer.args.learning_rate == pytest.approx(10 * 2e-3 * math.sqrt(1e5 / parameters))
    assert math.isfinite(trainer.train().training_loss)
    assert args.learning_rate is None and args.eval_strategy == "epoch"


def test_an_adapter_that_is_given_wins_over_that_of_the_config(make_trainer):
    trainer = make_trainer(lora_r=2, peft_config=lora(r=3))
    assert trainer.model.peft_config["default"].r == 3


def test_the_tokenizer_may_be_given_as_processing_class(make_trainer, tokenizer):
    trainer = make_trainer(tokenizer=None, processing_class=tokenizer)
    assert trainer.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert trainer.processing_class is trainer.tokenizer


def test_model_init_makes_the_model_and_its_adapter_when_training_begins(make_trainer):
    def init():
        return classifier(pad_token_id=None)
    trainer = make_trainer(None, model_init=init, peft_config=lora())
    trainer.train()
    assert trainer.model.config.pad_token_id == PAD and hasattr(trainer.model, "peft_config")


def test_every_other_argument_reaches_trainer(make_trainer):
    seen = []

    class Callback(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append("step")

    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = make_trainer(
        model, callbacks=[Callback()], optimizers=(optimizer, None), eval_dataset=pairs(),
        compute_metrics=lambda p: {"shape": float(p.predictions.shape[1])},
        preprocess_logits_for_metrics=lambda logits, labels: logits[:, :1])
    trainer.train()
    assert seen == ["step", "step"] and trainer.optimizer.optimizer is optimizer
    assert trainer.evaluate()["eval_shape"] == 1


def test_nothing_that_was_given_is_changed(make_args, make_tokenizer):
    args, tokenizer = make_args(remove_unused_columns=True), make_tokenizer(padding_side="left")
    rows, peft_config = pairs(), lora()
    def state():
        return copy.deepcopy(
            [args.to_dict(), tokenizer.padding_side, tokenizer.pad_token, rows[:], peft_config])
    before = state()
    with pytest.warns(UserWarning):
        RewardTrainer(classifier(), args, tokenizer=tokenizer, train_dataset=rows,
                      peft_config=peft_config).train()
    assert before == state()


def test_equal_seeds_draw_equal_adapters(make_trainer):
    def drawn(seed):
        torch.rand(1)  # what was drawn before must not matter
        trainer = make_trainer("llama", peft_config=lora(), seed=seed)
        return next(p for name, p in trainer.model.named_parameters() if "lora_A" in name)

    assert torch.equal(drawn(7), drawn(7)) and not torch.equal(drawn(7), drawn(8))


# -------------------------------------------------------------------------------- what is logged
@pytest.mark.parametrize("every", [1, 2])
def test_a_line_of_the_log_covers_the_pairs_since_the_last_line(every, make_trainer):
    """And nothing of the evaluations in between."""
    rows, other = pairs([both for both in LENGTHS for _ in range(2)]), pairs(seed=1)
    trainer = make_trainer(rows=rows, eval_dataset=other, learning_rate=0.0, max_steps=4,
                           logging_steps=every, eval_strategy="steps", eval_steps=1)
    want = alone(trainer.model, rows).split(4 * every, dim=1)
    trainer.train()
    found = [row for row in trainer.state.log_history if "loss" in row]
    assert len(found) == len(want) == 4 // every
    for row, scores in zip(found, want, strict=True):
        expected = {**pair_metrics(scores), "loss": plain_losses(scores).mean().item()}
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    evaluations = [row for row in trainer.state.log_history if "eval_loss" in row]
    expected = pair_metrics(alone(trainer.model, other))
    assert len(evaluations) == 4
    for row in evaluations:
        assert {name: row[f"eval_{name}"] for name in expected} == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("size", [1, 3, 7])  # of 7 pairs in batches of 3 the last has one
def test_an_evaluation_is_the_mean_over_pairs_whatever_the_batches(size, make_trainer):
    rows = pairs(LENGTHS[:7], margin=MARGINS)
    trainer = make_trainer(eval_dataset=rows, per_device_eval_batch_size=size)
    scores = alone(trainer.model, rows)
    expected = {f"eval_{name}": value for name, value in pair_metrics(scores).items()}
    expected["eval_loss"] = plain_losses(scores, torch.tensor(MARGINS[:7])).mean().item()
    expected["eval_accuracy"] = expected["eval_rewards/accuracies"]
    for _ in range(2):  # the second begins anew
        got = trainer.evaluate()
        assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_ties_count_neither_way_in_the_log_and_in_an_evaluation(make_trainer):
    """GPT-2 without positions and biases gives a token of zeros exactly the score 0."""
    model = classifier()
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        model.transformer.wte.weight[4:6] = 0
    def single(ids):
        return [alone(model, token_rows(([i], [i])))[0, 0].item() for i in ids]
    order = sorted(range(6, 12), key=lambda i: single([i])[0])
    up = [([order[-1]], [order[0]]), ([order[-2]], [order[1]])]
    rows = token_rows(([4], [5]), *up, up[0][::-1])  # a tie, two right, one wrong
    trainer = make_trainer(model, rows, learning_rate=0.0, max_steps=1, eval_dataset=rows)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/accuracies"] == pytest.approx(2 / 3)
    got = trainer.evaluate()
    assert got["eval_rewards/accuracies"] == got["eval_accuracy"] == pytest.approx(2 / 3)

    torch.nn.init.zeros_(model.score.weight)
    assert trainer.evaluate()["eval_rewards/accuracies"] == 0.5


def test_rows_given_to_evaluate_and_predict_may_be_texts_and_sets_may_have_names(make_trainer):
    texts = Dataset.from_list([{"chosen": "w4 w5", "rejected": "w6"},
                               {"chosen": "w7", "rejected": "w8 w9"}])
    trainer = make_trainer(eval_dataset={"kind": texts, "unkind": pairs()})
    scores = alone(trainer.model, token_rows(([4, 5], [6]), ([7], [8, 9])))
    margin = pytest.approx((scores[0] - scores[1]).mean().item(), abs=1e-4)
    named = trainer.evaluate()
    assert named["eval_kind_rewards/margins"] == margin != named["eval_unkind_rewards/margins"]
    assert {"eval_kind_accuracy", "eval_unkind_accuracy"} <= set(named)
    assert trainer.evaluate(texts)["eval_rewards/margins"] == margin
    output = trainer.predict(texts)
    assert output.predictions == pytest.approx(scores.softmax(0).T.numpy(), abs=1e-4)
    assert output.metrics["test_rewards/margins"] == margin
    assert output.label_ids.tolist() == [0, 0]


def test_an_evaluation_of_the_loss_alone_still_has_the_rewards(make_trainer):
    trainer = make_trainer(eval_dataset=pairs(), prediction_loss_only=True)
    got, scores = trainer.evaluate(), alone(trainer.model, pairs())
    assert got["eval_loss"] == pytest.approx(plain_losses(scores).mean().item(), abs=1e-4)
    assert got["eval_rewards/margins"] == pytest.approx(
        pair_metrics(scores)["rewards/margins"], abs=1e-4)
    assert "eval_accuracy" not in got


def test_tokens_of_both_sides_are_counted(make_trainer):
    trainer = make_trainer(include_num_input_tokens_seen="non_padding")
    trainer.train()
    assert trainer.state.num_input_tokens_seen == sum(map(sum, LENGTHS))
    padded = sum(4 * max(column) for part in (LENGTHS[:4], LENGTHS[4:])
                 for column in zip(*part, strict=True))
    weights = trainer.model.num_parameters(exclude_embeddings=True)
    assert trainer.state.total_flos == 6 * padded * weights  # Trainer's estimate


def test_rows_may_be_grouped_by_length_and_inputs_shown_to_metrics(make_trainer):
    seen = []
    trainer = make_trainer(
        train_sampling_strategy="group_by_length", eval_dataset=pairs(),
        include_for_metrics=["inputs"],
        compute_metrics=lambda p: seen.append(p.inputs.shape[0]) or {})
    assert trainer.train_dataset["length"][:] == [sum(both) for both in LENGTHS]
    trainer.train()
    trainer.evaluate()
    assert seen == [8]


def test_tensorboard_gets_the_metrics(make_trainer, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    make_trainer(report_to="tensorboard").train()
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert {"train/loss", "train/rewards/margins"} <= set(events.Tags()["scalars"])


def test_the_metrics_keep_no_graph_of_the_steps_behind_them(make_trainer):
    alive = []

    class Mark(torch.autograd.Function):
        """A node of the graph that lives as long as anything refers to the graph."""
        @staticmethod
        def forward(ctx, x):
            alive.append(weakref.ref(ctx))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    trainer = make_trainer(logging_steps=100)
    head = trainer.model.transformer.ln_f
    head.register_forward_hook(lambda module, args, output: Mark.apply(output))
    trainer.train()
    gc.collect()
    assert len(alive) >= 2 and not any(mark() for mark in alive)


# ---------------------------------------------------------------------------- optimizer steps
@pytest.mark.parametrize("batch,accumulate", [(6, 1), (4, 2), (2, 3)])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_a_step_goes_down_the_mean_gradient_of_its_pairs_however_they_are_batched(
        clip, batch, accumulate, make_trainer, weights):
    """Also where micro-batches differ in size, and clipped as a whole. By plain SGD, which, unlike
    Adam, shows a factor of the gradient."""
    rows = pairs(LENGTHS[:6], margin=MARGINS)
    model = classifier()
    before = weights(model)
    scores = plain_scores(model, rows)
    loss = plain_losses(scores, torch.tensor(MARGINS[:6])).mean()
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = math.sqrt(sum(grad.norm().item() ** 2 for grad in grads.values()))
    factor = min(1.0, clip / norm) if clip else 1.0
    assert norm > 0.1
    model.zero_grad()

    trainer = make_trainer(model, rows, per_device_train_batch_size=batch, max_steps=1,
                           gradient_accumulation_steps=accumulate, max_grad_norm=clip, optim="sgd",
                           learning_rate=0.1, lr_scheduler_type="constant")
    trainer.train()
    # p - 0.1 g rounds p, of size 1, to 6e-8: 1e-3 of a step of the smaller gradients
    change = {name: (before[name] - p.detach()) / 0.1 for name, p in model.named_parameters()}
    same_tensors(change, {name: factor * grad for name, grad in grads.items()}, share=4e-3)
    assert losses(trainer) == pytest.approx([loss.item()], abs=1e-4)
    line = trainer.state.log_history[0]
    expected = pair_metrics(scores.detach())
    assert {name: line[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_a_run_that_is_resumed_ends_with_the_same_losses_and_weights(make_trainer, tmp_path):
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2,
              "train_sampling_strategy": "random"}
    def model():
        return classifier(resid_pdrop=0.1)
    whole = make_trainer(model(), output_dir=str(tmp_path / "a"), **fields)
    whole.train()
    again = make_trainer(model(), output_dir=str(tmp_path / "b"), **fields)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert losses(again) == losses(whole)
    for one, two in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_each_rank_reads_a_stream_itself(make_trainer):
    """The main rank can't send the others rows of unequal length."""
    assert make_trainer().accelerator.dispatch_batches is False


def test_the_best_model_is_loaded_at_the_end(make_trainer):
    trainer = make_trainer(eval_dataset=pairs(seed=1), max_steps=4, eval_strategy="steps",
                           eval_steps=1, save_strategy="steps", save_steps=1,
                           load_best_model_at_end=True, metric_for_best_model="rewards/margins",
                           greater_is_better=False)
    trainer.train()
    name = "eval_rewards/margins"
    seen = [row[name] for row in trainer.state.log_history if name in row]
    assert trainer.state.best_metric == min(seen) != seen[-1]
    assert trainer.evaluate()[name] == pytest.approx(min(seen), abs=1e-5)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_an_adapter_and_the_head_train_under_gradient_checkpointing(
        arch, make_trainer, weights, moved):
    trainer = make_trainer(arch, peft_config=lora(), gradient_checkpointing=True)
    before = weights(trainer.model)
    trainer.train()
    changed = moved(before, trainer.model)
    assert {name for name in before if "lora_" in name} <= changed
    assert any("score" in name for name in changed)
    assert all("lora_" in name or "score" in name for name in changed)


def test_gradient_checkpointing_and_compilation_change_no_number(make_trainer):
    def model():
        return classifier("llama", num_hidden_layers=1)
    def make(**fields):
        return make_trainer(model(), optim="sgd", max_grad_norm=0.0, **fields)
    plain, checkpointed = make(), make(gradient_checkpointing=True)
    compiled = make(torch_compile=True, torch_compile_backend="eager")
    start = model().state_dict()
    for trainer in (plain, checkpointed, compiled):
        trainer.train()
    assert checkpointed.model.is_gradient_checkpointing
    def step(trainer):
        return {name: p.detach() - start[name]
                                for name, p in trainer.accelerator.unwrap_model(
                                    trainer.model, keep_torch_compile=False).named_parameters()}
    for other in (checkpointed, compiled):
        assert losses(other) == pytest.approx(losses(plain), abs=1e-4)
        same_tensors(step(other), step(plain), share=4e-3)


def test_bf16_computes_in_half_precision_in_training_and_evaluation(make_trainer):
    trainer = make_trainer("llama", bf16=True, eval_dataset=pairs())
    seen = {True: set(), False: set()}
    layer = trainer.model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(
        lambda module, args, output: seen[module.training].add(output.dtype))
    trainer.train()
    trainer.evaluate()
    assert seen == {True: {torch.bfloat16}, False: {torch.bfloat16}}
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert rewards(trainer).dtype == torch.float32


# ------------------------------------------------------------------------------- what is saved
def test_an_adapter_is_saved_with_the_head_and_trains_on(make_trainer, tmp_path):
    from peft import PeftModel
    trainer = make_trainer("llama", peft_config=lora(task_type=None))
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    base = classifier("llama")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    torch.nn.init.zeros_(loaded.get_base_model().score.original_module.weight)
    again = make_trainer(loaded)
    torch.testing.assert_close(rewards(again), rewards(trainer))
    again.train()
    assert not torch.allclose(rewards(again), rewards(trainer), rtol=1e-3)


def test_a_saved_model_is_a_plain_classifier_that_scores_as_in_training(make_trainer, tmp_path):
    rows = [{"prompt": "w4 w5 ", "chosen": "w6 w7 w8", "rejected": "w9"},
            {"prompt": "w10 ", "chosen": "w11", "rejected": "w12 w13"}]
    trainer = make_trainer(classifier("qwen3", pad_token_id=None), Dataset.from_list(rows))
    trainer.train()
    trainer.save_model(tmp_path)
    texts = [row["prompt"] + row[side] for side in SIDES for row in rows]
    want = rewards(trainer).flatten()
    scores = torch.stack(load_reward(tmp_path)(texts))
    torch.testing.assert_close(scores, want, rtol=1e-5, atol=1e-5)

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model.config.num_labels == 1
    batch = trainer.tokenizer(texts, padding=True, return_tensors="pt", padding_side="right")
    with torch.no_grad():
        logits = model(**batch).logits[:, 0]
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)
