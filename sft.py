"""Supervised fine-tuning: a language model learns to write what it is shown.

The loss is the cross-entropy of each token y_t given those before it, over the tokens that are to be learnt (m_t = 1):

    L = - sum_t m_t log p(y_t | y_<t) / sum_t m_t

which is the maximum-likelihood estimate, in nats per token. Which tokens are learnt: all of a text and its end; of
prompt and completion, the completion; of a chat, every turn or (`assistant_only_loss`) those of the assistant.

Papers: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training"; Ouyang et al. 2022, "Training
language models to follow instructions with human feedback" (arXiv:2203.02155), whose first step this is; Jain et al. 2023,
"NEFTune" (arXiv:2310.05914), for `neftune_noise_alpha`.

Departures from TRL 0.7.10, whose names, arguments and numbers these are:
  1. Every text that was not cut ends in the end-of-sequence token, once, and learns it: padding is told from the
     attention mask, never from the token's number.
  2. Packed documents do not see each other, and each counts its positions from 0: the loss is that of separate rows.
     What is left at the end of a buffer goes on into the next; the order is drawn from the run's own seed.
  3. The mean is over the tokens of the whole optimizer step, however they fall into micro-batches and ranks, and over all
     tokens of an evaluation set.
  4. Rows may be text, prompt and completion, chats or token numbers, materialised or streamed.
  5. A row without a token to learn is dropped and counted; none left is an error.
  6. Logits are computed only where a token is learnt.

    torchrun sft.py                                        one process
    torchrun --nproc_per_node 8 sft.py --model-name my/model --dataset texts.jsonl --packing --bf16

With nothing but the first command a model that has never read a word learns to write film reviews, as well as anyone
could: see docs/sft.md.
"""
import copy
import json
import math
import random
from bisect import bisect_left, bisect_right
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, Optional

import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, ProgressCallback, Trainer, TrainingArguments

from common import (TOY, InputError, Journal, check_finite, explain, last_evaluation, load_language_model, load_rows,
                    load_tokenizer, label_logprobs, logprobs_from_logits, lora_config, only_logits_of, prepare_process, run, set_seed,
                    trainer_checkpoint, with_adapter, with_padding, writable_folder, write_model_card)

IGNORE = -100  # the label of a token that is not learnt


# ------------------------------------------------------------------------------------------------ configuration
@dataclass
class SFTConfig(TrainingArguments):
    """The script's flags: those of transformers.TrainingArguments, whose documentation holds, and these. The first are
    Trainer's own with other defaults."""

    output_dir: Optional[str] = "runs/sft"
    """Where the run's files go."""
    learning_rate: Optional[float] = None
    """AdamW's learning rate. None: 4e-3 x sqrt(1e5 / number of weights), which is 4e-3 for the toy model and 1.5e-5 for
    one of 7 billion."""
    per_device_train_batch_size: int = 32
    """Rows of one forward and backward pass, per process."""
    per_device_eval_batch_size: int = 64
    """Rows of one evaluation pass, per process."""
    num_train_epochs: float = 8
    """Passes over the data."""
    lr_scheduler_type: str = "cosine"
    """How the learning rate falls."""
    logging_steps: float = 20
    """Optimizer steps between two lines of metrics.jsonl."""
    eval_strategy: str = "epoch"
    """When to evaluate (no, steps, epoch), where there is an evaluation set."""
    report_to: Optional[str] = "none"
    """Trackers: tensorboard, wandb, ..., beside metrics.jsonl."""

    # the script's own
    model_name: Optional[str] = None
    """A hub name or a folder (a model, or a LoRA adapter). None: a toy model that has learnt nothing yet."""
    dataset: Optional[str] = None
    """A .jsonl/.json/.csv/.parquet/.txt file, a folder or a hub name, with a column text, messages (chat) or input_ids, or
    two of them, prompt and completion. None: the toy reviews."""
    eval_dataset: Optional[str] = None
    """The same, held out. None: the toy's test reviews with the toy's data, else no evaluation."""
    dataset_text_field: Optional[str] = None
    """The column that holds the text, where it has another name."""
    max_seq_length: Optional[int] = None
    """Rows are cut to their first tokens, so many. None: what the tokenizer and the model take, at most 1024."""
    packing: bool = False
    """Fill every row with several texts: no padding."""
    dataset_num_proc: Optional[int] = None
    """Processes that tokenise."""
    assistant_only_loss: bool = False
    """Of chats, learn only what the assistant says."""
    response_template: Optional[str] = None
    """Text before each answer: only what follows its last occurrence is learnt."""
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the weights. Weights that are trained want float32 (with --bf16); LoRA's base model may be bfloat16."""
    lora_r: int = 0
    """Rank of a fresh LoRA adapter on all linear layers. 0: train all weights."""
    lora_alpha: int = 16
    """LoRA's scale is lora_alpha / lora_r."""

    def __post_init__(self):
        if self.learning_rate is not None:
            self.learning_rate = float(self.learning_rate)
        super().__post_init__()


