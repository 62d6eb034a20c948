"""common.py: seeds, ranks, rows, prompts, rewards, a run's files, and models with a value head.

    python -m pytest -q tests/test_common.py
"""
import dataclasses
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import types
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CAUSAL, EOS, PAD, SEQ2SEQ, VOCAB, hf_model
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import chats
import common
import machinery
from common import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, InputError

ARCHITECTURES = CAUSAL + SEQ2SEQ
def wrapper_of(arch):
    return (
    AutoModelForSeq2SeqLMWithValueHead if arch in SEQ2SEQ else AutoModelForCausalLMWithValueHead
)
def plain_of(arch):
    return AutoModelForSeq2SeqLM if arch in SEQ2SEQ else AutoModelForCausalLM


def example(arch="gpt2"):
    """Two rows of five tokens, the second padded."""
    ids, mask = (
        torch.tensor([[5, 6, 7, 8, 9], [4, 3, 9, PAD, PAD]]),
        torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]),
    )
    return {
        "input_ids": ids,
        "attention_mask": mask,
        **({"decoder_input_ids": ids.flip(1)} if arch in SEQ2SEQ else {}),
    }


def outputs(model, arch="gpt2", **kwargs):
    """-> logits, values"""
    with torch.no_grad():
        logits, _, values = model.eval()(**example(arch), **kwargs)
    return logits, values


