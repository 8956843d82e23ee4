"""Peak FLOP/s of known GPUs, for model FLOPs utilisation."""

from __future__ import annotations

import torch

from omni_train.platform.device import has_cuda

# Dense bf16 FLOP/s by the vendor's data sheets, matched in this order against the device's name.
_BF16 = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
}


def peak_flops() -> float | None:
    """Peak dense bf16 FLOP/s of this process's GPU; None of an unknown one, or a CPU."""
    if not has_cuda():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _BF16.items() if part in name), None)
