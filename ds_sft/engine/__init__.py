"""DeepSpeed: which configuration of it a run uses, what it compiles, what it holds and gives back."""
