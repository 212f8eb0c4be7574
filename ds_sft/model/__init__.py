"""What is put into a model: its loading, attention, loss, copies, fused parts, adapters."""
