"""From a prompt to a response to its reward: what models read and write.

    prompts    prompt_ids: a text, chat messages or token ids -> the policy's input
    chats      render_chat: messages -> text, as the tokenizer's template writes it; tokenize_chat:
               messages -> token ids, and which of them the assistant writes
    ends       end_token_ids: the tokens that end a response
    sampling   generate: one response per prompt
    rewards    reward_inputs: what a reward reads of prompts and responses; load_reward: a function
               or a classifier, and its scores

Each section begins with these functions; what they call follows.
"""
import copy
import inspect
import math
import os
import re
import warnings
from functools import lru_cache
from itertools import takewhile

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AddedToken,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.generation import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper

from common import (
    InputError,
    batches_of_similar_length,
    explain,
    hub_arguments,
    load_function,
    number_of_positions,
    split,
)


# ----------------------------------------------------------------------------- prompts
def is_chat(prompt):
    """Return whether a prompt is a list of chat messages."""
    return isinstance(prompt, list) and len(prompt) > 0 and isinstance(prompt[0], dict)


def question_of(messages):
    """Return chat messages without a last turn of the assistant: it is for the policy to write."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def prompt_ids(tokenizer, prompt, row=None):
    """Tokenize a prompt: a text, chat messages, or token ids as they are. row: see chat_ids."""
    if isinstance(prompt, str):
        return tokenizer(prompt, verbose=False).input_ids
    if is_chat(prompt):
        return chat_ids(tokenizer, question_of(prompt), row, add_generation_prompt=True)
    return list(prompt or [])


def text_to_show(prompt):
    """Return what samples show of a prompt: its text; of a chat the last user turn or message."""
    if not is_chat(prompt):
        return prompt or ""  # a chat without messages is an empty list
    turns = [turn["content"] for turn in prompt if turn["role"] == "user"]
    return str((turns or [prompt[-1]["content"]])[-1])


# ----------------------------------------------------------------------------- chats
MARK = "\ue000"  # a character that no text has
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # around what the assistant writes


def apply_template(tokenizer, messages, row=None, **options):
    """Apply the tokenizer's chat template to messages. Raises InputError if it has none.

    row: its `tools` and `chat_template_kwargs` reach the template."""
    if tokenizer.chat_template is None:
        raise InputError("chat_template=None (tokenizer): the rows are chats; set "
                         "tokenizer.chat_template, or give texts")
    row = without_nulls({name: (row or {}).get(name) for name in ("tools", "chat_template_kwargs")})
    return tokenizer.apply_chat_template(without_nulls(messages), tools=row.get("tools"),
                                         **row.get("chat_template_kwargs", {}), **options)


def render_chat(tokenizer, messages, row=None, add_generation_prompt=False):
    """Render chat messages as text. A whole chat ends with its last special token.

    The white space that many templates write after it is never sampled."""
    text = apply_template(tokenizer, messages, row, tokenize=False,
                          add_generation_prompt=add_generation_prompt)
    stripped = text.rstrip()
    is_ended = not add_generation_prompt and stripped.endswith(special_tokens(tokenizer))
    return stripped if is_ended else text


def without_nulls(value):
    """Drop what is None from dicts, at any depth: Arrow fills in the keys that other rows have."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def special_tokens(tokenizer):
    """Return the texts of the tokenizer's special tokens, a tuple."""
    return read_special_tokens(tokenizer, len(tokenizer))


@lru_cache(maxsize=8)
def read_special_tokens(tokenizer, vocab_size):
    """Read them once: the 6,000 of Gemma 3 take longer than 50 chats.

    vocab_size is part of the cache's key, since tokens may be added."""
    return tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)


