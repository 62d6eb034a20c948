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
By default all three are 0, and L = -log sigmoid(r_c - r_r). The eps term uses the same d: its
margin keeps its sign. Without the centering, L depends on r_c - r_r only, so a function of the
prompt, added to both scores, changes nothing; the centering removes this freedom. Texts are scored
as they are given, chats as their template writes them.

transformers.Trainer calls `compute_loss`. Per optimizer step it does

    for batch in micro_batches:
        loss = compute_loss(model, batch, num_items_in_batch=pairs) / len(micro_batches)
        loss.backward()
    clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step(); scheduler.step()
    model.zero_grad()

Start reading at `preference_loss`, the formula, then `RewardTrainer.compute_loss`, the update. Part
1 is the algorithm, Part 2 the machinery around it.

The API, defaults and metrics follow TRL 0.7.10. Differences:
  1. The texts of a large batch go through the model in groups of similar length: the same numbers
     (up to rounding) with less padding. Padding is on the right.
  2. Padding is a token that ends no text (see chats.prepare_classifier_tokenizer), so training and
     use read a decoder's score at the same last token, also of texts that end with the end token.
  3. Each pair has its own margin. In TRL, differences [B, 1] minus margins [B] give [B, B]: each
     difference minus every margin. Ties count neither as right nor as wrong.
  4. Rows may be texts or chats; the last `max_length` tokens of longer ones are kept. Rewards,
     accuracy and `rewards/margins` (TRL's name for the mean of r_c - r_r) are logged in training
     too, over all ranks.
  5. A gradient is the mean over all pairs of the optimizer step, however they are split into
     micro-batches and ranks.
  6. LoRA trains with gradient checkpointing, and its adapter is saved with the head.
  7. `label_smoothing_factor` has an effect: it is eps.
  8. The model has one label, the score. One with more is refused (0.7.10 trains each label's logit
     alike): load it with num_labels=1.

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
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)

import chats
import common
import machinery
from chats import classifier_ids, join_chat
from common import TOY, InputError, check_finite, explain

SIDES = ("chosen", "rejected")
COLUMNS = [f"{kind}_{side}" for side in SIDES for kind in ("input_ids", "attention_mask")]
SPLIT_FROM = 8  # the texts of 8 pairs or more run in four groups of similar length


# =============================================================================
# Part 1, the algorithm: configuration, mathematics, the update
# =============================================================================

# ----------------------------------------------------------------------------- configuration
@dataclass
class RewardConfig(machinery.TrainerFlags, machinery.LoadingFlags, TrainingArguments):
    """List the settings of reward modeling, after transformers.TrainingArguments.

    Sizes are per process. Fields that transformers 5 has retired still mean what they meant."""

    save_total_limit: Optional[int] = None
    """Number of checkpoints to keep. None: all."""
    max_length: Optional[int] = None
    """Keep this many last tokens of a text. None: the limit of tokenizer and model."""
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
    """Type of the weights; the script loads LoRA's base model in bfloat16."""
    lora_r: int = 0
    """Rank of a fresh LoRA adapter on all linear layers. 0: train all weights."""
    lora_alpha: int = 16
    """LoRA scale is lora_alpha / lora_r."""

    def __post_init__(self):
        machinery.check_ranges(self, {
            "(0, inf)": ("max_length", "dataset_num_proc", "per_device_train_batch_size",
                         "per_device_eval_batch_size", "gradient_accumulation_steps",
                         "num_train_epochs", "lora_alpha"),
            "[0, inf)": ("learning_rate", "weight_decay", "center_rewards_coefficient", "lora_r"),
            "[0, 0.5]": ("label_smoothing_factor",),
        })
        machinery.check_choices(self, {"torch_dtype": machinery.DTYPES})
        super().__post_init__()


