"""What a run goes on from: checkpoints that are complete or do not exist, and the folder they are in."""
