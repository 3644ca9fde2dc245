"""runx in a real terminal: what a person sees and types. With RUNX_PICTURES=DIR, pictures of it go there."""

import io
import os
import pathlib
import re
import shutil
import socket
import subprocess
import threading
import time

import pytest
from rich.console import Console
from rich.text import Text

TOP = pathlib.Path(os.environ["RUNX_TOP"])
PICTURES = os.environ.get("RUNX_PICTURES")


class Tmux:
    """A terminal of tmux's own, with a shell in it."""

    def __init__(self, directory):
        self.base = ["tmux", "-S", str(directory / "tmux"), "-f", "/dev/null"]
        environment = {**os.environ, "PS1": "$ ", "TERM": "xterm-256color"}
        environment.pop("TMUX", None)
        subprocess.run([*self.base, "new-session", "-d", "-x", "100", "-y", "24", "bash", "--norc", "--noprofile"], env=environment,
                       check=True)
        self.until("$ ")

    def tmux(self, *words):
        return subprocess.run([*self.base, *words], capture_output=True, text=True, check=True).stdout

    def screen(self):
        return self.tmux("capture-pane", "-p").rstrip("\n")

    def type(self, text, enter=True):
        # As a person does, after the shell's question where the cursor is was answered: what is typed before that is lost.
        time.sleep(0.3)
        self.tmux("send-keys", "-l", text)
        if enter:
            self.press("Enter")

    def press(self, *keys):
        self.tmux("send-keys", *keys)

    def until(self, wanted, seconds=60):
        """Waits until the last line that is not empty, or with a function the screen, is as wanted."""
        check = wanted if callable(wanted) else lambda screen: bool(screen.strip()) and f"{screen.splitlines()[-1]} ".startswith(wanted)
        until = time.monotonic() + seconds
        while not check(screen := self.screen()):
            assert time.monotonic() < until, f"{wanted} did not come; the screen:\n{screen}"
            time.sleep(0.02)
        return screen

    def ran(self, command, prompt):
        """Types a command on an empty screen, and returns what it left on it once the prompt is back."""
        self.type("clear")
        self.until(lambda screen: screen.strip() == prompt.strip())
        self.type(command)
        return self.until(lambda screen: len(screen.splitlines()) > 1 and screen.splitlines()[-1].strip() == prompt.strip())

    def picture(self, name, title):
        if not PICTURES:
            return
        text = self.tmux("capture-pane", "-p", "-e").rstrip("\n")
        width = int(self.tmux("display-message", "-p", "#{pane_width}"))
        console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
        console.print(Text.from_ansi(text))
        pathlib.Path(PICTURES).mkdir(parents=True, exist_ok=True)
        # Without fonts from elsewhere: whoever looks at it asks nobody else.
        picture = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title=title, unique_id=name), flags=re.DOTALL)
        pathlib.Path(PICTURES, f"{name}.svg").write_text(picture)

    def end(self):
        subprocess.run([*self.base, "kill-server"], capture_output=True, check=False)


@pytest.fixture
def terminal(tmp_path, image):
    if shutil.which("tmux") is None:
        pytest.skip("tmux is missing")
    tmux = Tmux(tmp_path)
    yield tmux
    tmux.end()
    subprocess.run(["runx", "container", "rm", "--force", "shell", "busy"], capture_output=True, check=False)
    left = subprocess.run(["runx", "container", "ls", "--all", "--quiet"], capture_output=True, text=True, check=True).stdout
    assert left == "", left


