"""Small chat templates with the habits of today's models, and tiny tokenizers for them.

    tokenizer = chat_tokenizer("llama3")
    tokenizer.apply_chat_template(CHATS["one turn"], tokenize=False)

TEMPLATES: name -> template. No network; nothing is read from disk."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as splits
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

TOOLS = """\
{%- if tools %}{{ 'Tools:\\n' }}{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}\
{%- endif %}"""
CALLS = """\
{%- for call in message.tool_calls or [] %}{% set call = call.function or call %}
    {{- '\\n' if message.content or not loop.first }}
    {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
    {{- call.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor %}"""

# BOS in the template, header ids, contents trimmed; no pad token
LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

# ChatML of SmolLM2 and Qwen2.5: a system prompt by default, a newline behind each end, tools
CHATML = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful AI assistant.<|im_end|>\\n' }}
{%- endif %}
{%- if tools %}{{ '<|im_start|>system\\n' }}""" + TOOLS + """{{ '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
    """ + CALLS + """
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# the same with marks around what the assistant writes
CHATML_MARKED = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# thinking is dropped from all turns but the last, which always has a block, if only an empty one;
# enable_thinking=False puts the empty block into the generation prompt
QWEN3 = """\
{%- if tools %}{{ '<|im_start|>system\\n' }}""" + TOOLS + """{{ '<|im_end|>\\n' }}{% endif %}
{%- set last = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content or '' %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- set thinking = message.reasoning_content or '' %}
        {%- if not thinking and '</think>' in content %}
            {%- set thinking = content.split('</think>')[0].rstrip('\\n') %}
            {%- set thinking = thinking.split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > last.question and (loop.last or thinking) %}
            {{- '<think>\\n' + thinking.strip('\\n') + '\\n</think>\\n\\n' }}
            {%- set content = content.lstrip('\\n') %}
        {%- endif %}
    {%- endif %}
    {{- content }}
    """ + CALLS + """
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

# Qwen3-Thinking, Qwen3.5: the generation prompt opens the thinking
QWEN3_THINKING = QWEN3[:QWEN3.rindex("{%- if add_generation_prompt")] + """\
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"""

# DeepSeek-R1's distilled models: no newline, thinking dropped from every answer, and opened in the
# generation prompt
DEEPSEEK_R1 = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{{ message.content }}{% endif %}
    {%- if message.role == 'user' %}{{ '<|User|>' + message.content }}{% endif %}
    {%- if message.role == 'assistant' %}
        {{- '<|Assistant|>' + message.content.split('</think>')[-1] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"""

# no system message, roles alternate, the assistant is called model
GEMMA = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/...') }}
    {%- endif %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

# the end of the turn, and behind the last one the end of the text, which pads
PHI3 = """\
{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

# brackets instead of roles; nothing is written before an answer but a blank
MISTRAL = """\
{{- bos_token }}
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- set turns = messages[1:] if system else messages %}
{%- for message in turns %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/...') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {%- set before = system + '\\n\\n' if system and loop.last else '' %}
        {{- '[INST] ' + before + message.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}"""

# roles are plain text, EOS ends every turn and pads
ZEPHYR = """\
{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

# answers end in nothing: the next role ends them
GLM4 = """\
{{- '[gMASK]<sop>' }}
{%- for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

# thinking and answer have a channel each, and the last answer an end of its own
GPT_OSS = """\
{%- for message in messages %}
    {{- '<|start|>' + message.role }}
    {%- if message.role == 'assistant' %}{{ '<|channel|>final' }}{% endif %}
    {%- set is_answer = loop.last and message.role == 'assistant' %}
    {{- '<|message|>' + message.content + ('<|return|>' if is_answer else '<|end|>') }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

TEMPLATES = {
    "llama3": LLAMA3, "chatml": CHATML, "chatml_marked": CHATML_MARKED, "qwen3": QWEN3,
    "qwen3_thinking": QWEN3_THINKING, "deepseek_r1": DEEPSEEK_R1, "gemma": GEMMA, "phi3": PHI3,
    "mistral": MISTRAL, "zephyr": ZEPHYR, "glm4": GLM4, "gpt_oss": GPT_OSS,
}
NO_SYSTEM = ("gemma",)  # templates that refuse a system message
THINKING = ("qwen3", "qwen3_thinking")  # templates that keep the last answer's thinking
NO_END = ("glm4",)  # templates without an end token
TOOL_CALLS = ("chatml", "qwen3", "qwen3_thinking")  # templates that write tool calls


def _turn(role, content, **more):
    return {"role": role, "content": content, **more}


CHATS = {
    "one turn": [_turn("user", "How was the film?"), _turn("assistant", "The plot was bland.")],
    "several turns": [
        _turn("system", "Be kind."), _turn("user", " Hello! "), _turn("assistant", "Good day."),
        _turn("user", "And the acting?"), _turn("assistant", "It was slightly fresh, I think.")],
    "thinking": [
        _turn("user", "1 + 1?"), _turn("assistant", "<think>\neasy\n</think>\n\n2"),
        _turn("user", "2 + 2?"), _turn("assistant", "<think>\nharder\n</think>\n\n4")],
    "tool call": [
        _turn("user", "Weather in Oslo?"),
        _turn("assistant", "", tool_calls=[{"type": "function", "function": {
            "name": "weather", "arguments": {"city": "Oslo"}}}])],
}

# name: special tokens in the order of their ids, then the roles of some, and what begins a text
_SPECIAL = {
    "llama3": (["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
                "<|end_header_id|>", "<|eot_id|>"],
               {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
               "<|begin_of_text|>"),
    "chatml": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
               {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
                "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}, ""),
    "qwen3": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
              {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, ""),
    "deepseek_r1": (["<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>"],
                    {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|end|>"},
                    "<|begin|>"),
    "gemma": (["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
              {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
               "unk_token": "<unk>"}, "<bos>"),
    "phi3": (["<unk>", "<s>", "<|endoftext|>", "<|end|>", "<|system|>", "<|user|>",
              "<|assistant|>"],
             {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
              "unk_token": "<unk>"}, ""),
    "mistral": (["<unk>", "<s>", "</s>", "[INST]", "[/INST]"],
                {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, "<s>"),
    "zephyr": (["<unk>", "<s>", "</s>"],
               {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>",
                "unk_token": "<unk>"}, "<s>"),
    "glm4": (["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"],
             {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}, "[gMASK]<sop>"),
    "gpt_oss": (["<|endoftext|>", "<|return|>", "<|channel|>", "<|start|>", "<|end|>",
                 "<|message|>"],
                {"eos_token": "<|return|>", "pad_token": "<|endoftext|>"}, ""),
    "gpt2": (["<|endoftext|>"],
             {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
              "unk_token": "<|endoftext|>"}, ""),
}
_SPECIAL["chatml_marked"] = _SPECIAL["qwen3_thinking"] = _SPECIAL["qwen3"]
SENTENCEPIECE = ("gemma", "phi3", "mistral", "zephyr")


def chat_tokenizer(name, **changes):
    """Make a tiny tokenizer with the template TEMPLATES[name] and that family's special tokens.

    "gpt2": one without a template, whose only special token is BOS, EOS and UNK. changes: other
    arguments of PreTrainedTokenizerFast, such as pad_token or model_max_length (512)."""
    special, roles, prefix = _SPECIAL[name]
    core = _sentencepiece(special) if name in SENTENCEPIECE else _byte_level(special)
    core.add_special_tokens(special)
    if name in THINKING or name == "deepseek_r1":  # added tokens, but not special ones
        core.add_tokens([AddedToken(word, normalized=False) for word in ("<think>", "</think>")])
    if prefix:
        first = [token for token in special if token in prefix]
        core.post_processor = TemplateProcessing(
            single=[*first, "$A"],
            special_tokens=[(token, core.token_to_id(token)) for token in first])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=TEMPLATES.get(name), name_or_path=name,
        clean_up_tokenization_spaces=False, **{"model_max_length": 512, **roles, **changes})


def _byte_level(special):
    """Bytes and a few merges, split as Llama 3 and Qwen do: newlines join what is before them."""
    merges = [("Ċ", "Ċ"), (".", "Ċ"), ("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e"), ("a", "s"),
              ("Ġ", "w"), ("Ġw", "as")]
    tokens = [*special, *sorted(splits.ByteLevel.alphabet()), *map("".join, merges)]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    core.pre_tokenizer = splits.Sequence([
        splits.Split(Regex(words), "isolated"),
        splits.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    return core


def _sentencepiece(special):
    """Characters and a few merges; "▁" is a blank, and begins a text; newlines are bytes."""
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("a", "s"), ("▁", "w"), ("▁w", "as")]
    letters = ["▁", *(chr(i) for i in range(33, 127))]
    tokens = [*special, *(f"<0x{i:02X}>" for i in range(256)), *letters, *map("".join, merges)]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges,
                                unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = splits.Metaspace("▁", prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    return core
