"""sft.py's loss, data and trainer: the mathematics by hand, every argument, every architecture,
and the numbers of TRL 0.7.10 (recorded_sft.json) where it is right. A recorded case with `mended`
was made after repairing the named defect of 0.7.10."""
import copy
import functools
import inspect
import json
import math
import os
import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BOS, CAUSAL, EOS, PAD, SEQ2SEQ, VOCAB, gemma3, hf_model
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
)

from common import TOY, InputError, number_of_positions
from sft import (
    ConstantLengthDataset,
    DataCollatorForCompletionOnlyLM,
    SFTConfig,
    SFTTrainer,
    cross_entropy,
)

IGNORE = -100  # the label of a token that is not in the loss

# one token per word: user 10, assistant 11, "<s> w10 question w11 answer </s> w10 ..."
TEMPLATE = ("{{ '<s> ' }}{% for m in messages %}{{ 'w10 ' if m['role'] == 'user' else 'w11 ' }}"
            "{{ m['content'] }}{{ ' </s> ' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'w11 ' }}{% endif %}")
TEXTS = ["w4 w5 w6", "w7 w8 w9 w20 w21", "w30", "w31 w32 w33 w34 w35 w36 w37", "w40 w41",
         "w50 w51 w52 w53"]
PAIRS = [{"prompt": "w4 w5", "completion": " w6"}, {"prompt": "w7", "completion": " w8 w9 w20"},
         {"prompt": "w30 w31 w32", "completion": " w33 w34"},
         {"prompt": "w40", "completion": " w41 w42 w43 w44"}]
NO_DROPOUT = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
              "t5": {"dropout_rate": 0.0}, "bart": {"dropout": 0.0}}


def rows_of(texts):
    return Dataset.from_list([{"text": text} for text in texts])


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


CHAT = [user("w4 w5"), assistant("w6"), user("w7"), assistant("w8 w9")]
CHAT_IDS = [BOS, 10, 4, 5, 11, 6, EOS, 10, 7, 11, 8, 9, EOS]


def without_dropout(arch, **changes):
    return hf_model(arch, **{**NO_DROPOUT.get(arch, {"attention_dropout": 0.0}), **changes})


