"""docs/exercises.py, and the exercises of all pages.

    python -m pytest -q tests/test_exercises.py
"""
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "exercises.py"
exercises = SimpleNamespace(**runpy.run_path(str(FILE)))
PAGES = {path.stem: path for path in sorted((ROOT / "docs").glob("*.md"))
         if "\n## Exercises\n" in path.read_text()}

PAGE = """# toy.py
### 9. Of another section

## Exercises

### 1. Derive

No command here.

### 2. Without a leash

<!-- seeds: 1 2 3; last: score, kl; mean: clip -->
```bash
python {script} --scale 1
python {script} --scale -2
```

## Forks

### 3. Of another section
"""
SCRIPT = """import argparse, json, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--scale", type=int)
parser.add_argument("--seed", type=int)
parser.add_argument("--output-dir", type=pathlib.Path)
args = parser.parse_args()
args.output_dir.mkdir()
x = args.scale * args.seed
rows = [{"score": 9, "clip": 0}, {"score": x, "kl": 4}, {"clip": x}]
(args.output_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\\n" for r in rows))
"""


@pytest.fixture
def page(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return PAGE.format(script=tmp_path / "script.py")


def test_exercises_are_the_numbered_headings_of_their_section(page, tmp_path):
    first, second = exercises.read_exercises(page)
    assert (first.number, first.title, first.runs) == (1, "Derive", [])
    assert (second.number, second.title) == (2, "Without a leash")
    [runs] = second.runs
    assert runs.seeds == ["1", "2", "3"]
    assert runs.columns == [("last", "score"), ("last", "kl"), ("mean", "clip")]
    assert runs.commands == [f"python {tmp_path}/script.py --scale {n}" for n in (1, -2)]


def test_a_command_is_a_row_with_mean_and_deviation_over_its_seeds(page):
    runs = exercises.read_exercises(page)[1].runs[0]
    head, _, one, two = exercises.table(runs)
    assert head == "| command | score, last | kl, last | clip, mean |"
    # the seeds are 1, 2, 3; the mean of clip is over the two lines that have it
    assert one.endswith("| 2.000 ± 1.000 | 4.000 ± 0.000 | 1.000 ± 0.500 |")
    assert two.endswith("| −4.000 ± 2.000 | 4.000 ± 0.000 | −2.000 ± 1.000 |")


def test_an_unknown_key_is_one_sentence_with_the_known_keys(page):
    runs = exercises.read_exercises(page.replace("last: score", "last: reward"))[1].runs[0]
    with pytest.raises(SystemExit, match="has no key reward; it has: clip, kl, score"):
        list(exercises.table(runs))


def test_an_unknown_page_is_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(FILE), "none"])
    with pytest.raises(SystemExit, match="none.md does not exist: give the name of a page"):
        runpy.run_path(str(FILE), run_name="__main__")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_s_exercises_are_numbered_and_answered_and_their_commands_can_run(name):
    found = exercises.read_exercises(PAGES[name].read_text())
    assert [exercise.number for exercise in found] == list(range(1, len(found) + 1))
    assert len(found) >= (3 if name == "frontier" else 5)
    for exercise in found:
        assert "<details><summary>Answer</summary>" in exercise.body, exercise.title
        for runs in exercise.runs:
            for command in runs.commands:
                python, script, *flags = shlex.split(command)  # test_command_line.py parses them
                assert python == "python" and (ROOT / script).is_file()
                assert "--seed" not in flags  # it is added, and an --output-dir that wins
