#!/bin/sh
# agent.sh HOST COMMAND...: runs a command on one of the hosts of up.sh; what mpirun uses instead of ssh.
while [ "${1#-}" != "$1" ]; do shift; done
host=$1
shift
export host command="$*"
exec ip netns exec "$host" unshare -u -m sh -c '
  hostname "$host" && mount --bind "$MOE_HOSTS_DIR/hosts" /etc/hosts && eval "$command"'
