"""Servers that are killed again and again, and many at once: the prompt cache that they share stays whole."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from time import sleep

from abcli.engine.prompt_cache import entries
from tests.serve.process import Server, answer_of, served

CHAT = "/v1/chat/completions"
SETTINGS = ("-k", 2, "-c", 2048, "-np", 2, "--temp", 0, "--engine", "contexts", "--prefill", "shared")
SERVERS = 10


def asking(subject: str, tokens: int = 3) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": f"a long text about {subject} " * 30}], "max_tokens": tokens}


def check_whole(directory: Path) -> int:
    """Check that nothing in the prompt cache is damaged; how much is there."""
    found = entries(directory)
    assert [entry.problem for entry in found if entry.problem] == []
    return len(found)


def text_of(server: Server, subject: str) -> tuple[str, int]:
    """The answer to a question, and how many of its prompt's tokens were there already."""
    status, answer = server.post(CHAT, asking(subject))
    assert status == 200
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_prompt_cache_stays_whole_whenever_its_server_is_killed(tiny_model: Path, tmp_path: Path) -> None:
    texts: dict[str, str] = {}
    for number in range(3):
        with served(tiny_model, *SETTINGS, f"--prompt-cache={tmp_path}") as server:
            for subject in ("rivers", f"number {number}"):
                text, cached = text_of(server, subject)
                assert texts.setdefault(subject, text) == text
                assert (cached > 128) == (subject == "rivers" and number > 0)
            # It dies while prompts are computed and written.
            with ExitStack() as stack:
                for turn in range(4):
                    stack.enter_context(server.send(CHAT, asking(f"{number} and {turn}", 50)))
                sleep(0.05 * number)
                server.process.kill()
                server.process.wait()
        assert check_whole(tmp_path) >= number + 2
    with served(tiny_model, *SETTINGS, f"--prompt-cache={tmp_path}") as server:
        for subject, text in texts.items():
            again, cached = text_of(server, subject)
            assert again == text
            assert cached > 128
        assert not any("damaged" in line for line in server.lines)
        assert server.end() == 0


def test_ten_servers_share_a_machine_and_a_prompt_cache(tiny_model: Path, tmp_path: Path) -> None:
    ready = threading.Barrier(SERVERS, timeout=240)

    def run(number: int) -> tuple[int, list[str]]:
        with served(tiny_model, *SETTINGS, f"--prompt-cache={tmp_path}") as server:
            ready.wait()
            # All the same at once, then each its own.
            subjects = ("rivers", "rivers", f"number {number}")
            waiting = [server.send(CHAT, asking(subject)) for subject in subjects]
            answers = [answer_of(connection) for connection in waiting]
            assert [status for status, _answer in answers] == [200] * 3
            assert server.end() == 0
            return server.port, [answer["choices"][0]["message"]["content"] for _status, answer in answers]

    with ThreadPoolExecutor(SERVERS) as pool:
        found = list(pool.map(run, range(SERVERS)))
    assert len({port for port, _texts in found}) == SERVERS
    assert len({text for _port, texts in found for text in texts[:2]}) == 1
    assert check_whole(tmp_path) >= SERVERS + 1
