"""Runs the checks, in an order: the node is installed, then used, upgraded, and left as it was."""

import subprocess
import time
import traceback

# In the order in which they run.
import checks_chart  # noqa: F401
import checks_node  # noqa: F401
import checks_pods  # noqa: F401
import checks_lifecycle  # noqa: F401
import checks_examples  # noqa: F401
import checks_engines  # noqa: F401
import checks_monitoring  # noqa: F401
import checks_storage  # noqa: F401
import checks_agent  # noqa: F401
import checks_upgrade  # noqa: F401
import tools
from session import SLEEP, Skipped, pod, sh

FAILURES = (AssertionError, OSError, subprocess.TimeoutExpired, KeyError, IndexError, ValueError, StopIteration, tools.Missing)


class Checks:
    def __init__(self, session, only):
        self.session = session
        self.only = only
        self.failed = []

    def one(self, function):
        name = function.__name__
        began = time.monotonic()
        try:
            function(self.session)
            print(f"test {name} ... ok ({time.monotonic() - began:.1f} s)", flush=True)
        except Skipped as e:
            print(f"test {name} ... SKIPPED: {e}", flush=True)
        except FAILURES as e:
            self.failed.append(name)
            print(f"test {name} ... FAILED\n{traceback.format_exc()}\n{e}", flush=True)

    def chosen(self, function):
        return not self.only or any(word in function.__name__ for word in self.only)

    def run(self, listed, last, between=lambda: None):
        """All of a list, beside a pod of runc's, which has to go through it undisturbed, and then the one that takes runx away
        again; `between` is called before that. Gives the names of the failed."""
        session = self.session
        session.apply(pod("beside", sh(SLEEP), runtime=None, nodeSelector={"kubernetes.io/hostname": session.node.name}))
        session.ready("beside")
        before = session.get("pod", "beside")["status"]["containerStatuses"][0]
        for function in sorted(listed, key=lambda function: not getattr(function, "is_basis", False)):
            basis = getattr(function, "is_basis", False)
            if basis or self.chosen(function):
                self.one(function)
                if basis and self.failed:
                    return self.failed
        if not self.failed:
            between()
        if self.chosen(last):
            self.one(last)
        after = session.get("pod", "beside")["status"]["containerStatuses"][0]
        if before == after and session.kubectl("exec", "beside", "--", "echo", "answer", check=False).stdout == "answer\n":
            print("test a_pod_of_runcs_is_undisturbed ... ok", flush=True)
        else:
            self.failed.append("a_pod_of_runcs_is_undisturbed")
            print(f"test a_pod_of_runcs_is_undisturbed ... FAILED\n{before}\n{after}")
        return self.failed
