"""Selectors: frozen values that name sets of parameters, and the set algebra over them.

A selector is resolved against the `Leaf`s of a model, never against the model itself, so that the same selector
works on an `nn.Module` and on a bare pytree of parameters.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor, nn


class RouteError(ValueError):
    """A mistake in a declaration: in a route, a selector, or in what `losses` returned against what was declared."""


@dataclass(frozen=True, eq=False)
class Leaf:
    """One parameter as selectors see it.

    Attributes:
        names: every path of the parameter; the first is the one it is known by, the others are ties.
        tensor: the parameter itself.
        modules: the types of the modules that hold it, outermost first (empty for a bare pytree).
        trainable: False if it was frozen for good by `requires_grad_(False)`.
        written: for some of the names, how torch writes it: with `_orig_mod`, in a module that is compiled.
    """

    names: tuple[str, ...]
    tensor: Tensor
    modules: tuple[type[nn.Module], ...] = ()
    trainable: bool = True
    written: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The path the parameter is known by."""
        return self.names[0]


@dataclass(frozen=True)
class _Path:
    pattern: str

    def __repr__(self) -> str:
        return f"path({self.pattern!r})"

    def matches(self, leaf: Leaf) -> bool:
        prefixes = [prefix for spelled in _spellings(leaf) for prefix in _prefixes(spelled)]
        return self.pattern in prefixes or any(fnmatchcase(prefix, self.pattern) for prefix in prefixes)

    @property
    def literal(self) -> bool:
        """Whether the pattern is a name rather than a glob."""
        return not any(character in self.pattern for character in "*?[")


@dataclass(frozen=True)
class _Regex:
    pattern: str

    def __repr__(self) -> str:
        return f"regex({self.pattern!r})"

    def matches(self, leaf: Leaf) -> bool:
        return any(re.fullmatch(self.pattern, spelled) for spelled in _spellings(leaf))


@dataclass(frozen=True)
class _Kind:
    types: tuple[type[nn.Module], ...]

    def __repr__(self) -> str:
        return f"kind({', '.join(kind.__name__ for kind in self.types)})"

    def matches(self, leaf: Leaf) -> bool:
        return any(issubclass(module, self.types) for module in leaf.modules)


@dataclass(frozen=True)
class _Where:
    predicate: Callable[[str, Tensor], bool]

    def __repr__(self) -> str:
        return f"where({self.predicate.__name__})"

    def matches(self, leaf: Leaf) -> bool:
        return leaf.trainable and any(self.predicate(name, leaf.tensor) for name in leaf.names)


@dataclass(frozen=True)
class _Union:
    left: Selector
    right: Selector

    def __repr__(self) -> str:
        return f"({self.left} | {self.right})"

    def matches(self, leaf: Leaf) -> bool:
        return self.left.matches(leaf) or self.right.matches(leaf)


@dataclass(frozen=True)
class _Intersection:
    left: Selector
    right: Selector

    def __repr__(self) -> str:
        return f"({self.left} & {self.right})"

    def matches(self, leaf: Leaf) -> bool:
        return self.left.matches(leaf) and self.right.matches(leaf)


@dataclass(frozen=True)
class _Difference:
    left: Selector
    right: Selector

    def __repr__(self) -> str:
        return f"({self.left} - {self.right})"

    def matches(self, leaf: Leaf) -> bool:
        return self.left.matches(leaf) and not self.right.matches(leaf)


@dataclass(frozen=True)
class _Complement:
    operand: Selector

    def __repr__(self) -> str:
        return f"~{self.operand}"

    def matches(self, leaf: Leaf) -> bool:
        return not self.operand.matches(leaf)


_Rule = _Path | _Regex | _Kind | _Where | _Union | _Intersection | _Difference | _Complement