# ------------------------------------------------------------------------------------------------ data: rows -> tokens
def formatter(formatting_func, rows):
    """A user's function that writes texts -> a function of a batch {column: list} that returns a list of strings.

    It may take one row and return its text, or a batch and return a list; tried on `rows`, the first two."""
    rows = (list(rows) * 2)[:2]
    if not rows:
        return None
    batch = {name: [row[name] for row in rows] for name in rows[0]}
    try:
        texts = formatting_func(batch)
    except Exception:  # written for one row
        texts = None
    if isinstance(texts, list) and len(texts) == 2:
        return formatting_func

    def one(row):
        with explain(f"formatting_func failed on the row {row}"):
            text = formatting_func(row)
        text = text[0] if isinstance(text, list) and len(text) == 1 else text
        if not isinstance(text, str):
            raise InputError(f"formatting_func returned {type(text).__name__} for one row and no list of 2 for 2 rows: return "
                             "the text of a row, or a list with one text for each row of a batch")
        return text

    return lambda batch: [one(dict(zip(batch, values))) for values in zip(*batch.values())]


def is_chat(value):
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def chat_tokens(tokenizer, messages, assistant_only):
    """Messages through the tokenizer's template -> token numbers, labels. The template writes its own special tokens."""
    def ids(turns, **kwargs):
        return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, **kwargs)

    whole = ids(messages)
    labels = [IGNORE] * len(whole) if assistant_only else list(whole)
    for i, message in enumerate(messages):
        if assistant_only and message["role"] == "assistant":
            before, after = ids(messages[:i], add_generation_prompt=True), ids(messages[:i + 1])
            if whole[:len(after)] != after or after[:len(before)] != before:
                raise InputError("the chat template writes a turn differently when others follow, so the assistant's tokens "
                                 "can't be told apart: give rows of prompt and completion instead")
            labels[len(before):len(after)] = after[len(before):]
    return whole, labels


def encode(batch, tokenizer, field=None, texts_of=None, add_special_tokens=True, eos_token_id=None,
           assistant_only_loss=False, seq2seq=False):
    """A batch of rows {column: list} -> token numbers, and labels (None: all tokens are learnt), a list for each row.

    Rows, in this order: `texts_of` (a formatter), input_ids (and labels), prompt and completion, a chat or text in `field`,
    messages, text. eos_token_id ends what does not end in it already; None: nothing is added. seq2seq: the prompt is
    what the encoder reads, the labels are the completion."""
    def end(ids):
        return ids if eos_token_id is None or ids[-1:] == [eos_token_id] else ids + [eos_token_id]

    if texts_of is None and "input_ids" in batch:
        masks = batch.get("attention_mask") or [[1] * len(ids) for ids in batch["input_ids"]]
        kept = lambda name: [[x for x, m in zip(row, mask) if m] for row, mask in zip(batch[name], masks)]
        if seq2seq and "labels" in batch:  # the decoder's: as long as they are, whatever the encoder reads
            return kept("input_ids"), [list(row) for row in batch["labels"]]
        return kept("input_ids"), kept("labels") if "labels" in batch else None
    if texts_of is None and field is None and "prompt" in batch and "completion" in batch:
        rows = []
        for prompt, completion in zip(batch["prompt"], batch["completion"]):
            if is_chat(prompt):
                turns = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
                start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
                whole = tokenizer.apply_chat_template(prompt + turns, return_dict=False)
                if whole[:len(start)] != start:
                    raise InputError("the chat template writes a prompt differently when an answer follows: give rows of "
                                     "input_ids and labels instead")
                rows.append((start, whole[len(start):]))
            else:
                start = tokenizer(prompt, add_special_tokens=add_special_tokens).input_ids
                if not seq2seq and start[-1:] == [tokenizer.eos_token_id] and not prompt.endswith(tokenizer.eos_token):
                    start = start[:-1]  # some tokenizers end whatever they read
                rows.append((start, end(tokenizer(completion, add_special_tokens=False).input_ids)))
        if seq2seq:
            return [start for start, _ in rows], [answer for _, answer in rows]
        return [start + answer for start, answer in rows], [[IGNORE] * len(start) + answer for start, answer in rows]
    if seq2seq:
        raise InputError("an encoder-decoder learns from rows of prompt and completion, or of input_ids and labels; there are "
                         f"the columns {list(batch)}")
    texts = texts_of(batch) if texts_of else batch[column_of(batch, field)]
    if texts and is_chat(texts[0]):
        rows = [chat_tokens(tokenizer, messages, assistant_only_loss) for messages in texts]
        return [ids for ids, _ in rows], [labels for _, labels in rows] if assistant_only_loss else None
    ids = tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False).input_ids if texts else []
    return [end(row) for row in ids], None


