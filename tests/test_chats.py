"""Chats: what is in the loss, where a prompt ends, what ends a response; templates of today."""
import warnings

import pytest
import torch
from conftest import hf_model
from datasets import Dataset
from templates import CHATS, NO_END, NO_SYSTEM, TEMPLATES, chat_tokenizer

import chats
import machinery
from common import InputError
from sft import IGNORE, SFTConfig, SFTTrainer, encode

END = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>", "zephyr": "</s>",
       "deepseek_r1": "<|end|>", "glm4": "", "phi3": "<|end|>", "gpt_oss": "<|end|>"}
# the generation prompt of the second ends with "<think>\n", whose newline and the next are a token
NO_THOUGHT = {"qwen3": "<think>\n\n</think>\n\n", "qwen3_thinking": "\n\n</think>\n\n"}


def trained_text(tokenizer, ids, mask):
    """The runs of tokens under the mask, as texts."""
    runs, last = [], 0
    for token, m in zip(ids, mask, strict=True):
        if m:
            runs += [] if last else [[]]
            runs[-1].append(token)
        last = m
    return [tokenizer.decode(run) for run in runs]


def expected(name, chat):
    """What the assistant writes: the contents, behind what opens the last, each with its end."""
    opening = "<|channel|>final<|message|>" if name == "gpt_oss" else ""
    texts = [opening + turn["content"].strip() + END.get(name, "<|im_end|>") for turn in chat
             if turn["role"] == "assistant"]
    texts[-1] = NO_THOUGHT.get(name, "") + texts[-1]
    if name == "phi3":
        texts[-1] += "\n<|endoftext|>"
    if name == "gpt_oss":
        texts[-1] = texts[-1].replace("<|end|>", "<|return|>")
    return texts


