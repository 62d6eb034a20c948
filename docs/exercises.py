"""List the exercises of the pages, or run them with several seeds:

    python docs/exercises.py              list all exercises, with their commands
    python docs/exercises.py ppo          run those of docs/ppo.md
    python docs/exercises.py ppo 2        run its second

An exercise is a heading `### 2. Title` under `## Exercises`. A comment before its commands says
how to run each of them, and which numbers of metrics.jsonl to print: the last value of a key, or
the mean over all lines.

    <!-- seeds: 1 2 3; last: objective/scores, objective/kl; mean: ppo/policy/clipfrac -->
    ```bash
    python ppo.py --init-kl-coef 0 --steps 5120
    ```

Each command becomes a row of a Markdown table: mean ± standard deviation over the seeds.
"""
import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECTION = re.compile(r"^## Exercises\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
EXERCISE = re.compile(r"^### (\d+)\. (.+?)\n(.*?)(?=^### |\Z)", re.MULTILINE | re.DOTALL)
RUNS = re.compile(r"<!-- seeds: ([\d ]+); (.+?) -->\s*```bash\n(.*?)```", re.DOTALL)


@dataclass
class Runs:
    """Commands of an exercise that are run with the same seeds, for the same numbers."""
    seeds: list[str]
    columns: list[tuple[str, str]]  # ("last" or "mean", key of metrics.jsonl)
    commands: list[str]


@dataclass
class Exercise:
    number: int
    title: str
    body: str
    runs: list[Runs]


def read_exercises(text):
    """Read the exercises of a page."""
    section = "".join(SECTION.findall(text))
    return [Exercise(int(number), title, body, [read_runs(*runs) for runs in RUNS.findall(body)])
            for number, title, body in EXERCISE.findall(section)]


def read_runs(seeds, measures, commands):
    """Read the comment before a block of commands, and the commands."""
    columns = []
    for measure in measures.split(";"):
        how, _, keys = measure.strip().partition(": ")
        if how not in ("last", "mean"):
            sys.exit(f"{measure.strip()!r}: write `last: KEY, KEY` or `mean: KEY, KEY`")
        columns += [(how, key.strip()) for key in keys.split(",")]
    return Runs(seeds.split(), columns, commands.strip().splitlines())


def run(command, seed):
    """Run a command into a temporary folder. Returns the rows of its metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        words = [sys.executable, *shlex.split(command)[1:], "--seed", seed, "--output-dir", out]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{command} --seed {seed} failed:\n{done.stderr[-2000:]}")
        lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def measure(rows, how, key):
    """Return the last value of a key, or the mean over all rows that have it."""
    values = [row[key] for row in rows if row.get(key) is not None]  # null: not finite
    if not values:
        known = sorted({key for row in rows for key in row})
        sys.exit(f"metrics.jsonl has no key {key}; it has: {', '.join(known)}")
    return values[-1] if how == "last" else statistics.fmean(values)


def mean_and_deviation(values):
    """Write the mean ± standard deviation of one number per seed."""
    text = f"{statistics.fmean(values):.3f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.3f}"
    return text.replace("-", "−")


def table(runs):
    """Yield the lines of a Markdown table, a command's as soon as it has run."""
    yield "| command | " + " | ".join(f"{key}, {how}" for how, key in runs.columns) + " |"
    yield "|---" * (1 + len(runs.columns)) + "|"
    for command in runs.commands:
        results = [run(command, seed) for seed in runs.seeds]
        cells = [mean_and_deviation([measure(rows, how, key) for rows in results])
                 for how, key in runs.columns]
        yield f"| `{command}` | " + " | ".join(cells) + " |"


def main(page=None, number=None):
    pages = [ROOT / "docs" / f"{page}.md"] if page else sorted((ROOT / "docs").glob("*.md"))
    if not pages[0].is_file():
        sys.exit(f"{pages[0]} does not exist: give the name of a page, such as ppo")
    for file in pages:
        for exercise in read_exercises(file.read_text()):
            if number in (None, str(exercise.number)):
                print(f"\n{file.stem} {exercise.number}. {exercise.title}", flush=True)
                for runs in exercise.runs:
                    for line in table(runs) if page else runs.commands:
                        print(f"{'' if page else '    '}{line}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 3:
        sys.exit("usage: python docs/exercises.py [PAGE [NUMBER]]")
    main(*sys.argv[1:])
