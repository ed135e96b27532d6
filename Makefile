# What one types in this directory; `make help` lists it. Everything is cargo's or a script's: nothing happens
# here that could not be typed.

target  := x86_64-unknown-linux-gnu
release := target/$(target)/release
# Tests of the emulated machine mostly wait for it, but two guests at once are slower than one after another.
jobs    ?= 2
threads ?= 1

# cargo starts test programs through it. An emulated machine is more stable with one processor (see with-kvm).
in_kvm := CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="$(CURDIR)/tests/with-kvm"
in_fuse := CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="$(CURDIR)/tests/with-fuse"

PREFIX ?= /usr/local

scripts := kernel-config/fetch kernel-config/check kernel-config/build kernel-config/debian-packages.sh \
           kernel-config/modules.sh tests/with-kvm tests/with-fuse tests/demo tests/grow-window tests/killed-waiter \
           tests/dax tests/sandbox tests/watch tests/suite tests/bench tests/kills tests/soak rootfs/image fuzz/run \
           $(wildcard tests/suites/*)

.DEFAULT_GOAL := help
.PHONY: help build kernel system demo test lint audit unit door fuzz suites-quick suites integration bench install tools

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | \
		while IFS='|' read -r name what; do printf '  make %-12s %s\n' "$$name" "$$what"; done

build: tools ## build oriel and oriel-init (release, static) in target/x86_64-unknown-linux-gnu/release
	cargo build --release -j$(jobs) -p oriel -p oriel-init

kernel: ## fetch the distribution's kernel for guests, and a busybox
	kernel-config/fetch

system: build ## build the images of a distribution that boots with systemd (Debian's, 200 MB, under a minute)
	rootfs/image
	rootfs/image --distribution fedora --release 42 --dry-run >/dev/null

# The kernel is unpacked once, here, where the result can be kept: the emulated machine cannot write to this one.
unpack = @$(release)/oriel check >/dev/null || true

demo: build kernel ## share a directory with a guest and look at it from both sides
	$(unpack)
	WITH_KVM_CPUS=1 tests/with-kvm tests/demo

test: lint audit unit door fuzz suites-quick integration ## everything a change must pass

lint: tools ## formatting, clippy, the scripts' syntax
	cargo fmt --all --check
	cargo fmt --manifest-path fuzz/Cargo.toml --check
	cargo clippy --workspace --all-targets -j$(jobs) -- -D warnings
	for script in $(scripts); do bash -n "$$script" || exit 1; done
	if command -v shellcheck >/dev/null; then shellcheck -S warning -x $(scripts); fi

# What `deny.toml` says. Neither tool is fetched for it: to build one takes longer than the tests.
# Only what a tool has found fails: `cargo audit` writes a report with `vulnerabilities` once it has looked.
audit: tools ## licences, sources and known holes of what we depend on, as far as the tools and their databases are here
	@if cargo deny --version >/dev/null 2>&1; then \
		cargo deny --offline --all-features check licenses bans sources || exit 1; \
		if timeout 60 cargo deny fetch db >/dev/null 2>&1; then \
			cargo deny --offline --all-features check advisories && \
			cargo deny --offline --manifest-path fuzz/Cargo.toml check advisories; \
		else echo "make: advisories are skipped: their database cannot be had here"; fi; \
	else echo "make: licences, bans and sources are skipped: there is no cargo-deny (cargo install cargo-deny)"; fi
	@if ! cargo audit --version >/dev/null 2>&1; then \
		echo "make: known holes are skipped: there is no cargo-audit (cargo install cargo-audit)"; \
	else mkdir -p target; for lock in Cargo.lock fuzz/Cargo.lock; do \
		if timeout 60 cargo audit --json --deny warnings --file $$lock >target/audit.json 2>target/audit.log; then \
			echo "make: cargo audit knows of no hole in $$lock"; \
		elif grep -q '"vulnerabilities"' target/audit.json; then \
			cargo audit --no-fetch --deny warnings --file $$lock; exit 1; \
		else echo "make: known holes in $$lock are skipped: cargo audit cannot have its database here (target/audit.log)"; fi; \
	done; fi

# Those of a share once more as on a host without file handles.
unit: tools ## the tests that need no virtual machine
	cargo test -j$(jobs) -p devices -p oriel -p oriel-init
	cargo test -j$(jobs) -p integration --bin bench
	ORIEL_TEST_BY_NAME=1 cargo test -j$(jobs) -p devices share::

door: tools ## the tests of a share on /dev/fuse: here as root, else in the emulated machine
	$(in_fuse) WITH_KVM_CPUS=1 cargo test -j$(jobs) -p integration --test door

# The fuzzer itself is C++, and comes as a crate.
fuzz: tools ## fuzz what a guest can touch: a minute for each target, and two to build them
	@if ! command -v c++ >/dev/null; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "make: installing g++" >&2; \
			DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends g++ >/dev/null || \
				{ apt-get -q update >/dev/null; \
				DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends g++ >/dev/null; }; \
		else \
			echo "make: a C++ compiler is missing: apt-get install g++ (Fedora: dnf install gcc-c++)" >&2; \
			exit 1; \
		fi; \
	fi
	fuzz/run --jobs $(jobs)

suites-quick: tools ## a small part of what `make suites` runs on /dev/fuse: two minutes, two more the first time
	JOBS=$(jobs) tests/suite --quick --where-possible pjdfstest stress-ng fsx fio sqlite git tar find

# All places, also when one is not clean.
suites: build kernel ## all suites, on /dev/fuse (half an hour) and in guests (hours where they are emulated)
	status=0; for place in door guest-dax guest; do tests/suite --on $$place all || status=1; done; exit $$status

integration: build kernel system ## the tests that boot guests: here if this machine can, else in an emulated one
	$(unpack)
	$(in_kvm) WITH_KVM_CPUS=1 cargo test -j$(jobs) -p integration --test guest -- --test-threads=$(threads)

bench: tools ## Oriel beside QEMU with virtiofsd, 9p, a disk image, and alioth: a table, and a report in target/bench
	jobs=$(jobs) tests/bench

install: build ## install oriel and oriel-init below PREFIX (/usr/local)
	install -D -m 0755 $(release)/oriel "$(DESTDIR)$(PREFIX)/bin/oriel"
	install -D -m 0755 $(release)/oriel-init "$(DESTDIR)$(PREFIX)/bin/oriel-init"

# cargo links with the system's C compiler, and statically: that takes libc.a.
tools:
	@command -v cargo >/dev/null || { echo "make: cargo is missing: install Rust (rustup.rs)" >&2; exit 1; }
	@if ! { command -v cc >/dev/null && [ -e "$$(cc -print-file-name=libc.a)" ]; }; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "make: installing gcc and libc6-dev" >&2; \
			apt-get -q update >/dev/null; \
			DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends gcc libc6-dev >/dev/null; \
		else \
			echo "make: a C compiler and the static libc are missing: apt-get install gcc libc6-dev" \
				"(Fedora: dnf install gcc glibc-static)" >&2; \
			exit 1; \
		fi; \
	fi
