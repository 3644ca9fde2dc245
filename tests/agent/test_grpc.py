"""The envd protocol over gRPC, as gRPC's own client speaks it; and packed by gzip."""

import gzip
import json

import grpc
import pytest
from e2b.envd.filesystem import filesystem_pb as files
from e2b.envd.process import process_pb as processes

from conftest import TOKEN, in_threads
from test_e2b import agent, ask, box, frames  # noqa: F401  (fixtures)

WHO = [("x-access-token", TOKEN)]


class Client:
    def __init__(self, agent, **options):
        self.channel = grpc.insecure_channel(f"127.0.0.1:{agent.envd_port()}", **options)

    def unary(self, method, request, answer, metadata=WHO, **more):
        call = self.channel.unary_unary(f"/{method}", lambda message: message.to_binary(), answer.from_binary)
        return call(request, metadata=metadata, timeout=30, **more)

    def start(self, *argv, metadata=WHO, timeout=30):
        request = processes.StartRequest(process=processes.ProcessConfig(cmd=argv[0], args=list(argv[1:])))
        call = self.channel.unary_stream("/process.Process/Start", lambda message: message.to_binary(),
                                         processes.StartResponse.from_binary)
        return call(request, metadata=metadata, timeout=timeout)


@pytest.fixture
def client(agent):  # noqa: F811
    client = Client(agent)
    yield client
    client.channel.close()


def events(call):
    """Its output, and how it ended."""
    out, end = b"", None
    for answer in call:
        event = answer.event.event
        if event.field == "data":
            data = event.value.output
            out += data.value
        elif event.field == "end":
            end = event.value
    return out, end


def test_calls_and_streams(client):
    out, end = events(client.start("sh", "-c", "echo one; echo two; exit 3"))
    assert out == b"one\ntwo\n" and end.exit_code == 3
    info = client.unary("filesystem.Filesystem/Stat", files.StatRequest(path="/etc"), files.StatResponse)
    assert info.entry.path == "/etc"
    assert client.unary("process.Process/List", processes.ListRequest(), processes.ListResponse).processes == []


def test_many_calls_on_one_connection(client):
    def one(number):
        out, end = events(client.start("sh", "-c", f"echo {number}"))
        assert out == f"{number}\n".encode() and end.exited
    in_threads(40, one)


def test_errors_have_gRPCs_own_codes(client):
    def code(call):
        with pytest.raises(grpc.RpcError) as error:
            list(call()) if callable(call) else call
        return error.value.code(), error.value.details()
    stat = lambda path: client.unary("filesystem.Filesystem/Stat", files.StatRequest(path=path), files.StatResponse)
    with pytest.raises(grpc.RpcError) as error:
        stat("/no/such/ä")
    assert error.value.code() == grpc.StatusCode.NOT_FOUND and "/no/such/ä" in error.value.details()
    with pytest.raises(grpc.RpcError) as error:
        client.unary("process.Process/List", processes.ListRequest(), processes.ListResponse, metadata=[("x-access-token", "wrong")])
    assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert code(lambda: client.start("sh", "-c", "true", metadata=[*WHO, ("authorization", "Basic bm9ib2R5LWhlcmU6")]))[0] \
        == grpc.StatusCode.UNAUTHENTICATED
    assert code(lambda: client.start(""))[0] == grpc.StatusCode.INVALID_ARGUMENT
    assert code(lambda: client.start("sleep", "100", timeout=0.5))[0] == grpc.StatusCode.DEADLINE_EXCEEDED
    with pytest.raises(grpc.RpcError) as error:
        client.unary("process.Process/None", processes.ListRequest(), processes.ListResponse)
    assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_client_that_packs_its_messages(agent):  # noqa: F811
    client = Client(agent, compression=grpc.Compression.Gzip)
    out, end = events(client.start("sh", "-c", "echo " + "x" * 5000))
    assert len(out) == 5001 and end.exited
    client.channel.close()


def test_grpc_web_ends_with_a_message(agent):  # noqa: F811
    headers = {"X-Access-Token": TOKEN, "Content-Type": "application/grpc-web+json"}
    status, answered, body = ask(agent, "POST", "/filesystem.Filesystem/Stat", frames({"path": "/"}), headers)
    length = int.from_bytes(body[1:5], "big")
    assert status == 200 and answered["Content-Type"] == "application/grpc-web+json" and body[0] == 0
    assert json.loads(body[5:5 + length])["entry"]["path"] == "/"
    assert body[5 + length] == 0x80 and body[10 + length:] == b"grpc-status: 0\r\n"
    _, answered, body = ask(agent, "POST", "/filesystem.Filesystem/Stat", frames({"path": "/none"}), headers)
    assert (answered["grpc-status"], body) == ("5", b"")


def test_packed_calls_of_connect(agent):  # noqa: F811
    headers = {"X-Access-Token": TOKEN, "Content-Type": "application/json", "Content-Encoding": "gzip"}
    path = "/filesystem.Filesystem/Stat"
    assert ask(agent, "POST", path, gzip.compress(b'{"path": "/"}'), headers)[0] == 200
    assert ask(agent, "POST", path, b"nonsense", headers)[0] == 400
    bomb = gzip.compress(b" " * (65 << 20))
    assert ask(agent, "POST", path, bomb, headers)[0] == 429
    headers["Content-Encoding"] = "br"
    assert ask(agent, "POST", path, b"{}", headers)[0] == 501


def test_packed_files(agent, box, tmp_path):  # noqa: F811
    content = b"a line of it\n" * 100_000
    headers = {"X-Access-Token": TOKEN, "Content-Type": "application/octet-stream", "Content-Encoding": "gzip"}
    path = f"/files?path={tmp_path}/packed"
    assert ask(agent, "POST", path, gzip.compress(content[:700_000]) + gzip.compress(content[700_000:]), headers)[0] == 200
    assert (tmp_path / "packed").read_bytes() == content
    assert ask(agent, "POST", path, b"\x1f\x8bnonsense", headers)[0] == 400
    box.files.write(f"{tmp_path}/sdk", content, gzip=True)
    assert (tmp_path / "sdk").read_bytes() == content
    assert box.files.read(f"{tmp_path}/sdk", gzip=True, format="bytes") == content
    path = f"/files?path={tmp_path}/sdk"
    status, answered, body = ask(agent, "GET", path, headers={"X-Access-Token": TOKEN, "Accept-Encoding": "gzip"})
    assert answered["Content-Encoding"] == "gzip" and len(body) < len(content) / 10 and gzip.decompress(body) == content
    request = {"X-Access-Token": TOKEN, "Accept-Encoding": "br, identity;q=0"}
    assert ask(agent, "GET", path, headers=request)[0] == 406
    request = {"X-Access-Token": TOKEN, "Accept-Encoding": "gzip", "Range": "bytes=2-5"}
    status, answered, body = ask(agent, "GET", path, headers=request)
    assert (status, body) == (206, content[2:6]) and "Content-Encoding" not in answered
