"""Many workers on one store: which block is whose, and who runs it."""
