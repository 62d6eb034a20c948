"""dpo.py as a user runs it: the command line, what a run leaves behind, kill and resume, ranks, shards, real rows, bad input."""
import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import dpo
from common import TOY, InputError
from conftest import HOME, hf_model
from dpo import DPOConfig, DPOTrainer, main

ROOT = Path(__file__).resolve().parent.parent
PAIRS = [json.loads(line) for line in (TOY / "pairs.jsonl").read_text().splitlines()[:24]]


def script(*flags, ranks=0, sharded=False):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks else []
    launcher += ["tests/sharded.py"] * sharded
    return subprocess.run([sys.executable, *launcher, "dpo.py", *map(str, flags)], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})


def metrics(folder):
    """metrics.jsonl without the clock."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k} for row in rows]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


FEW = write_rows(Path(HOME.name) / "few_pairs.jsonl", PAIRS)


def small(folder, **fields):
    return DPOConfig(**{"output_dir": str(folder), "dataset": FEW, "per_device_train_batch_size": 4, "max_steps": 2, "save_strategy": "no",
                        "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, **fields})


# ------------------------------------------------------------------------------------------------ the default run
@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The default run's first 40 steps."""
    out = tmp_path_factory.mktemp("run")
    done = script("--max-steps", 40, "--output-dir", out)
    assert done.returncode == 0, done.stderr
    return out, done


def test_the_first_loss_is_ln_2_and_pairs_are_told_apart_soon(finished_run):
    rows = metrics(finished_run[0])
    assert rows[0]["loss"] == torch.tensor(2.0).log().item() and rows[0]["rewards/margins"] == 0
    (held_out,) = [row for row in rows if "eval_loss" in row]
    assert held_out["eval_rewards/accuracies"] > 0.7 and held_out["eval_loss"] < rows[0]["loss"]
    assert {"eval_rewards/chosen", "eval_rewards/margins", "eval_logps/rejected", "eval_logits/chosen"} <= set(held_out)


def test_a_run_leaves_a_model_that_the_plain_classes_load(finished_run):
    out, done = finished_run
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    before = AutoModelForCausalLM.from_pretrained(TOY / "model")
    assert any((a != b).any() for a, b in zip(model.parameters(), before.parameters()))
    text = pipeline("text-generation", model=str(out), tokenizer=tokenizer)("the plot was", max_new_tokens=4)
    assert text[0]["generated_text"].startswith("the plot was")
    assert "DPO" in (out / "README.md").read_text()
    assert "before training" in done.stdout and "after training" in done.stdout


