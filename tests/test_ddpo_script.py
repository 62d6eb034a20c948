"""ddpo.py as a user runs it: the command line, what a run leaves behind, kill and resume, several ranks, and bad input."""
import ast
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import tyro
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import ddpo
from common import TOY, InputError, run
from ddpo import DDPOConfig, ScriptConfig, main

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--sample-batch-size", "1", "--train-batch-size", "1", "--sample-num-steps", "3", "--num-samples", "0", "--num-epochs"]
LORA = "pytorch_lora_weights.safetensors"


def script(*flags, **kwargs):
    return subprocess.run([sys.executable, "ddpo.py", *map(str, flags)], cwd=ROOT, capture_output=True, text=True, **kwargs)


def torchrun(*args, ranks=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def small(folder, **fields):
    return ScriptConfig(**{"sample_num_steps": 3, "sample_batch_size": 1, "train_batch_size": 1, "num_epochs": 1,
                           "num_samples": 0, "output_dir": str(folder), **fields})


# ------------------------------------------------------------------------------------------------ a run
@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    done = script("--num-epochs", 2, "--sample-num-steps", 4, "--sample-batch-size", 4, "--train-batch-size", 4, "--output-dir", out)
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_run_leaves_a_lora_that_the_plain_pipeline_loads(finished_run):
    pipeline = StableDiffusionPipeline.from_pretrained(TOY / "pipeline")
    before = pipeline.unet.state_dict()
    pipeline.load_lora_weights(finished_run[0])
    assert len(pipeline.unet.state_dict()) > len(before)
    weights = load_file(finished_run[0] / LORA)
    assert any(weights[name].abs().sum() > 0 for name in weights if "lora_B" in name or "lora.up" in name)


def test_pictures_and_their_rewards_are_kept_before_and_after(finished_run):
    out, done = finished_run
    for title in ("before", "after"):
        assert Image.open(out / f"{title}.png").size == (8 * 96, 6 * 96)
        assert re.search(rf"{title} training: reward \d\.\d+ ± \d\.\d+ in 48 pictures", done.stdout + done.stderr)
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in rows] == [0] * 48 + [2] * 48
    assert [r["prompt"] for r in rows[:48]] == [r["prompt"] for r in rows[48:]]
    assert {"a red circle", "a yellow triangle"} <= {r["prompt"] for r in rows}


def test_metrics_hold_a_line_for_each_epoch(finished_run):
    rows = metrics(finished_run[0])
    assert [row["update"] for row in rows] == [1, 2] and [row["global_step"] for row in rows] == [2, 4]
    assert all(0 <= row["reward_mean"] <= 1 and row["approx_kl"] >= 0 for row in rows)


def test_the_run_tells_reward_and_time_left_and_no_library_chatter(finished_run):
    lines = [line for line in finished_run[1].stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert re.search(r"2/2 \[\d\d:\d\d<\d\d:\d\d.*reward=", lines[-1]), lines[-1]
    assert [line for line in lines if "epoch" not in line] == []


def test_the_model_card_tells_how_the_model_was_made(finished_run):
    card = (finished_run[0] / "README.md").read_text()
    assert "2 epochs, 4 optimizer steps" in card and "shape_alignment" in card and "toy/pipeline" in card


def test_help_tells_every_option(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(ScriptConfig, args=["--help"])
    told = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in told for name in DDPOConfig.__dataclass_fields__)


def test_every_option_has_a_sentence():
    tree = ast.parse((ROOT / "ddpo.py").read_text())
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "DDPOConfig").body
    fields = [n.target.id for n in body if isinstance(n, ast.AnnAssign)]
    documented = [a.target.id for a, b in zip(body, body[1:]) if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)]
    assert fields == documented and len(fields) >= 50


def test_every_option_is_read():
    source = (ROOT / "ddpo.py").read_text()
    for name in DDPOConfig.__dataclass_fields__:
        assert re.search(rf"(config|\bc|self)\.{name}\b", source), f"nothing reads {name}"


