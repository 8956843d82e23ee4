"""Errors of Hydra and OmegaConf as one line that a person can act on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from omni_train.errors import UserError, first_line
from omni_train.recipe.extensions import recipe_type
from omni_train.recipe.keys import described
from omni_train.recipe.old_names import key_of_today

_HELP = "omni-train train --help lists them"

# Hydra's own sentences that need another remedy here: pattern of the first line -> what to say.
_SENTENCES = (
    (r"Ambiguous value for argument '(.+)'", r"\1: several values; write [a,b] for a list, or add --multirun"),
    (r"Multiple values for ([\w/]+)\. .* '.+: (\S+)'", r"\1 is already chosen; write \1=\2 without +"),
    (r"Could not append to config\. An item is already at '(.+)'", r"\1 is a key of the recipe; write it without +"),
    (r"Config group override must be .* Got (\w+)", rf"a group takes the name of a recipe, not \1; {_HELP}"),
    (r".*Missing mandatory value: (\S+)", r"\1 has no value; give it: \1=…"),
)


def unknown_key(key: str) -> UserError:
    """Error of a ``key`` that is not in the schema; it names those that may be meant."""
    keys = described(recipe_type())
    if (today := key_of_today(key)) in keys:
        return UserError(f"{key} is not a key of the recipe; it is {today} now")
    near = [name for name in keys if name.endswith(f".{key}")] or difflib.get_close_matches(key, keys, n=1)
    remedy = f"did you mean {' or '.join(near)}?" if near else _HELP
    return UserError(f"{key} is not a key of the recipe; {remedy}")


def one_line(error: BaseException) -> UserError:
    """``UserError`` of one line for an error of composing a recipe.

    An error that comes from neither Hydra nor OmegaConf is a defect of ours, and is raised again as it is.
    """
    chain = list(_chain(error))
    for cause in chain:
        if isinstance(cause, UserError):
            return cause
        if isinstance(cause, OverrideParseException):
            return UserError(_no_override(cause.override))
        if isinstance(cause, MissingConfigException) and cause.options is not None:
            group, _, option = (cause.missing_cfg_file or "").rpartition("/")
            return UserError(f"{group}={option}: no such recipe; choose one of {', '.join(sorted(cause.options))}")
        if isinstance(cause, ConfigAttributeError | ConfigKeyError):
            return unknown_key(_full_key(cause, error))
        if isinstance(cause, MissingMandatoryValue) and cause.full_key:
            return UserError(f"{cause.full_key} has no value; give it: {cause.full_key}=…")
    for cause in chain:
        sentence = _sentence(cause)
        for pattern, message in _SENTENCES:
            if match := re.match(pattern, sentence):
                return UserError(match.expand(message))
    for cause in chain:
        if isinstance(cause, OmegaConfBaseException):
            return UserError(f"{_full_key(cause, error)}: {_sentence(cause)}")
    if isinstance(error, HydraException | ValueError):
        return UserError(_sentence(error))
    raise error


def _no_override(word: str) -> str:
    single_value = r"([+~]*[\w./@]+)=([^\[\]{}()'\"]+)"  # with characters that Hydra has other uses for
    if match := re.fullmatch(single_value, word):
        return f"{word!r} is not an override; put its value in quotes: '{match[1]}=\"{match[2]}\"'"
    return f"{word!r} is not an override; write key=value, group=option or key=[a,b]"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _full_key(cause: OmegaConfBaseException, error: BaseException) -> str:
    """Key of an error, from the root of the recipe: OmegaConf names it from the entry of a list, Hydra the list."""
    key = re.sub(r"\[\d+\]", "", cause.full_key or str(cause.key or ""))
    override = re.search(r"override '?[~+]*([\w./]+)", str(error))
    if override and override[1].startswith(f"{key}."):  # OmegaConf stops where the path leaves the schema
        return override[1]
    if override and not key.startswith(override[1]):
        return f"{override[1]}.{key}".rstrip(".")
    return key


def _sentence(error: BaseException) -> str:
    return first_line(error).rstrip(".")
