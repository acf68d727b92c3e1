# pip install -c constraints.txt ".[examples]" && python examples/multitask.py
"""Five things to tell about a digit, from a trunk too small for all: the plain sum of gradients beside merge rules.

A rule decides what the trunk is given where the tasks' gradients meet; heads get the gradient of their own task as it
is. Every rule starts from the same networks and sees the same batches. The table at the end says what it changed, for
better or worse. The rate is the best of four for the sum, on seeds 100 to 104.
"""

from __future__ import annotations

from itertools import combinations
from statistics import fmean

try:
    import torch
    import torch.nn.functional as F
    from torch import nn

    import funcfreeze as ff
    from funcfreeze.demos.digits import all_digits
except ModuleNotFoundError as error:
    raise SystemExit(f'{error.name} is missing: pip install -c constraints.txt ".[examples]"') from None

STEPS, WIDTH = 300, 6
TASKS = {"digit": 10, "even": 2, "bold": 2, "ink": 1, "balance": 1}  # and how wide their heads are
RULES = {"sum": ff.merge.sum(), "pcgrad": ff.merge.pcgrad(), "upgrad": ff.merge.upgrad(), "mgda": ff.merge.mgda()}


def attributes(images):
    """The images, and what there is to tell of each: three classes and two numbers."""
    ink, (left, right) = images.pixels.sum(1), images.pixels.view(-1, 8, 2, 4).sum((1, 3)).unbind(1)
    balance = (right - left) / ink
    return {
        "pixels": images.pixels,
        "digit": images.labels,
        "even": (images.labels % 2 == 0).long(),
        "bold": ((images.labels == 8) & (ink > ink.median())).long(),  # an eight with much ink: one image of fifteen
        "ink": (ink - ink.mean()) / ink.std(),
        "balance": (balance - balance.mean()) / balance.std(),
    }


def network():
    trunk = nn.Sequential(nn.Linear(64, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    return nn.ModuleDict({"trunk": trunk, **{task: nn.Linear(WIDTH, width) for task, width in TASKS.items()}})


def loss(guess, truth):
    return F.mse_loss(guess, truth) if truth.is_floating_point() else F.cross_entropy(guess, truth)


def score(guess, truth):
    """Of numbers the variance that is explained; of classes the part told right, the mean over classes."""
    if truth.is_floating_point():
        return 1 - F.mse_loss(guess, truth) / truth.var()
    is_right = (guess.argmax(1) == truth).float()
    return torch.stack([is_right[truth == one].mean() for one in truth.unique()]).mean()


def measured(model, batch, by=loss):
    code = model["trunk"](batch["pixels"])
    return {task: by(model[task](code).squeeze(1), batch[task]) for task in TASKS}


def step_of(model, rule):
    # Adam does not mind that some rules give a mean and others a sum
    adam = ff.optim.adam(ff.schedules.cosine(3e-2, 0.0, STEPS))
    return ff.Step(model, measured, {task: ["trunk", task] for task in TASKS}, optimizer=adam, merge={"trunk": rule})


def train(rule, seed, steps, size=64):
    """Scores on images held out, how the gradients stood at the trunk on the way, and the losses of the last step."""
    torch.manual_seed(seed)
    step, images = step_of(network(), rule), attributes(all_digits())
    learned, held_out = torch.randperm(len(images["pixels"])).tensor_split([1200])
    state, seen = step.init(), []
    for number in range(1, steps + 1):
        chosen = learned[torch.randint(len(learned), (size,))]
        batch = {name: values[chosen] for name, values in images.items()}
        if number % 20 == 1:
            seen.append(step.conflicts(state, batch)["trunk"])
        state, metrics = step(state, batch)
    scores = step.call(state, measured, {name: values[held_out] for name, values in images.items()}, score)
    cosine = fmean(one.cosines[a][b] for one in seen for a, b in combinations(TASKS, 2))
    against = fmean(share < 0 for one in seen for share in one.shares.values())
    return torch.stack([*scores.values()]), cosine, against, {task: float(metrics[task]) for task in TASKS}


def table(runs):
    """Lines: the sum's scores, what every rule added to them, and how the gradients stood to one another."""
    found = {name: 100 * torch.stack([ended[0] for ended in seeds]) for name, seeds in runs.items()}
    yield f"{'':26}" + "".join(f"{name:<12}" for name in runs)
    for index, task in enumerate([*TASKS, "mean of all"]):
        base, *others = (torch.cat([of, of.mean(1, keepdim=True)], 1)[:, index] for of in found.values())
        cells = []
        for gain in (other - base for other in others):
            is_sure = abs(gain.sign().sum()) == len(gain)
            cells.append(f"{gain.mean():+.0f} ± {gain.std():.0f}{'*' if is_sure else ' '}")
        yield f"{task:26}{base.mean():.0f}% ± {base.std():<5.0f}" + "".join(f"{cell:12}" for cell in cells)
    for place, title, form in ((1, "mean cosine of two tasks", ".2f"), (2, "tasks stepped against", ".0%")):
        means = [fmean(ended[place] for ended in seeds) for seeds in runs.values()]
        yield f"{title:26}" + "".join(f"{format(mean, form):12}" for mean in means)


def main(steps=STEPS, seeds=range(4)):
    torch.set_num_threads(1)  # small networks are quicker on one
    print(step_of(network(), RULES["pcgrad"]).plan)
    runs = {}
    for name, rule in RULES.items():
        runs[name] = [train(rule, seed, steps) for seed in seeds]
        last = ", ".join(f"{task} {fmean(ended[-1][task] for ended in runs[name]):.3f}" for task in TASKS)
        print(f"step {steps} with {name}: {last}")
    print("\nImages held out, mean ± deviation over seeds. Of rules the gain, * where of one sign at every seed.")
    print(*table(runs), sep="\n")


if __name__ == "__main__":
    main()
