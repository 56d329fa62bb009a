"""The proxy between here and the hub, as the environment or the system names it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from abcli.errors import DownloadError

# In the order in which they win, for addresses of http and https.
_VARIABLES = {
    "http": ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"),
    "https": ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"),
}
_ALL_VARIABLES = (*dict.fromkeys(name for names in _VARIABLES.values() for name in names), "no_proxy", "NO_PROXY")


@dataclass(frozen=True)
class Proxy:
    """A proxy's address, without its password, and where it is set: a variable of the environment or the system."""

    address: str
    source: str


def proxy_for(url: str) -> Proxy | None:
    """The proxy that requests to `url` go through; None if they go straight."""
    parts = urlsplit(url)
    # It brings half of the standard library's network code along.
    from urllib.request import getproxies, proxy_bypass

    proxies = getproxies()
    address = proxies.get(parts.scheme) or proxies.get("all")
    if not address or proxy_bypass(parts.hostname or ""):
        return None
    names = [name for name in _VARIABLES.get(parts.scheme, ()) if os.environ.get(name) == address]
    return Proxy(_without_login(address), names[0] if names else "the settings of the system")


def unusable_settings(error: Exception) -> DownloadError:
    """What to say of an HTTP library that could not even be set up: it reads the settings of proxies and certificates.

    Nothing is quoted but the settings, without passwords.
    """
    settings = {name: _without_login(os.environ[name]) for name in _ALL_VARIABLES if os.environ.get(name)}
    shown = ", ".join(f"{name}={value}" for name, value in settings.items())
    names = ", ".join(settings)
    if isinstance(error, ImportError) and "socks" in shown.lower():
        return DownloadError(
            f"a SOCKS proxy ({shown}) needs a library that is not installed",
            f"pip install 'abcli[socks]', or unset {names}",
        )
    if isinstance(error, OSError):
        return DownloadError(
            f"the certificates for secure connections cannot be read: {error.strerror or type(error).__name__}",
            "check SSL_CERT_FILE and SSL_CERT_DIR",
        )
    if settings:
        return DownloadError(
            f"the proxy cannot be used ({shown})", f"write it like http://127.0.0.1:3128, or unset {names}"
        )
    return DownloadError(f"the HTTP library cannot be set up: {type(error).__name__}", "install abcli again")


def _without_login(address: str) -> str:
    scheme, separator, rest = address.rpartition("://")
    return scheme + separator + rest.rpartition("@")[2]
