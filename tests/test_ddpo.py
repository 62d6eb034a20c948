"""ddpo.py from the formula of one step to whole epochs, on a pipeline of 30,000 weights."""
import copy
import io
import json
import math
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.utils import convert_state_dict_to_diffusers
from huggingface_hub import HfApi
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

import ddpo
from common import TOY, InputError
from ddpo import (
    DDPOConfig,
    DDPOStableDiffusionPipeline,
    DDPOTrainer,
    DefaultDDPOStableDiffusionPipeline,
)

RECORDED = json.loads(Path(__file__).with_name("recorded_ddpo.json").read_text())
PROMPTS = ["a red circle", "a blue square", "a green triangle", "a yellow circle"]
# Far below its epsilon AdamW is gradient descent at learning rate / epsilon.
DESCENT = {"train_adam_beta1": 0.0, "train_adam_epsilon": 1e4, "train_adam_weight_decay": 0.0}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a Stable Diffusion pipeline: latents of 4 x 8 x 8, images of 16 x 16."""
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline(
        tokenizer=CLIPTokenizer.from_pretrained(TOY / "pipeline" / "tokenizer"),
        text_encoder=CLIPTextModel(CLIPTextConfig(
            vocab_size=600, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=1, max_position_embeddings=8, projection_dim=16)),
        vae=AutoencoderKL(
            block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
            norm_num_groups=2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
            sample_size=16),
        unet=UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
            cross_attention_dim=16, attention_head_dim=4, mid_block_type=None, dropout=0.1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def make_pipeline(tiny):
    """make_pipeline(use_lora=False, **changes of the scheduler)"""
    def make(use_lora=False, lora_alpha=4, **scheduler):
        pipeline = DefaultDDPOStableDiffusionPipeline(
            tiny, use_lora=use_lora, lora_alpha=lora_alpha)
        config = {**pipeline.scheduler.config, **scheduler}
        pipeline.sd_pipeline.scheduler = DDIMScheduler.from_config(config)
        return pipeline

    return make


class Recorder(DDPOTrainer):
    """Keeps what each call of calculate_loss was given, and the three numbers that it returned."""

    def __init__(self, *args, **kwargs):
        self.calls = []
        super().__init__(*args, **kwargs)

    def calculate_loss(self, latents, timesteps, next_latents, log_probs, advantages, embeds,
                       *more, **named):
        given = {"latents": latents, "timesteps": timesteps, "next_latents": next_latents,
                 "log_probs": log_probs, "advantages": advantages, "embeds": embeds}
        result = super().calculate_loss(*given.values(), *more, **named)
        kept = {name: value.detach().clone() for name, value in given.items()}
        self.calls.append(SimpleNamespace(**kept, result=[value.item() for value in result]))
        return result


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


@pytest.fixture
def make_trainer(make_pipeline, tmp_path):
    """make_trainer(reward, use_lora=False, hook=None, scheduler={}, lora_alpha=4, kind=Recorder,
    **fields of DDPOConfig): 3 denoising steps of 2 x 2 images, prompts in turn."""
    def make(reward=brightness, use_lora=False, hook=None, scheduler=None, lora_alpha=4,
             kind=Recorder, **fields):
        if scheduler is None:
            scheduler = {}
        config = DDPOConfig(**{
            "sample_num_steps": 3, "sample_batch_size": 2, "train_batch_size": 2,
            "mixed_precision": "no", "save_freq": 1000, "output_dir": str(tmp_path / "out"),
            "train_learning_rate": 1e-3, **fields})
        turn = iter(PROMPTS * 1000)
        pipeline = make_pipeline(use_lora, lora_alpha, **scheduler)
        return kind(config, reward, lambda: (next(turn), {}), pipeline, hook)

    return make


def trained(unet):
    """All weights that train, as one vector."""
    return torch.cat([p.detach().flatten() for p in unet.parameters() if p.requires_grad])


def trained_part(trainer):
    return trained(trainer.sd_pipeline.unet)


def assert_same_move(before, got, want):
    """Two sums of the same float32 numbers in another order differ by about 1e-5 of the move."""
    error, move = (got - want).norm(), (want - before).norm()
    assert move > 0 and error < 1e-3 * move, f"{error / move:.1e} of the move"


def one(*values):
    """Numbers -> tensors [1, 1, 1, 1]."""
    return [torch.tensor(value).view(1, 1, 1, 1) for value in values]


def images_of(pipeline, prompts=PROMPTS, negative="", guidance=5.0, steps=4, eta=1.0, seed=3):
    """Images of a project pipeline for prompts, from a seed."""
    embeds = pipeline.encode(prompts)
    negative = pipeline.encode([negative]).expand_as(embeds)
    return pipeline(prompt_embeds=embeds, negative_prompt_embeds=negative, eta=eta,
                    num_inference_steps=steps, guidance_scale=guidance, output_type="pt",
                    generator=torch.Generator().manual_seed(seed)).images


def images_of_diffusers(pipeline, prompts=PROMPTS, guidance=5.0, steps=4, eta=1.0, seed=3):
    """Images of a plain StableDiffusionPipeline for prompts, from a seed."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompts, num_inference_steps=steps, eta=eta, guidance_scale=guidance,
                    output_type="pt", generator=torch.Generator().manual_seed(seed)).images


# ------------------------------------------------------------------------------- one denoising step
def test_a_denoising_step_worked_by_hand():
    alphas = torch.tensor([0.64]), torch.tensor([0.81])
    mean, std = ddpo.ddim_mean_std(*one(1.0, 0.5), *alphas, eta=1.0)
    # x_0 = (1 - 0.6 x 0.5) / 0.8 = 0.875; sigma^2 = 0.19 / 0.36 x (1 - 0.64 / 0.81) = 0.110768
    assert std.item() == pytest.approx(0.332818, abs=1e-6)
    # 0.9 x 0.875 + sqrt(0.19 - 0.110768) x 0.5
    assert mean.item() == pytest.approx(0.928241, abs=1e-6)


@pytest.mark.parametrize("eta", [0.5, 0.001])
def test_the_noise_is_proportional_to_eta(eta):
    alphas = torch.tensor([0.64]), torch.tensor([0.81])
    std = ddpo.ddim_mean_std(*one(1.0, 0.5), *alphas, eta)[1].item()
    assert std == pytest.approx(0.332818 * eta, rel=1e-5)


@pytest.mark.parametrize("eta", [0.01, 0.5, 1.0])
def test_the_noise_that_is_added_is_missing_from_the_mean(eta):
    """Noise and direction have the variance 1 - alpha together, at an eta near 0 too."""
    alphas = torch.tensor([0.64]), torch.tensor([0.81])
    mean, std = ddpo.ddim_mean_std(*one(1.0, 2.0), *alphas, eta)
    # x_0 = (1 - 0.6 x 2) / 0.8 = -0.25
    want = 0.9 * -0.25 + math.sqrt(0.19 - std.item() ** 2) * 2.0
    assert mean.item() == pytest.approx(want, abs=1e-6)


def test_a_log_probability_worked_by_hand():
    # z = 0.5 and 1.5: -0.125 and -1.125, and -log(0.2) - log(2 pi) / 2 = 1.609438 - 0.918939 each
    x = torch.tensor([0.1, 0.3]).view(1, 2, 1, 1)
    assert ddpo.log_prob(x, *one(0.0, 0.2)).tolist() == pytest.approx([0.065499], abs=1e-6)


def test_a_log_probability_is_torch_s_mean_over_the_latent():
    x, mean, std = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.rand(3, 1, 1, 1) + 0.1
    expected = torch.distributions.Normal(mean, std).log_prob(x).mean(dim=(1, 2, 3))
    torch.testing.assert_close(ddpo.log_prob(x, mean, std), expected)


