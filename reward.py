"""Reward modelling: a classifier with one output learns from pairs of texts which of two a person prefers.

Papers: Bradley and Terry 1952, "Rank Analysis of Incomplete Block Designs", the model; Ziegler et al. 2019 (arXiv:1909.08593)
and Ouyang et al. 2022 (arXiv:2203.02155), its use for language models; Touvron et al. 2023, "Llama 2" (arXiv:2307.09288,
equation 2), the margin; Eisenstein et al. 2023 (arXiv:2312.09244), the centring of rewards.

The chosen text y_c and the rejected text y_r (each with its prompt x) get the scores r_c = r(x, y_c) and r_r = r(x, y_r),
read at the last token of each. A judge is taken to prefer y_c with probability sigmoid(r_c - r_r), so the loss is

    L = - log sigmoid(r_c - r_r - m)

with a margin m that may be given with a pair and is 0 otherwise. Only differences of scores are learnt: the scores' mean is
whatever it comes to, unless `center_rewards_coefficient` c adds  c (r_c + r_r)^2.

Departures from TRL 0.7.10, whose names, arguments and numbers these are:
  1. Both sides go through the model in one forward pass, packed: short texts share a row, so that little is padding.
     (Texts in a row can't see each other. Each model is asked once whether that holds for it; if not, rows are padded.)
  2. A score is read at a text's last token that is not padding, known from the mask, even where the end token also pads.
  3. Each pair has its own margin. Ties count neither as right nor as wrong. `max_length` cuts.
  4. Rows may be text or chats, and rewards, margins and accuracy are logged in training too, over all ranks.
  5. A gradient is the mean over all pairs of the optimizer step, however they fall into micro-batches and ranks.
  6. LoRA trains with gradient checkpointing, and its adapter is saved with the head.
  7. `label_smoothing_factor` is the share of pairs thought to be labelled the wrong way round.

    torchrun reward.py                                     one process
    torchrun --nproc_per_node 8 reward.py --model-name my/model --dataset pairs.jsonl --bf16

With nothing but the first command a tiny model learns which of two film reviews is kinder: see docs/reward.md. Its output
folder is what `ppo.py --reward-model` takes.
"""
import copy
import json
import math
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field, make_dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from datasets import Dataset, IterableDataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForSequenceClassification, ProgressCallback, Trainer, TrainingArguments

from common import (TOY, InputError, Journal, base_of, check_finite, explain, last_evaluation, load_pretrained, load_rows,
                    load_tokenizer, lora_config, prepare_process, run, set_seed, trainer_checkpoint, with_adapter,
                    with_padding, writable_folder, write_model_card)

SIDES = ("chosen", "rejected")
COLUMNS = [f"{kind}_{side}" for side in SIDES for kind in ("input_ids", "attention_mask")]


