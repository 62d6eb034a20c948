"""common.py: seeds, rows, prompts, rewards, and models with a value head, from and to every kind of folder.

    python -m pytest -q tests/test_common.py
"""
import json
import os
import random
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2Config, GPT2ForSequenceClassification

import common
from common import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, InputError
from conftest import CAUSAL, EOS, PAD, SEQ2SEQ, VOCAB

ARCHITECTURES = CAUSAL + SEQ2SEQ
wrapper_of = lambda arch: AutoModelForSeq2SeqLMWithValueHead if arch in SEQ2SEQ else AutoModelForCausalLMWithValueHead
plain_of = lambda arch: AutoModelForSeq2SeqLM if arch in SEQ2SEQ else AutoModelForCausalLM


def example(arch="gpt2"):
    """Two rows of five tokens, the second padded."""
    ids, mask = torch.tensor([[5, 6, 7, 8, 9], [4, 3, 9, PAD, PAD]]), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    return {"input_ids": ids, "attention_mask": mask, **({"decoder_input_ids": ids.flip(1)} if arch in SEQ2SEQ else {})}


def outputs(model, arch="gpt2", **kwargs):
    """-> logits, values"""
    with torch.no_grad():
        logits, _, values = model.eval()(**example(arch), **kwargs)
    return logits, values


def same_model(model, other, arch="gpt2"):
    for a, b in zip(outputs(model, arch), outputs(other, arch)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


# ------------------------------------------------------------------------------------------------ seeds
def test_set_seed_seeds_python_numpy_and_torch():
    def draw(seed):
        common.set_seed(seed)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(3) == draw(3) and not set(draw(3)) & set(draw(4))


# ------------------------------------------------------------------------------------------------ rows
ROWS = [{"text": "w4 w5", "n": 1}, {"text": "w6", "n": 2}]
WRITE = {".jsonl": lambda path: path.write_text("\n".join(map(json.dumps, ROWS))),
         ".json": lambda path: path.write_text(json.dumps(ROWS)),
         ".csv": lambda path: path.write_text("text,n\nw4 w5,1\nw6,2\n"),
         ".parquet": lambda path: Dataset.from_list(ROWS).to_parquet(path)}


@pytest.mark.parametrize("kind", WRITE)
def test_rows_come_from_any_kind_of_file(kind, tmp_path):
    WRITE[kind](tmp_path / f"data{kind}")
    assert list(common.load_rows(tmp_path / f"data{kind}")) == ROWS


def test_each_line_of_a_text_file_is_a_row(tmp_path):
    (tmp_path / "data.txt").write_text("w4 w5\nw6\n")
    assert list(common.load_rows(str(tmp_path / "data.txt"))) == [{"text": "w4 w5"}, {"text": "w6"}]


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_come_from_a_saved_data_set_and_its_split(split, tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])).save_to_disk(tmp_path / "both")
    assert list(common.load_rows(tmp_path / "one", split)) == ROWS
    assert list(common.load_rows(tmp_path / "both", split)) == ROWS[:1 if split == "test" else 2]


def test_a_folder_of_files_is_a_data_set(tmp_path):
    WRITE[".jsonl"](tmp_path / "train.jsonl")
    assert list(common.load_rows(tmp_path)) == ROWS


@pytest.mark.parametrize("name, told", [("data.xls", "unknown kind '.xls'"), ("absent.jsonl", "does not exist"),
                                        ("broken.jsonl", "broken.jsonl"), ("nobody/nothing", "nobody/nothing")])
def test_what_is_no_data_set_is_told_in_one_sentence(name, told, tmp_path):
    (tmp_path / "data.xls").touch()
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(InputError, match=told) as error:
        common.load_rows(tmp_path / name if "." in name else name)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ prompts
@pytest.fixture
def prompts(tmp_path, make_tokenizer):
    """prompts(rows, **arguments) -> load_prompts of a file of these rows."""
    def load(rows, **kwargs):
        path = tmp_path / "prompts.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        tokenizer = make_tokenizer()
        tokenizer.chat_template = (
            "{% for turn in messages %}{{ '<s> ' if turn.role == 'user' else '<unk> ' }}{{ turn.content }} {% endfor %}"
            "{% if add_generation_prompt %}</s>{% endif %}")
        return common.load_prompts(path, tokenizer, **kwargs)

    return load


