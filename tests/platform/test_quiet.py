"""Importing Megatron says nothing, and other warnings still get through."""

from __future__ import annotations

import subprocess
import sys

MEGATRON = """
import megatron.core.distributed
import megatron.core.dist_checkpointing
import megatron.core.hyper_comm_grid
import megatron.core.models.hybrid.hybrid_model
import megatron.core.optimizer
import megatron.core.pipeline_parallel
import megatron.core.ssm.gated_delta_net
"""


def stderr_of(program: str) -> str:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout == ""
    return result.stderr


def test_importing_megatron_after_quiet_prints_nothing():
    assert stderr_of(f"from omni_train.platform.quiet import quiet\nquiet()\n{MEGATRON}") == ""


def test_other_warnings_and_log_records_are_still_shown():
    shown = stderr_of(
        "import logging, warnings\n"
        "from omni_train.platform.quiet import quiet\n"
        "quiet()\n"
        "quiet()\n"
        "warnings.warn('Apex is not what it was')\n"
        "warnings.warn('Apex is not installed. Falling back to Torch Norm', RuntimeWarning)\n"
        "warnings.warn('Apex is not installed. Falling back to Torch Norm')\n"
        "logging.getLogger('torch.utils.cpp_extension').warning('another matter')\n"
        "logging.getLogger('torch.utils.cpp_extension').warning('No CUDA runtime is found, using CUDA_HOME=/x')\n"
    )
    assert "Apex is not what it was" in shown
    assert shown.count("Falling back to Torch Norm") == 1
    assert "RuntimeWarning" in shown
    assert "another matter" in shown
    assert "CUDA runtime" not in shown
