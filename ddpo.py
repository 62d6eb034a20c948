"""Denoising diffusion policy optimisation: a text-to-image model learns to draw what a reward function likes.

Papers: Black et al. 2023, "Training Diffusion Models with Reinforcement Learning" (arXiv:2305.13301), the method;
Song et al. 2021, "Denoising Diffusion Implicit Models" (arXiv:2010.02502), the sampler; Ho & Salimans 2022,
"Classifier-Free Diffusion Guidance" (arXiv:2207.12598), the guidance that is part of the policy.

Drawing a picture is a decision process of T steps: in the state (prompt c, latent x_t) the action is the next latent, drawn
from a normal distribution, and only the finished picture is rewarded. So log-probabilities are exact, step by step:

    p(x_{t-1} | x_t, c) = N(mu(x_t, c, t), sigma_t^2 I)          mu by Song et al., equation 12; sigma_t by equation 16

and the UNet takes a step down PPO's clipped surrogate, on average over samples and times (Black et al., equation 5 with clip)

    L = max(-A rho_t, -A clip(rho_t, 1 - eps, 1 + eps)),         rho_t = p(x_{t-1} | x_t, c) / p_old(x_{t-1} | x_t, c)

where the advantage A is the reward, normalised over the batch or over what the same prompt has earned lately.
Departure from the papers (0.7.10's, whose numbers these are): log p is the mean, not the sum, over a latent's numbers.
Departures from TRL 0.7.10, whose names and arguments these are:
  1. Gradients are averaged over the ranks, statistics are of all of them; each rank samples by a seed of its own.
  2. What is sampled is what is scored: unguided where training is unguided; half-precision latents are rounded first.
  3. sigma_t stays at or above MIN_STD, and the last step goes where the scheduler says. sample_eta must be above 0.
  4. Weights that train are float32; only what LoRA leaves frozen is held in half precision.
  5. A LoRA is saved as `load_lora_weights` takes it, and is resumed into the adapter that trains.
  6. Checkpoints hold all that a run is, so that a killed one goes on to the same numbers.
  7. Only public functions of diffusers are called; rewards may be integers; bad ones are told by name.

    torchrun ddpo.py                                        one process
    torchrun --nproc_per_node 8 ddpo.py --model-name my/stable-diffusion --prompts prompts.txt --reward-function mine.py:f

With nothing but the first command a toy model learns to paint coloured shapes in stronger colours: docs/ddpo.md.
"""
import io
import itertools
import json
import math
import os
import random
import runpy
import shutil
import sys
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Optional

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, gather_object
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging

verbosity = logging.get_verbosity()
logging.set_verbosity_error()  # importing diffusers warns of torchvision, which isn't needed
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from diffusers.utils.logging import disable_progress_bar
from diffusers.utils.torch_utils import randn_tensor
logging.set_verbosity(verbosity)

from common import (TOY, InputError, MetricsFile, check_finite, disable_dropout, explain, load_rows, newest_checkpoint, run, set_seed,
                    setup_ranks, writable_folder)

MIN_STD = 0.01  # of a denoising step: a hundredth of what latents spread, which no eye sees; 0 would make log p infinite
JSON = tyro.conf.arg(metavar="JSON", constructor=json.loads)


