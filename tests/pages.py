"""What the tests of docs/ share: running its scripts, writing the files that they read."""
import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(script, *arguments):
    """Run `python docs/SCRIPT ARGUMENTS` in this process. Returns what it prints as it exits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        patch.syspath_prepend(str(ROOT / "docs"))
        try:
            runpy.run_path(str(ROOT / "docs" / script), run_name="__main__")
        except SystemExit as end:
            return end.code
    return None


def write(file, rows):
    """Write rows as JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