# ------------------------------------------------------------------------------------------------ configuration
# Fields of 0.7.10's RewardConfig that transformers 5 has retired: documented default, then what another value means
# today: the fields to set, as a function of the value, or (text) why it is refused and what to use instead.
RETIRED = {
    "overwrite_output_dir": (False, "a run always writes over what is in output_dir; remove the folder if none of it is to stay"),
    "evaluation_strategy": ("no", lambda v: {"eval_strategy": v}),
    "per_gpu_train_batch_size": (None, lambda v: {"per_device_train_batch_size": v}),
    "per_gpu_eval_batch_size": (None, lambda v: {"per_device_eval_batch_size": v}),
    "warmup_ratio": (0.0, lambda v: {"warmup_steps": v}),  # below 1 it is a share of all steps
    "logging_dir": (None, "set the environment variable TENSORBOARD_LOGGING_DIR"),
    "save_safetensors": (True, "weights are always saved as safetensors; torch.save(model.state_dict(), ...) makes the old file"),
    "no_cuda": (False, lambda v: {"use_cpu": v}),
    "use_mps_device": (False, "Apple's GPU is used wherever there is one; use_cpu keeps off it"),
    "jit_mode_eval": (False, "use torch_compile"),
    "use_ipex": (False, "torch itself has those optimisations; use bf16 or torch_compile"),
    "fp16_opt_level": ("O1", "apex is gone; fp16 or bf16 is torch's own mixed precision, which is O1"),
    "half_precision_backend": ("auto", "torch's own mixed precision is the only one; choose fp16 or bf16"),
    "tpu_num_cores": (None, "start the script with torch_xla's launcher, which takes the number of cores"),
    "tpu_metrics_debug": (False, lambda v: {"debug": "tpu_metrics_debug"}),
    "past_index": (-1, "a reward model has no memory between batches; leave it out"),
    "fsdp_min_num_params": (0, lambda v: {"fsdp_config": {"min_num_params": v}}),
    "fsdp_transformer_layer_cls_to_wrap": (None, lambda v: {"fsdp_config": {"transformer_layer_cls_to_wrap": v}}),
    "adafactor": (False, lambda v: {"optim": "adafactor"}),
    "group_by_length": (False, lambda v: {"train_sampling_strategy": "group_by_length"}),
    "use_legacy_prediction_loop": (False, "there is one prediction loop; leave it out"),
    "include_inputs_for_metrics": (False, lambda v: {"include_for_metrics": ["inputs"]}),
    "fp16_backend": ("auto", "torch's own mixed precision is the only one; choose fp16 or bf16"),
    "push_to_hub_model_id": (None, lambda v: {"hub_model_id": v}),
    "push_to_hub_organization": (None, "put it before the name: hub_model_id='organization/name'"),
    "push_to_hub_token": (None, lambda v: {"hub_token": v}),
    "mp_parameters": ("", "SageMaker's model parallelism is gone; use fsdp or deepspeed"),
    "torchdynamo": (None, lambda v: {"torch_compile": True, "torch_compile_backend": v}),
    "ray_scope": ("last", "set the environment variable RAY_SCOPE"),
    "dispatch_batches": (None, lambda v: {"accelerator_config": {"dispatch_batches": v}}),
    "split_batches": (False, lambda v: {"accelerator_config": {"split_batches": v}}),
    "include_tokens_per_second": (False, lambda v: {"include_num_input_tokens_seen": "all"}),
}
TYPES = {"per_gpu_train_batch_size": int, "per_gpu_eval_batch_size": int, "tpu_num_cores": int, "dispatch_batches": bool}
Retired = make_dataclass("Retired", [
    (name, Annotated[Optional[TYPES.get(name, str)] if default is None else type(default), tyro.conf.Suppress],
     field(default=default)) for name, (default, _) in RETIRED.items()])


@dataclass
class RewardConfig(Retired, TrainingArguments):
    """transformers.TrainingArguments, whose documentation holds (sizes are per process), as 0.7.10 documents it: its retired
    fields, in the table above, still mean what they meant. First the fields with a default or a meaning of their own."""

    output_dir: Optional[str] = None
    """Where the run's files go. None: trainer_output."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, a third more time."""
    max_length: Optional[int] = None
    """Texts are cut to their first tokens, so many. None: what the tokenizer and the model take."""
    label_smoothing_factor: float = 0.0
    """The share of pairs that are thought to be labelled the wrong way round, 0 to 0.5. At 0.5 the labels say nothing and the
    margins all: the difference of two scores is drawn to the pair's margin."""
    report_to: Union[None, str, list[str]] = "none"
    """Trackers: tensorboard, wandb, ..., beside metrics.jsonl. None: none."""

    # not in 0.7.10
    center_rewards_coefficient: Optional[float] = None
    """c: weight of (r_c + r_r)^2, which draws the mean of the scores to 0 (0.01 is usual). None: not drawn."""
    dataset_num_proc: Optional[int] = None
    """Processes that tokenise."""

    # the script's own
    model_name: Optional[str] = None
    """A hub name or a folder: a language model, which gets a fresh head, a classifier with one label, or a LoRA adapter of
    either. None: a toy classifier that has learnt nothing yet."""
    dataset: Optional[str] = None
    """Pairs: a .jsonl/.json/.csv/.parquet file, a folder or a hub name, with columns chosen and rejected and, if they are
    answers, prompt; texts or chats; or four columns of token numbers (input_ids_chosen, ...). margin is optional. None:
    the toy pairs."""
    eval_dataset: Optional[str] = None
    """The same, held out. None: the toy's test pairs with the toy's data, else no evaluation."""
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the weights. Weights that are trained want float32 (with --bf16); LoRA's base model may be bfloat16."""
    lora_r: int = 0
    """Rank of a fresh LoRA adapter on all linear layers. 0: train all weights."""
    lora_alpha: int = 16
    """LoRA's scale is lora_alpha / lora_r."""

    def __post_init__(self):
        for name, (default, today) in RETIRED.items():
            value = getattr(self, name)
            if value == default:
                continue
            if isinstance(today, str):
                raise InputError(f"{name}={value!r} can mean nothing in transformers 5: {today}")
            for field_name, translated in today(value).items():
                self._translate(name, field_name, translated)
        if self.max_length is not None and self.max_length < 1:
            raise InputError(f"max_length={self.max_length} leaves nothing of a text: give 1 or more, or None")
        if not 0 <= self.label_smoothing_factor <= 0.5:
            raise InputError(f"label_smoothing_factor={self.label_smoothing_factor}: give 0 to 0.5")
        self.report_to = "none" if self.report_to is None else self.report_to
        if self.activation_checkpointing is None:  # today's name, spelt here to spare the warning about the old one
            self.activation_checkpointing = self.gradient_checkpointing
        if self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        super().__post_init__()

    def _translate(self, old, new, value):
        """Sets field `new` to what `old` asks for; dicts are joined. Raises InputError where both are given and differ."""
        given = getattr(self, new)
        default = type(self).__dataclass_fields__[new].default
        if isinstance(value, dict):
            if isinstance(given, str):
                raise InputError(f"{old} and {new}={given!r} are both given: put {value} into that file")
            value = {**(given or {}), **value}
        elif given not in (default, value) and isinstance(given, (str, bool, int, float)):
            raise InputError(f"{old} (retired) and {new}={given!r} say different things: give {new} alone")
        setattr(self, new, value)


