from __future__ import annotations

import json

import pytest

from omni_train.data.sample import Chat, Document, SampleError, Turn, parse_sample


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
    turns = (Turn("system", "be brief"), Turn("user", "one two"), Turn("assistant", ""))
    assert parse_sample(json.dumps(data).encode()) == Chat(turns)


def user(content: object) -> dict:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"text": "cut sh', "broken_json"),
        (b"\xff\xfe", "broken_json"),
        (b"[" * 100_000, "broken_json"),
        (b'{"text": "half a pair \\ud800"}', "broken_json"),
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
        (user([{"type": "text", "text": "see"}, {"type": "image", "image": "0.png"}]), "media_unsupported"),
        (user([{"type": "audio", "audio": "0.flac"}]), "media_unsupported"),
        ({"text": " \n"}, "empty"),
        ({"messages": []}, "empty"),
        (user(""), "empty"),
    ],
)
def test_whatever_else_is_refused_with_its_reason(data, reason):
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    with pytest.raises(SampleError) as error:
        parse_sample(data)
    assert error.value.reason == reason
