"""sft.py as a user runs it: what a run leaves behind, kill and resume, two ranks, real input, and
bad input. Run as a script, this file is the job of the two ranks."""
import functools
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import HOME, SEQ2SEQ, hf_model
from datasets import Dataset, load_dataset
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationMixin,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)

import sft
from common import TOY, InputError
from machinery import setup_ranks
from sft import ConstantLengthDataset, SFTConfig, SFTTrainer, main

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")
IGNORE = -100  # the label of a token that is not in the loss
ROOT = Path(__file__).resolve().parent.parent
LINES = (TOY / "reviews.jsonl").read_text().splitlines()[:200]
REVIEWS = [json.loads(line)["text"] for line in LINES]
PAIRS = [{"prompt": " ".join(text.split()[:3]), "completion": " " + " ".join(text.split()[3:])}
         for text in REVIEWS]
TEMPLATE = ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
            "{{ eos_token if m['role'] == 'assistant' else ' ' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def metrics(folder):
    """The lines of metrics.jsonl without their times."""
    return [{name: value for name, value in row.items()
             if "runtime" not in name and "per_second" not in name}
            for row in lines(Path(folder) / "metrics.jsonl")]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


FEW = write_rows(Path(HOME.name) / "few.jsonl", [{"text": text} for text in REVIEWS[:40]])


def small(folder, **fields):
    return SFTConfig(**{"output_dir": str(folder), "dataset": FEW, "max_steps": 2,
                        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 64,
                        "save_strategy": "no", "save_total_limit": None, "logging_steps": 1,
                        "gradient_checkpointing": False, **fields})


def tiny(folder, arch, template=None, **changes):
    """A random model of two layers and the toy's tokenizer, in a folder."""
    tokenizer = AutoTokenizer.from_pretrained(TOY / "blank")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    ends = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    hf_model(arch, **{**ends, "initializer_range": 0.02, **changes}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    """Samples of 4 tokens: forty tokens of ten rows take longer than most of the training here."""
    plain = GenerationMixin.generate
    monkeypatch.setattr(GenerationMixin, "generate", lambda self, *args, **kwargs: plain(
        self, *args, **{**kwargs, "max_new_tokens": min(kwargs["max_new_tokens"], 4)}))


@pytest.fixture
def built(monkeypatch):
    """The trainers that main() has trained."""
    made, plain = [], Trainer.train

    def train(self, *args, **kwargs):
        made.append(self)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", train)
    return made


def trained_on(trainer, row):
    """The text of a training row's tokens that are in the loss."""
    labels = trainer.data_collator([row])["labels"][0].tolist()
    return trainer.processing_class.decode([label for label in labels if label != IGNORE])


def decoded(trainer, row):
    return trainer.processing_class.decode(row["input_ids"])


# --------------------------------------------------------------------------------- default run
@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The default run, cut to 60 updates -> its folder, and what was printed."""
    for state in (AcceleratorState, GradientState, PartialState):  # what other tests left
        state._reset_state(*[True] * (state is AcceleratorState))
    out, screen, bar = tmp_path_factory.mktemp("run"), io.StringIO(), io.StringIO()
    with redirect_stdout(screen), redirect_stderr(bar):
        main(SFTConfig(output_dir=str(out), max_steps=60, per_device_train_batch_size=32,
                       per_device_eval_batch_size=64, gradient_checkpointing=False))
    return out, screen.getvalue(), bar.getvalue()


def test_the_default_run_learns_to_write_reviews(finished_run):
    rows = metrics(finished_run[0])
    assert [row["update"] for row in rows] == [20, 40, 60, 60, 60]
    first, *_, last = [row["loss"] for row in rows if "loss" in row]
    (held_out,) = [row["eval_loss"] for row in rows if "eval_loss" in row]
    # nats per token; uniform guessing costs log 400 = 5.99, the reviews' entropy is 0.92
    assert first > 2 and 0.9 < last < 1.1 and 0.9 < held_out < 1.1


def test_a_run_leaves_a_model_that_the_plain_classes_load(finished_run):
    out = finished_run[0]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    before = AutoModelForCausalLM.from_pretrained(TOY / "blank")
    pairs = zip(model.parameters(), before.parameters(), strict=True)
    assert any((a != b).any() for a, b in pairs) and model.dtype == torch.float32
    write = pipeline("text-generation", model=str(out), tokenizer=tokenizer)
    text = write("the plot was", max_new_tokens=4)[0]["generated_text"]
    assert text.startswith("the plot was ")


def test_the_model_ends_its_texts(finished_run, monkeypatch):
    """Most of them before twice the length of a review."""
    monkeypatch.undo()
    model = AutoModelForCausalLM.from_pretrained(finished_run[0])
    tokenizer = AutoTokenizer.from_pretrained(finished_run[0])
    torch.manual_seed(0)
    ids = tokenizer(["the plot was"] * 20, return_tensors="pt")
    ids = model.generate(**ids, do_sample=True, top_k=0, max_new_tokens=100,
                         pad_token_id=tokenizer.pad_token_id)
    assert (ids == tokenizer.eos_token_id).any(1).float().mean() > 0.7


def test_samples_are_kept_from_before_and_after(finished_run):
    out, screen, _ = finished_run
    rows = lines(out / "samples.jsonl")
    before, after = rows[:5], rows[5:]
    assert [row["update"] for row in rows] == [0] * 5 + [60] * 5
    assert [row["prompt"] for row in before] == [row["prompt"] for row in after]
    assert all(row["prompt"] and row["completion"] in screen for row in after)
    held_out = [json.loads(line)["text"] for line in
                (TOY / "reviews_test.jsonl").read_text().splitlines()[:5]]
    assert all(text.startswith(row["prompt"]) for text, row in zip(held_out, before, strict=True))
    # what follows is new text, without the prompt and without special tokens
    assert not any(row["completion"].startswith(row["prompt"]) for row in rows)
    assert not any("</s>" in row["completion"] or "<pad>" in row["completion"] for row in rows)


def test_the_screen_shows_the_loss_and_the_time_that_is_left(finished_run):
    _, screen, _ = finished_run  # of a process without a terminal: lines, no bar
    updates = [line for line in screen.splitlines() if line.startswith("update ")]
    assert updates[-1].startswith("update 60/60: loss ") and "eval_loss" in screen


def test_the_model_card_names_the_data_and_the_result(finished_run):
    card = (finished_run[0] / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n---\n")
    assert "toy/reviews.jsonl" in card
    (loss,) = [row["eval_loss"] for row in metrics(finished_run[0]) if "eval_loss" in row]
    assert f"| eval_loss | {loss:.4g} |" in card


# --------------------------------------------------------------------------------- kill and resume
KILLED_RUN = """
import os, runpy, signal, sys, torch

step, calls = torch.optim.AdamW.step, []

def step_or_die(self, *args, **kwargs):
    calls.append(1)
    if len(calls) == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)

