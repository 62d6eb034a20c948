"""Weights shared among ranks (FSDP 2): each script then learns what it learns with whole weights on
every rank.

The two add the same float32 numbers in another order. Adam then moves a weight by another amount
only where its gradient is little more than rounding: allowed is 1e-3 of the whole change."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_ranks import metrics, once, torchrun

ROOT = Path(__file__).resolve().parent.parent
BLOCK = "GPT2Block"
SHARD_PPO = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
             "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
             "FSDP_TRANSFORMER_CLS_TO_WRAP": BLOCK, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
SHARD_TRAINER = ["--fsdp", "full_shard",
                 "--fsdp-config", json.dumps({"transformer_layer_cls_to_wrap": [BLOCK]})]
TRAINER = ["--per-device-train-batch-size", 4, "--max-steps", 3, "--eval-strategy", "no"]
# One prompt of PPO's is answered at a time: ranks then call the model unequally often
PPO = ["--batch-size", 4, "--mini-batch-size", 1, "--gradient-accumulation-steps", 2,
       "--ppo-epochs", 2, "--max-grad-norm", 0.1, "--learning-rate", 1e-4, "--max-new-tokens", 8,
       "--generation-batch-size", 1]
START = {"sft.py": "toy/blank", "reward.py": "toy/blank_reward"}  # the others start from toy/model
FEW_STEPS = {
    "ppo.py": [*PPO, "--steps", 16],
    "sft.py": TRAINER,
    "iterative_sft.py": ["--prompts-per-round", 4, "--num-samples", 2, "--max-new-tokens", 6,
                         "--per-device-train-batch-size", 2, "--max-steps", 2],
    "reward.py": TRAINER,
    "dpo.py": TRAINER,
}


def runs(folder):
    """-> {name: (script, flags, is it sharded?)}, in the order in which they run."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"query": query}) + "\n" for query in (
        "the plot was very dull, the acting was weak, the pacing was dull and the music was very",
        "the plot was", "in short, the plot was very flat, the pacing was",
        "the plot was very flat, the pacing was dull, the acting was weak and the end was") * 4))
    for script, flags in FEW_STEPS.items():
        for sharded in (False, True):
            more = ["--query-dataset", prompts] if script == "ppo.py" else []
            yield f"{script}-{'shards' if sharded else 'whole'}", script, [*flags, *more], sharded
    lora = [*PPO, "--save-freq", 1, "--lora-r", 2, "--query-dataset", prompts, "--steps"]
    yield "lora-whole", "ppo.py", [*lora, 16], False
    yield "lora-cut", "ppo.py", [*lora, 8], True
    yield "lora-cut", "ppo.py", [*lora, 16, "--resume-from", folder / "lora-cut"], True


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    def start(folder):
        todo = []
        for name, script, flags, sharded in runs(folder):
            ppo = script == "ppo.py"
            flags = [*flags, "--output-dir", folder / name]
            if sharded and not ppo:
                flags += SHARD_TRAINER
            todo.append({"script": script, "flags": list(map(str, flags)), "sharded": sharded,
                         "env": SHARD_PPO if sharded and ppo else {}})
        (folder / "runs.json").write_text(json.dumps(todo))
        done = torchrun("tests/sharded.py", folder / "runs.json")
        failed = [file.read_text() for file in sorted(folder.glob("runs.json.*"))]
        assert done.returncode == 0 and not failed, "\n".join([done.stderr[-5000:], *failed])

    return once(tmp_path_factory, "sharded", start)


def distance(a, b):
    """Length of the difference of two models' weights, but for the keys' bias: its gradient is
    rounding and nothing else, of which Adam makes whole steps."""
    parts = []
    for name in a:
        both = [weights[name].float() for weights in (a, b)]
        if name.endswith("c_attn.bias"):
            both = [torch.cat([bias.chunk(3)[0], bias.chunk(3)[2]]) for bias in both]
        parts.append((both[0] - both[1]).flatten())
    return torch.cat(parts).norm().item()


@pytest.mark.parametrize("script", FEW_STEPS)
def test_weights_in_shards_learn_what_whole_ones_do(script, job):
    whole, shards = (load_file(job / f"{script}-{how}" / "model.safetensors")
                     for how in ("whole", "shards"))
    start = load_file(ROOT / START.get(script, "toy/model") / "model.safetensors")
    if "lm_head.weight" in shards:  # tied: a file gathered from shards holds it under both names
        assert torch.equal(shards.pop("lm_head.weight"), shards["transformer.wte.weight"])
    assert whole.keys() == start.keys() == shards.keys()
    assert distance(whole, shards) < 1e-3 * distance(whole, start)


def test_ppo_on_shards_logs_what_it_logs_with_whole_weights(job):
    whole, shards = metrics(job / "ppo.py-whole"), metrics(job / "ppo.py-shards")
    assert len(whole) == 2
    for a, b in zip(whole, shards, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_ppo_on_shards_resumes_and_saves_an_adapter(job):
    name = "adapter_model.safetensors"
    whole, cut = load_file(job / "lora-whole" / name), load_file(job / "lora-cut" / name)
    assert whole.keys() == cut.keys()
    moved = torch.cat([weights.flatten() for key, weights in whole.items()
                       if "lora_B" in key])  # from zero
    assert distance(whole, cut) < 1e-3 * moved.norm().item()
