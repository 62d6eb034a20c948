"""Proximal policy optimisation of a language model against a reward (RLHF).

Papers: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences" (arXiv:1909.08593), the recipe;
Schulman et al. 2017, "Proximal Policy Optimization Algorithms" (arXiv:1707.06347), the update;
Schulman et al. 2016, "High-Dimensional Continuous Control Using GAE" (arXiv:1506.02438), the advantages.

A query x is drawn, the policy pi answers y, a reward model gives the pair one score r(x, y). Token t of y is rewarded by

    R_t = -beta * (log pi(y_t) - log pi_ref(y_t)) + [t is the last token] * r(x, y)        (Ziegler et al., equation 2)

and pi, with its value head V, takes a few epochs of minibatch steps down the clipped surrogate

    L = -min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) + c_V * 1/2 (V_t - R^_t)^2,   rho_t = pi(y_t) / pi_old(y_t)

Departures from the papers: the value loss is clipped too (as in OpenAI's code); advantages are whitened over the batch.
Departures from TRL 0.7.10, whose names, arguments and numbers these are:
  1. Dropout is off throughout: the policy that answers is the policy that is scored. Gradient checkpointing works.
  2. Rows are laid out from their first real token, so the tokenizer's padding side changes no number.
  3. GAE steps over masked tokens (`response_masks`) instead of through them.
  4. Numbers are global: whitening, statistics and the KL controller see all ranks; a gradient is the mean over all tokens
     of the optimizer step, however they fall into micro-batches and ranks. Each rank samples by a seed of its own.
  5. Above `ratio_threshold` or 1.5 x `target_kl` the optimizer does not step. `max_grad_norm` holds at every step.
  6. With LoRA the reference is the adapter as it was loaded, not the bare base model.
  7. `temperature` divides the logits wherever log-probabilities are taken, not only when sampling.
  8. Checkpoints hold all that a run is, so that a killed one goes on to the same numbers.

    torchrun ppo.py --batch-size 256                       one process
    torchrun --nproc_per_node 8 ppo.py --model-name my/model --query-dataset prompts.jsonl --reward-model my/classifier

With nothing but the first command a toy model learns to write kinder film reviews: see docs/ppo.md.
"""
import json
import math
import os
import shutil
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal, Optional

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, gather_object
from accelerate.utils.memory import clear_device_cache
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.generation import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper

from common import (SLICE, TOY, AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, InputError,
                    MetricsFile, base_of, check_finite, create_reference_model, disable_dropout, explain, load_prompts, load_reward,
                    logprobs_from_logits, lora_config, newest_checkpoint, run, set_seed, setup_ranks, whole_weights,
                    writable_folder)

FORWARD_TOKENS = 2048  # tokens (rows x width) that go through a model at once where no gradient is needed
JSON = tyro.conf.arg(metavar="JSON", constructor=json.loads)


# ------------------------------------------------------------------------------------------------ configuration
@dataclass
class PPOConfig:
    """Sizes are per process unless they say global. The first part is the documented one, in its order."""

    exp_name: str = field(default_factory=lambda: Path(sys.argv[0]).stem)
    """Name of the experiment: title of the model card and name of the output folder."""
    seed: int = 0
    """Weights and the order of the data, alike on all ranks; rank r samples, and shuffles its minibatches, by a seed of its own."""
    log_with: Optional[Literal["wandb", "tensorboard"]] = None
    """Tracker beside metrics.jsonl."""
    task_name: Optional[str] = None
    """Name of the task, told to the tracker and in the model card."""
    model_name: Optional[str] = None
    """Policy: a hub name or a folder (a model, one with a value head, or a LoRA adapter). None: the toy model."""
    query_dataset: Optional[str] = None
    """Prompts: a .jsonl/.json/.csv/.parquet/.txt file, a folder or a hub name, with a column query, prompt, messages (chat),
    text or input_ids. None: the toy prompts."""
    reward_model: Optional[str] = None
    """A sequence classifier's folder or hub name, or file.py:function that takes a list of texts and returns as many
    numbers. It reads query + response. None: the toy reward model."""
    remove_unused_columns: bool = True
    """Keep only what is trained on (query, input_ids) of the data set's columns; the trainer itself drops no column."""
    tracker_kwargs: Annotated[dict, JSON] = field(default_factory=dict)
    """Arguments of the tracker's init, such as {"wandb": {"name": "try 7"}}."""
    accelerator_kwargs: Annotated[dict, JSON] = field(default_factory=dict)
    """Arguments of accelerate.Accelerator, such as {"mixed_precision": "bf16"}."""
    project_kwargs: Annotated[dict, JSON] = field(default_factory=dict)
    """Arguments of accelerate's ProjectConfiguration, such as {"logging_dir": "logs"}."""
    tracker_project_name: str = "trl"
    """Project name for the tracker."""
    push_to_hub_if_best_kwargs: Annotated[dict, JSON] = field(default_factory=dict)
    """Arguments of push_to_hub (repo_id, private, token): the policy is pushed when its mean score is the best so far."""
    steps: int = 20000
    """Length of the run in samples (query and response), over all ranks."""
    learning_rate: float = 1e-5
    """Adam's learning rate."""
    adap_kl_ctrl: bool = True
    """Adapt the KL coefficient to `target`; else it stays at `init_kl_coef`."""
    init_kl_coef: float = 0.2
    """First KL coefficient, beta."""
    kl_penalty: Literal["kl", "abs", "mse", "full"] = "kl"
    """Per token: 'kl' log pi - log pi_ref; 'abs' its absolute value; 'mse' half its square; 'full' the exact KL divergence
    over the vocabulary."""
    target: float = 6
    """KL per response (nats) that the adaptive controller steers to."""
    horizon: float = 10000
    """Samples (global) over which the adaptive controller corrects."""
    gamma: float = 1
    """Discount for advantages."""
    lam: float = 0.95
    """GAE's lambda."""
    cliprange: float = 0.2
    """eps: the ratio is clipped to 1 - eps .. 1 + eps."""
    cliprange_value: float = 0.2
    """A value moves at most so far from the old one before its loss stops falling."""
    vf_coef: float = 0.1
    """c_V: weight of the value loss."""
    batch_size: int = 256
    """Samples of one PPO update."""
    forward_batch_size: Optional[int] = None
    """Old name of mini_batch_size."""
    mini_batch_size: int = 1
    """Samples of one forward and backward pass."""
    gradient_accumulation_steps: int = 1
    """Minibatches of one optimizer step."""
    world_size: Annotated[Optional[int], tyro.conf.Suppress] = None
    """Number of ranks, known at run time."""
    ppo_epochs: int = 4
    """Passes over each batch."""
    max_grad_norm: Optional[float] = None
    """Gradients longer than this are cut to it, at every optimizer step. None: not clipped."""
    optimize_cuda_cache: Optional[bool] = None
    """Old name of optimize_device_cache."""
    optimize_device_cache: Optional[bool] = False
    """Hand the accelerator's cached memory back after each update: a little slower, leaves room for others."""
    early_stopping: bool = False
    """End a batch's epochs once the policy has moved 1.5 x target_kl from the one that sampled."""
    target_kl: float = 1
    """KL from the sampling policy (nats per token, mean over the epoch so far) for early_stopping."""
    compare_steps: int = 1
    """Updates between two looks at whether the mean score is the best so far (push_to_hub_if_best_kwargs)."""
    ratio_threshold: float = 10.0
    """An optimizer step with a minibatch whose mean ratio rho is above this is left out."""
    use_score_scaling: bool = False
    """Divide scores by their running standard deviation."""
    use_score_norm: bool = False
    """Subtract the running mean as well (with use_score_scaling)."""
    score_clip: Optional[float] = None
    """Clip scores to -score_clip .. score_clip."""
    whiten_rewards: bool = False
    """Scale the token rewards to a standard deviation of 1, about their mean, before advantages are computed."""
    is_encoder_decoder: Annotated[Optional[bool], tyro.conf.Suppress] = None
    """Known from the model at run time."""
    is_peft_model: Annotated[Optional[bool], tyro.conf.Suppress] = None
    """Known from the model at run time."""
    backward_batch_size: Annotated[Optional[int], tyro.conf.Suppress] = None
    """Samples of one optimizer step: mini_batch_size x gradient_accumulation_steps."""
    global_backward_batch_size: Annotated[Optional[int], tyro.conf.Suppress] = None
    """backward_batch_size over all ranks."""
    global_batch_size: Annotated[Optional[int], tyro.conf.Suppress] = None
    """batch_size over all ranks."""

    # the script's own
    output_dir: Optional[str] = None
    """Where the run's files go. None: runs/<exp_name>."""
    resume_from: Optional[str] = None
    """A checkpoint, or the output folder of a killed run (its last checkpoint)."""
    save_freq: int = 10
    """Updates between two checkpoints."""
    max_new_tokens: int = 24
    """Length of a response, at most."""
    max_query_length: Optional[int] = None
    """Queries are cut to their first tokens, so many. None: not cut."""
    temperature: float = 1.0
    """Of sampling, and of all log-probabilities: the policy is softmax(logits / temperature)."""
    generation_batch_size: int = 256
    """Rows that are sampled at once."""
    missing_eos_penalty: Optional[float] = None
    """Taken off the score of a response that does not end. None: nothing."""
    reward_label: Optional[str] = None
    """Name or number of the reward classifier's label whose logit is the score; needed where it has several."""
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the policy's weights. Weights that are trained want float32; LoRA's base model may be bfloat16."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    lora_r: int = 0
    """Rank of a fresh LoRA adapter on all linear layers. 0: train all weights."""
    lora_alpha: int = 16
    """LoRA's scale is lora_alpha / lora_r."""

    def __post_init__(self):
        if self.forward_batch_size is not None:
            warnings.warn("forward_batch_size is now called mini_batch_size and has set it")
            self.mini_batch_size = self.forward_batch_size
        if self.optimize_cuda_cache is not None:
            warnings.warn("optimize_cuda_cache is now called optimize_device_cache and has set it")
            self.optimize_device_cache = self.optimize_cuda_cache
        for name in ("steps", "batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs", "compare_steps",
                     "save_freq", "max_new_tokens", "temperature", "generation_batch_size", "target", "horizon"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)}: give a number above 0")
        self.backward_batch_size = self.mini_batch_size * self.gradient_accumulation_steps
        if self.batch_size % self.backward_batch_size:
            raise InputError(f"batch_size={self.batch_size} is not a multiple of mini_batch_size x gradient_accumulation_steps "
                             f"= {self.mini_batch_size} x {self.gradient_accumulation_steps}: change one of the three")
        if self.kl_penalty not in ("kl", "abs", "mse", "full"):
            raise InputError(f"kl_penalty={self.kl_penalty!r}: choose kl, abs, mse or full")
        if self.push_to_hub_if_best_kwargs and "repo_id" not in self.push_to_hub_if_best_kwargs:
            raise InputError("push_to_hub_if_best_kwargs needs a repo_id to push to")
        self.total_ppo_epochs = math.ceil(self.steps / self.batch_size)

    def to_dict(self):
        return asdict(self)


