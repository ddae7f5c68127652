#!/usr/bin/env bash
# Benchmark the project on a GPU, and print a report in Markdown:
#
#     bash tests/gpu_report.sh [FOLDER] > report.md
#
# FOLDER has one sub-folder of images per class; by default it is the drawn dataset. DEVICE=cpu tests the script without
# a GPU. IMAGES limits the number of images, EPOCHS and MINUTES shorten the training runs, and KILLS is the number of kills.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
data=${1:+$(realpath "$1")}
device=${DEVICE:-cuda}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder" || exit 1

# Run a command, and print it with its output.
run() {
    echo "$*" | sed "s|$root/||g; s|$folder/||g" >&2
    printf '\n```\n$ %s\n' "$(echo "$*" | sed "s|$root/||g")"
    "$@" 2>&1 | tr '\r' '\n' | grep -v '^ *$' | tail -n 25
    local status=${PIPESTATUS[0]}
    [ "$status" = 0 ] || echo "exit status $status"
    printf '```\n'
}
bench() {
    run python "$root/tests/bench.py" "$@" --device "$device" --images "${IMAGES:-0}" ${data:+--data-path "$data"}
}
train() {
    run python "$root/train.py" --device "$device" ${data:+--data-path "$data"} "$@"
}
section() {
    printf '\n## %s\n' "$1"
}

if [ "$device" = cuda ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_report.sh: no CUDA device is available; DEVICE=cpu tests the script without one" >&2
    exit 1
fi
echo "# Measurements on a GPU"
run python -c "import platform, torch; print(platform.platform(), 'Python', platform.python_version(), 'torch', torch.__version__)"
[ "$device" = cuda ] && run nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv

section "Speed"
for batch in 16 64 256; do
    bench train --batch-size "$batch" --rounds 1 --epochs "${EPOCHS:-3}"
    bench ceiling --batch-size "$batch"
    bench evaluate --batch-size "$batch" --rounds 2
done
bench plain --batch-size 64 --rounds 1 --epochs "${EPOCHS:-3}"
bench logging --rounds 1 --epochs "${EPOCHS:-3}"

section "Whole runs"
train --recipe tutorial --epochs "${EPOCHS:-3}" --name tutorial
train --recipe scratch --time-budget "${MINUTES:-1}" --name scratch
train --recipe finetune --weights runs/scratch/weights/best.pth --model resnet34 --epochs "${EPOCHS:-3}" --name finetune

section "Mixed precision against float32"
for amp in auto off; do
    train --recipe scratch --img-size 96 --epochs "${EPOCHS:-5}" --amp "$amp" --name "amp-$amp"
done

section "Peak memory of the device in GiB"
for metrics in runs/*/metrics.csv; do
    run python -c "import csv, sys; print(max(float(row['memory/peak_GiB']) for row in csv.DictReader(open(sys.argv[1], encoding='utf-8-sig'))))" "$metrics"
done

section "Kills and resumes"
run python "$root/tests/faults.py" kill --rounds "${KILLS:-20}" --device "$device"

section "NCCL, one process"
run torchrun --nproc_per_node=1 "$root/train.py" --device "$device" ${data:+--data-path "$data"} --epochs 1 --name nccl