def column_of(columns, field=None):
    """The column that holds texts or chats. Raises InputError."""
    for name in [field] if field else ["messages", "text"]:
        if name in columns:
            return name
    raise InputError(f"the data set has the columns {list(columns)}: " + (
        f"none is called {field} (dataset_text_field)" if field else
        "name the one that holds the text (dataset_text_field), or call it text, messages, prompt and completion, or input_ids"))


class ConstantLengthDataset(torch.utils.data.IterableDataset):
    """Rows of `seq_length` tokens, filled with one document after another -> {"input_ids", "labels", "position_ids"},
    LongTensors [seq_length].

    tokenizer, dataset: any of `encode`'s rows. dataset_text_field, formatting_func: where their texts come from.
    infinite: begin anew at the end, for ever. num_of_sequences, chars_per_token: so many rows' worth of characters are read
    before they are tokenised together. eos_token_id: ends documents where the tokenizer has none of its own.
    shuffle: the rows of a buffer come in random order, by `seed` and the number of the pass. append_concat_token: end every
    document (once). add_special_tokens: let the tokenizer add its own. keep_tail: what doesn't fill a last row comes too, as a
    shorter one; it is lost otherwise. assistant_only_loss: as in SFTConfig.

    position_ids count from 0 in each document, from which models tell documents apart; one that is cut goes on in the
    next row as a document of its own. The first token of a document has nothing to be predicted from, so the trainer
    leaves it out of the loss. len() is the number of rows; it tokenises everything once."""

    def __init__(self, tokenizer, dataset, dataset_text_field=None, formatting_func=None, infinite=False, seq_length=1024,
                 num_of_sequences=1024, chars_per_token=3.6, eos_token_id=0, shuffle=True, append_concat_token=True,
                 add_special_tokens=True, keep_tail=False, seed=0, assistant_only_loss=False):
        self.dataset, self.infinite, self.seq_length = dataset, infinite, seq_length
        self.max_buffer_size = seq_length * chars_per_token * num_of_sequences
        self.shuffle, self.keep_tail, self.seed, self.passes, self.length = shuffle, keep_tail, seed, 0, None
        end = eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self.encoding = {
            "tokenizer": tokenizer, "field": dataset_text_field, "add_special_tokens": add_special_tokens,
            "texts_of": formatting_func and formatter(formatting_func, islice(iter(dataset), 2)),
            "eos_token_id": end if append_concat_token else None, "assistant_only_loss": assistant_only_loss}

    def __len__(self):
        if self.infinite or not hasattr(self.dataset, "__len__"):
            raise TypeError("a data set without an end, or without a length, has no number of packed rows: set max_steps")
        if self.length is None:
            self.length = sum(1 for _ in self.rows(random.Random(0)))
        return self.length

    def buffers(self):
        """Lists of documents (token numbers, labels), a buffer of characters at a time."""
        rows, size = [], 0
        for row in self.dataset:
            rows.append(row)
            size += sum(len(str(value)) for value in row.values())
            if size >= self.max_buffer_size:
                yield self.encoded(rows)
                rows, size = [], 0
        if rows:
            yield self.encoded(rows)

    def encoded(self, rows):
        ids, labels = encode({name: [row[name] for row in rows] for name in rows[0]}, **self.encoding)
        return zip(ids, labels or ids)

    def rows(self, rng):
        """Lists of (token, label, whether a document begins with it), `seq_length` long."""
        left = []  # of the buffers so far, less than a row
        while True:
            for documents in self.buffers():
                left += [(*pair, i == 0) for ids, labels in documents for i, pair in enumerate(zip(ids, labels))]
                full = len(left) // self.seq_length * self.seq_length
                rows, left = [left[i:i + self.seq_length] for i in range(0, full, self.seq_length)], left[full:]
                if self.shuffle:
                    rng.shuffle(rows)
                yield from rows
            if not self.infinite:
                break
        if self.keep_tail and left:
            yield left

    def set_epoch(self, epoch):
        """Called by Trainer before each pass: a run that is resumed goes on in the order of the pass it was in."""
        self.passes = epoch

    def __iter__(self):
        rows = self.rows(random.Random(f"{self.seed}-{self.passes}"))
        self.passes += 1
        worker = torch.utils.data.get_worker_info()
        for row in islice(rows, worker.id, None, worker.num_workers) if worker else rows:
            ids, labels, begins = torch.tensor(row).T
            place = torch.arange(len(ids))
            yield {"input_ids": ids, "labels": labels, "position_ids": place - (place * begins).cummax(0).values}


