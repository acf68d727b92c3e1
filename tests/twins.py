"""Loops with averaged twins as people write them in plain torch, and the `Step` that stands for each."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import funcfreeze as ff

GRAPH = {"backend": "aot_eager"}


@dataclass(frozen=True)
class Program:
    """A loop.

    Attributes:
        nets: makes the model.
        step: of the model and of how it runs.
        by_hand: trains the model in plain torch; gives twins by name, and the losses that it saw.
        given: makes so many batches.
        next_batch: what of a call's metrics goes into the next batch.
    """

    nets: Callable[[], Any]
    step: Callable[..., Any]
    by_hand: Callable[[Any, Sequence[Any]], tuple[Mapping[str, nn.Module], list[float]]]
    given: Callable[[int], list[Any]]
    next_batch: Callable[[Any, Mapping[str, Any]], Any] = lambda batch, metrics: batch


def tensors(nets: Any) -> dict[str, Tensor]:
    """Copies of all parameters and buffers by path, of a module or of a mapping of modules and parameters."""
    if isinstance(nets, nn.Module):
        return {path: tensor.detach().clone() for path, tensor in _named(nets)}
    return {
        f"{name}.{path}" if path else name: tensor.detach().clone()
        for name, part in nets.items()
        for path, tensor in (_named(part) if isinstance(part, nn.Module) else [("", part)])
    }


def _named(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def assert_moved_alike(
    start: Mapping[str, Tensor], one: Mapping[str, Tensor], other: Mapping[str, Tensor], tolerance: float = 1e-10
) -> None:
    """Equal displacements from the start, by path."""
    assert one.keys() == other.keys()
    for path, begun in start.items():
        moved = (other[path] - begun).double()
        torch.testing.assert_close((one[path] - begun).double(), moved, rtol=0, atol=tolerance, msg=path)


def train(program: Program, step: Any, state: ff.State, given: Sequence[Any]) -> tuple[ff.State, list[float]]:
    """Our loop, and the losses of all calls in their order."""
    seen, metrics = [], {}
    for batch in given:
        state, metrics = step(state, program.next_batch(batch, metrics))
        if isinstance(step, ff.Step):
            seen += [float(metrics[name]) for name in step.plan.losses]
        else:
            seen += [float(metrics[name][loss]) for name in metrics for loss in step.plan[name].losses]
    return state, seen


def assert_is_the_loop(program: Program, run: Mapping[str, Any], number: int = 5) -> None:
    """After some steps the model, its twins and all losses are those of the plain loop."""
    nets, given = program.nets(), program.given(number)
    plain, start = copy.deepcopy(nets), tensors(nets)
    step = program.step(nets, **run)
    state = step.init()
    begun = {name: {path: tensor.clone() for path, tensor in twin.items()} for name, twin in state.targets.items()}
    torch.manual_seed(0)
    state, seen = train(program, step, state, given)
    torch.manual_seed(0)
    twins, wanted = program.by_hand(plain, given)
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(wanted), rtol=0, atol=1e-10)
    assert_moved_alike(start, {**state.params, **state.buffers}, tensors(plain))
    assert state.targets.keys() == twins.keys()
    for name, twin in twins.items():
        assert_moved_alike(begun[name], state.targets[name], tensors(twin))
    assert any(
        not torch.equal(tensor, begun[name][path]) for name in begun for path, tensor in state.targets[name].items()
    )


def twin_of(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def averaged(twin: nn.Module, own: nn.Module, decay: float) -> None:
    """The line that is in every repository."""
    for average, new in zip(twin.parameters(), own.parameters(), strict=True):
        average.data.mul_(decay).add_(new.data, alpha=1 - decay)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def encoder(wide: int = 6, out: int = 5) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, wide, bias=False), nn.BatchNorm1d(wide), nn.Tanh(), nn.Dropout(0.3), nn.Linear(wide, out)
    )


def views(number: int, rows: int = 6) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(rows, 4), torch.randn(rows, 4)) for _ in range(number)]


def labelled(number: int, rows: int = 6) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(rows, 4), torch.randint(3, (rows,))) for _ in range(number)]


# BYOL: both nets in train mode, each with statistics and dropout of its own


def byol_nets():
    predictor = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5))
    return {"online": encoder(), "predictor": predictor}


def apart(p, z):
    return 2 - 2 * F.cosine_similarity(p, z, dim=-1).mean()


def byol_losses(nets, views, *, targets):
    one, other = views
    p1, p2 = nets["predictor"](nets["online"](one)), nets["predictor"](nets["online"](other))
    z1, z2 = targets["teacher"](one), targets["teacher"](other)
    return {"byol": apart(p1, z2) + apart(p2, z1)}


def byol_step(nets, **run):
    sgd = ff.optim.sgd(0.1, momentum=0.9, weight_decay=1e-3)
    return ff.Step(nets, byol_losses, {"byol": "*"}, optimizer=sgd, targets={"teacher": ff.ema("online", 0.9)}, **run)


def byol_by_hand(nets, given):
    online, predictor = nets["online"], nets["predictor"]
    target, seen = twin_of(online), []
    parameters = [*online.parameters(), *predictor.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=1e-3)
    for one, other in given:
        p1, p2 = predictor(online(one)), predictor(online(other))
        with torch.no_grad():
            z1, z2 = target(one), target(other)
        seen.append(descend(optimizer, apart(p1, z2.detach()) + apart(p2, z1.detach())))
        averaged(target, online, 0.9)
    return {"teacher": target}, seen


# MoCo: the key encoder moves at the beginning of a step there, the queue is the loop's


def moco_losses(nets, batch, *, targets):
    query_view, key_view, queue = batch
    queries = F.normalize(nets["query"](query_view), dim=1)
    keys = F.normalize(targets["key"](key_view), dim=1)
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ queue.T], 1) / 0.2
    return {"nce": F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))}, {"keys": keys, "queue": queue}


def moco_step(nets, **run):
    sgd = ff.optim.sgd(0.1, momentum=0.9, weight_decay=1e-3)
    return ff.Step(nets, moco_losses, {"nce": "*"}, optimizer=sgd, targets={"key": ff.ema("query", 0.8)}, **run)


def moco_given(number):
    queue = F.normalize(torch.randn(12, 5), dim=1)
    return [(*pair, queue) for pair in views(number)]


def moco_next(batch, metrics):
    if not metrics:
        return batch
    return *batch[:2], torch.cat([metrics["keys"], metrics["queue"]])[:12]


def moco_by_hand(nets, given):
    query, queue = nets["query"], given[0][2]
    key, seen = twin_of(query), []
    optimizer = torch.optim.SGD(query.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    for query_view, key_view, _ in given:
        queries = F.normalize(query(query_view), dim=1)
        with torch.no_grad():
            averaged(key, query, 0.8)
            keys = F.normalize(key(key_view), dim=1)
        logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ queue.T], 1) / 0.2
        seen.append(descend(optimizer, F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))))
        queue = torch.cat([keys, queue])[:12]
    averaged(key, query, 0.8)
    return {"key": key}, seen


# DINO: a centre that is a buffer, momentum along a cosine, a weight-normed last layer that is frozen at first


class Centre(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("at", torch.zeros(5))


def dino_nets():
    last = weight_norm(nn.Linear(6, 5, bias=False))
    backbone = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Dropout(0.2))
    student = nn.Sequential(backbone, nn.Sequential(nn.Linear(6, 6), nn.GELU()), last)
    return {"student": student, "centre": Centre()}


def dino_losses(nets, crops, *, targets):
    centre = nets["centre"].at
    seen = [nets["student"](crop) / 0.1 for crop in crops]
    taught = [targets["teacher"](crop) for crop in crops[:2]]
    aims = [((out - centre) / 0.04).softmax(-1) for out in taught]
    terms = [-(q * p.log_softmax(-1)).sum(-1).mean() for i, q in enumerate(aims) for j, p in enumerate(seen) if i != j]
    centre.mul_(0.9).add_(torch.cat(taught).mean(0), alpha=0.1)
    return {"dino": sum(terms) / len(terms)}


def dino_step(nets, **run):
    last = ff.Route("student.2", start=2)
    momentum = ff.schedules.cosine(0.8, 1.0, 5)
    return ff.Step(
        nets,
        dino_losses,
        {"dino": [ff.Route(["student.0", "student.1"]), last]},
        optimizer=ff.optim.adamw(1e-2),
        targets={"teacher": ff.ema("student", momentum)},
        **run,
    )


def dino_by_hand(nets, given):
    student, centre = nets["student"], nets["centre"].at
    teacher, seen = twin_of(student), []
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2)
    for number, crops in enumerate(given):
        outs = [student(crop) / 0.1 for crop in crops]
        with torch.no_grad():
            taught = torch.cat([teacher(crop) for crop in crops[:2]])
        aims = ((taught - centre) / 0.04).softmax(-1).chunk(2)
        total, terms = 0, 0
        for i, q in enumerate(aims):
            for j, p in enumerate(outs):
                if i != j:
                    total, terms = total - (q * F.log_softmax(p, -1)).sum(-1).mean(), terms + 1
        centre.copy_(0.9 * centre + 0.1 * taught.mean(0))
        loss = total / terms
        optimizer.zero_grad()
        loss.backward()
        if number < 2:
            for parameter in student[2].parameters():
                parameter.grad = None
        optimizer.step()
        seen.append(float(loss.detach()))
        averaged(teacher, student, 1 - (1 - 0.8) * (math.cos(math.pi * number / 5) + 1) / 2)
    return {"teacher": teacher}, seen


# Mean teacher: two losses, a ramp, a decay that starts with 0, and statistics in every way


def taught_losses(nets, batch, *, targets):
    x, label = batch
    seen = nets["student"](x)
    aim = targets["teacher"](x + 0.1 * torch.randn_like(x)).softmax(-1)
    return {"cls": F.cross_entropy(seen[:, :3], label), "consistency": (seen.softmax(-1) - aim).square().mean()}


def ramped(count):
    return (1 - 1 / (count + 1)).clamp(max=0.7)


def mean_teacher(buffers, mode):
    def step(nets, **run):
        return ff.Step(
            nets,
            taught_losses,
            {"cls": "student", "consistency": {"student": ff.schedules.linear(0.0, 1.0, 3)}},
            optimizer=ff.optim.sgd(0.1, momentum=0.9),
            targets={"teacher": ff.ema("student", ramped, buffers=buffers, mode=mode)},
            **run,
        )

    def by_hand(nets, given):
        student, seen = nets["student"], []
        teacher = twin_of(student).train(mode != "eval")
        optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9)
        for number, (x, label) in enumerate(given):
            out = student(x)
            with torch.no_grad():
                aim = teacher(x + 0.1 * torch.randn_like(x)).softmax(-1)
            cls, consistency = F.cross_entropy(out[:, :3], label), F.mse_loss(out.softmax(-1), aim)
            descend(optimizer, cls + min(number / 3, 1.0) * consistency)
            seen += [float(cls.detach()), float(consistency.detach())]
            decay = min(1 - 1 / (number + 1), 0.7)
            averaged(teacher, student, decay)
            move_buffers(teacher, student, decay, buffers)
        return {"teacher": teacher}, seen

    return Program(lambda: {"student": encoder()}, step, by_hand, labelled)


def move_buffers(twin, own, decay, buffers):
    for average, new in zip(twin.buffers(), own.buffers(), strict=True):
        if buffers == "averaged" and new.is_floating_point():
            average.mul_(decay).add_(new, alpha=1 - decay)
        elif buffers != "own":
            average.copy_(new)


# DQN, double, with statistics; hard copies at some steps


def transitions(number):
    return [
        (torch.randn(6, 4), torch.randint(5, (6, 1)), torch.randn(6), torch.randn(6, 4), (torch.rand(6) < 0.2).double())
        for _ in range(number)
    ]


def dqn_losses(nets, batch, *, targets):
    seen, action, reward, then, done = batch
    value = nets["q"](seen).gather(1, action)[:, 0]
    best = nets["q"](then).argmax(1, keepdim=True)
    aim = reward + 0.9 * (1 - done) * targets["q"](then).gather(1, best)[:, 0]
    return {"td": F.smooth_l1_loss(value, aim)}


def dqn(first, **timing):
    """`first`: the number of the first step after which people copy, and then after every second or third."""

    def step(nets, **run):
        copies = ff.ema("q", 0, buffers="copied", mode="eval", **timing)
        adam = ff.optim.adam(1e-2)
        return ff.Step(nets, dqn_losses, {"td": "q"}, optimizer=adam, targets={"q": copies}, **run)

    def by_hand(nets, given):
        q, seen = nets["q"], []
        target = copy.deepcopy(q).eval()
        optimizer = torch.optim.Adam(q.parameters(), 1e-2)
        for number, (before, action, reward, then, done) in enumerate(given):
            value = q(before).gather(1, action)[:, 0]
            with torch.no_grad():
                best = q(then).argmax(1, keepdim=True)
                aim = reward + 0.9 * (1 - done) * target(then).gather(1, best)[:, 0]
            seen.append(descend(optimizer, F.smooth_l1_loss(value, aim)))
            if (number - first) % timing["every"] == 0:
                target.load_state_dict(q.state_dict())
        return {"q": target}, seen

    return Program(lambda: {"q": encoder()}, step, by_hand, transitions)


# The whole model, averaged for evaluation


def plain_losses(model, batch):
    x, label = batch
    return {"cls": F.cross_entropy(model(x), label)}


def after_first(count):
    return torch.where(count == 0, 0.0, 0.7)


def averaged_model(use_buffers):
    def step(model, **run):
        average = ff.ema("*", after_first, buffers="averaged" if use_buffers else "copied")
        sgd = ff.optim.sgd(0.1)
        return ff.Step(model, plain_losses, {"cls": "*"}, optimizer=sgd, targets={"average": average}, **run)

    def by_hand(model, given):
        optimizer, seen = torch.optim.SGD(model.parameters(), 0.1), []
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=use_buffers)
        for x, label in given:
            seen.append(descend(optimizer, F.cross_entropy(model(x), label)))
            average.update_parameters(model)
        if use_buffers:  # it rounds averages of counts down
            average.module[1].num_batches_tracked.copy_(model[1].num_batches_tracked)
        return {"average": average.module}, seen

    return Program(encoder, step, by_hand, labelled)


def swa_step(model, **run):
    equal = ff.ema("*", lambda count: (count - 1) / (count + 1), start=1, every=2, buffers="copied")
    sgd = ff.optim.sgd(0.1)
    return ff.Step(model, plain_losses, {"cls": "*"}, optimizer=sgd, targets={"swa": equal}, **run)


def swa_by_hand(model, given):
    """Equal weights, from the second step on after every second one."""
    optimizer, seen, average = torch.optim.SGD(model.parameters(), 0.1), [], AveragedModel(model)
    for number, (x, label) in enumerate(given):
        seen.append(descend(optimizer, F.cross_entropy(model(x), label)))
        if number >= 1 and (number - 1) % 2 == 0:
            average.update_parameters(model)
    return {"swa": average.module}, seen


# I-JEPA: a transformer of which the twin sees everything, without dropout


def jepa_nets():
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.2, batch_first=True, norm_first=True)
    context = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return {"context": context, "predictor": nn.Linear(8, 8)}


def jepa_losses(nets, batch, *, targets):
    x, hidden = batch
    seen = nets["predictor"](nets["context"](x * ~hidden[..., None]))
    aim = F.layer_norm(targets["context"](x), (8,))
    return {"jepa": ((seen - aim).abs().mean(-1) * hidden).sum() / hidden.sum()}


def jepa_step(nets, **run):
    average = ff.ema("context", ff.schedules.linear(0.8, 1.0, 8), mode="eval")
    adamw = ff.optim.adamw(1e-2)
    return ff.Step(nets, jepa_losses, {"jepa": "*"}, optimizer=adamw, targets={"context": average}, **run)


def jepa_by_hand(nets, given):
    context, predictor = nets["context"], nets["predictor"]
    target, seen = twin_of(context).eval(), []
    optimizer = torch.optim.AdamW([*context.parameters(), *predictor.parameters()], 1e-2)
    for number, (x, hidden) in enumerate(given):
        out = predictor(context(x * ~hidden[..., None]))
        with torch.no_grad():
            aim = F.layer_norm(target(x), (8,))
        seen.append(descend(optimizer, ((out - aim).abs().mean(-1) * hidden).sum() / hidden.sum()))
        averaged(target, context, 0.8 + 0.2 * number / 8)
    return {"context": target}, seen


def jepa_given(number):
    return [(torch.randn(3, 5, 8), torch.arange(5).expand(3, 5) < 2) for _ in range(number)]


# Features of the student under the teacher's head: gradients go through a twin, to its inputs


def through_losses(nets, batch, *, targets):
    x, label = batch
    h = nets["body"](x)
    return {"own": F.cross_entropy(nets["head"](h), label), "through": F.cross_entropy(targets["head"](h), label)}


def through_step(nets, **run):
    return ff.Step(
        nets,
        through_losses,
        {"own": "*", "through": {"body": 0.5, "head": 0.5}},
        optimizer=ff.optim.adam(1e-2),
        targets={"head": ff.ema("head", 0.8), "first": ff.ema("body", 1.0)},
        **run,
    )


def through_by_hand(nets, given):
    """`head` is routed to `through` too, and gets nothing of it. A twin with decay 1 is never moved."""
    body, head, seen = nets["body"], nets["head"], []
    twin, first = twin_of(head), twin_of(body)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], 1e-2)
    for x, label in given:
        h = body(x)
        own, through = F.cross_entropy(head(h), label), F.cross_entropy(twin(h), label)
        descend(optimizer, own + 0.5 * through)
        seen += [float(own.detach()), float(through.detach())]
        averaged(twin, head, 0.8)
    return {"head": twin, "first": first}, seen


# Diffusion: the whole model's average is warmed up, and moves at every second step


def warmed_up(count):
    return ((1 + count) / (10 + count)).clamp(max=0.9)


def diffusion_losses(nets, x):
    noise, level = torch.randn_like(x), torch.rand(len(x), 1)
    return {"noise": (nets["net"](level.sqrt() * x + (1 - level).sqrt() * noise) - noise).square().mean()}


def diffusion_step(nets, **run):
    rates = ff.schedules.linear(0.0, 1e-2, 3)
    average = ff.ema("net", warmed_up, every=2)
    adamw = ff.optim.adamw(rates)
    return ff.Step(nets, diffusion_losses, {"noise": "*"}, optimizer=adamw, targets={"ema": average}, **run)


def diffusion_by_hand(nets, given):
    net, seen = nets["net"], []
    average = twin_of(net)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: min(number / 3, 1.0))
    for number, x in enumerate(given):
        noise, level = torch.randn_like(x), torch.rand(len(x), 1)
        noisy = level.sqrt() * x + (1 - level).sqrt() * noise
        seen.append(descend(optimizer, F.mse_loss(net(noisy), noise)))
        scheduler.step()
        if number % 2 == 0:
            averaged(average, net, min(0.9, (1 + number) / (10 + number)))
    return {"ema": average}, seen


def diffusion_nets():
    return {"net": nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Dropout(0.1), nn.Linear(8, 4))}


PROGRAMS = {
    "BYOL": Program(byol_nets, byol_step, byol_by_hand, views),
    "MoCo": Program(lambda: {"query": encoder()}, moco_step, moco_by_hand, moco_given, moco_next),
    "DINO": Program(dino_nets, dino_step, dino_by_hand, lambda n: [torch.randn(3, 6, 4).unbind() for _ in range(n)]),
    "mean teacher": mean_teacher("own", None),
    "mean teacher, copied": mean_teacher("copied", "eval"),
    "mean teacher, averaged": mean_teacher("averaged", "eval"),
    "DQN": dqn(0, every=2),
    "DQN, after every third": dqn(2, every=3, start=2),
    "AveragedModel": averaged_model(use_buffers=False),
    "AveragedModel, with buffers": averaged_model(use_buffers=True),
    "SWA": Program(encoder, swa_step, swa_by_hand, labelled),
    "JEPA": Program(jepa_nets, jepa_step, jepa_by_hand, jepa_given),
    "through the twin": Program(
        lambda: {"body": encoder(), "head": nn.Linear(5, 3)}, through_step, through_by_hand, labelled
    ),
    "diffusion": Program(
        diffusion_nets, diffusion_step, diffusion_by_hand, lambda n: [torch.randn(6, 4) for _ in range(n)]
    ),
}
