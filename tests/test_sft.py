"""sft.py's functions, data and trainer: the mathematics by hand, every argument, every architecture; and the figures of
TRL 0.7.10 itself (recorded_sft.json) where it is right, or was mended to be: `mended` names the defect."""
import copy
import functools
import inspect
import json
import math
import random
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer
from transformers import (AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, GPT2Config, GPT2LMHeadModel,
                          PreTrainedTokenizerFast, TrainingArguments)

from common import TOY, InputError, disable_dropout
from conftest import BOS, CAUSAL, EOS, PAD, SEQ2SEQ, VOCAB, hf_model
from sft import (IGNORE, ConstantLengthDataset, DataCollator, DataCollatorForCompletionOnlyLM, Seq2SeqCollator, SFTTrainer,
                 continued, cross_entropy, encode, formatter, next_tokens)
from test_recorded import changes, fill

# one token a word: user 10, assistant 11, "<s> w10 question w11 answer </s> w10 ..."
TEMPLATE = ("{{ '<s> ' }}{% for m in messages %}{{ 'w10 ' if m['role'] == 'user' else 'w11 ' }}{{ m['content'] }}"
            "{{ ' </s> ' if m['role'] == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'w11 ' }}{% endif %}")
TEXTS = ["w4 w5 w6", "w7 w8 w9 w20 w21", "w30", "w31 w32 w33 w34 w35 w36 w37", "w40 w41", "w50 w51 w52 w53"]
PAIRS = [{"prompt": "w4 w5", "completion": "w6"}, {"prompt": "w7", "completion": "w8 w9 w20"},
         {"prompt": "w30 w31 w32", "completion": "w33 w34"}, {"prompt": "w40", "completion": "w41 w42 w43 w44"}]


def rows_of(texts):
    return Dataset.from_list([{"text": text} for text in texts])


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


CHAT = [user("w4 w5"), assistant("w6"), user("w7"), assistant("w8 w9")]


@pytest.fixture
def chat_tokenizer(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def make_args(tmp_path):
    """make_args(**changes) -> TrainingArguments: 4 rows a step, SGD without clipping, 3 steps, nothing saved."""
    def make(**changes):
        return TrainingArguments(**{
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 3,
            "learning_rate": 0.05, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0, "report_to": "none", "use_cpu": True,
            "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, **changes})

    return make


@pytest.fixture
def make_sft(make_args, tokenizer):
    """make_sft("gpt2" or a model or None, rows, **parts of SFTTrainer or TrainingArguments) -> SFTTrainer, without dropout."""
    names = set(inspect.signature(SFTTrainer.__init__).parameters)

    def make(model="gpt2", rows=None, **kwargs):
        rows = rows_of(TEXTS) if rows is None and "train_dataset" not in kwargs else rows
        rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
        parts = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        if isinstance(model, str) and model in CAUSAL + SEQ2SEQ:
            model = hf_model(model)
            disable_dropout(model)
        return SFTTrainer(**{"model": model, "args": make_args(**kwargs), "train_dataset": rows, "tokenizer": tokenizer, **parts})

    return make


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def ids(dataset):
    return [list(map(int, row["input_ids"])) for row in dataset]


def nll_alone(model, documents, learnt=lambda i, t: True):
    """Sum and number of -log p(token) of documents, each alone in a batch of one: the slow and certain way."""
    total, count = 0.0, 0
    with torch.no_grad():
        for i, document in enumerate(documents):
            logp = model(torch.tensor([document])).logits[0].float().log_softmax(-1)
            for t in range(1, len(document)):
                if learnt(i, t):
                    total, count = total - logp[t - 1, document[t]].item(), count + 1
    return total, count


# ------------------------------------------------------------------------------------------------ the mathematics
def test_the_loss_of_a_table_of_logits_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0], [math.log(4), 0.0]])  # p: 1/4 3/4, 1/2 1/2, 4/5 1/5
    want = [math.log(4 / 3), math.log(2), math.log(5)]
    assert cross_entropy(logits, torch.tensor([1, 0, 1])).tolist() == pytest.approx(want)


def test_the_gradient_of_the_loss_is_the_probability_minus_the_target():
    logits = torch.tensor([[0.0, math.log(3)]], requires_grad=True)
    cross_entropy(logits * 1, torch.tensor([0])).sum().backward()
    assert logits.grad[0].tolist() == pytest.approx([1 / 4 - 1, 3 / 4])


def test_smoothing_by_hand_spreads_eps_over_the_vocabulary():
    logits = torch.tensor([[0.0, math.log(3)]])
    want = 0.8 * math.log(4) + 0.1 * (math.log(4) + math.log(4 / 3))  # eps = 0.2 over two words
    assert cross_entropy(logits, torch.tensor([0]), 0.2).item() == pytest.approx(want)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_loss_and_gradient_are_torch_s(smoothing):
    logits, targets = torch.randn(200, 17, requires_grad=True), torch.randint(17, (200,))
    ours = cross_entropy(logits * 1, targets, smoothing)
    (gradient,) = torch.autograd.grad(ours.square().sum(), logits)
    theirs = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs.square().sum(), logits)[0])


def test_each_position_predicts_the_label_after_it():
    labels = torch.tensor([[5, 6, 7], [IGNORE, 8, IGNORE]])
    assert next_tokens(labels).tolist() == [[6, 7, IGNORE], [8, IGNORE, IGNORE]]


def test_a_model_that_knows_nothing_loses_the_log_of_the_vocabulary(make_sft):
    trainer = make_sft(label_smoothing_factor=0.1)
    torch.nn.init.zeros_(trainer.model.get_output_embeddings().weight)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(math.log(VOCAB))


# ------------------------------------------------------------------------------------------------ rows -> tokens and labels
def test_a_text_ends_once_whether_it_says_so_or_not(tokenizer):
    got, labels = encode({"text": ["w4 w5", "w4 w5 </s>"]}, tokenizer, eos_token_id=EOS)
    assert got == [[4, 5, EOS]] * 2 and labels is None
    assert encode({"text": ["w4 w5"]}, tokenizer)[0] == [[4, 5]]


def test_of_prompt_and_completion_the_completion_and_its_end_are_learnt(tokenizer):
    got, labels = encode({"prompt": ["w4 w5", "w4"], "completion": ["w6", "w5 w6 </s>"]}, tokenizer, eos_token_id=EOS)
    assert got == [[4, 5, 6, EOS], [4, 5, 6, EOS]]
    assert labels == [[IGNORE, IGNORE, 6, EOS], [IGNORE, 5, 6, EOS]]


def ends_what_it_reads(make_tokenizer):
    from tokenizers.processors import TemplateProcessing
    tokenizer = make_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return tokenizer


def test_a_tokenizer_that_ends_what_it_reads_does_not_end_the_prompt_nor_end_twice(make_tokenizer):
    tokenizer = ends_what_it_reads(make_tokenizer)
    assert encode({"text": ["w4"]}, tokenizer, eos_token_id=EOS)[0] == [[BOS, 4, EOS]]
    got, labels = encode({"prompt": ["w4"], "completion": ["w5"]}, tokenizer, eos_token_id=EOS)
    assert got == [[BOS, 4, 5, EOS]] and labels == [[IGNORE, IGNORE, 5, EOS]]
    got, labels = encode({"prompt": ["w4"], "completion": ["w5"]}, tokenizer, eos_token_id=EOS, seq2seq=True)
    assert got == [[BOS, 4, EOS]] and labels == [[5, EOS]]  # an encoder reads whole sequences
    assert encode({"text": ["w4"]}, tokenizer, eos_token_id=EOS, add_special_tokens=False)[0] == [[4, EOS]]


