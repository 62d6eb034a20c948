"""Direct preference optimization (DPO) of a language model, from pairs of answers.

Papers: Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a
Reward Model" (arXiv:2305.18290); Mitchell 2023, "A note on DPO with noisy preferences" (cDPO:
label_smoothing); Liu et al. 2023, "Statistical Rejection Sampling Improves Preference Optimization"
(arXiv:2309.06657, hinge: the loss of SLiC on ratios to the reference); Azar et al. 2023, "A General
Theoretical Paradigm to Understand Learning from Human Preferences" (arXiv:2310.12036, ipo);
Ethayarajh et al. 2023, "Human-Centered Loss Functions (HALOs)" (kto, here from pairs).

Each row is a prompt x, an answer y_w that people chose and an answer y_l that they rejected. The
policy pi starts from a reference pi_ref, which stays frozen, and learns to prefer y_w, without a
reward model and without sampling:

    h = log [pi(y_w|x) / pi_ref(y_w|x)] - log [pi(y_l|x) / pi_ref(y_l|x)]
    L = -log sigmoid(beta h)                                (Rafailov et al. 2023, equation 7)

averaged over the pairs of an optimizer step. The policy's reward of an answer y is
beta log [pi(y|x) / pi_ref(y|x)]; the metrics rewards/* are these rewards (for ipo per token).

Start reading at the docstring of `DPOTrainer`: its loop, which Trainer runs, changes the weights.
Then read `DPOTrainer.pair_losses`, steps 1 to 4, and `compute_loss`, step 5. Part 1 is the
algorithm, Part 2 the machinery around it.

Differences from the papers: ipo averages log-probabilities over an answer's tokens. kto estimates
the KL by means over a micro-batch, so give it more than one pair; as in TRL, its gradient flows
through these estimates.
The API, defaults and metrics follow TRL 0.7.10. Differences:
  1. ipo averages log-probabilities over an answer's tokens (0.7.10 sums them).
  2. Log-probabilities are float32 whatever the model's type. The reference never has dropout.
  3. With LoRA the reference is the adapter as it was loaded, not the bare base model.
  4. Every prompt is truncated to max_prompt_length, not only that of a row that is too long. A text
     gets BOS only if the tokenizer writes one; a chat gets no tokens but its template's. A
     truncated answer loses its EOS, in an encoder-decoder too. Rows with an empty answer or two
     equal answers are dropped and counted.
  5. precompute_ref_log_probs runs the reference before the first step, over evaluation sets too.
  6. Metrics are means over all pairs and ranks; logits/* are means over answer tokens only.
  7. Every pair of an optimizer step has the same weight, in whatever micro-batch or rank it is.
     (kto's loss of a pair does depend on the other pairs of its micro-batch.)
  8. A large batch runs in groups of similar length: the same numbers with less padding.
  9. In training, concatenated_forward gets answers_only=True, and get_batch_logps the logits [N, V]
     of the N answer tokens. Evaluation averages `pair_losses`, not get_batch_loss_metrics.

    torchrun dpo.py                                        one process, the toy model
    torchrun --nproc_per_node 8 dpo.py --model-name my/model --dataset pairs.jsonl
"""
import copy
import os
import random
import uuid
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, NamedTuple, Optional

import torch
import torch.nn.functional as F
import tyro
from accelerate.utils import send_to_device
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import ProgressCallback, Trainer, TrainingArguments
from transformers.integrations import (
    TensorBoardCallback,
    WandbCallback,
    is_deepspeed_zero3_enabled,
)

import chats
import common
import machinery
from chats import join_chat, same_messages, split_chat, text_to_show
from common import (
    TOY,
    InputError,
    active_adapter,
    check_finite,
    copy_adapter,
    create_reference_model,
    explain,
    logprobs_from_logits,
    only_logits_of,
    set_seed,
    unsharded,
)

REFERENCE_COLUMNS = ("reference_chosen_logps", "reference_rejected_logps")
SIDES = ("chosen", "rejected")
TRUNCATION_MODES = ("keep_end", "keep_start")
HELPER_COLUMNS = ("shown_prompt", "length", "is_truncated")  # not for the model
SPLIT_FROM = 8  # a batch of 8 pairs or more runs in four groups of similar length


# =============================================================================
# Part 1, the algorithm: configuration, mathematics, the update
# =============================================================================

# ----------------------------------------------------------------------------- configuration
@dataclass
class DPOConfig(machinery.TrainerFlags, machinery.LoadingFlags, machinery.DPOArguments,
                TrainingArguments):
    """List the fields of transformers.TrainingArguments and the script's own.

    Sizes are per process. The fields whose defaults differ from Trainer's come first."""

    output_dir: str = "runs/dpo"
    """Output folder."""
    per_device_train_batch_size: int = 1
    """Pairs per forward and backward pass; kto takes means of them. Toy model: 32."""
    per_device_eval_batch_size: int = 1
    """Pairs per evaluation batch. Toy model: 64."""
    lr_scheduler_type: str = "cosine"
    """Schedule of the learning rate."""
    learning_rate: Optional[float] = None
    """AdamW's learning rate. None: 5e-4 x sqrt(1e5 / number of parameters); LoRA: x 10."""
    num_train_epochs: float = 1
    """Passes over the pairs. Toy model: 8."""
    logging_steps: float = 1
    """Optimizer steps per line of metrics.jsonl."""
    eval_strategy: str = "epoch"
    """When to evaluate: no, steps or epoch. Without evaluation pairs: never."""
    save_strategy: str = "epoch"
    """When to write a checkpoint: no, steps, epoch or best."""
    report_to: Optional[str] = "none"
    """Trackers in addition to metrics.jsonl: wandb, tensorboard, ..."""

    # the script's own
    model_name: Optional[str] = None
    """Policy: hub name or folder of a model or a LoRA adapter. None: the toy model."""
    ref_model_name: Optional[str] = None
    """Reference: hub name or folder. None: the policy as it is before the first step."""
    dataset: Optional[str] = None
    """Pairs: a file, folder or hub name (prompt, chosen, rejected). None: the toy pairs."""
    eval_dataset: Optional[str] = None
    """Held-out pairs. None: the toy's with the toy pairs, otherwise no evaluation."""
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the weights; the script loads LoRA's base model in bfloat16."""
    lora_r: int = 0
    """Rank of a fresh LoRA adapter on all linear layers. 0: train all weights."""
    lora_alpha: int = 16
    """LoRA scale is lora_alpha / lora_r."""
    beta: float = 0.1
    """Strength of the KL penalty; larger stays closer to the reference. Toy model: 3."""
    label_smoothing: float = 0.0
    """cDPO: fraction of pairs with wrong labels, 0 to 0.5 (sigmoid only)."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "kto", "kto_pair"] = "sigmoid"
    """Preference loss; kto and kto_pair are the same."""
    reference_free: bool = False
    """Use a reference that gives all answers the same probability, and run no model."""
    max_length: Optional[int] = None
    """Maximum length of prompt and answer in tokens. None: 512, or the model's maximum."""
    max_prompt_length: Optional[int] = None
    """Truncate prompts to this many tokens. None: to what fits, at least max_length / 2."""
    max_target_length: Optional[int] = None
    """Truncate an encoder-decoder's answers to this many tokens. None: 128."""
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"
    """Which end of a long prompt to keep."""
    precompute_ref_log_probs: bool = False
    """Run the reference over all pairs once, before the first step: less memory."""
    generate_during_eval: bool = False
    """Write answers of policy and reference to samples.jsonl and trackers at evaluations."""
    dataset_num_proc: Optional[int] = None
    """Processes for tokenization. None: this one."""
    share_prompts: Annotated[Optional[bool], tyro.conf.Suppress] = None
    """Removed option; leave it unset."""

    def __post_init__(self):
        if self.learning_rate is not None:
            self.learning_rate = float(self.learning_rate)
        machinery.check_ranges(self, {
            "(0, inf)": ("per_device_train_batch_size", "per_device_eval_batch_size",
                         "gradient_accumulation_steps", "num_train_epochs", "lora_alpha"),
            "[0, inf)": ("learning_rate", "lora_r"),
        })
        check_settings(self)
        super().__post_init__()