def same_model(model, other, arch="gpt2"):
    for a, b in zip(outputs(model, arch), outputs(other, arch), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


# ------------------------------------------------------------------------------------- seeds, ranks
def test_set_seed_seeds_python_numpy_and_torch():
    def draw(seed):
        common.set_seed(seed)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(3) == draw(3) and not set(draw(3)) & set(draw(4))


def test_one_process_under_torchrun_forms_no_group(monkeypatch):
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    machinery.setup_ranks()
    assert not {"WORLD_SIZE", "RANK", "LOCAL_RANK"} & set(os.environ)


@pytest.mark.parametrize("threads", [None, "3"])
def test_ranks_without_a_gpu_use_the_cpu_and_one_thread_each_unless_set_otherwise(
    threads, monkeypatch
):
    for name in ("ACCELERATE_USE_CPU", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    machinery.setup_ranks()
    assert os.environ["ACCELERATE_USE_CPU"] == "true"
    assert os.environ["OMP_NUM_THREADS"] == (threads or "1")
    assert os.environ["WORLD_SIZE"] == "2" and os.environ["RANK"] == "1"


@pytest.mark.parametrize("gpus, gpu", [(4, 3), (1, 0)])  # SLURM may show a rank its own alone
def test_each_rank_takes_the_gpu_of_its_local_rank(gpus, gpu, monkeypatch):
    chosen, precision = [], torch.get_float32_matmul_precision()
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: gpus,
        "set_device": chosen.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    try:
        machinery.setup_ranks()
        assert chosen == [gpu] and torch.get_float32_matmul_precision() == "high"
        assert os.environ["LOCAL_RANK"] == str(gpu)  # DDP and barriers count GPUs from it
        assert "ACCELERATE_USE_CPU" not in os.environ
    finally:
        torch.set_float32_matmul_precision(precision)


def test_several_gpus_in_one_process_are_refused():
    """Trainer would split each batch among threads, which the losses here do not know."""
    with pytest.raises(InputError, match="--nproc_per_node 4"):
        machinery.prepare_process(arguments(n_gpu=4))
    for fine in (0, 1):
        machinery.prepare_process(arguments(n_gpu=fine))


def arguments(**settings):
    """Of a Trainer, as far as `prepare_process` reads them."""
    return types.SimpleNamespace(**{"n_gpu": 0, "report_to": [], "deepspeed": None, "fsdp": None,
                                    "accelerator_config": types.SimpleNamespace(), **settings})


def test_deepspeed_on_a_cpu_is_refused_before_a_model_is_loaded(tmp_path):
    """accelerate takes plain DDP instead, without a word."""
    config = arguments(deepspeed="zero2.json", device=torch.device("cpu"),
                       output_dir=str(tmp_path / "out"))
    with pytest.raises(InputError, match="^deepspeed: .* --fsdp full_shard"):
        machinery.start_run(config)
    assert not (tmp_path / "out").exists()
    config.device = torch.device("cuda:0")
    machinery.prepare_process(config)


# ------------------------------------------------------------------------------------------- errors
def test_any_error_inside_explain_becomes_one_sentence_with_its_place():
    with pytest.raises(InputError) as error:
        with common.explain("row 7 of mine.jsonl can't be read"):
            raise KeyError("first line\nsecond line")
    sentence = str(error.value)
    assert (
        sentence.startswith("row 7 of mine.jsonl can't be read: ")
        and "KeyError" in sentence
        and "test_common.py:" in sentence
    )
    assert "first line" in sentence and isinstance(error.value.__cause__, KeyError)
    with pytest.raises(InputError, match="AssertionError"):
        with common.explain("row 7"):  # an error without words still has a name
            assert not ROWS


def test_explain_knows_torchs_error_of_checkpoints_in_shards():
    """It is no Exception."""
    from torch.distributed.checkpoint import CheckpointException
    with pytest.raises(InputError, match="^checkpoint x can't be loaded: "):
        with common.explain("checkpoint x can't be loaded"):
            raise CheckpointException("load", {})


def test_explain_leaves_a_sentence_and_an_interruption_as_they_are():
    for error in (InputError("label 3 is none of 0, 1"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            with common.explain("reward_model x can't be loaded"):
                raise error
        assert caught.value is error


def test_explain_says_the_first_line_of_an_error_alone():
    with pytest.raises(InputError) as error:
        with common.explain("it failed"):
            raise OSError("no such file\nTraceback of the library")
    assert (
        "no such file" in str(error.value)
        and "\n" not in str(error.value)
        and "library" not in str(error.value)
    )


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_ends_the_run_with_the_number_of_steps(loss):
    with pytest.raises(InputError, match=f"{loss} after 7 rounds"):
        common.check_finite(torch.tensor(loss), 7, "rounds")
    common.check_finite(torch.tensor(-3e38), 7)


def test_run_leaves_no_process_group_behind(monkeypatch, tmp_path):
    groups = []

    def main(config):
        """Train."""
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
        )
        groups.append((torch.distributed.is_initialized(), config))

    monkeypatch.setattr(sys, "argv", ["mine.py", "--n", "3"])
    machinery.run(main, Flags)
    assert groups == [(True, Flags(n=3))] and not torch.distributed.is_initialized()


@dataclasses.dataclass
class Flags:
    """Of a script."""

    n: int = 1
    """A number."""


# --------------------------------------------------------------------------------------------- rows
ROWS = [{"text": "w4 w5", "n": 1}, {"text": "w6", "n": 2}]
WRITE = {".jsonl": lambda path: path.write_text("\n".join(map(json.dumps, ROWS))),
         ".json": lambda path: path.write_text(json.dumps(ROWS)),
         ".csv": lambda path: path.write_text("text,n\nw4 w5,1\nw6,2\n"),
         ".parquet": lambda path: Dataset.from_list(ROWS).to_parquet(path)}


@pytest.mark.parametrize("kind", WRITE)
def test_rows_come_from_any_kind_of_file(kind, tmp_path):
    WRITE[kind](tmp_path / f"data{kind}")
    assert list(machinery.load_rows(tmp_path / f"data{kind}")) == ROWS


def test_each_line_of_a_text_file_is_a_row(tmp_path):
    (tmp_path / "data.txt").write_text("w4 w5\nw6\n")
    rows = machinery.load_rows(str(tmp_path / "data.txt"))
    assert list(rows) == [{"text": "w4 w5"}, {"text": "w6"}]


@pytest.fixture
def saved(tmp_path):
    """saved(*names) -> a folder of save_to_disk, whose i-th split holds the row {"n": i}."""
    def save(*names):
        folder = tmp_path / "-".join(names)
        sets = {name: Dataset.from_list([{"n": i}]) for i, name in enumerate(names)}
        DatasetDict(sets).save_to_disk(folder)
        return str(folder)

    return save


@pytest.mark.parametrize("names, split, want", [
    (["test", "train"], None, 1), (["test", "train"], "test", 0), (["train_sft"], None, 0),
    (["train_sft", "train_gen"], "train_gen", 1)])
def test_rows_come_from_a_split_which_is_train_or_the_only_one_unless_named(
        names, split, want, saved):
    assert list(machinery.load_rows(saved(*names), split)) == [{"n": want}]


def test_a_saved_dataset_without_splits_is_train(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert list(machinery.load_rows(tmp_path / "one")) == ROWS
    assert list(machinery.load_rows(tmp_path / "one", "train")) == ROWS


@pytest.mark.parametrize("names, split", [(["train", "test"], "tset"), (["test", "train"], "dev"),
                                          (["train_sft", "train_gen"], None)])
def test_a_split_that_is_not_there_is_an_error_that_names_those_there_are(names, split, saved):
    with pytest.raises(InputError, match=f"^dataset_split={split} .*{', '.join(names)};"):
        machinery.load_rows(saved(*names), split)


@pytest.mark.parametrize("names, flags, want", [
    (["train", "test"], {"eval_dataset": "same"}, 1),
    (["train", "validation"], {"eval_dataset": "same"}, 1),
    (["train", "validation", "test"], {"eval_dataset_split": "validation"}, 1),
    (["train", "a", "b"], {"eval_dataset_split": "b"}, 2),
    (["train", "a"], {}, None),
    (["train"], {"eval_dataset": "other"}, 7)])  # its only split is what is asked for
def test_evaluation_reads_a_held_out_split(names, flags, want, saved, tmp_path):
    Dataset.from_list([{"n": 7}]).save_to_disk(tmp_path / "other")
    folder = saved(*names)
    places = {"same": folder, "other": str(tmp_path / "other")}
    config = flags_of(dataset=folder, **{k: places.get(v, v) for k, v in flags.items()})
    rows, held_out = machinery.load_train_and_eval_rows(config, None, None)
    assert list(rows) == [{"n": 0}]
    assert held_out is None if want is None else list(held_out) == [{"n": want}]


@pytest.mark.parametrize("names, flags, named", [
    (["train"], {"eval_dataset": "same"}, "^eval_dataset=.* train alone"),
    (["train", "held"], {"eval_dataset": "same"}, "^eval_dataset_split=None .* train, held;"),
    (["train", "test"], {"eval_dataset": "same", "dataset_split": "test"},
     "^eval_dataset_split=None .* train, test;"),
    (["train", "test"], {"eval_dataset_split": "dev"}, "^eval_dataset_split=dev .* train, test;"),
    (["train"], {"eval_dataset_split": "test", "dataset": None}, "^eval_dataset_split=test")])
def test_evaluation_never_reads_the_rows_of_training_unless_asked(names, flags, named, saved):
    folder = saved(*names)
    fields = {"dataset": folder, **flags}
    if "eval_dataset" in fields:
        fields["eval_dataset"] = folder
    with pytest.raises(InputError, match=named):
        machinery.load_train_and_eval_rows(flags_of(**fields), "pairs.jsonl", "pairs_test.jsonl")


def flags_of(**given):
    """The fields of a script's config that choose rows."""
    names = ("dataset", "dataset_split", "dataset_config", "eval_dataset", "eval_dataset_split")
    return types.SimpleNamespace(**{**dict.fromkeys(names), **given})


def test_a_configuration_is_a_folder_of_its_own(tmp_path):
    """As on the hub, where the dataset's card says so."""
    for name in ("main", "other"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "train.jsonl").write_text(json.dumps({"is": name}))
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files: main/*.jsonl\n"
        "- config_name: other\n  data_files: other/*.jsonl\n---\n")
    assert list(machinery.load_rows(tmp_path / "set", config="other")) == [{"is": "other"}]
    with pytest.raises(InputError, match="--dataset-config"):
        machinery.load_rows(tmp_path / "set")


def test_a_folder_of_files_is_a_dataset_with_their_splits(tmp_path):
    WRITE[".jsonl"](tmp_path / "train.jsonl")
    (tmp_path / "test.jsonl").write_text(json.dumps(ROWS[1]))
    assert (
        list(machinery.load_rows(tmp_path)) == ROWS
        and list(machinery.load_rows(tmp_path, "test")) == ROWS[1:]
    )


@pytest.mark.parametrize(
    "name, named",
    [
        ("data.xls", "data.xls.*'.xls'"),
        ("absent.jsonl", "absent.jsonl does not exist"),
        ("broken.jsonl", "broken.jsonl"),
        ("nobody/nothing", "nobody/nothing"),
    ],
)
def test_an_unreadable_dataset_is_an_error_of_one_line_with_its_name(name, named, tmp_path):
    (tmp_path / "data.xls").touch()
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(InputError, match=named) as error:
        machinery.load_rows(tmp_path / name if "." in name else name)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------ prompts
@pytest.fixture
def prompts(tmp_path, make_tokenizer):
    """prompts(rows, **arguments) -> load_prompts of a file of these rows."""
    def load(rows, **kwargs):
        path = tmp_path / "prompts.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        tokenizer = make_tokenizer()
        tokenizer.chat_template = (
            "{% for turn in messages %}{{ '<s> ' if turn.role == 'user' else '<unk> ' }}"
            "{{ turn.content }} {% endfor %}"
            "{% if add_generation_prompt %}</s>{% endif %}"
        )
        return list(machinery.load_prompts(path, tokenizer, **kwargs))

    return load


@pytest.mark.parametrize("column", ["query", "prompt", "text"])
def test_prompts_are_texts(column, prompts):
    assert prompts([{column: "w4 w5"}, {column: "w6"}]) == [
        {"query": "w4 w5", "input_ids": [4, 5], "shown": "w4 w5", "messages": None,
         "metadata": {column: "w4 w5"}},
        {"query": "w6", "input_ids": [6], "shown": "w6", "messages": None,
         "metadata": {column: "w6"}}]


def test_a_query_is_taken_before_a_text(prompts):
    assert prompts([{"text": "w4", "prompt": "w5", "query": "w6"}])[0]["input_ids"] == [6]


def test_prompts_are_tokens(prompts):
    (row,) = prompts([{"input_ids": [7, 8]}])
    assert row["query"] == "w7 w8" and row["input_ids"] == [7, 8]


@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_prompts_are_chats_whose_last_answer_is_left_off(column, prompts):
    user, assistant = {"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5"}
    assert prompts([{column: [user, assistant]}])[0]["input_ids"] == [1, 4, EOS]
    (row,) = prompts([{column: [user, assistant, {**user, "content": "w6"}]}])
    assert row["input_ids"] == [1, 4, 3, 5, 1, 6, EOS]
    assert row["shown"] == "w6"  # samples show the last user turn, without the template


def test_a_chat_has_its_last_user_turn_to_show(prompts):
    chat = [{"role": role, "content": f"w{i}"}
            for i, role in enumerate(("system", "user", "assistant", "user"), start=4)]
    assert prompts([{"messages": chat}])[0]["shown"] == "w7"


def test_many_prompts_are_read_one_by_one_or_as_a_slice_and_a_late_fault_has_its_row(
        tmp_path, make_tokenizer):
    """More than are tokenized together."""
    texts = [f"w{4 + i % 90} " * (1 + i % 3) for i in range(2500)]
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"query": text}) + "\n" for text in texts))
    rows = machinery.load_prompts(path, make_tokenizer(), max_length=2)
    assert len(rows) == 2500 and rows[2001]["input_ids"] == [4 + 2001 % 90]
    assert [row["metadata"]["query"] for row in rows[1999:2003]] == texts[1999:2003]
    assert [len(row["input_ids"]) for row in rows[-3:]] == [2, 2, 1]
    with pytest.raises(InputError, match="row 1002: 3 tokens"):
        path.write_text("".join(json.dumps({"query": "w4 " * (1 + 2 * (i == 1002))}) + "\n"
                                for i in range(2500)))
        machinery.load_prompts(path, make_tokenizer(), longest=2)


def test_prompts_are_truncated_to_their_first_tokens(prompts):
    (row,) = prompts([{"query": "w4 w5 w6"}], max_length=2)
    assert row["query"] == "w4 w5" and row["input_ids"] == [4, 5]
    assert prompts([{"query": "w4 w5 w6"}], max_length=2, longest=2)[0]["input_ids"] == [4, 5]


def test_the_row_is_metadata_and_the_query_is_what_the_model_reads(prompts):
    rows = [{"query": "w4 w5", "answer": 7}]
    metadata = {"query": "w4 w5", "answer": 7}
    (row,) = prompts(rows)
    assert row == {"query": "w4 w5", "input_ids": [4, 5], "shown": "w4 w5", "messages": None,
                   "metadata": metadata}
    (row,) = prompts(rows, keep_columns=True, max_length=1)
    assert row == {
        "query": "w4", "input_ids": [4], "shown": "w4", "messages": None, "answer": 7,
        "metadata": metadata}


def test_a_reward_function_gets_the_prompts_rows_and_imports_its_neighbor(tmp_path):
    (tmp_path / "neighbour_of_reward.py").write_text("def length(text):\n    return len(text)\n")
    (tmp_path / "mine.py").write_text(
        "from neighbour_of_reward import length\n"
        "def score(texts, metadata):\n"
        "    return [length(t) - row['answer'] for t, row in zip(texts, metadata)]\n")
    reward = chats.load_reward(f"{tmp_path}/mine.py:score")
    assert reward(["abc", "a"], metadata=[{"answer": 1}, {"answer": 5}]) == [2.0, -4.0]


@pytest.mark.parametrize("arguments, want", [
    ("texts", "T"), ("samples", "T"), ("responses", "R"), ("responses, prompts", "RP"),
    ("samples, metadata", "TM"), ("prompts, **kwargs", "PTRM"), ("samples, **kwargs", "TPRM")])
def test_a_reward_function_gets_what_its_arguments_name(arguments, want, tmp_path):
    names = {"T": "texts", "P": "prompts", "R": "responses", "M": "metadata"}
    values = {name: [float(i)] for i, name in enumerate(names.values(), start=1)}
    (tmp_path / "mine.py").write_text(
        f"def score({arguments}):\n"
        "    given = dict(locals())\n"
        "    given.update(given.pop('kwargs', {}))\n"
        "    return [sum(value[0] for value in given.values())]\n")
    reward = chats.load_reward(f"{tmp_path}/mine.py:score")
    (got,) = reward(values.pop("texts"), **values)
    assert got == sum(float(1 + "TPRM".index(letter)) for letter in want)


@pytest.mark.parametrize(
    "rows, arguments, named",
    [
        ([{"title": "w4"}], {}, r"\['title'\]"),
        ([{"query": "w4"}, {"query": ""}], {}, "row 1: query"),
        ([{"query": "w4"}, {"query": None}], {}, "row 1: query"),
        ([{"prompt": []}], {}, "row 0: prompt"),
        ([{"query": "w4"}, {"query": "w4 w5 w6"}], {"longest": 2}, "row 1: 3 tokens.* 2;"),
        ([{"query": "w4"}, {"query": 7}], {}, "query"),
    ],
)
def test_a_prompt_that_can_not_be_answered_is_an_error_with_its_row(
    rows, arguments, named, prompts
):
    with pytest.raises(InputError, match=named):
        prompts(rows, **arguments)


def test_a_prompt_of_the_longest_length_is_answered(prompts):
    assert prompts([{"query": "w4 w5"}], longest=2)[0]["input_ids"] == [4, 5]


# ------------------------------------------------------------------------------------------ rewards
@pytest.fixture
def classifier(tmp_path, make_tokenizer):
    """classifier(labels) -> the folder of a random classifier, and the classifier."""
    def make(labels, n_positions=16, **attributes):
        config = GPT2Config(
            vocab_size=VOCAB,
            n_positions=n_positions,
            n_embd=32,
            n_layer=1,
            n_head=2,
            initializer_range=0.2,
            pad_token_id=PAD,
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
        model = GPT2ForSequenceClassification(config).eval()
        model.save_pretrained(tmp_path / "classifier")
        make_tokenizer(**attributes).save_pretrained(tmp_path / "classifier")
        return str(tmp_path / "classifier"), model

    return make


@pytest.mark.parametrize("attributes", [{}, {"padding_side": "left"}, {"pad_token": None}])
def test_a_score_is_the_logit_of_the_only_label_whatever_else_is_scored(attributes, classifier):
    folder, model = classifier(["score"], **attributes)
    texts = ["w5", "w5 w6 w7 w8", "w9 w4"] * 30
    scores = chats.load_reward(folder)(texts)
    with torch.no_grad():
        want = [
            model(torch.tensor([[int(word[1:]) for word in text.split()]])).logits[0, 0].item()
            for text in texts
        ]
    assert [score.item() for score in scores] == pytest.approx(want, abs=1e-5)
    assert all(score.dim() == 0 for score in scores) and len(set(want)) == 3


@pytest.mark.parametrize(
    "positions, limit", [(16, 64), (32, 16)], ids=["of the model", "of the tokenizer"]
)
def test_of_a_text_too_long_for_the_classifier_the_end_is_scored(positions, limit, classifier):
    """The response is at the end: of 40 tokens the last 16 count."""
    folder, model = classifier(["score"], n_positions=positions, model_max_length=limit)
    words = [f"w{4 + i}" for i in range(40)]
    with torch.no_grad():
        want = model(torch.tensor([[int(word[1:]) for word in words[-16:]]])).logits[0, 0].item()
    score = chats.load_reward(folder)
    assert score([" ".join(words), "w5"])[0].item() == pytest.approx(want, abs=1e-5)
    assert score([" ".join(words[-16:])])[0].item() == pytest.approx(want, abs=1e-5)


def test_a_long_list_is_scored_in_its_order(classifier):
    folder, model = classifier(["score"])
    ids = [[4 + i % 96, 4 + i // 96] for i in range(130)]
    with torch.no_grad():
        want = model(torch.tensor(ids)).logits[:, 0]
    scores = chats.load_reward(folder)([" ".join(f"w{i}" for i in row) for row in ids])
    torch.testing.assert_close(torch.stack(scores), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("label, column", [("bad", 0), ("good", 1), ("1", 1)])
def test_a_score_is_the_logit_of_the_chosen_label(label, column, classifier):
    folder, model = classifier(["bad", "good"])
    with torch.no_grad():
        want = model(torch.tensor([[5, 6]])).logits[0, column].item()
    assert chats.load_reward(folder, label)(["w5 w6"])[0].item() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize(
    "label, named", [(None, "2 labels.*--reward-label.*bad, good"), ("great", "'great'.*bad, good")]
)
def test_a_label_has_to_be_one_of_the_classifier_s(label, named, classifier):
    with pytest.raises(InputError, match=named):
        chats.load_reward(classifier(["bad", "good"])[0], label)


FUNCTIONS = (
    "def length(texts):\n    return [len(text) for text in texts]\n\n"
    "def few(texts):\n    return [1.0]\n\n"
    "def sick(texts):\n    return 1 / 0\n"
)


def test_a_reward_is_any_function_of_texts(tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    scores = chats.load_reward(f"{tmp_path}/mine.py:length")(["a", "bcd"])
    assert [score.item() for score in scores] == [1, 3] and scores[0].dtype == torch.float32


@pytest.mark.parametrize(
    "function, named",
    [
        ("few", "mine.py:few.* 1 scores for 2 texts"),
        ("sick", "mine.py:sick.* 2 texts.*'a'.*division by zero.*mine.py:8"),
        ("absent", "mine.py:absent.*AttributeError"),
    ],
)
def test_a_reward_that_fails_is_an_error_of_one_line_with_its_name(function, named, tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    with pytest.raises(InputError, match=named) as error:
        chats.load_reward(f"{tmp_path}/mine.py:{function}")(["a", "b"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "numbers", ["torch.arange(2.)", "torch.arange(2.)[:, None]", "[torch.tensor([0.]), 1]",
                "(i for i in range(2))"]
)
def test_a_reward_may_return_tensors_and_generators(numbers, tmp_path):
    (tmp_path / "mine.py").write_text(f"import torch\ndef f(texts):\n    return {numbers}\n")
    scores = chats.load_reward(f"{tmp_path}/mine.py:f")(["a", "b"])
    assert [score.item() for score in scores] == [0, 1] and all(
        score.dim() == 0 for score in scores
    )


def test_a_dict_of_scores_and_a_label_of_a_function_are_refused(tmp_path):
    (tmp_path / "mine.py").write_text("def f(texts):\n    return {'0': 0.5, '1': 0.7}\n")
    with pytest.raises(InputError, match="mine.py:f returned a dict"):
        chats.load_reward(f"{tmp_path}/mine.py:f")(["a", "b"])
    with pytest.raises(InputError, match="reward_label='good'.*mine.py:f.*no labels"):
        chats.load_reward(f"{tmp_path}/mine.py:f", "good")


@pytest.mark.parametrize("lora", [False, True])
def test_a_language_model_is_no_reward(lora, tmp_path):
    """Its score head would be drawn at random, on each rank another."""
    folder = common.TOY / "model"
    if lora:
        from peft import LoraConfig, get_peft_model
        model = AutoModelForCausalLM.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
        folder = tmp_path
        get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(folder)
    named = "CAUSAL_LM" if lora else "score.weight"
    with pytest.raises(InputError, match=f"reward_model {folder} .*{named}.* reward.py"):
        chats.load_reward(folder)


def test_a_folder_that_is_not_there_is_no_reward(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}/nothing"):
        chats.load_reward(str(tmp_path / "nothing"))


# ------------------------------------------------------------------------- what a run leaves behind
def whole_checkpoints(folder, *numbers):
    """Write checkpoints with the least that a resumed run needs."""
    for number in numbers:
        path = folder / f"checkpoint-{number}"
        path.mkdir(parents=True)
        for name in ("pytorch_model", "optimizer", "random_states_0", "custom_checkpoint_0"):
            torch.save({}, path / f"{name}.pkl")


def test_the_newest_checkpoint_is_that_of_the_largest_number(tmp_path):
    whole_checkpoints(tmp_path, 9, 10, 2)
    assert machinery.newest_checkpoint(tmp_path).name == "checkpoint-10"
    assert machinery.newest_checkpoint(str(tmp_path / "checkpoint-2")).name == "checkpoint-2"
    with pytest.raises(InputError, match="elsewhere"):
        machinery.newest_checkpoint(tmp_path / "elsewhere")


def test_a_run_continues_in_the_folder_of_its_checkpoint_unless_another_is_given(tmp_path):
    mine, default = tmp_path / "mine", tmp_path / "default"
    whole_checkpoints(mine, 2, 4)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (mine / name).write_text("{}\n")
    assert machinery.open_run(None, mine, default) == (mine, mine / "checkpoint-4")
    assert (mine / "metrics.jsonl").exists() and (mine / "samples.jsonl").exists()
    assert machinery.open_run(tmp_path / "new", mine / "checkpoint-2", default) == (
        tmp_path / "new", mine / "checkpoint-2")
    assert machinery.open_run(None, None, default) == (default, None)
    with pytest.raises(InputError, match="checkpoint-2: .*mine holds the newer checkpoint-4"):
        machinery.open_run(None, mine / "checkpoint-2", default)
    whole_checkpoints(tmp_path / "theirs", 1)
    with pytest.raises(InputError, match="theirs holds checkpoint-1 of an earlier run"):
        machinery.open_run(tmp_path / "theirs", mine, default)


def test_one_command_starts_a_run_and_resumes_it(tmp_path):
    """A cluster starts a job again with the command that it had."""
    out = tmp_path / "out"
    assert machinery.open_run(out, f"{out}/", "default") == (out, None)
    whole_checkpoints(out, 3)
    assert machinery.open_run(out, f"{out}/", "default") == (out, out / "checkpoint-3")
    with pytest.raises(InputError, match="elsewhere"):
        machinery.open_run(out, tmp_path / "elsewhere", "default")


def test_copies_that_srun_starts_without_torchrun_are_refused(tmp_path, monkeypatch):
    """They would write to one folder."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(InputError, match="^SLURM_STEP_NUM_TASKS=2: .*torchrun"):
        machinery.open_run(tmp_path / "out", None, "default")
    monkeypatch.setenv("WORLD_SIZE", "2")
    machinery.open_run(tmp_path / "out", None, "default")


def test_what_follows_a_checkpoint_is_cut_from_the_files_and_a_torn_line_with_it(tmp_path):
    assert machinery.count_lines(tmp_path) == {"metrics.jsonl": 0, "samples.jsonl": 0}
    for name, rows in (("metrics.jsonl", [1, 2, 3]), ("samples.jsonl", [0])):
        machinery.append_rows(tmp_path / name, [{"update": row} for row in rows])
    lines = machinery.count_lines(tmp_path)
    for name in lines:
        machinery.append_rows(tmp_path / name, [{"update": 3, "loss": 0.5}])
        with (tmp_path / name).open("a") as file:
            file.write('{"update": 5, "fr')  # killed in the middle of a line
    machinery.cut_lines(tmp_path, lines)
    left = [[json.loads(line)["update"] for line in (tmp_path / name).open()] for name in lines]
    assert left == [[1, 2, 3], [0]]


def test_a_number_that_is_not_finite_is_null_in_a_file_of_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    row = {"update": 1, "loss": 0.5, "ratio": np.float64("inf"), "var_explained": float("nan")}
    machinery.append_rows(path, [row, {"kl": -math.inf, "text": "NaN"}])
    read = [json.loads(line, parse_constant=pytest.fail) for line in path.open()]
    assert read == [{"update": 1, "loss": 0.5, "ratio": None, "var_explained": None},
                    {"kl": None, "text": "NaN"}]


def test_samples_are_printed_indented_and_appended(tmp_path, capsys):
    rows = [{"update": 3, "query": "why?", "response": "first\nsecond", "score": -1.5}]
    machinery.log_samples(tmp_path, "after training", rows)
    machinery.log_samples(tmp_path, "again", rows)
    printed = capsys.readouterr()
    assert "   -1.50  why? |first\n      second" in printed.out + printed.err
    assert [json.loads(line) for line in (tmp_path / "samples.jsonl").open()] == rows * 2


@dataclasses.dataclass
class Settings:
    beta: float = None
    max_length: int = 9


class ReadsSettings:
    def __init__(self, args=None, beta=0.1, max_length=None, extra=0):
        self.settings = machinery.read_settings(
            ReadsSettings, args, beta=beta, max_length=max_length, extra=extra)


@pytest.mark.parametrize("args, arguments, settings", [
    ({}, {}, (0.1, 9, 0)),                              # None in the config: the argument's default
    ({"beta": 2.0}, {"extra": 5}, (2.0, 9, 5)),         # the config is read
    ({}, {"max_length": 4}, (0.1, 4, 0)),               # an argument wins over the config's default
    ({"max_length": 4}, {"max_length": 4}, (0.1, 4, 0)),
])
def test_a_trainer_reads_its_config_and_an_argument_wins(args, arguments, settings):
    trainer = ReadsSettings(Settings(**args), **arguments)
    assert tuple(trainer.settings[name] for name in ("beta", "max_length", "extra")) == settings


def test_an_argument_and_a_config_that_disagree_are_an_error():
    with pytest.raises(InputError, match="max_length=4.*max_length=5"):
        ReadsSettings(Settings(max_length=5), max_length=4)


@pytest.mark.parametrize("dtype, frozen, warned", [
    ("float32", False, False), ("bfloat16", False, True), ("bfloat16", True, False)])
def test_weights_that_train_in_half_precision_are_warned_of(dtype, frozen, warned, recwarn):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].to(getattr(torch, dtype)).requires_grad_(not frozen)
    machinery.warn_of_half_precision(model)
    assert ["torch_dtype=bfloat16: " in str(warning.message) for warning in recwarn] == (
        [True] * warned)


def test_one_rank_prints_the_learning_rate(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    machinery.scale_learning_rate(1e-3, torch.nn.Linear(9, 10))
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    machinery.scale_learning_rate(1e-3, torch.nn.Linear(9, 10))
    assert capsys.readouterr().out.startswith("learning rate 0.032, ")


def test_the_default_learning_rate_falls_with_the_square_root_of_the_size():
    model = torch.nn.Linear(2000, 200, bias=False)  # 400,000 weights
    assert machinery.scale_learning_rate(4e-3, model) == pytest.approx(2e-3)


@pytest.mark.parametrize("value", [math.nan, -1.0, 1.5, math.inf])
def test_a_number_outside_its_range_is_an_error(value):
    with pytest.raises(InputError, match=rf"beta={value}.*\[0, 1\)"):
        machinery.check_ranges(Settings(beta=value), {"[0, 1)": ("beta",)})
    machinery.check_ranges(Settings(beta=0.0), {"[0, 1)": ("beta",)})


def test_an_output_folder_is_made_and_one_that_can_not_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    machinery.writable_folder(tmp_path / "new" / "folder", fresh=True)
    assert (tmp_path / "new" / "folder").is_dir() and not list(
        (tmp_path / "new" / "folder").iterdir()
    )
    with pytest.raises(InputError, match="file/folder"):
        machinery.writable_folder(tmp_path / "file" / "folder", fresh=True)


def test_a_fresh_run_never_writes_over_the_checkpoints_of_another(tmp_path):
    (tmp_path / "checkpoint-70").mkdir()
    (tmp_path / "samples.jsonl").touch()
    with pytest.raises(InputError, match=f"{tmp_path}.*checkpoint-70.*--output-dir"):
        machinery.writable_folder(tmp_path, fresh=True)
    machinery.writable_folder(tmp_path, fresh=False)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-70", "samples.jsonl"}


@pytest.mark.parametrize(
    "rank, fresh, kept",
    [(None, True, False), ("0", True, False), ("1", True, True), ("0", False, True)],
)
def test_the_main_rank_of_a_fresh_run_removes_the_lines_of_an_earlier_one(
    rank, fresh, kept, tmp_path, monkeypatch
):
    """Lines are appended; another rank must not remove what the main one has written by then."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).touch()
    if rank:
        monkeypatch.setenv("RANK", rank)
    machinery.writable_folder(tmp_path, fresh=fresh)
    assert len(list(tmp_path.iterdir())) == 2 * kept


def test_a_model_card_has_the_sources_and_the_metrics_but_no_timings(tmp_path):
    metrics = {
        "eval_loss": 0.123456,
        "eval_runtime": 3.0,
        "eval_samples_per_second": 9.0,
        "eval_steps_per_second": 2.0,
        "step": 7,
        "table": [1],
    }
    for model in (None, "my/model"):
        machinery.write_model_card(
            tmp_path,
            "A reward model",
            types.SimpleNamespace(model_name=model),
            {"pairs": "p.jsonl"},
            metrics,
        )
        card = (tmp_path / "README.md").read_text()
        assert (
            card.startswith("---\nlibrary_name: transformers\n---\n")
            and f"# {tmp_path.name}\n" in card
        )
        assert (
            "A reward model" in card
            and f"model `{model or 'toy'}`" in card
            and "pairs `p.jsonl`" in card
        )
        assert [line for line in card.splitlines() if line.startswith("| ")][1:] == [
            "| eval_loss | 0.1235 |"
        ]


# -------------------------------------------------------------------------- of transformers.Trainer
class Rows(torch.utils.data.Dataset):
    """Eight rows of six tokens."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        ids = torch.arange(6) + 4 + i
        return {"input_ids": ids, "labels": ids}


class CountEvaluations(TrainerCallback):
    evaluations = 0

    def on_evaluate(self, *args, **kwargs):
        self.evaluations += 1


def train(model, folder, resume=None, **arguments):
    """Train two epochs of two steps, each with an evaluation and a checkpoint -> the Trainer."""
    fields = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "report_to": "none",
        "use_cpu": True,
        **arguments,
    }
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **fields),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        callbacks=[machinery.Journal(folder), CountEvaluations()],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def evaluations(trainer):
    return next(
        c.evaluations for c in trainer.callback_handler.callbacks if isinstance(c, CountEvaluations)
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """-> a Trainer that has finished, its folder, and what it wrote to stdout and stderr."""
    folder, out, err = tmp_path_factory.mktemp("finished"), io.StringIO(), Terminal()
    common.set_seed(0)
    with redirect_stdout(out), redirect_stderr(err):
        trainer = train(hf_model("gpt2"), folder)
    return trainer, folder, out.getvalue(), err.getvalue()


@pytest.fixture
def run_folder(finished, tmp_path):
    """-> a copy of the finished run's folder."""
    return Path(shutil.copytree(finished[1], tmp_path / "run"))


def test_a_journal_has_a_line_for_each_log_a_bar_and_each_evaluation_in_words(finished):
    trainer, folder, out, err = finished
    rows = lines(folder)
    assert [row["update"] for row in rows] == [1, 2, 2, 3, 4, 4, 4]
    assert [
        name for row in rows for name in row if name in ("loss", "eval_loss", "train_loss")
    ] == ["loss", "loss", "eval_loss", "loss", "loss", "eval_loss", "train_loss"]
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert [row["loss"] for row in rows if "loss" in row] == logged
    assert "4/4" in err and f"loss={logged[-1]:.4f}" in err
    shown = [line for line in out.splitlines() if line.startswith("epoch")]
    assert [line.split(":")[0] for line in shown] == ["epoch 1.00", "epoch 2.00"]
    assert "update" not in out
    assert (
        f"eval_loss {rows[5]['eval_loss']:.4g}" in shown[1]
        and "runtime" not in out
        and "per_second" not in out
    )


def test_a_resumed_journal_goes_on_after_the_checkpoint(run_folder, make_hf_model, capsys):
    before = lines(run_folder)
    train(make_hf_model("gpt2"), run_folder, resume=str(run_folder / "checkpoint-2"))
    after, printed = lines(run_folder), capsys.readouterr()
    assert [row["update"] for row in after] == [1, 2, 2, 3, 4, 4, 4]
    assert after[:3] == before[:3]
    for name in ("loss", "train_loss"):  # sums of floats, not always the same
        losses = [[row[name] for row in rows if name in row] for rows in (before, after)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    # stderr is no terminal here: a line for each log, and no bar
    shown = [line for line in printed.out.splitlines() if line.startswith("update")]
    assert shown == [f"update {row['update']}/4: loss {row['loss']:.4f}"
                     for row in after[3:] if "loss" in row]
    assert "/4" not in printed.err


def test_a_run_shorter_than_logging_steps_has_a_loss(make_hf_model, tmp_path):
    train(make_hf_model("gpt2"), tmp_path, logging_steps=100, save_strategy="no")
    assert [row["update"] for row in lines(tmp_path) if "loss" in row] == [4]


def test_a_journals_bar_begins_where_the_run_was_and_says_the_phase(tmp_path):
    journal = machinery.Journal(tmp_path, ("waiting", "working"))
    state = TrainerState(max_steps=4, global_step=2)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with redirect_stderr(Terminal()) as printed:
        for event in ("train_begin", "epoch_begin", "epoch_end", "train_end"):
            getattr(journal, f"on_{event}")(args, state, TrainerControl())
    printed = printed.getvalue()
    assert printed.index("2/4") < printed.index("working") < printed.rindex("waiting")
    assert printed.index("waiting") < printed.index("working")


def test_another_rank_than_the_main_one_writes_nothing(tmp_path, capsys):
    journal, state = (
        machinery.Journal(tmp_path),
        TrainerState(max_steps=2, is_world_process_zero=False),
    )
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    for event, more in (("train_begin", {}), ("step_end", {}), ("log", {"logs": {"loss": 1.0}}),
                        ("evaluate", {"metrics": {"eval_loss": 1.0}}), ("train_end", {})):
        getattr(journal, f"on_{event}")(args, state, TrainerControl(), **more)
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")


def test_the_last_evaluation_is_not_made_twice(finished):
    trainer, folder, _, _ = finished
    assert evaluations(trainer) == 2
    last = machinery.last_evaluation(trainer)
    assert evaluations(trainer) == 2 and last["eval_loss"] == lines(folder)[5]["eval_loss"]


@pytest.mark.parametrize(
    "arguments", [{"eval_strategy": "no"}, {"load_best_model_at_end": True}], ids=["none", "best"]
)
def test_weights_that_were_not_evaluated_are_evaluated_at_the_end(
    arguments, make_hf_model, tmp_path
):
    """After a run without evaluations, and where other weights than the last ones were loaded."""
    trainer = train(make_hf_model("gpt2"), tmp_path, disable_tqdm=True, **arguments)
    before = evaluations(trainer)
    last = machinery.last_evaluation(trainer)
    assert evaluations(trainer) == before + 1 and last["eval_loss"] == pytest.approx(
        trainer.evaluate()["eval_loss"]
    )


def halve(file):
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


@pytest.mark.parametrize(
    "file", ["trainer_state.json", "model.safetensors", "optimizer.pt", "rng_state.pth"]
)
@pytest.mark.parametrize("damage", [halve, Path.unlink])
def test_a_damaged_checkpoint_is_refused_by_name_and_passed_over_in_its_folder(
    damage, file, run_folder
):
    assert machinery.newest_checkpoint(run_folder) == run_folder / "checkpoint-4"
    damage(run_folder / "checkpoint-4" / file)
    with pytest.raises(InputError, match="checkpoint-4 is damaged") as error:
        machinery.newest_checkpoint(run_folder / "checkpoint-4")
    assert "\n" not in str(error.value)
    with pytest.warns(UserWarning, match="passed over checkpoint-4"):
        assert machinery.newest_checkpoint(run_folder) == run_folder / "checkpoint-2"
    damage(run_folder / "checkpoint-2" / file)
    with pytest.raises(InputError, match="no whole checkpoint-<n> there; start again"):
        machinery.newest_checkpoint(run_folder)


def test_a_damaged_shard_of_a_checkpoint_is_seen(run_folder):
    shard = run_folder / "checkpoint-4" / "pytorch_model_fsdp_0" / "__0_0.distcp"
    shard.parent.mkdir()
    torch.save({"weights": torch.zeros(100)}, shard)
    assert machinery.newest_checkpoint(run_folder) == run_folder / "checkpoint-4"
    halve(shard)
    with pytest.raises(InputError, match="checkpoint-4 is damaged"):
        machinery.newest_checkpoint(run_folder / "checkpoint-4")


@pytest.mark.parametrize("keep, best, left", [
    (None, None, [2, 4, 10]), (1, None, [10]), (2, None, [4, 10]), (1, "x/checkpoint-2", [2, 10]),
])
def test_a_new_checkpoint_is_renamed_when_complete_and_old_ones_go(keep, best, left, tmp_path):
    alone = types.SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
    own = []
    (tmp_path / "checkpoint-1").mkdir()  # of another run
    for number in (2, 4, 10):
        with machinery.new_checkpoint(alone, tmp_path, number, own, keep, best) as folder:
            (folder / "state").touch()
            assert not (tmp_path / f"checkpoint-{number}").exists()
    found = [int(path.parent.name[11:]) for path in tmp_path.glob("checkpoint-*/state")]
    assert sorted(found) == left and (tmp_path / "checkpoint-1").exists()


@pytest.mark.parametrize("number", [3, 4])
def test_a_checkpoint_of_another_run_is_not_overwritten_nor_left_to_be_resumed(number, tmp_path):
    alone = types.SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
    whole_checkpoints(tmp_path, 4)
    before = (tmp_path / "checkpoint-4" / "optimizer.pkl").read_bytes()
    with pytest.raises(InputError, match="checkpoint-4 is there already"):
        with machinery.new_checkpoint(alone, tmp_path, number, []):
            pass
    with machinery.new_checkpoint(alone, tmp_path, 5, []):
        pass
    assert (tmp_path / "checkpoint-4" / "optimizer.pkl").read_bytes() == before


def test_a_checkpoint_that_fails_leaves_the_one_before(tmp_path):
    alone = types.SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
    own = []
    with machinery.new_checkpoint(alone, tmp_path, 1, own, keep=1):
        pass
    with pytest.raises(OSError), machinery.new_checkpoint(alone, tmp_path, 2, own, keep=1):
        raise OSError("disk full")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


# ----------------------------------------------------------------------- log-probabilities, dropout
def test_log_probabilities_of_three_words_by_hand():
    """Odds 1 : 2 : 5."""
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log()
    for label, p in enumerate((1 / 8, 2 / 8, 5 / 8)):
        assert common.logprobs_from_logits(logits, torch.tensor([label])).item() == pytest.approx(
            np.log(p), abs=1e-6
        )
    assert common.logprobs_from_logits(logits, None, gather=False)[
        0
    ].exp().tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(3,), (130,), (2, 65), (2, 3, 30)], ids=str)
def test_log_probabilities_and_their_gradient_are_those_of_the_cross_entropy(shape, temperature):
    """Of each row, however many there are; rows under a mask of zeros have no gradient."""
    draw = torch.Generator().manual_seed(0)
    logits, labels = (
        torch.randn(*shape, 11, generator=draw) * 3,
        torch.randint(11, shape, generator=draw),
    )
    weight = torch.randn(shape, generator=draw) * (torch.rand(shape, generator=draw) > 0.3)
    ours, plain = (logits.clone().requires_grad_() for _ in range(2))
    found = common.logprobs_from_logits(ours / temperature, labels)
    want = -F.cross_entropy(
        (plain / temperature).flatten(0, -2), labels.flatten(), reduction="none"
    ).view(shape)
    (found * weight).sum().backward()
    (want * weight).sum().backward()
    # a difference of two float32 numbers below 30: some units in the last place, 1e-6 each
    torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.grad, plain.grad, atol=1e-5, rtol=0)
    assert ours.grad[weight == 0].abs().max() == 0 if (weight == 0).any() else True
    torch.testing.assert_close(
        common.logprobs_from_logits(logits, labels, gather=False), logits.log_softmax(-1)
    )


def test_log_probabilities_of_half_precision_logits_are_computed_in_float32():
    logits = (torch.randn(70, 50) * 3).bfloat16().requires_grad_()
    labels = torch.randint(50, (70,))
    found = common.logprobs_from_logits(logits, labels)
    assert (
        found.dtype == torch.float32
        and common.logprobs_from_logits(logits, labels, gather=False).dtype == torch.float32
    )
    torch.testing.assert_close(
        found, logits.float().log_softmax(-1)[torch.arange(70), labels], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    "arch, changes",
    [*((arch, {}) for arch in ARCHITECTURES), ("bart", {"decoder_layerdrop": 0.5})],
    ids=lambda value: "layerdrop" if value else "" if value == {} else value,
)
def test_without_dropout_a_model_in_train_mode_computes_what_it_does_in_eval_mode(
    arch, changes, make_model
):
    model = make_model(arch, lora="trained", **changes).train()
    def logits():
        return model(**example(arch))[0].detach()
    assert not torch.equal(logits(), logits())
    common.disable_dropout(model)
    assert model.training and torch.equal(logits(), logits())
    torch.testing.assert_close(logits(), outputs(model, arch)[0], atol=1e-5, rtol=1e-5)


def test_dropout_that_a_model_reads_from_its_config_is_turned_off_too(tmp_path):
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2,
                          num_attention_heads=2, hidden_dropout=0.3, attention_dropout=0.3)
    model = FalconForCausalLM(config).train()
    ids = torch.arange(4, 12)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    common.disable_dropout(model)
    assert model.training and torch.equal(model(ids).logits, model(ids).logits)
    model.save_pretrained(tmp_path)  # whoever trains it next has the model's own dropout
    saved = FalconConfig.from_pretrained(tmp_path)
    assert saved.hidden_dropout == saved.attention_dropout == 0.3


