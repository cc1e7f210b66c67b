"""A suggestion as plain text: the table of candidates, the evidence, and a configuration to paste."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from ..tables import aligned
from .candidates import Candidate, Targets
from .evidence import Row
from .prices import amount

WIDTH = 100


def table(candidates: Sequence[Candidate], chosen: Candidate) -> str:
    """A block for each group of layers; `chosen` is marked. Without any evidence there is no column for it."""
    tasks = max(len(c.gains) for c in candidates)
    blocks = []
    for targets in dict.fromkeys(c.targets for c in candidates):
        group = [c for c in candidates if c.targets == targets]
        layers = f"{group[0].layers} layer{'s' * (group[0].layers != 1)}"
        rows = [[f"{targets}: {layers}", "trained", "memory, MiB", "step", "file, MiB"]]
        rows[0] += ["gain", ""] if tasks else [""]
        for c in group:
            row = [
                c.method, f"{c.trainable_parameters:,}", amount(c.memory_bytes), f"{c.step:.2f}x", amount(c.file_bytes)
            ]  # fmt: skip
            row += [_gain(c, tasks)] if tasks else []
            rows.append([*row, "<- suggested" if c == chosen else ""])
        blocks.append("\n".join(aligned(rows, left=1, words=len(rows[0]) - 1)))
    return "\n\n".join(blocks)


def _gain(candidate: Candidate, tasks: int) -> str:
    """`tasks`: the most on which a candidate was measured."""
    if candidate.gain is None:
        return "-"
    of = len(candidate.gains)
    return f"{candidate.gain:.0%}" + (f" ({of} task{'s' * (of > 1)})" if of < tasks else "")


def evidence_table(rows: Sequence[Row]) -> str:
    """A line for each method, the baselines first, with a score and a learning rate in the columns of each task.

    Tasks that do not fit beside each other are below each other, with the methods that each was measured for.
    """
    groups: list[list[str]] = []
    for task in dict.fromkeys(row.task for row in rows):
        if groups and max(map(len, _evidence(rows, [*groups[-1], task]))) <= WIDTH:
            groups[-1].append(task)
        else:
            groups.append([task])
    blocks = ["\n".join(_evidence(rows, group)) for group in groups]
    sources = " ".join(dict.fromkeys(row.source for row in rows))
    return "\n\n".join(blocks) + "\n" + wrapped(f"(means over seeds and their spread; {sources})")


def _evidence(rows: Sequence[Row], tasks: Sequence[str]) -> list[str]:
    rows = [row for row in rows if row.task in tasks]
    scores = {(row.task, row.method): row for row in rows}
    order = sorted({row.method: row for row in rows}.values(), key=lambda row: not row.baseline)
    cells = [["measured on all linear layers"]]
    for task in tasks:
        cells[0] += [f"{task}: {next(row.metric for row in rows if row.task == task)}", "lr"]
    for method in (row.method for row in order):
        line = [method]
        for task in tasks:
            found = scores.get((task, method))
            spread = "" if found is None or found.spread is None else f" +- {found.spread:.1g}"
            score = "" if found is None else "diverged" if found.score is None else f"{found.score:.4g}{spread}"
            line.append(score)
            line.append("" if found is None or found.rate is None else f"{found.rate:.2g}")
        cells.append(line)
    return list(aligned(cells, left=1))


def code(kind: str, r: int, targets: Targets, alpha: float, lr: float) -> str:
    """Python that adapts a ``model`` so, and makes an optimizer for it."""
    arguments = [f"kind={kind!r}", f"r={r}", "randlora_alpha='auto'", f"target_modules={_plain(targets.modules)}"]
    if targets.parameters:
        arguments.append(f"target_parameters={_plain(targets.parameters)}")
    config = f"config = randlora.RandLoraConfig({', '.join(arguments)})"
    if len(config) > WIDTH:
        config = f"config = randlora.RandLoraConfig(\n    {', '.join(arguments)}\n)"
    config = config.replace("'", '"')  # as most Python is formatted
    return "\n".join([
        "import randlora, torch", "", f"# randlora_alpha comes to {alpha:g} for this model", config,
        "model = randlora.get_peft_model(model, config)",
        f"optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr={lr:g})",
    ])  # fmt: skip


def wrapped(words: str, first: str = "") -> str:
    """Lines of a page's width, of which the first begins with `first`, and the others with as many spaces."""
    return textwrap.fill(words, WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False)


def _plain(names: tuple[str, ...] | str | None) -> str:
    return repr(list(names) if isinstance(names, tuple) else names)
