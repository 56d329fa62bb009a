"""The thread on which llama.cpp computes with several threads."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import llama_cpp.llama_cpp as llama
import pytest

from abcli.engine.choose import verify_fused
from abcli.native.compute_thread import run_on_compute_thread
from abcli.native.context import Sequences
from tests.support.engines import contexts_engine, fused_engine
from tests.support.models import open_model, set_up


def test_a_job_runs_on_the_one_thread_and_its_error_comes_back() -> None:
    first, second = run_on_compute_thread(threading.get_ident), run_on_compute_thread(threading.get_ident)
    assert first == second != threading.get_ident()

    def fail() -> None:
        raise ValueError("as it was raised")

    with pytest.raises(ValueError, match="as it was raised"):
        run_on_compute_thread(fail)


def test_an_interrupted_caller_waits_for_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled, ended = threading.Event(), threading.Event()
    calls = 0
    waiting = run_on_compute_thread.__globals__["wait"]

    def interrupted(futures: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt
        return waiting(futures)

    def job() -> None:
        assert cancelled.wait(10)
        ended.set()

    monkeypatch.setitem(run_on_compute_thread.__globals__, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_on_compute_thread(job, cancelled.set)
    assert ended.is_set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12 on: forking with threads
def test_a_forked_child_has_a_thread_of_its_own() -> None:
    run_on_compute_thread(int)
    child = os.fork()
    if not child:
        os._exit(run_on_compute_thread(lambda: 7))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_whatever_computes_with_several_threads_does_it_there(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = set()
    wide = run_on_compute_thread(threading.get_ident)
    decode = Sequences.decode

    def watched(self: Sequences, *arguments: object) -> None:
        if llama.llama_n_threads(self._handle) > 1 and threading.get_ident() != wide:
            elsewhere.add(threading.current_thread().name)
        decode(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Sequences, "decode", watched)
    context, buckets = set_up((10_000.0, 15_000.0), context_size=256, threads=2, prefill="shared")
    prompt = [5 + index % 40 for index in range(40)]
    with open_model(tiny_model) as model:
        verify_fused(model, context, buckets.bases)
        for kind in (fused_engine, contexts_engine):
            with kind(model, context, buckets) as engine:
                engine.prefill(0, prompt)
                engine.step({0: 7})
        with contexts_engine(model, *set_up((10_000.0,), context_size=256, threads=2)) as engine:
            engine.prefill(0, prompt)
    assert elsewhere == set()
