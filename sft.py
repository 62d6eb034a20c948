"""Supervised fine-tuning of a language model (SFT).

Papers: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", the
loss; Ouyang et al. 2022, "Training Language Models to Follow Instructions with Human Feedback"
(arXiv:2203.02155), whose first step this is; Jain et al. 2023, "NEFTune" (arXiv:2310.05914).

The model predicts each token y_t from the tokens before it. The loss is the mean negative
log-likelihood, in nats per token, over the tokens in the loss, whose mask m_t is 1:

    L = - sum_t m_t log p(y_t | y_<t) / sum_t m_t

    a row                         its tokens in the loss
    a text                        every token after the first, the end token included
    a prompt and its completion   the completion, its end token included
    a chat                        all turns; with `assistant_only_loss` the assistant's turns

With `--neftune-noise-alpha`, Trainer adds noise to the embeddings in training (T tokens, padding
included, of D dimensions; Jain et al. 2023, algorithm 1):

    embeddings + U(-1, 1) alpha / sqrt(T D)

Start reading at the loop in the docstring of `SFTTrainer`, which Trainer runs; then `compute_loss`,
its five numbered steps. Part 1 is the algorithm, Part 2 the machinery around it.

The API, defaults and metrics follow TRL 0.7.10. Differences:
  1. A text that is not truncated ends with one end token, and the end token is in the loss.
     Padding is known from a row's length, never from the token id.
  2. Packed documents do not see each other: positions restart at 0, so the loss is that of separate
     rows. A model that cannot keep documents apart is refused.
  3. The mean is over the tokens of the whole optimizer step, however they are split into
     micro-batches and ranks (unless average_tokens_across_devices is False). `eval_loss` is the
     mean over all tokens of the evaluation set, label smoothing included.
  4. Rows are texts, prompts with completions, chats or token ids, in memory or streamed.
  5. Rows without a token in the loss are dropped, and counted unless they are streamed or packed.
     It is an error if no row is left.
  6. Logits are computed only for the tokens in the loss.
  7. A prompt and its completion in plain text do not go through the tokenizer's chat template; in
     0.7.10 they do. Give chats to use it.
  8. DataCollatorForCompletionOnlyLM pads on the tokenizer's side, but in SFTTrainer on the right.

    torchrun sft.py                                        one process, the toy model
    torchrun --nproc_per_node 8 sft.py --model-name my/model --dataset texts.jsonl --packing --bf16
"""
import copy
import random
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal, Optional

import numpy as np
import pyarrow.compute
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from torch.nn.utils.rnn import pad_sequence
from transformers import ProgressCallback, Trainer, TrainingArguments

import chats
import common
import machinery
from chats import is_chat, join_chat, same_messages, split_chat, tokenize_chat
from common import TOY, InputError, check_finite, explain, number_of_positions, only_logits_of

IGNORE = -100  # the label of a token that is not in the loss
RATE_OF_TOY_MODEL = 4e-3  # learning rate of a model with 100,000 parameters
SLICE = 256  # tokens whose cross-entropy is computed at a time


# =============================================================================
# Part 1, the algorithm: configuration, mathematics, the update
# =============================================================================

# ----------------------------------------------------------------------------- configuration
@dataclass
class SFTConfig(machinery.TrainerFlags, machinery.LoadingFlags, machinery.SFTArguments,
                TrainingArguments):
    """Extend transformers.TrainingArguments: some defaults differ, and the script has its own."""

    output_dir: Optional[str] = "runs/sft"
    """Output folder."""
    learning_rate: Optional[float] = None
    """AdamW's learning rate. None: 4e-3 x sqrt(1e5 / number of parameters); LoRA: x 10."""
    per_device_train_batch_size: int = 2
    """Rows per forward and backward pass, per process. Toy model: 32."""
    per_device_eval_batch_size: int = 8
    """Rows per evaluation pass, per process. Toy model: 64."""
    num_train_epochs: float = 2
    """Passes over the data. Toy model: 8."""
    lr_scheduler_type: str = "cosine"
    """Schedule of the learning rate."""
    logging_steps: float = 20
    """Optimizer steps between two lines of metrics.jsonl."""
    eval_strategy: str = "epoch"
    """When to evaluate: no, steps or epoch. Without an evaluation set: no."""
    report_to: Optional[str] = "none"
    """Trackers in addition to metrics.jsonl: tensorboard, wandb, ..."""

    # the script's own
    model_name: Optional[str] = None
    """Hub name or folder of a model or a LoRA adapter. None: a toy model, not yet trained."""
    dataset: Optional[str] = None
    """Rows to train on: a file, a folder or a hub name. None: the toy reviews."""
    eval_dataset: Optional[str] = None
    """Rows to evaluate on. None: the toy's test reviews for the toy reviews, else none."""
    dataset_text_field: Optional[str] = None
    """Column that holds the text or chat. None: messages, text or conversations."""
    max_seq_length: Optional[int] = None
    """Truncate rows to this many tokens. None: what tokenizer and model take, at most 1024."""
    packing: bool = False
    """Fill each row with several texts, without padding."""
    keep_tail: bool = True
    """With packing: keep the last row, which may be shorter."""
    dataset_num_proc: Optional[int] = None
    """Processes that tokenize. None: one."""
    assistant_only_loss: bool = False
    """In chats only the assistant's turns are in the loss."""
    response_template: Optional[str] = None
    """Text before the completion: only what follows its last occurrence is in the loss."""
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the parameters; the script loads LoRA's base model in bfloat16."""
    lora_r: int = 0
    """Rank of a fresh LoRA adapter on all linear layers. 0: train all parameters."""
    lora_alpha: int = 16
    """LoRA scale is lora_alpha / lora_r."""

    def __post_init__(self):
        if self.learning_rate is not None:  # a JSON or YAML file may hold "2e-4", a text
            self.learning_rate = float(self.learning_rate)
        machinery.check_ranges(self, {
            "(0, inf)": ("per_device_train_batch_size", "per_device_eval_batch_size",
                         "num_train_epochs", "gradient_accumulation_steps", "logging_steps",
                         "dataset_num_proc", "lora_alpha"),
            "[0, inf)": ("learning_rate", "weight_decay", "max_grad_norm", "lora_r"),
            "(1, inf)": ("max_seq_length",),
            "[0, 1)": ("label_smoothing_factor",),
        })
        machinery.check_choices(self, {"torch_dtype": machinery.DTYPES})
        if self.response_template and self.assistant_only_loss:
            raise InputError(f"response_template={self.response_template!r}: assistant_only_loss "
                             "chooses the tokens in the loss too; give one of them")
        super().__post_init__()


