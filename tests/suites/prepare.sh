# shellcheck shell=bash
# What suites need, fetched once into a cache directory: programs for this machine, a root file system for guests,
# an archive for the apt suite. Sourced by tests/suite, which sets $project, $cache, $place, $where_possible and
# say/die.

: "${project:?}" "${cache:?}" "${place:?}"
# shellcheck source=kernel-config/debian-packages.sh
. "$project/kernel-config/debian-packages.sh"

pjdfstest_version=0.2.2
fsx_version=0.3.2

# What each suite takes: a program and the package it is in; those without are cargo's. A file system of their own
# (mkfs.ext4) they like to have, but tmpfs will do.
declare -A needs=(
    [pjdfstest]=pjdfstest [fsx]=fsx
    [stress-ng]=stress-ng:stress-ng [fio]=fio:fio [sqlite]=sqlite3:sqlite3 [git]=git:git
    [tar]='setfacl:acl setfattr:attr' [apt]=mmdebstrap:mmdebstrap [find]=perl:perl-base
)
guest_packages=(stress-ng fio acl attr sqlite3 git e2fsprogs)
# What the apt suite installs: programs, configuration, triggers, some thousand files.
apt_packages=(git python3-minimal less)

have() {
    case $1 in
        # Another program has the name as well.
        pjdfstest | fsx) [[ -x $cache/cargo/bin/$1 ]] ;;
        *) PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null ;;
    esac
}

# install_packages PACKAGE…: as far as they can be had; $reason says why one cannot.
install_packages() {
    local package
    if [[ $(id -u) != 0 ]]; then
        reason="type: sudo apt-get install $*"
        return
    fi
    say "installing $*"
    if ! debian_open "$(dirname "$cache")/debian" 2>"$cache/reason"; then
        reason=$(tail -n 1 "$cache/reason")
        reason=${reason:-there is no apt}
    elif ! debian_install "$@" 2>/dev/null; then
        # One that is in no archive is not to keep the others away.
        for package in "$@"; do debian_install "$package" 2>"$cache/reason" || reason=$(tail -n 1 "$cache/reason"); done
    fi
}

# Not from here: the project's own cargo configuration is not theirs. Optimized as far as it does not take minutes,
# and what two of them are made of is built once. $crate_reason says why one cannot be had.
install_crate() {
    say "building $1 $2"
    (cd "$cache" && CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_DEBUG=0 \
        CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 cargo install --locked --root "$cache/cargo" \
        --target-dir "$cache/cargo-target" "$1@$2" >"$cache/cargo.log" 2>&1) ||
        crate_reason=$(grep '^error' "$cache/cargo.log" | head -n 1)
}

# prepare_programs SUITE…: sets $ready to those whose programs are here now. Where that is not all of them, it says
# so with $where_possible, and dies without.
prepare_programs() {
    local suite entry reason="" crate_reason="" wanted=() missing why
    have mkfs.ext4 || wanted=(e2fsprogs)
    case $place in guest*) have mmdebstrap || wanted+=(mmdebstrap) ;; esac
    for suite in "$@"; do
        for entry in ${needs[$suite]}; do
            [[ $entry != *:* ]] || have "${entry%%:*}" || wanted+=("${entry#*:}")
        done
    done
    if [[ ${#wanted[@]} -gt 0 ]]; then install_packages "${wanted[@]}"; fi
    for suite in "$@"; do
        case $suite in
            pjdfstest) have pjdfstest || install_crate pjdfstest $pjdfstest_version ;;
            fsx) have fsx || install_crate fsx $fsx_version ;;
        esac
    done
    rm -rf "$cache/cargo-target"
    ready=()
    for suite in "$@"; do
        missing=
        for entry in ${needs[$suite]}; do
            if have "${entry%%:*}"; then continue; fi
            missing=${entry%%:*}
            case $entry in *:*) why=$reason ;; *) why=$crate_reason ;; esac
        done
        if [[ -z $missing ]]; then
            ready+=("$suite")
        elif [[ $where_possible ]]; then
            say "skipping $suite: $missing is not here${why:+ ($why)}"
        else
            die "$suite takes $missing${why:+ ($why)}"
        fi
    done
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
    local program
    for program in pjdfstest fsx; do
        if have $program; then install "$cache/cargo/bin/$program" "$cache/rootfs/usr/local/bin/" || exit 1; fi
    done
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
