"""OpenAI's Responses: `/v1/responses`, without a memory of earlier ones."""
