"""Several ranks on CPU: torchrun forms one gloo group, which gives what one process with the same global batch gives."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# One PPO update on given samples; the two ranks' minibatches together are one process's minibatches.
ONE_UPDATE = """
import os, sys
import numpy as np, torch
from common import TOY, set_seed
from ppo import PPOConfig, PPOTrainer, load_policy

ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
config = PPOConfig(batch_size=8 // ranks, mini_batch_size=4 // ranks, ppo_epochs=2, learning_rate=1e-4, target=0.01,
                   horizon=50, use_score_scaling=True, whiten_rewards=True, max_grad_norm=0.5)
tokenizer, model = load_policy(config)
trainer = PPOTrainer(config, model, None, tokenizer)
draw = torch.rand(3)
set_seed(0)
queries = [torch.randint(300, (3 + i % 3,)) for i in range(8)]
responses = [torch.randint(300, (2 + i,)) for i in range(8)]
scores = [torch.tensor(float(i % 3) - i / 4) for i in range(8)]
orders = [np.array(o) for o in ([[0, 1, 2, 3], [3, 1, 2, 0]] * 2)]
for step in range(2):
    # rank r holds the rows r, r + ranks, ...; minibatch m of a rank is the m-th part of its own order
    mine = lambda rows: rows[rank::ranks]
    if ranks == 1:
        both = lambda o: np.concatenate([[2 * i + r for r in (0, 1) for i in part] for part in (o[:2], o[2:])])
        queue = [both(o) for o in orders]
    else:
        queue = list(orders)
    np.random.permutation = lambda n: queue.pop(0)
    stats = trainer.step(mine(queries), mine(responses), mine(scores))
torch.save({"weights": trainer.policy.state_dict(), "kl_coef": trainer.kl_ctl.value,
            "stats": {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in stats.items() if "time/" not in k},
            "draw": draw, "mean": trainer.running.mean}, f"{sys.argv[1]}/{ranks}-{rank}.pt")
"""


def torchrun(*args, ranks=2, **env):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env})


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "update.py").write_text(ONE_UPDATE)
    for ranks in (1, 2):
        done = torchrun(folder / "update.py", folder, ranks=ranks)
        assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{name}.pt") for name in ("1-0", "2-0", "2-1")]


def test_two_ranks_end_with_the_weights_of_one_process(updates):
    one, *two = updates
    for rank in two:
        for name, weight in one["weights"].items():
            if name.endswith("c_attn.bias"):  # the keys' bias has no gradient but rounding, of which Adam makes a whole step
                weight = torch.cat([rank["weights"][name].chunk(3)[1] if i == 1 else w for i, w in enumerate(weight.chunk(3))])
            torch.testing.assert_close(rank["weights"][name], weight, rtol=0, atol=1e-5, msg=lambda m: f'{name}: {m}')


def test_both_ranks_hold_equal_weights_bit_for_bit(updates):
    _, first, second = updates
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])


def test_statistics_and_kl_coefficient_are_global(updates):
    one, *two = updates
    for rank in two:
        assert rank["kl_coef"] == pytest.approx(one["kl_coef"], rel=1e-6)
        assert rank["kl_coef"] != 0.2 and rank["mean"] == pytest.approx(one["mean"], rel=1e-6)
        for name, value in one["stats"].items():
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                assert float(rank["stats"][name]) == pytest.approx(float(value), rel=1e-3, abs=1e-5), name
            else:
                assert len(rank["stats"][name]) == len(value), name
                assert rank["stats"][name].sort().values == pytest.approx(value.sort().values, rel=1e-3, abs=1e-4), name


def test_each_rank_draws_its_own_samples(updates):
    _, first, second = updates
    assert not torch.equal(first["draw"], second["draw"])


def test_the_script_trains_on_two_ranks_and_resumes(tmp_path):
    flags = ["--batch-size", 4, "--mini-batch-size", 2, "--ppo-epochs", 1, "--max-new-tokens", 6, "--save-freq", 1]
    done = torchrun("ppo.py", *flags, "--steps", 16, "--output-dir", tmp_path / "cut")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2  # 16 samples in global batches of 8
    for folder, more in ((tmp_path / "cut", ["--resume-from", tmp_path / "cut"]), (tmp_path / "whole", [])):
        done = torchrun("ppo.py", *flags, "--steps", 24, "--output-dir", folder, *more)
        assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "value_head.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_no_rank_hangs_when_another_fails(tmp_path):
    (tmp_path / "mine.py").write_text("import os\ndef f(texts):\n    assert os.environ['RANK'] == '0', 'rank 1 is ill'\n"
                                      "    return [0.0 for _ in texts]\n")
    done = torchrun("ppo.py", "--batch-size", 4, "--steps", 8, "--reward-model", f"{tmp_path}/mine.py:f",
                    "--output-dir", tmp_path / "out")
    assert done.returncode != 0 and "rank 1 is ill" in done.stderr
