"""The reference back end: plain PyTorch, bounded by the scratch limit; what correct means."""