@pytest.mark.parametrize("column", ["query", "prompt", "text"])
def test_prompts_are_texts(column, prompts):
    assert prompts([{column: "w4 w5"}, {column: "w6"}]) == [
        {"query": "w4 w5", "input_ids": [4, 5]}, {"query": "w6", "input_ids": [6]}]


def test_a_query_is_taken_before_a_text(prompts):
    assert prompts([{"text": "w4", "prompt": "w5", "query": "w6"}])[0]["input_ids"] == [6]


def test_prompts_are_tokens(prompts):
    assert prompts([{"input_ids": [7, 8]}]) == [{"query": "w7 w8", "input_ids": [7, 8]}]


@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_prompts_are_chats_whose_last_answer_is_left_off(column, prompts):
    user, assistant = {"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5"}
    assert prompts([{column: [user, assistant]}])[0]["input_ids"] == [1, 4, EOS]
    assert prompts([{column: [user, assistant, user]}])[0]["input_ids"] == [1, 4, 3, 5, 1, 4, EOS]


def test_prompts_are_cut_to_their_first_tokens(prompts):
    assert prompts([{"query": "w4 w5 w6"}], max_length=2) == [{"query": "w4 w5", "input_ids": [4, 5]}]


def test_other_columns_are_kept_where_wished(prompts):
    rows = [{"query": "w4", "answer": 7}]
    assert "answer" not in prompts(rows)[0] and prompts(rows, keep_columns=True)[0]["answer"] == 7


@pytest.mark.parametrize("rows, arguments, told", [
    ([{"title": "w4"}], {}, r"\['title'\].*rename"), ([{"query": "w4"}, {"query": ""}], {}, "row 1: query is empty"),
    ([{"query": "w4"}, {"query": None}], {}, "row 1: query is empty"),
    ([{"query": "w4 w5 w6"}], {"longest": 2}, "row 0: 3 tokens.*--max-query-length")])
def test_a_prompt_that_can_not_be_answered_is_told_by_row(rows, arguments, told, prompts):
    with pytest.raises(InputError, match=told):
        prompts(rows, **arguments)


# ------------------------------------------------------------------------------------------------ rewards
@pytest.fixture
def classifier(tmp_path, make_tokenizer):
    """classifier(labels) -> the folder of a random classifier, and the classifier."""
    def make(labels, **attributes):
        config = GPT2Config(
            vocab_size=VOCAB, n_positions=16, n_embd=32, n_layer=1, n_head=2, initializer_range=0.2, pad_token_id=PAD,
            id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)})
        model = GPT2ForSequenceClassification(config).eval()
        model.save_pretrained(tmp_path / "classifier")
        make_tokenizer(**attributes).save_pretrained(tmp_path / "classifier")
        return str(tmp_path / "classifier"), model

    return make


@pytest.mark.parametrize("attributes", [{}, {"padding_side": "left"}, {"pad_token": None}])
def test_a_score_is_the_logit_of_the_only_label_whatever_else_is_scored(attributes, classifier):
    folder, model = classifier(["score"], **attributes)
    texts = ["w5", "w5 w6 w7 w8", "w9 w4"] * 30
    scores = common.load_reward(folder)(texts)
    with torch.no_grad():
        want = [model(torch.tensor([[int(word[1:]) for word in text.split()]])).logits[0, 0].item() for text in texts]
    assert [score.item() for score in scores] == pytest.approx(want, abs=1e-5)
    assert all(score.dim() == 0 for score in scores) and len(set(want)) == 3


def test_a_text_too_long_for_the_classifier_is_cut(classifier):
    assert torch.isfinite(common.load_reward(classifier(["score"])[0])([" ".join(["w5"] * 40)])[0])


@pytest.mark.parametrize("label, column", [("bad", 0), ("good", 1), ("1", 1)])
def test_a_score_is_the_logit_of_the_chosen_label(label, column, classifier):
    folder, model = classifier(["bad", "good"])
    with torch.no_grad():
        want = model(torch.tensor([[5, 6]])).logits[0, column].item()
    assert common.load_reward(folder, label)(["w5 w6"])[0].item() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("label, told", [
    (None, "2 labels.*--reward-label.*bad, good"), ("great", "'great' is none of bad, good")])
def test_a_label_has_to_be_chosen_among_those_there_are(label, told, classifier):
    with pytest.raises(InputError, match=told):
        common.load_reward(classifier(["bad", "good"])[0], label)


FUNCTIONS = "def length(texts):\n    return [len(text) for text in texts]\n\ndef few(texts):\n    return [1.0]\n\n" \
            "def sick(texts):\n    return 1 / 0\n"


