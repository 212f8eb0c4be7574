"""How good a model's answers are: its loss, its answers beside the data's, and how sure the numbers are."""
