"""Reward modeling: a classifier with one output learns which of two texts people prefer.

Papers: Bradley and Terry 1952, "Rank Analysis of Incomplete Block Designs", the model; Stiennon et
al. 2020 (arXiv:2009.01325) and Ouyang et al. 2022 (arXiv:2203.02155), its use for pairs of texts;
Touvron et al. 2023, "Llama 2" (arXiv:2307.09288, equation 2), the margin; Eisenstein et al. 2023
(arXiv:2312.09244), the centering. (Ziegler et al. 2019, arXiv:1909.08593, take the softmax over
four texts instead.)

A pair is a chosen text y_c and a rejected text y_r, each with its prompt x. Their scores are
r_c = r(x, y_c) and r_r = r(x, y_r). A decoder reads a score at the last token of a text, an encoder
such as BERT at the first. The model assumes that people prefer y_c with probability
sigmoid(r_c - r_r). The loss of a pair is

    L = -(1 - eps) log sigmoid(d) - eps log sigmoid(-d) + lambda (r_c + r_r)^2
    d = r_c - r_r - m

with the pair's margin m, the fraction eps of pairs labeled the wrong way round
(`label_smoothing_factor`), and the weight lambda of the centering (`center_rewards_coefficient`).
By default all three are 0, and L = -log sigmoid(r_c - r_r). (The margin keeps its sign in the eps
term.) L depends on differences only, so any function of the prompt can be added to the scores; the
centering pins it. Texts are scored as they are given: write an end token into them if the judged
texts have one.

transformers.Trainer calls `compute_loss`. Per optimizer step it does

    for batch in micro_batches:
        loss = compute_loss(model, batch) / len(micro_batches)
        loss.backward()
    clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step(); scheduler.step()
    model.zero_grad()

Start reading at `RewardTrainer.compute_loss`. Part 1 is the algorithm, Part 2 the machinery around
it.

The API, defaults and metrics follow TRL 0.7.10. Differences:
  1. Pairs of similar length go through the model together, padded on the right, with both texts
     of a pair next to each other.
  2. A decoder's score is read at the last token under the mask, even if the end token pads.
  3. Each pair has its own margin. TRL subtracts margins [B] from differences [B, 1], which compares
     each pair with all margins. Ties count neither as right nor as wrong.
  4. Rows may be texts or chats, and `max_length` truncates them. Rewards, accuracy and
     `rewards/margins` (TRL's name for the mean of r_c - r_r) are logged in training too, over all
     ranks.
  5. A gradient is the mean over all pairs of the optimizer step, however they are split into
     micro-batches and ranks.
  6. LoRA trains with gradient checkpointing, and its adapter is saved with the head.
  7. `label_smoothing_factor` has an effect: it is eps.

    torchrun reward.py                                     one process, the toy model
    torchrun --nproc_per_node 8 reward.py --model-name my/model --dataset pairs.jsonl --bf16

The first command trains a tiny model to find the more positive of two film reviews: see
docs/reward.md.
`ppo.py --reward-model` takes the output folder.
"""
import copy
import warnings
from dataclasses import dataclass, fields
from typing import Any, Literal, Optional, Union

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from datasets import Dataset, IterableDataset
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)

import common
from common import (
    TOY,
    InputError,
    RetiredArguments,
    check_finite,
    check_ranges,
    explain,
    read_settings,
)

SIDES = ("chosen", "rejected")
COLUMNS = [f"{kind}_{side}" for side in SIDES for kind in ("input_ids", "attention_mask")]
FORWARD_PASSES = 4  # per micro-batch: four groups of similar length need less padding than one
NO_LIMIT = 10**9


# =============================================================================
# Part 1, the algorithm: configuration, mathematics, the update
# =============================================================================

