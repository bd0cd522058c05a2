"""Quantization by torchao: schemes, conversion, weights folders, and the int8 product on a CPU."""
