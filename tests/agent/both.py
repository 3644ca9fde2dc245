"""Both SDKs at once against one agent: HOST EXECD_PORT ENVD_PORT DIRECTORY, with the token in AGENT_TOKEN. The tests of pods call it."""

import asyncio
import os
import sys

from e2b import AsyncSandbox, PtySize
from e2b.connection_config import ConnectionConfig as E2BConfig
from opensandbox.adapters.factory import AdapterFactory
from opensandbox.config import ConnectionConfig
from opensandbox.models.sandboxes import SandboxEndpoint
from packaging.version import Version

ROUNDS = 10


async def execd(host, port, directory, token):
    factory = AdapterFactory(ConnectionConfig(protocol="http", disable_metrics=True).with_transport_if_missing())
    endpoint = SandboxEndpoint(endpoint=f"{host}:{port}", headers={"X-EXECD-ACCESS-TOKEN": token})
    commands, files = factory.create_command_service(endpoint), factory.create_filesystem_service(endpoint)
    for number in range(ROUNDS):
        done = await commands.run(f"echo execd {number}")
        assert done.text.strip() == f"execd {number}", done
        await files.write_file(f"{directory}/execd-{number}", str(number))
        assert await files.read_file(f"{directory}/execd-{number}") == str(number)


async def envd(host, port, directory, token):
    config = E2BConfig(sandbox_url=f"http://{host}:{port}", extra_sandbox_headers={"X-Access-Token": token})
    box = AsyncSandbox(sandbox_id="pod", sandbox_domain=None, envd_version=Version("0.6.13"), envd_access_token=token,
                       traffic_access_token=None, connection_config=config)
    for number in range(ROUNDS):
        # Where bash is asked for and missing, sh serves.
        done = await box.commands.run(f"echo envd {number}; exit 0")
        assert done.stdout == f"envd {number}\n", done
        await box.files.write(f"{directory}/envd-{number}", str(number))
        assert await box.files.read(f"{directory}/envd-{number}") == str(number)
    seen = []
    terminal = await box.pty.create(PtySize(rows=24, cols=80), on_data=seen.append, timeout=30)
    await box.pty.send_stdin(terminal.pid, b"echo $((40 + 2)); exit\n")
    await terminal.wait()
    assert b"42" in b"".join(seen), seen
    names = {entry.name for entry in await box.files.list(directory)}
    assert f"envd-{ROUNDS - 1}" in names


async def main():
    host, first, second, directory = sys.argv[1:5]
    token = os.environ["AGENT_TOKEN"]
    await asyncio.gather(execd(host, first, directory, token), envd(host, second, directory, token))
    print("both", flush=True)

asyncio.run(main())
# E2B's HTTP client has threads of its own, which now and then abort the interpreter while it ends.
os._exit(0)