# ----------------------------------------------------------------------------- configuration
@dataclass
class RewardConfig(RetiredArguments, TrainingArguments):
    """List the settings of reward modeling, after transformers.TrainingArguments.

    Sizes are per process. Fields that transformers 5 has retired still mean what they meant."""

    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, more time."""
    max_length: Optional[int] = None
    """Truncate texts to this many tokens. None: the limit of tokenizer and model."""
    label_smoothing_factor: float = 0.0
    """eps: fraction of pairs assumed to be labeled the wrong way round, 0 to 0.5."""

    # not in 0.7.10
    center_rewards_coefficient: Optional[float] = None
    """lambda: weight of (r_c + r_r)^2, which centers the scores (often 0.01). None: 0."""
    dataset_num_proc: Optional[int] = None
    """Processes that tokenize. None: one."""

    # the script's own
    model_name: Optional[str] = None
    """Language model, classifier with one label, or LoRA adapter. None: the toy model."""
    dataset: Optional[str] = None
    """Pairs (columns chosen, rejected, perhaps prompt): file, folder or hub name. None: toy."""
    eval_dataset: Optional[str] = None
    """Held-out pairs. None: the toy's test pairs with the toy pairs, else no evaluation."""
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the weights; bfloat16 only for LoRA's base model."""
    lora_r: int = 0
    """Rank of a fresh LoRA adapter on all linear layers. 0: train all weights."""
    lora_alpha: int = 16
    """LoRA scale is lora_alpha / lora_r."""

    def __post_init__(self):
        check_ranges(self, {
            "(0, inf)": ("max_length", "dataset_num_proc", "per_device_train_batch_size",
                         "per_device_eval_batch_size", "gradient_accumulation_steps",
                         "num_train_epochs", "lora_alpha"),
            "[0, inf)": ("learning_rate", "weight_decay", "center_rewards_coefficient", "lora_r"),
            "[0, 0.5]": ("label_smoothing_factor",),
        })
        common.check_choices(self, {"torch_dtype": common.DTYPES})
        common.replace_retired(self)
        if self.report_to is None:
            self.report_to = "none"
        # the name in transformers 5; Trainer warns about the old one
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        if self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        super().__post_init__()


