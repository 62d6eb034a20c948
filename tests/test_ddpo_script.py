"""ddpo.py as a user runs it: what a run leaves behind, kill and resume, two ranks, bad input."""
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import ddpo  # before diffusers: it hides what diffusers prints when it is imported

# isort: split
import accelerate
import datasets
import pytest
import torch
import transformers
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from common import TOY, InputError
from ddpo import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline, main

ROOT = Path(__file__).resolve().parent.parent
LORA = "pytorch_lora_weights.safetensors"
KINDS = ("lora", "full")


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def small(folder, **fields):
    return DDPOConfig(**{"sample_num_steps": 3, "num_epochs": 1, "num_samples": 0,
                         "lora_alpha": 16, "output_dir": str(folder), **fields})


def job(name, folder, *launcher):
    """Run the function `name` of this file in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *launcher, __file__, name, str(folder)], cwd=ROOT,
                          capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    return done


def weights_of(folder, kind="lora"):
    return load_file(folder / (LORA if kind == "lora"
                               else "unet/diffusion_pytorch_model.safetensors"))


def assert_equal(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def once(make):
    """Call `make` for the first test that asks. (A module's fixture would run before conftest.py
    resets accelerate.)"""
    kept = []

    def get(factory):
        if not kept:
            kept.append(make(factory))
        return kept[0]

    return get


# ------------------------------------------------------------------------------------------- a run
@once
def two_epochs_of_the_toy(factory):
    out = factory.mktemp("run")
    return out, main(small(out, num_epochs=2, sample_num_steps=4, sample_batch_size=4,
                           train_batch_size=4, num_samples=10))


@pytest.fixture
def finished_run(tmp_path_factory):
    return two_epochs_of_the_toy(tmp_path_factory)


def test_a_run_leaves_a_lora_that_diffusers_loads(finished_run):
    pipeline = StableDiffusionPipeline.from_pretrained(TOY / "pipeline")
    before = pipeline.unet.state_dict()
    pipeline.load_lora_weights(finished_run[0])
    assert len(pipeline.unet.state_dict()) > len(before)
    weights = weights_of(finished_run[0])
    moved = [weights[name].abs().sum() > 0 for name in weights if ".up." in name or "_B" in name]
    assert moved and all(moved)


def test_images_and_their_rewards_are_kept_before_and_after(finished_run):
    out, _ = finished_run
    for title in ("before", "after"):
        assert Image.open(out / f"{title}.png").size == (8 * 96, 2 * 96)
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0] * 10 + [2] * 10
    prompts = (TOY / "shapes.txt").read_text().splitlines()
    assert [row["prompt"] for row in rows] == prompts[:10] * 2
    assert all(0 <= row["reward"] <= 1 for row in rows)


def test_images_before_and_after_differ_by_nothing_but_training(tmp_path):
    main(small(tmp_path, num_samples=3, sample_batch_size=2, train_learning_rate=0.0))
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in rows[:3]] == [row["reward"] for row in rows[3:]]
    assert len({row["reward"] for row in rows}) == 3  # each image has noise of its own
    assert Image.open(tmp_path / "before.png") == Image.open(tmp_path / "after.png")


def test_the_change_is_printed_per_image_with_its_standard_error(tmp_path, capsys):
    main(small(tmp_path, num_samples=3, sample_batch_size=2, train_batch_size=2))
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    pairs = zip(rows[:3], rows[3:], strict=True)
    change = [after["reward"] - before["reward"] for before, after in pairs]
    mean = statistics.mean(change)
    error = statistics.stdev(change) / 3**0.5
    lines = [line for line in capsys.readouterr().out.splitlines() if "training:" in line]
    assert [line.split()[0] for line in lines] == ["before", "after"]
    assert "mean change" not in lines[0]
    assert f"mean change {mean:+.3f}, standard error {error:.3f}" in lines[1]


def test_metrics_hold_a_line_per_epoch(finished_run):
    rows = metrics(finished_run[0])
    assert [row["update"] for row in rows] == [1, 2]
    assert [row["global_step"] for row in rows] == [2, 4]
    assert all(0 <= row["reward_mean"] <= 1 and row["approx_kl"] >= 0 for row in rows)
    assert rows[-1] == {"update": 2, **finished_run[1]}


def test_the_model_card_says_how_the_model_was_made(finished_run):
    card = (finished_run[0] / "README.md").read_text()
    assert "2 epochs, 4 optimizer steps" in card
    assert "shape_alignment" in card and "toy/pipeline" in card


def test_full_training_moves_all_of_the_unet_and_nothing_else(tmp_path):
    main(small(tmp_path, lora_r=0, bf16=True))
    plain, toy = (StableDiffusionPipeline.from_pretrained(folder)
                  for folder in (tmp_path, TOY / "pipeline"))
    for part in ("unet", "vae", "text_encoder"):
        pairs = zip(getattr(plain, part).parameters(), getattr(toy, part).parameters(), strict=True)
        assert {not torch.equal(a, b) for a, b in pairs} == {part == "unet"}, part


def test_a_revision_is_asked_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def load_config(name, **kwargs):
        asked.append((name, kwargs["revision"]))
        raise OSError("offline")

    monkeypatch.setattr(ddpo.DiffusionPipeline, "load_config", load_config)
    for revision in ("v2", None):
        with pytest.raises(InputError, match="my/model can't be loaded"):
            main(small(tmp_path, model_name="my/model", revision=revision))
    assert asked == [("my/model", "v2"), ("my/model", None)]


def test_any_function_in_a_file_may_be_the_reward(tmp_path):
    (tmp_path / "mine.py").write_text("""
