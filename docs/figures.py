"""Draw the figures of the pages:

    python docs/figures.py             all
    python docs/figures.py clip gae    some

The curves are of default runs, one per seed, in runs/NAME-1, runs/NAME-2 and runs/NAME-3, such as
`torchrun ppo.py --batch-size 256 --seed 2 --output-dir runs/ppo-2`. Without them runs/NAME serves.
The figures dpo_losses, clip, gae, schedule and rloo need no run.
"""
import json
import sys
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from plot import draw_curve, draw_level, plt, read_curve, save
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
TOY = ROOT / "toy"
sys.path[:0] = [str(ROOT), str(TOY)]  # where the trainers and make.py are

import frontier  # noqa: E402
import make  # noqa: E402

from common import AutoModelForCausalLMWithValueHead  # noqa: E402
from ddpo import DenoisingPolicy  # noqa: E402
from dpo import preference_losses  # noqa: E402
from ppo import gae, policy_loss  # noqa: E402

BATCH = 256  # samples per update of ppo.py's default run
GOOD, BAD, TRUTH = "C0", "C3", "C2"


def find_runs(name):
    """Return the folders of a default run, one per seed."""
    runs = sorted(Path("runs").glob(f"{name}-[0-9]"))
    return runs or [Path("runs", name)]


def read_lines(*path):
    """Return the lines of a .jsonl file, dicts."""
    return [json.loads(line) for line in Path(*path).read_text().splitlines()]


def make_panels(*titles, width=4.4, height=3.3):
    """Return a figure and its panels, side by side."""
    figure, panels = plt.subplots(1, len(titles), figsize=(width * len(titles), height),
                                  layout="constrained", squeeze=False)
    for panel, title in zip(panels[0], titles, strict=True):
        panel.set_title(title, fontsize=11)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels[0]


# ----------------------------------------------------------------------------- sft.py, reward.py
def sft():
    """Draw the loss of sft.py down to the entropy of the grammar."""
    figure, (panel,) = make_panels("sft.py: the loss falls to the entropy of the grammar", width=7)
    runs = find_runs("sft")
    draw_curve(panel, runs, "loss", color=BAD, label="training reviews", linewidth=1)
    draw_curve(panel, runs, "eval_loss", color=GOOD, label="held-out reviews")
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    texts = [row["text"] for row in read_lines(TOY / "reviews_test.jsonl")]
    tokens = sum(map(len, tokenizer(texts).input_ids)) / len(texts)
    praise = sum(text.count(word) for text in texts for word in make.POSITIVE)
    floor = make.entropy(praise / (make.CLAUSES * len(texts))) / tokens
    draw_level(panel, floor, f"the grammar itself on the held-out reviews: {floor:.4f}", below=True)
    panel.set(xlabel="update", ylabel="loss (nats per token)", xlim=(40, None), ylim=(0.91, 0.99))
    panel.legend(frameon=False)
    return figure


def score_pairs(run):
    """Return a reward model's scores [n, 2] of the held-out pairs, and their valences [n, 2]."""
    model = AutoModelForSequenceClassification.from_pretrained(run).eval()
    tokenizer = AutoTokenizer.from_pretrained(run)
    pairs = read_lines(TOY / "pairs_test.jsonl")
    texts = [row["prompt"] + row[side] for row in pairs for side in ("chosen", "rejected")]
    with torch.no_grad():
        scores = make.score(model, tokenizer, texts)
    valences = torch.tensor([make.valence(text) for text in texts])
    return scores.view(-1, 2), valences.view(-1, 2)


