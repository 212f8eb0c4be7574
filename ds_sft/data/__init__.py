"""What is learned from: rows of files become masked token sequences in batches."""
