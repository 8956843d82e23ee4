"""DeepSpeed around one network: its configuration, and what of its global state a run must put in order."""

from __future__ import annotations

import logging
import math
import os

import torch

from omni_train import platform
from omni_train.recipe.schema import Precision, Recipe

ELEMENTS_AT_ONCE = 200_000_000
"""Gradients or parameters in one collective, at most; buffers of this size are kept."""


def import_deepspeed():
    """DeepSpeed, on the device that the platform computes on, joined to the process groups that exist."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if platform.has_cuda() else "cpu")
    os.environ.setdefault("LOCAL_RANK", str(platform.local_rank()))  # it insists, also on a lone process
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo does, and needs no compiler
    forget_groups()
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), dist_init_required=False, verbose=False)
    return deepspeed


def forget_groups() -> None:
    """Let DeepSpeed forget the process groups of a run, which end with it, and their threads with them.

    It also counts parameters anew, whose numbers must be the same on all ranks, whatever ran on some of them before.
    """
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    Init.param_id = 0
    deepspeed.comm.comm.cdb = None
    for name, value in list(vars(groups).items()):
        if name.startswith("_") and isinstance(value, torch.distributed.ProcessGroup | dict | list):
            setattr(groups, name, type(value)() if isinstance(value, dict | list) else None)


class AdamW(torch.optim.AdamW):
    """Where ZeRO shares nothing (stage 0): clips and guards as its own optimizers do at the other stages.

    DeepSpeed reads `overflow` and `_global_grad_norm` of whatever optimizer it steps.
    """

    def __init__(self, groups: list[dict], clip_grad: float, **options) -> None:
        super().__init__(groups, **options)
        self.clip_grad, self.overflow, self._global_grad_norm = clip_grad, False, 0.0

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update, unless a gradient is not finite."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms = torch.stack([gradient.float().norm() for gradient in gradients])
        self._global_grad_norm = float(norms.norm())
        self.overflow = not math.isfinite(self._global_grad_norm)
        if self.overflow:
            return
        if 0.0 < self.clip_grad < self._global_grad_norm:
            torch._foreach_mul_(gradients, self.clip_grad / (self._global_grad_norm + 1e-6))
        super().step()


def wrap(deepspeed, recipe: Recipe, module: torch.nn.Module, groups: list[dict]):
    """A network with its optimizer in DeepSpeed's hands, sharded as the recipe says.

    Args:
        deepspeed: from :func:`import_deepspeed`.
        module: the same on every rank.
        groups: the optimizer's parameter groups.

    Returns:
        DeepSpeed's engine: call it for the forward pass, `backward` as often as wanted, then `step`.
    """
    config, optimizer = recipe.zero, recipe.optimizer
    options = dict(lr=optimizer.lr, betas=tuple(optimizer.betas), eps=optimizer.eps, weight_decay=0.0)
    if config.stage == 0:
        adamw = AdamW(groups, optimizer.clip_grad, fused=True, **options)
    elif config.offload_optimizer and platform.has_cuda():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        adamw = DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    else:
        adamw = torch.optim.AdamW(groups, fused=True, **options)
    elements = min(ELEMENTS_AT_ONCE, sum(parameter.numel() for parameter in module.parameters()))
    elements = -(-elements // 16) * 16  # it wants them aligned
    zero = {
        "stage": config.stage,
        "reduce_bucket_size": elements,
        "allgather_bucket_size": elements,
        "stage3_prefetch_bucket_size": elements,
        "stage3_param_persistence_threshold": config.whole_below,
        "overlap_comm": platform.has_cuda() and config.stage >= 2,  # DeepSpeed has none below, with our boundaries
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": platform.has_cuda()}
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=adamw,
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "managed_gradient_accumulation": False,  # our steps are the boundaries
            "gradient_clipping": optimizer.clip_grad if config.stage else 0.0,
            "bf16": {"enabled": recipe.precision is Precision.bf16},
            "data_types": {"grad_accum_dtype": "fp32"},  # its default adds bf16 gradients in bf16
            "communication_data_type": "fp32",
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
        },
    )
    return engine


def spoil(engine) -> None:
    """Make the next step of an engine one that DeepSpeed skips, and whose gradients it drops. Collective.

    All networks of a task step, or none: where one's gradient is no number, neither is any other's.
    """
    import deepspeed

    parameter = next(parameter for parameter in engine.module.parameters() if parameter.requires_grad)
    with deepspeed.zero.GatheredParameters([parameter]):
        engine.backward((parameter * math.nan).sum(), scale_wrt_gas=False)
