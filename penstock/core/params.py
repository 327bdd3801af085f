"""Sampling parameters and the one function that checks them, whatever door a request came in by."""

import math
from typing import Final, Literal

import msgspec

from penstock.core.errors import InvalidParameterError

MAX_N: Final = 8
MIN_REPETITION_PENALTY: Final = 0.01
"""Below it a logit of float32 could overflow."""
GREEDY_TEMPERATURE: Final = 1e-5
"""Below it a temperature is greedy, as at vLLM: its inverse would overflow."""
MAX_STOP_STRINGS: Final = 4
MAX_STOP_CHARS: Final = 64
MAX_STOP_TOKEN_IDS: Final = 128
MAX_TOP_LOGPROBS: Final = 20
MAX_LOGIT_BIAS: Final = 300
MAX_BAD_WORDS: Final = 128
MAX_BAD_WORD_CHARS: Final = 64
MAX_ALLOWED_TOKEN_IDS: Final = 1 << 18
MAX_DRY_BREAKERS: Final = 32
DEFAULT_DRY_BREAKERS: Final = ("\n", ":", '"', "*")
INT64_MIN: Final = -(2**63)
INT64_MAX: Final = 2**63 - 1


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens; names and meaning as in vLLM and OpenAI.

    `temperature=0` is greedy. `top_k=0` (or -1) means all tokens. `max_tokens=None` means as
    many as the context holds. `logprobs=None` asks for none, `0` for the sampled token's only,
    `k` for the k likeliest beside it. `seed=None` draws a fresh seed for the request.
    """

    n: int = 1
    """Number of answers, 1 to 8; they share the prompt's blocks."""
    best_of: int | None = None
    """n to 8: so many answers are made, and the n with the highest mean log-probability given. None: n."""
    use_beam_search: bool = False
    """Look for the likeliest answers instead of drawing, with `best_of` (or `n`) beams; `n` are given.
    Nothing is drawn, so temperature, filters and seed do not act, as at temperature 0."""
    length_penalty: float = 1.0
    """-10 to 10, beams only: an answer's score is its log-probability over its length to this power."""
    early_stopping: bool | Literal["never"] = False
    """Beams only. True: stop at as many answers as beams; False: once none is likely to be better; `never`:
    once none can be better."""
    temperature: float = 1.0
    """0 to 2; divides the logits. Below 0.00001 it is greedy."""
    top_p: float = 1.0
    """Greater than 0, at most 1: keep the smallest set of tokens with this probability mass."""
    top_k: int = 0
    """At least -1: keep the k likeliest tokens; 0 and -1 keep all."""
    min_p: float = 0.0
    """0 to 1: drop tokens less likely than this fraction of the likeliest."""
    presence_penalty: float = 0.0
    """-2 to 2: subtracted once from the logit of every token already generated."""
    frequency_penalty: float = 0.0
    """-2 to 2: subtracted for each time the token was generated."""
    repetition_penalty: float = 1.0
    """0.01 to 10: divides positive and multiplies negative logits of tokens seen."""
    typical_p: float = 1.0
    """Greater than 0, at most 1: keep the tokens of about expected surprise, up to this mass; 1 keeps all."""
    top_n_sigma: float = 0.0
    """0 to 100: keep logits within so many standard deviations of the highest; 0 keeps all."""
    xtc_probability: float = 0.0
    """0 to 1: how often, of the tokens above `xtc_threshold`, only the least likely stays."""
    xtc_threshold: float = 0.1
    """0 to 1; above 0.5 nothing can be excluded."""
    dry_multiplier: float = 0.0
    """0 to 100: strength of the penalty on prolonging a repetition; 0 is off."""
    dry_base: float = 1.75
    """1 to 8: by how much it grows with each repeated token."""
    dry_allowed_length: int = 2
    """1 to 4096: repetitions of fewer tokens are free."""
    dry_penalty_last_n: int = -1
    """Tokens that are searched for repetitions; -1 is the whole context, 0 is off."""
    dry_sequence_breakers: tuple[str, ...] = DEFAULT_DRY_BREAKERS
    """At most 32 strings; no repetition reaches across a token that holds one."""
    mirostat: int = 0
    """1 or 2 steers the surprise of each token towards `mirostat_tau`, by the paper's first or second way."""
    mirostat_tau: float = 5.0
    """0 to 100, in bits."""
    mirostat_eta: float = 0.1
    """0 to 1: how fast it steers."""
    bad_words: tuple[str, ...] = ()
    """At most 128 texts of 1 to 64 characters that the answer must not contain as tokens."""
    allowed_token_ids: tuple[int, ...] = ()
    """If not empty, no other token can be chosen; end-of-sequence neither, unless it is among them."""
    logit_bias: dict[int, float] = {}
    """Token id to a bias in -100 to 100, at most 300 entries."""
    seed: int | None = None
    """A signed 64-bit integer; the draws depend on it alone. With the reference kernels in float32 so does
    the answer; with faster ones the logits, and rarely a token, may differ by what shares the batch."""
    stop: tuple[str, ...] = ()
    """At most 4 strings of 1 to 64 characters; the answer ends before the first one found."""
    stop_token_ids: tuple[int, ...] = ()
    """At most 128 token ids that end the answer; the token is not part of the text."""
    include_stop_str_in_output: bool = False
    """Keep the stop string in the text."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    min_tokens: int = 0
    """End-of-sequence and stop tokens cannot be chosen before this many tokens."""
    max_tokens: int | None = None
    """At least 1 (0 is allowed with `echo`), or None for what the context holds."""
    ignore_eos: bool = False
    """Go on past the model's end-of-sequence token."""
    logprobs: int | None = None
    """None, or 0 to 20."""
    prompt_logprobs: int | None = None
    """None, or 0 to 20: the log-probability of each prompt token after the first, and so many others. Such a
    prompt is computed whole: it does not use cached blocks."""

    @property
    def num_sequences(self) -> int:
        """Sequences that the engine computes side by side: answers, or beams."""
        return max(self.n, self.best_of or 0) if self.use_beam_search else self.n

    @property
    def is_greedy(self) -> bool:
        """True if no random number is drawn."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def can_speculate(self) -> bool:
        """False if a draw depends on earlier draws in other ways than by their tokens."""
        return not self.mirostat and not self.use_beam_search

    @property
    def has_penalties(self) -> bool:
        """True if logits depend on the tokens seen so far."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)


