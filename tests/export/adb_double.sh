#!/usr/bin/env bash
# A double of adb: one "device" that is a folder of this machine. push and pull copy, shell runs the command here, with
# Android's getprop and dumpsys answered from below. It stands for the cable and for nothing behind it: the programs are
# the arm64 ones under qemu-aarch64, or the stand-ins that a test puts into ADB_DOUBLE_PROGRAMS.
#
# ADB_DOUBLE_DEVICES  lines of `adb devices`; default one device that is ready
# ADB_DOUBLE_ABI      what it says its processor is
# ADB_DOUBLE_FREE_KIB what df says is free
# ADB_DOUBLE_LOG      every call, one a line
# ADB_DOUBLE_SHELL    the device's shell; default bash
set -u
printf '%s\n' "$*" | tr '\n' ' ' >>"${ADB_DOUBLE_LOG:-/dev/null}"
echo >>"${ADB_DOUBLE_LOG:-/dev/null}"

if [ "$1" = devices ]; then
    printf 'List of devices attached\n%b\n' "${ADB_DOUBLE_DEVICES-double\tdevice}"
    exit 0
fi
if [ "$1 $2" != "-s double" ]; then
    echo "error: device '$2' not found" >&2
    exit 1
fi
shift 2
case $1 in
push | pull)
    [ "${ADB_DOUBLE_FAIL:-}" = "$1" ] && { echo "adb: error: failed to copy '$2': device offline"; exit 1; }
    [ "${ADB_DOUBLE_FAIL:-}" = damage ] && { echo damaged >"$3"; exit 0; }
    cp "$2" "$3" && echo "$2: 1 file $1ed"
    ;;
shell)
    # Functions come before the PATH that the script sets: that is where an arm64 program meets qemu.
    export ADB_DOUBLE_COMMAND=$2
    # shellcheck disable=SC2016  # it is for the other shell
    exec "${ADB_DOUBLE_SHELL:-bash}" -c '
        getprop() {
            case $1 in
            ro.product.cpu.abilist) echo "${ADB_DOUBLE_ABI-arm64-v8a,armeabi-v7a}" ;;
            ro.product.model) echo "Double \"One\"" ;;
            ro.product.manufacturer) echo Nobody ;;
            ro.build.version.release) echo 16 ;;
            esac
        }
        dumpsys() {
            case $1 in
            battery) printf "Current Battery Service state:\n  AC powered: false\n  USB powered: true\n  status: 2\n  level: 81\n  temperature: 287\n" ;;
            thermalservice) printf "IsStatusOverride: false\nThermal Status: 0\n" ;;
            esac
        }
        if [ -n "${ADB_DOUBLE_FREE_KIB:-}" ]; then
            df() { printf "Filesystem 1K-blocks Used Available Use%% Mounted on\n/dev/x 9 9 %s 1%% /data\n" "$ADB_DOUBLE_FREE_KIB"; }
        fi
        program() {
            name=$1
            shift
            if [ -n "${ADB_DOUBLE_PROGRAMS:-}" ]; then "$ADB_DOUBLE_PROGRAMS/$name" "$@"; return; fi
            qemu-aarch64 -cpu max "${PATH%%:*}/$name" "$@"
        }
        llama-bench() { program llama-bench "$@"; }
        llama-completion() { program llama-completion "$@"; }
        eval "$ADB_DOUBLE_COMMAND"
    '
    ;;
*)
    echo "adb: unknown command $1" >&2
    exit 1
    ;;
esac
