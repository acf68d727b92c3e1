"""How models are built: ties, parametrizations, recurrent layers, checkpointing, mixed precision, compiled parts."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from lockstep import LINE, World, program
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import funcfreeze as ff
from programs.modules import Calling, square


@program
def tied_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return World(model, square)


@program
def a_tied_embedding():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "out": nn.Linear(4, 7, bias=False)})
    model["out"].weight = model["embed"].weight
    return World(
        model,
        lambda m, x: {"loss": F.cross_entropy(m["out"](m["embed"](x)), x)},
        batch=lambda turn: torch.randint(7, (6,)),
    )


@program
def one_module_in_two_places():
    layer = nn.Linear(4, 4)
    return World(nn.Sequential(layer, nn.Tanh(), layer), square)


@program
def a_parametrization():
    class Positive(nn.Module):
        def forward(self, w):
            return w.exp()

    model = nn.Linear(4, 4)
    nn.utils.parametrize.register_parametrization(model, "weight", Positive())
    return World(model, square)


@program
def a_parametrization_cached():
    model = parametrizations.weight_norm(nn.Linear(4, 4))

    def losses(model, x):
        with nn.utils.parametrize.cached():
            return {"loss": model(x).square().mean() + model(-x).mean()}

    return World(model, losses)


@program
def weight_norm():
    return World(parametrizations.weight_norm(nn.Linear(4, 4)), square)


@program
def spectral_norm():
    return World(parametrizations.spectral_norm(nn.Linear(4, 4)), square)


@program
def spectral_norm_then_eval():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Tanh())
    return World(model, square, change=model.eval)


@program
def the_old_spectral_norm():
    return World(nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Tanh()), square)


@program
def orthogonal():
    return World(parametrizations.orthogonal(nn.Linear(4, 4)), square)


@program
def a_parameter_list():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scales = nn.ParameterList([torch.ones(4), torch.zeros(4)])

        def forward(self, x):
            for scale in self.scales:
                x = torch.tanh(x + scale)
            return x

    return World(Model(), square)


@program
def an_lstm():
    model = nn.LSTM(4, 4, batch_first=True)
    return World(model, lambda m, x: {"loss": m(x)[0].square().mean()}, batch=lambda turn: torch.randn(2, 3, 4))


@program
def a_gru_with_a_carried_state():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.hidden = nn.GRU(4, 4), None

        def forward(self, x):
            out, hidden = self.gru(x, self.hidden)
            self.hidden = hidden.detach()
            return out

    return World(Model(), square, batch=lambda turn: torch.randn(3, 2, 4))


@program
def an_embedding_with_padding():
    model = nn.Embedding(7, 4, padding_idx=0)
    return World(model, square, batch=lambda turn: torch.randint(7, (6,)))


@program(wrong="writes to parameter")
def an_embedding_with_max_norm():
    model = nn.Embedding(7, 4, max_norm=0.5)
    return World(model, lambda m, x: {"loss": m(x).sum(-1).square().mean()}, batch=lambda turn: torch.randint(7, (6,)))


@program
def a_transformer_layer():
    return World(
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True),
        square,
        batch=lambda turn: torch.randn(2, 3, 4),
    )


@program(refused=LINE)
def a_transformer_encoder_with_a_mask():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(3)
    return World(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        lambda m, x: {"loss": m(x, mask=mask).square().mean()},
        batch=lambda turn: torch.randn(2, 3, 4),
    )


@program
def a_convolution():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    return World(model, square, batch=lambda turn: torch.randn(3, 1, 4, 4))


def body():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


@program
def a_checkpoint():
    return World(body(), lambda m, x: {"loss": checkpoint(m, x, use_reentrant=False).square().mean()})


@program
def a_checkpoint_switched_on():
    config = SimpleNamespace(save=False)

    def losses(m, x):
        return {"loss": (checkpoint(m, x, use_reentrant=False) if config.save else m(x)).square().mean()}

    return World(body(), losses, change=lambda: setattr(config, "save", True))


@program
def a_checkpoint_with_batch_norm():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
    return World(model, lambda m, x: {"loss": checkpoint(m, x, use_reentrant=False).square().mean()})


@program
def a_checkpoint_with_dropout():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 4))
    return World(model, lambda m, x: {"loss": checkpoint(m, x, use_reentrant=False).square().mean()})


@program
def a_checkpoint_with_dropout_in_eval():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 4)).eval()
    return World(model, lambda m, x: {"loss": checkpoint(m, x, use_reentrant=False).square().mean()})


@program(wrong="use_reentrant")
def a_reentrant_checkpoint():
    return World(
        body(),
        lambda m, x: {"loss": checkpoint(m, x.requires_grad_(), use_reentrant=True).square().mean()},
    )


@program(refused=LINE)
def a_sequential_checkpoint():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
    return World(model, lambda m, x: {"loss": checkpoint_sequential(m, 2, x, use_reentrant=False).square().mean()})


def singles(turn):
    return torch.randn(6, 4, dtype=torch.float32)


@program
def autocast_inside():
    def losses(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return {"loss": model(x).float().square().mean()}

    return World(body().float(), losses, batch=singles, rtol=1e-3)


@program
def autocast_switched_by_a_flag():
    config = SimpleNamespace(amp=False)

    def losses(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.amp):
            return {"loss": model(x).float().square().mean()}

    return World(
        body().float(),
        losses,
        batch=singles,
        rtol=1e-3,
        change=lambda: setattr(config, "amp", True),
    )


@program
def autocast_around_the_step():
    return World(
        body().float(),
        lambda m, x: {"loss": m(x).float().square().mean()},
        batch=singles,
        rtol=1e-3,
        around=lambda turn: torch.autocast("cpu", dtype=torch.bfloat16, enabled=turn > 1),
    )


@program
def a_compiled_part():
    model = body()
    model[0] = torch.compile(model[0], backend="aot_eager")
    return World(model, square)


@program
def a_part_compiled_in_place():
    model = body()
    model[0].compile(backend="aot_eager")
    return World(model, square)


@program
def a_compiled_model():
    return World(torch.compile(body(), backend="aot_eager"), square)


@program(refused=LINE)
def a_method_that_is_disabled_for_dynamo():
    @torch.compiler.disable
    def scale(h):
        return h * 2

    return World(Calling(lambda self, h: scale(h)), square)


@program(known="that is what it asks for")
def asks_whether_it_is_compiling():
    return World(Calling(lambda self, h: h * 2 if torch.compiler.is_compiling() else h), square)


@program
def a_module_without_parameters():
    class Scale(nn.Module):
        factor = 1.0

        def forward(self, x):
            return x * self.factor

    scale = Scale()
    return World(
        nn.Linear(4, 4),
        lambda m, x: {"loss": scale(m(x)).square().mean()},
        change=lambda: setattr(scale, "factor", 2.0),
    )


@program
def layer_drop_by_the_training_flag():
    return World(Calling(lambda self, h: h * 0.5 if self.training else h), square)


@program
def a_frozen_parameter_thawed_outside():
    model = body()
    model[0].requires_grad_(False)
    return World(model, square, change=lambda: model[0].requires_grad_(True))


@program
def a_parameter_frozen_later():
    model = body()
    return World(model, square, change=lambda: model[0].requires_grad_(False))


@program
def reads_requires_grad():
    model = body()
    return World(
        model,
        lambda m, x: {"loss": m(x).square().mean() * sum(p.requires_grad for p in m.parameters())},
    )


@program
def counts_parameters():
    return World(
        body(), lambda m, x: {"loss": m(x).square().mean() / sum(p.numel() for p in m.parameters() if p.requires_grad)}
    )


@program
def walks_over_modules():
    def losses(model, x):
        norm = sum(part.weight.abs().sum() for part in model.modules() if isinstance(part, nn.Linear))
        return {"loss": model(x).square().mean() + 0.1 * norm}

    return World(body(), losses)


@program
def takes_the_state_dict():
    return World(body(), lambda m, x: {"loss": m(x).square().mean() * m.state_dict()["0.weight"].norm()})


@program
def swaps_an_activation_inside_losses():
    def losses(model, x):
        return {"loss": model[2](model[1](model[0](x))).square().mean() + len(model)}

    return World(body(), losses)


@program
def weights_initialised_inside_once():
    model = body()
    model.ready = False

    def losses(model, x):
        if not model.ready:
            model.ready = True
            return {"loss": model(x).mean()}
        return {"loss": model(x).square().mean()}

    return World(model, losses)


@program
def a_buffer_used_as_a_parameter_shape():
    model = body()
    model.register_buffer("scale", torch.ones(4))
    return World(model, lambda m, x: {"loss": (m(x) * m.scale).square().mean()}, optimizer=ff.optim.adam(0.1))