# ------------------------------------------------------------------------- models with a value head
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_are_the_bare_model_s_and_values_read_its_last_hidden_state(arch, make_model):
    model = make_model(arch).eval()
    with torch.no_grad():
        bare = model.pretrained_model(**example(arch), output_hidden_states=True)
    last = (bare.decoder_hidden_states if arch in SEQ2SEQ else bare.hidden_states)[-1]
    logits, values = outputs(model, arch)
    torch.testing.assert_close(logits, bare.logits, atol=1e-5, rtol=1e-5)
    want = last @ model.v_head.summary.weight[0] + model.v_head.summary.bias
    torch.testing.assert_close(values, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [None, "trained"])
@pytest.mark.parametrize("arch", ["gpt2", "llama", "t5"])
def test_gradients_are_plain_autograd_s(arch, lora, checkpointing, make_model):
    """Of a loss on logits and values, from which the body learns, with or without recomputing."""
    model = make_model(arch, lora=lora).train()
    common.disable_dropout(model)
    weights = torch.randn(2, 5, generator=torch.Generator().manual_seed(3))

    def gradients(logits, values):
        model.zero_grad()
        ((logits.log_softmax(-1)[..., 7] + values ** 2) * weights).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    bare = model.pretrained_model(**example(arch), output_hidden_states=True)
    last = (bare.decoder_hidden_states if arch in SEQ2SEQ else bare.hidden_states)[-1]
    want = gradients(bare.logits, last @ model.v_head.summary.weight[0] + model.v_head.summary.bias)
    if checkpointing:
        model.gradient_checkpointing_enable()
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    logits, _, values = model(**example(arch))
    found = gradients(logits, values)
    assert (
        set(found) == set(want) == {name for name, p in model.named_parameters() if p.requires_grad}
    )
    for name, gradient in want.items():
        # sums of a few hundred float32 products; a gradient that is cut misses whole terms
        torch.testing.assert_close(
            found[name],
            gradient,
            atol=1e-5 * gradient.abs().max().item() + 1e-6,
            rtol=1e-4,
            msg=name,
        )
    model.gradient_checkpointing_disable()
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_logits_and_values_are_float32_where_the_body_computes_in_bfloat16(how, make_model):
    model = make_model().eval()
    if how == "weights":
        model.pretrained_model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"), torch.no_grad():
        last = (
            model.pretrained_model(**example(), output_hidden_states=True).hidden_states[-1].float()
        )
        logits, _, values = model(**example())
    assert logits.dtype == values.dtype == torch.float32
    want = (
        last @ model.v_head.summary.weight[0] + model.v_head.summary.bias
    )  # a product in bfloat16 is 1e-2 off
    torch.testing.assert_close(values, want, atol=1e-5, rtol=1e-5)