# ----------------------------------------------------------------------------- mathematics
# Letters in shapes: B pairs; R = 2B sequences, the chosen ones above the rejected ones; T tokens of
# the longest sequence (prompt and answer; of an encoder-decoder the answer); V entries of the
# vocabulary; N answer tokens of the whole batch. chosen is y_w, rejected is y_l.

class LossTraits(NamedTuple):
    """State how a preference loss reads its inputs."""
    takes_mean: bool             # log pi(y|x) is the mean over y's tokens, not their sum
    takes_label_smoothing: bool  # whether label_smoothing has an effect


LOSSES = {  # a new loss: a line here, a branch below, and its name in DPOConfig.loss_type
    "sigmoid": LossTraits(takes_mean=False, takes_label_smoothing=True),
    "hinge": LossTraits(takes_mean=False, takes_label_smoothing=False),
    "ipo": LossTraits(takes_mean=True, takes_label_smoothing=False),
    "kto": LossTraits(takes_mean=False, takes_label_smoothing=False),
    "kto_pair": LossTraits(takes_mean=False, takes_label_smoothing=False),
}


def preference_losses(policy_chosen, policy_rejected, reference_chosen, reference_rejected,
                      beta=0.1, label_smoothing=0.0, loss_type="sigmoid"):
    """Compute the losses of B pairs [B] from log-probabilities of their answers [B].

    kto returns [2B]: the losses of the chosen answers, then of the rejected ones. Raises InputError
    for an unknown loss_type."""
    chosen_logratios = policy_chosen - reference_chosen
    rejected_logratios = policy_rejected - reference_rejected
    h = chosen_logratios - rejected_logratios
    if loss_type == "sigmoid":  # DPO, equation 7; with label_smoothing cDPO, equation 3
        loss_if_right = -F.logsigmoid(beta * h)
        loss_if_wrong = -F.logsigmoid(-beta * h)
        return loss_if_right * (1 - label_smoothing) + loss_if_wrong * label_smoothing
    if loss_type == "hinge":    # RSO: max(0, 1 - beta h)
        return torch.relu(1 - beta * h)
    if loss_type == "ipo":      # IPO, equation 17, where beta is called tau
        return (h - 1 / (2 * beta)) ** 2
    if loss_type in ("kto", "kto_pair"):  # KTO: the other kind's mean log-ratio estimates the KL
        chosen_KL = chosen_logratios.mean().clamp(min=0)
        rejected_KL = rejected_logratios.mean().clamp(min=0)
        return torch.cat([1 - torch.sigmoid(beta * (chosen_logratios - rejected_KL)),
                          1 - torch.sigmoid(beta * (chosen_KL - rejected_logratios))])
    raise InputError(f"loss_type={loss_type!r}: preference_losses computes no such loss; add it")


def find_answers(labels, label_pad_token_id=-100, is_encoder_decoder=False):
    """Find the answer tokens of labels [R, T], whose other entries are label_pad_token_id.

    Returns the mask [R, T] (bool) of the positions that predict them, and their token ids [N]."""
    is_answer = labels != label_pad_token_id
    if is_encoder_decoder:
        return is_answer, labels[is_answer]
    # column t of a causal model predicts token t + 1
    labels, is_answer = labels[:, 1:], is_answer[:, 1:]
    return F.pad(is_answer, (0, 1)), labels[is_answer]


def sum_per_row(values, mask, mean=False):
    """Sum values [N], one per true entry of mask [R, T], over each row: [R]. mean: average."""
    table = values.new_zeros(mask.shape).masked_scatter(mask, values)  # [R, T], 0 elsewhere
    sums = table.sum(1)
    return sums / mask.sum(1) if mean else sums