# ------------------------------------------------------------------------------------------------ configuration
@dataclass
class DDPOConfig:
    """Sizes are per process. The first part is the documented one, in its order."""

    exp_name: str = field(default_factory=lambda: Path(sys.argv[0]).stem)
    """Name of the experiment: title of the model card and, without a run_name, name of the output folder."""
    run_name: Optional[str] = ""
    """Name of this run: of its output folder and, with wandb, in the tracker. Empty: exp_name."""
    seed: int = 0
    """Fresh LoRA weights, alike on all ranks; rank r samples by a seed of its own."""
    log_with: Optional[Literal["wandb", "tensorboard"]] = None
    """Tracker beside metrics.jsonl; it gets the pictures too."""
    tracker_kwargs: Annotated[dict, JSON] = field(default_factory=dict)
    """Arguments of the tracker's init, such as {"wandb": {"entity": "me"}}."""
    accelerator_kwargs: Annotated[dict, JSON] = field(default_factory=dict)
    """Arguments of accelerate.Accelerator, such as {"cpu": true}."""
    project_kwargs: Annotated[dict, JSON] = field(default_factory=dict)
    """Arguments of accelerate's ProjectConfiguration; its project_dir is where checkpoints go instead of the output folder."""
    tracker_project_name: str = "trl"
    """Project name for the tracker."""
    logdir: str = "logs"
    """Where the tracker writes its files, inside the output folder."""
    num_epochs: int = 100
    """Epochs of the run: in each, pictures are drawn, scored and learnt from."""
    save_freq: int = 1
    """Epochs between two checkpoints."""
    num_checkpoint_limit: int = 5
    """Checkpoints that are kept: the newest ones."""
    mixed_precision: Optional[Literal["no", "fp16", "bf16"]] = "fp16"
    """Arithmetic of the models. Weights that train stay float32. fp16 needs a GPU: on a CPU it means float32."""
    allow_tf32: bool = True
    """GPUs may round float32 matrix products to TF32: faster."""
    resume_from: Optional[str] = ""
    """A checkpoint, or the output folder of a killed run (its last checkpoint)."""
    sample_num_steps: int = 50
    """T: denoising steps of a picture."""
    sample_eta: float = 1.0
    """eta: noise of the sampler, above 0 (a policy must have some) to 1 (DDPM's)."""
    sample_guidance_scale: float = 5.0
    """Weight of the prompt against the negative prompt, in sampling and training. 1 or less: no guidance."""
    sample_batch_size: int = 1
    """Pictures that are drawn at once."""
    sample_num_batches_per_epoch: int = 2
    """Batches that are drawn in an epoch."""
    train_batch_size: int = 1
    """Samples of one forward and backward pass, each at train_times_per_pass of its times."""
    train_use_8bit_adam: bool = False
    """AdamW with 8-bit states, of the package bitsandbytes (GPU): less memory."""
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
    """Minibatches of one optimizer step, each with all of its times."""
    train_max_grad_norm: float = 1.0
    """Gradients longer than this are cut to it."""
    train_num_inner_epochs: int = 1
    """Passes over an epoch's samples."""
    train_cfg: bool = True
    """The policy is the guided UNet. False: unguided, in sampling too, whatever sample_guidance_scale says."""
    train_adv_clip_max: float = 5
    """Advantages are cut to -this .. this."""
    train_clip_range: float = 1e-4
    """eps: the ratio is clipped to 1 - eps .. 1 + eps. (Small: log p is a mean over a latent's numbers.)"""
    train_timestep_fraction: float = 1.0
    """Share of each sample's times that is trained on, drawn at random."""
    per_prompt_stat_tracking: bool = False
    """Normalise a reward by what its own prompt has earned; else by the batch of all ranks."""
    per_prompt_stat_tracking_buffer_size: int = 16
    """Rewards remembered of each prompt."""
    per_prompt_stat_tracking_min_count: int = 16
    """A prompt with fewer remembered rewards is normalised by the batch."""
    async_reward_computation: bool = False
    """Score the batches in threads, several at once: for rewards that wait for something, as for another machine."""
    max_workers: int = 2
    """Threads of async_reward_computation."""
    negative_prompts: Optional[str] = ""
    """What no picture should show: one negative prompt for all samples, as text (commas are part of it)."""

    # the script's own
    model_name: Optional[str] = None
    """A Stable Diffusion pipeline: a hub name or a folder. None: the toy pipeline."""
    prompts: Optional[str] = None
    """Prompts to draw from at random: a .txt/.jsonl/.json/.csv/.parquet file, a folder or a hub name, with a column prompt,
    text or query. None: the toy's."""
    pictures_per_prompt: int = 1
    """Pictures in a row that are drawn for the same prompt; more of them compare like with like."""
    reward_function: str = "shape_alignment"
    """shape_alignment (for the toy's prompts), jpeg_compressibility, jpeg_incompressibility, or file.py:function that takes
    images [B, 3, H, W] in 0..1, prompts and metadata (the rows of the prompts) and returns B numbers."""
    output_dir: Optional[str] = None
    """Where the run's files go. None: runs/<run_name>."""
    use_lora: bool = True
    """Train a LoRA adapter on the UNet's attention. False: train the whole UNet."""
    lora_r: int = 4
    """Rank of a fresh adapter."""
    lora_alpha: int = 16
    """A fresh LoRA's scale is lora_alpha / lora_r. 0.7.10's is 1: right for long runs, and next to nothing in short ones."""
    lora_weights: Optional[str] = None
    """LoRA weights to go on from: a folder or hub name that load_lora_weights takes. None: a fresh adapter."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    train_times_per_pass: Optional[int] = None
    """Times of each sample that go through the UNet at once: the same gradient, faster, more memory. None: 2; for a toy 16."""
    num_samples: int = 48
    """Pictures drawn before and after, with the same seed and prompts. 0: none."""

    def __post_init__(self):
        for name in ("num_epochs", "save_freq", "num_checkpoint_limit", "sample_num_steps", "sample_batch_size", "max_workers",
                     "sample_num_batches_per_epoch", "train_batch_size", "train_gradient_accumulation_steps", "train_num_inner_epochs",
                     "train_max_grad_norm", "train_clip_range", "train_adv_clip_max", "per_prompt_stat_tracking_buffer_size",
                     "per_prompt_stat_tracking_min_count", "pictures_per_prompt", "lora_r", "lora_alpha"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)}: give a number above 0")
        if not 0 < self.sample_eta <= 1:
            raise InputError(f"sample_eta={self.sample_eta}: give a number above 0 and up to 1; without noise a step has no "
                             "probability to learn from")
        if self.per_prompt_stat_tracking and self.per_prompt_stat_tracking_min_count > self.per_prompt_stat_tracking_buffer_size:
            raise InputError(f"per_prompt_stat_tracking_min_count={self.per_prompt_stat_tracking_min_count} rewards of a prompt are never "
                             f"remembered: per_prompt_stat_tracking_buffer_size is {self.per_prompt_stat_tracking_buffer_size}")
        if not 1 <= self.sample_num_steps * self.train_timestep_fraction <= self.sample_num_steps:
            raise InputError(f"train_timestep_fraction={self.train_timestep_fraction}: of {self.sample_num_steps} steps give a share "
                             "of at least one and at most all")
        samples, step = self.sample_batch_size * self.sample_num_batches_per_epoch, self.samples_per_step
        if samples % step:
            raise InputError(f"an epoch's sample_batch_size x sample_num_batches_per_epoch = {samples} samples don't fill whole "
                             f"optimizer steps of train_batch_size x train_gradient_accumulation_steps = {step}: change one")

    @property
    def samples_per_step(self):
        return self.train_batch_size * self.train_gradient_accumulation_steps

    def to_dict(self):
        return asdict(self)


@dataclass
class ScriptConfig(DDPOConfig):
    """DDPOConfig, with what the script does where no flag says otherwise: epochs that a small pipeline learns from."""

    num_epochs: int = 50
    """Epochs of sampling and training."""
    sample_num_steps: int = 20
    """Denoising steps of a picture."""
    sample_batch_size: int = 16
    """Pictures drawn at once, per process."""
    train_batch_size: int = 8
    """Samples of one forward and backward pass, per process."""


# ------------------------------------------------------------------------------------------------ rewards
def jpeg_incompressibility(images, prompts, metadata):
    """Kilobytes of each picture as a JPEG file of quality 95 (Black et al. 2023, section 5.1). images [B, 3, H, W] in 0..1."""
    def kilobytes(image):
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=95)
        return file.tell() / 1000

    return [kilobytes(image) for image in to_pil(images)]


def jpeg_compressibility(images, prompts, metadata):
    """Minus the kilobytes."""
    return [-size for size in jpeg_incompressibility(images, prompts, metadata)]


COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
SHAPES = {  # is a point inside the shape of area pi around its centre of mass? y grows downwards
    "circle": lambda x, y: x**2 + y**2 < 1,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) < math.sqrt(math.pi) / 2,
    "triangle": lambda x, y: (y < 0.7776) & (math.sqrt(3) * x.abs() < y + 1.5551)}


def shape_alignment(images, prompts, metadata):
    """How much of "a red circle" each picture shows, 0 to 1: the overlap of the paint of that colour with that shape.

    Each pixel has so much of the colour: saturation x likeness of hue. The shape, a quarter as wide as the picture, is laid
    over the centre of that paint; overlap is sum of minima / sum of maxima. Pale, misplaced or wrong paint all cost.
    images [B, 3, H, W] in 0..1; prompts with one of COLOURS and one of SHAPES."""
    rewards = []
    for image, prompt in zip(images.float().cpu(), prompts):
        colour, shape = (next((w for w in prompt.split() if w in known), None) for known in (COLOURS, SHAPES))
        if colour is None or shape is None:
            raise InputError(f"shape_alignment can't score the prompt {prompt!r}: it needs a colour ({', '.join(COLOURS)}) and a "
                             f"shape ({', '.join(SHAPES)}); choose another --reward-function for other prompts")
        hue, wanted = (x - x.mean(0) for x in (image, torch.tensor(COLOURS[colour]).view(3, 1, 1).float()))
        likeness = (hue * wanted).sum(0) / (hue.norm(dim=0) * wanted.norm(dim=0) + 1e-6)               # cosine, [H, W]
        paint = (image.amax(0) - image.amin(0)) * likeness.clamp(min=0)
        height, width = paint.shape
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        centre_x, centre_y = ((paint * axis).sum() / (paint.sum() + 1e-6) for axis in (x, y))
        ideal = SHAPES[shape]((x - centre_x) * 4 / width, (y - centre_y) * 4 / height).float()
        rewards.append((torch.minimum(paint, ideal).sum() / torch.maximum(paint, ideal).sum()).item())
    return rewards


REWARDS = {f.__name__: f for f in (shape_alignment, jpeg_compressibility, jpeg_incompressibility)}


# ------------------------------------------------------------------------------------------------ the mathematics
def ddim_mean_std(x_t, output, alpha_t, alpha_prev, eta, prediction_type="epsilon", clip=None, rederive=False):
    """Mean [B, C, H, W] and standard deviation [B, 1, 1, 1] of x_{t-1} given x_t, in float32.

    x_t, output [B, C, H, W]: the latent, and what the model says of it: its noise (epsilon), the clean latent (sample), or v
    (Salimans & Ho 2022). alpha_t, alpha_prev [B]: cumulative alphas now and after the step. clip: the clean latent is cut
    to -clip .. clip; rederive: and the noise told from it anew."""
    x_t, output = x_t.float(), output.float()
    alpha_t, alpha_prev = alpha_t.float().view(-1, 1, 1, 1), alpha_prev.float().view(-1, 1, 1, 1)
    root, noise_root = alpha_t.sqrt(), (1 - alpha_t).sqrt()
    if prediction_type == "epsilon":
        x_0, epsilon = (x_t - noise_root * output) / root, output                             # Song et al., eq. 9
    elif prediction_type == "v_prediction":
        x_0, epsilon = root * x_t - noise_root * output, root * output + noise_root * x_t
    else:
        x_0, epsilon = output, (x_t - root * output) / noise_root
    if clip is not None:
        x_0 = x_0.clamp(-clip, clip)
    if rederive:
        epsilon = (x_t - root * x_0) / noise_root
    sigma = eta * ((1 - alpha_prev) / (1 - alpha_t) * (1 - alpha_t / alpha_prev)).sqrt()      # eq. 16
    sigma = sigma.clamp(min=MIN_STD)
    direction = (1 - alpha_prev - sigma**2).clamp(min=0).sqrt() * epsilon
    return alpha_prev.sqrt() * x_0 + direction, sigma                                         # eq. 12 without its noise


def log_prob(x, mean, std):
    """log N(x; mean, std^2), the mean over a latent's numbers: x, mean [B, C, H, W], std [B, 1, 1, 1] -> [B], float32."""
    z = (x.float() - mean) / std
    return (-0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


def guided(negative, positive, scale, rescale=0.0):
    """eps_neg + scale (eps_pos - eps_neg) (Ho & Salimans, eq. 6), [B, C, H, W]; rescale: how far its spread is drawn back to
    the positive one's (Lin et al. 2023, arXiv:2305.08891, eq. 15 and 16)."""
    output = negative + scale * (positive - negative)
    if rescale == 0:
        return output
    spread = [x.std(dim=(1, 2, 3), keepdim=True) for x in (positive, output)]
    return output * (rescale * spread[0] / spread[1] + 1 - rescale)


def policy_loss(ratio, advantages, cliprange):
    """max(-A rho, -A clip(rho)), the mean over samples: ratio, advantages [B] -> scalar."""
    pg_losses = -advantages * ratio
    pg_losses2 = -advantages * torch.clamp(ratio, 1.0 - cliprange, 1.0 + cliprange)
    return torch.max(pg_losses, pg_losses2).mean()


def normalise(rewards):
    """Rewards [N] -> advantages of mean 0 and standard deviation 1. Equal rewards teach nothing: 0."""
    rewards = np.asarray(rewards, dtype=np.float64)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-8)


