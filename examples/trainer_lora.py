# pip install -c constraints.txt ".[examples]" && python examples/trainer_lora.py
"""Hugging Face's `Trainer` with a PEFT LoRA model and an auxiliary loss: nothing is overridden but the forward.

A transformer reads whether a review praises. It is frozen but for its adapters, which learn to hide, by the auxiliary
loss, what the review is about; the head that looks for that is trained by the same loss. For want of downloads the
transformer is a tiny one that starts at random, and the reviews are made up.
"""

from __future__ import annotations

import random
import tempfile

try:
    import torch
    import torch.nn.functional as F
    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers import BertConfig, BertModel, BertPreTrainedModel, Trainer, TrainingArguments
    from transformers.modeling_outputs import SequenceClassifierOutput

    import funcfreeze as ff
except ModuleNotFoundError as error:
    raise SystemExit(f'{error.name} is missing: pip install -c constraints.txt ".[examples]"') from None

ADAPTERS = "*.lora_*"  # PEFT's names; frozen parameters are passed over
ROUTES = {
    "praise": [ADAPTERS, "pooler", "praise"],
    "topic": {"topic": 1.0, ADAPTERS: -0.1},  # through the pooler, which stays as it is
}


class Reader(BertPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.pooler = nn.Sequential(nn.Linear(config.hidden_size, config.hidden_size), nn.Tanh())
        self.praise, self.topic = nn.Linear(config.hidden_size, 2), nn.Linear(config.hidden_size, 2)
        self.post_init()

    # With `**kwargs` here `Trainer` takes the loss for one that is divided by the accumulation steps, and a mean counts
    # n times; a forward that needs them says `accepts_loss_kwargs = False` in its class.
    def forward(self, input_ids, labels=None, topic_labels=None):
        pooled = self.pooler(self.bert(input_ids).last_hidden_state.mean(1))
        praise, topic = self.praise(pooled), self.topic(pooled)
        loss = None
        if labels is not None:
            losses = {"praise": F.cross_entropy(praise, labels), "topic": F.cross_entropy(topic, topic_labels)}
            loss = ff.combine(losses, ROUTES, self)  # in evaluation, under `no_grad`, their sum
        # detached: nothing trains by them, and in several processes a backward would walk their graph once more
        return SequenceClassifierOutput(loss=loss, logits=(praise.detach(), topic.detach()))


def with_adapters(model):
    trained = ["pooler", "praise", "topic"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=["query", "value", "dense"], modules_to_save=trained))


THINGS = "plot actor ending scene dialogue music", "room bed breakfast pool view lobby"
VERDICTS = "awful boring poor dreadful dirty weak", "great lovely superb charming brilliant fine"
FILLERS = "we thought that honestly really quite so very the was all in"
WORDS = " ".join(["[PAD]", FILLERS, *THINGS, *VERDICTS]).split()


def reviews(count, seed):
    """Sentences of a topic and a verdict, with words beside: what the model is given for each."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        topic, praise = draw.randrange(2), draw.randrange(2)
        words = draw.choices(THINGS[topic].split(), k=2) + draw.choices(VERDICTS[praise].split(), k=1)
        words += draw.choices(FILLERS.split(), k=5)
        draw.shuffle(words)
        found.append({"input_ids": [WORDS.index(word) for word in words], "labels": praise, "topic_labels": topic})
    return found


def arguments(batch=16, accumulated=2, **options):
    return TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated,
        max_grad_norm=0.1,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        **options,
    )


def shares(found):
    right = [(logits.argmax(1) == labels).mean() for logits, labels in zip(*found, strict=True)]
    return dict(zip(["praise", "topic"], right, strict=True))


def main():
    torch.set_num_threads(1)  # small networks are quicker on one
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = with_adapters(Reader(BertConfig(vocab_size=len(WORDS), **size)))
    print(ff.plan(model.get_base_model(), ROUTES))
    options = arguments(max_steps=150, logging_steps=30, disable_tqdm=True)
    trainer = Trainer(
        model, options, train_dataset=reviews(2000, 0), eval_dataset=reviews(500, 1), compute_metrics=shares
    )
    trainer.train()
    found = trainer.evaluate()
    print(f"held out: praise is read in {found['eval_praise']:.0%}, the topic in {found['eval_topic']:.0%}")


if __name__ == "__main__":
    main()
