"""DeepSpeed around one network: its configuration, and the global state of it that a run must reset."""

from __future__ import annotations

import logging
import math
import os
from typing import Any

import torch

from omni_train import platform
from omni_train.recipe.schema import Precision, Recipe

ELEMENTS_AT_ONCE = 200_000_000
"""Most gradients or parameters in one collective; buffers of this size are kept."""


def import_deepspeed() -> Any:
    """The module ``deepspeed``, set to the platform's device and joined to the process groups that exist."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if platform.has_cuda() else "cpu")
    os.environ.setdefault("LOCAL_RANK", str(platform.local_rank()))  # DeepSpeed needs it, also in a lone process
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo is used instead, and needs no compiler
    forget_groups()
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), dist_init_required=False, verbose=False)
    return deepspeed


def forget_groups() -> None:
    """Let DeepSpeed forget the process groups of a run, so that they and their threads can end with it.

    It also numbers parameters from 0 again: the numbers must agree on all ranks, whatever ran on some of them before.
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
    """AdamW for ZeRO stage 0 that clips gradients and skips non-finite ones, as ZeRO's own optimizers do from stage 1.

    DeepSpeed reads `overflow` and `_global_grad_norm` of whatever optimizer it steps.
    """

    def __init__(self, groups: list[dict], clip_grad: float, **options: Any) -> None:
        super().__init__(groups, **options)
        self.clip_grad, self.overflow, self._global_grad_norm = clip_grad, False, 0.0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody hands in a closure
        """Update every parameter, unless a gradient is not finite."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms = torch.stack([gradient.float().norm() for gradient in gradients])
        self._global_grad_norm = float(norms.norm())
        self.overflow = not math.isfinite(self._global_grad_norm)
        if self.overflow:
            return
        if 0.0 < self.clip_grad < self._global_grad_norm:
            torch._foreach_mul_(gradients, self.clip_grad / (self._global_grad_norm + 1e-6))
        super().step()


def wrap(deepspeed: Any, recipe: Recipe, module: torch.nn.Module, groups: list[dict]) -> Any:
    """DeepSpeed's engine of a network with its optimizer, sharded as the recipe says.

    Args:
        deepspeed: the module, from :func:`import_deepspeed`.
        recipe: a validated recipe.
        module: the network, with equal parameters on every rank.
        groups: parameter groups of the optimizer.

    Returns:
        the engine: call it for the forward pass, `backward` as often as wanted, then `step`.
    """
    config, optimizer = recipe.zero, recipe.optimizer
    options: dict[str, Any] = dict(lr=optimizer.lr, betas=tuple(optimizer.betas), eps=optimizer.eps, weight_decay=0.0)
    adamw: torch.optim.Optimizer
    if config.stage == 0:
        adamw = AdamW(groups, optimizer.clip_grad, fused=True, **options)
    elif config.offload_optimizer and platform.has_cuda():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        adamw = DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    else:
        adamw = torch.optim.AdamW(groups, fused=True, **options)
    elements = min(ELEMENTS_AT_ONCE, sum(parameter.numel() for parameter in module.parameters()))
    elements = -(-elements // 16) * 16  # it wants them aligned
    zero: dict[str, Any] = {
        "stage": config.stage,
        "reduce_bucket_size": elements,
        "allgather_bucket_size": elements,
        "stage3_prefetch_bucket_size": elements,
        "stage3_param_persistence_threshold": config.whole_below,
        "overlap_comm": platform.has_cuda() and config.stage >= 2,  # below stage 2 it does not overlap
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


def skip_next_step(engine: Any) -> None:
    """Make DeepSpeed skip the next step of an engine and drop its gradients. Collective.

    All networks of an objective step, or none: where the gradient of one is not finite, the others are skipped too.
    """
    import deepspeed

    parameter = next(parameter for parameter in engine.module.parameters() if parameter.requires_grad)
    with deepspeed.zero.GatheredParameters([parameter]):
        engine.backward((parameter * math.nan).sum(), scale_wrt_gas=False)
