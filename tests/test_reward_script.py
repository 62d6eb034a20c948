"""reward.py beside TRL 0.7.10's recorded figures, as a user runs it, and on two ranks."""
import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2ForSequenceClassification, pipeline

import reward
from common import TOY, InputError, load_reward
from conftest import BOS, EOS, PAD, VOCAB
from reward import RewardConfig, RewardDataCollatorWithPadding, RewardTrainer, ScriptConfig, compute_accuracy, main

ROOT = Path(__file__).resolve().parent.parent
RECORDED = json.loads(Path(__file__).with_name("recorded_reward.json").read_text())
cases = lambda part: pytest.mark.parametrize("case", RECORDED[part], ids=lambda case: case["name"])


# ------------------------------------------------------------------------------------------------ TRL 0.7.10's figures
def recorded_model():
    """GPT-2 with weights drawn by a generator whose stream is frozen, name after name; those of norms around 1."""
    model = GPT2ForSequenceClassification(GPT2Config(vocab_size=VOCAB, n_positions=48, n_embd=32, n_layer=2, n_head=2, num_labels=1,
                                                     bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, resid_pdrop=0.0,
                                                     embd_pdrop=0.0, attn_pdrop=0.0))
    draw = np.random.RandomState(0)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            p.copy_(torch.tensor(0.15 * draw.standard_normal(tuple(p.shape)), dtype=torch.float32) + ("weight" in name and "ln_" in name))
    return model


def with_masks(rows):
    return [{**row, **{f"attention_mask_{side}": [1] * len(row[f"input_ids_{side}"]) for side in reward.SIDES}} for row in rows]


class InOrder(RewardTrainer):
    noted = ()

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, *args, **kwargs):
        out = super().compute_loss(*args, **kwargs)
        if torch.is_grad_enabled():
            self.noted = [*self.noted, (out[0] if isinstance(out, tuple) else out).item()]
        return out


@pytest.fixture
def recorded_trainer(tokenizer, tmp_path):
    def make(rows, **args):
        config = RewardConfig(**{"output_dir": str(tmp_path), "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 4,
                                 "learning_rate": 1e-3, "optim": "adamw_torch", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
                                 "seed": 0, "gradient_checkpointing": False, "max_length": 48, "remove_unused_columns": False, **args})
        rows = Dataset.from_list(with_masks(rows))
        return InOrder(recorded_model(), config, train_dataset=rows, eval_dataset=rows, tokenizer=tokenizer)

    return make


def test_the_recorded_defaults(tmp_path):
    config = RewardConfig(output_dir=str(tmp_path))
    assert {name: getattr(config, name) for name in RECORDED["defaults"]} == RECORDED["defaults"]


@cases("loss")
def test_recorded_losses_and_rewards(case, recorded_trainer):
    trainer = recorded_trainer(case["rows"])
    loss, out = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)), return_outputs=True)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    for name in ("rewards_chosen", "rewards_rejected"):
        assert out[name].tolist() == pytest.approx(case[name], rel=1e-4, abs=1e-5)


@cases("collator")
def test_recorded_batches(case, tokenizer):
    batch = RewardDataCollatorWithPadding(tokenizer, **case["kwargs"])(with_masks(case["rows"]))
    for name, want in case["batch"].items():
        got = batch[name].tolist() if isinstance(batch[name], torch.Tensor) else batch[name]
        assert got == pytest.approx(want) if name == "margin" else got == want


def test_recorded_accuracy():
    predictions = np.array(RECORDED["accuracy"]["predictions"])
    assert compute_accuracy((predictions, np.zeros(9)))["accuracy"] == pytest.approx(RECORDED["accuracy"]["accuracy"])


