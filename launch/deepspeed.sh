#!/usr/bin/env bash
# Several hosts that ssh reaches without a password and that share the run's folder and the data:
#   HOSTFILE=launch/hostfile launch/deepspeed.sh umd-l2 --data.source latents/imagenet --out runs/umd-l2
# A line a host in the hostfile, `node01 slots=8`. This looks at each before it starts; a host that dies between is
# told by rank 0 after --parallel.timeout seconds.
set -euo pipefail
HOSTFILE=${HOSTFILE:-launch/hostfile}
if [ ! -r "$HOSTFILE" ]; then
    echo "umd: cannot read the hostfile $HOSTFILE; write one with a line a host, such as: node01 slots=8" >&2
    exit 2
fi
dead=
for host in $(awk '!/^#/ && NF {print $1}' "$HOSTFILE"); do
    ssh -n -o BatchMode=yes -o ConnectTimeout=10 "$host" true || dead+=" $host"
done
if [ -n "$dead" ]; then
    echo "umd: ssh does not reach$dead; take them out of $HOSTFILE, or mend them" >&2
    exit 2
fi
# The first word may be another command of umd than pretrain: finetune RUN, evaluate RUN, encode-latents.
case ${1-} in finetune | evaluate | sample | probe | transfer | embed | encode-latents | encode-pixels) ;; *) set -- pretrain "$@" ;; esac
exec deepspeed --hostfile "$HOSTFILE" --module umd.cli "$@"