torch.optim.AdamW.step = step_or_die
sys.argv = ["sft.py", *sys.argv[1:]]
sys.path.insert(0, os.getcwd())
runpy.run_path("sft.py", run_name="__main__")
"""


def test_a_killed_run_resumes_to_exactly_the_same_numbers(tmp_path, monkeypatch):
    """Killed in update 13, after checkpoint-10: the line of update 12 comes again."""
    monkeypatch.undo()  # samples as long as the script's own, since they draw from the same seed
    fields = {"max_steps": 16, "save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps",
              "eval_steps": 8, "per_device_train_batch_size": 8, "logging_steps": 4,
              "dataset": FEW, "eval_dataset": FEW}
    flags = [str(word) for name, value in fields.items()
             for word in (f"--{name.replace('_', '-')}", value)]
    main(small(tmp_path / "whole", **fields))
    (tmp_path / "killed.py").write_text(KILLED_RUN)
    done = subprocess.run([sys.executable, str(tmp_path / "killed.py"), *flags, "--output-dir",
                           str(tmp_path / "cut")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    # transformers says so if it finds two checkpoints of one second
    assert [line for line in done.stderr.splitlines() if "mtime" not in line] == []
    cut = [row["update"] for row in metrics(tmp_path / "cut") if "loss" in row]
    assert cut == [4, 5, 8, 10, 12]  # at checkpoints, too: a mean does not span one
    main(small(tmp_path / "cut", **fields, resume_from_checkpoint=str(tmp_path / "cut")))
    whole, cut = [metrics(tmp_path / name) for name in ("whole", "cut")]
    assert cut == whole and [r["update"] for r in cut if "loss" in r] == [4, 5, 8, 10, 12, 15, 16]
    a, b = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert a == b
    updates = [row["update"] for row in lines(tmp_path / "cut" / "samples.jsonl")]
    assert updates == [0] * 5 + [16] * 5


RESUMED = {"packed": {"packing": True, "max_seq_length": 40}, "LoRA": {"lora_r": 4},
           "accumulated": {"gradient_accumulation_steps": 2},
           "saved by epoch": {"save_strategy": "epoch", "logging_steps": 3, "eval_dataset": FEW,
                              "eval_strategy": "no", "eval_on_start": True},
           "saved if best": {"save_strategy": "best", "metric_for_best_model": "loss",
                             "eval_strategy": "steps", "eval_steps": 4, "eval_dataset": FEW,
                             "logging_steps": 3}}


@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(kind, tmp_path, monkeypatch):
    fields = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3,
              "learning_rate": 1e-2, **RESUMED[kind]}
    main(small(tmp_path / "whole", **fields))
    steps = metrics(tmp_path / "whole")[-1]["update"]
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    first, *later = sorted((tmp_path / "cut").glob("checkpoint-*"),
                           key=lambda folder: int(folder.name[11:]))
    for folder in later:  # as though killed after the first
        shutil.rmtree(folder)
    taken, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args, **kwargs: (
        taken.append(1) or step(self, *args, **kwargs)))
    main(small(tmp_path / "cut", **fields, resume_from_checkpoint=str(tmp_path / "cut")))
    assert later and len(taken) == steps - int(first.name[11:])  # it does not start again
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


# --------------------------------------------------------------------------------- two ranks
CASES = ("stream", "packed stream", "experts", "each rank's own mean")
UNEQUAL = [{"text": text} for text in (REVIEWS[0], "the", "in short, the", REVIEWS[1], "a b c d",
                                       REVIEWS[2], "the end", REVIEWS[3], REVIEWS[4], "x", "y z")]


def trainer_of(case, folder, accumulation):
    """Two steps of 4 rows: micro-batches of 2 on two ranks, or accumulated on one."""
    model = AutoModelForCausalLM.from_pretrained(
        folder / ("experts" if case == "experts" else "llama"))
    rows = Dataset.from_list(UNEQUAL)
    args = TrainingArguments(
        output_dir=str(folder / case), max_steps=2, per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=1.0,
        lr_scheduler_type="constant", max_grad_norm=2.0, logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential",
        average_tokens_across_devices=case != "each rank's own mean")
    packed = case == "packed stream"
    return SFTTrainer(
        model, args, train_dataset=rows.to_iterable_dataset() if "stream" in case else rows,
        tokenizer=AutoTokenizer.from_pretrained(TOY / "blank"), packing=packed,
        max_seq_length=6 if packed else None)


def evaluated_streams(folder):
    """The losses of 11 streamed rows, and of their packed rows."""
    trainer = trainer_of("stream", folder, 1)
    rows = Dataset.from_list(UNEQUAL)
    packed = ConstantLengthDataset(trainer.tokenizer, rows, seq_length=6, keep_tail=True)
    return [trainer.evaluate(held_out)["eval_loss"]
            for held_out in (rows.to_iterable_dataset(), packed)]


def logged(trainer):
    """Loss and norm of the gradient of each step."""
    trainer.train()
    if trainer.is_world_process_zero():  # as scripts for TRL 0.7 do: no rank waits for the others
        trainer.save_model(trainer.args.output_dir + "-saved")
        trainer.model.save_pretrained(trainer.args.output_dir + "-saved")
    return [[row["loss"], row["grad_norm"]] for row in trainer.state.log_history if "loss" in row]


def traced(batch, folder):
    """A formatting function that keeps on record how many rows each rank asks it for."""
    with open(f"{folder}/traced-{os.environ['RANK']}.txt", "a") as file:
        file.write(f"{len(batch['text'])}\n")
    if os.environ["RANK"] == "0" and len(batch["text"]) > 2:
        time.sleep(1)  # a rank that does not wait would tokenize meanwhile
    return list(batch["text"])


def job_of_two_ranks(folder):
    setup_ranks()
    datasets.config.HF_DATASETS_CACHE = folder / "cache"  # both ranks' own, as a user's is
    main(SFTConfig(**json.loads((folder / "two.json").read_text())))
    results = {case: logged(trainer_of(case, folder, 1)) for case in CASES}
    results["evaluation"] = evaluated_streams(folder)
    rows = load_dataset("json", data_files=str(folder / "texts.jsonl"), split="train")
    for packing in (False, True):
        (folder / str(packing)).mkdir(exist_ok=True)
        SFTTrainer(AutoModelForCausalLM.from_pretrained(folder / "llama"),
                   TrainingArguments(str(folder / "out"), use_cpu=True, report_to="none"),
                   train_dataset=rows, tokenizer=AutoTokenizer.from_pretrained(TOY / "blank"),
                   formatting_func=functools.partial(traced, folder=folder / str(packing)),
                   packing=packing, max_seq_length=8, num_of_sequences=1, chars_per_token=0.1)
    if os.environ["RANK"] == "0":
        (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """24 rows in steps of 8 by main: on one process, and on two ranks that take 2 at a time and
    accumulate twice; 5 rows of unequal length are held out, no even number of batches of 2."""
    folder = tmp_path_factory.mktemp("ranks")
    rows = sorted(PAIRS, key=lambda row: len(row["completion"]))[::len(PAIRS) // 24][:24]
    write_rows(folder / "texts.jsonl", [{"text": text} for text in REVIEWS[:30]])
    fields = {"model_name": tiny(folder / "llama", "llama", attention_dropout=0.0),
              "dataset": write_rows(folder / "rows.jsonl", rows),
              "eval_dataset": write_rows(folder / "held.jsonl", rows[3::5]), "logging_steps": 1,
              "num_train_epochs": 2, "max_grad_norm": 0.5, "learning_rate": 0.1, "optim": "sgd",
              "per_device_eval_batch_size": 2, "save_strategy": "no"}
    two = {"output_dir": str(folder / "two"), "per_device_train_batch_size": 2,
           "gradient_accumulation_steps": 2}
    (folder / "two.json").write_text(json.dumps({**fields, **two}))
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(
        vocab_size=400, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, initializer_range=0.2,
        output_router_logits=True, router_aux_loss_coef=0.5)).save_pretrained(folder / "experts")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         __file__, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    one = {**fields, "output_dir": str(folder / "one"), "per_device_train_batch_size": 8}
    return folder, done.stdout, one


def test_two_ranks_give_what_one_process_gives(two_ranks):
    folder, screen, one_process = two_ranks
    returned = main(SFTConfig(**one_process))
    assert screen.count("after training") == 1  # the main rank alone prints
    one, two = metrics(folder / "one"), metrics(folder / "two")
    for name in ("loss", "grad_norm", "train_loss", "eval_loss"):
        want, got = [[row[name] for row in rows if name in row] for rows in (one, two)]
        assert want and got == pytest.approx(want, rel=1e-4), name
    a, b = [load_file(folder / name / "model.safetensors") for name in ("one", "two")]
    before = load_file(folder / "llama" / "model.safetensors")
    for name in a:  # sums of float32 in another order: 1e-4 of how far a weight has moved
        far = (a[name] - before[name]).abs().max().item()
        torch.testing.assert_close(b[name], a[name], rtol=0, atol=1e-3 * far + 1e-7,
                                   msg=lambda m, name=name: f"{name}: {m}")
    evals = [row["eval_loss"] for row in one if "eval_loss" in row]
    assert len(evals) == 2 and returned["eval_loss"] == evals[-1]


@pytest.mark.parametrize("case", CASES[:3])
def test_two_ranks_give_what_accumulated_micro_batches_give(case, two_ranks):
    folder = two_ranks[0]
    got = torch.tensor(json.loads((folder / "results.json").read_text())[case])
    want = torch.tensor(logged(trainer_of(case, folder, 2)))
    assert want.shape == (2, 2)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)


def test_two_ranks_count_each_row_of_an_evaluation_stream_once(two_ranks):
    got = json.loads((two_ranks[0] / "results.json").read_text())["evaluation"]
    assert got == pytest.approx(evaluated_streams(two_ranks[0]), rel=1e-5)


def test_each_rank_may_take_the_mean_over_its_own_tokens(two_ranks):
    folder = two_ranks[0]
    case = "each rank's own mean"
    trainer = trainer_of(case, folder, 1)
    rows = list(trainer.train_dataset)
    means = [trainer.compute_loss(trainer.model, trainer.data_collator(rows[i:i + 2])).item()
             for i in (0, 2)]
    got = json.loads((folder / "results.json").read_text())[case]
    assert got[0][0] == pytest.approx(sum(means) / 2, rel=1e-4)
    assert means[0] != pytest.approx(means[1], rel=1e-3)


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_the_main_rank_tokenizes_and_the_others_find_its_work(packing, two_ranks):
    asked = [sum(lines(two_ranks[0] / str(packing) / f"traced-{rank}.txt")) for rank in (0, 1)]
    assert asked[0] >= 30 and asked[1] < 10  # the others look at the first rows


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_an_edited_encoding_takes_effect_though_the_same_rows_were_encoded_before(
        packing, tmp_path, monkeypatch):
    """As in a fork: the file of the rows and the library's cache stay."""
    rows = load_dataset("json", data_files=FEW, split="train")
    model = AutoModelForCausalLM.from_pretrained(TOY / "blank")

    def first_ids():
        trainer = SFTTrainer(
            model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
            train_dataset=rows, tokenizer=AutoTokenizer.from_pretrained(TOY / "blank"),
            packing=packing, max_seq_length=8)
        return torch.as_tensor(trainer.train_dataset[0]["input_ids"]).tolist()

    before = first_ids()
    assert first_ids() == before
    plain = sft.encode_text
    monkeypatch.setattr(sft, "encode_text", lambda *args: (plain(*args)[0][::-1], None))
    assert first_ids()[0] == AutoTokenizer.from_pretrained(TOY / "blank").eos_token_id != before[0]


