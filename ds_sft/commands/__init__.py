"""One file per `ds-sft` command."""
