"""Who may ask: keys, hosts, origins."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from abcli.serve.guard import Access
from tests.serve.conftest import MESSAGES

CHAT = "/v1/chat/completions"
KEYS = ("first-key-1", "second-key-2")
Serving = Callable[..., TestClient]


def test_a_key_is_asked_for_everywhere_but_for_health(serving: Serving) -> None:
    client = serving(keys=KEYS)
    assert client.get("/health").status_code == 200
    for path in ("/v1/models", "/props", "/slots", "/metrics", "/tokenizer_info"):
        response = client.get(path)
        assert (response.status_code, response.json()["error"]["type"]) == (401, "authentication_error")
        assert response.headers["WWW-Authenticate"] == "Bearer"
    wrong = ("", "Bearer", "Bearer ", "Bearer first-key", "Basic first-key-1", "Bearer first-key-1x", "Bearer \xff")
    for value in wrong:
        headers = {"Authorization": value.encode("latin-1")}
        assert client.post(CHAT, json={"messages": MESSAGES}, headers=headers).status_code == 401
    for key in KEYS:
        for headers in ({"Authorization": f"Bearer {key}"}, {"authorization": f"bearer {key}"}, {"X-Api-Key": key}):
            assert client.post(CHAT, json={"messages": MESSAGES}, headers=headers).status_code == 200
    # Clients that send both may mean either.
    for value in ("Bearer ", "Bearer none"):
        assert client.get("/v1/models", headers={"Authorization": value, "X-Api-Key": KEYS[0]}).status_code == 200


def test_without_keys_any_key_will_do(client: TestClient) -> None:
    assert client.get("/v1/models", headers={"Authorization": "Bearer whatever"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8080", 200),
        ("127.0.0.1:8080", 200),
        ("[::1]:8080", 200),
        ("192.168.1.7", 200),
        ("my.localhost", 200),
        ("named.example:1", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
    ],
)
def test_names_that_point_here_by_a_trick_are_refused(serving: Serving, host: str, status: int) -> None:
    client = serving(access=Access(hosts=("named.example",)))
    assert client.get("/v1/models", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:3000", True),
        ("http://127.0.0.1", True),
        ("http://[::1]:5173", True),
        ("https://app.example", True),
        ("http://evil.example", False),
        ("http://localhost.evil.example", False),
        ("null", False),
        ("http://[", False),
    ],
)
def test_pages_of_others_may_not_ask(serving: Serving, origin: str, allowed: bool) -> None:
    client = serving(keys=KEYS, access=Access(origins=("https://app.example",)))
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, x-stainless"}
    preflight = client.options(CHAT, headers={"Origin": origin, **wanted})
    answer = client.post(
        CHAT, json={"messages": MESSAGES}, headers={"Origin": origin, "Authorization": f"Bearer {KEYS[0]}"}
    )
    for response in (preflight, answer):
        assert response.headers.get("Access-Control-Allow-Origin") == (origin if allowed else None)
    # A browser sends no key with a preflight.
    assert preflight.status_code == (200 if allowed else 403)
    assert answer.status_code == (200 if allowed else 403)
    if allowed:
        assert preflight.headers["Access-Control-Allow-Headers"] == "authorization, x-stainless"


def test_a_page_of_the_server_itself_may_ask(serving: Serving) -> None:
    client = serving(access=Access(hosts=("named.example",)))
    headers = {"Host": "named.example:8080", "Origin": "http://named.example:8080"}
    assert client.get("/v1/models", headers=headers).status_code == 200
    assert client.get("/v1/models", headers={**headers, "Origin": "http://named.example:1"}).status_code == 403


def test_an_error_for_a_page_can_be_read_by_it(client: TestClient) -> None:
    response = client.post(CHAT, content=b"{", headers={"Origin": "http://localhost:3000"})
    assert response.status_code == 400
    assert response.headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
