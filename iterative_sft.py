"""Iterative supervised fine-tuning: sample answers, keep the best, learn from them, again (best-of-n, RAFT).

Papers: Dong et al. 2023, "RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment" (arXiv:2304.06767);
Anthony et al. 2017, "Thinking Fast and Slow with Deep Learning and Tree Search" (arXiv:1705.08439), for the idea.

A round draws prompts x; the policy pi answers each n times; a reward r scores the answers; the best is learnt:

    y_1 ... y_n ~ pi(. | x),   y* = argmax_i r(x, y_i),   L = - sum over x, t of log pi(y*_t | x, y*_<t) / number of tokens

The policy moves towards its own best answers, and the next round samples from where it has come to. No gradient goes
through the reward, so any Python function will do; no value head, no reference model.

`IterativeSFTTrainer.step` is the learning half alone: rows in, one pass of optimizer steps over them, statistics out. What
happens between two calls is yours; `main` is the loop above.

Departures from the paper: each round's answers are learnt once and then dropped.
Departures from TRL 0.7.10, whose names, arguments and numbers these are:
  1. `labels` and `texts_labels` are learnt as they are given; they default to the inputs. `max_length` cuts the tokens of
     each row, not the rows of the batch.
  2. Padding is told from the attention mask, never from the token's number, and goes no further than a micro-batch's
     longest row.
  3. The mean is over the tokens of the whole optimizer step, however they fall into micro-batches and ranks, and over all
     tokens of the evaluation set.
  4. `global_step` counts optimizer steps; logging, evaluation, saving, callbacks and resuming are Trainer's own. A call
     of `step` is an epoch of theirs.
  5. Adapters are welcome. The caller's tokenizer is left as it is.

    torchrun iterative_sft.py                              one process
    torchrun --nproc_per_node 8 iterative_sft.py --model-name my/model --query-dataset prompts.jsonl --reward-model my/classifier

With nothing but the first command a toy model learns to write kinder film reviews: see docs/iterative_sft.md.
"""
import copy
import json
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DataCollatorForLanguageModeling, GenerationConfig, ProgressCallback, Trainer, TrainingArguments
from transformers.integrations.neftune import deactivate_neftune
from transformers.trainer_callback import ExportableState

from common import (TOY, InputError, Journal, check_finite, explain, load_language_model, load_prompts, load_reward,
                    load_rows, label_logprobs, logprobs_from_logits, lora_config, only_logits_of, prepare_process, run, set_seed,
                    trainer_checkpoint, unsharded, with_adapter, writable_folder, write_model_card)

IGNORE = -100  # the label of a token that is not learnt