@pytest.fixture
def chat_tokenizer(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def closing_tokenizer(make_tokenizer):
    """A tokenizer that writes <s> before and </s> after everything it reads."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return tokenizer


@pytest.fixture
def make_args(tmp_path):
    """make_args(**changes) -> TrainingArguments: SGD without clipping, 3 steps of 4 rows."""
    def make(**changes):
        return TrainingArguments(**{
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4, "max_steps": 3, "learning_rate": 0.05,
            "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0,
            "report_to": "none", "use_cpu": True, "save_strategy": "no", "logging_steps": 1,
            "disable_tqdm": True, **changes})

    return make


@pytest.fixture
def make_sft(make_args, tokenizer):
    """make_sft("gpt2" or a model or None, rows, **parts of SFTTrainer or TrainingArguments)."""
    names = set(inspect.signature(SFTTrainer.__init__).parameters)

    def make(model="gpt2", rows=None, **kwargs):
        rows = rows_of(TEXTS) if rows is None and "train_dataset" not in kwargs else rows
        rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
        parts = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        if isinstance(model, str) and model in CAUSAL + SEQ2SEQ:
            model = without_dropout(model)
        defaults = {"model": model, "args": make_args(**kwargs), "train_dataset": rows,
                    "tokenizer": tokenizer}
        return SFTTrainer(**{**defaults, **parts})

    return make


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def ids(dataset):
    return [list(map(int, row["input_ids"])) for row in dataset]


def batch_of(trainer):
    """The training set as one batch."""
    return trainer.data_collator(list(trainer.train_dataset))


def trained_on(trainer):
    """The tokens of each training row that are in the loss. The first token never is."""
    labels = batch_of(trainer)["labels"]
    if not trainer.model.config.is_encoder_decoder:
        labels = labels[:, 1:]
    return [[token for token in row if token != IGNORE] for row in labels.tolist()]


def row_by_row(model, rows):
    """Mean loss over the labels and its gradient, each row alone and without padding.

    rows: (input_ids, labels) of each. The slow and certain way."""
    total = count = 0
    for tokens, labels in rows:
        tokens, labels = torch.tensor([tokens]), torch.tensor([labels])
        if model.config.is_encoder_decoder:
            logits = model(input_ids=tokens, labels=labels).logits
        else:
            logits, labels = model(input_ids=tokens).logits[:, :-1], labels[:, 1:]
        total = total + F.cross_entropy(logits[0], labels[0], reduction="sum")
        count += (labels != IGNORE).sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(total / count, parameters, allow_unused=True)
    return (total / count).item(), dict(zip(names, gradients, strict=True))


def check_one_step(trainer, rows):
    """Train for one SGD step at a learning rate of 1: its loss and gradient are those of `rows`."""
    before = copy.deepcopy(trainer.model)
    want, gradients = row_by_row(before, rows)
    trainer.train()
    assert losses(trainer) == pytest.approx([want], rel=1e-4)
    after = dict(trainer.model.named_parameters())
    largest = max(g.abs().max() for g in gradients.values() if g is not None)
    for name, p in before.named_parameters():
        gradient = torch.zeros_like(p) if gradients[name] is None else gradients[name]
        # padding and batching change the order of float32 sums: 1e-6 of the largest gradient
        torch.testing.assert_close((p - after[name]).detach(), gradient, rtol=1e-3,
                                   atol=1e-5 * largest.item(),
                                   msg=lambda m, name=name: f"{name}: {m}")


# --------------------------------------------------------------------------------- mathematics
def test_cross_entropy_is_minus_the_log_probability_of_the_target():
    # probabilities 1/4 3/4, 1/2 1/2, 4/5 1/5
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0], [math.log(4), 0.0]])
    want = [math.log(4 / 3), math.log(2), math.log(5)]
    assert cross_entropy(logits, torch.tensor([1, 0, 1])).tolist() == pytest.approx(want)


def test_the_gradient_of_cross_entropy_is_the_probability_minus_the_target():
    logits = torch.tensor([[0.0, math.log(3)]], requires_grad=True)
    cross_entropy(logits * 1, torch.tensor([0])).sum().backward()
    assert logits.grad[0].tolist() == pytest.approx([1 / 4 - 1, 3 / 4])


def test_label_smoothing_spreads_its_fraction_over_the_vocabulary():
    logits = torch.tensor([[0.0, math.log(3)]])
    want = 0.8 * math.log(4) + 0.1 * (math.log(4) + math.log(4 / 3))  # 0.2 over two words
    assert cross_entropy(logits, torch.tensor([0]), 0.2).item() == pytest.approx(want)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_and_its_gradient_equal_torch_s(smoothing):
    logits, targets = torch.randn(200, 17, requires_grad=True), torch.randint(17, (200,))
    ours = cross_entropy(logits * 1, targets, smoothing)
    (gradient,) = torch.autograd.grad(ours.square().sum(), logits)
    theirs = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    (want,) = torch.autograd.grad(theirs.square().sum(), logits)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, want)


def test_cross_entropy_of_bfloat16_logits_is_computed_in_float32():
    logits, targets = torch.randn(50, 1000).bfloat16(), torch.randint(1000, (50,))
    want = F.cross_entropy(logits.float(), targets, reduction="none")
    # bfloat16 has 8 bits: sums of its own would be off by 1e-2
    torch.testing.assert_close(cross_entropy(logits, targets).float(), want, rtol=1e-5, atol=1e-5)


def test_a_term_of_the_logits_may_stand_before_or_after_the_cross_entropy():
    """A fork's z-loss or focal loss: the backward pass leaves the logits as they are."""
    weights, targets = torch.randn(30, 17, requires_grad=True), torch.randint(17, (30,))

    def gradient_of(loss):
        return torch.autograd.grad(loss, weights)[0]

    logits = weights * 1
    before = logits.detach().clone()
    z_loss = logits.logsumexp(-1).square().sum()
    nll = cross_entropy(logits, targets)
    focal = ((1 - (-nll).exp()) ** 2 * nll).sum()
    got = gradient_of(focal + z_loss + logits.softmax(-1).square().sum())
    assert torch.equal(logits, before)
    probabilities = weights.softmax(-1)
    right = probabilities[torch.arange(30), targets]
    want = -((1 - right) ** 2 * right.log()).sum() + weights.logsumexp(-1).square().sum()
    torch.testing.assert_close(got, gradient_of(want + probabilities.square().sum()))


def test_uniform_logits_cost_the_log_of_the_vocabulary(make_sft):
    trainer = make_sft(label_smoothing_factor=0.1)
    torch.nn.init.zeros_(trainer.model.get_output_embeddings().weight)
    loss = trainer.compute_loss(trainer.model, batch_of(trainer))
    assert loss.item() == pytest.approx(math.log(VOCAB))


# --------------------------------------------------------------------------------- rows -> labels
def test_a_text_gets_one_end_token_and_trains_on_it(make_sft):
    trainer = make_sft(rows=[{"text": "w4 w5"}, {"text": "w4 w5 </s>"}])
    assert ids(trainer.train_dataset) == [[4, 5, EOS]] * 2
    assert trained_on(trainer) == [[5, EOS]] * 2


def test_of_a_prompt_and_completion_only_the_completion_and_its_end_are_in_the_loss(make_sft):
    trainer = make_sft(rows=[{"prompt": "w4 w5", "completion": " w6"},
                             {"prompt": "w4", "completion": " w5 w6 </s>"},
                             {"prompt": "w4 </s>", "completion": " w5"}])  # it writes an end itself
    assert ids(trainer.train_dataset) == [[4, 5, 6, EOS], [4, 5, 6, EOS], [4, EOS, 5, EOS]]
    assert trained_on(trainer) == [[6, EOS], [5, 6, EOS], [5, EOS]]


def test_a_tokenizer_that_closes_what_it_reads_closes_no_prompt_and_no_text_twice(
        make_sft, closing_tokenizer):
    trainer = make_sft(rows=[{"text": "w4"}], tokenizer=closing_tokenizer)
    assert ids(trainer.train_dataset) == [[BOS, 4, EOS]]
    pair = [{"prompt": "w4", "completion": " w5"}]
    trainer = make_sft(rows=pair, tokenizer=closing_tokenizer)
    assert ids(trainer.train_dataset) == [[BOS, 4, 5, EOS]] and trained_on(trainer) == [[5, EOS]]
    trainer = make_sft("t5", rows=pair, tokenizer=closing_tokenizer)  # an encoder reads the end
    assert ids(trainer.train_dataset) == [[BOS, 4, EOS]] and trained_on(trainer) == [[5, EOS]]


def test_a_chat_is_in_the_loss_whole_and_only_the_template_writes_special_tokens(
        make_sft, chat_tokenizer):
    trainer = make_sft(rows=[{"messages": CHAT}], tokenizer=chat_tokenizer)
    assert ids(trainer.train_dataset) == [CHAT_IDS] and trained_on(trainer) == [CHAT_IDS[1:]]


def test_messages_are_taken_before_text(make_sft, chat_tokenizer):
    rows = [{"text": "w5", "messages": CHAT}]
    trainer = make_sft(rows=rows, tokenizer=chat_tokenizer)
    assert ids(trainer.train_dataset) == [CHAT_IDS]


def test_assistant_only_loss_keeps_the_assistant_s_turns_and_their_ends(make_sft, chat_tokenizer):
    trainer = make_sft(rows=[{"messages": CHAT}], tokenizer=chat_tokenizer,
                       dataset_kwargs={"assistant_only_loss": True})
    labels = [IGNORE] * 5 + [6, EOS] + [IGNORE] * 3 + [8, 9, EOS]
    assert ids(trainer.train_dataset) == [CHAT_IDS]
    assert batch_of(trainer)["labels"].tolist() == [labels]


@pytest.mark.parametrize("completion", ["w8 w9", [assistant("w8 w9")]], ids=["text", "messages"])
def test_after_a_chat_as_prompt_only_the_answer_is_in_the_loss(
        make_sft, chat_tokenizer, completion):
    rows = [{"prompt": CHAT[:3], "completion": completion}]
    trainer = make_sft(rows=rows, tokenizer=chat_tokenizer)
    assert ids(trainer.train_dataset) == [CHAT_IDS] and trained_on(trainer) == [[8, 9, EOS]]


@pytest.mark.parametrize("row, kwargs", [
    ({"messages": CHAT}, {"dataset_kwargs": {"assistant_only_loss": True}}),
    ({"prompt": CHAT[:3], "completion": "w8"}, {})], ids=["chat", "prompt and completion"])
def test_the_answers_are_found_in_a_template_that_rewrites_earlier_turns(
        make_sft, chat_tokenizer, row, kwargs):
    trained = trained_on(make_sft(rows=[row], tokenizer=chat_tokenizer, **kwargs))
    chat_tokenizer.chat_template = "{{ 'w' ~ (20 + messages | length) }} " + TEMPLATE
    assert trained_on(make_sft(rows=[row], tokenizer=chat_tokenizer, **kwargs)) == trained


def test_given_tokens_keep_their_labels_and_get_no_end(make_sft):
    rows = [{"input_ids": [4, 5, 6], "labels": [IGNORE, 5, 6]},
            {"input_ids": [7, 8, 9], "labels": [7, IGNORE, 9]}]
    trainer = make_sft(rows=rows)
    assert ids(trainer.train_dataset) == [[4, 5, 6], [7, 8, 9]]
    assert trained_on(trainer) == [[5, 6], [9]]
    trainer.train()
    trainer = make_sft(rows=[{"input_ids": row["input_ids"]} for row in rows], max_seq_length=2)
    assert ids(trainer.train_dataset) == [[4, 5], [7, 8]] and trained_on(trainer) == [[5], [8]]


def test_dataset_text_field_names_a_column_of_texts_or_chats(make_sft, chat_tokenizer):
    trainer = make_sft(rows=[{"mine": "w4", "text": "w5"}], dataset_text_field="mine")
    assert ids(trainer.train_dataset) == [[4, EOS]]
    rows = [{"mine": CHAT, "prompt": "w7", "completion": "w8"}]
    trainer = make_sft(rows=rows, dataset_text_field="mine", tokenizer=chat_tokenizer)
    assert ids(trainer.train_dataset) == [CHAT_IDS]


# --------------------------------------------------------------------------------- formatting_func
class Speaker:
    def __call__(self, row):
        return f"{row['q']} {row['a']}"


def say(row, between):
    return f"{row['q']}{between}{row['a']}"


FORMATTERS = {
    "a row to its text": lambda row: f"{row['q']} {row['a']}",
    "a row to a list of one": lambda row: [f"{row['q']} {row['a']}"],
    "a batch to texts": lambda batch: [
        f"{q} {a}" for q, a in zip(batch["q"], batch["a"], strict=True)],
    "a partial": functools.partial(say, between=" "),
    "an object": Speaker(),
    "an object's method": Speaker().__call__,
}
QA = [{"q": f"w{4 + i}", "a": f"w{50 + i}"} for i in range(7)]


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("how", FORMATTERS)
def test_formatting_func_gives_every_row_its_text(how, packing, make_sft):
    for n in (1, 2, 7):  # one row may be a batch of one, and two rows a batch of two
        trainer = make_sft(rows=QA[:n], formatting_func=FORMATTERS[how], packing=packing,
                           max_seq_length=3 * n if packing else None)
        texts = [[4 + i, 50 + i, EOS] for i in range(n)]
        want = [sum(texts, [])] if packing else texts
        assert ids(trainer.train_dataset) == want


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("given", [
    {"dataset_text_field": "text"}, {"formatting_func": lambda row: f"w90 {row['text']}"}],
    ids=lambda given: next(iter(given)))
def test_the_text_that_is_asked_for_counts_in_rows_that_are_tokenized_too(
        given, packing, make_sft, tokenizer):
    rows = rows_of(TEXTS)
    tokenized = rows.map(lambda row: tokenizer("w60 " + row["text"]))  # as users do before
    kwargs = {"packing": packing, "max_seq_length": 8, **given}
    trainer = make_sft(rows=tokenized, eval_dataset={"a": tokenized, "b": rows}, **kwargs)
    want = make_sft(rows=rows, **kwargs)
    assert ids(trainer.train_dataset) == ids(want.train_dataset)
    assert ids(trainer.eval_dataset["a"]) == ids(trainer.eval_dataset["b"])
    trainer.evaluate()  # prepares no row twice


def test_a_text_field_that_is_missing_in_tokenized_rows_is_named(make_sft):
    with pytest.raises(InputError, match="dataset_text_field=txt.*'text', 'input_ids'"):
        make_sft(rows=[{"text": "w4", "input_ids": [4, 5]}], dataset_text_field="txt")


def test_no_keys_and_values_are_kept(make_sft):
    """A wrapper's text model reads the use_cache of its own config, which Trainer leaves alone."""
    trainer = make_sft(gemma3(), gradient_checkpointing=False)
    for mode in ("train", "eval"):
        model = getattr(trainer.model, mode)()
        _, outputs = trainer.compute_loss(model, batch_of(trainer), return_outputs=True)
        assert outputs.past_key_values is None


def test_a_row_that_cannot_be_tokenized_is_named_by_its_number(make_sft):
    rows = [{"text": text} for text in ["w4 w5", "w6", None]]
    for options in ({"dataset_batch_size": 1}, {"packing": True}):
        with pytest.raises(InputError, match="^train_dataset: row 2 can't be tokenized: None is "):
            make_sft(rows=rows, **options)
    stream = Dataset.from_list(rows).to_iterable_dataset()
    packed = make_sft(rows=stream, packing=True, max_seq_length=2, num_of_sequences=1)
    with pytest.raises(InputError, match="^row 2 can't be tokenized: None is "):
        list(packed.train_dataset)


def test_conversations_are_chats(make_sft, chat_tokenizer):
    trainer = make_sft(rows=[{"conversations": CHAT}], tokenizer=chat_tokenizer)
    assert ids(trainer.train_dataset) == [CHAT_IDS]


def test_a_formatting_func_that_returns_no_text_is_refused(make_sft):
    with pytest.raises(InputError, match="formatting_func.*dict"):
        make_sft(rows=QA, formatting_func=lambda row: {"text": 1})
    with pytest.raises(InputError, match="formatting_func.*KeyError"):
        make_sft(rows=QA, formatting_func=lambda row: row["text"])


# --------------------------------------------------------------------------------- packing
def test_documents_fill_rows_of_seq_length(tokenizer):
    documents = rows_of(["w4 w5 w6", "w7", "w8"])
    packed = list(ConstantLengthDataset(tokenizer, documents, "text", seq_length=4, shuffle=False))
    assert ids(packed) == [[4, 5, 6, EOS], [7, EOS, 8, EOS]]
    assert [row["labels"].tolist() for row in packed] == ids(packed)
    assert all(row["input_ids"].dtype == torch.int64 for row in packed)


def test_a_document_that_does_not_fit_continues_in_the_next_row(tokenizer):
    documents = rows_of(["w4", "w5 w6 w7"])
    packed = ConstantLengthDataset(tokenizer, documents, "text", seq_length=3, shuffle=False)
    assert ids(packed) == [[4, EOS, 5], [6, 7, EOS]] and packed.seq_length == 3


@pytest.mark.parametrize("buffer", [1, 2, 1000])
def test_packing_loses_nothing_between_buffers(tokenizer, buffer):
    texts = [" ".join(f"w{4 + (i * j) % 90}" for j in range(1 + i % 5)) for i in range(40)]
    whole = [token for text in texts for token in tokenizer(text).input_ids + [EOS]]
    pack = functools.partial(ConstantLengthDataset, tokenizer, rows_of(texts), "text",
                             seq_length=7, num_of_sequences=buffer, shuffle=False)
    packed = pack()
    full = len(whole) // 7
    assert len(whole) % 7 and [t for row in ids(packed) for t in row] == whole[:full * 7]
    assert len(packed) == full == len(list(packed))  # rows, not documents
    assert [token for row in ids(pack(keep_tail=True)) for token in row] == whole


def test_data_that_end_where_a_buffer_is_full_end_there(tokenizer):
    """A buffer of 2 x 5 x 3.6 = 36 characters holds just two texts of 18."""
    texts = rows_of(["w4 w5 w6 w7 w8 w10"] * 4)
    packed = ConstantLengthDataset(tokenizer, texts, "text", seq_length=5, num_of_sequences=2)
    assert len(texts[0]["text"]) == 18 and len(list(packed)) == 4 * 7 // 5


@pytest.mark.parametrize("sequences, chars, want", [(2, 5.5, 5), (4, 5.5, 10), (2, 11, 10)])
def test_a_buffer_holds_num_of_sequences_x_seq_length_x_chars_per_token_characters(
        tokenizer, sequences, chars, want):
    read = []

    def rows():
        for i in range(100):
            read.append(i)
            yield {"text": "w4 w5 w6 w7"}  # 11 characters, 5 tokens

    packed = ConstantLengthDataset(tokenizer, IterableDataset.from_generator(rows), "text",
                                   seq_length=5, num_of_sequences=sequences, chars_per_token=chars)
    read.clear()
    packed = iter(packed)
    for _ in range(want):  # each text is one row of 5 tokens
        next(packed)
    assert len(read) == want  # 5 rows x 11 = 55 characters = 2 x 5 x 5.5
    next(packed)
    assert len(read) == 2 * want


def test_each_pass_has_its_own_order_drawn_from_the_seed_alone(tokenizer):
    def order(seed, disturb=0):
        random.seed(disturb)
        torch.manual_seed(disturb)
        packed = ConstantLengthDataset(tokenizer, rows_of(TEXTS * 3), "text", seq_length=4,
                                       seed=seed)
        before = random.getstate()
        passes = [ids(packed), ids(packed)]
        assert random.getstate() == before
        return passes

    assert order(1) == order(1, disturb=5) and order(1) != order(2)
    first, second = order(1)
    assert first != second and sorted(first) == sorted(second)


def test_without_shuffle_the_order_is_that_of_the_data(tokenizer):
    packed = ConstantLengthDataset(tokenizer, rows_of(TEXTS), "text", seq_length=4, shuffle=False)
    assert ids(packed) == ids(packed) and ids(packed)[0] == [4, 5, 6, EOS]


def test_an_infinite_dataset_starts_again_and_has_no_length(tokenizer):
    packed = ConstantLengthDataset(tokenizer, rows_of(["w4 w5 w6"]), "text", infinite=True,
                                   seq_length=3, shuffle=False)
    want = [[4, 5, 6], [EOS, 4, 5], [6, EOS, 4], [5, 6, EOS], [4, 5, 6]]
    assert packed.infinite and ids(islice(packed, 5)) == want
    with pytest.raises(TypeError, match="max_steps"):
        len(packed)


def test_a_packed_stream_is_not_read_to_count_its_rows(tokenizer):
    read = []
    stream = rows_of(["w4 w5"] * 50).to_iterable_dataset().map(lambda row: read.append(1) or row)
    with pytest.raises(TypeError, match="max_steps"):
        len(ConstantLengthDataset(tokenizer, stream, "text", seq_length=3))
    assert not read


def test_documents_end_in_the_tokenizer_s_end_token_or_else_in_eos_token_id(make_tokenizer):
    rows = rows_of(["w4", "w5 </s>"])

    def read(tokenizer, n=4, **kwargs):
        return ids(ConstantLengthDataset(tokenizer, rows, "text", seq_length=n, shuffle=False,
                                         **kwargs))

    assert read(make_tokenizer(), eos_token_id=9) == [[4, EOS, 5, EOS]]  # not twice
    # </s> is a word like others where the tokenizer does not name it as its end
    assert read(make_tokenizer(eos_token=None), eos_token_id=9) == [[4, 9, 5, EOS]]
    assert read(make_tokenizer(eos_token=None), n=5) == [[4, 0, 5, EOS, 0]]  # the default is 0
    assert read(make_tokenizer(), n=3, append_concat_token=False) == [[4, 5, EOS]]


def test_add_special_tokens_lets_the_tokenizer_add_its_own_when_packing(closing_tokenizer):
    def read(n, **kwargs):
        return ids(ConstantLengthDataset(closing_tokenizer, rows_of(["w4", "w5"]), "text",
                                         seq_length=n, shuffle=False, **kwargs))

    assert read(6) == [[BOS, 4, EOS, BOS, 5, EOS]]
    assert read(4, add_special_tokens=False) == [[4, EOS, 5, EOS]]


def test_chats_and_completions_keep_their_labels_when_packed(chat_tokenizer):
    chats = Dataset.from_list([{"messages": CHAT}, {"messages": CHAT[:2]}])
    (row,) = ConstantLengthDataset(chat_tokenizer, chats, seq_length=20, assistant_only_loss=True)
    answers = [IGNORE] * 5 + [6, EOS] + [IGNORE] * 3 + [8, 9, EOS] + [IGNORE] * 5 + [6, EOS]
    assert row["labels"].tolist() == answers
    assert row["input_ids"].tolist() == CHAT_IDS + CHAT_IDS[:7]
    pairs = Dataset.from_list([{"prompt": "w4", "completion": " w5"}] * 2)
    (row,) = ConstantLengthDataset(chat_tokenizer, pairs, seq_length=6)
    assert row["labels"].tolist() == [IGNORE, 5, EOS] * 2


def test_workers_of_a_data_loader_divide_the_rows_and_repeat_none(tokenizer):
    texts = rows_of([f"w{i} w{i} w{i}" for i in range(10, 19)])  # no two rows are equal
    packed = ConstantLengthDataset(tokenizer, texts, "text", seq_length=4, shuffle=False)
    loader = torch.utils.data.DataLoader(packed, batch_size=None, num_workers=2)
    assert sorted(ids(loader)) == sorted(ids(packed))


def test_a_stream_s_rows_come_once_whatever_the_number_of_workers(tokenizer):
    texts = rows_of([f"w{i} w{i} w{i}" for i in range(10, 19)])
    packed = ConstantLengthDataset(tokenizer, texts.to_iterable_dataset(num_shards=2), "text",
                                   seq_length=4, shuffle=False)
    loader = torch.utils.data.DataLoader(packed, batch_size=None, num_workers=2)
    assert sorted(ids(loader)) == sorted(ids(packed))


def opt():
    from transformers import OPTConfig, OPTForCausalLM
    return OPTForCausalLM(OPTConfig(
        vocab_size=VOCAB, hidden_size=32, word_embed_proj_dim=32, ffn_dim=32,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64))


def lfm2():
    from transformers import Lfm2Config, Lfm2ForCausalLM
    return Lfm2ForCausalLM(Lfm2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, layer_types=["conv", "full_attention"]))


