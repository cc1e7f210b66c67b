"""A call and a config that estimates are made for."""

from helpers.models import IDS
from randlora import RandLoraConfig

TOKENS = IDS.numel()
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def config(**settings):
    return RandLoraConfig(**{"r": 4, "target_modules": TARGETS} | settings)
