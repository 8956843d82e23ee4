"""Plain Talker that ours is compared with: the modules of ``transformers``, on padded batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from omni_train.data.rows.batch import IGNORE
from omni_train.data.rows.speech_plans import Plan

CODEBOOKS, WORDS = 16, 4096


def layer_sizes(hidden: int) -> dict[str, int]:
    """Sizes of a layer, of Talker and predictor, in the proportions of Qwen3-Omni's predictor; hidden is of 128s."""
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128, "head_dim": 128}
    return {"hidden_size": hidden, "intermediate_size": 3 * hidden} | heads


def padded(plans: Sequence[Plan], size: int) -> list[dict[str, torch.Tensor]]:
    """Samples in batches of `size`, each padded to its longest: text_ids, labels, mask (B, n); codes, label_codes."""
    batches = []
    for start in range(0, len(plans), size):
        group = plans[start : start + size]

        def stacked(name: str, fill: int, group: Sequence[Plan] = group) -> torch.Tensor:
            values = [torch.from_numpy(getattr(plan, name)) for plan in group]
            return pad_sequence(values, batch_first=True, padding_value=fill)

        batch = {"text_ids": stacked("text_ids", 0), "codes": stacked("codes", -1)}
        batch |= {name: stacked(name, IGNORE) for name in ("labels", "label_codes")}
        lengths = torch.tensor([len(plan) for plan in group])
        batches.append(batch | {"mask": (torch.arange(batch["labels"].shape[1]) < lengths[:, None]).long()})
    return batches


