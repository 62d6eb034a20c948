"""What each rank does for test_ranks.py: torchrun --nproc_per_node 2 tests/ranks.py FOLDER

All checks share these two processes, because starting them takes longer than the checks. Each rank
writes what it saw to FOLDER/<rank>.pt. `update` also runs in one process: given the rows of both
ranks, it must end with the same numbers."""
import faulthandler
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import AutoModelForCausalLMWithValueHead, create_reference_model  # noqa: E402
from ppo import PPOConfig, PPOTrainer, main  # noqa: E402

TOY = ROOT / "toy" / "model"
LARGEST_SEED = 2**32 - 1
HANGS_AFTER = 200  # seconds: a rank that waits for one that will not come ends, and says where

# Updates on 8 given rows, rank 0 holding the first four. Each optimizer step takes all rows, so the
# order in which a rank shuffles them changes no sum. SGD, because Adam forgives a gradient that is
# off by a factor. Where rank 0 alone is praised, one step of rate 0.1 takes the mean ratio to 2.07
# on rank 0, 0.93 on rank 1 and 1.30 over all tokens, the mean KL to 0.37, 0.11 and 0.19.
PRAISE = dict(praise=True, rate=0.1, ppo_epochs=2, init_kl_coef=0.0)
UPDATES = {
    "everything": dict(
        updates=2, rate=0.02, ppo_epochs=2, parts=4, init_kl_coef=0.02, target=0.6, horizon=50,
        use_score_scaling=True, use_score_norm=True, whiten_rewards=True),
    "clipped gradient": dict(PRAISE, ppo_epochs=1, parts=4, max_grad_norm=0.5),
    "ratio above on rank 0 only": dict(PRAISE, ratio_threshold=1.6),
    "mean ratio above": dict(PRAISE, ratio_threshold=1.1),
    "KL above on rank 0 only": dict(PRAISE, early_stopping=True, target_kl=0.26 / 1.5),
    "mean KL above": dict(PRAISE, early_stopping=True, target_kl=0.15 / 1.5),
}


def forget():
    """accelerate keeps its state in the process; the group of the ranks stays."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def toy_policy(draw):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(TOY)
    with torch.no_grad():
        model.v_head.summary.weight.normal_(std=0.1, generator=draw)
    return model


def plain(stats):
    """Statistics without the clock, as tensors."""
    return {name: torch.as_tensor(np.asarray(value))
            for name, value in stats.items() if "time/" not in name}


def update(rank, ranks, rate, updates=1, praise=False, parts=1, **settings):
    """-> how far each weight moved, statistics of the last update, and the controller's beta.

    parts: micro-batches of each optimizer step, on two ranks."""
    forget()
    draw = torch.Generator().manual_seed(0)
    model = toy_policy(draw)
    reference = create_reference_model(model)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=draw))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    queries = [torch.randint(300, (3 + i % 3,), generator=draw) for i in range(8)]
    responses = [torch.randint(150, (2 + i,), generator=draw) + 150 * (i >= 4) for i in range(8)]
    scores = [1.0 - 2 * (i >= 4) if praise else i % 3 - i / 4 for i in range(8)]
    masks = [torch.ones_like(response) for response in responses]
    if not praise:
        masks[1][1] = masks[6][3] = 0
    mine = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    size = 8 // ranks
    parts = parts if ranks > 1 else 1

    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    halves = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5**n)
    config = PPOConfig(batch_size=size, mini_batch_size=size // parts,
                       gradient_accumulation_steps=parts, **settings)
    trainer = PPOTrainer(config, model, reference, AutoTokenizer.from_pretrained(TOY),
                         optimizer=optimizer, lr_scheduler=halves)
    in_bucket = []  # before an optimizer step: is each gradient a part of a larger storage?
    optimizer.register_step_pre_hook(lambda *args: in_bucket.append(all(
        p.grad.untyped_storage().nbytes() > p.grad.nbytes for p in model.parameters())))
    for _ in range(updates):
        stats = trainer.step(queries[mine], responses[mine],
                             [torch.tensor(score) for score in scores[mine]], masks[mine])
    after = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    return {"moved": {name: p.detach() - before[name] for name, p in after},
            "stats": plain(stats), "kl_coef": trainer.kl_ctl.value, "in_bucket": in_bucket}


def vision_update(rank, ranks):
    """Two updates of a model with a vision tower, out of text's reach -> how its weights moved."""
    from conftest import gemma3
    forget()
    model = AutoModelForCausalLMWithValueHead.from_pretrained(gemma3())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, 100, (4,), generator=draw) for _ in range(4)]
    mine = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    size = 4 // ranks
    trained = [p for p in model.parameters() if p.requires_grad]
    trainer = PPOTrainer(PPOConfig(batch_size=size, mini_batch_size=size, ppo_epochs=1), model,
                         None, AutoTokenizer.from_pretrained(TOY),
                         optimizer=torch.optim.SGD(trained, lr=0.1))
    scores = [torch.tensor(score) for score in (1.0, -1.0, 0.5, 2.0)[mine]]
    for _ in range(2):  # DDP finds out at the second forward pass what the first has not reached
        trainer.step(rows[mine], rows[mine], scores)
    after = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    return {name: p.detach() - before[name] for name, p in after}


