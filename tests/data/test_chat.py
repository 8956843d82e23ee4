from __future__ import annotations

import functools
import json

import numpy as np
import pytest

from omni_train.data.rows.batch import IGNORE
from omni_train.data.rows.chats import prompt, render
from omni_train.data.rows.chats import tokenize as tokenize_with
from omni_train.data.samples.sample import Chat, Document, SampleError, Turn
from omni_train.data.samples.tokenizer import CONTROL_TOKENS, Tokenizer
from omni_train.errors import UserError
from omni_train.recipe.schema import LossOn, MediaConfig, ModelConfig

DEAF = dict(media=MediaConfig(), model=ModelConfig(), parts={})
tokenize = functools.partial(tokenize_with, **DEAF)

CHAT = Chat(
    (
        Turn("system", ("short, please",)),
        Turn("user", ("\n  kalan moper?",)),
        Turn("assistant", ("\n\nristo.\n",)),
        Turn("user", ("",)),
        Turn("assistant", ("tevin 12 é",)),
    )
)


def test_ids_are_those_of_the_chat_template(tokenizer, tokenizer_folder):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    messages = [{"role": turn.role, "content": turn.text} for turn in CHAT.turns]
    expected = reference.apply_chat_template(messages, return_dict=False)
    assert render(CHAT.turns, tokenizer).tokens == expected


def test_rendering_is_chatml(tokenizer):
    tokens = render(CHAT.turns, tokenizer).tokens
    assert tokenizer.decode(tokens) == "".join(f"<|im_start|>{t.role}\n{t.text}<|im_end|>\n" for t in CHAT.turns)


def learned_text(tokenizer: Tokenizer, loss_on: LossOn) -> str:
    (sequence,) = tokenize(CHAT, tokenizer, row_tokens=500, loss_on=loss_on)
    return tokenizer.decode([label for label in sequence.labels.tolist() if label != IGNORE])


def test_loss_is_on_the_assistant_alone(tokenizer):
    # The line end of the header and the two of the content are one token here, and it is learned.
    assert learned_text(tokenizer, LossOn.assistant) == "\n\n\nristo.\n<|im_end|>tevin 12 é<|im_end|>"


def test_loss_on_all_learns_every_turn(tokenizer):
    text = learned_text(tokenizer, LossOn.all)
    assert text.count("<|im_end|>") == 5
    assert text.startswith("short, please<|im_end|>")
    assert "<|im_start|>" not in text


def test_labels_are_the_next_token(tokenizer):
    (sequence,) = tokenize(CHAT, tokenizer, row_tokens=500, loss_on=LossOn.assistant)
    learned = sequence.labels[:-1] != IGNORE
    assert learned.any()
    assert (sequence.labels[:-1][learned] == sequence.tokens[1:][learned]).all()
    assert sequence.labels[-1] == IGNORE


def test_a_document_is_learned_whole_and_ends_with_end_of_text(tokenizer):
    (sequence,) = tokenize(Document("kalan moper"), tokenizer, row_tokens=500, loss_on=LossOn.assistant)
    assert sequence.tokens.tolist() == [*tokenizer.encode("kalan moper"), tokenizer.end_of_text]
    assert sequence.labels.tolist() == [*sequence.tokens[1:].tolist(), IGNORE]


@pytest.mark.parametrize("row_tokens", [1, 7, 48, 49, 50, 51])
def test_pieces_of_a_long_document_lose_no_token_and_no_label(tokenizer, row_tokens):
    text = " ".join(["kalan"] * 40)
    (whole,) = tokenize(Document(text), tokenizer, row_tokens=10_000, loss_on=LossOn.assistant)
    pieces = tokenize(Document(text), tokenizer, row_tokens=row_tokens, loss_on=LossOn.assistant)
    assert max(map(len, pieces)) <= row_tokens
    assert [piece.begins_sample for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    labels = np.concatenate([piece.labels for piece in pieces])
    assert labels[labels != IGNORE].tolist() == whole.tokens[1:].tolist()
    assert (labels[: len(whole) - 1] != IGNORE).all()


def test_a_chat_longer_than_a_row_is_refused(tokenizer):
    length = len(render(CHAT.turns, tokenizer).tokens)
    assert len(tokenize(CHAT, tokenizer, row_tokens=length, loss_on=LossOn.assistant)[0]) == length
    with pytest.raises(SampleError, match="too_long"):
        tokenize(CHAT, tokenizer, row_tokens=length - 1, loss_on=LossOn.assistant)


def test_a_chat_with_nothing_to_learn_is_refused(tokenizer):
    with pytest.raises(SampleError, match="no_loss"):
        tokenize(Chat((Turn("user", ("kalan",)),)), tokenizer, row_tokens=99, loss_on=LossOn.assistant)


def test_a_prompt_ends_where_the_last_answer_begins(tokenizer):
    sequence, answer = prompt(CHAT, tokenizer, max_tokens=500, **DEAF)
    turns = "".join(f"<|im_start|>{t.role}\n{t.text}<|im_end|>\n" for t in CHAT.turns[:-1])
    assert tokenizer.decode(sequence.tokens.tolist()) == turns + "<|im_start|>assistant\n"
    assert answer == "tevin 12 é"
    assert (sequence.labels == IGNORE).all()
    with pytest.raises(SampleError, match="too_long"):
        prompt(CHAT, tokenizer, max_tokens=len(sequence) - 1, **DEAF)
    with pytest.raises(SampleError, match="no_answer"):
        prompt(Chat(CHAT.turns[:2]), tokenizer, max_tokens=500, **DEAF)


def test_control_tokens_spelled_in_a_sample_stay_text(tokenizer):
    text = "a<|im_end|>\n<|im_start|>system<|endoftext|><tts_pad>"
    control = {tokenizer.token_id(name) for name in CONTROL_TOKENS}
    assert not control & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    tokens = render([Turn("assistant", (text,))], tokenizer).tokens
    assert [token for token in tokens if token in control] == [tokenizer.im_start, tokenizer.im_end]


def test_control_tokens_not_marked_special_in_the_file_stay_text_too(tokenizer_folder, tmp_path):
    spec = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.im_end not in tokenizer.encode("a<|im_end|>")


def test_size_counts_control_tokens(tokenizer):
    assert tokenizer.size == 320


def test_an_unusable_tokenizer_folder_is_an_error_that_names_it(tokenizer_folder, tmp_path):
    with pytest.raises(UserError, match=r"missing: no tokenizer\.json"):
        Tokenizer(tmp_path / "missing")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not readable"):
        Tokenizer(tmp_path)
    spec = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<|im_end|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"no token <\|im_end\|>"):
        Tokenizer(tmp_path)
