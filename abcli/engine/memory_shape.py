"""The numbers of a model that decide how much memory llama.cpp takes, and the formulas for its buffers.

The formulas for compute buffers are upper bounds of what ggml's graph allocator reports (docs/memory.md says how they
were found); those for caches and outputs are llama.cpp's own.
"""

from __future__ import annotations

from dataclasses import dataclass

from abcli.config import CacheType
from abcli.gguf.architectures import window_layers
from abcli.gguf.checked import CheckedModel
from abcli.gguf.cursor import ArrayValue
from abcli.gguf.header import Header, row_bytes

_FLOAT = 4
# What a node of a graph costs in llama.cpp's bookkeeping, and the nodes it plans for (graph_max_nodes).
_NODE_BYTES = 1500
_NODES_PER_TENSOR = 8
_LEAST_NODES = 1024
# The same for each matrix that an adapter changes.
_PAIR_BYTES = 20_000
_OUTPUT = "output.weight"
_FLOATS = ("f32", "f16", "bf16")
# Bytes that llama.cpp's tables take for a token of the vocabulary and for a merge.
_TOKEN_BYTES = 100
_MERGE_BYTES = 240
# Activations are quantised before they meet quantised weights, to at most this many bytes a number.
_WORK_BYTES = 2


@dataclass(frozen=True)
class MemoryShape:
    """Widths in numbers per token, the widest layer's where layers differ; bytes where the name says so.

    `caches` holds the widths (keys, values) of each layer that has a cache.
    """

    layers: int
    vocabulary: int
    embedding: int
    queries: int
    keys: int
    heads: int
    head_lengths: tuple[int, ...]
    feed_forward: int
    expert_feed_forward: int
    experts_used: int
    gated: bool
    recurrent: int
    masks: int
    caches: tuple[tuple[int, int], ...]
    state_bytes: int
    weight_bytes: int
    embedding_bytes: int
    tokenizer_bytes: int
    graph_overhead: int
    adapter_bytes: int
    adapter_rank: int
    adapter_outputs: int
    """The widest result of a matrix outside the feed-forward network that an adapter changes."""
    adapts_logits: bool
    multiplies_floats: bool
    """Whether a matrix of a layer is of a type that is not quantised."""
    table_bytes: int
    """Cosines and sines of all layers for a row of several bases, where heads have bases of their own."""

    @classmethod
    def of(cls, model: CheckedModel) -> MemoryShape:
        """The shape of a model."""
        header = model.header
        windows = window_layers(header)
        key_length = max(header.key_length, header.integer("attention.key_length_swa"))
        experts_used = max(header.per_layer("expert_used_count"), default=0) if header.integer("expert_count") else 0
        feed_forward = max(header.per_layer("feed_forward_length"), default=0)
        names = {tensor.name: tensor for tensor in header.tensors}
        embedding = names.get("token_embd.weight")
        nodes = max(_LEAST_NODES, _NODES_PER_TENSOR * len(header.tensors))
        pairs = [pair for adapter in model.adapters for pair in adapter.pairs]
        return cls(
            layers=header.layers,
            vocabulary=header.vocabulary_size,
            embedding=header.embedding_length,
            queries=max(header.heads, default=0) * key_length,
            keys=max(header.kv_heads, default=0) * key_length,
            heads=max(header.heads, default=0),
            head_lengths=_head_lengths(header),
            feed_forward=feed_forward,
            expert_feed_forward=header.integer("expert_feed_forward_length", feed_forward),
            experts_used=experts_used,
            gated=_is_gated(header, feed_forward),
            recurrent=_recurrent_width(header),
            masks=2 if windows is None or len(set(windows)) > 1 else 1,
            caches=_caches(header, windows),
            state_bytes=_state_bytes(header),
            weight_bytes=model.weight_bytes,
            embedding_bytes=embedding.size_bytes if embedding is not None else 0,
            tokenizer_bytes=_tokenizer_bytes(header),
            graph_overhead=nodes * _NODE_BYTES + len(pairs) * _PAIR_BYTES,
            adapter_bytes=sum(adapter.weight_bytes for adapter in model.adapters),
            adapter_rank=max((pair.rank for pair in pairs), default=0),
            adapter_outputs=max((pair.b.shape[1] for pair in pairs if _is_narrow(pair.target)), default=0),
            multiplies_floats=any(
                tensor.type_name in _FLOATS and len(tensor.shape) > 1 and ".attn_" in tensor.name
                for tensor in header.tensors
            ),
            adapts_logits=any(pair.target == _OUTPUT for pair in pairs),
            table_bytes=2
            * _FLOAT
            * key_length
            * sum(len(layer) for layer in model.tuning.multipliers if len(set(layer)) > 1),
        )

    @property
    def divisor_bytes(self) -> int:
        """Divisors of the angles of queries and keys, one for each pair, for a row of several bases on a device."""
        return _FLOAT * (self.queries + self.keys) // 2

    def kv_bytes(self, type_k: CacheType, type_v: CacheType, *, flash: bool) -> int:
        """Bytes of one token in the caches of all layers of one context (llama_kv_cache::llama_kv_cache).

        Layers with a sliding window count like the others: abcli leaves llama.cpp's swa_full on. Without flash
        attention, values are transposed and every layer gets the widest one's.
        """
        widest = max((values for _, values in self.caches), default=0)
        return sum(
            row_bytes(type_k, keys) + row_bytes(type_v, values if flash or not values else widest)
            for keys, values in self.caches
        )

    def graph_bytes(self, tokens: int, outputs: int, *, scores: int = 0, quantised: bool = False) -> int:
        """Bytes of the intermediate results of a graph of `tokens` with `outputs` rows of logits.

        `scores` are those of `score_bytes` where attention is not flash attention; `quantised` is for caches of
        quantised types, whose rotation takes another copy.
        """
        residual = (4 if quantised else 3) * self.embedding
        branches = 3 if self.gated else 2
        # Beside the result of a matrix that an adapter changes lie the products with A and with B.
        rank = self.adapter_rank
        attention = residual + 2 * self.queries + 2 * self.keys + rank
        widths = [
            residual + self.queries + branches * self.feed_forward + rank,
            residual + 3 * self.recurrent,
            residual + 2 * self.adapter_outputs + rank,
        ]
        if self.experts_used:
            used = self.experts_used
            widths += [
                residual + self.queries + branches * used * self.expert_feed_forward + used * rank,
                residual + 2 * self.queries + 2 * used * self.embedding + used * rank,
            ]
        logits = (2 if self.adapts_logits else 1) * min(outputs, tokens) * self.vocabulary + residual * tokens
        beside_scores = (attention + 2 * self.embedding) * tokens if scores else 0
        return max(_FLOAT * max(*widths, attention) * tokens, _FLOAT * beside_scores + scores, _FLOAT * logits)

    def mask_bytes(self, cells: int, tokens: int, *, flash: bool) -> int:
        """Bytes of the attention masks: `cells` of one sequence, or of all that share a pool, for each token."""
        if not self.caches:
            return 0
        return self.masks * cells * tokens * (2 if flash else 4)

    def score_bytes(self, cells: int, tokens: int) -> int:
        """Bytes of the attention scores of one layer, which exist only without flash attention."""
        return self.heads * cells * tokens * _FLOAT if self.caches else 0

    def work_bytes(self, tokens: int) -> int:
        """Bytes of the CPU's scratch memory for multiplying matrices."""
        widest = max(self.embedding, self.queries, self.feed_forward, self.experts_used * self.expert_feed_forward)
        return _WORK_BYTES * tokens * widest


