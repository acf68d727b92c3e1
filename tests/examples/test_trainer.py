"""Hugging Face's `Trainer` around a LoRA model: against a forward with detached parameters and a reversed gradient."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from plain_ways import distance, example, framework, scaled

import funcfreeze as ff

pytestmark = pytest.mark.slow
DROPOUT = "hidden_dropout_prob", "attention_probs_dropout_prob"


@pytest.fixture(scope="module")
def program():
    framework("transformers")
    framework("peft")
    return example("trainer_lora")


@functools.cache
def kinds(program):
    """Readers with other forwards than the example's."""

    class Plain(program.Reader):
        """The sum of two losses; what reads the topic sees the pooler as a constant, and a reversed gradient."""

        adversarial = -0.1

        def forward(self, input_ids, labels=None, topic_labels=None):
            hidden = self.bert(input_ids).last_hidden_state.mean(1)
            praise = self.praise(self.pooler(hidden))
            frozen = {name: parameter.detach() for name, parameter in self.pooler.named_parameters()}
            topic = self.topic(torch.func.functional_call(self.pooler, frozen, scaled(hidden, self.adversarial)))
            loss = F.cross_entropy(praise, labels) + F.cross_entropy(topic, topic_labels)
            return program.SequenceClassifierOutput(loss=loss, logits=(praise, topic))

    class Summed(Plain):
        adversarial = 1.0

    class WithKeywords(program.Reader):
        def forward(self, input_ids, labels=None, topic_labels=None, **kwargs):
            return super().forward(input_ids, labels, topic_labels)

    class WithKeywordsAndSaidSo(WithKeywords):
        accepts_loss_kwargs = False

    return {kind.__name__: kind for kind in (program.Reader, Plain, Summed, WithKeywords, WithKeywordsAndSaidSo)}


def reader(program, kind="Reader", dropout=0.1):
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = program.BertConfig(vocab_size=len(program.WORDS), **size, **dict.fromkeys(DROPOUT, dropout))
    torch.manual_seed(0)
    return program.with_adapters(kinds(program)[kind](config)).double()


def fitted(program, model, count=160, **options):
    """Trained on so many reviews, and its trainer."""
    options = program.arguments(num_train_epochs=1, logging_steps=1, disable_tqdm=True, **options)
    trainer = program.Trainer(
        model, options, train_dataset=program.reviews(count, 0), eval_dataset=program.reviews(40, 1)
    )
    trainer.train()
    return trainer


def test_as_the_plain_way(program):
    """Ten steps of two batches, each with dropout, clipping, and Adam."""
    start = copy.deepcopy(reader(program).state_dict())
    ours, theirs, summed = (reader(program, kind) for kind in ("Reader", "Plain", "Summed"))
    trainers = [fitted(program, model, count=320) for model in (ours, theirs, summed)]
    assert [trainer.state.global_step for trainer in trainers] == [10, 10, 10]
    norms = [[log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log] for trainer in trainers]
    assert norms[0] == pytest.approx(norms[1], rel=1e-9)
    assert max(norms[0]) > 0.1, "clipping bites"

    assert distance(ours, theirs, start) < 1e-10
    assert distance(ours, summed, start) > 1e-4


def test_evaluation_gives_the_plain_sum(program):
    model = reader(program)
    trainer = fitted(program, model)
    found = trainer.evaluate()["eval_loss"]
    base = model.get_base_model().eval()
    rows = program.reviews(40, 1)
    words, praise, topic = (
        torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels", "topic_labels")
    )
    with torch.no_grad():
        pooled = base.pooler(base.bert(words).last_hidden_state.mean(1))
        wanted = F.cross_entropy(base.praise(pooled), praise) + F.cross_entropy(base.topic(pooled), topic)
    assert found == pytest.approx(wanted.item(), rel=1e-6)  # trainers log in float32


def test_accumulation_divides_by_its_steps(program):
    """Two batches of 8 are one of 16; and a step later, too."""
    start = copy.deepcopy(reader(program).state_dict())
    whole, halves = reader(program, dropout=0.0), reader(program, dropout=0.0)
    fitted(program, whole, batch=16, accumulated=1)
    fitted(program, halves, batch=8, accumulated=2)

    assert distance(whole, halves, start) < 1e-10


def test_a_forward_with_keywords_is_not_divided_unless_it_says_so(program):
    norms = {}
    for kind in ("Reader", "WithKeywords", "WithKeywordsAndSaidSo"):
        trainer = fitted(program, reader(program, kind, dropout=0.0), count=32)
        norms[kind] = next(log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log)
    assert norms["WithKeywords"] == pytest.approx(2 * norms["Reader"], rel=1e-6)
    assert norms["WithKeywordsAndSaidSo"] == pytest.approx(norms["Reader"], rel=1e-6)


def test_routes_by_pefts_names(program):
    model = reader(program)
    base = model.get_base_model()
    ff.combine({"praise": None, "topic": topic_loss(base, program)}, program.ROUTES, base).backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved == {name for name in trained if ".lora_" in name or ".topic." in name}
    assert {name.split(".")[2] for name in trained - moved} == {"pooler", "praise"}


def topic_loss(base, program):
    rows = program.reviews(8, 0)
    pooled = base.pooler(base.bert(torch.tensor([row["input_ids"] for row in rows])).last_hidden_state.mean(1))
    return F.cross_entropy(base.topic(pooled), torch.tensor([row["topic_labels"] for row in rows]))
