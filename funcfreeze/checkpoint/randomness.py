"""The state of random number generators: Python's, NumPy's, torch's on the CPU and CUDA, the user's own by name."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch


def generator_states(own: Mapping[str, Any]) -> dict[str, Any]:
    """All of them now, as plain data.

    Args:
        own: generators of the user's by name: `torch.Generator`, `random.Random`, `numpy.random.Generator`.

    Raises:
        TypeError: something in it is none of these.
    """
    found: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's
        found["cuda"] = list(torch.cuda.get_rng_state_all())
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        found["numpy"] = _plain(numpy.random.get_state(legacy=False))
    found["own"] = {name: _state_of(name, generator) for name, generator in own.items()}
    return found


def restoring_generators(states: Mapping[str, Any], own: Mapping[str, Any]) -> Callable[[], None]:
    """What puts them where they were.

    Raises:
        ValueError: the user's are of other names or kinds; nothing has changed then.
    """
    if states["own"].keys() != own.keys():
        raise ValueError(
            f"the checkpoint holds generators {_named(states['own'])}, given were {_named(own)}; give the same ones, "
            "generators={...}"
        )
    if "numpy" in states:
        _refuse_another_numpy(states["numpy"]["bit_generator"])
    others = [name for name, state in states["own"].items() if not _fits(own[name], state)]
    if others:
        raise ValueError(
            f"the generators {', '.join(map(repr, others))} are of another kind than those that were saved"
        )
    return partial(_restore, states, own)


def _restore(states: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(states["torch"].cpu())
    if "numpy" in states:
        import numpy as np

        np.random.set_state(_with_arrays(states["numpy"], np))
    _restore_cuda(states.get("cuda", []))
    for name, state in states["own"].items():
        _put(own[name], state)


def _refuse_another_numpy(saved: str) -> None:
    import numpy as np

    present = np.random.get_state(legacy=False)["bit_generator"]
    if present != saved:
        raise ValueError(f"NumPy's global generator is {present}, that of the checkpoint {saved}")


def _restore_cuda(states: list[torch.Tensor]) -> None:
    if not states:
        return
    if torch.cuda.device_count() != len(states):
        warnings.warn(
            f"the checkpoint holds random states of {len(states)} CUDA devices, here are {torch.cuda.device_count()}: "
            "what is drawn on them will differ from the run that was stopped",
            stacklevel=4,
        )
        return
    torch.cuda.set_rng_state_all([state.cpu() for state in states])


def _state_of(name: str, generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if _is_numpys(generator):
        return _plain(generator.bit_generator.state)
    raise TypeError(
        f"generators[{name!r}] is a torch.Generator, random.Random or numpy.random.Generator, got "
        f"{type(generator).__name__}"
    )


def _fits(generator: Any, state: Any) -> bool:
    """Whether a state is that of such a generator."""
    if isinstance(state, torch.Tensor):
        return isinstance(generator, torch.Generator) and generator.get_state().shape == state.shape
    if isinstance(state, tuple):
        return isinstance(generator, random.Random)
    return _is_numpys(generator) and generator.bit_generator.state["bit_generator"] == state["bit_generator"]


def _is_numpys(generator: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(generator, numpy.random.Generator)


def _put(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, random.Random):
        version, numbers, gauss = state
        generator.setstate((version, tuple(numbers), gauss))
    else:
        import numpy as np

        generator.bit_generator.state = _with_arrays(state, np)


def _plain(value: Any) -> Any:
    """NumPy's state with lists in the place of arrays."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return {"array": value.tolist(), "dtype": str(value.dtype)} if type(value).__name__ == "ndarray" else value


def _with_arrays(value: Any, np: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"array", "dtype"}:
            return np.array(value["array"], dtype=value["dtype"])
        return {key: _with_arrays(part, np) for key, part in value.items()}
    return value


def _named(given: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, given)) or "none"
