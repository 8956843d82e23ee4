"""Every refusal of encoders and media settings, by its message."""

import pytest

from omni_train.errors import UserError
from omni_train.recipe.compose import load_recipe
from omni_train.recipe.validate import validate

TEXT_ONLY = "model=qwen3_5_0_8b"

# overrides of the default recipe (tiny), message
REFUSED = [
    # parts that the model does not have
    (
        f"{TEXT_ONLY} trainable=[embedding.*,audio_adapter.*]",
        "trainable: 'audio_adapter.*' is of model.audio, which model=qwen3_5_0_8b does not have; "
        "choose a model with it",
    ),
    (
        f"{TEXT_ONLY} init_parts={{vision_*:random}}",
        "init_parts: 'vision_*' is of model.vision, which model=qwen3_5_0_8b does not have; choose a model with it",
    ),
    # audio encoder
    ("model.audio.conv_channels=0", "model.audio.conv_channels=0: must be at least 1"),
    (
        "model.audio.num_attention_heads=5",
        "model.audio.hidden_size=96: not a multiple of model.audio.num_attention_heads=5; change one of the two",
    ),
    (
        "model.audio.hidden_size=99 model.audio.num_attention_heads=3",
        "model.audio.hidden_size=99: not a multiple of the two halves of its positions=2; change one of the two",
    ),
    (
        "parallel.tensor=4 model.audio.num_attention_heads=6",
        "model.audio.num_attention_heads=6: not a multiple of parallel.tensor=4; change one of the two",
    ),
    (
        "parallel.tensor=2 model.audio.intermediate_size=255",
        "model.audio.intermediate_size=255: not a multiple of parallel.tensor=2; change one of the two",
    ),
    (
        "model.audio.train_window_frames=[]",
        "model.audio.train_window_frames=[]: must not be empty",
    ),
    (
        "model.audio.train_window_frames=[800,-1]",
        "model.audio.train_window_frames[1]=-1: must be at least 0",
    ),
    (
        "model.audio.chunk_frames=100",
        "model.audio.chunk_frames=100: not a multiple of the 16 frames of a token, so that tokens are not equally "
        "long; change it or choose data.media.positions=contiguous or qwen3_omni",
    ),
    # vision encoder
    ("model.vision.depth=0", "model.vision.depth=0: must be at least 1"),
    (
        "model.vision.num_heads=5",
        "model.vision.hidden_size=96: not a multiple of 4·model.vision.num_heads=20; change one of the two",
    ),
    (
        "model.vision.num_heads=16",
        "model.vision.hidden_size=96: not a multiple of 4·model.vision.num_heads=64; change one of the two",
    ),
    (
        "parallel.tensor=4 model.vision.num_heads=6",
        "model.vision.num_heads=6: not a multiple of parallel.tensor=4; change one of the two",
    ),
    (
        "model.vision.num_position_embeddings=65",
        "model.vision.num_position_embeddings=65: not the number of places of a square table",
    ),
    *(
        (
            f"model.vision.deepstack_visual_indexes={levels}",
            f"model.vision.deepstack_visual_indexes={shown}: must be rising layers from 0 to below "
            "model.vision.depth=2",
        )
        for levels, shown in (("[1,0]", [1, 0]), ("[1,1]", [1, 1]), ("[2]", [2]), ("[-1]", [-1]))
    ),
    (
        "model.vision.depth=4 model.vision.deepstack_visual_indexes=[0,1,3] parallel.pipeline=4",
        "model.vision.deepstack_visual_indexes=[0, 1, 3]: 3 layers of the language model take them, but 2 are on the "
        "first pipeline stage; lower parallel.pipeline or virtual_pipeline",
    ),
    (
        "model.vision.deepstack_visual_indexes=[0,1] parallel.pipeline=2 model.thinker.repeats=1 "
        "model.thinker.pattern=GE|GEGE*E",
        "model.vision.deepstack_visual_indexes=[0, 1]: 2 layers of the language model take them, but 1 are on the "
        "first pipeline stage; lower parallel.pipeline or virtual_pipeline",
    ),
    # media
    ("data.media.video_fps=0", "data.media.video_fps=0.0: must be above 0"),
    ("data.media.max_audio_seconds=0", "data.media.max_audio_seconds=0.0: must be above 0"),
    ("data.media.max_source_frames=0", "data.media.max_source_frames=0: must be at least 1"),
    ("data.media.max_media=0", "data.media.max_media=0: must be at least 1"),
    ("data.max_sample_bytes=0", "data.max_sample_bytes=0: must be at least 1"),
    ("data.max_text_bytes=0", "data.max_text_bytes=0: must be at least 1"),
    ("data.media.video_min_frames=0", "data.media.video_min_frames=0: must be at least 1"),
    (
        "data.media.image_min_pixels=5000 data.media.image_max_pixels=4999",
        "data.media.image_min_pixels=5000: above data.media.image_max_pixels=4999; lower it",
    ),
    (
        "data.media.video_min_pixels=5000 data.media.video_max_pixels=4999",
        "data.media.video_min_pixels=5000: above data.media.video_max_pixels=4999; lower it",
    ),
    (
        "data.media.video_min_frames=9 data.media.video_max_frames=8",
        "data.media.video_min_frames=9: above data.media.video_max_frames=8; lower it",
    ),
    (
        "data.media.image_min_pixels=1 data.media.image_max_pixels=1023",
        "data.media.image_max_pixels=1023: less than the 1024 pixels of one token; raise it",
    ),
    *(
        (
            f"data.media.audio_timestamp_seconds={given}",
            f"data.media.audio_timestamp_seconds={shown}: must be two rising numbers above 0, or empty for none",
        )
        for given, shown in (("[10]", [10.0]), ("[30,10]", [30.0, 10.0]), ("[0,10]", [0.0, 10.0]))
    ),
    (
        "data.media.positions=qwen3_omni",
        "data.media.video_timestamps=True: data.media.positions=qwen3_omni has none; set false",
    ),
    (
        "data.media.positions=qwen3_omni data.media.video_timestamps=false",
        "data.media.audio_timestamp_seconds=[10.0, 30.0]: data.media.positions=qwen3_omni has none; set []",
    ),
    (
        "data.media.positions=qwen3_omni data.media.video_timestamps=false data.media.audio_timestamp_seconds=[]",
        "data.media.positions=qwen3_omni: has 13 ids a second, the audio tokens of 3 convolutions over chunks of 100 "
        "frames, and model.audio makes others; choose absolute or contiguous",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_cannot_work_is_refused_in_one_line(overrides, message):
    recipe = load_recipe(overrides.split(" "))
    with pytest.raises(UserError) as error:
        validate(recipe, world_size=None)
    assert str(error.value) == message


def test_deepstack_fits_where_its_layers_are_on_the_first_stage():
    levels = ["model.vision.depth=4", "model.vision.deepstack_visual_indexes=[0,1,3]"]
    validate(load_recipe([*levels, "parallel.pipeline=2"]), world_size=2)
    marked = ["model.thinker.repeats=1", "model.thinker.pattern=GEGE*E|*E", "parallel.pipeline=2"]
    validate(load_recipe([*levels, *marked]), world_size=2)


def test_chunks_that_do_not_divide_are_for_positions_that_do_not_need_them():
    released = ["model.audio.num_convolutions=3", "model.audio.chunk_frames=100"]
    validate(load_recipe([*released, "data.media.positions=contiguous"]), world_size=1)
