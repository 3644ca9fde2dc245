# A private containerd with everything of its own, for scripts to source: root, state, sockets and
# namespace. Another containerd on the machine is neither used nor disturbed.
#
# The caller sets `name` (short, for directories) and `dist` (the directory with the programs), calls
# `containerd_begin` and, in any case, `containerd_end`, with `code` set to what it will exit with. After the
# first these are there:
#
#   work        a temporary directory that will be removed
#   namespace   containerd's namespace, and the parent cgroup of all containers
#   ctr ...     the client, connected
# shellcheck shell=sh

cache=/var/lib/runx/wasm
containerd_pid=
problems=

# Directories that are removed at the end if they are empty and were not there before.
shared_directories="/run/containerd/s /run/containerd/fifo /run/containerd/runx /run/containerd \
$cache/digests $cache /var/lib/runx"

containerd_begin() {
    [ "$(id -u)" = 0 ] || die "this starts containers: run it as root"
    for program in containerd ctr unshare busybox tar sha256sum; do
        command -v "$program" >/dev/null || die "$program is missing: run scripts/setup demo"
    done
    for program in runx containerd-shim-runx-v1 runx-wasm-runner runx-wasm-host runx-wasm-compiler runx-agent runx-pool-server runx-image-client; do
        [ -x "$dist/$program" ] || die "$dist/$program is missing: run make build"
    done
    absent=
    for directory in $shared_directories; do
        [ -d "$directory" ] || absent="$absent $directory"
    done
    namespace=runx-$name-$$
    work=$(mktemp -d "${TMPDIR:-/tmp}/runx-$name.XXXXXX")
    cached_before
    socket=$work/containerd.sock
    # Version 2 of the configuration is understood by 1.6, 1.7 and 2.x. Neither the kubelet's interface nor
    # anything that listens on the network is started.
    cat > "$work/containerd.toml" <<TOML
version = 2
root = "$work/root"
state = "$work/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
  "io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri", "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.internal.v1.tracing"]
[grpc]
  address = "$socket"
[ttrpc]
  address = "$socket.ttrpc"
TOML
    # containerd finds io.containerd.runx.v1 as containerd-shim-runx-v1 in its PATH. In a session of its own, so
    # that a Ctrl-C ends this script, which then ends containerd, and not both at once.
    PATH=$dist:$PATH setsid containerd --config "$work/containerd.toml" \
        >"$work/containerd.log" 2>&1 </dev/null &
    containerd_pid=$!
    tries=0
    until command ctr --address "$socket" version >/dev/null 2>&1; do
        tries=$((tries + 1))
        if [ $tries -gt 150 ] || ! kill -0 "$containerd_pid" 2>/dev/null; then
            tail -n 5 "$work/containerd.log" >&2
            die "containerd did not start"
        fi
        sleep 0.1
    done
    # The plainest snapshotter serves where overlayfs does not, as inside of another container.
    snapshotter=native
    if command ctr --address "$socket" plugins ls | grep -q 'snapshotter.*overlayfs.* ok'; then
        snapshotter=overlayfs
    fi
    export CONTAINERD_SNAPSHOTTER=$snapshotter
}

# The client. It keeps the containers' FIFOs in a directory that all its users share, and forgets them when
# it is interrupted: here they lie in our own.
ctr() {
    case "$1 $2" in
        "run "*)
            shift
            set -- run --fifo-dir "$work/fifo" "$@"
            ;;
        "tasks exec")
            shift 2
            set -- tasks exec --fifo-dir "$work/fifo" "$@"
            ;;
    esac
    command ctr --address "$socket" --namespace "$namespace" "$@"
}

die() {
    echo "$0: $*" >&2
    exit 1
}

# --- Taking it all away -----------------------------------------------------------------------------

# Stops and removes everything, then looks whether anything is left; what is goes to `problems`.
containerd_end() {
    [ -n "${work:-}" ] || return 0
    remove_containers
    end_process "$containerd_pid"
    # After containerd, since it would report their deaths. A client that is interrupted while containerd starts a
    # shim for it leaves the shim behind, whatever the runtime; otherwise there is none.
    for pid in $(our_processes); do
        [ "${code:-0}" -ge 128 ] ||
            problem "process $pid ($(tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline")) had to be killed"
        end_process "$pid"
    done
    unmount_all
    remove_cgroups
    remove_cached
    # What a namespace keeps is its cache of seccomp programs, and the counters of its starts.
    states=/run/containerd/runx/$namespace
    rm -rf "$states/.seccomp" "$states/.starts"
    if [ -d "$states" ] && ! rmdir "$states" 2>/dev/null; then
        [ "${code:-0}" -ge 128 ] || problem "states of containers: $(find "$states" -mindepth 1 | xargs)"
        rm -rf "$states"
    fi
    rm -rf --one-file-system "$work" || problem "$work could not be removed"
    for directory in $absent; do
        rmdir "$directory" 2>/dev/null || true
    done
    look_for_leftovers
}

problem() {
    problems="$problems
  $*"
}

