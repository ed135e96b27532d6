# shellcheck shell=bash
# What suites need, fetched once into a cache directory: programs for this machine, a root file system for guests,
# an archive for the apt suite. Sourced by tests/suite, which sets $project, $cache and say/die.

: "${project:?}" "${cache:?}"
# shellcheck source=kernel-config/debian-packages.sh
. "$project/kernel-config/debian-packages.sh"

pjdfstest_version=0.2.2
fsx_version=0.3.2

# Program and the package it is in.
host_programs=(stress-ng:stress-ng fio:fio setfacl:acl setfattr:attr sqlite3:sqlite3 git:git mmdebstrap:mmdebstrap
    mkfs.ext4:e2fsprogs perl:perl-base)
guest_packages=(stress-ng fio acl attr sqlite3 git e2fsprogs)
# What the apt suite installs: programs, configuration, triggers, some thousand files.
apt_packages=(git python3-minimal less)

prepare_programs() {
    local entry missing=()
    for entry in "${host_programs[@]}"; do
        command -v "${entry%%:*}" >/dev/null || missing+=("${entry#*:}")
    done
    if [[ ${#missing[@]} -gt 0 ]]; then
        [[ $(id -u) == 0 ]] || die "missing: ${missing[*]}. Type: sudo apt-get install ${missing[*]}"
        say "installing ${missing[*]}"
        debian_open "$(dirname "$cache")/debian" || die "install ${missing[*]}; there is no apt here"
        debian_install "${missing[@]}" || exit 1
    fi
    if [[ ! -x $cache/cargo/bin/pjdfstest || ! -x $cache/cargo/bin/fsx ]]; then
        say "building pjdfstest and fsx"
        # Not from here: the project's own cargo configuration is not theirs.
        (cd "$cache" && cargo install --locked --root "$cache/cargo" "pjdfstest@$pjdfstest_version" \
            "fsx@$fsx_version" >"$cache/cargo.log" 2>&1) || die "cargo install failed: $cache/cargo.log"
    fi
}

# bootstrap TARGET PACKAGES OPTION…
bootstrap() {
    local target=$1 packages=$2
    shift 2
    [[ $(id -u) == 0 ]] || die "making a root file system takes root: run tests/suite once with sudo -E"
    debian_open "$(dirname "$cache")/debian" || die "needs apt and its mirrors"
    # Without the backports that may have been added.
    local codename
    codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
    awk -v RS= -v ORS='\n\n' '!/-backports/' "$debian_state/debian.sources" >"$cache/plain.sources"
    mmdebstrap --quiet --mode=root --variant=minbase --include="$packages" "$@" "$codename" "$target" \
        "$cache/plain.sources" >"$cache/mmdebstrap.log" 2>&1 ||
        die "mmdebstrap failed: $(tail -n 3 "$cache/mmdebstrap.log")"
}

# What guests run, and the suites in it.
prepare_guest() {
    local include
    include=$(IFS=, && echo "${guest_packages[*]}")
    if [[ $(cat "$cache/rootfs.packages" 2>/dev/null) != "$include" ]]; then
        say "making a root file system for guests"
        rm -rf "$cache/rootfs" "$cache/rootfs.new"
        bootstrap "$cache/rootfs.new" "$include"
        mv "$cache/rootfs.new" "$cache/rootfs" && echo "$include" >"$cache/rootfs.packages"
    fi
    install "$cache/cargo/bin/pjdfstest" "$cache/cargo/bin/fsx" "$cache/rootfs/usr/local/bin/"
}

prepare_apt() {
    local packages="${apt_packages[*]}"
    mkdir -p "$cache/input"
    if [[ $(cat "$cache/input/apt.packages" 2>/dev/null) != "$packages" ]]; then
        say "making a root file system for apt, and downloading $packages"
        rm -f "$cache"/input/apt.*
        bootstrap "$cache/input/apt.new.tar" ca-certificates --skip=cleanup/apt \
            --customize-hook="chroot \"\$1\" apt-get update" \
            --customize-hook="chroot \"\$1\" apt-get -y --no-install-recommends --download-only install $packages"
        mv "$cache/input/apt.new.tar" "$cache/input/apt.tar" && echo "$packages" >"$cache/input/apt.packages"
    fi
}
