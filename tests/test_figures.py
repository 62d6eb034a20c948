"""docs/plot.py and docs/figures.py: what the figures show.

    python -m pytest -q tests/test_figures.py
"""
import math
import runpy
import shutil
import sys

import matplotlib
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from pages import ROOT, run, write  # noqa: E402

SCORES = [{"update": 1, "score": 0.5, "score_std": 0.1, "kl": 0.0},
          {"update": 2, "score": 0.7, "score_std": 0.2, "kl": 0.3}]


@pytest.fixture(autouse=True)
def no_figures():
    """Close the figures that a script leaves open, which the tests look at."""
    plt.close("all")
    yield
    plt.close("all")


def band(panel):
    """Return the lowest and the highest value of a panel's band."""
    box = panel.collections[0].get_paths()[0].get_extents()
    return [box.y0, box.y1]


# ----------------------------------------------------------------------------- docs/plot.py
def test_each_key_is_a_curve_over_updates(tmp_path):
    write(tmp_path / "metrics.jsonl", SCORES)
    assert run("plot.py", tmp_path, tmp_path / "figure.png", "score", "kl=0.2") is None
    assert plt.imread(tmp_path / "figure.png").shape == (390, 1170, 4)  # 3 and 1 + 4 x 2 inches
    score, kl = plt.gcf().axes
    assert [score.get_ylabel(), kl.get_ylabel()] == ["score", "kl"]
    assert score.lines[0].get_xydata().tolist() == [[1, 0.5], [2, 0.7]]
    assert kl.lines[0].get_xydata().tolist() == [[1, 0], [2, 0.3]]
    assert kl.lines[1].get_ydata() == [0.2, 0.2]  # the level
    assert band(score) == pytest.approx([0.4, 0.9])  # one standard deviation: 0.7 - 0.2, 0.7 + 0.2


def test_several_runs_are_their_mean_and_a_band_from_the_lowest_to_the_highest(tmp_path):
    write(tmp_path / "a" / "metrics.jsonl", SCORES)
    write(tmp_path / "b" / "metrics.jsonl", [{**row, "score": 1.5} for row in SCORES])
    runs = f"{tmp_path / 'a'},{tmp_path / 'b'}"
    assert run("plot.py", runs, tmp_path / "figure.svg", "score") is None
    panel, = plt.gcf().axes
    assert panel.lines[0].get_ydata().tolist() == pytest.approx([1.0, 1.1])
    assert band(panel) == pytest.approx([0.5, 1.5])


def test_a_figure_drawn_twice_is_the_same_file(tmp_path):
    write(tmp_path / "metrics.jsonl", SCORES)
    for name in ("one.svg", "two.svg"):
        assert run("plot.py", tmp_path, tmp_path / name, "score") is None
    assert (tmp_path / "one.svg").read_text() == (tmp_path / "two.svg").read_text()


def test_a_null_is_no_point_of_a_curve(tmp_path):
    rows = [{"update": 1, "kl": None}, {"update": 2, "kl": 0.3}]  # null: a number was not finite
    write(tmp_path / "metrics.jsonl", rows)
    assert run("plot.py", tmp_path, tmp_path / "figure.png", "kl") is None
    assert plt.gcf().axes[0].lines[0].get_xydata().tolist() == [[2, 0.3]]


def test_a_run_of_one_line_is_a_dot(tmp_path):
    write(tmp_path / "metrics.jsonl", SCORES[:1])
    assert run("plot.py", tmp_path, tmp_path / "figure.png", "kl") is None
    assert plt.gcf().axes[0].lines[0].get_marker() == "o"  # a line through one point is invisible


def test_an_unknown_key_is_one_sentence_with_the_known_keys(tmp_path):
    write(tmp_path / "metrics.jsonl", SCORES)
    message = run("plot.py", tmp_path, tmp_path / "figure.png", "score", "reward")
    file = tmp_path / "metrics.jsonl"
    assert message == f"{file} has no key reward; it has: kl, score, score_std"
    assert not (tmp_path / "figure.png").exists()


def test_a_missing_run_is_one_sentence(tmp_path):
    message = run("plot.py", tmp_path / "none", tmp_path / "figure.png", "score")
    assert message.startswith(f"{tmp_path / 'none' / 'metrics.jsonl'} does not exist: ")


@pytest.mark.parametrize("arguments", [(), ("runs/ppo", "figure.png")])
def test_missing_arguments_are_answered_with_the_usage(arguments):
    assert run("plot.py", *arguments).startswith("usage: python docs/plot.py ")


