"""Generation of speech with the Talker: frames of codes while the text comes, for a batch of sequences.

The stream of each sequence is a prefill of what precedes its answer, then a position at a time: a token of the text,
its end, or a frame. Codebook 0 of a frame is drawn from the state of the position before it, the residual codes from
the same state by the code predictor.

Axis letters: N sequences, n positions of a prompt, Q codebooks, K states, H hidden, V codec vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from omni_train import platform
from omni_train.data.rows.batch import IGNORE, SpeechRow
from omni_train.data.rows.schedules import Feeder, Step, drawable
from omni_train.data.rows.speech_plans import NONE, TTS_END, TTS_PAD, Plan
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.errors import UserError
from omni_train.models.talker import Talker
from omni_train.models.talker.row import LocalSpeechRow
from omni_train.nn.decoding import DecodingState
from omni_train.recipe.schema import SpeechScheduleConfig, SwitchLabel, TalkerStyle
from omni_train.rollout.sampling import Sampling


@dataclass(frozen=True)
class SpeechSampling:
    """Sampling parameters of speech; the defaults are those with which Qwen3-Omni is released.

    Attributes:
        first: of codebook 0.
        residual: of the residual codes.
        repetition_penalty: divides the logits of codes of codebook 0 that the sequence has had (Keskar et al. 2019).
        seed: with the number of the prompt decides what is drawn, whatever else is in the batch.
    """

    first: Sampling = field(default_factory=lambda: Sampling(temperature=0.9, top_k=50))
    residual: Sampling = field(default_factory=lambda: Sampling(temperature=1.0, top_k=50, top_p=0.8))
    repetition_penalty: float = 1.05
    seed: int = 0


GREEDY = SpeechSampling(Sampling(), Sampling(), 1.0)


@dataclass(frozen=True)
class SpeechLimits:
    """Limits against speech that does not end, or is stuck.

    Attributes:
        max_frames: frames of a sequence.
        frames_per_token: frames for each token of the text, beside `spare`.
        spare: frames that a text of any length may take.
        repeats: equal frames one after another after which a sequence is stuck.
    """

    max_frames: int = 4096
    frames_per_token: float = 25.0
    spare: int = 25
    repeats: int = 50


@dataclass
class Prompt:
    """Prompt of a sequence.

    Attributes:
        plan: what precedes the answer; of `dual_track` with the first token of the text in its last position.
        rotary_ids: (3, n) of the plan's positions; None counts from 0.
        states: (K, H) of the Thinker, the plan's sources.
        text: tokens of the text that have come; :meth:`Speaker.feed` adds more.
        ended: whether they are all.
        number: with the seed of the sampling decides what is drawn; None: its index among the prompts.
    """

    plan: Plan
    rotary_ids: np.ndarray | None = None
    states: torch.Tensor | None = None
    text: list[int] = field(default_factory=list)
    ended: bool = True
    number: int | None = None


@dataclass
class Speech:
    """Speech of one sequence, as far as it has come.

    Attributes:
        codes: (Q,) of each frame.
        log_probs: of each frame's codebook 0 and residual codes together in nats, at temperature 1, over what may be
            drawn; the end's is the last.
        ending: None while it goes on; ``eos``, ``limit`` (frames for its text), ``stuck``.
        before: tokens of the text, and positions after the prompt, that had entered when the first frame was drawn;
            None before.
    """

    codes: list[np.ndarray] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    ending: str | None = None
    before: tuple[int, int] | None = None

    def frames(self) -> np.ndarray:
        """Codes of all frames, (Q, M) int64."""
        return np.stack(self.codes, axis=1) if self.codes else np.zeros((0, 0), np.int64)


class Speaker:
    """A batch of sequences that are being spoken. Each :meth:`step` appends one position to every sequence.

    Under tensor parallelism all ranks must do the same.

    Args:
        model: the whole Talker, in evaluation mode.
        tokenizer: tokenizer of the text.
        prompts: one for each sequence.
        schedule: order of text and frames, of an interleaved stream.
        switch_label: that it was trained with.
        frames_per_token: ratio that schedules of kinds `tightest` and `lead` need.
        sampling: how codes are drawn.
        limits: when a sequence is ended.
        forced: codes (Q, M) of each sequence, which are taken instead of any that would be drawn, and then its end.

    Raises:
        UserError: the layout has pipeline or context parallelism.
    """

    def __init__(
        self,
        model: Talker,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        *,
        schedule: SpeechScheduleConfig | None = None,
        switch_label: SwitchLabel = SwitchLabel.look_ahead,
        frames_per_token: float | Fraction | None = None,
        sampling: SpeechSampling = GREEDY,
        limits: SpeechLimits | None = None,
        forced: Sequence[np.ndarray] | None = None,
    ) -> None:
        config = model.config
        if config.pipeline_model_parallel_size > 1 or config.context_parallel_size > 1:
            raise UserError(
                f"parallel.pipeline={config.pipeline_model_parallel_size} "
                f"parallel.context={config.context_parallel_size}: both must be 1 to generate speech; use "
                "parallel.tensor"
            )
        self._forced = forced
        self.model, self.sampling, self.limits = model, sampling, limits or SpeechLimits()
        self.dual = model.talker.style is TalkerStyle.dual_track
        self.pad, self.end = tokenizer.token_id(TTS_PAD), tokenizer.token_id(TTS_END)
        self.prompts, self.speech = list(prompts), [Speech() for _ in prompts]
        self.texts = [list(prompt.text) for prompt in prompts]
        self.ended = [prompt.ended for prompt in prompts]
        self._feeders = [] if self.dual else [Feeder(schedule, frames_per_token) for _ in prompts]
        masks = (drawable(model.talker, switch_label, text_ended=ended) for ended in (False, True))
        self._drawable = [torch.from_numpy(mask).to(platform.device()) for mask in masks]
        numbers = [index if prompt.number is None else prompt.number for index, prompt in enumerate(prompts)]
        self._generators = [np.random.default_rng([sampling.seed, number]) for number in numbers]
        self._seen = torch.zeros(len(prompts), model.talker.codec_vocab_size, dtype=torch.bool)
        self._seen = self._seen.to(platform.device())
        self._next_steps: list[Step | None] = [None] * len(self.prompts)
        self._appended = 0
        self._hidden_NH = self._prefill()

    def feed(self, index: int, tokens: Sequence[int], ended: bool = False) -> None:
        """Add tokens to the text of a sequence; `ended` when they are the last."""
        self.texts[index] += tokens
        self.ended[index] |= ended

    @property
    def growing(self) -> list[int]:
        """Indices of the sequences that go on."""
        return [index for index, speech in enumerate(self.speech) if speech.ending is None]

    @torch.no_grad()
    def step(self) -> bool:
        """Append a position to every sequence.

        Returns:
            False where one of them waits for more text, and none was appended; else True.
        """
        for index in self.growing:
            if self._next_steps[index] is None:
                self._next_steps[index] = self._next(index)
        if any(self._next_steps[index] is Step.wait for index in self.growing):
            self._next_steps = [None if step is Step.wait else step for step in self._next_steps]
            return False
        steps, self._next_steps = self._next_steps, [None] * len(self.prompts)
        speaking = [index for index in self.growing if steps[index] is Step.frame]
        frames = self._draw(speaking)
        if not self.growing:
            return True
        codebooks = self.model.talker.num_code_groups
        text_N = np.full(len(self.prompts) + self._fillers, self.pad)
        codes_NQ = np.full((len(text_N), codebooks), NONE)
        for index in self.growing:
            text_N[index] = NONE
            if steps[index] is Step.frame:
                codes_NQ[index] = frames[index]
            if self.dual:
                text_N[index] = self._trailing(index)
            elif steps[index] is Step.text:
                text_N[index] = self.texts[index][self._feeders[index].fed - 1]
            elif steps[index] is Step.end:
                text_N[index] = self.end
        self._hidden_NH = self._append(text_N, codes_NQ)
        self._appended += 1
        return True

    def _next(self, index: int) -> Step:
        if not self.dual:
            return self._feeders[index].next(len(self.texts[index]), self.ended[index])
        # The token beside the next frame must be known, or that there is none.
        missing = len(self.speech[index].codes) + 1 >= len(self.texts[index]) and not self.ended[index]
        return Step.wait if missing else Step.frame

    def _trailing(self, index: int) -> int:
        """Token that enters beside the frame that was drawn last, of `dual_track`."""
        number = len(self.speech[index].codes)  # the first token has entered with the prompt
        text = self.texts[index]
        return text[number] if number < len(text) else self.end if number == len(text) else self.pad

    def _text_ended(self, index: int) -> bool:
        return self.dual or self._feeders[index].ended

    def _draw(self, speaking: list[int]) -> dict[int, np.ndarray]:
        """Frames (Q,) of the sequences that speak next; those that end instead are marked so."""
        if not speaking:
            return {}
        hidden_FH = self._hidden_NH[speaking]
        logits_FV = self.model.codec_head(hidden_FH).float()
        masks_FV = torch.stack([self._drawable[self._text_ended(index)] for index in speaking])
        log_probs_FV = logits_FV.masked_fill(~masks_FV, -torch.inf).log_softmax(-1)
        # The schedule says when text comes, whatever the model would ask for.
        masks_FV[:, self.model.talker.codec_text_id] = False
        uniform_FQ = np.stack([self._generators[i].random(self.model.talker.num_code_groups) for i in speaking])
        penalty = self.sampling.repetition_penalty
        penalized = torch.where(logits_FV > 0, logits_FV / penalty, logits_FV * penalty)
        logits_FV = torch.where(self._seen[speaking], penalized, logits_FV).masked_fill(~masks_FV, -torch.inf)
        first_F = self.sampling.first.choose(logits_FV, torch.from_numpy(uniform_FQ[:, 0]))
        forced_FQ = self._forced_codes(speaking, first_F.device)
        if forced_FQ is not None:
            first_F = forced_FQ[:, 0]
        log_probs_F = log_probs_FV.gather(1, first_F[:, None])[:, 0]
        self._seen[speaking, first_F] = True

        residual_log_probs = []

        def choose(logits_FK: torch.Tensor, book: int) -> torch.Tensor:
            chosen = self.sampling.residual.choose(logits_FK, torch.from_numpy(uniform_FQ[:, book + 1]))
            if forced_FQ is not None:
                chosen = forced_FQ[:, book + 1]
            residual_log_probs.append(logits_FK.float().log_softmax(-1).gather(1, chosen[:, None])[:, 0])
            return chosen

        residual_FG = self.model.code_predictor.generate(hidden_FH, self.model.codec_embedding(first_F), choose)
        codes_FQ = torch.cat([first_F[:, None], residual_FG], dim=1).cpu().numpy()
        with_residual = (log_probs_F + torch.stack(residual_log_probs).sum(0)).tolist()
        frames = {}
        for place, index in enumerate(speaking):
            speech = self.speech[index]
            if codes_FQ[place, 0] == self.model.talker.codec_eos_id:
                speech.log_probs.append(float(log_probs_F[place]))
                speech.ending = "eos"
                continue
            if speech.before is None:
                speech.before = (1 if self.dual else self._feeders[index].fed, self._appended)
            speech.codes.append(codes_FQ[place])
            speech.log_probs.append(with_residual[place])
            frames[index] = codes_FQ[place]
            speech.ending = self._limit(index)
        return frames

    def _forced_codes(self, speaking: list[int], device: torch.device) -> torch.Tensor | None:
        """Codes (F, Q) that the sequences must take next, where there are some."""
        if self._forced is None:
            return None
        end = np.zeros(self.model.talker.num_code_groups, np.int64)
        end[0] = self.model.talker.codec_eos_id
        numbers = [len(self.speech[index].codes) for index in speaking]
        codes = [
            self._forced[i][:, m] if m < self._forced[i].shape[1] else end
            for i, m in zip(speaking, numbers, strict=True)
        ]
        return torch.from_numpy(np.stack(codes)).to(device)

    def _limit(self, index: int) -> str | None:
        """Limit that a sequence has reached with its last frame."""
        codes, limits = self.speech[index].codes, self.limits
        if self._forced is not None:
            return None
        most = min(limits.max_frames, limits.spare + limits.frames_per_token * len(self.texts[index]))
        if len(codes) >= most and (self.ended[index] or len(codes) >= limits.max_frames):
            return "limit"
        if len(codes) >= limits.repeats and all((one == codes[-1]).all() for one in codes[-limits.repeats :]):
            return "stuck"
        return None

    def _prefill(self) -> torch.Tensor:
        """State of the last position of every prompt, (N, H)."""
        plans = [prompt.plan for prompt in self.prompts]
        # Sequence parallelism divides the positions of every row: a batch is filled up with sequences to be dropped.
        filler = _filler_lengths([len(plan) for plan in plans], self.model.config.tensor_model_parallel_size)
        self._fillers = len(filler)
        blank = [Plan.blank(length, self.model.talker.num_code_groups, 0) for length in filler]
        for plan in blank:
            plan.text_ids[:] = self.pad
        ids = [_counted(prompt.rotary_ids, len(prompt.plan)) for prompt in self.prompts]
        ids += [_counted(None, length) for length in filler]
        self._next_ids = torch.stack([torch.as_tensor(one.max() + 1) for one in ids])
        known, sources = 0, []
        for plan, prompt in zip(plans, self.prompts, strict=True):
            sources.append(np.where(plan.sources == NONE, NONE, plan.sources + known))
            known += 0 if prompt.states is None else len(prompt.states)
        sources += [plan.sources for plan in blank]
        states = [prompt.states for prompt in self.prompts if prompt.states is not None]
        every = [*plans, *blank]
        row = self._row(
            np.concatenate([plan.text_ids for plan in every]),
            np.concatenate([plan.codes for plan in every]),
            torch.from_numpy(np.concatenate(ids, axis=1)),
            np.cumsum([0, *map(len, every)]),
        )
        row.sources = torch.from_numpy(np.concatenate(sources))
        local = LocalSpeechRow.from_batch(row)
        if states:
            local.states = torch.cat(states).to(platform.device())
        self._state = local.packed = DecodingState.prefill(local.packed)
        last = torch.tensor(np.cumsum([len(plan) for plan in every]) - 1)
        return self._states_of(local)[last.to(platform.device())][: len(self.prompts)]

    def _append(self, text_N: np.ndarray, codes_NQ: np.ndarray) -> torch.Tensor:
        """State of the position of every sequence at which these tokens and frames enter, (N, H)."""
        self._state.step()
        ids_3N = self._next_ids.expand(3, -1).clone()
        self._next_ids = self._next_ids + 1
        row = self._row(text_N, codes_NQ, ids_3N, np.arange(len(text_N) + 1))
        local = LocalSpeechRow.from_batch(row)
        local.packed = self._state
        return self._states_of(local)[: len(self.prompts)]

    @torch.no_grad()
    def _states_of(self, row: LocalSpeechRow) -> torch.Tensor:
        hidden = self.model(row)
        if self.model.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.model.tp_group)
        return hidden[:, 0]

    def _row(self, text: np.ndarray, codes: np.ndarray, ids: torch.Tensor, boundaries: np.ndarray) -> SpeechRow:
        n, codebooks = codes.shape
        none = torch.zeros(0, dtype=torch.int64)
        return SpeechRow(
            tokens=none,
            labels=none,
            loss_weights=none.float(),
            position_ids=torch.zeros(3, 0),
            cu_seqlens=torch.zeros(1, dtype=torch.int32),
            padding=none.bool(),
            text_ids=torch.from_numpy(text),
            sources=torch.full((n,), NONE),
            codes=torch.from_numpy(codes),
            speech_labels=torch.full((n,), IGNORE),
            label_codes=torch.full((n, codebooks - 1), IGNORE),
            text_ended=torch.zeros(n, dtype=torch.bool),
            speech_positions=ids,
            speech_cu_seqlens=torch.from_numpy(boundaries).int(),
            speech_padding=torch.zeros(n, dtype=torch.bool),
            draws=torch.zeros(n),
        )


def _filler_lengths(lengths: Sequence[int], tensor: int) -> list[int]:
    """Lengths of sequences to be dropped, which make the number of sequences and their sum multiples of `tensor`."""
    total = sum(lengths)
    missing = -len(lengths) % tensor or (tensor if total % tensor else 0)
    return [1 + -(total + missing) % tensor] + [1] * (missing - 1) if missing else []


def _counted(ids: np.ndarray | None, length: int) -> np.ndarray:
    return np.tile(np.arange(length), (3, 1)) if ids is None else ids


def speak(speaker: Speaker) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Speak all sequences of texts that have come, to their ends.

    Yields:
        (index, codes (Q,)) of the frames that each step made.

    Raises:
        ValueError: a text has not ended and more of it is due.
    """
    told = [0] * len(speaker.speech)
    while speaker.growing:
        if not speaker.step():
            raise ValueError("a text has not ended; feed the rest of it")
        new = []
        for index, speech in enumerate(speaker.speech):
            new += [(index, codes) for codes in speech.codes[told[index] :]]
            told[index] = len(speech.codes)
        if new:
            yield new
