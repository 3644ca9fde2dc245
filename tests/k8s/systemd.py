"""What the installer asks of a node's systemd, for a node that has none: the private socket of systemd's manager, with a unit
containerd.service and transient units that are run once. Whatever else is asked for is refused, as systemd refuses it.

A real systemd is asked in the virtual machine (tests/tests/node_systemd.rs).
"""

import contextlib
import os
import socket
import struct
import subprocess
import threading

CALL, REPLY, ERROR, SIGNAL = 1, 2, 3, 4
SIZES = {"y": ("B", 1), "b": ("I", 4), "n": ("h", 2), "q": ("H", 2), "i": ("i", 4), "u": ("I", 4), "x": ("q", 8), "t": ("Q", 8),
         "d": ("d", 8)}
MANAGER = "org.freedesktop.systemd1.Manager"
UNITS = "/org/freedesktop/systemd1/unit/"
SERVICE = "containerd.service"


class Refused(Exception):
    """A call that is answered by an error."""

    def __init__(self, name, text):
        super().__init__(text)
        self.name = name


# --- Values as D-Bus writes them -------------------------------------------------------------------------------------


def one_type(signature, at):
    """Where the type that begins at `at` ends."""
    if signature[at] == "a":
        return one_type(signature, at + 1)
    if signature[at] in "({":
        at += 1
        while signature[at] not in ")}":
            at = one_type(signature, at)
    return at + 1


def types(signature):
    at = 0
    while at < len(signature):
        end = one_type(signature, at)
        yield signature[at:end]
        at = end


