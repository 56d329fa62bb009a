"""Anthropic's Messages: `/v1/messages` and `/v1/messages/count_tokens`."""

from abcli.serve.anthropic.routes import routes

__all__ = ["routes"]