def test_noise_clean_latent_and_v_describe_the_same_step():
    x_0, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    now, then = torch.tensor([0.3, 0.7]), torch.tensor([0.5, 0.9])
    a = now.view(-1, 1, 1, 1)
    x_t = a.sqrt() * x_0 + (1 - a).sqrt() * noise
    v = a.sqrt() * noise - (1 - a).sqrt() * x_0
    outputs = {"epsilon": noise, "sample": x_0, "v_prediction": v}
    means = [ddpo.ddim_mean_std(x_t, output, now, then, 1.0, kind)[0]
             for kind, output in outputs.items()]
    torch.testing.assert_close(means[0], means[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(means[0], means[2], atol=1e-5, rtol=1e-5)


def test_a_step_that_ends_without_noise_still_has_a_probability():
    alphas = torch.tensor([0.64]), torch.tensor([1.0])
    mean, std = ddpo.ddim_mean_std(*one(1.0, 0.5), *alphas, eta=1.0)
    assert std.item() == pytest.approx(0.01) and mean.item() == pytest.approx(0.875)
    assert torch.isfinite(ddpo.log_prob(mean + std, mean, std)).all()


@pytest.mark.parametrize("schedule", [
    {"steps_offset": 0}, {"steps_offset": 0, "set_alpha_to_one": True}])
def test_a_schedule_that_reaches_time_0_trains_to_finite_weights(schedule, make_trainer):
    trainer = make_trainer(scheduler=schedule)
    trainer.step(0, 0)
    assert torch.isfinite(trained_part(trainer)).all()


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("index", [0, 4, 9], ids=["first", "middle", "last"])
@pytest.mark.parametrize("schedule", [
    {"set_alpha_to_one": True}, {"clip_sample": True, "clip_sample_range": 0.7}])
def test_a_step_without_noise_is_that_of_diffusers(kind, index, schedule, make_pipeline):
    pipeline = make_pipeline(prediction_type=kind, **schedule)
    pipeline.scheduler.set_timesteps(10)
    x, output = torch.randn(2, 1, 4, 8, 8)
    t = pipeline.scheduler.timesteps[index]
    for rederive in (False, True):
        want = pipeline.scheduler.step(output, t, x, eta=0.5, use_clipped_model_output=rederive,
                                       variance_noise=torch.zeros_like(x)).prev_sample
        alphas = pipeline.scheduler.alphas_cumprod
        before = t - 100
        alpha = alphas[before] if before >= 0 else pipeline.scheduler.final_alpha_cumprod
        clip = schedule.get("clip_sample_range")
        mean, std = ddpo.ddim_mean_std(x, output, alphas[t].view(1), alpha.view(1), 0.5, kind,
                                       clip, rederive)
        if alpha < 1:  # else diffusers' sigma is 0, which has no probability
            torch.testing.assert_close(mean, want, atol=1e-5, rtol=1e-5)
        step = pipeline.scheduler_step(output, t, x, 0.5, rederive, prev_sample=x)
        torch.testing.assert_close(step.log_probs, ddpo.log_prob(x, mean, std))


@pytest.mark.parametrize("eta, guidance, spacing", [
    (1.0, 3.0, "leading"), (0.5, 3.0, "trailing"), (0.05, 3.0, "leading"), (1.0, 1.0, "leading")])
def test_images_are_those_of_diffusers_for_the_same_seed(eta, guidance, spacing, make_pipeline,
                                                         tiny):
    pipeline = make_pipeline(timestep_spacing=spacing)
    plain = StableDiffusionPipeline.from_pretrained(tiny)
    plain.scheduler = pipeline.scheduler
    want = images_of_diffusers(plain, guidance=guidance, steps=5, eta=eta)
    got = images_of(pipeline, guidance=guidance, steps=5, eta=eta)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["pt", "np", "pil", "latent"])
def test_the_output_of_the_pipeline_has_every_latent_and_every_log_probability(kind, make_pipeline):
    pipeline = make_pipeline()
    embeds = pipeline.encode(PROMPTS[:2])
    assert embeds.shape == (2, 8, 16)
    output = pipeline(prompt_embeds=embeds, num_inference_steps=5, eta=1.0, output_type=kind)
    assert [x.shape for x in output.latents] == [(2, 4, 8, 8)] * 6
    assert [x.shape for x in output.log_probs] == [(2,)] * 5
    shapes = {"pt": (2, 3, 16, 16), "np": (2, 16, 16, 3), "latent": (2, 4, 8, 8)}
    if kind == "pil":
        assert [image.size for image in output.images] == [(16, 16)] * 2
    else:
        assert tuple(output.images.shape) == shapes[kind]


def test_a_pipeline_draws_texts_as_trl_0_7_10_s_did(make_pipeline, tiny):
    """Its page: pipeline(["squirrel", "crab"]).images[0].save("squirrel.png")"""
    pipeline = make_pipeline()
    plain = StableDiffusionPipeline.from_pretrained(tiny)
    want = images_of_diffusers(plain, PROMPTS[:2], guidance=7.5)
    seed = {"generator": torch.Generator().manual_seed(3), "num_inference_steps": 4}
    got = pipeline(PROMPTS[:2], eta=1.0, output_type="pt", **seed).images
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    seed["generator"].manual_seed(3)
    other = pipeline(PROMPTS[:2], negative_prompt="red", eta=1.0, output_type="pt", **seed).images
    assert (other - want).abs().max() > 1e-3
    (image,) = pipeline("a crab", height=32, width=24, num_inference_steps=1).images
    assert image.size == (24, 32)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_latents_have_the_noise_that_is_scored_in_every_precision(precision, make_trainer):
    """At this eta the last sigma is 0.001, while bfloat16 numbers near 1 are 0.008 apart."""
    trainer = make_trainer(sample_eta=0.05, use_lora=True, mixed_precision=precision)
    trainer.step(0, 0)
    alphas = trainer.sd_pipeline.scheduler.alphas_cumprod
    last = [(call, i) for call in trainer.calls for i in range(2) if call.timesteps[i] == 1]
    assert len(last) == 4
    _, sigma = ddpo.ddim_mean_std(*one(1.0, 0.5), alphas[1:2], alphas[0:1], 0.05)
    sigma = sigma.item()
    assert 0.0009 < sigma < 0.0011
    # log p = -z^2 / 2 - log sigma - log(2 pi) / 2, and z^2 is 1 on average over 4 x 256 numbers
    squares = [-2 * (call.log_probs[i].item() + math.log(sigma) + math.log(2 * math.pi) / 2)
               for call, i in last]
    assert {call.latents.dtype for call in trainer.calls} == {torch.float32}
    assert np.mean(squares) == pytest.approx(1, abs=0.2)  # 4.5 standard deviations of sqrt(2 / n)


def test_guidance_worked_by_hand():
    negative, positive = one(1.0, 3.0)
    got = [ddpo.guided(negative, positive, scale).item() for scale in (0.0, 1.0, 2.5)]
    assert got == [1.0, 3.0, 6.0]


# ----------------------------------------------------------------------------- loss and advantages
@pytest.mark.parametrize("ratio, advantage, loss", [
    (1.0, 2.0, -2.0), (1.3, 2.0, -2.4), (0.7, 2.0, -1.4), (1.3, -2.0, 2.6), (0.7, -2.0, 1.6)])
def test_the_surrogate_is_clipped_only_where_it_would_gain(ratio, advantage, loss):
    got = ddpo.policy_loss(torch.tensor([ratio]), torch.tensor([advantage]), 0.2)
    assert got.item() == pytest.approx(loss)


def test_the_loss_is_a_mean_over_samples():
    got = ddpo.policy_loss(torch.tensor([1.0, 1.3]), torch.tensor([2.0, -2.0]), 0.2)
    assert got.item() == pytest.approx((-2.0 + 2.6) / 2)


@pytest.mark.parametrize("advantage, loss", [(3.0, -0.5), (-3.0, 0.5), (0.2, -0.2), (-0.2, 0.2)])
def test_advantages_are_clipped_on_both_sides(advantage, loss, make_trainer):
    trainer = make_trainer(train_adv_clip_max=0.5)
    got = trainer.loss(torch.tensor([advantage]), 0.1, torch.tensor([1.0]))
    assert got.item() == pytest.approx(loss)


def test_advantages_of_a_batch_have_mean_0_and_spread_1():
    # mean 6, squares 9 + 16 + 4 + 1 = 30, standard deviation sqrt(7.5)
    want = np.array([-3, 4, -2, 1]) / math.sqrt(7.5)
    assert ddpo.normalize([3, 10, 4, 7]).tolist() == pytest.approx(want.tolist())
    assert ddpo.normalize([2.0, 2.0]).tolist() == [0, 0]


def test_integer_rewards_give_fractional_advantages():
    got = ddpo.PerPromptStatTracker(16, 16).update(["a", "b", "a"], np.array([3, 10, 4]))
    assert got.tolist() == pytest.approx([-0.8627, 1.4018, -0.5392], abs=1e-4)


def test_a_prompt_is_compared_with_itself_once_enough_is_remembered():
    tracker = ddpo.PerPromptStatTracker(buffer_size=3, min_count=2)
    first = tracker.update(["a", "b"], [0.0, 4.0])   # one reward each: the batch, mean 2, spread 2
    assert first.tolist() == pytest.approx([-1, 1], abs=1e-5)
    second = tracker.update(["a", "a"], [2.0, 4.0])  # a: 0, 2, 4
    assert second.tolist() == pytest.approx([0, math.sqrt(1.5)], abs=1e-5)
    tracker.update(["a"], [9.0])                     # the buffer forgets the 0
    stats = tracker.get_stats()["a"]
    assert stats == {"mean": 5.0, "std": pytest.approx(np.std([2, 4, 9])), "count": 3}


def test_groups_are_normalized_by_themselves():
    got = ddpo.normalize_groups(np.array([0.9, 0.8, 0.1, 0.2, 3.0, 3.0]), 2)
    assert got.tolist() == pytest.approx([1, -1, -1, 1, 0, 0], abs=1e-5)


def test_a_prompt_is_drawn_once_for_all_of_its_images(make_trainer):
    """Images of a row are compared, not those of a text: rows may differ in other columns."""
    trainer = make_trainer(lambda images, prompts, rows: [row["n"] * images[i].mean().item()
                                                          for i, row in enumerate(rows)],
                           pictures_per_prompt=2, sample_batch_size=1, train_batch_size=1,
                           sample_num_batches_per_epoch=6, train_learning_rate=0.0)
    turn, kept = iter(range(100)), []
    trainer.prompt_fn = lambda: ("a red circle", {"n": 10 ** next(turn)})
    trainer.image_samples_callback = lambda pairs, *args: kept.extend(pairs)
    trainer.step(0, 0)
    assert [metadata[0]["n"] for _, _, metadata, _, _ in kept] == [1, 1, 10, 10, 100, 100]
    advantages = [call.advantages.item() for call in trainer.calls]
    # each of the 6 samples has 3 timesteps; one image of each row is better, and one worse
    assert sorted(advantages) == pytest.approx([-1] * 9 + [1] * 9, abs=1e-4)
    assert next(turn) == 3


@pytest.mark.parametrize("fields, want", [
    ({}, [1.13, 0.85, -0.85, -1.13]),  # an easy prompt's worse image counts as good
    ({"pictures_per_prompt": 2}, [1, -1, 1, -1])])
def test_with_several_images_per_prompt_the_better_one_has_the_advantage(fields, want,
                                                                         make_trainer):
    trainer = make_trainer(**fields)
    rewards = torch.tensor([0.9, 0.8, 0.2, 0.1])
    got, _ = trainer.compute_advantages(["easy"] * 2 + ["hard"] * 2, rewards)
    assert got.tolist() == pytest.approx(want, abs=0.01)


# ------------------------------------------------------------------------- numbers of TRL 0.7.10
def test_the_defaults_are_trl_s():
    config, want = DDPOConfig(), RECORDED["defaults"]["fields"]
    assert {name: getattr(config, name) for name in want} == want


@pytest.mark.parametrize("case", RECORDED["scheduler_step"], ids=lambda case: case["name"])
def test_recorded_steps(case, make_pipeline):
    pipeline = make_pipeline(**case["scheduler"])
    pipeline.scheduler.set_timesteps(case["num_inference_steps"])
    names = "model_output", "sample", "prev_sample"
    tensors = {name: torch.tensor(case[name]) for name in names}
    for t, want in zip(case["timesteps"], case["log_probs"], strict=True):
        got = pipeline.scheduler_step(timestep=torch.tensor(t), **tensors, **case["kwargs"])
        assert got.log_probs.tolist() == pytest.approx(want, rel=1e-4)


def test_recorded_losses(make_trainer):
    trainer = make_trainer()
    for case in RECORDED["loss"]:
        advantages, clip_range, ratio = case["args"]
        got = trainer.loss(torch.tensor(advantages), clip_range, torch.tensor(ratio))
        assert got.item() == pytest.approx(case["loss"], rel=1e-5)


@pytest.mark.parametrize("case", RECORDED["trackers"], ids=lambda case: str(case["init"]))
def test_recorded_advantages(case):
    tracker = ddpo.PerPromptStatTracker(*case["init"])
    for (prompts, rewards), want in zip(case["updates"], case["advantages"], strict=True):
        got = tracker.update(prompts, rewards)
        assert got.tolist() == pytest.approx(want, rel=1e-4, abs=1e-5)
    for prompt, want in case["stats"].items():
        assert tracker.get_stats()[prompt] == pytest.approx(want, rel=1e-5)


# ----------------------------------------------------------------------------------------- rewards
def shape(prompt, paint=1.0, dx=0.0, dy=0.0, size=32):
    """An image of a shape a quarter as wide as the image, on white."""
    _, colour, shape = prompt.split()
    axis = (torch.arange(size) + 0.5) * 4 / size - 2
    inside = ddpo.SHAPES[shape](axis[None, :] - dx, axis[:, None] - dy).float() * paint
    return 1 - inside * (1 - torch.tensor(ddpo.COLORS[colour]).float().view(3, 1, 1))


def align(image, prompt):
    return ddpo.shape_alignment(image[None], [prompt], [{}])[0]


ALL = [f"a {colour} {shape}" for colour in ddpo.COLORS for shape in ddpo.SHAPES]


@pytest.mark.parametrize("prompt", ALL)
def test_alignment_is_best_for_what_the_prompt_says(prompt):
    scores = {other: align(shape(other, dx=0.3, dy=-0.2), prompt) for other in ALL}
    assert scores.pop(prompt) > 0.9 and max(scores.values()) < 0.85


@pytest.mark.parametrize("image, score", [
    (shape("a red circle"), 1.0), (shape("a red circle", paint=0.5), 0.5),  # half the saturation
    (shape("a yellow circle"), 0.5),                      # red and yellow: the cosine of hue is 0.5
    (shape("a blue circle"), 0.0), (torch.ones(3, 32, 32), 0.0),
    (torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 32, 48), math.pi / 16)],  # paint everywhere
    ids=["red", "pale red", "yellow", "blue", "white", "red all over"])
