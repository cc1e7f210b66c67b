"""What is each method worth? Accuracy, forgetting, trained numbers and seconds on real tasks, tuned alike.

A method's learning rate is picked on validation data, with as many tries for each method; then it is trained with
several seeds and looked at on test data. Everything is offline: what the tasks are made of lies on the machine
(:mod:`bench.quality.tasks`). Results: ``bench/results/<machine>/quality.csv`` and pictures beside it.
"""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    from bench.quality.cli import main

    return main(argv)
