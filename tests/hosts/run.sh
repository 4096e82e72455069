#!/bin/sh
# run.sh NODES RANKS_OF_A_NODE MPIRUN PROGRAM: runs the program over several hosts, which are network
# namespaces of this one, and removes them again. Ends with 77, and says why, where that cannot be: it
# needs root, Open MPI, and a kernel with namespaces, veth, bridges and token buckets.
here=$(dirname "$(readlink -f "$0")")
nodes=$1 G=$2 mpirun=$3 program=$(readlink -f "$4")
skip() {
  echo "SKIPPED: $*"
  exit 77
}
[ "$(id -u)" = 0 ] || skip 'not root'
for tool in ip tc unshare mount; do
  command -v $tool > /dev/null || skip "no $tool (Debian: iproute2, util-linux)"
done
"$mpirun" --version 2> /dev/null | grep -qi 'open.mpi' || skip "$mpirun is not Open MPI"

export MOE_HOSTS=moe$$
MOE_HOSTS_DIR=$(mktemp -d) && export MOE_HOSTS_DIR
trap '"$here/down.sh"; rm -rf "$MOE_HOSTS_DIR"' EXIT
trap 'exit 1' INT TERM HUP
made=$("$here/up.sh" "$nodes" 2>&1) || skip "no network of namespaces here: $made"

hosts= i=0
while [ $i -lt "$nodes" ]; do
  hosts=$hosts${hosts:+,}$MOE_HOSTS-$i:$G
  i=$((i + 1))
done
# The first host starts the others. Shared memory inside a host, TCP between them. In the background,
# because a shell that waits for a program heeds no signal.
timeout 50 "$here/agent.sh" "$MOE_HOSTS-0" "$mpirun" --allow-run-as-root --host "$hosts" \
  -n $((nodes * G)) --map-by "ppr:$G:node" --bind-to none --oversubscribe \
  --mca plm_rsh_agent "$here/agent.sh" --mca pml ob1 --mca btl self,vader,tcp \
  --mca btl_tcp_if_include 10.77.0.0/24 --mca oob_tcp_if_include 10.77.0.0/24 \
  --mca mpi_yield_when_idle 1 "$program" "$nodes" "$G" &
wait $!
