"""docs/forks/: each patch applies, trains for two updates, and computes its equation by hand.

    python -m pytest -q tests/test_forks.py

A patch that no longer applies is rebuilt as docs/forks/README.md says, at its end.
"""
import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FORKS = ROOT / "docs" / "forks"
PAGE = (FORKS / "README.md").read_text()
PATCHES = sorted(path.stem for path in FORKS.glob("*.patch"))
# two updates, as small as they get
SHORT = {
    "ppo.py": "--steps 16 --batch-size 8 --mini-batch-size 4 --ppo-epochs 1 --max-new-tokens 4",
    "dpo.py": "--max-steps 2 --per-device-train-batch-size 4 --dataset pairs.jsonl",
    "iterative_sft.py": "--num-train-epochs 2 --prompts-per-round 4 --max-new-tokens 4",
    "ddpo.py": "--num-epochs 2 --sample-num-steps 3 --sample-batch-size 4 --train-batch-size 4 "
               "--num-samples 0",
}
log2, log3 = math.log(2), math.log(3)


def near(want):
    return pytest.approx(want, abs=1e-5)


def changed_lines(patch):
    """Return how many lines a patch adds and removes."""
    lines = [line for line in patch.splitlines() if not line.startswith(("+++", "---"))]
    return tuple(sum(line.startswith(sign) for line in lines) for sign in "+-")


def command_of(name):
    """Return the words of a fork's command on the page: the script, then its flags."""
    return shlex.split(re.search(rf"^git apply .*{name}.patch && python (.*)", PAGE, re.M)[1])


