"""Token counts against the released formulas."""

import math
import random

from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import _get_feat_extract_output_lengths

from omni_train.data.samples.lengths import audio_tokens, vision_tokens
from omni_train.recipe.schema import AudioEncoderConfig, VisionEncoderConfig

SIZES = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)


def lengths() -> list[int]:
    return [0, 1, 99, 100, 101, 799, 800, 801, *random.Random(5).sample(range(2, 400000), 200)]


def test_three_convolutions_on_chunks_of_a_second_give_the_tokens_of_qwen3_omni():
    audio = AudioEncoderConfig(**SIZES, num_convolutions=3, chunk_frames=100)
    for frames in lengths():
        assert audio_tokens(frames, audio) == _get_feat_extract_output_lengths(frames)


def test_four_convolutions_give_one_token_for_every_begun_160_ms():
    audio = AudioEncoderConfig(**SIZES)
    for frames in lengths():
        assert audio_tokens(frames, audio) == math.ceil(frames / 16)


def test_vision_tokens_are_merged_patches():
    vision = VisionEncoderConfig(hidden_size=8, depth=1, num_heads=1, intermediate_size=8)
    assert vision_tokens((3, 14, 20), vision) == 3 * 14 * 20 // 4
