"""Benchmarks of randlora: what it costs, and against what.

Every question is a script of its own: ``python -m bench bases --quick`` and ``python bench/bases.py --quick`` are the
same. Results go to ``bench/results/<machine>/``.
"""

import argparse
import ast
import importlib

from bench import ROOT

QUESTIONS = (
    "bases",
    "unique_base",
    "linear",
    "kinds",
    "model",
    "generate",
    "host",
    "memory",
    "fit",
    "scaling",
    "export",
    "experts",
    "quantized",
)
LONG = ("quality", "settings")  # hours on a CPU: not among what `make bench` runs
COMMANDS = (*QUESTIONS, *LONG, "correct", "kernels", "launches", "gpu", "plots", "report")


def summary(name: str) -> str:
    """The first line of a script's docstring, read without running it."""
    path = ROOT / "bench" / name
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]


def main() -> int:
    listing = "\n".join(f"  {name:12} {summary(name)}" for name in COMMANDS)
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog=f"questions:\n{listing}\n\n`python -m bench <question> --help` lists its options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("question", choices=COMMANDS, metavar="question", help=", ".join(COMMANDS))
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of the question")
    arguments = parser.parse_args()
    return importlib.import_module(f"bench.{arguments.question}").main(arguments.options)


if __name__ == "__main__":
    raise SystemExit(main())