# ------------------------------------------------------------------------------------------------ configuration
@dataclass
class IterativeSFTConfig(TrainingArguments):
    """The script's flags: those of transformers.TrainingArguments, whose documentation holds, and these. The first are
    Trainer's own with other defaults. Sizes are per process."""

    output_dir: Optional[str] = "runs/iterative_sft"
    """Where the run's files go."""
    learning_rate: float = 1e-4
    """AdamW's learning rate; a large model wants about 1e-5."""
    per_device_train_batch_size: int = 32
    """Rows of one forward and backward pass."""
    num_train_epochs: float = 80
    """Rounds of sampling and learning. With max_steps the run ends after so many optimizer steps, if that is sooner."""
    lr_scheduler_type: str = "constant"
    """How the learning rate falls."""
    logging_steps: float = 1
    """Optimizer steps between two lines of metrics.jsonl; each round adds one of its own."""
    save_steps: float = 20
    """Optimizer steps between two checkpoints, up to whole rounds: within a round a run can't be resumed."""
    save_total_limit: Optional[int] = 1
    """Checkpoints that are kept."""
    report_to: Optional[str] = "none"
    """Trackers: tensorboard, wandb, ..., beside metrics.jsonl."""

    # the script's own
    model_name: Optional[str] = None
    """Policy: a hub name or a folder (a model, or a LoRA adapter). None: the toy model."""
    query_dataset: Optional[str] = None
    """Prompts: a .jsonl/.json/.csv/.parquet/.txt file, a folder or a hub name, with a column query, prompt, messages (chat),
    text or input_ids. None: the toy prompts."""
    reward_model: Optional[str] = None
    """A sequence classifier's folder or hub name, or file.py:function that takes a list of texts and returns as many
    numbers. It reads query + response. None: the toy reward model."""
    eval_dataset: Optional[str] = None
    """Rows with text or input_ids, whose loss is told at the end and by eval_strategy: has the policy forgotten how to write
    what it could write? None: no evaluation."""
    reward_label: Optional[str] = None
    """Name or number of the reward classifier's label whose logit is the score; needed where it has several."""
    prompts_per_round: int = 64
    """Prompts of a round."""
    num_samples: int = 8
    """n: answers that are sampled for each prompt."""
    num_best: int = 1
    """How many of them are learnt: those with the highest scores."""
    max_new_tokens: int = 24
    """Length of an answer, at most."""
    max_query_length: Optional[int] = None
    """Queries are cut to their first tokens, so many. None: not cut."""
    temperature: float = 1.0
    """Of sampling: softmax(logits / temperature). Higher: more different answers to choose from."""
    generation_batch_size: int = 256
    """Rows that are sampled at once."""
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the weights. Weights that are trained want float32 (with --bf16); LoRA's base model may be bfloat16."""
    lora_r: int = 0
    """Rank of a fresh LoRA adapter on all linear layers. 0: train all weights."""
    lora_alpha: int = 16
    """LoRA's scale is lora_alpha / lora_r."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_train_epochs", "prompts_per_round", "num_samples", "num_best", "max_new_tokens", "temperature",
                     "generation_batch_size"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)}: give a number above 0")
        if self.eval_strategy != "no" and self.eval_dataset is None:
            raise InputError(f"eval_strategy={self.eval_strategy.value} has nothing to evaluate on: give eval_dataset")
        if self.num_best > self.num_samples:
            raise InputError(f"num_best={self.num_best} answers can't be kept of num_samples={self.num_samples}: lower one or "
                             "raise the other")


# ------------------------------------------------------------------------------------------------ data
def make_row(input_ids, attention_mask=None, labels=None, *, seq2seq, max_length=None, keep_end=True, where="row"):
    """One row of tokens -> {"input_ids", "attention_mask", "labels"}, LongTensors [T] (an encoder-decoder's labels have a
    length of their own).

    Tokens that attention_mask hides are left out: nothing sees them and nothing learns them. labels: -100 for what is
    not learnt; None: the inputs. max_length: so many tokens stay, the last (keep_end) or the first. Raises InputError."""
    ids, mask, labels = (None if x is None else torch.as_tensor(x).long() for x in (input_ids, attention_mask, labels))
    mask = torch.ones_like(ids) if mask is None else mask
    labels = ids if labels is None else labels
    for name, row in (("attention_mask", mask), ("labels", labels)):
        if row.shape != ids.shape and not (seq2seq and name == "labels"):
            raise InputError(f"{where}: {name} has the shape {list(row.shape)}, input_ids {list(ids.shape)}: give one for each "
                             "token")
    if ids.dim() != 1 or labels.dim() != 1:
        raise InputError(f"{where}: input_ids and labels must have one dimension, not the shapes {list(ids.shape)} and "
                         f"{list(labels.shape)}")
    if not seq2seq or labels is ids:
        labels = labels[mask > 0]
    ids = ids[mask > 0]
    if max_length is not None:
        kept = slice(-max_length, None) if keep_end else slice(max_length)
        ids, labels = ids[kept], labels[kept]
    if not len(ids) or not (labels if seq2seq else labels[1:]).ne(IGNORE).any():
        cut = "" if max_length is None else f" of the max_length={max_length} tokens that stay"
        raise InputError(f"{where} has no token to learn{cut}" + (
            "" if seq2seq else ", where the first has nothing to be predicted from") + ": leave the row out")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def collate(rows, pad_token_id):
    """Rows of `make_row` -> a batch of LongTensors [B, T], padded on the right, where padding shifts no position."""
    padding = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORE}
    return {name: pad_sequence([row[name] for row in rows], True, value) for name, value in padding.items()}


def draw_prompts(rows, start, count, seed):
    """The prompts `start` to `start + count` of an endless stream: all rows in random order, again in another, and so on."""
    picked = []
    for epoch in range(start // len(rows), (start + count - 1) // len(rows) + 1):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        first = epoch * len(rows)
        picked += [rows[i] for i in order[max(start - first, 0):start + count - first]]
    return picked


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


def best_of(scores, k):
    """scores [P, n] of n answers to each of P prompts -> the numbers of the k best of each [P, k], the best first; of equal
    ones the earlier."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :k]