from neighbor import offset

def red(images, prompts, rows):
    assert images.shape == (2, 3, 32, 32) and [row["kind"] for row in rows] == ["test"] * 2
    return images[:, 0].mean(dim=(1, 2)) + offset
""")
    (tmp_path / "neighbor.py").write_text("offset = 2")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red circle", "kind": "test"}\n')
    stats = main(small(tmp_path / "out", reward_function=f"{tmp_path}/mine.py:red",
                       prompts=str(tmp_path / "p.jsonl"), sample_batch_size=2,
                       sample_num_batches_per_epoch=1))
    assert 2 < stats["reward_mean"] <= 3


@pytest.mark.parametrize("column", ["prompt", "text", "query"])
def test_prompts_come_from_a_column_with_one_of_three_names(column, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"other": "sky", column: "a red circle"}))
    (prompt, row), = ddpo.load_image_prompts(str(tmp_path / "p.jsonl"))
    assert prompt == "a red circle" and row == {"other": "sky", column: "a red circle"}


def test_prompts_come_from_the_split_and_configuration_that_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: {
        split: datasets.Dataset.from_dict({"prompt": [f"{name} {config} {split}"]})
        for split in ("train", "mine")})
    (tmp_path / "reward.py").write_text(REWARD.format(log=str(tmp_path / "shown.jsonl"), kill=0))
    fields = {"prompts": "my/set", "reward_function": f"{tmp_path}/reward.py:brightness"}
    main(small(tmp_path / "out", **fields))
    main(small(tmp_path / "named", **fields, dataset_split="mine", dataset_config="v2"))
    prompts = [prompt for batch, _ in shown(tmp_path) for prompt in batch]
    assert prompts == ["my/set None train"] * 2 + ["my/set v2 mine"] * 2
    with pytest.raises(InputError, match="dataset_split=yours.*train, mine"):
        main(small(tmp_path / "none", **fields, dataset_split="yours"))


def test_tensorboard_gets_numbers_and_images_under_logdir(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator")
    stats = main(small(tmp_path, log_with="tensorboard", logdir="events", num_epochs=2,
                       train_num_inner_epochs=2, sample_batch_size=2, train_batch_size=2))
    (file, *_) = (tmp_path / "events").rglob("events.out.tfevents*")
    log = event_accumulator.EventAccumulator(str(file))
    log.Reload()
    steps = {name: [event.step for event in log.Scalars(name)] for name in log.Tags()["scalars"]}
    # two minibatches in each of two inner epochs; an epoch's rewards come before its updates
    assert steps["reward_mean"] == steps["reward_std"] == [0, 4]
    for name in ("loss", "approx_kl", "clipfrac", "inner_epoch"):
        assert steps[name] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [event.value for event in log.Scalars("inner_epoch")] == [0, 0, 1, 1] * 2
    assert log.Scalars("reward_mean")[1].value == pytest.approx(stats["reward_mean"])
    losses = [event.value for event in log.Scalars("loss")][4:]
    assert sum(losses) / 4 == pytest.approx(stats["loss"], rel=1e-4, abs=1e-6)
    assert [event.step for event in log.Images("samples")] == [0, 0, 4, 4] or log.Images("samples")


def test_a_run_has_the_name_it_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fields = {"output_dir": None, "run_name": "try 7", "exp_name": "shapes"}
    main(DDPOConfig(**{**small("").to_dict(), **fields}))
    assert (tmp_path / "runs" / "try 7" / "metrics.jsonl").is_file()


def test_the_card_of_an_unguided_model_says_so(tmp_path):
    main(small(tmp_path, train_cfg=False))
    assert "guidance_scale=1.0" in (tmp_path / "README.md").read_text()


# --------------------------------------------------------------------------------- kill and resume
REWARD = """
import json, os, signal

