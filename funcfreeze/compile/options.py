"""What `Step(compile=...)` means: whether to compile, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Backend = Callable[[Any, list[Any]], Callable[..., Any]]
"""A compiler of FX graphs, as `torch.compile` takes them: (graph, inputs) -> callable."""

_KEYS = ("backend", "mode", "options", "dynamic")


@dataclass(frozen=True)
class Options:
    """The arguments of `torch.compile` that a step takes.

    Attributes:
        backend: "inductor", another of torch's backends, or a callable.
        mode: of Inductor, such as "reduce-overhead".
        options: of Inductor, by name.
        dynamic: None (a size becomes dynamic when it changes), True or False.
    """

    backend: str | Backend = "inductor"
    mode: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    dynamic: bool | None = None

    @property
    def cuda_graphs(self) -> bool:
        """Whether Inductor is asked to record CUDA graphs."""
        return self.mode in ("reduce-overhead", "max-autotune") or bool(self.options.get("triton.cudagraphs"))


def resolve(
    compile: object, params: Iterable[Tensor], engine: str = "routed", eager_only: Sequence[str] = ()
) -> Options | None:
    """The options, or None for an eager step.

    Args:
        compile: None (compiled on CUDA, eager elsewhere), a bool, or a mapping of `torch.compile`'s arguments.
        params: the model's parameters, whose device decides for None.
        engine: what differentiates; only the routed engine is compiled.
        eager_only: what else in the step cannot be compiled, in words.

    Raises:
        TypeError: neither of these.
        ValueError: a mapping with other keys, or what cannot be is to be compiled.

    >>> import torch
    >>> resolve(None, [torch.zeros(1)]) is None
    True
    >>> resolve({"mode": "reduce-overhead"}, []).mode
    'reduce-overhead'
    >>> resolve({"fullgraph": False}, [])
    Traceback (most recent call last):
        ...
    ValueError: compile: a step takes torch.compile's backend, mode, options and dynamic, got fullgraph (it is always
    one full graph)
    """
    if engine != "routed":
        if compile is not None and resolve(compile, params) is not None:
            raise ValueError(f"only the routed engine is compiled; use compile=False with engine={engine!r}")
        return None
    if eager_only:
        if compile is not None and resolve(compile, params) is not None:
            raise ValueError(f"{'; '.join(eager_only)}: this runs eagerly only; use compile=False")
        return None
    if compile is None:
        return Options() if any(param.device.type == "cuda" for param in params) else None
    if isinstance(compile, bool):
        return Options() if compile else None
    if not isinstance(compile, Mapping):
        raise TypeError(
            "compile is None (compiled on CUDA, eager elsewhere), True, False, or a mapping of torch.compile's "
            f"arguments, got {type(compile).__name__}: {compile!r}"
        )
    given = {key: value for key, value in compile.items() if key != "fullgraph" or value is not True}
    if unknown := [str(key) for key in given if key not in _KEYS]:
        hint = " (it is always one full graph)" if "fullgraph" in unknown else ""
        raise ValueError(
            f"compile: a step takes torch.compile's {', '.join(_KEYS[:-1])} and {_KEYS[-1]}, got {', '.join(unknown)}"
            + hint
        )
    options = Options(**{**given, "options": dict(given.get("options") or {})})
    if options.backend == "eager":
        raise ValueError("compile: backend 'eager' compiles nothing; use compile=False")
    if options.backend != "inductor" and (options.mode or options.options):
        raise ValueError(f"compile: mode and options are Inductor's; backend {options.backend!r} takes none")
    return options
