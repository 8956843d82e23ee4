"""Small files that would become large: each costs its sample, under its reason, in a process of little memory."""

from __future__ import annotations

import http.server
import io
import json
import struct
import tarfile
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from omni_train.data.rows import chats as chat
from omni_train.data.rows.kinds import held_out
from omni_train.data.samples.sample import SampleError
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.data_pipelines.pack import pack
from omni_train.errors import UserError
from omni_train.recipe.schema import DataConfig, EvaluationConfig, SourceConfig
from tests.data.conftest import MODEL
from tests.hostile import confined
from tests.support import bombs
from tests.support.media import video_file


def chat_of(*parts: dict, answer: str = "one") -> dict:
    return {"messages": [{"role": "user", "content": [*parts]}, {"role": "assistant", "content": answer}]}


def text(length: int) -> bytes:
    return b'{"text": "' + b"a" * length + b'"}'


def named(files: int, **more) -> bytes:
    """A chat that names so many files."""
    return json.dumps(chat_of(*({"type": "audio", "audio": f"{n}.wav", **more} for n in range(files)))).encode()


MESSAGES = b'{"messages": [' + b",".join([b'{"role":"user","content":"a"}'] * 200_000) + b"]}"
AGAIN = [{"type": "audio", "audio": "a.wav", "start": n / 10} for n in range(10_000)]
TEXTS = {
    "a text of 100 MB": (lambda: text(100_000_000), "text_too_large"),
    "a million messages": (lambda: MESSAGES[:-2] + b",{}" * 2_000_000 + b"]}", "text_too_large"),
    "200,000 messages": (lambda: MESSAGES, "too_long"),
    "lists in lists": (
        lambda: b'{"text": "a", "meta": {"a": ' + b"[" * 2_000_000 + b"]" * 2_000_000 + b"}}",
        "broken_json",
    ),
    "a number of a million digits": (lambda: b'{"text": "a", "meta": {"n": ' + b"9" * 10**6 + b"}}", "broken_json"),
    "a role of a million characters": (
        lambda: json.dumps({"messages": [{"role": "user" * 250_000, "content": "a"}]}).encode(),
        "unknown_role",
    ),
    "100,000 files": (lambda: named(100_000), "too_many_media"),
    "a file in 10,000 pieces": (lambda: json.dumps(chat_of(*AGAIN)).encode(), "too_many_media"),
    "1,000 files, for which a row has no room": (lambda: named(1_024, end=1.5), "too_long"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_text_costs_its_line_and_its_sample(case, within, tokenizer, tmp_path):
    make, reason = TEXTS[case]
    data = make()
    (tmp_path / "all.jsonl").write_bytes(b'{"text": "one"}\n' + data + b'\n{"text": "two"}')
    reasons = within(confined.lines, str(tmp_path / "all.jsonl"), tokenizer, row=1024)
    assert reasons == [None, reason, None]
    folder = bombs.shards(tmp_path / "shards", bombs.member("k.json", data))
    assert within(confined.shard, str(folder), tokenizer, row=1024) == [None, reason, None]


def test_a_text_that_cannot_fit_in_a_row_is_not_encoded(tokenizer, monkeypatch):
    """Text without a space is one word, and takes 200 bytes a character."""
    encoded = []
    opened = Tokenizer(tokenizer)
    encode = opened._encode_parts
    monkeypatch.setattr(opened, "_encode_parts", lambda texts: encoded.append(sum(map(len, texts))) or encode(texts))
    turns = (chat.Turn("user", ("a" * 1_000_000,)), chat.Turn("assistant", ("b",)))
    data = DataConfig(row_tokens=1024)
    for ask in (
        lambda: chat.sequences_of(chat.Chat(turns), opened, data, MODEL, {}),
        lambda: chat.prompt(chat.Chat(turns), opened, max_tokens=1024, media=data.media, model=MODEL, parts={}),
    ):
        with pytest.raises(SampleError, match="too_long"):
            ask()
    assert sum(encoded) < 1000


def test_rounds_that_repeat_each_other_are_not_all_written(tokenizer):
    turns = [chat.Turn(role, ("a",)) for _ in range(600) for role in ("user", "assistant")]
    data = DataConfig(row_tokens=8192, chat_template=chat.ChatTemplate.qwen3_5)
    assert len(chat.sequences_of(chat.Chat(tuple(turns[:40])), Tokenizer(tokenizer), data, MODEL, {})) == 20
    with pytest.raises(SampleError, match="too_many_rounds"):
        chat.sequences_of(chat.Chat(tuple(turns)), Tokenizer(tokenizer), data, MODEL, {})


def test_a_manifest_of_one_endless_line_is_read_in_pieces(within, tokenizer, tmp_path):
    file = tmp_path / "all.jsonl"
    with file.open("wb") as opened:
        opened.write(b'{"text": "one"}\r\n\0\0\n')
        opened.truncate(600 << 20)  # zero bytes without a line end
    assert within(confined.lines, str(file), tokenizer) == [None, "broken_json", "text_too_large"]


def test_a_manifest_of_another_encoding_is_named(tokenizer, tmp_path):
    (tmp_path / "all.jsonl").write_text('{"text": "one"}\n', encoding="utf-16")
    with pytest.raises(UserError, match="is UTF-16; write it as UTF-8"):
        pack(tmp_path / "all.jsonl", tmp_path / "out", Path(tokenizer), model="tiny")


LONG_NAMES = bombs.header("x", 512, tarfile.GNUTYPE_LONGNAME) + bombs.padded(b"k.0.wav\0")
PAX_DIGITS = bombs.header("pax", 300_000, tarfile.XHDTYPE) + bombs.padded(b"1" * 300_000)
NO_FILES = b"".join(
    bombs.header(f"k.{n}.wav", 0, kind)
    for n, kind in enumerate((tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE))
)
MEMBERS = {
    "a file of a terabyte of holes": (bombs.sparse(), "sparse_file"),
    "the same in a PAX header": (
        bombs.extended(GNU__sparse__major="1", GNU__sparse__realsize=str(bombs.TERABYTE))
        + bombs.member("k.0.wav", b"0\n"),
        "sparse_file",
    ),
    "a size below zero": (bombs.header("k.0.wav", -512), "broken_shard"),
    "a size of 64 bits": (bombs.header("k.0.wav", 1 << 64), "broken_shard"),
    "a size of a terabyte": (bombs.header("k.0.wav", bombs.TERABYTE), "sample_too_large"),
    "a size beyond the shard": (bombs.header("k.0.wav", 100 << 20), "truncated_shard"),
    "a PAX header that says a terabyte": (
        bombs.extended(size=str(bombs.TERABYTE)) + bombs.header("k.0.wav"),
        "sample_too_large",
    ),
    "a PAX header of a gigabyte": (bombs.header("pax", 1 << 30, tarfile.XHDTYPE), "broken_shard"),
    "a PAX header of digits": (PAX_DIGITS, "broken_shard"),
    "20,000 long names for one file": (LONG_NAMES * 20_000, "broken_shard"),
    "20,000 files": (b"".join(bombs.header(f"k.{n}.wav") for n in range(20_000)), "too_many_files"),
    "a file twice": (bombs.member("k.0.wav", b"a") * 2, "duplicate_file"),
    "20,000 folders": (bombs.header("k", 0, tarfile.DIRTYPE) * 20_000, "too_many_files"),
    "files that are none": (NO_FILES, None),
    "names that lead elsewhere": (bombs.member("../../k.0.wav", b"a"), "broken_shard"),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_a_file_in_a_shard_costs_its_sample(case, within, tokenizer, tmp_path):
    files, reason = MEMBERS[case]
    folder = bombs.shards(tmp_path / "shards", bombs.SAMPLE + files)
    assert within(confined.shard, str(folder), tokenizer) == [None, reason, None]


@pytest.mark.parametrize(("case", "reason"), [(n, MEMBERS[n][1]) for n in ("a file twice", "20,000 files")])
def test_it_costs_its_sample_where_codes_are_made(case, reason, within, tmp_path):
    folder = bombs.shards(tmp_path / "shards", bombs.SAMPLE + MEMBERS[case][0])
    assert within(confined.coded, str(folder)) == (["a", "z"], {reason: 1}, ["no_speech"] * 2)


def test_holes_cost_their_sample_where_codes_are_made(within, tmp_path):
    folder = bombs.shards(tmp_path / "shards", bombs.SAMPLE + bombs.sparse())
    assert within(confined.coded, str(folder)) == (["a", "z"], {"sparse_file": 1}, ["no_speech"] * 2)


def test_bombs_cost_their_questions_in_an_evaluation(tokenizer, tmp_path):
    good = json.dumps(chat_of({"type": "text", "text": "one"})).encode()
    hours = json.dumps(chat_of({"type": "audio", "audio": "0.flac"})).encode()
    bad = {
        "sparse_file": bombs.member("k.json", good) + bombs.sparse(),
        "text_too_large": bombs.member("k.json", text(9_000_000)),
        "too_long": bombs.member("k.json", hours) + bombs.member("k.0.flac", bombs.promising_flac()),
    }
    folders = [SourceConfig(str(bombs.shards(tmp_path / reason, files, good))) for reason, files in bad.items()]
    data = DataConfig(sources=folders, tokenizer=tokenizer, row_tokens=1024)
    refused = Counter()
    questions = held_out(data, MODEL, EvaluationConfig(), split="train", refused=refused)
    assert (len(questions), refused) == (6, dict.fromkeys(bad, 1))


LENGTH = len(bombs.SAMPLE)  # of each of three
INDICES = {
    "beyond the shard": ((0, LENGTH, 1 << 40, 1 << 41), [None, "broken_shard", "truncated_shard"]),
    "backwards": ((0, 2 * LENGTH, LENGTH, 3 * LENGTH), ["broken_shard", "unreadable_index", "broken_shard"]),
    "one over the other": ((0, 0, 0, LENGTH), ["unreadable_index", "unreadable_index", None]),
    "inside a file": ((0, 512, 2 * LENGTH, 3 * LENGTH), [None, "broken_shard", None]),
    "of 64 bits": ((0, 1 << 63, (1 << 64) - 1, 0), ["unreadable_index"] * 3),
    "too few": ((0, LENGTH), [None, "unreadable_index", "unreadable_index"]),
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index_that_lies_costs_the_samples_that_it_lies_about(case, within, tokenizer, tmp_path):
    numbers, reasons = INDICES[case]
    folder = bombs.shards(tmp_path / "shards", bombs.SAMPLE)
    bombs.offsets(folder, *numbers)
    found = within(confined.shard, str(folder), tokenizer)
    assert found == reasons


PLAYLISTS = {
    "HLS": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{url}'\n",
    "DASH": '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><AdaptationSet><Representation id="1">'
    "<BaseURL>{url}</BaseURL></Representation></AdaptationSet></Period></MPD>",
    "SDP": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 9 RTP/AVP 0\n",
    "captions": "{{captions:[{{startOfParagraph:true,startTime:0,duration:9,content:'{url}'}}]}}",
    "a redirection": "[Reference]\nRef1={url}?MSWMExt=.asf\n",
    "subtitles": "1\n00:00:00,000 --> 00:00:09,000\n{url}\n\n",
    "Synchronised Multimedia": '<smil><body><audio src="{url}"/></body></smil>',
}


@pytest.fixture(scope="module")
def asked():
    """Requests that come to an address, and the address."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield requests, f"http://127.0.0.1:{server.server_port}/a.ts"
    server.shutdown()


@pytest.mark.parametrize("case", PLAYLISTS)
def test_a_file_that_names_an_address_asks_for_nothing(case, within, asked):
    requests, url = asked
    data = PLAYLISTS[case].format(url=url).encode()
    assert [within(confined.media, kind, data) for kind in ("audio", "video")] == [
        "audio_unreadable",
        "video_unreadable",
    ]
    assert within(confined.media, "image", data) == "image_unreadable"
    assert requests == []


MEDIA = {
    "ten hours of FLAC": ("audio", bombs.hours_of_flac, {}, "too_long"),
    "a FLAC file that says ten hours": ("audio", bombs.promising_flac, {}, "too_long"),
    "the same where ten hours have room": ("audio", bombs.promising_flac, {"max_audio_seconds": 9.0}, "audio_too_long"),
    "hours of Opus": ("audio", bombs.hours_of_opus, {}, "too_long"),
    "hours of AAC": ("audio", bombs.hours_of_aac, {}, "too_long"),
    "hours of MP3": ("audio", bombs.hours_of_mp3, {}, "too_long"),
    "a PNG of 256 million pixels": (
        "image",
        lambda: bombs.png(16_000, 16_000, bits=1, colour=0),
        {},
        "image_too_large",
    ),
    "a GIF of 4,000 million pixels": ("image", lambda: bombs.gif(1, 65535, 65535), {}, "image_too_large"),
    "a WebP of 268 million pixels": ("image", lambda: bombs.webp(16383, 16383), {}, "image_too_large"),
    "a TIFF of 3,600 million pixels": ("image", lambda: bombs.tiff(60_000, 60_000), {}, "image_too_large"),
    "a TIFF of 20,000 pictures": ("image", lambda: bombs.tiff(100, 100, 20_000), {}, None),
    "an animation of a million frames": ("image", lambda: bombs.gif(1_000_000), {}, None),
    "100 MB of text in a PNG": (
        "image",
        lambda: bombs.png(64, 64, (b"zTXt", b"a\0\0" + bombs.inflating(100))),
        {},
        None,
    ),
    "a profile of 100 MB": ("image", lambda: bombs.png(64, 64, (b"iCCP", b"a\0\0" + bombs.inflating(100))), {}, None),
    "frames beyond those allowed": (
        "video",
        lambda: video_file(np.zeros((120, 32, 32, 3), np.uint8)),
        {"max_source_frames": 100},
        "video_too_long",
    ),
    "fewer frames of 8 million pixels": (
        "video",
        lambda: video_file(np.zeros((26, 2160, 3840, 3), np.uint8), codec="mpeg4"),
        {"max_source_frames": 100},
        "video_too_long",
    ),
    "frames larger than the first": (
        "video",
        lambda: bombs.larger_frames(4000),
        {"max_source_pixels": 10**6},
        "video_damaged",
    ),
    "a table of 80 million frames": ("video", bombs.lying_mp4, {}, "video_damaged"),
    "a fragment of 80 million frames": ("video", bombs.lying_fragment, {}, "video_damaged"),
    "the same as sound": ("audio", bombs.lying_fragment, {}, "audio_damaged"),
    "boxes in boxes": ("video", lambda: struct.pack(">I4s", 1 << 30, b"moov") * 100_000, {}, "video_unreadable"),
}


@pytest.mark.parametrize("case", MEDIA)
def test_a_medium_costs_its_sample(case, within, tmp_path):
    kind, make, changes, reason = MEDIA[case]
    (tmp_path / "medium").write_bytes(make())
    assert within(confined.media, kind, str(tmp_path / "medium"), **changes) == reason


def test_ten_hours_cost_their_sample_in_a_shard_and_their_line_in_a_manifest(within, tokenizer, tmp_path):
    hours = bombs.hours_of_flac()
    (tmp_path / "0.flac").write_bytes(hours)
    sample = json.dumps(chat_of({"type": "audio", "audio": "0.flac"})).encode()
    spoken = json.dumps({"text": "one", "speech": "0.flac"}).encode()
    (tmp_path / "all.jsonl").write_bytes(sample + b"\n" + spoken)
    assert within(confined.lines, str(tmp_path / "all.jsonl"), tokenizer) == ["too_long", None]
    files = bombs.member("k.json", sample) + bombs.member("k.0.flac", hours)
    folder = bombs.shards(tmp_path / "shards", files)
    assert within(confined.shard, str(folder), tokenizer) == [None, "too_long", None]
    keys, left_out, reasons = within(confined.coded, str(folder))
    assert (keys, left_out, reasons) == (["a", "k", "z"], {}, ["no_speech", "audio_too_long", "no_speech"])
    voiced = json.dumps({"text": "one", "speech": "1.flac", "voice": {"speech": "0.flac"}}).encode()
    folder = bombs.shards(tmp_path / "voiced", bombs.member("k.json", voiced) + bombs.member("k.0.flac", hours))
    assert within(confined.coded, str(folder))[2][1] == "media_missing, voice_audio_too_long"


CODES = {
    "a shape of terabytes": lambda: bombs.codes_of_shape(16, 10**12),
    "a number of 64 GB": lambda: bombs.codes_of_shape(1, 1, descr="<V64000000000"),
    "objects": lambda: bombs.codes_of_shape(16, 1, descr="|O"),
    "an archive": lambda: archive(),
    "half a header": lambda: bombs.codes_of_shape(16, 1)[:40],
    "brackets": lambda: b"\x93NUMPY\1\0" + struct.pack("<H", 9000) + b"[" * 9000,
}


def archive() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, np.zeros(1 << 20))
    return buffer.getvalue()


@pytest.mark.parametrize("case", CODES)
def test_codes_that_lie_cost_their_sample(case, within):
    assert within(confined.array, CODES[case]()) == "codes_unreadable"
