"""Proximal policy optimization of a language model against a reward (RLHF).

Papers: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences"
(arXiv:1909.08593), the recipe; Schulman et al. 2017, "Proximal Policy Optimization Algorithms"
(arXiv:1707.06347), the update; Schulman et al. 2016, "High-Dimensional Continuous Control Using
Generalized Advantage Estimation" (arXiv:1506.02438), the advantages.

The policy pi answers a prompt x with a response y, and a reward model gives the pair one score
r(x, y). pi(y_t) is short for pi(y_t | x, y_<t). Token t of the response gets the reward (Ziegler et
al., equation 2, written per token)

    R_t = -beta (log pi_old(y_t) - log pi_ref(y_t)) + [t is the last token] r(x, y)

where pi_old is the policy that sampled, pi_ref the initial one, beta the KL coefficient, and [.] is
1 if true, else 0. From these rewards and from V_old,t, the value head's predictions before the
update, GAE estimates the advantages GAE_t and return_t = GAE_t + V_old,t. A_t is GAE_t whitened
over the batch: mean 0, variance 1. Then the policy takes a few epochs of minibatch steps on the
clipped surrogate (Schulman et al. 2017, equations 7 and 9). With V_t the new prediction, eps
`cliprange` and c_V `vf_coef`, the loss of a token, averaged over tokens, is

    loss_t = -min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t) + c_V 1/2 (V_t - return_t)^2
    ratio_t = pi(y_t) / pi_old(y_t)

Then beta moves by how far the KL is from its target (`AdaptiveKLController`).

Start reading at `PPOTrainer.step`. Part 1 is the algorithm, Part 2 the machinery around it; prompts
become scored responses in `rollout` and `main`, at the end of the file.

Differences from the papers: the value loss is clipped too (as in OpenAI's code); there is no bonus
for entropy; a response that is truncated at max_new_tokens counts as ended.
The API, defaults and metrics follow TRL 0.7.10. Differences:
  1. Dropout is off throughout: log-probabilities are those of the policy that sampled.
  2. Rows are padded on the right, so the tokenizer's padding side changes no number.
  3. GAE skips masked tokens (`response_masks`): they are not actions of the policy.
  4. Whitening, statistics and the KL controller see all ranks. A gradient is the mean over all
     tokens of the optimizer step, however they are split into minibatches and ranks.
  5. If a minibatch's mean ratio exceeds `ratio_threshold`, or `early_stopping` holds, the optimizer
     step is skipped: Adam's moments do not move either. Early stopping reads kl_k3 of the epoch.
  6. With LoRA the reference is the adapter as it was loaded, not the bare base model.
  7. `temperature` divides the logits wherever log-probabilities are taken, not only in sampling.
  8. Checkpoints hold the complete training state: a resumed run reproduces the uninterrupted one.

    torchrun ppo.py --batch-size 256                       one process, the toy model
    torchrun --nproc_per_node 8 ppo.py --model-name my/model --reward-model my/classifier
"""
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal, Optional

import numpy as np
import torch
import tyro
from accelerate.utils import DistributedType, gather_object
from accelerate.utils.memory import clear_device_cache
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, DistributedSampler, default_collate
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

import chats
import common
import machinery
from common import (
    TOY,
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    InputError,
    entropy_from_logits,
    logprobs_from_logits,
    masked_mean,
    masked_var,
    masked_whiten,
    only_logits_of,
    set_seed,
)

FORWARD_TOKENS = 1024  # tokens (rows x width) per forward pass without gradient
JSON = tyro.conf.arg(metavar="JSON", constructor=json.loads)
HIDDEN = tyro.conf.Suppress


# =============================================================================
# Part 1, the algorithm: configuration, mathematics, the update
# =============================================================================

