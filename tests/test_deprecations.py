"""How tests are configured: what our code uses that is deprecated fails them, what others use does not."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
import typing_extensions

from deprecations import DEPRECATIONS, is_ours

CATEGORIES = pytest.mark.parametrize("category", DEPRECATIONS)


def third_party(source: str, file: str, **names):
    """What a module of somebody else's defines."""
    namespace = {"warnings": warnings, **names}
    exec(compile(source, f"/usr/lib/somewhere/{file}.py", "exec"), namespace)
    return namespace


def deprecated(category, stacklevel=1, decorate=lambda function: function):
    source = "def old(): warnings.warn('old is deprecated', category, stacklevel=stacklevel)"
    return decorate(third_party(source, "library", category=category, stacklevel=stacklevel)["old"])


def user(function):
    """A third party that calls the function."""
    return third_party("def use(): function(); return 'used'", "another", function=function)["use"]


def raised(function):
    with pytest.raises(DEPRECATIONS) as error:
        function()
    return error.type


raised_then, used_then = raised(deprecated(FutureWarning)), user(deprecated(FutureWarning))()


@CATEGORIES
@pytest.mark.parametrize("stacklevel", [1, 2, 3])
def test_our_own_use_fails_wherever_the_warning_points_to(category, stacklevel):
    assert raised(deprecated(category, stacklevel)) is category


@contextlib.contextmanager
def nothing():
    yield


@pytest.mark.parametrize(
    "decorate",
    [torch.no_grad(), nothing(), typing_extensions.deprecated("old too")],
    ids=["torch's", "contextlib's", "typing's"],
)
def test_a_decorator_hides_no_use(decorate):
    assert raised(deprecated(FutureWarning, decorate=decorate)) in DEPRECATIONS


@CATEGORIES
@pytest.mark.parametrize("stacklevel", [1, 2])
def test_a_third_partys_use_does_not_fail(category, stacklevel):
    assert user(deprecated(category, stacklevel))() == "used"
    assert user(user(deprecated(category, stacklevel)))() == "used"


def test_a_third_partys_use_beside_an_expected_warning_does_not_fail():
    def both():
        user(deprecated(DeprecationWarning))()
        warnings.warn("this one", stacklevel=1)

    with pytest.warns(UserWarning, match="this one"):  # which warns once more of the other when it ends
        both()


def test_what_a_third_party_deprecates_in_our_callback_is_our_use():
    assert raised(user(lambda: deprecated(FutureWarning)())) is FutureWarning


def test_other_warnings_fail_whoever_causes_them():
    with pytest.raises(UserWarning, match="old is deprecated"):
        user(deprecated(UserWarning))()


def test_all_of_that_holds_while_tests_are_collected():
    assert raised_then is FutureWarning
    assert used_then == "used"


def test_doctests_and_the_readme_are_ours():
    assert is_ours("<doctest funcfreeze.step.Step[0]>")
    assert is_ours("README.md")
    assert is_ours(__file__)
    assert not is_ours(torch.__file__)
    assert not is_ours("<string>")
    assert not is_ours("<doctest torch.nn>")


@pytest.mark.skipif(torch.__version__ < "2.14", reason="torch.jit.script is not deprecated yet")
def test_what_torch_deprecates():
    assert raised(lambda: torch.jit.script(torch.nn.Linear(1, 1))) is FutureWarning