# ----------------------------------------------------------------------------- the update
class DPOTrainer(machinery.ShardedTrainer, Trainer):
    """Train with DPO on transformers.Trainer:

        DPOTrainer(model, args=DPOConfig(beta=0.1), train_dataset=pairs, tokenizer=t).train()

    Its loop, for each optimizer step:

        for micro_batch in micro_batches:
            compute_loss(model, micro_batch, num_items_in_batch=pairs).backward()
        clip the gradient, optimizer.step(), lr_scheduler.step(), optimizer.zero_grad()

    Call every method on every rank."""

    loss_is_scaled_for_ga = True  # Trainer must not divide by the number of micro-batches

    def pair_losses(self, model, batch):
        """Compute losses and metrics of the pairs of a batch, [B] each.

        model: the policy. batch: {chosen, rejected}_{input_ids, attention_mask, labels} [B, T];
        labels are -100 outside the answer (see DPODataCollatorWithPadding)."""
        # 1. The reference: log-probabilities of chosen and rejected answers, without gradient
        if REFERENCE_COLUMNS[0] in batch:
            reference_logps = [batch[name] for name in REFERENCE_COLUMNS]
        elif self.reference_free:
            reference_logps = [None, None]  # dpo_loss replaces them with zeros
        else:
            reference_logps = self.compute_reference_log_probs(batch)

        # 2. The policy: log-probabilities and mean logits of both answers, [B] each, in one pass
        chosen_logps, rejected_logps, chosen_mean_logits, rejected_mean_logits, *aux_loss = (
            self.concatenated_forward(model, batch, answers_only=True))

        # 3. The loss of each pair
        losses, chosen_rewards, rejected_rewards = self.dpo_loss(
            chosen_logps, rejected_logps, *reference_logps)
        losses = losses.view(-1, len(chosen_logps)).mean(0)  # of a pair's two losses, if kto
        if aux_loss:  # a mixture of experts: the loss that balances the load of its experts
            losses = losses + aux_loss[0]

        # 4. The metrics of each pair
        return losses, {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
            "rewards/margins": chosen_rewards - rejected_rewards,
            "logps/rejected": rejected_logps.detach(),
            "logps/chosen": chosen_logps.detach(),
            "logits/rejected": rejected_mean_logits,
            "logits/chosen": chosen_mean_logits,
        }

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute a micro-batch's part of the mean loss over the pairs of the optimizer step.

        num_items_in_batch: pairs of the optimizer step, over all micro-batches and ranks."""
        loss, metrics = self.get_batch_loss_metrics(model, inputs)
        check_finite(loss, self.state.global_step)

        # 5. The mean over all pairs of the optimizer step. Trainer sums the micro-batches'
        #    gradients; DDP averages those of the ranks, hence the factor num_processes
        pairs = len(inputs["chosen_labels"])
        if num_items_in_batch is not None:
            loss = loss * pairs * self.accelerator.num_processes / num_items_in_batch
        self.add_to_log(metrics, pairs)
        return (loss, metrics) if return_outputs else loss

    def get_batch_loss_metrics(self, model, batch, train_eval="train"):
        """Return the mean loss of a collated batch and its mean metrics.

        train_eval="eval": the metrics' names begin with `eval_`."""
        losses, metrics = self.pair_losses(model, batch)
        prefix = "eval_" if train_eval == "eval" else ""
        return losses.mean(), {prefix + name: values.mean() for name, values in metrics.items()}

    # ------------------------------------------------------------------ step 1: the reference
    def compute_reference_log_probs(self, padded_batch):
        """Compute the reference's log-probabilities of chosen and rejected answers, [B] each."""
        with torch.no_grad(), self.reference() as reference:
            return self.concatenated_forward(reference, padded_batch, answers_only=True)[:2]

    @contextmanager
    def reference(self):
        """Yield the reference in eval mode: ref_model, or the policy with the reference's adapter.

        For precompute_ref_log_probs it may be the policy itself, before the first step."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        if self.state.global_step and not self.is_peft_model:
            raise InputError(f"data_collator: its batch lacks {REFERENCE_COLUMNS[0]}, which "
                             "precompute_ref_log_probs has added; keep the columns *_logps")
        policy = self.model_wrapped
        was_training = policy.training
        policy.eval()
        try:
            with self.null_ref_context():
                yield policy
        finally:
            policy.train(was_training)

    @contextmanager
    def null_ref_context(self):
        """Turn a policy with an adapter into its own reference, until the context ends.

        A policy without an adapter stays as it is."""
        if self.reference_adapter is None:
            yield
        else:
            with active_adapter(self.accelerator.unwrap_model(self.model), self.reference_adapter):
                yield

    # ------------------------------------------------------------------ step 2: the policy
    def concatenated_forward(self, model, batch, answers_only=False):
        """Run a model over chosen and rejected answers together, padded on the right.

        Returns log-probabilities of chosen and rejected answers [B] (their sums over tokens, or
        means if the loss takes means), logits of both [B, T, V], and of a mixture of experts the
        balancing loss. answers_only=True (training and evaluation): logits of answer tokens only;
        their mean per answer [B] replaces them in the result."""
        rows = self.concatenated_inputs(batch, self.is_encoder_decoder, self.label_pad_token_id,
                                        self.padding_value)
        inputs, labels = self.prepare_model_inputs(model, rows)
        if answers_only and self.splits_batches:
            logps, logits, aux_loss = self.forward_by_length(model, inputs, labels)
        else:
            logps, logits, aux_loss = self.forward(model, inputs, labels, answers_only)
        balance = [] if aux_loss is None else [aux_loss]
        return *logps.chunk(2), *logits.chunk(2), *balance

    def forward(self, model, inputs, labels, answers_only):
        """Run a model over sequences with labels [R, T].

        Returns log-probabilities [R], logits, and the balancing loss or None."""
        predicts, _ = find_answers(labels, self.label_pad_token_id, self.is_encoder_decoder)
        # the output layer runs at the N answer tokens only, unless the caller wants all logits
        selection = only_logits_of(model, predicts) if answers_only else nullcontext()
        with selection, self.accelerator.autocast():
            output = model(**inputs, use_cache=False)
        logits = output.logits                                       # [N, V], or [R, T, V]
        logps = self.get_batch_logps(logits, labels, LOSSES[self.loss_type].takes_mean,
                                     self.label_pad_token_id, self.is_encoder_decoder)
        if answers_only:
            logits = logits.detach().mean(-1, dtype=torch.float32)   # [N]
            logits = sum_per_row(logits, predicts, mean=True)        # [R]
        aux_loss = getattr(output, "aux_loss", None)
        if aux_loss is not None:
            aux_loss = self.model.config.router_aux_loss_coef * aux_loss
        return logps, logits, aux_loss

    def forward_by_length(self, model, inputs, labels):
        """Run `forward` on up to four groups of sequences of similar length, shortest first.

        Each group is padded to its own longest sequence only. With mixed lengths this saves a third
        of the work."""
        lengths = inputs["attention_mask"].sum(1)
        order = lengths.argsort()
        logps, logits = [], []
        for rows in order.chunk(4):
            width = int(lengths[rows].max())
            part = {name: x[rows, :width] for name, x in inputs.items()}
            part_logps, part_logits, _ = self.forward(model, part, labels[rows, :width], True)
            logps.append(part_logps)
            logits.append(part_logits)
        original_order = order.argsort()
        return torch.cat(logps)[original_order], torch.cat(logits)[original_order], None

    @staticmethod
    def concatenated_inputs(batch, is_encoder_decoder=False, label_pad_token_id=-100,
                            padding_value=0, device=None):
        """Put the rejected sequences of a batch below the chosen ones, padded to one width.

        Returns {"concatenated_input_ids", "concatenated_attention_mask", "concatenated_labels"},
        [R, T] each. Of an encoder-decoder ids and mask are those of the prompts, twice."""
        fills = {"input_ids": padding_value, "attention_mask": 0, "labels": label_pad_token_id}
        result = {}
        for kind, fill in fills.items():
            names = [f"chosen_{kind}", f"rejected_{kind}"]
            if is_encoder_decoder and kind != "labels":
                names = [f"prompt_{kind}"] * 2
            width = max(batch[name].shape[1] for name in names)
            both = [F.pad(batch[name], (0, width - batch[name].shape[1]), value=fill)
                    for name in names]
            result[f"concatenated_{kind}"] = torch.cat(both).to(device)
        return result

    def prepare_model_inputs(self, model, rows):
        """Return a model's inputs and labels [R, T] of the rows of concatenated_inputs."""
        names = ("input_ids", "attention_mask", "labels")
        ids, mask, labels = (rows[f"concatenated_{name}"] for name in names)
        if self.is_encoder_decoder:
            targets = labels.masked_fill(labels == self.label_pad_token_id, -100)
            shift = self.accelerator.unwrap_model(model).prepare_decoder_input_ids_from_labels
            return {"input_ids": ids, "attention_mask": mask,
                    "decoder_input_ids": shift(labels=targets)}, labels
        # a collator may pad on the left: move padding to the right, so that positions start at 0
        order = mask.argsort(dim=1, descending=True, stable=True)
        ids, mask, labels = (x.gather(1, order) for x in (ids, mask, labels))
        return {"input_ids": ids, "attention_mask": mask}, labels

    @staticmethod
    def get_batch_logps(logits, labels, average_log_prob=False, label_pad_token_id=-100,
                        is_encoder_decoder=False):
        """Sum (or average) the log-probabilities of each row's answer tokens: [R], in float32.

        labels [R, T]: label_pad_token_id where a token is no answer. logits: [R, T, V], or those
        of the N answer tokens only, [N, V]."""
        predicts, answers = find_answers(labels, label_pad_token_id, is_encoder_decoder)
        if logits.dim() == 3:
            logits = logits[predicts]
        return sum_per_row(logprobs_from_logits(logits, answers), predicts, average_log_prob)

    # ------------------------------------------------------------------ step 3: the loss
    def dpo_loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
                 reference_rejected_logps, reference_free=False):
        """Compute losses [B] (kto: [2B]) and the rewards of chosen and rejected answers [B].

        All arguments [B]. reference_free: the reference's log-probabilities count as 0."""
        if reference_free or self.reference_free:
            reference_chosen_logps = torch.zeros_like(policy_chosen_logps)
            reference_rejected_logps = torch.zeros_like(policy_rejected_logps)
        losses = preference_losses(
            policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
            reference_rejected_logps, self.beta, self.label_smoothing, self.loss_type)
        chosen_rewards = self.beta * (policy_chosen_logps - reference_chosen_logps)
        rejected_rewards = self.beta * (policy_rejected_logps - reference_rejected_logps)
        return losses, chosen_rewards.detach(), rejected_rewards.detach()

    # =========================================================================
    # Part 2, the machinery: nothing below is needed to understand the algorithm.
    # =========================================================================

    def __init__(self, model=None, ref_model=None, beta: float = 0.1, label_smoothing: float = 0,
                 loss_type="sigmoid", args=None, data_collator=None, label_pad_token_id: int = -100,
                 padding_value: int = 0, truncation_mode: str = "keep_end", train_dataset=None,
                 eval_dataset=None, tokenizer=None, model_init=None, callbacks=None,
                 optimizers=(None, None), preprocess_logits_for_metrics=None, max_length=None,
                 max_prompt_length=None, max_target_length=None, peft_config=None,
                 is_encoder_decoder=None, disable_dropout: bool = True,
                 generate_during_eval: bool = False, compute_metrics=None,
                 precompute_ref_log_probs: bool = False, model_init_kwargs=None,
                 ref_model_init_kwargs=None, model_adapter_name=None, ref_adapter_name=None,
                 processing_class=None, reference_free: bool = False,
                 dataset_num_proc: Optional[int] = None, share_prompts=None):
        """Prepare the policy, its reference and the rows. Raises InputError (a ValueError).

        model: the policy, a language model, a PeftModel, or a name, loaded with model_init_kwargs.
        model_init: a function that makes the policy. peft_config: puts a fresh adapter on it, after
            merging the one that it has.
        ref_model: the reference, a model, or a name, loaded with ref_model_init_kwargs. None: a
            frozen copy of the policy as it is now (of its adapter, if it has one).
        model_adapter_name, ref_adapter_name: adapters of a PeftModel: policy and reference.
        args: a DPOConfig, or TrainingArguments. tokenizer (or processing_class): the model's.
        train_dataset, eval_dataset: a datasets.Dataset of rows {"prompt", "chosen", "rejected"}
            (text or chat messages), or of tokenized rows. eval_dataset may be a dict of them.
            Rows with reference_chosen_logps and reference_rejected_logps keep them.
        data_collator: None: DPODataCollatorWithPadding. label_pad_token_id: label of tokens that
            are no answer. padding_value: fills input ids; 0: the tokenizer's pad token.
        is_encoder_decoder: None: what the model's config says. disable_dropout: in both models.
        compute_metrics: gets predictions [rows, 2], the rewards of chosen and rejected answers
            after preprocess_logits_for_metrics, and label_ids [rows], all 0.
        All other arguments are fields of DPOConfig."""
        args = copy.copy(args) if args else TrainingArguments("runs/dpo", report_to="none")
        machinery.prepare_process(args)
        machinery.check_split(train_dataset)
        settings = machinery.read_settings(
            DPOTrainer, args, beta=beta, label_smoothing=label_smoothing, loss_type=loss_type,
            reference_free=reference_free, max_length=max_length, truncation_mode=truncation_mode,
            max_prompt_length=max_prompt_length, max_target_length=max_target_length,
            precompute_ref_log_probs=precompute_ref_log_probs, share_prompts=share_prompts,
            generate_during_eval=generate_during_eval, dataset_num_proc=dataset_num_proc,
            model_init_kwargs=model_init_kwargs, ref_model_init_kwargs=ref_model_init_kwargs,
            model_adapter_name=model_adapter_name, ref_adapter_name=ref_adapter_name,
            disable_dropout=disable_dropout, is_encoder_decoder=is_encoder_decoder,
            label_pad_token_id=label_pad_token_id, padding_value=padding_value)
        check_settings(SimpleNamespace(**settings))
        vars(self).update(settings)
        model_init_kwargs = self.model_init_kwargs
        ref_model_init_kwargs = self.ref_model_init_kwargs
        if ref_model is None and getattr(args, "ref_model_name", None):
            ref_model = args.ref_model_name
            ref_model_init_kwargs = {**machinery.loading_arguments(args), "revision": None}
        self.starts_at_reference = (ref_model is None and self.ref_adapter_name is None
                                    and not self.reference_free)
        tokenizer = tokenizer if tokenizer is not None else processing_class
        check_arguments(
            args, self, model=model, model_init=model_init, model_init_kwargs=model_init_kwargs,
            ref_model=ref_model, ref_model_init_kwargs=ref_model_init_kwargs, tokenizer=tokenizer,
            ref_adapter_name=self.ref_adapter_name, data_collator=data_collator)
        self.tokenizer = tokenizer
        self.peft_config = peft_config
        self.keep_columns = not args.remove_unused_columns
        args.remove_unused_columns = False  # Trainer would drop the tokens
        if eval_dataset is None and isinstance(args, DPOConfig):
            machinery.skip_evaluation(args)
        if args.ddp_broadcast_buffers is None:  # DDP would, between the forward passes of a batch
            args.ddp_broadcast_buffers = False
        self.metric_sums, self.eval_metrics = {}, []

        set_seed(args.seed)  # before weights are drawn that a loaded model lacks
        policy = load_model(model, self.is_encoder_decoder, model_init_kwargs)
        self.ref_model = load_model(ref_model, self.is_encoder_decoder, ref_model_init_kwargs)
        if policy is not None:
            policy = self.prepare_policy(policy, args)
        super().__init__(
            model=policy, args=args, data_collator=data_collator, processing_class=tokenizer,
            train_dataset=train_dataset, eval_dataset=eval_dataset, model_init=model_init,
            compute_metrics=compute_metrics, callbacks=callbacks, optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics)
        if self.is_encoder_decoder is None:
            self.is_encoder_decoder = bool(self.model.config.is_encoder_decoder)
        # A mixture of experts is balanced over all rows at once. A sharded model would gather its
        # weights again for each group. All ranks split or none does, whatever their rows
        balances_experts = getattr(self.model.config, "output_router_logits", False)
        self.splits_batches = (
            args.per_device_train_batch_size >= SPLIT_FROM and not self.is_sharded
            and not self.is_encoder_decoder and not balances_experts)
        self.limit_lengths()
        self.padding_value = self.padding_value or tokenizer.pad_token_id or 0
        if data_collator is None:
            self.data_collator = DPODataCollatorWithPadding(
                self.padding_value, self.label_pad_token_id, self.is_encoder_decoder)
        self.prepare_reference()
        with args.main_process_first(desc="tokenizing"):
            self.train_dataset = self.tokenize(train_dataset, "train_dataset")
            self.eval_dataset = machinery.map_sets(self.tokenize, eval_dataset, "eval_dataset")
        self.train_dataset = self.with_reference(self.train_dataset)
        self.eval_dataset = machinery.map_sets(self.with_reference, self.eval_dataset)

    # ------------------------------------------------------------------ models
    def call_model_init(self, trial=None):
        """Make the policy of the next run with model_init, as Trainer does, and prepare it."""
        return self.prepare_policy(super().call_model_init(trial), self.args)

    def prepare_policy(self, model, args):
        """Put the adapter on, set the learning rate, turn dropout off. Returns the policy."""
        lora = machinery.lora_config(args, model.config.is_encoder_decoder)
        peft_config = copy.deepcopy(self.peft_config or lora)
        if peft_config is not None and hasattr(model, "peft_config"):
            with explain("peft_config: the model's own adapter can't be merged; leave it out"):
                model = model.merge_and_unload()
            warnings.warn("peft_config: the model's own adapter is merged into its weights. The "
                          "fresh one, which alone is saved, fits only the merged model: save "
                          "model.merge_and_unload() yourself, and give that", stacklevel=3)
        model = machinery.prepare_training(model, peft_config, args.seed)
        if args.learning_rate is None:
            args.learning_rate = machinery.scale_learning_rate(5e-4, model)
        self.is_peft_model = hasattr(model, "peft_config")
        self.prepare_adapters(model)
        if self.disable_dropout:
            common.disable_dropout(model)
        if self.is_peft_model:
            model.enable_input_require_grads()  # for activation checkpointing over a frozen base
        return model

    def prepare_adapters(self, model):
        """Activate the policy's adapter, and make or find the reference's."""
        adapters = getattr(model, "peft_config", {})
        policy, reference = self.model_adapter_name, self.ref_adapter_name
        if reference and not policy:
            policy = "default"
        for argument, name in (("ref_adapter_name", reference), ("model_adapter_name", policy)):
            if name and name not in adapters:
                raise InputError(f"{argument}={name!r}: the model's adapters are {[*adapters]}; "
                                 "load it with model.load_adapter")
        if reference and reference == policy:
            raise InputError(f"ref_adapter_name={reference!r}: it is the policy's adapter, too, "
                             "and would be trained; omit it, and the adapter is copied")
        if policy:
            model.set_adapter(policy)
        self.reference_adapter = reference
        has_other = reference or self.ref_model is not None or self.reference_free
        if self.is_peft_model and not has_other:
            if "reference" in adapters:
                raise InputError("ref_adapter_name=None: the model has an adapter 'reference'; "
                                 "name it, or remove it with model.delete_adapter('reference')")
            copy_adapter(model, "reference")
            self.reference_adapter = "reference"
            # peft would save the reference too
            model.save_pretrained = partial(model.save_pretrained,
                                            selected_adapters=[model.active_adapter])

    def prepare_reference(self):
        """Copy the policy if no other reference is given, and bring the reference in place."""
        has_other = self.is_peft_model or self.reference_free or self.precompute_ref_log_probs
        if self.ref_model is None and not has_other:
            if is_deepspeed_zero3_enabled():
                raise InputError("ref_model=None: under ZeRO-3 a model can't be copied; give "
                                 "--ref-model-name, a LoRA (--lora-r), or ZeRO-2")
            self.ref_model = create_reference_model(self.model)
        if self.ref_model is None:
            return
        if self.disable_dropout:
            common.disable_dropout(self.ref_model)
        self.ref_model = machinery.prepare_reference(self.accelerator, self.ref_model)

    # ------------------------------------------------------------------ rows
    def limit_lengths(self):
        """Fill in max_length and max_target_length. Raises InputError if no answer would fit."""
        longest = 10**9 if self.is_encoder_decoder else common.number_of_positions(self.model)
        if self.max_target_length is not None and not self.is_encoder_decoder:
            warnings.warn(f"max_target_length={self.max_target_length} has no effect: only an "
                          "encoder-decoder's answers have a limit of their own", stacklevel=3)
        if (self.max_length or 0) > longest:
            warnings.warn(f"max_length={self.max_length}: the model takes {longest} tokens; rows "
                          "are truncated to that", stacklevel=3)
        self.max_length = min(self.max_length or 512, longest)
        self.max_target_length = self.max_target_length or 128
        prompt = self.max_prompt_length or 0
        if not self.is_encoder_decoder and prompt >= self.max_length:
            raise InputError(f"max_prompt_length={prompt}: no token is left for an answer within "
                             f"max_length={self.max_length}; reduce it")

    def tokenize_settings(self):
        """Return the arguments of tokenize_pair."""
        names = ("is_encoder_decoder", "max_length", "max_prompt_length", "max_target_length",
                 "truncation_mode", "label_pad_token_id")
        return {"tokenizer": self.tokenizer, **{name: getattr(self, name) for name in names}}

    def tokenize(self, dataset, name):
        """Tokenize a dataset and drop the rows without information. Raises InputError.

        A dataset that is tokenized already stays as it is."""
        if dataset is None or "chosen_labels" in getattr(dataset, "column_names", ()):
            return dataset
        if not isinstance(dataset, Dataset):
            raise InputError(f"{name} must be a datasets.Dataset, not a {type(dataset).__name__}; "
                             "use Dataset.from_list(rows)")
        columns = dataset.column_names
        is_chat = len(dataset) > 0 and isinstance(dataset[0].get("chosen"), list)
        needed = ("chosen", "rejected") if is_chat else ("prompt", "chosen", "rejected")
        missing = [column for column in needed if column not in columns]
        if missing:
            raise InputError(f"{name} has the columns {columns} and lacks {', '.join(missing)}; "
                             "rename its columns to prompt, chosen and rejected")
        unused = [column for column in columns if column not in REFERENCE_COLUMNS]
        tokenize_row = partial(tokenize_pair, **self.tokenize_settings())
        options = machinery.map_options(self.args, dataset, self.dataset_num_proc)
        if any(getattr(type(self), name) is not getattr(DPOTrainer, name)
               for name in ("tokenize_row", "build_tokenized_answer")):
            # a subclass tokenizes: in this process, since a trainer can't be pickled or hashed
            tokenize_row, options = self.tokenize_row, {"new_fingerprint": uuid.uuid4().hex}
        rows = dataset.map(prepare_row, with_indices=True,
                           remove_columns=[] if self.keep_columns else unused,
                           fn_kwargs={"tokenize_row": tokenize_row, "tokenizer": self.tokenizer,
                                      "label_pad_token_id": self.label_pad_token_id}, **options)
        faults, truncated = rows["fault"][:], rows["is_truncated"][:]
        empty, equal = faults.count("empty"), faults.count("equal")
        machinery.report_rows(name, "dropped", empty + equal, len(faults), faults,
                              f"{empty} with an empty prompt or answer, {equal} with two equal "
                              "answers")
        if empty or equal:
            rows = rows.select([i for i, fault in enumerate(faults) if not fault])
        limit = "max_target_length" if self.is_encoder_decoder else "max_length"
        machinery.report_rows(name, "truncated", sum(truncated), len(faults), truncated,
                              f"longer than {limit}={getattr(self, limit)} and max_prompt_length="
                              f"{self.max_prompt_length} allow; a truncated answer has no end "
                              "token")
        if len(rows) == 0:
            raise InputError(f"{name} has no rows to learn from")
        return rows.remove_columns(["fault", "is_truncated"])

    def build_tokenized_answer(self, prompt, answer):
        """Tokenize a prompt and its answer as one text, without BOS and EOS: see tokenize_answer.

        For many tokenizers, Llama's among them, enc(prompt) + enc(answer) is not
        enc(prompt + answer): the answer's first word is tokenized differently if it stands alone.
        A subclass that replaces this method, or tokenize_row, changes the rows that are trained on.
        """
        return tokenize_answer(prompt, answer, self.tokenizer)

    def tokenize_row(self, feature, model=None):
        """Tokenize a row: see tokenize_pair.

        model: an encoder-decoder, to add {chosen,rejected}_decoder_input_ids."""
        tokens = tokenize_pair(feature, build=self.build_tokenized_answer,
                               **self.tokenize_settings())
        if model is not None and self.is_encoder_decoder:
            for name in ("chosen", "rejected"):
                labels = torch.tensor([tokens[f"{name}_labels"]])
                ids = model.prepare_decoder_input_ids_from_labels(labels=labels)[0]
                tokens[f"{name}_decoder_input_ids"] = ids.tolist()
        return tokens

    def with_reference(self, dataset):
        """Add the columns of precompute_ref_log_probs to a tokenized dataset. Raises InputError."""
        if not self.precompute_ref_log_probs or self.reference_free or dataset is None:
            return dataset
        if set(REFERENCE_COLUMNS) <= set(dataset.column_names):
            self.starts_at_reference = False  # they may be another model's
            return dataset
        has_reference = self.ref_model is not None or self.is_peft_model
        if self.state.global_step and not has_reference:
            raise InputError("precompute_ref_log_probs=True: this dataset came after training "
                             "began, when the reference was gone; give it to the constructor as "
                             "eval_dataset, or give a ref_model")
        if self.ref_model is None and is_deepspeed_zero3_enabled():
            raise InputError("precompute_ref_log_probs=True: under ZeRO-3 the policy can't run "
                             "before training; give --ref-model-name, or leave it out")
        key = "prompt_input_ids" if self.is_encoder_decoder else "chosen_input_ids"
        lengths = [len(ids) for ids in dataset[key]]
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])  # little padding
        loader = self.accelerator.prepare_data_loader(DataLoader(
            dataset.select(order), self.args.eval_batch_size, collate_fn=self.data_collator))
        # None: hidden if stderr is no terminal
        is_hidden = self.args.disable_tqdm or not self.is_world_process_zero() or None
        logps = []
        with self.reference_on_device():
            for batch in tqdm(loader, "reference", disable=is_hidden):
                both = torch.stack(self.compute_reference_log_probs(batch), dim=1)  # [B, 2]
                logps.append(self.accelerator.gather_for_metrics(both).cpu())
        logps = torch.cat(logps)[torch.tensor(order).argsort()]
        for name, column in zip(REFERENCE_COLUMNS, logps.T.tolist(), strict=True):
            dataset = dataset.add_column(name, column)
        return dataset

    @contextmanager
    def reference_on_device(self):
        """Hold the reference on this rank's device while the context lasts."""
        model = self.model if self.ref_model is None else self.ref_model
        if self.ref_model is not None and self.is_fsdp_enabled:  # its shards stay
            yield
            return
        # a reference model is not needed in training; a policy may wait on the CPU to be sharded
        after = "cpu" if self.ref_model is not None else model.device
        model.to(self.args.device)
        yield
        model.to(after)

    def get_train_dataloader(self):
        """Return Trainer's loader, over rows with precomputed columns if they are wanted."""
        self.train_dataset = self.with_reference(self.train_dataset)
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset=None):
        """Return Trainer's loader. Raises InputError if the reference is gone.

        eval_dataset: None, a name among several, or other rows, which are prepared here."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self.with_reference(self.tokenize(eval_dataset, "eval_dataset"))
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """Return Trainer's loader of the rows for `predict`, which are prepared here."""
        return super().get_test_dataloader(
            self.with_reference(self.tokenize(test_dataset, "test_dataset")))

    # ------------------------------------------------------------------ metrics and samples
    def add_to_log(self, metrics, pairs):
        """Add the metrics of a micro-batch, means over its pairs, to those of the next log."""
        if self.starts_at_reference and self.state.global_step == 0 and not self.metric_sums:
            rewards, logps = (torch.stack([metrics[f"{kind}/{side}"] for side in SIDES])
                              for kind in ("rewards", "logps"))
            common.warn_of_noise(rewards / self.beta, logps, allowed=0.002)  # means hide much
        metrics = {**metrics, "pairs": 1}
        for name, mean in metrics.items():
            self.metric_sums[name] = self.metric_sums.get(name, 0) + mean * pairs

    def log(self, logs, start_time=None):
        """Log as Trainer does, and add the metrics' means over all pairs since the last log."""
        if "loss" in logs and self.metric_sums:
            sums = [float(total) for total in self.metric_sums.values()]
            sums = self.accelerator.reduce(torch.tensor(sums, device=self.args.device), "sum")
            sums = dict(zip(self.metric_sums, sums.tolist(), strict=True))
            pairs = sums.pop("pairs")
            logs = {**logs, **{name: total / pairs for name, total in sums.items()}}
            self.metric_sums = {}
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluate a batch. Returns its loss, the rewards [B, 2] of both answers, and 0 [B]."""
        inputs["input_ids"] = inputs["prompt_input_ids"]  # for include_for_metrics
        with torch.no_grad():
            losses, metrics = self.pair_losses(model, inputs)
        metrics = {**metrics, "loss": losses}
        self.eval_metrics.append(self.accelerator.gather_for_metrics(metrics))
        if prediction_loss_only:
            return losses.mean(), None, None
        rewards = torch.stack([metrics["rewards/chosen"], metrics["rewards/rejected"]], dim=1)
        return losses.mean(), rewards, torch.zeros_like(losses, dtype=torch.long)

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None,
                        metric_key_prefix="eval"):
        """Evaluate as Trainer does, with the mean of each metric over all pairs, and samples."""
        self.eval_metrics = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only,
                                         ignore_keys, metric_key_prefix)
        for name in self.eval_metrics[0]:
            values = torch.cat([metrics[name] for metrics in self.eval_metrics])
            output.metrics[f"{metric_key_prefix}_{name}"] = values.cpu().double().mean().item()
        if self.generate_during_eval:
            self.log_generations(dataloader.dataset)
        return output

    def get_batch_samples(self, model, batch, device=None):
        """Sample answers (TRL), or collect micro-batches (Trainer): two methods of one name.

        TRL's, of (model, collated batch): texts, prompt and answer, of policy and reference.
        Trainer's, of (iterator, number of batches, device): the micro-batches of an optimizer step
        and the number of their pairs on all ranks."""
        if isinstance(batch, int):
            batches, _ = super().get_batch_samples(model, batch, device)
            for micro_batch in batches:  # Trainer counts tokens and operations under these names
                self.add_input_names(micro_batch)
            pairs = sum(len(micro_batch["chosen_labels"]) for micro_batch in batches)
            return batches, self.accelerator.reduce(torch.tensor(float(pairs), device=device))
        prompts, is_encoder_decoder = batch["prompt_input_ids"], self.is_encoder_decoder
        return tuple([chats.join_text(self.tokenizer, *pair, is_encoder_decoder)
                      for pair in zip(prompts, answers, strict=True)]
                     for answers in self.sample_both(model, batch))

    def add_input_names(self, batch):
        """Add the inputs of both answers to a collated batch, under the names of all models."""
        sides = ["prompt"] * 2 if self.is_encoder_decoder else ["chosen", "rejected"]
        for kind in ("input_ids", "attention_mask"):
            batch[kind] = torch.cat([batch[f"{side}_{kind}"].flatten() for side in sides])

    def sample_both(self, model, batch):
        """Sample an answer (ids) per prompt of the policy, and of the reference if it is there."""
        answers = [self.sample(model, batch)]
        is_there = self.ref_model is not None and not self.precompute_ref_log_probs
        if self.reference_adapter or is_there:
            with self.reference() as reference:
                answers.append(self.sample(reference, batch))
        return answers

    @torch.no_grad()
    def sample(self, model, batch):
        """Sample an answer per prompt of a collated batch. Returns token ids [B, T].

        An answer ends with an end token of the tokenizer, its chat template or the model."""
        ids, mask = batch["prompt_input_ids"], batch["prompt_attention_mask"]
        first, max_new_tokens = ids.shape[1], max(self.max_length - ids.shape[1], 1)
        if self.is_encoder_decoder:
            first, max_new_tokens = 1, self.max_target_length
        model = self.accelerator.unwrap_model(model).eval()  # the next training step undoes this
        end_ids = chats.end_token_ids(self.tokenizer, model.generation_config.eos_token_id)
        with unsharded(model), self.accelerator.autocast():
            output = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, max_new_tokens=max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id, eos_token_id=[*end_ids] or None)
        return output[:, first:]

    def collate_prompts(self, dataset, numbers):
        """Collate these rows of a tokenized dataset, with a text per prompt to show in samples."""
        rows = [dataset[i] for i in numbers]
        batch = send_to_device(self.data_collator(rows), self.args.device)
        if "shown_prompt" in rows[0]:
            return batch, [row["shown_prompt"] for row in rows]
        ids = batch["prompt_input_ids"]
        return batch, self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def log_generations(self, dataset):
        """Write both models' answers to a few prompts to the trackers and samples.jsonl."""
        step, number = self.state.global_step, min(len(dataset), self.args.eval_batch_size)
        numbers = random.Random(step).sample(range(len(dataset)), number)
        batch, prompts = self.collate_prompts(dataset, numbers)
        with torch.random.fork_rng():  # training draws the same numbers with and without samples
            samples = self.sample_both(self.model, batch)
        if not self.is_world_process_zero():
            return
        answers = [self.tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in samples]
        columns = ["prompt", "policy", "reference"][:1 + len(answers)]
        table = [list(row) for row in zip(prompts, *answers, strict=True)]
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, WandbCallback):
                import wandb
                wandb.log({"game_log": wandb.Table(columns=columns, data=table)})
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                text = "\n\n".join(" | ".join(row) for row in [columns, *table])
                callback.tb_writer.add_text("game_log", text, step)
        rows = [{"update": step, **dict(zip(columns, row, strict=True))} for row in table]
        machinery.append_rows(Path(self.args.output_dir, "samples.jsonl"), rows)


