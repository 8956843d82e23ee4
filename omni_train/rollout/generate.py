"""Text generation with the Thinker: a packed prefill of the prompts, then steps of one token of each.

Axis letters: T tokens of the row, S this rank's part of them under sequence parallelism, N sequences, H hidden,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region

from omni_train import platform
from omni_train.data.rows.batch import IGNORE, PackedBatch
from omni_train.data.rows.packing import pack
from omni_train.data.rows.sequences import TokenSequence
from omni_train.errors import UserError
from omni_train.models.row import LocalRow
from omni_train.models.thinker import Thinker
from omni_train.nn.decoding import DecodingState
from omni_train.platform.signals import cut_short
from omni_train.rollout.sampling import Sampling, uniforms


@dataclass
class Completion:
    """Completion of one prompt."""

    tokens: list[int] = field(default_factory=list)  # ends with the stop token, unless it reached the longest length
    log_probs: list[float] = field(default_factory=list)  # of each token in nats, at temperature 1


@torch.no_grad()
def generate(
    model: Thinker,
    prompts: Sequence[TokenSequence],
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    row_tokens: int = 8192,
) -> list[Completion]:
    """Completions of prompts, which may hold audio, images and video.

    The same on all ranks of a tensor-parallel group, which must call it with the same prompts. Under expert parallelism
    every rank of the world must call it as often, with the same `max_new_tokens`, whatever prompts it has, even none.
    A signal that stops the run cuts it short: then there are fewer completions than prompts, and the last are
    incomplete.

    Args:
        model: the whole Thinker. Left in the mode it was in.
        prompts: token sequences with their media.
        max_new_tokens: longest completion, in tokens.
        stop_tokens: tokens that end a completion.
        temperature, top_p, top_k: see :class:`Sampling`.
        seed: with the index of the prompt decides what is drawn, whatever else is in the batch.
        row_tokens: most tokens of the prompts that share a prefill, unless one prompt alone has more.

    Raises:
        UserError: the layout has pipeline or context parallelism.
        ValueError: an empty prompt, `max_new_tokens` below 1, or sampling out of its range.
    """
    config = model.config
    if config.pipeline_model_parallel_size > 1 or config.context_parallel_size > 1:
        raise UserError(
            f"parallel.pipeline={config.pipeline_model_parallel_size} "
            f"parallel.context={config.context_parallel_size}: both must be 1 to generate text; use parallel.tensor"
        )
    if max_new_tokens < 1 or not all(len(prompt) for prompt in prompts):
        raise ValueError("max_new_tokens must be at least 1, and every prompt must have a token")
    sampling = Sampling(temperature, top_p, top_k)
    uniform = [uniforms(seed, index, max_new_tokens) for index in range(len(prompts))]
    rows = _rows([len(prompt) for prompt in prompts], row_tokens)
    completions: list[Completion] = []
    training = model.training
    model.eval()
    try:
        while _anywhere(len(completions) < len(prompts), config) and not _is_cut_short(model):
            row = next(rows, slice(0))
            stream = TextStream(
                model,
                prompts[row],
                max_new_tokens=max_new_tokens,
                stop_tokens=stop_tokens,
                sampling=sampling,
                uniform=uniform[row],
            )
            for _ in stream:
                pass
            completions += stream.completions
    finally:
        model.train(training)
    return completions


def _rows(lengths: list[int], row_tokens: int):
    """Slices of prompts that share a prefill."""
    start = total = 0
    for index, length in enumerate(lengths):
        if index > start and total + length > row_tokens:
            yield slice(start, index)
            start, total = index, 0
        total += length
    if lengths:
        yield slice(start, len(lengths))


def _anywhere(condition: bool, config) -> bool:
    """Whether `condition` holds on any rank that must run the model together with this one."""
    if config.expert_model_parallel_size == 1:
        return condition
    flag = torch.tensor(float(condition), device=platform.device())
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag)


def _is_cut_short(model: Thinker) -> bool:
    """Whether a signal stops the run, the same on all ranks that run the model together."""
    return cut_short(model.tp_group if model.config.expert_model_parallel_size == 1 else torch.distributed.group.WORLD)


class TextStream:
    """Completions of prompts that share a prefill, a token of each at a time; see :func:`generate`.

    Args:
        model: the whole Thinker, in evaluation mode.
        prompts: token sequences with their media.
        max_new_tokens: longest completion, in tokens.
        stop_tokens: tokens that end a completion.
        sampling: how tokens are drawn.
        uniform: a uniform number of each prompt for every token that it may get.
        states_after: blocks of the Thinker, a mixer and a feed-forward each, below the states that are kept of the
            prompts; 0: none are.

    Attributes:
        completions: of the prompts, as far as they have come.
        states: (n, H) of each prompt's tokens, once the first token is there: the output of that block, without the
            features that DeepStack adds to it, which is what a Talker reads.
    """

    def __init__(
        self,
        model: Thinker,
        prompts: Sequence[TokenSequence],
        *,
        max_new_tokens: int,
        stop_tokens: Collection[int],
        sampling: Sampling,
        uniform: Sequence[np.ndarray],
        states_after: int = 0,
    ) -> None:
        self.model, self.prompts, self.sampling = model, prompts, sampling
        self.max_new_tokens, self.stop_tokens, self.states_after = max_new_tokens, set(stop_tokens), states_after
        self.completions = [Completion() for _ in prompts]
        self.states: list[torch.Tensor] = []
        self._sequences = [*prompts, *_fillers(prompts, model.config.tensor_model_parallel_size)]
        self._uniform_NT = np.zeros((len(self._sequences), max_new_tokens))
        self._uniform_NT[: len(prompts)] = uniform or 0.0

    @torch.no_grad()
    def __iter__(self) -> Iterator[dict[int, int]]:
        """Next token of each prompt whose completion goes on, by the prompt's index."""
        model, sequences, growing = self.model, self._sequences, set(range(len(self.prompts)))
        batch = pack(sequences, row_tokens=sum(map(len, sequences)), alignment=1, padding_token=0)
        next_ids = [ids.max() + 1 for ids in batch.position_ids.split(batch.cu_seqlens.diff().tolist(), dim=1)]
        window = model.audio_encoder.audio.eval_window_frames if hasattr(model, "audio_encoder") else 0
        row = LocalRow.from_batch(batch, media=model.encodes_media, audio_window_frames=window)
        state = DecodingState.prefill(row.packed)
        for step in range(self.max_new_tokens):
            row.packed = state
            with self._keeping_states() if step == 0 else nullcontext():
                hidden = model(row)
            logits_NV = _next_logits(model, hidden, state)
            chosen = self.sampling.choose(logits_NV, torch.from_numpy(self._uniform_NT[:, step]))
            log_probs = logits_NV.float().log_softmax(-1).gather(1, chosen[:, None])[:, 0]
            chosen = chosen.cpu()
            tokens, values = chosen.tolist(), log_probs.tolist()
            new = {index: tokens[index] for index in sorted(growing)}
            for index, token in new.items():
                self.completions[index].tokens.append(token)
                self.completions[index].log_probs.append(values[index])
            growing -= {index for index, token in new.items() if token in self.stop_tokens}
            yield new
            if step + 1 == self.max_new_tokens or not _anywhere(bool(growing), model.config) or _is_cut_short(model):
                return
            state.step()
            row = LocalRow.from_batch(_single_tokens(chosen, torch.stack(next_ids) + step))

    @contextmanager
    def _keeping_states(self) -> Iterator[None]:
        """Context in which the output of a block is kept, before the hook of DeepStack changes it."""
        if not self.states_after:
            yield
            return
        kept: list[torch.Tensor] = []

        def keep(_layer, _arguments, out) -> None:
            kept.append(out[0] if isinstance(out, tuple) else out)

        handle = self.model.decoder.layers[2 * self.states_after - 1].register_forward_hook(keep, prepend=True)
        try:
            yield
        finally:
            handle.remove()
        (hidden,) = kept
        if self.model.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.model.tp_group)
        lengths = [len(sequence) for sequence in self._sequences]
        self.states = list(hidden[:, 0].split(lengths))[: len(self.prompts)]