@dataclass
class ScriptConfig(RewardConfig):
    """List the script's own defaults of RewardConfig."""

    output_dir: Optional[str] = "runs/reward"
    """Output folder."""
    learning_rate: Optional[float] = None
    """AdamW's learning rate. None: 2e-3 x sqrt(1e5 / number of parameters); LoRA: x 10."""
    weight_decay: float = 0.0
    """AdamW's weight decay. Toy model: 1, so that it does not memorize a few pairs."""
    per_device_train_batch_size: int = 8
    """Pairs per micro-batch, per process. Toy model: 64."""
    per_device_eval_batch_size: int = 8
    """Pairs per evaluation batch, per process. Toy model: 64."""
    num_train_epochs: float = 1
    """Passes over the pairs. Toy model: 16."""
    lr_scheduler_type: str = "cosine"
    """Schedule of the learning rate."""
    logging_steps: float = 10
    """Optimizer steps per line of metrics.jsonl."""
    eval_strategy: str = "epoch"
    """When to evaluate, given an evaluation set: no, steps or epoch."""
    save_total_limit: Optional[int] = 1
    """Number of checkpoints to keep. None: all."""
    remove_unused_columns: bool = False
    """No effect: the columns of pairs and their margin are kept, the others dropped."""


# ----------------------------------------------------------------------------- mathematics
# Shapes: B pairs of a batch, N of an evaluation; n texts of a forward pass; T tokens of the longest
# text.
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
def stack_texts(inputs, pad_token_id):
    """Return token ids and mask [2B, T] and lengths [2B] of a batch's texts, the chosen ones first.

    Padding is on the right, whatever the batch's side. Raises InputError for an empty text."""
    def stack(kind, fill):
        sides = [inputs[f"{kind}_{side}"].T for side in SIDES]    # [T, B] each, for pad_sequence
        padded = pad_sequence(sides, padding_value=fill)          # [T, 2, B]
        return padded.permute(1, 2, 0).flatten(0, 1)              # [2B, T]

    mask = stack("attention_mask", 0)
    ids = stack("input_ids", pad_token_id).masked_fill(mask == 0, pad_token_id)
    lengths = mask.sum(1).cpu()
    if not lengths.all():
        raise InputError(f"attention_mask=0 (row {lengths.argmin() % (len(lengths) // 2)} of a "
                         "batch): a text has no token; remove the row, or correct its mask")
    # each row's text first, then its padding: positions start at 0
    padding_last = mask.argsort(dim=1, descending=True, stable=True)
    return ids.gather(1, padding_last), mask.gather(1, padding_last), lengths