# ------------------------------------------------------------------------------------------------ the trainer
class IterativeSFTTrainer(Trainer):
    """transformers.Trainer without a loop of its own: you call `step` with rows, as often as you like.

        trainer = IterativeSFTTrainer(model, TrainingArguments("out", max_steps=1000), tokenizer)
        while not trainer.control.should_training_stop:
            stats = trainer.step(texts=my_best_answers(model))

    Each call of `step` is an epoch of Trainer's, each of its optimizer steps one of Trainer's steps: that is what
    `save_strategy`, `eval_strategy`, `logging_strategy`, schedules and callbacks go by. Every method is called on every rank.

    model: a causal or an encoder-decoder language model, or a PeftModel of one.
    args: TrainingArguments; None: their defaults. max_steps: optimizer steps after which the schedule ends and `step` is
        refused; without it neither ends, and the learning rate stays where its warm-up leaves it.
    tokenizer: the model's; needed for texts, and saved beside the model.
    optimizers: (optimizer, schedule); each None where args tell.
    data_collator: rows {"input_ids", "attention_mask", "labels"} -> a batch. None: `collate`. Of a
        DataCollatorForLanguageModeling the padding is taken and not the labels, which would drop yours.
    eval_dataset: rows with input_ids (attention_mask, labels), or with text (text_labels).
    max_length: rows (and an encoder-decoder's labels) keep so many tokens, by truncation_mode the last (keep_end) or the
        first (keep_start).
    preprocess_logits_for_metrics, compute_metrics: Trainer's.
    optimize_device_cache: hand the accelerator's cached memory back after each optimizer step.

    Raises InputError for parts that don't go together."""

    def __init__(self, model=None, args=None, tokenizer=None, optimizers=(None, None), data_collator=None,
                 eval_dataset=None, max_length=None, truncation_mode="keep_end", preprocess_logits_for_metrics=None,
                 compute_metrics=None, optimize_device_cache=False):
        if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
            raise InputError(f"model must be a causal or an encoder-decoder language model, not {type(model).__name__}")
        if truncation_mode not in ("keep_end", "keep_start"):
            raise InputError(f"truncation_mode={truncation_mode!r}: choose keep_end or keep_start")
        self.seq2seq = bool(model.config.is_encoder_decoder)
        least = 1 if self.seq2seq else 2
        if max_length is not None and max_length < least:
            raise InputError(f"max_length={max_length} leaves nothing to learn: give {least} or more")
        if args is not None and args.max_steps <= 0 and 0 < args.warmup_steps < 1:
            raise InputError(f"warmup_steps={args.warmup_steps} is a share of max_steps: give max_steps too, or a number of steps")
        self.max_length, self.keep_end = max_length, truncation_mode == "keep_end"
        self.optimize_device_cache = optimize_device_cache
        self.tokenizer, self.text_tokenizer = tokenizer, copy.deepcopy(tokenizer)
        if tokenizer is not None:  # a copy: the caller's keeps its own side
            self.text_tokenizer.truncation_side = "left" if self.keep_end else "right"
        pad = getattr(tokenizer, "pad_token_id", None) or 0  # any token will do: mask and labels tell what is padding
        self.pad_rows = data_collator or (lambda rows: collate(rows, pad))
        super().__init__(model=model, args=args, processing_class=tokenizer, optimizers=optimizers, eval_dataset=eval_dataset,
                         data_collator=self.evaluation_batch, compute_metrics=compute_metrics,
                         preprocess_logits_for_metrics=preprocess_logits_for_metrics)
        prepare_process(self.args)
        self._signature_columns = ["input_ids", "attention_mask", "labels", "text", "text_labels"]  # of eval_dataset
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole optimizer step
        self.current_gradient_accumulation_steps = 1
        self.seen = torch.zeros(2)  # sum of the losses and number of tokens of the evaluation that is under way
        self.scores_to_log = {}  # of the round, where the caller has scores: `step` logs them
        super().train()  # makes everything ready, and comes to _inner_training_loop

    def train(self, *args, **kwargs):
        """Raises InputError: there is no data set to go through."""
        raise InputError("IterativeSFTTrainer has no training loop of its own: call step(...) with rows, as often as you like")

    def load_checkpoint(self, path):
        """Goes on where a checkpoint of a run (folder checkpoint-<n>) was written: weights, optimizer, schedule, random
        numbers, counters. Before the first `step`. Raises InputError."""
        if self.neftune_noise_alpha is not None:
            deactivate_neftune(self.model, self.neftune_hook_handle, self.accelerator)  # it is set up once more
        with explain(f"checkpoint {path} can't be loaded; give an older one, or start anew"):
            super().train(resume_from_checkpoint=str(path))

    def _inner_training_loop(self, batch_size=None, args=None, resume_from_checkpoint=None, trial=None,
                             ignore_keys_for_eval=None):
        """Where Trainer.train, having made model and checkpoint ready, would loop over its data: here optimizer, schedule and
        counters are made ready for `step`."""
        if resume_from_checkpoint:
            self.accelerator.free_memory()  # what was prepared for a start from nothing
        max_steps = self.args.max_steps if self.args.max_steps > 0 else sys.maxsize
        self._init_training_state(max_steps, 1, max_steps, resume_from_checkpoint, trial)
        self._prepare_for_training(max_steps, None, resume_from_checkpoint)
        self._load_rng_state(resume_from_checkpoint)
        self.state.epoch = self.state.epoch or 0.0
        self.begun, self.start_time = False, time.time()
        self._initial_global_step = self._globalstep_last_logged = self.state.global_step
        self._initial_num_input_tokens_seen = self.state.num_input_tokens_seen
        self._tr_loss, self._total_loss_scalar = torch.tensor(0.0, device=self.args.device), 0.0
        self.optimizer.zero_grad()

    # ------------------------------------------------------------------ 1. a call: rows in, statistics out
    def step(self, input_ids=None, attention_mask=None, labels=None, texts=None, texts_labels=None):
        """One pass of optimizer steps over the given rows, in random order -> statistics of all ranks: {"loss": mean over the
        tokens that were learnt (nats, each by the weights that its optimizer step began with), "grad_norm" (before clipping)
        and "learning_rate" of the last optimizer step, "tokens": how many were learnt, "optimizer_steps"}.

        Give input_ids (a list of LongTensors [length]; attention_mask and labels alike, where labels hold -100 for what is
        not learnt and default to the inputs) or texts (a list of strings; texts_labels default to them). A causal model's
        labels stand where their tokens stand; an encoder-decoder's are what it is to answer, of any length. Texts are tokenised
        as they are: where the tokenizer adds no end-of-sequence token, write it into the text, or give input_ids.

        An optimizer step takes per_device_train_batch_size x gradient_accumulation_steps rows, the last one what is left.
        Every rank brings as many rows. Raises InputError before any weight has moved."""
        rows = self._step_safety_checker(input_ids, attention_mask, labels, texts, texts_labels)
        draw = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
        order = torch.randperm(len(rows), generator=draw).split(self.args.train_batch_size)
        batches = [self.make_batch([rows[i] for i in picked.tolist()]) for picked in order]
        if not self.begun:
            self._begin()
        self.control = self.callback_handler.on_epoch_begin(self.args, self.state, self.control)
        calls, size, losses, tokens, updates = self.state.epoch, self.args.gradient_accumulation_steps, 0, 0, 0
        for start in range(0, len(batches), size):
            loss, n, grad_norm, learning_rate = self._optimizer_step(batches[start:start + size])
            losses, tokens, updates = losses + loss * n, tokens + n, updates + 1
            self.state.epoch = calls + min(start + size, len(batches)) / len(batches)
            self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
            stop = self.control.should_epoch_stop or self.control.should_training_stop
            if stop or start + size >= len(batches):
                break
            self._log_save_evaluate(grad_norm, learning_rate)
        # One time for the last optimizer step and for the call: everything is logged before the checkpoint.
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        self._log_save_evaluate(grad_norm, learning_rate)
        self._log_scores()
        if self.control.should_training_stop:  # max_steps, or a callback: loads the best model where asked, tells the trackers
            self._finalize_training(None, self.get_total_train_batch_size(self.args) * self.state.max_steps, self.start_time)
        return {"loss": (self.accelerator.reduce(losses, "mean") / tokens).item(), "grad_norm": float(grad_norm),
                "learning_rate": learning_rate, "tokens": int(tokens), "optimizer_steps": updates}

    def _step_safety_checker(self, input_ids, attention_mask, labels, texts, texts_labels):
        """The call's rows, ready to be learnt -> a list of `make_row`'s. Raises InputError, naming the row."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            raise InputError(f"training has ended after {self.state.global_step} optimizer steps, by max_steps="
                             f"{self.args.max_steps} or a callback: look at trainer.control.should_training_stop before each step")
        if (input_ids is None) == (texts is None):
            raise InputError("step takes input_ids or texts: " + ("neither is given" if texts is None else "give one, not both"))
        name, rows = ("texts", texts) if input_ids is None else ("input_ids", input_ids)
        foreign = {"attention_mask": attention_mask, "labels": labels} if input_ids is None else {"texts_labels": texts_labels}
        for other, value in foreign.items():
            if value is not None:
                raise InputError(f"{other} goes with {'input_ids' if input_ids is None else 'texts'}, and {name} are given")
        for other, value in ((name, rows), ("attention_mask", attention_mask), ("labels", labels), ("texts_labels", texts_labels)):
            if value is not None and (not isinstance(value, (list, tuple)) or len(value) != len(rows)):
                size = f" of {len(value)}" if hasattr(value, "__len__") else ""
                raise InputError(f"{other} must be a list of {len(rows)}, one for each of {name}, not a {type(value).__name__}{size}"
                                 if other != name else f"{name} must be a list, not a {type(value).__name__}")
        if not rows:
            raise InputError(f"{name} is empty: a step needs at least one row")
        sizes = gather_object([len(rows)])
        if len(set(sizes)) > 1:
            raise InputError(f"every rank must bring as many rows to a step; they bring {sizes}")
        if texts is not None:
            input_ids = self._tokens(texts, "texts")
            labels = None if texts_labels is None else self._tokens(texts_labels, "texts_labels")
        at = lambda column, i: None if column is None else column[i]
        with explain(f"{name} can't be read"):
            return [self._row(ids, at(attention_mask, i), at(labels, i), f"{name}[{i}]") for i, ids in enumerate(input_ids)]

    def _tokens(self, texts, name):
        """Texts -> lists of token numbers, cut to max_length between the tokenizer's own special tokens."""
        if self.text_tokenizer is None:
            raise InputError(f"{name} need a tokenizer: pass tokenizer= to IterativeSFTTrainer, or give input_ids")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"{name}[{i}] must be a string, not a {type(text).__name__}")
        cut = {} if self.max_length is None else {"truncation": True, "max_length": self.max_length}
        with explain(f"{name} can't be tokenised"):
            return self.text_tokenizer(texts, verbose=False, **cut).input_ids

    def _row(self, input_ids, attention_mask, labels, where):
        row = make_row(input_ids, attention_mask, labels, seq2seq=self.seq2seq, max_length=self.max_length,
                       keep_end=self.keep_end, where=where)
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions and max(len(row["input_ids"]), len(row["labels"])) > positions:
            raise InputError(f"{where} has {len(row['input_ids'])} tokens, and the model takes {positions}: set max_length")
        return row

    def make_batch(self, rows):
        """Rows of `make_row` -> a batch of LongTensors [B, T], by the caller's data_collator or `collate`; a causal model's with
        each row's tokens in front, where padding shifts no position."""
        with explain("data_collator failed"):
            if type(self.pad_rows) is DataCollatorForLanguageModeling:
                batch = self.pad_rows([{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows])
                batch["labels"] = torch.full_like(batch["input_ids"], IGNORE)
                batch["labels"][batch["attention_mask"] > 0] = torch.cat([row["labels"] for row in rows])
            else:
                batch = self.pad_rows(rows)
        mask = batch["attention_mask"]
        if not self.seq2seq and not mask[:, 0].all():
            order = mask.argsort(dim=1, descending=True, stable=True)
            batch = {**batch, **{name: batch[name].gather(1, order) for name in ("input_ids", "attention_mask", "labels")}}
        return batch

    def evaluation_batch(self, rows):
        """Rows of an evaluation set -> a batch."""
        def tokens(row, name):
            return self._tokens([row[name]], name)[0] if name in row else None

        made = []
        for row in rows:
            ids, labels = row.get("input_ids"), row.get("labels")
            if ids is None and "text" not in row:
                raise InputError(f"eval_dataset has rows of {list(row)}: give them input_ids (attention_mask, labels) or text "
                                 "(text_labels)")
            ids, labels = (tokens(row, "text"), tokens(row, "text_labels")) if ids is None else (ids, labels)
            made.append(self._row(ids, row.get("attention_mask"), labels, "a row of eval_dataset"))
        return self.make_batch(made)

    # ------------------------------------------------------------------ 2. the update
    def _optimizer_step(self, batches):
        """One optimizer step on the micro-batches -> loss (its mean over the ranks is that of all tokens), tokens of all ranks,
        norm of the gradient, learning rate."""
        args, model, loss = self.args, self.model_wrapped, torch.zeros((), device=self.args.device)
        self.control = self.callback_handler.on_step_begin(args, self.state, self.control)
        self.current_gradient_accumulation_steps = len(batches)
        first = 0 if self.seq2seq else 1
        tokens = sum((batch["labels"][:, first:] != IGNORE).sum() for batch in batches).to(args.device)
        tokens = self.accelerator.reduce(tokens, "sum")  # each token weighs the same, in whatever micro-batch and rank
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last or self.is_deepspeed_enabled else self.accelerator.no_sync(model):
                loss += self.training_step(model, batch, tokens)
            self.current_flos += float(self.floating_point_ops(batch))
            self._track_num_input_tokens(batch)
            if not last:
                self.control = self.callback_handler.on_substep_end(args, self.state, self.control)
        grad_norm = self._clip_grad_norm(model) if args.max_grad_norm > 0 else None
        grad_norm = self._get_grad_norm(model, grad_norm)
        self.control = self.callback_handler.on_pre_optimizer_step(args, self.state, self.control)
        self.optimizer.step()
        self.control = self.callback_handler.on_optimizer_step(args, self.state, self.control)
        learning_rate = self._get_learning_rate()
        waits = isinstance(self.lr_scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)  # for an evaluation
        if not self.accelerator.optimizer_step_was_skipped and not waits:
            self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.state.global_step += 1
        self._tr_loss += loss
        if self.optimize_device_cache:
            clear_device_cache(garbage_collection=True)
        return loss, tokens, grad_norm, learning_rate

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean cross-entropy over the tokens that are learnt: of the whole optimizer step on all ranks where their number
        is given (num_items_in_batch), else of these. With return_outputs the logits are all computed."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        plain = self.accelerator.unwrap_model(model)
        if self.seq2seq:
            inputs["decoder_input_ids"] = plain.prepare_decoder_input_ids_from_labels(labels)  # shifted right
        elif not getattr(plain.config, "output_router_logits", False):  # a causal model never looks right: nothing to mask
            inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        targets = labels if self.seq2seq else next_tokens(labels)                       # [B, T]
        learnt = targets != IGNORE
        with nullcontext() if return_outputs else only_logits_of(plain, learnt):
            outputs = model(**inputs, use_cache=False)
        logits = outputs.logits[learnt] if return_outputs else outputs.logits           # [N, V]
        nll = cross_entropy(logits, targets[learnt], self.args.label_smoothing_factor)  # -log pi(y_t), [N]
        if not model.training:
            rows = nll.new_zeros(len(learnt)).index_add(0, learnt.nonzero()[:, 0], nll.detach())
            both = torch.stack([rows, learnt.sum(1).to(rows)], 1)
            self.seen = self.seen.to(nll.device) + self.accelerator.gather_for_metrics(both).sum(0)  # no row twice
        # DDP takes the mean of the ranks' gradients, hence the share of one rank
        items = max(len(nll), 1) if num_items_in_batch is None else num_items_in_batch / self.accelerator.num_processes
        loss = nll.sum() / items
        if model.training and outputs.get("aux_loss") is not None:  # of a mixture of experts: keeps their loads even
            loss = loss + plain.config.router_aux_loss_coef * outputs.aux_loss / self.current_gradient_accumulation_steps
        if model.training:
            check_finite(loss, self.state.global_step)
        return (loss, outputs) if return_outputs else loss

    # ------------------------------------------------------------------ 3. what is told and kept
    def _begin(self):
        """The first call of `step`: by now the caller has added callbacks."""
        self.begun, self.start_time = True, time.time()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):  # what it remembers goes into the checkpoints
                self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        if self.args.eval_on_start:
            self._evaluate(None, None, skip_scheduler=True)

    def _log_scores(self):
        """Log the scores of the round, once: before its checkpoint, or else at the end of `step`."""
        scores, self.scores_to_log = self.scores_to_log, {}
        if scores:
            self.log(scores)

    def _save_checkpoint(self, *args, **kwargs):
        """Save a checkpoint. A run that is killed after it has lost no line of metrics.jsonl."""
        self._log_scores()
        super()._save_checkpoint(*args, **kwargs)

    def _log_save_evaluate(self, grad_norm, learning_rate):
        self._maybe_log_save_evaluate(self._tr_loss, grad_norm, self.model_wrapped, None, self.state.epoch, None, self.start_time,
                                      learning_rate=learning_rate)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Trainer's, but where only the loss is wanted, only the logits that it needs are computed."""
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """Trainer's; its loss is the mean over all tokens of all ranks, not over batches."""
        self.seen = torch.zeros(2)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, tokens = self.seen.tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(tokens, 1)
        return output