@dataclass(frozen=True)
class Selector:
    """A set of parameters, written down: combine with `|`, `&`, `-` and `~`; strings stand for `path(...)`.

    Made by `path`, `regex`, `kind` and `where`. Equal selectors were written alike.

    >>> path("encoder") | regex(r"head[.]\\d[.]bias") - path("encoder.0")
    (path('encoder') | (regex('head[.]\\\\d[.]bias') - path('encoder.0')))
    >>> path("encoder") - "encoder.0" == path("encoder") - path("encoder.0")
    True
    """

    rule: _Rule

    def __repr__(self) -> str:
        return repr(self.rule)

    def matches(self, leaf: Leaf) -> bool:
        """Whether the parameter is in the set, under any of its names."""
        return self.rule.matches(leaf)

    def __or__(self, other: Selector | str) -> Selector:
        return Selector(_Union(self, to_selector(other)))

    def __ror__(self, other: str) -> Selector:
        return to_selector(other) | self

    def __and__(self, other: Selector | str) -> Selector:
        return Selector(_Intersection(self, to_selector(other)))

    def __rand__(self, other: str) -> Selector:
        return to_selector(other) & self

    def __sub__(self, other: Selector | str) -> Selector:
        return Selector(_Difference(self, to_selector(other)))

    def __rsub__(self, other: str) -> Selector:
        return to_selector(other) - self

    def __invert__(self) -> Selector:
        return Selector(_Complement(self))


def path(pattern: str) -> Selector:
    """Parameters by path: a glob in which `*` spans dots, or the whole subtree of every module so named.

    The `_orig_mod` that `torch.compile` puts into the paths of a module may be left out.

    >>> path("encoder")                 # encoder.0.weight, encoder.0.bias, ...; never encoder2.weight
    path('encoder')
    >>> path("*.bias") & "encoder"
    (path('*.bias') & path('encoder'))
    >>> path(3)
    Traceback (most recent call last):
        ...
    funcfreeze.declare.selectors.RouteError: path(...) takes a string such as "encoder" or "*.bias", got int: 3
    """
    if not isinstance(pattern, str):
        raise RouteError(
            f'path(...) takes a string such as "encoder" or "*.bias", got {type(pattern).__name__}: {pattern!r}'
        )
    return Selector(_Path(pattern))


