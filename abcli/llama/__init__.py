"""A `llama_cpp.Llama` with buckets inside."""

from abcli.llama.drop_in import Llama

__all__ = ["Llama"]