# ----------------------------------------------------------------------------- the update
class RewardTrainer(machinery.ShardedTrainer, Trainer):
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
        margin = inputs.get("margin", 0.0)                                             # [B], or 0
        smoothing = self.args.label_smoothing_factor
        centering = self.args.center_rewards_coefficient or 0.0
        losses = preference_loss(chosen, rejected, margin, smoothing, centering)       # [B]

        # 3. Average over all pairs of the optimizer step. Trainer divides by the number of
        #    micro-batches and DDP by the number of ranks, so divide here by the mean of their B
        mean_pairs = len(losses)
        if num_items_in_batch is not None:
            micro_batches = self.current_gradient_accumulation_steps
            mean_pairs = num_items_in_batch / (micro_batches * self.accelerator.num_processes)
        loss = losses.sum() / mean_pairs

        # 4. Stop if the loss is not finite, and sum the scores for the next line of the log
        if model.training:
            check_finite(loss, self.state.global_step)
            self.train_sums += sum_pairs(chosen, rejected, losses)
        if not return_outputs:
            return loss
        return loss, {"rewards_chosen": chosen, "rewards_rejected": rejected, "losses": losses}

    def score_pairs(self, model, inputs):
        """Compute the scores of the chosen and of the rejected texts, [B] each.

        Texts of similar length share a forward pass. With mixed lengths this saves a quarter of the
        work."""
        input_ids, attention_mask, lengths = stack_texts(inputs, self.tokenizer.pad_token_id)
        # one pass if the weights are sharded: each pass would gather them again. A pair's texts are
        # neighbors, so that gradients of what moves all scores alike cancel without rounding
        if len(lengths) < 2 * SPLIT_FROM or self.is_sharded:
            groups = [torch.arange(len(lengths)).view(2, -1).T.flatten()]  # c_1, r_1, c_2, r_2, ...
        else:
            groups = lengths.argsort().chunk(4)
        scores = []
        for texts in groups:
            longest = lengths[texts].max()
            logits = model(input_ids=input_ids[texts, :longest],
                           attention_mask=attention_mask[texts, :longest]).logits      # [n, 1]
            scores.append(logits[:, 0].float())
        back_to_batch = torch.cat(groups).argsort()  # the inverse permutation: the batch's order
        return torch.cat(scores)[back_to_batch].chunk(2)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of an optimizer step, and its number of pairs on all ranks.

        The number is the num_items_in_batch of `compute_loss`."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:  # Trainer counts tokens and operations under these two names
            for kind in ("input_ids", "attention_mask"):
                batch[kind] = torch.cat([batch[f"{kind}_{side}"].flatten() for side in SIDES])
        pairs = sum(len(batch["input_ids_chosen"]) for batch in batches)
        return batches, self.accelerator.reduce(torch.tensor(pairs, device=device), "sum")

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
        tokenizer (or processing_class): the model's. A copy pads, with a token that ends no text.
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
        machinery.prepare_process(args)
        machinery.check_split(train_dataset)
        tokenizer = tokenizer or processing_class
        if tokenizer is None:
            raise InputError("tokenizer=None: RewardTrainer needs the model's tokenizer; pass it")
        self.tokenizer = chats.prepare_classifier_tokenizer(tokenizer)
        self.peft_config = peft_config or machinery.lora_config(args)
        self.has_own_collator = data_collator is not None
        if args.remove_unused_columns and not self.has_own_collator:
            warnings.warn("remove_unused_columns=True: it has no effect, the columns of pairs and "
                          "their margin are kept; set it to False", stacklevel=2)
            args.remove_unused_columns = False
        if eval_dataset is None:
            machinery.skip_evaluation(args)
        if model is not None:
            model = self.prepare_model(model, args)
        super().__init__(
            model=model, args=args, model_init=model_init, callbacks=callbacks,
            compute_metrics=compute_metrics or compute_accuracy, optimizers=optimizers,
            processing_class=self.tokenizer, data_collator=data_collator,
            train_dataset=train_dataset, eval_dataset=eval_dataset,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics)
        self.max_length = self.find_max_length(max_length)
        chats.set_truncation(self.tokenizer, self.max_length)  # use truncates as training does
        self.data_collator = data_collator or RewardDataCollatorWithPadding(
            self.tokenizer, max_length=self.max_length)
        self.train_dataset = self.prepare(train_dataset, "training")
        self.eval_dataset = machinery.map_sets(machinery.read_stream,
                                               self.prepare(eval_dataset, "evaluation"))
        # sums over pairs, see sum_pairs
        self.train_sums = torch.zeros(6, device=self.args.device)  # since the last line of the log
        self.eval_sums = torch.zeros(6, device=self.args.device)   # of the evaluation, all ranks

    def prepare_model(self, model, args):
        """Check the model's head, set its padding, and add the adapter if there is one."""
        if model.config.num_labels != 1:
            raise InputError(f"num_labels={model.config.num_labels} (model): a reward is one "
                             "number; load the model with num_labels=1")
        chats.set_classifier_padding(model, self.tokenizer)
        peft_config = copy.deepcopy(self.peft_config)
        if peft_config is not None:
            peft_config.task_type = "SEQ_CLS"  # the head is trained, and saved with the adapter
        model = machinery.prepare_training(model, peft_config, args.seed)
        chats.refuse_virtual_tokens(model)
        if args.learning_rate is None:
            args.learning_rate = machinery.scale_learning_rate(2e-3, model)
        return model

    def call_model_init(self, trial=None):
        """Make the model with `model_init`, and prepare it."""
        return self.prepare_model(super().call_model_init(trial), self.args)

    def find_max_length(self, max_length):
        """Return the maximum length: the argument or the config's, and what the model takes."""
        settings = machinery.read_settings(RewardTrainer, self.args, max_length=max_length)
        longest = min(common.number_of_positions(self.model), self.tokenizer.model_max_length)
        return min(settings["max_length"] or longest, longest)

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
        options = machinery.map_options(self.args, rows, self.args.dataset_num_proc)
        encoding = {"tokenizer": self.tokenizer, "max_length": self.max_length}
        place = f"{name} dataset"
        with self.args.main_process_first(), explain(f"{place} can't be tokenized", place=place):
            others = [] if is_tokenized else [c for c in columns if c != "margin"]
            rows = rows.map(encode_row, with_indices=True, remove_columns=others,
                            fn_kwargs=encoding, **options)
            distinct = rows.filter(is_distinct, **options).remove_columns("is_truncated")
            if self.args.train_sampling_strategy == "group_by_length":
                length = {"column": self.args.length_column_name}
                distinct = distinct.map(count_tokens, fn_kwargs=length, **options)
        if is_stream:
            return distinct
        if len(distinct) == 0:
            raise InputError(f"max_length={self.max_length} ({name} dataset): within it all "
                             f"{len(rows)} pairs are equal or empty; raise it, or give other pairs")
        within, total = f"max_length={self.max_length} tokens", len(rows)
        truncated = rows["is_truncated"][:]
        machinery.report_rows(f"{name} dataset", "truncated", sum(truncated), total, truncated,
                              f"longer than {within}, of which the last are kept")
        faulty = (not is_distinct(row) for row in rows)
        machinery.report_rows(f"{name} dataset", "dropped", total - len(distinct), total, faulty,
                              f"equal or empty within {within}")
        return distinct

    # ------------------------------------------------------------------ metrics
    def log(self, logs, start_time=None):
        """Log Trainer's line; in training with the rewards since the last line, over all ranks."""
        if "loss" in logs and self.train_sums[0] > 0:
            averages = average_pairs(self.accelerator.reduce(self.train_sums, "sum"))
            logs.update({**averages, "loss": logs["loss"]})
            self.train_sums.zero_()
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the mean loss, softmax([r_c, r_r]) [B, 2], and zeros [B] (chosen is first)."""
        inputs["input_ids"] = inputs["input_ids_chosen"]  # for include_for_metrics
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        names = ("rewards_chosen", "rewards_rejected", "losses")
        results = torch.stack([outputs[name] for name in names], dim=1)                # [B, 3]
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
        rows = self.prepare(eval_dataset, "evaluation")
        return super().evaluate(machinery.map_sets(machinery.read_stream, rows), **kwargs)

    def predict(self, test_dataset, **kwargs):
        """Call Trainer's predict, on rows as the constructor takes them."""
        return super().predict(machinery.read_stream(self.prepare(test_dataset, "test")), **kwargs)