def chat_ids(tokenizer, messages, row=None, add_generation_prompt=False):
    """Return the token ids of chat messages."""
    text = render_chat(tokenizer, messages, row, add_generation_prompt)
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def join_chat(prompt, answer):
    """Return prompt and answer as one conversation, a list of messages.

    An answer that begins with the prompt's messages, or with another role than the assistant, is
    the whole conversation already. prompt: messages, the text of a user's turn, or None."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    prompt = prompt or []
    repeats = len(answer) > len(prompt) > 0 and same_messages(prompt, answer) == len(prompt)
    begins_otherwise = len(answer) > 0 and answer[0]["role"] != "assistant"
    if repeats or begins_otherwise:
        return answer
    return prompt + answer


def same_messages(first, second):
    """Count the messages with which two chats begin alike: role, text (stripped), tool calls."""
    def key(message):
        content = message.get("content") or ""
        content = content.strip() if isinstance(content, str) else content
        return message["role"], content, without_nulls(message.get("tool_calls") or [])
    pairs = zip(first, second, strict=False)
    return len(list(takewhile(lambda pair: key(pair[0]) == key(pair[1]), pairs)))


def tokenize_chat(tokenizer, messages, row=None, first=0):
    """Tokenize a chat. Returns its ids [T], and a mask [T] of what the assistant writes in it.

    The mask is 1 in the assistant's turns from message `first` on: after the generation prompt, up
    to and with the turn's end token. It is 0 for a turn that the rendered chat does not have. A
    template with {% generation %} marks itself says what the assistant writes."""
    text = render_chat(tokenizer, messages, row)
    warn_of_lost_thinking(text, messages)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    header = generation_prompt(tokenizer, row)
    turns = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
    spans = [span_of_turn(tokenizer, text, messages, i, header, row) for i in turns]
    spans = [span for span in spans if span is not None]
    is_marked = GENERATION_MARK.search(tokenizer.get_chat_template())
    if is_marked and spans:
        marks = apply_template(tokenizer, messages, row, tokenize=True, return_dict=True,
                               return_assistant_tokens_mask=True)["assistant_masks"]
        pairs = zip(marks, tokens.offset_mapping, strict=False)  # marks: also of white space behind
        return tokens.input_ids, [int(mark and end > spans[0][0]) for mark, (_, end) in pairs]
    mask = [0] * len(tokens.input_ids)
    for start, end in spans:
        warn_of_missing_end(tokenizer, text[:end])
        for t, (left, right) in enumerate(tokens.offset_mapping):
            if left < end and right > start:
                mask[t] = 1
    return tokens.input_ids, mask


def split_chat(tokenizer, prompt, answer, row=None):
    """Render a chat, and split the text where the first message of `answer` begins.

    prompt, answer: messages. The assistant writes the answer's first message."""
    messages = prompt + answer
    text = render_chat(tokenizer, messages, row)
    warn_of_lost_thinking(text, messages)
    warn_of_missing_end(tokenizer, text)
    header = generation_prompt(tokenizer, row)
    span = span_of_turn(tokenizer, text, messages, len(prompt), header, row)
    if span is None:
        raise InputError(f"chat_template (tokenizer): it leaves out the answer {answer[0]}; remove "
                         "the row, or give texts")
    return text[:span[0]], text[span[0]:]