def regex(pattern: str) -> Selector:
    r"""Parameters whose whole path matches a regular expression (`re.fullmatch`), with or without `_orig_mod` in it.

    >>> regex(r"layers\.[0-3]\..*")
    regex('layers\\.[0-3]\\..*')
    >>> regex("layers.(")
    Traceback (most recent call last):
        ...
    funcfreeze.declare.selectors.RouteError: regex('layers.('): missing ), unterminated subpattern at position 7
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise RouteError(f"regex({pattern!r}): {error}") from None
    return Selector(_Regex(pattern))


def kind(*types: type[nn.Module]) -> Selector:
    """Parameters held, at any depth, by modules of the given types.

    >>> kind(nn.BatchNorm1d, nn.LayerNorm)
    kind(BatchNorm1d, LayerNorm)
    >>> kind("Linear")
    Traceback (most recent call last):
        ...
    funcfreeze.declare.selectors.RouteError: kind(...) takes module types such as nn.Linear, got: 'Linear'
    """
    wrong = [given for given in types if not (isinstance(given, type) and issubclass(given, nn.Module))]
    if wrong or not types:
        shown = ", ".join(map(repr, wrong)) or "nothing"
        raise RouteError(f"kind(...) takes module types such as nn.Linear, got: {shown}")
    return Selector(_Kind(types))


def where(predicate: Callable[[str, Tensor], bool]) -> Selector:
    """Parameters for which `predicate(path, tensor)` is true; it never sees parameters that are frozen for good.

    >>> def is_matrix(path, tensor):
    ...     return tensor.ndim == 2
    >>> where(is_matrix) & "encoder"
    (where(is_matrix) & path('encoder'))
    """
    if not callable(predicate):
        raise RouteError(f"where(...) takes a function of (path, tensor), got {type(predicate).__name__}")
    return Selector(_Where(predicate))


def to_selector(given: Selector | str) -> Selector:
    """A selector as it is, a string as `path(...)`."""
    if isinstance(given, Selector):
        return given
    if isinstance(given, str):
        return path(given)
    raise RouteError(
        f"a selector is a string, or made by path, regex, kind or where; got {type(given).__name__}: {given!r}"
    )


def label(given: Selector | str) -> str:
    """The selector as a user would write it: the bare pattern for a string, else its `repr`."""
    rule = to_selector(given).rule
    return rule.pattern if isinstance(rule, _Path) else repr(rule)


def resolve(selector: Selector, leaves: Sequence[Leaf]) -> tuple[frozenset[int], list[str]]:
    """The indices of the trainable leaves in the set, and what is wrong with the selector (nothing, if all is well).

    A selector is exhaustive or wrong: every part of it must match some parameter, and the whole must leave some
    trainable parameter. Globs, `regex`, `kind` and `where` pass over parameters that are frozen for good; a plain name
    may not stand for them, except where it takes them away.
    """
    problems = [problem for rule, positive in _atoms(selector, True) for problem in _check(rule, positive, leaves)]
    chosen = frozenset(index for index, leaf in enumerate(leaves) if leaf.trainable and selector.matches(leaf))
    if not chosen and not problems:
        problems.append(f"{selector} leaves no trainable parameter")
    return chosen, problems


def module_problems(selector: Selector, modules: Sequence[Leaf], wanted: Sequence[Leaf], noun: str) -> Iterator[str]:
    """What is wrong with a selector that is to select modules of a sort.

    Args:
        selector: asked as for parameters, with the paths and types of modules.
        modules: all of them, each with its own type the innermost one.
        wanted: those of the sort.
        noun: the sort.
    """
    for rule, positive in _atoms(selector, True):
        if isinstance(rule, _Where):
            yield f"{rule} is asked about parameters (path, tensor); modules are selected here, by path, regex or kind"
        elif not any(map(rule.matches, modules)):
            yield f"{rule} matches no module{_suggestion(rule, wanted or modules)}"
        elif positive and not any(map(rule.matches, wanted)):
            yield f"{rule} matches no {noun}"


def _check(rule: _Rule, positive: bool, leaves: Sequence[Leaf]) -> Iterator[str]:
    """What is wrong with one atom of a selector; `positive` unless a difference or a complement takes it away."""
    matched = [leaf for leaf in leaves if rule.matches(leaf)]
    frozen = [leaf.path for leaf in matched if not leaf.trainable]
    if not matched:
        yield f"{rule} matches no parameter{_suggestion(rule, leaves)}"
    elif positive and len(frozen) == len(matched):
        shown = ", ".join(frozen[:3]) + (", ..." if len(frozen) > 3 else "")
        if isinstance(rule, _Path) and rule.literal:
            yield (
                f"{rule} names only frozen parameters ({shown}: requires_grad is False); call requires_grad_(True) "
                "before building, or leave it out"
            )
        else:
            yield f"{rule} matches only parameters whose requires_grad is False ({shown}); it passes over those"


def _atoms(selector: Selector, positive: bool) -> Iterator[tuple[_Rule, bool]]:
    rule = selector.rule
    if isinstance(rule, _Union | _Intersection | _Difference):
        yield from _atoms(rule.left, positive)
        yield from _atoms(rule.right, positive and not isinstance(rule, _Difference))
    elif isinstance(rule, _Complement):
        yield from _atoms(rule.operand, False)
    else:
        yield rule, positive


def _suggestion(rule: _Rule, leaves: Sequence[Leaf]) -> str:
    if isinstance(rule, _Kind):
        seen = sorted({module.__name__ for leaf in leaves for module in leaf.modules})
        return f"; the modules here are {', '.join(seen)}" if seen else "; a bare pytree has no modules"
    if isinstance(rule, _Path | _Regex):
        names = [name for leaf in leaves for name in leaf.names]
        if originals := [
            name for name in names if rule.matches(Leaf((_before_parametrization(name),), leaves[0].tensor))
        ]:
            return (
                f": a parametrization computes it; name what it is computed from, {' and '.join(map(repr, originals))}"
            )
        return closest(rule.pattern, (prefix for name in names for prefix in _prefixes(name)))
    return ""


def closest(name: str, known: Iterable[str]) -> str:
    """A clause for an error message: the known names nearest to the one that was not found."""
    names = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    tops = list(dict.fromkeys(path.split(".")[0] for path in names))
    return f"; there are {', '.join(map(repr, tops[:8]))}{', ...' if len(tops) > 8 else ''}" if tops else ""


def _spellings(leaf: Leaf) -> Iterator[str]:
    """All names of a parameter, with and without what `torch.compile` adds to them."""
    for name in leaf.names:
        yield name
        if name in leaf.written:
            yield leaf.written[name]
        elif "_orig_mod" in name:
            yield ".".join(part for part in name.split(".") if part != "_orig_mod")


def _before_parametrization(name: str) -> str:
    """The path that the tensor had before `torch.nn.utils.parametrize` took its place.

    >>> _before_parametrization("l.parametrizations.weight.original0"), _before_parametrization("l.bias")
    ('l.weight', 'l.bias')
    """
    return re.sub(r"(^|\.)parametrizations\.([^.]+)\.original\d*$", r"\1\2", name)


def _prefixes(name: str) -> Iterator[str]:
    """The path itself and the paths of the modules around it: a.b.c, a.b, a."""
    yield name
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