def test_a_reward_is_any_function_of_texts(tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    scores = common.load_reward(f"{tmp_path}/mine.py:length")(["a", "bcd"])
    assert [score.item() for score in scores] == [1, 3] and scores[0].dtype == torch.float32


@pytest.mark.parametrize("function, told", [
    ("few", "1 scores for 2 texts"), ("sick", "failed on 2 texts.*'a'.*division by zero.*mine.py:8"),
    ("absent", "can't be loaded.*absent")])
def test_a_reward_that_fails_is_told_in_one_sentence(function, told, tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    with pytest.raises(InputError, match=told) as error:
        common.load_reward(f"{tmp_path}/mine.py:{function}")(["a", "b"])
    assert "\n" not in str(error.value)


def test_what_is_no_reward_is_told(tmp_path):
    with pytest.raises(InputError, match="neither file.py:function nor a sequence classifier"):
        common.load_reward(str(tmp_path / "nothing"))


# ------------------------------------------------------------------------------------------- what a run leaves behind
def test_the_newest_checkpoint_is_that_of_the_largest_number(tmp_path):
    for n in (9, 10, 2):
        (tmp_path / f"checkpoint-{n}").mkdir()
    assert common.newest_checkpoint(tmp_path).name == "checkpoint-10"
    assert common.newest_checkpoint(tmp_path / "checkpoint-2").name == "checkpoint-2"
    with pytest.raises(InputError, match="no checkpoint"):
        common.newest_checkpoint(tmp_path / "elsewhere")


def test_metrics_after_the_checkpoint_are_written_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step, rows in ((0, (1, 2, 3)), (2, (3, 4))):
        log = common.MetricsFile(path, step)
        for row in rows:
            log.write({"update": row, "from": step})
        path.write_text(path.read_text() + '{"update": 5, "fr')  # killed in the middle of a line
    assert [json.loads(line) for line in path.read_text().splitlines()[:-1]] == [
        {"update": u, "from": f} for u, f in ((1, 0), (2, 0), (3, 2), (4, 2))]


def test_a_folder_that_can_not_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    common.writable_folder(tmp_path / "new" / "folder", fresh=True)
    assert (tmp_path / "new" / "folder").is_dir() and not list((tmp_path / "new" / "folder").iterdir())
    with pytest.raises(InputError, match="can't be written"):
        common.writable_folder(tmp_path / "file" / "folder", fresh=True)


def test_a_fresh_run_never_writes_over_the_checkpoints_of_another(tmp_path):
    (tmp_path / "samples.jsonl").touch()
    common.writable_folder(tmp_path, fresh=True)
    assert not list(tmp_path.iterdir())                  # samples are appended to: those of an earlier run go
    for kept in ("checkpoint-70", "samples.jsonl"):
        (tmp_path / kept).mkdir()
    common.writable_folder(tmp_path, fresh=False)
    with pytest.raises(InputError, match="holds checkpoint-70 of an earlier run: resume from it, or choose another"):
        common.writable_folder(tmp_path, fresh=True)
    assert len(list(tmp_path.iterdir())) == 2


# ------------------------------------------------------------------------------------------- models with a value head
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


@pytest.mark.parametrize("lora", [None, "trained"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_selected_tokens_have_the_numbers_of_the_full_forward(arch, lora, make_model):
    model = make_model(arch, lora=lora)
    select = torch.tensor([[True, False, True, True, False], [False, True, False, False, False]])
    for full, some in zip(outputs(model, arch), outputs(model, arch, select=select)):
        torch.testing.assert_close(some, full[select], atol=1e-6, rtol=1e-6)


def test_labels_give_the_loss_of_the_language_model(make_model):
    model, labels = make_model().eval(), torch.tensor([[5, 6, 7, 8, 9], [4, 3, 9, -100, -100]])
    _, loss, _ = model(**example(), labels=labels)
    torch.testing.assert_close(loss, model.pretrained_model(**example(), labels=labels).loss)
    assert model(**example())[1] is None


def test_a_new_head_is_zero(make_hf_model):
    assert not outputs(AutoModelForCausalLMWithValueHead.from_pretrained(make_hf_model("gpt2")))[1].any()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_generate_is_the_language_model_s_own(arch, make_model):
    model, ids = make_model(arch).eval(), example()["input_ids"][:1]
    greedy = {"do_sample": False, "max_new_tokens": 3}
    assert torch.equal(model.generate(ids, **greedy), model.pretrained_model.generate(ids, **greedy))


@pytest.mark.parametrize("arch", ["gpt2", "llama", "t5"])
def test_a_plain_model_s_folder_opens_and_the_missing_head_is_told(arch, make_hf_model, tmp_path):
    """P25: a random head, and a line in the log."""
    model = make_hf_model(arch)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no value head"):
        loaded = wrapper_of(arch).from_pretrained(tmp_path)
    same_model(loaded, wrapper_of(arch).from_pretrained(model), arch)
    with pytest.raises(ValueError, match="no value head"):
        wrapper_of(arch).from_pretrained(tmp_path, require_v_head=True)


def test_a_new_head_that_was_expected_is_not_told(make_hf_model, tmp_path, recwarn):
    make_hf_model("gpt2").save_pretrained(tmp_path)
    AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, require_v_head=False)
    assert not [warning for warning in recwarn if "value head" in str(warning.message)]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_saved_folder_opens_as_this_class_and_as_the_plain_one(arch, sharded, make_model, tmp_path):
    """P23: the head of a sharded folder was looked for on the hub."""
    model, folder = make_model(arch), tmp_path / "new" / "folder"
    model.save_pretrained(folder, **({"max_shard_size": "20KB"} if sharded else {}))
    assert len(list(folder.glob("model-0*"))) > 1 if sharded else (folder / "model.safetensors").exists()
    same_model(wrapper_of(arch).from_pretrained(folder, require_v_head=True), model, arch)
    plain, told = plain_of(arch).from_pretrained(folder, output_loading_info=True)
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(**example(arch)).logits, outputs(model, arch)[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "shards"])
def test_a_folder_of_trl_0_7_has_the_head_within_the_model_s_file(kind, make_model, tmp_path):
    model = make_model()
    model.pretrained_model.save_pretrained(tmp_path, max_shard_size="20KB" if kind == "shards" else "1GB")
    head = {name: p.detach() for name, p in model.state_dict().items() if name.startswith("v_head.")}
    assert set(head) == {"v_head.summary.weight", "v_head.summary.bias"}
    file = sorted(tmp_path.glob("model*.safetensors"))[-1]
    if kind == "bin":
        torch.save({**load_file(file), **head}, tmp_path / "pytorch_model.bin")
        file.unlink()
    else:
        save_file({**load_file(file), **head}, file, metadata={"format": "pt"})
    same_model(AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, require_v_head=True), model)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_head_on_the_hub_is_found_in_either_kind_of_file(file, make_model, tmp_path, monkeypatch):
    import fnmatch
    import huggingface_hub
    head = {name: p.detach() for name, p in make_model().state_dict().items() if name.startswith("v_head.")}

    def snapshot_download(name, allow_patterns="*", **kwargs):
        patterns = [allow_patterns] if isinstance(allow_patterns, str) else allow_patterns
        if any(fnmatch.fnmatch(file, pattern) for pattern in patterns):
            save_file(head, tmp_path / file) if file.endswith("safetensors") else torch.save(head, tmp_path / file)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = common.read_value_head("someone/model")
    assert found is not None and torch.equal(found["summary.weight"], head["v_head.summary.weight"])


def test_the_state_dict_has_the_model_s_own_names_and_comes_back(make_model):
    model, other = make_model(), make_model(seed=5)
    state = model.state_dict()
    assert set(state) == {*model.pretrained_model.state_dict(), "v_head.summary.weight", "v_head.summary.bias"}
    assert not other.load_state_dict(state).missing_keys
    same_model(model, other)
    with pytest.raises(RuntimeError, match="Missing"):
        other.load_state_dict({name: state[name] for name in state if "ln_f" not in name})


@pytest.mark.parametrize("prob", [None, 0.3])
def test_the_head_s_dropout_comes_from_the_argument_or_the_config(prob, make_hf_model):
    plain, own = make_hf_model("gpt2"), make_hf_model("gpt2", summary_dropout_prob=0.2)
    load = lambda model: AutoModelForCausalLMWithValueHead.from_pretrained(model, summary_dropout_prob=prob)
    assert load(plain).v_head.dropout.p == (prob or 0.0) and load(own).v_head.dropout.p == (prob or 0.2)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_everything_else_goes_to_transformers_and_the_head_stays_float32(name, make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, **{name: torch.bfloat16})
    assert model.pretrained_model.dtype == torch.bfloat16 and model.v_head.summary.weight.dtype == torch.float32
    assert all(out.dtype == torch.float32 for out in outputs(model))


@pytest.mark.parametrize("arch", ["gpt2", "llama", "t5"])
def test_a_model_without_a_language_modelling_head_is_refused(arch, make_hf_model):
    model = make_hf_model(arch)
    with pytest.raises(ValueError, match="no language modelling head"):
        wrapper_of(arch).from_pretrained(model.encoder if arch == "t5" else model.base_model)


def test_names_that_code_for_trl_reads():
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
            calls.append((repo_id, kwargs["private"]))

        def upload_folder(self, repo_id, folder_path, **kwargs):
            calls.append((repo_id, {file.name for file in Path(folder_path).iterdir()}))
            return "done"

    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    assert make_model().push_to_hub("me/it", private=True, token="t") == "done"
    token, repository, (repo_id, files) = calls
    assert token == ("token", "t") and repository == ("me/it", True) and repo_id == "me/it"
    assert {"model.safetensors", "config.json", "value_head.safetensors"} <= files


# ------------------------------------------------------------------------------------------------ adapters
@pytest.fixture
def adapter(make_model, tmp_path):
    """The folder of an adapter and its value head, over a base model in a folder; and the model."""
    model = make_model(lora="trained")
    make_model().pretrained_model.save_pretrained(tmp_path / "base")
    model.pretrained_model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "new" / "adapter")
    return tmp_path / "new" / "adapter", model


