"""Train a text-to-image model on a reward of its images: denoising diffusion policy optimization.

Papers: Black et al. 2023, "Training Diffusion Models with Reinforcement Learning"
(arXiv:2305.13301), the method; Song et al. 2021, "Denoising Diffusion Implicit Models"
(arXiv:2010.02502), the sampler; Ho & Salimans 2022, "Classifier-Free Diffusion Guidance"
(arXiv:2207.12598), the guidance, which is part of the policy.

Sampling an image is a decision process of T timesteps. In the state (prompt c, latent x_t) the
action is the next latent, drawn from a normal distribution; only the final image is rewarded. So
every timestep has an exact log-probability:

    p(x_{t-1} | x_t, c) = N(mu(x_t, c, t), sigma_t^2 I)

with mu and sigma_t of Song et al., equations 12 and 16. Training minimizes PPO's clipped surrogate
(Black et al.: DDPO_IS, importance sampling with a clip):

    L = mean over samples and timesteps of max(-A rho_t, -A clip(rho_t, 1 - eps, 1 + eps))
    rho_t = p(x_{t-1} | x_t, c) / p_old(x_{t-1} | x_t, c)

The advantage A is the normalized reward. By default the statistics are the batch's; with
pictures_per_prompt > 1, those of the prompt's images in this epoch; with per_prompt_stat_tracking,
those of the prompt's recent rewards. The loss clips A to +-train_adv_clip_max.

Start reading at `DDPOTrainer.step`. Part 1 is the algorithm, Part 2 the machinery around it.

Difference from the papers: log p is the mean, not the sum, over the n elements of a latent. So
rho_t is the n-th root of the paper's ratio, and eps is small.
The API, defaults and metrics follow TRL 0.7.10. Differences:
  1. Gradients are averaged over ranks and statistics see all of them. Each rank samples with a seed
     of its own.
  2. log p is computed in training as in sampling: with the same guidance, without dropout. The
     latents are float32 in every precision, since they would be coarse next to a small sigma_t.
  3. A sigma_t of 0 is replaced by MIN_STD, and the last timestep ends where the scheduler says.
     sample_eta must be above 0.
  4. Weights that train are float32, and so is the VAE. Only what LoRA freezes is in half precision.
  5. A LoRA is saved in the format of `load_lora_weights`, and resumed into the adapter that trains.
  6. Checkpoints hold the complete training state: a resumed run reproduces the uninterrupted one.
  7. Rewards may be integers. One that is not finite raises an error that shows its prompt.

    torchrun ddpo.py                                       one process, the toy pipeline
    torchrun --nproc_per_node 8 ddpo.py --model-name my/model --reward-function mine.py:f
"""
import io
import itertools
import json
import math
import os
import random
import sys
import warnings
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal, Optional

import numpy as np
import torch
import tyro
from accelerate.utils import DistributedType, gather_object
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging

import common
import machinery
from common import TOY, InputError, check_finite, explain, set_seed

