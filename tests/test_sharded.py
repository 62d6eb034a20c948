"""Weights shared among ranks (FSDP 2): each script then learns what it learns with whole weights on
every rank.

The two add the same float32 numbers in another order. Adam then moves a weight by another amount
only where its gradient is little more than rounding: allowed is 1e-3 of the whole change. An
adapter on a base in bfloat16 gets the same gradients to the bit, as long as they are summed in
float32. All weights in mixed precision are rounded at other places than on whole ranks."""
import json
import math
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_ranks import metrics, once, torchrun
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent
BLOCK = "GPT2Block"
SHARD_PPO = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
             "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
             "FSDP_TRANSFORMER_CLS_TO_WRAP": BLOCK, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
LAYERS = {"transformer_layer_cls_to_wrap": [BLOCK]}
SHARD_TRAINER = ["--fsdp", "full_shard", "--fsdp-config", json.dumps(LAYERS)]
# only one rank loads the weights: accelerate takes tied ones apart, and ties them again
ONE_LOADS_PPO = {**SHARD_PPO, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
IN_PARTS_PPO = {**ONE_LOADS_PPO, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
ONE_LOADS_TRAINER = ["--fsdp", "full_shard",
                     "--fsdp-config", json.dumps({**LAYERS, "cpu_ram_efficient_loading": True,
                                                  "state_dict_type": "SHARDED_STATE_DICT"})]
TRAINER = ["--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 2,
           "--max-steps", 3, "--eval-strategy", "no"]
# One prompt of PPO's is answered at a time: ranks then call the model unequally often. Optimizer
# steps are dropped, by their last minibatch too
PPO = ["--batch-size", 4, "--mini-batch-size", 1, "--gradient-accumulation-steps", 2,
       "--ppo-epochs", 2, "--max-grad-norm", 0.1, "--learning-rate", 1e-4, "--max-new-tokens", 8,
       "--generation-batch-size", 1, "--ratio-threshold", 1.002]
START = {"sft.py": "toy/blank", "reward.py": "toy/blank_reward"}  # the others start from toy/model
FEW_STEPS = {
    "ppo.py": [*PPO, "--steps", 16],
    "sft.py": TRAINER,
    "iterative_sft.py": ["--prompts-per-round", 4, "--num-samples", 2, "--max-new-tokens", 6,
                         "--per-device-train-batch-size", 2, "--max-steps", 2],
    "reward.py": TRAINER,
    "dpo.py": TRAINER,
}
DATA = {"sft.py": "reviews.jsonl", "reward.py": "pairs.jsonl", "dpo.py": "pairs.jsonl"}
HAVE_REFERENCE = {"ppo.py": ("objective/kl", 0), "dpo.py": ("loss", math.log(2))}
LORA = ["--lora-r", 2, "--torch-dtype", "bfloat16", "--bf16"]
SAVED = {"lora-full": SHARD_PPO, "lora-parts": IN_PARTS_PPO, "lora-iterative": SHARD_TRAINER}
# the encoder's and the decoder's embeddings are modules of their own, of one weight
T5_PPO = {**SHARD_PPO, "FSDP_TRANSFORMER_CLS_TO_WRAP": "T5Block"}
T5_TRAINER = ["--fsdp", "full_shard",
              "--fsdp-config", json.dumps({"transformer_layer_cls_to_wrap": ["T5Block"]})]
REFUSED = {"version 1": ([], {"FSDP_VERSION": "1"}), "two types": (LORA[2:4], {}),
           "renamed modules": (LORA, {"FSDP_ACTIVATION_CHECKPOINTING": "true"})}


def make_t5(folder):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy/model")
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        pad_token_id=0, decoder_start_token_id=0, eos_token_id=tokenizer.eos_token_id,
    )).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def runs(folder):
    """Yield (name, script, flags, None or how to shard), in the order in which they run."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"query": query}) + "\n" for query in (
        "the plot was very dull, the acting was weak, the pacing was dull and the music was very",
        "the plot was", "in short, the plot was very flat, the pacing was",
        "the plot was very flat, the pacing was dull, the acting was weak and the end was") * 4))
    for script, flags in FEW_STEPS.items():
        ppo = script == "ppo.py"
        flags = [*flags, "--query-dataset", prompts] if ppo else flags
        if script in DATA:
            rows = folder / f"few_{DATA[script]}"
            with (ROOT / "toy" / DATA[script]).open() as lines:
                rows.write_text("".join(islice(lines, 24)))
            flags = [*flags, "--logging-steps", 1, "--dataset", rows, "--eval-dataset", rows]
        yield f"{script}-whole", script, flags, None
        yield f"{script}-shards", script, flags, ONE_LOADS_PPO if ppo else ONE_LOADS_TRAINER
        how = SHARD_PPO if ppo else SHARD_TRAINER
        if ppo or script in DATA:
            yield f"{script}-bf16", script, [*flags, "--bf16"], how
            yield f"{script}-lora-whole", script, [*flags, *LORA], None
            yield f"{script}-lora-shards", script, [*flags, *LORA], how
    lora = ["--lora-r", 2, "--save-total-limit", 2]
    pushed = ["--push-to-hub-if-best-kwargs", '{"repo_id": "me/best"}']  # there is no network
    lora_ppo = [*PPO, "--steps", 16, "--save-freq", 1, "--query-dataset", prompts, *lora, *pushed]
    yield "lora-whole", "ppo.py", lora_ppo, None
    for name, how in SAVED.items():
        script, flags, resume = "ppo.py", lora_ppo, "--resume-from"
        if name == "lora-iterative":
            script, resume = "iterative_sft.py", "--resume-from-checkpoint"
            flags = [*FEW_STEPS[script][2:], "--prompts-per-round", 2, "--save-steps", 1, *lora]
        yield name, script, flags, how
        yield f"{name}-resumed", script, [*flags, resume, folder / name / "checkpoint-1"], how
    make_t5(folder / "t5")
    t5 = [*PPO, "--save-freq", 1, "--query-dataset", prompts, "--model-name", folder / "t5"]
    yield "ppo.py-t5-whole", "ppo.py", [*t5, "--steps", 16], None
    yield "ppo.py-t5-shards", "ppo.py", [*t5, "--steps", 8], T5_PPO
    yield "ppo.py-t5-shards", "ppo.py", [
        *t5, "--steps", 16, "--resume-from", folder / "ppo.py-t5-shards"], T5_PPO
    t5 = [*TRAINER, "--dataset", folder / "few_pairs.jsonl", "--model-name", folder / "t5"]
    yield "dpo.py-t5-whole", "dpo.py", t5, None
    yield "dpo.py-t5-shards", "dpo.py", t5, T5_TRAINER
    for name, (flags, env) in REFUSED.items():
        yield name, "ppo.py", [*PPO, *flags], {**SHARD_PPO, **env}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    def start(folder):
        todo, refused = [], {}
        for name, script, flags, how in runs(folder):
            if name in REFUSED:
                refused[name] = folder / f"runs.json.{len(todo)}.0"
            flags = [*flags, "--output-dir", folder / name]
            if isinstance(how, list):
                flags += how
            todo.append({"script": script, "flags": list(map(str, flags)), "sharded": bool(how),
                         "env": how if isinstance(how, dict) else {}})
        (folder / "runs.json").write_text(json.dumps(todo))
        done = torchrun("tests/sharded.py", folder / "runs.json")
        for name, error in refused.items():
            error.rename(folder / f"{name}.txt")
            error.with_suffix(".1").unlink()
        failed = [file.read_text() for file in sorted(folder.glob("runs.json.*"))]
        assert done.returncode == 0 and not failed, "\n".join([done.stderr[-5000:], *failed])

    return once(tmp_path_factory, "sharded", start)


def distance(a, b):
    """Length of the difference of two models' weights, but for the keys' bias and what moves all
    scores of a classifier alike: their gradients are rounding and nothing else, of which Adam makes
    whole steps."""
    parts = []
    for name in a:
        if name.endswith("ln_f.bias") and "score.weight" in a:
            continue
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
    assert whole.keys() == start.keys() == shards.keys()
    assert distance(whole, shards) < 1e-3 * distance(whole, start)
    if script != "ppo.py":  # checkpoints are in shards, as the configuration says
        assert list(job.glob(f"{script}-shards/checkpoint-*/**/*.distcp"))


def test_ppo_on_shards_logs_what_it_logs_with_whole_weights(job):
    whole, shards = metrics(job / "ppo.py-whole"), metrics(job / "ppo.py-shards")
    assert len(whole) == 2
    for a, b in zip(whole, shards, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_ppo_on_shards_trains_and_saves_an_adapter(job):
    name = "adapter_model.safetensors"
    whole, shards = load_file(job / "lora-whole" / name), load_file(job / "lora-full" / name)
    assert whole.keys() == shards.keys()
    moved = torch.cat([weights.flatten() for key, weights in whole.items()
                       if "lora_B" in key])  # from zero
    assert distance(whole, shards) < 1e-3 * moved.norm().item()


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_of_shards_holds_what_trains_and_resumes_to_the_same_bits(name, job):
    checkpoint = job / name / "checkpoint-1"
    if name == "lora-parts":
        folder = FileSystemReader(checkpoint / "pytorch_model_fsdp_0")
        saved = folder.read_metadata().state_dict_metadata
    else:
        saved = torch.load(checkpoint / "pytorch_model_fsdp.bin")
    assert all("lora_" in key or "v_head." in key for key in saved)
    whole, resumed = (load_file(job / run / "adapter_model.safetensors")
                      for run in (name, f"{name}-resumed"))
    assert len(saved) >= len(whole) == len(resumed) > 0
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("script", HAVE_REFERENCE)
def test_an_encoder_decoder_in_shards_learns_what_whole_ranks_do(script, job):
    whole, shards = (load_file(job / f"{script}-t5-{how}" / "model.safetensors")
                     for how in ("whole", "shards"))  # PPO's shards are saved and resumed
    start = load_file(job / "t5/model.safetensors")
    assert whole.keys() == start.keys() == shards.keys()
    assert distance(whole, shards) < 1e-3 * distance(whole, start)


@pytest.mark.parametrize("script", [*DATA, "ppo.py"])
def test_an_adapter_in_shards_learns_the_same_in_bfloat16(script, job):
    runs = [job / f"{script}-lora-{how}" for how in ("whole", "shards")]
    whole, shards = (load_file(run / "adapter_model.safetensors") for run in runs)
    assert whole.keys() == shards.keys()
    moved = torch.cat([weights.flatten() for key, weights in whole.items()
                       if "lora_B" in key])  # from zero
    # reward.py splits a batch by length on whole ranks; PPO's value head is gathered in bfloat16
    allowed = {"reward.py": 0.3, "ppo.py": 5e-3}.get(script, 1e-6)
    assert distance(whole, shards) < allowed * moved.norm().item()
    name = "objective/scores" if script == "ppo.py" else "loss"
    first, second = (metrics(run)[0][name] for run in runs)
    assert first == pytest.approx(second, rel=1e-5)


@pytest.mark.parametrize("script", HAVE_REFERENCE)
def test_in_bfloat16_policy_and_reference_in_shards_are_equal_at_first(script, job):
    name, expected = HAVE_REFERENCE[script]
    first = metrics(job / f"{script}-bf16")[0]
    assert first[name] == pytest.approx(expected, rel=1e-6, abs=0)
    saved = load_file(job / f"{script}-bf16" / "model.safetensors")
    assert {weights.dtype for weights in saved.values()} == {torch.float32}


@pytest.mark.parametrize("script", DATA)  # PPO samples other responses in bfloat16
def test_all_weights_in_shards_learn_nearly_the_same_in_bfloat16(script, job):
    whole, shards = (load_file(job / f"{script}-{how}" / "model.safetensors")
                     for how in ("whole", "bf16"))
    start = load_file(ROOT / START.get(script, "toy/model") / "model.safetensors")
    assert distance(whole, shards) < 0.5 * distance(whole, start)


@pytest.mark.parametrize("name, sentence", [
    ("version 1", "InputError: fsdp_version=1 (accelerate's or Trainer's configuration): only "
                  "FSDP 2 is supported"),
    ("renamed modules", "InputError: activation_checkpointing (of FSDP's configuration)"),
    ("two types", "InputError: torch_dtype=bfloat16 and float32: FSDP trains weights of one type"),
])
def test_what_fsdp_cannot_shard_is_refused(name, sentence, job):
    assert sentence in (job / f"{name}.txt").read_text()
