"""Checks on a real GPU: every path that only a GPU takes, against the CPU's numbers, with its speed.

One command for a machine that has a GPU, PyTorch and nothing else: ``make gpu-check``. Results are written as soon as
they are found, so that those of a machine that is taken away are kept. Without a GPU the parts run as far as
they can, flash-linear-attention's kernels under Triton's interpreter among them, and say what they left out.
"""