def test_a_chat_is_learnt_whole_and_the_template_writes_the_only_special_tokens(chat_tokenizer):
    got, labels = encode({"messages": [CHAT]}, chat_tokenizer, eos_token_id=EOS)
    assert got == [[BOS, 10, 4, 5, 11, 6, EOS, 10, 7, 11, 8, 9, EOS]] and labels is None  # S3: one <s>, one </s>


def test_of_a_chat_the_assistant_s_turns_and_their_ends_alone_may_be_learnt(chat_tokenizer):
    got, labels = encode({"messages": [CHAT]}, chat_tokenizer, eos_token_id=EOS, assistant_only_loss=True)
    assert labels == [[IGNORE] * 5 + [6, EOS] + [IGNORE] * 3 + [8, 9, EOS]]
    assert got == [[BOS, 10, 4, 5, 11, 6, EOS, 10, 7, 11, 8, 9, EOS]]


@pytest.mark.parametrize("completion", ["w8 w9", [assistant("w8 w9")]], ids=["text", "messages"])
def test_of_a_chat_prompt_the_answer_is_learnt(chat_tokenizer, completion):
    got, labels = encode({"prompt": [CHAT[:3]], "completion": [completion]}, chat_tokenizer, eos_token_id=EOS)
    assert got == [[BOS, 10, 4, 5, 11, 6, EOS, 10, 7, 11, 8, 9, EOS]]
    assert labels == [[IGNORE] * 10 + [8, 9, EOS]]


def test_a_template_that_rewrites_earlier_turns_is_told(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ 'w' ~ (20 + messages | length) }} " + TEMPLATE
    with pytest.raises(InputError, match="writes a turn differently when others follow"):
        encode({"messages": [CHAT]}, chat_tokenizer, assistant_only_loss=True)
    with pytest.raises(InputError, match="writes a prompt differently when an answer follows"):
        encode({"prompt": [CHAT[:3]], "completion": ["w8"]}, chat_tokenizer)


def test_tokens_come_as_they_are_with_their_labels_or_learn_all(tokenizer):
    assert encode({"input_ids": [[4, 5]]}, tokenizer, eos_token_id=EOS) == ([[4, 5]], None)
    assert encode({"input_ids": [[4, 5]], "labels": [[IGNORE, 5]]}, tokenizer) == ([[4, 5]], [[IGNORE, 5]])


def test_text_or_chat_may_stand_in_any_column(chat_tokenizer):
    assert encode({"mine": ["w4"], "text": ["w5"]}, chat_tokenizer, field="mine")[0] == [[4]]
    assert encode({"mine": [CHAT[:2]]}, chat_tokenizer, field="mine")[0] == [[BOS, 10, 4, 5, 11, 6, EOS]]


# ------------------------------------------------------------------------------------------------ formatting_func (S9, S16)
class Speaker:
    def __call__(self, row):
        return f"{row['q']} {row['a']}"


def say(row, between):
    return f"{row['q']}{between}{row['a']}"


FORMATTERS = {
    "a row to its text": lambda row: f"{row['q']} {row['a']}",
    "a row to a list of one": lambda row: [f"{row['q']} {row['a']}"],
    "a batch to texts": lambda batch: [f"{q} {a}" for q, a in zip(batch["q"], batch["a"])],
    "a partial": functools.partial(say, between=" "),
    "an object": Speaker(),
    "an object's method": Speaker().__call__,
}
QA = [{"q": f"w{4 + i}", "a": f"w{50 + i}"} for i in range(7)]


@pytest.mark.parametrize("how", FORMATTERS)
@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_formatting_func_gives_every_row_its_text(how, packing, make_sft):
    trainer = make_sft(rows=QA, formatting_func=FORMATTERS[how], packing=packing, max_seq_length=21 if packing else None)
    got = [token for row in ids(trainer.train_dataset) for token in row]
    assert sorted(got) == sorted([4 + i for i in range(7)] + [50 + i for i in range(7)] + [EOS] * 7)
    assert len(trainer.train_dataset) == (1 if packing else 7)


@pytest.mark.parametrize("rows", [QA[:1], QA[:2], QA[:3]], ids=["1 row", "2 rows", "3 rows"])
def test_formatting_func_is_understood_however_few_the_rows(rows, make_sft):
    for function in FORMATTERS.values():
        trainer = make_sft(rows=rows, formatting_func=function)
        assert ids(trainer.train_dataset) == [[4 + i, 50 + i, EOS] for i in range(len(rows))]


def test_formatting_func_that_returns_no_text_is_told():
    with pytest.raises(InputError, match="returned dict for one row and no list of 2 for 2 rows"):
        formatter(lambda row: {"text": 1}, QA[:2])({"q": ["w4"], "a": ["w5"]})
    with pytest.raises(InputError, match=r"formatting_func failed on the row .*KeyError"):
        formatter(lambda row: row["text"], QA[:2])({"q": ["w4"], "a": ["w5"]})


# ------------------------------------------------------------------------------------------------ ConstantLengthDataset
def test_documents_fill_rows_and_positions_count_from_each_beginning(tokenizer):
    packed = ConstantLengthDataset(tokenizer, rows_of(["w4 w5 w6", "w7", "w8"]), "text", seq_length=4, shuffle=False)
    first, second = packed  # 4 5 6 </s> | 7 </s> 8 </s>
    assert [first[name].tolist() for name in first] == [[4, 5, 6, EOS], [4, 5, 6, EOS], [0, 1, 2, 3]]
    assert [second[name].tolist() for name in second] == [[7, EOS, 8, EOS], [7, EOS, 8, EOS], [0, 1, 0, 1]]


def test_a_document_that_is_cut_goes_on_in_the_next_row_from_position_0(tokenizer):
    packed = list(ConstantLengthDataset(tokenizer, rows_of(["w4", "w5 w6 w7"]), "text", seq_length=3, shuffle=False))
    assert [row["input_ids"].tolist() for row in packed] == [[4, EOS, 5], [6, 7, EOS]]
    assert [row["position_ids"].tolist() for row in packed] == [[0, 1, 0], [0, 1, 2]]


