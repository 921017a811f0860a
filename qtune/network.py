"""Whether the hub can be reached; and libraries that would wait for it, told that it cannot."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

SECONDS_TO_ANSWER = 3.0
"""A hub that has not taken a connection by then is not there; a library's retries would take half a minute."""


@cache
def is_reachable() -> bool:
    """Whether the hub, or the proxy on the way to it, takes a connection. Asked once in a process."""
    if constants.HF_HUB_OFFLINE:
        return False
    endpoint = urlsplit(constants.ENDPOINT)
    proxy = getproxies().get(endpoint.scheme)
    target = urlsplit(proxy if "//" in proxy else f"//{proxy}") if proxy else endpoint
    default = 443 if target.scheme == "https" else 80
    try:
        with socket.create_connection((target.hostname or "", target.port or default), SECONDS_TO_ANSWER):
            return True
    except OSError:
        return False


@contextmanager
def offline_datasets() -> Iterator[None]:
    """`datasets` takes what is kept on this computer, or says at once that it is not there.

    Both libraries read HF_HUB_OFFLINE when they are imported (datasets 5.0, config.py), long before anything is asked.
    """
    from datasets import config

    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before
