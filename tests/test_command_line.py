"""The command line of the six scripts, each started as a user starts it, up to its main.

    python -m pytest -q tests/test_command_line.py
"""
import dataclasses
import errno
import functools
import gc
import io
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import weakref
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import tyro
from torch import distributed
from transformers import TrainingArguments

import ddpo
import dpo
import iterative_sft
import machinery
import ppo
import reward
import sft
from common import InputError

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {
    "sft": sft.SFTConfig,
    "reward": reward.RewardConfig,
    "ppo": ppo.PPOConfig,
    "dpo": dpo.DPOConfig,
    "ddpo": ddpo.DDPOConfig,
    "iterative_sft": iterative_sft.IterativeSFTConfig,
}
MODULES = {
    "sft": sft,
    "reward": reward,
    "ppo": ppo,
    "dpo": dpo,
    "ddpo": ddpo,
    "iterative_sft": iterative_sft,
}
PAGES = ["README.md", "docs/first_session.ipynb",
         *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]
KNOWN_AT_RUN_TIME = {"world_size", "is_encoder_decoder", "is_peft_model", "backward_batch_size",
                     "global_backward_batch_size", "global_batch_size"}
every_script = pytest.mark.parametrize("script", CONFIGS)


class Parsed(BaseException):
    """Raised with the config, where a script's main would begin."""


def start(script, *flags):
    """Run `python SCRIPT.py FLAGS` in this process -> status, stdout, stderr of a shell."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
        patch.setenv("COLUMNS", "200")
        try:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    if isinstance(status, str):  # what Python prints of sys.exit("text")
        return 1, out.getvalue(), err.getvalue() + status + "\n"
    return status, out.getvalue(), err.getvalue()


def parse(script, *flags):
    """-> the config that the script's main would get from these flags."""
    cli = tyro.cli

    def stop(*args, **kwargs):
        raise Parsed(cli(*args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tyro, "cli", stop)
        try:
            status, out, err = start(script, *flags)
        except Parsed as parsed:
            return parsed.args[0]
    pytest.fail(
        f"{script}.py {shlex.join(map(str, flags))} does not parse (status {status}):\n{out}{err}"
    )


# --------------------------------------------------------------------------------------------- help
@functools.cache
def help_page(script):
    """Read `--help` without a network -> the description, {"--flag": its text, but the default}."""

    def refuse(*args, **kwargs):
        raise AssertionError("--help asked the network")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        status, out, err = start(script, "--help")
    assert status == 0 and not err
    lines = [line.strip("│╭╰").rstrip() for line in out.splitlines()]
    first = next(i for i, line in enumerate(lines) if line.lstrip().startswith("-h"))
    indent = lines[first].index("-h")
    options, flags = {}, []
    for line in lines[first:]:
        if not line.strip() or line.startswith("─"):  # the end of the table
            break
        text = line[indent:]
        if not text.startswith(
            " "
        ):  # flags and their type; where they are short, the text follows on the same line
            words, _, text = text.partition("  ")
            flags = re.findall(r"--[a-z0-9-]+", words) or flags
        for flag in flags:
            options[flag] = f"{options.get(flag, '')} {text.strip()}".strip()
    description = " ".join(lines[1:first - 1])
    return description, {
        flag: re.sub(r" ?\((default|required).*", "", text) for flag, text in options.items()
    }


def flag_of(name):
    return "--" + name.replace("_", "-")


@every_script
def test_help_describes_the_script_and_each_of_its_options_without_a_network(script):
    description, options = help_page(script)
    purpose = MODULES[script].main.__doc__.split(".")[0]
    assert " ".join(purpose.split()) in " ".join(description.split()) and len(options) > 50
    assert all(options.values()), [flag for flag, text in options.items() if not text]
    trainers = {
        field.name for field in dataclasses.fields(TrainingArguments)
    }  # whose sentences are not ours
    for name in (
        {field.name for field in dataclasses.fields(CONFIGS[script])} - trainers - absent(script)
    ):
        assert options[flag_of(name)].endswith((".", ")")), f"{name}: {options[flag_of(name)]}"


def names(config):
    return {field.name for field in dataclasses.fields(config)}


def absent(script):
    """-> the fields of the config that `--help` does not list."""
    names = {field.name for field in dataclasses.fields(CONFIGS[script]) if field.init}
    return {name for name in names if flag_of(name) not in help_page(script)[1]}


@every_script
def test_help_lists_every_field_but_those_that_are_known_at_run_time(script):
    """The documented fields that no user sets: PPO's sizes over all ranks, and the model's kind."""
    retired = set(machinery.RETIRED)
    hidden = {"ppo": KNOWN_AT_RUN_TIME, "reward": retired, "ddpo": {"train_times_per_pass"},
              "sft": retired | names(machinery.SFTArguments), "iterative_sft": retired,
              "dpo": retired | names(machinery.DPOArguments) | {"share_prompts"}}
    known = hidden.get(script, set())
    assert (
        absent(script) - {"parallelism_config"} == known
    )  # Trainer's own, a command rather than an option


@pytest.mark.parametrize("name", sorted(KNOWN_AT_RUN_TIME))
def test_a_value_that_is_known_at_run_time_can_not_be_given(name):
    status, _, err = start("ppo", flag_of(name), 3)
    assert status != 0 and flag_of(name) in err and "Traceback" not in err


@pytest.mark.parametrize("script", ["sft", "reward", "dpo", "iterative_sft"])
def test_the_configs_on_trainer_take_the_names_of_transformers_4(script, tmp_path):
    config = CONFIGS[script](output_dir=str(tmp_path), evaluation_strategy="steps", eval_steps=5,
                             warmup_ratio=0.1, no_cuda=True, group_by_length=True, report_to=None)
    assert (config.eval_strategy, config.warmup_steps, config.use_cpu) == ("steps", 0.1, True)
    assert config.train_sampling_strategy == "group_by_length" and config.report_to == []
    with pytest.raises(InputError, match="logging_dir='x'.*TENSORBOARD_LOGGING_DIR"):
        CONFIGS[script](output_dir=str(tmp_path), logging_dir="x")


# ------------------------------------------------------------------------------ documented commands
def read_page(page):
    """The text of a page, or of the cells of a notebook."""
    text = (ROOT / page).read_text()
    if page.endswith(".md"):
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])


