"""The contract is a product: each hook is documented, typed and shown in use."""

import inspect

import pytest

from gateway.hookspecs import Hooks, Tap
from gateway.plugins import HOOKS, faults_of, hooks_of
from tests.contract.recorder import Recorder

EVERY = [name for name, member in vars(Hooks).items() if inspect.isfunction(member)]


def test_the_specification_and_the_compiled_hooks_are_the_same_list():
    """A hook that is specified is called, and the other way round."""
    assert sorted(HOOKS) == sorted(EVERY)


@pytest.mark.parametrize("hook", EVERY)
def test_each_hook_is_documented(hook):
    """A hook's docstring says when it is called and what happens when it fails."""
    text = inspect.getdoc(getattr(Hooks, hook))
    assert text
    assert len(text) >= 60
    startup = hook.startswith("register_")
    words = ("fail", "refused") if startup else ("fail", "raise", "Exceptions")
    assert any(word in text for word in words)


@pytest.mark.parametrize("hook", EVERY)
def test_each_hook_is_typed(hook):
    """Every parameter and the result carry a type that an author's editor can show."""
    signature = inspect.signature(getattr(Hooks, hook))
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in list(signature.parameters.values())[1:]:
        assert parameter.annotation is not inspect.Parameter.empty, parameter.name


@pytest.mark.parametrize("hook", [hook for hook in EVERY if not hook.startswith("register_")])
def test_a_request_hook_takes_the_exchange_first(hook):
    """A new field of the exchange never breaks a plugin; only jobs and corrections, which have none, differ."""
    first = list(inspect.signature(getattr(Hooks, hook)).parameters)[1]
    assert first == {"restore_principal": "reference", "usage_corrected": "correction"}.get(hook, "exchange")


def test_each_hook_is_implemented_by_a_test_plugin():
    """No hook is without an implementation that these tests run."""
    assert sorted(hooks_of(Recorder)) == sorted(EVERY)
    assert faults_of(Recorder) == []


@pytest.mark.parametrize("method", ["event", "end"])
def test_a_tap_is_documented_too(method):
    """What a tap may return stands where it is declared."""
    assert inspect.getdoc(getattr(Tap, method))