def own_loop(folder, rank):
    """Parts of the trainer that users call in loops of their own."""
    forget()
    torch.manual_seed(100 + rank)  # whatever was drawn before, seeds come from the config
    config = PPOConfig(batch_size=2, mini_batch_size=1, seed=LARGEST_SEED)  # rank 1's own is less
    rows = [{"query": f"row {i}", "input_ids": [i + 2]} for i in range(11)]
    model = toy_policy(torch.Generator().manual_seed(rank))  # rank 0's weights are for all
    trainer = PPOTrainer(config, model, None, AutoTokenizer.from_pretrained(TOY), rows)
    seen = {"first draw": torch.rand(3), "global batch": config.global_batch_size,
            "global minibatch": config.global_backward_batch_size}
    seen["epochs"] = [[batch["query"] for batch in trainer.dataloader] for _ in range(3)]
    seen["gathered"] = trainer.gather_stats(
        {"number": torch.tensor(rank + 1.0), "vector": torch.full((rank + 1,), 10.0 + rank)})
    try:
        few = [torch.tensor([5, 6])] * (2 - rank)
        trainer.step(few, few, [torch.tensor(0.0)] * len(few))
    except ValueError as error:
        seen["unequal rows"] = str(error)
    if trainer.accelerator.is_main_process:  # as users write it: the other rank goes on
        trainer.save_pretrained(f"{folder}/saved by one")
    config.push_to_hub_if_best_kwargs = {"repo_id": "me/best"}
    trainer.push_if_best(torch.tensor([1.0, 2.0]))  # the main rank has no network
    seen["best score pushed"] = trainer.highest_reward
    policy = trainer.accelerator.unwrap_model(trainer.model)
    return {**seen, "head": policy.v_head.summary.weight.detach().clone()}


def script(folder, rank):
    """The script three times: uninterrupted, cut short, resumed. -> the statistics it returns."""
    flags = dict(batch_size=4, mini_batch_size=2, ppo_epochs=2, max_new_tokens=6, save_freq=1,
                 learning_rate=1e-3, use_score_scaling=True, missing_eos_penalty=0.5)
    save, returned = Accelerator.save_state, {}

    def slow_on_rank_1(self, *args, **kwargs):
        if self.process_index == 1:
            time.sleep(3)  # rank 0 has long written its part: it must not go on without this one
        return save(self, *args, **kwargs)

    tracker = {"log_with": "tensorboard", "project_kwargs": {"logging_dir": f"{folder}/logs"}}
    for name, steps, more in (("whole", 24, tracker), ("cut", 8, {}),
                              ("cut", 24, {"resume_from": f"{folder}/cut"})):
        forget()
        torch.manual_seed(200 + rank)
        Accelerator.save_state = slow_on_rank_1 if steps == 8 else save
        stats = main(PPOConfig(**flags, steps=steps, output_dir=f"{folder}/{name}", **more))
        returned[f"{name} {steps}"] = plain(stats)
        if steps == 8 and rank == 0:
            files = Path(folder, "cut", "checkpoint-1").iterdir()
            returned["checkpoint"] = sorted(file.name for file in files)
    return returned


if __name__ == "__main__":
    faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, rank = sys.argv[1], int(os.environ["RANK"])
    PartialState.destroy_process_group = lambda *args: None  # main ends its training three times
    seen = {name: update(rank, 2, **case) for name, case in UPDATES.items()}
    seen["vision"] = vision_update(rank, 2)
    seen["own loop"] = own_loop(folder, rank)
    seen["script"] = script(folder, rank)
    torch.save(seen, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
    os._exit(0)  # torch may abort as it frees the groups of several runs: end here