def sum_pairs(chosen, rejected, losses):
    """Sum over pairs [6]: number, loss, chosen and rejected score, decided and right pairs.

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
def join(prompt, answer):
    """Return one side of a pair as a reward sees it: a text, or the messages of a whole chat."""
    if isinstance(answer, str):
        return (prompt or "") + answer
    return join_chat(prompt, answer)


def encode_pair(row, tokenizer, max_length):
    """Return the four columns of token ids of a row, and whether max_length truncates it.

    The last max_length tokens are kept: a reward reads a longer text so, too."""
    columns = {"is_truncated": False}
    for side in SIDES:
        if f"input_ids_{side}" in row:
            ids, mask = (row[f"{kind}_{side}"] for kind in ("input_ids", "attention_mask"))
            too_long = len(ids) > max_length
            ids, mask = ids[-max_length:], mask[-max_length:]
        else:
            text = join(row.get("prompt"), row[side])
            ids = classifier_ids(tokenizer, text, row)
            too_long = len(ids) > max_length
            if too_long:  # with the special tokens around the text
                ids = classifier_ids(tokenizer, text, row, max_length)
            mask = [1] * len(ids)
        columns.update({f"input_ids_{side}": ids, f"attention_mask_{side}": mask})
        columns["is_truncated"] |= too_long
    return columns


def encode_row(row, number, **options):
    """Call encode_pair. Raises InputError with the row's number."""
    with explain(f"row {number} can't be tokenized", place=f"row {number}"):
        return encode_pair(row, **options)