def _fillers(prompts, tensor: int) -> list[TokenSequence]:
    """Sequences to discard, since sequence parallelism divides the tokens of every row, prefill and step."""
    total = sum(map(len, prompts))
    missing = -len(prompts) % tensor or (tensor if total % tensor or not prompts else 0)
    lengths = [1 + -(total + missing) % tensor] + [1] * (missing - 1) if missing else []
    return [TokenSequence(np.zeros(n, np.int32), np.full(n, IGNORE, np.int32)) for n in lengths]


def _single_tokens(tokens_N: torch.Tensor, ids_N: torch.Tensor) -> PackedBatch:
    """Row of one text token of each sequence, with the same rotary id on all three axes."""
    return PackedBatch(
        tokens=tokens_N,
        labels=torch.full_like(tokens_N, IGNORE),
        loss_weights=torch.zeros(len(tokens_N)),
        position_ids=ids_N.expand(3, -1),
        cu_seqlens=torch.arange(len(tokens_N) + 1, dtype=torch.int32),
        padding=torch.zeros(len(tokens_N), dtype=torch.bool),
    )


def _next_logits(model: Thinker, hidden: torch.Tensor, state: DecodingState) -> torch.Tensor:
    """Logits after the last token of each sequence: (S, 1, H) final hidden states -> (N, V)."""
    if state.is_prefill:  # the logits of a whole row would be large
        last = state.cu_seqlens_q[1:].long() - 1
        if model.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(hidden, group=model.tp_group)
            hidden = scatter_to_sequence_parallel_region(whole[last], group=model.tp_group)
        else:
            hidden = hidden[last]
    return model.logits(hidden)