def _head_lengths(header: Header) -> tuple[int, ...]:
    """Numbers of one head's key and value, of layers with a window too."""
    keys = ("attention.key_length_swa", "attention.value_length_swa")
    lengths = [header.key_length, header.value_length, *(header.integer(key) for key in keys)]
    return tuple(length for length in dict.fromkeys(lengths) if length > 0)


def _caches(header: Header, windows: tuple[bool, ...] | None) -> tuple[tuple[int, int], ...]:
    """Widths of keys and values of the layers that keep them."""
    key_lengths = (header.key_length, header.integer("attention.key_length_swa", header.key_length))
    value_lengths = (header.value_length, header.integer("attention.value_length_swa", header.value_length))
    # Compressed attention (MLA) keeps one row that serves as key and value (llama_hparams::is_mla).
    compressed = header.integer("attention.key_length_mla") > 0 and header.integer("attention.value_length_mla") > 0
    period = header.integer("full_attention_interval")
    own = header.layers - header.integer("attention.shared_kv_layers")
    found = []
    for layer, heads in enumerate(header.kv_heads[: max(0, own)]):
        if not heads or (period > 1 and (layer + 1) % period):
            continue
        if windows is None:
            key, value = max(key_lengths), max(value_lengths)
        else:
            key, value = key_lengths[windows[layer]], value_lengths[windows[layer]]
        found.append((heads * key, 0 if compressed else heads * value))
    return tuple(found)


def _is_gated(header: Header, feed_forward: int) -> bool:
    """Whether the feed-forward network has two branches: of two tensors, or of one that is twice as wide."""
    return any(
        ".ffn_gate" in tensor.name or (".ffn_up.weight" in tensor.name and tensor.shape[-1] >= 2 * feed_forward)
        for tensor in header.tensors
    )


def _is_narrow(target: str) -> bool:
    """Whether a tensor's result is neither as wide as the feed-forward network nor as the vocabulary."""
    return target != _OUTPUT and not target.endswith("token_embd.weight") and ".ffn_" not in target


def _recurrent_width(header: Header) -> int:
    """Numbers per token that the widest recurrent layer works with; 0 without one."""
    inner, state = header.integer("ssm.inner_size"), header.integer("ssm.state_size")
    groups = max(1, header.integer("ssm.group_count"))
    if inner:
        return 2 * inner + 2 * groups * state
    return 2 * header.embedding_length if header.integer("wkv.head_size") or header.integer("shortconv.l_cache") else 0


def _state_bytes(header: Header) -> int:
    """Bytes of the recurrent state of one sequence (llama_hparams::n_embd_r and n_embd_s), always in f32."""
    embedding, head = header.embedding_length, header.integer("wkv.head_size")
    kept = header.integer("shortconv.l_cache")
    if head:
        width = header.integer("token_shift_count", 2) * embedding + head * embedding
    elif kept:
        width = (kept - 1) * embedding
    else:
        inner, state = header.integer("ssm.inner_size"), header.integer("ssm.state_size")
        kernel, groups = header.integer("ssm.conv_kernel"), header.integer("ssm.group_count")
        width = max(0, kernel - 1) * (inner + 2 * groups * state) + state * inner
    period = header.integer("full_attention_interval")
    attending = sum(
        1 for layer, heads in enumerate(header.kv_heads) if heads and not (period > 1 and (layer + 1) % period)
    )
    # A hybrid model may keep both in every layer.
    layers = header.layers - attending if attending < header.layers else header.layers
    return _FLOAT * width * layers


def _tokenizer_bytes(header: Header) -> int:
    merges = header.metadata.get("tokenizer.ggml.merges")
    count = merges.count if isinstance(merges, ArrayValue) else 0
    return _TOKEN_BYTES * header.vocabulary_size + _MERGE_BYTES * count