# ----------------------------------------------------------------------------- checks
def check_settings(settings):
    """Check the settings that DPOConfig and the constructor share. Raises InputError."""
    if settings.share_prompts is not None:
        raise InputError(f"share_prompts={settings.share_prompts}: this option is gone, each "
                         "answer runs with its prompt; omit it")
    machinery.check_ranges(settings, {"(0, inf)": ("beta",), "[0, 0.5)": ("label_smoothing",),
                                      "[2, inf)": ("max_length",),
                                      "[1, inf)": ("max_prompt_length", "max_target_length",
                                                   "dataset_num_proc")})
    machinery.check_choices(settings, {"loss_type": LOSSES, "truncation_mode": TRUNCATION_MODES})


def check_arguments(args, settings, *, model, model_init, model_init_kwargs, ref_model,
                    ref_model_init_kwargs, ref_adapter_name, tokenizer, data_collator):
    """Check arguments of the constructor against each other. Raises InputError."""
    with_reference = ref_model is not None or ref_adapter_name is not None
    wrong = {
        "tokenizer=None: give the model's tokenizer":
            tokenizer is None,
        "tokenizer.pad_token=None: rows are padded; set it, for instance tokenizer.pad_token = "
        "tokenizer.eos_token":
            data_collator is None and tokenizer is not None and tokenizer.pad_token_id is None,
        "model=None: give a model, its name, or model_init":
            model is None and model_init is None,
        "model_init: model is given, too; give one or the other":
            model is not None and model_init is not None,
        "model_init_kwargs: they are for a model given as a string":
            model_init_kwargs is not None and not isinstance(model, str),
        "ref_model_init_kwargs: they are for a ref_model given as a string":
            ref_model_init_kwargs is not None and not isinstance(ref_model, str),
        "ref_model: it is the model itself and would be trained; omit it, and the model is copied":
            ref_model is not None and ref_model is model and not isinstance(model, str),
        "ref_adapter_name: ref_model is given, too; give one or the other":
            ref_model is not None and ref_adapter_name is not None,
        "reference_free=True: ref_model or ref_adapter_name is given, too, and would not be used; "
        "give one or the other":
            settings.reference_free and with_reference,
        f"label_smoothing_factor={args.label_smoothing_factor}: it is for Trainer's own loss; use "
        "label_smoothing":
            args.label_smoothing_factor != 0,
    }
    for sentence, is_wrong in wrong.items():
        if is_wrong:
            raise InputError(sentence)
    loss = LOSSES[settings.loss_type]
    if settings.label_smoothing and not loss.takes_label_smoothing:
        warnings.warn(f"label_smoothing={settings.label_smoothing} has no effect on the loss "
                      f"{settings.loss_type}", stacklevel=3)
    if settings.reference_free and settings.precompute_ref_log_probs:
        warnings.warn("precompute_ref_log_probs=True has no effect with reference_free",
                      stacklevel=3)


