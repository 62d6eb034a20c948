"""sft.py as a user runs it: the command line, what a run leaves behind, kill and resume, two ranks, real input, bad input."""
import ast
import json
import math
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationMixin, pipeline

import sft
from common import TOY, InputError
from conftest import CAUSAL, HOME, SEQ2SEQ, hf_model
from sft import IGNORE, SFTConfig, main

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")
ROOT = Path(__file__).resolve().parent.parent
REVIEWS = [json.loads(line)["text"] for line in (TOY / "reviews.jsonl").read_text().splitlines()[:200]]
PAIRS = [{"prompt": " ".join(text.split()[:3]), "completion": " " + " ".join(text.split()[3:])} for text in REVIEWS]
TEMPLATE = ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{{ eos_token if m['role'] == 'assistant' else ' ' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")


def script(*flags, ranks=0, **kwargs):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks else []
    return subprocess.run([sys.executable, *launcher, "sft.py", *map(str, flags)], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, **kwargs)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def metrics(folder):
    """metrics.jsonl without the clock."""
    return [{k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k}
            for row in lines(Path(folder) / "metrics.jsonl")]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


FEW = write_rows(Path(HOME.name) / "few.jsonl", [{"text": text} for text in REVIEWS[:40]])  # quicker than the toy's 6000


def small(folder, **fields):
    return SFTConfig(**{"output_dir": str(folder), "dataset": FEW, "per_device_train_batch_size": 4, "max_steps": 2,
                        "save_strategy": "no", "logging_steps": 1, **fields})


def tiny(folder, arch, template=None, **changes):
    """A random model of two layers and the toy's tokenizer, in a folder."""
    tokenizer = AutoTokenizer.from_pretrained(TOY / "blank")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    ends = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "initializer_range": 0.02, **changes}
    hf_model(arch, **ends).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    """The samples before and after are short: forty tokens of ten take longer than the training in most tests."""
    plain = GenerationMixin.generate
    monkeypatch.setattr(GenerationMixin, "generate", lambda self, *args, **kwargs: plain(
        self, *args, **{**kwargs, "max_new_tokens": min(kwargs["max_new_tokens"], 100 if len(kwargs["input_ids"]) > 1 else 4)}))


@pytest.fixture
def built(monkeypatch):
    """The trainers that main() built, the last of them last."""
    made = []

    class Kept(sft.SFTTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(sft, "SFTTrainer", Kept)
    return made


# ------------------------------------------------------------------------------------------------ the default run
@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    done = script("--max-steps", 60, "--output-dir", out)
    assert done.returncode == 0, done.stderr
    return out, done


def test_the_default_run_learns_to_write_reviews(finished_run):
    rows = metrics(finished_run[0])
    assert [row["update"] for row in rows] == [20, 40, 60, 60, 60]
    first, *_, last = [row["loss"] for row in rows if "loss" in row]
    (held_out,) = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert first > 2 and last < 1.1 and held_out < 1.1  # nats per token; knowing nothing costs log 400 = 5.99


def test_a_run_leaves_a_model_that_the_plain_classes_load(finished_run):
    out, _ = finished_run
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    before = AutoModelForCausalLM.from_pretrained(TOY / "blank")
    assert any((a != b).any() for a, b in zip(model.parameters(), before.parameters())) and model.dtype == torch.float32
    text = pipeline("text-generation", model=str(out), tokenizer=tokenizer)("the plot was", max_new_tokens=4)
    assert text[0]["generated_text"].startswith("the plot was ")


def test_the_model_has_learnt_to_stop(finished_run):
    """S1, S2: most of what it writes ends by itself before twice the length of a review."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(finished_run[0]), AutoTokenizer.from_pretrained(finished_run[0])
    torch.manual_seed(0)
    ids = tokenizer(["the plot was"] * 20, return_tensors="pt")
    ids = model.generate(**ids, do_sample=True, top_k=0, max_new_tokens=100, pad_token_id=tokenizer.pad_token_id)
    assert (ids == tokenizer.eos_token_id).any(1).float().mean() > 0.7


def test_samples_are_kept_before_and_after(finished_run):
    rows = lines(finished_run[0] / "samples.jsonl")
    before, after = rows[:5], rows[5:]
    assert [row["update"] for row in rows] == [0] * 5 + [60] * 5
    assert [row["prompt"] for row in before] == [row["prompt"] for row in after]
    assert all(row["completion"] in finished_run[1].stdout for row in after)


def test_the_run_tells_loss_and_time_left_and_no_library_chatter(finished_run):
    _, done = finished_run
    bar = done.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert re.search(r"60/60 \[\d\d:\d\d<\d\d:\d\d.*loss=0?1?\.\d+", bar), bar
    noise = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "update" not in line]
    assert noise == []
    assert re.search(r"^epoch 0\.32: eval_loss 0?1?\.\d+$", done.stdout, re.M)


def test_the_model_card_names_the_experiment(finished_run):
    card = (finished_run[0] / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n---\n") and "`toy/reviews.jsonl`" in card
    assert re.search(r"\| eval_loss \| 0?1?\.\d+ \|", card)


def entry_point(monkeypatch, *flags):
    """The script as the command line runs it, in this process -> its exit status or sentence."""
    monkeypatch.setattr(sys, "argv", ["sft.py", *map(str, flags)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "sft.py"), run_name="__main__")
    return end.value.code


def test_help_needs_no_network(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setenv("COLUMNS", "200")
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    assert not entry_point(monkeypatch, "--help")
    told = capsys.readouterr().out
    for flag in ("--model-name", "--max-seq-length", "--packing", "--resume-from-checkpoint", "--lora-r", "--fsdp"):
        assert f"{flag} " in told or f"{flag}," in told, flag
    assert "only what follows its last occurrence is learnt" in " ".join(told.replace("│", " ").split())


def own_fields():
    tree = ast.parse((ROOT / "sft.py").read_text())
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "SFTConfig").body
    fields = [n.target.id for n in body if isinstance(n, ast.AnnAssign)]
    documented = [a.target.id for a, b in zip(body, body[1:]) if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)]
    return fields, documented


def test_every_option_has_a_sentence():
    fields, documented = own_fields()
    assert fields == documented and len(fields) >= 19


def test_every_option_is_read():
    from transformers import TrainingArguments
    source = (ROOT / "sft.py").read_text() + (ROOT / "common.py").read_text()
    for name in set(own_fields()[0]) - set(TrainingArguments.__dataclass_fields__):
        assert re.search(rf"config\.{name}\b", source), f"nothing reads {name}"


def commands(text):
    """The commands `torchrun ... sft.py flags` of a text, without what stands beside them."""
    found = re.findall(r"torchrun .*?sft\.py(.*?)(?:   .*)?$", text.replace("\\\n", " "), re.M)
    return [shlex.split(flags) for flags in found]


@pytest.mark.parametrize("page", ["sft.py", "docs/sft.md"])
def test_every_command_of_the_pages_parses(page):
    import tyro
    text = sft.__doc__ if page == "sft.py" else "\n".join(re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.S))
    found = commands(text)
    assert found
    for flags in found:
        config = tyro.cli(SFTConfig, args=flags + ["--use-cpu"])  # --bf16 without it asks for a GPU
        assert config.per_device_train_batch_size > 0


# ------------------------------------------------------------------------------------------------ kill and resume
def test_a_killed_run_goes_on_to_exactly_the_same_numbers(tmp_path, monkeypatch):
    fields = {"max_steps": 40, "save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 20,
              "per_device_train_batch_size": 8, "dataset": FEW, "eval_dataset": FEW}
    monkeypatch.undo()  # samples as long as the script's own
    flags = [str(word) for name, value in {**fields, "logging_steps": 1}.items() for word in (f"--{name.replace('_', '-')}", value)]
    main(small(tmp_path / "whole", **fields))
    assert len(metrics(tmp_path / "whole")) == 43
    run = subprocess.Popen([sys.executable, "sft.py", *flags, "--output-dir", str(tmp_path / "cut")], cwd=ROOT,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "cut").glob("checkpoint-*/trainer_state.json")):
        assert run.poll() is None, "the run ended before it was killed"
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert 5 <= len(metrics(tmp_path / "cut")) < 40
    done = script(*flags, "--output-dir", tmp_path / "cut", "--resume-from-checkpoint", tmp_path / "cut")
    assert done.returncode == 0, done.stderr
    whole, cut = [[row for row in metrics(tmp_path / name) if "train_loss" not in row] for name in ("whole", "cut")]
    assert cut == whole and [row["update"] for row in cut if "loss" in row] == list(range(1, 41))
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("fields", [{"packing": True, "max_seq_length": 40}, {"lora_r": 4}, {"gradient_accumulation_steps": 2}],
                         ids=["packed", "LoRA", "accumulated"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(fields, tmp_path):
    data = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in REVIEWS[:40]])
    fields = {"dataset": data, "max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2, **fields}
    main(small(tmp_path / "whole", **fields))
    steps = metrics(tmp_path / "whole")[-1]["update"]
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for folder in (tmp_path / "cut").glob("checkpoint-*"):  # as though it had been killed after the first of them
        if folder.name != "checkpoint-3":
            shutil.rmtree(folder)
    main(small(tmp_path / "cut", **fields, resume_from_checkpoint=str(tmp_path / "cut")))
    whole, cut = [[row for row in metrics(tmp_path / name) if "train_loss" not in row] for name in ("whole", "cut")]
    assert steps > 4 and cut == whole


# ------------------------------------------------------------------------------------------------ two ranks
def test_two_ranks_give_what_one_process_gives(tmp_path):
    """24 rows in steps of 8: of one process, and of two ranks that take them 2 at a time, accumulated twice. 5 rows are
    held out: no even number of batches of 2, and rows of unequal length."""
    rows = sorted(PAIRS, key=lambda row: len(row["completion"]))[::len(PAIRS) // 24][:24]
    data, held_out = write_rows(tmp_path / "rows.jsonl", rows), write_rows(tmp_path / "held.jsonl", rows[3::5])
    flags = {"model-name": tiny(tmp_path / "llama", "llama", attention_dropout=0.0), "dataset": data, "eval-dataset": held_out,
             "num-train-epochs": 2, "max-grad-norm": 0.5, "learning-rate": 1e-3, "per-device-eval-batch-size": 2, "logging-steps": 1}
    config = small(tmp_path / "one", max_steps=-1, per_device_train_batch_size=8, **{k.replace("-", "_"): v for k, v in flags.items()})
    one_returned = main(config)
    done = script(*[word for k, v in flags.items() for word in (f"--{k}", v)], "--per-device-train-batch-size", 2,
                  "--gradient-accumulation-steps", 2, "--output-dir", tmp_path / "two", ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("after training") == 1  # the main rank speaks
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for name in ("loss", "grad_norm", "train_loss"):
        want, got = [[row[name] for row in rows if name in row] for rows in (one, two)]
        assert got == pytest.approx(want, rel=1e-4), name
    a, b = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=0, atol=1e-5, msg=lambda m: f"{name}: {m}")
    want, got = [[row["eval_loss"] for row in rows if "eval_loss" in row] for rows in (one, two)]
    assert len(want) == 2 and got == pytest.approx(want, rel=1e-5), "the held-out loss is over each row once"
    assert one_returned["eval_loss"] == want[-1]


# ------------------------------------------------------------------------------------------------ models
@pytest.mark.parametrize("arch", CAUSAL + SEQ2SEQ)
def test_any_architecture_trains_from_a_folder_and_is_saved_as_it_is(arch, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", PAIRS[:16])
    name = tiny(tmp_path / "model", arch)
    returned = main(small(tmp_path / "out", model_name=name, dataset=data, eval_dataset=data, max_steps=3))
    auto = AutoModelForSeq2SeqLM if arch in SEQ2SEQ else AutoModelForCausalLM
    before, after = [auto.from_pretrained(folder) for folder in (name, tmp_path / "out")]
    assert type(after) is type(before) and any((a != b).any() for a, b in zip(after.parameters(), before.parameters()))
    assert returned["eval_loss"] < math.log(400) + 1
    samples = lines(tmp_path / "out" / "samples.jsonl")
    assert [row["prompt"] for row in samples[:5]] == [row["prompt"] for row in PAIRS[:5]]


def test_equal_seeds_draw_equal_adapters_whatever_was_drawn_before(tmp_path):
    """G2: the seed is set before weights are made."""
    for run in ("a", "b"):
        torch.rand(len(run) + ord(run))  # another state of the generator
        main(small(tmp_path / run, lora_r=4))
    a, b = ((tmp_path / run / "adapter_model.safetensors").read_bytes() for run in ("a", "b"))
    assert a == b


def test_a_saved_adapter_goes_on_training(tmp_path, built):
    main(small(tmp_path / "first", lora_r=2, lora_alpha=6, learning_rate=1e-2))
    config = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 6)
    first = load_file(tmp_path / "first" / "adapter_model.safetensors")
    main(small(tmp_path / "same", model_name=str(tmp_path / "first"), learning_rate=0.0))
    main(small(tmp_path / "on", model_name=str(tmp_path / "first"), learning_rate=1e-2))
    same, on = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("same", "on")]
    assert all(torch.equal(same[name], first[name]) for name in first)
    assert all(not torch.equal(on[name], first[name]) for name in first)
    trained = {name for name, p in built[-1].model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)


# ------------------------------------------------------------------------------------------------ data
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "txt", "folder"])
def test_texts_come_from_every_kind_of_file(kind, tmp_path, built):
    rows, path = Dataset.from_list([{"text": text} for text in REVIEWS[:8]]), tmp_path / f"rows.{kind}"
    if kind == "txt":
        path.write_text("\n".join(REVIEWS[:8]) + "\n")
    else:
        {"jsonl": rows.to_json, "json": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet, "folder": rows.save_to_disk}[kind](str(path))
    returned = main(small(tmp_path / "out", dataset=str(path)))
    tokenizer = built[0].tokenizer
    assert [tokenizer.decode(row["input_ids"]) for row in built[0].train_dataset] == [text + tokenizer.eos_token for text in REVIEWS[:8]]
    assert built[0].eval_dataset is None and "train_loss" in returned  # the toy's test set belongs to the toy's data


def chats(n=8):
    return [{"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]} for row in PAIRS[:n]]


@pytest.mark.parametrize("only", [False, True])
def test_assistant_only_loss_learns_what_the_assistant_says(only, tmp_path, built):
    data = write_rows(tmp_path / "chats.jsonl", chats())
    main(small(tmp_path / "out", model_name=tiny(tmp_path / "model", "qwen3", TEMPLATE), dataset=data, assistant_only_loss=only))
    row, tokenizer = built[0].train_dataset[0], built[0].tokenizer
    learnt = tokenizer.decode([label for label in row.get("labels", row["input_ids"]) if label != IGNORE])
    prompt = "" if only else f"user: {PAIRS[0]['prompt']} assistant: "
    assert learnt == prompt + PAIRS[0]["completion"] + tokenizer.eos_token


def test_assistant_only_loss_and_packing_go_together(tmp_path, built):
    data = write_rows(tmp_path / "chats.jsonl", chats(16))
    main(small(tmp_path / "out", model_name=tiny(tmp_path / "model", "qwen3", TEMPLATE), dataset=data, assistant_only_loss=True,
               packing=True, max_seq_length=60))
    learnt = [label for row in built[0].train_dataset for label in row["labels"] if label != IGNORE]
    tokenizer = built[0].tokenizer
    assert sorted(learnt) == sorted(token for pair in PAIRS[:16] for token in
                                    tokenizer(pair["completion"]).input_ids + [tokenizer.eos_token_id])


def test_response_template_learns_what_follows_it(tmp_path, built):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": f"Q: {p['prompt']} A:{p['completion']}"} for p in PAIRS[:8]])
    main(small(tmp_path / "out", dataset=data, response_template=" A:"))
    row, tokenizer = built[0].train_dataset[3], built[0].tokenizer
    assert tokenizer.decode([label for label in row["labels"] if label != IGNORE]) == PAIRS[3]["completion"] + tokenizer.eos_token


def test_given_tokens_train(tmp_path, built):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [IGNORE, IGNORE, 7, 8]}] * 4
    main(small(tmp_path / "out", dataset=write_rows(tmp_path / "rows.jsonl", rows)))
    assert built[0].train_dataset[0]["labels"] == [IGNORE, IGNORE, 7, 8]
    assert lines(tmp_path / "out" / "samples.jsonl")[0]["prompt"] == built[0].tokenizer.decode([5, 6, 7])


# ------------------------------------------------------------------------------------------------ flags
def test_packing_fills_rows_and_keeps_every_token(tmp_path, built):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in REVIEWS[:30]])
    main(small(tmp_path / "out", dataset=data, packing=True, max_seq_length=50))
    packed, tokenizer = built[0].train_dataset, built[0].tokenizer
    assert {len(row["input_ids"]) for row in packed[:-1]["input_ids"] for row in [{"input_ids": row}]} == {50}
    assert sum(len(row["input_ids"]) for row in packed) == sum(len(tokenizer(text).input_ids) + 1 for text in REVIEWS[:30])
    assert set(packed.column_names) == {"input_ids", "labels", "position_ids"}


def test_max_seq_length_cuts(tmp_path, built):
    main(small(tmp_path / "out", max_seq_length=7))
    assert {len(ids) for ids in built[0].train_dataset["input_ids"]} == {7} and built[0].max_seq_length == 7


def test_dataset_text_field_names_the_column(tmp_path, built):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "wrong", "review": text} for text in REVIEWS[:4]])
    main(small(tmp_path / "out", dataset=data, dataset_text_field="review"))
    assert built[0].tokenizer.decode(built[0].train_dataset[0]["input_ids"]).startswith(REVIEWS[0])


def test_dataset_num_proc_is_how_many_tokenise(tmp_path, monkeypatch):
    asked, plain = [], Dataset.map
    monkeypatch.setattr(Dataset, "map", lambda self, function, *args, **kwargs: (
        asked.append((function, kwargs.pop("num_proc", None))) or plain(self, function, *args, **kwargs)))
    main(small(tmp_path / "out", dataset_num_proc=3))
    assert (sft.tokenize, 3) in asked


def test_eval_dataset_is_measured(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in REVIEWS[:8]])
    held = write_rows(tmp_path / "held.jsonl", [{"text": text} for text in REVIEWS[8:12]])
    assert "eval_loss" not in main(small(tmp_path / "a", dataset=data))
    toy, given = main(small(tmp_path / "b", dataset=None)), main(small(tmp_path / "c", dataset=None, eval_dataset=held))
    assert toy["eval_loss"] != given["eval_loss"] > 0


@pytest.mark.parametrize("fields", [{"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 20}, {"eval_strategy": "no"},
                                    {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
                                     "load_best_model_at_end": True, "learning_rate": 0.5}],
                         ids=["steps that stop short of the end", "none in between", "the best at the end"])
def test_the_metrics_returned_are_of_the_model_that_is_saved(fields, tmp_path, built):
    returned = main(small(tmp_path, max_steps=5, eval_dataset=FEW, **fields))
    assert returned["eval_loss"] == pytest.approx(built[0].evaluate()["eval_loss"], rel=1e-6)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], p) for name, p in built[0].model.named_parameters())
    assert f"| eval_loss | {returned['eval_loss']:.4g} |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("dtype, want", [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.float16)])
def test_torch_dtype_is_the_weights_type(dtype, want, tmp_path, built):
    name = tmp_path / "model"
    tiny(name, "llama")
    AutoModelForCausalLM.from_pretrained(name).half().save_pretrained(name)
    main(small(tmp_path / "out", model_name=str(name), torch_dtype=dtype, learning_rate=1e-5))
    assert built[0].model.dtype == want


def test_the_learning_rate_falls_with_the_root_of_the_size_unless_given(tmp_path):
    config = small(tmp_path / "toy")
    main(config)
    weights = AutoModelForCausalLM.from_pretrained(TOY / "blank").num_parameters()
    assert config.learning_rate == pytest.approx(4e-3 * (1e5 / weights) ** 0.5)
    first = next(row for row in metrics(tmp_path / "toy") if "learning_rate" in row)["learning_rate"]
    assert 0 < first <= config.learning_rate
    given = small(tmp_path / "given", learning_rate="2e-4")
    main(given)
    assert given.learning_rate == 2e-4


def test_lora_trains_the_adapter_alone_and_saves_it(tmp_path, built):
    main(small(tmp_path, lora_r=3, lora_alpha=12, gradient_checkpointing=True, learning_rate=1e-2))
    trained = {name for name, p in built[0].model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert {min(w.shape) for w in weights.values()} == {3} and all(w.abs().sum() > 0 for w in weights.values())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 12 and (tmp_path / "README.md").read_text().count("# ") >= 1
    assert not (tmp_path / "model.safetensors").exists()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)  # transformers finds the base model by itself
    assert any("lora_" in name for name, _ in opened.named_parameters())


def test_tensorboard_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    main(small(tmp_path, report_to="tensorboard"))
    assert list((tmp_path / "board").rglob("events.out.tfevents*"))


def test_trainer_s_own_flags_have_effect(tmp_path, built):
    main(small(tmp_path, bf16=True, use_cpu=True, neftune_noise_alpha=5.0, label_smoothing_factor=0.1, warmup_steps=1, seed=3,
               save_strategy="steps", save_steps=1, save_total_limit=1))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert metrics(tmp_path)[0]["learning_rate"] == 0 and (tmp_path / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------------ bad input
def broken_tokenizer(folder):
    tiny(folder, "gpt2")
    AutoTokenizer.from_pretrained(folder, pad_token=None, eos_token=None, bos_token=None).save_pretrained(folder)
    return str(folder)


BAD = {
    "unknown model folder": (dict(model_name="./nowhere"), r"model_name ./nowhere can't be loaded"),
    "unknown data file": (dict(dataset="nowhere.jsonl"), r"data file nowhere.jsonl does not exist here"),
    "unknown evaluation file": (dict(eval_dataset="nowhere.jsonl"), r"data file nowhere.jsonl does not exist here"),
    "missing column": (dict(rows=[{"words": "a"}]), r"columns \['words'\]"),
    "missing text field": (dict(rows=[{"text": "a"}], dataset_text_field="body"), r"none is called body \(dataset_text_field\)"),
    "an empty file": (dict(rows=[]), r"rows.jsonl"),
    "nothing to learn": (dict(rows=[{"input_ids": [5, 6], "labels": [IGNORE, IGNORE]}]), r"no row of the training data set has a token to learn"),
    "template not found": (dict(response_template="nowhere"), r"no row .*\(response_template 'nowhere'\)"),
    "length that leaves nothing": (dict(max_seq_length=1), r"max_seq_length=1: give 2 to 128"),
    "length over the model's": (dict(max_seq_length=500), r"max_seq_length=500: give 2 to 128"),
    "prompts that fill the length": (dict(rows=PAIRS[:4], max_seq_length=3), r"no row .* has a token to learn among its first 3"),
    "chat without template": (dict(rows=chats(2)), r"chat_template"),
    "nothing to resume": (dict(resume_from_checkpoint="nowhere"), r"no checkpoint-<n> there"),
    "two adapters": (dict(model="adapter", lora_r=2), r"has an adapter already"),
    "tokenizer without pad and end": (dict(model="no pad"), r"neither a pad token nor an end-of-sequence token"),
    "encoder-decoder with texts": (dict(model="t5"), r"an encoder-decoder learns from rows of prompt and completion"),
    "packing with a template": (dict(packing=True, response_template="the"), r"packing goes with rows of prompt and completion"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_before_any_weight_moves(case, tmp_path, monkeypatch):
    fields, sentence = dict(BAD[case][0]), BAD[case][1]
    if "rows" in fields:
        fields["dataset"] = write_rows(tmp_path / "rows.jsonl", fields.pop("rows"))
    if "model" in fields:
        kind = fields.pop("model")
        fields["model_name"] = broken_tokenizer(tmp_path / "m") if kind == "no pad" else str(tmp_path / "m")
        if kind == "adapter":
            main(small(tmp_path / "m", lora_r=2))
        elif kind == "t5":
            tiny(tmp_path / "m", "t5")
    moved = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: moved.append(1))
    with pytest.raises(InputError, match=sentence) as error:
        main(small(tmp_path / "out", **fields))
    assert not moved and "\n" not in str(error.value)


@pytest.mark.parametrize("file, how", [("model.safetensors", "cut"), ("optimizer.pt", "cut"), ("scheduler.pt", "cut"),
                                       ("trainer_state.json", "cut"), ("model.safetensors", "missing"), ("trainer_state.json", "missing")])
def test_a_corrupt_checkpoint_is_one_sentence(file, how, tmp_path):
    main(small(tmp_path, save_strategy="steps", save_steps=1))
    path = tmp_path / "checkpoint-2" / file
    path.write_bytes(path.read_bytes()[:100]) if how == "cut" else path.unlink()
    with pytest.raises(InputError, match="checkpoint-2") as error:
        main(small(tmp_path, max_steps=4, resume_from_checkpoint=str(tmp_path / "checkpoint-2")))
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path):
    """A kill while checkpoint-2 is written: its folder exists, what Trainer writes last does not."""
    main(small(tmp_path, save_strategy="steps", save_steps=1))
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    main(small(tmp_path, max_steps=4, resume_from_checkpoint=str(tmp_path)))
    assert metrics(tmp_path)[-1]["update"] == 4


def test_an_unwritable_output_folder_is_told_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="output_dir .*file/out can't be written"):
        main(small(tmp_path / "file" / "out", model_name="never looked at"))


def test_on_the_command_line_an_error_is_one_sentence(tmp_path, monkeypatch):
    told = entry_point(monkeypatch, "--dataset", write_rows(tmp_path / "rows.jsonl", [{"words": "a"}]), "--output-dir", tmp_path)
    assert told.startswith("sft.py: error: the data set has the columns ['words']") and "\n" not in told


def test_without_a_gpu_bf16_is_told_to_ask_for_the_cpu(monkeypatch, capsys):
    assert entry_point(monkeypatch, "--bf16") and "use_cpu" in "".join(capsys.readouterr())
