"""How it is learned: the model, the loss, the Trainer."""