# ------------------------------------------------------------------------------------------------ data: rows -> batches
class DataCollator:
    """Rows {"input_ids", "labels" (none: all are learnt), "position_ids" (packed rows)} -> a batch of LongTensors [B, T],
    padded on the right, where padding shifts no position, with labels of -100 for what is not learnt.

    flatten: all rows end to end in one, [1, sum of lengths], told apart by their positions: no padding at all. For flash
    attention, which needs no mask for it."""

    def __init__(self, pad_token_id, flatten=False):
        self.pad_token_id, self.flatten = pad_token_id, flatten

    def __call__(self, rows):
        columns = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORE, "position_ids": 0}
        rows = [self.complete(row) for row in rows]
        packed = self.flatten or "position_ids" in rows[0]
        batch = {}
        for name in columns:
            if name == ("attention_mask" if packed else "position_ids"):
                continue
            values = [torch.as_tensor(row[name]) for row in rows]
            batch[name] = torch.cat(values)[None] if self.flatten else pad_sequence(values, True, columns[name])
        return batch

    def complete(self, row):
        ids = row["input_ids"]
        row = {"labels": ids, "attention_mask": [1] * len(ids), **row}
        positions = torch.as_tensor(row["position_ids"]) if "position_ids" in row else None
        if positions is not None:
            row["labels"] = torch.as_tensor(row["labels"]).masked_fill(positions == 0, IGNORE)
        elif self.flatten:
            row["position_ids"] = torch.arange(len(ids))
            row["labels"] = torch.cat([torch.tensor([IGNORE]), torch.as_tensor(row["labels"])[1:]])
        return row