remove_containers() {
    [ -n "$containerd_pid" ] && kill -0 "$containerd_pid" 2>/dev/null || return 0
    for id in $(ctr tasks ls -q 2>/dev/null); do
        ctr tasks delete --force "$id" >/dev/null 2>&1 || true
    done
    for id in $(ctr containers ls -q 2>/dev/null); do
        ctr containers delete "$id" >/dev/null 2>&1 || true
    done
    # The shims end by themselves with their last container.
    tries=0
    while [ -n "$(our_processes)" ] && [ $tries -lt 30 ]; do
        tries=$((tries + 1))
        sleep 0.1
    done
}

# What we started has a path below our directory among its arguments, as shims have containerd's address, or is in
# one of our cgroups; containerd itself is not meant. The patterns come by standard input, or grep would find itself.
our_processes() {
    {
        printf '%s\n' "$work/" | grep -lsF -f - /proc/[0-9]*/cmdline || true
        printf '%s\n' "/$namespace/" | grep -lsF -f - /proc/[0-9]*/cgroup || true
    } | cut -d / -f 3 | sort -u | while read -r pid; do
        [ "$pid" = "$containerd_pid" ] || ! is_alive "$pid" || echo "$pid"
    done
}

end_process() {
    [ -n "$1" ] && kill -TERM "$1" 2>/dev/null || return 0
    tries=0
    while is_alive "$1"; do
        tries=$((tries + 1))
        # Ten seconds to end by itself.
        [ $tries -ne 100 ] || kill -KILL "$1" 2>/dev/null || true
        [ $tries -lt 150 ] || { problem "process $1 does not end"; return 0; }
        sleep 0.1
    done
}

# A zombie is not alive: who has to reap it may be anybody.
is_alive() {
    case $(sed -n 's/^State:[[:space:]]*//p' "/proc/$1/status" 2>/dev/null) in
        '' | Z* | X*) return 1 ;;
    esac
}

our_mounts() {
    # Field 5 is the mount point. The later ones lie on the earlier ones.
    cut -d ' ' -f 5 /proc/self/mountinfo | grep -F "$work/" | sort -r
}

unmount_all() {
    for mount in $(our_mounts); do
        umount "$mount" 2>/dev/null || umount -l "$mount" || true
    done
}

# The cgroups named like our namespace. Under version 1 there is one for each controller, and the place
# of this process may come first in the path.
our_cgroups() {
    find /sys/fs/cgroup -mindepth 1 -maxdepth 6 -type d -name "$namespace" 2>/dev/null
}

remove_cgroups() {
    for cgroup in $(our_cgroups); do
        find "$cgroup" -depth -type d -exec rmdir {} \; 2>/dev/null || true
    done
}

# Compiled modules and remembered digests are for the next start, and here there is none.
cached_before() {
    find "$cache" -type f 2>/dev/null | sort > "$work/cached"
}

remove_cached() {
    find "$cache" -type f 2>/dev/null | sort > "$work/cached.after"
    comm -13 "$work/cached" "$work/cached.after" | while read -r file; do
        for digest in ${our_digests:-}; do
            case $file in
                */"$digest".cwasm) rm -f "$file" ;;
                */digests/*) ! grep -Fq "$digest" "$file" 2>/dev/null || rm -f "$file" ;;
            esac
        done
        rmdir "$(dirname "$file")" 2>/dev/null || true
    done
}

look_for_leftovers() {
    [ ! -e "$work" ] || problem "directory $work"
    for mount in $(our_mounts); do problem "mount $mount"; done
    for cgroup in $(our_cgroups); do problem "cgroup $cgroup"; done
    for pid in $(our_processes); do problem "process $pid"; done
    [ ! -e "/run/containerd/runx/$namespace" ] || problem "directory /run/containerd/runx/$namespace"
    # The name of a shim's socket comes from containerd's address, the namespace and the container.
    for id in ${our_containers:-}; do
        name=runx-$(printf '%s' "$socket/$namespace/$id" | sha256sum | cut -d ' ' -f 1)
        if [ -e "/run/containerd/s/$name" ]; then
            problem "socket /run/containerd/s/$name of container $id"
            rm -f "/run/containerd/s/$name"
        fi
    done
    for digest in ${our_digests:-}; do
        for file in "$cache"/*/"$digest.cwasm"; do
            [ ! -e "$file" ] || problem "compiled module $file"
        done
    done
}

# --- Root filesystems -------------------------------------------------------------------------------

# A root filesystem with busybox and a name for each of its programs.
busybox_rootfs() {
    mkdir -p "$1/bin" "$1/etc" "$1/tmp" "$1/root" "$1/proc" "$1/sys" "$1/dev"
    cp "$(command -v busybox)" "$1/bin/busybox"
    for applet in $(busybox --list); do
        [ "$applet" = busybox ] || ln -s busybox "$1/bin/$applet"
    done
    echo 'root:x:0:0:root:/root:/bin/sh' > "$1/etc/passwd"
    echo 'root:x:0:' > "$1/etc/group"
}
