"""Iterative supervised fine-tuning: sample, keep the best, fine-tune, repeat (best-of-n, RAFT).

Papers: Dong et al. 2023, "RAFT: Reward rAnked FineTuning for Generative Foundation Model
Alignment" (arXiv:2304.06767); Anthony et al. 2017, "Thinking Fast and Slow with Deep Learning and
Tree Search" (arXiv:1705.08439), for the idea.

A round draws prompts x. The policy pi answers each of them n times, a reward r scores the
responses, and the policy is fine-tuned on the best one:

    1. y_1 ... y_n ~ pi(. | x)                         sample
    2. r(x, y_1) ... r(x, y_n)                         score
    3. y* = argmax_i r(x, y_i)                         keep the best (num_best: the best few)
    4. L = -mean log pi(y*_t | x, y*_<t)               fine-tune; mean over the tokens of all y*

The policy moves toward its own best responses, and the next round samples from the new policy. No
gradient flows through the reward, so any Python function will do. There is no value head and no
reference model.

Start reading at `train_round`. Its line 4 calls `IterativeSFTTrainer.step`, whose loop changes the
weights. That loop calls `compute_loss`. Part 2 is machinery. To write your own loop, call `step`
alone. A round is one call of `step`: several optimizer steps, and one epoch to Trainer.

Difference from the paper: each round makes one pass over the responses that it keeps.
The API, defaults and metrics follow TRL 0.7.10. Differences:
  1. `labels` and `texts_labels` are used as given, and default to the inputs. `max_length`
     truncates the tokens of each row, not the rows of the batch.
  2. Padding is found by the attention mask, never by the token's id.
  3. The mean is over the tokens of the whole optimizer step, however they are split into
     micro-batches and ranks, and over all tokens of the evaluation set.
  4. `global_step` counts optimizer steps. A call of `step` is an epoch for callbacks, logging,
     evaluation and saving.
  5. Models with adapters are accepted, and the caller's tokenizer is not changed.
  6. `step` returns one dict per call. `max_steps` and `tokenizer` are optional. `input_ids`
     together with `texts` raises.
  7. Checkpoints hold the complete training state: a resumed run reproduces the uninterrupted one.

    torchrun iterative_sft.py                              one process, the toy model
    torchrun --nproc_per_node 8 iterative_sft.py --model-name my/model --reward-model my/classifier
"""
import copy
import json
import math
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DataCollatorForLanguageModeling,
    GreedyLR,
    ProgressCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.neftune import activate_neftune, deactivate_neftune
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import align_special_tokens, speed_metrics

import chats
import common
import machinery
from common import TOY, InputError, check_finite, explain, only_logits_of, unsharded

IGNORE = -100  # the label of a token that is not trained on


# =============================================================================
# Part 1, the algorithm: configuration, one round, the update
# =============================================================================

# ----------------------------------------------------------------------------- configuration
@dataclass
class IterativeSFTConfig(machinery.TrainerFlags, machinery.LoadingFlags, TrainingArguments):
    """Extend TrainingArguments: first its fields that have other defaults here, then our own.

    Sizes are per process."""

    output_dir: Optional[str] = "runs/iterative_sft"
    """Output folder."""
    learning_rate: float = 1e-5
    """AdamW's learning rate. Toy model and, in the script, LoRA: 1e-4."""
    per_device_train_batch_size: int = 8
    """Rows per forward and backward pass. Toy model: 32."""
    per_device_eval_batch_size: int = 2
    """Rows per evaluation pass. Toy model: 8."""
    num_train_epochs: float = 20
    """Rounds of sampling and fine-tuning, unless max_steps ends them. Toy model: 80."""
    lr_scheduler_type: str = "constant"
    """Learning rate schedule."""
    logging_steps: float = 1
    """Optimizer steps per line of metrics.jsonl; each round adds a line for its scores."""
    save_steps: float = 20
    """Optimizer steps between checkpoints, rounded up to whole rounds."""
    report_to: Optional[str] = "none"
    """Trackers in addition to metrics.jsonl: tensorboard, wandb, ..."""

    # the trainer's own
    max_length: Optional[int] = None
    """Truncate rows to this many tokens. None: no truncation."""
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"
    """Tokens that truncation keeps: the last or the first."""
    optimize_device_cache: bool = False
    """Empty the device cache after each optimizer step."""
    lora_r: int = 0
    """Rank of a fresh LoRA adapter on all linear layers. 0: train all weights."""
    lora_alpha: int = 16
    """LoRA scale is lora_alpha / lora_r."""

    # the script's own
    model_name: Optional[str] = None
    """Policy: hub name or folder of a model or a LoRA adapter. None: the toy model."""
    query_dataset: Optional[str] = None
    """Prompts: a file, a folder or a hub name. None: the toy prompts."""
    reward_model: Optional[str] = None
    """Classifier (hub name or folder), or file.py:function, see docs/ppo.md. None: the toy's."""
    eval_dataset: Optional[str] = None
    """Rows (text or input_ids) for the evaluation loss. None: no evaluation."""
    reward_label: Optional[str] = None
    """Label (name or number) of the reward classifier whose logit is the score."""
    prompts_per_round: int = 64
    """Prompts per round."""
    num_samples: int = 8
    """n: responses per prompt."""
    num_best: int = 1
    """Responses per prompt to train on: those with the highest scores."""
    max_new_tokens: int = 128
    """Maximum length of a response, in tokens. Toy model: 24."""
    max_query_length: Optional[int] = None
    """Truncate prompts to this many tokens. None: no truncation."""
    temperature: float = 1.0
    """Temperature of sampling; higher gives more different responses to choose from."""
    generation_batch_size: int = 64
    """Responses per batch in sampling. Toy model: 256."""
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the weights; the script loads LoRA's base model in bfloat16."""

    def __post_init__(self):
        machinery.check_ranges(self, {
            "(0, inf)": ("num_train_epochs", "per_device_train_batch_size",
                         "per_device_eval_batch_size", "gradient_accumulation_steps",
                         "logging_steps", "save_steps", "prompts_per_round", "num_samples",
                         "num_best", "max_new_tokens", "max_query_length", "temperature",
                         "generation_batch_size", "lora_alpha"),
            "[0, inf)": ("learning_rate", "max_grad_norm", "weight_decay", "lora_r"),
            "[0, 1)": ("label_smoothing_factor",),
        })
        machinery.check_choices(self, {"torch_dtype": machinery.DTYPES})
        if self.num_best > self.num_samples:
            raise InputError(f"num_best={self.num_best} is more than num_samples="
                             f"{self.num_samples}: lower one or raise the other")
        if self.num_best == self.num_samples:
            warnings.warn(f"num_best={self.num_best} is num_samples too: there is no selection",
                          stacklevel=3)
        super().__post_init__()