# ----------------------------------------------------------------------------- mathematics
# Letters in shapes: B rows, T tokens of the longest row, N tokens in the loss, V entries of the
# vocabulary, T' tokens of an encoder-decoder's longest completion.
def next_tokens(labels):
    """Shift labels [B, T] by one: each position's target is the next label, the last has none."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def cross_entropy(logits, targets, label_smoothing=0.0):
    """Compute the cross-entropy [N] in float32 (nats) from logits [N, V] and targets [N].

    It is -log p(target), unless label_smoothing spreads this fraction of the target's probability
    over the vocabulary (Szegedy et al. 2015)."""
    # in slices: only one slice at a time is copied to float32, next to its float32 log-softmax
    slices = zip(logits.split(SLICE), targets.split(SLICE), strict=True)
    return torch.cat([
        F.cross_entropy(z.float(), y, reduction="none", label_smoothing=label_smoothing)
        for z, y in slices])


# ----------------------------------------------------------------------------- the update
class SFTTrainer(machinery.TokenMeanEvaluation, machinery.ShardedTrainer, Trainer):
    """Minimize the loss above with transformers.Trainer.

        trainer = SFTTrainer(model, SFTConfig(output_dir="out"), train_dataset=rows,
                             tokenizer=tokenizer)
        trainer.train()

    For each optimizer step, Trainer.train does

        micro_batches, tokens = get_batch_samples(...)
        for micro_batch in micro_batches:
            compute_loss(model, micro_batch, num_items_in_batch=tokens).backward()
        clip the gradient, optimizer.step(), lr_scheduler.step(), optimizer.zero_grad()
    """

    loss_is_scaled_for_ga = True  # Trainer must not divide by the number of micro-batches

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of one optimizer step, and its number of tokens in the loss."""
        batches = list(islice(epoch_iterator, num_batches))
        tokens = torch.zeros((), dtype=torch.long, device=device)
        for batch in batches:
            tokens += (self.targets_of(batch["labels"]) != IGNORE).sum().to(device)
        if self.args.average_tokens_across_devices:
            tokens = self.accelerator.reduce(tokens, "sum")
        return batches, tokens

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss of one micro-batch of rows that are padded on the right.

        inputs: input_ids, attention_mask (packed rows: position_ids instead) and labels, [B, T]
            each; an encoder-decoder's labels [B, T']. A label is the token id, or IGNORE where the
            token is not in the loss.
        num_items_in_batch: tokens in the loss of the whole optimizer step, on all ranks. None:
            those of this micro-batch.
        return_outputs: also return the model's outputs, with all logits [B, T, V].
        Raises InputError if the loss is not finite."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        language_model = self.accelerator.unwrap_model(model)

        # 1. Targets [B, T]: each position predicts the next token
        targets = self.targets_of(labels)
        loss_mask = targets != IGNORE                                # m_{t+1} at position t
        if self.seq2seq:  # the decoder reads the labels, shifted to the right
            inputs["decoder_input_ids"] = (
                language_model.prepare_decoder_input_ids_from_labels(labels))

        # 2. Forward pass: logits [N, V] of the N positions in the loss. The output layer runs at
        #    these alone, unless the caller wants the outputs, with all logits
        selection = nullcontext() if return_outputs else only_logits_of(language_model, loss_mask)
        with selection:
            outputs = model(**inputs, use_cache=False)
        logits = outputs.logits
        if return_outputs:  # prompt tuning puts virtual tokens before those of the text
            logits = logits[:, -targets.shape[1]:][loss_mask]

        # 3. Loss of each token [N]: its negative log-likelihood, smoothed if asked. eval_loss is
        #    the mean of these
        nll = cross_entropy(logits, targets[loss_mask], self.args.label_smoothing_factor)

        # 4. Mean over the tokens of the optimizer step, whatever micro-batch they are in. To try
        #    another loss per token, replace nll here
        tokens = len(nll) if num_items_in_batch is None else num_items_in_batch
        loss = nll.sum() / max(tokens, 1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages the ranks' gradients

        # 5. Add a mixture of experts' loss that balances their load: its mean over micro-batches
        if model.training and outputs.get("aux_loss") is not None:
            weight = language_model.config.router_aux_loss_coef
            loss = loss + weight * outputs.aux_loss / self.current_gradient_accumulation_steps

        # Stop at a loss that is not finite; add an evaluation's losses to its mean
        if model.training:
            check_finite(loss, self.state.global_step)
        else:
            self.add_to_evaluation(nll, loss_mask)
        return (loss, outputs) if return_outputs else loss

    def targets_of(self, labels):
        """Return what each position predicts [B, T]; in an encoder-decoder, the labels [B, T']."""
        return labels if self.seq2seq else next_tokens(labels)

    # =========================================================================
    # Part 2, the machinery: nothing below is needed to understand the algorithm.
    # =========================================================================

    def __init__(self, model=None, args=None, data_collator=None, train_dataset=None,
                 eval_dataset=None, tokenizer=None, model_init=None, compute_metrics=None,
                 callbacks=None, optimizers=(None, None), preprocess_logits_for_metrics=None,
                 peft_config=None, dataset_text_field=None, packing=False, formatting_func=None,
                 max_seq_length=None, infinite=None, num_of_sequences=1024, chars_per_token=3.6,
                 dataset_num_proc=None, dataset_batch_size=1000, neftune_noise_alpha=None,
                 model_init_kwargs=None, dataset_kwargs=None, processing_class=None):
        """Prepare model and data. Raises InputError for what cannot be trained on.

        model: a model, or its hub name or folder, loaded with model_init_kwargs.
        args: an SFTConfig or TrainingArguments. An argument given here wins over its field.
        train_dataset, eval_dataset (or a dict of them): rows that `encode` reads, in memory or
            streamed; a ConstantLengthDataset; or a torch Dataset of rows of token ids.
        data_collator: None: `collate`. A DataCollatorForCompletionOnlyLM labels the rows.
        tokenizer (or processing_class): None: the model's own. peft_config: of a fresh adapter.
        formatting_func: makes the rows' texts, see `text_maker`.
        packing: fill rows with train_dataset's documents; evaluation keeps one per row.
        infinite, num_of_sequences, chars_per_token: see ConstantLengthDataset.
        dataset_batch_size: rows passed to formatting_func at once; 0, None: all.
        dataset_kwargs: add_special_tokens, append_concat_token (end each text), keep_tail (of
            packing: the last row, which is shorter), assistant_only_loss."""
        # the arguments, with the config's fields
        args = prepare_args(args, eval_dataset)
        machinery.prepare_process(args)
        machinery.check_split(train_dataset)
        settings = machinery.read_settings(
            SFTTrainer, args, dataset_text_field=dataset_text_field, packing=packing,
            max_seq_length=max_seq_length or getattr(args, "max_length", None),
            dataset_num_proc=dataset_num_proc, neftune_noise_alpha=neftune_noise_alpha,
            model_init_kwargs=model_init_kwargs, dataset_kwargs=dataset_kwargs,
            dataset_batch_size=dataset_batch_size, num_of_sequences=num_of_sequences,
            chars_per_token=chars_per_token)
        args.neftune_noise_alpha = settings["neftune_noise_alpha"]
        if infinite and not settings["packing"]:
            warnings.warn("infinite=True has no effect without packing=True", stacklevel=2)

        # model, tokenizer and collator
        model_init_kwargs = settings["model_init_kwargs"]
        model = load_model(model, model_init_kwargs)
        self.tokenizer = machinery.with_padding(
            tokenizer or processing_class or tokenizer_of(model, **(model_init_kwargs or {})))
        data_collator = self.choose_collator(data_collator, args)
        self.peft_config = peft_config
        if model is not None:
            model = self.prepare_model(model, args)
        super().__init__(
            model=model, args=args, data_collator=data_collator, train_dataset=train_dataset,
            eval_dataset=eval_dataset, processing_class=self.tokenizer, model_init=model_init,
            compute_metrics=compute_metrics, callbacks=callbacks, optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics)
        self.seq2seq = self.model.config.is_encoder_decoder

        # the data: rows of token ids and labels
        self.max_seq_length = self.longest_row(settings["max_seq_length"])
        self.formatting_func = formatting_func
        self.num_proc = settings["dataset_num_proc"]
        self.rows_at_once = settings["dataset_batch_size"] or None
        self.set_encoding(settings["dataset_text_field"], settings["dataset_kwargs"])
        if settings["packing"]:
            self.train_dataset = self.pack(
                train_dataset, bool(infinite), settings["num_of_sequences"],
                settings["chars_per_token"])
        else:
            self.train_dataset = self.prepare(train_dataset, "train_dataset")
        self.eval_dataset = machinery.map_sets(machinery.read_stream,
                                               self.prepare(eval_dataset, "eval_dataset"))

    def choose_collator(self, data_collator, args):
        """Return the data collator: the one given, response_template's, or `collate`."""
        template = getattr(args, "response_template", None)
        if template and data_collator is not None:
            raise InputError(f"response_template={template!r}: the data_collator labels the rows "
                             "too; give one of them")
        if template:
            data_collator = DataCollatorForCompletionOnlyLM(template, tokenizer=self.tokenizer)
        self.completion_collator = None
        if isinstance(data_collator, DataCollatorForCompletionOnlyLM):
            data_collator = copy.copy(data_collator)
            data_collator.padding_side = "right"  # on the left, padding would shift positions
            self.completion_collator = data_collator
        elif data_collator is None:
            data_collator = partial(collate, pad_token_id=self.tokenizer.pad_token_id)
        else:
            return data_collator
        args.remove_unused_columns = False  # these two take the columns that they need
        return data_collator

    def prepare_model(self, model, args):
        """Add a fresh adapter, and choose a learning rate for the model's size if none is set."""
        lora = machinery.lora_config(args, model.config.is_encoder_decoder)
        model = machinery.prepare_training(model, self.peft_config or lora, args.seed)
        if args.learning_rate is None:
            args.learning_rate = machinery.scale_learning_rate(RATE_OF_TOY_MODEL, model)
        return model

    def call_model_init(self, trial=None):
        """Make the model with model_init, and its adapter."""
        return self.prepare_model(super().call_model_init(trial), self.args)

    def longest_row(self, max_seq_length):
        """Return max_seq_length, or what tokenizer and model take, at most 1024."""
        limit = 10**9 if self.seq2seq else number_of_positions(self.model)
        if max_seq_length is None:
            return min(self.tokenizer.model_max_length, limit, 1024)
        if not 1 < max_seq_length <= limit:
            raise InputError(f"max_seq_length={max_seq_length}: give 2 to {limit}, the positions "
                             "that the model has")
        return max_seq_length

    def set_encoding(self, dataset_text_field, dataset_kwargs):
        """Set the arguments of `encode`, and keep_tail of packing."""
        options = {"add_special_tokens": True, "append_concat_token": True,
                   "assistant_only_loss": getattr(self.args, "assistant_only_loss", False),
                   "keep_tail": getattr(self.args, "keep_tail", False)}
        unknown = set(dataset_kwargs or {}) - set(options)
        if unknown:
            raise InputError(f"dataset_kwargs={dataset_kwargs}: unknown names are "
                             f"{', '.join(sorted(unknown))}; use {', '.join(options)}")
        options.update(dataset_kwargs or {})
        self.keep_tail = options.pop("keep_tail")
        self.encoding = {"tokenizer": self.tokenizer, "dataset_text_field": dataset_text_field,
                         **options}

    # ------------------------------------------------------------------ datasets
    def prepare(self, rows, name):
        """Turn rows of texts, chats or tokens into rows of tokens, one for one.

        rows: a dataset, or a dict of several. Anything but a datasets.Dataset or IterableDataset
        stays as it is. name: that of the argument, for errors."""
        if isinstance(rows, dict):
            return {key: self.prepare(rows[key], f"{name}[{key!r}]") for key in rows}
        if isinstance(rows, ConstantLengthDataset):
            self.check_packing()
        if not isinstance(rows, (Dataset, IterableDataset)):
            return rows
        first = self.first_rows(rows, name)
        if "position_ids" in first[0]:  # packed rows
            self.check_packing()
            return rows
        options = machinery.map_options(self.args, rows, self.num_proc)
        with self.args.main_process_first(), explain(f"{name} can't be tokenized", place=name):
            tokens = self.tokenize(rows, first, self.max_seq_length)
            # a decoder does not predict a row's first token
            start = {"start": int(not self.seq2seq)}
            kept = tokens.filter(has_label, fn_kwargs=start, **options)
        if isinstance(rows, Dataset):
            self.report_rows(name, tokens, len(kept), first[0], start)
        return kept.remove_columns("is_truncated")

    def first_rows(self, rows, name):
        """Return the first two rows. For chats, add the template's end tokens to the model's own.

        Raises InputError if there is no row."""
        first = list(islice(iter(rows), 2))
        if not first:
            raise InputError(f"{name} (0 rows): it is empty; give at least one row")
        if any(map(is_chat, first[0].values())):
            # `generate` stops where the template ends an answer, also of a model without chats
            ends = self.model.generation_config
            ends.eos_token_id = sorted(chats.end_token_ids(self.tokenizer, ends.eos_token_id))
        return first

    def tokenize(self, rows, first, max_length):
        """Encode a dataset or a stream, truncated to max_length. first: its first rows."""
        texts_of = None
        if self.formatting_func is not None and not is_tokenized(first[0]):
            texts_of = text_maker(self.formatting_func, first)
        options = {**self.encoding, "seq2seq": self.seq2seq, "texts_of": texts_of,
                   "max_length": max_length, "completions": self.completion_collator}
        return rows.map(tokenize, batched=True, with_indices=True, batch_size=self.rows_at_once,
                        fn_kwargs=options, remove_columns=list(first[0]),
                        **machinery.map_options(self.args, rows, self.num_proc))

    def report_rows(self, name, tokens, kept, first_row, start):
        """Print how many rows are truncated, and how many are dropped: no token is in the loss.

        Raises InputError if it is all of them."""
        total = len(tokens)
        if kept == 0:
            template = self.completion_collator and repr(self.completion_collator.response_template)
            raise InputError(f"{name} ({total} rows): no row has a token in the loss; check "
                             f"response_template={template}, max_seq_length={self.max_seq_length} "
                             f"and the labels; the first row is {first_row}")
        truncated = tokens["is_truncated"][:]
        machinery.report_rows(name, "truncated", sum(truncated), total, truncated,
                              f"longer than max_seq_length={self.max_seq_length} tokens")
        unlabeled = (not has_label(row, **start) for row in tokens)
        machinery.report_rows(name, "dropped", total - kept, total, unlabeled,
                              "no token in the loss")

    def pack(self, rows, infinite, num_of_sequences, chars_per_token):
        """Pack rows into a dataset, or into a stream if the rows are streamed or infinite."""
        self.check_packing()
        if not isinstance(rows, (Dataset, IterableDataset)):
            return rows
        first = self.first_rows(rows, "train_dataset")
        if infinite or isinstance(rows, IterableDataset):
            return ConstantLengthDataset(
                dataset=rows, formatting_func=self.formatting_func, infinite=infinite,
                seq_length=self.max_seq_length, num_of_sequences=num_of_sequences,
                chars_per_token=chars_per_token, eos_token_id=None, keep_tail=self.keep_tail,
                seed=self.args.seed, **self.encoding)
        name = "train_dataset"
        with self.args.main_process_first(), explain(f"{name} can't be packed", place=name):
            packed = PackedRows(self.tokenize(rows, first, None), self.max_seq_length,
                                self.keep_tail)
        if len(packed) == 0:
            raise InputError(f"max_seq_length={self.max_seq_length}: train_dataset does not fill "
                             "one row; give more text, a smaller max_seq_length, or "
                             "dataset_kwargs={'keep_tail': True}")
        if not any(map(has_label, packed)):
            raise InputError(f"train_dataset ({len(packed)} packed rows): no row has a token in "
                             "the loss; check the labels, or the roles of the chats (assistant)")
        return packed

    def check_packing(self):
        """Raise InputError unless the model keeps the documents of a packed row apart."""
        kind = self.model.config.model_type
        adapter = getattr(self.model, "active_peft_config", None)
        if adapter is not None and adapter.is_prompt_learning:
            kind += f" with {adapter.peft_type.value.lower()}"
        if self.completion_collator:
            raise InputError("packing: a response template labels whole rows; give rows of prompt "
                             "and completion instead")
        if self.seq2seq:
            raise InputError(f"packing: {kind} is an encoder-decoder; leave packing out")
        if self.is_sharded:
            warnings.warn(f"packing: a sharded model can't be checked; try once on one process "
                          f"whether a small model of type {kind} is refused", stacklevel=3)
            return
        batch_size = self.args.per_device_train_batch_size
        with explain(f"packing: a model of type {kind} can't run packed rows; leave packing out"):
            with self.compute_loss_context_manager():
                apart = keeps_documents_apart(self.model, min(batch_size, 2))
        if not apart:
            raise InputError(f"packing: in a model of type {kind} a document sees the one before "
                             "it in its row; leave packing out (flash attention keeps documents "
                             "apart with per_device_train_batch_size=1 only)")

    # ------------------------------------------------------------------ evaluation
    def evaluate(self, eval_dataset=None, *args, **kwargs):
        """Evaluate; eval_dataset may hold any rows that the constructor takes."""
        if not isinstance(eval_dataset, dict):  # Trainer calls this method for each set of a dict
            eval_dataset = machinery.read_stream(self.prepare(eval_dataset, "eval_dataset"))
        return super().evaluate(eval_dataset, *args, **kwargs)


def prepare_args(args, eval_dataset):
    """Return a copy of args that fits the data. Raises InputError."""
    args = copy.copy(args) if args is not None else TrainingArguments()
    if eval_dataset is None and isinstance(args, SFTConfig):
        machinery.skip_evaluation(args)
    return args


def load_model(model, model_init_kwargs):
    """Load a model that is given by its name. Raises InputError."""
    if isinstance(model, str):
        with explain(f"model={model}: it can't be loaded"):
            return machinery.load_model(model, **(model_init_kwargs or {}))
    if model_init_kwargs:
        raise InputError(f"model_init_kwargs={model_init_kwargs}: they load a model by its name, "
                         "and `model` is a model already; leave them out")
    return model


def tokenizer_of(model, **kwargs):
    """Load the tokenizer of a model that was loaded with kwargs. Raises InputError."""
    if model is None or not model.config.name_or_path:
        raise InputError("tokenizer=None: the model does not say where its tokenizer is; pass one")
    return machinery.load_tokenizer(model.config.name_or_path, **kwargs)


# ----------------------------------------------------------------------------- rows -> tokens
def encode(row, tokenizer, dataset_text_field=None, add_special_tokens=True,
           append_concat_token=True, assistant_only_loss=False, eos_token_id=None, seq2seq=False):
    """Encode one row by its columns. Returns input_ids and labels (None: all are in the loss).

    The columns: a text or chat in dataset_text_field. If that is None, in this order: input_ids
    (and labels); prompt and completion; messages, text or conversations.
    append_concat_token: end texts and completions with the tokenizer's end token (if it has none,
    eos_token_id), once.
    seq2seq: the encoder reads the prompt, and the labels are the completion."""
    end_id = eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if not append_concat_token:
        end_id = None
    if "input_ids" in row and (dataset_text_field is None or is_tokenized(row)):
        return encode_tokens(row, seq2seq)
    if is_pair(row, dataset_text_field):
        encode_pair = encode_seq2seq if seq2seq else encode_completion
        return encode_pair(row, tokenizer, end_id, add_special_tokens)
    if seq2seq:
        raise InputError(f"columns={list(row)} (of the dataset): an encoder-decoder needs prompt "
                         "and completion, or input_ids and labels; rename the columns")
    names = ["messages", "text", "conversations"]
    if dataset_text_field is not None:
        names = [dataset_text_field]
    found = [name for name in names if name in row]
    if not found:
        raise InputError(f"dataset_text_field={dataset_text_field}: the dataset has the columns "
                         f"{list(row)}; name the one that holds the text or chat, or call it "
                         "text, messages, prompt and completion, or input_ids")
    value = row[found[0]]
    if isinstance(value, list):
        return encode_chat(value, tokenizer, row, assistant_only_loss)
    if assistant_only_loss:
        raise InputError("assistant_only_loss=True: the rows are texts, not chats; leave it out")
    return encode_text(value, tokenizer, end_id, add_special_tokens)


def encode_text(text, tokenizer, end_id, add_special_tokens):
    """Encode a text: all of it is in the loss, its end token included."""
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is neither a text nor a chat")
    ids = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids
    return with_end(with_one_bos(ids, tokenizer), end_id), None


def encode_completion(row, tokenizer, end_id, add_special_tokens):
    """Encode a prompt and its completion as one text or chat; the completion is in the loss."""
    prompt, completion = row["prompt"], row["completion"]
    if is_chat(prompt) or is_chat(completion):
        messages, first = join_completion(prompt, completion)
        ids, mask = tokenize_chat(tokenizer, messages, row, first)
    else:
        # together: for many tokenizers the completion's first token depends on what comes before
        tokens = tokenizer(prompt + completion, add_special_tokens=add_special_tokens,
                           return_offsets_mapping=True, verbose=False)
        starts = [end > len(prompt) for _, end in tokens.offset_mapping]  # special tokens: 0
        first = starts.index(True) if any(starts) else len(starts)
        ids = with_end(tokens.input_ids, end_id)
        mask = [i >= first for i in range(len(ids))]
        doubled = len(ids) - len(with_one_bos(ids, tokenizer))
        ids, mask = ids[doubled:], mask[doubled:]
    return ids, [token if m else IGNORE for token, m in zip(ids, mask, strict=True)]


def encode_seq2seq(row, tokenizer, end_id, add_special_tokens):
    """Encode a prompt for the encoder, and the completion as labels."""
    prompt, completion = row["prompt"], row["completion"]
    if is_chat(prompt) or is_chat(completion):
        messages, first = join_completion(prompt, completion)
        prompt, completion = split_chat(tokenizer, messages[:first], messages[first:], row)
        add_special_tokens = False
    start = tokenizer(prompt, add_special_tokens=add_special_tokens, verbose=False).input_ids
    rest = tokenizer(completion, add_special_tokens=False, verbose=False).input_ids
    return start, with_end(rest, end_id)


def join_completion(prompt, completion):
    """Return a chat as its messages, and the number of the message that the completion begins."""
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    messages = join_chat(prompt, completion)
    prompt = join_chat(prompt, [])
    return messages, same_messages(prompt, messages)


def encode_chat(messages, tokenizer, row, assistant_only_loss):
    """Encode a chat with the tokenizer's template, which writes its own special tokens.

    All tokens are in the loss, or only the assistant's turns and their ends."""
    ids, mask = tokenize_chat(tokenizer, messages, row) if messages else ([], [])
    if not assistant_only_loss:
        return ids, None
    return ids, [token if m else IGNORE for token, m in zip(ids, mask, strict=True)]


def encode_tokens(row, seq2seq):
    """Return a row's own input_ids and labels, without the padding of its attention_mask."""
    mask = row.get("attention_mask", [1] * len(row["input_ids"]))
    ids = [int(token) for token, m in zip(row["input_ids"], mask, strict=True) if m]
    if "labels" not in row:
        return ids, None
    labels = [int(label) for label in row["labels"]]
    if not seq2seq:  # an encoder-decoder's labels have their own length
        labels = [label for label, m in zip(labels, mask, strict=True) if m]
    return ids, labels


def is_tokenized(row):
    """Return whether a row holds tokens alone: no text for formatting_func, dataset_text_field."""
    return set(row) <= {"input_ids", "attention_mask", "labels"}


def is_pair(row, text_field):
    """Return whether a row is a prompt with its completion."""
    return text_field is None and "prompt" in row and "completion" in row


def with_end(ids, end_id):
    """Append the end token, unless the ids end with it or there is none."""
    return ids if end_id is None or ids[-1:] == [end_id] else [*ids, end_id]


def with_one_bos(ids, tokenizer):
    """Drop the first of two BOS tokens: the tokenizer's, if a rendered chat's text has its own."""
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def text_maker(formatting_func, rows):
    """Turn a user's function into one that takes a batch {column: list} and returns its texts.

    The user's function takes a row and returns its text, or takes a batch and returns a list. It is
    called on the first two rows to find out which."""
    rows = (list(rows) * 2)[:2]
    try:
        texts = formatting_func(batch_of(rows)) if rows else None
    except Exception:  # it is written for one row
        texts = None
    if isinstance(texts, list) and len(texts) == 2:
        return formatting_func
    return partial(texts_row_by_row, formatting_func)


def texts_row_by_row(formatting_func, batch):
    """Call a function that takes one row for each row of a batch. Raises InputError."""
    texts = []
    for row in rows_of(batch):
        with explain(f"formatting_func failed on the row {row}"):
            text = formatting_func(row)
        if isinstance(text, list) and len(text) == 1:
            text = text[0]
        if not isinstance(text, str):
            raise InputError(f"formatting_func: returned {type(text).__name__} for a row and no "
                             "list of 2 for 2 rows; return a row's text, or a list with one text "
                             "per row of the batch")
        texts.append(text)
    return texts


def batch_of(rows):
    """Turn a list of rows into a batch {column: list}."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def rows_of(batch):
    """Turn a batch {column: list} into a list of rows."""
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def encode_rows(rows, first=0, texts_of=None, **encoding):
    """Encode rows, each as input_ids and labels or None. Raises InputError with a row's number.

    first: the number of the first row. texts_of: a `text_maker`'s function."""
    if texts_of is not None and rows:
        rows = [{"text": text} for text in texts_of(batch_of(rows))]
        encoding["dataset_text_field"] = "text"
    encoded = []
    for number, row in enumerate(rows, first):
        with explain(f"row {number} can't be tokenized", place=f"row {number}"):
            encoded.append(encode(row, **encoding))
    return encoded


def tokenize(batch, numbers, max_length, completions=None, **options):
    """Encode a batch {column: list} of the rows with these numbers, and truncate its rows.

    completions: a DataCollatorForCompletionOnlyLM that chooses the labels."""
    encoded = encode_rows(rows_of(batch), numbers[0], **options)
    input_ids = [ids[:max_length] for ids, _ in encoded]
    lengths = [max(len(ids), len(row_labels or [])) for ids, row_labels in encoded]
    is_truncated = [max_length is not None and length > max_length for length in lengths]
    labels = [row_labels for _, row_labels in encoded]
    if completions:
        labels = [completions.labels(ids, IGNORE) for ids in input_ids]
    columns = {"input_ids": input_ids, "attention_mask": [[1] * len(ids) for ids in input_ids],
               "is_truncated": is_truncated}
    if labels and labels[0] is not None:
        columns["labels"] = [row_labels[:max_length] for row_labels in labels]
    return columns


def has_label(row, start=1):
    """Return whether a token of the row, from position `start` on, is in the loss."""
    return any(label != IGNORE for label in row.get("labels", row["input_ids"])[start:])


# ----------------------------------------------------------------------------- packing
class ConstantLengthDataset(torch.utils.data.IterableDataset):
    """Pack documents, one after the other, into rows of `seq_length` tokens.

    Yields {"input_ids", "labels", "position_ids"}, LongTensors [seq_length]. position_ids count
    from 0 in each document; models tell documents apart by them. A document that is cut continues
    in the next row as one of its own. len() is the number of rows; it tokenizes everything once.

    tokenizer, dataset: any rows that `encode` reads. dataset_text_field, formatting_func: their
    texts. infinite: start again at the end. num_of_sequences, chars_per_token: rows' worth of
    characters that are tokenized together. eos_token_id: ends documents if the tokenizer has no end
    token. shuffle: shuffle the rows of a buffer, by `seed` and the number of the pass.
    append_concat_token: end every document, once. add_special_tokens: let the tokenizer add its
    own. keep_tail: yield the last row too, which may be shorter; it is lost otherwise."""

    def __init__(self, tokenizer, dataset, dataset_text_field=None, formatting_func=None,
                 infinite=False, seq_length=1024, num_of_sequences=1024, chars_per_token=3.6,
                 eos_token_id=0, shuffle=True, append_concat_token=True, add_special_tokens=True,
                 keep_tail=False, seed=0, assistant_only_loss=False):
        self.dataset = dataset
        self.infinite = infinite
        self.seq_length = seq_length
        self.max_buffer_size = seq_length * chars_per_token * num_of_sequences
        self.shuffle = shuffle
        self.keep_tail = keep_tail
        self.seed = seed
        self.passes = 0
        self.length = None
        texts_of = None
        if formatting_func is not None:
            texts_of = text_maker(formatting_func, islice(iter(dataset), 2))
        self.encoding = {
            "tokenizer": tokenizer, "dataset_text_field": dataset_text_field,
            "add_special_tokens": add_special_tokens, "append_concat_token": append_concat_token,
            "assistant_only_loss": assistant_only_loss, "eos_token_id": eos_token_id,
            "texts_of": texts_of}

    def __len__(self):
        if self.infinite or not hasattr(self.dataset, "__len__"):
            raise TypeError(f"infinite={self.infinite} ({type(self.dataset).__name__}): the number "
                            "of packed rows is unknown; set max_steps")
        if self.length is None:
            self.length = sum(1 for _ in self.pack_rows(random.Random(0)))
        return self.length

    def set_epoch(self, epoch):
        """Set the number of the pass; Trainer does, so that a resumed run continues its order."""
        self.passes = epoch

    def __iter__(self):
        rows = self.pack_rows(random.Random(f"{self.seed}-{self.passes}"))
        self.passes += 1
        worker = torch.utils.data.get_worker_info()
        if worker is not None and not isinstance(self.dataset, IterableDataset):
            # a stream divides its rows among the workers itself
            rows = islice(rows, worker.id, None, worker.num_workers)
        for row in rows:
            yield packed_row(torch.tensor(row))

    def pack_rows(self, rng):
        """Yield rows: lists of (token id, label, whether a document begins here)."""
        remainder = []  # tokens that do not fill a row yet
        while True:
            for documents in self.encode_buffers():
                for ids, labels in documents:
                    begins = [i == 0 for i in range(len(ids))]
                    remainder += zip(ids, labels or ids, begins, strict=True)
                full = len(remainder) // self.seq_length * self.seq_length
                rows = common.split(remainder[:full], self.seq_length)
                remainder = remainder[full:]
                if self.shuffle:
                    rng.shuffle(rows)
                yield from rows
            if not self.infinite:
                break
        if self.keep_tail and remainder:
            yield remainder

    def encode_buffers(self):
        """Yield lists of encoded documents, a buffer of characters at a time."""
        rows = []
        size = 0
        first = 0  # the number of the buffer's first row
        for row in self.dataset:
            rows.append(row)
            size += sum(len(str(value)) for value in row.values())
            if size >= self.max_buffer_size:
                yield encode_rows(rows, first, **self.encoding)
                first += len(rows)
                rows = []
                size = 0
        if rows:
            yield encode_rows(rows, first, **self.encoding)


class PackedRows(torch.utils.data.Dataset):
    """Pack encoded documents into rows, in their order, when a row is asked for.

    Row k holds the tokens k x length to (k + 1) x length of all documents, one after the other.
    documents: a datasets.Dataset with input_ids, and perhaps labels. keep_tail: see
    ConstantLengthDataset, whose rows these are."""

    def __init__(self, documents, length, keep_tail=False):
        lengths = pyarrow.compute.list_value_length(documents.data.column("input_ids"))
        self.ends = np.cumsum(lengths.to_numpy())  # the number of tokens up to each document's end
        self.documents = documents.with_format("numpy")
        self.length = length
        self.keep_tail = keep_tail

    def __len__(self):
        whole, tail = divmod(int(self.ends[-1]), self.length)
        return whole + bool(self.keep_tail and tail)

    def __getitem__(self, k):
        if not 0 <= k < len(self):
            raise IndexError(k)
        begin, end = k * self.length, min((k + 1) * self.length, int(self.ends[-1]))
        first, last = np.searchsorted(self.ends, [begin, end - 1], side="right")
        documents = self.documents[first:last + 1]
        ids, labels = (np.concatenate([*documents.get(name, documents["input_ids"])])
                       for name in ("input_ids", "labels"))
        skipped = begin - int(self.ends[first] - len(documents["input_ids"][0]))
        tokens = np.stack([ids, labels], 1)[skipped:skipped + end - begin].astype(np.int64)
        begins = np.isin(np.arange(begin, end), self.ends[first:last])
        return packed_row(torch.from_numpy(np.column_stack([tokens, begins])))


def packed_row(tokens):
    """Return a packed row of tokens [T, 3]: id, label, whether a document begins here."""
    ids, labels, begins = tokens.T
    places = torch.arange(len(ids))
    first = (places * begins).cummax(0).values  # where each token's document begins
    return {"input_ids": ids, "labels": labels, "position_ids": places - first}


def keeps_documents_apart(model, rows):
    """Return whether a packed document has no gradient with respect to the one before it.

    rows: 1, or 2 for larger batches: flash attention reads the positions of one row only."""
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8]] * rows, device=model.device)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * rows, device=model.device)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, position_ids=positions, use_cache=False).logits
    gradient, = torch.autograd.grad(logits[:, 4:].float().square().sum(), embeddings)
    return not gradient[:, :4].any()


