"""The commands of ``python -m randlora``, one module each: its options, and what it does."""
