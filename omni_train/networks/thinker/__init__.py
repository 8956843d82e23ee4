"""The Thinker: a language model with encoders for sound and vision, on the Megatron engine."""

from __future__ import annotations

from omni_train.networks.thinker.checks import check_thinker
from omni_train.recipe.networks import NetworkKeys
from omni_train.recipe.schema import EngineName

THINKER = NetworkKeys(
    name="thinker",
    engines=(EngineName.megatron,),
    rows="chats",
    parts=("thinker",),
    optional_parts=("audio", "vision"),
    check=check_thinker,
)