def test_an_adapter_s_folder_holds_the_adapter_and_the_head_alone(adapter):
    """P22: the head was written before the folder was there."""
    folder, model = adapter
    assert {"adapter_model.safetensors", "adapter_config.json", "value_head.safetensors"} <= set(os.listdir(folder))
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    assert set(load_file(folder / "value_head.safetensors")) == {"v_head.summary.weight", "v_head.summary.bias"}


@pytest.mark.parametrize("trainable", [False, True])
def test_an_adapter_s_folder_opens_on_its_base(trainable, adapter):
    folder, model = adapter
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(folder, is_trainable=trainable, require_v_head=True)
    same_model(loaded, model)
    assert loaded.is_peft_model
    assert any("lora" in name for name, p in loaded.named_parameters() if p.requires_grad) == trainable


def test_an_adapter_s_folder_of_trl_0_7_has_its_head_in_a_bin_file(adapter):
    folder, model = adapter
    head = load_file(folder / "value_head.safetensors")
    (folder / "value_head.safetensors").unlink()
    torch.save(head, folder / "pytorch_model.bin")
    same_model(AutoModelForCausalLMWithValueHead.from_pretrained(folder, require_v_head=True), model)


def test_an_adapter_s_folder_opens_as_the_plain_model(adapter):
    folder, model = adapter
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(**example()).logits, outputs(model)[0], atol=1e-6, rtol=1e-6)


