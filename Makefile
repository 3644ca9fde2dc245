# What people and CI call. Everything is built for release; tests use the same programs as users do.

# rustup's programs come before a distribution's older ones: scripts/setup may just have put them there.
CARGO_BIN := $(or $(CARGO_HOME),$(HOME)/.cargo)/bin
export PATH := $(CARGO_BIN):$(PATH)

# Where the programs are collected. They have to lie in one directory.
DIST := $(CURDIR)/target/dist
PROGRAMS := runx containerd-shim-runx-v1 runx-wasm-runner runx-wasm-host runx-wasm-compiler runx-agent runx-image-client runx-pool-server

# Cargo's directory, and its part for this machine. Deferred: rustc may not be there yet.
TARGET = $(abspath $(or $(CARGO_TARGET_DIR),target))
RELEASE = $(TARGET)/$$(rustc -vV | sed -n 's/^host: //p')/release

# What brings them onto nodes, with the digests of all in SHA256SUMS.
INSTALLER := runx-node

# Where the benchmarks leave their numbers.
MEASURED := $(CURDIR)/target/bench

# For scripts/vm test: suites and --skip WORD, everything if it is empty. Emulated, all takes 5 to 20 times as long.
VM_FLAGS ?=
# What `make test` runs of these: the suites whose promises have to do with cgroups, systemd or AppArmor.
VM_SAMPLE := agent cgroup_v2 cgroups command containerd cri_running lsm node_systemd pool rootless runtime seccomp shim systemd task_api

PREFIX ?= /usr/local
DESTDIR ?=

.PHONY: all help build demo test test-programs units clients test-vm in-vm bench pictures soak test-k8s test-k8s-vm lint install uninstall clean

all: build

help:
	@echo "make build     all programs, to target/dist"
	@echo "make demo      shows what runx does, with a containerd of its own (root)"
	@echo "make test      all tests (root)"
	@echo "make test-vm   of these, those that are run again in a virtual machine (root)"
	@echo "make soak      the full counts of kills, pods and probes (root, more than an hour)"
	@echo "make test-k8s  pods on a real control plane and kubelet (root, Go; builds Kubernetes the first time)"
	@echo "make test-k8s-vm  the same with runx on a second node: a virtual machine with cgroup v2 and systemd"
	@echo "make bench     compares with runc, crun and others, and writes docs/benchmarks.md (root)"
	@echo "make lint      formatting and clippy"
	@echo "make install   to \$$PREFIX/bin ($(PREFIX)/bin), with manual pages and completions in \$$PREFIX/share"

# The runner and the host are built alone: cargo unifies features over the packages of one build, and the compiler asks
# for Cranelift, which they must not carry. Each is taken away before the next build can touch it.
# install -C leaves a file alone that is the same, so that what is remembered about it stays valid.
build:
	@scripts/setup build
	@echo "== Building the WASM runner"
	cargo build --release --locked -p runx-wasm
	@mkdir -p $(DIST)
	install -C -m 755 $(RELEASE)/runx-wasm-runner $(DIST)/
	@echo "== Building what runs WASM components"
	cargo build --release --locked -p runx-wasm-host
	install -C -m 755 $(RELEASE)/runx-wasm-host $(DIST)/
	@echo "== Building the agent and the pool's server"
	cargo build --release --locked -p runx-agent -p runx-pool-server
	install -C -m 755 $(RELEASE)/runx-agent $(RELEASE)/runx-pool-server $(DIST)/
	@echo "== Building what fetches images, and the node's installer"
	cargo build --release --locked -p runx-image-client -p runx-node
	install -C -m 755 $(RELEASE)/runx-image-client $(RELEASE)/runx-node $(DIST)/
	@echo "== Building the command, the shim and the WASM compiler"
	cargo build --release --locked -p runx -p containerd-shim-runx -p runx-wasm-compiler
	install -C -m 755 $(RELEASE)/runx $(RELEASE)/containerd-shim-runx-v1 $(RELEASE)/runx-wasm-compiler $(DIST)/
	@cd $(DIST) && sha256sum $(PROGRAMS) $(INSTALLER) >.SHA256SUMS.new && mv .SHA256SUMS.new SHA256SUMS

demo:
	@scripts/setup demo
	@$(MAKE) --no-print-directory build
	@scripts/demo $(DIST)

