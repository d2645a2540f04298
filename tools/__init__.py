"""What builds, checks and describes the package, run from a checkout."""
