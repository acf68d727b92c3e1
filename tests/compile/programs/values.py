"""Values that decide, and gradients inside losses: masks, items, autograd functions, second order."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from lockstep import LINE, World, program
from torch import nn

STRENGTH = 1.0


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def by(read, **options):
    return World(net(), lambda model, x: {"loss": read(model, x)}, **options)


@program
def a_where():
    return by(lambda m, x: torch.where(m(x) > 0, m(x), m(x) * 0.1).sum())


@program
def a_boolean_index():
    return by(lambda m, x: m(x)[x[:, 0] > 0].sum())


@program
def a_boolean_index_and_its_mean():
    def read(model, x):
        h = model(x)
        return h[h > 0].mean()

    return by(read)


@program
def masked_select_by_nonzero():
    return by(lambda m, x: m(x)[(x[:, 0] > 0).nonzero()[:, 0]].sum())


@program
def an_item_as_a_factor():
    return by(lambda m, x: m(x).square().mean() * x.abs().max().item())


@program
def an_item_as_a_metric():
    def losses(model, x):
        value = model(x).square().mean()
        return {"loss": value}, {"number": value.item()}

    return World(net(), losses)


@program
def a_float_of_a_tensor():
    return by(lambda m, x: m(x).square().mean() * float(x.sum()))


@program(refused=LINE)
def a_branch_on_a_tensor():
    return by(lambda m, x: m(x).sum() if x.sum() > 0 else m(x).mean())


@program(refused=LINE)
def a_loop_until_small():
    def read(model, x):
        h = x
        while h.norm() > 1:
            h = h * 0.5
        return model(h).square().mean()

    return by(read)


@program
def an_assert_on_a_tensor():
    def read(model, x):
        value = model(x).square().mean()
        assert value >= 0
        return value

    return by(read)


@program(refused=LINE)
def an_assert_on_nan():
    def read(model, x):
        value = model(x).square().mean()
        if torch.isnan(value):
            raise ValueError("nan")
        return value

    return by(read)


@program
def a_unique():
    return by(lambda m, x: m(x).square().mean() * torch.unique(x.round()).numel())


@program(refused=LINE)
def tolist_of_labels():
    return by(lambda m, x: sum(m(x)[i, j] for i, j in enumerate((x[:, 0] > 0).long().tolist())))


@program
def a_one_hot():
    return by(lambda m, x: (m(x) * F.one_hot((x[:, 0] > 0).long(), 3)).sum())


@program
def a_sort_and_top_k():
    return by(lambda m, x: m(x).topk(2, -1).values.sum() + m(x).sort(0).values[0].sum())


def reversal(scale):
    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g):
            return -scale() * g

    return lambda model, x: Reverse.apply(model[0](x)).square().mean() + model(x).square().mean()


@program
def a_gradient_reversal_with_an_argument():
    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, scale):
            ctx.scale = scale
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g):
            return -ctx.scale * g, None

    config = SimpleNamespace(scale=1.0)
    return by(
        lambda m, x: m[2](Reverse.apply(m[0](x), config.scale)).square().mean(),
        change=lambda: setattr(config, "scale", 0.3),
    )


@program
def a_reversal_whose_backward_reads_a_global():
    return by(
        reversal(lambda: STRENGTH),
        change=lambda: globals().update(STRENGTH=0.3),
        restore=lambda: globals().update(STRENGTH=1.0),
    )


@program
def a_reversal_whose_backward_reads_a_closure():
    config = SimpleNamespace(scale=1.0)
    return by(reversal(lambda: config.scale), change=lambda: setattr(config, "scale", 0.3))


@program(refused=LINE)
def a_reversal_whose_backward_reads_a_class_attribute():
    class Reverse(torch.autograd.Function):
        scale = 1.0

        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g):
            return -Reverse.scale * g

    return by(lambda m, x: m[2](Reverse.apply(m[0](x))).square().mean(), change=lambda: setattr(Reverse, "scale", 0.3))


@program
def a_reversal_whose_scale_is_a_tensor():
    scale = torch.ones(())
    return by(reversal(lambda: scale), change=lambda: scale.fill_(0.3))


@program
def a_reversal_whose_scale_becomes_a_float_on_ctx():
    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, module):
            ctx.module = module
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g):
            return -ctx.module.scale * g, None

    model = net()
    model.scale = 1.0
    return World(
        model,
        lambda m, x: {"loss": m[2](Reverse.apply(m[0](x), m)).square().mean()},
        change=lambda: setattr(model, "scale", 0.3),
    )


@program
def a_straight_through_by_detach():
    return by(lambda m, x: (m(x) + (m(x).round() - m(x)).detach()).square().mean())


@program
def a_straight_through_function():
    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.round()

        @staticmethod
        def backward(ctx, g):
            return g

    return by(lambda m, x: (Round.apply(m(x)) - 1).square().mean())


@program
def a_gradient_penalty():
    def read(model, x):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (g.norm(dim=1) - 1).square().mean()

    return by(read)


@program
def a_gradient_penalty_with_an_interpolation():
    def read(model, x):
        mix = (torch.rand(6, 1) * x).requires_grad_(True)
        out = model(mix)
        (g,) = torch.autograd.grad(out, mix, torch.ones_like(out), create_graph=True, retain_graph=True)
        return (g.flatten(1).norm(2, dim=1) - 1).square().mean() + out.mean()

    return by(read)


@program
def an_adaptive_weight():
    def losses(model, x):
        h = model(x)
        one, two = h.square().mean(), h.abs().mean()
        (a,) = torch.autograd.grad(one, model[2].weight, retain_graph=True)
        (b,) = torch.autograd.grad(two, model[2].weight, retain_graph=True)
        return {"loss": one + (a.norm() / (b.norm() + 1e-4)).detach() * two}

    return World(net(), losses)


@program
def grad_by_torch_func():
    def read(model, x):
        g = torch.func.vmap(torch.func.grad(lambda row: model(row).sum()))(x)
        return g.square().mean()

    return by(read)


@program
def a_functional_call():
    def read(model, x):
        scaled = {name: p * 1.1 for name, p in model.named_parameters()}
        return torch.func.functional_call(model, scaled, (x,)).square().mean()

    return by(read)


@program
def an_inner_step_of_maml():
    def read(model, x):
        params = dict(model.named_parameters())
        inner = torch.func.functional_call(model, params, (x,)).square().mean()
        given = torch.autograd.grad(inner, list(params.values()), create_graph=True)
        moved = {n: p - 0.1 * g for (n, p), g in zip(params.items(), given, strict=True)}
        return torch.func.functional_call(model, moved, (-x,)).square().mean()

    return by(read)


@program
def a_jacobian_by_torch_func():
    return by(lambda m, x: torch.func.jacrev(m)(x[0]).square().sum() + m(x).mean())


@program
def a_backward_inside():
    def read(model, x):
        x = x.clone().requires_grad_()
        model(x).sum().backward()
        return model(x + 0.1 * x.grad.sign()).square().mean()

    return by(read)


@program(refused=LINE)
def an_adversarial_batch():
    def read(model, x):
        noise = torch.zeros_like(x, requires_grad=True)
        (g,) = torch.autograd.grad(model(x + noise).square().mean(), noise)
        return model(x + 0.1 * g.sign()).square().mean()

    return by(read)
