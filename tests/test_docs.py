"""docs/: the scripts that draw figures, and the links of all pages.

    python -m pytest -q tests/test_docs.py
"""
import json
import re
import runpy
import sys
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
SCRIPTS = ["sft", "reward", "ppo", "dpo", "iterative_sft", "ddpo"]
SCORES = [{"update": 1, "score": 0.5, "score_std": 0.1, "kl": 0.0},
          {"update": 2, "score": 0.7, "score_std": 0.2, "kl": 0.3}]
REWARDS = [{"update": 1, "reward_mean": 0.6, "reward_std": 0.1},
           {"update": 2, "reward_mean": 0.7, "reward_std": 0.2}]
SAMPLES = [{"epoch": 0, "reward": 0.25}, {"epoch": 0, "reward": 0.75},
           {"epoch": 2, "reward": 0.5}, {"epoch": 2, "reward": 1.0}]


def run(script, *arguments):
    """Run `python docs/SCRIPT ARGUMENTS` in this process. Returns what it prints as it exits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / "docs" / script), run_name="__main__")
        except SystemExit as end:
            return end.code
    return None


def write(file, rows):
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def no_figures():
    """Close the figures that a script leaves open, which the tests look at."""
    plt.close("all")
    yield
    plt.close("all")


@pytest.fixture
def ddpo_run(tmp_path):
    """A finished run of ddpo.py: two epochs, two images before and after."""
    write(tmp_path / "metrics.jsonl", REWARDS)
    write(tmp_path / "samples.jsonl", SAMPLES)
    for name in ("before", "after"):
        plt.imsave(tmp_path / f"{name}.png", [[0.0, 1.0]])
    return tmp_path


# ----------------------------------------------------------------------------- docs/plot.py
def test_each_key_is_a_curve_over_updates(tmp_path):
    write(tmp_path / "metrics.jsonl", SCORES)
    assert run("plot.py", tmp_path, tmp_path / "figure.png", "score", "kl") is None
    assert plt.imread(tmp_path / "figure.png").shape == (330, 990, 4)  # 3 and 1 + 4 x 2 inches
    curves = [panel.lines[0] for panel in plt.gcf().axes]
    assert [panel.get_ylabel() for panel in plt.gcf().axes] == ["score", "kl"]
    assert curves[0].get_xydata().tolist() == [[1, 0.5], [2, 0.7]]
    assert curves[1].get_xydata().tolist() == [[1, 0], [2, 0.3]]
    # the band of one standard deviation: 0.7 - 0.2 to 0.7 + 0.2
    band = plt.gcf().axes[0].collections[0].get_paths()[0].get_extents()
    assert [band.y0, band.y1] == pytest.approx([0.4, 0.9])


def test_a_run_of_one_line_is_a_dot(tmp_path):
    write(tmp_path / "metrics.jsonl", SCORES[:1])
    assert run("plot.py", tmp_path, tmp_path / "figure.png", "kl") is None
    assert (tmp_path / "figure.png").is_file()
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


@pytest.mark.parametrize("script, arguments", [
    ("plot.py", ()), ("plot.py", ("runs/ppo", "figure.png")),
    ("ddpo_plot.py", ()), ("ddpo_plot.py", ("runs/ddpo",)), ("ddpo_plot.py", ("a", "b", "c")),
    ("film_reviews.py", ()), ("film_chats.py", ()), ("film_chats.py", ("film",))])
def test_missing_arguments_are_answered_with_the_usage(script, arguments):
    assert run(script, *arguments).startswith(f"usage: python docs/{script} ")


# ----------------------------------------------------------------------------- docs/film_chats.py
def test_films_become_chats_pairs_and_prompts(tmp_path):
    (tmp_path / "reviews").mkdir()
    for split in ("train", "test"):
        rows = [{"text": f"{split} {i} ", "label": i % 2} for i in range(20)]
        write(tmp_path / "reviews" / f"{split}.jsonl", rows)
    assert run("film_chats.py", tmp_path / "film", tmp_path / "reviews") is None

    def read(name):
        return [json.loads(line) for line in (tmp_path / "film" / name).read_text().splitlines()]

    for split in ("train", "test"):
        texts = [row["messages"][1]["content"] for row in read(f"chats_{split}.jsonl")]
        assert sorted(texts) == sorted(f"{split} {i}" for i in range(20))
        for pair in read(f"pairs_{split}.jsonl"):
            chosen, rejected = (pair[side][0]["content"] for side in ("chosen", "rejected"))
            assert int(chosen.split()[1]) % 2 == 1 and int(rejected.split()[1]) % 2 == 0
            assert pair["prompt"][0]["role"] == "user"
    prompts = read("prompts.jsonl")
    assert len(prompts) == 64 and all(len(row["messages"]) == 1 for row in prompts)


# ----------------------------------------------------------------------------- docs/ddpo_plot.py
def test_a_figure_of_ddpo_has_the_reward_and_the_images(ddpo_run):
    assert run("ddpo_plot.py", ddpo_run, ddpo_run / "figure.png") is None
    assert plt.imread(ddpo_run / "figure.png").shape == (256, 960, 4)
    curve, before, after = plt.gcf().axes
    assert curve.lines[0].get_xydata().tolist() == [[1, 0.6], [2, 0.7]]
    # (0.25 + 0.75) / 2 and (0.5 + 1) / 2
    assert before.get_title() == "before: mean reward 0.50"
    assert after.get_title() == "after: mean reward 0.75"


def test_a_ddpo_run_of_one_epoch_is_a_dot(ddpo_run):
    write(ddpo_run / "metrics.jsonl", REWARDS[:1])
    assert run("ddpo_plot.py", ddpo_run, ddpo_run / "figure.png") is None
    assert plt.gcf().axes[0].lines[0].get_marker() == "o"


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "before.png", "after.png"])
def test_a_missing_file_of_a_ddpo_run_is_one_sentence(name, ddpo_run):
    (ddpo_run / name).unlink()
    message = run("ddpo_plot.py", ddpo_run, ddpo_run / "figure.png")
    assert message.startswith(f"{ddpo_run / name} does not exist: ")
    assert not (ddpo_run / "figure.png").exists()


def test_a_missing_key_of_a_ddpo_run_is_one_sentence_with_the_known_keys(ddpo_run):
    write(ddpo_run / "metrics.jsonl", SCORES)
    assert run("ddpo_plot.py", ddpo_run, ddpo_run / "figure.png") == (
        f"{ddpo_run / 'metrics.jsonl'} has no key reward_mean, reward_std; it has: kl, score, "
        "score_std, update")


def test_an_empty_file_of_a_ddpo_run_is_one_sentence(ddpo_run):
    write(ddpo_run / "samples.jsonl", [])
    message = run("ddpo_plot.py", ddpo_run, ddpo_run / "figure.png")
    assert message.startswith(f"{ddpo_run / 'samples.jsonl'} is empty: ")


# ----------------------------------------------------------------------------- the pages
@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_of_the_repository(page):
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text())
    files = [link for link in links if "://" not in link]
    folder = (ROOT / page).parent
    assert [file for file in files if not (folder / file).exists()] == []
    assert page != "README.md" or len(files) > 10  # the pattern finds links


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_the_pages_exist(page):
    names = re.findall(r"`((?:tests|toy|docs)/[\w/.]+)`", (ROOT / page).read_text())
    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_functions_named_in_the_numbered_steps_of_a_page_are_in_its_file(name):
    page = (ROOT / "docs" / f"{name}.md").read_text()
    files = [f"{name}.py", "common.py", "chats.py", "machinery.py"]
    code = "".join((ROOT / file).read_text() for file in files)
    words = set(re.findall(r"\w+", code))
    steps = re.findall(r"^1\. \*\*.*?\n\n", page, re.MULTILINE | re.DOTALL)
    names = re.findall(r"`([A-Za-z_][\w.]*)`", "".join(steps))
    assert [name for name in names if not words.issuperset(name.split("."))] == []
