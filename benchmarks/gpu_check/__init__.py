"""Proof on a real GPU: every path that only a GPU takes, against the CPU's numbers, and what it is worth in speed.

One command for a machine that has a GPU, PyTorch and nothing else: ``make gpu-check``. What a part finds is written as
soon as it is found, so that a machine that is taken away leaves what was done. Without a GPU the parts run as far as
they can, flash-linear-attention's kernels under Triton's interpreter among them, and say what they left out.
"""