def test_a_shell_in_a_container_is_one_at_this_terminal(terminal):
    terminal.type("runx container run -it --name shell --hostname box --network none busybox sh")
    terminal.until("/ # ")
    screen = terminal.ran("hostname; tty; id -u", "/ #")
    assert {"box", "/dev/pts/0", "0"} <= set(screen.splitlines()), screen
    # Its size is this terminal's, from the beginning and when that changes.
    assert "24 100" in terminal.ran("stty size", "/ #")
    terminal.tmux("resize-window", "-x", "72", "-y", "20")
    terminal.until(lambda _: "20 72" in terminal.ran("stty size", "/ #"))
    # Ctrl-C ends what runs in there, and neither the shell nor the command here.
    terminal.type("clear")
    terminal.type("sleep 1000")
    top = ["runx", "container", "top", "shell"]
    terminal.until(lambda _: "sleep 1000" in subprocess.run(top, capture_output=True, text=True, check=True).stdout)
    terminal.press("C-c")
    terminal.until("/ # ")
    # On the same screen: clear would be what $? tells of.
    terminal.type("echo code $?")
    terminal.until(lambda screen: "code 130" in screen and screen.endswith("/ #"))
    terminal.picture("shell", "a shell in a container")
    # Away, and back.
    terminal.press("C-p", "C-q")
    terminal.until("$ ")
    screen = terminal.ran("runx container ls", "$")
    assert "shell" in screen and "unning" in screen, screen
    terminal.picture("detached", "detached: the container goes on")
    terminal.type("runx container attach shell")
    terminal.press("Enter")
    terminal.until("/ # ")
    terminal.type("exit 3")
    terminal.until("$ ")
    terminal.type("echo code $?")
    terminal.until(lambda screen: "code 3\n" in screen and screen.endswith("$"))
    # The terminal is a usual one again: it echoes, and a line has its end.
    assert "-echo " not in terminal.ran("stty -a", "$").replace("\n", " ")
    terminal.ran("runx container rm shell", "$")


def test_statistics_are_redrawn_until_ctrl_c(terminal):
    terminal.ran("runx container run -d --name busy --network none busybox sh -c 'while :; do :; done'", "$")
    terminal.type("clear")
    terminal.type("runx container stats")
    terminal.until(lambda screen: "CPU" in screen and re.search(r"busy +[1-9]", screen))
    first = terminal.screen()
    terminal.until(lambda screen: "busy" in screen and screen != first)
    terminal.picture("stats", "runx container stats")
    terminal.press("C-c")
    terminal.until("$ ")
    terminal.ran("runx container rm --force busy", "$")


class Slow:
    """A way to a port on which little gets through a second, so that there is time to look."""

    def __init__(self, port, bytes_per_second):
        self.port, self.rate = port, bytes_per_second
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.port))
            threading.Thread(target=self.copy, args=(client, server, 0), daemon=True).start()
            threading.Thread(target=self.copy, args=(server, client, self.rate), daemon=True).start()

    def copy(self, source, target, rate):
        try:
            while data := source.recv(16384):
                target.sendall(data)
                if rate:
                    time.sleep(len(data) / rate)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass


def test_a_pull_shows_how_far_it_is(terminal, tmp_path):
    registry = shutil.which("docker-registry")
    if registry is None or shutil.which("skopeo") is None:
        pytest.skip("docker-registry or skopeo is missing")
    port = 5917
    (tmp_path / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {tmp_path}/registry}}}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n")
    server = subprocess.Popen([registry, "serve", tmp_path / "config.yml"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 30
        while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
            assert time.monotonic() < until, "the registry did not begin"
            time.sleep(0.05)
        subprocess.run(["runx", "storage", "export", "busybox", tmp_path / "image.tar"], check=True)
        subprocess.run(["skopeo", "copy", "--insecure-policy", "--dest-tls-verify=false", f"oci-archive:{tmp_path}/image.tar",
                        f"docker://127.0.0.1:{port}/busybox:slow"], check=True, capture_output=True)
        subprocess.run(["runx", "storage", "rm", "--force", "busybox"], check=True, capture_output=True)
        slow = Slow(port, 400_000)
        name = f"127.0.0.1:{slow.listener.getsockname()[1]}/busybox:slow"
        terminal.type("clear")
        terminal.type(f"runx storage pull --tls-verify=false {name}")
        terminal.until(lambda screen: "%" in screen or "/s" in screen)
        time.sleep(1)
        terminal.picture("pull", "runx storage pull")
        terminal.until("$ ", 120)
        assert "slow" in terminal.ran("runx storage ls", "$")
    finally:
        server.kill()
        server.wait()