verbosity = logging.get_verbosity()
logging.set_verbosity_error()  # importing diffusers warns of torchvision, which is not needed
from diffusers import (  # noqa: E402
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import (  # noqa: E402
    convert_state_dict_to_diffusers,
    convert_unet_state_dict_to_peft,
)
from diffusers.utils.logging import disable_progress_bar  # noqa: E402
from diffusers.utils.torch_utils import randn_tensor  # noqa: E402

logging.set_verbosity(verbosity)

MIN_STD = 0.01  # in place of sigma_t = 0, where log p would be infinite; invisible in an image
JSON = tyro.conf.arg(metavar="JSON", constructor=json.loads)
HIDDEN = tyro.conf.Suppress


# =============================================================================
# Part 1, the algorithm: configuration, mathematics, the policy, the update
# =============================================================================

# ----------------------------------------------------------------------------- configuration
@dataclass
class DDPOConfig:
    """List the settings of DDPO. Sizes are per process; the script has sizes of its own."""

    exp_name: str = field(default_factory=lambda: Path(sys.argv[0]).stem)
    """Name of the experiment: title of the model card, default of run_name."""
    run_name: Optional[str] = ""
    """Name of the run, of its output folder and in wandb. Empty: exp_name."""
    seed: int = 0
    """Seed of a fresh LoRA on all ranks; each rank samples with its own."""
    log_with: Optional[Literal["wandb", "tensorboard"]] = None
    """Tracker in addition to metrics.jsonl; it gets images too."""
    tracker_kwargs: Annotated[dict, JSON] = field(default_factory=dict)
    """Arguments for the tracker's init, such as {"wandb": {"entity": "me"}}."""
    accelerator_kwargs: Annotated[dict, JSON] = field(default_factory=dict)
    """Arguments for accelerate.Accelerator, such as {"cpu": true}."""
    project_kwargs: Annotated[dict, JSON] = field(default_factory=dict)
    """Arguments for ProjectConfiguration; project_dir is short for output_dir."""
    tracker_project_name: str = "trl"
    """Project name for the tracker."""
    logdir: str = "logs"
    """Folder of the tracker's files, inside the output folder."""
    num_epochs: int = 100
    """Epochs; each samples images, scores them and trains on them."""
    save_freq: int = 1
    """Write a checkpoint every this many epochs."""
    num_checkpoint_limit: int = 5
    """Keep this many checkpoints, the newest."""
    mixed_precision: Optional[Literal["no", "fp16", "bf16"]] = "fp16"
    """Precision of the models; fp16 on a CPU means float32. Trained weights stay float32."""
    allow_tf32: bool = True
    """Let GPUs round float32 matrix products to TF32: faster."""
    resume_from: Optional[str] = ""
    """A checkpoint, or the output folder of a killed run (its last checkpoint)."""
    sample_num_steps: int = 50
    """T: denoising timesteps per image."""
    sample_eta: float = 1.0
    """eta: noise of the sampler, at most 1 (DDPM). At 0 there would be no probability."""
    sample_guidance_scale: float = 5.0
    """Guidance scale in sampling and training. 1 or less: no guidance."""
    sample_batch_size: int = 1
    """Images per batch in sampling."""
    sample_num_batches_per_epoch: int = 2
    """Batches that are sampled per epoch."""
    train_batch_size: int = 1
    """Samples per forward and backward pass, each at one timestep."""
    train_use_8bit_adam: bool = False
    """Use bitsandbytes' AdamW with 8-bit states (GPU): less memory."""
    train_learning_rate: float = 3e-4
    """AdamW's learning rate."""
    train_adam_beta1: float = 0.9
    """AdamW's beta1."""
    train_adam_beta2: float = 0.999
    """AdamW's beta2."""
    train_adam_weight_decay: float = 1e-4
    """AdamW's weight decay."""
    train_adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    train_gradient_accumulation_steps: int = 1
    """Minibatches per optimizer step, each with all of its timesteps."""
    train_max_grad_norm: float = 1.0
    """Clip the gradient of each optimizer step to this norm."""
    train_num_inner_epochs: int = 1
    """Passes over each epoch's samples."""
    train_cfg: bool = True
    """Train the guided policy. False: no guidance, in sampling either."""
    train_adv_clip_max: float = 5
    """Clip advantages to plus or minus this."""
    train_clip_range: float = 1e-4
    """eps: the ratio is clipped to [1 - eps, 1 + eps]; small, since log p is a mean."""
    train_timestep_fraction: float = 1.0
    """Fraction of each sample's timesteps to train on, chosen at random."""
    per_prompt_stat_tracking: bool = False
    """Normalize rewards by the recent rewards of their prompt. False: by the batch."""
    per_prompt_stat_tracking_buffer_size: int = 16
    """Number of recent rewards to keep per prompt."""
    per_prompt_stat_tracking_min_count: int = 16
    """Normalize by the batch until a prompt has this many rewards."""
    async_reward_computation: bool = False
    """Score batches in several threads, for rewards that wait for something."""
    max_workers: int = 2
    """Number of threads for async_reward_computation."""
    negative_prompts: Optional[str] = ""
    """One negative prompt for all samples: what images should not show."""

    # the script's own
    model_name: Optional[str] = None
    """Stable Diffusion pipeline: a hub name or a folder. None: the toy pipeline."""
    revision: Optional[str] = None
    """Branch, tag or commit of model_name on the hub. None: main."""
    prompts: Optional[str] = None
    """File, folder or hub name with a column prompt, text or query. None: the toy's."""
    dataset_split: Optional[str] = None
    """Split of the prompts. None: train, or the only one."""
    dataset_config: Optional[str] = None
    """Configuration of a dataset that has several, such as main of gsm8k."""
    pictures_per_prompt: int = 1
    """Images per prompt and epoch; above 1, advantages compare only these images."""
    reward_function: str = "shape_alignment"
    """Name in REWARDS, or file.py:function, called with images, prompts and metadata."""
    output_dir: Optional[str] = None
    """Output folder. None: project_dir of project_kwargs, or runs/<run_name>."""
    bf16: bool = False
    """Compute in bfloat16: short for mixed_precision bf16."""
    use_cpu: bool = False
    """Compute on the CPU even if there is a GPU."""
    lora_r: int = 4
    """Rank of a fresh LoRA adapter on the UNet's attention. 0: train the whole UNet."""
    lora_alpha: int = 4
    """LoRA scale is lora_alpha / lora_r; the script has 16 for the toy."""
    lora_weights: Optional[str] = None
    """LoRA to train further, for load_lora_weights. None: a fresh adapter."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    num_samples: int = 48
    """Images sampled before and after, with the same noise and prompts. 0: none."""
    train_times_per_pass: Annotated[Optional[int], HIDDEN] = None
    """Removed."""

    def __post_init__(self):
        if self.train_times_per_pass is not None:
            raise InputError(f"train_times_per_pass={self.train_times_per_pass}: this option is "
                             "gone; a pass takes one timestep of train_batch_size samples")
        machinery.check_ranges(self, {
            "(0, inf)": ("num_epochs", "save_freq", "num_checkpoint_limit", "sample_num_steps",
                         "sample_batch_size", "sample_num_batches_per_epoch", "train_batch_size",
                         "train_gradient_accumulation_steps", "train_max_grad_norm",
                         "train_num_inner_epochs", "train_adv_clip_max", "train_clip_range",
                         "per_prompt_stat_tracking_buffer_size",
                         "per_prompt_stat_tracking_min_count", "max_workers",
                         "pictures_per_prompt", "lora_alpha"),
            "[0, inf)": ("train_learning_rate", "train_adam_weight_decay", "train_adam_epsilon",
                         "num_samples", "lora_r"),
            "(0, 1]": ("sample_eta", "train_timestep_fraction"),
            "[0, 1)": ("train_adam_beta1", "train_adam_beta2"),
            "(-inf, inf)": ("sample_guidance_scale",),
        })
        machinery.check_choices(self, {"log_with": (None, "wandb", "tensorboard"),
                                       "mixed_precision": (None, "no", "fp16", "bf16")})
        machinery.check_dicts(self, "tracker_kwargs", "accelerator_kwargs", "project_kwargs")
        self.output_dir = self.output_dir or self.project_kwargs.get("project_dir")
        if self.bf16:
            if self.mixed_precision not in ("fp16", "bf16"):  # the default is no contradiction
                raise InputError(f"bf16=True, and mixed_precision={self.mixed_precision!r}: give "
                                 "one of the two")
            self.mixed_precision = "bf16"
        self.check_sizes()
        needs = {"max_workers": "async_reward_computation",
                 "per_prompt_stat_tracking_buffer_size": "per_prompt_stat_tracking",
                 "per_prompt_stat_tracking_min_count": "per_prompt_stat_tracking"}
        defaults = {option.name: option.default for option in fields(self)}
        for name, switch in needs.items():
            if getattr(self, name) != defaults[name] and not getattr(self, switch):
                warnings.warn(f"{name}={getattr(self, name)} has no effect without {switch}",
                              stacklevel=3)

    def check_sizes(self):
        """Raise InputError for sizes that contradict each other."""
        samples = self.sample_batch_size * self.sample_num_batches_per_epoch
        if samples % self.samples_per_step:
            raise InputError(
                f"sample_batch_size x sample_num_batches_per_epoch = {samples} samples per epoch "
                "are not a multiple of train_batch_size x train_gradient_accumulation_steps "
                f"= {self.samples_per_step}: change one of the four")
        if self.sample_num_steps * self.train_timestep_fraction < 1:
            raise InputError(f"train_timestep_fraction={self.train_timestep_fraction}: this is "
                             f"less than one of sample_num_steps={self.sample_num_steps}")
        buffer_size = self.per_prompt_stat_tracking_buffer_size
        min_count = self.per_prompt_stat_tracking_min_count
        if self.per_prompt_stat_tracking and min_count > buffer_size:
            raise InputError(f"per_prompt_stat_tracking_min_count={min_count}: only "
                             f"per_prompt_stat_tracking_buffer_size={buffer_size} rewards are kept "
                             "per prompt; reduce the one or raise the other")
        if samples % self.pictures_per_prompt:
            raise InputError(f"pictures_per_prompt={self.pictures_per_prompt}: it does not divide "
                             f"the {samples} samples per epoch; give a number that does")
        if self.per_prompt_stat_tracking and self.pictures_per_prompt > 1:
            raise InputError(f"pictures_per_prompt={self.pictures_per_prompt} compares the images "
                             "of one prompt in one epoch, per_prompt_stat_tracking over epochs: "
                             "choose one")

    @property
    def samples_per_step(self):
        """Samples per optimizer step."""
        return self.train_batch_size * self.train_gradient_accumulation_steps

    def to_dict(self):
        return asdict(self)


# ----------------------------------------------------------------------------- mathematics
# Symbols in shapes: B samples, T timesteps, [C, h, w] a latent, [H, W] an image, [L, D] the
# embedding of a prompt.
def ddim_mean_std(x_t, output, alpha_t, alpha_prev, eta, prediction_type="epsilon", clip=None,
                  use_clipped_model_output=False):
    """Compute mean [B, C, h, w] and standard deviation [B, 1, 1, 1] of x_{t-1} given x_t.

    In float32. x_t [B, C, h, w]: the latent. output [B, C, h, w]: the model's prediction: the noise
    (epsilon), the clean latent (sample) or v (Salimans & Ho 2022). alpha_t, alpha_prev [B]:
    cumulative alphas at this timestep and after it. clip: clip the clean latent to [-clip, clip].
    use_clipped_model_output: compute the noise again from the clipped latent."""
    x_t, output = x_t.float(), output.float()
    alpha_t = alpha_t.float().view(-1, 1, 1, 1)
    alpha_prev = alpha_prev.float().view(-1, 1, 1, 1)
    signal, noise = alpha_t.sqrt(), (1 - alpha_t).sqrt()  # x_t = signal x_0 + noise epsilon
    if prediction_type == "epsilon":
        x_0 = (x_t - noise * output) / signal                                         # eq. 9
        epsilon = output
    elif prediction_type == "v_prediction":
        x_0 = signal * x_t - noise * output
        epsilon = signal * output + noise * x_t
    else:
        x_0 = output
        epsilon = (x_t - signal * x_0) / noise
    if clip is not None:
        x_0 = x_0.clamp(-clip, clip)
    if use_clipped_model_output:
        epsilon = (x_t - signal * x_0) / noise

    variance = (1 - alpha_prev) / (1 - alpha_t) * (1 - alpha_t / alpha_prev)
    sigma = eta * variance.sqrt()                                                     # eq. 16
    sigma = torch.where(sigma > 0, sigma, MIN_STD)
    direction = (1 - alpha_prev - sigma**2).clamp(min=0).sqrt() * epsilon
    mean = alpha_prev.sqrt() * x_0 + direction                                        # eq. 12
    return mean, sigma


def log_prob(x, mean, std):
    """Compute log N(x; mean, std^2) [B] in float32, averaged over the numbers of a latent.

    x, mean [B, C, h, w]; std [B, 1, 1, 1]."""
    z = (x.float() - mean) / std
    log_density = -0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi)
    return log_density.flatten(1).mean(1)


def guided(negative, positive, scale, rescale=0.0):
    """Compute the guided prediction (Ho & Salimans, eq. 6: w is scale - 1) from two [B, C, h, w].

    rescale: how far its spread returns to the positive prediction's (Lin et al. 2023, eq. 16)."""
    output = negative + scale * (positive - negative)
    if rescale == 0:
        return output
    spread = output.std(dim=(1, 2, 3), keepdim=True)
    positive_spread = positive.std(dim=(1, 2, 3), keepdim=True)
    return rescale * output * positive_spread / spread + (1 - rescale) * output


def policy_loss(ratio, advantages, cliprange):
    """Compute the clipped surrogate, averaged over samples. ratio, advantages [B]."""
    pg_losses = -advantages * ratio
    pg_losses2 = -advantages * torch.clamp(ratio, 1.0 - cliprange, 1.0 + cliprange)
    return torch.max(pg_losses, pg_losses2).mean()


def normalize(rewards):
    """Scale rewards [N] to mean 0 and standard deviation 1. Equal rewards become 0."""
    rewards = np.asarray(rewards, dtype=np.float64)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-8)