def bloom():
    from transformers import BloomConfig, BloomForCausalLM
    return BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=2))


@pytest.mark.parametrize("how", ["packing", "a ConstantLengthDataset", "packed rows"])
@pytest.mark.parametrize("model", [opt, lfm2, bloom])
def test_packing_is_refused_where_a_document_would_see_the_one_before_it(
        model, how, make_sft, tokenizer):
    """OPT's mask and LFM2's convolution know no documents, and BLOOM has no positions."""
    packed = ConstantLengthDataset(tokenizer, rows_of(TEXTS), "text", seq_length=6)
    kwargs = {"packing": {"packing": True, "max_seq_length": 6},
              "a ConstantLengthDataset": {"train_dataset": packed},
              "packed rows": {"rows": [{k: v.tolist() for k, v in r.items()} for r in packed]}}
    model = model()
    with pytest.raises(InputError, match=f"packing: .*{model.config.model_type}") as error:
        make_sft(model, **kwargs[how])
    assert "\n" not in str(error.value)
    make_sft(model, max_steps=1).train()  # row by row it trains


class VarlenLlama(LlamaForCausalLM):
    """Reads the positions of packed rows as flash attention does: of a batch of one row alone."""

    def forward(self, input_ids=None, inputs_embeds=None, position_ids=None, **kwargs):
        rows = len(input_ids if inputs_embeds is None else inputs_embeds)
        return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds,
                               position_ids=position_ids if rows == 1 else None, **kwargs)


def test_packing_is_refused_where_only_single_rows_keep_their_documents_apart(make_sft):
    model = VarlenLlama(without_dropout("llama").config)
    make_sft(model, packing=True, max_seq_length=6, per_device_train_batch_size=1)
    with pytest.raises(InputError, match="packing: .*per_device_train_batch_size=1"):
        make_sft(model, packing=True, max_seq_length=6, per_device_train_batch_size=2)


def test_documents_stay_apart_in_a_model_that_model_init_makes(make_sft):
    documents = [[*map(int, text.replace("w", "").split()), EOS] for text in TEXTS]
    trainer = make_sft(None, model_init=lambda: without_dropout("llama"), packing=True,
                       max_seq_length=sum(map(len, documents)), max_steps=1)
    trainer.train()
    want, _ = row_by_row(without_dropout("llama"), [(d, d) for d in documents])
    assert losses(trainer) == pytest.approx([want], rel=1e-4)


# --------------------------------------------------------------------------------- rows -> batches
def test_rows_are_padded_on_the_right_and_padding_is_neither_read_nor_in_the_loss(make_sft):
    rows = [{"input_ids": [4, 5, EOS], "labels": [IGNORE, 5, EOS]},
            {"input_ids": [6, EOS], "labels": [IGNORE, EOS]}]
    batch = batch_of(make_sft(rows=rows))
    assert batch["input_ids"].tolist() == [[4, 5, EOS], [6, EOS, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 5, EOS], [IGNORE, EOS, IGNORE]]


