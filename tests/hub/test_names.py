"""What names mean on the hub, and which files they stand for: two tables, and what always holds."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abcli.errors import ModelFileError, UsageError
from abcli.hub.names import (
    MAX_PARTS,
    QUANT_ORDER,
    HubName,
    choose_files,
    models_among,
    names_hub,
    parse_hub_name,
    parts_of,
    quant_of,
)

Q4 = HubName("user/repo", "Q4_K_M")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("user/repo", HubName("user/repo")),
        ("user/repo:Q4_K_M", Q4),
        ("user/repo:q4_k_m", Q4),
        ("hf:user/repo:q4_k_m", Q4),
        ("HF:user/repo", HubName("user/repo")),
        ("hf://user/repo", HubName("user/repo")),
        ("hf.co/user/repo:Q4_K_M", Q4),
        ("huggingface.co/user/repo", HubName("user/repo")),
        ("user/repo:fp16", HubName("user/repo", "F16")),
        ("user/repo:latest", HubName("user/repo")),
        ("user/repo:UD-Q4_K_XL", HubName("user/repo", "UD-Q4_K_XL")),
        ("user/repo:MXFP4", HubName("user/repo", "MXFP4")),
        ("user/repo@v1.0", HubName("user/repo", revision="v1.0")),
        (f"user/repo@{COMMIT}:Q4_K_M", HubName("user/repo", "Q4_K_M", revision=COMMIT)),
        ("user/repo@v1/file.gguf", HubName("user/repo", file="file.gguf", revision="v1")),
        ("user/repo/file.gguf", HubName("user/repo", file="file.gguf")),
        ("user/repo/Q8_0/file.GGUF", HubName("user/repo", file="Q8_0/file.GGUF")),
        ("Qwen/Qwen2.5-0.5B-Instruct-GGUF", HubName("Qwen/Qwen2.5-0.5B-Instruct-GGUF")),
        ("hf:user/repo.gguf", HubName("user/repo.gguf")),
        ("https://huggingface.co/user/repo", HubName("user/repo")),
        ("https://huggingface.co/user/repo/", HubName("user/repo")),
        ("https://hf.co/user/repo?x=1", HubName("user/repo")),
        ("https://huggingface.co/user/repo/tree/main", HubName("user/repo")),
        ("https://huggingface.co/user/repo/resolve/main/a/b.gguf?download=true", HubName("user/repo", file="a/b.gguf")),
        ("https://huggingface.co/user/repo/blob/v1/b.gguf", HubName("user/repo", file="b.gguf", revision="v1")),
        ("https://huggingface.co/user/repo/tree/refs%2Fpr%2F1", HubName("user/repo", revision="refs/pr/1")),
        # Not names of the hub:
        ("model.gguf", None),
        ("models/model.gguf", None),
        ("./user/repo", None),
        ("/user/repo", None),
        ("~/user/repo", None),
        ("user", None),
        ("user/", None),
        ("/repo", None),
        ("user/repo/more", None),
        ("user/repo/", None),
        ("user/repo:", None),
        ("user/../repo", None),
        ("user/repo/../../file.gguf", None),
        ("user/re po", None),
        ("user\\repo", None),
        ("", None),
        # Meant for the hub, and wrong:
        ("hf:", UsageError),
        ("hf:repo", UsageError),
        ("hf:user/repo/file.txt", UsageError),
        ("hf:user/../repo/file.gguf", UsageError),
        ("hf:-user/repo", UsageError),
        ("https://huggingface.co/user", UsageError),
        ("https://huggingface.co/datasets/user/repo", UsageError),
        ("https://huggingface.co/user/repo/resolve/main/model.bin", UsageError),
        ("https://example.org/user/repo", UsageError),
        ("ftp://huggingface.co/user/repo", UsageError),
    ],
)
def test_names(text: str, expected: HubName | type[Exception] | None) -> None:
    if isinstance(expected, type):
        with pytest.raises(expected) as caught:
            parse_hub_name(text)
        assert isinstance(caught.value, UsageError)
        assert caught.value.hint
    else:
        assert parse_hub_name(text) == expected


@given(st.text(max_size=60) | st.from_regex(r"(hf:|https://hf\.co/)?[a-z./:@-]{0,30}", fullmatch=True))
def test_any_text_is_a_name_or_none_or_a_clear_error(text: str) -> None:
    found = None
    try:
        found = parse_hub_name(text)
    except UsageError:
        assert "://" in text or names_hub(text)
    if found is not None and "/" not in found.revision:
        assert parse_hub_name(f"hf:{found}") == found
        assert ".." not in str(found)


@pytest.mark.parametrize(
    ("path", "quant"),
    [
        ("qwen2.5-0.5b-instruct-q4_k_m.gguf", "Q4_K_M"),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
        ("model_Q5_K_S.gguf", "Q5_K_S"),
        ("model-IQ4_XS.gguf", "IQ4_XS"),
        ("model-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("model-Q4_0_4_4.gguf", "Q4_0_4_4"),
        ("model-TQ1_0.gguf", "TQ1_0"),
        ("model-fp16.gguf", "F16"),
        ("model-BF16-00001-of-00002.gguf", "BF16"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("Q6_K/model-00001-of-00002.gguf", "Q6_K"),
        ("q8_0-distilled-to-Q4_0.gguf", "Q4_0"),
        ("Qwen2.gguf", ""),
        ("model.gguf", ""),
    ],
)
def test_quant_of_a_file(path: str, quant: str) -> None:
    assert quant_of(path) == quant


SEVERAL = [
    "README.md",
    "m-Q2_K.gguf",
    "m-Q4_K_S.gguf",
    "m-q4_k_m.gguf",
    "m-Q8_0.gguf",
    "mmproj-m-Q8_0.gguf",
    "m-F16.gguf",
]
SPLIT = ["Q8_0/m-Q8_0-00001-of-00002.gguf", "Q8_0/m-Q8_0-00002-of-00002.gguf", "m-Q4_0.gguf"]


@pytest.mark.parametrize(
    ("paths", "name", "expected"),
    [
        (SEVERAL, HubName("u/r"), ["m-q4_k_m.gguf"]),
        (SEVERAL, HubName("u/r", "Q4_K_M"), ["m-q4_k_m.gguf"]),
        (SEVERAL, HubName("u/r", "Q8_0"), ["m-Q8_0.gguf"]),
        (SEVERAL, HubName("u/r", "F16"), ["m-F16.gguf"]),
        (SEVERAL, HubName("u/r", file="m-Q2_K.gguf"), ["m-Q2_K.gguf"]),
        (SEVERAL, HubName("u/r", file="mmproj-m-Q8_0.gguf"), ["mmproj-m-Q8_0.gguf"]),
        (SEVERAL[1:3], HubName("u/r"), ["m-Q4_K_S.gguf"]),
        (["m-Q2_K.gguf", "m-Q8_0.gguf"], HubName("u/r"), ["m-Q8_0.gguf"]),
        (["m-Q5_K_M.gguf", "m-Q4_0.gguf"], HubName("u/r"), ["m-Q4_0.gguf"]),
        (["m-Q5_K_M.gguf", "m.gguf"], HubName("u/r"), ["m-Q5_K_M.gguf"]),
        (["model.gguf", "x.bin"], HubName("u/r"), ["model.gguf"]),
        (["m-Q4_K_M.gguf", "m-UD-Q4_K_XL.gguf", "m-Q4_K_L.gguf"], HubName("u/r", "Q4_K_L"), ["m-Q4_K_L.gguf"]),
        (["m-IQ4_NL.gguf", "m-Q4_0_4_4.gguf", "m-Q4_0.gguf"], HubName("u/r", "Q4_0"), ["m-Q4_0.gguf"]),
        (["m-tuned.gguf", "m-plain.gguf"], HubName("u/r", "TUNED"), ["m-tuned.gguf"]),
        (SPLIT, HubName("u/r", "Q8_0"), SPLIT[:2]),
        (SPLIT, HubName("u/r", file=SPLIT[1]), SPLIT[:2]),
        (SPLIT, HubName("u/r"), ["m-Q4_0.gguf"]),
        # What fits nothing, or too much:
        (SEVERAL, HubName("u/r", "Q5_K_M"), "there are: F16, Q2_K, Q4_K_M, Q4_K_S, Q8_0"),
        (SEVERAL, HubName("u/r", "Q4_K"), "there are: F16"),
        (SEVERAL, HubName("u/r", file="m-Q5_0.gguf"), "there are: F16"),
        (SPLIT[:1], HubName("u/r", file=SPLIT[0]), "no GGUF file"),
        (["README.md"], HubName("u/r"), "-GGUF"),
        (["a-Q4_0.gguf", "b-Q4_0.gguf"], HubName("u/r"), "u/r/a-Q4_0.gguf, u/r/b-Q4_0.gguf"),
        (["a.gguf", "b.gguf"], HubName("u/r"), "u/r/a.gguf, u/r/b.gguf"),
        (["a.gguf", "b.gguf"], HubName("u/r", "Q4_0"), "there are: a.gguf, b.gguf"),
    ],
)
def test_choice_of_files(paths: list[str], name: HubName, expected: list[str] | str) -> None:
    for order in (paths, paths[::-1]):
        if isinstance(expected, str):
            with pytest.raises(ModelFileError) as caught:
                choose_files(name, order)
            assert expected in caught.value.hint
        else:
            assert choose_files(name, order) == tuple(expected)


def test_the_order_of_quants_says_each_once() -> None:
    assert len(set(QUANT_ORDER)) == len(QUANT_ORDER)
    assert all(quant_of(f"m-{quant}.gguf") == quant for quant in QUANT_ORDER)


def test_absurd_numbers_of_parts_are_not_spelt_out() -> None:
    assert parts_of("m-00001-of-99999.gguf") == ("m-00001-of-99999.gguf",)
    assert parts_of("m-00001-of-00000.gguf") == ("m-00001-of-00000.gguf",)
    assert len(parts_of(f"m-00001-of-{MAX_PARTS:05d}.gguf")) == MAX_PARTS


@given(
    st.lists(
        st.from_regex(
            r"([a-z]{1,3}/)?[a-z]{1,3}(-(Q4_K_M|q8_0|F16|IQ4_XS))?(-0000[12]-of-00002)?\.gguf", fullmatch=True
        )
    )
)
def test_every_model_can_be_named_by_its_file(paths: list[str]) -> None:
    models = models_among(paths)
    for first, parts in models.items():
        assert choose_files(HubName("u/r", file=first), paths) == parts
        assert set(parts) <= set(paths)
    split = [path for path in paths if re.search(r"-of-00002", path)]
    assert set(paths) - {part for parts in models.values() for part in parts} <= set(split)
    with suppress(ModelFileError):
        assert choose_files(HubName("u/r"), paths) in models.values()
    if len(models) == 1:
        assert choose_files(HubName("u/r"), paths) == parts