class Seq2SeqCollator:
    """Rows {"input_ids", "labels"} -> input_ids, attention_mask [B, S] for the encoder and labels [B, T] for the decoder."""

    def __init__(self, pad_token_id):
        self.pad_token_id = pad_token_id

    def __call__(self, rows):
        ids, labels = [[torch.as_tensor(row[name]) for row in rows] for name in ("input_ids", "labels")]
        return {"input_ids": pad_sequence(ids, True, self.pad_token_id), "labels": pad_sequence(labels, True, IGNORE),
                "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True, 0)}


class DataCollatorForCompletionOnlyLM:
    """Rows {"input_ids"} -> a batch whose labels are the answers alone.

    response_template: what stands before an answer, as text or token numbers. Without instruction_template, what follows
    the last response_template is learnt; with it (what stands before a question), all that lies between a response_template and
    the next instruction_template. ignore_index: the label of the rest. A row without the template has nothing to
    learn: the collator warns, SFTTrainer drops the row at the start. mlm: must be False."""

    def __init__(self, response_template, instruction_template=None, tokenizer=None, mlm=False, ignore_index=IGNORE):
        if mlm:
            raise InputError("mlm=True masks tokens at random, which is no task for completions: leave it out")
        if tokenizer is None:
            raise InputError("DataCollatorForCompletionOnlyLM needs the tokenizer: pass tokenizer=")
        self.tokenizer, self.ignore_index = tokenizer, ignore_index
        self.response_template, self.instruction_template = response_template, instruction_template

    def ends_of(self, template, ids):
        """Where in the row the template's occurrences begin and end -> [(begin, end)].

        As token numbers first. A tokenizer may write a text otherwise in the middle of a row than alone; where the row's text has it
        more often, that is searched, and the tokens that hold it are found by halving."""
        wanted = self.tokenizer(template, add_special_tokens=False).input_ids if isinstance(template, str) else list(template)
        n = len(wanted)
        found = [(i, i + n) for i in range(len(ids) - n + 1) if ids[i:i + n] == wanted]
        text = self.tokenizer.decode(ids) if isinstance(template, str) else ""
        if not isinstance(template, str) or text.count(template) <= len(found):
            return found
        length = lambda k: len(self.tokenizer.decode(ids[:k]))
        found, at = [], -1
        while (at := text.find(template, at + 1)) >= 0:
            begin = bisect_right(range(len(ids) + 1), at, key=length) - 1  # the token that holds its first letter
            found.append((begin, bisect_left(range(len(ids) + 1), at + len(template), key=length)))
        return found

    def learnt(self, ids):
        """Which of a row's tokens are learnt -> [(begin, end)]."""
        answers = [end for _, end in self.ends_of(self.response_template, ids)]
        if self.instruction_template is None:
            return [(answers[-1], len(ids))] if answers else []
        questions = [begin for begin, _ in self.ends_of(self.instruction_template, ids)]
        return [(answer, min((q for q in questions if q >= answer), default=len(ids))) for answer in answers]

    def labels(self, ids):
        labels = [self.ignore_index] * len(ids)
        for begin, end in self.learnt(ids):
            labels[begin:end] = ids[begin:end]
        return labels

    def __call__(self, rows):
        rows = [{"input_ids": list(row["input_ids"]), "labels": self.labels(list(row["input_ids"]))} for row in rows]
        for row in rows:
            if all(label == self.ignore_index for label in row["labels"]):
                print(f"response_template {self.response_template!r} is not in the row "
                      f"{self.tokenizer.decode(row['input_ids'])!r}: nothing of it is learnt")
        return DataCollator(self.tokenizer.pad_token_id)(rows)


def tokenize(batch, max_length, completions=None, **encoding):
    """A batch of rows -> their tokens, cut to max_length; completions: the collator that tells which are learnt."""
    ids, labels = encode(batch, **encoding)
    rows = {"input_ids": [row[:max_length] for row in ids]}
    rows["attention_mask"] = [[1] * len(row) for row in rows["input_ids"]]
    if completions:
        labels = [[IGNORE if label == completions.ignore_index else label for label in completions.labels(row)]
                  for row in rows["input_ids"]]
    return {**rows, "labels": [row[:max_length] for row in labels]} if labels else rows


def teaches(row, first=1):
    """Whether a token of the row is learnt. A causal model's first has nothing to be predicted from."""
    return any(label != IGNORE for label in row.get("labels", row["input_ids"])[first:])


# ------------------------------------------------------------------------------------------------ the mathematics
def next_tokens(labels):
    """labels [B, T] -> what each position is to predict [B, T]: the label after it, and nothing at the end."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def cross_entropy(logits, targets, label_smoothing=0.0):
    """logits [N, V], targets [N] -> -log p(target) [N] in nats; with smoothing eps, the target's share of the probability
    is 1 - eps, and eps is spread over the whole vocabulary (Szegedy et al. 2015)."""
    if not label_smoothing:
        return -label_logprobs(logits, targets)
    logp = logprobs_from_logits(logits, targets, gather=False)
    return -(1 - label_smoothing) * logp.gather(-1, targets[:, None])[:, 0] - label_smoothing * logp.mean(-1)


# ------------------------------------------------------------------------------------------------ the trainer
class SFTTrainer(Trainer):
    """transformers.Trainer for the loss above. Its arguments are Trainer's, and these:

    model: a model, or the name or folder of a causal one, which is then loaded with `model_init_kwargs`.
    args: TrainingArguments; None: their defaults. The trainer changes none of what it is given.
    tokenizer (or processing_class): None: the model's own.
    train_dataset, eval_dataset (or a dict of them): rows as `encode` reads them, materialised or streamed; a
        ConstantLengthDataset; or a torch Dataset of finished rows.
    peft_config: puts a fresh adapter on the model.
    dataset_text_field, formatting_func: where the text of a row is; see `formatter`.
    max_seq_length: rows are cut to their first tokens, so many. None: what tokenizer and model take, at most 1024.
    packing: fill rows of max_seq_length with several documents of train_dataset (evaluation keeps one a row);
        `infinite`, `num_of_sequences`, `chars_per_token` are ConstantLengthDataset's.
    dataset_num_proc, dataset_batch_size: processes that tokenise, and rows at once (0, None: all). Main rank first.
    neftune_noise_alpha: noise on the embeddings in training.
    dataset_kwargs: add_special_tokens (the tokenizer adds its own), append_concat_token (end each text), assistant_only_loss,
        keep_tail (of packing: the last row, if it is not full).
    data_collator: None: DataCollator, or Seq2SeqCollator for an encoder-decoder. Of a DataCollatorForCompletionOnlyLM, the
        labels are made once, at the start.

    Raises InputError for what can't be trained on, before the first step."""

    def __init__(self, model=None, args=None, data_collator=None, train_dataset=None, eval_dataset=None, tokenizer=None,
                 model_init=None, compute_metrics=None, callbacks=None, optimizers=(None, None),
                 preprocess_logits_for_metrics=None, peft_config=None, dataset_text_field=None, packing=False,
                 formatting_func=None, max_seq_length=None, infinite=None, num_of_sequences=1024, chars_per_token=3.6,
                 dataset_num_proc=None, dataset_batch_size=1000, neftune_noise_alpha=None, model_init_kwargs=None,
                 dataset_kwargs=None, processing_class=None):
        args = copy.copy(args) if args is not None else TrainingArguments()
        if neftune_noise_alpha is not None:
            args.neftune_noise_alpha = neftune_noise_alpha
        if isinstance(model, str):
            name = model
            with explain(f"model {name} can't be loaded"):
                model = AutoModelForCausalLM.from_pretrained(name, **(model_init_kwargs or {}))
        elif model_init_kwargs:
            raise InputError("model_init_kwargs are for loading a model by its name, and `model` is one already")
        if isinstance(train_dataset, IterableDataset) or isinstance(eval_dataset, IterableDataset):
            args.accelerator_config = copy.copy(args.accelerator_config)
            args.accelerator_config.dispatch_batches = False  # each rank reads the stream itself: rows differ in length
        if peft_config is not None and model is not None:
            model = with_adapter(model, peft_config, args.seed)
        elif peft_config is not None:
            plain = model_init
            model_init = lambda: with_adapter(plain(), peft_config, args.seed)
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, callbacks=callbacks,
                         model_init=model_init, compute_metrics=compute_metrics, optimizers=optimizers,
                         processing_class=tokenizer or processing_class or self.tokenizer_of(model),
                         preprocess_logits_for_metrics=preprocess_logits_for_metrics)
        prepare_process(self.args)
        self.tokenizer = self.processing_class = with_padding(self.processing_class)
        self.seq2seq = self.model.config.is_encoder_decoder
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the tokens of the whole step
        self._loss_shifts_labels = not self.seq2seq  # how Trainer counts them
        self.seen = torch.zeros(2)  # sum of the losses and number of tokens of the evaluation that is under way
        options = {"add_special_tokens": True, "append_concat_token": True, "assistant_only_loss": False, "keep_tail": False,
                   **(dataset_kwargs or {})}
        if len(options) > 4:
            raise InputError(f"dataset_kwargs {dataset_kwargs}: it may hold {', '.join(list(options)[:4])}")
        self.max_seq_length = self.longest_row(max_seq_length)
        self.encoding = {"tokenizer": self.tokenizer, "field": dataset_text_field, "seq2seq": self.seq2seq,
                         "add_special_tokens": options["add_special_tokens"],
                         "assistant_only_loss": options["assistant_only_loss"],
                         "eos_token_id": self.tokenizer.eos_token_id if options["append_concat_token"] else None}
        self.completions = data_collator if isinstance(data_collator, DataCollatorForCompletionOnlyLM) else None
        flash = "flash" in str(getattr(self.model.config, "_attn_implementation", ""))
        if data_collator is None or self.completions:
            pad = self.tokenizer.pad_token_id
            data_collator = Seq2SeqCollator(pad) if self.seq2seq else DataCollator(pad, flatten=flash)
        self.data_collator = data_collator
        self.how = how = {"formatting_func": formatting_func, "num_proc": dataset_num_proc,
                          "batch_size": dataset_batch_size or None}
        if packing:
            self.train_dataset = self.pack(train_dataset, options, infinite=bool(infinite), num_of_sequences=num_of_sequences,
                                           chars_per_token=chars_per_token, formatting_func=formatting_func)
        else:
            self.train_dataset = self.prepare(train_dataset, "training", **how)
        if isinstance(eval_dataset, dict):
            self.eval_dataset = {name: self.prepare(rows, name, **how) for name, rows in eval_dataset.items()}
        else:
            self.eval_dataset = self.prepare(eval_dataset, "evaluation", **how)

    @staticmethod
    def tokenizer_of(model):
        if model is None or not model.config.name_or_path:
            raise InputError("the model doesn't say where its tokenizer is: pass tokenizer=")
        return load_tokenizer(model.config.name_or_path)

    def longest_row(self, asked):
        """max_seq_length, or what tokenizer and model take, at most 1024. Raises InputError where the model takes less."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        limit = positions if positions and not self.seq2seq else 10**9
        if asked is not None and not 1 < asked <= limit:
            raise InputError(f"max_seq_length={asked}: give 2 to {limit}, the positions that the model has")
        return asked or min(self.tokenizer.model_max_length, limit, 1024)

    def prepare(self, rows, name, formatting_func, num_proc, batch_size):
        """Rows of text, chat or tokens -> rows of tokens, one for each. Anything but a datasets.Dataset stays as it is."""
        if not isinstance(rows, (Dataset, IterableDataset)):
            return rows
        first = list(islice(iter(rows), 2))
        if not first:
            raise InputError(f"the {name} data set is empty")
        if "position_ids" in first[0]:
            return rows  # packed already
        formatting_func = None if "input_ids" in first[0] else formatting_func
        lazy = isinstance(rows, IterableDataset)
        processes = {} if lazy else {"num_proc": num_proc}
        encoding = {**self.encoding, "texts_of": formatting_func and formatter(formatting_func, first),
                    "max_length": self.max_seq_length, "completions": self.completions}
        with self.args.main_process_first(), explain(f"the {name} data set can't be tokenised"):
            tokens = rows.map(tokenize, batched=True, batch_size=batch_size, remove_columns=list(first[0]), fn_kwargs=encoding,
                              **processes)
            kept = tokens.filter(teaches, fn_kwargs={"first": 0 if self.seq2seq else 1}, **processes)
        if not lazy and len(kept) < len(tokens):
            if not len(kept):
                template = f" (response_template {self.completions.response_template!r})" if self.completions else ""
                raise InputError(f"no row of the {name} data set has a token to learn{template} among its first "
                                 f"{self.max_seq_length} (max_seq_length); the first row is {first[0]}")
            if self.is_world_process_zero():
                print(f"{len(tokens) - len(kept)} of {len(tokens)} rows of the {name} data set have no token to learn and are "
                      "dropped")
        return kept

    def pack(self, rows, options, infinite, formatting_func, **sizes):
        """Rows -> packed rows: a stream where the rows are one or have no end, else a data set of its own."""
        if not isinstance(rows, (Dataset, IterableDataset)):
            return rows
        self._set_signature_columns_if_needed()
        if self.completions or "position_ids" not in self._signature_columns:
            why = "goes with rows of prompt and completion, not with a collator for completions" if self.completions else (
                f"keeps documents apart by position_ids, which {type(self.model).__name__} doesn't take")
            raise InputError(f"packing {why}")
        if next(iter(rows), None) is None:
            raise InputError("the training data set is empty")
        packed = ConstantLengthDataset(
            self.tokenizer, rows, self.encoding["field"], formatting_func, infinite, self.max_seq_length,
            eos_token_id=None, seed=self.args.seed, **sizes, **options)
        if infinite or isinstance(rows, IterableDataset):
            return packed
        with self.args.main_process_first(), explain("the training data set can't be packed"):
            fingerprint = Hasher.hash((rows._fingerprint, {k: v for k, v in vars(packed).items() if k != "dataset"}))
            kept = Dataset.from_generator(packed.__iter__, fingerprint=fingerprint) if next(iter(packed), None) else []
        if not len(kept):
            raise InputError(f"the training data set doesn't fill one row of max_seq_length={self.max_seq_length} tokens: give more "
                             "text, a smaller max_seq_length, or dataset_kwargs={'keep_tail': True}")
        if not any(map(teaches, kept)):
            raise InputError("no packed row has a token to learn: look at the labels, or at the roles of the chats (assistant)")
        return kept

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean cross-entropy over the tokens that are learnt: of the whole optimizer step on all ranks where their number
        is given (num_items_in_batch), else of these. With return_outputs the logits are all computed."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        plain = self.accelerator.unwrap_model(model)
        if self.seq2seq:
            inputs["decoder_input_ids"] = plain.prepare_decoder_input_ids_from_labels(labels)  # shifted right
        targets = labels if self.seq2seq else next_tokens(labels)                       # [B, T]
        learnt = targets != IGNORE                                                      # m_t
        with nullcontext() if return_outputs else only_logits_of(plain, learnt):
            outputs = model(**inputs)
        logits = outputs.logits[learnt] if return_outputs else outputs.logits           # [N, V]
        nll = cross_entropy(logits, targets[learnt], self.args.label_smoothing_factor)  # [N]
        if not model.training:
            rows = nll.new_zeros(len(learnt)).index_add(0, learnt.nonzero()[:, 0], nll.detach())
            both = torch.stack([rows, learnt.sum(1).to(rows)], 1)
            self.seen = self.seen.to(nll.device) + self.accelerator.gather_for_metrics(both).sum(0)  # no row twice
        tokens = max(len(nll) if num_items_in_batch is None else num_items_in_batch, 1)
        loss = nll.sum() / tokens
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the mean over ranks, which is to come, divides by it
        if model.training and outputs.get("aux_loss") is not None:  # of a mixture of experts: keeps their loads even
            loss = loss + plain.config.router_aux_loss_coef * outputs.aux_loss / self.current_gradient_accumulation_steps
        if model.training:
            check_finite(loss, self.state.global_step)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Trainer's, but where only the loss is wanted, only the logits that it needs are computed."""
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        """Trainer's, of rows as the constructor takes them too."""
        if isinstance(eval_dataset, (Dataset, IterableDataset)):
            eval_dataset = self.prepare(eval_dataset, "evaluation", **self.how)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """Trainer's; its loss is the mean over all tokens of all ranks, not over batches."""
        self.seen = torch.zeros(2)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, tokens = self.seen.tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(tokens, 1)
        return output


