"""randlora.ops.calls: the signatures that a type checker sees are those of the operators."""

import ast
import inspect
from pathlib import Path

import pytest
import torch

import randlora
from randlora.ops import calls

# What a schema calls the types that a signature has.
TYPES = {
    "Tensor": "Tensor",
    "Optional[Tensor]": "Tensor | None",
    "List[Tensor]": "Sequence[Tensor]",
    "List[int]": "Sequence[int]",
    "Optional[float]": "float | None",
    "Optional[str]": "str | None",
    "float": "float",
    "int": "int",
    "bool": "bool",
    "str": "str",
}
DTYPES = {"int": "torch.dtype", "Optional[int]": "torch.dtype | None"}  # a ScalarType is an int to a schema
SIGNATURES = {
    node.name: node for node in ast.walk(ast.parse(inspect.getsource(calls))) if isinstance(node, ast.FunctionDef)
}


def said(name):
    """The arguments in a signature: name -> (type, default, by name only)."""
    arguments = SIGNATURES[name].args
    plain = [None] * (len(arguments.args) - len(arguments.defaults)) + arguments.defaults
    pairs = [*zip(arguments.args, plain, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return {
        part.arg: (
            ast.unparse(part.annotation),
            None if default is None else (ast.literal_eval(default),),
            part in arguments.kwonlyargs,
        )
        for part, default in pairs
    }


def meant(schema):
    """The same of an operator's schema."""
    found = {}
    for argument in schema.arguments:
        kind = str(argument.type)
        kind = DTYPES[kind] if argument.name == "dtype" else TYPES[kind]
        default = (argument.default_value,) if argument.has_default_value() else None
        found[argument.name] = kind, default, argument.kwarg_only
    return found


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    op = getattr(calls, name)
    assert op is getattr(torch.ops.randlora, name).default
    assert list(said(name).items()) == list(meant(op._schema).items())
    returned = [TYPES[str(part.type)] for part in op._schema.returns]
    expected = {0: "None", 1: "Tensor"}.get(len(returned), f"tuple[{', '.join(returned)}]")
    assert ast.unparse(SIGNATURES[name].returns) == expected


def test_no_other_file_calls_operators_untyped():
    package = Path(randlora.__file__).parent
    wrong = [
        f"{path.relative_to(package)}:{node.lineno}"
        for path in package.rglob("*.py")
        if path != Path(calls.__file__)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.ops.randlora"
    ]
    assert not wrong, f"randlora.ops.calls has the operators with the types of their arguments: {wrong}"
