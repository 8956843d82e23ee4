"""Speech recognizer: the audio encoder with an autoregressive text decoder, which is how the encoder is pre-trained.

Qwen3.5-Omni's AuT learns "as an attention encoder-decoder" (technical report, section 2.1); the decoder's shape is not
published. Ours is the causal Transformer of Vaswani et al. (2017) with its norms in front, as Whisper has it (Radford
et al. 2022). No later stage needs it, and it is small beside the encoder: it is not tensor-parallel.

Axis letters: F mel frames, M mel bins, A audio tokens, D decoder tokens, T any tokens, N sequences, L the longest of
them, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_train import platform
from omni_train.data.rows.batch import IGNORE, PackedBatch
from omni_train.data.samples.lengths import audio_tokens
from omni_train.models.audio_encoder import AudioEncoder, sinusoids
from omni_train.models.config import lone_encoder_config, params_dtype
from omni_train.nn.cross_decoder import DecoderLayer, EncoderOutput, KVCache, Spans
from omni_train.nn.cross_entropy import chunked_cross_entropy
from omni_train.nn.ctc import CTCHead
from omni_train.nn.recompute import checkpoint
from omni_train.recipe.schema import Recipe, Recompute


@dataclass
class Utterances:
    """Inputs and labels of a row of transcribed clips."""

    mel: Tensor  # (F, M)
    mel_cu_seqlens: Tensor  # (N+1,) boundaries of the clips in `mel`, on the CPU
    tokens: Tensor  # (D,) int64: decoder inputs, `<|im_start|>` and then the transcript of each clip
    labels: Tensor  # (D,) int64: the token after each
    lengths: list[int]  # decoder tokens of each clip
    transcripts: list[Tensor] | None = None  # token ids of each clip for CTC, on the CPU

    @classmethod
    def from_batch(cls, batch: PackedBatch) -> Utterances:
        """Utterances of a packed row, on this process's device. Tokens with a label are the decoder's."""
        predicts_T = batch.labels != IGNORE
        clips = torch.bucketize(predicts_T.nonzero().squeeze(1), batch.cu_seqlens[1:], right=True)
        device = platform.device()
        return cls(
            mel=batch.mel.to(device, non_blocking=True),
            mel_cu_seqlens=batch.mel_cu_seqlens,
            tokens=batch.tokens[predicts_T].to(device, non_blocking=True),
            labels=batch.labels[predicts_T].to(device, non_blocking=True),
            lengths=torch.bincount(clips).tolist(),
        )


@dataclass
class RecognizerOutput:
    """Losses of the recognizer under teacher forcing."""

    loss: Tensor  # scalar fp32: cross-entropy summed over all labels, in nats
    correct: Tensor | None  # (D,) bool: the label had the highest logit; None in training
    ctc_losses: Tensor | None  # (N,) fp32 in nats, 0 where a clip cannot be aligned; None without that head
    audio_lengths: list[int]  # audio tokens of each clip


class TiedEmbedding(torch.nn.Module):
    """Tied token embedding and output head (Press and Wolf 2017).

    One module owns the matrix and all its uses, so that ZeRO 3 knows when it is needed.

    Args:
        vocab_size: V.
        hidden_size: H.
        chunk_tokens: positions whose logits exist at once in the loss.
        where: device and dtype of the matrix.
    """

    def __init__(self, vocab_size: int, hidden_size: int, chunk_tokens: int, where: dict) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(vocab_size, hidden_size, **where))
        torch.nn.init.normal_(self.weight, std=hidden_size**-0.5)
        self.chunk_tokens = chunk_tokens

    def forward(self, x: Tensor, labels_T: Tensor | None = None):
        """Embeddings of token ids, logits of hidden states, or the loss of hidden states with labels.

        Args:
            x: (T,) ids, or (T, H) hidden states.
            labels_T: the token that each hidden state is to predict.

        Returns:
            for ids: (T, H) embeddings, scaled by √H (Vaswani et al. 2017, section 3.4); for hidden states: (T, V)
            logits; with labels: the summed cross-entropy in nats, and (T,) bool whether the label had the highest
            logit, None in training.
        """
        if not x.is_floating_point():
            return F.embedding(x, self.weight) * self.weight.shape[1] ** 0.5
        if labels_T is None:
            return F.linear(x, self.weight)
        weights_T = torch.ones_like(labels_T, dtype=torch.float32)
        loss, _ = chunked_cross_entropy(x, self.weight, labels_T, weights_T, chunk_tokens=self.chunk_tokens)
        if self.training:
            return loss, None
        best = [F.linear(part, self.weight).argmax(1) for part in x.detach().split(self.chunk_tokens)]
        return loss, torch.cat(best) == labels_T


class AudioDecoder(torch.nn.Module):
    """Text decoder: embeddings with sinusoidal positions, decoder layers, a norm and the tied head.

    Args:
        recipe: one with `model.recognizer`.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        config, where = recipe.model.recognizer, _where(recipe)
        self.table = TiedEmbedding(recipe.model.vocab_size, config.hidden_size, recipe.loss_chunk_tokens, where)
        sizes = (config.hidden_size, config.num_attention_heads, config.intermediate_size)
        self.layers = torch.nn.ModuleList(
            DecoderLayer(*sizes, recipe.model.audio.hidden_size, where) for _ in range(config.num_hidden_layers)
        )
        for linear in (module for module in self.modules() if isinstance(module, torch.nn.Linear)):
            torch.nn.init.normal_(linear.weight, std=recipe.model.initializer_range)
            torch.nn.init.zeros_(linear.bias)
        self.final_norm = torch.nn.LayerNorm(config.hidden_size, **where)
        self.hidden_size = config.hidden_size  # under ZeRO 3 a parameter shows its shape in its own module alone
        self.recompute = recipe.recompute is Recompute.full

    def forward(
        self,
        tokens_D: Tensor,
        spans: Spans,
        encoder_output: EncoderOutput,
        labels_D: Tensor | None = None,
        caches: list[KVCache] | None = None,
    ):
        """Logits of the next tokens, or their loss.

        Args:
            tokens_D: sequence after sequence; with `caches` the next token of each hypothesis.
            spans: decoder tokens of each clip.
            encoder_output: the encoded clips.
            labels_D: the token after each.
            caches: KV cache of each layer, for decoding.

        Returns:
            (D, V) logits; with labels the summed loss and what is correct, as :meth:`TiedEmbedding.forward` says.
        """
        first = caches[0].length if caches else 0
        positions_LH = sinusoids(first + spans.longest, self.hidden_size, tokens_D.device)
        x = self.table(tokens_D)
        x = x + positions_LH[spans.offsets if caches is None else [first]].to(x.dtype)
        for index, layer in enumerate(self.layers):
            if self.recompute and self.training:
                x = checkpoint(layer, x, spans, encoder_output)
            else:
                x = layer(x, spans, encoder_output, caches[index] if caches else None)
        return self.table(self.final_norm(x), labels_D)


