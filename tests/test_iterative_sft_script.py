"""iterative_sft.py, the script: rounds, output files, kills, and two ranks."""
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import EOS, hf_model
from test_iterative_sft import (
    EndCallsEarly,
    as_dataset,
    assert_same_change,
    mean_loss,
    still,
    tokens,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, TrainingArguments

from chats import load_reward
from common import InputError
from iterative_sft import IterativeSFTConfig, IterativeSFTTrainer, main, train_round
from machinery import load_prompts

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy"
# SGD at such a rate moves no float32 weight: what is sampled and lost in each round stays the same.
FROZEN = {"optim": "sgd", "learning_rate": 1e-12}


def small(folder, **fields):
    fields = {"prompts_per_round": 4, "num_samples": 3, "max_new_tokens": 6, "num_train_epochs": 3,
              "per_device_train_batch_size": 2, "save_steps": 2, "save_total_limit": None,
              "disable_tqdm": True, "gradient_checkpointing": False, **fields}
    return IterativeSFTConfig(str(folder), **fields)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def metrics(folder):
    """metrics.jsonl without the clock."""
    clock = ("runtime", "per_second")
    rows = lines(Path(folder) / "metrics.jsonl")
    return [{name: number for name, number in row.items() if not name.endswith(clock)}
            for row in rows if "train_runtime" not in row]


def rounds(folder):
    return [row for row in metrics(folder) if "objective/scores" in row]


def weights_of(folder, name="model.safetensors"):
    return (Path(folder) / name).read_bytes()


def write_prompts(path, *queries):
    path.write_text("".join(json.dumps({"query": query}) + "\n" for query in queries))
    return str(path)


# A reward that keeps the texts it is shown. A file `stop` holds the number after which it fails.
REWARD = '''
import json, os
from pathlib import Path
HERE = Path(__file__).parent
RANK = os.environ.get("RANK", "0")

def value(text):
    return sum(map(ord, text)) % 97 / 10

def score(texts):
    with open(HERE / f"texts-{RANK}.jsonl", "a") as file:
        file.writelines(json.dumps(text) + "\\n" for text in texts)
    shown = len((HERE / f"texts-{RANK}.jsonl").read_text().splitlines())
    if (HERE / "stop").exists() and shown > int((HERE / "stop").read_text()):
        raise RuntimeError("stopped")
    return [value(text) for text in texts]
'''


def value(text):
    return sum(map(ord, text)) % 97 / 10


class Reward:
    """A reward file; `name` is the flag's value, `texts` what it was shown so far."""

    def __init__(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "reward.py").write_text(REWARD)
        self.folder, self.name = folder, f"{folder / 'reward.py'}:score"

    def texts(self, rank=0):
        return lines(self.folder / f"texts-{rank}.jsonl")


@pytest.fixture
def reward(tmp_path):
    return Reward(tmp_path / "reward")


# ----------------------------------------------------------------- a round
QUERIES = ("the plot was", "i thought the pacing was", "the editing was", "in short, the music was")


@pytest.mark.parametrize("num_best", [1, 2])
def test_a_round_trains_on_the_best_answers_of_each_prompt(tmp_path, reward, monkeypatch,
                                                                      num_best):
    trained_on, forward = [], GPT2LMHeadModel.forward

    @functools.wraps(forward)
    def watched(self, *args, **kwargs):
        if self.training:
            trained_on.extend(kwargs["input_ids"].tolist())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", watched)
    stats = main(small(tmp_path / "out", num_train_epochs=1, num_samples=5, num_best=num_best,
                       max_new_tokens=30, per_device_train_batch_size=8, reward_model=reward.name,
                       query_dataset=write_prompts(tmp_path / "q.jsonl", *QUERIES)))
    # 4 samples before the training, 4 x 5 answers of the round, 4 samples after it
    texts = reward.texts()
    assert len(texts) == 4 + 20 + 4
    groups = [texts[4 + 5 * i:9 + 5 * i] for i in range(4)]
    best = [sorted(group, key=value, reverse=True)[:num_best] for group in groups]
    for group in groups:
        (query,) = [query for query in QUERIES if group[0].startswith(query)]
        assert all(text.startswith(query) and len(text) > len(query) + 20 for text in group)
        assert len(set(group)) == 5

    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    model, rows, labels = AutoModelForCausalLM.from_pretrained(TOY / "model"), [], []
    for row in trained_on:
        row = torch.tensor(row)
        row = row[:row.nonzero().max() + 1]  # without padding, whose id is 0
        (query,) = [q for q in QUERIES if tokenizer.decode(row).startswith(q)]
        prompt = len(tokenizer(query).input_ids)
        assert row[-1] == tokenizer.eos_token_id or len(row) == prompt + 30
        assert tokenizer.eos_token_id not in row[:-1]
        rows.append(row)
        labels.append(torch.cat([torch.full((prompt,), -100), row[prompt:]]))
    assert any(row[-1] == tokenizer.eos_token_id for row in rows)
    decoded = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    assert sorted(decoded) == sorted(sum(best, []))

    assert stats["tokens"] == sum((row != -100).sum().item() for row in labels)
    assert stats["loss"] == pytest.approx(mean_loss(model, rows, labels).item(), rel=1e-5)
    scores = torch.tensor([value(text) for text in texts[4:24]])
    (line,) = rounds(tmp_path / "out")
    for got in (stats, line):
        assert got["objective/scores"] == pytest.approx(scores.mean().item(), rel=1e-5)
        assert got["objective/scores_std"] == pytest.approx(scores.std().item(), rel=1e-5)
        kept = [value(text) for group in best for text in group]
        assert got["objective/scores_best"] == pytest.approx(sum(kept) / len(kept), rel=1e-5)


def most_likely(model, query, length, ends):
    """The answer that takes the most likely token each time, without padding, cache or dropout."""
    model, answer = model.eval(), []
    seq2seq = model.config.is_encoder_decoder
    while len(answer) < length and not (answer and answer[-1] in ends):
        if seq2seq:
            start = torch.tensor([[model.config.decoder_start_token_id, *answer]])
            call = {"input_ids": torch.tensor([query]), "decoder_input_ids": start}
        else:
            call = {"input_ids": torch.tensor([query + answer])}
        with torch.no_grad():
            first, second = model(**call).logits[0, -1].topk(2)[0]
            answer.append(model(**call).logits[0, -1].argmax().item())
        assert first - second > 0.02  # else a temperature of 1e-3 is not near enough to 0
    return answer


@pytest.mark.parametrize("kind", ["gpt2", "gpt2 with dropout", "gpt2, the model's end",
                                  "gpt2, the tokenizer's end", "t5"])
def test_at_a_temperature_near_0_answers_are_the_most_likely_tokens(tmp_path, reward, tokenizer,
                                                                    kind):
    """Whatever the padding, the order of lengths, dropout, and settings for chats that a model has.

    Answers end with the first end token, and that one is trained on too."""
    arch = kind.split()[0].strip(",")
    model = still(arch, **({"initializer_factor": 3.0} if arch == "t5" else {}))
    if "dropout" in kind:
        model = hf_model(arch, resid_pdrop=0.6)
    queries = [row.tolist() for row in tokens(2, 9, 4, 6, 3, seed=1)]
    # an answer that ends before the others of its batch of generation
    end = most_likely(model, queries[2], 5, {EOS})[2]
    ends = {EOS, end} if "end" in kind else {EOS}
    answers = [most_likely(model, query, 5, ends) for query in queries]
    assert len(set(map(tuple, answers))) == 5
    model.generation_config.update(repetition_penalty=3.0, no_repeat_ngram_size=1, num_beams=2,
                                   bad_words_ids=[[answers[0][0]]], min_new_tokens=5)
    if "model's" in kind:
        model.generation_config.eos_token_id = [EOS, end]
    if "tokenizer's" in kind:
        tokenizer.eos_token = f"w{end}"
    model.save_pretrained(tmp_path / "model"), tokenizer.save_pretrained(tmp_path / "model")
    prompts = write_prompts(tmp_path / "q.jsonl", *map(tokenizer.decode, queries))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    stats = main(small(tmp_path / "out", model_name=str(tmp_path / "model"), query_dataset=prompts,
                       reward_model=reward.name, temperature=1e-3, prompts_per_round=5,
                       num_samples=2, num_train_epochs=2, max_new_tokens=5,
                       generation_batch_size=4, per_device_train_batch_size=5, **FROZEN))

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    want = [f"{decode(x)} {decode(y)}" if arch == "t5" else decode(x + y)
            for x, y in zip(queries, answers, strict=True)]
    texts = reward.texts()
    assert texts[:5] == texts[-5:] == want  # before and after training
    for part in (texts[5:15], texts[15:25]):  # each round has every prompt once
        assert part[::2] == part[1::2] and sorted(part[::2]) == sorted(want)
    assert stats["tokens"] == sum(map(len, answers))
    if "dropout" not in kind:
        x, y = [list(map(torch.tensor, rows)) for rows in (queries, answers)]
        rows = x if arch == "t5" else list(map(torch.cat, zip(x, y, strict=True)))
        labels = y
        if arch != "t5":
            labels = [F.pad(b, (len(a), 0), value=-100) for a, b in zip(x, y, strict=True)]
        # likely tokens: a small loss is what large logits leave
        assert stats["loss"] == pytest.approx(mean_loss(model, rows, labels).item(), rel=1e-4)


def test_answers_are_drawn_from_the_models_distribution_at_the_temperature(tmp_path, reward,
                                                                           tokenizer):
    """Whatever top-k and top-p its generation config has."""
    model, query = still(), [17, 5]
    with torch.no_grad():
        model.transformer.ln_f.weight *= 3  # a model that is surer
        logits = model.eval()(torch.tensor([query])).logits[0, -1]
    want, plain = (logits / 2.0).softmax(-1), logits.softmax(-1)
    assert (want - plain)[4:].abs().max() > 0.1
    unlikely = [i for i in want.argsort()[:60].tolist() if i >= 4]
    assert want[unlikely].sum() > 0.08
    model.generation_config.update(do_sample=True, top_k=3, top_p=0.5)
    model.save_pretrained(tmp_path / "model"), tokenizer.save_pretrained(tmp_path / "model")
    main(small(tmp_path / "out", model_name=str(tmp_path / "model"), reward_model=reward.name,
               query_dataset=write_prompts(tmp_path / "q.jsonl", "w17 w5"), temperature=2.0,
               prompts_per_round=1, num_samples=4000, generation_batch_size=4000,
               max_new_tokens=1, num_train_epochs=1, save_strategy="no"))
    words = [text.split()[2:] for text in reward.texts()[1:-1]]
    assert len(words) == 4000
    # special tokens have no word
    drawn = torch.tensor([int(word[0][1:]) for word in words if word])
    fraction = torch.bincount(drawn, minlength=len(want)) / 4000
    # the standard deviation of a fraction of 4000 draws is at most 0.008
    assert (fraction - want)[4:].abs().max() < 0.035
    assert abs(fraction[unlikely].sum() - want[unlikely].sum()) < 0.035


def test_prompts_are_drawn_in_random_order_and_each_comes_once_per_pass(tmp_path, reward):
    queries = [f"the {word} was" for word in ("plot", "editing", "pacing", "music", "ending")]
    prompts, passes = write_prompts(tmp_path / "q.jsonl", *queries), []
    for seed in (1, 10):
        main(small(tmp_path / f"out{seed}", query_dataset=prompts, reward_model=reward.name,
                   seed=seed, prompts_per_round=2, num_samples=1, num_train_epochs=5,
                   max_new_tokens=1, save_strategy="no", **FROZEN))
        texts = reward.texts()[-15:-5]
        drawn = [next(q for q in queries if text.startswith(q)) for text in texts]
        passes += [drawn[:5], drawn[5:]]
    assert all(sorted(one) == sorted(queries) for one in passes)
    assert len(set(map(tuple, passes))) == 4


def test_a_round_after_one_that_a_callback_ended_draws_new_prompts(tmp_path, reward):
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    model = AutoModelForCausalLM.from_pretrained(TOY / "model")
    config = small(tmp_path / "out", prompts_per_round=2, max_new_tokens=2, max_steps=9,
                   per_device_train_batch_size=1, save_strategy="no")
    trainer = IterativeSFTTrainer(model, config, tokenizer, callbacks=[EndCallsEarly()])
    prompts = load_prompts(write_prompts(tmp_path / "q.jsonl", *QUERIES), tokenizer)
    for _ in range(2):
        train_round(trainer, load_reward(reward.name), prompts)
    drawn = [query for text in reward.texts()[::3] for query in QUERIES if text.startswith(query)]
    assert sorted(drawn) == sorted(QUERIES)


def test_one_score_has_a_deviation_of_0_and_no_selection_is_a_warning(tmp_path, reward):
    with pytest.warns(UserWarning, match="num_best=1.*no selection"):
        config = small(tmp_path, reward_model=reward.name, prompts_per_round=1, num_samples=1,
                       num_train_epochs=1)
    assert main(config)["objective/scores_std"] == 0


def test_each_round_draws_new_answers_and_each_run_the_same(tmp_path, reward):
    """With weights that don't move. The samples before and after training are alike then."""
    prompts, runs = write_prompts(tmp_path / "q.jsonl", QUERIES[0]), []
    for number, seed in enumerate((1, 1, 2)):
        out = tmp_path / f"out{number}"
        main(small(out, query_dataset=prompts, reward_model=reward.name, seed=seed,
                   prompts_per_round=1, num_train_epochs=2, save_strategy="no", **FROZEN))
        runs.append(reward.texts()[-8:])
    assert runs[0] == runs[1] and runs[0][1:7] != runs[2][1:7]
    assert runs[0][1:4] != runs[0][4:7]
    first, last = lines(out / "samples.jsonl")
    assert (first["update"], last["update"]) == (0, 2)
    for sample in (first, last):
        assert sample["query"] == QUERIES[0] and sample["query"] + sample["response"] == runs[2][0]
        assert sample["score"] == pytest.approx(value(runs[2][0]))


def test_a_reward_gets_the_prompts_other_columns(tmp_path):
    (tmp_path / "q.jsonl").write_text("".join(
        json.dumps({"query": query, "answer": i}) + "\n" for i, query in enumerate(QUERIES)))
    (tmp_path / "r.py").write_text(
        f"QUERIES = {QUERIES!r}\n"
        "def score(texts, metadata):\n"
        "    pairs = zip(texts, metadata, strict=True)\n"
        "    assert all(text.startswith(QUERIES[row['answer']]) for text, row in pairs)\n"
        "    return [row['answer'] for row in metadata]\n")
    stats = main(small(tmp_path / "out", query_dataset=str(tmp_path / "q.jsonl"),
                       reward_model=f"{tmp_path}/r.py:score", num_train_epochs=1))
    assert stats["objective/scores"] == stats["objective/scores_best"] == 1.5


def test_samples_of_a_chat_show_its_last_user_turn(tmp_path, reward):
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    tokenizer.chat_template = "{% for turn in messages %}in short, {{ turn.content }}{% endfor %}"
    model = AutoModelForCausalLM.from_pretrained(TOY / "model")
    model.save_pretrained(tmp_path / "model"), tokenizer.save_pretrained(tmp_path / "model")
    chat = [{"role": "system", "content": "the plot"}, {"role": "user", "content": "the music was"}]
    (tmp_path / "q.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    main(small(tmp_path / "out", model_name=str(tmp_path / "model"), reward_model=reward.name,
               query_dataset=str(tmp_path / "q.jsonl"), num_train_epochs=1))
    assert all(text.startswith("in short, the plotin short, the music was")
               for text in reward.texts())
    samples = lines(tmp_path / "out" / "samples.jsonl")
    assert [row["query"] for row in samples] == ["the music was"] * 2


