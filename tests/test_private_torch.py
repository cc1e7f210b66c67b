"""The private names of torch that randlora uses: each is there and does what it is used for, in the torch at hand.

Where a release of torch changes one, the test of that name fails and says so, not some layer far away. Runs without a
build of randlora, too, so that a new torch can be asked before anything is built for it::

    PYTHONPATH=. python -m pytest --noconftest tests/test_private_torch.py
"""

import ast
import importlib.util
from functools import reduce
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

PACKAGE = Path(importlib.util.find_spec("randlora").origin).parent
HOLDER = PACKAGE / "private_torch.py"

# Attributes of nn.Module, Tensor and UntypedStorage, and methods of Module that a subclass extends, which any file may
# use: torch's documents tell how to, or most libraries on top of torch would break with them.
OF_INSTANCES = {
    "_apply",
    "_buffers",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_get_name",
    "_load_from_state_dict",
    "_modules",
    "_non_persistent_buffers_set",
    "_parameters",
    "_qkv_same_embed_dim",
    "_save_to_state_dict",
    "_version",
}
# Read by name, or by the file that holds the rest.
OF_INSTANCES_TOO = {
    "_backward_hooks", "_backward_pre_hooks", "_cdata", "_compiled_call_impl", "_load_state_dict_post_hooks",
}  # fmt: skip


@pytest.fixture(scope="module")
def private():
    """randlora/private_torch.py alone."""
    spec = importlib.util.spec_from_file_location("private_torch_alone", HOLDER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def torch_paths(tree):
    """(line, dotted name) of everything in a module's syntax that is spelled as a private name of torch."""
    roots, found = {"torch": "torch"}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
            roots |= {alias.asname: alias.name for alias in node.names if alias.asname and "torch" in alias.name}
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "torch":
            paths = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found += [(node.lineno, path) for path in paths.values()]
            roots |= paths
    for node in ast.walk(tree):
        names, at = [], node
        while isinstance(at, ast.Attribute):
            names.insert(0, at.attr)
            at = at.value
        if names and isinstance(at, ast.Name) and at.id in roots:
            found.append((node.lineno, ".".join([roots[at.id], *names])))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            owner, name = ast.unparse(node.args[0]), node.args[1]
            root, _, rest = owner.partition(".")
            if root in roots and isinstance(name, ast.Constant):
                found.append((node.lineno, ".".join(filter(None, (roots[root], rest, name.value)))))
    return [(line, path) for line, path in found if any(map(is_private, path.split(".")))]


def held_paths():
    """The private names that randlora/private_torch.py takes, the longest spelling of each."""
    paths = {path for _, path in torch_paths(ast.parse(HOLDER.read_text()))}
    if not torch.backends.cuda.is_built():
        paths.remove("torch._C._cuda_getCurrentRawStream")
    return sorted(path for path in paths if not any(other.startswith(f"{path}.") for other in paths))


@pytest.mark.parametrize("path", held_paths())
def test_torch_has_it_still(path):
    names = path.split(".")
    for i, name in enumerate(names[1:], start=1):
        owner = ".".join(names[:i])
        try:
            reduce(getattr, names[1 : i + 1], torch)
        except AttributeError:
            try:
                importlib.import_module(".".join(names[: i + 1]))
            except ImportError:
                pytest.fail(
                    f"torch {torch.__version__} has no {name} in {owner} any more: find what replaces {path} in "
                    f"randlora/{HOLDER.name}, where a comment says what it is for"
                )


def test_every_name_has_a_test(private):
    untested = [name for name in private.__all__ if f"test_{name}" not in globals()]
    assert not untested, f"write test_<name> here for {untested}, of randlora/{HOLDER.name}"


def test_only_one_file_takes_private_names():
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != HOLDER
        for line, name in torch_paths(ast.parse(path.read_text()))
    ]
    assert not wrong, f"only randlora/{HOLDER.name} may take private names of torch (its docstring says why): {wrong}"


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch._C.f()",
        "import torch._dynamo",
        "import torch._dynamo as d",
        "import torch.utils._pytree",
        "from torch import _dynamo",
        "from torch.utils._pytree import tree_map",
        "from torch.autograd import forward_ad as ad; ad._current_level",
        "import torch.nn.functional as F; F._pad()",
        "import torch; torch.ops.aten._unsafe_view.default(y)",
        "import torch; getattr(torch._C, 'f', None)",
        "import torch; hasattr(torch, '_dynamo')",
    ],
)
def test_the_search_sees(line):
    assert torch_paths(ast.parse(line))


