"""ppo.py as a user runs it: what a run leaves behind, kill and resume, what the reward function is
shown, and bad input."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import forget
from safetensors.torch import load_file
from test_ranks import lines, metrics, once
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

from common import AutoModelForCausalLMWithValueHead, InputError
from ppo import PPOConfig, main

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy" / "model"


def small(folder, **fields):
    return PPOConfig(**{"batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 1, "max_new_tokens": 6,
                        "steps": 4, "output_dir": str(folder), **fields})


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def samples(folder):
    return lines(folder / "samples.jsonl")


def write_reward(folder, body):
    """file.py:f of a reward function `def f(texts)`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.py").write_text(body)
    return f"{folder}/mine.py:f"


# ---------------------------------------------------------------------------------- kill and resume
# The policy's score is the number of tokens "very"; with DIE_AT the process kills itself instead of
# giving a score to that update. A checkpoint every second update: of the last one there is none.
KILLS = """
import os, signal
calls = []
def f(texts):
    calls.append(texts)
    if len(calls) - 1 == int(os.environ.get("DIE_AT", -1)):  # the first call is for the samples
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(text.count("very")) for text in texts]
"""
RUN = dict(batch_size=4, mini_batch_size=2, ppo_epochs=2, max_new_tokens=24, save_freq=2, steps=24,
           learning_rate=1e-3, use_score_scaling=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders `whole`, from the command line, and `cut`, killed while it scored update 4."""
    def start(folder):
        reward = write_reward(folder, KILLS)
        for name, die_at, status in (("whole", -1, 0), ("cut", 4, -signal.SIGKILL)):
            flags = [f"--{key.replace('_', '-')}={value}" for key, value in RUN.items()
                     if value is not True]
            done = subprocess.run(
                [sys.executable, "ppo.py", *flags, "--use-score-scaling", "--reward-model", reward,
                 "--output-dir", folder / name],
                cwd=ROOT, capture_output=True, text=True, env={**os.environ, "DIE_AT": str(die_at)})
            assert done.returncode == status, done.stderr
            (folder / f"{name}.stderr").write_text(done.stderr)
            (folder / f"{name}.stdout").write_text(done.stdout)

    return once(tmp_path_factory, "ppo_runs", start)


@pytest.fixture(scope="module")
def resumed(runs, tmp_path_factory):
    """The killed run, continued to the end."""
    forget()  # this runs before the state that another test left in accelerate is cleared
    folder = tmp_path_factory.mktemp("resumed")
    shutil.copytree(runs / "cut", folder / "cut")
    main(PPOConfig(**RUN, reward_model=f"{runs}/mine.py:f", output_dir=str(folder / "cut"),
                   resume_from=str(folder / "cut")))
    return folder / "cut"


def test_a_killed_run_has_its_last_checkpoint_and_every_finished_update(runs):
    assert [row["update"] for row in metrics(runs / "cut")] == [1, 2, 3]
    assert [folder.name for folder in (runs / "cut").glob("checkpoint*")] == ["checkpoint-2"]


def test_a_killed_run_resumes_to_exactly_the_same_numbers(runs, resumed):
    assert [row["update"] for row in metrics(resumed)] == [1, 2, 3, 4, 5, 6]
    assert metrics(resumed) == metrics(runs / "whole")
    assert samples(resumed) == samples(runs / "whole")
    for name in ("model.safetensors", "value_head.safetensors"):
        assert (resumed / name).read_bytes() == (runs / "whole" / name).read_bytes()


@pytest.mark.parametrize("file", ["random_states_0.pkl", "optimizer.bin"])
def test_a_checkpoint_without_a_part_of_the_state_is_one_sentence(file, runs, tmp_path):
    shutil.copytree(runs / "cut", tmp_path / "cut")
    for path in (tmp_path / "cut").glob(f"checkpoint-*/{file}"):
        path.unlink()
    with pytest.raises(InputError, match="^checkpoint .* is damaged; .* no (random numb|optimi)"):
        main(PPOConfig(**RUN, resume_from=str(tmp_path / "cut/checkpoint-2")))


def test_resuming_crosses_the_end_of_an_epoch_at_the_same_row(tmp_path):
    rows = [{"query": f"the plot was {'very ' * i}"} for i in range(9)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = dict(query_dataset=write_rows(tmp_path / "q.jsonl", rows), save_freq=1)
    main(small(whole, steps=20, **run))  # 2 batches per epoch, 5 updates
    main(small(cut, steps=12, **run))
    for _ in range(2):  # the second time it is finished, and stays as it is
        main(small("", steps=20, **run, output_dir=None, resume_from=str(cut)))
        assert metrics(cut) == metrics(whole) and samples(cut) == samples(whole)
        assert [folder.name for folder in cut.glob("checkpoint*")] == ["checkpoint-5"]


def test_a_resume_with_other_batches_says_so_and_more_checkpoints_are_kept(tmp_path):
    main(small(tmp_path, save_freq=1))
    with pytest.warns(UserWarning, match="^batch_size=2: it was 4 up to the checkpoint"):
        main(small(tmp_path, save_freq=1, steps=6, batch_size=2, save_total_limit=2,
                   resume_from=str(tmp_path)))
    left = sorted(folder.name for folder in tmp_path.glob("checkpoint*"))
    assert left == ["checkpoint-2", "checkpoint-3"]


def test_a_resumed_run_learns_at_the_rate_that_it_is_given(tmp_path):
    main(small(tmp_path, steps=4, save_freq=1, learning_rate=1e-3))
    main(small(tmp_path, steps=8, save_freq=1, learning_rate=1e-4, resume_from=str(tmp_path)))
    assert [row["ppo/learning_rate"] for row in metrics(tmp_path)] == [1e-3, 1e-4]


def test_lora_resumes_into_the_adapter_that_trains(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = dict(lora_r=4, learning_rate=1e-3, save_freq=1)
    main(small(whole, steps=12, **run))
    main(small(cut, steps=8, **run))
    torch.rand(3)  # another state of the generator: seeds come from the config and the checkpoint
    main(small(cut, steps=12, **run, resume_from=str(cut)))
    assert metrics(cut) == metrics(whole)
    name = "adapter_model.safetensors"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert any(weight.any() for key, weight in load_file(cut / name).items() if "lora_B" in key)


def test_a_kill_while_saving_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    from accelerate import Accelerator
    save, saves = Accelerator.save_state, []

    def dies_at_the_second(self, folder, **kwargs):
        save(self, folder, **kwargs)
        saves.append(folder)
        if len(saves) == 2:
            raise KeyboardInterrupt  # files are written, but the folder is not in its place

    main(small(tmp_path / "whole", steps=8, save_freq=1))
    monkeypatch.setattr(Accelerator, "save_state", dies_at_the_second)
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        main(small(cut, steps=8, save_freq=1))
    assert [folder.name for folder in cut.glob("checkpoint-*")] == ["checkpoint-1"]
    monkeypatch.setattr(Accelerator, "save_state", save)
    main(small(cut, steps=8, save_freq=1, resume_from=str(cut)))
    assert metrics(cut) == metrics(tmp_path / "whole")
    assert [folder.name for folder in cut.glob("checkpoint*")] == ["checkpoint-2"]


# ------------------------------------------------------------------------------- what a run leaves
def test_a_run_leaves_a_model_that_the_plain_classes_load(runs):
    model, tokenizer = (auto.from_pretrained(runs / "whole")
                        for auto in (AutoModelForCausalLM, AutoTokenizer))
    before = AutoModelForCausalLM.from_pretrained(TOY)
    assert any((a != b).any() for a, b in zip(model.parameters(), before.parameters(), strict=True))
    generate = pipeline("text-generation", model=str(runs / "whole"), tokenizer=tokenizer)
    text = generate("the plot was", max_new_tokens=4)[0]["generated_text"]
    assert text.startswith("the plot was ") and len(text) > len("the plot was ")


def test_the_value_head_is_kept_next_to_the_model(runs):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(runs / "whole", require_v_head=True)
    assert model.v_head.summary.weight.abs().sum() > 0


def test_metrics_hold_one_line_per_update_and_the_first_kl_is_zero(runs):
    rows = metrics(runs / "whole")
    assert [row["update"] for row in rows] == [1, 2, 3, 4, 5, 6]  # 24 samples, 4 each
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4)  # the policy has not moved yet


def test_samples_before_and_after_answer_the_same_eight_prompts(runs):
    rows = samples(runs / "whole")
    before, after = rows[:8], rows[8:]
    assert [row["update"] for row in rows] == [0] * 8 + [6] * 8
    prompts = [row["query"] for row in lines(ROOT / "toy" / "prompts.jsonl")[:8]]
    assert [row["query"] for row in before] == [row["query"] for row in after] == prompts
    for row in rows:  # the reward function counts this word in query and response
        assert row["score"] == (row["query"] + row["response"]).count("very")


def test_equal_prompts_get_different_responses_since_they_are_sampled(runs):
    first = samples(runs / "whole")[:8]
    equal = [row["response"] for row in first if row["query"] == first[0]["query"]]
    assert len(equal) == len(set(equal)) == 3


def test_a_log_file_has_a_line_for_each_update_and_libraries_are_silent(runs):
    assert (runs / "whole.stderr").read_text() == ""
    shown = [f"update {row['update']}/6: score {row['objective/scores']:.2f}, kl "
             f"{row['objective/kl']:.2f}" for row in metrics(runs / "whole")]
    written = (runs / "whole.stdout").read_text().splitlines()
    assert [line for line in written if line.startswith("update")] == shown


def test_the_bar_shows_score_and_kl(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    main(small(tmp_path))
    printed = capsys.readouterr()
    assert re.search(r"1/1 \[.*score=\S+, kl=", printed.err)
    assert "update" not in printed.out


def test_the_model_card_names_the_experiment(runs):
    card = (runs / "whole" / "README.md").read_text()
    assert card.startswith("---\n") and "# ppo" in card and "6 updates of 4 samples" in card


def test_the_toy_score_rises_within_a_few_updates(tmp_path):
    stats = main(small(tmp_path, batch_size=64, mini_batch_size=8, ppo_epochs=4, steps=64 * 6,
                       learning_rate=1e-3, max_new_tokens=24, seed=1))
    first = metrics(tmp_path)[0]
    assert stats["objective/scores"] > first["objective/scores"] + first["objective/scores_std"]


# ---------------------------------------------------------------------------------- rewards
LISTENS = """
import json, pathlib
def f(texts):
    with pathlib.Path(__file__).with_name("texts.jsonl").open("a") as file:
        file.write(json.dumps(texts) + "\\n")
    return [len(text) for text in texts]
"""


def test_a_reward_function_reads_query_and_response(tmp_path):
    reward = write_reward(tmp_path, LISTENS)
    stats = main(small(tmp_path / "out", reward_model=reward, max_new_tokens=24))
    before, update, after = lines(tmp_path / "texts.jsonl")
    rows = samples(tmp_path / "out")
    assert before + after == [row["query"] + row["response"] for row in rows]
    assert [row["score"] for row in rows] == [len(text) for text in before + after]
    assert all(row["response"].endswith(".") for row in rows)  # the end token is no text
    assert len(update) == 4
    assert stats["objective/scores"] == pytest.approx(sum(map(len, update)) / 4)


def test_of_an_encoder_decoder_the_reward_function_reads_the_encoder_s_text_too(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1,
                      num_heads=2, pad_token_id=0, eos_token_id=tokenizer.eos_token_id,
                      decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    stats = main(small(tmp_path / "out", model_name=str(tmp_path / "t5"),
                       reward_model=write_reward(tmp_path, LISTENS)))
    assert math.isfinite(stats["ppo/loss/total"])
    before, _, after = lines(tmp_path / "texts.jsonl")
    rows = samples(tmp_path / "out")
    assert any(row["response"].strip() for row in rows)
    for row, text in zip(rows, before + after, strict=True):
        assert text.split() == f"{row['query']} {row['response']}".split()


@pytest.fixture
def classifier(tmp_path):
    """A reward classifier of two labels that reads at most 12 tokens."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOY, model_max_length=10**9)
    GPT2ForSequenceClassification(GPT2Config(
        vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, n_positions=12, num_labels=2,
        pad_token_id=0, initializer_range=0.5)).save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    return str(tmp_path / "classifier")


@pytest.mark.parametrize("label, column", [("LABEL_0", 0), ("LABEL_1", 1), ("1", 1)])
def test_a_classifier_scores_the_end_of_a_text_that_is_too_long_by_the_chosen_label(
        label, column, classifier, tmp_path):
    main(small(tmp_path / "out", reward_model=classifier, reward_label=label, max_new_tokens=9))
    tokenizer, model = (auto.from_pretrained(classifier)
                        for auto in (AutoTokenizer, AutoModelForSequenceClassification))
    rows, cut = samples(tmp_path / "out"), 0
    for row in rows:
        tokens = tokenizer(row["query"] + row["response"]).input_ids
        cut += len(tokens) > 12
        with torch.no_grad():
            logits = model(torch.tensor([tokens[-12:]])).logits[0]
        assert row["score"] == pytest.approx(logits[column].item(), abs=1e-4)
        assert abs(logits[0] - logits[1]) > 1e-3
    assert 0 < cut < len(rows)


def test_a_classifier_of_two_labels_asks_which(classifier, tmp_path):
    with pytest.raises(InputError, match="(?s)2 labels.*--reward-label.*LABEL_0.*LABEL_1"):
        main(small(tmp_path / "out", reward_model=classifier))
    with pytest.raises(InputError, match="(?s)reward_label.*GOOD.*LABEL_0.*LABEL_1"):
        main(small(tmp_path / "out", reward_model=classifier, reward_label="GOOD"))


def test_missing_eos_penalty_is_taken_from_responses_that_do_not_end_and_from_no_other(tmp_path):
    # half of the first words end a response of this policy, and only its generation config says so
    tokenizer, model = AutoTokenizer.from_pretrained(TOY), AutoModelForCausalLM.from_pretrained(TOY)
    ends = (" slightly", " very")
    model.generation_config.eos_token_id = [tokenizer(word).input_ids[0] for word in ends]
    model.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    reward = write_reward(tmp_path, "def f(texts):\n    return [2.0 for _ in texts]\n")
    run = dict(model_name=str(tmp_path / "policy"), reward_model=reward, missing_eos_penalty=1.5,
               max_new_tokens=1)
    stats = main(small(tmp_path / "one", batch_size=32, steps=32, **run))
    rows = samples(tmp_path / "one")
    assert {row["response"] in ends for row in rows} == {True, False}
    assert all(row["score"] == (2.0 if row["response"] in ends else 0.5) for row in rows)
    missing = (2.0 - stats["objective/scores"].item()) / 1.5 * 32
    assert 0 < round(missing) < 32 and missing == pytest.approx(round(missing), abs=1e-3)


def test_a_response_that_ends_with_the_tokenizer_s_end_token_pays_nothing(tmp_path):
    reward = write_reward(tmp_path, "def f(texts):\n    return [0 for _ in texts]\n")
    stats = main(small(tmp_path / "out", reward_model=reward, missing_eos_penalty=1.5,
                       max_new_tokens=40))
    assert stats["objective/scores"] == 0


# ---------------------------------------------------------------------------------- flags
def test_queries_are_truncated_to_max_query_length(tmp_path):
    stats = main(small(tmp_path, max_query_length=2))
    assert stats["tokens/queries_dist"].tolist() == [2] * 4
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    rows = lines(ROOT / "toy" / "prompts.jsonl")[:8]
    prompts = [tokenizer(row["query"]).input_ids for row in rows]
    shown = [row["query"] for row in samples(tmp_path)[:8]]
    assert shown == [tokenizer.decode(prompt[:2]) for prompt in prompts]


def test_max_new_tokens_is_the_longest_response_whatever_the_generation_batch(tmp_path):
    for size in (1, 3):
        stats = main(small(tmp_path / str(size), max_new_tokens=5, generation_batch_size=size))
        assert stats["tokens/responses_dist"].tolist() == [5] * 4


def test_temperature_is_that_of_sampling_and_of_log_probabilities(tmp_path):
    stats = main(small(tmp_path, temperature=1e-4, max_new_tokens=8))
    # so cold a policy is certain of each token: a response's entropy estimate is -log 1 = 0
    assert stats["objective/entropy"].item() == pytest.approx(0, abs=0.1)
    assert stats["ppo/policy/entropy"].item() == pytest.approx(0, abs=0.1)
    before = samples(tmp_path)[:8]
    greedy = pipeline("text-generation", model=str(TOY),
                      tokenizer=AutoTokenizer.from_pretrained(TOY))
    for row in before:
        text = greedy(row["query"], max_new_tokens=8, do_sample=False)[0]["generated_text"]
        assert text == row["query"] + row["response"]


def test_weights_are_trained_in_float32_unless_torch_dtype_says_otherwise(tmp_path):
    half = AutoModelForCausalLM.from_pretrained(TOY, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "policy")
    AutoTokenizer.from_pretrained(TOY).save_pretrained(tmp_path / "policy")
    kinds = {}
    for flags in ({}, {"torch_dtype": "bfloat16"}):
        main(small(tmp_path / "out", model_name=str(tmp_path / "policy"), **flags))
        weights = load_file(tmp_path / "out" / "model.safetensors").values()
        kinds[str(flags)] = {weight.dtype for weight in weights}
    assert list(kinds.values()) == [{torch.float32}, {torch.bfloat16}]


def test_gradient_checkpointing_saves_less_and_changes_no_number(tmp_path):
    kept = {}
    for on in (False, True):
        saved = []

        def count(tensor, saved=saved):
            return saved.append(tensor.numel()) or tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            main(small(tmp_path / str(on), gradient_checkpointing=on))
        kept[on] = sum(saved)
    assert kept[True] < 0.8 * kept[False]
    (a,), (b,) = metrics(tmp_path / "True"), metrics(tmp_path / "False")
    assert a == pytest.approx(b, rel=1e-5, abs=1e-6)


def test_equal_seeds_draw_equal_adapters_whatever_was_drawn_before(tmp_path):
    """The seed is set before weights are made."""
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(len(run) + ord(run))  # another state of the generator
        main(small(tmp_path / run, lora_r=4, seed=seed))
    a, b, c = ((tmp_path / run / "adapter_model.safetensors").read_bytes() for run in "abc")
    assert a == b != c


def test_lora_r_and_lora_alpha_are_those_of_the_adapter(tmp_path):
    main(small(tmp_path, lora_r=3, lora_alpha=7))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 7)