@pytest.mark.parametrize("buffer", [1, 2, 1000])
def test_packing_loses_nothing_between_buffers(tokenizer, buffer):
    """S5: what a buffer leaves over goes on into the next."""
    texts = [" ".join(f"w{4 + (i * j) % 90}" for j in range(1 + i % 5)) for i in range(40)]
    whole = [token for text in texts for token in tokenizer(text).input_ids + [EOS]]
    packed = ConstantLengthDataset(tokenizer, rows_of(texts), "text", seq_length=7, num_of_sequences=buffer, shuffle=False)
    assert [token for row in ids(packed) for token in row] == whole[:len(whole) // 7 * 7]
    assert len(packed) == len(whole) // 7 == len(list(packed))  # S8: rows, not documents
    packed.keep_tail = True
    assert [token for row in ids(packed) for token in row] == whole


def test_data_that_end_just_where_a_buffer_is_full_end_well(tokenizer):
    """S6: a buffer of 2 x 5 x 3.6 = 36 characters, filled exactly by two rows of 18."""
    packed = ConstantLengthDataset(tokenizer, rows_of(["w4 w5 w6 w7 w8 w10"] * 4), "text", seq_length=5, num_of_sequences=2)
    assert len("w4 w5 w6 w7 w8 w10") * 2 == packed.max_buffer_size and len(list(packed)) == 4 * 7 // 5


def test_a_buffer_holds_num_of_sequences_rows_worth_of_characters(tokenizer):
    read = []

    def rows():
        for i in range(100):
            read.append(i)
            yield {"text": "w4 w5 w6 w7"}  # 11 characters, 5 tokens

    stream = IterableDataset.from_generator(rows)
    for sequences, chars, want in ((2, 5.5, 5), (4, 5.5, 10), (2, 11, 10)):  # 5 tokens x 2 x 5.5 = 55 characters
        packed = ConstantLengthDataset(tokenizer, stream, "text", seq_length=5, num_of_sequences=sequences, chars_per_token=chars)
        read.clear()
        next(iter(packed))
        assert len(read) == want


def test_the_order_is_the_seed_s_and_nobody_else_s(tokenizer):
    """S7"""
    def order(seed, disturb=0):
        random.seed(disturb)
        torch.manual_seed(disturb)
        packed = ConstantLengthDataset(tokenizer, rows_of(TEXTS * 3), "text", seq_length=4, seed=seed)
        before = random.getstate()
        passes = [ids(packed), ids(packed)]
        assert random.getstate() == before
        return passes

    assert order(1) == order(1, disturb=5) and order(1) != order(2)
    first, second = order(1)
    assert first != second and sorted(first) == sorted(second)  # another order in each pass, of the same rows


def test_without_shuffle_the_order_is_the_data_s(tokenizer):
    packed = ConstantLengthDataset(tokenizer, rows_of(TEXTS), "text", seq_length=4, shuffle=False)
    assert ids(packed) == ids(packed) and ids(packed)[0] == [4, 5, 6, EOS]


def test_an_infinite_data_set_begins_anew_and_has_no_length(tokenizer):
    packed = ConstantLengthDataset(tokenizer, rows_of(["w4 w5 w6"]), "text", infinite=True, seq_length=3, shuffle=False)
    rows = iter(packed)
    assert [next(rows)["input_ids"].tolist() for _ in range(5)] == [[4, 5, 6], [EOS, 4, 5], [6, EOS, 4], [5, 6, EOS], [4, 5, 6]]
    with pytest.raises(TypeError, match="no number of packed rows: set max_steps"):
        len(packed)


def test_a_packed_stream_is_not_counted_before_it_is_read(tokenizer):
    read = []
    stream = rows_of(["w4 w5"] * 50).to_iterable_dataset().map(lambda row: read.append(1) or row)
    with pytest.raises(TypeError, match="set max_steps"):
        len(ConstantLengthDataset(tokenizer, stream, "text", seq_length=3))
    assert not read


def test_the_end_of_a_document_is_the_tokenizer_s_or_else_eos_token_id(make_tokenizer):
    rows = rows_of(["w4", "w5 </s>"])
    read = lambda tokenizer, **kwargs: ids(ConstantLengthDataset(tokenizer, rows, "text", seq_length=4, shuffle=False, **kwargs))
    assert read(make_tokenizer(), eos_token_id=9) == [[4, EOS, 5, EOS]]  # S3: not twice
    assert read(make_tokenizer(eos_token=None), eos_token_id=9) == [[4, 9, 5, EOS]]  # which is a word like others then
    assert ids(ConstantLengthDataset(make_tokenizer(), rows, "text", seq_length=3, append_concat_token=False)) == [[4, 5, EOS]]


def test_packing_lets_the_tokenizer_add_its_own_special_tokens_or_not(make_tokenizer):
    tokenizer, rows = ends_what_it_reads(make_tokenizer), rows_of(["w4", "w5"])
    read = lambda n, **kwargs: ids(ConstantLengthDataset(tokenizer, rows, "text", seq_length=n, shuffle=False, **kwargs))
    assert read(6) == [[BOS, 4, EOS, BOS, 5, EOS]] and read(4, add_special_tokens=False) == [[4, EOS, 5, EOS]]


def test_chats_and_completions_keep_their_labels_when_packed(chat_tokenizer):
    chats = Dataset.from_list([{"messages": CHAT}, {"messages": CHAT[:2]}])
    (row,) = ConstantLengthDataset(chat_tokenizer, chats, seq_length=20, assistant_only_loss=True)
    learnt = [IGNORE] * 5 + [6, EOS] + [IGNORE] * 3 + [8, 9, EOS] + [IGNORE] * 5 + [6, EOS]
    assert row["labels"].tolist() == learnt and row["position_ids"].tolist() == [*range(13), *range(7)]
    pairs = Dataset.from_list([{"prompt": "w4", "completion": "w5"}] * 2)
    (row,) = ConstantLengthDataset(chat_tokenizer, pairs, seq_length=6)
    assert row["labels"].tolist() == [IGNORE, 5, EOS] * 2


def test_workers_of_a_data_loader_share_the_rows_and_repeat_none(tokenizer):
    packed = ConstantLengthDataset(tokenizer, rows_of(TEXTS * 2), "text", seq_length=4, shuffle=False)
    alone, shared = ids(packed), ids(torch.utils.data.DataLoader(packed, batch_size=None, num_workers=2))
    assert sorted(shared) == sorted(alone)


# ------------------------------------------------------------------------------------------------ rows -> batches
def test_padding_is_on_the_right_and_told_by_mask_and_label():
    batch = DataCollator(PAD)([{"input_ids": [4, 5, EOS]}, {"input_ids": [6, EOS], "labels": [IGNORE, EOS]}])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[4, 5, EOS], [6, EOS, PAD]], "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[4, 5, EOS], [IGNORE, EOS, IGNORE]]}


def test_the_end_is_learnt_even_where_it_is_the_padding_too():
    """S1"""
    batch = DataCollator(EOS)([{"input_ids": [4, 5, EOS]}, {"input_ids": [6, EOS]}])
    assert batch["labels"].tolist() == [[4, 5, EOS], [6, EOS, IGNORE]]


def test_packed_rows_have_positions_instead_of_a_mask_and_do_not_learn_first_tokens():
    batch = DataCollator(PAD)([{"input_ids": [4, EOS, 5], "labels": [4, EOS, 5], "position_ids": [0, 1, 0]},
                               {"input_ids": [6], "labels": [6], "position_ids": [0]}])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[4, EOS, 5], [6, PAD, PAD]], "labels": [[IGNORE, EOS, IGNORE], [IGNORE] * 3], "position_ids": [[0, 1, 0], [0] * 3]}


def test_flattened_rows_lie_end_to_end_without_padding():
    batch = DataCollator(PAD, flatten=True)([{"input_ids": [4, 5, EOS]}, {"input_ids": [6, EOS], "labels": [IGNORE, EOS]}])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[4, 5, EOS, 6, EOS]], "labels": [[IGNORE, 5, EOS, IGNORE, EOS]], "position_ids": [[0, 1, 2, 0, 1]]}


def test_an_encoder_decoder_s_rows_have_two_lengths():
    batch = Seq2SeqCollator(PAD)([{"input_ids": [4, 5], "labels": [6, EOS]}, {"input_ids": [7], "labels": [8, 9, EOS]}])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[4, 5], [7, PAD]], "labels": [[6, EOS, IGNORE], [8, 9, EOS]], "attention_mask": [[1, 1], [1, 0]]}


def labelled(tokenizer, text, **kwargs):
    """The words that the collator for completions lets a model learn."""
    collator = DataCollatorForCompletionOnlyLM(tokenizer=tokenizer, **kwargs)
    batch = collator([{"input_ids": tokenizer(text).input_ids}])
    return tokenizer.decode([label for label in batch["labels"][0].tolist() if label != IGNORE])


def test_what_follows_the_last_response_template_is_learnt(tokenizer):
    assert labelled(tokenizer, "w10 w4 w11 w5 w11 w6 w7", response_template="w11") == "w6 w7"
    assert labelled(tokenizer, "w10 w4 w11 w5", response_template=[10, 4]) == "w11 w5"