# ----------------------------------------------------------------------------- tokens -> batches
def collate(rows, pad_token_id, side="right"):
    """Pad rows, on the right: no position is shifted. Returns a batch of LongTensors [B, T].

    rows: dicts with input_ids, labels (default: input_ids), and position_ids if they are packed."""
    ids = [torch.as_tensor(row["input_ids"]) for row in rows]
    labels = [torch.as_tensor(row.get("labels", row["input_ids"])) for row in rows]
    batch = {"input_ids": pad_sequence(ids, True, pad_token_id, side)}
    if "position_ids" in rows[0]:
        positions = [torch.as_tensor(row["position_ids"]) for row in rows]
        # nothing before a document predicts its first token
        labels = [row.masked_fill(place == 0, IGNORE)
                  for row, place in zip(labels, positions, strict=True)]
        batch["position_ids"] = pad_sequence(positions, True, 0)
    else:
        batch["attention_mask"] = pad_sequence([torch.ones_like(row) for row in ids], True, 0, side)
    return {**batch, "labels": pad_sequence(labels, True, IGNORE, side)}


class DataCollatorForCompletionOnlyLM:
    """Make a batch of rows {"input_ids"} in which only the completions are in the loss.

    response_template: what comes before a completion, as text or token ids. Without
    instruction_template, what follows the last response_template is in the loss. With it (what
    comes before a prompt), everything between a response_template and the next
    instruction_template is. ignore_index: the label of all other tokens. mlm: must be False.
    padding_side: None: the tokenizer's. A row that has labels keeps them.
    SFTTrainer labels the rows of a datasets.Dataset before training, and drops those without the
    template; for any other row without it, warn."""

    padding_side = None

    def __init__(self, response_template, instruction_template=None, tokenizer=None, mlm=False,
                 ignore_index=IGNORE):
        if mlm:
            raise InputError("mlm=True: masking tokens at random is no task for completions; leave "
                             "it out")
        if tokenizer is None:
            raise InputError("tokenizer=None: DataCollatorForCompletionOnlyLM needs the tokenizer")
        self.tokenizer = tokenizer
        self.ignore_index = ignore_index
        self.response_template = response_template
        self.instruction_template = instruction_template

    def __call__(self, rows, return_tensors="pt"):
        """Make a batch, of torch tensors only: call torch_call, which a subclass may replace."""
        return self.torch_call(rows)

    def torch_call(self, rows):
        """Label the rows that have no labels, and pad. Returns a batch of LongTensors [B, T]."""
        batch = []
        for row in rows:
            ids = torch.as_tensor(row["input_ids"]).tolist()
            labels = row.get("labels")
            if labels is None:
                labels = self.labels(ids, self.ignore_index)
                if all(label == self.ignore_index for label in labels):
                    warnings.warn(f"response_template={self.response_template!r}: it is not in the "
                                  f"row {self.tokenizer.decode(ids)!r}, so none of the row's "
                                  "tokens is in the loss", stacklevel=2)
            batch.append({"input_ids": ids, "labels": labels})
        side = self.padding_side or self.tokenizer.padding_side
        return collate(batch, self.tokenizer.pad_token_id, side)

    def labels(self, ids, ignore_index):
        """Return the labels of a row: its completions' token ids, and ignore_index elsewhere."""
        labels = [ignore_index] * len(ids)
        for begin, end in self.find_completions(ids):
            labels[begin:end] = ids[begin:end]
        return labels

    def find_completions(self, ids):
        """Return where the completions of a row begin and end."""
        begins = [end for _, end in self.find(self.response_template, ids)]
        if self.instruction_template is None:
            return [(begin, len(ids)) for begin in begins[-1:]]
        prompts = [begin for begin, _ in self.find(self.instruction_template, ids)]
        ends = []
        for begin in begins:
            ends.append(min([p for p in prompts if p >= begin], default=len(ids)))
        return list(zip(begins, ends, strict=True))

    def find(self, template, ids):
        """Return where the occurrences of a template begin and end in a row.

        A tokenizer may write a text differently inside a row than alone. If the row's text has the
        template more often than its ids do, the text is searched, a few tokens at a time."""
        is_text = isinstance(template, str)
        wanted = list(template)
        if is_text:
            wanted = self.tokenizer(template, add_special_tokens=False).input_ids
        n = len(wanted)
        found = [(i, i + n) for i in range(len(ids) - n + 1) if ids[i:i + n] == wanted]
        if not is_text or self.tokenizer.decode(ids).count(template) <= len(found):
            return found
        found = []
        for end in range(1, len(ids) + 1):
            first = max(0, end - 2 * n - 8)  # far enough to the left to hold the template
            before = self.tokenizer.decode(ids[first:end - 1]).count(template)
            if self.tokenizer.decode(ids[first:end]).count(template) > before:
                begin = max(k for k in range(first, end)
                            if template in self.tokenizer.decode(ids[k:end]))
                found.append((begin, end))
        return found