def numbers(rewards):
    """A list, array or tensor of numbers, on whatever device -> a list of floats; None for anything else."""
    try:
        return [float(reward) for reward in rewards]
    except (TypeError, ValueError, RuntimeError):
        return None


class PerPromptStatTracker:
    """Advantages by what each prompt has earned lately (Black et al. 2023, section 4.3)."""

    def __init__(self, buffer_size, min_count):
        self.min_count = min_count
        self.stats = defaultdict(lambda: deque(maxlen=buffer_size))

    def update(self, prompts, rewards):
        """Prompts [N] and their rewards [N] (all ranks') -> advantages [N]. A prompt of fewer than min_count remembered
        rewards is measured by this batch."""
        rewards = np.asarray(rewards, dtype=np.float64)
        for prompt, reward in zip(prompts, rewards):
            self.stats[prompt].append(float(reward))
        known = [self.stats[p] if len(self.stats[p]) >= self.min_count else rewards for p in prompts]
        return np.array([(r - np.mean(k)) / (np.std(k) + 1e-6) for r, k in zip(rewards, known)])

    def get_stats(self):
        """{prompt: {"mean", "std", "count"}} of what is remembered."""
        return {p: {"mean": np.mean(k), "std": np.std(k), "count": len(k)} for p, k in self.stats.items()}


