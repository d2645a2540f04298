"""Everything that needs a GPU, in one command of known length; ``make gpu-check`` runs it."""