# ------------------------------------------------------------------------------------------------ data
def collate(rows):
    """Rows -> {column: list}, `input_ids` as a list of LongTensors [query_length], unpadded."""
    batch = {key: [row[key] for row in rows] for key in rows[0]}
    batch["input_ids"] = [torch.as_tensor(ids) for ids in batch["input_ids"]]
    return batch


class EpochSampler(DistributedSampler):
    """Each rank's rows, shuffled anew in every epoch, by seed and epoch alone."""

    def __iter__(self):
        yield from super().__iter__()
        self.epoch += 1


# ------------------------------------------------------------------------------------------------ the mathematics
def entropy_from_logits(logits):
    """[..., V] -> entropy of each distribution [...], in nats. A slice at a time: copies of all logits would be the largest
    tensors of a step."""
    def entropy(part):
        logp = F.log_softmax(part, dim=-1)
        return -(logp.exp() * logp).sum(-1)

    rows = logits.flatten(0, -2)
    return torch.cat([entropy(part) for part in rows.split(SLICE)]).view(logits.shape[:-1])


def masked_mean(values, mask, axis=None):
    """Mean of the values under the mask, over all dimensions or one."""
    if axis is not None:
        return (values * mask).sum(axis) / mask.sum(axis)
    return (values * mask).sum() / mask.sum()


def masked_var(values, mask, unbiased=True):
    """Variance of the values under the mask; unbiased (n / (n - 1)) where there are two or more."""
    n = mask.sum()
    variance = masked_mean((values - masked_mean(values, mask)) ** 2, mask)
    return variance * n / (n - 1) if unbiased and n > 1 else variance


def masked_whiten(values, mask, shift_mean=True, sum_over_ranks=lambda x: x):
    """Values scaled to variance 1 under the mask, and to mean 0 or (shift_mean=False) to the mean they had; the moments are
    those of all ranks. Fewer than two values have no variance: they come back as they are."""
    n, total = sum_over_ranks(torch.stack([mask.sum().float(), (values * mask).sum().float()]))
    if n < 2:
        return values
    mean = total / n
    var = sum_over_ranks(((values - mean) ** 2 * mask).sum()) / (n - 1)
    whitened = (values - mean) * torch.rsqrt(var + 1e-8)
    return whitened if shift_mean else whitened + mean


def whiten(values, shift_mean=True):
    """masked_whiten with nothing masked."""
    return masked_whiten(values, torch.ones_like(values), shift_mean)


def kl_penalty(logprobs, ref_logprobs, kind):
    """Per-token penalty [B, R] from log-probabilities [B, R], or from full log-softmaxes [B, R, V] for kind 'full'."""
    difference = logprobs - ref_logprobs
    if kind == "kl":
        return difference                                # k1: unbiased, but may be negative
    if kind == "abs":
        return difference.abs()
    if kind == "mse":
        return 0.5 * difference.square()                 # k2: biased a little, never negative
    return (logprobs.exp() * difference).sum(-1)         # 'full': sum over the vocabulary of pi log(pi / pi_ref)


def gae(values, rewards, mask, gamma, lam):
    """Generalised advantage estimation over the unmasked tokens of each row. All [B, R] -> advantages, returns [B, R].

        delta_t = R_t + gamma V_{t+1} - V_t                                              (Schulman et al. 2016, eq. 10)
        A_t     = delta_t + gamma lam A_{t+1}                                            (eq. 16, as a recursion)"""
    advantages = torch.zeros_like(values)
    nextvalues = lastgaelam = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * nextvalues - values[:, t]
        advantages[:, t] = delta + gamma * lam * lastgaelam
        # a masked token (padding, a tool's answer) is no step of the policy: what comes after it is handed on untouched
        nextvalues = torch.where(mask[:, t] > 0, values[:, t], nextvalues)
        lastgaelam = torch.where(mask[:, t] > 0, advantages[:, t], lastgaelam)
    return advantages * mask, (advantages + values) * mask


def policy_loss(logprobs, old_logprobs, advantages, mask, cliprange):
    """-> loss, ratio, tokens where the clip binds (1 or 0). All tensors [B, R] or flat [N]."""
    ratio = torch.exp(logprobs - old_logprobs)                                           # rho_t
    pg_losses = -advantages * ratio
    pg_losses2 = -advantages * torch.clamp(ratio, 1.0 - cliprange, 1.0 + cliprange)      # Schulman et al. 2017, eq. 7
    return masked_mean(torch.max(pg_losses, pg_losses2), mask), ratio, (pg_losses2 > pg_losses).float()


