"""docs/: the scripts that draw figures, and the links of all pages.

    python -m pytest -q tests/test_docs.py
"""
import json
import os
import re
import runpy
import subprocess
import sys

import pytest
from pages import ROOT, run, write
from transformers import AutoModelForCausalLM, AutoTokenizer

PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
SCRIPTS = ["sft", "reward", "ppo", "dpo", "iterative_sft", "ddpo"]


@pytest.mark.parametrize("script, arguments", [
    ("film_reviews.py", ()), ("film_reviews.py", ("film",))])
def test_missing_arguments_are_answered_with_the_usage(script, arguments):
    assert run(script, *arguments).startswith(f"usage: python docs/{script} ")


# ----------------------------------------------------------------------------- docs/film_reviews.py
def test_reviews_become_texts_pairs_chats_prompts_and_a_model_whatever_their_order(tmp_path):
    texts = [f"{adverb} {adjective} film about {place}" for adverb in ("very", "fairly")
             for adjective in ("moving", "dull") for place in ("sharks", "chess", "trains")]
    rows = [{"text": f" {text} ", "label": int("moving" in text)} for text in texts] * 2
    for name, splits in {"a": {"train": rows}, "b": {"train": rows[9:], "test": rows[:9]}}.items():
        (tmp_path / name).mkdir()
        for split, part in splits.items():
            write(tmp_path / name / f"{split}.jsonl", part)
        assert run("film_reviews.py", tmp_path / name / "out", tmp_path / name) is None

    def read(name, folder="a"):
        file = tmp_path / folder / "out" / f"{name}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]

    train, test = read("train"), read("test")
    assert sorted(row["text"] for row in train + test) == sorted(texts)  # each of them once
    assert len(test) == 1  # a tenth of 12
    for pair in read("pairs"):
        assert pair["prompt"] == "review:" and pair["chosen"][0] == pair["rejected"][0] == " "
        assert "moving" in pair["chosen"] and "dull" in pair["rejected"]
    for pair in read("chat_pairs"):
        chosen, rejected = (pair[side][0]["content"] for side in ("chosen", "rejected"))
        assert "moving" in chosen and "dull" in rejected and pair["prompt"][0]["role"] == "user"
    assert len(read("pairs")) == len(read("chat_pairs")) == 5  # 11 texts: 6 of one kind, 5
    answers = [row["messages"][1]["content"] for row in read("chats") + read("chats_test")]
    assert sorted(answers) == sorted(texts)
    assert len(read("prompts")) == 64
    assert all(len(row["messages"]) == 1 for row in read("prompts"))
    for file in (tmp_path / "a" / "out").glob("*.jsonl"):
        assert read(file.stem) == read(file.stem, "b")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "out" / "blank")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "out" / "blank")
    assert tokenizer.decode(tokenizer(texts[0]).input_ids) == texts[0]
    assert model.config.vocab_size == len(tokenizer)


# ----------------------------------------------------------------------------- docs/scaling.py
@pytest.fixture(scope="module")
def scaling():
    return runpy.run_path(str(ROOT / "docs" / "scaling.py"))


def test_the_page_holds_the_table_of_the_formula(scaling):
    assert scaling["table"]() in (ROOT / "docs" / "scaling.md").read_text()


def test_the_formula_counts_llama_3_1_8b(scaling):
    """Its weights are 291 tensors of these shapes; LoRA's r = 16 is on all 224 linear layers."""
    n = scaling["count"](scaling["LlamaConfig"](vocab_size=128256, **scaling["MODELS"]["8B"]))
    vocabulary, D, head, inner = 128256, 4096, 1024, 14336
    layer = 2 * D * D + 2 * D * head + 3 * D * inner
    assert n.P == 8_030_261_248 == 2 * vocabulary * D + 32 * (layer + 2 * D) + D
    assert n.A == 32 * 16 * (2 * 2 * D + 2 * (D + head) + 3 * (D + inner))
    assert n.R == 2 * (32 * layer + vocabulary * D) + 4 * (vocabulary * D + 32 * 2 * D + D)
    assert scaling["weights"](n, reference=False) == 16 * n.P
    assert scaling["weights"](n) == 16 * n.P + n.R
    assert scaling["weights"](n, ranks=2) == 18 * n.P + n.R  # and DDP's copies in bfloat16
    shards = dict(ranks=8, sharded=True)
    matrix, block = vocabulary * D, layer + 2 * D
    assert scaling["weights"](n, **shards) == (16 * n.P + n.R) / 8 + 6 * matrix + 4 * block
    assert scaling["weights"](n, **shards, ppo=True) == (12 * n.P + n.R) / 8 + 4 * n.P
    assert scaling["weights"](n, lora=True) == 2 * n.P + 20 * n.A


# ----------------------------------------------------------------------------- the pages
def test_links_of_all_pages_lead_to_files_headings_and_lines_of_code():
    assert run("links.py") is None