@cases("train")
def test_recorded_training(case, recorded_trainer, weights):
    trainer = recorded_trainer(case["rows"], **case["args"])
    before = weights(trainer.model)
    trainer.train()
    assert trainer.noted == pytest.approx(case["losses"], rel=1e-4, abs=1e-5)
    for name, p in trainer.model.named_parameters():
        change = (p.detach().double() - before[name].double()).flatten()
        if name.endswith("c_attn.bias"):  # a bias of the keys has no gradient but rounding, of which Adam makes a step
            change[len(change) // 3:2 * len(change) // 3] = 0
        probe = torch.cos(torch.arange(len(change), dtype=torch.float64) * 0.7 + 0.3)
        norm, product = case["weights"][name]
        assert [change.norm().item(), (change @ probe).item()] == pytest.approx([norm, product], abs=6e-3 * norm + 1e-7), name


def test_recorded_evaluation(recorded_trainer):
    case = RECORDED["evaluate"]
    trainer = recorded_trainer(case["rows"])
    metrics = trainer.evaluate()
    assert {name: metrics[name] for name in ("eval_loss", "eval_accuracy")} == pytest.approx(
        {name: case[name] for name in ("eval_loss", "eval_accuracy")}, rel=1e-5)
    loss, logits, labels = trainer.prediction_step(trainer.model, trainer.data_collator(list(trainer.eval_dataset)[:3]), False)
    assert loss.item() == pytest.approx(case["step"]["loss"], rel=1e-5) and labels.tolist() == case["step"]["labels"]
    torch.testing.assert_close(logits, torch.tensor(case["step"]["logits"]), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ the script
def script(*flags, **kwargs):
    return subprocess.run([sys.executable, "reward.py", *map(str, flags)], cwd=ROOT, capture_output=True, text=True, timeout=300, **kwargs)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def small(folder, **fields):
    return ScriptConfig(**{"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no",
                           "disable_tqdm": True, "eval_strategy": "no", **fields})


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def toy_pairs(path, n=24, **more):
    rows = [{**row, **more} for row in lines(TOY / "pairs.jsonl")[:n]]
    return write_rows(path, rows)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    done = script("--max-steps", 60, "--output-dir", out, "--save-steps", 30)
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_short_run_already_learns_and_logs_it(finished_run):
    rows = lines(finished_run[0] / "metrics.jsonl")
    evaluations = [row for row in rows if "eval_loss" in row]
    training = [row for row in rows if "loss" in row]
    assert evaluations[-1]["eval_accuracy"] > 0.75 and evaluations[-1]["eval_loss"] < 0.6
    assert training[-1]["rewards/margins"] > training[0]["rewards/margins"] and [row["update"] for row in training[:2]] == [10, 20]


def test_judgements_before_and_after_are_shown_and_kept(finished_run):
    out, done = finished_run
    rows = lines(out / "samples.jsonl")
    assert [row["update"] for row in rows] == [0] * 4 + [60] * 4
    spread = lambda part: sum(row["reward_chosen"] - row["reward_rejected"] for row in part)
    assert spread(rows[4:]) > spread(rows[:4]) and rows[4]["chosen"] in done.stdout


def test_the_folder_is_a_classifier_that_ppo_scores_with(finished_run):
    out, _ = finished_run
    row = lines(out / "samples.jsonl")[-1]
    scores = load_reward(out)([row["chosen"], row["rejected"]])
    assert [score.item() for score in scores] == pytest.approx([row["reward_chosen"], row["reward_rejected"]], abs=1e-3)
    told = pipeline("text-classification", model=str(out))(row["chosen"], function_to_apply="none")
    assert told[0]["score"] == pytest.approx(row["reward_chosen"], abs=1e-3)
    assert "eval_accuracy" in (out / "README.md").read_text()


def test_a_killed_run_goes_on_from_its_last_checkpoint(finished_run, tmp_path):
    out, _ = finished_run
    (tmp_path / "checkpoint-30").symlink_to(out / "checkpoint-30")
    again = main(ScriptConfig(output_dir=str(tmp_path), max_steps=60, resume_from_checkpoint=str(tmp_path), disable_tqdm=True,
                              save_strategy="no"))
    last = [row for row in lines(out / "metrics.jsonl") if "eval_loss" in row][-1]
    assert {k: v for k, v in again.items() if k.startswith("eval_rewards")} == {k: v for k, v in last.items() if k.startswith("eval_rewards")}


def test_help_answers_and_spares_the_reader_the_retired_flags():
    done = script("--help")
    flags = set(re.findall(r"--([a-z0-9-]+)", done.stdout))
    assert done.returncode == 0 and {"model-name", "center-rewards-coefficient", "bf16", "lora-r"} <= flags
    assert not {name.replace("_", "-") for name in reward.RETIRED} & flags


def test_every_flag_of_the_script_has_a_sentence():
    tree = ast.parse(Path(reward.__file__).read_text())
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in ("RewardConfig", "ScriptConfig"):
            body = [n for n in node.body if not isinstance(n, ast.FunctionDef)][1:]
            for field, text in zip(body[::2], body[1::2], strict=True):
                assert isinstance(field, ast.AnnAssign) and text.value.value.endswith(".")


def test_the_documented_class_alone_runs_the_script(tmp_path):
    metrics = main(RewardConfig(output_dir=str(tmp_path), max_steps=1, disable_tqdm=True, remove_unused_columns=False))
    assert 0 <= metrics["eval_accuracy"] <= 1 and metrics["eval_loss"] > 0


def test_a_language_model_gets_a_head_and_an_adapter_of_it_goes_on(tmp_path):
    data = toy_pairs(tmp_path / "pairs.jsonl", margin=0.5)
    first = main(small(tmp_path / "a", model_name=str(TOY / "model"), dataset=data, lora_r=4, gradient_checkpointing=True))
    assert "train_loss" in first and (tmp_path / "a" / "adapter_model.safetensors").exists()
    main(small(tmp_path / "b", model_name=str(tmp_path / "a"), dataset=data, eval_dataset=data))
    one, two = (lines(tmp_path / run / "samples.jsonl") for run in "ab")
    for end, start in zip(one[4:], two[:4]):  # it starts where the first run ended, with its head
        assert start["reward_chosen"] == pytest.approx(end["reward_chosen"], abs=1e-4)
    assert two[0] != two[4]


def test_equal_seeds_draw_equal_heads(tmp_path):
    data = toy_pairs(tmp_path / "pairs.jsonl")
    for run in "ab":
        main(small(tmp_path / run, model_name=str(TOY / "model"), dataset=data))
    assert lines(tmp_path / "a" / "samples.jsonl") == lines(tmp_path / "b" / "samples.jsonl")


def two_labels(path):
    AutoTokenizer.from_pretrained(TOY / "reward").save_pretrained(path)
    GPT2ForSequenceClassification(GPT2Config(vocab_size=400, n_positions=32, n_embd=8, n_layer=1, n_head=1, num_labels=2)).save_pretrained(path)
    return {"model_name": str(path)}


def no_pad(path):
    tokenizer = AutoTokenizer.from_pretrained(TOY / "reward")
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(path)
    AutoModelForSequenceClassification.from_pretrained(TOY / "reward").save_pretrained(path)
    return {"model_name": str(path)}


def damaged(path):
    checkpoint = path / "checkpoint-1"
    main(small(path, save_strategy="steps", save_steps=1, max_steps=1, dataset=toy_pairs(path.parent / "p.jsonl")))
    file = checkpoint / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:1000])
    return {"resume_from_checkpoint": str(checkpoint)}