def test_an_encoder_decoder_s_rows_have_two_lengths(make_sft):
    rows = [{"input_ids": [4, 5], "labels": [6, EOS]}, {"input_ids": [7], "labels": [8, 9, EOS]}]
    batch = batch_of(make_sft("t5", rows=rows))
    assert batch["input_ids"].tolist() == [[4, 5], [7, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[6, EOS, IGNORE], [8, 9, EOS]]


def test_the_end_is_in_the_loss_where_it_is_the_padding_too(make_sft, make_tokenizer):
    trainer = make_sft(tokenizer=make_tokenizer(pad_token="</s>"))
    batch = batch_of(trainer)
    assert [tokens[-1:] for tokens in trained_on(trainer)] == [[EOS]] * 6
    assert (batch["labels"] == EOS).sum(1).tolist() == [1] * 6
    assert batch["labels"][:, 1:].ne(IGNORE).equal(batch["attention_mask"][:, 1:].bool())


def labelled(tokenizer, text, **kwargs):
    """The words that the collator for completions keeps in the loss."""
    collator = DataCollatorForCompletionOnlyLM(tokenizer=tokenizer, **kwargs)
    batch = collator([{"input_ids": tokenizer(text).input_ids}])
    return tokenizer.decode([label for label in batch["labels"][0].tolist() if label != IGNORE])


def test_what_follows_the_last_response_template_is_in_the_loss(tokenizer):
    text = "w10 w4 w11 w5 w11 w6 w7"
    assert labelled(tokenizer, text, response_template="w11") == "w6 w7"
    assert labelled(tokenizer, "w10 w4 w11 w5", response_template=[10, 4]) == "w11 w5"


@pytest.mark.parametrize("text, want", [
    ("w10 w4 w11 w5 w10 w6 w11 w7 </s>", "w5 w7 </s>"),
    ("w10 w4 w11 w5 w10 w6 w11 w7 w10 w8 w11 w9", "w5 w7 w9"),
    ("w10 w4 w10 w5 w11 w6", "w6"),                          # two questions in a row
    ("w10 w4 w11 w5 w11 w6 w10 w7 w11 w8", "w5 w11 w6 w8"),  # two answers: no question is kept
    ("w11 w5 w10 w6 w11 w7", "w5 w7"),                       # the assistant begins
    ("w10 w4 w11 w5 w10 w6", "w5"),                          # a question without an answer
    ("w10 w4 w11 w10 w6 w11 w7", "w7"),                      # an empty answer
])
def test_instruction_template_ends_each_answer(tokenizer, text, want):
    got = labelled(tokenizer, text, response_template="w11", instruction_template="w10")
    assert got == want


def test_a_template_is_found_where_its_tokens_differ_inside_a_row():
    tokenizer = AutoTokenizer.from_pretrained(TOY / "blank")
    template, text = "acting", "the acting was bland, the acting was dull"
    alone = tokenizer(template, add_special_tokens=False).input_ids
    inside = tokenizer(text).input_ids
    assert not any(inside[i:i + len(alone)] == alone for i in range(len(inside))), "another word"
    assert labelled(tokenizer, text, response_template=template) == " was dull"
    # at the beginning of a row it is tokenized as it is alone
    assert labelled(tokenizer, text[4:], response_template=template) == " was dull"
    assert labelled(tokenizer, text, response_template="acting was") == " dull"
    turns = labelled(tokenizer, text, response_template=template, instruction_template="bland")
    assert turns == " was was dull"


def test_a_row_without_the_template_is_reported_and_not_in_the_loss(tokenizer):
    with pytest.warns(UserWarning, match="'w11'.*w4 w5"):
        assert labelled(tokenizer, "w4 w5", response_template="w11") == ""


def test_the_collator_for_completions_keeps_the_labels_that_a_row_has(tokenizer):
    collator = DataCollatorForCompletionOnlyLM("w11", tokenizer=tokenizer)
    rows = [{"input_ids": [4, 11, 5], "labels": [IGNORE, 11, 5]}, {"input_ids": [4, 11, 5]}]
    assert collator(rows)["labels"].tolist() == [[IGNORE, 11, 5], [IGNORE, IGNORE, 5]]


def test_the_collator_for_completions_pads_on_the_tokenizer_s_side(tokenizer):
    collator = DataCollatorForCompletionOnlyLM("w11", tokenizer=tokenizer)
    rows = [{"input_ids": [4, 11, 5]}, {"input_ids": [11, 5]}]
    assert collator.torch_call(rows)["input_ids"].tolist() == [[4, 11, 5], [11, 5, PAD]]
    tokenizer.padding_side = "left"
    batch = collator(rows, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[4, 11, 5], [PAD, 11, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 5]] * 2


def test_a_subclass_of_the_collator_for_completions_may_replace_torch_call(make_sft, tokenizer):
    class Last(DataCollatorForCompletionOnlyLM):
        def torch_call(self, examples):
            batch = super().torch_call(examples)
            batch["labels"][:, :-1] = self.ignore_index
            return batch

    tokenizer.padding_side = "left"
    collator = Last("w11", tokenizer=tokenizer)
    trainer = make_sft(rows=rows_of(["w4 w11 w5 w6", "w11 w7"]), data_collator=collator)
    assert trained_on(trainer) == [[EOS], []]  # SFTTrainer pads on the right
    assert batch_of(trainer)["input_ids"].tolist() == [[4, 11, 5, 6, EOS], [11, 7, EOS, PAD, PAD]]
    assert collator.padding_side is None


def test_the_collator_for_completions_refuses_mlm_and_a_missing_tokenizer(tokenizer):
    with pytest.raises(InputError, match="mlm"):
        DataCollatorForCompletionOnlyLM("w11", tokenizer=tokenizer, mlm=True)
    with pytest.raises(InputError, match="tokenizer"):
        DataCollatorForCompletionOnlyLM("w11")


def test_the_collator_for_completions_keeps_the_end_where_pad_is_the_end(make_tokenizer):
    tokenizer = make_tokenizer(pad_token="</s>")
    assert labelled(tokenizer, "w4 w11 w5 </s>", response_template="w11") == "w5 </s>"


# --------------------------------------------------------------------------------- the arguments
def test_the_documented_arguments_come_in_their_order_with_their_defaults():
    want = {"model": None, "args": None, "data_collator": None, "train_dataset": None,
            "eval_dataset": None, "tokenizer": None, "model_init": None, "compute_metrics": None,
            "callbacks": None, "optimizers": (None, None), "preprocess_logits_for_metrics": None,
            "peft_config": None, "dataset_text_field": None, "packing": False,
            "formatting_func": None, "max_seq_length": None, "infinite": None,
            "num_of_sequences": 1024, "chars_per_token": 3.6, "dataset_num_proc": None,
            "dataset_batch_size": 1000, "neftune_noise_alpha": None, "model_init_kwargs": None,
            "dataset_kwargs": None}
    parameters = list(inspect.signature(SFTTrainer).parameters.values())[:24]
    assert [(p.name, p.default) for p in parameters] == list(want.items())


def test_without_args_the_defaults_of_transformers_hold(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    adapter = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    trainer = SFTTrainer(hf_model("gpt2"), train_dataset=rows_of(TEXTS), tokenizer=tokenizer,
                         neftune_noise_alpha=5.0, peft_config=adapter)
    assert trainer.args.neftune_noise_alpha == 5.0
    assert trainer.args.num_train_epochs == TrainingArguments().num_train_epochs
    assert hasattr(trainer.model, "peft_config")


def test_a_model_may_be_a_folder_that_holds_its_tokenizer(tmp_path, make_args, tokenizer):
    folder = tmp_path / "model"
    hf_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {"attn_implementation": "eager", "dtype": torch.bfloat16}
    trainer = SFTTrainer(str(folder), make_args(), train_dataset=rows_of(TEXTS),
                         model_init_kwargs=settings)
    assert trainer.model.config._attn_implementation == "eager"
    assert trainer.model.dtype == torch.bfloat16
    assert trainer.processing_class.convert_ids_to_tokens(4) == "w4"
    hf_model("llama").half().save_pretrained(folder)  # a step in float16 ends in NaN
    for settings, dtype in ((None, torch.float32), ({"torch_dtype": "auto"}, torch.float16)):
        trainer = SFTTrainer(str(folder), make_args(), train_dataset=rows_of(TEXTS),
                             model_init_kwargs=settings)
        assert trainer.model.dtype == dtype
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = SFTTrainer(model, make_args(), train_dataset=rows_of(TEXTS))
    assert trainer.processing_class.convert_ids_to_tokens(4) == "w4"


def test_an_encoder_decoder_may_be_a_folder_too(tmp_path, make_args, tokenizer):
    hf_model("t5").save_pretrained(tmp_path / "model")
    trainer = SFTTrainer(str(tmp_path / "model"), make_args(), tokenizer=tokenizer,
                         train_dataset=Dataset.from_list([{"prompt": "w4", "completion": "w5"}]))
    assert trainer.model.config.is_encoder_decoder


def test_processing_class_is_another_name_for_tokenizer(make_args, make_tokenizer):
    given = make_tokenizer(eos_token="w99")
    trainer = SFTTrainer(hf_model("gpt2"), make_args(), train_dataset=rows_of(["w4"]),
                         processing_class=given)
    assert ids(trainer.train_dataset) == [[4, 99]]


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "adapter"])
def test_model_init_makes_the_model_when_training_begins(adapter, make_sft):
    made = []

    def init():
        made.append(hf_model("llama", seed=3))
        return made[-1]

    trainer = make_sft(None, model_init=init, learning_rate=0.5,
                       peft_config=LoraConfig(target_modules=["q_proj"]) if adapter else None)
    trainer.train()
    assert len(losses(trainer)) == 3
    names = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    if adapter:
        assert {name.split(".")[-3] for name in names} == {"lora_A", "lora_B"}
    else:
        assert trainer.model is made[-1]


