"""The inference cache: what a scope keeps, for whom, and that nothing of it stays behind."""

import asyncio
import contextvars
import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from helpers.cache_cases import assert_exact, call_until_kept, relative_error
from helpers.common import FORMS, KINDS, make_bases, make_layer, normal, on_devices, randomize, reference_forward

import randlora

DOUBLE = dict(dtype=torch.float64)


def builds(layer, x):
    """How often a call builds a scaled base."""
    with torch.profiler.profile() as profile, torch.no_grad():
        layer(x)
    return sum(event.count for event in profile.key_averages() if event.key == "randlora::unique_base")


# ---- what is kept, and when ----


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_an_update_is_built_once_in_a_scope(dtype, device):
    x = normal(3, 41, dtype=dtype, device=device)
    layer = make_layer(41, 24, dtype=dtype, device=device).eval()
    with randlora.inference_cache() as scope:
        assert scope.nbytes == 0 and scope.limit == 1 << 30
        call_until_kept(scope, layer, x)
        assert scope.nbytes == 41 * 24 * dtype.itemsize
        assert builds(layer, x) == 0
        with torch.no_grad():
            y = layer(x)
        assert y.dtype == dtype and relative_error(y, reference_forward(layer, x)) < 8 * torch.finfo(dtype).eps
    assert scope.nbytes == 0


