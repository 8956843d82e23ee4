"""The text of an answer as a source of tokens, and the speaker that follows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import batched
from typing import Any

from omni_train.data.rows.batch import IGNORE
from omni_train.data.rows.chats import as_sequence, rendered
from omni_train.data.rows.schedules import SCHEDULES_BY_RATIO
from omni_train.data.rows.speech import planner_of, stream_before
from omni_train.data.rows.speech_context import Context, context_in, reads_turns
from omni_train.data.samples.sample import SampleError, Turn
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.errors import UserError
from omni_train.models.talker import Talker
from omni_train.models.thinker import Thinker
from omni_train.recipe.schema import Recipe, SpeechScheduleConfig, TalkerStyle, required
from omni_train.rollout.generate import TextStream
from omni_train.rollout.sampling import Sampling, uniforms
from omni_train.rollout.speech import Prompt, Speaker, SpeechLimits, SpeechSampling

FRAMES_PER_TOKEN = 4.0
"""Frames for each token of the text, where a schedule needs a ratio: three tokens a second at 12.5 frames."""


@dataclass
class Answer:
    """Text that is to be spoken, and what its speech reads of the turns before it.

    Attributes:
        pieces: tokens in pieces, without the one that ends them.
        context: of the turns, as the Talker reads them.
        stream: that writes the text, with the Thinker's states of the turns; None of a text that is there.
        stop_tokens: that end what the stream writes.
    """

    pieces: Iterable[Sequence[int]]
    context: Context = field(default_factory=Context)
    stream: TextStream | None = None
    stop_tokens: tuple[int, ...] = ()

    @property
    def cut(self) -> bool:
        """Whether the text reached its greatest length."""
        return self.stream is not None and self.stream.completions[0].tokens[-1] not in self.stop_tokens


def given(text: str, tokenizer: Tokenizer) -> Answer:
    """A text as it is.

    Raises:
        UserError: it is empty.
    """
    if not (tokens := tokenizer.encode(text.strip())):
        raise UserError("text= is empty; say something")
    return Answer([tokens])


def written(
    thinker: Thinker,
    turns: Sequence[Turn],
    parts: Mapping[str, bytes],
    recipe: Recipe,
    tokenizer: Tokenizer,
    *,
    sampling: Sampling,
    seed: int,
    max_new_tokens: int,
) -> Answer:
    """What a Thinker answers to turns, a token at a time; with `model.talker` the Talker may read the turns too.

    Raises:
        UserError: the turns or their media cannot be read.
    """
    data, model = recipe.data, recipe.model
    try:
        rendering, clips = rendered(
            turns, tokenizer, data.row_tokens, data.media, model, parts, data.chat_template, answer=True
        )
    except SampleError as error:
        raise UserError(f"what is asked is refused as {error.reason}; docs/data.md says what that means") from None
    sequence = as_sequence(rendering, tokenizer, turns, clips, data.media)
    sequence.labels[:] = IGNORE
    context = Context()
    if model.talker is not None:
        planner = planner_of(tokenizer, data, model)
        if reads_turns(turns, planner, data):
            context = context_in(sequence, turns, clips, planner, data)
    stop_tokens = (tokenizer.im_end, tokenizer.end_of_text)
    stream = TextStream(
        thinker,
        [sequence],
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        sampling=sampling,
        uniform=[uniforms(seed, 0, max_new_tokens)],
        states_after=required(model.talker).accept_hidden_layer if len(context.positions) else 0,
    )

    def tokens() -> Iterator[int]:
        yield from (token for new in stream for token in new.values() if token not in stop_tokens)

    return Answer(batched(tokens(), 1), context, stream, stop_tokens)


def speaker_of(
    answer: Answer,
    talker: Talker,
    recipe: Recipe,
    tokenizer: Tokenizer,
    voice: Mapping[str, Any],
    sampling: SpeechSampling,
    limits: SpeechLimits,
    frames_per_token: float | None = None,
) -> Callable[[Sequence[int]], Speaker]:
    """Function that begins to speak an answer of which these tokens have come.

    Args:
        answer: the answer, of which at least one token has come when the function is called.
        talker: the Talker.
        recipe: its recipe.
        tokenizer: tokenizer of the text.
        voice: who speaks, as ``stream_before`` takes it.
        sampling: how codes are drawn.
        limits: when speech is ended.
        frames_per_token: ratio for a schedule that needs one; None for FRAMES_PER_TOKEN.

    Raises:
        UserError: a ratio for a Talker that needs none.
    """
    planner, data, context = planner_of(tokenizer, recipe.data, recipe.model), recipe.data, answer.context
    schedule = None if planner.talker.style is TalkerStyle.dual_track else schedule_of(recipe)
    ratio = None
    if schedule is not None and schedule.kind in SCHEDULES_BY_RATIO:
        ratio = frames_per_token or FRAMES_PER_TOKEN
    elif frames_per_token is not None:
        raise UserError(f"frames_per_token={frames_per_token}: the Talker needs no ratio; leave it out")

    def begin(tokens: Sequence[int]) -> Speaker:
        plan, ids = stream_before(planner, context, data, first=tokens[0], **voice)
        states = None
        if len(context.positions):
            assert answer.stream is not None  # who has read the turns
            states = answer.stream.states[0][context.positions]
        return Speaker(
            talker,
            tokenizer,
            [Prompt(plan, ids, states, list(tokens), ended=False)],
            schedule=schedule,
            switch_label=data.speech.switch_label,
            frames_per_token=ratio,
            sampling=sampling,
            limits=limits,
        )

    return begin


def schedule_of(recipe: Recipe) -> SpeechScheduleConfig:
    """Schedule to speak with: the first of the recipe's that needs no ratio of frames to tokens, else the first."""
    schedules = recipe.data.speech.schedules
    return next((one for one in schedules if one.kind not in SCHEDULES_BY_RATIO), schedules[0])