# ------------------------------------------------------------------------------------------------ the script
@torch.no_grad()
def sample(model, tokenizer, queries, n, config):
    """n answers to each of P queries (lists of token numbers) -> P lists of n LongTensors; an answer ends after the first
    end-of-sequence token. Whatever settings for chats the model brings along, its plain distribution is sampled from."""
    own, answers = model.generation_config, [None] * len(queries)
    known = ("bos_token_id", "eos_token_id", "decoder_start_token_id")
    settings = GenerationConfig(
        **{name: getattr(own, name) for name in known}, do_sample=True, temperature=config.temperature, top_k=0, top_p=1.0,
        num_return_sequences=n, max_new_tokens=config.max_new_tokens, pad_token_id=tokenizer.pad_token_id, use_cache=True)
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = torch.tensor([end for end in {*ends, tokenizer.eos_token_id} if end is not None], dtype=torch.long,
                        device=model.device)
    seq2seq = model.config.is_encoder_decoder
    by_length = sorted(range(len(queries)), key=lambda i: len(queries[i]))  # little padding within a batch
    rows = max(config.generation_batch_size // n, 1)
    model.eval()
    model.generation_config = settings  # `generate` fills what is not set from the model's own
    try:
        for start in range(0, len(queries), rows):
            picked = by_length[start:start + rows]
            ids = [torch.tensor(queries[i]) for i in picked]
            side = "right" if seq2seq else "left"
            mask = pad_sequence([torch.ones_like(row) for row in ids], True, 0, padding_side=side).to(model.device)
            ids = pad_sequence(ids, True, tokenizer.pad_token_id, padding_side=side).to(model.device)
            with unsharded(model):
                output = model.generate(input_ids=ids, attention_mask=mask, synced_gpus=False)
            output = output[:, 1 if seq2seq else ids.shape[1]:]
            for row, i in enumerate(picked):
                answers[i] = [cut_after(answer, ends) for answer in output[row * n:(row + 1) * n]]
    finally:
        model.generation_config = own
    return answers


def cut_after(answer, ends):
    """answer [T] up to and with its first token of `ends`."""
    end = torch.isin(answer, ends).nonzero()
    return answer[:end[0, 0] + 1] if len(end) else answer


def answer(trainer, reward, rows, n, seed):
    """n answers to each of P prompts -> P lists of n answers, P lists of n texts, scores [P, n]. Raises InputError."""
    torch.manual_seed(seed)
    decode = lambda ids: trainer.tokenizer.decode(ids, skip_special_tokens=True)
    answers = sample(trainer.model, trainer.tokenizer, [row["input_ids"] for row in rows], n, trainer.args)
    texts = [[decode(y) for y in group] for group in answers]
    # A query and its answer are decoded together: a decoder may drop the space that a text begins with.
    whole = [f"{decode(row['input_ids'])} {decode(y)}" if trainer.seq2seq else decode([*row["input_ids"], *y.tolist()])
             for row, group in zip(rows, answers) for y in group]
    scores = torch.stack(reward(whole, [row["metadata"] for row, group in zip(rows, answers) for _ in group]))
    for score, text in zip(scores.tolist(), whole):
        if not math.isfinite(score):
            raise InputError(f"reward_model gives {score} to {text!r}: scores must be finite, or none is the best; mend the "
                             "reward function")
    return answers, texts, scores.view(len(rows), n)


def learn_a_round(trainer, reward, prompts):
    """Sample, keep the best, learn -> statistics of the round, over all ranks."""
    config, number = trainer.args, round(trainer.state.epoch)
    # every rank has prompts and a seed of its own, by the number of the round: a resumed run draws the same
    turn = number * config.world_size + config.process_index
    rows = draw_prompts(prompts, turn * config.prompts_per_round, config.prompts_per_round, config.seed)
    answers, _, scores = answer(trainer, reward, rows, config.num_samples, config.seed + 100_003 * (turn + 1))
    best = best_of(scores, config.num_best)                                             # y*, [P, k]
    input_ids, labels = [], []
    for row, group, kept in zip(rows, answers, best.tolist()):
        for y in (group[i].cpu() for i in kept):
            x = torch.tensor(row["input_ids"])
            input_ids.append(x if trainer.seq2seq else torch.cat([x, y]))
            labels.append(y if trainer.seq2seq else torch.cat([torch.full_like(x, IGNORE), y]))
    everyone, chosen = (trainer.accelerator.gather(x.to(config.device)) for x in (scores, scores.gather(1, best)))
    told = {"objective/scores": everyone.mean().item(), "objective/scores_std": everyone.std().item(),
            "objective/scores_best": chosen.mean().item()}
    trainer.scores_to_log = dict(told)
    return {**trainer.step(input_ids=input_ids, labels=labels), **told}


def show_samples(trainer, reward, rows, title, out):
    """Prints and keeps what the policy answers to a few prompts."""
    _, texts, scores = answer(trainer, reward, rows, 1, trainer.args.seed)
    if not trainer.is_world_process_zero():
        return
    tqdm.write(f"\n{title}")
    with out.joinpath("samples.jsonl").open("a") as file:
        for row, (text,), (score,) in zip(rows, texts, scores.tolist()):
            tqdm.write(f"  {score:+6.2f}  {row['query']} |{text}")
            file.write(json.dumps({"update": trainer.state.global_step, "query": row["query"], "response": text,
                                   "score": score}) + "\n")


def in_whole_rounds(config):
    """max_steps and save_steps of a run, which end with a round (or max_steps with itself, where it is given)."""
    step_rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    a_round = math.ceil(config.prompts_per_round * config.num_best / step_rows)  # optimizer steps
    planned = math.ceil(config.num_train_epochs) * a_round
    max_steps = min(config.max_steps, planned) if config.max_steps > 0 else planned
    save_steps = config.save_steps if config.save_steps >= 1 else config.save_steps * max_steps
    return max_steps, math.ceil(save_steps / a_round) * a_round


def main(config: IterativeSFTConfig):
    """Best-of-n fine-tuning of a language model: sample, keep what the reward likes best, learn it, again. Returns the last
    round's statistics."""
    out = Path(config.output_dir)
    checkpoint = config.resume_from_checkpoint and trainer_checkpoint(config.resume_from_checkpoint)
    writable_folder(out, fresh=not checkpoint)
    finished = (out / "README.md").exists()  # the model card is written last
    set_seed(config.seed)
    tokenizer, model = load_language_model(config.model_name or str(TOY / "model"), config.torch_dtype)
    seq2seq = model.config.is_encoder_decoder
    if config.lora_r:
        model = with_adapter(model, lora_config(config, "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM"), config.seed)
    if sum(p.numel() for p in model.parameters()) < 10**6:
        torch.set_num_threads(1)  # handing out such small products to threads takes longer than they do
    positions = None if seq2seq else getattr(model.config, "max_position_embeddings", None)
    prompts = load_prompts(config.query_dataset or TOY / "prompts.jsonl", tokenizer, config.max_query_length,
                           positions and positions - config.max_new_tokens)
    held_out = config.eval_dataset and load_rows(config.eval_dataset)
    config.max_steps, config.save_steps = in_whole_rounds(config)
    trainer = IterativeSFTTrainer(model, config, tokenizer, eval_dataset=held_out)
    for row in held_out or []:
        trainer.evaluation_batch([row])  # a bad row is told now, not after the training
    trainer.remove_callback(ProgressCallback)  # the Journal has a bar
    trainer.add_callback(Journal(out))
    reward = load_reward(config.reward_model or TOY / "reward", config.reward_label, config.device)
    if checkpoint:
        trainer.load_checkpoint(checkpoint)
        done = trainer.state.global_step >= config.max_steps  # killed after the last checkpoint: only the end is missing
        if trainer.state.epoch % 1 and not done:
            raise InputError(f"checkpoint {checkpoint} was written within a round, whose answers are gone: give another one")
        if done and finished:
            raise InputError(f"checkpoint {checkpoint} is the end of its run: raise --num-train-epochs or --max-steps to go on")
        if done:
            trainer._begin()  # opens metrics.jsonl
    else:
        show_samples(trainer, reward, prompts[:8], "before training", out)
    stats = {}
    while trainer.state.global_step < config.max_steps and not trainer.control.should_training_stop:
        stats = learn_a_round(trainer, reward, prompts)
    show_samples(trainer, reward, prompts[:8], "after training", out)
    if held_out:
        stats.update(trainer.evaluate())
    trainer.save_model(str(out))
    if trainer.is_world_process_zero():
        write_model_card(out, "A language model fine-tuned on its own best answers", config, {
            "prompts": config.query_dataset or "toy/prompts.jsonl", "reward": config.reward_model or "toy/reward"}, stats)
    return stats


if __name__ == "__main__":
    run(main, IterativeSFTConfig)