def test_alignment_worked_by_hand(image, score):
    # 32 x 32 pixels draw a circle of area pi x 8^2 to 3 %; without noise only that is uncertain
    assert align(image, "a red circle") == pytest.approx(score, rel=0.03, abs=1e-3)


def test_alignment_falls_with_a_second_patch_of_paint():
    clean = shape("a red circle")
    dirty = clean.clone()
    dirty[1:, :6, :6] = 0
    assert align(clean, "a red circle") > align(dirty, "a red circle") + 0.1


@pytest.mark.parametrize("prompt", ["a purple circle", "a red house", "red"])
def test_alignment_refuses_prompts_that_it_cannot_score(prompt):
    with pytest.raises(InputError, match=f"'{prompt}'"):
        align(torch.ones(3, 32, 32), prompt)


def test_jpeg_rewards_are_kilobytes_of_the_file():
    images = torch.stack([torch.ones(3, 32, 32), shape("a red circle"), torch.rand(3, 32, 32)])
    want = []
    for image in images:
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="JPEG", quality=95)
        want.append(len(file.getvalue()) / 1000)
    assert ddpo.REWARDS["jpeg_incompressibility"](images, None, None) == pytest.approx(want)
    want = [-size for size in want]
    assert ddpo.REWARDS["jpeg_compressibility"](images, None, None) == pytest.approx(want)