def is_distinct(row):
    """Check that both sides have tokens, and differ."""
    chosen, rejected = (list(row[f"input_ids_{side}"]) for side in SIDES)
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
    padding: True, or "max_length" for T = max_length. max_length: keep this many last tokens of a
    text. pad_to_multiple_of: make T a multiple of this. return_tensors: only "pt"."""

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
        last = slice(-self.max_length if self.max_length else None, None)
        for side in SIDES:
            kinds = ("input_ids", "attention_mask")
            texts = [{kind: row[f"{kind}_{side}"][last] for kind in kinds} for row in features]
            self.check_ends(texts, side)
            padded = self.tokenizer.pad(texts, padding=self.padding, max_length=width,
                                        pad_to_multiple_of=self.pad_to_multiple_of,
                                        padding_side="right", return_tensors="pt")
            for kind in kinds:
                batch[f"{kind}_{side}"] = padded[kind]
        if "margin" in features[0]:
            batch["margin"] = torch.tensor([float(row["margin"] or 0) for row in features])
        return {**batch, "return_loss": True}  # Trainer: there is a loss without labels

    def check_ends(self, texts, side):
        """Raise InputError for a text that ends with the pad token: its score would be another."""
        pad = self.tokenizer.pad_token_id
        for text in texts:
            if text["input_ids"][-1:] == [pad] and text["attention_mask"][-1]:
                raise InputError(f"input_ids_{side}={text['input_ids']} (a row): it ends with the "
                                 f"pad token {self.tokenizer.pad_token!r}, which a classifier does "
                                 "not read; remove it, or set another tokenizer.pad_token")


# ----------------------------------------------------------------------------- the script
def load_sequence_classifier(name, **kwargs):
    """Load a classifier to train; a language model gets a fresh head with one label.

    An adapter of a classifier trains further. One of a language model is merged into its base
    model: the fresh head then reads what the adapter has learned."""
    has_head = "SequenceClassification" in str(machinery.load_config(name, **kwargs).architectures)
    head = {} if has_head else {"num_labels": 1}
    base, base_kwargs = common.base_of(name, **kwargs)
    task_type = "SEQ_CLS"
    if base != name:
        from peft import PeftConfig
        task_type = PeftConfig.from_pretrained(name, **common.hub_arguments(kwargs)).task_type
    auto_class = AutoModelForSequenceClassification
    if task_type in ("SEQ_CLS", None):
        return common.load_pretrained(auto_class, name, True, **head, **kwargs)
    merged = common.load_pretrained(AutoModelForCausalLM, name, False, **kwargs).merge_and_unload()
    model = auto_class.from_pretrained(base, **head, **base_kwargs)
    model.base_model.load_state_dict(merged.base_model.state_dict())
    return model


def text_of(row, side, tokenizer):
    """Return what samples show of one side: prompt (of a chat the last user turn) and answer."""
    if side not in row:
        return tokenizer.decode(row[f"input_ids_{side}"], skip_special_tokens=True)
    whole = join(row.get("prompt"), row[side])
    if isinstance(whole, str):
        return whole
    return f"{chats.text_to_show(whole)}\n{whole[-1]['content']}"


def pick_samples(trainer, rows, n=4):
    """Return the first n pairs whose sides differ, with their texts and token ids."""
    samples = []
    for row in rows:
        row = {**row, **encode_pair(row, trainer.tokenizer, trainer.max_length)}
        if is_distinct(row):
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
        machinery.log_samples(trainer.args.output_dir, title, rows)


def main(config: ScriptConfig):
    """Train a reward model on pairs of a chosen and a rejected text.

    Returns the metrics of the last evaluation; without an evaluation set, those of training."""
    out, checkpoint = machinery.start_run(config)
    name = config.model_name or str(TOY / "blank_reward")
    with explain(f"model_name={name} can't be loaded"):
        tokenizer = machinery.load_tokenizer(name, **machinery.loading_arguments(config))
        model = load_sequence_classifier(name, **machinery.loading_arguments(config))
    machinery.use_few_threads(model)
    rows, held_out = machinery.load_train_and_eval_rows(config, "pairs.jsonl", "pairs_test.jsonl")
    trainer = RewardTrainer(model, config, None, rows, held_out, tokenizer,
                            callbacks=[machinery.Journal(out, rows=rows)])
    trainer.remove_callback(ProgressCallback)  # the Journal has a bar

    samples = pick_samples(trainer, held_out or rows)
    if not checkpoint and not trainer.is_sharded:
        show_samples(trainer, samples, "before training")
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_model(str(out))
    if held_out is not None:
        metrics = machinery.last_evaluation(trainer)
    show_samples(trainer, samples, "after training")
    if trainer.is_world_process_zero():
        what = "A reward model: a classifier that scores a text, trained on pairs"
        data = {"pairs": config.dataset or "toy/pairs.jsonl"}
        machinery.write_model_card(out, what, config, data, metrics)
    return metrics


if __name__ == "__main__":
    machinery.run(main, ScriptConfig, own="--gradient-accumulation-steps 8",
                  lora="--torch-dtype bfloat16",
                  toy="--num-train-epochs 16 --weight-decay 1 --per-device-train-batch-size 64 "
                      "--per-device-eval-batch-size 64 --no-gradient-checkpointing")
