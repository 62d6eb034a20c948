"""iterative_sft.py, the trainer: the loss, the update, evaluation, checkpoints, and bad input."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BOS, CAUSAL, EOS, PAD, SEQ2SEQ, VOCAB, hf_model
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
)

from common import InputError
from iterative_sft import (
    IterativeSFTConfig,
    IterativeSFTTrainer,
    best_of,
    cross_entropy,
    next_tokens,
)

RECORDED = json.loads(Path(__file__).with_name("recorded_isft.json").read_text())
IGNORE = -100  # the label of a token that is not trained on
# Plain SGD: a weight changes by the learning rate times the gradient, so no factor is hidden.
SGD = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
COLLATORS = (DataCollatorForLanguageModeling, DataCollatorForSeq2Seq)


def tokens(*lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCAB, (n,), generator=draw) for n in lengths]


def text(ids):
    return " ".join(f"w{i}" for i in ids.tolist())


def without_prompt(row, length):
    """Labels of a row whose first tokens are not trained on."""
    return torch.cat([torch.full((length,), IGNORE), row[length:]])


def still(arch="gpt2", **changes):
    """A model without dropout, for losses that can be computed again."""
    off = {"gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"), "t5": ("dropout_rate",),
           "bart": ("dropout", "attention_dropout", "activation_dropout")}
    names = off.get(arch, ("attention_dropout",))
    return hf_model(arch, **{name: 0.0 for name in names}, **changes)


def lora(model):
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def as_dataset(rows):
    return Dataset.from_list([{"input_ids": row.tolist()} for row in rows])


@pytest.fixture
def make(tmp_path, tokenizer):
    """make("gpt2" or a model, parts of the trainer, **fields of TrainingArguments)."""
    def make(model="gpt2", parts=(), **fields):
        fields = {"output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4,
                  "max_steps": 100, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
                  "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", **fields}
        model = still(model) if isinstance(model, str) else model
        args = TrainingArguments(**fields)
        return IterativeSFTTrainer(model, args, **{"tokenizer": tokenizer, **dict(parts)})

    return make


class Watch(TrainerCallback):
    """Keeps the events and what is logged."""

    def __init__(self):
        self.events, self.logs = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({**logs, "step": state.global_step})


for event in ("train_begin", "epoch_begin", "step_begin", "substep_end", "pre_optimizer_step",
              "optimizer_step", "step_end", "epoch_end", "save", "evaluate", "train_end"):
    def note(self, args, state, control, event=event, **kwargs):
        self.events.append(event)
    setattr(Watch, f"on_{event}", note)


def watched(trainer):
    watch = Watch()
    trainer.add_callback(watch)
    return watch


def batches_of(trainer):
    """A list that fills with the input_ids of each forward pass of the trainer's model."""
    seen = []

    def keep(module, args, kwargs):
        seen.append(kwargs["input_ids"] if "input_ids" in kwargs else args[0])

    trainer.model.register_forward_pre_hook(keep, with_kwargs=True)
    return seen


# ----------------------------------------------------------------- a plain computation
def row_loss(model, ids, labels=None):
    """Sum of -log p over the labels of one row, without padding, and their number."""
    labels = ids if labels is None else labels
    if model.config.is_encoder_decoder:
        start = torch.tensor([model.config.decoder_start_token_id])
        shifted = torch.cat([start, labels[:-1].clamp(min=0)])
        logits = model(input_ids=ids[None], decoder_input_ids=shifted[None]).logits[0]
    else:
        logits, labels = model(input_ids=ids[None]).logits[0, :-1], labels[1:]
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")
    return total, int((labels != IGNORE).sum())


def mean_loss(model, rows, labels=None):
    sums, counts = zip(*map(lambda *row: row_loss(model, *row), rows, labels or rows), strict=True)
    return sum(sums) / sum(counts)


def gradient(model, loss):
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    names, parameters = zip(*trained, strict=True)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g
            for name, p, g in zip(names, parameters, gradients, strict=True)}


def norm(gradients):
    return torch.cat([g.flatten() for g in gradients.values()]).norm().item()


def state_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def step_of(trainer, *args, **kwargs):
    """Statistics of one call of `step`, and by how much each weight went down."""
    before = state_of(trainer)
    stats = trainer.step(*args, **kwargs)
    return stats, {name: before[name] - p for name, p in state_of(trainer).items()}


def assert_same_change(got, want, rel=1e-3):
    """float32 sums in another order differ by about 1e-6 of the largest; a mistake is 1e-2."""
    whole = norm(want)
    for name, change in want.items():
        error = (got[name] - change).norm().item()
        assert error <= rel * change.norm().item() + 1e-5 * whole, name


# ----------------------------------------------------------------- mathematics
def test_what_a_position_predicts_is_the_label_after_it():
    labels = torch.tensor([[5, 6, 7], [8, IGNORE, 9]])
    assert next_tokens(labels).tolist() == [[6, 7, IGNORE], [IGNORE, 9, IGNORE]]


def test_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    nll = cross_entropy(logits.clone(), torch.tensor([0, 0]))
    assert nll.tolist() == pytest.approx([math.log(2), math.log(4 / 3)])


def test_cross_entropy_and_its_gradient_are_torchs_for_any_number_of_rows():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(150, 7, generator=draw, requires_grad=True)
    targets, weights = torch.randint(7, (150,), generator=draw), torch.randn(150, generator=draw)
    want = F.cross_entropy(logits, targets, reduction="none")
    (want_gradient,) = torch.autograd.grad(want @ weights, logits)
    copy = (logits * 1.0)  # the gradient may be formed in the memory of the logits
    got = cross_entropy(copy, targets)
    torch.testing.assert_close(got, want)
    (got_gradient,) = torch.autograd.grad(got @ weights, logits)
    torch.testing.assert_close(got_gradient, want_gradient)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_label_smoothing_is_torchs(smoothing):
    logits, targets = torch.randn(5, 7), torch.randint(7, (5,))
    want = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(cross_entropy(logits, targets, smoothing), want)


def test_the_best_answers_come_first_and_the_earlier_of_equal_ones():
    scores = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 4.0], [0.0, -1.0, 0.0]])
    assert best_of(scores, 1).tolist() == [[1], [0], [0]]
    assert best_of(scores, 2).tolist() == [[1, 2], [0, 1], [0, 2]]
    assert best_of(torch.zeros(1, 40), 3).tolist() == [[0, 1, 2]]


# ----------------------------------------------------------------- the update
@pytest.mark.parametrize("arch", [*CAUSAL, *SEQ2SEQ])
def test_an_update_follows_the_gradient_of_the_mean_over_all_tokens_with_a_label(make, arch):
    """Rows of unequal length in micro-batches of unequal size, no label on prompts: one mean."""
    trainer = make(arch, per_device_train_batch_size=2, gradient_accumulation_steps=2, **SGD)
    rows, answers = tokens(3, 14, 6), tokens(7, 2, 4, seed=1)
    labels = answers if arch in SEQ2SEQ else [without_prompt(row, 2) for row in rows]
    model = still(arch)
    loss = mean_loss(model, rows, labels)
    want = gradient(model, loss)
    stats, change = step_of(trainer, rows, labels=labels)
    assert stats == {"loss": pytest.approx(loss.item(), rel=1e-5), "learning_rate": 1.0,
                     "grad_norm": pytest.approx(norm(want), rel=1e-4), "optimizer_steps": 1,
                     "tokens": 13 if arch in SEQ2SEQ else 1 + 12 + 4}
    assert_same_change(change, want)