def made_up_pairs(batches=1, size=2):
    """[images, prompts, metadata] of each batch, the brightness of the images rising."""
    level = torch.arange(batches * size).view(batches, size, 1, 1, 1) / 10
    return [[x.expand(size, 3, 16, 16), tuple(PROMPTS[:size]), ({},) * size] for x in level]


@pytest.mark.parametrize("form", [
    lambda x: x, lambda x: (x, {"why": 1}), lambda x: x.numpy(), lambda x: x.tolist(),
    lambda x: (x.tolist(), None), lambda x: list(x), lambda x: x[:, None], lambda x: x.long(),
    lambda x: [r.requires_grad_() for r in x], lambda x: tuple(x.tolist())],
    ids=["tensor", "pair", "array", "list", "list and nothing", "list of tensors", "column",
         "integers", "with a graph", "tuple"])
def test_rewards_may_have_any_form(form, make_trainer):
    trainer = make_trainer(lambda images, prompts, metadata: form(torch.arange(2.0) + 1))
    assert trainer.compute_rewards(made_up_pairs()).tolist() == [1, 2]


@pytest.mark.parametrize("reward, words", [
    (lambda n: [1.0] * (n - 1), "1 rewards.* 2 "), (lambda n: [1.0] * (n + 1), "3 rewards.* 2 "),
    (lambda n: 0.5, "reward"), (lambda n: "good", "reward"),
    (lambda n: [1.0, float("nan")], "'a blue square'.*nan"),
    (lambda n: torch.tensor([float("inf")] * n), "'a red circle'.*inf")])
def test_bad_rewards_stop_the_run_before_any_weight_moves(reward, words, make_trainer):
    trainer = make_trainer(lambda images, prompts, metadata: reward(len(prompts)))
    before = trained_part(trainer)
    with pytest.raises(InputError, match=words):
        trainer.step(0, 0)
    assert torch.equal(before, trained_part(trainer))


def test_async_rewards_are_computed_at_once_and_keep_their_order(make_trainer):
    together = threading.Barrier(3)

    def reward(images, prompts, metadata):
        together.wait(timeout=60)  # passes only when three threads are here
        return images.mean(dim=(1, 2, 3))

    trainer = make_trainer(reward, async_reward_computation=True, max_workers=3)
    got = trainer.compute_rewards(made_up_pairs(3))
    assert got.tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


# ------------------------------------------------------------------------------- an epoch's updates
def plain_log_prob(unet, scheduler, call, steps, eta, guidance):
    """Song et al., equations 9, 12 and 16, Ho & Salimans, equation 6, and torch's own Normal."""
    x, t = call.latents, call.timesteps
    if guidance > 1:
        noise = unet(torch.cat([x, x]), torch.cat([t, t]), call.embeds).sample
        negative, positive = noise.chunk(2)
        noise = negative + guidance * (positive - negative)
    else:
        noise = unet(x, t, call.embeds).sample
    before = t - 1000 // steps
    alphas, final = scheduler.alphas_cumprod, scheduler.final_alpha_cumprod
    now = alphas[t].view(-1, 1, 1, 1)
    then = torch.where(before >= 0, alphas[before.clamp(min=0)], final).view(-1, 1, 1, 1)
    clean = (x - (1 - now).sqrt() * noise) / now.sqrt()
    std = eta * ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
    mean = then.sqrt() * clean + (1 - then - std**2).sqrt() * noise
    return torch.distributions.Normal(mean, std).log_prob(call.next_latents).mean(dim=(1, 2, 3))


