"""reward.py: the loss by hand, one packed pass that scores every text as alone, rows, configuration, and all that Trainer gives."""
import copy
import dataclasses
import inspect
import math
import warnings

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, IterableDataset
from transformers import AutoModelForSequenceClassification, HfArgumentParser, TrainingArguments

import reward
from common import InputError, load_reward
from conftest import BOS, EOS, PAD, VOCAB
from reward import (COLUMNS, RETIRED, RewardConfig, RewardDataCollatorWithPadding, RewardTrainer, compute_accuracy, lay_out,
                    preference_loss)

DECODERS = ("gpt2", "llama", "qwen3", "gemma", "mistral")
LENGTHS = ((3, 9), (7, 2), (12, 5), (4, 4), (6, 11), (2, 8), (10, 3), (5, 6))
TEMPLATE = "{% for m in messages %}{{ '<s> ' + m['content'] + ' </s> ' }}{% endfor %}"


def sizes(arch):
    tokens = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "num_labels": 1}
    llama = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
             "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.2}
    return {**tokens, **{
        "gpt2": {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.2, "resid_pdrop": 0.0,
                 "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "llama": llama, "qwen3": llama, "gemma": llama, "mistral": {**llama, "sliding_window": 6},
        "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": PAD,
               "dropout_rate": 0.0, "classifier_dropout": 0.0, "is_encoder_decoder": True},
        "bert": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    }[arch]}


def classifier(arch="gpt2", seed=0, **changes):
    """A random classifier of 2 layers of 32 with one label and no dropout."""
    name = {"gpt2": "GPT2"}.get(arch, arch.capitalize())
    torch.manual_seed(seed)
    config = getattr(transformers, name + "Config")(**{**sizes(arch), **changes})
    return getattr(transformers, name + "ForSequenceClassification")(config)


