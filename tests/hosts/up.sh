#!/bin/sh
# up.sh NODES: network namespaces $MOE_HOSTS-0, -1, ... that are hosts of a network of their own, joined by
# a bridge in $MOE_HOSTS-switch. Their links are shaped: 1 Gbit/s, and half a millisecond for each packet
# of up to 9000 bytes, whatever its length. Writes their names to $MOE_HOSTS_DIR/hosts. See down.sh.
set -eu
mtu=9000 gap=62500 # bytes that a packet counts more than it has: 500 us at 1 Gbit/s
ip netns add "$MOE_HOSTS-switch"
ip -n "$MOE_HOSTS-switch" link add bridge type bridge
ip -n "$MOE_HOSTS-switch" link set bridge up
echo '127.0.0.1 localhost' > "$MOE_HOSTS_DIR/hosts"

shape() { # NAMESPACE LINK
  tc -n "$1" qdisc add dev "$2" root tbf rate 1gbit burst $((mtu + gap + 500)) limit 64mb overhead $gap
}
i=0
while [ "$i" -lt "$1" ]; do
  node=$MOE_HOSTS-$i
  ip netns add "$node"
  ip -n "$node" link set lo up
  ip -n "$MOE_HOSTS-switch" link add "port$i" type veth peer name eth0 netns "$node"
  # Packets are counted and shaped as they are on a wire.
  ip -n "$node" link set eth0 mtu $mtu gso_max_size $mtu gso_max_segs 1
  ip -n "$MOE_HOSTS-switch" link set "port$i" mtu $mtu master bridge up
  ip -n "$node" link set eth0 up
  ip -n "$node" addr add "10.77.0.$((i + 1))/24" dev eth0
  shape "$node" eth0
  shape "$MOE_HOSTS-switch" "port$i"
  echo "10.77.0.$((i + 1)) $node" >> "$MOE_HOSTS_DIR/hosts"
  i=$((i + 1))
done
