"""States of a Thinker beside the samples whose context they are of: whose they are, and how they were made.

``omni-train data states`` writes ``key.states.npy`` and, in the folder, ``states.json``: the content hash of the
Thinker's part below the states, for the folder and for each of its shards, and the settings that decide which positions
are read and what the Thinker hears and sees.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omni_train.data.rows.codes import read_record
from omni_train.data.samples.files import read_regular
from omni_train.data.samples.tokenizer import LARGEST_TOKENIZER
from omni_train.errors import UserError
from omni_train.recipe.schema import Recipe, required

RECORD = "states.json"
COMMAND = "`omni-train data states out=DIR …`"


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Settings that decide a sample's states, by dotted key, as JSON gives them back.

    Bounds beyond which a sample is refused are none of them.
    """
    tokenizer = read_regular(Path(recipe.data.tokenizer) / "tokenizer.json", LARGEST_TOKENIZER)
    data, talker, model = recipe.data, required(recipe.model.talker), recipe.model
    media = {key: value for key, value in asdict(data.media).items() if not key.startswith("max_")}
    groups = {"data.media": media} | {
        f"model.{part}": asdict(encoder) for part in ("audio", "vision") if (encoder := getattr(model, part))
    }
    found = {
        "model.talker.style": talker.style,
        "model.talker.accept_hidden_layer": talker.accept_hidden_layer,
        "data.speech.context": data.speech.context,
        "data.speech.max_media_positions": data.speech.max_media_positions,
        "data.chat_template": data.chat_template,
        "data.row_tokens": data.row_tokens,  # which videos share
        "data.tokenizer": hashlib.sha256(tokenizer).hexdigest(),
        "precision": recipe.precision,
    }
    found |= {f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()}
    return json.loads(json.dumps(found))


def records(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Record of the states of each source, by its path.

    Raises:
        UserError: a source has none.
    """
    found = {}
    for source in recipe.data.sources:
        try:
            record = read_record(source.path, RECORD)
            found[source.path] = {key: record[key] for key in ("thinker", "checkpoint", "settings", "shards")}
        except (OSError, ValueError, LookupError, TypeError):
            raise UserError(f"data.sources: {source.path} has no states; make them with {COMMAND}") from None
    return found


def check_states(recipe: Recipe, thinker: str) -> None:
    """Refuse sources without states, or with others than the recipe's Thinker would give with its settings.

    Args:
        recipe: of rows of speech with stored states.
        thinker: content hash of its Thinker.

    Raises:
        UserError: the first thing found, in one line.
    """
    wanted = settings_of(recipe)
    for path, record in records(recipe).items():
        settings = record["settings"]
        for key in sorted(wanted.keys() | settings.keys()):
            if wanted.get(key) != settings.get(key):
                raise UserError(
                    f"{key}={_shown(wanted.get(key))}: the states in {path} were made with "
                    f"{_shown(settings.get(key))}; set that, or make them anew with {COMMAND}"
                )
        for place, found in {"": record["thinker"], **record["shards"]}.items():
            if found != thinker:
                raise UserError(
                    f"talker_training.thinker={recipe.talker_training.thinker}: the states in "
                    f"{path}{place and '/' + place} are of another Thinker, {found[:12]}… and not {thinker[:12]}…; "
                    f"name that one, or make them anew with {COMMAND}"
                )


def _shown(value: Any) -> str:
    """Value of a key in a message; of a hash its beginning."""
    text = "null" if value is None else str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
