"""A file for each package: its ``WAYS`` to run a linear layer."""
