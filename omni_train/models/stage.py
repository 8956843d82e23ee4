"""What the Megatron engine asks of a network: its parts are pipeline stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.transformer.enums import ModelType

from omni_train.models.row import LocalRow


class PipelineStage(torch.nn.Module):
    """A part of a network on the Megatron engine; mixed into a module of Megatron's, which has its ``config``.

    ``forward(row, objective)`` returns hidden states (S, 1, H) for the next stage, where S is the row's length over the
    context- and tensor-parallel sizes; on the last stage what ``objective(self, hidden, row)`` returns, or the hidden
    states where `objective` is None. ``set_input_tensor`` takes those of the stage before, and
    ``sharded_state_dict`` says how the parameters lie in the whole model.
    """

    config: Any
    model_type = ModelType.encoder_or_decoder  # these five are what Megatron's schedules and engines ask of a model
    vp_stage: int | None = None
    pre_process = True
    post_process = True
    share_embeddings_and_output_weights = False

    def local_row(self, row: Any, step: int, training: bool) -> Any:
        """This rank's part of a row, on its device; what ``forward`` takes.

        Args:
            row: whole.
            step: steps done, which with the recipe's seed decide what is drawn at random.
            training: False of held-out rows.
        """
        return LocalRow.from_batch(row)

    def pipeline_tokens(self, row_tokens: int) -> int:
        """Length of what goes from stage to stage, before it is divided among ranks, for rows of `row_tokens`."""
        return row_tokens

    def keep_frozen(self) -> None:
        """Freeze parameters that never train, whatever the recipe's `trainable` says."""

    def sum_shared_gradients(self) -> None:
        """Sum the gradients of parameters that several pipeline stages hold, in each one's `main_grad`, before they are
        summed over the data ranks. Collective over those stages.
        """

    def global_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """`named_parameters`, by the names that they have where one rank holds the whole model."""
        return self.named_parameters()


Read = Callable[[Any, torch.Tensor, Any], Any]
"""(the last stage, its hidden states, this rank's part of the row) -> what the engine keeps: an objective, or what is
read of a frozen model."""