@dataclass
class ScriptConfig(RewardConfig):
    """RewardConfig, with what the script does where no flag says otherwise: settings for small models."""

    output_dir: Optional[str] = "runs/reward"
    """Where the run's files go."""
    learning_rate: Optional[float] = None
    """AdamW's learning rate. None: 2e-3 x sqrt(1e5 / number of weights), which is 2e-3 for the toy model and 7.6e-6 for one of
    7 billion."""
    weight_decay: float = 1.0
    """Shrinks all matrices by learning rate x weight_decay at each step: of a few noise-free pairs a small model would else
    learn the wording by heart."""
    per_device_train_batch_size: int = 64
    """Pairs of one forward and backward pass, per process."""
    per_device_eval_batch_size: int = 64
    """Pairs of one evaluation pass, per process."""
    num_train_epochs: float = 16
    """Passes over the pairs."""
    lr_scheduler_type: str = "cosine"
    """How the learning rate falls."""
    logging_steps: float = 10
    """Optimizer steps between two lines of metrics.jsonl."""
    eval_strategy: str = "epoch"
    """When to evaluate (no, steps, epoch), where there is an evaluation set."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    remove_unused_columns: bool = False
    """Only the columns of pairs are kept, in any case."""

    def __post_init__(self):
        if self.learning_rate is not None:
            self.learning_rate = float(self.learning_rate)
        super().__post_init__()


# ------------------------------------------------------------------------------------------------ data
def chat_of(prompt, answer):
    """The messages {"role", "content"} of one side: an answer that begins before the assistant's turn is the whole
    conversation, to any other the prompt (messages, or the text of the user's) is put in front."""
    if answer and answer[0]["role"] == "assistant":
        return ([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []) + answer
    return answer


def encode(tokenizer, prompts, answers, max_length):
    """One side of some pairs -> token numbers, a list for each, as a scorer of texts will see them: the first max_length.

    Texts are joined to their prompts as they are, chats go through the tokenizer's template. Raises InputError."""
    if isinstance(answers[0], str):
        return tokenizer([(prompt or "") + answer for prompt, answer in zip(prompts, answers)], truncation=True,
                         max_length=max_length).input_ids
    if tokenizer.chat_template is None:
        raise InputError("the rows are chats and the tokenizer has no chat template: set tokenizer.chat_template, or give texts")
    chats = [chat_of(prompt, answer) for prompt, answer in zip(prompts, answers)]
    return [ids[:max_length] for ids in tokenizer.apply_chat_template(chats, tokenize=True, return_dict=False)]


def tokenize(batch, tokenizer, max_length):
    """A batch of rows {column: list} with chosen, rejected and perhaps prompt -> the four columns of token numbers."""
    rows = {}
    for side in SIDES:
        ids = encode(tokenizer, batch.get("prompt") or [None] * len(batch[side]), batch[side], max_length)
        rows[f"input_ids_{side}"], rows[f"attention_mask_{side}"] = ids, [[1] * len(row) for row in ids]
    return rows


def differs(row, max_length):
    """Whether the two sides are two texts, also once they are cut: equal ones teach nothing."""
    chosen, rejected = (row[f"input_ids_{side}"][:max_length] for side in SIDES)
    return len(chosen) > 0 and len(rejected) > 0 and list(chosen) != list(rejected)


@dataclass
class RewardDataCollatorWithPadding:
    """Rows with the four columns, and perhaps margin -> a batch: input_ids_chosen [B, T] and its attention_mask_chosen, the
    same of the rejected [B, T'], and margin [B] in float32.

    Padding stands on the right, whatever the tokenizer's side: many classifiers count positions from the row's start.
    padding: True, or "max_length" for rows of that width. max_length: rows are cut to their first tokens, so many.
    pad_to_multiple_of: widths are multiples of this. return_tensors: "pt" alone. Raises InputError.
    These are widths of the batch; what goes through the model, the trainer lays out by itself."""

    tokenizer: Any
    padding: Union[bool, str] = True
    max_length: Optional[int] = None
    pad_to_multiple_of: Optional[int] = None
    return_tensors: str = "pt"

    def __post_init__(self):
        if self.return_tensors != "pt" or self.padding in (False, "do_not_pad"):
            raise InputError(f"padding={self.padding!r}, return_tensors={self.return_tensors!r}: batches are padded torch tensors")

    def __call__(self, features):
        batch, pad = {}, {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0}
        for column in COLUMNS:
            if column not in features[0]:
                raise InputError(f"a row has the columns {list(features[0])} and lacks {column}")
            kind = column.rsplit("_", 1)[0]
            rows = pad_sequence([torch.as_tensor(row[column])[:self.max_length] for row in features], True, pad[kind])
            width = self.max_length if self.padding == "max_length" and self.max_length else rows.shape[1]
            multiple = self.pad_to_multiple_of or 1
            batch[column] = F.pad(rows, (0, math.ceil(width / multiple) * multiple - rows.shape[1]), value=pad[kind])
        if "margin" in features[0]:
            batch["margin"] = torch.tensor([float(row["margin"]) for row in features])
        return {**batch, "return_loss": True}  # what tells Trainer that a loss can be had without labels


# ------------------------------------------------------------------------------------------------ the mathematics
def preference_loss(chosen, rejected, margin=0.0, smoothing=0.0, centering=0.0):
    """Scores [B] of chosen and rejected texts, margins [B] or a number -> the loss of each pair [B].

    p(chosen is preferred) = sigmoid(r_c - r_r)                                             (Bradley and Terry 1952)"""
    difference = chosen - rejected - margin                                               # Llama 2, equation 2
    loss = -(1 - smoothing) * F.logsigmoid(difference) - smoothing * F.logsigmoid(-difference)
    return loss + centering * (chosen + rejected) ** 2                                    # Eisenstein et al. 2023, section 2


def compute_accuracy(eval_pred):
    """(predictions [N, 2] of chosen and rejected, labels) -> {"accuracy": share of pairs whose chosen text is above}.

    Ties are left out; where all are ties it is 0.5, as by chance."""
    chosen, rejected = np.asarray(eval_pred[0]).T
    decided = chosen != rejected
    return {"accuracy": float((chosen > rejected)[decided].mean()) if decided.any() else 0.5}


def pair_metrics(chosen, rejected, n, decided, right):
    """Sums over n pairs -> their mean scores, margin and, over the pairs that are no ties, accuracy."""
    return {"rewards/chosen": chosen / n, "rewards/rejected": rejected / n, "rewards/margins": (chosen - rejected) / n,
            "rewards/accuracies": right / decided if decided else 0.5}


def sums(chosen, rejected):
    """Scores [B] -> what pair_metrics takes, as a tensor [5] that adds up over batches and ranks."""
    return torch.stack([chosen.sum(), rejected.sum(), torch.ones_like(chosen).sum(),
                        (chosen != rejected).sum(), (chosen > rejected).sum()]).float()


# ------------------------------------------------------------------------------------------------ one pass, no padding
def fill_rows(lengths, width):
    """Texts of these lengths (all chosen, then all rejected) -> rows of texts, in which each fits beside those before it.

    The longest text that still fits comes next, and after it the other side of its pair. So the gradients of a pair stand
    next to each other in memory, and what they have in common cancels to the last bit: a final norm's bias, which moves
    all scores alike, gets a gradient of exactly 0 and not rounding errors, which Adam would make whole steps of."""
    rows, free, left = [[]], width, sorted(range(len(lengths)), key=lambda text: -lengths[text])
    while left:
        first = next((text for text in left if lengths[text] <= free), left[0])
        for text in (first, (first + len(lengths) // 2) % len(lengths)):
            if lengths[text] > free:
                rows.append([])
                free = width
            rows[-1].append(text)
            free -= lengths[text]
            left.remove(text)
    return rows


def lay_out(lengths, packing):
    """Texts of these lengths (all chosen, then all rejected) -> where their tokens stand, in rows of one text each or
    (packing) of as many as fit, in rows up to twice as wide as the longest text where that leaves less padding:

    index [R, W]      which token of all texts, laid end to end, stands here (padding: the first)
    positions [R, W]  place within the text; padding comes after all texts of a row, where a causal model can't see it
    real [R, W]       False where there is padding
    ends [R, K]       column of the last token of a row's k-th text (0 where there is none)
    place [n]         where in `ends` a text is, as row * K + k"""
    longest = width = max(lengths)
    rows = [[i + side] for i in range(len(lengths) // 2) for side in (0, len(lengths) // 2)]
    if packing:
        choices = [(fill_rows(lengths, w), w) for w in np.linspace(longest, 2 * longest, 8).astype(int).tolist()]
        rows, width = min(choices, key=lambda choice: len(choice[0]) * choice[1])
    most = max(map(len, rows))
    starts = np.cumsum([0, *lengths])
    index, positions = np.zeros((2, len(rows), width), int)
    real, ends, place = np.zeros((len(rows), width), bool), np.zeros((len(rows), most), int), np.zeros(len(lengths), int)
    for r, texts in enumerate(rows):
        at = 0
        for k, text in enumerate(texts):
            n = lengths[text]
            index[r, at:at + n] = np.arange(starts[text], starts[text] + n)
            positions[r, at:] = np.arange(width - at).clip(max=longest - 1)
            at += n
            real[r, :at], ends[r, k], place[text] = True, at - 1, r * most + k
    return [torch.from_numpy(x) for x in (index, positions, real, ends, place)]


def score_head(model):
    """The linear layer that scores every token of a decoder, under the name that transformers gives it; None for the other
    classifiers (BERT, T5, ...), which choose a token themselves."""
    return getattr(model.get_base_model() if hasattr(model, "get_base_model") else model, "score", None)


@contextmanager
def scores_at(head, ends):
    """Inside, a classifier's logits are the scores at the columns `ends` [R, K] -> [R, K], not at one column of its choice.

    The head's own output [R, W, 1] becomes [R, W, K], the wanted scores at every column: whichever is chosen holds them.
    They leave the model by its front door, so any wrapper (DDP, FSDP, PEFT) sees what it expects."""
    def pick(module, args, logits):
        return logits.squeeze(-1).gather(1, ends)[:, None].expand(-1, logits.shape[1], -1)

    hook = head.register_forward_hook(pick)
    try:
        yield
    finally:
        hook.remove()


def score(model, head, tokens, lengths, packing, pad_token_id):
    """Scores of texts in one forward pass -> float32 [n].

    head: `score_head`; None: the model chooses the token itself. tokens: all texts end to end, [sum of lengths]."""
    index, positions, real, ends, place = (x.to(tokens.device) for x in lay_out(lengths, packing))
    ids = tokens[index] if packing else tokens[index].masked_fill(~real, pad_token_id)
    if head is None:
        logits = model(input_ids=ids, attention_mask=real.long()).logits
    else:
        where = {"position_ids": positions} if packing else {"attention_mask": real.long()}
        with scores_at(head, ends):
            logits = model(input_ids=ids, use_cache=False, **where).logits
    return logits.flatten()[place].float()


@torch.no_grad()
def keeps_texts_apart(model, pad_token_id):
    """Whether texts that share a row are scored as they are alone, and exactly alike whoever their neighbours are."""
    training = model.training
    model.eval()
    lengths, tokens = [5, 5, 3, 3], torch.arange(17, device=model.device)  # two rows of 5 + 3
    tokens = tokens[tokens != pad_token_id][:16]
    other = torch.cat([tokens[6:], tokens[10:]])  # other texts of 5 stand before the same texts of 3
    try:
        packed, again, alone = (score(model, score_head(model), ids, lengths, packing, pad_token_id)
                                for ids, packing in ((tokens, True), (other, True), (tokens, False)))
    except (TypeError, ValueError, RuntimeError, IndexError):  # the model takes no such batch
        return False
    finally:
        model.train(training)
    close = (packed - alone).abs().max() < 0.02 * alone.abs().max()  # rounding of half precision is below that
    return close.item() and torch.equal(packed[2:], again[2:]) and not torch.equal(packed[:2], again[:2])


# ------------------------------------------------------------------------------------------------ the trainer
class RewardTrainer(Trainer):
    """transformers.Trainer for the loss above. Its arguments are Trainer's, and these:

    model: a sequence classifier with one label (a PeftModel of one, to go on training its adapter).
    args: RewardConfig; None: its defaults. The trainer changes none of what it is given but the model.
    tokenizer (or processing_class): a tokenizer without pad token pads with its end-of-sequence token.
    train_dataset, eval_dataset (or a dict of them): a datasets.Dataset or a stream of rows as `tokenize` reads them, or with
        the four columns input_ids_chosen, attention_mask_chosen, input_ids_rejected, attention_mask_rejected; each may
        have a margin. Pairs whose sides are equal are left out. Other data sets hold finished rows.
    max_length: RewardConfig's, where that is not set.
    compute_metrics: None: compute_accuracy. It gets softmax([r_c, r_r]) [N, 2] and zeros.
    peft_config: puts a fresh adapter on the model; the head is trained and saved with it.

    Raises InputError, a ValueError."""

    def __init__(self, model=None, args=None, data_collator=None, train_dataset=None, eval_dataset=None, tokenizer=None,
                 model_init=None, compute_metrics=None, callbacks=None, optimizers=(None, None),
                 preprocess_logits_for_metrics=None, max_length=None, peft_config=None, processing_class=None):
        args = copy.copy(args) if args is not None else RewardConfig(output_dir="tmp_trainer")
        prepare_process(args)
        tokenizer = tokenizer or processing_class
        if tokenizer is None:
            raise InputError("RewardTrainer needs the model's tokenizer: pass tokenizer=")
        self.peft_config, self.tokenizer, self.custom_collator = peft_config, with_padding(tokenizer), data_collator is not None
        if args.remove_unused_columns and not self.custom_collator:
            warnings.warn("remove_unused_columns=True: of the data sets' columns only the pairs' and margin are kept; set it to False "
                          "to say that you know")
        model = self.made_ready(model, args) if model is not None else None
        super().__init__(model=model, args=args, model_init=model_init, compute_metrics=compute_metrics or compute_accuracy,
                         processing_class=self.tokenizer, callbacks=callbacks, optimizers=optimizers,
                         data_collator=data_collator, train_dataset=train_dataset, eval_dataset=eval_dataset,
                         preprocess_logits_for_metrics=preprocess_logits_for_metrics)
        self.max_length = self.longest_text(max_length)
        self.data_collator = data_collator or RewardDataCollatorWithPadding(self.tokenizer, max_length=self.max_length)
        self.train_dataset = self.prepare(train_dataset, "training")
        self.eval_dataset = self.prepare(eval_dataset, "evaluation")
        self.loss_is_scaled_for_ga = False  # compute_loss gives a mean for Trainer to average over micro-batches and ranks
        self.centering = getattr(args, "center_rewards_coefficient", None) or 0.0
        self.seen = torch.zeros(5, device=self.args.device)  # sums since the last line of the log, on this rank
        self.judged = []  # of the evaluation under way: score of chosen, of rejected, and loss, [B, 3] of all ranks
        whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled or args.torch_compile)  # and so can be asked now
        self.packing = whole and score_head(self.model) is not None and keeps_texts_apart(self.model, self.tokenizer.pad_token_id)

    def made_ready(self, model, args):
        """The model with one label, the tokenizer's padding in its config, and an adapter where one is asked for."""
        if model.config.num_labels != 1:
            raise InputError(f"the model's head has {model.config.num_labels} labels and a reward is one number: load the model with "
                             "num_labels=1")
        model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id  # a saved classifier finds a text's end by it
        if self.peft_config is None:
            return model
        from peft import TaskType
        peft_config = copy.deepcopy(self.peft_config)
        peft_config.task_type = TaskType.SEQ_CLS  # the head is trained, and saved with the adapter
        return with_adapter(model, peft_config, args.seed)

    def call_model_init(self, trial=None):
        return self.made_ready(super().call_model_init(trial), self.args)

    def longest_text(self, max_length):
        """max_length, as one of both places gives it, but no more than tokenizer and model take."""
        given = getattr(self.args, "max_length", None)
        if None not in (max_length, given) and max_length != given:
            raise InputError(f"max_length={max_length}, and in args {given}: give it once")
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return min(max_length or given or 10**9, self.tokenizer.model_max_length, positions or 10**9)

    def prepare(self, rows, name):
        """Rows of text, chats or tokens -> rows of tokens. A dict: each of its data sets. Any other type stays as it is."""
        if isinstance(rows, dict):
            return {key: self.prepare(value, key) for key, value in rows.items()}
        if not isinstance(rows, (Dataset, IterableDataset)):
            return rows
        columns = list(next(iter(rows), {}))
        if not columns:
            raise InputError(f"the {name} data set is empty")
        stream = isinstance(rows, IterableDataset)
        processes = {} if stream else {"num_proc": getattr(self.args, "dataset_num_proc", None)}
        with self.args.main_process_first(), explain(f"the {name} data set can't be tokenised"):
            if not set(COLUMNS) <= set(columns):
                if not set(SIDES) <= set(columns):
                    if self.custom_collator:
                        return rows
                    raise InputError(f"the {name} data set has the columns {columns}: it needs chosen and rejected (texts or chats, and "
                                     f"perhaps prompt), or {', '.join(COLUMNS)}")
                others = [column for column in columns if column != "margin"]
                rows = rows.map(tokenize, batched=True, remove_columns=others, **processes,
                                fn_kwargs={"tokenizer": self.tokenizer, "max_length": self.max_length})
            kept = rows.filter(differs, fn_kwargs={"max_length": self.max_length}, **processes)
            if "length" in self.args.train_sampling_strategy and not stream:
                kept = kept.map(lambda row: {self.args.length_column_name: sum(len(row[f"input_ids_{side}"]) for side in SIDES)})
        if not stream and len(kept) < len(rows):
            after = f"after their first {self.max_length} tokens"
            if not len(kept):
                raise InputError(f"of the {name} data set's {len(rows)} pairs none has two different sides {after}: raise max_length")
            if self.is_world_process_zero():
                print(f"{len(rows) - len(kept)} of {len(rows)} pairs of the {name} data set are left out: empty, or no different {after}")
        return kept

    def _set_signature_columns_if_needed(self):
        """The columns that Trainer does not remove: what the collator reads, not what the model's forward takes."""
        if self.custom_collator:
            return super()._set_signature_columns_if_needed()
        self._signature_columns = [*COLUMNS, "margin", self.args.length_column_name]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, and the number of pairs that it has on all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        pairs = torch.tensor(sum(len(batch["input_ids_chosen"]) for batch in batches), device=device)
        return batches, self.accelerator.reduce(pairs)

    def scores(self, model, texts, masks):
        """Scores [n] in one forward pass. texts, masks: of each side a batch of token numbers and where they are real."""
        masks = [mask.bool() for mask in masks]
        lengths = [n for mask in masks for n in mask.sum(1).tolist()]
        if min(lengths) == 0:
            raise InputError("a text of a pair has no token; remove the row, or its attention mask is wrong")
        tokens = torch.cat([ids[mask] for ids, mask in zip(texts, masks)])
        # a compiled model would keep the hook of its first call for ever
        head = None if self.args.torch_compile else score_head(self.accelerator.unwrap_model(model))
        return score(model, head, tokens, lengths, self.packing, self.tokenizer.pad_token_id)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss of the pairs -> scalar; with return_outputs also {"rewards_chosen", "rewards_rejected"} [B] and "losses".

        num_items_in_batch: pairs of the whole optimizer step on all ranks: a micro-batch then weighs by its share of them."""
        texts, masks = [[inputs[f"{kind}_{side}"] for side in SIDES] for kind in ("input_ids", "attention_mask")]
        chosen, rejected = self.scores(model, texts, masks).chunk(2)
        losses = preference_loss(chosen, rejected, inputs.get("margin", 0.0), self.args.label_smoothing_factor, self.centering)
        loss = losses.mean()
        if num_items_in_batch is not None:
            parts = self.current_gradient_accumulation_steps * self.accelerator.num_processes
            loss = losses.sum() * parts / num_items_in_batch  # Trainer divides by the one, DDP by the other
        if model.training:
            check_finite(loss, self.state.global_step)
            self.seen += sums(chosen.detach(), rejected.detach())
        return (loss, {"rewards_chosen": chosen, "rewards_rejected": rejected, "losses": losses}) if return_outputs else loss

    def log(self, logs, start_time=None):
        """Trainer's line, in training with the mean rewards, margin and accuracy since the last line, over all ranks."""
        if "loss" in logs:
            logs.update(pair_metrics(*self.accelerator.reduce(self.seen).tolist()))
            self.seen.zero_()
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """-> mean loss, softmax([r_c, r_r]) [B, 2], zeros [B] (the label: the first of both)."""
        inputs.update(self._prepare_inputs(inputs), input_ids=inputs["input_ids_chosen"])  # the last: what include_for_metrics shows
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        judged = torch.stack([outputs["rewards_chosen"], outputs["rewards_rejected"], outputs["losses"]], dim=1)
        self.judged.append(self.accelerator.gather_for_metrics(judged).cpu())
        if prediction_loss_only:
            return loss, None, None
        return loss, judged[:, :2].softmax(dim=1), torch.zeros_like(outputs["losses"])

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """Trainer's; the loss is the mean over pairs, and rewards, margin and accuracy are added."""
        self.judged = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        chosen, rejected, losses = torch.cat(self.judged).T
        means = pair_metrics(*sums(chosen, rejected).tolist())
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        output.metrics[f"{metric_key_prefix}_loss"] = losses.mean().item()
        self.judged = []
        return output

    def evaluate(self, eval_dataset=None, **kwargs):
        """Trainer's, on any rows that the constructor takes."""
        return super().evaluate(self.prepare(eval_dataset, "evaluation"), **kwargs)

    def predict(self, test_dataset, **kwargs):
        """Trainer's, on any rows that the constructor takes."""
        return super().predict(self.prepare(test_dataset, "test"), **kwargs)

    def _track_num_input_tokens(self, inputs):
        super()._track_num_input_tokens(both_sides(inputs))

    def floating_point_ops(self, inputs):
        return super().floating_point_ops(both_sides(inputs))


def both_sides(inputs):
    """A batch of pairs as one of texts, for what Trainer counts in it."""
    return {kind: torch.cat([inputs[f"{kind}_{side}"].flatten() for side in SIDES]) for kind in ("input_ids", "attention_mask")}


# ------------------------------------------------------------------------------------------------ the script
def load_classifier(name, dtype):
    """-> tokenizer, classifier of one label: a language model gets a fresh head, a classifier keeps its own (and with it, its
    number of labels); an adapter, on its base model, goes on training. Raises InputError."""
    with explain(f"model_name {name} can't be loaded"):
        tokenizer = load_tokenizer(name)
        kinds = AutoConfig.from_pretrained(base_of(name)).architectures or []
        head = {} if any("SequenceClassification" in kind for kind in kinds) else {"id2label": {0: "reward"}, "label2id": {"reward": 0}}
        return tokenizer, load_pretrained(AutoModelForSequenceClassification, name, True, dtype=dtype, **head)


@torch.no_grad()
def show_judgements(trainer, rows, title, out):
    """Prints and keeps the scores of both sides of a few pairs. Called on every rank."""
    batch = trainer._prepare_inputs(trainer.data_collator(list(rows)))
    trainer.model.eval()
    _, judged = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    if not trainer.is_world_process_zero():
        return
    print(f"\n{title}")
    with out.joinpath("samples.jsonl").open("a") as file:
        for i in range(len(judged["losses"])):
            row = {"update": trainer.state.global_step}
            for side in SIDES:
                row[side] = trainer.tokenizer.decode(batch[f"input_ids_{side}"][i][batch[f"attention_mask_{side}"][i].bool()])
                row[f"reward_{side}"] = judged[f"rewards_{side}"][i].item()
                print(f"  {side:>8} {row[f'reward_{side}']:+6.2f}  {row[side]}")
            file.write(json.dumps(row) + "\n")


def main(config: ScriptConfig):
    """Train a reward model on pairs of a chosen and a rejected text. Returns the metrics of the last evaluation."""
    out = Path(config.output_dir)
    checkpoint = config.resume_from_checkpoint and trainer_checkpoint(config.resume_from_checkpoint)
    writable_folder(out, fresh=not checkpoint)
    set_seed(config.seed)  # a fresh head is drawn alike on all ranks
    tokenizer, model = load_classifier(config.model_name or str(TOY / "blank_reward"), config.torch_dtype)
    weights = model.num_parameters()
    if weights < 10**6:
        torch.set_num_threads(1)  # handing out such small products to threads takes longer than they do
    if config.learning_rate is None:
        config.learning_rate = 2e-3 * math.sqrt(1e5 / weights)  # smaller models take larger steps
    rows = load_rows(config.dataset or TOY / "pairs.jsonl")
    held_out = config.eval_dataset or (None if config.dataset else TOY / "pairs_test.jsonl")
    if held_out is None:
        config.eval_strategy = "no"
    trainer = RewardTrainer(model, config, None, rows, held_out and load_rows(held_out), tokenizer,
                            callbacks=[Journal(out)], peft_config=lora_config(config, "SEQ_CLS"))
    trainer.remove_callback(ProgressCallback)  # the Journal has a bar
    shown = list(islice(trainer.eval_dataset or trainer.train_dataset, 4))
    if not checkpoint and model.device.type == config.device.type:  # a model to be sharded waits on the CPU
        show_judgements(trainer, shown, "before training", out)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if held_out:
        metrics = last_evaluation(trainer)
    show_judgements(trainer, shown, "after training", out)
    trainer.save_model(str(out))
    if trainer.is_world_process_zero():
        write_model_card(out, "A reward model: a classifier whose only logit is the score of a text, trained on pairs", config,
                         {"pairs": config.dataset or "toy/pairs.jsonl"}, metrics)
    return metrics


if __name__ == "__main__":
    run(main, ScriptConfig)
