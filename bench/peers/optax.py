"""jax and optax: the same network, one gradient per loss over the parameters it may update, one donated `jit`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

import optree
import torch

from bench.contender import Absent, Contender, Phase, phases, pool
from bench.workloads.workload import Workload


def build(workload: Workload, device: torch.device) -> Contender | Absent:
    """`jit(step, donate_argnums=...)` over flat dicts of arrays."""
    if isinstance(workload.in_jax, str):
        return Absent("not written", workload.in_jax)
    import jax
    import jax.numpy as jnp
    import optax

    try:
        target = jax.devices("gpu" if device.type == "cuda" else "cpu")[0]
    except RuntimeError as problem:
        return Absent("not here", f"jax is installed without this device: {problem}")
    turns, losses = phases(workload), workload.in_jax()
    routed = frozenset[str]().union(*(phase.paths for phase in turns))

    def put(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        # A copy: on the CPU jax may otherwise share the torch model's memory, and a step donates it.
        return {path: jax.device_put(jnp.array(t.detach().cpu().numpy()), target) for path, t in tensors.items()}

    named = dict(workload.model.named_parameters())
    trained = put({path: p for path, p in named.items() if path in routed})
    frozen = put({path: p for path, p in named.items() if path not in routed})
    buffers = put(dict(workload.model.named_buffers()))
    labels = {path: max((name for name in workload.rates if path.startswith(name)), key=len) for path in trained}
    tx = optax.partition({name: optax.adam(rate) for name, rate in workload.rates.items()}, labels)
    gradients = _gradients(losses, turns)

    def update(state: Any, frozen: Any, batch: Any) -> tuple[Any, Any]:
        trained, buffers, memory = state
        # Without this jax multiplies in TF32 on a GPU, and torch does not.
        with jax.default_matmul_precision("float32"):
            found, values, buffers = gradients(trained, frozen, buffers, batch)
        updates, memory = tx.update(found, memory, trained)
        return (optax.apply_updates(trained, updates), buffers, memory), values

    stepper = jax.jit(update, donate_argnums=(0,))
    # All of it committed to the device, or the second step would see arrays of another kind and compile again.
    state = jax.device_put((trained, buffers, tx.init(trained)), target)
    prepared = [
        optree.tree_map(lambda t: jax.device_put(jnp.array(t.numpy()), target), batch)
        for batch in pool(workload, torch.device("cpu"))
    ]
    batches = itertools.cycle(prepared)

    def run() -> None:
        nonlocal state
        state, _ = stepper(state, frozen, next(batches))

    def executable() -> Any:
        return stepper.lower(state, frozen, prepared[0]).compile()

    return Contender(
        run,
        lambda: jax.block_until_ready(state),
        lambda: {path: torch.from_numpy(jax.device_get(array).copy()) for path, array in state[0].items()},
        {"matmuls": lambda: count_products(executable().as_text()), "memory": lambda: _peak(executable())},
    )


def _gradients(losses: Any, turns: list[Phase]) -> Any:
    """One `value_and_grad` for each loss and weight, over just the parameters that it may update; then their sum."""
    import jax

    def gradients(trained: Any, frozen: Any, buffers: Any, batch: Any) -> tuple[Any, Any, Any]:
        found: dict[str, Any] = {}
        values: dict[str, Any] = {}
        after = buffers
        for phase in turns:

            def one(part: Any, phase: Phase = phase) -> tuple[Any, Any]:
                every, after = losses({**frozen, **trained, **part}, buffers, batch)
                return every[phase.loss], (every, after)

            part = {path: trained[path] for path in sorted(phase.paths)}
            grads, (values, after) = jax.grad(one, has_aux=True)(part)
            for path, gradient in grads.items():
                weighted = gradient if phase.weight == 1.0 else phase.weight * gradient
                found[path] = found[path] + weighted if path in found else weighted
        return found, values, after

    return gradients


def count_products(program: str) -> dict[str, int]:
    """Matrix products and convolutions in an optimised XLA program, counted where they are defined."""
    products = re.findall(r"= \S+ dot\(", program) + re.findall(r"custom_call_target=\"[^\"]*(?:gemm|matmul)", program)
    convolutions = re.findall(r"= \S+ convolution\(|custom_call_target=\"[^\"]*conv", program)
    return {"matmuls": len(products), "convolutions": len(convolutions)}


def _peak(executable: Any) -> dict[str, int | str]:
    """What XLA says it allocates beside what it is given."""
    found = executable.memory_analysis()
    extra = found.temp_size_in_bytes + max(0, found.output_size_in_bytes - found.alias_size_in_bytes)
    return {"bytes": int(extra), "by": "XLA's memory_analysis"}