def test_the_whole_unet_may_train_and_opens_as_a_pipeline(tmp_path):
    main(small(tmp_path, use_lora=False, mixed_precision="bf16"))
    plain, toy = (StableDiffusionPipeline.from_pretrained(folder) for folder in (tmp_path, TOY / "pipeline"))
    moved = [not torch.equal(a, b) for a, b in zip(plain.unet.parameters(), toy.unet.parameters())]
    assert all(moved) and all(torch.equal(a, b) for a, b in zip(plain.vae.parameters(), toy.vae.parameters()))


def test_any_function_in_a_file_may_be_the_reward(tmp_path):
    (tmp_path / "mine.py").write_text("def red(images, prompts, rows):\n"
                                      "    assert images.shape == (2, 3, 32, 32) and rows[0]['kind'] == 'test'\n"
                                      "    return images[:, 0].mean(dim=(1, 2)) + len(prompts)\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red circle", "kind": "test"}\n')
    stats = main(small(tmp_path / "out", reward_function=f"{tmp_path}/mine.py:red", prompts=str(tmp_path / "p.jsonl"),
                       sample_batch_size=2, sample_num_batches_per_epoch=1))
    assert 2 < stats["reward_mean"] <= 3


@pytest.mark.parametrize("per", [1, 2, 3])
def test_a_prompt_is_drawn_so_many_times_in_a_row_and_resuming_asks_for_the_same_prompts(per, tmp_path, monkeypatch):
    seen, inner = [], ddpo.DDPOTrainer._generate_samples
    monkeypatch.setattr(ddpo.DDPOTrainer, "_generate_samples", lambda self, n, size: seen.extend(
        self.prompt_function()[0] for _ in range(n * size)) or inner(self, n, size))
    monkeypatch.setattr(ddpo.DDPOTrainer, "train", lambda self: self._generate_samples(2, 6))
    main(small(tmp_path, pictures_per_prompt=per))
    runs = [seen[i:i + per] for i in range(0, 12, per)]
    assert all(len(set(run)) == 1 for run in runs) and len(set(seen)) > 1


def test_tensorboard_gets_numbers_and_pictures_under_logdir(tmp_path):
    main(small(tmp_path, log_with="tensorboard", logdir="events"))
    (file, *_) = (tmp_path / "events").rglob("events.out.tfevents*")
    assert b"reward_mean" in file.read_bytes() and b"PNG" in file.read_bytes()


def test_a_run_has_the_name_it_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(DDPOConfig(**{**small("").to_dict(), "output_dir": None, "run_name": "try 7", "exp_name": "shapes"}))
    assert (tmp_path / "runs" / "try 7" / "metrics.jsonl").is_file()