def normalize_groups(rewards, size):
    """Normalize each `size` consecutive rewards of [N] by themselves."""
    groups = np.reshape(rewards, (-1, size))
    return np.concatenate([normalize(group) for group in groups])


class PerPromptStatTracker:
    """Normalize rewards by the recent rewards of their prompt (as Black et al. 2023 do)."""

    def __init__(self, buffer_size, min_count):
        self.min_count = min_count
        self.stats = defaultdict(lambda: deque(maxlen=buffer_size))

    def update(self, prompts, rewards):
        """Add the rewards [N] of prompts [N], of all ranks. Returns advantages [N].

        A prompt with fewer than min_count recent rewards is normalized by this batch."""
        rewards = np.asarray(rewards, dtype=np.float64)
        for prompt, reward in zip(prompts, rewards, strict=True):
            self.stats[prompt].append(float(reward))
        advantages = np.zeros(len(rewards))
        for i, prompt in enumerate(prompts):
            recent = self.stats[prompt]
            if len(recent) < self.min_count:
                recent = rewards
            advantages[i] = (rewards[i] - np.mean(recent)) / (np.std(recent) + 1e-6)
        return advantages

    def get_stats(self):
        """Return {prompt: {"mean", "std", "count"}} of the recent rewards."""
        return {prompt: {"mean": np.mean(recent), "std": np.std(recent), "count": len(recent)}
                for prompt, recent in self.stats.items()}


# ----------------------------------------------------------------------------- the policy
@dataclass
class DDPOPipelineOutput:
    """images: in the requested type; latents: T + 1 of [B, C, h, w]; log_probs: T of [B]."""
    images: object
    latents: list
    log_probs: list


@dataclass
class DDPOSchedulerOutput:
    """latents [B, C, h, w] after a timestep, and their log_probs [B]."""
    latents: torch.Tensor
    log_probs: torch.Tensor


class DenoisingPolicy:
    """Sample images with a diffusion model, and compute each timestep's log-probability.

    The parts `unet`, `scheduler`, ... come from DDPOStableDiffusionPipeline, in Part 2."""

    @torch.no_grad()
    def __call__(self, prompt=None, height=None, width=None, num_inference_steps=50,
                 guidance_scale=7.5, negative_prompt="", eta=0.0, generator=None,
                 prompt_embeds=None, negative_prompt_embeds=None, output_type="pil",
                 guidance_rescale=0.0):
        """Sample an image per prompt. Returns a DDPOPipelineOutput.

        prompt: B texts, or None and prompt_embeds [B, L, D] with negative_prompt_embeds [B, L, D]
        or None (no guidance). height, width: in pixels; None: the UNet's own.
        guidance_scale <= 1: no guidance. output_type: "pt" (images [B, 3, H, W] in [0, 1]), "np",
        "pil" or "latent"."""
        if prompt is not None:
            prompt_embeds = self.encode([prompt] if isinstance(prompt, str) else prompt)
            negative_prompt_embeds = self.encode([negative_prompt]).expand_as(prompt_embeds)
        embeds = prompt_embeds
        if guidance_scale > 1 and negative_prompt_embeds is not None:
            embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        # step_distribution reads num_inference_steps from it, here and in learning
        self.scheduler.set_timesteps(num_inference_steps, device=prompt_embeds.device)
        latents = self.initial_noise(prompt_embeds, generator, height, width)     # x_T
        all_latents, log_probs = [latents], []
        for t in self.scheduler.timesteps:
            timestep = t.expand(len(latents))
            output = self.predict(self.unet, latents, timestep, embeds, guidance_scale,
                                  guidance_rescale)
            step = self.scheduler_step(output, timestep, latents, eta, generator=generator)
            latents = step.latents                                                # x_{t-1}
            all_latents.append(latents)
            log_probs.append(step.log_probs)
        return DDPOPipelineOutput(self.decode(latents, output_type), all_latents, log_probs)

    def predict(self, unet, latents, timesteps, embeds, guidance_scale, guidance_rescale=0.0):
        """Return the guided prediction [B, C, h, w] for latents [B, C, h, w] at timesteps [B].

        unet: the UNet or its DDP wrapper. embeds: [2B, L, D], the negative prompts' first, or
        [B, L, D] without guidance."""
        latents = latents.to(embeds.dtype)  # a UNet in half precision takes no float32
        if len(embeds) == len(latents):
            return unet(latents, timesteps, embeds, return_dict=False)[0]
        latents, timesteps = torch.cat([latents] * 2), torch.cat([timesteps] * 2)
        output = unet(latents, timesteps, embeds, return_dict=False)[0]
        negative, positive = output.chunk(2)
        return guided(negative, positive, guidance_scale, guidance_rescale)

    def scheduler_step(self, model_output, timestep, sample, eta=0.0,
                       use_clipped_model_output=False, generator=None, prev_sample=None):
        """Sample the next latent and compute its log-probability. Returns a DDPOSchedulerOutput.

        model_output, sample [B, C, h, w]; timestep [B]. prev_sample [B, C, h, w]: the next latent,
        if it is known and only its log-probability is wanted."""
        timestep = timestep.expand(len(sample))
        mean, std = self.step_distribution(model_output, timestep, sample, eta,
                                           use_clipped_model_output)
        if prev_sample is None:
            prev_sample = mean + std * randn_tensor(mean.shape, generator, mean.device, mean.dtype)
        return DDPOSchedulerOutput(prev_sample, log_prob(prev_sample, mean, std))

    def step_distribution(self, output, timestep, sample, eta, use_clipped_model_output=False):
        """Compute mean and standard deviation of the next latent with the scheduler's alphas.

        timestep [B]; the other arguments and the result as in ddim_mean_std."""
        scheduler, config = self.scheduler, self.scheduler.config
        timestep = timestep.to(sample.device)
        alphas = scheduler.alphas_cumprod.to(sample.device)
        final_alpha = scheduler.final_alpha_cumprod.to(sample.device)
        previous = timestep - config.num_train_timesteps // scheduler.num_inference_steps
        alpha_prev = torch.where(previous >= 0, alphas[previous.clamp(min=0)], final_alpha)
        clip = config.clip_sample_range if config.clip_sample else None
        return ddim_mean_std(sample, output, alphas[timestep], alpha_prev, eta,
                             config.prediction_type, clip, use_clipped_model_output)


