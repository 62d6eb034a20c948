"""reward.py against TRL 0.7.10's recorded numbers, as a user runs it, and on two ranks."""
import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BOS, EOS, PAD, VOCAB
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    pipeline,
)

from chats import load_reward
from common import TOY, InputError
from reward import (
    RewardConfig,
    RewardDataCollatorWithPadding,
    RewardTrainer,
    ScriptConfig,
    compute_accuracy,
    main,
)

ROOT = Path(__file__).resolve().parent.parent
RECORDED = json.loads(Path(__file__).with_name("recorded_reward.json").read_text())
SIDES = ("chosen", "rejected")


def cases(part):
    return pytest.mark.parametrize("case", RECORDED[part], ids=lambda case: case["name"])


# ---------------------------------------------------------------------- TRL 0.7.10's numbers
def recorded_model():
    """GPT-2 with weights from a generator whose stream is frozen, in the order of their names."""
    model = GPT2ForSequenceClassification(GPT2Config(
        vocab_size=VOCAB, n_positions=48, n_embd=32, n_layer=2, n_head=2, num_labels=1,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0))
    draw = np.random.RandomState(0)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            p.copy_(torch.tensor(0.15 * draw.standard_normal(tuple(p.shape)), dtype=torch.float32))
            if "weight" in name and "ln_" in name:
                p.add_(1)
    return model


def with_masks(rows):
    def masks(row):
        return {f"attention_mask_{side}": [1] * len(row[f"input_ids_{side}"])
                             for side in SIDES}
    return [{**row, **masks(row)} for row in rows]


class LossPerMicroBatch(RewardTrainer):
    micro_losses = ()

    def compute_loss(self, *args, **kwargs):
        out = super().compute_loss(*args, **kwargs)
        if torch.is_grad_enabled():
            loss = out[0] if isinstance(out, tuple) else out
            self.micro_losses = [*self.micro_losses, loss.item()]
        return out


@pytest.fixture
def recorded_trainer(tokenizer, tmp_path):
    def make(rows, **args):
        config = RewardConfig(**{
            "output_dir": str(tmp_path), "per_device_train_batch_size": 2, "max_steps": 4,
            "per_device_eval_batch_size": 2, "learning_rate": 1e-3, "optim": "adamw_torch",
            "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": 0,
            "train_sampling_strategy": "sequential", "gradient_checkpointing": False,
            "max_length": 48, "remove_unused_columns": False, **args})
        rows = Dataset.from_list(with_masks(rows))
        return LossPerMicroBatch(recorded_model(), config, train_dataset=rows, eval_dataset=rows,
                                 tokenizer=tokenizer)

    return make


def test_the_recorded_defaults(tmp_path):
    config = RewardConfig(output_dir=str(tmp_path))
    got = {name: getattr(config, name) for name in RECORDED["defaults"]}
    assert got == RECORDED["defaults"]


@cases("loss")
def test_recorded_losses_and_rewards(case, recorded_trainer):
    trainer = recorded_trainer(case["rows"])
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss, out = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    for name in ("rewards_chosen", "rewards_rejected"):
        assert out[name].tolist() == pytest.approx(case[name], rel=1e-4, abs=1e-5)


@cases("collator")
def test_recorded_batches(case, tokenizer):
    collator = RewardDataCollatorWithPadding(tokenizer, **case["kwargs"])
    batch = collator(with_masks(case["rows"]))
    for name, want in case["batch"].items():
        got = batch[name].tolist() if isinstance(batch[name], torch.Tensor) else batch[name]
        assert got == pytest.approx(want) if name == "margin" else got == want


def test_recorded_accuracy():
    case = RECORDED["accuracy"]
    got = compute_accuracy((np.array(case["predictions"]), np.zeros(9)))
    assert got["accuracy"] == pytest.approx(case["accuracy"])


