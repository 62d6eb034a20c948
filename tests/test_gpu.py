"""Each script on a GPU, in bfloat16, for a few steps. Without a GPU these tests are reported as
skipped."""
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENV = {name: value for name, value in os.environ.items()
       if name not in ("CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU")}
SMI = shutil.which("nvidia-smi")
HAS_GPU = bool(SMI) and b"GPU 0" in subprocess.run([SMI, "-L"], capture_output=True).stdout
BF16 = ["--accelerator-kwargs", '{"mixed_precision": "bf16"}']
RUNS = {
    "sft.py": ["--bf16", "--max-steps", 40, "--logging-steps", 10],
    "reward.py": ["--bf16", "--max-steps", 40, "--logging-steps", 10],
    "dpo.py": ["--bf16", "--max-steps", 20],
    "iterative_sft.py": ["--bf16", "--num-train-epochs", 2],
    "ppo.py": [*BF16, "--batch-size", 32, "--mini-batch-size", 8, "--steps", 64],
    "ddpo.py": ["--bf16", "--num-epochs", 1, "--sample-num-steps", 5, "--num-samples", 2],
}


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("script", RUNS)
def test_a_script_learns_on_a_gpu_in_bfloat16(script, tmp_path):
    command = [sys.executable, script, *map(str, RUNS[script]), "--output-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    numbers = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert numbers and all(map(math.isfinite, numbers))
