"""Other networks and the model's own tensors: teachers, targets, anchors, penalties."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from lockstep import LINE, World, program
from torch import nn


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def distilled(model, teacher, x):
    with torch.no_grad():
        wanted = teacher(x)
    return {"loss": (model(x) - wanted).square().mean()}


@program
def a_teacher_in_a_closure():
    model, teacher = net(), net().eval().requires_grad_(False)
    return World(model, lambda model, x: distilled(model, teacher, x))


@program
def an_ema_teacher_updated_outside():
    model, teacher = net(), net().requires_grad_(False)

    def between(step, state, turn):
        with torch.no_grad():
            for path, weight in teacher.named_parameters():
                weight.lerp_(state.params[path], 0.1)
        return step, state

    return World(model, lambda model, x: distilled(model, teacher, x), between=between)


@program
def an_ema_teacher_by_data():
    model, teacher = net(), net()

    def between(step, state, turn):
        for path, weight in teacher.named_parameters():
            weight.data = 0.9 * weight.data + 0.1 * state.params[path]
        return step, state

    return World(model, lambda model, x: distilled(model, teacher, x), between=between)


@program
def an_averaged_model():
    model = net()
    teacher = torch.optim.swa_utils.AveragedModel(model)

    def between(step, state, turn):
        teacher.update_parameters(step.export(state))
        return step, state

    return World(model, lambda model, x: distilled(model, teacher, x), between=between)


@program
def a_teacher_rebound():
    model, box = net(), SimpleNamespace(teacher=net())
    return World(
        model, lambda model, x: distilled(model, box.teacher, x), change=lambda: setattr(box, "teacher", net())
    )


@program
def a_teacher_rebound_to_another_architecture():
    model, box = net(), {"teacher": net()}
    return World(
        model,
        lambda model, x: distilled(model, box["teacher"], x),
        change=lambda: box.update(teacher=nn.Linear(4, 4)),
    )


@program
def an_ensemble_that_grows():
    model, teachers = net(), [net()]
    return World(
        model,
        lambda model, x: {"loss": sum(distilled(model, teacher, x)["loss"] for teacher in teachers)},
        change=lambda: teachers.append(net()),
    )


@program
def a_teacher_with_a_gradient_that_nobody_wants():
    model, teacher = net(), net()
    return World(model, lambda model, x: {"loss": (model(x) - teacher(x)).square().mean()})


@program
def a_teacher_hidden_in_a_list_of_the_model():
    model = net()
    model.teacher = [net().requires_grad_(False)]
    return World(model, lambda model, x: distilled(model, model.teacher[0], x))


@program
def a_teacher_with_batch_norm_in_train_mode():
    model, teacher = net(), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).requires_grad_(False)
    return World(model, lambda model, x: distilled(model, teacher, x), seen=lambda: dict(teacher.named_buffers()))


@program(refused=LINE)
def a_teacher_that_is_a_copy_made_at_the_first_call():
    box = SimpleNamespace(teacher=None)
    made = net()

    def losses(model, x):
        if box.teacher is None:
            box.teacher = made
        return distilled(model, box.teacher, x)

    return World(net(), losses)


@program
def a_frozen_backbone():
    model = nn.ModuleDict({"backbone": net().requires_grad_(False), "head": nn.Linear(4, 2)})
    return World(
        model,
        lambda model, x: {"loss": model["head"](model["backbone"](x)).square().mean()},
        routes={"loss": "head"},
    )


@program
def a_frozen_backbone_as_a_feature_function():
    backbone = net().requires_grad_(False).eval()
    return World(nn.Linear(4, 2), lambda model, x: {"loss": model(backbone(x).detach()).square().mean()})


@program
def a_target_network_copied_every_two_steps():
    model, target = net(), net()

    def between(step, state, turn):
        if turn % 2 == 0:
            target.load_state_dict(step.export(state).state_dict())
        return step, state

    return World(model, lambda model, x: distilled(model, target, x), between=between)


@program
def a_target_network_inside_the_model():
    model = nn.ModuleDict({"online": net(), "target": net()})

    def losses(model, x):
        with torch.no_grad():
            for p, q in zip(model["target"].parameters(), model["online"].parameters(), strict=True):
                p.copy_(0.9 * p + 0.1 * q)
        return distilled(model["online"], model["target"], x)

    return World(model, losses, routes={"loss": "online"})


@program
def a_target_network_inside_written_by_data():
    model = nn.ModuleDict({"online": net(), "target": net().requires_grad_(False)})

    def losses(model, x):
        for p, q in zip(model["target"].parameters(), model["online"].parameters(), strict=True):
            p.data = 0.9 * p.data + 0.1 * q.data
        return distilled(model["online"], model["target"], x)

    return World(model, losses, routes={"loss": "online"})


@program
def a_target_network_inside_written_by_data_mul():
    model = nn.ModuleDict({"online": net(), "target": net().requires_grad_(False)})

    def losses(model, x):
        for p, q in zip(model["target"].parameters(), model["online"].parameters(), strict=True):
            p.data.mul_(0.9).add_(q.data, alpha=0.1)
        return distilled(model["online"], model["target"], x)

    return World(model, losses, routes={"loss": "online"})


@program
def a_detached_head():
    model = nn.ModuleDict({"body": net(), "head": nn.Linear(4, 2)})

    def losses(model, x):
        h = model["body"](x)
        return {"loss": h.square().mean(), "probe": model["head"](h.detach()).square().mean()}

    return World(model, losses, routes={"loss": "body", "probe": "head"})


@program
def weight_decay_in_losses():
    return World(
        net(),
        lambda model, x: {"loss": model(x).square().mean() + 0.1 * sum(p.square().sum() for p in model.parameters())},
    )


@program
def weight_decay_by_names():
    def losses(model, x):
        decay = sum(p.square().sum() for n, p in model.named_parameters() if n.endswith("weight"))
        return {"loss": model(x).square().mean(), "decay": decay}

    return World(net(), losses, routes={"loss": "*", "decay": {"*.weight": 0.1}})


@program
def an_anchor_cloned():
    model = net()
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()}

    def losses(model, x):
        near = sum((p - anchor[n]).square().sum() for n, p in model.named_parameters())
        return {"loss": model(x).square().mean() + near}

    return World(model, losses, seen=lambda: anchor)


@program
def an_anchor_moved_between_steps():
    model = net()
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()}

    def between(step, state, turn):
        if turn == 2:
            anchor.update({name: p.clone() for name, p in state.params.items()})
        return step, state

    def losses(model, x):
        near = sum((p - anchor[n]).square().sum() for n, p in model.named_parameters())
        return {"loss": model(x).square().mean() + near}

    return World(model, losses, between=between)


@program
def elastic_weight_consolidation():
    model = net()
    fisher = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    old = copy.deepcopy(model)

    def losses(model, x):
        pairs = zip(model.named_parameters(), old.parameters(), strict=True)
        return {"loss": model(x).mean() + sum((fisher[n] * (p - q.detach()) ** 2).sum() for (n, p), q in pairs)}

    return World(model, losses)


@program(eager="by another way")
def a_list_of_the_models_own_parameters():
    model = net()
    params = list(model.parameters())
    return World(model, lambda model, x: {"loss": model(x).mean() + sum(p.square().sum() for p in params)})


@program(eager="by another way")
def a_dict_of_the_models_own_parameters():
    model = net()
    params = dict(model.named_parameters())
    return World(model, lambda model, x: {"loss": model(x).mean() + params["0.weight"].square().sum()})


@program(eager="by another way")
def a_weight_in_a_closure():
    model = net()
    w = model[0].weight
    return World(model, lambda model, x: {"loss": model(x).mean() + w.square().sum()})


@program(eager="by another way")
def a_weight_in_a_closure_in_the_second_loss_only():
    model = net()
    w = model[2].weight
    return World(
        model, lambda model, x: {"loss": model(x).mean(), "l2": w.square().sum()}, routes={"loss": "*", "l2": "2"}
    )


@program(eager="by another way")
def a_weight_in_a_closure_read_without_gradient():
    model = net()
    w = model[0].weight

    def losses(model, x):
        with torch.no_grad():
            size = w.norm()
        return {"loss": model(x).square().mean() * size}

    return World(model, losses)


@program(wrong="by another way")
def a_detached_weight_in_a_closure():
    model = net()
    w = model[0].weight.detach()
    return World(model, lambda model, x: {"loss": model(x).square().mean() + (model[0].weight - w).square().sum()})


@program(eager="by another way")
def a_weight_detached_inside():
    model = net()
    w = model[0].weight
    return World(model, lambda model, x: {"loss": model(x).square().mean() * w.detach().norm()})


@program
def the_model_itself_in_a_closure():
    model = net()
    return World(model, lambda _, x: {"loss": model(x).square().mean()})


@program
def a_part_of_the_model_in_a_closure():
    model = net()
    head = model[2]
    return World(model, lambda model, x: {"loss": head(model[1](model[0](x))).square().mean()})


@program
def a_trainer_that_holds_the_model():
    class Trainer:
        def __init__(self):
            self.model = net()
            self.params = list(self.model.parameters())

        def losses(self, _, x):
            return {"loss": self.model(x).square().mean() + 0.1 * self.model[0].weight.abs().sum()}

    trainer = Trainer()
    return World(trainer.model, trainer.losses)


@program(wrong="by another way")
def a_bare_tensor_that_is_a_parameters_data():
    model = net()
    model.alias = model[0].weight.data
    return World(model, lambda model, x: {"loss": model(x).square().mean() * model.alias.norm()})
