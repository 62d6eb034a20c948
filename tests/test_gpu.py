"""Each script on a GPU, in bfloat16: first numbers, resume, a rank of torchrun.

    python -m pytest -q tests/test_gpu.py
    TEST_DEVICE=cpu python -m pytest -q tests/test_gpu.py      # the same lines, without a GPU

Without a GPU and without TEST_DEVICE these tests are reported as skipped."""
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMI = shutil.which("nvidia-smi")
HAS_GPU = bool(SMI) and b"GPU 0" in subprocess.run([SMI, "-L"], capture_output=True).stdout
DEVICE = os.environ.get("TEST_DEVICE", "cuda" if HAS_GPU else None)
ENV = {name: value for name, value in os.environ.items()
       if name not in ("CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU")}
if DEVICE == "cpu":
    ENV["CUDA_VISIBLE_DEVICES"] = ""
TRAINER = ("--bf16 --logging-steps 1 --save-strategy steps --save-steps 4 "
           "--lr-scheduler-type constant")
RUNS = {  # flags, those that end a run halfway, those of the whole run, a metric of its last line
    "sft.py": (TRAINER, "--max-steps 4", "--max-steps 8", "loss"),
    "reward.py": (TRAINER, "--max-steps 4", "--max-steps 8", "loss"),
    "dpo.py": (TRAINER, "--max-steps 4", "--max-steps 8", "loss"),
    "iterative_sft.py": ("--bf16 --lr-scheduler-type constant --prompts-per-round 16",
                         "--num-train-epochs 1", "--num-train-epochs 2", "loss"),
    "ppo.py": ("--bf16 --batch-size 32 --mini-batch-size 8 --save-freq 1", "--steps 64",
               "--steps 128", "ppo/mean_scores"),
    "ddpo.py": ("--bf16 --sample-num-steps 5 --num-samples 2 --sample-batch-size 4 "
                "--sample-num-batches-per-epoch 2 --train-batch-size 4", "--num-epochs 1",
                "--num-epochs 2", "reward_mean"),
}
FIRST = {"dpo.py": ("loss", math.log(2)), "ppo.py": ("objective/kl", 0.0)}
pytestmark = pytest.mark.skipif(DEVICE is None, reason="needs a GPU, or TEST_DEVICE=cpu")


def run(script, flags, folder, *launcher):
    """Run a script; return the lines of its metrics.jsonl."""
    command = [sys.executable, *launcher, script, *flags.split(), "--output-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def values(rows, metric):
    return [(row["update"], row[metric]) for row in rows if metric in row]


@pytest.fixture(scope="module", params=RUNS)
def runs(request, tmp_path_factory):
    """A whole run, and one that ends halfway and is resumed: the lines of their metrics."""
    script = request.param
    flags, half, whole, _ = RUNS[script]
    folder = tmp_path_factory.mktemp(script)
    resume = "--resume-from" if script in ("ppo.py", "ddpo.py") else "--resume-from-checkpoint"
    rows = run(script, f"{flags} {whole}", folder / "whole")
    run(script, f"{flags} {half}", folder / "cut")
    resumed = run(script, f"{flags} {whole} {resume} {folder / 'cut'}", folder / "cut")
    return script, rows, resumed


def test_all_numbers_are_finite(runs):
    _, rows, _ = runs
    numbers = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert numbers and all(map(math.isfinite, numbers))


def test_policy_and_reference_agree_before_the_first_update(runs):
    script, rows, _ = runs
    if script not in FIRST:
        pytest.skip(f"{script} has no reference")
    metric, value = FIRST[script]
    assert rows[0][metric] == pytest.approx(value, abs=1e-6)


def test_a_resumed_run_ends_like_an_uninterrupted_one(runs):
    script, rows, resumed = runs
    metric = RUNS[script][3]
    updates, numbers = zip(*values(rows, metric), strict=True)
    same_updates, same_numbers = zip(*values(resumed, metric), strict=True)
    assert updates == same_updates and len(updates) > 1
    exact = DEVICE == "cpu"  # a GPU adds up in another order each time
    assert same_numbers == pytest.approx(numbers, rel=1e-6 if exact else 0.05)


def test_a_rank_of_torchrun_computes_what_a_process_does(runs, tmp_path):
    """On a GPU torchrun's only rank is in a group of nccl."""
    script, rows, _ = runs
    flags, half, _, metric = RUNS[script]
    launcher = ["-m", "torch.distributed.run", "--standalone"]
    lines = run(script, f"{flags} {half}", tmp_path, *launcher)
    update, number = values(rows, metric)[0]
    assert values(lines, metric)[0] == (update, pytest.approx(number, rel=0.05))