@dataclass
class ScriptConfig(RewardConfig):
    """List the script's own defaults of RewardConfig, which suit small models."""

    output_dir: Optional[str] = "runs/reward"
    """Output folder."""
    learning_rate: Optional[float] = None
    """AdamW's learning rate. None: 2e-3 x sqrt(1e5 / number of parameters)."""
    weight_decay: float = 1.0
    """AdamW's weight decay; high, so that a small model does not memorize a few pairs."""
    per_device_train_batch_size: int = 64
    """Pairs per micro-batch, per process."""
    per_device_eval_batch_size: int = 64
    """Pairs per evaluation batch, per process."""
    num_train_epochs: float = 16
    """Passes over the pairs."""
    lr_scheduler_type: str = "cosine"
    """Schedule of the learning rate."""
    logging_steps: float = 10
    """Optimizer steps per line of metrics.jsonl."""
    eval_strategy: str = "epoch"
    """When to evaluate, given an evaluation set: no, steps or epoch."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    remove_unused_columns: bool = False
    """No effect: the columns of pairs and their margin are kept, the others dropped."""


# ----------------------------------------------------------------------------- mathematics
# Shapes: B pairs of a batch, N pairs of an evaluation, n texts, T tokens of the longest text.
def preference_loss(chosen, rejected, margin=0.0, smoothing=0.0, centering=0.0):
    """Compute the loss per pair [B] from scores [B] and margins [B] (or one number).

        p(people prefer the chosen text) = sigmoid(r_c - r_r)     (Bradley and Terry 1952)

    smoothing: eps. centering: lambda."""
    difference = chosen - rejected - margin                       # Llama 2, equation 2
    loss = -(1 - smoothing) * F.logsigmoid(difference) - smoothing * F.logsigmoid(-difference)
    return loss + centering * (chosen + rejected) ** 2            # Eisenstein et al. 2023


def compute_accuracy(eval_pred):
    """Compute {"accuracy": the fraction of pairs whose chosen text has the higher score}.

    eval_pred: predictions [N, 2] of chosen and rejected, and labels, which are not used. Ties are
    left out; if all are ties, the accuracy is 0.5."""
    chosen, rejected = np.asarray(eval_pred[0]).T
    is_decided = chosen != rejected
    if not is_decided.any():
        return {"accuracy": 0.5}
    return {"accuracy": float((chosen > rejected)[is_decided].mean())}


# ----------------------------------------------------------------------------- padding
def unpad(inputs, side):
    """Return the texts of one side, a list of B id tensors [length]. Raises InputError."""
    mask = inputs[f"attention_mask_{side}"].bool()
    lengths = mask.sum(1).tolist()
    if min(lengths) == 0:
        raise InputError(f"attention_mask_{side}=0 (row {lengths.index(0)} of a batch): the text "
                         "has no token; remove the row, or correct its mask")
    return inputs[f"input_ids_{side}"][mask].split(lengths)


def choose_padding(texts, pad_token_id):
    """Return pad_token_id, or the smallest id that ends no text if one ends with pad_token_id."""
    last_tokens = torch.stack([text[-1] for text in texts]).tolist()
    if pad_token_id not in last_tokens:
        return pad_token_id
    return min(set(range(len(texts) + 1)) - set(last_tokens))


# ----------------------------------------------------------------------------- the update
class RewardTrainer(Trainer):
    """Train a classifier with one output on pairs: transformers.Trainer with the loss above.

        trainer = RewardTrainer(classifier, RewardConfig("runs/reward"), tokenizer=tokenizer,
                                train_dataset=pairs)
        trainer.train()

    The constructor is in Part 2."""

    loss_is_scaled_for_ga = False  # Trainer divides each loss by the number of micro-batches

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss of a micro-batch of B pairs, a scalar.

        inputs: a batch of RewardDataCollatorWithPadding. return_outputs: return also a dict of
        rewards_chosen, rewards_rejected and losses, [B] each. num_items_in_batch: pairs of the
        whole optimizer step on all ranks; None: average over this batch alone. Raises InputError
        in training if the loss is not finite."""
        # 1. Score both texts of each pair
        chosen, rejected = self.score_pairs(model, inputs)                             # [B] each

        # 2. Compare: the chosen text should have the higher score
        margin = inputs.get("margin", 0.0)                                             # [B]
        smoothing = self.args.label_smoothing_factor
        centering = self.args.center_rewards_coefficient or 0.0
        losses = preference_loss(chosen, rejected, margin, smoothing, centering)       # [B]

        # 3. Average over all pairs of the optimizer step. Trainer averages over micro-batches and
        #    DDP over ranks, so divide by the mean number of pairs per micro-batch, not by B
        mean_pairs = len(losses)
        if num_items_in_batch is not None:
            micro_batches = self.current_gradient_accumulation_steps
            mean_pairs = num_items_in_batch / (micro_batches * self.accelerator.num_processes)
        loss = losses.sum() / mean_pairs

        # 4. Add up the scores for the next line of the log
        if model.training:
            check_finite(loss, self.state.global_step)  # before it reaches a weight
            self.train_sums += sum_pairs(chosen, rejected, losses)
        if not return_outputs:
            return loss
        return loss, {"rewards_chosen": chosen, "rewards_rejected": rejected, "losses": losses}

    def score_pairs(self, model, inputs):
        """Compute the scores of the chosen and of the rejected texts, [B] each.

        Pairs of similar length share a forward pass: less padding. Without centering, a constant
        added to all scores leaves the loss unchanged, so the head's bias should get no gradient.
        With both texts of a pair next to each other the two halves cancel without a rounding error,
        which Adam would amplify to a full step."""
        text_pairs = list(zip(unpad(inputs, "chosen"), unpad(inputs, "rejected"), strict=True))
        by_length = torch.tensor([max(map(len, pair)) for pair in text_pairs]).argsort()
        passes = FORWARD_PASSES
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            passes = 1  # each pass would gather the sharded weights
        scores = []
        for group in by_length.chunk(passes):
            texts = [text for i in group.tolist() for text in text_pairs[i]]  # c_1, r_1, c_2, ...
            scores.append(self.score(model, texts).view(-1, 2))
        back_to_batch = by_length.argsort()  # the inverse permutation: the order of the batch
        return torch.cat(scores)[back_to_batch].unbind(1)

    def score(self, model, texts):
        """Compute the scores [n] of texts, a list of n id tensors [length], in one forward pass.

        transformers finds a decoder's last token as the last id unequal to config.pad_token_id. If
        a text ends with that id (often pad = end token), the batch is padded with another."""
        pad_token_id = choose_padding(texts, self.tokenizer.pad_token_id)
        input_ids = pad_sequence(texts, batch_first=True, padding_value=pad_token_id)  # [n, T]
        attention_mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        config = self.model.config.get_text_config()
        config.pad_token_id = pad_token_id
        try:
            logits = model(input_ids=input_ids, attention_mask=attention_mask).logits  # [n, 1]
        finally:
            config.pad_token_id = self.tokenizer.pad_token_id  # the one that is saved
        return logits.squeeze(1).float()

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of an optimizer step, and its number of pairs on all ranks.

        The number is the num_items_in_batch of `compute_loss`."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:  # Trainer counts tokens and operations under these two names
            for kind in ("input_ids", "attention_mask"):
                batch[kind] = torch.cat([batch[f"{kind}_{side}"].flatten() for side in SIDES])
        pairs = sum(len(batch["input_ids_chosen"]) for batch in batches)
        return batches, self.accelerator.reduce(torch.tensor(pairs, device=device))

    # =========================================================================
    # Part 2, the machinery: nothing below is needed to understand the algorithm.
    # =========================================================================

    def __init__(self, model=None, args=None, data_collator=None, train_dataset=None,
                 eval_dataset=None, tokenizer=None, model_init=None, compute_metrics=None,
                 callbacks=None, optimizers=(None, None), preprocess_logits_for_metrics=None,
                 max_length=None, peft_config=None, processing_class=None):
        """Prepare model, data and Trainer. Raises InputError, a ValueError.

        model: a sequence classifier with one label, or a PeftModel of one to train further.
        args: a RewardConfig, or plain TrainingArguments; None: RewardConfig's defaults.
        tokenizer (or processing_class): the model's. Without a pad token it pads with its end
            token.
        train_dataset, eval_dataset (or a dict of them): a datasets.Dataset or IterableDataset of
            rows with chosen and rejected, and perhaps prompt (texts or chats), or with the four
            columns of token ids in COLUMNS; and perhaps margin. Other types stay as they are.
        compute_metrics: None: compute_accuracy. It gets softmax([r_c, r_r]) [N, 2] and zeros [N].
        max_length, peft_config: the config's max_length and lora_r, if they are not given here.
        All other arguments are Trainer's. Only the model is changed."""
        args = RewardConfig() if args is None else copy.copy(args)
        for field in fields(RewardConfig):  # plain TrainingArguments lack some
            if not hasattr(args, field.name):
                setattr(args, field.name, field.default)
        if args.ddp_broadcast_buffers is None:  # DDP would, between the forward passes of a batch
            args.ddp_broadcast_buffers = False
        common.prepare_process(args)
        tokenizer = tokenizer or processing_class
        if tokenizer is None:
            raise InputError("tokenizer=None: RewardTrainer needs the model's tokenizer; pass it")
        self.tokenizer = common.with_padding(tokenizer)
        self.peft_config = peft_config or common.lora_config(args, "SEQ_CLS")
        self.has_own_collator = data_collator is not None
        if args.remove_unused_columns and not self.has_own_collator:
            warnings.warn("remove_unused_columns=True: it has no effect, the columns of pairs and "
                          "their margin are kept; set it to False", stacklevel=2)
            args.remove_unused_columns = False
        if eval_dataset is None:
            args.eval_strategy = "no"
        if model is not None:
            model = self.prepare_model(model, args)
        super().__init__(
            model=model, args=args, model_init=model_init, callbacks=callbacks,
            compute_metrics=compute_metrics or compute_accuracy, optimizers=optimizers,
            processing_class=self.tokenizer, data_collator=data_collator,
            train_dataset=train_dataset, eval_dataset=eval_dataset,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics)
        self.max_length = self.find_max_length(max_length)
        self.data_collator = data_collator or RewardDataCollatorWithPadding(
            self.tokenizer, max_length=self.max_length)
        self.train_dataset = self.prepare(train_dataset, "training")
        self.eval_dataset = self.prepare(eval_dataset, "evaluation")
        # sums over pairs, see sum_pairs
        self.train_sums = torch.zeros(6, device=self.args.device)  # since the last line of the log
        self.eval_sums = torch.zeros(6, device=self.args.device)   # of the evaluation, all ranks

    def prepare_model(self, model, args):
        """Check the model's head, set its padding, and add the adapter if there is one."""
        if model.config.num_labels != 1:
            raise InputError(f"num_labels={model.config.num_labels} (model): a reward is one "
                             "number; load the model with num_labels=1")
        if args.learning_rate is None:
            args.learning_rate = common.scale_learning_rate(2e-3, model)
        model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        if self.peft_config is None:
            return model
        peft_config = copy.deepcopy(self.peft_config)
        peft_config.task_type = "SEQ_CLS"  # the head is trained, and saved with the adapter
        return common.with_adapter(model, peft_config, args.seed)

    def call_model_init(self, trial=None):
        """Make the model with `model_init`, and prepare it."""
        return self.prepare_model(super().call_model_init(trial), self.args)

    def find_max_length(self, max_length):
        """Return the maximum length: the argument or the config's, and what the model takes."""
        settings = read_settings(RewardTrainer, self.args, max_length=max_length)
        config = self.model.config.get_text_config()
        return min(settings["max_length"] or NO_LIMIT, self.tokenizer.model_max_length,
                   getattr(config, "max_position_embeddings", None) or NO_LIMIT)

    # ------------------------------------------------------------------ data
    def prepare(self, rows, name):
        """Tokenize rows and drop pairs whose sides are equal. A dict: each of its datasets.

        Anything but a datasets.Dataset or IterableDataset stays as it is. Raises InputError."""
        if isinstance(rows, dict):
            return {key: self.prepare(value, key) for key, value in rows.items()}
        if not isinstance(rows, (Dataset, IterableDataset)):
            return rows
        columns = list(next(iter(rows), {}))
        if not columns:
            raise InputError(f"{name} dataset: it is empty; add pairs")
        is_tokenized = set(COLUMNS) <= set(columns)
        is_text = set(SIDES) <= set(columns)
        if not is_tokenized and not is_text:
            if self.has_own_collator:
                return rows
            raise InputError(f"columns={columns} ({name} dataset): these are no pairs; rename "
                             "them to chosen and rejected (and perhaps prompt), or to "
                             f"{', '.join(COLUMNS)}")
        is_stream = isinstance(rows, IterableDataset)
        options = {} if is_stream else {"num_proc": self.args.dataset_num_proc}
        limit = {"max_length": self.max_length}
        with self.args.main_process_first(), explain(f"{name} dataset can't be tokenized"):
            if not is_tokenized:
                others = [column for column in columns if column != "margin"]
                rows = rows.map(tokenize, remove_columns=others, **options,
                                fn_kwargs={"tokenizer": self.tokenizer, **limit})
            distinct = rows.filter(is_distinct, fn_kwargs=limit, **options)
            if self.args.train_sampling_strategy == "group_by_length":
                length = {"column": self.args.length_column_name}
                distinct = distinct.map(count_tokens, fn_kwargs=length, **options)
        if is_stream or len(distinct) == len(rows):
            return distinct
        if len(distinct) == 0:
            raise InputError(f"max_length={self.max_length} ({name} dataset): within it all "
                             f"{len(rows)} pairs are equal or empty; raise it, or give other pairs")
        if self.is_world_process_zero():
            dropped = len(rows) - len(distinct)
            print(f"{name} dataset: {dropped} of {len(rows)} pairs are dropped: equal or empty "
                  f"within max_length={self.max_length} tokens")
        return distinct

    # ------------------------------------------------------------------ metrics
    def log(self, logs, start_time=None):
        """Log Trainer's line; in training with the rewards since the last line, over all ranks."""
        if "loss" in logs and self.train_sums[0] > 0:
            averages = average_pairs(self.accelerator.reduce(self.train_sums))
            logs.update({**averages, "loss": logs["loss"]})
            self.train_sums.zero_()
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the mean loss, softmax([r_c, r_r]) [B, 2], and zeros [B] (chosen is first)."""
        inputs["input_ids"] = inputs["input_ids_chosen"]  # for include_for_metrics
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        results = torch.stack(list(outputs.values()), dim=1)                           # [B, 3]
        self.eval_sums += sum_pairs(*self.accelerator.gather_for_metrics(results).T)
        if prediction_loss_only:
            return loss, None, None
        return loss, results[:, :2].softmax(dim=1), torch.zeros_like(outputs["losses"])

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """Run Trainer's loop; average rewards, margin, accuracy and loss over all pairs."""
        self.eval_sums.zero_()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, value in average_pairs(self.eval_sums).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def evaluate(self, eval_dataset=None, **kwargs):
        """Call Trainer's evaluate, on rows as the constructor takes them."""
        return super().evaluate(self.prepare(eval_dataset, "evaluation"), **kwargs)

    def predict(self, test_dataset, **kwargs):
        """Call Trainer's predict, on rows as the constructor takes them."""
        return super().predict(self.prepare(test_dataset, "test"), **kwargs)


