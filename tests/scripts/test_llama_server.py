"""llama-server's flags as those of `abcli serve`, and which of its tests are run."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.check_llama_server import LEFT_OUT, OWN_ENDPOINT, reason_of, told
from scripts.llama_server import UnknownFlagError, translated


def test_flags_get_their_counterparts(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.touch()
    given = "--port 8080 --hf-repo some/model --no-slots --jinja --ctx-size 512 --parallel 2 --n-predict 64 "
    given += "--reasoning auto --chat-template-file a.jinja --cors-origins localhost"
    expected = "serve --port 8080 --parallel 2 --predict 64 --thinking on --chat-template a.jinja "
    expected += "--ctx-size 256 --no-slots --no-metrics"
    assert translated(given.split(), {}) == expected.split()
    environment = {"ABCLI_MODEL": str(model), "ABCLI_SERVE_FLAGS": "--threads 1"}
    assert translated(["--model", "not here", "--metrics"], environment) == ["serve", str(model), "--threads", "1"]
    assert translated(["--model", str(model), "--metrics"], {}) == ["serve", str(model)]


def test_a_flag_without_a_counterpart_is_named() -> None:
    with pytest.raises(UnknownFlagError, match="--lora"):
        translated(["--port", "1", "--lora", "x"], {})


def test_tests_are_left_out_for_a_reason() -> None:
    assert reason_of("test_n_probs", 'make_request(\n"POST",\n  "/completion", data={})', LEFT_OUT) == OWN_ENDPOINT
    assert reason_of("test_cors_options", 'make_request("OPTIONS", "/completions")', LEFT_OUT) == ""
    assert reason_of("test_load_split_model", "", LEFT_OUT) != ""


def test_a_report_is_read(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    cases = '<testcase name="a"/><testcase name="b"><failure message="no"/></testcase>'
    cases += '<testcase name="c"><skipped/></testcase><testcase name="d"><error message="worse"/></testcase>'
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>", encoding="utf-8")
    assert told(report) == (1, {"b": "no", "d": "worse"})