@pytest.mark.parametrize("fields,told", [
    (lambda path: {"model_name": "no/such-model"}, "model_name no/such-model can't be loaded"),
    (two_labels, "2 labels and a reward is one number"),
    (no_pad, "neither a pad token nor an end-of-sequence token"),
    (lambda path: {"dataset": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
    (lambda path: {"dataset": write_rows(path.with_suffix(".jsonl"), [{"text": "a"}])}, r"columns \['text'\]: it needs chosen and rejected"),
    (lambda path: {"max_length": 1}, "none has two different sides after their first 1 tokens"),
    (lambda path: {"resume_from_checkpoint": str(path)}, "no checkpoint-<n> there"),
    (damaged, "checkpoint-1 is damaged; resume from the one before"),
])
def test_bad_input_is_one_clear_sentence(fields, told, tmp_path):
    with pytest.raises(InputError, match=told) as error:
        main(small(tmp_path / "out", **fields(tmp_path / "bad")))
    assert "\n" not in str(error.value)


def test_the_command_line_tells_bad_input_without_a_traceback(tmp_path):
    done = script("--output-dir", tmp_path, "--logging-dir", "x")
    assert done.returncode != 0
    done = script("--output-dir", tmp_path, "--dataset", "nowhere.jsonl")
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("reward.py: error: data file nowhere.jsonl")
    assert "Traceback" not in done.stderr


def test_the_commands_of_the_docs_are_flags_of_the_script():
    texts = (ROOT / "docs" / "reward.md").read_text() + reward.__doc__
    commands = [shlex.split(line.split("#")[0]) for line in re.sub(r"\\\n", " ", texts).splitlines() if "reward.py --" in line]
    flags = {flag for command in commands for flag in command[command.index("reward.py"):] if flag.startswith("--")}
    fields = {f"--{name.replace('_', '-')}" for name in ScriptConfig.__dataclass_fields__}
    assert flags and flags <= fields


# ------------------------------------------------------------------------------------------------ ranks
THREE_STEPS = """
import os, sys
import torch
from common import setup_ranks
setup_ranks()
from reward import RewardConfig, RewardTrainer, load_classifier
from common import TOY, load_rows

ranks = int(os.environ.get("WORLD_SIZE", 1))
tokenizer, model = load_classifier(str(TOY / "reward"), "float32")
rows = load_rows(TOY / "pairs.jsonl").select(range(24))
held_out = load_rows(TOY / "pairs_test.jsonl").select(range(13))
config = RewardConfig(output_dir=sys.argv[1] + f"/{ranks}", per_device_train_batch_size=8 // ranks, per_device_eval_batch_size=4, max_steps=3,
                      learning_rate=1e-2, optim="sgd", logging_steps=1, disable_tqdm=True, save_strategy="no", remove_unused_columns=False,
                      gradient_checkpointing=ranks == 2)
trainer = RewardTrainer(model, config, None, rows, held_out, tokenizer)
trainer.train()
last = trainer.evaluate()
if trainer.is_world_process_zero():
    log = [{k: v for k, v in row.items() if k == "loss" or "rewards" in k} for row in trainer.state.log_history[:3]]
    torch.save({"weights": model.state_dict(), "log": log, "eval": {k: v for k, v in last.items() if "rewards" in k or k == "eval_loss"},
                "accuracy": last["eval_accuracy"]}, sys.argv[1] + f"/{ranks}.pt")
torch.distributed.is_initialized() and torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "steps.py").write_text(THREE_STEPS)
    for ranks in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), str(folder / "steps.py"), str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{ranks}.pt") for ranks in (1, 2)]


def test_two_ranks_end_with_the_weights_of_one_process_with_the_same_global_batch(on_ranks):
    one, two = on_ranks
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=0, atol=1e-5, msg=lambda m: f"{name}: {m}")


def test_losses_rewards_and_evaluation_are_global(on_ranks):
    """13 held-out pairs do not divide among two ranks: none counts twice."""
    one, two = on_ranks
    for a, b in zip(one["log"], two["log"]):
        assert a == pytest.approx(b, abs=1e-4) and "rewards/accuracies" in a
    assert one["eval"] == pytest.approx(two["eval"], abs=1e-4) and one["accuracy"] == two["accuracy"]