def span_of_turn(tokenizer, whole, messages, i, header, row=None):
    """Return where the assistant's message i begins and ends in `whole`, the rendered chat.

    header: what the template writes before an answer, see generation_prompt. Templates rewrite
    earlier turns (Qwen3 drops their thinking), so the turn is looked for in the whole chat. None:
    the template leaves it out."""
    content = span_of_content(tokenizer, whole, messages, i, row)
    if content is None:
        return None
    # 1. It begins after its generation prompt. The whole chat may lack the end of that prompt, such
    #    as "<think>": try shorter beginnings of it, down to half
    start = content[0]
    previous = span_of_content(tokenizer, whole, messages, i - 1, row) if i else None
    between = whole[previous[1] if previous else 0:content[0]]
    for length in range(len(header), len(header) // 2, -1):
        place = between.rfind(header[:length])
        if place >= 0:
            start = content[0] - len(between) + place + length
            break
    if i and not header:  # the template has no generation prompt
        until_here = render_chat(tokenizer, messages[:i], row, add_generation_prompt=True)
        start = len(until_here) if whole.startswith(until_here) else start
    # 2. It ends where the chat up to here does, or with the first special token after its content
    until_here = render_chat(tokenizer, messages[:i + 1], row)
    if whole.startswith(until_here):
        return start, len(until_here)
    rest = whole[content[1]:]
    ends = [rest.find(token) + len(token) for token in special_tokens(tokenizer) if token in rest]
    return start, content[1] + min(ends, default=0)


def span_of_content(tokenizer, whole, messages, i, row=None):
    """Return where the content of message i begins and ends in `whole`, the rendered chat.

    Render the chat again with this message's texts replaced: what differs is its content. None: the
    template leaves it out."""
    changed = [*messages[:i], replace_texts(messages[i]), *messages[i + 1:]]
    other = render_chat(tokenizer, changed, row)
    if MARK not in other:
        return None
    start = len(os.path.commonprefix([whole, other]))
    end = len(os.path.commonprefix([whole[start:][::-1], other[start:][::-1]]))
    return start, len(whole) - end


def replace_texts(value, kinds=("role", "type", "id", "name", "tool_call_id")):
    """Replace the texts of a message, but not those that say what kind of message it is."""
    if isinstance(value, list):
        return [replace_texts(item, kinds) for item in value]
    if not isinstance(value, dict):
        return MARK if isinstance(value, str) else value
    replaced = {}
    for key, item in value.items():
        if key in kinds and isinstance(item, str):
            replaced[key] = item
        elif key == "function":  # the assistant writes the name of the function that it calls
            replaced[key] = replace_texts(item, kinds=())
        else:
            replaced[key] = replace_texts(item, kinds)
    return replaced


def generation_prompt(tokenizer, row=None):
    """Return what the template writes before an answer, from its first visible character on."""
    question = [{"role": "user", "content": MARK}]
    without = render_chat(tokenizer, question, row)
    prompt = render_chat(tokenizer, question, row, add_generation_prompt=True)
    return prompt[len(os.path.commonprefix([prompt, without])):].lstrip()


def warn_of_missing_end(tokenizer, text):
    """Warn of a chat whose answer ends with no special token: the model does not learn to end."""
    if not text.endswith(special_tokens(tokenizer)):
        warnings.warn("chat_template (tokenizer): it writes no end token after an answer, so the "
                      "model does not learn to end; set a template that does", stacklevel=2)


def warn_of_lost_thinking(text, messages):
    """Warn of a rendered chat without the thinking that its messages have."""
    thoughts = []
    for message in messages:
        thoughts += re.findall("<think>(.*?)</think>", str(message.get("content")), re.DOTALL)
        thoughts += [message.get("reasoning_content") or "", message.get("thinking") or ""]
    if any(thought.strip() not in text for thought in thoughts):
        warnings.warn("chat_template (tokenizer): it leaves thinking out of a chat, often that of "
                      "all turns but the last; no model reads what is left out", stacklevel=2)


# ----------------------------------------------------------------------------- ends
def end_token_ids(tokenizer, *ids):
    """Collect the ids that end a response: the tokenizer's, its chat template's, and `ids`.

    ids: one, a list or None each."""
    ends = {tokenizer.eos_token_id, chat_end_id(tokenizer)}
    for one_or_more in ids:
        ends.update(one_or_more if isinstance(one_or_more, (list, tuple)) else [one_or_more])
    return ends - {None}


def chat_end_id(tokenizer):
    """Return the special token with which the template ends an answer, or None."""
    if tokenizer.chat_template is None:
        return None
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
    rest = render_chat(tokenizer, chat).rpartition(MARK)[2].lstrip()
    ends = [token for token in special_tokens(tokenizer) if rest.startswith(token)]
    return tokenizer.convert_tokens_to_ids(max(ends, key=len)) if ends else None


def padding_token_id(tokenizer, end_ids):
    """Return a token id that ends no text: that of the pad token, BOS, ..., a null character."""
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id,
           *tokenizer("\0", add_special_tokens=False).input_ids]
    for token_id in ids:
        if token_id is not None and token_id not in end_ids:
            return token_id
    raise InputError(f"tokenizer {tokenizer.name_or_path}: each token that could pad also ends "
                     "texts; set another tokenizer.pad_token")


# ----------------------------------------------------------------------------- sampling
REFUSED = {  # argument: (the value that is allowed, why no other is)
    "return_dict_in_generate": (False, "generate returns token ids; for scores call the model's"),
    "num_return_sequences": (1, "generate gives one response per prompt; repeat the prompt"),
    "generation_config": (None, "give its settings one by one (max_new_tokens=...)"),
}


