"""Where it runs: ranks and nodes, DeepSpeed, the files a run leaves."""