# ----------------------------------------------------------------------------- configuration
@dataclass
class PPOConfig(machinery.LoadingFlags):
    """List the settings of PPO. Sizes are per process unless they say global."""

    exp_name: str = field(default_factory=lambda: Path(sys.argv[0]).stem)
    """Name of the experiment: title of the model card, name of the output folder."""
    seed: int = 0
    """Seed of weights and data order on all ranks; each rank samples with its own."""
    log_with: Optional[Literal["wandb", "tensorboard"]] = None
    """Tracker in addition to metrics.jsonl."""
    task_name: Optional[str] = None
    """Name of the task, for the tracker and the model card."""
    model_name: Optional[str] = None
    """Policy: hub name or folder of a model or a LoRA adapter. None: the toy model."""
    query_dataset: Optional[str] = None
    """Prompts: a file, a folder or a hub name. None: the toy prompts."""
    reward_model: Optional[str] = None
    """Classifier (hub name, folder), or file.py:function (see docs/ppo.md). None: the toy's."""
    remove_unused_columns: bool = True
    """Leave the dataset's other columns out of the batch. A reward's metadata always has them."""
    tracker_kwargs: Annotated[dict, JSON] = field(default_factory=dict)
    """Arguments for the tracker's init, such as {"wandb": {"name": "try 7"}}."""
    accelerator_kwargs: Annotated[dict, JSON] = field(default_factory=dict)
    """Arguments for accelerate.Accelerator, such as {"mixed_precision": "bf16"}."""
    project_kwargs: Annotated[dict, JSON] = field(default_factory=dict)
    """Arguments for ProjectConfiguration, such as {"logging_dir": "logs"}."""
    tracker_project_name: str = "trl"
    """Project name for the tracker."""
    push_to_hub_if_best_kwargs: Annotated[dict, JSON] = field(default_factory=dict)
    """Arguments of push_to_hub for a new best mean score: repo_id, private, token."""
    steps: int = 20000
    """Length of the run in samples (prompt and response), global."""
    learning_rate: float = 1e-5
    """Adam's learning rate. In the script, LoRA: 1e-4."""
    adap_kl_ctrl: bool = True
    """Adapt the KL coefficient to target. False: keep it at init_kl_coef."""
    init_kl_coef: float = 0.2
    """Initial KL coefficient, beta. 0 stays 0, and the score is all of the reward."""
    kl_penalty: Literal["kl", "abs", "mse", "full"] = "kl"
    """Per token: log ratio, its absolute value, half its square, or the exact KL."""
    target: float = 6
    """KL per response (nats) that the adaptive controller aims at."""
    horizon: float = 10000
    """Samples (global) over which the adaptive controller corrects."""
    gamma: float = 1
    """Discount factor."""
    lam: float = 0.95
    """Lambda of GAE."""
    cliprange: float = 0.2
    """eps: the ratio is clipped to [1 - eps, 1 + eps]."""
    cliprange_value: float = 0.2
    """The new value is clipped to the old value plus or minus this."""
    vf_coef: float = 0.1
    """c_V: weight of the value loss."""
    batch_size: int = 256
    """Samples per PPO update."""
    forward_batch_size: Optional[int] = None
    """Old name of mini_batch_size."""
    mini_batch_size: int = 1
    """Samples per forward and backward pass. In the script, your own model: 8."""
    gradient_accumulation_steps: int = 1
    """Minibatches per optimizer step."""
    world_size: Annotated[Optional[int], HIDDEN] = None
    """Number of ranks, set by the trainer."""
    ppo_epochs: int = 4
    """Passes over each batch."""
    max_grad_norm: Optional[float] = None
    """Clip the gradient of each optimizer step to this norm. None: no clipping."""
    optimize_cuda_cache: Optional[bool] = None
    """Old name of optimize_device_cache."""
    optimize_device_cache: Optional[bool] = False
    """Empty the device cache after each update."""
    early_stopping: bool = False
    """Stop a batch's epochs once the policy has moved 1.5 x target_kl."""
    target_kl: float = 1
    """KL from the old policy (nats per token, epoch mean) for early_stopping."""
    compare_steps: int = 1
    """Check for a new best mean score every this many updates."""
    ratio_threshold: float = 10.0
    """Skip an optimizer step if a minibatch's mean ratio is above this."""
    use_score_scaling: bool = False
    """Divide scores by their running standard deviation."""
    use_score_norm: bool = False
    """Subtract the running mean from scores, too (with use_score_scaling)."""
    score_clip: Optional[float] = None
    """Clip scores to [-score_clip, score_clip]. None: no clipping."""
    whiten_rewards: bool = False
    """Scale token rewards to standard deviation 1 before advantages."""
    is_encoder_decoder: Annotated[Optional[bool], HIDDEN] = None
    """Set by the trainer, from the model."""
    is_peft_model: Annotated[Optional[bool], HIDDEN] = None
    """Set by the trainer, from the model."""
    backward_batch_size: Annotated[Optional[int], HIDDEN] = None
    """Samples per optimizer step: mini_batch_size x gradient_accumulation_steps."""
    global_backward_batch_size: Annotated[Optional[int], HIDDEN] = None
    """backward_batch_size summed over ranks."""
    global_batch_size: Annotated[Optional[int], HIDDEN] = None
    """batch_size summed over ranks."""

    # the script's own
    output_dir: Optional[str] = None
    """Output folder. None: runs/<exp_name>."""
    resume_from: Optional[str] = None
    """A checkpoint, or the output folder of a killed run (its last checkpoint)."""
    save_freq: int = 10
    """Write a checkpoint every this many updates."""
    save_total_limit: Optional[int] = 1
    """Number of checkpoints to keep. None: all."""
    dataset_split: Optional[str] = None
    """Split of the prompts. None: train, or the only one."""
    dataset_config: Optional[str] = None
    """Configuration of a dataset that has several, such as main of gsm8k."""
    max_new_tokens: int = 24
    """Maximum length of a response, in tokens. Your own model: 128."""
    max_query_length: Optional[int] = None
    """Truncate prompts to this many tokens. None: no truncation."""
    temperature: float = 1.0
    """Temperature of sampling and of all log-probabilities."""
    generation_batch_size: int = 256
    """Prompts per batch in sampling. Your own model: 64."""
    missing_eos_penalty: Optional[float] = None
    """Subtract this from the score of a response without an end. None: nothing."""
    reward_label: Optional[str] = None
    """Label (name or number) of the reward classifier whose logit is the score."""
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the policy's weights; the script loads LoRA's base model in bfloat16."""
    bf16: bool = False
    """Compute in bfloat16 (mixed precision); the type of the weights stays torch_dtype."""
    use_cpu: bool = False
    """Compute on the CPU even if there is a GPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    lora_r: int = 0
    """Rank of a fresh LoRA adapter on all linear layers. 0: train all weights."""
    lora_alpha: int = 16
    """LoRA scale is lora_alpha / lora_r."""

    def __post_init__(self):
        if self.forward_batch_size is not None:
            warnings.warn("forward_batch_size: use mini_batch_size, its name today", stacklevel=3)
            self.mini_batch_size = self.forward_batch_size
        if self.optimize_cuda_cache is not None:
            warnings.warn("optimize_cuda_cache: use optimize_device_cache, its name today",
                          stacklevel=3)
            self.optimize_device_cache = self.optimize_cuda_cache
        machinery.check_ranges(self, {
            "(0, inf)": ("steps", "batch_size", "mini_batch_size", "gradient_accumulation_steps",
                         "ppo_epochs", "compare_steps", "save_freq", "save_total_limit",
                         "target", "horizon",
                         "max_new_tokens", "temperature", "generation_batch_size",
                         "max_query_length", "max_grad_norm", "score_clip", "ratio_threshold",
                         "target_kl", "lora_alpha"),
            "[0, inf)": ("learning_rate", "init_kl_coef", "cliprange", "cliprange_value",
                         "vf_coef", "lora_r"),
            "[0, 1]": ("gamma", "lam"),
        })
        self.backward_batch_size = self.mini_batch_size * self.gradient_accumulation_steps
        if self.batch_size % self.backward_batch_size:
            raise InputError(
                f"batch_size={self.batch_size} is not a multiple of mini_batch_size x "
                f"gradient_accumulation_steps = {self.mini_batch_size} x "
                f"{self.gradient_accumulation_steps}: change one of the three, for example to "
                f"mini_batch_size={math.gcd(self.batch_size, self.mini_batch_size)} and "
                "gradient_accumulation_steps=1")
        machinery.check_choices(self, {"kl_penalty": ("kl", "abs", "mse", "full")})
        machinery.check_dicts(self, "tracker_kwargs", "accelerator_kwargs", "project_kwargs",
                              "push_to_hub_if_best_kwargs")
        if self.use_score_norm and not self.use_score_scaling:
            warnings.warn("use_score_norm has no effect without use_score_scaling", stacklevel=3)
        if self.push_to_hub_if_best_kwargs and "repo_id" not in self.push_to_hub_if_best_kwargs:
            raise InputError("push_to_hub_if_best_kwargs: add the repo_id to push to")
        self.total_ppo_epochs = math.ceil(self.steps / self.batch_size)

    def to_dict(self):
        return asdict(self)


# ----------------------------------------------------------------------------- mathematics
# Letters in shapes: B rows (samples), L tokens of the longest response, T tokens of the longest
# prompt with its response, N response tokens of all rows.
def kl_penalty(logprobs, ref_logprobs, kind):
    """Estimate KL(pi_old || pi_ref) per token [B, L] from log-probabilities [B, L].

    kind "full" takes whole log-softmaxes [B, L, vocabulary]."""
    difference = logprobs - ref_logprobs
    if kind == "kl":
        return difference                         # unbiased, may be negative
    if kind == "abs":
        return difference.abs()
    if kind == "mse":
        return 0.5 * difference.square()          # slightly biased, never negative
    if kind == "full":
        return (logprobs.exp() * difference).sum(-1)  # exact: sum over the vocabulary
    raise InputError(f"kl_penalty={kind!r}: choose kl, abs, mse or full")


def gae(values, rewards, mask, gamma, lam):
    """Estimate advantages and returns [B, L] by generalized advantage estimation.

        delta_t = R_t + gamma V_{t+1} - V_t                   (Schulman et al. 2016, section 3)
        GAE_t   = delta_t + gamma lam GAE_{t+1}               (eq. 16, as a recursion)

    values, rewards, mask [B, L]."""
    advantages = torch.zeros_like(values)
    nextvalues = lastgaelam = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * nextvalues - values[:, t]
        advantages[:, t] = delta + gamma * lam * lastgaelam
        # a masked token (padding, a tool's output) is not an action of the policy: skip it
        nextvalues = torch.where(mask[:, t] > 0, values[:, t], nextvalues)
        lastgaelam = torch.where(mask[:, t] > 0, advantages[:, t], lastgaelam)
    return advantages * mask, (advantages + values) * mask


def policy_loss(logprobs, old_logprobs, advantages, mask, cliprange):
    """Compute the clipped surrogate (Schulman et al. 2017, eq. 7) of tensors [B, L].

    Returns the loss (a mean over tokens: `step` weights minibatches by their tokens), the ratio
    [B, L], and where the clip binds [B, L] (1 or 0)."""
    ratio = torch.exp(logprobs - old_logprobs)
    pg_losses = -advantages * ratio
    pg_losses2 = -advantages * torch.clamp(ratio, 1.0 - cliprange, 1.0 + cliprange)
    loss = masked_mean(torch.max(pg_losses, pg_losses2), mask)  # max(-a, -b) = -min(a, b)
    return loss, ratio, (pg_losses2 > pg_losses).float()


def value_loss(vpreds, values, returns, mask, cliprange_value):
    """Compute the clipped squared error of values [B, L], and where the clip binds (1 or 0).

        1/2 max((V - return)^2, (clip(V, V_old - eps_V, V_old + eps_V) - return)^2)"""
    vpredclipped = torch.clamp(vpreds, values - cliprange_value, values + cliprange_value)
    vf_losses1 = (vpreds - returns) ** 2
    vf_losses2 = (vpredclipped - returns) ** 2
    loss = 0.5 * masked_mean(torch.max(vf_losses1, vf_losses2), mask)
    return loss, (vf_losses2 > vf_losses1).float()


