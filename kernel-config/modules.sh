# shellcheck shell=bash
# Kernel modules as plain files, without kmod: picked from a tree of /lib/modules/VERSION together with what
# they depend on, uncompressed, and the order in which to load them. Sourced.
#
#   modules_collect TREE DESTINATION NAME…
#
# writes DESTINATION/*.ko and DESTINATION/load-order (file names, a line each). What is built into the kernel
# is left out. False, with a line on standard error, when a module is neither.

modules_collect() {
    modules_tree=$1 modules_destination=$2
    shift 2
    mkdir -p "$modules_destination" && : >"$modules_destination/load-order" || return 1
    # One walk over the tree; a name may have - or _ in either place.
    modules_files=$(find "$modules_tree/" -name '*.ko' -o -name '*.ko.xz' -o -name '*.ko.zst' -o -name '*.ko.gz')
    local name
    for name; do modules_add "$name" || return 1; done
}

modules_add() {
    local name=$1 pattern file plain dependency
    pattern="/${name//[-_]/[-_]}\.ko(\.(xz|zst|gz))?$"
    plain="${name//-/_}.ko"
    grep -qxF "$plain" "$modules_destination/load-order" && return 0
    grep -qE "$pattern" "$modules_tree/modules.builtin" 2>/dev/null && return 0
    file=$(grep -E -m 1 "$pattern" <<<"$modules_files") || {
        echo "modules: the kernel of $modules_tree has no module $name" >&2
        return 1
    }
    case $file in
        *.xz) xz -dc "$file" ;;
        *.zst) zstd -qdc "$file" ;;
        *.gz) gzip -dc "$file" ;;
        *) cat "$file" ;;
    esac >"$modules_destination/$plain" || return 1
    # The .modinfo section holds NUL-terminated `key=value`: depends=a,b,c.
    for dependency in $(tr '\0' '\n' <"$modules_destination/$plain" | sed -n 's/^depends=//p' | tr ',' ' '); do
        modules_add "$dependency" || return 1
    done
    echo "$plain" >>"$modules_destination/load-order"
}
