"""The example of several tasks on one trunk: against loops by hand, what rules promise on its trunk, and its table."""

from __future__ import annotations

import copy
import re
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from plain_ways import example, framework

from funcfreeze import merge

SHORT = 60


@pytest.fixture
def program():
    framework("sklearn")
    return example("multitask")


@pytest.fixture
def batches(program):
    """The program's own batches, in float64."""
    images = program.attributes(program.all_digits())
    images = {
        name: values.to(torch.float64) if values.is_floating_point() else values for name, values in images.items()
    }
    chosen = [torch.randint(len(images["pixels"]), (64,)) for _ in range(SHORT)]
    return [{name: values[some] for name, values in images.items()} for some in chosen]


def losses_by_hand(model, batch):
    code = torch.tanh(model["trunk"][2](torch.tanh(model["trunk"][0](batch["pixels"]))))
    classes = {task: F.cross_entropy(model[task](code), batch[task]) for task in ("digit", "even", "bold")}
    return classes | {task: (model[task](code)[:, 0] - batch[task]).square().mean() for task in ("ink", "balance")}


def rows_by_hand(model, batch):
    """The gradient of each task at the trunk, after those of the heads went into `.grad`."""
    found = losses_by_hand(model, batch)
    sum(found.values()).backward(retain_graph=True)
    trunk = [*model["trunk"].parameters()]
    return torch.stack(
        [torch.cat([g.ravel() for g in torch.autograd.grad(one, trunk, retain_graph=True)]) for one in found.values()]
    )


def surgery(rows):
    """PCGrad as its paper has it, in the declared order."""
    changed = []
    for index, row in enumerate(rows):
        for place, other in enumerate(rows):
            if place != index and row @ other < 0:
                row = row - (row @ other) / (other @ other) * other
        changed.append(row)
    return sum(changed)


@pytest.mark.parametrize(
    ("rule", "by_hand"),
    [(merge.sum(), lambda rows: rows.sum(0)), (merge.pcgrad(order="declared"), surgery)],
    ids=["sum", "pcgrad"],
)
def test_as_the_plain_loop(program, batches, rule, by_hand):
    model = program.network()
    plain = copy.deepcopy(model)
    step = program.step_of(model, rule)
    state = step.init()
    optimizer = torch.optim.Adam(plain.parameters(), 3e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, program.STEPS)
    conflicts = 0
    for batch in batches[:10]:
        state, _ = step(state, batch)
        optimizer.zero_grad()
        rows = rows_by_hand(plain, batch)
        conflicts += int((rows @ rows.T < 0).any())
        trunk = [*plain["trunk"].parameters()]
        for parameter, part in zip(trunk, by_hand(rows).split([p.numel() for p in trunk]), strict=True):
            parameter.grad = part.view_as(parameter)
        optimizer.step()
        scheduler.step()
    for path, parameter in plain.named_parameters():
        torch.testing.assert_close(state.params[path], parameter.detach(), rtol=1e-8, atol=1e-10, msg=path)
    assert conflicts > 2, "surgery has something to do"


def test_rules_go_against_fewer_tasks(program, batches):
    """As the example counts it, from the shares, and as the gradients say."""
    against = {}
    start = program.network()
    for name, rule in program.RULES.items():
        step = program.step_of(copy.deepcopy(start), rule)
        state, counted = step.init(), 0
        for batch in batches:
            apart, merged = step.per_loss_gradients(state, batch), step.gradients(state, batch)
            paths = [path for path in merged if path.startswith("trunk")]
            rows = torch.stack([torch.cat([row[path].ravel() for path in paths]) for row in apart.values()])
            whole = torch.cat([merged[path].ravel() for path in paths])
            seen = step.conflicts(state, batch)["trunk"]
            steep = (rows @ whole) / rows.norm(dim=1) / whole.norm()
            for slope, share in zip(steep.tolist(), seen.shares.values(), strict=True):
                assert (slope < 0) == (share < 0) or abs(slope) < 1e-6
                counted += slope < -1e-6
            unit = rows / rows.norm(dim=1, keepdim=True)
            for (i, a), (j, b) in combinations(enumerate(program.TASKS), 2):
                assert seen.cosines[a][b] == pytest.approx(float(unit[i] @ unit[j]), abs=1e-9)
            state, _ = step(state, batch)
        against[name] = counted
    assert against["mgda"] == 0
    assert max(against["pcgrad"], against["upgrad"]) < against["sum"] / 2
    assert against["sum"] > len(batches) * len(program.TASKS) / 50


@pytest.fixture
def _float32_and_its_threads():
    """What the images are in, and as many threads afterwards as before."""
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_float32_and_its_threads")
@pytest.mark.parametrize("name", ["sum", "pcgrad", "upgrad", "mgda"])
def test_it_learns(program, name):
    early, late = (program.train(program.RULES[name], seed=0, steps=steps) for steps in (SHORT // 6, 3 * SHORT))
    assert sum(late[-1].values()) < 0.8 * sum(early[-1].values()), "losses"
    assert late[0].mean() > early[0].mean() + 0.1, "scores"


@pytest.mark.usefixtures("_float32_and_its_threads")
def test_what_it_prints(program, capsys):
    program.main(SHORT, range(2))
    printed = capsys.readouterr().out.splitlines()
    assert (
        "merge  trunk: pcgrad() on 4 parameters (432 elements), where digit, even, bold, ink, balance meet" in printed
    )
    head, *lines = printed[-3 - len(program.TASKS) - 1 :]
    assert head.split() == ["sum", "pcgrad", "upgrad", "mgda"]
    titles = [*program.TASKS, "mean of all", "mean cosine of two tasks", "tasks stepped against"]
    assert [line[:26].rstrip() for line in lines] == titles

    runs = [[program.train(program.RULES[name], seed, SHORT) for seed in range(2)] for name in ("sum", "mgda")]
    plain, ruled = (torch.stack([scores for scores, *_ in ended]) * 100 for ended in runs)
    for index in range(len(program.TASKS)):
        _, base, *gains = re.fullmatch(
            r"(\w+) +(-?\d+% ± \d+) +([+-]\d+ ± \d+\*?) +([+-]\d+ ± \d+\*?) +([+-]\d+ ± \d+\*?) *", lines[index]
        ).groups()
        one, other = plain[:, index].tolist()
        assert base == f"{(one + other) / 2:.0f}% ± {abs(one - other) / 2**0.5:.0f}"
        one, other = (ruled - plain)[:, index].tolist()
        assert gains[-1].removesuffix("*") == f"{(one + other) / 2:+.0f} ± {abs(one - other) / 2**0.5:.0f}"
        assert gains[-1].endswith("*") == (one * other > 0)
    cosines = lines[-2][26:].split()
    assert cosines[0] == f"{sum(ended[1] for ended in runs[0]) / 2:.2f}"
    assert lines[-1].split()[-1] == "0%", "the shortest vector in the hull goes against none"