# ----------------------------------------------------------------------------- the script
def show_samples(trainer, rows, title, folder):
    """Print and keep how the model continues a few rows. Not with sharded parameters."""
    # of a sharded model, one rank alone has only its shards
    if trainer.is_sharded or not trainer.is_world_process_zero():
        return
    samples = []
    torch.manual_seed(trainer.args.seed)  # after a resume, too
    for row in rows:
        prompt, shown = sample_prompt(trainer, row)
        ids, = chats.generate(trainer.model, [torch.tensor(prompt)], trainer.tokenizer,
                              do_sample=True, max_new_tokens=40)
        samples.append({"update": trainer.state.global_step, "prompt": shown,
                        "completion": trainer.tokenizer.decode(ids, skip_special_tokens=True)})
    machinery.log_samples(folder, title, samples)


def sample_prompt(trainer, row):
    """Return the token ids that a sample continues, and the text to show of them.

    A chat goes to the assistant's last turn; other rows to their first label, or to their third
    token if all of them are in the loss."""
    tokenizer = trainer.tokenizer
    text_field = trainer.encoding["dataset_text_field"]
    chat = row.get(text_field or "messages", row.get("conversations"))
    if is_pair(row, text_field):
        chat = row["prompt"]
    if is_chat(chat):
        prompt = chats.prompt_ids(tokenizer, chat)
        shown = chats.text_to_show(chat)
    else:
        ids, labels = encode(row, seq2seq=trainer.seq2seq, **trainer.encoding)
        if trainer.completion_collator:
            labels = trainer.completion_collator.labels(ids, IGNORE)
        first = next((i for i, label in enumerate(labels or []) if label != IGNORE), 0)
        prompt = ids if trainer.seq2seq else ids[:first or 3]
        shown = tokenizer.decode(prompt, skip_special_tokens=True)
    room = number_of_positions(trainer.model) - 40
    return prompt[-max(room, 1):], shown