def test_attributes_of_torch_objects_are_listed():
    """No file reads or extends another private attribute of modules, tensors and storages than the list above says."""
    tensor = torch.zeros(1)
    objects = nn.Module(), nn.MultiheadAttention(2, 1), tensor, tensor.untyped_storage()
    theirs = {name for thing in objects for name in dir(thing) if is_private(name)}
    assert not (OF_INSTANCES | OF_INSTANCES_TOO) - theirs, f"torch {torch.__version__} has dropped what randlora uses"
    used = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.attr] if isinstance(node, ast.Attribute) else []
            names += [node.name] if isinstance(node, ast.FunctionDef) else []
            for name in theirs.intersection(names):
                used.setdefault(name, f"{path.relative_to(PACKAGE.parent)}:{node.lineno}")
    wrong = {name: place for name, place in used.items() if name not in OF_INSTANCES | OF_INSTANCES_TOO}
    assert not wrong, f"private attributes of torch's objects that no test looks after: {wrong}"


def test_attributes_of_modules():
    module, handle = nn.BatchNorm1d(2), None
    assert [*module._parameters] == ["weight", "bias"] and module._modules == {}
    assert [*module._buffers] == ["running_mean", "running_var", "num_batches_tracked"]
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    assert module._non_persistent_buffers_set == {"scratch"}
    for hooks, register in (
        ("_forward_hooks", module.register_forward_hook),
        ("_forward_pre_hooks", module.register_forward_pre_hook),
        ("_backward_hooks", module.register_full_backward_hook),
        ("_backward_pre_hooks", module.register_full_backward_pre_hook),
    ):
        assert not getattr(module, hooks)
        handle = register(lambda *_: None)
        assert len(getattr(module, hooks)) == 1
        handle.remove()
    for kdim in (None, 2, 3):
        assert nn.MultiheadAttention(2, 1, kdim=kdim)._qkv_same_embed_dim == (kdim != 3)


def test_methods_of_modules_are_called():
    class Extended(nn.Linear):
        calls = ()

        def _apply(self, fn, recurse=True):
            self.calls += ("apply",)
            return super()._apply(fn, recurse)

        def _get_name(self):
            return "another name"

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            self.calls += ("save",)
            super()._save_to_state_dict(destination, prefix, keep_vars)

        def _load_from_state_dict(self, state_dict, prefix, *rest):
            self.calls += ("load",)
            super()._load_from_state_dict(state_dict, prefix, *rest)

    layer = Extended(2, 2)
    nn.Sequential(layer).double().load_state_dict(nn.Sequential(layer).state_dict())
    assert layer.calls == ("apply", "save", "load") and str(layer).startswith("another name(")


def test_version_counts_writes():
    tensor = torch.zeros(2)
    before = tensor._version
    tensor.add_(1)
    tensor.detach().add_(1)
    assert tensor._version == before + 2


# ---- one test for each name of randlora/private_torch.py ----


def test_in_transform(private):
    seen = []

    def look(x):
        seen.append(private.in_transform())
        return x.sin().sum()

    x = torch.ones(3)
    look(x)
    torch.func.grad(look)(x)
    torch.func.vmap(look)(x[None])
    torch.func.jvp(look, (x,), (x,))
    with forward_ad.dual_level():
        look(forward_ad.make_dual(x, x))
    look(x)
    assert seen == [False, True, True, True, True, False]


def test_jvp_levels(private):
    seen = []

    def look(x):
        seen.append(private.jvp_levels())
        return x.sin()

    x = torch.ones(3)
    look(x)
    torch.func.vmap(torch.func.grad(look))(x)
    torch.func.jvp(look, (x,), (x,))
    torch.func.jvp(lambda x: torch.func.jvp(look, (x,), (x,))[1], (x,), (x,))
    assert seen == [0, 0, 1, 2]


def test_without_transforms(private):
    kept = []

    def look(x):
        with private.without_transforms():
            kept.append(torch.zeros(2))
        kept.append(torch.zeros(2))
        return (x + kept[1]).sum()

    torch.func.grad(look)(torch.ones(2))
    assert [torch._C._functorch.is_functorch_wrapped_tensor(t) for t in kept] == [False, True]


def test_below_autograd(private):
    x = torch.ones(3, requires_grad=True)
    with private.below_autograd():
        assert torch.is_grad_enabled() and not x.sin().requires_grad
    assert x.sin().requires_grad


