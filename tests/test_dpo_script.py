"""dpo.py as a user runs it: what a run leaves, what flags do, resume, ranks, shards, bad input."""
import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HOME, hf_model
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, pipeline

from common import TOY, InputError
from dpo import DPOConfig, DPOTrainer, main

ROOT = Path(__file__).resolve().parent.parent
LN2 = math.log(2)
PAIRS = [json.loads(line) for line in (TOY / "pairs.jsonl").read_text().splitlines()[:24]]


def metrics(folder):
    """metrics.jsonl without the clock."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    clock = ("runtime", "per_second")
    return [{k: v for k, v in row.items() if not any(word in k for word in clock)} for row in rows]


def training(folder):
    """The lines of the training steps."""
    return [row for row in metrics(folder) if "loss" in row]


def samples(folder):
    return [json.loads(line) for line in (Path(folder) / "samples.jsonl").read_text().splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


FEW = write_rows(Path(HOME.name) / "few_pairs.jsonl", PAIRS)


def small(folder, **fields):
    return {"output_dir": str(folder), "dataset": FEW, "per_device_train_batch_size": 4,
            "max_steps": 2, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
            "per_device_eval_batch_size": 64, "dataloader_pin_memory": False, **fields}


TOY_RUN = {"beta": 3.0, "gradient_checkpointing": False}


def run(folder, **fields):
    """The config of a small run, after the run."""
    config = DPOConfig(**small(folder, **{**TOY_RUN, **fields}))
    main(config)
    return config


# -------------------------------------------------------- the default run
@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The toy run's first 40 steps -> its folder, what it printed, the metrics it returned."""
    out, printed = tmp_path_factory.mktemp("run"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        logged = main(DPOConfig(
            **TOY_RUN, output_dir=str(out), max_steps=40, use_cpu=True, disable_tqdm=True,
            per_device_train_batch_size=32, per_device_eval_batch_size=64))
    return out, printed.getvalue(), logged


def test_the_first_loss_is_ln_2_and_held_out_pairs_are_told_apart_soon(finished_run):
    out, _, logged = finished_run
    rows = metrics(out)
    assert rows[0]["loss"] == pytest.approx(LN2, abs=1e-5)
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert [row["update"] for row in training(out)] == list(range(1, 41))
    (held_out,) = [row for row in rows if "eval_loss" in row]
    assert held_out["eval_rewards/accuracies"] > 0.7 and held_out["eval_loss"] < rows[0]["loss"]
    keys = {"rewards/chosen", "rewards/margins", "logps/rejected", "logits/chosen"}
    assert {f"eval_{key}" for key in keys} <= set(held_out)
    assert logged["eval_loss"] == held_out["eval_loss"]
    # the model that is saved is the one that was evaluated, on the test pairs of the toy
    rows = [json.loads(line) for line in (TOY / "pairs_test.jsonl").read_text().splitlines()]
    args = TrainingArguments(str(out / "again"), use_cpu=True, report_to="none",
                             per_device_eval_batch_size=64)
    models = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, TOY / "model"))
    trainer = DPOTrainer(*models, beta=3.0, args=args, eval_dataset=Dataset.from_list(rows),
                         tokenizer=AutoTokenizer.from_pretrained(TOY / "model"))
    again = trainer.evaluate()
    for key in ("eval_loss", "eval_rewards/accuracies", "eval_logps/chosen"):
        assert again[key] == pytest.approx(held_out[key], rel=1e-3), key


def test_a_run_leaves_a_model_that_the_plain_classes_load(finished_run):
    out, printed, _ = finished_run
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    before = AutoModelForCausalLM.from_pretrained(TOY / "model")
    assert any((a != b).any() for a, b in zip(model.parameters(), before.parameters(), strict=True))
    write = pipeline("text-generation", model=str(out), tokenizer=tokenizer)
    text = write("the plot was", max_new_tokens=4)
    assert text[0]["generated_text"].startswith("the plot was")
    assert "DPO" in (out / "README.md").read_text()
    for row in samples(out):
        assert row["prompt"] in printed and row["policy"].strip() in printed


def test_samples_before_and_after_are_kept(finished_run):
    rows = samples(finished_run[0])
    before, after = ([row for row in rows if row["update"] == update] for update in (0, 40))
    assert len(before) == len(after) == 8 == len(rows) / 2
    assert [row["prompt"] for row in before] == [row["prompt"] for row in after]
    assert before[0]["policy"] != after[0]["policy"]


