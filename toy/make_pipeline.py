"""Make the diffusion half of the toy world: a text-to-image pipeline small enough to train on one core in four minutes.

    python toy/make_pipeline.py

It draws one coloured shape on white, 32 x 32 pixels, from a prompt such as "a red circle". It has learned from pictures
whose paint is more or less faded, some of them wrongly labelled: so it draws mostly, but not quite, what it is told, and a
reward for strong and right colours and clean outlines has something to raise. The files lie beside this one:

    pipeline/      tokenizer, text encoder, UNet, VAE and scheduler, as StableDiffusionPipeline.from_pretrained loads them
    shapes.txt     the prompts, one a line
"""
import json
import math
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, set_seed

HERE = Path(__file__).parent
SIZE = 32                                   # pixels a side; latents are a quarter of it
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
SHAPES = ("circle", "square", "triangle")
PROMPTS = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
RADIUS = 8                                  # of the circle, in pixels; the others cover the same area
FADED = 0.3                                 # the palest paint: so much of the colour, the rest white
MISTAKEN = 0.1                              # the share of pictures with a prompt drawn at random


# --------------------------------------------------------------------------------------------------- the pictures

def outline(shape, x, y):
    """Is (x, y), in pixels from the shape's centre of mass, inside? Tensors of booleans; y grows downwards."""
    if shape == "circle":
        return x**2 + y**2 < RADIUS**2
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) < RADIUS * math.sqrt(math.pi) / 2
    height = RADIUS * math.sqrt(math.pi * math.sqrt(3))            # of the equilateral triangle of that area
    return (y < height / 3) & (math.sqrt(3) * x.abs() < y + height * 2 / 3)


def draw(prompt, paint=1.0, dx=0.0, dy=0.0):
    """A picture [3, 32, 32] in 0..1. paint: 1 is the full colour, 0 is white; dx, dy: pixels from the middle."""
    _, colour, shape = prompt.split()
    fine = (torch.arange(SIZE * 4) + 0.5) / 4 - SIZE / 2             # four points a pixel each way, for soft edges
    inside = outline(shape, fine[None, :] - dx, fine[:, None] - dy).float()
    inside = F.avg_pool2d(inside[None, None], 4)[0] * paint
    return 1 - inside * (1 - torch.tensor(COLOURS[colour], dtype=torch.float32).view(3, 1, 1))


def draw_many(number):
    """-> prompts, pictures [number, 3, 32, 32] in -1..1, each at a random place and with paint at random."""
    chosen = torch.randint(len(PROMPTS), (number,)).tolist()
    paint, places = FADED + (1 - FADED) * torch.rand(number), torch.rand(number, 2) * 6 - 3
    pictures = [draw(PROMPTS[c], p, *xy) for c, p, xy in zip(chosen, paint, places.tolist())]
    return [PROMPTS[c] for c in chosen], torch.stack(pictures) * 2 - 1


# ------------------------------------------------------------------------------------------------------ the parts

def make_tokenizer(folder):
    """CLIP's byte-level BPE: it can encode any text, and each word of the prompts is one token."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    letters = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(PROMPTS * 10, trainers.BpeTrainer(
        vocab_size=1000, end_of_word_suffix="</w>", show_progress=False, initial_alphabet=sorted(letters)))
    learned = json.loads(bpe.to_str())["model"]
    merges = [" ".join(m) if isinstance(m, list) else m for m in learned["merges"]]
    tokens = sorted(letters) + [letter + "</w>" for letter in sorted(letters)] + [m.replace(" ", "") for m in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary, joined = Path(folder, "vocab.json"), Path(folder, "merges.txt")
    vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    joined.write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer(str(vocabulary), str(joined), model_max_length=8)


def make_parts():
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(folder)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=32, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=SIZE, mid_block_add_attention=False)
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4, block_out_channels=(24, 40), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), mid_block_type=None)
    # Stable Diffusion's own schedule
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)
    return tokenizer, text_encoder, vae, unet, scheduler


# ------------------------------------------------------------------------------------------------------- training

def fit(parameters, loss, steps, lr):
    """AdamW, with a learning rate that falls along a cosine to nothing."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 199:
            print(f"    step {step + 1}: {value.item():.4f}", flush=True)


def train_vae(vae, pictures):
    """Pictures through the bottleneck and back; a little noise on the latents keeps the space between them meaningful."""
    def loss():
        batch = pictures[torch.randint(len(pictures), (32,))]
        latents = vae.encode(batch).latent_dist
        return F.mse_loss(vae.decode(latents.sample()).sample, batch) + 1e-5 * latents.kl().mean()

    fit(vae.parameters(), loss, steps=800, lr=4e-3)


def train_unet(unet, text_encoder, tokenizer, scheduler, latents, prompts):
    """The usual loss: the noise of a noisy latent, told from it, its time and its prompt."""
    ids = tokenizer(PROMPTS + [""], padding="max_length", return_tensors="pt").input_ids
    label = torch.tensor([PROMPTS.index(prompt) for prompt in prompts])

    def loss():
        rows = torch.randint(len(latents), (64,))
        noise, times = torch.randn_like(latents[rows]), torch.randint(scheduler.config.num_train_timesteps, (len(rows),))
        told = torch.where(torch.rand(len(rows)) < MISTAKEN, torch.randint(len(PROMPTS), (len(rows),)), label[rows])
        told = torch.where(torch.rand(len(rows)) < 0.1, len(PROMPTS), told)  # no prompt: for classifier-free guidance
        embeds = text_encoder(ids)[0][told]
        return F.mse_loss(unet(scheduler.add_noise(latents[rows], noise, times), times, embeds).sample, noise)

    fit([*unet.parameters(), *text_encoder.parameters()], loss, steps=2000, lr=2e-3)


def make_pipeline(folder=HERE):
    """Writes pipeline/ and shapes.txt into `folder`."""
    start = time.time()
    set_seed(0)
    torch.set_num_threads(1)                # sums in one order: the same weights again
    tokenizer, text_encoder, vae, unet, scheduler = make_parts()
    prompts, pictures = draw_many(4096)
    train_vae(vae, pictures)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pictures.split(256)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))  # the UNet's latents have a variance of 1
    train_unet(unet, text_encoder, tokenizer, scheduler, latents * vae.config.scaling_factor, prompts)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    pipeline.save_pretrained(Path(folder, "pipeline"))
    Path(folder, "shapes.txt").write_text("\n".join(PROMPTS) + "\n")
    sizes = ", ".join(f"{sum(p.numel() for p in part.parameters())} in the {name}" for name, part in
                      (("UNet", unet), ("VAE", vae), ("text encoder", text_encoder)))
    size = sum(path.stat().st_size for path in Path(folder, "pipeline").rglob("*") if path.is_file())
    print(f"weights: {sizes}; {size / 1e6:.2f} MB, made in {time.time() - start:.0f} s")


if __name__ == "__main__":
    make_pipeline()