NEUTRAL: Final = SamplingParams()
NOT_WITH_BEAMS: Final = (
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "min_tokens",
    "bad_words",
    "allowed_token_ids",
    "dry_multiplier",
    "mirostat",
)
"""What changes logits, or is about draws."""


def _require(ok: bool, *, param: str, value: object, limit: str) -> None:
    if not ok:
        raise InvalidParameterError(f"{param} is {value!r}, it must be {limit}", param=param)


def _in_range(params: SamplingParams, param: str, low: float, high: float) -> None:
    value = getattr(params, param)
    ok = math.isfinite(value) and low <= value <= high
    _require(ok, param=param, value=value, limit=f"between {low} and {high}")


def _check_numbers(params: SamplingParams) -> None:
    _in_range(params, "n", 1, MAX_N)
    if params.best_of is not None:
        _in_range(params, "best_of", params.n, MAX_N)
    _in_range(params, "temperature", 0, 2)
    _in_range(params, "top_p", 0, 1)
    _require(params.top_p > 0, param="top_p", value=params.top_p, limit="greater than 0")
    _in_range(params, "top_k", -1, INT64_MAX)
    _in_range(params, "min_p", 0, 1)
    _in_range(params, "typical_p", 0, 1)
    _require(params.typical_p > 0, param="typical_p", value=params.typical_p, limit="greater than 0")
    _in_range(params, "top_n_sigma", 0, 100)
    _in_range(params, "xtc_probability", 0, 1)
    _in_range(params, "xtc_threshold", 0, 1)
    _in_range(params, "mirostat", 0, 2)
    _in_range(params, "mirostat_tau", 0, 100)
    _in_range(params, "mirostat_eta", 0, 1)
    _in_range(params, "presence_penalty", -2, 2)
    _in_range(params, "frequency_penalty", -2, 2)
    _in_range(params, "repetition_penalty", MIN_REPETITION_PENALTY, 10)
    if params.seed is not None:
        _require(
            INT64_MIN <= params.seed <= INT64_MAX,
            param="seed",
            value=params.seed,
            limit="a signed 64-bit integer",
        )


def _check_dry(params: SamplingParams) -> None:
    _in_range(params, "dry_multiplier", 0, 100)
    _in_range(params, "dry_base", 1, 8)
    _in_range(params, "dry_allowed_length", 1, 4096)
    _in_range(params, "dry_penalty_last_n", -1, INT64_MAX)
    _check_texts(params, "dry_sequence_breakers", num_max=MAX_DRY_BREAKERS, num_chars_max=MAX_STOP_CHARS)


