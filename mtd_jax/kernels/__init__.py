"""Kernels of the package's own, for CPUs, where XLA's leave the hardware idle.

`few_rows` multiplies a few rows with a large matrix. It is C++, compiled on the machine where it is
first used (`library`); without a C++ compiler XLA's own product is taken, and nothing else changes.
"""