@pytest.mark.parametrize("text, want", [
    ("w10 w4 w11 w5 w10 w6 w11 w7 </s>", "w5 w7 </s>"),
    ("w10 w4 w10 w5 w11 w6", "w6"),                                 # two questions in a row
    ("w10 w4 w11 w5 w11 w6 w10 w7 w11 w8", "w5 w11 w6 w8"),         # two answers in a row: no question is learnt
    ("w11 w5 w10 w6 w11 w7", "w5 w7"),                              # the assistant begins
    ("w10 w4 w11 w5 w10 w6", "w5"),                                 # a question without an answer
])
def test_turns_are_told_by_what_stands_before_them(tokenizer, text, want):
    """S12"""
    assert labelled(tokenizer, text, response_template="w11", instruction_template="w10") == want


def test_a_template_that_the_tokenizer_writes_otherwise_in_a_row_is_found():
    """S11: `: ` alone and in the middle of a word are other tokens."""
    tokenizer = AutoTokenizer.from_pretrained(TOY / "blank")
    template, text = "acting", "the acting was bland, the acting was dull"
    alone = tokenizer(template, add_special_tokens=False).input_ids
    inside = tokenizer(text).input_ids
    assert not any(inside[i:i + len(alone)] == alone for i in range(len(inside))), "choose another word"
    assert labelled(tokenizer, text, response_template=template) == " was dull"
    assert labelled(tokenizer, text[4:], response_template=template) == " was dull"  # the first is written as it is alone


def test_a_row_without_the_template_is_told_and_teaches_nothing(tokenizer, capsys):
    assert labelled(tokenizer, "w4 w5", response_template="w11") == ""
    assert "response_template 'w11' is not in the row 'w4 w5'" in capsys.readouterr().out


def test_the_collator_for_completions_refuses_what_it_cannot_do(tokenizer):
    with pytest.raises(InputError, match="mlm=True"):
        DataCollatorForCompletionOnlyLM("w11", tokenizer=tokenizer, mlm=True)
    with pytest.raises(InputError, match="pass tokenizer="):
        DataCollatorForCompletionOnlyLM("w11")


def test_the_end_is_learnt_with_the_collator_for_completions_where_pad_is_eos(make_tokenizer):
    """S1"""
    assert labelled(make_tokenizer(pad_token="</s>"), "w4 w11 w5 </s>", response_template="w11") == "w5 </s>"


# ------------------------------------------------------------------------------------------------ the trainer's arguments
def test_the_documented_arguments_stand_in_their_order_with_their_defaults():
    want = {"model": None, "args": None, "data_collator": None, "train_dataset": None, "eval_dataset": None, "tokenizer": None,
            "model_init": None, "compute_metrics": None, "callbacks": None, "optimizers": (None, None),
            "preprocess_logits_for_metrics": None, "peft_config": None, "dataset_text_field": None, "packing": False,
            "formatting_func": None, "max_seq_length": None, "infinite": None, "num_of_sequences": 1024, "chars_per_token": 3.6,
            "dataset_num_proc": None, "dataset_batch_size": 1000, "neftune_noise_alpha": None, "model_init_kwargs": None,
            "dataset_kwargs": None}
    parameters = list(inspect.signature(SFTTrainer).parameters.values())[:24]
    assert [(p.name, p.default) for p in parameters] == list(want.items())


def test_args_none_trains_with_transformers_defaults(tmp_path, monkeypatch, tokenizer):
    """S13, S14, G3: with an adapter and noise, too."""
    from peft import LoraConfig
    monkeypatch.chdir(tmp_path)
    trainer = SFTTrainer(hf_model("gpt2"), train_dataset=rows_of(TEXTS), tokenizer=tokenizer, neftune_noise_alpha=5.0,
                         peft_config=LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    assert trainer.args.neftune_noise_alpha == 5.0 and trainer.args.num_train_epochs == TrainingArguments().num_train_epochs
    assert hasattr(trainer.model, "peft_config")


def test_a_model_may_be_a_name_and_bring_its_tokenizer(tmp_path, make_args, tokenizer):
    hf_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = SFTTrainer(str(tmp_path / "model"), make_args(), train_dataset=rows_of(TEXTS),
                         model_init_kwargs={"attn_implementation": "eager", "dtype": torch.bfloat16})
    assert trainer.model.config._attn_implementation == "eager" and trainer.model.dtype == torch.bfloat16
    assert trainer.tokenizer.convert_ids_to_tokens(4) == "w4"
    trainer = SFTTrainer(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), make_args(), train_dataset=rows_of(TEXTS))
    assert trainer.processing_class is trainer.tokenizer


def test_model_init_makes_the_model_when_training_begins(make_sft):
    made = []

    def init():
        made.append(hf_model("gpt2", seed=3))
        return made[-1]

    trainer = make_sft(None, model_init=init)
    trainer.train()
    assert len(losses(trainer)) == 3 and trainer.model is made[-1]


def test_model_init_takes_an_adapter_too(make_sft):
    from peft import LoraConfig
    trainer = make_sft(None, model_init=lambda: hf_model("llama"), peft_config=LoraConfig(target_modules=["q_proj"]))
    trainer.train()
    assert {name.split(".")[-3] for name, p in trainer.model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_every_other_argument_reaches_trainer(make_sft):
    from transformers import TrainerCallback
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
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_compute_metrics_sees_all_logits_and_labels(make_sft):
    seen = {}

    def metrics(prediction):
        seen.update(logits=torch.tensor(prediction.predictions), labels=torch.tensor(prediction.label_ids))
        return {"right": 0.5}

    trainer = make_sft(eval_dataset=rows_of(TEXTS[:3]), compute_metrics=metrics)
    told = trainer.evaluate()
    assert told["eval_right"] == 0.5 and seen["logits"].shape == (3, 6, VOCAB) and seen["labels"].shape == (3, 6)
    targets = next_tokens(seen["labels"])
    want = cross_entropy(seen["logits"][targets != IGNORE], targets[targets != IGNORE]).mean()
    assert told["eval_loss"] == pytest.approx(want.item(), rel=1e-5)


def test_logits_may_be_made_smaller_before_the_metrics(make_sft):
    trainer = make_sft(eval_dataset=rows_of(TEXTS), compute_metrics=lambda p: {"shape": list(p.predictions.shape)},
                       preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1))
    assert trainer.evaluate()["eval_shape"] == [6, 8]


def test_max_seq_length_keeps_the_first_tokens_and_defaults_to_what_is_possible(make_sft, make_tokenizer):
    trainer = make_sft(max_seq_length=3)
    assert ids(trainer.train_dataset) == [[4, 5, 6], [7, 8, 9], [30, EOS], [31, 32, 33], [40, 41, EOS], [50, 51, 52]]
    assert make_sft().max_seq_length == 64                                              # the model's positions
    tokenizer = make_tokenizer()
    for says, want in ((10**30, 1024), (50, 50)):                                       # S21
        tokenizer.model_max_length = says
        assert make_sft("t5", rows=PAIRS, tokenizer=tokenizer).max_seq_length == want


@pytest.mark.parametrize("size", [None, 0, -1, 2])
def test_the_rows_are_the_same_however_many_are_tokenised_at_once(make_sft, size):
    assert ids(make_sft(dataset_batch_size=size).train_dataset) == ids(make_sft().train_dataset)


def test_dataset_batch_size_is_how_many_rows_are_formatted_at_once(make_sft):
    sizes = []

    def texts(batch):
        sizes.append(len(batch["q"]))
        return batch["q"]

    make_sft(rows=QA, formatting_func=texts, dataset_batch_size=3)
    assert sizes[-3:] == [3, 3, 1]
    make_sft(rows=QA, formatting_func=texts, dataset_batch_size=-1)
    assert sizes[-1] == 7


def test_several_processes_tokenise_alike(make_sft, monkeypatch):
    asked = []
    plain = Dataset.map
    monkeypatch.setattr(Dataset, "map", lambda self, *args, **kwargs: asked.append(kwargs.get("num_proc")) or plain(self, *args, **kwargs))
    trainer = make_sft(rows=QA, formatting_func=FORMATTERS["a partial"], dataset_num_proc=2)
    assert 2 in asked and ids(trainer.train_dataset) == [[4 + i, 50 + i, EOS] for i in range(7)]