def test_statistics_of_a_call_are_means_over_tokens_of_all_its_optimizer_steps(make):
    """The last optimizer step has one row: a mean over steps would count its tokens three times."""
    trainer = make(per_device_train_batch_size=3, **{**SGD, "learning_rate": 1e-12})
    rows = tokens(3, 15, 4, 9)
    stats = trainer.step(rows)
    assert stats["loss"] == pytest.approx(mean_loss(still(), rows).item(), rel=1e-5)
    assert stats["tokens"] == 2 + 14 + 3 + 8 and stats["optimizer_steps"] == 2


def test_an_optimizer_step_takes_batch_size_times_accumulation_rows_or_what_is_left(make):
    trainer = make(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    seen = batches_of(trainer)
    watch = watched(trainer)
    assert trainer.step(tokens(*[5] * 11))["optimizer_steps"] == 3
    assert trainer.state.global_step == 3 and trainer.state.epoch == 1
    assert [len(batch) for batch in seen] == [2, 2, 2, 2, 2, 1]
    assert watch.events.count("step_end") == 3 and watch.events.count("substep_end") == 3


def test_two_optimizer_steps_of_a_call_are_two_calls(make):
    """No gradient, no loss and no norm of the first step is left in the second."""
    trainer = make(per_device_train_batch_size=1, **{**SGD, "learning_rate": 0.1})
    seen = batches_of(trainer)
    rows = tokens(5, 8)
    stats, change = step_of(trainer, rows)
    first, second = [batch[0] for batch in seen]
    model, total = still(), {}
    for row in (first, second):
        want = gradient(model, mean_loss(model, [row]))
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= 0.1 * want[name]
                total[name] = total.get(name, 0) + 0.1 * want[name]
    assert stats["grad_norm"] == pytest.approx(norm(want), rel=1e-3)
    assert_same_change(change, total)


def test_clipping_is_of_the_whole_optimizer_step(make):
    """The change has the length max_grad_norm and the direction of the whole gradient."""
    trainer = make(per_device_train_batch_size=1, gradient_accumulation_steps=4,
                   **{**SGD, "max_grad_norm": 0.5})
    rows, model = tokens(4, 9, 6, 5), still()
    want = gradient(model, mean_loss(model, rows))
    length = norm(want)
    assert length > 1
    stats, change = step_of(trainer, rows)
    assert stats["grad_norm"] == pytest.approx(length, rel=1e-4)
    assert_same_change(change, {name: 0.5 / length * g for name, g in want.items()})


def test_adamw_has_the_betas_epsilon_and_weight_decay_of_the_arguments(make):
    """epsilon=1e-2: with a small one, Adam makes a whole step of a gradient of rounding noise."""
    fields = {"adam_beta1": 0.6, "adam_beta2": 0.9, "adam_epsilon": 1e-2, "weight_decay": 0.2}
    trainer = make(learning_rate=1e-2, max_grad_norm=0.0, **fields)
    rows, model = tokens(6, 9), still()
    decays = [p for p in model.parameters() if p.dim() > 1]  # no bias and no norm
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decays, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-2, betas=(0.6, 0.9), eps=1e-2)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        adam.zero_grad()
        mean_loss(model, rows).backward()
        adam.step()
        trainer.step(rows)
    want = {name: start[name] - p.detach() for name, p in model.named_parameters()}
    assert_same_change({name: start[name] - p for name, p in state_of(trainer).items()}, want)


def test_the_callers_optimizer_and_schedule_are_used(make):
    model = still()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1**step)
    trainer = make(model, {"optimizers": (optimizer, schedule)}, max_grad_norm=0.0)
    rows, plain = tokens(6, 9), still()
    want = gradient(plain, mean_loss(plain, rows))
    stats, change = step_of(trainer, rows)
    assert_same_change(change, {name: 0.5 * g for name, g in want.items()})
    rates = [stats["learning_rate"], trainer.step(rows)["learning_rate"]]
    assert rates == pytest.approx([0.5, 0.05])


def test_label_smoothing_reaches_the_update(make):
    rows, model = tokens(6, 9), still()
    losses = [F.cross_entropy(model(row[None]).logits[0, :-1], row[1:], label_smoothing=0.2,
                              reduction="sum") for row in rows]
    want = gradient(model, sum(losses) / 13)
    stats, change = step_of(make(label_smoothing_factor=0.2, **SGD), rows)
    assert stats["loss"] == pytest.approx(sum(losses).item() / 13, rel=1e-5)
    assert_same_change(change, want)


