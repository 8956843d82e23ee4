"""What the Talker reads of the turns before an answer: plans of its own, and the Thinker's states that enter them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from omni_train.data.rows.batch import IGNORE
from omni_train.data.rows.chats import as_sequence, render, rendered
from omni_train.data.rows.sequences import TokenSequence
from omni_train.data.rows.speech_plans import CONTEXT, NONE, Plan, Planner
from omni_train.data.samples.clips import Clip
from omni_train.data.samples.positions import Run
from omni_train.data.samples.sample import Medium, Turn
from omni_train.recipe.schema import Context as ContextKind
from omni_train.recipe.schema import DataConfig, ModelConfig, SpeechConfig, States, TalkerStyle


@dataclass
class Context:
    """Context of an answer. No draw changes it: it is the same at every reading of a sample.

    Attributes:
        plans: plans of the turns in the Talker's stream.
        runs: runs of these turns for the rotary ids, with ``dual_track``.
        sequence: the Thinker's, which ends behind the last state that is read and the last medium; None where no state
            is read.
        positions: (K,) in it, of the states that are read, in the order of the plans' sources.
    """

    plans: list[Plan] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    sequence: TokenSequence | None = None
    positions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def context_positions(
    turns: Sequence[Turn], planner: Planner, data: DataConfig, model: ModelConfig, parts: Mapping[str, bytes]
) -> Context:
    """Context of an answer behind ``turns``; there is none with ``data.speech.states=none``.

    Raises SampleError: as ``chats.rendered``.
    """
    if not reads_turns(turns, planner, data):
        return Context()
    rendering, clips = rendered(turns, planner.tokenizer, data.row_tokens, data.media, model, parts, data.chat_template)
    return context_in(as_sequence(rendering, planner.tokenizer, turns, clips, data.media), turns, clips, planner, data)


def reads_turns(turns: Sequence[Turn], planner: Planner, data: DataConfig) -> bool:
    """Whether the Talker may read anything of these turns."""
    readable = planner.talker.style is TalkerStyle.dual_track or data.speech.context is ContextKind.all
    return bool(turns) and data.speech.states is not States.none and (readable or any(turn.media for turn in turns))


def context_in(
    sequence: TokenSequence, turns: Sequence[Turn], clips: Mapping[Medium, Clip], planner: Planner, data: DataConfig
) -> Context:
    """Context of an answer behind turns, given the Thinker's sequence of them, which the answer's head may follow.

    With ``dual_track`` it is every user turn whole, its media by their states. An interleaved stream has of each turn
    the states of ``data.speech.context`` between its head and its tail; a turn from which none is read is left out.
    """
    dual, speech, tokenizer = planner.talker.style is TalkerStyle.dual_track, data.speech, planner.tokenizer
    media = np.zeros(len(sequence), bool)
    media[sequence.audio_slots] = media[sequence.vision_slots] = True
    begins = np.flatnonzero(sequence.tokens == tokenizer.im_start)  # no text can spell it
    spans = [np.arange(begin, end) for begin, end in zip(begins, [*begins[1:], len(sequence)], strict=True)]
    spans = spans[: len(turns)]
    runs: list[Run] = []
    plans: list[Plan] = []
    read: list[np.ndarray] = []
    for turn, span in zip(turns, spans, strict=True):
        known = sum(map(len, read))
        if dual and turn.role == "user":
            own = span[media[span]]
            plans.append(_whole(planner, sequence.tokens[span], media[span], known))
        elif not dual and len(own := _read(turn, span, media, planner, speech)):
            plans += [
                planner.text(planner.head(turn.role)),
                planner.states(known, len(own)),
                planner.text(planner.tail()),
            ]
        else:
            continue
        read.append(own)
    if dual:
        users = [turn for turn in turns if turn.role == "user"]
        runs = render(users, tokenizer, clips=clips, template=data.chat_template).runs if users else []
    positions = np.concatenate([np.zeros(0, np.int64), *read])
    return Context(plans, runs, _cut(sequence, positions), positions)


def _whole(planner: Planner, tokens: np.ndarray, media: np.ndarray, known: int) -> Plan:
    """Plan of a turn whose media enter by their states, of which ``known`` came before."""
    plan = planner.text(np.where(media, NONE, tokens))
    plan.kinds[media] = CONTEXT
    plan.sources[media] = known + np.arange(media.sum())
    return plan


def _read(turn: Turn, span: np.ndarray, media: np.ndarray, planner: Planner, speech: SpeechConfig) -> np.ndarray:
    """Positions among those of a turn that an interleaved stream reads."""
    own = span[media[span]]
    if 0 < speech.max_media_positions < len(own):
        own = own[np.linspace(0, len(own) - 1, speech.max_media_positions).round().astype(int)]
    if speech.context is ContextKind.media:
        return own
    # The line end of the head may be one token with those that the turn begins with.
    body = span[1 + len(planner.tokenizer.encode(turn.role)) + 1 : len(span) - len(planner.tail())]
    return np.sort(np.concatenate([body[~media[body]], own]))


def _cut(sequence: TokenSequence, positions: np.ndarray) -> TokenSequence | None:
    """Sequence up to the last of ``positions``, its media whole, without labels: what comes later changes no state."""
    if not len(positions):
        return None
    end = 1 + max(slots[-1] for slots in (positions, sequence.audio_slots, sequence.vision_slots) if len(slots))
    ids = None if sequence.positions is None else sequence.positions[:, :end]
    tokens = sequence.tokens[:end]
    return replace(sequence, tokens=tokens, labels=np.full_like(tokens, IGNORE), positions=ids)