# ----------------------------------------------------------------------------- one round
# Letters in shapes: P prompts, n responses each, k of them kept; B rows, T tokens of the longest
# row, N targets, V entries of the vocabulary.
def train_round(trainer, reward, prompts):
    """Run one round of best-of-n fine-tuning. Returns its statistics over all ranks.

    reward: a function that scores texts, from `load_reward`. prompts: a list of dicts, from
    `load_prompts`, of which P are drawn."""
    config = trainer.args
    # a call of `step` is an epoch: this many rounds are finished
    finished_rounds = int(trainer.state.epoch)
    # this rank's place in the stream of draws: every rank and round draws something different
    stream_index = finished_rounds * config.world_size + config.process_index
    prompts = draw_prompts(prompts, stream_index, config.prompts_per_round, config.seed)
    # the large prime keeps runs with neighboring seeds apart
    torch.manual_seed(config.seed + 100_003 * (stream_index + 1))

    # 1. Sample n responses to each of P prompts: P lists of n LongTensors
    responses = sample_responses(trainer, prompts, config.num_samples)

    # 2. Score them, [P, n]
    scores = score_responses(trainer, reward, prompts, responses)

    # 3. Keep the k best of each prompt: [P, k], which of its n responses, the best first.
    #    To penalize length, change the scores here
    best = best_of(scores, config.num_best)
    metrics = score_metrics(trainer, scores, best)

    # 4. Fine-tune on them: the loss is over the response, so the prompt's labels are IGNORE
    input_ids, labels = [], []
    for prompt, group, kept in zip(prompts, responses, best.tolist(), strict=True):
        query = torch.tensor(prompt["input_ids"])
        for i in kept:
            response = group[i]
            if trainer.seq2seq:
                input_ids.append(query)
                labels.append(response)
            else:
                input_ids.append(torch.cat([query, response]))
                labels.append(torch.cat([torch.full_like(query, IGNORE), response]))
    stats = trainer.step(input_ids=input_ids, labels=labels, metrics=metrics)
    return {**stats, **metrics}


def best_of(scores, k):
    """Return the indices [P, k] of the k highest of n scores [P, n], the highest first.

    Of equal scores the earlier one comes first."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :k]


def next_tokens(labels):
    """Shift labels [B, T] by one: each position's target is the next label, the last has none."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def cross_entropy(logits, targets, label_smoothing=0.0):
    """Compute the cross-entropy [N] in float32 (nats) from logits [N, V] and targets [N].

    It is -log p(target), unless label_smoothing spreads this fraction of the target's probability
    over the vocabulary."""
    return F.cross_entropy(logits.float(), targets, reduction="none",
                           label_smoothing=label_smoothing)


