"""The Talker, from the Thinker's states to codes of speech. Keys have the names of the published configurations."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from omni_train.recipe.keys import Change, key
from omni_train.recipe.schema.stack import StackConfig


class TalkerStyle(StrEnum):
    """How text and speech meet in the Talker's sequence."""

    dual_track = "dual_track"  # summed at every position (Qwen3-Omni as released)
    interleaved = "interleaved"  # one stream, a position is one of the two (ARIA of Qwen3.5-Omni)


class TextEmbedding(StrEnum):
    """The table that text enters the Talker by."""

    thinker = "thinker"  # the Thinker's own, frozen
    own = "own"  # one that the Talker learns


@dataclass
class CodePredictorConfig:
    """The code predictor: a causal Transformer over the codebooks of one frame, which writes the residual codes."""

    hidden_size: int = key(1024, ge=1, help="width")
    num_hidden_layers: int = key(5, ge=1, help="layers")
    num_attention_heads: int = key(16, ge=1, help="query heads; a multiple of num_key_value_heads")
    num_key_value_heads: int = key(8, ge=1, help="key-value heads")
    head_dim: int = key(128, ge=2, help="width of a head, an even number")
    intermediate_size: int = key(3072, ge=1, help="width of the MLPs")
    rope_theta: float = key(1.0e6, gt=0, help="base of the rotary frequencies")
    rms_norm_eps: float = key(1.0e-6, gt=0, help="epsilon of the norms")


@dataclass
class TalkerConfig(StackConfig):
    """The Talker: a stack like the Thinker's over text, the Thinker's states and frames of codes, and its predictor."""

    style: TalkerStyle = key(
        TalkerStyle.interleaved,
        help="how text and speech meet: dual_track, summed at every position (Qwen3-Omni); interleaved, one stream "
        "(Qwen3.5-Omni's ARIA)",
    )
    thinker_hidden_size: int = key(ge=1, help="width of the Thinker, whose states and embeddings it reads")
    accept_hidden_layer: int = key(ge=1, help="layers of the Thinker below the states that it reads")
    projection_intermediate_size: int = key(2048, ge=1, help="width inside the projections of text and states")
    text_embedding: TextEmbedding = key(
        TextEmbedding.thinker, help="table of the text: thinker, the Thinker's, frozen; own, one that is learned"
    )
    num_code_groups: int = key(16, ge=2, help="codebooks of a frame, as many as the codec has")
    codebook_size: int = key(2048, ge=1, help="codewords of a codebook")
    codec_vocab_size: int = key(3072, ge=1, help="codewords of codebook 0 and the control codes above them")
    codec_pad_id: int = key(2148, ge=0, help="control code beside text that has no frame yet")
    codec_bos_id: int = key(2149, ge=0, help="control code before the first frame")
    codec_eos_id: int = key(2150, ge=0, help="control code after the last frame")
    codec_text_id: int = key(2151, ge=0, help="control code that asks for text, with data.speech.switch_label=code")
    codec_nothink_id: int = key(2155, ge=0, help="control codes of dual_track, before the speaker's")
    codec_think_bos_id: int = key(2156, ge=0, help="the same")
    codec_think_eos_id: int = key(2157, ge=0, help="the same")
    speaker_ids: dict[str, int] = key(
        {}, resume=Change.free, help="control code of each speaker by name, of dual_track"
    )
    code_predictor: CodePredictorConfig = key(CodePredictorConfig)