@torch.no_grad()
def generate(model, prompts, tokenizer, batch_size=4, policy_temperature=1.0, length_sampler=None,
             **kwargs):
    """Generate one response per prompt; sample it if do_sample. Returns a list of LongTensors [T].

    model: a language model, with or without a value head. prompts: a list of LongTensors
    [prompt_length]. A response ends with its first end token: the tokenizer's, the model's, or one
    of kwargs["eos_token_id"]. An encoder-decoder's begins with the decoder's start token.
    policy_temperature: of the policy softmax(logits / temperature) that is scored; sampling uses it
    too, unless kwargs gives another. length_sampler: called once per batch for max_new_tokens.
    kwargs: for the model's `generate`. Raises ValueError."""
    for name, (allowed, reason) in REFUSED.items():
        if kwargs.get(name, allowed) != allowed:
            raise ValueError(f"{name}={kwargs[name]}: {reason}")
    seq2seq = model.config.is_encoder_decoder
    language_model = getattr(model, "pretrained_model", model)
    if len({len(prompt) for prompt in prompts}) > 1:
        refuse_virtual_tokens(language_model)
    own = language_model.generation_config
    settings, kwargs = sampling_settings(own, policy_temperature, kwargs)
    end_ids = end_token_ids(tokenizer, own.eos_token_id, kwargs.get("eos_token_id"))
    fill = padding_token_id(tokenizer, end_ids)
    kwargs.update(eos_token_id=sorted(end_ids) or None, pad_token_id=fill)
    stop_fill = fill if kwargs.get("stop_strings") or kwargs.get("stopping_criteria") else None
    # positions count from the first token of a decoder's prompt, so its padding is on the left
    side = "right" if seq2seq else "left"
    if model.config.model_type == "recurrent_gemma":
        batch_size = 1  # its state reads padding
    responses = [None] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    was_training = model.training
    model.eval()
    # what is not given is filled in from the model's own config, so that one is replaced
    language_model.generation_config = settings
    try:
        for batch in split(by_length, batch_size):
            rows = [prompts[i] for i in batch]
            ids = pad_sequence(rows, True, fill, side).to(model.device)
            ones = [torch.ones_like(row) for row in rows]
            mask = pad_sequence(ones, True, 0, side).to(model.device)
            if length_sampler is not None:
                kwargs["max_new_tokens"] = length_sampler()
            output = model.generate(input_ids=ids, attention_mask=mask, **kwargs)
            if not seq2seq:
                output = output[:, ids.shape[1]:]
            for i, row in zip(batch, output, strict=True):
                responses[i] = cut_response(row, end_ids, int(seq2seq), stop_fill)
    finally:
        model.train(was_training)
        language_model.generation_config = own
        if hasattr(language_model, "peft_config"):  # PEFT hands it on to the base model
            language_model.get_base_model().generation_config = own
    return responses


def refuse_virtual_tokens(model):
    """Raise InputError for prompt tuning and P-tuning (not prefix tuning: it fills the cache)."""
    adapter = getattr(model, "active_peft_config", None)
    if adapter and adapter.is_prompt_learning and adapter.peft_type != "PREFIX_TUNING":
        raise InputError(f"peft_config={type(adapter).__name__}: padding next to its virtual "
                         "tokens changes samples and scores; use LoRA or prefix tuning")


def cut_response(response, end_ids, first, fill):
    """Cut a response [T] after its first end token at position `first` or later.

    first: 1 for an encoder-decoder, whose start token may also end texts. fill: the pad token that
    follows a stop string, which is cut off; or None."""
    tokens = response.tolist()
    for i, token in enumerate(tokens[first:], start=first):
        if token in end_ids:
            return response[:i + 1]
    length = len(tokens)
    while length > first + 1 and tokens[length - 1] == fill:
        length -= 1
    return response[:length]


HARMLESS = (  # arguments that leave the distribution of the next token as it is
    "do_sample", "num_beams", "length_penalty", "early_stopping",  # of one beam
    "max_new_tokens", "max_length", "max_time", "stop_strings",
    "stopping_criteria", "tokenizer", "streamer", "synced_gpus", "use_cache", "past_key_values",
    "cache_implementation", "cache_config", "bos_token_id", "eos_token_id", "pad_token_id",
    "decoder_start_token_id", "decoder_input_ids", *REFUSED)
