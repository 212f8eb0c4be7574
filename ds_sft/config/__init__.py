"""What a run is asked to do: its keys, from YAML and flags, and the rules they keep."""
