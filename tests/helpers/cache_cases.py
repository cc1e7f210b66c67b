"""What the tests of the inference cache share."""

import threading

import torch

from helpers.common import reference_forward


def call_until_kept(scope, layer, x, most=5000):
    """Calls `layer` until it computes with a matrix that `scope` keeps; returns how many calls that took."""
    served, get = [], scope.get

    def watched(*args):
        kept = get(*args)
        served.append(kept is not None)
        return kept

    scope.get = watched
    try:
        for calls in range(1, most):
            with torch.no_grad():
                layer(x)
            if any(served):
                return calls
    finally:
        del scope.get
    raise AssertionError(f"nothing was kept after {most} calls")


def relative_error(y, expected):
    return ((y.double() - expected).abs().max() / expected.abs().max()).item()


def hold_up(layer, methods, monkeypatch, then, after=False):
    """Before or `after` one of `methods` of `layer` is called next, `then` runs in another thread; returns a log."""
    done = []

    def in_another_thread():
        if not done:
            done.append(True)
            thread = threading.Thread(target=then)
            thread.start()
            thread.join()

    def first(original):
        def function(*args, **kwargs):
            if not after:
                in_another_thread()
            result = original(*args, **kwargs)
            if after:
                in_another_thread()
            return result

        return function

    for name in methods:
        monkeypatch.setattr(layer, name, first(getattr(layer, name)))
    return done


def assert_exact(layer, x, adapters=("default",), calls=3):
    """Calls under no_grad give what the present parameters of float64 layers say."""
    with torch.no_grad():
        for _ in range(calls):
            torch.testing.assert_close(layer(x), reference_forward(layer, x, adapters), rtol=1e-10, atol=1e-10)
