"""The vendor back end: weights unpacked within scratch, products by cuBLAS and cuDNN."""
