"""Check structured answers against schemas and documents of others, with `jsonschema` as the judge.

--suite is a copy of github.com/json-schema-org/JSON-Schema-Test-Suite: every schema of draft 2020-12 that compiles has
to allow its valid documents, token by token, and to forbid the others. --schemas is a directory of schemas, such as the
data of github.com/guidance-ai/jsonschemabench: random answers are written under a random choice of them, and every
complete one has to parse and to validate. Neither is part of this repository. Ends with 1 if an answer or a document
fails.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from abcli.config import DEFAULT_MODEL_FILE, ModelConfig
from abcli.errors import GrammarError
from abcli.gguf.checked import check_model
from abcli.grammar.constraint import Constraint
from abcli.grammar.guidance import Matcher
from abcli.native.model import Model

_PLAIN = json.JSONEncoder(ensure_ascii=False)


def exact_multiple(_validator: Any, factor: Any, instance: Any, _schema: Any) -> Iterator[jsonschema.ValidationError]:
    """`multipleOf` in decimals: jsonschema's own computes in binary, where 0.3 is no multiple of 0.1."""
    is_number = isinstance(instance, int | float) and not isinstance(instance, bool)
    if is_number and Decimal(repr(instance)) % Decimal(repr(factor)):
        yield jsonschema.ValidationError(f"{instance} is not a multiple of {factor}")


def judge_of(schema: Any) -> Any:
    chosen = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    exact = jsonschema.validators.extend(chosen, {"multipleOf": exact_multiple})
    return exact(schema, format_checker=jsonschema.FormatChecker(["date", "email", "ipv4", "ipv6"]))


def ordered(value: Any, schema: Any) -> Any:
    """The value in the one spelling that abcli has for it: named properties first, in their order, and 1 for 1.0."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [ordered(item, None) for item in value]
    if not isinstance(value, dict):
        return value
    named = list(schema.get("properties", {})) + list(schema.get("required", [])) if isinstance(schema, dict) else []
    names = [name for name in dict.fromkeys([*named, *value]) if name in value]
    return {name: ordered(value[name], None) for name in names}


def is_allowed(matcher: Matcher, model: Model, value: Any) -> bool:
    for token in model.tokenize(_PLAIN.encode(value), add_special=False, parse_special=False):
        if matcher.finished or not matcher.allows(token):
            return False
        matcher.accept(token)
    return matcher.finished or any(matcher.allows(token) for token in ends_of(model))


def ends_of(model: Model) -> list[int]:
    return [token for token in range(model.vocabulary_size) if model.is_end(token)]


def check_suite(model: Model, directory: Path) -> int:
    """Every group of the suite; the number of invalid documents that are allowed."""
    counts: Counter[str] = Counter()
    files = sorted((directory / "tests" / "draft2020-12").glob("*.json"))
    files += [
        directory / "tests" / "draft2020-12" / "optional" / "format" / f"{name}.json" for name in ("date", "time")
    ]
    for path in files:
        for group in json.loads(path.read_text(encoding="utf-8")):
            try:
                model.matcher(Constraint("json_schema", json.dumps(group["schema"])))
            except GrammarError as error:
                counts["groups refused"] += 1
                print(f"refused: {path.stem}: {group['description']}: {error.message}")
                continue
            counts["groups compiled"] += 1
            for test in group["tests"]:
                matcher = model.matcher(Constraint("json_schema", json.dumps(group["schema"])))
                allowed = is_allowed(matcher, model, ordered(test["data"], group["schema"]))
                verdict = f"{'valid' if test['valid'] else 'invalid'} {'allowed' if allowed else 'forbidden'}"
                counts[verdict] += 1
                if allowed != test["valid"]:
                    print(f"{verdict}: {path.stem}: {group['description']}: {test['description']}")
    print(json.dumps(dict(counts)))
    return counts["invalid allowed"]


def random_answer(matcher: Matcher, model: Model, source: np.random.Generator, closing: Any, limit: int) -> str | None:
    """Tokens drawn from all that are allowed, closing ones ever more often; None if the limit is reached."""
    text = b""
    for step in range(limit):
        allowed = matcher.mask()
        ending = np.flatnonzero(allowed & closing)
        choices = ending if len(ending) and source.random() < step / limit * 4 else np.flatnonzero(allowed)
        token = int(source.choice(choices))
        matcher.accept(token)
        if model.is_end(token):
            return text.decode()
        text += model.piece(token)
        if matcher.finished:
            return text.decode()
    return None


def check_answers(model: Model, directory: Path, count: int, answers: int, seed: int, limit: int) -> int:
    """Random answers under `count` schemas that compile; the number that do not validate."""
    source = random.Random(seed)
    files = sorted(path for path in directory.rglob("*.json"))
    source.shuffle(files)
    numbers = np.random.default_rng(seed)
    pieces = [model.piece(token) for token in range(model.vocabulary_size)]
    closing = np.array([piece in (b'"', b"}", b"]", b'"}', b'"]', b"0", b"1") for piece in pieces])
    closing[ends_of(model)] = True
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for path in files:
        if counts["schemas"] == count:
            break
        text = path.read_text(encoding="utf-8")
        try:
            wanted = Constraint("json_schema", text)
            model.matcher(wanted)
        except GrammarError as error:
            counts["refused"] += 1
            reasons[re.sub(r"[$\"'].*|[0-9].*", "", error.message).strip()] += 1
            continue
        counts["schemas"] += 1
        judge = judge_of(json.loads(text))
        for _ in range(answers):
            answer = random_answer(model.matcher(wanted), model, numbers, closing, limit)
            if answer is None:
                counts["cut off"] += 1
                continue
            counts["complete"] += 1
            problem = what_is_wrong(judge, answer)
            if problem:
                counts["failed"] += 1
                print(f"failed: {path}: {problem}: {answer[:300]!r}")
    print(json.dumps({**counts, "reasons": dict(reasons.most_common())}))
    return counts["failed"]


def what_is_wrong(judge: Any, answer: str) -> str:
    try:
        error = next(judge.iter_errors(json.loads(answer)), None)
    except ValueError as problem:
        return f"no JSON: {problem}"
    except (re.error, jsonschema.exceptions._WrappedReferencingError, RecursionError) as problem:
        return "" if isinstance(problem, re.error) else f"cannot be judged: {type(problem).__name__}"
    return "" if error is None else f"{error.json_path}: {error.message[:200]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models") / DEFAULT_MODEL_FILE)
    parser.add_argument("--suite", type=Path)
    parser.add_argument("--schemas", type=Path)
    parser.add_argument("--count", type=int, default=200, help="how many schemas to write answers for")
    parser.add_argument("--answers", type=int, default=5, help="how many answers for each")
    parser.add_argument("--limit", type=int, default=400, help="most tokens of one answer")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    # Patterns that Python reads with a doubt.
    warnings.simplefilter("ignore", FutureWarning)
    failed = 0
    with Model(check_model(ModelConfig(options.model))) as model:
        if options.suite:
            failed += check_suite(model, options.suite)
        if options.schemas:
            failed += check_answers(model, options.schemas, options.count, options.answers, options.seed, options.limit)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