def brightness(images, prompts, metadata):
    rewards = images.mean(dim=(1, 2, 3)).tolist()
    with open({log!r}, "a") as file:
        file.write(json.dumps([prompts, rewards]) + "\\n")
    if len(open({log!r}).readlines()) == {kill}:
        os.kill(os.getpid(), signal.SIGKILL)
    return rewards
"""


def logged_run(folder, kind, kill=0, **fields):
    """Four epochs of two batches. The reward logs what it is shown, and kills the process in its
    call number `kill`."""
    (folder / "reward.py").write_text(REWARD.format(log=str(folder / "shown.jsonl"), kill=kill))
    main(small(folder / "out", num_epochs=4, lora_r=4 * (kind == "lora"), pictures_per_prompt=2,
               save_freq=2 if kind == "lora" else 1,
               reward_function=f"{folder}/reward.py:brightness", **fields))


def shown(folder):
    return [json.loads(line) for line in (folder / "shown.jsonl").read_text().splitlines()]


def killed_runs(folder):
    """A LoRA run dies while it scores epoch 4, a full one when checkpoint 3 is half saved."""
    transformers.utils.logging.disable_progress_bar()  # both as the command line does
    datasets.disable_progress_bars()
    for kind in KINDS:
        (folder / kind).mkdir()
        child = os.fork()
        if child == 0:
            try:
                if kind == "full":
                    save, calls = accelerate.Accelerator.save_state, itertools.count(1)

                    def killed_save(*args, save=save, calls=calls, **kwargs):
                        save(*args, **kwargs)
                        if next(calls) == 3:
                            os.kill(os.getpid(), signal.SIGKILL)

                    accelerate.Accelerator.save_state = killed_save
                logged_run(folder / kind, kind, kill=8 if kind == "lora" else 0)
            finally:
                os._exit(1)
        print("exit", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@once
def killed(factory):
    folder = factory.mktemp("killed")
    return folder, job("killed_runs", folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_resumes_to_exactly_the_same_numbers(kind, tmp_path, tmp_path_factory):
    folder, done = killed(tmp_path_factory)
    assert re.findall("exit.*", done.stdout) == ["exit -9", "exit -9"]
    cut = folder / kind
    # the LoRA run has an epoch in its metrics that is in no checkpoint; so has the full run
    assert [row["update"] for row in metrics(cut / "out")] == [1, 2, 3]
    kept = sorted(path.name for path in (cut / "out").glob("checkpoint-*"))
    assert kept == (["checkpoint-2"] if kind == "lora" else ["checkpoint-1", "checkpoint-2"])
    before = shown(cut)
    logged_run(tmp_path, kind)
    logged_run(cut, kind, resume_from=str(cut / "out"))
    assert metrics(cut / "out") == metrics(tmp_path / "out")
    assert [row["update"] for row in metrics(cut / "out")] == [1, 2, 3, 4]
    assert_equal(weights_of(cut / "out", kind), weights_of(tmp_path / "out", kind))
    # the same prompts and images: before the kill, and again from the checkpoint on
    want = shown(tmp_path)
    assert before == want[:len(before)] and shown(cut)[len(before):] == want[4:]
    prompts = [prompt for batch, _ in want for prompt in batch]
    assert all(first == second for first, second in zip(prompts[::2], prompts[1::2], strict=True))
    assert len(set(prompts)) > 1
    names = {path.name for path in (cut / "out").iterdir()}
    assert "checkpoint-4" in names and "checkpoint.tmp" not in names


def test_a_run_shows_progress_and_reward_and_no_chatter_of_libraries(tmp_path_factory):
    done = killed(tmp_path_factory)[1]
    assert done.stderr == ""
    assert re.search(r"^epoch 3/4: reward \d\.\d", done.stdout, re.MULTILINE)


# --------------------------------------------------------------------------------------- two ranks
class OwnNoise(DefaultDDPOStableDiffusionPipeline):
    """Takes the noise of sample n, counted over all ranks, from a generator with the seed n."""

    def __call__(self, prompt_embeds, **kwargs):
        seeds = [next(self.numbers) for _ in prompt_embeds]
        kwargs["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        return super().__call__(prompt_embeds=prompt_embeds, **kwargs)


EIGHT = ["a red circle", "a blue square", "a green triangle", "a yellow circle"] * 2


def reward_of_number_and_image(images, prompts, numbers):
    # far apart, for the same prompt too: advantages divide by the spread of the rewards, and a
    # spread near 0 would magnify the rounding of the images
    pairs = zip(numbers, images, strict=True)
    return [3 * number % 7 + image.mean().item() for number, image in pairs]


def two_epochs(folder, kind, rank, ranks):
    """Two epochs of 8 samples of all ranks together, by gradient descent, two updates each.

    AdamW far below its epsilon is gradient descent. AdamW itself would forgive a gradient that is
    off by a factor, and turn its rounding into whole steps where the gradient is near 0."""
    torch.manual_seed(0)
    pipeline = OwnNoise(TOY / "pipeline", use_lora=kind == "lora", lora_alpha=16)
    pipeline.numbers = itertools.count(rank, ranks)
    before = {name: p.detach().clone() for name, p in pipeline.unet.named_parameters()}
    samples = itertools.count(rank, ranks)

    def next_prompt():
        number = next(samples)
        return EIGHT[number % 8], number

    config = DDPOConfig(
        sample_num_steps=3, sample_batch_size=4 // ranks, sample_num_batches_per_epoch=2,
        train_batch_size=2, train_gradient_accumulation_steps=4 // ranks,
        train_num_inner_epochs=2, train_clip_range=0.05, train_max_grad_norm=1.0,
        train_adam_beta1=0.0, train_adam_epsilon=1e4, train_adam_weight_decay=0.0,
        train_learning_rate=1e3 if kind == "lora" else 300.0,
        per_prompt_stat_tracking=True, per_prompt_stat_tracking_min_count=2,
        output_dir=str(folder / f"{kind}-{ranks}"))
    trainer = DDPOTrainer(config, reward_of_number_and_image, next_prompt, pipeline)
    trainer.train(2)
    after = {name: p.detach() for name, p in pipeline.unet.named_parameters() if p.requires_grad}
    torch.save({"weights": after, "before": {name: before[name] for name in after},
                "stats": trainer.stats, "remembered": trainer.stat_tracker.get_stats()},
               folder / f"{kind}-{ranks}-{rank}.pt")


def on_ranks(folder):
    """All that the tests want of two ranks, in one start of torchrun."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for kind in KINDS:
        two_epochs(folder, kind, rank, ranks)

    images = []

    def keep(batch, prompts, metadata):
        images.append(batch)
        return batch.mean(dim=(1, 2, 3))

    def train(out, **fields):
        torch.manual_seed(0)
        pipeline = DefaultDDPOStableDiffusionPipeline(TOY / "pipeline")
        config = DDPOConfig(sample_num_steps=3, num_epochs=2, output_dir=str(out), **fields)
        trainer = DDPOTrainer(config, keep, lambda: ("a red circle", {}), pipeline)
        trainer.train()
        if rank == 0:  # as users write it: the other rank goes on
            trainer.save_pretrained(str(out))

    save, final = accelerate.Accelerator.save_state, folder / "whole" / "checkpoint-1"

    def late_save(*args, **kwargs):
        """Rank 1 saves last: a checkpoint that has its name before then lacks rank 1's part."""
        for _ in range(20):
            if not final.exists():
                time.sleep(0.05)
        return save(*args, **kwargs)

    if rank == 1:
        accelerate.Accelerator.save_state = late_save
    train(folder / "whole")
    accelerate.Accelerator.save_state = save
    if rank == 0:  # what a run that was killed in its second epoch has left
        shutil.copytree(final, folder / "cut" / "checkpoint-1")
        shutil.copy(folder / "whole" / "metrics.jsonl", folder / "cut")
    torch.distributed.barrier()
    train(folder / "cut", resume_from=str(folder / "cut"))
    torch.save(images, folder / f"images-{rank}.pt")

    (folder / f"script-{rank}").mkdir()
    reward = REWARD.format(log=str(folder / f"script-{rank}" / "shown.jsonl"), kill=0)
    (folder / f"script-{rank}" / "reward.py").write_text(reward)
    main(small(folder / "script", num_epochs=2, num_samples=2, sample_num_batches_per_epoch=4,
               seed=2**32 - 1,  # the largest: rank 1's own begins again at 0
               reward_function=f"{folder}/script-{rank}/reward.py:brightness"))


