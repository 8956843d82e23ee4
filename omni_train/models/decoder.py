"""A pipeline stage of a decoder-only network: its part of the hybrid stack, rotary ids, the norm behind the last."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.process_groups_config import ProcessGroupCollection

from omni_train import platform
from omni_train.models.config import split_pattern
from omni_train.models.stage import PipelineStage
from omni_train.nn.backend import backend
from omni_train.nn.rotary import TMRotaryEmbedding
from omni_train.recipe.schema import ParallelConfig, StackConfig


class DecoderStage(PipelineStage):
    """The part of a decoder-only network that one pipeline stage, or virtual stage, computes; mixed into a module of
    Megatron's, which calls :meth:`set_stage` and then, where its layers come in the order of parameters,
    :meth:`add_stack`.
    """

    decoder: HybridStack

    def set_stage(self, stack: StackConfig, parallel: ParallelConfig, stage: int, virtual_stage: int | None) -> None:
        """Say which part of the network this is.

        Args:
            stack: the layers.
            parallel: layout.
            stage: index of this part in the order of the model, from 0 to pipeline·virtual_pipeline − 1.
            virtual_stage: index among this rank's parts, None without virtual pipelining.
        """
        self.segments, self.stage = split_pattern(stack, parallel), stage
        self.vp_stage = virtual_stage
        self.pre_process, self.post_process = stage == 0, stage == len(self.segments) - 1

    def add_stack(
        self, stack: StackConfig, submodules, groups: ProcessGroupCollection, final_norm: bool = True
    ) -> None:
        """Add this part's layers and, on the last stage, the final norm.

        Args:
            stack: the layers.
            submodules: specs of the layers.
            groups: process groups.
            final_norm: whether the last stage has one.
        """
        self.rotary = TMRotaryEmbedding(
            rotary_dim=int(stack.head_dim * stack.partial_rotary_factor),
            base=stack.rope_theta,
            sections=stack.mrope_section,
        )
        self.decoder = HybridStack(
            self.config,
            submodules,
            pre_process=self.pre_process,
            layer_type_list=list(self.segments[self.stage]),
            pp_layer_offset=sum(len(segment) for segment in self.segments[: self.stage]),
            post_layer_norm=False,  # the stock final norm needs Transformer Engine
            post_process=self.post_process,
            pg_collection=groups,
        )
        if self.post_process and final_norm:
            self.final_norm = backend().norm(
                config=self.config, hidden_size=self.config.hidden_size, eps=self.config.layernorm_epsilon
            )

    def run_stack(self, hidden: torch.Tensor | None, position_ids: torch.Tensor, packed, padding: torch.Tensor):
        """Output of this part's layers, (S, 1, H).

        Args:
            hidden: (S, 1, H) embeddings; None on later stages, which have received theirs.
            position_ids: (3, T) rotary ids.
            packed: boundaries of the sequences in the whole row, or a decoding state.
            padding: (S,) bool.
        """
        return self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=self.rotary(position_ids),
            packed_seq_params=packed,
            padding_mask=padding[None],
        )

    def set_input_tensor(self, input_tensor) -> None:
        """Set the input of this stage to the output of the stage before, as Megatron's schedules do."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def global_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """See :class:`PipelineStage`."""
        for name, parameter in self.named_parameters():
            words = name.split(".")
            if words[:2] == ["decoder", "layers"]:
                words[2] = str(self.decoder.layers[int(words[2])].layer_number - 1)
            yield ".".join(words), parameter


def build_stages[Stage: torch.nn.Module](make, parallel: ParallelConfig) -> list[Stage]:
    """Parts of a network on this rank: one, or one per virtual pipeline stage. Process groups must exist.

    Args:
        make: (stage, virtual stage) -> the part.
        parallel: layout.
    """
    rank = parallel_state.get_pipeline_model_parallel_rank()
    stages: list[tuple[int, int | None]] = [(rank, None)]
    if parallel.virtual_pipeline > 1:
        stages = [(virtual * parallel.pipeline + rank, virtual) for virtual in range(parallel.virtual_pipeline)]
    # Megatron makes some tensors on the CPU, its routers among them.
    return [make(stage, virtual).to(platform.device()) for stage, virtual in stages]
