#!/usr/bin/env bash
# A quarter of an hour on a machine with one GPU: is today's code right, how fast are its steps, its kernels.
#
#     bash bench/gpu_minutes.sh steps      8.5 minutes: checks and tests, then steps and sampling; compiles for the sweep
#     bash bench/gpu_minutes.sh kernels    4 minutes: kernels in other tiles, those of before/, every op beside eager
#
# From the root of the project; records go to $OUT (default: out). Wheels that the machine lacks may lie in .whl/ (tyro,
# simplejpeg; diffusers for its rows): they go into a folder of their own. Without a git folder $COMMIT names the commit
# for the records. Another commit may lie in before/ (git worktree add before 9344ed1), so that the same GPU times both.
set -uo pipefail
case ${1-} in
steps | kernels) ;;
*)
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
export OUT=${OUT:-$PWD/out} PYTHONUNBUFFERED=1
site=$(mktemp -d)
mkdir -p "$OUT"
if compgen -G ".whl/*.whl" >/dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl
fi
export PYTHONPATH=$PWD:$site
for root in . before; do
    [ ! -d $root/umd ] || for folder in kernels train bench; do ln -sfn ../$folder $root/umd/$folder; done
done

case ${1-} in
steps)
    # Beside the checks, which leave most cores idle.
    timeout 220 python3 bench/sweep.py --warm >"$OUT/sweep-warm.log" 2>&1 &
    [ ! -d before ] || PYTHONPATH=$PWD/before:$PYTHONPATH timeout 220 python3 bench/sweep.py --warm >"$OUT/sweep-before.log" 2>&1 &
    timeout 500 python3 bench/first_light.py --parts env,correct,cli,tests,step,sample --budget 480
    status=$?
    wait
    exit $status
    ;;
kernels)
    timeout 80 python3 bench/sweep.py --json "$OUT/sweep.json" >"$OUT/sweep.log" 2>&1
    timeout 75 python3 -m umd.cli bench kernels --models UMD-L/2 --streams mixed --json "$OUT/kernels.json" >"$OUT/kernels.log" 2>&1
    if [ -d before ]; then
        PYTHONPATH=$PWD/before:$PYTHONPATH timeout 100 python3 bench/sweep.py --json "$OUT/sweep-before.json" \
            >"$OUT/sweep-before.log" 2>&1
    fi
    tail -n 3 "$OUT"/sweep*.log "$OUT/kernels.log"
    ;;
esac