@once
def finished_ranks(factory):
    folder = factory.mktemp("ranks")
    for kind in KINDS:
        two_epochs(folder, kind, 0, 1)
    job("on_ranks", folder, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    return folder


@pytest.fixture
def ranks(tmp_path_factory):
    return finished_ranks(tmp_path_factory)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_end_with_the_weights_of_one_process(kind, ranks):
    """Ranks sum in another order, at most 1e-4 of how far the weights move; one rank's own gradient
    in place of the average is about as far off as the move is long."""
    names = ("1-0", "2-0", "2-1")
    one, *two = [torch.load(ranks / f"{kind}-{name}.pt", weights_only=False) for name in names]
    assert_equal(two[0]["weights"], two[1]["weights"])
    assert_equal(two[0]["before"], one["before"])
    runs = (one["before"], one["weights"], two[0]["weights"])
    before, want, got = [torch.cat([p.flatten() for p in run.values()]) for run in runs]
    move = (want - before).norm()
    assert move > 1e-4 and (got - want).norm() < 1e-3 * move, ((got - want).norm() / move, move)
    for rank in two:
        assert rank["stats"] == pytest.approx(one["stats"], rel=1e-3, abs=1e-5)
        assert rank["remembered"].keys() == one["remembered"].keys()
        for prompt, stats in one["remembered"].items():
            assert rank["remembered"][prompt] == pytest.approx(stats, rel=1e-4)


def test_each_rank_draws_noise_of_its_own(ranks):
    mine, other = (torch.load(ranks / f"images-{rank}.pt") for rank in (0, 1))
    assert not any(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_two_ranks_resume_to_exactly_the_same_numbers(ranks):
    assert metrics(ranks / "cut") == metrics(ranks / "whole")
    assert [row["update"] for row in metrics(ranks / "cut")] == [1, 2]
    assert_equal(weights_of(ranks / "cut"), weights_of(ranks / "whole"))
    for rank in (0, 1):  # two batches per epoch: whole 1, whole 2, then the resumed epoch
        images = torch.load(ranks / f"images-{rank}.pt")
        assert len(images) == 6
        assert torch.equal(torch.stack(images[2:4]), torch.stack(images[4:]))


def test_the_script_on_two_ranks_asks_each_for_prompts_of_its_own(ranks):
    prompts = [[batch for batch, _ in shown(ranks / f"script-{rank}")] for rank in (0, 1)]
    # rank 0 also scores the images before and after, one image at a time
    asked = [prompts[0][2:-2], prompts[1]]
    assert len(asked[0]) == len(asked[1]) == 8 and asked[0] != asked[1]
    assert len(metrics(ranks / "script")) == 2 and (ranks / "script" / LORA).is_file()
    rewards = [[reward for _, batch in shown(ranks / f"script-{rank}") for reward in batch]
               for rank in (0, 1)]
    last = rewards[0][6:-2] + rewards[1][4:]
    mean = metrics(ranks / "script")[-1]["reward_mean"]
    assert mean == pytest.approx(sum(last) / 8, rel=1e-5)


# --------------------------------------------------------------------------------------- bad input
BAD = {
    "eta 0": (dict(sample_eta=0.0), "sample_eta.*0.0"),
    "eta 2": (dict(sample_eta=2.0), "sample_eta.*2.0"),
    "sizes": (dict(sample_batch_size=3, train_batch_size=4), "sample_batch_size.* 6 .*= 4"),
    "no timestep": (dict(train_timestep_fraction=0.1), "train_timestep_fraction.*0.1"),
    "too many timesteps": (dict(train_timestep_fraction=1.5), "train_timestep_fraction.*1.5"),
    "one sample": (dict(sample_num_batches_per_epoch=1), "sample_num_batches_per_epoch"),
    "unknown pipeline": (dict(model_name="./nowhere"), "model_name.*./nowhere"),
    "not a pipeline": (dict(model_name=str(TOY / "model")), "model_name.*toy/model"),
    "unknown lora": (dict(lora_weights="./nowhere"), "lora_weights.*./nowhere"),
    "unknown reward": (dict(reward_function="beauty"), "reward_function.*beauty"),
    "no such function": (dict(reward="x = 1"), "reward_function.*mine.py:f"),
    "reward raises": (dict(reward="def f(i, p, m):\n    raise KeyError('lost')"),
                      "mine.py:f.*lost.*mine.py:2"),
    "too few": (dict(reward="def f(i, p, m):\n    return []"), "reward.* 0 .* 1 "),
    "NaN": (dict(reward="def f(i, p, m):\n    return [float('nan')]"), "reward.*'a .*' .*nan"),
    "other prompts": (dict(prompt_file="a sunny day"), "'a sunny day'"),
    "unknown prompts": (dict(prompts="nowhere.txt"), "nowhere.txt"),
    "empty prompt": (dict(prompt_file="a red circle\n \na red circle"), "prompts.*p.txt.* 1"),
    "no prompts": (dict(prompt_table="caption\na red circle\n"), "prompts.*p.csv.*caption"),
    "nothing to resume": (dict(resume_from="nowhere"), "resume.*nowhere"),
    "8 bits": (dict(train_use_8bit_adam=True), "train_use_8bit_adam"),
    **{f"{name} 0": ({name: 0}, f"{name}.*0") for name in (
        "num_epochs", "save_freq", "num_checkpoint_limit", "sample_num_steps", "sample_batch_size",
        "sample_num_batches_per_epoch", "train_batch_size", "train_gradient_accumulation_steps",
        "train_num_inner_epochs", "train_max_grad_norm", "train_clip_range", "train_adv_clip_max",
        "per_prompt_stat_tracking_buffer_size", "per_prompt_stat_tracking_min_count", "max_workers",
        "pictures_per_prompt", "lora_alpha")},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_before_any_weight_moves(case, tmp_path, monkeypatch):
    fields, words = dict(BAD[case][0]), BAD[case][1]
    if "reward" in fields:
        (tmp_path / "mine.py").write_text(fields.pop("reward"))
        fields["reward_function"] = f"{tmp_path}/mine.py:f"
    if "prompt_file" in fields:
        (tmp_path / "p.txt").write_text(fields.pop("prompt_file"))
        fields["prompts"] = str(tmp_path / "p.txt")
    if "prompt_table" in fields:
        (tmp_path / "p.csv").write_text(fields.pop("prompt_table"))
        fields["prompts"] = str(tmp_path / "p.csv")
    moved = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: moved.append(1))
    with pytest.raises(InputError, match=words) as error:
        main(small(tmp_path / "out", **fields))
    assert not moved and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------ the toy
def test_the_toy_s_reward_rises_within_a_few_epochs(tmp_path):
    main(small(tmp_path, num_epochs=5, sample_num_steps=8, sample_batch_size=24,
               sample_num_batches_per_epoch=1, train_batch_size=8, lora_r=0, save_freq=100))
    means = [row["reward_mean"] for row in metrics(tmp_path)]
    assert sum(means[-2:]) / 2 > sum(means[:2]) / 2 + 0.03


def test_the_toy_s_own_drawings_earn_the_whole_reward():
    """toy/make_pipeline.py and the reward agree on what a red circle is."""
    draw = runpy.run_path(str(ROOT / "toy" / "make_pipeline.py"), run_name="toy")["draw"]
    prompts = (TOY / "shapes.txt").read_text().splitlines()
    assert len(prompts) == 12
    images = torch.stack([draw(prompt, 1.0, 2.0, -1.0) for prompt in prompts])
    assert min(ddpo.shape_alignment(images, prompts, None)) > 0.9


def test_the_toy_pipeline_is_small_and_opens_in_diffusers():
    files = [path for path in (TOY / "pipeline").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2e6
    pipeline = StableDiffusionPipeline.from_pretrained(TOY / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert pipeline("a red circle", num_inference_steps=2).images[0].size == (32, 32)


if __name__ == "__main__":
    {"killed_runs": killed_runs, "on_ranks": on_ranks}[sys.argv[1]](Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # torch may abort as it frees the groups of several runs: end here
