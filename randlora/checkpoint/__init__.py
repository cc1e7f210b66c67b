"""Adapters in files: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, as in PEFT.

Keys are PEFT's: ``base_model.model.<module>.randlora_lambda`` and ``..._gamma``; bases, if they are written at all,
once, as ``base_model.randlora_A`` and ``base_model.randlora_B``. The safetensors metadata repeats the config, says how
the bases are made again, and carries their fingerprint and a SHA-256 of everything else, so that damage is found. What
PEFT would misread (bases that it cannot make, without projections) is written with a ``peft_type`` that it refuses.
Writing (:mod:`.writing`) replaces whole files; reading (:mod:`.reading`) checks everything before a model is changed.
"""
