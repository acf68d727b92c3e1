"""The surroundings of a trace: stand-ins for tensors, and torch's settings that would get in its way."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext, detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from funcfreeze.compile.layout import Listed
from funcfreeze.compile.outside import ReplacingOutsiders
from funcfreeze.compile.reading import random_state
from funcfreeze.compile.watch import Watch, kind


@dataclass(frozen=True)
class StandIns:
    """Fake tensors for a graph's inputs and a state, of the mode in which Dynamo compiles."""

    mode: FakeTensorMode
    inputs: list[Any]
    state: list[Tensor]

    @contextmanager
    def mode_active(self) -> Iterator[None]:
        """Operations give fake tensors, with symbolic sizes where the inputs have them."""
        with self.mode, enable_python_dispatcher():
            yield


def stand_ins(inputs: Sequence[Any], state: Sequence[Tensor]) -> StandIns:
    """Fakes for the batch's tensors as Dynamo wants their sizes, and for the state's, whose sizes are fixed."""
    mode = detect_fake_mode()
    contexts = TracingContext.get().tensor_to_context
    assert mode is not None, "called outside of a compilation"

    def fake(given: Any) -> Any:
        if not isinstance(given, Tensor):
            return given
        context = contexts.get(given)  # type: ignore[no-untyped-call]
        return mode.from_tensor(given, symbolic_context=context, source=context.tensor_source if context else None)

    return StandIns(mode, [fake(given) for given in inputs], [mode.from_tensor(t, static_shapes=True) for t in state])


