#!/bin/sh
# Measure the bundle on a device with llama.cpp's own programs, and bring their numbers back.
#
#     sh bench.sh --llama-bin DIR          --help lists the options
#
# llama-bench times the base model. It has no option for a LoRA (and llama-batched-bench takes one and ignores it), so
# users are timed by llama-completion, which also times the base once more: only those rows compare with each other.
# Everything is collected aside and appears in the results folder in one move, or not at all.

KIT=$(cd "$(dirname "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=device.sh
. "$KIT/device.sh"

usage() {
    cat <<END
usage: sh bench.sh --llama-bin DIR [options]
  --llama-bin DIR   folder of llama.cpp's programs for arm64 Android      (or the variable LLAMA_BIN)
  --serial SERIAL   which device, where several are connected             (SERIAL)
  --dir DIR         folder on the device; now $DIR   (DIR)
  --threads N,N     threads on the device; now $THREADS                          (THREADS)
  --prompt N,N      tokens of a prompt for llama-bench; now $PROMPT            (PROMPT)
  --gen N           tokens to generate; now $GEN                           (GEN)
  --reps N          repetitions; now $REPS                                   (REPS)
  --out DIR         where a folder for each run goes; now beside the bundle (OUT)
  --clean           remove the folder from the device and do nothing else
ADB names the adb to use.
END
}

# The machine card that edgealign bench import reads: facts by its names, null for what the device does not tell.
write_card() {
    {
        printf '{\n  "device": %s,\n' "$(quote "$(property ro.product.manufacturer) $(property ro.product.model)")"
        printf '  "cpu": %s,\n' "$(quote "$(property ro.soc.manufacturer) $(property ro.soc.model)")"
        printf '  "architecture": %s,\n' "$(quote "$(on_device 'uname -m')")"
        printf '  "cores_logical": %s,\n' "$(number "$(on_device 'grep -c ^processor /proc/cpuinfo')")"
        printf '  "cores_usable": %s,\n' "$(number "$(on_device nproc)")"
        printf '  "ram_bytes": %s,\n' "$(number "$(on_device 'cat /proc/meminfo' | awk '/^MemTotal/ { printf "%.0f", $2 * 1024 }')")"
        printf '  "governor": %s,\n' "$(quote "$(on_device 'cat /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor' | sort -u | xargs)")"
        printf '  "os": %s,\n' "$(quote "Android $(property ro.build.version.release), $(property ro.build.id)")"
        printf '  "kernel": %s,\n' "$(quote "$(on_device 'uname -r')")"
        printf '  "cpu_busy_before": %s\n}\n' "$(number "$(busy)")"
    } >"$SCRATCH/run/machine.json"
}

property() { on_device "getprop $1"; }

# Share of the cores' time that was in use during two seconds.
busy() {
    { on_device 'grep "^cpu " /proc/stat'; on_device 'sleep 2; grep "^cpu " /proc/stat'; } |
        awk '{ all = 0; for (i = 2; i <= 9; i++) all += $i; idle = $5 + $6 }
             NR == 1 { before = all; rest = idle }
             NR == 2 && all > before { printf "%.3f", 1 - (idle - rest) / (all - before) }'
}

# What may change while it runs, before or after.
write_conditions() {
    on_device 'dumpsys battery' >"$SCRATCH/battery"
    {
        printf '"%s": {"time": %s, ' "$1" "$(quote "$(on_device 'date -u +%Y-%m-%dT%H:%M:%SZ')")"
        printf '"thermal_status": %s, ' "$(number "$(on_device 'dumpsys thermalservice' | sed -n 's/^ *Thermal Status: *//p' | head -n 1)")"
        printf '"battery_percent": %s, ' "$(number "$(battery level)")"
        printf '"battery_tenths_celsius": %s, ' "$(number "$(battery temperature)")"
        printf '"battery_status": %s, ' "$(number "$(battery status)")"
        printf '"powered": {"ac": %s, "usb": %s}}' "$(number "$(battery 'AC powered')")" "$(number "$(battery 'USB powered')")"
    }
}

battery() { sed -n "s/^ *$1: *//p" "$SCRATCH/battery" | head -n 1; }

# llama-bench prints a JSON object a line; whole lines are collected into one list, as -o json would print it.
time_base() {
    : >"$SCRATCH/rows"
    common="llama-bench -m model.gguf -ngl 0 -t $THREADS -r $REPS -o jsonl"
    for shape in "-p $PROMPT -n 0 -d 0" "-p 0 -n $GEN -d $PROMPT"; do
        say "llama-bench $shape -t $THREADS -r $REPS"
        run_there "$common $shape </dev/null" bench.jsonl bench.err ||
            fail 1 "llama-bench" "failed on $SERIAL ($(on_device "cat '$DIR/bench.err'" | tail -n 1))" "see $DIR/bench.err there"
        "$ADB" -s "$SERIAL" pull "$DIR/bench.jsonl" "$SCRATCH/part" </dev/null >"$SCRATCH/heard" 2>&1 ||
            fail 1 "$SERIAL" "does not give its numbers back ($(tail -n 1 "$SCRATCH/heard"))" "look at the cable, then run it again"
        { grep -q '^{.*}$' "$SCRATCH/part" && ! grep -v -q '^{.*}$' "$SCRATCH/part"; } ||
            fail 1 "llama-bench" "printed something else than rows of JSON" "see $DIR/bench.jsonl on the device"
        cat "$SCRATCH/part" >>"$SCRATCH/rows"
    done
    awk 'BEGIN { print "[" } { printf "%s%s", (NR > 1 ? ",\n" : ""), $0 } END { print "\n]" }' "$SCRATCH/rows" \
        >"$SCRATCH/run/llama-bench.json"
}

# One process a run, users in turn, so that heat and other work meet all of them alike.
time_users() {
    : >"$SCRATCH/rows"
    rep=0
    while [ $rep -lt "$REPS" ]; do
        rep=$((rep + 1))
        for count in $(printf '%s' "$THREADS" | tr ',' ' '); do
            for user in - $(users); do
                say "llama-completion: user $user, $count threads, $rep of $REPS"
                time_user "$user" "$count" "$rep"
            done
        done
    done
    awk 'BEGIN { print "[" } { printf "%s%s", (NR > 1 ? ",\n" : ""), $0 } END { print "\n]" }' "$SCRATCH/rows" \
        >"$SCRATCH/run/users.json"
}

time_user() {
    lora=
    name=
    [ "$1" = - ] || { lora="--lora adapters/$1.gguf"; name=$1; }
    run_there "llama-completion -m model.gguf $lora -bf kit/speed.txt -n $GEN --temp 0 --ignore-eos -no-cnv --no-escape \
--no-display-prompt -ngl 0 -t $2 </dev/null" users.log ||
        fail 1 "llama-completion" "failed on $SERIAL for user $1 ($(last_words users.log))" "see $DIR/users.log there"
    on_device "grep 'eval time' '$DIR/users.log'" >"$SCRATCH/log"
    fed=$(sed -n 's/.*prompt eval time = *\([0-9.]*\) ms \/ *\([0-9]*\) tokens.*/\2 \1/p' "$SCRATCH/log")
    drawn=$(sed -n '/prompt eval/d; s/.*eval time = *\([0-9.]*\) ms \/ *\([0-9]*\) runs.*/\2 \1/p' "$SCRATCH/log")
    { [ -n "$fed" ] && [ -n "$drawn" ]; } ||
        fail 1 "llama-completion" "prints no times that are known here" "use llama.cpp programs of about the version in README.md"
    printf '{"program": "llama-completion", "user": %s, "n_threads": %s, "repetition": %s, ' "$(quote "$name")" "$2" "$3"
    printf '"n_prompt": %s, "prompt_ms": %s, "n_gen": %s, "gen_ms": %s}\n' \
        "${fed% *}" "${fed#* }" "${drawn% *}" "${drawn#* }"
} >>"$SCRATCH/rows"

parse_options "$@"
find_device
if [ "$CLEAN" = yes ]; then
    clean_device
    exit 0
fi
mkdir -p "$OUT" 2>/dev/null || fail 2 "$OUT" "cannot be written" "choose another --out"
OUT=$(cd "$OUT" && pwd)
case $OUT/ in
"$BUNDLE"/*)
    rmdir "$OUT" 2>/dev/null
    fail 2 "$OUT" "is inside the bundle, which must stay as it was published" "choose another --out"
    ;;
esac
find_programs
push_changed
mkdir "$SCRATCH/run"
write_card
before=$(write_conditions before)
time_base
time_users
printf '{%s,\n%s}\n' "$before" "$(write_conditions after)" >"$SCRATCH/run/conditions.json"
stamp=$(date -u +%Y%m%dT%H%M%SZ)
{ cp -R "$SCRATCH/run" "$OUT/.$stamp.part-$$" && mv "$OUT/.$stamp.part-$$" "$OUT/$stamp"; } ||
    fail 2 "$OUT/$stamp" "cannot be written" "choose another --out"
say "next: edgealign bench import $OUT/$stamp/llama-bench.json --device $OUT/$stamp/machine.json --bundle $BUNDLE --out REPORT"
printf '%s\n' "$OUT/$stamp"