def apply(name, folder):
    """Copy the file that a patch is for into a folder, and apply the patch. Returns the copy."""
    git = shutil.which("git")
    assert git, "tests/test_forks.py needs git, which applies the patches of docs/forks"
    patch = FORKS / f"{name}.patch"
    [file] = re.findall(r"^\+\+\+ b/(.*)", patch.read_text(), re.M)  # one file per fork
    shutil.copy(ROOT / file, folder)
    # a repository around the folder is none of ours: git would look for the file there
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = subprocess.run([git, "apply", patch], cwd=folder, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, (
        f"docs/forks/{name}.patch does not apply to {file}: rebuild it as docs/forks/README.md "
        f"says under 'When a patch no longer applies'\n{done.stderr}")
    return folder / file


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(name, flags="") -> the names that a fork's file defines, after a run of its command on
    the page, but two updates of it, in an empty folder."""
    def train(name, flags=""):
        file = apply(name, tmp_path)
        script, *words = command_of(name)
        assert script == file.name
        pairs = (ROOT / "toy" / "pairs.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "pairs.jsonl").write_text("".join(pairs[:8]))
        monkeypatch.chdir(tmp_path)
        words += [*SHORT[script].split(), *flags.split(), "--use-cpu", "--output-dir", "run"]
        monkeypatch.setattr(sys, "argv", [script, *words])
        fork = SimpleNamespace(**runpy.run_path(str(file), run_name="__main__"))
        log = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert {json.loads(line)["update"] for line in log} == {1, 2}
        return fork
    return train


SPY = """
def reward(prompts):
    with open("prompts.txt", "a") as file:
        print(*prompts, sep="|", file=file)
    return [float(i) for i in range(len(prompts))]
"""


def assert_prompts_repeat(folder, times):
    """Check that in each update of 8 rows a prompt is in so many adjacent ones."""
    _, *updates, _ = (folder / "prompts.txt").read_text().splitlines()  # first and last: samples
    assert len(updates) == 2
    for prompts in [line.split("|") for line in updates]:
        assert prompts == [prompt for prompt in prompts[::times] for _ in range(times)]
        assert len(prompts) == 8 and len(set(prompts)) > 1


# ----------------------------------------------------------------------------- the page
def test_the_table_counts_the_lines_of_every_patch():
    table = re.findall(r"^\| \[(\w+)\.patch\]\(\S+\) \| `(\S+)` \| \+(\d+) −(\d+) \|", PAGE, re.M)
    counted = {name: changed_lines((FORKS / f"{name}.patch").read_text()) for name in PATCHES}
    assert {name: (int(plus), int(minus)) for name, _, plus, minus in table} == counted
    assert all(sum(lines) <= 25 for lines in counted.values())
    assert all(command_of(name)[0] == file for name, file, _, _ in table)


def test_every_fork_has_a_test():
    assert {f"test_{name}" for name in PATCHES} <= globals().keys()


# ----------------------------------------------------------------------------- ppo.py
def advantages_of(fork, token_rewards, mask, **config):
    trainer = SimpleNamespace(config=SimpleNamespace(whiten_rewards=False, **config))
    rewards, mask = torch.tensor(token_rewards), torch.tensor(mask)
    _, advantages, returns = fork.PPOTrainer.compute_advantages(
        trainer, torch.zeros_like(rewards), rewards, mask)
    return advantages.tolist(), returns.tolist()


def policy_loss_of(fork, monkeypatch, make_trainer, advantage, probabilities, reference, **config):
    """Return the policy's loss of one token, of which pi, its old self and pi_ref are given."""
    monkeypatch.setattr(conftest, "ppo", fork)
    logits = torch.tensor([[probabilities]]).log()
    logprob, one = logits[..., 0], torch.ones(1, 1)
    loss, _, _ = make_trainer(**config).loss(
        old_logprobs=logprob, values=0 * one, logits=logits, vpreds=0 * one, logprobs=logprob,
        mask=one, advantages=advantage * one, returns=0 * one,
        ref_logprobs=math.log(reference) * one)
    return loss.item()


def test_rloo(train, tmp_path):
    (tmp_path / "spy.py").write_text(SPY)
    fork = train("rloo", "--rloo-k 2 --reward-model spy.py:reward")
    assert_prompts_repeat(tmp_path, times=2)
    # two prompts, two responses each; rewards of tokens: penalties, and the score on the last one
    # returns: 1 and 5, 2 and -1 (the masked 9 is none); minus the other one's: -4, 4, 3, -3
    advantages, returns = advantages_of(
        fork, [[-1, 2.0], [0, 5], [2, 9], [0, -1]], [[1, 1], [1, 1], [1, 0], [1, 1]], rloo_k=2)
    assert advantages == [[-4, -4], [4, 4], [3, 0], [-3, -3]]
    assert returns == [[1, 1], [5, 5], [2, 0], [-1, -1]]
    # one prompt, three responses: 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2
    advantages, _ = advantages_of(fork, [[1.0], [2], [6]], [[1], [1], [1]], rloo_k=3)
    assert advantages == [[-3], [-1.5], [4.5]]


def test_grpo(train, tmp_path, monkeypatch, make_trainer):
    (tmp_path / "spy.py").write_text(SPY)
    fork = train("grpo", "--reward-model spy.py:reward")
    assert_prompts_repeat(tmp_path, times=4)
    # scores 1 and 3: mean 2, standard deviation (n - 1) sqrt(2), and 1e-4 more; 5 and 5: no spread
    advantages, _ = advantages_of(
        fork, [[0, 1.0], [0, 3], [0, 5], [0, 5]], [[1, 1], [1, 1], [1, 1], [1, 1]], group_size=2)
    one = 1 / (math.sqrt(2) + 1e-4)
    assert advantages == [near([-one, -one]), near([one, one]), [0, 0], [0, 0]]
    # the KL: pi = 1/2, pi_ref = 1/4, so pi_ref / pi = 1/2, and k3 = 1/2 - 1 - log(1/2) = 0.19315;
    # minus the advantage 3 times the ratio 1
    loss = policy_loss_of(fork, monkeypatch, make_trainer, 3, [0.5, 0.5], 0.25, kl_loss_coef=0.1)
    assert loss == near(-3 + 0.1 * (log2 - 0.5))


def test_entropy_bonus(train, monkeypatch, make_trainer):
    fork = train("entropy_bonus")
    # entropy of (1/2, 1/4, 1/4): 1/2 log 2 + 2 x 1/4 log 4 = 3/2 log 2; and an advantage of 3
    probabilities = [0.5, 0.25, 0.25]
    loss = policy_loss_of(fork, monkeypatch, make_trainer, 3, probabilities, 0.5, entropy_coef=0.1)
    assert loss == near(-3 - 0.1 * 1.5 * log2)


# ----------------------------------------------------------------------------- dpo.py
def preference_loss_of(fork, *logprobs, **settings):
    return fork.preference_losses(*(torch.tensor([x]) for x in logprobs), **settings).item()


def test_simpo(train):
    fork = train("simpo")
    assert fork.LOSSES["simpo"].takes_mean
    # -1 and -2 nats per token: 2 (-1 - -2) - 1 = 1, so -log sigmoid(1) = log(1 + 1 / e); whatever
    # the reference says
    loss = preference_loss_of(fork, -1.0, -2.0, -7.0, -8.5, beta=2, loss_type="simpo",
                              simpo_gamma=1)
    assert loss == near(math.log(1 + 1 / math.e))


def test_apo(train):
    fork = train("apo")
    # ratios of policy to reference: chosen 3, rejected 1/3; sigmoid(log 3) = 3/4,
    # sigmoid(-log 3) = 1/4, and of their difference sigmoid(log 9) = 9/10
    logprobs = [log3 - 5, -log3 - 6, -5.0, -6.0]
    assert preference_loss_of(fork, *logprobs, beta=1, loss_type="apo_zero") == near(1 / 4 - 3 / 4)
    assert preference_loss_of(fork, *logprobs, beta=1, loss_type="apo_down") == near(3 / 4 - 9 / 10)


# ----------------------------------------------------------------------------- iterative_sft.py
def test_length_penalty(train, monkeypatch):
    fork = train("length_penalty")
    # scores 1.0, 0.4, 0.5 and 5, 2, 4 tokens at 0.3 each: -0.5, -0.2, -0.7; the second one is best
    responses = [[torch.arange(5), torch.arange(2), torch.arange(4)]]
    stand_ins = {"draw_prompts": lambda *_: [{"input_ids": [7]}],
                 "sample_responses": lambda *_: responses,
                 "score_responses": lambda *_: torch.tensor([[1.0, 0.4, 0.5]]),
                 "score_metrics": lambda *_: {}}
    for name, stand_in in stand_ins.items():
        monkeypatch.setitem(fork.train_round.__globals__, name, stand_in)
    config = SimpleNamespace(num_samples=3, num_best=1, length_penalty=0.3, prompts_per_round=1,
                             seed=0, world_size=1, process_index=0)
    trainer = SimpleNamespace(args=config, state=SimpleNamespace(epoch=0), seq2seq=False,
                              step=lambda **rows: rows)
    [row] = fork.train_round(trainer, None, None)["input_ids"]
    assert row.tolist() == [7, 0, 1]


# ----------------------------------------------------------------------------- ddpo.py
def test_rank_rewards(train):
    fork = train("rank_rewards")
    # of 3, 1, 100, 1: below minus above are 2 - 1, 0 - 2, 3 - 0, 0 - 2; sum of squares 1 + 4 + 9
    # + 4 = 18, standard deviation sqrt(18 / 4)
    deviation = math.sqrt(4.5)
    want = [rank / deviation for rank in (1, -2, 3, -2)]
    assert fork.normalize([3, 1, 100, 1]).tolist() == near(want)
    assert fork.normalize([3, 1, 4, 1]).tolist() == near(want)  # an outlier counts as any best one
    assert fork.normalize([5, 5]).tolist() == [0, 0]


def test_timesteps_per_pass(train, tmp_path, monkeypatch):
    fork = train("timesteps_per_pass")
    gradients, rows = {}, []

    def keep_gradient(trainer):
        weights = [p.grad.flatten() for p in trainer.unet.parameters() if p.requires_grad]
        gradients[trainer.config.timesteps_per_pass] = torch.cat(weights)

    def count_rows(trainer, *arguments):
        rows.append(len(arguments[1]))  # timesteps
        return calculate_loss(trainer, *arguments)

    calculate_loss = fork.DDPOTrainer.calculate_loss
    monkeypatch.setattr(fork.DDPOTrainer, "calculate_loss", count_rows)
    monkeypatch.setattr(fork.DDPOTrainer, "optimizer_step", keep_gradient)
    for n in (1, 2, 3):
        rows.clear()
        fork.main(fork.DDPOConfig(
            num_epochs=1, sample_num_steps=3, sample_batch_size=4, sample_num_batches_per_epoch=1,
            train_batch_size=2, train_gradient_accumulation_steps=2, num_samples=0, use_cpu=True,
            timesteps_per_pass=n, output_dir=str(tmp_path / str(n))))
        # 4 samples in minibatches of 2, three timesteps
        assert rows == {1: [2] * 6, 2: [4, 2] * 2, 3: [6] * 2}[n]
    # the mean over 4 x 3 samples and timesteps, however they are split; 2: passes of 2 and 1
    scale = gradients[1].abs().max()
    for n in (2, 3):
        assert (gradients[n] - gradients[1]).abs().max() < 1e-4 * scale


# ----------------------------------------------------------------------------- a reward
def test_three_judgements():
    reward = runpy.run_path(str(FORKS / "three_judgements.py"))["reward"]
    two = "the plot was very dull, the acting was fairly moving"
    texts = [f"{two} and the music was utterly flat.", f"{two}.",
             f"{two}, the music was utterly flat and the ending was slightly fresh.",
             f"{two} and the music was utterly flat"]
    assert reward(texts, [{}] * 4) == [1, 0, 0, 0]  # three, two, four, and three without an end
    assert reward(texts, [{"judgements": n} for n in (2, 2, 4, 4)]) == [0, 1, 1, 0]
