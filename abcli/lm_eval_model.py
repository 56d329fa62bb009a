"""abcli's models in EleutherAI's lm-evaluation-harness, under the name `abcli`; imported where that is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from abcli.chat.asking import plain_asked
from abcli.errors import ContextFullError
from abcli.likelihood import TokenScore, windows
from abcli.llm import load
from abcli.sampling import generation_config

_SLOTS = 4
_NEW_TOKENS = 256
# What tasks say beside the settings that abcli has, too.
_OWN = ("until", "max_gen_toks", "do_sample", "max_length", "num_beams")


@register_model("abcli")
class AbcliLM(TemplateLM):  # type: ignore[misc]
    """A model with its buckets: `--model_args model=NAME,buckets=6,ctx_size=2048,slots=4`, as `abcli.load` has them."""

    def __init__(
        self,
        model: str | None = None,
        slots: int | None = None,
        batch_size: int | str | None = None,
        prefill: Any = "exact",
        max_batch_size: int | None = None,
        device: str | None = None,
        **settings: Any,
    ) -> None:
        """`model` is a path or a name, None for the default model. As many requests as there are `slots` are computed
        together, else as many as `batch_size` says: a number above 1, which lm-eval gives where nobody said any.

        Every bucket computes whole contexts, as the method is published, unless `prefill` says otherwise. The last two
        are lm-eval's and mean nothing here. Raises what `load` raises.
        """
        super().__init__()
        said = str(batch_size)
        slots = slots or (int(said) if said.isdigit() and said not in ("0", "1") else _SLOTS)
        self.llm = load(model, slots=slots, prefill=prefill, warn=lambda line: tqdm.write(line), **settings)
        self._reads_control_tokens = False

    @property
    def eot_token_id(self) -> int:
        """The token that ends texts."""
        text = self.llm.native.eos_text
        return self.llm.tokenize(text, add_special=False, parse_special=True)[0] if text else self.llm.first_token

    @property
    def prefix_token_id(self) -> int:
        """The token that texts without a context follow."""
        return self.llm.first_token

    @property
    def max_length(self) -> int:
        """The tokens of the context."""
        return self.llm.context_size

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_others: Any) -> list[int]:
        """The tokens of a text; control tokens in it count once a chat template has been applied."""
        begun = self._reads_control_tokens and string.startswith(self.llm.native.bos_text or "\0")
        special = add_special_tokens is not False and not begun
        return self.llm.tokenize(string, add_special=special, parse_special=self._reads_control_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_others: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(self._end(context, continuation), continuation) for _text, context, continuation in requests]
        found = []
        scored = self._shown(
            "loglikelihood", len(pairs), disable_tqdm, lambda on_done: self.llm.score(pairs, on_done=on_done)
        )
        for (text, *_), scores in zip(requests, scored, strict=True):
            answer = (_total(scores), all(score.likeliest for score in scores))
            self.cache_hook.add_partial("loglikelihood", text, answer)
            found.append(answer)
        return found

    def _end(self, context: list[int], continuation: list[int]) -> list[int]:
        """As much of a context's end as there is room for beside what continues it, as lm-eval's own models do.

        Raises ContextFullError if that is nothing.
        """
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ContextFullError(len(continuation), self.max_length)
        return context[-room:]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows that overlap by one token."""
        texts = [request.args[0] for request in requests]
        parts = [
            windows([self.prefix_token_id, *self.tok_encode(text, add_special_tokens=False)], self.max_length)
            for text in texts
        ]
        pairs = [pair for windowed in parts for pair in windowed]
        scored = iter(
            self._shown("rolling", len(pairs), disable_tqdm, lambda on_done: self.llm.score(pairs, on_done=on_done))
        )
        found = []
        for text, windowed in zip(texts, parts, strict=True):
            found.append(sum(_total(next(scored)) for _ in windowed))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What each context is continued with, up to one of its stop strings."""

        def ask(request: Any) -> Any:
            context, given = request.args
            until = given.get("until") or ()
            new = int(given.get("max_gen_toks", _NEW_TOKENS))
            settings = {name: value for name, value in given.items() if name not in _OWN and value is not None}
            if not given.get("do_sample", settings.get("temperature", 0) > 0):
                settings["temperature"] = 0
            stop = (until,) if isinstance(until, str) else tuple(until)
            tokens = self.tok_encode(context)[-max(1, self.max_length - new) :]
            config = generation_config(max_tokens=new, stop=tuple(filter(None, stop)), **settings)
            return plain_asked(tokens or [self.prefix_token_id], config)

        def answer(on_done: Callable[[int], object]) -> dict[int, str]:
            found: dict[int, str] = {}
            for place, answered in self.llm.answer_many(map(ask, requests)):
                found[place] = answered.text
                self.cache_hook.add_partial("generate_until", requests[place].args, answered.text)
                on_done(len(found))
            return found

        texts = self._shown("generate_until", len(requests), disable_tqdm, answer)
        return [texts[place] for place in range(len(requests))]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model's chat template makes of it."""
        from abcli.chat.message_format import as_messages

        self._reads_control_tokens = True
        tokens = self.llm.template.tokens(as_messages(chat_history), add_generation_prompt=add_generation_prompt)
        return b"".join(self.llm.native.piece(token, special=True) for token in tokens).decode("utf-8", "replace")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the model's own template, for lm-eval's records."""
        return self.llm.native.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """What stands for the model and its tokenizer in lm-eval's cache of requests."""
        return self.llm.model.fingerprint

    @staticmethod
    def _shown(what: str, total: int, hidden: bool, work: Callable[[Callable[[int], object]], Any]) -> Any:
        """What `work` returns, which is given a function to tell how much is done."""
        with tqdm(total=total, desc=f"abcli {what}", disable=hidden) as bar:
            return work(lambda done: bar.update(done - bar.n))


def _total(scores: Sequence[TokenScore]) -> float:
    return sum(score.log_probability for score in scores)