def test_a_mixture_of_experts_keeps_its_balance_whatever_the_accumulation(make):
    """The auxiliary loss is the mean over the micro-batches, times its coefficient."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48,
             "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
             "num_local_experts": 4, "max_position_embeddings": 64, "initializer_range": 0.2,
             "pad_token_id": PAD}
    config = MixtralConfig(**sizes, output_router_logits=True, router_aux_loss_coef=0.3)
    model = MixtralForCausalLM(config)
    trainer = make(model, per_device_train_batch_size=1, gradient_accumulation_steps=3, **SGD)
    rows = tokens(5, 12, 7)
    balance = sum(model(input_ids=row[None]).aux_loss for row in rows) / 3
    want = gradient(model, mean_loss(model, rows) + 0.3 * balance)
    without = gradient(model, 0.3 * balance)
    assert norm(without) > 0.05 * norm(want)
    _, change = step_of(trainer, rows)
    assert_same_change(change, want)


def test_rows_come_in_another_order_in_every_call_and_in_the_same_in_every_run(make):
    def orders(seed):
        trainer = make(per_device_train_batch_size=1, seed=seed)
        seen, rows = batches_of(trainer), tokens(*[3] * 8)
        trainer.step(rows), trainer.step(rows)
        firsts = [batch[0, 0].item() for batch in seen]
        assert sorted(firsts[:8]) == sorted(firsts[8:]) == sorted(row[0].item() for row in rows)
        return firsts[:8], firsts[8:]

    first, second = orders(seed=1)
    assert first != second and orders(seed=1) == (first, second) and orders(seed=2)[0] != first


def test_dropout_is_on_in_training_and_off_in_evaluation(make):
    rows = tokens(6, 9)
    trainer = make(hf_model("gpt2"), {"eval_dataset": as_dataset(rows)},
                   **{**SGD, "learning_rate": 1e-12})
    plain = mean_loss(hf_model("gpt2").eval(), rows).item()
    for _ in range(2):  # again: an evaluation leaves the next step as it is
        assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-5)
        assert abs(trainer.step(rows)["loss"] - plain) > 1e-3


def test_gradients_stay_on_the_parameters_where_the_optimizer_zeroes_them(make):
    class Zeroes(torch.optim.SGD):
        def zero_grad(self, set_to_none=True):
            super().zero_grad(set_to_none=False)

    model = still()
    optimizer = Zeroes(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    make(model, {"optimizers": (optimizer, schedule)}).step(tokens(5))
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_the_device_cache_is_emptied_after_each_optimizer_step_if_asked(make, monkeypatch):
    """There is no GPU here: accelerate is made to see one."""
    calls = []
    trainers = [make(parts={"optimize_device_cache": on}, per_device_train_batch_size=1)
                for on in (False, True)]
    monkeypatch.setattr("accelerate.utils.memory.is_cuda_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(1))
    trainers[0].step(tokens(5, 5))
    assert not calls
    trainers[1].step(tokens(5, 5))
    assert calls == [1, 1]


def test_bf16_trains_close_to_float32(make):
    rows = tokens(6, 9)
    trainers = make(), make(bf16=True, use_cpu=True)
    losses = [[trainer.step(rows)["loss"] for _ in range(4)] for trainer in trainers]
    # bfloat16 has 8 bits: 0.4 % a product, less in the mean over 13 tokens
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]
    assert losses[1][3] < losses[1][0]
    assert all(p.dtype == torch.float32 for p in trainers[1].model.parameters())


def test_gradient_checkpointing_with_lora_changes_no_number(make):
    changes = []
    for on in (False, True):
        trainer = make(lora(still("llama")), gradient_checkpointing=on, **SGD)
        trainer.step(tokens(6, 9))  # the first update moves lora_B alone
        changes.append(step_of(trainer, tokens(6, 9, seed=1))[1])
        assert trainer.model.base_model.model.is_gradient_checkpointing == on
    assert norm({n: c for n, c in changes[0].items() if "lora_A" in n}) > 0
    assert_same_change(changes[1], changes[0])


def test_an_adapter_trains_and_its_base_does_not(make, weights, moved):
    model = lora(still("llama"))
    before, trainer = weights(model), make(model, learning_rate=1e-2)
    losses = [trainer.step(tokens(6, 8))["loss"] for _ in range(5)]
    names = moved(before, model)
    assert losses[-1] < losses[0] and names and all("lora" in name for name in names)


def test_noise_on_the_embeddings_is_on_in_training_alone(make):
    rows, fields = tokens(6, 9), {**SGD, "learning_rate": 1e-12}
    trainer = make(parts={"eval_dataset": as_dataset(rows)}, neftune_noise_alpha=5.0, **fields)
    plain = mean_loss(still(), rows).item()
    assert abs(trainer.step(rows)["loss"] - plain) > 1e-3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-5)


# ----------------------------------------------------------------- the config
@pytest.fixture
def config(tmp_path):
    """config(**fields) -> an IterativeSFTConfig for a few quiet steps."""
    def make(**fields):
        return IterativeSFTConfig(**{"output_dir": str(tmp_path / "out"), "disable_tqdm": True,
                                     "logging_strategy": "no", "save_strategy": "no", **fields})

    return make


def test_a_config_alone_trains(tmp_path, tokenizer, weights, moved):
    model = still()
    before = weights(model)
    config = IterativeSFTConfig(output_dir=str(tmp_path))
    assert IterativeSFTTrainer(model, args=config).step(tokens(5, 9))["learning_rate"] == 1e-5
    assert moved(before, model)


@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
def test_the_trainer_reads_its_config(make, config, mode):
    rows = tokens(9, 4)
    args = config(max_length=5, truncation_mode=mode, optimize_device_cache=True, **SGD)
    trainer = IterativeSFTTrainer(still(), args)
    cut = [row[-5:] if mode == "keep_end" else row[:5] for row in rows]
    assert trainer.step(rows) == make(**SGD).step(cut)
    assert trainer.optimize_device_cache and args.max_steps == trainer.args.max_steps == -1


def test_an_argument_wins_over_the_config_s_default_and_may_not_contradict_it(config):
    trainer = IterativeSFTTrainer(still(), config(), max_length=5, truncation_mode="keep_start")
    assert (trainer.max_length, trainer.truncation_mode) == (5, "keep_start")
    with pytest.raises(InputError, match="max_length=5.*max_length=7") as error:
        IterativeSFTTrainer(still(), config(max_length=7), max_length=5)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_a_rank_in_the_config_puts_an_adapter_on_the_model(config, arch):
    trainer = IterativeSFTTrainer(still(arch), config(lora_r=2, lora_alpha=8))
    assert trainer.model.peft_config["default"].r == 2
    assert all("lora" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    assert trainer.step(tokens(5, 9))["grad_norm"] > 0
    with pytest.warns(UserWarning, match="lora_r.*has no effect"):
        trainer = IterativeSFTTrainer(lora(still("llama")), config(lora_r=3))
    assert trainer.model.peft_config["default"].r == lora(still("llama")).peft_config["default"].r


@pytest.mark.parametrize("fields, names", [
    ({"learning_rate": math.nan}, "learning_rate=nan"),
    ({"learning_rate": -1e-3}, "learning_rate=-0.001"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0"),
    ({"lora_r": -1}, "lora_r=-1"),
    ({"num_best": 9}, "num_best=9.*num_samples=8"),
])
def test_numbers_out_of_range_are_an_error_of_the_config(config, fields, names):
    with pytest.raises(InputError, match=names):
        config(**fields)
    config(learning_rate=0.0)


@pytest.mark.parametrize("fields, names", [
    ({"use_liger_kernel": True}, "use_liger_kernel=True"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size=True"),
    ({"save_only_model": True}, "save_only_model=True"),
    ({"torch_empty_cache_steps": 3}, "torch_empty_cache_steps=3"),
    ({"include_num_input_tokens_seen": True}, "include_num_input_tokens_seen=all"),
    ({"push_to_hub": True}, "hub_strategy=every_save"),
    ({"eval_strategy": "epoch"}, "eval_strategy=epoch.*eval_dataset"),
])
def test_an_argument_that_can_not_be_honored_is_an_error_with_its_name(make, fields, names):
    with pytest.raises(InputError, match=names) as error:
        make(**fields)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------- what a row is
def test_lists_of_token_ids_are_as_good_as_tensors(make):
    rows = tokens(5, 7)
    assert make().step([row.tolist() for row in rows]) == make().step(rows)


def test_columns_of_a_dataset_are_as_good_as_lists(make):
    rows = [row.tolist() for row in tokens(5, 9, 4)]
    dataset = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
    stats = make().step(input_ids=dataset["input_ids"], labels=dataset["labels"])
    assert stats == make().step(input_ids=rows, labels=rows)
    stats = make().step(input_ids=dataset.with_format("torch")["input_ids"])
    assert stats == make().step(input_ids=rows)
    with pytest.raises(InputError, match="texts is a str"):
        make().step(texts="w4 w5")


def test_processing_class_is_another_name_for_tokenizer(make, tokenizer):
    trainer = make(parts={"tokenizer": None, "processing_class": tokenizer}, report_to=None)
    assert trainer.tokenizer is tokenizer
    assert trainer.step(texts=["w4 w5 w6"])["tokens"] == 2


def test_labels_default_to_the_inputs(make):
    rows = tokens(6, 4)
    assert make().step(rows) == make().step(rows, labels=[row.clone() for row in rows])
    words = list(map(text, rows))
    assert make().step(texts=words) == make().step(texts=words, texts_labels=words)
    assert make().step(texts=words) == make().step(rows)


def test_labels_of_texts_are_what_an_encoder_decoder_is_trained_on(make):
    x, y = tokens(6, 4), tokens(3, 5, seed=1)
    by_text = make("t5").step(texts=list(map(text, x)), texts_labels=list(map(text, y)))
    assert by_text == make("t5").step(x, labels=y)


def test_labels_of_texts_are_what_a_causal_model_is_trained_on(make):
    x, y = tokens(6, 4), tokens(6, 4, seed=1)
    by_text = make().step(texts=list(map(text, x)), texts_labels=list(map(text, y)))
    assert by_text == make().step(x, labels=y)
    assert by_text["loss"] == pytest.approx(mean_loss(still(), x, y).item(), rel=1e-5)


def test_tokens_that_the_attention_mask_hides_are_left_out(make):
    rows = [torch.tensor([9, 5, 6, 7]), torch.tensor([8, 4, 9, 9])]
    masks = [torch.tensor([0, 1, 1, 1]), torch.tensor([1, 1, 1, 0])]
    labels = [torch.tensor([9, 5, IGNORE, 7]), torch.tensor([8, 4, 9, 9])]
    kept = [torch.tensor([5, 6, 7]), torch.tensor([8, 4, 9])]
    want = make().step(kept, labels=[torch.tensor([5, IGNORE, 7]), kept[1]])
    assert make().step(rows, masks, labels) == want and want["tokens"] == 1 + 2
    assert make().step(rows, masks) == make().step(kept)  # labels default to what stays


def test_the_mask_of_an_encoder_decoders_input_leaves_its_labels_alone(make):
    x, mask, y = torch.tensor([5, 6, 9]), torch.tensor([1, 1, 0]), torch.tensor([7, 8, 9, 4])
    assert make("t5").step([x], [mask], [y]) == make("t5").step([x[:2]], labels=[y])


@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
@pytest.mark.parametrize("kind", ["input_ids", "texts"])
def test_max_length_cuts_the_tokens_of_a_row_and_drops_no_row(make, mode, kind):
    rows = tokens(9, 4, 7)
    cut = [row[-5:] if mode == "keep_end" else row[:5] for row in rows]
    call = {kind: rows if kind == "input_ids" else list(map(text, rows))}
    stats = make(parts={"max_length": 5, "truncation_mode": mode}).step(**call)
    assert stats == make().step(cut) and stats["tokens"] == 4 + 3 + 4


@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
def test_max_length_cuts_given_labels_with_their_tokens(make, mode):
    kept = slice(-5, None) if mode == "keep_end" else slice(5)
    x, y = tokens(9, 7), [without_prompt(row, 3) for row in tokens(9, 7)]
    stats = make(parts={"max_length": 5, "truncation_mode": mode}).step(x, labels=y)
    assert stats == make().step([row[kept] for row in x], labels=[row[kept] for row in y])
    x, y = tokens(9), tokens(7, seed=1)
    stats = make("t5", {"max_length": 5, "truncation_mode": mode}).step(x, labels=y)
    assert stats == make("t5").step([x[0][kept]], labels=[y[0][kept]])


@pytest.mark.parametrize("mode, kept", [("keep_start", [5, 6]), ("keep_end", [7, 8])])
def test_special_tokens_of_a_text_outlive_the_cut(make, tokenizer, mode, kept):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)])
    trainer = make(parts={"max_length": 4, "tokenizer": tokenizer, "truncation_mode": mode})
    seen = batches_of(trainer)
    trainer.step(texts=["w5 w6 w7 w8"])
    assert seen[0].tolist() == [[BOS, *kept, EOS]]


def test_rows_are_padded_to_the_longest_of_their_micro_batch_alone(make):
    trainer = make(per_device_train_batch_size=1)
    seen = batches_of(trainer)
    trainer.step(tokens(4, 12, 6))
    assert sorted(batch.shape[1] for batch in seen) == [4, 6, 12]


def test_the_callers_tokenizer_is_left_as_it_is(make, tokenizer):
    names = ("truncation_side", "padding_side", "pad_token", "model_max_length")
    before = {name: getattr(tokenizer, name) for name in names}
    for mode in ("keep_start", "keep_end"):
        trainer = make(parts={"max_length": 3, "truncation_mode": mode})
        trainer.step(texts=["w5 w6 w7 w8 w9"])
    assert {name: getattr(tokenizer, name) for name in names} == before
    assert tokenizer.backend_tokenizer.truncation is None
    assert trainer.tokenizer is tokenizer is trainer.processing_class


def test_arguments_have_a_default(tokenizer, tmp_path, monkeypatch, weights, moved):
    monkeypatch.chdir(tmp_path)
    model = still()
    before = weights(model)
    assert IterativeSFTTrainer(model, tokenizer=tokenizer).step(tokens(5))["learning_rate"] > 0
    assert moved(before, model)


@pytest.mark.parametrize("collator", [None, *COLLATORS])
def test_an_end_of_sequence_that_pads_is_trained_on_where_it_ends_a_text(make, make_tokenizer,
                                                                     collator):
    tokenizer = make_tokenizer(pad_token="</s>")
    kwargs = {"mlm": False} if collator is DataCollatorForLanguageModeling else {}
    trainer = make(parts={"tokenizer": tokenizer,
                          "data_collator": collator and collator(tokenizer, **kwargs)})
    rows = [torch.tensor([5, 6, EOS]), torch.tensor([7, 8, 9, 4, EOS])]
    stats = trainer.step(rows)
    assert stats["tokens"] == 2 + 4
    assert stats["loss"] == pytest.approx(mean_loss(still(), rows).item(), rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("collator", COLLATORS)
def test_the_callers_collator_gives_the_same_numbers_on_either_side(make, make_tokenizer, side,
                                                                      collator):
    tokenizer, rows = make_tokenizer(padding_side=side), tokens(5, 9, 3)
    labels = [without_prompt(row, 2) for row in rows]
    mlm = collator is DataCollatorForLanguageModeling
    kwargs = {"mlm": False} if mlm else {"pad_to_multiple_of": 8}
    parts = {"tokenizer": tokenizer, "data_collator": collator(tokenizer, **kwargs)}
    got, change = step_of(make(parts=parts, **SGD), rows, labels=labels)
    want, want_change = step_of(make(**SGD), rows, labels=labels)
    assert got == pytest.approx(want, rel=1e-5)
    assert_same_change(change, want_change)


def test_the_callers_collator_may_make_its_own_labels(make):
    def last_token_only(rows):
        ids = [row["input_ids"] for row in rows]
        labels = [without_prompt(row, len(row) - 1) for row in ids]
        masks = [torch.ones_like(row) for row in ids]
        return {"input_ids": pad_sequence(ids, True, PAD),
                "labels": pad_sequence(labels, True, IGNORE),
                "attention_mask": pad_sequence(masks, True, 0)}

    rows = tokens(5, 9, 3)
    stats = make(parts={"data_collator": last_token_only}).step(rows)
    want = mean_loss(still(), rows, [without_prompt(row, len(row) - 1) for row in rows])
    assert stats["tokens"] == 3 and stats["loss"] == pytest.approx(want.item(), rel=1e-5)


# ----------------------------------------------------------------- schedule, logging, callbacks
def test_global_step_max_steps_and_schedule_count_optimizer_steps(make):
    trainer = make(per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=4,
                   lr_scheduler_type="linear")
    watch = watched(trainer)
    rates = [trainer.step(tokens(*[5] * 8))["learning_rate"] for _ in range(2)]
    assert trainer.state.global_step == 4 and trainer.control.should_training_stop
    assert rates == pytest.approx([0.75e-3, 0.25e-3])  # before the 2nd and the 4th of 4 steps to 0
    assert watch.events.count("step_end") == 4 and watch.events.count("substep_end") == 12


def test_warmup_counts_optimizer_steps(make):
    trainer = make(lr_scheduler_type="constant_with_warmup", warmup_steps=4)
    rates = [trainer.step(tokens(5))["learning_rate"] for _ in range(6)]
    assert rates == pytest.approx([0, 0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])


def test_a_schedule_that_waits_for_evaluations_gets_their_loss(make):
    """Weights do not move, so each evaluation after the first is no better: half the rate."""
    trainer = make(parts={"eval_dataset": as_dataset(tokens(6))}, eval_strategy="epoch",
                   lr_scheduler_type="reduce_lr_on_plateau", optim="sgd", learning_rate=1e-12,
                   lr_scheduler_kwargs={"factor": 0.5, "patience": 0, "eps": 0.0},
                   metric_for_best_model="loss", greater_is_better=False)
    rates = [trainer.step(tokens(5))["learning_rate"] for _ in range(4)]
    assert rates == pytest.approx([1e-12, 1e-12, 0.5e-12, 0.25e-12])


def test_a_call_ends_where_max_steps_does(make):
    trainer = make(per_device_train_batch_size=1, max_steps=3)
    stats = trainer.step(tokens(*[5] * 8))
    assert stats["optimizer_steps"] == 3 and stats["tokens"] == 3 * 4
    with pytest.raises(InputError, match="max_steps=3"):
        trainer.step(tokens(5))


def test_without_max_steps_training_has_no_end(make):
    trainer = make(max_steps=-1, lr_scheduler_type="linear")
    rates = [trainer.step(tokens(5))["learning_rate"] for _ in range(3)]
    assert rates == pytest.approx([1e-3] * 3)


def test_a_line_of_the_log_is_the_mean_over_its_optimizer_steps(make):
    trainer = make(per_device_train_batch_size=2, logging_strategy="steps", logging_steps=2)
    watch = watched(trainer)
    stats = [trainer.step(tokens(5, 7, seed=i)) for i in range(4)]
    assert [log["step"] for log in watch.logs] == [2, 4]
    for log, a, b in zip(watch.logs, stats[::2], stats[1::2], strict=True):
        assert log["loss"] == pytest.approx((a["loss"] + b["loss"]) / 2, rel=1e-5)
        assert log["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        assert log["learning_rate"] == b["learning_rate"] and log["epoch"] == log["step"]


def test_a_call_is_an_epoch_and_its_optimizer_steps_are_fractions_of_it(make):
    trainer = make(per_device_train_batch_size=1, gradient_accumulation_steps=2,
                   logging_strategy="steps", logging_steps=1)
    watch = watched(trainer)
    trainer.step(tokens(5, 5, 5, 5)), trainer.step(tokens(5, 5, 5))
    assert [log["epoch"] for log in watch.logs] == pytest.approx([1 / 2, 1, 1 + 2 / 3, 2])
    assert trainer.state.epoch == 2


class EndCallsEarly(TrainerCallback):
    """Ends each call of `step` after its first optimizer step."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = True


