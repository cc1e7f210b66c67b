"""The package's modules import each other in one direction, at their top, and each can be imported alone."""

import ast
import graphlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import randlora

ROOT = Path(randlora.__file__).parent
# Functions that import modules of ours all the same, and why.
LATE = {
    "layers/linear.py": "this imports torch.distributed, which may not be there and takes long",
    "layers/merging.py": "the same",
    "distributed/__init__.py": "what looks at whole models comes when it is asked for: their layers ask this folder",
    "export/source.py": "PEFT's models are looked at by what imports PEFT, which is optional",
    "integrations/peft/__init__.py": "these need PEFT, which is optional",
    "model/training_step.py": "randlora.distributed is for those who train on several devices",
}


def name_of(path):
    parts = ["randlora", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported(module, statement):
    """Names of our modules that this statement of `module` imports."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names if alias.name in MODULES]
    is_package = MODULES[module].name == "__init__.py"
    package = module.split(".")[: len(module.split(".")) - statement.level + is_package]
    source = ".".join([*package, *filter(None, [statement.module])]) if statement.level else statement.module
    names = [f"{source}.{alias.name}" for alias in statement.names]
    return [name if name in MODULES else source for name in names if name in MODULES or source in MODULES]


def statements(module):
    """All imports in `module`, and whether each runs with the module; those for type checkers are left out."""

    def walk(nodes, at_top):
        for node in nodes:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                yield node, at_top
            elif not (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")):
                inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from walk(ast.iter_child_nodes(node), at_top and not inside)

    return walk(ast.parse(MODULES[module].read_text()).body, True)


def test_modules_import_each_other_in_one_direction():
    graph = {
        module: {name for statement, at_top in statements(module) if at_top for name in imported(module, statement)}
        for module in MODULES
    }
    assert sum(map(len, graph.values())) > 100 and "randlora.layers.linear" in graph["randlora.model.injection"]
    list(graphlib.TopologicalSorter({module: names - {module} for module, names in graph.items()}).static_order())


def test_no_function_imports_our_modules_without_a_reason():
    late = {
        MODULES[module].relative_to(ROOT).as_posix()
        for module in MODULES
        for statement, at_top in statements(module)
        if not at_top and imported(module, statement)
    }
    assert late == set(LATE)


# The package comes first whatever is imported: each of the others is imported into a copy of the process that has it.
FORKED = """
import importlib, importlib.util, os, sys
import randlora
if importlib.util.find_spec("peft"):
    import peft.tuners.randlora  # takes long, and is not ours
for module in set(sys.argv[1:]) - set(sys.modules):
    if not (child := os.fork()):
        try:
            importlib.import_module(module)
        except BaseException as error:
            print(f"{module}: {type(error).__name__}: {error}")
            sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_every_module_can_be_imported_alone():
    of_others = {name: f"randlora.integrations.{name}" for name in ("transformers", "trl")}
    of_others["peft"] = "randlora.integrations.peft."
    missing = tuple(ours for name, ours in of_others.items() if importlib.util.find_spec(name) is None)
    modules = [m for m in MODULES if not m.endswith("__main__") and not m.startswith(missing)]
    command = [sys.executable, "-W", "ignore", "-c", FORKED, *modules]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
