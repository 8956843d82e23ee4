"""The Thinker: encoders, embedding, hybrid stack, head, and an optional multi-token-prediction layer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection

from omni_train.data.rows.batch import PackedBatch
from omni_train.models.audio_encoder import AudioAdapter, AudioEncoder, drawn_window
from omni_train.models.config import stack_config
from omni_train.models.decoder import DecoderStage, build_stages
from omni_train.models.row import LocalRow
from omni_train.models.stage import Read
from omni_train.models.thinker import media
from omni_train.models.thinker.mtp import MultiTokenPrediction
from omni_train.models.vision_encoder import VisionAdapter, VisionEncoder
from omni_train.nn.backend import backend
from omni_train.nn.layers import stack_submodules
from omni_train.recipe.schema import Recipe


class Thinker(DecoderStage, LanguageModule):
    """The part of the Thinker that one pipeline stage, or virtual stage, computes.

    Axis letters: T tokens of this context-parallel rank, S this tensor-parallel rank's part of them under sequence
    parallelism, H hidden, V vocabulary.

    Args:
        recipe: a validated recipe.
        config: Megatron's configuration of the same model.
        stage: index of this part in the order of the model, from 0 to pipeline·virtual_pipeline − 1.
        virtual_stage: index among this rank's parts, None without virtual pipelining.
        head: False for one that ends with its last layer, whose output it returns as it is.
    """

    def __init__(self, recipe: Recipe, config, stage: int, virtual_stage: int | None, head: bool = True) -> None:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        super().__init__(config=config, pg_collection=groups)
        thinker = recipe.model.thinker
        self.set_stage(thinker, recipe.parallel, stage, virtual_stage)
        self.has_head = head
        self.mtp_process = self.post_process and thinker.mtp_num_hidden_layers > 0
        self.share_embeddings_and_output_weights = thinker.tie_word_embeddings
        self._audio, self._seed = recipe.model.audio, recipe.seed
        submodules = stack_submodules(backend())

        if self.pre_process or self.mtp_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=recipe.model.vocab_size,
                max_sequence_length=thinker.max_position_embeddings,
                position_embedding_type="none",
                tp_group=groups.tp,
            )
        has_encoders = bool(recipe.model.audio or recipe.model.vision)
        self.encodes_media = self.pre_process and has_encoders  # needs a row's media
        # Multi-token prediction reads the embeddings of the next tokens, media included, which only the first stage can
        # make: they go through the pipeline behind the hidden states.
        self.carries_embeddings = has_encoders and thinker.mtp_num_hidden_layers > 0
        self._carried: torch.Tensor | None = None
        if self.pre_process and recipe.model.audio:
            self.audio_encoder = AudioEncoder(recipe.model.audio, config)
            self.audio_adapter = AudioAdapter(recipe.model.audio, config)
        if self.pre_process and recipe.model.vision:
            self.vision_encoder = VisionEncoder(recipe.model.vision, config)
            self.vision_adapter = VisionAdapter(recipe.model.vision, config)
        self.add_stack(thinker, submodules, groups, final_norm=self.has_head)
        if self.pre_process and recipe.model.vision:
            # A block is a mixer and a feed-forward. The state that is read of the last block is without its features.
            levels = len(recipe.model.vision.deepstack_visual_indexes)
            for level in range(levels if self.has_head else min(levels, config.num_layers // 2 - 1)):
                block_end = self.decoder.layers[2 * level + 1]
                block_end.register_forward_hook(partial(self._add_deepstack, level), with_kwargs=True)
        if self.post_process and self.has_head:
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                recipe.model.vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_weight_param_allocation=hasattr(self, "embedding") and self.share_embeddings_and_output_weights,
                tp_group=groups.tp,
            )
        if self.mtp_process:
            self.mtp = MultiTokenPrediction(config, submodules, groups)
        if self.has_head and (self.pre_process or self.post_process):
            self.setup_embeddings_and_output_layer()

    def local_row(self, row: PackedBatch, step: int, training: bool) -> LocalRow:
        """See :class:`PipelineStage`; the window in which the audio encoder attends is drawn for each step."""
        window = 0
        if self._audio is not None:
            window = drawn_window(self._audio, self._seed, step) if training else self._audio.eval_window_frames
        return LocalRow.from_batch(row, media=self.encodes_media, audio_window_frames=window)

    def pipeline_tokens(self, row_tokens: int) -> int:
        """See :class:`PipelineStage`."""
        return row_tokens * (2 if self.carries_embeddings else 1)

    def global_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Names and parameters of this stage; the names are those of the whole model on one rank."""
        for name, parameter in super().global_parameters():
            if name.startswith("output_layer.") and self.share_embeddings_and_output_weights:
                name = "embedding.word_embeddings.weight"  # the last stage's copy of the first's
            yield name, parameter

    def set_input_tensor(self, input_tensor) -> None:
        """Set the input of this stage to the output of the stage before, as Megatron's schedules do."""
        received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if self.carries_embeddings and received is not None:
            received, self._carried = received.chunk(2)
        super().set_input_tensor(received)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None):
        """See :class:`PipelineStage`; Megatron's language module looks for a head on the last stage."""
        whose = super() if self.has_head else super(LanguageModule, self)
        return whose.sharded_state_dict(prefix, sharded_offsets, metadata)

    def head_weight(self) -> torch.Tensor:
        """Weight of the output projection, (V/tp, H) rows of this tensor-parallel rank."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token embeddings, (T,) ids -> (S, 1, H)."""
        return self.embedding(input_ids=tokens[None], position_ids=None)

    def forward(self, row: LocalRow, objective: Read | None = None):
        """Output of this pipeline stage for a row.

        Args:
            row: the row; its `next_embedding` is set on the way.
            objective: what the last stage computes from the final hidden states.

        Returns:
            hidden states (S, 1, H) to the next stage, (2·S, 1, H) with embeddings behind them where multi-token
            prediction needs some with media; on the last stage what `objective` returns, or without one the hidden
            states after the final norm.
        """
        hidden = None
        if self.pre_process:
            hidden = self._embed_row(row)
        else:
            row.next_embedding, self._carried = self._carried, None
        hidden = self.run_stack(hidden, row.position_ids, row.packed, row.padding)
        if not self.post_process:
            return torch.cat([hidden, row.next_embedding]) if self.carries_embeddings else hidden
        if self.has_head:
            hidden = self.final_norm(hidden)
        if objective is None:
            return hidden
        if self.mtp_process and row.next_embedding is None:
            row.next_embedding = self.embed(row.next_tokens)
        return objective(self, hidden, row)

    def _embed_row(self, row: LocalRow) -> torch.Tensor:
        """Embeddings of the row's text and media, (S, 1, H).

        Sets `row.next_embedding` where those of the next tokens are carried through the pipeline, and adds DeepStack's
        features to `row.packed`, which reaches the layers.
        """
        hidden, group = self.embed(row.tokens), self.pg_collection.cp
        row.packed.deepstack = []  # a decoding state serves many rows, and still has those of the prompts
        if row.media is None:  # a decoding step
            return hidden
        upcoming = self.embed(row.next_tokens) if self.carries_embeddings else None
        if hasattr(self, "audio_encoder"):
            audio_features = media.encode_audio(self.audio_encoder, self.audio_adapter, row.media, group)
            hidden = self._scatter(hidden, audio_features, row.media.audio_indices)
            if upcoming is not None:
                upcoming = self._scatter(upcoming, audio_features, row.media.next_audio_indices)
        if hasattr(self, "vision_encoder"):
            vision_features, *deepstack = media.encode_vision(
                self.vision_encoder, self.vision_adapter, row.media, group
            )
            hidden = self._scatter(hidden, vision_features, row.media.vision_indices)
            if upcoming is not None:
                upcoming = self._scatter(upcoming, vision_features, row.media.next_vision_indices)
            row.packed.deepstack, row.packed.vision_indices = deepstack, row.media.vision_indices
        row.next_embedding = upcoming
        return hidden

    def _scatter(self, hidden, features, indices, add: bool = False) -> torch.Tensor:
        return media.scatter_features(
            hidden, features, indices, add=add, sequence_parallel=self.config.sequence_parallel
        )

    def _add_deepstack(self, level: int, _layer, _arguments, keywords: dict, out):
        """Forward hook that adds DeepStack's features to the output of a block of the language model.

        It takes them from the call's own arguments, so that a layer that is recomputed adds its own row's features,
        whichever row went through the model meanwhile.
        """
        packed = keywords["packed_seq_params"]
        if not (features := getattr(packed, "deepstack", None)):
            return out
        hidden, *rest = out if isinstance(out, tuple) else (out,)
        hidden = self._scatter(hidden, features[level], packed.vision_indices, add=True)
        return (hidden, *rest) if isinstance(out, tuple) else hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits gathered over the tensor-parallel ranks, for evaluation: (S, 1, H) final hidden states -> (T, V)."""
        out, _ = self.output_layer(hidden, weight=self.head_weight(), runtime_gather_output=True)
        return out[:, 0]


def build_chunks(recipe: Recipe, head: bool = True) -> list[Thinker]:
    """The model chunks of this rank: one, or one per virtual pipeline stage. Process groups must exist.

    Args:
        recipe: a validated recipe.
        head: see :class:`Thinker`.
    """
    thinker = recipe.model.thinker
    config = stack_config(recipe, thinker, thinker.mtp_num_hidden_layers)
    return build_stages(lambda stage, virtual: Thinker(recipe, config, stage, virtual, head), recipe.parallel)
