"""The annotations, as a user's type checker takes them; `make lint` runs mypy over the package itself."""

import ast
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
import typing
from importlib import resources, util
from pathlib import Path

import pytest
import torch

import randlora


def modules():
    for found in pkgutil.walk_packages(randlora.__path__, "randlora."):
        if found.name == "randlora.__main__" or found.name.startswith("randlora._C"):
            continue
        if found.name.startswith("randlora.integrations.peft") and util.find_spec("peft") is None:
            continue
        yield importlib.import_module(found.name)


def functions(module):
    """(name, function) of all that `module` defines itself, with the methods of its classes."""
    own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    for owner in (module, *filter(inspect.isclass, own)):
        for value in vars(owner).values():
            value = value.fget if isinstance(value, property) else inspect.unwrap(getattr(value, "__func__", value))
            if not inspect.isfunction(value) or value.__module__ != module.__name__:
                continue
            # Not a dataclass's, and not the fake kernels: what calls them is torch, by their schemas. Nor what
            # torch.compile leaves in a module after a graph break.
            compiled = value.__code__.co_name.startswith("torch_dynamo_resume")  # its __name__ is "__resume_at_…"
            own_name = value.__name__ != "_" and not compiled
            if value.__code__.co_filename == module.__file__ and own_name:
                yield f"{module.__name__}.{value.__qualname__}", value


def test_what_compiling_leaves_is_not_looked_at(tmp_path, monkeypatch):
    """Another test of this process may have compiled a function with a graph break: its rest stands in the module."""
    text = (
        "import torch\n\ndef broken(x: int) -> int:\n    y = x + 1\n    torch._dynamo.graph_break()\n    return y * 2\n"
    )
    (tmp_path / "left_by_compiling.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("left_by_compiling")
    torch.compile(module.broken, backend="eager")(torch.ones(2))
    assert [name for name in vars(module) if "resume" in name], "nothing was left: this test shows nothing"
    assert [name for name, _ in functions(module)] == ["left_by_compiling.broken"]


def test_annotations_are_complete():
    """Every function says what it takes and gives; mypy asks the same, but not in every environment."""
    missing = []
    for module in modules():
        for name, function in functions(module):
            parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
            unsaid = [p.name for p in parameters if p.annotation is p.empty]
            if unsaid or inspect.signature(function).return_annotation is inspect.Signature.empty:
                missing.append(f"{name}: {', '.join(unsaid) or 'what it returns'}")
    assert not missing


def test_annotations_name_what_there_is():
    """They are strings until somebody asks: ``typing.get_type_hints``, as documentation, validation and IDEs do."""
    wrong = []
    for module in modules():
        for name, function in functions(module):
            try:
                typing.get_type_hints(function)
            except NameError as error:
                if error.name not in module_names_for_checkers(module):
                    wrong.append(f"{name}: {error}")
            except AttributeError as error:
                wrong.append(f"{name}: {error}")
    assert not wrong


def module_names_for_checkers(module):
    """Names that `module` imports under TYPE_CHECKING only, where importing them would go round in a circle."""
    blocks = [node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.If)]
    inside = [part for block in blocks if ast.unparse(block.test) == "TYPE_CHECKING" for part in ast.walk(block)]
    return {alias.asname or alias.name for part in inside if isinstance(part, ast.ImportFrom) for alias in part.names}


def test_the_package_says_that_it_is_typed():
    assert resources.files("randlora").joinpath("py.typed").is_file()


def test_a_users_program(tmp_path):
    """The public functions give a checker types, not Any."""
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\n"
        "import randlora\n"
        "layer = randlora.Linear(torch.nn.Linear(4, 4), r=2)\n"
        "reveal_type(layer(torch.ones(1, 4)))\n"
        "reveal_type(layer.forward(torch.ones(1, 4)))\n"
        "reveal_type(randlora.get_peft_model(layer, randlora.RandLoraConfig()))\n"
        "randlora.RandomBases(8, 8, 2, kind=3)\n"
    )
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), str(program)]
    folder = Path(randlora.__file__).parents[1]
    # mypy does not follow the hook that an editable installation finds its package by.
    path = {} if folder.name == "site-packages" else {"MYPYPATH": str(folder)}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | path, capture_output=True, text=True, timeout=600)
    revealed = [line.partition("note: Revealed type is ")[2] for line in done.stdout.splitlines() if "Revealed" in line]
    assert revealed == ['"Any"', '"torch._tensor.Tensor"', '"randlora.model.model.RandLoraModel"'], done.stdout
    (wrong,) = (line for line in done.stdout.splitlines() if line.startswith("program.py:") and "error:" in line)
    assert 'has incompatible type "int"; expected "str"' in wrong
