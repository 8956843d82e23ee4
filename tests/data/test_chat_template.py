"""Training writes what serving will: ChatML, or chats with blocks of thinking as Qwen3.5's template writes them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import shutil

import pytest

from omni_train.data.rows.batch import IGNORE
from omni_train.data.rows.chats import prompt, render, tokenize
from omni_train.data.rows.kinds import held_out
from omni_train.data.samples.chat_template import answer_text, check_template, written
from omni_train.data.samples.parsing import parse_sample
from omni_train.data.samples.sample import Chat, Medium, SampleError, Turn
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.data.stream.loader import evaluation_rows
from omni_train.errors import UserError
from omni_train.recipe.schema import (
    ChatTemplate,
    EvaluationConfig,
    LossOn,
    MediaConfig,
    ModelConfig,
    SourceConfig,
)
from tests.data.conftest import MODEL

QWEN3_5 = ChatTemplate.qwen3_5
DEAF = dict(media=MediaConfig(), model=ModelConfig(), parts={}, template=QWEN3_5)
learn = functools.partial(tokenize, row_tokens=900, loss_on=LossOn.assistant, **DEAF)

# What the template that is released with Qwen3.5 does for messages without tools, told anew.
PUBLISHED = """\
{%- set found = namespace(last=-1) %}
{%- for m in messages %}
  {%- set text = m.content | trim %}
  {%- if m.role == 'user' and not (text.startswith('<tool_response>') and text.endswith('</tool_response>')) %}
    {%- set found.last = loop.index0 %}
  {%- endif %}
{%- endfor %}
{%- if found.last < 0 %}{{ raise_exception('No user query found in messages.') }}{% endif %}
{%- for m in messages %}
  {%- set text = m.content | trim %}
  {%- if m.role == 'system' and not loop.first %}{{ raise_exception('System message must be first.') }}{% endif %}
  {%- if m.role != 'assistant' %}
    {{- '<|im_start|>' + m.role + '\\n' + text + '<|im_end|>\\n' }}
  {%- else %}
    {%- if m.reasoning_content is string %}
      {%- set thought = m.reasoning_content %}
    {%- elif '</think>' in text %}
      {%- set thought = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
      {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
    {%- else %}
      {%- set thought = '' %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if loop.index0 > found.last %}
      {{- '<think>\\n' + thought | trim + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- text + '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n<think>\\n' }}
  {%- if enable_thinking is defined and enable_thinking is false %}{{ '\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""


@pytest.fixture(scope="module")
def folder(tokenizer_folder, tmp_path_factory):
    """The tokenizer's folder with that template."""
    copy = tmp_path_factory.mktemp("qwen3_5") / "tokenizer"
    shutil.copytree(tokenizer_folder, copy)
    configuration = json.loads((copy / "tokenizer_config.json").read_text())
    del configuration["chat_template"]
    (copy / "tokenizer_config.json").write_text(json.dumps(configuration))
    (copy / "chat_template.jinja").write_text(PUBLISHED)
    return copy


@pytest.fixture(scope="module")
def served(folder):
    """served(turns, ...) is what a server makes of them."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(folder)

    def ids(turns, **options) -> list[int]:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        for message, turn in zip(messages, turns, strict=True):
            if turn.reasoning is not None:
                message["reasoning_content"] = turn.reasoning
        return reference.apply_chat_template(messages, return_dict=False, **options)

    return ids


SYSTEM, ASKED = Turn("system", ("  short, please\n",)), Turn("user", ("\n  kalan moper? \n",))
ANSWERS = (
    Turn("assistant", ("\n\nristo.\n",)),
    Turn("assistant", ("tevin",), "\nzulan kalan\n"),
    Turn("assistant", ("<think>\nzulan\n</think>\n\ntevin",)),
    Turn("assistant", ("<think>\n\n</think>\n\ntevin",)),
    Turn("assistant", ("a </think> b",), ""),
    Turn("assistant", ("",), "zulan"),
)


@pytest.mark.parametrize("answers", list(itertools.product(ANSWERS, ANSWERS[:3])))
def test_ids_are_those_of_the_template_in_every_round(tokenizer, served, answers):
    turns = (SYSTEM, ASKED, answers[0], ASKED, answers[1])
    first, second = learn(Chat(turns), tokenizer)
    assert first.tokens.tolist() == served(turns[:3])
    assert second.tokens.tolist() == served(turns)
    assert [sequence.begins_sample for sequence in (first, second)] == [True, False]


@pytest.mark.parametrize("answer", ANSWERS)
def test_what_is_learned_is_what_a_model_writes_behind_the_prompt_that_it_is_served(tokenizer, served, answer):
    turns = (SYSTEM, ASKED, ANSWERS[0], ASKED, answer)
    *_, sequence = learn(Chat(turns), tokenizer)
    learned = [place for place, label in enumerate(sequence.labels.tolist()) if label != IGNORE]
    thought = (answer.reasoning or "").strip() or ("zulan" if "zulan" in answer.text else "")
    given = served(turns[:-1], add_generation_prompt=True, enable_thinking=bool(thought))
    assert sequence.tokens[: learned[0] + 1].tolist() == given
    assert learned == list(range(learned[0], len(sequence) - 2))  # to the end of the turn, without its line end
    text = tokenizer.decode(sequence.labels[learned].tolist())
    answered = answer_text(answer, QWEN3_5)
    assert text == (f"{thought}\n</think>\n\n{answered}<|im_end|>" if thought else f"{answered}<|im_end|>")


def test_a_prompt_is_what_is_served_without_thinking(tokenizer, served):
    turns = (SYSTEM, ASKED, ANSWERS[1], ASKED)
    sequence, answer = prompt(Chat((*turns, ANSWERS[2])), tokenizer, max_tokens=900, **DEAF)
    assert sequence.tokens.tolist() == served(turns, add_generation_prompt=True, enable_thinking=False)
    assert answer == "tevin"


def test_answers_in_a_row_are_of_one_round_and_a_question_without_answer_of_none(tokenizer, served):
    turns = (ASKED, ANSWERS[0], ANSWERS[1])
    (sequence,) = learn(Chat((*turns, ASKED)), tokenizer)
    assert sequence.tokens.tolist() == served(turns)
    assert tokenizer.decode([x for x in sequence.labels.tolist() if x >= 0]).count("<|im_end|>") == 2
    result = Turn("user", (" <tool_response>4</tool_response>",))
    turns = (ASKED, ANSWERS[0], result, ANSWERS[1])
    (sequence,) = learn(Chat(turns), tokenizer)
    assert sequence.tokens.tolist() == served(turns)


def test_white_space_goes_around_text_and_media_together():
    medium = Medium("image", "0.png")
    turns = [Turn("user", ("  ", " a ", medium, " b ", "\n")), Turn("assistant", (" c",))]
    (_, user, _), (before, answer, _) = written(turns, QWEN3_5)
    assert user.parts == ("a ", medium, " b")
    assert (before, answer.parts) == ("<think>\n\n</think>\n\n", ("c",))
    (_, user, _), _ = written([Turn("user", (" ", medium, " ")), turns[1]], QWEN3_5)
    assert user.parts == (medium,)


@pytest.mark.parametrize(
    ("turns", "template", "reason"),
    [
        ((ANSWERS[0],), QWEN3_5, "no_question"),
        ((ASKED, SYSTEM, ANSWERS[0]), QWEN3_5, "system_not_first"),
        ((ASKED,), QWEN3_5, "no_loss"),
        ((ASKED, ANSWERS[1]), ChatTemplate.chatml, "unwritten_reasoning"),
    ],
)
def test_what_a_template_cannot_write_is_refused(tokenizer, turns, template, reason):
    with pytest.raises(SampleError) as error:
        learn(Chat(turns), tokenizer, template=template)
    assert error.value.reason == reason


def test_reasoning_is_read_beside_an_answer_alone():
    answer = {"role": "assistant", "content": "4", "reasoning_content": "2+2"}
    data = {"messages": [{"role": "user", "content": "2+2?"}, answer]}
    assert parse_sample(json.dumps(data).encode()).turns[1] == Turn("assistant", ("4",), "2+2")
    for spoiled, reason in (
        ({"role": "user"}, "unknown_key_reasoning_content"),
        ({"reasoning_content": 4}, "unknown_schema"),
    ):
        data["messages"][1] = answer | spoiled
        with pytest.raises(SampleError, match=reason):
            parse_sample(json.dumps(data).encode())


def test_the_template_of_the_tokenizers_folder_is_compared(tokenizer_folder, folder, tmp_path):
    assert check_template(tokenizer_folder, ChatTemplate.chatml) is None
    assert check_template(folder, QWEN3_5) is None
    assert check_template(tmp_path, QWEN3_5) is None
    with pytest.raises(UserError, match=r"models are served with it; set data\.chat_template=qwen3_5"):
        check_template(folder, ChatTemplate.chatml)
    with pytest.raises(UserError, match=r"set data\.chat_template=chatml"):
        check_template(tokenizer_folder, QWEN3_5)
    for own in ("{{ messages[0].content }}", "{{ raise_exception('no') }}", "{% if %}", "{{ 1 / 0 }}"):
        (tmp_path / "chat_template.jinja").write_text(own)
        for template in ChatTemplate:
            assert "in another way, as none here does" in check_template(tmp_path, template)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not a JSON object"):
        check_template(tmp_path, QWEN3_5)


def test_control_tokens_spelled_in_a_sample_stay_text(tokenizer: Tokenizer):
    tokens = render([ASKED, Turn("assistant", ("a<|im_end|>",))], tokenizer, template=QWEN3_5).tokens
    assert tokens.count(tokenizer.im_end) == 2


def test_the_recipes_template_writes_rows_and_held_out(config, write, folder, tmp_path):
    said = [{"role": turn.role, "content": turn.text} for turn in (ASKED, ANSWERS[0], ASKED, ANSWERS[0])]
    said[-1]["reasoning_content"] = "zulan"
    source = SourceConfig(str(write([("a", {"messages": said})], shards=1)))
    config = dataclasses.replace(config, sources=[source], tokenizer=str(folder), chat_template=QWEN3_5)
    (row,) = evaluation_rows(config, MODEL, split="train", rows=9)
    text = Tokenizer(folder).decode(row.tokens[~row.padding].tolist())
    assert text.count("<think>\n\n</think>\n\nristo.") == text.count("<think>\nzulan\n</think>\n\nristo.") == 1
    assert row.samples == 1
    (question,) = held_out(config, MODEL, EvaluationConfig(), split="train")
    assert Tokenizer(folder).decode(question.prompt.tokens.tolist()).endswith("assistant\n<think>\n\n</think>\n\n")
    assert question.answer == "risto."
    with pytest.raises(UserError, match="gives 0 of the 9"):
        evaluation_rows(dataclasses.replace(config, chat_template=ChatTemplate.chatml), MODEL, split="train", rows=9)