class SpeechRecognizer(torch.nn.Module):
    """Encoder-decoder speech recognizer: a loss under teacher forcing, or transcripts step by step.

    Its `audio_encoder` is the Thinker's, by class and by the names of its parameters. Process groups must exist.

    Args:
        recipe: a validated recipe with `model.audio` and `model.recognizer`.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        model = recipe.model
        self.audio_encoder = AudioEncoder(model.audio, lone_encoder_config(recipe))
        self.audio_decoder = AudioDecoder(recipe)
        self.ctc_head = None
        if model.recognizer.ctc:
            self.ctc_head = CTCHead(model.audio.hidden_size, model.vocab_size, recipe.loss_chunk_tokens, _where(recipe))

    def forward(self, utterances: Utterances, window_frames: int) -> RecognizerOutput:
        """Losses of transcribed clips under teacher forcing.

        Args:
            utterances: clips and transcripts; with a CTC head also their `transcripts`.
            window_frames: mel frames that attend to each other in the encoder, 0 for whole clips.
        """
        hidden_AH, lengths = self.encode_audio(utterances.mel, utterances.mel_cu_seqlens, window_frames)
        device = hidden_AH.device
        loss, correct = self.audio_decoder(
            utterances.tokens,
            Spans(utterances.lengths, device),
            EncoderOutput(hidden_AH, Spans(lengths, device)),
            utterances.labels,
        )
        ctc = None if self.ctc_head is None else self.ctc_head(hidden_AH, lengths, utterances.transcripts)
        return RecognizerOutput(loss, correct, ctc, lengths)

    def prefill(
        self, mel_FM: Tensor, mel_cu_seqlens: Tensor, window_frames: int, hypotheses: int = 1
    ) -> RecognizerState:
        """Encode clips; the decoding state before the first step.

        Args:
            mel_FM: log-mel frames of all clips, one after the other.
            mel_cu_seqlens: (clips+1,) boundaries of the clips, on the CPU.
            window_frames: as in `forward`.
            hypotheses: number of hypotheses of each clip.
        """
        hidden_AH, lengths = self.encode_audio(mel_FM, mel_cu_seqlens, window_frames)
        encoder_output = EncoderOutput(hidden_AH, Spans(lengths, hidden_AH.device))
        spans = Spans([hypotheses] * len(lengths), hidden_AH.device)
        return RecognizerState(encoder_output, spans, [KVCache() for _ in self.audio_decoder.layers])

    def encode_audio(self, mel_FM: Tensor, mel_cu_seqlens: Tensor, window_frames: int) -> tuple[Tensor, list[int]]:
        """Output of the audio encoder, (A, H), and the number of audio tokens of each clip.

        Args: as :meth:`prefill`.
        """
        clips = [stop - start for start, stop in pairwise(mel_cu_seqlens.tolist())]
        lengths = [audio_tokens(frames, self.audio_encoder.audio) for frames in clips]
        return self.audio_encoder(mel_FM, mel_cu_seqlens, window_frames), lengths

    def step(self, state: RecognizerState, tokens_N: Tensor) -> Tensor:
        """Append a token to each hypothesis; log-probabilities of the token after it.

        Args:
            state: from :meth:`prefill`; its KV caches grow by one token.
            tokens_N: int64, one token of each hypothesis, clip after clip.

        Returns:
            (N, V) fp32.
        """
        logits_NV = self.audio_decoder(tokens_N, state.spans, state.encoder_output, caches=state.caches)
        return logits_NV.float().log_softmax(-1)


@dataclass
class RecognizerState:
    """Decoding state of the recognizer: hypotheses of one length, equally many of each clip, clip after clip."""

    encoder_output: EncoderOutput
    spans: Spans  # hypotheses of each clip
    caches: list[KVCache]  # KV cache of each layer

    def reorder(self, hypotheses: Tensor) -> None:
        """Continue from other hypotheses, as beam search chose them.

        Args:
            hypotheses: (N,) int64, which may repeat; each the index of a hypothesis of the same clip.
        """
        for cache in self.caches:
            cache.reorder(hypotheses)


def _where(recipe: Recipe) -> dict:
    return {"device": platform.device(), "dtype": params_dtype(recipe.precision)}