def test_samples_before_and_after_are_drawn_with_the_same_random_numbers(tmp_path):
    run(tmp_path, learning_rate=0.0)
    texts = [row["policy"] for row in samples(tmp_path)]
    assert len(texts) == 16 and texts[:8] == texts[8:]


def test_the_learning_rate_follows_the_size_of_the_model(finished_run, tmp_path):
    larger = tmp_path / "larger"
    hf_model("gpt2", vocab_size=400, n_embd=64).save_pretrained(larger)
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(larger)
    run(tmp_path / "out", model_name=str(larger), max_steps=1, max_length=24)
    for folder, model in ((finished_run[0], TOY / "model"), (tmp_path / "out", larger)):
        weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model).parameters())
        want = 5e-4 * math.sqrt(1e5 / weights)
        assert training(folder)[0]["learning_rate"] == pytest.approx(want, rel=1e-6)


def test_beta_scales_the_first_gradient_and_a_lora_has_ten_times_the_learning_rate(tmp_path):
    first = {}
    for name, fields in {"3": {}, "0.1": {"beta": 0.1}, "lora": {"lora_r": 2}}.items():
        run(tmp_path / name, max_steps=1, max_grad_norm=0, **fields)
        first[name] = training(tmp_path / name)[0]
    assert first["3"]["grad_norm"] == pytest.approx(30 * first["0.1"]["grad_norm"], rel=1e-4)
    # sqrt(1e5 / weights): the adapter's few weights count too
    ratio = first["lora"]["learning_rate"] / first["3"]["learning_rate"]
    assert 9 < ratio < 10


# -------------------------------------------------------- flags
def direct(folder, model=None, ref_model=None, args=(), **arguments):
    """The log lines of a DPOTrainer that is given what the flags say: same rows, seed and model."""
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    model = model or AutoModelForCausalLM.from_pretrained(TOY / "model")
    fields = {"learning_rate": 5e-4, "lr_scheduler_type": "cosine", "logging_steps": 1,
              "report_to": "none", **small(folder, **dict(args))}
    del fields["dataset"]
    trainer = DPOTrainer(model, ref_model, args=TrainingArguments(**fields), tokenizer=tokenizer,
                         train_dataset=Dataset.from_list(PAIRS), **{"beta": 3.0, **arguments})
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def other_toy():
    """The toy model, a little away from itself."""
    model = AutoModelForCausalLM.from_pretrained(TOY / "model")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


def toy_lora():
    from peft import LoraConfig
    return LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def default_lines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("default")
    run(folder, learning_rate=5e-4)
    return training(folder)


FLAGS = [{"loss_type": "ipo", "beta": 0.5}, {"loss_type": "hinge"}, {"loss_type": "kto"},
         {"label_smoothing": 0.1}, {"reference_free": True}, {"max_length": 14},
         {"max_prompt_length": 4},
         {"max_length": 14, "max_prompt_length": 4, "truncation_mode": "keep_start"}]


@pytest.mark.parametrize("flags, arguments", [
    *((flags, flags) for flags in FLAGS),
    ({"ref_model_name": "other"}, {"ref_model": other_toy}),
    ({"lora_r": 4, "lora_alpha": 32}, {"peft_config": toy_lora}),
    ({"bf16": True}, {"args": {"bf16": True}})],
    ids=lambda value: "-".join(value))
