"""``key=value`` arguments of the commands that need no recipe: the parameters of a function, by name and type."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omni_train.errors import UserError

_TRUTH = {"true": True, "false": False}


def call(program: str, actions: Mapping[str, Callable[[], Callable]], arguments: Sequence[str]) -> int:
    """Run ``program <action> key=value …`` and return the exit code.

    Args:
        program: words before the action, for messages.
        actions: name -> a loader that imports and returns the function. Its parameters are the keys; their annotations
            (str, int, float, bool, Path, or one of these and None) are the types, and those with defaults are optional.
            The fields of a parameter that is a dataclass are keys too, as ``parameter.field``. One that takes any other
            keyword (``**words: str``) gets all other keys.
        arguments: the action and its ``key=value`` words, or ``--help``.

    Raises:
        UserError: the action or a key is unknown, a key is given twice or missing, or a value is of another type.
    """
    words = [word for word in arguments if word not in ("-h", "--help")]
    wants_help = len(words) < len(arguments)
    if not words:
        if wants_help:
            print("\n".join(f"{program} {_usage(name, load())}" for name, load in actions.items()))
            return 0
        raise UserError(f"{program} needs one of {', '.join(actions)}")
    name, *pairs = words
    if name not in actions:
        raise UserError(f"{program} {name} does not exist; choose one of {', '.join(actions)}")
    function = actions[name]()
    if wants_help:
        print(f"{program} {_usage(name, function)}\n\n{inspect.getdoc(function) or ''}")
        return 0
    function(**parse(f"{program} {name}", function, pairs))
    return 0


def _usage(command: str, function: Callable) -> str:
    words, types = [command], _types(function)
    for key, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            words.append("[key=value …]")
            continue
        if dataclasses.is_dataclass(types[key]):
            words.append(f"[{key}.{{{','.join(get_type_hints(types[key]))}}}=…]")
        else:
            words.append(f"{key}=…" if parameter.default is parameter.empty else f"[{key}={parameter.default}]")
    return " ".join(words)


def parse(command: str, function: Callable, pairs: Iterable[str]) -> dict[str, Any]:
    """Arguments of a function that ``key=value`` words give it.

    Args:
        command: words before them, for messages.
        function: as :func:`call` describes it; it is not called.
        pairs: the ``key=value`` words.

    Raises:
        UserError: a key is unknown, given twice or missing, or a value is of another type.
    """
    usage = _usage(command, function)
    parameters = inspect.signature(function).parameters
    others = {key for key, parameter in parameters.items() if parameter.kind is parameter.VAR_KEYWORD}
    types = {key: kind for key, kind in _types(function).items() if key not in others}
    groups = {key: kind for key, kind in types.items() if dataclasses.is_dataclass(kind)}
    for key, group in groups.items():
        del types[key]
        types |= {f"{key}.{field}": kind for field, kind in get_type_hints(group).items()}
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if key not in types and not others:
            near = difflib.get_close_matches(key, types, n=1)
            raise UserError(
                f"{key} is not an argument; " + (f"did you mean {near[0]}=?" if near else f"usage: {usage}")
            )
        if not equals or not text:
            raise UserError(f"{key} has no value; write {key}=…")
        if key in values:
            raise UserError(f"{key} is given twice; keep one")
        values[key] = _convert(key, text, types.get(key, str))
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in values and key not in others:
            raise UserError(f"{key}= is missing; usage: {usage}")
    for key, group in groups.items():
        fields = {name: values.pop(f"{key}.{name}") for name in get_type_hints(group) if f"{key}.{name}" in values}
        if fields:
            values[key] = group(**fields)
    return values


def _types(function: Callable) -> dict[str, Any]:
    """Type of each parameter of a function; str where it has no annotation, the type where that is a type or None."""
    hints = get_type_hints(function)
    annotations = {key: hints.get(key, str) for key in inspect.signature(function).parameters}
    return {
        key: next((kind for kind in get_args(annotation) if kind is not type(None)), annotation)
        for key, annotation in annotations.items()
    }


def _convert(key: str, text: str, kind: Any) -> Any:
    try:
        if kind is bool:
            return _TRUTH[text.lower()]
        return kind(text) if kind in (int, float, Path) else text
    except (ValueError, KeyError):
        raise UserError(f"{key}={text}: expected {'true or false' if kind is bool else kind.__name__}") from None
