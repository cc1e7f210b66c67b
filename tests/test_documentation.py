"""README.md and docs/: their code runs, their commands exist, their links lead somewhere, and every name has a page."""

import argparse
import ast
import importlib.util
import re
import socket
import sys
import tempfile
import types
import warnings
from pathlib import Path

import pytest
import torch
from helpers import pages
from helpers.pages import PAGES, ROOT

import randlora

EXAMPLES = "examples/README.md"  # its block wants a trained adapter: test_examples.py runs it


# ---- code ----


@pytest.fixture
def small_models():
    """What a page may begin with: a `model` and a `base_model`, as they stand in a script of the reader's."""
    transformers = pytest.importorskip("transformers")

    def make():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100,
            pad_token_id=0,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)

    return {"model": make(), "base_model": make()}


@pytest.fixture
def peft_is_restored():
    yield
    if "randlora.integrations.peft" in sys.modules:
        sys.modules["randlora.integrations.peft"].disable()


@pytest.fixture
def one_rank(monkeypatch):
    """As torchrun would start a script on one process; its process group is gone afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def has_python(page):
    return any(block.language == "python" for block in pages.blocks(page))


@pytest.mark.parametrize("page", [page for page in PAGES if has_python(page) and page != EXAMPLES])
def test_the_code_of_a_page_runs(page, request, small_models, peft_is_restored, monkeypatch, tmp_path, capsys):
    if "integrations.peft" in pages.text_of(page):
        pytest.importorskip("peft")
    if page == "docs/distributed.md":  # other pages' scripts run alone: accelerate would remember ranks for good
        request.getfixturevalue("one_rank")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = dict(small_models)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ran = pages.run(page, names)
    assert ran
    if page == "docs/models.md":
        assert len(ran) == 10
        assert torch.equal(names["loaded"](names["ids"]).logits, names["model"](names["ids"]).logits)
        assert capsys.readouterr().out.count("did you mean 'q_proj'") == 1


def test_what_is_not_run_is_counted():
    left_out = [block for page in PAGES for block in pages.blocks(page) if block.reason]
    assert [(block.page, block.reason.partition(" ")[0]) for block in left_out] == [("docs/export.md", "vLLM")]
    marks = sum(len(re.findall(r"^<!-- not run", pages.text_of(page), re.MULTILINE)) for page in PAGES)
    assert marks == len(left_out), "a mark stands before no block"


def test_every_block_says_what_it_is():
    for page in PAGES:
        for block in pages.blocks(page):
            assert block.language in ("python", "bash", "text", "bibtex"), f"{block}: {block.language!r}"


def test_explain_prints_what_the_readme_shows():
    shown = next(b.code for b in pages.blocks("README.md") if b.language == "text" and b.code.startswith("adapter "))
    layer = randlora.Linear(torch.nn.Linear(768, 768), r=32)
    assert str(randlora.explain(layer, 600)).strip() == shown.strip()


# ---- commands ----


class Understood(Exception):
    pass


def end_when_understood(monkeypatch, whole):
    """Commands end when their arguments are understood. Not `whole`: none of them is required."""
    parse, add = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.add_argument

    def parse_args(self, argv=None, namespace=None):
        parse(self, argv, namespace)
        raise Understood

    def add_argument(self, *names, **settings):
        if not whole and names[0].startswith("-"):
            settings.pop("required", None)
        return add(self, *names, **settings)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", add_argument)


def check_make(words):
    makefile = (ROOT / "Makefile").read_text()
    settings = (ROOT / "setup.py").read_text() + makefile
    for word in words:
        name, is_variable, _ = word.partition("=")
        if is_variable:
            assert re.search(rf"\b{name}\b", settings), f"make knows no variable {name}"
        else:
            assert re.search(rf"^{name}:", makefile, re.MULTILINE), f"make knows no target {name}"


def check_pip(words):
    assert words[0] == "install", words
    project = (ROOT / "pyproject.toml").read_text()
    for extras in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), f"there is no extra [{extra}]"


def check_module(module, words):
    if module == "pytest":
        return
    if module == "bench":
        for package in ("peft", "transformers", "matplotlib", "tqdm"):
            pytest.importorskip(package)
        sys.path.append(str(ROOT)) if str(ROOT) not in sys.path else None
        from bench.__main__ import COMMANDS

        if words == ["--help"]:
            return
        assert words[0] in COMMANDS, f"python -m bench knows no {words[0]}"
        module, words = f"bench.{words[0]}", words[1:]
    else:
        assert module == "randlora", module
        module = "randlora.__main__"
    with pytest.raises((Understood, SystemExit)) as ended:
        importlib.import_module(module).main(words)
    assert ended.type is Understood or ended.value.code == 0, words


def check_python(words):
    if words[0] == "-m":
        check_module(words[1], words[2:])
    elif words[0] == "-c":
        ast.parse(words[1])
    elif words[0] == "examples/finetune.py":
        pytest.importorskip("matplotlib")
        sys.path.append(str(ROOT / "examples")) if str(ROOT / "examples") not in sys.path else None
        import finetune

        with pytest.raises((Understood, SystemExit)) as ended:
            finetune.parse(words[1:])
        assert ended.type is Understood or ended.value.code == 0, words
    else:
        assert (ROOT / words[0]).is_file() or (ROOT / words[0] / "__main__.py").is_file(), words


def check_launcher(words):
    """What `torchrun` and ``accelerate launch`` start: a program of ours, or ``train.py`` for the reader's own."""
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert all((ROOT / word).is_file() for word in words[:script] if word.endswith(".yaml")), words
    if words[script] != "train.py":
        check_python(words[script:])


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("find", [pages.commands, pages.mentioned])
def test_the_commands_of_a_page_exist(page, find, monkeypatch, capsys):
    end_when_understood(monkeypatch, whole=find is pages.commands)
    for command, *words in find(page):
        while re.fullmatch(r"[A-Z_]+=.*", command):  # variables before a command
            command, *words = words
        if command == "make":
            check_make(words)
        elif command in ("python", "python3"):
            check_python(words)
        elif command == "pip":
            check_pip(words)
        elif command == "uv":
            check_pip(words[1:])
        elif command in ("torchrun", "accelerate"):
            check_launcher(words)
        elif command == "git":
            assert words[0] in ("clone", "log", "show", "switch"), words
        elif command in ("cd", "pre-commit"):
            pass
        else:
            assert (ROOT / command).is_file(), f"{page}: {command}"


