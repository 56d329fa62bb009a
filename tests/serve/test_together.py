"""Many requests at once: every answer is what the same request gets alone."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.testclient import TestClient

PATH = "/v1/chat/completions"


def request_of(number: int) -> dict[str, Any]:
    """A request with a beginning that some others have."""
    chance = random.Random(number)
    words = ["alpha", "beta", "gamma", "delta"]
    shared = "a common beginning " * (number % 3)
    content = shared + " ".join(chance.choices(words, k=chance.randrange(1, 20)))
    return {"messages": [{"role": "user", "content": content}], "max_tokens": chance.randrange(1, 25)}


def test_answers_do_not_depend_on_what_runs_beside_them(client: TestClient) -> None:
    def text(number: int) -> str:
        answer = client.post(PATH, json={**request_of(number), "cache_prompt": number % 5 != 0}).json()
        return str(answer["choices"][0]["message"]["content"])

    numbers = list(range(24))
    alone = [client.post(PATH, json={**request_of(number), "cache_prompt": False}).json() for number in numbers]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(text, numbers))
    assert together == [answer["choices"][0]["message"]["content"] for answer in alone]
    assert all(not slot["is_processing"] for slot in client.get("/slots").json())
