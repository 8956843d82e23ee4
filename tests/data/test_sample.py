from __future__ import annotations

import json

import pytest

from omni_train.data.samples.parsing import named_files, parse_sample
from omni_train.data.samples.sample import Chat, Document, Medium, SampleError, Turn, Voice, describe


def test_a_document_keeps_its_text_and_meta():
    assert parse_sample(b'{"text": "a\\u00e9\\n", "meta": {"language": "fr"}}') == Document("aé\n", {"language": "fr"})


def test_content_may_be_a_string_or_text_parts():
    data = {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": ""},
        ]
    }
    turns = (Turn("system", ("be brief",)), Turn("user", ("one ", "two")), Turn("assistant", ("",)))
    assert parse_sample(json.dumps(data).encode()) == Chat(turns)


def test_media_name_their_files_and_may_be_cut():
    content = [
        {"type": "text", "text": "when?"},
        {"type": "video", "video": "0.mp4", "sound": True, "end": 2},
        {"type": "audio", "audio": "1.flac", "start": 0.5},
        {"type": "image", "image": "2.png"},
    ]
    chat = parse_sample(
        json.dumps({"messages": [{"role": "user", "content": content}], "meta": {"twin": "a"}}).encode()
    )
    video, audio, image = chat.media
    assert chat.turns[0].parts == ("when?", video, audio, image)
    assert video == Medium("video", "0.mp4", sound=True, end=2)
    assert audio == Medium("audio", "1.flac", start=0.5)
    assert image == Medium("image", "2.png")
    assert chat.meta["twin"] == "a"


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_a_voice_says_who_speaks_and_names_a_file(kind):
    spoken = {"text": "a", "speech": "0.flac"} if kind == "text" else user("a") | {"speech": "0.flac"}
    said = {"speech": "1.flac", "description": "a low voice", "name": "anna"}
    assert parse_sample(json.dumps(spoken).encode()).voice is None
    assert parse_sample(json.dumps(spoken | {"voice": None}).encode()).voice is None
    for keys in (("speech",), ("description",), ("name",), tuple(said)):
        fields = spoken | {"voice": dict.fromkeys(said) | {key: said[key] for key in keys}}
        assert parse_sample(json.dumps(fields).encode()).voice == Voice(**{key: said[key] for key in keys})
        named = [(owner[key], owner is fields["voice"]) for owner, key in named_files(fields)]
        assert named == [("0.flac", False)] + [("1.flac", True)] * ("speech" in keys)


def user(content: object) -> dict:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"text": "cut sh', "broken_json"),
        (b"\xff\xfe", "broken_json"),
        (b"[" * 100_000, "broken_json"),
        (b'{"text": "half a pair \\ud800"}', "broken_json"),
        (b'{"text": "a", "meta": {"title": "half a pair \\ud83d"}}', "broken_json"),
        (b'{"text": "a", "half\\ud83d": 1}', "broken_json"),
        (b'{"text": "a", "meta": {"gain": NaN}}', "broken_json"),
        (b'{"text": "a", "meta": {"gain": -Infinity}}', "broken_json"),
        (b'{"text": "a", "meta": {"gain": 1e999}}', "broken_json"),
        (b'{"text": "a", "meta": {"n": ' + b"9" * 5000 + b"}}", "broken_json"),
        (b'{"text": "a", "meta": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}", "broken_json"),
        (b'{"text": "a", "text": "b"}', "duplicate_key"),
        (b'{"text": "a", "meta": {"n": 1, "n": 2}}', "duplicate_key"),
        ([1, 2], "unknown_schema"),
        ({"text": 7}, "unknown_schema"),
        ({"text": "a", "messages": []}, "unknown_schema"),
        ({"text": "a", "meta": "en"}, "unknown_schema"),
        ({"messages": "hello"}, "unknown_schema"),
        ({"messages": ["hello"]}, "unknown_schema"),
        (user(None), "unknown_schema"),
        ({"caption": "a"}, "no_messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "unknown_role"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "unknown_role"),
        (user([{"type": "smell", "smell": "rose"}]), "unknown_part"),
        (user(["a"]), "unknown_part"),
        (user([{"type": "image", "image": 7}]), "unknown_schema"),
        (user([{"type": "audio"}]), "unknown_schema"),
        (user([{"type": "audio", "audio": "0.flac", "sound": True}]), "unknown_schema"),
        (user([{"type": "video", "video": "0.mp4", "sound": "yes"}]), "unknown_schema"),
        (user([{"type": "video", "video": "0.mp4", "start": -1}]), "unknown_schema"),
        (user([{"type": "video", "video": "0.mp4", "start": True}]), "unknown_schema"),
        (user([{"type": "video", "video": "0.mp4", "start": 10**400}]), "unknown_schema"),
        (user([{"type": "audio", "audio": "0.flac", "start": 3, "end": 3.0}]), "unknown_schema"),
        (user([{"type": "audio", "audio": "0.flac", "end": float("nan")}]), "broken_json"),
        (user([{"type": "image", "image": "0.png", "end": 1}]), "unknown_schema"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "image", "image": "0.png"}]}]},
            "media_in_assistant",
        ),
        ({"text": " \n"}, "empty"),
        ({"messages": []}, "empty"),
        ({"text": "a", "txet": "b"}, "unknown_key_txet"),
        ({"text": "a", "a | b\n": "b"}, "unknown_key_a___b_"),
        (user([{"type": "text", "text": "a", "start": 1}]), "unknown_key_start"),
        (user([{"type": "audio", "audio": "0.flac", "image": "1.png"}]), "unknown_key_image"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "unknown_key_tool_calls"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "unknown_key_tool_calls"),
        ({"messages": [{"role": "tool", "content": "4"}]}, "unknown_role"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "sharegpt_conversations"),
        (user([{"type": "image_url", "image_url": {"url": "data:,"}}]), "openai_image_url"),
        (user([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]), "openai_input_audio"),
        (user([{"type": ["audio"]}]), "unknown_part"),
        (user(""), "empty"),
        *(
            ({"text": "a", "speech": "0.flac", "voice": voice}, reason)
            for voice, reason in (
                ({}, "unknown_schema"),
                ({"speech": None}, "unknown_schema"),
                ({"name": " "}, "unknown_schema"),
                ({"name": 7}, "unknown_schema"),
                ({"speech": ["1.flac"]}, "unknown_schema"),
                ("anna", "unknown_schema"),
                (["anna"], "unknown_schema"),
                ({"name": "anna", "pitch": 3}, "unknown_key_pitch"),
                ({"speech": "0.flac"}, "voice_is_speech"),
            )
        ),
        ({"text": "a", "voice": {"name": "anna"}}, "voice_without_speech"),
        (user("a") | {"voice": {"speech": "1.flac"}}, "voice_without_speech"),
    ],
)
def test_whatever_else_is_refused_with_its_reason(data, reason):
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    with pytest.raises(SampleError) as error:
        parse_sample(data)
    assert error.value.reason == reason


def test_a_byte_order_mark_is_no_part_of_the_json():
    assert parse_sample(b'\xef\xbb\xbf{"text": "a \\ud83d\\ude00"}') == Document("a 😀")


def test_of_a_known_format_it_is_told_what_to_do():
    told = describe({"empty": 3, "openai_image_url": 2000, "sharegpt_conversations": 7})
    assert told == (
        "openai_image_url 2,000 (an OpenAI part: write type image and the name of a file instead), "
        "sharegpt_conversations 7 (ShareGPT: write messages of role and content instead), empty 3"
    )
