"""lm-evaluation-harness with a model of abcli's, on tasks of this test's own, against arithmetic from the logits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is missing: pip install abcli[lm-eval]")

QUESTIONS = [
    {"q": "The capital of France is", "choices": [" Paris", " London", " a large dog"], "gold": 0},
    {"q": "Two and two make", "choices": [" seven hundred", " four"], "gold": 1},
    {"q": "The capital of France is", "choices": [" Paris, of course", " Rome"], "gold": 0},
]
TEXTS = [{"text": "The lighthouse stands on a rock far out in the sea. " * 6}, {"text": "Short."}]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
num_fewshot: 0
"""
CHOICE = "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{gold}}'\n"
CHOICE += "target_delimiter: ''\nmetric_list: [{metric: acc}]\n"
ROLLING = "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
ROLLING += "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n"
UNTIL = "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{choices[gold]}}'\n"
UNTIL += "generation_kwargs: {until: ['.', ','], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with three tasks and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows, body in (("choice", QUESTIONS, CHOICE), ("rolling", TEXTS, ROLLING), ("until", QUESTIONS, UNTIL)):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"abcli_{name}.yaml").write_text(TASK.format(name=f"abcli_{name}", data=data) + body)
    return folder


@pytest.fixture(scope="module")
def model(real_model: Path) -> Iterator[Any]:
    from abcli.lm_eval_model import AbcliLM

    made = AbcliLM(str(real_model), buckets=2, slots=2, ctx_size=64)
    yield made
    made.llm.close()


def log_probability(llm: Any, context: list[int], continuation: list[int]) -> float:
    """The sum over a continuation, from the buckets' logits alone: they are weighed by their largest probability."""
    total = 0.0
    for at, token in enumerate(continuation):
        exact = llm.logits([*context, *continuation[:at]]).astype(np.float64)
        shares = np.exp(exact - exact.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        total += float(np.log(shares.max(axis=1) @ shares[:, token] / shares.max(axis=1).sum()))
    return total


def evaluate(model: Any, tasks: Path, name: str) -> Any:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(model=model, tasks=[name], task_manager=manager, log_samples=True, bootstrap_iters=0)


def test_choices_are_scored_as_the_logits_say(model: Any, tasks: Path) -> None:
    result = evaluate(model, tasks, "abcli_choice")
    right = []
    for sample in result["samples"]["abcli_choice"]:
        question, choices = sample["doc"]["q"], sample["doc"]["choices"]
        before = model.llm.tokenize(question)
        found = [float(response[0][0]) for response in sample["resps"]]
        exact = [log_probability(model.llm, before, model.llm.tokenize(question + c)[len(before) :]) for c in choices]
        assert found == pytest.approx(exact, abs=5e-3)
        right.append(int(np.argmax(exact)) == sample["doc"]["gold"])
    assert result["results"]["abcli_choice"]["acc,none"] == pytest.approx(np.mean(right))


def test_texts_roll_over_the_context(model: Any, tasks: Path) -> None:
    result = evaluate(model, tasks, "abcli_rolling")
    total = 0.0
    for row in TEXTS:
        tokens = [model.llm.first_token, *model.llm.tokenize(row["text"], add_special=False)]
        # As lm-eval defines it: windows of the context's size, the last one with as much before it as fits.
        for start in range(1, len(tokens), 64):
            end = min(start + 64, len(tokens))
            first = max(0, min(start - 1, end - 65))
            total += log_probability(model.llm, tokens[first:start], tokens[start:end])
    size = sum(len(row["text"].encode()) for row in TEXTS)
    assert result["results"]["abcli_rolling"]["bits_per_byte,none"] == pytest.approx(
        -total / size / np.log(2), rel=1e-3
    )


def test_answers_end_where_the_task_says(model: Any, tasks: Path) -> None:
    result = evaluate(model, tasks, "abcli_until")
    for sample in result["samples"]["abcli_until"]:
        (text,) = sample["resps"][0]
        answer = model.llm.generate(sample["doc"]["q"], raw=True, temp=0, max_tokens=8, stop=[".", ","])
        assert text == answer.text


def test_chat_templates_are_the_models_own(model: Any) -> None:
    text = model.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert model.tok_encode(text) == model.llm.prompt_tokens("Hi")
    model._reads_control_tokens = False


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "abcli", "lm-eval", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)


def test_the_command_line_evaluates_as_llama_cpp_would(tasks: Path, tmp_path: Path, real_model: Path) -> None:
    model_args = f"model={real_model},buckets=1,ctx_size=64"
    evaluated = ["-t", "abcli_choice", "abcli_until", "--include_path", str(tasks), "--limit", "2", "-a", model_args]
    done = run(*evaluated, "--output_path", str(tmp_path), "--log_samples")
    assert done.returncode == 0, done.stderr
    assert "|abcli_choice|" in done.stdout
    (results,) = tmp_path.rglob("results_*.json")
    assert json.loads(results.read_text())["config"]["model"] == "abcli"
    (choices,) = tmp_path.rglob("samples_abcli_choice_*.jsonl")
    samples = [json.loads(line) for line in choices.read_text().splitlines()]
    assert len(samples) == 2
    # abcli attends as llama.cpp's own programs do where they may choose.
    llama = llama_cpp.Llama(str(real_model), n_ctx=64, logits_all=True, flash_attn=True, verbose=False)
    for sample in samples:
        before = llama.tokenize(sample["doc"]["q"].encode())
        found = [float(response[0][0]) for response in sample["resps"]]
        texts = [sample["doc"]["q"] + choice for choice in sample["doc"]["choices"]]
        assert found == pytest.approx([llamas_own(llama, text, len(before)) for text in texts], abs=1e-4)
    llama.close()


def llamas_own(llama: llama_cpp.Llama, text: str, begin: int) -> float:
    """The log-probability of a text's tokens from the one at `begin` on, from llama.cpp's logits."""
    tokens = llama.tokenize(text.encode())
    llama.reset()
    llama.eval(tokens)
    rows = llama.scores[begin - 1 : len(tokens) - 1].astype(np.float64)
    logs = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return float(logs[np.arange(len(rows)), tokens[begin:]].sum())


def test_the_command_lines_help_is_lm_evals() -> None:
    done = run("run", "--help")
    assert done.returncode == 0
    assert "--model_args" in done.stdout