# ------------------------------------------------------------------------------------------------ kill and resume
@pytest.mark.parametrize("kind", [[], ["--no-use-lora"]], ids=["lora", "full"])
def test_a_killed_run_goes_on_to_exactly_the_same_numbers(kind, tmp_path):
    main(small(tmp_path / "whole", num_epochs=6, use_lora=not kind))
    killed = subprocess.Popen([sys.executable, "ddpo.py", *SMALL, "6", *kind, "--output-dir", str(tmp_path / "cut")], cwd=ROOT,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "cut" / "checkpoint-2").exists():
        assert killed.poll() is None, "the run ended before it was killed"
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    main(small(tmp_path / "cut", num_epochs=6, use_lora=not kind, resume_from=str(tmp_path / "cut")))
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert [row["update"] for row in metrics(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]
    name = "unet/diffusion_pytorch_model.safetensors" if kind else LORA
    a, b = (load_file(tmp_path / run / name) for run in ("cut", "whole"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------------------------------------ several ranks
TWO_EPOCHS = """
import os, sys
import torch
from common import TOY
from ddpo import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
mine, randn, randperm = lambda rows: rows[rank::ranks], torch.randn, torch.randperm
for kind in ("lora", "full"):
    prompts = iter(mine(["a red circle", "a blue square", "a green triangle", "a yellow circle"] * 99))
    torch.manual_seed(0)
    pipeline = DefaultDDPOStableDiffusionPipeline(TOY / "pipeline", use_lora=kind == "lora")
    config = DDPOConfig(sample_num_steps=3, sample_batch_size=4 // ranks, sample_num_batches_per_epoch=1,
                        train_batch_size=4 // ranks, train_num_inner_epochs=2, train_clip_range=0.01, train_adam_epsilon=1e-4,
                        train_learning_rate=1e-3, per_prompt_stat_tracking=True, per_prompt_stat_tracking_min_count=2)
    trainer = DDPOTrainer(config, lambda images, *_: images.mean(dim=(1, 2, 3)), lambda: (next(prompts), {}), pipeline)
    draw, noise = torch.rand(3), torch.Generator().manual_seed(1)
    torch.randn = lambda shape, **kwargs: mine(randn(4, *shape[1:], generator=noise))  # the k-th noise of both ranks together
    torch.randperm = torch.arange
    for epoch in range(2):
        trainer.step(epoch, trainer.global_step)
    torch.randn, torch.randperm = randn, randperm
    torch.save({"weights": {n: p.detach() for n, p in pipeline.unet.named_parameters() if p.requires_grad}, "draw": draw,
                "stats": trainer.stats, "prompts": list(trainer.stat_tracker.stats)}, f"{sys.argv[1]}/{kind}-{ranks}-{rank}.pt")
"""


@pytest.fixture(scope="module")
def epochs_on_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "epochs.py").write_text(TWO_EPOCHS)
    for ranks in (1, 2):
        done = torchrun(folder / "epochs.py", folder, ranks=ranks)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_two_ranks_end_with_the_weights_of_one_process(kind, epochs_on_ranks):
    """A1: 0.7.10 never averaged the gradients of its ranks."""
    one, *two = [torch.load(epochs_on_ranks / f"{kind}-{name}.pt") for name in ("1-0", "2-0", "2-1")]
    assert all(torch.equal(two[0]["weights"][name], two[1]["weights"][name]) for name in one["weights"])
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two[0]["weights"][name], weight, rtol=0, atol=1e-5, msg=lambda m: f"{name}: {m}")
    for rank in two:
        assert rank["stats"] == pytest.approx(one["stats"], rel=1e-3, abs=1e-5) and len(rank["prompts"]) == 4
    assert not torch.equal(two[0]["draw"], two[1]["draw"])  # each rank draws its own noise


def test_the_script_trains_on_two_ranks_and_resumes(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder, flags in ((whole, []), (cut, ["--resume-from", cut])):
        done = torchrun("ddpo.py", *SMALL, "2", *flags, "--output-dir", folder)
        assert done.returncode == 0, done.stderr
        if folder == whole:  # what a run that was killed after its first epoch has left
            shutil.copytree(whole / "checkpoint-1", cut / "checkpoint-1")
            (cut / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    assert metrics(cut) == metrics(whole) and len(metrics(whole)) == 2
    a, b = (load_file(folder / LORA) for folder in (cut, whole))
    assert all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------------------------------------ bad input
BAD = {
    "eta 0": (dict(sample_eta=0.0), r"sample_eta=0.0: give a number above 0 and up to 1"),
    "eta 2": (dict(sample_eta=2.0), r"sample_eta=2.0"),
    "sizes": (dict(sample_batch_size=3, train_batch_size=4), r"6 samples don't fill whole optimizer steps.*= 4: change one"),
    "no times": (dict(train_timestep_fraction=0.1), r"train_timestep_fraction=0.1: of 3 steps give a share of at least one"),
    "no epochs": (dict(num_epochs=0), r"num_epochs=0: give a number above 0"),
    "one sample": (dict(sample_num_batches_per_epoch=1), r"one sample an epoch has nothing to be better than"),
    "unknown pipeline": (dict(model_name="./nowhere"), r"model_name ./nowhere can't be loaded as a Stable Diffusion pipeline"),
    "not a pipeline": (dict(model_name=str(TOY / "model")), r"toy/model can't be loaded as a Stable Diffusion pipeline"),
    "unknown lora": (dict(lora_weights="./nowhere"), r"lora_weights ./nowhere can't be loaded"),
    "unknown reward": (dict(reward_function="beauty"), r"reward_function 'beauty': choose shape_alignment, jpeg_comp.* or give file"),
    "no such function": (dict(reward="x = 1"), r"reward_function .*mine.py:f can't be loaded"),
    "reward raises": (dict(reward="def f(i, p, m):\n    raise KeyError('lost')"), r"failed on 1 pictures.*lost.*mine.py:2"),
    "too few": (dict(reward="def f(i, p, m):\n    return []"), r"returned 0 rewards for 1 pictures: return one for each"),
    "NaN": (dict(reward="def f(i, p, m):\n    return [float('nan')]"), r"reward of the picture for 'a .*' is nan"),
    "other prompts": (dict(prompt_file="a sunny day"), r"shape_alignment can't score the prompt 'a sunny day'"),
    "unknown prompts": (dict(prompts="nowhere.txt"), r"data file nowhere.txt does not exist here"),
    "empty prompt": (dict(prompt_file="a red circle\n \na red circle"), r"row 1: text is empty or no text; remove the row"),
    "nothing to resume": (dict(resume_from="nowhere"), r"no checkpoint-<n> there"),
    "8 bits": (dict(train_use_8bit_adam=True), r"train_use_8bit_adam needs the package bitsandbytes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_before_any_weight_moves(case, tmp_path, monkeypatch):
    fields, sentence = dict(BAD[case][0]), BAD[case][1]
    if "reward" in fields:
        (tmp_path / "mine.py").write_text(fields.pop("reward"))
        fields["reward_function"] = f"{tmp_path}/mine.py:f"
    if "prompt_file" in fields:
        (tmp_path / "p.txt").write_text(fields.pop("prompt_file"))
        fields["prompts"] = str(tmp_path / "p.txt")
    moved = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: moved.append(1))
    with pytest.raises(InputError, match=sentence) as error:
        main(small(tmp_path / "out", **fields))
    assert not moved and "\n" not in str(error.value)


@pytest.mark.parametrize("fields", [{"sample_guidance_scale": 1.0}, {"sample_guidance_scale": 0.0}, {"train_cfg": False}])
def test_guidance_of_1_or_less_is_no_guidance(fields, tmp_path):
    assert main(small(tmp_path, **fields))["reward_std"] >= 0


def test_on_the_command_line_an_error_is_one_line_and_the_status_is_not_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ddpo.py", "--model-name", "./nowhere", "--output-dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="^ddpo.py: error: model_name ./nowhere can't be loaded") as end:
        run(main, ScriptConfig)
    assert "\n" not in end.value.code  # a text as the status: it is printed, and the status is 1


# ------------------------------------------------------------------------------------------------ the toy, and the pages
def test_the_toy_reward_rises_within_a_few_epochs(tmp_path):
    main(small(tmp_path, num_epochs=8, sample_num_steps=10, sample_batch_size=24, sample_num_batches_per_epoch=1,
               train_batch_size=8, use_lora=False, save_freq=100))
    means = [row["reward_mean"] for row in metrics(tmp_path)]
    assert sum(means[-2:]) / 2 > sum(means[:2]) / 2 + 0.03


def test_the_toy_s_drawings_earn_the_whole_reward():
    """toy/make_pipeline.py and the reward agree on what a red circle is."""
    draw = runpy.run_path(str(ROOT / "toy" / "make_pipeline.py"), run_name="toy")["draw"]
    prompts = (TOY / "shapes.txt").read_text().splitlines()
    assert len(prompts) == 12
    rewards = ddpo.shape_alignment(torch.stack([draw(prompt, 1.0, 2.0, -1.0) for prompt in prompts]), prompts, None)
    assert min(rewards) > 0.9


def test_the_toy_pipeline_is_small_and_in_stable_diffusion_s_format():
    size = sum(path.stat().st_size for path in (TOY / "pipeline").rglob("*") if path.is_file())
    assert size < 2e6
    pipeline = StableDiffusionPipeline.from_pretrained(TOY / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert pipeline("a red circle", num_inference_steps=2).images[0].size == (32, 32)


def test_every_ddpo_command_of_the_page_parses():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "ddpo.md").read_text(), re.S)
    found = [line for block in blocks for line in block.replace("\\\n", " ").strip().splitlines() if " ddpo.py" in line]
    assert found
    for command in found:
        words = shlex.split(command)
        assert tyro.cli(ScriptConfig, args=words[words.index("ddpo.py") + 1:]).num_epochs > 0