def test_dataset_kwargs_switch_special_tokens_and_ends(make_sft, make_tokenizer):
    tokenizer = ends_what_it_reads(make_tokenizer)
    rows = [{"text": "w4"}, {"text": "w5"}]
    read = lambda **kwargs: ids(make_sft(rows=rows, tokenizer=tokenizer, dataset_kwargs=kwargs).train_dataset)
    assert read() == [[BOS, 4, EOS], [BOS, 5, EOS]]
    assert read(add_special_tokens=False) == [[4, EOS], [5, EOS]]
    rows = [{"text": "w4 w5"}]
    assert read(add_special_tokens=False, append_concat_token=False) == [[4, 5]]


def test_noise_on_the_embeddings_is_of_the_papers_size_and_goes_with_the_training(make_sft):
    """NEFTune: uniform in +-alpha / sqrt(T D)."""
    trainer = make_sft(rows=[{"text": "w4 w5 w6 w7 w8 w9 w10"}] * 4, neftune_noise_alpha=5.0, max_steps=1, learning_rate=0.0)
    table = trainer.model.get_input_embeddings()
    clean, seen = table.weight.detach().clone(), []
    trainer.model.transformer.register_forward_pre_hook(  # after Trainer's own hook on the table, which makes the noise
        lambda module, args: seen.append((args[0], table(args[0]))))
    trainer.train()
    tokens, noisy = seen[0]
    noise, largest = noisy - clean[tokens], 5 / math.sqrt(8 * 32)
    assert noise.abs().max() <= largest and noise.std().item() == pytest.approx(largest / math.sqrt(3), rel=0.05)
    assert torch.equal(table(tokens), clean[tokens])


def test_nothing_that_was_given_is_changed(make_args, make_tokenizer):
    """S17"""
    args, tokenizer, evals = make_args(), make_tokenizer(), {"a": rows_of(TEXTS[:2]), "b": rows_of(TEXTS[2:])}
    rows, inside, before = rows_of(TEXTS), dict(evals), args.to_dict()
    settings = dict(tokenizer.init_kwargs), tokenizer.padding_side, tokenizer.truncation_side
    kwargs = {"keep_tail": True}
    SFTTrainer(hf_model("gpt2"), args, train_dataset=rows, eval_dataset=evals, tokenizer=tokenizer, neftune_noise_alpha=3.0,
               packing=True, max_seq_length=8, dataset_kwargs=kwargs)
    assert args.to_dict() == before and args.neftune_noise_alpha is None
    assert all(evals[name] is inside[name] for name in inside) and rows.column_names == ["text"]
    assert (dict(tokenizer.init_kwargs), tokenizer.padding_side, tokenizer.truncation_side) == settings and kwargs == {"keep_tail": True}


# ------------------------------------------------------------------------------------------------ kinds of data sets
def test_a_stream_is_tokenised_as_it_comes(make_sft):
    """S10"""
    stream = rows_of(TEXTS).to_iterable_dataset()
    trainer = make_sft(train_dataset=stream, eval_dataset=stream)
    whole = make_sft(eval_dataset=rows_of(TEXTS))
    assert ids(trainer.train_dataset) == ids(whole.train_dataset)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(whole.evaluate()["eval_loss"], rel=1e-6)
    trainer.train()
    assert len(losses(trainer)) == 3


def test_a_stream_is_packed_as_it_comes(make_sft):
    trainer = make_sft(train_dataset=rows_of(TEXTS).to_iterable_dataset(), packing=True, max_seq_length=4)
    trainer.train()
    assert sorted(ids(trainer.train_dataset)) == sorted(ids(make_sft(packing=True, max_seq_length=4).train_dataset))


def test_an_infinite_data_set_trains_to_max_steps(make_sft):
    """S15: infinite has effect on rows that are at hand."""
    trainer = make_sft(rows=rows_of(TEXTS[:2]), packing=True, infinite=True, max_seq_length=4, max_steps=7)
    trainer.train()
    assert trainer.state.global_step == 7