# ----------------------------------------------------------------------------- the update
class IterativeSFTTrainer(machinery.TokenMeanEvaluation, machinery.ShardedTrainer, Trainer):
    """Fine-tune on the rows that `step` is given: transformers.Trainer without a dataset.

        trainer = IterativeSFTTrainer(model, TrainingArguments("out", max_steps=1000), tokenizer)
        while not trainer.control.should_training_stop:
            stats = trainer.step(texts=my_best_responses(model))

    Call every method on every rank. The constructor is in Part 2."""

    def step(self, input_ids=None, attention_mask=None, labels=None, texts=None,
             texts_labels=None, metrics=None):
        """Take one pass of optimizer steps over the rows (step 4 of a round). Returns statistics.

        input_ids: a list of LongTensors [length]; attention_mask and labels likewise. labels are
        -100 where there is no loss, and default to input_ids. Those of a causal model are aligned
        with its tokens; those of an encoder-decoder are its target, of any length.
        texts: a list of strings instead, tokenized as they are (write an end token into them if
        the tokenizer adds none). texts_labels default to texts.
        metrics: numbers to log at the end of this call, such as the mean score.

        An optimizer step takes per_device_train_batch_size x gradient_accumulation_steps rows, the
        last one those that remain. Each rank gives the same number of rows.
        Returns, over all ranks, {"loss": mean over the tokens trained on (nats), "tokens": their
        number, "optimizer_steps", and of the last optimizer step "grad_norm" (before clipping) and
        "learning_rate"}.
        Raises InputError for bad rows, before any weight moves, and for a loss that is not finite,
        before its optimizer step."""
        args = self.args
        accelerator = self.accelerator
        model = self.model_wrapped
        rows = self.check_step(input_ids=input_ids, attention_mask=attention_mask, labels=labels,
                               texts=texts, texts_labels=texts_labels)
        self.start()
        self.call_back("on_epoch_begin")

        # 4a. Shuffle and collate the rows: a list of micro-batches for each optimizer step
        # (the large prime keeps runs with neighboring seeds apart)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + self.state.global_step)
        shuffled = [rows[i] for i in torch.randperm(len(rows), generator=generator)]
        batches = [self.make_batch(part) for part in common.split(shuffled, args.train_batch_size)]
        step_batches = common.split(batches, args.gradient_accumulation_steps)

        first_epoch = self.state.epoch
        batches_done = 0
        losses, tokens = [], []  # one entry per optimizer step
        self.optimizer.zero_grad()  # a call that raised may have left gradients
        for micro_batches in step_batches:
            self.call_back("on_step_begin")
            model.train()
            self.optimizer.train()  # schedule-free optimizers have this mode

            # 4b. Loss and gradient: the mean over the step's tokens, on all ranks
            targets = [self.targets_of(batch["labels"]) for batch in micro_batches]
            step_tokens = sum((target != IGNORE).sum() for target in targets).to(args.device)
            step_tokens = accelerator.reduce(step_tokens, "sum")
            self.current_gradient_accumulation_steps = len(micro_batches)  # aux_loss divides by it
            step_loss = torch.zeros((), device=args.device)
            for batch in micro_batches:
                # DDP averages the ranks' gradients in the last micro-batch only, FSDP 2 in each
                is_last = batch is micro_batches[-1]
                exchange = is_last or accelerator.is_fsdp2
                batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
                with nullcontext() if exchange else accelerator.no_sync(model):
                    loss = self.compute_loss(model, batch, num_items_in_batch=step_tokens)
                    accelerator.backward(loss)
                step_loss += loss.detach()
                if not is_last:
                    self.call_back("on_substep_end")

            # 4c. Clip the gradient, then step the optimizer and the schedule
            # without max_grad_norm the norm is only measured
            max_norm = args.max_grad_norm or math.inf
            grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), max_norm))
            learning_rate = self.optimizer.param_groups[0]["lr"]
            self.call_back("on_pre_optimizer_step")
            self.optimizer.step()
            self.call_back("on_optimizer_step")
            # no step of the schedule if fp16 skipped this one, or if it waits for an evaluation
            if not accelerator.optimizer_step_was_skipped and not self.schedule_waits:
                self.lr_scheduler.step()
            self.optimizer.zero_grad()
            if self.optimize_device_cache:
                clear_device_cache(garbage_collection=True)

            # 4d. Count the step, and ask the callbacks whether to log, evaluate, save or stop
            # compute_loss multiplied by the number of ranks, so the mean over ranks is the sum
            losses.append(accelerator.reduce(step_loss, "mean").item())
            tokens.append(step_tokens.item())
            batches_done += len(micro_batches)
            self.state.global_step += 1
            self.state.epoch = first_epoch + batches_done / len(batches)
            self.call_back("on_step_end")
            if self.control.should_epoch_stop:  # a callback may end the call early
                self.state.epoch = first_epoch + 1
            is_end = (micro_batches is step_batches[-1] or self.control.should_epoch_stop
                      or self.control.should_training_stop)

            # 4e. Log, evaluate and save, where the arguments ask for it
            self.log_evaluate_save(losses[-1], grad_norm, learning_rate, is_end, metrics)
            if is_end:
                break

        if self.control.should_training_stop:
            self.finish()
        loss_sum = sum(loss * n for loss, n in zip(losses, tokens, strict=True))
        return {"loss": loss_sum / sum(tokens), "grad_norm": grad_norm,
                "learning_rate": learning_rate, "tokens": sum(tokens),
                "optimizer_steps": len(tokens)}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss of one micro-batch (step 4b).

        inputs: input_ids, attention_mask, labels, [B, T] each (an encoder-decoder's labels: its
            target, of another T).
        num_items_in_batch: number of targets in the whole optimizer step, on all ranks. None: that
            of inputs.
        return_outputs: also return the model's outputs, with all logits [B, T, V].
        Raises InputError if the loss is not finite."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        language_model = self.accelerator.unwrap_model(model)

        # targets [B, T]: each position predicts the next token
        targets = self.targets_of(labels)
        loss_mask = targets != IGNORE
        if self.seq2seq:  # the decoder reads its own labels, shifted to the right
            inputs["decoder_input_ids"] = (
                language_model.prepare_decoder_input_ids_from_labels(labels))

        # forward pass: logits [N, V] of the N positions that have a target
        selection = nullcontext() if return_outputs else only_logits_of(language_model, loss_mask)
        with selection:
            outputs = model(**inputs, use_cache=False)
        logits = outputs.logits
        if return_outputs:  # prompt tuning puts virtual tokens before those of the text
            logits = logits[:, -targets.shape[1]:][loss_mask]

        # cross-entropy of each target [N]; eval_loss is the mean of these
        nll = cross_entropy(logits, targets[loss_mask], self.args.label_smoothing_factor)
        if not model.training:
            self.add_to_evaluation(nll, loss_mask)

        # mean over the tokens of the optimizer step: a token weighs the same in any micro-batch
        tokens = len(nll) if num_items_in_batch is None else num_items_in_batch
        loss = nll.sum() / max(tokens, 1)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages the ranks' gradients

        # a mixture of experts adds its own loss, which balances the load of the experts
        if model.training and outputs.get("aux_loss") is not None:
            weight = language_model.config.router_aux_loss_coef
            loss = loss + weight * outputs.aux_loss / self.current_gradient_accumulation_steps

        if model.training:
            check_finite(loss, self.state.global_step)
        return (loss, outputs) if return_outputs else loss

    def targets_of(self, labels):
        """Return what each position predicts [B, T]: the next label, or a decoder's own label."""
        return labels if self.seq2seq else next_tokens(labels)

    # =========================================================================
    # Part 2, the machinery: nothing below is needed to understand the algorithm.
    # =========================================================================

    def __init__(self, model=None, args=None, tokenizer=None, optimizers=(None, None),
                 data_collator=None, eval_dataset=None, max_length=None,
                 truncation_mode="keep_end", preprocess_logits_for_metrics=None,
                 compute_metrics=None, optimize_device_cache=False, callbacks=None,
                 processing_class=None):
        """Prepare model, optimizer and schedule. Raises InputError for parts that do not fit.

        model: a causal or an encoder-decoder language model, or a PeftModel of one.
        args: TrainingArguments, or an IterativeSFTConfig, whose fields for the trainer are read.
            max_steps: optimizer steps after which the schedule ends and `step` is refused. Without
            it neither ends, and the learning rate stays where its warmup leaves it.
        tokenizer (or processing_class): the model's; needed for texts, saved with the model.
        optimizers: (optimizer, schedule). None: made from args.
        data_collator: turns rows {"input_ids", "attention_mask", "labels"} into a batch. None:
            `collate`. Of a DataCollatorForLanguageModeling only the padding is used, since its
            labels would replace yours.
        eval_dataset: rows with input_ids (attention_mask, labels), or with text (text_labels).
        max_length: truncate rows (and an encoder-decoder's labels) to this many tokens.
        truncation_mode: the tokens that stay, the last (keep_end) or the first (keep_start).
        preprocess_logits_for_metrics, compute_metrics, callbacks: Trainer's.
        optimize_device_cache: empty the device cache after each optimizer step."""
        if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
            raise InputError(f"model={type(model).__name__}: it is not a language model; give a "
                             "causal or an encoder-decoder one")
        args = copy.copy(args) if args is not None else TrainingArguments()
        check_arguments(args, eval_dataset)
        machinery.prepare_process(args)
        settings = machinery.read_settings(IterativeSFTTrainer, args, max_length=max_length,
                                           truncation_mode=truncation_mode,
                                           optimize_device_cache=optimize_device_cache)
        self.seq2seq = bool(model.config.is_encoder_decoder)
        self.positions = common.number_of_positions(model)
        self.max_length = settings["max_length"]
        self.truncation_mode = settings["truncation_mode"]
        self.optimize_device_cache = settings["optimize_device_cache"]
        machinery.check_choices(self, {"truncation_mode": ("keep_end", "keep_start")})
        shortest = 1 if self.seq2seq else 2
        if self.max_length is not None and self.max_length < shortest:
            raise InputError(f"max_length={self.max_length}: it leaves nothing to train on; give "
                             f"{shortest} or more")
        lora = machinery.lora_config(args, self.seq2seq)
        model = machinery.prepare_training(model, lora, args.seed)
        self.tokenizer = tokenizer = tokenizer or processing_class
        self.text_tokenizer = copy.deepcopy(tokenizer)
        if tokenizer is not None:  # the copy truncates, the caller's keeps its own side
            is_left = self.truncation_mode == "keep_end"
            self.text_tokenizer.truncation_side = "left" if is_left else "right"
            align_special_tokens(model, tokenizer)
        self.row_collator = data_collator
        args.remove_unused_columns = False  # evaluation_batch takes what it needs
        if args.device.type == "cpu":
            args.dataloader_pin_memory = False  # torch warns of it
        super().__init__(
            model=model, args=args, processing_class=tokenizer, optimizers=optimizers,
            eval_dataset=eval_dataset, data_collator=self.evaluation_batch, callbacks=callbacks,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics)
        self.prepare_for_steps()

    def prepare_for_steps(self):
        """Make optimizer, schedule and state, ready for `step` or `load_checkpoint`."""
        args = self.args
        model = self.model
        if self.is_deepspeed_enabled:
            raise InputError("deepspeed: IterativeSFTTrainer does not support it; shard a large "
                             "model with fsdp")
        if args.activation_checkpointing:
            options = dict(args.activation_checkpointing_kwargs or {})
            layers = options.pop("every_n_layers", 1)
            offload = options.pop("offload", False)
            model.activation_checkpointing_enable(options or None, layers, offload)
        self.noise_hook = None
        if args.neftune_noise_alpha is not None:
            self.noise_hook = activate_neftune(model, args.neftune_noise_alpha, self.accelerator)
        self.create_optimizer()
        self.model_wrapped, self.optimizer = self.accelerator.prepare(model, self.optimizer)
        if self.is_fsdp_enabled:
            self.model = self.model_wrapped
            register_fsdp_forward_method(self.model, "generate")
        else:  # accelerate need not save the weights again: save_pretrained does
            self.accelerator.register_save_state_pre_hook(lambda _, weights, path: weights.clear())
            self.accelerator.register_load_state_pre_hook(lambda models, path: models.clear())
        self.max_steps = args.max_steps if args.max_steps > 0 else sys.maxsize
        self.create_scheduler(self.max_steps)
        self.accelerator.register_for_checkpointing(self.lr_scheduler)
        self.schedule_waits = isinstance(  # for the metric of an evaluation
            self.lr_scheduler, (torch.optim.lr_scheduler.ReduceLROnPlateau, GreedyLR))
        self.callback_handler.optimizer = self.optimizer
        self.callback_handler.lr_scheduler = self.lr_scheduler
        self.use_state(self.state)
        # losses of optimizer steps: the sum of all, and those since the last line of the log
        self.losses = {"sum": 0.0, "not_logged": []}
        self.own_checkpoints = []
        self.is_in_train = True
        self.has_started = False
        self.has_finished = False

    def use_state(self, state):
        """Make this TrainerState the trainer's, with the intervals that args ask for."""
        state.compute_steps(self.args, self.max_steps)
        state.init_training_references(self, self.max_steps, self.max_steps, None)
        self.state = state

    def train(self, *args, **kwargs):
        """Raise InputError: there is no dataset to go through."""
        raise InputError("train: IterativeSFTTrainer has no dataset; call step(...) with rows, as "
                         "often as you like")

    # ------------------------------------------------------------------ rows and batches
    def check_step(self, **columns):
        """Return the rows of a call of `step` as tensors. Raises InputError that names the row."""
        if self.control.should_training_stop or self.state.global_step >= self.max_steps:
            raise InputError(f"max_steps={self.args.max_steps}: training has ended after "
                             f"{self.state.global_step} optimizer steps, by it or by a callback; "
                             "look at trainer.control.should_training_stop before each step")
        columns = {name: rows for name, rows in columns.items() if rows is not None}
        name = check_columns(columns)
        count = len(columns[name])
        sizes = gather_object([count])
        if len(set(sizes)) > 1:
            raise InputError(f"step() needs the same number of rows on every rank, got {sizes}")
        columns = {key.replace("texts", "text"): rows for key, rows in columns.items()}
        rows = [{key: column[i] for key, column in columns.items()} for i in range(count)]
        return [self.make_row(row, f"{name}[{i}]") for i, row in enumerate(rows)]

    def make_row(self, row, where):
        """Return {"input_ids", "attention_mask", "labels"} as LongTensors [T]. Raises InputError.

        row: input_ids (attention_mask, labels) or text (text_labels). Tokens that attention_mask
        hides are left out. An encoder-decoder's labels may have a length of their own."""
        row = {name: value for name, value in row.items() if value is not None}
        with explain(f"{where} can't be read"):
            if "input_ids" not in row:
                row["input_ids"] = self.tokenize(row["text"], where)
                if "text_labels" in row:
                    row["labels"] = self.tokenize(row["text_labels"], where)
            ids = torch.as_tensor(row["input_ids"]).long()
            mask = torch.as_tensor(row.get("attention_mask", torch.ones_like(ids)))
            labels = torch.as_tensor(row.get("labels", ids)).long()
        is_aligned = "labels" not in row or not self.seq2seq  # one label per token
        fits = mask.shape == ids.shape and (labels.shape == ids.shape or not is_aligned)
        if not fits or ids.dim() != 1 or labels.dim() != 1:
            shapes = [list(x.shape) for x in (labels, mask, ids)]
            raise InputError(f"{where}: labels, attention_mask and input_ids have the shapes "
                             f"{shapes}; give one number per token in each")
        if is_aligned:
            labels = labels[mask > 0]
        ids = ids[mask > 0]
        truncated = ""
        if self.max_length is not None:
            is_start = self.truncation_mode == "keep_start"
            kept = slice(self.max_length) if is_start else slice(-self.max_length, None)
            ids, labels = ids[kept], labels[kept]
            truncated = f" after truncation to max_length={self.max_length}"
        targets = labels if self.seq2seq else labels[1:]  # nothing predicts the first token
        if len(ids) == 0 or not (targets != IGNORE).any():
            raise InputError(f"{where} has no label to train on{truncated}: leave the row out")
        length = max(len(ids), len(labels))
        if length > self.positions:
            raise InputError(f"{where} has {length} tokens, and the model takes {self.positions}: "
                             "set max_length")
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def tokenize(self, text, where):
        """Tokenize a text, truncated to max_length inside the tokenizer's special tokens."""
        if self.tokenizer is None:
            raise InputError(f"{where}: a text needs a tokenizer; pass tokenizer= to "
                             "IterativeSFTTrainer, or give input_ids")
        if not isinstance(text, str):
            raise InputError(f"{where} must be a string, not a {type(text).__name__}")
        truncation = {}
        if self.max_length is not None:
            truncation = {"truncation": True, "max_length": self.max_length}
        return self.text_tokenizer(text, verbose=False, **truncation).input_ids

    def make_batch(self, rows):
        """Collate rows of `make_row` into LongTensors [B, T], a causal model's padded on the right.

        On the left, padding would shift positions and enter the state of a recurrent model."""
        names = ("input_ids", "attention_mask", "labels")
        if self.row_collator is None:
            return collate(rows, getattr(self.tokenizer, "pad_token_id", None) or 0)
        with explain("data_collator failed"):
            if type(self.row_collator) is DataCollatorForLanguageModeling:
                batch = self.row_collator([{name: row[name] for name in names[:2]} for row in rows])
                batch["labels"] = torch.full_like(batch["input_ids"], IGNORE)
                labels = torch.cat([row["labels"] for row in rows])
                batch["labels"][batch["attention_mask"] > 0] = labels
            else:
                batch = self.row_collator(rows)
            is_padded_left = not batch["attention_mask"][:, 0].all()
            if is_padded_left and not self.seq2seq:
                order = batch["attention_mask"].argsort(dim=1, descending=True, stable=True)
                batch = {**batch, **{name: batch[name].gather(1, order) for name in names}}
        return batch

    def evaluation_batch(self, rows):
        """Collate rows of an evaluation set. Raises InputError."""
        for row in rows:
            if "input_ids" not in row and "text" not in row:
                raise InputError(f"eval_dataset has the columns {[*row]}: give input_ids "
                                 "(attention_mask, labels) or text (text_labels)")
        return self.make_batch([self.make_row(row, "a row of eval_dataset") for row in rows])

    # ------------------------------------------------------------------ callbacks and evaluation
    def call_back(self, event):
        """Tell the callbacks of an event, such as on_step_end; they set the flags of control."""
        self.control = getattr(self.callback_handler, event)(self.args, self.state, self.control)

    def start(self):
        """Tell the callbacks that training begins. `step` does so in its first call."""
        if self.has_started:
            return
        self.has_started = True
        self.start_time = time.time()
        self.first_step = self.state.global_step
        self.call_back("on_train_begin")
        if self.args.eval_on_start and self.state.global_step == 0:
            self.evaluate()

    def log_evaluate_save(self, loss, grad_norm, learning_rate, is_end, metrics):
        """Log, evaluate and save after an optimizer step, if due; metrics at the end of a call."""
        self.losses["sum"] += loss
        self.losses["not_logged"].append(loss)
        if is_end:
            self.call_back("on_epoch_end")
        if self.control.should_log:
            losses = self.losses["not_logged"]
            self.log({"loss": sum(losses) / len(losses), "grad_norm": grad_norm,
                      "learning_rate": learning_rate})
            self.losses["not_logged"] = []
        if is_end and metrics:
            self.log(dict(metrics))
        if self.control.should_evaluate:
            self.evaluate_and_compare()
        if self.control.should_save:
            self.save_checkpoint()

    def finish(self):
        """End training, once: log the mean loss, load the best model if asked, tell the callbacks.

        `step` does so when training ends. Call it for a run that was killed just before."""
        if self.has_finished:
            return
        self.start()
        self.has_finished = True
        steps = self.state.global_step
        metrics = speed_metrics("train", self.start_time, num_steps=steps - self.first_step)
        self.log({**metrics, "train_loss": self.losses["sum"] / max(steps, 1)})
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            best = self.state.best_model_checkpoint
            here = Path(self.args.output_dir, Path(best).name)  # if the run's folder was moved
            self.load_state(here if here.is_dir() else best)
        if self.noise_hook is not None:
            deactivate_neftune(self.model, self.noise_hook, self.accelerator)
        self.call_back("on_train_end")

    def evaluate_and_compare(self):
        """Evaluate, note the best model so far, and step a schedule that waits for the metric."""
        args = self.args
        state = self.state
        metrics = self.evaluate()
        if args.metric_for_best_model is None:
            return
        name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        if name not in metrics:
            raise InputError(f"metric_for_best_model={args.metric_for_best_model}: the evaluation "
                             f"gives {', '.join(metrics)}; choose one of them")
        if self.schedule_waits:
            self.lr_scheduler.step(metrics[name])
        sign = 1 if args.greater_is_better else -1
        is_best = state.best_metric is None or sign * metrics[name] > sign * state.best_metric
        if is_best:
            state.best_metric = metrics[name]
            state.best_global_step = state.global_step
        if args.save_strategy == "best":
            self.control.should_save = is_best

    # ------------------------------------------------------------------ checkpoints
    def save_checkpoint(self):
        """Write checkpoint-<global_step> to the output folder. Call on every rank."""
        args = self.args
        state = self.state
        if state.best_global_step == state.global_step:
            path = Path(args.output_dir, f"checkpoint-{state.global_step}")
            state.best_model_checkpoint = str(path)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                state.stateful_callbacks[type(callback).__name__] = callback.state()
        with machinery.new_checkpoint(self.accelerator, args.output_dir, state.global_step,
                                      self.own_checkpoints, args.save_total_limit,
                                      state.best_model_checkpoint) as folder:
            with common.tied_weights_once(self.model):
                weights = self.accelerator.get_state_dict(self.model_wrapped)
            with common.only_what_trains(self.model):
                self.accelerator.save_state(str(folder))
            if self.is_world_process_zero():
                model = self.accelerator.unwrap_model(self.model_wrapped)
                model.save_pretrained(folder, state_dict=weights)
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(folder)
                state.save_to_json(str(folder / "trainer_state.json"))
                (folder / "losses.json").write_text(json.dumps(self.losses))
        self.call_back("on_save")

    def load_checkpoint(self, path):
        """Resume from a checkpoint-<n>, or the newest in a run's folder. Raises InputError.

        Call before the first `step`. Restores weights, optimizer, schedule, random numbers and
        counters."""
        path = machinery.newest_checkpoint(path)
        self.own_checkpoints = machinery.checkpoints_up_to(path)
        with explain(f"checkpoint {path} can't be loaded; give an older one, or start again"):
            state = TrainerState.load_from_json(str(Path(path, "trainer_state.json")))
            self.losses = json.loads(Path(path, "losses.json").read_text())
            self.load_state(path)
        self.use_state(state)

    def load_state(self, path):
        """Load weights, optimizer, schedule and random numbers."""
        if not self.is_fsdp_enabled:
            model = self.accelerator.unwrap_model(self.model_wrapped)
            if hasattr(model, "peft_config"):
                from peft import load_peft_weights, set_peft_model_state_dict
                set_peft_model_state_dict(model, load_peft_weights(str(path), device="cpu"))
            else:
                saved = type(model).from_pretrained(path, dtype=model.dtype)
                model.load_state_dict(saved.state_dict())
        with common.only_what_trains(self.model):
            self.accelerator.load_state(str(path))


