"""llama.cpp converts the base model and the adapters, whose numbers are compared, and its server runs them."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import load_file
from serving.cases import NEW, Case


def serve(base: Path, cases: list[Case], source: Path) -> dict[str, list[list[int]]]:
    import xllamacpp

    convert(source / "convert_hf_to_gguf.py", base, base.with_suffix(".gguf"))
    adapters = [case for case in cases if case.folder is not None]
    params = xllamacpp.CommonParams()
    params.model.path = str(base.with_suffix(".gguf"))
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 256, 1, False, 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    # Its flash attention computes in 16 bits.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    files = []
    for case in adapters:
        files.append(case.folder.with_suffix(".gguf"))
        convert(source / "convert_lora_to_gguf.py", case.folder, files[-1], "--base", str(base))
        compare(case.folder, files[-1])
        if json.loads((case.folder / "adapter_config.json").read_text())["rank_pattern"]:
            case.servable, case.about = False, case.about + "; to differ, as llama.cpp has no alpha of a layer's own"
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(file), 0.0) for file in files]
    server = xllamacpp.Server(params)
    return {case.name: [ask(server, adapters, case, prompt) for prompt in case.prompts] for case in cases}


def convert(script: Path, folder: Path, file: Path, *options: str) -> None:
    command = [sys.executable, str(script), str(folder), "--outfile", str(file), "--outtype", "f32", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script.name} {folder.name}: {done.stderr}")


def compare(folder: Path, file: Path) -> None:
    """Every tensor of the adapter is in the file of llama.cpp, bit for bit; rows of q and k in the order of its own."""
    import gguf

    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(file).tensors}
    expected = load_file(folder / "adapter_model.safetensors")
    assert len(found) == len(expected), (sorted(found), sorted(expected))
    names = {"self_attn.": "attn_", "mlp.": "ffn_", "_proj": "", "attn_o": "attn_output"}
    for name, tensor in expected.items():
        theirs = name.removeprefix("base_model.model.model.layers.").replace(".lora_A.weight", ".weight.lora_a")
        theirs = "blk." + theirs.replace(".lora_B.weight", ".weight.lora_b")
        for old, new in names.items():
            theirs = theirs.replace(old, new)
        got = found[theirs]
        if theirs.endswith(("attn_q.weight.lora_b", "attn_k.weight.lora_b")):
            got, tensor = got.unique(dim=0), tensor.unique(dim=0)
        assert torch.equal(got, tensor), name


def ask(server: object, adapters: list[Case], case: Case, prompt: list[int]) -> list[int]:
    body = {
        "prompt": prompt, "n_predict": NEW, "temperature": 0, "ignore_eos": True, "return_tokens": True,
        "cache_prompt": False, "lora": [{"id": i, "scale": float(one is case)} for i, one in enumerate(adapters)],
    }  # fmt: skip
    address = f"{server.listening_address}/completion"
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["tokens"]