def test_the_head_s_dropout_is_drawn_in_train_mode_alone(make_hf_model):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        make_hf_model("gpt2"), summary_dropout_prob=0.5
    )
    torch.nn.init.normal_(model.v_head.summary.weight)
    model.pretrained_model.eval()
    def values():
        return model(**example())[2].detach()
    model.v_head.train()
    assert not torch.equal(values(), values())
    model.v_head.eval()
    assert torch.equal(values(), values())


def test_a_cache_of_past_keys_gives_the_numbers_of_the_whole_row(make_model):
    model, ids = make_model("llama").eval(), example()["input_ids"][:1]
    with torch.no_grad():
        whole, _, values = model(ids)
        past = model.pretrained_model(ids[:, :3], use_cache=True).past_key_values
        logits, _, some = model(ids[:, 3:], past_key_values=past)
    torch.testing.assert_close(logits, whole[:, 3:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(some, values[:, 3:], atol=1e-5, rtol=1e-5)


def test_labels_give_the_loss_of_the_language_model(make_model):
    model, labels = make_model().eval(), torch.tensor([[5, 6, 7, 8, 9], [4, 3, 9, -100, -100]])
    _, loss, _ = model(**example(), labels=labels)
    torch.testing.assert_close(loss, model.pretrained_model(**example(), labels=labels).loss)
    assert model(**example())[1] is None


def test_a_new_head_is_zero(make_hf_model):
    assert not outputs(AutoModelForCausalLMWithValueHead.from_pretrained(make_hf_model("gpt2")))[
        1
    ].any()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_generate_is_the_language_model_s_own(arch, make_model):
    model, ids = make_model(arch).eval(), example()["input_ids"][:1]
    greedy = {"do_sample": False, "max_new_tokens": 3}
    assert torch.equal(
        model.generate(ids, **greedy), model.pretrained_model.generate(ids, **greedy)
    )


@pytest.mark.parametrize("arch", ["gpt2", "llama", "t5"])
def test_a_plain_model_s_folder_opens_with_a_head_of_zeros_and_a_warning(
    arch, make_hf_model, tmp_path
):
    model = make_hf_model(arch)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no value head"):
        loaded = wrapper_of(arch).from_pretrained(tmp_path)
    same_model(loaded, wrapper_of(arch).from_pretrained(model), arch)
    with pytest.raises(ValueError, match="no value head"):
        wrapper_of(arch).from_pretrained(tmp_path, require_v_head=True)


def test_a_new_head_that_was_expected_is_no_warning(make_hf_model, tmp_path, recwarn):
    make_hf_model("gpt2").save_pretrained(tmp_path)
    AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, require_v_head=False)
    assert not [warning for warning in recwarn if "value head" in str(warning.message)]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_saved_folder_opens_as_this_class_and_as_the_plain_one(
    arch, sharded, make_model, tmp_path
):
    model, folder = make_model(arch), tmp_path / "new" / "folder"
    model.save_pretrained(folder, **({"max_shard_size": "20KB"} if sharded else {}))
    assert (
        len(list(folder.glob("model-0*"))) > 1
        if sharded
        else (folder / "model.safetensors").exists()
    )
    same_model(wrapper_of(arch).from_pretrained(folder, require_v_head=True), model, arch)
    plain, report = plain_of(arch).from_pretrained(folder, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(
            plain.eval()(**example(arch)).logits, outputs(model, arch)[0], atol=1e-6, rtol=1e-6
        )


@pytest.mark.parametrize("prefix", ["", "pretrained_model."])
def test_a_state_dict_that_was_gathered_before_is_what_is_saved(prefix, make_model, tmp_path):
    """With sharded weights the model itself holds only a part of them, under its modules' names."""
    model, other = make_model(), make_model(seed=5)
    torch.nn.init.constant_(other.v_head.summary.bias, 0.7)
    gathered = {
        name if name.startswith("v_head.") else prefix + name: p
        for name, p in other.state_dict().items()
    }
    model.save_pretrained(tmp_path, state_dict=gathered)
    same_model(
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, require_v_head=True), other
    )


@pytest.mark.parametrize("kind", ["safetensors", "bin", "shards"])
def test_a_folder_of_trl_0_7_has_the_head_within_the_model_s_file(kind, make_model, tmp_path):
    model = make_model()
    model.pretrained_model.save_pretrained(
        tmp_path, max_shard_size="20KB" if kind == "shards" else "1GB"
    )
    head = {
        name: p.detach() for name, p in model.state_dict().items() if name.startswith("v_head.")
    }
    assert set(head) == {"v_head.summary.weight", "v_head.summary.bias"}
    file = sorted(tmp_path.glob("model*.safetensors"))[-1]
    if kind == "bin":
        torch.save({**load_file(file), **head}, tmp_path / "pytorch_model.bin")
        file.unlink()
    else:
        save_file({**load_file(file), **head}, file, metadata={"format": "pt"})
    same_model(
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, require_v_head=True), model
    )


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_head_on_the_hub_is_found_in_either_kind_of_file(file, make_model, tmp_path, monkeypatch):
    import fnmatch

    import huggingface_hub

    head = {
        name: p.detach()
        for name, p in make_model().state_dict().items()
        if name.startswith("v_head.")
    }

    def snapshot_download(name, allow_patterns="*", **kwargs):
        patterns = [allow_patterns] if isinstance(allow_patterns, str) else allow_patterns
        if any(fnmatch.fnmatch(file, pattern) for pattern in patterns):
            save_file(head, tmp_path / file) if file.endswith("safetensors") else torch.save(
                head, tmp_path / file
            )
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = common.read_value_head("someone/model")
    assert found is not None and torch.equal(found["summary.weight"], head["v_head.summary.weight"])