# The programs are linked as a whole, on one processor, for minutes: another one compiles the tests meanwhile. The clients'
# suites mostly wait: they run beside the unit tests.
test:
	@scripts/setup test
	@scripts/beside $(MAKE) --no-print-directory build -- $(MAKE) --no-print-directory test-programs
	@scripts/beside $(MAKE) --no-print-directory units -- $(MAKE) --no-print-directory clients
	@echo "== Kernel and containerd"
	RUNX_DIST=$(DIST) $(KERNEL_TESTS) -- --test-threads 2
	@$(MAKE) --no-print-directory in-vm VM_FLAGS="$(or $(VM_FLAGS),$(VM_SAMPLE))"

UNIT_TESTS := cargo test --locked --workspace --exclude runx-tests --exclude runx-wasm
RUNNER_TESTS := cargo test --locked -p runx-wasm --features compiler
LEAN_RUNNER_TESTS := cargo test --locked -p runx-wasm --test lean
KERNEL_TESTS := cargo test --locked -p runx-tests

test-programs:
	@echo "== Building the tests"
	$(UNIT_TESTS) --no-run
	$(KERNEL_TESTS) --no-run
	$(RUNNER_TESTS) --no-run
	$(LEAN_RUNNER_TESTS) --no-run

units:
	@echo "== Unit tests"
	$(UNIT_TESTS)
	@echo "== WASM runner, with the compiler to make modules for it"
	$(RUNNER_TESTS)
	@echo "== WASM runner, as it is shipped"
	$(LEAN_RUNNER_TESTS)

clients:
	@echo "== The agent, driven by the SDKs that it is for"
	@tests/agent/run --dist $(DIST)
	@echo "== The chart, by helm"
	@tests/chart/run
	@echo "== The guide and docker's words, line by line, and a real terminal"
	@tests/guide/run --dist $(DIST)
	@echo "== The pool's server, driven by a client of go-judge"
	@tests/pool/run --dist $(DIST)
	@echo "== The virtual machine's disk"
	@! command -v python3 >/dev/null || scripts/vm prepare || echo "the tests in it say it again"

test-vm:
	@scripts/setup test
	@$(MAKE) --no-print-directory build
	@$(MAKE) --no-print-directory in-vm

# The same suites with cgroup v2, systemd and AppArmor, which not every machine has. It says SKIPPED where it cannot.
in-vm:
	@echo "== Kernel and containerd, in a virtual machine with cgroup v2 and systemd"
	@if command -v python3 >/dev/null; then scripts/vm test --dist $(DIST) $(VM_FLAGS); \
	else echo "vm: SKIPPED: python3 is missing"; fi

bench:
	@scripts/setup bench
	@$(MAKE) --no-print-directory build
	@echo "== Building the programs that measure"
	cargo build --release --locked -p runx-tests --bins
	cargo build --release --locked -p runx-wasm --example instantiate
	@rm -rf $(MEASURED) && mkdir -p $(MEASURED)
	@scripts/bench --dist $(DIST) --programs $(RELEASE) --json $(MEASURED)/runtime.json $(BENCH_FLAGS)
	@echo "== The agent"
	@tests/agent/run --dist $(DIST) --figures --json $(MEASURED)/agent.json
	@echo "== The pool"
	cargo build --release --locked -p runx-pool --example pool-bench
	@scripts/bench_pool.py --dist $(DIST) --programs $(RELEASE) --json $(MEASURED)/pool.json
	@echo "== Images"
	@scripts/bench_images.py --dist $(DIST) --json $(MEASURED)/images.json
	@scripts/report --from $(MEASURED) --to docs

# The pictures of docs/guide.md, taken from the terminal that the tests use.
pictures:
	@RUNX_PICTURES=$(CURDIR)/docs/pictures tests/guide/run --dist $(DIST) -k test_terminal