def test_every_other_argument_reaches_trainer(make_sft):
    seen = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            seen.append("begin")

    model = hf_model("gpt2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = make_sft(model, callbacks=[Watch()], optimizers=(optimizer, schedule))
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    assert seen == ["begin"] and trainer.optimizer.optimizer is optimizer
    assert trainer.lr_scheduler is schedule
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_compute_metrics_sees_all_logits_and_labels(make_sft):
    seen = {}

    def metrics(prediction):
        seen.update(logits=torch.tensor(prediction.predictions),
                    labels=torch.tensor(prediction.label_ids))
        return {"right": 0.5}

    trainer = make_sft(eval_dataset=rows_of(TEXTS[:3]), compute_metrics=metrics)
    evaluated = trainer.evaluate()
    assert evaluated["eval_right"] == 0.5
    assert seen["logits"].shape == (3, 6, VOCAB) and seen["labels"].shape == (3, 6)
    want = F.cross_entropy(seen["logits"][:, :-1].flatten(0, 1), seen["labels"][:, 1:].flatten())
    assert evaluated["eval_loss"] == pytest.approx(want.item(), rel=1e-5)


def test_compute_metrics_works_with_virtual_tokens(make_sft):
    """The logits have those of the virtual tokens in front."""
    prompt = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    rows = {"eval_dataset": rows_of(TEXTS[:3]), "peft_config": prompt}
    plain = make_sft(**rows).evaluate()
    evaluated = make_sft(compute_metrics=lambda p: {"right": 0.5}, **rows).evaluate()
    assert evaluated["eval_right"] == 0.5
    assert evaluated["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)


def test_logits_may_be_reduced_before_the_metrics(make_sft):
    trainer = make_sft(eval_dataset=rows_of(TEXTS),
                       compute_metrics=lambda p: {"shape": list(p.predictions.shape)},
                       preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1))
    assert trainer.evaluate()["eval_shape"] == [6, 8]


def test_max_seq_length_truncates_to_the_first_tokens(make_sft):
    trainer = make_sft(max_seq_length=3)
    assert ids(trainer.train_dataset) == [[4, 5, 6], [7, 8, 9], [30, EOS], [31, 32, 33],
                                          [40, 41, EOS], [50, 51, 52]]
    trainer = make_sft(rows=PAIRS, max_seq_length=3)
    assert ids(trainer.train_dataset) == [[4, 5, 6], [7, 8, 9], [40, 41, 42]]
    assert trained_on(trainer) == [[6], [8, 9], [41, 42]]


@pytest.mark.parametrize("arch, tokenizer_s, want", [
    ("gpt2", 10**30, 64), ("gpt2", 50, 50), ("t5", 10**30, 1024), ("t5", 50, 50)])
def test_rows_are_truncated_to_what_model_and_tokenizer_take_at_most_1024(
        arch, tokenizer_s, want, make_sft, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = tokenizer_s
    long = " ".join(["w4"] * 1100)
    rows = [{"prompt": long, "completion": " w5"}] if arch == "t5" else [{"text": long}]
    (row,) = make_sft(arch, rows=rows, tokenizer=tokenizer).train_dataset
    assert len(row["input_ids"]) == want


def test_an_encoder_decoder_s_completion_is_truncated_too(make_sft):
    rows = [{"prompt": "w4 w5 w6 w7 w8", "completion": " w40 w41 w42 w43"}]
    trainer = make_sft("t5", rows=rows, max_seq_length=3)
    assert ids(trainer.train_dataset) == [[4, 5, 6]] and trained_on(trainer) == [[40, 41, 42]]


def test_a_truncated_completion_of_an_encoder_decoder_is_counted(make_sft, capsys):
    rows = [{"prompt": "w4", "completion": " w40"},
            {"prompt": "w4", "completion": " w40 w41 w42 w43"}]
    make_sft("t5", rows=rows, max_seq_length=3)
    assert "truncated 1 of 2 rows, row 1 the first" in capsys.readouterr().out


@pytest.mark.parametrize("size, batches", [(3, [3, 3, 1]), (1000, [7]), (None, [7]), (0, [7]),
                                           (-1, [7])])
def test_dataset_batch_size_is_how_many_rows_are_formatted_at_once(size, batches, make_sft):
    sizes = []

    def texts(batch):
        sizes.append(len(batch["q"]))
        return batch["q"]

    trainer = make_sft(rows=QA, formatting_func=texts, dataset_batch_size=size)
    assert sizes[-len(batches):] == batches
    assert ids(trainer.train_dataset) == [[4 + i, EOS] for i in range(7)]


def test_dataset_num_proc_processes_tokenize(make_sft, tmp_path):
    def leave_a_trace(row):
        Path(tmp_path, str(os.getpid())).touch()
        return f"{row['q']} {row['a']}"

    trainer = make_sft(rows=QA, formatting_func=leave_a_trace, dataset_num_proc=2)
    assert ids(trainer.train_dataset) == [[4 + i, 50 + i, EOS] for i in range(7)]
    # one of the two processes may take both parts before the other has started
    assert {int(path.name) for path in tmp_path.glob("[0-9]*")} - {os.getpid()}


def test_dataset_kwargs_switch_special_tokens_and_ends(make_sft, closing_tokenizer):
    def read(rows, **kwargs):
        trainer = make_sft(rows=rows, tokenizer=closing_tokenizer, dataset_kwargs=kwargs)
        return ids(trainer.train_dataset)

    texts = [{"text": "w4 w5"}]
    assert read(texts) == [[BOS, 4, 5, EOS]]
    assert read(texts, add_special_tokens=False) == [[4, 5, EOS]]
    assert read(texts, add_special_tokens=False, append_concat_token=False) == [[4, 5]]
    pairs = [{"prompt": "w4", "completion": " w5"}]
    assert read(pairs, add_special_tokens=False, append_concat_token=False) == [[4, 5]]


def test_neftune_noise_has_the_paper_s_size_and_ends_with_the_training(make_sft):
    """Uniform within alpha / sqrt(T D) (Jain et al. 2023)."""
    trainer = make_sft(rows=[{"text": "w4 w5 w6 w7 w8 w9 w10"}] * 4, neftune_noise_alpha=5.0,
                       max_steps=1, learning_rate=0.0)
    table = trainer.model.get_input_embeddings()
    clean, seen = table.weight.detach().clone(), []
    trainer.model.transformer.register_forward_pre_hook(  # after the hook that makes the noise
        lambda module, args: seen.append((args[0], table(args[0]))))
    trainer.train()
    tokens, noisy = seen[0]
    noise, largest = noisy - clean[tokens], 5 / math.sqrt(8 * 32)
    assert noise.abs().max() <= largest
    assert noise.std().item() == pytest.approx(largest / math.sqrt(3), rel=0.05)
    assert torch.equal(table(tokens), clean[tokens])


def test_nothing_that_was_given_is_changed(make_args, make_tokenizer):
    args, tokenizer = make_args(), make_tokenizer()
    evals = {"a": rows_of(TEXTS[:2]), "b": rows_of(TEXTS[2:]).to_iterable_dataset()}
    rows, inside, before = rows_of(TEXTS), dict(evals), args.to_dict()
    accelerator_config = copy.deepcopy(args.accelerator_config)
    dispatch = args.accelerator_config.dispatch_batches

    def settings():
        return dict(tokenizer.init_kwargs), tokenizer.padding_side, tokenizer.truncation_side

    tokenizer_settings, kwargs = settings(), {"keep_tail": True}
    SFTTrainer(hf_model("gpt2"), args, train_dataset=rows, eval_dataset=evals, packing=True,
               tokenizer=tokenizer, neftune_noise_alpha=3.0, max_seq_length=8,
               dataset_kwargs=kwargs)
    SFTTrainer(hf_model("gpt2"), args, train_dataset=evals["b"], tokenizer=tokenizer)
    assert args.to_dict() == before and args.neftune_noise_alpha is None
    assert args.accelerator_config == accelerator_config
    assert args.accelerator_config.dispatch_batches == dispatch
    assert all(evals[name] is inside[name] for name in inside) and rows.column_names == ["text"]
    assert settings() == tokenizer_settings and kwargs == {"keep_tail": True}


# --------------------------------------------------------------------------------- the config
@pytest.fixture
def make_configured(tmp_path, tokenizer):
    """make_configured(rows, arguments of SFTTrainer, **fields of SFTConfig) -> SFTTrainer."""
    def make(rows, arguments=None, **fields):
        config = SFTConfig(**{"output_dir": str(tmp_path / "out"), "use_cpu": True,
                              "disable_tqdm": True, "save_strategy": "no", **fields})
        return SFTTrainer(**{"model": hf_model("llama"), "args": config, "tokenizer": tokenizer,
                             "train_dataset": Dataset.from_list(rows), **(arguments or {})})

    return make


def test_the_trainer_reads_its_config(make_configured, chat_tokenizer):
    texts = [{"text": text} for text in TEXTS]
    packed = make_configured(texts, packing=True, max_seq_length=8).train_dataset
    assert sorted(map(len, ids(packed))) == [4, 8, 8, 8]  # the tail is kept
    packed = make_configured(texts, packing=True, max_seq_length=8, keep_tail=False).train_dataset
    assert [len(row) for row in ids(packed)] == [8, 8, 8]
    rows = make_configured([{"mine": "w4", "text": "w5"}], dataset_text_field="mine").train_dataset
    assert ids(rows) == [[4, EOS]]
    trainer = make_configured([{"messages": CHAT}], {"tokenizer": chat_tokenizer},
                              assistant_only_loss=True)
    assert trained_on(trainer) == [[6, EOS, 8, 9, EOS]]
    trainer = make_configured([{"text": "w4 w11 w5"}], response_template="w11")
    assert trained_on(trainer) == [[5, EOS]]
    trainer = make_configured(texts, lora_r=3, lora_alpha=6)
    assert trainer.model.peft_config["default"].r == 3
    trainer = make_configured(texts, {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])},
                              lora_r=3)
    assert trainer.model.peft_config["default"].r == 2
    trainer = make_configured(texts, {"model": None, "model_init": lambda: hf_model("llama")},
                              lora_r=3, max_steps=1)
    trainer.train()
    assert trainer.model.peft_config["default"].r == 3


def test_the_config_holds_the_trainer_s_arguments_as_in_later_trl(make_configured, tmp_path):
    texts = [{"text": text} for text in TEXTS]
    fields = {"max_length": 3, "dataset_batch_size": 2, "num_of_sequences": 5,
              "dataset_kwargs": {"append_concat_token": False}, "report_to": None}
    rows = make_configured(texts, **fields).train_dataset
    assert ids(rows) == [[4, 5, 6], [7, 8, 9], [31, 32, 33], [40, 41], [50, 51, 52]]
    hf_model("llama").half().save_pretrained(tmp_path / "model")
    trainer = make_configured(texts, {"model": str(tmp_path / "model")},
                              model_init_kwargs={"dtype": "auto"})
    assert trainer.model.dtype == torch.float16
    stream = Dataset.from_list(texts).to_iterable_dataset()
    packed = make_configured(texts, {"train_dataset": stream}, packing=True, max_length=8,
                             num_of_sequences=5, chars_per_token=2.0, max_steps=1).train_dataset
    assert (packed.seq_length, packed.max_buffer_size) == (8, 80)
    with pytest.raises(InputError, match="max_seq_length=4.*max_seq_length=3"):
        make_configured(texts, max_length=4, max_seq_length=3)


def test_an_argument_that_is_given_wins_over_the_config_s_default(make_configured):
    texts = [{"text": text} for text in TEXTS]
    trainer = make_configured(texts, {"packing": True, "max_seq_length": 5}, keep_tail=False)
    assert {len(row) for row in ids(trainer.train_dataset)} == {5}
    trainer = make_configured(texts, {"neftune_noise_alpha": 3.0, "max_seq_length": 3},
                              max_seq_length=3)
    assert trainer.args.neftune_noise_alpha == 3.0
    packed = make_configured(texts, {"packing": True, "max_seq_length": 8,
                                     "dataset_kwargs": {"keep_tail": False}}).train_dataset
    assert {len(row) for row in ids(packed)} == {8}


def test_an_argument_and_a_field_that_disagree_are_refused(make_configured):
    with pytest.raises(InputError, match="max_seq_length=5.*max_seq_length=6") as error:
        make_configured([{"text": "w4 w5"}], {"max_seq_length": 5}, max_seq_length=6)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_a_config_with_a_folder_alone_trains(tmp_path, tokenizer):
    """Without an evaluation set it does not evaluate, and the rate fits the model's size."""
    config, model = SFTConfig(output_dir=str(tmp_path / "out")), hf_model("llama")
    trainer = SFTTrainer(model, args=config, train_dataset=rows_of(TEXTS), tokenizer=tokenizer)
    trainer.train()
    assert trainer.state.global_step == 2 * math.ceil(len(TEXTS) / 2)  # epochs, rows per step
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
    assert trainer.args.learning_rate == pytest.approx(4e-3 * (1e5 / model.num_parameters()) ** 0.5)
    assert config.learning_rate is None and config.eval_strategy == "epoch"  # as it was
    trainer = SFTTrainer(model, args=config, train_dataset=rows_of(TEXTS), tokenizer=tokenizer,
                         eval_dataset=rows_of(TEXTS))
    trainer.train()
    assert len([row for row in trainer.state.log_history if "eval_loss" in row]) == 2


