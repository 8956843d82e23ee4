"""The recognizer: the audio encoder, and a decoder that writes what it hears. It is how the encoder is pre-trained.

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
from omni_train.nn.cross_decoder import DecoderLayer, Heard, Past, Spans
from omni_train.nn.cross_entropy import chunked_cross_entropy
from omni_train.nn.ctc import CTCHead
from omni_train.nn.recompute import checkpoint
from omni_train.recipe.schema import Recipe, Recompute


@dataclass
class Utterances:
    """Clips, and what the decoder reads and predicts of each."""

    mel: Tensor  # (F, M)
    mel_cu_seqlens: Tensor  # (N+1,) on the CPU
    tokens: Tensor  # (D,) int64: one `<|im_start|>` or word after the other, sequence after sequence
    labels: Tensor  # (D,) int64: the next of each
    lengths: list[int]  # decoder tokens of each clip
    transcripts: list[Tensor] | None = None  # token ids of each clip for CTC, on the CPU

    @classmethod
    def from_batch(cls, batch: PackedBatch) -> Utterances:
        """All of a row of transcripts, on this process's device. The decoder's tokens are those with a label."""
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
class Recognized:
    """What the recognizer makes of utterances whose transcripts it is told."""

    loss: Tensor  # scalar fp32: cross-entropy of all labels together, in nats
    correct: Tensor | None  # (D,) bool: the label was the likeliest; None in training
    ctc_losses: Tensor | None  # (N,) fp32 in nats, 0 where a clip cannot be aligned; None without that head
    audio_lengths: list[int]  # audio tokens of each clip


class TokenTable(torch.nn.Module):
    """The embedding and the output head, one matrix for both (Press and Wolf 2017).

    One module owns the matrix and all its uses, so that ZeRO 3 knows when it is needed.

    Args:
        vocab_size, hidden_size: of the matrix.
        chunk_tokens: positions whose logits exist at once in the loss.
        where: device and dtype.
    """

    def __init__(self, vocab_size: int, hidden_size: int, chunk_tokens: int, where: dict) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(vocab_size, hidden_size, **where))
        torch.nn.init.normal_(self.weight, std=hidden_size**-0.5)
        self.chunk_tokens = chunk_tokens

    def forward(self, x: Tensor, labels_T: Tensor | None = None):
        """What is asked for by what is given.

        Args:
            x: (T,) ids, or (T, H) hidden states.
            labels_T: of hidden states.

        Returns:
            of ids: (T, H) embeddings, as large as positions are (Vaswani et al. 2017, section 3.4); of hidden states:
            (T, V) logits; with labels: the sum of their cross-entropies in nats, and (T,) whether each was the
            likeliest, or None in training.
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
    """Embeddings with sinusoidal positions, layers, a norm and the head.

    Args:
        recipe: with `model.recognizer`.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        config, where = recipe.model.recognizer, _where(recipe)
        self.table = TokenTable(recipe.model.vocab_size, config.hidden_size, recipe.loss_chunk_tokens, where)
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
        heard: Heard,
        labels_D: Tensor | None = None,
        past: list[Past] | None = None,
    ):
        """Read tokens.

        Args:
            tokens_D: sequence after sequence; with `past` one of each hypothesis.
            spans: the tokens of each clip.
            heard: what the encoder made of each clip.
            labels_D: of the tokens.
            past: what each layer keeps of the tokens before.

        Returns:
            as :class:`TokenTable` of the final hidden states.
        """
        first = past[0].length if past else 0
        positions_LH = sinusoids(first + spans.longest, self.hidden_size, tokens_D.device)
        x = self.table(tokens_D)
        x = x + positions_LH[spans.offsets if past is None else [first]].to(x.dtype)
        for index, layer in enumerate(self.layers):
            if self.recompute and self.training:
                x = checkpoint(layer, x, spans, heard)
            else:
                x = layer(x, spans, heard, past[index] if past else None)
        return self.table(self.final_norm(x), labels_D)


class SpeechRecognizer(torch.nn.Module):
    """Clips and transcripts to a loss; or clips alone to transcripts, a token at a time.

    Its `audio_encoder` is the Thinker's, by class and by the names of its parameters. Process groups must exist.

    Args:
        recipe: a validated one with `model.audio` and `model.recognizer`.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        model = recipe.model
        self.audio_encoder = AudioEncoder(model.audio, lone_encoder_config(recipe))
        self.audio_decoder = AudioDecoder(recipe)
        self.ctc_head = None
        if model.recognizer.ctc:
            self.ctc_head = CTCHead(model.audio.hidden_size, model.vocab_size, recipe.loss_chunk_tokens, _where(recipe))

    def forward(self, utterances: Utterances, window_frames: int) -> Recognized:
        """The losses of clips whose transcripts are known.

        Args:
            utterances: of a row; with a CTC head also their `transcripts`.
            window_frames: frames that attend to each other in the encoder, 0 for whole clips.
        """
        hidden_AH, lengths = self.hear(utterances.mel, utterances.mel_cu_seqlens, window_frames)
        device = hidden_AH.device
        loss, correct = self.audio_decoder(
            utterances.tokens,
            Spans(utterances.lengths, device),
            Heard(hidden_AH, Spans(lengths, device)),
            utterances.labels,
        )
        ctc = None if self.ctc_head is None else self.ctc_head(hidden_AH, lengths, utterances.transcripts)
        return Recognized(loss, correct, ctc, lengths)

    def begin(self, mel_FM: Tensor, mel_cu_seqlens: Tensor, window_frames: int, hypotheses: int = 1) -> Decoding:
        """Hear clips, before anything is written of them.

        Args:
            mel_FM, mel_cu_seqlens: the clips.
            window_frames: as in `forward`.
            hypotheses: transcripts of each clip that grow beside each other.
        """
        hidden_AH, lengths = self.hear(mel_FM, mel_cu_seqlens, window_frames)
        heard = Heard(hidden_AH, Spans(lengths, hidden_AH.device))
        spans = Spans([hypotheses] * len(lengths), hidden_AH.device)
        return Decoding(heard, spans, [Past() for _ in self.audio_decoder.layers])

    def hear(self, mel_FM: Tensor, mel_cu_seqlens: Tensor, window_frames: int) -> tuple[Tensor, list[int]]:
        """(A, H) of all clips from the audio encoder, and the audio tokens of each."""
        clips = [stop - start for start, stop in pairwise(mel_cu_seqlens.tolist())]
        lengths = [audio_tokens(frames, self.audio_encoder.audio) for frames in clips]
        return self.audio_encoder(mel_FM, mel_cu_seqlens, window_frames), lengths

    def next_log_probs(self, decoding: Decoding, tokens_N: Tensor) -> Tensor:
        """(N, V) fp32 log-probabilities of what follows, once each hypothesis has grown by a token of `tokens_N`."""
        logits_NV = self.audio_decoder(tokens_N, decoding.spans, decoding.heard, past=decoding.past)
        return logits_NV.float().log_softmax(-1)


@dataclass
class Decoding:
    """Hypotheses that grow: of each clip equally many, one clip's after the other's, all of one length."""

    heard: Heard
    spans: Spans  # hypotheses of each clip
    past: list[Past]  # of each layer

    def choose(self, hypotheses: Tensor) -> None:
        """Go on from these (N,), which may repeat; each must replace one of its own clip."""
        for past in self.past:
            past.choose(hypotheses)


def _where(recipe: Recipe) -> dict:
    return {"device": platform.device(), "dtype": params_dtype(recipe.precision)}
