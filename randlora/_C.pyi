"""The compiled module, csrc/python.cpp. Its operators are in randlora.ops.calls."""

UNPACKED_BYTES: int

def build_info() -> dict[str, str]: ...
