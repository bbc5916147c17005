"""OpenSSL and others stay out of the processes until somebody needs them, and work then."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from appliance import ROOT, Appliance

HANDLER = """
import concurrent.futures
from handler import Handler

class Digester(Handler):
    def digest(self):
        def work(number):
            import hashlib, hmac, secrets, ssl
            key = hashlib.scrypt(b"pw", salt=secrets.token_bytes(8), n=2, r=1, p=1)
            ssl.create_default_context()
            return hmac.compare_digest(key, key) and ssl.SSLContext is not None
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            return list(pool.map(work, range(16)))

    async def greet(self, port):
        import asyncio, ssl
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        try:  # the server speaks HTTP, which is no TLS
            await asyncio.wait_for(writer.start_tls(ssl.create_default_context(),
                                                    server_hostname="localhost"), 5)
        except ssl.SSLError as error:
            return error.reason
"""

# Threads that ask at once, while the one that came first loads the modules.
AT_ONCE = """
import schedulezero, sys, threading
sys.setswitchinterval(1e-6)
begin, failed = threading.Barrier(8), []
def use():
    import hashlib, hmac, secrets, ssl
    begin.wait()
    try:
        ssl.create_default_context()
        hmac.new(secrets.token_bytes(8), hashlib.sha256(b"x").digest(), "sha256")
    except Exception as error:
        failed.append(error)
threads = [threading.Thread(target=use) for _ in range(8)]
for each in threads: each.start()
for each in threads: each.join()
print(failed)
"""

# The program's file is `__main__` and a handler in the same process imports it once more.
TWICE = """
import runpy, schedulezero
runpy.run_path(schedulezero.__file__, run_name="again")
from ssl import SSLContext
assert SSLContext is not None
"""


def run_python(code: str) -> str:
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert told.returncode == 0, told.stderr
    return told.stdout


PUT_OFF = ("_ssl", "_hashlib", "_lzma", "_bz2", "termios")  # what is loaded with them


def test_importing_the_program_loads_nothing_that_was_put_off() -> None:
    loaded = f"sorted({set(PUT_OFF)} & set(sys.modules))"
    assert run_python(f"import schedulezero, sys; print({loaded})").strip() == "[]"


@pytest.mark.parametrize(
    "use",
    [
        "import ssl; ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)",
        "from ssl import SSLContext, PROTOCOL_TLS_CLIENT; SSLContext(PROTOCOL_TLS_CLIENT)",
        "import hmac; hmac.new(b'k', b'm', 'sha256').hexdigest()",
        "import secrets; secrets.token_hex(4)",
        "import asyncio.sslproto; asyncio.sslproto.SSLProtocol.eof_received",
        "import hashlib; hashlib.pbkdf2_hmac('sha256', b'pw', b'salt', 1)",
        "from secrets import *; token_hex(4)",
        "import lzma; lzma.decompress(lzma.compress(b'x'))",
        "import bz2; bz2.decompress(bz2.compress(b'x'))",
        "import difflib; difflib.get_close_matches('a', ['a'])",
        "from getpass import getuser; getuser()",
    ],
)
def test_what_was_put_off_works_like_any_module(use: str) -> None:
    run_python(f"import schedulezero\n{use}")


def test_threads_that_ask_at_once_all_get_the_whole_module() -> None:
    assert run_python(AT_ONCE).strip() == "[]"


def test_what_was_put_off_survives_a_second_import_of_the_program() -> None:
    run_python(TWICE)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_server_that_works_has_loaded_nothing_that_was_put_off(
    appliance: Callable[..., Appliance],
) -> None:
    site = appliance(handlers={"example": {"run": f"{ROOT}/handler.py:Example"}}).run("run")
    site.wait_connected("example")
    sum_of = {"handler_id": "example", "method_name": "add", "job_params": {"a": 2, "b": 3}}
    assert site.post("/api/run_now", sum_of).json()["result"] == 5
    processes = json.loads(site.cli("status", "--json").stdout)["processes"]
    maps = {one["name"]: Path(f"/proc/{one['pid']}/maps").read_text() for one in processes}
    assert set(maps) == {"governor", "server", "example"}
    loaded = [
        (name, each) for name, text in maps.items() for each in PUT_OFF if f"/{each}." in text
    ]
    assert not loaded


def test_a_handlers_threads_may_all_ask_for_it_at_once(
    appliance: Callable[..., Appliance], tmp_path: Path
) -> None:
    (tmp_path / "digester.py").write_text(HANDLER)
    spec = {"run": f"{tmp_path}/digester.py:Digester"}
    site = appliance(handlers={"digester": spec}).run("run")
    site.wait_connected("digester")
    answer = site.post("/api/run_now", {"handler_id": "digester", "method_name": "digest"})
    assert answer.json()["result"] == [True] * 16
    greeting = {"method_name": "greet", "job_params": {"port": site.http_port}}
    answer = site.post("/api/run_now", {"handler_id": "digester", **greeting})
    assert answer.json()["result"] == "WRONG_VERSION_NUMBER"