# ---- what stands in backticks ----

FOLDERS = "bench|build_backend|csrc|docs|examples|randlora|tests"


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_a_page_names_exist(page):
    for span in pages.spans(page):
        path = span.split("::")[0]
        if re.fullmatch(rf"({FOLDERS})/[\w./*-]*", path):
            assert any(ROOT.glob(path.rstrip("/"))), f"{page}: there is no {path}"


@pytest.mark.parametrize("page", PAGES)
def test_the_names_of_a_page_exist(page):
    for span in pages.spans(page):
        match = re.match(r"(?:torch\.ops\.)?randlora(?:\.\w+)+", span)
        if match and not re.search(r"[/*]", span):
            for name in ("transformers", "trl"):
                if match[0].startswith(f"randlora.integrations.{name}"):
                    pytest.importorskip(name)
            resolve(match[0])


def resolve(name):
    """The object of a dotted name that begins with ``randlora`` or ``torch.ops.randlora``."""
    root, *parts = name.removeprefix("torch.ops.").split(".")
    found = torch.ops.randlora if name.startswith("torch.ops.") else importlib.import_module(root)
    for i, part in enumerate(parts):
        if isinstance(found, types.ModuleType) and not hasattr(found, part):
            importlib.import_module(".".join(["randlora", *parts[: i + 1]]))
        found = getattr(found, part, None) if not dataclass_field(found, part) else found
        assert found is not None, f"{name}: there is no {part}"
    return found


