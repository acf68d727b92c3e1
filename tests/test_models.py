"""Models that nobody here wrote: torchvision's and transformers', built from a configuration, with random weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcfreeze as ff
from laws import assert_step_law
from vision import make_importable, torchvision


@pytest.mark.parametrize(
    "name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", pytest.param("resnet18", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("engine", ["routed", "toggle"])
def test_convolutional_networks(name, engine):
    models = torchvision().models
    model = nn.ModuleDict(
        {"encoder": getattr(models, name)(num_classes=16), "cls": nn.Linear(16, 5), "domain": nn.Linear(16, 2)}
    )

    def losses(m, batch):
        h = m["encoder"](batch)
        label = torch.arange(len(h))
        return {
            "cls": F.cross_entropy(m["cls"](h), label % 5),
            "domain": F.cross_entropy(m["domain"](h), label % 2),
        }, {"features": h}

    routes = {"cls": ["encoder", "cls"], "domain": {"domain": 1.0, "encoder": -0.1}}
    assert_step_law(model, losses, routes, torch.randn(4, 3, 32, 32), engine=engine, tolerance=1e-10)


def _bert(transformers):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertForMaskedLM(config)


def _gpt2(transformers):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))


def _t5(transformers):
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make", [_bert, _gpt2, _t5])
@pytest.mark.parametrize("engine", ["routed", "toggle"])
def test_language_models(make, engine):
    make_importable()
    language_model = make(pytest.importorskip("transformers")).double()  # dropout 0.1 is on in training mode
    language_model.train()
    model = nn.ModuleDict({"lm": language_model, "probe": nn.Linear(16, 2)})

    def losses(m, batch):
        out = m["lm"](input_ids=batch, labels=batch, output_hidden_states=True)
        hidden = out.hidden_states[-1] if "hidden_states" in out else out.decoder_hidden_states[-1]
        return {"lm": out.loss, "domain": F.cross_entropy(m["probe"](hidden.mean(1)), torch.arange(len(batch)) % 2)}

    routes = {"lm": "lm", "domain": {"probe": 1.0, "lm": -0.1}}
    assert_step_law(model, losses, routes, torch.randint(50, (3, 7)), engine=engine, tolerance=1e-10)


@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
def test_what_is_kept_on_a_parameter_is_seen(engine):
    """Libraries keep shapes, scales and flags there, and read them in the forward."""
    model = nn.Linear(3, 1)
    model.register_buffer("shift", torch.ones(1))
    model.weight.scale, model.shift.scale = 2.0, 3.0
    x = torch.randn(4, 3)

    def losses(model, x):
        return {"loss": (model(x) * model.weight.scale + model.shift * model.shift.scale).square().mean()}

    step = ff.Step(model, losses, {"loss": "*"}, optimizer=ff.optim.sgd(0.1), engine=engine)
    state, metrics = step(step.init(), x)
    torch.testing.assert_close(metrics["loss"], losses(model, x)["loss"].detach())
    assert step.call(state, lambda model: model.weight.scale) == 2.0
    assert not any(vars(tensor) for tensor in (*state.params.values(), *state.buffers.values())), "it is plain data"
    assert ff.verify(step, state, x).ok