# ------------------------------------------------------------------------------------------------ the script
def show_samples(trainer, rows, title, out):
    """Prints and keeps how the model goes on after the beginnings of a few rows. Not of sharded weights: one rank alone
    can't run them."""
    if not trainer.is_world_process_zero() or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    trainer.model.eval()
    pairs = [continued(trainer, row) for row in rows]
    print("\n".join([f"\n{title}", *(f"  {prompt} |{answer}" for prompt, answer in pairs)]))
    with out.joinpath("samples.jsonl").open("a") as file:
        for prompt, answer in pairs:
            file.write(json.dumps({"update": trainer.state.global_step, "prompt": prompt, "completion": answer}) + "\n")


def continued(trainer, row):
    """What is given of a row, the prompt or the first tokens, and how the model goes on: two texts."""
    tokenizer, model = trainer.tokenizer, trainer.model
    labels = row.get("labels", row["input_ids"])
    begin = len(row["input_ids"]) if trainer.seq2seq else next(i for i, label in enumerate(labels) if label != IGNORE)
    room = getattr(model.config, "max_position_embeddings", None) or 10**9
    prompt = torch.tensor([row["input_ids"][:max(begin, 3)][-max(room - 40, 1):]], device=model.device)
    never = [tokenizer.pad_token_id] if tokenizer.pad_token_id != tokenizer.eos_token_id else None
    answer = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=True, top_k=0,
                            pad_token_id=tokenizer.pad_token_id, suppress_tokens=never)[0]
    answer = answer if trainer.seq2seq else answer[prompt.shape[1]:]
    return tuple(tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt[0], answer))