def pairs(lengths=LENGTHS, seed=0, end=(), **columns):
    """Rows of the four columns: random words, the n-th chosen and rejected text of the n-th two lengths, and `end`."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for both in lengths:
        row = {}
        for side, n in zip(reward.SIDES, both):
            row[f"input_ids_{side}"] = torch.randint(4, VOCAB, (n,), generator=draw).tolist() + list(end)
            row[f"attention_mask_{side}"] = [1] * len(row[f"input_ids_{side}"])
        rows.append(row)
    for name, values in columns.items():
        rows = [{**row, name: value} for row, value in zip(rows, values)]
    return Dataset.from_list(rows)


@pytest.fixture
def make_args(tmp_path):
    """make_args(**fields) -> RewardConfig: two steps of four pairs in their order, no checkpointing."""
    def make(**fields):
        return RewardConfig(**{"output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2,
                               "per_device_eval_batch_size": 4, "disable_tqdm": True, "use_cpu": True, "logging_steps": 1,
                               "train_sampling_strategy": "sequential", "save_strategy": "no", "gradient_checkpointing": False,
                               "remove_unused_columns": False, **fields})

    return make


@pytest.fixture
def make_trainer(make_args, tokenizer):
    """make_trainer("gpt2" or a model, rows, **fields of RewardConfig or arguments of RewardTrainer) -> RewardTrainer"""
    names = set(inspect.signature(RewardTrainer).parameters)

    def make(model="gpt2", rows=None, **kwargs):
        parts = {name: kwargs.pop(name) for name in list(kwargs) if name in names - {"max_length"}}
        model = classifier(model) if isinstance(model, str) else model
        parts = {"model": model, "tokenizer": tokenizer, "train_dataset": pairs() if rows is None else rows, **parts}
        return RewardTrainer(args=make_args(**kwargs), **parts)

    return make


def batch_of(trainer, rows=None):
    return trainer.data_collator(list(trainer.train_dataset if rows is None else rows))


def rewards(trainer, rows=None):
    """Scores of all chosen texts and all rejected ones, [2, n]."""
    with torch.no_grad():
        _, out = trainer.compute_loss(trainer.model.eval(), batch_of(trainer, rows), return_outputs=True)
    return torch.stack([out["rewards_chosen"], out["rewards_rejected"]])


def alone(model, rows):
    """The same, each text by itself, without padding, by the plain model."""
    with torch.no_grad():
        return torch.stack([torch.stack([model.eval()(torch.tensor([row[f"input_ids_{side}"]])).logits[0, 0] for row in rows])
                            for side in reward.SIDES])


def lora(**kwargs):
    from peft import LoraConfig
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", **kwargs})


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def same_weights(one, other, atol=1e-6):
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters()):
        if not name.endswith("c_attn.bias"):  # the keys' part has no gradient but rounding, of which Adam makes whole steps
            torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")


# ------------------------------------------------------------------------------------------------ the mathematics
def test_the_loss_of_a_pair_by_hand():
    chosen, rejected = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([0.0, 0.0, 2.0])
    want = [math.log(1 + math.exp(-2)), math.log(2), math.log(1 + math.exp(3))]
    assert preference_loss(chosen, rejected).tolist() == pytest.approx(want, abs=1e-6)


def test_the_loss_falls_when_the_chosen_text_gains():
    chosen = torch.tensor([0.3], requires_grad=True)
    preference_loss(chosen, torch.tensor([0.5])).backward()
    assert chosen.grad.item() == pytest.approx(-1 / (1 + math.exp(-0.2)), abs=1e-6)  # -(1 - sigmoid(-0.2))


def test_each_pair_has_its_own_margin():
    chosen, rejected, margin = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.5])
    want = [math.log(2), math.log(1 + math.exp(0.5))]
    assert preference_loss(chosen, rejected, margin).tolist() == pytest.approx(want, abs=1e-6)


def test_with_smoothing_the_loss_is_least_where_the_doubt_is():
    eps = 0.1
    best = math.log((1 - eps) / eps)  # sigmoid(best) = 1 - eps
    at = lambda difference: preference_loss(torch.tensor([difference]), torch.zeros(1), smoothing=eps).item()
    assert at(best) < at(best - 0.1) and at(best) < at(best + 0.1)
    assert at(best) == pytest.approx(-(0.9 * math.log(0.9) + 0.1 * math.log(0.1)), abs=1e-6)


def test_with_half_of_the_labels_in_doubt_the_difference_is_drawn_to_the_margin():
    at = lambda difference: preference_loss(torch.tensor([difference]), torch.zeros(1), torch.tensor([-1.5]), smoothing=0.5).item()
    assert at(-1.5) == pytest.approx(math.log(2)) and at(-1.5) < min(at(-1.6), at(-1.4))


def test_centring_adds_the_square_of_the_sum_of_both_scores():
    plain, centred = (preference_loss(torch.tensor([2.0]), torch.tensor([1.0]), centering=c).item() for c in (0.0, 0.01))
    assert centred - plain == pytest.approx(0.09, abs=1e-6)


def test_ties_count_neither_as_right_nor_as_wrong():
    assert compute_accuracy((np.array([[2, 1], [1, 2], [3, 0], [1, 1]]), None))["accuracy"] == pytest.approx(2 / 3)
    assert compute_accuracy((np.ones((3, 2)), None))["accuracy"] == 0.5


# ------------------------------------------------------------------------------------------------ one pass, little padding
@pytest.mark.parametrize("packing", [False, True])
def test_every_token_stands_once_in_its_text_s_order(packing):
    lengths = [n for both in zip(*LENGTHS) for n in both]
    starts = np.cumsum([0, *lengths])
    index, positions, real, ends, place = lay_out(lengths, packing)
    assert sorted(index[real].tolist()) == list(range(sum(lengths)))
    for text, n in enumerate(lengths):
        row, slot = divmod(place[text].item(), ends.shape[1])
        last = ends[row, slot].item()
        assert index[row, last - n + 1:last + 1].tolist() == list(range(starts[text], starts[text] + n))
        assert positions[row, last - n + 1:last + 1].tolist() == list(range(n))
    assert positions.max() < max(lengths)


def test_texts_of_many_lengths_share_rows_so_that_little_is_padding():
    draw = np.random.RandomState(0)
    padded, packed = [], []
    for _ in range(20):
        lengths = draw.randint(32, 129, 16).tolist()
        padded.append(lay_out(lengths, False)[0].numel() / sum(lengths))
        packed.append(lay_out(lengths, True)[0].numel() / sum(lengths))
    assert np.mean(padded) > 1.5 and np.mean(packed) < 1.15


@pytest.mark.parametrize("packing", [False, True])
def test_the_two_sides_of_a_pair_end_next_to_each_other(packing):
    lengths = [n for both in zip(*LENGTHS) for n in both]
    _, _, _, ends, place = lay_out(lengths, packing)
    rows, slots = place // ends.shape[1], place % ends.shape[1]
    order = [text for _, _, text in sorted(zip(rows.tolist(), ends[rows, slots].tolist(), range(16)))]
    assert all(abs(a - b) == 8 for a, b in zip(order[::2], order[1::2]))


@pytest.mark.parametrize("arch", DECODERS)
def test_packed_texts_are_scored_as_each_is_alone(arch, make_trainer):
    trainer = make_trainer(arch)
    assert trainer.packing
    torch.testing.assert_close(rewards(trainer), alone(trainer.model, pairs()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ("t5", "bert"))
def test_classifiers_that_choose_their_own_token_are_padded(arch, make_trainer):
    rows = pairs(end=[EOS])
    trainer = make_trainer(arch, rows)
    assert not trainer.packing
    torch.testing.assert_close(rewards(trainer), alone(trainer.model, rows), rtol=1e-4, atol=1e-4)
    before = losses(trainer) or trainer.train() and losses(trainer)
    assert all(map(math.isfinite, before))


def blind(model):
    """The model, deaf to positions: texts that share a row see each other, as in a recurrent model."""
    forward = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    return model


def test_a_model_that_cannot_keep_texts_apart_is_found_out_and_padded(make_trainer):
    trainer = make_trainer(blind(classifier("llama")))
    assert not trainer.packing
    torch.testing.assert_close(rewards(trainer), alone(trainer.model, pairs()), rtol=1e-4, atol=1e-4)


def test_both_sides_go_through_the_model_once(make_trainer):
    trainer, calls = make_trainer(gradient_accumulation_steps=2, max_steps=1), []
    trainer.model.register_forward_pre_hook(lambda *args: calls.append(1))
    trainer.train()
    assert len(calls) == 2  # two micro-batches


def test_what_moves_all_scores_alike_gets_no_gradient_at_all(make_trainer):
    """A gradient of nothing but rounding would be made whole steps of by Adam."""
    trainer = make_trainer()
    trainer.compute_loss(trainer.model, batch_of(trainer)).backward()
    assert trainer.model.transformer.ln_f.bias.grad.abs().max() == 0
    assert trainer.model.transformer.ln_f.weight.grad.abs().max() > 0


@pytest.mark.parametrize("arch", DECODERS)
def test_a_score_is_read_at_the_last_token_even_if_the_end_token_is_the_padding(arch, make_trainer, make_tokenizer):
    rows = pairs(end=[EOS])
    want = alone(classifier(arch), rows)  # whose padding is another token
    trainer = make_trainer(arch, rows, tokenizer=make_tokenizer(pad_token="</s>"))
    torch.testing.assert_close(rewards(trainer), want, rtol=1e-4, atol=1e-4)


def test_chats_that_differ_after_the_first_end_token_differ_in_score(make_trainer, make_tokenizer):
    row = {"input_ids_chosen": [5, EOS, 6, EOS], "input_ids_rejected": [5, EOS, 9, EOS]}
    rows = Dataset.from_list([{**row, "attention_mask_chosen": [1] * 4, "attention_mask_rejected": [1] * 4}])
    (chosen,), (rejected,) = rewards(make_trainer(classifier(pad_token_id=EOS), rows, tokenizer=make_tokenizer(pad_token="</s>")))
    assert abs(chosen - rejected) > 1e-3


def test_the_side_of_the_padding_changes_no_score(make_trainer, make_tokenizer):
    left = lambda rows: {key: value.flip(1) if "mask" in key else value for key, value in to_the_left(rows).items()}

    def to_the_left(rows):
        batch = RewardDataCollatorWithPadding(make_tokenizer())(rows)
        for side in reward.SIDES:
            batch[f"input_ids_{side}"] = torch.stack([row.roll(int((mask == 0).sum())) for row, mask in zip(
                batch[f"input_ids_{side}"], batch[f"attention_mask_{side}"])])
        return {key: value for key, value in batch.items() if key != "return_loss"}

    want = rewards(make_trainer())
    torch.testing.assert_close(rewards(make_trainer(tokenizer=make_tokenizer(padding_side="left"))), want)
    torch.testing.assert_close(rewards(make_trainer(data_collator=left)), want)


# ------------------------------------------------------------------------------------------------ rows and batches
def test_a_batch_is_padded_on_the_right_to_its_longest_text(tokenizer):
    batch = RewardDataCollatorWithPadding(tokenizer)(list(pairs(((2, 1), (1, 3)), margin=[1, 0.5])))
    assert batch["input_ids_chosen"].shape == (2, 2) and batch["input_ids_rejected"].shape == (2, 3)
    assert batch["attention_mask_rejected"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["input_ids_chosen"][1, 1] == PAD and batch["margin"].tolist() == [1, 0.5]


def test_the_collator_s_widths(tokenizer):
    width = lambda **kwargs: RewardDataCollatorWithPadding(tokenizer, **kwargs)(list(pairs(((5, 6),))))["input_ids_chosen"].shape[1]
    assert [width(), width(max_length=3), width(pad_to_multiple_of=4), width(padding="max_length", max_length=9)] == [5, 3, 8, 9]


@pytest.mark.parametrize("wrong", [{"padding": False}, {"return_tensors": "np"}])
def test_the_collator_refuses_what_it_cannot_do(wrong, tokenizer):
    with pytest.raises(InputError, match="padded torch tensors"):
        RewardDataCollatorWithPadding(tokenizer, **wrong)


def test_the_collator_names_the_column_that_a_row_lacks(tokenizer):
    row = {key: value for key, value in pairs()[0].items() if key != "input_ids_rejected"}
    with pytest.raises(InputError, match="lacks input_ids_rejected"):
        RewardDataCollatorWithPadding(tokenizer)([row])


def tokens(rows, make_trainer, **kwargs):
    rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return [[row[f"input_ids_{side}"] for side in reward.SIDES] for row in make_trainer(rows=rows, **kwargs).train_dataset]


def test_texts_are_answers_to_a_prompt_or_stand_alone(make_trainer):
    answers = [{"prompt": "w4 w5", "chosen": " w6", "rejected": " w7", "id": 3}]
    texts = [{"chosen": "w4 w5 w6", "rejected": "w4 w5 w7"}]
    assert tokens(answers, make_trainer) == tokens(texts, make_trainer) == [[[4, 5, 6], [4, 5, 7]]]


@pytest.fixture
def chat_tokenizer(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def turns(*contents, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def test_chats_go_through_the_template_however_the_prompt_is_given(make_trainer, chat_tokenizer):
    want = [[[BOS, 4, EOS, BOS, 5, EOS], [BOS, 4, EOS, BOS, 6, EOS]]]
    answer = lambda word: turns(word, first="assistant")
    whole = [{"prompt": "w4", "chosen": turns("w4", "w5"), "rejected": turns("w4", "w6")}]
    for prompt in ("w4", turns("w4")):
        parts = [{"prompt": prompt, "chosen": answer("w5"), "rejected": answer("w6")}]
        assert tokens(parts, make_trainer, tokenizer=chat_tokenizer) == want
    assert tokens(whole, make_trainer, tokenizer=chat_tokenizer) == want


def test_max_length_cuts_texts_tokens_and_chats(make_trainer, chat_tokenizer):
    texts = [{"prompt": "w4 ", "chosen": "w5 w6 w7", "rejected": "w8 w9"}]
    chats = [{"chosen": turns("w4 w5 w6"), "rejected": turns("w7")}]
    assert tokens(texts, make_trainer, max_length=3) == [[[4, 5, 6], [4, 8, 9]]]
    assert tokens(chats, make_trainer, max_length=2, tokenizer=chat_tokenizer) == [[[BOS, 4], [BOS, 7]]]
    trainer = make_trainer(max_length=3)
    assert batch_of(trainer)["input_ids_chosen"].shape == (8, 3)


def test_a_text_is_never_longer_than_tokenizer_and_model_take(make_trainer, make_tokenizer):
    assert make_trainer().max_length == 64 and make_trainer(max_length=100).max_length == 64
    short = make_tokenizer()
    short.model_max_length = 9
    assert make_trainer(tokenizer=short).max_length == 9
    trainer = make_trainer(rows=pairs(((90, 80),)), max_steps=1)
    trainer.train()  # no position beyond the model's


def test_pairs_that_do_not_differ_are_left_out_and_counted(make_trainer, capsys):
    rows = [{"chosen": "w4 w5 w6", "rejected": "w4 w5 w7"}, {"chosen": "w8", "rejected": "w9"}, {"chosen": "", "rejected": "w9"}]
    assert tokens(rows, make_trainer, max_length=2) == [[[8], [9]]]
    assert "2 of 3 pairs of the training data set are left out" in capsys.readouterr().out


def test_other_columns_are_kept_from_the_model_and_margin_is_not(make_trainer):
    texts = Dataset.from_list([{"chosen": "w4", "rejected": "w5", "margin": 2, "id": "a"}])
    assert sorted(make_trainer(rows=texts).train_dataset.column_names) == sorted([*COLUMNS, "margin"])
    with pytest.warns(UserWarning, match="remove_unused_columns"):
        trainer = make_trainer(rows=pairs(id=range(8), margin=[0.5] * 8), remove_unused_columns=True)
    assert set(next(iter(trainer.get_train_dataloader()))) == {*COLUMNS, "margin", "return_loss"}


def test_a_stream_is_read_as_it_comes(make_trainer):
    def rows():
        yield from ({"chosen": f"w{i} w5", "rejected": f"w{i + 1} w6"} for i in range(4, 30))

    trainer = make_trainer(rows=IterableDataset.from_generator(rows))
    trainer.train()
    assert len(losses(trainer)) == 2


def test_several_processes_tokenise_alike(make_trainer):
    rows = [{"chosen": f"w{i} w5", "rejected": f"w{i} w6"} for i in range(4, 12)]
    assert tokens(rows, make_trainer, dataset_num_proc=2) == tokens(rows, make_trainer)


def test_a_text_is_scored_in_training_as_by_the_saved_model(make_trainer, tmp_path):
    rows = [{"prompt": "w4 w5 ", "chosen": "w6 w7 w8", "rejected": "w9"}, {"prompt": "w10 ", "chosen": "w11", "rejected": "w12 w13"}]
    trainer = make_trainer(rows=Dataset.from_list(rows))
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    texts = [row["prompt"] + row[side] for side in reward.SIDES for row in rows]
    scores = torch.stack(load_reward(tmp_path / "saved")(texts))
    torch.testing.assert_close(rewards(trainer).flatten(), scores, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ the configuration
TRANSLATED = {  # old field, a value -> today's field, its value
    "evaluation_strategy": ("steps", "eval_strategy", "steps"), "per_gpu_train_batch_size": (3, "per_device_train_batch_size", 3),
    "per_gpu_eval_batch_size": (5, "per_device_eval_batch_size", 5), "warmup_ratio": (0.1, "warmup_steps", 0.1),
    "no_cuda": (True, "use_cpu", True), "tpu_metrics_debug": (True, "debug", ["tpu_metrics_debug"]),
    "fsdp_min_num_params": (7, "fsdp_config", {"min_num_params": 7}),
    "fsdp_transformer_layer_cls_to_wrap": ("GPT2Block", "fsdp_config", {"transformer_layer_cls_to_wrap": "GPT2Block"}),
    "adafactor": (True, "optim", "adafactor"), "group_by_length": (True, "train_sampling_strategy", "group_by_length"),
    "include_inputs_for_metrics": (True, "include_for_metrics", ["inputs"]), "push_to_hub_model_id": ("me/it", "hub_model_id", "me/it"),
    "push_to_hub_token": ("t", "hub_token", "t"), "torchdynamo": ("inductor", "torch_compile_backend", "inductor"),
    "dispatch_batches": (True, "accelerator_config", {"dispatch_batches": True}),
    "split_batches": (True, "accelerator_config", {"split_batches": True}),
    "include_tokens_per_second": (True, "include_num_input_tokens_seen", "all")}
REFUSED = {"overwrite_output_dir": (True, "remove the folder"), "logging_dir": ("x", "TENSORBOARD_LOGGING_DIR"), "save_safetensors": (False, "safetensors"),
           "use_mps_device": (True, "use_cpu"), "jit_mode_eval": (True, "torch_compile"), "use_ipex": (True, "torch_compile"),
           "fp16_opt_level": ("O2", "bf16"), "half_precision_backend": ("apex", "bf16"), "tpu_num_cores": (8, "torch_xla"),
           "past_index": (0, "leave it out"), "use_legacy_prediction_loop": (True, "leave it out"), "fp16_backend": ("apex", "bf16"),
           "push_to_hub_organization": ("o", "hub_model_id"), "mp_parameters": ("x", "fsdp"), "ray_scope": ("all", "RAY_SCOPE")}


def test_every_retired_field_has_a_row_here():
    assert set(TRANSLATED) | set(REFUSED) == set(RETIRED) and len(RETIRED) == 32
    assert not set(RETIRED) & {f.name for f in dataclasses.fields(TrainingArguments)}


@pytest.mark.parametrize("old", TRANSLATED)
def test_a_retired_field_means_what_it_meant(old, tmp_path):
    value, new, want = TRANSLATED[old]
    got = getattr(RewardConfig(output_dir=str(tmp_path), eval_steps=1, **{old: value}), new)
    got = {key: getattr(got, key) if not isinstance(got, dict) else got[key] for key in want} if isinstance(want, dict) else got
    assert got == want


@pytest.mark.parametrize("old", REFUSED)
def test_a_retired_field_that_can_mean_nothing_is_refused_with_what_to_use(old):
    value, instead = REFUSED[old]
    with pytest.raises(InputError, match=f"{old}={value!r} can mean nothing.*{instead}"):
        RewardConfig(output_dir="x", **{old: value})


def test_a_retired_field_and_today_s_must_not_contradict():
    with pytest.raises(InputError, match="evaluation_strategy .* eval_strategy='epoch'"):
        RewardConfig(output_dir="x", evaluation_strategy="steps", eval_strategy="epoch")
    RewardConfig(output_dir="x", evaluation_strategy="epoch", eval_strategy="epoch")
    both = RewardConfig(output_dir="x", dispatch_batches=False, split_batches=True).accelerator_config
    assert (both.dispatch_batches, both.split_batches) == (False, True)


def test_the_defaults_say_nothing_that_warns(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = RewardConfig(output_dir=str(tmp_path))
        assert RewardConfig(output_dir=str(tmp_path), report_to=None).report_to == []
    assert config.gradient_checkpointing and config.activation_checkpointing and config.max_length is None
    assert RewardConfig(output_dir=str(tmp_path), gradient_checkpointing=False).activation_checkpointing is False


def test_a_config_may_be_made_from_arguments_and_again_from_itself(tmp_path):
    (config,) = HfArgumentParser(RewardConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--evaluation_strategy", "epoch", "--max_length", "7", "--gradient_checkpointing", "False"])
    assert (config.eval_strategy, config.max_length, config.gradient_checkpointing) == ("epoch", 7, False)
    assert dataclasses.replace(config, learning_rate=1e-3).eval_strategy == "epoch"


@pytest.mark.parametrize("wrong,told", [({"max_length": 0}, "max_length=0 leaves nothing"),
                                        ({"label_smoothing_factor": 0.6}, "label_smoothing_factor=0.6")])
def test_a_wrong_number_is_told_at_once(wrong, told):
    with pytest.raises(InputError, match=told):
        RewardConfig(output_dir="x", **wrong)


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize("rows,told", [
    ([{"question": "w4", "answer": "w5"}], "it needs chosen and rejected"),
    ([{"chosen": "w4", "prompt": "w5"}], "it needs chosen and rejected"),
    ([{"input_ids_chosen": [4], "input_ids_rejected": [5]}], "it needs chosen and rejected"),
    ([{"chosen": [{"role": "user", "content": "w4"}], "rejected": [{"role": "user", "content": "w5"}]}], "no chat template"),
    ([{"chosen": "w4 w5", "rejected": "w4 w6"}], "none has two different sides after their first 1 tokens"),
])
def test_rows_that_cannot_be_learnt_from_are_told_before_training(rows, told, make_trainer):
    with pytest.raises(ValueError, match=told) as error:
        make_trainer(rows=Dataset.from_list(rows), max_length=1)
    assert isinstance(error.value, InputError) and "\n" not in str(error.value)


def test_an_empty_data_set_is_told(make_trainer):
    with pytest.raises(InputError, match="the training data set is empty"):
        make_trainer(rows=pairs().select([]))


def test_a_head_of_two_labels_is_told(make_trainer):
    with pytest.raises(InputError, match="2 labels .* num_labels=1"):
        make_trainer(classifier(num_labels=2))


def test_a_tokenizer_without_padding_pads_with_its_end_token_and_else_is_told(make_trainer, make_tokenizer):
    bare = make_tokenizer(pad_token=None)
    trainer = make_trainer(classifier(pad_token_id=None), tokenizer=bare)
    assert bare.pad_token is None and trainer.tokenizer.pad_token == "</s>" and trainer.model.config.pad_token_id == EOS
    trainer.train()
    with pytest.raises(InputError, match="set tokenizer.pad_token"):
        make_trainer(tokenizer=make_tokenizer(pad_token=None, eos_token=None))
    with pytest.raises(InputError, match="pass tokenizer="):
        make_trainer(tokenizer=None)


def test_two_adapters_and_two_lengths_are_told(make_trainer):
    from peft import get_peft_model
    with pytest.raises(InputError, match="has an adapter already"):
        make_trainer(get_peft_model(classifier(), lora(task_type="SEQ_CLS")), peft_config=lora())
    with pytest.raises(InputError, match="give it once"):
        RewardTrainer(classifier(), RewardConfig(output_dir="x", max_length=3), tokenizer=make_trainer().tokenizer, max_length=4)


def test_a_text_without_tokens_is_told(make_trainer):
    trainer = make_trainer()
    batch = batch_of(trainer)
    batch["attention_mask_chosen"][2] = 0
    with pytest.raises(InputError, match="no token"):
        trainer.compute_loss(trainer.model, batch)


def test_a_loss_that_is_no_number_stops_the_run_before_a_weight_moves(make_trainer, weights, moved):
    model = classifier()
    torch.nn.init.constant_(model.score.weight, float("nan"))
    before = weights(model)
    with pytest.raises(InputError, match="the loss is nan"):
        make_trainer(model).train()
    assert moved(before, model) <= {"score.weight"}  # nan != nan


# ------------------------------------------------------------------------------------------------ the trainer's arguments
def test_the_documented_arguments_stand_in_their_order():
    assert list(inspect.signature(RewardTrainer).parameters)[:13] == [
        "model", "args", "data_collator", "train_dataset", "eval_dataset", "tokenizer", "model_init", "compute_metrics", "callbacks",
        "optimizers", "preprocess_logits_for_metrics", "max_length", "peft_config"]


def test_args_may_be_left_out_or_be_transformers_own(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="remove_unused_columns"):
        trainer = RewardTrainer(classifier(), tokenizer=tokenizer, train_dataset=pairs())
    assert trainer.args.gradient_checkpointing and trainer.args.learning_rate == 5e-5
    args = TrainingArguments("out", remove_unused_columns=False, use_cpu=True, max_steps=1, disable_tqdm=True)
    trainer = RewardTrainer(classifier(), args, tokenizer=tokenizer, train_dataset=pairs(), max_length=4)
    assert trainer.max_length == 4 and math.isfinite(trainer.train().training_loss)


def test_the_tokenizer_may_be_given_under_today_s_name(make_trainer, tokenizer):
    trainer = make_trainer(tokenizer=None, processing_class=tokenizer)
    assert trainer.tokenizer is tokenizer and trainer.processing_class is tokenizer


def test_model_init_makes_the_model_and_its_adapter_when_training_begins(make_trainer):
    trainer = make_trainer(None, model_init=lambda: classifier(pad_token_id=None), peft_config=lora())
    trainer.train()
    assert trainer.model.config.pad_token_id == PAD and hasattr(trainer.model, "peft_config")


def test_every_other_argument_reaches_trainer(make_trainer):
    seen = []

    class Callback(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append("step")

    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = make_trainer(model, callbacks=[Callback()], optimizers=(optimizer, None), eval_dataset=pairs(),
                           compute_metrics=lambda p: {"shape": float(p.predictions.shape[1])},
                           preprocess_logits_for_metrics=lambda logits, labels: logits[:, :1])
    trainer.train()
    assert seen == ["step", "step"] and trainer.optimizer.optimizer is optimizer
    assert trainer.evaluate()["eval_shape"] == 1


def test_nothing_that_was_given_is_changed(make_args, make_tokenizer):
    args, tokenizer, rows, peft_config = make_args(remove_unused_columns=True), make_tokenizer(padding_side="left"), pairs(), lora()
    before = [copy.deepcopy(x) for x in (args.to_dict(), tokenizer.padding_side, tokenizer.pad_token, rows[:], peft_config)]
    with pytest.warns(UserWarning):
        RewardTrainer(classifier(), args, tokenizer=tokenizer, train_dataset=rows, peft_config=peft_config).train()
    assert before == [args.to_dict(), tokenizer.padding_side, tokenizer.pad_token, rows[:], peft_config]


def test_equal_seeds_draw_equal_adapters(make_trainer):
    one, two = (make_trainer("llama", peft_config=lora(), seed=7).model for _ in range(2) if torch.rand(1) is not None)
    other = make_trainer("llama", peft_config=lora(), seed=8).model
    a, b, c = ([p for n, p in m.named_parameters() if "lora_A" in n][0] for m in (one, two, other))
    assert torch.equal(a, b) and not torch.equal(a, c)


# ------------------------------------------------------------------------------------------------ what is logged
def test_rewards_margin_and_accuracy_are_logged_in_training(make_trainer):
    trainer = make_trainer(learning_rate=0.0, max_steps=4, logging_steps=2)
    want = rewards(trainer)
    trainer.train()
    row = trainer.state.log_history[0]  # two steps, all eight pairs
    assert row["rewards/chosen"] == pytest.approx(want[0].mean().item(), abs=1e-5)
    assert row["rewards/rejected"] == pytest.approx(want[1].mean().item(), abs=1e-5)
    assert row["rewards/margins"] == pytest.approx((want[0] - want[1]).mean().item(), abs=1e-5)
    assert row["rewards/accuracies"] == pytest.approx((want[0] > want[1]).float().mean().item())
    assert row == {**row, **{k: v for k, v in trainer.state.log_history[1].items() if k.startswith("rewards")}}  # each line anew


def test_an_evaluation_is_the_mean_over_pairs_whatever_the_batches(make_trainer):
    want = rewards(make_trainer(rows=pairs(LENGTHS[:7])))
    expected = {"eval_loss": preference_loss(*want).mean(), "eval_rewards/chosen": want[0].mean(), "eval_rewards/rejected": want[1].mean(),
                "eval_rewards/margins": (want[0] - want[1]).mean(), "eval_accuracy": (want[0] > want[1]).float().mean(),
                "eval_rewards/accuracies": (want[0] > want[1]).float().mean()}
    for size in (1, 3, 7):  # 7 pairs in batches of 3: the last has one
        got = make_trainer(eval_dataset=pairs(LENGTHS[:7]), per_device_eval_batch_size=size).evaluate()
        assert {name: got[name] for name in expected} == pytest.approx({k: v.item() for k, v in expected.items()}, abs=1e-5)


def test_rows_given_to_evaluate_and_predict_may_be_texts_and_sets_may_have_names(make_trainer):
    texts = Dataset.from_list([{"chosen": "w4 w5", "rejected": "w6"}, {"chosen": "w7", "rejected": "w8 w9"}])
    trainer = make_trainer(eval_dataset={"kind": texts, "unkind": pairs()})
    assert {"eval_kind_accuracy", "eval_unkind_rewards/margins"} <= set(trainer.evaluate())
    assert "eval_accuracy" in trainer.evaluate(texts)
    output = trainer.predict(texts)
    assert output.predictions.shape == (2, 2) and output.predictions.sum(1) == pytest.approx(1, abs=1e-5)
    assert "test_rewards/chosen" in output.metrics and output.label_ids.tolist() == [0, 0]


def test_tokens_of_both_sides_are_counted(make_trainer):
    trainer = make_trainer(include_num_input_tokens_seen="non_padding", max_steps=2)
    trainer.train()
    assert trainer.state.num_input_tokens_seen == sum(map(sum, LENGTHS)) and trainer.state.total_flos > 0


def test_rows_may_be_grouped_by_length_and_inputs_shown_to_metrics(make_trainer):
    seen = []
    trainer = make_trainer(train_sampling_strategy="group_by_length", eval_dataset=pairs(), include_for_metrics=["inputs"],
                           compute_metrics=lambda p: seen.append(p.inputs.shape[0]) or {})
    assert trainer.train_dataset["length"][:] == [sum(both) for both in LENGTHS]
    trainer.train()
    trainer.evaluate()
    assert seen == [8]


def test_tensorboard_gets_the_figures(make_trainer, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    make_trainer(report_to="tensorboard").train()
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert {"train/loss", "train/rewards/margins"} <= set(events.Tags()["scalars"])


# ------------------------------------------------------------------------------------------------ what Trainer gives
@pytest.mark.parametrize("arch", DECODERS)
def test_every_architecture_learns(arch, make_trainer):
    trainer = make_trainer(arch, per_device_train_batch_size=8, max_steps=15, learning_rate=5e-3)
    trainer.train()
    assert losses(trainer)[-1] < 0.5 * losses(trainer)[0]
    assert trainer.state.log_history[-2]["rewards/accuracies"] == 1


@pytest.mark.parametrize("arch", ("gpt2", "mistral"))
def test_micro_batches_give_the_step_of_one_big_batch(arch, make_trainer):
    """Also where they are of different sizes: the last of 6 pairs in fours has two."""
    rows = pairs(LENGTHS[:6], margin=[0, 1, 2, 0.5, 0, 1])
    big = make_trainer(arch, rows, per_device_train_batch_size=6, optim="sgd")
    small = make_trainer(arch, rows, per_device_train_batch_size=4, gradient_accumulation_steps=2, optim="sgd")
    for trainer in (big, small):
        trainer.train()
    assert losses(small) == pytest.approx(losses(big), abs=1e-5)
    same_weights(big.model, small.model, atol=1e-5)
    for line in zip(big.state.log_history[:2], small.state.log_history[:2]):
        a, b = ({k: v for k, v in row.items() if k.startswith("rewards")} for row in line)
        assert a == pytest.approx(b, abs=1e-4)


def test_a_run_that_is_resumed_goes_on_to_the_same_losses(make_trainer, tmp_path):
    fields = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "train_sampling_strategy": "random"}
    model = lambda: classifier(resid_pdrop=0.1)
    whole = make_trainer(model(), output_dir=str(tmp_path / "a"), **fields)
    whole.train()
    again = make_trainer(model(), output_dir=str(tmp_path / "b"), **fields)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert losses(again) == losses(whole)
    same_weights(whole.model, again.model, atol=0)


def test_the_best_model_is_loaded_at_the_end(make_trainer):
    trainer = make_trainer(eval_dataset=pairs(seed=1), max_steps=6, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
                           load_best_model_at_end=True, metric_for_best_model="rewards/margins", greater_is_better=False)
    trainer.train()
    seen = [row["eval_rewards/margins"] for row in trainer.state.log_history if "eval_rewards/margins" in row]
    assert trainer.state.best_metric == min(seen) != seen[-1]
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(min(seen), abs=1e-5)


@pytest.mark.parametrize("arch", DECODERS)
def test_an_adapter_and_the_head_train_under_gradient_checkpointing(arch, make_trainer, weights, moved):
    trainer = make_trainer(arch, peft_config=lora(), gradient_checkpointing=True)
    before = weights(trainer.model)
    trainer.train()
    changed = moved(before, trainer.model)
    adapters = {name for name in before if "lora_" in name}
    assert adapters <= changed and any("score" in name for name in changed)
    assert all("lora_" in name or "score" in name for name in changed)


@pytest.mark.parametrize("arch", ("gpt2", "llama"))
def test_gradient_checkpointing_changes_no_number(arch, make_trainer):
    plain, checkpointed = (make_trainer(arch, gradient_checkpointing=on) for on in (False, True))
    for trainer in (plain, checkpointed):
        trainer.train()
    assert checkpointed.model.is_gradient_checkpointing
    same_weights(plain.model, checkpointed.model, atol=1e-6)


def test_a_compiled_model_learns_what_the_plain_one_learns(make_trainer):
    plain, compiled = (make_trainer("llama", torch_compile=on, torch_compile_backend="eager" if on else None, optim="sgd", max_steps=3)
                       for on in (False, True))
    for trainer in (plain, compiled):
        trainer.train()
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-4)


def test_bf16_computes_in_half_precision_and_the_loss_in_float32(make_trainer):
    trainer = make_trainer("llama", bf16=True, max_steps=15, per_device_train_batch_size=8)
    seen = []
    trainer.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    assert trainer.packing
    trainer.train()
    assert seen[-1] == torch.bfloat16 and next(trainer.model.parameters()).dtype == torch.float32
    assert losses(trainer)[-1] < losses(trainer)[0] / 2
    assert rewards(trainer).dtype == torch.float32


def test_an_adapter_is_saved_with_the_head_and_goes_on_training(make_trainer, tmp_path):
    from peft import PeftModel
    trainer = make_trainer("llama", peft_config=lora(task_type=None))
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(classifier("llama", seed=0), tmp_path / "adapter", is_trainable=True)
    torch.nn.init.zeros_(loaded.get_base_model().score.original_module.weight)
    again = make_trainer(loaded)
    torch.testing.assert_close(rewards(again), rewards(trainer))
    again.train()
    assert not torch.equal(rewards(again), rewards(trainer))


def test_a_saved_model_is_a_plain_classifier(make_trainer, tmp_path):
    trainer = make_trainer("qwen3")
    trainer.train()
    trainer.save_model(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model.config.num_labels == 1 and model.config.pad_token_id == PAD
    batch = trainer.tokenizer(["w4 w5 w6", "w7"], padding=True, return_tensors="pt", padding_side="right")
    with torch.no_grad():
        scores = model(**batch).logits[:, 0]
    rows = Dataset.from_list([{"chosen": "w4 w5 w6", "rejected": "w7"}])
    torch.testing.assert_close(rewards(trainer, trainer.prepare(rows, "test")).flatten(), scores, rtol=1e-4, atol=1e-5)


def test_centring_draws_the_scores_to_zero(make_trainer):
    model = lambda: classifier("llama", seed=3)
    mean = lambda **kwargs: abs((lambda t: (t.train(), rewards(t).mean().item())[1])(
        make_trainer(model(), max_steps=15, per_device_train_batch_size=8, **kwargs)))
    assert mean(center_rewards_coefficient=1.0) < 0.1 < mean()


def test_label_smoothing_and_margin_reach_the_loss(make_trainer):
    trainer = make_trainer(rows=pairs(margin=[1.0] * 8), label_smoothing_factor=0.1)
    chosen, rejected = rewards(trainer)
    got = trainer.compute_loss(trainer.model, batch_of(trainer)).item()
    assert got == pytest.approx(preference_loss(chosen, rejected, 1.0, 0.1).mean().item(), abs=1e-6)
