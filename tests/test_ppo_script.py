"""ppo.py as a user runs it: the command line, what a run leaves behind, kill and resume, and what bad input is told."""
import ast
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2ForSequenceClassification, T5Config,
                          T5ForConditionalGeneration, pipeline)

from common import TOY, AutoModelForCausalLMWithValueHead, InputError
from ppo import PPOConfig, main

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--batch-size", "4", "--mini-batch-size", "2", "--ppo-epochs", "2", "--max-new-tokens", "6", "--save-freq", "1"]


def script(*flags, **kwargs):
    return subprocess.run([sys.executable, "ppo.py", *map(str, flags)], cwd=ROOT, capture_output=True, text=True, **kwargs)


def metrics(folder):
    """metrics.jsonl without the clock."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def small(folder, **fields):
    return PPOConfig(**{"batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 1, "max_new_tokens": 6, "steps": 4,
                        "output_dir": str(folder), **fields})


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ------------------------------------------------------------------------------------------------ the default run
@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    done = script("--batch-size", 32, "--mini-batch-size", 4, "--steps", 96, "--learning-rate", 3e-4, "--output-dir", out)
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_run_leaves_a_model_that_the_plain_classes_load(finished_run):
    out, _ = finished_run
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    before = AutoModelForCausalLM.from_pretrained(TOY / "model")
    assert any((a != b).any() for a, b in zip(model.parameters(), before.parameters()))
    text = pipeline("text-generation", model=str(out), tokenizer=tokenizer)("the plot was", max_new_tokens=4)
    assert text[0]["generated_text"].startswith("the plot was ")


def test_the_value_head_is_kept_beside_the_model(finished_run):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(finished_run[0], require_v_head=True)
    assert model.v_head.summary.weight.abs().sum() > 0


def test_metrics_hold_a_line_for_each_update_and_the_run_ends_after_steps_samples(finished_run):
    rows = metrics(finished_run[0])
    assert [row["update"] for row in rows] == [1, 2, 3]  # 96 samples of 32
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4)  # the policy has not moved yet


def test_samples_are_kept_before_and_after(finished_run):
    rows = [json.loads(line) for line in (finished_run[0] / "samples.jsonl").read_text().splitlines()]
    before, after = rows[:8], rows[8:]
    assert [r["update"] for r in rows] == [0] * 8 + [3] * 8
    assert [r["query"] for r in before] == [r["query"] for r in after]


def test_the_run_tells_score_kl_and_time_left_and_no_library_chatter(finished_run):
    _, done = finished_run
    bar = done.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert re.search(r"3/3 \[\d\d:\d\d<\d\d:\d\d.*kl=.*score=", bar), bar
    noise = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "update" not in line]
    assert noise == []


def test_the_model_card_names_the_experiment(finished_run):
    card = (finished_run[0] / "README.md").read_text()
    assert card.startswith("---\n") and "# ppo" in card and "3 updates of 32 samples" in card


def test_the_toy_score_rises_within_a_few_updates(tmp_path):
    stats = main(small(tmp_path, batch_size=64, mini_batch_size=8, ppo_epochs=4, steps=64 * 6, learning_rate=1e-3,
                       max_new_tokens=24, seed=1))
    first = metrics(tmp_path)[0]
    assert stats["objective/scores"] > first["objective/scores"] + first["objective/scores_std"]


def test_help_needs_no_network_and_hides_what_only_the_run_knows():
    done = script("--help", env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0
    assert "--batch-size INT" in done.stdout and "--world-size" not in done.stdout


def test_a_value_known_only_at_run_time_is_no_flag():
    assert script("--backward-batch-size", 3).returncode != 0


def test_every_option_has_a_sentence():
    tree = ast.parse((ROOT / "ppo.py").read_text())
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "PPOConfig").body
    fields = [n.target.id for n in body if isinstance(n, ast.AnnAssign)]
    documented = [a.target.id for a, b in zip(body, body[1:]) if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)]
    assert fields == documented and len(fields) > 50


def test_every_option_is_read():
    source = (ROOT / "ppo.py").read_text() + (ROOT / "common.py").read_text()
    for name in PPOConfig.__dataclass_fields__:
        assert re.search(rf"(config|\bc|self)\.{name}\b", source), f"nothing reads {name}"


# ------------------------------------------------------------------------------------------------ kill and resume
def test_a_killed_run_goes_on_to_exactly_the_same_numbers(tmp_path):
    flags = [*SMALL, "--steps", "24", "--use-score-scaling"]
    assert script(*flags, "--output-dir", tmp_path / "whole").returncode == 0
    run = subprocess.Popen([sys.executable, "ppo.py", *flags, "--output-dir", str(tmp_path / "cut")], cwd=ROOT,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(metrics(tmp_path / "cut")) < 3 if (tmp_path / "cut" / "metrics.jsonl").exists() else True:
        assert run.poll() is None, "the run ended before it was killed"
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    done = script(*flags, "--output-dir", tmp_path / "cut", "--resume-from", tmp_path / "cut")
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert [row["update"] for row in metrics(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]
    for name in ("model.safetensors", "value_head.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_resuming_crosses_the_end_of_an_epoch_at_the_same_row(tmp_path):
    data = write_rows(tmp_path / "q.jsonl", [{"query": f"the plot was {'very ' * i}"} for i in range(9)])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(small(whole, steps=20, query_dataset=data, save_freq=1))       # 2 batches an epoch, 5 updates
    main(small(cut, steps=12, query_dataset=data, save_freq=1))
    main(small(cut, steps=20, query_dataset=data, save_freq=1, resume_from=str(cut)))
    assert metrics(cut) == metrics(whole)


def test_lora_resumes_into_the_adapter_that_trains(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(small(whole, steps=12, lora_r=4, learning_rate=1e-3, save_freq=1))
    main(small(cut, steps=8, lora_r=4, learning_rate=1e-3, save_freq=1))
    main(small(cut, steps=12, lora_r=4, learning_rate=1e-3, save_freq=1, resume_from=str(cut)))
    assert metrics(cut) == metrics(whole)
    assert (cut / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_a_kill_while_saving_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    from accelerate import Accelerator
    save = Accelerator.save_state

    def dies_at_the_second(self, folder, **kwargs):
        save(self, folder, **kwargs)
        if "2" in os.environ.setdefault("SAVES", "1"):
            raise KeyboardInterrupt  # the folder is written but not yet renamed
        os.environ["SAVES"] = "2"

    monkeypatch.setenv("SAVES", "1")
    monkeypatch.setattr(Accelerator, "save_state", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        main(small(tmp_path, steps=8, save_freq=1))
    assert sorted(p.name for p in tmp_path.glob("checkpoint*")) == ["checkpoint-1", "checkpoint.tmp"]
    monkeypatch.setattr(Accelerator, "save_state", save)
    stats = main(small(tmp_path, steps=8, save_freq=1, resume_from=str(tmp_path)))
    assert len(metrics(tmp_path)) == 2 and stats


# ------------------------------------------------------------------------------------------------ real input
def test_encoder_decoders_train_from_a_folder(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0,
                      eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    stats = main(small(tmp_path / "out", model_name=str(tmp_path / "t5")))
    assert torch.isfinite(stats["ppo/loss/total"])


def test_a_reward_may_be_any_function_of_texts(tmp_path):
    (tmp_path / "mine.py").write_text("def length(texts):\n    return [len(t) for t in texts]\n")
    stats = main(small(tmp_path / "out", reward_model=f"{tmp_path}/mine.py:length"))
    assert stats["objective/scores"] > 10


def test_a_response_that_does_not_end_pays_the_penalty(tmp_path):
    (tmp_path / "mine.py").write_text("def zero(texts):\n    return [0 for t in texts]\n")
    stats = main(small(tmp_path / "out", reward_model=f"{tmp_path}/mine.py:zero", missing_eos_penalty=1.5, max_new_tokens=2))
    assert stats["objective/scores"] == -1.5


def test_tensorboard_is_written(tmp_path):
    main(small(tmp_path, log_with="tensorboard"))
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_queries_are_cut_to_max_query_length(tmp_path):
    stats = main(small(tmp_path, max_query_length=2))
    assert stats["tokens/queries_len_mean"] == 2


# ------------------------------------------------------------------------------------------------ bad input
def two_labels(folder):
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    GPT2ForSequenceClassification(GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, num_labels=2,
                                             pad_token_id=0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


BAD = {
    "batch not divisible": (dict(batch_size=10, mini_batch_size=3), r"batch_size=10 is not a multiple"),
    "data set smaller than a batch": (dict(rows=[{"query": "a"}] * 3), r"has 3 rows and one batch takes 4.*smaller batch_size"),
    "missing column": (dict(rows=[{"question": "a"}] * 4), r"columns \['question'\] and none of query, prompt"),
    "empty query": (dict(rows=[{"query": "a"}, {"query": ""}] * 4), r"row 1: query is empty"),
    "query too long": (dict(rows=[{"query": "the " * 200}] * 4), r"row 0: \d+ tokens.*--max-query-length"),
    "unknown data file": (dict(query_dataset="nowhere.jsonl"), r"data file nowhere.jsonl does not exist here"),
    "unknown model folder": (dict(model_name="./nowhere"), r"model_name ./nowhere can't be loaded"),
    "unknown reward folder": (dict(reward_model="./nowhere"), r"reward_model ./nowhere is neither file.py:function nor"),
    "missing reward function": (dict(reward="x = 1"), r"reward_model .*mine.py:f can't be loaded"),
    "reward raises": (dict(reward="def f(t):\n    raise KeyError('lost')"), r"failed on 8 texts.*lost.*mine.py:2"),
    "reward returns too few": (dict(reward="def f(t):\n    return [1]"), r"returned 1 scores for 8 texts"),
    "reward returns words": (dict(reward="def f(t):\n    return ['good' for _ in t]"), r"could not convert"),
    "NaN score": (dict(reward="def f(t):\n    return [float('nan') if len(t) == 4 else 0 for _ in t]"), r"scores\[0\] is nan"),
    "infinite score": (dict(reward="def f(t):\n    return [-float('inf') if len(t) == 4 else 0 for _ in t]"), r"scores\[0\] is -inf"),
    "nothing to resume": (dict(resume_from="nowhere"), r"no checkpoint-<n> there"),
    "no steps": (dict(steps=0), r"steps=0: give a number above 0"),
    "temperature 0": (dict(temperature=0.0), r"temperature=0.0: give a number above 0"),
    "chat without template": (dict(rows=[{"messages": [{"role": "user", "content": "hi"}]}] * 4), r"chat_template"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_before_any_weight_moves(case, tmp_path, monkeypatch):
    fields, sentence = dict(BAD[case][0]), BAD[case][1]
    if "rows" in fields:
        fields["query_dataset"] = write_rows(tmp_path / "q.jsonl", fields.pop("rows"))
    if "reward" in fields:
        (tmp_path / "mine.py").write_text(fields.pop("reward"))
        fields["reward_model"] = f"{tmp_path}/mine.py:f"
    moved = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *args, **kwargs: moved.append(1))
    with pytest.raises(InputError, match=sentence) as error:
        main(small(tmp_path / "out", **fields))
    assert not moved and "\n" not in str(error.value)


def test_a_classifier_of_two_labels_asks_which(tmp_path):
    folder = two_labels(tmp_path / "classifier")
    with pytest.raises(InputError, match="2 labels: choose .* --reward-label, one of LABEL_0, LABEL_1"):
        main(small(tmp_path / "out", reward_model=folder))
    with pytest.raises(InputError, match="reward_label 'GOOD' is none of LABEL_0, LABEL_1"):
        main(small(tmp_path / "out", reward_model=folder, reward_label="GOOD"))
    main(small(tmp_path / "out", reward_model=folder, reward_label="LABEL_1"))


def test_an_unwritable_output_folder_is_told_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="output_dir .*file/out can't be written"):
        main(small(tmp_path / "file" / "out", model_name="never looked at"))


def test_on_the_command_line_an_error_is_one_line_and_the_status_is_not_zero(tmp_path):
    done = script(*SMALL, "--model-name", "./nowhere", "--output-dir", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("ppo.py: error: model_name ./nowhere can't be loaded") and done.stderr.count("\n") == 1


def test_a_wrong_size_on_the_command_line_is_told_without_a_traceback():
    done = script("--batch-size", 10, "--mini-batch-size", 3, env={**os.environ, "COLUMNS": "200"})
    told = done.stdout + done.stderr
    assert done.returncode != 0 and "batch_size=10 is not a multiple of" in told and "Traceback" not in told


# ------------------------------------------------------------------------------------------------ README
def commands(file):
    """The shell commands of a page's ```bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / file).read_text(), re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").strip().splitlines() if line]