def test_the_bar_says_what_a_round_is_doing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    main(small(tmp_path, disable_tqdm=False, num_train_epochs=1))
    printed = capsys.readouterr().err
    assert 0 < printed.index("sampling") < printed.index("learning")


def test_the_toy_score_rises_within_a_few_rounds(tmp_path):
    stats = main(small(tmp_path, prompts_per_round=32, num_samples=8, max_new_tokens=24,
                       per_device_train_batch_size=32, num_train_epochs=10, learning_rate=1e-3,
                       save_strategy="no"))
    first = rounds(tmp_path)[0]
    rise = stats["objective/scores"] - first["objective/scores"]
    assert rise > first["objective/scores_std"]


# ----------------------------------------------------------------- output files
def test_a_run_leaves_model_samples_metrics_and_card(tmp_path, capsys):
    stats = main(small(tmp_path, disable_tqdm=False))
    printed = capsys.readouterr()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = AutoModelForCausalLM.from_pretrained(TOY / "model")
    assert any((a != b).any() for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path).decode([5])
    assert [row["update"] for row in metrics(tmp_path) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    lines_of_rounds = rounds(tmp_path)
    assert [row["update"] for row in lines_of_rounds] == [2, 4, 6]
    assert [row["epoch"] for row in lines_of_rounds] == [1, 2, 3]
    assert all(row["objective/scores_best"] > row["objective/scores"] for row in lines_of_rounds)
    assert stats["objective/scores"] == lines_of_rounds[-1]["objective/scores"]
    samples = lines(tmp_path / "samples.jsonl")
    assert [row["update"] for row in samples] == [0] * 8 + [6] * 8
    assert samples[0]["response"] in printed.out and samples[-1]["response"] in printed.out
    assert "update 6/6: loss " in printed.out
    assert "objective/scores" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("fields, checkpoints", [
    ({"save_steps": 3}, [4, 6]),
    ({"save_steps": 0.5}, [4, 6]),
    ({"save_steps": 1, "gradient_accumulation_steps": 2}, [1, 2, 3]),
    ({"save_steps": 7, "num_best": 3}, [12, 18]),
    ({"num_train_epochs": 1.5}, [2, 4]),
    ({"max_steps": 100}, [2, 4, 6]),
    ({"save_total_limit": 1}, [6]),
])
def test_checkpoints_are_written_at_the_end_of_rounds(tmp_path, fields, checkpoints):
    """Three rounds of two optimizer steps where the fields say nothing else."""
    main(small(tmp_path, max_new_tokens=2, **fields))
    found = [int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")]
    assert sorted(found) == checkpoints
    for number in found:
        state = json.loads((tmp_path / f"checkpoint-{number}" / "trainer_state.json").read_text())
        assert state["epoch"] % 1 == 0


def test_max_steps_ends_a_run_within_a_round_which_cannot_be_resumed(tmp_path):
    stats = main(small(tmp_path, max_steps=3))
    assert metrics(tmp_path)[-1]["update"] == 3 and stats["optimizer_steps"] == 1
    with pytest.raises(InputError, match="checkpoint-3"):
        main(small(tmp_path, num_train_epochs=6, resume_from_checkpoint=str(tmp_path)))


def test_the_held_out_loss_is_logged_by_rounds_and_at_the_end(tmp_path):
    texts = ["the plot was dull.", "the music was utterly lovely and the pacing was fine."]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    stats = main(small(tmp_path / "out", eval_dataset=str(held_out), eval_strategy="epoch",
                       num_train_epochs=2, per_device_eval_batch_size=1))
    logged = [row["eval_loss"] for row in metrics(tmp_path / "out") if "eval_loss" in row]
    assert len(logged) == 3 and logged[0] != logged[1] and logged[1] == logged[2]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = [torch.tensor(tokenizer(text).input_ids) for text in texts]
    want = mean_loss(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), rows).item()
    assert stats["eval_loss"] == logged[-1] == pytest.approx(want, rel=1e-5)


def test_lora_trains_resumes_and_continues_from_its_folder(tmp_path):
    fields = {"lora_r": 4, "learning_rate": 1e-2}
    main(small(tmp_path / "whole", **fields))
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    main(small(tmp_path / "cut", **fields, resume_from_checkpoint=checkpoint))
    name = "adapter_model.safetensors"
    assert weights_of(tmp_path / "cut", name) == weights_of(tmp_path / "whole", name)
    more = tmp_path / "more"
    main(small(more, num_train_epochs=1, learning_rate=1e-2, model_name=str(tmp_path / "whole")))
    assert weights_of(more, name) != weights_of(tmp_path / "whole", name)


def test_weights_may_be_bfloat16(tmp_path):
    main(small(tmp_path, torch_dtype="bfloat16", num_train_epochs=1))
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


# ----------------------------------------------------------------- kills

def whole_run(tmp_path, **fields):
    reward = Reward(tmp_path / "whole_reward")
    main(small(tmp_path / "whole", reward_model=reward.name, **fields))
    return tmp_path / "whole"


def assert_same_run(cut, whole):
    assert metrics(cut) == metrics(whole)
    assert lines(cut / "samples.jsonl") == lines(whole / "samples.jsonl")
    assert weights_of(cut) == weights_of(whole)


@pytest.mark.parametrize("shown", [8 + 12 + 12, 8 + 12 + 12 + 12],
                         ids=["in the third round", "after the last checkpoint"])
def test_a_run_that_ends_early_is_resumed_to_the_same_numbers(tmp_path, reward, shown):
    """The reward fails when two rounds are saved, or all three."""
    (tmp_path / "held_out.jsonl").write_text('{"text": "the plot was dull."}\n')
    fields = {"eval_dataset": str(tmp_path / "held_out.jsonl"), "eval_strategy": "epoch"}
    whole, cut = whole_run(tmp_path, **fields), tmp_path / "cut"
    (reward.folder / "stop").write_text(str(shown))
    with pytest.raises(InputError, match="reward_model.*stopped"):
        main(small(cut, reward_model=reward.name, **fields))
    (reward.folder / "stop").unlink()
    assert not (cut / "model.safetensors").exists()
    main(small(cut, reward_model=reward.name, resume_from_checkpoint=str(cut), **fields))
    assert_same_run(cut, whole)
    main(small(cut, reward_model=reward.name, resume_from_checkpoint=str(cut), **fields))
    assert_same_run(cut, whole)  # a finished run that is resumed changes nothing


def test_a_run_killed_between_its_last_checkpoint_and_its_end_is_finished(tmp_path, monkeypatch):
    fields = {"num_train_epochs": 1}
    main(small(tmp_path / "whole", **fields))

    def end_here(trainer):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(IterativeSFTTrainer, "finish", end_here)
        with pytest.raises(KeyboardInterrupt):
            main(small(tmp_path / "cut", **fields))
    assert not any("train_loss" in row for row in lines(tmp_path / "cut" / "metrics.jsonl"))
    main(small(tmp_path / "cut", resume_from_checkpoint=str(tmp_path / "cut"), **fields))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    ends = [[row["train_loss"] for row in lines(tmp_path / name / "metrics.jsonl")
             if "train_loss" in row] for name in ("whole", "cut")]
    assert len(ends[0]) == 1 and ends[1] == ends[0]


KILLED = """
import os, signal, sys
from pathlib import Path
out, reward, held_out = sys.argv[1:]
last_file = Path(out) / "checkpoint-4" / "trainer_state.json"

def kill(event, args):
    if event == "open" and last_file.exists():
        os.kill(os.getpid(), signal.SIGKILL)

from iterative_sft import main
from test_iterative_sft_script import small
sys.addaudithook(kill)
main(small(out, reward_model=reward, eval_dataset=held_out, eval_strategy="epoch",
           num_train_epochs=4, save_total_limit=1))
"""


def python(script, *args, ranks=None, **env):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(torchrun if ranks else []), str(script), *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", **env})


def test_a_run_killed_right_after_a_checkpoint_has_lost_no_line(tmp_path, reward):
    """It kills itself at the first file that it opens once a checkpoint is complete."""
    held_out, cut = tmp_path / "held_out.jsonl", tmp_path / "cut"
    held_out.write_text('{"text": "the plot was dull."}\n')
    fields = {"eval_dataset": str(held_out), "eval_strategy": "epoch", "num_train_epochs": 4,
              "save_total_limit": 1}
    (tmp_path / "killed.py").write_text(KILLED)
    done = python(tmp_path / "killed.py", cut, reward.name, held_out)
    assert done.returncode == -9, done.stderr
    assert [row["update"] for row in rounds(cut)] == [2, 4]
    assert [row["update"] for row in metrics(cut) if "eval_loss" in row] == [2, 4]
    main(small(cut, reward_model=reward.name, resume_from_checkpoint=str(cut), **fields))
    assert_same_run(cut, whole_run(tmp_path, **fields))


# ----------------------------------------------------------------- bad input
@pytest.mark.parametrize("fields, names", [
    ({"num_best": 4}, "num_best=4.*num_samples=3"),
    ({"num_samples": 0}, "num_samples=0"),
    ({"temperature": 0.0}, "temperature=0.0"),
    ({"prompts_per_round": 0}, "prompts_per_round=0"),
    ({"eval_strategy": "epoch"}, "eval_strategy=epoch.*eval_dataset"),
    # the best model could not be saved where it is found: a round has 2 optimizer steps
    ({"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "best",
      "metric_for_best_model": "loss", "eval_dataset": str(TOY / "reviews_test.jsonl")},
     "eval_steps=3.*multiple of 2"),
    ({"resume_from_checkpoint": "nowhere"}, "nowhere"),
    ({"model_name": "no/where"}, "model_name.*no/where"),
    ({"query_dataset": "no.jsonl"}, "no.jsonl"),
    ({"max_new_tokens": 126}, "max-new-tokens"),
    ({"reward_label": "kind"}, "reward_label.*kind"),
])
def test_bad_settings_are_an_error_of_one_sentence(tmp_path, fields, names):
    with pytest.raises(InputError, match=names) as error:
        main(small(tmp_path, **fields))
    assert "\n" not in str(error.value) and not (tmp_path / "samples.jsonl").exists()


def test_a_score_that_is_no_number_is_an_error_with_its_text(tmp_path):
    code = "def score(texts):\n    return [float('nan') for text in texts]\n"
    (tmp_path / "r.py").write_text(code)
    with pytest.raises(InputError, match="reward_model.*nan.*to me the plot was"):
        main(small(tmp_path / "out", reward_model=f"{tmp_path}/r.py:score"))


def test_a_bad_held_out_row_is_an_error_before_the_first_sample(tmp_path):
    (tmp_path / "held_out.jsonl").write_text('{"text": "the plot was dull."}\n{"text": ""}\n')
    with pytest.raises(InputError, match="eval_dataset"):
        main(small(tmp_path / "out", eval_dataset=str(tmp_path / "held_out.jsonl")))
    assert not (tmp_path / "out" / "samples.jsonl").exists()


# ----------------------------------------------------------------- ranks
NOUNS = ("plot", "editing", "pacing", "music", "ending", "dialogue", "setting", "acting")


def train_on_this_rank(folder):
    """Three steps of the trainer on all ranks: 8 rows each, of very unequal length, under SGD."""
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    rows = tokens(*[3 + 4 * i for i in range(8)])
    model = still()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = TrainingArguments(str(folder / str(ranks)), per_device_train_batch_size=2, optim="sgd",
                             per_device_eval_batch_size=2, max_steps=9, logging_steps=1,
                             gradient_accumulation_steps=4 // ranks, learning_rate=0.1,
                             max_grad_norm=2.0, lr_scheduler_type="constant", save_strategy="no",
                             disable_tqdm=True, report_to="none")
    # 5 rows: the ranks fill up their last batch, with rows that must not count
    trainer = IterativeSFTTrainer(model, args, eval_dataset=as_dataset(rows[:5]))
    stats = [trainer.step(rows[rank::ranks]) for _ in range(3)]
    result = {"stats": stats, "eval": trainer.evaluate()["eval_loss"],
              "logs": [log["loss"] for log in trainer.state.log_history if "loss" in log],
              "change": {name: before[name] - p.detach() for name, p in model.named_parameters()}}
    if ranks > 1:
        with pytest.raises(InputError, match="2.*3"):
            trainer.step(rows[:2 + rank])
    torch.save(result, folder / f"trainer-{ranks}-{rank}.pt")


def script_on_this_rank(folder):
    """The script: a whole run, one resumed from its first checkpoint, one with a single prompt."""
    fields = {"per_device_train_batch_size": 4, "save_steps": 1}
    many = {"query_dataset": str(folder / "many.jsonl"), **fields}
    rewards = {name: str(folder / name / "reward.py:score") for name in ("whole", "cut", "one")}
    main(small(folder / "whole", reward_model=rewards["whole"], **many))
    main(small(folder / "cut", reward_model=rewards["cut"], **many,
               resume_from_checkpoint=str(folder / "whole" / "checkpoint-1")))
    main(small(folder / "one", reward_model=rewards["one"], query_dataset=str(folder / "one.jsonl"),
               num_train_epochs=1, **fields))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The folder of one run on two ranks, of the trainer and of the script."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("whole", "cut", "one"):
        Reward(folder / name)
    write_prompts(folder / "many.jsonl", *[f"the {noun} was" for noun in NOUNS])
    write_prompts(folder / "one.jsonl", QUERIES[0])
    (folder / "ranks.py").write_text(
        "import os, sys, machinery\nfrom pathlib import Path\nmachinery.setup_ranks()\n"
        "from test_iterative_sft_script import script_on_this_rank, train_on_this_rank\n"
        "train_on_this_rank(Path(sys.argv[1]))\nscript_on_this_rank(Path(sys.argv[1]))\n"
        "os._exit(0)  # torch may abort as it frees the groups of several runs: end here\n")
    done = python(folder / "ranks.py", folder, ranks=2)
    assert done.returncode == 0, done.stderr
    return folder


def test_two_ranks_are_one_process_with_the_same_rows(two_ranks, tmp_path):
    train_on_this_rank(tmp_path)
    one = torch.load(tmp_path / "trainer-1-0.pt")
    two = [torch.load(two_ranks / f"trainer-2-{rank}.pt") for rank in (0, 1)]
    assert max(stats["grad_norm"] for stats in one["stats"]) > 2  # some gradients are clipped
    for rank in two:
        # the gradient is summed in another order: a few units in the last place, through 3 updates
        for a, b in zip(rank["stats"], one["stats"], strict=True):
            assert a == pytest.approx(b, rel=1e-4)
        assert rank["eval"] == pytest.approx(one["eval"], rel=1e-4)
        assert rank["logs"] == pytest.approx(one["logs"], rel=1e-4)
        assert_same_change(rank["change"], one["change"])
    assert all(torch.equal(p, two[1]["change"][name]) for name, p in two[0]["change"].items())


def test_ranks_divide_the_prompts_and_log_the_scores_of_all(two_ranks):
    texts = [Reward(two_ranks / "whole").texts(rank) for rank in (0, 1)]
    answers = [shown[8:8 + 12] for shown in texts]  # of the first round, after 8 samples
    queries = [f"the {noun} was" for noun in NOUNS]
    asked = [[q for q in queries if text.startswith(q)] for part in answers for text in part[::3]]
    assert sorted(sum(asked, [])) == sorted(queries)
    scores = torch.tensor([[value(text) for text in part] for part in answers]).view(8, 3)
    first = rounds(two_ranks / "whole")[0]
    assert first["objective/scores"] == pytest.approx(scores.mean().item(), rel=1e-5)
    assert first["objective/scores_std"] == pytest.approx(scores.std().item(), rel=1e-5)
    best = scores.max(1)[0].mean().item()
    assert first["objective/scores_best"] == pytest.approx(best, rel=1e-5)


def test_each_rank_draws_its_own_answers(two_ranks):
    """Both have the same prompt four times in their first round."""
    first, second = [Reward(two_ranks / "one").texts(rank)[1:13] for rank in (0, 1)]
    assert sum(a != b for a, b in zip(first, second, strict=True)) > 6


def test_a_run_on_two_ranks_is_resumed_to_the_same_numbers(two_ranks):
    whole, cut = two_ranks / "whole", two_ranks / "cut"
    assert metrics(cut) == [row for row in metrics(whole) if row["update"] > 1]
    assert [row["update"] for row in rounds(whole)] == [1, 2, 3]
    assert weights_of(cut) == weights_of(whole)