# TrainingArguments that need Trainer's own loop
UNSUPPORTED = ("auto_find_batch_size", "debug", "enable_jit_checkpoint", "parallelism_config",
               "include_num_input_tokens_seen", "restore_callback_states_from_checkpoint",
               "save_on_each_node", "save_only_model", "torch_empty_cache_steps",
               "use_liger_kernel")


def check_arguments(args, eval_dataset):
    """Raise InputError for TrainingArguments that IterativeSFTTrainer cannot honor."""
    for name in UNSUPPORTED:
        if getattr(args, name) not in (None, False, "no", "", []):
            raise InputError(f"{name}={getattr(args, name)}: IterativeSFTTrainer does not support "
                             "it; leave it out")
    if args.eval_strategy != "no" and eval_dataset is None:
        raise InputError(f"eval_strategy={args.eval_strategy.value}: there is nothing to evaluate "
                         "on; give eval_dataset")
    if args.push_to_hub and args.hub_strategy != "end":
        raise InputError(f"hub_strategy={args.hub_strategy.value}: no checkpoint is pushed; give "
                         "hub_strategy=end, and save_model pushes the final model")
    if args.max_steps <= 0 and 0 < args.warmup_steps < 1:
        raise InputError(f"warmup_steps={args.warmup_steps} is a fraction of max_steps: give "
                         "max_steps too, or a number of steps")


