"""What a run leaves for others: final weights, verified; merged, answering, pushed."""