def load_model(model, is_encoder_decoder=None, kwargs=None):
    """Load the language model of a name, causal or encoder-decoder. Raises InputError.

    A model object is returned as it is."""
    if not isinstance(model, (str, Path)):
        return model
    with explain(f"model {model} can't be loaded"):
        return machinery.load_model(str(model), is_encoder_decoder, **(kwargs or {}))


# ----------------------------------------------------------------------------- rows
def split_row(row):
    """Return a row's prompt, chosen and rejected answer: three texts, or three lists of messages.

    The prompt of a chat is the messages with which both conversations begin; a text prompt is the
    user's turn. Raises InputError."""
    prompt, chosen, rejected = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        return prompt, chosen, rejected
    chosen, rejected = join_chat(prompt, chosen), join_chat(prompt, rejected)
    longest = max(min(len(chosen), len(rejected)) - 1, 0)  # an answer has a message at least
    start = min(same_messages(chosen, rejected), longest)
    firsts = chosen[start:start + 1] + rejected[start:start + 1]
    if [message["role"] for message in firsts] != ["assistant", "assistant"]:
        raise InputError(f"chosen, rejected: from message {start} on they are not two answers of "
                         "the assistant to one prompt; correct the row or remove it")
    return chosen[:start], chosen[start:], rejected[start:]