def test_unsafe_view(private):
    class Reshaped(torch.autograd.Function):
        @staticmethod
        def forward(x, reshape):
            return reshape(x, (2, 3))

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, grad):
            return grad.reshape(6), None

    x = torch.arange(6.0, requires_grad=True)
    y = Reshaped.apply(x, private.unsafe_view)
    assert y.data_ptr() == x.data_ptr() and not y._is_view()
    y = Reshaped.apply(x * 1, private.unsafe_view)
    y.mul_(2).sum().backward()
    assert x.grad.tolist() == [2.0] * 6
    with pytest.raises(RuntimeError, match="view"):  # what it is for: an ordinary view refuses that
        Reshaped.apply(x * 1, torch.Tensor.view).mul_(2)


def test_is_put_together(private, tmp_path):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    distributed = torch.distributed
    if not distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.ParameterDict({"a": torch.ones(2)}))
    assert not any(map(private.is_put_together, model.modules()))
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fsdp.fully_shard(model, mesh=distributed.device_mesh.init_device_mesh("cpu", (1,)))
        for _ in range(2):
            assert [private.is_put_together(module) for module in model] == [True, False, True]
            model.unshard()
            assert type(model[0].weight) is nn.Parameter, "what is put together can be told by its class now"
    finally:
        distributed.destroy_process_group()


def test_saved_tensors_hooks(private):
    seen = []

    def look(x):
        seen.append(private.saved_tensors_hooks())
        return x.sin()

    def pack(x):
        return x

    x = torch.ones(3, requires_grad=True)
    look(x)
    with torch.autograd.graph.saved_tensors_hooks(pack, pack):
        look(x)
    checkpoint(look, x, use_reentrant=False)
    assert not seen[0] and seen[1][0] is pack
    assert "checkpoint" in seen[2][0].__qualname__  # what a mixed batch refuses


def test_without_torch_function(private):
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise AssertionError(func)

    class LoudMode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            raise AssertionError(func)

    loud = torch.ones(2).as_subclass(Loud)
    with pytest.raises(AssertionError):
        loud + 1
    mode = LoudMode()
    with mode, private.without_torch_function():
        assert (loud + 1).sum().item() == 4
        torch.set_grad_enabled(torch.is_grad_enabled())  # as an export would record it


def test_without_dispatch_modes(private):
    with private.FakeTensorMode() as mode:
        assert isinstance(torch.ones(2), private.FakeTensor)
        with private.without_dispatch_modes():
            assert type(torch.ones(2)) is torch.Tensor and private.fake_mode() is None
        assert private.fake_mode() is mode


def test_fake_mode(private):
    assert private.fake_mode() is None
    with private.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert private.fake_mode() is mode and mode.allow_non_fake_inputs
    with private.FakeTensorMode():
        assert not private.fake_mode().allow_non_fake_inputs


def test_FakeTensorMode(private):
    with private.FakeTensorMode():
        x = torch.ones(2, 3, device="cuda")  # no such device is needed, and no memory
        assert (x @ x.T).shape == (2, 2) and x.device.type == "cuda"


def test_FakeTensor(private):
    """torch.export has them in the place of parameters, of this very class."""
    seen = []

    class Layer(nn.Linear):
        def forward(self, x):
            seen.append(type(self.weight))
            return super().forward(x)

    torch.export.export(Layer(2, 2), (torch.ones(1, 2),), strict=False)
    assert private.FakeTensor in seen


def test_is_watched(private):
    seen = []

    def look(x):
        seen.append(private.is_watched())
        return x.sin()

    x = torch.ones(3)
    look(x)
    torch.func.vmap(look)(x)
    with private.FakeTensorMode(allow_non_fake_inputs=True):
        look(x)
    torch.jit.trace(look, x, check_trace=False)
    look(x)
    assert seen == [False, True, True, True, False]


def test_graph_break(private):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def broken(x):
        x = x.sin()
        private.graph_break()
        return x.cos()

    torch.compiler.reset()
    x = torch.ones(3)
    torch.testing.assert_close(torch.compile(broken, backend=backend)(x), x.sin().cos())
    assert len(graphs) == 2
    torch.compiler.reset()


def test_is_compiled(private):
    plain, own = nn.Linear(2, 2), nn.Linear(2, 2)
    own.compile(backend="eager")
    wrapped = torch.compile(plain, backend="eager")
    assert not private.is_compiled(plain) and private.is_compiled(own) and private.is_compiled(wrapped)