# --------------------------------------------------------------------------------- models
@pytest.mark.parametrize("arch", ["gpt2", "qwen3", *SEQ2SEQ])
def test_a_model_of_a_folder_trains_and_is_saved_as_it_is(arch, tmp_path):
    words = [text.split() for text in REVIEWS[:16]]
    rows = [{"prompt": " ".join(w[:8]), "completion": " " + " ".join(w[8:])} for w in words]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    name = tiny(tmp_path / "model", arch)
    out = tmp_path / "out"
    returned = main(small(out, model_name=name, dataset=data, eval_dataset=data, max_steps=3))
    auto = AutoModelForSeq2SeqLM if arch in SEQ2SEQ else AutoModelForCausalLM
    before, after = [auto.from_pretrained(folder) for folder in (name, out)]
    assert type(after) is type(before)
    assert any((a != b).any() for a, b in zip(after.parameters(), before.parameters(), strict=True))
    assert returned["eval_loss"] < math.log(400) + 1
    samples = lines(out / "samples.jsonl")
    assert [row["prompt"] for row in samples] == [row["prompt"] for row in rows[:5]] * 2
    assert any(row["completion"] for row in samples)


def test_a_saved_adapter_continues_to_train(tmp_path, built):
    main(small(tmp_path / "first", lora_r=2, lora_alpha=6, learning_rate=1e-2))
    config = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 6)
    first = load_file(tmp_path / "first" / "adapter_model.safetensors")
    for name, rate in (("same", 0.0), ("next", 1e-2)):
        main(small(tmp_path / name, model_name=str(tmp_path / "first"), learning_rate=rate))
    same, later = [load_file(tmp_path / name / "adapter_model.safetensors")
                   for name in ("same", "next")]
    assert all(torch.equal(same[name], first[name]) for name in first)
    assert all(not torch.equal(later[name], first[name]) for name in first)
    trained = {name for name, p in built[-1].model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)