def test_the_state_dict_has_the_model_s_own_names_and_comes_back(make_model):
    model, other = make_model(), make_model(seed=5)
    state = model.state_dict()
    assert set(state) == {
        *model.pretrained_model.state_dict(),
        "v_head.summary.weight",
        "v_head.summary.bias",
    }
    assert not other.load_state_dict(state).missing_keys
    same_model(model, other)
    with pytest.raises(RuntimeError, match="Missing"):
        other.load_state_dict({name: state[name] for name in state if "ln_f" not in name})


@pytest.mark.parametrize("prob", [None, 0.3])
def test_the_head_s_dropout_comes_from_the_argument_or_the_config(prob, make_hf_model):
    plain, own = make_hf_model("gpt2"), make_hf_model("gpt2", summary_dropout_prob=0.2)
    def load(model):
        return AutoModelForCausalLMWithValueHead.from_pretrained(
            model, summary_dropout_prob=prob
        )
    assert load(plain).v_head.dropout.p == (prob or 0.0) and load(own).v_head.dropout.p == (
        prob or 0.2
    )


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_everything_else_goes_to_transformers_and_the_head_stays_float32(
    name, make_model, tmp_path
):
    make_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, **{name: torch.bfloat16})
    assert (
        model.pretrained_model.dtype == torch.bfloat16
        and model.v_head.summary.weight.dtype == torch.float32
    )
    assert all(out.dtype == torch.float32 for out in outputs(model))


