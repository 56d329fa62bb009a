"""Which models `abcli tune` can compute in torch."""

from __future__ import annotations

import re

from abcli.errors import UnsupportedModelError
from abcli.gguf.checked import CheckedModel

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
# What is computed with; a model with any other tensor computes something else.
_KNOWN = re.compile(
    r"token_embd\.weight|output\.weight|output_norm\.weight|rope_freqs\.weight"
    r"|blk\.\d+\.(?:attn_norm|attn_q|attn_k|attn_v|attn_q_norm|attn_k_norm|attn_output|post_attention_norm"
    r"|ffn_norm|ffn_gate|ffn_up|ffn_down|post_ffw_norm)\.(?:weight|bias)"
)
_NEEDED = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")


def check_architecture(model: CheckedModel) -> None:
    """Raise UnsupportedModelError for a model that `abcli.tune.twin` cannot compute."""
    if (reason := _obstacle(model)) is not None:
        raise UnsupportedModelError(
            f"{model.name} {reason}", f"tuning knows plain dense models of {', '.join(ARCHITECTURES)}"
        )


def _obstacle(model: CheckedModel) -> str | None:
    header = model.header
    names = {tensor.name for part in model.files for tensor in part.tensors}
    if header.architecture not in ARCHITECTURES:
        return f"is of the architecture {header.architecture}"
    if model.adapters:
        return "has adapters, which learning would not know of"
    if len({*header.heads}) != 1 or len({*header.kv_heads}) != 1:
        return "has layers with different numbers of heads"
    if strange := sorted(name for name in names if not _KNOWN.fullmatch(name)):
        return f"has a tensor {strange[0]:.80}, which learning does not know"
    needed = [f"blk.{layer}.{part}.weight" for layer in range(header.layers) for part in _NEEDED]
    if missing := [name for name in ("token_embd.weight", "output_norm.weight", *needed) if name not in names]:
        return f"has no tensor {missing[0]}"
    if header.get("rope.scaling.type") in ("yarn", "longrope"):
        return f"has RoPE scaling of the kind {header.get('rope.scaling.type')}"
    if header.get("final_logit_softcapping"):
        return "caps its logits"
    return None
