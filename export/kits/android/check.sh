#!/bin/sh
# Same tokens on the device as where the bundle was exported? Base and every user, greedy, llama.cpp's own program.
#
#     sh check.sh --llama-bin DIR          exit 0: every token the same; 1: some are not; --help lists the options
#
# llama-completion writes its token ids into the head of its prompt cache (two words, a count, the ids): they are read
# from there, so that ids are compared and not text. expected.tsv beside this file holds what they must be.

KIT=$(cd "$(dirname "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=device.sh
. "$KIT/device.sh"

usage() {
    cat <<END
usage: sh check.sh --llama-bin DIR [--serial SERIAL] [--dir DIR] [--threads N] [--clean]
  --llama-bin DIR   folder of llama.cpp's programs for arm64 Android      (or the variable LLAMA_BIN)
  --serial SERIAL   which device, where several are connected             (SERIAL)
  --dir DIR         folder on the device; now $DIR   (DIR)
  --threads N       threads on the device; now $THREADS                          (THREADS)
  --clean           remove that folder from the device and do nothing else
ADB names the adb to use.
END
}

# run_case USER PROMPT LIMIT: the ids that the device fed and drew, on one line.
run_case() {
    lora=
    [ "$1" = - ] || lora="--lora adapters/$1.gguf"
    run_there "rm -f state.bin && llama-completion -m model.gguf $lora -bf kit/prompt-$2.txt -n $3 --temp 0 -no-cnv \
--no-escape --no-warmup -ngl 0 -fa off -ctk f32 -ctv f32 -c 512 -t ${THREADS%%,*} --prompt-cache state.bin \
--prompt-cache-all </dev/null" check.log || return 1
    count=$(on_device "cd '$DIR' && od -An -v -td4 -j8 -N4 state.bin" | tr -d ' \n')
    case $count in '' | *[!0-9]*) return 1 ;; esac
    on_device "cd '$DIR' && od -An -v -td4 -j12 -N$((4 * count)) state.bin && rm -f state.bin" | tr -s ' \n' ' '
}

parse_options "$@"
find_device
if [ "$CLEAN" = yes ]; then
    clean_device
    exit 0
fi
find_programs
push_changed
grep -v '^#' "$KIT/expected.tsv" >"$SCRATCH/cases"
different=0
cases=0
printf 'user\tprompt\tsame\tof\tfirst other token\tlead of the expected one, in logits\n'
while IFS='	' read -r user prompt limit ids new leads; do
    cases=$((cases + 1))
    if ! run_case "$user" "$prompt" "$limit" >"$SCRATCH/got"; then
        fail 1 "llama-completion" "failed on $SERIAL for user $user ($(last_words check.log))" "see $DIR/check.log there"
    fi
    # Ids as one list; the first that differs is named, with how clearly the exporting machine had preferred its own.
    printf '%s\n%s\n%s\n%s\n' "$ids" "$new" "$leads" "$(cat "$SCRATCH/got")" | awk -v user="$user" -v prompt="$prompt" '
        NR == 1 { asked = split($0, want) }
        NR == 2 { fresh = split($0, part); for (i = 1; i <= fresh; i++) want[asked + i] = part[i] }
        NR == 3 { split($0, lead) }
        NR == 4 {
            given = split($0, got); same = 0
            while (same < asked + fresh && same < given && want[same + 1] == got[same + 1]) same++
            if (same == asked + fresh && given == same) printf "%s\t%s\t%d\t%d\t-\t-\n", user, prompt, fresh, fresh
            else if (same < asked) { printf "%s\t%s\t0\t%d\tin the prompt\t-\n", user, prompt, fresh; exit 1 }
            else { printf "%s\t%s\t%d\t%d\t%d\t%s\n", user, prompt, same - asked, fresh, same - asked + 1, lead[same - asked + 1]; exit 1 }
        }' || different=$((different + 1))
done <"$SCRATCH/cases"
if [ $different -gt 0 ]; then
    fail 1 "$different of $cases" "answers are not the expected tokens" "README.md says what a small lead means"
fi
say "all $cases answers are the expected tokens"