class AdaptiveKLController:
    """Steer the KL per response to a target (Ziegler et al. 2019, section 2.2).

        beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)         for n samples
    """

    def __init__(self, init_kl_coef, target, horizon):
        self.value, self.target, self.horizon = init_kl_coef, target, horizon  # value: beta

    def update(self, current, n_steps):
        """Adapt beta to the mean KL per response (`current`) of these n_steps samples."""
        error = min(max(current / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n_steps / self.horizon


class FixedKLController:
    """Keep beta as it is."""

    def __init__(self, kl_coef):
        self.value = kl_coef

    def update(self, current, n_steps):
        """Do nothing."""


# ----------------------------------------------------------------------------- the update
class PPOTrainer(machinery.LoopTrainer):
    """Train a policy with PPO. The outer loop is the user's own: generate, score, step.

        for batch in trainer.dataloader:
            responses = trainer.generate(batch["input_ids"], return_prompt=False, do_sample=True,
                                         max_new_tokens=24)
            scores = [torch.tensor(my_reward(tokenizer.decode(r))) for r in responses]
            stats = trainer.step(batch["input_ids"], responses, scores)

    Call every method on every rank. The constructor (Part 2) makes `self.model`, a model with a
    value head as accelerate wraps it, for passes with gradient. `self.policy` has the same weights,
    without the wrapper, for passes without gradient."""

    def step(self, queries, responses, scores, response_masks=None):
        """Run one PPO update on B scored responses. Returns statistics over all ranks, as NumPy.

        queries, responses: sequences of B LongTensors [length]. scores: B scalar tensors.
        response_masks: None, or B tensors [response_length] with 0 at tokens that the
        policy did not write (a tool's output). B is the same on every rank.
        Raises InputError for a wrong input, before any weight moves, and for a loss that is not
        finite, before it reaches a weight."""
        config = self.config
        clock = Stopwatch()
        queries, responses, raw_scores, response_masks = self.check_step(
            queries, responses, scores, response_masks)
        scores = self.scale_scores(raw_scores)
        self.push_if_best(raw_scores)  # they are the scores of the policy before this update

        # 1. Old policy and reference: log-probabilities, values, mask of response tokens, [B, L]
        #    each. full_kl is empty; for kl_penalty "full" it holds the KL, which needs all logits
        old_logprobs, ref_logprobs, old_values, masks, *full_kl = self.evaluate_responses(
            queries, responses, response_masks)
        clock.lap("forward_pass")

        # 2. Token rewards: the KL penalty on every token, the score on the last one
        rewards, non_score_rewards, _ = self.compute_rewards(
            scores, old_logprobs, ref_logprobs, masks, *full_kl)
        clock.lap("compute_rewards")

        # 3. Advantages and returns
        old_values, advantages, returns = self.compute_advantages(old_values, rewards, masks)
        clock.lap("compute_advantages")

        # 4. Epochs of minibatches: forward, loss, backward; then an optimizer step
        batch = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "values": old_values,
                 "advantages": advantages, "returns": returns}
        train_stats = []
        self.model.train()  # gradient checkpointing needs it; dropout is off
        self.stepper.zero_grad()  # an update that raised may have left gradients
        for epoch, step_rows in self.shuffled_rows(len(queries)):
            # the loss is the mean over the tokens of this optimizer step, on all ranks
            step_tokens = self.sum_over_ranks(masks[step_rows].sum())
            minibatches = common.split(step_rows, config.mini_batch_size)
            for i, rows in enumerate(minibatches):
                # DDP averages the ranks' gradients in the last minibatch only, FSDP 2 in each
                exchange = i + 1 == len(minibatches) or self.accelerator.is_fsdp2
                with nullcontext() if exchange else self.accelerator.no_sync(self.model):
                    inputs = self.select(rows, queries, responses, response_masks)
                    logprobs, logits, vpreds, mask = self.batched_forward_pass(
                        self.model, **inputs, return_logits=True)
                    # this minibatch, up to its longest response
                    minibatch = {name: x[rows, :mask.shape[1]] for name, x in batch.items()}
                    loss_p, loss_v, stats = self.loss(
                        **minibatch, logprobs=logprobs, logits=logits, vpreds=vpreds, mask=mask)
                    del logits  # the largest tensor: free it before the backward pass
                    # times world_size, since accelerate averages the gradients over ranks
                    weight = mask.sum() * config.world_size / step_tokens
                    self.accelerator.backward((loss_p + loss_v) * weight)  # loss_v includes c_V
                train_stats.append({**stats, "mask": mask, "epoch": epoch})
            stop = self.has_moved_too_far(train_stats)
            self.optimizer_step(train_stats[-len(minibatches):], skip=stop)
            if stop:  # no further epoch either
                break
        clock.lap("optimize_step")

        # 5. Statistics over all ranks, and the KL controller
        stats = self.record_step_stats(
            kl_coef=self.kl_ctl.value, scores=scores, raw_scores=raw_scores, logprobs=old_logprobs,
            ref_logprobs=ref_logprobs, non_score_reward=non_score_rewards, masks=masks,
            queries=queries, responses=responses, values=old_values, returns=returns,
            train_stats=train_stats)
        clock.lap("calc_stats")
        self.kl_ctl.update(stats["objective/kl"].item(), len(queries) * config.world_size)
        self.finish_step()
        return to_numpy({**stats, **clock.times()})

    def evaluate_responses(self, queries, responses, response_masks=None):
        """Compute old and reference log-probabilities, values and mask, [B, L] each.

        For kl_penalty "full" also its penalties [B, L], since whole log-softmaxes are too large to
        keep. Without gradient, in batches of similar length."""
        self.policy.eval()  # as in sampling, and as the reference; `step` sets train mode again
        is_full = self.config.kl_penalty == "full"
        lengths = [len(q) + len(r) for q, r in zip(queries, responses, strict=True)]
        results = [None] * len(queries)
        # autocast around all passes: it casts the policy's weights once
        with (torch.no_grad(), common.unsharded(self.policy, self.ref_model),
              self.accelerator.autocast()):
            for rows in common.batches_of_similar_length(lengths, FORWARD_TOKENS):
                inputs = self.select(rows, queries, responses, response_masks)
                logprobs, logits, values, mask = self.batched_forward_pass(
                    self.policy, **inputs, return_logits=is_full)
                with self.reference() as reference:
                    ref_logprobs, ref_logits, _, _ = self.batched_forward_pass(
                        reference, **inputs, return_logits=is_full)
                columns = [logprobs, ref_logprobs, values, mask]
                if is_full:
                    logits, ref_logits = logits.log_softmax(-1), ref_logits.log_softmax(-1)
                    columns.append(self._kl_penalty(logits, ref_logits))
                for i, *result in zip(rows, *columns, strict=True):
                    results[i] = result
        # in the order of the lists again, padded to the longest response of all
        return [pad_sequence(column, batch_first=True) for column in zip(*results, strict=True)]

    def batched_forward_pass(self, model, queries, responses, model_inputs, return_logits=False,
                             response_masks=None):
        """Run a model over prompts and responses, padded on the right.

        Returns log-probabilities [B, L], logits [B, L, vocabulary] or None (divided by the
        temperature), values [B, L] and the mask [B, L] of response tokens. Column 0 is the first
        response token (of an encoder-decoder: the first after the start token).
        model_inputs: what `prepare_model_inputs` makes of queries and responses."""
        if is_padded_left(model_inputs):  # by a caller: positions would count from the padding
            model_inputs = self.prepare_model_inputs(queries, responses)
        if self.config.is_encoder_decoder:
            ids = model_inputs["decoder_input_ids"]                                    # [B, T]
            start_tokens = 1  # the decoder's start token is not part of the response
            starts = [0 for _ in queries]
        else:
            ids = model_inputs["input_ids"]                                            # [B, T]
            start_tokens = 0
            starts = [len(query) - 1 for query in queries]
        lengths = [len(response) - start_tokens for response in responses]
        # column t predicts token t + 1: the prompt's last token predicts the first of the response
        column = torch.arange(ids.shape[1], device=ids.device)
        start, length = ids.new_tensor(starts)[:, None], ids.new_tensor(lengths)[:, None]
        predicts_response = (column >= start) & (column < start + length)              # [B, T]
        labels = ids.roll(-1, dims=1)[predicts_response]                               # [N]

        # only the N hidden states that predict a response token reach the output layer
        with only_logits_of(model, predicts_response), self.accelerator.autocast():
            logits, _, values = model(**model_inputs)           # [N, vocabulary], None, [B, T]
        if self.config.temperature != 1.0:
            logits = logits / self.config.temperature
        logprobs = logprobs_from_logits(logits, labels)                                # [N]
        values = values[predicts_response]                                             # [N]

        def to_rows(x):  # [N, ...] -> [B, L, ...]: the N tokens are in the order of the rows
            return pad_sequence(x.split(lengths), batch_first=True)

        if response_masks is None:
            mask = to_rows(torch.ones_like(labels))
        else:
            masks = [(row[start_tokens:] != 0).long() for row in response_masks]
            mask = pad_sequence(masks, batch_first=True)
        logits = to_rows(logits) if return_logits else None
        return to_rows(logprobs) * mask, logits, to_rows(values) * mask, mask

    def compute_rewards(self, scores, logprobs, ref_logprobs, masks, penalties=None):
        """Compute token rewards R_t, their part without the score, and KL penalties, [B, L] each.

        scores [B]; logprobs, ref_logprobs [B, L] (whole log-softmaxes [B, L, vocabulary] for
        kl_penalty "full"); masks [B, L]; penalties [B, L]: what kl_penalty gives, if known."""
        if penalties is None:
            penalties = self._kl_penalty(logprobs, ref_logprobs)
        penalties = penalties * masks
        non_score_rewards = -self.kl_ctl.value * penalties
        rewards = non_score_rewards.clone()
        column = torch.arange(masks.shape[1], device=masks.device)
        last = (masks * column).argmax(1)  # each row's last unmasked token
        rewards[torch.arange(len(rewards)), last] += scores.to(rewards.dtype)
        return rewards, non_score_rewards, penalties

    def compute_advantages(self, values, rewards, mask):
        """Compute values, whitened advantages and returns, [B, L] each, zero where masked.

        To try another advantage estimator, edit here: rows are in the order of `step`'s lists."""
        if self.config.whiten_rewards:
            rewards = masked_whiten(
                rewards, mask, shift_mean=False, sum_over_ranks=self.sum_over_ranks)
        values, rewards = values * mask, rewards * mask
        advantages, returns = gae(values, rewards, mask, self.config.gamma, self.config.lam)
        advantages = masked_whiten(advantages, mask, sum_over_ranks=self.sum_over_ranks)
        return values, advantages * mask, returns

    def loss(self, old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns,
             ref_logprobs=None):
        """Compute the policy loss, vf_coef x value loss, and statistics of a minibatch.

        All [B, L], but logits [B, L, vocabulary]. values: V_old; vpreds: V, the new predictions.
        ref_logprobs is not used: a fork can add a KL term to the loss with it. Losses are means
        over the minibatch's tokens; another mean (over responses) needs another weight in `step`.
        If the mean ratio over all ranks is above ratio_threshold, both losses are 0, and
        `optimizer_step` skips the step. Raises InputError for a loss that is not finite."""
        config = self.config
        pg_loss, ratio, pg_clipped = policy_loss(
            logprobs, old_logprobs, advantages, mask, config.cliprange)
        vf_loss, vf_clipped = value_loss(vpreds, values, returns, mask, config.cliprange_value)

        with torch.no_grad():
            log_ratio = logprobs - old_logprobs
            per_token = {
                # one row at a time: for all rows at once it would double the logits' memory
                "policy/entropy": torch.stack([entropy_from_logits(row) for row in logits]),
                # three estimates of KL(pi_old || pi)
                "policy/approxkl": 0.5 * log_ratio**2,       # biased, never negative
                "policy/policykl": -log_ratio,               # unbiased, may be negative
                "policy/kl_k3": ratio - 1 - log_ratio,       # unbiased, never negative
                "policy/clipfrac": pg_clipped,
                "policy/advantages_mean": advantages,
                "policy/ratio_mean": ratio,
                "returns/mean": returns,
                "val/vpred": vpreds,
                "val/error": (vpreds - returns) ** 2,
                "val/clipfrac": vf_clipped,
                "val/mean": values,
            }
            stats = {name: masked_mean(x, mask) for name, x in per_token.items()}
            skipped = self.is_ratio_too_large(ratio, mask)
        if skipped:  # a loss that still reaches every weight, so that all ranks run backward
            pg_loss = vf_loss = 0.0 * (logprobs.sum() + vpreds.sum())
        else:
            common.check_finite(pg_loss + vf_loss, self.current_step, "PPO updates")
        stats.update({
            "returns/var": masked_var(returns, mask), "val/var": masked_var(values, mask),
            "loss/policy": pg_loss, "loss/value": vf_loss,
            "loss/total": pg_loss + config.vf_coef * vf_loss,
            "policy/skipped": mask.new_tensor(skipped, dtype=torch.float32),
            "policy/advantages": advantages * mask, "policy/ratio": ratio * mask})
        stats = {name: value.detach() for name, value in stats.items()}
        return pg_loss, config.vf_coef * vf_loss, stats

    def shuffled_rows(self, n):
        """Yield (epoch, row numbers) for each optimizer step, in a new order in every epoch."""
        for epoch in range(self.config.ppo_epochs):
            for rows in common.split(np.random.permutation(n), self.config.backward_batch_size):
                yield epoch, rows

    def is_ratio_too_large(self, ratio, mask):
        """Check whether the mean ratio of this minibatch on all ranks is above ratio_threshold."""
        total, n = self.sum_over_ranks(torch.stack([(ratio * mask).sum(), mask.sum().float()]))
        is_too_large = bool(total / n > self.config.ratio_threshold)
        if is_too_large:
            warnings.warn(f"ratio_threshold={self.config.ratio_threshold}: a minibatch's mean "
                          f"ratio is {total / n:.2f}; its optimizer step is skipped",
                          stacklevel=2)
        return is_too_large

    def has_moved_too_far(self, train_stats):
        """Check for early_stopping whether this epoch's mean KL(pi_old || pi) is too large.

        The limit is 1.5 x target_kl; the mean is over the tokens so far, on all ranks."""
        if not self.config.early_stopping:
            return False
        epoch_stats = [stats for stats in train_stats if stats["epoch"] == train_stats[-1]["epoch"]]
        tokens = torch.stack([stats["mask"].sum() for stats in epoch_stats])
        kl = torch.stack([stats["policy/kl_k3"] for stats in epoch_stats])
        kl, tokens = self.sum_over_ranks(torch.stack([(kl * tokens).sum(), tokens.sum().float()]))
        return bool(kl / tokens > 1.5 * self.config.target_kl)

    def optimizer_step(self, minibatch_stats, skip=False):
        """Clip the gradient and step, unless `skip` or a minibatch was skipped; then free it."""
        skip = skip or any(stats["policy/skipped"] for stats in minibatch_stats)
        if not skip and self.config.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        if not skip:
            self.stepper.step()
        self.stepper.zero_grad()

    # =========================================================================
    # Part 2, the machinery: nothing below is needed to understand the algorithm.
    # =========================================================================

    def __init__(self, config=None, model=None, ref_model=None, tokenizer=None, dataset=None,
                 optimizer=None, data_collator=None, num_shared_layers=None, lr_scheduler=None,
                 processing_class=None):
        """Prepare models, optimizer and data. Raises ValueError.

        config: a PPOConfig. model: AutoModelForCausalLMWithValueHead or its Seq2Seq sibling.
        ref_model: what the KL is measured from. None: the adapter as it is now for a PEFT model,
            else a frozen copy that shares its first `num_shared_layers` layers with the model.
        tokenizer: the model's. dataset, data_collator: for `dataloader`; None: make your own.
        optimizer: None: Adam. lr_scheduler: stepped once per `step`. processing_class: today's
        name of tokenizer."""
        tokenizer = tokenizer or processing_class
        if not isinstance(config, PPOConfig):
            raise ValueError(f"config must be a PPOConfig, not {type(config).__name__}")
        for name, part in (("model", model), ("ref_model", ref_model or model)):
            if not hasattr(part, "v_head"):
                raise ValueError(f"{name} must be a model with a value head, such as "
                                 f"AutoModelForCausalLMWithValueHead, not {type(part).__name__}")
        if not hasattr(tokenizer, "eos_token_id"):
            raise ValueError(f"tokenizer must be the model's, not {type(tokenizer).__name__}")
        machinery.setup_ranks()
        set_seed(config.seed)
        self.config, self.tokenizer = config, tokenizer
        self.output_dir = Path(config.output_dir or Path("runs") / config.exp_name)
        self.keep_checkpoints = config.save_total_limit
        self.make_accelerator(model)
        if ref_model is not None and num_shared_layers is not None:
            warnings.warn("num_shared_layers has no effect with a ref_model", stacklevel=2)
        machinery.prepare_training(model.pretrained_model)
        chats.refuse_virtual_tokens(model.pretrained_model)
        self.ref_model = self.make_reference(model, ref_model, num_shared_layers)
        common.disable_dropout(model)
        optimizer = optimizer or torch.optim.Adam(
            [p for p in model.parameters() if p.requires_grad], lr=config.learning_rate,
            fused=True)
        self.dataset, self.dataloader = dataset, None
        if dataset is not None:
            self.dataloader = self.prepare_dataloader(dataset, data_collator)
        else:
            warnings.warn("no dataset: make your own dataloader, with batches of "
                          "config.batch_size rows", stacklevel=2)
        self.model, self.optimizer, self.lr_scheduler = self.accelerator.prepare(
            model, optimizer, lr_scheduler)
        # only now: a list of the whole weights would keep them next to their shards
        self.model_params = [p for p in self.model.parameters() if p.requires_grad]
        self.policy = self.accelerator.unwrap_model(self.model)  # for passes without gradient
        register_fsdp_forward_method(self.policy, "generate")  # no effect on unsharded models
        # accelerate's wrapper searches the disk for packages at each step (a third of a toy
        # update); it is needed only where it scales gradients
        self.stepper = self.optimizer if self.accelerator.scaler else self.optimizer.optimizer

        self.kl_ctl = FixedKLController(config.init_kl_coef)
        if config.adap_kl_ctrl:
            self.kl_ctl = AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
        self.running = RunningMoments(self.accelerator)
        self.current_step, self.highest_reward = 0, -math.inf
        self.accelerator.register_for_checkpointing(self)
        self.start_trackers()
        # the weights are made; from here on each rank draws samples of its own
        set_seed((config.seed + 100_003 * self.accelerator.process_index) % 2**32)

    def make_accelerator(self, model):
        """Make the accelerator, and fill in the fields of config that depend on it or the model."""
        config = self.config
        self.start_accelerator({"project_dir": config.output_dir}, cpu=config.use_cpu,
                               mixed_precision="bf16" if config.bf16 else None,
                               step_scheduler_with_optimizer=False)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise InputError("distributed_type=DEEPSPEED (accelerate's configuration): PPO does "
                             "not run under DeepSpeed; shard the model with FSDP 2 (docs/ppo.md)")
        if self.accelerator.distributed_type == DistributedType.FSDP:
            model.keep_module_names()
            kinds = machinery.trained_types(model)
            if len(kinds) > 1 and self.accelerator.mixed_precision == "no":
                raise InputError(f"torch_dtype={' and '.join(sorted(kinds))}: FSDP trains weights "
                                 "of one type, and the value head's is float32; give float32, with "
                                 "--bf16 for speed")
        ranks = config.world_size = self.accelerator.num_processes
        config.global_batch_size = config.batch_size * ranks
        if config.adap_kl_ctrl and config.global_batch_size >= 5 * config.horizon:
            raise InputError(f"horizon={config.horizon}: one update of {config.global_batch_size} "
                             "samples could make the KL coefficient 0 or negative; give more than "
                             f"{config.global_batch_size / 5:g}")
        config.global_backward_batch_size = config.backward_batch_size * ranks
        config.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        config.is_peft_model = model.is_peft_model
        config.total_ppo_epochs = math.ceil(config.steps / config.global_batch_size)
        # TRL 0.7's attributes
        self.current_device = self.accelerator.device
        self.is_distributed = ranks > 1
        self.is_encoder_decoder = config.is_encoder_decoder
        self.is_peft_model = config.is_peft_model
        self.data_collator = DataCollatorForLanguageModeling(self.tokenizer, mlm=False)

    def make_reference(self, model, ref_model, num_shared_layers):
        """Return the reference model, or None if it is the policy's own adapter `reference`."""
        if ref_model is None and model.is_peft_model:
            common.copy_adapter(model.pretrained_model, "reference")
            return None
        if ref_model is None:
            ref_model = common.create_reference_model(model, num_shared_layers)
        common.disable_dropout(ref_model)
        return machinery.prepare_reference(self.accelerator, ref_model)

    @contextmanager
    def reference(self):
        """Yield the reference model, ready for a forward pass."""
        if self.ref_model is not None:
            yield self.ref_model
        else:
            with common.active_adapter(self.policy.pretrained_model, "reference"):
                yield self.policy

    def prepare_dataloader(self, dataset, data_collator=None):
        """Make a loader of shuffled batches of config.batch_size rows per rank. Raises ValueError.

        Rows that fill no batch are dropped. Seed and epoch alone determine the order. A pass that
        is broken off goes on in the next one, after the batches that `step` was called for."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        need = self.config.batch_size * ranks
        if len(dataset) < need:
            raise InputError(f"dataset: it has {len(dataset)} rows and one batch takes {need} "
                             "(batch_size x ranks); add rows or reduce batch_size")
        sampler = EpochSampler(self, dataset, ranks, rank, seed=self.config.seed, drop_last=True)
        # with a generator of its own the loader draws nothing from the one that samples responses
        return DataLoader(dataset, self.config.batch_size, sampler=sampler, drop_last=True,
                          generator=torch.Generator(), collate_fn=data_collator or collate)

    def generate(self, query_tensor, length_sampler=None, batch_size=4, return_prompt=True,
                 generate_ref_response=False, **generation_kwargs):
        """Generate responses of the policy (and of the reference, if generate_ref_response).

        query_tensor: a list of LongTensors [length], answered by such a list, or one LongTensor
        [length], answered by a tensor [1, length]. return_prompt: put the prompt before the
        response. All other arguments: see chats.generate. Raises ValueError."""
        single = isinstance(query_tensor, torch.Tensor)
        queries = [query_tensor] if single else list(query_tensor)

        def respond(model):
            rows = chats.generate(model, queries, self.tokenizer, batch_size,
                                  self.config.temperature, length_sampler, **generation_kwargs)
            if return_prompt and not self.config.is_encoder_decoder:
                pairs = zip(queries, rows, strict=True)
                rows = [torch.cat([query.to(row.device), row]) for query, row in pairs]
            return rows[0][None] if single else rows

        with common.unsharded(self.policy), self.accelerator.autocast():
            responses = respond(self.policy)
            if not generate_ref_response:
                return responses
            with common.unsharded(self.ref_model), self.reference() as reference:
                return responses, respond(reference)

    # ------------------------------------------------------------------ inputs of a step
    def check_step(self, queries, responses, scores, response_masks=None):
        """Return the lists on this rank's device, scores as a tensor [B]. Raises ValueError."""
        lists = {"queries": queries, "responses": responses, "scores": scores}
        if response_masks is not None:
            lists["response_masks"] = response_masks
        if len(queries) == 0:
            raise InputError("queries is empty: give at least one query")
        for name, rows in lists.items():
            if not isinstance(rows, Sequence) or len(rows) != len(queries):
                size = f" of {len(rows)}" if hasattr(rows, "__len__") else ""
                raise InputError(f"{name} must be a list of {len(queries)} tensors, one per query, "
                                 f"not a {type(rows).__name__}{size}")
            for i, row in enumerate(rows):
                if not isinstance(row, torch.Tensor):
                    raise InputError(f"{name}[{i}] must be a tensor, not a {type(row).__name__}")
                if name != "scores" and (row.dim() != 1 or len(row) == 0):
                    raise InputError(f"{name}[{i}] must be one-dimensional and not empty, "
                                     f"its shape is {list(row.shape)}")
        first = int(self.config.is_encoder_decoder)  # the decoder's start token is no response
        for i, (response, score) in enumerate(zip(responses, scores, strict=True)):
            if score.dim() > 1 or score.numel() != 1:
                raise InputError(f"scores[{i}] must be one number, not of shape "
                                 f"{list(score.shape)}")
            if not torch.isfinite(score).all():
                raise InputError(f"scores[{i}] is {score.item()}: scores must be finite; check the "
                                 "reward function")
            if len(response) <= first:
                raise InputError(f"responses[{i}] is empty: generate at least one token")
            mask = response if response_masks is None else response_masks[i]
            if len(mask) != len(response) or (response_masks and not mask[first:].any()):
                raise InputError(f"response_masks[{i}] must be as long as responses[{i}] "
                                 f"({len(response)}) and not all 0")
        sizes = gather_object([len(queries)])
        if len(set(sizes)) > 1:
            raise InputError(f"step() needs the same number of rows on every rank, got {sizes}")
        device = self.accelerator.device
        lists = {name: [row.to(device) for row in rows] for name, rows in lists.items()}
        scores = torch.stack([score.reshape(()).float() for score in lists["scores"]])
        return lists["queries"], lists["responses"], scores, lists.get("response_masks")

    def scale_scores(self, scores):
        """Apply use_score_scaling, use_score_norm and score_clip to scores [B]."""
        config = self.config
        if config.use_score_scaling:
            self.running.update(scores)
            shift = self.running.mean if config.use_score_norm else 0.0
            eps = torch.finfo(scores.dtype).eps
            std = self.running.std if self.running.std > eps else 1.0  # equal scores: no scale yet
            scores = (scores - shift) / (std + eps)
        if config.score_clip is not None:
            scores = scores.clamp(-config.score_clip, config.score_clip)
        return scores

    def prepare_model_inputs(self, queries, responses):
        """Return the model's inputs, padded on the right: input_ids and attention_mask [B, T].

        Of an encoder-decoder these are the query's, and decoder_* the response's."""
        def pad(rows, prefix=""):
            ids = pad_sequence(rows, True, self.tokenizer.pad_token_id or 0)
            mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0)
            return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}

        if self.config.is_encoder_decoder:
            return {**pad(queries), **pad(responses, "decoder_")}
        return pad([torch.cat(pair) for pair in zip(queries, responses, strict=True)])

    def select(self, rows, queries, responses, response_masks):
        """Return the arguments of `batched_forward_pass` for these rows."""
        queries, responses = [queries[i] for i in rows], [responses[i] for i in rows]
        return {"queries": queries, "responses": responses,
                "model_inputs": self.prepare_model_inputs(queries, responses),
                "response_masks": response_masks and [response_masks[i] for i in rows]}

    # ------------------------------------------------------------------ TRL 0.7's entry points
    def _kl_penalty(self, logprob, ref_logprob):
        """Compute the penalties of config.kl_penalty. See `kl_penalty`."""
        return kl_penalty(logprob, ref_logprob, self.config.kl_penalty)

    def train_minibatch(self, old_logprobs, values, logprobs, logits, vpreds, mask, advantages,
                        returns, ref_logprobs=None):
        """Take one optimizer step on a minibatch. Returns its statistics. See `loss`."""
        loss_p, loss_v, stats = self.loss(
            old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns, ref_logprobs)
        self.accelerator.backward(loss_p + loss_v)
        has_moved_too_far = self.has_moved_too_far([{**stats, "mask": mask, "epoch": 0}])
        self.optimizer_step([stats], skip=has_moved_too_far)
        return stats

    def push_if_best(self, scores):
        """Push the policy to the hub, every compare_steps updates, if its mean score is the best.

        scores [B]: those of the responses that the policy has just given. Warns if it fails."""
        config = self.config
        if not config.push_to_hub_if_best_kwargs or (self.current_step + 1) % config.compare_steps:
            return
        score = self.sum_over_ranks(scores.sum()).item() / (len(scores) * config.world_size)
        if score <= self.highest_reward:
            return
        failures = torch.zeros_like(scores[0])
        try:
            with common.explain("push_to_hub_if_best_kwargs: the upload failed, and the next best "
                                "score will try again"):
                self.push_to_hub(**config.push_to_hub_if_best_kwargs)
        except InputError as error:  # a long run must not end for it
            warnings.warn(str(error), stacklevel=2)
            failures += 1
        if self.sum_over_ranks(failures) == 0:  # only the main rank knows
            self.highest_reward = score

    def finish_step(self):
        """Step the scheduler, count the update, empty the device cache."""
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.current_step += 1
        if self.config.optimize_device_cache:
            clear_device_cache(garbage_collection=True)

    # ------------------------------------------------------------------ statistics
    def record_step_stats(self, kl_coef, **data):
        """Collect a step's statistics over all ranks. data: see the call in `step`."""
        if self.current_step == 0:  # nothing has moved before the first minibatch
            first = data["train_stats"][0]
            ratio = first["policy/ratio"][first["mask"] > 0]
            common.warn_of_noise(ratio.log(), data["logprobs"][data["masks"] > 0],
                                 allowed=0.02)  # bfloat16 rounds batches of other widths otherwise
        mask = data["masks"]
        log_ratio = (data["logprobs"] - data["ref_logprobs"]) * mask
        vectors = self.gather_stats({
            "objective/kl_dist": log_ratio.sum(1),  # the controller's input, whatever kl_penalty
            "objective/logprobs": data["logprobs"][mask > 0],
            "objective/ref_logprobs": data["ref_logprobs"][mask > 0],
            "tokens/queries_dist": lengths_of(data["queries"]),
            "tokens/responses_dist": lengths_of(data["responses"]),
            "penalties": data["non_score_reward"][mask > 0],
            "entropies": -(data["logprobs"] * mask).sum(1),
            "scores": data["scores"],
            "raw_scores": data.get("raw_scores", data["scores"]),
        })
        penalties, entropies, scores, raw_scores = (
            vectors.pop(name) for name in ("penalties", "entropies", "scores", "raw_scores"))
        queries, responses = vectors["tokens/queries_dist"], vectors["tokens/responses_dist"]
        stats = {
            **vectors,
            "objective/kl": vectors["objective/kl_dist"].mean(),
            "objective/kl_coef": kl_coef,
            "objective/entropy": entropies.mean(),
            "objective/scores": raw_scores.mean(),
            "objective/scores_std": deviation(raw_scores),
            "ppo/mean_non_score_reward": penalties.mean(),
            "ppo/mean_scores": scores.mean(),
            "ppo/std_scores": deviation(scores),
            "tokens/queries_len_mean": queries.mean(),
            "tokens/queries_len_std": deviation(queries),
            "tokens/responses_len_mean": responses.mean(),
            "tokens/responses_len_std": deviation(responses),
            **self.mean_over_tokens(data["train_stats"]),
            "ppo/learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        if "returns" in data:  # of the whole batch: the variance of one row says nothing
            whole = {name: data[name][mask > 0] for name in ("returns", "values")}
            whole = self.gather_stats(whole)
            stats["ppo/returns/var"] = deviation(whole["returns"]) ** 2
            stats["ppo/val/var"] = deviation(whole["values"]) ** 2
        stats["ppo/val/var_explained"] = 1 - stats["ppo/val/error"] / stats["ppo/returns/var"]
        return stats

    def mean_over_tokens(self, train_stats):
        """Average the minibatches' statistics, each weighted by its tokens, over all ranks."""
        masks = [stats["mask"] > 0 for stats in train_stats]
        tokens = torch.stack([mask.sum() for mask in masks]).float()
        weights = tokens * self.config.world_size / self.sum_over_ranks(tokens.sum())
        stats = {}
        for name, value in train_stats[0].items():
            column = [minibatch[name] for minibatch in train_stats]
            if name in ("mask", "epoch"):
                continue
            if value.dim() == 0:
                stats[f"ppo/{name}"] = (torch.stack(column) * weights).sum()
            else:
                stats[f"ppo/{name}"] = torch.cat([x[m] for x, m in zip(column, masks, strict=True)])
        # if the ratio runs away, these show in which epoch
        for epoch in range(train_stats[-1]["epoch"] + 1):
            rows = [i for i, minibatch in enumerate(train_stats) if minibatch["epoch"] == epoch]
            ratios = torch.cat([train_stats[i]["policy/ratio"][masks[i]] for i in rows])
            factor = self.config.world_size / self.sum_over_ranks(tokens[rows].sum())
            stats[f"ppo/policy/log_ratio_epoch_{epoch}"] = ratios.log().abs().sum() * factor
        return self.gather_stats(stats)

    def gather_stats(self, stats):
        """Combine all ranks' statistics: means of scalars, vectors [n] one rank after the other."""
        if self.config.world_size == 1:
            return stats
        scalars = {name: value.float() for name, value in stats.items() if value.dim() == 0}
        vectors = {name: value.cpu() for name, value in stats.items() if value.dim()}
        gathered = {}
        if scalars:
            sums = self.sum_over_ranks(torch.stack(list(scalars.values())))
            gathered = dict(zip(scalars, sums / self.config.world_size, strict=True))
        ranks = gather_object([vectors])
        for name in vectors:
            gathered[name] = torch.cat([rank[name] for rank in ranks]).to(stats[name].device)
        return {name: gathered[name] for name in stats}

    def log_stats(self, stats, batch, rewards, columns_to_log=("query", "response")):
        """Send a step's statistics and a table of samples to the tracker.

        batch: {column: list}; rewards: a list of this rank's scores. Raises ValueError."""
        if not self.config.log_with:
            return
        missing = [name for name in columns_to_log if name not in batch]
        if missing:
            raise InputError(f"columns_to_log={missing}: the batch has {list(batch)}; add them or "
                             "name others")
        rewards = torch.tensor([float(reward) for reward in rewards])
        rewards = self.accelerator.gather(rewards.to(self.accelerator.device)).cpu()
        rows = gather_object(list(zip(*(batch[name] for name in columns_to_log), strict=True)))
        stats = {**stats, "env/reward_mean": rewards.mean(),
                 "env/reward_std": rewards.std(correction=0), "env/reward_dist": rewards}
        numbers, vectors = split_stats(stats)
        self.accelerator.log(numbers, step=self.current_step)
        table = [[*row, reward] for row, reward in zip(rows, rewards.tolist(), strict=True)]
        self.log_table_and_histograms(vectors, [*columns_to_log, "reward"], table)

    def log_table_and_histograms(self, vectors, columns, table):
        """Send vectors {name: tensor [n]} and a table of samples to the tracker (main rank)."""
        for tracker in self.accelerator.trackers if self.accelerator.is_main_process else []:
            if tracker.name == "wandb":
                import wandb
                # a ratio may overflow, and a histogram's bins can be too narrow for float32
                histograms = {name: wandb.Histogram(x[x.isfinite()].cpu().double().numpy())
                              for name, x in vectors.items()}
                tracker.log(histograms, step=self.current_step)
                tracker.log_table("game_log", columns, table, step=self.current_step)
            else:
                for name, vector in vectors.items():
                    tracker.writer.add_histogram(name, vector.float().cpu(), self.current_step)
                rows = [" | ".join([f"{reward:.2f}", *map(str, row)]) for *row, reward in table]
                tracker.writer.add_text("game_log", "\n\n".join(rows), self.current_step)

    # ------------------------------------------------------------------ saving
    def create_model_card(self, path, model_name="TRL Model"):
        """Write README.md into the folder `path`: what the model is and how to load it."""
        config = self.config
        task = f" for the task *{config.task_name}*" if config.task_name else ""
        auto = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
        os.makedirs(path, exist_ok=True)
        Path(path, "README.md").write_text(f"""---
library_name: transformers
tags: [ppo, rlhf, reinforcement-learning]
---
# {model_name}

A language model fine-tuned with proximal policy optimization{task}:
{self.current_step} updates of {config.global_batch_size} samples (experiment `{config.exp_name}`,
policy `{config.model_name or 'toy/model'}`, prompts
`{config.query_dataset or 'toy/prompts.jsonl'}`, reward `{config.reward_model or 'toy/reward'}`).

```python
from transformers import {auto}, AutoTokenizer
model, tokenizer = {auto}.from_pretrained("."), AutoTokenizer.from_pretrained(".")
```

`value_head.safetensors` holds the value head: `{auto}WithValueHead` of common.py loads both.
""")

    def save_pretrained(self, save_directory):
        """Write model (or adapter), value head, tokenizer and model card.

        Call it on the main rank; with FSDP, on every rank."""
        with common.tied_weights_once(self.model):
            state_dict = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            self.policy.save_pretrained(save_directory, state_dict=state_dict)
            self.tokenizer.save_pretrained(save_directory)
            self.create_model_card(save_directory, self.config.exp_name)

    def state_dict(self):
        """Return what a checkpoint holds besides weights, optimizer, scheduler and random state."""
        running = {k: v for k, v in vars(self.running).items() if k != "accelerator"}
        return {**super().state_dict(), "current_step": self.current_step,
                "highest_reward": self.highest_reward, "kl_coef": self.kl_ctl.value,
                "running": running}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.current_step, self.highest_reward = state["current_step"], state["highest_reward"]
        if self.config.adap_kl_ctrl:  # otherwise it is the config's
            self.kl_ctl.value = state["kl_coef"]
        vars(self.running).update(state["running"])
        if self.dataloader is not None:
            self.dataloader.sampler.epoch = self.dataloader.sampler.first_step = 0

    def save_checkpoint(self, folder):
        """Write folder/checkpoint-<updates> and remove the oldest ones. Call on every rank."""
        with common.only_what_trains(self.policy):
            super().save_checkpoint(folder, self.current_step)

    def load_checkpoint(self, path):
        """Restore a checkpoint, and the place in the data. Raises InputError."""
        with common.only_what_trains(self.policy):
            super().load_checkpoint(path)


class RunningMoments:
    """Mean and standard deviation of all scores so far, over all ranks (parallel Welford)."""

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.mean, self.std, self.var, self.count = 0.0, 1.0, 1.0, 0.0

    def update(self, xs):
        """Add this rank's xs [B]. Returns mean and standard deviation of the batch over all ranks.

        A single number has no spread: its standard deviation counts as 1."""
        if self.accelerator.num_processes > 1:
            xs = self.accelerator.gather(xs)
        xs = xs.cpu().double()  # Apple's GPU has no float64
        n, xs_mean, xs_var = xs.numel(), xs.mean().item(), xs.var(correction=0).item()
        total, delta = self.count + n, xs_mean - self.mean
        between = delta**2 * self.count * n / total
        squares = self.var * self.count + xs_var * n + between
        self.mean += delta * n / total
        self.var, self.count = squares / total, total
        self.std = math.sqrt(squares / (total - 1)) if total > 1 else 1.0
        return xs_mean, math.sqrt(xs_var * n / (n - 1)) if n > 1 else 1.0


class EpochSampler(DistributedSampler):
    """Each rank's rows, in a new order in every epoch, by seed and epoch alone.

    A pass over an epoch begins after the batches that the trainer's steps have taken from it, so
    that a loop finds its place after `load_checkpoint`, and after a pass that it broke off."""

    first_step = None  # the step that this epoch began with; None: the next pass begins it

    def __init__(self, trainer, dataset, *args, **kwargs):
        super().__init__(dataset, *args, **kwargs)
        self.trainer, self.batch_size = trainer, trainer.config.batch_size

    def __iter__(self):
        step = self.trainer.current_step
        first_step = step if self.first_step is None else self.first_step
        # incomplete batches are dropped
        epochs, batches = divmod(step - first_step, self.num_samples // self.batch_size)
        self.epoch += epochs
        self.first_step = step - batches
        yield from islice(super().__iter__(), batches * self.batch_size, None)
        self.epoch += 1
        self.first_step = None


def collate(rows):
    """Collect rows into {column: list}, `input_ids` as a list of LongTensors, unpadded.

    Rows that are no dicts, such as a TensorDataset's, are stacked by torch's own collate."""
    if not isinstance(rows[0], dict):
        return default_collate(rows)
    batch = {key: [row[key] for row in rows] for key in rows[0]}
    batch["input_ids"] = [torch.as_tensor(ids) for ids in batch["input_ids"]]
    return batch


def is_padded_left(inputs):
    """Check whether a row of a model's inputs begins with padding."""
    masks = [mask for name, mask in inputs.items() if name.endswith("attention_mask")]
    return not all(mask[:, 0].all() for mask in masks)


def lengths_of(rows):
    """Return the rows' lengths as a float tensor [B]."""
    return torch.tensor([float(len(row)) for row in rows], device=rows[0].device)


def deviation(x):
    """Return the standard deviation of x [n]; 0 for a single number."""
    return x.std(correction=int(len(x) > 1))


def to_numpy(stats):
    """Turn tensors [n] into arrays, and scalars into np.float64, which is a float."""
    tensors = {name: x.float() for name, x in stats.items() if isinstance(x, torch.Tensor)}
    arrays = {name: x.cpu().numpy() for name, x in tensors.items()}
    numbers = {name: np.float64(x) for name, x in arrays.items() if not x.ndim}
    return {**stats, **arrays, **numbers}


def split_stats(stats):
    """Split statistics into {name: float} and {name: tensor [n]}."""
    tensors = {name: torch.as_tensor(value) for name, value in stats.items()}
    vectors = {name: x for name, x in tensors.items() if x.dim()}
    return {name: float(value) for name, value in stats.items() if name not in vectors}, vectors


class Stopwatch:
    """Seconds of each part of a step, as time/ppo/<part>."""

    def __init__(self):
        self.start = self.last = time.perf_counter()
        self.laps = {}

    def lap(self, name):
        now = time.perf_counter()
        self.laps[f"time/ppo/{name}"], self.last = now - self.last, now

    def times(self):
        return {**self.laps, "time/ppo/total": self.last - self.start}


# ----------------------------------------------------------------------------- the script
def load_policy(config):
    """Load the tokenizer and the model with its value head. Raises InputError."""
    name = config.model_name or str(TOY / "model")
    with common.explain(f"model_name {name} can't be loaded"):
        loading = machinery.loading_arguments(config)
        tokenizer = AutoTokenizer.from_pretrained(
            name, **common.hub_arguments(loading, "trust_remote_code"))
        seq2seq = machinery.load_config(name, **loading).is_encoder_decoder
        auto = AutoModelForSeq2SeqLMWithValueHead if seq2seq else AutoModelForCausalLMWithValueHead
        lora = machinery.lora_config(config, seq2seq)
        model = auto.from_pretrained(name, peft_config=lora, is_trainable=True,
                                     require_v_head=False, **loading)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return tokenizer, model


def rollout(trainer, reward, batch):
    """Sample one response per prompt and score it. Returns responses, their texts, and scores."""
    config, tokenizer = trainer.config, trainer.tokenizer
    responses = trainer.generate(batch["input_ids"], batch_size=config.generation_batch_size,
                                 return_prompt=False, do_sample=True,
                                 max_new_tokens=config.max_new_tokens)
    inputs = chats.reward_inputs(tokenizer, batch, responses, config.is_encoder_decoder)
    scores = reward(**inputs)
    if config.missing_eos_penalty is not None:
        ends = chats.end_token_ids(tokenizer, trainer.policy.generation_config.eos_token_id)
        for i, response in enumerate(responses):
            if response[-1].item() not in ends:
                scores[i] = scores[i] - config.missing_eos_penalty
    return responses, inputs["responses"], scores


def show_samples(trainer, reward, rows, title):
    """Print and keep the policy's responses to a few prompts."""
    _, texts, scores = rollout(trainer, reward, collate(rows))
    if trainer.accelerator.is_main_process:
        machinery.log_samples(trainer.config.output_dir, title, [
            {"update": trainer.current_step, "query": row["shown"], "response": text,
             "score": score.item()} for row, text, score in zip(rows, texts, scores, strict=True)])


def main(config: PPOConfig):
    """Train a language model with PPO against a reward.

    Returns the last update's statistics."""
    out, checkpoint = machinery.open_run(config.output_dir, config.resume_from,
                                         Path("runs") / config.exp_name)
    config.output_dir = str(out)
    set_seed(config.seed)  # a fresh adapter is the same on all ranks
    tokenizer, model = load_policy(config)
    machinery.use_few_threads(model)
    longest = machinery.longest_prompt(model, config.max_new_tokens)
    dataset = machinery.load_prompts(config.query_dataset or TOY / "prompts.jsonl", tokenizer,
                                     config.max_query_length, longest,
                                     keep_columns=not config.remove_unused_columns,
                                     split=config.dataset_split, config=config.dataset_config)
    trainer = PPOTrainer(config, model, None, tokenizer, dataset)
    reward = chats.load_reward(config.reward_model or TOY / "reward", config.reward_label,
                               trainer.accelerator.device,
                               trust_remote_code=config.trust_remote_code)
    if checkpoint:
        trainer.load_checkpoint(checkpoint)
    else:
        show_samples(trainer, reward, dataset[:8], "before training")
    is_main = trainer.accelerator.is_main_process
    if is_main:
        machinery.cut_lines(out, trainer.lines)

    stats = {}
    bar = machinery.Bar(is_main, "update", total=config.total_ppo_epochs,
                        initial=trainer.current_step)
    while trainer.current_step < config.total_ppo_epochs:
        for batch in trainer.dataloader:
            bar.set_description("sampling")
            responses, batch["response"], scores = rollout(trainer, reward, batch)
            bar.set_description("learning")
            stats = trainer.step(batch["input_ids"], responses, scores)
            trainer.log_stats(stats, batch, scores)
            if is_main:
                row = {"update": trainer.current_step, **split_stats(stats)[0]}
                machinery.append_rows(out / "metrics.jsonl", [row])
                bar.show(trainer.current_step, score=f"{stats['objective/scores']:.2f}",
                         kl=f"{stats['objective/kl']:.2f}")
            if trainer.current_step % config.save_freq == 0:
                trainer.save_checkpoint(out)
            if trainer.current_step >= config.total_ppo_epochs:
                break
    bar.close()
    show_samples(trainer, reward, dataset[:8], "after training")
    trainer.save_pretrained(str(out))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return stats


if __name__ == "__main__":
    machinery.run(main, PPOConfig, lora="--learning-rate 1e-4 --torch-dtype bfloat16",
                  own="--mini-batch-size 8 --max-new-tokens 128 --generation-batch-size 64")