def test_a_checkpoint_in_half_precision_is_loaded_for_training_in_float32(make_model, tmp_path):
    """transformers 5 keeps the checkpoint's type, in which small steps are lost; TRL 0.7's did not.
    """
    model = make_model()
    model.pretrained_model.half()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert loaded.pretrained_model.dtype == torch.float32
    kept = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, torch_dtype="auto")
    assert kept.pretrained_model.dtype == torch.float16


@pytest.mark.parametrize("given, want", [
    ({"load_in_8bit": False, "load_in_4bit": False}, None),
    ({"load_in_8bit": True}, (True, False)), ({"load_in_4bit": True}, (False, True))])
def test_transformers_4_s_words_for_quantization_are_taken(
        given, want, make_model, tmp_path, monkeypatch):
    model, seen = make_model(), []
    model.save_pretrained(tmp_path)

    def from_pretrained(name, *args, **kwargs):
        seen.append(kwargs)
        return model.pretrained_model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, **given)
    (arguments,) = seen
    assert not set(given) & set(arguments)
    config = arguments.get("quantization_config")
    assert (config and (config.load_in_8bit, config.load_in_4bit)) == want


def test_a_new_head_is_drawn_from_a_normal_distribution_when_asked(make_hf_model):
    hf_model = make_hf_model("gpt2", n_embd=400, n_layer=1)
    head = AutoModelForCausalLMWithValueHead.from_pretrained(
        hf_model, v_head_init_strategy="normal", v_head_initializer_range=0.7).v_head.summary
    assert head.weight.std().item() == pytest.approx(0.7, rel=0.1) and not head.bias.any()