def check_columns(columns):
    """Check the columns given to `step`. Returns input_ids or texts. Raises InputError."""
    if ("input_ids" in columns) == ("texts" in columns):
        raise InputError(f"input_ids, texts: give one of them to step, got {[*columns]}")
    name = "texts" if "texts" in columns else "input_ids"
    partners = ("texts_labels",) if name == "texts" else ("attention_mask", "labels")
    for other, rows in columns.items():
        if other not in (name, *partners):
            raise InputError(f"{other} does not go with {name}: leave it out")
        if isinstance(rows, str) or not isinstance(rows, Sequence):  # a datasets.Column is one
            raise InputError(f"{other} is a {type(rows).__name__}: give a list, one entry per row")
        if len(rows) != len(columns[name]):
            raise InputError(f"{other}: {name} has {len(columns[name])} entries, {other} has "
                             f"{len(rows)}; give one entry per row")
    if not columns[name]:
        raise InputError(f"{name} is empty: give at least one row")
    return name


def collate(rows, pad_token_id):
    """Pad rows on the right into a batch of LongTensors [B, T]."""
    padding = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORE}
    return {name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
            for name, value in padding.items()}


# ----------------------------------------------------------------------------- sampling, scoring
def draw_prompts(prompts, index, count, seed):
    """Return the index-th `count` prompts of an endless stream.

    The stream has all prompts in random order, then again in another order, and so on."""
    drawn = []
    for place in range(index * count, (index + 1) * count):
        epoch, i = divmod(place, len(prompts))
        if not drawn or i == 0:
            generator = torch.Generator().manual_seed(seed + epoch)
            order = torch.randperm(len(prompts), generator=generator).tolist()
        drawn.append(prompts[order[i]])
    return drawn


