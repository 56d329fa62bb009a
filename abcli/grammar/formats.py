"""The formats of JSON Schema that can be enforced."""

from __future__ import annotations

_YEAR = "[0-9]{4}"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|{_YEAR}-(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|{_YEAR}-02-(?:0[1-9]|1[0-9]|2[0-8])|{_LEAP_YEAR}-02-29)"
)
_HOUR_MINUTE = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = f"{_HOUR_MINUTE}:[0-5][0-9](?:\\.[0-9]+)?(?:[zZ]|[+-]{_HOUR_MINUTE})"

# RFC 3339 without its leap seconds, which most readers of dates refuse. llguidance's own allow 29 February in every
# year and second 60 in every minute.
PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}[tT]{_TIME}$"}
# Those that llguidance enforces as they are (parser/src/json/formats.rs), with the length beyond which they are wrong.
NATIVE: dict[str, int | None] = {
    "duration": None,
    "email": None,
    "hostname": 253,
    "ipv4": None,
    "ipv6": None,
    "uri": None,
    "uuid": None,
}