# ----------------------------------------------------------------------------- the update
class DDPOTrainer(machinery.LoopTrainer):
    """Train a pipeline on a reward function, with prompts from a prompt function:

        pipeline = DefaultDDPOStableDiffusionPipeline("my/model")
        trainer = DDPOTrainer(DDPOConfig(), reward_function, prompt_function, pipeline)
        trainer.train()

    Call every method on every rank."""

    def step(self, epoch, global_step):
        """Run one epoch. Returns the global step, the number of optimizer steps so far.

        Logs to the tracker and calls the hook. `stats` then holds the epoch's means over all ranks.
        Raises InputError for rewards that are not B finite numbers, or a loss that is not finite.
        """
        config = self.config

        # 1. Sample images, and keep the latents and log-probabilities of all T timesteps
        self.show_phase("sampling")
        # prompt_image_pairs: for the hook, a list [images, prompts, metadata] of each batch
        samples, prompt_image_pairs = self._generate_samples(
            config.sample_num_batches_per_epoch, config.sample_batch_size)
        data = {name: torch.cat([batch[name] for batch in samples]) for name in samples[0]}

        # 2. Reward each image; the lists get the batch's rewards and reward metadata as well
        self.show_phase("scoring")
        rewards = self.compute_rewards(prompt_image_pairs)                       # [B]

        # 3. Advantages, from the rewards of all ranks
        prompts = [prompt for _, texts, *_ in prompt_image_pairs for prompt in texts]
        data["advantages"], all_rewards = self.compute_advantages(prompts, rewards)
        reward_stats = {"reward_mean": float(all_rewards.mean()),
                        "reward_std": float(all_rewards.std())}
        self.accelerator.log({"epoch": epoch, **reward_stats}, step=global_step)
        self.show_images(prompt_image_pairs, global_step)

        # 4. Train in minibatches. A pass takes one timestep of each sample; the gradient of an
        #    optimizer step is the mean over its passes. Until the epoch's first optimizer step
        #    rho_t is 1, up to rounding; after it the clip limits the change
        self.show_phase("learning")
        # the reward function or the hook may have drawn images in another number of timesteps
        self.sd_pipeline.scheduler.set_timesteps(
            config.sample_num_steps, device=self.accelerator.device)
        self.stepper.zero_grad()  # an epoch that raised may have left gradients
        B, T = data["timesteps"].shape
        minibatches = torch.arange(B).split(config.train_batch_size)
        # 100 * 0.29 is 28.999999999999996 in floating point
        trained_timesteps = range(int(T * config.train_timestep_fraction + 1e-9))
        train_stats = []
        for inner_epoch in range(config.train_num_inner_epochs):
            data = self.shuffle(data)
            for i in range(0, len(minibatches), config.train_gradient_accumulation_steps):
                # the minibatches of one optimizer step
                accumulated = minibatches[i:i + config.train_gradient_accumulation_steps]
                # `shuffle` has put a different timestep of each sample in column k
                passes = list(itertools.product(accumulated, trained_timesteps))
                pass_stats = []
                for number, (mb, k) in enumerate(passes, start=1):
                    is_last = number == len(passes)  # DDP averages the ranks' gradients in this one
                    with nullcontext() if is_last else self.accelerator.no_sync(self.unet):
                        loss, approx_kl, clipfrac = self.calculate_loss(
                            data["latents"][mb, k], data["timesteps"][mb, k],
                            data["next_latents"][mb, k], data["log_probs"][mb, k],
                            data["advantages"][mb], self.embeds_of(data, mb))
                        self.accelerator.backward(loss / len(passes))
                    pass_stats.append(torch.stack([loss.detach(), approx_kl, clipfrac]))
                stats = self.mean_stats(pass_stats)
                self.optimizer_step()
                global_step += 1
                epochs = {"epoch": epoch, "inner_epoch": inner_epoch}
                self.accelerator.log({**stats, **epochs}, step=global_step)
                train_stats.append(stats)

        # 5. Statistics of the epoch
        means = {name: float(np.mean([stats[name] for stats in train_stats]))
                 for name in train_stats[0]}
        self.stats = {**reward_stats, **means, "global_step": global_step}
        self.epoch, self.global_step = epoch + 1, global_step
        return global_step

    def _generate_samples(self, iterations, batch_size):
        """Sample batches of images. Returns their tensors, and [images, prompts, metadata] of each.

        The tensors of a batch are a dict: timesteps, log_probs [B, T]; latents, next_latents
        [B, T, C, h, w]; prompt_embeds, negative_prompt_embeds [B, L, D]."""
        pipeline, repeats = self.sd_pipeline, self.config.pictures_per_prompt
        samples, prompt_image_pairs, drawn = [], [], []
        for _ in range(iterations * batch_size // repeats):
            drawn += [self.prompt_fn()] * repeats
        for batch in common.split(drawn, batch_size):
            prompts, metadata = zip(*batch, strict=True)
            output, prompt_embeds = self.sample_images(prompts)
            latents = torch.stack(output.latents, dim=1)                # [B, T + 1, C, h, w]
            samples.append({
                "prompt_embeds": prompt_embeds,
                "negative_prompt_embeds": self.negative_embed.expand_as(prompt_embeds),
                "timesteps": pipeline.scheduler.timesteps.expand(batch_size, -1),
                "latents": latents[:, :-1],                             # x_t
                "next_latents": latents[:, 1:],                         # x_{t-1}
                "log_probs": torch.stack(output.log_probs, dim=1),
            })
            prompt_image_pairs.append([output.images, prompts, metadata])
        return samples, prompt_image_pairs

    def sample_images(self, prompts, generator=None):
        """Sample an image per prompt. Returns a DDPOPipelineOutput and the prompts' embeddings."""
        config = self.config
        with self.accelerator.autocast():
            prompt_embeds = self.sd_pipeline.encode(prompts)
            output = self.sd_pipeline(
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=self.negative_embed.expand_as(prompt_embeds),
                num_inference_steps=config.sample_num_steps, guidance_scale=self.guidance_scale,
                eta=config.sample_eta, generator=generator, output_type="pt")
        return output, prompt_embeds

    def compute_advantages(self, prompts, rewards):
        """Compute the advantages [B] of this rank, and return the rewards of all ranks with them.

        prompts, rewards [B]: this rank's. Another advantage estimator goes here."""
        config = self.config
        gathered = gather_object([(list(prompts), rewards.tolist())])
        all_prompts = [prompt for rank_prompts, _ in gathered for prompt in rank_prompts]
        all_rewards = np.array([reward for _, rank_rewards in gathered for reward in rank_rewards])
        if config.per_prompt_stat_tracking:
            advantages = self.stat_tracker.update(all_prompts, all_rewards)
        elif config.pictures_per_prompt > 1:
            advantages = normalize_groups(all_rewards, config.pictures_per_prompt)
        else:
            advantages = normalize(all_rewards)
        # all ranks have the same number of samples; keep this rank's
        advantages = advantages.reshape(len(gathered), -1)[self.accelerator.process_index]
        advantages = torch.tensor(advantages, dtype=torch.float32, device=self.accelerator.device)
        return advantages, all_rewards

    def shuffle(self, data):
        """Put the samples in a new order, and the timesteps of each sample in an order of its own.

        data: a dict of tensors [B, ...], of which four are [B, T, ...]."""
        B, T = data["timesteps"].shape
        order = torch.randperm(B)
        data = {name: tensor[order] for name, tensor in data.items()}
        times = torch.stack([torch.randperm(T) for _ in range(B)])               # [B, T]
        for name in ("timesteps", "latents", "next_latents", "log_probs"):
            data[name] = data[name][torch.arange(B)[:, None], times]
        return data

    def embeds_of(self, data, mb):
        """Return a minibatch's embeddings for `predict`, the negative prompts' first."""
        if self.guidance_scale <= 1:
            return data["prompt_embeds"][mb]
        return torch.cat([data["negative_prompt_embeds"][mb], data["prompt_embeds"][mb]])

    def calculate_loss(self, latents, timesteps, next_latents, log_probs, advantages, embeds):
        """Compute the loss, the approximate KL, and the fraction of ratios outside the clip range.

        latents, next_latents [B, C, h, w]; timesteps, log_probs (of the old policy), advantages
        [B]; embeds as in `predict`. The scheduler must be set to sample_num_steps timesteps.
        Returns three scalars."""
        config = self.config
        with self.accelerator.autocast():
            output = self.sd_pipeline.predict(
                self.unet, latents, timesteps, embeds, self.guidance_scale)
        mean, std = self.sd_pipeline.step_distribution(
            output, timesteps, latents, config.sample_eta)
        logratios = log_prob(next_latents, mean, std) - log_probs
        ratio = torch.exp(logratios)                                             # rho_t
        loss = self.loss(advantages, config.train_clip_range, ratio)
        with torch.no_grad():
            # TRL's metric, of the mean log p: the KL of a whole latent is far larger
            approx_kl = 0.5 * (logratios**2).mean()
            clipfrac = ((ratio - 1.0).abs() > config.train_clip_range).float().mean()
        return loss, approx_kl, clipfrac

    def loss(self, advantages, clip_range, ratio):
        """Compute the clipped surrogate of clipped advantages. advantages, ratio [B]."""
        limit = self.config.train_adv_clip_max
        return policy_loss(ratio, advantages.clamp(-limit, limit), clip_range)

    def mean_stats(self, pass_stats):
        """Average [loss, approx_kl, clipfrac] over passes and ranks. Returns a dict.

        Raises InputError if the loss is not finite, before a weight moves."""
        means = self.sum_over_ranks(torch.stack(pass_stats).mean(0))
        means = means / self.accelerator.num_processes
        check_finite(means[0], self.epoch, "epochs")
        return dict(zip(("loss", "approx_kl", "clipfrac"), means.tolist(), strict=True))

    def optimizer_step(self):
        """Clip the gradient and step."""
        self.accelerator.clip_grad_norm_(self.unet.parameters(), self.config.train_max_grad_norm)
        self.stepper.step()
        self.stepper.zero_grad()

    # =========================================================================
    # Part 2, the machinery: nothing below is needed to understand the algorithm.
    # =========================================================================

    def __init__(self, config, reward_function, prompt_function, sd_pipeline,
                 image_samples_hook=None):
        """Prepare models and optimizer. Raises ValueError.

        config: a DDPOConfig. sd_pipeline: a DDPOStableDiffusionPipeline.
        reward_function: (images [B, 3, H, W] in [0, 1], prompts, metadata) -> B numbers, or
            (B numbers, anything), of which the second goes to the hook.
        prompt_function: () -> a prompt and its metadata.
        image_samples_hook: called once per epoch on the main rank with a list of [images, prompts,
            metadata, rewards, anything], one per batch, the global step, and the tracker or None.
        """
        if not isinstance(config, DDPOConfig):
            raise ValueError(f"config must be a DDPOConfig, not {type(config).__name__}")
        machinery.setup_ranks()
        set_seed(config.seed)
        self.config, self.sd_pipeline = config, sd_pipeline
        self.reward_fn, self.prompt_fn = reward_function, prompt_function
        self.image_samples_callback = image_samples_hook
        run_name = config.run_name or config.exp_name
        self.output_dir = Path(config.output_dir or Path("runs") / run_name)
        self.make_accelerator()
        self.check_parts()
        self.start_trackers(run_name)

        self.prepare_models()
        self.unet, self.optimizer = self.accelerator.prepare(
            sd_pipeline.unet, self.make_optimizer())
        # accelerate's wrapper searches the disk for packages at each step; it is needed only where
        # it scales gradients
        self.stepper = self.optimizer if self.accelerator.scaler else self.optimizer.optimizer
        self.guidance_scale = config.sample_guidance_scale if config.train_cfg else 1.0
        if config.negative_prompts and self.guidance_scale <= 1:
            warnings.warn("negative_prompts has no effect without guidance", stacklevel=2)
        self.negative_embed = sd_pipeline.encode([config.negative_prompts or ""])  # [1, L, D]
        self.stat_tracker = PerPromptStatTracker(config.per_prompt_stat_tracking_buffer_size,
                                                 config.per_prompt_stat_tracking_min_count)
        self.executor = None
        if config.async_reward_computation:
            self.executor = ThreadPoolExecutor(config.max_workers)

        self.epoch, self.global_step, self.stats, self.bar = 0, 0, {}, None
        total_limit = self.accelerator.project_configuration.total_limit
        self.keep_checkpoints = total_limit or config.num_checkpoint_limit
        self.accelerator.register_for_checkpointing(self)
        self.accelerator.register_save_state_pre_hook(self.save_weights)
        self.accelerator.register_load_state_pre_hook(self.load_weights)
        # the weights are made; from here on each rank draws samples of its own
        set_seed((config.seed + 100_003 * self.accelerator.process_index) % 2**32)
        if config.resume_from:
            self.load_checkpoint(config.resume_from)

    def make_accelerator(self):
        """Make the accelerator, and choose the precision of float32 products on GPUs."""
        config = self.config
        precision = config.mixed_precision or "no"
        if precision == "fp16" and (config.use_cpu or not torch.cuda.is_available()):
            precision = "no"
        project = {"project_dir": str(self.output_dir), "total_limit": config.num_checkpoint_limit,
                   "logging_dir": str(self.output_dir / config.logdir)}
        self.start_accelerator(project, cpu=config.use_cpu, mixed_precision=precision)
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise InputError("FSDP, DeepSpeed: DDPO does not train sharded weights; use plain "
                             "torchrun, and a LoRA with mixed_precision=bf16 for a large model")
        torch.set_float32_matmul_precision("high" if config.allow_tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.allow_tf32

    def check_parts(self):
        """Raise InputError for sizes that do not fit the scheduler or the number of ranks."""
        config = self.config
        schedule = self.sd_pipeline.scheduler.config
        most = schedule.num_train_timesteps - schedule.steps_offset  # the offset shifts all of them
        if config.sample_num_steps > most:
            raise InputError(f"sample_num_steps={config.sample_num_steps}: the scheduler was "
                             f"trained with {schedule.num_train_timesteps} timesteps; give at most "
                             f"{most}")
        samples = config.sample_batch_size * config.sample_num_batches_per_epoch
        if samples * self.accelerator.num_processes == 1 and not config.per_prompt_stat_tracking:
            raise InputError("sample_batch_size x sample_num_batches_per_epoch = 1: one sample per "
                             "epoch has no other to compare with; raise one of the two, or turn "
                             "on per_prompt_stat_tracking")

    def prepare_models(self):
        """Move the models to the device: in float32, or in half precision where LoRA freezes.

        The VAE stays float32: SDXL's overflows in float16, and it runs once per image."""
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}
        frozen = half.get(self.accelerator.mixed_precision, torch.float32)
        pipeline = self.sd_pipeline
        for model in pipeline.models:
            model.to(self.accelerator.device)
            may_round = pipeline.use_lora and model is not pipeline.vae
            for p in model.parameters():
                p.data = p.data.to(frozen if may_round and not p.requires_grad else torch.float32)
        if self.config.gradient_checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
        pipeline.unet.train()  # gradient checkpointing needs it; dropout is off

    first_epoch = property(lambda self: self.epoch)  # TRL 0.7's name: where a resumed run begins

    def make_optimizer(self):
        """Make AdamW for the weights that train."""
        config, settings = self.config, {"fused": True}
        optimizer_class = torch.optim.AdamW
        if config.train_use_8bit_adam:
            with explain("train_use_8bit_adam=True: it needs a GPU and pip install bitsandbytes"):
                from bitsandbytes.optim import AdamW8bit
            optimizer_class, settings = AdamW8bit, {}
        return optimizer_class(
            self.sd_pipeline.get_trainable_layers(), lr=config.train_learning_rate,
            betas=(config.train_adam_beta1, config.train_adam_beta2),
            eps=config.train_adam_epsilon, weight_decay=config.train_adam_weight_decay, **settings)

    def train(self, epochs=None):
        """Train up to epoch number `epochs` (None: config.num_epochs), resumed epochs included.

        Writes metrics.jsonl, one line per epoch, and a checkpoint every save_freq epochs."""
        last = self.config.num_epochs if epochs is None else epochs
        is_main = self.accelerator.is_main_process
        if is_main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            machinery.cut_lines(self.output_dir, self.lines)
        self.lines = {}  # another call continues
        self.bar = machinery.Bar(is_main, "epoch", total=last, initial=self.epoch)
        with self.bar:
            while self.epoch < last:
                self.step(self.epoch, self.global_step)
                if is_main:
                    machinery.append_rows(self.output_dir / "metrics.jsonl",
                                          [{"update": self.epoch, **self.stats}])
                    self.bar.show(self.epoch, reward=f"{self.stats['reward_mean']:.3f}")
                if self.epoch % self.config.save_freq == 0:
                    self.save_checkpoint(self.output_dir, self.epoch)
        self.bar = None

    def compute_rewards(self, prompt_image_pairs):
        """Score batches [images, prompts, metadata]. Returns rewards [B] in float32, on the CPU.

        Each batch's rewards, and what the function returned with them, are appended to the batch.
        Raises InputError for rewards that are not B finite numbers."""
        run = self.executor.map if self.executor else map
        results = run(self.score_batch, prompt_image_pairs)
        for batch, scored in zip(prompt_image_pairs, results, strict=True):
            batch += scored
        return torch.cat([rewards for _, _, _, rewards, _ in prompt_image_pairs])

    def score_batch(self, batch):
        """Score a batch. Returns [rewards [b], what the function returned with them]."""
        images, prompts, metadata = batch
        result = self.reward_fn(images, prompts, metadata)
        rewards, extra = to_floats(result), {}
        if isinstance(result, tuple) and len(result) == 2:
            first = to_floats(result[0])
            if first is not None:  # else a tuple of two rewards
                rewards, extra = first, result[1]
        if rewards is None or len(rewards) != len(prompts):
            given = "no list of numbers" if rewards is None else f"{len(rewards)} rewards"
            raise InputError(f"reward_function returned {given} for {len(prompts)} images: return "
                             "one reward per image")
        for prompt, reward in zip(prompts, rewards, strict=True):
            if not math.isfinite(reward):
                raise InputError(f"reward_function returned for {prompt!r} the reward {reward}: "
                                 "rewards must be finite; check the function")
        return [torch.tensor(rewards), extra]

    # ------------------------------------------------------------------ logging and saving
    def show_images(self, prompt_image_pairs, global_step):
        """Call the hook on the main rank."""
        if self.image_samples_callback is not None and self.accelerator.is_main_process:
            tracker = self.accelerator.trackers[0] if self.accelerator.trackers else None
            self.image_samples_callback(prompt_image_pairs, global_step, tracker)

    def show_phase(self, phase):
        """Name the phase of an epoch in the progress bar."""
        if self.bar is not None:
            self.bar.set_description(phase)

    def create_model_card(self, path, model_name="TRL DDPO Model"):
        """Write README.md into the folder `path`: what the model is and how to load it."""
        config, base = self.config, self.config.model_name or "toy/pipeline"
        load = 'DiffusionPipeline.from_pretrained(".")'
        if self.sd_pipeline.use_lora:
            load = f'DiffusionPipeline.from_pretrained("{base}")\npipeline.load_lora_weights(".")'
        ddim = {name: self.sd_pipeline.scheduler.config[name] for name in STABLE_DIFFUSION_DDIM}
        os.makedirs(path, exist_ok=True)
        Path(path, "README.md").write_text(f"""---
library_name: diffusers
tags: [ddpo, diffusion, reinforcement-learning, text-to-image]
---
# {model_name}

A diffusion model fine-tuned with denoising diffusion policy optimization:
{self.epoch} epochs, {self.global_step} optimizer steps (experiment `{config.exp_name}`, pipeline
`{base}`, prompts `{config.prompts or 'toy/shapes.txt'}`, reward `{config.reward_function}`).

```python
from diffusers import DDIMScheduler, DiffusionPipeline
pipeline = {load}
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **{ddim})
pipeline("a prompt", negative_prompt={(config.negative_prompts or "")!r},
         num_inference_steps={config.sample_num_steps}, eta={config.sample_eta},
         guidance_scale={self.guidance_scale})
```
""")

    def save_pretrained(self, save_directory):
        """Write the LoRA or the pipeline, and a model card. Only the main rank writes."""
        if self.accelerator.is_main_process:
            self.sd_pipeline.save_pretrained(save_directory)
            self.create_model_card(save_directory, self.config.exp_name)

    def save_weights(self, models, weights, folder):
        """Save the weights that train; accelerate would save the frozen ones too."""
        weights.clear()
        if self.accelerator.is_main_process:
            self.sd_pipeline.save_checkpoint(folder)

    def load_weights(self, models, folder):
        models.clear()
        self.sd_pipeline.load_checkpoint(folder)

    def state_dict(self):
        """Return what a checkpoint holds besides weights, optimizer and random state."""
        recent = {prompt: list(rewards) for prompt, rewards in self.stat_tracker.stats.items()}
        return {**super().state_dict(), "epoch": self.epoch, "global_step": self.global_step,
                "rewards": recent}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.epoch, self.global_step = state["epoch"], state["global_step"]
        self.stat_tracker.stats.clear()
        for prompt, rewards in state["rewards"].items():
            self.stat_tracker.stats[prompt].extend(rewards)


def to_floats(rewards):
    """Return the numbers of a list, array or tensor as floats; None for anything else."""
    try:
        return [float(reward) for reward in rewards]
    except (TypeError, ValueError, RuntimeError):
        return None


# ----------------------------------------------------------------------------- the pipeline
# For configurations of schedulers that lack these; with DDIM's own defaults latents are clipped.
STABLE_DIFFUSION_DDIM = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}


