"""What a forward keeps: counters, caches, histories, and buffers."""

from __future__ import annotations

import collections

import torch
from lockstep import World, program
from torch import nn

from programs.modules import Calling, square


@program
def a_counter():
    def f(self, h):
        self.calls += 1
        return h * (1 + self.calls)

    return World(Calling(f, calls=0), square)


@program
def a_counter_nobody_reads():
    def f(self, h):
        self.calls += 1
        return h

    return World(Calling(f, calls=0), square, steps=6)


@program
def a_warmup_by_counter():
    def f(self, h):
        self.calls += 1
        return h if self.calls < 3 else h * 2

    return World(Calling(f, calls=0), square, steps=5)


@program
def a_print_once_flag():
    def f(self, h):
        if not self.told:
            self.told = True
        return h

    return World(Calling(f, told=False), square)


@program
def a_mask_cache():
    def f(self, h):
        if self.mask is None or self.mask.shape[0] != h.shape[0]:
            self.mask = torch.arange(h.shape[0]).remainder(2).to(h.dtype)[:, None]
        return h * self.mask

    return World(Calling(f, mask=None), square, batch=lambda turn: torch.randn(4 + turn // 2, 4))


@program
def a_rope_cache_in_a_dict():
    def f(self, h):
        n = h.shape[0]
        if n not in self.cache:
            self.cache[n] = torch.cos(torch.arange(n, dtype=h.dtype))[:, None]
        return h * self.cache[n]

    return World(Calling(f, cache={}), square, batch=lambda turn: torch.randn(4 + turn % 2, 4))


@program
def a_rope_cache_that_grows():
    def f(self, h):
        if self.longest < h.shape[0]:
            self.longest = h.shape[0]
            self.cos = torch.cos(torch.arange(self.longest, dtype=h.dtype))[:, None]
        return h * self.cos[: h.shape[0]]

    sizes = [4, 3, 6, 5, 6]
    return World(Calling(f, longest=0, cos=None), square, batch=lambda turn: torch.randn(sizes[turn], 4), steps=5)


@program
def an_auxiliary_loss_read_in_the_same_step():
    def f(self, h):
        self.l_aux = h.softmax(-1).square().mean()
        return h

    return World(Calling(f, l_aux=None), lambda model, x: {"loss": model(x).square().mean() + 0.1 * model.l_aux})


@program
def an_auxiliary_loss_of_its_own():
    def f(self, h):
        self.l_aux = h.softmax(-1).square().mean()
        return h

    def losses(model, x):
        return {"loss": model(x).square().mean(), "aux": model.l_aux}

    return World(Calling(f, l_aux=None), losses, routes={"loss": "*", "aux": {"linear.weight": 0.1}})


@program
def auxiliary_losses_in_a_list():
    def f(self, h):
        self.aux.append(h.softmax(-1).square().mean())
        return h

    def losses(model, x):
        model.aux.clear()
        value = model(x).square().mean() + model(-x).mean()
        return {"loss": value + sum(model.aux)}

    return World(Calling(f, aux=[]), losses)


@program
def a_history_of_detached_losses():
    def losses(model, x):
        value = model(x).square().mean()
        model.history.append(value.detach())
        return {"loss": value}

    return World(Calling(lambda self, h: h, history=[]), losses)


@program
def a_history_that_is_read():
    def losses(model, x):
        value = model(x).square().mean()
        past = sum(model.history) / max(len(model.history), 1)
        model.history.append(value.detach())
        return {"loss": value * (1 + past)}

    return World(Calling(lambda self, h: h, history=[]), losses)


@program
def a_deque_of_features():
    queue = collections.deque(maxlen=2)

    def losses(model, x):
        h = model(x)
        past = sum(q.mean() for q in queue)
        queue.append(h.detach())
        return {"loss": h.square().mean() + h.mean() * past}

    return World(Calling(lambda self, h: h), losses, seen=lambda: queue, steps=5)


@program
def a_list_cut_to_the_last_three():
    def f(self, h):
        self.recent = [*self.recent, h.detach().mean()][-3:]
        return h * torch.stack(self.recent).mean()

    return World(Calling(f, recent=[]), square, steps=6)


@program
def a_history_appended_between_steps():
    model = Calling(lambda self, h: h * (1 + len(self.history)), history=[])
    return World(model, square, change={turn: lambda: model.history.append(1.0) for turn in range(1, 4)})


@program
def a_history_nobody_reads_between_steps():
    model = Calling(lambda self, h: h, history=[])
    return World(model, square, change={turn: lambda: model.history.append(1.0) for turn in range(1, 6)}, steps=6)


@program
def a_running_mean_in_an_attribute():
    def f(self, h):
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean()
        return h - self.mean

    return World(Calling(f, mean=torch.zeros(())), square)


@program
def a_running_mean_from_a_float():
    def f(self, h):
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean()
        return h - self.mean

    return World(Calling(f, mean=0.0), square)


@program
def a_running_mean_in_place():
    def f(self, h):
        self.mean.mul_(0.9).add_(0.1 * h.detach().mean())
        return h - self.mean

    return World(Calling(f, mean=torch.zeros(())), square)


@program
def a_running_mean_of_features_in_place():
    def f(self, h):
        self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return h - self.mean

    return World(Calling(f, mean=torch.zeros(4)), square)


@program
def a_running_mean_in_a_closure():
    mean = torch.zeros(())

    def losses(model, x):
        nonlocal mean
        h = model(x)
        mean = 0.9 * mean + 0.1 * h.detach().mean()
        return {"loss": (h - mean).square().mean()}

    return World(nn.Linear(4, 4), losses, seen=lambda: mean)


@program
def a_running_mean_in_a_dict():
    stats = {}

    def losses(model, x):
        h = model(x)
        stats["mean"] = 0.9 * stats.get("mean", 0.0) + 0.1 * h.detach().mean()
        return {"loss": (h - stats["mean"]).square().mean()}

    return World(nn.Linear(4, 4), losses, seen=lambda: stats)


@program
def a_hidden_state_kept_undetached():
    def f(self, h):
        out = h if self.hidden is None else h + 0.5 * self.hidden.detach()
        self.hidden = out
        return out

    return World(Calling(f, hidden=None), square)


@program
def a_hidden_state_reset_between_steps():
    def f(self, h):
        self.hidden = h if self.hidden is None else h + 0.5 * self.hidden.detach()
        return self.hidden

    model = Calling(f, hidden=None)
    return World(model, square, change=lambda: setattr(model, "hidden", None), steps=5)


def with_buffer(f, **options):
    model = Calling(f)
    model.register_buffer("state", torch.ones(4), **options)
    return model


@program
def a_buffer_written_in_place():
    def f(self, h):
        self.state.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return h - self.state

    return World(with_buffer(f), square)


@program
def a_buffer_reassigned():
    def f(self, h):
        self.state = 0.9 * self.state + 0.1 * h.detach().mean(0)
        return h - self.state

    return World(with_buffer(f), square)


@program
def a_buffer_reassigned_not_persistent():
    def f(self, h):
        self.state = 0.9 * self.state + 0.1 * h.detach().mean(0)
        return h - self.state

    return World(with_buffer(f, persistent=False), square)


@program
def a_buffer_that_grows():
    def f(self, h):
        self.state = torch.cat([self.state, h.detach().mean(0)[:1]])
        return h * self.state.mean()

    return World(with_buffer(f), square)


@program
def a_buffer_reassigned_to_its_input():
    def f(self, h):
        self.state = h.detach()[0]
        return h - self.state

    return World(with_buffer(f), square)


@program
def a_buffer_written_by_data():
    def f(self, h):
        self.state.data = 0.5 * self.state + h.detach().mean(0)
        return h - self.state

    return World(with_buffer(f), square)


@program
def a_buffer_counts_steps_and_is_compared():
    def f(self, h):
        self.state += 1
        return torch.where(self.state > 2, h, 2 * h)

    return World(with_buffer(f), square)


@program(wrong="late")
def a_buffer_registered_late():
    def f(self, h):
        if "late" not in self._buffers:
            self.register_buffer("late", torch.ones(4))
        return h * self.late

    return World(Calling(f), square)


@program(wrong="late")
def a_buffer_registered_between_steps():
    model = Calling(lambda self, h: h * self.late if hasattr(self, "late") else h)
    return World(model, square, change=lambda: model.register_buffer("late", torch.full((4,), 2.0)))


@program
def a_module_buffer_written_between_steps():
    model = with_buffer(lambda self, h: h * self.state)
    return World(model, square, change=lambda: model.state.mul_(5.0))


@program
def a_buffer_that_is_none_then_set_on_the_module():
    model = Calling(lambda self, h: h if self.state is None else h * self.state)
    model.register_buffer("state", None)
    return World(model, square)


@program
def a_queue_of_keys_in_buffers():
    class Moco(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
            self.register_buffer("queue", torch.randn(4, 6))
            self.register_buffer("at", torch.zeros(1, dtype=torch.long))

        def forward(self, x):
            with torch.no_grad():
                for q, k in zip(self.query.parameters(), self.key.parameters(), strict=True):
                    k.mul_(0.9).add_(q, alpha=0.1)
                keys = self.key(x)
            logits = self.query(x) @ self.queue.clone()
            self.queue[:, :2] = keys[:2].T
            self.at[0] = (self.at + 2) % 6
            return logits

    return World(Moco(), square)