def plain_updates(trainer, unet, calls_per_update):
    """Repeat the trainer's updates on `unet` with the formula of the paper and torch's AdamW.

    Returns the mean loss, approx_kl and clipfrac of all calls."""
    c, guidance = trainer.config, trainer.config.sample_guidance_scale * trainer.config.train_cfg
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=c.train_learning_rate, betas=(c.train_adam_beta1, c.train_adam_beta2),
        eps=c.train_adam_epsilon, weight_decay=c.train_adam_weight_decay)
    results = []
    for start in range(0, len(trainer.calls), calls_per_update):
        for call in trainer.calls[start:start + calls_per_update]:
            new = plain_log_prob(unet, trainer.sd_pipeline.scheduler, call, c.sample_num_steps,
                                 c.sample_eta, guidance)
            ratio = torch.exp(new - call.log_probs)
            clipped = ratio.clamp(1 - c.train_clip_range, 1 + c.train_clip_range)
            advantages = call.advantages.clamp(-c.train_adv_clip_max, c.train_adv_clip_max)
            loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
            (loss / calls_per_update).backward()
            results.append([loss.item(), 0.5 * (new - call.log_probs).pow(2).mean().item(),
                            ((ratio - 1).abs() > c.train_clip_range).float().mean().item()])
            assert call.result == pytest.approx(results[-1], rel=1e-2, abs=1e-5)
        torch.nn.utils.clip_grad_norm_(parameters, c.train_max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    # what was sampled is what the first update scores
    assert max(approx_kl for _, approx_kl, _ in results[:calls_per_update]) < 1e-9
    return np.mean(results, axis=0)


@pytest.mark.parametrize("calls_per_update, fields", [
    (3, {}),
    (3, {"use_lora": True}),
    (3, {"sample_eta": 0.6}),
    (3, {"train_cfg": False}),
    (3, {"sample_guidance_scale": 1.0}),
    (3, {"sample_guidance_scale": 0.5}),
    (3, {"negative_prompts": "a blue circle"}),
    (6, {"train_gradient_accumulation_steps": 2}),
    (12, {"train_batch_size": 1, "train_gradient_accumulation_steps": 4}),
    (1, {"train_timestep_fraction": 0.5}),
    (4, {"sample_num_steps": 4, "train_timestep_fraction": 0.5,
         "train_gradient_accumulation_steps": 2}),
    (6, {"train_max_grad_norm": 1e-3, "train_gradient_accumulation_steps": 2,
         "train_adam_weight_decay": 0.0}),
    (3, {"train_adv_clip_max": 0.4}),
    (3, {"gradient_checkpointing": True}),
    (3, {"train_adam_beta1": 0.0, "train_adam_beta2": 0.5, "train_adam_weight_decay": 0.0})],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else str(value))
def test_an_epoch_is_a_plain_loop_over_the_paper_s_formula(calls_per_update, fields, make_trainer):
    """Sampling and all updates of an epoch: log-probabilities, loss, gradient, clipping, AdamW."""
    trainer = make_trainer(**{
        "train_num_inner_epochs": 2, "train_clip_range": 0.01, "train_learning_rate": 1e-2,
        "train_max_grad_norm": 1e6, "train_adam_beta1": 0.8, "train_adam_beta2": 0.9,
        "train_adam_epsilon": 0.03, "train_adam_weight_decay": 0.1, **fields})
    unet = copy.deepcopy(trainer.sd_pipeline.unet).eval()
    before = trained(unet)
    updates = trainer.step(0, 0)
    assert len(trainer.calls) == updates * calls_per_update
    loss, approx_kl, clipfrac = plain_updates(trainer, unet, calls_per_update)
    assert_same_move(before, trained_part(trainer), trained(unet))
    stats = trainer.stats
    assert stats["loss"] == pytest.approx(loss, rel=1e-3, abs=1e-5)
    assert stats["approx_kl"] == pytest.approx(approx_kl, rel=1e-2) and approx_kl > 1e-8
    assert stats["clipfrac"] == pytest.approx(clipfrac, abs=1e-6)


def test_ratio_kl_and_clipfrac_against_old_log_probabilities_worked_by_hand(make_trainer):
    trainer = make_trainer(train_learning_rate=0.0, train_clip_range=0.2)
    trainer.step(0, 0)
    call = trainer.calls[0]
    # the policy now finds the samples exp(0.3) and exp(-0.1) times as likely as the made-up old one
    old = call.log_probs - torch.tensor([0.3, -0.1])
    loss, approx_kl, clipfrac = trainer.calculate_loss(
        call.latents, call.timesteps, call.next_latents, old, torch.tensor([2.0, -1.0]),
        call.embeds)
    assert loss.item() == pytest.approx((-2 * 1.2 + math.exp(-0.1)) / 2, rel=1e-3)
    assert approx_kl.item() == pytest.approx(0.5 * (0.09 + 0.01) / 2, rel=1e-3)
    assert clipfrac.item() == 0.5
    # only the second sample is inside the clip, so only its log-probability has a gradient
    loss.backward()
    got = torch.cat([p.grad.flatten() for p in trainer.sd_pipeline.unet.parameters()])
    trainer.sd_pipeline.unet.zero_grad()
    new = plain_log_prob(trainer.sd_pipeline.unet, trainer.sd_pipeline.scheduler, call, 3, 1.0, 5.0)
    (new[1] * math.exp(-0.1) / 2).backward()
    want = torch.cat([p.grad.flatten() for p in trainer.sd_pipeline.unet.parameters()])
    assert_same_move(0 * want, got, want)


# bfloat16 has 3 digits; sums in another order, as of another batch size, may round differently
KL_OF_ROUNDING = {"no": 1e-11, "bf16": 1e-7}


@pytest.mark.parametrize("use_lora", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_before_any_update_every_ratio_is_1(precision, use_lora, make_trainer):
    """Sampling and scoring differ in nothing: not in dropout, guidance, eta or precision."""
    trainer = make_trainer(train_learning_rate=0.0, sample_eta=0.6, train_clip_range=1e-3,
                           mixed_precision=precision, use_lora=use_lora)
    trainer.step(0, 0)
    assert trainer.stats["approx_kl"] < KL_OF_ROUNDING[precision]


def test_updates_by_descent_are_the_learning_rate_times_the_clipped_gradient(make_trainer):
    trainer = make_trainer(**DESCENT, train_learning_rate=2e3, train_max_grad_norm=1e-3,
                           sample_num_batches_per_epoch=1)
    before = trained_part(trainer)
    assert trainer.step(0, 0) == 1
    # learning rate / epsilon x norm
    assert (trained_part(trainer) - before).norm().item() == pytest.approx(0.2 * 1e-3, rel=1e-2)


def test_an_update_makes_better_samples_likelier_and_worse_ones_less(make_trainer):
    trainer = make_trainer(sample_batch_size=4, train_batch_size=4, train_learning_rate=1e-4,
                           sample_num_batches_per_epoch=1)
    trainer.step(0, 0)
    with torch.no_grad():
        gains = [(plain_log_prob(trainer.sd_pipeline.unet, trainer.sd_pipeline.scheduler, call,
                                 3, 1.0, 5.0) - call.log_probs) * call.advantages
                 for call in trainer.calls]
    assert torch.stack(gains).mean() > 1e-6


@pytest.mark.parametrize("tracking", [False, True], ids=["by the batch", "by the prompt"])
def test_a_sample_keeps_its_prompt_latents_and_advantage_through_all_shuffles(tracking,
                                                                            make_trainer):
    pictures, values = {}, dict(zip(PROMPTS, [1.0, 5.0, 2.0, 4.0], strict=True))

    def reward(images, prompts, metadata):
        pictures.update(zip(prompts, images, strict=True))
        return [values[prompt] for prompt in prompts]

    trainer = make_trainer(reward, train_num_inner_epochs=3, negative_prompts="a red square",
                           per_prompt_stat_tracking=tracking, train_learning_rate=0.0,
                           per_prompt_stat_tracking_min_count=2)
    pipeline = trainer.sd_pipeline
    known = pipeline.encode(PROMPTS)
    tracker = ddpo.PerPromptStatTracker(16, 2)
    for epoch in range(2):
        trainer.calls.clear()
        trainer.step(epoch, trainer.stats.get("global_step", 0))
        rewards = list(values.values())
        want = tracker.update(PROMPTS, rewards) if tracking else ddpo.normalize(rewards)
        times = sorted({t for call in trainer.calls for t in call.timesteps.tolist()})
        for call in trainer.calls:
            negative, positive = call.embeds.chunk(2)
            expected = pipeline.encode(["a red square"]).expand_as(negative)
            torch.testing.assert_close(negative, expected)
            for i in range(2):
                which = (positive[i] - known).abs().amax(dim=(1, 2)).argmin().item()
                assert call.advantages[i].item() == pytest.approx(want[which], rel=1e-4, abs=1e-5)
                if call.timesteps[i] == times[0]:
                    latent = call.next_latents[i:i + 1] / pipeline.vae.config.scaling_factor
                    with torch.no_grad():
                        image = pipeline.vae.decode(latent, return_dict=False)[0]
                    image = (image[0] / 2 + 0.5).clamp(0, 1)
                    torch.testing.assert_close(image, pictures[PROMPTS[which]],
                                               atol=1e-4, rtol=1e-4)
        values["a red circle"] += 3.0


def test_samples_and_timesteps_come_in_a_new_order_in_each_inner_epoch(make_trainer):
    trainer = make_trainer(sample_num_steps=4, sample_num_batches_per_epoch=4,
                           train_num_inner_epochs=3)
    trainer.step(0, 0)
    assert len(trainer.calls) == 3 * 4 * 4  # inner epochs x minibatches x timesteps
    orders = []
    for start in range(0, 48, 16):
        # which sample: its latents at the end of the step name it
        orders.append([(round(call.next_latents[i].sum().item(), 4), call.timesteps[i].item())
                       for call in trainer.calls[start:start + 16] for i in range(2)])
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])  # each once per inner epoch
    assert len(set(orders[0])) == 32
    prompts = [[call.advantages.tolist() for call in trainer.calls[start:start + 16:4]]
               for start in range(0, 48, 16)]
    assert prompts[0] != prompts[1] != prompts[2]
    # and each sample has an order of timesteps of its own
    assert any(call.timesteps[0] != call.timesteps[1] for call in trainer.calls)


def test_a_fraction_of_the_timesteps_is_trained_on(make_trainer):
    trainer = make_trainer(sample_num_steps=5, train_timestep_fraction=0.5,
                           train_num_inner_epochs=3)
    assert trainer.step(0, 0) == 6
    assert len(trainer.calls) == 6 * 2  # 2.5 timesteps of 5 are 2
    pairs = [(trainer.calls[i].timesteps, trainer.calls[i + 1].timesteps) for i in range(0, 12, 2)]
    assert all((a != b).all() for a, b in pairs)  # no timestep twice
    assert len({t.item() for pair in pairs for times in pair for t in times}) > 2


def test_prompts_metadata_and_rewards_stay_together(make_trainer):
    kept, seen = [], []

    def reward(images, prompts, metadata):
        seen.append((prompts, metadata))
        return [float(len(prompt)) for prompt in prompts], "why"

    trainer = make_trainer(reward, hook=lambda *args: kept.append(args))
    turn = iter(range(100))
    trainer.prompt_fn = lambda: (PROMPTS[(i := next(turn)) % 4], {"row": i})
    assert trainer.step(3, 10) == 12
    (pairs, step, tracker), = kept
    assert tracker is None and step == 10 and len(pairs) == 2
    for i, (images, prompts, metadata, rewards, extra) in enumerate(pairs):
        assert images.shape == (2, 3, 16, 16) and 0 <= images.min() < images.max() <= 1
        assert list(prompts) == PROMPTS[2 * i:2 * i + 2]
        assert list(metadata) == [{"row": 2 * i}, {"row": 2 * i + 1}]
        assert rewards.tolist() == [len(prompt) for prompt in prompts] and extra == "why"
    assert seen == [(pair[1], pair[2]) for pair in pairs]
    lengths = [len(prompt) for prompt in PROMPTS]
    assert trainer.stats["reward_mean"] == np.mean(lengths)
    assert trainer.stats["reward_std"] == pytest.approx(np.std(lengths))
    assert trainer.stats["global_step"] == 12


