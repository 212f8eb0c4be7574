"""How it is learned: the arguments, the Trainer, its optimizers, what is measured and shown."""
