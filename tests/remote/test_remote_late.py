"""Remote experts over https, in clips of ``archipel serve``, and clips that nobody wants any more."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi.testclient import TestClient
from tests.remote.conftest import TOKEN, Counted, listening
from tests.remote.test_remote_generate import Failing
from tests.remote.test_remote_refused import _answering, _ask, _lost, _request, _v

from archipel import Archipelago
from archipel.serving.island import App, Bounds, Island
from archipel.serving.limits import Limits
from archipel.serving.server import opened


def _certificate(folder: Path, name: x509.GeneralName) -> Path:
    """A certificate that signs itself, for one name, and its key, in one file."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "island")])
    made = x509.CertificateBuilder().subject_name(who).issuer_name(who).public_key(key.public_key())
    made = made.serial_number(7).not_valid_before(now - datetime.timedelta(days=1))
    made = made.not_valid_after(now + datetime.timedelta(days=1))
    made = made.add_extension(x509.SubjectAlternativeName([name]), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "island.pem"
    path.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(pem) + secret)
    return path


def _tls(island: Island, certificate: Path) -> tuple[socket.socket, str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    sock = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            try:
                raw, _ = sock.accept()
            except OSError:
                return
            try:
                with context.wrap_socket(raw, server_side=True) as connection:
                    _request(connection)
                    _answering(island, _v(island))(connection)
            except OSError:
                raw.close()

    threading.Thread(target=run, daemon=True).start()
    return sock, f"https://127.0.0.1:{sock.getsockname()[1]}"


def test_https_by_an_authority_of_our_own(island: Island, tmp_path: Path) -> None:
    pem = _certificate(tmp_path, x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    sock, url = _tls(island, pem)
    with sock:
        assert bool((_ask(island, url, ca=str(pem)) == 1).all())
        _lost(island, url, "(?i)certificate")


def test_https_with_another_name(island: Island, tmp_path: Path) -> None:
    pem = _certificate(tmp_path, x509.DNSName("other.example"))
    sock, url = _tls(island, pem)
    with sock:
        _lost(island, url, "(?i)certificate", ca=str(pem))


@pytest.mark.parametrize("good", [99, 1])
def test_clips_of_the_server_say_which_expert_was_lost(good: int, island: Island, apart: Any, tmp_path: Path) -> None:
    with listening(Failing(App(island, [TOKEN], Bounds(rows=4)), good)) as url:
        model = Archipelago.load(apart(url).root)
        with (
            opened(model, tmp_path / "state", [], Limits()) as app,
            TestClient(app, base_url="http://127.0.0.1:8000") as client,
        ):
            name = client.post("/v1/videos", json={"prompt": "a", "strategy": "full", "steps": 3}).json()["id"]
            end = time.monotonic() + 30
            while (video := client.get(f"/v1/videos/{name}").json())["status"] != "completed":
                assert time.monotonic() < end and video["status"] != "failed", video
                time.sleep(0.05)
    lost = "expert 2 was lost while this clip was made: from step 2 on it was made without it"
    assert video["warnings"] == ([] if good > 1 else [lost])


class _Enough(Exception):  # noqa: N818
    pass


def test_a_whole_clip_that_nobody_wants_any_more(served: Counted, apart: Any) -> None:
    async def silent(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    def on_step(*_: Any) -> None:
        raise _Enough

    with listening(silent) as url:
        model = Archipelago.load(apart(url).root)
        with pytest.raises(_Enough):
            model.generate("a", strategy="expert-2", steps=3, on_step=on_step)
        time.sleep(0.1)
        assert "2" in model.parts.source.look()  # it was not the expert that failed