def test_a_call_that_a_callback_ends_early_is_a_whole_epoch_too(make, tmp_path):
    trainer = make(parts={"callbacks": [EndCallsEarly()]}, per_device_train_batch_size=1,
                   save_strategy="epoch")
    for epoch in (1, 2):
        assert trainer.step(tokens(5, 5, 5))["optimizer_steps"] == 1
        assert trainer.state.epoch == epoch
        path = tmp_path / "out" / f"checkpoint-{epoch}" / "trainer_state.json"
        assert json.loads(path.read_text())["epoch"] == epoch


def test_callbacks_run_and_checkpoints_are_written(make, tmp_path):
    trainer = make(save_strategy="steps", save_steps=1, max_steps=2,
                   logging_strategy="steps", logging_steps=1)
    watch = watched(trainer)
    trainer.step(tokens(5)), trainer.step(tokens(5))
    call = ["epoch_begin", "step_begin", "pre_optimizer_step", "optimizer_step", "step_end"]
    ends = ["epoch_end", "save"]
    assert watch.events[0] == "train_begin" and watch.events[-1] == "train_end"
    assert watch.events[1:6] == watch.events[8:13] == call
    assert set(watch.events[6:8]) == set(watch.events[13:15]) == set(ends)
    files = ("model.safetensors", "optimizer.bin", "random_states_0.pkl", "trainer_state.json",
             "tokenizer.json")
    for name in files:
        assert (tmp_path / "out" / "checkpoint-2" / name).exists(), name
    assert [log["step"] for log in watch.logs if "loss" in log] == [1, 2]
    assert "train_loss" in watch.logs[-1]