BAD_FIELDS = {
    "a rate that is no number": dict(learning_rate=float("nan")),
    "a negative rate": dict(learning_rate=-1e-3),
    "batches of 0 rows": dict(per_device_train_batch_size=0),
    "evaluation batches of 0 rows": dict(per_device_eval_batch_size=0),
    "no epochs": dict(num_train_epochs=0),
    "no micro-batches": dict(gradient_accumulation_steps=0),
    "rows of one token": dict(max_seq_length=1),
    "no processes": dict(dataset_num_proc=0),
    "a negative rank": dict(lora_r=-1),
    "no lora_alpha": dict(lora_alpha=0),
    "all smoothed": dict(label_smoothing_factor=1.0),
    "an unknown type": dict(torch_dtype="float8"),
    "labels chosen twice": dict(response_template="w11", assistant_only_loss=True),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_a_field_out_of_range_is_refused_before_anything_is_loaded(case):
    with pytest.raises(InputError, match=next(iter(BAD_FIELDS[case]))) as error:
        SFTConfig(**BAD_FIELDS[case])
    assert "\n" not in str(error.value)


def test_a_learning_rate_of_0_is_taken(make_configured):
    assert make_configured([{"text": "w4 w5"}], learning_rate=0.0).args.learning_rate == 0


def test_settings_without_effect_are_named(make_configured, make_sft, tokenizer):
    for needs in ({"load_best_model_at_end": True, "save_strategy": "epoch"},
                  {"save_strategy": "best", "metric_for_best_model": "loss"},
                  {"eval_on_start": True}, {"lr_scheduler_type": "reduce_lr_on_plateau"}):
        with pytest.raises(InputError, match=f"^{next(iter(needs))}=.*eval_dataset"):
            make_configured([{"text": "w4 w5"}], **needs)
    with pytest.raises(InputError, match="assistant_only_loss"):
        make_configured([{"text": "w4 w5"}], assistant_only_loss=True)
    collator = DataCollatorForCompletionOnlyLM("w11", tokenizer=tokenizer)
    with pytest.raises(InputError, match="response_template"):
        make_configured([{"text": "w4 w5"}], {"data_collator": collator}, response_template="w5")
    with pytest.warns(UserWarning, match="infinite"):
        make_sft(infinite=True)


# --------------------------------------------------------------------------------- kinds of data
@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_a_stream_gives_the_rows_of_the_same_data_in_memory(packing, make_sft):
    stream = rows_of(TEXTS).to_iterable_dataset()
    kwargs = {"packing": packing, "max_seq_length": 4 if packing else None}
    trainer = make_sft(train_dataset=stream, eval_dataset=stream, **kwargs)
    whole = make_sft(eval_dataset=rows_of(TEXTS), **kwargs)
    assert sorted(ids(trainer.train_dataset)) == sorted(ids(whole.train_dataset))
    assert packing or ids(trainer.train_dataset) == ids(whole.train_dataset)
    want = whole.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-6)
    trainer.train()
    assert len(losses(trainer)) == 3


def test_an_infinite_dataset_trains_to_max_steps(make_sft):
    trainer = make_sft(rows=rows_of(TEXTS[:2]), packing=True, infinite=True, max_seq_length=4,
                       max_steps=7)
    trainer.train()
    assert trainer.state.global_step == 7 and trainer.state.epoch < 2


def test_a_packed_stream_has_its_num_of_sequences_and_chars_per_token(make_sft):
    """A buffer of 1 x 4 x 0.1 characters is one text, and rows are shuffled within a buffer."""
    texts = rows_of([f"w{i} w{i} w{i}" for i in range(10, 40)]).to_iterable_dataset()
    kwargs = {"train_dataset": texts, "packing": True, "max_seq_length": 4}
    in_order = [[i, i, i, EOS] for i in range(10, 40)]
    small = make_sft(**kwargs, num_of_sequences=1, chars_per_token=0.1)
    assert ids(small.train_dataset) == in_order
    for other in ({"num_of_sequences": 100}, {"num_of_sequences": 1, "chars_per_token": 100.0}):
        got = ids(make_sft(**kwargs, **other).train_dataset)
        assert got != in_order and sorted(got) == in_order


def test_a_constant_length_dataset_trains_for_as_many_steps_as_it_has_batches(
        make_sft, tokenizer):
    packed = ConstantLengthDataset(tokenizer, rows_of(TEXTS * 4), "text", seq_length=8)
    trainer = make_sft(train_dataset=packed, eval_dataset=packed, max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 2 * math.ceil(len(packed) / 4)
    assert "eval_loss" in trainer.evaluate()


def test_tokens_may_be_tensors(make_sft):
    rows = Dataset.from_list([{"input_ids": [4, 5, 6]}, {"input_ids": [7, 8]}])
    trainer = make_sft(rows=rows.with_format("torch"))
    assert trained_on(trainer) == [[5, 6], [8]]
    trainer.train()
    assert len(losses(trainer)) == 3


def test_padding_in_given_tokens_is_neither_read_nor_in_the_loss(make_sft):
    rows = [{"input_ids": [4, 5, 6, PAD, PAD], "attention_mask": [1, 1, 1, 0, 0],
             "labels": [4, 5, 6, PAD, PAD]},
            {"input_ids": [7, 8, 9, 20, EOS], "attention_mask": [1] * 5,
             "labels": [IGNORE, 8, 9, 20, EOS]}]
    trainer = make_sft(rows=rows)
    assert ids(trainer.train_dataset) == [[4, 5, 6], [7, 8, 9, 20, EOS]]
    assert trained_on(trainer) == [[5, 6], [8, 9, 20, EOS]]


def test_finished_rows_of_a_torch_dataset_stay_as_they_are(make_sft):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return {"input_ids": [4 + i, 5, EOS]}

    rows = Rows()
    trainer = make_sft(train_dataset=rows)
    batch = trainer.data_collator([rows[i] for i in range(4)])
    assert trainer.train_dataset is rows and batch["labels"][:, 1:].tolist() == [[5, EOS]] * 4
    trainer.train()
    assert len(losses(trainer)) == 3


@pytest.mark.parametrize("how", ["the collator", "response_template"])
def test_prompts_in_a_torch_dataset_are_not_in_the_loss(how, make_sft, make_configured, tokenizer):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return {"input_ids": torch.tensor([20 + i, 11, 5, EOS])}

    collator = DataCollatorForCompletionOnlyLM("w11", tokenizer=tokenizer)
    if how == "the collator":
        trainer = make_sft(train_dataset=Rows(), data_collator=collator, max_steps=1)
    else:
        trainer = make_configured([], {"train_dataset": Rows()}, response_template="w11",
                                  max_steps=1, per_device_train_batch_size=4)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 5, EOS]] * 4
    trainer.train()


def test_each_rank_reads_the_streams_in_a_dict_of_evaluation_sets(make_sft):
    streams = {"held": rows_of(TEXTS).to_iterable_dataset()}
    trainer = make_sft(eval_dataset=streams)
    assert trainer.accelerator.dispatch_batches is False
    assert trainer.evaluate()["eval_held_loss"] > 0


@pytest.mark.parametrize("where", ["training", "evaluation", "a dict", "evaluate"])
def test_a_constant_length_dataset_is_checked_wherever_it_is_given(where, make_sft, tokenizer):
    class Packed(ConstantLengthDataset):
        pass

    packed = Packed(tokenizer, rows_of(TEXTS), "text", seq_length=6)
    with pytest.raises(InputError, match="packing: "):
        if where == "evaluate":
            make_sft(opt()).evaluate(packed)
        elif where == "training":
            make_sft(opt(), train_dataset=packed)
        else:
            make_sft(opt(), eval_dataset=packed if where == "evaluation" else {"held": packed})


def test_the_positions_of_a_model_with_images_are_those_of_its_text():
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    text = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "vocab_size": VOCAB,
            "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    images = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32,
              "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = LlavaConfig(text_config=text, vision_config=images)
    assert number_of_positions(LlavaForConditionalGeneration(config)) == 64


def test_a_data_collator_that_is_given_is_used(make_sft, tokenizer):
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer, plain = make_sft(data_collator=collator), make_sft()
    trainer.train(), plain.train()
    assert trainer.data_collator is collator
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-4)


def test_evaluation_sets_may_have_names(make_sft):
    sets = {"short": rows_of(TEXTS[:1]), "long": rows_of(TEXTS[1:])}
    trainer = make_sft(eval_dataset=sets, max_steps=1, eval_strategy="steps", eval_steps=1)
    trainer.train()
    logged = {name: value for row in trainer.state.log_history for name, value in row.items()}
    for name, rows in sets.items():
        want = trainer.evaluate(rows)["eval_loss"]
        assert logged[f"eval_{name}_loss"] == pytest.approx(want, rel=1e-5)


def test_evaluation_keeps_one_document_per_row_when_training_is_packed(make_sft):
    trainer = make_sft(packing=True, max_seq_length=8, eval_dataset=rows_of(["w4"]))
    assert ids(trainer.eval_dataset) == [[4, EOS]] and trainer.evaluate()["eval_loss"] > 0


def test_without_a_training_set_one_may_still_evaluate(make_sft):
    trainer = make_sft(train_dataset=None, eval_dataset=rows_of(TEXTS), packing=True)
    assert trainer.evaluate()["eval_loss"] > 0


def test_rows_given_to_evaluate_are_prepared_unless_they_are_already(make_sft):
    def to_text(row):
        return row["text"]

    trainer = make_sft(eval_dataset=rows_of(TEXTS[:4]), formatting_func=to_text)
    want = pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)
    assert trainer.evaluate(rows_of(TEXTS[:4]))["eval_loss"] == want
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == want
    packed = make_sft(rows=rows_of(TEXTS[:4]), packing=True, max_seq_length=20).train_dataset
    assert len(packed) == 1 and trainer.evaluate(packed)["eval_loss"] == want


def test_labels_for_completions_are_made_once_at_the_start(make_sft, tokenizer):
    collator = DataCollatorForCompletionOnlyLM("w11", tokenizer=tokenizer)
    trainer = make_sft(rows=rows_of(["w4 w11 w5", "w6 w7 w11 w8 w9"]), data_collator=collator)
    want = [[IGNORE, IGNORE, 5, EOS], [IGNORE] * 3 + [8, 9, EOS]]
    assert [row["labels"] for row in trainer.train_dataset] == want
    rows = rows_of(["w4 w11 w5 w6 w11 w7"])  # the last template among the tokens that are kept
    trainer = make_sft(rows=rows, data_collator=collator, max_seq_length=4)
    assert trained_on(trainer) == [[5, 6]]


def test_an_ignore_index_of_the_collator_s_own_stays_out_of_the_loss(make_sft, tokenizer):
    collator = DataCollatorForCompletionOnlyLM("w11", tokenizer=tokenizer, ignore_index=-33)
    trainer = make_sft(rows=rows_of(["w4 w11 w5", "w6 w7 w11 w8 w9"]), data_collator=collator)
    assert trained_on(trainer) == [[5, EOS], [8, 9, EOS]]


def test_rows_without_a_label_are_dropped_and_counted(make_sft, tokenizer, capsys):
    collator = DataCollatorForCompletionOnlyLM("w11", tokenizer=tokenizer)
    rows = rows_of(["w4 w11 w5", "w6 w7", "w8 w11 w9"])
    trainer = make_sft(rows=rows, data_collator=collator)
    assert ids(trainer.train_dataset) == [[4, 11, 5, EOS], [8, 11, 9, EOS]]
    assert "1 of 3" in capsys.readouterr().out
    # an end alone has no token before it, from which it could be predicted
    assert ids(make_sft(rows=rows_of(["w4", ""])).train_dataset) == [[4, EOS]]
    # a decoder predicts its first label from its start token
    rows = [{"input_ids": [4], "labels": [EOS]}, {"input_ids": [5], "labels": []}]
    assert ids(make_sft("t5", rows=rows).train_dataset) == [[4]]


# --------------------------------------------------------------------------------- the loss
SIZES = {"gpt2": (1, 4)}  # micro-batches of one row; of the other architectures two and two


