# shellcheck shell=bash
# Packages from Debian's archive without touching the machine's apt: a private set of sources and lists in
# a cache directory, filled from the mirrors that the machine uses already. Sourced; needs no root.
#
#   debian_open DIRECTORY             use DIRECTORY for apt's state; false where there is no apt
#   debian_version PACKAGE [MINIMUM]  print the version to take: the suite's own when it is at least MINIMUM,
#                                     otherwise the one in backports
#   debian_depends PACKAGE VERSION    print what that version depends on, a package name a line
#   debian_extract PACKAGE[=VERSION] DIRECTORY
#                                     download it and unpack its files below DIRECTORY, installing nothing
#   debian_program PROGRAM PACKAGE DIRECTORY
#                                     have PROGRAM on the PATH of this script: where it is not installed, from PACKAGE
#                                     unpacked below DIRECTORY
#   debian_install PACKAGE=VERSION…   install (root only), dependencies from backports where they must be
#
# Errors are one line on standard error and a false status.

# What is younger than this is not asked for again.
debian_lists_valid_minutes=1440

debian_open() {
    debian_state=$1
    command -v apt-get >/dev/null && command -v dpkg >/dev/null || return 1
    mkdir -p "$debian_state"/{lists/partial,cache/archives/partial} || return 1
    debian_apt_options=(
        -q
        -o "Dir::Etc::sourcelist=$debian_state/debian.sources"
        -o "Dir::Etc::sourceparts=-"
        -o "Dir::State::lists=$debian_state/lists"
        -o "Dir::Cache=$debian_state/cache"
        # apt gives up root for downloads, and its user cannot enter root's home. Signatures are checked
        # all the same.
        -o "APT::Sandbox::User=root"
        -o "Acquire::Retries=3"
        -o "Acquire::Languages=none"
    )
    # The sources in the deb822 format, which apt knows by the file's extension.
    [[ -s $debian_state/debian.sources ]] || debian_write_sources || return 1
    if [[ -z $(find "$debian_state/updated" -mmin "-$debian_lists_valid_minutes" 2>/dev/null) ]]; then
        debian_update
    fi
}

debian_error() {
    echo "debian-packages: $*" >&2
    return 1
}

# The machine's own Debian suites, `URI SUITE` a line.
debian_machine_suites() {
    apt-get indextargets "$@" --format '$(ORIGIN)|$(COMPONENT)|$(REPO_URI) $(RELEASE)' \
        'Created-By: Packages' 2>/dev/null | sed -n 's/^Debian|main|//p' | sort -u
}

debian_write_sources() {
    local suites uri suite codename keyring=/usr/share/keyrings/debian-archive-keyring.gpg main=
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    suites=$(debian_machine_suites)
    if [[ -z $suites ]]; then
        # A container image comes with its lists deleted, and apt names no mirror without them: fetch them
        # with the machine's sources, but to a place of ours. A third party's may fail; no matter.
        mkdir -p "$debian_state/machine-lists/partial"
        local machine=(-o "Dir::State::lists=$debian_state/machine-lists" -o "Dir::Cache=$debian_state/cache"
            -o "APT::Sandbox::User=root")
        apt-get -q update "${machine[@]}" >"$debian_state/update.log" 2>&1
        suites=$(debian_machine_suites "${machine[@]}")
    fi
    while read -r uri suite; do
        [[ -n $uri ]] || continue
        [[ $suite == *-backports* ]] && continue # added below, so that it is there once
        debian_source "$uri" "$suite"
        case $suite in
            "$codename" | stable | testing | unstable | sid) main="$uri $suite" ;;
        esac
    done <<<"$suites" >"$debian_state/debian.sources.new"
    [[ -n $main ]] || debian_error "apt knows no mirror of Debian ${codename:-(no VERSION_CODENAME)}" || return 1
    mv "$debian_state/debian.sources.new" "$debian_state/debian.sources"
    # Asked only when the suite's own versions are too old.
    read -r uri suite <<<"$main"
    debian_source "$uri" "$suite-backports" >"$debian_state/backports.sources"
    echo "$suite-backports" >"$debian_state/backports"
}

debian_source() {
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\n' "$1" "$2"
    [[ -r $keyring ]] && printf 'Signed-By: %s\n' "$keyring"
    printf '\n'
}

debian_update() {
    if ! apt-get "${debian_apt_options[@]}" update >"$debian_state/update.log" 2>&1 ||
        grep -q '^[WE]: Failed to fetch' "$debian_state/update.log"; then
        debian_error "apt-get update failed: $(grep '^[EW]:' "$debian_state/update.log" | head -n 1)"
        return 1
    fi
    touch "$debian_state/updated"
}

debian_version() {
    local package=$1 minimum=${2:-0} version
    # The candidate is never from backports, which apt ranks last.
    version=$(apt-cache "${debian_apt_options[@]}" policy "$package" | sed -n 's/^  Candidate: //p')
    # What is installed counts as a candidate; it may be in no archive any more, which is no harm to us.
    if [[ -n $version && $version != '(none)' ]] && dpkg --compare-versions "$version" ge "$minimum"; then
        echo "$version"
        return
    fi
    if ! grep -q -- '-backports$' "$debian_state/debian.sources"; then
        cat "$debian_state/backports.sources" >>"$debian_state/debian.sources"
        debian_update || return 1
    fi
    # The highest version is listed first.
    version=$(apt-cache "${debian_apt_options[@]}" madison "$package" | awk -F' *[|] *' 'NR == 1 { print $2 }')
    if [[ -z $version ]] || ! dpkg --compare-versions "$version" ge "$minimum"; then
        debian_error "Debian has $package ${version:-in no version}, but $minimum or newer is needed"
        return 1
    fi
    echo "$version"
}

debian_depends() {
    apt-cache "${debian_apt_options[@]}" show "$1=$2" |
        sed -n 's/^Depends: //p' | tr ',' '\n' | awk '{ print $1 }'
}

debian_extract() {
    local package=$1 directory=$2 download
    download=$(mktemp -d "$debian_state/download.XXXXXX") || return 1
    # The archive may have replaced the version that our lists name: ask once more with new lists.
    if ! (cd "$download" && apt-get "${debian_apt_options[@]}" download "$package") >"$debian_state/download.log" 2>&1 &&
        ! { debian_update && (cd "$download" && apt-get "${debian_apt_options[@]}" download "$package") \
            >"$debian_state/download.log" 2>&1; }; then
        rm -rf "$download"
        debian_error "cannot download $package: $(grep '^E:' "$debian_state/download.log" | head -n 1)"
        return 1
    fi
    mkdir -p "$directory" && dpkg -x "$download"/*.deb "$directory"
    local status=$?
    rm -rf "$download"
    return $status
}

debian_program() {
    command -v "$1" >/dev/null && return
    debian_extract "$2" "$3" && PATH=$PATH:$3/usr/bin:$3/bin
}

debian_install() {
    local options=("${debian_apt_options[@]}" --no-install-recommends)
    # Backports rank below everything unless they are asked for, and a package from there needs others from
    # there.
    if grep -q -- '-backports$' "$debian_state/debian.sources"; then
        options+=(-t "$(cat "$debian_state/backports")")
    fi
    DEBIAN_FRONTEND=noninteractive apt-get -y "${options[@]}" install "$@" >"$debian_state/install.log" 2>&1 ||
        debian_error "apt-get install $* failed: $(grep '^E:' "$debian_state/install.log" | head -n 1)"
}
