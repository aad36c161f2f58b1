"""Images from one Label Studio, and from nowhere else. Standard library only."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from fastsam_rwkv.errors import ImageError

ANSWER_BYTES = 1 << 16  # of a token


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        """Return None, which makes a redirect an error: it could lead anywhere, and with the key."""


class Files:
    """Files of a Label Studio.

    Args:
        url: Its address, such as "http://127.0.0.1:8080".
        key: A legacy token, or a personal access token, which is exchanged for an access token before each file.
        most_bytes: Of a file.
        seconds: Until a file is there.

    Raises:
        ValueError: The address is not one of HTTP.
    """

    def __init__(self, url: str, key: str, most_bytes: int = 64 << 20, seconds: float = 30.0) -> None:
        self._url, self._key, self._most_bytes, self._seconds = url.rstrip("/"), key, most_bytes, seconds
        self._origin = urllib.parse.urlsplit(self._url)[:2]
        if self._origin[0] not in ("http", "https") or not self._origin[1]:
            raise ValueError(f"LABEL_STUDIO_URL must be http://HOST or https://HOST, got {url!r}")
        self._opener = urllib.request.build_opener(_NoRedirect)

    def fetch(self, address: str) -> bytes:
        """Return the file at a URL or a path of Label Studio.

        Raises:
            ImageError: The URL is not Label Studio's, or the file is not there, too large, or too slow.
        """
        url = address if "://" in address else f"{self._url}/{address.lstrip('/')}"
        try:
            origin = urllib.parse.urlsplit(url)[:2]
        except ValueError:  # such as a bracket that is not closed
            origin = None
        if origin != self._origin:
            raise ImageError(f"{address!r} is not at {self._url}, and images are fetched from there only")
        until = time.monotonic() + self._seconds
        if self._key.count(".") == 2:  # a JSON web token
            asked = json.dumps({"refresh": self._key}).encode()
            answer = self._read(f"{self._url}/api/token/refresh/", {"Content-Type": "application/json"}, until, asked)
            try:
                authorization = f"Bearer {json.loads(answer)['access']}"
            except (ValueError, LookupError, TypeError) as error:
                raise ImageError(f"{self._url} gave no access token for the personal access token") from error
        else:
            authorization = f"Token {self._key}"
        return self._read(url, {"Authorization": authorization}, until)

    def _read(self, url: str, headers: dict[str, str], until: float, body: bytes | None = None) -> bytes:
        most = self._most_bytes if body is None else ANSWER_BYTES
        quoted = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        request = urllib.request.Request(quoted, body, headers)
        data = bytearray()
        try:
            with self._opener.open(request, timeout=max(0.001, until - time.monotonic())) as response:
                while part := response.read1(1 << 16):
                    data += part
                    if len(data) > most:
                        raise ImageError(f"{url} has more than {most} bytes")
                    if time.monotonic() > until:
                        raise TimeoutError(f"no answer within {self._seconds:g} seconds")
        except urllib.error.HTTPError as error:
            where = " elsewhere: turn off pre-signed URLs of the storage" if error.code in range(300, 400) else ""
            raise ImageError(f"Label Studio answered {error.code}{where} for {url}") from error
        except (OSError, http.client.HTTPException) as error:
            raise ImageError(f"cannot fetch {url}: {error}") from error
        return bytes(data)