@pytest.mark.parametrize("arch", CAUSAL + SEQ2SEQ)
def test_a_step_descends_the_mean_over_all_tokens_of_its_micro_batches(arch, make_sft):
    """4 rows with 2, 4, 3 and 20 tokens in the loss, each micro-batch with padding of its own."""
    rows = [*PAIRS[:3], {"prompt": "w4", "completion": " w5 " * 19}]
    size, accumulation = SIZES.get(arch, (2, 2))
    trainer = make_sft(arch, rows=rows, max_steps=1, learning_rate=1.0,
                       per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
    alone = [([*map(int, pair["prompt"].replace("w", "").split())],
              [*map(int, pair["completion"].replace("w", "").split()), EOS]) for pair in rows]
    if arch in CAUSAL:
        alone = [(prompt + answer, [IGNORE] * len(prompt) + answer) for prompt, answer in alone]
    check_one_step(trainer, alone)


def test_the_first_token_of_a_text_counts_for_nothing(make_sft):
    trainer = make_sft(max_steps=1, learning_rate=1.0, per_device_train_batch_size=2,
                       gradient_accumulation_steps=3)
    documents = [[*map(int, text.replace("w", "").split()), EOS] for text in TEXTS]
    check_one_step(trainer, [(d, d) for d in documents])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", CAUSAL)
def test_a_packed_step_descends_the_loss_of_its_documents_alone(arch, attention, make_sft):
    """No document sees another, each counts its positions from 0, and nothing predicts its first
    token; a document that does not fit its row continues as a document of its own."""
    model = without_dropout(arch, attn_implementation=attention)
    documents = [[4, 5, 6, EOS], [7, 8, EOS], [9, 20, 21, 22, 23, 24, EOS], [25, EOS]]
    pieces = [*documents[:2], [9, 20, 21, 22, 23], [24, EOS], documents[3]]
    rows = [{"input_ids": d, "labels": [d[0], IGNORE, *d[2:]]} for d in documents]
    trainer = make_sft(model, rows, packing=True, max_seq_length=12, max_steps=1,
                       learning_rate=1.0, dataset_kwargs={"keep_tail": True})
    assert sorted(map(len, ids(trainer.train_dataset))) == [4, 12]
    begins = [d[:2] for d in documents]
    labels = [[p[0], IGNORE if p[:2] in begins else p[1], *p[2:]] for p in pieces]
    check_one_step(trainer, list(zip(pieces, labels, strict=True)))


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_the_loss_is_the_same_with_outputs_and_with_more_padding(arch, make_sft):
    trainer = make_sft(arch, rows=PAIRS)
    model, batch = trainer.model, batch_of(trainer)
    want = pytest.approx(trainer.compute_loss(model, batch).item(), rel=1e-5)
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert loss.item() == want and outputs.logits.shape[:2] == batch["labels"].shape
    fill = {"input_ids": 77, "attention_mask": 0, "labels": IGNORE}
    wider = {name: F.pad(value, (0, 3), value=fill[name]) for name, value in batch.items()}
    assert trainer.compute_loss(model, wider).item() == want
    assert set(batch) == set(fill)  # the caller's batch stays as it is


def test_label_smoothing_reaches_the_loss(make_sft):
    trainer = make_sft(label_smoothing_factor=0.2)
    batch = batch_of(trainer)
    logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(),
                           label_smoothing=0.2)
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
        max_position_embeddings=64, initializer_range=0.2, output_router_logits=True,
        router_aux_loss_coef=0.5))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_mixture_of_experts_adds_the_mean_auxiliary_loss_of_its_micro_batches(
        accumulation, make_sft):
    """Of the training loss: an evaluation is in nats per token."""
    model, size = mixtral(), 6 // accumulation
    trainer = make_sft(model, eval_dataset=rows_of(TEXTS), max_steps=1, learning_rate=1.0,
                       per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
                       train_sampling_strategy="sequential")
    rows, total, count, aux = list(trainer.train_dataset), 0, 0, 0
    for i in range(0, 6, size):
        batch = trainer.data_collator(rows[i:i + size])
        labels = batch.pop("labels")[:, 1:]
        outputs = model(**batch)
        logits = outputs.logits[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        count, aux = count + (labels != IGNORE).sum(), aux + outputs.aux_loss / accumulation
    loss = total / count + 0.5 * aux
    gradient = torch.autograd.grad(loss, model.model.layers[0].mlp.gate.weight)[0]
    assert aux > 0.5
    assert trainer.evaluate()["eval_loss"] == pytest.approx((total / count).item(), rel=1e-5)
    before = model.model.layers[0].mlp.gate.weight.detach().clone()
    trainer.train()
    assert losses(trainer) == pytest.approx([loss.item()], rel=1e-4)
    moved = before - model.model.layers[0].mlp.gate.weight.detach()
    torch.testing.assert_close(moved, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("metrics", [None, lambda p: {}], ids=["loss alone", "metrics"])
@pytest.mark.parametrize("size", [1, 4, 6])
def test_evaluation_is_the_mean_over_tokens_whatever_the_batches(size, metrics, make_sft):
    trainer = make_sft(eval_dataset=rows_of(TEXTS), per_device_eval_batch_size=size,
                       compute_metrics=metrics)
    documents = [[*map(int, text.replace("w", "").split()), EOS] for text in TEXTS]
    want, _ = row_by_row(trainer.model, [(d, d) for d in documents])
    first = trainer.evaluate(rows_of(TEXTS[:2]))["eval_loss"]
    assert first != pytest.approx(want, rel=1e-2)  # whose sums are not those of the next
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-5)


# --------------------------------------------------------------------------------- training
def test_a_resumed_run_of_a_constant_length_dataset_repeats_the_losses(make_sft, tokenizer):
    def make(**kwargs):
        packed = ConstantLengthDataset(tokenizer, rows_of(TEXTS * 2), "text", seq_length=8)
        return make_sft(train_dataset=packed, learning_rate=0.2, lr_scheduler_type="linear",
                        num_train_epochs=3, max_steps=-1, per_device_train_batch_size=3,
                        save_strategy="steps", **kwargs)

    whole = make(save_steps=100)
    whole.train()
    steps = whole.state.global_step
    make(save_steps=steps - 2).train()  # two steps before the end, within the last epoch
    rest = make(save_steps=100)
    rest.train(resume_from_checkpoint=f"{rest.args.output_dir}/checkpoint-{steps - 2}")
    assert losses(rest) == losses(whole)
    for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_best_model_is_loaded_at_the_end(make_sft):
    trainer = make_sft(rows=rows_of(["w4 w5 w6"]), eval_dataset=rows_of(["w4 w5 w7 w8"]),
                       max_steps=8, learning_rate=0.5, save_strategy="steps", save_steps=1,
                       eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
    trainer.train()
    evals = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    best = trainer.evaluate()["eval_loss"]
    assert min(evals) < evals[-1] and best == pytest.approx(min(evals), rel=1e-5)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_gradient_checkpointing_with_an_adapter_trains_the_same_adapter(arch, make_sft):
    def run(checkpointing):
        torch.rand(3 + checkpointing)  # the seed alone decides how the adapter begins
        adapter = LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=arch == "gpt2",
                             task_type="CAUSAL_LM")
        trainer = make_sft(arch, peft_config=adapter, gradient_checkpointing=checkpointing,
                           learning_rate=0.5)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        after = {name: p.detach() for name, p in trainer.model.named_parameters()}
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert moved == {name for name in after if "lora_" in name}
        return {name: after[name] - before[name] for name in moved}

    plain, checked = run(False), run(True)
    for name in plain:  # the same operations twice, in float32
        torch.testing.assert_close(plain[name], checked[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("by_init", [False, True], ids=["model", "model_init"])
def test_the_seed_of_the_arguments_decides_how_an_adapter_begins(by_init, make_sft):
    def first(seed):
        model = {"model": None, "model_init": lambda: hf_model("llama")} if by_init else {
            "model": "llama"}
        adapter = LoraConfig(target_modules=["q_proj"])
        adapted = make_sft(**model, peft_config=adapter, seed=seed).model
        return next(p.detach() for name, p in adapted.named_parameters() if "lora_A" in name)

    assert torch.equal(first(3), first(3)) and not torch.equal(first(3), first(4))


def test_adapters_stay_float32_on_a_bfloat16_model(make_sft):
    trainer = make_sft(hf_model("llama").to(torch.bfloat16), bf16=True,
                       peft_config=LoraConfig(target_modules=["q_proj"]))
    trainer.train()
    adapter = {p.dtype for name, p in trainer.model.named_parameters() if "lora_" in name}
    assert adapter == {torch.float32} and all(math.isfinite(loss) for loss in losses(trainer))


def test_an_encoder_decoder_takes_an_adapter(make_sft):
    adapter = LoraConfig(target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    trainer = make_sft("t5", rows=PAIRS, peft_config=adapter, learning_rate=0.5)
    trainer.train()
    weights = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert weights and all(p.abs().sum() > 0 for p in weights)


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights_and_losses(make_sft):
    full, half = make_sft(), make_sft(bf16=True)
    full.train(), half.train()
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    # bfloat16 has 8 bits
    assert losses(half) == pytest.approx(losses(full), rel=2e-2) and losses(half) != losses(full)


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint_good(make_sft):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.transformer.wpe.weight.data.fill_(float("nan"))

    trainer = make_sft(max_steps=5, save_strategy="steps", save_steps=1, callbacks=[Poison()])
    with pytest.raises(InputError, match="nan.* 2 "):
        trainer.train()
    model = AutoModelForCausalLM.from_pretrained(f"{trainer.args.output_dir}/checkpoint-2")
    assert all(p.isfinite().all() for p in model.parameters())


def test_packed_rows_without_a_label_do_not_stop_the_run(make_sft, chat_tokenizer):
    """A long question may fill whole rows."""
    chats = [{"messages": [user(" ".join(["w20"] * 30)), assistant("w5 w6")]}] * 3
    trainer = make_sft(rows=chats, tokenizer=chat_tokenizer, packing=True, max_seq_length=8,
                       per_device_train_batch_size=1, max_steps=12,
                       dataset_kwargs={"assistant_only_loss": True})
    trainer.train()
    assert trainer.state.global_step == 12
    assert 0.0 in losses(trainer) and all(math.isfinite(loss) for loss in losses(trainer))


def test_packed_rows_come_in_the_documents_order_and_the_seed_decides_that_of_batches(make_sft):
    def read(seed):
        trainer = make_sft(rows=rows_of(TEXTS * 3), packing=True, max_seq_length=4, seed=seed)
        assert sum(ids(trainer.train_dataset), []) == in_order[:len(in_order) // 4 * 4]
        return [batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()]

    in_order = sum((ids(make_sft(rows=rows_of(TEXTS)).train_dataset)) * 3, [])
    assert read(1) == read(1) != read(2)


@pytest.mark.parametrize("length", [3, 4, 7, 50])
@pytest.mark.parametrize("keep_tail", [False, True])
def test_packed_rows_in_memory_are_those_of_a_constant_length_dataset(
        length, keep_tail, make_sft, chat_tokenizer):
    """Labels and positions too; one text is as long as a row, one of three rows, one empty."""
    answers = ["w5", "w4 w5", " ".join(["w6"] * 2 * length), "", "w7 w8 w9"]
    rows = Dataset.from_list([{"prompt": "w10", "completion": answer} for answer in answers])
    trainer = make_sft(rows=rows, tokenizer=chat_tokenizer, packing=True, max_seq_length=length,
                       dataset_kwargs={"keep_tail": True} if length == 50 else
                       {"keep_tail": keep_tail})
    want = ConstantLengthDataset(chat_tokenizer, rows, seq_length=length, shuffle=False,
                                 keep_tail=keep_tail or length == 50)
    got = trainer.train_dataset
    assert len(got) == len(want)
    for row, wanted in zip(got, want, strict=True):
        assert {name: x.tolist() for name, x in row.items()} == {
            name: x.tolist() for name, x in wanted.items()}


# --------------------------------------------------------------------------------- bad input
EMPTY = Dataset.from_dict({"text": []})
UNLABELED = [{"input_ids": [4, 5, 6, 7], "labels": [IGNORE] * 4}] * 8
BAD = {  # the arguments, and what the message names
    "no such column": (dict(rows=[{"words": "w4"}]), ["words", "dataset_text_field"]),
    "no such text field": (
        dict(rows=[{"text": "w4"}], dataset_text_field="body"), ["text", "body"]),
    "an empty dataset": (dict(rows=EMPTY), ["train_dataset"]),
    "an empty stream": (
        dict(rows=IterableDataset.from_generator(lambda: iter([]))), ["train_dataset"]),
    "an empty evaluation set": (dict(eval_dataset=EMPTY), ["eval_dataset"]),
    "an empty named evaluation set": (dict(eval_dataset={"held": EMPTY}), ["held"]),
    "an empty dataset to pack": (dict(rows=EMPTY, packing=True), ["train_dataset"]),
    "no label": (dict(rows=UNLABELED), ["train_dataset"]),
    "no label to pack": (dict(rows=UNLABELED, packing=True, max_seq_length=8), ["labels"]),
    "prompts that fill max_seq_length": (
        dict(rows=PAIRS[2:3], max_seq_length=3), ["train_dataset", "max_seq_length", "3"]),
    "a row with one token": (dict(max_seq_length=1), ["max_seq_length=1"]),
    "more than the model's positions": (dict(max_seq_length=65), ["max_seq_length=65", "64"]),
    "too little to pack": (
        dict(rows=rows_of(["w4"]), packing=True, max_seq_length=8), ["max_seq_length=8"]),
    "an encoder-decoder with texts": (dict(model="t5"), ["text", "prompt", "completion"]),
    "an encoder-decoder packed": (dict(model="t5", rows=PAIRS, packing=True), ["packing"]),
    "a chat without template": (dict(rows=[{"messages": CHAT}]), ["chat_template"]),
    "unknown dataset_kwargs": (
        dict(dataset_kwargs={"shuffel": True}), ["dataset_kwargs", "shuffel"]),
    "model_init_kwargs for a model": (
        dict(model_init_kwargs={"dtype": "auto"}), ["model_init_kwargs"]),
    "an unknown model": (dict(model="./nowhere"), ["./nowhere"]),
    "a text that is a number": (dict(rows=[{"text": 4}]), ["train_dataset"]),
    "a text that is missing": (dict(rows=[{"text": "w4 w5"}, {"text": None}]), ["train_dataset"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case, make_sft):
    kwargs, words = BAD[case]
    with pytest.raises(InputError) as error:
        make_sft(**kwargs)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_template_that_no_row_holds_is_named(make_sft, tokenizer):
    with pytest.raises(InputError, match="'w99'"):
        make_sft(data_collator=DataCollatorForCompletionOnlyLM("w99", tokenizer=tokenizer))


def test_an_adapter_that_is_there_trains_further_instead_of_a_fresh_one(make_sft, weights, moved):
    own, other = (LoraConfig(r=r, target_modules=["q_proj"]) for r in (2, 3))
    model = get_peft_model(hf_model("llama"), own)
    with pytest.warns(UserWarning, match="peft_config.*has no effect"):
        trainer = make_sft(model, peft_config=other)
    before = weights(model)
    trainer.train()
    assert trainer.model.peft_config["default"].r == 2
    names = moved(before, trainer.model)
    assert names and all("lora_" in name for name in names)


def test_a_dict_of_splits_is_refused(make_sft):
    with pytest.raises(InputError, match="train_dataset=DatasetDict.*train, test"):
        make_sft(train_dataset=DatasetDict(train=rows_of(["w4"]), test=rows_of(["w5"])))


def test_a_tokenizer_without_padding_pads_with_its_end_or_is_refused(
        tmp_path, make_args, make_tokenizer, make_sft):
    hf_model("gpt2").save_pretrained(tmp_path / "model")
    make_tokenizer(pad_token=None).save_pretrained(tmp_path / "model")
    trainer = SFTTrainer(str(tmp_path / "model"), make_args(), train_dataset=rows_of(TEXTS))
    trainer.train()
    assert trainer.processing_class.pad_token_id == EOS
    given = make_tokenizer(pad_token=None)
    make_sft(tokenizer=given).train()
    assert given.pad_token is None  # the caller's stays as it is
    with pytest.raises(InputError, match="pad_token"):
        make_sft(tokenizer=make_tokenizer(pad_token=None, eos_token=None))


def test_packing_and_a_collator_for_completions_are_refused_together(make_sft, tokenizer):
    with pytest.raises(InputError, match="packing"):
        make_sft(packing=True,
                 data_collator=DataCollatorForCompletionOnlyLM("w11", tokenizer=tokenizer))


def test_a_model_without_a_name_needs_a_tokenizer(make_args):
    with pytest.raises(InputError, match="tokenizer"):
        SFTTrainer(hf_model("gpt2"), make_args(), train_dataset=rows_of(TEXTS))


# --------------------------------------------------------------------------------- TRL 0.7.10
RECORDED = json.loads(Path(__file__).with_name("recorded_sft.json").read_text())
AS_TEXT = {"one": lambda row: f"Q: {row['q']} A: {row['a']}",
           "many": lambda batch: [
               f"Q: {q} A: {a}" for q, a in zip(batch["q"], batch["a"], strict=True)],
           None: None}


def cases(part):
    return pytest.mark.parametrize("case", RECORDED[part], ids=lambda case: case["name"])


def recorded_tokenizer(name="causal"):
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    core = Tokenizer.from_str(json.dumps(RECORDED["tokenizers"][name]))
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=512, **tokens)


def recorded_model():
    """Weights of a generator whose numbers never change, in the order of their names."""
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, n_positions=48,
        n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    draw = np.random.RandomState(11)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            drawn = torch.tensor(0.15 * draw.standard_normal(tuple(p.shape)), dtype=torch.float32)
            p.copy_(drawn + ("weight" in name and "ln_" in name))
    return model


def changes(before, model):
    """{parameter: (norm of its change, the change's product with cos(0.7 i + 0.3))}"""
    found = {}
    for name, p in model.named_parameters():
        change = (p.detach().double() - before[name].double()).flatten()
        if name.endswith("c_attn.bias"):
            # a bias of the keys has a gradient of rounding noise, of which Adam makes a whole step
            change[len(change) // 3:2 * len(change) // 3] = 0
        probe = torch.cos(torch.arange(len(change), dtype=torch.float64) * 0.7 + 0.3)
        found[name] = (change.norm().item(), (change @ probe).item())
    return found


@cases("constant_length")
def test_packing_fills_the_recorded_rows(case):
    tokenizer = recorded_tokenizer(case.get("tokenizer", "causal"))
    for name, value in case.get("attrs", {}).items():
        setattr(tokenizer, name, value)
    rows = Dataset.from_list(case.get("rows", RECORDED["rows"]))
    packed = ConstantLengthDataset(tokenizer, rows, **case["kwargs"],
                                   formatting_func=AS_TEXT[case.get("formatting")])
    got = list(islice(packed, case.get("take")))
    assert ids(got) == case["input_ids"] == [row["labels"].tolist() for row in got]


@pytest.mark.filterwarnings("ignore:response_template")
@cases("completion")
def test_the_collator_for_completions_keeps_the_recorded_labels(case):
    tokenizer = recorded_tokenizer()
    rows = [{"input_ids": tokenizer(text).input_ids} for text in case["texts"]]
    batch = DataCollatorForCompletionOnlyLM(tokenizer=tokenizer, **case["kwargs"])(rows)
    assert batch["attention_mask"].sum(1).tolist() == case["lengths"]
    assert batch["labels"].shape[1] == case["width"]
    nothing = (IGNORE, case["kwargs"].get("ignore_index"))
    lists = batch["input_ids"].tolist(), batch["labels"].tolist(), case["learnt"]
    for tokens, labels, want in zip(*lists, strict=True):
        assert [i for i, label in enumerate(labels) if label not in nothing] == want
        assert all(labels[i] == tokens[i] for i in want)


@cases("dataset")
def test_the_trainer_makes_the_recorded_rows(case, make_sft):
    trainer = make_sft(recorded_model(), case["rows"], tokenizer=recorded_tokenizer(),
                       formatting_func=AS_TEXT[case.get("formatting")], **case["kwargs"])
    got = ids(trainer.train_dataset)
    assert (sorted(got) if case.get("unordered") else got) == case["input_ids"]


@cases("train")
def test_the_trainer_makes_the_recorded_steps(case, make_sft):
    tokenizer, model = recorded_tokenizer(), recorded_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    parts = {}
    if "completion" in case:
        collator = DataCollatorForCompletionOnlyLM(tokenizer=tokenizer, **case["completion"])
        parts["data_collator"] = collator
    if "eval_rows" in case:
        parts["eval_dataset"] = Dataset.from_list(case["eval_rows"])
    settings = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 5,
                "learning_rate": 1e-3, "max_grad_norm": 1.0, "optim": "adamw_torch",
                "lr_scheduler_type": "linear", "train_sampling_strategy": "sequential",
                **case.get("args", {})}
    trainer = make_sft(model, case["rows"], tokenizer=tokenizer, **parts, **case["kwargs"],
                       formatting_func=AS_TEXT[case.get("formatting")], **settings)
    trainer.train()
    assert losses(trainer) == pytest.approx(case["losses"], rel=1e-4)
    if "eval_rows" in case:
        assert trainer.evaluate()["eval_loss"] == pytest.approx(case["eval_loss"], rel=1e-4)
    found = changes(before, model)
    for name, (norm, product) in case["weights"].items():
        # Adam divides a small gradient by its own size, rounding included: half a percent
        assert found[name] == pytest.approx([norm, product], abs=6e-3 * norm + 2e-7), name