# --------------------------------------------------------------------------------- data
@pytest.mark.parametrize("kind", ["txt", "folder"])
def test_texts_come_from_a_file_or_a_folder(kind, tmp_path, built):
    path = tmp_path / f"rows.{kind}"
    if kind == "txt":
        path.write_text("\n".join(REVIEWS[:8]) + "\n")
    else:
        Dataset.from_list([{"text": text} for text in REVIEWS[:8]]).save_to_disk(str(path))
    returned = main(small(tmp_path / "out", dataset=str(path)))
    texts = [decoded(built[0], row) for row in built[0].train_dataset]
    assert texts == [text + built[0].processing_class.eos_token for text in REVIEWS[:8]]
    # the toy's test set belongs to the toy's data
    assert built[0].eval_dataset is None
    assert "train_loss" in returned and "eval_loss" not in returned


def chats(n=8):
    return [{"messages": [{"role": "user", "content": row["prompt"]},
                          {"role": "assistant", "content": row["completion"]}]}
            for row in PAIRS[:n]]


@pytest.mark.parametrize("only", [False, True])
def test_assistant_only_loss_trains_on_what_the_assistant_says(only, tmp_path, built):
    data = write_rows(tmp_path / "chats.jsonl", chats())
    main(small(tmp_path / "out", model_name=tiny(tmp_path / "model", "qwen3", TEMPLATE),
               dataset=data, assistant_only_loss=only))
    text = trained_on(built[0], built[0].train_dataset[0])
    answer = PAIRS[0]["completion"] + built[0].processing_class.eos_token
    assert text == ("" if only else f"user: {PAIRS[0]['prompt']} assistant: ") + answer