def sum_pairs(chosen, rejected, losses):
    """Sum over pairs [6]: their number, loss, both scores, how many are no ties, and are right.

    chosen, rejected, losses [B]."""
    columns = [torch.ones_like(losses), losses, chosen, rejected,
               chosen != rejected, chosen > rejected]
    return torch.stack([column.detach().float().sum() for column in columns])


def average_pairs(sums):
    """Average the sums of `sum_pairs`: loss, rewards, r_c - r_r, and the accuracy without ties."""
    pairs, loss, chosen, rejected, decided, right = sums.tolist()
    return {"loss": loss / pairs, "rewards/chosen": chosen / pairs,
            "rewards/rejected": rejected / pairs, "rewards/margins": (chosen - rejected) / pairs,
            "rewards/accuracies": right / decided if decided else 0.5}


# ----------------------------------------------------------------------------- rows
def join_chat(prompt, answer):
    """Return one side of a pair as a whole conversation, a list of {"role", "content"}.

    An answer that does not begin with the assistant's turn is the whole conversation already.
    prompt: messages, the text of a user's turn, or None."""
    if not answer or answer[0]["role"] != "assistant":
        return answer
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return (prompt or []) + answer


def encode(tokenizer, prompt, answer, max_length):
    """Tokenize one side of a pair: its first max_length token ids. Raises InputError.

    A text is joined to its prompt as it is; a chat goes through the tokenizer's template."""
    if isinstance(answer, str):
        text = (prompt or "") + answer
        return tokenizer(text, truncation=True, max_length=max_length).input_ids
    if tokenizer.chat_template is None:
        raise InputError("chat_template=None (tokenizer): the rows are chats; set "
                         "tokenizer.chat_template, or give texts")
    chat = join_chat(prompt, answer)
    return tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)[:max_length]