def test_one_s_own_packed_data_set_trains_for_as_many_steps_as_it_has_batches(make_sft, tokenizer):
    """S8: as the page recommends."""
    packed = ConstantLengthDataset(tokenizer, rows_of(TEXTS * 4), "text", seq_length=8)
    trainer = make_sft(train_dataset=packed, eval_dataset=packed, max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 2 * math.ceil(len(packed) / 4) and "eval_loss" in trainer.evaluate()


def test_tokens_may_be_given_with_or_without_labels(make_sft):
    """S18"""
    rows = [{"input_ids": [4, 5, 6], "labels": [IGNORE, 5, 6]}, {"input_ids": [7, 8], "labels": [7, 8]}]
    trainer = make_sft(rows=rows)
    assert [row["labels"] for row in trainer.train_dataset] == [[IGNORE, 5, 6], [7, 8]]
    trainer.train()
    trainer = make_sft(rows=[{"input_ids": row["input_ids"]} for row in rows], max_seq_length=2)
    assert ids(trainer.train_dataset) == [[4, 5], [7, 8]]


def test_tokens_may_be_tensors(make_sft):
    rows = Dataset.from_list([{"input_ids": [4, 5, 6]}, {"input_ids": [7, 8]}]).with_format("torch")
    trainer = make_sft(rows=rows)
    trainer.train()
    assert len(losses(trainer)) == 3


def test_padding_in_given_tokens_is_neither_read_nor_learnt(make_sft):
    """Many tokenise with padding="max_length": the mask that comes with it tells the padding."""
    padded = [{"input_ids": [4, 5, 6, PAD, PAD], "attention_mask": [1, 1, 1, 0, 0]}, {"input_ids": [7, 8, 9, 20, EOS], "attention_mask": [1] * 5}]
    plain = [{"input_ids": [4, 5, 6]}, {"input_ids": [7, 8, 9, 20, EOS]}]
    evaluate = lambda rows: make_sft(eval_dataset=Dataset.from_list(rows)).evaluate()["eval_loss"]
    assert evaluate(padded) == pytest.approx(evaluate(plain), rel=1e-6)


def test_finished_rows_of_a_torch_data_set_stay_as_they_are(make_sft):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return {"input_ids": [4 + i, 5, EOS]}

    rows = Rows()
    trainer = make_sft(train_dataset=rows)
    trainer.train()
    assert trainer.train_dataset is rows and len(losses(trainer)) == 3


def test_a_data_collator_of_one_s_own_is_used(make_sft, tokenizer):
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer, plain = make_sft(data_collator=collator), make_sft()
    trainer.train(), plain.train()
    assert trainer.data_collator is collator and losses(trainer) == pytest.approx(losses(plain), rel=1e-4)


def test_evaluation_sets_may_have_names(make_sft):
    trainer = make_sft(eval_dataset={"short": rows_of(TEXTS[:1]), "long": rows_of(TEXTS[1:])}, max_steps=1, eval_strategy="steps", eval_steps=1)
    trainer.train()
    told = {name for row in trainer.state.log_history for name in row}
    assert {"eval_short_loss", "eval_long_loss"} <= told


def test_evaluation_keeps_a_document_a_row_when_training_is_packed(make_sft):
    """S18: and a small evaluation set does not fail."""
    trainer = make_sft(packing=True, max_seq_length=8, eval_dataset=rows_of(["w4"]))
    assert ids(trainer.eval_dataset) == [[4, EOS]] and trainer.evaluate()["eval_loss"] > 0


def test_without_a_training_set_one_may_still_evaluate(make_sft):
    """S15"""
    assert make_sft(train_dataset=None, eval_dataset=rows_of(TEXTS), packing=True).evaluate()["eval_loss"] > 0


def test_rows_given_to_evaluate_are_tokenised_too(make_sft):
    trainer = make_sft(eval_dataset=rows_of(TEXTS[:4]))
    want = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(rows_of(TEXTS[:4]))["eval_loss"] == pytest.approx(want, rel=1e-6)


def test_rows_that_are_ready_are_not_made_ready_again(make_sft):
    packed = make_sft(packing=True, max_seq_length=8)
    assert packed.prepare(packed.train_dataset, "training", **packed.how) is packed.train_dataset
    trainer = make_sft(eval_dataset=rows_of(TEXTS[:4]), formatting_func=lambda row: row["text"])
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


def test_a_prompt_keeps_the_end_of_sequence_that_it_writes_itself(tokenizer):
    (row,), _ = encode({"prompt": ["w4 </s>"], "completion": ["w5"]}, tokenizer, eos_token_id=EOS)
    assert row == [4, EOS, 5, EOS]


def test_packed_rows_that_teach_nothing_are_told(make_sft):
    rows = [{"input_ids": [4, 5, 6, 7], "labels": [-100] * 4}] * 8
    with pytest.raises(InputError, match="no packed row has a token to learn"):
        make_sft(rows=rows, packing=True, max_seq_length=8)


def test_a_sample_fits_the_model_s_positions(make_sft):
    trainer = make_sft()
    positions = trainer.model.config.max_position_embeddings
    prompt, answer = continued(trainer, {"input_ids": [5] * (positions - 2) + [6, 7], "labels": [-100] * (positions - 2) + [6, 7]})
    assert prompt and isinstance(answer, str)


def test_labels_for_completions_are_made_once_at_the_start(make_sft, tokenizer):
    collator = DataCollatorForCompletionOnlyLM("w11", tokenizer=tokenizer)
    trainer = make_sft(rows=rows_of(["w4 w11 w5", "w6 w7 w11 w8 w9"]), data_collator=collator)
    assert [row["labels"] for row in trainer.train_dataset] == [[IGNORE, IGNORE, 5, EOS], [IGNORE] * 3 + [8, 9, EOS]]


def test_the_collator_s_own_ignore_index_means_not_learnt_to_the_trainer_too(make_sft, tokenizer):
    rows = rows_of(["w4 w11 w5", "w6 w7 w11 w8 w9"])
    evaluate = lambda index: make_sft(
        rows=rows, eval_dataset=rows, data_collator=DataCollatorForCompletionOnlyLM("w11", tokenizer=tokenizer, ignore_index=index)).evaluate()
    assert evaluate(-33)["eval_loss"] == pytest.approx(evaluate(IGNORE)["eval_loss"], rel=1e-6)


def test_rows_without_a_token_to_learn_are_dropped_and_counted(make_sft, tokenizer, capsys):
    """S11: the loss of such a row read 0."""
    collator = DataCollatorForCompletionOnlyLM("w11", tokenizer=tokenizer)
    trainer = make_sft(rows=rows_of(["w4 w11 w5", "w6 w7", "w8 w11 w9"]), data_collator=collator)
    assert len(trainer.train_dataset) == 2
    assert "1 of 3 rows of the training data set have no token to learn and are dropped" in capsys.readouterr().out
    assert len(make_sft(rows=rows_of(["w4", ""])).train_dataset) == 1  # an end alone is predicted from nothing


def test_the_end_is_learnt_where_pad_is_eos(make_sft, make_tokenizer):
    """S1, S2: of every row, once."""
    trainer = make_sft(tokenizer=make_tokenizer(pad_token="</s>"))
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert (batch["labels"] == EOS).sum(1).tolist() == [1] * 6
    assert batch["labels"].ne(IGNORE).equal(batch["attention_mask"].bool())


# ------------------------------------------------------------------------------------------------ the loss of a batch
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", CAUSAL)
def test_packed_documents_lose_what_they_lose_alone(arch, attention, make_sft):
    """S4: neither sees another, and each counts its positions from 0."""
    model = hf_model(arch, attn_implementation=attention)
    documents = [[4, 5, 6, EOS], [7, 8, EOS], [9, 20, 21, 22, EOS], [23, EOS], [24, 25, 26, 27, EOS]]
    trainer = make_sft(model, packing=True, rows=[{"input_ids": d} for d in documents], max_seq_length=12, dataset_kwargs={"keep_tail": True})
    model.eval()
    batch = trainer.data_collator(sorted(trainer.train_dataset, key=lambda row: -len(row["input_ids"])))
    assert batch["input_ids"].shape == (2, 12)                                          # 4 + 3 + 5 | 2 + 5
    total, count = nll_alone(model, documents)
    assert trainer.compute_loss(model, batch).item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("arch", CAUSAL + SEQ2SEQ)
def test_the_loss_is_the_mean_over_the_learnt_tokens_and_padding_counts_for_nothing(arch, make_sft):
    trainer = make_sft(arch, rows=PAIRS)
    model = trainer.model.eval()
    rows = list(trainer.train_dataset)
    total = count = 0
    for row in rows:
        one = trainer.data_collator([row])
        labels = one.pop("labels")
        with torch.no_grad():
            if arch in SEQ2SEQ:
                logits, targets = model(**one, labels=labels).logits, labels
            else:
                logits, targets = model(**one).logits[:, :-1], labels[:, 1:]
        total += F.cross_entropy(logits[0], targets[0], reduction="sum").item()
        count += (targets != IGNORE).sum().item()
    assert count == sum(len(pair["completion"].split()) + 1 for pair in PAIRS)
    batch = trainer.data_collator(rows)
    assert trainer.compute_loss(model, batch).item() == pytest.approx(total / count, rel=1e-5)
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert loss.item() == pytest.approx(total / count, rel=1e-5) and outputs.logits.shape[:2] == batch["labels"].shape
    ids, mask = batch["input_ids"], batch["attention_mask"]  # more padding, of any token, changes nothing
    wider = {"input_ids": F.pad(ids, (0, 3), value=77), "attention_mask": F.pad(mask, (0, 3)), "labels": F.pad(batch["labels"], (0, 3), value=IGNORE)}
    assert trainer.compute_loss(model, wider).item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("arch", CAUSAL)
def test_rows_end_to_end_lose_what_padded_rows_lose(arch, make_sft):
    trainer = make_sft(arch, rows=PAIRS)
    rows, model = list(trainer.train_dataset), trainer.model.eval()
    want = trainer.compute_loss(model, DataCollator(PAD)(rows)).item()
    assert trainer.compute_loss(model, DataCollator(PAD, flatten=True)(rows)).item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("arch", CAUSAL + SEQ2SEQ)
def test_every_architecture_learns(arch, make_sft):
    trainer = make_sft(arch, rows=PAIRS, eval_dataset=Dataset.from_list(PAIRS), max_steps=15, optim="adamw_torch", learning_rate=1e-2)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.7
    assert len(losses(trainer)) == 15


def test_label_smoothing_reaches_the_loss(make_sft):
    trainer = make_sft(label_smoothing_factor=0.2)
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        logits = trainer.model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = next_tokens(batch["labels"])
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.2)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(want.item(), rel=1e-5)


def test_a_mixture_of_experts_keeps_its_loads_even(make_sft):
    from transformers import MixtralConfig, MixtralForCausalLM
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1, "num_local_experts": 4, "max_position_embeddings": 64}
    model = MixtralForCausalLM(MixtralConfig(**sizes, output_router_logits=True, router_aux_loss_coef=0.5))
    trainer = make_sft(model, eval_dataset=rows_of(TEXTS), max_steps=1, per_device_train_batch_size=6)
    with torch.no_grad():
        outputs = model(**trainer.data_collator(list(trainer.train_dataset)))
    plain, aux = outputs.loss.item() - 0.5 * outputs.aux_loss.item(), outputs.aux_loss.item()
    assert aux > 0.5
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-5)  # nats per token, before any training
    trainer.train()
    assert losses(trainer) == pytest.approx([plain + 0.5 * aux], rel=1e-4)


