"""Compare all algorithms on one picture: reward against KL from the initial model, toy world.

    python docs/frontier.py                  an hour of CPU time; draws docs/frontier.svg
    python docs/frontier.py --quick          minutes: fewer settings, shorter runs, one seed

Each run trains a model with the project's own scripts. Then `evaluate` samples from the model and
measures KL, the reward model's score (the proxy), the true valence and the grammar, for all
algorithms alike. `optimum` is the best valence that any policy can have at a KL: see
docs/frontier.md. A finished run is a few rows in the results, and is not run again: the command
above redraws figure and table, or goes on where it was interrupted.
"""
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev

import torch
import tyro
from plot import plt, save
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy"
sys.path += [str(ROOT), str(TOY)]

import make  # noqa: E402

import chats  # noqa: E402
from ppo import kl_penalty  # noqa: E402

INTENSITIES = list(make.INTENSITY.values())
PROMPTS = [f"{opening}the {aspect} was" for opening in make.OPENINGS for aspect in make.ASPECTS]


# ----------------------------------------------------------------------------- the exact optimum
def optimum(beta, judgements=make.CLAUSES, good=make.GOOD, intensities=INTENSITIES):
    """Compute KL (nats) and mean valence of pi* = pi_ref exp(valence / beta) / Z, in closed form.

    judgements: how many the response makes; the others are in the prompt."""
    values = [sign * v for sign in (1, -1) for v in intensities]
    reference = [p / len(intensities) for p in (good, 1 - good) for _ in intensities]
    highest = max(values)  # subtracted in the exponent, so that a small beta does not overflow
    weights = [p * math.exp((v - highest) / beta)
               for p, v in zip(reference, values, strict=True)]
    Z = sum(weights)
    best = sum(w * v for w, v in zip(weights, values, strict=True)) / Z
    kl = (best - highest) / beta - math.log(Z)
    return judgements * kl, judgements * best


def optimal_valence(kl):
    """Compute the highest mean valence of all policies whose KL is at most `kl` nats."""
    low, high = 1e-3, 1e6  # of beta: KL falls as beta grows
    for _ in range(60):
        beta = math.sqrt(low * high)
        low, high = (beta, high) if optimum(beta)[0] > kl else (low, beta)
    return optimum(high)[1]


def best_of_n_kl(n):
    """Compute the KL of best-of-n from the model it samples, in nats; exact without ties."""
    return math.log(n) - (n - 1) / n


# ----------------------------------------------------------------------------- what is measured
def is_review(text):
    """Check whether a text is a review of the grammar, with four different aspects."""
    adjectives = "|".join(make.POSITIVE + make.NEGATIVE)
    clause = rf"the ({'|'.join(make.ASPECTS)}) was (?:{'|'.join(make.INTENSITY)}) (?:{adjectives})"
    pattern = rf"(?:{'|'.join(make.OPENINGS)}){clause}, {clause}, {clause} and {clause}\."
    found = re.fullmatch(pattern, text)
    return bool(found) and len(set(found.groups())) == make.CLAUSES


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def sample(model, tokenizer, n, seed):
    """Sample n responses to each of the 40 prompts; rows of one prompt are adjacent.

    Returns prompts and responses as token ids, and the texts of both together."""
    torch.manual_seed(seed)
    queries = [query for query in PROMPTS for _ in range(n)]
    prompts = [torch.tensor(ids) for ids in tokenizer(queries).input_ids]
    responses = chats.generate(
        model, prompts, tokenizer, batch_size=256, do_sample=True, max_new_tokens=24)
    texts = [tokenizer.decode(torch.cat([x, y]), skip_special_tokens=True)
             for x, y in zip(prompts, responses, strict=True)]
    return prompts, responses, texts


def judge(texts):
    """Compute what texts are worth: {name: tensor [rows]}.

    of_reviews: the valence, if a text that is no review is worth 0."""
    proxy = torch.stack(chats.load_reward(TOY / "reward")(texts))
    values = torch.tensor([make.valence(text) for text in texts])
    grammatical = torch.tensor([float(is_review(text)) for text in texts])
    return {"proxy": proxy, "valence": values, "of_reviews": values * grammatical,
            "grammatical": grammatical}