def test_assistant_only_loss_and_packing_combine(tmp_path, built):
    data = write_rows(tmp_path / "chats.jsonl", chats(16))
    main(small(tmp_path / "out", model_name=tiny(tmp_path / "model", "qwen3", TEMPLATE),
               dataset=data, assistant_only_loss=True, packing=True, max_seq_length=60))
    tokenizer = built[0].processing_class
    labels = [label for row in built[0].train_dataset for label in row["labels"]]
    want = [token for pair in PAIRS[:16]
            for token in tokenizer(pair["completion"]).input_ids + [tokenizer.eos_token_id]]
    assert sorted(label for label in labels if label != IGNORE) == sorted(want)


def test_response_template_trains_on_what_follows_it(tmp_path, built):
    rows = [{"text": f"Q: {p['prompt']} A:{p['completion']}"} for p in PAIRS[:8]]
    main(small(tmp_path / "out", dataset=write_rows(tmp_path / "rows.jsonl", rows),
               response_template=" A:"))
    answer = PAIRS[3]["completion"] + built[0].processing_class.eos_token
    assert trained_on(built[0], built[0].train_dataset[3]) == answer


def test_given_tokens_train_and_samples_continue_their_prompt(tmp_path, built):
    rows = [{"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORE, IGNORE, IGNORE, IGNORE, 9]}] * 4
    main(small(tmp_path / "out", dataset=write_rows(tmp_path / "rows.jsonl", rows)))
    assert trained_on(built[0], built[0].train_dataset[0]) == built[0].processing_class.decode([9])
    prompt = lines(tmp_path / "out" / "samples.jsonl")[0]["prompt"]
    assert prompt == built[0].processing_class.decode([5, 6, 7, 8])


@pytest.mark.parametrize("fields", [{}, {"assistant_only_loss": True}, {"packing": True}],
                         ids=lambda fields: "-".join(fields) or "all turns")
def test_samples_of_chats_answer_the_last_question(fields, tmp_path, monkeypatch):
    asked, plain = [], GenerationMixin.generate
    monkeypatch.setattr(GenerationMixin, "generate", lambda self, input_ids, **kwargs: (
        asked.append(input_ids[0].tolist()) or plain(self, input_ids, **kwargs)))
    first = [{"role": "system", "content": "be kind."}, {"role": "user", "content": "the start?"},
             {"role": "assistant", "content": " the end."}]
    rows = [{"messages": first + row["messages"]} for row in chats(2)]
    model = tiny(tmp_path / "model", "qwen3", TEMPLATE, max_position_embeddings=256)
    main(small(tmp_path / "out", model_name=model, max_steps=1, **fields,
               dataset=write_rows(tmp_path / "chats.jsonl", rows)))
    samples = lines(tmp_path / "out" / "samples.jsonl")
    assert [row["prompt"] for row in samples] == [pair["prompt"] for pair in PAIRS[:2]] * 2
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.decode(asked[0]) == (
        f"system: be kind. user: the start? assistant:  the end.{tokenizer.eos_token}"
        f"user: {PAIRS[0]['prompt']} assistant: ")


def test_packed_rows_may_begin_with_a_prompt_that_fills_them(tmp_path):
    """Without an evaluation set the samples are of training rows."""
    rows = [{"prompt": " ".join(["the"] * 40), "completion": " end"}] * 8
    main(small(tmp_path / "out", dataset=write_rows(tmp_path / "rows.jsonl", rows), packing=True,
               max_seq_length=8))
    assert lines(tmp_path / "out" / "samples.jsonl")[0]["prompt"] == rows[0]["prompt"]


def test_the_sample_of_a_row_as_long_as_the_model_takes_fits_its_positions(tmp_path, monkeypatch):
    monkeypatch.undo()  # samples as long as the script's own
    plain, training = GenerationMixin.generate, []
    monkeypatch.setattr(GenerationMixin, "generate", lambda self, *args, **kwargs: (
        training.append(self.training) or plain(self, *args, **kwargs)))
    model = AutoModelForCausalLM.from_pretrained(TOY / "blank")
    n = model.config.max_position_embeddings
    rows = [{"input_ids": [5 + i % 200 for i in range(n)], "labels": [IGNORE] * (n - 1) + [7]}]
    main(small(tmp_path / "out", dataset=write_rows(tmp_path / "rows.jsonl", rows), max_steps=1))
    samples = lines(tmp_path / "out" / "samples.jsonl")
    assert len(samples) == 2 and all(row["prompt"] and row["completion"] for row in samples)
    assert training == [False, False]  # no dropout while the model writes


# --------------------------------------------------------------------------------- flags
def test_packing_fills_rows_and_keeps_every_token(tmp_path, built):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in REVIEWS[:30]])
    main(small(tmp_path / "out", dataset=data, packing=True, max_seq_length=50))
    lengths = [len(row["input_ids"]) for row in built[0].train_dataset]
    tokenizer = built[0].processing_class
    assert set(lengths[:-1]) == {50}
    assert sum(lengths) == sum(len(tokenizer(text).input_ids) + 1 for text in REVIEWS[:30])


