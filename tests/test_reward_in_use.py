"""A text has one score: training, chats.load_reward and transformers' pipeline read the same
tokens, for chats in the templates of today's models and for texts."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from templates import CHATS, NO_SYSTEM, TEMPLATES, TOOL_CALLS, chat_tokenizer
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoTokenizer, pipeline

from chats import end_token_ids, load_reward, render_chat, reward_inputs
from common import InputError
from machinery import load_prompts
from reward import RewardConfig, RewardTrainer

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("chosen", "rejected")
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}]
WORSE = "I do not know."  # the rejected answers


def classifier(tokenizer, arch="Llama", **changes):
    """A random classifier of 2 layers of 32 with one label, whose scores differ."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{arch}Config")(**{
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 1,
        "max_position_embeddings": 512, "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, **changes})
    return getattr(transformers, f"{arch}ForSequenceClassification")(config)


@pytest.fixture
def make_trainer(tmp_path):
    """make_trainer(tokenizer, rows, model=None, **fields) -> RewardTrainer, its model in eval mode
    saved in tmp_path / "model" with its tokenizer."""
    def make(tokenizer, rows, model=None, **fields):
        args = RewardConfig(output_dir=str(tmp_path / "out"), use_cpu=True, learning_rate=1e-3,
                            remove_unused_columns=False, gradient_checkpointing=False, **fields)
        trainer = RewardTrainer(model or classifier(tokenizer), args, tokenizer=tokenizer,
                                train_dataset=Dataset.from_list(rows))
        trainer.model.eval()
        trainer.save_model(str(tmp_path / "model"))
        return trainer

    return make


@torch.no_grad()
def scores_in_training(trainer):
    """Scores of the chosen and the rejected texts of all rows."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    return [outputs[f"rewards_{side}"].tolist() for side in SIDES]


@pytest.fixture
def ids_read():
    """The token ids that embeddings have read, one list per forward pass and text."""
    seen = []

    def see(module, args):
        if isinstance(module, torch.nn.Embedding) and args[0].dim() == 2:
            seen.extend(args[0].tolist())

    hook = register_module_forward_pre_hook(see)
    yield seen
    hook.remove()


# ------------------------------------------------------- a reward reads what it was trained on
def with_answer(chat, content):
    return [*chat[:-1], {"role": "assistant", "content": content}]


CASES = [(name, chat, {}) for name in TEMPLATES for chat in CHATS
         if not (name in NO_SYSTEM and chat == "several turns")
         and not (name == "deepseek_r1" and chat != "thinking")  # its answers think
         and (name in TOOL_CALLS or chat != "tool call")]
CASES += [("qwen3", chat, {"chat_template_kwargs": {"enable_thinking": False}})
          for chat in ("one turn", "several turns")]
CASES += [(name, "tool call", {"tools": TOOLS}) for name in TOOL_CALLS]
THOUGHT = "<|channel|>analysis<|message|>An easy one."
TOOL_CALL = """\
<tool_call>
{"name": "weather", "arguments": {"city": "Oslo"}}
</tool_call>"""


@pytest.mark.filterwarnings("ignore:chat_template")
@pytest.mark.parametrize("name,chat,columns", CASES)
def test_a_reward_of_a_sampled_response_reads_the_tokens_it_was_trained_on(
        name, chat, columns, make_trainer, tmp_path, ids_read):
    tokenizer, messages = chat_tokenizer(name), CHATS[chat]
    row = {"chosen": messages, "rejected": with_answer(messages, WORSE), **columns}
    trainer = make_trainer(tokenizer, [row])
    want, scores = trainer.train_dataset[0]["input_ids_chosen"], scores_in_training(trainer)

    # as in ppo.py: the prompt comes from a file, and the policy writes the answer
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": messages, **columns}) + "\n")
    (prompt,) = load_prompts(tmp_path / "prompts.jsonl", tokenizer)
    written = messages[-1]["content"] or TOOL_CALL
    if prompt["query"].endswith("<think>\n"):  # the policy closes what the prompt has opened
        is_thought = written.startswith("<think>\n")
        written = written.removeprefix("<think>\n") if is_thought else "\n</think>\n\n" + written
    if name == "gpt_oss":
        written = f"{THOUGHT}<|end|><|start|>assistant<|channel|>final<|message|>{written}"
    response = tokenizer(written, add_special_tokens=False).input_ids
    ended = [*response, max(end_token_ids(tokenizer))]
    columns_of_prompts = {key: [value] for key, value in prompt.items()}
    reward = load_reward(tmp_path / "model")
    for sampled in (response, ended):
        inputs = reward_inputs(tokenizer, columns_of_prompts, [torch.tensor(sampled)], False)
        ids_read.clear()
        (score,) = reward(**inputs)
        assert tokenizer.decode(ids_read[0]) == tokenizer.decode(want)
        assert ids_read == [want]
        assert score.item() == pytest.approx(scores[0][0], abs=1e-4)
    assert abs(scores[0][0] - scores[1][0]) > 1e-3  # the answer counts


def test_an_answer_in_a_channel_of_its_own_is_read_without_its_thinking():
    tokenizer, question = chat_tokenizer("gpt_oss"), CHATS["one turn"][:1]
    prompt = {"input_ids": [], "messages": question, "query": "", "metadata": {}}
    responses = [tokenizer(text).input_ids for text in (
        f"{THOUGHT}<|end|><|start|>assistant<|channel|>final<|message|>Bland.<|return|>",
        "<|channel|>final<|message|>Fresh.", THOUGHT)]  # the last ends before its answer
    columns = {name: [value] * 3 for name, value in prompt.items()}
    inputs = reward_inputs(tokenizer, columns, responses, False)
    assert inputs["responses"] == ["Bland.", "Fresh.", ""]
    contents = [messages[-1]["content"] for messages in inputs["messages"]]
    assert contents == inputs["responses"]
    assert inputs["texts"][1].endswith("<|channel|>final<|message|>Fresh.<|return|>")


def test_keys_that_arrow_fills_in_do_not_reach_the_template(make_trainer):
    tokenizer = chat_tokenizer("qwen3")
    rows = [{"chosen": chat, "rejected": with_answer(chat, WORSE), **columns}
            for chat, columns in ((CHATS["tool call"], {"tools": TOOLS}), (CHATS["one turn"], {}))]
    both = make_trainer(tokenizer, rows).train_dataset
    for i, row in enumerate(rows):
        (alone,) = make_trainer(tokenizer, [row]).train_dataset["input_ids_chosen"]
        assert both[i]["input_ids_chosen"] == alone
    assert tokenizer.decode(both[0]["input_ids_chosen"]).startswith("<|im_start|>system\nTools:")


def test_thinking_that_the_template_leaves_out_is_warned_about(make_trainer, capsys):
    messages = CHATS["thinking"]
    rows = [{"chosen": messages, "rejected": with_answer(messages, answer)}
            for answer in ("<think>\nhard\n</think>\n\n5", "<think>\nhard\n</think>\n\n4")]
    with pytest.warns(UserWarning, match="leaves thinking out of a chat"):
        make_trainer(chat_tokenizer("deepseek_r1"), rows)
    assert "dropped 1 of 2 rows, row 1 the first: equal" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["llama3", "chatml", "mistral", "gemma", "gpt2"])
def test_a_reward_of_a_text_reads_the_tokens_it_was_trained_on(
        name, make_trainer, tmp_path, ids_read):
    tokenizer = chat_tokenizer(name)
    trainer = make_trainer(
        tokenizer, [{"prompt": "the plot", "chosen": " was bland.", "rejected": " was fresh."}])
    (want,) = trainer.train_dataset["input_ids_chosen"]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "the plot"}))
    (prompt,) = load_prompts(tmp_path / "prompts.jsonl", tokenizer)
    whole = tokenizer("the plot was bland.").input_ids
    assert whole[:len(prompt["input_ids"])] == prompt["input_ids"]
    response = torch.tensor(whole[len(prompt["input_ids"]):] + [tokenizer.eos_token_id])
    inputs = reward_inputs(
        tokenizer, {key: [value] for key, value in prompt.items()}, [response], False)
    assert inputs["texts"] == ["the plot was bland."]  # SentencePiece keeps the blank, too
    ids_read.clear()
    load_reward(tmp_path / "model")(**inputs)
    assert ids_read == [want]


@pytest.mark.parametrize("kind", ["max_length", "model_max_length"])
def test_a_long_chat_ends_alike_in_training_and_in_use(kind, make_trainer, tmp_path, ids_read):
    fields = {"max_length": 30} if kind == "max_length" else {}
    limit = {"model_max_length": 30} if kind == "model_max_length" else {}
    messages = CHATS["several turns"]
    trainer = make_trainer(
        chat_tokenizer("chatml", **limit),
        [{"chosen": messages, "rejected": with_answer(messages, WORSE)}], **fields)
    (want,) = trainer.train_dataset["input_ids_chosen"]
    assert len(want) == 30 and trainer.tokenizer.decode(want).endswith("I think.<|im_end|>")
    ids_read.clear()
    load_reward(tmp_path / "model")(["unused"], messages=[messages])
    assert ids_read == [want]


# ------------------------------------------------------------------------- the token that is read
TEXTS = [{"prompt": "The film: ", "chosen": "the plot was fresh", "rejected": "was it bland?"},
         {"prompt": "I say ", "chosen": "a short one", "rejected": "the acting was " * 4}]


@pytest.mark.parametrize("kind", ["chats", "texts", "texts that end"])
@pytest.mark.parametrize("name", ["llama3", "zephyr", "phi3", "chatml", "gpt2"])
def test_training_use_and_pipeline_read_one_token_even_where_the_end_token_pads(
        name, kind, make_trainer, tmp_path):
    if (name, kind) == ("gpt2", "chats"):
        pytest.skip("no template")
    tokenizer = chat_tokenizer(name)
    tokenizer.pad_token = tokenizer.eos_token
    end = tokenizer.eos_token if kind == "texts that end" else ""
    rows = [{"prompt": row["prompt"], **{side: row[side] + end for side in SIDES}}
            for row in TEXTS]
    if kind == "chats":
        rows = [{side: with_answer(CHATS["several turns"], row[side]) for side in SIDES}
                for row in TEXTS]
    trainer = make_trainer(tokenizer, rows)
    trained = scores_in_training(trainer)
    reward, folder = load_reward(tmp_path / "model"), str(tmp_path / "model")
    judge = pipeline("text-classification", folder, device="cpu")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    for side, want in zip(SIDES, trained, strict=True):
        ids = trainer.train_dataset[f"input_ids_{side}"]
        if kind == "chats":
            texts = [render_chat(tokenizer, row[side]) for row in rows]
            used = reward(texts, messages=[row[side] for row in rows])
        else:
            texts = [row["prompt"] + row[side] for row in rows]
            used = reward(texts)
        piped = judge(texts, function_to_apply="none", batch_size=2,
                      add_special_tokens=kind != "chats")
        assert [float(score) for score in used] == pytest.approx(want, abs=1e-4)
        assert [row["score"] for row in piped] == pytest.approx(want, abs=1e-4)
        with torch.no_grad():
            # read at the very last token
            last = [plain.score(plain.model(torch.tensor([row])).last_hidden_state[0, -1]).item()
                    for row in ids]
        assert want == pytest.approx(last, abs=1e-4)
    assert max(trained[0] + trained[1]) - min(trained[0] + trained[1]) > 0.1


def test_the_saved_tokenizer_pads_and_truncates_as_in_training(make_trainer, tmp_path):
    trainer = make_trainer(chat_tokenizer("gpt2", model_max_length=12), [
        {"chosen": "the plot was " + "so very " * 9 + "fresh", "rejected": "bland"}])
    saved = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert saved.pad_token == trainer.tokenizer.pad_token == "Ā"  # the byte 0
    assert saved.pad_token_id == trainer.tokenizer.pad_token_id == saved("\0").input_ids[0]
    assert trainer.model.config.pad_token_id == saved.pad_token_id
    (ids,) = trainer.train_dataset["input_ids_chosen"]
    assert len(ids) == 12 and saved.decode(ids) == "o very fresh"
    text = "the plot was " + "so very " * 9 + "fresh"
    (chosen,), _ = scores_in_training(trainer)
    for word in ("Ārija", "aĀ"):  # bytes, as before: the letter stands for the byte 0
        assert saved(word).input_ids == chat_tokenizer("gpt2")(word).input_ids
    judge = pipeline("text-classification", str(tmp_path / "model"), device="cpu")
    piped = judge(text, function_to_apply="none", truncation=True)[0]["score"]
    (used,) = load_reward(tmp_path / "model")([text])
    assert [piped, used.item()] == pytest.approx([chosen, chosen], abs=1e-4)


@pytest.mark.parametrize("pad", ["</s>", None])
def test_a_classifier_of_others_is_read_where_it_was_trained(pad, tmp_path):
    """With the end token as padding transformers reads the token before it, and so did they."""
    tokenizer = chat_tokenizer("zephyr", pad_token=pad)
    model = classifier(tokenizer).eval()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    texts = ["the plot was bland</s>", "fresh</s>"]
    with torch.no_grad():
        want = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    used = load_reward(tmp_path)(texts)
    assert [score.item() for score in used] == pytest.approx(want, abs=1e-4)


def test_an_adapter_is_read_where_it_was_trained_though_its_base_pads_with_the_end_token(
        make_trainer, tmp_path):
    from peft import LoraConfig
    tokenizer = chat_tokenizer("zephyr")
    classifier(tokenizer).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert base.config.pad_token_id == tokenizer.eos_token_id
    rows = [{side: CHATS["one turn"][:1] + [{"role": "assistant", "content": answer}]
             for side, answer in zip(SIDES, ("Fresh.", "It was bland."), strict=True)}]
    args = RewardConfig(output_dir=str(tmp_path / "out"), use_cpu=True, learning_rate=1e-3,
                        remove_unused_columns=False, gradient_checkpointing=False)
    trainer = RewardTrainer(base, args, tokenizer=tokenizer, train_dataset=Dataset.from_list(rows),
                            peft_config=LoraConfig(r=4, init_lora_weights=False))
    trainer.model.eval()
    trainer.save_model(str(tmp_path / "model"))
    (chosen,), (rejected,) = scores_in_training(trainer)
    used = load_reward(tmp_path / "model")(["", ""], messages=[rows[0][side] for side in SIDES])
    assert [score.item() for score in used] == pytest.approx([chosen, rejected], abs=1e-4)
    assert abs(chosen - rejected) > 1e-3
    # as in docs/reward.md
    folder, pad = str(tmp_path / "model"), trainer.tokenizer.pad_token_id
    judge = pipeline("text-classification", folder, tokenizer=folder, device="cpu",
                     model_kwargs={"pad_token_id": pad})
    piped = judge([render_chat(tokenizer, rows[0][side]) for side in SIDES],
                  function_to_apply="none", add_special_tokens=False)
    assert [row["score"] for row in piped] == pytest.approx([chosen, rejected], abs=1e-4)


# --------------------------------------------------------------------------- models with a limit
@pytest.mark.parametrize("pad, length", [(1, 18), (0, 19)])
def test_positions_that_padding_takes_are_not_for_a_text(pad, length, tmp_path):
    """RoBERTa counts positions from behind the one of its padding: 20 of them hold 18 tokens."""
    tokenizer = chat_tokenizer("gpt2", model_max_length=10**30, pad_token="!")
    model = classifier(tokenizer, "Roberta", max_position_embeddings=20, pad_token_id=pad).eval()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    text = "the plot was bland and long"
    ids = tokenizer(text).input_ids
    assert len(ids) > 20
    with torch.no_grad():
        want = model(torch.tensor([ids[-length:]])).logits.item()
    assert load_reward(tmp_path)([text])[0].item() == pytest.approx(want, abs=1e-5)
    args = RewardConfig(output_dir=str(tmp_path / "out"), use_cpu=True, learning_rate=1e-3,
                        remove_unused_columns=False, gradient_checkpointing=False)
    trainer = RewardTrainer(model, args, tokenizer=tokenizer, train_dataset=Dataset.from_list(
        [{"chosen": text, "rejected": text + " was"}]))
    assert trainer.train_dataset[0]["input_ids_chosen"] == ids[-length:]


def test_a_score_read_at_the_last_column_is_refused(make_trainer, tmp_path):
    tokenizer = chat_tokenizer("gemma")
    torch.manual_seed(0)
    model = transformers.XLNetForSequenceClassification(transformers.XLNetConfig(
        vocab_size=len(tokenizer), d_model=16, n_layer=1, n_head=2, d_inner=16, num_labels=1))
    with pytest.raises(InputError, match="summary_type='last'.*xlnet"):
        make_trainer(tokenizer, [{"chosen": "a", "rejected": "b"}], model)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "xlnet")
    with pytest.raises(InputError, match="summary_type='last'.*xlnet"):
        load_reward(tmp_path / "xlnet")


# ----------------------------------------------------------------------------------- the script
def test_the_script_tokenizes_in_several_processes_and_its_rows_can_be_cached(tmp_path):
    """What it maps over rows must be hashed by datasets when the script is __main__."""
    rows = [{"chosen": f"the plot was fresh {i}", "rejected": f"it was bland {i}"}
            for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["reward.py", "--dataset", "pairs.jsonl", "--dataset-num-proc", "2",
               "--max-steps", "1", "--use-cpu", "--output-dir", "out"]
    run = subprocess.run([sys.executable, ROOT / command[0], *command[1:]], cwd=tmp_path,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "hashed" not in run.stderr and "Pickl" not in run.stderr
