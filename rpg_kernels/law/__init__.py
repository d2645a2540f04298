"""The packing laws: which bank element, with which sign, every virtual weight reads."""