@pytest.mark.filterwarnings("ignore:chat_template")
@pytest.mark.parametrize("kind", ["one turn", "several turns"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_assistant_s_turns_and_their_ends_are_in_the_loss(name, kind):
    chat = CHATS[kind]
    if name in NO_SYSTEM and chat[0]["role"] == "system":
        chat = chat[1:]
    tokenizer = chat_tokenizer(name)
    ids, mask = chats.tokenize_chat(tokenizer, chat)
    whole = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert ids == whole[:len(ids)] and not tokenizer.decode(whole[len(ids):]).strip()
    got = [text.lstrip(" ") for text in trained_text(tokenizer, ids, mask)]
    assert got == expected(name, chat)


@pytest.mark.filterwarnings("ignore:chat_template")
@pytest.mark.parametrize("name", sorted({*TEMPLATES} - {"deepseek_r1", "qwen3_thinking"}))
def test_the_loss_begins_where_sampling_does(name):
    """But for generation prompts that open a thinking which this answer lacks."""
    chat, tokenizer = CHATS["one turn"], chat_tokenizer(name)
    ids, mask = chats.tokenize_chat(tokenizer, chat)
    prompt = chats.chat_ids(tokenizer, chat[:-1], add_generation_prompt=True)
    assert mask.index(1) == len(prompt) and ids[:len(prompt)] == prompt


@pytest.mark.parametrize("name, want", [
    ("qwen3", ["2<|im_end|>", "<think>\nharder\n</think>\n\n4<|im_end|>"]),
    ("qwen3_thinking", ["2<|im_end|>", "harder\n</think>\n\n4<|im_end|>"]),
    ("chatml", ["<think>\neasy\n</think>\n\n2<|im_end|>",
                "<think>\nharder\n</think>\n\n4<|im_end|>"])])
def test_thinking_is_in_the_loss_where_the_template_keeps_it_and_its_loss_is_said(name, want):
    tokenizer = chat_tokenizer(name)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ids, mask = chats.tokenize_chat(tokenizer, CHATS["thinking"])
    assert trained_text(tokenizer, ids, mask) == want
    assert any("thinking" in str(w.message) for w in seen) == (name != "chatml")


def test_a_chat_may_begin_with_the_assistant_and_answer_twice():
    tokenizer = chat_tokenizer("chatml")
    chat = [{"role": "assistant", "content": "Hello."}, *CHATS["one turn"],
            {"role": "assistant", "content": "And long."}]
    got = trained_text(tokenizer, *chats.tokenize_chat(tokenizer, chat))
    assert got == ["Hello.<|im_end|>", "The plot was bland.<|im_end|>", "And long.<|im_end|>"]


def test_a_tool_call_is_in_the_loss_and_the_tools_are_in_the_prompt():
    tokenizer = chat_tokenizer("chatml")
    row = {"tools": [{"type": "function", "function": {"name": "weather", "strict": None}}]}
    ids, mask = chats.tokenize_chat(tokenizer, CHATS["tool call"], row)
    (text,) = trained_text(tokenizer, ids, mask)
    assert text == ('<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
                    "<|im_end|>")
    assert '{"name": "weather"}' in tokenizer.decode(ids).replace(text, "")
    assert "strict" not in tokenizer.decode(ids)


def test_a_call_of_a_function_without_arguments_is_in_the_loss():
    tokenizer = chat_tokenizer("qwen3")
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    (text,) = trained_text(tokenizer, *chats.tokenize_chat(
        tokenizer, [{"role": "user", "content": "What time is it?"}, answer]))
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>'
    assert text == "<think>\n\n</think>\n\n" + call


def test_arrow_s_nulls_and_template_arguments():
    tokenizer = chat_tokenizer("qwen3")
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    talks = [CHATS["one turn"], [CHATS["one turn"][0], {"role": "assistant", "tool_calls": [call]}]]
    arrow = Dataset.from_list([{"messages": chat} for chat in talks])
    for chat, row in zip(talks, arrow, strict=True):
        want = chats.tokenize_chat(tokenizer, chat)
        assert chats.tokenize_chat(tokenizer, row["messages"]) == want
    row = {"chat_template_kwargs": {"enable_thinking": False}}
    prompt = chats.chat_ids(tokenizer, talks[0][:1], row, add_generation_prompt=True)
    assert tokenizer.decode(prompt).endswith("assistant\n<think>\n\n</think>\n\n")
    text = chats.tokenize_chat(tokenizer, talks[0], row)
    assert trained_text(tokenizer, *text) == ["The plot was bland.<|im_end|>"]


def test_marks_of_the_template_win_and_earlier_answers_of_a_prompt_are_not_in_the_loss():
    for name in ("chatml_marked", "llama3"):
        tokenizer, chat = chat_tokenizer(name), CHATS["several turns"]
        ids, mask = chats.tokenize_chat(tokenizer, chat, first=4)
        (text,) = trained_text(tokenizer, ids, mask)
        assert text.startswith("It was slightly fresh, I think.<|") and text.count("<|") == 1


def test_a_template_without_end_is_warned_about():
    for name in TEMPLATES:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            chats.tokenize_chat(chat_tokenizer(name), CHATS["one turn"])
        assert any("no end token" in str(w.message) for w in seen) == (name in NO_END)


# ----------------------------------------------------------------------------- sft's rows
def test_a_pair_of_chats_is_its_whole_conversation_with_the_completion_in_the_loss():
    tokenizer, chat = chat_tokenizer("qwen3"), CHATS["several turns"]
    whole = chats.tokenize_chat(tokenizer, chat, first=4)
    want = [token if m else IGNORE for token, m in zip(*whole, strict=True)]
    for row in ({"prompt": chat[:4], "completion": chat[4:]},
                {"prompt": chat[:4], "completion": chat[4]["content"]},
                {"prompt": chat[:4], "completion": chat}):
        assert encode(row, tokenizer) == (whole[0], want)


@pytest.mark.parametrize("name", ["llama3", "gemma"])
def test_a_chat_rendered_to_text_has_one_bos(name):
    tokenizer, chat = chat_tokenizer(name), CHATS["one turn"]
    text = chats.render_chat(tokenizer, chat)
    ids, _ = encode({"text": text}, tokenizer)
    assert ids.count(tokenizer.bos_token_id) == 1
    want = chats.chat_ids(tokenizer, chat)
    assert ids[:len(want)] == want
    prompt = chats.render_chat(tokenizer, chat[:1], add_generation_prompt=True)
    ids, _ = encode({"prompt": prompt, "completion": "Good."}, tokenizer)
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_sentencepiece_completion_has_the_blanks_of_its_text():
    tokenizer = chat_tokenizer("mistral")
    for prompt, completion in (("The plot was ", "bland"), ("The plot was", " bland")):
        ids, labels = encode({"prompt": prompt, "completion": completion}, tokenizer)
        assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + completion
        assert ids[:-1] == tokenizer(prompt + completion).input_ids
        text = tokenizer.decode([label for label in labels if label != IGNORE])
        assert text.strip() == "bland</s>"


def make_sft(tmp_path, tokenizer, rows, **settings):
    model = hf_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    config = SFTConfig(str(tmp_path / "sft"), use_cpu=True, **settings)
    return SFTTrainer(model, config, tokenizer=tokenizer, train_dataset=Dataset.from_list(rows))


def test_rows_cut_or_dropped_are_counted_with_the_first_number(tmp_path, capsys):
    question = CHATS["one turn"][:1]
    rows = [{"messages": CHATS["one turn"]}, {"messages": question}, {"messages": []},
            {"messages": CHATS["several turns"]}]
    trainer = make_sft(tmp_path, chat_tokenizer("llama3"), rows, assistant_only_loss=True,
                       max_seq_length=70)
    out = capsys.readouterr().out
    assert "train_dataset: truncated 1 of 4 rows, row 3 the first: longer than" in out
    assert "train_dataset: dropped 2 of 4 rows, row 1 the first: no token in the loss" in out
    assert len(trainer.train_dataset) == 2
    last = trainer.train_dataset[1]["input_ids"]
    assert len(last) == 70 and last[-1] != trainer.tokenizer.eos_token_id


@pytest.mark.parametrize("packing", [False, True])
def test_the_end_of_a_chat_s_answers_is_one_of_the_saved_model_s(packing, tmp_path):
    tokenizer = chat_tokenizer("gemma")  # its EOS is not what ends a turn
    trainer = make_sft(tmp_path, tokenizer, [{"messages": CHATS["one turn"]}] * 2, packing=packing,
                       max_seq_length=30)
    trainer.save_model(str(tmp_path / "out"))
    saved = type(trainer.model).from_pretrained(tmp_path / "out").generation_config.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<end_of_turn>") in saved


# ----------------------------------------------------------------------------- prompts, responses
def test_a_chat_that_is_too_long_is_dropped_and_keeps_its_generation_prompt(tmp_path, capsys):
    tokenizer = chat_tokenizer("chatml")
    rows = Dataset.from_list([{"messages": CHATS[kind]} for kind in ("several turns", "one turn")])
    rows.save_to_disk(tmp_path / "rows")
    limit = len(chats.chat_ids(tokenizer, CHATS["one turn"][:1], add_generation_prompt=True))
    (row,) = machinery.load_prompts(tmp_path / "rows", tokenizer, max_length=limit)
    assert (f"dropped 1 of 2 rows, row 0 the first: chats longer than max_query_length={limit} "
            "tokens") in capsys.readouterr().out
    assert row["query"].endswith("<|im_start|>assistant\n")
    with pytest.raises(InputError, match="max_query_length"):
        machinery.load_prompts(tmp_path / "rows", tokenizer, max_length=limit - 1)


@pytest.mark.parametrize("name, end", [
    ("llama3", "<|eot_id|>"), ("chatml", "<|im_end|>"), ("gemma", "<end_of_turn>"),
    ("phi3", "<|end|>"), ("mistral", "</s>"), ("gpt_oss", "<|return|>"), ("glm4", None),
    ("gpt2", None)])
def test_a_response_ends_with_the_template_s_token(name, end):
    tokenizer = chat_tokenizer(name)
    got = chats.chat_end_id(tokenizer)
    assert got == (end and tokenizer.convert_tokens_to_ids(end))


class Always(torch.nn.Module):
    """A head whose most likely token is always the same."""

    def __init__(self, head, token):
        super().__init__()
        self.weight, self.token, self.calls = head.weight, token, 0

    def forward(self, hidden):
        self.calls += 1
        logits = torch.zeros(*hidden.shape[:-1], len(self.weight))
        logits[..., self.token] = 1.0
        return logits


def test_sampling_stops_at_an_end_that_only_the_template_knows():
    tokenizer = chat_tokenizer("gemma")
    model = hf_model("llama", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = None
    head = Always(model.get_output_embeddings(), chats.chat_end_id(tokenizer))
    model.set_output_embeddings(head)
    (response,) = chats.generate(model, [torch.tensor([9, 10])], tokenizer, do_sample=False,
                                 max_new_tokens=20)
    assert response.tolist() == [head.token] and head.calls == 1


@pytest.mark.parametrize("name", ["gemma", "zephyr", "gpt2"])
def test_a_response_that_something_else_ends_gets_no_end_token(name):
    tokenizer = chat_tokenizer(name)
    model = hf_model("llama", vocab_size=len(tokenizer))
    prompts = [torch.tensor([9, 10]), torch.tensor([11, 12, 13])]
    full = chats.generate(model, prompts, tokenizer, do_sample=False, max_new_tokens=6)

    def one_stops(input_ids, scores, **kwargs):  # the first row after two tokens, the other never
        width = input_ids.shape[1]
        return torch.tensor([width >= 5, False])

    cut = chats.generate(model, prompts, tokenizer, do_sample=False, max_new_tokens=6,
                         stopping_criteria=[one_stops])
    assert cut[0].tolist() == full[0].tolist()[:2] and cut[1].tolist() == full[1].tolist()