# The full counts of what `make test` holds samples of. RUNX_SEED repeats the kills of an earlier run.
SOAK := RUNX_DIST=$(DIST) cargo test --locked -p runx-tests
soak:
	@scripts/setup test
	@$(MAKE) --no-print-directory build
	@echo "== 1,000 probes, and 200 containers at once"
	RUNX_ROUNDS=1000 $(SOAK) --test cri_running -- probes
	RUNX_ROUNDS=200 $(SOAK) --test cri -- many_containers
	@echo "== 500 kills at random moments"
	RUNX_ROUNDS=500 $(SOAK) --test faults -- --nocapture
	@echo "== Races between commands"
	RUNX_ROUNDS=200 $(SOAK) --test state
	@echo "== A million inputs for each parser"
	RUNX_ROUNDS=1000000 cargo test --locked -p runx-core --test fuzz -- --nocapture
	RUNX_ROUNDS=1000000 cargo test --locked -p containerd-shim-runx of_any_form -- --nocapture
	RUNX_ROUNDS=1000000 cargo test --locked -p runx-pool of_any_form -- --nocapture
	@echo "== 100,000 executions in a pool, by tiers"
	RUNX_ROUNDS=35000 cargo test --locked -p runx-pool --test soak
	@echo "== 10,000 commands, and 300 requests of each kind"
	RUNX_ROUNDS=10000 tests/agent/run --dist $(DIST) -k many_commands
	RUNX_EXAMPLES=300 tests/agent/run --dist $(DIST) -k any_request
	RUNX_TERMINALS=200 RUNX_DIRECTORIES=50000 tests/agent/run --dist $(DIST) -k "two_hundred or large_tree"
	@echo "== The node's installer with every kind of containerd, killed before each of its steps"
	RUNX_CONTAINERDS=$$(python3 tests/k8s/tools.py) RUNX_ROUNDS=1 $(SOAK) --test node --test node_faults --test node_edits --test node_pods --test node_layouts
	@echo "== Pods with every kind of containerd"
	@for directory in $$(python3 tests/k8s/tools.py | tr : ' '); do \
	    PATH=$$directory:$$PATH RUNX_DIST=$(DIST) cargo test --locked -p runx-tests --test cri --test cri_running --test task_api || exit 1; done
	@echo "== 2,000 pods"
	RUNX_ROUNDS=2000 $(SOAK) --test soak -- --nocapture

# A real kubelet and control plane on this machine. K8S_FLAGS: --only WORD, and --rounds N for the first.
test-k8s:
	@scripts/setup k8s
	@$(MAKE) --no-print-directory build
	@tests/k8s/k8s test --dist $(DIST) $(K8S_FLAGS)

# The same with a second node, a virtual machine with cgroup version 2 and systemd, and runx on that.
test-k8s-vm:
	@scripts/setup k8s-vm
	@$(MAKE) --no-print-directory build
	@tests/k8s/k8s test --vm --dist $(DIST) $(K8S_FLAGS)

lint:
	@scripts/setup lint
	@echo "== Formatting"
	cargo fmt --all --check
	@echo "== Clippy"
	cargo clippy --locked --workspace --all-targets -- -D warnings

# No dependency on build: it is run by root, and the build need not be.
# Where shells look for completions, by shell.
COMPLETIONS := bash:bash-completion/completions/runx zsh:zsh/site-functions/_runx fish:fish/vendor_completions.d/runx.fish

install:
	@for program in $(PROGRAMS); do \
		[ -x $(DIST)/$$program ] || { echo "$(DIST)/$$program is missing: run make build" >&2; exit 1; }; \
	done
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 $(addprefix $(DIST)/,$(PROGRAMS)) $(DESTDIR)$(PREFIX)/bin/
	$(DIST)/runx man --output $(DESTDIR)$(PREFIX)/share/man
	@set -e; $(foreach place,$(COMPLETIONS),\
		install -d $(dir $(DESTDIR)$(PREFIX)/share/$(word 2,$(subst :, ,$(place)))); \
		$(DIST)/runx completion $(word 1,$(subst :, ,$(place))) >$(DESTDIR)$(PREFIX)/share/$(word 2,$(subst :, ,$(place)));)

uninstall:
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/bin/,$(PROGRAMS))
	rm -f $(DESTDIR)$(PREFIX)/share/man/man1/runx.1 $(DESTDIR)$(PREFIX)/share/man/man1/runx-*.1
	rm -f $(DESTDIR)$(PREFIX)/share/man/man5/runx-config.5
	rm -f $(foreach place,$(COMPLETIONS),$(DESTDIR)$(PREFIX)/share/$(word 2,$(subst :, ,$(place))))

clean:
	rm -rf $(DIST)
	cargo clean