def test_a_run_starts_from_a_saved_adapter_and_measures_kl_from_it(tmp_path):
    main(small(tmp_path / "first", lora_r=4, learning_rate=1e-2))
    stats = main(small(tmp_path / "second", model_name=str(tmp_path / "first"), learning_rate=1e-2))
    assert float(stats["objective/kl"]) == pytest.approx(0, abs=1e-4)
    first, second = (load_file(tmp_path / run / "adapter_model.safetensors")
                     for run in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(not torch.equal(first[key], second[key]) for key in first if "lora_B" in key)


def test_a_run_starts_from_the_value_head_of_an_earlier_run(tmp_path):
    main(small(tmp_path / "first", learning_rate=1e-2))
    main(small(tmp_path / "second", model_name=str(tmp_path / "first"), learning_rate=1e-9))
    first, second = (load_file(tmp_path / run / "value_head.safetensors")
                     for run in ("first", "second"))
    for key in first:  # Adam moves a weight by at most about its rate
        assert first[key].abs().max() > 1e-3
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-7)


# ---------------------------------------------------------------------------------- bad input
NAN = "def f(t):\n    return [float('{}') if len(t) == 4 else 0 for _ in t]"
BAD = {
    "batch not divisible": (dict(batch_size=10, mini_batch_size=3), "batch_size=10"),
    "data set smaller than a batch": (dict(rows=[{"query": "a"}] * 3), "3 rows.*batch_size"),
    "missing column": (dict(rows=[{"question": "a"}] * 4), "question.*query"),
    "empty query": (dict(rows=[{"query": "a"}, {"query": ""}] * 4), "row 1"),
    "query too long": (dict(rows=[{"query": "the " * 200}] * 4), "row 0.*--max-query-length"),
    "response too long": (dict(rows=[{"query": "the " * 12}] * 4, max_new_tokens=120),
                          "row 0.*--max-new-tokens"),  # the model has 128 positions
    "unknown data file": (dict(query_dataset="nowhere.jsonl"), "nowhere.jsonl"),
    "unknown model folder": (dict(model_name="./nowhere"), "model_name.*nowhere"),
    "unknown reward folder": (dict(reward_model="./nowhere"), "reward_model.*nowhere"),
    "missing reward function": (dict(reward="x = 1"), "reward_model.*mine.py:f"),
    "reward raises": (dict(reward="def f(t):\n    raise KeyError('lost')"),
                      "reward_model.*lost.*mine.py:2"),
    "reward returns too few": (dict(reward="def f(t):\n    return [1]"), "reward_model.* 1 .* 8 "),
    "reward returns words": (dict(reward="def f(t):\n    return ['good' for _ in t]"),
                             "reward_model.*good"),
    "NaN score": (dict(reward=NAN.format("nan")), r"scores\[0\].*nan"),
    "infinite score": (dict(reward=NAN.format("-inf")), r"scores\[0\].*-inf"),
    "nothing to resume": (dict(resume_from="nowhere"), "nowhere"),
    "no steps": (dict(steps=0), "steps=0"),
    "temperature 0": (dict(temperature=0.0), "temperature=0.0"),
    "chat without template": (dict(rows=[{"messages": [{"role": "user", "content": "hi"}]}] * 4),
                              "chat_template.*the rows are chats"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_before_any_weight_moves(case, tmp_path, monkeypatch):
    fields, sentence = dict(BAD[case][0]), BAD[case][1]
    if "rows" in fields:
        fields["query_dataset"] = write_rows(tmp_path / "q.jsonl", fields.pop("rows"))
    if "reward" in fields:
        fields["reward_model"] = write_reward(tmp_path, fields.pop("reward"))
    moved = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *args, **kwargs: moved.append(1))
    with pytest.raises(InputError, match=sentence) as error:
        main(small(tmp_path / "out", **fields))
    assert not moved and "\n" not in str(error.value)


def test_an_unwritable_output_folder_is_an_error_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="output_dir.*file/out"):
        main(small(tmp_path / "file" / "out", model_name="never looked at"))


def test_a_fresh_run_leaves_the_checkpoints_of_another_alone(tmp_path):
    main(small(tmp_path, save_freq=1))
    with pytest.raises(InputError, match="output_dir.*checkpoint-1"):
        main(small(tmp_path, save_freq=1))
    assert (tmp_path / "checkpoint-1").is_dir() and len(metrics(tmp_path)) == 1