def alignment(kind):
    if kind[0] in "({":
        return 8
    if kind[0] in "gv":
        return 1
    return SIZES[kind[0]][1] if kind[0] in SIZES else 4


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def align(self, to):
        self.at = -(-self.at // to) * to

    def take(self, count):
        if self.at + count > len(self.data):
            raise ValueError("the message is cut off")
        self.at += count
        return self.data[self.at - count:self.at]

    def value(self, kind):
        self.align(alignment(kind))
        if kind in SIZES:
            code, size = SIZES[kind]
            return struct.unpack("<" + code, self.take(size))[0]
        if kind in "sog":
            length = self.value("y" if kind == "g" else "u")
            text = self.take(length).decode()
            self.take(1)
            return text
        if kind == "v":
            return self.value(self.value("g"))
        if kind[0] in "({":
            return tuple(self.value(inner) for inner in types(kind[1:-1]))
        length = self.value("u")
        self.align(alignment(kind[1:]))
        end, found = self.at + length, []
        while self.at < end:
            found.append(self.value(kind[1:]))
        return found


class Writer:
    def __init__(self):
        self.data = bytearray()

    def align(self, to):
        self.data.extend(bytes(-len(self.data) % to))

    def value(self, kind, value):
        self.align(alignment(kind))
        if kind in SIZES:
            self.data.extend(struct.pack("<" + SIZES[kind][0], value))
        elif kind in "sog":
            self.value("y" if kind == "g" else "u", len(value.encode()))
            self.data.extend(value.encode() + b"\0")
        elif kind == "v":
            inner, value = value
            self.value("g", inner)
            self.value(inner, value)
        elif kind[0] == "(":
            for inner, each in zip(types(kind[1:-1]), value):
                self.value(inner, each)
        else:
            begin = len(self.data)
            self.value("u", 0)
            self.align(alignment(kind[1:]))
            first = len(self.data)
            for each in value:
                self.value(kind[1:], each)
            self.data[begin:begin + 4] = struct.pack("<I", len(self.data) - first)

    def all(self, signature, values):
        for kind, value in zip(types(signature), values):
            self.value(kind, value)
        return bytes(self.data)


def message(kind, serial, fields, signature="", values=()):
    body = Writer().all(signature, values)
    fields = [*fields, *([(8, ("g", signature))] if signature else [])]
    head = Writer().all("yyyyuua(yv)", (ord("l"), kind, 0, 1, len(body), serial, fields))
    return head + bytes(-len(head) % 8) + body


# --- The manager -----------------------------------------------------------------------------------------------------


class Connection:
    """One client, with a thread of its own."""

    def __init__(self, manager, stream):
        self.manager, self.stream = manager, stream
        self.serial = 0
        self.lock = threading.Lock()
        self.file = stream.makefile("rb")

    def exactly(self, count):
        data = self.file.read(count)
        if len(data) < count:
            raise EOFError
        return data

    def greet(self):
        """The client says who it is; the kernel says whether that is true."""
        if self.exactly(1) != b"\0":
            raise ValueError("no greeting")
        words = self.file.readline().split()
        user = struct.unpack("3i", self.stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        if words[:2] != [b"AUTH", b"EXTERNAL"] or bytes.fromhex(words[2].decode()).decode() != str(user) or user != 0:
            self.stream.sendall(b"REJECTED EXTERNAL\r\n")
            raise ValueError(f"not root, but {words}")
        self.stream.sendall(b"OK 0123456789abcdef0123456789abcdef\r\n")
        if self.file.readline().strip() != b"BEGIN":
            raise ValueError("no beginning")

    def send(self, kind, fields, signature="", values=()):
        with self.lock:
            self.serial += 1
            self.stream.sendall(message(kind, self.serial, fields, signature, values))

    def serve(self):
        with contextlib.suppress(EOFError, OSError, ValueError), self.stream, self.file:
            self.greet()
            while True:
                start = self.exactly(16)
                length, serial, size = struct.unpack("<III", start[4:])
                rest = self.exactly(-(-size // 8) * 8)
                reader = Reader(start + rest[:size])
                reader.at = 12
                fields = dict(reader.value("a(yv)"))
                body = Reader(self.exactly(length))
                values = [body.value(kind) for kind in types(fields.get(8, ""))]
                try:
                    answer = self.manager.call(self, fields.get(1), fields.get(2, ""), fields.get(3), values)
                    self.send(REPLY, [(5, ("u", serial))], *answer[:2])
                    # What is only begun by a call ends after its answer.
                    if len(answer) > 2:
                        threading.Thread(target=answer[2], daemon=True).start()
                except Refused as e:
                    self.send(ERROR, [(4, ("s", e.name)), (5, ("u", serial))], "s", (str(e),))


class Manager:
    """systemd's place on a node. `node` restarts containerd, and says how a command is run on it."""

    def __init__(self, path, node):
        self.path, self.node = path, node
        self.jobs = 0
        self.asked = []
        self.listener = None
        self.lock = threading.Lock()

    def start(self):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        os.chmod(self.path, 0o600)
        self.listener.listen()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection = Connection(self, self.listener.accept()[0])
                threading.Thread(target=connection.serve, daemon=True).start()

    def stop(self):
        if self.listener:
            # Closing alone does not wake who accepts.
            with contextlib.suppress(OSError):
                self.listener.shutdown(socket.SHUT_RDWR)
            self.listener.close()

    def call(self, connection, path, interface, member, values):
        """The signature and values of an answer, and what is done after it."""
        with self.lock:
            self.asked.append((member, values))
        match (interface, member):
            case ("org.freedesktop.DBus.Peer", "Ping"):
                return "", ()
            case (_, "Subscribe"):
                return "", ()
            case (_, "ResetFailedUnit"):
                if values[0] != SERVICE:
                    raise Refused("org.freedesktop.systemd1.NoSuchUnit", f"Unit {values[0]} not loaded.")
                return "", ()
            case (_, "LoadUnit"):
                return "o", (UNITS + values[0].replace(".", "_2e").replace("-", "_2d"),)
            case ("org.freedesktop.DBus.Properties", "Get"):
                known = path == UNITS + SERVICE.replace(".", "_2e")
                runs = known and self.node.containerd and self.node.containerd.poll() is None
                value = {"LoadState": "loaded" if known else "not-found",
                         "ActiveState": "active" if runs else "inactive"}.get(values[1])
                if value is None:
                    raise Refused("org.freedesktop.DBus.Error.UnknownProperty", f"Unknown property {values[1]}")
                return "v", (("s", value),)
            case (_, "RestartUnit"):
                unit, mode = values
                if unit != SERVICE or mode != "replace":
                    raise Refused("org.freedesktop.systemd1.NoSuchUnit", f"Unit {unit} not found.")
                return self.job(connection, unit, self.node.restart_containerd)
            case (_, "StartTransientUnit"):
                unit, mode, properties, _ = values
                return self.job(connection, unit, self.transient(unit, mode, dict(properties)))
        raise Refused("org.freedesktop.DBus.Error.UnknownMethod", f"Unknown method {member} or interface {interface}.")

    def job(self, connection, unit, work):
        with self.lock:
            self.jobs += 1
            number = self.jobs
        path = f"/org/freedesktop/systemd1/job/{number}"

        def finish():
            result = "done" if work() else "failed"
            fields = [(1, ("o", "/org/freedesktop/systemd1")), (2, ("s", MANAGER)), (3, ("s", "JobRemoved"))]
            # Who has asked may be gone.
            with contextlib.suppress(OSError):
                connection.send(SIGNAL, fields, "uoss", (number, path, unit, result))
        return "o", (path,), finish

    def transient(self, unit, mode, properties):
        """A unit of type oneshot: what there is to run."""
        commands = properties.pop("ExecStart", [])
        known = {"Description", "Type", "CollectMode", "StandardOutputFile", "StandardErrorFile", "TimeoutStartUSec"}
        if mode != "fail" or not unit.endswith(".service") or set(properties) - known or properties.get("Type") != "oneshot":
            raise Refused("org.freedesktop.DBus.Error.InvalidArgs", f"Cannot set properties {sorted(properties)} of {unit}")
        seconds = properties.get("TimeoutStartUSec", 90_000_000) / 1_000_000

        def work():
            for program, words, ignored in commands:
                # systemd executes the path, with the words as they are.
                assert program == words[0], (program, words)
                with open(self.node.root / properties["StandardOutputFile"].lstrip("/"), "r+b") as out, \
                        open(self.node.root / properties["StandardErrorFile"].lstrip("/"), "r+b") as errors:
                    try:
                        code = subprocess.run(self.node.enter(*words), stdin=subprocess.DEVNULL, stdout=out, stderr=errors,
                                              timeout=seconds).returncode
                    except (subprocess.TimeoutExpired, OSError):
                        return False
                if code != 0 and not ignored:
                    return False
            return True
        return work