def value_loss(vpreds, values, returns, mask, cliprange_value):
    """-> loss, tokens where the clip binds (1 or 0). All tensors [B, R] or flat [N]."""
    vpredclipped = torch.clamp(vpreds, values - cliprange_value, values + cliprange_value)
    vf_losses1 = (vpreds - returns) ** 2
    vf_losses2 = (vpredclipped - returns) ** 2
    return 0.5 * masked_mean(torch.max(vf_losses1, vf_losses2), mask), (vf_losses2 > vf_losses1).float()


class AdaptiveKLController:
    """beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon), for n samples (Ziegler et al. 2019, section 2.2)."""

    def __init__(self, init_kl_coef, target, horizon):
        self.value, self.target, self.horizon = init_kl_coef, target, horizon

    def update(self, current, n_steps):
        error = min(max(current / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n_steps / self.horizon


class FixedKLController:
    """beta as it is."""

    def __init__(self, kl_coef):
        self.value = kl_coef

    def update(self, current, n_steps):
        pass


class RunningMoments:
    """Mean and standard deviation of all scores so far, over all ranks, by the parallel form of Welford's update."""

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.mean, self.std, self.var, self.count = 0.0, 1.0, 1.0, 0.0

    def update(self, xs):
        """xs [B] of this rank -> mean and standard deviation of this batch (global). One number alone has no spread: 1."""
        xs = (self.accelerator.gather(xs) if self.accelerator.num_processes > 1 else xs).double()
        n, xs_mean, xs_var = xs.numel(), xs.mean().item(), xs.var(correction=0).item()
        total, delta = self.count + n, xs_mean - self.mean
        squares = self.var * self.count + xs_var * n + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.var, self.count = squares / total, total
        self.std = math.sqrt(squares / (total - 1)) if total > 1 else 1.0
        return xs_mean, math.sqrt(xs_var * n / (n - 1)) if n > 1 else 1.0


def chunk_by_length(lengths, budget):
    """Row numbers in groups of similar length, each of at most `budget` tokens with its padding (or one row)."""
    chunks = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not chunks or (len(chunks[-1]) + 1) * lengths[i] > budget:
            chunks.append([])
        chunks[-1].append(i)
    return [sorted(rows) for rows in chunks]


class DrawToken(LogitsProcessor):
    """Draws the next token itself, by inverting the distribution's CDF, and leaves it as the only one that is not -inf.

    torch.multinomial draws an exponential for each entry of the vocabulary: a third of the time of a rollout on CPUs."""

    def __call__(self, input_ids, scores):
        cdf = scores.softmax(dim=-1).cumsum(dim=-1)
        drawn = torch.searchsorted(cdf, torch.rand_like(cdf[:, :1]) * cdf[:, -1:], right=True).clamp_(max=scores.shape[1] - 1)
        return torch.full_like(scores, -math.inf).scatter_(1, drawn, 0.0)


# ------------------------------------------------------------------------------------------------ the trainer
class PPOTrainer:
    """PPO that one drives oneself: `generate` answers, any Python code gives scores, `step` learns from them.

        for batch in trainer.dataloader:
            responses = trainer.generate(batch["input_ids"], return_prompt=False, do_sample=True, max_new_tokens=24)
            scores = [torch.tensor(my_reward(tokenizer.decode(response))) for response in responses]
            stats = trainer.step(batch["input_ids"], responses, scores)

    Every method is called on every rank. Symbols in shapes: B rows, R the longest response, V the vocabulary."""

    def __init__(self, config=None, model=None, ref_model=None, tokenizer=None, dataset=None, optimizer=None,
                 data_collator=None, num_shared_layers=None, lr_scheduler=None):
        """
        config: PPOConfig. model: AutoModelForCausalLMWithValueHead or its Seq2Seq sibling. tokenizer: the model's.
        ref_model: what the KL is measured from. None: the adapter as it is now for a PEFT model, else a frozen copy of the
            model that shares its first `num_shared_layers` layers with it (None: a full copy).
        dataset, data_collator: for `dataloader`; None: make your own. optimizer: None: Adam. lr_scheduler: stepped once a
            `step`. Raises ValueError for parts that don't go together."""
        if not isinstance(config, PPOConfig):
            raise ValueError(f"config must be a PPOConfig, not {type(config).__name__}")
        if not hasattr(model, "v_head"):
            raise ValueError(f"model must have a value head (AutoModelForCausalLMWithValueHead), not be {type(model).__name__}")
        if not hasattr(tokenizer, "eos_token_id"):
            raise ValueError(f"tokenizer must be the model's tokenizer, not {type(tokenizer).__name__}")
        if ref_model is not None and not hasattr(ref_model, "v_head"):
            raise ValueError(f"ref_model must be a model with a value head, not {type(ref_model).__name__}")
        setup_ranks()
        set_seed(config.seed)
        self.config, self.tokenizer = config, tokenizer
        project = ProjectConfiguration(**{"project_dir": config.output_dir, **config.project_kwargs})
        self.accelerator = Accelerator(**{"log_with": config.log_with, "project_config": project,
                                          "step_scheduler_with_optimizer": False, **config.accelerator_kwargs})
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise InputError("PPO does not train under DeepSpeed: shard a large model with FSDP 2 instead (docs/ppo.md)")
        if self.accelerator.distributed_type == DistributedType.FSDP:
            model.keep_module_names()
        ranks = config.world_size = self.accelerator.num_processes
        config.global_batch_size = config.batch_size * ranks
        config.global_backward_batch_size = config.backward_batch_size * ranks
        config.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        config.is_peft_model = model.is_peft_model
        config.total_ppo_epochs = math.ceil(config.steps / config.global_batch_size)

        self.ref_model = self._make_reference(model, ref_model, num_shared_layers)
        for each in (model, self.ref_model):
            if each is not None:
                disable_dropout(each)
        if self.ref_model is not None:
            self.ref_model.to(self.accelerator.device).eval()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = optimizer or torch.optim.Adam(parameters, lr=config.learning_rate, fused=True)
        self.dataloader = None
        if dataset is not None:
            self.dataloader = self.prepare_dataloader(dataset, data_collator)
        else:
            warnings.warn("no dataset: make a dataloader of your own, with batches of config.batch_size rows")
        self.model, self.optimizer, self.lr_scheduler = self.accelerator.prepare(model, optimizer, lr_scheduler)
        self.policy = self.accelerator.unwrap_model(self.model)  # without DDP: for passes that need no gradient
        register_fsdp_forward_method(self.policy, "generate")  # does nothing where nothing is sharded
        # accelerate's wrapper searches the disk for packages at each step; it is needed only where it scales gradients
        self._stepper = self.optimizer if self.accelerator.scaler else self.optimizer.optimizer

        controller = AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
        self.kl_ctl = controller if config.adap_kl_ctrl else FixedKLController(config.init_kl_coef)
        self.running = RunningMoments(self.accelerator)
        self.current_step, self.highest_reward = 0, -math.inf
        self._veto, self._stop, self._moved = False, False, torch.zeros(2, dtype=torch.float64)  # see train_minibatch
        self.accelerator.register_for_checkpointing(self)
        if config.log_with:
            plain = {k: v for k, v in config.to_dict().items() if isinstance(v, (int, float, str, bool))}
            self.accelerator.init_trackers(config.tracker_project_name, plain, config.tracker_kwargs)
        set_seed(config.seed + 100_003 * self.accelerator.process_index)  # weights are made: now each rank draws its own

    def _make_reference(self, model, ref_model, num_shared_layers):
        """The model whose log-probabilities are pi_ref, or None where it is the policy's own adapter `reference`."""
        if ref_model is not None:
            if num_shared_layers is not None:
                warnings.warn("num_shared_layers has no effect beside a ref_model")
            return ref_model.requires_grad_(False)
        if not model.is_peft_model:
            return create_reference_model(model, num_shared_layers)
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        peft, policy = model.pretrained_model, model.pretrained_model.active_adapter
        peft.add_adapter("reference", peft.peft_config[policy])
        weights = get_peft_model_state_dict(peft, adapter_name=policy)
        set_peft_model_state_dict(peft, {k: v.clone() for k, v in weights.items()}, adapter_name="reference")
        peft.set_adapter(policy)
        return None

    @contextmanager
    def reference(self):
        """The reference model, ready for a forward pass."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        policy = self.policy.pretrained_model.active_adapter
        self.policy.pretrained_model.set_adapter("reference")
        try:
            yield self.policy
        finally:
            self.policy.pretrained_model.set_adapter(policy)

    def prepare_dataloader(self, dataset, data_collator=None):
        """Shuffled batches of config.batch_size rows of this rank's own, with all their columns; the rest that fills no batch is
        dropped. The order is that of the seed and the epoch, whatever else is drawn. Raises ValueError for less than a batch."""
        need = self.config.batch_size * self.accelerator.num_processes
        if len(dataset) < need:
            raise InputError(f"the data set has {len(dataset)} rows and one batch takes {need} (batch_size x ranks): "
                             "give more rows or a smaller batch_size")
        sampler = EpochSampler(dataset, self.accelerator.num_processes, self.accelerator.process_index, seed=self.config.seed,
                               drop_last=True)
        # a generator of its own: the loader then draws nothing from the one that samples responses
        return DataLoader(dataset, self.config.batch_size, sampler=sampler, drop_last=True, generator=torch.Generator(),
                          collate_fn=data_collator or collate)

    # ------------------------------------------------------------------ 1. the policy answers
    @torch.no_grad()
    def generate(self, query_tensor, length_sampler=None, batch_size=4, return_prompt=True, generate_ref_response=False,
                 **generation_kwargs):
        """Responses of the policy (and of the reference, where asked): a list of LongTensors for a list of queries [length],
        a tensor [1, length] for one query. They end after the first end-of-sequence token that was generated.

        length_sampler: function that gives max_new_tokens anew for each batch. batch_size: rows at once. return_prompt: the
        query stands before the response. generation_kwargs: for the model's `generate`; sampling has
        config.temperature, and top_k=0 and top_p=1 unless given. Raises ValueError."""
        if generation_kwargs.get("return_dict_in_generate"):
            raise ValueError("return_dict_in_generate=True: generate returns tokens alone; for scores call model.generate")
        if generation_kwargs.get("num_return_sequences", 1) != 1:
            raise ValueError(f"num_return_sequences={generation_kwargs['num_return_sequences']}: generate gives one response for each "
                             "query; for several, give the query several times")
        single = isinstance(query_tensor, torch.Tensor)
        queries = [query_tensor] if single else list(query_tensor)
        outputs = []
        for model in [nullcontext(self.policy)] + [self.reference()] * generate_ref_response:
            with whole_weights(self.policy), model as model:
                outputs.append(self._generate(model, queries, length_sampler, batch_size, return_prompt, generation_kwargs))
        outputs = [rows[0][None] for rows in outputs] if single else outputs
        return tuple(outputs) if generate_ref_response else outputs[0]

    def _generate(self, model, queries, length_sampler, batch_size, return_prompt, kwargs):
        own, was_training, rows = model.generation_config, model.training, [None] * len(queries)
        kwargs, plain = self._sampling(own, kwargs)
        if plain:  # a model's settings for chats (beams, penalties, forced tokens) would make another policy of it
            known = ("bos_token_id", "eos_token_id", "decoder_start_token_id", "max_new_tokens", "max_length")
            model.pretrained_model.generation_config = GenerationConfig(**{name: getattr(own, name) for name in known})
        ends = self.end_tokens(kwargs.get("eos_token_id", own.eos_token_id))
        ends = torch.tensor(sorted(ends), device=self.accelerator.device)
        model.eval()
        by_length = sorted(range(len(queries)), key=lambda i: len(queries[i]))  # little padding within a batch
        try:
            for start in range(0, len(queries), batch_size):
                picked = by_length[start:start + batch_size]
                if length_sampler is not None:
                    kwargs["max_new_tokens"] = length_sampler()
                lengths = torch.tensor([len(queries[i]) for i in picked])
                side = "right" if self.config.is_encoder_decoder else "left"  # positions then count from the first token
                ids = pad_sequence([queries[i] for i in picked], True, kwargs["pad_token_id"], padding_side=side)
                mask = pad_sequence([torch.ones_like(queries[i]) for i in picked], True, 0, padding_side=side)
                with self.accelerator.autocast():
                    output = model.generate(input_ids=ids.to(self.accelerator.device),
                                            attention_mask=mask.to(self.accelerator.device), **kwargs)
                # what was given: the padded query, or the decoder's start token
                before = 1 if self.config.is_encoder_decoder else ids.shape[1]
                for i, length, row in zip(picked, lengths.tolist(), output):
                    answer = row[before:]
                    end = torch.isin(answer, ends).nonzero()
                    answer = answer[:end[0, 0] + 1] if len(end) else answer
                    kept = 1 if self.config.is_encoder_decoder else length if return_prompt else 0
                    rows[i] = torch.cat([row[before - kept:before], answer])
        finally:
            model.train(was_training)
            model.pretrained_model.generation_config = own
        return rows

    def end_tokens(self, ids):
        """The tokens that end a response: the tokenizer's, and ids, one or a list (as a generation_config has them)."""
        return {self.tokenizer.eos_token_id, *(ids if isinstance(ids, (list, tuple)) else [ids])} - {None}

    def _sampling(self, own, kwargs):
        """-> generation_kwargs made ready; is it plain sampling, through DrawToken? Anything that samples from another
        distribution than the one that is scored is told. own: the model's generation_config."""
        if "generation_config" in kwargs:
            raise ValueError("generation_config is not taken: give its settings one by one (max_new_tokens=..., ...)")
        kwargs = {"temperature": self.config.temperature, **kwargs}
        # what follows a response's end is cut off; some models warn where they see their padding token
        fill = self.tokenizer.pad_token_id if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id
        kwargs.setdefault("pad_token_id", fill)
        do_sample = kwargs.get("do_sample", own.do_sample)
        temperature = kwargs.pop("temperature")
        if not do_sample:
            return kwargs, False
        top_k, top_p = kwargs.pop("top_k", 0), kwargs.pop("top_p", 1.0)
        cuts = {name: kwargs[name] for name in ("min_p", "typical_p", "epsilon_cutoff", "eta_cutoff") if name in kwargs}
        bans = {name: kwargs[name] for name in ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens",
                                                "min_new_tokens") if name in kwargs}
        other = temperature != self.config.temperature or top_k or (top_p or 1.0) < 1.0 or cuts
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        if other or bans:
            warnings.warn(f"responses are sampled with {settings | cuts | bans} and scored with temperature "
                          f"{self.config.temperature} alone: ratio and KL are those of another policy")
        if other:
            return {**kwargs, **settings}, False
        if kwargs.get("num_beams", 1) != 1:
            raise ValueError(f"num_beams={kwargs['num_beams']}: a rollout is one sampled response for each query, without beams")
        draw = [TemperatureLogitsWarper(temperature)] * (temperature != 1.0) + [DrawToken()]
        kwargs["logits_processor"] = LogitsProcessorList([*kwargs.get("logits_processor", []), *draw])
        return {**kwargs, "do_sample": False}, True  # what is left for `generate` to do is greedy decoding

    # ------------------------------------------------------------------ 2. one PPO update
    def step(self, queries, responses, scores, response_masks=None):
        """One PPO update on B answered and scored queries -> dict of statistics (global; see docs/ppo.md for each).

        queries, responses: lists of LongTensors [query_length], [response_length]; scores: list of scalar tensors;
        response_masks: list of tensors [response_length], 0 for tokens that the policy didn't write (a tool's output).
        Every rank brings the same number of rows. Raises ValueError before any weight has moved, and InputError for a loss that
        is not finite."""
        config, clock = self.config, Stopwatch()
        queries, responses, scores, response_masks = self._step_safety_checker(
            len(queries), queries, responses, scores, response_masks)
        raw_scores, scores = scores, self._scale(scores)

        # the old policy and the reference: log-probabilities and values, without gradient
        layout = self._layout(responses, self.prepare_model_inputs(queries, responses), response_masks)
        logprobs, ref_logprobs, values, masks, kls = self._rollout_statistics(layout)
        clock.lap("forward_pass")
        rewards, non_score_rewards, kls = self.compute_rewards(scores, logprobs, ref_logprobs, masks, kls)
        clock.lap("compute_rewards")
        values, advantages, returns = self.compute_advantages(values, rewards, masks)
        clock.lap("compute_advantages")

        old = torch.stack([logprobs, values, advantages, returns], dim=-1)                            # [B, R, 4]
        train_stats, self._stop = [], False
        self.model.train()
        for epoch in range(config.ppo_epochs):
            self._moved = torch.zeros(2, dtype=torch.float64)  # KL so far in this epoch, and its tokens
            order = np.random.permutation(len(queries))
            for start in range(0, len(order), config.backward_batch_size):
                if not self._stop:
                    rows = order[start:start + config.backward_batch_size].tolist()
                    train_stats += [{**mb, "epoch": epoch} for mb in self._optimizer_step(rows, layout, old)]
        clock.lap("optimize_step")

        stats = self.record_step_stats(
            kl_coef=self.kl_ctl.value, scores=scores, raw_scores=raw_scores, logprobs=logprobs, ref_logprobs=ref_logprobs,
            non_score_reward=non_score_rewards, masks=masks, kls=kls, queries=queries, responses=responses,
            values=values, returns=returns, train_stats=train_stats)
        clock.lap("calc_stats")
        self.kl_ctl.update(stats["objective/kl"].item(), len(queries) * config.world_size)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.current_step += 1
        self._push_if_best(stats["objective/scores"].item())
        if config.optimize_device_cache:
            clear_device_cache(garbage_collection=True)
        return {**stats, **clock.times()}

    def _step_safety_checker(self, batch_size, queries, responses, scores, masks=None):
        """The four lists on this rank's device, scores as a tensor [B]. Raises ValueError, naming the row."""
        for name, rows in (("queries", queries), ("responses", responses), ("scores", scores), ("response_masks", masks)):
            if rows is None and name == "response_masks":
                continue
            if not isinstance(rows, (list, tuple)) or len(rows) != batch_size:
                size = f" of {len(rows)}" if hasattr(rows, "__len__") else ""
                raise InputError(f"{name} must be a list of {batch_size} tensors, one for each query, not a "
                                 f"{type(rows).__name__}{size}")
            for i, row in enumerate(rows):
                if not isinstance(row, torch.Tensor):
                    raise InputError(f"{name}[{i}] must be a tensor, not a {type(row).__name__}")
                if name != "scores" and (row.dim() != 1 or len(row) == 0):
                    raise InputError(f"{name}[{i}] must be one-dimensional and not empty, its shape is {list(row.shape)}")
        least = 2 if self.config.is_encoder_decoder else 1  # the decoder's start token is no answer
        for i, score in enumerate(scores):
            if score.dim() > 1 or score.numel() != 1:
                raise InputError(f"scores[{i}] must be one number, its shape is {list(score.shape)}")
            if not torch.isfinite(score).all():
                raise InputError(f"scores[{i}] is {score.item()}: scores must be finite; mend the reward function")
            if len(responses[i]) < least:
                raise InputError(f"responses[{i}] is empty: generate at least one token")
            if masks is not None and (len(masks[i]) != len(responses[i]) or not masks[i][least - 1:].any()):
                raise InputError(f"response_masks[{i}] must be as long as responses[{i}] ({len(responses[i])}) and not all 0")
        sizes = gather_object([batch_size])
        if len(set(sizes)) > 1:
            raise InputError(f"every rank must bring as many rows to a step; they bring {sizes}")
        to_device = lambda rows: [row.to(self.accelerator.device) for row in rows]
        scores = torch.stack([score.reshape(()).float() for score in to_device(scores)])
        return to_device(queries), to_device(responses), scores, masks and to_device(masks)

    def _scale(self, scores):
        """Scores [B] after use_score_scaling, use_score_norm and score_clip."""
        if self.config.use_score_scaling:
            self.running.update(scores)
            shift = self.running.mean if self.config.use_score_norm else 0.0
            scores = (scores - shift) / (self.running.std + torch.finfo(scores.dtype).eps)
        clip = self.config.score_clip
        return scores if clip is None else scores.clamp(-clip, clip)

    def prepare_model_inputs(self, queries, responses):
        """-> {"input_ids", "attention_mask"} [B, T] of query + response, padded on the right; for an encoder-decoder the
        query's, and {"decoder_input_ids", "decoder_attention_mask"} of the response."""
        def pad(rows):
            ones = [torch.ones_like(row) for row in rows]
            return pad_sequence(rows, True, self.tokenizer.pad_token_id or 0), pad_sequence(ones, True, 0)

        if self.config.is_encoder_decoder:
            names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
            return dict(zip(names, (*pad(queries), *pad(responses))))
        rows = [torch.cat([query, response]) for query, response in zip(queries, responses)]
        return dict(zip(("input_ids", "attention_mask"), pad(rows)))

    def _rollout_statistics(self, layout):
        """-> logprobs, ref_logprobs, values, masks [B, R], and the exact KL [B, R] where kl_penalty is 'full', else None."""
        full = self.config.kl_penalty == "full"
        with torch.no_grad(), whole_weights(self.policy):
            logprobs, logits, values = self._forward_rows(self.policy, layout, return_logits=full)
            with self.reference() as reference:
                ref_logprobs, ref_logits, _ = self._forward_rows(reference, layout, return_logits=full)
            kls = kl_penalty(logprobs_from_logits(logits, None, gather=False),
                             logprobs_from_logits(ref_logits, None, gather=False), "full") if full else None
        return logprobs, ref_logprobs, values, layout["masks"], kls

    def batched_forward_pass(self, model, queries, responses, model_inputs, return_logits=False, response_masks=None):
        """-> logprobs [B, R], logits [B, R, V] or None, values [B, R], masks [B, R]; R = the longest response, column 0 its
        first token (with an encoder-decoder: the first after the start token). Zero where the mask is.

        model_inputs: as of `prepare_model_inputs`, padded on either side. The logits are those of softmax(logits /
        temperature). Without gradient the rows run in large batches of similar length, with gradient all at once."""
        layout = self._layout(responses, model_inputs, response_masks)
        return *self._forward_rows(model, layout, return_logits), layout["masks"]

    def _layout(self, responses, model_inputs, response_masks=None):
        """Where the response tokens are, worked out once for all passes over a batch.

        -> tokens, labels, select [B, T] (position t of a row, if selected, predicts the label that is its token t + 1),
        masks [B, R], lengths (list of B), the encoder's inputs, if there is one, and its lengths (0 without)."""
        prefix = "decoder_" if self.config.is_encoder_decoder else ""
        tokens, attention = model_inputs[prefix + "input_ids"], model_inputs[prefix + "attention_mask"]
        start = int(self.config.is_encoder_decoder)  # the decoder's start token is no answer
        sizes = torch.tensor([[len(response) - start] for response in responses], device=tokens.device)
        column, end = torch.arange(tokens.shape[1], device=tokens.device), attention.sum(1, keepdim=True)
        to_the_front = lambda x, mask: x.gather(1, mask.argsort(dim=1, descending=True, stable=True))
        tokens = to_the_front(tokens, attention)
        select = (column >= end - 1 - sizes) & (column < end - 1)
        valid = torch.arange(int(sizes.max()), device=tokens.device) < sizes                          # [B, R]
        masks = valid.long()
        for i, mask in enumerate(response_masks or []):
            masks[i, :sizes[i, 0]] *= mask[len(mask) - sizes[i, 0]:].long()
        select[select.clone()] = masks[valid] > 0
        encoder, encoder_lengths = {}, [0] * len(responses)
        if prefix:
            mask = model_inputs["attention_mask"]
            encoder = {name: to_the_front(model_inputs[name], mask) for name in ("input_ids", "attention_mask")}
            encoder_lengths = mask.sum(1).tolist()
        return {"tokens": tokens, "labels": tokens.roll(-1, dims=1), "select": select, "masks": masks,
                "lengths": end[:, 0].tolist(), "encoder": encoder, "encoder_lengths": encoder_lengths}

    def _forward_rows(self, model, layout, return_logits=False):
        """All rows of a layout -> logprobs, logits (or None), values, in [B, R]."""
        masks, lengths = layout["masks"], [sum(both) for both in zip(layout["lengths"], layout["encoder_lengths"])]
        logprobs, logits = torch.zeros_like(masks, dtype=torch.float32), None
        values = torch.zeros_like(logprobs)
        chunks = [range(len(lengths))] if torch.is_grad_enabled() else chunk_by_length(lengths, FORWARD_TOKENS)
        for rows in map(list, chunks):
            here = torch.zeros_like(masks, dtype=torch.bool)
            here[rows] = masks[rows] > 0
            logprobs[here], chunk_logits, values[here] = self._forward_tokens(model, layout, rows)
            if return_logits:
                logits = chunk_logits.new_zeros(*masks.shape, chunk_logits.shape[-1]) if logits is None else logits
                logits[here] = chunk_logits
        return logprobs, logits, values

    def _forward_tokens(self, model, layout, rows):
        """These rows of a layout -> logprobs [N], logits [N, V], values [N] of their unmasked response tokens, one row after
        the other. No token beyond the longest of the rows goes through the model, no other logits are computed."""
        width, encoder_width = (max(layout[name][i] for i in rows) for name in ("lengths", "encoder_lengths"))
        rows = torch.tensor(rows, device=layout["tokens"].device)
        tokens, labels, select = (layout[name][rows, :width] for name in ("tokens", "labels", "select"))
        if layout["encoder"]:
            inputs = {name: x[rows, :encoder_width] for name, x in layout["encoder"].items()} | {"decoder_input_ids": tokens}
        else:  # a causal model never looks right: with the padding there nothing has to be masked, and positions count from 0
            inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        with self.accelerator.autocast():
            logits, _, values = model(**inputs, select=select)
        if self.config.temperature != 1.0:
            logits = logits / self.config.temperature
        return logprobs_from_logits(logits, labels[select]), logits, values

    def compute_rewards(self, scores, logprobs, ref_logprobs, masks, kls=None):
        """-> rewards, their part without the score, KL penalty, all [B, R] (see R_t at the top).

        scores [B]; logprobs, ref_logprobs [B, R] (full log-softmaxes [B, R, V] for kl_penalty 'full'); masks [B, R]; kls:
        the penalty, where it is known already. The score falls on each row's last unmasked token."""
        if kls is None:
            kls = self._kl_penalty(logprobs, ref_logprobs)
        non_score_rewards = -self.kl_ctl.value * kls * masks
        rewards = non_score_rewards.clone()
        last = masks.shape[1] - 1 - masks.flip(1).argmax(1)
        rewards[torch.arange(len(rewards)), last] += scores.to(rewards.dtype)
        return rewards, non_score_rewards, kls * masks

    def _kl_penalty(self, logprob, ref_logprob):
        return kl_penalty(logprob, ref_logprob, self.config.kl_penalty)

    def compute_advantages(self, values, rewards, mask):
        """All [B, R] -> values, whitened advantages, returns, zero where masked."""
        if self.config.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False, sum_over_ranks=self._sum)
        values, rewards = values * mask, rewards * mask
        advantages, returns = gae(values, rewards, mask, self.config.gamma, self.config.lam)
        return values, masked_whiten(advantages, mask, sum_over_ranks=self._sum).detach() * mask, returns

    def _sum(self, tensor):
        return self.accelerator.reduce(tensor, "sum") if self.config.world_size > 1 else tensor

    def _optimizer_step(self, rows, layout, old):
        """The minibatches of one optimizer step, which takes these rows -> their statistics. old: [B, R, 4]."""
        config, stats, masks, self._veto = self.config, [], layout["masks"], False
        step_tokens = self._sum(masks[rows].sum())  # of all micro-batches and ranks: each token weighs the same
        for i in range(0, len(rows), config.mini_batch_size):
            mb, last = rows[i:i + config.mini_batch_size], i + config.mini_batch_size >= len(rows)
            old_logprobs, values, advantages, returns = old[mb][masks[mb] > 0].unbind(-1)             # [N] each
            weight = len(values) * config.world_size / step_tokens  # DDP takes the mean of the ranks' gradients
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                logprobs, logits, vpreds = self._forward_tokens(self.model, layout, mb)
                mb_stats = self.train_minibatch(old_logprobs, values, logprobs, logits, vpreds, torch.ones_like(values),
                                                advantages, returns, weight, update=last)
            stats.append({**mb_stats, "tokens": len(values)})
        return stats

    def train_minibatch(self, old_logprobs, values, logprobs, logits, vpreds, mask, advantages, returns, weight=1.0,
                        update=True):
        """Backward pass of one minibatch and, with update, the optimizer's step -> statistics (this rank's).

        Tensors [b, R] or flat [N] (logits [b, R, V], [N, V]). weight: the minibatch's part of the optimizer step's tokens. No
        step is taken where a ratio or, with early_stopping, the KL is too large. Raises InputError for a loss that is none."""
        loss_policy, loss_value, stats = self.loss(old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns)
        too_far = self._moved_too_far(stats, mask)
        self._veto = self._veto or bool(stats["policy/skipped"]) or too_far
        if not stats["policy/skipped"]:
            loss = loss_policy + loss_value
            check_finite(loss, self.current_step, "PPO updates")
            self.accelerator.backward(loss * weight)
        if update:
            if not self._veto:
                if self.config.max_grad_norm is not None:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
                self._stepper.step()
            self._stepper.zero_grad(set_to_none=False)
            self._veto = False
        return stats

    def _moved_too_far(self, stats, mask):
        """With early_stopping: has the policy's mean KL over this epoch, this minibatch included, passed 1.5 x target_kl?"""
        if not self.config.early_stopping:
            return False
        n = mask.sum()
        self._moved += self._sum(torch.stack([stats["policy/kl_k3"] * n, n])).cpu()
        self._stop = bool(self._moved[0] > 1.5 * self.config.target_kl * self._moved[1])
        return self._stop

    def loss(self, old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns):
        """-> policy loss, vf_coef x value loss, statistics. Tensors [b, R] or flat [N] (logits with [V] more); see L at the top.

        Where the minibatch's mean ratio (over all ranks) is above ratio_threshold, both losses are 0."""
        config = self.config
        pg_loss, ratio, pg_clipped = policy_loss(logprobs, old_logprobs, advantages, mask, config.cliprange)
        vf_loss, vf_clipped = value_loss(vpreds, values, returns, mask, config.cliprange_value)
        with torch.no_grad():
            log_ratio, n = logprobs - old_logprobs, mask.sum()
            tokens = {
                "policy/entropy": entropy_from_logits(logits), "policy/approxkl": 0.5 * log_ratio**2,
                "policy/policykl": -log_ratio, "policy/kl_k3": ratio - 1 - log_ratio, "policy/clipfrac": pg_clipped,
                "policy/advantages_mean": advantages, "policy/ratio_mean": ratio, "returns/mean": returns, "returns/var": returns**2,
                "val/vpred": vpreds, "val/error": (vpreds - returns) ** 2, "val/clipfrac": vf_clipped, "val/mean": values,
                "val/var": values**2}
            sums = (torch.stack(list(tokens.values())) * mask).flatten(1).sum(1)
            stats = dict(zip(tokens, sums / n))
            for name in ("returns", "val"):  # mean of squares -> unbiased variance
                stats[f"{name}/var"] = (stats[f"{name}/var"] - stats[f"{name}/mean"] ** 2) * n / (n - 1).clamp(min=1)
            skipped = self._ratio_too_large(stats["policy/ratio_mean"], n)
            if skipped:
                pg_loss, vf_loss = torch.zeros_like(pg_loss), torch.zeros_like(vf_loss)
            stats.update({
                "loss/policy": pg_loss, "loss/value": vf_loss, "loss/total": pg_loss + config.vf_coef * vf_loss,
                "policy/skipped": n.new_tensor(skipped, dtype=torch.float32),
                "policy/advantages": advantages * mask, "policy/ratio": ratio * mask})
        return pg_loss, config.vf_coef * vf_loss, {name: value.detach() for name, value in stats.items()}

    def _ratio_too_large(self, mean_ratio, n):
        """Is the mean ratio of this minibatch, over all ranks, above ratio_threshold?"""
        if self.config.world_size > 1:
            total, n = self._sum(torch.stack([mean_ratio * n, n]))
            mean_ratio = total / n
        too_large = mean_ratio.item() > self.config.ratio_threshold
        if too_large:
            warnings.warn(f"a minibatch's mean ratio {mean_ratio:.2f} is above ratio_threshold {self.config.ratio_threshold}: "
                          "its optimizer step is left out")
        return too_large

    # ------------------------------------------------------------------ 3. what is told and kept
    def record_step_stats(self, kl_coef, **data):
        """data of a step (scores [B], masks [B, R], ..., train_stats: the minibatches') -> statistics over all ranks."""
        mask, reference = data["masks"], data["logprobs"] - data["ref_logprobs"]
        lengths = lambda rows: torch.tensor([float(len(row)) for row in rows], device=mask.device)
        stats = self.gather_stats({
            "objective/kl_dist": (reference * mask).sum(1),      # log pi - log pi_ref, whatever the penalty: the controller's
            "objective/logprobs": data["logprobs"][mask > 0], "objective/ref_logprobs": data["ref_logprobs"][mask > 0],
            "tokens/queries_dist": lengths(data["queries"]), "tokens/responses_dist": lengths(data["responses"]),
            "penalties": data["non_score_reward"][mask > 0], "entropies": -(data["logprobs"] * mask).sum(1),
            "scores": data["scores"], "raw_scores": data.get("raw_scores", data["scores"])})
        penalties, entropies, scores, raw = (stats.pop(k) for k in ("penalties", "entropies", "scores", "raw_scores"))
        std = lambda x: x.std(correction=int(len(x) > 1))
        stats.update({
            "objective/kl": stats["objective/kl_dist"].mean(), "objective/kl_coef": kl_coef,
            "objective/entropy": entropies.mean(), "objective/scores": raw.mean(), "objective/scores_std": std(raw),
            "ppo/mean_non_score_reward": penalties.mean(), "ppo/mean_scores": scores.mean(), "ppo/std_scores": std(scores)})
        for name in ("queries", "responses"):
            dist = stats[f"tokens/{name}_dist"]
            stats.update({f"tokens/{name}_len_mean": dist.mean(), f"tokens/{name}_len_std": std(dist)})
        stats.update(self._mean_over_tokens(data["train_stats"]))
        if "returns" in data:  # of the whole batch: the variance of one row says nothing
            for name in ("returns", "values"):
                gathered = self.gather_stats({name: data[name][mask > 0]})[name]
                stats["ppo/returns/var" if name == "returns" else "ppo/val/var"] = gathered.var(correction=int(len(gathered) > 1))
        stats["ppo/val/var_explained"] = 1 - stats["ppo/val/error"] / stats["ppo/returns/var"]
        stats["ppo/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        return stats

    def _mean_over_tokens(self, train_stats):
        """The minibatches' statistics -> their means, each minibatch and rank weighing as many as it has tokens."""
        tokens = torch.tensor([float(mb["tokens"]) for mb in train_stats], device=self.accelerator.device)
        share = tokens * self.config.world_size / self._sum(tokens.sum())
        stats = {}
        for name, value in train_stats[0].items():
            if name not in ("tokens", "epoch"):
                column = [mb[name] for mb in train_stats]
                stats[f"ppo/{name}"] = torch.cat(column) if value.dim() else (torch.stack(column) * share).sum()
        epoch = torch.tensor([mb["epoch"] for mb in train_stats], device=tokens.device)
        for e in range(int(epoch.max()) + 1):  # where the ratio runs away one sees in which epoch
            sizes = torch.cat([mb["policy/ratio"] for mb in train_stats if mb["epoch"] == e]).log().abs()
            stats[f"ppo/policy/log_ratio_epoch_{e}"] = sizes.sum() * self.config.world_size / self._sum(tokens[epoch == e].sum())
        return self.gather_stats(stats)

    def gather_stats(self, stats):
        """Statistics of all ranks, on every rank: means of the scalars, vectors [n] one rank after the other."""
        if self.config.world_size == 1:
            return stats
        scalars = [name for name, value in stats.items() if value.dim() == 0]
        means = self._sum(torch.stack([stats[name].float() for name in scalars])) / self.config.world_size if scalars else []
        vectors = gather_object([{name: value.cpu() for name, value in stats.items() if value.dim()}])
        gathered = {name: torch.cat([rank[name] for rank in vectors]).to(stats[name].device) for name in vectors[0]}
        return {name: gathered[name] if name in gathered else means[scalars.index(name)] for name in stats}

    def log_stats(self, stats, batch, rewards, columns_to_log=("query", "response")):
        """Sends a step's statistics to the tracker, and a table of the batch's columns_to_log with the rewards.

        batch: {column: list}; rewards: list of scalar tensors of this rank. Called on every rank."""
        missing = [name for name in columns_to_log if name not in batch]
        if missing:
            raise InputError(f"columns_to_log names {missing}, the batch has {list(batch)}: put them there or name others")
        if not self.config.log_with:
            return
        rewards = self.accelerator.gather(torch.stack([torch.as_tensor(r, dtype=torch.float32) for r in rewards])
                                          .to(self.accelerator.device)).cpu()
        rows = gather_object(list(zip(*(batch[name] for name in columns_to_log)))) if columns_to_log else []
        stats = {**stats, "env/reward_mean": rewards.mean(), "env/reward_std": rewards.std(correction=0),
                 "env/reward_dist": rewards}
        numbers, vectors = split_stats(stats)
        self.accelerator.log(numbers, step=self.current_step)
        for tracker in self.accelerator.trackers if self.accelerator.is_main_process else []:
            if tracker.name == "wandb":
                import wandb
                # a histogram has no place for a ratio that overflowed, and its bins are too narrow for float32
                vectors = {name: wandb.Histogram(vector[vector.isfinite()].double().cpu().numpy())
                           for name, vector in vectors.items()}
                tracker.log(vectors, step=self.current_step)
                table = [[*row, reward] for row, reward in zip(rows, rewards.tolist())]
                tracker.log_table("game_log", [*columns_to_log, "reward"], table, step=self.current_step)
            else:
                for name, vector in vectors.items():
                    tracker.writer.add_histogram(name, vector.float().cpu(), self.current_step)
                text = "\n\n".join(f"{reward:.2f} | {' | '.join(map(str, row))}" for row, reward in zip(rows, rewards.tolist()))
                tracker.writer.add_text("game_log", text, self.current_step)

    def create_model_card(self, path, model_name="TRL Model"):
        """Writes README.md into the folder `path`: what the model is and how to load it."""
        c = self.config
        task = f" for the task *{c.task_name}*" if c.task_name else ""
        auto = "AutoModelForSeq2SeqLM" if c.is_encoder_decoder else "AutoModelForCausalLM"
        os.makedirs(path, exist_ok=True)
        Path(path, "README.md").write_text(f"""---
library_name: transformers
tags: [ppo, rlhf, reinforcement-learning]
---
# {model_name}

A language model fine-tuned with proximal policy optimisation{task}: {self.current_step} updates of {c.global_batch_size} samples
(experiment `{c.exp_name}`, policy `{c.model_name or 'toy/model'}`, prompts `{c.query_dataset or 'toy/prompts.jsonl'}`,
reward `{c.reward_model or 'toy/reward'}`).

```python
from transformers import {auto}, AutoTokenizer
model, tokenizer = {auto}.from_pretrained("."), AutoTokenizer.from_pretrained(".")
```

`value_head.safetensors` holds the value head: `{auto}WithValueHead` of common.py loads both to train on.
""")

    def save_pretrained(self, save_directory):
        """Writes model (or adapter), value head, tokenizer and model card. Call it on every rank; the main one writes."""
        state_dict = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            self.policy.save_pretrained(save_directory, state_dict=state_dict)
            self.tokenizer.save_pretrained(save_directory)
            self.create_model_card(save_directory, self.config.exp_name)
        self.accelerator.wait_for_everyone()

    def push_to_hub(self, repo_id, **kwargs):
        """Uploads policy, value head and tokenizer to the hub's `repo_id`. Call it on every rank; the main one pushes."""
        state_dict = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            self.policy.push_to_hub(repo_id=repo_id, state_dict=state_dict, **kwargs)
            self.tokenizer.push_to_hub(repo_id=repo_id, **{k: v for k, v in kwargs.items() if k in ("private", "token")})
        self.accelerator.wait_for_everyone()

    def _push_if_best(self, score):
        """Every compare_steps updates: push the policy where its mean score (global, before scaling) is the best."""
        if self.config.push_to_hub_if_best_kwargs and self.current_step % self.config.compare_steps == 0:
            if score > self.highest_reward:
                self.highest_reward = score
                self.push_to_hub(**self.config.push_to_hub_if_best_kwargs)

    def state_dict(self):
        """What a checkpoint holds beside weights, optimizer, scheduler and random numbers, which accelerate saves."""
        running = {k: v for k, v in vars(self.running).items() if k != "accelerator"}
        return {"current_step": self.current_step, "highest_reward": self.highest_reward, "kl_coef": self.kl_ctl.value,
                "running": running}

    def load_state_dict(self, state):
        self.current_step, self.highest_reward = state["current_step"], state["highest_reward"]
        self.kl_ctl.value = state["kl_coef"]
        vars(self.running).update(state["running"])

    def save_checkpoint(self, folder):
        """Writes folder/checkpoint-<updates>, aside first and then renamed: a run killed meanwhile still has the one before.
        Called on every rank."""
        final, aside = Path(folder, f"checkpoint-{self.current_step}"), Path(folder, "checkpoint.tmp")
        if self.accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(aside), safe_serialization=False)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            for old in Path(folder).glob("checkpoint-*"):
                if old != final:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load_checkpoint(self, path):
        """Goes on where a checkpoint was written: weights, optimizer, KL controller, random numbers, place in the data. The
        learning rate stays this trainer's, unless a scheduler sets it."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.accelerator.load_state(str(path))
        for group, rate in zip(self.optimizer.param_groups, rates) if self.lr_scheduler is None else []:
            group["lr"] = rate


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


def split_stats(stats):
    """-> {name: float}, {name: tensor [n]}."""
    scalar = lambda v: not isinstance(v, torch.Tensor) or v.dim() == 0
    return ({k: float(v) for k, v in stats.items() if scalar(v)}, {k: v for k, v in stats.items() if not scalar(v)})


# ------------------------------------------------------------------------------------------------ the script
def load_policy(config):
    """-> tokenizer, model with value head. Raises InputError."""
    name = config.model_name or str(TOY / "model")
    with explain(f"model_name {name} can't be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(name)
        seq2seq = AutoConfig.from_pretrained(base_of(name)).is_encoder_decoder
        auto = AutoModelForSeq2SeqLMWithValueHead if seq2seq else AutoModelForCausalLMWithValueHead
        lora = lora_config(config, "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM")
        model = auto.from_pretrained(name, peft_config=lora, is_trainable=True, require_v_head=False, dtype=config.torch_dtype)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return tokenizer, model


def main(config: PPOConfig):
    """Train a language model with PPO against a reward. Returns the last update's statistics."""
    out = Path(config.output_dir or Path("runs") / config.exp_name)
    config.output_dir = str(out)
    checkpoint = newest_checkpoint(config.resume_from) if config.resume_from else None
    writable_folder(out, fresh=not checkpoint)
    set_seed(config.seed)  # a fresh adapter is drawn alike on all ranks
    tokenizer, model = load_policy(config)
    if sum(p.numel() for p in model.parameters()) < 10**6:
        torch.set_num_threads(1)  # handing out such small products to threads takes longer than they do
    seq2seq = model.config.is_encoder_decoder
    positions = None if seq2seq else getattr(model.config, "max_position_embeddings", None)
    dataset = load_prompts(config.query_dataset or TOY / "prompts.jsonl", tokenizer, config.max_query_length,
                           positions and positions - config.max_new_tokens, keep_columns=not config.remove_unused_columns)
    trainer = PPOTrainer(config, model, None, tokenizer, dataset)
    main_rank = trainer.accelerator.is_main_process
    reward = load_reward(config.reward_model or TOY / "reward", config.reward_label, trainer.accelerator.device)
    if checkpoint:
        trainer.load_checkpoint(checkpoint)

    def rollout(queries):
        """-> responses, their texts, scores."""
        responses = trainer.generate(queries, batch_size=config.generation_batch_size, return_prompt=False, do_sample=True,
                                     max_new_tokens=config.max_new_tokens)
        text = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)
        answers = [text(r) for r in responses]
        scores = reward([f"{text(q)} {answer}" if seq2seq else text([*q.tolist(), *r.tolist()])
                         for q, r, answer in zip(queries, responses, answers)])
        if config.missing_eos_penalty is not None:
            ends = trainer.end_tokens(trainer.policy.generation_config.eos_token_id)
            scores = [s - config.missing_eos_penalty * (r[-1].item() not in ends) for s, r in zip(scores, responses)]
        return responses, answers, scores

    def show_samples(title):
        """Prints and keeps what the policy answers to the same eight queries."""
        rows = [dataset[i] for i in range(min(8, len(dataset)))]
        _, answers, scores = rollout([torch.tensor(row["input_ids"]) for row in rows])
        if main_rank:
            tqdm.write(f"\n{title}")
            with out.joinpath("samples.jsonl").open("a") as file:
                for row, answer, score in zip(rows, answers, scores):
                    tqdm.write(f"  {score:+6.2f}  {row['query']} |{answer}")
                    file.write(json.dumps({"update": trainer.current_step, "query": row["query"], "response": answer,
                                           "score": score.item()}) + "\n")

    log = MetricsFile(out / "metrics.jsonl", trainer.current_step) if main_rank else None
    if not checkpoint:
        show_samples("before training")
    stats = {}
    bar = tqdm(total=config.total_ppo_epochs, initial=trainer.current_step, unit="update", disable=log is None)
    while trainer.current_step < config.total_ppo_epochs:
        epoch, done = divmod(trainer.current_step, len(trainer.dataloader))
        trainer.dataloader.sampler.set_epoch(epoch)
        for batch in islice(trainer.dataloader, done, None):
            responses, batch["response"], scores = rollout(batch["input_ids"])
            stats = trainer.step(batch["input_ids"], responses, scores)
            trainer.log_stats(stats, batch, scores)
            if log:
                log.write({"update": trainer.current_step, **split_stats(stats)[0]})
                bar.set_postfix(score=f"{stats['objective/scores']:.2f}", kl=f"{stats['objective/kl']:.2f}", refresh=False)
                bar.update()
            if trainer.current_step % config.save_freq == 0:
                trainer.save_checkpoint(out)
            if trainer.current_step >= config.total_ppo_epochs:
                break
    bar.close()
    show_samples("after training")
    trainer.save_pretrained(str(out))
    trainer.accelerator.end_training()
    return stats


if __name__ == "__main__":
    run(main, PPOConfig)