BROKEN_LINKS = {  # the target of a link -> what is said of it
    "[a](no.md)": "no.md does not exist",
    '<img src="no.svg">': "no.svg does not exist",
    "[a](#two-words)": None,
    "[a](#two-words-1)": None,  # the second heading of that name
    "[a](#a-comment)": "page.md has no heading #a-comment",
    "[a\nb](code.py)": None,
    "[`A.step`](code.py#L4)": None,
    "[`total[0] = 1`](code.py#L5)": None,
    "[`step`](code.py#L4)": "`step` is on 2 lines of code.py; name a function or a piece that is "
                            "on one",
    "[`A.go`](code.py#L4)": "`A.go` is on 0 lines of code.py; name a function or a piece that is "
                            "on one",
    "[`A`](code.py#L1)": "`A` is on line 3; python docs/links.py --write sets the number",
    "[a](code.py#top)": "#top is neither a heading of a page nor a line of code",
    "`x[0](no.md)`": None,
    "```bash\n[a](no.md)\n```": None,
}


def test_a_broken_link_is_one_sentence_and_a_line_that_moved_is_set(tmp_path):
    page, code = tmp_path / "page.md", tmp_path / "code.py"
    code.write_text("step = 1\n\nclass A:\n    def step(self):\n        total[0] = 1\n")
    head = "# Two words\n\n```bash\n# A comment\n```\n\n## `Two` words!\n\n"
    for link, problem in BROKEN_LINKS.items():
        page.write_text(head + link + "\n")
        message = run("links.py", page)
        assert message is None if problem is None else message.endswith(f": {problem}"), link
    page.write_text("[`A`](code.py#L1) [`gone`](code.py#L1)")
    assert run("links.py", "--write", page).startswith(f"{page}: [`gone`](code.py#L1): ")
    assert page.read_text() == "[`A`](code.py#L3) [`gone`](code.py#L1)"


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_the_pages_exist(page):
    names = re.findall(r"`((?:tests|toy|docs)/[\w/.]+)`", (ROOT / page).read_text())
    assert [name for name in names if not (ROOT / name).exists()] == []


def table_rows(text):
    """The rows of a page's tables, as lists of cells."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_sizes_and_minutes_of_the_files_are_within_a_tenth_and_the_same_on_both_front_pages():
    # ppo.py: 1,245 lines, 618 of them the lecture, which ten lines per minute make 60
    sizes = {row[0].split(".")[0].strip("["): [int(cell.replace(",", "")) for cell in row[2:5]]
             for row in table_rows((ROOT / "README.md").read_text()) if row[0].startswith("[")}
    order = (ROOT / "docs" / "README.md").read_text().split("## Reading order")[1]
    minutes = {row[1].split(".")[0]: row[2] for row in table_rows(order.split("\n## ")[0])}
    for name in SCRIPTS:
        code = (ROOT / f"{name}.py").read_text().splitlines()
        lecture = next(i for i, line in enumerate(code) if "Part 2, the machinery:" in line)
        assert sizes[name] == pytest.approx([len(code), lecture, lecture / 10], rel=0.1), name
        assert minutes[name] == str(sizes[name][2])


def test_names_in_the_notation_are_names_of_their_file():
    notation = (ROOT / "docs" / "README.md").read_text().split("## Notation")[1].split("\n## ")[0]
    rows = table_rows(notation)
    assert [row[0] for row in rows if ".py" in row[0]] == [f"**{name}.py**" for name in (
        "sft", "reward", "iterative_sft", "ppo", "dpo", "ddpo")]
    words = set()
    for symbol, _, code, *_ in rows[1:]:
        if symbol.endswith(".py**"):
            words = set(re.findall(r"\w+", (ROOT / symbol.strip("*")).read_text()))
        names = re.findall(r"`([\w.]+)`", code)
        assert [name for name in names if not words.issuperset(name.split("."))] == []


# ----------------------------------------------------------------------------- the notebook
def test_the_notebook_runs_from_top_to_bottom_offline(tmp_path):
    notebook = json.loads((ROOT / "docs" / "first_session.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    short, replaced = re.subn(r"^UPDATES = \d+", "UPDATES = 1", code, flags=re.MULTILINE)
    assert replaced == 1 and all(cell["outputs"] == [] for cell in cells)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", short], cwd=ROOT / "docs",
                          capture_output=True, text=True, env={**os.environ, "MPLBACKEND": "Agg"})
    assert done.returncode == 0, done.stderr
    # three runs begin with the same samples of the toy model: valences have mean -1.5 (256 samples:
    # 2.6 / 16 = 0.16), and of 8 aspects 4 are in a review, the prompt's included
    first = re.findall(r"update 1: score (\S+), KL (\S+)", done.stdout)
    assert [float(kl) for _, kl in first] == [0, 0, 0]
    score, music, same_music = [float(score) for score, _ in first]
    assert score == pytest.approx(-1.5, abs=0.5)
    assert music == same_music == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("name", SCRIPTS)
def test_functions_named_in_the_numbered_steps_of_a_page_are_in_its_file(name):
    page = (ROOT / "docs" / f"{name}.md").read_text()
    files = [f"{name}.py", "common.py", "chats.py", "machinery.py"]
    code = "".join((ROOT / file).read_text() for file in files)
    words = set(re.findall(r"\w+", code))
    steps = re.findall(r"^1\. \*\*.*?\n\n", page, re.MULTILINE | re.DOTALL)
    names = re.findall(r"`([A-Za-z_][\w.]*)`", "".join(steps))
    assert [name for name in names if not words.issuperset(name.split("."))] == []
