"""ddpo.py from the formula of one step to whole epochs, on a pipeline of 30,000 weights that is made here."""
import json
import math
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import ddpo
from common import TOY, InputError
from ddpo import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

RECORDED = json.loads(Path(__file__).with_name("recorded_ddpo.json").read_text())
PROMPTS = ["a red circle", "a blue square", "a green triangle", "a yellow circle"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a Stable Diffusion pipeline: 8 x 8 latents of 4 channels, pictures of 16 x 16."""
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline(
        tokenizer=CLIPTokenizer.from_pretrained(TOY / "pipeline" / "tokenizer"),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=600, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                                  num_attention_heads=1, max_position_embeddings=8, projection_dim=16)),
        vae=AutoencoderKL(block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=2,
                          up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=16),
        unet=UNet2DConditionModel(sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
                                  cross_attention_dim=16, attention_head_dim=4, mid_block_type=None, dropout=0.1,
                                  down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                  up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def make_pipeline(tiny):
    """make_pipeline(use_lora=False, **changes of the scheduler)"""
    def make(use_lora=False, lora_alpha=4, **scheduler):
        pipeline = DefaultDDPOStableDiffusionPipeline(tiny, use_lora=use_lora, lora_alpha=lora_alpha)
        pipeline.sd_pipeline.scheduler = DDIMScheduler.from_config({**pipeline.scheduler.config, **scheduler})
        return pipeline

    return make


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


@pytest.fixture
def make_trainer(make_pipeline, tmp_path):
    """make_trainer(reward, use_lora=False, hook=None, scheduler={}, lora_alpha=4, **fields of DDPOConfig): 3 denoising steps of 2 x 2
    pictures, prompts in turn."""
    def make(reward=brightness, use_lora=False, hook=None, scheduler={}, lora_alpha=4, **fields):
        config = DDPOConfig(**{"sample_num_steps": 3, "sample_batch_size": 2, "train_batch_size": 2, "mixed_precision": "no",
                               "save_freq": 1000, "output_dir": str(tmp_path / "out"), "train_learning_rate": 1e-3, **fields})
        turn = iter(PROMPTS * 1000)
        return DDPOTrainer(config, reward, lambda: (next(turn), {}), make_pipeline(use_lora, lora_alpha, **scheduler), hook)

    return make


@pytest.fixture
def trained_part():
    """trained_part(trainer) -> {name: a copy} of the weights that train."""
    return lambda trainer: {name: p.detach().clone() for name, p in trainer.sd_pipeline.unet.named_parameters() if p.requires_grad}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def one(*values):
    """Numbers -> tensors [1, 1, 1, 1]."""
    return [torch.tensor(value).view(1, 1, 1, 1) for value in values]


# ------------------------------------------------------------------------------------------------ one step
def test_a_denoising_step_worked_by_hand():
    mean, std = ddpo.ddim_mean_std(*one(1.0, 0.5), torch.tensor([0.64]), torch.tensor([0.81]), eta=1.0)
    # x_0 = (1 - 0.6 x 0.5) / 0.8 = 0.875; sigma^2 = 0.19 / 0.36 x (1 - 0.64 / 0.81) = 0.110768
    assert std.item() == pytest.approx(0.332818, abs=1e-6)
    # 0.9 x 0.875 + sqrt(0.19 - 0.110768) x 0.5
    assert mean.item() == pytest.approx(0.928241, abs=1e-6)


def test_half_the_eta_is_half_the_noise():
    std = [ddpo.ddim_mean_std(*one(1.0, 0.5), torch.tensor([0.64]), torch.tensor([0.81]), eta)[1].item() for eta in (1.0, 0.5)]
    assert std[1] == pytest.approx(std[0] / 2)


def test_a_log_probability_worked_by_hand():
    x = torch.tensor([0.1, 0.3]).view(1, 2, 1, 1)  # z = 0.5 and 1.5: -0.125 and -1.125, and 1.609438 - 0.918939 each
    assert ddpo.log_prob(x, *one(0.0, 0.2)).tolist() == pytest.approx([0.065499], abs=1e-6)


def test_a_log_probability_is_torch_s_mean_over_the_latent():
    x, mean, std = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.rand(3, 1, 1, 1) + 0.1
    expected = torch.distributions.Normal(mean, std).log_prob(x).mean(dim=(1, 2, 3))
    torch.testing.assert_close(ddpo.log_prob(x, mean, std), expected)


def test_noise_clean_latent_and_v_are_three_ways_to_say_the_same():
    x_0, noise, alpha = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.7])
    a = alpha.view(-1, 1, 1, 1)
    x_t, v = a.sqrt() * x_0 + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x_0
    steps = [ddpo.ddim_mean_std(x_t, output, alpha, torch.tensor([0.5, 0.9]), 1.0, kind)[0]
             for kind, output in (("epsilon", noise), ("sample", x_0), ("v_prediction", v))]
    torch.testing.assert_close(steps[0], steps[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(steps[0], steps[2], atol=1e-5, rtol=1e-5)


def test_a_step_that_ends_without_noise_still_has_a_probability():
    """A9: 0.7.10 divided by a standard deviation of 0."""
    mean, std = ddpo.ddim_mean_std(*one(1.0, 0.5), torch.tensor([0.64]), torch.tensor([1.0]), eta=1.0)
    assert std.item() == pytest.approx(ddpo.MIN_STD) and mean.item() == pytest.approx(0.875)
    assert torch.isfinite(ddpo.log_prob(mean + std, mean, std)).all()


@pytest.mark.parametrize("schedule", [{"steps_offset": 0}, {"steps_offset": 0, "set_alpha_to_one": True}])
def test_a_schedule_that_reaches_time_0_trains_to_finite_weights(schedule, make_trainer, trained_part):
    """A9"""
    trainer = make_trainer(scheduler=schedule)
    trainer.step(0, 0)
    assert all(torch.isfinite(p).all() for p in trained_part(trainer).values())


def test_the_last_step_goes_where_diffusers_goes(make_pipeline):
    """A10: 0.7.10 never used final_alpha_cumprod."""
    pipeline = make_pipeline(set_alpha_to_one=True)
    pipeline.scheduler.set_timesteps(10)
    x, output, t = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), pipeline.scheduler.timesteps[-1]
    mean, _ = pipeline.step_distribution(output, t.expand(1), x, eta=1.0)
    torch.testing.assert_close(mean, pipeline.scheduler.step(output, t, x, eta=0.0).prev_sample)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_pictures_are_those_of_the_plain_pipeline_for_the_same_seed(spacing, make_pipeline, tiny):
    pipeline = make_pipeline(timestep_spacing=spacing)
    plain = StableDiffusionPipeline.from_pretrained(tiny)
    plain.scheduler = pipeline.scheduler
    want = plain(PROMPTS, num_inference_steps=5, eta=1.0, guidance_scale=3.0, output_type="pt",
                 generator=torch.Generator().manual_seed(7)).images
    embeds = pipeline.encode(PROMPTS)
    got = pipeline(embeds, pipeline.encode([""]).expand_as(embeds), 5, 3.0, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(got.images, want, atol=1e-4, rtol=1e-4)
    assert len(got.latents) == 6 and len(got.log_probs) == 5


def test_half_precision_latents_are_rounded_before_they_are_scored(make_pipeline):
    """A11: with no update between, the ratio must be exactly 1."""
    pipeline = make_pipeline()
    pipeline.scheduler.set_timesteps(3)
    output, x, t = torch.randn(2, 4, 8, 8).bfloat16(), torch.randn(2, 4, 8, 8).bfloat16(), pipeline.scheduler.timesteps[1]
    drawn = pipeline.scheduler_step(output, t, x, eta=1.0)
    scored = pipeline.scheduler_step(output, t, x, eta=1.0, prev_sample=drawn.latents)
    assert drawn.latents.dtype == torch.bfloat16 and torch.equal(drawn.log_probs, scored.log_probs)


def test_guidance_of_1_is_the_prompt_alone_and_of_0_the_negative_prompt():
    negative, positive = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(ddpo.guided(negative, positive, 1.0), positive)
    torch.testing.assert_close(ddpo.guided(negative, positive, 0.0), negative)
    rescaled = ddpo.guided(negative, positive, 5.0, rescale=1.0)
    torch.testing.assert_close(rescaled.std(dim=(1, 2, 3)), positive.std(dim=(1, 2, 3)))


# ------------------------------------------------------------------------------------------------ loss and advantages
@pytest.mark.parametrize("ratio, advantage, loss", [
    (1.0, 2.0, -2.0), (1.3, 2.0, -2.4), (0.7, 2.0, -1.4), (1.3, -2.0, 2.6), (0.7, -2.0, 1.6)])
def test_the_surrogate_is_clipped_only_where_it_would_gain(ratio, advantage, loss):
    got = ddpo.policy_loss(torch.tensor([ratio]), torch.tensor([advantage]), 0.2)
    assert got.item() == pytest.approx(loss)


def test_advantages_are_cut(make_trainer):
    trainer = make_trainer(train_adv_clip_max=0.5)
    assert trainer.loss(torch.tensor([3.0]), 0.1, torch.tensor([1.0])).item() == -0.5


def test_advantages_of_a_batch_have_mean_0_and_spread_1():
    got = ddpo.normalise([3, 10, 4, 7])
    assert got.mean() == pytest.approx(0) and got.std() == pytest.approx(1)
    assert ddpo.normalise([2.0, 2.0]).tolist() == [0, 0]


def test_whole_number_rewards_give_fractional_advantages():
    """A14: 0.7.10 kept them whole: 0, 1, 0."""
    got = ddpo.PerPromptStatTracker(16, 16).update(["a", "b", "a"], np.array([3, 10, 4]))
    assert got.tolist() == pytest.approx([-0.8627, 1.4018, -0.5392], abs=1e-4)


def test_a_prompt_is_measured_by_itself_once_enough_is_remembered():
    tracker = ddpo.PerPromptStatTracker(buffer_size=3, min_count=2)
    first = tracker.update(["a", "b"], [0.0, 4.0])         # one reward each: by the batch, mean 2, spread 2
    assert first.tolist() == pytest.approx([-1, 1], abs=1e-5)
    second = tracker.update(["a", "a"], [2.0, 4.0])        # a: 0, 2, 4
    assert second.tolist() == pytest.approx([0, math.sqrt(1.5)], abs=1e-5)
    tracker.update(["a"], [9.0])                           # the buffer forgets the 0
    assert tracker.get_stats()["a"] == {"mean": 5.0, "std": pytest.approx(np.std([2, 4, 9])), "count": 3}


# ------------------------------------------------------------------------------------------------ TRL 0.7.10's figures
def test_the_defaults_are_trl_s():
    config, want = DDPOConfig(), RECORDED["defaults"]["fields"]
    assert {name: getattr(config, name) for name in want} == want


@pytest.mark.parametrize("case", RECORDED["scheduler_step"], ids=lambda case: case["name"])
def test_recorded_steps(case, make_pipeline):
    pipeline = make_pipeline(**case["scheduler"])
    pipeline.scheduler.set_timesteps(case["num_inference_steps"])
    tensors = {name: torch.tensor(case[name]) for name in ("model_output", "sample", "prev_sample")}
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
        assert tracker.update(prompts, rewards).tolist() == pytest.approx(want, rel=1e-4, abs=1e-5)
    for prompt, want in case["stats"].items():
        assert tracker.get_stats()[prompt] == pytest.approx(want, rel=1e-5)


# ------------------------------------------------------------------------------------------------ rewards
def picture(prompt, paint=1.0, dx=0.0, dy=0.0, size=32):
    """A shape a quarter as wide as the picture, on white."""
    _, colour, shape = prompt.split()
    axis = (torch.arange(size) + 0.5) * 4 / size - 2
    inside = ddpo.SHAPES[shape](axis[None, :] - dx, axis[:, None] - dy).float() * paint
    return 1 - inside * (1 - torch.tensor(ddpo.COLOURS[colour]).float().view(3, 1, 1))


def align(image, prompt):
    return ddpo.shape_alignment(image[None], [prompt], [{}])[0]


ALL = [f"a {colour} {shape}" for colour in ddpo.COLOURS for shape in ddpo.SHAPES]


@pytest.mark.parametrize("prompt", ALL)
def test_alignment_is_best_for_what_the_prompt_says(prompt):
    scores = {other: align(picture(other, dx=0.3, dy=-0.2), prompt) for other in ALL}
    assert scores.pop(prompt) > 0.9 and max(scores.values()) < 0.85


def test_alignment_falls_with_pale_paint_and_with_dirt():
    clean, pale = picture("a red circle"), picture("a red circle", paint=0.5)
    dirty = clean.clone()
    dirty[1:, :6, :6] = 0  # a second patch of red in the corner
    assert align(clean, "a red circle") > align(dirty, "a red circle") > align(pale, "a red circle") > 0.4
    assert align(torch.ones(3, 32, 32), "a red circle") == 0 and align(picture("a blue circle"), "a red circle") < 0.01


@pytest.mark.parametrize("prompt", ["a purple circle", "a red house", "red"])
def test_alignment_says_which_prompts_it_knows(prompt):
    with pytest.raises(InputError, match=f"can't score the prompt '{prompt}'.*red, green.*circle"):
        align(torch.ones(3, 32, 32), prompt)


def test_jpeg_rewards_are_kilobytes_of_the_file():
    images = torch.stack([torch.ones(3, 32, 32), picture("a red circle"), torch.rand(3, 32, 32)])
    small, middle, large = ddpo.REWARDS["jpeg_incompressibility"](images, None, None)
    assert 0.6 < small < middle < large < 5
    assert ddpo.REWARDS["jpeg_compressibility"](images, None, None) == [-small, -middle, -large]


# ------------------------------------------------------------------------------------------------ epochs
def test_before_any_update_every_ratio_is_1(make_trainer):
    trainer = make_trainer(train_learning_rate=0.0, train_batch_size=2)
    trainer.step(0, 0)
    assert trainer.stats["approx_kl"] < 1e-12 and trainer.stats["clipfrac"] == 0


def test_dropout_never_makes_a_difference_between_sampling_and_scoring(make_trainer):
    trainer = make_trainer(train_learning_rate=0.0)
    assert any(module.training for module in trainer.unet.modules())  # for gradient checkpointing
    trainer.step(0, 0)
    assert trainer.stats["approx_kl"] < 1e-12


@pytest.mark.parametrize("fields", [{"train_cfg": False}, {"sample_guidance_scale": 1.0}, {"sample_guidance_scale": 0.5}])
def test_unguided_training_samples_unguided(fields, make_trainer):
    """A12, A13: 0.7.10 guided the samples all the same, or stopped."""
    trainer = make_trainer(train_learning_rate=0.0, **fields)
    seen, inner = [], trainer.sd_pipeline.predict
    trainer.sd_pipeline.predict = lambda unet, x, t, embeds, *a: seen.append(len(embeds) / len(x)) or inner(unet, x, t, embeds, *a)
    trainer.step(0, 0)
    assert set(seen) == {1.0} and trainer.stats["clipfrac"] == 0


def test_a_prompt_that_can_never_be_known_well_enough_is_told():
    with pytest.raises(InputError, match="min_count=32 rewards of a prompt are never remembered"):
        DDPOConfig(per_prompt_stat_tracking=True, per_prompt_stat_tracking_min_count=32)


@pytest.mark.parametrize("form", [lambda x: [r.requires_grad_() for r in x], lambda x: (x[:, None], "more"), lambda x: (x.numpy(), {}),
                                  lambda x: tuple(x.tolist())])
def test_rewards_may_come_in_any_form(form, make_trainer):
    trainer = make_trainer(lambda images, prompts, metadata: form(torch.arange(2.0)))
    _, pairs = trainer._generate_samples(1, 2)
    assert trainer.compute_rewards(pairs).tolist() == [0, 1]


def test_a_lora_that_the_whole_unet_goes_on_from_becomes_part_of_it(make_trainer, tiny, tmp_path):
    trainer = make_trainer(use_lora=True)
    trainer.step(0, 0)
    trainer.save_pretrained(str(tmp_path / "lora"))
    whole = DefaultDDPOStableDiffusionPipeline(tiny, use_lora=False, lora_weights=str(tmp_path / "lora"))
    whole.save_pretrained(tmp_path / "whole")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "whole")
    x, t, c = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 8, 16)
    with torch.no_grad():
        want = trainer.sd_pipeline.unet(x, t, c).sample
        torch.testing.assert_close(again.unet(x, t, c).sample, want, atol=1e-5, rtol=1e-4)
        assert not torch.equal(want, StableDiffusionPipeline.from_pretrained(tiny).unet(x, t, c).sample)


def test_an_update_makes_better_samples_likelier_and_worse_ones_less(make_trainer):
    """The sign of the loss: what earned more than the mean becomes likelier at its own times."""
    trainer = make_trainer(train_learning_rate=1e-4, sample_batch_size=4, sample_num_batches_per_epoch=1, train_batch_size=4)
    samples, pairs = trainer._generate_samples(1, 4)
    advantages, _ = trainer.compute_advantages(PROMPTS, trainer.compute_rewards(pairs))
    data, rows, times = samples[0], torch.arange(4), torch.arange(3).repeat(4, 1)

    def log_probs():
        embeds = torch.cat([data["negative_prompt_embeds"], data["prompt_embeds"]])
        told = []
        for t in range(3):
            output = trainer.sd_pipeline.predict(trainer.unet, data["latents"][:, t], data["timesteps"][:, t], embeds, 5.0)
            mean, std = trainer.sd_pipeline.step_distribution(output, data["timesteps"][:, t], data["latents"][:, t], 1.0)
            told.append(ddpo.log_prob(data["next_latents"][:, t], mean, std))
        return torch.stack(told, dim=1).detach()

    torch.testing.assert_close(log_probs(), data["log_probs"], atol=1e-5, rtol=1e-5)
    trainer._optimizer_step(data, advantages, rows, times)
    gain = (log_probs() - data["log_probs"]).mean(1)
    assert (gain * advantages).mean() > 1e-6


@pytest.mark.parametrize("fields", [{"train_batch_size": 1, "train_gradient_accumulation_steps": 4}, {"train_times_per_pass": 2},
                                    {"train_times_per_pass": 8, "train_batch_size": 2, "train_gradient_accumulation_steps": 2}])
def test_a_gradient_does_not_depend_on_how_it_is_cut_into_passes(fields, make_trainer, trained_part, monkeypatch):
    weights = []
    for more in ({}, fields):
        trainer = make_trainer(**{"sample_batch_size": 4, "sample_num_batches_per_epoch": 1, "train_batch_size": 4,
                                  "train_adam_epsilon": 1e-3, "train_times_per_pass": 1, **more})
        torch.manual_seed(0)
        trainer.step(0, 0)
        weights.append(trained_part(trainer))
    for name, want in weights[0].items():
        torch.testing.assert_close(weights[1][name], want, atol=1e-6, rtol=1e-5)


def test_times_of_a_pass_share_the_unet_and_each_has_its_own_loss(make_trainer):
    """calculate_loss is called for one time of a minibatch at a time, as it always was."""
    trainer = make_trainer(sample_num_batches_per_epoch=1, train_learning_rate=0.0)
    trainer.sd_pipeline.predict, inner = Mock(side_effect=trainer.sd_pipeline.predict), trainer.calculate_loss
    trainer.calculate_loss = Mock(side_effect=inner)
    trainer.step(0, 0)
    assert [len(call.args[1]) for call in trainer.sd_pipeline.predict.call_args_list[3:]] == [4, 2]    # 2 samples, 2 + 1 times
    assert [call.args[0].shape[0] for call in trainer.calculate_loss.call_args_list] == [2, 2, 2]
    for call in trainer.calculate_loss.call_args_list:                    # the UNet says the same where it is asked anew
        torch.testing.assert_close(inner(*call.args)[0], inner(*call.args[:6])[0], atol=1e-6, rtol=1e-5)


def test_a_share_of_the_times_is_trained_on(make_trainer):
    trainer = make_trainer(sample_num_steps=4, train_timestep_fraction=0.5, train_num_inner_epochs=3)
    seen, inner = [], trainer.calculate_loss
    trainer.calculate_loss = lambda *args: seen.append(args[1].tolist()) or inner(*args)
    assert trainer.step(0, 0) == 6 and len(seen) == 3 * 2 * 2  # inner epochs x minibatches x times
    assert len({tuple(s) for s in seen}) > 2                   # not always the same ones


def test_prompts_and_rewards_stay_together(make_trainer):
    told = []
    trainer = make_trainer(lambda images, prompts, metadata: [float(len(p)) for p in prompts],
                           hook=lambda pairs, step, tracker: told.append((pairs, step, tracker)))
    trainer.step(0, 0)
    (pairs, step, tracker), = told
    assert tracker is None and step == 0                       # A4: 0.7.10 asked for the first of no trackers
    for images, prompts, metadata, rewards, extra in pairs:
        assert images.shape == (2, 3, 16, 16) and rewards.tolist() == [len(p) for p in prompts] and extra == {}


def test_async_rewards_are_the_same_rewards(make_trainer):
    """A2: 0.7.10 stopped."""
    means = []
    for flag in (False, True):
        trainer = make_trainer(async_reward_computation=flag, max_workers=3, sample_num_batches_per_epoch=4)
        torch.manual_seed(0)
        trainer.step(0, 0)
        means.append(trainer.stats["reward_mean"])
    assert means[0] == means[1]


@pytest.mark.parametrize("reward", [lambda r: r, lambda r: (r, {"why": 1}), lambda r: r.numpy(), lambda r: r.tolist(),
                                    lambda r: (r.tolist(), None), lambda r: list(r), lambda r: r[:, None]],
                         ids=["tensor", "pair", "array", "list", "list and nothing", "list of tensors", "column"])
def test_rewards_come_in_any_form(reward, make_trainer):
    trainer = make_trainer(lambda images, prompts, metadata: reward(torch.arange(len(prompts)) + 1.0))
    trainer.step(0, 0)
    assert trainer.stats["reward_mean"] == 1.5


@pytest.mark.parametrize("reward, sentence", [
    (lambda n: [1.0] * (n - 1), "returned 1 rewards for 2 pictures"), (lambda n: 0.5, "returned no list of numbers for 2 pictures"),
    (lambda n: [1.0, float("nan")], "reward of the picture for 'a blue square' is nan"),
    (lambda n: torch.tensor([float("inf")] * n), "reward of the picture for 'a red circle' is inf")])
def test_bad_rewards_are_told_before_any_weight_moves(reward, sentence, make_trainer, trained_part):
    trainer = make_trainer(lambda images, prompts, metadata: reward(len(prompts)))
    before = trained_part(trainer)
    with pytest.raises(InputError, match=sentence):
        trainer.step(0, 0)
    assert equal(before, trained_part(trainer))


def test_per_prompt_tracking_needs_only_one_sample_an_epoch(make_trainer):
    one_sample = {"sample_batch_size": 1, "sample_num_batches_per_epoch": 1, "train_batch_size": 1}
    with pytest.raises(InputError, match="one sample an epoch has nothing to be better than"):
        make_trainer(**one_sample)
    trainer = make_trainer(per_prompt_stat_tracking=True, **one_sample)
    trainer.step(0, 0)
    assert trainer.stat_tracker.get_stats()["a red circle"]["count"] == 1


def test_a_loss_that_is_not_finite_stops_the_run_with_the_weights_as_they_were(make_trainer, trained_part):
    trainer = make_trainer()
    before, inner = trained_part(trainer), trainer.calculate_loss
    trainer.calculate_loss = lambda *args: (inner(*args)[0] * float("nan"), *inner(*args)[1:])
    with pytest.raises(InputError, match="the loss is nan after 0 epochs"):
        trainer.step(0, 0)
    assert equal(before, trained_part(trainer))


def test_gradients_are_cut_at_every_step(make_trainer, monkeypatch):
    norms = []
    trainer = make_trainer(train_max_grad_norm=1e-3, train_batch_size=1, train_clip_range=10)
    inner = trainer._stepper.step
    monkeypatch.setattr(trainer._stepper, "step", lambda: norms.append(
        math.sqrt(sum(p.grad.pow(2).sum().item() for p in trainer.sd_pipeline.get_trainable_layers()))) or inner())
    trainer.step(0, 0)
    assert len(norms) == 4 and all(norm == pytest.approx(1e-3, rel=1e-3) for norm in norms)


def test_gradient_checkpointing_changes_no_number(make_trainer, trained_part):
    weights, calls = [], []
    for flag in (False, True):
        trainer = make_trainer(gradient_checkpointing=flag)
        torch.manual_seed(0)
        trainer.step(0, 0)
        weights.append(trained_part(trainer))
        calls.append(trainer.sd_pipeline.unet.is_gradient_checkpointing)
    assert calls == [False, True]
    for name, want in weights[0].items():
        torch.testing.assert_close(weights[1][name], want)


@pytest.mark.parametrize("use_lora", [False, True])
def test_weights_that_train_are_float32_in_mixed_precision(use_lora, make_trainer, trained_part):
    """A17: 0.7.10 trained the UNet itself in half precision."""
    trainer = make_trainer(use_lora=use_lora, mixed_precision="bf16")
    trainer.step(0, 0)
    assert {p.dtype for p in trained_part(trainer).values()} == {torch.float32}
    frozen = {p.dtype for p in trainer.sd_pipeline.unet.parameters() if not p.requires_grad}
    assert frozen == ({torch.bfloat16} if use_lora else set())
    assert all(torch.isfinite(p).all() for p in trained_part(trainer).values())


def test_fp16_means_float32_where_there_is_no_gpu(make_trainer):
    assert make_trainer(mixed_precision="fp16").accelerator.mixed_precision == "no"
    assert make_trainer(mixed_precision=None).accelerator.mixed_precision == "no"


def test_the_negative_prompt_is_one_text_with_its_commas(make_trainer):
    """A15"""
    trainer = make_trainer(negative_prompts="blue, ugly")
    torch.testing.assert_close(trainer.negative, trainer.sd_pipeline.encode(["blue, ugly"]))


def test_only_an_epoch_s_samples_must_fill_whole_optimizer_steps():
    """A15: 0.7.10 wanted sample_batch_size to be a multiple of train_batch_size."""
    DDPOConfig(sample_batch_size=2, sample_num_batches_per_epoch=2, train_batch_size=4)
    with pytest.raises(InputError, match="= 4 samples don't fill whole optimizer steps of .* = 3: change one"):
        DDPOConfig(sample_batch_size=2, sample_num_batches_per_epoch=2, train_batch_size=3)


@pytest.mark.parametrize("field", ["prompt_ids", "prompt_embeds", "timesteps", "latents", "next_latents", "log_probs",
                                   "negative_prompt_embeds"])
def test_samples_have_the_names_that_users_know(field, make_trainer):
    samples, pairs = make_trainer()._generate_samples(iterations=2, batch_size=3)
    assert len(samples) == len(pairs) == 2 and len(samples[0][field]) == 3


# ------------------------------------------------------------------------------------------------ what is kept
@pytest.mark.parametrize("use_lora", [False, True])
def test_a_resumed_run_goes_on_to_the_same_numbers(use_lora, make_trainer, trained_part, tmp_path):
    """A3, A6, A7, A8: 0.7.10 stopped at its first save, loaded a LoRA into another adapter, and resumed at the wrong epoch."""
    fields = {"use_lora": use_lora, "save_freq": 2, "per_prompt_stat_tracking": True, "per_prompt_stat_tracking_min_count": 2,
              "output_dir": str(tmp_path / "run")}
    whole = make_trainer(num_epochs=4, **fields)
    whole.train()
    (tmp_path / "run" / "checkpoint-4").rename(tmp_path / "away")
    cut = make_trainer(num_epochs=4, resume_from=str(tmp_path / "run"), **fields)
    assert cut.epoch == 2 and cut.global_step == 4
    cut.prompt_function = lambda turn=iter(PROMPTS * 9): (next(turn), {})  # two epochs of four prompts are whole turns
    cut.train()
    assert equal(trained_part(whole), trained_part(cut)) and whole.stats == cut.stats
    assert whole.stat_tracker.stats == cut.stat_tracker.stats
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [1, 2, 3, 4]


def test_only_the_newest_checkpoints_are_kept(make_trainer, tmp_path):
    trainer = make_trainer(save_freq=1, num_checkpoint_limit=2, num_epochs=4, use_lora=True)
    trainer.train()
    assert sorted(p.name for p in (tmp_path / "out").glob("checkpoint*")) == ["checkpoint-3", "checkpoint-4"]


def test_project_kwargs_say_where_checkpoints_go(make_trainer, tmp_path):
    trainer = make_trainer(save_freq=1, use_lora=True, project_kwargs={
        "project_dir": str(tmp_path / "mine"), "automatic_checkpoint_naming": True, "iteration": 1, "total_limit": 5})
    trainer.train(1)
    assert (tmp_path / "mine" / "checkpoint-1").is_dir()


def draw(pipeline, seed=3):
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return pipeline(PROMPTS, num_inference_steps=4, eta=1.0, guidance_scale=5.0, output_type="pt",
                    generator=torch.Generator().manual_seed(seed)).images


@pytest.mark.parametrize("use_lora", [False, True])
def test_what_is_saved_opens_in_the_plain_pipeline_and_draws_the_same_pictures(use_lora, make_trainer, tiny, tmp_path):
    """A5: 0.7.10 saved a UNet under LoRA's names, which re-initialised its attention when it was loaded."""
    trainer = make_trainer(use_lora=use_lora, sample_num_steps=4, train_learning_rate=1e-2, lora_alpha=16)
    trainer.step(0, 0)
    trainer.save_pretrained(str(tmp_path / "saved"))
    plain = StableDiffusionPipeline.from_pretrained(tiny if use_lora else tmp_path / "saved")
    untouched = draw(plain)
    if use_lora:
        plain.load_lora_weights(tmp_path / "saved")
    got = draw(plain)
    want = trainer.draw(PROMPTS, torch.Generator().manual_seed(3))[0].images
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert not use_lora or (untouched - got).abs().max() > 1e-3
    assert "DDPO" not in (tmp_path / "saved" / "README.md").read_text().split("# ")[0]


def test_a_saved_lora_goes_on_training_in_one_adapter(make_trainer, trained_part, tiny, tmp_path):
    """A6"""
    trainer = make_trainer(use_lora=True, train_learning_rate=1e-2, lora_alpha=16)
    trainer.step(0, 0)
    trainer.save_pretrained(str(tmp_path / "saved"))
    loaded = DefaultDDPOStableDiffusionPipeline(tiny, use_lora=True, lora_weights=str(tmp_path / "saved"))
    assert len(loaded.unet.peft_config) == 1 and loaded.unet.peft_config[loaded.adapter].lora_alpha == 16
    assert [p.shape for p in loaded.get_trainable_layers()] == [p.shape for p in trained_part(trainer).values()]
    torch.testing.assert_close(draw(loaded.sd_pipeline), draw(trainer.sd_pipeline.sd_pipeline))


def test_the_adapter_is_0_7_10_s(make_pipeline):
    pipeline = make_pipeline(use_lora=True)
    config = pipeline.unet.peft_config[pipeline.adapter]
    assert (config.r, config.lora_alpha) == (4, 4) and set(config.target_modules) == {"to_k", "to_q", "to_v", "to_out.0"}
    assert all(p.shape[0] == 4 or p.shape[1] == 4 for p in pipeline.get_trainable_layers())


def test_the_model_card_tells_how_to_load_it(make_trainer, tmp_path):
    trainer = make_trainer(use_lora=True)
    trainer.create_model_card(str(tmp_path / "card"))
    card = (tmp_path / "card" / "README.md").read_text()
    assert card.startswith("---\n") and "# TRL DDPO Model" in card and 'load_lora_weights(".")' in card


def test_another_kind_of_pipeline_is_refused_by_name(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(InputError, match="is a StableDiffusionXLPipeline, and only a StableDiffusionPipeline is trained here"):
        DefaultDDPOStableDiffusionPipeline(tmp_path)


def test_a_config_of_another_trainer_is_refused(make_pipeline):
    with pytest.raises(ValueError, match="config must be a DDPOConfig, not dict"):
        DDPOTrainer({}, brightness, None, make_pipeline())
