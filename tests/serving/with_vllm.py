"""vLLM serves the base model and all adapters side by side, each prompt with an adapter of its own."""

from __future__ import annotations

import os
from pathlib import Path

from serving.cases import NEW, Case

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

# In this process, with little memory, and nothing is asked of the network.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1"
)


def serve(base: Path, cases: list[Case]) -> dict[str, list[list[int]]]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    largest = max(case.rank for case in cases)
    server = LLM(
        str(base),
        dtype="float32",
        enable_lora=True,
        max_lora_rank=next(rank for rank in RANKS if rank >= largest),
        max_loras=len(cases),
        max_model_len=128,
        enforce_eager=True,
        skip_tokenizer_init=True,
    )
    requests = [
        None if case.folder is None else LoRARequest(case.name, i, str(case.folder)) for i, case in enumerate(cases)
    ]
    # All in one batch: a prompt of each case in turn.
    order = [(i, k) for k in range(len(cases[0].prompts)) for i in range(len(cases))]
    outputs = server.generate(
        [{"prompt_token_ids": cases[i].prompts[k]} for i, k in order],
        SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False),
        lora_request=[requests[i] for i, _ in order],
        use_tqdm=False,
    )
    found: dict[str, list[list[int]]] = {case.name: [] for case in cases}
    for (i, _), output in zip(order, outputs, strict=True):
        found[cases[i].name].append(list(output.outputs[0].token_ids))
    return found