def commands(text):
    """The shell commands of a page's ```bash blocks -> lists of words; a patched one is whole."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    parts = [part for line in lines
             for part in ([line] if "git apply" in line else line.split("&&"))]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def script_and_flags(words):
    """`torchrun sft.py --bf16` -> ("sft", ["--bf16"]), or None of a command of another program."""
    place = next(
        (i for i, word in enumerate(words) if word in {f"{script}.py" for script in CONFIGS}), None
    )
    return None if place is None else (words[place][:-3], words[place + 1:])


def parses(script, flags):
    return help_page(script) if flags == ["--help"] else parse(script, *flags)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_runs_a_file_that_is_there_and_parses(page):
    text = read_page(page)
    inline = [shlex.split(code) for code in re.findall(r"`((?:python|torchrun) [^`]*)`", text)]
    found = {tuple(words): script_and_flags(words) for words in commands(text) + inline}
    assert any(found.values()) or page[5:-3] not in CONFIGS
    for words, ours in found.items():
        if ours and words[0] == "git":  # the patch may bring a value of its own
            assert {word for word in ours[1] if word[:2] == "--"} <= set(help_page(ours[0])[1])
        elif ours:
            parses(*ours)
        elif words[0] == "python" and words[1] != "-m":
            code = (ROOT / words[1]).read_text()
            flags = [word[2:].replace("-", "_") for word in words if word[:2] == "--"]
            assert [flag for flag in flags if flag not in code] == [], words
        files = [word.split(":")[0] for word in words if re.match("(docs|tests|toy)/", word)]
        assert [file for file in files if not (ROOT / file).exists()] == [], words


@every_script
def test_every_command_of_a_file_s_docstring_parses(script):
    lines = [line.strip().split("   ")[0] for line in MODULES[script].__doc__.splitlines()]
    found = [
        script_and_flags(shlex.split(line))
        for line in lines
        if line.startswith(("python ", "torchrun "))
    ]
    assert found and all(name == script for name, _ in found)
    for _, flags in found:
        parses(script, flags)


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_in_the_text_of_a_page_is_an_option_and_takes_the_value_beside_it(page):
    """`--lora-r 16` has to parse; `--lora-r` alone, as a sentence's subject, to be an option."""
    scripts = [page[5:-3]] if page[5:-3] in CONFIGS else list(CONFIGS)
    files = [path for path in (ROOT / "docs").rglob("*") if path.suffix in (".py", ".patch")]
    brought = "".join(path.read_text() for path in files)  # options of docs/, and of the forks
    snippets = {
        tuple(shlex.split(code)) for code in re.findall(r"`(--[^`]*)`", read_page(page))
    }
    for words in snippets:
        known = [script for script in scripts if words[0] in help_page(script)[1]]
        is_brought = re.search(rf"\b{words[0][2:].replace('-', '[-_]')}\b", brought)
        assert known or is_brought, f"{page}: {words[0]}"
        if known and len(words) > 1:
            parses(known[0], list(words))


