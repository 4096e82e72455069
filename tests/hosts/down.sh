#!/bin/sh
# Removes what up.sh made, and ends what still runs there.
for node in $(ip netns list | cut -d' ' -f1 | grep "^$MOE_HOSTS-"); do
  for process in $(ip netns pids "$node"); do kill -9 "$process" 2> /dev/null; done
  ip netns del "$node"
done
