"""Where a run's curves and answers go: metrics.jsonl, SwanLab, Trainer's own trackers, a user's; rank 0 alone."""