@pytest.mark.parametrize("what", ["save", "eval", "logging"])
def test_what_happens_by_epochs_happens_after_each_call(make, what):
    trainer = make(parts={"eval_dataset": as_dataset(tokens(5, 6))}, per_device_train_batch_size=1,
                   **{f"{what}_strategy": "epoch"})
    watch = watched(trainer)
    trainer.step(tokens(5, 5, 5)), trainer.step(tokens(5, 5, 5))
    count = {"save": watch.events.count("save"), "eval": watch.events.count("evaluate"),
             "logging": sum("loss" in log for log in watch.logs)}
    assert count[what] == 2


@pytest.mark.parametrize("save", ["steps", "epoch"])
def test_a_checkpoint_holds_all_that_was_logged_up_to_it(make, tmp_path, save):
    """A run that is killed after a checkpoint has lost no line, the evaluation's included."""
    trainer = make(parts={"eval_dataset": as_dataset(tokens(5, 6))}, eval_strategy="epoch",
                   logging_strategy="steps", logging_steps=1, save_strategy=save, save_steps=2)
    trainer.step(tokens(*[5] * 8))
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    keys = [key for line in state["log_history"] for key in line]
    assert keys.count("loss") == 2 and keys.count("eval_loss") == 1


def test_a_callback_may_end_the_training_and_the_best_model_is_loaded(make):
    trainer = make(parts={"eval_dataset": Dataset.from_list([{"input_ids": [5, 6, 7]}])},
                   learning_rate=10.0, eval_strategy="epoch", save_strategy="epoch",
                   load_best_model_at_end=True, metric_for_best_model="loss",
                   greater_is_better=False)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    for _ in range(6):
        if trainer.control.should_training_stop:
            break
        trainer.step(tokens(8, 8))
    assert trainer.control.should_training_stop and trainer.state.global_step < 6
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