def reward():
    """Draw what a reward model gives to held-out pairs, and how often it is right."""
    figure, panels = make_panels("Scores of the held-out texts", "Does it know how sure to be?",
                                 "The closer the pair, the harder", width=3.9)
    scores, valences = map(torch.cat, zip(*map(score_pairs, find_runs("reward")), strict=True))
    bins = torch.linspace(scores.min(), scores.max(), 40).tolist()
    for side, (label, color) in enumerate((("chosen", GOOD), ("rejected", BAD))):
        panels[0].hist(scores[:, side].tolist(), bins, alpha=0.6, color=color, label=label)
    panels[0].margins(y=0.25)  # room for the legend
    panels[0].set(xlabel="score r (log-odds)", ylabel="texts, of all seeds")
    panels[0].legend(frameon=False, ncols=2, loc="upper center")

    # a pair in either order: the model says p, and the first text is the better one in a part p
    difference = torch.cat([scores[:, 0] - scores[:, 1], scores[:, 1] - scores[:, 0]])
    is_better = torch.cat([torch.ones(len(scores)), torch.zeros(len(scores))])
    said, seen = [], []
    for low in torch.arange(0, 1, 0.1):
        p = torch.sigmoid(difference)
        group = (p >= low) & (p < low + 0.1)
        if group.sum() >= 5:
            said.append(p[group].mean().item())
            seen.append(is_better[group].mean().item())
    panels[1].plot([0, 1], [0, 1], color="0.4", linestyle="--", linewidth=1,
                   label="exactly as sure as right")
    panels[1].plot(said, seen, marker="o", color=GOOD, label="reward.py")
    panels[1].set(xlabel="predicted: σ(r₁ − r₂)", ylabel="fraction where text 1 is better")
    panels[1].legend(frameon=False, fontsize=9, loc="lower right")

    margin = (valences[:, 0] - valences[:, 1])
    steps = sorted(set(margin.tolist()))[:12]
    right = [(scores[margin == m, 0] > scores[margin == m, 1]).float().mean().item()
             for m in steps]
    panels[2].plot(steps, right, marker="o", color=GOOD)
    draw_level(panels[2], 0.5, "chance")
    panels[2].set(xlabel="true difference in valence", ylabel="accuracy", ylim=(0.4, 1.02))
    return figure


# ----------------------------------------------------------------------------- ppo.py
def ppo():
    """Draw the score, the KL and its coefficient of ppo.py."""
    figure, panels = make_panels("The score rises", "The KL reaches its target",
                                 "The controller relaxes β on the way", width=3.9)
    runs = find_runs("ppo")
    draw_curve(panels[0], runs, "objective/scores", BATCH, color=GOOD)
    draw_level(panels[0], 6.8, "the kindest review there is: 6.8")
    draw_curve(panels[1], runs, "objective/kl", BATCH, color=BAD)
    draw_level(panels[1], 6, "target: 6", below=True)
    draw_curve(panels[2], runs, "objective/kl_coef", BATCH, color=TRUTH)
    draw_level(panels[2], 0.2, "init_kl_coef: 0.2")
    panels[0].set(xlabel="samples", ylabel="mean score", ylim=(None, 7.6))
    panels[1].set(xlabel="samples", ylabel="KL (nats per response)")
    panels[2].set(xlabel="samples", ylabel="β (score per nat)", ylim=(0, 0.22),
                  yticks=(0, 0.1, 0.2))
    return figure


def clip():
    """Draw the clipped surrogate of `policy_loss` against the ratio."""
    figure, panels = make_panels("A > 0: raise the probability, at most by ε",
                                 "A < 0: lower it, at most by ε")
    ratio = torch.linspace(0.5, 1.5, 201)
    cases = (1.0, (1.2, 1.5), "lower left"), (-1.0, (0.5, 0.8), "lower right")
    for panel, (advantage, flat, corner) in zip(panels, cases, strict=True):
        losses = [policy_loss(r.log().view(1, 1), torch.zeros(1, 1), torch.full((1, 1), advantage),
                              torch.ones(1, 1), cliprange=0.2)[0].item() for r in ratio]
        panel.plot(ratio, -advantage * ratio, color="0.6", linestyle=":", label="not clipped: −A ρ")
        panel.plot(ratio, losses, color=GOOD, label="policy_loss, ε = 0.2")
        panel.axvspan(*flat, color="0.92", label="no gradient")
        panel.set_xticks([0.6, 0.8, 1, 1.2, 1.4], ["0.6", "1 − ε", "1", "1 + ε", "1.4"])
        panel.set(xlabel=r"ratio $\rho = \pi / \pi_{old}$", ylabel="loss of a token")
        panel.legend(frameon=False, fontsize=9, loc=corner)
    return figure