@every_script
def test_a_flag_changes_its_own_field_alone(script):
    config = parse(script)
    given = parse(script, "--seed", 7)
    names = [field.name for field in dataclasses.fields(config)]
    assert set(names) >= {field.name for field in dataclasses.fields(CONFIGS[script])}
    assert [name for name in names if getattr(given, name) != getattr(config, name)] == [
        "seed"
    ] and given.seed == 7


# --------------------------------------------------------------------------- defaults by the model
TEXT_SCRIPTS = ("sft", "reward", "ppo", "dpo", "iterative_sft")
TOY_DEFAULTS = {  # what the default runs of docs/ are made with
    "sft": dict(num_train_epochs=8, per_device_train_batch_size=32, gradient_accumulation_steps=1,
                per_device_eval_batch_size=64, activation_checkpointing=False),
    "reward": dict(num_train_epochs=16, weight_decay=1, per_device_train_batch_size=64,
                   gradient_accumulation_steps=1, per_device_eval_batch_size=64,
                   activation_checkpointing=False),
    "ppo": dict(mini_batch_size=1, batch_size=256, steps=20000, max_new_tokens=24,
                generation_batch_size=256, learning_rate=1e-5),
    "dpo": dict(beta=3, num_train_epochs=8, per_device_train_batch_size=32,
                gradient_accumulation_steps=1, per_device_eval_batch_size=64,
                activation_checkpointing=False),
    "iterative_sft": dict(learning_rate=1e-4, num_train_epochs=80, max_new_tokens=24,
                          per_device_train_batch_size=32, gradient_accumulation_steps=1,
                          per_device_eval_batch_size=8, generation_batch_size=256,
                          activation_checkpointing=False),
    "ddpo": dict(num_epochs=50, sample_num_steps=20, sample_batch_size=16, train_batch_size=8,
                 train_gradient_accumulation_steps=1, lora_r=4, lora_alpha=16),
}
OWN_DEFAULTS = {  # a model of a billion parameters fits a card of 24 GB
    "sft": dict(num_train_epochs=2, per_device_train_batch_size=2, gradient_accumulation_steps=16,
                per_device_eval_batch_size=8, activation_checkpointing=True),
    "reward": dict(num_train_epochs=1, weight_decay=0, per_device_train_batch_size=8,
                   gradient_accumulation_steps=8, per_device_eval_batch_size=8,
                   activation_checkpointing=True),
    "ppo": dict(mini_batch_size=8, batch_size=256, max_new_tokens=128, generation_batch_size=64,
                learning_rate=1e-5),
    "dpo": dict(beta=0.1, num_train_epochs=1, per_device_train_batch_size=1,
                gradient_accumulation_steps=32, per_device_eval_batch_size=1,
                activation_checkpointing=True),
    "iterative_sft": dict(learning_rate=1e-5, num_train_epochs=20, max_new_tokens=128,
                          per_device_train_batch_size=8, gradient_accumulation_steps=4,
                          per_device_eval_batch_size=2, generation_batch_size=64,
                          activation_checkpointing=True),
    "ddpo": dict(num_epochs=100, sample_num_steps=50, sample_batch_size=16, train_batch_size=4,
                 train_gradient_accumulation_steps=2, lora_r=4, lora_alpha=4),
}


def fields_of(config, names):
    return {name: getattr(config, name) for name in names}