def tokenize(row, tokenizer, max_length):
    """Return the four columns of token ids of a row with chosen, rejected and perhaps prompt."""
    columns = {}
    for side in SIDES:
        ids = encode(tokenizer, row.get("prompt"), row[side], max_length)
        columns[f"input_ids_{side}"] = ids
        columns[f"attention_mask_{side}"] = [1] * len(ids)
    return columns


def is_distinct(row, max_length):
    """Check that both sides have tokens, and differ within their first max_length tokens."""
    chosen, rejected = (list(row[f"input_ids_{side}"][:max_length]) for side in SIDES)
    return len(chosen) > 0 and len(rejected) > 0 and chosen != rejected


def count_tokens(row, column):
    """Return {column: tokens of both sides}, for Trainer's group_by_length."""
    return {column: sum(len(row[f"input_ids_{side}"]) for side in SIDES)}


@dataclass
class RewardDataCollatorWithPadding:
    """Collate rows with the four columns in COLUMNS (and perhaps margin). Raises InputError.

    Returns input_ids_chosen and attention_mask_chosen [B, T], the same of the rejected texts with a
    T of their own, and margin [B] in float32 (0 where it is None). Padding is on the right,
    whatever the tokenizer's side: many classifiers count positions from the first column.
    padding: True, or "max_length" for T = max_length. max_length: truncate texts to this many
    tokens. pad_to_multiple_of: make T a multiple of this. return_tensors: only "pt"."""

    tokenizer: Any
    padding: Union[bool, str] = True
    max_length: Optional[int] = None
    pad_to_multiple_of: Optional[int] = None
    return_tensors: str = "pt"

    def __post_init__(self):
        if self.return_tensors != "pt" or self.padding in (False, "do_not_pad"):
            raise InputError(f"padding={self.padding!r}, return_tensors={self.return_tensors!r}: "
                             "batches are padded torch tensors; use True and 'pt'")

    def __call__(self, features):
        missing = [column for column in COLUMNS if column not in features[0]]
        if missing:
            raise InputError(f"columns={list(features[0])} (a row): columns of pairs are missing; "
                             f"add {', '.join(missing)}")
        batch = {}
        width = self.max_length if self.padding == "max_length" else None
        for side in SIDES:
            kinds = ("input_ids", "attention_mask")
            texts = [{kind: row[f"{kind}_{side}"][:self.max_length] for kind in kinds}
                     for row in features]
            padded = self.tokenizer.pad(texts, padding=self.padding, max_length=width,
                                        pad_to_multiple_of=self.pad_to_multiple_of,
                                        padding_side="right", return_tensors="pt")
            for kind in kinds:
                batch[f"{kind}_{side}"] = padded[kind]
        if "margin" in features[0]:
            batch["margin"] = torch.tensor([float(row["margin"] or 0) for row in features])
        return {**batch, "return_loss": True}  # Trainer: there is a loss without labels


