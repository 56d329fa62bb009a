"""The page at `/`: what it may do, and in a real browser that it does what it is for."""

from __future__ import annotations

import base64
import hashlib
import re

from starlette.testclient import TestClient

from abcli.serve.page import whole_page


def test_the_page_needs_no_key_and_nothing_else(serving: object) -> None:
    client: TestClient = serving(keys=("a-secret-key",))  # type: ignore[operator]
    response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.findall(r"(?:src|href|url\(|@import)[\s=\"'(]*(?:https?:|//|/)", response.text)
    assert client.get("/v1/models").status_code == 401


def test_only_the_pages_own_script_and_style_may_run() -> None:
    text, policy = whole_page()
    for tag in ("script", "style"):
        (inner,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    # No handlers and styles in attributes, which the policy forbids, and no text of a model's read as markup.
    assert not re.findall(r"\s(?:on\w+|style)=", text.partition("<body>")[2].partition("<script>")[0])
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


def test_the_policy_is_sent(client: TestClient) -> None:
    headers = client.get("/").headers
    assert headers["content-security-policy"] == whole_page()[1]
    assert headers["x-content-type-options"] == "nosniff"
