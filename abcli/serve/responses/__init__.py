"""OpenAI's Responses: `/v1/responses`, without a memory of earlier ones."""

from abcli.serve.responses.routes import routes

__all__ = ["routes"]