# ----------------------------------------------------------------------------- the script
def load_classifier(name, dtype):
    """Load a tokenizer and a classifier with one label. Raises InputError.

    A language model gets a fresh head, a classifier keeps its own, and an adapter trains further.
    """
    with explain(f"model_name={name} can't be loaded"):
        tokenizer = common.load_tokenizer(name)
        architectures = AutoConfig.from_pretrained(common.base_of(name)).architectures
        has_head = "SequenceClassification" in str(architectures)
        head = {} if has_head else {"num_labels": 1}
        model = common.load_pretrained(AutoModelForSequenceClassification, name, True,
                                       dtype=dtype, **head)
    return tokenizer, model


def text_of(row, side, tokenizer):
    """Return what samples show of one side: prompt (of a chat the last user turn) and answer."""
    if side not in row:
        return tokenizer.decode(row[f"input_ids_{side}"], skip_special_tokens=True)
    if isinstance(row[side], str):
        return (row.get("prompt") or "") + row[side]
    chat = join_chat(row.get("prompt"), row[side])
    return f"{common.text_to_show(chat, tokenizer)}\n{chat[-1]['content']}"


def pick_samples(trainer, rows, n=4):
    """Return the first n pairs whose sides differ, with their texts and token ids."""
    samples = []
    for row in rows:
        if "input_ids_chosen" not in row:
            row = {**row, **tokenize(row, trainer.tokenizer, trainer.max_length)}
        if is_distinct(row, trainer.max_length):
            samples.append(row)
        if len(samples) == n:
            break
    return samples