def gae_weights():
    """Draw the advantages that one reward at the end gives to the tokens before it, by `gae`."""
    figure, (panel,) = make_panels("λ says how far back a surprise at the end reaches", width=7)
    tokens = 22
    rewards = torch.zeros(1, tokens)
    rewards[0, -1] = 1.0
    for number, lam in enumerate((0.0, 0.5, 0.8, 0.95, 1.0)):
        advantages, _ = gae(torch.zeros(1, tokens), rewards, torch.ones(1, tokens), 1.0, lam)
        panel.plot(range(1, tokens + 1), advantages[0], marker=".", color=f"C{number}",
                   label=f"λ = {lam}")
    panel.set(xlabel="token of the response (the reward 1 comes after the last; all values are 0)",
              ylabel="advantage A")
    panel.legend(frameon=False, reverse=True, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def tokens():
    """Draw the worst of 64 responses of the trained policy, token by token.

    With KL, reward, value and advantage as in ppo.py, before the advantages are whitened."""
    run = find_runs("ppo")[0]
    tokenizer = AutoTokenizer.from_pretrained(run)
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(run).eval()
    reference = AutoModelForCausalLM.from_pretrained(TOY / "model").eval()
    judge = AutoModelForSequenceClassification.from_pretrained(TOY / "reward").eval()
    beta = read_curve(run, "objective/kl_coef")[1][-1]
    query = "to me the plot was"
    prompt = tokenizer(query, return_tensors="pt").input_ids
    torch.manual_seed(0)
    with torch.no_grad():
        responses = policy.generate(prompt, do_sample=True, max_new_tokens=24, top_k=0,
                                    num_return_sequences=64, pad_token_id=tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        scores = make.score(judge, AutoTokenizer.from_pretrained(TOY / "reward"), texts)
        worst = scores.argmin()
        ids = responses[worst][responses[worst] != tokenizer.pad_token_id][None]
        logits, _, values = policy(ids)
        start = prompt.shape[1] - 1  # the position that predicts the first token of the response
        logp, ref_logp = (x[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[:, start:, 0]
                          for x in (logits, reference(ids).logits))
    kl = logp - ref_logp                                                               # [1, L]
    rewards = -beta * kl
    rewards[0, -1] += scores[worst]
    values = values[:, start:-1]
    advantages, _ = gae(values, rewards, torch.ones_like(values), gamma=1.0, lam=0.95)
    rows = {r"$\log \pi - \log \pi_{ref}$": kl, "reward R": rewards, "value V": values,
            "advantage A": advantages}
    words = [tokenizer.decode(token).strip() for token in ids[0, start + 1:]]
    figure, panel = plt.subplots(figsize=(11, 2.9), layout="constrained")
    table = torch.cat(list(rows.values()))
    scale = table.abs().amax(1, keepdim=True)
    panel.imshow(table / scale, cmap="RdBu", vmin=-1.6, vmax=1.6, aspect="auto")
    for i, j in [(i, j) for i in range(len(rows)) for j in range(len(words))]:
        number = f"{table[i, j]:.1f}".replace("-0.0", "0.0").replace("-", "−")
        panel.text(j, i, number, ha="center", va="center", fontsize=9)
    panel.set_xticks(range(len(words)), words, rotation=40, ha="right", fontsize=10)
    panel.set_yticks(range(len(rows)), rows)
    panel.set_title(f"{query} ... (score {scores[worst]:+.1f}, β = {beta:.2f})", fontsize=11)
    return figure


# ----------------------------------------------------------------------------- dpo, iterative_sft
def dpo():
    """Draw the loss of dpo.py, its accuracy, and what happens to both log-probabilities."""
    figure, panels = make_panels("The loss starts at ln 2", "Held-out pairs are ranked right",
                                 "Both fall, the rejected one more", width=3.9)
    runs = find_runs("dpo")
    draw_curve(panels[0], runs, "loss", smooth=20, color=GOOD, label="training, mean of 20")
    draw_curve(panels[0], runs, "eval_loss", color=BAD, label="held out")
    draw_level(panels[0], 0.6931, "ln 2")
    draw_curve(panels[1], runs, "eval_rewards/accuracies", color=BAD)
    draw_curve(panels[2], runs, "logps/chosen", smooth=20, color=GOOD, label="chosen")
    draw_curve(panels[2], runs, "logps/rejected", smooth=20, color=BAD, label="rejected")
    panels[0].set(xlabel="update", ylabel="loss", ylim=(0, None))
    panels[1].set(xlabel="update", ylabel="accuracy", xlim=(0, None), ylim=(0.5, 1))
    panels[2].set(xlabel="update", ylabel="log π (nats per answer)")
    panels[0].legend(frameon=False)
    panels[2].legend(frameon=False)
    return figure


def dpo_losses():
    """Draw the losses of `preference_losses` and their gradients against h, for β = 1."""
    figure, panels = make_panels("The loss of a pair", "How hard the pair pulls")
    kinds = {"sigmoid (DPO)": {}, "sigmoid, ε = 0.1 (cDPO)": {"label_smoothing": 0.1},
             "hinge": {"loss_type": "hinge"}, "ipo": {"loss_type": "ipo"}}
    h = torch.linspace(-4, 4, 401, requires_grad=True)
    zeros = torch.zeros_like(h)
    for (label, settings), line in zip(kinds.items(), ("-", "--", "-.", ":"), strict=True):
        losses = preference_losses(h, zeros, zeros, zeros, beta=1.0, **settings)
        gradient, = torch.autograd.grad(losses.sum(), h)
        panels[0].plot(h.detach(), losses.detach(), line, label=label)
        panels[1].plot(h.detach(), -gradient, line, label=label)
    draw_level(panels[0], 0.6931, "ln 2")
    panels[1].axhline(0, color="0.4", linewidth=1)
    panels[0].set(xlabel="h (nats), with β = 1", ylabel="loss L", ylim=(-0.2, 4))
    panels[1].set(xlabel="h (nats), with β = 1", ylabel="−dL/dh (below 0 it pulls back)",
                  ylim=(-0.5, 2))
    panels[1].legend(frameon=False, fontsize=9, loc="upper right")
    return figure


def iterative_sft():
    """Draw the scores of iterative_sft.py against its samples, next to those of ppo.py."""
    figure, (panel,) = make_panels("Best of 8, iterated, next to PPO", width=7)
    runs = find_runs("iterative_sft")
    per_update = 512 / 2  # a round samples 512 responses and makes two optimizer steps
    draw_curve(panel, runs, "objective/scores_best", per_update, color="0.6",
               label="best of 8: what is trained on")
    draw_curve(panel, runs, "objective/scores", per_update, color=GOOD, label="all 512 of a round")
    draw_curve(panel, find_runs("ppo"), "objective/scores", BATCH, color=BAD, linestyle="--",
               label="ppo.py")
    panel.set(xlabel="samples", ylabel="mean score")
    panel.legend(frameon=False)
    return figure


# ----------------------------------------------------------------------------- ddpo.py
def schedule():
    """Draw what the next latent of ddpo.py's sampler is made of, by `step_distribution`."""
    figure, panels = make_panels("What the next latent is made of, η = 1",
                                 "The spread of a decision, by sample_eta")
    policy = DenoisingPolicy()
    policy.scheduler = DDIMScheduler.from_pretrained(TOY / "pipeline" / "scheduler")
    policy.scheduler.set_timesteps(20)
    t = policy.scheduler.timesteps
    x = t.tolist()
    alpha = policy.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    zeros, ones = torch.zeros_like(alpha), torch.ones_like(alpha)
    # the mean is linear: a latent of 1 without noise, and one of 0 with the noise 1
    clean, sigma = policy.step_distribution(zeros, t, alpha.sqrt(), eta=1.0)
    noise, _ = policy.step_distribution(ones, t, (1 - alpha).sqrt(), eta=1.0)
    parts = [part.flatten() ** 2 for part in (clean, noise, sigma)]
    panels[0].stackplot(x, *parts, colors=(GOOD, "0.8", BAD))
    for at, y, color, part in ((330, 0.25, "white", "the clean latent"),
                               (880, 0.4, "black", "the predicted noise"),
                               (900, 0.85, "white", "new noise: σ²")):
        panels[0].text(at, y, part, color=color)
    for eta in (1.0, 0.5, 0.1):
        _, sigma = policy.step_distribution(zeros, t, alpha.sqrt(), eta=eta)
        panels[1].plot(x, sigma.flatten(), marker=".", label=f"η = {eta}")
    panels[0].set(ylabel="fraction of the variance", ylim=(0, 1))
    panels[1].set(ylabel="σ, standard deviation", ylim=(0, None))
    panels[1].legend(frameon=False)
    for panel in panels:
        panel.set(xlabel="timestep t, from noise to image", xlim=(x[0] + 10, x[-1] - 10))
    return figure


def cut_grid(run, title, number, columns=8):
    """Return one image of a run's before.png or after.png."""
    grid = plt.imread(Path(run, f"{title}.png"))
    side = grid.shape[1] // columns
    row, column = divmod(number, columns)
    return grid[row * side:(row + 1) * side, column * side:(column + 1) * side]


def ddpo():
    """Draw the reward of ddpo.py, and images before and after, each with its reward."""
    runs = find_runs("ddpo")
    samples = read_lines(runs[0], "samples.jsonl")
    count = len(samples) // 2
    figure = plt.figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2.4))
    panel = left.subplots()
    panel.spines[["top", "right"]].set_visible(False)
    draw_curve(panel, runs, "reward_mean", color=GOOD)
    panel.set_title("The reward rises", fontsize=11)
    panel.set(xlabel="epoch (32 images each)", ylabel="mean reward", ylim=(0, 1))
    panels = right.subplots(4, 6)
    for number in range(12):
        for title, sample in (("before", samples[number]), ("after", samples[count + number])):
            row, column = divmod(number, 6)
            cell = panels[2 * row + (title == "after"), column]
            cell.imshow(cut_grid(runs[0], title, number))
            cell.set_xlabel(f"{title}: {sample['reward']:.2f}", fontsize=9, labelpad=1)
            cell.set_xticks([])
            cell.set_yticks([])
            if title == "before":
                cell.set_title(sample["prompt"], fontsize=9)
    return figure


# ----------------------------------------------------------------------------- the forks
def rloo():
    """Draw how far PPO and RLOO stay below the best possible policy, from frontier.jsonl."""
    figure, (panel,) = make_panels("How far below the best policy of the same KL? (β in brackets)",
                                   width=7)
    groups = frontier.points(frontier.read(DOCS / "frontier.jsonl"))
    methods = {"PPO": ("C0", "s", (5, -12)), "PPO, λ = 1": ("C1", "D", (14, -9)),
               "RLOO": ("C2", "^", (-9, 15))}
    for method, (color, marker, offset) in methods.items():
        points = {key[1]: rows for key, rows in groups.items() if key[0] == method}
        kl = [frontier.spread([row["kl"] for row in rows]) for rows in points.values()]
        gap = [frontier.spread([frontier.optimal_valence(row["kl"]) - row["valence"]
                                for row in rows]) for rows in points.values()]
        panel.errorbar([m for m, _ in kl], [m for m, _ in gap], [s for _, s in gap],
                       [s for _, s in kl], color=color, fmt=marker, label=method, capsize=2)
        for beta, (x, _), (y, _) in zip(points, kl, gap, strict=True):
            panel.annotate(f"({beta:g})", (x, y), xytext=offset, color=color,
                           textcoords="offset points", fontsize=9)
    draw_level(panel, 0, "the best possible policy")
    panel.set(xlabel="KL from the initial model (nats per response)",
              ylabel="valence below the optimum", xlim=(0, None), ylim=(1.5, -0.2))
    panel.legend(frameon=False, loc="lower right")
    return figure


FIGURES = {"sft": sft, "reward": reward, "ppo": ppo, "clip": clip, "gae": gae_weights,
           "tokens": tokens, "dpo": dpo, "dpo_losses": dpo_losses, "iterative_sft": iterative_sft,
           "schedule": schedule, "ddpo": ddpo, "rloo": rloo}


def main(*names):
    unknown = set(names) - set(FIGURES)
    if unknown:
        sys.exit(f"{', '.join(sorted(unknown))}: no such figure; there are {', '.join(FIGURES)}")
    for name in names or FIGURES:
        save(FIGURES[name](), DOCS / f"{name}.svg")
        print(f"docs/{name}.svg")


if __name__ == "__main__":
    main(*sys.argv[1:])
