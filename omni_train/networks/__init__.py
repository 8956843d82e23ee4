"""Table of the networks that a run can train, each of which has a module of its own."""

from omni_train.networks.codec import CODE2WAV, CODEC
from omni_train.networks.recognizer import RECOGNIZER
from omni_train.networks.talker import TALKER
from omni_train.networks.thinker import THINKER
from omni_train.recipe.networks import register

for network in (THINKER, TALKER, RECOGNIZER, CODEC, CODE2WAV):
    register(network)