class Reference(torch.nn.Module):
    """Talker and code predictor of the modules of ``transformers``.

    Args:
        hidden: width of Talker and predictor.
        layers: of the Talker.
        codebook: codewords; after them come EOS and as many control codes less one.
    """

    def __init__(self, hidden: int, layers: int, codebook: int) -> None:
        from transformers import Qwen3Config, Qwen3Model
        from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as omni
        from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import (
            Qwen3OmniMoeTalkerCodePredictorConfig,
        )

        super().__init__()
        torch.manual_seed(11)
        width, rope = 2 * hidden, {"rope_type": "default", "rope_theta": 1e6}
        shared = {**layer_sizes(hidden), "rope_parameters": rope, "use_cache": False}
        self.codebook = codebook
        self.text = torch.nn.Embedding(WORDS, width)
        self.text_projection = torch.nn.Sequential(
            torch.nn.Linear(width, width), torch.nn.SiLU(), torch.nn.Linear(width, hidden)
        )
        self.codec_embedding = torch.nn.Embedding(2 * codebook, hidden)
        self.backbone = Qwen3Model(Qwen3Config(**shared, vocab_size=1, num_hidden_layers=layers))
        self.head = torch.nn.Linear(hidden, 2 * codebook, bias=False)
        self.predictor = omni.Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration(
            Qwen3OmniMoeTalkerCodePredictorConfig(
                **shared, vocab_size=codebook, num_code_groups=CODEBOOKS, num_hidden_layers=5
            )
        )

    def forward(self, batch: dict[str, torch.Tensor], sequential: bool) -> torch.Tensor:
        """Sum of the losses of a padded batch."""
        codes, labels, residuals = batch["codes"], batch["labels"], batch["label_codes"]
        embedded = self.codec_embedding(codes[..., 0].clamp(min=0))
        for index, table in enumerate(self._tables(), start=1):
            embedded = embedded + table(codes[..., index].clamp(min=0))
        embedded = embedded * (codes[..., :1] >= 0) + self.text_projection(self.text(batch["text_ids"]))
        hidden = self.backbone(inputs_embeds=embedded, attention_mask=batch["mask"]).last_hidden_state
        logits = self.head(hidden)
        logits[..., self.codebook + 1 :] = -torch.inf  # only codewords and EOS can be drawn
        first = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORE)
        here = residuals[..., 0] != IGNORE
        predict = self._sequential if sequential else self._parallel
        logits = predict(hidden[here], self.codec_embedding(labels[here]), residuals[here])
        return first + F.cross_entropy(logits.flatten(0, 1), residuals[here].flatten(), reduction="sum") / (
            CODEBOOKS - 1
        )

    def _sequential(self, hidden: torch.Tensor, first: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        inputs, logits = torch.stack([hidden, first], dim=1), []
        for index, (head, table) in enumerate(zip(self.predictor.lm_head, self._tables(), strict=True)):
            logits.append(head(self.predictor.model(inputs_embeds=inputs).last_hidden_state[:, -1]))
            inputs = torch.cat([inputs, table(codes[:, index, None])], dim=1)
        return torch.stack(logits, dim=1)

    def _parallel(self, hidden: torch.Tensor, first: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        inputs = [hidden, first, *(table(code) for table, code in zip(self._tables(), codes.T[:-1], strict=False))]
        states = self.predictor.model(inputs_embeds=torch.stack(inputs, dim=1)).last_hidden_state
        return torch.stack([head(states[:, i]) for i, head in enumerate(self.predictor.lm_head, start=1)], dim=1)

    def _tables(self) -> torch.nn.ModuleList:
        return self.predictor.get_input_embeddings()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters by the names of our Talker."""
        named = {
            "embedding.word_embeddings.weight": self.text.weight,
            "codec_embedding.weight": self.codec_embedding.weight,
            "final_norm.weight": self.backbone.norm.weight,
            "codec_head.weight": self.head.weight,
            "code_predictor.embeddings": torch.stack([table.weight for table in self._tables()]),
            "code_predictor.heads": torch.stack([head.weight for head in self.predictor.lm_head]),
            "code_predictor.norm.weight": self.predictor.model.norm.weight,
        }
        for index, linear in enumerate((self.text_projection[0], self.text_projection[2]), start=1):
            named |= {f"text_projection.linear_fc{index}.{kind}": value for kind, value in linear.named_parameters()}
        for index, layer in enumerate(self.backbone.layers):
            attention, q, k, v = layer.self_attn, *_projections(layer)
            groups = [
                torch.cat(parts) for parts in zip(q.chunk(len(k) // 128), k.split(128), v.split(128), strict=True)
            ]
            at, mlp = f"decoder.layers.{2 * index}.", f"decoder.layers.{2 * index + 1}."
            named |= {
                f"{at}input_layernorm.weight": layer.input_layernorm.weight,
                f"{at}self_attention.linear_qkv.weight": torch.cat(groups),
                f"{at}self_attention.linear_proj.weight": attention.o_proj.weight,
                f"{at}self_attention.q_layernorm.weight": attention.q_norm.weight,
                f"{at}self_attention.k_layernorm.weight": attention.k_norm.weight,
                f"{mlp}pre_mlp_layernorm.weight": layer.post_attention_layernorm.weight,
                f"{mlp}mlp.linear_fc1.weight": _gate_up(layer),
                f"{mlp}mlp.linear_fc2.weight": layer.mlp.down_proj.weight,
            }
        for index, layer in enumerate(self.predictor.model.layers):
            at, attention = f"code_predictor.layers.{index}.", layer.self_attn
            named |= {
                f"{at}input_norm.weight": layer.input_layernorm.weight,
                f"{at}qkv.weight": torch.cat(_projections(layer)),
                f"{at}query_norm.weight": attention.q_norm.weight,
                f"{at}key_norm.weight": attention.k_norm.weight,
                f"{at}output.weight": attention.o_proj.weight,
                f"{at}mlp_norm.weight": layer.post_attention_layernorm.weight,
                f"{at}gate_up.weight": _gate_up(layer),
                f"{at}down.weight": layer.mlp.down_proj.weight,
            }
        return named


def _projections(layer: torch.nn.Module) -> list[torch.Tensor]:
    return [getattr(layer.self_attn, f"{name}_proj").weight for name in "qkv"]


def _gate_up(layer: torch.nn.Module) -> torch.Tensor:
    return torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
