"""From `kubectl apply` to Ready, as the API server's clock and ours see it."""

import json
import statistics
import time

from session import Session, container, pod
from images import BOX, TICK


def started(session, name, image, runtime, command):
    """Seconds until the client sees that the pod is ready."""
    made = pod(name, container(image, *command), runtime=runtime)
    began = time.monotonic()
    session.apply(made)
    session.ready(name)
    took = time.monotonic() - began
    session.kubectl("delete", "pod", name, "--wait=true", "--grace-period=0", "--force")
    return took


def main(cluster, rounds):
    session = Session(cluster)
    kinds = {"runc": (BOX, None, ["sleep", "1000"]), "runx": (BOX, "runx", ["sleep", "1000"]), "runx, WASM": (TICK, "runx", [])}
    times = {kind: [] for kind in kinds}
    for n in range(rounds + 1):
        for kind, (image, runtime, command) in kinds.items():
            took = started(session, f"p{n}-{kind.replace(', ', '-').lower()}", image, runtime, command)
            # The first of each warms what is warm from then on.
            if n:
                times[kind].append(took)
    base = statistics.median(times["runc"])
    print(f"\n{'apply to Ready':16} {'median':>9} {'least':>9} {'of runc':>8}   ({rounds} of each, in turn)")
    for kind, values in times.items():
        median = statistics.median(values)
        print(f"{kind:16} {median * 1000:6.0f} ms {min(values) * 1000:6.0f} ms {median / base:8.2f}")
    print(json.dumps({kind: [round(value, 4) for value in values] for kind, values in times.items()}))
