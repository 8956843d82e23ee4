"""Transcription with the recognizer: greedy or by beam search with its decoder, or by its CTC head.

Axis letters: N clips, K hypotheses of each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch

from omni_train import platform
from omni_train.models.recognizer import SpeechRecognizer
from omni_train.platform.signals import cut_short
from omni_train.recipe.schema import required

CLIPS = 32  # decoded at a time


@dataclass
class Hypothesis:
    """A transcript of one clip."""

    tokens: list[int] = field(default_factory=list)  # ends with the stop token, unless it reached the longest length
    score: float = -float("inf")  # mean log-probability of a token, in nats


@torch.no_grad()
def transcribe(
    model: SpeechRecognizer,
    mels: Sequence[np.ndarray],
    *,
    window_frames: int,
    start_token: int,
    stop_token: int,
    max_new_tokens: int,
    beam: int = 1,
) -> list[Hypothesis]:
    """The best transcript of each clip, the same whatever other clips are given.

    Empty transcripts where a signal that stops the run cut it short.

    Args:
        model: not wrapped by DeepSpeed. Left in the mode it was in.
        mels: log-mel frames (F, M) of each clip, F the clip's own.
        window_frames: mel frames that attend to each other in the encoder, 0 for whole clips.
        start_token: first input of the decoder.
        stop_token: token that ends a transcript.
        max_new_tokens: longest transcript, in tokens.
        beam: hypotheses of each clip. One of them is always the greedy one, so a wider beam never scores lower than it.

    Raises:
        ValueError: `beam` or `max_new_tokens` is below 1.
    """
    if beam < 1 or max_new_tokens < 1:
        raise ValueError(f"beam={beam} and max_new_tokens={max_new_tokens}: both must be at least 1")

    def search(clips: list[np.ndarray]) -> list[Hypothesis]:
        return _Search(model, clips, window_frames, beam, start_token).run(stop_token, max_new_tokens)

    return [one or Hypothesis() for one in _in_batches(model, mels, search)]


@torch.no_grad()
def transcribe_by_ctc(model: SpeechRecognizer, mels: Sequence[np.ndarray], *, window_frames: int) -> list[list[int]]:
    """Token ids of each clip by its CTC head's best path, without a language tag or an end.

    Each word is heard by itself: nothing is added that a language model would expect. Empty where a signal that stops
    the run cut it short.

    Args:
        model: with a CTC head. Left in the mode it was in.
        mels: as :func:`transcribe`.
        window_frames: as :func:`transcribe`.
    """
    head = required(model.ctc_head)

    def hear(clips: list[np.ndarray]) -> list[list[int]]:
        return head.best_path(*model.encode_audio(*_packed(clips), window_frames))

    return [one or [] for one in _in_batches(model, mels, hear)]


def _in_batches[T](
    model: SpeechRecognizer, mels: Sequence[np.ndarray], write: Callable[[list[np.ndarray]], list[T]]
) -> list[T | None]:
    """What `write` makes of each clip; None from where a signal cut it short."""
    training = model.training
    model.eval()
    # Clips of like lengths share a batch, which is padded to the longest.
    order = sorted(range(len(mels)), key=lambda index: len(mels[index]))
    found: dict[int, T] = {}
    try:
        for first in range(0, len(order), CLIPS):
            if cut_short():
                break
            group = order[first : first + CLIPS]
            found |= zip(group, write([mels[index] for index in group]), strict=True)
    finally:
        model.train(training)
    return [found.get(index) for index in range(len(mels))]


def _packed(mels: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips one after the other (F, M), on this process's device, and their boundaries."""
    return torch.from_numpy(np.concatenate(mels)).to(platform.device()), boundaries(mels)


def boundaries(clips: Sequence[Sized]) -> torch.Tensor:
    """Where clips begin and end that lie one after the other, (clips + 1,) int32."""
    return torch.tensor([0, *accumulate(map(len, clips))], dtype=torch.int32)


class _Search:
    """Beam search over a batch of clips; hypothesis 0 of each is the greedy one until that has ended."""

    def __init__(
        self, model: SpeechRecognizer, mels: list[np.ndarray], window_frames: int, beam: int, start_token: int
    ) -> None:
        device = platform.device()
        self.model, self.clips, self.beam = model, len(mels), beam
        self.state = model.prefill(*_packed(mels), window_frames, beam)
        self.scores_NK = torch.full((self.clips, beam), -torch.inf, device=device)
        self.scores_NK[:, 0] = 0.0  # all begin alike: one is enough
        self.last = torch.full((self.clips * beam,), start_token, device=device)
        self.tokens: list[list[list[int]]] = [[[] for _ in range(beam)] for _ in mels]
        self.greedy = [True] * self.clips  # whether the greedy hypothesis still grows
        self.finished: list[list[Hypothesis]] = [[] for _ in mels]

    def run(self, stop_token: int, max_new_tokens: int) -> list[Hypothesis]:
        """The hypothesis of each clip with the highest score."""
        for length in range(1, max_new_tokens + 1):
            self._step(stop_token, length)
            if all(map(self._done, range(self.clips))):
                break
        else:
            for clip in filter(lambda clip: not self._done(clip), range(self.clips)):
                for words, total in zip(self.tokens[clip], self.scores_NK[clip].tolist(), strict=True):
                    self.finished[clip].append(Hypothesis(words, total / max_new_tokens))
        return [max(finished, key=lambda one: one.score) for finished in self.finished]

    def _done(self, clip: int) -> bool:
        """Whether as many hypotheses as the beam is wide have ended, the greedy one among them."""
        return len(self.finished[clip]) >= self.beam and not self.greedy[clip]

    def _step(self, stop_token: int, length: int) -> None:
        """Extend each hypothesis by a token, and set those aside that end with it."""
        log_probs = self.model.step(self.state, self.last)
        vocabulary = log_probs.shape[-1]
        totals = (self.scores_NK.view(-1, 1) + log_probs).view(self.clips, -1)
        ranks = totals.clone()
        greedy = torch.tensor(self.greedy, device=totals.device).nonzero().squeeze(1)
        ranks[greedy, totals[greedy, :vocabulary].argmax(1)] = torch.inf
        # Each hypothesis can stop in one way: among twice as many candidates there are enough that go on.
        chosen = ranks.topk(min(2 * self.beam, ranks.shape[1])).indices
        chosen_totals = totals.gather(1, chosen).tolist()
        parents, tokens, kept = [], [], []
        for clip, candidates in enumerate(chosen.tolist()):
            growing: list[tuple[int, int, float]] = []
            for rank, (candidate, total) in enumerate(zip(candidates, chosen_totals[clip], strict=True)):
                parent, token = divmod(candidate, vocabulary)
                if token != stop_token:
                    growing.append((parent, token, total))
                elif rank < self.beam and total > -torch.inf and not self._done(clip):
                    words = [*self.tokens[clip][parent], token]
                    self.finished[clip].append(Hypothesis(words, total / length))
                if rank == 0 and token == stop_token:
                    self.greedy[clip] = False
            growing = growing[: self.beam]
            self.tokens[clip] = [[*self.tokens[clip][parent], token] for parent, token, _ in growing]
            parents += [clip * self.beam + parent for parent, _, _ in growing]
            tokens += [token for _, token, _ in growing]
            kept.append([total for _, _, total in growing])
        self.state.reorder(torch.tensor(parents, device=totals.device))
        self.scores_NK = torch.tensor(kept, device=totals.device)
        self.last = torch.tensor(tokens, device=totals.device)