def test_the_best_checkpoint_outlives_the_limit(make, tmp_path):
    """Every evaluation after the first is worse."""
    data = Dataset.from_list([{"input_ids": [5, 6, 7]}])
    trainer = make(parts={"eval_dataset": data}, learning_rate=10.0, eval_strategy="epoch",
                   save_strategy="epoch", load_best_model_at_end=True, save_total_limit=1,
                   max_steps=4)
    for _ in range(4):
        trainer.step(tokens(8, 8))
    found = [path.name for path in (tmp_path / "out").glob("checkpoint-*")]
    assert sorted(found) == ["checkpoint-1", "checkpoint-4"]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


def test_metrics_of_the_caller_are_logged_before_the_checkpoint(make, tmp_path):
    trainer = make(save_strategy="epoch")
    trainer.step(tokens(5), metrics={"objective/scores": 1.5})
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["log_history"] == [{"objective/scores": 1.5, "epoch": 1, "step": 1}]


def test_a_metric_for_the_best_model_that_is_not_there_is_an_error(make):
    data = Dataset.from_list([{"input_ids": [5, 6, 7]}])
    trainer = make(parts={"eval_dataset": data}, eval_strategy="epoch",
                   metric_for_best_model="accuracy")
    with pytest.raises(InputError, match="metric_for_best_model=accuracy.*eval_loss"):
        trainer.step(tokens(5))


def test_a_checkpoint_is_a_model_that_opens(make, tmp_path):
    trainer = make(save_strategy="epoch")
    trainer.step(tokens(6))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-1")
    both = zip(again.parameters(), trainer.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in both)


def test_a_checkpoint_of_an_adapter_has_no_weights_of_its_base(make, tmp_path):
    trainer = make(lora(still("llama")), save_strategy="epoch")
    trainer.step(tokens(6))
    files = [path.name for path in (tmp_path / "out" / "checkpoint-1").iterdir()]
    assert [name for name in files if "model" in name] == ["adapter_model.safetensors"]


def test_tensorboard_gets_the_losses(make, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = make(report_to="tensorboard", logging_strategy="steps", logging_steps=1, max_steps=3)
    losses = [trainer.step(tokens(6, 9))["loss"] for _ in range(3)]
    events = EventAccumulator(str(next((tmp_path / "logs").rglob("events*")).parent))
    events.Reload()
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses, rel=1e-3)


def test_what_is_saved_opens_as_a_plain_model_with_its_tokenizer(make, tmp_path):
    trainer = make()
    trainer.step(tokens(6))
    trainer.save_model(str(tmp_path / "kept"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "kept")
    both = zip(again.parameters(), trainer.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in both)
    assert AutoTokenizer.from_pretrained(tmp_path / "kept")("w5 w6").input_ids == [5, 6]


# ----------------------------------------------------------------- resuming
@pytest.mark.parametrize("adapter", [False, True])
def test_a_resumed_run_gives_the_numbers_of_the_uninterrupted_one(make, adapter, tmp_path):
    def model():  # with dropout: its random numbers are kept too
        return lora(hf_model("llama")) if adapter else hf_model("gpt2")

    fields = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear",
              "max_steps": 6, "logging_strategy": "steps", "logging_steps": 1}
    calls = [tokens(5, 9, 7, 3, seed=i) for i in range(6)]
    whole = make(model(), **fields)
    want = [whole.step(call) for call in calls]
    again = make(model(), **fields)
    again.load_checkpoint(tmp_path / "out" / "checkpoint-2")
    watch = watched(again)
    assert again.state.global_step == 2 and again.state.epoch == 2
    assert [again.step(call) for call in calls[2:]] == want[2:]
    ends = state_of(whole), state_of(again)
    assert all(torch.equal(p, ends[1][name]) for name, p in ends[0].items())
    losses = [(log["step"], log["loss"]) for log in whole.state.log_history if "loss" in log]
    assert [(log["step"], log["loss"]) for log in watch.logs if "loss" in log] == losses[2:]


def test_losses_that_are_not_logged_yet_are_in_the_checkpoint(make, tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 1, "max_steps": 7,
              "logging_strategy": "steps", "logging_steps": 3}
    calls = [tokens(5, 9, seed=i) for i in range(7)]
    runs = []
    for start in (0, 2, 4):
        trainer = make(**fields)
        if start:
            trainer.load_checkpoint(tmp_path / "out" / f"checkpoint-{start}")
        watch = watched(trainer)
        for call in calls[start:]:
            trainer.step(call)
        losses = {log["step"]: log["loss"] for log in watch.logs if "loss" in log}
        runs.append((losses, watch.logs[-1]["train_loss"]))
    (whole, train_loss), second, third = runs
    assert list(whole) == [3, 6]
    assert second == (whole, train_loss)
    assert third == ({6: whole[6]}, train_loss)


def test_a_run_whose_last_step_is_in_the_checkpoint_can_be_finished(make, tmp_path):
    """It was killed before the best model was loaded, and its folder was moved."""
    fields = {"parts": {"eval_dataset": as_dataset(tokens(3))}, "learning_rate": 10.0,
              "eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": 2,
              "load_best_model_at_end": True}
    whole = make(**fields)
    for _ in range(2):
        whole.step(tokens(8, 8))
    (tmp_path / "out").rename(tmp_path / "moved")
    again = make(**fields, output_dir=str(tmp_path / "moved"))
    again.load_checkpoint(tmp_path / "moved" / "checkpoint-2")
    watch = watched(again)
    again.finish(), again.finish()
    (log,) = watch.logs
    assert log["train_loss"] == whole.state.log_history[-1]["train_loss"]
    assert watch.events == ["train_begin", "train_end"]
    best = state_of(whole)
    assert all(torch.equal(best[name], p) for name, p in state_of(again).items())


def test_a_run_without_a_step_can_be_finished(make):
    trainer = make()
    watch = watched(trainer)
    trainer.finish()
    assert watch.logs[-1]["train_loss"] == 0


def test_noise_on_the_embeddings_is_the_same_after_a_resume(make, tmp_path):
    trainer = make(neftune_noise_alpha=5.0, save_strategy="steps", save_steps=1)
    trainer.step(tokens(6, 9))
    second = trainer.step(tokens(6, 9))
    again = make(neftune_noise_alpha=5.0)
    again.load_checkpoint(tmp_path / "out" / "checkpoint-1")
    assert again.step(tokens(6, 9)) == second  # noise put on two times would give another loss


