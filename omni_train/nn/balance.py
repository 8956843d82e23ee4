"""Expert load balancing over the global batch, the same in every parallel layout.

The auxiliary loss of the Switch Transformer (Fedus et al. 2021, section 2.2), E·Σᵢ fᵢ·Pᵢ, needs fᵢ, the fraction of the
batch routed to expert i. Qwen balances over the *global* batch ("Demons in the Detail", Qiu et al. 2025), which no rank
knows while it computes its micro-batch. fᵢ only scales the gradient of Pᵢ, so each step takes fᵢ from the global batch
of the step before: exact counts, no communication inside the layers, and nothing that depends on how rows are divided
among ranks and micro-batches. The first step starts from even load, where the loss has no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter

from omni_train import platform
from omni_train.nn.recompute import recomputing


class _AttachLoss(torch.autograd.Function):
    """Passes `value` through, and gives `loss` a gradient of one."""

    @staticmethod
    def forward(ctx, value, loss):
        ctx.save_for_backward(loss)
        return value

    @staticmethod
    def backward(ctx, grad):
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


class BalancedRouter(TopKRouter):
    """Top-k router: softmax in fp32 over all experts, top-k, renormalised, with the auxiliary loss above.

    Padding tokens are routed but neither counted nor balanced. Call :func:`begin_step` before and :func:`end_step`
    after the micro-batches of each optimizer step.
    """

    def __init__(self, config, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        experts, device = config.num_moe_experts, self.weight.device
        # fᵢ·E of the last global batch: 1 for an expert with its even share.
        self.register_buffer("load", torch.ones(experts, dtype=torch.float32, device=device))
        self.register_buffer("counts", torch.zeros(experts, dtype=torch.float32, device=device), persistent=False)
        self.register_buffer("mean_probs", torch.zeros(experts, dtype=torch.float32, device=device), persistent=False)
        self.coefficient = config.moe_aux_loss_coeff
        self.step_tokens = 1.0

    def routing(self, logits, padding_mask=None):
        """Routing probabilities and chosen experts.

        Args:
            logits: (tokens, 1, experts).
            padding_mask: True at padding, as many elements as tokens; None without padding.

        Returns:
            probabilities, 0 where not chosen, and the boolean routing map, both (tokens, experts).
        """
        logits = logits.view(-1, self.config.num_moe_experts)
        probs, chosen = topk_routing_with_score_function(
            logits, self.topk, use_pre_softmax=False, score_function="softmax"
        )
        if self.training and torch.is_grad_enabled():
            real = None if padding_mask is None else ~padding_mask.reshape(-1, 1)
            scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
            scores = (scores if real is None else scores * real).sum(0) / self.step_tokens
            if not recomputing():
                with torch.no_grad():
                    self.counts += (chosen if real is None else chosen & real).sum(0)
                    self.mean_probs += scores
            if self.coefficient:
                probs = _AttachLoss.apply(probs, self.coefficient * (self.load * scores).sum())
        return probs, chosen


def routers(model: torch.nn.Module) -> list[BalancedRouter]:
    """Routers of a model chunk, in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, BalancedRouter)]


def begin_step(chunks: Iterable[torch.nn.Module], step_tokens: float) -> None:
    """Reset the routers' counts before the micro-batches of one optimizer step.

    Args:
        chunks: this rank's model chunks.
        step_tokens: tokens of the global batch that are not padding.
    """
    for chunk in chunks:
        for router in routers(chunk):
            router.step_tokens = step_tokens
            router.counts.zero_()
            router.mean_probs.zero_()


def loads(chunks: Iterable[torch.nn.Module], pipeline_group) -> dict[int, list[float]]:
    """Load of every expert in the last global batch, by MoE layer of the model. Collective.

    Args:
        chunks: this rank's model chunks.
        pipeline_group: the pipeline ranks.

    Returns:
        number of the layer in the pattern, from 1 (negative for a multi-token-prediction layer) -> load of each expert,
        1 being an even share.
    """
    mine = {
        (-router.layer_number if router.is_mtp_layer else router.layer_number): router.load.tolist()
        for chunk in chunks
        for router in routers(chunk)
    }
    everywhere: list = [None] * pipeline_group.size()
    torch.distributed.all_gather_object(everywhere, mine, group=pipeline_group)
    return {layer: load for part in everywhere for layer, load in sorted(part.items())}


def end_step(chunks: Iterable[torch.nn.Module], group, pipeline_group, keep: bool = True) -> dict[str, float]:
    """Sum the step's counts over the ranks that share the layers, and set the load of the next step. Collective.

    Args:
        chunks: this rank's model chunks.
        group: the tensor, context and data-parallel ranks.
        pipeline_group: the pipeline ranks.
        keep: False for a skipped step, whose counts the next step does not use.

    Returns:
        ``aux_loss``: E·Σ fᵢ·Pᵢ of this batch, mean over the layers (1 at perfect balance); ``expert_load_max`` and
        ``expert_load_min``: highest and lowest load of an expert, 1 being an even share. Empty without MoE layers.
    """
    mine = [router for chunk in chunks for router in routers(chunk)]
    sums = torch.zeros(2, device=platform.device())
    extremes = torch.tensor([0.0, -float("inf")], device=sums.device)
    if mine:
        stacked = torch.stack([torch.stack([router.counts, router.mean_probs]) for router in mine])
        torch.distributed.all_reduce(stacked, group=group)
        counts, mean_probs = stacked[:, 0], stacked[:, 1]
        load = counts * (counts.shape[1] / counts.sum(1, keepdim=True).clamp(min=1))
        if keep:
            for router, value in zip(mine, load, strict=True):
                router.load.copy_(value)
        sums = torch.stack([(load * mean_probs).sum(), torch.tensor(float(len(mine)), device=sums.device)])
        extremes = torch.stack([load.max(), -load.min()])
    torch.distributed.all_reduce(sums, group=pipeline_group)
    torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX, group=pipeline_group)
    if not sums[1]:
        return {}
    return {
        "aux_loss": float(sums[0] / sums[1]),
        "expert_load_max": float(extremes[0]),
        "expert_load_min": -float(extremes[1]),
    }
