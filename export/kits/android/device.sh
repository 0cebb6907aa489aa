# shellcheck shell=sh
# What check.sh and bench.sh share: options, the device, its facts, pushing what changed. Read by them, not run.
#
# On the device only mksh and toybox are counted on, as Android has them; awk and sed run on this side.

set -u
ME=$(basename "$0")
BUNDLE=$(cd "$KIT/.." && pwd)
ADB=${ADB:-adb}
SERIAL=${SERIAL:-${ANDROID_SERIAL:-}}
LLAMA_BIN=${LLAMA_BIN:-}
DIR=${DIR:-/data/local/tmp/edgealign}
THREADS=${THREADS:-4}
PROMPT=${PROMPT:-512}
GEN=${GEN:-128}
REPS=${REPS:-5}
OUT=${OUT:-$BUNDLE-results}
export CLEAN=no # read by the scripts
MARK=.edgealign-kit # in the folder on the device: what has it is ours to fill and to remove
PROGRAMS="llama-bench llama-completion"

SCRATCH=$(mktemp -d) || exit 1
trap 'rm -rf "$SCRATCH"' EXIT
trap 'exit 130' INT TERM HUP

# fail STATUS VALUE REASON FIX: one line, and the end. 1 a check failed, 2 wrong use or device, 3 a tool is missing.
fail() {
    line=$(printf '%s: %s: %s; %s' "$ME" "$2" "$3" "$4" | tr '\n' ' ')
    printf '%s\n' "$line" >&2
    exit "$1"
}

say() { printf '%s\n' "$*" >&2; }