def test_samples_before_and_after_are_kept(finished_run):
    rows = [json.loads(line) for line in (finished_run[0] / "samples.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [0] * 8 + [40] * 8
    assert rows[0]["prompt"] == rows[8]["prompt"] and rows[0]["policy"] != rows[8]["policy"]


# ------------------------------------------------------------------------------------------------ flags
def test_help_answers_offline_with_every_option():
    done = script("--help")
    assert done.returncode == 0, done.stderr
    for flag in ("--model-name", "--beta", "--loss-type", "--precompute-ref-log-probs", "--resume-from-checkpoint", "--share-prompts"):
        assert flag in done.stdout


def test_every_option_has_a_sentence_and_a_reader():
    source = Path(dpo.__file__).read_text()
    (body,) = [node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "DPOConfig"]
    fields = [node.target.id for node in body if isinstance(node, ast.AnnAssign)]
    for field, after in zip(body[1:], body[2:]):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(after, ast.Expr) and isinstance(after.value.value, str), field.target.id
    own = fields[fields.index("model_name"):]
    script_part = source[source.index("def main("):]
    for name in own:
        assert re.search(rf'config\.{name}\b|"{name}"', script_part) or name in ("lora_r", "lora_alpha"), name


@pytest.mark.parametrize("fields", [
    {"loss_type": "ipo", "beta": 0.5}, {"loss_type": "hinge"}, {"loss_type": "kto"}, {"label_smoothing": 0.1}, {"reference_free": True},
    {"precompute_ref_log_probs": True}, {"max_length": 20, "max_prompt_length": 6, "truncation_mode": "keep_start"},
    {"share_prompts": False}, {"share_prompts": True}, {"dataset_num_proc": 2}, {"lora_r": 4, "lora_alpha": 8}, {"bf16": True},
    {"activation_checkpointing": True}, {"torch_dtype": "bfloat16"}, {"ref_model_name": str(TOY / "model")}],
    ids=lambda fields: next(iter(fields)))
def test_each_flag_runs_and_reaches_the_trainer(fields, tmp_path, monkeypatch):
    seen = {}
    init = DPOTrainer.__init__

    def spy(self, *args, **kwargs):
        seen.update(kwargs)
        init(self, *args, **kwargs)
        seen["trainer"] = self

    monkeypatch.setattr(DPOTrainer, "__init__", spy)
    main(small(tmp_path, **fields))
    first = metrics(tmp_path)[0]["loss"]
    if fields.get("loss_type", "sigmoid") == "sigmoid" and not fields.get("reference_free"):
        assert first == pytest.approx(math.log(2), abs=1e-6)
    for name, value in fields.items():
        assert seen.get(name, value) == value or name == "ref_model_name"
    if "lora_r" in fields:
        assert seen["peft_config"].r == 4 and seen["peft_config"].lora_alpha == 8
        assert (tmp_path / "adapter_model.safetensors").exists()
    if "torch_dtype" in fields:
        assert seen["trainer"].model.dtype == torch.bfloat16


def test_beta_is_0_1_for_any_model_of_ones_own(tmp_path):
    config = small(tmp_path, model_name=str(TOY / "model"))
    main(config)
    assert config.beta == 0.1 and config.learning_rate == pytest.approx(5e-4, rel=0.01)


def test_an_adapter_of_a_run_goes_on_as_model_name(tmp_path):
    main(small(tmp_path / "first", lora_r=4, learning_rate=1e-2, max_steps=4))
    main(small(tmp_path / "second", model_name=str(tmp_path / "first")))
    assert metrics(tmp_path / "second")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_an_encoder_decoder_is_trained(tmp_path):
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(tmp_path / "t5")
    hf_model("t5", vocab_size=400).save_pretrained(tmp_path / "t5")
    main(small(tmp_path / "out", model_name=str(tmp_path / "t5"), max_target_length=8))
    assert metrics(tmp_path / "out")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


# ------------------------------------------------------------------------------------------------ resume, ranks, shards
def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path):
    fields = {"eval_dataset": FEW, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
              "save_total_limit": 2}
    main(small(tmp_path, **fields))
    whole, weights = metrics(tmp_path), (tmp_path / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "checkpoint-4")  # what a run that is killed in its fourth step leaves
    main(small(tmp_path, **fields, resume_from_checkpoint=str(tmp_path)))
    assert [{**row, "train_loss": None} for row in metrics(tmp_path)] == [{**row, "train_loss": None} for row in whole]
    assert (tmp_path / "model.safetensors").read_bytes() == weights


def test_two_ranks_and_two_shards_end_where_one_process_does(tmp_path):
    flags = {"dataset": FEW, "eval_dataset": FEW, "max_steps": 3, "learning_rate": 0.01, "optim": "sgd", "save_strategy": "no"}
    main(small(tmp_path / "one", **{**flags, "per_device_train_batch_size": 8}))
    flags = [x for name, value in flags.items() for x in ("--" + name.replace("_", "-"), value)] + ["--per-device-train-batch-size", 4]
    shard = ["--fsdp", "full_shard", "--fsdp-config", '{"transformer_layer_cls_to_wrap": ["GPT2Block"]}']
    for name, more, sharded in (("ranks", ["--precompute-ref-log-probs"], False), ("shards", shard, True)):
        done = script(*flags, *more, "--output-dir", tmp_path / name, ranks=2, sharded=sharded)
        assert done.returncode == 0, done.stderr
    one, start = (load_file(folder / "model.safetensors") for folder in (tmp_path / "one", TOY / "model"))
    assert max((one[weight] - start[weight]).abs().max() for weight in one) > 1e-3
    for name in ("ranks", "shards"):
        end = load_file(tmp_path / name / "model.safetensors")
        for weight, value in ((k, v) for k, v in end.items() if k in one):  # shards save the tied head's weight too
            torch.testing.assert_close(value, one[weight], rtol=0, atol=2e-5, msg=lambda m: f"{name} {weight}: {m}")
        for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / name), strict=True):
            for key in ("loss", "rewards/margins", "logps/chosen", "logits/chosen", "eval_loss", "eval_rewards/accuracies"):
                assert b.get(key, 0) == pytest.approx(a.get(key, 0), rel=1e-3, abs=1e-4), (name, key)


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize("fields, sentence", [
    ({"dataset": "missing.jsonl"}, "data file missing.jsonl does not exist"), ({"model_name": "no/such"}, "model_name no/such can't be loaded"),
    ({"ref_model_name": "no/such"}, "model no/such can't be loaded"), ({"beta": -1.0}, "beta=-1.0"),
    ({"resume_from_checkpoint": "nowhere"}, "no checkpoint-<n> there"), ({"max_prompt_length": 500}, "leaves no token for an answer"),
    ({"label_smoothing_factor": 0.1}, "DPO's is label_smoothing")], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_bad_input_is_one_clear_sentence(fields, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        main(small(tmp_path, **fields))


def test_the_command_line_ends_with_the_sentence_and_no_traceback(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "answer": "b"}])
    done = script("--dataset", rows, "--output-dir", tmp_path / "out")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "dpo.py: error: train_dataset has the columns ['prompt', 'answer'] and lacks chosen, rejected" in done.stderr