# ------------------------------------------------------------------------------------------------ what Trainer gives
def trained(trainer):
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("arch", ["gpt2", "t5"])
def test_micro_batches_give_the_step_of_one_big_batch(arch, make_sft):
    rows = PAIRS + [{"prompt": "w4", "completion": "w5 " * 20}] * 2 + PAIRS[:2]  # of very unequal lengths
    whole = make_sft(arch, rows=rows, per_device_train_batch_size=8)
    parts = make_sft(arch, rows=rows, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    want, got = trained(whole), trained(parts)
    for name in got:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)


def test_evaluation_is_the_mean_over_tokens_whatever_the_batches(make_sft):
    documents = [[*map(int, text.replace("w", "").split()), EOS] for text in TEXTS]
    trainers = [make_sft(eval_dataset=rows_of(TEXTS), per_device_eval_batch_size=size) for size in (1, 2, 6)]
    total, count = nll_alone(trainers[0].model.eval(), documents)
    for trainer in trainers:
        assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_an_evaluation_with_metrics_has_the_same_loss(make_sft):
    told = [make_sft(eval_dataset=rows_of(TEXTS), per_device_eval_batch_size=2, compute_metrics=metrics).evaluate()["eval_loss"]
            for metrics in (None, lambda p: {})]
    assert told[0] == pytest.approx(told[1], rel=1e-6)


