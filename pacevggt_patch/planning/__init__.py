"""When pruning pays, and which keep ratio fits a budget."""
