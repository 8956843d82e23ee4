"""Conversations with several media, and those without any.

What the media ask is asked in text too, so that a language model knows questions and answers before it sees or hears.
"""

from __future__ import annotations

from typing import Any

from omni_train.data_pipelines.rehearsal import listening, seeing, watching
from omni_train.data_pipelines.rehearsal.phrases import DIRECTIONS, LANGUAGES
from omni_train.data_pipelines.rehearsal.world import Sample, World, conversation, seconds


def without_media(split: str, samples: int) -> list[dict[str, Any]]:
    """The text twins of all spoken questions of the split, and at least ``samples`` chats with them, shuffled."""
    world = World("chat", split)
    chats = [
        conversation(([words], answer), language=code, task="answer", source="grammar", twin=name)
        for name, code, words, answer in filter(lambda question: listening.asks(world, question), listening.QUESTIONS)
    ]
    kinds = (_described, _quoted, _quoted, _timed, _moving)
    chats += [world.choice(kinds)(world) for _ in range(samples - len(chats))]
    world.shuffle(chats)
    return chats


def _described(world: World) -> dict[str, Any]:
    task = world.choice(("color", "shape", "count"))
    kinds = {"color": ("large", "several"), "shape": ("large", "small"), "count": ("small", "several")}[task]
    scene = seeing.draw_scene(world, world.choice(kinds))
    given = f"A picture shows {scene.caption}. {world.choice(seeing.QUESTIONS[task])}"
    return conversation(([given], seeing.answer(scene, task)), language="en", task=task, source="grammar")


def _quoted(world: World) -> dict[str, Any]:
    code, words = listening.draw_utterance(world)
    given = LANGUAGES[code].quoted.format(text=words)
    return conversation(([given], words), language=code, task="transcribe", source="grammar")


def _timed(world: World) -> dict[str, Any]:
    first, second = world.sample(range(1, 12), 2)
    times = {time / 2: seeing.thing(*seeing.draw_look(world)) for time in sorted((first, second))}
    events = " ".join(f"At {seconds(time)} {thing} appears." for time, thing in times.items())
    time = world.choice(list(times))
    given = f"{events} When does {times[time]} appear?"
    return conversation(([given], seconds(time)), language="en", task="when", source="grammar", seconds=time)


def _moving(world: World) -> dict[str, Any]:
    direction, thing = world.choice(DIRECTIONS), seeing.thing(*seeing.draw_look(world))
    given = f"{thing.capitalize()} moves {direction}. Which way does it move?"
    return conversation(([given], direction), language="en", task="direction", source="grammar")


def multi_turn(world: World) -> Sample:
    """Two or three media one after the other, each with its question; then, in half, a question about a picture."""
    makers = (seeing.image_question, listening.speech, watching.video, watching.video_audio)
    asked = [world.choice(makers)(world) for _ in range(world.randint(2, 3))]
    messages, media = [], {}
    for fields, files in asked:
        names = {name: f"{len(media) + number}.{name.split('.')[1]}" for number, name in enumerate(files)}
        media |= {names[name]: data for name, data in files.items()}
        for message in fields["messages"]:
            parts = message["content"]
            if message["role"] == "user":
                parts = [part | {part["type"]: names.get(part[part["type"]], part[part["type"]])} for part in parts]
            messages.append({"role": message["role"], "content": parts})
    last = asked[-1][0]["meta"]
    meta = {key: last[key] for key in ("language", "task", "answer")} | {"source": "several"}
    pictures = [fields["meta"] for fields, files in asked if "0.mp4" not in files and "0.flac" not in files]
    if pictures and "shape" in pictures[0] and world.random() < 0.5:
        question = f"What shape was in the {'first ' if len(pictures) > 1 else ''}picture?"
        meta |= {"language": "en", "task": "shape", "answer": pictures[0]["shape"]}
        messages += conversation(([question], meta["answer"]))["messages"]
    return {"messages": messages, "meta": meta}, media
