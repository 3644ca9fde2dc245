"""docs/guide.md, followed by somebody who types what it says."""

import os
import pathlib
import re
import subprocess

from terminal import Failed, Terminal, blocks, commands, dialogue, printed

TOP = pathlib.Path(os.environ["RUNX_TOP"])


def test_the_guide_works_line_by_line(tmp_path):
    terminal = Terminal(TOP)
    seen = 0
    try:
        for language, lines in blocks((TOP / "docs/guide.md").read_text()):
            if language == "sh":
                for command in commands(lines):
                    terminal.run(command)
                    seen += 1
            elif language == "console":
                for typed, wanted in dialogue(lines):
                    text = terminal.type(typed)
                    if not printed(wanted, text):
                        raise Failed(f"{typed}\nshould print\n" + "\n".join(wanted) + f"\nand printed\n{text}")
                    seen += 1
        assert not terminal.inside
        assert seen > 20
        left = terminal.run("runx container ls --all --quiet")
        assert left == "", left
    finally:
        terminal.end()


# Rows that need a terminal, which test_terminal.py has, or a registry, which tests/tests/storage.rs has.
ELSEWHERE = re.compile(r"runx (container (run -it|exec -it|attach)|storage pull) ")


def rows():
    """The rows of the tables: docker's words, ours, and what is to be seen."""
    for line in (TOP / "docs/docker.md").read_text().splitlines():
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip("| "))]
        if len(cells) >= 2 and cells[0].startswith("`docker "):
            yield cells[0].strip("`"), cells[1].strip("`"), cells[2] if len(cells) > 2 else ""


def test_what_docker_users_type_works(tmp_path, image):
    work = tmp_path / "work"
    work.mkdir()
    (work / "vars").write_text("FROM_FILE=yes\n")
    subprocess.run(["tar", "-C", tmp_path / "rootfs", "-cf", work / "rootfs.tar", "."], check=True)
    faults, run = [], 0
    for docker, ours, seen in rows():
        assert ours.startswith("runx "), ours
        if ELSEWHERE.match(ours):
            continue
        done = subprocess.run(["bash", "-c", ours], cwd=work, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
                              check=False)
        run += 1
        if done.returncode != 0 or seen not in done.stdout:
            faults.append(f"{ours}\n  ended with {done.returncode}, printed {done.stdout!r} and said {done.stderr!r}")
    subprocess.run("runx container rm -f $(runx container ls -aq)", shell=True, capture_output=True, check=False)
    assert not faults, "\n".join(faults)
    assert run > 40