def test_a_flag_trains_as_the_argument_of_the_trainer_does(flags, arguments, tmp_path,
                                                           default_lines):
    if "ref_model_name" in flags:
        other_toy().save_pretrained(tmp_path / "other")
        flags = {"ref_model_name": str(tmp_path / "other")}
    run(tmp_path / "flags", learning_rate=5e-4, **flags)
    made = {name: value() if callable(value) else value for name, value in arguments.items()}
    want = direct(tmp_path / "direct", **made)
    got = training(tmp_path / "flags")
    first_losses = {"ipo": 1.0, "hinge": 1.0, "kto": 0.5}
    if "reference_free" not in flags and "ref_model_name" not in flags:
        first = first_losses.get(flags.get("loss_type"), LN2)
        assert got[0]["loss"] == pytest.approx(first, abs=1e-4)
    keys = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected")
    for line, expected in zip(got, want, strict=True):
        for key in keys:
            assert line[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key
    pairs = zip(got, default_lines, strict=True)
    changed = max(abs(line[key] - usual[key]) for line, usual in pairs for key in keys)
    assert changed > 1e-3  # the flag has an effect that is seen
    if "lora_r" in flags:
        assert (tmp_path / "flags" / "adapter_model.safetensors").exists()


def test_flags_that_save_time_or_memory_change_no_number(tmp_path, default_lines):
    run(tmp_path, learning_rate=5e-4, precompute_ref_log_probs=True, dataset_num_proc=2,
        activation_checkpointing=True)
    for line, usual in zip(training(tmp_path), default_lines, strict=True):
        assert line.keys() == usual.keys()
        for key, value in usual.items():
            assert line[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def test_torch_dtype_is_the_type_of_the_weights(tmp_path):
    other_toy().save_pretrained(tmp_path / "other")
    for name, ref in (("own", None), ("other", str(tmp_path / "other"))):
        run(tmp_path / name, torch_dtype="bfloat16", ref_model_name=ref, max_steps=1)
        saved = load_file(tmp_path / name / "model.safetensors")
        assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    assert training(tmp_path / "own")[0]["loss"] == pytest.approx(LN2, abs=1e-4)


def test_training_goes_on_from_an_adapter_of_a_run(tmp_path):
    run(tmp_path / "first", lora_r=4, learning_rate=1e-2, max_steps=4)
    run(tmp_path / "second", model_name=str(tmp_path / "first"), learning_rate=1e-2, max_steps=1)
    assert training(tmp_path / "second")[0]["loss"] == pytest.approx(LN2, abs=1e-5)
    files = (tmp_path / name / "adapter_model.safetensors" for name in ("first", "second"))
    first, second = map(load_file, files)
    assert first.keys() == second.keys()
    assert any((first[name] != second[name]).any() for name in first)
    assert not list(tmp_path.glob("**/reference"))  # what is saved is the policy's adapter alone


def test_a_killed_run_that_began_with_an_adapter_goes_on_against_that_adapter(tmp_path):
    run(tmp_path / "first", lora_r=4, learning_rate=1e-2, max_steps=4)
    fields = {"model_name": str(tmp_path / "first"), "max_steps": 3, "save_steps": 1,
              "save_strategy": "steps", "save_total_limit": 2, "adam_epsilon": 1e-5}
    run(tmp_path / "out", **fields)
    whole = training(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-3")
    run(tmp_path / "out", **fields, resume_from_checkpoint=str(tmp_path / "out"))
    for row, other in zip(training(tmp_path / "out"), whole, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert whole[-1]["loss"] != pytest.approx(LN2, abs=1e-4)


def test_an_encoder_decoder_is_trained(tmp_path):
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(tmp_path / "t5")
    hf_model("t5", vocab_size=400).save_pretrained(tmp_path / "t5")
    run(tmp_path / "out", model_name=str(tmp_path / "t5"), max_target_length=8, lora_r=4)
    assert training(tmp_path / "out")[0]["loss"] == pytest.approx(LN2, abs=1e-5)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_samples_during_evaluation_go_on_in_the_file_of_the_run(tmp_path):
    run(tmp_path, eval_dataset=FEW, eval_strategy="steps", eval_steps=1,
        per_device_eval_batch_size=4, generate_during_eval=True)
    updates = [row["update"] for row in samples(tmp_path)]
    assert updates == [0] * 8 + [1] * 4 + [2] * 4 + [2] * 8
    assert all("reference" in row for row in samples(tmp_path)[8:16])


# -------------------------------------------------------- resume, ranks, shards
def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path):
    # a larger epsilon: Adam else turns a gradient of rounding noise into a whole step
    fields = {"eval_dataset": FEW, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4,
              "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2,
              "adam_epsilon": 1e-5}
    run(tmp_path, **fields)
    whole, weights = metrics(tmp_path), load_file(tmp_path / "model.safetensors")
    shutil.rmtree(tmp_path / "checkpoint-4")  # what a run that is killed in its fourth step leaves
    run(tmp_path, **fields, resume_from_checkpoint=str(tmp_path))
    rest = metrics(tmp_path)
    assert [row["update"] for row in rest] == [row["update"] for row in whole]
    for row, other in zip(rest, whole, strict=True):
        assert row.keys() == other.keys()
        for key in row:
            assert row[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), key
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-6)


# Each rank runs main() once per config of the file argv[1]. Accelerate shards weights on GPUs only,
# so where a config asks for shards (FSDP 2) the ranks are said to be GPUs.
RANKS = f"""
import json, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
import dpo

begin, sharded = Accelerator.__init__, False

def begin_on_ranks(self, *args, **kwargs):
    if sharded:
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    begin(self, *args, **kwargs)

Accelerator.__init__ = begin_on_ranks
torch.set_num_threads(1)
for fields in json.load(open(sys.argv[1])):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    sharded = "fsdp" in fields
    dpo.main(dpo.DPOConfig(**fields))
torch.distributed.destroy_process_group()
os._exit(0)  # torch may abort as it frees the groups of several runs: end here
"""
# 24 pairs to learn from; 7 held out, in batches of 2: the last batches of two ranks are not alike
LAYERS = {"transformer_layer_cls_to_wrap": ["GPT2Block"]}
JOBS = {"plain": {},
        "precomputed": {"precompute_ref_log_probs": True, "generate_during_eval": True},
        "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2,
                        "logging_steps": 3},
        "lora": {"lora_r": 4},
        "large": {"per_device_train_batch_size": 12},
        "shards": {"fsdp": "full_shard", "fsdp_config": LAYERS}}
# the same on one process; the others are compared with "plain"
ONE = {"plain": {}, "lora": {"lora_r": 4}, "accumulated": {"logging_steps": 3},
       "large": {"per_device_train_batch_size": 24}}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Runs on two ranks, all in one job, and the same on one process -> the folder of all."""
    folder = tmp_path_factory.mktemp("ranks")
    held_out = write_rows(folder / "held_out.jsonl", PAIRS[3:10])
    fields = {"eval_dataset": held_out, "max_steps": 3, "learning_rate": 0.01, "optim": "sgd",
              "eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 2}
    configs = [small(folder / name, **TOY_RUN, **{**fields, **more})
               for name, more in JOBS.items()]
    (folder / "configs.json").write_text(json.dumps(configs))
    (folder / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", str(folder / "ranks.py"), str(folder / "configs.json")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr[-6000:]
    for name, more in ONE.items():
        run(folder / f"{name}_one", **{**fields, "per_device_train_batch_size": 8, **more})
    return folder


@pytest.mark.parametrize("name", JOBS)
def test_two_ranks_end_where_one_process_does(name, ranks):
    one = ranks / (f"{name}_one" if name in ONE else "plain_one")
    file = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
    want, got = load_file(one / file), load_file(ranks / name / file)
    start = load_file(TOY / "model" / "model.safetensors")
    if name == "lora":  # the adapter adds nothing at the start: lora_B is 0
        start = {weight: 0 * value for weight, value in want.items() if "lora_B" in weight}
    both = start.keys() & want.keys()
    step = max((want[weight] - start[weight]).abs().max().item() for weight in both)
    assert step > 1e-3
    # float32 sums in another order differ by 1e-6 of the step, wrong factors by the step itself
    for weight in both:
        torch.testing.assert_close(got[weight], want[weight], rtol=0, atol=1e-3 * step)
    rows, other = metrics(ranks / name), metrics(one)
    assert [row["update"] for row in rows] == [row["update"] for row in other]
    for row, expected in zip(rows, other, strict=True):
        assert row.keys() == expected.keys()
        for key in row.keys() - {"train_loss", "total_flos"}:
            # one of the 8 pairs of LoRA's second step has a margin of 1e-6, of either sign
            one_pair = 1 / 8 if name == "lora" and key == "rewards/accuracies" else 0
            close = pytest.approx(expected[key], rel=1e-3, abs=1e-4 + one_pair)
            assert row[key] == close, key


def test_two_ranks_write_each_sample_once(ranks):
    updates = [row["update"] for row in samples(ranks / "plain")]
    assert updates == [0] * 7 + [3] * 7
    updates = [row["update"] for row in samples(ranks / "precomputed")]
    assert updates == [0] * 7 + [3] * 2 + [3] * 7


# -------------------------------------------------------- bad input
@pytest.mark.parametrize("fields, names", [
    ({"dataset": "missing.jsonl"}, "missing.jsonl"),
    ({"model_name": "no/such"}, "model_name.*no/such"),
    ({"ref_model_name": "no/such"}, "no/such"),
    ({"beta": -1.0}, "beta=-1.0"),
    ({"resume_from_checkpoint": "nowhere"}, "nowhere"),
    ({"max_prompt_length": 500}, "max_prompt_length=500"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor")])
def test_bad_input_names_the_argument_and_the_value(fields, names, tmp_path):
    with pytest.raises(InputError, match=names):
        run(tmp_path, **fields)


def test_a_fresh_run_does_not_overwrite_the_checkpoints_of_another(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(InputError, match="checkpoint-2"):
        run(tmp_path)


def test_rows_without_the_columns_of_a_pair_are_refused(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "answer": "b"}])
    with pytest.raises(InputError, match="answer.*chosen.*rejected"):
        run(tmp_path / "out", dataset=rows)