def sample_responses(trainer, prompts, n):
    """Sample n responses to each of P prompts. Returns P lists of n LongTensors.

    A response ends with its first end token. It is drawn from softmax(logits / temperature),
    whatever settings for chats the model has."""
    config = trainer.args
    queries = [torch.tensor(prompt["input_ids"]) for prompt in prompts for _ in range(n)]
    with unsharded(trainer.model):
        responses = chats.generate(
            trainer.model, queries, trainer.tokenizer, config.generation_batch_size,
            config.temperature, do_sample=True, max_new_tokens=config.max_new_tokens,
            use_cache=True)
    start = int(trainer.seq2seq)  # the decoder's start token is no part of the response
    return common.split([response[start:].cpu() for response in responses], n)


def score_responses(trainer, reward, prompts, responses):
    """Score n responses to each of P prompts, [P, n]. Raises InputError."""
    repeated = [prompt for prompt, group in zip(prompts, responses, strict=True) for _ in group]
    columns = {name: [prompt[name] for prompt in repeated] for name in repeated[0]}
    flat = [response for group in responses for response in group]
    inputs = chats.reward_inputs(trainer.tokenizer, columns, flat, trainer.seq2seq)
    scores = reward(**inputs)
    for value, text in zip(scores, inputs["texts"], strict=True):
        if not math.isfinite(value):
            raise InputError(f"reward_model gives {value.item()} to {text!r}: scores must be "
                             "finite; check the reward function")
    return torch.stack(scores).view(len(prompts), -1)