def test_max_seq_length_and_dataset_text_field_are_the_trainer_s(tmp_path, built):
    data = write_rows(tmp_path / "rows.jsonl",
                      [{"text": "wrong", "review": text} for text in REVIEWS[:4]])
    main(small(tmp_path / "out", dataset=data, dataset_text_field="review", max_seq_length=7))
    assert {len(ids) for ids in built[0].train_dataset["input_ids"]} == {7}
    assert REVIEWS[0].startswith(decoded(built[0], built[0].train_dataset[0]))


def test_dataset_num_proc_is_how_many_processes_tokenize(tmp_path, monkeypatch):
    asked, plain = [], Dataset.map
    monkeypatch.setattr(Dataset, "map", lambda self, *args, **kwargs: (
        asked.append(kwargs.pop("num_proc", None)) or plain(self, *args, **kwargs)))
    main(small(tmp_path / "out", dataset_num_proc=3))
    assert 3 in asked


def test_a_given_eval_dataset_replaces_the_toy_s(tmp_path, built):
    held = write_rows(tmp_path / "held.jsonl", [{"text": text} for text in REVIEWS[8:12]])
    returned = main(small(tmp_path / "out", dataset=None, eval_dataset=held, max_steps=1))
    assert len(built[0].eval_dataset) == 4 and len(built[0].train_dataset) == 6000
    assert returned["eval_loss"] == pytest.approx(built[0].evaluate()["eval_loss"], rel=1e-6)


EVALUATIONS = {
    "steps that stop short of the end": {
        "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 20},
    "none in between": {"eval_strategy": "no"},
    "the best at the end": {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "load_best_model_at_end": True, "learning_rate": 0.5}}


@pytest.mark.parametrize("kind", EVALUATIONS)
def test_the_metrics_returned_are_of_the_model_that_is_saved(kind, tmp_path, built):
    returned = main(small(tmp_path, max_steps=5, eval_dataset=FEW, **EVALUATIONS[kind]))
    assert returned["eval_loss"] == pytest.approx(built[0].evaluate()["eval_loss"], rel=1e-6)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], p) for name, p in built[0].model.named_parameters())
    assert f"| eval_loss | {returned['eval_loss']:.4g} |" in (tmp_path / "README.md").read_text()


def test_an_evaluation_has_all_rows_though_training_drops_the_last_ones(tmp_path):
    seen = [main(small(tmp_path / str(drop), eval_dataset=FEW, eval_strategy="no",
                       dataloader_drop_last=drop))["eval_loss"] for drop in (False, True)]
    assert seen[0] == seen[1] > 0  # all 40 rows are less than a batch of 64


def test_an_evaluation_in_bfloat16_leaves_what_is_saved_as_it_was_trained(tmp_path):
    """Trainer converts the model itself."""
    main(small(tmp_path, eval_dataset=FEW, eval_strategy="no", bf16_full_eval=True))
    saved = load_file(tmp_path / "model.safetensors")
    assert {weights.dtype for weights in saved.values()} == {torch.float32}