@pytest.mark.parametrize("arch", ["gpt2", "llama", "t5"])
def test_a_model_without_a_language_modelling_head_is_refused(arch, make_hf_model):
    model = make_hf_model(arch)
    with pytest.raises(ValueError, match="no language modeling head"):
        wrapper_of(arch).from_pretrained(model.encoder if arch == "t5" else model.base_model)


def test_the_class_attributes_of_trl_0_7_are_there():
    assert AutoModelForCausalLMWithValueHead.transformers_parent_class is AutoModelForCausalLM
    assert AutoModelForSeq2SeqLMWithValueHead.transformers_parent_class is AutoModelForSeq2SeqLM
    assert "lm_head" in AutoModelForCausalLMWithValueHead.lm_head_namings


def test_push_to_hub_uploads_what_save_pretrained_writes(make_model, monkeypatch):
    import huggingface_hub
    calls = []

    class HfApi:
        def __init__(self, token=None, **kwargs):
            calls.append(("token", token))

        def create_repo(self, repo_id, **kwargs):
            calls.append((repo_id, kwargs["private"], kwargs["exist_ok"]))

        def upload_folder(self, repo_id, folder_path, commit_message=None, **kwargs):
            calls.append(
                (repo_id, commit_message, {file.name for file in Path(folder_path).iterdir()})
            )
            return "done"

    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    assert (
        make_model().push_to_hub("me/it", commit_message="best", private=True, token="t") == "done"
    )
    assert calls[:2] == [("token", "t"), ("me/it", True, True)] and calls[2][:2] == (
        "me/it",
        "best",
    )
    files = calls[2][2]
    assert {"model.safetensors", "config.json", "value_head.safetensors"} <= files


# ----------------------------------------------------------------------------------------- adapters
@pytest.fixture
def adapter(make_model, tmp_path):
    """The folder of an adapter and its value head, over a base model in a folder; and the model."""
    model = make_model(lora="trained")
    make_model().pretrained_model.save_pretrained(tmp_path / "base")
    model.pretrained_model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "new" / "adapter")
    return tmp_path / "new" / "adapter", model


def test_an_adapter_s_folder_holds_the_adapter_and_the_head_alone(adapter):
    folder, model = adapter
    assert {"adapter_model.safetensors", "adapter_config.json", "value_head.safetensors"} <= set(
        os.listdir(folder)
    )
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    assert set(load_file(folder / "value_head.safetensors")) == {
        "v_head.summary.weight",
        "v_head.summary.bias",
    }


@pytest.mark.parametrize("trainable", [False, True])
def test_an_adapter_s_folder_opens_on_its_base(trainable, adapter):
    folder, model = adapter
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(
        folder, is_trainable=trainable, require_v_head=True
    )
    same_model(loaded, model)
    assert loaded.is_peft_model
    assert (
        any("lora" in name for name, p in loaded.named_parameters() if p.requires_grad) == trainable
    )


def test_an_adapter_s_folder_of_trl_0_7_has_its_head_in_a_bin_file(adapter):
    folder, model = adapter
    head = load_file(folder / "value_head.safetensors")
    (folder / "value_head.safetensors").unlink()
    torch.save(head, folder / "pytorch_model.bin")
    same_model(
        AutoModelForCausalLMWithValueHead.from_pretrained(folder, require_v_head=True), model
    )


def test_an_adapter_s_folder_opens_as_the_plain_model(adapter):
    folder, model = adapter
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            plain(**example()).logits, outputs(model)[0], atol=1e-6, rtol=1e-6
        )


def test_a_fresh_adapter_trains_alone_and_changes_nothing_yet(make_model):
    plain, model = make_model(), make_model(lora="fresh")
    torch.testing.assert_close(outputs(model)[0], outputs(plain)[0])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.split(".")[-3 if "lora" in name else 0] for name in trained} == {
        "lora_A",
        "lora_B",
        "v_head",
    }


def test_two_adapters_at_once_are_refused(adapter):
    from peft import LoraConfig
    with pytest.raises(ValueError, match="adapter already"):
        AutoModelForCausalLMWithValueHead.from_pretrained(
            adapter[0], peft_config=LoraConfig(target_modules=["c_attn"])
        )


def test_an_adapted_state_dict_comes_back(make_model):
    model, other = make_model(lora="trained"), make_model(lora="trained", seed=5)
    assert not any(name.startswith("pretrained_model.") for name in model.state_dict())
    other.load_state_dict(model.state_dict())
    same_model(model, other)


