"""The steps of gpu.sh: what each of its calls runs, in which order, and how long it may take.

`expected` is how long a step should take on an H100, start of the interpreter included: the sum of a call is below
that call's :data:`CALL_SECONDS`, and nothing begins or goes on beyond that. On "cpu" the same commands get tiny sizes.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path

from bench import ROOT

# Of six minutes, for "quality" of seven and a half; the rest is for stopping what still runs, and for the table.
CALL_SECONDS = {"correct": 335, "deep": 335, "quality": 420, "forms": 335}
CALLS = tuple(CALL_SECONDS)

COMMON = ("frozen", "PEFT LoRA", "PEFT LoRA, 16-bit", "PEFT RandLoRA", "PEFT RandLoRA, 16-bit", "PyTorch, compiled")
METHODS = "; ".join((*COMMON, "randlora", "randlora very_sparse", "randlora hadamard"))
DECODING = "; ".join((*COMMON, "randlora, not cached", "randlora, cached", "randlora, merged",
                      "randlora hadamard"))  # fmt: skip
LARGE_BATCH = "frozen; PEFT LoRA, 16-bit; randlora; randlora very_sparse; randlora hadamard; PEFT RandLoRA, 16-bit"
NOT_KEPT = "frozen; PEFT LoRA, 16-bit; randlora; randlora, bases not kept"
TO_LORA = ("randlora to_lora, dense; randlora to_lora, hadamard; randlora to_lora, hadamard, num_bases=8; "
           "randlora to_lora, hadamard, num_bases=2, exact")  # fmt: skip
VISION = "frozen; PEFT LoRA; PEFT RandLoRA; PyTorch, compiled; randlora; randlora very_sparse; randlora hadamard"
# Tests for CUDA of what was never on a GPU when the other calls were made.
FIRST_ON_A_GPU = ("bench/test_quality_recorded.py", "layers/test_experts_cuda.py")
NATIVE_TRACES = {"RANDLORA_NATIVE_TRACES": "1"}  # read by tests/conftest.py
KERNEL_METRICS = (
    "gpu__time_duration.sum", "dram__bytes.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed", "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread", "l1tex__data_bank_conflicts_pipe_lsu.sum",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """`command`: arguments of Python. `tool`: a program with its options that Python runs under, on a GPU."""

    name: str
    command: tuple[str, ...]
    expected: int
    limit: int
    tool: tuple[str, ...] = ()
    in_checkout: bool = True
    environment: dict[str, str] = field(default_factory=dict)


class Steps:
    """Builds commands for one device and folder of results."""

    def __init__(self, device: str, results: Path) -> None:
        self.device, self.results, self.tiny = device, results, device == "cpu"

    def bench(self, question: str, full: str, tiny: str = "", **more: str) -> tuple[str, ...]:
        """`full` and `tiny`: options in one string; `more`: options whose values have blanks."""
        options = (tiny if self.tiny else full).split()
        for name, value in more.items():
            options += [f"--{name}", value]
        return ("-m", "bench", question, *options, "--device", self.device, "--results", str(self.results))

    def pytest(self, *selected: str) -> tuple[str, ...]:
        config = ("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT))
        plugins = ("-p", "no:cacheprovider", "-p", "no:faulthandler")  # NATIVE_TRACES instead
        # -v: a run that is cut off has said which tests failed.
        return ("-m", "pytest", "-m", "cuda", "-v", "--tb=short", *plugins, *config, *selected)

    def layer(self, d: int, tokens: int) -> tuple[str, ...]:
        return self.bench(
            "linear", f"--d {d} --tokens {tokens} --dtype bfloat16 --seconds 5 --no-picture",
            "--d 64 --tokens 96 --dtype bfloat16 --quick --seconds 0 --no-picture", methods=METHODS,
        )  # fmt: skip

    def llama(self, question: str, full: str, tiny: str, methods: str) -> tuple[str, ...]:
        """A language model; on a CPU one layer of a tiny one."""
        small = f"--depth 1 --vocab 64 --batch 1 --tokens 8 --dtype bfloat16 {tiny} --quick --seconds 0 --no-picture"
        name = "tiny Llama" if self.tiny else "Llama-3.2-3B"
        return self.bench(question, f"{full} --seconds 5 --no-picture", small, model=name, methods=methods)

    def vision(self, name: str, batch: int, methods: str) -> tuple[str, ...]:
        """With TF32; on a CPU one layer."""
        small = "--depth 1 --batch 1 --tf32 --quick --seconds 0 --no-picture"
        full = f"--batch {batch} --tf32 --seconds 4 --no-picture"
        return self.bench("model", full, small, model=name, methods="frozen" if self.tiny else methods)

    # ---- the first call ----

    def correct(self) -> list[list[Step]]:
        """Groups, one after the other; the steps of a group run beside each other."""
        tests = self.pytest(str(ROOT / "tests/test_cuda.py"), "-k", "bits or synchronises")
        return [
            [
                Step("right", self.bench("correct", "", "--few"), 16, 60),
                Step("tests", tests, 20, 75, in_checkout=False, environment=NATIVE_TRACES),
            ],
            [Step("launches", self.bench("launches", "", "--sizes 64x96"), 22, 60)],
            [Step("layer-4096", self.layer(4096, 8192), 36, 80)],
            [Step("layer-3072", self.layer(3072, 840), 36, 70)],
            [Step("llama", self.llama("model", "", "", METHODS), 80, 125)],
            [Step("decoding", self.llama("generate", "--batch 1 --new 8", "--new 2", DECODING), 65, 120)],
        ]

    # ---- the second call ----

    def sanitizer(self, tool: str, *options: str, **environment: str) -> Step:
        command = (
            "compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--target-processes", "application-only",
            "--launch-timeout", "60", "--kernel-name", "kns=randlora",
        )  # fmt: skip
        few = " ".join(("--few", *options))
        return Step(tool, self.bench("correct", few, few), 25, 60, command, environment=environment)

    def ncu(self) -> Step:
        command = (
            "ncu", "--csv", "--page", "raw", "--clock-control", "none", "--profile-from-start", "off",
            "--kernel-name-base", "demangled", "-k", "regex:randlora", "--metrics", ",".join(KERNEL_METRICS),
            "--log-file", str(self.results / "ncu.csv"),
        )  # fmt: skip
        return Step("ncu", self.bench("kernels", "--ncu", "--ncu --features 256"), 22, 50, command)

    def deep(self) -> list[list[Step]]:
        together = ("-n", str(max(1, min(6, (os.cpu_count() or 1) // 2)))) if importlib.util.find_spec("xdist") else ()
        tests = self.pytest(str(ROOT / ("tests/test_cuda.py" if self.tiny else "tests")), *together)
        return [
            [
                self.sanitizer("memcheck", PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
                # cuBLAS's kernels for clusters of blocks end in an illegal access under racecheck.
                self.sanitizer("racecheck", "--no-layers"),
                Step("tests", tests, 80, 110, in_checkout=False, environment=NATIVE_TRACES),
            ],
            [Step("kernels", self.bench("kernels", "", "--features 256"), 9, 30)],
            [Step("all-linear", self.llama("model", "--targets all-linear --batch 8 --tokens 1024",
                                           "--targets all-linear", LARGE_BATCH), 75, 115)],
            [Step("vit", self.vision("ViT-B/32", 128, VISION), 42, 65)],
            [self.ncu()],
            # 128 images, as published, take more than 80 GB.
            [Step("clip", self.vision("CLIP ViT-L/14", 32, "frozen; PEFT LoRA; randlora; randlora hadamard"), 35, 65)],
            [Step("bases", self.bench("bases", "--seconds 1 --no-picture", "--quick --seconds 0 --no-picture",
                                      only="dense float32" if self.tiny else "bases"), 29, 45)],
            [Step("unique-base", self.bench("unique_base", "--quick --seconds 1 --no-picture",
                                            "--quick --seconds 0 --no-picture", only=self.unique_base_sizes), 28, 45)],
        ]  # fmt: skip

    @property
    def unique_base_sizes(self) -> str:
        return "32 x 24 x 768" if self.tiny else "32 x 128 x 4096"

    # ---- the third call ----

    def quality(self) -> list[list[Step]]:
        """What it needs of data and models lies in .gpu/quality: ``python -m bench quality --prepare .gpu/quality``."""
        cache = "--cache .gpu/quality"
        tiny = f"--tasks tiny --jobs 2 --tries 2 --seeds 1 --no-timing --no-picture {cache}"
        few = {"methods": "full fine-tuning;dense r=32"} if self.tiny else {}
        return [
            [Step("settings", self.bench("settings", f"--selection gpu --jobs 10 --seconds-limit 90 {cache}", "--help"),
                  105, 130)],
            [Step("quality", self.bench("quality", f"--jobs 12 --seconds-limit 280 {cache}", tiny, **few), 295, 330)],
        ]  # fmt: skip

    # ---- the fourth call ----

    def forms(self) -> list[list[Step]]:
        """Layers and files in other forms than the other calls have. A package that quantises may be missing."""
        kept = self.bench(
            "linear", "--d 4096 --tokens 8192,1024 --dtype bfloat16 --seconds 5 --no-picture",
            "--d 64 --tokens 96,24 --dtype bfloat16 --quick --seconds 0 --no-picture", methods=NOT_KEPT,
        )  # fmt: skip
        experts = self.bench("experts", "--seconds 4 --no-picture", "--tiny --quick --seconds 0 --no-picture")
        quantized = self.bench("quantized", "--seconds 1.5 --no-picture",
                               "--d 128 --tokens 24 --quick --seconds 0 --no-picture")  # fmt: skip
        # The SVD of all of 4096 x 4096, which PEFT takes, is too long for a call.
        with_peft = self.bench("export", "--dim 2048 --quick --seconds 0 --no-picture",
                               "--dim 80 --quick --seconds 0 --no-picture")  # fmt: skip
        large = self.bench("export", "--dim 4096 --quick --seconds 0 --no-picture",
                           "--dim 96 --quick --seconds 0 --no-picture", methods=TO_LORA)  # fmt: skip
        tests = self.pytest(*(str(ROOT / "tests" / path) for path in FIRST_ON_A_GPU))
        return [
            [Step("not-kept", kept, 28, 60)],
            [Step("experts", experts, 90, 120)],
            [Step("quantized", quantized, 42, 80)],
            [Step("export", with_peft, 36, 70)],
            [Step("export-4096", large, 34, 65)],
            [Step("tests", tests, 70, 95, in_checkout=False, environment=NATIVE_TRACES)],
        ]


def steps(call: str, device: str, results: Path) -> list[list[Step]]:
    return getattr(Steps(device, results), call)()