@pytest.mark.parametrize("dtype, want", [("float32", torch.float32), ("bfloat16", torch.bfloat16),
                                         ("auto", torch.float16)])
def test_torch_dtype_is_the_type_of_the_weights(dtype, want, tmp_path, built):
    name = tmp_path / "model"
    tiny(name, "llama")
    AutoModelForCausalLM.from_pretrained(name).half().save_pretrained(name)
    main(small(tmp_path / "out", model_name=str(name), torch_dtype=dtype, learning_rate=1e-5,
               max_steps=1))
    assert built[0].model.dtype == want


def test_an_adapter_has_ten_times_the_learning_rate_which_is_printed(tmp_path, capsys):
    main(small(tmp_path / "out", lora_r=2))
    trained = load_file(tmp_path / "out" / "adapter_model.safetensors")
    weights = AutoModelForCausalLM.from_pretrained(TOY / "blank").num_parameters() + sum(
        weight.numel() for weight in trained.values())
    rate = 10 * 4e-3 * math.sqrt(1e5 / weights)
    assert lines(tmp_path / "out" / "metrics.jsonl")[0]["learning_rate"] == pytest.approx(rate)
    assert f"learning rate {rate:.2g}, by the model's size; --learning-rate " in (
        capsys.readouterr().out)


def test_the_learning_rate_falls_with_the_root_of_the_size_unless_given(tmp_path):
    weights = AutoModelForCausalLM.from_pretrained(TOY / "blank").num_parameters()
    for given, want in ((None, 4e-3 * (1e5 / weights) ** 0.5), ("2e-4", 2e-4)):
        main(small(tmp_path / str(given), learning_rate=given, lr_scheduler_type="constant",
                   max_steps=1))
        assert metrics(tmp_path / str(given))[0]["learning_rate"] == pytest.approx(want)