@cases("train")
def test_recorded_training(case, recorded_trainer, weights):
    trainer = recorded_trainer(case["rows"], **case["args"])
    before = weights(trainer.model)
    trainer.train()
    assert trainer.micro_losses == pytest.approx(case["losses"], rel=1e-4, abs=1e-5)
    for name, p in trainer.model.named_parameters():
        change = (p.detach().double() - before[name].double()).flatten()
        norm, product = case["weights"][name]
        # Two gradients are zero but for rounding, of which Adam makes whole steps: that of the
        # keys' bias, and that of the last bias, which moves both scores of a pair alike.
        if name.endswith("c_attn.bias"):
            change[len(change) // 3:2 * len(change) // 3] = 0
        if name.endswith("ln_f.bias"):
            assert norm == 0
            continue
        probe = torch.cos(torch.arange(len(change), dtype=torch.float64) * 0.7 + 0.3)
        got = [change.norm().item(), (change @ probe).item()]
        assert got == pytest.approx([norm, product], abs=6e-3 * norm + 1e-7), name


def test_recorded_evaluation(recorded_trainer):
    case = RECORDED["evaluate"]
    trainer = recorded_trainer(case["rows"])
    metrics = trainer.evaluate()
    for name in ("eval_loss", "eval_accuracy"):
        assert metrics[name] == pytest.approx(case[name], rel=1e-5)
    batch, step = trainer.data_collator(list(trainer.eval_dataset)[:3]), case["step"]
    loss, logits, labels = trainer.prediction_step(trainer.model, batch, False)
    assert loss.item() == pytest.approx(step["loss"], rel=1e-5)
    assert labels.tolist() == step["labels"]
    torch.testing.assert_close(logits, torch.tensor(step["logits"]), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- the script
def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def toy_pairs(path, n=24, **more):
    return write_rows(path, [{**row, **more} for row in lines(TOY / "pairs.jsonl")[:n]])


def small(folder, **fields):
    return ScriptConfig(**{
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4,
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "eval_strategy": "no",
        "gradient_checkpointing": False, **fields})


def numbers(row):
    """A line of metrics.jsonl without what depends on the clock."""
    return {name: value for name, value in row.items()
            if not name.endswith(("runtime", "per_second"))}


@torch.no_grad()
def scores_of(rows, folder):
    """The scores that the classifier in a folder gives to the texts of samples, one at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return [model(tokenizer(row["text"], return_tensors="pt").input_ids).logits.item()
            for row in rows]


def sampled(rows):
    return [row["score"] for row in rows]


TOY_RUN = {"max_steps": 40, "weight_decay": 1.0, "per_device_train_batch_size": 64,
           "per_device_eval_batch_size": 64, "gradient_checkpointing": False,
           "save_total_limit": None, "disable_tqdm": True}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The default run cut to 40 steps -> its folder, what it printed, what it returned."""
    out, printed = tmp_path_factory.mktemp("run"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        metrics = main(ScriptConfig(**TOY_RUN, output_dir=str(out), save_steps=20))
    return out, printed.getvalue(), metrics


def test_a_short_default_run_already_learns_and_logs_it(finished_run):
    out, _, metrics = finished_run
    rows = lines(out / "metrics.jsonl")
    evaluations = [row for row in rows if "eval_loss" in row]
    training = [row for row in rows if "loss" in row]
    assert [row["update"] for row in training] == [10, 20, 30, 40]
    assert training[-1]["rewards/margins"] > training[0]["rewards/margins"]
    assert training[-1]["loss"] < training[0]["loss"]
    last = numbers(evaluations[-1])
    assert last["eval_accuracy"] > 0.7 and last["eval_loss"] < 0.65
    assert last["update"] == 40
    assert {name: metrics[name] for name in last if name != "update"} == {
        name: value for name, value in last.items() if name != "update"}


def test_samples_show_the_scores_of_the_first_four_held_out_pairs_before_and_after(finished_run):
    out, printed, _ = finished_run
    rows = lines(out / "samples.jsonl")
    assert [row["update"] for row in rows] == [0] * 8 + [40] * 8
    assert [row["pair"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3] * 2
    texts = [(side, pair["prompt"] + pair[side])
             for pair in lines(TOY / "pairs_test.jsonl")[:4] for side in SIDES]
    for row, (side, text) in zip(rows, texts * 2, strict=True):
        assert (row["side"], row["text"]) == (side, text)
        assert f"{row['score']:+6.2f}  {side} |{text}\n" in printed
    # float32, in batches of other widths
    assert sampled(rows[:8]) == pytest.approx(scores_of(rows[:8], TOY / "blank_reward"), abs=1e-4)
    assert sampled(rows[8:]) == pytest.approx(scores_of(rows[8:], out), abs=1e-4)
    scores = load_reward(out)([row["text"] for row in rows[8:]])
    assert sampled(rows[8:]) == pytest.approx([score.item() for score in scores], abs=1e-4)


def test_the_folder_is_a_classifier_for_a_pipeline_and_has_a_card(finished_run):
    out, _, metrics = finished_run
    row = lines(out / "samples.jsonl")[-1]
    classify = pipeline("text-classification", model=str(out))
    score = classify(row["text"], function_to_apply="none")[0]["score"]
    assert score == pytest.approx(row["score"], abs=1e-4)
    card = (out / "README.md").read_text()
    assert "toy/pairs.jsonl" in card
    assert f"| eval_accuracy | {metrics['eval_accuracy']:.4g} |" in card


def test_a_run_killed_after_its_checkpoint_ends_with_the_same_numbers_once_resumed(
        finished_run, tmp_path):
    """What a kill at update 30 leaves: a checkpoint of update 20, and lines that came later."""
    out, _, metrics = finished_run
    shutil.copytree(out / "checkpoint-20", tmp_path / "checkpoint-20")
    rows = [{**row, "before_the_kill": row["update"] <= 20} for row in lines(out / "metrics.jsonl")]
    write_rows(tmp_path / "metrics.jsonl", [row for row in rows if row["update"] <= 30])
    write_rows(tmp_path / "samples.jsonl", lines(out / "samples.jsonl")[:8])
    again = main(ScriptConfig(**TOY_RUN, output_dir=str(tmp_path), save_strategy="no",
                              resume_from_checkpoint=str(tmp_path)))
    assert numbers(again) == numbers(metrics)
    got = [{"before_the_kill": False, **row} for row in lines(tmp_path / "metrics.jsonl")]
    def of_both(rows):  # the lines of the first 20 updates are those from before
        return [numbers(row) for row in rows]
    assert of_both(got) == of_both(rows)
    assert lines(tmp_path / "samples.jsonl") == lines(out / "samples.jsonl")


def test_a_fresh_run_does_not_overwrite_the_checkpoints_of_another(finished_run):
    with pytest.raises(InputError, match="output_dir.*checkpoint-40"):
        main(small(finished_run[0]))
    assert (finished_run[0] / "checkpoint-20").exists()


def test_the_documented_class_alone_runs_the_script(tmp_path):
    metrics = main(RewardConfig(output_dir=str(tmp_path), max_steps=1, disable_tqdm=True,
                                remove_unused_columns=False))
    assert 0 <= metrics["eval_accuracy"] <= 1 and metrics["eval_loss"] > 0


@pytest.mark.parametrize("given", [None, 3e-4])
def test_the_learning_rate_follows_the_size_of_the_model_unless_given(given, tmp_path):
    data = toy_pairs(tmp_path / "pairs.jsonl", 8)
    main(small(tmp_path / "out", dataset=data, max_steps=1, learning_rate=given))
    rate = lines(tmp_path / "out" / "metrics.jsonl")[0]["learning_rate"]
    assert rate == pytest.approx(given or 2e-3 * math.sqrt(1e5 / 106456), rel=1e-6)


def test_an_own_dataset_is_evaluated_on_its_own_held_out_rows_only(tmp_path):
    """Samples are of the held-out rows, or of the training rows where none are held out."""
    rows = lines(TOY / "pairs.jsonl")
    data = write_rows(tmp_path / "data.jsonl", rows[:8])
    held_out = write_rows(tmp_path / "held_out.jsonl", rows[8:11])
    shown = {}
    for name, fields in (("with", {"eval_dataset": held_out}), ("without", {})):
        metrics = main(small(tmp_path / name, dataset=data, eval_strategy="epoch", **fields))
        assert ("eval_loss" in metrics) == (name == "with")
        samples = lines(tmp_path / name / "samples.jsonl")
        shown[name] = [row["text"] for row in samples[:len(samples) // 2:2]]
    texts = [row["prompt"] + row["chosen"] for row in rows]
    assert shown == {"with": texts[8:11], "without": texts[:4]}


def test_a_language_model_gets_a_head_and_an_adapter_that_a_second_run_trains_on(tmp_path):
    data = toy_pairs(tmp_path / "pairs.jsonl", margin=0.5)
    main(small(tmp_path / "a", model_name=str(TOY / "model"), dataset=data, lora_r=4,
               gradient_checkpointing=True))
    adapter = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["task_type"]) == (4, 16, "SEQ_CLS")
    main(small(tmp_path / "b", model_name=str(tmp_path / "a"), dataset=data))
    one, two = (lines(tmp_path / run / "samples.jsonl") for run in "ab")
    assert sampled(two[:8]) == pytest.approx(sampled(one[8:]), abs=1e-4)  # its head too
    assert sampled(two[8:]) != pytest.approx(sampled(two[:8]), abs=1e-3)


def test_samples_of_chats_show_the_last_user_turn_and_the_answer(tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(TOY / "reward")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}")
    tokenizer.save_pretrained(tmp_path / "model")
    AutoModelForSequenceClassification.from_pretrained(TOY / "reward").save_pretrained(
        tmp_path / "model")
    row = {"prompt": [{"role": "system", "content": "be kind."},
                      {"role": "user", "content": "the plot was"}],
           "chosen": [{"role": "assistant", "content": "lovely."}],
           "rejected": [{"role": "assistant", "content": "stale."}]}
    data = write_rows(tmp_path / "chats.jsonl", [row] * 4)
    main(small(tmp_path / "out", model_name=str(tmp_path / "model"), dataset=data, max_steps=1))
    chosen, rejected = lines(tmp_path / "out" / "samples.jsonl")[:2]
    assert chosen["text"] == "the plot was\nlovely."
    assert rejected["text"] == "the plot was\nstale."
    out = capsys.readouterr().out
    assert "lovely." in out and "be kind" not in out and "<user>" not in out


def test_equal_seeds_draw_equal_heads(tmp_path):
    data, drawn = toy_pairs(tmp_path / "pairs.jsonl", 8), []
    for i, seed in enumerate((0, 0, 1)):
        torch.rand(i + 1)  # what was drawn before must not matter
        main(small(tmp_path / str(i), model_name=str(TOY / "model"), dataset=data, seed=seed,
                   max_steps=1))
        drawn.append(sampled(lines(tmp_path / str(i) / "samples.jsonl")))
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[2][0]


def test_samples_are_scored_without_dropout(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(TOY / "reward", resid_pdrop=0.5)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(TOY / "reward").save_pretrained(tmp_path / "model")
    data = toy_pairs(tmp_path / "pairs.jsonl", 8)
    main(small(tmp_path / "out", model_name=str(tmp_path / "model"), dataset=data, max_steps=1,
               learning_rate=1e-9))
    rows = lines(tmp_path / "out" / "samples.jsonl")
    want = scores_of(rows[:8], TOY / "reward") * 2
    assert sampled(rows) == pytest.approx(want, abs=1e-3)


def two_labels(path):
    AutoTokenizer.from_pretrained(TOY / "reward").save_pretrained(path)
    GPT2ForSequenceClassification(GPT2Config(
        vocab_size=400, n_positions=32, n_embd=8, n_layer=1, n_head=1, num_labels=2)
    ).save_pretrained(path)
    return {"model_name": str(path)}


def no_pad(path):
    tokenizer = AutoTokenizer.from_pretrained(TOY / "reward")
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(path)
    AutoModelForSequenceClassification.from_pretrained(TOY / "reward").save_pretrained(path)
    return {"model_name": str(path)}


def damaged(path):
    checkpoint = path / "checkpoint-1"
    main(small(path, save_strategy="steps", save_steps=1, max_steps=1,
               dataset=toy_pairs(path.parent / "p.jsonl")))
    file = checkpoint / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:1000])
    return {"resume_from_checkpoint": str(checkpoint)}


@pytest.mark.parametrize("fields,names", [
    (lambda path: {"model_name": "no/such-model"}, "model_name.*no/such-model"),
    (two_labels, "num_labels=1"),
    (no_pad, "pad_token"),
    (lambda path: {"dataset": "nowhere.jsonl"}, "nowhere.jsonl"),
    (lambda path: {"dataset": write_rows(path.with_suffix(".jsonl"), [{"text": "a"}])},
     "text.*chosen"),
    (lambda path: {"max_length": 1}, "max_length"),
    (lambda path: {"resume_from_checkpoint": str(path)}, "bad.*checkpoint"),
    (damaged, "checkpoint-1.*damaged"),
], ids=["no_model", "two_labels", "no_padding", "no_data", "other_columns", "all_equal_once_cut",
        "no_checkpoint", "damaged_checkpoint"])
def test_bad_input_is_one_sentence(fields, names, tmp_path):
    with pytest.raises(InputError, match=names) as error:
        main(small(tmp_path / "out", **fields(tmp_path / "bad")))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------- ranks
def job(folder, ranks):
    """Three optimizer steps of a trainer, two of main(), in one process or on each of two ranks:
    16, 8 and 16 pairs in micro-batches of 8, by plain SGD, which shows a factor of the gradient."""
    folder = Path(folder) / str(ranks)
    rows = [{**row, "margin": i % 3 / 2} for i, row in enumerate(lines(TOY / "pairs.jsonl")[:24])]
    held_out = lines(TOY / "pairs_test.jsonl")[:13]
    shared = dict(per_device_train_batch_size=8 // ranks, gradient_accumulation_steps=2,
                  per_device_eval_batch_size=4, optim="sgd", max_grad_norm=0.0, logging_steps=1,
                  disable_tqdm=True, save_strategy="no", use_cpu=True,
                  train_sampling_strategy="sequential")
    config = RewardConfig(str(folder / "trainer"), max_steps=3, learning_rate=1e-2,
                          remove_unused_columns=False, gradient_checkpointing=ranks == 2, **shared)
    model = AutoModelForSequenceClassification.from_pretrained(TOY / "reward")
    tokenizer = AutoTokenizer.from_pretrained(TOY / "reward")
    trainer = RewardTrainer(model, config, None, Dataset.from_list(rows),
                            Dataset.from_list(held_out), tokenizer)
    trainer.train()
    evaluation = trainer.evaluate()
    main(ScriptConfig(
        str(folder / "main"), max_steps=2, learning_rate=1e-2, model_name=str(TOY / "model"),
        dataset=str(Path(folder).parent / "pairs.jsonl"), seed=5,
        eval_dataset=str(Path(folder).parent / "held_out.jsonl"), **shared))
    if trainer.is_world_process_zero():
        log = [row for row in trainer.state.log_history if "loss" in row]
        torch.save({"weights": model.state_dict(), "log": log, "evaluation": evaluation},
                   folder / "results.pt")


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """Folders of the job in one process and on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    toy_pairs(folder / "pairs.jsonl")
    write_rows(folder / "held_out.jsonl", lines(TOY / "pairs_test.jsonl")[:13])
    job(folder, 1)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(Path(__file__).resolve()), str(folder)], cwd=ROOT, capture_output=True, text=True,
        timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return folder / "1", folder / "2"


# the sums of float32 in another order: 1e-4 of scores up to 10
close = dict(rel=1e-4, abs=1e-4)


def test_two_ranks_end_with_the_weights_of_one_process_with_the_same_global_batch(on_ranks):
    one, two = (torch.load(folder / "results.pt")["weights"] for folder in on_ranks)
    start = AutoModelForSequenceClassification.from_pretrained(TOY / "reward").state_dict()
    step = {name: one[name] - start[name] for name in one}
    total = math.sqrt(sum(change.norm().item() ** 2 for change in step.values()))
    assert total > 1e-3
    for name, change in step.items():  # a weight is rounded to 6e-8 of itself
        off = (two[name] - one[name]).norm().item()
        rounding = 3e-7 * start[name].norm().item()
        assert off <= 2e-3 * change.norm().item() + 1e-5 * total + rounding, name


def test_the_log_and_the_evaluation_of_two_ranks_cover_all_pairs(on_ranks):
    """13 held-out pairs do not divide among two ranks: none counts twice."""
    one, two = (torch.load(folder / "results.pt") for folder in on_ranks)
    names = ["loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
    assert len(one["log"]) == len(two["log"]) == 3
    for a, b in zip(one["log"], two["log"], strict=True):
        assert [b[name] for name in names] == pytest.approx([a[name] for name in names], **close)
    names = [f"eval_{name}" for name in names]
    for name in (*names, "eval_accuracy"):
        assert two["evaluation"][name] == pytest.approx(one["evaluation"][name], **close)


def test_the_script_on_two_ranks_draws_one_head_and_writes_each_line_once(on_ranks):
    one, two = (folder / "main" for folder in on_ranks)
    for file in ("metrics.jsonl", "samples.jsonl"):
        a, b = lines(one / file), lines(two / file)
        assert len(a) == len(b)
        for row, other in zip(a, b, strict=True):
            row, other = numbers(row), numbers(other)
            for name in set(row) - {"train_loss", "total_flos", "grad_norm"}:
                text = isinstance(row[name], str)
                assert other[name] == (row[name] if text else pytest.approx(row[name], **close))


if __name__ == "__main__":
    job(sys.argv[1], 2)
    torch.distributed.destroy_process_group()
    os._exit(0)  # torch may abort as it frees the groups of several runs: end here
