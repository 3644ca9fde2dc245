"""Files and directories."""

import os
import socket
import stat
import subprocess

import pytest
from opensandbox.exceptions import SandboxApiException
from opensandbox.models.filesystem import (ContentReplaceEntry, DirectoryListEntry, MoveEntry, SearchEntry,
                                           SetPermissionEntry, WriteEntry)

from conftest import Agent, eventually, run

ROOT = os.geteuid() == 0


def failure(work):
    with pytest.raises(SandboxApiException) as error:
        work()
    return error.value


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_what_is_written_is_read(sdk, tmp_path):
    path = str(tmp_path / "new" / "dätei \"x\".txt")
    sdk.files.write_file(path, "héllo\n", mode=640)
    assert sdk.files.read_file(path) == "héllo\n" and mode(path) == 0o640
    data = bytes(range(256)) * 5000
    sdk.files.write_files([WriteEntry(path=str(tmp_path / "a"), data=data), WriteEntry(path=str(tmp_path / "b"), data="")])
    assert sdk.files.read_bytes(str(tmp_path / "a")) == data
    assert b"".join(sdk.files.read_bytes_stream(str(tmp_path / "a"), chunk_size=1000)) == data
    assert sdk.files.read_bytes(str(tmp_path / "b")) == b""
    info = sdk.files.get_file_info([path])[path]
    assert (info.size, info.mode, info.entry_type) == (7, 640, "file")
    assert sorted(entry.name for entry in os.scandir(tmp_path / "new")) == ["dätei \"x\".txt"]


def test_the_asynchronous_sdk_writes_and_reads(agent, tmp_path):
    async def work():
        files = agent.asynchronous().files
        await files.write_file(str(tmp_path / "x"), b"\0\1\2")
        return await files.read_bytes(str(tmp_path / "x"))

    assert run(work()) == b"\0\1\2"


def test_a_part_of_a_file_is_a_range_or_lines(agent, sdk, tmp_path):
    path = str(tmp_path / "f")
    sdk.files.write_file(path, "one\r\ntwo\nthree\n")
    assert sdk.files.read_bytes(path, range_header="bytes=0-2") == b"one"
    answer = agent.ask("GET", f"/files/download?path={path}", headers={"Range": "bytes=-6"})
    assert (answer.status, answer.body, answer.headers["Content-Range"]) == (206, b"three\n", "bytes 9-14/15")
    assert sdk.files.read_file(path, offset=2, limit=1) == "two"
    assert sdk.files.read_file(path, offset=2) == "two\nthree"
    assert sdk.files.read_file(path, offset=9) == ""
    for query, headers, status in (("&offset=0", {}, 400), ("&limit=x", {}, 400), ("&limit=1", {"Range": "bytes=0-1"}, 400),
                                   ("", {"Range": "bytes=99-"}, 416), ("", {"Range": "lines=1"}, 416)):
        assert agent.ask("GET", f"/files/download?path={path}{query}", headers=headers).status == status, query
    whole = agent.ask("GET", f"/files/download?path={path}")
    assert whole.headers["Content-Disposition"] == 'attachment; filename="f"' and whole.headers["Content-Length"] == "15"
    again = agent.ask("GET", f"/files/download?path={path}", headers={"If-Modified-Since": whole.headers["Last-Modified"]})
    assert again.status == 304


def test_what_is_missing_is_said_to_be(agent, sdk, tmp_path):
    missing = str(tmp_path / "missing")
    for work in (lambda: sdk.files.read_file(missing), lambda: sdk.files.get_file_info([missing]),
                 lambda: sdk.files.move_files([MoveEntry(src=missing, dest=missing + "2")]),
                 lambda: sdk.files.search(SearchEntry(path=missing, pattern="*"))):
        error = failure(work)
        assert error.status_code == 404 and error.error.code == "FILE_NOT_FOUND", error
    answer = agent.ask("POST", "/files/replace", {missing: {"old": "a", "new": "b"}})
    assert (answer.status, answer.json()["code"]) == (404, "FILE_NOT_FOUND")
    sdk.files.delete_files([missing])
    sdk.files.delete_directories([missing])
    for path in ("/files/download", "/files/search", "/directories/list"):
        answer = agent.ask("GET", path)
        assert answer.status == 400 and answer.json()["code"] == "MISSING_QUERY", path
    assert agent.ask("GET", "/files/info").json() == {}