@torch.inference_mode()
def kl_of_responses(model, reference, prompts, responses):
    """Compute the KL from the reference along each response, in nats, [rows].

    Sampled tokens only choose the states: in each, the KL over the vocabulary is exact. Its sum
    has the same mean as log pi(y) - log pi_ref(y), and a lower variance."""
    sums = []
    for start in range(0, len(prompts), 256):
        rows = slice(start, start + 256)
        ids = [torch.cat([x, y]) for x, y in zip(prompts[rows], responses[rows], strict=True)]
        batch = pad_sequence(ids, batch_first=True)  # on the right: no token attends to padding
        mask = torch.ones_like(batch)
        logprobs, ref_logprobs = (m(batch, attention_mask=mask).logits.log_softmax(-1)
                                  for m in (model, reference))
        kl = kl_penalty(logprobs, ref_logprobs, "full")  # [rows, T], of the next token
        sums += [kl[i, len(x) - 1:len(x) + len(y) - 1].sum()
                 for i, (x, y) in enumerate(zip(prompts[rows], responses[rows], strict=True))]
    return torch.stack(sums)


def evaluate(folder, seed, n=50):
    """Measure a model by n responses to each prompt. Returns {name: mean}."""
    model, reference = load(folder), load(TOY / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts, responses, texts = sample(model, tokenizer, n, 1000 + seed)
    kl = kl_of_responses(model, reference, prompts, responses)
    return {name: round(x.mean().item(), 4) for name, x in {"kl": kl, **judge(texts)}.items()}


def sample_initial(n, seed):
    """Sample n responses to each prompt from the initial model. Returns their texts."""
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    return sample(load(TOY / "model"), tokenizer, n, seed)[-1]


# ----------------------------------------------------------------------------- the algorithms
def train(command, folder, seed, code=ROOT):
    """Run one of the project's scripts in a process of its own, as a user would."""
    words = [sys.executable, *command.split(), "--use-cpu", f"--seed={seed}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([*words, f"--output-dir={folder}"], cwd=code, env=environment,
                         capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(run.args)} failed:\n{run.stdout}{run.stderr}")


def cpu_seconds():
    """Return the CPU time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def train_in_stages(command, folder, seed, stages, resume, code, spent, **values):
    """Train up to a stage, evaluate, train further: yields one row per stage.

    resume: the flag to train further. spent: CPU seconds that the data took."""
    for stage in stages:
        start = cpu_seconds()
        train(command.format(stage=stage, samples=256 * stage, **values), folder, seed, code)
        spent += cpu_seconds() - start
        yield {"stage": stage, "cpu_s": round(spent, 1), **evaluate(folder, seed)}
        if resume not in command:
            command += f" {resume}={folder}"


def copy_with_patch(folder, patch):
    """Copy the project's scripts and apply a patch of docs/forks to them."""
    shutil.copytree(TOY, folder / "toy")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    subprocess.run(["git", "apply", ROOT / "docs" / "forks" / patch], cwd=folder, check=True)
    return folder


def write_weighted_rows(file, beta, seed, n=200):
    """Write the initial model's own responses, drawn again in proportion to exp(proxy / beta)."""
    texts = sample_initial(n, seed)
    weights = (judge(texts)["proxy"].view(-1, n) / beta).softmax(1)     # per prompt
    drawn = weights.multinomial(n, replacement=True)                    # [prompts, n]
    rows = [{"prompt": prompt, "completion": texts[n * k + i].removeprefix(prompt)}
            for k, prompt in enumerate(PROMPTS) for i in drawn[k].tolist()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def best_of_n(seed, stages, m=256):
    """Average the best over all subsets of n of m samples, by its proxy: yields rows.

    The sample with i others below it is the best of C(i, n - 1) subsets, of C(m, n)."""
    judged = judge(sample_initial(m, seed))
    order = judged["proxy"].view(-1, m).argsort(1)                   # per prompt
    for n in stages:
        weights = torch.tensor([math.comb(i, n - 1) / math.comb(m, n) for i in range(m)])
        means = {name: (x.view(-1, m).gather(1, order) @ weights).mean().item()
                 for name, x in judged.items()}
        yield {"stage": n, "cpu_s": 0.0, "kl": round(best_of_n_kl(n), 4),
               **{name: round(x, 4) for name, x in means.items()}}


# ----------------------------------------------------------------------------- the runs
@dataclass
class Method:
    """List the runs of a method: one per beta and seed, evaluated at each stage."""
    command: str
    stages: list[int]
    unit: str
    betas: list[float] | None = None
    resume: str = "none"  # the flag with which a run goes on from its output folder
    patch: str | None = None


PPO = ("ppo.py --steps {samples} --mini-batch-size 16 --learning-rate 1e-4 --no-adap-kl-ctrl "
       "--save-freq 5 --init-kl-coef ")
METHODS = {
    "PPO, no penalty": Method(PPO + "0", [5, 10, 20, 40, 80], "updates", resume="--resume-from"),
    "PPO": Method(PPO + "{beta}", [30], "updates", [0.1, 0.3, 0.5, 1, 2]),
    "PPO, λ = 1": Method(PPO + "{beta} --lam 1", [30], "updates", [0.3, 0.5, 1]),
    "RLOO": Method(PPO + "{beta}", [30], "updates", [0.2, 0.5, 1, 2], patch="rloo.patch"),
    "DPO": Method("dpo.py --beta {beta} --num-train-epochs {stage} --eval-strategy no "
                  "--save-strategy no", [4], "epochs", [0.3, 1, 3, 10, 30]),
    "iterative fine-tuning": Method("iterative_sft.py --num-train-epochs {stage}",
                                    [10, 20, 40, 80, 160], "rounds",
                                    resume="--resume-from-checkpoint"),
    "reward-weighted SFT": Method(
        "sft.py --model-name toy/model --dataset {rows} --num-train-epochs {stage} "
        "--per-device-train-batch-size 32 --learning-rate 1e-3 --no-gradient-checkpointing",
        [1], "epochs", [0.5, 1, 2, 4]),
    "best of n": Method("", [1, 2, 4, 8, 16, 32, 64], "samples"),
}


def list_runs(quick):
    """List (method, beta, seed) of all runs."""
    return [(name, beta, seed) for seed in ([1] if quick else [1, 2, 3])
            for name, method in METHODS.items()
            for beta in (method.betas or [None])[::2 if quick else 1]]


def do_run(name, beta, seed, quick):
    """Train and evaluate. Returns the run's rows."""
    torch.set_num_threads(1)
    disable_progress_bar()
    method = METHODS[name]
    stages, start, spent, code = method.stages, time.time(), cpu_seconds(), ROOT
    if quick and method.command:  # the first stages, or a shorter run
        stages = stages[:2] if len(stages) > 1 else [math.ceil(stages[0] / 4)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        if method.patch:
            code = copy_with_patch(Path(folder, "code"), method.patch)
        if "{rows}" in method.command:
            write_weighted_rows(file, beta, seed)
        spent = cpu_seconds() - spent
        rows = best_of_n(seed, stages) if not method.command else train_in_stages(
            method.command, Path(folder, "model"), seed, stages, method.resume, code, spent,
            beta=beta, rows=file)
        rows = list(rows)
    names = {"method": name, "beta": beta, "seed": seed}
    return [{**names, **row, "minutes": round((time.time() - start) / 60, 2)} for row in rows]


def read(file):
    """Read a .jsonl file; none is no rows."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def run_all(file, quick, workers):
    """Do the runs that the results lack, and append their rows to the file.

    Runs that fail are reported; the same command tries them again."""
    done = {(row["method"], row["beta"], row["seed"]) for row in read(file)}
    todo = [run for run in list_runs(quick) if run not in done]
    file.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(todo), unit="run")
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for run in as_completed([pool.submit(do_run, *run, quick) for run in todo]):
            if run.exception():
                bar.write(f"{run.exception()}")
                continue
            with file.open("a") as lines:
                lines.writelines(json.dumps(row, ensure_ascii=False) + "\n"
                                 for row in run.result())
            last = run.result()[-1]
            bar.write(f"{last['method']}, beta {last['beta']}, seed {last['seed']}: "
                      f"KL {last['kl']:.2f}, valence {last['valence']:.2f}")
            bar.update()


# ----------------------------------------------------------------------------- table and figure
def points(rows):
    """Collect the seeds of each point: {(method, beta, stage): rows}, sorted by KL."""
    groups = {}
    for row in rows:
        groups.setdefault((row["method"], row["beta"], row["stage"]), []).append(row)
    order = {name: i for i, name in enumerate(METHODS)}
    return dict(sorted(groups.items(), key=lambda item: (
        order[item[0][0]], mean(row["kl"] for row in item[1]))))


def spread(numbers):
    """Return mean and standard deviation; of a single number, 0."""
    return mean(numbers), stdev(numbers) if len(numbers) > 1 else 0.0


def table(rows):
    """Write the results as a Markdown table: mean ± standard deviation over seeds."""
    names = ["method", "setting", "KL", "valence", "below the optimum", "proxy",
             "valence, broken = 0", "reviews", "CPU s"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for (method, beta, stage), group in points(rows).items():
        group = [{**row, "gap": optimal_valence(row["kl"]) - row["valence"]} for row in group]
        numbers = ["{:.2f} ± {:.2f}".format(*spread([row[name] for row in group]))
                   for name in ("kl", "valence", "gap", "proxy", "of_reviews")]
        numbers = [number.replace("-", "−") for number in numbers]
        numbers += [f"{100 * mean(row['grammatical'] for row in group):.0f} %",
                    f"{mean(row['cpu_s'] for row in group):.0f}"]
        setting = f"{stage} {METHODS[method].unit}" if beta is None else f"β = {beta}"
        lines.append(f"| {' | '.join([method, setting, *numbers])} |")
    return "\n".join(lines)


PANELS = {"valence": "the truth: valence", "proxy": "the proxy: score of the reward model",
          "of_reviews": "the truth, if a broken review is worth 0"}


def draw(rows, image):
    """Draw the results against KL; error bars are standard deviations over seeds."""
    figure, panels = plt.subplot_mosaic(
        [["valence", "proxy"], ["of_reviews", "legend"]], figsize=(10, 8.4), layout="constrained")
    curve = [optimum(10 ** (k / 50)) for k in range(100, -101, -1)] + [(200, 8)]
    ticks = [0, 2, 4, 6, 8, 10, 20, 50, 100]
    for name, title in PANELS.items():
        panel = panels[name]
        panel.plot(*zip(*curve, strict=True), color="black", label="exact optimum of the valence")
        for method, color, marker in zip(METHODS, plt.cm.tab10.colors, "osD^vPX*", strict=False):
            groups = [group for key, group in points(rows).items() if key[0] == method]
            kl, y = ([spread([row[key] for row in group]) for group in groups]
                     for key in ("kl", name))
            panel.errorbar([m for m, _ in kl], [m for m, _ in y], [s for _, s in y],
                           [s for _, s in kl], color=color, marker=marker, label=method,
                           markersize=5, linewidth=1, capsize=2)
        panel.set_xscale("symlog", linthresh=10, linscale=2)
        panel.set(title=title, xlabel="KL from the initial model (nats per response)",
                  ylabel="mean per response", xlim=(-0.3, 150), ylim=(-2, 11.5),
                  xticks=ticks, xticklabels=ticks)
        panel.grid(alpha=0.3)
    panels["legend"].axis("off")
    panels["legend"].legend(*panel.get_legend_handles_labels(), loc="center", fontsize=11,
                            title="the axis of KL is logarithmic from 10 on")
    save(figure, image)


def main(quick: bool = False, workers: int = 2, results: Path | None = None,
         model: Path | None = None):
    """Train, evaluate, draw, and print the table.

    Args:
        quick: Fewer settings, shorter runs, one seed.
        workers: Runs at the same time, each on one core.
        results: File of the results. None: docs/frontier.jsonl; quick: runs/frontier/quick.jsonl.
        model: A folder with a model of your own: print its point, and train nothing.
    """
    if model:
        point = evaluate(model, seed=1)
        print(point, f"\nbest valence at this KL: {optimal_valence(point['kl']):.2f}")
        return
    default = ROOT / ("runs/frontier/quick.jsonl" if quick else "docs/frontier.jsonl")
    results = results or default
    run_all(results, quick, workers)
    draw(read(results), results.with_suffix(".svg"))
    print(table(read(results)))


if __name__ == "__main__":
    tyro.cli(main)