@pytest.mark.parametrize("file", ["README.md", "docs/ppo.md"])
def test_every_ppo_command_of_the_pages_parses(file):
    import tyro
    found = [c for c in commands(file) if "ppo.py" in c]
    assert found
    for command in found:
        words = shlex.split(command.split("&&")[-1])
        config = tyro.cli(PPOConfig, args=words[words.index("ppo.py") + 1:])
        assert config.batch_size > 0


def test_the_gate_runs_the_commands_of_the_readme():
    gate = (ROOT / ".ci" / "run").read_text()
    assert "grep" in gate and "README.md" in gate
    assert sum("pytest" in c for c in commands("README.md")) == 1


def test_equal_seeds_draw_equal_adapters_whatever_was_drawn_before(tmp_path):
    """G2: the seed is set before weights are made."""
    for run in ("a", "b"):
        torch.rand(len(run) + ord(run))  # another state of the generator
        main(small(tmp_path / run, lora_r=4))
    a, b = ((tmp_path / run / "adapter_model.safetensors").read_bytes() for run in ("a", "b"))
    assert a == b


def test_a_run_starts_from_a_saved_adapter_and_measures_kl_from_it(tmp_path):
    main(small(tmp_path / "first", lora_r=4, learning_rate=1e-2))
    stats = main(small(tmp_path / "second", model_name=str(tmp_path / "first")))
    assert float(stats["objective/kl"]) == pytest.approx(0, abs=1e-4)
    assert (tmp_path / "second" / "adapter_config.json").is_file()