@pytest.mark.parametrize("workers", [0, 3])
def test_a_seed_gives_the_same_epoch_with_and_without_async_rewards(workers, make_trainer):
    fields = {"async_reward_computation": True, "max_workers": workers} if workers else {}
    stats = []
    for more in ({}, fields, {"seed": 1}):
        trainer = make_trainer(sample_num_batches_per_epoch=3, **more)
        trainer.step(0, 0)
        stats.append(trainer.stats)
    assert stats[0] == stats[1] and stats[0]["reward_mean"] != stats[2]["reward_mean"]


def test_one_sample_per_epoch_is_enough_only_for_per_prompt_tracking(make_trainer):
    one_sample = {"sample_batch_size": 1, "sample_num_batches_per_epoch": 1, "train_batch_size": 1}
    with pytest.raises(InputError, match="sample_batch_size"):
        make_trainer(**one_sample)
    trainer = make_trainer(per_prompt_stat_tracking=True, **one_sample)
    trainer.step(0, 0)
    assert trainer.stat_tracker.get_stats()["a red circle"]["count"] == 1


class Broken(DDPOTrainer):
    def calculate_loss(self, *args, **kwargs):
        loss, *rest = super().calculate_loss(*args, **kwargs)
        return loss * float("nan"), *rest


def test_a_loss_that_is_not_finite_stops_the_run_with_the_weights_as_they_were(make_trainer):
    trainer = make_trainer(kind=Broken)
    before = trained_part(trainer)
    with pytest.raises(InputError, match="loss.*nan"):
        trainer.step(0, 0)
    assert torch.equal(before, trained_part(trainer))


def test_gradient_checkpointing_is_on_where_it_is_asked_for(make_trainer):
    unets = [make_trainer(gradient_checkpointing=flag).sd_pipeline.unet for flag in (False, True)]
    assert [unet.is_gradient_checkpointing for unet in unets] == [False, True]


@pytest.mark.parametrize("use_lora", [False, True])
def test_weights_that_train_are_float32_in_mixed_precision(use_lora, make_trainer):
    trainer = make_trainer(use_lora=use_lora, mixed_precision="bf16")
    trainer.step(0, 0)
    parameters = list(trainer.sd_pipeline.unet.parameters())
    assert {p.dtype for p in parameters if p.requires_grad} == {torch.float32}
    frozen = {p.dtype for p in parameters if not p.requires_grad}
    assert frozen == ({torch.bfloat16} if use_lora else set())
    text_encoder, vae = trainer.sd_pipeline.text_encoder, trainer.sd_pipeline.vae
    assert {p.dtype for p in text_encoder.parameters()} == (frozen or {torch.float32})
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
    assert not any(p.requires_grad for part in (text_encoder, vae) for p in part.parameters())
    assert torch.isfinite(trained_part(trainer)).all()


@pytest.mark.parametrize("given, used", [("fp16", "no"), (None, "no"), ("bf16", "bf16")])
def test_fp16_means_float32_where_there_is_no_gpu(given, used, make_trainer):
    assert make_trainer(mixed_precision=given).accelerator.mixed_precision == used


def test_bf16_is_another_word_for_the_mixed_precision():
    config = DDPOConfig(bf16=True)
    assert config.mixed_precision == DDPOConfig(**config.to_dict()).mixed_precision == "bf16"


def test_use_cpu_leaves_the_gpu_and_its_fp16_alone(make_trainer, monkeypatch):
    given = []

    def begin(self, **kwargs):
        given.append((kwargs["cpu"], kwargs["mixed_precision"]))
        raise InputError("enough")

    monkeypatch.setattr(accelerate.Accelerator, "__init__", begin)
    monkeypatch.setattr(ddpo.machinery, "setup_ranks", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for use_cpu in (True, False):
        with pytest.raises(InputError, match="enough"):
            make_trainer(mixed_precision="fp16", use_cpu=use_cpu)
    assert given == [(True, "no"), (False, "fp16")]


def test_accelerator_kwargs_reach_accelerate(make_trainer):
    trainer = make_trainer(accelerator_kwargs={"mixed_precision": "bf16"})
    assert trainer.accelerator.mixed_precision == "bf16"


@pytest.mark.parametrize("allowed, precision", [(True, "high"), (False, "highest")])
def test_tf32_is_allowed_only_where_asked_for(allowed, precision, make_trainer):
    before = torch.get_float32_matmul_precision()
    try:
        make_trainer(allow_tf32=allowed)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


# ------------------------------------------------------------------------------------ what is kept
@pytest.mark.parametrize("use_lora", [False, True])
def test_a_resumed_run_reaches_the_same_numbers(use_lora, make_trainer, tmp_path):
    fields = {"use_lora": use_lora, "save_freq": 2, "per_prompt_stat_tracking": True,
              "per_prompt_stat_tracking_min_count": 2, "output_dir": str(tmp_path / "run")}
    whole = make_trainer(num_epochs=4, **fields)
    whole.train()
    run = tmp_path / "run"
    assert sorted(path.name for path in run.glob("checkpoint*")) == ["checkpoint-2", "checkpoint-4"]
    (run / "checkpoint-4").rename(tmp_path / "away")
    rows = (run / "metrics.jsonl").read_text()
    cut = make_trainer(num_epochs=4, resume_from=str(run), **fields)
    assert cut.epoch == cut.first_epoch == 2 and cut.global_step == 4
    cut.train()  # two epochs of four prompts are whole turns of the prompts
    assert torch.equal(trained_part(whole), trained_part(cut)) and whole.stats == cut.stats
    assert whole.stat_tracker.get_stats() == cut.stat_tracker.get_stats()
    assert (run / "metrics.jsonl").read_text() == rows
    assert [json.loads(row)["update"] for row in rows.splitlines()] == [1, 2, 3, 4]
    assert json.loads(rows.splitlines()[-1]) == {"update": 4, **whole.stats}


@pytest.mark.parametrize("use_lora", [False, True])
def test_a_resumed_run_takes_the_optimizer_of_its_own_config(use_lora, make_trainer, tmp_path):
    trainer = make_trainer(use_lora=use_lora, save_freq=1, train_adam_weight_decay=0.5)
    trainer.train(1)
    saved = trained_part(trainer)
    cut = make_trainer(use_lora=use_lora, train_learning_rate=0.0, train_adam_weight_decay=0.25,
                       train_adam_beta1=0.0, resume_from=str(tmp_path / "out" / "checkpoint-1"))
    assert torch.equal(saved, trained_part(cut))
    (group,) = cut.optimizer.param_groups
    assert group["weight_decay"] == 0.25 and group["betas"][0] == 0.0
    cut.train(2)
    assert cut.stats["global_step"] == 4 and torch.equal(saved, trained_part(cut))


def test_only_the_newest_checkpoints_are_kept(make_trainer, tmp_path):
    trainer = make_trainer(save_freq=1, num_checkpoint_limit=2, use_lora=True, sample_num_steps=1,
                           sample_batch_size=1, train_batch_size=1)
    trainer.train(10)
    kept = sorted(path.name for path in (tmp_path / "out").glob("checkpoint*"))
    assert kept == ["checkpoint-10", "checkpoint-9"]


def test_project_kwargs_set_the_folder_of_checkpoints_and_their_number(make_trainer, tmp_path):
    project = {"project_dir": str(tmp_path / "mine"), "automatic_checkpoint_naming": True,
               "iteration": 1, "total_limit": 1}
    trainer = make_trainer(save_freq=1, use_lora=True, output_dir=None, project_kwargs=project)
    trainer.train(2)
    found = sorted(path.name for path in (tmp_path / "mine").iterdir())
    assert found == ["checkpoint-2", "metrics.jsonl"]


@pytest.mark.parametrize("use_lora", [False, True])
def test_what_is_saved_opens_in_diffusers_and_gives_the_same_images(use_lora, make_trainer, tiny,
                                                                    tmp_path):
    trainer = make_trainer(use_lora=use_lora, train_learning_rate=1e-2, lora_alpha=16)
    trainer.step(0, 0)
    trainer.save_pretrained(str(tmp_path / "saved"))
    assert "1 epochs, 2 optimizer steps" in (tmp_path / "saved" / "README.md").read_text()
    plain = StableDiffusionPipeline.from_pretrained(tiny if use_lora else tmp_path / "saved")
    if use_lora:
        untouched = images_of_diffusers(plain)
        plain.load_lora_weights(tmp_path / "saved")
    got = images_of_diffusers(plain)
    torch.testing.assert_close(got, images_of(trainer.sd_pipeline), atol=1e-4, rtol=1e-4)
    assert not use_lora or (untouched - got).abs().max() > 1e-3
    if use_lora:  # the next trainer trains this adapter, with its scale, and no second one
        loaded = DefaultDDPOStableDiffusionPipeline(tiny, lora_weights=str(tmp_path / "saved"))
        (adapter,) = loaded.unet.peft_config.values()
        assert adapter.lora_alpha == 16
        assert torch.equal(trained(loaded.unet), trained_part(trainer))
        torch.testing.assert_close(images_of(loaded), images_of(trainer.sd_pipeline))


def test_push_to_hub_uploads_what_save_pretrained_writes(make_trainer, tmp_path, monkeypatch):
    sent = []

    def upload_folder(self, *, repo_id, folder_path, commit_message, **kwargs):
        sent.append((repo_id, {path.name for path in Path(folder_path).iterdir()}, kwargs))

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: self.token)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    trainer = make_trainer(use_lora=True)
    trainer.push_to_hub("me/it", token="t", create_pr=True)
    trainer._save_pretrained(tmp_path / "saved")
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    assert sent == [("me/it", files, {"create_pr": True})] and "README.md" in files


