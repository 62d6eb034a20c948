"""Each script on a GPU: its default run; in bfloat16 first numbers, resume, a rank of torchrun;
peak memory next to docs/scaling.md; a real chat model; speed next to TRL.

    REAL_MODEL=folder python -m pytest -q tests/test_gpu.py
    TEST_DEVICE=cpu python -m pytest -q tests/test_gpu.py      # the same lines, without a GPU

Without a GPU and without TEST_DEVICE these tests are reported as skipped."""
import importlib.util
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
DEFAULT = {  # flags, those that end a CPU's run early, a metric and how much it gains at least
    "sft.py": ("", "--max-steps 2", "loss", -3),
    "reward.py": ("", "--max-steps 2", "loss", -0.4),
    "dpo.py": ("", "--max-steps 2", "loss", -0.5),
    "iterative_sft.py": ("", "--num-train-epochs 2", "objective/scores", 5),
    "ppo.py": ("--batch-size 256 --mini-batch-size 16 --learning-rate 1e-4 --steps 5120",
               "--steps 512", "objective/scores", 3),
    "ddpo.py": ("", "--num-epochs 1", "reward_mean", 0.1),
}
FIRST = {"dpo.py": ("loss", math.log(2)), "ppo.py": ("objective/kl", 0.0)}
pytestmark = pytest.mark.skipif(DEVICE is None, reason="needs a GPU, or TEST_DEVICE=cpu")


def run(script, flags, folder, *launcher):
    """Run a script; return the lines of its metrics.jsonl."""
    command = [sys.executable, *launcher, script, *flags.split(), "--output-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=1200)
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


@pytest.mark.parametrize("script", DEFAULT)
def test_the_default_run_learns(script, tmp_path):
    flags, few, metric, gain = DEFAULT[script]
    rows = run(script, f"{flags} {few if DEVICE == 'cpu' else ''}", tmp_path)
    numbers = [number for _, number in values(rows, metric)]
    change = (numbers[-1] - numbers[0]) / gain
    assert math.isfinite(change) if DEVICE == "cpu" else change > 1


def test_peak_memory_is_what_the_page_counts():
    """docs/scaling.md's formula, for all weights and for LoRA."""
    done = subprocess.run([sys.executable, "docs/scaling.py", "--check"], cwd=ROOT, env=ENV,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ratios = [float(line.split("|")[-2]) for line in done.stdout.splitlines() if line[0] == "|"]
    assert len(ratios) >= 8  # more with two devices
    assert ratios == pytest.approx([1] * len(ratios), abs=0.1)


# ----------------------------------------------------------------------------- a real chat model
REAL_MODEL = os.environ.get("REAL_MODEL")
CHAINED = "--bf16 --logging-steps 1 --save-strategy no --per-device-train-batch-size 4"


def chats(*answers):
    """Pairs of a question's chat and an answer, as rows of messages."""
    question = {"role": "user", "content": "What did you think of the film? One sentence."}
    return [[question, {"role": "assistant", "content": answer}] for answer in answers]


@pytest.mark.skipif(not REAL_MODEL, reason="REAL_MODEL is not set: name the folder of a chat model "
                                           "there, such as SmolLM2-135M-Instruct")
def test_a_real_chat_model_goes_through_all_files_for_texts(tmp_path):
    kind, unkind = chats("I loved every minute of it.", "It was dull, and far too long.")
    for name, row in (("texts", {"messages": kind}), ("prompts", {"messages": kind[:1]}),
                      ("pairs", {"chosen": kind, "rejected": unkind})):
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 16)

    def train(script, model, data, flags, *names):
        folder = tmp_path / script.removesuffix(".py")
        data = f"--{'query-' if data == 'prompts' else ''}dataset {tmp_path / data}.jsonl"
        rows = run(script, f"--model-name {model} {data} {flags}", folder)
        return folder, [values(rows, name) for name in names]

    tuned, (losses,) = train("sft.py", REAL_MODEL, "texts", f"{CHAINED} --max-steps 4", "loss")
    assert losses[-1][1] < losses[0][1]
    judge, (losses,) = train("reward.py", REAL_MODEL, "pairs", f"{CHAINED} --max-steps 4", "loss")
    assert losses[-1][1] < losses[0][1]
    own = f"--reward-model {judge} --bf16 --max-new-tokens 8"
    _, (kl,) = train("ppo.py", tuned, "prompts", f"{own} --batch-size 8 --mini-batch-size 4 "
                     "--ppo-epochs 1 --steps 16", "objective/kl")
    assert kl[0][1] == 0 and len(kl) == 2
    _, (losses,) = train("dpo.py", tuned, "pairs", f"{CHAINED} --max-steps 4 --lora-r 8", "loss")
    assert losses[0][1] == pytest.approx(math.log(2), abs=1e-6) and losses[-1][1] < losses[0][1]
    _, (scores,) = train("iterative_sft.py", tuned, "prompts", f"{own} --prompts-per-round 4 "
                         "--num-samples 2 --num-train-epochs 1", "objective/scores")
    assert scores and math.isfinite(scores[0][1])


# ----------------------------------------------------------------------------- next to TRL
SPEED = """
import copy, sys
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
import dpo, trl
tokenizer = AutoTokenizer.from_pretrained("toy/model")
sizes = dict(vocab_size=32000, hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
rows = load_dataset("json", data_files="toy/pairs.jsonl", split="train[:128]")
for where in (dpo, trl, dpo, trl):  # the first run of each loads libraries
    args = where.DPOConfig(
        output_dir=sys.argv[1], max_steps=4, per_device_train_batch_size=8, bf16=True,
        use_cpu=sys.argv[2] == "cpu", save_strategy="no", eval_strategy="no", report_to="none",
        learning_rate=1e-6, gradient_checkpointing=False)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes))
    trainer = where.DPOTrainer(model, copy.deepcopy(model), args=args, train_dataset=rows,
                               processing_class=tokenizer)
    print("SECONDS", trainer.train().metrics["train_runtime"])
"""


@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="trl is not installed")
def test_dpo_is_not_slower_than_trl(tmp_path):
    command = [sys.executable, "-c", SPEED, tmp_path, DEVICE]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("SECONDS")]
    _, _, ours, theirs = map(float, seconds)
    print(f"4 optimizer steps of DPO: {ours:.2f} s here, {theirs:.2f} s in TRL")
    assert ours < 1.1 * theirs
