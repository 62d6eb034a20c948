"""Several ranks on CPUs: torchrun forms one gloo group, and it learns what one process would learn.

Comparisons with one process: the two add the same float32 numbers in another order, which changes a
sum by about 1e-6 of itself, and what an update adds to a weight by about 1e-4 of itself, since the
weight is a thousand times larger. Allowed is 1e-3."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from filelock import FileLock
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent


def torchrun(*args, ranks=2, **env):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
    env.pop("ACCELERATE_USE_CPU", None)  # users don't set it: the script has to
    return subprocess.run([*command, *map(str, [ranks, *args])], cwd=ROOT, env=env,
                          capture_output=True, text=True, timeout=300)


def once(tmp_path_factory, name, make):
    """A folder that `make(folder)` has filled, once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            make(folder)
            (folder / "complete").touch()
    assert (folder / "complete").exists(), f"{name} failed in another worker"
    return folder


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    def start(folder):
        done = torchrun("tests/ranks.py", folder)
        assert done.returncode == 0, done.stderr[-5000:]

    return once(tmp_path_factory, "two_ranks", start)


@pytest.fixture(scope="module")
def both(job):
    """What rank 0 and rank 1 saw."""
    return [torch.load(job / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone():
    """alone(name of an update) -> what one process sees that holds the rows of both ranks."""
    seen = {}

    def run(name):
        if name not in seen:
            seen[name] = ranks.update(0, 1, **ranks.UPDATES[name])
        return seen[name]

    return run


def norm(moved):
    return torch.cat([change.flatten() for change in moved.values()]).norm().item()


# ---------------------------------------------------------------------------------- updates
@pytest.mark.parametrize("name", ranks.UPDATES)
def test_two_ranks_learn_what_one_process_learns(name, both, alone):
    one = alone(name)["moved"]
    for rank in both:
        off = norm({weight: change - one[weight] for weight, change in rank[name]["moved"].items()})
        assert off < 1e-3 * norm(one)


@pytest.mark.parametrize("name", ranks.UPDATES)
def test_both_ranks_hold_equal_weights_bit_for_bit(name, both):
    first, second = (rank[name]["moved"] for rank in both)
    assert all(torch.equal(first[weight], second[weight]) for weight in first)


@pytest.mark.parametrize("name", ranks.UPDATES)
def test_statistics_and_kl_coefficient_are_of_all_ranks(name, both, alone):
    one = alone(name)
    for rank in both:
        assert rank[name]["kl_coef"] == pytest.approx(one["kl_coef"], rel=1e-5)
        assert rank[name]["stats"].keys() == one["stats"].keys()
        for key, value in one["stats"].items():
            found, value = torch.as_tensor(rank[name]["stats"][key]), torch.as_tensor(value)
            if key in ("ppo/policy/ratio", "ppo/policy/advantages"):  # in minibatches' order
                found, value = found.sort().values, value.sort().values
            # a mean of numbers of both signs, or a difference, is off by 1e-6 of these
            torch.testing.assert_close(found.float(), value.float(), rtol=1e-3, atol=2e-5,
                                       msg=lambda text, key=key: f"{key}: {text}")


def test_ranks_hold_gradients_once_in_the_buckets_that_they_exchange(both):
    """DDP's default is a second copy: 4 bytes per weight."""
    for rank in both:
        seen = rank["everything"]["in_bucket"]
        assert seen and all(seen)


def test_a_model_with_a_vision_tower_trains_its_text_part(both):
    one = ranks.vision_update(0, 1)
    for rank in both:  # DDP would stop at the vision tower, which gets no gradient
        assert norm(one) > 0
        off = {name: change - one[name] for name, change in rank["vision"].items()}
        assert norm(off) < 1e-3 * norm(one)
    assert not any(change.any() for name, change in one.items() if "vision" in name)


def test_the_kl_coefficient_moves_by_the_samples_of_all_ranks(both):
    stats = both[0]["everything"]["stats"]  # of the last update; target 0.6, horizon 50, 8 samples
    error = min(max(stats["objective/kl"].item() / 0.6 - 1, -0.2), 0.2)
    expected = stats["objective/kl_coef"].item() * (1 + error * 8 / 50)
    assert error != 0 and stats["objective/kl_coef"] != 0.02
    for rank in both:
        assert rank["everything"]["kl_coef"] == pytest.approx(expected, rel=1e-6)


def test_a_scheduler_moves_once_per_update_however_many_ranks_there_are(both):
    assert [rank["everything"]["stats"]["ppo/learning_rate"] for rank in both] == [0.01, 0.01]


def test_the_gradient_of_all_ranks_and_micro_batches_is_clipped_once(both):
    for rank in both:  # SGD moves weights by rate x gradient, here seven times too long
        assert norm(rank["clipped gradient"]["moved"]) == pytest.approx(0.1 * 0.5, rel=1e-3)


@pytest.mark.parametrize("name, skipped",
                         [("ratio above on rank 0 only", 0), ("mean ratio above", 0.5)])
def test_ratio_threshold_judges_the_mean_over_all_ranks(name, skipped, both):
    assert len(both[0][name]["stats"]["ppo/policy/ratio"]) == 2 * (14 + 30)  # epochs, ranks
    assert [rank[name]["stats"]["ppo/policy/skipped"].item() for rank in both] == [skipped, skipped]


@pytest.mark.parametrize("name, steps", [("KL above on rank 0 only", 2), ("mean KL above", 1)])
def test_early_stopping_judges_the_mean_over_all_ranks(name, steps, both):
    one, two = (norm(both[0][other]["moved"])
                for other in ("mean ratio above", "ratio above on rank 0 only"))
    assert one < 0.9 * two  # the second step was dropped in the one, taken in the other
    assert norm(both[0][name]["moved"]) == pytest.approx({1: one, 2: two}[steps], rel=1e-5)


# ---------------------------------------------------------------------------------- own loops
def test_sizes_of_the_config_are_those_of_all_ranks(both):
    for rank in both:
        assert (rank["own loop"]["global batch"], rank["own loop"]["global minibatch"]) == (4, 2)


def test_ranks_hold_different_rows_in_another_order_in_every_epoch(both):
    epochs = list(zip(*(rank["own loop"]["epochs"] for rank in both), strict=True))
    orders = []
    for batches in epochs:
        rows = [sum(rank, []) for rank in batches]
        assert [len(batch) for rank in batches for batch in rank] == [2] * 4
        assert len({*rows[0], *rows[1]}) == 8  # of 11: the rest fills no batch, none is repeated
        orders.append(rows)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_each_rank_draws_its_own_samples_from_the_same_weights(both):
    first, second = (rank["own loop"] for rank in both)
    assert not torch.equal(first["first draw"], second["first draw"])
    torch.manual_seed(ranks.LARGEST_SEED)
    assert torch.equal(first["first draw"], torch.rand(3))  # config.seed, not what was drawn before
    assert torch.equal(first["head"], second["head"])


def test_gather_stats_takes_means_of_numbers_and_joins_vectors(both):
    for rank in both:
        assert rank["own loop"]["gathered"]["number"] == 1.5
        assert rank["own loop"]["gathered"]["vector"].tolist() == [10, 11, 11]


def test_unequal_numbers_of_rows_are_an_error_on_every_rank(both):
    assert all("[2, 1]" in rank["own loop"]["unequal rows"] for rank in both)


def test_no_rank_takes_over_a_best_score_whose_upload_failed(both):
    assert [rank["own loop"]["best score pushed"] for rank in both] == [-math.inf] * 2


# ---------------------------------------------------------------------------------- the script
def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def metrics(folder):
    """metrics.jsonl without the clock."""
    rows = lines(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if "time/" not in k} for row in rows]


def test_a_run_on_two_ranks_is_written_once(job):
    assert [row["update"] for row in metrics(job / "whole")] == [1, 2, 3]  # 24 samples, 2 x 4 each
    samples = lines(job / "whole" / "samples.jsonl")
    assert [row["update"] for row in samples] == [0] * 8 + [3] * 8


def test_main_returns_the_same_statistics_on_every_rank(both, job):
    last = metrics(job / "whole")[-1]
    for rank in both:
        for name in ("objective/scores", "objective/kl", "ppo/loss/total"):
            assert float(rank["script"]["whole 24"][name]) == last[name]


def test_a_checkpoint_is_complete_only_when_the_slowest_rank_has_written(both):
    files = both[0]["script"]["checkpoint"]
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= set(files)


def test_a_resumed_run_on_two_ranks_ends_with_the_same_bits(job):
    assert metrics(job / "cut") == metrics(job / "whole")
    for name in ("model.safetensors", "value_head.safetensors"):
        cut, whole = load_file(job / "cut" / name), load_file(job / "whole" / name)
        assert cut.keys() == whole.keys() and all(torch.equal(cut[key], whole[key]) for key in cut)
    assert [folder.name for folder in (job / "cut").glob("checkpoint*")] == ["checkpoint-3"]


def test_the_tracker_gets_the_rows_and_rewards_of_all_ranks(job):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    files = [EventAccumulator(str(file)).Reload() for file in (job / "logs").rglob("events.out*")]
    (events,) = (file for file in files if "game_log/text_summary" in file.Tags()["tensors"])
    for event, row in zip(events.Scalars("env/reward_mean"), metrics(job / "whole"), strict=True):
        assert event.step == row["update"]
        assert event.value == pytest.approx(row["objective/scores"], rel=1e-5, abs=1e-6)
    for event in events.Tensors("game_log/text_summary"):
        rows = event.tensor_proto.string_val[0].decode().split("\n\n")
        assert len(rows) == 8  # 2 ranks of 4
    assert events.Histograms("tokens/responses_dist")[-1].histogram_value.num == 8


def test_a_rank_that_fails_ends_the_job_with_its_message_and_a_good_checkpoint(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import atexit, os\n"
        f"atexit.register(open, '{tmp_path}/waited', 'w')\n"  # where nccl waits for other ranks
        "calls = []\n"
        "def f(texts):\n"
        "    calls.append(texts)  # the samples before training, then one call per update\n"
        "    assert os.environ['RANK'] == '0' or len(calls) < 3, 'rank 1 is ill'\n"
        "    return [0.0 for _ in texts]\n")
    done = torchrun("ppo.py", "--batch-size", 4, "--mini-batch-size", 4, "--ppo-epochs", 1,
                    "--max-new-tokens", 4, "--steps", 24, "--save-freq", 1,
                    "--reward-model", f"{tmp_path}/mine.py:f", "--output-dir", tmp_path / "out")
    assert done.returncode != 0
    # of the last words, torchrun's, these are the reason
    assert "rank 1 is ill" in done.stderr.partition("Root Cause")[2]
    assert not (tmp_path / "waited").exists()
    assert [row["update"] for row in metrics(tmp_path / "out")] == [1]
    assert [folder.name for folder in tmp_path.glob("out/checkpoint-*")] == ["checkpoint-1"]