def test_the_text_encoder_part_of_a_lora_is_saved_too(tiny, make_trainer, tmp_path):
    """Such a part shapes the images in training, and does not train."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny)
    parts = {"unet": ["to_q", "to_v"], "text_encoder": ["q_proj", "v_proj", "fc1"]}
    layers = {}
    for name, modules in parts.items():
        model = getattr(pipeline, name)
        model.add_adapter(LoraConfig(
            r=4, lora_alpha=8, init_lora_weights=False, target_modules=modules))
        layers[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(
            get_peft_model_state_dict(model))
        layers[f"{name}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", **layers)

    mine = DefaultDDPOStableDiffusionPipeline(tiny, lora_weights=str(tmp_path / "lora"))
    config = DDPOConfig(sample_num_steps=3, mixed_precision="no", output_dir=str(tmp_path / "out"))
    trainer = DDPOTrainer(config, brightness, lambda: (PROMPTS[0], {}), mine)
    before = {name: p.clone() for name, p in mine.text_encoder.named_parameters()}
    trainer.train(1)
    trainer.save_pretrained(str(tmp_path / "out"))
    assert all(torch.equal(p, before[name]) for name, p in mine.text_encoder.named_parameters())
    plain = StableDiffusionPipeline.from_pretrained(tiny)
    plain.load_lora_weights(tmp_path / "out")
    got = images_of_diffusers(plain)
    torch.testing.assert_close(got, images_of(mine), atol=1e-4, rtol=1e-4)
    plain.text_encoder.disable_adapters()
    assert (images_of_diffusers(plain) - got).abs().max() > 1e-3

    again = DefaultDDPOStableDiffusionPipeline(tiny, lora_weights=str(tmp_path / "lora"))
    config = DDPOConfig(**{**config.to_dict(), "resume_from": str(tmp_path / "out")})
    DDPOTrainer(config, brightness, None, again)
    torch.testing.assert_close(images_of(again), images_of(mine))


def test_full_training_merges_a_lora_that_it_starts_from(make_trainer, tiny, tmp_path):
    trainer = make_trainer(use_lora=True, train_learning_rate=1e-2, lora_alpha=16)
    trainer.step(0, 0)
    trainer.save_pretrained(str(tmp_path / "lora"))
    lora = str(tmp_path / "lora")
    whole = DefaultDDPOStableDiffusionPipeline(tiny, use_lora=False, lora_weights=lora)
    assert all(p.requires_grad for p in whole.unet.parameters())
    whole.save_pretrained(tmp_path / "whole")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "whole")
    x, t, c = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 8, 16)
    with torch.no_grad():
        want = trainer.sd_pipeline.unet(x, t, c).sample
        torch.testing.assert_close(again.unet(x, t, c).sample, want, atol=1e-5, rtol=1e-4)
        untouched = StableDiffusionPipeline.from_pretrained(tiny).unet(x, t, c).sample
    assert (want - untouched).abs().max() > 1e-3


def test_the_adapter_is_that_of_trl_0_7_10(make_pipeline, tiny):
    pipeline = make_pipeline(use_lora=True)
    (config,) = pipeline.unet.peft_config.values()
    assert (config.r, config.lora_alpha) == (4, 4)
    assert set(config.target_modules) == {"to_k", "to_q", "to_v", "to_out.0"}
    layers = pipeline.get_trainable_layers()
    assert layers and all(p.requires_grad and 4 in p.shape for p in layers)
    # Gaussian A of standard deviation 1 / r, and B of 0: a fresh adapter changes nothing
    spread = torch.cat([p.flatten() for p in layers if p.abs().sum() > 0]).std().item()
    assert spread == pytest.approx(1 / 4, rel=0.2)
    plain = StableDiffusionPipeline.from_pretrained(tiny)
    torch.testing.assert_close(images_of(pipeline), images_of_diffusers(plain), atol=1e-4, rtol=0)
    sizes = DefaultDDPOStableDiffusionPipeline(tiny, lora_r=2, lora_alpha=6)
    (config,) = sizes.unet.peft_config.values()
    assert (config.r, config.lora_alpha) == (2, 6)


def test_the_model_card_says_how_the_model_was_made_and_how_to_load_it(make_trainer, tmp_path):
    trainer = make_trainer(use_lora=True, sample_eta=0.5, negative_prompts="blue")
    trainer.create_model_card(str(tmp_path / "card"))
    card = (tmp_path / "card" / "README.md").read_text()
    assert card.startswith("---\n") and "# TRL DDPO Model" in card
    assert "library_name: diffusers" in card.split("---")[1]
    for part in ('load_lora_weights(".")', "num_inference_steps=3", "eta=0.5", "guidance_scale=5.0",
                 "negative_prompt='blue'"):
        assert part in card
    code = card.split("```python\n")[1].split("```")[0]
    # the trainer's scheduler, whatever the base's own is
    line = next(line for line in code.splitlines() if line.startswith("pipeline.scheduler"))
    pipeline = SimpleNamespace(scheduler=EulerDiscreteScheduler())
    exec(line, {"DDIMScheduler": DDIMScheduler, "pipeline": pipeline})
    assert not pipeline.scheduler.config.clip_sample
    compile(code, "card", "exec")


def test_another_kind_of_pipeline_is_refused_by_name(tmp_path):
    index = json.dumps({"_class_name": "StableDiffusionXLPipeline"})
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(InputError, match="StableDiffusionXLPipeline"):
        DefaultDDPOStableDiffusionPipeline(tmp_path)


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler")
@pytest.mark.parametrize("kind", [PNDMScheduler, EulerDiscreteScheduler, DDPMScheduler,
                                  DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_latents_are_not_clipped_because_a_scheduler_does_not_say_so(kind, tiny):
    """DDIM's own default clips them to -1 .. 1, and starts at timestep 0."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipelines = []
    for scheduler in (kind(**betas), DDIMScheduler(**betas, clip_sample=False, steps_offset=1,
                                                   set_alpha_to_one=False)):
        parts = StableDiffusionPipeline.from_pretrained(tiny).components
        plain = StableDiffusionPipeline(**{**parts, "scheduler": scheduler},
                                        requires_safety_checker=False)
        pipelines.append(DDPOStableDiffusionPipeline(plain, use_lora=False))
    got, want = (images_of(pipeline, steps=8) for pipeline in pipelines)
    torch.testing.assert_close(got, want)


def test_a_schedule_that_asks_for_clipping_keeps_it(make_pipeline):
    plain = make_pipeline(clip_sample=True, set_alpha_to_one=True, steps_offset=0).sd_pipeline
    config = DDPOStableDiffusionPipeline(plain, use_lora=False).scheduler.config
    assert config.clip_sample and config.set_alpha_to_one and config.steps_offset == 0