@pytest.mark.parametrize("shape", [(41, 24, 5), (24, 41, 5), (200, 341, 32)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hadamard"])
def test_many_tokens_build_at_once_and_few_when_they_have_cost_as_much(shape, kind):
    layer = make_layer(*shape, bases=make_bases(*shape, kind=kind)).eval()
    with torch.no_grad():
        for tokens in (1, 5000):
            x = normal(tokens, shape[0])
            with randlora.inference_cache() as scope:
                calls = call_until_kept(scope, layer, x)
                rent, building = layer.price_of_update(x, x.dtype, ["default"])
                assert rent * (calls - 1) < building <= rent * calls * (1 + 1e-9)
            assert (calls == 1) == (tokens == 5000)


@pytest.mark.parametrize("form", FORMS)
def test_the_price_is_that_of_the_form_of_the_bases(form):
    layer = make_layer(48, 64, 5, bases=make_bases(48, 64, 5, **FORMS[form]))
    expected = randlora.planner.price_of_update(
        3,
        48,
        64,
        layer.num_bases["default"],
        5,
        torch.float32,
        "cpu",
        randlora.planner.form(layer.pattern("default")),
    )
    assert layer.price_of_update(torch.ones(3, 48), torch.float32, ["default"]) == expected


def test_two_dtypes_have_an_entry_each():
    """W + dW for fp32, dW for autocast."""
    x = normal(3, 41)
    layer = make_layer(41, 24).eval()
    expected = reference_forward(layer, x)
    with torch.no_grad(), randlora.inference_cache() as scope:
        for _ in range(40):
            assert relative_error(layer(x), expected) < 1e-5
            with torch.autocast("cpu", torch.bfloat16):
                assert relative_error(layer(x), expected) < 0.02
        assert scope.nbytes == 41 * 24 * (4 + 2)


def test_adapters_have_an_entry_each():
    x = normal(3, 41, **DOUBLE)
    layer = make_layer(41, 24, **DOUBLE).eval()
    layer.update_layer("other", r=3)
    randomize(layer)
    with randlora.inference_cache() as scope:
        for _ in range(40):
            for names in (["default"], ["other"], ["default", "other"]):
                layer.set_adapter(names)
                assert_exact(layer, x, names, calls=1)
        assert scope.nbytes == 3 * 41 * 24 * 8
        layer.enable_adapters(False)
        with torch.no_grad():
            assert torch.equal(layer(x), layer.base_layer(x))


def test_limit():
    x, size = normal(3, 41), 41 * 24 * 4
    first, second = make_layer(41, 24).eval(), make_layer(41, 24).eval()
    for limit, kept in ((0, 0), (size - 1, 0), (size, 1), (2 * size - 1, 1), (2 * size, 2)):
        with torch.no_grad(), randlora.inference_cache(limit=limit) as scope:
            for _ in range(40):
                for layer in (first, second):
                    assert relative_error(layer(x), reference_forward(layer, x)) < 1e-5
            assert scope.nbytes == kept * size


@pytest.mark.parametrize("limit", [-1, 1.5, True, None, "1", print], ids=str)
def test_bad_limits(limit):
    with pytest.raises(ValueError, match="limit must be a number of bytes"):
        randlora.inference_cache(limit=limit)


# ---- the scope ----


def test_everything_is_freed_when_it_closes_or_the_layer_goes():
    x = normal(3, 41)
    layers = [make_layer(41, 24).eval() for _ in range(2)]
    with randlora.inference_cache() as scope:
        for layer in layers:
            call_until_kept(scope, layer, x)
        kept = [weakref.ref(entry.tensor) for entries in scope._layers.values() for entry in entries.values()]
        assert len(kept) == 2 and scope.nbytes == 2 * 41 * 24 * 4
        first, layer = weakref.ref(layers.pop(0)), None
        gc.collect()
        assert first() is None and scope.nbytes == 41 * 24 * 4
    gc.collect()
    assert scope.nbytes == 0 and not any(ref() is not None for ref in kept)


def test_it_is_in_no_copy_and_no_file():
    x = normal(3, 41)
    layer = make_layer(41, 24).eval()
    layer(x)  # it notes that it was called
    keys, size = set(layer.state_dict()), len(pickle.dumps(layer))
    with torch.no_grad(), randlora.inference_cache() as scope:
        call_until_kept(scope, layer, x)
        assert set(layer.state_dict()) == keys and len(pickle.dumps(layer)) == size
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            torch.testing.assert_close(other(x), layer(x))
        assert scope.nbytes == 41 * 24 * 4


def test_scopes_nest_and_close_when_something_is_raised():
    x = normal(3, 41)
    layer = make_layer(41, 24).eval()
    with randlora.inference_cache(limit=10**6) as outer:
        with pytest.raises(RuntimeError, match="mine"), randlora.inference_cache(limit=0) as inner:
            assert inner is outer
            call_until_kept(inner, layer, x)
            raise RuntimeError("mine")
        assert outer.nbytes > 0
    with pytest.raises(RuntimeError, match="mine"), randlora.inference_cache() as scope:
        call_until_kept(scope, layer, x)
        raise RuntimeError("mine")
    assert scope.nbytes == 0 and scope is not outer
    with torch.no_grad(), randlora.inference_cache() as again:
        layer(x)
        assert again is not scope and scope.nbytes == 0


def test_as_a_decorator():
    x = normal(3, 41)
    layer = make_layer(41, 24).eval()
    scopes, found = [], []

    @randlora.inference_cache(limit=10**6)
    def decode(depth):
        "Doc."
        with randlora.inference_cache() as scope:
            scopes.append(scope)
            found.append(scope.nbytes)
            call_until_kept(scope, layer, x)
        if depth:
            decode(depth - 1)
        return depth

    assert decode(1) == 1 and decode(0) == 0 and decode.__doc__ == "Doc."
    assert found == [0, 41 * 24 * 4, 0], "what is there already: only the call within a call finds something"
    assert scopes[0] is scopes[1] is not scopes[2] and all(scope.limit == 10**6 for scope in scopes)


def test_a_generator_that_is_dropped_closes_its_scope():
    x = normal(3, 41)
    layer = make_layer(41, 24).eval()

    def words():
        with randlora.inference_cache() as scope:
            call_until_kept(scope, layer, x)
            yield scope

    generator = words()
    scope = contextvars.copy_context().run(next, generator)
    assert scope.nbytes > 0
    generator.close()  # in another context
    assert scope.nbytes == 0
    generator = words()
    closed = next(generator)
    del generator
    gc.collect()
    with randlora.inference_cache() as scope:
        assert scope is not closed


# ---- threads and tasks ----


def in_thread(function, context=None):
    """What `function` returns in another thread."""
    found = []
    run = function if context is None else lambda: context.run(function)
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    return found[0]


def test_other_threads_take_no_part():
    """Not even those that inherit the context, as asyncio.to_thread and free-threaded Python have it."""
    x = normal(3, 41, **DOUBLE)
    layer = make_layer(41, 24, **DOUBLE).eval()
    lam = layer.randlora_lambda["default"]

    @torch.no_grad()
    def call():
        y = layer(x)
        with randlora.inference_cache() as scope:
            call_until_kept(scope, layer, x)
            assert scope.nbytes == 41 * 24 * 8
            return y, scope

    with randlora.inference_cache() as scope:
        call_until_kept(scope, layer, x)
        lam.data.mul_(3)  # the promise is this thread's
        for context in (None, contextvars.copy_context()):
            y, other = in_thread(call, context)
            torch.testing.assert_close(y, reference_forward(layer, x), rtol=1e-10, atol=1e-10)
            assert other is not scope and other.nbytes == 0
        assert asyncio.run(asyncio.to_thread(call))[1] is not scope
        assert in_thread(lambda: scope.nbytes) == scope.nbytes == 41 * 24 * 8


def test_tasks_of_one_thread():
    """One that was started inside of a scope is in it until it closes, one beside it is not."""
    x = normal(3, 41)
    layer = make_layer(41, 24).eval()

    async def here():
        with randlora.inference_cache() as scope:
            return scope

    async def later(closed):
        await closed.wait()
        return await here()

    async def main():
        beside, closed = asyncio.Event(), asyncio.Event()
        task_beside = asyncio.create_task(later(beside))
        with randlora.inference_cache() as scope:
            call_until_kept(scope, layer, x)
            assert await asyncio.create_task(here()) is scope
            beside.set()
            assert await task_beside is not scope
            task = asyncio.create_task(later(closed))
            await asyncio.sleep(0)
        closed.set()
        assert await task is not scope

    asyncio.run(main())


# ---- beside other parts ----


def test_hooks_on_the_base_layer_still_run():
    layer, x = make_layer(41, 24).eval(), normal(3, 41)
    calls = []
    layer.base_layer.register_forward_hook(lambda *a: calls.append(1))
    with torch.no_grad(), randlora.inference_cache() as scope:
        made = call_until_kept(scope, layer, x)
        layer(x)
    layer(x)
    assert len(calls) == made + 2


def test_compiled_functions_keep_nothing():
    torch._dynamo.reset()
    layer, x = make_layer(41, 24).eval(), normal(3, 41)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), randlora.inference_cache() as scope:
        for _ in range(40):
            assert relative_error(compiled(x), reference_forward(layer, x)) < 1e-5
        assert scope.nbytes == 0
        call_until_kept(scope, layer, x)
        layer.randlora_lambda["default"].data.mul_(3)
        assert relative_error(compiled(x), reference_forward(layer, x)) < 1e-5


@pytest.mark.parametrize("form", ["with", "decorator"])
def test_a_scope_that_is_opened_in_compiled_code_keeps_nothing(form):
    torch._dynamo.reset()
    layer, x = make_layer(41, 24).eval(), normal(3, 41)

    def call(x):
        with randlora.inference_cache():
            return layer(x)

    function = call if form == "with" else randlora.inference_cache()(layer.forward)
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    with torch.no_grad():
        for factor in (1, 3):
            layer.randlora_lambda["default"].data.mul_(factor)
            assert relative_error(compiled(x), reference_forward(layer, x)) < 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("tracer", ["jit", "make_fx"])
def test_traced_graphs_follow_the_parameters(tracer):
    from torch.fx.experimental.proxy_tensor import make_fx

    layer, x = make_layer(41, 24, **DOUBLE).eval(), normal(3, 41, **DOUBLE)
    with torch.no_grad(), randlora.inference_cache() as scope:
        call_until_kept(scope, layer, x)
        traced = torch.jit.trace(layer, x) if tracer == "jit" else make_fx(layer)(x)
        layer.randlora_lambda["default"].mul_(3)
        torch.testing.assert_close(traced(x), reference_forward(layer, x), rtol=1e-10, atol=1e-10)
        assert_exact(layer, x)


@pytest.mark.cuda
def test_streams_have_an_entry_each():
    x = normal(3, 41, device="cuda")
    layer = make_layer(41, 24, device="cuda").eval()
    with torch.no_grad(), randlora.inference_cache() as scope:
        call_until_kept(scope, layer, x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(40):
                y = layer(x)
        torch.cuda.current_stream().wait_stream(side)
        assert relative_error(y, reference_forward(layer, x)) < 1e-5
        assert scope.nbytes == 2 * 41 * 24 * 4