def score_metrics(trainer, scores, best):
    """Compute mean and deviation of the scores, and the mean of the best, over all ranks."""
    kept = scores.gather(1, best)
    scores, kept = (trainer.accelerator.gather(x.to(trainer.args.device)) for x in (scores, kept))
    std = scores.std() if scores.numel() > 1 else torch.zeros(())
    return {"objective/scores": scores.mean().item(), "objective/scores_std": std.item(),
            "objective/scores_best": kept.mean().item()}


# ----------------------------------------------------------------------------- the script
def show_samples(trainer, reward, prompts, title):
    """Print and keep the policy's responses to a few prompts."""
    torch.manual_seed(trainer.args.seed)
    responses = sample_responses(trainer, prompts, 1)
    scores = score_responses(trainer, reward, prompts, responses)
    samples = []
    for prompt, group, score in zip(prompts, responses, scores[:, 0].tolist(), strict=True):
        text = trainer.tokenizer.decode(group[0], skip_special_tokens=True)
        samples.append({"update": trainer.state.global_step, "query": prompt["shown"],
                        "response": text, "score": score})
    if trainer.is_world_process_zero():
        machinery.log_samples(trainer.args.output_dir, title, samples)


def plan_steps(config):
    """Return max_steps and save_steps, in whole rounds (unless max_steps ends the run sooner)."""
    rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    steps_per_round = math.ceil(config.prompts_per_round * config.num_best / rows_per_step)
    keeps_best = config.load_best_model_at_end or config.save_strategy == "best"
    if keeps_best and config.eval_strategy == "steps" and config.eval_steps % steps_per_round:
        raise InputError(f"eval_steps={config.eval_steps}: checkpoints, also the best model's, are "
                         f"written at the end of a round, which has {steps_per_round} optimizer "
                         f"steps; give a multiple of {steps_per_round}")
    max_steps = math.ceil(config.num_train_epochs) * steps_per_round
    if config.max_steps > 0:
        max_steps = min(config.max_steps, max_steps)
    save_steps = config.save_steps
    if save_steps < 1:  # a fraction of the run
        save_steps *= max_steps
    return max_steps, math.ceil(save_steps / steps_per_round) * steps_per_round


