"""``omni-train generate``: from its arguments to text on standard output and sound in a file."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import soundfile

from omni_train import platform
from omni_train.checkpoint.store import resolve
from omni_train.data.samples.lengths import codec_frame_samples, codec_sampling_rate
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.errors import UserError
from omni_train.frozen.thinker import open_whole_thinker
from omni_train.generation.answering import Answer, given, speaker_of, written
from omni_train.generation.asked import read_messages, read_prompt
from omni_train.generation.display import Display
from omni_train.generation.opening import check_table, open_recipe, open_sound, open_talker, thinker_of
from omni_train.generation.voices import read_voice
from omni_train.platform.logs import say
from omni_train.rollout.conversation import SpokenAnswer
from omni_train.rollout.sampling import Sampling
from omni_train.rollout.speech import GREEDY, SpeechLimits, SpeechSampling
from omni_train.rollout.waveform import WaveStream


def generate(
    checkpoint: Path,
    messages: Path | None = None,
    prompt: str | None = None,
    text: str | None = None,
    media: str | None = None,
    speech: Path | None = None,
    voice: str | None = None,
    description: str | None = None,
    thinker: str | None = None,
    codec: str | None = None,
    recipe: Path | None = None,
    tokenizer: Path | None = None,
    greedy: bool = False,
    temperature: float | None = None,
    speech_temperature: float | None = None,
    repetition_penalty: float | None = None,
    seed: int = 0,
    max_new_tokens: int = 1024,
    max_seconds: float = 300.0,
    frames_per_token: float | None = None,
    piece_frames: int = 1,
) -> None:
    """Write an answer and speak it while it is written, or speak a text, in one process.

    The text goes to standard output as it comes, the sound to a WAV file.

    Args:
        checkpoint: checkpoint or run of a Talker; of a Thinker for text alone.
        messages: JSON file of a chat as in training, {"messages": …}, whose media lie beside it; one of these three.
        prompt: what a user says.
        text: what is spoken as it is, without a Thinker.
        media: files that the user of `prompt` shows, with commas between; videos are silent.
        speech: WAV file to write; without it the answer is not spoken.
        voice: name of the speaker (dual_track), or a file of another utterance in the voice (interleaved).
        description: of the voice (interleaved).
        thinker: checkpoint or run of the Thinker; by default the one that the Talker's recipe names.
        codec: checkpoint or run of the codec, or of a Code2Wav; by default the one that the Talker's recipe names.
        recipe: recipe.yaml for a checkpoint that is not in a run.
        tokenizer: folder, in the place of the recipe's.
        greedy: take the likeliest token and code everywhere.
        temperature: of the text's tokens, 0.7 (with top-k 20, top-p 0.8); 0 is greedy.
        speech_temperature: of codebook 0, 0.9 (with top-k 50); 0 is greedy.
        repetition_penalty: of codes of codebook 0 that were spoken, 1.05; 1 with greedy.
        seed: decides what is drawn.
        max_new_tokens: longest text, in tokens.
        max_seconds: longest speech.
        frames_per_token: ratio of frames to tokens, for a Talker whose schedules all need one; 4.
        piece_frames: frames from which a piece of sound is made at a time.

    Raises:
        UserError: something given is wrong, or does not fit something else.
    """
    writes = {"thinker": thinker, "temperature": temperature}
    speaks = {"voice": voice, "description": description, "codec": codec, "frames_per_token": frames_per_token}
    speaks |= {"speech_temperature": speech_temperature, "repetition_penalty": repetition_penalty}
    _check_words({"messages": messages, "prompt": prompt, "text": text}, media, writes, speaks, speech)
    if platform.world_size() > 1:
        raise UserError(f"{platform.world_size()} processes: generate works in one; start it without a launcher")
    if max_new_tokens < 1 or max_seconds <= 0 or (frames_per_token or 1) <= 0 or piece_frames < 1:
        raise UserError("max_new_tokens and piece_frames must be at least 1, max_seconds and frames_per_token above 0")
    of_text, of_speech = _sampling(greedy, temperature, speech_temperature, repetition_penalty, seed)
    checkpoint = resolve(checkpoint)
    settings = open_recipe(checkpoint, recipe, tokenizer)
    if speech is None:
        settings = replace(settings, model=replace(settings.model, talker=None))
    elif settings.network == "thinker":
        raise UserError(f"speech={speech}: checkpoint={checkpoint} is a Thinker's, which does not speak; leave it out")
    words, data, model = Tokenizer(settings.data.tokenizer), settings.data, settings.model
    answer = given(text, words) if text is not None else None
    with platform.joined(), ExitStack() as stack:
        platform.parallel.initialize(settings.parallel, seed)
        stack.callback(platform.parallel.destroy)
        if speech is not None:  # what is small, and may be wrong, before what is large
            code2wav, encoder = open_sound(codec, settings)
            who = read_voice(settings, voice, description, encoder)
        if answer is None:
            asked = read_messages(messages, data) if messages else read_prompt(str(prompt), _split(media), data)
            path = thinker_of(settings, checkpoint, thinker)
            writer = open_whole_thinker(path, settings)
            limit = max_new_tokens
            answer = written(writer, *asked, settings, words, sampling=of_text, seed=seed, max_new_tokens=limit)
        if speech is None:
            _write(answer, words)
            return
        talker = open_talker(checkpoint, settings)
        if text is None:
            check_table(settings, talker, writer, path)
        rate = codec_sampling_rate(model)
        limits = SpeechLimits(max_frames=max(1, int(max_seconds * rate / codec_frame_samples(model))))
        speaker = speaker_of(answer, talker, settings, words, who, of_speech, limits, frames_per_token)
        _speak(SpokenAnswer(answer.pieces, speaker, WaveStream(code2wav, piece_frames), rate), answer, words, speech)


def _write(answer: Answer, tokenizer: Tokenizer) -> None:
    """Write an answer without speaking it."""
    decode = tokenizer.decoder()
    with Display(speaks=False) as display:
        for tokens in answer.pieces:
            display.add("".join(map(decode, tokens)))
    _say_if_cut(answer)


def _speak(spoken: SpokenAnswer, answer: Answer, tokenizer: Tokenizer, file: Path) -> None:
    """Write an answer and its speech."""
    decode, rate = tokenizer.decoder(), spoken.sampling_rate
    try:
        with soundfile.SoundFile(file, "w", rate, 1, "PCM_16", format="WAV") as sound, Display(speaks=True) as display:
            for event in spoken:
                display.add("".join(map(decode, event.text)))
                if event.waveform is not None:
                    sound.write(event.waveform)
                    display.spoken(spoken.samples / rate)
    except soundfile.LibsndfileError as error:
        raise UserError(f"speech={file}: cannot be written: {error.error_string}") from error
    _say_if_cut(answer)
    said = f"{file}: {spoken.samples / rate:.2f} s of speech in {spoken.frames} frames, ended by {spoken.ending}"
    if spoken.first_packet is not None:
        said += f"; first packet after {spoken.first_packet:.2f} s, real-time factor {spoken.real_time_factor:.2f}"
    say(said)


def _say_if_cut(answer: Answer) -> None:
    if answer.stream is not None and answer.cut:
        say(f"the text was cut at max_new_tokens={answer.stream.max_new_tokens}")


def _split(media: str | None) -> list[str]:
    return media.split(",") if media else []


def _check_words(
    asked: Mapping[str, object],
    media: str | None,
    writes: Mapping[str, object],
    speaks: Mapping[str, object],
    speech: Path | None,
) -> None:
    """Refuse arguments that are too many, too few, or without a meaning beside the others.

    Args:
        asked: what is answered or spoken, by argument.
        media: that a prompt shows.
        writes: arguments for a text that is written.
        speaks: arguments for speech.
        speech: file to write.

    Raises:
        UserError: the first thing found.
    """
    said = [name for name, value in asked.items() if value is not None]
    if len(said) != 1:
        raise UserError(f"{' and '.join(said) or 'nothing is asked'}: give one of messages=, prompt= and text=")
    meaningless: dict[str, Mapping[str, object]] = {}
    if speech is None:
        meaningless["speech="] = {"text": asked["text"], **speaks}
    if said != ["prompt"]:
        meaningless["prompt="] = {"media": media}
    if said == ["text"]:
        meaningless["messages= or prompt=; a text that is there is not written"] = writes
    for needed, group in meaningless.items():
        for name, value in group.items():
            if value is not None:
                raise UserError(f"{name}={value}: means something with {needed}")
    if speech is not None and (speech.suffix != ".wav" or not speech.parent.is_dir()):
        raise UserError(f"speech={speech}: must be a file .wav in a folder that is there")


def _sampling(
    greedy: bool, temperature: float | None, speech_temperature: float | None, penalty: float | None, seed: int
) -> tuple[Sampling, SpeechSampling]:
    """How tokens of the text are drawn, and codes of speech.

    Raises:
        UserError: a temperature beside greedy=true, or a value out of its range.
    """
    if greedy and (temperature is not None or speech_temperature is not None):
        raise UserError("greedy=true: takes the likeliest, whatever the temperature; leave one of them out")
    if penalty is not None and penalty <= 0:
        raise UserError(f"repetition_penalty={penalty}: must be above 0")
    try:
        of_text = Sampling() if greedy else Sampling(0.7 if temperature is None else temperature, 0.8, 20)
        of_speech = replace(GREEDY if greedy else SpeechSampling(), seed=seed)
        if speech_temperature is not None:
            of_speech = replace(of_speech, first=replace(of_speech.first, temperature=speech_temperature))
    except ValueError as error:
        raise UserError(str(error)) from None
    return of_text, of_speech if penalty is None else replace(of_speech, repetition_penalty=penalty)