@torch.no_grad()
def show_samples(trainer, samples, title):
    """Print and write the scores of both sides of a few pairs. Call on every rank."""
    batch = send_to_device(trainer.data_collator(samples), trainer.args.device)
    _, outputs = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
    rows = []
    for i, sample in enumerate(samples):
        for side in SIDES:
            rows.append({
                "update": trainer.state.global_step, "pair": i,
                "score": outputs[f"rewards_{side}"][i].item(), "side": side,
                "text": text_of(sample, side, trainer.tokenizer)})
    if trainer.is_world_process_zero():
        common.log_samples(trainer.args.output_dir, title, rows)


def main(config: ScriptConfig):
    """Train a reward model on pairs of a chosen and a rejected text.

    Returns the metrics of the last evaluation."""
    out, checkpoint = common.start_run(config)
    name = config.model_name or str(TOY / "blank_reward")
    tokenizer, model = load_classifier(name, config.torch_dtype)
    common.use_few_threads(model)
    rows, held_out = common.load_train_and_eval_rows(config, "pairs.jsonl", "pairs_test.jsonl")
    trainer = RewardTrainer(model, config, None, rows, held_out, tokenizer,
                            callbacks=[common.Journal(out)])
    trainer.remove_callback(ProgressCallback)  # the Journal has a bar

    samples = pick_samples(trainer, held_out or rows)
    # a model that FSDP will shard is still on the CPU
    if not checkpoint and trainer.model.device.type == config.device.type:
        show_samples(trainer, samples, "before training")
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if held_out:
        metrics = common.last_evaluation(trainer)
    show_samples(trainer, samples, "after training")
    trainer.save_model(str(out))
    if trainer.is_world_process_zero():
        what = "A reward model: a classifier that scores a text, trained on pairs"
        data = {"pairs": config.dataset or "toy/pairs.jsonl"}
        common.write_model_card(out, what, config, data, metrics)
    return metrics


if __name__ == "__main__":
    common.run(main, ScriptConfig)
