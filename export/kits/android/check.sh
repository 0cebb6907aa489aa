#!/bin/sh
# Same tokens on the device as where the bundle was exported? Base and every user, greedy, llama.cpp's own program.
#
#     sh check.sh --llama-bin DIR          exit 0: the same, or undecided where they part; 1: different; --help
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
undecided_to=$(sed -n 's/^# undecided up to \([0-9.]*\) logits.*/\1/p' "$KIT/expected.tsv")
same=0
undecided=0
cases=0
printf 'user\tprompt\tsame tokens\tof\tverdict\tlead of the first that is not drawn, in logits\n'
while IFS='	' read -r user prompt limit ids new leads; do
    cases=$((cases + 1))
    if ! run_case "$user" "$prompt" "$limit" >"$SCRATCH/got"; then
        fail 1 "llama-completion" "failed on $SERIAL for user $user ($(last_words check.log))" "see $DIR/check.log there"
    fi
    # Ids as one list. Where the first differs, the exporting machine's lead says whether rounding can decide there.
    printf '%s\n%s\n%s\n%s\n' "$ids" "$new" "$leads" "$(cat "$SCRATCH/got")" |
        awk -v user="$user" -v prompt="$prompt" -v most="${undecided_to:-0}" '
        NR == 1 { asked = split($0, want) }
        NR == 2 { fresh = split($0, part); for (i = 1; i <= fresh; i++) want[asked + i] = part[i] }
        NR == 3 { split($0, lead) }
        NR == 4 {
            given = split($0, got); equal = 0; verdict = "same"; by = "-"
            while (equal < asked + fresh && equal < given && want[equal + 1] == got[equal + 1]) equal++
            if (equal < asked) verdict = "other prompt"
            else if (equal < asked + fresh) { by = lead[equal - asked + 1]; verdict = by + 0 <= most + 0 ? "undecided" : "different" }
            else if (given > equal) verdict = "goes on"
            printf "%s\t%s\t%d\t%d\t%s\t%s\n", user, prompt, equal < asked ? 0 : equal - asked, fresh, verdict, by
        }' >"$SCRATCH/line"
    cat "$SCRATCH/line"
    case $(cut -f 5 "$SCRATCH/line") in
    same) same=$((same + 1)) ;;
    undecided) undecided=$((undecided + 1)) ;;
    esac
done <"$SCRATCH/cases"
said="$same of $cases answers have the expected tokens"
[ $undecided -eq 0 ] || said="$said, $undecided part where rounding decides (a lead of at most $undecided_to logits)"
if [ $((same + undecided)) -ne $cases ] || [ $cases -eq 0 ]; then
    fail 1 "$said" "$((cases - same - undecided)) are different" "see README.md: another llama.cpp, another file, a broken build?"
fi
say "$said"