RESHAPING = (  # arguments that generate applies only if it samples by itself
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
OFF = (None, False, 0, -1)  # TRL 0.7's examples write min_length=-1, top_k=0.0
OFF_AT_ONE = ("repetition_penalty", "encoder_repetition_penalty", "typical_p", "guidance_scale")


def sampling_settings(own, temperature, kwargs):
    """Return the generation config to use, and the arguments of `generate`.

    Sampling draws from softmax(logits / temperature), the policy that is scored, whatever top-k,
    beams or penalties the model's own config has. Those in kwargs are used, with a warning.
    Without do_sample responses are greedy."""
    if not kwargs.get("do_sample", own.do_sample):
        return own, kwargs
    if kwargs.get("num_beams", 1) != 1:
        raise ValueError("num_beams: a rollout is one sampled response per prompt, without beams")
    kept = ("bos_token_id", "eos_token_id", "decoder_start_token_id", "max_new_tokens",
            "max_length")
    settings = GenerationConfig(**{name: getattr(own, name) for name in kept})
    plain = {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    given = {**plain, **kwargs}
    if given["temperature"] is None:
        given["temperature"] = temperature
    given["temperature"] = float(given["temperature"])  # generate refuses an int
    names = [name for name in given if name not in HARMLESS]
    changes = {name: given[name] for name in names if not is_off(name, given[name], plain)}
    if changes:
        warnings.warn(f"responses are sampled with {changes} and scored with temperature "
                      f"{temperature} alone: ratio and KL are those of another policy",
                      stacklevel=4)
    if set(changes) & set(RESHAPING):
        return settings, given
    draw = [*(kwargs.get("logits_processor") or []), TemperatureLogitsWarper(float(temperature)),
            SampleToken()]
    kwargs = {name: value for name, value in kwargs.items() if name not in plain}
    # SampleToken leaves one token: greedy decoding takes it
    return settings, {**kwargs, "logits_processor": LogitsProcessorList(draw), "do_sample": False}


def is_off(name, value, plain):
    """Return whether an argument of `generate` has the value that changes nothing.

    plain: {name: this value} of some arguments; None changes nothing there, too."""
    if name in plain:
        return value in (plain[name], None)
    if isinstance(value, (list, tuple, dict)):
        return not value
    return value in OFF or (value == 1 and name in OFF_AT_ONE)


class SampleToken(LogitsProcessor):
    """Sample the next token by inverting the CDF, and leave no other for greedy decoding.

    torch.multinomial draws one exponential per entry of the vocabulary: a third of a rollout's
    time on CPUs."""

    def __call__(self, input_ids, scores):
        cdf = scores.softmax(dim=-1).cumsum(dim=-1)
        uniform = torch.rand_like(cdf[:, :1]) * cdf[:, -1:]
        token = torch.searchsorted(cdf, uniform, right=True).clamp_(max=scores.shape[1] - 1)
        return torch.full_like(scores, -math.inf).scatter_(1, token, 0.0)


# ----------------------------------------------------------------------------- rewards
INPUTS = ("texts", "prompts", "responses", "messages", "metadata")  # of a reward


def reward_inputs(tokenizer, prompts, responses, is_encoder_decoder):
    """Return what a reward reads of prompts and their responses (ids): a dict of lists.

    prompts: rows of `load_prompts`, as columns {name: list}. Returns
    texts: prompt and response as one text; of a chat, all of it as the template writes it, with
        the end of the response, even if sampling stopped before: classifiers learn from such;
    prompts, responses: the texts of each, see answer_opening; messages: whole conversations, or
        None where the prompt is a text; metadata: the prompts' rows."""
    answers = tokenizer.batch_decode(responses, skip_special_tokens=True)
    opening = answer_opening(tokenizer)
    texts, chats = [], []
    for i, messages in enumerate(prompts["messages"]):
        if messages is None:
            texts.append(join_text(
                tokenizer, prompts["input_ids"][i], responses[i], is_encoder_decoder))
            chats.append(None)
            continue
        if opening:
            answers[i] = text_between(tokenizer.decode(responses[i]), opening,
                                      special_tokens(tokenizer))
        thinking = re.search(r"<think>\s*$", prompts["query"][i])  # some templates begin it
        content = ((thinking.group() if thinking else "") + answers[i]).strip()
        chats.append([*messages, {"role": "assistant", "content": content}])
        texts.append(render_chat(tokenizer, chats[i], prompts["metadata"][i]))
    return {"texts": texts, "prompts": prompts["query"], "responses": answers, "messages": chats,
            "metadata": prompts["metadata"]}


def answer_opening(tokenizer):
    """Return what the template writes between generation prompt and answer, or "".

    Only if special tokens are in it: the answer's text begins behind them, as in gpt-oss, where
    thinking and answer have a channel each."""
    if tokenizer.chat_template is None:
        return ""
    question = [{"role": "user", "content": "a"}]
    prompt = render_chat(tokenizer, question, add_generation_prompt=True)
    whole = render_chat(tokenizer, [*question, {"role": "assistant", "content": MARK}])
    before, _, opening = whole.partition(MARK)[0].partition(prompt)
    has_special_tokens = any(token in opening for token in special_tokens(tokenizer))
    return opening if not before and has_special_tokens else ""


def text_between(text, opening, ends):
    """Return the text after the last `opening`, up to the first of `ends`; without opening ""."""
    rest = text.rpartition(opening)[2] if opening in text else ""
    for end in ends:
        rest = rest.partition(end)[0]
    return rest


def join_text(tokenizer, prompt, response, is_encoder_decoder):
    """Return a prompt (ids) and its response (ids) as one text."""
    if is_encoder_decoder:
        prompt = tokenizer.decode(prompt, skip_special_tokens=True)
        return f"{prompt} {tokenizer.decode(response, skip_special_tokens=True)}"
    # together: a decoder may drop the space that a text begins with
    ids = [*map(int, prompt), *map(int, response)]
    return tokenizer.decode(ids, skip_special_tokens=True)


def load_reward(name, label=None, device="cpu", **kwargs):
    """Load a reward. Returns a function of `reward_inputs` that returns a list of scalar tensors.

    name: `file.py:function`, or a sequence classifier's folder or hub name, whose score is the
    logit of its only label, or of `label` (name or number). The function returns one number per
    text. It gets those of the inputs that its arguments name (all, if it takes **kwargs); if the
    first has another name, it gets texts. kwargs: for the classifier's from_pretrained.
    Raises InputError."""
    if str(name).rpartition(":")[0].endswith(".py"):
        if label is not None:
            raise InputError(f"reward_label={label!r} (reward_model {name}): a function has no "
                             "labels; leave it out")
        score = load_function("reward_model", name)
    else:
        score = load_classifier(name, label, device, **kwargs)
    parameters = inspect.signature(score).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    takes_texts = next(iter(parameters), None) not in INPUTS

    def reward(texts, **inputs):
        first = [texts] if takes_texts else []
        inputs = inputs if takes_texts else {"texts": texts, **inputs}
        named = {name: inputs[name] for name in inputs if takes_all or name in parameters}
        with explain(f"reward_model {name} failed on {len(texts)} texts, the first: {texts[0]!r}"):
            scores = score(*first, **named)
            if isinstance(scores, dict):
                raise InputError(f"reward_model {name} returned a dict: return one number per text")
            scores = [torch.tensor(float(number)) for number in scores]
        if len(scores) != len(texts):
            raise InputError(f"reward_model {name} returned {len(scores)} scores for {len(texts)} "
                             "texts: return one per text")
        return scores

    return reward


# ----------------------------------------------------------------------------- classifiers
def classifier_ids(tokenizer, text, row=None, max_length=None):
    """Return the token ids that a classifier reads, in training and in use.

    tokenizer: that of prepare_classifier_tokenizer, which truncates on the left, since the response
    is at the end. text: a text, or the messages of a chat. row: see apply_template."""
    is_text = isinstance(text, str)
    if not is_text:
        messages, text = text, render_chat(tokenizer, text, row)
        warn_of_lost_thinking(text, messages)
    return tokenizer(text, add_special_tokens=is_text, truncation=max_length is not None,
                     max_length=max_length, verbose=False).input_ids


def prepare_classifier_tokenizer(tokenizer):
    """Return a copy that pads with a token that ends no text, and truncates on the left.

    transformers reads a decoder's score at the last token that is not the pad token: with the end
    token as padding (Llama 3, Mistral, Zephyr) it would read the token before the end."""
    tokenizer = copy.deepcopy(tokenizer)
    pad_token_id = padding_token_id(tokenizer, end_token_ids(tokenizer))
    if pad_token_id != tokenizer.pad_token_id:
        # GPT-2 writes the null character as "Ā"; single_word keeps it from matching inside words
        word = AddedToken(tokenizer.convert_ids_to_tokens(pad_token_id), single_word=True,
                          normalized=False, special=True)
        pad_token = tokenizer.added_tokens_decoder.get(pad_token_id, word)
        tokenizer.add_special_tokens({"pad_token": pad_token})
    set_truncation(tokenizer, tokenizer.model_max_length)
    return tokenizer


def set_truncation(tokenizer, max_length):
    """Keep the last max_length tokens of a text; the tokenizer is saved so."""
    settings = {"truncation_side": "left", "model_max_length": max_length}
    tokenizer.init_kwargs.update(settings)  # what save_pretrained writes
    for name, value in settings.items():
        setattr(tokenizer, name, value)


def set_classifier_padding(model, tokenizer):
    """Write the tokenizer's pad token to the config of a classifier. Raises InputError."""
    config = model.config.get_text_config()
    if getattr(config, "summary_type", None) == "last":
        raise InputError(f"summary_type='last' ({config.model_type} model): it reads the score at "
                         "the last column, which may be padding; choose another classifier")
    config.pad_token_id = tokenizer.pad_token_id


CLASSIFIER_TOKENS = 2**14  # of texts that a classifier reads at once, padding included


def load_classifier(name, label, device, **kwargs):
    """Load a sequence classifier as a function of `reward_inputs`, which returns numbers.

    It reads a chat in its own template or, if it has none, the response alone."""
    with explain(f"reward_model {name} is neither file.py:function nor a sequence classifier's "
                 "folder or hub name"):
        tokenizer = AutoTokenizer.from_pretrained(
            name, **hub_arguments(kwargs, "trust_remote_code"))
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name, output_loading_info=True, **kwargs)
        model = model.to(device).eval()
    missing = sorted(loading["missing_keys"])[:3]
    tasks = {adapter.task_type for adapter in getattr(model, "peft_config", {}).values()}
    if missing or tasks - {"SEQ_CLS", None}:  # loading a language model's adapter reports nothing
        reason = f"lacks {', '.join(missing)}" if missing else f"is for {', '.join(tasks)}"
        raise InputError(f"reward_model {name} is no trained classifier, it {reason}: its scores "
                         f"would be random; train one with reward.py --model-name {name}")
    names = {str(label_name): i for i, label_name in model.config.id2label.items()}
    labels = {**{str(i): i for i in range(model.config.num_labels)}, **names}
    if model.config.num_labels > 1 and label is None:
        raise InputError(f"reward_model {name} has {model.config.num_labels} labels: choose the "
                         f"one that is the score with --reward-label, one of {', '.join(names)}")
    if label is not None and str(label) not in labels:
        raise InputError(f"reward_label {label!r} is none of {', '.join(names)}")
    column = 0 if label is None else labels[str(label)]
    given_pad, pad_id = tokenizer.pad_token, model.config.get_text_config().pad_token_id
    tokenizer = prepare_classifier_tokenizer(tokenizer)
    if tokenizer.pad_token != given_pad and pad_id in range(len(tokenizer)):
        # a classifier of others: keep the pad token it was trained with, even if it ends texts
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    set_classifier_padding(model, tokenizer)
    longest = min(number_of_positions(model), tokenizer.model_max_length)

    def ids_of(text, response, messages, row):
        if messages and tokenizer.chat_template is None:
            return classifier_ids(tokenizer, response, max_length=longest)
        return classifier_ids(tokenizer, messages or text, row, longest)

    @torch.inference_mode()
    def score(texts, responses=None, messages=None, metadata=None):
        nothing = [None] * len(texts)
        rows = zip(texts, responses or nothing, messages or nothing, metadata or nothing,
                   strict=True)
        ids = [ids_of(*row) for row in rows]
        scores = torch.empty(len(ids))
        for batch in batches_of_similar_length([len(row) for row in ids], CLASSIFIER_TOKENS):
            # padded on the right: GPT-2 classifiers count positions from the first column
            inputs = tokenizer.pad({"input_ids": [ids[i] for i in batch]}, padding_side="right",
                                   return_tensors="pt").to(device)
            scores[batch] = model(**inputs).logits[:, column].float().cpu()
        return scores.tolist()

    return score
