"""What randlora costs, against what is used today: ``python -m bench --help`` lists the questions."""

import importlib.util
import logging
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Python puts the folder it is started in first, where randlora/ has no compiled part unless it was built in place:
# look there last, so that the installed package is what gets measured.
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT] + [str(ROOT)]

for needed in ("matplotlib", "tqdm"):
    if importlib.util.find_spec(needed) is None:
        raise SystemExit(f"bench needs {needed}: pip install '.[bench]'")

# What PEFT and transformers import on the way tells of its parts for other machines, and of what it has to change for
# the next torch: nothing that whoever asks a question here can use.
for package in ("torchao", "bitsandbytes", "torch.utils._pytree"):
    logging.getLogger(package).setLevel(logging.ERROR)
