"""accelerate within the kept processes of a test: its states are dropped afterwards, and its FSDP works on CPUs."""

import argparse
import contextlib
import os
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "accelerate"


def environment(config):
    """What ``accelerate launch`` tells a script of a config file."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch.launch_command_parser().parse_args(["--config_file", str(CONFIGS / config), "train.py"])
    arguments, *_ = launch._validate_launch_command(arguments)
    told = prepare_multi_gpu_env(argparse.Namespace(**vars(arguments)))
    return {name: value for name, value in told.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


@contextlib.contextmanager
def on_cpus(told):
    """A script's surroundings as :func:`environment` tells. FSDP, which accelerate leaves out on CPUs, is not here."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    plain, before = AcceleratorState.__init__, dict(os.environ)

    def init(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init
    os.environ.update(told, ACCELERATE_USE_CPU="true")
    AcceleratorState._reset_state(True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(True)
        AcceleratorState.__init__ = plain
        os.environ.clear()
        os.environ.update(before)