def as_ddim(scheduler):
    """Make a DDIMScheduler with the same schedule."""
    config = scheduler.config
    settings = {name: config.get(name, value) for name, value in STABLE_DIFFUSION_DDIM.items()}
    return DDIMScheduler.from_config(config, **settings)


class DDPOStableDiffusionPipeline(DenoisingPolicy):
    """A StableDiffusionPipeline as a policy, whose UNet or LoRA trains.

    For another kind of pipeline override `encode` and `predict`: all embeddings and all calls of
    the UNet go through them."""

    def __init__(self, sd_pipeline, use_lora=True, lora_r=4, lora_alpha=4):
        """Set what trains: a LoRA that the pipeline has loaded, else a fresh one, or the UNet.

        sd_pipeline: a StableDiffusionPipeline; its scheduler becomes DDIM."""
        self.sd_pipeline, self.use_lora = sd_pipeline, use_lora
        sd_pipeline.scheduler = as_ddim(sd_pipeline.scheduler)
        sd_pipeline.vae.enable_slicing()  # decode one image at a time: less memory
        for model in self.models:
            model.requires_grad_(False)
        common.disable_dropout(self.unet)
        has_lora = bool(getattr(self.unet, "peft_config", None))
        if not use_lora:
            if has_lora:
                sd_pipeline.fuse_lora()
                sd_pipeline.unload_lora_weights()
            self.unet.requires_grad_(True)
            return
        if not has_lora:
            self.unet.add_adapter(LoraConfig(
                r=lora_r, lora_alpha=lora_alpha, init_lora_weights="gaussian",
                target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
        (self.adapter,) = self.unet.active_adapters()
        matrices = (f".lora_A.{self.adapter}.", f".lora_B.{self.adapter}.")
        for name, p in self.unet.named_parameters():
            p.requires_grad_(any(matrix in name for matrix in matrices))

    @property
    def models(self):
        """Return the networks of the pipeline, without the safety checker, which is not used."""
        return [part for name, part in self.sd_pipeline.components.items()
                if isinstance(part, torch.nn.Module) and name != "safety_checker"]

    unet = property(lambda self: self.sd_pipeline.unet)
    vae = property(lambda self: self.sd_pipeline.vae)
    text_encoder = property(lambda self: self.sd_pipeline.text_encoder)
    tokenizer = property(lambda self: self.sd_pipeline.tokenizer)
    scheduler = property(lambda self: self.sd_pipeline.scheduler)

    def set_progress_bar_config(self, **kwargs):
        self.sd_pipeline.set_progress_bar_config(**kwargs)

    def get_trainable_layers(self):
        """Return the parameters that train."""
        return [p for p in self.unet.parameters() if p.requires_grad]

    @torch.no_grad()
    def encode(self, prompts):
        """Compute the embeddings [B, L, D] of B prompts."""
        device = self.text_encoder.device
        return self.sd_pipeline.encode_prompt(list(prompts), device, 1, False)[0]

    def initial_noise(self, prompt_embeds, generator, height=None, width=None):
        """Draw the latents x_T [B, C, h, w] in float32. height, width: of the images, in pixels."""
        size, channels = self.unet.config.sample_size, self.unet.config.in_channels
        h, w = (size, size) if isinstance(size, int) else size
        scale = self.sd_pipeline.vae_scale_factor
        h, w = height // scale if height else h, width // scale if width else w
        return randn_tensor((len(prompt_embeds), channels, h, w), generator,
                            prompt_embeds.device, torch.float32)

    def decode(self, latents, output_type):
        """Turn latents [B, C, h, w] into images of this type."""
        if output_type == "latent":
            return latents
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        with torch.autocast(latents.device.type, enabled=False):  # SDXL's VAE overflows in float16
            images = self.vae.decode(latents, return_dict=False)[0]
        return self.sd_pipeline.image_processor.postprocess(images, output_type=output_type)

    def save_pretrained(self, folder):
        """Write the LoRA, for `load_lora_weights`, or the pipeline, for `from_pretrained`."""
        if not self.use_lora:
            self.sd_pipeline.save_pretrained(folder)
            return
        lora = {}
        for name, model in self.sd_pipeline.components.items():
            if getattr(model, "peft_config", None):  # a text encoder may have a part, which is kept
                (adapter,) = model.active_adapters()
                layers = get_peft_model_state_dict(model, adapter_name=adapter)
                lora[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(layers)
                lora[f"{name}_lora_adapter_metadata"] = model.peft_config[adapter].to_dict()
        self.sd_pipeline.save_lora_weights(folder, **lora)

    def save_checkpoint(self, folder):
        """Write the weights that train, without the other parts of the pipeline."""
        if self.use_lora:
            self.save_pretrained(folder)
        else:
            self.unet.save_pretrained(Path(folder, "unet"))

    def load_checkpoint(self, folder):
        """Read the weights of save_checkpoint, a LoRA's into the adapter that trains."""
        if self.use_lora:
            saved, _ = self.sd_pipeline.lora_state_dict(folder)
            layers = {name.removeprefix("unet."): weight for name, weight in saved.items()}
            set_peft_model_state_dict(self.unet, convert_unet_state_dict_to_peft(layers),
                                      adapter_name=self.adapter)
        else:
            saved = UNet2DConditionModel.from_pretrained(Path(folder, "unet"))
            self.unet.load_state_dict(saved.state_dict())


class DefaultDDPOStableDiffusionPipeline(DDPOStableDiffusionPipeline):
    """Load a StableDiffusionPipeline from its hub name or folder, as a policy."""

    def __init__(self, pretrained_model_name, *, pretrained_model_revision="main", use_lora=True,
                 lora_r=4, lora_alpha=4, lora_weights=None):
        """Load the pipeline. Raises InputError.

        lora_weights: a LoRA to train further, as `load_lora_weights` takes it."""
        name, revision = str(pretrained_model_name), pretrained_model_revision
        with explain(f"model_name {name} can't be loaded as a Stable Diffusion pipeline"):
            kind = DiffusionPipeline.load_config(name, revision=revision)["_class_name"]
            if kind != "StableDiffusionPipeline":
                raise InputError(f"model_name {name} is a {kind}: only a StableDiffusionPipeline "
                                 "trains here; docs/ddpo.md says what another one needs")
            pipeline = StableDiffusionPipeline.from_pretrained(name, revision=revision,
                                                               dtype=torch.float32)
        if lora_weights:
            with explain(f"lora_weights {lora_weights} can't be loaded"):
                pipeline.load_lora_weights(lora_weights)
        super().__init__(pipeline, use_lora, lora_r, lora_alpha)


# ----------------------------------------------------------------------------- rewards
def jpeg_incompressibility(images, prompts, metadata):
    """Measure each image as a JPEG file of quality 95, in kB (Black et al. 2023, section 5.1)."""
    sizes = []
    for image in to_pil(images):
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=95)
        sizes.append(file.tell() / 1000)
    return sizes


def jpeg_compressibility(images, prompts, metadata):
    """Measure minus the size in kB of each image as a JPEG file."""
    return [-size for size in jpeg_incompressibility(images, prompts, metadata)]


def shape_alignment(images, prompts, metadata):
    """Measure from 0 to 1 how well each image shows its prompt, such as "a red circle".

    A pixel's paint is its saturation times the likeness of its hue to the color of the prompt. The
    ideal shape, whose circle has a quarter of the image's width as its radius, is centered on the
    paint. The reward is their overlap: the sum of minima over the sum of maxima. images
    [B, 3, H, W] in [0, 1]."""
    rewards = []
    for image, prompt in zip(images.float().cpu(), prompts, strict=True):
        color, shape = color_and_shape(prompt)
        hue, target = image - image.mean(0), color - color.mean(0)
        cosine = (hue * target).sum(0) / (hue.norm(dim=0) * target.norm(dim=0) + 1e-6)
        saturation = image.amax(0) - image.amin(0)
        paint = saturation * cosine.clamp(min=0)                                  # [H, W]
        height, width = paint.shape
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        total = paint.sum() + 1e-6
        center_x, center_y = (paint * x).sum() / total, (paint * y).sum() / total
        ideal = shape((x - center_x) * 4 / width, (y - center_y) * 4 / height).float()
        overlap = torch.minimum(paint, ideal).sum() / torch.maximum(paint, ideal).sum()
        rewards.append(overlap.item())
    return rewards


def color_and_shape(prompt):
    """Find a color [3, 1, 1] and a shape, a function of x and y, in a prompt."""
    colors = [COLORS[word] for word in prompt.split() if word in COLORS]
    shapes = [SHAPES[word] for word in prompt.split() if word in SHAPES]
    if not colors or not shapes:
        raise InputError(f"prompts: shape_alignment can't score {prompt!r}, which needs a color "
                         f"({', '.join(COLORS)}) and a shape ({', '.join(SHAPES)}); choose another "
                         "--reward-function for other prompts")
    return torch.tensor(colors[0]).view(3, 1, 1).float(), shapes[0]


# Return whether (x, y) is inside a shape of area pi, whose center of mass is (0, 0). y grows
# downwards.
def circle(x, y):
    return x**2 + y**2 < 1


def square(x, y):
    return torch.maximum(x.abs(), y.abs()) < math.sqrt(math.pi) / 2


def triangle(x, y):  # equilateral: 0.7776 from the center to a side, 1.5551 to a corner
    return (y < 0.7776) & (math.sqrt(3) * x.abs() < y + 1.5551)


COLORS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
SHAPES = {"circle": circle, "square": square, "triangle": triangle}
REWARDS = {
    "shape_alignment": shape_alignment,                # for the toy's prompts
    "jpeg_compressibility": jpeg_compressibility,
    "jpeg_incompressibility": jpeg_incompressibility,
}


def load_image_reward(name):
    """Load a reward by its name in REWARDS, or file.py:function. Raises InputError."""
    if name in REWARDS:
        return REWARDS[name]
    if not name.rpartition(":")[0].endswith(".py"):
        raise InputError(f"reward_function={name!r}: choose one of {', '.join(REWARDS)}, or give "
                         "file.py:function")
    function = common.load_function("reward_function", name)

    def reward(images, prompts, metadata):
        first = f"{len(prompts)} images, the first for {prompts[0]!r}"
        with explain(f"reward_function {name} failed on {first}"):
            return function(images, prompts, metadata)

    return reward


# ----------------------------------------------------------------------------- the script
def load_image_prompts(name, split=None, config=None):
    """Load prompts as a list of (prompt, its row). Raises InputError."""
    rows = machinery.load_rows(name, split, config)
    column = next((c for c in ("prompt", "text", "query") if c in rows.column_names), None)
    if column is None:
        raise InputError(f"prompts={name}: its columns are {rows.column_names}, and none is "
                         "prompt, text or query; rename the one that holds the prompts")
    for number, row in enumerate(rows):
        if not isinstance(row[column], str) or not row[column].strip():
            raise InputError(f"prompts={name} (row {number}): {column} is empty or not a text; "
                             "remove the row")
    return [(row[column], row) for row in rows]


def to_pil(images):
    """Convert images [B, 3, H, W] in [0, 1] to PIL images."""
    pixels = (images.float().clamp(0, 1) * 255).round().byte()
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def save_grid(images, path, columns=8):
    """Write images [B, 3, H, W] in [0, 1] as one PNG, `columns` per row, small ones enlarged."""
    images = to_pil(images)
    side = max(images[0].width, 96)
    height = math.ceil(len(images) / columns) * side
    grid = Image.new("RGB", (columns * side, height), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        grid.paste(image.resize((side, side), Image.NEAREST), (column * side, row * side))
    grid.save(path)


def log_images(prompt_image_pairs, global_step, tracker):
    """Send the images of an epoch's last batch to the tracker."""
    if tracker is not None:
        images = prompt_image_pairs[-1][0].float().cpu()
        images = images.numpy() if tracker.name == "tensorboard" else to_pil(images)
        tracker.log_images({"samples": images}, step=global_step)


def show_samples(trainer, rows, title):
    """Sample and score images, always for the same prompts from the same noise. Call on one rank.

    Writes <title>.png and samples.jsonl, and prints the mean reward. Of a later call: the mean
    change since the first per image, and its standard error."""
    config, out = trainer.config, Path(trainer.config.output_dir)
    generator = torch.Generator(trainer.accelerator.device).manual_seed(config.seed)
    chosen = [rows[i % len(rows)] for i in range(config.num_samples)]
    batches = []
    for start in range(0, len(chosen), config.sample_batch_size):
        prompts, metadata = zip(*chosen[start:start + config.sample_batch_size], strict=True)
        output, _ = trainer.sample_images(prompts, generator)
        batches.append([output.images, prompts, metadata])
    rewards = trainer.compute_rewards(batches).numpy()
    save_grid(torch.cat([images for images, *_ in batches]), out / f"{title}.png")

    with (out / "samples.jsonl").open("a+") as file:
        file.seek(0)
        samples = [json.loads(line) for line in file]
        for (prompt, _), reward in zip(chosen, rewards.tolist(), strict=True):
            sample = {"epoch": trainer.epoch, "prompt": prompt, "reward": reward}
            file.write(json.dumps(sample) + "\n")
    first = [sample["reward"] for sample in samples if sample["epoch"] == 0]
    text = f"{title} training: mean reward {rewards.mean():.3f} of {len(rewards)} images, "
    text += f"standard deviation {rewards.std():.3f} ({out / title}.png)"
    if len(first) == len(rewards) > 1:
        change = rewards - first
        error = change.std(ddof=1) / math.sqrt(len(change))
        text += f"; mean change {change.mean():+.3f}, standard error {error:.3f}"
    tqdm.write(text)


def main(config: DDPOConfig):
    """Train a text-to-image model with DDPO against a reward of its images.

    Returns the last epoch's statistics."""
    out, checkpoint = machinery.open_run(config.output_dir, config.resume_from,
                                         Path("runs") / (config.run_name or config.exp_name))
    config.output_dir, config.resume_from = str(out), str(checkpoint or "")
    disable_progress_bar()
    rows = load_image_prompts(config.prompts or TOY / "shapes.txt", config.dataset_split,
                              config.dataset_config)
    reward = load_image_reward(config.reward_function)
    set_seed(config.seed)  # a fresh adapter is the same on all ranks
    pipeline = DefaultDDPOStableDiffusionPipeline(
        config.model_name or TOY / "pipeline", pretrained_model_revision=config.revision,
        use_lora=config.lora_r > 0, lora_r=config.lora_r, lora_alpha=config.lora_alpha,
        lora_weights=config.lora_weights)
    machinery.use_few_threads(pipeline.unet)

    def draw_prompt():  # called in training: `trainer` and `numbers` exist by then
        """Draw by seed, rank and number alone: a resumed run continues with the same prompts."""
        key = f"{config.seed} {trainer.accelerator.process_index} {next(numbers)}"
        return random.Random(key).choice(rows)

    trainer = DDPOTrainer(config, reward, draw_prompt, pipeline, log_images)
    images_per_epoch = config.sample_batch_size * config.sample_num_batches_per_epoch
    numbers = itertools.count(trainer.epoch * images_per_epoch // config.pictures_per_prompt)

    has_samples = trainer.accelerator.is_main_process and config.num_samples > 0
    if has_samples and not config.resume_from:
        show_samples(trainer, rows, "before")
    trainer.train()
    if has_samples:
        show_samples(trainer, rows, "after")
    trainer.save_pretrained(str(out))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return trainer.stats


if __name__ == "__main__":
    # what the toy learns from in minutes, and ddpo-pytorch's sizes, which on eight GPUs are the
    # paper's 256 images per epoch: a pass of 4 images of 512 x 512 with a LoRA fits 24 GB
    machinery.run(main, DDPOConfig,
                  toy="--num-epochs 50 --sample-num-steps 20 --sample-batch-size 16 "
                      "--train-batch-size 8 --lora-alpha 16",
                  own="--sample-batch-size 16 --train-batch-size 4 "
                      "--train-gradient-accumulation-steps 2")
