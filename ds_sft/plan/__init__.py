"""What a run will need, from its configuration alone: memory, disk, communication, time."""
