"""A real S3 server on localhost, which can be made to fail."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from cae2pipe.artifacts.storage import to_path

Mood = tuple[str, str]
BUSY: Mood = ("503 Slow Down", "SlowDown: please reduce your request rate")
FORBIDDEN: Mood = ("403 Forbidden", "InvalidAccessKeyId: the key does not exist")


class Moody:
    """The server's application; answers with its queued failures, one per request, while there are any."""

    def __init__(self, application: Any):
        self.application = application
        self.moods: list[Mood] = []

    def __call__(self, environment: dict[str, Any], start: Any) -> Any:
        if not self.moods:
            return self.application(environment, start)
        environment["wsgi.input"].read(int(environment.get("CONTENT_LENGTH") or 0))
        status, text = self.moods.pop(0)
        code, message = text.split(": ")
        body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [] if environment["REQUEST_METHOD"] == "HEAD" else [body]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[tuple[str, Moody]]:
    """The server's address and application."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    serving = pytest.importorskip("werkzeug.serving")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moody = Moody(moto.DomainDispatcherApplication(moto.create_backend_app))
    server = serving.make_server("127.0.0.1", 0, moody, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", moody
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def moods(s3_server: tuple[str, Moody]) -> Iterator[list[Mood]]:
    yield s3_server[1].moods
    s3_server[1].moods.clear()


@pytest.fixture
def bucket(s3_server: tuple[str, Moody], monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new bucket, with the environment set so that this and child processes reach it."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server[0],
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",  # disables botocore's own retries, which wait for seconds
    }.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    to_path(f"s3://{name}").fs.mkdir(name)  # type: ignore[attr-defined]
    return f"s3://{name}"
