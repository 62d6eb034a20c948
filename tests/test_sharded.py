"""Weights shared among ranks (FSDP 2): each script then learns what it learns with whole weights on every rank."""
import pytest
from safetensors.torch import load_file

from test_ranks import torchrun

SHARD_PPO = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
             "FSDP_TRANSFORMER_CLS_TO_WRAP": "GPT2Block", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
SHARD_TRAINER = ["--fsdp", "full_shard", "--fsdp-config", '{"transformer_layer_cls_to_wrap": ["GPT2Block"]}']
FEW_STEPS = {
    "ppo.py": ["--batch-size", 4, "--mini-batch-size", 2, "--ppo-epochs", 1, "--max-new-tokens", 6, "--steps", 16],
    "sft.py": ["--per-device-train-batch-size", 4, "--max-steps", 3, "--eval-strategy", "no"],
    "iterative_sft.py": ["--prompts-per-round", 4, "--num-samples", 2, "--per-device-train-batch-size", 2, "--max-steps", 2,
                         "--max-new-tokens", 6],
    "reward.py": ["--per-device-train-batch-size", 4, "--max-steps", 3, "--eval-strategy", "no"],
    "dpo.py": ["--per-device-train-batch-size", 4, "--max-steps", 3, "--eval-strategy", "no"],
}


def run(script, folder, sharded, flags=(), **env):
    flags = [*FEW_STEPS[script], "--output-dir", folder, *flags]
    if sharded:
        env, flags = ({**SHARD_PPO, **env}, flags) if script == "ppo.py" else (env, [*flags, *SHARD_TRAINER])
    done = torchrun(*(["tests/sharded.py"] if sharded else []), script, *flags, **env)
    assert done.returncode == 0, done.stderr
    return done


def largest_difference(a, b):
    """Between the weights of two files, but for the keys' bias, whose gradient is rounding and nothing else."""
    a, b = load_file(a), load_file(b)
    both = [name for name in a if name in b and not name.endswith("c_attn.bias")]
    assert len(both) > 3
    return max((a[name] - b[name]).abs().max().item() for name in both)


@pytest.mark.parametrize("script", FEW_STEPS)
def test_weights_in_shards_learn_what_whole_ones_do(script, tmp_path):
    for folder, sharded in (("whole", False), ("shards", True)):
        run(script, tmp_path / folder, sharded)
    assert largest_difference(tmp_path / "whole" / "model.safetensors", tmp_path / "shards" / "model.safetensors") < 2e-5


def test_ppo_on_shards_resumes_and_saves_an_adapter(tmp_path):
    """P34: weights are gathered once for generation, however unequally long the ranks generate."""
    flags = ["--save-freq", 1, "--lora-r", 2]
    run("ppo.py", tmp_path / "whole", False, flags)
    run("ppo.py", tmp_path / "cut", True, [*flags, "--steps", 8])
    run("ppo.py", tmp_path / "cut", True, [*flags, "--resume-from", tmp_path / "cut"])
    name = "adapter_model.safetensors"
    assert largest_difference(tmp_path / "whole" / name, tmp_path / "cut" / name) < 2e-5