@every_script
def test_the_toy_s_settings_end_with_the_toy_and_a_given_flag_holds_for_both(script):
    toy, own = TOY_DEFAULTS[script], OWN_DEFAULTS[script]
    model = ["--model-name", "my/model"]
    assert fields_of(parse(script), toy) == toy
    assert fields_of(parse(script, *model), own) == own
    name = {"ppo": "max_new_tokens", "ddpo": "train_batch_size"}.get(
        script, "per_device_train_batch_size")
    for flags in ([], model, ["--model_name=my/model"]):
        given = parse(script, *flags, flag_of(name), 16)
        want = {**(own if flags else toy), name: 16}
        if name == "per_device_train_batch_size":
            want["gradient_accumulation_steps"] = 1  # a step of 16 rows, as it says
        assert fields_of(given, want) == want


@pytest.mark.parametrize("script", TEXT_SCRIPTS)
def test_the_base_of_a_lora_is_bfloat16_unless_it_is_the_toy_s(script, tmp_path):
    (tmp_path / "adapter_config.json").touch()
    adapter = ["--model-name", tmp_path]
    fresh = ["--model-name", "my/model", "--lora-r", 16]
    for flags, want in ([fresh, "bfloat16"], [adapter, "bfloat16"], [fresh[2:], "float32"],
                        [fresh[:2], "float32"], [[*fresh, "--torch-dtype", "float16"], "float16"],
                        [[*fresh, "--lora-r", 0], "float32"]):
        config = parse(script, *flags)
        assert config.torch_dtype == want
        if script in ("ppo", "iterative_sft"):  # whose rate does not follow the model's size
            rate = 1e-5 if want == "float32" else 1e-4
            assert config.learning_rate == rate or "--model-name" not in flags


def test_defaults_of_your_own_model_are_printed_on_one_line_but_not_those_you_give(tmp_path):
    (tmp_path / "file").touch()

    def printed(*flags):
        return start("ppo", *flags, "--output-dir", tmp_path / "file" / "out")[1]

    own = ["--model-name", "my/model", "--mini-batch-size", 4]
    assert printed() == ""
    assert printed(*own) == (
        "defaults for this model: --max-new-tokens 128 --generation-batch-size 64\n")
    assert printed(*own, "--lora-r=8") == (
        "defaults for this model: --max-new-tokens 128 --generation-batch-size 64 "
        "--learning-rate 1e-4 --torch-dtype bfloat16\n")


@every_script
def test_one_flag_each_means_bfloat16_checkpointing_and_the_cpu(script):
    config = parse(script, "--bf16", "--gradient-checkpointing", "--use-cpu")
    assert config.bf16 and config.use_cpu and config.gradient_checkpointing
    plain = parse(script, "--no-bf16", "--no-gradient-checkpointing", "--no-use-cpu")
    assert not (plain.bf16 or plain.use_cpu or plain.gradient_checkpointing)
    if script not in ("ppo", "ddpo"):
        assert config.activation_checkpointing and not plain.activation_checkpointing
        assert config.save_total_limit == 1
    assert parse(script, "--bf16").bf16  # computes on the CPU where there is no GPU


# ----------------------------------------------------------------------------------- dicts as flags
def test_a_dict_is_given_as_json_or_as_the_name_of_a_file(tmp_path):
    assert parse("ppo", "--accelerator-kwargs", '{"cpu": true}').accelerator_kwargs == {"cpu": True}
    (tmp_path / "fsdp.json").write_text('{"min_num_params": 7}')
    for value in ('{"min_num_params": 7}', tmp_path / "fsdp.json"):
        config = parse("sft", "--use-cpu", "--fsdp", "full_shard", "--fsdp-config", value)
        assert config.fsdp_config["min_num_params"] == 7
    assert parse("sft", "--lr-scheduler-kwargs", '{"num_cycles": 2}').lr_scheduler_kwargs == {
        "num_cycles": 2
    }


@pytest.mark.parametrize(
    "script, flag", [("ppo", "--accelerator-kwargs"), ("sft", "--lr-scheduler-kwargs")]
)
def test_json_that_can_not_be_read_is_an_error_of_that_flag(script, flag):
    status, out, err = start(script, flag, '{"num_cycles"')
    assert status not in (0, 1) and flag in err and "Traceback" not in err and not out


# ------------------------------------------------------------------------------------------- errors
@every_script
def test_an_error_is_one_line_with_the_file_s_name_and_status_1(script, tmp_path):
    (tmp_path / "file").touch()
    status, out, err = start(script, "--output-dir", tmp_path / "file" / "out")
    assert status == 1 and err.count("\n") == 1 and not out
    assert err.startswith(f"{script}.py: error: ") and "file/out" in err and "Traceback" not in err


