"""Programs that use rpg-kernels, run from a checkout."""