def render_row(row, tokenizer):
    """Return a row's prompt, chosen and rejected answer as texts. Raises InputError.

    Chats go through the tokenizer's template, see split_chat."""
    prompt, chosen, rejected = split_row(row)
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompts, answers = zip(*(split_chat(tokenizer, prompt, answer, row)
                                 for answer in (chosen, rejected)), strict=True)
        # a template may write more before one answer than before the other (an empty thought)
        prompt = os.path.commonprefix(prompts)
        chosen, rejected = (start[len(prompt):] + answer
                            for start, answer in zip(prompts, answers, strict=True))
    for name, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not isinstance(text, str):
            raise InputError(f"{name}={text!r}: not a text; give three texts, or three lists of "
                             "chat messages")
    return prompt, chosen, rejected


def tokenize_answer(prompt, answer, tokenizer):
    """Tokenize a prompt and its answer as one text, and split the ids where the prompt's end.

    A token that spans the boundary belongs to the answer. Returns {"prompt_input_ids",
    "prompt_attention_mask", "input_ids", "attention_mask"}."""
    prompt_ids, ids = (tokenizer(text, add_special_tokens=False, verbose=False).input_ids
                       for text in (prompt, prompt + answer))
    end = len(os.path.commonprefix([prompt_ids, ids]))
    return {"prompt_input_ids": ids[:end], "prompt_attention_mask": [1] * end,
            "input_ids": ids[end:], "attention_mask": [1] * (len(ids) - end)}