@every_script
def test_a_seed_that_numpy_does_not_take_is_one_line(script, tmp_path):
    status, out, err = start(script, "--seed", -1, "--output-dir", tmp_path)
    assert status == 1 and not out
    assert err == f"{script}.py: error: seed=-1: give a number from 0 to 4294967295\n"


def test_a_shell_sees_the_line_and_the_status(tmp_path):
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "sft.py", "--output-dir", str(tmp_path / "file" / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("sft.py: error: ") and done.stderr.count("\n") == 1


def test_a_mistake_of_the_program_keeps_its_traceback(monkeypatch, tmp_path):
    """It is a defect, which nobody finds without the place."""

    def main(config):
        """Fail."""
        return 1 / 0

    monkeypatch.setattr(sys, "argv", ["mine.py"])
    with pytest.raises(ZeroDivisionError):
        machinery.run(main, ppo.PPOConfig)


@pytest.mark.parametrize("error, says_so", [
    (OSError(errno.ENOSPC, "no space"), True), (RuntimeError("unexpected pos 64 vs 0"), False)])
def test_a_full_disk_is_one_sentence(error, says_so, monkeypatch, tmp_path):
    """torch.save's own error has no word of a disk, which is full for another file, too."""

    def main(config):
        """Fail."""
        if not says_so:
            monkeypatch.setattr(tempfile, "TemporaryFile", fail)
        raise error

    def fail(dir):
        raise OSError(errno.EDQUOT, "quota")

    monkeypatch.setattr(sys, "argv", ["mine.py", "--output-dir", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"^mine.py: error: output_dir={tmp_path}: .* full; free"):
        machinery.run(main, ppo.PPOConfig)


@pytest.mark.parametrize("main_ends_it", [False, True])
def test_the_group_of_the_ranks_has_ended_when_a_run_has(main_ends_it, monkeypatch, tmp_path):
    """A thread of gloo's that frees a tensor while Python ends aborts the process."""
    groups = []

    def main(config):
        """Hold the group as a trainer does, which holds itself."""
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0,
                                       world_size=1)
        groups.append(weakref.ref(distributed.group.WORLD))
        trainer = {"group": distributed.group.WORLD}
        trainer["itself"] = trainer
        if main_ends_it:
            distributed.destroy_process_group()

    monkeypatch.setattr(sys, "argv", ["mine.py"])
    gc.disable()
    try:
        machinery.run(main, ppo.PPOConfig)
        assert groups[0]() is None
    finally:
        gc.enable()


@every_script
@pytest.mark.parametrize(
    "flags, named", [(["--no-such-option", 1], "--no-such-option"), (["--seed", "x"], "--seed")]
)
def test_a_flag_that_is_not_there_or_takes_no_such_value_is_named(script, flags, named):
    status, out, err = start(script, *flags)
    assert status == 2 and named in err and "Traceback" not in err and not out


def test_a_config_that_contradicts_itself_is_an_error_without_a_traceback():
    status, out, err = start("ppo", "--batch-size", 10, "--mini-batch-size", 3)
    assert status != 0 and "batch_size=10" in out + err and "Traceback" not in out + err


# ----------------------------------------------------------------------------------------- the gate
def test_the_gate_runs_the_two_commands_of_the_readme(tmp_path):
    """.ci/run, with each program that it starts replaced by one that writes down its arguments."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "timeout", "python", "pip", "ruff", "torchrun"):
        (programs / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "{name} $*" >> {tmp_path}/calls\n')
        (programs / name).chmod(0o755)
    (tmp_path / "tree" / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", tmp_path / "tree" / ".ci")
    shutil.copy(ROOT / "README.md", tmp_path / "tree")
    subprocess.run([shutil.which("bash"), str(tmp_path / "tree" / ".ci" / "run")], check=True,
                   env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"})
    calls = (tmp_path / "calls").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    blocks = [block.strip() for block in blocks if "venv" in block]
    (main,), (tests,) = (
        [block for block in blocks if word in block] for word in ("ppo.py", "pytest")
    )
    assert tests in calls and main in calls and calls.index(tests) < calls.index(main)
    assert "ruff check --select E,F,W,B,I --line-length 100 ." in calls
