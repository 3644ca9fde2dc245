"""A terminal that somebody types in, and the lines of a page that he types."""

import os
import re

import pexpect

PROMPT = "guide$ "
# What a shell in a container shows when it waits: busybox's and bash's, of root and of others. busybox asks the terminal where
# the cursor is.
INNER = r"\r?(?:\S+@\S+:\S* |\S* )?[#$] (?:\x1b\[6n)?$"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]")


class Failed(AssertionError):
    """What was typed, and what came of it."""


class Terminal:
    """A shell at a terminal, as a person has it."""

    def __init__(self, directory, environment=None, columns=120):
        variables = {**os.environ, "PS1": PROMPT, "TERM": "dumb", "PS2": "", **(environment or {})}
        self.inside = False
        self.child = pexpect.spawn("bash", ["--norc", "--noprofile", "--noediting"], cwd=str(directory), env=variables, encoding="utf-8",
                                   codec_errors="replace", dimensions=(40, columns), timeout=120)
        self.child.expect_exact(PROMPT)
        # Output alone is wanted, and in the container there is a terminal of its own, which echoes.
        self.child.sendline("stty -echo")
        self.child.expect_exact(PROMPT)

    def type(self, line):
        """Types a line and returns what was printed until the next prompt."""
        self.child.sendline(line)
        at = self.child.expect([re.escape(PROMPT), INNER, pexpect.TIMEOUT, pexpect.EOF])
        text = ESCAPES.sub("", self.child.before).replace("\r", "")
        if at >= 2:
            raise Failed(f"{line}\nwas typed and no prompt came back; so far:\n{text}")
        was, self.inside = self.inside, at == 1
        # A terminal in a container echoes what was typed.
        if was and text.startswith(line):
            text = text[len(line):]
        return text.strip("\n")

    def run(self, line):
        """A line that has to succeed. Returns what it printed."""
        text = self.type(line)
        if not self.inside:
            code = self.type("echo $?")
            if code.strip() != "0":
                raise Failed(f"{line}\nended with {code}:\n{text}")
        return text

    def end(self):
        self.child.close(force=True)


def blocks(page):
    """The language and the lines of each block of code on a page."""
    for found in re.finditer(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        yield found.group(1), found.group(2).splitlines()


def commands(lines):
    """What is typed as one: lines that end with a backslash go on, and so do documents within."""
    lines = iter(lines)
    for line in lines:
        whole = [line]
        while whole[-1].endswith("\\"):
            whole.append(next(lines))
        if within := re.search(r"<<\s*'?(\w+)'?", line):
            while whole[-1] != within.group(1):
                whole.append(next(lines))
        if line.strip() and not line.lstrip().startswith("#"):
            yield "\n".join(whole)


def dialogue(lines):
    """What is typed at a prompt, and the lines that it has to print."""
    typed = []
    for line in lines:
        if found := re.match(r"(?:/ )?[#$] (.*)$", line):
            typed.append((found.group(1), []))
        elif typed and line.strip():
            typed[-1][1].append(line.strip())
    return typed


def printed(wanted, text):
    """Whether these lines are in the text, one after the other. `…` stands for anything."""
    at = 0
    lines = [line.strip() for line in text.splitlines()]
    for line in wanted:
        pattern = re.compile(".*".join(re.escape(part) for part in re.split(r"\s*…\s*", line)))
        while at < len(lines) and not pattern.fullmatch(lines[at]):
            at += 1
        if at == len(lines):
            return False
        at += 1
    return True