def main(config: SFTConfig):
    """Fine-tune a language model on texts, completions or chats. Returns the metrics of the last evaluation."""
    out = Path(config.output_dir)
    checkpoint = config.resume_from_checkpoint and trainer_checkpoint(config.resume_from_checkpoint)
    writable_folder(out, fresh=not checkpoint)
    set_seed(config.seed)
    tokenizer, model = load_language_model(config.model_name or str(TOY / "blank"), config.torch_dtype)
    weights = model.num_parameters()
    if weights < 10**6:
        torch.set_num_threads(1)  # handing out such small products to threads takes longer than they do
    if config.learning_rate is None:
        config.learning_rate = 4e-3 * math.sqrt(1e5 / weights)  # smaller models take larger steps
    rows = load_rows(config.dataset or TOY / "reviews.jsonl")
    held_out = config.eval_dataset or (None if config.dataset else TOY / "reviews_test.jsonl")
    if held_out is None:
        config.eval_strategy = "no"
    template = config.response_template
    trainer = SFTTrainer(
        model, config, DataCollatorForCompletionOnlyLM(template, tokenizer=tokenizer) if template else None, rows,
        held_out and load_rows(held_out), tokenizer, callbacks=[Journal(out)],
        peft_config=lora_config(config, "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"),
        dataset_text_field=config.dataset_text_field, packing=config.packing, max_seq_length=config.max_seq_length,
        dataset_num_proc=config.dataset_num_proc,
        dataset_kwargs={"assistant_only_loss": config.assistant_only_loss, "keep_tail": config.packing})
    trainer.remove_callback(ProgressCallback)  # the Journal has a bar
    shown = list(islice(trainer.eval_dataset or trainer.train_dataset, 5))
    if not checkpoint:
        show_samples(trainer, shown, "before training", out)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if held_out:
        metrics = last_evaluation(trainer)
    show_samples(trainer, shown, "after training", out)
    trainer.save_model(str(out))
    if trainer.is_world_process_zero():
        write_model_card(out, "A language model fine-tuned on texts", config, {"texts": config.dataset or "toy/reviews.jsonl"}, metrics)
    return metrics


if __name__ == "__main__":
    run(main, SFTConfig)