def main(config: IterativeSFTConfig):
    """Fine-tune a language model on the best of its own responses, round after round.

    Returns the last round's statistics."""
    out, checkpoint = machinery.start_run(config)
    tokenizer, model = machinery.load_language_model(
        config.model_name or str(TOY / "model"), **machinery.loading_arguments(config))
    machinery.use_few_threads(model)
    longest = machinery.longest_prompt(model, config.max_new_tokens)
    dataset = config.query_dataset or TOY / "prompts.jsonl"
    prompts = machinery.load_prompts(
        dataset, tokenizer, config.max_query_length, longest,
        split=config.dataset_split, config=config.dataset_config)
    held_out = machinery.load_eval_rows(config, dataset)
    config = copy.copy(config)
    config.max_steps, config.save_steps = plan_steps(config)
    journal = machinery.Journal(out, ("sampling", "learning"), rows=prompts)
    trainer = IterativeSFTTrainer(model, config, tokenizer, eval_dataset=held_out,
                                  callbacks=[journal])
    trainer.remove_callback(ProgressCallback)  # the Journal has a bar
    for row in held_out or []:
        trainer.evaluation_batch([row])  # find a bad row before the training
    reward = chats.load_reward(config.reward_model or TOY / "reward", config.reward_label,
                               trainer.args.device,
                               trust_remote_code=config.trust_remote_code)
    if checkpoint:
        trainer.load_checkpoint(checkpoint)
        if trainer.state.global_step < config.max_steps and trainer.state.epoch % 1:
            raise InputError(f"resume_from_checkpoint={checkpoint}: it was written within a round, "
                             "whose responses are gone; give another one")
    else:
        show_samples(trainer, reward, prompts[:8], "before training")

    trainer.start()
    stats = {}
    while trainer.state.global_step < config.max_steps and not trainer.control.should_training_stop:
        stats = train_round(trainer, reward, prompts)
    trainer.finish()  # of a run that was killed after its last checkpoint, too
    show_samples(trainer, reward, prompts[:8], "after training")
    if held_out:
        stats.update(trainer.evaluate())
    trainer.save_model(str(out))
    if trainer.is_world_process_zero():
        sources = {"prompts": config.query_dataset or "toy/prompts.jsonl",
                   "reward": config.reward_model or "toy/reward"}
        newest = {name: value for row in trainer.state.log_history for name, value in row.items()}
        machinery.write_model_card(out, "A language model fine-tuned on its own best responses",
                                   config, sources, newest)
    return stats


if __name__ == "__main__":
    machinery.run(main, IterativeSFTConfig, own="--gradient-accumulation-steps 4",
                  lora="--learning-rate 1e-4 --torch-dtype bfloat16",
                  toy="--learning-rate 1e-4 --num-train-epochs 80 --max-new-tokens 24 "
                      "--per-device-train-batch-size 32 --per-device-eval-batch-size 8 "
                      "--generation-batch-size 256 --no-gradient-checkpointing")