def test_a_fresh_adapter_trains_alone_and_changes_nothing_yet(make_model):
    plain, model = make_model(), make_model(lora="fresh")
    torch.testing.assert_close(outputs(model)[0], outputs(plain)[0])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.split(".")[-3 if "lora" in name else 0] for name in trained} == {"lora_A", "lora_B", "v_head"}


def test_two_adapters_at_once_are_refused(adapter):
    from peft import LoraConfig
    with pytest.raises(ValueError, match="adapter already"):
        AutoModelForCausalLMWithValueHead.from_pretrained(adapter[0], peft_config=LoraConfig(target_modules=["c_attn"]))


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
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    judge = get_peft_model(judge, config)
    judge.save_pretrained(tmp_path / "judge")
    return tmp_path / "base", tmp_path / "judge", judge.eval()


def test_a_reward_adapter_scores_on_the_policy_s_base_and_leaves_the_policy_alone(rewarder, tmp_path):
    from peft import LoraConfig
    base, folder, judge = rewarder
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        base, peft_config=config, reward_adapter=folder, require_v_head=False)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    before = outputs(model)
    scores = model.compute_reward_score(**example())
    with torch.no_grad():
        want = judge(**example()).logits[:, 0]
    torch.testing.assert_close(torch.stack([scores[0, 4, 0], scores[1, 2, 0]]), want, atol=1e-5, rtol=1e-5)
    assert scores.shape == (2, 5, 1) and all(torch.equal(a, b) for a, b in zip(before, outputs(model)))
    assert trainable == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("reward" in name or "score" in name for name in trainable)
    model.save_pretrained(tmp_path / "out")
    assert not any("score" in name for file in (tmp_path / "out").rglob("*.safetensors") for name in load_file(file))