def test_images_are_decoded_one_at_a_time_in_float32(make_trainer):
    trainer = make_trainer(mixed_precision="bf16", use_lora=True)
    shapes = []
    trainer.sd_pipeline.vae.decoder.register_forward_hook(
        lambda module, args, output: shapes.append((args[0].shape[0], output.dtype)))
    output, _ = trainer.sample_images(PROMPTS)
    assert shapes == [(1, torch.float32)] * 4
    assert output.images.shape == (4, 3, 16, 16) and output.images.dtype == torch.float32


def test_a_safety_checker_is_not_moved(make_pipeline):
    pipeline = make_pipeline(use_lora=True)
    pipeline.sd_pipeline.safety_checker = torch.nn.Linear(2, 2)
    names = {type(model).__name__ for model in pipeline.models}
    assert names == {"CLIPTextModel", "UNet2DConditionModel", "AutoencoderKL"}


# --------------------------------------------------------------------------------- another pipeline
@pytest.fixture
def make_xl():
    """make_xl(): StableDiffusionXLPipeline of the same weights, latents of 4 x 8 x 8."""
    def make():
        torch.manual_seed(0)
        text = CLIPTextConfig(
            vocab_size=600, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=1, max_position_embeddings=8, projection_dim=12)
        tokenizer = CLIPTokenizer.from_pretrained(TOY / "pipeline" / "tokenizer")
        return StableDiffusionXLPipeline(
            vae=AutoencoderKL(
                block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
                norm_num_groups=2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
                sample_size=16),
            text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text),
            tokenizer=tokenizer, tokenizer_2=tokenizer,
            unet=UNet2DConditionModel(
                sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
                cross_attention_dim=32, attention_head_dim=4, mid_block_type=None,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                addition_embed_type="text_time", addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=12 + 6 * 8),
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                timestep_spacing="leading"),
            add_watermarker=False)

    return make


def test_the_class_for_sdxl_in_the_docs_draws_and_trains_as_diffusers(make_xl, tmp_path):
    page = Path(ddpo.__file__).with_name("docs") / "ddpo.md"
    (block,) = re.findall(r"```python\n([^`]*class SDXL.*?)```", page.read_text(), re.S)
    names = {}
    exec(block, names)

    def images_of_xl(plain):
        plain.scheduler = DDIMScheduler.from_config(
            plain.scheduler.config, clip_sample=False, set_alpha_to_one=False)
        plain.set_progress_bar_config(disable=True)
        return plain(PROMPTS, negative_prompt=[""] * 4, num_inference_steps=4, eta=1.0,
                     guidance_scale=5.0, output_type="pt",
                     generator=torch.Generator().manual_seed(3)).images

    config = DDPOConfig(sample_num_steps=3, train_learning_rate=1e-2, mixed_precision="no",
                        output_dir=str(tmp_path))
    trainer = DDPOTrainer(config, brightness, lambda: (PROMPTS[0], {}), names["SDXL"](make_xl()))
    untouched = images_of_xl(make_xl())
    torch.testing.assert_close(images_of(trainer.sd_pipeline), untouched, atol=1e-4, rtol=1e-4)
    trainer.train(1)
    trainer.save_pretrained(str(tmp_path))
    plain = make_xl()
    plain.load_lora_weights(tmp_path)
    got = images_of_xl(plain)
    torch.testing.assert_close(got, images_of(trainer.sd_pipeline), atol=1e-4, rtol=1e-4)
    assert (got - untouched).abs().max() > 1e-3


def test_every_model_of_sdxl_is_cast_and_frozen(make_xl, tmp_path):
    page = Path(ddpo.__file__).with_name("docs") / "ddpo.md"
    (block,) = re.findall(r"```python\n([^`]*class SDXL.*?)```", page.read_text(), re.S)
    names = {}
    exec(block, names)
    config = DDPOConfig(sample_num_steps=3, mixed_precision="bf16", output_dir=str(tmp_path))
    pipeline = names["SDXL"](make_xl())
    trainer = DDPOTrainer(config, brightness, lambda: (PROMPTS[0], {}), pipeline)
    trainer.step(0, 0)
    assert math.isfinite(trainer.stats["loss"])
    for name, dtype in (("text_encoder", torch.bfloat16), ("text_encoder_2", torch.bfloat16),
                        ("vae", torch.float32)):
        parameters = list(getattr(pipeline.sd_pipeline, name).parameters())
        assert {p.dtype for p in parameters} == {dtype}, name
        assert not any(p.requires_grad for p in parameters), name


def test_a_config_of_another_trainer_is_refused(make_pipeline):
    with pytest.raises(ValueError, match="DDPOConfig.*dict"):
        DDPOTrainer({}, brightness, None, make_pipeline())


@pytest.mark.parametrize("fields, words", [
    ({"sample_batch_size": 2, "sample_num_batches_per_epoch": 2, "train_batch_size": 3},
     "sample_batch_size.* 4 .*train_batch_size.* 3"),
    ({"per_prompt_stat_tracking": True, "per_prompt_stat_tracking_min_count": 32},
     "per_prompt_stat_tracking_min_count=32")])
def test_sizes_that_do_not_fit_are_refused(fields, words):
    with pytest.raises(InputError, match=words):
        DDPOConfig(**fields)


@pytest.mark.parametrize("fields, words", [
    ({"train_times_per_pass": 2}, "train_times_per_pass=2: this option is gone"),
    ({"train_learning_rate": float("nan")}, "train_learning_rate=nan"),
    ({"train_learning_rate": -1e-4}, "train_learning_rate=-0.0001"),
    ({"train_adam_beta2": 1.0}, "train_adam_beta2=1.0"),
    ({"sample_guidance_scale": float("inf")}, "sample_guidance_scale=inf"),
    ({"num_samples": -1}, "num_samples=-1"),
    ({"lora_r": -1}, "lora_r=-1"),
    ({"mixed_precision": "half"}, "mixed_precision='half'.*fp16"),
    ({"mixed_precision": "no", "bf16": True}, "bf16=True, and mixed_precision='no': give one"),
    ({"log_with": "paper"}, "log_with='paper'.*tensorboard"),
    ({"tracker_kwargs": 5}, "tracker_kwargs=5: give a dict"),
    ({"project_kwargs": [1]}, r"project_kwargs=\[1\]: give a dict"),
    ({"pictures_per_prompt": 2, "per_prompt_stat_tracking": True},
     "pictures_per_prompt=2.*per_prompt_stat_tracking")])
def test_a_value_that_no_run_can_use_is_one_sentence(fields, words):
    with pytest.raises(InputError, match=words):
        DDPOConfig(**fields)


@pytest.mark.parametrize("fields, words", [
    ({"sample_num_steps": 1001}, "sample_num_steps=1001.* 1000 timesteps"),
    ({"sample_num_steps": 1000}, "sample_num_steps=1000.* at most 999"),  # each is shifted by 1
    ({"accelerator_kwargs": {"gpu": True}}, "accelerator_kwargs=.*no argument gpu"),
    ({"accelerator_kwargs": {"mixed_precision": "bf8"}}, "accelerator_kwargs=.*bf8.*'bf16'"),
    ({"project_kwargs": {"folder": "x"}}, "project_kwargs=.*no argument folder")])
def test_what_the_scheduler_or_accelerate_can_not_do_is_one_sentence(fields, words, make_trainer):
    with pytest.raises(InputError, match=words) as error:
        make_trainer(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fields, name", [
    ({"max_workers": 3}, "max_workers=3 has no effect without async_reward_computation")])
def test_an_option_without_effect_is_a_warning(fields, name):
    with pytest.warns(UserWarning, match=name):
        DDPOConfig(**fields)


def test_only_an_epoch_s_samples_must_fill_whole_optimizer_steps():
    DDPOConfig(sample_batch_size=2, sample_num_batches_per_epoch=2, train_batch_size=4)
    DDPOConfig(sample_batch_size=1, sample_num_batches_per_epoch=6, train_batch_size=3,
               train_gradient_accumulation_steps=2)