# ----------------------------------------------------------------------------- docs/figures.py
@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draw figures of docs/figures.py from the runs in tmp_path/runs, into tmp_path/docs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    for name in ("plot.py", "figures.py"):
        shutil.copy(ROOT / "docs" / name, tmp_path / "docs")
    for path in (*ROOT.glob("*.py"), ROOT / "toy", ROOT / "docs" / "frontier.py"):
        (tmp_path / path.relative_to(ROOT)).symlink_to(path)

    def draw(*names):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["figures.py", *names])
            patch.syspath_prepend(str(tmp_path / "docs"))
            for module in ("plot", "figures", "make"):
                patch.delitem(sys.modules, module, raising=False)
            runpy.run_path(str(tmp_path / "docs" / "figures.py"), run_name="__main__")
            for module in ("plot", "figures", "make"):
                sys.modules.pop(module, None)
        assert all((tmp_path / "docs" / f"{name}.svg").is_file() for name in names)
        return plt.gcf().axes

    return draw


def test_the_clipped_surrogate_is_flat_where_the_clip_binds(draw):
    raised, lowered = (panel.lines[1].get_ydata() for panel in draw("clip"))
    assert [raised[0], raised[-1]] == pytest.approx([-0.5, -1.2])   # -A rho; -A (1 + eps)
    assert [lowered[0], lowered[-1]] == pytest.approx([0.8, 1.5])   # -A (1 - eps); -A rho


def test_the_advantages_of_a_reward_at_the_end_decay_with_lambda(draw):
    panel, = draw("gae")
    for line, lam in zip(panel.lines, (0.0, 0.5, 0.8, 0.95, 1.0), strict=True):
        assert line.get_ydata()[-3] == pytest.approx(lam ** 2, abs=1e-6)


def test_the_losses_of_a_pair_and_their_forces_at_the_start(draw):
    losses, forces = ([line.get_ydata()[200] for line in panel.lines[:4]]  # at h = 0
                      for panel in draw("dpo_losses"))
    assert losses == pytest.approx([math.log(2), math.log(2), 1, 1 / 4])
    assert forces == pytest.approx([1 / 2, 0.9 / 2 - 0.1 / 2, 1, 1])


def test_the_next_latent_is_made_of_three_parts_that_add_up_to_1(draw):
    parts, spread = draw("schedule")
    full, half, tenth = (line.get_ydata() for line in spread.lines)
    assert tenth == pytest.approx(full / 10) and half == pytest.approx(full / 2)
    edges = parts.collections[2].get_paths()[0].vertices[:, 1]  # of the new noise, the uppermost
    assert [edges.min(), edges.max()] == pytest.approx([1 - full.max() ** 2, 1])


def test_the_distance_of_a_fork_from_the_optimum_is_a_mean_over_seeds(draw, tmp_path):
    row = {"method": "RLOO", "beta": 1, "stage": 30, "kl": 0.0}  # where the optimum is -1.5
    write(tmp_path / "docs" / "frontier.jsonl", [{**row, "valence": -2.0}, {**row, "valence": -3}])
    panel, = draw("rloo")
    assert panel.containers[2].lines[0].get_xydata().tolist() == [pytest.approx([0, 1], abs=1e-4)]


def test_the_curves_of_ppo_are_over_samples(draw, tmp_path):
    keys = {"objective/scores": 1.0, "objective/kl": 5.0, "objective/kl_coef": 0.2}
    for seed in (1, 2, 3):
        write(tmp_path / "runs" / f"ppo-{seed}" / "metrics.jsonl",
              [{"update": 1, **keys}, {"update": 2, **keys, "objective/scores": seed}])
    score, kl, beta = draw("ppo")
    assert score.lines[0].get_xydata().tolist() == [[256, 1], [512, 2]]  # the mean of 1, 2, 3
    assert kl.lines[1].get_ydata() == [6, 6] and beta.lines[1].get_ydata() == [0.2, 0.2]


def test_the_losses_of_dpo_and_sft_are_drawn_with_what_they_are_about(draw, tmp_path):
    write(tmp_path / "runs" / "dpo" / "metrics.jsonl", [
        {"update": 1, "loss": 0.7, "eval_loss": 0.6, "eval_rewards/accuracies": 0.9,
         "logps/chosen": -20.0, "logps/rejected": -21.0}])
    loss, accuracy, logps = draw("dpo")
    assert loss.lines[2].get_ydata() == pytest.approx([math.log(2)] * 2, abs=1e-4)
    assert [line.get_ydata().tolist() for line in logps.lines] == [[-20.0], [-21.0]]
    write(tmp_path / "runs" / "sft" / "metrics.jsonl", [{"update": 1, "loss": 1, "eval_loss": 1}])
    panel, = draw("sft")
    assert panel.lines[2].get_ydata() == pytest.approx([0.9237] * 2, abs=1e-4)


def test_an_unknown_figure_is_one_sentence():
    assert run("figures.py", "pie").startswith("pie: no such figure; there are sft, reward, ppo, ")