class Outside:
    """The tensors that a trace reads from elsewhere, as they are at every call.

    Attributes:
        stand_ins: what stood for them when they were noticed.
    """

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._index: dict[int, int] = {}
        self._noticed: list[Tensor] = []
        self._read: list[Callable[[], Tensor]] = []
        self._kinds: list[tuple[Any, ...]] = []
        self.stand_ins: list[Tensor] = []

    def tensors(self, state: Listed) -> list[Tensor]:
        """The tensors now, in the order of the stand-ins: one that a module's attribute holds may be another by now.

        Those that share memory with the state, which the step overwrites, are copied.
        """
        now = [read() for read in self._read]
        for tensor, before in zip(now, self._kinds, strict=True):
            if kind(tensor) != before:
                raise RuntimeError(
                    f"a tensor that `losses` reads from outside had shape {tuple(before[0])} and {before[2]} when "
                    f"the step was traced, and has {tuple(tensor.shape)} and {tensor.dtype} now, changed in place; put "
                    "another tensor in its place instead, or pass it in the batch"
                )
        return [state.apart(tensor.detach()) for tensor in now]

    def noticing(self, mode: FakeTensorMode) -> Callable[[Tensor], Tensor]:
        """Makes a stand-in for each new tensor."""

        def replace(tensor: Tensor) -> Tensor:
            if id(tensor) not in self._index:
                self._index[id(tensor)] = len(self._noticed)
                self._noticed.append(tensor)
                place = self._watch.where(tensor)
                self._kinds.append(kind(tensor))
                self._read.append(place[1] if place else lambda: tensor)
                with _disable_current_modes():
                    plain = _like(tensor)
                self.stand_ins.append(mode.from_tensor(plain, static_shapes=True))
            return self.stand_ins[self._index[id(tensor)]]

        return replace

    def standing_for(self, given: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        """Puts the given tensors in their places."""

        def replace(tensor: Tensor) -> Tensor:
            if id(tensor) not in self._index:
                raise RuntimeError(
                    f"`losses` makes a tensor of shape {tuple(tensor.shape)} and dtype {tensor.dtype} from data that "
                    "torch does not see (numpy, perhaps) each time it is called, which a compiled step cannot follow; "
                    "pass it in the batch, or build the Step with compile=False"
                )
            return given[self._index[id(tensor)]]

        return replace

    def was_read(self, tensor: Tensor) -> bool:
        """Whether the trace read this tensor."""
        return id(tensor) in self._index

    def refuse(self, changes: Sequence[str]) -> None:
        """Refuse a forward that changes Python values: compiled, it would do so only while it is traced.

        Raises:
            RuntimeError: saying what it changed.
        """
        if changes:
            raise RuntimeError(
                "the forward changes Python values, which a compiled step would do only once, when it is traced:\n"
                + "\n".join(f"  - {change}" for change in changes)
                + "\nkeep them in buffers or return them beside the losses, or build the Step with compile=False"
            )


def _like(tensor: Tensor) -> Tensor:
    """A tensor to make a stand-in of: of this one's kind, and where that is easy in memory of its own.

    Stand-ins in one memory are taken to stay so, and what a module's attribute holds may be another tensor later.
    """
    plain = tensor.detach()
    if type(plain) is not Tensor or plain.layout is not torch.strided or plain.is_conj() or plain.is_neg():
        return plain
    return torch.empty_strided(plain.shape, plain.stride(), dtype=plain.dtype, device=plain.device)


@contextmanager
def in_trace(replace: Callable[[Tensor], Tensor], mode: FakeTensorMode) -> Iterator[None]:
    """Settings for the time of a trace.

    Tensors from outside are exchanged; compiled parts of the model run as they were written, and so become part of the
    graph; and the backward stays in this thread, where all this holds.
    """
    with (
        ReplacingOutsiders(replace),
        torch.compiler.set_stance("force_eager"),
        torch.autograd.set_multithreading_enabled(False),
        _unbacked_symbols_ignored(mode),
        _checkpoints_recompute(),
    ):
        yield


class RecurrentLayers(TorchFunctionMode):
    """For a first trace: LSTMs run without oneDNN's kernels, which the compiler cannot look into.

    From the first one on all else does, too, also in the backward, where activation checkpointing runs it again and
    this mode does not hold. Without an LSTM oneDNN stays: convolutions take their layouts from it.

    Attributes:
        met: whether there were any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.met = False
        self._rest = ExitStack()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.lstm and not self.met:
            self.met = True
            self._rest.enter_context(_without_onednn())
        return func(*args, **(kwargs or {}))

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]  # torch's
        self._rest.close()

    def again(self) -> AbstractContextManager[None]:
        """For further traces: looking at every function takes a tenth of their time."""
        return _without_onednn() if self.met else nullcontext()


@contextmanager
def _without_onednn() -> Iterator[None]:
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags sets more than this, and warns of GPUs
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def _unbacked_symbols_ignored(mode: FakeTensorMode) -> AbstractContextManager[None]:
    """Sizes and numbers known only at run time (`h[mask]`, `.item()`) need not appear in what a trace returns."""
    environment = mode.shape_env
    return nullcontext() if environment is None else environment.ignore_fresh_unbacked_symbols()


@contextmanager
def _checkpoints_recompute() -> Iterator[None]:
    """Saved-tensor hooks, which activation checkpointing is made of, work in a trace; torch turns them off there."""
    before = torch._C._autograd._saved_tensors_hooks_set_tracing(False)
    try:
        yield
    finally:
        torch._C._autograd._saved_tensors_hooks_set_tracing(before)


@contextmanager
def no_randomness_of_python(generators: Sequence[Any]) -> Iterator[None]:
    """Refuse a trace that draws from Python's or numpy's generators: every step would get those same numbers.

    Args:
        generators: those that the trace may draw from, besides the global ones.

    Raises:
        RuntimeError: it did.
    """
    before = _states(generators)
    yield
    if _states(generators) != before:
        raise RuntimeError(
            "the forward draws random numbers from Python or numpy, which a compiled step would do only once, when it "
            "is traced; draw them from torch, pass them in the batch, or build the Step with compile=False"
        )


def _states(generators: Sequence[Any]) -> list[Any]:
    numpy = sys.modules.get("numpy")
    everyones = None if numpy is None else repr(numpy.random.get_state(legacy=False))
    return [random.getstate(), everyones, *map(random_state, generators)]
