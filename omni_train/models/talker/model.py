"""The Talker: from text, the Thinker's states and frames so far to codes of speech.

Axis letters: T positions of this context-parallel rank, S this rank's part under sequence parallelism, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from omni_train.data.rows.batch import SpeechRow
from omni_train.models.config import stack_config
from omni_train.models.decoder import DecoderStage, build_stages
from omni_train.models.stage import Read
from omni_train.models.talker.code_predictor import CodePredictor, ResidualEmbedding
from omni_train.models.talker.inputs import CodecEmbedding, CodecHead, ResizeMLP, TextTable, add_at
from omni_train.models.talker.row import LocalSpeechRow
from omni_train.nn.backend import backend
from omni_train.nn.layers import stack_submodules
from omni_train.recipe.schema import Recipe, States, TextEmbedding

SHARED = ("codec_embedding.weight", "code_predictor.embeddings")
"""Parameters of the first and of the last pipeline stage: frames enter by them, and the code predictor reads them."""


class Talker(DecoderStage, MegatronModule):
    """The part of the Talker that one pipeline stage, or virtual stage, computes.

    Args:
        recipe: a validated recipe.
        config: Megatron's configuration of the same model.
        stage: index of this part in the order of the model, from 0 to pipeline·virtual_pipeline − 1.
        virtual_stage: index among this rank's parts, None without virtual pipelining.
    """

    def __init__(self, recipe: Recipe, config, stage: int, virtual_stage: int | None) -> None:
        super().__init__(config=config)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self.pg_collection, self.tp_group = groups, groups.tp
        talker = self.talker = recipe.model.talker
        self.set_stage(talker, recipe.parallel, stage, virtual_stage)
        self.row_tokens, self.frame_dropout = recipe.data.speech.row_tokens, recipe.talker_training.frame_dropout
        self.reads_states = recipe.data.speech.states is not States.none
        if self.pre_process:
            self.embedding = TextTable(recipe.model.vocab_size, talker.thinker_hidden_size, config, groups.tp)
            sizes = (talker.thinker_hidden_size, talker.projection_intermediate_size, talker.hidden_size)
            self.text_projection, self.hidden_projection = ResizeMLP(*sizes, config), ResizeMLP(*sizes, config)
        if self.pre_process or self.post_process:
            self.codec_embedding = CodecEmbedding(talker.codec_vocab_size, talker.hidden_size, config)
            self.code_predictor = (CodePredictor if self.post_process else ResidualEmbedding)(talker, config)
        self.add_stack(talker, stack_submodules(backend()), groups)
        if self.post_process:
            self.codec_head = CodecHead(talker.codec_vocab_size, talker.hidden_size, config)
        self._tie()

    def _tie(self) -> None:
        """Begin with the same values where two pipeline stages hold a table."""
        self._tied = list(self._shared()) if parallel_state.get_pipeline_model_parallel_world_size() > 1 else []
        for _, parameter in self._tied:
            if not self.pre_process:
                parameter.data.zero_()
                parameter.shared = True  # counted once in the norm of the gradient
            torch.distributed.all_reduce(parameter.data, group=parallel_state.get_embedding_group())

    def _shared(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.named_parameters() if name in SHARED)

    def keep_frozen(self) -> None:
        """See :class:`PipelineStage`: the Thinker's table, and the projection of states that no row has."""
        frozen = [self.embedding] if self.pre_process and self.talker.text_embedding is TextEmbedding.thinker else []
        frozen += [self.hidden_projection] if self.pre_process and not self.reads_states else []
        for module in frozen:
            module.requires_grad_(False)

    def sum_shared_gradients(self) -> None:
        """See :class:`PipelineStage`."""
        for _, parameter in self._tied:
            if parameter.requires_grad:
                torch.distributed.all_reduce(parameter.main_grad, group=parallel_state.get_embedding_group())

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None):
        """See :class:`PipelineStage`; of a table that two stages hold, the last one's is the copy."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if not self.pre_process:
            copies = make_sharded_tensors_for_checkpoint(
                dict(self._tied), prefix, tp_group=self.tp_group, dp_cp_group=(metadata or {}).get("dp_cp_group")
            )
            for name, entry in copies.items():
                entry.replica_id = (1, *entry.replica_id[1:])
                state[name] = entry
        return state

    def local_row(self, row: SpeechRow, step: int, training: bool) -> LocalSpeechRow:
        """See :class:`PipelineStage`; in training some frames are hidden."""
        return LocalSpeechRow.from_batch(row, self.frame_dropout if training else 0.0)

    def pipeline_tokens(self, row_tokens: int) -> int:
        """See :class:`PipelineStage`: the Talker's rows have a length of their own."""
        return self.row_tokens

    def forward(self, row: LocalSpeechRow, objective: Read | None = None):
        """Output of this pipeline stage for a row.

        Args:
            row: the row.
            objective: what the last stage computes from the final hidden states.

        Returns:
            hidden states (S, 1, H) to the next stage; on the last what `objective` returns, or without one the hidden
            states after the final norm.
        """
        hidden = self.embed(row) if self.pre_process else None
        hidden = self.run_stack(hidden, row.position_ids, row.packed, row.padding)
        if not self.post_process:
            return hidden
        hidden = self.final_norm(hidden)
        return hidden if objective is None else objective(self, hidden, row)

    def embed(self, row: LocalSpeechRow) -> torch.Tensor:
        """Sum of what enters at each position, (S, 1, H)."""
        text_S = row.text_ids
        if self.config.sequence_parallel:
            text_S = text_S.chunk(self.tp_group.size())[self.tp_group.rank()]
        here = (text_S >= 0).nonzero().squeeze(1)
        table_SH = self.embedding(row.text_ids)
        hidden_SH = table_SH.new_zeros(len(text_S), self.config.hidden_size)
        hidden_SH = add_at(hidden_SH, here, self.text_projection(table_SH[here]))
        here = (row.sources >= 0).nonzero().squeeze(1)
        states = table_SH.new_zeros(0, table_SH.shape[1]) if row.states is None else row.states.to(table_SH.dtype)
        hidden_SH = add_at(hidden_SH, here, self.hidden_projection(states[row.sources[here]]))
        here = (row.codes[:, 0] >= 0).nonzero().squeeze(1)
        codes_FQ = row.codes[here]
        hidden_SH = add_at(hidden_SH, here, self.code_predictor.embed(codes_FQ, self.codec_embedding(codes_FQ[:, 0])))
        return hidden_SH[:, None]


def build_chunks(recipe: Recipe) -> list[Talker]:
    """The parts of the Talker on this rank: one, or one per virtual pipeline stage. Process groups must exist.

    Args:
        recipe: a validated recipe.
    """
    config = stack_config(recipe, recipe.model.talker)
    return build_stages(lambda stage, virtual: Talker(recipe, config, stage, virtual), recipe.parallel)