@pytest.mark.parametrize("spoil", ["model.safetensors", "trainer_state.json", "optimizer.bin",
                                   "random_states_0.pkl"])
def test_a_damaged_checkpoint_is_an_error_with_its_name(make, tmp_path, spoil):
    trainer = make(save_strategy="steps", save_steps=1, max_steps=1)
    trainer.step(tokens(5))
    (tmp_path / "out" / "checkpoint-1" / spoil).write_bytes(b"half of it")
    with pytest.raises(InputError, match="checkpoint-1") as error:
        make().load_checkpoint(tmp_path / "out" / "checkpoint-1")
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------- evaluation
@pytest.mark.parametrize("arch", ["gpt2", "t5"])
def test_the_evaluation_loss_is_the_mean_over_all_tokens_with_a_label(make, arch):
    """However rows fall into batches, and in each evaluation."""
    x, y = tokens(3, 15, 6), tokens(9, 2, 4, seed=1)
    y = y if arch == "t5" else [without_prompt(row, 2) for row in x]
    data = Dataset.from_list([{"input_ids": a.tolist(), "labels": b.tolist()}
                              for a, b in zip(x, y, strict=True)])
    want = pytest.approx(mean_loss(still(arch), x, y).item(), rel=1e-5)
    for size in (1, 2, 3):
        trainer = make(arch, {"eval_dataset": data}, per_device_eval_batch_size=size)
        assert trainer.evaluate()["eval_loss"] == want
    assert trainer.evaluate()["eval_loss"] == want
    assert trainer.evaluate(data, metric_key_prefix="other")["other_loss"] == want


def test_a_loss_can_be_computed_without_training_or_evaluation(make):
    trainer, (row,) = make(), tokens(6)
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, trainer.evaluation_batch([{"input_ids": row}]))
    assert loss.item() == pytest.approx(mean_loss(still().eval(), [row]).item(), rel=1e-5)


def test_an_evaluation_set_may_hide_tokens_by_a_mask(make):
    data = Dataset.from_list([{"input_ids": [9, 5, 6, 7], "attention_mask": [0, 1, 1, 1]}])
    want = mean_loss(still(), [torch.tensor([5, 6, 7])]).item()
    assert make().evaluate(data)["eval_loss"] == pytest.approx(want, rel=1e-5)


def test_an_evaluation_set_may_hold_texts(make):
    rows, answers = tokens(5, 9), tokens(3, 4, seed=1)
    texts = Dataset.from_list([{"text": text(row)} for row in rows])
    want = pytest.approx(mean_loss(still(), rows).item(), rel=1e-5)
    assert make(parts={"eval_dataset": texts}).evaluate()["eval_loss"] == want
    texts = Dataset.from_list([{"text": text(x), "text_labels": text(y)}
                               for x, y in zip(rows, answers, strict=True)])
    want = pytest.approx(mean_loss(still("t5"), rows, answers).item(), rel=1e-5)
    assert make("t5", {"eval_dataset": texts}).evaluate()["eval_loss"] == want


def test_max_length_cuts_the_rows_of_the_evaluation_set_too(make):
    rows = tokens(9, 4)
    got = make(parts={"max_length": 5, "eval_dataset": as_dataset(rows)}).evaluate()["eval_loss"]
    assert got == pytest.approx(mean_loss(still(), [rows[0][-5:], rows[1]]).item(), rel=1e-5)


