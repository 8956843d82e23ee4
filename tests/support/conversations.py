"""Small random Qwen3-Omni and Qwen3.5 models of transformers with their encoders, and conversations of all media."""

from __future__ import annotations

from math import prod

import torch
from torch.nn.utils.rnn import pad_sequence

from omni_train.data.rows.batch import IGNORE, PackedBatch
from omni_train.data.samples.lengths import audio_tokens
from omni_train.data.samples.positions import IMAGE_PAD, VIDEO_PAD, Block, Frame, Run, Stretch, Text, rotary_ids
from omni_train.recipe.schema import AudioEncoderConfig, Positions

WORDS = 100  # ids from here on are marks and pads
AUDIO_START, AUDIO_END, AUDIO, IMAGE, VIDEO, VISION_START, VISION_END = range(WORDS, WORDS + 7)
IM_START, IM_END, TTS_PAD, TTS_BOS, TTS_EOS = range(WORDS + 7, WORDS + 12)
ROLES = {"system": 90, "user": 91, "assistant": 92}
LINE_END = 93
MEL_BINS, PATCH = 20, 4
CODEBOOKS, CODEWORDS = 5, 23
HIDDEN = 40
VISION = dict(
    depth=4,
    hidden_size=24,
    intermediate_size=36,
    num_heads=2,
    patch_size=PATCH,
    num_position_embeddings=25,
    out_hidden_size=HIDDEN,
)
TEXT = dict(vocab_size=112, hidden_size=HIDDEN, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
VISION_IDS = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END
)


def qwen3_5(format: str):
    """A whole Qwen3.5, MoE or dense, with its vision encoder."""
    import transformers

    text = dict(
        **TEXT,
        num_hidden_layers=4,
        head_dim=20,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=12,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"] * 2,
        rope_parameters={"rope_type": "default", "rope_theta": 3000.0, "mrope_section": [3, 3, 2]}
        | {"partial_rotary_factor": 0.8, "mrope_interleaved": True},
    )
    if format == "qwen3_5_moe":
        text |= EXPERTS | dict(shared_expert_intermediate_size=20)
        config = transformers.Qwen3_5MoeConfig(text_config=text, vision_config=VISION, **VISION_IDS)
        return randomized(transformers.Qwen3_5MoeForConditionalGeneration, config)
    text |= dict(intermediate_size=52)
    config = transformers.Qwen3_5Config(text_config=text, vision_config=VISION, **VISION_IDS, tie_word_embeddings=True)
    return randomized(transformers.Qwen3_5ForConditionalGeneration, config)


def qwen3_omni():
    """A whole Qwen3-Omni: Thinker with both encoders, Talker, Code2Wav."""
    import transformers

    text = TEXT | EXPERTS | dict(num_hidden_layers=4, intermediate_size=32)
    rope = {"rope_type": "default", "rope_theta": 3000.0, "mrope_section": [4, 3, 3], "mrope_interleaved": True}
    audio = dict(
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=36,
        d_model=28,
        output_dim=HIDDEN,
        downsample_hidden_size=6,
        num_mel_bins=MEL_BINS,
        n_window_infer=200,
    )
    thinker = dict(
        text_config=text | dict(head_dim=20, rope_parameters=rope),
        audio_config=audio,
        vision_config=VISION | dict(deepstack_visual_indexes=[0, 2]),
        audio_start_token_id=AUDIO_START,
        audio_end_token_id=AUDIO_END,
        audio_token_id=AUDIO,
        position_id_per_seconds=13,
        **VISION_IDS,
    )
    talker = dict(
        text_config=TEXT
        | dict(vocab_size=40, hidden_size=32, head_dim=12, intermediate_size=44, num_hidden_layers=4)
        | dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=16)
        | dict(norm_topk_prob=True, rope_parameters=rope | dict(mrope_section=[2, 2, 2])),
        code_predictor_config=TEXT
        | dict(vocab_size=CODEWORDS, hidden_size=32, head_dim=8, intermediate_size=36, num_hidden_layers=2)
        | dict(num_code_groups=CODEBOOKS, rope_parameters={"rope_type": "default", "rope_theta": 700.0}),
        thinker_hidden_size=HIDDEN,
        num_code_groups=CODEBOOKS,
        accept_hidden_layer=2,  # DeepStack adds to the output of the layer that ends there, but not to its state
        speaker_id={"anna": 33, "ben": 34},
        codec_eos_token_id=24,
        codec_pad_id=25,
        codec_bos_id=26,
        codec_nothink_id=27,
        codec_think_bos_id=28,
        codec_think_eos_id=29,
        spatial_merge_size=2,
        audio_start_token_id=AUDIO_START,
        audio_token_id=AUDIO,
        position_id_per_seconds=13,
        **{key: VISION_IDS[key] for key in ("image_token_id", "video_token_id", "vision_start_token_id")},
    )
    code2wav = dict(
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
        num_hidden_layers=1,
        num_quantizers=CODEBOOKS,
        upsample_rates=[2, 2],
        upsampling_ratios=[2],
        decoder_dim=16,
        codebook_size=CODEWORDS,
    )
    ids = dict(im_start_token_id=IM_START, im_end_token_id=IM_END)
    ids |= dict(tts_pad_token_id=TTS_PAD, tts_bos_token_id=TTS_BOS, tts_eos_token_id=TTS_EOS)
    ids |= {f"{role}_token_id": token for role, token in ROLES.items()}
    config = transformers.Qwen3OmniMoeConfig(
        thinker_config=thinker, talker_config=talker, code2wav_config=code2wav, **ids
    )
    return randomized(transformers.Qwen3OmniMoeForConditionalGeneration, config)


