"""Transcripts from the recognizer: greedy, or the best that a beam search finds.

Axis letters: N clips, K hypotheses of each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch

from omni_train import platform
from omni_train.models.recognizer import SpeechRecognizer
from omni_train.platform.signals import cut_short

CLIPS = 32  # transcribed at a time


@dataclass
class Transcribed:
    """What the recognizer wrote of one clip."""

    tokens: list[int] = field(default_factory=list)  # with the stop token, unless it was cut off before one
    score: float = -float("inf")  # mean log-probability of these tokens


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
) -> list[Transcribed]:
    """Transcribe clips, each as if it were alone. Empty transcripts where a signal that stops the run cut it short.

    Args:
        model: a plain one. Left in the mode it was in.
        mels: log-mel frames (F, M) of each clip.
        window_frames: frames that attend to each other in the encoder, 0 for whole clips.
        start_token, stop_token: what the decoder begins with, and what ends a transcript.
        max_new_tokens: longest transcript.
        beam: hypotheses of each clip. One of them is always the greedy one, so a wider beam never scores lower than it.

    Raises:
        ValueError: no hypothesis or no token to write.
    """
    if beam < 1 or max_new_tokens < 1:
        raise ValueError(f"transcription needs beam={beam} and max_new_tokens={max_new_tokens} of at least 1")
    training = model.training
    model.eval()
    # Clips of like lengths are transcribed together: they are padded to the longest.
    order = sorted(range(len(mels)), key=lambda index: len(mels[index]))
    found: dict[int, Transcribed] = {}
    try:
        for first in range(0, len(order), CLIPS):
            if cut_short():
                break
            group = order[first : first + CLIPS]
            search = _Search(model, [mels[index] for index in group], window_frames, beam, start_token)
            found |= zip(group, search.run(stop_token, max_new_tokens), strict=True)
    finally:
        model.train(training)
    return [found.get(index, Transcribed()) for index in range(len(mels))]


class _Search:
    """Beam search over a group of clips; hypothesis 0 of each is the greedy one until that has ended."""

    def __init__(
        self, model: SpeechRecognizer, mels: list[np.ndarray], window_frames: int, beam: int, start_token: int
    ) -> None:
        device = platform.device()
        boundaries = torch.tensor([0, *accumulate(map(len, mels))], dtype=torch.int32)
        mel_FM = torch.from_numpy(np.concatenate(mels)).to(device)
        self.model, self.clips, self.beam = model, len(mels), beam
        self.decoding = model.begin(mel_FM, boundaries, window_frames, beam)
        self.totals_NK = torch.full((self.clips, beam), -torch.inf, device=device)
        self.totals_NK[:, 0] = 0.0  # all begin alike: one is enough
        self.last = torch.full((self.clips * beam,), start_token, device=device)
        self.written: list[list[list[int]]] = [[[] for _ in range(beam)] for _ in mels]
        self.greedy = [True] * self.clips  # whether the greedy hypothesis still grows
        self.ended: list[list[Transcribed]] = [[] for _ in mels]

    def run(self, stop_token: int, max_new_tokens: int) -> list[Transcribed]:
        """The best of each clip."""
        for length in range(1, max_new_tokens + 1):
            self._grow(stop_token, length)
            if all(map(self._done, range(self.clips))):
                break
        else:
            for clip in filter(lambda clip: not self._done(clip), range(self.clips)):
                for words, total in zip(self.written[clip], self.totals_NK[clip].tolist(), strict=True):
                    self.ended[clip].append(Transcribed(words, total / max_new_tokens))
        return [max(ended, key=lambda one: one.score) for ended in self.ended]

    def _done(self, clip: int) -> bool:
        """As many transcripts as hypotheses have ended, and the greedy one among them."""
        return len(self.ended[clip]) >= self.beam and not self.greedy[clip]

    def _grow(self, stop_token: int, length: int) -> None:
        """Write one more token of each hypothesis, and end those that stop with it."""
        log_probs = self.model.next_log_probs(self.decoding, self.last)
        vocabulary = log_probs.shape[-1]
        totals = (self.totals_NK.view(-1, 1) + log_probs).view(self.clips, -1)
        ranks = totals.clone()
        greedy = torch.tensor(self.greedy, device=totals.device).nonzero().squeeze(1)
        ranks[greedy, totals[greedy, :vocabulary].argmax(1)] = torch.inf
        # Each hypothesis can stop in one way: among twice as many candidates there are enough that go on.
        chosen = ranks.topk(min(2 * self.beam, ranks.shape[1])).indices
        chosen_totals = totals.gather(1, chosen).tolist()
        parents, tokens, kept = [], [], []
        for clip, candidates in enumerate(chosen.tolist()):
            growing: list[tuple[int, int, float]] = []
            for rank, (place, total) in enumerate(zip(candidates, chosen_totals[clip], strict=True)):
                parent, token = divmod(place, vocabulary)
                if token != stop_token:
                    growing.append((parent, token, total))
                elif rank < self.beam and total > -torch.inf and not self._done(clip):
                    words = [*self.written[clip][parent], token]
                    self.ended[clip].append(Transcribed(words, total / length))
                if rank == 0 and token == stop_token:
                    self.greedy[clip] = False
            growing = growing[: self.beam]
            self.written[clip] = [[*self.written[clip][parent], token] for parent, token, _ in growing]
            parents += [clip * self.beam + parent for parent, _, _ in growing]
            tokens += [token for _, token, _ in growing]
            kept.append([total for _, _, total in growing])
        self.decoding.choose(torch.tensor(parents, device=totals.device))
        self.totals_NK = torch.tensor(kept, device=totals.device)
        self.last = torch.tensor(tokens, device=totals.device)
