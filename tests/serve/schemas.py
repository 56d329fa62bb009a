"""The schemas of what servers send, as OpenAI, Anthropic and Open Responses publish them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import llm_comply
from llm_comply.schema import SSE_EVENT_TO_SCHEMA


@functools.cache
def validator(vendor: str, name: str) -> jsonschema.Draft202012Validator:
    """What checks values against a schema of "openai_chat", "anthropic" or "openresponses"."""
    text = (Path(llm_comply.__file__).parent / "specs" / f"{vendor}.json").read_text(encoding="utf-8")
    document = json.loads(text, object_hook=nullable)
    schemas = document["components"]["schemas"]
    assert name in schemas
    if vendor == "openresponses":
        # It allows no schema but null, which cannot be meant.
        schemas["JsonSchemaResponseFormat"]["properties"]["schema"] = {"type": "object"}
    return jsonschema.Draft202012Validator({**document, "$ref": f"#/components/schemas/{name}"})


def check(value: Any, vendor: str, name: str) -> None:
    """Fail with all that is wrong with a value."""
    found = [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message:.300}"
        for error in validator(vendor, name).iter_errors(value)
    ]
    assert found == [], json.dumps(value, indent=1)[:4000]


def check_response_event(event: dict[str, Any]) -> None:
    """Fail for an event of a response's stream that OpenAI's or Open Responses' schemas do not allow."""
    # OpenAI's schemas know summaries of thoughts only; its clients know thoughts, too (test_clients.py).
    if "reasoning_text" not in (event["type"].split(".")[1], event.get("part", {}).get("type")):
        check(without_open_usage(event), "openai_chat", _event_schemas()[event["type"]])
    if event["type"] in SSE_EVENT_TO_SCHEMA:
        check(event, "openresponses", SSE_EVENT_TO_SCHEMA[event["type"]])


def without_open_usage(event: dict[str, Any]) -> dict[str, Any]:
    """An event as OpenAI's schemas want it: it sends null for a usage that is not known, which they do not allow."""
    response = event.get("response")
    if response is None or response["usage"] is not None:
        return event
    return {**event, "response": {name: value for name, value in response.items() if name != "usage"}}


@functools.cache
def _event_schemas() -> dict[str, str]:
    """The names of the schemas of OpenAI's events by their types."""
    document = validator("openai_chat", "ResponseStreamEvent").schema
    schemas = document["components"]["schemas"]
    names = [item["$ref"].rpartition("/")[2] for item in schemas["ResponseStreamEvent"]["anyOf"]]
    return {schemas[name]["properties"]["type"]["enum"][0]: name for name in names}


def nullable(value: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI 3.0's way to say that a value may be null, as JSON Schema's."""
    if value.pop("nullable", None) is True:
        return {"anyOf": [value, {"type": "null"}]}
    return value