def split_tokens(prompt, answers, tokenize_answer):
    """Tokenize a prompt with each of its answers. All answers begin where the first of them does.

    Returns the prompt's token ids, and a list of the answers'."""
    parts = [tokenize_answer(prompt, answer) for answer in answers]
    end = min(len(part["prompt_input_ids"]) for part in parts)
    both = [part["prompt_input_ids"] + part["input_ids"] for part in parts]
    return both[0][:end], [ids[end:] for ids in both]


def truncate_prompt(ids, length, mode, bos_token_id):
    """Keep the last (keep_end) or the first (keep_start) tokens of a prompt, and its BOS."""
    if len(ids) <= length or mode == "keep_start":
        return ids[:length]
    first = int(ids[0] == bos_token_id)
    return ids[:first] + ids[len(ids) - length + first:]


def tokenize_pair(row, tokenizer, is_encoder_decoder=False, max_length=512, max_prompt_length=None,
                  max_target_length=128, truncation_mode="keep_end", label_pad_token_id=-100,
                  build=None):
    """Tokenize {"prompt", "chosen", "rejected"}. Returns lists of ints. Raises InputError.

    They are {chosen,rejected}_{input_ids,attention_mask,labels} and prompt_{input_ids,
    attention_mask}; of an encoder-decoder the answers are labels only. Labels of the prompt are
    label_pad_token_id. BOS opens a text if the tokenizer writes it, EOS ends its answers; a chat's
    template writes both itself. An empty prompt is BOS or EOS, behind which answers begin.
    Long rows: the prompt is truncated to max_prompt_length (None: to what the longer answer leaves,
    at least half of max_length), then the answers to the rest of max_length."""
    is_text = isinstance(row.get("chosen"), str)
    prompt, *answers = render_row(row, tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if is_encoder_decoder:  # its tokenizer's special tokens
        settings = {"add_special_tokens": is_text, "verbose": False}
        full_prompt = tokenizer(prompt, **settings).input_ids
        prompt = tokenizer(prompt, **settings, truncation=True,
                           max_length=max_prompt_length or max_length).input_ids
        answers = [tokenizer(answer, **settings).input_ids for answer in answers]
        room = max_target_length
    else:
        build = build or partial(tokenize_answer, tokenizer=tokenizer)
        full_prompt, answers = split_tokens(prompt, answers, build)
        if is_text and full_prompt[:1] != [bos] and tokenizer("").input_ids[:1] == [bos]:
            full_prompt = [bos] + full_prompt
        if is_text and eos is not None:
            answers = [ids if ids[-1:] == [eos] else ids + [eos] for ids in answers]
        if max_prompt_length is None:
            max_prompt_length = max(max_length - max(map(len, answers)), max_length // 2)
        prompt = truncate_prompt(full_prompt, max_prompt_length, truncation_mode, bos)
        prompt = prompt or [token for token in (bos, eos) if token is not None][:1]
        room = max_length - len(prompt)
    tokens = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt),
              "is_truncated": len(prompt) < len(full_prompt) or max(map(len, answers)) > room}
    for name, ids in zip(("chosen", "rejected"), answers, strict=True):
        ids = ids[:room]
        if is_encoder_decoder:
            tokens[f"{name}_labels"] = ids
            continue
        tokens[f"{name}_input_ids"] = prompt + ids
        tokens[f"{name}_attention_mask"] = [1] * len(prompt + ids)
        tokens[f"{name}_labels"] = [label_pad_token_id] * len(prompt) + ids
    return tokens