@pytest.fixture
def rewarder(make_hf_model, tmp_path):
    """The folders of a base model and of a classifier's adapter on it, and the classifier."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForSequenceClassification
    base = make_hf_model("llama")
    base.save_pretrained(tmp_path / "base")
    judge = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    config = LoraConfig(
        task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    judge = get_peft_model(judge, config)
    judge.save_pretrained(tmp_path / "judge")
    return tmp_path / "base", tmp_path / "judge", judge.eval()


def test_a_reward_adapter_scores_on_the_policy_s_base_and_leaves_the_policy_alone(
    rewarder, tmp_path
):
    from peft import LoraConfig
    base, folder, judge = rewarder
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        base, peft_config=config, reward_adapter=folder, reward_adapter_name="judge",
        require_v_head=False)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    before = outputs(model)
    scores = model.compute_reward_score(**example())
    with torch.no_grad():
        want = judge(**example()).logits[:, 0]
    torch.testing.assert_close(
        torch.stack([scores[0, 4, 0], scores[1, 2, 0]]), want, atol=1e-5, rtol=1e-5
    )
    assert scores.shape == (2, 5, 1) and all(
        torch.equal(a, b) for a, b in zip(before, outputs(model), strict=True)
    )
    assert trainable == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("judge" in name or "score" in name for name in trainable)
    model.save_pretrained(tmp_path / "out")
    assert not any(
        "score" in name
        for file in (tmp_path / "out").rglob("*.safetensors")
        for name in load_file(file)
    )
    assert not any(
        path.is_dir() for path in (tmp_path / "out").iterdir()
    )  # the reward's adapter has its own folder


def test_a_reward_adapter_needs_a_policy_with_one(rewarder):
    with pytest.raises(ValueError, match="peft_config"):
        AutoModelForCausalLMWithValueHead.from_pretrained(
            rewarder[0], reward_adapter=rewarder[1], require_v_head=False
        )


def test_a_reward_adapter_needs_a_score(rewarder, tmp_path):
    """An adapter of a language model has none."""
    from peft import LoraConfig, get_peft_model
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(rewarder[0]), config).save_pretrained(
        tmp_path / "policy"
    )
    with pytest.raises(ValueError, match="reward_adapter .*policy"):
        AutoModelForCausalLMWithValueHead.from_pretrained(
            rewarder[0],
            peft_config=config,
            reward_adapter=tmp_path / "policy",
            require_v_head=False,
        )


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_a_language_model_is_loaded_by_its_kind_with_its_tokenizer_and_dtype(
    arch, make_hf_model, make_tokenizer, tmp_path
):
    model = make_hf_model(arch)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer, loaded = machinery.load_language_model(str(tmp_path), dtype="bfloat16")
    assert (
        type(loaded) is type(model) and loaded.dtype == torch.bfloat16 and len(tokenizer) == VOCAB
    )
    with pytest.raises(InputError, match=f"{tmp_path}/nothing"):
        machinery.load_language_model(str(tmp_path / "nothing"), dtype="float32")


def test_a_language_model_s_adapter_is_loaded_on_its_base_and_goes_on_training(
    adapter, make_tokenizer
):
    folder, model = adapter
    make_tokenizer().save_pretrained(folder)
    _, loaded = machinery.load_language_model(str(folder), dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.eval()(**example()).logits, outputs(model)[0], atol=1e-6, rtol=1e-6
        )
    assert all(p.requires_grad == ("lora_" in name) for name, p in loaded.named_parameters())


@pytest.mark.parametrize(
    "pad, eos, padded_with",
    [("<pad>", "</s>", "<pad>"), (None, "</s>", "</s>"), (None, None, None)],
)
def test_a_tokenizer_pads_with_its_end_token_where_it_has_no_padding(
    pad, eos, padded_with, make_tokenizer, tmp_path
):
    make_tokenizer(pad_token=pad, eos_token=eos).save_pretrained(tmp_path)
    if padded_with is None:
        with pytest.raises(InputError, match=f"{tmp_path}.*pad_token"):
            machinery.load_tokenizer(str(tmp_path))
    else:
        tokenizer = machinery.load_tokenizer(str(tmp_path))
        assert tokenizer.pad_token == padded_with and tokenizer.eos_token == eos
        assert (
            tokenizer(["w4", "w5 w6"], padding=True).input_ids[0][1]
            == {"<pad>": PAD, "</s>": EOS}[padded_with]
        )


def test_flags_give_an_adapter_of_that_rank_and_scale_on_all_linear_layers_or_none(make_hf_model):
    assert machinery.lora_config(types.SimpleNamespace(lora_r=0, lora_alpha=16)) is None
    config = machinery.lora_config(types.SimpleNamespace(lora_r=3, lora_alpha=12))
    model = common.with_adapter(make_hf_model("llama"), config, seed=0)
    adapted = {
        name.split(".")[-2] for name, module in model.named_modules() if name.endswith("lora_A")
    }
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
    assert layer.lora_A["default"].weight.shape[0] == 3 and layer.scaling["default"] == 12 / 3
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_equal_seeds_draw_equal_adapters_and_a_second_one_is_refused(make_hf_model):
    def adapted(seed):
        torch.rand(seed + 1)  # whatever was drawn before
        config = machinery.lora_config(types.SimpleNamespace(lora_r=3, lora_alpha=12))
        model = common.with_adapter(make_hf_model("llama"), config, seed)
        return (
            model,
            config,
            torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name]),
        )

    (model, config, a), (_, _, b), (_, _, c) = adapted(1), adapted(1), adapted(2)
    assert torch.equal(a, b) and not torch.equal(a, c)
    with pytest.raises(InputError, match="peft_config"):
        common.with_adapter(model, config, 1)


IN_A_PROCESS_OF_ITS_OWN = """
import resource, sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *args):
        return None if name.split(".")[0] == "peft" else self.finder.find_spec(name, *args)

sys.meta_path = [Without(finder) for finder in sys.meta_path]
import common, machinery, torch
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
machinery.keep_freed_memory()
torch.ones(2**24)
before = faults()
for _ in range(10):
    torch.ones(2**24)
print(faults() - before)

from common import TOY, AutoModelForCausalLMWithValueHead
from ppo import PPOConfig, PPOTrainer, main
from transformers import AutoTokenizer

config = PPOConfig(batch_size=2, mini_batch_size=2, ppo_epochs=1)
model = AutoModelForCausalLMWithValueHead.from_pretrained(TOY / "model", require_v_head=False)
trainer = PPOTrainer(config, model, None, AutoTokenizer.from_pretrained(TOY / "model"))
queries = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
responses = trainer.generate(queries, return_prompt=False, do_sample=True, max_new_tokens=4)
trainer.step(queries, responses, [torch.tensor(1.0), torch.tensor(0.0)])
trainer.save_pretrained(sys.argv[1])
AutoModelForCausalLMWithValueHead.from_pretrained(sys.argv[1], require_v_head=True)
assert "peft" not in sys.modules
try:
    main(PPOConfig(lora_r=4, output_dir=sys.argv[1] + "/lora"))
except ValueError as error:
    assert "peft" in str(error)
    print("fine")
"""


@pytest.fixture(scope="module")
def own_process(tmp_path_factory):
    """-> the two lines that the code above prints."""
    command = [sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN, str(tmp_path_factory.mktemp("own"))]
    done = subprocess.run(command, cwd=common.TOY.parent, capture_output=True, text=True)
    return [*done.stdout.split("\n"), "", ""][:2], done.stderr


def test_without_peft_everything_but_adapters_works(own_process):
    assert own_process[0][1] == "fine", own_process[1]


def test_freed_memory_is_kept_for_the_next_tensor(own_process):
    """64 MB are 16,384 pages, which the system would clear for each of the ten tensors. (The heap
    may grow once or twice more, when something small has settled in the gap.)"""
    assert sys.platform != "linux" or int(own_process[0][0]) < 5 * 16384


# --------------------------------------------------------------------------------- reference models
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("shared", [None, 0, 1])
def test_a_reference_is_a_frozen_copy_that_shares_the_layers_below_a_number(
    shared, arch, make_model
):
    if arch == "bart" and shared:
        shared = 0  # it has but one layer
    model = make_model(arch).train()
    reference = common.create_reference_model(model, shared)
    assert not reference.training and model.training
    same_model(model, reference, arch)
    parameters, copies = dict(model.named_parameters()), dict(reference.named_parameters())
    common_storage = {
        name for name in parameters if parameters[name].data_ptr() == copies[name].data_ptr()
    }
    layers = {
        "gpt2": ["h.0.", "h.1."],
        "t5": ["decoder.block.0.", "decoder.block.1."],
        "bart": ["decoder.layers.0."],
    }
    layers = layers.get(arch, ["model.layers.0.", "model.layers.1."])
    want = {name for name in parameters if any(layer in name for layer in layers[:shared or 0])}
    assert want == {name for name in common_storage if any(layer in name for layer in layers)}
    assert not any("v_head" in name for name in common_storage) and bool(common_storage) == (
        shared is not None
    )
    if shared is not None:  # embeddings and the encoder are below all of the decoder's layers
        assert any("embed" in name or "wte" in name or "shared" in name for name in common_storage)
        assert all(
            name in common_storage
            for name in parameters
            if ".encoder.block." in name or ".encoder.layers." in name
        )
    assert all(p.requires_grad == (name not in common_storage) for name, p in parameters.items())
    assert not any(p.requires_grad for p in copies.values())
    with torch.no_grad():  # what is not shared is a copy
        for name, p in parameters.items():
            if name not in common_storage:
                p.add_(1)
                assert not torch.equal(p, copies[name])


def test_the_pattern_of_layers_may_be_given_and_must_fit(make_hf_model):
    model = make_hf_model("gpt2")
    reference = common.create_reference_model(model, 1, pattern="transformer.h.{layer}")
    assert reference.transformer.h[0].ln_1.weight is model.transformer.h[0].ln_1.weight
    assert reference.transformer.h[1].ln_1.weight is not model.transformer.h[1].ln_1.weight
    for wrong in ({"num_shared_layers": 9}, {"num_shared_layers": 1, "pattern": "layers.{layer}"}):
        with pytest.raises(ValueError, match="num_shared_layers"):
            common.create_reference_model(model, **wrong)