def test_metrics_are_computed_from_all_logits(make):
    rows, seen = tokens(6, 6), {}

    def accuracy(prediction):
        seen["labels"] = torch.tensor(prediction.label_ids)
        seen["guesses"] = torch.tensor(prediction.predictions)
        return {"accuracy": 0.25}

    parts = {"eval_dataset": as_dataset(rows), "compute_metrics": accuracy,
             "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}
    metrics = make(parts=parts).evaluate()
    with torch.no_grad():
        want = still().eval()(torch.stack(rows)).logits.argmax(-1)
    assert torch.equal(seen["guesses"], want) and torch.equal(seen["labels"], torch.stack(rows))
    assert metrics["eval_accuracy"] == 0.25
    assert metrics["eval_loss"] == pytest.approx(mean_loss(still(), rows).item(), rel=1e-5)


# ----------------------------------------------------------------- the numbers of TRL 0.7.10
def fill(model, seed, scale):
    """Draw weights from a generator whose stream is frozen, name after name; norms around 1."""
    draw = np.random.RandomState(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            ones = "weight" in name and ("ln_" in name or "layer_norm" in name)
            drawn = torch.tensor(scale * draw.standard_normal(tuple(p.shape)), dtype=torch.float32)
            p.copy_(drawn + ones)
    return model


def build(kind):
    tokens = {"vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOS}
    if kind == "t5":
        config = T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, dropout_rate=0.0,
                          decoder_start_token_id=PAD, **tokens)
        return fill(T5ForConditionalGeneration(config), 3, 0.2)
    config = GPT2Config(n_positions=48, n_embd=32, n_layer=2, n_head=2, bos_token_id=BOS,
                        resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0, **tokens)
    return fill(GPT2LMHeadModel(config), 3, 0.15)


def changes(before, model):
    """{parameter: [norm of its change, the change's product with cos(0.7 i + 0.3)]}"""
    result = {}
    for name, p in model.named_parameters():
        change = (p.detach().double() - before[name].double()).flatten()
        # The keys' bias has no gradient but rounding, of which Adam makes a step.
        if name.endswith("c_attn.bias"):
            change[len(change) // 3:2 * len(change) // 3] = 0
        probe = torch.cos(torch.arange(len(change), dtype=torch.float64) * 0.7 + 0.3)
        result[name] = [change.norm().item(), (change @ probe).item()]
    return result


def in_recorded_order(make, case):
    """The calls of a recorded case with their rows placed so that `step` takes them as TRL did.

    The order in which `step` takes rows depends on the seed and the number of the optimizer step
    alone, so a run over other rows shows it."""
    probe = make(**case["args"])
    seen, calls = batches_of(probe), []
    for call, recorded in zip(case["calls"], case["permutations"], strict=True):
        seen.clear()
        probe.step([torch.full((2,), 4 + i) for i in range(len(recorded))])
        order = [row[0].item() - 4 for batch in seen for row in batch]
        place = [recorded[order.index(i)] for i in range(len(order))]
        calls.append({name: [rows[i] for i in place] for name, rows in call.items()})
    return calls


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: case["name"])
def test_the_recorded_numbers_of_trl(case, make, weights):
    model, parts = build(case["model"]), dict(case["isft"])
    if "optimizer" in case:
        how = dict(case["optimizer"])
        optimizer = getattr(torch.optim, how.pop("name"))(model.parameters(), **how)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        parts["optimizers"] = (optimizer, schedule)
    fields = {"lr_scheduler_type": "linear", "max_grad_norm": 1.0, **case["args"]}
    calls = in_recorded_order(make, case)
    trainer = make(model, parts, logging_strategy="steps", logging_steps=1, **fields)
    before, watch = weights(model), watched(trainer)
    for call in calls:
        trainer.step(**{name: rows if name.startswith("texts") else list(map(torch.tensor, rows))
                        for name, rows in call.items()})
    # Recorded are the means of micro-batches, of equal rows where there are several in a step.
    size = case["args"].get("gradient_accumulation_steps", 1)
    losses = torch.tensor(sum(case["losses"], [])).view(-1, size).mean(1)
    got = torch.tensor([log["loss"] for log in watch.logs if "loss" in log])
    torch.testing.assert_close(got, losses, rtol=1e-4, atol=5e-6)
    result = changes(before, model)
    for name, (length, product) in case["weights"].items():
        torch.testing.assert_close(torch.tensor(result[name]), torch.tensor([length, product]),
                                   rtol=0, atol=6e-3 * length + 1e-7)


# ----------------------------------------------------------------- bad input
IDS, WORDS = tokens(5, 6), ["w5 w6 w7", "w8 w9"]


@pytest.mark.parametrize("call, names", [
    ({}, "input_ids.*texts"),
    ({"input_ids": IDS, "texts": WORDS}, "input_ids.*texts"),
    ({"input_ids": []}, "input_ids"),
    ({"texts": []}, "texts"),
    ({"input_ids": torch.stack([IDS[0], IDS[0]])}, "input_ids.*Tensor"),
    ({"input_ids": IDS, "labels": IDS[:1]}, "labels.*2.*1"),
    ({"input_ids": IDS, "attention_mask": IDS * 2}, "attention_mask.*2.*4"),
    ({"texts": WORDS, "texts_labels": WORDS[:1]}, "texts_labels.*2.*1"),
    ({"texts": WORDS, "texts_labels": "w5"}, "texts_labels.*str"),
    ({"texts": WORDS, "labels": IDS}, "labels.*texts"),
    ({"texts": WORDS, "attention_mask": IDS}, "attention_mask.*texts"),
    ({"input_ids": IDS, "texts_labels": WORDS}, "texts_labels.*input_ids"),
    ({"texts": ["w5 w6", 7]}, r"texts\[1\].*int"),
    ({"texts": ["w5 w6", ""]}, r"texts\[1\]"),
    ({"texts": WORDS, "texts_labels": ["w5 w6 w7", "w8"]}, r"texts\[1\].*labels.*1.*2"),
    ({"input_ids": IDS, "labels": IDS[::-1]}, r"input_ids\[0\].*labels.*6"),
    ({"input_ids": IDS, "labels": [IDS[0], torch.full((6,), IGNORE)]}, r"input_ids\[1\]"),
    ({"input_ids": IDS, "labels": [IDS[0], without_prompt(IDS[1], 6)]}, r"input_ids\[1\]"),
    ({"input_ids": [IDS[0], IDS[0][:1]]}, r"input_ids\[1\]"),
    ({"input_ids": [IDS[0], torch.zeros(0)]}, r"input_ids\[1\]"),
    ({"input_ids": [IDS[0], IDS[0][None]]}, r"input_ids\[1\]"),
    ({"input_ids": [IDS[0], "w5"]}, "input_ids"),
    ({"input_ids": tokens(65)}, r"input_ids\[0\].*65.*64"),
])
def test_bad_rows_are_an_error_before_any_weight_has_moved(make, call, names):
    trainer = make()
    before = state_of(trainer)
    with pytest.raises(InputError, match=names) as error:
        trainer.step(**call)
    assert "\n" not in str(error.value) and trainer.state.global_step == 0
    assert all(torch.equal(before[name], p) for name, p in state_of(trainer).items())


def test_a_step_after_bad_rows_is_as_without_them(make):
    trainer = make(**SGD)
    with pytest.raises(InputError):
        trainer.step([IDS[0], IDS[0][:1]])
    assert trainer.step(IDS) == make(**SGD).step(IDS)


@pytest.mark.parametrize("parts, names", [
    ({"truncation_mode": "keep_middle"}, "truncation_mode.*keep_middle"),
    ({"max_length": 1}, "max_length=1"),
    ({"max_length": 0}, "max_length=0"),
])
def test_bad_arguments_are_an_error_with_their_name(make, parts, names):
    with pytest.raises(InputError, match=names):
        make(parts=parts)


def test_a_model_that_is_no_language_model_is_refused(make):
    with pytest.raises(InputError, match="model.*GPT2ForSequenceClassification"):
        make(GPT2ForSequenceClassification(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)))
    with pytest.raises(InputError, match="model"):
        IterativeSFTTrainer()


def test_a_row_whose_labels_are_all_cut_off_is_named_with_the_cut(make):
    labels = torch.cat([IDS[0][:2], torch.full_like(IDS[0][2:], IGNORE)])
    with pytest.raises(InputError, match=r"input_ids\[0\].*max_length=3"):
        make(parts={"max_length": 3}).step([IDS[0]], labels=[labels])


def test_warmup_as_a_fraction_needs_max_steps(make):
    with pytest.raises(InputError, match="warmup_steps=0.1.*max_steps"):
        make(max_steps=-1, warmup_steps=0.1)


def test_a_tokenizer_needs_no_pad_token(make, make_tokenizer):
    bare = make_tokenizer(pad_token=None)
    assert make(parts={"tokenizer": bare}).step(tokens(5, 9)) == make().step(tokens(5, 9))
    with pytest.raises(InputError, match="data_collator"):
        parts = {"tokenizer": bare, "data_collator": DataCollatorForSeq2Seq(bare)}
        make(parts=parts).step(tokens(5, 9))


def test_labels_longer_than_the_model_are_an_error_with_their_length(make):
    model = still("t5")
    model.config.max_position_embeddings = 64
    with pytest.raises(InputError, match=r"input_ids\[0\].*70.*64"):
        make(model).step(tokens(5), labels=tokens(70))


def test_texts_need_a_tokenizer(make):
    trainer = make(parts={"tokenizer": None})
    assert trainer.step(tokens(5, 9))["tokens"] == 12
    with pytest.raises(InputError, match="texts.*tokenizer"):
        trainer.step(texts=WORDS)


def test_evaluation_rows_without_tokens_or_text_are_an_error(make):
    with pytest.raises(InputError, match="eval_dataset.*labels"):
        make().evaluate(Dataset.from_list([{"labels": [5, 6]}]))


def test_a_loss_that_is_no_number_stops_the_run_before_a_weight_moves(make):
    trainer = make()
    trainer.model.transformer.ln_f.weight.data.fill_(math.inf)
    before = state_of(trainer)
    with pytest.raises(InputError, match="loss.*nan"):
        trainer.step(tokens(5))
    assert all(torch.equal(before[name], p) for name, p in state_of(trainer).items())


def test_train_is_an_error_that_names_step(make):
    with pytest.raises(InputError, match="step"):
        make().train()
