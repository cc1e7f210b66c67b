"""What a call costs by each strategy, for every form of bases; the planner compares."""