def randomized(kind: type, config, seed: int = 11):
    """A model whose every parameter is random, norms and biases too, so that one mapped wrongly shows."""
    torch.manual_seed(seed)
    model, generator = kind(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            elif "conv1d" not in name:
                parameter.copy_(0.15 * noise)
    return model.eval()


class Conversation:
    """Text and media one after the other, with random words, sound and pixels.

    Args:
        style: of the rotary ids.
        seed: of everything random.
    """

    def __init__(self, style: Positions, seed: int) -> None:
        self.style, self.generator = style, torch.Generator().manual_seed(seed)
        self.runs: list[Run] = []
        self.marks: dict[int, int] = {}  # place -> token
        self.clips: list[torch.Tensor] = []  # (F, M) each
        self.images: list[bool] = []  # of each grid: an image, not a video
        self.grids: list[tuple[int, int, int]] = []
        self.seconds: list[float] = []  # of a temporal patch of each video
        self.patches: list[torch.Tensor] = []  # (P, D) of each grid
        self.sound_in_video = False
        self.turns: list[tuple[str, int, int]] = []  # role, and index of its first token and run

    @property
    def length(self) -> int:
        return sum(run.length for run in self.runs)

    def turn(self, role: str) -> Conversation:
        """Begin a turn, which ends the one before."""
        if self.turns:
            self._mark([IM_END, LINE_END])
        self.turns.append((role, self.length, len(self.runs)))
        return self._mark([IM_START, ROLES[role], LINE_END])

    def text(self, length: int) -> Conversation:
        self.runs.append(Text(length))
        return self

    def sound(self, frames: int) -> Conversation:
        return self._marked([AUDIO_START], Stretch(self._clip(frames)), [AUDIO_END])

    def image(self, height: int, width: int) -> Conversation:
        self._grid((1, height, width), image=True)
        return self._marked([VISION_START], Frame(IMAGE_PAD, height // 2, width // 2), [VISION_END])

    def video(self, grid: tuple[int, int, int], seconds: float, frames: int = 0) -> Conversation:
        """As Qwen3-Omni has it, with sound of that many mel frames."""
        self._grid(grid)
        self.seconds.append(seconds)
        self.sound_in_video |= frames > 0
        block = Block(grid[0], grid[1] // 2, grid[2] // 2, seconds, self._clip(frames) if frames else 0)
        marks = [[VISION_START, AUDIO_START], [AUDIO_END, VISION_END]] if frames else [[VISION_START], [VISION_END]]
        return self._marked(marks[0], block, marks[1])

    def timed_video(self, grid: tuple[int, int, int]) -> Conversation:
        """As Qwen3.5 has it, with text before each temporal patch."""
        self._grid(grid)
        for _ in range(grid[0]):
            self.text(5)._marked([VISION_START], Frame(VIDEO_PAD, grid[1] // 2, grid[2] // 2), [VISION_END])
        return self

    def _marked(self, before: list[int], run: Run, after: list[int]) -> Conversation:
        self._mark(before).runs.append(run)
        return self._mark(after)

    def _mark(self, tokens: list[int]) -> Conversation:
        self.marks |= dict(enumerate(tokens, start=self.length))
        self.runs.append(Text(len(tokens)))
        return self

    def _clip(self, frames: int) -> int:
        self.clips.append(torch.randn(frames, MEL_BINS, generator=self.generator))
        return audio_tokens(frames, AudioEncoderConfig(num_convolutions=3, chunk_frames=100))

    def _grid(self, grid: tuple[int, int, int], image: bool = False) -> None:
        self.grids.append(grid)
        self.images.append(image)
        shape = (prod(grid), 3 * 2 * PATCH**2)
        self.patches.append(torch.randint(256, shape, generator=self.generator, dtype=torch.uint8))

    def tokens_and_ids(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(n,) tokens and (3, n) rotary ids."""
        ids, kinds, found = rotary_ids(self.runs, self.style)
        numbers = {"<|audio_pad|>": AUDIO, "<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO}
        pads = torch.tensor([-1, *(numbers[pad.token] for pad in found)])[torch.from_numpy(kinds).long()]
        words = torch.randint(WORDS, pads.shape, generator=torch.Generator().manual_seed(len(pads)))
        for place, mark in self.marks.items():
            words[place] = mark
        return torch.where(pads < 0, words, pads), torch.from_numpy(ids)

    def reference(self, model) -> torch.Tensor:
        """(n, V) logits of transformers, which makes its own rotary ids."""
        inputs = self.inputs()
        if self.style is Positions.contiguous:
            tokens = inputs["input_ids"]
            return model(**inputs, mm_token_type_ids=((tokens == IMAGE) + 2 * (tokens == VIDEO)).int()).logits[0]
        return model.thinker(**inputs, use_audio_in_video=self.sound_in_video).logits[0]

    def inputs(self) -> dict[str, torch.Tensor]:
        """What transformers' models take."""
        tokens, _ = self.tokens_and_ids()
        inputs = {"input_ids": tokens[None], "attention_mask": torch.ones_like(tokens)[None]}
        for kind, name in ((True, "pixel_values"), (False, "pixel_values_videos")):
            mine = [i for i, image in enumerate(self.images) if image == kind]
            if mine:
                inputs[name] = torch.cat([self.patches[i] for i in mine]).float() / 127.5 - 1
                inputs["image_grid_thw" if kind else "video_grid_thw"] = torch.tensor([self.grids[i] for i in mine])
        if self.clips:
            lengths = torch.tensor([len(clip) for clip in self.clips])
            inputs["input_features"] = pad_sequence(self.clips, batch_first=True).transpose(1, 2)
            inputs["feature_attention_mask"] = (torch.arange(lengths.max()) < lengths[:, None]).long()
        if self.seconds and self.style is Positions.qwen3_omni:
            inputs["video_second_per_grid"] = torch.tensor(self.seconds)
        return inputs


def packed(conversations: list[Conversation], row_tokens: int, alignment: int = 8) -> PackedBatch:
    """A row of conversations, every word of which is learned; no marks and no media."""
    tokens = torch.zeros(row_tokens, dtype=torch.long)
    labels = torch.full((row_tokens,), IGNORE)
    ids = torch.zeros(3, row_tokens)
    padding = torch.ones(row_tokens, dtype=torch.bool)
    boundaries = [0]
    for conversation in conversations:
        mine, mine_ids = conversation.tokens_and_ids()
        here = slice(boundaries[-1], boundaries[-1] + len(mine))
        tokens[here], ids[:, here], padding[here] = mine, mine_ids.float(), False
        labels[here] = following(mine)
        boundaries.append(-(-here.stop // alignment) * alignment)
    clips = [clip for conversation in conversations for clip in conversation.clips]
    patches = [patch for conversation in conversations for patch in conversation.patches]
    return PackedBatch(
        tokens=tokens,
        labels=labels,
        loss_weights=(labels != IGNORE).float(),
        position_ids=ids if conversations[0].style is Positions.qwen3_omni else ids.long(),
        cu_seqlens=torch.tensor([*boundaries, row_tokens], dtype=torch.int32),
        padding=padding,
        samples=len(conversations),
        mel=torch.cat(clips) if clips else torch.zeros(0, MEL_BINS),
        mel_cu_seqlens=torch.tensor([0, *map(len, clips)]).cumsum(0).int(),
        audio_slots=(tokens == AUDIO).nonzero().squeeze(1),
        patches=torch.cat(patches),
        grid_thw=torch.tensor([grid for conversation in conversations for grid in conversation.grids]),
        vision_slots=((tokens == IMAGE) | (tokens == VIDEO)).nonzero().squeeze(1),
    )


def following(tokens: torch.Tensor) -> torch.Tensor:
    """(n,) labels: each token's successor where that is a word."""
    labels = torch.cat([tokens[1:], torch.tensor([IGNORE])])
    return labels.masked_fill(labels >= WORDS, IGNORE)