@pytest.mark.parametrize("streamed", [False, True], ids=["rows", "own packed data set"])
def test_a_run_that_is_resumed_goes_on_to_the_same_losses(streamed, make_sft, tokenizer):
    def make(**kwargs):
        rows = rows_of(TEXTS * 2)
        packed = ConstantLengthDataset(tokenizer, rows, "text", seq_length=8)
        return make_sft(train_dataset=packed if streamed else rows, optim="adamw_torch", learning_rate=1e-2, lr_scheduler_type="linear",
                        num_train_epochs=3, max_steps=-1, per_device_train_batch_size=3, save_strategy="steps", **kwargs)

    whole = make(save_steps=100)
    whole.train()
    steps = whole.state.global_step
    make(save_steps=steps - 2).train()                                                   # in the last epoch or before
    rest = make(save_steps=100)
    rest.train(resume_from_checkpoint=f"{rest.args.output_dir}/checkpoint-{steps - 2}")
    assert losses(rest) == losses(whole)
    for a, b in zip(whole.model.parameters(), rest.model.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_the_best_model_comes_back_at_the_end(make_sft):
    trainer = make_sft(rows=rows_of(["w4 w5 w6"]), eval_dataset=rows_of(["w4 w5 w7 w8"]), max_steps=8, learning_rate=0.5,
                       save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
    trainer.train()
    evals = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert min(evals) < evals[-1] and trainer.evaluate()["eval_loss"] == pytest.approx(min(evals), rel=1e-5)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_gradient_checkpointing_with_an_adapter_trains_the_same_adapter(arch, make_sft):
    from peft import LoraConfig

    def run(checkpointing):
        model = hf_model(arch)
        disable_dropout(model)
        torch.rand(3 + checkpointing)  # G2: the adapter is drawn by the arguments' seed, whatever was drawn before
        adapter = LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=arch == "gpt2", task_type="CAUSAL_LM")
        trainer = make_sft(model, peft_config=adapter, gradient_checkpointing=checkpointing, learning_rate=0.5)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        after = trained(trainer)
        assert {name for name in after if not torch.equal(after[name], before[name])} == {name for name in after if "lora_" in name}
        return after

    plain, checked = run(False), run(True)
    for name in plain:
        torch.testing.assert_close(plain[name], checked[name], rtol=1e-4, atol=1e-6)


def test_adapters_stay_float32_on_a_bfloat16_model(make_sft):
    """S20"""
    from peft import LoraConfig
    trainer = make_sft(hf_model("llama").to(torch.bfloat16), peft_config=LoraConfig(target_modules=["q_proj"]), bf16=True)
    trainer.train()
    assert {p.dtype for name, p in trainer.model.named_parameters() if "lora_" in name} == {torch.float32}
    assert all(math.isfinite(loss) for loss in losses(trainer))


def test_two_adapters_are_refused(make_sft):
    """S19"""
    from peft import LoraConfig, get_peft_model
    adapter = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(InputError, match="has an adapter already, and peft_config asks for another"):
        make_sft(get_peft_model(hf_model("llama"), adapter), peft_config=adapter)


def test_an_encoder_decoder_takes_an_adapter(make_sft):
    from peft import LoraConfig
    trainer = make_sft("t5", rows=PAIRS, peft_config=LoraConfig(target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"), learning_rate=0.5)
    trainer.train()
    assert any(p.abs().sum() > 0 for name, p in trainer.model.named_parameters() if "lora_B" in name)


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights_and_losses(make_sft):
    full, half = make_sft(), make_sft(bf16=True)
    full.train(), half.train()
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert losses(half) == pytest.approx(losses(full), rel=2e-2) and losses(half) != losses(full)


def test_a_loss_that_is_not_a_number_stops_the_run_and_leaves_the_last_checkpoint_good(make_sft):
    from transformers import TrainerCallback

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.transformer.wpe.weight.data.fill_(float("nan"))

    trainer = make_sft(max_steps=5, save_strategy="steps", save_steps=1, callbacks=[Poison()])
    with pytest.raises(InputError, match="the loss is nan after 2 optimizer steps.*from the last checkpoint"):
        trainer.train()
    model = AutoModelForCausalLM.from_pretrained(f"{trainer.args.output_dir}/checkpoint-2")
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_packed_row_without_an_answer_in_it_does_not_stop_the_run(make_sft, chat_tokenizer):
    """A long question may fill whole rows: nothing is learnt there, and that is no error."""
    question = " ".join(["w20"] * 30)
    chats = [{"messages": [user(question), assistant("w5 w6")]}] * 3
    trainer = make_sft(rows=chats, tokenizer=chat_tokenizer, packing=True, max_seq_length=8, per_device_train_batch_size=1,
                       max_steps=12, dataset_kwargs={"assistant_only_loss": True})
    trainer.train()
    assert trainer.state.global_step == 12 and all(math.isfinite(loss) for loss in losses(trainer))


def test_the_order_of_packed_rows_is_the_run_s_seed_s(make_sft):
    """S7"""
    read = lambda seed: ids(make_sft(rows=rows_of(TEXTS * 3), packing=True, max_seq_length=4, seed=seed).train_dataset)
    assert read(1) == read(1) != read(2)


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_the_main_rank_tokenises_before_the_others(packing, make_sft, monkeypatch):
    """S22: they then find its work in the cache."""
    told = []

    @contextmanager
    def first(self, *args, **kwargs):
        told.append("begin")
        yield
        told.append("end")

    monkeypatch.setattr(TrainingArguments, "main_process_first", first)
    name = "from_generator" if packing else "map"
    plain = getattr(Dataset, name)
    monkeypatch.setattr(Dataset, name, lambda *args, **kwargs: told.append("work") or plain(*args, **kwargs))
    make_sft(packing=packing, max_seq_length=8)
    assert told[0] == "begin" and told[-1] == "end" and set(told[1:-1]) == {"work"}  # a filter is a map too


# ------------------------------------------------------------------------------------------------ bad input
BAD = {
    "no such column": (dict(rows=[{"words": "w4"}]), r"columns \['words'\]: name the one that holds the text \(dataset_text_field\)"),
    "no such text field": (dict(rows=[{"text": "w4"}], dataset_text_field="body"), r"columns \['text'\].*none is called body"),
    "an empty data set": (dict(rows=Dataset.from_dict({"text": []})), r"the training data set is empty"),
    "an empty stream": (dict(rows=IterableDataset.from_generator(lambda: iter([]))), r"the training data set is empty"),
    "an empty evaluation set": (dict(eval_dataset=Dataset.from_dict({"text": []})), r"the evaluation data set is empty"),
    "an empty named evaluation set": (dict(eval_dataset={"held": Dataset.from_dict({"text": []})}), r"the held data set is empty"),
    "an empty data set to pack": (dict(rows=Dataset.from_dict({"text": []}), packing=True), r"the training data set is empty"),
    "nothing to learn": (dict(rows=[{"input_ids": [4, 5], "labels": [IGNORE, IGNORE]}]), r"no row of the training data set has a token to learn"),
    "prompts that fill max_seq_length": (dict(rows=PAIRS[2:3], max_seq_length=3), r"no row .* has a token to learn among its first 3"),
    "a row with one token": (dict(max_seq_length=1), r"max_seq_length=1: give 2 to 64"),
    "more than the model's positions": (dict(max_seq_length=65), r"max_seq_length=65: give 2 to 64"),
    "too little to pack": (dict(rows=rows_of(["w4"]), packing=True, max_seq_length=8), r"doesn't fill one row of max_seq_length=8"),
    "an encoder-decoder with texts": (dict(model="t5"), r"an encoder-decoder learns from rows of prompt and completion.*\['text'\]"),
    "an encoder-decoder packed": (dict(model="t5", rows=PAIRS, packing=True), r"position_ids, which T5ForConditionalGeneration doesn't take"),
    "a chat without template": (dict(rows=[{"messages": CHAT}]), r"can't be tokenised: .*chat_template"),
    "unknown dataset_kwargs": (dict(dataset_kwargs={"shuffel": True}), r"dataset_kwargs .*shuffel.*: it may hold add_special_tokens"),
    "model_init_kwargs for a model": (dict(model_init_kwargs={"dtype": "auto"}), r"model_init_kwargs are for loading a model by its name"),
    "an unknown model": (dict(model="./nowhere"), r"model ./nowhere can't be loaded"),
    "a text that is a number": (dict(rows=[{"text": 4}]), r"the training data set can't be tokenised"),
    "a text that is missing": (dict(rows=[{"text": "w4 w5"}, {"text": None}]), r"the training data set can't be tokenised"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case, make_sft):
    kwargs, sentence = BAD[case]
    with pytest.raises(InputError, match=sentence) as error:
        make_sft(**kwargs)
    assert "\n" not in str(error.value)


def test_a_template_that_no_row_holds_is_told_with_the_first_row(make_sft, tokenizer):
    with pytest.raises(InputError, match=r"no row of the training data set has a token to learn \(response_template 'w99'\).*w4 w5 w6"):
        make_sft(data_collator=DataCollatorForCompletionOnlyLM("w99", tokenizer=tokenizer))


def test_a_tokenizer_without_padding_pads_with_its_end_or_is_refused(tmp_path, make_args, make_tokenizer, make_sft):
    folder = tmp_path / "model"
    hf_model("gpt2").save_pretrained(folder)
    make_tokenizer(pad_token=None).save_pretrained(folder)
    trainer = SFTTrainer(str(folder), make_args(), train_dataset=rows_of(TEXTS))
    trainer.train()
    assert trainer.tokenizer.pad_token_id == EOS


def test_a_tokenizer_that_is_given_without_padding_is_no_worse(make_tokenizer, make_sft):
    given = make_tokenizer(pad_token=None)
    make_sft(tokenizer=given).train()
    assert given.pad_token is None  # the caller's stays as it is
    with pytest.raises(InputError, match="neither a pad token nor an end-of-sequence token"):
        make_sft(tokenizer=make_tokenizer(pad_token=None, eos_token=None))


def test_packing_and_a_collator_for_completions_are_refused_together(make_sft, tokenizer):
    with pytest.raises(InputError, match="packing goes with rows of prompt and completion, not with a collator for completions"):
        make_sft(packing=True, data_collator=DataCollatorForCompletionOnlyLM("w11", tokenizer=tokenizer))


def test_a_model_without_a_name_asks_for_its_tokenizer(make_args):
    with pytest.raises(InputError, match="pass tokenizer="):
        SFTTrainer(hf_model("gpt2"), make_args(), train_dataset=rows_of(TEXTS))


# ------------------------------------------------------------------------------------------------ the figures of TRL 0.7.10
RECORDED = json.loads(Path(__file__).with_name("recorded_sft.json").read_text())
cases = lambda part: pytest.mark.parametrize("case", RECORDED[part], ids=lambda case: case["name"])
AS_TEXT = {"one": lambda row: f"Q: {row['q']} A: {row['a']}",
           "many": lambda batch: [f"Q: {q} A: {a}" for q, a in zip(batch["q"], batch["a"])], None: None}


def recorded_tokenizer(name="causal"):
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    core = Tokenizer.from_str(json.dumps(RECORDED["tokenizers"][name]))
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=512, **tokens)


def recorded_model():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, n_positions=48, n_embd=32,
                                       n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    return fill(model, seed=11)


def without_shuffling(trainer):
    trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(trainer.train_dataset)
    return trainer


@cases("constant_length")
def test_packing_fills_the_recorded_rows(case):
    tokenizer = recorded_tokenizer(case.get("tokenizer", "causal"))
    for name, value in case.get("attrs", {}).items():
        setattr(tokenizer, name, value)
    rows = Dataset.from_list(case.get("rows", RECORDED["rows"]))
    packed = ConstantLengthDataset(tokenizer, rows, formatting_func=AS_TEXT[case.get("formatting")], **case["kwargs"])
    got = list(islice(packed, case.get("take")))
    assert ids(got) == case["input_ids"] == [row["labels"].tolist() for row in got]


@cases("completion")
def test_the_collator_for_completions_learns_the_recorded_tokens(case):
    tokenizer = recorded_tokenizer()
    rows = [{"input_ids": tokenizer(text).input_ids} for text in case["texts"]]
    batch = DataCollatorForCompletionOnlyLM(tokenizer=tokenizer, **case["kwargs"])(rows)
    assert batch["attention_mask"].sum(1).tolist() == case["lengths"] and batch["labels"].shape[1] == case["width"]
    for tokens, labels, learnt in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), case["learnt"], strict=True):
        nothing = (IGNORE, case["kwargs"].get("ignore_index"))
        assert [i for i, label in enumerate(labels) if label not in nothing] == learnt
        assert all(labels[i] == tokens[i] for i in learnt)


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
    parts = {"data_collator": DataCollatorForCompletionOnlyLM(tokenizer=tokenizer, **case["completion"])} if "completion" in case else {}
    settings = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 5, "learning_rate": 1e-3,
                "max_grad_norm": 1.0, "optim": "adamw_torch", "lr_scheduler_type": "linear", **case.get("args", {})}
    trainer = without_shuffling(make_sft(
        model, case["rows"], tokenizer=tokenizer, formatting_func=AS_TEXT[case.get("formatting")], **parts, **case["kwargs"], **settings,
        eval_dataset=Dataset.from_list(case["eval_rows"]) if "eval_rows" in case else None))
    trainer.train()
    assert losses(trainer) == pytest.approx(case["losses"], rel=1e-4)
    if "eval_rows" in case:
        assert trainer.evaluate()["eval_loss"] == pytest.approx(case["eval_loss"], rel=1e-4)
    told = changes(before, model)
    for name, (norm, product) in case["weights"].items():
        assert told[name] == pytest.approx([norm, product], abs=6e-3 * norm + 2e-7), name