def prepare_row(row, number, tokenize_row, tokenizer, label_pad_token_id):
    """Tokenize a row. Returns its tokens, the helper columns, and its fault: empty, equal or ""."""
    with explain(f"row {number} can't be tokenized", place=f"row {number}"):
        tokens = {"is_truncated": False, **tokenize_row(row)}
        tokens["shown_prompt"] = text_to_show(split_row(row)[0])
    labels = [tokens["chosen_labels"], tokens["rejected_labels"]]
    tokens["length"] = sum(map(len, labels))
    answers = [[token for token in ids if token != label_pad_token_id]
               for ids in labels]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    tokens["fault"] = "equal" if labels[0] == labels[1] else ""
    if not all(text.strip() for text in texts):
        tokens["fault"] = "empty"
    if not tokens["prompt_input_ids"]:  # nothing predicts the first token of an answer
        tokens["fault"] = "empty"
    return tokens


@dataclass
class DPODataCollatorWithPadding:
    """Collate tokenized rows into tensors, padded on the right.

    The prompts of a causal model, which it answers in samples, are padded on the left. Fills:
    pad_token_id (ids), 0 (masks), label_pad_token_id (labels). Columns *_logps become float tensors
    [B], all others lists; the helper columns stay behind."""

    pad_token_id: int = 0
    label_pad_token_id: int = -100
    is_encoder_decoder: Optional[bool] = False

    def __call__(self, features):
        fills = {"input_ids": self.pad_token_id, "attention_mask": 0,
                 "labels": self.label_pad_token_id}
        batch = {}
        for key in features[0]:
            if key in HELPER_COLUMNS:
                continue
            column = [row[key] for row in features]
            name, _, kind = key.partition("_")
            if kind in fills and name in ("prompt", "chosen", "rejected"):
                side = "left" if name == "prompt" and not self.is_encoder_decoder else "right"
                column = [torch.tensor(ids, dtype=torch.long) for ids in column]
                column = pad_sequence(column, True, fills[kind], side)
            elif key.endswith("_logps"):
                column = torch.tensor(column)
            batch[key] = column
        return batch


# ----------------------------------------------------------------------------- the script
def show_samples(trainer, title):
    """Print and keep the policy's answers to eight prompts, always with one seed."""
    rows = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    batch, prompts = trainer.collate_prompts(rows, range(min(8, len(rows))))
    with torch.random.fork_rng():
        torch.manual_seed(trainer.args.seed)
        ids = trainer.sample(trainer.model, batch)
    answers = trainer.tokenizer.batch_decode(ids, skip_special_tokens=True)
    if trainer.is_world_process_zero():
        machinery.log_samples(trainer.args.output_dir, title, [
            {"update": trainer.state.global_step, "prompt": prompt, "policy": answer}
            for prompt, answer in zip(prompts, answers, strict=True)])


def main(config: DPOConfig):
    """Train a language model with DPO on pairs of answers, one chosen and one rejected.

    Returns the metrics of the last evaluation, or of the training if there is none."""
    out, checkpoint = machinery.start_run(config)
    tokenizer, model = machinery.load_language_model(
        config.model_name or str(TOY / "model"), **machinery.loading_arguments(config))
    machinery.use_few_threads(model)
    pairs, held_out = machinery.load_train_and_eval_rows(config, "pairs.jsonl", "pairs_test.jsonl")
    trainer = DPOTrainer(model, args=config, train_dataset=pairs, eval_dataset=held_out,
                         tokenizer=tokenizer, callbacks=[machinery.Journal(out, rows=pairs)])
    trainer.remove_callback(ProgressCallback)  # the Journal has a bar

    if not checkpoint and not trainer.is_sharded:
        show_samples(trainer, "before training")
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_model(str(out))
    if held_out is not None:
        metrics = machinery.last_evaluation(trainer)
    show_samples(trainer, "after training")
    if trainer.is_world_process_zero():
        what = ("A language model trained on pairs of answers with DPO "
                f"(loss {trainer.loss_type}, beta {trainer.beta})")
        data = {"pairs": config.dataset or "toy/pairs.jsonl"}
        machinery.write_model_card(out, what, config, data, metrics)
    return metrics


if __name__ == "__main__":
    # beta: so small a model, moved further, forgets its grammar
    machinery.run(main, DPOConfig, own="--gradient-accumulation-steps 32",
                  lora="--torch-dtype bfloat16",
                  toy="--beta 3 --num-train-epochs 8 --per-device-train-batch-size 32 "
                      "--per-device-eval-batch-size 64 --no-gradient-checkpointing")