def test_files_are_moved_and_never_over_others(sdk, tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    sdk.files.move_files([MoveEntry(src=str(tmp_path / "a"), dest=str(tmp_path / "deep" / "er" / "a"))])
    assert (tmp_path / "deep" / "er" / "a").read_text() == "a"
    error = failure(lambda: sdk.files.move_files([MoveEntry(src=str(tmp_path / "b"), dest=str(tmp_path / "deep" / "er" / "a"))]))
    assert "already exists" in str(error) and (tmp_path / "b").read_text() == "b"
    sdk.files.move_files([MoveEntry(src=str(tmp_path / "deep"), dest=str(tmp_path / "moved"))])
    assert (tmp_path / "moved" / "er" / "a").exists()


@pytest.mark.skipif(not ROOT, reason="mounts need root")
def test_files_are_moved_between_filesystems(sdk, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", other], check=True)
    try:
        (tmp_path / "tree" / "in").mkdir(parents=True)
        (tmp_path / "tree" / "in" / "f").write_text("x")
        os.symlink("in/f", tmp_path / "tree" / "link")
        os.chmod(tmp_path / "tree" / "in" / "f", 0o640)
        sdk.files.move_files([MoveEntry(src=str(tmp_path / "tree"), dest=str(other / "tree"))])
        assert (other / "tree" / "link").read_text() == "x" and os.readlink(other / "tree" / "link") == "in/f"
        assert mode(other / "tree" / "in" / "f") == 0o640 and not (tmp_path / "tree").exists()
    finally:
        subprocess.run(["umount", other], check=True)


def test_permissions_are_changed(agent, sdk, tmp_path):
    path = tmp_path / "f"
    path.write_text("x")
    sdk.files.set_permissions([SetPermissionEntry(path=str(path), mode=600)])
    assert mode(path) == 0o600
    if ROOT:
        sdk.files.set_permissions([SetPermissionEntry(path=str(path), mode=644, owner="daemon", group="1234")])
        assert (os.stat(path).st_uid, os.stat(path).st_gid, mode(path)) == (1, 1234, 0o644)
        assert sdk.files.get_file_info([str(path)])[str(path)].owner == "daemon"
    assert agent.ask("POST", "/files/permissions", {str(path): {"owner": "no-such-user"}}).status == 500
    assert agent.ask("POST", "/files/permissions", {str(path): {"mode": 888}}).status == 500
    assert agent.ask("POST", "/files/permissions", {str(path): {"mode": "x"}}).status == 400


def test_text_is_replaced(agent, sdk, tmp_path):
    path = tmp_path / "f"
    path.write_text("a.a.a")
    os.chmod(path, 0o640)
    done = sdk.files.replace_contents_detailed([ContentReplaceEntry(path=str(path), old_content="a", new_content="bb")])
    assert done[0].replaced_count == 3 and path.read_text() == "bb.bb.bb" and mode(path) == 0o640
    done = sdk.files.replace_contents_detailed([ContentReplaceEntry(path=str(path), old_content="zz", new_content="")])
    assert done[0].replaced_count == 0
    assert agent.ask("POST", "/files/replace", {str(path): {"old": "", "new": "x"}}).status == 400


def test_files_are_found_by_their_names(agent, sdk, tmp_path):
    for name in ("a.py", "b.txt", "sub/c.py", "sub/.d.py", "sub/deep/e.PY"):
        (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / name).write_text("x")
    os.symlink("/etc", tmp_path / "t" / "link.py")
    find = lambda pattern: [os.path.relpath(entry.path, tmp_path / "t")
                            for entry in sdk.files.search(SearchEntry(path=str(tmp_path / "t"), pattern=pattern))]
    assert find("*.py") == ["a.py", "link.py", "sub/.d.py", "sub/c.py"]
    assert find("**/*.py") == find("*.py") and find("sub/*.py") == []
    assert find("{a,e}.*") == ["a.py", "sub/deep/e.PY"] and find("!(*.py)") == ["b.txt", "sub/deep/e.PY"]
    assert len(find("**")) == 6
    assert agent.ask("GET", f"/files/search?path={tmp_path}/t&pattern=%5Ba").status == 500


def test_directories_are_listed_to_a_depth(agent, sdk, tmp_path):
    for name in ("t/b/c/d", "t/a"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "t/b/f").write_text("x")
    os.symlink("b", tmp_path / "t/z")
    top = tmp_path / "t"
    ls = lambda depth: [os.path.relpath(entry.path, top)
                        for entry in sdk.files.list_directory(DirectoryListEntry(path=str(top), depth=depth))]
    assert ls(1) == ["a", "b", "z"] and ls(2) == ["a", "b", "b/c", "b/f", "z"] and ls(9)[2:4] == ["b/c", "b/c/d"]
    for path, status in ((f"{top}/z", 400), (f"{top}/b/f", 400), (f"{top}/none", 404)):
        assert agent.ask("GET", f"/directories/list?path={path}").status == status, path
    assert agent.ask("GET", f"/directories/list?path={top}&depth=0").json() == []
    assert agent.ask("GET", f"/directories/list?path={top}&depth=-1").status == 400


def test_directories_are_made_and_removed(agent, sdk, tmp_path):
    sdk.files.create_directories([WriteEntry(path=str(tmp_path / "x" / "y"), mode=700)])
    assert mode(tmp_path / "x" / "y") == 0o700
    (tmp_path / "x" / "y" / "f").write_text("x")
    os.symlink(tmp_path, tmp_path / "x" / "up")
    (tmp_path / "kept").write_text("x")
    assert agent.ask("DELETE", f"/files?path={tmp_path}/x").status == 500
    sdk.files.delete_directories([str(tmp_path / "x")])
    assert not (tmp_path / "x").exists() and (tmp_path / "kept").exists()


def test_a_tree_deeper_than_a_stack_is_removed(sdk, tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    os.mkdir("deep", dir_fd=descriptor)
    name = "deep"
    for _ in range(900):
        inner = os.open(name, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor, name = inner, "d"
        os.mkdir(name, dir_fd=descriptor)
    os.close(descriptor)
    sdk.files.delete_directories([str(tmp_path / "deep")])
    assert not (tmp_path / "deep").exists()


def test_variables_and_home_are_expanded(agent, tmp_path):
    (tmp_path / "f").write_text("x")
    for path in ("~/f", "$HOME/f", "$%7BHOME%7D/f", "f"):
        answer = agent.ask("GET", f"/files/info?path={path}")
        assert answer.status == 200 and list(answer.json().values())[0]["path"] == str(tmp_path / "f"), path
    answer = agent.ask("GET", "/files/info?path=$NO_SUCH_B/$NO_SUCH_A")
    assert answer.status == 500 and "NO_SUCH_A,NO_SUCH_B" in answer.json()["message"]


@pytest.mark.skipif(not ROOT, reason="to become somebody else needs root")
def test_an_identity_does_what_that_user_may(agent, tmp_path):
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent != parent.parent and str(parent) != "/tmp":
            parent.chmod(parent.stat().st_mode | 0o011)
    secret, shared = tmp_path / "secret", tmp_path / "shared"
    secret.write_text("root's")
    secret.chmod(0o600)
    shared.mkdir()
    shared.chmod(0o777)
    as_user = "/v1/filesystem/12345/54321"
    assert agent.ask("GET", f"{as_user}/files/download?path={secret}").status == 500
    assert agent.ask("GET", f"/files/download?path={secret}").body == b"root's"
    assert agent.ask("POST", f"{as_user}/directories", {str(shared / "mine"): {"mode": 750}}).status == 200
    made = os.stat(shared / "mine")
    assert (made.st_uid, made.st_gid) == (12345, 54321)
    assert agent.ask("DELETE", f"{as_user}/files?path={secret}").status == 500 and secret.exists()
    assert agent.ask("GET", f"{as_user}/directories/list?path={shared}").json()[0]["owner"] == "12345"
    for path in ("/v1/filesystem/-1/0", "/v1/filesystem/x/0", "/v1/filesystem/4294967296/0"):
        assert agent.ask("GET", f"{path}/files/info?path={secret}").status == 400, path
    # The daemon itself is still who it was.
    assert agent.ask("GET", f"/files/info?path={secret}").status == 200


def form(parts, boundary="opensandbox_boundary"):
    body = b""
    for head, content in parts:
        body += f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + content + b"\r\n"
    return body + f"--{boundary}--\r\n".encode(), {"Content-Type": f"multipart/form-data; boundary={boundary}"}


def test_an_upload_that_makes_no_sense_is_refused(agent, tmp_path):
    path = f'{{"path": "{tmp_path}/f"}}'.encode()
    metadata, file = ('name="metadata"; filename="metadata"', path), ('name="file"; filename="f"', b"x")
    for parts, code in (([], "INVALID_FILE_METADATA"), ([file], "INVALID_FILE_METADATA"), ([metadata], "INVALID_FILE_CONTENT"),
                        ([metadata, metadata, file], "INVALID_FILE"), ([(metadata[0], b"{"), file], "INVALID_FILE_METADATA"),
                        ([(metadata[0], b'{"path": ""}'), file], "INVALID_FILE_METADATA"),
                        ([('name="metadata"', path), file], "INVALID_FILE_METADATA")):
        body, headers = form(parts)
        answer = agent.ask("POST", "/files/upload", body, headers)
        assert (answer.status, answer.json()["code"]) == (400, code), parts
    assert agent.ask("POST", "/files/upload", b"x").json()["code"] == "INVALID_FILE"


def begin_upload(agent, metadata, content, promised):
    boundary = "b"
    body, _ = form([('name="metadata"; filename="metadata"', metadata.encode())], boundary)
    body = body[:-len(f"--{boundary}--\r\n")]
    body += f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'.encode() + content
    return agent.raw("POST", "/files/upload", body, [f"Content-Type: multipart/form-data; boundary={boundary}",
                                                     f"Content-Length: {len(body) + promised}"])


def test_the_end_of_a_chunked_upload_may_come_late_and_the_connection_stays(agent, tmp_path):
    body, headers = form([('name="metadata"; filename="metadata"', f'{{"path": "{tmp_path}/f"}}'.encode()),
                          ('name="file"; filename="f"', b"x")])
    kind = f"Content-Type: {headers['Content-Type']}"
    with agent.raw("POST", "/files/upload", b"%x\r\n%b\r\n" % (len(body), body), [kind, "Transfer-Encoding: chunked"]) as one:
        one.settimeout(0.3)
        with pytest.raises(TimeoutError):
            one.recv(4096)
        one.settimeout(30)
        one.sendall(b"0\r\n\r\n")
        assert one.recv(4096).startswith(b"HTTP/1.1 200 ")
        one.sendall(f"GET /ping HTTP/1.1\r\nHost: x\r\nX-EXECD-ACCESS-TOKEN: {agent.token}\r\n\r\n".encode())
        assert one.recv(4096).startswith(b"HTTP/1.1 200 ")
    assert (tmp_path / "f").read_text() == "x"


def test_the_end_of_a_refused_upload_may_come_late_and_the_connection_stays(agent, tmp_path):
    body, headers = form([('name="file"; filename="f"', b"x" * 1000)])
    kind = f"Content-Type: {headers['Content-Type']}"
    for kind in (kind, "Content-Type: text/plain"):
        with agent.raw("POST", "/files/upload", b"%x\r\n%b\r\n" % (len(body), body), [kind, "Transfer-Encoding: chunked"]) as one:
            one.settimeout(0.3)
            with pytest.raises(TimeoutError):
                one.recv(4096)
            one.settimeout(30)
            one.sendall(b"1000\r\n" + b"y" * 4096 + b"\r\n0\r\n\r\n")
            assert one.recv(4096).startswith(b"HTTP/1.1 400 ")
            one.sendall(f"GET /ping HTTP/1.1\r\nHost: x\r\nX-EXECD-ACCESS-TOKEN: {agent.token}\r\n\r\n".encode())
            assert one.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_an_upload_that_is_cut_leaves_the_old_file(agent, tmp_path):
    path = tmp_path / "d" / "f"
    path.parent.mkdir()
    path.write_text("old")
    connection = begin_upload(agent, f'{{"path": "{path}"}}', b"x" * 5_000_000, 1000)
    connection.close()
    eventually("it was given up", lambda: "cut" in agent.log.read_text() or os.listdir(path.parent) == ["f"])
    assert path.read_text() == "old" and os.listdir(path.parent) == ["f"]


def test_an_upload_goes_on_where_it_was_cut(agent, tmp_path):
    path = tmp_path / "d" / "f"
    begun = f'{{"path": "{path}", "upload_id": "u1", "offset": 0}}'
    connection = begin_upload(agent, begun, b"a" * 100_000, 1000)
    query = f"/files/upload?path={path}&upload_id=u1"
    offset = lambda: agent.ask("GET", query).json().get("offset", 0)
    eventually("a part is there", lambda: offset() > 0)
    connection.shutdown(socket.SHUT_WR)
    connection.close()
    sent = offset()
    assert not path.exists()
    metadata = lambda offset: f'{{"path": "{path}", "upload_id": "u1", "offset": {offset}, "mode": 600}}'.encode()
    whole = b"a" * 100_000 + b"rest"
    body, headers = form([('name="metadata"; filename="m"', metadata(sent + 1)), ('name="file"; filename="f"', b"x")])
    assert agent.ask("POST", "/files/upload", body, headers).status == 409
    sent = offset()
    body, headers = form([('name="metadata"; filename="m"', metadata(sent)), ('name="file"; filename="f"', whole[sent:])])
    assert agent.ask("POST", "/files/upload", body, headers).status == 200
    assert path.read_bytes() == whole and mode(path) == 0o600 and os.listdir(path.parent) == ["f"]


@pytest.mark.skipif(not ROOT, reason="mounts need root")
def test_a_full_disk_is_said_and_leaves_the_old_file(sdk, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", small], check=True)
    try:
        (small / "f").write_text("old")
        error = failure(lambda: sdk.files.write_file(str(small / "f"), b"x" * 3_000_000))
        assert "No space left" in str(error)
        assert (small / "f").read_text() == "old" and os.listdir(small) == ["f"]
    finally:
        subprocess.run(["umount", small], check=True)


def test_files_larger_than_allowed_are_refused(tmp_path):
    agent = Agent(tmp_path, "--max-file-size", "1000")
    try:
        files = agent.sdk().files
        files.write_file(str(tmp_path / "ok"), b"x" * 1000)
        assert failure(lambda: files.write_file(str(tmp_path / "big"), b"x" * 1001)).status_code == 413
        assert not (tmp_path / "big").exists()
        many = ContentReplaceEntry(path=str(tmp_path / "ok"), old_content="x", new_content="xx")
        failure(lambda: files.replace_contents([many]))
        assert (tmp_path / "ok").stat().st_size == 1000
    finally:
        agent.end()


def test_nothing_leads_out_of_a_jail(tmp_path):
    jail, outside = tmp_path / "jail", tmp_path / "outside"
    jail.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("secret")
    os.symlink("../outside", jail / "relative")
    os.symlink(outside, jail / "absolute")
    os.symlink(outside / "secret", jail / "file")
    agent = Agent(tmp_path, "--root", str(jail))
    try:
        files = agent.sdk().files
        files.write_file("/in/side", "x")
        assert (jail / "in" / "side").read_text() == "x" and files.read_file("/in/side") == "x"
        for path in ("/../outside/secret", "/relative/secret", "/absolute/secret", "/file", "/in/../../outside/secret",
                     "/proc/self/root/etc/passwd", str(outside / "secret")):
            assert failure(lambda: files.read_file(path)).status_code == 404, path
        for path in ("/relative/new", "/absolute/new", "/file"):
            try:
                files.write_file(path, "mine")
            except SandboxApiException:
                pass
        assert os.listdir(outside) == ["secret"] and (outside / "secret").read_text() == "secret"
        files.set_permissions([SetPermissionEntry(path="/in/side", mode=600)])
        for work in (lambda: files.set_permissions([SetPermissionEntry(path="/absolute", mode=777)]),
                     lambda: files.move_files([MoveEntry(src="/in/side", dest="/relative/stolen")]),
                     lambda: files.delete_directories(["/absolute/secret", "/relative/../outside"])):
            try:
                work()
            except SandboxApiException:
                pass
        assert os.listdir(outside) == ["secret"] and mode(outside) == 0o755
    finally:
        agent.end()


def test_links_that_move_meanwhile_lead_nowhere_else(tmp_path):
    """Somebody swaps a directory for a link while files are written and read through it."""
    jail, outside = tmp_path / "jail", tmp_path / "outside"
    (jail / "real").mkdir(parents=True)
    outside.mkdir()
    (outside / "f").write_text("secret")
    agent = Agent(tmp_path, "--root", str(jail))
    swap = subprocess.Popen(["sh", "-c", f"cd {jail}; ln -s {outside} link; while :; do mv real x; mv link real; "
                                         "mv real link; mv x real; done"])
    try:
        for number in range(150):
            answer = agent.ask("GET", "/files/download?path=/real/f")
            assert b"secret" not in answer.body
            body, headers = form([('name="metadata"; filename="m"', b'{"path": "/real/f"}'), ('name="file"; filename="f"', b"x")])
            agent.ask("POST", "/files/upload", body, headers)
            agent.ask("DELETE", "/files?path=/real/f")
        assert (outside / "f").read_text() == "secret" and os.listdir(outside) == ["f"]
    finally:
        swap.kill()
        swap.wait()
        agent.end()


def test_times_of_any_year_are_told(sdk, tmp_path):
    directory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else str(tmp_path)
    path = os.path.join(directory, f"runx-far-{os.getpid()}")
    try:
        open(path, "w").close()
        os.utime(path, (300_000_000_000, 300_000_000_000))
        info = sdk.files.get_file_info([path])[path]
        assert info.modified_at.year in (9999, 2446)
        assert sdk.files.read_bytes(path) == b""
        os.utime(path, (-5_000_000_000, -5_000_000_000))
        assert sdk.files.get_file_info([path])[path].modified_at.year <= 1970
    finally:
        os.unlink(path)


def test_an_empty_path_is_refused(agent):
    for method, path in (("DELETE", "/directories?path="), ("DELETE", "/files?path="), ("GET", "/files/info?path=")):
        assert agent.ask(method, path).status == 400, path
    assert agent.ask("DELETE", "/directories?path=/").status == 400


def test_deep_paths_and_patterns_are_no_trouble(agent, tmp_path):
    deep = f"{tmp_path}/" + "a/" * 1500
    assert agent.ask("POST", "/directories", {deep: {}}).status in (200, 500)
    assert agent.ask("DELETE", f"/directories?path={tmp_path}/a").status == 200
    for pattern in ("{" * 4000 + "a" + "}" * 4000, "!(" * 50 + ")" * 50):
        assert agent.ask("GET", f"/files/search?path={tmp_path}&pattern={pattern}").status == 500
    assert agent.ask("GET", "/ping").status == 200


def test_stalled_downloads_hold_up_nobody(agent, tmp_path):
    (tmp_path / "big").write_bytes(b"x" * 20_000_000)
    held = [agent.raw("GET", f"/files/download?path={tmp_path}/big") for _ in range(100)]
    for connection in held:
        connection.recv(10)
    assert agent.ask("GET", f"/files/info?path={tmp_path}/big", timeout=20).status == 200
    for connection in held:
        connection.close()