def main(config: SFTConfig):
    """Fine-tune a language model on texts, prompts with completions, or chats.

    Returns the metrics of the last evaluation."""
    out, checkpoint = machinery.start_run(config)
    tokenizer, model = machinery.load_language_model(
        config.model_name or str(TOY / "blank"), **machinery.loading_arguments(config))
    machinery.use_few_threads(model)
    rows, held_out = machinery.load_train_and_eval_rows(
        config, "reviews.jsonl", "reviews_test.jsonl")
    trainer = SFTTrainer(model, config, train_dataset=rows, eval_dataset=held_out,
                         tokenizer=tokenizer, callbacks=[machinery.Journal(out, rows=rows)])
    trainer.remove_callback(ProgressCallback)  # the Journal has a bar
    shown = list(islice(held_out or rows, 5))
    if not checkpoint:
        show_samples(trainer, shown, "before training", out)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_model(str(out))
    if held_out:
        metrics = machinery.last_evaluation(trainer)
    show_samples(trainer, shown, "after training", out)
    if trainer.is_world_process_zero():
        machinery.write_model_card(out, "A language model fine-tuned on texts", config,
                                   {"texts": config.dataset or "toy/reviews.jsonl"}, metrics)
    return metrics


if __name__ == "__main__":
    machinery.run(main, SFTConfig, own="--gradient-accumulation-steps 16",
                  lora="--torch-dtype bfloat16",
                  toy="--num-train-epochs 8 --per-device-train-batch-size 32 "
                      "--per-device-eval-batch-size 64 --no-gradient-checkpointing")