def _check_beams(params: SamplingParams) -> None:
    _in_range(params, "length_penalty", -10, 10)
    if not params.use_beam_search:
        for name, neutral in (("length_penalty", 1.0), ("early_stopping", False)):
            value = getattr(params, name)
            _require(value == neutral, param=name, value=value, limit=f"{neutral} without use_beam_search")
        return
    for name in NOT_WITH_BEAMS:
        if getattr(params, name) != getattr(NEUTRAL, name):
            raise InvalidParameterError(
                f"{name} cannot be used with use_beam_search, which ranks by the model's own probabilities",
                param=name,
            )


def _check_texts(params: SamplingParams, param: str, *, num_max: int, num_chars_max: int) -> None:
    texts: tuple[str, ...] = getattr(params, param)
    limit = f"at most {num_max} strings"
    _require(len(texts) <= num_max, param=param, value=f"a list of {len(texts)}", limit=limit)
    for text in texts:
        _require(
            1 <= len(text) <= num_chars_max,
            param=param,
            value=f"a string of {len(text)} characters",
            limit=f"of 1 to {num_chars_max} characters",
        )


def _check_lists(params: SamplingParams, *, vocab_size: int | None) -> None:
    _check_texts(params, "stop", num_max=MAX_STOP_STRINGS, num_chars_max=MAX_STOP_CHARS)
    _check_texts(params, "bad_words", num_max=MAX_BAD_WORDS, num_chars_max=MAX_BAD_WORD_CHARS)
    num_allowed = len(params.allowed_token_ids)
    _require(
        num_allowed <= MAX_ALLOWED_TOKEN_IDS,
        param="allowed_token_ids",
        value=f"a list of {num_allowed}",
        limit=f"at most {MAX_ALLOWED_TOKEN_IDS} ids",
    )
    _require(
        len(params.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
        param="stop_token_ids",
        value=f"a list of {len(params.stop_token_ids)}",
        limit=f"at most {MAX_STOP_TOKEN_IDS} ids",
    )
    _require(
        len(params.logit_bias) <= MAX_LOGIT_BIAS,
        param="logit_bias",
        value=f"{len(params.logit_bias)} entries",
        limit=f"at most {MAX_LOGIT_BIAS} entries",
    )
    for bias in params.logit_bias.values():
        ok = math.isfinite(bias) and -100 <= bias <= 100
        _require(ok, param="logit_bias", value=bias, limit="between -100 and 100")
    if vocab_size is not None:
        _check_token_ids(params, vocab_size=vocab_size)


def _check_token_ids(params: SamplingParams, *, vocab_size: int) -> None:
    limit = f"a token id from 0 to {vocab_size - 1}"
    for token_id in params.logit_bias:
        _require(0 <= token_id < vocab_size, param="logit_bias", value=token_id, limit=limit)
    for name in ("stop_token_ids", "allowed_token_ids"):
        for token_id in getattr(params, name):
            _require(0 <= token_id < vocab_size, param=name, value=token_id, limit=limit)


def validate_sampling(
    params: SamplingParams,
    *,
    vocab_size: int | None = None,
    allow_zero_max_tokens: bool = False,
) -> None:
    """Check every number and list of `params`; the same check serves every door.

    Args:
        params: what the client asked for.
        vocab_size: when known, token ids are checked against it.
        allow_zero_max_tokens: `/v1/completions` with `echo` may ask for no new token.

    Raises:
        InvalidParameterError: names the field, its value and the limit.
    """
    _check_numbers(params)
    _check_dry(params)
    _check_beams(params)
    _check_lists(params, vocab_size=vocab_size)
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(params, name) is not None:
            _in_range(params, name, 0, MAX_TOP_LOGPROBS)
    least = 0 if allow_zero_max_tokens else 1
    if params.max_tokens is not None:
        _require(
            least <= params.max_tokens <= INT64_MAX,
            param="max_tokens",
            value=params.max_tokens,
            limit=f"at least {least}",
        )
    most = INT64_MAX if params.max_tokens is None else params.max_tokens
    _require(
        0 <= params.min_tokens <= most,
        param="min_tokens",
        value=params.min_tokens,
        limit="between 0 and max_tokens",
    )
