"""Make the toy text-to-image pipeline: small enough to train in four minutes on one CPU core.

    python toy/make_pipeline.py

The pipeline draws one colored shape on white, 32 x 32 pixels, from a prompt such as "a red circle".
In its training images the paint is more or less faded, and some prompts are wrong. So it follows
its prompt mostly, not always. A reward for strong, right colors and clean outlines can improve it.

The script writes next to itself:

    pipeline/      tokenizer, text encoder, UNet, VAE and scheduler, a StableDiffusionPipeline
    shapes.txt     the prompts, one per line
"""
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, set_seed

HERE = Path(__file__).resolve().parent
SIZE = 32  # pixels per side; latents have 8 x 8
COLORS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
SHAPES = ("circle", "square", "triangle")
PROMPTS = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
RADIUS = 8  # of the circle, in pixels; the other shapes have the same area
PALEST = 0.3  # the most faded paint: this much of the color, the rest white
MISLABELED = 0.1  # fraction of training images with a random prompt
UNPROMPTED = 0.1  # fraction of training images without a prompt, for classifier-free guidance


# ----------------------------------------------------------------------------- the images
def is_inside(shape, x, y):
    """Compute which points lie inside a shape (booleans).

    x, y: pixels from the shape's center of mass, tensors that broadcast; y grows downward."""
    if shape == "circle":
        return x**2 + y**2 < RADIUS**2
    if shape == "square":
        side = RADIUS * math.sqrt(math.pi)
        return torch.maximum(x.abs(), y.abs()) < side / 2
    height = RADIUS * math.sqrt(math.pi * math.sqrt(3))  # of an equilateral triangle
    return (y < height / 3) & (math.sqrt(3) * x.abs() < y + height * 2 / 3)


def draw(prompt, paint=1.0, dx=0.0, dy=0.0):
    """Draw an image [3, 32, 32] in 0..1.

    paint: 1 is the full color, 0 is white. dx, dy: pixels from the image's center."""
    _, color, shape = prompt.split()
    fine = (torch.arange(SIZE * 4) + 0.5) / 4 - SIZE / 2  # 4 x 4 points per pixel, for soft edges
    inside = is_inside(shape, fine[None, :] - dx, fine[:, None] - dy).float()
    opacity = F.avg_pool2d(inside[None, None], 4)[0] * paint
    color = torch.tensor(COLORS[color], dtype=torch.float32).view(3, 1, 1)
    return 1 - opacity * (1 - color)


def draw_many(number):
    """Draw images [number, 3, 32, 32] in -1..1, at random places and with random paint.

    Returns their prompts and the images."""
    prompts = [PROMPTS[i] for i in torch.randint(len(PROMPTS), (number,)).tolist()]
    paints = PALEST + (1 - PALEST) * torch.rand(number)
    places = torch.rand(number, 2) * 6 - 3
    images = []
    for prompt, paint, (dx, dy) in zip(prompts, paints, places.tolist(), strict=True):
        images.append(draw(prompt, paint, dx, dy))
    return prompts, torch.stack(images) * 2 - 1


# ----------------------------------------------------------------------------- the parts
def make_tokenizer():
    """Train CLIP's byte-level BPE: it encodes any text, and a word of the prompts is one token."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(PROMPTS * 10, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]

    # CLIP's order of the tokens
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    tokens += [left + right for left, right in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=8)


def make_parts():
    """Make tokenizer, text encoder, VAE, UNet and scheduler, with random weights."""
    tokenizer = make_tokenizer()
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ))
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(24, 40),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type=None,
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=2,
    )
    scheduler = DDIMScheduler(  # Stable Diffusion's own schedule
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return tokenizer, text_encoder, vae, unet, scheduler


# ----------------------------------------------------------------------------- the training
def fit(parameters, compute_loss, steps, lr):
    """Minimize a loss with AdamW, whose learning rate falls to zero along a cosine."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = compute_loss()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"    step {step}: {loss.item():.4f}", flush=True)


def train_vae(vae, images):
    """Train the VAE to reconstruct images [N, 3, 32, 32].

    A small KL term keeps the latents between those of two images meaningful."""
    def compute_loss():
        batch = images[torch.randint(len(images), (32,))]
        latents = vae.encode(batch).latent_dist
        reconstruction = vae.decode(latents.sample()).sample
        return F.mse_loss(reconstruction, batch) + 1e-5 * latents.kl().mean()

    fit(vae.parameters(), compute_loss, steps=800, lr=4e-3)


def train_unet(unet, text_encoder, tokenizer, scheduler, latents, prompts):
    """Train UNet and text encoder to predict the noise in a noisy latent.

    latents [N, 4, 8, 8], of images with these N prompts."""
    ids = tokenizer([*PROMPTS, ""], padding="max_length", return_tensors="pt").input_ids
    labels = torch.tensor([PROMPTS.index(prompt) for prompt in prompts])
    number = 64  # latents per step

    def compute_loss():
        rows = torch.randint(len(latents), (number,))
        noise = torch.randn_like(latents[rows])
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (number,))
        noisy = scheduler.add_noise(latents[rows], noise, timesteps)

        is_mislabeled = torch.rand(number) < MISLABELED
        wrong = torch.randint(len(PROMPTS), (number,))
        label = torch.where(is_mislabeled, wrong, labels[rows])
        is_unprompted = torch.rand(number) < UNPROMPTED
        label = torch.where(is_unprompted, len(PROMPTS), label)  # the last row of ids: no prompt
        embeds = text_encoder(ids)[0][label]
        return F.mse_loss(unet(noisy, timesteps, embeds).sample, noise)

    parameters = [*unet.parameters(), *text_encoder.parameters()]
    fit(parameters, compute_loss, steps=2000, lr=2e-3)


def make_pipeline(folder=HERE):
    """Write pipeline/ and shapes.txt into a folder."""
    start = time.time()
    set_seed(0)
    torch.set_num_threads(1)  # sums in the same order give the same weights
    tokenizer, text_encoder, vae, unet, scheduler = make_parts()
    prompts, images = draw_many(4096)
    train_vae(vae, images)
    with torch.no_grad():
        batches = images.split(256)
        latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in batches])
    scale = round(1 / latents.std().item(), 4)  # the UNet works on latents of variance 1
    vae.register_to_config(scaling_factor=scale)
    train_unet(unet, text_encoder, tokenizer, scheduler, latents * scale, prompts)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(Path(folder, "pipeline"))
    Path(folder, "shapes.txt").write_text("\n".join(PROMPTS) + "\n")

    parts = {"UNet": unet, "VAE": vae, "text encoder": text_encoder}
    counts = [f"{part.num_parameters()} in the {name}" for name, part in parts.items()]
    files = [path for path in Path(folder, "pipeline").rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"parameters: {', '.join(counts)}")
    print(f"{size / 1e6:.2f} MB, made in {time.time() - start:.0f} s")


if __name__ == "__main__":
    make_pipeline()
