"""A llama.cpp context that makes embeddings: one vector of what it computes of all tokens of a text."""

from __future__ import annotations

from collections.abc import Sequence

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from abcli.config import ContextConfig, Pooling
from abcli.errors import NativeError, UnsupportedModelError
from abcli.native.context import BatchPart, Sequences, context_parameters
from abcli.native.llama import CancelFlag
from abcli.native.model import Model

_POOLINGS = {
    "mean": llama.LLAMA_POOLING_TYPE_MEAN,
    "cls": llama.LLAMA_POOLING_TYPE_CLS,
    "last": llama.LLAMA_POOLING_TYPE_LAST,
}


class EmbeddingContext(Sequences):
    """A context for up to `together` texts at once, of `config.context_size` tokens in all."""

    def __init__(
        self,
        model: Model,
        config: ContextConfig,
        pooling: Pooling | None,
        *,
        together: int,
        threads: int,
        cancel: CancelFlag,
    ) -> None:
        """`pooling` is the model's own if it is None.

        Raises UnsupportedModelError for a model that has none, NativeError if llama.cpp cannot make the context.
        """
        # 0: the model's own RoPE base.
        parameters = context_parameters(model, 0.0, config, threads, cancel)
        # Tokens that see those after them have to be computed at once.
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = config.context_size
        parameters.n_seq_max = together
        parameters.kv_unified = True
        parameters.embeddings = True
        if pooling is not None:
            parameters.pooling_type = _POOLINGS[pooling]
        super().__init__(model, parameters, cancel)
        self.width: int = llama.llama_model_n_embd_out(model.handle)
        """Numbers of an embedding."""
        if llama.llama_pooling_type(self._handle) not in _POOLINGS.values():
            self.close()
            raise UnsupportedModelError(
                f"{model.path} does not say how the states of a text's tokens become one embedding",
                "say it with `pooling`: mean, cls or last",
            )

    def embed(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """The embeddings (float32 [texts, width], as the model makes them) of the tokens of some texts.

        At most as many texts and tokens as fit, none of them empty. Raises as `decode`.
        """
        if self._memory:
            llama.llama_memory_clear(self._memory, False)
        self.decode([BatchPart(number, 0, tokens, len(tokens)) for number, tokens in enumerate(texts)])
        found = np.empty((len(texts), self.width), np.float32)
        for number, row in enumerate(found):
            source = llama.llama_get_embeddings_seq(self._handle, number)
            if not source:
                raise NativeError(f"llama.cpp has no embedding of text {number} of the batch")
            row[:] = np.ctypeslib.as_array(source, (self.width,))
        return found