def to_pil(images):
    """[B, 3, H, W] in 0..1 -> PIL pictures."""
    pixels = (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


# ------------------------------------------------------------------------------------------------ the pipeline
@dataclass
class DDPOPipelineOutput:
    """images: as asked for; latents: the T + 1 latents [B, C, h, w] on the way; log_probs: of the T steps, [B] each."""
    images: object
    latents: list
    log_probs: list


@dataclass
class DDPOSchedulerOutput:
    """latents [B, C, h, w] after a step, log_probs [B] of having gone there."""
    latents: torch.Tensor
    log_probs: torch.Tensor


class DDPOStableDiffusionPipeline:
    """A StableDiffusionPipeline whose steps have log-probabilities, with the UNet's weights or a LoRA set to train.

    Another kind of pipeline: override `encode` and `predict`, through which all embeddings and UNet calls go."""

    def __init__(self, sd_pipeline, use_lora=True, lora_r=4, lora_alpha=4):
        """sd_pipeline: a StableDiffusionPipeline; a LoRA that it has loaded goes on training. Its scheduler becomes DDIM."""
        self.sd_pipeline, self.use_lora = sd_pipeline, use_lora
        sd_pipeline.scheduler = DDIMScheduler.from_config(sd_pipeline.scheduler.config)
        for part in (sd_pipeline.vae, sd_pipeline.text_encoder, sd_pipeline.unet):
            part.requires_grad_(False)
        disable_dropout(self.unet)
        if not use_lora:
            if getattr(self.unet, "peft_config", None):  # a LoRA that it has loaded goes into the UNet's weights
                sd_pipeline.fuse_lora()
                sd_pipeline.unload_lora_weights()
            self.unet.requires_grad_(True)
            return
        if not getattr(self.unet, "peft_config", None):
            self.unet.add_adapter(LoraConfig(r=lora_r, lora_alpha=lora_alpha, init_lora_weights="gaussian",
                                             target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
        (self.adapter,) = self.unet.active_adapters()
        for name, p in self.unet.named_parameters():
            p.requires_grad_(f".lora_A.{self.adapter}." in name or f".lora_B.{self.adapter}." in name)

    unet = property(lambda self: self.sd_pipeline.unet)
    vae = property(lambda self: self.sd_pipeline.vae)
    text_encoder = property(lambda self: self.sd_pipeline.text_encoder)
    tokenizer = property(lambda self: self.sd_pipeline.tokenizer)
    scheduler = property(lambda self: self.sd_pipeline.scheduler)

    def set_progress_bar_config(self, **kwargs):
        self.sd_pipeline.set_progress_bar_config(**kwargs)

    def get_trainable_layers(self):
        """The parameters that train."""
        return [p for p in self.unet.parameters() if p.requires_grad]

    @torch.no_grad()
    def encode(self, prompts):
        """Texts -> embeddings [B, L, D]."""
        return self.sd_pipeline.encode_prompt(list(prompts), self.text_encoder.device, 1, False)[0]

    def predict(self, unet, latents, timesteps, embeds, guidance_scale, guidance_rescale=0.0):
        """What the model says of latents [B, C, h, w] at timesteps [B] -> [B, C, h, w]. unet: the UNet, or its DDP wrapper;
        embeds: [2B, L, D], the negative prompts' first, for guidance; [B, L, D] without."""
        if len(embeds) == len(latents):
            return unet(latents, timesteps, embeds, return_dict=False)[0]
        output = unet(torch.cat([latents] * 2), torch.cat([timesteps] * 2), embeds, return_dict=False)[0]
        return guided(*output.chunk(2), guidance_scale, guidance_rescale)

    def step_distribution(self, output, timestep, sample, eta, use_clipped_model_output=False):
        """Mean and standard deviation of the next latent, for timesteps [B]; see ddim_mean_std."""
        scheduler = self.scheduler
        alphas, timestep = scheduler.alphas_cumprod.to(sample.device), timestep.to(sample.device)
        previous = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        final = scheduler.final_alpha_cumprod.to(sample.device)
        alpha_prev = torch.where(previous >= 0, alphas[previous.clamp(min=0)], final)
        clip = scheduler.config.clip_sample_range if scheduler.config.clip_sample else None
        return ddim_mean_std(sample, output, alphas[timestep], alpha_prev, eta, scheduler.config.prediction_type, clip,
                             use_clipped_model_output)

    def scheduler_step(self, model_output, timestep, sample, eta=0.0, use_clipped_model_output=False, generator=None,
                       prev_sample=None):
        """One denoising step -> DDPOSchedulerOutput. model_output, sample [B, C, h, w]; timestep [B]; prev_sample: the
        next latent, where it is known already and only its log-probability is asked for."""
        timestep = timestep.expand(len(sample)) if timestep.dim() == 0 else timestep
        mean, std = self.step_distribution(model_output, timestep, sample, eta, use_clipped_model_output)
        if prev_sample is None:
            noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            prev_sample = (mean + std * noise).to(sample.dtype)                # rounded as it is kept, and only then scored
        return DDPOSchedulerOutput(prev_sample, log_prob(prev_sample, mean, std))

    @torch.no_grad()
    def __call__(self, prompt_embeds, negative_prompt_embeds=None, num_inference_steps=50, guidance_scale=5.0, eta=1.0,
                 output_type="pt", guidance_rescale=0.0, generator=None):
        """Draws a picture for each of prompt_embeds [B, L, D] -> DDPOPipelineOutput.

        negative_prompt_embeds [B, L, D] or None; guidance_scale of 1 or less: no guidance. output_type: "pt" (pictures
        [B, 3, H, W] in 0..1), "np", "pil", or "latent"."""
        embeds = prompt_embeds
        if guidance_scale > 1 and negative_prompt_embeds is not None:
            embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        batch, device, size = len(prompt_embeds), prompt_embeds.device, self.unet.config.sample_size
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        height, width = (size, size) if isinstance(size, int) else size
        latents = randn_tensor((batch, self.unet.config.in_channels, height, width), generator=generator, device=device,
                               dtype=prompt_embeds.dtype)
        all_latents, log_probs = [latents], []
        for t in self.scheduler.timesteps:
            timestep = t.expand(batch)
            output = self.predict(self.unet, latents, timestep, embeds, guidance_scale, guidance_rescale)
            step = self.scheduler_step(output, timestep, latents, eta, generator=generator)
            latents = step.latents
            all_latents.append(latents)
            log_probs.append(step.log_probs)
        images = latents
        if output_type != "latent":
            images = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
            images = self.sd_pipeline.image_processor.postprocess(images, output_type=output_type)
        return DDPOPipelineOutput(images, all_latents, log_probs)

    def save_pretrained(self, folder):
        """Writes what was trained: the LoRA, as `load_lora_weights` takes it, or the whole pipeline, for `from_pretrained`."""
        if self.use_lora:
            layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.unet, adapter_name=self.adapter))
            StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers,
                                                      unet_lora_adapter_metadata=self.unet.peft_config[self.adapter].to_dict())
        else:
            self.sd_pipeline.save_pretrained(folder)

    def save_checkpoint(self, folder):
        """Writes the weights that train, as save_pretrained does, but not the parts that never change."""
        self.save_pretrained(folder) if self.use_lora else self.unet.save_pretrained(Path(folder, "unet"))

    def load_checkpoint(self, folder):
        """Reads them back, a LoRA into the adapter that trains."""
        if self.use_lora:
            state, _ = StableDiffusionPipeline.lora_state_dict(folder)
            state = {name.removeprefix("unet."): weight for name, weight in state.items()}
            set_peft_model_state_dict(self.unet, convert_unet_state_dict_to_peft(state), adapter_name=self.adapter)
        else:
            self.unet.load_state_dict(UNet2DConditionModel.from_pretrained(Path(folder, "unet")).state_dict())