def dataclass_field(cls, name):
    return name in getattr(cls, "__dataclass_fields__", ())


@pytest.mark.parametrize("page", PAGES)
def test_the_tests_that_a_page_names_exist(page):
    source = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for span in pages.spans(page):
        if re.fullmatch(r"test_\w+", span):
            assert f"def {span}(" in source, f"{page}: there is no {span}"


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page):
    for link in pages.links(page):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            known = pages.anchors(target.resolve().relative_to(ROOT).as_posix())
            assert anchor in known, f"{page}: {link} (there are: {', '.join(sorted(known))})"


def test_the_rooms_are_described_by_their_own_words():
    page = " ".join(pages.text_of("docs/architecture.md").split())
    rooms = [path.parent for path in (ROOT / "randlora").rglob("__init__.py")]
    assert len(rooms) > 5
    for room in rooms:
        says = ast.get_docstring(ast.parse((room / "__init__.py").read_text())).split("\n\n")[0]
        words = " ".join(says.replace("``", "`").split())
        assert f"| `{room.relative_to(ROOT).as_posix()}/` | {words} |" in page, room


# ---- public names ----


def public_names():
    others = [
        importlib.import_module(f"randlora.{name}")
        for name in ("distributed", "export", "integrations.accelerate", "integrations.peft")
    ]
    others += [
        importlib.import_module(f"randlora.integrations.{name}") for name in ("transformers", "trl") if installed(name)
    ]
    return {
        *(f"randlora.{name}" for name in randlora.__all__ if name not in ("export", "functional")),
        *(f"randlora.functional.{name}" for name in randlora.functional.__all__),
        *(f"{module.__name__}.{name}" for module in others for name in module.__all__),
    }


def test_every_public_name_has_a_page():
    pytest.importorskip("transformers")
    pytest.importorskip("trl")
    api = [page for page in PAGES if page.startswith("docs/api/")]
    shown = [name for page in api for name in re.findall(r"^::: (\S+)$", pages.text_of(page), re.MULTILINE)]
    modules = {"randlora.functional", "randlora.planner"}  # for what their docstrings explain
    assert sorted(set(shown) - modules) == sorted(public_names())
    assert len(shown) == len(set(shown))


def test_every_public_name_says_what_it_is():
    for name in public_names():
        assert (resolve(name).__doc__ or "").strip(), f"{name} has no docstring"


def test_every_operator_has_a_line():
    page = pages.text_of("docs/api/operators.md")
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("randlora::")}
    assert names and {name for name in names if f"`{name.removeprefix('randlora::')}`" not in page} == set()


def test_links_in_docstrings_lead_somewhere():
    root = Path(randlora.__file__).parent
    found, nowhere = 0, []
    for path in root.rglob("*.py"):
        module = ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
        optional = [name for name in ("peft", "transformers") if f".integrations.{name}" in module]
        if module.endswith("__main__") or not all(map(installed, optional)):
            continue
        for scope, text in docstrings(ast.parse(path.read_text()), module):
            for name in re.findall(r":(?:attr|class|data|func|meth|mod):`[~.]?([\w.]+)`", text):
                found += 1
                if not any(exists(f"{place}.{name}" if place else name) for place in scope):
                    nowhere.append(f"{module}: {name}")
    assert found > 50
    assert nowhere == []


def docstrings(tree, module):
    """The docstrings of a module, each with the names that its own may stand behind."""

    def visit(node, scope):
        if ast.get_docstring(node):
            yield scope, ast.get_docstring(node)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from visit(child, [f"{scope[0]}.{child.name}", *scope])
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from visit(child, scope)

    yield from visit(tree, [module, ""])


def exists(name):
    if not name.startswith("randlora"):
        return False
    try:
        resolve(name)
    except (AssertionError, ImportError):
        return False
    return True


def installed(package):
    return importlib.util.find_spec(package) is not None
