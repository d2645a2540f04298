"""The reference back end: plain PyTorch within the scratch limit; naive.py says what is right."""