class DefaultDDPOStableDiffusionPipeline(DDPOStableDiffusionPipeline):
    """The same from a hub name or folder of any StableDiffusionPipeline."""

    def __init__(self, pretrained_model_name, *, pretrained_model_revision="main", use_lora=True, lora_r=4, lora_alpha=4,
                 lora_weights=None):
        """lora_weights: a LoRA to go on from, as `load_lora_weights` takes it. Raises InputError."""
        name = str(pretrained_model_name)
        with explain(f"model_name {name} can't be loaded as a Stable Diffusion pipeline"):
            kind = DiffusionPipeline.load_config(name, revision=pretrained_model_revision)["_class_name"]
            if kind != "StableDiffusionPipeline":
                raise InputError(f"model_name {name} is a {kind}, and only a StableDiffusionPipeline is trained here: docs/ddpo.md "
                                 "tells what to change for another")
            pipeline = StableDiffusionPipeline.from_pretrained(name, revision=pretrained_model_revision,
                                                               dtype=torch.float32)
        if lora_weights:
            with explain(f"lora_weights {lora_weights} can't be loaded"):
                pipeline.load_lora_weights(lora_weights)
        super().__init__(pipeline, use_lora, lora_r, lora_alpha)


# ------------------------------------------------------------------------------------------------ the trainer
class DDPOTrainer:
    """DDPO that calls your reward function.

        trainer = DDPOTrainer(DDPOConfig(), reward_function, prompt_function, DefaultDDPOStableDiffusionPipeline("my/model"))
        trainer.train()

    Every method is called on every rank. Symbols in shapes: B samples, T denoising steps, [C, h, w] a latent."""

    def __init__(self, config, reward_function, prompt_function, sd_pipeline, image_samples_hook=None):
        """
        config: DDPOConfig. sd_pipeline: DDPOStableDiffusionPipeline. prompt_function: () -> a prompt and its metadata.
        reward_function: (images [B, 3, H, W] in 0..1, prompts, metadata) -> B numbers, or (B numbers, anything), which is
            handed to the hook.
        image_samples_hook: called each epoch on the main rank with a list of [images, prompts, metadata, rewards, anything],
            one for each batch, the global step, and the tracker (None without one).
        Raises InputError for parts that don't go together."""
        if not isinstance(config, DDPOConfig):
            raise ValueError(f"config must be a DDPOConfig, not {type(config).__name__}")
        setup_ranks()
        set_seed(config.seed)
        self.config, self.reward_function, self.prompt_function = config, reward_function, prompt_function
        self.sd_pipeline, self.image_samples_callback = sd_pipeline, image_samples_hook
        self.output_dir = Path(config.output_dir or Path("runs") / (config.run_name or config.exp_name))
        self.accelerator = self._make_accelerator()
        device, ranks = self.accelerator.device, self.accelerator.num_processes
        torch.set_float32_matmul_precision("high" if config.allow_tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.allow_tf32
        if config.sample_batch_size * config.sample_num_batches_per_epoch * ranks < 2 and not config.per_prompt_stat_tracking:
            raise InputError("one sample an epoch has nothing to be better than: raise sample_batch_size or "
                             "sample_num_batches_per_epoch, or turn on per_prompt_stat_tracking")
        frozen = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.accelerator.mixed_precision, torch.float32)
        for part in (sd_pipeline.vae, sd_pipeline.text_encoder, sd_pipeline.unet):
            part.to(device, memory_format=torch.channels_last)  # the order that convolutions are fastest in
            for p in part.parameters():
                p.data = p.data.to(frozen if sd_pipeline.use_lora and not p.requires_grad else torch.float32)
        if config.gradient_checkpointing:
            sd_pipeline.unet.enable_gradient_checkpointing()
        sd_pipeline.unet.train()  # for gradient checkpointing; dropout is off
        self.unet, self.optimizer = self.accelerator.prepare(sd_pipeline.unet, self._make_optimizer())
        # accelerate's wrapper searches the disk for packages at each step; it is needed only where it scales gradients
        self._stepper = self.optimizer if self.accelerator.scaler else self.optimizer.optimizer
        self.guidance_scale = config.sample_guidance_scale if config.train_cfg else 1.0
        self.negative = sd_pipeline.encode([config.negative_prompts or ""])                            # [1, L, D]
        self.stat_tracker = PerPromptStatTracker(config.per_prompt_stat_tracking_buffer_size,
                                                 config.per_prompt_stat_tracking_min_count)
        self.executor = ThreadPoolExecutor(config.max_workers) if config.async_reward_computation else None
        self.epoch, self.global_step, self.stats = 0, 0, {}
        self.accelerator.register_for_checkpointing(self)
        self.accelerator.register_save_state_pre_hook(self._save_weights)
        self.accelerator.register_load_state_pre_hook(self._load_weights)
        set_seed(config.seed + 100_003 * self.accelerator.process_index)  # weights are made: now each rank draws its own
        if config.resume_from:
            self.load_checkpoint(newest_checkpoint(config.resume_from))

    def _make_accelerator(self):
        config, precision = self.config, self.config.mixed_precision or "no"
        if precision == "fp16" and not torch.cuda.is_available():
            precision = "no"
        project = ProjectConfiguration(**{
            "project_dir": str(self.output_dir), "logging_dir": str(self.output_dir / config.logdir),
            "total_limit": config.num_checkpoint_limit, **config.project_kwargs, "automatic_checkpoint_naming": False})
        accelerator = Accelerator(**{"log_with": config.log_with, "project_config": project, "mixed_precision": precision,
                                     **config.accelerator_kwargs})
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise InputError("DDPO samples from whole weights and does not train sharded ones (FSDP, DeepSpeed): run it under plain "
                             "torchrun, a large model with use_lora and mixed_precision=bf16")
        if config.log_with:
            init = {name: dict(kwargs) for name, kwargs in config.tracker_kwargs.items()}
            if config.log_with == "wandb":
                init.setdefault("wandb", {}).setdefault("name", config.run_name or config.exp_name)
            plain = {k: v for k, v in config.to_dict().items() if isinstance(v, (int, float, str, bool))}
            accelerator.init_trackers(config.tracker_project_name, plain, init)
        return accelerator

    def _make_optimizer(self):
        config, kwargs = self.config, {"fused": True}
        kind = torch.optim.AdamW
        if config.train_use_8bit_adam:
            with explain("train_use_8bit_adam needs the package bitsandbytes (pip install bitsandbytes) and a GPU"):
                from bitsandbytes.optim import AdamW8bit
            kind, kwargs = AdamW8bit, {}
        return kind(self.sd_pipeline.get_trainable_layers(), lr=config.train_learning_rate,
                    betas=(config.train_adam_beta1, config.train_adam_beta2), eps=config.train_adam_epsilon,
                    weight_decay=config.train_adam_weight_decay, **kwargs)

    def train(self, epochs=None):
        """Trains until `epochs` epochs (None: config.num_epochs) are done in all, those before a checkpoint included. Writes
        metrics.jsonl, a line an epoch, and every save_freq epochs a checkpoint into the output folder."""
        last = self.config.num_epochs if epochs is None else epochs
        log = None
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            log = MetricsFile(self.output_dir / "metrics.jsonl", self.epoch)
        with tqdm(total=last, initial=self.epoch, unit="epoch", disable=log is None) as bar:
            while self.epoch < last:
                self.step(self.epoch, self.global_step)
                if log:
                    log.write({"update": self.epoch, **self.stats})
                    bar.set_postfix(reward=f"{self.stats['reward_mean']:.3f}", refresh=False)
                    bar.update()
                if self.epoch % self.config.save_freq == 0:
                    self.save_checkpoint(self.accelerator.project_dir)

    # ------------------------------------------------------------------ one epoch
    def step(self, epoch, global_step):
        """Draws an epoch's pictures, scores them and learns from them -> the global step (optimizer steps so far).

        Logs to the tracker and calls the hook; `stats` then has the epoch's means.
        Raises InputError for rewards that are no B finite numbers, and for a loss that is not finite."""
        config = self.config
        samples, pairs = self._generate_samples(config.sample_num_batches_per_epoch, config.sample_batch_size)
        rewards = self.compute_rewards(pairs)
        prompts = [prompt for _, prompts, *_ in pairs for prompt in prompts]
        advantages, all_rewards = self.compute_advantages(prompts, rewards)
        self._tell({"epoch": epoch, "reward_mean": all_rewards.mean(), "reward_std": all_rewards.std()}, global_step)
        self._show(pairs, global_step)

        data = {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
        count, steps = data["timesteps"].shape
        rows, times = torch.arange(count), torch.arange(steps).repeat(count, 1)
        train_stats = []
        for inner_epoch in range(config.train_num_inner_epochs):
            order = torch.randperm(count)                               # samples in a new order, and the times of each
            rows, times = rows[order], times[order]
            times = times.gather(1, torch.stack([torch.randperm(steps) for _ in range(count)]))
            for start in range(0, count, config.samples_per_step):
                part = slice(start, start + config.samples_per_step)
                train_stats.append(self._optimizer_step(data, advantages, rows[part], times[part]))
                global_step += 1
                self._tell({**train_stats[-1], "epoch": epoch, "inner_epoch": inner_epoch}, global_step)
        mean = {name: float(np.mean([s[name] for s in train_stats])) for name in train_stats[0]}
        self.stats = {"reward_mean": float(all_rewards.mean()), "reward_std": float(all_rewards.std()), **mean,
                      "global_step": global_step}
        self.epoch, self.global_step = epoch + 1, global_step
        return global_step

    def draw(self, prompts, generator=None):
        """Pictures of the policy for prompts [B] -> DDPOPipelineOutput, and the prompts' embeddings [B, L, D]."""
        config = self.config
        with self.accelerator.autocast():
            embeds = self.sd_pipeline.encode(prompts)
            output = self.sd_pipeline(embeds, self.negative.expand_as(embeds), config.sample_num_steps, self.guidance_scale,
                                      config.sample_eta, "pt", generator=generator)
        return output, embeds

    def _generate_samples(self, iterations, batch_size):
        """-> samples, a dict for each batch: timesteps and log_probs [B, T], latents and next_latents [B, T, C, h, w],
        prompt_ids, prompt_embeds, negative_prompt_embeds; and [images, prompts, metadata] of each."""
        samples, pairs = [], []
        for _ in range(iterations):
            prompts, metadata = zip(*[self.prompt_function() for _ in range(batch_size)])
            output, embeds = self.draw(prompts)
            latents = torch.stack(output.latents, dim=1)                                              # [B, T + 1, C, h, w]
            ids = self.sd_pipeline.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids
            samples.append({
                "prompt_ids": ids, "prompt_embeds": embeds, "negative_prompt_embeds": self.negative.expand_as(embeds),
                "timesteps": self.sd_pipeline.scheduler.timesteps.expand(batch_size, -1),
                "latents": latents[:, :-1], "next_latents": latents[:, 1:], "log_probs": torch.stack(output.log_probs, dim=1)})
            pairs.append([output.images, prompts, metadata])
        return samples, pairs

    def compute_rewards(self, pairs):
        """Scores batches [images, prompts, metadata] -> rewards [B of all], float32, on the CPU; each batch's rewards and what
        came with them are appended to it. Raises InputError."""
        call = lambda pair: self.reward_function(*pair[:3])
        for pair, result in zip(pairs, self.executor.map(call, pairs) if self.executor else map(call, pairs)):
            many = isinstance(result, tuple) and len(result) == 2 and numbers(result[0]) is not None
            rewards, extra = result if many else (result, {})
            rewards = numbers(rewards)
            if rewards is None or len(rewards) != len(pair[1]):
                given = "no list of numbers" if rewards is None else f"{len(rewards)} rewards"
                raise InputError(f"the reward function returned {given} for {len(pair[1])} pictures: return one for each")
            rewards = torch.tensor(rewards)
            if not torch.isfinite(rewards).all():
                worst = int((~torch.isfinite(rewards)).nonzero()[0])
                raise InputError(f"the reward of the picture for {pair[1][worst]!r} is {rewards[worst].item()}: rewards must be "
                                 "finite; mend the reward function")
            pair += [rewards, extra]
        return torch.cat([pair[3] for pair in pairs])

    def compute_advantages(self, prompts, rewards):
        """Prompts and rewards [B] of this rank -> its advantages [B], and the rewards of all ranks (an array)."""
        gathered = gather_object([(list(prompts), rewards.tolist())])
        all_prompts = [prompt for rank, _ in gathered for prompt in rank]
        all_rewards = np.array([reward for _, rank in gathered for reward in rank])
        advantages = (self.stat_tracker.update(all_prompts, all_rewards) if self.config.per_prompt_stat_tracking
                      else normalise(all_rewards))
        mine = advantages.reshape(len(gathered), -1)[self.accelerator.process_index]
        return torch.as_tensor(mine, dtype=torch.float32, device=self.accelerator.device), all_rewards

    def _optimizer_step(self, data, advantages, rows, times):
        """One optimizer step on the samples `rows` [n], each at its first times of `times` [n, T] -> means of its statistics,
        over all ranks."""
        config = self.config
        trained = int(times.shape[1] * config.train_timestep_fraction)
        passes = [(mb, t)                                          # samples [n], and k of the times of each [k, n]
                  for mb, mb_times in zip(rows.split(config.train_batch_size), times.split(config.train_batch_size))
                  for t in mb_times[:, :trained].T.split(config.train_times_per_pass or 2)]
        read = ["negative_prompt_embeds"] * (self.guidance_scale > 1) + ["prompt_embeds"]
        means = torch.zeros(3, device=advantages.device)                                   # loss, approx_kl, clipfrac
        for i, (mb, t) in enumerate(passes):
            steps = [data[name][mb, t] for name in ("latents", "timesteps", "next_latents", "log_probs")]  # [k, n, ...] each
            embeds = torch.cat([data[name][mb] for name in read])
            repeated = torch.cat([data[name][mb].repeat(len(t), 1, 1) for name in read])
            # ranks exchange gradients once, in the last backward pass
            with nullcontext() if i + 1 == len(passes) else self.accelerator.no_sync(self.unet):
                outputs = self._predict(steps[0].flatten(0, 1), steps[1].flatten(), repeated)
                told = [torch.stack(self.calculate_loss(*step, advantages[mb], embeds, output))
                        for *step, output in zip(*steps, outputs.unflatten(0, t.shape))]
                share = sum(told) * len(mb) / (len(rows) * trained)
                self.accelerator.backward(share[0])
            means += share.detach()
        check_finite(means[0], self.epoch, "epochs")
        self.accelerator.clip_grad_norm_(self.unet.parameters(), config.train_max_grad_norm)
        self._stepper.step()
        self._stepper.zero_grad()
        means = self.accelerator.reduce(means, "mean") if self.accelerator.num_processes > 1 else means
        return dict(zip(("loss", "approx_kl", "clipfrac"), means.tolist()))

    def _predict(self, latents, timesteps, embeds):
        with self.accelerator.autocast():
            return self.sd_pipeline.predict(self.unet, latents, timesteps, embeds, self.guidance_scale)

    def calculate_loss(self, latents, timesteps, next_latents, log_probs, advantages, embeds, output=None):
        """-> loss, approximate KL from the policy that sampled, share of samples where the clip binds (scalars).

        latents, next_latents [B, C, h, w]; timesteps, log_probs (when sampled), advantages [B]; embeds [2B, L, D], the negative
        prompts' first, or [B, L, D] without guidance; output [B, C, h, w]: what the UNet says of it, where it was asked already.
        The scheduler's timesteps must be set, as sampling leaves them."""
        config = self.config
        if output is None:
            output = self._predict(latents, timesteps, embeds)
        mean, std = self.sd_pipeline.step_distribution(output, timesteps, latents, config.sample_eta)
        logratios = log_prob(next_latents, mean, std) - log_probs
        ratio = torch.exp(logratios)                                                                  # rho_t
        loss = self.loss(advantages, config.train_clip_range, ratio)
        with torch.no_grad():
            approx_kl = 0.5 * (logratios**2).mean()
            clipfrac = ((ratio - 1.0).abs() > config.train_clip_range).float().mean()
        return loss, approx_kl, clipfrac

    def loss(self, advantages, clip_range, ratio):
        """See L at the top, with the advantages cut to -train_adv_clip_max .. train_adv_clip_max."""
        limit = self.config.train_adv_clip_max
        return policy_loss(ratio, advantages.clamp(-limit, limit), clip_range)

    # ------------------------------------------------------------------ what is told and kept
    def _tell(self, stats, global_step):
        if self.config.log_with:
            self.accelerator.log(stats, step=global_step)

    def _show(self, pairs, global_step):
        if self.image_samples_callback is not None and self.accelerator.is_main_process:
            tracker = self.accelerator.trackers[0] if self.accelerator.trackers else None
            self.image_samples_callback(pairs, global_step, tracker)

    def create_model_card(self, path, model_name="TRL DDPO Model"):
        """Writes README.md into the folder `path`: what the model is and how to load it."""
        c, base = self.config, self.config.model_name or "toy/pipeline"
        load = (f'StableDiffusionPipeline.from_pretrained("{base}")\npipeline.load_lora_weights(".")' if self.sd_pipeline.use_lora
                else 'StableDiffusionPipeline.from_pretrained(".")')
        os.makedirs(path, exist_ok=True)
        Path(path, "README.md").write_text(f"""---
library_name: diffusers
tags: [ddpo, diffusion, reinforcement-learning, text-to-image]
---
# {model_name}

A diffusion model fine-tuned with denoising diffusion policy optimisation: {self.epoch} epochs, {self.global_step} optimizer steps
(experiment `{c.exp_name}`, pipeline `{base}`, prompts `{c.prompts or 'toy/shapes.txt'}`, reward `{c.reward_function}`).

```python
from diffusers import DDIMScheduler, StableDiffusionPipeline
pipeline = {load}
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
pipeline("a prompt", negative_prompt={c.negative_prompts or ""!r}, num_inference_steps={c.sample_num_steps}, eta={c.sample_eta},
         guidance_scale={self.guidance_scale})
```
""")

    def save_pretrained(self, save_directory):
        """Writes the LoRA or the pipeline, and a model card. Call it on every rank; the main one writes."""
        if self.accelerator.is_main_process:
            self.sd_pipeline.save_pretrained(save_directory)
            self.create_model_card(save_directory, self.config.exp_name)
        self.accelerator.wait_for_everyone()

    def _save_weights(self, models, weights, folder):
        weights.clear()  # accelerate would write all of the UNet, frozen or not
        if self.accelerator.is_main_process:
            self.sd_pipeline.save_checkpoint(folder)

    def _load_weights(self, models, folder):
        models.clear()
        self.sd_pipeline.load_checkpoint(folder)

    def state_dict(self):
        """What a checkpoint holds beside weights, optimizer and random numbers, which accelerate saves."""
        return {"epoch": self.epoch, "global_step": self.global_step,
                "rewards": {prompt: list(rewards) for prompt, rewards in self.stat_tracker.stats.items()}}

    def load_state_dict(self, state):
        self.epoch, self.global_step = state["epoch"], state["global_step"]
        for prompt, rewards in state["rewards"].items():
            self.stat_tracker.stats[prompt].extend(rewards)

    def save_checkpoint(self, folder):
        """Writes folder/checkpoint-<epochs>, aside first and then renamed: a run killed meanwhile still has the one before.
        Called on every rank."""
        final, aside = Path(folder, f"checkpoint-{self.epoch}"), Path(folder, "checkpoint.tmp")
        if self.accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(aside))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            saved = sorted(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
            for old in saved[:-self.accelerator.project_configuration.total_limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load_checkpoint(self, path):
        """Goes on where a checkpoint was written: weights, optimizer, random numbers, epoch, rewards of the prompts. The learning
        rate is config's."""
        self.accelerator.load_state(str(path))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.train_learning_rate


# ------------------------------------------------------------------------------------------------ the script
def load_image_reward(name):
    """A name of REWARDS, or file.py:function -> the function. Raises InputError."""
    file, _, function = name.rpartition(":")
    if not file.endswith(".py"):
        if name not in REWARDS:
            raise InputError(f"reward_function {name!r}: choose {', '.join(REWARDS)}, or give file.py:function")
        return REWARDS[name]
    with explain(f"reward_function {name} can't be loaded"):
        score = runpy.run_path(file)[function]

    def checked(images, prompts, metadata):
        with explain(f"reward_function {name} failed on {len(prompts)} pictures, the first for {prompts[0]!r}"):
            return score(images, prompts, metadata)

    return checked


def load_image_prompts(name):
    """-> a list of (prompt, its row). Raises InputError."""
    rows = load_rows(name)
    column = next((c for c in ("prompt", "text", "query") if c in rows.column_names), None)
    if column is None:
        raise InputError(f"prompts {name} has the columns {rows.column_names} and none of prompt, text, query: rename the one that "
                         "holds the prompts")
    for number, row in enumerate(rows):
        if not isinstance(row[column], str) or not row[column].strip():
            raise InputError(f"prompts {name}, row {number}: {column} is empty or no text; remove the row")
    return [(row[column], row) for row in rows]


def save_grid(images, path, columns=8):
    """Pictures [N, 3, H, W] in 0..1 -> one PNG, `columns` side by side, small ones enlarged."""
    pictures = to_pil(images)
    side = max(pictures[0].width, 96)
    grid = Image.new("RGB", (columns * side, math.ceil(len(pictures) / columns) * side), "white")
    for i, picture in enumerate(pictures):
        grid.paste(picture.resize((side, side), Image.NEAREST), (i % columns * side, i // columns * side))
    grid.save(path)


def log_images(pairs, global_step, tracker):
    """The script's hook: an epoch's last pictures go to the tracker."""
    if tracker is not None:
        images = pairs[-1][0].float().cpu()
        tracker.log_images({"samples": images.numpy() if tracker.name == "tensorboard" else to_pil(images)}, step=global_step)


def main(config: ScriptConfig):
    """Train a text-to-image model with DDPO against a reward of its pictures. Returns the last epoch's statistics."""
    out = Path(config.output_dir or Path("runs") / (config.run_name or config.exp_name))
    config.output_dir = str(out)
    if config.resume_from:
        config.resume_from = str(newest_checkpoint(config.resume_from))
    writable_folder(out, fresh=not config.resume_from)
    disable_progress_bar()
    set_seed(config.seed)  # a fresh adapter is drawn alike on all ranks
    pipeline = DefaultDDPOStableDiffusionPipeline(config.model_name or TOY / "pipeline", use_lora=config.use_lora,
                                                  lora_r=config.lora_r, lora_alpha=config.lora_alpha,
                                                  lora_weights=config.lora_weights)
    if sum(p.numel() for p in pipeline.unet.parameters()) < 10**6:
        torch.set_num_threads(1)  # handing out such small products to threads takes longer than they do
        config.train_times_per_pass = config.train_times_per_pass or 16
    rows, reward = load_image_prompts(config.prompts or TOY / "shapes.txt"), load_image_reward(config.reward_function)

    def next_prompt():
        """Drawn by seed, rank and its number alone: a resumed run asks for the same prompts."""
        number = next(asked) // config.pictures_per_prompt
        return random.Random(f"{config.seed} {trainer.accelerator.process_index} {number}").choice(rows)

    trainer = DDPOTrainer(config, reward, next_prompt, pipeline, log_images)
    asked = itertools.count(trainer.epoch * config.sample_batch_size * config.sample_num_batches_per_epoch)

    def show_samples(title, epoch):
        """Draws, scores and keeps pictures for the first prompts, always from the same random numbers."""
        generator = torch.Generator(trainer.accelerator.device).manual_seed(config.seed)
        chosen = [rows[i % len(rows)] for i in range(config.num_samples)]
        pairs = []
        for i in range(0, len(chosen), config.sample_batch_size):
            prompts, metadata = zip(*chosen[i:i + config.sample_batch_size])
            pairs.append([trainer.draw(prompts, generator)[0].images, prompts, metadata])
        scores = trainer.compute_rewards(pairs)
        save_grid(torch.cat([images for images, *_ in pairs]), out / f"{title}.png")
        with out.joinpath("samples.jsonl").open("a") as file:
            for (prompt, _), score in zip(chosen, scores.tolist()):
                file.write(json.dumps({"epoch": epoch, "prompt": prompt, "reward": score}) + "\n")
        tqdm.write(f"{title} training: reward {scores.mean():.3f} ± {scores.std(correction=0):.3f} in {len(scores)} pictures, "
                   f"{out / title}.png")

    show = trainer.accelerator.is_main_process and config.num_samples > 0
    if show and not config.resume_from:
        show_samples("before", 0)
    trainer.train()
    if show:
        show_samples("after", trainer.epoch)
    trainer.save_pretrained(str(out))
    trainer.accelerator.end_training()
    return trainer.stats


if __name__ == "__main__":
    run(main, ScriptConfig)