parse_options() {
    while [ $# -gt 0 ]; do
        case $1 in
        --clean) CLEAN=yes; shift; continue ;;
        -h | --help) usage; exit 0 ;;
        --serial | --llama-bin | --dir | --threads | --prompt | --gen | --reps | --out) ;;
        *) fail 2 "$1" "is no option" "see: sh $ME --help" ;;
        esac
        [ $# -gt 1 ] || fail 2 "$1" "needs a value" "see: sh $ME --help"
        case $1 in
        --serial) SERIAL=$2 ;;
        --llama-bin) LLAMA_BIN=$2 ;;
        --dir) DIR=$2 ;;
        --threads) THREADS=$2 ;;
        --prompt) PROMPT=$2 ;;
        --gen) GEN=$2 ;;
        --reps) REPS=$2 ;;
        --out) OUT=$2 ;;
        esac
        shift 2
    done
    check_numbers --threads "$THREADS"
    check_numbers --prompt "$PROMPT"
    for whole in "--gen $GEN" "--reps $REPS"; do
        check_numbers "${whole%% *}" "${whole#* }"
        case $whole in *,*) fail 2 "$whole" "is more than one number" "give one" ;; esac
    done
    # The name is pasted into commands on the device, and removed by --clean: nothing but a plain absolute path.
    case $DIR in
    *[!A-Za-z0-9_./-]* | *..* | *//* | */ | /data/local/tmp) DIR_OK=no ;;
    /*/*) DIR_OK=yes ;;
    *) DIR_OK=no ;;
    esac
    [ $DIR_OK = yes ] || fail 2 "$DIR" "is no folder of our own on a device" "for example --dir /data/local/tmp/edgealign"
}

# check_numbers OPTION LIST: whole numbers above 0 with commas between.
check_numbers() {
    case ,$2, in
    *[!0-9,]* | *,,* | *,0*) fail 2 "$1 $2" "is not a whole number above 0" "for example $1 4" ;;
    esac
}

# on_device COMMAND: its output without carriage returns, its status; what it said on stderr is in $SCRATCH/said.
on_device() {
    "$ADB" -s "$SERIAL" shell "$1" </dev/null >"$SCRATCH/heard" 2>"$SCRATCH/said"
    heard_status=$?
    tr -d '\r' <"$SCRATCH/heard"
    return $heard_status
}

# need COMMAND WHAT: on_device for what must work; ends with the device's own words.
need() {
    on_device "$1" && return
    words=$(cat "$SCRATCH/said" "$SCRATCH/heard" | tr -d '\r' | grep . | tail -n 1)
    fail 1 "$SERIAL" "$2 failed (${words:-no reason given})" "look at the cable and the free memory, then run it again"
}

find_device() {
    command -v "$ADB" >/dev/null 2>&1 ||
        fail 3 "$ADB" "is not installed" "install Android's platform-tools (apt install adb), or set ADB=/path/to/adb"
    "$ADB" devices </dev/null >"$SCRATCH/devices" 2>"$SCRATCH/said" ||
        fail 3 "$ADB" "does not start ($(tail -n 1 "$SCRATCH/said"))" "try: $ADB devices"
    tr -d '\r' <"$SCRATCH/devices" | awk 'found; /^List of devices/ { found = 1 }' | grep . >"$SCRATCH/listed"
    if [ -z "$SERIAL" ]; then
        case $(grep -c . "$SCRATCH/listed") in
        0) fail 2 "$ADB" "sees no device" "plug one in, switch USB debugging on in its developer options" ;;
        1) SERIAL=$(cut -f 1 "$SCRATCH/listed") ;;
        *) fail 2 "$(cut -f 1 "$SCRATCH/listed" | xargs)" "are connected" "choose one with --serial" ;;
        esac
    fi
    state=$(awk -F '\t' -v serial="$SERIAL" '$1 == serial { print $2 }' "$SCRATCH/listed")
    case $state in
    device) ;;
    '') fail 2 "$SERIAL" "is not connected" "look at: $ADB devices" ;;
    unauthorized) fail 2 "$SERIAL" "does not trust this computer yet" "unlock it and accept the question on its screen" ;;
    offline) fail 2 "$SERIAL" "is offline" "plug it in again, then try: $ADB kill-server" ;;
    *) fail 2 "$SERIAL" "cannot be used ($state)" "look at: $ADB devices" ;;
    esac
    abis=$(on_device 'getprop ro.product.cpu.abilist')
    case ,$abis, in
    *,arm64-v8a,*) ;;
    *) fail 2 "$SERIAL" "is no 64-bit Arm device (${abis:-it does not say what it is})" "this kit is for arm64-v8a" ;;
    esac
}

find_programs() {
    fix="give the folder of llama.cpp's arm64 programs with --llama-bin (README.md says where they come from)"
    [ -n "$LLAMA_BIN" ] || fail 3 "llama.cpp" "is not given" "$fix"
    for program in $PROGRAMS; do
        [ -f "$LLAMA_BIN/$program" ] || fail 3 "$LLAMA_BIN" "holds no $program" "$fix"
        # The ELF header: magic, 2 for 64 bits, and at byte 18 the machine: 183 is AArch64.
        # shellcheck disable=SC2046  # the bytes are the words
        set -- $(od -An -v -tu1 -N20 "$LLAMA_BIN/$program")
        [ "${1:-} ${2:-} ${3:-} ${4:-}" = "127 69 76 70" ] ||
            fail 3 "$LLAMA_BIN/$program" "is no program for Android (no ELF file)" "$fix"
        [ "${5:-} ${19:-}" = "2 183" ] ||
            fail 3 "$LLAMA_BIN/$program" "is for another processor (ELF machine ${19:-unknown})" "$fix"
    done
}

sha256() {
    if command -v sha256sum >/dev/null 2>&1; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1
}

# Every file that belongs on the device: its place here, a tab, its name there.
list_files() {
    for file in "$BUNDLE"/model.gguf* "$BUNDLE"/adapters/*.gguf "$KIT"/*.txt; do
        [ -f "$file" ] && printf '%s\t%s\n' "$file" "${file#"$BUNDLE"/}"
    done
    for program in $PROGRAMS; do printf '%s\tbin/%s\n' "$LLAMA_BIN/$program" "$program"; done
    for file in "$LLAMA_BIN"/*.so "$LLAMA_BIN"/*.so.*; do
        [ -f "$file" ] && printf '%s\tbin/%s\n' "$file" "$(basename "$file")"
    done
}

# Push what is not there yet, or is there with other bytes; a file is in its place only when it is whole.
push_changed() {
    held=$(on_device "ls -A '$DIR' 2>/dev/null | head -n 1; ls '$DIR/$MARK' 2>/dev/null")
    case $held in
    '' | *"$MARK"*) ;;
    *) fail 2 "$DIR" "exists on the device and is not this kit's" "choose another --dir" ;;
    esac
    need "mkdir -p '$DIR/bin' '$DIR/adapters' '$DIR/kit' && : > '$DIR/$MARK'" "making $DIR"
    on_device "cd '$DIR' && sha256sum model.gguf* adapters/* kit/* bin/* 2>/dev/null" >"$SCRATCH/there"
    list_files >"$SCRATCH/files"
    : >"$SCRATCH/push"
    bytes=0
    while IFS='	' read -r file name; do
        sum=$(sha256 "$file")
        grep -q "^$sum  *$name\$" "$SCRATCH/there" && continue
        printf '%s\t%s\t%s\n' "$sum" "$file" "$name" >>"$SCRATCH/push"
        bytes=$((bytes + $(wc -c <"$file")))
    done <"$SCRATCH/files"
    wanted_kib=$((bytes / 1024 + 65536)) # and room for what the programs write
    free_kib=$(on_device "df -k '$DIR'" | awk 'END { print $(NF - 2) }')
    case $free_kib in
    '' | *[!0-9]*) say "the device does not say how much space is free; $((bytes / 1048576)) MiB are needed" ;;
    *) [ "$free_kib" -ge "$wanted_kib" ] ||
        fail 2 "$SERIAL" "has $((free_kib / 1024)) MiB free, $((wanted_kib / 1024)) MiB are needed" "free some, or another --dir" ;;
    esac
    while IFS='	' read -r sum file name; do
        say "pushing $name"
        "$ADB" -s "$SERIAL" push "$file" "$DIR/$name.part" </dev/null >"$SCRATCH/heard" 2>&1 ||
            fail 1 "$name" "cannot be pushed ($(tail -n 1 "$SCRATCH/heard"))" "look at the cable, then run it again"
        arrived=$(on_device "sha256sum '$DIR/$name.part'" | cut -d ' ' -f 1)
        [ "$arrived" = "$sum" ] || fail 1 "$name" "arrived damaged" "look at the cable, then run it again"
        need "mv '$DIR/$name.part' '$DIR/$name' && chmod 755 '$DIR/$name'" "placing $name"
    done <"$SCRATCH/push"
}

# run_there COMMAND OUT [ERRORS]: a llama.cpp program in its folder; what it says goes to files there.
run_there() {
    on_device "cd '$DIR' && export PATH='$DIR/bin':\$PATH LD_LIBRARY_PATH='$DIR/bin' && $1 >'$2' 2>${3:-&1}"
}

# last_words LOG: why a program there ended badly.
last_words() {
    on_device "cat '$DIR/$1'" >"$SCRATCH/log"
    cat "$SCRATCH/said" >>"$SCRATCH/log"
    words=$(grep -i -E 'error|fail|abort|illegal|killed' "$SCRATCH/log" | tail -n 1)
    printf '%s' "${words:-$(grep . "$SCRATCH/log" | tail -n 1)}" | cut -c 1-200
}

clean_device() {
    [ -n "$(on_device "ls '$DIR/$MARK' 2>/dev/null")" ] || fail 2 "$DIR" "is not there, or is not this kit's" "nothing was removed"
    need "rm -rf '$DIR'" "removing $DIR"
    say "removed $DIR from $SERIAL"
}

# users: one name a line.
users() {
    for file in "$BUNDLE"/adapters/*.gguf; do [ -f "$file" ] && basename "$file" .gguf; done
}

# Text as a JSON string, null for none.
quote() {
    text=$(printf '%s' "$1" | tr -d '\000-\037' | sed 's/^[ ,]*//; s/[ ,]*$//; s/\\/\\\\/g; s/"/\\"/g')
    if [ -n "$text" ]; then printf '"%s"' "$text"; else printf 'null'; fi
}

# A number, true or false as JSON, null for anything else.
number() {
    if printf '%s\n' "$1" | grep -q -E '^(-?(0|[1-9][0-9]*)(\.[0-9]+)?|true|false)$'; then printf '%s' "$1"; else printf 'null'; fi
}