def test_lora_trains_the_adapter_alone_and_saves_it(tmp_path, built):
    out = tmp_path / "out"
    main(small(out, lora_r=3, lora_alpha=12, gradient_checkpointing=True, learning_rate=1e-2))
    trained = {name for name, p in built[0].model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    weights = load_file(out / "adapter_model.safetensors")
    assert {min(w.shape) for w in weights.values()} == {3}
    assert all(w.abs().sum() > 0 for w in weights.values())
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 12 and (out / "README.md").exists()
    assert not (out / "model.safetensors").exists()
    opened = AutoModelForCausalLM.from_pretrained(out)  # transformers finds the base model itself
    assert any("lora_" in name for name, _ in opened.named_parameters())


def test_tensorboard_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    main(small(tmp_path / "out", report_to="tensorboard", max_steps=1))
    assert list((tmp_path / "board").rglob("events.out.tfevents*"))


def test_the_flags_of_trainer_have_effect(tmp_path):
    main(small(tmp_path, bf16=True, use_cpu=True, neftune_noise_alpha=5.0, seed=3, warmup_steps=1,
               label_smoothing_factor=0.1, save_strategy="steps", save_steps=1, save_total_limit=1))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert metrics(tmp_path)[0]["learning_rate"] == 0 and (tmp_path / "model.safetensors").exists()


# --------------------------------------------------------------------------------- bad input
def without_ends(folder):
    tiny(folder, "gpt2")
    without = {"pad_token": None, "eos_token": None, "bos_token": None}
    tokenizer = AutoTokenizer.from_pretrained(folder, **without)
    tokenizer.save_pretrained(folder)


BAD = {  # the fields, and what the message names
    "unknown model folder": (dict(model_name="./nowhere"), ["model_name", "./nowhere"]),
    "unknown data file": (dict(dataset="nowhere.jsonl"), ["nowhere.jsonl"]),
    "unknown evaluation file": (dict(eval_dataset="nowhere.jsonl"), ["nowhere.jsonl"]),
    "an empty file": (dict(rows=[]), ["rows.jsonl"]),
    "no such column": (dict(rows=[{"words": "a"}]), ["words"]),
    "template not found": (dict(response_template="nowhere"), ["response_template", "'nowhere'"]),
    "length over the model's": (dict(max_seq_length=500), ["max_seq_length=500", "128"]),
    "chat without template": (dict(rows=chats(2)), ["chat_template"]),
    "nothing to resume": (dict(resume_from_checkpoint="nowhere"), ["nowhere"]),
    "tokenizer without pad and end": (dict(model="m"), ["pad_token"]),
    "packing with a template": (dict(packing=True, response_template="the"), ["packing"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_before_any_weight_moves(case, tmp_path, monkeypatch):
    fields, words = dict(BAD[case][0]), BAD[case][1]
    if "rows" in fields:
        fields["dataset"] = write_rows(tmp_path / "rows.jsonl", fields.pop("rows"))
    if "model" in fields:
        fields["model_name"] = str(tmp_path / "m")
        without_ends(tmp_path / fields.pop("model"))
    moved = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: moved.append(1))
    with pytest.raises(InputError) as error:
        main(small(tmp_path / "out", **fields))
    assert not moved and "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """A run of two updates with a checkpoint of each."""
    for state in (AcceleratorState, GradientState, PartialState):  # what other tests left
        state._reset_state(*[True] * (state is AcceleratorState))
    out = tmp_path_factory.mktemp("saved")
    main(small(out, save_strategy="steps", save_steps=1))
    return out


@pytest.mark.parametrize("file, how", [
    ("model.safetensors", "cut"), ("optimizer.pt", "cut"), ("scheduler.pt", "cut"),
    ("trainer_state.json", "cut"), ("model.safetensors", "missing"),
    ("trainer_state.json", "missing")])
def test_a_damaged_checkpoint_is_one_sentence(file, how, saved_run, tmp_path):
    out = shutil.copytree(saved_run, tmp_path / "out")
    path = out / "checkpoint-2" / file
    path.write_bytes(path.read_bytes()[:100]) if how == "cut" else path.unlink()
    with pytest.raises(InputError, match="checkpoint-2") as error:
        main(small(out, max_steps=4, resume_from_checkpoint=str(out / "checkpoint-2")))
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(saved_run, tmp_path):
    """A kill while checkpoint-2 is written leaves its folder without Trainer's last file."""
    out = shutil.copytree(saved_run, tmp_path / "out")
    (out / "checkpoint-2" / "trainer_state.json").unlink()
    main(small(out, max_steps=4, resume_from_checkpoint=str(out)))
    assert [row["update"] for row in metrics(out) if "loss" in row] == [1, 2, 3, 4]


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_without_a_part_of_the_state_is_one_sentence(file, saved_run, tmp_path):
    shutil.copytree(saved_run, tmp_path / "out")
    (tmp_path / "out" / "checkpoint-2" / file).unlink()
    with pytest.raises(InputError, match="checkpoint-2 is damaged; .* no (optimizer|schedule) "):
        main(small(tmp_path / "out", resume_from_checkpoint=str(tmp_path / "out/checkpoint-2")))


def test_a_finished_run_that_is_resumed_changes_nothing_unless_it_is_to_go_on(tmp_path):
    """It ends within an epoch, where Trainer would take one more update."""
    fields = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "eval_dataset": FEW,
              "lr_scheduler_type": "constant"}
    main(small(tmp_path, **fields))
    files = ("model.safetensors", "samples.jsonl", "README.md")
    before, rows = {file: (tmp_path / file).read_bytes() for file in files}, metrics(tmp_path)
    again = {**fields, "resume_from_checkpoint": str(tmp_path)}
    for size in (4, 2):  # another batch would make other epochs of the same updates
        main(small(tmp_path, **again, per_device_train_batch_size=size))
        assert {file: (tmp_path / file).read_bytes() for file in files} == before
    assert metrics(tmp_path) == rows and [row["update"] for row in rows] == [1, 2, 3, 3, 3]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"update": 9, "prompt": "half a li')  # what a kill may leave
    main(small(tmp_path, **{**again, "max_steps": 4}))
    assert [row["update"] for row in lines(tmp_path / "samples.jsonl")] == [0] * 5 + [4] * 5


@pytest.mark.parametrize("change, sentence", [
    ({"lora_r": 4}, "^lora_r=4: the checkpoint goes on with 0"),
    ({"learning_rate": 1e-7}, "^learning_rate=1e-07: the checkpoint goes on with 0.0"),
    # epochs would be of other updates than so far
    ({"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 2},
     "gradient_accumulation_steps = 2: an update took 4 rows"),
])
def test_what_a_resume_cannot_change_is_refused(change, sentence, saved_run):
    with pytest.raises(InputError, match=sentence):
        main(small(saved_run, **{"max_steps": 9, "resume_from_checkpoint": str(saved_run),
                                 **change}))


def test_a_resume_with_other_batches_or_data_says_so(saved_run, tmp_path):
    shutil.copytree(saved_run, tmp_path / "out")
    with pytest.warns(UserWarning) as found:
        main(small(tmp_path / "out", max_steps=3, per_device_train_batch_size=2,
                   dataset=write_rows(tmp_path / "rows.jsonl", [{"text": "the plot"}] * 9),
                   resume_from_checkpoint=str(tmp_path / "out")))
    said = "\n".join(str(warning.message) for warning in found)
    assert "per_device_train_batch_size=2: it was 4 up to the checkpoint" in said
    assert "/rows.jsonl: it was " in said
    assert "rows=9: it was " in said and "checksum_of_rows=" in said


def test_a_fresh_run_refuses_a_folder_with_checkpoints(saved_run):
    with pytest.raises(InputError, match="output_dir.*checkpoint-2"):
        main(small(saved_run))


def test_an_output_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="output_dir .*file/out"):
        main(small(tmp_path / "file" / "out", model_name="never looked at"))


if __name__ == "__main__":
    job_of_two_ranks(Path(sys.argv[1]))
    os._exit(0)  # torch may abort as it frees the groups of several runs: end here
