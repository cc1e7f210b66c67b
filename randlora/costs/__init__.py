"""What a call costs by each strategy, for every form of bases; :mod:`randlora.planner` says why, and compares them."""
