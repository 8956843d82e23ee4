"""Chat templates: the text around the turns of a chat, and the part of a chat that a serving model is given.

``chatml`` writes every turn as it is. ``qwen3_5`` writes what the chat template of Qwen3.5 does, without tools: texts
are trimmed, and between an answer's head and its text stands a block of thinking, which is empty where nothing was
thought. Only answers behind the last question have it; those before are history, without their thinking.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from omni_train.data.samples.files import read_settings
from omni_train.data.samples.sample import SampleError, Turn
from omni_train.errors import UserError
from omni_train.recipe.schema import ChatTemplate

_THINK, _THOUGHT = "<think>\n", "\n</think>\n\n"
_RENDERER = Path(__file__).with_name("render_template.py")
LARGEST_TEMPLATE = 1 << 24  # bytes of a file that holds one; those with a list of added tokens have hundreds of KB
_FILES = ("chat_template.jinja", "tokenizer_config.json")


def generation_prompt(template: ChatTemplate) -> str:
    """Text behind the head of an answer that is to be generated without thinking."""
    return _THINK + _THOUGHT if template is ChatTemplate.qwen3_5 else ""


def written(turns: Sequence[Turn], template: ChatTemplate) -> list[tuple[str, Turn, bool]]:
    """Turns as a template writes them.

    Returns:
        for each turn the text between its head and its own text, the turn, and whether it is an answer that a serving
        model would generate from the turns before it.

    Raises SampleError: ``unwritten_reasoning`` (ChatML has no place for it), or what Qwen3.5's template refuses:
    ``system_not_first``, ``no_question``.
    """
    if template is ChatTemplate.chatml:
        if any((turn.reasoning or "").strip() for turn in turns):
            raise SampleError("unwritten_reasoning")
        return [("", turn, turn.role == "assistant") for turn in turns]
    if any(turn.role == "system" for turn in turns[1:]):
        raise SampleError("system_not_first")
    turns = [_trimmed(turn) for turn in turns]
    last = max((index for index, turn in enumerate(turns) if _is_question(turn)), default=None)
    if last is None:
        raise SampleError("no_question")
    result = []
    for index, turn in enumerate(turns):
        if turn.role != "assistant":
            result.append(("", turn, False))
            continue
        reasoning, text = _reasoning(turn)
        if index < last:
            result.append(("", Turn(turn.role, (text,)), False))
        elif reasoning:
            result.append((_THINK, Turn(turn.role, (reasoning + _THOUGHT + text,)), True))
        else:
            result.append((_THINK + _THOUGHT, Turn(turn.role, (text,)), True))
    return result


def rounds(turns: Sequence[Turn], template: ChatTemplate) -> Iterator[Sequence[Turn]]:
    """Beginnings of a chat, each of which ends in answers as they are served.

    That is the whole chat or, where earlier answers are written without their block of thinking, one beginning for each
    question that was answered.
    """
    if template is ChatTemplate.chatml:
        yield turns
        return
    questions = [index for index, turn in enumerate(turns) if _is_question(_trimmed(turn))]
    if not questions:
        raise SampleError("no_question")
    for question, end in zip(questions, [*questions[1:], len(turns)], strict=True):
        if any(turn.role == "assistant" for turn in turns[question:end]):
            yield turns[:end]


def answer_text(turn: Turn, template: ChatTemplate) -> str:
    """Text of an answer without the thinking before it."""
    return turn.text if template is ChatTemplate.chatml else _reasoning(_trimmed(turn))[1]


def _trimmed(turn: Turn) -> Turn:
    """Turn without white space around the whole of its text and media."""
    parts = list(turn.parts)
    while parts and isinstance(parts[0], str) and not (text := parts[0].lstrip()):
        del parts[0]
    if parts and isinstance(parts[0], str):
        parts[0] = text
    while parts and isinstance(parts[-1], str) and not (text := parts[-1].rstrip()):
        del parts[-1]
    if parts and isinstance(parts[-1], str):
        parts[-1] = text
    return replace(turn, parts=tuple(parts))


def _is_question(turn: Turn) -> bool:
    text = "".join(part if isinstance(part, str) else "\0" for part in turn.parts)
    return turn.role == "user" and not (text.startswith("<tool_response>") and text.endswith("</tool_response>"))


def _reasoning(turn: Turn) -> tuple[str, str]:
    """Thinking and answer of a trimmed turn; the thinking may be written out in the text."""
    text = turn.text
    if turn.reasoning is not None:
        return turn.reasoning.strip(), text
    if "</think>" not in text:
        return "", text
    thought = text.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
    return thought.strip(), text.split("</think>")[-1].lstrip("\n")


def check_template(folder: str | Path, template: ChatTemplate) -> str | None:
    """Compare the template of training with that in a tokenizer's folder, with which models are served.

    Returns:
        the difference, where the folder's template is like none of ours; None where they agree or the folder has none.

    Raises:
        UserError: the folder's template is like another one of ours.
    """
    own = _own_template(folder)
    if own is None:
        return None
    theirs = _as_served(own, _PROBES)
    alike = [one for one in ChatTemplate if theirs == [_as_trained(asked, one) for asked in _PROBES]]
    if template in alike:
        return None
    told = f"data.chat_template={template}: the chat template in {folder} writes chats in another way"
    if alike:
        raise UserError(f"{told}, and models are served with it; set data.chat_template={alike[0]}")
    return f"{told}, as none here does; models that are served with it are given what they were not trained on"


_ANSWERED = (Turn("system", (" short ",)), Turn("user", ("one?\n",)), Turn("assistant", ("\n\ntwo\n",)))
_PROBES = (_ANSWERED, (*_ANSWERED, Turn("user", ("three?",))))


def _as_trained(turns: Sequence[Turn], template: ChatTemplate) -> str:
    text = "".join(
        f"<|im_start|>{turn.role}\n{before}{turn.text}<|im_end|>\n" for before, turn, _ in written(turns, template)
    )
    answered = turns[-1].role == "assistant"
    return text if answered else f"{text}<|im_start|>assistant\n{generation_prompt(template)}"


def _as_served(own: str, chats: Sequence[Sequence[Turn]]) -> list[str] | None:
    """Chats as a folder's template writes them; None where that takes too long or too much memory."""
    asked = [
        {
            "messages": [{"role": turn.role, "content": turn.text} for turn in turns],
            "add_generation_prompt": turns[-1].role != "assistant",
            "enable_thinking": False,
        }
        for turns in chats
    ]
    task = json.dumps({"template": own, "asked": asked})
    done = subprocess.run([sys.executable, "-P", _RENDERER], input=task, capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else None


def _own_template(folder: str | Path) -> str | None:
    for file in (Path(folder) / name for name in _FILES):
        if file.is_file():
            text = read_settings(file, LARGEST_TEMPLATE)
            try:
                template = json.loads(text).get("chat_template") if file.suffix == ".json" else text
            except (ValueError, AttributeError):
                raise UserError(f"{file}: not a JSON object; copy the tokenizer again") from None
            if isinstance(template, list):  # several by name
                template = next((one["template"] for one in template if one.get("name") == "default"), None)
            if template:
                return template
    return None
