"""What learning needs of memory, told before it begins."""

from __future__ import annotations

from dataclasses import dataclass

from abcli.errors import OutOfMemoryError
from abcli.gguf.checked import CheckedModel
from abcli.text import gibibytes

_FLOAT = 4
# torch itself, and llama.cpp's model beside it.
_TORCH_BYTES = 600 << 20
# Logits, their softmax and both gradients.
_OUTPUT_COPIES = 5


@dataclass(frozen=True)
class LearningMemory:
    """Bytes that learning takes, and whether layers are computed twice to need less."""

    needed: int
    free: int
    frugal: bool

    def __str__(self) -> str:
        """A sentence for people."""
        how = ", computing each layer twice to need less" if self.frugal else ""
        return f"learning takes about {gibibytes(self.needed)} of {gibibytes(self.free)} that are free{how}"


def plan_memory(model: CheckedModel, tokens: int, wanted: int, free: int) -> LearningMemory:
    """How to learn from rows of `tokens`, in which `wanted` are asked for, in `free` bytes of memory.

    Raises OutOfMemoryError where they do not suffice.
    """
    for frugal in (False, True):
        plan = LearningMemory(needed_bytes(model, tokens, wanted, frugal=frugal), free, frugal)
        if plan.needed <= free:
            return plan
    raise OutOfMemoryError(
        f"learning from {tokens:,} tokens at once needs {gibibytes(plan.needed)} of memory where torch computes, but "
        f"{gibibytes(free)} are free",
        "ask for a shorter `length`, close other programs, or take a smaller model",
    )


def needed_bytes(model: CheckedModel, tokens: int, wanted: int, *, frugal: bool) -> int:
    """The most bytes that a step takes: all weights, what is kept of each layer for the gradient, and the logits."""
    header = model.header
    parameters = sum(_elements(tensor.shape) for part in model.files for tensor in part.tensors)
    embedding, forward = header.embedding_length, max(header.per_layer("feed_forward_length"), default=0)
    heads = header.heads[0]
    # For each token: what norms, attention and its scores, and the feed-forward network keep.
    attention = 6 * heads * header.key_length + 2 * heads * tokens
    # Angles of each head of keys take as much as two keys.
    layer = 4 * embedding + attention + 2 * header.kv_heads[0] * header.key_length + 4 * forward
    kept = header.layers * embedding + 2 * layer if frugal else header.layers * layer
    outputs = _OUTPUT_COPIES * wanted * header.vocabulary_size
    return _TORCH_BYTES + _FLOAT * (parameters + tokens * kept + outputs)


def _elements(shape: tuple[int, ...]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product
