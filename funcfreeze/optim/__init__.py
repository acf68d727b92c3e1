"""Optimizers as pure transformations of gradients, with torch.optim's names and numbers, in optax's grammar."""

from funcfreeze.optim.adam import adam, adamw
from funcfreeze.optim.chain import chain
from funcfreeze.optim.clip import clip_by_global_norm, clip_by_norm
from funcfreeze.optim.partition import partition
from funcfreeze.optim.rmsprop import rmsprop
from funcfreeze.optim.sgd import sgd
from funcfreeze.optim.torch_optimizer import from_torch
from funcfreeze.optim.transform import Transform, apply_updates
from funcfreeze.schedules.optax_names import (
    constant_schedule,
    cosine_decay_schedule,
    dann_schedule,
    linear_schedule,
    warmup_constant_schedule,
    warmup_cosine_decay_schedule,
)
from funcfreeze.schedules.schedule import Schedule

__all__ = [
    "Schedule",
    "Transform",
    "adam",
    "adamw",
    "apply_updates",
    "chain",
    "clip_by_global_norm",
    "clip_by_norm",
    "constant_schedule",
    "cosine_decay_schedule",
    "dann_schedule",
    "from_torch",
    "linear_schedule",
    "partition",
    "rmsprop",
    "sgd",
    "warmup_constant_schedule",
    "warmup_cosine_decay_schedule",
]
