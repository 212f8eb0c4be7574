"""Who takes part in a run: ranks and nodes, what they tell each other, when they stop and how they end."""