@pytest.fixture
def wrapped(tmp_path):
    """A DistributedDataParallel of one process that trains one of two layers."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    assert not torch.distributed.is_initialized(), "another test left its process group"
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)
            self.seen = []

        def forward(self, x):
            self.seen += [look() for look in self.looks]
            return self.second(self.first(x))

    yield nn.parallel.DistributedDataParallel(Net())
    torch.distributed.destroy_process_group()


def test_active_ddp(private, wrapped):
    wrapped.module.looks = [private.active_ddp]
    wrapped(torch.ones(1, 2))
    wrapped.module(torch.ones(1, 2))
    assert wrapped.module.seen == [wrapped, None]


def test_expects_uneven_inputs(private, wrapped):
    wrapped.module.looks = [lambda: private.expects_uneven_inputs(wrapped)]
    wrapped(torch.ones(1, 2)).sum().backward()
    with wrapped.join():
        wrapped(torch.ones(1, 2)).sum().backward()
    assert wrapped.module.seen == [False, True]


def test_reduced_by(private, wrapped):
    wrapped.module.looks = [lambda: wrapped.module.first.requires_grad_() and private.reduced_by(wrapped)]
    wrapped(torch.ones(1, 2))
    found, expected = wrapped.module.seen[0], [*wrapped.module.second.parameters()]
    assert {id(p) for p in found} == {id(p) for p in expected} and len(found) == 2


def test_ddp_ignores_what_a_module_names(wrapped):
    """randlora.integrations.peft names the bases, which PEFT keeps as buffers, in this attribute of its model."""
    nets = nn.Linear(2, 2), nn.Linear(2, 2)
    for net in nets:
        net.register_buffer("bases", torch.ones(2))
    nets[0]._ddp_params_and_buffers_to_ignore = ["bases"]
    counts = []
    for net in nets:
        ddp = nn.parallel.DistributedDataParallel(net)
        with torch.profiler.profile() as profile:
            ddp(torch.ones(1, 2))
        counts.append(sum(event.name == "gloo:broadcast" for event in profile.events()))
    assert counts == [0, 1]


def test_parse_to(private):
    cpu, half = torch.device("cpu"), torch.float16
    for args, kwargs, expected in (
        ((), {}, (None, None)),
        ((half,), {}, (None, half)),
        (("cpu",), {}, (cpu, None)),
        ((cpu, half, True), {}, (cpu, half)),
        ((), {"dtype": half, "device": "cpu"}, (cpu, half)),
        ((torch.zeros(1, dtype=half),), {}, (cpu, half)),
    ):
        assert private.parse_to(*args, **kwargs)[:2] == expected
    with pytest.raises(TypeError):
        private.parse_to("cpu", "cuda")


def test_current_stream(private):
    if not torch.backends.cuda.is_built():
        with pytest.raises(RuntimeError, match="without CUDA"):
            private.current_stream(0)
    elif torch.cuda.is_available():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            assert private.current_stream(stream.device.index) == stream.cuda_stream
        assert private.current_stream(0) == torch.cuda.current_stream(0).cuda_stream
    else:
        assert callable(private.current_stream)


def test_storage_identity(private):
    for mode in (private.FakeTensorMode(), torch.device("cpu")):
        with mode:
            x, other = torch.ones(4), torch.ones(4)
            assert private.storage_identity(x) == private.storage_identity(x[1:].detach())
            assert private.storage_identity(x) != private.storage_identity(other)


def test_NonDynamicallyQuantizableLinear(private):
    attention = nn.MultiheadAttention(4, 2)
    assert type(attention.out_proj) is private.NonDynamicallyQuantizableLinear
    assert not isinstance(nn.Linear(2, 2), private.NonDynamicallyQuantizableLinear)


def test_was_distributed(private):
    from torch.distributed.tensor import DeviceMesh, distribute_module

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        layer = distribute_module(nn.Linear(2, 2), DeviceMesh("cpu", [0]))
    finally:
        torch.distributed.destroy_process_group()
    assert private.was_distributed(layer) and not private.was_distributed(nn.Linear(2, 2))


def test_tree_map(private):
    found = private.tree_map(lambda v: v + 1 if isinstance(v, int) else v, {"a": (1, [2, None]), "b": "c"})
    assert found == {"a": (2, [3, None]), "b": "c"}
