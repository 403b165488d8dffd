"""The requests that programs begin with: served, or refused with the name of what is not supported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running import BASE, Served, error_of

REQUESTS = json.loads(Path(__file__).with_name("first_requests.json").read_text(encoding="utf-8"))["requests"]


@pytest.mark.parametrize("request_", REQUESTS, ids=[request["client"] for request in REQUESTS])
def test_a_first_request(server: Served, request_: dict[str, Any]) -> None:
    body = {"model": BASE, **request_["body"]}
    # Its answer may be long: the first bytes tell enough, and then this client leaves.
    with server.http.stream("POST", request_["path"], json=body, headers=request_.get("headers")) as reply:
        if "meant" in request_:
            assert reply.status_code == 404
            assert request_["meant"] in error_of(json.loads(reply.read()))["message"]
        elif "refused" in request_:
            assert reply.status_code == 400
            assert error_of(json.loads(reply.read()))["param"] == request_["refused"]
        else:
            assert reply.status_code == 200, reply.read()
            assert next(reply.iter_bytes())