def test_a_reward_adapter_needs_a_policy_with_one(rewarder):
    with pytest.raises(ValueError, match="peft_config"):
        AutoModelForCausalLMWithValueHead.from_pretrained(rewarder[0], reward_adapter=rewarder[1], require_v_head=False)


WITHOUT_PEFT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *args):
        return None if name.split(".")[0] == "peft" else self.finder.find_spec(name, *args)

sys.meta_path = [Without(finder) for finder in sys.meta_path]
import torch
from common import TOY, AutoModelForCausalLMWithValueHead
from ppo import PPOConfig, PPOTrainer, load_policy

config = PPOConfig(batch_size=2, mini_batch_size=2, ppo_epochs=1)
tokenizer, model = load_policy(config)
trainer = PPOTrainer(config, model, None, tokenizer)
queries = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
responses = trainer.generate(queries, return_prompt=False, do_sample=True, max_new_tokens=4)
trainer.step(queries, responses, [torch.tensor(1.0), torch.tensor(0.0)])
trainer.save_pretrained(sys.argv[1])
AutoModelForCausalLMWithValueHead.from_pretrained(sys.argv[1], require_v_head=True)
assert "peft" not in sys.modules
try:
    load_policy(PPOConfig(lora_r=4))
except ValueError as error:
    assert "peft" in str(error)
    print("fine")
"""


def test_without_peft_all_but_adapters_works(tmp_path):
    command = [sys.executable, "-c", WITHOUT_PEFT, str(tmp_path)]
    done = subprocess.run(command, cwd=common.TOY.parent, capture_output=True, text=True)
    assert done.stdout.strip().endswith("fine"), done.stderr


# ------------------------------------------------------------------------------------------------ reference models
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("shared", [None, 0, 1])
def test_a_reference_model_computes_the_same_shares_what_it_should_and_is_frozen(shared, arch, make_model):
    """P21: layers that were said to be shared were copied."""
    if arch == "bart" and shared:
        shared = 0  # it has but one layer
    model = make_model(arch)
    reference = common.create_reference_model(model, shared)
    same_model(model, reference, arch)
    parameters, copies = dict(model.named_parameters()), dict(reference.named_parameters())
    common_storage = {name for name in parameters if parameters[name].data_ptr() == copies[name].data_ptr()}
    last = {"gpt2": "h.1.", "t5": "decoder.block.1.", "bart": "decoder.layers.0."}.get(arch, "model.layers.1.")
    assert not any(last in name or "v_head" in name for name in common_storage)
    assert bool(common_storage) == (shared is not None)
    assert all(p.requires_grad == (name not in common_storage) for name, p in parameters.items())
    assert not reference.training and not any(p.requires_grad for p in copies.values())
    with torch.no_grad():  # what is not shared is a copy
        model.v_head.summary.bias.add_(1)
    assert not torch.equal(outputs(model, arch)[1], outputs(reference, arch)[1])


def test_the_pattern_of_layers_may_be_given_and_must_fit(make_hf_model):
    model = make_hf_model("gpt2")
    reference = common.create_reference_model(model, 1, pattern="transformer.h.{layer}")
    assert reference.transformer.h[0].ln_1.weight is model.transformer.h[0].ln_1.weight
    assert reference.transformer.h[1].ln_1.weight is not model.transformer.h[1].ln_1.weight
    for wrong in ({"num_shared_layers": 9}, {"num_shared_layers": 1, "pattern": "layers.{layer}"}):
        with pytest.raises(ValueError, match="num_shared_layers"):
            common.create_reference_model(model, **wrong)


def test_freed_memory_is_kept_for_the_next_tensor():
    """64 MB are 16,384 pages, which the system would hand out, and clear, one by one, for each of the ten tensors. (The
    heap may have to grow once or twice more, when something small has settled in the gap.)"""
    code = ("import resource, torch, common; common.keep_freed_memory(); torch.ones(2**24)\n"
            "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "before = faults()\nfor _ in range(10): torch.ones(2**24)\nprint(faults() - before)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(common.__file__).parent)
    assert done.returncode == 0, done.stderr
    assert sys.platform != "linux" or int(done.stdout) < 5 * 16384


def test_several_gpus_in_one_process_are_refused():
    """Trainer would split each batch among threads (DataParallel), under which a hook on the logits sees parts of it."""
    with pytest.raises(common.InputError, match="torchrun --nproc_per_node 4"):
        common.prepare_process(types.SimpleNamespace(n_gpu=4))
